/* experts.c: products with experts that are not all in memory (MUL_MAT_ID).
 *
 * When the walk of graph.c reaches such a product the router has run: the numbers of the experts stand in
 * the graph. With a cache, the products of one router decision (same numbers, same group) share the
 * records, which are held from the first of them to the last. Without one, or for those of a batch that
 * the cache has no slots for, each product reads its own part of the experts into the scratch area, half
 * an area at a time ("waves"), each expert once: one half is computed with while the other is read.
 *
 * A product with other numbers for the same experts is computed by the same kernel on the same bytes, so
 * it comes out bit by bit the same. In waves, rows of one expert stay together and in order.
 */
#include <stdlib.h>
#include <string.h>

#include "walk.h"

/* -- what the router picked --------------------------------------------------------------------- */

static int32_t picked(const gx_tensor *ids, int64_t token, int64_t k) {
    return *(const int32_t *)((const char *)ids->data + (size_t)token * ids->nb[1] + (size_t)k * ids->nb[0]);
}

static int bad_id(nx_extent *e, int64_t id, uint64_t limit) {
    nx_error error;
    nx_error_set(&error, NX_E_INVALID, 0, "the router asks for expert %lld of %s, which has %llu", (long long)id,
                 e->name, (unsigned long long)limit);
    nx_model_fail(e->model, &error);
    return GX_FAILED;
}

static void record(const nx_extent *e, const gx_tensor *ids) {
    if (!nx_routing_recording(e->model)) return;
    int32_t *experts = malloc((size_t)(ids->ne[0] * ids->ne[1]) * sizeof *experts);
    if (!experts) return;
    for (int64_t t = 0; t < ids->ne[1]; t++)
        for (int64_t k = 0; k < ids->ne[0]; k++) experts[t * ids->ne[0] + k] = picked(ids, t, k);
    nx_routing_add(e->model, e, (int32_t)ids->ne[1], (int32_t)ids->ne[0], experts);
    free(experts);
}

/* The distinct experts, in the order in which they are met; `place` maps an expert to its place there. */
static int collect(nx_extent *e, const gx_tensor *ids, int64_t n_experts, int32_t *place, int32_t *experts,
                   size_t *n) {
    memset(place, 0xff, (size_t)n_experts * sizeof *place);
    *n = 0;
    for (int64_t t = 0; t < ids->ne[1]; t++)
        for (int64_t k = 0; k < ids->ne[0]; k++) {
            const int32_t id = picked(ids, t, k);
            if (id < 0 || id >= n_experts) return bad_id(e, id, (uint64_t)n_experts);
            if (place[id] >= 0) continue;
            place[id] = (int32_t)*n;
            experts[(*n)++] = id;
        }
    return GX_SUCCESS;
}

/* -- with a cache ------------------------------------------------------------------------------- */

void nxb_experts_release(nxb_run *r) {
    nxb_decision *d = &r->decision;
    if (d->group) nx_experts_release(d->group, d->experts, d->n_held);
    d->group = NULL;
}

/* Hold what the cache has slots for. */
static int hold(nxb_run *r, nx_group *group, const gx_tensor *ids, const int32_t *experts, size_t n) {
    nxb_decision *d = &r->decision;
    int32_t *kept = realloc(d->experts, n * sizeof *kept);
    if (!kept) return GX_ALLOC_FAILED;
    d->experts = kept;
    memcpy(kept, experts, n * sizeof *kept);
    d->n = n;
    d->n_held = n <= nx_group_slots(group) ? n : nx_experts_favour(group, kept, n);
    const nx_status status = nx_experts_acquire(group, kept, d->n_held);
    if (status != NX_OK) return nxb_status(status);
    d->group = group;
    d->ids = ids;
    return GX_SUCCESS;
}

/* -- without: waves ----------------------------------------------------------------------------- */

