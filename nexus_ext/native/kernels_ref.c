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

/* As ggml's x86 code: NaN loses against numbers, and what is no number becomes -128. */
void nx_ref_activate_64(const float *x, size_t n, nx_act_64 *out) {
    for (size_t b = 0; b < n; b++, out++)
        for (int half = 0; half < 2; half++, x += 32) {
            float size = 0;
            for (int i = 0; i < 32; i++)
                if (fabsf(x[i]) > size) size = fabsf(x[i]);
            const float d = nx_half_to_float(nx_float_to_half(size / 127.0f));
            const float inverse = size != 0 ? 127.0f / size : 0;
            int sum = 0;
            for (int i = 0; i < 32; i++) {
                const float v = rintf(x[i] * inverse);
                out->q[32 * half + i] = (int8_t)(v >= -128 && v <= 127 ? (int)v : -128);
                sum += out->q[32 * half + i];
            }
            for (int r = 0; r < 4; r++) out->d[half][r] = d / (float)(1 << 2 * r);
            out->start[half][0] = -sum;
            out->start[half][1] = -5 * sum;
            out->start[half][2] = -21 * sum;
            out->start[half][3] = -85 * sum;
        }
}

/* -- tiles -------------------------------------------------------------------------------------- */

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
            float four[4];
            for (int i = 0; i < 4; i++) four[i] = sum[4 + i] + sum[i];
            out[8 * c + (size_t)r] = (four[0] + four[2]) + (four[1] + four[3]);
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

const nx_kernel_table *nx_kernels_ref(void) {
    static const nx_kernel_table table = {.residual_rows = residual_rows,
                                          .activate_256 = nx_ref_activate_256,
                                          .activate_64 = nx_ref_activate_64,
                                          .lanes = lanes,
                                          .rows = rows};
    return &table;
}
