/* cache.c: experts in memory, one record (gate|up|down of one expert) in one slot.
 *
 * Partitioned by layer: each group of expert tensors has slots of its own. One cache for all layers,
 * smaller than what one token uses of all of them, would evict each record just before its next use and
 * hit exactly never, whatever the recency.
 *
 * A record is handed out only when all bytes of the part that is asked for have arrived. Parts are
 * requested in the order in which a layer computes with them, so that the product with the first
 * overlaps with the reading of the others.
 */
#include "predict.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define JOIN_BYTES (1u << 20) /* larger records are read part by part: computing begins with the first */

/* -- setting up --------------------------------------------------------------------------------- */

/* Where the part of an expert is in its file, if it lies there in one piece and on a page. */
static bool part_place(const nx_group *g, uint32_t part, uint32_t expert, nx_read *at) {
    const nx_extent *e = g->part[part];
    if (!e->chunks) return false;
    nx_extent_locate(e, (uint64_t)expert * g->record_bytes[part], g->record_bytes[part], at);
    return !at->file->chunks && at->offset % NX_PAGE == 0;
}

/* One read for all parts of an expert, where every record of the file looks alike. Reads of whole pages write
 * nothing but these pages, so that parts need no slack between them. */
static void join(nx_group *g) {
    uint64_t distance[NX_MAX_PARTS] = {0}, end = 0;
    uint32_t first = 0;
    if (g->n_parts < 2 || g->model->files[g->part[0]->file].slack) return;
    for (uint32_t expert = 0; expert < g->n_experts; expert++) {
        nx_read at[NX_MAX_PARTS];
        for (uint32_t p = 0; p < g->n_parts; p++)
            if (!part_place(g, p, expert, &at[p]) || at[p].file != at[0].file) return;
        for (uint32_t p = 0; expert == 0 && p < g->n_parts; p++)
            if (at[p].offset < at[first].offset) first = p;
        for (uint32_t p = 0; p < g->n_parts; p++) {
            const uint64_t d = at[p].offset - at[first].offset; /* wraps: then it is no record of this kind */
            if (expert && d != distance[p]) return;
            distance[p] = d;
            if (d > INT32_MAX) return;
            if (d + g->record_bytes[p] > end) end = d + g->record_bytes[p];
        }
    }
    uint64_t wanted = 0;
    for (uint32_t p = 0; p < g->n_parts; p++) wanted += g->record_bytes[p];
    if (end > wanted + g->n_parts * NX_PAGE || end > JOIN_BYTES) return;
    for (uint32_t p = 0; p < g->n_parts; p++) g->part_at[p] = NX_IO_SLACK + distance[p];
    g->first_part = first;
    g->joined_bytes = end;
    g->n_reads = 1;
    g->stride = nx_round_up(end, NX_PAGE) + 2 * NX_IO_SLACK;
}

/* Part p of slot s lies at pool + s * stride + part_at[p], with slack around each part. Where experts are
 * a multiple of a page apart, as is usual, the place within a page is that of the file: no copies. */
uint64_t nx_record_layout(nx_group *g) {
    uint64_t at = 0;
    g->n_reads = g->n_parts;
    for (uint32_t p = 0; p < g->n_parts; p++) {
        const nx_extent *e = g->part[p];
        g->record_bytes[p] = e->nbytes / g->n_experts;
        g->part_at[p] = at + NX_IO_SLACK + e->offset % NX_PAGE;
        at = nx_round_up(g->part_at[p] + g->record_bytes[p] + NX_IO_SLACK, NX_PAGE);
    }
    g->stride = at;
    join(g);
    return g->stride;
}

