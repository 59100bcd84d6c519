/*
 * test_policy.c: plugins in C: what is refused and in which words, what a policy is told and asked, how long
 * its states live, and that a predictor's answer is checked.
 */
#include "nexus_attach.h"
#include "nexus_codec.h"
#include "nx_consumer.h"
#include "nx_policies.h"
#include "predict.h"

#define EXPERTS 12
#define SLOTS 5
#define LAYERS 3

static world here;

static nx_model *open_model(bool direct) {
    world_init(&here, 1, 400000, 41);
    world_manifest(&here, 0, 0, 100000, 0, direct);
    for (size_t g = 0; g < LAYERS; g++) {
        char name[32];
        snprintf(name, sizeof name, "blk.%zu.experts", g);
        world_tensor(&here, "nvme", 0, 4096 + g * 110000, 512, 16, EXPERTS, 0, name);
    }
    for (size_t g = 0; g < LAYERS; g++) world_line(&here, "experts %d %zu", SLOTS, g);
    return world_open(&here, "", 0);
}

static void close_model(nx_model *m) {
    nx_model_release(m);
    world_free(&here);
}

static nx_status use(nx_group *g, const int32_t *experts, size_t n) {
    const nx_status status = nx_experts_acquire(g, experts, n);
    if (status != NX_OK) return status;
    const nx_status waited = nx_experts_wait(g, 0, experts, n);
    nx_experts_release(g, experts, n);
    return waited;
}

/* ------------------------------------------------------------ what is refused */

static int first(void *state, const nxp_cache_ask *ask, int32_t *out) {
    (void)state;
    memcpy(out, ask->experts, ask->n_wanted * sizeof *out);
    return 0;
}

static const nxp_cache_policy good = {.head = NXP_HEAD(nxp_cache_policy, NXP_CACHE_POLICY, "good"), .victims = first};

static void *create_nothing(void *user, const nxp_cache_layer *layer) {
    (void)user, (void)layer;
    return NULL;
}

static void refused(nx_model *m, nxp_cache_policy policy, nx_status wanted, const char *const words[]) {
    nx_error error = {0};
    nx_plugin_info info;
    nx_test_about("%s", words[0]);
    NX_CHECK_EQ(nx_cache_use_policy(m, &policy, &error), wanted);
    nx_test_about("%s", error.text);
    for (size_t i = 0; words[i]; i++) NX_CHECK(strstr(error.text, words[i]) != NULL);
    nx_cache_policy_get(m, &info);
    NX_CHECK(strcmp(info.name, "good") == 0); /* what was in use before */
}

#define WORDS(...) (const char *const[]){__VA_ARGS__, NULL}

static void structs(bool direct) {
    nx_model *m = open_model(direct);
    char long_name[65];
    memset(long_name, 'x', 64);
    long_name[64] = 0;
    NX_CHECK_EQ(nx_cache_use_policy(m, &good, NULL), NX_OK);
    nxp_cache_policy p = good;
    p.head.api_version = NXP_API_VERSION + 1;
    refused(m, p, NX_E_ABI, WORDS("built for version 2", "has version 1", "install a newer nexus_ext"));
    p.head.api_version = 0;
    refused(m, p, NX_E_ABI, WORDS("built for version 0", "nexus_ext.get_include()"));
    p = good;
    p.head.kind = NXP_CODEC;
    refused(m, p, NX_E_ABI, WORDS("cache policy", "another struct"));
    p = good;
    p.head.struct_size = 8;
    refused(m, p, NX_E_ABI, WORDS("another struct"));
    p.head.struct_size = sizeof p - sizeof p.victims;
    refused(m, p, NX_E_ABI, WORDS("good", "get_include()"));
    p = good;
    p.head.name = NULL;
    refused(m, p, NX_E_ABI, WORDS("no name"));
    p.head.name = "";
    refused(m, p, NX_E_ABI, WORDS("no name"));
    p.head.name = long_name;
    refused(m, p, NX_E_ABI, WORDS("no name of 1 to 63"));
    p = good;
    p.victims = NULL;
    refused(m, p, NX_E_INVALID, WORDS("good", "`victims`"));
    p = good;
    p.create = create_nothing;
    refused(m, p, NX_E_NOMEM, WORDS("good", "3 layers"));
    nx_error error;
    NX_CHECK_EQ(nx_cache_use_policy(m, NULL, &error), NX_E_ABI);
    NX_CHECK(strstr(error.text, "address 0") != NULL);
    /* A newer header has more fields; what this version does not know is not asked for. */
    struct {
        nxp_cache_policy known;
        void (*unknown)(void);
    } newer = {.known = good};
    newer.known.head.struct_size = sizeof newer;
    NX_CHECK_EQ(nx_cache_use_policy(m, &newer.known, NULL), NX_OK);
    nx_model_close(m);
    NX_CHECK_EQ(nx_cache_use_policy(m, &good, &error), NX_E_CLOSED);
    close_model(m);
}

