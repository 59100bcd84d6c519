/* nexus_threads.h: which processors the threads of a model's computations run on. */
#ifndef NEXUS_THREADS_H
#define NEXUS_THREADS_H

#include "nexus_core.h"

#ifdef __cplusplus
extern "C" {
#endif

#define NX_MAX_CORES 512

/* From the next graph on, thread i that computes with this model is bound to processor cpus[i]; threads from
 * n on are not. The thread that asks for the computation has its own mask back when it is done, the others
 * keep theirs. n = 0: bind none. NX_E_INVALID: more than NX_MAX_CORES, or numbers beyond what the system
 * has a mask for; NX_E_UNSUPPORTED: this system binds no threads. */
NX_API nx_status nx_model_set_cores(nx_model *, const uint32_t *cpus, size_t n);
/* How many, and which: up to NX_MAX_CORES. */
NX_API size_t nx_model_cores(nx_model *, uint32_t *cpus);

/* Bind the calling thread to one processor. NX_E_IO: the system refuses (it is not in the thread's cgroup). */
NX_API nx_status nx_thread_bind(uint32_t cpu);
/* The calling thread's mask, to give back later; NX_E_UNSUPPORTED as above. */
typedef struct nx_thread_mask {
    uint64_t bits[16];
} nx_thread_mask;
NX_API nx_status nx_thread_get_mask(nx_thread_mask *);
NX_API nx_status nx_thread_set_mask(const nx_thread_mask *);

#ifdef __cplusplus
}
#endif
#endif
