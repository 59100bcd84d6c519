/*
 * test_residency.c: weights come and go while graphs run: every graph sees every byte, whole, from memory
 * or from the ring; and memory that was given back is given back.
 */
#include <pthread.h>
#include <sys/mman.h>

#include "cache.h"
#include "nexus_residency.h"
#include "nx_consumer.h"

#define N 12
static world elastic_world;

/* 12 matrices of 40 rows of 1000 bytes; every fourth is ram for good. */
static nx_model *elastic_open(bool direct) {
    world_init(&elastic_world, 2, 600000, 5);
    world_manifest(&elastic_world, plain_ring, plain_slab, 65536, 0, direct);
    for (size_t i = 0; i < N; i++) {
        char name[32];
        snprintf(name, sizeof name, "blk.%zu.weight", i);
        world_tensor(&elastic_world, i % 4 == 3 ? "ram" : "elastic", i % 2, 37 + 41000 * i, 1000, 40, 1, 0, name);
    }
    nx_model *m = world_open(&elastic_world, "", 0);
    for (size_t i = 0; i < N; i++) NX_CHECK_EQ(nx_model_claim(m, nx_model_extent(m, i)), NX_OK);
    NX_CHECK_EQ(nx_model_finish_load(m, NULL, NULL), NX_OK);
    return m;
}

static void elastic_close(nx_model *m) {
    nx_model_release(m);
    world_free(&elastic_world);
}

/* As backend/graph.c does it. */
static nx_status graph(consumer *c) {
    nx_extent *uses[N];
    size_t n;
    for (;;) {
        n = 0;
        const uint64_t generation = nx_residency_generation(c->m);
        for (size_t i = 0; i < N; i++)
            if (nx_extent_tier(nx_model_extent(c->m, i)) == NX_TIER_NVME) uses[n++] = nx_model_extent(c->m, i);
        const nx_status status = nx_turn_begin(c->m, uses, n, NULL, NULL);
        if (status != NX_OK) return status;
        if (nx_residency_generation(c->m) == generation) break;
        nx_turn_end(c->m, 1);
    }
    nx_status status = NX_OK;
    size_t next = 0;
    for (size_t i = 0; i < N && status == NX_OK; i++) {
        nx_extent *e = nx_model_extent(c->m, i);
        if (next < n && uses[next] == e) {
            for (uint32_t k = 0; k < e->n_pieces && status == NX_OK; k++) {
                if (c->held_bytes > nx_ring_share(c->m)) release(c, c->n_held);
                status = acquire(c, e, k);
            }
            next++;
        } else {
            NX_CHECK(world_same(c->w, e, 0, e->pinned, e->nbytes));
        }
    }
    end_pass(c, status != NX_OK);
    return status;
}

/* Pages of an extent that are in memory. */
static size_t pages_held(const nx_model *m, const nx_extent *e) {
    unsigned char there[64];
    uint8_t *pages = (uint8_t *)e->pinned - nx_lead(&m->files[e->file], e->offset);
    const uint64_t span = nx_span(&m->files[e->file], e->offset, e->nbytes);
    NX_CHECK(span / NX_PAGE <= sizeof there);
    if (mincore(pages, span, there) != 0) return 0;
    size_t n = 0;
    for (size_t i = 0; i < span / NX_PAGE; i++) n += there[i] & 1;
    return n;
}

static void there_and_back(bool direct) {
    nx_model *m = elastic_open(direct);
    consumer c = {.w = &elastic_world, .m = m, .seed = 3};
    static const uint32_t some[] = {0, 1, 6}, all[] = {0, 1, 2, 4, 5, 6, 8, 9, 10};
    uint64_t bytes;
    NX_CHECK_EQ(nx_resident_bytes(m), 0);
    NX_CHECK_EQ(graph(&c), NX_OK);
    NX_CHECK_EQ(nx_promote(m, some, 3, NULL, NULL, &bytes), NX_OK);
    NX_CHECK_EQ(bytes, 3 * 40000);
    NX_CHECK_EQ(nx_resident_bytes(m),
                nx_extent_span(m, 0) + nx_extent_span(m, 1) + nx_extent_span(m, 6));
    NX_CHECK(nx_extent_is_resident(m, 6) && !nx_extent_is_resident(m, 2) && nx_extent_is_resident(m, 3));
    NX_CHECK_EQ(graph(&c), NX_OK);
    NX_CHECK_EQ(nx_promote(m, all, 9, NULL, NULL, &bytes), NX_OK);
    NX_CHECK_EQ(bytes, 6 * 40000); /* what is there is left alone */
    const uint64_t streamed = c.pieces;
    NX_CHECK_EQ(graph(&c), NX_OK);
    NX_CHECK_EQ(c.pieces, streamed);
    NX_CHECK(pages_held(m, nx_model_extent(m, 6)) > 0);
    NX_CHECK_EQ(nx_demote(m, some, 3, &bytes), NX_OK);
    NX_CHECK_EQ(bytes, 3 * 40000);
    NX_CHECK_EQ(pages_held(m, nx_model_extent(m, 6)), 0);
    NX_CHECK(pages_held(m, nx_model_extent(m, 5)) > 0);
    NX_CHECK_EQ(nx_demote(m, some, 3, &bytes), NX_OK);
    NX_CHECK_EQ(bytes, 0);
    NX_CHECK_EQ(graph(&c), NX_OK);
    NX_CHECK_EQ(c.pieces, streamed + 9);
    NX_CHECK_EQ(nx_demote(m, all, 9, &bytes), NX_OK);
    NX_CHECK_EQ(nx_resident_bytes(m), 0);
    nx_stats s;
    nx_model_get_stats(m, &s);
    NX_CHECK(s.bytes_loaded >= 12 * 40000); /* three for good, nine that came once; some twice */
    elastic_close(m);
}

