/* manifest.h: see manifest.c. */
#ifndef NEXUS_MANIFEST_H
#define NEXUS_MANIFEST_H

#include "core_internal.h"

nx_status nx_manifest_parse(nx_model *, const char *text, size_t nbytes, nx_error *);
void nx_slab_split(uint64_t rows, uint64_t row_bytes, uint64_t slab_bytes, uint64_t *slab_rows,
                   uint32_t *n_slabs);

/* Slabs are whole chunks where they can be, or chunks would be decoded or checked twice. */
void nx_slab_of_chunks(nx_extent *, uint64_t slab_bytes, uint64_t ring_bytes);

#endif
