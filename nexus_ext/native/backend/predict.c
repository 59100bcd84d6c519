/* predict.c: which experts the next layer's router will ask for, guessed while this layer's are read.
 *
 * "gate": the next router itself, applied to what is known now. Its nodes are in the graph: from the scores
 * that are sorted back to the product with the router's matrix, and on through the norm before it. They are
 * computed as copies, with the residual stream of this layer in place of the next one's, into memory of
 * ours. What a router is made of (softmax, sigmoid, biases, groups) need not be known. No node of the
 * graph is touched, so results cannot change.
 * "previous": what the next layer used for the token before. "popular": what it uses most.
 * A plugin's predictor (nexus_plugin.h) is told what each router decides, and asked for the next layer.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "nexus_predict.h"
#include "walk.h"

#define AHEAD 3   /* records that are read ahead for one token: those that are likeliest missed */
#define BESIDE 32 /* requests of other reads that spare reads for a batch are issued beside: any number */
#define MOST_NODES 32 /* of a router, norm included */
#define MOST_STEPS 24 /* on the way from the numbers of experts to the product with the router's matrix */

typedef struct nxb_predictor {
    gx_tensor nodes[MOST_NODES];
    const gx_tensor *of[MOST_NODES]; /* the node that each one is a copy of */
    size_t n;
    const gx_tensor *replaced; /* what the copies do not read, but `input` */
    gx_tensor input;
    char *memory; /* of the results of the copies */
    size_t used, capacity;
    int32_t *experts; /* [tokens][n_used], then [n_experts] numbers in order, then [n_experts] counts */
    size_t n_experts_capacity;
} predictor;

void nxb_predictor_free(predictor *p) {
    if (!p) return;
    free(p->memory);
    free(p->experts);
    free(p);
}

/* -- routers in the graph ------------------------------------------------------------------------- */

typedef struct router {
    const gx_tensor *ids, *scores; /* [n_used, tokens], [n_experts, tokens] */
    const gx_tensor *product;      /* with the router's matrix */
    const gx_tensor *norm;         /* whose scaled result is multiplied; NULL: there is none */
} router;

static bool is_op(const gx_tensor *t, const char *name) { return strcmp(gx.op_name(t->op), name) == 0; }
static bool is_leaf(const gx_tensor *t) { return t->op == gx.op_none && !t->view_src; }
static const gx_tensor *root(const gx_tensor *t) { return t->view_src ? t->view_src : t; }

static bool is_view(const gx_tensor *t) {
    return t->op == gx.op_view || t->op == gx.op_reshape || t->op == gx.op_permute || t->op == gx.op_transpose;
}

static bool find_router(const gx_tensor *ids, int64_t n_experts, router *found) {
    const gx_tensor *t = ids;
    *found = (router){.ids = ids};
    int steps = 0;
    for (; t && t->type != gx.type_f32 && steps < MOST_STEPS; steps++) t = t->src[0];
    if (!t || t->type != gx.type_f32 || t->ne[0] != n_experts || t->ne[1] != ids->ne[1] || t->ne[2] != 1) return false;
    found->scores = t;
    for (; t && steps < MOST_STEPS; steps++, t = t->src[0])
        if (t->op == gx.op_mul_mat && is_leaf(t->src[0]) && t->src[0]->ne[1] == n_experts) break;
    if (!t || steps == MOST_STEPS) return false;
    found->product = t;
    for (t = t->src[1]; t && (is_view(t) || is_op(t, "MUL")) && steps < MOST_STEPS; steps++) t = t->src[0];
    if (t && (is_op(t, "RMS_NORM") || is_op(t, "NORM"))) found->norm = t;
    return true;
}

/* Does a node of [first, end) still read this memory? What nobody needs any more may be overwritten. */
static bool is_alive(const nxb_run *r, const gx_tensor *t, int first, int end) {
    for (int i = first; i < end; i++)
        for (int s = 0; s < GX_MAX_SRC && r->nodes[i]->src[s]; s++)
            if (root(r->nodes[i]->src[s]) == root(t)) return true;
    return false;
}

static bool same_shape(const gx_tensor *a, const gx_tensor *b) {
    return a->type == b->type && memcmp(a->ne, b->ne, sizeof a->ne) == 0;
}

/* -- copies --------------------------------------------------------------------------------------- */

static bool is_resident(const gx_tensor *t) {
    const nx_extent *e = nxb_extent(t);
    return t->data && (!e || e->tier == NX_TIER_RAM);
}

