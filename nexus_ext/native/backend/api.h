/* api.h: ggml's functions, found at load time in the runtime that loads us.
 *
 * The binary names no ggml library as NEEDED: runtimes differ in file names and SONAMEs, and two of them
 * may live in one process. The functions are taken from the library that called ggml_backend_init.
 */
#ifndef NEXUS_API_H
#define NEXUS_API_H

#include "abi.h"

/* X(result, name, arguments): name without the prefix "ggml_" */
#define GX_FUNCTIONS(X)                                                                          \
    X(const char *, version, (void))                                                             \
    X(const char *, op_name, (int32_t))                                                          \
    X(const char *, type_name, (int32_t))                                                        \
    X(gx_context *, init, (gx_init_params))                                                      \
    X(void, free, (gx_context *))                                                                \
    X(size_t, tensor_overhead, (void))                                                           \
    X(size_t, graph_overhead_custom, (size_t, bool))                                             \
    X(size_t, nbytes, (const gx_tensor *))                                                       \
    X(gx_tensor *, new_tensor_2d, (gx_context *, int32_t, int64_t, int64_t))                     \
    X(gx_tensor *, new_tensor_1d, (gx_context *, int32_t, int64_t))                              \
    X(gx_tensor *, view_1d, (gx_context *, gx_tensor *, int64_t, size_t))                        \
    X(gx_tensor *, mul_mat, (gx_context *, gx_tensor *, gx_tensor *))                            \
    X(gx_tensor *, mul_mat_id, (gx_context *, gx_tensor *, gx_tensor *, gx_tensor *))            \
    X(gx_tensor *, get_rows, (gx_context *, gx_tensor *, gx_tensor *))                           \
    X(gx_tensor *, set_name, (gx_tensor *, const char *))                                        \
    X(void *, get_data, (const gx_tensor *))                                                     \
    X(void, set_input, (gx_tensor *))                                                            \
    X(gx_graph *, new_graph_custom, (gx_context *, size_t, bool))                                \
    X(void, graph_clear, (gx_graph *))                                                           \
    X(void, graph_add_node, (gx_graph *, gx_tensor *))                                           \
    X(int, graph_n_nodes, (gx_graph *))                                                          \
    X(gx_tensor **, graph_nodes, (gx_graph *))                                                   \
    X(void, build_forward_expand, (gx_graph *, gx_tensor *))                                     \
    X(gx_graph_value, graph_view, (gx_graph *, int, int))                                        \
    X(gx_buffer *, backend_buffer_init, (gx_buft *, gx_buffer_i, void *, size_t))                \
    X(void, backend_buffer_free, (gx_buffer *))                                                  \
    X(void *, backend_buffer_get_base, (gx_buffer *))                                            \
    X(const char *, backend_buft_name, (gx_buft *))                                              \
    X(gx_buffer *, backend_buft_alloc_buffer, (gx_buft *, size_t))                               \
    X(size_t, backend_buft_get_alignment, (gx_buft *))                                           \
    X(size_t, backend_buft_get_max_size, (gx_buft *))                                            \
    X(bool, backend_buft_is_host, (gx_buft *))                                                   \
    X(void, threadpool_params_init, (void *, int))                                               \
    X(const char *, backend_name, (gx_backend *))                                                \
    X(void, backend_free, (gx_backend *))                                                        \
    X(int, backend_graph_compute_async, (gx_backend *, gx_graph *))                              \
    X(void, backend_synchronize, (gx_backend *))                                                 \
    X(const char *, backend_dev_name, (gx_device *))                                             \
    X(const char *, backend_dev_description, (gx_device *))                                      \
    X(void, backend_dev_memory, (gx_device *, size_t *, size_t *))                               \
    X(int, backend_dev_type, (gx_device *))                                                      \
    X(void, backend_dev_get_props, (gx_device *, gx_device_props *))                             \
    X(gx_backend *, backend_dev_init, (gx_device *, const char *))                               \
    X(gx_buft *, backend_dev_buffer_type, (gx_device *))                                         \
    X(gx_buft *, backend_dev_host_buffer_type, (gx_device *))                                    \
    X(gx_reg *, backend_dev_backend_reg, (gx_device *))                                          \
    X(bool, backend_dev_supports_op, (gx_device *, const gx_tensor *))                           \
    X(bool, backend_dev_supports_buft, (gx_device *, gx_buft *))                                 \
    X(bool, backend_dev_offload_op, (gx_device *, const gx_tensor *))                            \
    X(gx_device *, backend_dev_by_type, (int))                                                   \
    X(const char *, backend_reg_name, (gx_reg *))                                                \
    X(size_t, backend_reg_dev_count, (gx_reg *))                                                 \
    X(gx_device *, backend_reg_dev_get, (gx_reg *, size_t))                                      \
    X(void *, backend_reg_get_proc_address, (gx_reg *, const char *))

typedef struct gx_api {
#define GX_FIELD(result, name, arguments) result(*name) arguments;
    GX_FUNCTIONS(GX_FIELD)
#undef GX_FIELD
    /* enumerations that this backend needs, looked up by name */
    int32_t op_none, op_mul_mat, op_get_rows, op_mul_mat_id;
    int32_t op_reshape, op_view, op_permute, op_transpose;
    int32_t type_f32, type_i32;
    int32_t flag_compute; /* set on nodes that must be computed; 0 if this version has no such flag */
    /* For operations of our own in the middle of a graph; -1 and 0 where this version cannot have them. */
    int32_t op_custom;
    size_t view_n_nodes, view_nodes; /* where a graph keeps how many nodes it has, and which */
    void *host;           /* the library that called us */
} gx_api;

extern gx_api gx;

/* Fill in `gx` from the library that `inside_host` (a return address) lies in. On failure: a sentence. */
bool gx_resolve(const void *inside_host, char *why, size_t why_size);

/* Compare every layout that abi.h declares with what the library does. On failure: a sentence. */
bool gx_self_test(char *why, size_t why_size);

#endif
