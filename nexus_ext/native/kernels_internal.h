/* kernels_internal.h: what an implementation of the kernels provides. Not installed. */
#ifndef NEXUS_KERNELS_INTERNAL_H
#define NEXUS_KERNELS_INTERNAL_H

#include "nexus_kernels.h"
#include "nexus_residual.h"
#include "ternary_internal.h"

/* Per function, not per file: nothing that the compiler makes of a header can then end up with
 * instructions that the CPU lacks, and any build compiles every file. */
#define NX_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define NX_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))

#define NX_STORED_ROWS 8 /* of one call of a kernel for rows as they are stored */

/* NX_STORED_ROWS rows as llama.cpp stores them, at any alignment, times 1 to NX_MOST_COLUMNS columns of
 * activations for their type: out[NX_STORED_ROWS * c + r]. What is `ahead` bytes further is likely next. */
typedef void nx_stored_fn(const uint8_t *const *rows, size_t ahead, size_t n_blocks, const void *const *columns,
                          size_t n_columns, float *out);

typedef struct nx_kernel_table {
    /* Add `n` input channels to `sums` (n_lines * 128 floats): sums[o] += products[16 i + code of row i].
     * rows[i] is the first line of channel i. */
    void (*residual_rows)(const uint8_t *const *rows, const float *products, size_t n, size_t n_lines,
                          float *sums);

    /* Round blocks of 256, or of 64 inputs. */
    void (*activate_256)(const float *x, size_t n, nx_act_256 *out);
    void (*activate_64)(const float *x, size_t n, nx_act_64 *out);
    void (*activate_128)(const float *x, size_t n, nx_act_128 *out);

    /* One tile of 8 rows times 1 to NX_MOST_COLUMNS columns. `scales`: 8 for each block, or NULL and
     * `scale` for all. out[8 c + r] is row r of column c. */
    void (*lanes)(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                  const nx_act_256 *const *columns, size_t n_columns, float *out);
    /* The same for tiles that follow each other: row r of tile t and column c at out[c * stride + 8 t + r].
     * NULL: nothing would be gained over one call for each. */
    void (*lanes_run)(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks, size_t n_tiles,
                      const nx_act_256 *const *columns, size_t n_columns, float *out, size_t stride);
    /* One tile of 64 rows: out[64 c + r]. */
    void (*rows)(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                 const nx_act_64 *const *columns, size_t n_columns, float *out);
    /* One tile of 16 rows of bits: out[16 c + r]. */
    void (*bits)(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                 const nx_act_128 *const *columns, size_t n_columns, float *out);
    double (*dots_per_second)(void); /* NULL: see nexus_kernels.h */
    /* By type; NULL: none that is worth it. */
    nx_stored_fn *stored[NX_TERNARY_TYPES];
} nx_kernel_table;

/* Of the reference, also for instruction sets whose own would gain nothing. */
void nx_ref_activate_256(const float *x, size_t n, nx_act_256 *out);
void nx_ref_activate_64(const float *x, size_t n, nx_act_64 *out);
void nx_ref_activate_128(const float *x, size_t n, nx_act_128 *out);
nx_stored_fn nx_ref_stored_tq1_0, nx_ref_stored_tq2_0, nx_ref_stored_q2_0, nx_ref_stored_q1_0;
nx_stored_fn nx_avx512_stored_tq1_0, nx_avx512_stored_tq2_0, nx_avx512_stored_q2_0, nx_avx512_stored_q1_0;
nx_stored_fn nx_avx2_stored_tq2_0, nx_avx2_stored_q2_0;
nx_stored_fn nx_neon_stored_tq2_0, nx_neon_stored_q2_0;

/* The sum of a row's 8 lanes, in ggml's order. */
float nx_ref_sum_lanes(const float *lanes);
/* A stored block as codes, one byte each (up to 256); returns its scale. */
uint16_t nx_ternary_unpack_block(nx_ternary_type, const uint8_t *block, uint8_t *codes);

/* Half to single precision, in software. */
float nx_half_to_float(uint16_t half);
/* The nearest half (ties to even). */
uint16_t nx_float_to_half(float value);

/* The tables; NULL where this build has no such implementation. */
const nx_kernel_table *nx_kernels_ref(void);
const nx_kernel_table *nx_kernels_avx2(void);
const nx_kernel_table *nx_kernels_avx512(void);
const nx_kernel_table *nx_kernels_neon(void);

/* The one in use. */
const nx_kernel_table *nx_kernels_table(void);

#endif
