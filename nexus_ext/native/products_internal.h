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

/* -- types in blocks of 256, whose weights have a scale of their own for each 16 or 32 --------------- */

#define NX_SUPER_BLOCK 256
#define NX_SUPER_CHUNKS 8 /* of 32 weights */
#define NX_Q8_K_BYTES 292 /* a float, the values, 16 sums of 16 of them */

/* A column for K types. Sums are those of 16 or 32 values, two neighbours in 16 bits each. */
typedef struct nx_column_super {
    int32_t values[NX_SUPER_CHUNKS][NX_PRODUCT_GROUPS]; /* four signed bytes each */
    int32_t sums_of_16[NX_SUPER_CHUNKS];
    int32_t sums_of_32[NX_SUPER_CHUNKS / 2];
    float scale;
} nx_column_super;

/* A code is positive, and its weight is less. How ggml takes that off differs by type, and with it the bits. */
typedef enum nx_super_form {
    NX_SUPER_MINS,   /* in sums of their own: mins[0..3] of 32 weights each, times sums_of_32 */
    NX_SUPER_OFFSET, /* in each block before anything else: mins[0..7] of 16 weights each, times sums_of_16 */
} nx_super_form;

/* Scales and what codes have more are in 16 bits: a scale twice, the others of two neighbours. */
typedef struct nx_rows_super {
    uint8_t codes[NX_SUPER_CHUNKS][NX_PRODUCT_GROUPS][NX_PRODUCT_ROWS][4];
    int32_t scales[NX_SUPER_CHUNKS][2][NX_PRODUCT_ROWS]; /* of the halves of a chunk */
    int32_t mins[NX_SUPER_CHUNKS][NX_PRODUCT_ROWS];
    float scale[NX_PRODUCT_ROWS], min_scale[NX_PRODUCT_ROWS];
} nx_rows_super;

typedef void (*nx_super_unpacker)(const uint8_t *const *rows, size_t n_blocks, nx_rows_super *unpacked);
/* A kernel computes up to NX_SUPER_COLUMNS columns, and all rows. */
#define NX_SUPER_COLUMNS 4
typedef void (*nx_super_kernel)(const nx_rows_super *rows, size_t n_blocks, nx_super_form form,
                                const nx_column_super *const *columns, size_t n_columns, float *const *out);

nx_super_unpacker nx_products_super_unpacker(nx_product_type);
nx_super_kernel nx_products_super_avx2(void);
nx_super_kernel nx_products_super_avx512(void);

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