static int no_scratch(nx_extent *e, uint64_t record_bytes) {
    nx_error error;
    nx_error_set(&error, NX_E_NOMEM, 0, "the scratch area cannot hold one expert of %llu bytes of %s",
                 (unsigned long long)record_bytes, e->name);
    nx_model_fail(e->model, &error);
    return GX_ALLOC_FAILED;
}

/* One product in waves. The delegate gets the rows of the batch that go to the experts of a wave as a batch
 * of its own, of one expert a row. */
typedef struct waves {
    nxb_run *run;
    int node_index;
    const gx_tensor *node, *x, *ids;
    nx_extent *extent;
    uint64_t record_bytes;
    const int32_t *experts; /* distinct */
    int32_t *place;         /* expert -> where it stands in `experts` */
    uint64_t *offsets;
    int32_t *numbers;   /* [rows] where the expert of a row is */
    int64_t (*rows)[2]; /* [rows] token, k */
    char *in, *out;     /* [rows] of x and of the result */
} waves;

static void place_experts(waves *w, size_t first, size_t end) {
    for (size_t i = first; i < end; i++) {
        w->place[w->experts[i]] = (int32_t)i;
        w->offsets[i] = (uint64_t)w->experts[i] * w->record_bytes;
    }
}

static size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Kept from product to product: fresh memory costs as much as a tenth of the computing. */
static char *wave_memory(nxb_backend *own, size_t bytes) {
    if (bytes <= own->wave_bytes) return own->wave_memory;
    free(own->wave_memory);
    own->wave_bytes = 0;
    if (posix_memalign(&own->wave_memory, 64, bytes) != 0) own->wave_memory = NULL;
    if (own->wave_memory) own->wave_bytes = bytes;
    return own->wave_memory;
}

static int waves_init(waves *w, nxb_run *r, const nxb_use *use, const int32_t *experts, size_t n) {
    nx_extent *e = use->extent;
    const gx_tensor *node = r->nodes[use->node];
    *w = (waves){.run = r, .node_index = use->node, .node = node, .x = node->src[1], .ids = node->src[2], .extent = e,
                 .record_bytes = e->nbytes / (uint64_t)node->src[0]->ne[2], .experts = experts};
    const size_t n_picked = (size_t)(w->ids->ne[0] * w->ids->ne[1]);
    const struct {
        void *to; /* a pointer */
        size_t bytes;
    } parts[] = {{&w->place, (size_t)node->src[0]->ne[2] * sizeof *w->place},
                 {&w->offsets, n * sizeof *w->offsets},
                 {&w->numbers, n_picked * sizeof *w->numbers},
                 {&w->rows, n_picked * sizeof *w->rows},
                 {&w->in, n_picked * (size_t)w->x->ne[0] * w->x->nb[0]},
                 {&w->out, n_picked * (size_t)node->ne[0] * node->nb[0]}};
    const size_t n_parts = sizeof parts / sizeof *parts;
    size_t bytes = 0;
    for (size_t i = 0; i < n_parts; i++) bytes += aligned(parts[i].bytes);
    char *at = wave_memory(r->own, bytes);
    if (!at) return GX_ALLOC_FAILED;
    for (size_t i = 0; i < n_parts; at += aligned(parts[i++].bytes)) memcpy(parts[i].to, &at, sizeof at);
    place_experts(w, 0, n);
    return GX_SUCCESS;
}

/* Experts [first, first + count) of the list, which are at `base`: by their order, or by their slots. */
typedef struct wave {
    size_t first, count;
    const nx_group *slots; /* NULL: by their order */
    void *base;
    uint64_t stride;
} wave;

/* Where the expert is that takes pick k of the token; -1: not in this wave. */
static int32_t number_in(const wave *v, const waves *w, int64_t token, int64_t k) {
    const int32_t expert = picked(w->ids, token, k);
    const size_t at = (size_t)w->place[expert];
    if (at < v->first || at >= v->first + v->count) return -1;
    return v->slots ? nx_expert_slot(v->slots, expert) : (int32_t)(at - v->first);
}

