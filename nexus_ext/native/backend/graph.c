/* graph.c: compute a graph whose weights are not all in memory.
 *
 * The nodes are walked in order. A node that needs no paged weight joins the current segment. A matrix
 * product with a streamed weight takes its slabs as they arrive: one slab that is the whole matrix is
 * simply put in place (tensor->data) and joins the segment; a matrix in several slabs becomes one product
 * for each slab, over the same rows of the result. When a slab is not there yet, what is ready is
 * computed first, its slabs are released (so that reading goes on), and only then do we wait.
 * Rows (GET_ROWS) and experts (MUL_MAT_ID) are fetched by the numbers that the graph has computed by then.
 *
 * Everything is computed by the CPU backend with the same kernels on the same bytes, so results are bit
 * by bit those of an unmodified run.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nexus_predict.h"
#include "nexus_residency.h"
#include "walk.h"

#define MAX_BATCH 16 /* slabs in one call of the delegate */

typedef nxb_run run;

/* -- what the graph needs ----------------------------------------------------------------------- */

static bool is_empty(const gx_tensor *t) { return !t->ne[0] || !t->ne[1] || !t->ne[2] || !t->ne[3]; }

static bool is_computed(const gx_tensor *t) {
    const int32_t op = t->op;
    if (op == gx.op_none || op == gx.op_view || op == gx.op_reshape || op == gx.op_permute || op == gx.op_transpose)
        return false;
    return !is_empty(t) && (!gx.flag_compute || (t->flags & gx.flag_compute));
}

static nxb_use_kind kind_of(const gx_tensor *node, int source, const gx_tensor *weight) {
    if (source != 0 || node->src[0] != weight) return USE_WHOLE; /* a view, or not the matrix of a product */
    const bool plane = weight->ne[2] == 1 && weight->ne[3] == 1;
    if (node->op == gx.op_mul_mat && plane) return USE_SLABS;
    const gx_tensor *ids = node->src[1];
    if (node->op == gx.op_get_rows && plane && ids->type == gx.type_i32 && ids->nb[0] == 4 && ids->ne[1] == 1 &&
        ids->ne[2] == 1 && ids->ne[3] == 1)
        return USE_ROWS;
    if (node->op == gx.op_mul_mat_id && weight->ne[3] == 1) return USE_EXPERTS;
    return USE_WHOLE;
}

static int add_use(nxb_backend *own, size_t *n, nxb_use use) {
    if (*n == own->uses_capacity) {
        const size_t capacity = own->uses_capacity ? 2 * own->uses_capacity : 512;
        nxb_use *uses = realloc(own->uses, capacity * sizeof *uses);
        if (!uses) return GX_ALLOC_FAILED;
        own->uses = uses;
        own->uses_capacity = capacity;
    }
    own->uses[(*n)++] = use;
    return GX_SUCCESS;
}

static int add_model(run *r, nx_model *m) {
    for (size_t i = 0; i < r->n_models; i++)
        if (r->models[i] == m) return GX_SUCCESS;
    if (r->n_models == NXB_MAX_MODELS) return GX_FAILED;
    /* Sorted, so that two graphs that use the same two models take their turns in the same order. */
    size_t at = r->n_models++;
    for (; at > 0 && r->models[at - 1] > m; at--) {
        r->models[at] = r->models[at - 1];
        r->generation[at] = r->generation[at - 1];
    }
    r->models[at] = m;
    r->generation[at] = nx_residency_generation(m);
    /* At once, but for the first graph. Before anybody asks what the load has attached to a weight. */
    const nx_status loaded = nx_model_finish_load(m, NULL, NULL);
    return loaded == NX_OK ? GX_SUCCESS : nxb_status(loaded);
}

