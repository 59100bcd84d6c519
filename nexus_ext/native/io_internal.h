/*
 * io_internal.h: what io.c, io_file.c and the engines share. Not installed.
 *
 *   io.c          reads -> requests: order, cutting, alignment, bounce, retries
 *   io_faults.c   reads that go wrong on purpose
 *   io_file.c     an open file: can it be read directly, with which alignment, is it still the same
 *   io_uring.c    an engine: moves requests through io_uring
 *   io_threads.c  an engine: moves requests through a pool of threads
 *   chunks.h      tensors in chunks: reads that are decoded as well
 *   io_probe.c    the bandwidth of a disk, with the above
 *
 * A request is one contiguous range of one file on its way into memory. It is in exactly one place
 * at a time: the free list, the retry list (waiting to be issued again), or the engine (in flight).
 */
#ifndef NEXUS_IO_INTERNAL_H
#define NEXUS_IO_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#include "nexus_io.h"

#define NX_IO_DEPTH 32u
#define NX_IO_DEPTH_MAX 4096u
#define NX_IO_REQUEST_BYTES (512u << 10)
#define NX_IO_REQUEST_BYTES_MAX (1u << 30) /* Linux moves less than 2 GiB in one call */
#define NX_IO_THREADS 8u
#define NX_IO_RETRIES 3u
/* Requests that bounce are smaller: their buffers are memory that no plan has counted. */
#define NX_IO_BOUNCE_BYTES (256u << 10)
/* Cuts are made at these multiples, so that no block of a 4 KiB device is read twice. */
#define NX_IO_CUT_BYTES 4096u
#define NX_IO_FAULTS 16u
#define NX_IO_SPARE 8u

typedef enum nx_file_how {
    NX_FILE_DIRECT,
    NX_FILE_DIRECT_UNCACHED, /* macOS F_NOCACHE */
    NX_FILE_BUFFERED_WANTED,
    NX_FILE_BUFFERED_EMPTY,
    NX_FILE_BUFFERED_MEMORY,  /* tmpfs: takes O_DIRECT and means nothing by it */
    NX_FILE_BUFFERED_REFUSED, /* open or statx said no */
    NX_FILE_BUFFERED_FAILED,  /* the trial read failed */
    NX_FILE_BUFFERED_LIES,    /* the trial read brought other bytes */
    NX_FILE_BUFFERED_LATE     /* a read refused it long after */
} nx_file_how;

struct nx_file {
    int fd_buffered;
    int fd_direct; /* -1 when direct reading was never possible */
    char *path;    /* absolute, links not resolved */
    uint64_t nbytes, device, inode;
    int64_t mtime_ns;
    uint32_t offset_align, mem_align; /* of fd_direct */
    atomic_int how;                   /* nx_file_how; engines of several threads may change it */
    atomic_int sys_errno;
    const struct nx_chunks *chunks; /* not a file but a tensor in chunks: nothing else of this holds */
};

static inline bool nx_file_is_direct(const nx_file *file) {
    return atomic_load_explicit(&((nx_file *)file)->how, memory_order_relaxed) == NX_FILE_DIRECT;
}

/* Direct reads of it are refused after all: use the page cache from now on. */
void nx_file_distrust(nx_file *file, int sys_errno);

typedef struct nx_request {
    struct nx_request *next;
    nx_read *read;
    int fd;
    bool direct;
    bool bounced;        /* `mem` is `bounce` */
    uint8_t *mem;        /* where byte `begin` lands */
    uint64_t begin, end; /* in the file; [begin, begin + have) has arrived */
    uint64_t have;
    uint32_t failures;
    void *bounce; /* kept from use to use */
    size_t bounce_bytes;
    int64_t result; /* of the threads engine: bytes, or minus an errno */
} nx_request;

/*
 * What moves requests. `start` sets io->engine_state, or fails and says why in io->note. `push`
 * only notes a request down. `turn` hands over what was pushed, waits up to wait_ns for a
 * completion if none is there (0: does not wait), and calls nx_io_completed for each. It returns 0,
 * or the errno with which the engine itself failed. `stop` waits until nothing is in flight and
 * frees.
 */
typedef struct nx_engine {
    const char *name;
    int number;
    nx_status (*start)(nx_io *io);
    void (*push)(nx_io *io, nx_request *request);
    int (*turn)(nx_io *io, int64_t wait_ns);
    void (*stop)(nx_io *io);
} nx_engine;

extern const nx_engine nx_engine_threads;
extern const nx_engine nx_engine_uring; /* NX_E_UNSUPPORTED where it was not compiled in */

struct nx_io {
    nx_io_options options; /* defaults filled in */
    const nx_engine *engine;
    void *engine_state;
    char note[96];
    bool closing;
    int broken; /* errno of an engine that failed: nothing is issued any more */

    nx_read *head, *tail;  /* reads with something left to issue, in demand order */
    nx_read *spare;        /* the first of them that is spare; all behind it are as well */
    uint32_t spare_requests, spare_beside; /* see nx_io_spare_limits */
    uint32_t n_requests, spare_active;     /* requests that exist; those of spare reads */
    nx_request *requests;  /* options.depth of them */
    nx_request *free_list; /* linked by `next` */
    nx_request *retry_head, *retry_tail;
    uint32_t in_flight; /* pushed and not completed */
    bool pushed;        /* since the last turn */

    struct nx_chunk_pool *pool; /* what follows is of reads that it has */
    uint64_t pool_batch;
    uint32_t pool_reads, pool_wanted; /* given to it and not collected; those that are not spare */

    nx_io_stats stats;
    uint32_t n_faults;
    nx_fault faults[NX_IO_FAULTS];
};

/* What became of a request whose result was `result`, with the faults that tests asked for. */
int64_t nx_io_apply_faults(nx_io *io, const nx_request *request, int64_t result);
/* The same for bytes [begin, end) of a file. */
int64_t nx_fault_apply(nx_fault *faults, uint32_t n, uint64_t begin, uint64_t end, int64_t result);

/* result: bytes that arrived, or minus an errno. The engine no longer knows the request. */
void nx_io_completed(nx_io *io, nx_request *request, int64_t result);

/* A read that the pool had has ended. */
void nx_io_pooled_done(nx_io *io, nx_read *read);

/* Conditions that are waited for by the monotonic clock. */
int nx_io_cond_init(pthread_cond_t *cond);
void nx_io_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock, int64_t ns);

static inline uint64_t nx_io_floor(uint64_t value, uint64_t to) {
    return value / to * to;
}

static inline uint64_t nx_io_ceil(uint64_t value, uint64_t to) {
    return (value + to - 1) / to * to;
}

static inline uint64_t nx_io_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#endif
