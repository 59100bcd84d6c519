/* nexus_predict.h: experts that are read before a router asks for them, and whether that pays.
 *
 * What is predicted is only a guess about what is read: results never depend on it. Everything here but
 * the popularity of experts is called by the holder of the model's turn.
 */
#ifndef NEXUS_PREDICT_H
#define NEXUS_PREDICT_H

#include "nexus_core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* -- reading ahead ------------------------------------------------------------------------------- */

/* Start to read the records of these experts, the likeliest first, at most `limit` of those that are not
 * there. The reads are spare ones (nexus_io.h). A slot is taken from what the policy would evict next,
 * never from a record that is in use or one of `experts`; when there is none, fewer are read. An expert
 * that is named again counts once. What the group's next acquisition does not ask for is stale: no more of it is read then. */
NX_API nx_status nx_experts_prefetch(nx_group *, const int32_t *experts, size_t n, size_t limit);
/* Slots that hold nothing. */
NX_API size_t nx_group_empty_slots(nx_group *);
/* Requests of other reads that may be in hand while spare ones are issued, see nx_io_spare_limits. */
NX_API void nx_prefetch_beside(nx_model *, uint32_t n_requests);
/* Take in what has arrived and issue what waits: 1 when nothing but spare reads is in hand. */
NX_API int nx_reads_go_on(nx_model *);
/* So long was computed while that was so, or so long a prediction took. */
NX_API void nx_note_idle(nx_model *, uint64_t ns);
NX_API void nx_note_predict(nx_model *, uint64_t ns);

/* -- when ---------------------------------------------------------------------------------------- */

/* "none", "gate", "previous", "popular" are what they say, always; "auto" is "gate" while it is measured to
 * help. NX_E_INVALID for other names. */
NX_API nx_status nx_predict_set(nx_model *, const char *predictor);

typedef enum { NX_PREDICT_NONE, NX_PREDICT_GATE, NX_PREDICT_PREVIOUS, NX_PREDICT_POPULAR,
               NX_PREDICT_PLUGIN } nx_predictor;

/* What predicts in this pass, for routers that decide about one token, or about a batch: nearly all that is
 * predicted for a batch is used, so that it is a matter of order alone. */
NX_API nx_predictor nx_predict_now(const nx_model *, int one_token);

typedef enum {
    NX_CONTROL_FIXED,    /* not automatic */
    NX_CONTROL_WATCHING, /* off: measuring whether there is anything to win */
    NX_CONTROL_NO_STALL, /* off: computing hardly waits for the disk */
    NX_CONTROL_NO_IDLE,  /* off: the disk is hardly ever idle */
    NX_CONTROL_TRYING,   /* on and off in turn, to compare */
    NX_CONTROL_SLOWER,   /* off: tried, and not faster by enough */
    NX_CONTROL_FASTER,   /* on: tried, and faster */
} nx_control_state;

typedef struct nx_prediction {
    nx_control_state state;
    int on;                   /* the next pass predicts */
    uint64_t trials, switches;
    double idle, stall;       /* shares of the time of passes without prediction, as last watched */
    double on_ns, off_ns;     /* median pass of the last trial, 0: none yet */
} nx_prediction;

NX_API void nx_predict_get(nx_model *, nx_prediction *out);
/* A pass of one token has ended. */
NX_API void nx_predict_pass(nx_model *, uint64_t pass_ns);

/* -- a predictor of a plugin (nexus_policy.h) ------------------------------------------------------- */

/* Whether it wants to be told what routers decide. */
NX_API int nx_predict_listens(const nx_model *);
NX_API void nx_predict_routed(nx_group *, const int32_t *experts, uint32_t n_tokens, uint32_t n_used);
/* The experts that this group's router will ask for, by the plugin: *out, each once; returns how many. */
NX_API size_t nx_predict_ask(nx_group *, uint32_t n_tokens, uint32_t n_used, size_t limit, int32_t **out);

/* -- popularity ---------------------------------------------------------------------------------- */

/* Count the choices of a router for one token: `n` numbers of experts. */
NX_API void nx_experts_seen(nx_group *, const int32_t *experts, size_t n);
/* Those of the last token, at most `n`; returns how many. */
NX_API size_t nx_experts_latest(const nx_group *, int32_t *out, size_t n);
/* The `n` most popular experts, most popular first; returns how many have been seen at all. */
NX_API size_t nx_experts_popular(const nx_group *, int32_t *out, size_t n);

NX_API uint32_t nx_model_n_groups(const nx_model *);
/* The group's number of experts, and the number of its first extent. */
NX_API uint32_t nx_group_experts(const nx_model *, uint32_t group, uint32_t *extent);
/* Copy the counts of this session, or say what earlier ones have counted (any scale; adds up with it). */
NX_API void nx_popularity_get(nx_model *, uint32_t group, uint64_t *counts);
NX_API void nx_popularity_set(nx_model *, uint32_t group, const uint64_t *counts);
/* Read popular experts into empty slots for up to `ns`, unless a graph is waiting or has run: returns 1
 * while there is more to read, 0 when there is not, or a failure (negative nx_status). */
NX_API int nx_cache_preload(nx_model *, uint64_t ns);

#ifdef __cplusplus
}
#endif
#endif