static void weights_come_and_go(void) { world_for_each(there_and_back); }

static void what_is_no_elastic_extent_is_refused(void) {
    nx_model *m = elastic_open(true);
    static const uint32_t wrong[] = {0, 3}, beyond[] = {N};
    uint64_t bytes;
    NX_CHECK_EQ(nx_promote(m, wrong, 2, NULL, NULL, &bytes), NX_E_INVALID);
    NX_CHECK_EQ(nx_demote(m, beyond, 1, &bytes), NX_E_INVALID);
    NX_CHECK_EQ(nx_resident_bytes(m), 0);
    NX_CHECK_EQ(nx_extent_span(m, 3), 0);
    NX_CHECK_EQ(nx_extent_span(m, N), 0);
    NX_CHECK_EQ(nx_group_resize(m, 0, 1), NX_E_INVALID);
    NX_CHECK_EQ(nx_group_slot_bytes(m, 0), 0);
    nx_model_close(m);
    NX_CHECK_EQ(nx_promote(m, wrong, 1, NULL, NULL, &bytes), NX_E_CLOSED);
    NX_CHECK_EQ(nx_demote(m, wrong, 1, &bytes), NX_E_CLOSED);
    NX_CHECK_EQ(nx_resident_bytes(m), 0);
    elastic_close(m);
}

static void broken_reads(bool direct) {
    nx_model *m = elastic_open(direct);
    consumer c = {.w = &elastic_world, .m = m, .seed = 3};
    static const uint32_t all[] = {0, 1, 2, 4, 5, 6, 8, 9, 10};
    uint64_t bytes;
    const nx_extent *bad = nx_model_extent(m, 5);
    /* Both files have something there; what fails is what is read from there. */
    fault(m, NX_FAULT_EIO, bad->offset, bad->offset + bad->nbytes, -1);
    NX_CHECK_EQ(nx_promote(m, all, 9, NULL, NULL, &bytes), NX_E_IO);
    const nx_error error = last_error(m);
    NX_CHECK_EQ(error.status, NX_E_IO);
    NX_CHECK(!nx_extent_is_resident(m, 5));
    NX_CHECK_EQ(pages_held(m, bad), 0);
    uint64_t held = 0;
    for (uint32_t i = 0; i < N; i++)
        if (i % 4 != 3 && nx_extent_is_resident(m, i)) held += nx_extent_span(m, i);
    NX_CHECK_EQ(nx_resident_bytes(m), held); /* what was complete stays, the rest is away */
    nx_model_clear_faults(m);
    NX_CHECK_EQ(graph(&c), NX_OK);
    NX_CHECK_EQ(nx_promote(m, all, 9, NULL, NULL, &bytes), NX_OK);
    NX_CHECK_EQ(graph(&c), NX_OK);
    elastic_close(m);
}

static void a_failed_read_takes_nothing_else_with_it(void) { world_for_each(broken_reads); }

static void stopped(bool direct) {
    nx_model *m = elastic_open(direct);
    consumer c = {.w = &elastic_world, .m = m, .seed = 3};
    static const uint32_t all[] = {0, 1, 2, 4, 5, 6, 8, 9, 10};
    uint64_t bytes;
    int flag = 1;
    const nx_status status = nx_promote(m, all, 9, nx_flag_stop, &flag, &bytes);
    NX_CHECK(status == NX_E_ABORTED || status == NX_OK); /* a read that is done is not waited for */
    NX_CHECK(nx_flag_callback(&flag));
    NX_CHECK_EQ(graph(&c), NX_OK);
    NX_CHECK_EQ(last_error(m).status, NX_OK); /* to be stopped is no error */
    flag = 0;
    NX_CHECK_EQ(nx_promote(m, all, 9, nx_flag_stop, &flag, &bytes), NX_OK);
    NX_CHECK_EQ(graph(&c), NX_OK);
    elastic_close(m);
}

