/* imatrix.c: what llama.cpp computes, seen by the importance matrix and the activations of the core.
 *
 * The functions at the end are callbacks of ggml's scheduler (cb_eval of a context): asked whether a node is
 * wanted, and called again when that node, and nothing behind it, is computed, so that its inputs are still
 * there. They work for every model that computes in host memory, paged by this backend or not.
 */
#include "api.h"
#include "nexus_activations.h"
#include "nexus_imatrix.h"

#include <string.h>

/* A matrix of the model: what is computed from something else (keys, values) is none. */
static bool is_weight(const gx_tensor *t) {
    static const char end[] = ".weight";
    const size_t n = strnlen(t->name, sizeof t->name), m = sizeof end - 1;
    return t->op == gx.op_none && !t->view_src && n > m && memcmp(t->name + n - m, end, m) == 0;
}

static bool in_host_memory(const gx_tensor *t) {
    const gx_tensor *owner = t->view_src ? t->view_src : t;
    return t->data && owner->buffer && gx.backend_buft_is_host(owner->buffer->buft);
}

static bool wanted(const gx_tensor *node) {
    if (node->op != gx.op_mul_mat && node->op != gx.op_mul_mat_id) return false;
    const gx_tensor *w = node->src[0], *x = node->src[1];
    if (!is_weight(w) || x->type != gx.type_f32 || x->nb[0] != sizeof(float) || x->ne[0] != w->ne[0]) return false;
    return node->op == gx.op_mul_mat || node->src[2]->type == gx.type_i32;
}

static const float *row(const gx_tensor *x, int64_t i1, int64_t i2, int64_t i3) {
    return (const float *)((const char *)x->data + (size_t)i1 * x->nb[1] + (size_t)i2 * x->nb[2] +
                           (size_t)i3 * x->nb[3]);
}

/* Who gets the vectors, one after the other. */
typedef void visitor(void *to, uint32_t matrix, const float *x);

/* One matrix or a stack of them, over which the activations are broadcast. */
static void visit_dense(const gx_tensor *w, const gx_tensor *x, visitor *visit, void *to) {
    for (int64_t i3 = 0; i3 < x->ne[3]; i3++)
        for (int64_t i2 = 0; i2 < x->ne[2]; i2++) {
            const int64_t matrix = (i3 % w->ne[3]) * w->ne[2] + i2 % w->ne[2];
            for (int64_t i1 = 0; i1 < x->ne[1]; i1++) visit(to, (uint32_t)matrix, row(x, i1, i2, i3));
        }
}

/* Token t's k-th pick reads row k of x, or the one row that all share. */
static void visit_experts(const gx_tensor *x, const gx_tensor *ids, visitor *visit, void *to) {
    for (int64_t t = 0; t < ids->ne[1]; t++)
        for (int64_t k = 0; k < ids->ne[0]; k++) {
            const char *at = (const char *)ids->data + (size_t)t * ids->nb[1] + (size_t)k * ids->nb[0];
            visit(to, (uint32_t) * (const int32_t *)at, row(x, k % x->ne[1], t, 0));
        }
}

/* Can this node's inputs be read here? */
static bool readable(const gx_tensor *node) {
    return in_host_memory(node->src[1]) && (node->op != gx.op_mul_mat_id || in_host_memory(node->src[2]));
}

static void visit_inputs(const gx_tensor *node, visitor *visit, void *to) {
    if (node->op == gx.op_mul_mat) visit_dense(node->src[0], node->src[1], visit, to);
    else visit_experts(node->src[1], node->src[2], visit, to);
}

typedef struct {
    nx_imatrix *im;
    nx_imatrix_entry *e;
} imatrix_place;

static void add_squares(void *to, uint32_t matrix, const float *x) {
    const imatrix_place *place = to;
    nx_imatrix_add(place->im, place->e, matrix, x);
}

NX_API bool nx_imatrix_observe(gx_tensor *node, bool ask, void *ctx) {
    nx_imatrix *im = ctx;
    if (ask) return wanted(node);
    if (nx_imatrix_status(im) != NX_OK) return true; /* reported after the run: computing goes on */
    const gx_tensor *w = node->src[0];
    if (!readable(node)) return true;
    imatrix_place place = {im, nx_imatrix_get(im, w->name, (uint32_t)w->ne[0], (uint32_t)(w->ne[2] * w->ne[3]))};
    if (place.e) visit_inputs(node, add_squares, &place);
    return true;
}

typedef struct {
    nx_activations *all;
    size_t i;
    uint32_t n_channels;
} activations_place;

static void keep_vector(void *to, uint32_t matrix, const float *x) {
    const activations_place *place = to;
    nx_activations_add(place->all, place->i, place->n_channels, matrix, x);
}

NX_API bool nx_activations_observe(gx_tensor *node, bool ask, void *ctx) {
    activations_place place = {ctx, 0, 0};
    if (!wanted(node) || !nx_activations_find(ctx, node->src[0]->name, &place.i)) return !ask;
    if (ask) return true;
    if (nx_activations_status(ctx) != NX_OK || !readable(node)) return true;
    place.n_channels = (uint32_t)node->src[0]->ne[0];
    visit_inputs(node, keep_vector, &place);
    return true;
}