/* The batch as it is, with numbers for some picks only, where kernels of ours compute that. */
static bool in_place(const waves *w, const wave *v, gx_tensor *weight, gx_tensor *numbers, gx_tensor *result) {
    const gx_tensor *ids = w->ids;
    *numbers = *ids;
    numbers->data = w->numbers;
    numbers->nb[0] = sizeof *w->numbers;
    numbers->nb[1] = (size_t)ids->ne[0] * sizeof *w->numbers;
    numbers->nb[2] = numbers->nb[3] = (size_t)ids->ne[1] * numbers->nb[1];
    *result = *w->node;
    result->src[0] = weight;
    result->src[2] = numbers;
    int64_t n_rows = 0;
    for (int64_t t = 0; t < ids->ne[1]; t++)
        for (int64_t k = 0; k < ids->ne[0]; k++) {
            const int32_t number = number_in(v, w, t, k);
            w->numbers[t * ids->ne[0] + k] = number;
            n_rows += number >= 0;
        }
    return nxb_products_some(result, n_rows, (int64_t)v->count);
}

/* The rows of the wave, gathered. */
static int64_t gather(waves *w, const wave *v, gx_tensor *input, gx_tensor *numbers, gx_tensor *result) {
    const gx_tensor *node = w->node, *x = w->x, *ids = w->ids;
    const size_t in_bytes = (size_t)x->ne[0] * x->nb[0], out_bytes = (size_t)node->ne[0] * node->nb[0];
    int64_t n_rows = 0;
    for (int64_t t = 0; t < ids->ne[1]; t++)
        for (int64_t k = 0; k < ids->ne[0]; k++) {
            const int32_t number = number_in(v, w, t, k);
            if (number < 0) continue;
            /* x has one row for all k, or one for each. */
            memcpy(w->in + (size_t)n_rows * in_bytes,
                   (const char *)x->data + (size_t)(k % x->ne[1]) * x->nb[1] + (size_t)t * x->nb[2], in_bytes);
            w->numbers[n_rows] = number;
            w->rows[n_rows][0] = t;
            w->rows[n_rows++][1] = k;
        }
    *input = *x;
    input->data = w->in;
    input->ne[1] = 1;
    input->ne[2] = n_rows;
    input->nb[1] = input->nb[2] = in_bytes;
    input->nb[3] = in_bytes * (size_t)n_rows;
    numbers->ne[0] = 1;
    numbers->ne[1] = n_rows;
    numbers->nb[0] = numbers->nb[1] = sizeof *w->numbers;
    numbers->nb[2] = numbers->nb[3] = sizeof *w->numbers * (size_t)n_rows;
    result->src[1] = input;
    result->data = w->out;
    result->ne[1] = 1;
    result->ne[2] = n_rows;
    result->nb[1] = result->nb[2] = out_bytes;
    result->nb[3] = out_bytes * (size_t)n_rows;
    return n_rows;
}

static int compute_wave(waves *w, wave v) {
    const gx_tensor *node = w->node;
    gx_tensor weight = *node->src[0], input, numbers, result;
    weight.data = v.base;
    weight.ne[2] = (int64_t)(v.slots ? nx_group_slots(v.slots) : v.count);
    weight.nb[2] = v.stride;
    weight.nb[3] = v.stride * (uint64_t)weight.ne[2];
    if (in_place(w, &v, &weight, &numbers, &result))
        return nxb_ours_product_as(w->run, w->node_index, &result, 1, false);
    const int64_t n_rows = gather(w, &v, &input, &numbers, &result);
    const int status = nxb_ours_product_as(w->run, w->node_index, &result, 1, false);
    const size_t out_bytes = result.nb[1];
    for (int64_t i = 0; i < n_rows && status == GX_SUCCESS; i++)
        memcpy((char *)node->data + (size_t)w->rows[i][0] * node->nb[2] + (size_t)w->rows[i][1] * node->nb[1],
               w->out + (size_t)i * out_bytes, out_bytes);
    return status;
}

