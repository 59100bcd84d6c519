/* Products of rows with columns: the bits of a sum that is written down step by step. */
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "nexus_products.h"
#include "kernels_internal.h"
#include "nx_test.h"

#define MOST_COLUMNS 5

static uint64_t state = 1;
static uint32_t random_bits(void) { return (uint32_t)nx_test_random(&state); }

static const int iq4_nl[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int mxfp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* The weights of a block as integers, and its scale. */
static float unpack(nx_product_type type, const uint8_t *at, int *weights) {
    uint16_t half;
    memcpy(&half, at, sizeof half);
    const uint8_t *codes = at + (type == NX_PRODUCT_MXFP4 ? 1 : 2);
    for (int i = 0; i < 32; i++) {
        const int code = i < 16 ? codes[i] & 15 : codes[i - 16] >> 4;
        switch (type) {
        case NX_PRODUCT_Q4_0: weights[i] = code - 8; break;
        case NX_PRODUCT_Q8_0: weights[i] = (int8_t)codes[i]; break;
        case NX_PRODUCT_IQ4_NL: weights[i] = iq4_nl[code]; break;
        default: weights[i] = mxfp4[code];
        }
    }
    return type == NX_PRODUCT_MXFP4 ? ldexpf(1, at[0] - 128) : nx_half_to_float(half);
}

static float tree(const float *s) {
    const float a = s[4] + s[0], b = s[5] + s[1], c = s[6] + s[2], d = s[7] + s[3];
    return (a + c) + (b + d);
}

static float expected(nx_product_type type, const uint8_t *row, const uint8_t *column, size_t n_blocks) {
    const size_t bytes = nx_product_row_bytes(type, 64) / 2;
    const bool apart = type == NX_PRODUCT_IQ4_NL || type == NX_PRODUCT_MXFP4;
    float sums[2][8] = {{0}};
    for (size_t b = 0; b < n_blocks; b++) {
        int weights[32];
        const float scale = unpack(type, row + b * bytes, weights);
        uint16_t half;
        memcpy(&half, column + b * 34, sizeof half);
        const float both = scale * nx_half_to_float(half);
        for (int lane = 0; lane < 8; lane++) {
            int sum = 0;
            for (int i = 4 * lane; i < 4 * lane + 4; i++) sum += weights[i] * (int8_t)column[b * 34 + 2 + (size_t)i];
            float *to = &sums[apart ? b & 1 : 0][lane];
            *to = fmaf(both, (float)sum, *to);
        }
    }
    for (int lane = 0; lane < 8 && apart; lane++) sums[0][lane] += sums[1][lane];
    return tree(sums[0]);
}

/* The codes of a block of 256, and of each 16 of them the scale and what the codes have more (times a scale). */
static void unpack_k(nx_product_type type, const uint8_t *at, int *codes, int *scales, int *mins) {
    if (type == NX_PRODUCT_Q4_K) {
        const uint8_t *packed = at + 4;
        for (int j = 0; j < 8; j++) {
            const int scale = j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4;
            const int min = j < 4 ? packed[j + 4] & 63 : packed[j + 4] >> 4 | (packed[j] >> 6) << 4;
            scales[2 * j] = scales[2 * j + 1] = scale;
            mins[2 * j] = mins[2 * j + 1] = min;
            for (int i = 0; i < 32; i++) codes[32 * j + i] = at[16 + 32 * (j / 2) + i] >> (j % 2 ? 4 : 0) & 15;
        }
        return;
    }
    for (int i = 0; i < 256; i++) {
        const int half = i / 128, quarter = i % 128 / 32, k = i % 32;
        const int low = at[64 * half + 32 * (quarter % 2) + k] >> (quarter / 2 ? 4 : 0) & 15;
        codes[i] = low | (at[128 + 32 * half + k] >> 2 * quarter & 3) << 4;
    }
    for (int i = 0; i < 16; i++) {
        scales[i] = (int8_t)at[192 + i];
        mins[i] = 32 * scales[i];
    }
}

static float expected_k(nx_product_type type, const uint8_t *row, const uint8_t *column, size_t n_blocks) {
    const bool q4 = type == NX_PRODUCT_Q4_K;
    float sums[8] = {0}, less[4] = {0};
    for (size_t b = 0; b < n_blocks; b++, row += nx_product_block_bytes(type), column += 292) {
        int codes[256], scales[16], mins[16], of_16[16] = {0};
        unpack_k(type, row, codes, scales, mins);
        const int8_t *y = (const int8_t *)column + 4;
        for (int i = 0; i < 256; i++) of_16[i / 16] += y[i];
        float d;
        uint16_t half, min_half;
        memcpy(&d, column, sizeof d);
        memcpy(&half, row + (q4 ? 0 : 208), sizeof half);
        memcpy(&min_half, row + 2, sizeof min_half);
        for (int lane = 0; lane < 8; lane++) {
            int sum = q4 ? 0 : -(of_16[2 * lane] * mins[2 * lane] + of_16[2 * lane + 1] * mins[2 * lane + 1]);
            for (int i = 0; i < 256; i++)
                if (i % 32 / 4 == lane) sum += codes[i] * y[i] * scales[i / 16];
            sums[lane] = fmaf(d * nx_half_to_float(half), (float)sum, sums[lane]);
        }
        for (int lane = 0; lane < 4 && q4; lane++) {
            int sum = 0;
            for (int i = 4 * lane; i < 4 * lane + 4; i++) sum += of_16[i] * mins[i];
            less[lane] = fmaf(-d * nx_half_to_float(min_half), (float)sum, less[lane]);
        }
    }
    return q4 ? tree(sums) + ((less[0] + less[2]) + (less[1] + less[3])) : tree(sums);
}

static void random_half(uint8_t *at) {
    const uint16_t scale = nx_float_to_half(ldexpf((float)(random_bits() % 2001) - 1000, -16));
    memcpy(at, &scale, sizeof scale);
}

static void random_row(nx_product_type type, uint8_t *row, uint32_t n_in) {
    const size_t n_bytes = nx_product_row_bytes(type, n_in), bytes = nx_product_block_bytes(type);
    for (size_t i = 0; i < n_bytes; i++) row[i] = (uint8_t)random_bits();
    for (size_t at = 0; at < n_bytes; at += bytes) {
        if (type == NX_PRODUCT_MXFP4) row[at] = (uint8_t)(random_bits() % 20 + (at / bytes % 5 ? 118 : 0));
        else random_half(row + at + (type == NX_PRODUCT_Q6_K ? 208 : 0));
        if (type == NX_PRODUCT_Q4_K) random_half(row + at + 2);
    }
}

/* As ggml rounds: values from -127 to 127. */
static void random_column(nx_product_type type, uint8_t *column, uint32_t n_in) {
    const uint32_t block = nx_product_is_k(type) ? 256 : 32;
    for (uint32_t at = 0; at < n_in; at += block) {
        int8_t *values = (int8_t *)column + (block == 256 ? 4 : 2);
        for (uint32_t i = 0; i < block; i++) values[i] = (int8_t)((int)(random_bits() % 255) - 127);
        if (block == 256) {
            const float scale = (float)(random_bits() % 2001) / 65536;
            memcpy(column, &scale, sizeof scale);
            for (uint32_t i = 0; i < 16; i++) {
                int16_t sum = 0;
                for (uint32_t k = 0; k < 16; k++) sum = (int16_t)(sum + values[16 * i + k]);
                memcpy(column + 260 + 2 * i, &sum, sizeof sum);
            }
        } else {
            random_half(column);
        }
        column += block == 256 ? 292 : 34;
    }
}

static void check(nx_product_type type, uint32_t n_in, uint32_t n_rows, size_t n_columns) {
    const size_t row_bytes = nx_product_row_bytes(type, n_in), stride = row_bytes + 3;
    const size_t n_blocks = row_bytes / nx_product_block_bytes(type);
    const size_t column_bytes = n_blocks * (nx_product_is_k(type) ? 292 : 34);
    /* Exactly as large as needed, so that a sanitizer sees a read past the end; rows are not aligned. */
    uint8_t *rows = malloc(stride * (n_rows - 1) + row_bytes), *columns = malloc(n_columns * column_bytes);
    void *unpacked = NULL, *packed[MOST_COLUMNS];
    float *out[MOST_COLUMNS];
    const void *some[NX_PRODUCT_ROWS];
    NX_CHECK(rows && columns && posix_memalign(&unpacked, 64, nx_unpacked_bytes(type, n_in)) == 0);
    for (uint32_t r = 0; r < n_rows; r++) random_row(type, rows + r * stride, n_in);
    for (uint32_t r = 0; r < NX_PRODUCT_ROWS; r++) some[r] = rows + (r < n_rows ? r : 0) * stride;
    for (size_t c = 0; c < n_columns; c++) {
        uint8_t *column = columns + c * column_bytes;
        random_column(type, column, n_in);
        packed[c] = malloc(nx_column_bytes(type, n_in));
        out[c] = malloc(n_rows * sizeof(float));
        NX_CHECK(packed[c] && out[c]);
        nx_column_pack(type, column, n_in, packed[c]);
    }
    nx_product_unpack(type, some, n_in, unpacked);
    nx_product_multiply(type, unpacked, n_rows, n_in, (const void *const *)packed, n_columns, out);
    for (size_t c = 0; c < n_columns; c++) {
        for (uint32_t r = 0; r < n_rows; r++) {
            const uint8_t *row = rows + r * stride, *column = columns + c * column_bytes;
            const float want = nx_product_is_k(type) ? expected_k(type, row, column, n_blocks)
                                                     : expected(type, row, column, n_blocks);
            NX_CHECK(memcmp(&want, &out[c][r], sizeof want) == 0);
        }
        free(packed[c]);
        free(out[c]);
    }
    free(rows);
    free(columns);
    free(unpacked);
}

static void test_lengths_and_names(void) {
    NX_CHECK_EQ(nx_product_row_bytes(NX_PRODUCT_Q4_0, 64), 36);
    NX_CHECK_EQ(nx_product_row_bytes(NX_PRODUCT_Q8_0, 32), 34);
    NX_CHECK_EQ(nx_product_row_bytes(NX_PRODUCT_MXFP4, 96), 0);
    NX_CHECK_EQ(nx_product_row_bytes(NX_PRODUCT_Q4_0, 40), 0);
    NX_CHECK_EQ(nx_product_row_bytes(NX_PRODUCT_Q4_0, 0), 0);
    NX_CHECK_EQ(nx_product_row_bytes(NX_PRODUCT_COUNT, 64), 0);
    NX_CHECK(strcmp(nx_product_name(NX_PRODUCT_IQ4_NL), "iq4_nl") == 0);
    NX_CHECK(strcmp(nx_product_name(NX_PRODUCT_COUNT), "unknown") == 0);
    NX_CHECK_EQ(nx_product_row_bytes(NX_PRODUCT_Q6_K, 512), 420);
    NX_CHECK_EQ(nx_product_row_bytes(NX_PRODUCT_Q4_K, 128), 0);
    NX_CHECK(strcmp(nx_product_column_name(NX_PRODUCT_Q4_K), "q8_K") == 0);
    NX_CHECK(strcmp(nx_product_column_name(NX_PRODUCT_Q4_0), "q8_0") == 0);
    NX_CHECK(strcmp(nx_product_column_name(NX_PRODUCT_COUNT), "unknown") == 0);
    NX_CHECK_EQ(nx_product_block_bytes(NX_PRODUCT_COUNT), 0);
}

static void test_bits_of(nx_isa isa) {
    if (nx_kernels_use_isa(isa) != NX_OK || !nx_products_usable()) {
        printf("products: %s not compared, this CPU does not have it\n", nx_kernels_isa_name(isa));
        return;
    }
    for (int type = 0; type < NX_PRODUCT_COUNT; type++)
        for (size_t n_columns = 1; n_columns <= MOST_COLUMNS; n_columns++) {
            nx_test_about("%s, %s, %zu columns", nx_kernels_isa_name(isa), nx_product_name((nx_product_type)type), n_columns);
            const uint32_t short_row = nx_product_is_k((nx_product_type)type) ? 256 : 64;
            check((nx_product_type)type, short_row, 1, n_columns);
            check((nx_product_type)type, 3 * short_row, 15, n_columns);
            check((nx_product_type)type, 2048, 16, n_columns);
        }
    check(NX_PRODUCT_Q4_0, 32, 2, 3);
    check(NX_PRODUCT_Q8_0, 96, 9, 5);
}

static void test_bits_of_avx2(void) { test_bits_of(NX_ISA_AVX2); }
static void test_bits_of_avx512(void) { test_bits_of(NX_ISA_AVX512); }

static void test_the_reference_has_none(void) {
    NX_CHECK_EQ(nx_kernels_use_isa(NX_ISA_REF), NX_OK);
    NX_CHECK(!nx_products_usable());
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {NX_TEST(test_lengths_and_names), NX_TEST(test_bits_of_avx2), NX_TEST(test_bits_of_avx512),
                                    NX_TEST(test_the_reference_has_none)};
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
