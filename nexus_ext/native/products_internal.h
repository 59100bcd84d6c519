/* products_internal.h: what products.c and its kernels share. Not installed. */
#ifndef NEXUS_PRODUCTS_INTERNAL_H
#define NEXUS_PRODUCTS_INTERNAL_H

#include <stdbool.h>
#include <string.h>

#include "nexus_products.h"

#define NX_PRODUCT_BLOCK 32 /* weights or activations */
#define NX_PRODUCT_GROUPS 8 /* of four neighbours in a block */
#define NX_Q8_0_BYTES 34    /* a half, then the values */

/* Weights get an offset that makes them positive, as the instruction for four products at once wants one side
 * to be: sum(w * y) over four neighbours is sum((w + offset) * y) + less. Without an offset they are signed. */
typedef struct nx_column_block {
    int32_t values[NX_PRODUCT_GROUPS]; /* four signed bytes each */
    int32_t less[NX_PRODUCT_GROUPS];   /* -offset times their sum */
    float scale;
} nx_column_block;

typedef struct nx_rows_block {
    uint8_t weights[NX_PRODUCT_GROUPS][NX_PRODUCT_ROWS][4]; /* of a group, side by side */
    float scales[NX_PRODUCT_ROWS];
} nx_rows_block;

/* How a type is to be multiplied with some instruction set. */
typedef struct nx_product_form {
    uint8_t offset;
    bool two_sums; /* blocks of even and of odd number apart, as ggml does */
} nx_product_form;

typedef void (*nx_product_unpacker)(const uint8_t *const *rows, size_t n_blocks, uint8_t offset,
                                    nx_rows_block *unpacked);
/* A kernel computes up to NX_PRODUCT_COLUMNS columns, and all rows. */
#define NX_PRODUCT_COLUMNS 2
typedef void (*nx_product_kernel)(const nx_rows_block *rows, size_t n_blocks, nx_product_form form,
                                  const nx_column_block *const *columns, size_t n_columns, float *const *out);

/* NULL where this build has none. Unpacking is the same for all instruction sets. */
nx_product_unpacker nx_products_unpacker(nx_product_type);
nx_product_kernel nx_products_avx2(void);
nx_product_kernel nx_products_avx512(void);

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
