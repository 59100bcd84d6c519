/* nexus_products.h: quantized rows times several columns, bit by bit what ggml's dot products give.
 *
 * ggml multiplies experts (MUL_MAT_ID) of the types below one row with one column at a time, and unpacks
 * the row again for each column. Here sixteen rows are unpacked once for all columns, side by side: the sums
 * of sixteen results are in one register. Each is summed in the order of ggml's x86 kernels: eight partial
 * sums, one for each group of four neighbours in 32, added up by blocks, then in a tree. Whether a ggml really
 * sums like that is for the caller to check against its `vec_dot`, before the first use.
 *
 * No threads, no allocation: a caller with several threads gives each of them rows.
 */
#ifndef NEXUS_PRODUCTS_H
#define NEXUS_PRODUCTS_H

#include <stddef.h>
#include <stdint.h>

#include "nexus_core.h"

#ifdef __cplusplus
extern "C" {
#endif

#define NX_PRODUCT_ROWS 16 /* that are unpacked together */

/* Types of rows. Columns are of ggml's type Q8_K for K types, else of Q8_0. */
typedef enum nx_product_type {
    NX_PRODUCT_Q4_0,
    NX_PRODUCT_Q8_0,
    NX_PRODUCT_IQ4_NL,
    NX_PRODUCT_MXFP4,
    NX_PRODUCT_Q4_K,
    NX_PRODUCT_Q6_K,
    NX_PRODUCT_COUNT
} nx_product_type;

/* ggml's name of the type, for instance "q4_0"; static storage. */
NX_API const char *nx_product_name(nx_product_type);
/* The same of the columns that rows of a type are multiplied by. */
NX_API const char *nx_product_column_name(nx_product_type);
NX_API int nx_product_is_k(nx_product_type);
/* Bytes of a block, which has 256 weights of a K type, else 32. */
NX_API size_t nx_product_block_bytes(nx_product_type);
/* Bytes of a row of `n_in` weights; 0: not a length that the type can have here. */
NX_API size_t nx_product_row_bytes(nx_product_type, uint32_t n_in);
/* Are there kernels for the instructions that are in use (nx_kernels_isa)? The others need them. */
NX_API int nx_products_usable(void);

/* Bytes of a column of `n_in` activations, packed. */
NX_API size_t nx_column_bytes(nx_product_type, uint32_t n_in);
/* Pack a column (of values from -127 to 127) for rows of a type. `packed` is aligned to 4 bytes. */
NX_API void nx_column_pack(nx_product_type, const void *column, uint32_t n_in, void *packed);

/* Bytes of NX_PRODUCT_ROWS rows of `n_in` weights, unpacked. */
NX_API size_t nx_unpacked_bytes(nx_product_type, uint32_t n_in);
/* Unpack rows, some of which may be the same. `unpacked` is aligned to 64 bytes. */
NX_API void nx_product_unpack(nx_product_type, const void *const *rows, uint32_t n_in, void *unpacked);

/* out[c][r] = row r * column c, of the first `n_rows` rows. */
NX_API void nx_product_multiply(nx_product_type, const void *unpacked, uint32_t n_rows, uint32_t n_in,
                                const void *const *columns, size_t n_columns, float *const *out);

#ifdef __cplusplus
}
#endif
#endif
