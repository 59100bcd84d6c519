/* predict.c: records of experts that are read before a router asks for them.
 *
 * Such a record is `ahead` until a graph acquires it (then it was useful) or its slot is taken (then it was
 * read in vain). Its reads are spare ones, which the engine issues behind everything else. When the layer
 * that it was meant for is computed, reads of records that are wanted go to the front, and of the others
 * nothing more is issued.
 */
#include "predict.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static uint64_t bytes_of(const nx_group *g) {
    uint64_t n = 0;
    for (uint32_t p = 0; p < g->n_parts; p++) n += g->record_bytes[p];
    return n;
}

void nx_ahead_used(nx_group *g, nx_record *r) {
    r->ahead = false;
    NX_COUNT(g->model, prefetch_used, bytes_of(g));
}

void nx_ahead_forgotten(nx_group *g, nx_record *r) {
    r->ahead = false;
    uint64_t n = 0;
    for (uint32_t p = 0; p < g->n_reads; p++) n += r->reads[p].bytes_read;
    NX_COUNT(g->model, prefetch_wasted, n);
}

/* The group is about to be asked for `experts`: what was read ahead for it is wanted now or stale. */
void nx_ahead_settle(nx_group *g, const int32_t *experts, size_t n) {
    if (!g->n_ahead) return;
    nx_io *io = g->model->io;
    for (uint32_t p = g->n_reads; p-- > 0;) /* what is raised last ends in front */
        for (size_t i = n; i-- > 0;) {
            const int32_t slot = g->slot_of[experts[i]];
            if (slot < 0) continue;
            g->records[slot].wanted = true;
            if (g->records[slot].state == NX_RECORD_LOADING) nx_io_raise(io, &g->records[slot].reads[p]);
        }
    for (uint32_t s = 0; s < g->n_slots; s++) {
        nx_record *r = &g->records[s];
        if (r->ahead && !r->wanted && r->state == NX_RECORD_LOADING)
            for (uint32_t p = 0; p < g->n_reads; p++) (void)nx_io_drop(io, &r->reads[p]);
        r->wanted = false;
    }
    g->n_ahead = 0;
    (void)nx_io_poll(io); /* what was raised is issued; an error shows up when it is waited for */
}

nx_status nx_experts_prefetch(nx_group *g, const int32_t *experts, size_t n, size_t limit) {
    nx_model *m = g->model;
    if (m->pager.broken) return NX_E_IO;
    if (limit > g->n_slots) limit = g->n_slots;
    nx_read **list = malloc((limit * g->n_reads + 1) * sizeof *list);
    if (!list) return NX_E_NOMEM;
    const int32_t *absent = m->policy.absent;
    size_t k = 0;
    nx_cache_forget_failed(g);
    /* What is predicted and there is held, so that nothing that is predicted evicts it. */
    for (size_t i = 0; i < n; i++)
        if (g->slot_of[experts[i]] >= 0) g->records[g->slot_of[experts[i]]].in_use++;
    const size_t n_absent = nx_cache_absent(g, experts, n, limit);
    const size_t n_started = nx_cache_place(g, NXP_AHEAD, absent, n_absent);
    for (size_t i = 0; i < n; i++) {
        const int32_t slot = g->slot_of[experts[i]];
        if (slot >= 0 && g->records[slot].in_use) g->records[slot].in_use--;
    }
    for (size_t i = 0; i < n_started; i++) {
        nx_record *r = &g->records[g->slot_of[absent[i]]];
        r->ahead = true;
        for (uint32_t p = 0; p < g->n_reads; p++) list[k++] = &r->reads[p];
    }
    g->n_ahead += (uint32_t)n_started;
    const nx_status status = k ? nx_io_submit_spare(m->io, list, k) : NX_OK;
    free(list);
    if (status != NX_OK) return nx_engine_failed(m, errno);
    NX_COUNT(m, prefetched, n_started * bytes_of(g));
    return NX_OK;
}

size_t nx_group_empty_slots(nx_group *g) {
    size_t n = 0;
    nx_cache_forget_failed(g);
    for (uint32_t s = 0; s < g->n_slots; s++) n += g->records[s].state == NX_RECORD_EMPTY;
    return n;
}

void nx_prefetch_beside(nx_model *m, uint32_t n_requests) { nx_io_spare_limits(m->io, 0, n_requests); }

int nx_reads_go_on(nx_model *m) {
    if (m->pager.broken) return 0;
    (void)nx_io_poll(m->io); /* an error shows up when something is waited for */
    return nx_io_only_spare(m->io);
}

void nx_note_idle(nx_model *m, uint64_t ns) { NX_COUNT(m, idle_ns, ns); }
void nx_note_predict(nx_model *m, uint64_t ns) { NX_COUNT(m, predict_ns, ns); }

/* -- when ---------------------------------------------------------------------------------------- */

nx_status nx_predict_set(nx_model *m, const char *name) {
    static const struct {
        const char *name;
        nx_predictor predictor;
        bool automatic;
    } known[] = {{"none", NX_PREDICT_NONE, false},
                 {"gate", NX_PREDICT_GATE, false},
                 {"previous", NX_PREDICT_PREVIOUS, false},
                 {"popular", NX_PREDICT_POPULAR, false},
                 {"auto", NX_PREDICT_GATE, true}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(known[i].name, name) != 0) continue;
        pthread_mutex_lock(&m->lock);
        m->predict.predictor = known[i].predictor;
        nx_control_init(&m->predict.control, known[i].automatic, known[i].predictor != NX_PREDICT_NONE);
        pthread_mutex_unlock(&m->lock);
        return NX_OK;
    }
    return NX_E_INVALID;
}

nx_predictor nx_predict_now(const nx_model *m, int one_token) {
    return m->predict.control.on || !one_token ? m->predict.predictor : NX_PREDICT_NONE;
}

void nx_predict_get(nx_model *m, nx_prediction *out) {
    pthread_mutex_lock(&m->lock);
    nx_control_get(&m->predict.control, out);
    pthread_mutex_unlock(&m->lock);
}

static uint64_t read_counter(const uint64_t *counter) { return __atomic_load_n(counter, __ATOMIC_RELAXED); }

void nx_predict_pass(nx_model *m, uint64_t pass_ns) {
    nx_predict *p = &m->predict;
    const uint64_t idle = read_counter(&m->stats.idle_ns), wait = read_counter(&m->stats.wait_ns);
    pthread_mutex_lock(&m->lock);
    /* Counters that were reset in between say nothing about this pass. */
    if (idle >= p->idle_seen && wait >= p->wait_seen)
        nx_control_pass(&p->control, pass_ns, idle - p->idle_seen, wait - p->wait_seen);
    p->idle_seen = idle;
    p->wait_seen = wait;
    pthread_mutex_unlock(&m->lock);
}
