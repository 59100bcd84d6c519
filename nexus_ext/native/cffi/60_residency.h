#include "nexus_residency.h"

nx_status nx_promote(nx_model *, const uint32_t *extents, size_t n, int (*abort)(void *), void *ctx,
                     uint64_t *bytes);
nx_status nx_demote(nx_model *, const uint32_t *extents, size_t n, uint64_t *bytes);
nx_status nx_group_resize(nx_model *, uint32_t group, uint32_t n_slots);
uint64_t nx_group_slot_bytes(const nx_model *, uint32_t group);
uint64_t nx_resident_bytes(const nx_model *);
uint64_t nx_extent_span(const nx_model *, uint32_t extent);
int nx_extent_is_resident(const nx_model *, uint32_t extent);
void nx_model_set_columns(nx_model *, int on);
_Bool nx_flag_callback(void *flag);
int nx_flag_stop(void *flag);