static void a_struct_of_another_version_is_refused_in_words(void) { world_for_each(structs); }

/* ------------------------------------------------------------ what a policy sees */

typedef struct watcher {
    uint32_t created, destroyed, asked, told, layers;
    uint64_t last_use[EXPERTS], clock;
    float uses[EXPERTS]; /* not decayed: an upper bound */
    bool asked_in_graph;
} watcher;

static watcher seen;

static void *watch_create(void *user, const nxp_cache_layer *layer) {
    watcher *w = user;
    NX_CHECK(NXP_HAS(layer, nxp_cache_layer, record_bytes));
    NX_CHECK(layer->n_experts == EXPERTS && layer->n_slots == SLOTS && layer->n_layers == LAYERS);
    NX_CHECK(layer->layer < LAYERS && layer->record_bytes >= 512 * 16);
    w->layers |= 1u << layer->layer;
    w->created++;
    uint32_t *state = malloc(sizeof *state); /* a leak is found by the sanitizer */
    NX_CHECK(state != NULL);
    *state = layer->layer;
    return state;
}

static void watch_destroy(void *state) {
    seen.destroyed++;
    free(state);
}

static void watch_used(void *state, const nxp_cache_use *u) {
    if (*(uint32_t *)state != 0) return;
    NX_CHECK(NXP_HAS(u, nxp_cache_use, hit));
    NX_CHECK_EQ(u->clock, ++seen.clock);
    seen.asked_in_graph = false;
    seen.told++;
    for (uint32_t i = 0; i < u->n_experts; i++) {
        NX_CHECK(u->hit[i] <= 1);
        seen.last_use[u->experts[i]] = u->clock;
        seen.uses[u->experts[i]]++;
    }
}

static int watch_victims(void *state, const nxp_cache_ask *ask, int32_t *out) {
    NX_CHECK_EQ(*(uint32_t *)state, 0);
    NX_CHECK(NXP_HAS(ask, nxp_cache_ask, incoming));
    NX_CHECK(ask->n_wanted >= 1 && ask->n_wanted <= ask->n_candidates && ask->n_candidates <= SLOTS);
    NX_CHECK(ask->reason == NXP_DEMAND && ask->clock == seen.clock);
    NX_CHECK(!seen.asked_in_graph); /* once a graph and layer */
    seen.asked_in_graph = true;
    seen.asked++;
    for (uint32_t i = 0; i < ask->n_candidates; i++) {
        const int32_t e = ask->experts[i];
        NX_CHECK(e >= 0 && e < EXPERTS && seen.last_use[e] < ask->clock); /* not of this graph */
        NX_CHECK_EQ(ask->ages[i], ask->clock - seen.last_use[e]);
        NX_CHECK(ask->frequencies[i] > 0 && ask->frequencies[i] <= seen.uses[e]);
    }
    for (uint32_t i = 0; i < ask->n_wanted; i++) NX_CHECK_EQ(seen.last_use[ask->incoming[i]], ask->clock);
    return first(state, ask, out);
}

static const nxp_cache_policy watching = {.head = NXP_HEAD(nxp_cache_policy, NXP_CACHE_POLICY, "watching"),
                                          .user = &seen, .create = watch_create, .destroy = watch_destroy,
                                          .used = watch_used, .victims = watch_victims};

