/* chunk_pool.c: threads that read stored chunks, check their hashes and decode them into place.
 *
 * A read waits in a queue (in demand order; spare ones behind all others) until all of it was cut into
 * chunks; each thread takes the next chunk of the first read. Between nx_pool_submit and nx_pool_collect all
 * that changes of a read is in `nx_pooled`, under the lock; no lock is held over a read or a decode.
 *
 * Reading and decoding are done by the same threads, because the driver of an nx_io computes meanwhile and
 * cannot pass on what has arrived. How many decode at a time is limited while nobody waits: half of the
 * processors are left to those who compute. When somebody waits, all may be used.
 */
#include "chunks.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define THREAD_STACK_BYTES (512u << 10)
#define PAGE 4096u
#define MAX_SPARE 2u /* threads that read what may be in vain */
#define MAX_FAULTS 16u

typedef struct worker {
    nx_chunk_pool *pool;
    pthread_t thread;
    uint8_t *stored, *raw;
    const nx_chunk *held; /* what `raw` has, whole: rows that are asked for one by one lie close */
} worker;

struct nx_chunk_pool {
    pthread_mutex_t lock;
    pthread_cond_t work_there, ended_there, turn_there;
    nx_read *head, *tail;
    nx_read *ended; /* by nx_pooled.next; of all nx_io */
    uint32_t spare_active, n_threads, decoding, waiting, n_processors;
    bool stopping;
    uint64_t stored_bytes, raw_bytes; /* of one worker's buffers */
    nx_pool_stats stats;
    uint32_t n_faults;
    nx_fault faults[MAX_FAULTS];
    worker workers[];
};

/* -- the queue, under the lock ------------------------------------------------------------------- */

static void queue_insert(nx_chunk_pool *p, nx_read *r, nx_read *before) {
    nx_read *prev = before ? before->nx_prev : p->tail;
    r->nx_prev = prev;
    r->nx_next = before;
    *(prev ? &prev->nx_next : &p->head) = r;
    *(before ? &before->nx_prev : &p->tail) = r;
    r->nx_pooled.queued = 1;
}

static void queue_remove(nx_chunk_pool *p, nx_read *r) {
    *(r->nx_prev ? &r->nx_prev->nx_next : &p->head) = r->nx_next;
    *(r->nx_next ? &r->nx_next->nx_prev : &p->tail) = r->nx_prev;
    r->nx_prev = r->nx_next = NULL;
    r->nx_pooled.queued = 0;
}

static void end_if_over(nx_chunk_pool *p, nx_read *r) {
    if (r->nx_pooled.queued || r->nx_active) return;
    r->nx_pooled.next = p->ended;
    p->ended = r;
    pthread_cond_broadcast(&p->ended_there);
}

static void fail(nx_chunk_pool *p, nx_read *r, nx_status status, int sys_errno, uint64_t offset, uint32_t chunk) {
    if (r->nx_pooled.status == NX_OK || chunk < r->nx_pooled.chunk) {
        r->nx_pooled.status = status;
        r->nx_pooled.sys_errno = sys_errno;
        r->nx_pooled.offset = offset;
        r->nx_pooled.chunk = chunk;
    }
    if (r->nx_pooled.queued) queue_remove(p, r); /* the rest would be in vain */
}

static nx_read *first_spare(nx_chunk_pool *p) {
    nx_read *r = p->head;
    while (r && !r->nx_spare) r = r->nx_next;
    return r;
}

void nx_pool_submit(nx_io *io, nx_read *r, bool front) {
    nx_chunk_pool *p = io->pool;
    pthread_mutex_lock(&p->lock);
    r->nx_pooled.status = NX_OK;
    r->nx_pooled.sys_errno = 0;
    r->nx_pooled.offset = r->nx_pooled.bytes_read = 0;
    r->nx_pooled.chunk = 0;
    /* In front, but behind those that were given in front just before: their order is that of demand. */
    nx_read *before = front ? p->head : r->nx_spare ? NULL : first_spare(p);
    while (front && before && before->nx_pooled.front == io->pool_batch && before->nx_owner == io) before = before->nx_next;
    r->nx_pooled.front = front ? io->pool_batch : 0;
    queue_insert(p, r, before);
    pthread_cond_broadcast(&p->work_there);
    pthread_mutex_unlock(&p->lock);
}

