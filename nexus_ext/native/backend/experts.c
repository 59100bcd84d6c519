/* experts.c: products with experts that are not all in memory (MUL_MAT_ID).
 *
 * When the walk of graph.c reaches such a product the router has run: the numbers of the experts stand in
 * the graph. With a cache, the products of one router decision (same numbers, same group) share the
 * records, which are held from the first of them to the last. Without one, or when a batch picks more
 * experts than the cache has slots, each product reads its own part of the experts, as many at a time as
 * the scratch area holds ("waves"), each expert once.
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
    if (d->group) nx_experts_release(d->group, d->experts, d->n);
    d->group = NULL;
}

/* Compute `node` with the records that are held. */
static int with_records(nxb_run *r, int node_index, uint32_t part, const gx_tensor *ids) {
    const nxb_decision *d = &r->decision;
    const gx_tensor *node = r->nodes[node_index];
    const nx_status ready = nx_experts_wait(d->group, part, d->experts, d->n);
    if (ready != NX_OK) return nxb_status(ready);
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
    const int status = nxb_compute_as(r, node_index, &result, 1);
    free(slots);
    return status;
}

/* -- without: waves ----------------------------------------------------------------------------- */

static int no_scratch(nx_extent *e, uint64_t record_bytes) {
    nx_error error;
    nx_error_set(&error, NX_E_NOMEM, 0, "the scratch area cannot hold one expert of %llu bytes of %s",
                 (unsigned long long)record_bytes, e->name);
    nx_model_fail(e->model, &error);
    return GX_ALLOC_FAILED;
}

/* Rows of a batch that go to the experts of one wave, gathered into a batch of one expert a row. */
typedef struct wave {
    int32_t *numbers;     /* [n_rows] place of the expert in the scratch area */
    int64_t (*rows)[2];   /* [n_rows] token, k */
    char *in, *out;       /* [n_rows] rows of src[1] and of the result */
    int64_t n_rows;
} wave;

static int compute_wave(nxb_run *r, int node_index, wave *w, void *base, uint64_t stride, size_t n_experts) {
    const gx_tensor *node = r->nodes[node_index], *x = node->src[1], *ids = node->src[2];
    const size_t in_bytes = (size_t)x->ne[0] * x->nb[0], out_bytes = (size_t)node->ne[0] * node->nb[0];
    for (int64_t i = 0; i < w->n_rows; i++) /* src[1] has one row for all k, or one for each */
        memcpy(w->in + (size_t)i * in_bytes,
               (const char *)x->data + (size_t)(w->rows[i][1] % x->ne[1]) * x->nb[1] + (size_t)w->rows[i][0] * x->nb[2],
               in_bytes);
    gx_tensor weight = *node->src[0], input = *x, numbers = *ids, result = *node;
    weight.data = base;
    weight.ne[2] = (int64_t)n_experts;
    weight.nb[2] = stride;
    weight.nb[3] = stride * n_experts;
    input.data = w->in;
    input.ne[1] = 1;
    input.ne[2] = w->n_rows;
    input.nb[1] = input.nb[2] = in_bytes;
    input.nb[3] = in_bytes * (size_t)w->n_rows;
    numbers.data = w->numbers;
    numbers.ne[0] = 1;
    numbers.ne[1] = w->n_rows;
    numbers.nb[0] = numbers.nb[1] = sizeof *w->numbers;
    numbers.nb[2] = numbers.nb[3] = sizeof *w->numbers * (size_t)w->n_rows;
    result.src[0] = &weight;
    result.src[1] = &input;
    result.src[2] = &numbers;
    result.data = w->out;
    result.ne[1] = 1;
    result.ne[2] = w->n_rows;
    result.nb[1] = result.nb[2] = out_bytes;
    result.nb[3] = out_bytes * (size_t)w->n_rows;
    const int status = nxb_compute_as(r, node_index, &result, 1);
    for (int64_t i = 0; i < w->n_rows && status == GX_SUCCESS; i++)
        memcpy((char *)node->data + (size_t)w->rows[i][1] * node->nb[1] + (size_t)w->rows[i][0] * node->nb[2],
               w->out + (size_t)i * out_bytes, out_bytes);
    return status;
}

