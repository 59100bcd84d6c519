/* policy_adaptive.c: the default cache policy: by recency or by rates of use, whichever has missed less of late.
 *
 * Rates. For each expert of a layer and each of six spans of the past (half-lives of 4 to 4096 graphs) there is a rate:
 * uses, decayed, scaled to uses a graph. They count whether an expert is cached or not: what was popular before it was
 * evicted is known to be popular when it comes back. Which span is right depends on the text: a long one where the same
 * experts are popular throughout, a short one where topics change. So an expert's score is a mixture of its rates,
 * whose weights follow by Bayes' rule how likely each span made the experts that were used; after each graph a part of
 * all weights is shared out evenly, so that a span that was bad for long can still become good (Herbster and Warmuth,
 * "Tracking the Best Expert", 1998: fixed share). A graph is judged by the rates of LAG graphs before: what is evicted
 * now should be what is not needed for a while, not only by the next token.
 *
 * Recency. Where popularity changes all at once, rates of any span lag behind plain LRU. So there are two shadows of
 * the layer's cache, lists of experts without their bytes, one that evicts by each: the one that has missed less in the
 * last hundred graphs or so decides what the real cache evicts, LRU when they are about equal (set duelling with full
 * shadows: Qureshi et al., "Adaptive Insertion Policies for High Performance Caching", 2007). The shadows keep the
 * slots that the cache was given first, also while it has fewer.
 *
 * All is of one layer, and one thread at a time comes here: nothing to lock. Nothing is allocated after `create`. */
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "policy.h"

#define SPANS 6
#define LAG 4         /* graphs */
#define LEARNING 2.0  /* how much one graph says; 1 would be Bayes' rule */
#define SHARE 0.01    /* of all weights, shared out after each graph */
#define SURPRISE 0.05 /* of the uses are expected anywhere: no rate is 0 */
#define KEPT 0.994599423484 /* of a shadow's misses, after each graph: half of them after 128 */
#define LEAD 0.01     /* of the uses: by so many fewer misses do rates take over from recency */

static const double half_life[SPANS] = {4, 16, 64, 256, 1024, 4096}; /* graphs */

enum { RECENCY, RATES, N_RIVALS };

typedef struct shadow {
    uint8_t *held; /* [n_experts] */
    uint32_t n_held;
    double misses; /* decayed */
} shadow;

typedef struct adaptive {
    uint32_t n_experts, n_slots;
    uint64_t n_graphs; /* seen */
    float decay[SPANS];
    double left[SPANS]; /* what decay would have left, LAG graphs ago, of a use before the first graph */
    double weight[SPANS];
    float *uses;        /* [SPANS][n_experts], decayed */
    float *past;        /* [LAG][SPANS][n_experts]: `uses` after each of the last graphs */
    float *rate;        /* [n_experts]: the mixture */
    uint64_t *last_use; /* [n_experts]: graphs seen by then, 0: never */
    double *scores;     /* [n_experts], of an answer */
    shadow rival[N_RIVALS];
    double asked; /* uses, decayed as misses are */
    int leader;
} adaptive;

static void destroy(void *state) {
    adaptive *a = state;
    for (int r = 0; r < N_RIVALS; r++) free(a->rival[r].held);
    free(a->uses);
    free(a->past);
    free(a->rate);
    free(a->last_use);
    free(a->scores);
    free(a);
}

static void *create(void *user, const nxp_cache_layer *layer) {
    (void)user;
    const size_t n = layer->n_experts;
    adaptive *a = calloc(1, sizeof *a);
    if (!a) return NULL;
    a->n_experts = layer->n_experts;
    a->n_slots = layer->n_slots;
    a->uses = calloc(SPANS * n, sizeof *a->uses);
    a->past = calloc(LAG * SPANS * n, sizeof *a->past);
    a->rate = calloc(n, sizeof *a->rate);
    a->last_use = calloc(n, sizeof *a->last_use);
    a->scores = malloc(n * sizeof *a->scores);
    bool there = a->uses && a->past && a->rate && a->last_use && a->scores;
    for (int r = 0; r < N_RIVALS; r++) there &= (a->rival[r].held = calloc(n, 1)) != NULL;
    if (!there) {
        destroy(a);
        return NULL;
    }
    for (int k = 0; k < SPANS; k++) {
        a->decay[k] = (float)exp2(-1.0 / half_life[k]);
        a->weight[k] = 1.0 / SPANS;
        a->left[k] = 1.0;
    }
    return a;
}

