/*
 * test_pager.c: every byte that the ring and the scratch area hand out is what the file holds, for as
 * long as it is held, whatever the order of graphs and the size of the ring; and what is read ahead is
 * what comes next.
 */
#include "io_internal.h"
#include "nx_consumer.h"

#define MAX_EXTENTS 40

/* The least ring for these shapes: the largest piece, with what alignment adds. */
static uint64_t least_ring(const shape *shapes, size_t n, uint64_t slab) {
    uint64_t least = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t slab_rows, begin = shapes[i].offset;
        uint32_t n_slabs = 1;
        if (slab) nx_slab_split(shapes[i].rows, shapes[i].row_bytes, slab, &slab_rows, &n_slabs);
        else slab_rows = shapes[i].rows;
        for (uint64_t row = 0; row < shapes[i].rows; row += slab_rows) {
            const uint64_t rows = shapes[i].rows - row < slab_rows ? shapes[i].rows - row : slab_rows;
            const uint64_t span = nx_round_up((begin + row * shapes[i].row_bytes) % NX_PAGE + rows * shapes[i].row_bytes,
                                              NX_PAGE);
            if (span > least) least = span;
        }
    }
    return least;
}

static void random_shapes(const world *w, shape *shapes, size_t n, uint64_t *seed) {
    for (size_t i = 0; i < n; i++) {
        shape *s = &shapes[i];
        s->file = nx_test_random(seed) % w->n_files;
        s->row_bytes = 1 + nx_test_random(seed) % (nx_test_random(seed) % 4 ? 700 : 9000);
        s->rows = 1 + nx_test_random(seed) % (nx_test_random(seed) % 4 ? 30 : 300);
        while (s->rows * s->row_bytes > w->files[s->file].nbytes) s->rows = s->rows / 2 + 1;
        s->offset = nx_test_random(seed) % (w->files[s->file].nbytes - s->rows * s->row_bytes + 1);
        if (nx_test_random(seed) % 4 == 0) s->offset = s->offset / NX_PAGE * NX_PAGE; /* the easy case as well */
    }
}

/* ------------------------------------------------------------ what is handed out is right */

/* One random model, passes in random orders. */
static void random_passes(bool direct, uint64_t round) {
    world w;
    uint64_t seed = 1000 * round + direct;
    shape shapes[MAX_EXTENTS];
    const size_t n = 1 + nx_test_random(&seed) % MAX_EXTENTS;
    world_init(&w, 1 + round % 2, 300000 + nx_test_random(&seed) % 300000, seed);
    random_shapes(&w, shapes, n, &seed);
    const uint64_t slab = round % 5 == 0 ? 0 : 1 + nx_test_random(&seed) % 20000;
    const uint64_t least = least_ring(shapes, n, slab);
    uint64_t ring = least;
    if (round % 3 == 1) ring += nx_test_random(&seed) % (6 * least);
    if (round % 3 == 2) ring = 8u << 20; /* more than there is */
    nx_model *m = open_shapes(&w, shapes, n, ring, slab, nx_test_random(&seed) % 200000, direct);
    consumer c = {.w = &w, .m = m, .seed = seed, .demands = round % 2, .abort = never};
    nx_extent *base[MAX_EXTENTS], *uses[2 * MAX_EXTENTS];
    for (size_t i = 0; i < n; i++) base[i] = nx_model_extent(m, i);
    nx_stats before;
    nx_model_get_stats(m, &before);
    for (int k = 0; k < 14; k++) {
        size_t n_uses = n;
        memcpy(uses, base, n * sizeof *uses);
        switch (pick(&c, 7)) {
        case 0: break;
        case 1: n_uses = pick(&c, n + 1); break; /* the beginning only, or nothing */
        case 2: /* rotated */
            for (size_t i = 0; i < n; i++) uses[i] = base[(i + k) % n];
            break;
        case 3: shuffle(uses, n, &c.seed); break;
        case 4: /* some twice */
            n_uses = 2 * n;
            for (size_t i = 0; i < n_uses; i++) uses[i] = base[pick(&c, n)];
            break;
        case 5: /* as an eval callback makes them: short graphs, some of them empty */
            for (size_t at = 0; at < n;) {
                size_t part = pick(&c, 4);
                if (part > n - at) part = n - at;
                NX_CHECK_EQ(pass(&c, uses + at, part), NX_OK);
                at += part;
            }
            n_uses = 0;
            break;
        default: n_uses = 0;
        }
        NX_CHECK_EQ(pass(&c, uses, n_uses), NX_OK);
        check_stats(&c, &before);
        nx_model_get_stats(m, &before);
    }
    nx_model_release(m); /* with what it reads ahead under way */
    world_free(&w);
}

