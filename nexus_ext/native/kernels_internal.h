/* kernels_internal.h: what an implementation of the kernels provides. Not installed. */
#ifndef NEXUS_KERNELS_INTERNAL_H
#define NEXUS_KERNELS_INTERNAL_H

#include "nexus_kernels.h"
#include "nexus_residual.h"

/* Per function, not per file: nothing that the compiler makes of a header can then end up with
 * instructions that the CPU lacks, and any build compiles every file. */
#define NX_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define NX_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))

typedef struct nx_kernel_table {
    /* Add `n` input channels to `sums` (n_lines * 128 floats): sums[o] += products[16 i + code of row i].
     * rows[i] is the first line of channel i. */
    void (*residual_rows)(const uint8_t *const *rows, const float *products, size_t n, size_t n_lines,
                          float *sums);
} nx_kernel_table;

/* The tables; NULL where this build has no such implementation. */
const nx_kernel_table *nx_kernels_ref(void);
const nx_kernel_table *nx_kernels_avx2(void);
const nx_kernel_table *nx_kernels_avx512(void);
const nx_kernel_table *nx_kernels_neon(void);

/* The one in use. */
const nx_kernel_table *nx_kernels_table(void);

#endif
