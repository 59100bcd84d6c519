/* io_setup.c: the life of an nx_io up to its first read, and what it says of itself. */
#include "io_internal.h"

#include <stdlib.h>
#include <string.h>

static nx_status start_engine(nx_io *io) {
    int number = io->options.engine;
    if (number == NX_IO_ENGINE_AUTO) {
        const char *asked = getenv("NEXUS_IO_ENGINE");
        if (asked && *asked) {
            if (strcmp(asked, "uring") == 0)
                number = NX_IO_ENGINE_URING;
            else if (strcmp(asked, "threads") == 0)
                number = NX_IO_ENGINE_THREADS;
            else
                return NX_E_INVALID;
        }
    }
    if (number != NX_IO_ENGINE_THREADS) {
        io->engine = &nx_engine_uring;
        nx_status status = io->engine->start(io);
        if (status != NX_E_UNSUPPORTED || number == NX_IO_ENGINE_URING) return status;
    }
    io->engine = &nx_engine_threads;
    return io->engine->start(io);
}

nx_status nx_io_create(const nx_io_options *options, nx_io **out) {
    *out = NULL;
    nx_io *io = calloc(1, sizeof *io);
    if (!io) return NX_E_NOMEM;
    if (options) io->options = *options;
    nx_io_options *o = &io->options;
    if (o->depth == 0) o->depth = NX_IO_DEPTH;
    if (o->depth > NX_IO_DEPTH_MAX) o->depth = NX_IO_DEPTH_MAX;
    if (o->request_bytes == 0) o->request_bytes = NX_IO_REQUEST_BYTES;
    if (o->request_bytes > NX_IO_REQUEST_BYTES_MAX) o->request_bytes = NX_IO_REQUEST_BYTES_MAX;
    o->request_bytes = (uint32_t)nx_io_ceil(o->request_bytes, NX_IO_CUT_BYTES);
    if (o->n_threads == 0) o->n_threads = NX_IO_THREADS;
    if (o->n_threads > o->depth) o->n_threads = o->depth;
    if (o->retries == 0) o->retries = NX_IO_RETRIES;

    nx_io_spare_limits(io, 0, 0);
    nx_status status = NX_E_INVALID;
    if (o->engine >= NX_IO_ENGINE_AUTO && o->engine <= NX_IO_ENGINE_THREADS) {
        io->requests = calloc(o->depth, sizeof *io->requests);
        status = io->requests ? start_engine(io) : NX_E_NOMEM;
    }
    if (status != NX_OK) {
        free(io->requests);
        free(io);
        return status;
    }
    for (uint32_t i = o->depth; i-- > 0;) {
        io->requests[i].next = io->free_list;
        io->free_list = &io->requests[i];
    }
    *out = io;
    return NX_OK;
}

void nx_io_set_pool(nx_io *io, struct nx_chunk_pool *pool) {
    io->pool = pool;
}

const char *nx_io_engine_name(const nx_io *io) {
    return io->engine->name;
}

const char *nx_io_engine_note(const nx_io *io) {
    return io->note;
}

void nx_io_get_stats(const nx_io *io, nx_io_stats *out) {
    *out = io->stats;
}
