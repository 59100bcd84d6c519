#include "nexus_status.h"

typedef enum {
    NX_OK,
    NX_E_NOMEM,
    NX_E_IO,
    NX_E_TRUNCATED,
    NX_E_CHANGED,
    NX_E_INVALID,
    NX_E_ABORTED,
    NX_E_UNSUPPORTED,
    NX_E_ABI,
    NX_E_CLOSED,
    NX_E_BUSY,
    NX_E_DAMAGED,
    ...
} nx_status;

const char *nx_status_text(nx_status status);
