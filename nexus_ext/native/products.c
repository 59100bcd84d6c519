/* products.c: panels of columns, see nexus_products.h. */
#include "nexus_products.h"

#include <string.h>

#include "kernels_internal.h"
#include "products_internal.h"

static const struct {
    const char *name;
    uint32_t block_bytes; /* of 32 weights */
    uint32_t unit;        /* a row is a multiple of so many weights */
} types[NX_PRODUCT_COUNT] = {
    [NX_PRODUCT_Q4_0] = {"q4_0", 18, 32},
    [NX_PRODUCT_Q8_0] = {"q8_0", 34, 32},
    [NX_PRODUCT_IQ4_NL] = {"iq4_nl", 18, 64}, /* ggml sums blocks of even and of odd number apart, and */
    [NX_PRODUCT_MXFP4] = {"mxfp4", 17, 64},   /* another way when one is left over */
};

const int8_t nx_iq4_nl_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
const int8_t nx_mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

const char *nx_product_name(nx_product_type type) {
    return (unsigned)type < NX_PRODUCT_COUNT ? types[type].name : "unknown";
}

size_t nx_product_row_bytes(nx_product_type type, uint32_t n_in) {
    if ((unsigned)type >= NX_PRODUCT_COUNT || n_in == 0 || n_in % types[type].unit) return 0;
    return (size_t)(n_in / NX_PANEL_BLOCK) * types[type].block_bytes;
}

size_t nx_panel_bytes(uint32_t n_in) { return n_in / NX_PANEL_BLOCK * sizeof(nx_panel_block); }

void nx_panel_pack(const void *const *columns, size_t n_columns, uint32_t n_in, void *panel) {
    const size_t n_blocks = n_in / NX_PANEL_BLOCK;
    nx_panel_block *out = panel;
    for (size_t b = 0; b < n_blocks; b++, out++) {
        for (size_t c = 0; c < n_columns; c++) {
            const uint8_t *block = (const uint8_t *)columns[c] + b * NX_Q8_0_BYTES;
            uint16_t scale;
            memcpy(&scale, block, sizeof scale);
            out->scales[c] = nx_half_to_float(scale);
            uint64_t values[4];
            memcpy(values, block + sizeof scale, sizeof values);
            for (size_t i = 0; i < 4; i++) values[i] ^= 0x8080808080808080u; /* -128..127 -> 0..255 */
            memcpy(out->values[c], values, sizeof values);
        }
        for (size_t c = n_columns; c < NX_PANEL_COLUMNS; c++) {
            out->scales[c] = 0;
            memset(out->values[c], 0, sizeof out->values[c]);
        }
    }
}

static nx_product_kernel kernel_of(nx_product_type type) {
    switch (nx_kernels_isa()) {
    case NX_ISA_AVX512: return nx_products_avx512(type);
    case NX_ISA_AVX2: return nx_products_avx2(type);
    default: return NULL;
    }
}

int nx_products_usable(void) { return kernel_of(NX_PRODUCT_Q4_0) != NULL; }

void nx_product_rows(nx_product_type type, const void *rows, size_t stride, uint32_t n_rows, uint32_t n_in,
                     const void *panel, size_t n_columns, float *const *out) {
    const nx_product_kernel kernel = kernel_of(type);
    for (uint32_t r = 0; r < n_rows; r++) {
        float values[NX_PANEL_COLUMNS];
        kernel((const uint8_t *)rows + r * stride, n_in / NX_PANEL_BLOCK, panel, n_columns, values);
        for (size_t c = 0; c < n_columns; c++) out[c][r] = values[c];
    }
}
