/* ternary.c: packing of few-bit matrices, and products over tiles. See nexus_ternary.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "core_internal.h"
#include "kernels_internal.h"

#define BATCH_COLUMNS 32 /* whose activations stay in the second level cache while all tiles pass */

static const struct {
    const char *name;
    uint32_t block, block_bytes, rows;
    uint32_t act_bytes; /* of one block */
} types[NX_TERNARY_TYPES] = {
    [NX_TQ1_0] = {"tq1_0", 256, 54, 8, sizeof(nx_act_256)},
    [NX_TQ2_0] = {"tq2_0", 256, 66, 8, sizeof(nx_act_256)},
    [NX_Q2_0] = {"q2_0", 64, 18, 64, sizeof(nx_act_64)},
    [NX_Q1_0] = {"q1_0", 128, 18, 16, sizeof(nx_act_128)},
};

nx_ternary_type nx_ternary_type_of(const char *name) {
    int t = 0;
    while (t < NX_TERNARY_TYPES && strcasecmp(types[t].name, name) != 0) t++;
    return (nx_ternary_type)t;
}

uint32_t nx_ternary_block(nx_ternary_type t) { return types[t].block; }
uint32_t nx_ternary_block_bytes(nx_ternary_type t) { return types[t].block_bytes; }
uint32_t nx_ternary_row_unit(nx_ternary_type t) { return types[t].rows; }

float nx_half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = half >> 10 & 31, mantissa = half & 0x3ffu, bits;
    if (exponent == 31) bits = sign | 0x7f800000u | mantissa << 13;
    else if (exponent) bits = sign | (exponent + 112) << 23 | mantissa << 13;
    else { /* zero, or denormal: mantissa * 2^-24 */
        const float value = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &value, sizeof bits);
        bits |= sign;
    }
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

