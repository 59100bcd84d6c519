/* products_super_avx2.c: sixteen rows of a K type, eight at a time, times up to four columns. See
 * nexus_products.h and products_super_avx512.c.
 */
#include "products_internal.h"

#include "kernels_internal.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define INLINE NX_TARGET_AVX2 static inline __attribute__((always_inline))
#define ROWS 8
#define MINS (NX_SUPER_CHUNKS / 2)

INLINE __m256i load(const void *at) { return _mm256_load_si256(at); }

/* Add a block to the sums of group `g`, of rows from `row` on. */
INLINE void add_group(const nx_rows_super *rows, int row, nx_super_form form,
                      const nx_column_super *const *columns, size_t b, size_t n, int g, const __m256 *scales, __m256 (*sums)[NX_PRODUCT_GROUPS]) {
    __m256i products[NX_SUPER_COLUMNS];
    for (size_t c = 0; c < n; c++)
        products[c] = form == NX_SUPER_OFFSET
                          ? _mm256_madd_epi16(load(rows->mins[g] + row), _mm256_set1_epi32(columns[c][b].sums_of_16[g]))
                          : _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int j = 0; j < NX_SUPER_CHUNKS; j++) {
        const __m256i codes = load(rows->codes[j][g][row]), scale = load(rows->scales[j][g / 4] + row);
        for (size_t c = 0; c < n; c++) {
            const __m256i y = _mm256_set1_epi32(columns[c][b].values[j][g]);
            const __m256i pairs = _mm256_maddubs_epi16(codes, y);
            products[c] = _mm256_add_epi32(products[c], _mm256_madd_epi16(pairs, scale));
        }
    }
    for (size_t c = 0; c < n; c++) sums[c][g] = _mm256_fmadd_ps(scales[c], _mm256_cvtepi32_ps(products[c]), sums[c][g]);
}

INLINE void multiply(const nx_rows_super *rows, int row, size_t n_blocks, nx_super_form form,
                     const nx_column_super *const *columns, size_t n, float *const *out) {
    __m256 sums[NX_SUPER_COLUMNS][NX_PRODUCT_GROUPS], mins[NX_SUPER_COLUMNS][MINS];
    for (size_t c = 0; c < n; c++) {
        for (int g = 0; g < NX_PRODUCT_GROUPS; g++) sums[c][g] = _mm256_setzero_ps();
        for (int i = 0; i < MINS; i++) mins[c][i] = _mm256_setzero_ps();
    }
    for (size_t b = 0; b < n_blocks; b++) {
        __m256 scales[NX_SUPER_COLUMNS];
        for (size_t c = 0; c < n; c++)
            scales[c] = _mm256_mul_ps(_mm256_set1_ps(columns[c][b].scale), _mm256_load_ps(rows[b].scale + row));
        for (int g = 0; g < NX_PRODUCT_GROUPS; g++) add_group(&rows[b], row, form, columns, b, n, g, scales, sums);
        for (size_t c = 0; c < n && form == NX_SUPER_MINS; c++) {
            const __m256 scale =
                _mm256_mul_ps(_mm256_set1_ps(-columns[c][b].scale), _mm256_load_ps(rows[b].min_scale + row));
            for (int i = 0; i < MINS; i++) {
                const __m256i y = _mm256_set1_epi32(columns[c][b].sums_of_32[i]);
                const __m256i products = _mm256_madd_epi16(load(rows[b].mins[i] + row), y);
                mins[c][i] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(products), mins[c][i]);
            }
        }
    }
    for (size_t c = 0; c < n; c++) { /* ggml's trees */
        __m256 four[4];
        for (int g = 0; g < 4; g++) four[g] = _mm256_add_ps(sums[c][g + 4], sums[c][g]);
        __m256 total = _mm256_add_ps(_mm256_add_ps(four[0], four[2]), _mm256_add_ps(four[1], four[3]));
        if (form == NX_SUPER_MINS)
            total = _mm256_add_ps(total, _mm256_add_ps(_mm256_add_ps(mins[c][0], mins[c][2]),
                                                       _mm256_add_ps(mins[c][1], mins[c][3])));
        _mm256_storeu_ps(out[c] + row, total);
    }
}

#define COLUMNS(n)                                                                                           \
    case n:                                                                                                  \
        if (form == NX_SUPER_OFFSET) multiply(rows, row, n_blocks, NX_SUPER_OFFSET, columns, n, out);        \
        else multiply(rows, row, n_blocks, NX_SUPER_MINS, columns, n, out);                                  \
        break

/* The number of columns and the form are constants in each call. */
NX_TARGET_AVX2 static void kernel(const nx_rows_super *rows, size_t n_blocks, nx_super_form form,
                                  const nx_column_super *const *columns, size_t n_columns, float *const *out) {
    for (int row = 0; row < NX_PRODUCT_ROWS; row += ROWS) switch (n_columns) {
            COLUMNS(1);
            COLUMNS(2);
            COLUMNS(3);
            COLUMNS(4);
        }
}

nx_super_kernel nx_products_super_avx2(void) { return kernel; }

#else
nx_super_kernel nx_products_super_avx2(void) { return NULL; }
#endif
