/*
 * io_probe.c: the cold read bandwidth of the disk under one file.
 *
 * Direct reads are cold by nature. Where they are refused, the pages are dropped first, and the
 * result says whether the kernel admits that they are gone.
 */
#include "io_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define NX_PROBE_ALIGN 4096u
#define NX_PROBE_HUGE_BYTES (2u << 20)
#define NX_PROBE_BYTES (256u << 20)
#define NX_PROBE_NS 2000000000u
#define NX_PROBE_BUFFERS_MAX (1u << 30)
/* Reads go to this much memory in turn, as weights do: a few MiB that are used again and again stay in the
 * CPU's caches, and some machines (virtual ones most of all) then read up to 1.4 times as fast as into memory. */
#define NX_PROBE_SPREAD_BYTES (128u << 20)

typedef struct nx_probe {
    nx_io *io;
    nx_file *file;
    nx_read *reads; /* each with its own part of `memory` */
    uint64_t n_reads;
    uint8_t *memory;
    uint64_t n_blocks; /* that fit into the file */
    uint64_t random;   /* state */
    uint64_t next;     /* sequential: block to read */
    nx_probe_options options;
} nx_probe;

/* splitmix64: S. Vigna, public domain; enough to spread offsets. */
static uint64_t next_random(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

#ifdef __linux__
/* Drop the file's pages and ask whether they are gone. */
static const char *drop_pages(const nx_file *file) {
    (void)posix_fadvise(file->fd_buffered, 0, 0, POSIX_FADV_DONTNEED);
    size_t n_pages = (size_t)nx_io_ceil(file->nbytes, 4096) / 4096, n_cached = 0;
    unsigned char *cached = malloc(n_pages);
    void *at = mmap(NULL, (size_t)file->nbytes, PROT_READ, MAP_SHARED, file->fd_buffered, 0);
    const char *text = "buffered: pages dropped, the kernel would not say whether they are gone";
    if (cached && at != MAP_FAILED && sysconf(_SC_PAGESIZE) == 4096 &&
        mincore(at, (size_t)file->nbytes, cached) == 0) {
        for (size_t i = 0; i < n_pages; i++) n_cached += cached[i] & 1u;
        text = n_cached * 100 <= n_pages
                   ? "buffered: pages dropped before, and gone"
                   : "buffered: pages could not be dropped, the number may be that of memory";
    }
    if (at != MAP_FAILED) munmap(at, (size_t)file->nbytes);
    free(cached);
    return text;
}
#else
static const char *drop_pages(const nx_file *file) {
    (void)file;
    return "uncached: pages that were in memory before may be in the number";
}
#endif

static nx_status submit_next(nx_probe *p, nx_read *read) {
    uint64_t block = p->options.block_bytes;
    if (p->options.random) {
        uint64_t last = (p->file->nbytes - block) / NX_PROBE_ALIGN;
        read->offset = next_random(&p->random) % (last + 1) * NX_PROBE_ALIGN;
    } else {
        read->offset = p->next * block;
        p->next = (p->next + 1) % p->n_blocks;
    }
    return nx_io_submit(p->io, &read, 1);
}

/* Keep the engine supplied until enough bytes are asked for or the time is over. */
static nx_status run(nx_probe *p, nx_probe_result *out) {
    uint64_t n_wanted = p->options.max_bytes / p->options.block_bytes, n_asked = 0, n_done = 0;
    uint64_t n_open = 2 * (uint64_t)p->options.depth; /* so that the engine always has one to issue */
    nx_status status = NX_OK;
    if (n_wanted == 0) n_wanted = 1;
    if (!p->options.random && n_wanted > p->n_blocks) n_wanted = p->n_blocks;
    uint64_t begin_ns = nx_io_now_ns(), now_ns = begin_ns;
    while (status == NX_OK && n_asked < n_wanted && n_asked < n_open)
        status = submit_next(p, &p->reads[n_asked++]);
    /* Reads are waited for in the order of submission; those that overtook are there already. */
    while (status == NX_OK && n_done < n_asked) {
        nx_read *read = &p->reads[n_done % p->n_reads];
        status = nx_io_wait(p->io, read, NULL, NULL);
        if (status != NX_OK) {
            out->sys_errno = read->sys_errno;
            break;
        }
        n_done++;
        out->bytes += p->options.block_bytes;
        now_ns = nx_io_now_ns();
        if (n_asked < n_wanted && now_ns - begin_ns < p->options.max_ns) {
            status = submit_next(p, &p->reads[n_asked++ % p->n_reads]);
        }
    }
    out->ns = now_ns - begin_ns;
    return status;
}

static nx_status prepare(nx_probe *p, nx_probe_result *out) {
    nx_probe_options *o = &p->options;
    uint64_t block = o->block_bytes;
    if (p->file->nbytes < block) return NX_E_TRUNCATED;
    p->n_blocks = p->file->nbytes / block;
    p->random = o->seed;
    p->next = o->seed ? next_random(&p->random) % p->n_blocks : 0;
    if (nx_file_is_direct(p->file)) {
        out->direct = 1;
        snprintf(out->how_cold, sizeof out->how_cold, "direct");
    } else {
        snprintf(out->how_cold, sizeof out->how_cold, "%s", drop_pages(p->file));
    }

    nx_io_options io = {.engine = o->engine,
                        .depth = o->depth,
                        .request_bytes = o->block_bytes,
                        .n_threads = o->depth < 64 ? o->depth : 64,
                        .drop_cache = 1};
    nx_status status = nx_io_create(&io, &p->io);
    if (status != NX_OK) return status;
    out->engine = p->io->engine->number;

    const size_t stride = (size_t)block + 2 * NX_IO_SLACK;
    const uint64_t spread = o->max_bytes < NX_PROBE_SPREAD_BYTES ? o->max_bytes : NX_PROBE_SPREAD_BYTES;
    p->n_reads = 2 * (uint64_t)o->depth;
    if (p->n_reads < spread / block) p->n_reads = spread / block;
    const size_t nbytes = (size_t)nx_io_ceil(stride * p->n_reads, NX_PROBE_HUGE_BYTES);
    void *memory;
    p->reads = calloc(p->n_reads, sizeof *p->reads);
    if (!p->reads || posix_memalign(&memory, NX_PROBE_HUGE_BYTES, nbytes) != 0) return NX_E_NOMEM;
    p->memory = memory;
#ifdef MADV_HUGEPAGE
    (void)madvise(memory, nbytes, MADV_HUGEPAGE); /* as weights are read: it makes a difference */
#endif
    memset(memory, 0, nbytes); /* the first touch of a page is not the disk's fault */
    for (size_t i = 0; i < p->n_reads; i++) {
        p->reads[i].file = p->file;
        p->reads[i].nbytes = block;
        p->reads[i].dst = p->memory + stride * i + NX_IO_SLACK;
    }
    return NX_OK;
}

nx_status nx_io_probe(const char *path, const nx_probe_options *options, nx_probe_result *out) {
    nx_probe p = {0};
    memset(out, 0, sizeof *out);
    if (options) p.options = *options;
    nx_probe_options *o = &p.options;
    if (o->block_bytes == 0) o->block_bytes = NX_IO_REQUEST_BYTES;
    if (o->depth == 0) o->depth = NX_IO_DEPTH;
    if (o->max_bytes == 0) o->max_bytes = NX_PROBE_BYTES;
    if (o->max_ns == 0) o->max_ns = NX_PROBE_NS;
    if (o->block_bytes % NX_PROBE_ALIGN != 0 || o->depth > NX_IO_DEPTH_MAX ||
        (uint64_t)o->block_bytes * o->depth > NX_PROBE_BUFFERS_MAX)
        return NX_E_INVALID;

    nx_status status = nx_file_open(path, NX_IO_DIRECT, &p.file);
    if (status == NX_OK) {
        status = prepare(&p, out);
        if (status == NX_OK) status = run(&p, out);
        if (out->direct && !nx_file_is_direct(p.file)) { /* refused on the way */
            out->direct = 0;
            snprintf(out->how_cold, sizeof out->how_cold,
                     "mixed: direct reads were refused on the way");
        }
    } else {
        out->sys_errno = errno;
    }
    nx_io_destroy(p.io); /* waits: only then is the memory ours again */
    free(p.memory);
    free(p.reads);
    nx_file_close(p.file);
    return status;
}
