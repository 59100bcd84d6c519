/*
 * nexus_io.h: reading byte ranges of files at the rate of the disk.
 *
 * It knows files, requests and errors. It knows nothing of tensors, models or ggml.
 *
 * Threads: an nx_io is driven by one thread at a time. The thread may change from call to call, as
 * long as the caller orders the calls (no two at once). An nx_file may be shared by several nx_io.
 * Nothing here survives fork() in the child.
 *
 * Ownership: the caller owns every nx_read and its destination, from submit until `done`; both stay
 * where they are for all that time. The caller closes an nx_file after the last read of it is done.
 */
#ifndef NEXUS_IO_H
#define NEXUS_IO_H

#include <stddef.h>
#include <stdint.h>

#include "nexus_status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------- files */

typedef struct nx_file nx_file;

typedef enum nx_io_mode {
    NX_IO_DIRECT = 0,  /* past the page cache where the file system lets us */
    NX_IO_BUFFERED = 1 /* through the page cache */
} nx_io_mode;

typedef struct nx_file_info {
    uint64_t nbytes;        /* size when it was opened */
    uint64_t device, inode; /* identity when it was opened */
    int64_t mtime_ns;       /* last change of its data when it was opened */
    uint32_t offset_align;  /* direct reads start and end at multiples of this; 1 if buffered */
    uint32_t mem_align;     /* direct reads land at multiples of this; 1 if buffered */
    int direct;      /* 1: reads go past the page cache (now; it may turn 0, never 1 again) */
    char reason[96]; /* why `direct` is what it is, in English */
    int sys_errno;   /* the errno behind `reason`, or 0 */
} nx_file_info;

/*
 * Open a regular file for reading. NX_IO_DIRECT falls back to buffered when direct reads are
 * refused or return other bytes than buffered ones; nx_file_get_info tells which and why. If the
 * status is not NX_OK, *out is NULL and errno says what the system said.
 */
nx_status nx_file_open(const char *path, nx_io_mode wanted, nx_file **out);

/* Close it; NULL is fine. No read of it may be pending. */
void nx_file_close(nx_file *file);

void nx_file_get_info(const nx_file *file, nx_file_info *out);

/*
 * Is it still the file that was opened? NX_E_TRUNCATED: it became shorter. NX_E_CHANGED: it grew,
 * its mtime changed, or its path now names another file. A path that names nothing any more is
 * NX_OK: the open file still holds the bytes that were opened. NX_E_IO: the system would not say
 * (errno).
 */
nx_status nx_file_check(nx_file *file);

/* ---------------------------------------------------------------- reads */

typedef struct nx_io nx_io;

/* Writable bytes that the caller gives before `dst` and after `dst + nbytes`. See nx_read. */
#define NX_IO_SLACK 4096

/*
 * One byte range of one file. Zero the struct before its first use; after `done` it may be filled
 * in and submitted again as it is.
 *
 * Byte `offset` of the file lands exactly at `dst`. The engine may overwrite NX_IO_SLACK bytes on
 * both sides of the destination until `done`, so nothing that matters (another finished read
 * included) may live there. Cheapest is (uintptr_t)dst % 4096 == offset % 4096: then the disk
 * writes straight into place. Otherwise the bytes pass through a bounce buffer and are copied once;
 * the engine keeps at most depth * 256 KiB of such buffers, and none if none is needed.
 *
 * Destinations in huge pages (2 MiB aligned, MADV_HUGEPAGE) are worth the trouble: a request is
 * then a few pieces of memory instead of hundreds, for the processor that pins them and for the
 * device.
 */
typedef struct nx_read {
    nx_file *file;
    uint64_t offset;
    uint64_t nbytes; /* 0 is allowed: done at once */
    void *dst;
    /* Called when every byte is there, in the thread that drives the engine; the read ends with what it
     * returns, and with the error_offset and error_chunk that it sets. NULL: nothing is to be checked. */
    nx_status (*check)(struct nx_read *);
    const void *check_ctx;
    uint64_t check_item;

    /* Set by the engine; they mean something once `done` is 1. */
    nx_status status;      /* NX_OK: every byte has arrived and was counted */
    int sys_errno;         /* the errno behind a failure, or 0 */
    uint64_t bytes_read;   /* bytes that came from the device, alignment and repeats included */
    uint64_t error_offset; /* file offset of the first byte that failed or is missing */
    uint32_t error_chunk; /* of a tensor in chunks: which of them failed */
    int done;

    /* Private to the engine. */
    struct nx_read *nx_prev, *nx_next;
    nx_io *nx_owner;
    uint64_t nx_pos, nx_end;
    uint32_t nx_active;
    int nx_state, nx_spare;
    struct { /* while threads have it that decode chunks */
        struct nx_read *next;
        uint64_t offset, bytes_read, front;
        nx_status status;
        int sys_errno, queued;
        uint32_t chunk;
    } nx_pooled;
} nx_read;

