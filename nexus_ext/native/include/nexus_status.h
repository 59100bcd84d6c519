/* nexus_status.h: the one status type that every fallible nx_ function returns. */
#ifndef NEXUS_STATUS_H
#define NEXUS_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

/* The numbers are part of the binary interface: append, never renumber. */
typedef enum nx_status {
    NX_OK = 0,
    NX_E_NOMEM = 1,       /* memory could not be allocated */
    NX_E_IO = 2,          /* the system refused or failed; an errno goes with it */
    NX_E_TRUNCATED = 3,   /* the file ends before the bytes that were asked for */
    NX_E_CHANGED = 4,     /* the file is not the one that was opened */
    NX_E_INVALID = 5,     /* an argument makes no sense: a mistake of the caller */
    NX_E_ABORTED = 6,     /* the caller asked to stop */
    NX_E_UNSUPPORTED = 7, /* this machine, kernel or file system cannot do it */
    NX_E_ABI = 8,         /* the host library is not laid out as expected */
    NX_E_CLOSED = 9,      /* the object was shut down before this could be done */
    NX_E_BUSY = 10,       /* the object is in use and cannot be used twice */
    NX_E_DAMAGED = 11     /* what is stored is not what was written */
} nx_status;

/* One English clause, static storage, never NULL (also for unknown numbers). */
const char *nx_status_text(nx_status status);

#ifdef __cplusplus
}
#endif
#endif
