/* ours.c: operations of our own in the middle of a graph, run by the delegate's threads.
 *
 * A node that multiplies by a weight with an attachment gets company, or is replaced, by nodes of the kind
 * that ggml has for custom functions, in the list of nodes that the delegate walks. They run on the
 * delegate's own threads, with its barriers between them; there is no second pool beside it and no segment
 * is cut. The list belongs to a view of the graph, so the graph of the caller stays as it is.
 *
 *   packed weight:  activate (round the columns to 8 bits; once for all weights that share an input),
 *                   multiply (ranges of rows, taken by whichever thread is free)
 *   residual:       what computes the product; choose (channels, by one thread); add (outputs, by all)
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
    const nx_ternary *packed;
    uint32_t next_unit; /* of rows that no thread has taken; atomic */
} job;

/* What the shared memory holds at this place in the list of nodes. */
typedef struct progress {
    const gx_tensor *chosen; /* the input that channels were chosen for, and how many */
    uint32_t chosen_k;
    const gx_tensor *activated; /* the input that was rounded, and how */
    nx_ternary_type activated_as;
} progress;

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
    void *columns; /* of activations */
    size_t columns_capacity;
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
    free(ours->columns);
    free(ours);
    own->ours = NULL;
}

/* Columns of floats times the weight, which is a plain matrix. */
static bool is_product(const gx_tensor *node) {
    const gx_tensor *w = node->src[0], *x = node->src[1];
    return node->op == gx.op_mul_mat && w->ne[2] == 1 && w->ne[3] == 1 && x && x->type == gx.type_f32 &&
           x->nb[0] == sizeof(float) && x->ne[0] == w->ne[0] && x->ne[2] == 1 && x->ne[3] == 1 &&
           x->ne[1] <= UINT32_MAX && node->type == gx.type_f32 && node->nb[0] == sizeof(float) &&
           node->op_params[1] == 0; /* else a hint that the matrix is a special one */
}

int nxb_ours_note(nxb_backend *own, int number, const gx_tensor *node, int source, nx_extent *e) {
    nxb_ours *ours = ours_of(own);
    const bool ours_to_do = source == 0 && nxb_extent(node->src[0]) == e && is_product(node);
    if (!ours_to_do) return nxb_status(nx_extent_restore(e));
    if (!ours || !grow((void **)&ours->noted, &ours->noted_capacity, ours->n_noted + 1, sizeof *ours->noted))
        return GX_ALLOC_FAILED;
    ours->noted[ours->n_noted++] = (noted){number, nx_extent_attached(e)};
    return GX_SUCCESS;
}

bool nxb_ours_computes(const gx_tensor *node) {
    if (!is_product(node)) return false;
    const nx_extent *e = nxb_extent(node->src[0]);
    const nx_attachment *a = e ? nx_extent_attached(e) : NULL;
    return a && a->packed.codes;
}

/* -- packed weights ----------------------------------------------------------------------------- */

static void activate(gx_tensor *node, int ith, int nth, void *argument) {
    const job *j = argument;
    const nx_ternary *m = j->packed;
    const gx_tensor *x = node->src[1];
    const uint64_t bytes = nx_ternary_activation_bytes(m->type, m->n_in);
    const uint64_t n_blocks = m->n_in / nx_ternary_block(m->type), all = n_blocks * (uint64_t)x->ne[1];
    const uint64_t end = all * ((unsigned)ith + 1) / (unsigned)nth;
    for (uint64_t at = all * (unsigned)ith / (unsigned)nth; at < end;) {
        const uint64_t column = at / n_blocks, first = at % n_blocks;
        const uint64_t last = end - at < n_blocks - first ? first + end - at : n_blocks;
        nx_ternary_activate(m->type, (const float *)((const char *)x->data + column * x->nb[1]), (uint32_t)first,
                            (uint32_t)last, (char *)j->ours->columns + column * bytes);
        at += last - first;
    }
}

#define PARTS 8 /* for each thread: who is held up leaves its share to the others */
#define PART_BYTES (32u << 10)

static void multiply(gx_tensor *node, int ith, int nth, void *argument) {
    (void)ith;
    job *j = argument;
    const nx_ternary *m = j->packed;
    const uint32_t unit = nx_ternary_row_unit(m->type), units = (m->n_out + unit - 1) / unit;
    const uint32_t least = (uint32_t)(PART_BYTES / (m->codes_bytes / units + 1)) + 1;
    uint32_t step = units / ((uint32_t)nth * PARTS) + 1;
    if (step < least) step = least;
    const uint32_t share = (units + (uint32_t)nth - 1) / (uint32_t)nth;
    if (step > share) step = share;
    for (;;) {
        const uint32_t begin = __atomic_fetch_add(&j->next_unit, step, __ATOMIC_RELAXED);
        if (begin >= units) return;
        const uint64_t end = (uint64_t)(begin + step) * unit;
        nx_ternary_multiply(m, j->ours->columns, (uint32_t)node->src[1]->ne[1], begin * unit,
                            end < m->n_out ? (uint32_t)end : m->n_out, node->data, node->nb[1] / sizeof(float));
    }
}

