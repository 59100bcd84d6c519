/* Are the vectors of chosen weights kept, in order and with their matrices, and those of no others? */
#include "nexus_activations.h"

#include "nx_test.h"

static const char *const names[] = {"blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"};

static nx_activations *made(void) {
    nx_activations *a;
    NX_CHECK_EQ(nx_activations_create(names, 2, &a), NX_OK);
    return a;
}

static void vectors_are_kept_until_they_are_cleared(void) {
    nx_activations *a = made();
    enum { N = 5, ROWS = 1000 };
    uint32_t n_channels;
    size_t n_rows, i;
    const float *rows;
    const uint32_t *matrices;
    NX_CHECK_EQ(nx_activations_at(a, 1, &n_channels, &n_rows, &rows, &matrices), NX_OK);
    NX_CHECK_EQ(n_rows, 0);
    for (int round = 0; round < 2; round++) {
        for (int r = 0; r < ROWS; r++) {
            float x[N];
            for (int c = 0; c < N; c++) x[c] = (float)(100 * r + c + round);
            NX_CHECK(nx_activations_find(a, names[1], &i) && i == 1);
            nx_activations_add(a, i, N, (uint32_t)(r % 7), x);
        }
        NX_CHECK_EQ(nx_activations_at(a, 1, &n_channels, &n_rows, &rows, &matrices), NX_OK);
        NX_CHECK_EQ(n_channels, N);
        NX_CHECK_EQ(n_rows, ROWS);
        for (int r = 0; r < ROWS; r++) {
            NX_CHECK_EQ(matrices[r], r % 7);
            for (int c = 0; c < N; c++) NX_CHECK(rows[r * N + c] == (float)(100 * r + c + round));
        }
        NX_CHECK_EQ(nx_activations_at(a, 0, &n_channels, &n_rows, &rows, &matrices), NX_OK);
        NX_CHECK_EQ(n_rows, 0);
        nx_activations_clear(a);
        NX_CHECK_EQ(nx_activations_at(a, 1, &n_channels, &n_rows, &rows, &matrices), NX_OK);
        NX_CHECK_EQ(n_rows, 0);
    }
    NX_CHECK_EQ(nx_activations_status(a), NX_OK);
    NX_CHECK_EQ(nx_activations_at(a, 2, &n_channels, &n_rows, &rows, &matrices), NX_E_INVALID);
    nx_activations_free(a);
}

static void only_chosen_weights_are_found(void) {
    nx_activations *a = made();
    size_t i = 9;
    NX_CHECK(!nx_activations_find(a, "blk.0.attn_k.weight", &i));
    NX_CHECK(!nx_activations_find(a, "blk.0.attn_q.weigh", &i));
    NX_CHECK_EQ(i, 9);
    for (int k = 0; k < 6; k++) NX_CHECK(nx_activations_find(a, names[k % 2], &i) && i == (size_t)(k % 2));
    nx_activations_free(a);
    NX_CHECK_EQ(nx_activations_create(names, 0, &a), NX_OK);
    NX_CHECK(!nx_activations_find(a, names[0], &i));
    nx_activations_free(a);
    nx_activations_free(NULL);
}

static void a_weight_has_vectors_of_one_length(void) {
    const float x[4] = {1, 2, 3, 4};
    for (int k = 0; k < 2; k++) {
        nx_activations *a = made();
        uint32_t n_channels;
        size_t n_rows;
        const float *rows;
        const uint32_t *matrices;
        nx_activations_add(a, 0, 4, 0, x);
        nx_activations_add(a, 0, k ? 3 : 0, 0, x);
        NX_CHECK_EQ(nx_activations_status(a), NX_E_INVALID);
        NX_CHECK_EQ(nx_activations_at(a, 0, &n_channels, &n_rows, &rows, &matrices), NX_OK);
        NX_CHECK_EQ(n_rows, 1);
        nx_activations_free(a);
    }
}

int main(int argc, char **argv) {
    const nx_test tests[] = {
        NX_TEST(vectors_are_kept_until_they_are_cleared),
        NX_TEST(only_chosen_weights_are_found),
        NX_TEST(a_weight_has_vectors_of_one_length),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
