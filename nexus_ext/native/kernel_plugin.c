/* kernel_plugin.c: weights whose products a plugin's kernel computes. */
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "attach_internal.h"
#include "core_internal.h"

/* A kernel that a model uses, until the model is freed. */
typedef struct nx_kernel_use {
    nxp_kernel table;
    struct nx_kernel_use *next;
} nx_kernel_use;

void nx_kernels_free(nx_model *m) {
    for (nx_kernel_use *use = m->kernels; use;) {
        nx_kernel_use *next = use->next;
        free(use);
        use = next;
    }
    m->kernels = NULL;
}

nx_status nx_kernel_check(const nxp_kernel *from, nxp_kernel *out, nx_error *error) {
    const size_t least = offsetof(nxp_kernel, multiply) + sizeof from->multiply;
    nx_plugin plugin;
    const nx_status status = nx_plugin_take(from ? &from->head : NULL, NXP_KERNEL, "kernel", least, out, sizeof *out,
                                            &plugin, error);
    if (status != NX_OK) return status;
    const char *wrong = !out->multiply ? "function `multiply`" : !out->type || !*out->type ? "type of weights" : NULL;
    if (!wrong && !out->column_bytes != !out->activate) wrong = "pair of `column_bytes` and `activate`, but one of them";
    if (!wrong) return NX_OK;
    nx_error_set(error, NX_E_INVALID, 0, "the kernel %s has no %s", plugin.info.name, wrong);
    return NX_E_INVALID;
}

static bool is_matrix(const nx_extent *e, const nxp_kernel *k) {
    return e->tier == NX_TIER_RAM && !e->elastic && e->ne[2] == 1 && e->ne[3] == 1 && e->pinned &&
           strcasecmp(e->type, k->type) == 0;
}

nx_status nx_model_use_kernel(nx_model *m, const nxp_kernel *from, const uint32_t *extents, size_t n,
                              uint32_t *n_taken, nx_error *error) {
    nxp_kernel table;
    *n_taken = 0;
    nx_status status = nx_kernel_check(from, &table, error);
    if (status != NX_OK) return status;
    nx_kernel_use *use = malloc(sizeof *use);
    if (!use) {
        nx_error_set(error, NX_E_NOMEM, 0, "no memory for the kernel %s", from->head.name);
        return NX_E_NOMEM;
    }
    pthread_mutex_lock(&m->load_lock);
    *use = (nx_kernel_use){table, m->kernels};
    m->kernels = use;
    for (size_t i = 0; i < n && status == NX_OK; i++) {
        nx_extent *e = extents[i] < m->n_extents ? &m->extents[extents[i]] : NULL;
        if (!e || !is_matrix(e, &table)) {
            nx_error_set(error, NX_E_INVALID, 0, "the kernel %s multiplies by resident matrices of type %s, not by %s",
                         table.head.name, table.type, e ? e->name : "a tensor that there is not");
            status = NX_E_INVALID;
            break;
        }
        nxp_matrix matrix = {.struct_size = sizeof matrix, .n_in = e->ne[0], .n_out = e->ne[1], .row_bytes = e->row_bytes};
        if (table.accepts && !table.accepts(table.user, &matrix)) continue;
        nx_attachment *a = nx_attachment_get(e);
        if (!a) {
            nx_error_set(error, NX_E_NOMEM, 0, "no memory for the kernel of %s", e->name);
            status = NX_E_NOMEM;
            break;
        }
        matrix.rows = e->pinned;
        a->matrix = matrix;
        a->kernel = &use->table;
        ++*n_taken;
    }
    pthread_mutex_unlock(&m->load_lock);
    return status;
}