static int find_uses(run *r, size_t *n_uses) {
    const int n_nodes = gx.graph_n_nodes(r->graph);
    for (int i = 0; i < n_nodes; i++) {
        const gx_tensor *node = r->nodes[i];
        if (!is_computed(node)) continue;
        for (int s = 0; s < GX_MAX_SRC && node->src[s]; s++) {
            gx_tensor *weight = node->src[s]->view_src ? node->src[s]->view_src : node->src[s];
            nx_extent *e = nxb_extent(weight);
            if (!e) continue;
            nxb_mark_computing(weight);
            int status = add_model(r, e->model);
            if (status == GX_SUCCESS && (nx_extent_attached(e) || nx_extent_own_type(e) != NX_TERNARY_TYPES))
                status = nxb_ours_note(r->own, i, node, s, e);
            if (status == GX_SUCCESS && nx_extent_tier(e) == NX_TIER_NVME)
                status = add_use(r->own, n_uses,
                                 (nxb_use){.node = i, .kind = kind_of(node, s, weight), .extent = e, .weight = weight});
            if (status != GX_SUCCESS) return status;
        }
    }
    return GX_SUCCESS;
}

/* -- computing ---------------------------------------------------------------------------------- */

void nxb_reads_go_on(nxb_backend *own) {
    for (size_t i = 0; own->computing && i < own->computing->n_models; i++)
        (void)nx_reads_go_on(own->computing->models[i]);
}

static int stop_asked(void *ctx) {
    nxb_backend *own = ctx;
    return nx_interrupted() || (own->abort && own->abort(own->abort_ctx));
}

int nxb_status(nx_status status) {
    switch (status) {
    case NX_OK: return GX_SUCCESS;
    case NX_E_ABORTED: return GX_ABORTED;
    case NX_E_NOMEM: return GX_ALLOC_FAILED;
    default: return GX_FAILED;
    }
}

static int compute(run *r, gx_graph *graph, int first_node) {
    const int idle = r->n_models ? nx_reads_go_on(r->models[0]) : 0;
    const uint64_t begin = nx_now_ns();
    r->own->computing = r;
    const int status = gx.backend_graph_compute_async(r->own->cpu, graph);
    r->own->computing = NULL;
    if (r->n_models) nx_note_compute(r->models[0], (uint32_t)first_node, nx_now_ns() - begin);
    if (idle) nx_note_idle(r->models[0], nx_now_ns() - begin);
    if (!r->own->failure.failed) return status;
    r->own->failure.failed = false;
    if (r->n_models) nx_model_fail(r->models[0], &r->own->failure.error);
    return status == GX_SUCCESS ? GX_FAILED : status;
}

static size_t model_index(const run *r, const nx_model *m) {
    size_t i = 0;
    while (r->models[i] != m) i++;
    return i;
}

static void release_held(run *r) {
    /* A weight without its slab points at memory that faults, not at somebody else's bytes. */
    while (r->n_placed) { /* backwards: a weight that was placed twice goes home */
        r->n_placed--;
        r->placed[r->n_placed]->data = r->placed_home[r->n_placed];
    }
    for (size_t i = 0; i < r->n_models; i++) {
        if (r->held[i]) nx_piece_release(r->models[i], r->held[i]);
        r->held[i] = 0;
        r->held_bytes[i] = 0;
    }
}

static int replace_products(run *r, gx_graph_value *view) {
    gx_tensor **const before = gx.graph_nodes((gx_graph *)view), **nodes = before;
    int n = gx.graph_n_nodes((gx_graph *)view);
    const int status = nxb_products_replace(r->own, &nodes, &n);
    if (status != GX_SUCCESS || nodes == before) return status;
    memcpy((char *)view + gx.view_n_nodes, &n, sizeof n);
    memcpy((char *)view + gx.view_nodes, &nodes, sizeof nodes);
    return GX_SUCCESS;
}

int nxb_flush(run *r, int end) {
    int status = GX_SUCCESS;
    bool any = false;
    for (int i = r->begin; i < end && !any; i++) any = is_computed(r->nodes[i]);
    if (any) {
        gx_graph_value view = gx.graph_view(r->graph, r->begin, end);
        status = nxb_ours_insert(r, &view, r->begin, end);
        if (status == GX_SUCCESS) status = replace_products(r, &view);
        if (status == GX_SUCCESS) status = compute(r, (gx_graph *)&view, r->begin);
    }
    r->begin = end;
    release_held(r);
    return status;
}

