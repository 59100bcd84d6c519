/* kernels_avx2_stored.c: products with rows as llama.cpp stores them, for x86 with AVX2, FMA and F16C.
 *
 * TQ2_0 and Q2_0; for the others ggml's own kernels decode no slower. Two columns share what is decoded. */
#include "kernels_internal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define INLINE __attribute__((always_inline)) NX_TARGET_AVX2 static inline

INLINE float scale_at(const uint8_t *p) {
    uint16_t d;
    memcpy(&d, p, sizeof d);
    return _cvtsh_ss(d);
}

INLINE __m256i plane_of(__m256i q, int plane) {
    return _mm256_and_si256(_mm256_srli_epi16(q, 2 * plane), _mm256_set1_epi8(3));
}

INLINE float sum_lanes(__m256 sum) {
    __m128 four = _mm_add_ps(_mm256_extractf128_ps(sum, 1), _mm256_castps256_ps128(sum));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* Products of bytes are summed in 16 bits: 8 times 2 of at most 3 * 128. */
INLINE void tq2_0_of(const uint8_t *const *rows, size_t ahead, size_t n_blocks, const nx_act_256 *const *columns,
                     const size_t n_columns, float *out) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (size_t r = 0; r < NX_STORED_ROWS; r += 2) { /* two rows for each load of activations */
        __m256 sum[2][2];
        for (size_t c = 0; c < n_columns; c++) sum[c][0] = sum[c][1] = _mm256_setzero_ps();
        for (size_t b = 0; b < n_blocks; b++) {
            __m256i dot[2][2];
            for (size_t c = 0; c < n_columns; c++) dot[c][0] = dot[c][1] = _mm256_setzero_si256();
            for (size_t i = 0; i < 2; i++) _mm_prefetch((const char *)rows[r + i] + 66 * b + ahead, _MM_HINT_T0);
            for (size_t j = 0; j < 2; j++) {
                const __m256i q0 = _mm256_loadu_si256((const __m256i *)(rows[r] + 66 * b + 32 * j));
                const __m256i q1 = _mm256_loadu_si256((const __m256i *)(rows[r + 1] + 66 * b + 32 * j));
#pragma GCC unroll 4
                for (int plane = 0; plane < 4; plane++) {
                    const __m256i c0 = plane_of(q0, plane), c1 = plane_of(q1, plane);
                    for (size_t c = 0; c < n_columns; c++) {
                        const int8_t *at = columns[c][b].q + 128 * j + 32 * (size_t)plane;
                        const __m256i y = _mm256_load_si256((const __m256i *)at);
                        dot[c][0] = _mm256_add_epi16(dot[c][0], _mm256_maddubs_epi16(c0, y));
                        dot[c][1] = _mm256_add_epi16(dot[c][1], _mm256_maddubs_epi16(c1, y));
                    }
                }
            }
            for (size_t i = 0; i < 2; i++) {
                const float scale = scale_at(rows[r + i] + 66 * b + 64);
                for (size_t c = 0; c < n_columns; c++) {
                    const __m256i start = _mm256_load_si256((const __m256i *)columns[c][b].start[0]);
                    const __m256i wide = _mm256_add_epi32(_mm256_madd_epi16(dot[c][i], ones), start);
                    const __m256 d = _mm256_set1_ps(columns[c][b].d[0] * scale);
                    sum[c][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide), d, sum[c][i]);
                }
            }
        }
        for (size_t c = 0; c < n_columns; c++)
            for (size_t i = 0; i < 2; i++) out[NX_STORED_ROWS * c + r + i] = sum_lanes(sum[c][i]);
    }
}

/* Two rows share a register, 16 bytes each: a block of 64 inputs, as planes (nx_act_64). */
INLINE __m256i two_16(const uint8_t *a, const uint8_t *b) {
    const __m128i low = _mm_loadu_si128((const __m128i *)a);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128((const __m128i *)b), 1);
}

INLINE __m256i twice(const void *at) { return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)at)); }