static void watched(bool direct) {
    nx_model *m = open_model(direct);
    memset(&seen, 0, sizeof seen);
    NX_CHECK_EQ(nx_cache_use_policy(m, &watching, NULL), NX_OK);
    NX_CHECK(seen.created == LAYERS && seen.layers == (1u << LAYERS) - 1);
    uint64_t seed = 5, evictions = 0;
    for (size_t k = 0; k < 200; k++) {
        int32_t experts[SLOTS];
        size_t n = 0;
        for (int32_t e = 0; e < EXPERTS && n < SLOTS; e++)
            if (nx_test_random(&seed) % 4 == 0) experts[n++] = e;
        if (!n) continue;
        NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, never, NULL), NX_OK);
        NX_CHECK_EQ(use(&m->groups[0], experts, n), NX_OK);
        nx_turn_end(m, 0);
    }
    nx_stats s;
    nx_model_get_stats(m, &s);
    evictions = s.expert_evictions;
    nx_plugin_info info;
    nx_cache_policy_get(m, &info);
    NX_CHECK(seen.asked > 50 && evictions > seen.asked && !info.disabled);
    NX_CHECK_EQ(info.calls, seen.asked + seen.told);
    NX_CHECK(info.ns > 0);
    NX_CHECK_EQ(nx_cache_use_policy(m, &watching, NULL), NX_OK); /* new states, then the old ones go */
    NX_CHECK(seen.created == 2 * LAYERS && seen.destroyed == LAYERS);
    nx_model_close(m);
    NX_CHECK_EQ(seen.destroyed, 2 * LAYERS);
    nx_model_close(m);
    close_model(m);
    NX_CHECK_EQ(seen.destroyed, 2 * LAYERS);
    m = open_model(direct); /* freed without having been closed */
    NX_CHECK_EQ(nx_cache_use_policy(m, &watching, NULL), NX_OK);
    close_model(m);
    NX_CHECK_EQ(seen.destroyed, 3 * LAYERS);
}

static void a_policy_is_asked_once_about_what_may_leave_and_its_states_end(void) { world_for_each(watched); }

/* ------------------------------------------------------------ replay */

static void a_replay_is_what_the_cache_would_do(void) {
    enum { TOKENS = 4000, USED = 3 };
    static int32_t used[TOKENS][USED];
    uint64_t seed = 9, misses[6], with_plugin;
    for (size_t t = 0; t < TOKENS; t++)
        for (size_t k = 0; k < USED; k++) {
            const uint64_t a = nx_test_random(&seed) % EXPERTS, b = nx_test_random(&seed) % EXPERTS;
            used[t][k] = (int32_t)(a < b ? a : b);
            for (size_t i = 0; i < k; i++)
                if (used[t][i] == used[t][k]) used[t][k] = -1;
        }
    static const char *const names[] = {"lfru", "lru", "lfu", "least-stale", "random", "adaptive"};
    for (size_t i = 0; i < 6; i++) {
        const nxp_cache_policy *p = nx_cache_builtin(names[i]);
        nx_plugin_info info;
        NX_CHECK(p && strcmp(p->head.name, names[i]) == 0);
        NX_CHECK_EQ(nx_cache_replay(p, 0, EXPERTS, SLOTS, used[0], TOKENS, USED, &misses[i], &info, NULL), NX_OK);
        NX_CHECK(misses[i] > EXPERTS && misses[i] < TOKENS * USED && !info.disabled);
        uint64_t all;
        NX_CHECK_EQ(nx_cache_replay(p, 0, EXPERTS, EXPERTS, used[0], TOKENS, USED, &all, NULL, NULL), NX_OK);
        NX_CHECK_EQ(all, EXPERTS); /* each once */
    }
    NX_CHECK(misses[0] < misses[4] && misses[2] < misses[4] && misses[5] <= misses[0]); /* some experts are popular */
    /* A policy that fails at its first question is lfru from there on. */
    hostile h = {.kind = FAILS};
    const nxp_cache_policy bad = hostile_policy(&h);
    nx_plugin_info info;
    NX_CHECK_EQ(nx_cache_replay(&bad, 7, EXPERTS, SLOTS, used[0], TOKENS, USED, &with_plugin, &info, NULL), NX_OK);
    NX_CHECK(info.disabled && with_plugin == misses[0]);
    nx_error error;
    NX_CHECK_EQ(nx_cache_replay(&good, 0, EXPERTS, 2, used[0], TOKENS, USED, &with_plugin, NULL, &error), NX_E_INVALID);
    NX_CHECK(strstr(error.text, "slot") != NULL);
    used[7][0] = EXPERTS;
    NX_CHECK_EQ(nx_cache_replay(&good, 0, EXPERTS, SLOTS, used[0], TOKENS, USED, &with_plugin, NULL, &error), NX_E_INVALID);
    NX_CHECK(strstr(error.text, "token 7") != NULL);
    NX_CHECK(nx_cache_builtin("no such policy") == NULL);
}

