/*
 * io.c: turns reads into requests, and keeps the promises of nexus_io.h whichever engine moves
 * them.
 *
 * Life of a read: queued (in the list, some of it not yet cut into requests) -> issued (wholly cut)
 * -> done, when its last request has ended. nx_active counts its requests that exist.
 * A read is done with NX_OK only if every one of its requests saw all its wanted bytes arrive.
 */
#include "chunks.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The longest gap between two questions to `abort` is the sum of both, and below 50 ms. */
#define NX_WAIT_NS 25000000
#define NX_ASK_NS 20000000u
#define NX_BETWEEN_NS 2000000

enum { NX_READ_IDLE = 0, NX_READ_QUEUED = 1, NX_READ_ISSUED = 2, NX_READ_POOLED = 3 };

/* ------------------------------------------------------------ the queue */

static void queue_insert(nx_io *io, nx_read *read, nx_read *before) {
    nx_read *prev = before ? before->nx_prev : io->tail;
    read->nx_prev = prev;
    read->nx_next = before;
    *(prev ? &prev->nx_next : &io->head) = read;
    *(before ? &before->nx_prev : &io->tail) = read;
    read->nx_state = NX_READ_QUEUED;
    if (read->nx_spare && !before && !io->spare) io->spare = read;
}

static void queue_remove(nx_io *io, nx_read *read) {
    if (read == io->spare) io->spare = read->nx_next;
    *(read->nx_prev ? &read->nx_prev->nx_next : &io->head) = read->nx_next;
    *(read->nx_next ? &read->nx_next->nx_prev : &io->tail) = read->nx_prev;
    read->nx_prev = read->nx_next = NULL;
    read->nx_state = NX_READ_ISSUED;
}

static void read_done(nx_io *io, nx_read *read) {
    if (read->status == NX_OK && read->check && read->nbytes) read->status = read->check(read);
    if (read->status != NX_OK && read->status != NX_E_ABORTED && read->status != NX_E_CLOSED)
        io->stats.errors++;
    read->nx_state = NX_READ_IDLE;
    read->done = 1;
}

void nx_io_pooled_done(nx_io *io, nx_read *read) {
    read_done(io, read);
}

/* The failure at the lowest offset wins: what is reported does not depend on the order of arrival.
 */
static void read_failed(nx_io *io, nx_read *read, nx_status status, int sys_errno,
                        uint64_t offset) {
    if (read->status == NX_OK || offset < read->error_offset) {
        read->status = status;
        read->sys_errno = sys_errno;
        read->error_offset = offset;
    }
    if (read->nx_state == NX_READ_QUEUED) queue_remove(io, read); /* the rest would be in vain */
}

/* ------------------------------------------------------------- requests */

static void request_retry(nx_io *io, nx_request *q) {
    q->next = NULL;
    *(io->retry_tail ? &io->retry_tail->next : &io->retry_head) = q;
    io->retry_tail = q;
}

static void request_free(nx_io *io, nx_request *q) {
    nx_read *read = q->read;
    q->read = NULL;
    q->next = io->free_list;
    io->free_list = q;
    io->n_requests--;
    io->spare_active -= (uint32_t)read->nx_spare;
    if (--read->nx_active == 0 && read->nx_state == NX_READ_ISSUED) read_done(io, read);
}

/* All wanted bytes of this request are in q->mem. */
static void request_arrived(nx_io *io, nx_request *q) {
    const nx_read *read = q->read;
    if (q->bounced) {
        uint64_t from = q->begin > read->offset ? q->begin : read->offset;
        uint64_t to = q->end < read->nx_end ? q->end : read->nx_end;
        memcpy((uint8_t *)read->dst + (from - read->offset), q->mem + (from - q->begin), to - from);
    }
#ifdef POSIX_FADV_DONTNEED
    if (io->options.drop_cache && !q->direct)
        (void)posix_fadvise(q->fd, (off_t)q->begin, (off_t)(q->end - q->begin),
                            POSIX_FADV_DONTNEED);
#endif
}

