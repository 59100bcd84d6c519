/* Residual kernels: every implementation that runs here gives the bits of the reference, whatever the
 * shape, the split and the alignment; selection is exact. */
#include <math.h>

#include "nexus_kernels.h"
#include "nexus_residual.h"
#include "nx_test.h"

static float uniform(uint64_t *state) { return (float)(nx_test_random(state) >> 40) / (float)(1 << 23) - 1.0f; }

typedef struct world {
    nx_residual_matrix m;
    uint8_t *codes_memory;
    float *scales, *x, *products;
    uint32_t *channels;
    size_t n;
} world;

/* `shift`: bytes by which the codes are off an aligned address. */
static world make(uint32_t n_in, uint32_t n_out, uint32_t k, size_t shift, uint64_t seed) {
    uint64_t state = seed;
    world w = {.m = {.n_in = n_in, .n_out = n_out}};
    const uint64_t bytes = n_in * nx_residual_row_bytes(n_out);
    w.codes_memory = malloc(bytes + shift);
    w.scales = malloc(n_out * sizeof *w.scales);
    w.x = malloc(n_in * sizeof *w.x);
    float *r = malloc((size_t)n_in * n_out * sizeof *r);
    for (size_t i = 0; i < (size_t)n_in * n_out; i++) r[i] = uniform(&state) * 0.01f;
    for (uint32_t i = 0; i < n_in; i++) w.x[i] = uniform(&state);
    NX_CHECK_EQ(nx_residual_encode(r, n_in, n_in, n_out, 0, n_out, w.codes_memory + shift, w.scales), NX_OK);
    free(r);
    w.m.codes = w.codes_memory + shift;
    w.m.scales = w.scales;
    w.channels = malloc((k + 1) * sizeof *w.channels);
    w.n = nx_residual_select(w.x, n_in, k, w.channels);
    w.products = malloc((w.n + 1) * 16 * sizeof *w.products);
    nx_residual_products(w.x, w.channels, w.n, w.products);
    return w;
}

static void drop(world *w) {
    free(w->codes_memory);
    free(w->scales);
    free(w->x);
    free(w->channels);
    free(w->products);
}

static float *result(const world *w, uint32_t n_threads) {
    float *y = malloc(w->m.n_out * sizeof *y), *sums = malloc((w->m.n_out + NX_RESIDUAL_LINE) * sizeof *sums);
    for (uint32_t o = 0; o < w->m.n_out; o++) y[o] = (float)o;
    const uint32_t lines = (w->m.n_out + NX_RESIDUAL_LINE - 1) / NX_RESIDUAL_LINE;
    for (uint32_t t = 0; t < n_threads; t++) {
        const uint32_t begin = lines * t / n_threads * NX_RESIDUAL_LINE;
        uint32_t end = lines * (t + 1) / n_threads * NX_RESIDUAL_LINE;
        if (end > w->m.n_out) end = w->m.n_out;
        nx_residual_add(&w->m, w->channels, w->products, w->n, begin, end, sums, y);
    }
    free(sums);
    return y;
}

static void implementations_agree(void) {
    static const uint32_t outs[] = {1, 15, 16, 127, 128, 129, 300, 512}, ins[] = {1, 7, 64, 130};
    for (size_t a = 0; a < sizeof outs / sizeof *outs; a++)
        for (size_t b = 0; b < sizeof ins / sizeof *ins; b++)
            for (uint32_t k = 0; k <= ins[b]; k += ins[b] / 5 + 1)
                for (size_t shift = 0; shift < 4; shift += 3) {
                    world w = make(ins[b], outs[a], k, shift, a * 100 + b * 10 + k);
                    NX_CHECK_EQ(nx_kernels_use_isa(NX_ISA_REF), NX_OK);
                    float *wanted = result(&w, 1);
                    for (int isa = 0; isa < NX_ISA_COUNT; isa++) {
                        if (nx_kernels_use_isa((nx_isa)isa) != NX_OK) continue;
                        for (uint32_t threads = 1; threads <= 3; threads++) {
                            nx_test_about("%s, %u to %u, k %u, shift %zu, %u threads", nx_kernels_isa_name((nx_isa)isa),
                                          ins[b], outs[a], k, shift, threads);
                            float *seen = result(&w, threads);
                            NX_CHECK(memcmp(seen, wanted, outs[a] * sizeof *seen) == 0);
                            free(seen);
                        }
                    }
                    free(wanted);
                    drop(&w);
                }
}

