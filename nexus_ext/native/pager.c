/* pager.c: the ring that streamed weights pass through.
 *
 * The ring is a circular buffer of bytes. Each slot is a contiguous reservation in it; slots are made
 * and given back in the same order (FIFO), which is the order in which graphs use weights:
 *
 *      tail_slot ... next_slot ... head_slot
 *      [ HELD    )[ LOADING    )   free
 *
 * A slot is LOADING from the moment its read is issued until a computation acquires it (whether or
 * not the bytes are there: `read.done` says so), HELD while nodes may read it, RELEASED after. A slot
 * that was read ahead and is not wanted after all is DROPPED; its memory is reused only when its read
 * has ended. Nothing is ever handed out before `read.done` with status NX_OK.
 *
 * Reading ahead does not stop at the end of a graph: the piece that followed the last one the last time
 * (usually the first layer, for the next token) is read while the tail of this graph is computed. It
 * stops before a piece that is ahead already: a ring that holds a whole cycle need not hold two.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "manifest.h"

#define NX_REQUEST_BYTES (512u << 10) /* what the engine cuts reads into by default */
#define SLOT(p, i) (&(p)->slots[(i) % (p)->n_slots])

/* Requests that the kernel may have at once. While a long segment is computed nobody issues more, so
 * they should fill the ring; but a read on demand (experts) has to pass those in front of it. */
static uint32_t queue_depth(uint64_t ring_bytes, bool on_demand) {
    const uint64_t requests = ring_bytes / NX_REQUEST_BYTES;
    return on_demand || requests < 32 ? 32 : requests < 512 ? (uint32_t)requests : 512;
}

nx_status nx_pager_init(nx_model *m, nx_error *error) {
    nx_pager *p = &m->pager;
    bool on_demand = false;
    uint64_t n_pieces = 0;
    for (uint32_t i = 0; i < m->n_extents; i++) {
        nx_extent *e = &m->extents[i];
        if (e->tier != NX_TIER_NVME) continue;
        if (e->ne[2] > 1) on_demand = true;
        if (!p->slab_bytes || e->ne[2] > 1 || e->ne[3] > 1) {
            e->slab_rows = e->nbytes / e->row_bytes;
            e->n_pieces = 1;
        } else {
            nx_slab_split(e->ne[1], e->row_bytes, p->slab_bytes, &e->slab_rows, &e->n_pieces);
            nx_slab_of_chunks(e, p->slab_bytes, p->ring_bytes);
        }
        e->first_piece = (uint32_t)n_pieces;
        n_pieces += e->n_pieces;
    }
    if (n_pieces >= NX_NO_PIECE) {
        nx_error_set(error, NX_E_INVALID, 0, "slabs of %llu bytes cut the model into %llu pieces",
                     (unsigned long long)p->slab_bytes, (unsigned long long)n_pieces);
        return NX_E_INVALID;
    }
    m->n_pieces = (uint32_t)n_pieces;
    p->last_issued = p->last_used = NX_NO_PIECE;
    p->ring_bytes = p->ring_bytes / NX_PAGE * NX_PAGE;
    p->n_slots = p->ring_bytes / (2 * NX_PAGE) + 2;
    const nx_io_options options = {.engine = NX_IO_ENGINE_AUTO, .depth = queue_depth(p->ring_bytes, on_demand)};
    nx_status status = nx_io_create(&options, &m->io);
    if (status != NX_OK) {
        nx_error_set(error, status, errno, "the read engine cannot be set up");
        return status;
    }
    nx_io_set_pool(m->io, m->pool);
    m->piece_extent = malloc((n_pieces + 1) * sizeof *m->piece_extent);
    p->successor = malloc((n_pieces + 1) * sizeof *p->successor);
    p->ahead = calloc(n_pieces + 1, sizeof *p->ahead);
    p->slots = calloc(p->n_slots, sizeof *p->slots);
    if (p->ring_bytes) p->ring = nx_memory_map(p->ring_bytes);
    if (p->scratch_bytes) p->scratch = nx_memory_map(p->scratch_bytes + NX_PAGE);
    if (!m->piece_extent || !p->successor || !p->ahead || !p->slots || (p->ring_bytes && !p->ring) ||
        (p->scratch_bytes && !p->scratch)) {
        nx_error_set(error, NX_E_NOMEM, ENOMEM,
                     "%llu bytes for the ring and %llu for scratch cannot be allocated",
                     (unsigned long long)p->ring_bytes, (unsigned long long)p->scratch_bytes);
        return NX_E_NOMEM;
    }
    for (uint32_t i = 0; i < m->n_extents; i++) {
        const nx_extent *e = &m->extents[i];
        for (uint32_t k = 0; k < e->n_pieces; k++) {
            m->piece_extent[e->first_piece + k] = i;
            p->successor[e->first_piece + k] = NX_NO_PIECE;
        }
    }
    return NX_OK;
}

