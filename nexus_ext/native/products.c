/* products.c: rows of several types times columns, see nexus_products.h. */
#include "nexus_products.h"

#include <string.h>

#include "kernels_internal.h"
#include "products_internal.h"

static const struct {
    const char *name;
    uint32_t block_bytes;
    uint32_t block; /* weights */
    uint32_t unit;  /* a row is a multiple of so many weights: ggml sums an odd number of blocks another way */
    bool two_sums;
    uint8_t offset; /* that makes all weights positive */
    nx_super_form super_form;
} types[NX_PRODUCT_COUNT] = {
    [NX_PRODUCT_Q4_0] = {"q4_0", 18, 32, 32, .offset = 8},
    [NX_PRODUCT_Q8_0] = {"q8_0", 34, 32, 32, .offset = 128},
    [NX_PRODUCT_IQ4_NL] = {"iq4_nl", 18, 32, 64, .two_sums = true, .offset = 127},
    [NX_PRODUCT_MXFP4] = {"mxfp4", 17, 32, 64, .two_sums = true, .offset = 12},
    [NX_PRODUCT_Q4_K] = {"q4_K", 144, NX_SUPER_BLOCK, NX_SUPER_BLOCK, .super_form = NX_SUPER_MINS},
    [NX_PRODUCT_Q6_K] = {"q6_K", 210, NX_SUPER_BLOCK, NX_SUPER_BLOCK, .super_form = NX_SUPER_OFFSET},
};
#define MOST_OFFSET_OF_AVX2 64 /* twice as much times 127, twice, still fits into 16 bits */
#define MOST_COLUMNS NX_SUPER_COLUMNS /* of a kernel */

const int8_t nx_iq4_nl_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
const int8_t nx_mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static nx_product_kernel kernel(void) {
    switch (nx_kernels_isa()) {
    case NX_ISA_AVX512: return nx_products_avx512();
    case NX_ISA_AVX2: return nx_products_avx2();
    default: return NULL;
    }
}

static nx_super_kernel super_kernel(void) {
    switch (nx_kernels_isa()) {
    case NX_ISA_AVX512: return nx_products_super_avx512();
    case NX_ISA_AVX2: return nx_products_super_avx2();
    default: return NULL;
    }
}

static nx_product_form form_of(nx_product_type type) {
    const uint8_t offset = types[type].offset;
    const bool fits = nx_kernels_isa() == NX_ISA_AVX512 || offset <= MOST_OFFSET_OF_AVX2;
    return (nx_product_form){.offset = fits ? offset : 0, .two_sums = types[type].two_sums};
}

int nx_product_is_k(nx_product_type type) {
    return (unsigned)type < NX_PRODUCT_COUNT && types[type].block == NX_SUPER_BLOCK;
}

const char *nx_product_name(nx_product_type type) {
    return (unsigned)type < NX_PRODUCT_COUNT ? types[type].name : "unknown";
}

const char *nx_product_column_name(nx_product_type type) {
    return (unsigned)type >= NX_PRODUCT_COUNT ? "unknown" : nx_product_is_k(type) ? "q8_K" : "q8_0";
}

size_t nx_product_block_bytes(nx_product_type type) {
    return (unsigned)type < NX_PRODUCT_COUNT ? types[type].block_bytes : 0;
}

size_t nx_product_row_bytes(nx_product_type type, uint32_t n_in) {
    if ((unsigned)type >= NX_PRODUCT_COUNT || n_in == 0 || n_in % types[type].unit) return 0;
    return (size_t)(n_in / types[type].block) * types[type].block_bytes;
}

int nx_products_usable(void) { return kernel() != NULL; }

/* -- columns ------------------------------------------------------------------------------------- */

size_t nx_column_bytes(nx_product_type type, uint32_t n_in) {
    return n_in / types[type].block * (nx_product_is_k(type) ? sizeof(nx_column_super) : sizeof(nx_column_block));
}