nx_status nx_cache_init(nx_model *m, nx_error *error) {
    for (uint32_t i = 0; i < m->n_groups; i++) {
        nx_group *g = &m->groups[i];
        g->pool_bytes = nx_record_layout(g) * g->n_slots;
        g->pool = nx_memory_map(g->pool_bytes);
        g->records = calloc(g->n_slots, sizeof *g->records);
        g->slot_of = malloc(g->n_experts * sizeof *g->slot_of);
        g->seen = calloc(g->n_experts, sizeof *g->seen);
        g->before = calloc(g->n_experts, sizeof *g->before);
        g->latest = malloc(g->n_experts * sizeof *g->latest);
        if (!g->pool || !g->records || !g->slot_of || !g->seen || !g->before || !g->latest) {
            nx_error_set(error, NX_E_NOMEM, ENOMEM, "%llu bytes for %u experts of %s cannot be allocated",
                         (unsigned long long)g->pool_bytes, g->n_slots, g->part[0]->name);
            return NX_E_NOMEM;
        }
        m->cache_bytes += g->pool_bytes;
        memset(g->slot_of, 0xff, g->n_experts * sizeof *g->slot_of);
        for (uint32_t s = 0; s < g->n_slots; s++) g->records[s].expert = -1;
        for (uint32_t p = 0; p < g->n_parts; p++) {
            g->part[p]->group = g;
            g->part[p]->group_part = p;
        }
        g->layer = i;
    }
    return nx_policy_init(m, error);
}

void nx_cache_prefault(nx_model *m) {
    for (uint32_t i = 0; i < m->n_extents; i++)
        if (m->extents[i].elastic) return;
    for (uint32_t i = 0; i < m->n_groups; i++) nx_prefault_add(m, m->groups[i].pool, m->groups[i].pool_bytes);
}

void nx_cache_free(nx_model *m) {
    nx_policy_free(m);
    for (uint32_t i = 0; i < m->n_groups; i++) {
        nx_memory_unmap(m->groups[i].pool, m->groups[i].pool_bytes);
        free(m->groups[i].records);
        free(m->groups[i].slot_of);
        free(m->groups[i].seen);
        free(m->groups[i].before);
        free(m->groups[i].latest);
    }
    free(m->groups);
}

/* -- records ------------------------------------------------------------------------------------ */

static bool failed(const nx_record *r, uint32_t n_reads) {
    for (uint32_t p = 0; p < n_reads; p++)
        if (r->reads[p].status != NX_OK) return true; /* also before the last of its requests has ended */
    return false;
}

static void forget(nx_group *g, nx_record *r) {
    if (r->ahead) nx_ahead_forgotten(g, r);
    if (r->expert >= 0) g->slot_of[r->expert] = -1;
    r->expert = -1;
    r->state = NX_RECORD_EMPTY;
    r->frequency = 0;
}

void nx_cache_forget_failed(nx_group *g) {
    for (uint32_t s = 0; s < g->n_slots; s++) {
        nx_record *r = &g->records[s];
        if (r->state != NX_RECORD_LOADING || r->in_use) continue;
        if (nx_record_arrived(g, r) && failed(r, g->n_reads)) forget(g, r);
    }
}

/* A record whose reading failed when nobody waited for it (read ahead, or for a graph that was stopped) is
 * forgotten, once nothing of it is in flight: whoever asks now has it read again. For what is asked for,
 * that is waited for. */
static nx_status forget_failed(nx_group *g, const int32_t *experts, size_t n) {
    nx_cache_forget_failed(g);
    for (size_t i = 0; i < n; i++) {
        if (g->slot_of[experts[i]] < 0) continue;
        nx_record *r = &g->records[g->slot_of[experts[i]]];
        if (r->in_use || r->state != NX_RECORD_LOADING || !failed(r, g->n_reads)) continue;
        for (uint32_t p = 0; p < g->n_reads; p++) {
            const nx_status status = nx_pager_wait(g->model, NX_NO_PIECE, &r->reads[p]);
            if (status != NX_OK) return status;
        }
        forget(g, r);
    }
    return NX_OK;
}

nx_status nx_cache_close_slots(nx_group *g, uint32_t n_slots) {
    for (uint32_t s = n_slots; s < g->n_slots; s++) {
        nx_record *r = &g->records[s];
        if (r->in_use) return NX_E_BUSY;
        for (uint32_t p = 0; p < g->n_reads && r->state == NX_RECORD_LOADING; p++) {
            const nx_status status = nx_pager_wait(g->model, NX_NO_PIECE, &r->reads[p]);
            if (status != NX_OK) return status;
        }
        forget(g, r);
    }
    return NX_OK;
}

