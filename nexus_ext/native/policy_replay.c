/* policy_replay.c: what a cache would do with a trace: the cache itself, with records that are never read. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "predict.h"

static bool is_token(const int32_t *experts, size_t n_used, uint32_t n_experts, uint32_t n_slots, size_t *n) {
    *n = 0;
    for (size_t k = 0; k < n_used; k++) {
        if (experts[k] >= 0 && (uint32_t)experts[k] >= n_experts) return false;
        *n += experts[k] >= 0;
    }
    return *n <= n_slots;
}

static nx_status serve(nx_group *g, const int32_t *used, size_t n_tokens, size_t n_used, int32_t *token,
                       uint64_t *misses, nx_error *error) {
    for (size_t t = 0; t < n_tokens; t++, used += n_used) {
        size_t n, n_missing, at = 0;
        if (!is_token(used, n_used, g->n_experts, g->n_slots, &n)) {
            nx_error_set(error, NX_E_INVALID, 0, "token %zu of the trace uses an expert that there is not, or more than "
                         "the %u that have a slot", t, g->n_slots);
            return NX_E_INVALID;
        }
        for (size_t k = 0; k < n_used; k++)
            if (used[k] >= 0) token[at++] = used[k];
        if (!n) continue;
        const nx_status status = nx_cache_hold(g, token, n, &n_missing);
        if (status != NX_OK) return status;
        for (size_t k = 0; k < n; k++) g->records[g->slot_of[token[k]]].in_use = 0;
        *misses += n_missing;
    }
    return NX_OK;
}

nx_status nx_cache_replay(const nxp_cache_policy *policy, uint32_t layer, uint32_t n_experts, uint32_t n_slots,
                          const int32_t *used, size_t n_tokens, size_t n_used, uint64_t *misses, nx_plugin_info *info,
                          nx_error *error) {
    nx_model *m = calloc(1, sizeof *m);
    nx_group *g = calloc(1, sizeof *g);
    int32_t *token = malloc((n_used + 1) * sizeof *token);
    nx_status status = m && g && token ? NX_OK : NX_E_NOMEM;
    *misses = 0;
    if (status == NX_OK) {
        *g = (nx_group){.model = m, .n_experts = n_experts, .n_slots = n_slots, .layer = layer};
        g->records = calloc(n_slots + 1, sizeof *g->records);
        g->slot_of = malloc((n_experts + 1) * sizeof *g->slot_of);
        pthread_mutex_init(&m->lock, NULL);
        pthread_cond_init(&m->turn_free, NULL);
        m->groups = g;
        m->n_groups = 1;
        status = g->records && g->slot_of ? nx_policy_init(m, error) : NX_E_NOMEM;
        if (status == NX_OK) status = nx_cache_use_policy(m, policy, error);
        if (status == NX_OK) {
            for (uint32_t e = 0; e < n_experts; e++) g->slot_of[e] = -1;
            for (uint32_t s = 0; s < n_slots; s++) g->records[s].expert = -1;
            status = serve(g, used, n_tokens, n_used, token, misses, error);
            if (info) nx_cache_policy_get(m, info);
        }
        nx_policy_free(m);
        pthread_cond_destroy(&m->turn_free);
        pthread_mutex_destroy(&m->lock);
        free(g->records);
        free(g->slot_of);
    }
    if (status == NX_E_NOMEM && !(m && g && token))
        nx_error_set(error, status, ENOMEM, "no memory to replay %zu tokens", n_tokens);
    free(token);
    free(g);
    free(m);
    return status;
}
