/* nexus_residual.h: what quantization lost, added back for the input channels that matter most.
 *
 * After y = Wq x with a quantized matrix Wq, the error (W - Wq) x is mostly made by the few channels of x
 * that are large. With R ~ W - Wq at four bits, y += R[:, S] x[S] over the k largest |x| repairs most of it
 * at a fraction k / n_in of R's traffic. Method: Park et al., "DecDEC", OSDI 2025, section 4: symmetric
 * codes with one scale per output channel, stored by input channel, S chosen anew for each token.
 *
 * Codes: R[o, c] ~ scales[o] * (code - 8), code 1..15. One input channel is one row of whole cache lines:
 * 64 bytes hold 128 output channels; nibble j (from the lowest) of the i-th little-endian 32-bit word is
 * output 16 j + i of the line. Outputs that do not exist have code 8, which is zero.
 */
#ifndef NEXUS_RESIDUAL_H
#define NEXUS_RESIDUAL_H

#include <stddef.h>
#include <stdint.h>

#include "nexus_status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define NX_RESIDUAL_LINE 128u /* output channels of one line; ranges of outputs begin at its multiples */

/* A residual as kernels see it; borrowed. */
typedef struct nx_residual_matrix {
    uint32_t n_in, n_out;
    const uint8_t *codes; /* n_in rows of nx_residual_row_bytes(n_out) */
    const float *scales;  /* n_out */
} nx_residual_matrix;

/* Bytes of one input channel. */
uint64_t nx_residual_row_bytes(uint32_t n_out);

/* Quantize rows (output channels) [begin, end) of a residual r of n_out rows and n_in columns; row o lies
 * at r + o * stride. `codes` (whole) and `scales` (n_out) are written for these rows only, so threads may
 * share them; `begin` is a multiple of NX_RESIDUAL_LINE, `end` as well unless it is n_out (NX_E_INVALID
 * otherwise, and for a value that is not finite). The scale of a row is the one of 32 candidates, equally
 * spaced up to max|r| / 7, with the smallest squared error (DecDEC, section 4.2). */
nx_status nx_residual_encode(const float *r, size_t stride, uint32_t n_in, uint32_t n_out, uint32_t begin,
                             uint32_t end, uint8_t *codes, float *scales);

/* The inverse: rows [begin, end) as floats, row o at r + (o - begin) * stride. */
void nx_residual_decode(const nx_residual_matrix *m, uint32_t begin, uint32_t end, float *r, size_t stride);

/* The k channels with the largest |x|, in ascending order; of equal ones the first. NaN counts as larger
 * than anything. Writes min(k, n) numbers and returns how many. */
size_t nx_residual_select(const float *x, uint32_t n, uint32_t k, uint32_t *channels);

/* The same, approximately, without sorting (DecDEC, section 4.3): |x| falls into 32 buckets, 16 between
 * `high` and `low` and 16 below `low`; whole buckets are taken from the top, and of the last one the first
 * channels. `high`: the largest |x| seen in calibration, `low`: the largest k-th |x|. */
size_t nx_residual_select_buckets(const float *x, uint32_t n, uint32_t k, float high, float low,
                                  uint32_t *channels);

/* What each code of the chosen channels is worth: products[16 i + code] = x[channels[i]] * (code - 8). */
void nx_residual_products(const float *x, const uint32_t *channels, size_t n, float *products);

/* y[o] += scales[o] * sum over i of products[16 i + code of (o, channels[i])], for o in [begin, end).
 * `begin` is a multiple of NX_RESIDUAL_LINE. `sums` is scratch for end - begin floats, rounded up to whole
 * lines. The sum is in the order of `channels`, in float, so every implementation and every split over
 * threads gives the same bits. */
void nx_residual_add(const nx_residual_matrix *m, const uint32_t *channels, const float *products, size_t n,
                     uint32_t begin, uint32_t end, float *sums, float *y);

#ifdef __cplusplus
}
#endif
#endif