static void touch(nx_group *g, nx_record *r) {
    if (r->ahead) nx_ahead_used(g, r);
    r->frequency = nx_frequency_after(r->frequency, g->clock - r->last_use) + 1.0f;
    r->last_use = g->clock;
    r->in_use++;
}

/* All parts of a record that came in one read. */
static nx_status check_record(nx_read *read) {
    const nx_group *g = read->check_ctx;
    const uint64_t start = nx_io_now_ns();
    uint64_t checked = 0;
    nx_status status = NX_OK;
    for (uint32_t p = 0; p < g->n_parts && status == NX_OK; p++) {
        const nx_chunks *c = g->part[p]->chunks;
        const uint8_t *data = (const uint8_t *)read->dst + (g->part_at[p] - g->part_at[g->first_part]);
        status = nx_chunks_check(c, read->check_item * g->record_bytes[p], g->record_bytes[p], data, &read->error_chunk,
                                 &checked);
        if (status != NX_OK) read->error_offset = c->chunk[read->error_chunk].offset;
    }
    nx_pool_count(g->model->pool, checked, nx_io_now_ns() - start);
    return status;
}

static void fill(nx_group *g, nx_record *r, int32_t slot, int32_t expert) {
    r->expert = expert;
    r->state = NX_RECORD_LOADING;
    r->last_use = g->clock;
    r->frequency = 0;
    g->slot_of[expert] = slot;
    for (uint32_t p = 0; p < g->n_reads; p++) {
        const uint32_t part = g->joined_bytes ? g->first_part : p;
        r->reads[p] = (nx_read){.dst = g->pool + (uint64_t)slot * g->stride + g->part_at[part]};
        nx_extent_locate(g->part[part], (uint64_t)expert * g->record_bytes[part], g->record_bytes[part], &r->reads[p]);
        if (!g->joined_bytes) continue;
        r->reads[p].nbytes = g->joined_bytes;
        r->reads[p].check = check_record;
        r->reads[p].check_ctx = g;
        r->reads[p].check_item = (uint64_t)expert;
    }
}

static void replace(nx_group *g, int32_t slot, int32_t expert) {
    nx_record *r = &g->records[slot];
    if (r->state != NX_RECORD_EMPTY) NX_COUNT(g->model, expert_evictions, 1);
    forget(g, r);
    fill(g, r, slot, expert);
}

size_t nx_cache_place(nx_group *g, nxp_cache_reason reason, const int32_t *experts, size_t n) {
    int32_t *slots = g->model->policy.slots;
    const size_t found = nx_policy_slots(g, reason, experts, n, slots);
    for (size_t i = 0; i < found; i++) replace(g, slots[i], experts[i]);
    return found;
}

/* Reads of all missing records, part by part, ahead of what is only read ahead. */
static nx_status submit_missing(nx_group *g, const int32_t *missing, size_t n) {
    nx_read **list = malloc((n * g->n_reads + 1) * sizeof *list);
    if (!list) return NX_E_NOMEM;
    size_t k = 0;
    for (uint32_t p = 0; p < g->n_reads; p++)
        for (size_t i = 0; i < n; i++) list[k++] = &g->records[missing[i]].reads[p];
    nx_status status = nx_io_submit_front(g->model->io, list, k);
    free(list);
    return status == NX_OK ? NX_OK : nx_engine_failed(g->model, errno);
}

size_t nx_experts_favour(nx_group *g, int32_t *experts, size_t n) {
    size_t n_held = 0, n_free = 0;
    for (uint32_t s = 0; s < g->n_slots; s++) n_free += g->records[s].state == NX_RECORD_EMPTY;
    for (size_t i = 0; i < n; i++) {
        const int32_t expert = experts[i];
        if (g->slot_of[expert] < 0) continue;
        experts[i] = experts[n_held];
        experts[n_held++] = expert;
    }
    n_held = n - n_held < n_free ? n : n_held + n_free;
    NX_COUNT(g->model, expert_uses, n - n_held);
    NX_COUNT(g->model, expert_misses, n - n_held);
    return n_held;
}

