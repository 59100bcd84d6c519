/* stored.c: extents of a model that are stored in chunks: where their bytes are, and what went wrong there. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "manifest.h"

#define DECODERS 4u

void nx_extent_locate(const nx_extent *e, uint64_t from, uint64_t nbytes, nx_read *read) {
    read->nbytes = nbytes;
    read->check = NULL;
    if (!e->chunks) {
        read->file = e->model->files[e->file].file;
        read->offset = e->offset + from;
        return;
    }
    switch (nx_chunks_plain(e->chunks, from, nbytes, &read->file, &read->offset)) {
    case NX_PLAIN: return;
    case NX_PLAIN_CHECK:
        read->check = nx_chunks_check_read;
        read->check_ctx = e->chunks;
        read->check_item = from;
        return;
    case NX_PLAIN_NOT:
        read->file = &e->chunks->as_file;
        read->offset = from;
    }
}

static nx_status check_codec(const nx_extent *e, nx_codec codec, nx_error *error) {
    if (nx_codec_available(codec)) return NX_OK;
    nx_error_set(error, NX_E_UNSUPPORTED, 0,
                 "tensor %s is stored with zstd, and the system has no libzstd.so.1: install it (Debian: libzstd1), "
                 "or convert the model with --codec ans", e->name);
    snprintf(error->tensor, sizeof error->tensor, "%s", e->name);
    return NX_E_UNSUPPORTED;
}

nx_status nx_stored_init(nx_model *m, nx_error *error) {
    uint64_t stored = 0, raw = 0;
    for (uint32_t i = 0; i < m->n_extents; i++) {
        nx_chunks *c = m->extents[i].chunks;
        for (uint32_t k = 0; c && k < c->n; k++) {
            nx_chunk *chunk = &c->chunk[k];
            chunk->file = m->files[(uintptr_t)chunk->file].file;
            const nx_status status = check_codec(&m->extents[i], chunk->codec, error);
            if (status != NX_OK) return status;
            if (chunk->stored > stored) stored = chunk->stored;
            if (chunk->raw > raw) raw = chunk->raw;
        }
    }
    if (!raw) return NX_OK;
    const nx_status status = nx_pool_create(m->n_decoders ? m->n_decoders : DECODERS, stored, raw, &m->pool);
    if (status != NX_OK)
        nx_error_set(error, status, ENOMEM, "no memory for threads that decode chunks of up to %llu bytes",
                     (unsigned long long)raw);
    return status;
}

void nx_stored_free(nx_model *m) {
    nx_pool_destroy(m->pool);
    for (uint32_t i = 0; i < m->n_extents; i++) nx_chunks_free(m->extents[i].chunks);
}

void nx_stored_error(nx_model *m, const nx_extent *e, const nx_read *read, nx_error *error) {
    if (read->error_chunk >= e->chunks->n) return;
    const nx_chunk *k = &e->chunks->chunk[read->error_chunk];
    const char *codec = nx_codec_plugin_name(k->codec);
    nx_error_set(error, read->status, read->sys_errno, "%s in chunk %u of tensor %s (%u bytes at %llu%s%s)",
                 nx_status_text(read->status), read->error_chunk, e->name, k->stored, (unsigned long long)k->offset,
                 codec ? ", codec " : "", codec ? codec : "");
    for (uint32_t i = 0; i < m->n_files; i++)
        if (m->files[i].file == k->file) snprintf(error->path, sizeof error->path, "%s", m->files[i].path);
    snprintf(error->tensor, sizeof error->tensor, "%.100s, chunk %u,", e->name, read->error_chunk);
    error->offset = read->error_offset ? read->error_offset : k->offset;
    error->nbytes = k->stored;
}

nx_status nx_stored_read(nx_model *m, const nx_extent *e, uint64_t offset, void *dst, uint64_t nbytes) {
    nx_read failed = {.file = &e->chunks->as_file};
    failed.status = nx_chunks_read(e->chunks, offset, dst, nbytes, &failed.error_chunk, &failed.sys_errno);
    if (failed.status == NX_OK) return NX_OK;
    nx_error error;
    nx_read_error(m, e, &failed, &error);
    nx_model_fail(m, &error);
    return failed.status;
}

void nx_stored_stats(const nx_model *m, nx_stats *out) {
    if (!m->pool) return;
    nx_pool_stats now;
    nx_pool_get_stats(m->pool, &now);
    out->bounce_bytes = nx_pool_bytes(m->pool);
    out->stored_bytes = now.stored_bytes - m->pool_base.stored_bytes;
    out->raw_bytes = now.raw_bytes - m->pool_base.raw_bytes;
    out->decode_ns = now.decode_ns - m->pool_base.decode_ns;
    out->retries += now.retries - m->pool_base.retries;
}

void nx_slab_of_chunks(nx_extent *e, uint64_t slab_bytes, uint64_t ring_bytes) {
    const nx_chunks *c = e->chunks;
    uint64_t offset;
    nx_file *file;
    if (!c || e->ne[1] % 4 || c->chunk_bytes % e->row_bytes) return;
    if (c->verify == NX_VERIFY_NEVER && nx_chunks_lie(c, 0, e->nbytes, &file, &offset)) return;
    /* The classes of rows are those of nx_slab_split. The ring holds three slabs at least. */
    const uint64_t rows = c->chunk_bytes / e->row_bytes;
    uint64_t n = slab_bytes / c->chunk_bytes ? slab_bytes / c->chunk_bytes : 1;
    while (n > 1 && n * rows % 4) n--;
    if (n * rows % 4) n = 4;
    if (n * rows > e->ne[1]) n = 0;
    const uint64_t span = n * c->chunk_bytes + 4 * NX_PAGE;
    if (!n || 3 * span > ring_bytes) return;
    e->slab_rows = n * rows;
    e->n_pieces = (uint32_t)((e->ne[1] - 1) / e->slab_rows + 1);
}