int nxb_compute_as(run *r, int node, gx_tensor *as, size_t n) {
    gx_tensor *list[MAX_BATCH], **nodes = list;
    int n_nodes = (int)n;
    for (size_t i = 0; i < n; i++) list[i] = &as[i];
    const int status = nxb_products_replace(r->own, &nodes, &n_nodes);
    if (status != GX_SUCCESS) return status;
    gx.graph_clear(r->own->graph);
    for (int i = 0; i < n_nodes; i++) gx.graph_add_node(r->own->graph, nodes[i]);
    return compute(r, r->own->graph, node);
}

/* -- slabs -------------------------------------------------------------------------------------- */

/* The product of some rows of `node`'s weight: the same rows of its result. */
static void slab_product(const gx_tensor *node, const nx_piece *piece, gx_tensor *weight, gx_tensor *product) {
    *weight = *node->src[0];
    weight->ne[1] = (int64_t)piece->n_rows;
    weight->nb[2] = weight->nb[3] = weight->nb[1] * piece->n_rows;
    weight->data = piece->data;
    *product = *node;
    product->src[0] = weight;
    product->ne[0] = (int64_t)piece->n_rows;
    product->data = (char *)node->data + piece->row * node->nb[0];
}

static int run_slabs(run *r, const nxb_use *use) {
    nx_model *m = use->extent->model;
    const gx_tensor *node = r->nodes[use->node];
    int status = nxb_flush(r, use->node);
    gx_tensor weights[MAX_BATCH], products[MAX_BATCH];
    for (uint32_t done = 0; done < use->extent->n_pieces && status == GX_SUCCESS;) {
        uint64_t bytes = 0;
        size_t n = 0;
        while (n < MAX_BATCH && done + n < use->extent->n_pieces) {
            if (n && (bytes > nx_ring_share(m) || !nx_piece_ready(m))) break;
            nx_piece piece;
            const nx_status acquired = nx_piece_acquire(m, &piece);
            if (acquired == NX_E_BUSY && n) break;
            if (acquired != NX_OK) {
                nx_piece_release(m, n);
                return nxb_status(acquired);
            }
            slab_product(node, &piece, &weights[n], &products[n]);
            bytes += piece.nbytes;
            n++;
        }
        status = nxb_ours_product_as(r, use->node, products, n, done > 0);
        nx_piece_release(m, n);
        done += (uint32_t)n;
    }
    r->begin = use->node + 1;
    return status == GX_SUCCESS ? nxb_ours_after(r, use->node) : status;
}

/* A matrix that is one slab: put in place, computed with the segment. */
static int place_slab(run *r, const nxb_use *use) {
    nx_model *m = use->extent->model;
    const size_t k = model_index(r, m);
    if (r->held_bytes[k] > nx_ring_share(m) || r->n_placed == sizeof r->placed / sizeof *r->placed ||
        !nx_piece_ready(m)) {
        const int status = nxb_flush(r, use->node);
        if (status != GX_SUCCESS) return status;
    }
    nx_piece piece;
    nx_status acquired = nx_piece_acquire(m, &piece);
    if (acquired == NX_E_BUSY) { /* the ring holds less than our share of it suggests */
        const int status = nxb_flush(r, use->node);
        if (status != GX_SUCCESS) return status;
        acquired = nx_piece_acquire(m, &piece);
    }
    if (acquired != NX_OK) return nxb_status(acquired);
    r->placed[r->n_placed] = use->weight;
    r->placed_home[r->n_placed++] = use->weight->data;
    use->weight->data = piece.data;
    r->held[k]++;
    r->held_bytes[k] += piece.nbytes;
    return GX_SUCCESS;
}

/* -- rows --------------------------------------------------------------------------- */

static int bad_id(nx_extent *e, int64_t id, uint64_t limit) {
    nx_error error;
    nx_error_set(&error, NX_E_INVALID, 0, "the graph asks for entry %lld of %s, which has %llu", (long long)id,
                 e->name, (unsigned long long)limit);
    nx_model_fail(e->model, &error);
    return GX_FAILED;
}