void nx_pager_free(nx_model *m) {
    nx_pager *p = &m->pager;
    nx_io_destroy(m->io); /* waits for reads in flight */
    nx_memory_unmap(p->ring, p->ring_bytes);
    nx_memory_unmap(p->scratch, p->scratch_bytes + NX_PAGE);
    nx_memory_unmap(p->orphan, p->orphan_bytes);
    for (size_t i = 0; i < sizeof p->demand / sizeof *p->demand; i++) free(p->demand[i].reads);
    free(p->ahead);
    free(p->slots);
    free(p->order);
    free(p->successor);
}

static nx_extent *piece_of(nx_model *m, uint32_t piece, uint64_t *row, uint64_t *rows) {
    nx_extent *e = &m->extents[m->piece_extent[piece]];
    const uint64_t total = e->nbytes / e->row_bytes;
    *row = (piece - e->first_piece) * e->slab_rows;
    *rows = total - *row < e->slab_rows ? total - *row : e->slab_rows;
    return e;
}

/* -- slots -------------------------------------------------------------------------------------- */

/* Give back what is at the tail and no longer needed. */
static void retire(nx_pager *p) {
    while (p->tail_slot < p->head_slot) {
        nx_slot *s = SLOT(p, p->tail_slot);
        if (s->state != NX_SLOT_RELEASED && !(s->state == NX_SLOT_DROPPED && s->read.done)) break;
        p->tail_slot++;
    }
    if (p->next_slot < p->tail_slot) p->next_slot = p->tail_slot;
    if (p->tail_slot == p->head_slot) p->head = 0;
}

/* `span` contiguous bytes at the head of the ring, or false. */
static bool reserve(nx_pager *p, uint64_t span, uint64_t *start) {
    if (p->head_slot - p->tail_slot >= p->n_slots || span > p->ring_bytes) return false;
    if (p->tail_slot == p->head_slot) {
        *start = 0;
        return true;
    }
    const uint64_t tail = SLOT(p, p->tail_slot)->start;
    if (p->head > tail) { /* in use: [tail, head) */
        if (span <= p->ring_bytes - p->head) *start = p->head;
        else if (span <= tail) *start = 0;
        else return false;
        return true;
    }
    if (span > tail - p->head) return false; /* free: [head, tail) */
    *start = p->head;
    return true;
}

/* The next piece to read: of this turn, then the one that is likely to follow. */
static uint32_t next_to_issue(const nx_pager *p) {
    if (p->issued < p->n_order) return p->order[p->issued];
    if (p->last_issued == NX_NO_PIECE) return NX_NO_PIECE;
    const uint32_t next = p->successor[p->last_issued];
    return next != NX_NO_PIECE ? next : p->n_order ? p->order[0] : NX_NO_PIECE;
}

nx_status nx_engine_failed(nx_model *m, int sys_errno) {
    nx_error error;
    nx_error_set(&error, NX_E_IO, sys_errno, "the %s engine that reads the model failed",
                 nx_io_engine_name(m->io));
    nx_model_fail(m, &error);
    m->pager.broken = true;
    return NX_E_IO;
}