/* With experts of the decision that the cache holds. */
static int records_wave(waves *w, uint32_t part, size_t first, size_t count) {
    const nxb_decision *d = &w->run->decision;
    wave v = {.first = first, .count = count, .slots = d->group};
    v.base = nx_group_part(d->group, part, &v.stride);
    return compute_wave(w, v);
}

/* A scratch area that has room for one expert only. */
static int one_by_one(waves *w, size_t begin, size_t end) {
    int status = GX_SUCCESS;
    for (size_t i = begin; i < end && status == GX_SUCCESS; i++) {
        wave v = {.first = i, .count = 1};
        status = nxb_status(nx_fetch(w->extent->model, w->extent, &w->offsets[i], 1, w->record_bytes, &v.base, &v.stride));
        if (status == GX_SUCCESS) status = compute_wave(w, v);
    }
    return status;
}

static size_t wave_size(size_t first, size_t end, size_t most) { return end - first < most ? end - first : most; }

/* Experts [begin, end) of the list from the files; before, those that are held. */
static int in_halves(waves *w, size_t begin, size_t end, size_t most, uint32_t part) {
    nx_model *m = w->extent->model;
    /* Both halves are wanted also where one could hold all: the first is computed with early. */
    const size_t share = (end - begin + 1) / 2;
    if (most > share) most = share;
    int status = GX_SUCCESS;
    size_t next = begin;
    for (unsigned half = 0; half < 2 && next < end && status == GX_SUCCESS; half++) {
        const size_t count = wave_size(next, end, most);
        status = nxb_status(nx_fetch_start(m, w->extent, half, w->offsets + next, count, w->record_bytes));
        next += count;
    }
    if (status == GX_SUCCESS && begin > 0) status = records_wave(w, part, 0, begin);
    unsigned half = 0;
    for (size_t first = begin; first < end && status == GX_SUCCESS; half = 1 - half) {
        wave v = {.first = first, .count = wave_size(first, end, most)};
        status = nxb_status(nx_fetch_wait(m, half, &v.base, &v.stride));
        if (status == GX_SUCCESS) status = compute_wave(w, v);
        first += v.count;
        if (status != GX_SUCCESS || next >= end) continue;
        const size_t more = wave_size(next, end, most);
        status = nxb_status(nx_fetch_start(m, w->extent, half, w->offsets + next, more, w->record_bytes));
        next += more;
    }
    nx_fetch_drop(m, 0); /* nothing is left to drop, but for errors */
    nx_fetch_drop(m, 1);
    return status;
}

/* The first n_held of the n experts are held by the cache as the decision of this run. */
static int run_waves(nxb_run *r, const nxb_use *use, uint32_t part, const int32_t *experts, size_t n, size_t n_held) {
    nx_extent *e = use->extent;
    waves w;
    int status = waves_init(&w, r, use, experts, n);
    const size_t most = nx_fetch_max(e->model, w.record_bytes);
    if (status == GX_SUCCESS && most == 0) status = no_scratch(e, w.record_bytes);
    if (status == GX_SUCCESS && n_held)
        status = nxb_status(nx_experts_wait(r->decision.group, part, experts, n_held));
    if (status == GX_SUCCESS && most > 1) {
        status = in_halves(&w, n_held, n, most / 2, part);
    } else if (status == GX_SUCCESS) {
        if (n_held) status = records_wave(&w, part, 0, n_held);
        if (status == GX_SUCCESS) status = one_by_one(&w, n_held, n);
    }
    return status;
}

/* -- with records -------------------------------------------------------------------------------- */

