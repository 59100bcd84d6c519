/* ours.c: operations of our own in the middle of a graph, run by the delegate's threads.
 *
 * A node that multiplies by a weight with an attachment gets company, or is replaced, by nodes of the kind
 * that ggml has for custom functions, in the list of nodes that the delegate walks. They run on the
 * delegate's own threads, with its barriers between them; there is no second pool beside it and no segment
 * is cut. The list belongs to a view of the graph, so the graph of the caller stays as it is.
 *
 *   few bits:       see ours_ternary.c
 *   a plugin's:     see ours_plugin.c
 *   residual:       what computes the product; choose (channels, by one thread); add (outputs, by all)
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ours.h"

/* Where a custom node keeps its function, its number of tasks (-1: one for each thread) and what it gets. */
typedef struct custom_params {
    nxb_custom_function function;
    int n_tasks;
    void *argument;
} custom_params;

static bool grow(void **memory, size_t *capacity, size_t wanted, size_t item_bytes) {
    if (wanted <= *capacity) return true;
    size_t to = *capacity ? *capacity : 64;
    while (to < wanted) to *= 2;
    void *grown = realloc(*memory, to * item_bytes);
    if (!grown) return false;
    *memory = grown;
    *capacity = to;
    return true;
}

static nxb_ours *ours_of(nxb_backend *own) {
    if (!own->ours) own->ours = calloc(1, sizeof *own->ours);
    if (own->ours) own->ours->failure = &own->failure;
    return own->ours;
}

void nxb_ours_clear(nxb_backend *own) {
    if (own->ours) own->ours->n_noted = 0;
}

void nxb_ours_free(nxb_backend *own) {
    nxb_ours *ours = own->ours;
    if (!ours) return;
    free(ours->noted);
    free(ours->nodes);
    free(ours->tensors);
    free(ours->jobs);
    free(ours->channels);
    free(ours->products);
    free(ours->sums);
    nxb_ternary_free(ours);
    free(ours);
    own->ours = NULL;
}

/* Whether the weight is packed, or on a device. */
static bool has_copy(const nx_attachment *a) { return a && (a->packed.codes || a->opencl); }

/* How we multiply by this weight as it is stored, if at all. */
static nx_ternary_type own_type(const nx_extent *e) {
    return gx.op_custom < 0 || !gx.view_nodes ? NX_TERNARY_TYPES : nx_extent_own_type(e);
}

int nxb_ours_note(nxb_backend *own, int number, const gx_tensor *node, int source, nx_extent *e) {
    nxb_ours *ours = ours_of(own);
    const bool in_place = source == 0 && nxb_extent(node->src[0]) == e, product = in_place && nxb_is_product(node);
    const nx_attachment *attached = product ? nx_extent_attached(e) : NULL;
    nx_ternary_type stored = NX_TERNARY_TYPES;
    if ((product && !has_copy(attached)) || (in_place && nxb_is_expert_product(node)))
        stored = own_type(e);
    if (!product || !has_copy(attached)) { /* a copy that was given up may have left nothing: see packed.c */
        const nx_status status = nx_extent_restore(e);
        if (status != NX_OK) return nxb_status(status);
    }
    if (!attached && stored == NX_TERNARY_TYPES) return GX_SUCCESS;
    if (!ours || !grow((void **)&ours->noted, &ours->noted_capacity, ours->n_noted + 1, sizeof *ours->noted))
        return GX_ALLOC_FAILED;
    ours->noted[ours->n_noted++] = (noted){number, attached, stored};
    return GX_SUCCESS;
}

bool nxb_ours_computes(const gx_tensor *node) {
    if (!nxb_is_product(node)) return false;
    const nx_extent *e = nxb_extent(node->src[0]);
    const nx_attachment *a = e ? nx_extent_attached(e) : NULL;
    return e && (has_copy(a) || (a && a->kernel) || own_type(e) != NX_TERNARY_TYPES);
}

/* -- residuals ---------------------------------------------------------------------------------- */

/* The columns of a decode: one, or several that are computed as if each were alone (columns.c). */
static size_t n_alone(const gx_tensor *node) { return node->src[1]->ne[1] == 1 ? (size_t)node->src[1]->ne[2] : 0; }

/* Columns are taken in turns by the threads; one column, by the first. */
static void choose(gx_tensor *node, int ith, int nth, void *argument) {
    const job *j = argument;
    const nxb_ours *ours = j->ours;
    const size_t k = j->k < j->residual->n_in ? j->k : j->residual->n_in;
    for (size_t c = (unsigned)ith; c < n_alone(node); c += (unsigned)nth) {
        const float *x = (const float *)((const char *)node->src[1]->data + c * node->src[1]->nb[2]);
        (void)nx_residual_select(x, j->residual->n_in, j->k, ours->channels + c * k); /* always k */
        nx_residual_products(x, ours->channels + c * k, k, ours->products + 16 * c * k);
    }
}

