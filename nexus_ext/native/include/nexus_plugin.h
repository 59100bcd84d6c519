/* nexus_plugin.h: what a plugin writes in C, for decisions that are taken while tokens are computed.
 *
 * Self-contained: C11 or C++, nothing of nexus_ext is linked. A plugin fills in one of the structs below, in static
 * memory, and hands its address to Python (plugins/docs/c-policies.md has a complete example):
 *
 *     nxp_cache_policy   which expert leaves the cache             hook nexus_cache_policy
 *     nxp_predictor      which experts are read ahead              hook nexus_expert_predictor
 *     nxp_codec          how chunks of an NXF file are decoded     hook nexus_codec
 *     nxp_kernel         products with weights of one type         hook nexus_kernel_provider
 *
 * Find this file with nexus_ext.get_include().
 *
 * VERSIONS. Every struct begins with nxp_head. `struct_size` is what the plugin was compiled with: the core takes no
 * field beyond it, and treats what is missing as 0. So fields are only ever added at the end, and a plugin that was
 * compiled with an older header of the same api_version goes on working, as does one compiled with a newer header.
 * Structs that the core hands to a plugin begin with `struct_size` as well: a field is there if it lies below it
 * (NXP_HAS). `api_version` changes when that is not enough, and then the core refuses the plugin in words.
 *
 * RESULTS NEVER DEPEND on a cache policy or a predictor: they choose what is read when. What they return is checked.
 * An answer that is none (an expert that is in use, one that there is not, the same one twice) or a failure disables
 * the plugin for this model: the built-in takes over in the same instant, and statistics name the plugin and why. A
 * codec or a kernel does make results: see there.
 *
 * THREADS. `create`, `destroy` and everything that gets a `state` are called by one thread at a time for each state,
 * not always by the same one. Different models have different states, and are served at the same time: static
 * variables that change need a lock or atomics. All of them may allocate, and should not block: a graph waits for
 * them. They may not call Python (unless they take its lock themselves), nor throw, nor longjmp.
 *
 * LIFETIME. The struct, and the code that it points to, must stay where they are until the process ends or what keeps
 * them (NativePolicy.keepalive) is let go by nexus_ext. Arrays that are handed in are valid during the call only.
 *
 * UNITS. Memory in bytes. The clock of a cache counts graphs: one for each decoded token, one for each micro-batch of a
 * prompt. Layers are counted from 0, and only those that have a cache of experts; experts from 0 within a layer.
 */
#ifndef NEXUS_PLUGIN_H
#define NEXUS_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define NXP_API_VERSION 1u

/* Says which struct it is, so that one cannot be taken for another. */
#define NXP_CACHE_POLICY 0x4e584350u /* "NXCP" */
#define NXP_PREDICTOR 0x4e585052u    /* "NXPR" */
#define NXP_CODEC 0x4e58434fu        /* "NXCO" */
#define NXP_KERNEL 0x4e584b45u       /* "NXKE" */

typedef struct nxp_head {
    uint32_t struct_size; /* sizeof the whole struct that begins with this */
    uint32_t api_version; /* NXP_API_VERSION */
    uint32_t kind;        /* NXP_CACHE_POLICY, ... */
    uint32_t flags;       /* 0 */
    const char *name;     /* UTF-8, at most 63 bytes; what statistics and errors call it */
} nxp_head;

/* As the first initializer of a struct: NXP_HEAD(nxp_cache_policy, NXP_CACHE_POLICY, "my-policy") */
#define NXP_HEAD(type, kind, name) {sizeof(type), NXP_API_VERSION, kind, 0u, name}

/* Whether a struct of the core's, through pointer p, has this field. */
#define NXP_HAS(p, type, field) ((p)->struct_size >= offsetof(type, field) + sizeof((p)->field))

/* -- which expert leaves the cache --------------------------------------------------------------- */

/* One layer's cache. */
typedef struct nxp_cache_layer {
    uint32_t struct_size;
    uint32_t layer, n_layers;
    uint32_t n_experts;    /* of this layer */
    uint32_t n_slots;      /* experts that the cache holds at most; may become fewer while the model runs */
    uint32_t unused;
    uint64_t record_bytes; /* memory of one slot */
} nxp_cache_layer;

/* A graph has asked for these experts of the layer. */
typedef struct nxp_cache_use {
    uint32_t struct_size;
    uint32_t n_experts;
    uint64_t clock;         /* graphs that have asked this layer, this one included */
    const int32_t *experts; /* [n_experts], each once, in the order in which the router named them first */
    const uint8_t *hit;     /* [n_experts] 1: it is in the cache, or on its way there */
} nxp_cache_use;

typedef enum nxp_cache_reason {
    NXP_DEMAND = 0, /* experts that the router has picked */
    NXP_AHEAD = 1,  /* experts that were predicted */
} nxp_cache_reason;

/* Slots are needed. Everything that may leave is a candidate: what is in use, or on its way from the disk, is none. */
typedef struct nxp_cache_ask {
    uint32_t struct_size;
    uint32_t reason;       /* nxp_cache_reason */
    uint32_t n_wanted;     /* experts to name; at least 1, at most n_candidates */
    uint32_t n_candidates;
    uint64_t clock;
    const int32_t *experts;   /* [n_candidates] in the order of their slots */
    const uint64_t *ages;     /* [n_candidates] `clock` less the clock of the last graph that used it. An expert
                               * that was read ahead and not used yet counts from when it was read */
    const float *frequencies; /* [n_candidates] graphs that used it while it was cached, halved every 64 graphs */
    const int32_t *incoming;  /* [n_wanted] who takes the slots */
} nxp_cache_ask;

