/* attach_internal.h: what model.c needs of attach.c. Not installed. */
#ifndef NEXUS_ATTACH_INTERNAL_H
#define NEXUS_ATTACH_INTERNAL_H

#include "nexus_attach.h"

void nx_attachments_free(nx_model *);

#endif
