/* attach_internal.h: what model.c needs of attach.c. Not installed. */
#ifndef NEXUS_ATTACH_INTERNAL_H
#define NEXUS_ATTACH_INTERNAL_H

#include "nexus_attach.h"

void nx_attachments_free(nx_model *);
/* The attachment of an extent, made if there is none; NULL: no memory. With load_lock held. */
nx_attachment *nx_attachment_get(nx_extent *);
/* Pack what the manifest asks for, as far as memory allows. Everything is read. With load_lock held. */
void nx_model_pack(nx_model *);

#endif
