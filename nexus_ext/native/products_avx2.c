/* products_avx2.c: sixteen rows, eight at a time, times a column. See nexus_products.h.
 *
 * Without an instruction that adds four products of bytes, two steps do it: pairs into 16 bits, then pairs of
 * those. Weights that would not fit into 16 bits with an offset have none: they give their sign to the column
 * first, as in ggml.
 */
#include "products_internal.h"

#include "kernels_internal.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define INLINE NX_TARGET_AVX2 static inline __attribute__((always_inline))
#define ROWS 8

/* The blocks from `first` on, each `step`th, of rows from `row` on. */
INLINE void sum(const nx_rows_block *rows, int row, size_t n_blocks, size_t first, size_t step, bool has_offset,
                const nx_column_block *column, __m256 *out) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int g = 0; g < NX_PRODUCT_GROUPS; g++) out[g] = _mm256_setzero_ps();
    for (size_t b = first; b < n_blocks; b += step) {
        const nx_column_block *y = &column[b];
        const __m256 scales = _mm256_mul_ps(_mm256_load_ps(rows[b].scales + row), _mm256_set1_ps(y->scale));
#pragma GCC unroll 8
        for (int g = 0; g < NX_PRODUCT_GROUPS; g++) {
            const __m256i weights = _mm256_load_si256((const __m256i *)rows[b].weights[g][row]);
            const __m256i values = _mm256_set1_epi32(y->values[g]);
            __m256i products;
            if (has_offset) {
                products = _mm256_madd_epi16(_mm256_maddubs_epi16(weights, values), ones);
                products = _mm256_add_epi32(products, _mm256_set1_epi32(y->less[g]));
            } else {
                const __m256i signed_values = _mm256_sign_epi8(values, weights);
                products = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(weights), signed_values), ones);
            }
            out[g] = _mm256_fmadd_ps(scales, _mm256_cvtepi32_ps(products), out[g]);
        }
    }
}

/* ggml's tree. */
INLINE __m256 total(const __m256 *s) {
    __m256 four[4];
    for (int g = 0; g < 4; g++) four[g] = _mm256_add_ps(s[g + 4], s[g]);
    return _mm256_add_ps(_mm256_add_ps(four[0], four[2]), _mm256_add_ps(four[1], four[3]));
}

INLINE void multiply(const nx_rows_block *rows, size_t n_blocks, bool two_sums, bool has_offset,
                     const nx_column_block *column, float *out) {
    for (int row = 0; row < NX_PRODUCT_ROWS; row += ROWS) {
        __m256 even[NX_PRODUCT_GROUPS];
        sum(rows, row, n_blocks, 0, two_sums ? 2 : 1, has_offset, column, even);
        if (two_sums) {
            __m256 odd[NX_PRODUCT_GROUPS];
            sum(rows, row, n_blocks, 1, 2, has_offset, column, odd);
            for (int g = 0; g < NX_PRODUCT_GROUPS; g++) even[g] = _mm256_add_ps(even[g], odd[g]);
        }
        _mm256_storeu_ps(out + row, total(even));
    }
}

NX_TARGET_AVX2 static void kernel(const nx_rows_block *rows, size_t n_blocks, nx_product_form form,
                                  const nx_column_block *const *columns, size_t n_columns, float *const *out) {
    for (size_t c = 0; c < n_columns; c++) {
        if (form.two_sums && form.offset) multiply(rows, n_blocks, true, true, columns[c], out[c]);
        else if (form.two_sums) multiply(rows, n_blocks, true, false, columns[c], out[c]);
        else if (form.offset) multiply(rows, n_blocks, false, true, columns[c], out[c]);
        else multiply(rows, n_blocks, false, false, columns[c], out[c]);
    }
}

nx_product_kernel nx_products_avx2(void) { return kernel; }

#else
nx_product_kernel nx_products_avx2(void) { return NULL; }
#endif
