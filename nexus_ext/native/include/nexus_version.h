/* Which build of the native core this is, and how its symbols are exported.
 * Knows nothing of files, models or ggml. */
#ifndef NEXUS_VERSION_H
#define NEXUS_VERSION_H

/* Marks what a library shows to others; only needed where the default is hidden (backend/). */
#if defined(__GNUC__)
#define NX_API __attribute__((visibility("default")))
#else
#define NX_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The version of the Python package that this library was built for, for instance "0.1.0". The
 * string is static. */
NX_API const char *nx_version(void);

#ifdef __cplusplus
}
#endif

#endif