static void reading_back_can_be_stopped(void) { world_for_each(stopped); }

/* ------------------------------------------------------------ beside graphs */

static void *graphs(void *ctx) {
    consumer *c = ctx;
    for (int i = 0; i < 10 * ROUNDS; i++) NX_CHECK_EQ(graph(c), NX_OK);
    return NULL;
}

static void beside(bool direct) {
    nx_model *m = elastic_open(direct);
    consumer c = {.w = &elastic_world, .m = m, .seed = 11};
    pthread_t thread;
    NX_CHECK_EQ(pthread_create(&thread, NULL, graphs, &c), 0);
    uint64_t seed = 17;
    for (int i = 0; i < 8 * ROUNDS; i++) {
        uint32_t chosen[N];
        size_t n = 0;
        for (uint32_t k = 0; k < N; k++)
            if (k % 4 != 3 && nx_test_random(&seed) % 3 == 0) chosen[n++] = k;
        uint64_t bytes;
        NX_CHECK_EQ(i % 2 ? nx_demote(m, chosen, n, &bytes) : nx_promote(m, chosen, n, NULL, NULL, &bytes), NX_OK);
    }
    NX_CHECK_EQ(pthread_join(thread, NULL), 0);
    NX_CHECK_EQ(graph(&c), NX_OK);
    elastic_close(m);
}

static void graphs_go_on_while_weights_come_and_go(void) { world_for_each(beside); }

/* ------------------------------------------------------------ experts */

static void slots(bool direct) {
    world_init(&elastic_world, 1, 900000, 8);
    world_manifest(&elastic_world, 0, 0, 100000, 0, direct);
    world_tensor(&elastic_world, "nvme", 0, 4096, 512, 24, 16, 0, "up");
    world_tensor(&elastic_world, "nvme", 0, 400000, 512, 20, 16, 0, "down");
    world_line(&elastic_world, "experts 6 0 1");
    nx_model *m = world_open(&elastic_world, "", 0);
    nx_group *g = &m->groups[0];
    NX_CHECK_EQ(nx_model_n_groups(m), 1);
    NX_CHECK_EQ(nx_group_resize(m, 0, 7), NX_E_INVALID); /* more than its manifest says */
    uint64_t seed = 4;
    for (int i = 0; i < 10 * ROUNDS; i++) {
        const uint32_t n_slots = (uint32_t)(nx_test_random(&seed) % 7);
        NX_CHECK_EQ(nx_group_resize(m, 0, n_slots), NX_OK);
        NX_CHECK_EQ(nx_group_slots(g), n_slots);
        nx_stats s;
        nx_model_get_stats(m, &s);
        NX_CHECK_EQ(s.cache_bytes, n_slots * nx_group_slot_bytes(m, 0));
        NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, NULL, NULL), NX_OK);
        int32_t experts[6];
        size_t n = n_slots ? nx_test_random(&seed) % n_slots + 1 : 0;
        for (size_t k = 0; k < n; k++) experts[k] = (int32_t)((nx_test_random(&seed) % 16 / 6 * 6 + k) % 16);
        NX_CHECK_EQ(nx_experts_acquire(g, experts, n), NX_OK);
        for (uint32_t p = 0; p < 2 && i % 3; p++) { /* else nobody waits: slots close under reads */
            NX_CHECK_EQ(nx_experts_wait(g, p, experts, n), NX_OK);
            uint64_t stride;
            const uint8_t *base = nx_group_part(g, p, &stride);
            const uint64_t bytes = g->part[p]->nbytes / 16;
            for (size_t k = 0; k < n; k++)
                NX_CHECK(world_same(&elastic_world, g->part[p], (uint64_t)experts[k] * bytes,
                                    base + (uint64_t)nx_expert_slot(g, experts[k]) * stride, bytes));
        }
        nx_experts_release(g, experts, n);
        nx_turn_end(m, 0);
    }
    elastic_close(m);
}

static void slots_for_experts_close_and_open(void) { world_for_each(slots); }

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(weights_come_and_go),
        NX_TEST(what_is_no_elastic_extent_is_refused),
        NX_TEST(a_failed_read_takes_nothing_else_with_it),
        NX_TEST(reading_back_can_be_stopped),
        NX_TEST(graphs_go_on_while_weights_come_and_go),
        NX_TEST(slots_for_experts_close_and_open),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
