/* Ternary kernels: integers exactly, floats within 1e-6 of double precision, the same bits from every
 * implementation, whatever the shape, the number of columns, the split, the alignment and the values. */
#include <math.h>
#include <stdbool.h>

#include "kernels_internal.h"
#include "nx_test.h"

static float uniform(uint64_t *state) { return (float)(nx_test_random(state) >> 40) / (float)(1 << 23) - 1.0f; }

typedef struct world {
    nx_ternary m;
    uint8_t *rows;
    float *x;
    uint8_t *columns;
    uint64_t column_bytes;
    uint32_t n_columns;
} world;

/* Random blocks: any byte is a valid code; scales are moderate halves, equal ones if asked for. */
static void make_rows(nx_ternary_type type, uint8_t *rows, size_t stride, uint32_t n_in, uint32_t n_out, bool equal,
                      uint64_t *state) {
    const uint32_t bytes = nx_ternary_block_bytes(type), n_blocks = n_in / nx_ternary_block(type);
    for (uint32_t o = 0; o < n_out; o++)
        for (uint32_t b = 0; b < n_blocks; b++) {
            uint8_t *block = rows + o * stride + (size_t)b * bytes;
            for (uint32_t i = 0; i < bytes; i++) block[i] = (uint8_t)(nx_test_random(state) >> 33);
            const uint16_t d = equal ? 0x2e66 : nx_float_to_half(uniform(state));
            const bool first = type == NX_Q2_0 || type == NX_Q1_0;
            memcpy(first ? block : block + bytes - 2, &d, sizeof d);
        }
}

/* `shift`: bytes by which the stored rows are off an aligned address. */
static world make(nx_ternary_type type, uint32_t n_in, uint32_t n_out, uint32_t n_columns, bool equal, size_t shift,
                  uint64_t seed) {
    uint64_t state = seed;
    world w = {.n_columns = n_columns, .column_bytes = nx_ternary_activation_bytes(type, n_in)};
    const size_t stride = (size_t)(n_in / nx_ternary_block(type)) * nx_ternary_block_bytes(type) + shift;
    w.rows = malloc(n_out * stride + shift);
    make_rows(type, w.rows + shift, stride, n_in, n_out, equal, &state);
    NX_CHECK_EQ(nx_ternary_create(type, n_in, n_out, &w.m), NX_OK);
    const uint32_t unit = nx_ternary_row_unit(type), middle = n_out / 2 / unit * unit;
    nx_ternary_pack(&w.m, w.rows + shift + middle * stride, stride, middle, n_out);
    nx_ternary_pack(&w.m, w.rows + shift, stride, 0, middle);
    nx_ternary_finish(&w.m);
    NX_CHECK(!equal == (w.m.scales != NULL) || n_out * (n_in / nx_ternary_block(type)) == 1);
    w.x = malloc((size_t)n_in * n_columns * sizeof *w.x);
    for (size_t i = 0; i < (size_t)n_in * n_columns; i++) w.x[i] = uniform(&state);
    w.columns = aligned_alloc(64, w.column_bytes * n_columns);
    return w;
}

static void drop(world *w) {
    nx_ternary_free(&w->m);
    free(w->rows);
    free(w->x);
    free(w->columns);
}

static float *result(world *w, uint32_t n_threads) {
    const uint32_t n_blocks = w->m.n_in / nx_ternary_block(w->m.type), unit = nx_ternary_row_unit(w->m.type);
    const uint32_t units = (w->m.n_out + unit - 1) / unit;
    float *y = malloc((size_t)w->m.n_out * w->n_columns * sizeof *y);
    memset(w->columns, 0x5a, w->column_bytes * w->n_columns);
    for (uint32_t c = 0; c < w->n_columns; c++)
        for (uint32_t t = 0; t < n_threads; t++)
            nx_ternary_activate(w->m.type, w->x + (size_t)c * w->m.n_in, n_blocks * t / n_threads,
                                n_blocks * (t + 1) / n_threads, w->columns + c * w->column_bytes);
    for (uint32_t t = 0; t < n_threads; t++) {
        const uint32_t end = units * (t + 1) / n_threads * unit;
        nx_ternary_multiply(&w->m, w->columns, w->n_columns, units * t / n_threads * unit,
                            end < w->m.n_out ? end : w->m.n_out, y, w->m.n_out);
    }
    return y;
}