static void add(gx_tensor *node, int ith, int nth, void *argument) {
    const job *j = argument;
    const nxb_ours *ours = j->ours;
    const size_t k = j->k < j->residual->n_in ? j->k : j->residual->n_in;
    const uint64_t lines = ((uint64_t)j->residual->n_out + NX_RESIDUAL_LINE - 1) / NX_RESIDUAL_LINE;
    const uint32_t begin = (uint32_t)(lines * (unsigned)ith / (unsigned)nth * NX_RESIDUAL_LINE);
    uint64_t end = lines * ((unsigned)ith + 1) / (unsigned)nth * NX_RESIDUAL_LINE;
    if (end > j->residual->n_out) end = j->residual->n_out;
    for (size_t c = 0; c < n_alone(node); c++)
        nx_residual_add(j->residual, ours->channels + c * k, ours->products + 16 * c * k, k, begin, (uint32_t)end,
                        ours->sums + begin, (float *)((char *)node->data + c * node->nb[2]));
}

/* -- putting nodes in ---------------------------------------------------------------------------- */

void nxb_make_custom(gx_tensor *node, nxb_custom_function function, void *argument) {
    const custom_params params = {.function = function, .n_tasks = -1, .argument = argument};
    node->op = gx.op_custom;
    memcpy(node->op_params, &params, sizeof params);
}

gx_tensor *nxb_ours_custom(nxb_ours *ours, const gx_tensor *node, nxb_custom_function function, job with) {
    job *j = &ours->jobs[ours->n_jobs];
    gx_tensor *t = &ours->tensors[ours->n_jobs++];
    *j = with;
    *t = *node;
    nxb_make_custom(t, function, j);
    return t;
}

/* Room for the jobs of `n` nodes, before anything points to one. */
static bool reserve_jobs(nxb_ours *ours, size_t n) {
    ours->n_jobs = 0;
    if (n * NXB_MOST_JOBS <= ours->jobs_capacity) return true;
    free(ours->jobs);
    free(ours->tensors);
    ours->jobs = malloc(n * NXB_MOST_JOBS * sizeof *ours->jobs);
    ours->tensors = malloc(n * NXB_MOST_JOBS * sizeof *ours->tensors);
    ours->jobs_capacity = ours->jobs && ours->tensors ? n * NXB_MOST_JOBS : 0;
    return ours->jobs_capacity != 0;
}

static bool reserve_residual(nxb_ours *ours, const nx_residual_matrix *m, size_t k, size_t n_columns) {
    if (k > m->n_in) k = m->n_in;
    k *= n_columns;
    if (k > ours->channels_capacity) {
        free(ours->channels);
        free(ours->products);
        ours->channels = malloc(k * sizeof *ours->channels);
        ours->products = malloc(k * 16 * sizeof *ours->products);
        ours->channels_capacity = ours->channels && ours->products ? k : 0;
        if (!ours->channels_capacity) return false;
    }
    return grow((void **)&ours->sums, &ours->sums_capacity, m->n_out + NX_RESIDUAL_LINE, sizeof *ours->sums);
}

/* What follows the product, or nothing. Returns how many nodes, or a status below 0. */
static int residual_nodes(nxb_ours *ours, const gx_tensor *node, const nx_attachment *a, progress *p,
                          gx_tensor **out) {
    const uint32_t k = a ? __atomic_load_n(&a->residual_k, __ATOMIC_ACQUIRE) : 0;
    if (k == 0 || n_alone(node) == 0) return 0;
    int n = 0;
    const job with = {.ours = ours, .residual = &a->residual, .k = k};
    if (!reserve_residual(ours, &a->residual, k, n_alone(node))) return GX_ALLOC_FAILED;
    if (p->chosen != node->src[1] || p->chosen_k != k) { /* several matrices share an input: choose once */
        out[n++] = nxb_ours_custom(ours, node, choose, with);
        p->chosen = node->src[1];
        p->chosen_k = k;
    }
    out[n++] = nxb_ours_custom(ours, node, add, with);
    return n;
}

