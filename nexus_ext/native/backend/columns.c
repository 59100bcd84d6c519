/* columns.c: products with several columns, computed so that each column comes out as if it were alone.
 *
 * CPU kernels may take another path for one column (a dot product at a time) than for several (tiles),
 * and sum in another order. A product x W with x of shape (n_in, n_columns) is therefore handed to the
 * kernel as n_columns products of one column each: x of shape (n_in, 1, n_columns), the weight broadcast
 * over the third dimension. It stays one node, and each row of the weight is still read once for all.
 *
 * The nodes of the graph are left alone, since others look at their shapes: a copy with the other shape
 * takes the node's place in the list of nodes while the graph is computed.
 */
#include <stdlib.h>

#include "nexus_residency.h"
#include "walk.h"

struct nxb_column {
    int node;
    gx_tensor *original;
    gx_tensor product, x;
};

static bool is_plane(const gx_tensor *t) { return t->ne[2] == 1 && t->ne[3] == 1; }

static bool has_columns(const gx_tensor *node) {
    return node->op == gx.op_mul_mat && is_plane(node->src[0]) && is_plane(node->src[1]) && node->src[1]->ne[1] > 1;
}

static void stand(gx_tensor *t) {
    t->ne[2] = t->ne[1];
    t->ne[1] = 1;
    t->nb[2] = t->nb[1];
    t->nb[3] = t->nb[1] * (size_t)t->ne[2];
}

int nxb_columns_begin(nxb_run *r) {
    if (!r->n_models || !nx_model_columns(r->models[0])) return GX_SUCCESS;
    const int n_nodes = gx.graph_n_nodes(r->graph);
    size_t n = 0;
    for (int i = 0; i < n_nodes; i++) n += has_columns(r->nodes[i]) && !nxb_ours_computes(r->nodes[i]);
    if (!n) return GX_SUCCESS;
    r->columns = malloc(n * sizeof *r->columns);
    if (!r->columns) return GX_ALLOC_FAILED;
    for (int i = 0; i < n_nodes; i++) {
        gx_tensor *node = r->nodes[i];
        if (!has_columns(node) || nxb_ours_computes(node)) continue;
        struct nxb_column *c = &r->columns[r->n_columns++];
        c->node = i;
        c->original = node;
        c->product = *node;
        c->x = *node->src[1];
        stand(&c->product);
        stand(&c->x);
        c->product.src[1] = &c->x;
        r->nodes[i] = &c->product;
    }
    return GX_SUCCESS;
}

void nxb_columns_end(nxb_run *r) {
    for (size_t i = 0; i < r->n_columns; i++) r->nodes[r->columns[i].node] = r->columns[i].original;
    free(r->columns);
    r->columns = NULL;
    r->n_columns = 0;
}