/* ------------------------------------------------------------ predictors */

static struct {
    int32_t n, out[2 * EXPERTS];
    uint32_t told, asked, created, destroyed;
} oracle;

static void *oracle_create(void *user, const nxp_layers *layers) {
    NX_CHECK(NXP_HAS(layers, nxp_layers, n_slots) && layers->n_layers == LAYERS);
    for (uint32_t i = 0; i < LAYERS; i++) NX_CHECK(layers->n_experts[i] == EXPERTS && layers->n_slots[i] == SLOTS);
    oracle.created++;
    return user;
}

static void oracle_destroy(void *state) {
    NX_CHECK(state == &oracle);
    oracle.destroyed++;
}

static void oracle_routed(void *state, const nxp_routed *routed) {
    NX_CHECK(state == &oracle && NXP_HAS(routed, nxp_routed, experts));
    NX_CHECK(routed->layer == 1 && routed->n_tokens == 2 && routed->n_used == 2 && routed->experts[3] == 11);
    oracle.told++;
}

static int32_t oracle_predict(void *state, const nxp_predict_ask *ask, int32_t *out) {
    NX_CHECK(state == &oracle && NXP_HAS(ask, nxp_predict_ask, limit));
    NX_CHECK(ask->layer == 2 && ask->capacity == EXPERTS && ask->limit == 4 && ask->n_used == 2);
    oracle.asked++;
    memcpy(out, oracle.out, (size_t)(oracle.n > 0 && oracle.n < EXPERTS ? oracle.n : 0) * sizeof *out);
    return oracle.n;
}

static const nxp_predictor seer = {.head = NXP_HEAD(nxp_predictor, NXP_PREDICTOR, "seer"), .user = &oracle,
                                   .create = oracle_create, .destroy = oracle_destroy, .routed = oracle_routed,
                                   .predict = oracle_predict};

static void answer(nx_model *m, int32_t n, int32_t a, int32_t b, const char *why) {
    int32_t *out;
    nx_plugin_info info;
    nx_prediction state;
    nx_test_about("%s", why ? why : "a good answer");
    NX_CHECK_EQ(nx_predict_use(m, &seer, 0, NULL), NX_OK);
    NX_CHECK_EQ(nx_predict_now(m, 1), NX_PREDICT_PLUGIN);
    NX_CHECK(nx_predict_listens(m));
    oracle.n = n;
    oracle.out[0] = a;
    oracle.out[1] = b;
    const size_t found = nx_predict_ask(&m->groups[2], 1, 2, 4, &out);
    nx_predict_plugin_get(m, &info);
    if (!why) {
        NX_CHECK(!info.disabled && found == (size_t)n && (!n || (out[0] == a && out[1] == b)));
        return;
    }
    NX_CHECK(found == 0 && info.disabled && strcmp(info.name, "seer") == 0 && strstr(info.why, why));
    nx_predict_get(m, &state); /* the built-in takes over, while it helps */
    NX_CHECK(state.state == NX_CONTROL_WATCHING && !nx_predict_listens(m));
    NX_CHECK_EQ(nx_predict_now(m, 0), NX_PREDICT_GATE);
}