static void random_models(bool direct) {
    char what[64] = "";
    memcpy(what, nx_test_context, sizeof what - 1);
    for (uint64_t round = 0; round < ROUNDS; round++) {
        nx_test_about("%s, round %" PRIu64, what, round);
        random_passes(direct, round);
    }
}

static void whatever_is_handed_out_is_what_the_file_holds(void) { world_for_each(random_models); }

/* Some devices want direct reads of 16 KiB blocks: they cover more than the pages of a slab. */
static void large_blocks(bool direct) {
    nx_extent *uses[PLAIN];
    nx_model *m = plain_open(direct, uses);
    NX_CHECK(m->files[0].file->offset_align <= NX_PAGE); /* else this tests nothing new */
    for (size_t i = 0; i < 2; i++) {
        m->files[i].slack = NX_IO_SLACK;
        m->files[i].file->offset_align = 16384;
    }
    consumer c = {.w = &plain_world, .m = m, .seed = 5, .demands = true};
    for (int k = 0; k < 6; k++) NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
    plain_close(m);
}

static void blocks_larger_than_a_page_do_not_reach_into_other_slabs(void) { world_for_each(large_blocks); }

/* ------------------------------------------------------------ reading ahead */

static uint64_t dropped(nx_model *m) {
    nx_stats s;
    nx_model_get_stats(m, &s);
    return s.pieces_dropped;
}

static void learns(bool direct) {
    nx_extent *uses[PLAIN];
    nx_model *m = plain_open(direct, uses);
    consumer c = {.w = &plain_world, .m = m, .seed = 5};
    for (int k = 0; k < 2; k++) NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
    for (int k = 0; k < 5; k++) {
        /* What comes next is there or on its way before anybody asks. */
        const nx_pager *p = &m->pager;
        NX_CHECK(p->head_slot - p->tail_slot >= 3);
        for (uint64_t i = p->tail_slot; i < p->head_slot; i++) {
            const nx_slot *s = &p->slots[i % p->n_slots];
            NX_CHECK(s->state == NX_SLOT_LOADING && s->piece == i - p->tail_slot);
        }
        NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
        NX_CHECK_EQ(pass(&c, uses, 0), NX_OK); /* a graph without weights disturbs nothing */
    }
    NX_CHECK_EQ(dropped(m), 0);
    plain_close(m);
}

static void an_order_that_repeats_is_read_ahead_without_waste(void) { world_for_each(learns); }

/* Nothing is read twice: bytes read are those of the passes and of what is ahead, no more. */
static void no_waste(bool direct) {
    nx_extent *uses[PLAIN];
    nx_model *m = plain_open(direct, uses);
    consumer c = {.w = &plain_world, .m = m, .seed = 5};
    const uint64_t n = 8;
    for (uint64_t k = 0; k < n; k++) NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
    nx_stats s;
    nx_model_get_stats(m, &s);
    const uint64_t pieces = n * PLAIN * 3;
    NX_CHECK_EQ(s.bytes_used, n * PLAIN * 40000);
    NX_CHECK(s.bytes_read >= s.bytes_used);
    NX_CHECK(s.bytes_read <= s.bytes_used + pieces * 2 * NX_PAGE + plain_ring);
    plain_close(m);
}

static void nothing_is_read_twice(void) { world_for_each(no_waste); }

/* One graph for each weight, as when a callback looks at every node. */
static void short_graphs(bool direct) {
    nx_extent *uses[PLAIN];
    nx_model *m = plain_open(direct, uses);
    consumer c = {.w = &plain_world, .m = m, .seed = 5};
    for (int k = 0; k < 2; k++)
        for (size_t i = 0; i < PLAIN; i++) NX_CHECK_EQ(pass(&c, uses + i, 1), NX_OK);
    const uint64_t first = dropped(m);
    NX_CHECK(first <= 3 * PLAIN); /* the first time round it reads the same weight again, once */
    for (int k = 0; k < 4; k++)
        for (size_t i = 0; i < PLAIN; i++) NX_CHECK_EQ(pass(&c, uses + i, 1), NX_OK);
    NX_CHECK_EQ(dropped(m), first);
    plain_close(m);
}