static bool same(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], sizeof *a) != 0 && !(isnan(a[i]) && isnan(b[i]))) return false;
    return true;
}

static const nx_ternary_type tested[] = {NX_TQ1_0, NX_TQ2_0, NX_Q2_0, NX_Q1_0};
#define N_TESTED (sizeof tested / sizeof *tested)

static void check_agreement(world *w, const char *what) {
    NX_CHECK_EQ(nx_kernels_use_isa(NX_ISA_REF), NX_OK);
    float *wanted = result(w, 1);
    for (int isa = 0; isa < NX_ISA_COUNT; isa++) {
        if (nx_kernels_use_isa((nx_isa)isa) != NX_OK) continue;
        for (uint32_t threads = 1; threads <= 3; threads++) {
            nx_test_about("%s: %s, type %d, %u to %u, %u columns, %u threads", what, nx_kernels_isa_name((nx_isa)isa),
                          w->m.type, w->m.n_in, w->m.n_out, w->n_columns, threads);
            float *seen = result(w, threads);
            NX_CHECK(same(seen, wanted, (size_t)w->m.n_out * w->n_columns));
            free(seen);
        }
    }
    free(wanted);
}

static void implementations_agree(void) {
    static const uint32_t outs[] = {1, 7, 8, 63, 64, 77}, blocks[] = {1, 2, 5};
    for (size_t t = 0; t < N_TESTED; t++)
        for (size_t a = 0; a < sizeof outs / sizeof *outs; a++)
            for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++)
                for (uint32_t n = 1; n <= 9; n += n < 5 ? 1 : 4)
                    for (size_t shift = 0; shift < 4; shift += 3) {
                        world w = make(tested[t], blocks[b] * nx_ternary_block(tested[t]), outs[a], n, (a + b + n) % 2,
                                       shift, a * 100 + b * 10 + n);
                        check_agreement(&w, "shapes");
                        drop(&w);
                    }
}

/* The same products straight from the rows, columns and results anywhere. */
static float *stored_result(world *w, size_t shift, uint32_t n_threads) {
    const size_t stride = (size_t)(w->m.n_in / nx_ternary_block(w->m.type)) * nx_ternary_block_bytes(w->m.type) + shift;
    float *y = malloc((size_t)w->m.n_out * w->n_columns * sizeof *y);
    const void **columns = malloc(w->n_columns * sizeof *columns);
    float **results = malloc(w->n_columns * sizeof *results);
    for (uint32_t c = 0; c < w->n_columns; c++) { /* the last first */
        const uint32_t from = w->n_columns - 1 - c;
        nx_ternary_activate(w->m.type, w->x + (size_t)from * w->m.n_in, 0, w->m.n_in / nx_ternary_block(w->m.type),
                            w->columns + from * w->column_bytes);
        columns[c] = w->columns + from * w->column_bytes;
        results[c] = y + (size_t)from * w->m.n_out;
    }
    for (uint32_t t = 0; t < n_threads; t++)
        nx_ternary_multiply_stored(w->m.type, w->rows + shift, stride, w->m.n_in, columns, w->n_columns,
                                   w->m.n_out * t / n_threads, w->m.n_out * (t + 1) / n_threads, results);
    free(columns);
    free(results);
    return y;
}

/* Also where an implementation leaves a type to the portable code. */
static void check_stored(world *w, size_t shift, const char *what) {
    NX_CHECK_EQ(nx_kernels_use_isa(NX_ISA_REF), NX_OK);
    float *wanted = result(w, 1);
    for (int isa = 0; isa < NX_ISA_COUNT; isa++) {
        if (nx_kernels_use_isa((nx_isa)isa) != NX_OK) continue;
        for (uint32_t threads = 1; threads <= 3; threads += 2) {
            nx_test_about("stored, %s: %s, type %d, %u to %u, %u columns, %u threads", what,
                          nx_kernels_isa_name((nx_isa)isa), w->m.type, w->m.n_in, w->m.n_out, w->n_columns, threads);
            float *seen = stored_result(w, shift, threads);
            NX_CHECK(same(seen, wanted, (size_t)w->m.n_out * w->n_columns));
            free(seen);
        }
    }
    free(wanted);
}

