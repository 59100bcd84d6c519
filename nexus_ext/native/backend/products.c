/* products.c: products with many columns, computed by kernels of ours (nexus_products.h).
 *
 * For the quantizations that our kernels know, the delegate multiplies the tokens of an expert one at a time,
 * and so it does with sequences that are decoded together (columns.c). Such a node is replaced by two
 * custom ones, when there are enough columns; a plain matrix counts as the only expert:
 *
 *   pack      the tokens, rounded to 8 bits by ggml's own function; list which of them go to which expert
 *   multiply  rows of an expert, unpacked once, with all its tokens; ranges of rows are taken by whichever
 *             thread is free
 *
 * The result is bit by bit the delegate's. Whether that is so is found out before the first use, by comparing
 * our kernels with this ggml's dot products; a type that differs stays with the delegate, and so do all with
 * NEXUS_BATCH_KERNELS=0 in the environment.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* dladdr */
#endif
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nexus_products.h"
#include "groups.h"
#include "walk.h"

#define LEAST_SHARE 2 /* columns for each expert on average; with more there is something to share */
#define COLUMNS_AT_ONCE 32
#define DEFAULT_THREADS 4 /* ggml's, where nobody has said how many */

/* What ggml_get_type_traits_cpu returns. */
typedef struct gx_cpu_traits {
    void (*from_float)(const float *, void *, int64_t);
    void (*vec_dot)(int, float *, size_t, const void *, size_t, const void *, size_t, int);
    int32_t vec_dot_type;
    int64_t n_rows; /* that one call computes */
} gx_cpu_traits;

/* What this process's ggml lets us do; found out once. */
static struct {
    pthread_once_t once;
    int32_t types[NX_PRODUCT_COUNT]; /* ggml's number of each type that is computed here, or -1 */
    void (*round[NX_PRODUCT_COUNT])(const float *, void *, int64_t); /* columns, to 8 bits */
    char names[64];
    uint64_t n_computed; /* atomic */
} known = {.once = PTHREAD_ONCE_INIT};

/* -- does this ggml sum as we do? ---------------------------------------------------------------- */

#define TEST_IN 512
#define TEST_COLUMNS 5

