/* products_internal.h: what products.c and its kernels share. Not installed. */
#ifndef NEXUS_PRODUCTS_INTERNAL_H
#define NEXUS_PRODUCTS_INTERNAL_H

#include <string.h>

#include "nexus_products.h"

#define NX_PANEL_BLOCK 32 /* weights or activations */
#define NX_Q8_0_BYTES 34  /* a half, then the values */

/* A block of each column of a panel. Values are 128 more than they are, so that they are unsigned, as the
 * instruction for four products at once wants one side to be. Columns 2 p and 2 p + 1 fill a register. */
typedef struct nx_panel_block {
    uint8_t values[NX_PANEL_COLUMNS][NX_PANEL_BLOCK];
    float scales[NX_PANEL_COLUMNS];
    float padding[8]; /* so that values stay aligned */
} nx_panel_block;

/* One row of `n_blocks` blocks times the columns of a panel. What `out` has room for beyond them may be written. */
typedef void (*nx_product_kernel)(const uint8_t *row, size_t n_blocks, const nx_panel_block *panel,
                                  size_t n_columns, float *out);

/* NULL where this build has none. */
nx_product_kernel nx_products_avx2(nx_product_type);
nx_product_kernel nx_products_avx512(nx_product_type);

/* What the four bits of a code stand for. In MXFP4 (1 sign, 2 exponent, 1 mantissa), twice that: its scale is
 * half of 2^(e - 127). */
extern const int8_t nx_iq4_nl_values[16], nx_mxfp4_values[16];

static inline float nx_mxfp4_scale(uint8_t e) {
    const uint32_t bits = e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

#endif