void nx_io_completed(nx_io *io, nx_request *q, int64_t result) {
    nx_read *read = q->read;
    nx_file *file = read->file;
    bool failed = false;
    io->in_flight--;
    if (io->n_faults) result = nx_io_apply_faults(io, q, result);

    if (result > 0) {
        io->stats.bytes_read += (uint64_t)result;
        read->bytes_read += (uint64_t)result;
        q->have += (uint64_t)result;
        uint64_t wanted_end = q->end < read->nx_end ? q->end : read->nx_end;
        if (q->begin + q->have >= wanted_end) {
            request_arrived(io, q);
            request_free(io, q);
            return;
        }
        io->stats.short_reads++;
        /* Go on from where it stopped; if that is no place for a direct read, not directly. */
        if (q->direct && ((q->begin + q->have) % file->offset_align != 0 ||
                          (uintptr_t)(q->mem + q->have) % file->mem_align != 0)) {
            q->direct = false;
            q->fd = file->fd_buffered;
        }
    } else {
        uint64_t at = q->begin + q->have;
        if (at < read->offset) at = read->offset;
        switch (-result) {
        case 0:
            read_failed(io, read, NX_E_TRUNCATED, 0, at);
            failed = true;
            break;
        case EINTR:
        case EAGAIN:
        case ECANCELED: /* the thread that issued it has ended, and io_uring dropped its work */
            break;
        default:
            if (q->direct && (result == -EINVAL || result == -EOPNOTSUPP)) {
                nx_file_distrust(file, (int)-result);
                q->direct = false;
                q->fd = file->fd_buffered;
            } else if (q->failures++ < io->options.retries) {
                io->stats.retries++;
            } else {
                read_failed(io, read, NX_E_IO, (int)-result, at);
                failed = true;
            }
        }
    }
    if (io->closing && read->status == NX_OK)
        read_failed(io, read, NX_E_CLOSED, 0, q->begin + q->have);
    /* Of a read that has failed only what lies below the failure goes on: it may fail as well. */
    if (read->status != NX_OK &&
        (io->closing || q->begin + q->have >= read->error_offset || failed))
        request_free(io, q);
    else
        request_retry(io, q);
}

/* May a direct request go straight into place? Decided for a read as a whole, apart from its cuts.
 */
static bool lands_in_place(const nx_read *read, const nx_file *file) {
    uint64_t begin = nx_io_floor(read->offset, file->offset_align);
    uint64_t end = nx_io_ceil(read->nx_end, file->offset_align);
    uintptr_t mem = (uintptr_t)read->dst - (uintptr_t)(read->offset - begin);
    return mem % file->mem_align == 0 && read->offset - begin <= NX_IO_SLACK &&
           end - read->nx_end <= NX_IO_SLACK;
}

static bool ensure_bounce(nx_request *q, size_t nbytes, size_t align) {
    if (q->bounce_bytes >= nbytes && (uintptr_t)q->bounce % align == 0) return true;
    free(q->bounce);
    q->bounce_bytes = 0;
    if (posix_memalign(&q->bounce, align, nbytes) != 0) {
        q->bounce = NULL;
        return false;
    }
    q->bounce_bytes = nbytes;
    return true;
}

/* Cut the next request off the read at the head of the queue. The free list is not empty. */
static void request_cut(nx_io *io) {
    nx_read *read = io->head;
    nx_file *file = read->file;
    nx_request *q = io->free_list;
    bool direct = nx_file_is_direct(file);
    uint64_t limit = io->options.request_bytes, unit = NX_IO_CUT_BYTES;
    uint64_t begin = read->nx_pos, end = read->nx_end;
    bool bounced = false;

    if (direct) {
        begin = nx_io_floor(begin, file->offset_align);
        end = nx_io_ceil(end, file->offset_align);
        if (file->offset_align > unit) unit = file->offset_align;
        if (file->mem_align > unit) unit = file->mem_align;
        bounced = !lands_in_place(read, file);
        if (bounced && limit > NX_IO_BOUNCE_BYTES) limit = NX_IO_BOUNCE_BYTES;
    }
    if (limit < unit) limit = unit;
    if (end - begin >
        limit) { /* cut in equal parts: a small rest costs as much as a whole request */
        uint64_t n = (end - begin + limit - 1) / limit;
        uint64_t cut = nx_io_ceil(begin + (end - begin + n - 1) / n, unit);
        if (cut > begin + limit) cut = nx_io_floor(begin + limit, unit);
        end = cut;
    }
    if (bounced && !ensure_bounce(q, limit, unit)) {
        read_failed(io, read, NX_E_NOMEM, ENOMEM, read->nx_pos);
        if (read->nx_active == 0) read_done(io, read);
        return;
    }

    io->free_list = q->next;
    io->n_requests++;
    q->next = NULL;
    q->read = read;
    q->direct = direct;
    q->fd = direct ? file->fd_direct : file->fd_buffered;
    q->bounced = bounced;
    /* As an integer: `begin` may lie before `offset`, in the slack. */
    q->mem =
        bounced ? q->bounce : (uint8_t *)((uintptr_t)read->dst + (uintptr_t)(begin - read->offset));
    q->begin = begin;
    q->end = end;
    q->have = 0;
    q->failures = 0;
    if (bounced) io->stats.bounces++;

    read->nx_active++;
    io->spare_active += (uint32_t)read->nx_spare;
    read->nx_pos = end < read->nx_end ? end : read->nx_end;
    if (read->nx_pos == read->nx_end) queue_remove(io, read);
    request_retry(io, q); /* behind those that failed before it */
}