static uint32_t next_bits(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

/* Somewhere in a block: two bytes of any half that is neither infinite nor NaN. */
static void any_half(uint8_t *at, uint64_t *state) {
    at[1] = (uint8_t)((next_bits(state) & 0x80) | (0x18 + next_bits(state) % 24));
}

/* A row of any bits, with scales that are numbers. */
static void any_row(nx_product_type type, uint8_t *row, uint64_t *state) {
    const size_t n_bytes = nx_product_row_bytes(type, TEST_IN), block = nx_product_block_bytes(type);
    for (size_t i = 0; i < n_bytes; i++) row[i] = (uint8_t)next_bits(state);
    for (size_t at = 0; at < n_bytes; at += block) {
        if (type == NX_PRODUCT_MXFP4) row[at] = (uint8_t)(next_bits(state) % 16 + (at % 7 ? 118 : 0));
        else any_half(row + at + (type == NX_PRODUCT_Q6_K ? 208 : 0), state);
        if (type == NX_PRODUCT_Q4_K) any_half(row + at + 2, state);
    }
}

static bool same_bits(nx_product_type type, const gx_cpu_traits *traits) {
    uint64_t state = 42;
    uint8_t any[NX_PRODUCT_ROWS][TEST_IN * 2], rounded[TEST_COLUMNS][TEST_IN * 2];
    char *packed = malloc(TEST_COLUMNS * nx_column_bytes(type, TEST_IN));
    void *unpacked = NULL;
    bool same = packed && posix_memalign(&unpacked, 64, nx_unpacked_bytes(type, TEST_IN)) == 0;
    const void *rows[NX_PRODUCT_ROWS], *columns[TEST_COLUMNS];
    float values[TEST_COLUMNS][NX_PRODUCT_ROWS], *out[TEST_COLUMNS];
    for (int repeat = 0; repeat < 4 && same; repeat++) {
        for (size_t r = 0; r < NX_PRODUCT_ROWS; r++) {
            any_row(type, any[r], &state);
            rows[r] = any[r];
        }
        for (size_t c = 0; c < TEST_COLUMNS; c++) {
            float x[TEST_IN];
            for (int i = 0; i < TEST_IN; i++) x[i] = ldexpf((float)(next_bits(&state) % 65536) - 32768.0f, -12 - (int)c);
            known.round[type](x, rounded[c], TEST_IN);
            columns[c] = packed + c * nx_column_bytes(type, TEST_IN);
            nx_column_pack(type, rounded[c], TEST_IN, packed + c * nx_column_bytes(type, TEST_IN));
            out[c] = values[c];
        }
        nx_product_unpack(type, rows, TEST_IN, unpacked);
        nx_product_multiply(type, unpacked, NX_PRODUCT_ROWS, TEST_IN, columns, TEST_COLUMNS, out);
        for (size_t i = 0; i < TEST_COLUMNS * NX_PRODUCT_ROWS && same; i++) {
            const size_t c = i / NX_PRODUCT_ROWS, r = i % NX_PRODUCT_ROWS;
            float theirs;
            traits->vec_dot(TEST_IN, &theirs, 0, rows[r], 0, rounded[c], 0, 1);
            same = memcmp(&theirs, &values[c][r], sizeof theirs) == 0;
        }
    }
    free(packed);
    free(unpacked);
    return same;
}

static int32_t type_named(const char *name) {
    for (int32_t i = 0; i < 64; i++) {
        const char *candidate = gx.type_name(i);
        if (candidate && strcmp(candidate, name) == 0) return i;
    }
    return -1;
}

/* The CPU backend may be part of the library that we know, or lie in one of its own. */
static void *cpu_function(const char *name) {
    void *symbol = dlsym(gx.host, name);
    Dl_info info;
    const gx_reg *reg = gx.backend_dev_backend_reg(nxb_delegate.device);
    void *inside = NULL;
    memcpy(&inside, &reg->iface.get_name, sizeof inside);
    if (symbol || !dladdr(inside, &info) || !info.dli_fname) return symbol;
    void *library = dlopen(info.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
    if (!library) return NULL;
    symbol = dlsym(library, name);
    dlclose(library); /* a backend stays loaded as long as its device is in use */
    return symbol;
}

static void find_out(void) {
    for (int t = 0; t < NX_PRODUCT_COUNT; t++) known.types[t] = -1;
    const char *wanted = getenv("NEXUS_BATCH_KERNELS");
    if (gx.op_custom < 0 || !gx.view_nodes || !nx_products_usable() || (wanted && strcmp(wanted, "0") == 0)) return;
    const gx_cpu_traits *(*traits_of)(int32_t) = NULL;
    void *symbol = cpu_function("ggml_get_type_traits_cpu");
    if (!symbol) return;
    memcpy(&traits_of, &symbol, sizeof traits_of);
    for (int t = 0; t < NX_PRODUCT_COUNT; t++) {
        const int32_t number = type_named(nx_product_name((nx_product_type)t));
        const int32_t column = type_named(nx_product_column_name((nx_product_type)t));
        const gx_cpu_traits *traits = number < 0 ? NULL : traits_of(number);
        known.round[t] = column < 0 ? NULL : traits_of(column)->from_float;
        if (traits && traits->vec_dot && traits->vec_dot_type == column && traits->n_rows == 1 && known.round[t] &&
            same_bits((nx_product_type)t, traits))
            known.types[t] = number;
        if (known.types[t] < 0) continue;
        const size_t length = strlen(known.names);
        snprintf(known.names + length, sizeof known.names - length, "%s%s", length ? " " : "",
                 nx_product_name((nx_product_type)t));
    }
}

NX_API const char *nx_backend_batch_types(void) {
    if (nxb_delegate.device) pthread_once(&known.once, find_out);
    return known.names;
}

NX_API uint64_t nx_backend_batch_products(void) { return __atomic_load_n(&known.n_computed, __ATOMIC_RELAXED); }

/* NX_PRODUCT_COUNT: not one of ours. */
static nx_product_type type_of(const gx_tensor *weight) {
    pthread_once(&known.once, find_out);
    if (!nx_products_usable()) return NX_PRODUCT_COUNT; /* somebody has chosen other instructions since */
    int t = 0;
    while (t < NX_PRODUCT_COUNT && known.types[t] != weight->type) t++;
    return (nx_product_type)t;
}

/* -- one product --------------------------------------------------------------------------------- */

/* Custom nodes are computed one after the other; what they need beside their tensors is shared. */
struct nxb_products {
    gx_tensor **nodes; /* of one segment */
    size_t nodes_capacity;
    gx_tensor *tensors;
    size_t tensors_capacity;
    struct job *jobs;
    size_t n_jobs, jobs_capacity;
    char *packed; /* tokens */
    size_t packed_capacity;
    char *scratch; /* of each thread: rows that are unpacked, a token that is rounded */
    size_t scratch_capacity;
    int n_threads; /* that have scratch; more do not help */
    nxb_groups groups;
    nxb_backend *own;
};

typedef struct job {
    struct nxb_products *shared;
    nx_product_type type;
    uint32_t next; /* range of rows that no thread has taken; atomic */
} job;

static bool grow(void *memory, size_t *capacity, size_t wanted) {
    void **at = memory;
    if (wanted <= *capacity) return true;
    free(*at);
    *capacity = 0;
    if (posix_memalign(at, 64, wanted) != 0) *at = NULL;
    if (*at) *capacity = wanted;
    return *at != NULL;
}

static int64_t n_picked(const gx_tensor *node) {
    return node->src[2] ? node->src[2]->ne[0] * node->src[2]->ne[1] : node->src[1]->ne[2];
}
static uint32_t n_in(const gx_tensor *node) { return (uint32_t)node->src[0]->ne[0]; }
/* Of one thread. A token that is rounded is smaller than rows that are unpacked. */
static size_t scratch_bytes(const gx_tensor *node, nx_product_type type) { return nx_unpacked_bytes(type, n_in(node)); }

/* What nxb_products_some noted, in parameters that ggml has no use for here; 0 rows: nothing. */
typedef struct some {
    int32_t n_rows, n_experts;
} some;
#define SOME_AT 14
static some some_of(const gx_tensor *node) { return (some){node->op_params[SOME_AT], node->op_params[SOME_AT + 1]}; }

/* Does the delegate compute it column by column? */
static bool is_by_column(const gx_tensor *node) {
    const gx_tensor *w = node->src[0], *x = node->src[1], *ids = node->src[2];
    if (node->op == gx.op_mul_mat_id) return ids->type == gx.type_i32 && ids->ne[2] == 1 && ids->ne[3] == 1;
    return node->op == gx.op_mul_mat && !ids && w->ne[2] == 1 && x->ne[1] == 1 && node->op_params[1] == 0;
}

static bool is_ours(const gx_tensor *node) {
    if (node->op != gx.op_mul_mat_id && node->op != gx.op_mul_mat) return false;
    const gx_tensor *w = node->src[0], *x = node->src[1];
    const some s = some_of(node);
    const int64_t n_rows = s.n_rows ? s.n_rows : n_picked(node), n_experts = s.n_rows ? s.n_experts : w->ne[2];
    if (!is_by_column(node) || n_rows <= LEAST_SHARE * n_experts || n_picked(node) > INT32_MAX || w->extra ||
        w->ne[3] != 1 || w->ne[0] > INT32_MAX || x->type != gx.type_f32 || x->nb[0] != sizeof(float) || x->ne[3] != 1 ||
        node->type != gx.type_f32 || node->nb[0] != sizeof(float))
        return false;
    const nx_product_type type = type_of(w);
    if (type == NX_PRODUCT_COUNT || nx_product_row_bytes(type, (uint32_t)w->ne[0]) == 0) return false;
    return node->op == gx.op_mul_mat || !nx_product_is_k(type); /* ggml has tiles for experts of K types */
}

bool nxb_products_some(gx_tensor *node, int64_t n_rows, int64_t n_experts) {
    if (n_rows > INT32_MAX || n_experts > INT32_MAX) return false;
    node->op_params[SOME_AT] = (int32_t)n_rows;
    node->op_params[SOME_AT + 1] = (int32_t)n_experts;
    if (n_rows && is_ours(node)) return true;
    node->op_params[SOME_AT] = node->op_params[SOME_AT + 1] = 0;
    return false;
}

/* Is row `i` of x of a product of some rows only one of those? A row for all picks of a token always is. */
static bool is_wanted(const gx_tensor *node, int64_t i) {
    const gx_tensor *x = node->src[1], *ids = node->src[2];
    if (!some_of(node).n_rows || x->ne[1] != ids->ne[0] || x->ne[1] == 1) return true;
    return *(const int32_t *)((const char *)ids->data + (size_t)i * sizeof(int32_t)) >= 0; /* see experts.c */
}

static void pack(gx_tensor *node, int ith, int nth, void *argument) {
    const job *j = argument;
    struct nxb_products *s = j->shared;
    if (nth > s->n_threads) nth = s->n_threads;
    if (ith >= nth) return;
    const gx_tensor *x = node->src[1];
    const size_t column_bytes = nx_column_bytes(j->type, n_in(node));
    char *rounded = s->scratch + (size_t)ith * scratch_bytes(node, j->type);
    for (int64_t i = ith; i < x->ne[1] * x->ne[2]; i += nth) {
        if (!is_wanted(node, i)) continue;
        const char *from = (const char *)x->data + (size_t)(i % x->ne[1]) * x->nb[1] + (size_t)(i / x->ne[1]) * x->nb[2];
        known.round[j->type]((const float *)from, rounded, x->ne[0]);
        nx_column_pack(j->type, rounded, n_in(node), s->packed + (size_t)i * column_bytes);
    }
    if (ith == nth - 1)
        nxb_groups_sort(&s->groups, node, n_picked(node), some_of(node).n_rows != 0, &s->own->failure);
}

/* The tokens of a group, some at a time: what they are multiplied as, and where row `row` of the result goes. */
static void find_columns(const gx_tensor *node, const job *j, const uint32_t *group, size_t n, int64_t row,
                         const void **columns, float **out) {
    const uint32_t n_picks = node->src[2] ? (uint32_t)node->src[2]->ne[0] : 1; /* of a token, as groups count them */
    const size_t wide = (size_t)node->src[1]->ne[1];
    for (size_t i = 0; i < n; i++) { /* x has one row for all picks, or one for each */
        const uint32_t token = group[i] / n_picks, k = group[i] % n_picks;
        columns[i] = j->shared->packed + (token * wide + k % wide) * nx_column_bytes(j->type, n_in(node));
        out[i] = (float *)(void *)((char *)node->data + k * node->nb[1] + token * node->nb[2]) + row;
    }
}

/* `n_rows` rows of the weight of group `e`, times all its tokens. */
static void multiply_rows(const gx_tensor *node, const job *j, char *unpacked, size_t e, int64_t first, int64_t n_rows) {
    const struct nxb_products *s = j->shared;
    const gx_tensor *w = node->src[0];
    const char *weight = (const char *)w->data + s->groups.experts[e] * w->nb[2];
    const void *rows[NX_PRODUCT_ROWS];
    for (int64_t i = 0; i < NX_PRODUCT_ROWS; i++) rows[i] = weight + (size_t)(first + (i < n_rows ? i : 0)) * w->nb[1];
    nx_product_unpack(j->type, rows, n_in(node), unpacked);
    for (uint32_t at = s->groups.starts[e], end = s->groups.starts[e + 1]; at < end; at += COLUMNS_AT_ONCE) {
        const void *columns[COLUMNS_AT_ONCE];
        float *out[COLUMNS_AT_ONCE];
        const size_t n = end - at < COLUMNS_AT_ONCE ? end - at : COLUMNS_AT_ONCE;
        find_columns(node, j, s->groups.rows + at, n, first, columns, out);
        nx_product_multiply(j->type, unpacked, (uint32_t)n_rows, n_in(node), columns, n, out);
    }
}

static void multiply(gx_tensor *node, int ith, int nth, void *argument) {
    (void)nth;
    job *j = argument;
    if (ith >= j->shared->n_threads) return;
    char *unpacked = j->shared->scratch + (size_t)ith * scratch_bytes(node, j->type);
    const int64_t n_rows = node->src[0]->ne[1];
    const uint32_t ranges = (uint32_t)((n_rows + NX_PRODUCT_ROWS - 1) / NX_PRODUCT_ROWS);
    for (;;) {
        const uint32_t at = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED);
        if (at / ranges >= j->shared->groups.n_experts) return;
        if (ith == 0) nxb_reads_go_on(j->shared->own);
        const int64_t first = (int64_t)(at % ranges) * NX_PRODUCT_ROWS, left = n_rows - first;
        multiply_rows(node, j, unpacked, at / ranges, first, left < NX_PRODUCT_ROWS ? left : NX_PRODUCT_ROWS);
    }
}

/* -- putting nodes in ---------------------------------------------------------------------------- */

static bool reserve(struct nxb_products *s, const gx_tensor *node) {
    const gx_tensor *x = node->src[1];
    const nx_product_type type = type_of(node->src[0]);
    const size_t n_experts = (size_t)node->src[0]->ne[2];
    return grow(&s->packed, &s->packed_capacity, (size_t)(x->ne[1] * x->ne[2]) * nx_column_bytes(type, n_in(node))) &&
           grow(&s->scratch, &s->scratch_capacity, (size_t)s->n_threads * scratch_bytes(node, type)) &&
           nxb_groups_reserve(&s->groups, (size_t)n_picked(node), n_experts);
}

static gx_tensor *custom(struct nxb_products *s, const gx_tensor *node, nxb_custom_function function) {
    job *j = &s->jobs[s->n_jobs];
    gx_tensor *t = &s->tensors[s->n_jobs++];
    *j = (job){.shared = s, .type = type_of(node->src[0])};
    *t = *node;
    nxb_make_custom(t, function, j);
    return t;
}

/* Is it the same value? Nodes that stand for others (columns.c) have copies of their sources, and memory is
 * used again for other values, so what it is computed from must be the same as well. */
static bool is_same(const gx_tensor *a, const gx_tensor *b) {
    return a == b || (a && b && a->data == b->data && a->op == b->op && !memcmp(a->ne, b->ne, sizeof a->ne) &&
                      !memcmp(a->nb, b->nb, sizeof a->nb) && !memcmp(a->src, b->src, sizeof a->src) &&
                      !memcmp(a->op_params, b->op_params, sizeof a->op_params) && a->view_src == b->view_src);
}

/* Write the nodes to compute to `out`; those of products that share tokens and router share the first steps. */
static int expand(struct nxb_products *s, gx_tensor **nodes, int n, gx_tensor **out) {
    const gx_tensor *packed = NULL;
    int n_out = 0;
    for (int i = 0; i < n; i++) {
        if (!is_ours(nodes[i])) {
            out[n_out++] = nodes[i];
            continue;
        }
        const bool again = packed && is_same(packed->src[1], nodes[i]->src[1]) &&
                           is_same(packed->src[2], nodes[i]->src[2]) && packed->src[0]->type == nodes[i]->src[0]->type &&
                           packed->src[0]->ne[2] == nodes[i]->src[0]->ne[2];
        if (!again) out[n_out++] = custom(s, nodes[i], pack);
        out[n_out++] = custom(s, nodes[i], multiply);
        packed = nodes[i];
    }
    return n_out;
}

int nxb_products_replace(nxb_backend *own, gx_tensor ***nodes, int *n) {
    int n_ours = 0;
    for (int i = 0; i < *n; i++) n_ours += is_ours((*nodes)[i]);
    if (!n_ours) return GX_SUCCESS;
    if (!own->products) own->products = calloc(1, sizeof *own->products);
    struct nxb_products *s = own->products;
    if (!s) return GX_ALLOC_FAILED;
    s->own = own;
    s->n_threads = own->n_threads_asked > 0 ? own->n_threads_asked : DEFAULT_THREADS;
    for (int i = 0; i < *n; i++)
        if (is_ours((*nodes)[i]) && !reserve(s, (*nodes)[i])) return GX_ALLOC_FAILED;
    const size_t most_jobs = 2 * (size_t)n_ours;
    if (!grow(&s->nodes, &s->nodes_capacity, ((size_t)*n + most_jobs) * sizeof *s->nodes) ||
        !grow(&s->tensors, &s->tensors_capacity, most_jobs * sizeof *s->tensors) ||
        !grow(&s->jobs, &s->jobs_capacity, most_jobs * sizeof *s->jobs))
        return GX_ALLOC_FAILED;
    s->n_jobs = 0;
    __atomic_fetch_add(&known.n_computed, (uint64_t)n_ours, __ATOMIC_RELAXED);
    *n = expand(s, *nodes, *n, s->nodes);
    *nodes = s->nodes;
    return GX_SUCCESS;
}

void nxb_products_free(nxb_backend *own) {
    struct nxb_products *s = own->products;
    if (!s) return;
    free(s->nodes);
    free(s->tensors);
    free(s->jobs);
    free(s->packed);
    free(s->scratch);
    nxb_groups_free(&s->groups);
    free(s);
    own->products = NULL;
}
