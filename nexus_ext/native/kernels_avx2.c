/* kernels_avx2.c: the kernels for x86 with AVX2, FMA and F16C. */
#include "kernels_internal.h"

#if defined(__x86_64__)
#include <immintrin.h>

/* Eight outputs at a time; a table of 16 products is two registers of 8 and a choice between them. */
NX_TARGET_AVX2 static void residual_rows(const uint8_t *const *rows, const float *products, size_t n, size_t n_lines,
                                         float *sums) {
    for (size_t r = 0; r < n; r++) {
        const __m256 low = _mm256_loadu_ps(products + 16 * r), high = _mm256_loadu_ps(products + 16 * r + 8);
        for (size_t half = 0; half < 2 * n_lines; half++) {
            /* words 0..7 of a line, then 8..15 */
            __m256i words = _mm256_loadu_si256((const __m256i *)(rows[r] + 32 * half));
            float *sum = sums + 128 * (half / 2) + 8 * (half % 2);
            for (size_t j = 0; j < 8; j++) {
                /* a permutation looks at three bits of an index, a blend at the sign: bit 3, shifted there */
                const __m256 from_low = _mm256_permutevar8x32_ps(low, words);
                const __m256 from_high = _mm256_permutevar8x32_ps(high, words);
                const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28));
                const __m256 product = _mm256_blendv_ps(from_low, from_high, upper);
                _mm256_storeu_ps(sum + 16 * j, _mm256_add_ps(_mm256_loadu_ps(sum + 16 * j), product));
                words = _mm256_srli_epi32(words, 4);
            }
        }
    }
}

const nx_kernel_table *nx_kernels_avx2(void) {
    static const nx_kernel_table table = {.residual_rows = residual_rows};
    return &table;
}
#else
const nx_kernel_table *nx_kernels_avx2(void) { return NULL; }
#endif
