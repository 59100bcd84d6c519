/* residency.c: memory of a model that comes and goes, see nexus_residency.h.
 *
 * Each elastic extent has its own whole pages in one reservation. While it is not resident they cannot be
 * touched (PROT_NONE): an access that should not be faults instead of reading zeros. Reading goes
 * through the engine that loads models, under its lock; the tier changes under the turn, so that no graph
 * sees an extent in two tiers, and what the ring had read ahead for the old ones is forgotten with it.
 *
 * A weight that our own kernels compute with is packed when it was read (packed.c): its pages are empty then,
 * and it counts with whichever of both is more.
 */
#include "nexus_residency.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "attach_internal.h"
#include "cache.h"

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif
#define HUGE_PAGE (2u << 20)

static uint64_t span_of(const nx_model *m, const nx_extent *e) {
    return nx_span(&m->files[e->file], e->offset, e->nbytes);
}

/* What it takes of memory while it is resident, or on its way. */
static uint64_t memory_of(const nx_model *m, const nx_extent *e) {
    const uint64_t span = span_of(m, e), packed = nx_extent_packed_bytes(m, e);
    return packed > span ? packed : span;
}

/* Where the pages of an elastic extent begin. */
static uint8_t *pages_of(const nx_model *m, const nx_extent *e) {
    return (uint8_t *)e->pinned - nx_lead(&m->files[e->file], e->offset);
}

nx_status nx_residency_init(nx_model *m, nx_error *error) {
    uint64_t total = 0;
    for (uint32_t i = 0; i < m->n_extents; i++)
        if (m->extents[i].elastic) total += span_of(m, &m->extents[i]);
    if (!total) return NX_OK;
    m->elastic_reserved = nx_round_up(total, NX_PAGE) + HUGE_PAGE;
    void *p = mmap(NULL, m->elastic_reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        nx_error_set(error, NX_E_NOMEM, errno, "%llu bytes of addresses for weights cannot be reserved",
                     (unsigned long long)m->elastic_reserved);
        return NX_E_NOMEM;
    }
    m->elastic = p;
#ifdef MADV_HUGEPAGE
    (void)madvise(p, m->elastic_reserved, MADV_HUGEPAGE); /* as nx_memory_map does, and why */
#endif
    uint8_t *at = m->elastic + (HUGE_PAGE - (uintptr_t)m->elastic % HUGE_PAGE) % HUGE_PAGE;
    for (uint32_t i = 0; i < m->n_extents; i++) {
        nx_extent *e = &m->extents[i];
        if (!e->elastic) continue;
        e->pinned = at + nx_lead(&m->files[e->file], e->offset);
        at += span_of(m, e);
    }
    return NX_OK;
}

void nx_residency_free(nx_model *m) {
    if (m->elastic) munmap(m->elastic, m->elastic_reserved);
}

/* Closed pages hold no memory. */
static nx_status close_pages(void *pages, uint64_t nbytes) {
    if (!nbytes) return NX_OK;
    if (madvise(pages, nbytes, MADV_DONTNEED) != 0) return NX_E_NOMEM;
    return mprotect(pages, nbytes, PROT_NONE) == 0 ? NX_OK : NX_E_NOMEM;
}

static nx_status open_pages(void *pages, uint64_t nbytes) {
    if (!nbytes) return NX_OK;
    return mprotect(pages, nbytes, PROT_READ | PROT_WRITE) == 0 ? NX_OK : NX_E_NOMEM;
}

static nx_status say(nx_model *m, nx_status status, const char *what) {
    nx_error error;
    nx_error_set(&error, status, errno, "%s: %s", what, strerror(errno));
    nx_model_fail(m, &error);
    return status;
}

static bool all_elastic(const nx_model *m, const uint32_t *extents, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (extents[i] >= m->n_extents || !m->extents[extents[i]].elastic) return false;
    return true;
}

static void set_tier(nx_model *m, nx_extent *e, nx_tier tier) {
    __atomic_store_n(&e->tier, tier, __ATOMIC_RELEASE);
    atomic_fetch_add(&m->generation, 1);
}

/* -- promotion ---------------------------------------------------------------------------------- */

/* States of an extent in m->load_state: as for ram extents, so that a graph never waits for it. */
enum { AWAY = 0, READING = 1, THERE = 2 };

typedef struct stopping {
    nx_abort_fn abort;
    void *ctx;
} stopping;

static int should_stop(void *ctx) {
    const stopping *s = ctx;
    return nx_interrupted() || (s->abort && s->abort(s->ctx));
}

