/* products_avx512.c: sixteen rows times up to two columns. See nexus_products.h.
 *
 * Three operations for 64 products: multiply and add in integers, which is exact; convert; scale and add. Then
 * one for the scales of a block.
 */
#include "products_internal.h"

#include "kernels_internal.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define INLINE NX_TARGET_AVX512 static inline __attribute__((always_inline))

typedef __m512 sums[NX_PRODUCT_GROUPS];

/* The blocks from `first` on, each `step`th. */
INLINE void sum(const nx_rows_block *rows, size_t n_blocks, size_t first, size_t step,
                const nx_column_block *const *columns, size_t n, sums *out) {
    for (size_t c = 0; c < n; c++)
        for (int g = 0; g < NX_PRODUCT_GROUPS; g++) out[c][g] = _mm512_setzero_ps();
    for (size_t b = first; b < n_blocks; b += step) {
        __m512 scales[NX_PRODUCT_COLUMNS];
        for (size_t c = 0; c < n; c++)
            scales[c] = _mm512_mul_ps(_mm512_load_ps(rows[b].scales), _mm512_set1_ps(columns[c][b].scale));
#pragma GCC unroll 8
        for (int g = 0; g < NX_PRODUCT_GROUPS; g++) {
            const __m512i weights = _mm512_load_si512(rows[b].weights[g]);
            for (size_t c = 0; c < n; c++) {
                const nx_column_block *y = &columns[c][b];
                const __m512i products =
                    _mm512_dpbusd_epi32(_mm512_set1_epi32(y->less[g]), weights, _mm512_set1_epi32(y->values[g]));
                out[c][g] = _mm512_fmadd_ps(scales[c], _mm512_cvtepi32_ps(products), out[c][g]);
            }
        }
    }
}

/* ggml's tree. */
INLINE __m512 total(const sums s) {
    __m512 four[4];
    for (int g = 0; g < 4; g++) four[g] = _mm512_add_ps(s[g + 4], s[g]);
    return _mm512_add_ps(_mm512_add_ps(four[0], four[2]), _mm512_add_ps(four[1], four[3]));
}

INLINE void multiply(const nx_rows_block *rows, size_t n_blocks, bool two_sums, const nx_column_block *const *columns,
                     size_t n, float *const *out) {
    sums even[NX_PRODUCT_COLUMNS];
    sum(rows, n_blocks, 0, two_sums ? 2 : 1, columns, n, even);
    if (two_sums) {
        sums odd[NX_PRODUCT_COLUMNS];
        sum(rows, n_blocks, 1, 2, columns, n, odd);
        for (size_t c = 0; c < n; c++)
            for (int g = 0; g < NX_PRODUCT_GROUPS; g++) even[c][g] = _mm512_add_ps(even[c][g], odd[c][g]);
    }
    for (size_t c = 0; c < n; c++) _mm512_storeu_ps(out[c], total(even[c]));
}

/* The number of columns is a constant in each call, so that sums stay in registers. */
NX_TARGET_AVX512 static void kernel(const nx_rows_block *rows, size_t n_blocks, nx_product_form form,
                                    const nx_column_block *const *columns, size_t n_columns, float *const *out) {
    if (n_columns == 1 && form.two_sums) multiply(rows, n_blocks, true, columns, 1, out);
    else if (n_columns == 1) multiply(rows, n_blocks, false, columns, 1, out);
    else if (form.two_sums) multiply(rows, n_blocks, true, columns, 2, out);
    else multiply(rows, n_blocks, false, columns, 2, out);
}

nx_product_kernel nx_products_avx512(void) { return kernel; }

#else
nx_product_kernel nx_products_avx512(void) { return NULL; }
#endif
