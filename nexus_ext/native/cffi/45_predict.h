#include "nexus_predict.h"

typedef enum {
    NX_CONTROL_FIXED, NX_CONTROL_WATCHING, NX_CONTROL_NO_STALL, NX_CONTROL_NO_IDLE, NX_CONTROL_TRYING,
    NX_CONTROL_SLOWER, NX_CONTROL_FASTER, ...
} nx_control_state;

typedef struct {
    nx_control_state state;
    int on;
    uint64_t trials, switches;
    double idle, stall;
    double on_ns, off_ns;
} nx_prediction;

nx_status nx_predict_set(nx_model *, const char *predictor);
void nx_predict_get(nx_model *, nx_prediction *out);
uint32_t nx_model_n_groups(const nx_model *);
uint32_t nx_group_experts(const nx_model *, uint32_t group, uint32_t *extent);
void nx_popularity_get(nx_model *, uint32_t group, uint64_t *counts);
void nx_popularity_set(nx_model *, uint32_t group, const uint64_t *counts);
int nx_cache_preload(nx_model *, uint64_t ns);
