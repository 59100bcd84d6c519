/* policy_builtin.c: the cache policies that nexus_ext brings, in the form that plugins have (nexus_plugin.h).
 *
 * Those of this file are scores: pure functions of what is known of a record, and the lowest leaves first. The same
 * formulas, in Python, are replayed by nexus_ext/routing/policies.py. The default learns: policy_adaptive.c. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policy.h"

int nx_policy_lowest(nx_score score, const void *state, double *scores, const nxp_cache_ask *ask, int32_t *out) {
    uint32_t n = 0; /* out[0, n) and scores[0, n): the lowest so far, lowest first, and of equals the first */
    for (uint32_t i = 0; i < ask->n_candidates; i++) {
        const double s = score(state, ask->experts[i], ask->ages[i], ask->frequencies[i]);
        if (n == ask->n_wanted && !(s < scores[n - 1])) continue;
        uint32_t at = n < ask->n_wanted ? n++ : n - 1;
        for (; at > 0 && s < scores[at - 1]; at--) {
            scores[at] = scores[at - 1];
            out[at] = out[at - 1];
        }
        scores[at] = s;
        out[at] = ask->experts[i];
    }
    return 0;
}

/* -- scores --------------------------------------------------------------------------------------- */

static double score_lru(const void *state, int32_t expert, uint64_t age, float frequency) {
    (void)state, (void)expert, (void)frequency;
    return -(double)age;
}

static double score_lfu(const void *state, int32_t expert, uint64_t age, float frequency) {
    (void)state, (void)expert;
    return frequency - 1e-9 * (double)age;
}

/* Frequency, and less of it the longer a record was not used: popular experts stay, those of a topic that
 * has passed go sooner than by their frequency alone. The 8 keeps the order of the last few tokens from
 * deciding: which expert the last one used says little. tests/bench/cache_policies.py has the comparison. */
double nx_score_lfru(const void *state, int32_t expert, uint64_t age, float frequency) {
    (void)state, (void)expert;
    return frequency / sqrt((double)age + 8.0) - 1e-9 * (double)age;
}

/* Experts of the graphs before this one are stale, and among them the ones that lie first in the layer go
 * first (SpecMD, arXiv 2602.03921: Least-Stale eviction). In a partition of one layer all records of the
 * last graph are equally fresh; age counts only as fresh or stale. */
static double score_least_stale(const void *state, int32_t expert, uint64_t age, float frequency) {
    (void)state, (void)frequency;
    return (age > 1 ? 0.0 : 1e6) + (double)expert - 1e-3 * (double)(age > 1000 ? 1000 : age);
}

/* For tests: any legal victim must do. */
static double score_random(const void *state, int32_t expert, uint64_t age, float frequency) {
    static _Thread_local uint64_t bits = 88172645463325252u; /* xorshift64 */
    (void)state, (void)age, (void)frequency;
    bits ^= bits << 13;
    bits ^= bits >> 7;
    bits ^= bits << 17;
    return (double)((bits ^ (uint64_t)expert) >> 11);
}

/* -- as plugins ----------------------------------------------------------------------------------- */

typedef struct ranking {
    nx_score score;
    double lowest[]; /* as many as there are slots */
} ranking;

static void *create(void *user, const nxp_cache_layer *layer) {
    ranking *r = malloc(sizeof *r + layer->n_slots * sizeof *r->lowest);
    if (r) memcpy(&r->score, user, sizeof r->score);
    return r;
}

static int victims(void *state, const nxp_cache_ask *ask, int32_t *out) {
    ranking *r = state;
    return nx_policy_lowest(r->score, NULL, r->lowest, ask, out);
}

/* `user` is data, and a function is none: hence the pointers to pointers. */
static nx_score lfru = nx_score_lfru, lru = score_lru, lfu = score_lfu, least_stale = score_least_stale,
                random_one = score_random;

#define POLICY(name, score)                                                                         \
    {.head = NXP_HEAD(nxp_cache_policy, NXP_CACHE_POLICY, name), .user = &(score), .create = create, \
     .destroy = free, .victims = victims}

static const nxp_cache_policy scored[] = {POLICY("lfru", lfru), POLICY("lru", lru), POLICY("lfu", lfu),
                                          POLICY("least-stale", least_stale), POLICY("random", random_one)};

const nxp_cache_policy *nx_cache_builtin(const char *name) {
    if (strcmp(name, nx_policy_adaptive.head.name) == 0) return &nx_policy_adaptive;
    for (size_t i = 0; i < sizeof scored / sizeof *scored; i++)
        if (strcmp(name, scored[i].head.name) == 0) return &scored[i];
    return NULL;
}
