/* chunks.c: where the chunks of a tensor are, what they decode to, and reading them on the spot. */
#include "chunks.h"

#include <errno.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "nexus_codec.h"

#define MAX_CHUNKS (1u << 26)

nx_chunks *nx_chunks_create(uint64_t nbytes, uint64_t n_matrices, uint64_t chunk_bytes) {
    if (!nbytes || !n_matrices || nbytes % n_matrices || !chunk_bytes || chunk_bytes > UINT32_MAX) return NULL;
    const uint64_t matrix = nbytes / n_matrices, per_matrix = (matrix - 1) / chunk_bytes + 1;
    if (n_matrices > MAX_CHUNKS || per_matrix > MAX_CHUNKS / n_matrices) return NULL;
    const uint64_t n = n_matrices * per_matrix;
    nx_chunks *c = calloc(1, sizeof *c + n * (sizeof *c->chunk + sizeof *c->verified));
    if (!c) return NULL;
    c->verified = (uint8_t *)(c->chunk + n);
    c->as_file.chunks = c;
    c->nbytes = nbytes;
    c->matrix_bytes = matrix;
    c->chunk_bytes = chunk_bytes;
    c->per_matrix = (uint32_t)per_matrix;
    c->n = (uint32_t)n;
    for (uint32_t i = 0; i < c->n; i++) {
        const uint64_t at = i % per_matrix * chunk_bytes;
        c->chunk[i].raw = (uint32_t)(matrix - at < chunk_bytes ? matrix - at : chunk_bytes);
    }
    return c;
}

void nx_chunks_free(nx_chunks *c) { free(c); }

uint32_t nx_chunks_at(const nx_chunks *c, uint64_t byte, uint64_t *begin) {
    const uint64_t matrix = byte / c->matrix_bytes, part = byte % c->matrix_bytes / c->chunk_bytes;
    *begin = matrix * c->matrix_bytes + part * c->chunk_bytes;
    return (uint32_t)(matrix * c->per_matrix + part);
}

bool nx_chunks_lie(const nx_chunks *c, uint64_t from, uint64_t nbytes, nx_file **file, uint64_t *offset) {
    if (!nbytes) return false;
    uint64_t begin, last;
    const uint32_t first = nx_chunks_at(c, from, &begin), end = nx_chunks_at(c, from + nbytes - 1, &last);
    for (uint32_t i = first; i <= end; i++) {
        const nx_chunk *k = &c->chunk[i];
        if (k->codec != NX_CODEC_RAW) return false;
        if (i > first && (k->file != k[-1].file || k->offset != k[-1].offset + k[-1].stored)) return false;
    }
    *file = c->chunk[first].file;
    *offset = c->chunk[first].offset + (from - begin);
    return true;
}

static bool is_checked(const nx_chunks *c, uint32_t i) {
    return c->verify == NX_VERIFY_NEVER ||
           (c->verify == NX_VERIFY_FIRST && __atomic_load_n(&c->verified[i], __ATOMIC_RELAXED));
}

void nx_chunks_verified(const nx_chunks *c, uint32_t i) { __atomic_store_n(&c->verified[i], 1, __ATOMIC_RELAXED); }

nx_plain nx_chunks_plain(const nx_chunks *c, uint64_t from, uint64_t nbytes, nx_file **file, uint64_t *offset) {
    if (!nx_chunks_lie(c, from, nbytes, file, offset)) return NX_PLAIN_NOT;
    uint64_t begin, last;
    const uint32_t first = nx_chunks_at(c, from, &begin), end = nx_chunks_at(c, from + nbytes - 1, &last);
    bool checked = true;
    for (uint32_t i = first; i <= end && checked; i++) checked = is_checked(c, i);
    if (checked) return NX_PLAIN;
    return begin == from && last + c->chunk[end].raw == from + nbytes ? NX_PLAIN_CHECK : NX_PLAIN_NOT;
}

nx_status nx_chunks_check(const nx_chunks *c, uint64_t from, uint64_t nbytes, const void *data, uint32_t *bad,
                          uint64_t *checked) {
    const uint8_t *at = data;
    while (nbytes) {
        uint64_t begin;
        const uint32_t i = nx_chunks_at(c, from, &begin);
        const nx_chunk *k = &c->chunk[i];
        if (!is_checked(c, i)) {
            *bad = i;
            if (begin != from || nbytes < k->raw) return NX_E_INVALID;
            if (nx_xxh3_64(at, k->raw) != k->hash) return NX_E_DAMAGED;
            nx_chunks_verified(c, i);
            if (checked) *checked += k->raw;
        }
        const uint64_t n = begin + k->raw - from < nbytes ? begin + k->raw - from : nbytes;
        at += n;
        from += n;
        nbytes -= n;
    }
    return NX_OK;
}