static void predictors(bool direct) {
    nx_model *m = open_model(direct);
    nx_plugin_info info;
    memset(&oracle, 0, sizeof oracle);
    NX_CHECK(!nx_predict_listens(m));
    nx_predict_plugin_get(m, &info);
    NX_CHECK(!info.name[0]);
    answer(m, 2, 3, 0, NULL);
    answer(m, 0, 0, 0, NULL);
    answer(m, -1, 0, 0, "returned -1");
    answer(m, EXPERTS + 1, 0, 0, "returned 13");
    answer(m, 2, 4, 4, "twice");
    answer(m, 2, 4, EXPERTS, "which there is not");
    answer(m, 2, -1, 4, "which there is not");
    answer(m, 2, 5, 6, NULL);
    nx_predict_routed(&m->groups[1], (int32_t[]){1, 2, 3, 11}, 2, 2);
    nx_predict_plugin_get(m, &info);
    NX_CHECK(oracle.told == 1 && info.calls == 2);
    NX_CHECK_EQ(nx_predict_use(m, &seer, 1, NULL), NX_OK);
    NX_CHECK_EQ(nx_predict_now(m, 1), NX_PREDICT_NONE); /* until it is tried */
    nxp_predictor p = seer;
    nx_error error;
    p.predict = NULL;
    NX_CHECK_EQ(nx_predict_use(m, &p, 0, &error), NX_E_INVALID);
    NX_CHECK(strstr(error.text, "`predict`") != NULL);
    NX_CHECK_EQ(nx_predict_use(m, (const nxp_predictor *)(const void *)&good, 0, &error), NX_E_ABI);
    p = seer;
    p.head.api_version = 9;
    NX_CHECK_EQ(nx_predict_use(m, &p, 0, &error), NX_E_ABI);
    NX_CHECK(strstr(error.text, "version 9") != NULL);
    NX_CHECK_EQ(oracle.created, oracle.destroyed + 1);
    nx_model_close(m);
    NX_CHECK_EQ(oracle.created, oracle.destroyed);
    NX_CHECK_EQ(nx_predict_use(m, &seer, 0, &error), NX_E_CLOSED);
    close_model(m);
    NX_CHECK_EQ(oracle.created, oracle.destroyed);
}

static void what_a_predictor_answers_is_checked(void) { world_for_each(predictors); }

/* ------------------------------------------------------------ kernels */

static int tall(void *user, const nxp_matrix *m) {
    NX_CHECK(user == &oracle && NXP_HAS(m, nxp_matrix, row_bytes) && !m->rows && m->n_in == 512);
    return m->n_out > 10;
}

static void no_product(void *user, const nxp_matrix *m, const void *columns, uint64_t stride, uint32_t n_columns,
                       uint64_t begin, uint64_t end, float *y, uint64_t y_stride) {
    (void)user, (void)m, (void)columns, (void)stride, (void)n_columns, (void)begin, (void)end, (void)y, (void)y_stride;
}

static void no_column(void *user, const float *x, uint64_t n_in, void *out) { (void)user, (void)x, (void)n_in, (void)out; }

static void kernels(bool direct) {
    world_init(&here, 1, 400000, 42);
    world_manifest(&here, 30000, 10000, 100000, 0, direct);
    world_tensor(&here, "ram", 0, 4096, 512, 16, 1, 0, "tall");
    world_tensor(&here, "ram", 0, 40960, 512, 8, 1, 0, "low");
    world_tensor(&here, "ram", 0, 81920, 512, 16, 2, 0, "experts");
    world_tensor(&here, "nvme", 0, 122880, 512, 16, 1, 0, "streamed");
    nx_model *m = world_open(&here, "", 0);
    nxp_kernel k = {.head = NXP_HEAD(nxp_kernel, NXP_KERNEL, "k"), .user = &oracle, .type = "i8", .accepts = tall,
                    .multiply = no_product};
    uint32_t n;
    nx_error error = {0};
    NX_CHECK_EQ(nx_model_use_kernel(m, &k, (uint32_t[]){0, 1}, 2, &n, &error), NX_OK);
    const nx_attachment *a = nx_extent_attached(&m->extents[0]);
    NX_CHECK(n == 1 && a && a->kernel && a->kernel->multiply == no_product && !nx_extent_attached(&m->extents[1]));
    NX_CHECK(a->matrix.rows == m->extents[0].pinned && a->matrix.row_bytes == 512 && a->matrix.n_out == 16);
    for (uint32_t i = 2; i < 5; i++) { /* experts, streamed, none at all */
        NX_CHECK_EQ(nx_model_use_kernel(m, &k, &i, 1, &n, &error), NX_E_INVALID);
        NX_CHECK(strstr(error.text, i == 4 ? "there is not" : m->extents[i].name) != NULL);
    }
    nxp_kernel bad = k;
    bad.type = "q4_0";
    NX_CHECK_EQ(nx_model_use_kernel(m, &bad, (uint32_t[]){0}, 1, &n, &error), NX_E_INVALID);
    NX_CHECK(strstr(error.text, "of type q4_0, not by tall") != NULL);
    bad.type = "";
    NX_CHECK_EQ(nx_model_use_kernel(m, &bad, NULL, 0, &n, &error), NX_E_INVALID);
    bad = k;
    bad.multiply = NULL;
    NX_CHECK_EQ(nx_model_use_kernel(m, &bad, NULL, 0, &n, &error), NX_E_INVALID);
    NX_CHECK(strstr(error.text, "`multiply`") != NULL);
    bad = k;
    bad.activate = no_column;
    NX_CHECK_EQ(nx_model_use_kernel(m, &bad, NULL, 0, &n, &error), NX_E_INVALID);
    NX_CHECK(strstr(error.text, "pair of") != NULL);
    bad = k;
    bad.head.api_version = 3;
    NX_CHECK_EQ(nx_model_use_kernel(m, &bad, NULL, 0, &n, &error), NX_E_ABI);
    close_model(m);
}