static void pack_block(const uint8_t *block, int32_t offset, nx_column_block *out) {
    uint16_t scale;
    memcpy(&scale, block, sizeof scale);
    out->scale = nx_half_to_float(scale);
    memcpy(out->values, block + sizeof scale, sizeof out->values);
    const int8_t *y = (const int8_t *)(block + sizeof scale);
    for (int g = 0; g < NX_PRODUCT_GROUPS; g++)
        out->less[g] = -offset * (y[4 * g] + y[4 * g + 1] + y[4 * g + 2] + y[4 * g + 3]);
}

static void pack_super(const uint8_t *block, nx_column_super *out) {
    const uint8_t *values = block + sizeof out->scale, *sums = values + NX_SUPER_BLOCK;
    memcpy(&out->scale, block, sizeof out->scale);
    memcpy(out->values, values, sizeof out->values);
    memcpy(out->sums_of_16, sums, sizeof out->sums_of_16);
    int16_t of_16[2 * NX_SUPER_CHUNKS], of_32[NX_SUPER_CHUNKS];
    memcpy(of_16, sums, sizeof of_16);
    for (int j = 0; j < NX_SUPER_CHUNKS; j++) of_32[j] = (int16_t)(of_16[2 * j] + of_16[2 * j + 1]);
    memcpy(out->sums_of_32, of_32, sizeof of_32);
}

void nx_column_pack(nx_product_type type, const void *column, uint32_t n_in, void *packed) {
    const uint8_t *block = column;
    nx_column_super *super = packed;
    nx_column_block *out = packed;
    for (uint32_t i = 0; i < n_in; i += types[type].block) {
        if (nx_product_is_k(type)) pack_super(block, super++);
        else pack_block(block, form_of(type).offset, out++);
        block += nx_product_is_k(type) ? NX_Q8_K_BYTES : NX_Q8_0_BYTES;
    }
}

/* -- rows ---------------------------------------------------------------------------------------- */

size_t nx_unpacked_bytes(nx_product_type type, uint32_t n_in) {
    return n_in / types[type].block * (nx_product_is_k(type) ? sizeof(nx_rows_super) : sizeof(nx_rows_block));
}

void nx_product_unpack(nx_product_type type, const void *const *rows, uint32_t n_in, void *unpacked) {
    const uint8_t *at[NX_PRODUCT_ROWS];
    for (int r = 0; r < NX_PRODUCT_ROWS; r++) at[r] = rows[r];
    const size_t n_blocks = n_in / types[type].block;
    if (nx_product_is_k(type)) nx_products_super_unpacker(type)(at, n_blocks, unpacked);
    else nx_products_unpacker(type)(at, n_blocks, form_of(type).offset, unpacked);
}

static void multiply(nx_product_type type, const void *unpacked, size_t n_blocks, const void *const *columns, size_t n,
                     float *const *out) {
    if (nx_product_is_k(type)) {
        const nx_column_super *some[MOST_COLUMNS];
        for (size_t c = 0; c < n; c++) some[c] = columns[c];
        super_kernel()(unpacked, n_blocks, types[type].super_form, some, n, out);
    } else {
        const nx_column_block *some[MOST_COLUMNS];
        for (size_t c = 0; c < n; c++) some[c] = columns[c];
        kernel()(unpacked, n_blocks, form_of(type), some, n, out);
    }
}

void nx_product_multiply(nx_product_type type, const void *unpacked, uint32_t n_rows, uint32_t n_in,
                         const void *const *columns, size_t n_columns, float *const *out) {
    const size_t most = nx_product_is_k(type) ? NX_SUPER_COLUMNS : NX_PRODUCT_COLUMNS;
    for (size_t first = 0; first < n_columns; first += most) {
        const size_t n = n_columns - first < most ? n_columns - first : most;
        float all_rows[MOST_COLUMNS][NX_PRODUCT_ROWS], *to[MOST_COLUMNS];
        for (size_t c = 0; c < n; c++) to[c] = n_rows < NX_PRODUCT_ROWS ? all_rows[c] : out[first + c];
        multiply(type, unpacked, n_in / types[type].block, columns + first, n, to);
        for (size_t c = 0; c < n && n_rows < NX_PRODUCT_ROWS; c++)
            memcpy(out[first + c], all_rows[c], n_rows * sizeof(float));
    }
}