void nx_pool_collect(nx_io *io) {
    nx_chunk_pool *p = io->pool;
    if (!p || !io->pool_reads) return;
    pthread_mutex_lock(&p->lock);
    for (nx_read **at = &p->ended; *at;) {
        nx_read *r = *at;
        if (r->nx_owner != io) {
            at = &r->nx_pooled.next;
            continue;
        }
        *at = r->nx_pooled.next;
        r->status = r->nx_pooled.status;
        r->sys_errno = r->nx_pooled.sys_errno;
        r->error_offset = r->nx_pooled.offset;
        r->error_chunk = r->nx_pooled.chunk;
        r->bytes_read = r->nx_pooled.bytes_read;
        io->stats.bytes_read += r->bytes_read;
        io->pool_reads--;
        if (!r->nx_spare) io->pool_wanted--;
        nx_io_pooled_done(io, r);
    }
    pthread_mutex_unlock(&p->lock);
}

void nx_pool_raise(nx_io *io, nx_read *r) {
    nx_chunk_pool *p = io->pool;
    if (!r->nx_spare || r->done) return;
    pthread_mutex_lock(&p->lock);
    const bool queued = r->nx_pooled.queued;
    if (queued) queue_remove(p, r);
    p->spare_active -= r->nx_active;
    r->nx_spare = 0;
    if (queued) queue_insert(p, r, p->head);
    io->pool_wanted++;
    pthread_cond_broadcast(&p->work_there);
    pthread_mutex_unlock(&p->lock);
}

/* Nothing more of it is begun, if `always` or nothing of it was. */
static int take_back(nx_io *io, nx_read *r, bool always) {
    nx_chunk_pool *p = io->pool;
    if (r->done) return 0;
    pthread_mutex_lock(&p->lock);
    const bool taken = r->nx_pooled.queued && (always || (r->nx_pos == r->offset && !r->nx_active));
    if (taken) {
        fail(p, r, NX_E_ABORTED, 0, 0, UINT32_MAX);
        end_if_over(p, r);
    }
    pthread_mutex_unlock(&p->lock);
    nx_pool_collect(io);
    return taken;
}

int nx_pool_drop(nx_io *io, nx_read *r) { return take_back(io, r, true); }
int nx_pool_cancel(nx_io *io, nx_read *r) { return take_back(io, r, false); }

/* -- time ---------------------------------------------------------------------------------------- */

void nx_pool_wait(nx_io *io, int64_t ns) {
    nx_chunk_pool *p = io->pool;
    pthread_mutex_lock(&p->lock);
    bool mine = false;
    for (const nx_read *r = p->ended; r && !mine; r = r->nx_pooled.next) mine = r->nx_owner == io;
    if (!mine) {
        p->waiting++;
        pthread_cond_broadcast(&p->turn_there);
        nx_io_cond_wait(&p->ended_there, &p->lock, ns);
        p->waiting--;
    }
    pthread_mutex_unlock(&p->lock);
    nx_pool_collect(io);
}

/* -- work ---------------------------------------------------------------------------------------- */

/* The stored bytes of a chunk, from `*at` in the worker's buffer on. */
static nx_status read_chunk(worker *w, const nx_chunk *k, uint8_t **at, uint64_t *bytes_read, int *sys_errno,
                            uint64_t *error_offset) {
    nx_chunk_pool *p = w->pool;
    bool direct = nx_file_is_direct(k->file);
    uint64_t begin = 0, end = 0, have = 0;
    uint32_t failures = 0;
    for (bool again = true;;) {
        if (again) {
            begin = direct ? nx_io_floor(k->offset, k->file->offset_align) : k->offset;
            end = direct ? nx_io_ceil(k->offset + k->stored, k->file->offset_align) : k->offset + k->stored;
            have = 0;
            again = false;
            if (end - begin > p->stored_bytes) { /* a device with blocks larger than any that were planned for */
                direct = false;
                again = true;
                continue;
            }
        }
        *at = w->stored + (k->offset - begin);
        int64_t n = pread(direct ? k->file->fd_direct : k->file->fd_buffered, w->stored + have,
                          (size_t)(end - begin - have), (off_t)(begin + have));
        if (n < 0) n = -errno;
        pthread_mutex_lock(&p->lock);
        n = nx_fault_apply(p->faults, p->n_faults, begin + have, end, n);
        if (n < 0 && n != -EINTR && n != -EAGAIN) p->stats.retries++;
        pthread_mutex_unlock(&p->lock);
        *error_offset = begin + have > k->offset ? begin + have : k->offset;
        if (n == -EINTR || n == -EAGAIN) continue;
        if (direct && (n == -EINVAL || n == -EOPNOTSUPP)) {
            nx_file_distrust(k->file, (int)-n);
            direct = false;
            again = true;
            continue;
        }
        if (n < 0 && failures++ < NX_IO_RETRIES) continue;
        if (n < 0) {
            *sys_errno = (int)-n;
            return NX_E_IO;
        }
        if (n == 0) return NX_E_TRUNCATED;
        have += (uint64_t)n;
        *bytes_read += (uint64_t)n;
        if (begin + have >= k->offset + k->stored) return NX_OK;
        if (direct && have % k->file->offset_align) {
            direct = false;
            again = true;
        }
    }
}

