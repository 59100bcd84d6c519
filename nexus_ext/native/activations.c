/* activations.c: vectors that go into chosen weights. See nexus_activations.h. */
#include "nexus_activations.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    char *name;
    uint32_t n_channels; /* 0 until the first vector */
    size_t n_rows, capacity;
    float *rows;        /* [capacity][n_channels] */
    uint32_t *matrices; /* [capacity] */
} kept;

struct nx_activations {
    kept *weights;
    size_t n;
    size_t last; /* graphs use weights in the same order again and again: look at and behind the last one first */
    nx_status status;
};

nx_status nx_activations_create(const char *const *names, size_t n, nx_activations **out) {
    *out = NULL;
    nx_activations *a = calloc(1, sizeof *a);
    if (!a) return NX_E_NOMEM;
    a->weights = calloc(n ? n : 1, sizeof *a->weights);
    if (a->weights) a->n = n;
    bool complete = a->weights != NULL;
    for (size_t i = 0; i < a->n; i++) {
        a->weights[i].name = strdup(names[i]);
        complete = complete && a->weights[i].name;
    }
    if (!complete) {
        nx_activations_free(a);
        return NX_E_NOMEM;
    }
    *out = a;
    return NX_OK;
}

void nx_activations_free(nx_activations *a) {
    if (!a) return;
    for (size_t i = 0; i < a->n; i++) {
        free(a->weights[i].name);
        free(a->weights[i].rows);
        free(a->weights[i].matrices);
    }
    free(a->weights);
    free(a);
}

bool nx_activations_find(nx_activations *a, const char *name, size_t *i) {
    for (size_t k = 0; k < a->n; k++) {
        const size_t at = (a->last + k) % a->n;
        if (strcmp(a->weights[at].name, name) == 0) {
            *i = a->last = at;
            return true;
        }
    }
    return false;
}

/* Room for one vector more. */
static bool grown(kept *w) {
    if (w->n_rows < w->capacity) return true;
    const size_t capacity = w->capacity ? 2 * w->capacity : 256;
    float *rows = realloc(w->rows, capacity * w->n_channels * sizeof *rows);
    if (rows) w->rows = rows;
    uint32_t *matrices = realloc(w->matrices, capacity * sizeof *matrices);
    if (matrices) w->matrices = matrices;
    if (!rows || !matrices) return false;
    w->capacity = capacity;
    return true;
}

void nx_activations_add(nx_activations *a, size_t i, uint32_t n_channels, uint32_t matrix, const float *x) {
    kept *w = &a->weights[i];
    if (w->n_channels == 0) w->n_channels = n_channels;
    if (n_channels == 0 || w->n_channels != n_channels) {
        a->status = NX_E_INVALID;
        return;
    }
    if (!grown(w)) {
        a->status = NX_E_NOMEM;
        return;
    }
    memcpy(w->rows + w->n_rows * n_channels, x, n_channels * sizeof *x);
    w->matrices[w->n_rows++] = matrix;
}

nx_status nx_activations_status(const nx_activations *a) { return a->status; }

nx_status nx_activations_at(const nx_activations *a, size_t i, uint32_t *n_channels, size_t *n_rows,
                            const float **rows, const uint32_t **matrices) {
    if (i >= a->n) return NX_E_INVALID;
    const kept *w = &a->weights[i];
    *n_channels = w->n_channels;
    *n_rows = w->n_rows;
    *rows = w->rows;
    *matrices = w->matrices;
    return NX_OK;
}

void nx_activations_clear(nx_activations *a) {
    for (size_t i = 0; i < a->n; i++) a->weights[i].n_rows = 0;
}
