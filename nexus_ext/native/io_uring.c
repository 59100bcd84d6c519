/*
 * io_uring.c: the engine for Linux: one ring, spoken to by system calls (no liburing).
 *
 * Only the driver touches the ring. The kernel writes the head of the submission queue and the tail
 * of the completion queue; each side publishes its own index with release and reads the other's
 * with acquire. A request has at most one entry in the ring and there are at most `depth` of them,
 * so neither queue can run over.
 *
 * The driving thread may change, which rules out the flags SINGLE_ISSUER and DEFER_TASKRUN.
 * COOP_TASKRUN gained nothing that could be measured, and delayed completions by up to a tick of
 * the scheduler while the thread that had submitted was computing and another one waited. So the
 * ring has no flags at all.
 */
#include "io_internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif
#endif

#ifdef IORING_FEAT_EXT_ARG

#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/*
 * Entries per call: two, or as many small ones as make up NX_URING_BATCH_BYTES. For three or more the
 * kernel plugs the queue of the device, and neighbours are merged into requests of up to
 * max_sectors_kb: good for small experts that lie side by side, and bad for what the caller has cut
 * into request_bytes on purpose: on the virtual disk where this was measured, 512 KiB requests merged
 * to 4 MiB lost 15 % of the bandwidth.
 */
#define NX_URING_BATCH 2u
#define NX_URING_BATCH_BYTES (512u << 10)

typedef _Atomic uint32_t shared_u32;

typedef struct nx_uring {
    int fd;
    void *rings;
    size_t rings_bytes;
    struct io_uring_sqe *sqes;
    size_t sqes_bytes;
    uint32_t sq_tail; /* ours; published by turn */
    uint32_t sq_mask, cq_mask;
    shared_u32 *sq_head_shared, *sq_tail_shared, *cq_head_shared, *cq_tail_shared;
    const struct io_uring_cqe *cqes;
} nx_uring;

static void uring_free(nx_uring *u) {
    if (u->sqes) munmap(u->sqes, u->sqes_bytes);
    if (u->rings) munmap(u->rings, u->rings_bytes);
    if (u->fd >= 0) close(u->fd);
    free(u);
}

/* NULL: it cannot be mapped (errno). A child of fork must not write into the parent's ring. */
static void *map(int fd, size_t nbytes, off_t what) {
    void *at = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, what);
    if (at == MAP_FAILED) return NULL;
    (void)madvise(at, nbytes, MADV_DONTFORK);
    return at;
}

/* A filter may let a ring be set up and then forbid its use: better to know now. */
static bool may_enter(int fd) {
    struct io_uring_getevents_arg arg = {0};
    return syscall(SYS_io_uring_enter, fd, 0, 0, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG,
                   &arg, sizeof arg) >= 0;
}

static nx_status uring_start(nx_io *io) {
    struct io_uring_params p = {0};
    nx_uring *u = calloc(1, sizeof *u);
    if (!u) return NX_E_NOMEM;
    u->fd = (int)syscall(SYS_io_uring_setup, io->options.depth, &p);
    if (u->fd < 0) {
        snprintf(io->note, sizeof io->note, "io_uring is not available: %s", strerror(errno));
        uring_free(u);
        return NX_E_UNSUPPORTED;
    }
    if (!(p.features & IORING_FEAT_EXT_ARG) || !(p.features & IORING_FEAT_SINGLE_MMAP)) {
        snprintf(io->note, sizeof io->note, "io_uring of this kernel is too old (before 5.11)");
        uring_free(u);
        return NX_E_UNSUPPORTED;
    }
    if (!may_enter(u->fd)) {
        snprintf(io->note, sizeof io->note, "io_uring may not be entered: %s", strerror(errno));
        uring_free(u);
        return NX_E_UNSUPPORTED;
    }
    size_t sq_bytes = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
    size_t cq_bytes = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    u->rings_bytes = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
    u->sqes_bytes = p.sq_entries * sizeof(struct io_uring_sqe);
    u->rings = map(u->fd, u->rings_bytes, IORING_OFF_SQ_RING);
    if (u->rings) u->sqes = map(u->fd, u->sqes_bytes, IORING_OFF_SQES);
    if (!u->sqes) {
        snprintf(io->note, sizeof io->note, "io_uring cannot be mapped: %s", strerror(errno));
        uring_free(u);
        return NX_E_UNSUPPORTED;
    }
    uint8_t *base = u->rings;
    u->sq_head_shared = (shared_u32 *)(base + p.sq_off.head);
    u->sq_tail_shared = (shared_u32 *)(base + p.sq_off.tail);
    u->cq_head_shared = (shared_u32 *)(base + p.cq_off.head);
    u->cq_tail_shared = (shared_u32 *)(base + p.cq_off.tail);
    u->cqes = (const struct io_uring_cqe *)(base + p.cq_off.cqes);
    u->sq_mask = p.sq_entries - 1;
    u->cq_mask = p.cq_entries - 1;
    uint32_t *array = (uint32_t *)(base + p.sq_off.array);
    for (uint32_t i = 0; i < p.sq_entries; i++) array[i] = i;
    io->engine_state = u;
    return NX_OK;
}

