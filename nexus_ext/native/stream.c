/* stream.c: the model as a FILE that llama.cpp can load from without reading weights.
 *
 * One virtual GGUF, whatever the files really are: the header from memory, then each tensor at its
 * virtual offset. Reads of tensors that the backend pages return at once and read nothing: what the
 * reader gets for them is what happened to be there.
 *
 * llama.cpp would still copy "what it read" through buffers of its own, so where we can (glibc) we let
 * it believe in mmap: the FILE has a descriptor, of an empty file. Mapping that to the virtual size gives
 * addresses without memory; populating it stops at the first page. Pointers into the mapping only tell
 * the backend which tensor is meant (nx_model_overlay), and what the runtime wants to read itself, such
 * as weights for a GPU, is mapped over the addresses where it expects them.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* fopencookie */
#endif
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

#include "core_internal.h"

typedef struct stream {
    nx_model *model;
    uint64_t at;
    FILE *file;
    int empty; /* the descriptor of an empty file, or -1 */
    nx_extent **by_offset; /* those with bytes, sorted by virtual offset */
    size_t n;
} stream;

static int by_virtual_offset(const void *a, const void *b) {
    const nx_extent *x = *(nx_extent *const *)a, *y = *(nx_extent *const *)b;
    return x->virtual_offset < y->virtual_offset ? -1 : x->virtual_offset > y->virtual_offset;
}

static bool is_claimed(const nx_extent *e) { return __atomic_load_n(&e->claimed, __ATOMIC_RELAXED); }

/* One byte belongs to one tensor, or it is not clear which one a reader gets. */
static bool overlap(nx_model *m, nx_extent *const *by_offset, size_t n) {
    for (size_t i = 1; i < n; i++) {
        const nx_extent *a = by_offset[i - 1], *b = by_offset[i];
        if (a->virtual_offset + a->nbytes <= b->virtual_offset) continue;
        nx_error error;
        nx_error_set(&error, NX_E_INVALID, 0, "tensors %s and %s lie in the same place", a->name, b->name);
        nx_model_fail(m, &error);
        errno = EINVAL;
        return true;
    }
    return false;
}