/* --------------------------------------------------------------- engine */

enum {
    NX_IO_ENGINE_AUTO = 0,   /* what NEXUS_IO_ENGINE says; else io_uring if it works, or threads */
    NX_IO_ENGINE_URING = 1,  /* NX_E_UNSUPPORTED where it does not work */
    NX_IO_ENGINE_THREADS = 2 /* a pool of threads that call pread */
};

/* 0 in any field means the default. */
typedef struct nx_io_options {
    int engine;             /* NX_IO_ENGINE_*, default AUTO */
    uint32_t depth;         /* kernel requests in flight, default 32, at most 4096 */
    uint32_t request_bytes; /* larger reads are cut into requests of this size, default 512 KiB */
    uint32_t n_threads;     /* size of the pool of the threads engine, default 8 */
    uint32_t retries;       /* attempts after the first one that failed, per request, default 3 */
    int drop_cache; /* buffered reads leave nothing in the page cache (POSIX_FADV_DONTNEED) */
} nx_io_options;

typedef struct nx_io_stats {
    uint64_t requests;    /* given to the kernel, repeats included */
    uint64_t bytes_read;  /* from the device, alignment and repeats included */
    uint64_t retries;     /* requests repeated after an error */
    uint64_t short_reads; /* requests that brought fewer bytes than asked and were continued */
    uint64_t errors;      /* reads that failed for good */
    uint64_t bounces;     /* requests that needed a bounce buffer and a copy */
} nx_io_stats;

struct nx_chunk_pool;

/* Reads of tensors in chunks (chunks.h) are passed on to this pool, which outlives the nx_io. */
void nx_io_set_pool(nx_io *io, struct nx_chunk_pool *pool);

/* `options` may be NULL. An unknown NEXUS_IO_ENGINE is NX_E_INVALID. */
nx_status nx_io_create(const nx_io_options *options, nx_io **out);

/*
 * Waits for what the kernel has in hand, since it writes into the caller's memory; what was not
 * issued yet becomes done with NX_E_CLOSED. NULL is fine.
 */
void nx_io_destroy(nx_io *io);

/*
 * Queue n reads in this order and start what fits the depth. Never waits for the device. All or
 * nothing: on NX_E_INVALID, NX_E_BUSY (a read is already submitted) or NX_E_CLOSED none was queued.
 * (NX_E_IO: the engine itself has failed, and only nx_io_destroy is left.)
 * What does not fit is issued, first queued first, by later calls of submit, poll and wait: an
 * nx_io that nobody calls keeps at most `depth` requests moving.
 */
nx_status nx_io_submit(nx_io *io, nx_read **reads, size_t n);

/* The same, ahead of everything queued and not yet issued (also of an earlier submit_front). */
nx_status nx_io_submit_front(nx_io *io, nx_read **reads, size_t n);

/*
 * The same, for reads that may be in vain: they take what the device has to spare. They are issued
 * behind everything else that is queued, now or later, in requests of which at most `n_requests`
 * (0: 8, which is the default) exist at a time, and only while at most `n_beside` (default 0)
 * requests of other reads do. Waiting for one raises it.
 */
nx_status nx_io_submit_spare(nx_io *io, nx_read **reads, size_t n);
void nx_io_spare_limits(nx_io *io, uint32_t n_requests, uint32_t n_beside);

/* 1: nothing is queued or in hand but spare reads. */
int nx_io_only_spare(const nx_io *io);

/* Somebody wants this spare read after all: what is not issued of it goes ahead of everything. */
void nx_io_raise(nx_io *io, nx_read *read);

