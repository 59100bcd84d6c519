/* Resident weights of few bits are packed when they are read, each time; what the system got back of the stored
 * bytes can be read again; tensors that are not for us stay as they are. */
#include <pthread.h>
#include <sys/mman.h>

#include "nexus_attach.h"
#include "nexus_residency.h"
#include "nx_consumer.h"

#define ROWS 40
#define ROW_BYTES (3 * 66)

static world w;

static nx_model *open_tiers(const char *kernels, const char *tier) {
    uint64_t offset = 0;
    world_init(&w, 1, 200000, 7);
    world_manifest(&w, 1u << 16, 4096, 0, 0, true);
    static const char *const names[] = {"a", "b", "token_embd.weight", "streamed"};
    for (int i = 0; i < 4; i++) {
        world_line(&w, "tensor %s 0 %" PRIu64 " %d 0 768 %d 1 1 TQ2_0 %s", i == 3 ? "nvme" : tier, offset,
                   ROWS * ROW_BYTES, ROWS, names[i]);
        w.n_tensors++;
        offset += ROWS * ROW_BYTES;
    }
    world_line(&w, "tensor ram 0 %" PRIu64 " 4096 0 1024 1 1 1 F32 plain", offset);
    w.n_tensors++;
    world_line(&w, "%s", kernels);
    nx_model *m = world_open(&w, "", 0);
    for (size_t i = 0; i < nx_model_n_extents(m); i++) NX_CHECK_EQ(nx_model_claim(m, nx_model_extent(m, i)), NX_OK);
    NX_CHECK_EQ(nx_model_finish_load(m, NULL, NULL), NX_OK);
    return m;
}

static nx_model *open_with(const char *kernels) { return open_tiers(kernels, "ram"); }

static void close_all(nx_model *m) {
    nx_model_release(m);
    world_free(&w);
}

static void what_is_ours_is_packed(void) {
    nx_model *m = open_with("kernels 0 tq2_0");
    NX_CHECK_EQ(nx_model_n_packed(m), 2);
    NX_CHECK(nx_model_attached_bytes(m) >= 2 * ROWS * 3 * 64);
    NX_CHECK(nx_extent_attached(nx_model_find(m, "token_embd.weight")) == NULL);
    NX_CHECK(nx_extent_attached(nx_model_find(m, "streamed")) == NULL);
    NX_CHECK(nx_extent_attached(nx_model_find(m, "plain")) == NULL);
    /* the packed values are those that were stored */
    nx_extent *e = nx_model_find(m, "b");
    const nx_attachment *a = nx_extent_attached(e);
    nx_ternary again;
    NX_CHECK_EQ(nx_ternary_create(NX_TQ2_0, 768, ROWS, &again), NX_OK);
    nx_ternary_pack(&again, w.files[0].bytes + e->offset, ROW_BYTES, 0, ROWS);
    nx_ternary_finish(&again);
    NX_CHECK(memcmp(again.codes, a->packed.codes, again.codes_bytes) == 0);
    nx_ternary_free(&again);
    close_all(m);
}

/* Pages of the stored bytes that take memory. */
static size_t stored_pages(const nx_extent *e) {
    unsigned char there[64];
    uint8_t *begin = (uint8_t *)((uintptr_t)e->pinned / NX_PAGE * NX_PAGE);
    const size_t n = ((uintptr_t)e->pinned + e->nbytes - (uintptr_t)begin + NX_PAGE - 1) / NX_PAGE;
    size_t sum = 0;
    NX_CHECK(n <= sizeof there);
    NX_CHECK_EQ(mincore(begin, n * NX_PAGE, (void *)there), 0);
    for (size_t i = 0; i < n; i++) sum += there[i] & 1;
    return sum;
}

