/* popularity.c: how often routers chose which expert, and what that is good for: experts that are read
 * before the first graph runs. */
#include "predict.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PRELOAD_FREQUENCY 46.0 /* of an expert that every token uses: half of what it would come to */

/* Relaxed: counts are read while graphs run. */
static uint64_t counted(const nx_group *g, uint32_t expert) {
    return __atomic_load_n(&g->seen[expert], __ATOMIC_RELAXED) + __atomic_load_n(&g->before[expert], __ATOMIC_RELAXED);
}

void nx_experts_seen(nx_group *g, const int32_t *experts, size_t n) {
    for (size_t i = 0; i < n; i++) __atomic_fetch_add(&g->seen[experts[i]], 1, __ATOMIC_RELAXED);
    g->n_latest = 0;
    for (size_t i = 0; i < n; i++) { /* each once */
        bool there = false;
        for (size_t k = 0; k < g->n_latest && !there; k++) there = g->latest[k] == experts[i];
        if (!there) g->latest[g->n_latest++] = experts[i];
    }
}

size_t nx_experts_latest(const nx_group *g, int32_t *out, size_t n) {
    if (n > g->n_latest) n = g->n_latest;
    if (n) memcpy(out, g->latest, n * sizeof *out);
    return n;
}

size_t nx_experts_popular(const nx_group *g, int32_t *out, size_t n) {
    size_t found = 0;
    for (uint32_t e = 0; e < g->n_experts; e++) { /* insertion: n is small, or this is rare */
        const uint64_t count = counted(g, e);
        if (!count || (found == n && (!n || counted(g, (uint32_t)out[n - 1]) >= count))) continue;
        size_t at = found < n ? found++ : n - 1;
        for (; at > 0 && counted(g, (uint32_t)out[at - 1]) < count; at--) out[at] = out[at - 1];
        out[at] = (int32_t)e;
    }
    return found;
}

uint32_t nx_model_n_groups(const nx_model *m) { return m->n_groups; }

uint32_t nx_group_experts(const nx_model *m, uint32_t group, uint32_t *extent) {
    if (group >= m->n_groups) return 0;
    *extent = (uint32_t)(m->groups[group].part[0] - m->extents);
    return m->groups[group].n_experts;
}

void nx_popularity_get(nx_model *m, uint32_t group, uint64_t *counts) {
    const nx_group *g = &m->groups[group];
    for (uint32_t e = 0; e < g->n_experts; e++) counts[e] = __atomic_load_n(&g->seen[e], __ATOMIC_RELAXED);
}

void nx_popularity_set(nx_model *m, uint32_t group, const uint64_t *counts) {
    nx_group *g = &m->groups[group];
    for (uint32_t e = 0; e < g->n_experts; e++) __atomic_store_n(&g->before[e], counts[e], __ATOMIC_RELAXED);
}

/* -- preloading ---------------------------------------------------------------------------------- */

/* The most popular expert of the group that is not there, while there is an empty slot. */
static int32_t next_popular(const nx_group *g) {
    bool room = false;
    for (uint32_t s = 0; s < g->n_slots && !room; s++) room = g->records[s].state == NX_RECORD_EMPTY;
    int32_t best = -1;
    for (uint32_t e = 0; room && e < g->n_experts; e++) {
        if (g->slot_of[e] >= 0 || !g->before[e]) continue;
        if (best < 0 || g->before[e] > g->before[best]) best = (int32_t)e;
    }
    return best;
}

static nx_status preload_one(nx_group *g, int32_t expert) {
    (void)nx_cache_place(g, NXP_AHEAD, &expert, 1); /* into the slot that was seen to be empty */
    nx_record *r = &g->records[g->slot_of[expert]];
    nx_read *list[NX_MAX_PARTS];
    uint64_t total = 0;
    for (uint32_t e = 0; e < g->n_experts; e++) total += g->before[e];
    r->frequency = (float)(PRELOAD_FREQUENCY * (double)g->before[expert] / (double)total);
    for (uint32_t p = 0; p < g->n_reads; p++) list[p] = &r->reads[p];
    const nx_status status = nx_io_submit_spare(g->model->io, list, g->n_reads);
    if (status != NX_OK) return nx_engine_failed(g->model, errno);
    uint64_t bytes = 0;
    for (uint32_t p = 0; p < g->n_parts; p++) bytes += g->record_bytes[p];
    NX_COUNT(g->model, preloaded, bytes);
    return NX_OK;
}

/* A graph is waiting for the turn, or nobody will need what is read. */
static int somebody_waits(void *ctx) {
    nx_model *m = ctx;
    return atomic_load_explicit(&m->turn_waiters, memory_order_relaxed) > 0;
}

/* With the turn. Layer by layer would leave the last ones empty when a request comes early: rank by rank. */
static int preload(nx_model *m, uint64_t until_ns) {
    for (bool any = true; any;) {
        any = false;
        for (uint32_t i = 0; i < m->n_groups; i++) {
            const int32_t expert = next_popular(&m->groups[i]);
            if (expert < 0) continue;
            any = true;
            const nx_status status = preload_one(&m->groups[i], expert);
            if (status != NX_OK) return -(int)status;
            /* One record at a time is in hand: a request that comes waits for no more than its requests. */
            nx_record *r = &m->groups[i].records[m->groups[i].slot_of[expert]];
            for (uint32_t p = 0; p < m->groups[i].n_reads; p++) {
                const nx_status waited = nx_io_wait(m->io, &r->reads[p], somebody_waits, m);
                if (!r->reads[p].done && waited != NX_E_ABORTED) return -(int)nx_engine_failed(m, r->reads[p].sys_errno);
                if (!r->reads[p].done) return 1;
            }
            if (nx_now_ns() >= until_ns || somebody_waits(m)) return 1;
        }
    }
    return 0;
}

int nx_cache_preload(nx_model *m, uint64_t ns) {
    pthread_mutex_lock(&m->lock);
    const bool begun = m->turn || m->closed || m->ran || m->pager.broken;
    if (!begun) m->turn = true;
    pthread_mutex_unlock(&m->lock);
    if (begun) return 0;
    const int more = preload(m, nx_now_ns() + ns);
    nx_stats_see(m->io, &m->run_seen);
    pthread_mutex_lock(&m->lock);
    m->turn = false;
    pthread_cond_broadcast(&m->turn_free);
    pthread_mutex_unlock(&m->lock);
    return more;
}