/*
 * Nobody wants this read any more: nothing more of it is issued (1), or all of it was, or it is not
 * queued here (0). It is done with NX_E_ABORTED when what was issued has ended.
 */
int nx_io_drop(nx_io *io, nx_read *read);

/* Take in what has completed and issue what is queued. Never waits for the device. */
nx_status nx_io_poll(nx_io *io);

/*
 * Wait until read->done and return read->status. Before it blocks, after every signal and at least
 * every 50 ms it asks `abort` (may be NULL); if that returns non-zero: NX_E_ABORTED, and the read
 * goes on, to be waited for again. NX_E_INVALID: the read was never submitted to this nx_io.
 * NX_E_IO while read->done is 0: the engine itself has failed (read->sys_errno), and only
 * nx_io_destroy is left.
 */
nx_status nx_io_wait(nx_io *io, nx_read *read, int (*abort)(void *), void *ctx);

/*
 * The same until any one of the n reads is done: NX_OK, whatever became of it. NX_E_INVALID: n is 0,
 * or one of them was never submitted to this nx_io.
 */
nx_status nx_io_wait_any(nx_io *io, nx_read *const *reads, size_t n, int (*abort)(void *), void *ctx);

/*
 * 1: nothing of it had been issued; it is dequeued, done, NX_E_ABORTED. 0: it completes normally,
 * or is not queued here.
 */
int nx_io_cancel(nx_io *io, nx_read *read);

const char *nx_io_engine_name(const nx_io *io); /* "io_uring" or "threads" */

/* Why AUTO did not take io_uring, in English; "" if it did or was told. Lives as long as io. */
const char *nx_io_engine_note(const nx_io *io);

void nx_io_get_stats(const nx_io *io, nx_io_stats *out);

/* --------------------------------------------------------------- faults */

enum {
    NX_FAULT_EIO = 1,    /* the request fails with EIO */
    NX_FAULT_SHORT = 2,  /* it brings half of its bytes (at least one) */
    NX_FAULT_EOF = 3,    /* the file seems to end at offset_begin */
    NX_FAULT_EINVAL = 4, /* it fails with EINVAL, as a refused direct read does */
    NX_FAULT_EAGAIN = 5  /* it fails with EAGAIN */
};

/* Applies to requests of any file that touch [offset_begin, offset_end), when they complete. */
typedef struct nx_fault {
    uint64_t offset_begin, offset_end;
    int kind;      /* NX_FAULT_* */
    int32_t count; /* how many times; -1: until cleared */
} nx_fault;

/* For tests. At most 16 at a time (NX_E_NOMEM beyond); the struct is copied. */
nx_status nx_io_inject(nx_io *io, const nx_fault *fault);
void nx_io_clear_faults(nx_io *io);

/* ---------------------------------------------------------------- probe */

/* 0 in any field means the default. */
typedef struct nx_probe_options {
    uint32_t block_bytes; /* size of one read, a multiple of 4096, default 512 KiB */
    uint32_t depth;       /* reads in flight, default 32 */
    int random;           /* 0: one after another, no block twice; 1: at random 4 KiB multiples */
    uint64_t max_bytes;   /* stop after so many bytes, default 256 MiB */
    uint64_t max_ns;      /* start no read after so much time, default 2 s */
    int engine;           /* NX_IO_ENGINE_* */
    uint64_t seed; /* where a sequential probe starts, where random reads go; 0: from byte 0 */
} nx_probe_options;

typedef struct nx_probe_result {
    uint64_t bytes;    /* that arrived */
    uint64_t ns;       /* from the first submit to the last arrival */
    int direct;        /* 1: the page cache was not involved */
    int engine;        /* NX_IO_ENGINE_URING or NX_IO_ENGINE_THREADS */
    char how_cold[96]; /* what kept the page cache out of the number, or that it may be in it */
    int sys_errno;     /* behind a failure */
} nx_probe_result;

/*
 * Measure the cold read bandwidth of one file. Allocates 2 * depth * block_bytes for the time
 * of the call (NX_E_INVALID if depth * block_bytes is above 1 GiB).
 * NX_E_TRUNCATED: the file is smaller than one block. `out` is always written.
 */
nx_status nx_io_probe(const char *path, const nx_probe_options *options, nx_probe_result *out);

#ifdef __cplusplus
}
#endif
#endif
