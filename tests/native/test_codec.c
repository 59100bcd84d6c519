/* test_codec.c: what is encoded comes back by every path; what was not encoded harms nobody. */
#include "nexus_codec.h"
#include "nx_test.h"

static uint64_t seed = 1;

static uint32_t dice(void) {
    seed = seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(seed >> 33);
}

static const nx_ans_layout layouts[] = {
    {0, 1, 1, {0}, {1}},
    {2, 2, 2, {1, 0}, {1, 1}},
    {4, 4, 4, {3, 2, 1, 0}, {1, 1, 1, 1}},
    {0, 34, 3, {0, 1, 2}, {1, 1, 32}},
    {2, 6, 2, {0, 4}, {4, 2}},
    {0, 255, 2, {0, 250}, {250, 5}},
    {4, 4, 1, {0}, {4}},
};
enum { N_LAYOUTS = sizeof layouts / sizeof *layouts };

/* kind 0: random, 1: all the same, 2: few values, 3: skewed, 4: two values, one of them once. */
static void fill(uint8_t *p, size_t n, int kind) {
    for (size_t i = 0; i < n; i++) {
        uint32_t r = dice();
        switch (kind) {
        case 0: p[i] = (uint8_t)r; break;
        case 1: p[i] = 7; break;
        case 2: p[i] = (uint8_t)(r % 5 * 50); break;
        case 3: p[i] = (uint8_t)(__builtin_ctz(r | 1u << 20) * 3); break;
        default: p[i] = i == n / 2 ? 1 : 0;
        }
    }
}

static size_t encode(const nx_ans_layout *layout, const uint8_t *raw, size_t n, uint8_t **out) {
    size_t used = 0, capacity = nx_ans_bound(n);
    *out = malloc(capacity);
    NX_CHECK_EQ(nx_ans_encode(layout, raw, n, *out, capacity, &used), NX_OK);
    NX_CHECK(used <= capacity);
    return used;
}

static void decode_by_all(const uint8_t *stored, size_t n_stored, const uint8_t *raw, size_t n) {
    for (int path = 0; path < NX_ANS_PATHS; path++) {
        if (!nx_ans_has((nx_ans_path)path)) continue;
        /* Of exactly the size, so that a write or a read too far is seen. */
        uint8_t *copy = malloc(n_stored), *out = malloc(n + 1);
        memcpy(copy, stored, n_stored);
        out[n] = 0xA5;
        NX_CHECK_EQ(nx_ans_decode_by((nx_ans_path)path, copy, n_stored, out, n), NX_OK);
        NX_CHECK_EQ(memcmp(out, raw, n), 0);
        NX_CHECK_EQ(out[n], 0xA5);
        free(copy);
        free(out);
    }
}

static void what_is_encoded_comes_back(void) {
    static const size_t sizes[] = {0, 1, 2, 3, 63, 64, 127, 128, 1000, 4099, 70001, 300000};
    for (int l = 0; l < N_LAYOUTS; l++) {
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            for (int kind = 0; kind < 5; kind++) {
                nx_test_about("layout %d, %zu bytes, kind %d", l, sizes[s], kind);
                uint8_t *raw = malloc(sizes[s] + 1), *stored;
                fill(raw, sizes[s], kind);
                size_t used = encode(&layouts[l], raw, sizes[s], &stored);
                decode_by_all(stored, used, raw, sizes[s]);
                if (kind == 3 && sizes[s] > 60000) NX_CHECK(used < sizes[s] * 2 / 3);
                if (kind == 1) NX_CHECK(used < 1000);
                free(raw);
                free(stored);
            }
        }
    }
}

static void a_stream_that_was_cut_or_has_more_is_refused(void) {
    uint8_t raw[5000], out[5000], *stored;
    fill(raw, sizeof raw, 3);
    size_t used = encode(&layouts[1], raw, sizeof raw, &stored);
    for (int path = 0; path < NX_ANS_PATHS; path++) {
        if (!nx_ans_has((nx_ans_path)path)) continue;
        for (size_t n = 0; n < used; n++) {
            uint8_t *copy = malloc(n + 1);
            memcpy(copy, stored, n);
            NX_CHECK_EQ(nx_ans_decode_by((nx_ans_path)path, copy, n, out, sizeof out), NX_E_INVALID);
            free(copy);
        }
        uint8_t *longer = calloc(used + 2, 1);
        memcpy(longer, stored, used);
        NX_CHECK_EQ(nx_ans_decode_by((nx_ans_path)path, longer, used + 2, out, sizeof out), NX_E_INVALID);
        NX_CHECK_EQ(nx_ans_decode_by((nx_ans_path)path, stored, used, out, sizeof out - 1), NX_E_INVALID);
        free(longer);
    }
    free(stored);
}

