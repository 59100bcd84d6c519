/* ours.c: operations of our own in the middle of a graph, run by the delegate's threads.
 *
 * A node that multiplies by a weight with an attachment gets company: nodes of the kind that ggml has for
 * custom functions, put into the list of nodes that the delegate walks. They run on the delegate's own
 * threads, with its barriers between them; there is no second pool beside it and no segment is cut.
 *
 *   residual:  MUL_MAT, choose (channels, by one thread), add (outputs, by all)
 *
 * The list belongs to a view of the graph, so the graph of the caller stays as it is.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "walk.h"

/* Where a custom node keeps its function, its number of tasks (-1: one for each thread) and what it gets. */
typedef struct custom_params {
    void (*function)(gx_tensor *, int ith, int nth, void *);
    int n_tasks;
    void *argument;
} custom_params;

typedef struct noted {
    int node;
    const nx_attachment *attached;
} noted;

/* What a custom node works on. */
typedef struct job {
    struct nxb_ours *ours;
    const nx_residual_matrix *residual;
    uint32_t k;
} job;

/* One for each backend, which computes one graph at a time. */
typedef struct nxb_ours {
    noted *noted; /* by node */
    size_t n_noted, noted_capacity;
    /* of one segment */
    gx_tensor **nodes;
    size_t nodes_capacity;
    gx_tensor *tensors;
    job *jobs;
    size_t n_jobs, jobs_capacity;
    /* what jobs share, one after the other */
    uint32_t *channels; /* chosen for the last input */
    size_t n_channels, channels_capacity;
    float *products, *sums;
    size_t sums_capacity;
} nxb_ours;

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
    free(ours);
    own->ours = NULL;
}

int nxb_ours_note(nxb_backend *own, int node, const nx_attachment *attached) {
    nxb_ours *ours = ours_of(own);
    if (!ours || !grow((void **)&ours->noted, &ours->noted_capacity, ours->n_noted + 1, sizeof *ours->noted))
        return GX_ALLOC_FAILED;
    ours->noted[ours->n_noted++] = (noted){node, attached};
    return GX_SUCCESS;
}

/* -- residuals ---------------------------------------------------------------------------------- */

/* One column of floats, times a plain matrix. */
static bool is_decode(const gx_tensor *node) {
    const gx_tensor *w = node->src[0], *x = node->src[1];
    return node->op == gx.op_mul_mat && w->ne[2] == 1 && w->ne[3] == 1 && x && x->type == gx.type_f32 &&
           x->nb[0] == sizeof(float) && x->ne[0] == w->ne[0] && x->ne[1] == 1 && x->ne[2] == 1 && x->ne[3] == 1 &&
           node->type == gx.type_f32 && node->nb[0] == sizeof(float) && node->op_params[1] == 0;
}

static void choose(gx_tensor *node, int ith, int nth, void *argument) {
    (void)nth;
    if (ith != 0) return;
    const job *j = argument;
    nxb_ours *ours = j->ours;
    const float *x = node->src[1]->data;
    ours->n_channels = nx_residual_select(x, j->residual->n_in, j->k, ours->channels);
    nx_residual_products(x, ours->channels, ours->n_channels, ours->products);
}

static void add(gx_tensor *node, int ith, int nth, void *argument) {
    const job *j = argument;
    const nxb_ours *ours = j->ours;
    const uint64_t lines = ((uint64_t)j->residual->n_out + NX_RESIDUAL_LINE - 1) / NX_RESIDUAL_LINE;
    const uint32_t begin = (uint32_t)(lines * (unsigned)ith / (unsigned)nth * NX_RESIDUAL_LINE);
    uint64_t end = lines * ((unsigned)ith + 1) / (unsigned)nth * NX_RESIDUAL_LINE;
    if (end > j->residual->n_out) end = j->residual->n_out;
    nx_residual_add(j->residual, ours->channels, ours->products, ours->n_channels, begin, (uint32_t)end,
                    ours->sums + begin, node->data);
}

/* -- putting nodes in ---------------------------------------------------------------------------- */

static gx_tensor *custom(nxb_ours *ours, const gx_tensor *node, void (*function)(gx_tensor *, int, int, void *),
                         job with) {
    job *j = &ours->jobs[ours->n_jobs];
    gx_tensor *t = &ours->tensors[ours->n_jobs++];
    *j = with;
    *t = *node;
    t->op = gx.op_custom;
    const custom_params params = {.function = function, .n_tasks = -1, .argument = j};
    memcpy(t->op_params, &params, sizeof params);
    return t;
}

