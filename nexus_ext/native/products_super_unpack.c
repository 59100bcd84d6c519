/* products_super_unpack.c: sixteen rows of a K type as bytes, side by side in groups of four. See nexus_products.h. */
#include "products_internal.h"

#include "kernels_internal.h"

#if defined(__x86_64__)
#include "products_transpose.h"

/* Eight numbers of each row, by number: out[i] has number i of all rows. */
INLINE void transpose_eight(const __m256i *rows, __m256i *out) {
    __m256i a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        out[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        out[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

/* Eight numbers of 8 bits, each twice in 16. */
INLINE __m256i twice(__m256i numbers) {
    return _mm256_or_si256(_mm256_slli_epi32(numbers, 16), _mm256_and_si256(numbers, _mm256_set1_epi32(0xffff)));
}

INLINE void store(const __m256i groups[NX_PRODUCT_GROUPS], int first_row, uint8_t (*to)[NX_PRODUCT_ROWS][4]) {
    for (int g = 0; g < NX_PRODUCT_GROUPS; g++) _mm256_store_si256((__m256i *)to[g][first_row], groups[g]);
}

/* Eight scales and eight minimums of six bits, a byte each. */
INLINE void six_bits(const uint8_t *packed, __m128i *scales, __m128i *mins) {
    uint32_t w[3];
    memcpy(w, packed, sizeof w);
    const uint32_t low = 0x3f3f3f3fu, nibble = 0x0f0f0f0fu, high = 0x30303030u;
    const uint64_t more_scales = (w[2] & nibble) | (w[0] >> 2 & high), more_mins = (w[2] >> 4 & nibble) | (w[1] >> 2 & high);
    *scales = _mm_cvtsi64_si128((long long)(more_scales << 32 | (w[0] & low)));
    *mins = _mm_cvtsi64_si128((long long)(more_mins << 32 | (w[1] & low)));
}

/* Block: scale and scale of minimums (halves), 12 bytes of scales, 128 of codes: 32 low halves, 32 high ones, ... */
INLINE void q4_k(const uint8_t *const *rows, size_t at, int first_row, nx_rows_super *to) {
    __m256i numbers[ROWS], scales[8], groups[NX_PRODUCT_GROUPS], high[NX_PRODUCT_GROUPS];
    __m128i mins[ROWS];
    for (int r = 0; r < ROWS; r++) {
        __m128i s, m;
        six_bits(rows[r] + at + 4, &s, &m);
        numbers[r] = twice(_mm256_cvtepu8_epi32(s));
        mins[r] = _mm_cvtepu8_epi16(m);
    }
    transpose_eight(numbers, scales);
    for (int j = 0; j < NX_SUPER_CHUNKS; j++)
        for (int h = 0; h < 2; h++) _mm256_store_si256((__m256i *)(to->scales[j][h] + first_row), scales[j]);
    for (int i = 0; i < 4; i++)
        numbers[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(mins[i]), mins[i + 4], 1);
    transpose_registers(numbers, groups);
    for (int i = 0; i < NX_SUPER_CHUNKS / 2; i++) _mm256_store_si256((__m256i *)(to->mins[i] + first_row), groups[i]);
    for (int j = 0; j < NX_SUPER_CHUNKS; j += 2) {
        const size_t codes = at + 16 + 16 * (size_t)j;
        const __m256i low = _mm256_set1_epi8(15);
        transpose(rows, codes, groups);
        transpose(rows, codes + 16, groups + 4);
        for (int g = 0; g < NX_PRODUCT_GROUPS; g++) {
            high[g] = _mm256_and_si256(_mm256_srli_epi16(groups[g], 4), low);
            groups[g] = _mm256_and_si256(groups[g], low);
        }
        store(groups, first_row, to->codes[j]);
        store(high, first_row, to->codes[j + 1]);
    }
    _mm256_store_ps(to->scale + first_row, halves(rows, at));
    _mm256_store_ps(to->min_scale + first_row, halves(rows, at + 2));
}

/* Block: 128 bytes of low halves, 64 of two high bits, 16 scales, a scale (half); a code is 32 more than its weight. */
INLINE void q6_k(const uint8_t *const *rows, size_t at, int first_row, nx_rows_super *to) {
    __m256i numbers[ROWS], more[ROWS], scales[8];
    for (int h = 0; h < 2; h++) {
        for (int r = 0; r < ROWS; r++) { /* of chunks 4 h to 4 h + 3, of both halves */
            const uint8_t *from = rows[r] + at + 192 + 8 * h;
            numbers[r] = twice(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
        }
        transpose_eight(numbers, scales);
        for (int i = 0; i < 8; i++)
            _mm256_store_si256((__m256i *)(to->scales[4 * h + i / 2][i % 2] + first_row), scales[i]);
    }
    for (int r = 0; r < ROWS; r++) {
        const __m128i from = _mm_loadu_si128((const __m128i *)(rows[r] + at + 192));
        numbers[r] = _mm256_mullo_epi16(_mm256_cvtepi8_epi16(from), _mm256_set1_epi16(-32));
    }
    transpose_eight(numbers, more);
    for (int i = 0; i < NX_SUPER_CHUNKS; i++) _mm256_store_si256((__m256i *)(to->mins[i] + first_row), more[i]);
    const __m256i low = _mm256_set1_epi8(15), two = _mm256_set1_epi8(0x30);
    for (size_t half = 0; half < 2; half++) {
        __m256i first[8], second[8], high[8], chunks[4][8];
        for (size_t h = 0; h < 2; h++) {
            transpose(rows, at + 64 * half + 16 * h, first + 4 * h);
            transpose(rows, at + 64 * half + 32 + 16 * h, second + 4 * h);
            transpose(rows, at + 128 + 32 * half + 16 * h, high + 4 * h);
        }
        for (int g = 0; g < NX_PRODUCT_GROUPS; g++) {
            const __m256i codes[4] = {first[g], second[g], _mm256_srli_epi16(first[g], 4),
                                      _mm256_srli_epi16(second[g], 4)};
            const __m256i bits[4] = {_mm256_slli_epi16(high[g], 4), _mm256_slli_epi16(high[g], 2), high[g],
                                     _mm256_srli_epi16(high[g], 2)};
            for (int c = 0; c < 4; c++)
                chunks[c][g] = _mm256_or_si256(_mm256_and_si256(codes[c], low), _mm256_and_si256(bits[c], two));
        }
        for (size_t c = 0; c < 4; c++) store(chunks[c], first_row, to->codes[4 * half + c]);
    }
    _mm256_store_ps(to->scale + first_row, halves(rows, at + 208));
}

#define UNPACKER(type, bytes)                                                                                \
    NX_TARGET_AVX2 static void rows_of_##type(const uint8_t *const *rows, size_t n_blocks,                   \
                                              nx_rows_super *unpacked) {                                     \
        for (size_t b = 0; b < n_blocks; b++)                                                                \
            for (int r = 0; r < NX_PRODUCT_ROWS; r += ROWS) type(rows + r, b * bytes, r, unpacked + b);      \
    }

UNPACKER(q4_k, 144)
UNPACKER(q6_k, 210)

nx_super_unpacker nx_products_super_unpacker(nx_product_type type) {
    switch (type) {
    case NX_PRODUCT_Q4_K: return rows_of_q4_k;
    case NX_PRODUCT_Q6_K: return rows_of_q6_k;
    default: return NULL;
    }
}

#else
nx_super_unpacker nx_products_super_unpacker(nx_product_type type) {
    (void)type;
    return NULL;
}
#endif
