/* stream.c: the model as a FILE that llama.cpp can load from.
 *
 * One virtual GGUF, whatever the files really are: the header from memory, then each tensor at its
 * virtual offset. llama.cpp reads all of it once, but tensors that the backend pages have no business
 * in that pass: their reads return at once and touch nothing. Nothing goes through the page cache but
 * the few small tensors that llama.cpp keeps itself.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* fopencookie */
#endif
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#include "core_internal.h"

typedef struct stream {
    nx_model *model;
    uint64_t at;
    nx_extent **by_offset; /* sorted by virtual offset */
} stream;

static int by_virtual_offset(const void *a, const void *b) {
    const nx_extent *x = *(nx_extent *const *)a, *y = *(nx_extent *const *)b;
    return x->virtual_offset < y->virtual_offset ? -1 : x->virtual_offset > y->virtual_offset;
}

/* The extent that holds virtual offset `at`, or the first one after it, or NULL. */
static nx_extent *extent_at(const stream *s, uint64_t at) {
    size_t low = 0, high = s->model->n_extents;
    while (low < high) {
        const size_t mid = (low + high) / 2;
        const nx_extent *e = s->by_offset[mid];
        if (e->virtual_offset + e->nbytes <= at) low = mid + 1;
        else high = mid;
    }
    return low < s->model->n_extents ? s->by_offset[low] : NULL;
}

static ssize_t stream_read(void *cookie, char *buffer, size_t size) {
    stream *s = cookie;
    nx_model *m = s->model;
    size_t done = 0;
    while (done < size && s->at < m->virtual_bytes) {
        uint64_t n = m->virtual_bytes - s->at;
        if (n > size - done) n = size - done;
        if (s->at < m->header_bytes) {
            if (n > m->header_bytes - s->at) n = m->header_bytes - s->at;
            memcpy(buffer + done, m->header + s->at, n);
        } else {
            nx_extent *e = extent_at(s, s->at);
            if (!e || e->virtual_offset > s->at) { /* padding */
                if (e && n > e->virtual_offset - s->at) n = e->virtual_offset - s->at;
                memset(buffer + done, 0, n);
            } else {
                const uint64_t inside = s->at - e->virtual_offset;
                if (n > e->nbytes - inside) n = e->nbytes - inside;
                if (!e->claimed && nx_model_read(m, e, inside, buffer + done, n) != NX_OK) {
                    errno = EIO;
                    return done ? (ssize_t)done : -1;
                }
            }
        }
        s->at += n;
        done += n;
    }
    return (ssize_t)done;
}

static int stream_move(stream *s, int64_t offset, int whence, uint64_t *result) {
    const int64_t base = whence == SEEK_SET ? 0 : whence == SEEK_CUR ? (int64_t)s->at
                                                                     : (int64_t)s->model->virtual_bytes;
    if (base + offset < 0) {
        errno = EINVAL;
        return -1;
    }
    s->at = (uint64_t)(base + offset);
    *result = s->at;
    return 0;
}

static int stream_close(void *cookie) {
    stream *s = cookie;
    nx_model_release(s->model);
    free(s->by_offset);
    free(s);
    return 0;
}

#ifdef __APPLE__
static int mac_read(void *cookie, char *buffer, int size) {
    return (int)stream_read(cookie, buffer, (size_t)size);
}
static fpos_t mac_seek(void *cookie, fpos_t offset, int whence) {
    uint64_t at;
    return stream_move(cookie, offset, whence, &at) == 0 ? (fpos_t)at : -1;
}
static FILE *open_stream(stream *s) { return funopen(s, mac_read, NULL, mac_seek, stream_close); }
#else
static int linux_seek(void *cookie, off64_t *offset, int whence) {
    uint64_t at;
    if (stream_move(cookie, *offset, whence, &at) != 0) return -1;
    *offset = (off64_t)at;
    return 0;
}
static FILE *open_stream(stream *s) {
    return fopencookie(s, "rb", (cookie_io_functions_t){.read = stream_read, .seek = linux_seek,
                                                        .close = stream_close});
}
#endif

FILE *nx_model_stream(nx_model *m) {
    stream *s = calloc(1, sizeof *s);
    nx_extent **list = calloc(m->n_extents ? m->n_extents : 1, sizeof *list);
    if (!s || !list) {
        free(s);
        free(list);
        return NULL;
    }
    for (uint32_t i = 0; i < m->n_extents; i++) list[i] = &m->extents[i];
    qsort(list, m->n_extents, sizeof *list, by_virtual_offset);
    *s = (stream){.model = m, .by_offset = list};
    nx_model_retain(m);
    FILE *file = open_stream(s);
    if (!file) {
        stream_close(s);
        return NULL;
    }
    setvbuf(file, NULL, _IONBF, 0); /* no bytes copied that nobody asked for */
    return file;
}
