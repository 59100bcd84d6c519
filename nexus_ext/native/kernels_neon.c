/* kernels_neon.c: the kernels for AArch64 with NEON and the dot product instructions. */
#include "kernels_internal.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <string.h>

#if defined(__clang__)
#define NX_TARGET_NEON __attribute__((target("dotprod")))
#else
#define NX_TARGET_NEON __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

/* A table of 16 floats is 64 bytes, which is what one table lookup takes: byte k of a product of code c is
 * byte 4 c + k of the table. */
static void residual_rows(const uint8_t *const *rows, const float *products, size_t n, size_t n_lines, float *sums) {
    const uint32x4_t four = vdupq_n_u32(0x04040404u), bytes = vdupq_n_u32(0x03020100u);
    for (size_t r = 0; r < n; r++) {
        const uint8x16x4_t table = vld1q_u8_x4((const uint8_t *)(products + 16 * r));
        for (size_t quarter = 0; quarter < 4 * n_lines; quarter++) {
            uint32x4_t words = vreinterpretq_u32_u8(vld1q_u8(rows[r] + 16 * quarter));
            float *sum = sums + 128 * (quarter / 4) + 4 * (quarter % 4);
            for (size_t j = 0; j < 8; j++) {
                const uint32x4_t code = vandq_u32(words, vdupq_n_u32(15));
                const uint32x4_t index = vmlaq_u32(bytes, code, four);
                const float32x4_t product = vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(index)));
                vst1q_f32(sum + 16 * j, vaddq_f32(vld1q_f32(sum + 16 * j), product));
                words = vshrq_n_u32(words, 4);
            }
        }
    }
}

/* -- tiles -------------------------------------------------------------------------------------- */

static inline int8x16_t plane(uint8x16_t q, int r) {
    /* a shift to the right is one to the left by a negative number */
    return vreinterpretq_s8_u8(vandq_u8(vshlq_u8(q, vdupq_n_s8((int8_t)(-2 * r))), vdupq_n_u8(3)));
}

static inline float sum_lanes(float32x4_t low, float32x4_t high) {
    const float32x4_t four = vaddq_f32(high, low);
    return (vgetq_lane_f32(four, 0) + vgetq_lane_f32(four, 2)) + (vgetq_lane_f32(four, 1) + vgetq_lane_f32(four, 3));
}

/* Four rows at a time, in two registers of four lanes each. */
NX_TARGET_NEON static void lanes(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                                 const nx_act_256 *const *columns, size_t n_columns, float *out) {
    for (size_t c = 0; c < n_columns; c++)
        for (size_t h = 0; h < 2; h++) {
            float32x4_t low[4], high[4];
            for (int r = 0; r < 4; r++) low[r] = high[r] = vdupq_n_f32(0);
            for (size_t b = 0; b < n_blocks; b++) {
                const nx_act_256 *a = &columns[c][b];
                int32x4_t dot_low[4], dot_high[4];
                for (int r = 0; r < 4; r++) {
                    dot_low[r] = vld1q_s32(a->start[0]);
                    dot_high[r] = vld1q_s32(a->start[0] + 4);
                }
                for (size_t v = 0; v < 8; v++) {
                    const uint8_t *at = codes + 512 * b + 64 * v + 32 * h;
                    const uint8x16_t q0 = vld1q_u8(at), q1 = vld1q_u8(at + 16);
                    const int8x16_t y0 = vld1q_s8(a->q + 32 * v), y1 = vld1q_s8(a->q + 32 * v + 16);
                    for (int r = 0; r < 4; r++) {
                        dot_low[r] = vdotq_s32(dot_low[r], plane(q0, r), y0);
                        dot_high[r] = vdotq_s32(dot_high[r], plane(q1, r), y1);
                    }
                }
                for (size_t r = 0; r < 4; r++) {
                    const float d = a->d[0] * (scales ? nx_half_to_float(scales[8 * b + 4 * h + r]) : scale);
                    low[r] = vfmaq_n_f32(low[r], vcvtq_f32_s32(dot_low[r]), d);
                    high[r] = vfmaq_n_f32(high[r], vcvtq_f32_s32(dot_high[r]), d);
                }
            }
            for (size_t r = 0; r < 4; r++) out[8 * c + 4 * h + r] = sum_lanes(low[r], high[r]);
        }
}