/* A weight takes the memory of one form of it, whichever operations ask for it. */
static void stored_bytes_come_back_in_place_of_the_packed_ones(void) {
    nx_model *m = open_with("kernels 0 tq2_0");
    nx_extent *a = nx_model_find(m, "a"), *e = nx_model_find(m, "b");
    const uint64_t both = nx_model_attached_bytes(m), generation = nx_residency_generation(m);
    NX_CHECK(stored_pages(e) == 0 && stored_pages(a) == 0);
    for (int twice = 0; twice < 2; twice++) {
        NX_CHECK_EQ(nx_extent_restore(e), NX_OK);
        NX_CHECK(world_same(&w, e, 0, e->pinned, e->nbytes));
        NX_CHECK_EQ(nx_model_n_packed(m), 1);
        NX_CHECK_EQ(nx_model_attached_bytes(m), both / 2); /* nothing beside the stored bytes */
        NX_CHECK_EQ(stored_pages(a), 0);
        NX_CHECK_EQ(nx_residency_generation(m), generation + 1); /* who looked at it looks again */
    }
    /* A load that finds more to do does not pack it again. */
    atomic_store(&m->loaded, false);
    NX_CHECK_EQ(nx_model_finish_load(m, NULL, NULL), NX_OK);
    NX_CHECK_EQ(nx_model_n_packed(m), 1);
    NX_CHECK(world_same(&w, e, 0, e->pinned, e->nbytes));
    close_all(m);
}

static void *compute_again_and_again(void *arg) {
    nx_model *m = arg;
    const nx_attachment *a = nx_extent_attached(nx_model_find(m, "b"));
    for (int i = 0; i < 200; i++) {
        if (nx_turn_begin(m, NULL, 0, never, NULL) != NX_OK) return NULL;
        volatile uint8_t sum = 0; /* what is there when the turn begins stays until it ends */
        for (uint64_t k = 0; a->packed.codes && k < a->packed.codes_bytes; k++) sum = (uint8_t)(sum + a->packed.codes[k]);
        nx_turn_end(m, 0);
    }
    return NULL;
}

static void a_graph_that_computes_keeps_what_it_computes_with(void) {
    nx_model *m = open_with("kernels 0 tq2_0");
    pthread_t thread;
    NX_CHECK_EQ(pthread_create(&thread, NULL, compute_again_and_again, m), 0);
    NX_CHECK_EQ(nx_extent_restore(nx_model_find(m, "b")), NX_OK);
    pthread_join(thread, NULL);
    NX_CHECK_EQ(nx_model_n_packed(m), 1);
    close_all(m);
}

static void a_file_that_shrank_is_an_error(void) {
    nx_model *m = open_with("kernels 0 tq2_0");
    NX_CHECK_EQ(truncate(w.files[0].path, 100), 0);
    for (int twice = 0; twice < 2; twice++) NX_CHECK_EQ(nx_extent_restore(nx_model_find(m, "b")), NX_E_TRUNCATED);
    NX_CHECK_EQ(nx_model_n_packed(m), 1);
    close_all(m);
}

static void residual_and_packed_live_together(void) {
    nx_model *m = open_with("kernels 0 tq2_0");
    uint8_t *codes = calloc(768, nx_residual_row_bytes(ROWS));
    float scales[ROWS] = {0};
    nx_error error;
    const uint64_t bytes = 768 * nx_residual_row_bytes(ROWS);
    NX_CHECK_EQ(nx_model_attach_residual(m, "b", codes, bytes, scales, ROWS, 5, &error), NX_OK);
    NX_CHECK_EQ(nx_model_attach_residual(m, "b", codes, bytes, scales, ROWS, 5, &error), NX_E_BUSY);
    NX_CHECK_EQ(nx_model_attach_residual(m, "b", codes, bytes - 1, scales, ROWS, 5, &error), NX_E_INVALID);
    NX_CHECK_EQ(nx_model_attach_residual(m, "nothing", codes, bytes, scales, ROWS, 5, &error), NX_E_INVALID);
    NX_CHECK_EQ(nx_model_set_residual_k(m, "a", 5), NX_E_INVALID);
    NX_CHECK_EQ(nx_model_set_residual_k(m, "b", 0), NX_OK);
    NX_CHECK_EQ(nx_model_n_packed(m), 2);
    free(codes);
    close_all(m);
}

static void no_kernels_no_packing(void) {
    nx_model *m = open_with("kernels 0 q2_0");
    NX_CHECK_EQ(nx_model_n_packed(m), 0);
    NX_CHECK_EQ(nx_model_attached_bytes(m), 0);
    close_all(m);
}

