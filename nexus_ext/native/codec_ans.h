/* codec_ans.h: what encoder, decoder and the loops for each instruction set share. */
#ifndef NEXUS_CODEC_ANS_H
#define NEXUS_CODEC_ANS_H

#include "nexus_codec.h"

#define ANS_LANES 64u
#define ANS_SCALE_BITS 12u
#define ANS_SCALE (1u << ANS_SCALE_BITS)
#define ANS_LOW (1u << 16) /* states are at least this: below, a word is taken */
#define ANS_VERSION 1u
#define ANS_HEAD 8u        /* bytes before the planes */
#define ANS_PLANE 12u      /* bytes of one plane's description */

enum { ANS_MODE_RAW = 0, ANS_MODE_VALUE = 1, ANS_MODE_CODED = 2 };

/* One coded plane while it is decoded. */
typedef struct ans_stream {
    uint32_t state[ANS_LANES];
    const uint8_t *words, *end; /* 16-bit words that were not taken yet; end - words is even */
    /* By the low 12 bits of a state: (offset in its range) << 20 | frequency << 8 | symbol. */
    uint32_t slot[ANS_SCALE];
} ans_stream;

/* Decode `n_rounds` rounds of ANS_LANES symbols; return how many could be: the rest needs care,
 * because a round may take more words than there are. */
typedef size_t (*ans_rounds)(ans_stream *, uint8_t *out, size_t n_rounds);

size_t nx_ans_rounds_avx2(ans_stream *, uint8_t *out, size_t n_rounds);
size_t nx_ans_rounds_avx512(ans_stream *, uint8_t *out, size_t n_rounds);
size_t nx_ans_rounds_neon(ans_stream *, uint8_t *out, size_t n_rounds);

static inline uint8_t ans_symbol(uint32_t slot) { return (uint8_t)slot; }

/* The state without the symbol, before it takes a word. */
static inline uint32_t ans_step(uint32_t x, uint32_t slot) {
    return (slot >> 8 & (ANS_SCALE - 1)) * (x >> ANS_SCALE_BITS) + (slot >> 20);
}

static inline uint32_t ans_load32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline uint32_t ans_load16(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8;
}

#endif
