/* ternary_internal.h: activations as the kernels take them. Not installed. */
#ifndef NEXUS_TERNARY_INTERNAL_H
#define NEXUS_TERNARY_INTERNAL_H

#include "nexus_ternary.h"

/* `start`: what the sums of each row begin at. Codes are one too large, so a row's result lacks the sum of
 * the activations; with sums that hold several rows (see nexus_ternary.h) that is -1, -5, -21 and -85
 * times what ggml calls bsums. Where they go is fixed by ggml's order of summing: lane i of 8 takes the
 * sum of inputs 32 i .. 32 i + 31. `d` comes divided by 1, 4, 16 and 64: the sums of row r are 4^r times
 * too large, which is exact as long as it is no denormal number (NX_SMALLEST_SCALE). */
typedef struct nx_act_256 { /* Q8_K: 256 inputs */
    float d[4];
    float unused[12];
    int32_t start[4][8];
    int8_t q[256];
} nx_act_256;

typedef struct nx_act_64 { /* two blocks of Q8_0 */
    float d[2][4];
    int32_t start[2][4];
    int8_t q[64];
    /* For rows as they are stored, four neighbours a byte: plane[16 p + i] is input 4 i + p. A sum over the
     * four planes is then one of inputs 0..15, 16..31, ... in each 32-bit lane: two lanes a block. */
    int8_t plane[64];
    float plane_d[4];
    int32_t plane_start[4];
    int32_t unused[8];
} nx_act_64;

typedef struct nx_act_128 { /* four blocks of Q8_0, for single bits: a bit b weighs 2 b - 1, so a lane's sum of */
    float d[4];             /* products is twice that of the bits less `lane`, the sum of its four inputs */
    float unused[12];
    float lane[4][8];
    int8_t q[128];
} nx_act_128;

#define NX_SMALLEST_SCALE 0x1p-80f

#define NX_MOST_COLUMNS 4 /* of one call of a tile */

#endif
