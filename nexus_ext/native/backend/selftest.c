/* selftest.c: does the running ggml lay out its structs as abi.h says?
 *
 * Tensors are built with the library's own functions and every field that we read is compared. Our
 * own vtables are filled with probes, one function per slot, and called through the library's public
 * functions: the probe that answers tells which slot the library believes it is calling. Nothing of
 * the library is ever called through a layout that was not checked before.
 */
#include <stdio.h>
#include <string.h>

#include "api.h"

#define CHECK(condition, ...)                     \
    do {                                          \
        if (!(condition)) {                       \
            snprintf(why, why_size, __VA_ARGS__); \
            return false;                         \
        }                                         \
    } while (0)

/* Find where a graph keeps its nodes, by what its accessors say of two views and of one that we changed.
 * Not finding it is no failure: then there are no operations of ours in a graph. */
static void find_nodes(gx_graph *graph) {
    gx_graph_value one = gx.graph_view(graph, 1, 2), two = gx.graph_view(graph, 0, 2);
    gx_tensor **const of_one = gx.graph_nodes((gx_graph *)&one), **const of_two = gx.graph_nodes((gx_graph *)&two);
    gx.view_n_nodes = gx.view_nodes = 0;
    for (size_t at = 0; at + sizeof(void *) <= 96 && !gx.view_nodes; at += sizeof(void *)) {
        gx_tensor **a, **b;
        memcpy(&a, (char *)&one + at, sizeof a);
        memcpy(&b, (char *)&two + at, sizeof b);
        if (a == of_one && b == of_two) gx.view_nodes = at;
    }
    for (size_t at = sizeof(int); at + sizeof(int) <= 96 && gx.view_nodes && !gx.view_n_nodes; at += sizeof(int)) {
        int a, b;
        memcpy(&a, (char *)&one + at, sizeof a);
        memcpy(&b, (char *)&two + at, sizeof b);
        if (a != 1 || b != 2) continue;
        gx_graph_value changed = two;
        const int three = 3;
        gx_tensor *nodes[3] = {of_two[1], of_two[0], of_two[1]}, **pointer = nodes;
        memcpy((char *)&changed + at, &three, sizeof three);
        memcpy((char *)&changed + gx.view_nodes, &pointer, sizeof pointer);
        if (gx.graph_n_nodes((gx_graph *)&changed) == 3 && gx.graph_nodes((gx_graph *)&changed) == nodes)
            gx.view_n_nodes = at;
    }
    if (!gx.view_n_nodes) gx.view_nodes = 0;
}

static bool test_tensor(char *why, size_t why_size) {
    const size_t overhead = gx.tensor_overhead();
    CHECK(overhead == sizeof(gx_tensor) + GX_OBJECT_BYTES, "a tensor takes %zu bytes, expected %zu", overhead,
          sizeof(gx_tensor) + GX_OBJECT_BYTES);
    const gx_init_params params = {.mem_size = 64 * 1024 + gx.graph_overhead_custom(16, false)};
    gx_context *ctx = gx.init(params);
    CHECK(ctx, "ggml_init failed");
    bool good = true;
    const char *what = "";
#define FIELD(condition)             \
    if (good && !(condition)) {      \
        good = false;                \
        what = #condition;           \
    }
    gx_tensor *w = gx.new_tensor_2d(ctx, gx.type_f32, 8, 3);
    gx_tensor *x = gx.new_tensor_2d(ctx, gx.type_f32, 8, 2);
    gx_tensor *ids = gx.new_tensor_1d(ctx, gx.type_i32, 2);
    FIELD(w->type == gx.type_f32 && ids->type == gx.type_i32);
    FIELD(w->ne[0] == 8 && w->ne[1] == 3 && w->ne[2] == 1 && w->ne[3] == 1);
    FIELD(w->nb[0] == 4 && w->nb[1] == 32 && w->nb[2] == 96 && w->nb[3] == 96);
    FIELD(w->op == gx.op_none && w->buffer == NULL && w->extra == NULL && w->view_src == NULL);
    FIELD(w->data != NULL && w->data == gx.get_data(w));
    gx.set_name(w, "probe");
    FIELD(strcmp(w->name, "probe") == 0);
    const int32_t flags = x->flags;
    gx.set_input(x);
    FIELD(flags == 0 && x->flags == 1);
    gx_tensor *y = gx.mul_mat(ctx, w, x);
    FIELD(y->op == gx.op_mul_mat && y->src[0] == w && y->src[1] == x && y->src[2] == NULL);
    gx_tensor *r = gx.get_rows(ctx, w, ids);
    FIELD(r->op == gx.op_get_rows && r->src[0] == w && r->src[1] == ids);
    gx_tensor *v = gx.view_1d(ctx, w, 4, 16);
    FIELD(v->view_src == w && v->view_offs == 16 && v->data == (char *)w->data + 16);
    gx_graph *graph = gx.new_graph_custom(ctx, 16, false);
    gx.build_forward_expand(graph, y);
    gx.build_forward_expand(graph, r);
    FIELD(gx.graph_n_nodes(graph) == 2 && gx.graph_nodes(graph)[0] == y && gx.graph_nodes(graph)[1] == r);
    gx.flag_compute = y->flags; /* 0 in versions without the flag */
    FIELD((gx.flag_compute == 16 || gx.flag_compute == 0) && r->flags == gx.flag_compute);
    gx_graph_value view = gx.graph_view(graph, 1, 2);
    FIELD(gx.graph_n_nodes((gx_graph *)&view) == 1 && gx.graph_nodes((gx_graph *)&view)[0] == r);
    if (good) find_nodes(graph);
    gx.graph_clear(graph);
    gx.graph_add_node(graph, r);
    FIELD(gx.graph_n_nodes(graph) == 1 && gx.graph_nodes(graph)[0] == r);
#undef FIELD
    gx.free(ctx);
    CHECK(good, "a tensor or a graph is not what was expected: %s", what);
    return true;
}

