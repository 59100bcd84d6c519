/* nexus_policy.h: plugins in C (nexus_plugin.h) that a model was given, and the built-ins in the same form. */
#ifndef NEXUS_POLICY_H
#define NEXUS_POLICY_H

#include "nexus_core.h"
#include "nexus_plugin.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A plugin in use, and what became of it. */
typedef struct nx_plugin_info {
    char name[64];
    int disabled;
    char why[256];      /* it was disabled; "" while it is not */
    uint64_t calls, ns; /* of its functions, and what they took */
} nx_plugin_info;

/* The built-in of this name ("adaptive", "lfru", "lru", "lfu", "least-stale", "random"), or NULL. */
NX_API const nxp_cache_policy *nx_cache_builtin(const char *name);
/* Evict what this policy says, from the next graph on: waits for the one that runs. Its code stays where it is until
 * nx_model_close has returned. NX_E_ABI: the struct is not one of this version, in words in `error`; NX_E_INVALID: it
 * lacks a function; NX_E_NOMEM: it could not set itself up. The policy before stays in use then. */
NX_API nx_status nx_cache_use_policy(nx_model *, const nxp_cache_policy *, nx_error *error);
NX_API void nx_cache_policy_get(nx_model *, nx_plugin_info *out);

/* Predict experts by this plugin: always, or (`automatic`) while it is measured to help. As above. */
NX_API nx_status nx_predict_use(nx_model *, const nxp_predictor *, int automatic, nx_error *error);
NX_API void nx_predict_plugin_get(nx_model *, nx_plugin_info *out);

/* What a cache of one layer would do with a trace: `used` has n_used numbers for each token, -1 where there are fewer;
 * none twice. As the cache itself does it when tokens are computed one at a time. NX_E_INVALID: more experts a token
 * than slots, or a number that is none. `info` (may be NULL): what became of the policy. */
NX_API nx_status nx_cache_replay(const nxp_cache_policy *, uint32_t layer, uint32_t n_experts, uint32_t n_slots,
                                 const int32_t *used, size_t n_tokens, size_t n_used, uint64_t *misses,
                                 nx_plugin_info *info, nx_error *error);

/* Let chunks of NXF files be decoded by this codec, in the models that are opened from now on; of two with one name the
 * one that was registered last, which may be the first one again. It stays where it is until the process ends. `gated`: nobody goes in while the gate is shut. NX_E_ABI,
 * NX_E_INVALID as above; NX_E_NOMEM: there are too many. */
NX_API nx_status nx_codec_register(const nxp_codec *, int gated, nx_error *error);
/* Open the gate, or shut it and wait until nobody is inside: for codecs in Python, when the interpreter ends. */
NX_API void nx_codec_gate(int open);

/* Have products with these extents (their numbers) computed by this kernel, those of them that it accepts: how many is
 * in *n_taken. Before the model's first graph; the struct and its code stay until the model is freed. NX_E_ABI and
 * NX_E_INVALID as above, NX_E_INVALID also for an extent that is no resident matrix of its type. */
NX_API nx_status nx_model_use_kernel(nx_model *, const nxp_kernel *, const uint32_t *extents, size_t n,
                                     uint32_t *n_taken, nx_error *error);
/* Copy what the kernel has of the fields that are known here. */
NX_API nx_status nx_kernel_check(const nxp_kernel *, nxp_kernel *out, nx_error *error);

#ifdef __cplusplus
}
#endif
#endif