/* May the read at the head of the queue be issued? A spare one only beside little else. */
static bool may_issue(const nx_io *io) {
    if (!io->head || !io->free_list) return false;
    return io->head != io->spare ||
           (io->spare_active < io->spare_requests && io->n_requests - io->spare_active <= io->spare_beside);
}

/* Push all that the depth allows: first what must be repeated, then the queue in its order. */
static void issue(nx_io *io) {
    if (io->broken) return;
    while (may_issue(io)) request_cut(io);
    while (io->retry_head) {
        nx_request *q = io->retry_head;
        io->retry_head = q->next;
        if (!io->retry_head) io->retry_tail = NULL;
        io->in_flight++;
        io->stats.requests++;
        io->pushed = true;
        io->engine->push(io, q);
    }
}

static nx_status turn(nx_io *io, int64_t wait_ns) {
    io->pushed = false;
    int rc = io->engine->turn(io, wait_ns);
    if (rc != 0) io->broken = rc;
    return rc != 0 ? NX_E_IO : NX_OK;
}

/* ------------------------------------------------------------------ API */

enum { AT_FRONT, IN_ORDER, WHEN_SPARE };

static nx_status submit(nx_io *io, nx_read **reads, size_t n, int where) {
    size_t i;
    nx_status status = NX_OK;
    if (io->broken) return NX_E_CLOSED;
    for (i = 0; i < n; i++) {
        nx_read *read = reads[i];
        if (!read || !read->file || (!read->dst && read->nbytes) ||
            read->nbytes > (uint64_t)INT64_MAX / 2 || read->offset > (uint64_t)INT64_MAX / 2 ||
            (read->file->chunks && (!io->pool || read->offset + read->nbytes > read->file->chunks->nbytes))) {
            status = NX_E_INVALID;
            break;
        }
        if (read->nx_state != NX_READ_IDLE) {
            status = NX_E_BUSY;
            break;
        }
        read->nx_state = NX_READ_QUEUED; /* also catches one read given twice */
    }
    if (status != NX_OK) {
        while (i-- > 0) reads[i]->nx_state = NX_READ_IDLE;
        return status;
    }
    nx_read *before = where == AT_FRONT ? io->head : where == IN_ORDER ? io->spare : NULL;
    io->pool_batch++;
    for (i = 0; i < n; i++) {
        nx_read *read = reads[i];
        read->status = NX_OK;
        read->sys_errno = 0;
        read->bytes_read = 0;
        read->error_offset = 0;
        read->done = 0;
        read->nx_owner = io;
        read->nx_pos = read->offset;
        read->nx_end = read->offset + read->nbytes;
        read->nx_active = 0;
        read->nx_spare = where == WHEN_SPARE;
        if (read->nbytes == 0)
            read_done(io, read);
        else if (read->file->chunks) {
            read->nx_state = NX_READ_POOLED;
            io->pool_reads++;
            io->pool_wanted += !read->nx_spare;
            nx_pool_submit(io, read, where == AT_FRONT);
        } else
            queue_insert(io, read, before);
    }
    return nx_io_poll(io);
}

nx_status nx_io_submit(nx_io *io, nx_read **reads, size_t n) {
    return submit(io, reads, n, IN_ORDER);
}

nx_status nx_io_submit_front(nx_io *io, nx_read **reads, size_t n) {
    return submit(io, reads, n, AT_FRONT);
}

nx_status nx_io_submit_spare(nx_io *io, nx_read **reads, size_t n) {
    return submit(io, reads, n, WHEN_SPARE);
}

void nx_io_spare_limits(nx_io *io, uint32_t n_requests, uint32_t n_beside) {
    io->spare_requests = n_requests ? n_requests : NX_IO_SPARE;
    io->spare_beside = n_beside;
}

int nx_io_only_spare(const nx_io *io) {
    return io->head == io->spare && io->n_requests == io->spare_active && !io->pool_wanted;
}