nx_status nx_chunks_check_read(nx_read *read) {
    const nx_chunks *c = read->check_ctx;
    const uint64_t start = nx_io_now_ns();
    uint64_t checked = 0;
    const nx_status status = nx_chunks_check(c, read->check_item, read->nbytes, read->dst, &read->error_chunk, &checked);
    if (status != NX_OK) read->error_offset = c->chunk[read->error_chunk].offset;
    nx_pool_count(read->nx_owner ? read->nx_owner->pool : NULL, checked, nx_io_now_ns() - start);
    return status;
}

/* -- codecs ------------------------------------------------------------------------------------- */

static size_t (*zstd_decompress)(void *, size_t, const void *, size_t);
static unsigned (*zstd_is_error)(size_t);
static pthread_once_t zstd_once = PTHREAD_ONCE_INIT;

static void zstd_find(void) {
    static const char *const names[] = {"libzstd.so.1", "libzstd.1.dylib", "libzstd.so"};
    void *library = NULL;
    for (size_t i = 0; i < sizeof names / sizeof *names && !library; i++)
        library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (!library) return;
    void *decompress = dlsym(library, "ZSTD_decompress"), *is_error = dlsym(library, "ZSTD_isError");
    if (!decompress || !is_error) return;
    memcpy(&zstd_decompress, &decompress, sizeof decompress);
    memcpy(&zstd_is_error, &is_error, sizeof is_error);
}

int nx_codec_available(nx_codec codec) {
    if (codec >= NX_CODEC_PLUGIN) return nx_codec_plugin_name(codec) != NULL;
    if (codec != NX_CODEC_ZSTD) return codec == NX_CODEC_RAW || codec == NX_CODEC_ANS;
    pthread_once(&zstd_once, zstd_find);
    return zstd_is_error != NULL;
}

nx_status nx_chunk_decode(const nx_chunk *k, const void *stored, void *raw) {
    if (nx_xxh3_64(stored, k->stored) != k->hash) return NX_E_DAMAGED;
    nx_status status = NX_E_DAMAGED;
    if (!nx_codec_available(k->codec)) return NX_E_UNSUPPORTED;
    if (k->codec == NX_CODEC_RAW && k->stored == k->raw) {
        memcpy(raw, stored, k->raw);
        return NX_OK;
    }
    if (k->codec >= NX_CODEC_PLUGIN) {
        status = nx_codec_plugin_decode(k->codec, stored, k->stored, raw, k->raw);
    } else if (k->codec == NX_CODEC_ANS) {
        status = nx_ans_decode(stored, k->stored, raw, k->raw);
    } else if (k->codec == NX_CODEC_ZSTD) {
        const size_t n = zstd_decompress(raw, k->raw, stored, k->stored);
        if (!zstd_is_error(n) && n == k->raw) status = NX_OK;
    }
    return status == NX_E_INVALID ? NX_E_DAMAGED : status;
}

/* -- on the spot -------------------------------------------------------------------------------- */

static nx_status read_all(int fd, void *dst, uint64_t nbytes, uint64_t offset, int *sys_errno) {
    uint8_t *at = dst;
    while (nbytes) {
        const ssize_t n = pread(fd, at, nbytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            *sys_errno = n < 0 ? errno : 0;
            return n < 0 ? NX_E_IO : NX_E_TRUNCATED;
        }
        at += n;
        offset += (uint64_t)n;
        nbytes -= (uint64_t)n;
    }
    return NX_OK;
}

nx_status nx_chunks_read(const nx_chunks *c, uint64_t from, void *dst, uint64_t nbytes, uint32_t *bad, int *sys_errno) {
    uint8_t *out = dst;
    nx_status status = NX_OK;
    *sys_errno = 0;
    while (nbytes && status == NX_OK) {
        uint64_t begin;
        const uint32_t i = *bad = nx_chunks_at(c, from, &begin);
        const nx_chunk *k = &c->chunk[i];
        const uint64_t n = begin + k->raw - from < nbytes ? begin + k->raw - from : nbytes;
        uint8_t *buffer = malloc((size_t)k->stored + k->raw);
        if (!buffer) return NX_E_NOMEM;
        status = read_all(k->file->fd_buffered, buffer, k->stored, k->offset, sys_errno);
        if (status == NX_OK) status = nx_chunk_decode(k, buffer, buffer + k->stored);
        if (status == NX_OK) nx_chunks_verified(c, i);
        if (status == NX_OK) memcpy(out, buffer + k->stored + (from - begin), n);
        free(buffer);
        out += n;
        from += n;
        nbytes -= n;
    }
    return status;
}
