/* ours_ternary.c: products with weights of few bits, by our own kernels on the delegate's threads.
 *
 *   activate   round the columns to 8 bits; once for all weights that share an input
 *   group      sort the rows of a batch by their experts; once for all products of one router decision
 *   multiply   ranges of rows of the weight, taken by whichever thread is free: of a packed matrix, or of
 *              a weight as it is stored (a slab or a record that is gone after this graph)
 */
#include <stdlib.h>
#include <string.h>

#include "ours.h"

#define PARTS 8 /* for each thread: who is held up leaves its share to the others */
#define PART_BYTES (32u << 10)
#define COLUMNS_AT_ONCE 32

nx_ternary_type nxb_rounded_as(nx_ternary_type t) { return t == NX_TQ1_0 ? NX_TQ2_0 : t; }

void nxb_ternary_free(nxb_ours *ours) {
    free(ours->columns);
    nxb_groups_free(&ours->groups);
}

static bool floats(const gx_tensor *t) { return t->type == gx.type_f32 && t->nb[0] == sizeof(float); }

bool nxb_is_product(const gx_tensor *node) {
    const gx_tensor *w = node->src[0], *x = node->src[1];
    return node->op == gx.op_mul_mat && w->ne[2] == 1 && w->ne[3] == 1 && x && floats(x) && x->ne[0] == w->ne[0] &&
           x->ne[2] == 1 && x->ne[3] == 1 && x->ne[1] <= UINT32_MAX && floats(node) &&
           node->op_params[1] == 0; /* else a hint that the matrix is a special one */
}

bool nxb_is_expert_product(const gx_tensor *node) {
    const gx_tensor *w = node->src[0], *x = node->src[1], *ids = node->src[2];
    return node->op == gx.op_mul_mat_id && w->ne[3] == 1 && x && ids && floats(x) && x->ne[0] == w->ne[0] &&
           x->ne[3] == 1 && floats(node) && ids->type == gx.type_i32 && ids->ne[2] == 1 && ids->ne[3] == 1 &&
           x->ne[2] == ids->ne[1] && x->ne[1] > 0 && ids->ne[0] % x->ne[1] == 0 &&
           ids->ne[0] * ids->ne[1] <= UINT32_MAX;
}

/* -- activations -------------------------------------------------------------------------------- */

/* Column i1 of plane i2 of the input becomes column i2 * ne[1] + i1. */
static void activate(gx_tensor *node, int ith, int nth, void *argument) {
    const job *j = argument;
    const gx_tensor *x = node->src[1];
    const uint64_t bytes = nx_ternary_activation_bytes(j->type, j->n_in), wide = (uint64_t)x->ne[1];
    const uint64_t n_blocks = j->n_in / nx_ternary_block(j->type), all = n_blocks * wide * (uint64_t)x->ne[2];
    const uint64_t end = all * ((unsigned)ith + 1) / (unsigned)nth;
    for (uint64_t at = all * (unsigned)ith / (unsigned)nth; at < end;) {
        const uint64_t column = at / n_blocks, first = at % n_blocks;
        const uint64_t last = end - at < n_blocks - first ? first + end - at : n_blocks;
        const char *from = (const char *)x->data + column % wide * x->nb[1] + column / wide * x->nb[2];
        nx_ternary_activate(j->type, (const float *)(const void *)from, (uint32_t)first, (uint32_t)last,
                            (char *)j->ours->columns + column * bytes);
        at += last - first;
    }
}

bool nxb_ours_columns(nxb_ours *ours, uint64_t bytes) {
    if (bytes <= ours->columns_capacity) return true;
    free(ours->columns);
    ours->columns_capacity = 0;
    if (posix_memalign(&ours->columns, 64, bytes) != 0) ours->columns = NULL;
    else ours->columns_capacity = bytes;
    return ours->columns != NULL;
}

/* Memory for the columns of `node`; adds the node that rounds them if that has not been done. */
static int activate_nodes(nxb_ours *ours, const gx_tensor *node, const job *with, progress *p, gx_tensor **out) {
    const gx_tensor *x = node->src[1];
    if (p->activated == x && !p->activated_by && p->activated_as == nxb_rounded_as(with->type)) return 0;
    const uint64_t bytes = nx_ternary_activation_bytes(with->type, with->n_in) * (uint64_t)(x->ne[1] * x->ne[2]);
    if (!nxb_ours_columns(ours, bytes)) return GX_ALLOC_FAILED;
    out[0] = nxb_ours_custom(ours, node, activate, *with);
    p->activated = x;
    p->activated_as = nxb_rounded_as(with->type);
    p->activated_by = NULL;
    return 1;
}

/* -- packed weights ----------------------------------------------------------------------------- */

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
        const uint32_t begin = __atomic_fetch_add(&j->next, step, __ATOMIC_RELAXED);
        if (begin >= units) return;
        const uint64_t end = (uint64_t)(begin + step) * unit;
        nx_ternary_multiply(m, j->ours->columns, (uint32_t)node->src[1]->ne[1], begin * unit,
                            end < m->n_out ? (uint32_t)end : m->n_out, node->data, node->nb[1] / sizeof(float));
    }
}

