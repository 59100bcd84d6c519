/* predict.h: how the cache, the prediction of experts and its control know each other. Not installed. */
#ifndef NEXUS_PREDICT_INTERNAL_H
#define NEXUS_PREDICT_INTERNAL_H

#include "cache.h"

/* The group is about to be asked for these: raise what is wanted of what was read ahead, drop the rest. */
void nx_ahead_settle(nx_group *, const int32_t *experts, size_t n);
/* A record that was read ahead is used; or it leaves its slot without. */
void nx_ahead_used(nx_group *, nx_record *);
void nx_ahead_forgotten(nx_group *, nx_record *);
/* cache.c: slots for the first of these experts, neither in use nor being read; their reads are filled in and not
 * submitted. Returns for how many there was one. */
size_t nx_cache_place(nx_group *, nxp_cache_reason, const int32_t *experts, size_t n);
/* cache.c: which of these have no slot, each once, in their order, at most `limit`: in the policy's `absent`. */
size_t nx_cache_absent(nx_group *, const int32_t *experts, size_t n, size_t limit);
/* cache.c: slots of records whose reading has failed (or was dropped) and has ended are empty again. */
void nx_cache_forget_failed(nx_group *);

#endif
