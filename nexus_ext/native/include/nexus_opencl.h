/* nexus_opencl.h: products with matrices of very few bits on an OpenCL device.
 *
 * libOpenCL is looked for when it is first asked for, by name, and nothing is linked: where there is none,
 * or no device that computes as it must, everything here says so and nothing else changes.
 * NEXUS_OPENCL_LIBRARY names another library than the usual ones, NEXUS_OPENCL_DEVICE (part of) the name of
 * the device; otherwise the first GPU is taken, then the first device.
 *
 * The same integers as on the CPU, and floats summed in the same order with the same fused operations, so
 * that a device that rounds as OpenCL's full profile demands gives the bits of nexus_ternary.h.
 */
#ifndef NEXUS_OPENCL_H
#define NEXUS_OPENCL_H

#include "nexus_ternary.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Find a device and compile for it, once in a process; later calls repeat the first answer. Returns NX_OK,
 * or NX_E_UNSUPPORTED with the reason in nx_opencl_why(). */
nx_status nx_opencl_open(void);
/* One sentence: the device, or why there is none. Static storage; after nx_opencl_open. */
const char *nx_opencl_why(void);

typedef struct nx_opencl_matrix nx_opencl_matrix;

/* Copy a matrix as llama.cpp stores it to the device (2 bits a weight). NX_E_INVALID: n_in is no multiple of
 * the block; NX_E_NOMEM: no room; NX_E_UNSUPPORTED: no device. */
nx_status nx_opencl_matrix_create(nx_ternary_type, const void *rows, size_t stride, uint32_t n_in, uint32_t n_out,
                                  nx_opencl_matrix **out);
void nx_opencl_matrix_free(nx_opencl_matrix *);
/* Bytes that it takes on the device. */
uint64_t nx_opencl_matrix_bytes(const nx_opencl_matrix *);
/* y[c * y_stride + o] = row o times column c; columns as nx_ternary_activate makes them. Waits for the
 * result. One call at a time computes, others wait. NX_E_IO: the device failed, see nx_opencl_error(). */
nx_status nx_opencl_multiply(const nx_opencl_matrix *, const void *columns, uint32_t n_columns, float *y,
                             size_t y_stride);
/* What the last NX_E_IO was: OpenCL's number and the call. For the calling thread; static storage. */
const char *nx_opencl_error(void);

#ifdef __cplusplus
}
#endif
#endif
