/* kernels_avx512.c: the kernels for x86 with AVX-512 (F, BW, DQ, VL) and VNNI. */
#include "kernels_internal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>
#include <time.h>

#define NX_AHEAD 4096 /* bytes; measured: hardware prefetching stops at each page */

/* A line of 128 outputs is 16 words of 8 nibbles. A permutation looks at the lowest four bits of its
 * indices only, so the table of 16 products in one register is looked up by the words as they are, eight
 * times, four bits further each time. */
NX_TARGET_AVX512 static void residual_rows(const uint8_t *const *rows, const float *products, size_t n,
                                           size_t n_lines, float *sums) {
    size_t r = 0;
    for (; r + 4 <= n; r += 4) { /* four channels for each load and store of the sums */
        const __m512 p0 = _mm512_loadu_ps(products + 16 * r), p1 = _mm512_loadu_ps(products + 16 * r + 16);
        const __m512 p2 = _mm512_loadu_ps(products + 16 * r + 32), p3 = _mm512_loadu_ps(products + 16 * r + 48);
        const size_t ahead = r + 8 <= n ? 4 : 0; /* rows lie anywhere: no hardware guesses the next ones */
        for (size_t line = 0; line < n_lines; line++) {
            for (size_t i = 0; i < ahead; i++)
                _mm_prefetch((const char *)rows[r + 4 + i] + 64 * line, _MM_HINT_T0);
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

/* -- activations -------------------------------------------------------------------------------- */

NX_TARGET_AVX512 static void activate_256(const float *x, size_t n, nx_act_256 *out) {
    const __m512 magic = _mm512_set1_ps(12582912.0f);
    const __m512i low = _mm512_set1_epi32(0x007fffff), middle = _mm512_set1_epi32(0x00400000);
    for (size_t b = 0; b < n; b++, x += 256, out++) {
        __m512 most = _mm512_setzero_ps();
        for (int i = 0; i < 256; i += 16) /* of a number and NaN the second operand is the result */
            most = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(x + i)), most);
        const float size = _mm512_reduce_max_ps(most);
        if (size == 0) {
            memset(out, 0, sizeof *out);
            continue;
        }
        float largest = size; /* with the sign of the first that has it */
        for (int i = 0; i < 256; i += 16) {
            const __m512 v = _mm512_loadu_ps(x + i);
            const __mmask16 has = _mm512_cmp_ps_mask(_mm512_abs_ps(v), _mm512_set1_ps(size), _CMP_EQ_OQ);
            if (!has) continue;
            largest = x[i + __builtin_ctz(has)];
            break;
        }
        const float inverse = -127.0f / largest;
        const __m512 factor = _mm512_set1_ps(inverse);
        __m256i sums = _mm256_setzero_si256();
        for (int i = 0; i < 256; i += 32) {
            __m512i v[2];
            for (int h = 0; h < 2; h++) {
                const __m512 scaled = _mm512_mul_ps(factor, _mm512_loadu_ps(x + i + 16 * h));
                const __m512i bits = _mm512_castps_si512(_mm512_add_ps(scaled, magic));
                v[h] = _mm512_sub_epi32(_mm512_and_si512(bits, low), middle);
                v[h] = _mm512_min_epi32(v[h], _mm512_set1_epi32(127));
                _mm_storeu_si128((__m128i *)(out->q + i + 16 * h), _mm512_cvtepi32_epi8(v[h]));
            }
            const __m256i q = _mm256_loadu_si256((const __m256i *)(out->q + i));
            const __m256i four = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), q);
            __m128i two = _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
            two = _mm_add_epi32(two, _mm_shuffle_epi32(two, 0x4e));
            two = _mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1));
            sums = _mm256_mask_broadcastd_epi32(sums, (__mmask8)(1 << i / 32), two);
        }
        const float d = 1 / inverse;
        for (int r = 0; r < 4; r++) out->d[r] = d / (float)(1 << 2 * r);
        static const int factors[4] = {-1, -5, -21, -85};
        for (int r = 0; r < 4; r++)
            _mm256_storeu_si256((__m256i *)out->start[r], _mm256_mullo_epi32(sums, _mm256_set1_epi32(factors[r])));
    }
}

