/* nexus_products.h: quantized rows times several columns, bit by bit what ggml's dot products give.
 *
 * ggml multiplies experts (MUL_MAT_ID) of the types below one row with one column at a time, and unpacks
 * the row again for each column. Here a row is unpacked once for up to eight columns. Each column is summed
 * in the order of ggml's x86 kernels: eight partial sums, one for each group of four neighbours in a block
 * of 32, added up by blocks, then in a tree. Whether a ggml really sums like that is for the caller to
 * check against its `vec_dot`, before the first use.
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

#define NX_PANEL_COLUMNS 8

/* Types of rows; columns are of ggml's type Q8_0 for all of them. */
typedef enum nx_product_type {
    NX_PRODUCT_Q4_0,
    NX_PRODUCT_Q8_0,
    NX_PRODUCT_IQ4_NL,
    NX_PRODUCT_MXFP4,
    NX_PRODUCT_COUNT
} nx_product_type;

/* ggml's name of the type, for instance "q4_0"; static storage. */
NX_API const char *nx_product_name(nx_product_type);
/* Bytes of a row of `n_in` weights; 0: not a length that the type can have here. */
NX_API size_t nx_product_row_bytes(nx_product_type, uint32_t n_in);
/* Are there kernels for the instructions that are in use (nx_kernels_isa)? */
NX_API int nx_products_usable(void);

/* Bytes of a panel of up to NX_PANEL_COLUMNS columns of `n_in` activations. */
NX_API size_t nx_panel_bytes(uint32_t n_in);
/* Put columns (n_in / 32 blocks of Q8_0 each, of values from -127 to 127) side by side. `panel` is aligned to
 * 64 bytes. */
NX_API void nx_panel_pack(const void *const *columns, size_t n_columns, uint32_t n_in, void *panel);

/* out[c][r] = row r * column c. Rows lie `stride` bytes apart. Only when nx_products_usable(). */
NX_API void nx_product_rows(nx_product_type, const void *rows, size_t stride, uint32_t n_rows, uint32_t n_in,
                            const void *panel, size_t n_columns, float *const *out);

#ifdef __cplusplus
}
#endif
#endif
