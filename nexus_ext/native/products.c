/* products.c: rows of several types times columns, see nexus_products.h. */
#include "nexus_products.h"

#include <string.h>

#include "kernels_internal.h"
#include "products_internal.h"

static const struct {
    const char *name;
    uint32_t block_bytes; /* of 32 weights */
    uint32_t unit;        /* a row is a multiple of so many weights: ggml sums an odd number of blocks another way */
    bool two_sums;
    uint8_t offset; /* that makes all weights positive */
} types[NX_PRODUCT_COUNT] = {
    [NX_PRODUCT_Q4_0] = {"q4_0", 18, 32, false, 8},
    [NX_PRODUCT_Q8_0] = {"q8_0", 34, 32, false, 128},
    [NX_PRODUCT_IQ4_NL] = {"iq4_nl", 18, 64, true, 127},
    [NX_PRODUCT_MXFP4] = {"mxfp4", 17, 64, true, 12},
};
#define MOST_OFFSET_OF_AVX2 64 /* twice as much times 127, twice, still fits into 16 bits */

const int8_t nx_iq4_nl_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
const int8_t nx_mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static nx_product_kernel kernel(void) {
    switch (nx_kernels_isa()) {
    case NX_ISA_AVX512: return nx_products_avx512();
    case NX_ISA_AVX2: return nx_products_avx2();
    default: return NULL;
    }
}

static nx_product_form form_of(nx_product_type type) {
    const uint8_t offset = types[type].offset;
    const bool fits = nx_kernels_isa() == NX_ISA_AVX512 || offset <= MOST_OFFSET_OF_AVX2;
    return (nx_product_form){.offset = fits ? offset : 0, .two_sums = types[type].two_sums};
}

const char *nx_product_name(nx_product_type type) {
    return (unsigned)type < NX_PRODUCT_COUNT ? types[type].name : "unknown";
}

size_t nx_product_row_bytes(nx_product_type type, uint32_t n_in) {
    if ((unsigned)type >= NX_PRODUCT_COUNT || n_in == 0 || n_in % types[type].unit) return 0;
    return (size_t)(n_in / NX_PRODUCT_BLOCK) * types[type].block_bytes;
}

int nx_products_usable(void) { return kernel() != NULL; }

size_t nx_column_bytes(uint32_t n_in) { return n_in / NX_PRODUCT_BLOCK * sizeof(nx_column_block); }

void nx_column_pack(nx_product_type type, const void *column, uint32_t n_in, void *packed) {
    const int32_t offset = form_of(type).offset;
    const uint8_t *block = column;
    nx_column_block *out = packed;
    for (uint32_t i = 0; i < n_in; i += NX_PRODUCT_BLOCK, block += NX_Q8_0_BYTES, out++) {
        uint16_t scale;
        memcpy(&scale, block, sizeof scale);
        out->scale = nx_half_to_float(scale);
        memcpy(out->values, block + sizeof scale, sizeof out->values);
        const int8_t *y = (const int8_t *)(block + sizeof scale);
        for (int g = 0; g < NX_PRODUCT_GROUPS; g++)
            out->less[g] = -offset * (y[4 * g] + y[4 * g + 1] + y[4 * g + 2] + y[4 * g + 3]);
    }
}

size_t nx_unpacked_bytes(uint32_t n_in) { return n_in / NX_PRODUCT_BLOCK * sizeof(nx_rows_block); }

void nx_product_unpack(nx_product_type type, const void *const *rows, uint32_t n_in, void *unpacked) {
    const uint8_t *at[NX_PRODUCT_ROWS];
    for (int r = 0; r < NX_PRODUCT_ROWS; r++) at[r] = rows[r];
    nx_products_unpacker(type)(at, n_in / NX_PRODUCT_BLOCK, form_of(type).offset, unpacked);
}

void nx_product_multiply(nx_product_type type, const void *unpacked, uint32_t n_rows, uint32_t n_in,
                         const void *const *columns, size_t n_columns, float *const *out) {
    const nx_product_kernel multiply = kernel();
    const nx_product_form form = form_of(type);
    for (size_t first = 0; first < n_columns; first += NX_PRODUCT_COLUMNS) {
        const nx_column_block *some[NX_PRODUCT_COLUMNS];
        float all_rows[NX_PRODUCT_COLUMNS][NX_PRODUCT_ROWS], *to[NX_PRODUCT_COLUMNS];
        size_t n = 0;
        for (; n < NX_PRODUCT_COLUMNS && first + n < n_columns; n++) {
            some[n] = columns[first + n];
            to[n] = n_rows < NX_PRODUCT_ROWS ? all_rows[n] : out[first + n];
        }
        multiply(unpacked, n_in / NX_PRODUCT_BLOCK, form, some, n, to);
        for (size_t c = 0; c < n && n_rows < NX_PRODUCT_ROWS; c++)
            memcpy(out[first + c], all_rows[c], n_rows * sizeof(float));
    }
}