/* As statistics are asked for, at any time. */
static void *look(void *arg) {
    nx_model *m = arg;
    uint64_t seen = 0;
    for (int i = 0; i < 2000; i++) seen += nx_model_n_packed(m) + nx_model_attached_bytes(m);
    return seen ? m : NULL;
}

static void elastic_weights_are_packed_while_they_are_there(void) {
    nx_model *m = open_tiers("kernels 0 tq2_0", "elastic");
    static const uint32_t all[] = {0, 1, 2};
    const uint64_t least = nx_ternary_packed_bytes(NX_TQ2_0, 768, ROWS);
    uint64_t bytes;
    NX_CHECK_EQ(nx_model_n_packed(m), 0);
    NX_CHECK(nx_extent_span(m, 0) >= least && nx_extent_span(m, 0) >= ROWS * ROW_BYTES);
    pthread_t other;
    NX_CHECK_EQ(pthread_create(&other, NULL, look, m), 0);
    for (int times = 0; times < 3; times++) {
        NX_CHECK_EQ(nx_promote(m, all, 3, NULL, NULL, &bytes), NX_OK);
        NX_CHECK_EQ(bytes, 3 * ROWS * ROW_BYTES);
        NX_CHECK_EQ(nx_model_n_packed(m), 2); /* the rows of an embedding are fetched as they are */
        NX_CHECK_EQ(nx_resident_bytes(m), nx_extent_span(m, 0) + nx_extent_span(m, 1) + nx_extent_span(m, 2));
        nx_extent *e = nx_model_find(m, "b");
        if (times == 1) {
            NX_CHECK_EQ(nx_extent_restore(e), NX_OK);
            NX_CHECK(world_same(&w, e, 0, e->pinned, e->nbytes));
            NX_CHECK_EQ(nx_model_n_packed(m), 1);
        }
        NX_CHECK(world_same(&w, nx_model_extent(m, 2), 0, nx_model_extent(m, 2)->pinned, ROWS * ROW_BYTES));
        NX_CHECK_EQ(nx_demote(m, all, 3, &bytes), NX_OK);
        NX_CHECK_EQ(nx_model_n_packed(m), 0);
        NX_CHECK_EQ(nx_model_attached_bytes(m), 0);
        NX_CHECK_EQ(nx_resident_bytes(m), 0);
        NX_CHECK_EQ(nx_extent_restore(e), NX_OK); /* there is nothing to restore */
    }
    pthread_join(other, NULL);
    NX_CHECK_EQ(nx_promote(m, all, 3, NULL, NULL, &bytes), NX_OK);
    close_all(m); /* packed ones go with it */
}

static int at_once(void *ctx) {
    (void)ctx;
    return 1;
}

static void what_was_stopped_is_not_packed(void) {
    nx_model *m = open_tiers("kernels 0 tq2_0", "elastic");
    static const uint32_t all[] = {0, 1, 2};
    uint64_t bytes;
    const nx_status status = nx_promote(m, all, 3, at_once, NULL, &bytes);
    NX_CHECK(status == NX_E_ABORTED || status == NX_OK); /* small reads may be done at once */
    uint64_t held = 0;
    for (uint32_t i = 0; i < 3; i++)
        if (nx_extent_is_resident(m, i)) held += nx_extent_span(m, i);
    NX_CHECK_EQ(nx_resident_bytes(m), held);
    NX_CHECK_EQ(nx_demote(m, all, 3, &bytes), NX_OK);
    NX_CHECK_EQ(nx_resident_bytes(m), 0);
    NX_CHECK_EQ(nx_model_n_packed(m), 0);
    close_all(m);
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(what_is_ours_is_packed),
        NX_TEST(stored_bytes_come_back_in_place_of_the_packed_ones),
        NX_TEST(a_graph_that_computes_keeps_what_it_computes_with),
        NX_TEST(a_file_that_shrank_is_an_error),
        NX_TEST(residual_and_packed_live_together),
        NX_TEST(no_kernels_no_packing),
        NX_TEST(elastic_weights_are_packed_while_they_are_there),
        NX_TEST(what_was_stopped_is_not_packed),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
