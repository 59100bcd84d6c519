/* products.c: products with quantized weights, computed otherwise than the delegate would.
 *
 * Such a node is replaced by two custom ones; a plain matrix counts as the only expert:
 *
 *   pack      the tokens, rounded to 8 bits by ggml's own function; list which of them go to which expert
 *   multiply  rows of an expert with all its tokens; ranges of rows are taken by whichever thread is free
 *
 * There are two ways to multiply:
 *
 *   many columns  For the types that our kernels know (nexus_products.h), the delegate multiplies the tokens of
 *                 an expert one at a time, and so it does with sequences that are decoded together (columns.c).
 *                 Here some rows are unpacked once for all tokens. Bit by bit the delegate's result: whether that
 *                 is so is found out before the first use, by comparing our kernels with this ggml's dot products;
 *                 a type that differs stays with the delegate.
 *   few columns   ggml's own dot products, with the rows that follow fetched meanwhile. A row is short, and what
 *                 processors fetch by themselves does not keep memory busy where it is far away.
 *
 * With NEXUS_BATCH_KERNELS=0 in the environment all stays with the delegate.
 */
#include <stdlib.h>
#include <string.h>

#include "groups.h"
#include "products.h"

#define LEAST_SHARE 2 /* columns for each expert on average; with more there is something to share */
#define COLUMNS_AT_ONCE 32
#define DEFAULT_THREADS 4 /* ggml's, where nobody has said how many */
#define FETCHED 4608      /* bytes between the row that is computed with and the one that is fetched */
#define LINE 64           /* bytes that one instruction fetches */
#define MOST_ROWS 64      /* of one weight that a thread takes at once */

static uint64_t n_computed; /* atomic */

NX_API uint64_t nx_backend_batch_products(void) { return __atomic_load_n(&n_computed, __ATOMIC_RELAXED); }