/* -- residuals ---------------------------------------------------------------------------------- */

/* The columns of a decode: one, or several that are computed as if each were alone (columns.c). */
static size_t n_alone(const gx_tensor *node) { return node->src[1]->ne[1] == 1 ? (size_t)node->src[1]->ne[2] : 0; }

static void choose(gx_tensor *node, int ith, int nth, void *argument) {
    (void)nth;
    if (ith != 0) return;
    const job *j = argument;
    nxb_ours *ours = j->ours;
    const size_t k = j->k < j->residual->n_in ? j->k : j->residual->n_in;
    for (size_t c = 0; c < n_alone(node); c++) {
        const float *x = (const float *)((const char *)node->src[1]->data + c * node->src[1]->nb[2]);
        ours->n_channels = nx_residual_select(x, j->residual->n_in, j->k, ours->channels + c * k);
        nx_residual_products(x, ours->channels + c * k, ours->n_channels, ours->products + 16 * c * k);
    }
}

static void add(gx_tensor *node, int ith, int nth, void *argument) {
    const job *j = argument;
    const nxb_ours *ours = j->ours;
    const size_t k = ours->n_channels;
    const uint64_t lines = ((uint64_t)j->residual->n_out + NX_RESIDUAL_LINE - 1) / NX_RESIDUAL_LINE;
    const uint32_t begin = (uint32_t)(lines * (unsigned)ith / (unsigned)nth * NX_RESIDUAL_LINE);
    uint64_t end = lines * ((unsigned)ith + 1) / (unsigned)nth * NX_RESIDUAL_LINE;
    if (end > j->residual->n_out) end = j->residual->n_out;
    for (size_t c = 0; c < n_alone(node); c++)
        nx_residual_add(j->residual, ours->channels + c * k, ours->products + 16 * c * k, k, begin, (uint32_t)end,
                        ours->sums + begin, (float *)((char *)node->data + c * node->nb[2]));
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

#define MOST_JOBS 4 /* for one node */

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
    const uint32_t k = __atomic_load_n(&a->residual_k, __ATOMIC_ACQUIRE);
    if (k == 0 || n_alone(node) == 0) return 0;
    int n = 0;
    const job with = {.ours = ours, .residual = &a->residual, .k = k};
    if (!reserve_residual(ours, &a->residual, k, n_alone(node))) return GX_ALLOC_FAILED;
    if (p->chosen != node->src[1] || p->chosen_k != k) { /* several matrices share an input: choose once */
        out[n++] = custom(ours, node, choose, with);
        p->chosen = node->src[1];
        p->chosen_k = k;
    }
    out[n++] = custom(ours, node, add, with);
    return n;
}

/* The product itself, by the delegate or by us. */
static int product_nodes(nxb_ours *ours, gx_tensor *node, const nx_attachment *a, progress *p, gx_tensor **out) {
    out[0] = node;
    if (!a->packed.codes) return 1;
    int n = 0;
    const nx_ternary_type as = a->packed.type == NX_TQ1_0 ? NX_TQ2_0 : a->packed.type; /* rounded alike */
    const job with = {.ours = ours, .packed = &a->packed};
    const uint64_t bytes = nx_ternary_activation_bytes(a->packed.type, a->packed.n_in) * (uint64_t)node->src[1]->ne[1];
    if (bytes > ours->columns_capacity) {
        free(ours->columns);
        ours->columns_capacity = 0;
        if (posix_memalign(&ours->columns, 64, bytes) != 0) {
            ours->columns = NULL;
            return GX_ALLOC_FAILED;
        }
        ours->columns_capacity = bytes;
    }
    if (p->activated != node->src[1] || p->activated_as != as) {
        out[n++] = custom(ours, node, activate, with);
        p->activated = node->src[1];
        p->activated_as = as;
    }
    out[n++] = custom(ours, node, multiply, with);
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
    progress p = {0};
    int n = 0;
    size_t at = first;
    for (int i = begin; i < end; i++) {
        if (at == last || ours->noted[at].node != i) {
            ours->nodes[n++] = r->nodes[i];
            continue;
        }
        const nx_attachment *attached = ours->noted[at++].attached;
        int added = product_nodes(ours, r->nodes[i], attached, &p, &ours->nodes[n]);
        if (added < 0) return added;
        n += added;
        added = residual_nodes(ours, r->nodes[i], attached, &p, &ours->nodes[n]);
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
    progress p = {0};
    gx_tensor *nodes[MOST_JOBS];
    const int n = residual_nodes(ours, r->nodes[node], ours->noted[at].attached, &p, nodes);
    return n > 0 ? nxb_compute_as(r, node, ours->tensors, (size_t)n) : n;
}
