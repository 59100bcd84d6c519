#include "nexus_opencl.h"

typedef struct nx_opencl_matrix nx_opencl_matrix;

nx_status nx_opencl_open(void);
const char *nx_opencl_why(void);
nx_status nx_opencl_matrix_create(nx_ternary_type, const void *rows, size_t stride, uint32_t n_in, uint32_t n_out,
                                  nx_opencl_matrix **out);
void nx_opencl_matrix_free(nx_opencl_matrix *);
uint64_t nx_opencl_matrix_bytes(const nx_opencl_matrix *);
nx_status nx_opencl_multiply(const nx_opencl_matrix *, const void *columns, uint32_t n_columns, float *y,
                             size_t y_stride);
const char *nx_opencl_error(void);
