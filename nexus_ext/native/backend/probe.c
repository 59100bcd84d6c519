/* probe.c: do our kernels give the same bits as the CPU backend of this very ggml?
 *
 * Both multiply random blocks with random columns. Which order of summing a build of ggml has depends on
 * how it was compiled and on the CPU, not on the data, so a few thousand results that agree bit by bit
 * settle it. The same probe shows that custom nodes work as ours.c needs them.
 */
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "nexus_ternary.h"

#define ROWS 72
#define COLUMNS 70
#define SEEDS 3
#define EXPERTS 3 /* of ROWS / EXPERTS rows */
#define USED 2

static uint32_t next(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

static void fill(nx_ternary_type type, uint8_t *rows, size_t n_blocks, uint64_t *state) {
    const uint32_t bytes = nx_ternary_block_bytes(type);
    for (size_t b = 0; b < n_blocks; b++, rows += bytes) {
        for (uint32_t i = 0; i < bytes; i++) rows[i] = (uint8_t)next(state);
        const uint16_t scale = (uint16_t)(0x2400 + next(state) % 0x1400); /* halves between 1/64 and 1/2 */
        const bool first = type == NX_Q2_0 || type == NX_Q1_0;
        memcpy(first ? rows : rows + bytes - 2, &scale, sizeof scale);
    }
}

static void ran(gx_tensor *node, int ith, int nth, void *argument) {
    (void)node;
    if (ith < nth) __atomic_fetch_add((int *)argument, 1, __ATOMIC_RELAXED);
}

static bool custom_nodes_work(gx_backend *cpu, gx_context *ctx, const gx_tensor *like) {
    int count = 0;
    gx_tensor node = *like;
    const struct {
        void (*function)(gx_tensor *, int, int, void *);
        int n_tasks;
        void *argument;
    } params = {ran, -1, &count};
    node.op = gx.op_custom;
    memcpy(node.op_params, &params, sizeof params);
    gx_graph *graph = gx.new_graph_custom(ctx, 4, false);
    gx.graph_add_node(graph, &node);
    return gx.backend_graph_compute_async(cpu, graph) == GX_SUCCESS && count >= 1;
}

/* The same matrix as experts, from the rows as they are stored. `columns` are the activations of x. */
static bool same_experts(gx_backend *cpu, gx_context *ctx, nx_ternary_type type, gx_tensor *w, gx_tensor *x,
                         const char *columns) {
    gx_tensor experts = *w, tokens = *x;
    experts.ne[1] = ROWS / EXPERTS;
    experts.ne[2] = EXPERTS;
    experts.nb[2] = w->nb[1] * (ROWS / EXPERTS);
    tokens.ne[1] = 1;
    tokens.ne[2] = COLUMNS;
    tokens.nb[2] = x->nb[1];
    gx_tensor *ids = gx.new_tensor_2d(ctx, gx.type_i32, USED, COLUMNS);
    for (int i = 0; i < USED * COLUMNS; i++) ((int32_t *)ids->data)[i] = (i % USED + i / 3) % EXPERTS;
    gx_tensor *y = gx.mul_mat_id(ctx, &experts, &tokens, ids);
    gx_graph *graph = gx.new_graph_custom(ctx, 4, false);
    gx.build_forward_expand(graph, y);
    if (gx.backend_graph_compute_async(cpu, graph) != GX_SUCCESS) return false;
    const uint32_t n_in = (uint32_t)w->ne[0];
    for (int i = 0; i < USED * COLUMNS; i++) {
        const char *rows = (const char *)w->data + (size_t)((int32_t *)ids->data)[i] * experts.nb[2];
        const void *column = columns + nx_ternary_activation_bytes(type, n_in) * (uint64_t)(i / USED);
        float ours[ROWS / EXPERTS], *at = ours;
        nx_ternary_multiply_stored(type, rows, w->nb[1], n_in, &column, 1, 0, ROWS / EXPERTS, &at);
        if (memcmp(ours, (const char *)y->data + (size_t)(i / USED) * y->nb[2] + (size_t)(i % USED) * y->nb[1],
                   sizeof ours) != 0)
            return false;
    }
    return true;
}

/* 1: the same bits; 0: not; -1: it cannot be told, `type` is unknown to one of both. */
static int compare(gx_backend *cpu, nx_ternary_type type, int32_t number, uint32_t n_in, uint64_t seed) {
    const size_t n_blocks = n_in / nx_ternary_block(type), row_bytes = n_blocks * nx_ternary_block_bytes(type);
    const gx_init_params params = {.mem_size = ROWS * row_bytes + (2 * ROWS + n_in) * COLUMNS * sizeof(float) +
                                               3 * gx.graph_overhead_custom(4, false) + 10 * gx.tensor_overhead() + 4096};
    gx_context *ctx = gx.init(params);
    if (!ctx) return -1;
    gx_tensor *w = gx.new_tensor_2d(ctx, number, n_in, ROWS), *x = gx.new_tensor_2d(ctx, gx.type_f32, n_in, COLUMNS);
    gx_tensor *y = gx.mul_mat(ctx, w, x);
    gx_graph *graph = gx.new_graph_custom(ctx, 4, false);
    gx.build_forward_expand(graph, y);
    uint64_t state = seed;
    fill(type, w->data, ROWS * n_blocks, &state);
    for (size_t i = 0; i < (size_t)n_in * COLUMNS; i++)
        ((float *)x->data)[i] = ((float)next(&state) / (float)(1u << 30) - 1.0f) * (i % 17 == 0 ? 8.0f : 1.0f);
    int same = gx.nbytes(w) == ROWS * row_bytes && gx.backend_graph_compute_async(cpu, graph) == GX_SUCCESS ? 1 : -1;
    if (same == 1 && !custom_nodes_work(cpu, ctx, y)) same = -1;
    nx_ternary packed;
    void *columns = NULL;
    float *ours = malloc(ROWS * COLUMNS * sizeof *ours);
    const uint64_t bytes = nx_ternary_activation_bytes(type, n_in);
    if (nx_ternary_create(type, n_in, ROWS, &packed) != NX_OK || !ours ||
        posix_memalign(&columns, 64, bytes * COLUMNS) != 0) {
        same = -1;
    } else {
        nx_ternary_pack(&packed, w->data, row_bytes, 0, ROWS);
        nx_ternary_finish(&packed);
        for (int c = 0; c < COLUMNS; c++)
            nx_ternary_activate(type, (const float *)x->data + (size_t)c * n_in, 0, (uint32_t)n_blocks,
                                (char *)columns + bytes * (uint64_t)c);
        nx_ternary_multiply(&packed, columns, COLUMNS, 0, ROWS, ours, ROWS);
        if (same == 1) same = memcmp(ours, y->data, ROWS * COLUMNS * sizeof *ours) == 0;
        if (same == 1 && nx_ternary_stored_usable(type)) same = same_experts(cpu, ctx, type, w, x, columns);
    }
    nx_ternary_free(&packed);
    free(columns);
    free(ours);
    gx.free(ctx);
    return same;
}

/* Do products with weights of this ggml type come out bit by bit the same from our kernels and from the
 * CPU backend? 1: yes, 0: no, -1: our kernels cannot be used with this type in this ggml. Needs a backend
 * that was loaded (ggml_backend_init). */
NX_API int nx_backend_same_bits(const char *type_name) {
    const nx_ternary_type type = nx_ternary_type_of(type_name);
    if (type == NX_TERNARY_TYPES || !nxb_delegate.device || gx.op_custom < 0 || !gx.view_nodes) return -1;
    int32_t number = 0;
    for (; number < 64; number++) {
        const char *name = gx.type_name(number);
        if (name && nx_ternary_type_of(name) == type) break;
    }
    if (number == 64) return -1;
    gx_backend *cpu = gx.backend_dev_init(nxb_delegate.device, NULL);
    if (!cpu) return -1;
    int same = 1;
    for (uint64_t seed = 1; seed <= SEEDS && same == 1; seed++)
        same = compare(cpu, type, number, 256 * (1 + 4 * (uint32_t)(seed - 1)), seed);
    gx.backend_free(cpu);
    return same;
}
