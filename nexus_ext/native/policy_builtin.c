/* policy_builtin.c: the cache policies that nexus_ext brings, in the form that plugins have (nexus_plugin.h).
 *
 * Each is a score: a pure function of what is known of a record, and the lowest leaves first. The same formulas, in
 * Python, are replayed by nexus_ext/routing/policies.py. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policy.h"

typedef double (*score_fn)(int32_t expert, uint64_t age, float frequency);

int nx_policy_lowest(score_fn score, double *scores, const nxp_cache_ask *ask, int32_t *out) {
    uint32_t n = 0; /* out[0, n) and scores[0, n): the lowest so far, lowest first, and of equals the first */
    for (uint32_t i = 0; i < ask->n_candidates; i++) {
        const double s = score(ask->experts[i], ask->ages[i], ask->frequencies[i]);
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

static double score_lru(int32_t expert, uint64_t age, float frequency) {
    (void)expert, (void)frequency;
    return -(double)age;
}

static double score_lfu(int32_t expert, uint64_t age, float frequency) {
    (void)expert;
    return frequency - 1e-9 * (double)age;
}

/* Frequency, and less of it the longer a record was not used: popular experts stay, those of a topic that
 * has passed go sooner than by their frequency alone. The 8 keeps the order of the last few tokens from
 * deciding: which expert the last one used says little. tests/bench/cache_policies.py has the comparison. */
double nx_score_lfru(int32_t expert, uint64_t age, float frequency) {
    (void)expert;
    return frequency / sqrt((double)age + 8.0) - 1e-9 * (double)age;
}

/* Experts of the graphs before this one are stale, and among them the ones that lie first in the layer go
 * first (SpecMD, arXiv 2602.03921: Least-Stale eviction). In a partition of one layer all records of the
 * last graph are equally fresh; age counts only as fresh or stale. */
static double score_least_stale(int32_t expert, uint64_t age, float frequency) {
    (void)frequency;
    return (age > 1 ? 0.0 : 1e6) + (double)expert - 1e-3 * (double)(age > 1000 ? 1000 : age);
}

/* For tests: any legal victim must do. */
static double score_random(int32_t expert, uint64_t age, float frequency) {
    static _Thread_local uint64_t state = 88172645463325252u; /* xorshift64 */
    (void)age, (void)frequency;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (double)((state ^ (uint64_t)expert) >> 11);
}

/* -- as plugins ----------------------------------------------------------------------------------- */

typedef struct ranking {
    score_fn score;
    double lowest[]; /* as many as there are slots */
} ranking;

static void *create(void *user, const nxp_cache_layer *layer) {
    ranking *r = malloc(sizeof *r + layer->n_slots * sizeof *r->lowest);
    if (r) memcpy(&r->score, user, sizeof r->score);
    return r;
}

static int victims(void *state, const nxp_cache_ask *ask, int32_t *out) {
    ranking *r = state;
    return nx_policy_lowest(r->score, r->lowest, ask, out);
}

/* `user` is data, and a function is none: hence the pointers to pointers. */
static score_fn lfru = nx_score_lfru, lru = score_lru, lfu = score_lfu, least_stale = score_least_stale,
                random_one = score_random;

#define POLICY(name, score)                                                                         \
    {.head = NXP_HEAD(nxp_cache_policy, NXP_CACHE_POLICY, name), .user = &(score), .create = create, \
     .destroy = free, .victims = victims}

const nxp_cache_policy nx_policy_lfru = POLICY("lfru", lfru);
static const nxp_cache_policy others[] = {POLICY("lru", lru), POLICY("lfu", lfu),
                                          POLICY("least-stale", least_stale), POLICY("random", random_one)};

const nxp_cache_policy *nx_cache_builtin(const char *name) {
    if (strcmp(name, nx_policy_lfru.head.name) == 0) return &nx_policy_lfru;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (strcmp(name, others[i].head.name) == 0) return &others[i];
    return NULL;
}
