/* imatrix.c: sums of squares of activations by weight and input channel. See nexus_imatrix.h. */
#include "nexus_imatrix.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct nx_imatrix_entry {
    char name[NX_IMATRIX_NAME];
    uint32_t n_channels, n_matrices;
    double *sums;     /* [n_matrices][n_channels] */
    uint64_t *counts; /* [n_matrices] */
};

struct nx_imatrix {
    nx_imatrix_entry **entries;
    size_t n, capacity;
    size_t last; /* graphs use weights in the same order again and again: look behind the last one first */
    nx_status status;
};

nx_status nx_imatrix_create(nx_imatrix **out) {
    *out = calloc(1, sizeof **out);
    return *out ? NX_OK : NX_E_NOMEM;
}

static void entry_free(nx_imatrix_entry *e) {
    if (!e) return;
    free(e->sums);
    free(e->counts);
    free(e);
}

void nx_imatrix_free(nx_imatrix *im) {
    if (!im) return;
    for (size_t i = 0; i < im->n; i++) entry_free(im->entries[i]);
    free(im->entries);
    free(im);
}

static nx_imatrix_entry *entry_new(const char *name, uint32_t n_channels, uint32_t n_matrices) {
    nx_imatrix_entry *e = calloc(1, sizeof *e);
    if (!e) return NULL;
    strncpy(e->name, name, sizeof e->name - 1);
    e->n_channels = n_channels;
    e->n_matrices = n_matrices;
    e->sums = calloc((size_t)n_channels * n_matrices, sizeof *e->sums);
    e->counts = calloc(n_matrices, sizeof *e->counts);
    if (e->sums && e->counts) return e;
    entry_free(e);
    return NULL;
}

static nx_imatrix_entry *find(nx_imatrix *im, const char *name) {
    for (size_t k = 0; k < im->n; k++) {
        const size_t i = (im->last + 1 + k) % im->n;
        if (strncmp(im->entries[i]->name, name, sizeof im->entries[i]->name - 1) == 0) {
            im->last = i;
            return im->entries[i];
        }
    }
    return NULL;
}

nx_imatrix_entry *nx_imatrix_get(nx_imatrix *im, const char *name, uint32_t n_channels, uint32_t n_matrices) {
    nx_imatrix_entry *e = find(im, name);
    if (e) {
        if (e->n_channels == n_channels && e->n_matrices == n_matrices) return e;
        im->status = NX_E_INVALID;
        return NULL;
    }
    if (n_channels == 0 || n_matrices == 0) {
        im->status = NX_E_INVALID;
        return NULL;
    }
    if (im->n == im->capacity) {
        const size_t capacity = im->capacity ? 2 * im->capacity : 64;
        nx_imatrix_entry **entries = realloc(im->entries, capacity * sizeof *entries);
        if (!entries) {
            im->status = NX_E_NOMEM;
            return NULL;
        }
        im->entries = entries;
        im->capacity = capacity;
    }
    e = entry_new(name, n_channels, n_matrices);
    if (!e) {
        im->status = NX_E_NOMEM;
        return NULL;
    }
    im->last = im->n;
    im->entries[im->n++] = e;
    return e;
}

void nx_imatrix_add(nx_imatrix *im, nx_imatrix_entry *e, uint32_t matrix, const float *x) {
    if (matrix >= e->n_matrices) {
        im->status = NX_E_INVALID;
        return;
    }
    const uint32_t n = e->n_channels;
    double total = 0; /* finite exactly when every square is */
    for (uint32_t i = 0; i < n; i++) total += (double)x[i] * x[i];
    if (!isfinite(total)) {
        im->status = NX_E_INVALID;
        return;
    }
    double *sums = e->sums + (size_t)matrix * n;
    for (uint32_t i = 0; i < n; i++) sums[i] += (double)x[i] * x[i];
    e->counts[matrix]++;
}

nx_status nx_imatrix_status(const nx_imatrix *im) { return im->status; }

size_t nx_imatrix_count(const nx_imatrix *im) { return im->n; }

nx_status nx_imatrix_at(const nx_imatrix *im, size_t i, char name[NX_IMATRIX_NAME], uint32_t *n_channels,
                        uint32_t *n_matrices, const double **sums, const uint64_t **counts) {
    if (i >= im->n) return NX_E_INVALID;
    const nx_imatrix_entry *e = im->entries[i];
    memcpy(name, e->name, sizeof e->name);
    *n_channels = e->n_channels;
    *n_matrices = e->n_matrices;
    *sums = e->sums;
    *counts = e->counts;
    return NX_OK;
}
