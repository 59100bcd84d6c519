/* threads.c: see nexus_threads.h. */
#include "nexus_threads.h"

#include <string.h>

#include "core_internal.h"

#ifdef __linux__
#include <sched.h>

_Static_assert(sizeof(cpu_set_t) == sizeof(nx_thread_mask), "a mask of the C library is 1024 bits");

nx_status nx_thread_get_mask(nx_thread_mask *mask) {
    return sched_getaffinity(0, sizeof *mask, (cpu_set_t *)(void *)mask) == 0 ? NX_OK : NX_E_IO;
}

nx_status nx_thread_set_mask(const nx_thread_mask *mask) {
    return sched_setaffinity(0, sizeof *mask, (const cpu_set_t *)(const void *)mask) == 0 ? NX_OK : NX_E_IO;
}

static nx_status supported(void) { return NX_OK; }
#else
nx_status nx_thread_get_mask(nx_thread_mask *mask) {
    memset(mask, 0, sizeof *mask);
    return NX_E_UNSUPPORTED;
}
nx_status nx_thread_set_mask(const nx_thread_mask *mask) {
    (void)mask;
    return NX_E_UNSUPPORTED;
}
static nx_status supported(void) { return NX_E_UNSUPPORTED; }
#endif

nx_status nx_thread_bind(uint32_t cpu) {
    nx_thread_mask mask = {{0}};
    if (cpu >= 8 * sizeof mask) return NX_E_INVALID;
    mask.bits[cpu / 64] = (uint64_t)1 << cpu % 64;
    return nx_thread_set_mask(&mask);
}

nx_status nx_model_set_cores(nx_model *m, const uint32_t *cpus, size_t n) {
    if (n > NX_MAX_CORES) return NX_E_INVALID;
    for (size_t i = 0; i < n; i++)
        if (cpus[i] >= 8 * sizeof(nx_thread_mask)) return NX_E_INVALID;
    if (n && supported() != NX_OK) return supported();
    pthread_mutex_lock(&m->lock);
    m->n_cores = n;
    if (n) memcpy(m->cores, cpus, n * sizeof *cpus);
    pthread_mutex_unlock(&m->lock);
    return NX_OK;
}

size_t nx_model_cores(nx_model *m, uint32_t *cpus) {
    pthread_mutex_lock(&m->lock);
    const size_t n = m->n_cores;
    if (n) memcpy(cpus, m->cores, n * sizeof *cpus);
    pthread_mutex_unlock(&m->lock);
    return n;
}
