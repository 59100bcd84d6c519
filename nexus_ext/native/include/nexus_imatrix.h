/* nexus_imatrix.h: how much each input channel of each weight is used: sums of squares of activations.
 *
 * The error that quantization makes in y = W x is sum over i of E[x_i^2] (W - Wq)_ji^2, so quantizers
 * weigh channel i with E[x_i^2] ("importance matrix"). An entry stands for one weight: n_matrices matrices
 * (1, or the experts of a layer) of n_channels input channels each.
 *
 * One thread adds at a time; nothing is read while something is added. Knows nothing of ggml: what a graph
 * computes is brought here by backend/imatrix.c.
 */
#ifndef NEXUS_IMATRIX_H
#define NEXUS_IMATRIX_H

#include <stddef.h>
#include <stdint.h>

#include "nexus_core.h"

#ifdef __cplusplus
extern "C" {
#endif

#define NX_IMATRIX_NAME 64 /* bytes of a name with its end, as ggml has it */

typedef struct nx_imatrix nx_imatrix;
typedef struct nx_imatrix_entry nx_imatrix_entry;

NX_API nx_status nx_imatrix_create(nx_imatrix **out);
NX_API void nx_imatrix_free(nx_imatrix *); /* NULL is fine */

/* The entry of this weight, a new one when there is none. NULL when memory ran out, or when the weight had
 * another shape before; the reason stays as nx_imatrix_status. */
NX_API nx_imatrix_entry *nx_imatrix_get(nx_imatrix *, const char *name, uint32_t n_channels, uint32_t n_matrices);

/* Count one vector of n_channels that went into matrix `matrix`. A number that is not finite is not counted
 * and makes the status NX_E_INVALID: what it came from is broken. */
NX_API void nx_imatrix_add(nx_imatrix *, nx_imatrix_entry *, uint32_t matrix, const float *x);

NX_API nx_status nx_imatrix_status(const nx_imatrix *);
NX_API size_t nx_imatrix_count(const nx_imatrix *);

/* Entry i in the order in which the weights were first used. `sums` of n_matrices * n_channels and `counts`
 * of n_matrices are borrowed until something is added. NX_E_INVALID: there is no entry i. */
NX_API nx_status nx_imatrix_at(const nx_imatrix *, size_t i, char name[NX_IMATRIX_NAME], uint32_t *n_channels,
                               uint32_t *n_matrices, const double **sums, const uint64_t **counts);

#ifdef __cplusplus
}
#endif
#endif