typedef struct nxp_cache_policy {
    nxp_head head;
    void *user; /* handed to create */
    /* State for one layer of one model, when the policy is chosen; the cache may hold experts by then. NULL means
     * failure. Leave the pointer NULL if there is no state: `user` is handed in instead. */
    void *(*create)(void *user, const nxp_cache_layer *);
    void (*destroy)(void *state);
    /* Optional. Called once for each graph that asks the layer, before anything is evicted for it. */
    void (*used)(void *state, const nxp_cache_use *);
    /* Required. Write n_wanted of the candidates to `out`, each once; what is first leaves first. Called at most once
     * for a graph and a layer, and only when no slot is empty (again, if reads have to end before there are enough
     * candidates). Nonzero means failure. Cost: this is on the way to a read; 1 us is nothing, 100 us is a lot. */
    int (*victims)(void *state, const nxp_cache_ask *, int32_t *out);
} nxp_cache_policy;

/* -- which experts are read ahead ----------------------------------------------------------------- */

/* The layers of a model that have a cache of experts, in the order in which they are computed. */
typedef struct nxp_layers {
    uint32_t struct_size;
    uint32_t n_layers;
    const uint32_t *n_experts; /* [n_layers] */
    const uint32_t *n_slots;   /* [n_layers] experts that the layer's cache holds */
} nxp_layers;

/* A router has decided. */
typedef struct nxp_routed {
    uint32_t struct_size;
    uint32_t layer;
    uint32_t n_tokens; /* 1 while decoding */
    uint32_t n_used;   /* experts of a token */
    const int32_t *experts; /* [n_tokens][n_used], each token in the order of the router */
} nxp_routed;

/* What will the router of `layer`, which is computed next, decide for the tokens of this graph? */
typedef struct nxp_predict_ask {
    uint32_t struct_size;
    uint32_t layer;
    uint32_t n_tokens;
    uint32_t n_used;
    uint32_t capacity; /* of out: the layer's experts */
    uint32_t limit;    /* the first so many of the answer that are not cached are read, no more */
} nxp_predict_ask;

typedef struct nxp_predictor {
    nxp_head head;
    void *user;
    /* State for one model; as for nxp_cache_policy. */
    void *(*create)(void *user, const nxp_layers *);
    void (*destroy)(void *state);
    /* Optional. Called for every decision, also while prediction is switched off. Tokens come in order; where one
     * request ends and the next begins is not told, and with several contexts their tokens come in turn. */
    void (*routed)(void *state, const nxp_routed *);
    /* Required. Write the experts to `out`, likeliest first, each once, and return how many (0: no idea). Negative
     * means failure. Called after `routed` of the layer before. */
    int32_t (*predict)(void *state, const nxp_predict_ask *, int32_t *out);
} nxp_predictor;

/* -- how chunks are decoded ------------------------------------------------------------------------- */

/* The codec that head.name names in files (see codecs/__init__.py for what a name may be). Its encoder is Python's.
 * The hash of the stored bytes was compared before: they are what the encoder wrote. */
typedef struct nxp_codec {
    nxp_head head;
    void *user;
    /* Required. Fill all of raw[raw_bytes] and return 0; nonzero: these bytes are no encoding of so many. Never write
     * beyond raw_bytes nor read beyond stored_bytes, whatever they say. Called by several threads at once. Pure: the
     * same bytes give the same bytes, because what is decoded is computed with. */
    int (*decode)(void *user, const void *stored, size_t stored_bytes, void *raw, size_t raw_bytes);
} nxp_codec;

/* -- products with weights of one type -------------------------------------------------------------- */

/* A weight that is resident. Row o has n_in weights, stored as ggml stores this type, at rows + o * row_bytes. */
typedef struct nxp_matrix {
    uint32_t struct_size;
    uint32_t unused;
    uint64_t n_in, n_out;
    const void *rows;
    uint64_t row_bytes;
} nxp_matrix;

/* A kernel makes results. With kernels="auto" (the default) it is used where a trial, with rows of the model itself,
 * finds the very bits of ggml's; with kernels="nexus" wherever it can be; with kernels="ggml" never. */
typedef struct nxp_kernel {
    nxp_head head;
    void *user;
    const char *type; /* of the weights, by ggml's name: "q4_0" */
    /* Optional: whether this weight is taken. `rows` is NULL here. */
    int (*accepts)(void *user, const nxp_matrix *);
    /* Optional, both or none: columns are made ready once (rounded to 8 bits, say) for all weights that share them.
     * Bytes for one column, a multiple of 64; and write it to out, which is aligned to 64 bytes. */
    uint64_t (*column_bytes)(void *user, uint64_t n_in);
    void (*activate)(void *user, const float *x, uint64_t n_in, void *out);
    /* Required. y[c * y_stride + o] = row o times column c, for rows [begin, end). Columns are what `activate` wrote, one
     * after the other; without it floats; `column_stride` bytes apart. `begin` is a multiple of 8. Rows are shared out to threads, which call this
     * at the same time for different ranges. A column must come out the same bits alone and among others. */
    void (*multiply)(void *user, const nxp_matrix *, const void *columns, uint64_t column_stride, uint32_t n_columns,
                     uint64_t begin, uint64_t end, float *y, uint64_t y_stride);
} nxp_kernel;

#ifdef __cplusplus
}
#endif
#endif
