/* policy.h: the plugins of a model as the cache and the prediction know them. Not installed. */
#ifndef NEXUS_POLICY_INTERNAL_H
#define NEXUS_POLICY_INTERNAL_H

#include <stdbool.h>

#include "nexus_policy.h"

/* A plugin that decides, and is watched: only the holder of the turn calls it. */
typedef struct nx_plugin {
    nx_plugin_info info; /* name, disabled, why: under the model's lock; counters: atomic */
    bool failed;         /* `disabled`, as the holder of the turn sees it */
} nx_plugin;

typedef struct nx_policy {
    nxp_cache_policy table; /* what the plugin filled in; its states are in the groups */
    nx_plugin plugin;
    /* Room for one question and its answer, for the largest group. */
    int32_t *experts, *slots, *victims, *absent, *taken;
    uint64_t *ages;
    float *frequencies;
    uint8_t *hit;
    double *scores; /* of the built-in that takes over */
} nx_policy;

typedef struct nx_predict_plugin {
    nxp_predictor table;
    nx_plugin plugin;
    void *state;
    int32_t *out;
    uint8_t *seen;
    uint32_t n_experts; /* most of a layer */
} nx_predict_plugin;

/* Take over what the plugin filled in of a struct of `size` bytes, of which it needs `least`. NX_E_ABI, with a sentence
 * that names the plugin, the versions and the remedy. */
nx_status nx_plugin_take(const nxp_head *from, uint32_t kind, const char *what, size_t least, void *to, size_t size,
                         nx_plugin *, nx_error *);
/* It has failed: the built-in takes over. */
void nx_plugin_disable(nx_model *, nx_plugin *, const char *format, ...) __attribute__((format(printf, 3, 4)));
void nx_plugin_count(nx_plugin *, uint64_t begin_ns);
void nx_plugin_get(nx_model *, const nx_plugin *, nx_plugin_info *out);
/* The turn for somebody who computes nothing: a model that is being loaded stays as if nothing had run. */
nx_status nx_turn_borrow(nx_model *);

/* What is left of a frequency after so many graphs. */
float nx_frequency_after(float frequency, uint64_t age);

/* policy_builtin.c */
typedef double (*nx_score)(const void *state, int32_t expert, uint64_t age, float frequency);
/* The candidates with the lowest scores; `scores` has room for n_wanted of them. */
int nx_policy_lowest(nx_score, const void *state, double *scores, const nxp_cache_ask *, int32_t *out);
double nx_score_lfru(const void *state, int32_t expert, uint64_t age, float frequency);

/* policy_adaptive.c: the default */
extern const nxp_cache_policy nx_policy_adaptive;

/* policy.c */
nx_status nx_policy_init(nx_model *, nx_error *);
void nx_policy_free(nx_model *);
/* Nothing of any plugin is called after this. With the turn, or alone. */
void nx_policy_end(nx_model *);
/* A graph asks for these. */
void nx_policy_used(nx_group *, const int32_t *experts, size_t n);
/* Slots for up to n new records: empty ones, then those whose records the policy gives up. Returns how many; 0: all are
 * in use or still being read. */
size_t nx_policy_slots(nx_group *, nxp_cache_reason, const int32_t *incoming, size_t n, int32_t *slots);

/* predict_plugin.c */
void nx_predict_plugin_end(nx_model *);
void nx_predict_plugin_free(nx_model *);

#endif