/* A block of Q8_0: its 32 numbers, and its scale. */
NX_TARGET_AVX512 static inline __m256i round_32(const float *x, float *d) {
    const __m512 v0 = _mm512_loadu_ps(x), v1 = _mm512_loadu_ps(x + 16);
    __m512 most = _mm512_max_ps(_mm512_abs_ps(v0), _mm512_setzero_ps());
    most = _mm512_max_ps(_mm512_abs_ps(v1), most);
    const float size = _mm512_reduce_max_ps(most);
    *d = _cvtsh_ss(_cvtss_sh(size / 127.0f, 0));
    const __m512 inverse = _mm512_set1_ps(size != 0 ? 127.0f / size : 0);
    /* saturating, so that what is no number (the smallest integer) becomes -128 */
    const __m128i q0 = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(v0, inverse)));
    const __m128i q1 = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(v1, inverse)));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(q0), q1, 1);
}

NX_TARGET_AVX512 static void activate_128(const float *x, size_t n, nx_act_128 *out) {
    for (size_t b = 0; b < n; b++, out++)
        for (int v = 0; v < 4; v++, x += 32) {
            const __m256i q = round_32(x, &out->d[v]);
            _mm256_storeu_si256((__m256i *)(out->q + 32 * v), q);
            const __m256i lane = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), q);
            _mm256_storeu_ps(out->lane[v], _mm256_cvtepi32_ps(lane));
        }
}

NX_TARGET_AVX512 static void activate_64(const float *x, size_t n, nx_act_64 *out) {
    for (size_t b = 0; b < n; b++, out++)
        for (int half = 0; half < 2; half++, x += 32) {
            float d;
            const __m256i q = round_32(x, &d);
            _mm256_storeu_si256((__m256i *)(out->q + 32 * half), q);
            __m128i s = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), _mm256_castsi256_si128(q));
            s = _mm_dpbusd_epi32(s, _mm_set1_epi8(1), _mm256_extracti128_si256(q, 1));
            s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
            s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
            const __m256i by_place = _mm256_shuffle_epi8(q, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                                                0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
            int64_t planes[4]; /* 8 bytes of each */
            _mm256_storeu_si256((__m256i *)planes, _mm256_permutevar8x32_epi32(
                                                       by_place, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
            for (int p = 0; p < 4; p++) memcpy(out->plane + 16 * p + 8 * half, &planes[p], sizeof planes[p]);
            out->plane_d[2 * half] = out->plane_d[2 * half + 1] = d;
            out->plane_start[2 * half] = -_mm_cvtsi128_si32(s);
            out->plane_start[2 * half + 1] = 0;
            const __m128i factors = _mm_setr_epi32(-1, -5, -21, -85);
            _mm_storeu_si128((__m128i *)out->start[half], _mm_mullo_epi32(s, factors));
            _mm_storeu_ps(out->d[half], _mm_mul_ps(_mm_set1_ps(d), _mm_setr_ps(1, 0x1p-2f, 0x1p-4f, 0x1p-6f)));
        }
}

/* -- tiles -------------------------------------------------------------------------------------- */

/* The sums of the 8 lanes of both halves: (lane + lane 4 on), then 0 + 2 and 1 + 3, then both. */
NX_TARGET_AVX512 static inline void sum_lanes(__m512 sum, float *low, float *high) {
    const __m512 swapped = _mm512_shuffle_f32x4(sum, sum, 0xb1);
    const __m512 four = _mm512_add_ps(swapped, sum);
    const __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4e));
    const __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0xb1));
    *low = _mm512_cvtss_f32(one);
    *high = _mm_cvtss_f32(_mm512_extractf32x4_ps(one, 2));
}

/* The same for four registers at once: rows 0 to 3 from the lower halves, 4 to 7 from the upper ones. */
NX_TARGET_AVX512 static inline void sum_four(const __m512 *sum, float *out) {
    __m512 four[4];
    for (int r = 0; r < 4; r++) four[r] = _mm512_add_ps(_mm512_shuffle_f32x4(sum[r], sum[r], 0xb1), sum[r]);
    const __m512 two01 =
        _mm512_add_ps(_mm512_shuffle_ps(four[0], four[1], 0x44), _mm512_shuffle_ps(four[0], four[1], 0xee));
    const __m512 two23 =
        _mm512_add_ps(_mm512_shuffle_ps(four[2], four[3], 0x44), _mm512_shuffle_ps(four[2], four[3], 0xee));
    const __m512 one = _mm512_add_ps(_mm512_shuffle_ps(two01, two23, 0x88), _mm512_shuffle_ps(two01, two23, 0xdd));
    _mm_storeu_ps(out, _mm512_castps512_ps128(one));
    _mm_storeu_ps(out + 4, _mm512_extractf32x4_ps(one, 2));
}