static void short_graphs_are_learned_as_well(void) { world_for_each(short_graphs); }

/* A ring that holds everything twice reads one cycle ahead. */
static void one_cycle(bool direct) {
    world w;
    world_init(&w, 1, 400000, 3);
    const shape shapes[2] = {{.offset = 5, .row_bytes = 1000, .rows = 8}, {.offset = 9000, .row_bytes = 1000, .rows = 8}};
    nx_model *m = open_shapes(&w, shapes, 2, 1u << 20, 0, 0, direct);
    nx_extent *uses[2] = {nx_model_extent(m, 0), nx_model_extent(m, 1)};
    consumer c = {.w = &w, .m = m, .seed = 5};
    for (uint64_t k = 0; k < 5; k++) {
        NX_CHECK_EQ(pass(&c, uses, 2), NX_OK);
        uint64_t ahead = 0;
        for (uint64_t i = m->pager.tail_slot; i < m->pager.head_slot; i++)
            ahead += m->pager.slots[i % m->pager.n_slots].state == NX_SLOT_LOADING;
        NX_CHECK_EQ(ahead, 2);
    }
    NX_CHECK_EQ(dropped(m), 0);
    nx_model_release(m);
    world_free(&w);
}

static void a_large_ring_does_not_read_more_than_a_cycle_ahead(void) { world_for_each(one_cycle); }

static void another_order(bool direct) {
    nx_extent *uses[PLAIN];
    nx_model *m = plain_open(direct, uses);
    consumer c = {.w = &plain_world, .m = m, .seed = 5};
    NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
    NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
    const uint64_t ahead = m->pager.head_slot - m->pager.tail_slot;
    NX_CHECK(ahead > 0 && ahead < 9);
    NX_CHECK_EQ(nx_turn_begin(m, uses + 6, 3, never, NULL), NX_OK); /* none of it is wanted now */
    NX_CHECK_EQ(dropped(m), ahead);
    c.passes++;
    NX_CHECK_EQ(walk(&c, uses + 6, 3), NX_OK);
    end_pass(&c, 0);
    /* A graph that skips the first weights keeps what follows them. */
    NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
    NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
    const uint64_t before = dropped(m), used = m->pager.head_slot - m->pager.tail_slot;
    NX_CHECK(used > 3);
    NX_CHECK_EQ(pass(&c, uses + 1, PLAIN - 1), NX_OK);
    NX_CHECK_EQ(dropped(m), before + 3);
    plain_close(m);
}

static void what_is_not_wanted_is_dropped_and_no_more(void) { world_for_each(another_order); }

/* ------------------------------------------------------------ limits */