static void rows_as_they_are_stored_give_the_same(void) {
    static const uint32_t outs[] = {1, 7, 8, 17}, blocks[] = {1, 2, 5}, columns[] = {1, 2, 3, 4, 5, 35};
    for (size_t t = 0; t < N_TESTED; t++)
        for (size_t a = 0; a < sizeof outs / sizeof *outs; a++)
            for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++)
                for (size_t n = 0; n < sizeof columns / sizeof *columns; n++) {
                    if (columns[n] == 35 && (a + b) % 3) continue; /* the reference is slow under sanitizers */
                    const size_t shift = (a + n) % 2 * 3;
                    world w = make(tested[t], blocks[b] * nx_ternary_block(tested[t]), outs[a], columns[n],
                                   (a + b + n) % 2, shift, a * 100 + b * 10 + n);
                    check_stored(&w, shift, "shapes");
                    drop(&w);
                }
}

static void the_reference_has_all_types(void) {
    NX_CHECK_EQ(nx_kernels_use_isa(NX_ISA_REF), NX_OK);
    for (int t = 0; t < NX_TERNARY_TYPES; t++) NX_CHECK(nx_ternary_stored_usable((nx_ternary_type)t));
    NX_CHECK(!nx_ternary_stored_usable(NX_TERNARY_TYPES));
}

static void many_columns_are_many_times_one(void) {
    for (size_t t = 0; t < N_TESTED; t++) {
        world w = make(tested[t], 256, 40, 70, false, 0, 9);
        float *all = result(&w, 2), *x = w.x;
        w.n_columns = 1;
        for (uint32_t c = 0; c < 70; c++) {
            w.x = x + (size_t)c * 256;
            float *one = result(&w, 1);
            NX_CHECK(memcmp(one, all + (size_t)c * 40, 40 * sizeof *one) == 0);
            free(one);
        }
        w.x = x;
        free(all);
        drop(&w);
    }
}

/* Enough of them for the paths that unpack first. */
static void implementations_agree_on_many_columns(void) {
    static const uint32_t outs[] = {15, 16, 40, 77}, columns[] = {16, 17, 33, 131};
    for (size_t t = 0; t < N_TESTED; t++)
        for (size_t a = 0; a < sizeof outs / sizeof *outs; a++)
            for (size_t n = 0; n < sizeof columns / sizeof *columns; n++) {
                world w = make(tested[t], 256 * (1 + (uint32_t)(a + n) % 3), outs[a], columns[n], (a + n) % 2, 0, a + n);
                check_agreement(&w, "many columns");
                for (uint32_t c = 0; c < columns[n]; c += 5) w.x[(size_t)c * w.m.n_in + c] = c % 2 ? NAN : INFINITY;
                check_agreement(&w, "many columns, odd values");
                drop(&w);
            }
}

static void values_that_are_no_numbers(void) {
    static const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, 1e-44f, -0.0f};
    for (size_t t = 0; t < N_TESTED; t++)
        for (size_t k = 0; k < sizeof odd / sizeof *odd; k++) {
            world w = make(tested[t], 512, 9, 3, k % 2, 0, k);
            w.x[3] = odd[k];
            w.x[300] = -odd[k];
            check_agreement(&w, "odd values");
            check_stored(&w, 0, "odd values");
            for (int i = 0; i < 512; i++) w.x[i] = i == 77 ? odd[k] : 0; /* alone */
            for (int i = 512; i < 1024; i++) w.x[i] *= 1e-38f; /* and scales that cannot be divided */
            check_agreement(&w, "odd values");
            check_stored(&w, 0, "odd values");
            drop(&w);
        }
}

/* The same product in double precision, from the activations as they were rounded. */
static void close_to_double_precision(void) {
    for (size_t t = 0; t < N_TESTED; t++) {
        world w = make(tested[t], 1280, 70, 2, false, 0, 21 + t);
        float *weights = malloc(1280 * 70 * sizeof *weights);
        nx_ternary_unpack(&w.m, 0, 70, weights);
        for (int isa = 0; isa < NX_ISA_COUNT; isa++) {
            if (nx_kernels_use_isa((nx_isa)isa) != NX_OK) continue;
            float *y = result(&w, 1);
            for (int c = 0; c < 2; c++)
                for (int o = 0; o < 70; o++) {
                    double sum = 0, size = 0;
                    for (int i = 0; i < 1280; i++) {
                        double a;
                        const uint8_t *column = w.columns + (uint64_t)c * w.column_bytes;
                        if (tested[t] == NX_Q1_0) {
                            const nx_act_128 *block = (const nx_act_128 *)(const void *)column + i / 128;
                            a = (double)block->d[i % 128 / 32] * block->q[i % 128];
                        } else if (tested[t] == NX_Q2_0) {
                            const nx_act_64 *block = (const nx_act_64 *)(const void *)column + i / 64;
                            a = (double)block->d[i % 64 / 32][0] * block->q[i % 64];
                        } else {
                            const nx_act_256 *block = (const nx_act_256 *)(const void *)column + i / 256;
                            a = (double)block->d[0] * block->q[i % 256];
                        }
                        sum += a * (double)weights[o * 1280 + i];
                        size += fabs(a * (double)weights[o * 1280 + i]);
                    }
                    nx_test_about("%s, type %d", nx_kernels_isa_name((nx_isa)isa), tested[t]);
                    NX_CHECK(fabs(y[c * 70 + o] - sum) <= 1e-6 * size);
                }
            free(y);
        }
        free(weights);
        drop(&w);
    }
}