static nx_status issue(nx_model *m) {
    nx_pager *p = &m->pager;
    if (p->broken) return NX_E_IO;
    retire(p);
    for (uint32_t piece; (piece = next_to_issue(p)) != NX_NO_PIECE;) {
        if (p->issued == p->n_order && p->ahead[piece]) break;
        uint64_t row, rows, start;
        nx_extent *e = piece_of(m, piece, &row, &rows);
        const uint64_t from = row * e->row_bytes, nbytes = rows * e->row_bytes, offset = e->offset + from;
        const nx_model_file *f = &m->files[e->file];
        const uint64_t span = nx_span(f, offset, nbytes);
        if (!reserve(p, span, &start)) break;
        nx_slot *s = SLOT(p, p->head_slot);
        *s = (nx_slot){.piece = piece, .state = NX_SLOT_LOADING, .start = start, .span = span};
        s->read = (nx_read){.dst = p->ring + start + nx_lead(f, offset)};
        nx_extent_locate(e, from, nbytes, &s->read);
        nx_read *read = &s->read;
        nx_status status = nx_io_submit(m->io, &read, 1);
        if (status != NX_OK) return nx_engine_failed(m, errno);
        p->head_slot++;
        p->ahead[piece]++;
        p->head = start + span;
        if (p->issued < p->n_order) p->issued++;
        p->last_issued = piece;
        nx_event_add(m, NX_EVENT_ISSUE, piece, nbytes);
    }
    return NX_OK;
}

static void drop(nx_model *m, nx_slot *s) {
    s->state = NX_SLOT_DROPPED;
    m->pager.ahead[s->piece]--;
    nx_io_cancel(m->io, &s->read);
    NX_COUNT(m, pieces_dropped, 1);
    nx_event_add(m, NX_EVENT_DROP, s->piece, s->read.nbytes);
}

/* -- turns -------------------------------------------------------------------------------------- */

static nx_status set_order(nx_model *m, nx_extent *const *uses, size_t n_uses) {
    nx_pager *p = &m->pager;
    size_t n = 0;
    for (size_t i = 0; i < n_uses; i++) {
        if (uses[i]->model != m) return NX_E_INVALID;
        n += uses[i]->n_pieces;
    }
    if (n > p->order_capacity) {
        uint32_t *order = realloc(p->order, n * sizeof *order);
        if (!order) return NX_E_NOMEM;
        p->order = order;
        p->order_capacity = n;
    }
    p->n_order = 0;
    for (size_t i = 0; i < n_uses; i++)
        for (uint32_t k = 0; k < uses[i]->n_pieces; k++)
            p->order[p->n_order++] = uses[i]->first_piece + k;
    return NX_OK;
}

/* Keep what was read ahead as far as it is what this graph begins with; drop the rest. A graph that
 * uses nothing says nothing about what comes next. */
static void match_read_ahead(nx_model *m) {
    nx_pager *p = &m->pager;
    p->issued = p->used = 0;
    p->next_slot = p->tail_slot;
    if (p->n_order == 0) return;
    uint32_t expected = p->order[0];
    for (uint64_t i = p->tail_slot; i < p->head_slot; i++) {
        nx_slot *s = SLOT(p, i);
        if (s->state != NX_SLOT_LOADING) continue;
        if (s->piece == expected && !(s->read.done && s->read.status != NX_OK)) {
            p->last_issued = s->piece;
            if (p->issued < p->n_order) p->issued++;
            expected = next_to_issue(p);
        } else {
            drop(m, s);
        }
    }
}

static void learn_successors(nx_pager *p) {
    for (size_t i = 0; i < p->n_order; i++) {
        if (p->last_used != NX_NO_PIECE) p->successor[p->last_used] = p->order[i];
        p->last_used = p->order[i];
    }
}

nx_status nx_turn_take(nx_model *m) {
    pthread_mutex_lock(&m->lock);
    atomic_fetch_add(&m->turn_waiters, 1);
    while (m->turn && !m->closed) pthread_cond_wait(&m->turn_free, &m->lock);
    atomic_fetch_sub(&m->turn_waiters, 1);
    const bool closed = m->closed;
    if (!closed) m->turn = true;
    pthread_mutex_unlock(&m->lock);
    if (closed) return NX_E_CLOSED;
    m->pager.abort = NULL;
    return NX_OK;
}

