/* nexus_codec.h: the entropy coder of weights, and the hash of stored bytes.
 *
 * Knows bytes only: no files, no tensors. The encoding is defined in formats/SPEC.md, "ans". All
 * functions can be called from several threads at once.
 */
#ifndef NEXUS_CODEC_H
#define NEXUS_CODEC_H

#include <stddef.h>
#include <stdint.h>

#include "nexus_status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define NX_ANS_MAX_PLANES 16u
#define NX_ANS_MAX_BYTES 0x40000000u /* of one chunk, decoded */

/* How raw bytes are taken apart: blocks of `block` bytes, each into planes that cover it once. */
typedef struct nx_ans_layout {
    uint8_t rotate; /* 0, 2 or 4: little-endian words that are rotated left by one bit before */
    uint8_t block;  /* bytes, at least 1 */
    uint8_t n_planes;
    uint8_t offset[NX_ANS_MAX_PLANES];
    uint8_t width[NX_ANS_MAX_PLANES];
} nx_ans_layout;

/* Most bytes that an encoding of `raw_bytes` can have. */
size_t nx_ans_bound(size_t raw_bytes);

/*
 * Encode. `out` has room for `capacity` bytes; *out_bytes gets how many were used.
 * NX_E_INVALID: a layout that does not cover its block, or more than NX_ANS_MAX_BYTES. NX_E_NOMEM.
 */
nx_status nx_ans_encode(const nx_ans_layout *layout, const void *raw, size_t raw_bytes, void *out,
                        size_t capacity, size_t *out_bytes);

/*
 * Decode exactly `raw_bytes` into `out`. Any `stored` bytes are safe: NX_E_INVALID for those that
 * are no encoding of so many bytes, and then `out` holds anything. NX_E_NOMEM: it takes up to 300 KB
 * while it runs, whatever the bytes say.
 */
nx_status nx_ans_decode(const void *stored, size_t stored_bytes, void *out, size_t raw_bytes);

/* The instruction sets that decoding is written for; all give the same bytes. */
typedef enum nx_ans_path { NX_ANS_PORTABLE, NX_ANS_AVX2, NX_ANS_AVX512, NX_ANS_NEON, NX_ANS_PATHS } nx_ans_path;

/* 1: this machine has it. Of those that it has the last is the fastest. */
int nx_ans_has(nx_ans_path path);
nx_ans_path nx_ans_best(void);

/* As nx_ans_decode by a given path; NX_E_UNSUPPORTED where the machine does not have it. */
nx_status nx_ans_decode_by(nx_ans_path path, const void *stored, size_t stored_bytes, void *out,
                           size_t raw_bytes);

/* XXH3 with 64 bits and seed 0 (xxhash.com). */
uint64_t nx_xxh3_64(const void *data, size_t n_bytes);

#ifdef __cplusplus
}
#endif
#endif
