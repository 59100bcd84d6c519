/* attach.c: see nexus_attach.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "attach_internal.h"
#include "core_internal.h"

nx_attachment *nx_extent_attached(const nx_extent *e) { return __atomic_load_n(&e->attached, __ATOMIC_ACQUIRE); }

static uint64_t residual_bytes(const nx_residual_matrix *m) {
    return nx_round_up(m->n_in * nx_residual_row_bytes(m->n_out), NX_PAGE) + m->n_out * sizeof *m->scales;
}

void nx_attachments_free(nx_model *m) {
    for (uint32_t i = 0; i < m->n_extents; i++) {
        nx_attachment *a = m->extents[i].attached;
        if (!a) continue;
        if (a->residual.codes) nx_memory_unmap((void *)(uintptr_t)a->residual.codes, residual_bytes(&a->residual));
        free(a);
    }
}

uint64_t nx_model_attached_bytes(const nx_model *m) {
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < m->n_extents; i++) {
        const nx_attachment *a = nx_extent_attached(&m->extents[i]);
        if (a && a->residual.codes) bytes += residual_bytes(&a->residual);
    }
    return bytes;
}

nx_status nx_model_attach_residual(nx_model *m, const char *name, const void *codes, uint64_t codes_bytes,
                                   const float *scales, uint64_t n_scales, uint32_t k, nx_error *error) {
    nx_extent *e = nx_model_find(m, name);
    if (!e) {
        nx_error_set(error, NX_E_INVALID, 0, "the model has no tensor %s", name);
        return NX_E_INVALID;
    }
    if (e->ne[2] != 1 || e->ne[3] != 1 || e->ne[0] > UINT32_MAX || e->ne[1] > UINT32_MAX ||
        e->tier == NX_TIER_HOST) {
        nx_error_set(error, NX_E_INVALID, 0, "tensor %s is no matrix that the backend multiplies by", name);
        return NX_E_INVALID;
    }
    nx_residual_matrix r = {.n_in = (uint32_t)e->ne[0], .n_out = (uint32_t)e->ne[1]};
    const uint64_t expected = r.n_in * nx_residual_row_bytes(r.n_out);
    if (codes_bytes != expected || n_scales != r.n_out) {
        nx_error_set(error, NX_E_INVALID, 0,
                     "the residual of %s has %llu bytes of codes and %llu scales; a matrix of %u to %u channels "
                     "takes %llu and %u",
                     name, (unsigned long long)codes_bytes, (unsigned long long)n_scales, r.n_in, r.n_out,
                     (unsigned long long)expected, r.n_out);
        return NX_E_INVALID;
    }
    nx_attachment *a = calloc(1, sizeof *a);
    uint8_t *memory = a ? nx_memory_map(residual_bytes(&r)) : NULL;
    if (!memory) {
        free(a);
        nx_error_set(error, NX_E_NOMEM, ENOMEM, "%llu bytes for the residual of %s cannot be allocated",
                     (unsigned long long)residual_bytes(&r), name);
        return NX_E_NOMEM;
    }
    memcpy(memory, codes, codes_bytes);
    float *copied = (float *)(void *)(memory + nx_round_up(codes_bytes, NX_PAGE));
    memcpy(copied, scales, n_scales * sizeof *scales);
    r.codes = memory;
    r.scales = copied;
    *a = (nx_attachment){.residual = r, .residual_k = k};
    nx_attachment *none = NULL;
    if (!__atomic_compare_exchange_n(&e->attached, &none, a, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        nx_memory_unmap(memory, residual_bytes(&r));
        free(a);
        nx_error_set(error, NX_E_BUSY, 0, "tensor %s has a residual already", name);
        return NX_E_BUSY;
    }
    return NX_OK;
}

nx_status nx_model_set_residual_k(nx_model *m, const char *name, uint32_t k) {
    const nx_extent *e = nx_model_find(m, name);
    nx_attachment *a = e ? nx_extent_attached(e) : NULL;
    if (!a || !a->residual.codes) return NX_E_INVALID;
    __atomic_store_n(&a->residual_k, k, __ATOMIC_RELAXED);
    return NX_OK;
}