/* Probes: slot N of table T records T * 100 + N and returns something harmless for every signature
 * (a pointer to zeros, or the same bits as an integer or a truth value). */
static int called;
static char zeros[256] __attribute__((aligned(64)));
#define PROBE(id) \
    static void *probe_##id(void) { called = id; return zeros; }
#define PROBES(X) \
    X(100) X(101) X(102) X(103) X(104) X(105) \
    X(200) X(201) X(202) X(203) X(204) X(205) X(206) X(207) X(208) X(209) X(210) \
    X(300) X(301) X(302) X(303) X(304) X(305) X(306) X(307) X(308) X(309) X(310) X(311) X(312) X(313) X(314) X(315) \
    X(400) X(401) X(402) X(403) X(404) X(405) X(406) X(407) X(408) X(409) X(410) X(411) X(412) X(413) X(414) \
    X(500) X(501) X(502) X(503)
PROBES(PROBE)

static void fill(void *table, int first, size_t n) {
    static void *(*const all[])(void) = {
#define ADDRESS(id) probe_##id,
        PROBES(ADDRESS)
    };
    static const int ids[] = {
#define NUMBER(id) id,
        PROBES(NUMBER)
    };
    for (size_t k = 0; k < sizeof ids / sizeof *ids; k++)
        if (ids[k] >= first && ids[k] < first + (int)n) memcpy((char *)table + (size_t)(ids[k] - first) * sizeof(void *), &all[k], sizeof(void *));
}

#define SLOT(expected, call)                                                                             \
    do {                                                                                                 \
        called = 0;                                                                                      \
        (void)(call);                                                                                    \
        CHECK(called == (expected), "%s calls slot %d where slot %d was expected", #call, called, expected); \
    } while (0)
#define SLOT_VOID(expected, call)                                                                        \
    do {                                                                                                 \
        called = 0;                                                                                      \
        call;                                                                                            \
        CHECK(called == (expected), "%s calls slot %d where slot %d was expected", #call, called, expected); \
    } while (0)

static bool test_tables(char *why, size_t why_size) {
    gx_reg reg = {.api_version = GX_API_VERSION};
    gx_device device = {.reg = &reg};
    gx_buft buft = {.device = &device};
    gx_backend backend = {.device = &device};
    gx_buffer_i buffer_i;
    fill(&buft.iface, 100, sizeof buft.iface / sizeof(void *));
    fill(&buffer_i, 200, sizeof buffer_i / sizeof(void *));
    fill(&backend.iface, 300, sizeof backend.iface / sizeof(void *));
    fill(&device.iface, 400, sizeof device.iface / sizeof(void *));
    fill(&reg.iface, 500, sizeof reg.iface / sizeof(void *));
    gx_tensor tensor = {.op = gx.op_none, .ne = {1, 1, 1, 1}, .nb = {4, 4, 4, 4}};
    gx_device_props props;
    size_t a, b;

    SLOT(100, gx.backend_buft_name(&buft));
    SLOT(101, gx.backend_buft_alloc_buffer(&buft, 1));
    SLOT(102, gx.backend_buft_get_alignment(&buft));
    SLOT(103, gx.backend_buft_get_max_size(&buft));
    SLOT(105, gx.backend_buft_is_host(&buft));
    SLOT(400, gx.backend_dev_name(&device));
    SLOT(401, gx.backend_dev_description(&device));
    SLOT_VOID(402, gx.backend_dev_memory(&device, &a, &b));
    SLOT(403, gx.backend_dev_type(&device));
    SLOT_VOID(404, gx.backend_dev_get_props(&device, &props));
    SLOT(405, gx.backend_dev_init(&device, NULL));
    SLOT(406, gx.backend_dev_buffer_type(&device));
    SLOT(407, gx.backend_dev_host_buffer_type(&device));
    SLOT(409, gx.backend_dev_supports_op(&device, &tensor));
    SLOT(410, gx.backend_dev_supports_buft(&device, &buft));
    SLOT(411, gx.backend_dev_offload_op(&device, &tensor));
    CHECK(gx.backend_dev_backend_reg(&device) == &reg, "a device does not keep its registry where expected");
    SLOT(500, gx.backend_reg_name(&reg));
    SLOT(501, gx.backend_reg_dev_count(&reg));
    SLOT(502, gx.backend_reg_dev_get(&reg, 0));
    SLOT(503, gx.backend_reg_get_proc_address(&reg, "x"));
    SLOT(300, gx.backend_name(&backend));
    SLOT_VOID(307, gx.backend_synchronize(&backend));
    SLOT(312, gx.backend_graph_compute_async(&backend, NULL));
    SLOT_VOID(301, gx.backend_free(&backend));

    gx_buffer *buffer = gx.backend_buffer_init(&buft, buffer_i, zeros, 64);
    CHECK(buffer && buffer->buft == &buft && buffer->context == zeros && buffer->size == 64 && buffer->usage == 0 &&
              memcmp(&buffer->iface, &buffer_i, sizeof buffer_i) == 0,
          "a buffer is not laid out as expected");
    SLOT(201, gx.backend_buffer_get_base(buffer));
    SLOT_VOID(200, gx.backend_buffer_free(buffer));
    return true;
}

bool gx_self_test(char *why, size_t why_size) {
    return test_tensor(why, why_size) && test_tables(why, why_size);
}