INLINE void q2_0_of(const uint8_t *const *rows, size_t ahead, size_t n_blocks, const nx_act_64 *const *columns,
                    const size_t n_columns, float *out) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (size_t r = 0; r < NX_STORED_ROWS; r += 4) {
        __m256 sum[2];
        for (size_t c = 0; c < n_columns; c++) sum[c] = _mm256_setzero_ps();
        for (size_t b = 0; b < n_blocks; b++) {
            if (b % 2 == 0)
                for (size_t i = 0; i < 4; i++) _mm_prefetch((const char *)rows[r + i] + 18 * b + ahead, _MM_HINT_T0);
            const __m256i q0 = two_16(rows[r] + 18 * b + 2, rows[r + 1] + 18 * b + 2);
            const __m256i q1 = two_16(rows[r + 2] + 18 * b + 2, rows[r + 3] + 18 * b + 2);
            __m256i t0[2], t1[2];
            for (size_t c = 0; c < n_columns; c++) t0[c] = t1[c] = _mm256_setzero_si256();
#pragma GCC unroll 4
            for (int plane = 0; plane < 4; plane++) {
                const __m256i c0 = plane_of(q0, plane), c1 = plane_of(q1, plane);
                for (size_t c = 0; c < n_columns; c++) {
                    const __m256i y = twice(columns[c][b].plane + 16 * plane);
                    t0[c] = _mm256_add_epi16(t0[c], _mm256_maddubs_epi16(c0, y));
                    t1[c] = _mm256_add_epi16(t1[c], _mm256_maddubs_epi16(c1, y));
                }
            }
            /* rows r and r + 1 in lanes 0 and 4, the others in lanes 2 and 6 */
            const float s0 = scale_at(rows[r] + 18 * b), s1 = scale_at(rows[r + 1] + 18 * b);
            const float s2 = scale_at(rows[r + 2] + 18 * b), s3 = scale_at(rows[r + 3] + 18 * b);
            const __m256 scale = _mm256_setr_ps(s0, s0, s2, s2, s1, s1, s3, s3);
            for (size_t c = 0; c < n_columns; c++) {
                const nx_act_64 *a = &columns[c][b];
                const __m256i start = twice(a->plane_start);
                const __m256i w0 = _mm256_add_epi32(_mm256_madd_epi16(t0[c], ones), start);
                const __m256i w1 = _mm256_add_epi32(_mm256_madd_epi16(t1[c], ones), start);
                const __m256 dot = _mm256_cvtepi32_ps(_mm256_hadd_epi32(w0, w1)); /* both halves of a block */
                const __m256 first = _mm256_mul_ps(_mm256_set1_ps(a->plane_d[0]), dot);
                const __m256 part = _mm256_fmadd_ps(_mm256_set1_ps(a->plane_d[2]), _mm256_movehdup_ps(dot), first);
                sum[c] = _mm256_fmadd_ps(scale, part, sum[c]);
            }
        }
        for (size_t c = 0; c < n_columns; c++) {
            float lanes[8];
            _mm256_storeu_ps(lanes, sum[c]);
            for (size_t i = 0; i < 4; i++) out[NX_STORED_ROWS * c + r + i] = lanes[i % 2 * 4 + i / 2 * 2];
        }
    }
}

#define STORED(name, activations)                                                                          \
    NX_TARGET_AVX2 void nx_avx2_stored_##name(const uint8_t *const *rows, size_t ahead, size_t n_blocks,    \
                                              const void *const *columns, size_t n_columns, float *out) {  \
        const activations *const *at = (const activations *const *)columns;                                \
        for (; n_columns >= 2; n_columns -= 2, at += 2, out += 2 * NX_STORED_ROWS)                         \
            name##_of(rows, ahead, n_blocks, at, 2, out);                                                  \
        if (n_columns) name##_of(rows, ahead, n_blocks, at, 1, out);                                       \
    }
STORED(tq2_0, nx_act_256)
STORED(q2_0, nx_act_64)
#else
typedef int nx_nothing_here; /* a file that is not empty */
#endif