void nx_turn_give(nx_model *m) {
    pthread_mutex_lock(&m->lock);
    m->turn = false;
    pthread_cond_signal(&m->turn_free);
    if (m->closed) pthread_cond_broadcast(&m->turn_free);
    pthread_mutex_unlock(&m->lock);
}

void nx_pager_forget(nx_model *m) {
    nx_pager *p = &m->pager;
    for (uint64_t i = p->tail_slot; i < p->head_slot; i++)
        if (SLOT(p, i)->state == NX_SLOT_LOADING) drop(m, SLOT(p, i));
    retire(p);
    p->last_issued = p->last_used = NX_NO_PIECE;
    p->n_order = p->issued = p->used = 0;
    memset(p->successor, 0xff, m->n_pieces * sizeof *p->successor);
}

nx_status nx_turn_begin(nx_model *m, nx_extent *const *uses, size_t n_uses, nx_abort_fn abort, void *ctx) {
    nx_pager *p = &m->pager;
    if (nx_turn_take(m) != NX_OK) return NX_E_CLOSED;
    pthread_mutex_lock(&m->lock);
    m->ran = true; /* a graph: weights that come and go take the turn as well */
    pthread_mutex_unlock(&m->lock);
    p->abort = abort;
    p->abort_ctx = ctx;

    nx_status status = p->broken ? nx_engine_failed(m, 0) : NX_OK; /* said again to whoever asks again */
    for (uint32_t i = 0; i < m->n_files && status == NX_OK; i++) {
        status = nx_file_check(m->files[i].file);
        if (status != NX_OK) {
            nx_error error;
            nx_error_set(&error, status, 0, "%s was changed while it was in use", m->files[i].path);
            snprintf(error.path, sizeof error.path, "%s", m->files[i].path);
            nx_model_fail(m, &error);
        }
    }
    if (status == NX_OK) status = set_order(m, uses, n_uses);
    if (status == NX_OK) {
        nx_io_poll(m->io);
        learn_successors(p);
        match_read_ahead(m);
        status = issue(m);
        NX_COUNT(m, passes, 1);
        nx_event_add(m, NX_EVENT_PASS_BEGIN, (uint32_t)p->n_order, 0);
    }
    if (status != NX_OK) nx_turn_end(m, 1);
    return status;
}

void nx_turn_end(nx_model *m, int failed) {
    nx_pager *p = &m->pager;
    for (uint64_t i = p->tail_slot; i < p->head_slot; i++) {
        nx_slot *s = SLOT(p, i);
        if (s->state == NX_SLOT_HELD) s->state = NX_SLOT_RELEASED;
        else if (failed && s->state == NX_SLOT_LOADING) drop(m, s);
    }
    retire(p);
    if (failed) p->last_issued = NX_NO_PIECE;
    else (void)issue(m); /* reads ahead for the next graph; an error shows up there */
    nx_stats_see(m->io, &m->run_seen);
    nx_event_add(m, NX_EVENT_PASS_END, (uint32_t)p->used, 0);
    nx_turn_give(m);
}

/* -- pieces ------------------------------------------------------------------------------------- */

/* The slot of the next piece, or NULL when it is not issued yet. */
static nx_slot *next_slot(nx_pager *p) {
    for (; p->next_slot < p->head_slot; p->next_slot++) {
        nx_slot *s = SLOT(p, p->next_slot);
        if (s->state == NX_SLOT_LOADING) return s;
    }
    return NULL;
}

int nx_piece_ready(nx_model *m) {
    nx_pager *p = &m->pager;
    nx_io_poll(m->io);
    if (p->used >= p->n_order || issue(m) != NX_OK) return 0;
    nx_slot *s = next_slot(p);
    return s && s->read.done && s->read.status == NX_OK;
}