/* Both halves of a register are two rows with the same activations. */
__attribute__((always_inline)) NX_TARGET_AVX512 static inline void
lanes_of(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
         const nx_act_256 *const *columns, const size_t n_columns, float *out, size_t stride) {
    __m512i m0 = _mm512_set1_epi8(3), m1 = _mm512_set1_epi8(15), m2 = _mm512_set1_epi8(63);
    __asm__("" : "+v"(m0), "+v"(m1), "+v"(m2)); /* or the compiler makes them again for each block */
    __m512 sum[NX_MOST_COLUMNS][4];
    for (size_t c = 0; c < n_columns; c++)
        for (int r = 0; r < 4; r++) sum[c][r] = _mm512_setzero_ps();
    for (size_t b = 0; b < n_blocks; b++, codes += 512) {
        __m512i t[NX_MOST_COLUMNS][4];
        for (size_t c = 0; c < n_columns; c++)
            for (int r = 0; r < 4; r++)
                t[c][r] = _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i *)columns[c][b].start[r]));
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++) {
            _mm_prefetch((const char *)codes + NX_AHEAD + 64 * v, _MM_HINT_T0);
            const __m512i q = _mm512_loadu_si512(codes + 64 * v);
            const __m512i q0 = _mm512_and_si512(q, m0), q1 = _mm512_and_si512(q, m1), q2 = _mm512_and_si512(q, m2);
            for (size_t c = 0; c < n_columns; c++) {
                const __m512i y =
                    _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i *)(columns[c][b].q + 32 * v)));
                t[c][0] = _mm512_dpbusd_epi32(t[c][0], q0, y);
                t[c][1] = _mm512_dpbusd_epi32(t[c][1], q1, y);
                t[c][2] = _mm512_dpbusd_epi32(t[c][2], q2, y);
                t[c][3] = _mm512_dpbusd_epi32(t[c][3], q, y);
            }
        }
        __m512 d[4];
        if (scales) {
            const __m512 eight = _mm512_castps256_ps512(
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + 8 * b))));
            for (int r = 0; r < 4; r++) { /* row r in the lower half, row 4 + r in the upper */
                const __m512i index = _mm512_inserti64x4(_mm512_set1_epi32(r), _mm256_set1_epi32(4 + r), 1);
                d[r] = _mm512_permutexvar_ps(index, eight);
            }
        }
        for (size_t c = 0; c < n_columns; c++) {
            float factors[4] __attribute__((aligned(16)));
            _mm_store_ps(factors, _mm_mul_ps(_mm_load_ps(columns[c][b].d), _mm_set1_ps(scale)));
            __asm__("" : "+m"(factors)); /* spread over a register by the load, which costs nothing */
            for (int r = 3; r >= 0; r--) {
                const __m512i dot = r ? _mm512_sub_epi32(t[c][r], t[c][r - 1]) : t[c][0];
                const __m512 factor = scales ? _mm512_mul_ps(_mm512_set1_ps(columns[c][b].d[r]), d[r])
                                             : _mm512_set1_ps(factors[r]);
                sum[c][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, sum[c][r]);
            }
        }
    }
    for (size_t c = 0; c < n_columns; c++) sum_four(sum[c], out + c * stride);
}

NX_TARGET_AVX512 static void lanes_run(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                                       size_t n_tiles, const nx_act_256 *const *columns, size_t n_columns, float *out,
                                       size_t stride) {
#define EACH_TILE(scales, n)                                                          \
    for (size_t t = 0; t < n_tiles; t++, codes += 512 * n_blocks, at += 8 * n_blocks) \
        lanes_of(codes, scales, scale, n_blocks, columns, n, out + 8 * t, stride);    \
    break
    const uint16_t *at = scales ? scales : &(const uint16_t){0};
    switch (n_columns * 2 + (scales != NULL)) { /* each case with its numbers known */
    case 2: EACH_TILE(NULL, 1);
    case 3: EACH_TILE(at, 1);
    case 4: EACH_TILE(NULL, 2);
    case 5: EACH_TILE(at, 2);
    case 6: EACH_TILE(NULL, 3);
    case 7: EACH_TILE(at, 3);
    case 8: EACH_TILE(NULL, 4);
    default: EACH_TILE(at, 4);
    }
#undef EACH_TILE
}

