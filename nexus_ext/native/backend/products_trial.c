/* products_trial.c: which products this ggml lets us compute, see products.c.
 *
 * Our kernels are compared with its dot products before the first use; those dot products may be called
 * from here where it uses them itself.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* dladdr */
#endif
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "products.h"

/* What ggml_get_type_traits_cpu returns. */
typedef struct gx_cpu_traits {
    void (*from_float)(const float *, void *, int64_t);
    void (*vec_dot)(int, float *, size_t, const void *, size_t, const void *, size_t, int);
    int32_t vec_dot_type;
    int64_t n_rows; /* that one call computes */
} gx_cpu_traits;

static nxb_ways ways;

/* -- does this ggml sum as we do? ---------------------------------------------------------------- */

#define TEST_IN 512
#define TEST_COLUMNS 5

static uint32_t next_bits(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

/* Somewhere in a block: two bytes of any half that is neither infinite nor NaN. */
static void any_half(uint8_t *at, uint64_t *state) {
    at[1] = (uint8_t)((next_bits(state) & 0x80) | (0x18 + next_bits(state) % 24));
}

/* A row of any bits, with scales that are numbers. */
static void any_row(nx_product_type type, uint8_t *row, uint64_t *state) {
    const size_t n_bytes = nx_product_row_bytes(type, TEST_IN), block = nx_product_block_bytes(type);
    for (size_t i = 0; i < n_bytes; i++) row[i] = (uint8_t)next_bits(state);
    for (size_t at = 0; at < n_bytes; at += block) {
        if (type == NX_PRODUCT_MXFP4) row[at] = (uint8_t)(next_bits(state) % 16 + (at % 7 ? 118 : 0));
        else any_half(row + at + (type == NX_PRODUCT_Q6_K ? 208 : 0), state);
        if (type == NX_PRODUCT_Q4_K) any_half(row + at + 2, state);
    }
}

static bool same_bits(nx_product_type type, const gx_cpu_traits *traits) {
    uint64_t state = 42;
    uint8_t any[NX_PRODUCT_ROWS][TEST_IN * 2], rounded[TEST_COLUMNS][TEST_IN * 2];
    char *packed = malloc(TEST_COLUMNS * nx_column_bytes(type, TEST_IN));
    void *unpacked = NULL;
    bool same = packed && posix_memalign(&unpacked, 64, nx_unpacked_bytes(type, TEST_IN)) == 0;
    const void *rows[NX_PRODUCT_ROWS], *columns[TEST_COLUMNS];
    float values[TEST_COLUMNS][NX_PRODUCT_ROWS], *out[TEST_COLUMNS];
    for (int repeat = 0; repeat < 4 && same; repeat++) {
        for (size_t r = 0; r < NX_PRODUCT_ROWS; r++) {
            any_row(type, any[r], &state);
            rows[r] = any[r];
        }
        for (size_t c = 0; c < TEST_COLUMNS; c++) {
            float x[TEST_IN];
            for (int i = 0; i < TEST_IN; i++) x[i] = ldexpf((float)(next_bits(&state) % 65536) - 32768.0f, -12 - (int)c);
            ways.round[type](x, rounded[c], TEST_IN);
            columns[c] = packed + c * nx_column_bytes(type, TEST_IN);
            nx_column_pack(type, rounded[c], TEST_IN, packed + c * nx_column_bytes(type, TEST_IN));
            out[c] = values[c];
        }
        nx_product_unpack(type, rows, TEST_IN, unpacked);
        nx_product_multiply(type, unpacked, NX_PRODUCT_ROWS, TEST_IN, columns, TEST_COLUMNS, out);
        for (size_t i = 0; i < TEST_COLUMNS * NX_PRODUCT_ROWS && same; i++) {
            const size_t c = i / NX_PRODUCT_ROWS, r = i % NX_PRODUCT_ROWS;
            float theirs;
            traits->vec_dot(TEST_IN, &theirs, 0, rows[r], 0, rounded[c], 0, 1);
            same = memcmp(&theirs, &values[c][r], sizeof theirs) == 0;
        }
    }
    free(packed);
    free(unpacked);
    return same;
}

static int32_t type_named(const char *name) {
    for (int32_t i = 0; i < NXB_TYPES; i++) {
        const char *candidate = gx.type_name(i);
        if (candidate && strcmp(candidate, name) == 0) return i;
    }
    return -1;
}

/* The CPU backend may be part of the library that we know, or lie in one of its own. */
static void *cpu_function(const char *name) {
    void *symbol = dlsym(gx.host, name);
    Dl_info info;
    const gx_reg *reg = gx.backend_dev_backend_reg(nxb_delegate.device);
    void *inside = NULL;
    memcpy(&inside, &reg->iface.get_name, sizeof inside);
    if (symbol || !dladdr(inside, &info) || !info.dli_fname) return symbol;
    void *library = dlopen(info.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
    if (!library) return NULL;
    symbol = dlsym(library, name);
    dlclose(library); /* a backend stays loaded as long as its device is in use */
    return symbol;
}

/* ggml has tiles for several columns of many types, and uses them for a single one if it is told to. */
static bool is_told_to_tile(void) {
    const char *told = getenv("GGML_CPU_TILED_MM_FORCE");
    return told && atoi(told) == 1;
}

static void find_dots(const gx_cpu_traits *(*traits_of)(int32_t)) {
    for (int32_t t = 0; t < NXB_TYPES; t++) {
        const gx_cpu_traits *traits = traits_of(t);
        if (!traits || !traits->vec_dot || traits->n_rows != 1) continue;
        if (t == type_named("tq1_0") || t == type_named("tq2_0")) continue; /* ours_ternary.c has kernels for these */
        const bool of_256 = traits->vec_dot_type == type_named("q8_K");
        if (!of_256 && traits->vec_dot_type != type_named("q8_0")) continue;
        ways.dots[t] = (nxb_dots){traits->vec_dot, traits_of(traits->vec_dot_type)->from_float, of_256 ? 256 : 32,
                                      of_256 ? 292 : 34};
    }
}

static void find_out(void) {
    for (int t = 0; t < NX_PRODUCT_COUNT; t++) ways.types[t] = -1;
    const char *wanted = getenv("NEXUS_BATCH_KERNELS");
    if (gx.op_custom < 0 || !gx.view_nodes || (wanted && strcmp(wanted, "0") == 0) || is_told_to_tile()) return;
    const gx_cpu_traits *(*traits_of)(int32_t) = NULL;
    void *symbol = cpu_function("ggml_get_type_traits_cpu");
    if (!symbol) return;
    memcpy(&traits_of, &symbol, sizeof traits_of);
    find_dots(traits_of);
    if (!nx_products_usable()) return;
    for (int t = 0; t < NX_PRODUCT_COUNT; t++) {
        const int32_t number = type_named(nx_product_name((nx_product_type)t));
        const int32_t column = type_named(nx_product_column_name((nx_product_type)t));
        const gx_cpu_traits *traits = number < 0 ? NULL : traits_of(number);
        ways.round[t] = column < 0 ? NULL : traits_of(column)->from_float;
        if (traits && traits->vec_dot && traits->vec_dot_type == column && traits->n_rows == 1 && ways.round[t] &&
            same_bits((nx_product_type)t, traits))
            ways.types[t] = number;
        if (ways.types[t] < 0) continue;
        const size_t length = strlen(ways.names);
        snprintf(ways.names + length, sizeof ways.names - length, "%s%s", length ? " " : "",
                 nx_product_name((nx_product_type)t));
    }
}

const nxb_ways *nxb_products_ways(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, find_out);
    return &ways;
}

NX_API const char *nx_backend_batch_types(void) { return nxb_delegate.device ? nxb_products_ways()->names : ""; }