/* Four of the 16 rows of a lane group, in each of the four places of a byte. */
NX_TARGET_NEON static void rows(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                                const nx_act_64 *const *columns, size_t n_columns, float *out) {
    for (size_t c = 0; c < n_columns; c++)
        for (size_t h = 0; h < 4; h++) {
            float32x4_t sum[4];
            for (int r = 0; r < 4; r++) sum[r] = vdupq_n_f32(0);
            for (size_t b = 0; b < n_blocks; b++) {
                const nx_act_64 *a = &columns[c][b];
                float32x4_t part[4];
                for (int r = 0; r < 4; r++) part[r] = vdupq_n_f32(0);
                for (size_t half = 0; half < 2; half++) {
                    int32x4_t dot[4];
                    for (int r = 0; r < 4; r++) dot[r] = vdupq_n_s32(a->start[half][0]);
                    for (size_t v = 8 * half; v < 8 * half + 8; v++) {
                        const uint8x16_t q = vld1q_u8(codes + 1024 * b + 64 * v + 16 * h);
                        int32_t four;
                        memcpy(&four, a->q + 4 * v, sizeof four);
                        const int8x16_t y = vreinterpretq_s8_s32(vdupq_n_s32(four));
                        for (int r = 0; r < 4; r++) dot[r] = vdotq_s32(dot[r], plane(q, r), y);
                    }
                    for (int r = 0; r < 4; r++)
                        part[r] = vfmaq_n_f32(part[r], vcvtq_f32_s32(dot[r]), a->d[half][0]);
                }
                for (size_t r = 0; r < 4; r++) {
                    float d[4];
                    for (size_t i = 0; i < 4; i++)
                        d[i] = scales ? nx_half_to_float(scales[64 * b + 16 * r + 4 * h + i]) : scale;
                    sum[r] = vfmaq_f32(sum[r], vld1q_f32(d), part[r]);
                }
            }
            for (size_t r = 0; r < 4; r++) vst1q_f32(out + 64 * c + 16 * r + 4 * h, sum[r]);
        }
}

/* Eight rows of bits at a time, in two registers of four lanes each. */
NX_TARGET_NEON static void bits(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                                const nx_act_128 *const *columns, size_t n_columns, float *out) {
    for (size_t c = 0; c < n_columns; c++)
        for (size_t h = 0; h < 2; h++)
            for (size_t r = 0; r < 8; r++) {
                float32x4_t sum[2] = {vdupq_n_f32(0), vdupq_n_f32(0)};
                for (size_t b = 0; b < n_blocks; b++) {
                    const nx_act_128 *a = &columns[c][b];
                    const float d = scales ? nx_half_to_float(scales[16 * b + 8 * h + r]) : scale;
                    for (size_t half = 0; half < 2; half++) {
                        float32x4_t part = vdupq_n_f32(0);
                        for (size_t v = 0; v < 4; v++) {
                            const uint8x16_t q = vld1q_u8(codes + 256 * b + 64 * v + 32 * h + 16 * half);
                            const uint8x16_t bit = vandq_u8(vshlq_u8(q, vdupq_n_s8((int8_t)-(int)r)), vdupq_n_u8(1));
                            const int8x16_t y = vld1q_s8(a->q + 32 * v + 16 * half);
                            const int32x4_t dot = vdotq_s32(vdupq_n_s32(0), vreinterpretq_s8_u8(bit), y);
                            const float32x4_t f = vcvtq_f32_s32(vaddq_s32(dot, dot));
                            const float32x4_t s = vsubq_f32(f, vld1q_f32(a->lane[v] + 4 * half));
                            part = v ? vfmaq_n_f32(part, s, a->d[v]) : vmulq_n_f32(s, a->d[v]);
                        }
                        sum[half] = vfmaq_n_f32(sum[half], part, d);
                    }
                }
                out[16 * c + 8 * h + r] = sum_lanes(sum[0], sum[1]);
            }
}

const nx_kernel_table *nx_kernels_neon(void) {
    static const nx_kernel_table table = {.residual_rows = residual_rows,
                                          .activate_256 = nx_ref_activate_256,
                                          .activate_64 = nx_ref_activate_64,
                                          .activate_128 = nx_ref_activate_128,
                                          .lanes = lanes,
                                          .rows = rows,
                                          .bits = bits,
                                          .stored = {[NX_TQ2_0] = nx_neon_stored_tq2_0,
                                                     [NX_Q2_0] = nx_neon_stored_q2_0}};
    return &table;
}
#else
const nx_kernel_table *nx_kernels_neon(void) { return NULL; }
#endif
