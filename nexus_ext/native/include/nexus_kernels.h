/* nexus_kernels.h: matrix kernels of our own, one implementation per instruction set.
 *
 * It knows arrays and block layouts. It knows nothing of files, models, threads or ggml: a caller with
 * several threads gives each of them a range of the result.
 *
 * Which implementation runs is decided once, by what the CPU can do, and can be overridden (for tests,
 * and to compare). All implementations give the same bits.
 */
#ifndef NEXUS_KERNELS_H
#define NEXUS_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "nexus_status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum nx_isa {
    NX_ISA_REF = 0,    /* portable C */
    NX_ISA_AVX2 = 1,   /* x86: AVX2, FMA, F16C */
    NX_ISA_AVX512 = 2, /* x86: AVX-512 F, BW, DQ, VL and VNNI */
    NX_ISA_NEON = 3,   /* AArch64 with the dot product instructions */
    NX_ISA_COUNT
} nx_isa;

/* The implementation in use. */
nx_isa nx_kernels_isa(void);
/* "reference", "avx2", "avx512-vnni" or "neon-dotprod"; static storage. */
const char *nx_kernels_isa_name(nx_isa isa);
/* Can this machine run it? */
int nx_kernels_isa_usable(nx_isa isa);
/* One English sentence: what is in use and why. Static storage. */
const char *nx_kernels_why(void);
/* Measure, on the calling thread and for some milliseconds, how many of the instructions that sum products
 * of bytes (64 products each) the implementation in use can run in a second: what bounds products that come
 * out of a cache. 0: it has no such instruction, or it was not looked into. */
double nx_kernels_dots_per_second(void);
/* Use another implementation from now on, in every thread. NX_E_UNSUPPORTED: this machine cannot. */
nx_status nx_kernels_use_isa(nx_isa isa);

#ifdef __cplusplus
}
#endif
#endif
