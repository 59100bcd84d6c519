#include "nexus_codec.h"

typedef struct {
    uint8_t rotate;
    uint8_t block;
    uint8_t n_planes;
    uint8_t offset[16];
    uint8_t width[16];
} nx_ans_layout;

typedef enum { NX_ANS_PORTABLE, NX_ANS_AVX2, NX_ANS_AVX512, NX_ANS_NEON, NX_ANS_PATHS } nx_ans_path;

size_t nx_ans_bound(size_t raw_bytes);
nx_status nx_ans_encode(const nx_ans_layout *layout, const void *raw, size_t raw_bytes, void *out,
                        size_t capacity, size_t *out_bytes);
nx_status nx_ans_decode(const void *stored, size_t stored_bytes, void *out, size_t raw_bytes);
int nx_ans_has(nx_ans_path path);
nx_ans_path nx_ans_best(void);
nx_status nx_ans_decode_by(nx_ans_path path, const void *stored, size_t stored_bytes, void *out,
                           size_t raw_bytes);
uint64_t nx_xxh3_64(const void *data, size_t n_bytes);
