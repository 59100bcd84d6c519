#include "nexus_activations.h"

typedef struct nx_activations nx_activations;
nx_status nx_activations_create(const char *const *names, size_t n, nx_activations **out);
void nx_activations_free(nx_activations *);
nx_status nx_activations_status(const nx_activations *);
nx_status nx_activations_at(const nx_activations *, size_t i, uint32_t *n_channels, size_t *n_rows,
                            const float **rows, const uint32_t **matrices);
void nx_activations_clear(nx_activations *);