static int run_waves(nxb_run *r, int node_index, nx_extent *e, const int32_t *place, const int32_t *experts,
                     size_t n) {
    const gx_tensor *node = r->nodes[node_index], *x = node->src[1], *ids = node->src[2];
    const uint64_t record_bytes = e->nbytes / (uint64_t)node->src[0]->ne[2];
    const size_t most = nx_fetch_max(e->model, record_bytes);
    if (most == 0) return no_scratch(e, record_bytes);
    const size_t n_picked = (size_t)(ids->ne[0] * ids->ne[1]);
    uint64_t *offsets = malloc(n * sizeof *offsets);
    wave w = {.numbers = malloc(n_picked * sizeof *w.numbers), .rows = malloc(n_picked * sizeof *w.rows),
              .in = malloc(n_picked * (size_t)x->ne[0] * x->nb[0]),
              .out = malloc(n_picked * (size_t)node->ne[0] * node->nb[0])};
    int status = offsets && w.numbers && w.rows && w.in && w.out ? GX_SUCCESS : GX_ALLOC_FAILED;
    for (size_t first = 0; first < n && status == GX_SUCCESS; first += most) {
        const size_t count = n - first < most ? n - first : most;
        for (size_t i = 0; i < count; i++) offsets[i] = (uint64_t)experts[first + i] * record_bytes;
        void *base;
        uint64_t stride;
        status = nxb_status(nx_fetch(e->model, e, offsets, count, record_bytes, &base, &stride));
        w.n_rows = 0;
        for (int64_t t = 0; t < ids->ne[1] && status == GX_SUCCESS; t++)
            for (int64_t k = 0; k < ids->ne[0]; k++) {
                const int32_t at = place[picked(ids, t, k)] - (int32_t)first;
                if (at < 0 || at >= (int32_t)count) continue;
                w.numbers[w.n_rows] = at;
                w.rows[w.n_rows][0] = t;
                w.rows[w.n_rows++][1] = k;
            }
        if (status == GX_SUCCESS) status = compute_wave(r, node_index, &w, base, stride, count);
    }
    free(offsets);
    free(w.numbers);
    free(w.rows);
    free(w.in);
    free(w.out);
    return status;
}

/* -- one product -------------------------------------------------------------------------------- */

int nxb_run_experts(nxb_run *r, const nxb_use *use) {
    nx_extent *e = use->extent;
    const gx_tensor *node = r->nodes[use->node], *ids = node->src[2];
    const int64_t n_experts = use->weight->ne[2];
    int status = nxb_flush(r, use->node);
    if (status != GX_SUCCESS) return status;
    uint32_t part = 0;
    nx_group *group = nx_extent_group(e, &part);
    nxb_decision *d = &r->decision;
    if (d->group && d->group == group && d->ids == ids) { /* a later product of the same decision */
        status = with_records(r, use->node, part, ids);
        r->begin = use->node + 1;
        return status;
    }
    nxb_experts_release(r);
    int32_t *place = malloc((size_t)n_experts * 2 * sizeof *place);
    if (!place) return GX_ALLOC_FAILED;
    int32_t *experts = place + n_experts;
    size_t n;
    status = collect(e, ids, n_experts, place, experts, &n);
    if (status == GX_SUCCESS && group && n <= nx_group_slots(group)) {
        int32_t *kept = realloc(d->experts, n * sizeof *kept);
        if (kept) {
            d->experts = kept;
            memcpy(kept, experts, n * sizeof *kept);
            status = nxb_status(nx_experts_acquire(group, kept, n));
            if (status == GX_SUCCESS) {
                d->group = group;
                d->ids = ids;
                d->n = n;
                status = with_records(r, use->node, part, ids);
            }
        } else {
            status = GX_ALLOC_FAILED;
        }
    } else if (status == GX_SUCCESS) {
        status = run_waves(r, use->node, e, place, experts, n);
    }
    free(place);
    r->begin = use->node + 1;
    return status;
}
