/* products_avx2.c: a row times up to eight columns, a register for each column. See nexus_products.h.
 *
 * Without an instruction that adds four products of bytes, two steps do it: pairs into 16 bits, then pairs of
 * those. Weights of up to 12 are multiplied by y + 128, as products_avx512.c does. Larger ones would not fit
 * into 16 bits like that: they give their sign to y first, as ggml does.
 */
#include "products_internal.h"

#include "kernels_internal.h"

#if defined(__x86_64__)
#include <stdbool.h>

#define INLINE NX_TARGET_AVX2 static inline __attribute__((always_inline))
#include "products_blocks.h"

/* Add a block of `n` columns to `sums`, eight for each column. */
INLINE void add(block b, bool small, const nx_panel_block *columns, int n, __m256 *sums) {
    const __m256i ones = _mm256_set1_epi16(1), high = _mm256_set1_epi8(-128);
    const __m256i sizes = _mm256_sign_epi8(b.weights, b.weights);
    const __m256i more = small ? _mm256_madd_epi16(_mm256_maddubs_epi16(high, b.weights), ones) : ones;
    for (int c = 0; c < n; c++) {
        const __m256i y = _mm256_load_si256((const __m256i *)columns->values[c]);
        const __m256i pairs =
            small ? _mm256_maddubs_epi16(y, b.weights)
                  : _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(_mm256_xor_si256(y, high), b.weights));
        __m256i sum = _mm256_madd_epi16(pairs, ones);
        if (small) sum = _mm256_sub_epi32(sum, more);
        const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(b.scale), _mm256_broadcast_ss(&columns->scales[c]));
        sums[c] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sum), sums[c]);
    }
}

/* Blocks one after the other. */
INLINE void one_by_one(unpack *block_at, size_t bytes, bool small, const uint8_t *row, size_t n_blocks,
                       const nx_panel_block *panel, int n, float *out) {
    __m256 sums[NX_PANEL_COLUMNS];
    for (int c = 0; c < n; c++) sums[c] = _mm256_setzero_ps();
    for (size_t b = 0; b < n_blocks; b++) add(block_at(row + b * bytes), small, &panel[b], n, sums);
    for (int c = 0; c < n; c++) out[c] = total(sums[c]);
}

/* Even and odd blocks apart. */
INLINE void two_by_two(unpack *block_at, size_t bytes, bool small, const uint8_t *row, size_t n_blocks,
                       const nx_panel_block *panel, int n, float *out) {
    __m256 even[NX_PANEL_COLUMNS], odd[NX_PANEL_COLUMNS];
    for (int c = 0; c < n; c++) even[c] = odd[c] = _mm256_setzero_ps();
    for (size_t b = 0; b + 1 < n_blocks; b += 2) {
        add(block_at(row + b * bytes), small, &panel[b], n, even);
        add(block_at(row + (b + 1) * bytes), small, &panel[b + 1], n, odd);
    }
    for (int c = 0; c < n; c++) out[c] = total(_mm256_add_ps(even[c], odd[c]));
}

/* The number of columns is a constant in each of the three, so that sums stay in registers. */
#define KERNEL(type, bytes, small, order)                                                                    \
    NX_TARGET_AVX2 static void row_##type(const uint8_t *row, size_t n, const nx_panel_block *panel,         \
                                          size_t n_columns, float *out) {                                    \
        if (n_columns <= 2) order(type, bytes, small, row, n, panel, 2, out);                                \
        else if (n_columns <= 4) order(type, bytes, small, row, n, panel, 4, out);                           \
        else order(type, bytes, small, row, n, panel, 8, out);                                               \
    }

KERNEL(q4_0, 18, true, one_by_one)
KERNEL(q8_0, 34, false, one_by_one)
KERNEL(iq4_nl, 18, false, two_by_two)
KERNEL(mxfp4, 17, true, two_by_two)

nx_product_kernel nx_products_avx2(nx_product_type type) {
    switch (type) {
    case NX_PRODUCT_Q4_0: return row_q4_0;
    case NX_PRODUCT_Q8_0: return row_q8_0;
    case NX_PRODUCT_IQ4_NL: return row_iq4_nl;
    case NX_PRODUCT_MXFP4: return row_mxfp4;
    default: return NULL;
    }
}

#else
nx_product_kernel nx_products_avx2(nx_product_type type) {
    (void)type;
    return NULL;
}
#endif
