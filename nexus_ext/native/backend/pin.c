/* pin.c: bind the delegate's threads to processors.
 *
 * Nobody hands us those threads (OpenMP's belong to libgomp, others to ggml), but each of them runs every
 * custom node: a node that binds the thread it runs on reaches them all, by the number that ggml gives
 * them. It runs before each graph, since libgomp may have begun other threads since the last one; a thread
 * that is bound already asks the system nothing. The calling thread is somebody else's: it is bound as
 * well while the graph is computed, and has its mask back afterwards. New threads inherit the mask of the
 * one that begins them, so nothing is bound before they are there.
 */
#include <string.h>

#include "nexus_threads.h"
#include "walk.h"

typedef struct order {
    uint32_t cpus[NX_MAX_CORES];
    size_t n;
    int failed; /* threads that could not be bound; atomic */
} order;

static _Thread_local uint32_t bound_to; /* plus one; 0: not bound by us */

static void bind(gx_tensor *node, int ith, int nth, void *argument) {
    (void)node;
    (void)nth;
    order *o = argument;
    if ((size_t)ith >= o->n || bound_to == o->cpus[ith] + 1) return;
    if (nx_thread_bind(o->cpus[ith]) == NX_OK) bound_to = o->cpus[ith] + 1;
    else __atomic_fetch_add(&o->failed, 1, __ATOMIC_RELAXED);
}

int nxb_pin_begin(nxb_run *r) {
    order o = {.n = r->n_models ? nx_model_cores(r->models[0], o.cpus) : 0};
    if (o.n == 0 || gx.op_custom < 0) return GX_SUCCESS;
    if (nx_thread_get_mask(&r->mask) != NX_OK) return GX_SUCCESS;
    r->pinned = true;
    gx_tensor node = {.type = gx.type_f32, .ne = {1, 1, 1, 1}, .nb = {4, 4, 4, 4}, .op = gx.op_custom, .flags = gx.flag_compute};
    float nothing = 0;
    node.data = &nothing;
    const struct {
        void (*function)(gx_tensor *, int, int, void *);
        int n_tasks;
        void *argument;
    } params = {bind, -1, &o};
    memcpy(node.op_params, &params, sizeof params);
    gx.graph_clear(r->own->graph);
    gx.graph_add_node(r->own->graph, &node);
    const int status = gx.backend_graph_compute_async(r->own->cpu, r->own->graph);
    if (status != GX_SUCCESS || !o.failed) return status;
    nx_error error;
    nx_error_set(&error, NX_E_IO, 0, "%d threads could not be bound to the processors that were chosen for them: the "
                 "set of processors of this process has changed", o.failed);
    nx_model_fail(r->models[0], &error);
    return GX_FAILED;
}

void nxb_pin_end(nxb_run *r) {
    if (!r->pinned) return;
    (void)nx_thread_set_mask(&r->mask);
    bound_to = 0;
    r->pinned = false;
}