static void limits(bool direct) {
    nx_extent *uses[PLAIN];
    nx_model *m = plain_open(direct, uses);
    consumer c = {.w = &plain_world, .m = m, .seed = 5};
    uint64_t offsets[32] = {0}, stride;
    void *base;
    nx_extent *e = uses[3];
    NX_CHECK_EQ(nx_turn_begin(m, uses, PLAIN, never, NULL), NX_OK);
    c.passes++;
    const size_t most = nx_fetch_max(m, 1000);
    NX_CHECK(most > 0 && most < 32);
    NX_CHECK_EQ(nx_fetch(m, e, offsets, most, 1000, &base, &stride), NX_OK);
    for (size_t i = 0; i < most; i++) NX_CHECK(world_same(&plain_world, e, 0, (uint8_t *)base + i * stride, 1000));
    NX_CHECK_EQ(nx_fetch(m, e, offsets, most + 1, 1000, &base, &stride), NX_E_BUSY);
    NX_CHECK_EQ(nx_fetch(m, e, offsets, 0, 1000, &base, &stride), NX_OK);
    NX_CHECK_EQ(nx_fetch_max(m, 65536), 0);
    NX_CHECK_EQ(nx_fetch_max(m, UINT64_MAX), 0);
    NX_CHECK_EQ(nx_fetch_max(m, UINT64_MAX - 8191), 0);
    /* Bytes of other tensors are nobody's rows. */
    offsets[1] = 39001;
    NX_CHECK_EQ(nx_fetch(m, e, offsets, 2, 1000, &base, &stride), NX_E_INVALID);
    offsets[1] = UINT64_MAX;
    NX_CHECK_EQ(nx_fetch(m, e, offsets, 2, 1000, &base, &stride), NX_E_INVALID);
    NX_CHECK_EQ(nx_fetch(m, e, offsets, 1, 40001, &base, &stride), NX_E_INVALID);
    c.demand_reads += most;
    c.bytes_used += most * 1000;
    NX_CHECK_EQ(walk(&c, uses, PLAIN), NX_OK);
    end_pass(&c, 0);
    check_stats(&c, NULL);
    plain_close(m);

    /* Without scratch there is no fetch; a slab larger than the ring is named, and the rest works. */
    world w;
    world_init(&w, 1, 400000, 3);
    const shape shapes[2] = {{.offset = 1, .row_bytes = 1000, .rows = 3}, {.offset = 5000, .row_bytes = 50000, .rows = 3}};
    m = open_shapes(&w, shapes, 2, 16384 + 4095, 4096, 0, direct);
    NX_CHECK_EQ(m->pager.ring_bytes, 16384);
    nx_extent *two[2] = {nx_model_extent(m, 0), nx_model_extent(m, 1)};
    consumer d = {.w = &w, .m = m, .seed = 5};
    NX_CHECK_EQ(pass(&d, two, 2), NX_E_NOMEM);
    const nx_error error = last_error(m);
    NX_CHECK(error.status == NX_E_NOMEM && strstr(error.text, "blk.1.weight") != NULL);
    NX_CHECK_EQ(pass(&d, two, 1), NX_OK);
    NX_CHECK_EQ(nx_turn_begin(m, two, 1, never, NULL), NX_OK);
    NX_CHECK_EQ(nx_fetch(m, two[0], offsets, 1, 1000, &base, &stride), NX_E_BUSY);
    NX_CHECK_EQ(nx_fetch(m, two[0], offsets, 0, 1000, &base, &stride), NX_OK);
    nx_turn_end(m, 0);
    nx_model_release(m);

    /* Without a ring, nothing is streamed. */
    m = open_shapes(&w, shapes, 2, 4095, 4096, 0, direct);
    two[0] = nx_model_extent(m, 0);
    d.m = m;
    NX_CHECK_EQ(pass(&d, two, 1), NX_E_NOMEM);
    NX_CHECK_EQ(pass(&d, two, 0), NX_OK);
    nx_model_release(m);
    world_free(&w);
}

static void what_does_not_fit_is_refused(void) { world_for_each(limits); }

static void foreign_extents(bool direct) {
    nx_extent *uses[PLAIN];
    nx_model *m = plain_open(direct, uses);
    world w;
    world_init(&w, 1, 4096, 3);
    const shape one = {.row_bytes = 10, .rows = 1};
    nx_model *other = open_shapes(&w, &one, 1, 4096, 0, 0, direct);
    nx_extent *strange = nx_model_extent(other, 0);
    NX_CHECK_EQ(nx_turn_begin(m, &strange, 1, never, NULL), NX_E_INVALID);
    consumer c = {.w = &plain_world, .m = m, .seed = 5};
    NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
    nx_model_release(other);
    world_free(&w);
    plain_close(m);
}

static void a_tensor_of_another_model_is_refused(void) { world_for_each(foreign_extents); }

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(whatever_is_handed_out_is_what_the_file_holds),
        NX_TEST(blocks_larger_than_a_page_do_not_reach_into_other_slabs),
        NX_TEST(an_order_that_repeats_is_read_ahead_without_waste),
        NX_TEST(nothing_is_read_twice),
        NX_TEST(short_graphs_are_learned_as_well),
        NX_TEST(a_large_ring_does_not_read_more_than_a_cycle_ahead),
        NX_TEST(what_is_not_wanted_is_dropped_and_no_more),
        NX_TEST(what_does_not_fit_is_refused),
        NX_TEST(a_tensor_of_another_model_is_refused),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
