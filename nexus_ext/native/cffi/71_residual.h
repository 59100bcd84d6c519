#include "nexus_attach.h"
#include "nexus_residual.h"

#define NX_RESIDUAL_LINE ...

typedef struct {
    uint32_t n_in, n_out;
    const uint8_t *codes;
    const float *scales;
} nx_residual_matrix;

uint64_t nx_residual_row_bytes(uint32_t n_out);
nx_status nx_residual_encode(const float *r, size_t stride, uint32_t n_in, uint32_t n_out, uint32_t begin,
                             uint32_t end, uint8_t *codes, float *scales);
void nx_residual_decode(const nx_residual_matrix *m, uint32_t begin, uint32_t end, float *r, size_t stride);
size_t nx_residual_select(const float *x, uint32_t n, uint32_t k, uint32_t *channels);
size_t nx_residual_select_buckets(const float *x, uint32_t n, uint32_t k, float high, float low,
                                  uint32_t *channels);
void nx_residual_products(const float *x, const uint32_t *channels, size_t n, float *products);
void nx_residual_add(const nx_residual_matrix *m, const uint32_t *channels, const float *products, size_t n,
                     uint32_t begin, uint32_t end, float *sums, float *y);

nx_status nx_model_attach_residual(nx_model *, const char *name, const void *codes, uint64_t codes_bytes,
                                   const float *scales, uint64_t n_scales, uint32_t k, nx_error *);
nx_status nx_model_set_residual_k(nx_model *, const char *name, uint32_t k);
uint64_t nx_model_attached_bytes(const nx_model *);
