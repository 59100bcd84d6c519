/* products_transpose.h: bytes of several rows, side by side. For the files that unpack rows. Not installed. */
#ifndef NEXUS_PRODUCTS_TRANSPOSE_H
#define NEXUS_PRODUCTS_TRANSPOSE_H

#include <immintrin.h>

#define INLINE NX_TARGET_AVX2 static inline __attribute__((always_inline))
#define ROWS 8 /* at a time: four bytes of each fill a register */

/* Of four registers, with rows i and i + 4: out[g] has four bytes, group g, of all rows. */
INLINE void transpose_registers(const __m256i *r, __m256i *out) {
    const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
    const __m256i c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
    out[0] = _mm256_unpacklo_epi64(a, c);
    out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d);
    out[3] = _mm256_unpackhi_epi64(b, d);
}

/* Sixteen bytes of each row, in groups of four. */
INLINE void transpose(const uint8_t *const *rows, size_t at, __m256i *out) {
    __m256i r[4];
    for (int i = 0; i < 4; i++)
        r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(rows[i] + at))),
                                       _mm_loadu_si128((const __m128i *)(rows[i + 4] + at)), 1);
    transpose_registers(r, out);
}

INLINE __m256 halves(const uint8_t *const *rows, size_t at) {
    int16_t bits[ROWS];
    for (int i = 0; i < ROWS; i++) memcpy(&bits[i], rows[i] + at, sizeof *bits);
    return _mm256_cvtph_ps(_mm_set_epi16(bits[7], bits[6], bits[5], bits[4], bits[3], bits[2], bits[1], bits[0]));
}

#endif
