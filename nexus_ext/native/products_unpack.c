/* products_unpack.c: sixteen rows as bytes, side by side in groups of four. See nexus_products.h. */
#include "products_internal.h"

#include "kernels_internal.h"

#if defined(__x86_64__)
#include "products_transpose.h"

/* Codes of four bits: the low halves are the first sixteen weights, the high ones the rest. */
INLINE void nibbles(const uint8_t *const *rows, size_t at, __m256i *out) {
    transpose(rows, at, out);
    const __m256i low = _mm256_set1_epi8(15);
    for (int g = 0; g < 4; g++) {
        out[g + 4] = _mm256_and_si256(_mm256_srli_epi16(out[g], 4), low);
        out[g] = _mm256_and_si256(out[g], low);
    }
}

/* What stands for each code, and the offset. */
INLINE void look_up(const int8_t *values, uint8_t offset, __m256i *groups) {
    const __m128i table = _mm_add_epi8(_mm_loadu_si128((const __m128i *)values), _mm_set1_epi8((char)offset));
    const __m256i both = _mm256_broadcastsi128_si256(table);
    for (int g = 0; g < NX_PRODUCT_GROUPS; g++) groups[g] = _mm256_shuffle_epi8(both, groups[g]);
}

/* A block of each row, from byte `at` on: its groups, and the scales. */
typedef __m256 unpack(const uint8_t *const *rows, size_t at, uint8_t offset, __m256i *groups);

INLINE __m256 q4_0(const uint8_t *const *rows, size_t at, uint8_t offset, __m256i *groups) {
    nibbles(rows, at + 2, groups);
    for (int g = 0; g < NX_PRODUCT_GROUPS; g++) /* a code is 8 more than its weight */
        groups[g] = _mm256_add_epi8(groups[g], _mm256_set1_epi8((char)(offset - 8)));
    return halves(rows, at);
}

INLINE __m256 q8_0(const uint8_t *const *rows, size_t at, uint8_t offset, __m256i *groups) {
    transpose(rows, at + 2, groups);
    transpose(rows, at + 18, groups + 4);
    for (int g = 0; g < NX_PRODUCT_GROUPS; g++) groups[g] = _mm256_add_epi8(groups[g], _mm256_set1_epi8((char)offset));
    return halves(rows, at);
}

INLINE __m256 iq4_nl(const uint8_t *const *rows, size_t at, uint8_t offset, __m256i *groups) {
    nibbles(rows, at + 2, groups);
    look_up(nx_iq4_nl_values, offset, groups);
    return halves(rows, at);
}

INLINE __m256 mxfp4(const uint8_t *const *rows, size_t at, uint8_t offset, __m256i *groups) {
    nibbles(rows, at + 1, groups);
    look_up(nx_mxfp4_values, offset, groups);
    float scales[ROWS];
    for (int i = 0; i < ROWS; i++) scales[i] = nx_mxfp4_scale(rows[i][at]);
    return _mm256_loadu_ps(scales);
}

INLINE void unpack_rows(unpack *block_at, size_t bytes, const uint8_t *const *rows, size_t n_blocks, uint8_t offset,
                        nx_rows_block *unpacked) {
    for (size_t b = 0; b < n_blocks; b++, unpacked++)
        for (int r = 0; r < NX_PRODUCT_ROWS; r += ROWS) {
            __m256i groups[NX_PRODUCT_GROUPS];
            const __m256 scales = block_at(rows + r, b * bytes, offset, groups);
            for (int g = 0; g < NX_PRODUCT_GROUPS; g++)
                _mm256_store_si256((__m256i *)unpacked->weights[g][r], groups[g]);
            _mm256_store_ps(unpacked->scales + r, scales);
        }
}

#define UNPACKER(type, bytes)                                                                                \
    NX_TARGET_AVX2 static void rows_of_##type(const uint8_t *const *rows, size_t n_blocks, uint8_t offset,   \
                                              nx_rows_block *unpacked) {                                     \
        unpack_rows(type, bytes, rows, n_blocks, offset, unpacked);                                          \
    }

UNPACKER(q4_0, 18)
UNPACKER(q8_0, 34)
UNPACKER(iq4_nl, 18)
UNPACKER(mxfp4, 17)

nx_product_unpacker nx_products_unpacker(nx_product_type type) {
    switch (type) {
    case NX_PRODUCT_Q4_0: return rows_of_q4_0;
    case NX_PRODUCT_Q8_0: return rows_of_q8_0;
    case NX_PRODUCT_IQ4_NL: return rows_of_iq4_nl;
    case NX_PRODUCT_MXFP4: return rows_of_mxfp4;
    default: return NULL;
    }
}

#else
nx_product_unpacker nx_products_unpacker(nx_product_type type) {
    (void)type;
    return NULL;
}
#endif
