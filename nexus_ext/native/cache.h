/* cache.h: the expert cache, see cache.c. Knows experts by number; knows nothing of ggml. */
#ifndef NEXUS_CACHE_H
#define NEXUS_CACHE_H

#include "core_internal.h"

#define NX_MAX_PARTS 4 /* matrices that one router decision selects: gate, up, down, or gate_up, down */

/* A slot holds one record: all parts of one expert. LOADING until every part is there. */
typedef enum { NX_RECORD_EMPTY, NX_RECORD_LOADING, NX_RECORD_READY } nx_record_state;

typedef struct nx_record {
    int32_t expert; /* -1: none */
    nx_record_state state;
    uint32_t in_use;   /* acquisitions that are not released: never evicted while above 0 */
    uint64_t last_use; /* the group's clock */
    float frequency;   /* uses, decayed */
    bool ahead;  /* read ahead and not used yet */
    bool wanted; /* a mark within one call */
    nx_read reads[NX_MAX_PARTS];
} nx_record;

struct nx_group {
    nx_model *model;
    uint32_t n_parts, n_experts, n_slots;
    nx_extent *part[NX_MAX_PARTS];
    uint64_t record_bytes[NX_MAX_PARTS], part_at[NX_MAX_PARTS], stride;
    /* Of a record: one for each part, or a single one where all parts lie together in a file, with the same
     * distances for every expert (an NXF). */
    uint32_t n_reads, first_part; /* the part that such a record begins with */
    uint64_t joined_bytes;        /* all of it; 0: each part is read by itself */
    uint8_t *pool;
    uint64_t pool_bytes;
    nx_record *records; /* n_slots */
    int32_t *slot_of;   /* expert -> slot, -1: not cached */
    uint64_t clock;     /* graphs that used this group */
    uint32_t layer;     /* its number, as policies know it */
    void *policy_state;
    uint32_t n_ahead;   /* records that were read ahead since the group was asked for any */
    int32_t *latest;         /* what the last token used */
    size_t n_latest;
    uint64_t *seen, *before; /* how often routers chose each expert: now, and in earlier sessions */
};

nx_status nx_cache_init(nx_model *, nx_error *);
void nx_cache_free(nx_model *);
/* Make the pools present in the background, unless slots come and go. With load_lock held. */
void nx_cache_prefault(nx_model *);
/* With the turn: slots from `n_slots` on hold nothing, and nothing is read into them. */
nx_status nx_cache_close_slots(nx_group *, uint32_t n_slots);
/* The read that brings a part. */
static inline nx_read *nx_record_read(const nx_group *g, nx_record *r, uint32_t part) {
    return &r->reads[g->joined_bytes ? 0 : part];
}
static inline bool nx_record_arrived(const nx_group *g, const nx_record *r) {
    for (uint32_t p = 0; p < g->n_reads; p++)
        if (!r->reads[p].done) return false;
    return true;
}
/* It holds something that is neither in use nor being read. */
static inline bool nx_record_may_leave(const nx_group *g, const nx_record *r) {
    return r->state != NX_RECORD_EMPTY && !r->in_use && (r->state != NX_RECORD_LOADING || nx_record_arrived(g, r));
}
/* Hold these experts, each named once: what is there, and for the rest a slot each, in policy.taken; their reads are
 * filled in and not submitted. On an error nothing is held. */
nx_status nx_cache_hold(nx_group *, const int32_t *experts, size_t n, size_t *n_taken);
/* As if it had not been asked. */
void nx_cache_unhold(nx_group *, const int32_t *experts, size_t n, size_t n_taken);
/* Bytes of one slot of a group with these parts. */
uint64_t nx_record_layout(nx_group *);

#endif