/* All channels: the product with the decoded matrix. */
static void sums_are_what_the_codes_say(void) {
    world w = make(96, 200, 96, 0, 5);
    float *decoded = malloc(96 * 200 * sizeof *decoded);
    nx_residual_decode(&w.m, 0, 200, decoded, 96);
    for (int isa = 0; isa < NX_ISA_COUNT; isa++) {
        if (nx_kernels_use_isa((nx_isa)isa) != NX_OK) continue;
        nx_test_about("%s", nx_kernels_isa_name((nx_isa)isa));
        float *y = result(&w, 1);
        for (int o = 0; o < 200; o++) {
            double sum = o, size = o + 1;
            for (int c = 0; c < 96; c++) {
                sum += (double)decoded[o * 96 + c] * w.x[c];
                size += fabs((double)decoded[o * 96 + c] * w.x[c]);
            }
            NX_CHECK(fabs(y[o] - sum) <= 1e-6 * size);
        }
        free(y);
    }
    free(decoded);
    drop(&w);
}

static void encoding_is_within_a_step(void) {
    uint64_t state = 11;
    float r[3][70];
    for (int o = 0; o < 3; o++)
        for (int c = 0; c < 70; c++) r[o][c] = uniform(&state) * (o == 1 ? 1e-12f : 3.0f);
    for (int c = 0; c < 70; c++) r[2][c] = 0; /* a row without an error */
    uint8_t codes[70 * 64];
    float scales[3], back[3][70];
    NX_CHECK_EQ(nx_residual_encode(&r[0][0], 70, 70, 3, 0, 3, codes, scales), NX_OK);
    const nx_residual_matrix m = {70, 3, codes, scales};
    nx_residual_decode(&m, 0, 3, &back[0][0], 70);
    for (int o = 0; o < 3; o++) {
        double error = 0, size = 0;
        for (int c = 0; c < 70; c++) {
            error += pow((double)back[o][c] - r[o][c], 2);
            size += pow(r[o][c], 2);
        }
        NX_CHECK(error <= 0.01 * size); /* 15 levels over a uniform row: one part in about 600 */
    }
    NX_CHECK(scales[2] == 0 && back[2][9] == 0);
    r[1][3] = NAN;
    NX_CHECK_EQ(nx_residual_encode(&r[0][0], 70, 70, 3, 0, 3, codes, scales), NX_E_INVALID);
    NX_CHECK_EQ(nx_residual_encode(&r[0][0], 70, 70, 3, 1, 3, codes, scales), NX_E_INVALID);
    NX_CHECK_EQ(nx_residual_encode(&r[0][0], 70, 70, 3, 0, 2, codes, scales), NX_E_INVALID);
}

static int larger(const float *x, uint32_t a, uint32_t b) {
    const float p = isnan(x[a]) ? INFINITY : fabsf(x[a]), q = isnan(x[b]) ? INFINITY : fabsf(x[b]);
    if (isnan(x[a]) != isnan(x[b]) && (isinf(p) && isinf(q))) return isnan(x[a]);
    return p != q ? p > q : a < b;
}

