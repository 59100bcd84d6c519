/* kernels_neon_stored.c: products with rows as llama.cpp stores them, for AArch64 with NEON and the dot
 * product instructions: TQ2_0 and Q2_0. */
#include "kernels_internal.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <string.h>

#if defined(__clang__)
#define NX_TARGET_NEON __attribute__((target("dotprod")))
#else
#define NX_TARGET_NEON __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define INLINE __attribute__((always_inline)) NX_TARGET_NEON static inline

INLINE int8x16_t plane_of(uint8x16_t q, int plane) {
    /* a shift to the right is one to the left by a negative number */
    return vreinterpretq_s8_u8(vandq_u8(vshlq_u8(q, vdupq_n_s8((int8_t)(-2 * plane))), vdupq_n_u8(3)));
}

INLINE float scale_at(const uint8_t *p) {
    uint16_t d;
    memcpy(&d, p, sizeof d);
    return nx_half_to_float(d);
}

INLINE void tq2_0_of(const uint8_t *row, size_t n_blocks, const nx_act_256 *const *columns, const size_t n_columns,
                     float *out) {
    float32x4_t sum[NX_MOST_COLUMNS][2];
    for (size_t c = 0; c < n_columns; c++) sum[c][0] = sum[c][1] = vdupq_n_f32(0);
    for (size_t b = 0; b < n_blocks; b++, row += 66) {
        int32x4_t dot[NX_MOST_COLUMNS][2];
        for (size_t c = 0; c < n_columns; c++)
            for (size_t h = 0; h < 2; h++) dot[c][h] = vld1q_s32(columns[c][b].start[0] + 4 * h);
        for (size_t j = 0; j < 2; j++)
            for (size_t h = 0; h < 2; h++) {
                const uint8x16_t q = vld1q_u8(row + 32 * j + 16 * h);
                for (int plane = 0; plane < 4; plane++) {
                    const int8x16_t code = plane_of(q, plane);
                    for (size_t c = 0; c < n_columns; c++) {
                        const int8_t *at = columns[c][b].q + 128 * j + 32 * (size_t)plane + 16 * h;
                        dot[c][h] = vdotq_s32(dot[c][h], code, vld1q_s8(at));
                    }
                }
            }
        const float scale = scale_at(row + 64);
        for (size_t c = 0; c < n_columns; c++)
            for (size_t h = 0; h < 2; h++)
                sum[c][h] = vfmaq_n_f32(sum[c][h], vcvtq_f32_s32(dot[c][h]), columns[c][b].d[0] * scale);
    }
    for (size_t c = 0; c < n_columns; c++) {
        float lanes[8];
        vst1q_f32(lanes, sum[c][0]);
        vst1q_f32(lanes + 4, sum[c][1]);
        out[NX_STORED_ROWS * c] = nx_ref_sum_lanes(lanes);
    }
}

/* The four planes of a block are 16 bytes (nx_act_64): two lanes are the first half, two the second. */
INLINE void q2_0_of(const uint8_t *row, size_t n_blocks, const nx_act_64 *const *columns, const size_t n_columns,
                    float *out) {
    float sum[NX_MOST_COLUMNS] = {0};
    for (size_t b = 0; b < n_blocks; b++, row += 18) {
        const uint8x16_t q = vld1q_u8(row + 2);
        int32x4_t dot[NX_MOST_COLUMNS];
        for (size_t c = 0; c < n_columns; c++) dot[c] = vld1q_s32(columns[c][b].plane_start);
        for (int plane = 0; plane < 4; plane++) {
            const int8x16_t code = plane_of(q, plane);
            for (size_t c = 0; c < n_columns; c++)
                dot[c] = vdotq_s32(dot[c], code, vld1q_s8(columns[c][b].plane + 16 * plane));
        }
        const float scale = scale_at(row);
        for (size_t c = 0; c < n_columns; c++) {
            const float32x4_t halves = vcvtq_f32_s32(vpaddq_s32(dot[c], dot[c]));
            const float first = columns[c][b].plane_d[0] * vgetq_lane_f32(halves, 0);
            const float part = __builtin_fmaf(columns[c][b].plane_d[2], vgetq_lane_f32(halves, 1), first);
            sum[c] = __builtin_fmaf(scale, part, sum[c]);
        }
    }
    for (size_t c = 0; c < n_columns; c++) out[NX_STORED_ROWS * c] = sum[c];
}

/* Row by row, each with its number of columns known. */
#define STORED(name, activations)                                                                            \
    NX_TARGET_NEON void nx_neon_stored_##name(const uint8_t *const *rows, size_t ahead, size_t n_blocks,      \
                                              const void *const *columns, size_t n_columns, float *out) {    \
        (void)ahead;                                                                                         \
        const activations *const *at = (const activations *const *)columns;                                  \
        for (size_t r = 0; r < NX_STORED_ROWS; r++) switch (n_columns) {                                     \
            case 1: name##_of(rows[r], n_blocks, at, 1, out + r); break;                                     \
            case 2: name##_of(rows[r], n_blocks, at, 2, out + r); break;                                     \
            case 3: name##_of(rows[r], n_blocks, at, 3, out + r); break;                                     \
            default: name##_of(rows[r], n_blocks, at, 4, out + r); break;                                    \
            }                                                                                                \
    }
STORED(tq2_0, nx_act_256)
STORED(q2_0, nx_act_64)
#else
typedef int nx_nothing_here; /* a file that is not empty */
#endif
