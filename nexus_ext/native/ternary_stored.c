/* ternary_stored.c: products with rows of few bits as llama.cpp stores them, without packing.
 *
 * For weights that are only passing through (streamed slabs, records of experts): they are used once or a
 * few times after they were read, which is too little to pay for packing. Here are the reference, and what
 * is common to all implementations: groups of rows, and blocks of columns. See nexus_ternary.h. */
#include <math.h>
#include <string.h>

#include "kernels_internal.h"

#define BATCH_COLUMNS 32 /* whose activations stay in the second level cache while all rows pass */

uint16_t nx_ternary_unpack_block(nx_ternary_type t, const uint8_t *p, uint8_t *codes) {
    uint16_t d;
    switch (t) {
    case NX_TQ2_0: /* 2 times 32 bytes of 4 planes of 32; scale last */
        for (int j = 0; j < 2; j++, codes += 128)
            for (int m = 0; m < 32; m++) {
                const uint8_t q = p[32 * j + m];
                codes[m] = q & 3;
                codes[32 + m] = q >> 2 & 3;
                codes[64 + m] = q >> 4 & 3;
                codes[96 + m] = q >> 6;
            }
        memcpy(&d, p + 64, sizeof d);
        return d;
    case NX_TQ1_0: { /* base 3, as fixed-point fractions: 5 digits a byte (48 bytes), 4 digits (4 bytes); scale last */
        static const uint8_t power[5] = {1, 3, 9, 27, 81};
        for (int n = 0; n < 5; n++) {
            for (int m = 0; m < 32; m++) codes[32 * n + m] = (uint8_t)((uint8_t)(p[m] * power[n]) * 3 >> 8);
            for (int m = 0; m < 16; m++) codes[160 + 16 * n + m] = (uint8_t)((uint8_t)(p[32 + m] * power[n]) * 3 >> 8);
        }
        for (int n = 0; n < 4; n++)
            for (int m = 0; m < 4; m++) codes[240 + 4 * n + m] = (uint8_t)((uint8_t)(p[48 + m] * power[n]) * 3 >> 8);
        memcpy(&d, p + 52, sizeof d);
        return d;
    }
    case NX_Q2_0: /* scale first; 4 neighbours a byte */
        memcpy(&d, p, sizeof d);
        for (int i = 0; i < 16; i++) {
            const uint32_t q = p[2 + i], word = (q | q << 6 | q << 12 | q << 18) & 0x03030303u;
            const uint8_t four[4] = {(uint8_t)word, (uint8_t)(word >> 8), (uint8_t)(word >> 16), (uint8_t)(word >> 24)};
            memcpy(codes + 4 * i, four, sizeof four);
        }
        return d;
    default: /* NX_Q1_0: scale first; 8 neighbours a byte */
        memcpy(&d, p, sizeof d);
        for (int i = 0; i < 128; i++) codes[i] = p[2 + i / 8] >> i % 8 & 1;
        return d;
    }
}

/* -- the reference ------------------------------------------------------------------------------ */

static void add_256(const uint8_t *codes, float scale, const nx_act_256 *a, float *sum) {
    int dot[8];
    memcpy(dot, a->start[0], sizeof dot);
    for (int i = 0; i < 256; i++) dot[i % 32 / 4] += codes[i] * a->q[i];
    for (int i = 0; i < 8; i++) sum[i] = fmaf((float)dot[i], a->d[0] * scale, sum[i]);
}

static void add_64(const uint8_t *codes, float scale, const nx_act_64 *a, float *sum) {
    float part = 0;
    for (int half = 0; half < 2; half++) {
        int dot = a->start[half][0];
        for (int i = 32 * half; i < 32 * half + 32; i++) dot += codes[i] * a->q[i];
        part = fmaf(a->d[half][0], (float)dot, part);
    }
    sum[0] = fmaf(scale, part, sum[0]);
}

static void add_128(const uint8_t *codes, float scale, const nx_act_128 *a, float *sum) {
    for (int i = 0; i < 8; i++) {
        float part = 0;
        for (int v = 0; v < 4; v++) {
            int dot = 0;
            for (int k = 32 * v + 4 * i; k < 32 * v + 4 * i + 4; k++) dot += codes[k] * a->q[k];
            const float s = 2 * (float)dot - a->lane[v][i];
            part = v ? fmaf(a->d[v], s, part) : a->d[v] * s;
        }
        sum[i] = fmaf(scale, part, sum[i]);
    }
}

