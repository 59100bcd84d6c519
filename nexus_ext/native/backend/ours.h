/* ours.h: operations of our own, as ours.c (which puts them into a graph) and ours_ternary.c (products with
 * weights of few bits) and ours_plugin.c (products by kernels of plugins) share them. */
#ifndef NEXUS_OURS_H
#define NEXUS_OURS_H

#include "groups.h"
#include "walk.h"

/* A node that we have a part in. */
typedef struct noted {
    int node;
    const nx_attachment *attached; /* NULL: only the kernel is ours */
    nx_ternary_type stored;        /* the weight is multiplied by as it is stored; NX_TERNARY_TYPES: not */
} noted;

/* What a custom node works on. */
typedef struct job {
    struct nxb_ours *ours;
    const nx_residual_matrix *residual;
    uint32_t k;
    const nx_ternary *packed; /* or `opencl`, or, as it is stored, src[0] of the node */
    const nx_opencl_matrix *opencl;
    const nx_attachment *attached; /* a plugin's kernel */
    nx_ternary_type type;
    uint32_t n_in;
    uint32_t next; /* of what is handed out to threads; atomic */
} job;

/* What the shared memory holds at this place in the list of nodes. */
typedef struct progress {
    const gx_tensor *chosen; /* the input that channels were chosen for, and how many */
    uint32_t chosen_k;
    const gx_tensor *activated; /* the input that was rounded, and how */
    nx_ternary_type activated_as;
    const nxp_kernel *activated_by; /* by a plugin instead; NULL: by us */
    const gx_tensor *grouped; /* the numbers of experts that were sorted, of how many experts */
    int64_t grouped_of;
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
    size_t channels_capacity;
    float *products, *sums;
    size_t sums_capacity;
    void *columns; /* of activations */
    size_t columns_capacity;
    nxb_groups groups;
    nxb_failure *failure; /* of the backend */
} nxb_ours;

#define NXB_MOST_JOBS 4 /* for one node */

/* A node that runs `function` on all threads in place of `node`, or beside it. Its job is reserved. */
gx_tensor *nxb_ours_custom(nxb_ours *, const gx_tensor *node, void (*function)(gx_tensor *, int ith, int nth, void *),
                           job);

/* Columns of floats times a plain matrix; of each row of a batch times the matrix of its expert. */
bool nxb_is_product(const gx_tensor *);
bool nxb_is_expert_product(const gx_tensor *);

/* The product of `node` as nodes of ours. Returns how many, or a status below 0. */
int nxb_packed_nodes(nxb_ours *, const gx_tensor *node, const nx_attachment *, progress *, gx_tensor **out);
int nxb_stored_nodes(nxb_ours *, const gx_tensor *node, nx_ternary_type, progress *, gx_tensor **out);
int nxb_plugin_nodes(nxb_ours *, const gx_tensor *node, const nx_attachment *, progress *, gx_tensor **out);
/* Room for so many bytes of activations, at a multiple of 64. */
bool nxb_ours_columns(nxb_ours *, uint64_t bytes);
/* Types whose activations are rounded alike have the same. */
nx_ternary_type nxb_rounded_as(nx_ternary_type);
void nxb_ternary_free(nxb_ours *);

#endif