#define MOST_JOBS 2 /* for one node */

/* Room for the jobs of `n` nodes, before anything points to one. */
static bool reserve_jobs(nxb_ours *ours, size_t n) {
    ours->n_jobs = 0;
    if (n * MOST_JOBS <= ours->jobs_capacity) return true;
    free(ours->jobs);
    free(ours->tensors);
    ours->jobs = malloc(n * MOST_JOBS * sizeof *ours->jobs);
    ours->tensors = malloc(n * MOST_JOBS * sizeof *ours->tensors);
    ours->jobs_capacity = ours->jobs && ours->tensors ? n * MOST_JOBS : 0;
    return ours->jobs_capacity != 0;
}

static bool reserve_residual(nxb_ours *ours, const nx_residual_matrix *m, uint32_t k) {
    if (k > m->n_in) k = m->n_in;
    if (k > ours->channels_capacity) {
        free(ours->channels);
        free(ours->products);
        ours->channels = malloc(k * sizeof *ours->channels);
        ours->products = malloc((size_t)k * 16 * sizeof *ours->products);
        ours->channels_capacity = ours->channels && ours->products ? k : 0;
        if (!ours->channels_capacity) return false;
    }
    return grow((void **)&ours->sums, &ours->sums_capacity, m->n_out + NX_RESIDUAL_LINE, sizeof *ours->sums);
}

/* What follows `node`, or nothing. `chosen`: the input that channels were chosen for last, and how many. */
static int residual_nodes(nxb_ours *ours, const gx_tensor *node, const nx_attachment *a, const gx_tensor **chosen,
                          uint32_t *chosen_k, gx_tensor **out) {
    const uint32_t k = __atomic_load_n(&a->residual_k, __ATOMIC_RELAXED);
    if (!a->residual.codes || k == 0 || !is_decode(node)) return 0;
    int n = 0;
    const job with = {.ours = ours, .residual = &a->residual, .k = k};
    if (!reserve_residual(ours, &a->residual, k)) return GX_ALLOC_FAILED;
    if (*chosen != node->src[1] || *chosen_k != k) { /* several matrices share an input: choose once */
        out[n++] = custom(ours, node, choose, with);
        *chosen = node->src[1];
        *chosen_k = k;
    }
    out[n++] = custom(ours, node, add, with);
    return n;
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
    const size_t most = (size_t)(end - begin) + MOST_JOBS * (last - first);
    if (!reserve_jobs(ours, last - first) ||
        !grow((void **)&ours->nodes, &ours->nodes_capacity, most, sizeof *ours->nodes))
        return GX_ALLOC_FAILED;
    const gx_tensor *chosen = NULL;
    uint32_t chosen_k = 0;
    int n = 0;
    size_t at = first;
    for (int i = begin; i < end; i++) {
        ours->nodes[n++] = r->nodes[i];
        if (at == last || ours->noted[at].node != i) continue;
        const nx_attachment *attached = ours->noted[at++].attached;
        const int added = residual_nodes(ours, r->nodes[i], attached, &chosen, &chosen_k, &ours->nodes[n]);
        if (added < 0) return added;
        n += added;
    }
    memcpy((char *)view + gx.view_n_nodes, &n, sizeof n);
    memcpy((char *)view + gx.view_nodes, &ours->nodes, sizeof ours->nodes);
    return GX_SUCCESS;
}

int nxb_ours_after(nxb_run *r, int node) {
    nxb_ours *ours = r->own->ours;
    const size_t at = ours ? first_noted(ours, node) : 0;
    if (!ours || at == ours->n_noted || ours->noted[at].node != node) return GX_SUCCESS;
    if (gx.op_custom < 0) return unavailable(r->nodes[node]);
    if (!reserve_jobs(ours, 1)) return GX_ALLOC_FAILED;
    const gx_tensor *chosen = NULL;
    uint32_t chosen_k = 0;
    gx_tensor *nodes[MOST_JOBS];
    const int n = residual_nodes(ours, r->nodes[node], ours->noted[at].attached, &chosen, &chosen_k, nodes);
    return n > 0 ? nxb_compute_as(r, node, ours->tensors, (size_t)n) : n;
}