/* The copy of a node, with everything that it needs copied before it; NULL: it cannot be copied. */
static gx_tensor *copy(predictor *p, const gx_tensor *t) {
    if (t == p->replaced) return &p->input;
    if (is_leaf(t)) return is_resident(t) ? (gx_tensor *)t : NULL;
    for (size_t i = 0; i < p->n; i++)
        if (p->of[i] == t) return &p->nodes[i];
    gx_tensor made = *t;
    gx_tensor *base = t->view_src ? copy(p, t->view_src) : NULL;
    if (t->view_src && !base) return NULL;
    for (int s = 0; s < GX_MAX_SRC && t->src[s]; s++)
        if (!(made.src[s] = copy(p, t->src[s]))) return NULL;
    if (p->n == MOST_NODES) return NULL;
    if (base) {
        /* A node that writes into what is not a copy would change the model's own state. */
        if (!is_view(t) && (base == &p->input || is_leaf(base))) return NULL;
        made.view_src = base;
        made.data = (char *)base->data + t->view_offs;
    } else {
        made.data = p->memory + p->used; /* checked when all are copied: only then is the memory there */
        p->used += (gx.nbytes(t) + 63) / 64 * 64;
    }
    p->of[p->n] = t;
    p->nodes[p->n] = made;
    return &p->nodes[p->n++];
}

static gx_tensor *copy_all(predictor *p, const router *to, const gx_tensor *replaced, const gx_tensor *by) {
    p->n = p->used = 0;
    p->replaced = replaced;
    p->input = *by;
    gx_tensor *scores = copy(p, to->scores);
    if (!scores || scores == &p->input || p->used <= p->capacity) return scores == &p->input ? NULL : scores;
    free(p->memory);
    p->capacity = 0;
    p->memory = NULL;
    void *memory;
    if (posix_memalign(&memory, 64, p->used) != 0) return NULL;
    p->memory = memory;
    p->capacity = p->used;
    p->n = p->used = 0;
    return copy(p, to->scores);
}

/* Sorting what is not a number is for nobody. */
static bool is_finite(const gx_tensor *t) {
    if (t->type != gx.type_f32 || t->nb[0] != sizeof(float) || t->ne[2] != 1 || t->ne[3] != 1) return false;
    float sum = 0;
    for (int64_t i = 0; i < t->ne[1]; i++) {
        const float *row = (const float *)((const char *)t->data + (size_t)i * t->nb[1]);
        for (int64_t k = 0; k < t->ne[0]; k++) sum += row[k] * 0.0f;
    }
    return sum == 0.0f;
}

/* The router `to`, computed with `by` in place of `replaced`: its scores, or NULL. */
static const gx_tensor *compute_router(nxb_run *r, int node, const router *to, const gx_tensor *replaced,
                                       const gx_tensor *by) {
    predictor *p = r->own->predictor;
    if (!same_shape(replaced, by) || !is_finite(by)) return NULL;
    const gx_tensor *scores = copy_all(p, to, replaced, by);
    if (!scores) return NULL;
    /* One row is done before a second thread would have been woken. */
    const int n_threads = r->own->n_threads_asked;
    const bool alone = n_threads > 1 && by->ne[1] == 1;
    if (alone) nxb_delegate.set_n_threads(r->own->cpu, 1);
    const int status = nxb_compute_as(r, node, p->nodes, p->n);
    if (alone) nxb_delegate.set_n_threads(r->own->cpu, n_threads);
    return status == GX_SUCCESS ? scores : NULL;
}

/* -- which experts these are ------------------------------------------------------------------------ */

static bool reserve(predictor *p, size_t n_picks, size_t n_experts) {
    const size_t wanted = n_picks + 2 * n_experts;
    if (wanted <= p->n_experts_capacity) return true;
    int32_t *experts = realloc(p->experts, wanted * sizeof *experts);
    if (!experts) return false;
    p->experts = experts;
    p->n_experts_capacity = wanted;
    return true;
}

/* The highest `k` of each row of scores, highest first. */
static void pick(const gx_tensor *scores, int64_t k, int32_t *out) {
    for (int64_t row = 0; row < scores->ne[1]; row++, out += k) {
        const float *s = (const float *)((const char *)scores->data + (size_t)row * scores->nb[1]);
        int64_t n = 0;
        for (int64_t e = 0; e < scores->ne[0]; e++) {
            if (n == k && !(s[e] > s[out[k - 1]])) continue;
            int64_t at = n < k ? n++ : k - 1;
            for (; at > 0 && s[e] > s[out[at - 1]]; at--) out[at] = out[at - 1];
            out[at] = (int32_t)e;
        }
    }
}

