/* codec_ans_neon.c: the inner loop of decoding with NEON, four lanes at a time. See codec_ans_simd.c.
 *
 * There is no gather: what the table says of four states is loaded one by one.
 */
#include "codec_ans.h"

#if defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#include <arm_neon.h>

#define NONE 0xFF /* a byte that becomes zero */

size_t nx_ans_rounds_neon(ans_stream *s, uint8_t *out, size_t n_rounds) {
    static const uint32_t bit[4] = {1, 2, 4, 8};
    const uint32x4_t bits = vld1q_u32(bit), low = vdupq_n_u32(ANS_LOW), low_bits = vdupq_n_u32(ANS_SCALE - 1);
    /* Of the next words, which one each lane of the mask m takes, and how many they are. */
    uint8_t place[16][16], taken[16];
    for (unsigned m = 0; m < 16; m++) {
        uint8_t n = 0;
        for (unsigned lane = 0; lane < 4; lane++) {
            const int takes = m >> lane & 1;
            place[m][4 * lane] = takes ? n : NONE;
            place[m][4 * lane + 1] = takes ? (uint8_t)(n + 1) : NONE;
            place[m][4 * lane + 2] = place[m][4 * lane + 3] = NONE;
            n = (uint8_t)(n + 2 * takes);
        }
        taken[m] = n;
    }
    const uint32_t *table = s->slot;
    const uint8_t *words = s->words, *safe = s->end - 2 * ANS_LANES;
    size_t round = 0;
    for (; round < n_rounds && words <= safe; round++) {
        for (unsigned lane = 0; lane < ANS_LANES; lane += 16) {
            uint16x4_t symbol[4];
#pragma GCC unroll 4
            for (unsigned v = 0; v < 4; v++) {
                uint32_t *state = s->state + lane + 4 * v;
                uint32x4_t slot = vdupq_n_u32(table[state[0] & (ANS_SCALE - 1)]);
                slot = vld1q_lane_u32(&table[state[1] & (ANS_SCALE - 1)], slot, 1);
                slot = vld1q_lane_u32(&table[state[2] & (ANS_SCALE - 1)], slot, 2);
                slot = vld1q_lane_u32(&table[state[3] & (ANS_SCALE - 1)], slot, 3);
                const uint32x4_t frequency = vandq_u32(vshrq_n_u32(slot, 8), low_bits);
                uint32x4_t x = vld1q_u32(state);
                x = vmlaq_u32(vshrq_n_u32(slot, 20), vshrq_n_u32(x, ANS_SCALE_BITS), frequency);
                const uint32x4_t below = vcltq_u32(x, low);
                const unsigned m = vaddvq_u32(vandq_u32(below, bits));
                const uint8x16_t next = vcombine_u8(vld1_u8(words), vdup_n_u8(0));
                const uint32x4_t longer = vorrq_u32(vshlq_n_u32(x, 16), vreinterpretq_u32_u8(vqtbl1q_u8(next, vld1q_u8(place[m]))));
                vst1q_u32(state, vbslq_u32(below, longer, x));
                words += taken[m];
                symbol[v] = vmovn_u32(slot);
            }
            const uint8x8_t first = vmovn_u16(vcombine_u16(symbol[0], symbol[1]));
            const uint8x8_t second = vmovn_u16(vcombine_u16(symbol[2], symbol[3]));
            vst1q_u8(out + lane, vcombine_u8(first, second));
        }
        out += ANS_LANES;
    }
    s->words = words;
    return round;
}
#endif
