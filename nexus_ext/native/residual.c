/* residual.c: encoding residuals, choosing channels, adding what the kernels computed. See
 * nexus_residual.h for the method and the layout. */
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "kernels_internal.h"

#define CANDIDATES 32
#define ROWS_AT_ONCE 256

uint64_t nx_residual_row_bytes(uint32_t n_out) {
    return ((uint64_t)n_out + NX_RESIDUAL_LINE - 1) / NX_RESIDUAL_LINE * (NX_RESIDUAL_LINE / 2);
}

/* Where the nibble of output `o` is in its row: byte, and shift. */
static uint64_t nibble_byte(uint32_t o) { return (uint64_t)(o / 128) * 64 + o % 16 * 4 + o % 128 / 32; }
static unsigned nibble_shift(uint32_t o) { return o % 128 / 16 % 2 * 4; }

/* -- encoding ----------------------------------------------------------------------------------- */

static double squared_error(const float *r, uint32_t n, float scale) {
    const float inverse = 1.0f / scale;
    double sum = 0;
    for (uint32_t i = 0; i < n;) {
        float part = 0; /* short enough that float does; the sum of parts in double */
        for (const uint32_t end = i + 256 < n ? i + 256 : n; i < end; i++) {
            float q = rintf(r[i] * inverse);
            q = q > 7 ? 7 : q < -7 ? -7 : q;
            const float error = (r[i] - q * scale) * inverse; /* in steps: squares of small floats vanish */
            part += error * error;
        }
        sum += part;
    }
    return sum * (double)scale * (double)scale;
}

static float best_scale(const float *r, uint32_t n, float largest) {
    const float top = largest / 7;
    if (!(top >= FLT_MIN)) return 0; /* nothing that a scale could express */
    float best = top;
    double least = INFINITY;
    for (int i = CANDIDATES; i >= 1; i--) {
        const float scale = top * (float)i / CANDIDATES;
        if (!(scale >= FLT_MIN)) break;
        const double error = squared_error(r, n, scale);
        if (error < least) {
            least = error;
            best = scale;
        }
    }
    return best;
}

nx_status nx_residual_encode(const float *r, size_t stride, uint32_t n_in, uint32_t n_out, uint32_t begin,
                             uint32_t end, uint8_t *codes, float *scales) {
    if (begin > end || end > n_out || begin % NX_RESIDUAL_LINE || (end % NX_RESIDUAL_LINE && end != n_out))
        return NX_E_INVALID;
    const uint64_t row_bytes = nx_residual_row_bytes(n_out);
    const uint64_t line_begin = begin / 2, line_end = nx_residual_row_bytes(end);
    for (uint32_t c = 0; c < n_in; c++) memset(codes + c * row_bytes + line_begin, 0x88, line_end - line_begin);
    for (uint32_t o = begin; o < end; o++) {
        const float *row = r + (size_t)o * stride;
        float largest = 0;
        for (uint32_t c = 0; c < n_in; c++) {
            if (!isfinite(row[c])) return NX_E_INVALID;
            if (fabsf(row[c]) > largest) largest = fabsf(row[c]);
        }
        const float scale = scales[o] = best_scale(row, n_in, largest);
        if (scale == 0) continue;
        const float inverse = 1.0f / scale;
        uint8_t *at = codes + nibble_byte(o);
        const unsigned shift = nibble_shift(o);
        for (uint32_t c = 0; c < n_in; c++, at += row_bytes) {
            float q = rintf(row[c] * inverse);
            q = q > 7 ? 7 : q < -7 ? -7 : q;
            *at = (uint8_t)((*at & ~(15u << shift)) | (unsigned)((int)q + 8) << shift);
        }
    }
    return NX_OK;
}

void nx_residual_decode(const nx_residual_matrix *m, uint32_t begin, uint32_t end, float *r, size_t stride) {
    const uint64_t row_bytes = nx_residual_row_bytes(m->n_out);
    for (uint32_t o = begin; o < end; o++)
        for (uint32_t c = 0; c < m->n_in; c++) {
            const int code = m->codes[c * row_bytes + nibble_byte(o)] >> nibble_shift(o) & 15;
            r[(size_t)(o - begin) * stride + c] = m->scales[o] * (float)(code - 8);
        }
}

/* -- choosing channels -------------------------------------------------------------------------- */

