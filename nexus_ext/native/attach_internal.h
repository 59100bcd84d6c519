/* attach_internal.h: what model.c needs of attach.c. Not installed. */
#ifndef NEXUS_ATTACH_INTERNAL_H
#define NEXUS_ATTACH_INTERNAL_H

#include "nexus_attach.h"

void nx_attachments_free(nx_model *);
void nx_kernels_free(nx_model *);
/* The attachment of an extent, made if there is none; NULL: no memory. With load_lock held. */
nx_attachment *nx_attachment_get(nx_extent *);
/* Pack what the manifest asks for, as far as memory allows; elastic weights not. Everything is read. With
 * load_lock held. */
void nx_model_pack(nx_model *);

/* What the packed form of an extent takes of memory; 0 for one that ggml computes with. */
uint64_t nx_extent_packed_bytes(const nx_model *, const nx_extent *);
/* Pack an extent whose bytes are in place and give these back. codes NULL: nothing was done, it is not for us
 * or there is no memory. With load_lock held. */
nx_ternary nx_extent_pack(const nx_model *, nx_extent *);
/* Let graphs compute with the packed form, which belongs to the extent then; with the turn and load_lock held. */
void nx_extent_put_packed(nx_model *, nx_extent *, nx_ternary packed);
/* Free the packed form, if there is one; with the turn and load_lock held. */
void nx_extent_unpack(nx_model *, nx_extent *);

#endif
