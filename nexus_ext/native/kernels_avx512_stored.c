/* kernels_avx512_stored.c: products with rows as llama.cpp stores them, for x86 with AVX-512 and VNNI.
 *
 * Two rows share a register, r in the lower half and 4 + r in the upper one, so that a sum of 8 lanes (the
 * order of ggml's sums, see nexus_ternary.h) is one half, and activations are the same for both halves. */
#include "kernels_internal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define PAIRS (NX_STORED_ROWS / 2)
#define INLINE __attribute__((always_inline)) NX_TARGET_AVX512 static inline

/* 32 bytes of both rows of a pair. */
INLINE __m512i pair_32(const uint8_t *const *rows, size_t pair, size_t at) {
    const __m256i low = _mm256_loadu_si256((const __m256i *)(rows[pair] + at));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low),
                              _mm256_loadu_si256((const __m256i *)(rows[PAIRS + pair] + at)), 1);
}

INLINE __m512i both(const void *at) { return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)at)); }

INLINE uint64_t half_at(const uint8_t *p) {
    uint16_t d;
    memcpy(&d, p, sizeof d);
    return d;
}

/* The scales of the rows, each `at` bytes after the beginning of its row. */
INLINE __m256 scales_at(const uint8_t *const *rows, size_t at) {
    uint64_t four[2];
    for (size_t h = 0; h < 2; h++) /* in general registers, which have little else to do */
        four[h] = half_at(rows[4 * h] + at) | half_at(rows[4 * h + 1] + at) << 16 |
                  half_at(rows[4 * h + 2] + at) << 32 | half_at(rows[4 * h + 3] + at) << 48;
    return _mm256_cvtph_ps(_mm_set_epi64x((long long)four[1], (long long)four[0]));
}

/* Of pair p: scale p in the lower half, 4 + p in the upper one. */
INLINE __m512 of_pair(__m256 scales, int p) {
    const __m512i index = _mm512_inserti64x4(_mm512_set1_epi32(p), _mm256_set1_epi32(4 + p), 1);
    return _mm512_permutexvar_ps(index, _mm512_castps256_ps512(scales));
}

/* The sums of the lanes of all rows: rows 0 to 3 from the lower halves, 4 to 7 from the upper ones. */
INLINE void sum_pairs(const __m512 *sum, float *out) {
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

/* The end of a block of 256: sums of integers times scales. */
INLINE void add_block(__m512 (*sum)[PAIRS], __m512i (*t)[PAIRS], __m256 scales, const nx_act_256 *const *columns, size_t b,
                      const size_t n_columns) {
    for (size_t c = 0; c < n_columns; c++) {
        const __m256 d = _mm256_mul_ps(_mm256_set1_ps(columns[c][b].d[0]), scales);
        for (int p = 0; p < PAIRS; p++) sum[c][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t[c][p]), of_pair(d, p), sum[c][p]);
    }
}

INLINE void ahead_of(const uint8_t *const *rows, size_t at) {
    for (size_t r = 0; r < NX_STORED_ROWS; r++) _mm_prefetch((const char *)rows[r] + at, _MM_HINT_T0);
}

