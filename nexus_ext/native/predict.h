/* predict.h: how the cache, the prediction of experts and its control know each other. Not installed. */
#ifndef NEXUS_PREDICT_INTERNAL_H
#define NEXUS_PREDICT_INTERNAL_H

#include "cache.h"

/* The group is about to be asked for these: raise what is wanted of what was read ahead, drop the rest. */
void nx_ahead_settle(nx_group *, const int32_t *experts, size_t n);
/* A record that was read ahead is used; or it leaves its slot without. */
void nx_ahead_used(nx_group *, nx_record *);
void nx_ahead_forgotten(nx_group *, nx_record *);
/* cache.c: a slot for this expert that is neither in use nor being read, its reads filled in and not
 * submitted; NULL: there is none. */
nx_record *nx_cache_place(nx_group *, int32_t expert);

#endif
