/* nexus_ternary.h: products with matrices of very few bits, one pass over the weights for up to 8 columns.
 *
 * Takes matrices as llama.cpp stores them (block types TQ1_0, TQ2_0, Q2_0 and Q1_0), packs them into a
 * layout of our own and multiplies them with activations that were rounded to 8 bits exactly as ggml does
 * (Q8_K for TQ1_0 and TQ2_0, Q8_0 for Q2_0 and Q1_0). Sums of integers are exact. Sums of floats are made
 * in the order in which ggml's x86 kernels make them, with the same fused operations: on such a build of
 * ggml the results are the same bits, elsewhere they differ by rounding. All implementations agree.
 *
 * A caller with threads gives each a range of rows that begins at a multiple of nx_ternary_row_unit().
 */
#ifndef NEXUS_TERNARY_H
#define NEXUS_TERNARY_H

#include <stddef.h>
#include <stdint.h>

#include "nexus_status.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * The layouts. A code is the stored value plus one (0, 1, 2; Q2_0 also 3), for Q1_0 the stored bit.
 *
 * Lanes (TQ1_0, TQ2_0; Q1_0 with single bits): a tile is 8 rows (Q1_0: 16), one byte holds the codes of 4
 * rows (Q1_0: 8) for one input, row 0 in the lowest bits. 64 bytes are 32 inputs of the first half of the
 * rows, then the same inputs of the second half. A block (256 inputs; Q1_0: 128) follows the other.
 * Rows (Q2_0): a tile is 64 rows; 64 bytes are 16 groups of 4 inputs: byte 4 i + j holds, from the lowest
 * bits, rows i, 16 + i, 32 + i and 48 + i for input j of the four. A block is 64 inputs.
 *
 * Why rows share a byte: with u = 2 bits of row 0, 4 bits of rows 0 and 1, ... the sums of products of u
 * with the activations differ by the sums of single rows (times a power of 4), so a mask is all that
 * unpacking costs, and each activation is loaded once for all the rows of a byte.
 */
typedef enum nx_ternary_type { NX_TQ1_0 = 0, NX_TQ2_0 = 1, NX_Q2_0 = 2, NX_Q1_0 = 3, NX_TERNARY_TYPES } nx_ternary_type;

typedef struct nx_ternary {
    nx_ternary_type type;
    uint32_t n_in, n_out;
    uint8_t *codes;   /* tiles; of a tile its blocks */
    uint16_t *scales; /* half precision, of a tile its blocks, of a block one for each row; NULL: all equal */
    float scale;      /* if all are equal */
    uint64_t codes_bytes, scales_bytes; /* allocated */
} nx_ternary;

/* The type with ggml's name for it ("tq2_0", any case), or NX_TERNARY_TYPES. */
nx_ternary_type nx_ternary_type_of(const char *name);
uint32_t nx_ternary_block(nx_ternary_type);    /* weights of one stored block; n_in is a multiple */
uint32_t nx_ternary_block_bytes(nx_ternary_type);
uint32_t nx_ternary_row_unit(nx_ternary_type); /* rows of one tile */
/* Memory that a packed matrix takes at most (equal scales take less). */
uint64_t nx_ternary_packed_bytes(nx_ternary_type, uint32_t n_in, uint32_t n_out);

/* Memory for a matrix; free it with nx_ternary_free. NX_E_INVALID: n_in is no multiple of the block. */
nx_status nx_ternary_create(nx_ternary_type, uint32_t n_in, uint32_t n_out, nx_ternary *out);
/* Pack rows [begin, end) of what llama.cpp stores; row `begin` is at `rows`, the next one `stride` bytes
 * further, at any alignment. `begin` is a multiple of the row unit, `end` too or n_out. */
void nx_ternary_pack(nx_ternary *, const void *rows, size_t stride, uint32_t begin, uint32_t end);
/* When all rows are packed: if all scales are equal, keep one. */
void nx_ternary_finish(nx_ternary *);
void nx_ternary_free(nx_ternary *);
/* Rows [begin, end) as floats, for tests and tools; row o at out + (o - begin) * n_in. */
void nx_ternary_unpack(const nx_ternary *, uint32_t begin, uint32_t end, float *out);

/* Bytes of one column of activations for this type; a multiple of 64. */
uint64_t nx_ternary_activation_bytes(nx_ternary_type, uint32_t n_in);
/* Round blocks [begin, end) (of nx_ternary_block() inputs) of a column to 8 bits. `out` is the column's
 * memory, aligned to 64 bytes. */
void nx_ternary_activate(nx_ternary_type, const float *x, uint32_t begin, uint32_t end, void *out);
/* y[c * y_stride + o] = row o times column c, for rows [begin, end) and all columns, which lie one after
 * the other at `columns`. */
void nx_ternary_multiply(const nx_ternary *, const void *columns, uint32_t n_columns, uint32_t begin,
                         uint32_t end, float *y, size_t y_stride);

/* The same straight from rows as llama.cpp stores them, for weights that are soon gone: row o at
 * rows + o * stride, at any alignment; columns[c] is a column of activations and y[c] its result; any
 * range of rows. The same bits as from a packed matrix. */
void nx_ternary_multiply_stored(nx_ternary_type, const void *rows, size_t stride, uint32_t n_in,
                                const void *const *columns, uint32_t n_columns, uint32_t begin, uint32_t end,
                                float *const *y);
/* Has the implementation in use a kernel for that? Without, the portable one runs, slowly. */
int nx_ternary_stored_usable(nx_ternary_type);

#ifdef __cplusplus
}
#endif
#endif
