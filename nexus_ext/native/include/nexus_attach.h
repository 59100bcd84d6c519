/* nexus_attach.h: give a tensor of a model something that our own kernels compute with.
 *
 * A packed matrix (nexus_ternary.h) replaces the stored bytes of a resident weight. The manifest asks for
 * it ("kernels", see manifest.c); it happens when the weight is read.
 * A residual (nexus_residual.h) is added to the products of its matrix with a single column; prompts and
 * batches are left as they are. This changes what the model says, and is never done unless asked for.
 *
 * What is attached stays until the model is freed, so a graph may use it without a lock. The packed form of an
 * elastic weight comes and goes with it, under the model's turn.
 */
#ifndef NEXUS_ATTACH_H
#define NEXUS_ATTACH_H

#include "nexus_core.h"
#include "nexus_opencl.h"
#include "nexus_plugin.h"
#include "nexus_residual.h"
#include "nexus_ternary.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct nx_attachment {
    nx_residual_matrix residual;
    uint32_t residual_k; /* channels for each product; 0: off, or there is no residual. Atomic */
    nx_ternary packed;   /* codes NULL: the weight is as it was stored. Goes between two turns only */
    nx_opencl_matrix *opencl; /* the same on a device, instead of `packed`; NULL: not. Once there, it stays */
    const nxp_kernel *kernel; /* of a plugin, multiplies by `matrix`; NULL: none. Set before the first graph */
    nxp_matrix matrix;
    int has_residual;    /* written under the model's load_lock, as the one below; atomic */
    int released;        /* the stored bytes were given back: only `packed` or `opencl` has the weight */
    int given_up;        /* an operation that is not ours needed the stored bytes: not packed again */
} nx_attachment;

/* What is attached to an extent, or NULL. */
NX_API nx_attachment *nx_extent_attached(const nx_extent *);
/* Have the stored bytes of a packed weight in place again, for an operation that is not ours. The packed
 * matrix is given up for them (one on a device stays there), between two turns: not to be called with the
 * model's turn. After an error neither need be there, and the next call tries again. */
NX_API nx_status nx_extent_restore(nx_extent *);
/* How our kernels multiply by this weight as it is stored (in memory, in a slab, in a record): NX_TERNARY_TYPES
 * if the manifest does not ask for it, or no kernel here is worth it. */
NX_API nx_ternary_type nx_extent_own_type(const nx_extent *);
/* Products that our kernels computed, or those of plugins, in graphs, since the model was created. */
typedef enum nx_own_kind { NX_OWN_PACKED = 0, NX_OWN_STORED = 1, NX_OWN_OPENCL = 2, NX_OWN_PLUGIN = 3,
               NX_OWN_KINDS } nx_own_kind;
NX_API void nx_note_own(nx_model *, nx_own_kind);
NX_API uint64_t nx_model_n_own(const nx_model *, nx_own_kind);
/* How many weights are packed. */
NX_API uint32_t nx_model_n_packed(const nx_model *);

/* Attach the residual of tensor `name`, a matrix of shape n_in, n_out: `codes` of `codes_bytes`, `scales` of
 * n_out floats; both are copied. `k` channels are corrected for each product.
 * NX_E_INVALID: no such matrix, or sizes that do not fit it; NX_E_BUSY: it has one; NX_E_NOMEM. */
NX_API nx_status nx_model_attach_residual(nx_model *, const char *name, const void *codes, uint64_t codes_bytes,
                                          const float *scales, uint64_t n_scales, uint32_t k, nx_error *);
/* Correct `k` channels of this tensor's products from the next graph on; 0: none. NX_E_INVALID: nothing is
 * attached to a tensor of that name. */
NX_API nx_status nx_model_set_residual_k(nx_model *, const char *name, uint32_t k);
/* Bytes that attachments take. */
NX_API uint64_t nx_model_attached_bytes(const nx_model *);

#ifdef __cplusplus
}
#endif
#endif