uint16_t nx_float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (bits >> 13 & 0x3ffu));
    if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* rounds to 65536 or more */
    if (bits < 0x38800000u) { /* denormal: a multiple of 2^-24 */
        float size, shifted;
        memcpy(&size, &bits, sizeof size);
        shifted = size + 0.5f; /* the last bit of 0.5 is 2^-24: the addition rounds as wanted */
        memcpy(&bits, &shifted, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + (bits >> 13 & 1);
    return (uint16_t)(sign | (bits - 0x38000000u) >> 13);
}

/* -- packing ------------------------------------------------------------------------------------ */

static uint64_t n_tiles(nx_ternary_type t, uint32_t n_out) { return ((uint64_t)n_out + types[t].rows - 1) / types[t].rows; }

/* Bytes of one block of one tile. */
static uint64_t tile_block_bytes(nx_ternary_type t) {
    const uint64_t weights = (uint64_t)types[t].rows * types[t].block;
    return t == NX_Q1_0 ? weights / 8 : weights / 4;
}

static uint64_t codes_bytes(nx_ternary_type t, uint32_t n_in, uint32_t n_out) {
    return n_tiles(t, n_out) * (n_in / types[t].block) * tile_block_bytes(t);
}

static uint64_t scales_bytes(nx_ternary_type t, uint32_t n_in, uint32_t n_out) {
    return n_tiles(t, n_out) * (n_in / types[t].block) * types[t].rows * sizeof(uint16_t);
}

uint64_t nx_ternary_packed_bytes(nx_ternary_type t, uint32_t n_in, uint32_t n_out) {
    return codes_bytes(t, n_in, n_out) + scales_bytes(t, n_in, n_out);
}

nx_status nx_ternary_create(nx_ternary_type t, uint32_t n_in, uint32_t n_out, nx_ternary *out) {
    memset(out, 0, sizeof *out);
    if ((unsigned)t >= NX_TERNARY_TYPES || n_in == 0 || n_out == 0 || n_in % types[t].block) return NX_E_INVALID;
    *out = (nx_ternary){.type = t, .n_in = n_in, .n_out = n_out};
    out->codes_bytes = codes_bytes(t, n_in, n_out);
    out->scales_bytes = scales_bytes(t, n_in, n_out);
    out->codes = nx_memory_map(out->codes_bytes);
    out->scales = nx_memory_map(out->scales_bytes);
    if (out->codes && out->scales) return NX_OK;
    nx_ternary_free(out);
    return NX_E_NOMEM;
}

void nx_ternary_free(nx_ternary *t) {
    nx_memory_unmap(t->codes, t->codes_bytes);
    nx_memory_unmap(t->scales, t->scales_bytes);
    memset(t, 0, sizeof *t);
}

void nx_ternary_finish(nx_ternary *t) {
    if (!t->scales) return;
    /* Scales of rows that do not exist are those of the first row, see nx_ternary_pack. */
    const uint64_t n = t->scales_bytes / sizeof *t->scales;
    for (uint64_t i = 1; i < n; i++)
        if (t->scales[i] != t->scales[0]) return;
    t->scale = nx_half_to_float(t->scales[0]);
    nx_memory_unmap(t->scales, t->scales_bytes);
    t->scales = NULL;
    t->scales_bytes = 0;
}

/* Where in the tile's block input i of row r is: byte, and shift. */
static void place_of(nx_ternary_type t, uint32_t r, uint32_t i, uint32_t *byte, unsigned *shift) {
    if (t == NX_Q2_0) {
        *byte = i / 4 * 64 + r % 16 * 4 + i % 4;
        *shift = r / 16 * 2;
    } else if (t == NX_Q1_0) {
        *byte = i / 32 * 64 + r / 8 * 32 + i % 32;
        *shift = r % 8;
    } else {
        *byte = i / 32 * 64 + r / 4 * 32 + i % 32;
        *shift = r % 4 * 2;
    }
}

/* One block of a tile from the codes of its rows, 256 bytes for each row whatever the type. */
static void join(nx_ternary_type t, uint8_t (*rows)[256], uint8_t *block) {
    if (t == NX_Q2_0) {
        for (int i = 0; i < 16; i++)
            for (int r = 0; r < 16; r++) { /* four inputs as one word: no code reaches its neighbour's bits */
                uint32_t a, b, c, d;
                memcpy(&a, &rows[r][4 * i], sizeof a);
                memcpy(&b, &rows[16 + r][4 * i], sizeof b);
                memcpy(&c, &rows[32 + r][4 * i], sizeof c);
                memcpy(&d, &rows[48 + r][4 * i], sizeof d);
                const uint32_t word = a | b << 2 | c << 4 | d << 6;
                memcpy(block + 64 * i + 4 * r, &word, sizeof word);
            }
        return;
    }
    for (int v = 0; v < (int)types[t].block / 32; v++)
        for (int half = 0; half < 2; half++) {
            uint8_t *out = block + 64 * v + 32 * half;
            if (t == NX_Q1_0) {
                memset(out, 0, 32);
                for (int r = 0; r < 8; r++)
                    for (int k = 0; k < 32; k++) out[k] = (uint8_t)(out[k] | rows[8 * half + r][32 * v + k] << r);
                continue;
            }
            const uint8_t *a = &rows[4 * half][32 * v], *b = &rows[4 * half + 1][32 * v];
            const uint8_t *c = &rows[4 * half + 2][32 * v], *d = &rows[4 * half + 3][32 * v];
            for (int k = 0; k < 32; k++) out[k] = (uint8_t)(a[k] | b[k] << 2 | c[k] << 4 | d[k] << 6);
        }
}

void nx_ternary_pack(nx_ternary *t, const void *rows, size_t stride, uint32_t begin, uint32_t end) {
    const uint32_t unit = types[t->type].rows, n_blocks = t->n_in / types[t->type].block;
    const uint64_t block_bytes = tile_block_bytes(t->type);
    uint8_t codes[64][256];
    memset(codes, 0, sizeof codes);
    for (uint32_t first = begin; first < end; first += unit) {
        uint8_t *out = t->codes + (uint64_t)(first / unit) * n_blocks * block_bytes;
        uint16_t *scales = t->scales + (uint64_t)(first / unit) * n_blocks * unit;
        const uint32_t n = end - first < unit ? end - first : unit;
        if (n < unit) memset(codes, 0, sizeof codes); /* of rows that do not exist */
        for (uint32_t b = 0; b < n_blocks; b++) {
            const uint8_t *at = (const uint8_t *)rows + (size_t)(first - begin) * stride +
                                (size_t)b * types[t->type].block_bytes;
            for (uint32_t r = 0; r < n; r++)
                scales[b * unit + r] = nx_ternary_unpack_block(t->type, at + (size_t)r * stride, codes[r]);
            for (uint32_t r = n; r < unit; r++) scales[b * unit + r] = scales[b * unit];
            join(t->type, codes, out + b * block_bytes);
        }
    }
}

void nx_ternary_unpack(const nx_ternary *t, uint32_t begin, uint32_t end, float *out) {
    const uint32_t unit = types[t->type].rows, block = types[t->type].block, n_blocks = t->n_in / block;
    for (uint32_t o = begin; o < end; o++)
        for (uint32_t i = 0; i < t->n_in; i++) {
            const uint64_t at = (uint64_t)(o / unit) * n_blocks + i / block;
            uint32_t byte;
            unsigned shift;
            place_of(t->type, o % unit, i % block, &byte, &shift);
            const float d = t->scales ? nx_half_to_float(t->scales[at * unit + o % unit]) : t->scale;
            const int bits = t->codes[at * tile_block_bytes(t->type) + byte] >> shift;
            out[(size_t)(o - begin) * t->n_in + i] = (float)(t->type == NX_Q1_0 ? (bits & 1) * 2 - 1 : (bits & 3) - 1) * d;
        }
}

/* -- activations -------------------------------------------------------------------------------- */

uint64_t nx_ternary_activation_bytes(nx_ternary_type t, uint32_t n_in) {
    return (uint64_t)(n_in / types[t].block) * types[t].act_bytes;
}

void nx_ternary_activate(nx_ternary_type t, const float *x, uint32_t begin, uint32_t end, void *out) {
    const nx_kernel_table *kernels = nx_kernels_table();
    x += (size_t)begin * types[t].block;
    if (t == NX_Q2_0) kernels->activate_64(x, end - begin, (nx_act_64 *)out + begin);
    else if (t == NX_Q1_0) kernels->activate_128(x, end - begin, (nx_act_128 *)out + begin);
    else kernels->activate_256(x, end - begin, (nx_act_256 *)out + begin);
}

/* -- products ----------------------------------------------------------------------------------- */

/* Scales so small that dividing them by 64 is not exact: the reference does not divide. */
static bool any_tiny(const nx_ternary *t, const uint8_t *columns, uint32_t n_columns) {
    const uint64_t bytes = nx_ternary_activation_bytes(t->type, t->n_in);
    const uint32_t n_blocks = t->n_in / types[t->type].block;
    for (uint32_t c = 0; c < n_columns; c++)
        for (uint32_t b = 0; b < n_blocks; b++) {
            const void *at = columns + c * bytes + (uint64_t)b * types[t->type].act_bytes;
            /* scales of Q8_0 are halves, which are never that small */
            const float d = t->type == NX_TQ1_0 || t->type == NX_TQ2_0 ? ((const nx_act_256 *)at)->d[0] : 1;
            if (d < NX_SMALLEST_SCALE && d > -NX_SMALLEST_SCALE && d != 0) return true;
        }
    return false;
}

static void tile(const nx_kernel_table *kernels, const nx_ternary *t, uint32_t number, const uint8_t *columns,
                 uint32_t n, float *out) {
    const uint64_t bytes = nx_ternary_activation_bytes(t->type, t->n_in);
    const uint32_t n_blocks = t->n_in / types[t->type].block;
    const uint8_t *codes = t->codes + (uint64_t)number * n_blocks * tile_block_bytes(t->type);
    const uint16_t *scales = t->scales ? t->scales + (uint64_t)number * n_blocks * types[t->type].rows : NULL;
    const void *at[NX_MOST_COLUMNS];
    for (uint32_t c = 0; c < n; c++) at[c] = columns + c * bytes;
    if (t->type == NX_Q2_0) kernels->rows(codes, scales, t->scale, n_blocks, (const nx_act_64 *const *)at, n, out);
    else if (t->type == NX_Q1_0)
        kernels->bits(codes, scales, t->scale, n_blocks, (const nx_act_128 *const *)at, n, out);
    else kernels->lanes(codes, scales, t->scale, n_blocks, (const nx_act_256 *const *)at, n, out);
}

void nx_ternary_multiply(const nx_ternary *t, const void *columns, uint32_t n_columns, uint32_t begin, uint32_t end,
                         float *y, size_t y_stride) {
    const uint32_t unit = types[t->type].rows;
    const uint64_t bytes = nx_ternary_activation_bytes(t->type, t->n_in);
    const nx_kernel_table *kernels = any_tiny(t, columns, n_columns) ? nx_kernels_ref() : nx_kernels_table();
    const bool by_lanes = t->type == NX_TQ1_0 || t->type == NX_TQ2_0;
    if (by_lanes && kernels->lanes_run && n_columns <= NX_MOST_COLUMNS && end - begin >= unit) {
        const uint32_t n_blocks = t->n_in / types[t->type].block, first = begin / unit, n = (end - begin) / unit;
        const nx_act_256 *at[NX_MOST_COLUMNS];
        for (uint32_t c = 0; c < n_columns; c++)
            at[c] = (const nx_act_256 *)(const void *)((const uint8_t *)columns + c * bytes);
        kernels->lanes_run(t->codes + (uint64_t)first * n_blocks * tile_block_bytes(t->type),
                           t->scales ? t->scales + (uint64_t)first * n_blocks * unit : NULL, t->scale, n_blocks, n, at,
                           n_columns, y + begin, y_stride);
        begin += n * unit;
    }
    for (uint32_t batch = 0; batch < n_columns && begin < end; batch += BATCH_COLUMNS) {
        const uint32_t batch_end = batch + BATCH_COLUMNS < n_columns ? batch + BATCH_COLUMNS : n_columns;
        for (uint32_t first = begin; first < end; first += unit) {
            const uint32_t rows = first + unit < end ? unit : end - first;
            for (uint32_t c = batch; c < batch_end; c += NX_MOST_COLUMNS) {
                const uint32_t n = c + NX_MOST_COLUMNS < batch_end ? NX_MOST_COLUMNS : batch_end - c;
                float out[NX_MOST_COLUMNS * 64];
                tile(kernels, t, first / unit, (const uint8_t *)columns + c * bytes, n, out);
                for (uint32_t i = 0; i < n; i++)
                    memcpy(y + (size_t)(c + i) * y_stride + first, out + (size_t)i * unit, rows * sizeof *y);
            }
        }
    }
}