/* The extent that holds virtual offset `at`, or the first one after it, or NULL. */
static nx_extent *extent_at(const stream *s, uint64_t at) {
    size_t low = 0, high = s->n;
    while (low < high) {
        const size_t mid = (low + high) / 2;
        const nx_extent *e = s->by_offset[mid];
        if (e->virtual_offset + e->nbytes <= at) low = mid + 1;
        else high = mid;
    }
    return low < s->n ? s->by_offset[low] : NULL;
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
                if (!is_claimed(e) && nx_model_read(m, e, inside, buffer + done, n) != NX_OK) {
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
    int64_t at;
    if (__builtin_add_overflow(base, offset, &at) || at < 0) {
        errno = EINVAL;
        return -1;
    }
    s->at = (uint64_t)at;
    *result = s->at;
    return 0;
}

static int stream_close(void *cookie) {
    stream *s = cookie;
    nx_model_release(s->model);
    if (s->empty >= 0) close(s->empty);
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

#ifdef __GLIBC__
/* fileno() of a cookie stream is what this public member of FILE says; a negative one means none. */
static bool give_descriptor(stream *s) {
    s->empty = memfd_create("nexus", MFD_CLOEXEC);
    if (s->empty < 0) return false;
    s->file->_fileno = s->empty;
    return fileno(s->file) == s->empty;
}
#else
static bool give_descriptor(stream *s) {
    (void)s;
    return false;
}
#endif

/* Pages of the mapping that are memory from now on. Pages below `*made` are already: a neighbour, which
 * came before in this order, ends in the same page. */
static bool overlay_memory(uint8_t *base, uint64_t begin, uint64_t end, uint64_t *made) {
    if (begin < *made) begin = *made;
    if (begin >= end) return true;
    *made = end;
    return mmap(base + begin, end - begin, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
           MAP_FAILED;
}

/* Put the bytes of one extent where the runtime expects them: the file's pages where they lie alike and
 * hold nothing else, copies elsewhere. */
static bool overlay_extent(nx_model *m, const nx_extent *e, uint8_t *base, uint64_t *made) {
    const uint64_t from = e->virtual_offset, to = from + e->nbytes;
    const uint64_t begin = from / NX_PAGE * NX_PAGE, end = nx_round_up(to, NX_PAGE);
    uint64_t inner = nx_round_up(from, NX_PAGE), inner_end = to / NX_PAGE * NX_PAGE;
    nx_read place = {.dst = NULL};
    nx_extent_locate(e, 0, e->nbytes, &place);
    const int fd = e->chunks ? place.file->fd_buffered : m->files[e->file].fd;
    if (place.file->chunks || place.offset % NX_PAGE != from % NX_PAGE || inner >= inner_end) inner = inner_end = end;
    if (!(overlay_memory(base, begin, inner, made) && overlay_memory(base, inner_end, end, made) &&
           (inner == inner_end || mmap(base + inner, inner_end - inner, PROT_READ, MAP_SHARED | MAP_FIXED,
                                       fd, (off_t)(place.offset + (inner - from))) != MAP_FAILED)))
        return false;
    if (nx_model_read(m, e, 0, base + from, (inner < to ? inner : to) - from) != NX_OK) return false;
    if (inner_end < to && nx_model_read(m, e, inner_end - from, base + inner_end, to - inner_end) != NX_OK) return false;
    /* What was mapped is checked where it lies. */
    place.dst = base + from;
    if (inner == inner_end || !place.check || (place.status = place.check(&place)) == NX_OK) return true;
    nx_error error;
    nx_read_error(m, e, &place, &error);
    nx_model_fail(m, &error);
    return false;
}

nx_status nx_model_overlay(nx_model *m, void *data, const nx_extent *at) {
    uint8_t *base = (uint8_t *)data - at->virtual_offset;
    if (m->overlaid || (uintptr_t)base % NX_PAGE) return NX_OK; /* done, or not a mapping of ours */
    m->overlaid = true;
    nx_extent **list = malloc((m->n_extents ? m->n_extents : 1) * sizeof *list), *failed = NULL;
    size_t n = 0;
    for (uint32_t i = 0; list && i < m->n_extents; i++)
        if (m->extents[i].nbytes && !is_claimed(&m->extents[i]) && !(m->view_expected && m->view_expected[i]))
            list[n++] = &m->extents[i];
    if (n) qsort(list, n, sizeof *list, by_virtual_offset);
    uint64_t made = 0;
    for (size_t i = 0; i < n && !failed; i++)
        if (!overlay_extent(m, list[i], base, &made)) failed = list[i];
    const int code = errno;
    const bool complete = list && !failed;
    free(list);
    if (complete) return NX_OK;
    nx_error error;
    nx_error_set(&error, NX_E_NOMEM, code, "tensor %s cannot be mapped for the runtime",
                 failed ? failed->name : at->name);
    nx_model_fail(m, &error);
    return NX_E_NOMEM;
}

FILE *nx_model_stream(nx_model *m, int *has_descriptor) {
    stream *s = calloc(1, sizeof *s);
    nx_extent **list = calloc(m->n_extents ? m->n_extents : 1, sizeof *list);
    size_t n = 0;
    for (uint32_t i = 0; list && i < m->n_extents; i++)
        if (m->extents[i].nbytes) list[n++] = &m->extents[i];
    if (n) qsort(list, n, sizeof *list, by_virtual_offset);
    if (!s || !list || overlap(m, list, n)) {
        free(s);
        free(list);
        return NULL;
    }
    *s = (stream){.model = m, .empty = -1, .by_offset = list, .n = n};
    nx_model_retain(m);
    s->file = open_stream(s);
    if (!s->file) {
        stream_close(s);
        return NULL;
    }
    /* Buffered on purpose: without a buffer, glibc asks a cookie for one byte at a time. */
    *has_descriptor = give_descriptor(s);
    m->overlaid = !*has_descriptor; /* without one, what the runtime hands over is no mapping of it */
    return s->file;
}

void nx_model_stream_close(FILE *file) {
#ifdef __GLIBC__
    file->_fileno = -2; /* what it was: the descriptor is the stream's to close, not stdio's */
#endif
    fclose(file);
}