INLINE void tq2_0_of(const uint8_t *const *rows, size_t ahead, size_t n_blocks, const nx_act_256 *const *columns,
                     const size_t n_columns, float *out) {
    const __m512i three = _mm512_set1_epi8(3);
    __m512 sum[NX_MOST_COLUMNS][PAIRS];
    for (size_t c = 0; c < n_columns; c++)
        for (int p = 0; p < PAIRS; p++) sum[c][p] = _mm512_setzero_ps();
    for (size_t b = 0; b < n_blocks; b++) {
        __m512i t[NX_MOST_COLUMNS][PAIRS];
        for (size_t c = 0; c < n_columns; c++)
            for (int p = 0; p < PAIRS; p++) t[c][p] = both(columns[c][b].start[0]);
        ahead_of(rows, 66 * b + ahead);
#pragma GCC unroll 2
        for (size_t j = 0; j < 2; j++) { /* 4 planes of 32 inputs in the same bytes */
            __m512i q[PAIRS];
            for (size_t p = 0; p < PAIRS; p++) q[p] = pair_32(rows, p, 66 * b + 32 * j);
#pragma GCC unroll 4
            for (int plane = 0; plane < 4; plane++) {
                __m512i y[NX_MOST_COLUMNS];
                for (size_t c = 0; c < n_columns; c++) y[c] = both(columns[c][b].q + 128 * j + 32 * plane);
#pragma GCC unroll 4
                for (size_t p = 0; p < PAIRS; p++) {
                    const __m512i code =
                        _mm512_and_si512(plane ? _mm512_srli_epi16(q[p], 2 * (unsigned)plane) : q[p], three);
                    for (size_t c = 0; c < n_columns; c++) t[c][p] = _mm512_dpbusd_epi32(t[c][p], code, y[c]);
                }
            }
        }
        add_block(sum, t, scales_at(rows, 66 * b + 64), columns, b, n_columns);
    }
    for (size_t c = 0; c < n_columns; c++) sum_pairs(sum[c], out + NX_STORED_ROWS * c);
}

INLINE __m512i times_3(__m512i x) { return _mm512_add_epi8(x, _mm512_add_epi8(x, x)); }

/* The first digit to base 3 of fractions of 256: floor(3 x / 256), by means that are rounded up unless one
 * is taken away before. */
INLINE __m512i digit(__m512i x) {
    x = _mm512_subs_epu8(x, _mm512_set1_epi8(1));
    x = _mm512_avg_epu8(x, _mm512_avg_epu8(x, _mm512_setzero_si512()));
    return _mm512_and_si512(_mm512_srli_epi16(x, 6), _mm512_set1_epi8(3));
}

INLINE void tq1_0_of(const uint8_t *const *rows, size_t ahead, size_t n_blocks, const nx_act_256 *const *columns,
                     const size_t n_columns, float *out) {
    __m512 sum[NX_MOST_COLUMNS][PAIRS];
    for (size_t c = 0; c < n_columns; c++)
        for (int p = 0; p < PAIRS; p++) sum[c][p] = _mm512_setzero_ps();
    for (size_t b = 0; b < n_blocks; b++) {
        __m512i t[NX_MOST_COLUMNS][PAIRS];
        for (size_t c = 0; c < n_columns; c++)
            for (int p = 0; p < PAIRS; p++) t[c][p] = both(columns[c][b].start[0]);
        ahead_of(rows, 54 * b + ahead);
#pragma GCC unroll 4
        for (size_t p = 0; p < PAIRS; p++) {
            __m512i x[8]; /* for 32 inputs each: what begins with their digits */
            x[0] = pair_32(rows, p, 54 * b);
            for (int v = 1; v < 5; v++) x[v] = times_3(x[v - 1]);
            /* 16 bytes of 5 digits, twice beside each other: two digits are 32 inputs */
            const __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(rows[p] + 54 * b + 32)));
            const __m256i high =
                _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(rows[PAIRS + p] + 54 * b + 32)));
            const __m512i a0 = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
            const __m512i a1 = times_3(a0), a2 = times_3(a1), a3 = times_3(a2), a4 = times_3(a3);
            x[5] = _mm512_mask_mov_epi32(a0, 0xf0f0, a1);
            x[6] = _mm512_mask_mov_epi32(a2, 0xf0f0, a3);
            /* the last 16 inputs: 4 bytes of 4 digits */
            int32_t last[2];
            memcpy(&last[0], rows[p] + 54 * b + 48, sizeof last[0]);
            memcpy(&last[1], rows[PAIRS + p] + 54 * b + 48, sizeof last[1]);
            __m512i h = _mm512_inserti64x4(_mm512_set1_epi32(last[0]), _mm256_set1_epi32(last[1]), 1);
            h = _mm512_mask_mov_epi32(h, 0xeeee, times_3(h)); /* in each four lanes the powers 0, 1, 1, 1 */
            h = _mm512_mask_mov_epi32(h, 0xcccc, times_3(h));
            h = _mm512_mask_mov_epi32(h, 0x8888, times_3(h));
            x[7] = _mm512_mask_mov_epi32(a4, 0xf0f0, h);
