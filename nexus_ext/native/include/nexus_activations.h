/* nexus_activations.h: the vectors that go into chosen weights, kept until somebody has looked at them.
 *
 * What an importance matrix keeps of them is sums of squares (nexus_imatrix.h); rounding with compensation
 * also needs the products of every two channels, which a BLAS multiplies from whole rows.
 *
 * One thread adds at a time; nothing is read while something is added. Knows nothing of ggml: what a graph
 * computes is brought here by backend/imatrix.c.
 */
#ifndef NEXUS_ACTIVATIONS_H
#define NEXUS_ACTIVATIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nexus_core.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct nx_activations nx_activations;

/* Of `n` weights with these names, which are copied. */
NX_API nx_status nx_activations_create(const char *const *names, size_t n, nx_activations **out);
NX_API void nx_activations_free(nx_activations *); /* NULL is fine */

/* True, and the number of the weight, when it is one of the chosen. */
NX_API bool nx_activations_find(nx_activations *, const char *name, size_t *i);

/* Keep one vector of n_channels that went into matrix `matrix` of weight i. Without memory, or when the
 * vectors of the weight had another length before, it is not kept and the reason stays as the status. */
NX_API void nx_activations_add(nx_activations *, size_t i, uint32_t n_channels, uint32_t matrix, const float *x);

NX_API nx_status nx_activations_status(const nx_activations *);

/* What was kept of weight i: n_rows vectors of n_channels, and the matrix that each went into. Borrowed until
 * something is added. NX_E_INVALID: there is no weight i. */
NX_API nx_status nx_activations_at(const nx_activations *, size_t i, uint32_t *n_channels, size_t *n_rows,
                                   const float **rows, const uint32_t **matrices);

NX_API void nx_activations_clear(nx_activations *); /* forget the vectors; their memory is used again */

#ifdef __cplusplus
}
#endif
#endif