/* By how likely the rates of LAG graphs ago made these experts. */
static void learn(adaptive *a, const nxp_cache_use *use, const float *then) {
    const double anywhere = SURPRISE * use->n_experts / a->n_experts;
    double likelihood[SPANS], best = -INFINITY, sum = 0;
    for (int k = 0; k < SPANS; k++) {
        const float *uses = then + (size_t)k * a->n_experts;
        a->left[k] *= a->decay[k];
        /* As many uses a graph as there were, also while few graphs have been seen. */
        const double scale = (1 - SURPRISE) * (1 - a->decay[k]) / (1 - a->left[k]);
        double log_of_all = 0, product = 1; /* one logarithm for many factors */
        for (uint32_t i = 0; i < use->n_experts; i++) {
            product *= scale * uses[use->experts[i]] + anywhere;
            if (product > 1e-250) continue;
            log_of_all += log(product);
            product = 1;
        }
        likelihood[k] = LEARNING * (log_of_all + log(product)) / use->n_experts;
        if (likelihood[k] > best) best = likelihood[k];
    }
    for (int k = 0; k < SPANS; k++) sum += a->weight[k] *= exp(likelihood[k] - best);
    for (int k = 0; k < SPANS; k++) a->weight[k] = (1 - SHARE) * a->weight[k] / sum + SHARE / SPANS;
}

static void count(adaptive *a, const nxp_cache_use *use) {
    const size_t n = a->n_experts, all = SPANS * n;
    float *then = a->past + a->n_graphs % LAG * all;
    if (a->n_graphs >= LAG) learn(a, use, then);
    memset(a->rate, 0, n * sizeof *a->rate);
    for (int k = 0; k < SPANS; k++) {
        float *restrict uses = a->uses + (size_t)k * n, *restrict rate = a->rate;
        const float decay = a->decay[k], share = (float)a->weight[k] * (1 - decay);
        for (size_t e = 0; e < n; e++) uses[e] *= decay;
        for (uint32_t i = 0; i < use->n_experts; i++) uses[use->experts[i]] += 1.0f;
        for (size_t e = 0; e < n; e++) rate[e] += share * uses[e];
    }
    memcpy(then, a->uses, all * sizeof *then);
    a->n_graphs++;
    for (uint32_t i = 0; i < use->n_experts; i++) a->last_use[use->experts[i]] = a->n_graphs;
}

/* What the shadow gives up, or n_experts: all that it holds is used by this graph. */
static uint32_t lowest(const adaptive *a, int rival) {
    const shadow *s = &a->rival[rival];
    uint32_t found = a->n_experts;
    for (uint32_t e = 0; e < a->n_experts; e++) {
        if (!s->held[e] || a->last_use[e] == a->n_graphs) continue;
        if (found == a->n_experts ||
            (rival == RECENCY ? a->last_use[e] < a->last_use[found] : a->rate[e] < a->rate[found]))
            found = e;
    }
    return found;
}

static void serve(adaptive *a, int rival, const nxp_cache_use *use) {
    shadow *s = &a->rival[rival];
    s->misses *= KEPT;
    for (uint32_t i = 0; i < use->n_experts; i++) {
        const int32_t expert = use->experts[i];
        if (s->held[expert]) continue;
        s->misses += 1;
        if (s->n_held == a->n_slots) {
            const uint32_t out = lowest(a, rival);
            if (out == a->n_experts) continue;
            s->held[out] = 0;
            s->n_held--;
        }
        s->held[expert] = 1;
        s->n_held++;
    }
}

static void used(void *state, const nxp_cache_use *use) {
    adaptive *a = state;
    if (!use->n_experts) return;
    count(a, use);
    a->asked = a->asked * KEPT + use->n_experts;
    for (int r = 0; r < N_RIVALS; r++) serve(a, r, use);
    const double fewer = a->rival[RECENCY].misses - a->rival[RATES].misses;
    if (fewer > LEAD * a->asked) a->leader = RATES;
    else if (fewer < 0) a->leader = RECENCY;
}

static double by_recency(const void *state, int32_t expert, uint64_t age, float frequency) {
    (void)state, (void)expert, (void)frequency;
    return -(double)age;
}

static double by_rate(const void *state, int32_t expert, uint64_t age, float frequency) {
    const adaptive *a = state;
    (void)frequency;
    return (double)a->rate[expert] - 1e-12 * (double)age; /* of equals the one that was not used for longer */
}

static int victims(void *state, const nxp_cache_ask *ask, int32_t *out) {
    adaptive *a = state;
    return nx_policy_lowest(a->leader == RATES ? by_rate : by_recency, a, a->scores, ask, out);
}

const nxp_cache_policy nx_policy_adaptive = {.head = NXP_HEAD(nxp_cache_policy, NXP_CACHE_POLICY, "adaptive"),
                                             .create = create, .destroy = destroy, .used = used, .victims = victims};