nx_status nx_pager_wait_any(nx_model *m, uint32_t piece, nx_read *const *reads, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (reads[i]->done) return NX_OK;
    const uint64_t begin = nx_now_ns();
    const nx_status status = nx_io_wait_any(m->io, reads, n, m->pager.abort, m->pager.abort_ctx);
    const uint64_t ns = nx_now_ns() - begin;
    NX_COUNT(m, wait_ns, ns);
    nx_event_add(m, NX_EVENT_WAIT, piece, ns);
    nx_stats_see(m->io, &m->run_seen);
    if (status == NX_OK || status == NX_E_ABORTED) return status; /* how it ended is for the caller to look at */
    return nx_engine_failed(m, reads[0]->sys_errno);
}

nx_status nx_pager_wait(nx_model *m, uint32_t piece, nx_read *read) {
    return nx_pager_wait_any(m, piece, &read, 1);
}

nx_status nx_pager_fail(nx_model *m, const nx_extent *e, const nx_read *read) {
    nx_error error;
    nx_read_error(m, e, read, &error);
    nx_model_fail(m, &error);
    return read->status;
}

nx_status nx_piece_acquire(nx_model *m, nx_piece *out) {
    nx_pager *p = &m->pager;
    if (p->used >= p->n_order) return NX_E_INVALID;
    nx_slot *s;
    for (;;) {
        nx_io_poll(m->io);
        nx_status status = issue(m);
        if (status != NX_OK) return status;
        if ((s = next_slot(p))) break;
        /* No room. What stands in the way is either held by the caller, or dropped but still being
         * read, or nothing at all: then the piece is larger than the ring. */
        nx_slot *tail = p->tail_slot < p->head_slot ? SLOT(p, p->tail_slot) : NULL;
        if (tail && tail->state == NX_SLOT_HELD) return NX_E_BUSY;
        if (!tail) {
            uint64_t row, rows;
            nx_extent *e = piece_of(m, p->order[p->used], &row, &rows);
            nx_error error;
            nx_error_set(&error, NX_E_NOMEM, 0, "a slab of %llu bytes of %s does not fit in the ring of %llu",
                         (unsigned long long)(rows * e->row_bytes), e->name,
                         (unsigned long long)p->ring_bytes);
            nx_model_fail(m, &error);
            return NX_E_NOMEM;
        }
        status = nx_pager_wait(m, tail->piece, &tail->read);
        if (status != NX_OK) return status;
    }
    const bool ready = s->read.done;
    nx_status status = nx_pager_wait(m, s->piece, &s->read);
    if (status != NX_OK) return status;
    nx_extent *e = piece_of(m, s->piece, &out->row, &out->n_rows);
    if (s->read.status != NX_OK) return nx_pager_fail(m, e, &s->read);
    s->state = NX_SLOT_HELD;
    p->ahead[s->piece]--;
    p->next_slot++;
    p->used++;
    NX_COUNT(m, pieces, 1);
    NX_COUNT(m, pieces_ready, ready);
    NX_COUNT(m, bytes_used, s->read.nbytes);
    out->extent = e;
    out->nbytes = s->read.nbytes;
    out->data = s->read.dst;
    return NX_OK;
}

void nx_piece_release(nx_model *m, size_t n) {
    nx_pager *p = &m->pager;
    for (uint64_t i = p->tail_slot; i < p->head_slot && n; i++) {
        nx_slot *s = SLOT(p, i);
        if (s->state != NX_SLOT_HELD) continue;
        s->state = NX_SLOT_RELEASED;
        n--;
    }
    nx_io_poll(m->io);
    (void)issue(m); /* an error shows up when the piece is acquired */
}

uint64_t nx_ring_share(const nx_model *m) { return m->pager.ring_bytes / 3; }

void nx_note_compute(nx_model *m, uint32_t first_node, uint64_t ns) {
    NX_COUNT(m, segments, 1);
    NX_COUNT(m, compute_ns, ns);
    nx_event_add(m, NX_EVENT_COMPUTE, first_node, ns);
}

void nx_note_pass(nx_model *m, uint64_t ns) { NX_COUNT(m, pass_ns, ns); }