static void selection_is_exact(void) {
    uint64_t state = 3;
    for (int round = 0; round < 300; round++) {
        const uint32_t n = 1 + (uint32_t)(nx_test_random(&state) % 90), k = (uint32_t)(nx_test_random(&state) % 100);
        float x[90];
        uint32_t chosen[90];
        for (uint32_t i = 0; i < n; i++) {
            x[i] = uniform(&state);
            if (round % 3 == 1) x[i] = (float)(int)(x[i] * 4); /* ties */
            if (round % 7 == 2 && i % 11 == 0) x[i] = i % 2 ? NAN : -INFINITY;
            if (round % 5 == 4) x[i] *= 1e-42f; /* denormal */
        }
        const size_t taken = nx_residual_select(x, n, k, chosen);
        nx_test_about("round %d, n %u, k %u", round, n, k);
        NX_CHECK_EQ(taken, k < n ? k : n);
        uint8_t is_chosen[90] = {0};
        for (size_t i = 0; i < taken; i++) {
            NX_CHECK(i == 0 || chosen[i] > chosen[i - 1]);
            is_chosen[chosen[i]] = 1;
        }
        for (uint32_t a = 0; a < n; a++)
            for (uint32_t b = 0; b < n; b++)
                NX_CHECK(!(is_chosen[b] && !is_chosen[a] && larger(x, a, b)));
    }
}

static void buckets_take_the_top_first(void) {
    uint64_t state = 8;
    float x[512];
    for (int i = 0; i < 512; i++) x[i] = uniform(&state) * uniform(&state) * uniform(&state);
    uint32_t exact[40], chosen[40];
    nx_residual_select(x, 512, 40, exact);
    float high = 0, low = 1;
    for (int i = 0; i < 512; i++) high = fabsf(x[i]) > high ? fabsf(x[i]) : high;
    for (int i = 0; i < 40; i++) low = fabsf(x[exact[i]]) < low ? fabsf(x[exact[i]]) : low;
    NX_CHECK_EQ(nx_residual_select_buckets(x, 512, 40, high, low, chosen), 40);
    int common = 0;
    for (int i = 0; i < 40; i++)
        for (int j = 0; j < 40; j++) common += exact[i] == chosen[j];
    NX_CHECK(common >= 36); /* calibrated on this very vector */
    /* anchors that mean nothing still give k channels */
    NX_CHECK_EQ(nx_residual_select_buckets(x, 512, 40, 0, 0, chosen), 40);
    NX_CHECK_EQ(nx_residual_select_buckets(x, 512, 40, NAN, NAN, chosen), 40);
}

static void not_a_number_stays_where_it_belongs(void) {
    for (int isa = 0; isa < NX_ISA_COUNT; isa++) {
        if (nx_kernels_use_isa((nx_isa)isa) != NX_OK) continue;
        world w = make(20, 40, 4, 0, 2);
        w.x[7] = NAN;
        w.n = nx_residual_select(w.x, 20, 4, w.channels);
        nx_residual_products(w.x, w.channels, w.n, w.products);
        float *y = result(&w, 1);
        for (int o = 0; o < 40; o++) NX_CHECK(isnan(y[o]));
        free(y);
        drop(&w);
    }
}

static void isa_is_what_the_machine_has(void) {
    NX_CHECK_EQ(nx_kernels_use_isa(NX_ISA_COUNT), NX_E_INVALID);
    int usable = 0;
    for (int isa = 0; isa < NX_ISA_COUNT; isa++) {
        const nx_status status = nx_kernels_use_isa((nx_isa)isa);
        NX_CHECK_EQ(status, nx_kernels_isa_usable((nx_isa)isa) ? NX_OK : NX_E_UNSUPPORTED);
        usable += status == NX_OK;
        if (status == NX_OK) NX_CHECK_EQ(nx_kernels_isa(), isa);
        if (status == NX_OK) NX_CHECK(strncmp(nx_kernels_why(), nx_kernels_isa_name((nx_isa)isa), 4) == 0);
    }
    NX_CHECK(usable >= 1);
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(isa_is_what_the_machine_has),
        NX_TEST(implementations_agree),
        NX_TEST(sums_are_what_the_codes_say),
        NX_TEST(encoding_is_within_a_step),
        NX_TEST(selection_is_exact),
        NX_TEST(buckets_take_the_top_first),
        NX_TEST(not_a_number_stays_where_it_belongs),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
