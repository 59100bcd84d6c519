/* kernels_ref.c: the kernels in portable C. What the other implementations are compared with, and what
 * runs where there is no other. */
#include <math.h>
#include <string.h>

#include "kernels_internal.h"

static uint32_t word_at(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void residual_rows(const uint8_t *const *rows, const float *products, size_t n, size_t n_lines, float *sums) {
    for (size_t r = 0; r < n; r++) {
        const float *product = products + 16 * r;
        for (size_t line = 0; line < n_lines; line++)
            for (size_t i = 0; i < 16; i++) {
                const uint32_t word = word_at(rows[r] + 64 * line + 4 * i);
                for (size_t j = 0; j < 8; j++) sums[128 * line + 16 * j + i] += product[word >> 4 * j & 15];
            }
    }
}

/* -- activations -------------------------------------------------------------------------------- */

/* Round to the nearest integer, ties to even, as ggml does it: NaN and infinity become what their bits say. */
static int nearest(float x) {
    const float shifted = x + 12582912.0f; /* 1.5 * 2^23: the integer is in the lowest bits */
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return (bits & 0x007fffff) - 0x00400000;
}

void nx_ref_activate_256(const float *x, size_t n, nx_act_256 *out) {
    for (size_t b = 0; b < n; b++, x += 256, out++) {
        float largest = 0, size = 0; /* the first of the values with the largest size */
        for (int i = 0; i < 256; i++)
            if (fabsf(x[i]) > size) {
                size = fabsf(x[i]);
                largest = x[i];
            }
        memset(out, 0, sizeof *out);
        if (size == 0) continue;
        const float inverse = -127.0f / largest;
        int sums[8] = {0};
        for (int i = 0; i < 256; i++) {
            const int v = nearest(inverse * x[i]);
            out->q[i] = (int8_t)(v < 127 ? v : 127);
            sums[i / 32] += out->q[i];
        }
        const float d = 1 / inverse;
        for (int r = 0; r < 4; r++) out->d[r] = d / (float)(1 << 2 * r);
        for (int i = 0; i < 8; i++) {
            out->start[0][i] = -sums[i];
            out->start[1][i] = -5 * sums[i];
            out->start[2][i] = -21 * sums[i];
            out->start[3][i] = -85 * sums[i];
        }
    }
}

/* A block of Q8_0; returns its scale. As ggml's x86 code: NaN loses against numbers, and what is no number
 * becomes -128. */
static float round_32(const float *x, int8_t *q) {
    float size = 0;
    for (int i = 0; i < 32; i++)
        if (fabsf(x[i]) > size) size = fabsf(x[i]);
    const float inverse = size != 0 ? 127.0f / size : 0;
    for (int i = 0; i < 32; i++) {
        const float v = rintf(x[i] * inverse);
        q[i] = (int8_t)(v >= -128 && v <= 127 ? (int)v : -128);
    }
    return nx_half_to_float(nx_float_to_half(size / 127.0f));
}

void nx_ref_activate_128(const float *x, size_t n, nx_act_128 *out) {
    for (size_t b = 0; b < n; b++, out++)
        for (int v = 0; v < 4; v++, x += 32) {
            int8_t *q = out->q + 32 * v;
            out->d[v] = round_32(x, q);
            for (int i = 0; i < 8; i++) out->lane[v][i] = (float)(q[4 * i] + q[4 * i + 1] + q[4 * i + 2] + q[4 * i + 3]);
        }
}

void nx_ref_activate_64(const float *x, size_t n, nx_act_64 *out) {
    for (size_t b = 0; b < n; b++, out++)
        for (int half = 0; half < 2; half++, x += 32) {
            const float d = round_32(x, out->q + 32 * half);
            int sum = 0;
            for (int i = 0; i < 32; i++) sum += out->q[32 * half + i];
            for (int r = 0; r < 4; r++) out->d[half][r] = d / (float)(1 << 2 * r);
            out->start[half][0] = -sum;
            out->start[half][1] = -5 * sum;
            out->start[half][2] = -21 * sum;
            out->start[half][3] = -85 * sum;
            out->plane_d[2 * half] = out->plane_d[2 * half + 1] = d;
            out->plane_start[2 * half] = -sum;
            out->plane_start[2 * half + 1] = 0;
            for (int i = 0; i < 32; i++) out->plane[i % 4 * 16 + 8 * half + i / 4] = out->q[32 * half + i];
        }
}

/* -- tiles -------------------------------------------------------------------------------------- */

float nx_ref_sum_lanes(const float *sum) {
    float four[4];
    for (int i = 0; i < 4; i++) four[i] = sum[4 + i] + sum[i];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

static void lanes(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                  const nx_act_256 *const *columns, size_t n_columns, float *out) {
    for (size_t c = 0; c < n_columns; c++)
        for (int r = 0; r < 8; r++) {
            float sum[8] = {0};
            for (size_t b = 0; b < n_blocks; b++) {
                const nx_act_256 *a = &columns[c][b];
                const uint8_t *code = codes + 512 * b + 32 * (r / 4);
                const float d = a->d[0] * (scales ? nx_half_to_float(scales[8 * b + (size_t)r]) : scale);
                int dot[8];
                memcpy(dot, a->start[0], sizeof dot);
                for (int i = 0; i < 256; i++)
                    dot[i % 32 / 4] += (code[i / 32 * 64 + i % 32] >> r % 4 * 2 & 3) * a->q[i];
                for (int i = 0; i < 8; i++) sum[i] = fmaf((float)dot[i], d, sum[i]);
            }
            out[8 * c + (size_t)r] = nx_ref_sum_lanes(sum);
        }
}

static void rows(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                 const nx_act_64 *const *columns, size_t n_columns, float *out) {
    for (size_t c = 0; c < n_columns; c++)
        for (int r = 0; r < 64; r++) {
            float sum = 0;
            for (size_t b = 0; b < n_blocks; b++) {
                const nx_act_64 *a = &columns[c][b];
                const uint8_t *code = codes + 1024 * b + 4 * (r % 16);
                float part = 0;
                for (int half = 0; half < 2; half++) {
                    int dot = a->start[half][0];
                    for (int i = 32 * half; i < 32 * half + 32; i++)
                        dot += (code[i / 4 * 64 + i % 4] >> r / 16 * 2 & 3) * a->q[i];
                    part = fmaf(a->d[half][0], (float)dot, part);
                }
                sum = fmaf(scales ? nx_half_to_float(scales[64 * b + (size_t)r]) : scale, part, sum);
            }
            out[64 * c + (size_t)r] = sum;
        }
}

static void bits(const uint8_t *codes, const uint16_t *scales, float scale, size_t n_blocks,
                 const nx_act_128 *const *columns, size_t n_columns, float *out) {
    for (size_t c = 0; c < n_columns; c++)
        for (int r = 0; r < 16; r++) {
            float sum[8] = {0};
            for (size_t b = 0; b < n_blocks; b++) {
                const nx_act_128 *a = &columns[c][b];
                const uint8_t *code = codes + 256 * b + 32 * (r / 8);
                const float d = scales ? nx_half_to_float(scales[16 * b + (size_t)r]) : scale;
                float part[8];
                for (int v = 0; v < 4; v++)
                    for (int i = 0; i < 8; i++) {
                        int dot = 0;
                        for (int k = 4 * i; k < 4 * i + 4; k++)
                            dot += (code[64 * v + k] >> r % 8 & 1) * a->q[32 * v + k];
                        const float s = 2 * (float)dot - a->lane[v][i];
                        part[i] = v ? fmaf(a->d[v], s, part[i]) : a->d[v] * s;
                    }
                for (int i = 0; i < 8; i++) sum[i] = fmaf(d, part[i], sum[i]);
            }
            out[16 * c + (size_t)r] = nx_ref_sum_lanes(sum);
        }
}

const nx_kernel_table *nx_kernels_ref(void) {
    static const nx_kernel_table table = {.residual_rows = residual_rows,
                                          .activate_256 = nx_ref_activate_256,
                                          .activate_64 = nx_ref_activate_64,
                                          .activate_128 = nx_ref_activate_128,
                                          .lanes = lanes,
                                          .rows = rows,
                                          .bits = bits,
                                          .stored = {[NX_TQ1_0] = nx_ref_stored_tq1_0,
                                                     [NX_TQ2_0] = nx_ref_stored_tq2_0,
                                                     [NX_Q2_0] = nx_ref_stored_q2_0,
                                                     [NX_Q1_0] = nx_ref_stored_q1_0}};
    return &table;
}
