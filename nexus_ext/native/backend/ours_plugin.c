/* ours_plugin.c: products that a plugin's kernel computes (nexus_plugin.h), on the delegate's threads, and the trial
 * that tells whether they are bit by bit those of the CPU backend. */
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "nexus_policy.h"
#include "ours.h"

#define PARTS 8 /* for each thread: who is held up leaves its share to the others */
#define PART_BYTES (32u << 10)
#define UNIT 8u /* rows: a range begins at a multiple */

static void activate(gx_tensor *node, int ith, int nth, void *argument) {
    const job *j = argument;
    const nxp_kernel *k = j->attached->kernel;
    const gx_tensor *x = node->src[1];
    const uint64_t n_in = j->attached->matrix.n_in, bytes = k->column_bytes(k->user, n_in);
    for (int64_t c = ith; c < x->ne[1]; c += nth)
        k->activate(k->user, (const float *)(const void *)((const char *)x->data + (size_t)c * x->nb[1]), n_in,
                    (char *)j->ours->columns + (uint64_t)c * bytes);
}

static void multiply(gx_tensor *node, int ith, int nth, void *argument) {
    (void)ith;
    job *j = argument;
    const nxp_kernel *k = j->attached->kernel;
    const nxp_matrix *m = &j->attached->matrix;
    const gx_tensor *x = node->src[1];
    const void *columns = k->activate ? j->ours->columns : x->data;
    const uint64_t stride = k->activate ? k->column_bytes(k->user, m->n_in) : x->nb[1];
    const uint32_t units = (uint32_t)((m->n_out + UNIT - 1) / UNIT);
    const uint32_t least = (uint32_t)(PART_BYTES / (m->row_bytes * UNIT + 1)) + 1;
    uint32_t step = units / ((uint32_t)nth * PARTS) + 1;
    if (step < least) step = least;
    for (;;) {
        const uint32_t begin = __atomic_fetch_add(&j->next, step, __ATOMIC_RELAXED);
        if (begin >= units) return;
        const uint64_t end = (uint64_t)(begin + step) * UNIT;
        k->multiply(k->user, m, columns, stride, (uint32_t)x->ne[1], (uint64_t)begin * UNIT,
                    end < m->n_out ? end : m->n_out, node->data, node->nb[1] / sizeof(float));
    }
}

int nxb_plugin_nodes(nxb_ours *ours, const gx_tensor *node, const nx_attachment *a, progress *p, gx_tensor **out) {
    const nxp_kernel *k = a->kernel;
    const job with = {.ours = ours, .attached = a};
    int n = 0;
    if (k->activate && (p->activated != node->src[1] || p->activated_by != k)) {
        if (!nxb_ours_columns(ours, k->column_bytes(k->user, a->matrix.n_in) * (uint64_t)node->src[1]->ne[1]))
            return GX_ALLOC_FAILED;
        out[n++] = nxb_ours_custom(ours, node, activate, with);
        p->activated = node->src[1];
        p->activated_by = k;
    }
    out[n++] = nxb_ours_custom(ours, node, multiply, with);
    return n;
}

/* -- the trial ---------------------------------------------------------------------------------- */

static float random_value(uint64_t *state, size_t i) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return ((float)(*state >> 33) / (float)(1u << 30) - 1.0f) * (i % 17 == 0 ? 8.0f : 1.0f);
}

static bool product(const nxp_kernel *k, const nxp_matrix *m, const gx_tensor *x, float *y) {
    const uint32_t n_columns = (uint32_t)x->ne[1];
    uint64_t stride = x->nb[1];
    void *columns = x->data;
    if (k->activate) {
        stride = k->column_bytes(k->user, m->n_in);
        if (posix_memalign(&columns, 64, stride * n_columns) != 0) return false;
        for (uint32_t c = 0; c < n_columns; c++)
            k->activate(k->user, (const float *)(const void *)((const char *)x->data + c * x->nb[1]), m->n_in,
                        (char *)columns + c * stride);
    }
    const uint64_t half = m->n_out / (2 * UNIT) * UNIT; /* rows in two ranges, as threads share them */
    if (half) k->multiply(k->user, m, columns, stride, n_columns, 0, half, y, m->n_out);
    k->multiply(k->user, m, columns, stride, n_columns, half, m->n_out, y, m->n_out);
    if (k->activate) free(columns);
    return true;
}

/* 1: the same bits; 0: not; -1: it cannot be told. */
static int compare(gx_backend *cpu, const nxp_kernel *k, int32_t number, const void *rows, uint64_t rows_bytes,
                   uint64_t n_in, uint64_t n_out, uint32_t n_columns) {
    const gx_init_params params = {.mem_size = rows_bytes + n_out * n_in * sizeof(float) +
                                               (n_out + n_in) * n_columns * sizeof(float) +
                                               2 * gx.graph_overhead_custom(4, false) + 8 * gx.tensor_overhead() + 4096};
    gx_context *ctx = gx.init(params);
    if (!ctx) return -1;
    gx_tensor *w = gx.new_tensor_2d(ctx, number, (int64_t)n_in, (int64_t)n_out);
    gx_tensor *x = gx.new_tensor_2d(ctx, gx.type_f32, (int64_t)n_in, n_columns);
    gx_tensor *y = gx.mul_mat(ctx, w, x);
    gx_graph *graph = gx.new_graph_custom(ctx, 4, false);
    gx.build_forward_expand(graph, y);
    float *ours = malloc(n_out * n_columns * sizeof *ours);
    int same = -1;
    if (ours && gx.nbytes(w) == rows_bytes) {
        memcpy(w->data, rows, rows_bytes);
        uint64_t state = 7 + n_columns;
        for (size_t i = 0; i < n_in * n_columns; i++) ((float *)x->data)[i] = random_value(&state, i);
        const nxp_matrix m = {.struct_size = sizeof m, .n_in = n_in, .n_out = n_out, .rows = w->data,
                              .row_bytes = rows_bytes / n_out};
        if (gx.backend_graph_compute_async(cpu, graph) == GX_SUCCESS && product(k, &m, x, ours))
            same = memcmp(ours, y->data, n_out * n_columns * sizeof *ours) == 0;
    }
    free(ours);
    gx.free(ctx);
    return same;
}

/* Does this kernel multiply these n_out rows of weights to the very bits of the CPU backend, for one column and for
 * many? 1: yes, 0: no, -1: it cannot be used in this ggml. Needs a backend that was loaded (ggml_backend_init). */
NX_API int nx_backend_kernel_same_bits(const nxp_kernel *from, const void *rows, uint64_t rows_bytes, uint64_t n_in,
                                       uint64_t n_out) {
    nxp_kernel k;
    if (nx_kernel_check(from, &k, NULL) != NX_OK || !nxb_delegate.device || gx.op_custom < 0 || !gx.view_nodes || !n_out)
        return -1;
    int32_t number = 0;
    for (; number < 64; number++) {
        const char *name = gx.type_name(number);
        if (name && strcasecmp(name, k.type) == 0) break;
    }
    gx_backend *cpu = number < 64 ? gx.backend_dev_init(nxb_delegate.device, NULL) : NULL;
    if (!cpu) return -1;
    int same = compare(cpu, &k, number, rows, rows_bytes, n_in, n_out, 1);
    if (same == 1) same = compare(cpu, &k, number, rows, rows_bytes, n_in, n_out, 33);
    gx.backend_free(cpu);
    return same;
}