/* Compute `node` with the records that are held, which are all and are there. */
static int all_records(nxb_run *r, int node_index, uint32_t part, const gx_tensor *ids) {
    const nxb_decision *d = &r->decision;
    const gx_tensor *node = r->nodes[node_index];
    const int64_t n_picked = ids->ne[0] * ids->ne[1];
    int32_t *slots = malloc((size_t)n_picked * sizeof *slots);
    if (!slots) return GX_ALLOC_FAILED;
    for (int64_t t = 0; t < ids->ne[1]; t++)
        for (int64_t k = 0; k < ids->ne[0]; k++)
            slots[t * ids->ne[0] + k] = nx_expert_slot(d->group, picked(ids, t, k));
    gx_tensor weight = *node->src[0], numbers = *ids, result = *node;
    uint64_t stride;
    weight.data = nx_group_part(d->group, part, &stride);
    weight.nb[2] = stride;
    weight.ne[2] = nx_group_slots(d->group);
    weight.nb[3] = stride * (uint64_t)weight.ne[2];
    numbers.data = slots;
    numbers.nb[0] = sizeof *slots;
    numbers.nb[1] = (size_t)ids->ne[0] * sizeof *slots;
    numbers.nb[2] = numbers.nb[3] = (size_t)n_picked * sizeof *slots;
    result.src[0] = &weight;
    result.src[2] = &numbers;
    (void)nxb_products_some(&result, n_picked, (int64_t)d->n);
    const int status = nxb_ours_product_as(r, node_index, &result, 1, false);
    free(slots);
    return status;
}

/* The same while some are still being read: in the order in which they arrive. */
static int with_records(nxb_run *r, const nxb_use *use, uint32_t part, const gx_tensor *ids) {
    nxb_decision *d = &r->decision;
    size_t done = 0;
    nx_status ready = nx_experts_next(d->group, part, d->experts, d->n, &done);
    if (ready != NX_OK) return nxb_status(ready);
    if (done == d->n) return all_records(r, use->node, part, ids);
    waves w;
    int status = waves_init(&w, r, use, d->experts, d->n);
    for (size_t first = 0; status == GX_SUCCESS && first < d->n; first = done) {
        if (first == done) {
            status = nxb_status(nx_experts_next(d->group, part, d->experts, d->n, &done));
            place_experts(&w, first, d->n);
        }
        if (status == GX_SUCCESS) status = records_wave(&w, part, first, done - first);
    }
    return status;
}

/* -- one product -------------------------------------------------------------------------------- */

static int run_held(nxb_run *r, const nxb_use *use, uint32_t part, const gx_tensor *ids) {
    const nxb_decision *d = &r->decision;
    return d->n_held == d->n ? with_records(r, use, part, ids)
                             : run_waves(r, use, part, d->experts, d->n, d->n_held);
}

int nxb_run_experts(nxb_run *r, const nxb_use *use) {
    nx_extent *e = use->extent;
    const gx_tensor *ids = r->nodes[use->node]->src[2];
    const int64_t n_experts = use->weight->ne[2];
    int status = nxb_flush(r, use->node);
    if (status != GX_SUCCESS) return status;
    uint32_t part = 0;
    nx_group *group = nx_extent_group(e, &part);
    const nxb_decision *d = &r->decision;
    r->begin = use->node + 1;
    if (d->group && d->group == group && d->ids == ids) /* a later product of the same decision */
        return run_held(r, use, part, ids);
    nxb_experts_release(r);
    int32_t *place = malloc((size_t)n_experts * 2 * sizeof *place);
    if (!place) return GX_ALLOC_FAILED;
    int32_t *experts = place + n_experts;
    size_t n;
    status = collect(e, ids, n_experts, place, experts, &n);
    if (status == GX_SUCCESS) record(e, ids);
    if (status == GX_SUCCESS && group) status = hold(r, group, ids, experts, n);
    if (status == GX_SUCCESS) nxb_predict(r, use);
    if (status == GX_SUCCESS) status = group ? run_held(r, use, part, ids) : run_waves(r, use, part, experts, n, 0);
    free(place);
    return status;
}
