/* nexus_membench.h: how fast all cores together read main memory.
 *
 * It knows threads and memory. It knows nothing of limits: the caller says how much memory may be
 * taken. The rate is an upper bound for anything that must read its weights from memory once.
 */
#ifndef NEXUS_MEMBENCH_H
#define NEXUS_MEMBENCH_H

#include <stdint.h>

#include "nexus_status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define NX_MEMBENCH_MAX_THREADS 1024u

/* 0 in any field means the default. */
typedef struct nx_membench_options {
    uint32_t n_threads;    /* default: the CPUs that this process may run on */
    uint64_t buffer_bytes; /* over all threads, default 256 MiB; several times the last cache is good */
    uint64_t max_ns;       /* start no pass after so much time, default 400 ms; 3 passes are always made */
} nx_membench_options;

typedef struct nx_membench_result {
    double bytes_s;        /* median over the passes */
    uint64_t bytes;        /* read in all passes */
    uint64_t ns;           /* of all passes, without setting up */
    uint64_t buffer_bytes; /* that was used: what was asked for, in whole pages for each thread */
    uint32_t n_threads;
    uint32_t n_passes;
    uint64_t checksum; /* of one pass over everything; equal for equal options */
} nx_membench_result;

/*
 * Measure. Each thread fills a part of the buffer (so that it lies near the thread that reads it)
 * and then all read their parts at the same time, pass after pass.
 *
 * NX_E_INVALID: more than NX_MEMBENCH_MAX_THREADS threads, or no `out`. NX_E_NOMEM: the buffer or a
 * thread could not be had. Everything is given back in any case. `out` is zero on failure.
 * `options` may be NULL.
 */
nx_status nx_membench_read(const nx_membench_options *options, nx_membench_result *out);

#ifdef __cplusplus
}
#endif

#endif
