/* io_status.c: the English of nx_status. */
#include "nexus_status.h"

const char *nx_status_text(nx_status status) {
    switch (status) {
    case NX_OK: return "no error";
    case NX_E_NOMEM: return "memory could not be allocated";
    case NX_E_IO: return "the system reported an input/output error";
    case NX_E_TRUNCATED: return "the file ends before the bytes that were asked for";
    case NX_E_CHANGED: return "the file is not the one that was opened";
    case NX_E_INVALID: return "an argument is not valid";
    case NX_E_ABORTED: return "the caller asked to stop";
    case NX_E_UNSUPPORTED: return "this machine, kernel or file system cannot do it";
    case NX_E_ABI: return "the host library is not laid out as expected";
    case NX_E_CLOSED: return "the object was closed before this could be done";
    case NX_E_BUSY: return "the object is in use";
    case NX_E_DAMAGED: return "what is stored is not what was written";
    }
    return "unknown status";
}
