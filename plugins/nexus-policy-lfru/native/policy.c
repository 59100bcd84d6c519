/* policy.c: evict the expert that is least likely to be used in the near future, by how often each was used over
 * several spans of the past, weighted by how well each span has told the future so far.
 *
 * For each expert of a layer and each of six spans (half-lives from 4 to 4096 graphs) there is a rate: uses, decayed by
 * half every half-life, scaled to uses a graph. Unlike the frequencies that nexus_ext keeps, these also count while an
 * expert is not in the cache: what was popular before it was evicted is known to be popular when it comes back.
 *
 * Which span is right depends on the text: a long one where the same experts are popular throughout, a short one where
 * topics change. So the score is a mixture of the rates, and the weights follow by Bayes' rule how likely each span
 * made the experts that were used. Each graph is scored by the rates of LAG graphs before, since an expert that is
 * evicted now should be one that is not needed for a while, not just by the next token. After each graph a part of all
 * weights is shared out evenly, so that a span that was bad for long can still become good (Herbster and Warmuth,
 * "Tracking the Best Expert", 1998: fixed share).
 *
 * All is of one layer, so that there is nothing to lock. Nothing is allocated after `create`. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <nexus_plugin.h>

#define SPANS 6
#define LAG 8         /* graphs; a power of two */
#define LEARNING 2.0  /* how much one graph says; 1 would be Bayes' rule */
#define SHARE 0.01    /* of all weights, shared out after each graph */
#define SURPRISE 0.05 /* of the uses are expected anywhere: no rate is 0 */

static const double half_life[SPANS] = {4, 16, 64, 256, 1024, 4096}; /* graphs */

typedef struct layer {
    uint32_t n_experts;
    float decay[SPANS];
    uint64_t n_graphs; /* seen */
    double weight[SPANS];
    double left[SPANS]; /* what decay would have left, LAG graphs ago, of a use before the first graph */
    float *uses;  /* [SPANS][n_experts], decayed */
    float *past;  /* [LAG][SPANS][n_experts]: `uses` after each of the last graphs */
    double *score; /* [n_experts] */
} layer;

static void destroy(void *state) {
    layer *l = state;
    free(l->uses);
    free(l->past);
    free(l->score);
    free(l);
}

static void *create(void *user, const nxp_cache_layer *of) {
    (void)user;
    layer *l = calloc(1, sizeof *l);
    if (!l) return NULL;
    const size_t n = of->n_experts;
    l->n_experts = of->n_experts;
    l->uses = calloc(SPANS * n, sizeof *l->uses);
    l->past = calloc(LAG * SPANS * n, sizeof *l->past);
    l->score = calloc(n, sizeof *l->score);
    if (!l->uses || !l->past || !l->score) {
        destroy(l);
        return NULL;
    }
    for (int k = 0; k < SPANS; k++) {
        l->decay[k] = (float)exp2(-1.0 / half_life[k]);
        l->weight[k] = 1.0 / SPANS;
        l->left[k] = 1.0;
    }
    return l;
}

/* By how likely the rates of LAG graphs ago made these experts. */
static void learn(layer *l, const nxp_cache_use *use, const float *then) {
    const double anywhere = SURPRISE * use->n_experts / l->n_experts;
    double likelihood[SPANS], best = -INFINITY, sum = 0;
    for (int k = 0; k < SPANS; k++) {
        l->left[k] *= l->decay[k];
        /* As many uses a graph as there were, also while few graphs have been seen. */
        const double scale = (1 - SURPRISE) * (1 - l->decay[k]) / (1 - l->left[k]);
        double log_of_all = 0;
        for (uint32_t i = 0; i < use->n_experts; i++)
            log_of_all += log(scale * then[(size_t)k * l->n_experts + (uint32_t)use->experts[i]] + anywhere);
        likelihood[k] = LEARNING * log_of_all / use->n_experts;
        if (likelihood[k] > best) best = likelihood[k];
    }
    for (int k = 0; k < SPANS; k++) sum += l->weight[k] *= exp(likelihood[k] - best);
    for (int k = 0; k < SPANS; k++) l->weight[k] = (1 - SHARE) * l->weight[k] / sum + SHARE / SPANS;
}

static void used(void *state, const nxp_cache_use *use) {
    layer *l = state;
    const size_t n = l->n_experts, all = SPANS * n;
    float *then = l->past + l->n_graphs % LAG * all;
    if (l->n_graphs >= LAG) learn(l, use, then);
    for (int k = 0; k < SPANS; k++) {
        float *uses = l->uses + (size_t)k * n;
        for (size_t e = 0; e < n; e++) uses[e] *= l->decay[k];
        for (uint32_t i = 0; i < use->n_experts; i++) uses[use->experts[i]] += 1.0f;
    }
    memcpy(then, l->uses, all * sizeof *then);
    l->n_graphs++;
}

static int victims(void *state, const nxp_cache_ask *ask, int32_t *out) {
    layer *l = state;
    double scale[SPANS];
    for (int k = 0; k < SPANS; k++) scale[k] = l->weight[k] * (1 - l->decay[k]);
    uint32_t n = 0; /* out[0, n): lowest so far, in order */
    for (uint32_t i = 0; i < ask->n_candidates; i++) {
        const int32_t e = ask->experts[i];
        double score = -1e-12 * (double)ask->ages[i]; /* of equals the one that was not used for longer */
        for (int k = 0; k < SPANS; k++) score += scale[k] * l->uses[(size_t)k * l->n_experts + (uint32_t)e];
        l->score[e] = score;
        if (n == ask->n_wanted && !(score < l->score[out[n - 1]])) continue;
        uint32_t at = n < ask->n_wanted ? n++ : n - 1;
        for (; at > 0 && score < l->score[out[at - 1]]; at--) out[at] = out[at - 1];
        out[at] = e;
    }
    return 0;
}

__attribute__((visibility("default"))) const nxp_cache_policy nexus_policy_lfru = {
    .head = NXP_HEAD(nxp_cache_policy, NXP_CACHE_POLICY, "lfru-history"),
    .create = create,
    .destroy = destroy,
    .used = used,
    .victims = victims,
};
