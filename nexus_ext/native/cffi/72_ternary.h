#include "nexus_ternary.h"

typedef enum { NX_TQ1_0, NX_TQ2_0, NX_Q2_0, NX_Q1_0, NX_TERNARY_TYPES, ... } nx_ternary_type;

typedef struct {
    nx_ternary_type type;
    uint32_t n_in, n_out;
    uint8_t *codes;
    uint16_t *scales;
    float scale;
    uint64_t codes_bytes, scales_bytes;
} nx_ternary;

nx_ternary_type nx_ternary_type_of(const char *name);
uint32_t nx_ternary_block(nx_ternary_type);
uint32_t nx_ternary_block_bytes(nx_ternary_type);
uint32_t nx_ternary_row_unit(nx_ternary_type);
uint64_t nx_ternary_packed_bytes(nx_ternary_type, uint32_t n_in, uint32_t n_out);
nx_status nx_ternary_create(nx_ternary_type, uint32_t n_in, uint32_t n_out, nx_ternary *out);
void nx_ternary_pack(nx_ternary *, const void *rows, size_t stride, uint32_t begin, uint32_t end);
void nx_ternary_finish(nx_ternary *);
void nx_ternary_free(nx_ternary *);
void nx_ternary_unpack(const nx_ternary *, uint32_t begin, uint32_t end, float *out);
uint64_t nx_ternary_activation_bytes(nx_ternary_type, uint32_t n_in);
void nx_ternary_activate(nx_ternary_type, const float *x, uint32_t begin, uint32_t end, void *out);
void nx_ternary_multiply(const nx_ternary *, const void *columns, uint32_t n_columns, uint32_t begin,
                         uint32_t end, float *y, size_t y_stride);
int nx_ternary_stored_usable(nx_ternary_type);
void nx_ternary_multiply_stored(nx_ternary_type, const void *rows, size_t stride, uint32_t n_in,
                                const void *const *columns, uint32_t n_columns, uint32_t begin, uint32_t end,
                                float *const *y);

uint32_t nx_model_n_packed(const nx_model *);
typedef enum { NX_OWN_PACKED, NX_OWN_STORED, NX_OWN_OPENCL, NX_OWN_PLUGIN, NX_OWN_KINDS, ... } nx_own_kind;
uint64_t nx_model_n_own(const nx_model *, nx_own_kind);