/* Reads of records that nobody waits for take up all slots: wait for one of them. */
static nx_status wait_for_slot(nx_group *g) {
    nx_record *busy = NULL;
    for (uint32_t s = 0; s < g->n_slots && !busy; s++)
        if (!g->records[s].in_use) busy = &g->records[s];
    nx_status status = busy ? NX_OK : NX_E_BUSY;
    for (uint32_t p = 0; busy && p < g->n_reads && status == NX_OK; p++)
        if (!busy->reads[p].done) status = nx_pager_wait(g->model, NX_NO_PIECE, &busy->reads[p]);
    return status;
}

size_t nx_cache_absent(nx_group *g, const int32_t *experts, size_t n, size_t limit) {
    int32_t *absent = g->model->policy.absent;
    size_t n_absent = 0;
    for (size_t i = 0; i < n && n_absent < limit; i++) {
        if (g->slot_of[experts[i]] != -1) continue;
        g->slot_of[experts[i]] = -2; /* named already */
        absent[n_absent++] = experts[i];
    }
    for (size_t i = 0; i < n_absent; i++) g->slot_of[absent[i]] = -1;
    return n_absent;
}

/* What was taken is held once: hold it as often as it is named. */
static void hold_again(nx_group *g, const int32_t *experts, size_t n, size_t n_taken) {
    const int32_t *taken = g->model->policy.taken;
    for (size_t i = 0; i < n_taken; i++) {
        g->records[taken[i]].wanted = true;
        g->records[taken[i]].in_use--;
    }
    for (size_t i = 0; i < n; i++) g->records[g->slot_of[experts[i]]].in_use += g->records[g->slot_of[experts[i]]].wanted;
    for (size_t i = 0; i < n_taken; i++) g->records[taken[i]].wanted = false;
}

nx_status nx_cache_hold(nx_group *g, const int32_t *experts, size_t n, size_t *n_taken) {
    nx_policy *p = &g->model->policy;
    size_t n_there = 0;
    *n_taken = 0;
    g->clock++;
    nx_policy_used(g, experts, n);
    /* What is there is held first, so that nothing of this graph evicts it. */
    for (size_t i = 0; i < n; i++)
        if (g->slot_of[experts[i]] >= 0) {
            touch(g, &g->records[g->slot_of[experts[i]]]);
            n_there++;
        }
    const size_t n_absent = nx_cache_absent(g, experts, n, n);
    nx_status status = NX_OK;
    while (*n_taken < n_absent && status == NX_OK) {
        const size_t k = nx_cache_place(g, NXP_DEMAND, p->absent + *n_taken, n_absent - *n_taken);
        if (!k) status = wait_for_slot(g);
        for (size_t i = 0; i < k; i++) {
            p->taken[*n_taken] = g->slot_of[p->absent[*n_taken]];
            touch(g, &g->records[p->taken[(*n_taken)++]]);
        }
    }
    if (status != NX_OK) nx_cache_unhold(g, experts, n, *n_taken);
    else if (n_there + n_absent < n) hold_again(g, experts, n, *n_taken);
    return status;
}

/* Reads that were not submitted must not look like pending ones. */
void nx_cache_unhold(nx_group *g, const int32_t *experts, size_t n, size_t n_taken) {
    for (size_t i = 0; i < n_taken; i++) {
        nx_record *r = &g->records[g->model->policy.taken[i]];
        r->in_use = 0;
        forget(g, r);
    }
    for (size_t i = 0; i < n; i++) {
        const int32_t slot = g->slot_of[experts[i]];
        if (slot >= 0 && g->records[slot].in_use) g->records[slot].in_use--;
    }
}

nx_status nx_experts_acquire(nx_group *g, const int32_t *experts, size_t n) {
    if (g->model->pager.broken) return NX_E_IO; /* the engine may still write into the slots */
    if (n > g->n_slots) return NX_E_BUSY;
    size_t n_missing = 0;
    nx_ahead_settle(g, experts, n);
    nx_status status = forget_failed(g, experts, n);
    if (status == NX_OK) status = nx_cache_hold(g, experts, n, &n_missing);
    if (status != NX_OK) return status;
    if (n_missing) status = submit_missing(g, g->model->policy.taken, n_missing);
    if (status != NX_OK) {
        nx_cache_unhold(g, experts, n, n_missing);
        return status;
    }
    NX_COUNT(g->model, expert_uses, n);
    NX_COUNT(g->model, expert_misses, n_missing);
    return NX_OK;
}