NX_TARGET_AVX512 static void lanes(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                                   const nx_act_256 *const *columns, size_t n_columns, float *out) {
    lanes_run(codes, scales, scale, n_blocks, 1, columns, n_columns, out, 8);
}

/* A 32-bit lane is a row: sums need no reduction. */
__attribute__((always_inline)) NX_TARGET_AVX512 static inline void
rows_of(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks, const nx_act_64 *const *columns,
        const size_t n_columns, float *out) {
    __m512i m0 = _mm512_set1_epi8(3), m1 = _mm512_set1_epi8(15), m2 = _mm512_set1_epi8(63);
    __asm__("" : "+v"(m0), "+v"(m1), "+v"(m2)); /* or the compiler makes them again for each block */
    __m512 sum[NX_MOST_COLUMNS][4];
    for (size_t c = 0; c < n_columns; c++)
        for (int r = 0; r < 4; r++) sum[c][r] = _mm512_setzero_ps();
    for (size_t b = 0; b < n_blocks; b++) {
        __m512 part[NX_MOST_COLUMNS][4];
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++, codes += 512) {
            __m512i t[NX_MOST_COLUMNS][4];
            for (size_t c = 0; c < n_columns; c++)
                for (int r = 0; r < 4; r++) t[c][r] = _mm512_set1_epi32(columns[c][b].start[half][r]);
#pragma GCC unroll 8
            for (int v = 0; v < 8; v++) {
                _mm_prefetch((const char *)codes + NX_AHEAD + 64 * v, _MM_HINT_T0);
                const __m512i q = _mm512_loadu_si512(codes + 64 * v);
                const __m512i q0 = _mm512_and_si512(q, m0), q1 = _mm512_and_si512(q, m1),
                              q2 = _mm512_and_si512(q, m2);
                for (size_t c = 0; c < n_columns; c++) {
                    int32_t four;
                    memcpy(&four, columns[c][b].q + 32 * half + 4 * v, sizeof four);
                    const __m512i y = _mm512_set1_epi32(four);
                    t[c][0] = _mm512_dpbusd_epi32(t[c][0], q0, y);
                    t[c][1] = _mm512_dpbusd_epi32(t[c][1], q1, y);
                    t[c][2] = _mm512_dpbusd_epi32(t[c][2], q2, y);
                    t[c][3] = _mm512_dpbusd_epi32(t[c][3], q, y);
                }
            }
            for (size_t c = 0; c < n_columns; c++)
                for (int r = 3; r >= 0; r--) {
                    const __m512i dot = r ? _mm512_sub_epi32(t[c][r], t[c][r - 1]) : t[c][0];
                    const __m512 d = _mm512_set1_ps(columns[c][b].d[half][r]), f = _mm512_cvtepi32_ps(dot);
                    part[c][r] = half ? _mm512_fmadd_ps(d, f, part[c][r]) : _mm512_mul_ps(d, f);
                }
        }
        for (int r = 0; r < 4; r++) {
            const __m512 d = scales ? _mm512_cvtph_ps(_mm256_loadu_si256(
                                          (const __m256i *)(scales + 64 * b + 16 * (size_t)r)))
                                    : _mm512_set1_ps(scale);
            for (size_t c = 0; c < n_columns; c++) sum[c][r] = _mm512_fmadd_ps(d, part[c][r], sum[c][r]);
        }
    }
    for (size_t c = 0; c < n_columns; c++)
        for (int r = 0; r < 4; r++) _mm512_storeu_ps(out + 64 * c + 16 * (size_t)r, sum[c][r]);
}

NX_TARGET_AVX512 static void rows(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                                  const nx_act_64 *const *columns, size_t n_columns, float *out) {
    switch (n_columns) {
    case 1: rows_of(codes, scales, scale, n_blocks, columns, 1, out); break;
    case 2: rows_of(codes, scales, scale, n_blocks, columns, 2, out); break;
    case 3: rows_of(codes, scales, scale, n_blocks, columns, 3, out); break;
    default: rows_of(codes, scales, scale, n_blocks, columns, 4, out); break;
    }
}

/* Sixteen rows of bits: as above with a byte for eight rows, in two halves. Sums of lanes are not added up
 * over inputs as integers, since each 32 inputs have a scale of their own. */
