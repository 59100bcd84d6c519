/* walk.h: one graph on its way, as graph.c and experts.c share it. */
#ifndef NEXUS_WALK_H
#define NEXUS_WALK_H

#include "backend.h"
#include "nexus_attach.h"
#include "nexus_threads.h"

#define NXB_MAX_MODELS 4 /* in one graph: a draft head that borrows the target's embedding makes two */

typedef enum { USE_SLABS, USE_ROWS, USE_EXPERTS, USE_WHOLE } nxb_use_kind;

/* One nvme weight of one node. */
typedef struct nxb_use {
    int node;
    nxb_use_kind kind;
    nx_extent *extent;
    gx_tensor *weight;
} nxb_use;

/* What one router decided, while the records of its experts are held. */
typedef struct nxb_decision {
    nx_group *group;      /* NULL: nothing is held */
    const gx_tensor *ids; /* the tensor that holds the numbers */
    int32_t *experts;     /* distinct; those that are held come first */
    size_t n, n_held;
} nxb_decision;

typedef struct nxb_run {
    nxb_backend *own;
    gx_graph *graph;
    gx_tensor **nodes;
    int begin; /* first node that is not computed yet */
    nx_model *models[NXB_MAX_MODELS];
    size_t n_models;
    size_t held[NXB_MAX_MODELS]; /* acquired slabs that the current segment reads */
    uint64_t held_bytes[NXB_MAX_MODELS];
    gx_tensor *placed[64]; /* weights whose data points into the ring */
    void *placed_home[64];
    size_t n_placed;
    nxb_decision decision;
    uint64_t generation[NXB_MAX_MODELS]; /* of each model's residency, when its uses were looked up */
    struct nxb_column *columns;          /* nodes that others stand for, see columns.c */
    size_t n_columns;
    size_t n_uses;
    bool decides, decides_for_many; /* routers: any, and for more than one token */
    bool pinned; /* the calling thread is bound, its mask was this */
    nx_thread_mask mask;
} nxb_run;

/* Our own operations, see ours.c. Source `source` of node number `node` is a weight with an attachment, or
 * one that our kernels are for; all of them are noted in order, before the walk begins. */
int nxb_ours_note(nxb_backend *, int node, const gx_tensor *, int source, nx_extent *);
/* Is this product computed by kernels of ours, for which a column is always as if it were alone? */
bool nxb_ours_computes(const gx_tensor *);
void nxb_ours_clear(nxb_backend *);
void nxb_ours_free(nxb_backend *);
/* Put into `view` (the nodes from `begin` to `end`) what we compute ourselves. */
int nxb_ours_insert(nxb_run *, gx_graph_value *view, int begin, int end);
/* Compute products that stand for node `node`, by our kernels if they are for its weight. `again`: the
 * input is that of the call before. */
int nxb_ours_product_as(nxb_run *, int node, gx_tensor *as, size_t n, bool again);
/* `node` was computed apart from the graph: compute what comes after it. */
int nxb_ours_after(nxb_run *, int node);

/* Make `node`, a copy of a node, a custom one that calls `function` on every thread of the delegate. */
typedef void (*nxb_custom_function)(gx_tensor *node, int ith, int nth, void *argument);
void nxb_make_custom(gx_tensor *node, nxb_custom_function function, void *argument);

/* Replace products of experts that kernels of ours compute, see products.c. `nodes` may become a list that
 * lasts until the next call. */
int nxb_products_replace(nxb_backend *, gx_tensor ***nodes, int *n);
/* Whether kernels of ours compute this product (a copy of a node) for `n_rows` of its rows only, which go to
 * `n_experts` different experts. It is marked as such then: rows whose numbers, one after the other in
 * memory, are negative are not computed. */
bool nxb_products_some(gx_tensor *, int64_t n_rows, int64_t n_experts);
void nxb_products_free(nxb_backend *);

/* Start reads that others have made room for: while something long is computed, by thread 0. */
void nxb_reads_go_on(nxb_backend *);

int nxb_status(nx_status);
/* Compute the nodes up to, not including, `end`, and release the slabs that they used. */
int nxb_flush(nxb_run *, int end);
/* Compute nodes that stand for node `node`; the original stays as it is. */
int nxb_compute_as(nxb_run *, int node, gx_tensor *as, size_t n);

/* From begin to end, products stand in the graph as nexus_residency.h says of nx_model_set_columns. */
int nxb_columns_begin(nxb_run *);
void nxb_columns_end(nxb_run *);

/* Bind the threads of this computation as the model wants it, see pin.c. */
int nxb_pin_begin(nxb_run *);
void nxb_pin_end(nxb_run *);

int nxb_run_experts(nxb_run *, const nxb_use *);
void nxb_experts_release(nxb_run *);

/* The router of `use` has decided, and what is missing is being read: note it, and read ahead what the next
 * layer is likely to use. */
void nxb_predict(nxb_run *, const nxb_use *use);
void nxb_predictor_free(struct nxb_predictor *);

#endif