static int no_scratch(nx_extent *e, uint64_t n, uint64_t record_bytes) {
    nx_error error;
    nx_error_set(&error, NX_E_NOMEM, 0, "the scratch area cannot hold %llu records of %llu bytes of %s",
                 (unsigned long long)n, (unsigned long long)record_bytes, e->name);
    nx_model_fail(e->model, &error);
    return GX_ALLOC_FAILED;
}

#define ROWS_AT_ONCE 64

static int run_rows(run *r, const nxb_use *use) {
    nx_extent *e = use->extent;
    const gx_tensor *node = r->nodes[use->node], *ids = node->src[1];
    int status = nxb_flush(r, use->node);
    size_t most = nx_fetch_max(e->model, e->row_bytes);
    if (most > ROWS_AT_ONCE) most = ROWS_AT_ONCE;
    if (most == 0) return no_scratch(e, 1, e->row_bytes);
    for (int64_t at = 0; at < ids->ne[0] && status == GX_SUCCESS;) {
        int32_t slots[ROWS_AT_ONCE], rows[ROWS_AT_ONCE];
        uint64_t offsets[ROWS_AT_ONCE];
        size_t n = 0, n_rows = 0;
        for (; n < most && at + (int64_t)n < ids->ne[0]; n++) {
            const int32_t id = ((const int32_t *)ids->data)[at + (int64_t)n];
            if (id < 0 || id >= use->weight->ne[1]) return bad_id(e, id, (uint64_t)use->weight->ne[1]);
            size_t k = 0;
            while (k < n_rows && rows[k] != id) k++; /* a prompt repeats its tokens: read each row once */
            if (k == n_rows) {
                rows[n_rows] = id;
                offsets[n_rows++] = (uint64_t)id * e->row_bytes;
            }
            slots[n] = (int32_t)k;
        }
        void *base;
        uint64_t stride;
        const nx_status fetched = nx_fetch(e->model, e, offsets, n_rows, e->row_bytes, &base, &stride);
        if (fetched != NX_OK) return nxb_status(fetched);
        gx_tensor weight = *use->weight, numbers = *ids, result = *node;
        weight.data = base;
        weight.ne[1] = (int64_t)n_rows;
        weight.nb[1] = stride;
        weight.nb[2] = weight.nb[3] = stride * n_rows;
        numbers.data = slots;
        numbers.ne[0] = (int64_t)n;
        numbers.nb[1] = numbers.nb[2] = numbers.nb[3] = n * sizeof *slots;
        result.src[0] = &weight;
        result.src[1] = &numbers;
        result.ne[1] = (int64_t)n;
        result.data = (char *)node->data + (size_t)at * node->nb[1];
        status = nxb_compute_as(r, use->node, &result, 1);
        at += (int64_t)n;
    }
    r->begin = use->node + 1;
    return status;
}

/* An operation that we cannot cut: the whole tensor, in memory of its own, for this node alone. */
static int run_whole(run *r, const nxb_use *use) {
    int status = nxb_flush(r, use->node);
    void *data;
    const nx_status fetched = status == GX_SUCCESS ? nx_whole_fetch(use->extent->model, use->extent, &data) : NX_OK;
    if (status != GX_SUCCESS || fetched != NX_OK) return status != GX_SUCCESS ? status : nxb_status(fetched);
    gx_tensor *node = r->nodes[use->node];
    gx_tensor *original[GX_MAX_SRC], copies[GX_MAX_SRC];
    memcpy(original, node->src, sizeof original);
    for (int s = 0; s < GX_MAX_SRC && node->src[s]; s++) {
        gx_tensor *source = node->src[s];
        if (source != use->weight && source->view_src != use->weight) continue;
        copies[s] = *source;
        copies[s].data = (char *)data + (source == use->weight ? 0 : source->view_offs);
        node->src[s] = &copies[s];
    }
    status = nxb_flush(r, use->node + 1);
    memcpy(node->src, original, sizeof original);
    nx_whole_free(use->extent, data);
    return status;
}

