/* kernels_avx512.c: the kernels for x86 with AVX-512 (F, BW, DQ, VL) and VNNI. */
#include "kernels_internal.h"

#if defined(__x86_64__)
#include <immintrin.h>

/* A line of 128 outputs is 16 words of 8 nibbles. A permutation looks at the lowest four bits of its
 * indices only, so the table of 16 products in one register is looked up by the words as they are, eight
 * times, four bits further each time. */
NX_TARGET_AVX512 static void residual_rows(const uint8_t *const *rows, const float *products, size_t n,
                                           size_t n_lines, float *sums) {
    size_t r = 0;
    for (; r + 4 <= n; r += 4) { /* four channels for each load and store of the sums */
        const __m512 p0 = _mm512_loadu_ps(products + 16 * r), p1 = _mm512_loadu_ps(products + 16 * r + 16);
        const __m512 p2 = _mm512_loadu_ps(products + 16 * r + 32), p3 = _mm512_loadu_ps(products + 16 * r + 48);
        for (size_t line = 0; line < n_lines; line++) {
            __m512i w0 = _mm512_loadu_si512(rows[r] + 64 * line), w1 = _mm512_loadu_si512(rows[r + 1] + 64 * line);
            __m512i w2 = _mm512_loadu_si512(rows[r + 2] + 64 * line), w3 = _mm512_loadu_si512(rows[r + 3] + 64 * line);
            float *sum = sums + 128 * line;
            for (size_t j = 0; j < 8; j++) {
                __m512 s = _mm512_loadu_ps(sum + 16 * j);
                s = _mm512_add_ps(s, _mm512_permutexvar_ps(w0, p0));
                s = _mm512_add_ps(s, _mm512_permutexvar_ps(w1, p1));
                s = _mm512_add_ps(s, _mm512_permutexvar_ps(w2, p2));
                s = _mm512_add_ps(s, _mm512_permutexvar_ps(w3, p3));
                _mm512_storeu_ps(sum + 16 * j, s);
                w0 = _mm512_srli_epi32(w0, 4);
                w1 = _mm512_srli_epi32(w1, 4);
                w2 = _mm512_srli_epi32(w2, 4);
                w3 = _mm512_srli_epi32(w3, 4);
            }
        }
    }
    for (; r < n; r++) {
        const __m512 p = _mm512_loadu_ps(products + 16 * r);
        for (size_t line = 0; line < n_lines; line++) {
            __m512i w = _mm512_loadu_si512(rows[r] + 64 * line);
            float *sum = sums + 128 * line;
            for (size_t j = 0; j < 8; j++) {
                _mm512_storeu_ps(sum + 16 * j,
                                 _mm512_add_ps(_mm512_loadu_ps(sum + 16 * j), _mm512_permutexvar_ps(w, p)));
                w = _mm512_srli_epi32(w, 4);
            }
        }
    }
}

const nx_kernel_table *nx_kernels_avx512(void) {
    static const nx_kernel_table table = {.residual_rows = residual_rows};
    return &table;
}
#else
const nx_kernel_table *nx_kernels_avx512(void) { return NULL; }
#endif
