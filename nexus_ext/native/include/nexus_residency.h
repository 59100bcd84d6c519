/* nexus_residency.h: how much of a model is in memory, changed while the model is in use.
 *
 * An extent of the tier "elastic" has a place in memory that is reserved and not backed. Promoted, it is
 * read into that place and is what a ram extent is; demoted, its pages go back to the system and it is
 * streamed as an nvme extent. A cache of experts has slots that can be closed and opened.
 *
 * The results of a graph do not depend on any of this. Nothing changes under a graph that runs: the
 * change itself takes the model's turn, the reading before it does not. Any thread may call these.
 */
#ifndef NEXUS_RESIDENCY_H
#define NEXUS_RESIDENCY_H

#include "nexus_core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Read these elastic extents into memory (those that are there already are left alone), while graphs go
 * on with what there is; then let graphs use them. `bytes`: what was read. `abort` may be NULL; when it
 * stops the reading, or a read fails, the extents that were complete stay and the others are as before.
 * NX_E_INVALID: a number that is no elastic extent; nothing was done. */
NX_API nx_status nx_promote(nx_model *, const uint32_t *extents, size_t n, nx_abort_fn abort, void *ctx,
                            uint64_t *bytes);
/* Give the memory of these elastic extents back. Waits for the graph that runs. `bytes`: what went. */
NX_API nx_status nx_demote(nx_model *, const uint32_t *extents, size_t n, uint64_t *bytes);

/* Let the expert cache number `group` (in the order of the manifest) have this many slots, at most as many
 * as its manifest says; records in closed slots are forgotten and their memory is given back. */
NX_API nx_status nx_group_resize(nx_model *, uint32_t group, uint32_t n_slots);
NX_API uint64_t nx_group_slot_bytes(const nx_model *, uint32_t group);

/* Bytes of promoted extents; of those in memory or reserved for reading, the slack of direct reads included. */
NX_API uint64_t nx_resident_bytes(const nx_model *);
/* What promoting an extent takes of memory; 0 for one that is not elastic. */
NX_API uint64_t nx_extent_span(const nx_model *, uint32_t extent);
NX_API int nx_extent_is_resident(const nx_model *, uint32_t extent);

/* Grows with every promotion and demotion: a graph whose uses were looked up before must look again. */
NX_API uint64_t nx_residency_generation(const nx_model *);
static inline nx_tier nx_extent_tier(const nx_extent *e) { return __atomic_load_n(&e->tier, __ATOMIC_ACQUIRE); }

/* Compute products with several columns so that each column comes out as if it were alone. Kernels may sum
 * one column in another order than several; a server that decodes several sequences at once wants each
 * to be what it would be by itself. */
NX_API void nx_model_set_columns(nx_model *, int on);
NX_API int nx_model_columns(const nx_model *);

/* An abort callback of ggml's shape: whether the int that `flag` points to is not zero. */
NX_API _Bool nx_flag_callback(void *flag);
NX_API int nx_flag_stop(void *flag); /* the same as an nx_abort_fn */

#ifdef __cplusplus
}
#endif
#endif