/* -- the walk ----------------------------------------------------------------------------------- */

static int begin_turns(run *r, size_t n_uses, size_t *begun) {
    const nxb_use *uses = r->own->uses;
    nx_extent **order = malloc((n_uses ? n_uses : 1) * sizeof *order);
    if (!order) return GX_ALLOC_FAILED;
    int status = GX_SUCCESS;
    for (*begun = 0; *begun < r->n_models; ++*begun) {
        nx_model *m = r->models[*begun];
        size_t n = 0;
        for (size_t i = 0; i < n_uses; i++)
            if (uses[i].kind == USE_SLABS && uses[i].extent->model == m) order[n++] = uses[i].extent;
        nx_status done = NX_OK;
        nx_error before;
        nx_model_last_error(m, &before);
        /* A plan for another file, or weights that were written to: no later graph can be right. */
        if (done == NX_OK && (before.status == NX_E_INVALID || before.status == NX_E_UNSUPPORTED)) done = before.status;
        if (done == NX_OK) done = nx_turn_begin(m, order, n, stop_asked, r->own);
        if (done != NX_OK) {
            status = nxb_status(done);
            break;
        }
    }
    free(order);
    return status;
}

static int walk(run *r, size_t n_uses) {
    int status = GX_SUCCESS;
    for (size_t i = 0; i < n_uses && status == GX_SUCCESS; i++) {
        const nxb_use *use = &r->own->uses[i];
        switch (use->kind) {
        case USE_SLABS: status = use->extent->n_pieces == 1 ? place_slab(r, use) : run_slabs(r, use); break;
        case USE_ROWS: status = run_rows(r, use); break;
        case USE_EXPERTS: status = nxb_run_experts(r, use); break;
        case USE_WHOLE: status = run_whole(r, use); break;
        }
    }
    return status == GX_SUCCESS ? nxb_flush(r, gx.graph_n_nodes(r->graph)) : status;
}

/* Whether a weight has come or gone between the look at the graph and the turns, which keep it from doing so. */
static bool is_stale(const run *r) {
    for (size_t i = 0; i < r->n_models; i++)
        if (nx_residency_generation(r->models[i]) != r->generation[i]) return true;
    return false;
}

static int begin_graph(run *r, size_t *n_uses, size_t *begun) {
    for (;;) {
        r->n_models = *n_uses = *begun = 0;
        nxb_ours_clear(r->own);
        int status = find_uses(r, n_uses);
        r->n_uses = *n_uses;
        if (status == GX_SUCCESS && r->n_models) status = begin_turns(r, *n_uses, begun);
        if (status != GX_SUCCESS || !is_stale(r)) return status;
        while (*begun) nx_turn_end(r->models[--*begun], 1);
    }
}

int nxb_graph_compute(gx_backend *backend, gx_graph *graph) {
    nxb_backend *own = backend->context;
    run r = {.own = own, .graph = graph, .nodes = gx.graph_nodes(graph)};
    size_t n_uses = 0, begun = 0;
    const uint64_t begin = nx_now_ns();
    int status = begin_graph(&r, &n_uses, &begun);
    if (status == GX_SUCCESS && r.n_models == 0) return gx.backend_graph_compute_async(own->cpu, graph);
    if (status == GX_SUCCESS) status = nxb_pin_begin(&r);
    if (status == GX_SUCCESS) status = nxb_columns_begin(&r);
    if (status == GX_SUCCESS) status = walk(&r, n_uses);
    release_held(&r);
    nxb_columns_end(&r);
    nxb_pin_end(&r);
    nxb_experts_release(&r);
    free(r.decision.experts);
    for (size_t i = 0; i < begun; i++) {
        if (i == 0) nx_note_pass(r.models[0], nx_now_ns() - begin);
        if (i == 0 && r.decides && !r.decides_for_many && status == GX_SUCCESS) nx_predict_pass(r.models[0], nx_now_ns() - begin);
        nx_turn_end(r.models[i], status != GX_SUCCESS);
    }
    return status;
}
