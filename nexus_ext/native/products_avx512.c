/* products_avx512.c: a row times eight columns; two columns in a register. See nexus_products.h.
 *
 * The sum of w * y over four neighbours is taken as the sum of w * (y + 128), less 128 times the sum of w,
 * which is the same for all columns. All of that is exact in integers; what follows are ggml's own steps.
 */
#include "products_internal.h"

#include "kernels_internal.h"

#if defined(__x86_64__)
#define MOST_PAIRS (NX_PANEL_COLUMNS / 2)
#define INLINE NX_TARGET_AVX512 static inline __attribute__((always_inline))
#include "products_blocks.h"

/* Add a block of `n_pairs` pairs of columns to `sums`, eight for each column. */
INLINE void add(block b, const nx_panel_block *columns, int n_pairs, __m512 *sums) {
    const __m512i w = _mm512_broadcast_i64x4(b.weights);
    const __m512i less = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_dpbusd_epi32(_mm512_setzero_si512(),
                                                                                      _mm512_set1_epi8(-128), w));
    const __m512 scales = _mm512_castps256_ps512(
        _mm256_mul_ps(_mm256_set1_ps(b.scale), _mm256_load_ps(columns->scales)));
    for (int p = 0; p < n_pairs; p++) {
        const __m512i sum = _mm512_dpbusd_epi32(less, _mm512_load_si512(columns->values[2 * p]), w);
        const __m512i first = _mm512_set1_epi32(2 * p), second = _mm512_set1_epi32(2 * p + 1);
        const __m512 scale = _mm512_permutexvar_ps(_mm512_mask_blend_epi32(0xff00, first, second), scales);
        sums[p] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum), sums[p]);
    }
}

INLINE void totals(const __m512 *sums, int n_pairs, float *out) {
    for (int p = 0; p < n_pairs; p++) {
        out[2 * p] = total(_mm512_castps512_ps256(sums[p]));
        out[2 * p + 1] = total(_mm512_extractf32x8_ps(sums[p], 1));
    }
}

/* Blocks one after the other. */
INLINE void one_by_one(unpack *block_at, size_t bytes, const uint8_t *row, size_t n, const nx_panel_block *panel,
                       int n_pairs, float *out) {
    __m512 sums[MOST_PAIRS];
    for (int p = 0; p < n_pairs; p++) sums[p] = _mm512_setzero_ps();
    for (size_t b = 0; b < n; b++) add(block_at(row + b * bytes), &panel[b], n_pairs, sums);
    totals(sums, n_pairs, out);
}

/* Even and odd blocks apart. */
INLINE void two_by_two(unpack *block_at, size_t bytes, const uint8_t *row, size_t n, const nx_panel_block *panel,
                       int n_pairs, float *out) {
    __m512 even[MOST_PAIRS], odd[MOST_PAIRS];
    for (int p = 0; p < n_pairs; p++) even[p] = odd[p] = _mm512_setzero_ps();
    for (size_t b = 0; b + 1 < n; b += 2) {
        add(block_at(row + b * bytes), &panel[b], n_pairs, even);
        add(block_at(row + (b + 1) * bytes), &panel[b + 1], n_pairs, odd);
    }
    for (int p = 0; p < n_pairs; p++) even[p] = _mm512_add_ps(even[p], odd[p]);
    totals(even, n_pairs, out);
}

/* The number of pairs is a constant in each of the three, so that sums stay in registers. */
#define KERNEL(type, bytes, order)                                                                           \
    NX_TARGET_AVX512 static void row_##type(const uint8_t *row, size_t n, const nx_panel_block *panel,       \
                                            size_t n_columns, float *out) {                                  \
        if (n_columns <= 2) order(type, bytes, row, n, panel, 1, out);                                       \
        else if (n_columns <= 4) order(type, bytes, row, n, panel, 2, out);                                  \
        else order(type, bytes, row, n, panel, 4, out);                                                      \
    }

KERNEL(q4_0, 18, one_by_one)
KERNEL(q8_0, 34, one_by_one)
KERNEL(iq4_nl, 18, two_by_two)
KERNEL(mxfp4, 17, two_by_two)

nx_product_kernel nx_products_avx512(nx_product_type type) {
    switch (type) {
    case NX_PRODUCT_Q4_0: return row_q4_0;
    case NX_PRODUCT_Q8_0: return row_q8_0;
    case NX_PRODUCT_IQ4_NL: return row_iq4_nl;
    case NX_PRODUCT_MXFP4: return row_mxfp4;
    default: return NULL;
    }
}

#else
nx_product_kernel nx_products_avx512(nx_product_type type) {
    (void)type;
    return NULL;
}
#endif
