/* backend.h: the NEXUS device as device.c, graph.c and foreign.c share it. */
#ifndef NEXUS_BACKEND_H
#define NEXUS_BACKEND_H

#include <pthread.h>

#include "api.h"
#include "nexus_core.h"

#define NXB_NAME "NEXUS"

/* What an operation of our own says that could not be done, while the delegate computed its graph. */
typedef struct nxb_failure {
    bool failed;
    nx_error error;
} nxb_failure;

/* A backend (what llama.cpp calls a stream): one for each context. */
typedef struct nxb_backend {
    gx_backend base;
    gx_device twin;  /* base.device: like the registered device, but its default memory is the CPU's */
    gx_backend *cpu; /* computes everything */
    int n_threads;       /* of `threadpool` */
    int n_threads_asked; /* 0: nobody has said how many */
    void *threadpool; /* ours, for runtimes whose CPU backend would start threads for every graph */
    bool (*abort)(void *);
    void *abort_ctx;
    gx_context *ctx; /* holds `graph` */
    gx_graph *graph; /* for operations that we put together ourselves */
    struct nxb_use *uses;
    size_t uses_capacity;
    struct nxb_ours *ours; /* operations of our own, see ours.c */
    struct nxb_run *computing; /* while the delegate does */
    void *wave_memory;         /* see experts.c */
    size_t wave_bytes;
    nxb_failure failure;
    struct nxb_products *products; /* the same, see products.c; NULL until there is one */
    struct nxb_predictor *predictor; /* see predict.c; NULL until something is predicted */
} nxb_backend;

/* Functions of the CPU backend that are not part of ggml's public interface. */
typedef struct nxb_cpu {
    gx_device *device;
    void (*set_n_threads)(gx_backend *, int);
    void (*set_abort)(gx_backend *, bool (*)(void *), void *);
    void (*set_threadpool)(gx_backend *, void *);
    void *(*threadpool_new)(void *params);
    void (*threadpool_free)(void *);
    bool openmp; /* threads last between graphs by themselves */
} nxb_cpu;

extern nxb_cpu nxb_delegate;

/* The extent behind a tensor, or NULL when its memory is not ours. */
nx_extent *nxb_extent(const gx_tensor *);
int nxb_graph_compute(gx_backend *, gx_graph *);

/* From now on the tensors of this buffer can no longer be set. */
void nxb_mark_computing(const gx_tensor *);

/* The model that a foreign runtime was started with (NEXUS_MANIFEST), or NULL; the same while no
 * model of the runtime stands for it. */
nx_model *nxb_foreign_model(void);
nx_model *nxb_foreign_available(void);
void nxb_foreign_taken(bool taken);
/* One line for the parent process, see foreign.c. */
void nxb_foreign_report(const char *event, const char *detail);
/* The foreign runtime is told that we take this one. */
void nxb_foreign_offer(nx_extent *);
/* The foreign runtime sets a tensor of ours to `data`, which must be of the file that was planned for. */
void nxb_foreign_set(nx_extent *, const void *data, size_t nbytes);
/* A context is about to be made; false: it would compute with what is not there. */
bool nxb_foreign_context(void);

#endif