static void stored_ref(nx_ternary_type t, const uint8_t *const *rows, size_t n_blocks, const void *const *columns,
                       size_t n_columns, float *out) {
    uint8_t codes[256];
    for (size_t r = 0; r < NX_STORED_ROWS; r++) {
        float sums[NX_MOST_COLUMNS][8];
        memset(sums, 0, sizeof sums);
        for (size_t b = 0; b < n_blocks; b++) {
            const uint8_t *block = rows[r] + b * nx_ternary_block_bytes(t);
            const float scale = nx_half_to_float(nx_ternary_unpack_block(t, block, codes));
            for (size_t c = 0; c < n_columns; c++) {
                if (t == NX_Q2_0) add_64(codes, scale, (const nx_act_64 *)columns[c] + b, sums[c]);
                else if (t == NX_Q1_0) add_128(codes, scale, (const nx_act_128 *)columns[c] + b, sums[c]);
                else add_256(codes, scale, (const nx_act_256 *)columns[c] + b, sums[c]);
            }
        }
        for (size_t c = 0; c < n_columns; c++)
            out[NX_STORED_ROWS * c + r] = t == NX_Q2_0 ? sums[c][0] : nx_ref_sum_lanes(sums[c]);
    }
}

#define REFERENCE(name, type)                                                                                     \
    void nx_ref_stored_##name(const uint8_t *const *rows, size_t ahead, size_t n_blocks, const void *const *columns, \
                              size_t n_columns, float *out) {                                                     \
        (void)ahead;                                                                                              \
        stored_ref(type, rows, n_blocks, columns, n_columns, out);                                                \
    }
REFERENCE(tq1_0, NX_TQ1_0)
REFERENCE(tq2_0, NX_TQ2_0)
REFERENCE(q2_0, NX_Q2_0)
REFERENCE(q1_0, NX_Q1_0)

/* -- all rows and columns ----------------------------------------------------------------------- */

int nx_ternary_stored_usable(nx_ternary_type t) {
    return (unsigned)t < NX_TERNARY_TYPES && nx_kernels_table()->stored[t] != NULL;
}

void nx_ternary_multiply_stored(nx_ternary_type t, const void *rows, size_t stride, uint32_t n_in,
                                const void *const *columns, uint32_t n_columns, uint32_t begin, uint32_t end,
                                float *const *y) {
    const size_t n_blocks = n_in / nx_ternary_block(t);
    nx_stored_fn *multiply = nx_kernels_table()->stored[t];
    if (!multiply) multiply = nx_kernels_ref()->stored[t];
    for (uint32_t batch = 0; batch < n_columns; batch += BATCH_COLUMNS) {
        const uint32_t batch_end = n_columns - batch < BATCH_COLUMNS ? n_columns : batch + BATCH_COLUMNS;
        for (uint32_t first = begin; first < end; first += NX_STORED_ROWS) {
            const uint32_t n_rows = end - first < NX_STORED_ROWS ? end - first : NX_STORED_ROWS;
            const uint8_t *at[NX_STORED_ROWS]; /* rows that do not exist are the last one once more */
            for (uint32_t r = 0; r < NX_STORED_ROWS; r++)
                at[r] = (const uint8_t *)rows + (size_t)(first + (r < n_rows ? r : n_rows - 1)) * stride;
            for (uint32_t c = batch; c < batch_end; c += NX_MOST_COLUMNS) {
                const uint32_t n = batch_end - c < NX_MOST_COLUMNS ? batch_end - c : NX_MOST_COLUMNS;
                float out[NX_MOST_COLUMNS * NX_STORED_ROWS];
                multiply(at, NX_STORED_ROWS * stride, n_blocks, columns + c, n, out);
                for (uint32_t i = 0; i < n; i++)
                    memcpy(y[c + i] + first, out + NX_STORED_ROWS * i, n_rows * sizeof *out);
            }
        }
    }
}