static void activations_are_rounded_to_the_nearest(void) {
    for (size_t t = 0; t < N_TESTED; t++) {
        world w = make(tested[t], 256, 1, 1, true, 0, 4);
        free(result(&w, 1));
        for (int i = 0; i < 256; i++) {
            double d, q;
            if (tested[t] == NX_Q1_0) {
                const nx_act_128 *block = (const nx_act_128 *)(const void *)w.columns + i / 128;
                d = block->d[i % 128 / 32], q = block->q[i % 128];
            } else if (tested[t] == NX_Q2_0) {
                const nx_act_64 *block = (const nx_act_64 *)(const void *)w.columns + i / 64;
                d = block->d[i % 64 / 32][0], q = block->q[i % 64];
            } else {
                const nx_act_256 *block = (const nx_act_256 *)(const void *)w.columns + i / 256;
                d = block->d[0], q = block->q[i % 256];
            }
            /* half a step; Q8_0's step is rounded to a half afterwards */
            NX_CHECK(fabs(d * q - w.x[i]) <= fabs(d) * (tested[t] == NX_Q2_0 || tested[t] == NX_Q1_0 ? 0.57 : 0.5001));
        }
        drop(&w);
    }
}

static void halves_round_trip(void) {
    for (uint32_t h = 0; h < 0x10000; h++) {
        const float f = nx_half_to_float((uint16_t)h);
        if (isnan(f)) NX_CHECK((nx_float_to_half(f) & 0x7c00) == 0x7c00 && (nx_float_to_half(f) & 0x3ff));
        else NX_CHECK_EQ(nx_float_to_half(f), h);
    }
    NX_CHECK_EQ(nx_float_to_half(65519.9f), 0x7bff);
    NX_CHECK_EQ(nx_float_to_half(65520.0f), 0x7c00);
    NX_CHECK_EQ(nx_float_to_half(1.00048828125f), 0x3c00); /* half way: to even */
    NX_CHECK_EQ(nx_float_to_half(1.00146484375f), 0x3c02);
    NX_CHECK_EQ(nx_float_to_half(0x1p-25f), 0);
    NX_CHECK_EQ(nx_float_to_half(0x1.8p-24f), 2);
}

static void what_makes_no_sense_is_refused(void) {
    nx_ternary m;
    NX_CHECK_EQ(nx_ternary_create(NX_TQ2_0, 255, 1, &m), NX_E_INVALID);
    NX_CHECK_EQ(nx_ternary_create(NX_TQ2_0, 0, 1, &m), NX_E_INVALID);
    NX_CHECK_EQ(nx_ternary_create(NX_TQ2_0, 256, 0, &m), NX_E_INVALID);
    NX_CHECK_EQ(nx_ternary_create(NX_TERNARY_TYPES, 256, 1, &m), NX_E_INVALID);
    NX_CHECK_EQ(nx_ternary_type_of("Q4_K"), NX_TERNARY_TYPES);
    NX_CHECK_EQ(nx_ternary_type_of("TQ2_0"), NX_TQ2_0);
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(what_makes_no_sense_is_refused),
        NX_TEST(halves_round_trip),
        NX_TEST(implementations_agree),
        NX_TEST(rows_as_they_are_stored_give_the_same),
        NX_TEST(the_reference_has_all_types),
        NX_TEST(many_columns_are_many_times_one),
        NX_TEST(implementations_agree_on_many_columns),
        NX_TEST(values_that_are_no_numbers),
        NX_TEST(close_to_double_precision),
        NX_TEST(activations_are_rounded_to_the_nearest),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
