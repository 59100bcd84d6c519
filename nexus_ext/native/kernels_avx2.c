/* kernels_avx2.c: the kernels for x86 with AVX2, FMA and F16C. */
#include "kernels_internal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

/* Eight outputs at a time; a table of 16 products is two registers of 8 and a choice between them. */
NX_TARGET_AVX2 static void residual_rows(const uint8_t *const *rows, const float *products, size_t n, size_t n_lines,
                                         float *sums) {
    for (size_t r = 0; r < n; r++) {
        const __m256 low = _mm256_loadu_ps(products + 16 * r), high = _mm256_loadu_ps(products + 16 * r + 8);
        for (size_t half = 0; half < 2 * n_lines; half++) {
            /* words 0..7 of a line, then 8..15 */
            if (r + 4 < n) _mm_prefetch((const char *)rows[r + 4] + 32 * half, _MM_HINT_T0);
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

/* -- tiles -------------------------------------------------------------------------------------- */

#define NX_AHEAD 4096 /* bytes, as in kernels_avx512.c */

/* Without VNNI products of bytes are summed in 16 bits, where only single rows fit: 8 times 2 products of
 * at most 3 * 128. */
NX_TARGET_AVX2 static inline __m256i plane(__m256i q, int r) {
    return _mm256_and_si256(_mm256_srli_epi16(q, 2 * r), _mm256_set1_epi8(3));
}

NX_TARGET_AVX2 static inline float sum_lanes(__m256 sum) {
    __m128 four = _mm_add_ps(_mm256_extractf128_ps(sum, 1), _mm256_castps256_ps128(sum));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* Four rows at a time: half a tile. */
__attribute__((always_inline)) NX_TARGET_AVX2 static inline void
lanes_of(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
         const nx_act_256 *const *columns, const size_t n_columns, float *out) {
    for (size_t h = 0; h < 2; h++) {
        __m256 sum[2][4];
        for (size_t c = 0; c < n_columns; c++)
            for (int r = 0; r < 4; r++) sum[c][r] = _mm256_setzero_ps();
        for (size_t b = 0; b < n_blocks; b++) {
            __m256i dot[2][4];
            for (size_t c = 0; c < n_columns; c++)
                for (int r = 0; r < 4; r++) dot[c][r] = _mm256_setzero_si256();
            for (size_t v = 0; v < 8; v++) {
                _mm_prefetch((const char *)codes + 512 * b + 64 * v + NX_AHEAD, _MM_HINT_T0);
                const __m256i q = _mm256_loadu_si256((const __m256i *)(codes + 512 * b + 64 * v + 32 * h));
                const __m256i q0 = plane(q, 0), q1 = plane(q, 1), q2 = plane(q, 2), q3 = plane(q, 3);
                for (size_t c = 0; c < n_columns; c++) {
                    const __m256i y = _mm256_load_si256((const __m256i *)(columns[c][b].q + 32 * v));
                    dot[c][0] = _mm256_add_epi16(dot[c][0], _mm256_maddubs_epi16(q0, y));
                    dot[c][1] = _mm256_add_epi16(dot[c][1], _mm256_maddubs_epi16(q1, y));
                    dot[c][2] = _mm256_add_epi16(dot[c][2], _mm256_maddubs_epi16(q2, y));
                    dot[c][3] = _mm256_add_epi16(dot[c][3], _mm256_maddubs_epi16(q3, y));
                }
            }
            for (size_t c = 0; c < n_columns; c++)
                for (size_t r = 0; r < 4; r++) {
                    const __m256i start = _mm256_load_si256((const __m256i *)columns[c][b].start[0]);
                    const __m256i wide =
                        _mm256_add_epi32(_mm256_madd_epi16(dot[c][r], _mm256_set1_epi16(1)), start);
                    const float d = columns[c][b].d[0] * (scales ? _cvtsh_ss(scales[8 * b + 4 * h + r]) : scale);
                    sum[c][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(d), sum[c][r]);
                }
        }
        for (size_t c = 0; c < n_columns; c++)
            for (size_t r = 0; r < 4; r++) out[8 * c + 4 * h + r] = sum_lanes(sum[c][r]);
    }
}

NX_TARGET_AVX2 static void lanes(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                                 const nx_act_256 *const *columns, size_t n_columns, float *out) {
    for (; n_columns >= 2; n_columns -= 2, columns += 2, out += 16)
        lanes_of(codes, scales, scale, n_blocks, columns, 2, out);
    if (n_columns) lanes_of(codes, scales, scale, n_blocks, columns, 1, out);
}

/* Eight of the 16 rows of a lane group, in each of the four places of a byte. */
__attribute__((always_inline)) NX_TARGET_AVX2 static inline void
rows_of(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks, const nx_act_64 *const *columns,
        const size_t n_columns, float *out) {
    for (size_t h = 0; h < 2; h++) {
        __m256 sum[2][4], part[2][4];
        for (size_t c = 0; c < n_columns; c++)
            for (int r = 0; r < 4; r++) sum[c][r] = _mm256_setzero_ps();
        for (size_t b = 0; b < n_blocks; b++) {
            for (size_t half = 0; half < 2; half++) {
                __m256i dot[2][4];
                for (size_t c = 0; c < n_columns; c++)
                    for (int r = 0; r < 4; r++) dot[c][r] = _mm256_setzero_si256();
                for (size_t v = 8 * half; v < 8 * half + 8; v++) {
                    _mm_prefetch((const char *)codes + 1024 * b + 64 * v + NX_AHEAD, _MM_HINT_T0);
                    const __m256i q = _mm256_loadu_si256((const __m256i *)(codes + 1024 * b + 64 * v + 32 * h));
                    const __m256i q0 = plane(q, 0), q1 = plane(q, 1), q2 = plane(q, 2), q3 = plane(q, 3);
                    for (size_t c = 0; c < n_columns; c++) {
                        int32_t four;
                        memcpy(&four, columns[c][b].q + 4 * v, sizeof four);
                        const __m256i y = _mm256_set1_epi32(four);
                        dot[c][0] = _mm256_add_epi16(dot[c][0], _mm256_maddubs_epi16(q0, y));
                        dot[c][1] = _mm256_add_epi16(dot[c][1], _mm256_maddubs_epi16(q1, y));
                        dot[c][2] = _mm256_add_epi16(dot[c][2], _mm256_maddubs_epi16(q2, y));
                        dot[c][3] = _mm256_add_epi16(dot[c][3], _mm256_maddubs_epi16(q3, y));
                    }
                }
                for (size_t c = 0; c < n_columns; c++)
                    for (int r = 0; r < 4; r++) {
                        const __m256i start = _mm256_set1_epi32(columns[c][b].start[half][0]);
                        const __m256i wide =
                            _mm256_add_epi32(_mm256_madd_epi16(dot[c][r], _mm256_set1_epi16(1)), start);
                        const __m256 d = _mm256_set1_ps(columns[c][b].d[half][0]), f = _mm256_cvtepi32_ps(wide);
                        part[c][r] = half ? _mm256_fmadd_ps(d, f, part[c][r]) : _mm256_mul_ps(d, f);
                    }
            }
            for (size_t r = 0; r < 4; r++) {
                const __m256 d =
                    scales ? _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + 64 * b + 16 * r + 8 * h)))
                           : _mm256_set1_ps(scale);
                for (size_t c = 0; c < n_columns; c++) sum[c][r] = _mm256_fmadd_ps(d, part[c][r], sum[c][r]);
            }
        }
        for (size_t c = 0; c < n_columns; c++)
            for (size_t r = 0; r < 4; r++) _mm256_storeu_ps(out + 64 * c + 16 * r + 8 * h, sum[c][r]);
    }
}

NX_TARGET_AVX2 static void rows(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                                const nx_act_64 *const *columns, size_t n_columns, float *out) {
    for (; n_columns >= 2; n_columns -= 2, columns += 2, out += 128)
        rows_of(codes, scales, scale, n_blocks, columns, 2, out);
    if (n_columns) rows_of(codes, scales, scale, n_blocks, columns, 1, out);
}

/* Eight rows of bits at a time. */
NX_TARGET_AVX2 static void bits(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                                const nx_act_128 *const *columns, size_t n_columns, float *out) {
    const __m256i ones = _mm256_set1_epi16(1), one = _mm256_set1_epi8(1);
    for (size_t c = 0; c < n_columns; c++)
        for (size_t h = 0; h < 2; h++) {
            __m256 sum[8];
            for (int r = 0; r < 8; r++) sum[r] = _mm256_setzero_ps();
            for (size_t b = 0; b < n_blocks; b++) {
                const nx_act_128 *a = &columns[c][b];
                __m256 part[8];
                for (size_t v = 0; v < 4; v++) {
                    const __m256i q = _mm256_loadu_si256((const __m256i *)(codes + 256 * b + 64 * v + 32 * h));
                    const __m256i y = _mm256_load_si256((const __m256i *)(a->q + 32 * v));
                    const __m256 lane = _mm256_load_ps(a->lane[v]), d = _mm256_set1_ps(a->d[v]);
                    for (int r = 0; r < 8; r++) {
                        const __m256i bit = _mm256_and_si256(_mm256_srli_epi16(q, r), one);
                        const __m256i dot = _mm256_madd_epi16(_mm256_maddubs_epi16(bit, y), ones);
                        const __m256 f = _mm256_cvtepi32_ps(_mm256_add_epi32(dot, dot));
                        const __m256 s = _mm256_sub_ps(f, lane);
                        part[r] = v ? _mm256_fmadd_ps(d, s, part[r]) : _mm256_mul_ps(d, s);
                    }
                }
                for (size_t r = 0; r < 8; r++) {
                    const float d = scales ? _cvtsh_ss(scales[16 * b + 8 * h + r]) : scale;
                    sum[r] = _mm256_fmadd_ps(_mm256_set1_ps(d), part[r], sum[r]);
                }
            }
            for (size_t r = 0; r < 8; r++) out[16 * c + 8 * h + r] = sum_lanes(sum[r]);
        }
}

const nx_kernel_table *nx_kernels_avx2(void) {
    static const nx_kernel_table table = {.residual_rows = residual_rows,
                                          .activate_256 = nx_ref_activate_256,
                                          .activate_64 = nx_ref_activate_64,
                                          .activate_128 = nx_ref_activate_128,
                                          .lanes = lanes,
                                          .rows = rows,
                                          .bits = bits,
                                          .stored = {[NX_TQ2_0] = nx_avx2_stored_tq2_0,
                                                     [NX_Q2_0] = nx_avx2_stored_q2_0}};
    return &table;
}
#else
const nx_kernel_table *nx_kernels_avx2(void) { return NULL; }
#endif