void nx_io_raise(nx_io *io, nx_read *read) {
    if (read->nx_owner != io || read->nx_state == NX_READ_IDLE || !read->nx_spare) return;
    if (read->nx_state == NX_READ_POOLED) {
        nx_pool_raise(io, read);
        return;
    }
    io->spare_active -= read->nx_active;
    const bool queued = read->nx_state == NX_READ_QUEUED;
    if (queued) queue_remove(io, read);
    read->nx_spare = 0;
    if (queued) queue_insert(io, read, io->head);
}

int nx_io_drop(nx_io *io, nx_read *read) {
    if (read->nx_owner == io && read->nx_state == NX_READ_POOLED) return nx_pool_drop(io, read);
    if (read->nx_owner != io || read->nx_state != NX_READ_QUEUED) return 0;
    read_failed(io, read, NX_E_ABORTED, 0, read->nx_pos);
    if (read->nx_active == 0) read_done(io, read);
    return 1;
}

nx_status nx_io_poll(nx_io *io) {
    nx_pool_collect(io);
    issue(io);
    nx_status status = turn(io, 0);
    if (status != NX_OK) return status;
    issue(io); /* what has just completed made room */
    return io->pushed ? turn(io, 0) : NX_OK;
}

static bool any_done(nx_read *const *reads, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (reads[i]->done) return true;
    return false;
}

static bool pooled(nx_read *const *reads, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (reads[i]->nx_state == NX_READ_POOLED) return true;
    return false;
}

nx_status nx_io_wait_any(nx_io *io, nx_read *const *reads, size_t n, int (*abort)(void *), void *ctx) {
    for (size_t i = 0; i < n; i++)
        if (!reads[i]->done && (reads[i]->nx_owner != io || reads[i]->nx_state == NX_READ_IDLE))
            return NX_E_INVALID;
    if (n == 0) return NX_E_INVALID;
    if (any_done(reads, n)) return NX_OK;
    for (size_t i = 0; i < n; i++) nx_io_raise(io, reads[i]);
    nx_status status = nx_io_poll(io);
    uint64_t asked_ns = 0;
    while (status == NX_OK && !any_done(reads, n)) {
        uint64_t arrived = io->stats.bytes_read;
        if (abort) {
            uint64_t now_ns = nx_io_now_ns();
            if (now_ns - asked_ns >= NX_ASK_NS) {
                asked_ns = now_ns;
                if (abort(ctx)) return NX_E_ABORTED;
            }
        }
        if (pooled(reads, n)) { /* a queue of others is looked after in between */
            nx_pool_wait(io, io->in_flight ? NX_BETWEEN_NS : NX_WAIT_NS);
            status = turn(io, 0);
        } else {
            status = turn(io, NX_WAIT_NS);
        }
        issue(io);
        if (io->stats.bytes_read == arrived) asked_ns = 0; /* a signal, a timeout or a failure */
    }
    if (status == NX_OK && io->pushed) status = turn(io, 0);
    if (any_done(reads, n)) return NX_OK;
    for (size_t i = 0; i < n; i++) reads[i]->sys_errno = io->broken;
    return status;
}

nx_status nx_io_wait(nx_io *io, nx_read *read, int (*abort)(void *), void *ctx) {
    const nx_status status = nx_io_wait_any(io, &read, 1, abort, ctx);
    return status == NX_OK ? read->status : status;
}

int nx_io_cancel(nx_io *io, nx_read *read) {
    if (read->nx_owner == io && read->nx_state == NX_READ_POOLED) return nx_pool_cancel(io, read);
    if (read->nx_owner != io || read->nx_state != NX_READ_QUEUED || read->nx_pos != read->offset)
        return 0;
    queue_remove(io, read);
    read->status = NX_E_ABORTED;
    read_done(io, read);
    return 1;
}

void nx_io_destroy(nx_io *io) {
    if (!io) return;
    io->closing = true;
    nx_pool_leave(io);
    while (io->head) {
        nx_read *read = io->head;
        read_failed(io, read, NX_E_CLOSED, 0, read->nx_pos);
        if (read->nx_active == 0) read_done(io, read);
    }
    while (io->retry_head) {
        nx_request *q = io->retry_head;
        io->retry_head = q->next;
        read_failed(io, q->read, NX_E_CLOSED, 0, q->begin + q->have);
        request_free(io, q);
    }
    io->engine->stop(io);
    for (uint32_t i = 0; i < io->options.depth; i++) {
        nx_request *q = &io->requests[i];
        if (q->read) { /* a broken engine never started it */
            read_failed(io, q->read, NX_E_CLOSED, 0, q->begin + q->have);
            request_free(io, q);
        }
        free(q->bounce);
    }
    free(io->requests);
    free(io);
}