static void changed_bytes_do_no_harm_and_all_paths_agree(void) {
    enum { N = 20000 };
    static uint8_t raw[N], out[NX_ANS_PATHS][N];
    for (int round = 0; round < 3000; round++) {
        const nx_ans_layout *layout = &layouts[round % N_LAYOUTS];
        size_t n = 200 + dice() % (N - 200);
        uint8_t *stored;
        nx_test_about("round %d", round);
        fill(raw, n, round % 2 ? 3 : 2);
        size_t used = encode(layout, raw, n, &stored);
        /* Mostly in the first bytes, where sizes and tables are. */
        for (unsigned i = 0, changes = 1 + dice() % 4; i < changes; i++) {
            size_t range = dice() % 4 ? (used < 400 ? used : 400) : used;
            stored[dice() % range] ^= (uint8_t)(1u << dice() % 8);
        }
        nx_status first = NX_OK;
        for (int path = 0; path < NX_ANS_PATHS; path++) {
        if (!nx_ans_has((nx_ans_path)path)) continue;
            uint8_t *copy = malloc(used);
            memcpy(copy, stored, used);
            nx_status status = nx_ans_decode_by((nx_ans_path)path, copy, used, out[path], n);
            NX_CHECK(status == NX_OK || status == NX_E_INVALID);
            if (path == 0) first = status;
            NX_CHECK_EQ(status, first);
            if (status == NX_OK) NX_CHECK_EQ(memcmp(out[path], out[0], n), 0);
            free(copy);
        }
        free(stored);
    }
}

static void layouts_that_do_not_cover_a_block_once_are_refused(void) {
    static const nx_ans_layout wrong[] = {
        {0, 0, 1, {0}, {1}},          {0, 2, 0, {0}, {0}},       {0, 2, 1, {0}, {1}},
        {0, 2, 2, {0, 0}, {1, 2}},    {0, 2, 1, {1}, {2}},       {3, 3, 1, {0}, {3}},
        {2, 3, 1, {0}, {3}},          {0, 2, 17, {0, 1}, {1, 1}}, {0, 2, 2, {0, 1}, {2, 0}},
    };
    uint8_t raw[64] = {0}, out[1024];
    size_t used;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        nx_test_about("layout %zu", i);
        NX_CHECK_EQ(nx_ans_encode(&wrong[i], raw, 64, out, sizeof out, &used), NX_E_INVALID);
    }
    NX_CHECK_EQ(nx_ans_encode(&layouts[0], raw, 64, out, nx_ans_bound(64) - 1, &used), NX_E_INVALID);
    NX_CHECK_EQ(nx_ans_decode_by(NX_ANS_PATHS, out, 64, raw, 64), NX_E_UNSUPPORTED);
    NX_CHECK(nx_ans_has(NX_ANS_PORTABLE) && nx_ans_has(nx_ans_best()));
    for (int path = 0; path < NX_ANS_PATHS; path++)
        if (!nx_ans_has((nx_ans_path)path))
            NX_CHECK_EQ(nx_ans_decode_by((nx_ans_path)path, out, 64, raw, 64), NX_E_UNSUPPORTED);
}

static void the_hash_is_xxh3(void) {
    /* From the reference implementation; the Python tests compare many more. */
    NX_CHECK(nx_xxh3_64("", 0) == UINT64_C(0x2D06800538D394C2));
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(what_is_encoded_comes_back),
        NX_TEST(a_stream_that_was_cut_or_has_more_is_refused),
        NX_TEST(changed_bytes_do_no_harm_and_all_paths_agree),
        NX_TEST(layouts_that_do_not_cover_a_block_once_are_refused),
        NX_TEST(the_hash_is_xxh3),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