static int by_count_then_number(const void *a, const void *b) {
    const int32_t *x = a, *y = b; /* pairs */
    return x[0] != y[0] ? (x[0] < y[0]) - (x[0] > y[0]) : (x[1] > y[1]) - (x[1] < y[1]);
}

/* The distinct experts of all picks, the most frequent first. One token: in its own order. */
static size_t in_order(const int32_t *picks, size_t n_picks, int64_t n_tokens, int64_t n_experts, int32_t *out) {
    if (n_tokens == 1) {
        memcpy(out, picks, n_picks * sizeof *out);
        return n_picks;
    }
    int32_t(*pairs)[2] = (int32_t(*)[2])out; /* room for 2 * n_experts */
    for (int64_t e = 0; e < n_experts; e++) {
        pairs[e][0] = 0;
        pairs[e][1] = (int32_t)e;
    }
    for (size_t i = 0; i < n_picks; i++) pairs[picks[i]][0]++;
    qsort(pairs, (size_t)n_experts, sizeof *pairs, by_count_then_number);
    size_t n = 0;
    for (; n < (size_t)n_experts && pairs[n][0]; n++) out[n] = pairs[n][1]; /* out[n] lies before pairs[n][1] */
    return n;
}

/* -- predicting ------------------------------------------------------------------------------------- */

/* The first product of the next layer's experts. */
static const nxb_use *next_layer(const nxb_run *r, const nxb_use *use) {
    const gx_tensor *ids = r->nodes[use->node]->src[2];
    for (const nxb_use *u = use + 1; u < r->own->uses + r->n_uses; u++)
        if (u->kind == USE_EXPERTS && r->nodes[u->node]->src[2] != ids) return u;
    return NULL;
}

/* Picks of the gate of `next`, with what is known at `use`: [tokens][n_used] in p->experts, or NULL. */
static const int32_t *by_gate(nxb_run *r, const nxb_use *use, const nxb_use *next) {
    predictor *p = r->own->predictor;
    const gx_tensor *ids = r->nodes[next->node]->src[2];
    router here, there;
    if (!find_router(r->nodes[use->node]->src[2], use->weight->ne[2], &here) ||
        !find_router(ids, next->weight->ne[2], &there))
        return NULL;
    const gx_tensor *replaced, *by;
    if (here.norm && there.norm && is_alive(r, here.norm->src[0], use->node, next->node)) {
        replaced = there.norm->src[0];
        by = here.norm->src[0];
    } else {
        replaced = there.product->src[1];
        by = here.product->src[1];
        if (!is_alive(r, by, use->node, next->node)) return NULL;
    }
    const gx_tensor *scores = compute_router(r, use->node, &there, replaced, by);
    if (!scores || !reserve(p, (size_t)(ids->ne[0] * ids->ne[1]), (size_t)scores->ne[0])) return NULL;
    pick(scores, ids->ne[0], p->experts);
    return p->experts;
}

/* The control: this layer's own gate on its own input must pick what the router picked. */
static void record_control(nxb_run *r, const nxb_use *use) {
    predictor *p = r->own->predictor;
    const gx_tensor *ids = r->nodes[use->node]->src[2];
    router here;
    if (!find_router(ids, use->weight->ne[2], &here)) return;
    const gx_tensor *x = here.product->src[1];
    if (!is_alive(r, x, use->node, gx.graph_n_nodes(r->graph))) return;
    const gx_tensor *scores = compute_router(r, use->node, &here, x, x);
    if (!scores || !reserve(p, (size_t)(ids->ne[0] * ids->ne[1]), (size_t)scores->ne[0])) return;
    pick(scores, ids->ne[0], p->experts);
    nx_routing_note(use->extent->model, use->extent, NX_ROUTED_CONTROL, (int32_t)ids->ne[1], (int32_t)ids->ne[0],
                    p->experts);
}