/* With load_lock held. What was submitted is READING, whatever comes back. Its pages are open. */
static nx_status start(nx_model *m, uint32_t i) {
    nx_extent *e = &m->extents[i];
    /* Not what is packed: it is given back early, and must not be made present after that. */
    if (!nx_extent_packed_bytes(m, e)) nx_prefault_add(m, pages_of(m, e), span_of(m, e));
    nx_read *read = &m->load_reads[i];
    *read = (nx_read){.dst = e->pinned};
    nx_extent_locate(e, 0, e->nbytes, read);
    const nx_status status = nx_io_submit(m->load_io, &read, 1);
    if (status == NX_OK || status == NX_E_IO) { /* a broken engine still knows the read */
        m->load_state[i] = READING;
        atomic_fetch_add(&m->elastic_bytes, memory_of(m, e));
    }
    return status;
}

/* With load_lock held: nothing of it is in flight any more, and its memory is given back. */
static void take_back(nx_model *m, uint32_t i) {
    nx_extent *e = &m->extents[i];
    nx_read *read = &m->load_reads[i];
    if (!read->done && !nx_io_cancel(m->load_io, read)) (void)nx_io_wait(m->load_io, read, NULL, NULL);
    if (!read->done) return; /* the engine is broken and may still write: the pages stay until it is gone */
    (void)close_pages(pages_of(m, e), span_of(m, e));
    m->load_state[i] = AWAY;
    atomic_fetch_sub(&m->elastic_bytes, memory_of(m, e));
}

static nx_status wait_for(nx_model *m, uint32_t i, stopping *stop) {
    nx_read *read = &m->load_reads[i];
    const nx_status status = nx_io_wait(m->load_io, read, should_stop, stop);
    nx_stats_see(m->load_io, &m->load_seen);
    if (status == NX_E_ABORTED && !read->done) return status;
    if (read->done && read->status == NX_OK) return NX_OK;
    nx_error error;
    if (read->done) nx_read_error(m, &m->extents[i], read, &error);
    else nx_error_set(&error, NX_E_IO, read->sys_errno, "the read engine failed");
    nx_model_fail(m, &error);
    return error.status;
}

nx_status nx_promote(nx_model *m, const uint32_t *extents, size_t n, nx_abort_fn abort, void *ctx, uint64_t *bytes) {
    *bytes = 0;
    if (!all_elastic(m, extents, n)) return NX_E_INVALID;
    stopping stop = {abort, ctx};
    nx_status status = NX_OK;
    nx_ternary *packed = m->own_types ? calloc(n ? n : 1, sizeof *packed) : NULL; /* NULL: ggml computes */
    pthread_mutex_lock(&m->load_lock);
    size_t opened = 0, started = 0;
    /* All pages first: neighbours become one area, which can have huge pages. */
    for (; opened < n && status == NX_OK; opened++) {
        const nx_extent *e = &m->extents[extents[opened]];
        if (m->load_state[extents[opened]] == AWAY && open_pages(pages_of(m, e), span_of(m, e)) != NX_OK)
            status = say(m, NX_E_NOMEM, "memory for a weight cannot be had");
    }
    for (; started < n && status == NX_OK; started++)
        if (m->load_state[extents[started]] == AWAY) status = start(m, extents[started]);
    for (size_t i = 0; i < started && status == NX_OK; i++) {
        if (m->load_state[extents[i]] != READING) continue;
        status = wait_for(m, extents[i], &stop);
        if (status == NX_OK && packed) packed[i] = nx_extent_pack(m, &m->extents[extents[i]]);
    }
    nx_prefault_end(m); /* before memory is given back */
    /* What is complete stays, also when something else failed. */
    const nx_status turn = nx_turn_take(m);
    bool any = false;
    for (size_t i = 0; i < started; i++) {
        const uint32_t k = extents[i];
        if (m->load_state[k] != READING) continue;
        if (turn != NX_OK || !m->load_reads[k].done || m->load_reads[k].status != NX_OK) {
            take_back(m, k);
            continue;
        }
        m->load_state[k] = THERE;
        if (packed && packed[i].codes) {
            nx_extent_put_packed(m, &m->extents[k], packed[i]);
            packed[i].codes = NULL; /* the extent's now */
        }
        set_tier(m, &m->extents[k], NX_TIER_RAM);
        *bytes += m->extents[k].nbytes;
        any = true;
    }
    for (size_t i = 0; i < opened; i++) { /* opened and never read into */
        const nx_extent *e = &m->extents[extents[i]];
        if (m->load_state[extents[i]] == AWAY) (void)close_pages(pages_of(m, e), span_of(m, e));
    }
    for (size_t i = 0; packed && i < n; i++)
        if (packed[i].codes) nx_ternary_free(&packed[i]);
    free(packed);
    if (turn == NX_OK) {
        if (any) nx_pager_forget(m);
        nx_turn_give(m);
    }
    nx_stats_see(m->load_io, &m->load_seen);
    pthread_mutex_unlock(&m->load_lock);
    return status != NX_OK ? status : turn;
}