/* On the device: one thread asks for it, the others wait at the end of the node. */
static void multiply_opencl(gx_tensor *node, int ith, int nth, void *argument) {
    (void)nth;
    if (ith != 0) return;
    const job *j = argument;
    nxb_ours *ours = j->ours;
    const nx_status status = nx_opencl_multiply(j->opencl, ours->columns, (uint32_t)node->src[1]->ne[1], node->data,
                                                node->nb[1] / sizeof(float));
    if (status == NX_OK) return;
    nx_error_set(&ours->failure->error, status, 0, "the product with %s: %s", node->src[0]->name,
                 status == NX_E_IO ? nx_opencl_error() : nx_status_text(status));
    ours->failure->failed = true;
}

int nxb_packed_nodes(nxb_ours *ours, const gx_tensor *node, const nx_attachment *a, progress *p, gx_tensor **out) {
    const nx_extent *e = nxb_extent(node->src[0]);
    const nx_ternary_type type = a->opencl ? nx_ternary_type_of(e->type) : a->packed.type;
    const job with = {.ours = ours, .packed = &a->packed, .opencl = a->opencl, .type = type,
                      .n_in = (uint32_t)node->src[0]->ne[0]};
    const int n = activate_nodes(ours, node, &with, p, out);
    if (n < 0) return n;
    out[n] = nxb_ours_custom(ours, node, a->opencl ? multiply_opencl : multiply, with);
    return n + 1;
}

/* -- weights as they are stored ------------------------------------------------------------------ */

static void group(gx_tensor *node, int ith, int nth, void *argument) {
    (void)nth;
    if (ith != 0) return;
    nxb_ours *ours = ((const job *)argument)->ours;
    nxb_groups_sort(&ours->groups, node, node->src[2]->ne[0] * node->src[2]->ne[1], false, ours->failure);
}

/* Rows [begin, end) of the weight of one expert (or of the only matrix) times columns [first, last). */
static void multiply_part(const gx_tensor *node, const job *j, const char *weight, uint32_t begin, uint32_t end,
                          const uint32_t *rows, uint32_t n) {
    const gx_tensor *w = node->src[0], *x = node->src[1];
    const uint64_t bytes = nx_ternary_activation_bytes(j->type, j->n_in);
    const uint32_t wide = rows ? (uint32_t)node->src[2]->ne[0] : 0, x_wide = (uint32_t)x->ne[1];
    for (uint32_t at = 0; at < n; at += COLUMNS_AT_ONCE) {
        const void *columns[COLUMNS_AT_ONCE];
        float *results[COLUMNS_AT_ONCE];
        const uint32_t count = n - at < COLUMNS_AT_ONCE ? n - at : COLUMNS_AT_ONCE;
        for (uint32_t i = 0; i < count; i++) {
            const uint32_t t = rows ? rows[at + i] / wide : 0, k = rows ? rows[at + i] % wide : at + i;
            const uint64_t column = rows ? (uint64_t)t * x_wide + k % x_wide : k;
            columns[i] = (const char *)j->ours->columns + column * bytes;
            results[i] = (float *)(void *)((char *)node->data + t * node->nb[2] + k * node->nb[1]);
        }
        nx_ternary_multiply_stored(j->type, weight, w->nb[1], j->n_in, columns, count, begin, end, results);
    }
}

static void multiply_stored(gx_tensor *node, int ith, int nth, void *argument) {
    (void)ith;
    job *j = argument;
    const gx_tensor *w = node->src[0];
    const nxb_ours *ours = j->ours;
    const bool experts = node->src[2] != NULL;
    const uint64_t n_matrices = experts ? ours->groups.n_experts : 1, n_out = (uint64_t)w->ne[1];
    uint64_t step = n_out * n_matrices / ((uint64_t)nth * PARTS) + 1, least = PART_BYTES / w->nb[1] + 1;
    if (step < least) step = least;
    const uint64_t share = (n_out * n_matrices + (unsigned)nth - 1) / (unsigned)nth;
    if (step > share) step = share;
    step = step > n_out ? n_out : (step + 7) / 8 * 8;
    if (step == 0) return;
    const uint64_t steps = (n_out + step - 1) / step, all = steps * n_matrices;
    for (;;) {
        const uint64_t part = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED);
        if (part >= all) return;
        const uint64_t matrix = part / steps, begin = part % steps * step;
        const uint64_t end = begin + step < n_out ? begin + step : n_out;
        const char *weight = w->data;
        if (experts) weight += ours->groups.experts[matrix] * w->nb[2];
        multiply_part(node, j, weight, (uint32_t)begin, (uint32_t)end,
                      experts ? ours->groups.rows + ours->groups.starts[matrix] : NULL,
                      experts ? ours->groups.starts[matrix + 1] - ours->groups.starts[matrix] : (uint32_t)node->src[1]->ne[1]);
    }
}

int nxb_stored_nodes(nxb_ours *ours, const gx_tensor *node, nx_ternary_type type, progress *p, gx_tensor **out) {
    const gx_tensor *w = node->src[0], *ids = node->src[2];
    const job with = {.ours = ours, .type = type, .n_in = (uint32_t)w->ne[0]};
    int n = activate_nodes(ours, node, &with, p, out);
    if (n < 0) return n;
    if (ids && (p->grouped != ids || p->grouped_of != w->ne[2])) {
        if (!nxb_groups_reserve(&ours->groups, (size_t)(ids->ne[0] * ids->ne[1]), (size_t)w->ne[2])) return GX_ALLOC_FAILED;
        out[n++] = nxb_ours_custom(ours, node, group, with);
        p->grouped = ids;
        p->grouped_of = w->ne[2];
    }
    out[n] = nxb_ours_custom(ours, node, multiply_stored, with);
    return n + 1;
}