#pragma GCC unroll 8
            for (int v = 0; v < 8; v++) {
                const __m512i code = digit(x[v]);
                for (size_t c = 0; c < n_columns; c++)
                    t[c][p] = _mm512_dpbusd_epi32(t[c][p], code, both(columns[c][b].q + 32 * v));
            }
        }
        add_block(sum, t, scales_at(rows, 54 * b + 52), columns, b, n_columns);
    }
    for (size_t c = 0; c < n_columns; c++) sum_pairs(sum[c], out + NX_STORED_ROWS * c);
}

/* Four rows share a register, 16 bytes each: a block of 64 inputs, as planes (nx_act_64). */
INLINE __m512i four_16(const uint8_t *const *rows, size_t at) {
    __m512i q = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[0] + at)));
    q = _mm512_inserti32x4(q, _mm_loadu_si128((const __m128i *)(rows[1] + at)), 1);
    q = _mm512_inserti32x4(q, _mm_loadu_si128((const __m128i *)(rows[2] + at)), 2);
    return _mm512_inserti32x4(q, _mm_loadu_si128((const __m128i *)(rows[3] + at)), 3);
}

INLINE __m512i quarter(const void *at) { return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)at)); }

INLINE void q2_0_of(const uint8_t *const *rows, size_t ahead, size_t n_blocks, const nx_act_64 *const *columns,
                    const size_t n_columns, float *out) {
    const __m512i three = _mm512_set1_epi8(3);
    /* row r of the first four stands in lane 4 r, of the others in lane 4 r + 2 */
    const __m512i place = _mm512_setr_epi32(0, 0, 4, 4, 1, 1, 5, 5, 2, 2, 6, 6, 3, 3, 7, 7);
    __m512 sum[NX_MOST_COLUMNS];
    for (size_t c = 0; c < n_columns; c++) sum[c] = _mm512_setzero_ps();
    for (size_t b = 0; b < n_blocks; b++) {
        if (b % 2 == 0) ahead_of(rows, 18 * b + ahead);
        const __m512i q0 = four_16(rows, 18 * b + 2), q1 = four_16(rows + 4, 18 * b + 2);
        __m512i t0[NX_MOST_COLUMNS], t1[NX_MOST_COLUMNS];
        for (size_t c = 0; c < n_columns; c++) t0[c] = t1[c] = quarter(columns[c][b].plane_start);
#pragma GCC unroll 4
        for (int plane = 0; plane < 4; plane++) {
            const unsigned shift = 2 * (unsigned)plane;
            const __m512i c0 = _mm512_and_si512(plane ? _mm512_srli_epi16(q0, shift) : q0, three);
            const __m512i c1 = _mm512_and_si512(plane ? _mm512_srli_epi16(q1, shift) : q1, three);
            for (size_t c = 0; c < n_columns; c++) {
                const __m512i y = quarter(columns[c][b].plane + 16 * plane);
                t0[c] = _mm512_dpbusd_epi32(t0[c], c0, y);
                t1[c] = _mm512_dpbusd_epi32(t1[c], c1, y);
            }
        }
        const __m512 scale = _mm512_permutexvar_ps(place, _mm512_castps256_ps512(scales_at(rows, 18 * b)));
        for (size_t c = 0; c < n_columns; c++) {
            const __m512 f0 = _mm512_castsi512_ps(t0[c]), f1 = _mm512_castsi512_ps(t1[c]);
            const __m512i even = _mm512_castps_si512(_mm512_shuffle_ps(f0, f1, 0x88));
            const __m512i odd = _mm512_castps_si512(_mm512_shuffle_ps(f0, f1, 0xdd));
            const __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)); /* both halves of a block */
            const __m512 first = _mm512_mul_ps(_mm512_set1_ps(columns[c][b].plane_d[0]), dot);
            const __m512 part = _mm512_fmadd_ps(_mm512_set1_ps(columns[c][b].plane_d[2]), _mm512_movehdup_ps(dot), first);
            sum[c] = _mm512_fmadd_ps(scale, part, sum[c]);
        }
    }
    for (size_t c = 0; c < n_columns; c++) {
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm256_storeu_ps(out + NX_STORED_ROWS * c, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, sum[c])));
    }
}

