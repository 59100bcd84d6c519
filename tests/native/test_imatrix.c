/* Are activations summed by weight, matrix and channel, and is what cannot be right refused? */
#include "nexus_imatrix.h"

#include <math.h>

#include "nx_test.h"

static void sums_are_those_of_squares(void) {
    nx_imatrix *im;
    NX_CHECK_EQ(nx_imatrix_create(&im), NX_OK);
    uint64_t seed = 7;
    enum { N = 37, M = 3, VECTORS = 200 };
    double wanted[M][N] = {{0}};
    uint64_t count[M] = {0};
    nx_imatrix_entry *e = nx_imatrix_get(im, "blk.0.ffn_up.weight", N, M);
    NX_CHECK(e != NULL);
    for (int v = 0; v < VECTORS; v++) {
        float x[N];
        const uint32_t m = (uint32_t)(nx_test_random(&seed) % M);
        for (int i = 0; i < N; i++) {
            x[i] = (float)(nx_test_random(&seed) >> 40) / (1 << 20) - 8;
            wanted[m][i] += (double)x[i] * x[i];
        }
        count[m]++;
        nx_imatrix_add(im, e, m, x);
    }
    char name[NX_IMATRIX_NAME];
    uint32_t n_channels, n_matrices;
    const double *sums;
    const uint64_t *counts;
    NX_CHECK_EQ(nx_imatrix_count(im), 1);
    NX_CHECK_EQ(nx_imatrix_at(im, 0, name, &n_channels, &n_matrices, &sums, &counts), NX_OK);
    NX_CHECK_EQ(strcmp(name, "blk.0.ffn_up.weight"), 0);
    NX_CHECK_EQ(n_channels, N);
    NX_CHECK_EQ(n_matrices, M);
    for (int m = 0; m < M; m++) {
        NX_CHECK_EQ(counts[m], count[m]);
        for (int i = 0; i < N; i++) NX_CHECK(sums[m * N + i] == wanted[m][i]);
    }
    NX_CHECK_EQ(nx_imatrix_at(im, 1, name, &n_channels, &n_matrices, &sums, &counts), NX_E_INVALID);
    NX_CHECK_EQ(nx_imatrix_status(im), NX_OK);
    nx_imatrix_free(im);
}

static void a_weight_is_found_again_wherever_it_is(void) {
    nx_imatrix *im;
    NX_CHECK_EQ(nx_imatrix_create(&im), NX_OK);
    enum { WEIGHTS = 300 };
    nx_imatrix_entry *entries[WEIGHTS];
    char name[NX_IMATRIX_NAME];
    for (int i = 0; i < WEIGHTS; i++) {
        snprintf(name, sizeof name, "blk.%d.attn_q.weight", i);
        entries[i] = nx_imatrix_get(im, name, 4, 1);
    }
    NX_CHECK_EQ(nx_imatrix_count(im), WEIGHTS);
    uint64_t seed = 1;
    for (int k = 0; k < 2 * WEIGHTS; k++) { /* in order, then at random */
        const int i = k < WEIGHTS ? k : (int)(nx_test_random(&seed) % WEIGHTS);
        snprintf(name, sizeof name, "blk.%d.attn_q.weight", i);
        NX_CHECK(nx_imatrix_get(im, name, 4, 1) == entries[i]);
    }
    NX_CHECK_EQ(nx_imatrix_count(im), WEIGHTS);
    nx_imatrix_free(im);
}

static void a_name_that_fills_its_field_is_kept(void) {
    nx_imatrix *im;
    NX_CHECK_EQ(nx_imatrix_create(&im), NX_OK);
    char longest[NX_IMATRIX_NAME];
    memset(longest, 'w', sizeof longest - 1);
    longest[sizeof longest - 1] = 0;
    nx_imatrix_entry *e = nx_imatrix_get(im, longest, 2, 1);
    NX_CHECK(e != NULL && nx_imatrix_get(im, longest, 2, 1) == e);
    nx_imatrix_free(im);
}

static void what_cannot_be_right_is_an_error_that_stays(void) {
    const float good[2] = {1, 2};
    const float bad[][2] = {{NAN, 1}, {1, INFINITY}};
    for (int i = 0; i < 5; i++) {
        nx_test_about("case %d", i);
        nx_imatrix *im;
        NX_CHECK_EQ(nx_imatrix_create(&im), NX_OK);
        nx_imatrix_entry *e = nx_imatrix_get(im, "w", 2, 2);
        nx_imatrix_add(im, e, 1, good);
        if (i == 0) NX_CHECK(nx_imatrix_get(im, "w", 2, 3) == NULL);
        else if (i == 1) NX_CHECK(nx_imatrix_get(im, "none", 0, 1) == NULL);
        else if (i == 2) nx_imatrix_add(im, e, 2, good); /* there is no such expert */
        else nx_imatrix_add(im, e, 0, bad[i - 3]);
        NX_CHECK_EQ(nx_imatrix_status(im), NX_E_INVALID);
        nx_imatrix_add(im, e, 1, good);
        NX_CHECK_EQ(nx_imatrix_status(im), NX_E_INVALID);
        char name[NX_IMATRIX_NAME];
        uint32_t n_channels, n_matrices;
        const double *sums;
        const uint64_t *counts;
        NX_CHECK_EQ(nx_imatrix_at(im, 0, name, &n_channels, &n_matrices, &sums, &counts), NX_OK);
        NX_CHECK(sums[0] == 0 && sums[2] == 2 && sums[3] == 8 && counts[0] == 0 && counts[1] == 2);
        nx_imatrix_free(im);
    }
    nx_imatrix_free(NULL);
}

int main(int argc, char **argv) {
    const nx_test tests[] = {
        NX_TEST(sums_are_those_of_squares),
        NX_TEST(a_weight_is_found_again_wherever_it_is),
        NX_TEST(a_name_that_fills_its_field_is_kept),
        NX_TEST(what_cannot_be_right_is_an_error_that_stays),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