static void a_kernel_gets_resident_matrices_of_its_type(void) { world_for_each(kernels); }

/* ------------------------------------------------------------ codecs */

static int decode_by(void *user, const void *stored, size_t stored_bytes, void *raw, size_t raw_bytes) {
    (void)stored, (void)stored_bytes;
    if (!user) return 9;
    memset(raw, *(const int *)user, raw_bytes);
    return 0;
}

static void a_codec_is_known_by_name_and_the_gate_keeps_it_out(void) {
    static int one = 1, two = 2;
    static nxp_codec a = {.head = NXP_HEAD(nxp_codec, NXP_CODEC, "x"), .user = &one, .decode = decode_by};
    static nxp_codec b = {.head = NXP_HEAD(nxp_codec, NXP_CODEC, "x"), .user = &two, .decode = decode_by};
    static nxp_codec bad = {.head = NXP_HEAD(nxp_codec, NXP_CODEC, "bad"), .decode = decode_by};
    uint8_t stored[] = {1, 2, 3}, raw[5];
    nx_codec codec;
    nx_error error;
    NX_CHECK(!nx_codec_find("x", &codec));
    for (int round = 0; round < 40; round++) { /* of two with one name the last one is meant, and they take no room */
        NX_CHECK_EQ(nx_codec_register(round % 2 ? &b : &a, round % 2, &error), NX_OK);
        NX_CHECK(nx_codec_find("x", &codec) && codec >= NX_CODEC_PLUGIN && nx_codec_available(codec));
        NX_CHECK_EQ(nx_codec_plugin_decode(codec, stored, 3, raw, 5), NX_OK);
        NX_CHECK(raw[0] == 1 + round % 2 && raw[4] == raw[0]);
    }
    nx_codec_gate(0); /* `b` is gated */
    NX_CHECK_EQ(nx_codec_plugin_decode(codec, stored, 3, raw, 5), NX_E_CLOSED);
    nx_codec_gate(1);
    NX_CHECK_EQ(nx_codec_plugin_decode(codec, stored, 3, raw, 5), NX_OK);
    NX_CHECK_EQ(nx_codec_register(&bad, 0, &error), NX_OK);
    NX_CHECK(nx_codec_find("bad", &codec) && strcmp(nx_codec_plugin_name(codec), "bad") == 0);
    NX_CHECK_EQ(nx_codec_plugin_decode(codec, stored, 3, raw, 5), NX_E_DAMAGED);
    nx_chunk chunk = {.hash = nx_xxh3_64(stored, 3), .stored = 3, .raw = 5, .codec = codec};
    NX_CHECK_EQ(nx_chunk_decode(&chunk, stored, raw), NX_E_DAMAGED);
    NX_CHECK(!nx_codec_available((nx_codec)(codec + 1)));
    NX_CHECK_EQ(nx_codec_plugin_decode((nx_codec)(codec + 1), stored, 3, raw, 5), NX_E_UNSUPPORTED);
    nxp_codec none = a;
    none.decode = NULL;
    NX_CHECK_EQ(nx_codec_register(&none, 0, &error), NX_E_INVALID);
    NX_CHECK(strstr(error.text, "`decode`") != NULL);
    none.head.api_version = 2;
    NX_CHECK_EQ(nx_codec_register(&none, 0, &error), NX_E_ABI);
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(a_struct_of_another_version_is_refused_in_words),
        NX_TEST(a_policy_is_asked_once_about_what_may_leave_and_its_states_end),
        NX_TEST(a_replay_is_what_the_cache_would_do),
        NX_TEST(what_a_predictor_answers_is_checked),
        NX_TEST(a_kernel_gets_resident_matrices_of_its_type),
        NX_TEST(a_codec_is_known_by_name_and_the_gate_keeps_it_out),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