static nx_status decode_part(worker *w, const nx_chunk *k, const uint8_t *stored, uint64_t skip, uint64_t n, uint8_t *dst) {
    if (n == k->raw) return nx_chunk_decode(k, stored, dst);
    const nx_status status = w->held == k ? NX_OK : nx_chunk_decode(k, stored, w->raw);
    w->held = status == NX_OK ? k : NULL;
    if (status == NX_OK) memcpy(dst, w->raw + skip, n);
    return status;
}

static uint32_t decoders(const nx_chunk_pool *p) {
    return p->waiting || p->n_processors < 4 ? p->n_processors : p->n_processors / 2;
}

/* One chunk of the read; with the lock held before and after. */
static void work(worker *w, nx_read *r) {
    nx_chunk_pool *p = w->pool;
    const nx_chunks *c = r->file->chunks;
    const uint64_t from = r->nx_pos;
    uint64_t begin;
    const uint32_t i = nx_chunks_at(c, from, &begin);
    const nx_chunk *k = &c->chunk[i];
    const uint64_t until = begin + k->raw < r->nx_end ? begin + k->raw : r->nx_end;
    const uint32_t spare = (uint32_t)r->nx_spare;
    uint8_t *dst = (uint8_t *)r->dst + (from - r->offset);
    r->nx_pos = until;
    if (until == r->nx_end) queue_remove(p, r);
    r->nx_active++;
    p->spare_active += spare;
    pthread_mutex_unlock(&p->lock);

    uint8_t *stored = NULL;
    const bool have = w->held == k && until - from < k->raw;
    uint64_t bytes_read = 0, error_offset = k->offset, ns = 0;
    int sys_errno = 0;
    nx_status status = NX_OK;
    if (!have) status = read_chunk(w, k, &stored, &bytes_read, &sys_errno, &error_offset);
    pthread_mutex_lock(&p->lock);
    if (status == NX_OK) {
        while (p->decoding >= decoders(p)) pthread_cond_wait(&p->turn_there, &p->lock);
        p->decoding++;
        pthread_mutex_unlock(&p->lock);
        const uint64_t start = nx_io_now_ns();
        status = decode_part(w, k, stored, from - begin, until - from, dst);
        ns = nx_io_now_ns() - start;
        error_offset = k->offset;
        pthread_mutex_lock(&p->lock);
        p->decoding--;
        pthread_cond_signal(&p->turn_there);
    }
    p->stats.bytes_read += bytes_read;
    p->stats.decode_ns += ns;
    if (status == NX_OK && !have) {
        nx_chunks_verified(c, i);
        p->stats.stored_bytes += k->stored;
        p->stats.raw_bytes += k->raw;
    }
    r->nx_pooled.bytes_read += bytes_read;
    r->nx_active--;
    p->spare_active -= (uint32_t)r->nx_spare; /* 0 if it was raised meanwhile, which took it off as well */
    if (status != NX_OK) fail(p, r, status, sys_errno, error_offset, i);
    end_if_over(p, r);
}