/* A bit chooses an activation: a mask, and the sums of what is left. */
INLINE void q1_0_of(const uint8_t *const *rows, size_t ahead, size_t n_blocks, const nx_act_128 *const *columns,
                    const size_t n_columns, float *out) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512 sum[NX_MOST_COLUMNS][PAIRS];
    for (size_t c = 0; c < n_columns; c++)
        for (int p = 0; p < PAIRS; p++) sum[c][p] = _mm512_setzero_ps();
    for (size_t b = 0; b < n_blocks; b++) {
        __m512 part[NX_MOST_COLUMNS][PAIRS];
        if (b % 2 == 0) ahead_of(rows, 18 * b + ahead);
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; v++)
#pragma GCC unroll 4
            for (size_t p = 0; p < PAIRS; p++) {
                uint32_t low, high;
                memcpy(&low, rows[p] + 18 * b + 2 + 4 * v, sizeof low);
                memcpy(&high, rows[PAIRS + p] + 18 * b + 2 + 4 * v, sizeof high);
                const __mmask64 chosen = (__mmask64)low | (__mmask64)high << 32;
                for (size_t c = 0; c < n_columns; c++) {
                    const nx_act_128 *a = &columns[c][b];
                    const __m512i y = _mm512_maskz_mov_epi8(chosen, both(a->q + 32 * v));
                    const __m512 f = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, y));
                    const __m512 lane = _mm512_broadcast_f32x8(_mm256_loadu_ps(a->lane[v]));
                    const __m512 s = _mm512_fmsub_ps(f, _mm512_set1_ps(2), lane), d = _mm512_set1_ps(a->d[v]);
                    part[c][p] = v ? _mm512_fmadd_ps(d, s, part[c][p]) : _mm512_mul_ps(d, s);
                }
            }
        const __m256 scales = scales_at(rows, 18 * b);
        for (int p = 0; p < PAIRS; p++) {
            const __m512 d = of_pair(scales, p);
            for (size_t c = 0; c < n_columns; c++) sum[c][p] = _mm512_fmadd_ps(d, part[c][p], sum[c][p]);
        }
    }
    for (size_t c = 0; c < n_columns; c++) sum_pairs(sum[c], out + NX_STORED_ROWS * c);
}

/* The kernels, each with its number of columns known. */
#define STORED(name, activations)                                                                           \
    NX_TARGET_AVX512 void nx_avx512_stored_##name(const uint8_t *const *rows, size_t ahead, size_t n_blocks, \
                                                  const void *const *columns, size_t n_columns, float *out) { \
        const activations *const *at = (const activations *const *)columns;                                 \
        switch (n_columns) {                                                                                \
        case 1: name##_of(rows, ahead, n_blocks, at, 1, out); break;                                        \
        case 2: name##_of(rows, ahead, n_blocks, at, 2, out); break;                                        \
        case 3: name##_of(rows, ahead, n_blocks, at, 3, out); break;                                        \
        default: name##_of(rows, ahead, n_blocks, at, 4, out); break;                                       \
        }                                                                                                   \
    }
STORED(tq1_0, nx_act_256)
STORED(tq2_0, nx_act_256)
STORED(q2_0, nx_act_64)
STORED(q1_0, nx_act_128)
#else
typedef int nx_nothing_here; /* a file that is not empty */
#endif
