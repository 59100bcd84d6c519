/* Products on an OpenCL device: the bits of the reference for every type and shape; without a device a
 * sentence, and nothing else. */
#include <math.h>
#include <stdbool.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels_internal.h"
#include "nexus_opencl.h"
#include "nx_test.h"

#if defined(__SANITIZE_ADDRESS__)
/* What drivers keep until the end is not ours. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void) { return "leak:libpocl\nleak:libOpenCL\nleak:libLLVM\nleak:libclang\n"; }
#endif

/* In a process of its own: a device is looked for once. */
static void without_a_library_it_says_so(void) {
    const pid_t child = fork();
    NX_CHECK(child >= 0);
    if (child == 0) {
        nx_opencl_matrix *m;
        const uint8_t block[66] = {0};
        setenv("NEXUS_OPENCL_LIBRARY", "/nowhere/libOpenCL.so.1", 1);
        const bool told = nx_opencl_open() == NX_E_UNSUPPORTED && strstr(nx_opencl_why(), "there is no OpenCL") &&
                          nx_opencl_matrix_create(NX_TQ2_0, block, 66, 256, 1, &m) == NX_E_UNSUPPORTED && !m;
        _exit(told ? 0 : 1);
    }
    int status;
    NX_CHECK_EQ(waitpid(child, &status, 0), child);
    NX_CHECK_EQ(status, 0);
}

static void what_makes_no_sense_is_refused(void) {
    nx_opencl_matrix *m;
    const uint8_t block[66] = {0};
    NX_CHECK_EQ(nx_opencl_matrix_create(NX_TQ2_0, block, 66, 255, 1, &m), NX_E_INVALID);
    NX_CHECK_EQ(nx_opencl_matrix_create(NX_TQ2_0, block, 66, 256, 0, &m), NX_E_INVALID);
    NX_CHECK_EQ(nx_opencl_matrix_create(NX_TERNARY_TYPES, block, 66, 256, 1, &m), NX_E_INVALID);
    nx_opencl_matrix_free(NULL);
}

static void check(nx_ternary_type type, uint32_t n_in, uint32_t n_out, uint32_t n_columns, float odd, bool exact) {
    uint64_t state = type * 1000 + n_in + n_out * 7 + n_columns;
    const uint32_t bytes = nx_ternary_block_bytes(type), n_blocks = n_in / nx_ternary_block(type);
    const size_t stride = (size_t)bytes * n_blocks + 3;
    uint8_t *rows = malloc(n_out * stride);
    for (size_t i = 0; i < n_out * stride; i++) rows[i] = (uint8_t)(nx_test_random(&state) >> 33);
    for (uint32_t o = 0; o < n_out; o++)
        for (uint32_t b = 0; b < n_blocks; b++) {
            const float scale = (float)(nx_test_random(&state) >> 40) / (float)(1 << 23) - 1.0f;
            const uint16_t d = exact ? 0x3c00 : nx_float_to_half(scale);
            uint8_t *block = rows + o * stride + b * bytes;
            memcpy(type == NX_Q2_0 || type == NX_Q1_0 ? block : block + bytes - 2, &d, sizeof d);
        }
    const uint64_t column_bytes = nx_ternary_activation_bytes(type, n_in);
    uint8_t *columns = aligned_alloc(64, column_bytes * n_columns);
    const void **at = malloc(n_columns * sizeof *at);
    float *x = malloc(n_in * sizeof *x), *wanted = malloc((size_t)n_columns * n_out * sizeof *wanted);
    float *seen = malloc((size_t)n_columns * (n_out + 5) * sizeof *seen), **results = malloc(n_columns * sizeof *results);
    NX_CHECK_EQ(nx_kernels_use_isa(NX_ISA_REF), NX_OK);
    for (uint32_t c = 0; c < n_columns; c++) {
        for (uint32_t i = 0; i < n_in; i++) /* whole numbers up to 127: rounding keeps them, and the scale is 1 */
            x[i] = exact ? (float)((int)(nx_test_random(&state) >> 33) % 127 * (i % 2 ? 1 : -1)) :
                           (float)(nx_test_random(&state) >> 40) / (float)(1 << 23) - 1.0f;
        for (uint32_t i = 0; exact && i < n_in; i += 32) x[i] = -127;
        if (odd != 0) x[c % n_in] = odd;
        nx_ternary_activate(type, x, 0, n_blocks, columns + c * column_bytes);
        at[c] = columns + c * column_bytes;
        results[c] = wanted + (size_t)c * n_out;
    }
    nx_ternary_multiply_stored(type, rows, stride, n_in, at, n_columns, 0, n_out, results);
    nx_opencl_matrix *m;
    NX_CHECK_EQ(nx_opencl_matrix_create(type, rows, stride, n_in, n_out, &m), NX_OK);
    NX_CHECK(nx_opencl_matrix_bytes(m) >= (uint64_t)n_in * n_out / 4);
    NX_CHECK_EQ(nx_opencl_multiply(m, columns, n_columns, seen, n_out + 5), NX_OK);
    for (uint32_t c = 0; c < n_columns; c++)
        for (uint32_t o = 0; o < n_out; o++) {
            const float a = seen[(size_t)c * (n_out + 5) + o], b = wanted[(size_t)c * n_out + o];
            nx_test_about("type %d, %u to %u, row %u, column %u: %a, %a", type, n_in, n_out, o, c, a, b);
            NX_CHECK(memcmp(&a, &b, sizeof a) == 0 || (isnan(a) && isnan(b)));
            if (!exact) continue;
            int64_t sum = 0; /* the integers themselves */
            for (uint32_t i = 0; i < n_blocks; i++) {
                uint8_t code[256];
                const uint32_t n = nx_ternary_block(type);
                (void)nx_ternary_unpack_block(type, rows + o * stride + i * bytes, code);
                for (uint32_t k = 0; k < n; k++) {
                    const int8_t q = type == NX_Q2_0   ? ((const nx_act_64 *)at[c])[i].q[k]
                                     : type == NX_Q1_0 ? ((const nx_act_128 *)at[c])[i].q[k]
                                                       : ((const nx_act_256 *)at[c])[i].q[k];
                    sum += (type == NX_Q1_0 ? 2 * code[k] - 1 : code[k] - 1) * q;
                }
            }
            /* scales are 1, and sums are small enough to be exact */
            NX_CHECK(a == (float)sum);
        }
    nx_opencl_matrix_free(m);
    free(rows);
    free(columns);
    free(at);
    free(x);
    free(wanted);
    free(seen);
    free(results);
}

static void the_bits_of_the_reference(void) {
    if (nx_opencl_open() != NX_OK) {
        printf("skipped: %s\n", nx_opencl_why());
        return;
    }
    static const uint32_t outs[] = {1, 63, 64, 65, 130};
    for (int t = 0; t < NX_TERNARY_TYPES; t++) {
        const nx_ternary_type type = (nx_ternary_type)t;
        for (size_t i = 0; i < sizeof outs / sizeof *outs; i++)
            for (uint32_t n = 1; n <= 5; n += 2) {
                check(type, nx_ternary_block(type) * (1 + n), outs[i], n, 0, false);
                check(type, nx_ternary_block(type) * (1 + n), outs[i], n, 0, true);
            }
        check(type, 512, 70, 3, NAN, false);
        check(type, 512, 70, 3, INFINITY, false);
    }
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(without_a_library_it_says_so),
        NX_TEST(what_makes_no_sense_is_refused),
        NX_TEST(the_bits_of_the_reference),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
