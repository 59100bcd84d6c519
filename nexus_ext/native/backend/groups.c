/* groups.c: the rows of a batch, sorted by their experts, see groups.h. */
#include "groups.h"

#include <stdlib.h>
#include <string.h>

void nxb_groups_free(nxb_groups *g) {
    free(g->rows);
    free(g->starts);
    free(g->experts);
}

bool nxb_groups_reserve(nxb_groups *g, size_t n_rows, size_t n_experts) {
    if (n_rows > g->rows_capacity) {
        free(g->rows);
        g->rows = malloc(n_rows * sizeof *g->rows);
        g->rows_capacity = g->rows ? n_rows : 0;
    }
    if (n_experts > g->experts_capacity) {
        free(g->starts);
        free(g->experts);
        g->starts = malloc((n_experts + 2) * sizeof *g->starts);
        g->experts = malloc(n_experts * sizeof *g->experts);
        g->experts_capacity = g->starts && g->experts ? n_experts : 0;
    }
    return n_rows <= g->rows_capacity && n_experts <= g->experts_capacity;
}

static int32_t expert_of(const gx_tensor *ids, int64_t row) {
    if (!ids) return 0;
    int32_t e;
    memcpy(&e, (const char *)ids->data + row / ids->ne[0] * (int64_t)ids->nb[1] + row % ids->ne[0] * (int64_t)ids->nb[0],
           sizeof e);
    return e;
}

void nxb_groups_sort(nxb_groups *g, const gx_tensor *node, int64_t n_rows, bool some, nxb_failure *failure) {
    const gx_tensor *ids = node->src[2];
    const int64_t n_experts = node->src[0]->ne[2];
    uint32_t *counts = g->starts; /* shifted by one: later where the next row of expert e goes */
    memset(counts, 0, ((size_t)n_experts + 2) * sizeof *counts);
    g->n_experts = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = 0; i < n_rows; i++) {
            const int32_t e = expert_of(ids, i);
            if (some && e < 0) continue;
            if (e < 0 || e >= n_experts) {
                if (!failure->failed)
                    nx_error_set(&failure->error, NX_E_INVALID, 0, "the router asks for expert %d of %s, which has %lld",
                                 e, node->src[0]->name, (long long)n_experts);
                failure->failed = true;
                return;
            }
            if (pass == 0) counts[e + 2]++;
            else g->rows[counts[e + 1]++] = (uint32_t)i;
        }
        for (int64_t e = 0; e < n_experts && pass == 0; e++) counts[e + 2] += counts[e + 1];
    }
    /* now counts[e] is where expert e begins and counts[e + 1] where it ends */
    const uint32_t n_sorted = counts[n_experts];
    size_t used = 0;
    for (int64_t e = 0; e < n_experts; e++) {
        const uint32_t begin = counts[e], end = counts[e + 1];
        if (begin == end) continue;
        counts[used] = begin; /* used <= e: nothing that is still needed */
        g->experts[used++] = (uint32_t)e;
    }
    counts[used] = n_sorted;
    g->n_experts = used;
}
