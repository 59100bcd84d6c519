/* codec_ans_simd.c: the inner loop of decoding with AVX2 and with AVX-512.
 *
 * A round is ANS_LANES symbols, one of each lane. Words belong to the lanes that fell below ANS_LOW,
 * in the order of the lanes; a round takes at most one a lane, so that a round with ANS_LANES words
 * left never reads past the end.
 */
#include "codec_ans.h"

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,bmi2,popcnt"))) size_t
nx_ans_rounds_avx512(ans_stream *s, uint8_t *out, size_t n_rounds) {
    enum { VECTORS = ANS_LANES / 16 };
    const __m512i low_bits = _mm512_set1_epi32(ANS_SCALE - 1), low = _mm512_set1_epi32(ANS_LOW);
    __m512i x[VECTORS];
    for (int v = 0; v < VECTORS; v++) x[v] = _mm512_loadu_si512(s->state + 16 * v);
    const uint8_t *words = s->words, *safe = s->end - 2 * ANS_LANES;
    size_t round = 0;
    for (; round < n_rounds && words <= safe; round++) {
        __m512i slot[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            slot[v] = _mm512_i32gather_epi32(_mm512_and_si512(x[v], low_bits), s->slot, 4);
        }
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            __m512i frequency = _mm512_and_si512(_mm512_srli_epi32(slot[v], 8), low_bits);
            __m512i offset = _mm512_srli_epi32(slot[v], 20);
            __m512i high = _mm512_srli_epi32(x[v], ANS_SCALE_BITS);
            x[v] = _mm512_add_epi32(_mm512_mullo_epi32(high, frequency), offset);
            _mm_storeu_si128((__m128i *)(out + 16 * v), _mm512_cvtepi32_epi8(slot[v]));
        }
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            __mmask16 mask = _mm512_cmplt_epu32_mask(x[v], low);
            __m512i next =
                _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)words));
            next = _mm512_maskz_expand_epi32(mask, next);
            x[v] = _mm512_mask_or_epi32(x[v], mask, _mm512_slli_epi32(x[v], 16), next);
            words += 2 * (unsigned)__builtin_popcount(mask);
        }
        out += ANS_LANES;
    }
    for (int v = 0; v < VECTORS; v++) _mm512_storeu_si512(s->state + 16 * v, x[v]);
    s->words = words;
    return round;
}

__attribute__((target("avx2,bmi2,popcnt"))) size_t nx_ans_rounds_avx2(ans_stream *s, uint8_t *out,
                                                                      size_t n_rounds) {
    enum { VECTORS = ANS_LANES / 8 };
    const __m256i low_bits = _mm256_set1_epi32(ANS_SCALE - 1), zero = _mm256_setzero_si256();
    const __m256i symbol_bits = _mm256_set1_epi32(255);
    /* Byte i of spread[m]: which word the lane i of the mask m takes, counted from the next one. */
    uint64_t spread[256];
    for (unsigned m = 0; m < 256; m++) {
        uint64_t bytes = _pdep_u64(m, UINT64_C(0x0101010101010101)) * 255;
        spread[m] = _pdep_u64(UINT64_C(0x0706050403020100), bytes);
    }
    __m256i x[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        x[v] = _mm256_loadu_si256((const __m256i *)(const void *)(s->state + 8 * v));
    }
    const uint8_t *words = s->words, *safe = s->end - 2 * ANS_LANES;
    size_t round = 0;
    for (; round < n_rounds && words <= safe; round++) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            __m256i slot = _mm256_i32gather_epi32((const int *)(const void *)s->slot,
                                                  _mm256_and_si256(x[v], low_bits), 4);
            __m256i frequency = _mm256_and_si256(_mm256_srli_epi32(slot, 8), low_bits);
            __m256i offset = _mm256_srli_epi32(slot, 20);
            __m256i high = _mm256_srli_epi32(x[v], ANS_SCALE_BITS);
            x[v] = _mm256_add_epi32(_mm256_mullo_epi32(high, frequency), offset);
            __m256i symbol = _mm256_and_si256(slot, symbol_bits);
            symbol = _mm256_packus_epi32(symbol, zero);
            symbol = _mm256_packus_epi16(symbol, zero);
            uint32_t first = (uint32_t)_mm256_extract_epi32(symbol, 0);
            uint32_t second = (uint32_t)_mm256_extract_epi32(symbol, 4);
            __builtin_memcpy(out + 8 * v, &first, 4);
            __builtin_memcpy(out + 8 * v + 4, &second, 4);
        }
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            __m256i small = _mm256_cmpeq_epi32(_mm256_srli_epi32(x[v], 16), zero);
            unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(small));
            __m256i next =
                _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)words));
            __m256i place = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)spread[mask]));
            next = _mm256_permutevar8x32_epi32(next, place);
            next = _mm256_or_si256(_mm256_slli_epi32(x[v], 16), next);
            x[v] = _mm256_blendv_epi8(x[v], next, small);
            words += 2 * (unsigned)__builtin_popcount(mask);
        }
        out += ANS_LANES;
    }
    for (int v = 0; v < VECTORS; v++) {
        _mm256_storeu_si256((__m256i *)(void *)(s->state + 8 * v), x[v]);
    }
    s->words = words;
    return round;
}
#endif
