/* products_blocks.h: how a block of each type is unpacked, and how the sums of a column are added up. For the files
 * with kernels, which say first what INLINE is: the instructions that a function may use. Not installed.
 */
#ifndef NEXUS_PRODUCTS_BLOCKS_H
#define NEXUS_PRODUCTS_BLOCKS_H

#include <immintrin.h>
#include <string.h>

#include "products_internal.h"

/* The weights of a block, as signed bytes, and its scale. */
typedef struct block {
    __m256i weights;
    float scale;
} block;

INLINE float half(const uint8_t *at) {
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    return _cvtsh_ss(bits);
}

INLINE __m256i nibbles(const uint8_t *at) {
    const __m128i packed = _mm_loadu_si128((const __m128i *)at);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1);
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

INLINE block q4_0(const uint8_t *at) {
    return (block){_mm256_sub_epi8(nibbles(at + 2), _mm256_set1_epi8(8)), half(at)};
}

INLINE block q8_0(const uint8_t *at) {
    return (block){_mm256_loadu_si256((const __m256i *)(at + 2)), half(at)};
}

INLINE block iq4_nl(const uint8_t *at) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)nx_iq4_nl_values));
    return (block){_mm256_shuffle_epi8(table, nibbles(at + 2)), half(at)};
}

INLINE block mxfp4(const uint8_t *at) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)nx_mxfp4_values));
    return (block){_mm256_shuffle_epi8(table, nibbles(at + 1)), nx_mxfp4_scale(at[0])};
}

typedef block unpack(const uint8_t *);

/* ggml's tree. */
INLINE float total(__m256 sums) {
    __m128 s = _mm_add_ps(_mm256_extractf128_ps(sums, 1), _mm256_castps256_ps128(sums));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#endif