NX_TARGET_AVX512 static void bits_of(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                                     const nx_act_128 *a, float *out) {
    static const float twice[8] = {2, 1, 0x1p-1f, 0x1p-2f, 0x1p-3f, 0x1p-4f, 0x1p-5f, 0x1p-6f};
    __m512 sum[8];
    for (int r = 0; r < 8; r++) sum[r] = _mm512_setzero_ps();
    for (size_t b = 0; b < n_blocks; b++, codes += 256) {
        __m512 part[8];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            _mm_prefetch((const char *)codes + NX_AHEAD + 64 * v, _MM_HINT_T0);
            const __m512i q = _mm512_loadu_si512(codes + 64 * v);
            const __m512i y = _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i *)(a[b].q + 32 * v)));
            const __m512 lane = _mm512_broadcast_f32x8(_mm256_load_ps(a[b].lane[v]));
            const __m512 d = _mm512_set1_ps(a[b].d[v]);
            __m512i before = _mm512_setzero_si512();
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) { /* the bits of rows up to r; what they add is 2^r times too large */
                const __m512i up_to = r < 7 ? _mm512_and_si512(q, _mm512_set1_epi8((char)((2 << r) - 1))) : q;
                const __m512i t = _mm512_dpbusd_epi32(_mm512_setzero_si512(), up_to, y);
                const __m512 f = _mm512_cvtepi32_ps(_mm512_sub_epi32(t, before));
                const __m512 s = _mm512_fmsub_ps(f, _mm512_set1_ps(twice[r]), lane);
                part[r] = v ? _mm512_fmadd_ps(d, s, part[r]) : _mm512_mul_ps(d, s);
                before = t;
            }
        }
        __m512 d16 = _mm512_set1_ps(scale);
        if (scales) d16 = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(scales + 16 * b)));
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            const __m512i index = _mm512_inserti64x4(_mm512_set1_epi32(r), _mm256_set1_epi32(8 + r), 1);
            const __m512 d = scales ? _mm512_permutexvar_ps(index, d16) : d16;
            sum[r] = _mm512_fmadd_ps(d, part[r], sum[r]);
        }
    }
    for (int r = 0; r < 8; r++) sum_lanes(sum[r], &out[r], &out[8 + r]);
}

NX_TARGET_AVX512 static void bits(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                                  const nx_act_128 *const *columns, size_t n_columns, float *out) {
    for (size_t c = 0; c < n_columns; c++) bits_of(codes, scales, scale, n_blocks, columns[c], out + 16 * c);
}

/* -- the bound ---------------------------------------------------------------------------------- */

#define CHAINS 12 /* more than latency times instructions a cycle */

NX_TARGET_AVX512 static double dots_per_second(void) {
    const __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(1);
    __m512i sum[CHAINS];
    for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_setzero_si512();
    double best = 0;
    for (int round = 0; round < 16; round++) { /* the best: others may have had the core meanwhile */
        struct timespec begin, end;
        clock_gettime(CLOCK_MONOTONIC, &begin);
        for (int n = 0; n < 50000; n++) {
#pragma GCC unroll 12
            for (int i = 0; i < CHAINS; i++) {
                sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
                __asm__ volatile("" : "+v"(sum[i]));
            }
        }
        clock_gettime(CLOCK_MONOTONIC, &end);
        const double seconds = (double)(end.tv_sec - begin.tv_sec) + (double)(end.tv_nsec - begin.tv_nsec) * 1e-9;
        const double rate = CHAINS * 50000.0 / seconds;
        if (rate > best) best = rate;
    }
    return best;
}

const nx_kernel_table *nx_kernels_avx512(void) {
    static const nx_kernel_table table = {.residual_rows = residual_rows,
                                          .activate_256 = activate_256,
                                          .activate_64 = activate_64,
                                          .activate_128 = activate_128,
                                          .lanes = lanes,
                                          .lanes_run = lanes_run,
                                          .rows = rows,
                                          .bits = bits,
                                          .dots_per_second = dots_per_second,
                                          .stored = {[NX_TQ1_0] = nx_avx512_stored_tq1_0,
                                                     [NX_TQ2_0] = nx_avx512_stored_tq2_0,
                                                     [NX_Q2_0] = nx_avx512_stored_q2_0,
                                                     [NX_Q1_0] = nx_avx512_stored_q1_0}};
    return &table;
}
#else
const nx_kernel_table *nx_kernels_avx512(void) { return NULL; }
#endif