/* The part in which a read failed: the first missing byte of a whole record may lie in another one. */
static const nx_extent *failed_part(const nx_group *g, uint32_t part, const nx_read *read) {
    for (uint32_t p = 0; p < g->n_parts && g->joined_bytes; p++) {
        const uint64_t at = read->offset + g->part_at[p] - g->part_at[g->first_part];
        if (read->error_offset >= at && read->error_offset < at + g->record_bytes[p]) return g->part[p];
    }
    return g->part[part];
}

/* NX_OK and *there: this part of the record can be used. */
static nx_status part_there(nx_group *g, nx_record *r, uint32_t part, bool *there) {
    const nx_read *read = nx_record_read(g, r, part);
    *there = r->state == NX_RECORD_READY || read->done;
    if (r->state == NX_RECORD_READY || !read->done) return NX_OK;
    if (read->status != NX_OK) return nx_pager_fail(g->model, failed_part(g, part, read), read);
    if (nx_record_arrived(g, r) && !failed(r, g->n_reads)) r->state = NX_RECORD_READY;
    return NX_OK;
}

nx_status nx_experts_next(nx_group *g, uint32_t part, int32_t *experts, size_t n, size_t *done) {
    const size_t first = *done;
    nx_read **pending = malloc((n - first + 1) * sizeof *pending);
    nx_status status = pending ? NX_OK : NX_E_NOMEM;
    if (status == NX_OK && nx_io_poll(g->model->io) != NX_OK) status = nx_engine_failed(g->model, errno);
    while (status == NX_OK && *done == first && first < n) {
        size_t n_pending = 0;
        for (size_t i = first; i < n && status == NX_OK; i++) {
            nx_record *r = &g->records[g->slot_of[experts[i]]];
            bool there;
            status = part_there(g, r, part, &there);
            if (!there) pending[n_pending++] = nx_record_read(g, r, part);
            if (status != NX_OK || !there) continue;
            const int32_t expert = experts[i];
            experts[i] = experts[*done];
            experts[(*done)++] = expert;
        }
        if (status == NX_OK && *done == first)
            status = nx_pager_wait_any(g->model, NX_NO_PIECE, pending, n_pending);
    }
    free(pending);
    return status;
}

nx_status nx_experts_wait(nx_group *g, uint32_t part, const int32_t *experts, size_t n) {
    for (size_t i = 0; i < n; i++) {
        nx_record *r = &g->records[g->slot_of[experts[i]]];
        bool there;
        nx_status status = part_there(g, r, part, &there);
        if (status == NX_OK && !there) {
            status = nx_pager_wait(g->model, NX_NO_PIECE, nx_record_read(g, r, part));
            if (status == NX_OK) status = part_there(g, r, part, &there);
        }
        if (status != NX_OK) return status;
    }
    return NX_OK;
}

void nx_experts_release(nx_group *g, const int32_t *experts, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const int32_t slot = g->slot_of[experts[i]];
        if (slot < 0) continue;
        nx_record *r = &g->records[slot];
        if (r->in_use) r->in_use--;
        if (r->state != NX_RECORD_LOADING || !nx_record_arrived(g, r)) continue;
        if (!failed(r, g->n_reads)) r->state = NX_RECORD_READY;
        else if (!r->in_use) forget(g, r); /* not kept: the next use reads it again */
    }
}

nx_group *nx_extent_group(const nx_extent *e, uint32_t *part) {
    *part = e->group_part;
    return e->group;
}

uint32_t nx_group_slots(const nx_group *g) { return g->n_slots; }
int32_t nx_expert_slot(const nx_group *g, int32_t expert) { return g->slot_of[expert]; }

void *nx_group_part(const nx_group *g, uint32_t part, uint64_t *stride) {
    *stride = g->stride;
    return g->pool + g->part_at[part];
}