/* |x| as an integer of the same order; NaN above infinity. */
static uint32_t magnitude(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}

/* Radix selection: find the k-th largest value 11 bits at a time, then take what is above it and as many
 * of what equals it as are still missing. */
size_t nx_residual_select(const float *x, uint32_t n, uint32_t k, uint32_t *channels) {
    if (k > n) k = n;
    if (k == 0) return 0;
    uint32_t prefix = 0, mask = 0, missing = k;
    static const unsigned shifts[] = {20, 10, 0};
    for (int pass = 0; pass < 3; pass++) {
        uint32_t counts[2048] = {0};
        const uint32_t digits = pass == 0 ? 2047 : 1023;
        for (uint32_t i = 0; i < n; i++) {
            const uint32_t m = magnitude(x[i]);
            if ((m & mask) == prefix) counts[m >> shifts[pass] & digits]++;
        }
        uint32_t digit = digits;
        while (counts[digit] < missing) missing -= counts[digit--];
        prefix |= digit << shifts[pass];
        mask |= digits << shifts[pass];
        if (counts[digit] == missing) { /* all that share this prefix: no need to look closer */
            missing = UINT32_MAX;
            break;
        }
    }
    const uint32_t least = prefix;
    size_t taken = 0;
    for (uint32_t i = 0; i < n && taken < k; i++) {
        const uint32_t m = magnitude(x[i]);
        if (missing == UINT32_MAX) {
            if (m >= least) channels[taken++] = i;
        } else if (m > least) {
            channels[taken++] = i;
        } else if (m == least && missing) {
            missing--;
            channels[taken++] = i;
        }
    }
    return taken;
}

static unsigned bucket_of(float x, float high, float low) {
    const float a = fabsf(x);
    if (!(a < high)) return 0;
    if (a >= low) {
        const float at = (high - a) / (high - low) * 16;
        return at < 15 ? (unsigned)at : 15;
    }
    const float at = (low - a) / low * 16;
    return at < 15 ? 16 + (unsigned)at : 31;
}

size_t nx_residual_select_buckets(const float *x, uint32_t n, uint32_t k, float high, float low,
                                  uint32_t *channels) {
    uint32_t counts[32] = {0};
    for (uint32_t i = 0; i < n; i++) counts[bucket_of(x[i], high, low)]++;
    if (k > n) k = n;
    if (k == 0) return 0;
    uint32_t missing = k;
    unsigned last = 0;
    while (counts[last] < missing) missing -= counts[last++];
    size_t taken = 0;
    for (uint32_t i = 0; i < n && taken < k; i++) {
        const unsigned bucket = bucket_of(x[i], high, low);
        if (bucket < last) channels[taken++] = i;
        else if (bucket == last && missing) {
            missing--;
            channels[taken++] = i;
        }
    }
    return taken;
}

/* -- adding ------------------------------------------------------------------------------------- */

void nx_residual_products(const float *x, const uint32_t *channels, size_t n, float *products) {
    for (size_t i = 0; i < n; i++)
        for (int code = 0; code < 16; code++) products[16 * i + (size_t)code] = x[channels[i]] * (float)(code - 8);
}

void nx_residual_add(const nx_residual_matrix *m, const uint32_t *channels, const float *products, size_t n,
                     uint32_t begin, uint32_t end, float *sums, float *y) {
    if (begin >= end || n == 0) return;
    const nx_kernel_table *kernels = nx_kernels_table();
    const uint64_t row_bytes = nx_residual_row_bytes(m->n_out);
    const size_t n_lines = (end - begin + NX_RESIDUAL_LINE - 1) / NX_RESIDUAL_LINE;
    memset(sums, 0, n_lines * NX_RESIDUAL_LINE * sizeof *sums);
    const uint8_t *rows[ROWS_AT_ONCE];
    for (size_t i = 0; i < n; i += ROWS_AT_ONCE) {
        const size_t some = n - i < ROWS_AT_ONCE ? n - i : ROWS_AT_ONCE;
        for (size_t r = 0; r < some; r++) rows[r] = m->codes + channels[i + r] * row_bytes + begin / 2;
        kernels->residual_rows(rows, products + 16 * i, some, n_lines, sums);
    }
    for (uint32_t o = begin; o < end; o++) y[o] += m->scales[o] * sums[o - begin];
}
