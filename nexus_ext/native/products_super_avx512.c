/* products_super_avx512.c: sixteen rows of a K type times up to four columns. See nexus_products.h.
 *
 * Two operations for 64 products: bytes into sums of two in 16 bits; those times their scale, added in pairs.
 * In integers that is exact; what follows, once in 256 weights, are ggml's own steps.
 */
#include "products_internal.h"

#include "kernels_internal.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define INLINE NX_TARGET_AVX512 static inline __attribute__((always_inline))
#define MINS (NX_SUPER_CHUNKS / 2)

INLINE __m512i load(const void *at) { return _mm512_load_si512(at); }

/* Add a block to the sums of group `g`. */
INLINE void add_group(const nx_rows_super *rows, nx_super_form form, const nx_column_super *const *columns,
                      size_t b, size_t n, int g, const __m512 *scales, __m512 (*sums)[NX_PRODUCT_GROUPS]) {
    __m512i products[NX_SUPER_COLUMNS];
    for (size_t c = 0; c < n; c++)
        products[c] = form == NX_SUPER_OFFSET
                          ? _mm512_madd_epi16(load(rows->mins[g]), _mm512_set1_epi32(columns[c][b].sums_of_16[g]))
                          : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int j = 0; j < NX_SUPER_CHUNKS; j++) {
        const __m512i codes = load(rows->codes[j][g]), scale = load(rows->scales[j][g / 4]);
        for (size_t c = 0; c < n; c++) {
            const __m512i y = _mm512_set1_epi32(columns[c][b].values[j][g]);
            products[c] = _mm512_dpwssd_epi32(products[c], _mm512_maddubs_epi16(codes, y), scale);
        }
    }
    for (size_t c = 0; c < n; c++) sums[c][g] = _mm512_fmadd_ps(scales[c], _mm512_cvtepi32_ps(products[c]), sums[c][g]);
}

INLINE void multiply(const nx_rows_super *rows, size_t n_blocks, nx_super_form form,
                     const nx_column_super *const *columns, size_t n, float *const *out) {
    __m512 sums[NX_SUPER_COLUMNS][NX_PRODUCT_GROUPS], mins[NX_SUPER_COLUMNS][MINS];
    for (size_t c = 0; c < n; c++) {
        for (int g = 0; g < NX_PRODUCT_GROUPS; g++) sums[c][g] = _mm512_setzero_ps();
        for (int i = 0; i < MINS; i++) mins[c][i] = _mm512_setzero_ps();
    }
    for (size_t b = 0; b < n_blocks; b++) {
        __m512 scales[NX_SUPER_COLUMNS];
        for (size_t c = 0; c < n; c++)
            scales[c] = _mm512_mul_ps(_mm512_set1_ps(columns[c][b].scale), _mm512_load_ps(rows[b].scale));
        for (int g = 0; g < NX_PRODUCT_GROUPS; g++) add_group(&rows[b], form, columns, b, n, g, scales, sums);
        for (size_t c = 0; c < n && form == NX_SUPER_MINS; c++) {
            const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(-columns[c][b].scale), _mm512_load_ps(rows[b].min_scale));
            for (int i = 0; i < MINS; i++) {
                const __m512i y = _mm512_set1_epi32(columns[c][b].sums_of_32[i]);
                const __m512i products = _mm512_madd_epi16(load(rows[b].mins[i]), y);
                mins[c][i] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(products), mins[c][i]);
            }
        }
    }
    for (size_t c = 0; c < n; c++) { /* ggml's trees */
        __m512 four[4];
        for (int g = 0; g < 4; g++) four[g] = _mm512_add_ps(sums[c][g + 4], sums[c][g]);
        __m512 total = _mm512_add_ps(_mm512_add_ps(four[0], four[2]), _mm512_add_ps(four[1], four[3]));
        if (form == NX_SUPER_MINS)
            total = _mm512_add_ps(total, _mm512_add_ps(_mm512_add_ps(mins[c][0], mins[c][2]),
                                                       _mm512_add_ps(mins[c][1], mins[c][3])));
        _mm512_storeu_ps(out[c], total);
    }
}

#define COLUMNS(n)                                                                                           \
    case n:                                                                                                  \
        if (form == NX_SUPER_OFFSET) multiply(rows, n_blocks, NX_SUPER_OFFSET, columns, n, out);             \
        else multiply(rows, n_blocks, NX_SUPER_MINS, columns, n, out);                                       \
        break

/* The number of columns and the form are constants in each call. */
NX_TARGET_AVX512 static void kernel(const nx_rows_super *rows, size_t n_blocks, nx_super_form form,
                                    const nx_column_super *const *columns, size_t n_columns, float *const *out) {
    switch (n_columns) {
        COLUMNS(1);
        COLUMNS(2);
        COLUMNS(3);
        COLUMNS(4);
    }
}

nx_super_kernel nx_products_super_avx512(void) { return kernel; }

#else
nx_super_kernel nx_products_super_avx512(void) { return NULL; }
#endif