/* Neighbours that go together. Pages are given back for all of them at once: a huge page of which a part goes
 * is cut up for good, and what is read there later has small pages, which are cleared one by one. */
typedef struct run_of_pages {
    uint8_t *begin, *end;
    uint64_t memory_bytes, weight_bytes;
} run_of_pages;

/* With load_lock and the turn. Returns the bytes of weights that went. */
static uint64_t close_run(nx_model *m, run_of_pages *run, nx_status *status) {
    const nx_status closed = close_pages(run->begin, (uint64_t)(run->end - run->begin));
    const uint64_t went = closed == NX_OK ? run->weight_bytes : 0;
    if (closed == NX_OK) atomic_fetch_sub(&m->elastic_bytes, run->memory_bytes);
    else *status = say(m, closed, "memory of weights cannot be given back"); /* it still counts */
    *run = (run_of_pages){0};
    return went;
}

nx_status nx_demote(nx_model *m, const uint32_t *extents, size_t n, uint64_t *bytes) {
    *bytes = 0;
    if (!all_elastic(m, extents, n)) return NX_E_INVALID;
    pthread_mutex_lock(&m->load_lock);
    nx_status status = nx_turn_take(m);
    if (status == NX_OK) {
        bool any = false;
        run_of_pages run = {0};
        for (size_t i = 0; i < n; i++) {
            nx_extent *e = &m->extents[extents[i]];
            if (m->load_state[extents[i]] != THERE) continue;
            any = true;
            nx_extent_unpack(m, e);
            set_tier(m, e, NX_TIER_NVME);
            m->load_state[extents[i]] = AWAY;
            uint8_t *pages = pages_of(m, e);
            if (pages != run.end) *bytes += close_run(m, &run, &status);
            if (!run.begin) run.begin = pages;
            run.end = pages + span_of(m, e);
            run.memory_bytes += memory_of(m, e);
            run.weight_bytes += e->nbytes;
        }
        *bytes += close_run(m, &run, &status);
        if (any) nx_pager_forget(m);
        nx_turn_give(m);
    }
    pthread_mutex_unlock(&m->load_lock);
    return status;
}

/* -- expert caches ------------------------------------------------------------------------------- */

nx_status nx_group_resize(nx_model *m, uint32_t group, uint32_t n_slots) {
    if (group >= m->n_groups) return NX_E_INVALID;
    nx_group *g = &m->groups[group];
    const uint32_t most = (uint32_t)(g->pool_bytes / g->stride);
    if (n_slots > most) return NX_E_INVALID;
    nx_status status = nx_turn_take(m);
    if (status != NX_OK) return status;
    uint8_t *edge = g->pool + (uint64_t)n_slots * g->stride;
    if (n_slots < g->n_slots) {
        status = nx_cache_close_slots(g, n_slots);
        if (status == NX_OK) status = close_pages(edge, (uint64_t)(g->n_slots - n_slots) * g->stride);
    } else if (n_slots > g->n_slots) {
        status = open_pages(g->pool + (uint64_t)g->n_slots * g->stride, (uint64_t)(n_slots - g->n_slots) * g->stride);
    }
    if (status == NX_OK) {
        pthread_mutex_lock(&m->lock); /* statistics look at it */
        m->cache_bytes = m->cache_bytes + (uint64_t)n_slots * g->stride - (uint64_t)g->n_slots * g->stride;
        pthread_mutex_unlock(&m->lock);
        g->n_slots = n_slots;
    }
    nx_turn_give(m);
    return status;
}

uint64_t nx_group_slot_bytes(const nx_model *m, uint32_t group) {
    return group < m->n_groups ? m->groups[group].stride : 0;
}

/* -- facts -------------------------------------------------------------------------------------- */

uint64_t nx_resident_bytes(const nx_model *m) { return atomic_load(&m->elastic_bytes); }

uint64_t nx_extent_span(const nx_model *m, uint32_t i) {
    return i < m->n_extents && m->extents[i].elastic ? memory_of(m, &m->extents[i]) : 0;
}

int nx_extent_is_resident(const nx_model *m, uint32_t i) {
    return i < m->n_extents && nx_extent_tier(&m->extents[i]) == NX_TIER_RAM;
}

uint64_t nx_residency_generation(const nx_model *m) { return atomic_load(&m->generation); }

void nx_model_set_columns(nx_model *m, int on) { atomic_store(&m->columns, on != 0); }
int nx_model_columns(const nx_model *m) { return atomic_load(&m->columns); }

int nx_flag_stop(void *flag) { return __atomic_load_n((const int *)flag, __ATOMIC_RELAXED); }
_Bool nx_flag_callback(void *flag) { return nx_flag_stop(flag) != 0; }