static void *run(void *arg) {
    worker *w = arg;
    nx_chunk_pool *p = w->pool;
#ifdef __linux__
    pthread_setname_np(pthread_self(), "nexus-chunk");
#endif
    pthread_mutex_lock(&p->lock);
    while (!p->stopping) {
        nx_read *r = p->head;
        if (r && r->nx_spare && p->spare_active >= MAX_SPARE) r = NULL;
        if (!r) {
            pthread_cond_wait(&p->work_there, &p->lock);
            continue;
        }
        work(w, r);
        if (p->head && p->head->nx_spare) pthread_cond_signal(&p->work_there);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

/* -- life ----------------------------------------------------------------------------------------- */

static uint8_t *buffer(uint64_t nbytes) {
    void *p = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

nx_status nx_pool_create(uint32_t n_threads, uint64_t stored, uint64_t raw, nx_chunk_pool **out) {
    *out = NULL;
    nx_chunk_pool *p = calloc(1, sizeof *p + n_threads * sizeof *p->workers);
    if (!p) return NX_E_NOMEM;
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    p->n_processors = n > 0 ? (uint32_t)n : 1;
    p->stored_bytes = nx_io_ceil(stored, PAGE) + 2 * PAGE;
    p->raw_bytes = nx_io_ceil(raw, PAGE);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->work_there, NULL);
    pthread_cond_init(&p->turn_there, NULL);
    nx_io_cond_init(&p->ended_there);
    nx_status status = NX_OK;
    pthread_attr_t attr;
    sigset_t all, before;
    pthread_attr_init(&attr);
    (void)pthread_attr_setstacksize(&attr, THREAD_STACK_BYTES);
    sigfillset(&all); /* the process's signals are for its own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (uint32_t i = 0; i < n_threads && status == NX_OK; i++) {
        worker *w = &p->workers[i];
        w->pool = p;
        w->stored = buffer(p->stored_bytes);
        w->raw = buffer(p->raw_bytes);
        if (!w->stored || !w->raw || pthread_create(&w->thread, &attr, run, w) != 0) {
            if (w->stored) munmap(w->stored, p->stored_bytes);
            if (w->raw) munmap(w->raw, p->raw_bytes);
            status = i ? NX_OK : NX_E_NOMEM; /* fewer are slower, none is an error */
            break;
        }
        p->n_threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    if (status != NX_OK || !n_threads) {
        nx_pool_destroy(p);
        return NX_E_NOMEM;
    }
    *out = p;
    return NX_OK;
}

void nx_pool_destroy(nx_chunk_pool *p) {
    if (!p) return;
    pthread_mutex_lock(&p->lock);
    p->stopping = true;
    pthread_cond_broadcast(&p->work_there);
    pthread_mutex_unlock(&p->lock);
    for (uint32_t i = 0; i < p->n_threads; i++) {
        pthread_join(p->workers[i].thread, NULL);
        munmap(p->workers[i].stored, p->stored_bytes);
        munmap(p->workers[i].raw, p->raw_bytes);
    }
    pthread_cond_destroy(&p->ended_there);
    pthread_cond_destroy(&p->turn_there);
    pthread_cond_destroy(&p->work_there);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

uint64_t nx_pool_bytes(const nx_chunk_pool *p) {
    return p ? p->n_threads * (p->stored_bytes + p->raw_bytes) : 0;
}

void nx_pool_get_stats(nx_chunk_pool *p, nx_pool_stats *out) {
    pthread_mutex_lock(&p->lock);
    *out = p->stats;
    pthread_mutex_unlock(&p->lock);
}

void nx_pool_count(nx_chunk_pool *p, uint64_t nbytes, uint64_t ns) {
    if (!p || !nbytes) return;
    pthread_mutex_lock(&p->lock);
    p->stats.stored_bytes += nbytes;
    p->stats.raw_bytes += nbytes;
    p->stats.decode_ns += ns;
    pthread_mutex_unlock(&p->lock);
}

nx_status nx_pool_inject(nx_chunk_pool *p, const nx_fault *fault) {
    pthread_mutex_lock(&p->lock);
    const bool room = p->n_faults < MAX_FAULTS;
    if (room) p->faults[p->n_faults++] = *fault;
    pthread_mutex_unlock(&p->lock);
    return room ? NX_OK : NX_E_NOMEM;
}

void nx_pool_clear_faults(nx_chunk_pool *p) {
    pthread_mutex_lock(&p->lock);
    p->n_faults = 0;
    pthread_mutex_unlock(&p->lock);
}

void nx_pool_leave(nx_io *io) {
    nx_chunk_pool *p = io->pool;
    if (!p) return;
    pthread_mutex_lock(&p->lock);
    for (nx_read *r = p->head; r;) {
        nx_read *next = r->nx_next;
        if (r->nx_owner == io) {
            fail(p, r, NX_E_CLOSED, 0, 0, UINT32_MAX);
            end_if_over(p, r);
        }
        r = next;
    }
    pthread_mutex_unlock(&p->lock);
    nx_pool_collect(io);
    while (io->pool_reads) nx_pool_wait(io, 25000000);
}