static size_t predicted(nxb_run *r, nx_predictor by, const nxb_use *use, const nxb_use *next, nx_group *group,
                        size_t limit, int32_t **out) {
    predictor *p = r->own->predictor;
    const gx_tensor *ids = r->nodes[next->node]->src[2];
    const size_t n_picks = (size_t)(ids->ne[0] * ids->ne[1]), n_experts = (size_t)next->weight->ne[2];
    if (by == NX_PREDICT_GATE) {
        if (!by_gate(r, use, next)) return 0;
        *out = p->experts + n_picks;
        return in_order(p->experts, n_picks, ids->ne[1], (int64_t)n_experts, *out);
    }
    if (by == NX_PREDICT_PLUGIN) return nx_predict_ask(group, (uint32_t)ids->ne[1], (uint32_t)ids->ne[0], limit, out);
    if (!reserve(p, 0, n_experts)) return 0;
    *out = p->experts;
    const size_t most = n_picks < n_experts ? n_picks : n_experts;
    return by == NX_PREDICT_POPULAR ? nx_experts_popular(group, *out, most) : nx_experts_latest(group, *out, most);
}

/* The first product of its decision. */
static bool is_first(const nxb_run *r, const nxb_use *use) {
    const gx_tensor *ids = r->nodes[use->node]->src[2];
    for (const nxb_use *u = use; u-- > r->own->uses;)
        if (u->kind == USE_EXPERTS) return r->nodes[u->node]->src[2] != ids;
    return true;
}

static void see(nx_group *group, const gx_tensor *ids) {
    int32_t experts[512];
    const size_t n = ids->ne[0] < 512 ? (size_t)ids->ne[0] : 512;
    for (int64_t t = 0; t < ids->ne[1]; t++) {
        for (size_t k = 0; k < n; k++)
            experts[k] = *(const int32_t *)((const char *)ids->data + (size_t)t * ids->nb[1] + k * ids->nb[0]);
        nx_experts_seen(group, experts, n);
    }
}

static bool has_predictor(nxb_run *r) {
    if (!r->own->predictor) r->own->predictor = calloc(1, sizeof *r->own->predictor);
    return r->own->predictor != NULL;
}

/* Tell a plugin. Without memory it misses one decision. */
static void tell(nxb_run *r, nx_group *group, const gx_tensor *ids) {
    const size_t n_used = (size_t)ids->ne[0], n_tokens = (size_t)ids->ne[1];
    predictor *p = has_predictor(r) ? r->own->predictor : NULL;
    if (!p || !reserve(p, n_used * n_tokens, 0)) return;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t k = 0; k < n_used; k++)
            p->experts[t * n_used + k] = *(const int32_t *)((const char *)ids->data + t * ids->nb[1] + k * ids->nb[0]);
    nx_predict_routed(group, p->experts, (uint32_t)n_tokens, (uint32_t)n_used);
}

void nxb_predict(nxb_run *r, const nxb_use *use) {
    if (!is_first(r, use)) return;
    nx_model *m = use->extent->model;
    uint32_t part;
    nx_group *here = nx_extent_group(use->extent, &part);
    if (here) see(here, r->nodes[use->node]->src[2]);
    if (here && nx_predict_listens(m)) tell(r, here, r->nodes[use->node]->src[2]);
    const bool one_token = r->nodes[use->node]->src[2]->ne[1] == 1;
    r->decides = true;
    r->decides_for_many |= !one_token;
    const int recording = nx_routing_recording(m);
    const nx_predictor by = nx_predict_now(m, one_token);
    if (recording < 2 && by == NX_PREDICT_NONE) return;
    if (!has_predictor(r)) return;
    const uint64_t begin = nx_now_ns();
    if (recording == 2) record_control(r, use);
    const nxb_use *next = next_layer(r, use);
    if (next && next->extent->model == m) {
        const gx_tensor *ids = r->nodes[next->node]->src[2];
        if (recording == 2 && by_gate(r, use, next))
            nx_routing_note(m, next->extent, NX_ROUTED_GATE, (int32_t)ids->ne[1], (int32_t)ids->ne[0],
                            r->own->predictor->experts);
        nx_group *group = nx_extent_group(next->extent, &part);
        /* Of one token, few: the rest is rarely in time. A batch uses nearly all that is predicted, and nearly
         * all that is there: it fills what is empty, and evicts nothing. */
        const bool one = ids->ne[1] == 1;
        const size_t limit = !group || by == NX_PREDICT_NONE ? 0 : one ? AHEAD : nx_group_empty_slots(group);
        int32_t *experts;
        const size_t n = limit ? predicted(r, by, use, next, group, limit, &experts) : 0;
        if (n) {
            nx_prefetch_beside(m, one ? 0 : BESIDE);
            (void)nx_experts_prefetch(group, experts, n, limit); /* failures show up when it is used */
        }
    }
    nx_note_predict(m, nx_now_ns() - begin);
}