/* NX_PRODUCT_COUNT: not one of ours. */
static nx_product_type type_of(const gx_tensor *weight) {
    if (!nx_products_usable()) return NX_PRODUCT_COUNT; /* somebody has chosen other instructions since */
    int t = 0;
    while (t < NX_PRODUCT_COUNT && nxb_products_ways()->types[t] != weight->type) t++;
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
    nx_product_type type;    /* NX_PRODUCT_COUNT: */
    const nxb_dots *dots; /* few columns; else NULL */
    int64_t rows;            /* that are taken at once */
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
static size_t scratch_bytes(const gx_tensor *node, nx_product_type type) {
    return type == NX_PRODUCT_COUNT ? 0 : nx_unpacked_bytes(type, n_in(node));
}
/* Of a token, packed. */
static size_t column_bytes(const gx_tensor *node, nx_product_type type, const nxb_dots *dots) {
    return dots ? n_in(node) / dots->block * dots->block_bytes : nx_column_bytes(type, n_in(node));
}

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

/* How a product is computed here; neither: not at all. */
typedef struct way {
    nx_product_type type;    /* many columns; else NX_PRODUCT_COUNT */
    const nxb_dots *dots; /* few */
} way;

static bool has_our_form(const gx_tensor *node) {
    if (node->op != gx.op_mul_mat_id && node->op != gx.op_mul_mat) return false;
    const gx_tensor *w = node->src[0], *x = node->src[1];
    return is_by_column(node) && n_picked(node) <= INT32_MAX && !w->extra && w->ne[3] == 1 && w->ne[0] <= INT32_MAX &&
           x->type == gx.type_f32 && x->nb[0] == sizeof(float) && x->ne[3] == 1 && node->type == gx.type_f32 &&
           node->nb[0] == sizeof(float);
}

/* One token, of which no router picks an expert twice. */
static const nxb_dots *dots_of(const gx_tensor *node) {
    const gx_tensor *w = node->src[0], *x = node->src[1], *ids = node->src[2];
    if ((ids ? ids->ne[1] : x->ne[2]) != 1 || w->type < 0 || w->type >= NXB_TYPES) return NULL;
    const nxb_dots *dots = &nxb_products_ways()->dots[w->type];
    return dots->dot && w->ne[0] % dots->block == 0 ? dots : NULL;
}

static way way_of(const gx_tensor *node) {
    way none = {.type = NX_PRODUCT_COUNT};
    if (!has_our_form(node)) return none;
    const nxb_dots *dots = dots_of(node);
    if (dots) return (way){.type = NX_PRODUCT_COUNT, .dots = dots};
    const some s = some_of(node);
    const int64_t n_rows = s.n_rows ? s.n_rows : n_picked(node), n_experts = s.n_rows ? s.n_experts : node->src[0]->ne[2];
    const nx_product_type type = type_of(node->src[0]);
    if (n_rows <= LEAST_SHARE * n_experts || type == NX_PRODUCT_COUNT || nx_product_row_bytes(type, n_in(node)) == 0)
        return none;
    if (node->op == gx.op_mul_mat_id && nx_product_is_k(type)) return none; /* ggml has tiles for these */
    return (way){.type = type};
}

static bool is_ours(const gx_tensor *node) {
    const way w = way_of(node);
    return w.dots || w.type != NX_PRODUCT_COUNT;
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
    const size_t bytes = column_bytes(node, j->type, j->dots);
    char *rounded = s->scratch + (size_t)ith * scratch_bytes(node, j->type);
    for (int64_t i = ith; i < x->ne[1] * x->ne[2]; i += nth) {
        if (!is_wanted(node, i)) continue;
        const char *from = (const char *)x->data + (size_t)(i % x->ne[1]) * x->nb[1] + (size_t)(i / x->ne[1]) * x->nb[2];
        char *packed = s->packed + (size_t)i * bytes;
        if (j->dots) {
            j->dots->round((const float *)from, packed, x->ne[0]);
            continue;
        }
        nxb_products_ways()->round[j->type]((const float *)from, rounded, x->ne[0]);
        nx_column_pack(j->type, rounded, n_in(node), packed);
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
        columns[i] = j->shared->packed + (token * wide + k % wide) * column_bytes(node, j->type, j->dots);
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

/* The same by ggml's dot products, with what comes next fetched. */
static void dot_rows(const gx_tensor *node, const job *j, size_t e, int64_t first, int64_t n_rows) {
    const struct nxb_products *s = j->shared;
    const gx_tensor *w = node->src[0];
    const size_t row_bytes = w->nb[1];
    const char *row = (const char *)w->data + s->groups.experts[e] * w->nb[2] + (size_t)first * row_bytes;
    for (uint32_t at = s->groups.starts[e]; at < s->groups.starts[e + 1]; at++) {
        const void *column;
        float *out;
        find_columns(node, j, s->groups.rows + at, 1, first, &column, &out);
        for (int64_t r = 0; r < n_rows; r++) {
            const char *from = row + (size_t)r * row_bytes;
            for (size_t i = 0; i < row_bytes; i += LINE) __builtin_prefetch(from + FETCHED + i);
            j->dots->dot((int)w->ne[0], &out[r], 0, from, 0, column, 0, 1);
        }
    }
}

static void multiply(gx_tensor *node, int ith, int nth, void *argument) {
    (void)nth;
    job *j = argument;
    if (ith >= j->shared->n_threads && !j->dots) return;
    char *unpacked = j->shared->scratch + (size_t)ith * scratch_bytes(node, j->type);
    const int64_t n_rows = node->src[0]->ne[1];
    const uint32_t ranges = (uint32_t)((n_rows + j->rows - 1) / j->rows);
    for (;;) {
        const uint32_t at = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED);
        if (at / ranges >= j->shared->groups.n_experts) return;
        if (ith == 0) nxb_reads_go_on(j->shared->own);
        const int64_t first = (int64_t)(at % ranges) * j->rows, left = n_rows - first;
        if (j->dots) dot_rows(node, j, at / ranges, first, left < j->rows ? left : j->rows);
        else multiply_rows(node, j, unpacked, at / ranges, first, left < j->rows ? left : j->rows);
    }
}

/* -- putting nodes in ---------------------------------------------------------------------------- */

static bool reserve(struct nxb_products *s, const gx_tensor *node) {
    const gx_tensor *x = node->src[1];
    const way w = way_of(node);
    const size_t n_experts = (size_t)node->src[0]->ne[2];
    return grow(&s->packed, &s->packed_capacity, (size_t)(x->ne[1] * x->ne[2]) * column_bytes(node, w.type, w.dots)) &&
           grow(&s->scratch, &s->scratch_capacity, (size_t)s->n_threads * scratch_bytes(node, w.type)) &&
           nxb_groups_reserve(&s->groups, (size_t)n_picked(node), n_experts);
}

/* Many, since what is fetched behind the last of them is another thread's; but something for every thread. */
static int64_t rows_at_once(const struct nxb_products *s, const gx_tensor *node) {
    const int64_t share = node->src[0]->ne[1] * n_picked(node) / (4 * s->n_threads);
    return share < NX_PRODUCT_ROWS ? NX_PRODUCT_ROWS : share > MOST_ROWS ? MOST_ROWS : share;
}

static gx_tensor *custom(struct nxb_products *s, const gx_tensor *node, nxb_custom_function function) {
    job *j = &s->jobs[s->n_jobs];
    gx_tensor *t = &s->tensors[s->n_jobs++];
    const way w = way_of(node);
    *j = (job){.shared = s, .type = w.type, .dots = w.dots, .rows = w.dots ? rows_at_once(s, node) : NX_PRODUCT_ROWS};
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
    __atomic_fetch_add(&n_computed, (uint64_t)n_ours, __ATOMIC_RELAXED);
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