static void uring_push(nx_io *io, nx_request *q) {
    nx_uring *u = io->engine_state;
    struct io_uring_sqe *sqe = &u->sqes[u->sq_tail & u->sq_mask];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = IORING_OP_READ;
    sqe->fd = q->fd;
    sqe->off = q->begin + q->have;
    sqe->addr = (uint64_t)(uintptr_t)(q->mem + q->have);
    sqe->len = (uint32_t)(q->end - sqe->off);
    sqe->user_data = (uint64_t)(uintptr_t)q;
    u->sq_tail++;
}

static uint32_t unsubmitted(const nx_uring *u) {
    return u->sq_tail - atomic_load_explicit(u->sq_head_shared, memory_order_acquire);
}

/* How many of the next n entries go to the kernel together. */
static uint32_t batch(const nx_uring *u, uint32_t n) {
    const uint32_t first = u->sq_tail - n;
    uint32_t count = 0;
    for (uint64_t bytes = 0; count < n && (count < NX_URING_BATCH || bytes < NX_URING_BATCH_BYTES); count++)
        bytes += u->sqes[(first + count) & u->sq_mask].len;
    return count;
}

static uint32_t reap(nx_io *io) {
    nx_uring *u = io->engine_state;
    uint32_t head = atomic_load_explicit(u->cq_head_shared, memory_order_relaxed), n = 0;
    while (head != atomic_load_explicit(u->cq_tail_shared, memory_order_acquire)) {
        const struct io_uring_cqe *cqe = &u->cqes[head & u->cq_mask];
        nx_request *q = (nx_request *)(uintptr_t)cqe->user_data;
        int32_t result = cqe->res;
        atomic_store_explicit(u->cq_head_shared, ++head, memory_order_release);
        nx_io_completed(io, q, result);
        n++;
    }
    return n;
}

static void pause_1ms(void) {
    struct timespec t = {.tv_sec = 0, .tv_nsec = 1000000};
    nanosleep(&t, NULL);
}

static int uring_turn(nx_io *io, int64_t wait_ns) {
    nx_uring *u = io->engine_state;
    atomic_store_explicit(u->sq_tail_shared, u->sq_tail, memory_order_release);
    if (reap(io) > 0) wait_ns = 0;
    uint32_t to_submit = unsubmitted(u);
    if (to_submit == 0 && wait_ns == 0) return 0;
    for (uint32_t n; (n = batch(u, to_submit)) < to_submit; to_submit = unsubmitted(u)) {
        /* A refusal comes again with the last call, which knows what to do about it. */
        if (syscall(SYS_io_uring_enter, u->fd, n, 0, 0, NULL, 0) <= 0) break;
    }

    struct __kernel_timespec t = {.tv_sec = wait_ns / 1000000000, .tv_nsec = wait_ns % 1000000000};
    struct io_uring_getevents_arg arg = {.ts = (uint64_t)(uintptr_t)&t};
    int rc = (int)syscall(SYS_io_uring_enter, u->fd, to_submit, wait_ns > 0 ? 1u : 0u,
                          IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &arg, sizeof arg);
    int error = rc < 0 ? errno : 0;
    reap(io);
    switch (error) {
    case 0:
    case ETIME:
    case EINTR: return 0;
    case EAGAIN: /* short of memory for a moment: the entries stay, and go next time */
    case EBUSY:
    case ENOMEM:
        if (wait_ns > 0) pause_1ms();
        return 0;
    default: return error;
    }
}

static void uring_stop(nx_io *io) {
    nx_uring *u = io->engine_state;
    /* If entering is refused now, what was never submitted never starts; the rest still completes.
     */
    while (io->in_flight > 0) {
        int error = uring_turn(io, 100000000);
        if (error == 0) continue;
        if (io->in_flight <= unsubmitted(u)) break;
        pause_1ms();
    }
    uring_free(u);
    io->engine_state = NULL;
}

#else

static nx_status uring_start(nx_io *io) {
    snprintf(io->note, sizeof io->note, "io_uring is not part of this build");
    return NX_E_UNSUPPORTED;
}

static void uring_push(nx_io *io, nx_request *q) {
    (void)io;
    (void)q;
}

static int uring_turn(nx_io *io, int64_t wait_ns) {
    (void)io;
    (void)wait_ns;
    return ENOSYS;
}

static void uring_stop(nx_io *io) {
    (void)io;
}

#endif

const nx_engine nx_engine_uring = {
    .name = "io_uring",
    .number = NX_IO_ENGINE_URING,
    .start = uring_start,
    .push = uring_push,
    .turn = uring_turn,
    .stop = uring_stop,
};
