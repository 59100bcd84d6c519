#include "nexus_imatrix.h"

#define NX_IMATRIX_NAME ...

typedef struct nx_imatrix nx_imatrix;
nx_status nx_imatrix_create(nx_imatrix **out);
void nx_imatrix_free(nx_imatrix *);
nx_status nx_imatrix_status(const nx_imatrix *);
size_t nx_imatrix_count(const nx_imatrix *);
nx_status nx_imatrix_at(const nx_imatrix *, size_t i, char *name, uint32_t *n_channels, uint32_t *n_matrices,
                        const double **sums, const uint64_t **counts);
