/* groups.h: the rows of a batch, sorted by their experts, as the operations of our own use them. */
#ifndef NEXUS_GROUPS_H
#define NEXUS_GROUPS_H

#include "backend.h"

typedef struct nxb_groups {
    uint32_t *rows;    /* by expert; each token * (experts of a token) + k */
    uint32_t *starts;  /* where the rows of the i-th expert that has any begin; one more: where they end */
    uint32_t *experts; /* the numbers of these experts */
    size_t rows_capacity, experts_capacity, n_experts;
} nxb_groups;

bool nxb_groups_reserve(nxb_groups *, size_t n_rows, size_t n_experts);
/* Sort the numbers in src[2] of the node, or, without them, `n_rows` rows of the only matrix. A number that
 * is no expert's is noted as a failure; then there are no groups, and nothing is computed with them. `some`:
 * rows with negative numbers are left out. */
void nxb_groups_sort(nxb_groups *, const gx_tensor *node, int64_t n_rows, bool some, nxb_failure *);
void nxb_groups_free(nxb_groups *);

#endif
