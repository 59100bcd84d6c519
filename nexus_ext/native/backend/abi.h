/* abi.h: the parts of ggml's binary interface that this backend touches, in our own words.
 *
 * llama.cpp's wheels do not install the header that declares these structs, and building must not need
 * llama.cpp's source. So the layouts are written down here as facts, every one of them is checked
 * against the running library before it is used (selftest.c), and a library that disagrees is refused
 * with a sentence. Enumerations differ between versions and are looked up by name instead.
 */
#ifndef NEXUS_ABI_H
#define NEXUS_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GX_API_VERSION 2 /* of backends, see ggml_backend_reg.api_version */
#define GX_MAX_SRC 10
#define GX_NAME_BYTES 64
#define GX_OBJECT_BYTES 32 /* bookkeeping that ggml_tensor_overhead() adds to a tensor */

typedef enum { GX_ALLOC_FAILED = -2, GX_FAILED = -1, GX_SUCCESS = 0, GX_ABORTED = 1 } gx_status;
typedef enum { GX_DEVICE_CPU = 0, GX_DEVICE_GPU = 1, GX_DEVICE_IGPU = 2, GX_DEVICE_ACCEL = 3 } gx_device_type;

typedef struct gx_tensor gx_tensor;
typedef struct gx_buffer gx_buffer;
typedef struct gx_buft gx_buft; /* a buffer type */
typedef struct gx_backend gx_backend;
typedef struct gx_device gx_device;
typedef struct gx_reg gx_reg;
typedef struct gx_graph gx_graph;     /* opaque */
typedef struct gx_context gx_context; /* opaque */
typedef void *gx_event;

struct gx_tensor {
    int32_t type;
    gx_buffer *buffer;
    int64_t ne[4];
    size_t nb[4]; /* strides in bytes */
    int32_t op;
    int32_t op_params[16];
    int32_t flags;
    gx_tensor *src[GX_MAX_SRC];
    gx_tensor *view_src;
    size_t view_offs;
    void *data;
    char name[GX_NAME_BYTES];
    void *extra; /* for the owner of the buffer; we leave it alone */
    char padding[8];
};

typedef struct gx_buft_i {
    const char *(*get_name)(gx_buft *);
    gx_buffer *(*alloc_buffer)(gx_buft *, size_t);
    size_t (*get_alignment)(gx_buft *);
    size_t (*get_max_size)(gx_buft *);
    size_t (*get_alloc_size)(gx_buft *, const gx_tensor *);
    bool (*is_host)(gx_buft *);
} gx_buft_i;

struct gx_buft {
    gx_buft_i iface;
    gx_device *device;
    void *context;
};

typedef struct gx_buffer_i {
    void (*free_buffer)(gx_buffer *);
    void *(*get_base)(gx_buffer *);
    int (*init_tensor)(gx_buffer *, gx_tensor *);
    void (*memset_tensor)(gx_buffer *, gx_tensor *, uint8_t, size_t, size_t);
    void (*set_tensor)(gx_buffer *, gx_tensor *, const void *, size_t, size_t);
    void (*get_tensor)(gx_buffer *, const gx_tensor *, void *, size_t, size_t);
    void (*set_tensor_2d)(gx_buffer *, gx_tensor *, const void *, size_t, size_t, size_t, size_t, size_t);
    void (*get_tensor_2d)(gx_buffer *, const gx_tensor *, void *, size_t, size_t, size_t, size_t, size_t);
    bool (*cpy_tensor)(gx_buffer *, const gx_tensor *, gx_tensor *);
    void (*clear)(gx_buffer *, uint8_t);
    void (*reset)(gx_buffer *);
} gx_buffer_i;

struct gx_buffer {
    gx_buffer_i iface;
    gx_buft *buft;
    void *context;
    size_t size;
    int32_t usage;
};

typedef struct gx_backend_i {
    const char *(*get_name)(gx_backend *);
    void (*free)(gx_backend *);
    void (*set_tensor_async)(void);
    void (*get_tensor_async)(void);
    void (*set_tensor_2d_async)(void);
    void (*get_tensor_2d_async)(void);
    void (*cpy_tensor_async)(void);
    void (*synchronize)(gx_backend *);
    void (*graph_plan_create)(void);
    void (*graph_plan_free)(void);
    void (*graph_plan_update)(void);
    void (*graph_plan_compute)(void);
    int (*graph_compute)(gx_backend *, gx_graph *);
    void (*event_record)(void);
    void (*event_wait)(void);
    void (*graph_optimize)(void);
} gx_backend_i;

struct gx_backend {
    void *guid;
    gx_backend_i iface;
    gx_device *device;
    void *context;
};

typedef struct gx_device_props {
    const char *name;
    const char *description;
    size_t memory_free, memory_total;
    int32_t type;
    const char *device_id;
    struct {
        bool async, host_buffer, buffer_from_host_ptr, events, mmap_support;
    } caps;
} gx_device_props;

typedef struct gx_device_i {
    const char *(*get_name)(gx_device *);
    const char *(*get_description)(gx_device *);
    void (*get_memory)(gx_device *, size_t *, size_t *);
    int (*get_type)(gx_device *);
    void (*get_props)(gx_device *, gx_device_props *);
    gx_backend *(*init_backend)(gx_device *, const char *);
    gx_buft *(*get_buffer_type)(gx_device *);
    gx_buft *(*get_host_buffer_type)(gx_device *);
    gx_buffer *(*buffer_from_host_ptr)(gx_device *, void *, size_t, size_t);
    bool (*supports_op)(gx_device *, const gx_tensor *);
    bool (*supports_buft)(gx_device *, gx_buft *);
    bool (*offload_op)(gx_device *, const gx_tensor *);
    gx_event (*event_new)(gx_device *);
    void (*event_free)(gx_device *, gx_event);
    void (*event_synchronize)(gx_device *, gx_event);
} gx_device_i;

struct gx_device {
    gx_device_i iface;
    gx_reg *reg;
    void *context;
};

typedef struct gx_reg_i {
    const char *(*get_name)(gx_reg *);
    size_t (*get_device_count)(gx_reg *);
    gx_device *(*get_device)(gx_reg *, size_t);
    void *(*get_proc_address)(gx_reg *, const char *);
} gx_reg_i;

struct gx_reg {
    int api_version;
    gx_reg_i iface;
    void *context;
};

/* ggml_graph_view returns its struct by value. Whatever its members are, a struct of more than 16 bytes
 * comes back through a pointer that the caller passes, so this needs only to be large enough. */
typedef struct gx_graph_value {
    uint64_t opaque[32];
} gx_graph_value;

typedef struct gx_init_params {
    size_t mem_size;
    void *mem_buffer;
    bool no_alloc;
} gx_init_params;

#endif