/* The product itself, by the delegate or by us. */
static int product_nodes(nxb_run *r, gx_tensor *node, const noted *n, progress *p, gx_tensor **out) {
    nxb_ours *ours = r->own->ours;
    out[0] = node;
    if (n->attached && n->attached->kernel) {
        nx_note_own(r->models[0], NX_OWN_PLUGIN);
        return nxb_plugin_nodes(ours, node, n->attached, p, out);
    }
    if (n->stored == NX_TERNARY_TYPES && !has_copy(n->attached)) return 1;
    if (n->stored != NX_TERNARY_TYPES) {
        nx_note_own(r->models[0], NX_OWN_STORED);
        return nxb_stored_nodes(ours, node, n->stored, p, out);
    }
    nx_note_own(r->models[0], n->attached->opencl ? NX_OWN_OPENCL : NX_OWN_PACKED);
    return nxb_packed_nodes(ours, node, n->attached, p, out);
}

static int unavailable(const gx_tensor *node) {
    nx_extent *e = nxb_extent(node->src[0]);
    nx_error error;
    nx_error_set(&error, NX_E_ABI, 0, "ggml %s has no custom operations that the backend could use, but %s has an "
                 "attachment", gx.version(), e ? e->name : node->name);
    if (e) nx_model_fail(e->model, &error);
    return GX_FAILED;
}

static size_t first_noted(const nxb_ours *ours, int node) {
    size_t low = 0, high = ours->n_noted;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (ours->noted[middle].node < node) low = middle + 1;
        else high = middle;
    }
    return low;
}

int nxb_ours_insert(nxb_run *r, gx_graph_value *view, int begin, int end) {
    nxb_ours *ours = r->own->ours;
    if (!ours) return GX_SUCCESS;
    const size_t first = first_noted(ours, begin), last = first_noted(ours, end);
    if (first == last) return GX_SUCCESS;
    if (gx.op_custom < 0 || !gx.view_nodes) return unavailable(r->nodes[ours->noted[first].node]);
    const size_t most = (size_t)(end - begin) + NXB_MOST_JOBS * (last - first);
    if (!reserve_jobs(ours, last - first) ||
        !grow((void **)&ours->nodes, &ours->nodes_capacity, most, sizeof *ours->nodes))
        return GX_ALLOC_FAILED;
    progress p = {0};
    int n = 0;
    size_t at = first;
    for (int i = begin; i < end; i++) {
        if (at == last || ours->noted[at].node != i) {
            ours->nodes[n++] = r->nodes[i];
            continue;
        }
        const noted *of = &ours->noted[at++];
        int added = product_nodes(r, r->nodes[i], of, &p, &ours->nodes[n]);
        if (added < 0) return added;
        n += added;
        added = residual_nodes(ours, r->nodes[i], of->attached, &p, &ours->nodes[n]);
        if (added < 0) return added;
        n += added;
    }
    memcpy((char *)view + gx.view_n_nodes, &n, sizeof n);
    memcpy((char *)view + gx.view_nodes, &ours->nodes, sizeof ours->nodes);
    return GX_SUCCESS;
}

static const noted *noted_at(const nxb_ours *ours, int node) {
    const size_t at = ours ? first_noted(ours, node) : 0;
    return ours && at < ours->n_noted && ours->noted[at].node == node ? &ours->noted[at] : NULL;
}

int nxb_ours_product_as(nxb_run *r, int node, gx_tensor *as, size_t n, bool again) {
    nxb_ours *ours = r->own->ours;
    const noted *of = noted_at(ours, node);
    if (!of || of->stored == NX_TERNARY_TYPES) return nxb_compute_as(r, node, as, n);
    if (!reserve_jobs(ours, n) || !grow((void **)&ours->nodes, &ours->nodes_capacity, NXB_MOST_JOBS * n, sizeof *ours->nodes))
        return GX_ALLOC_FAILED;
    progress p = {.activated = again ? as[0].src[1] : NULL, .activated_as = nxb_rounded_as(of->stored)};
    int count = 0;
    for (size_t i = 0; i < n; i++) {
        nx_note_own(r->models[0], NX_OWN_STORED);
        const int added = nxb_stored_nodes(ours, &as[i], of->stored, &p, &ours->nodes[count]);
        if (added < 0) return added;
        count += added;
    }
    return nxb_compute_as(r, node, ours->tensors, (size_t)count);
}

int nxb_ours_after(nxb_run *r, int node) {
    nxb_ours *ours = r->own->ours;
    const noted *of = noted_at(ours, node);
    if (!of || !of->attached) return GX_SUCCESS;
    if (gx.op_custom < 0) return unavailable(r->nodes[node]);
    if (!reserve_jobs(ours, 1)) return GX_ALLOC_FAILED;
    progress p = {0};
    gx_tensor *nodes[NXB_MOST_JOBS];
    const int n = residual_nodes(ours, r->nodes[node], of->attached, &p, nodes);
    return n > 0 ? nxb_compute_as(r, node, ours->tensors, (size_t)n) : n;
}
