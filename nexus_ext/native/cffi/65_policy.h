#include "nexus_policy.h"

#define NXP_API_VERSION ...
#define NXP_CACHE_POLICY ...
#define NXP_PREDICTOR ...
#define NXP_CODEC ...

typedef struct {
    uint32_t struct_size, api_version, kind, flags;
    const char *name;
} nxp_head;

typedef struct {
    uint32_t layer, n_layers;
    uint32_t n_experts;
    uint32_t n_slots;
    uint64_t record_bytes;
    ...;
} nxp_cache_layer;

typedef struct {
    uint32_t n_experts;
    uint64_t clock;
    const int32_t *experts;
    const uint8_t *hit;
    ...;
} nxp_cache_use;

typedef struct {
    uint32_t reason;
    uint32_t n_wanted;
    uint32_t n_candidates;
    uint64_t clock;
    const int32_t *experts;
    const uint64_t *ages;
    const float *frequencies;
    const int32_t *incoming;
    ...;
} nxp_cache_ask;

typedef struct {
    nxp_head head;
    void *user;
    void *(*create)(void *, const nxp_cache_layer *);
    void (*destroy)(void *);
    void (*used)(void *, const nxp_cache_use *);
    int (*victims)(void *, const nxp_cache_ask *, int32_t *);
} nxp_cache_policy;

typedef struct {
    uint32_t n_layers;
    const uint32_t *n_experts;
    const uint32_t *n_slots;
    ...;
} nxp_layers;

typedef struct {
    uint32_t layer, n_tokens, n_used;
    const int32_t *experts;
    ...;
} nxp_routed;

typedef struct {
    uint32_t layer, n_tokens, n_used, capacity, limit;
    ...;
} nxp_predict_ask;

typedef struct {
    nxp_head head;
    void *user;
    void *(*create)(void *, const nxp_layers *);
    void (*destroy)(void *);
    void (*routed)(void *, const nxp_routed *);
    int32_t (*predict)(void *, const nxp_predict_ask *, int32_t *);
} nxp_predictor;

typedef struct {
    char name[64];
    int disabled;
    char why[256];
    uint64_t calls, ns;
} nx_plugin_info;

typedef struct {
    nxp_head head;
    void *user;
    int (*decode)(void *, const void *, size_t, void *, size_t);
} nxp_codec;

typedef struct {
    nxp_head head;
    const char *type;
    ...;
} nxp_kernel;

const nxp_cache_policy *nx_cache_builtin(const char *name);
nx_status nx_cache_use_policy(nx_model *, const nxp_cache_policy *, nx_error *error);
void nx_cache_policy_get(nx_model *, nx_plugin_info *out);
nx_status nx_predict_use(nx_model *, const nxp_predictor *, int automatic, nx_error *error);
void nx_predict_plugin_get(nx_model *, nx_plugin_info *out);
nx_status nx_cache_replay(const nxp_cache_policy *, uint32_t layer, uint32_t n_experts, uint32_t n_slots,
                          const int32_t *used, size_t n_tokens, size_t n_used, uint64_t *misses,
                          nx_plugin_info *info, nx_error *error);

nx_status nx_codec_register(const nxp_codec *, int gated, nx_error *error);
void nx_codec_gate(int open);
nx_status nx_model_use_kernel(nx_model *, const nxp_kernel *, const uint32_t *extents, size_t n,
                              uint32_t *n_taken, nx_error *error);
nx_status nx_kernel_check(const nxp_kernel *, nxp_kernel *out, nx_error *error);
typedef struct nx_extent nx_extent;
nx_extent *nx_model_extent(nx_model *, size_t index);
nx_status nx_model_read(nx_model *, const nx_extent *, uint64_t offset, void *dst, uint64_t nbytes);

extern "Python" void *nx_python_cache_create(void *, const nxp_cache_layer *);
extern "Python" void nx_python_cache_used(void *, const nxp_cache_use *);
extern "Python" int nx_python_cache_victims(void *, const nxp_cache_ask *, int32_t *);
extern "Python" void nx_python_routed(void *, const nxp_routed *);
extern "Python" int32_t nx_python_predict(void *, const nxp_predict_ask *, int32_t *);
extern "Python" int nx_python_decode(void *, const void *, size_t, void *, size_t);
