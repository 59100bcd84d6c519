/* attach.c: see nexus_attach.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "attach_internal.h"
#include "core_internal.h"
#include "nexus_residency.h"

nx_attachment *nx_extent_attached(const nx_extent *e) { return __atomic_load_n(&e->attached, __ATOMIC_ACQUIRE); }

nx_ternary_type nx_extent_own_type(const nx_extent *e) {
    if (!e->model->own_types || nx_extent_tier(e) == NX_TIER_HOST) return NX_TERNARY_TYPES;
    const nx_ternary_type t = nx_ternary_type_of(e->type);
    const bool fits = t != NX_TERNARY_TYPES && e->model->own_types >> t & 1 && e->ne[0] <= UINT32_MAX &&
                      e->ne[1] <= UINT32_MAX && e->ne[0] % nx_ternary_block(t) == 0;
    return fits && nx_ternary_stored_usable(t) ? t : NX_TERNARY_TYPES;
}

void nx_note_own(nx_model *m, nx_own_kind kind) {
    (void)__atomic_fetch_add(&m->own_products[kind], 1, __ATOMIC_RELAXED);
}

uint64_t nx_model_n_own(const nx_model *m, nx_own_kind kind) {
    return (unsigned)kind < NX_OWN_KINDS ? __atomic_load_n(&m->own_products[kind], __ATOMIC_RELAXED) : 0;
}

static uint64_t residual_bytes(const nx_residual_matrix *m) {
    return nx_round_up(m->n_in * nx_residual_row_bytes(m->n_out), NX_PAGE) + m->n_out * sizeof *m->scales;
}

void nx_attachments_free(nx_model *m) {
    for (uint32_t i = 0; i < m->n_extents; i++) {
        nx_attachment *a = m->extents[i].attached;
        if (!a) continue;
        if (a->has_residual) nx_memory_unmap((void *)(uintptr_t)a->residual.codes, residual_bytes(&a->residual));
        nx_ternary_free(&a->packed);
        nx_opencl_matrix_free(a->opencl);
        free(a);
    }
    nx_kernels_free(m);
}

uint64_t nx_model_attached_bytes(const nx_model *m) {
    pthread_mutex_t *lock = (pthread_mutex_t *)(uintptr_t)&m->lock; /* which is no part of what is const */
    uint64_t bytes = 0;
    pthread_mutex_lock(lock); /* elastic weights are packed and unpacked under it */
    for (uint32_t i = 0; i < m->n_extents; i++) {
        const nx_attachment *a = nx_extent_attached(&m->extents[i]);
        if (!a) continue;
        if (__atomic_load_n(&a->has_residual, __ATOMIC_ACQUIRE)) bytes += residual_bytes(&a->residual);
        bytes += a->packed.codes_bytes + a->packed.scales_bytes;
        if (a->opencl) bytes += nx_opencl_matrix_bytes(a->opencl);
    }
    pthread_mutex_unlock(lock);
    return bytes;
}

nx_attachment *nx_attachment_get(nx_extent *e) {
    nx_attachment *a = nx_extent_attached(e);
    if (a) return a;
    a = calloc(1, sizeof *a);
    if (a) __atomic_store_n(&e->attached, a, __ATOMIC_RELEASE);
    return a;
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
    uint8_t *memory = nx_memory_map(residual_bytes(&r));
    nx_status status = memory ? NX_OK : NX_E_NOMEM;
    if (memory) {
        memcpy(memory, codes, codes_bytes);
        float *copied = (float *)(void *)(memory + nx_round_up(codes_bytes, NX_PAGE));
        memcpy(copied, scales, n_scales * sizeof *scales);
        r.codes = memory;
        r.scales = copied;
        pthread_mutex_lock(&m->load_lock);
        nx_attachment *a = nx_attachment_get(e);
        status = !a ? NX_E_NOMEM : a->has_residual ? NX_E_BUSY : NX_OK;
        if (status == NX_OK) {
            a->residual = r;
            __atomic_store_n(&a->has_residual, 1, __ATOMIC_RELEASE);
            __atomic_store_n(&a->residual_k, k, __ATOMIC_RELEASE);
        }
        pthread_mutex_unlock(&m->load_lock);
        if (status != NX_OK) nx_memory_unmap(memory, residual_bytes(&r));
    }
    if (status == NX_E_NOMEM)
        nx_error_set(error, NX_E_NOMEM, ENOMEM, "%llu bytes for the residual of %s cannot be allocated",
                     (unsigned long long)residual_bytes(&r), name);
    if (status == NX_E_BUSY) nx_error_set(error, NX_E_BUSY, 0, "tensor %s has a residual already", name);
    return status;
}

nx_status nx_model_set_residual_k(nx_model *m, const char *name, uint32_t k) {
    const nx_extent *e = nx_model_find(m, name);
    nx_attachment *a = e ? nx_extent_attached(e) : NULL;
    if (!a || !__atomic_load_n(&a->has_residual, __ATOMIC_ACQUIRE)) return NX_E_INVALID;
    __atomic_store_n(&a->residual_k, k, __ATOMIC_RELEASE);
    return NX_OK;
}
