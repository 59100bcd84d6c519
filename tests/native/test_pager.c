/*
 * test_pager.c: every byte that the ring and the scratch area hand out is what the file holds, for as
 * long as it is held; whatever the order of graphs, the size of the ring, and what goes wrong.
 *
 * The consumer here acquires, holds and releases as backend/graph.c does. Nothing depends on time: a
 * read that must stay under way is answered EAGAIN for as long as the test wants.
 */
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>

#include "io_internal.h"
#include "manifest.h"
#include "nx_test.h"
#include "nx_world.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define ROUNDS 6
#else
#define ROUNDS 25
#endif
#define MAX_EXTENTS 40

/* ------------------------------------------------------------ the consumer */

typedef struct consumer {
    world *w;
    nx_model *m;
    uint64_t seed;
    nx_piece held[4096];
    size_t n_held;
    uint64_t held_bytes;
    bool demands; /* fetch rows and whole tensors in between */
    int (*abort)(void *);
    void *abort_ctx;
    /* what was done, to compare with the statistics */
    uint64_t passes, pieces, bytes_used, demand_reads, whole_tensors;
} consumer;

static uint64_t pick(consumer *c, uint64_t n) { return nx_test_random(&c->seed) % n; }

/* No two slots share a byte, and all lie within the ring. */
static void check_ring(const nx_model *m) {
    const nx_pager *p = &m->pager;
    NX_CHECK(p->tail_slot <= p->next_slot && p->next_slot <= p->head_slot);
    NX_CHECK(p->head_slot - p->tail_slot <= p->n_slots);
    for (uint64_t i = p->tail_slot; i < p->head_slot; i++) {
        const nx_slot *a = &p->slots[i % p->n_slots];
        const uint8_t *dst = a->read.dst;
        NX_CHECK(a->span > 0 && a->start % NX_PAGE == 0 && a->start + a->span <= p->ring_bytes);
        NX_CHECK(dst >= p->ring + a->start && dst + a->read.nbytes <= p->ring + a->start + a->span);
        for (uint64_t k = i + 1; k < p->head_slot; k++) {
            const nx_slot *b = &p->slots[k % p->n_slots];
            NX_CHECK(a->start + a->span <= b->start || b->start + b->span <= a->start);
        }
    }
}

static void check_held(const consumer *c) {
    for (size_t i = 0; i < c->n_held; i++) {
        const nx_piece *p = &c->held[i];
        NX_CHECK(world_same(c->w, p->extent, p->row * p->extent->row_bytes, p->data, p->nbytes));
    }
}

/* The oldest n have been computed with. */
static void release(consumer *c, size_t n) {
    check_held(c);
    nx_piece_release(c->m, n);
    for (size_t i = 0; i < n; i++) c->held_bytes -= c->held[i].nbytes;
    c->n_held -= n;
    memmove(c->held, c->held + n, c->n_held * sizeof *c->held);
    check_ring(c->m);
}

static nx_status fetch_rows(consumer *c, nx_extent *e) {
    const uint64_t rows = e->nbytes / e->row_bytes;
    const uint64_t per_record = 1 + pick(c, rows < 4 ? rows : 4), record_bytes = per_record * e->row_bytes;
    const size_t most = nx_fetch_max(c->m, record_bytes);
    if (most == 0) return NX_OK;
    uint64_t offsets[64];
    const size_t n = pick(c, (most < 64 ? most : 64) + 1);
    for (size_t i = 0; i < n; i++) offsets[i] = pick(c, rows - per_record + 1) * e->row_bytes; /* some twice */
    void *base;
    uint64_t stride;
    const nx_status status = nx_fetch(c->m, e, offsets, n, record_bytes, &base, &stride);
    if (status != NX_OK) return status;
    for (size_t i = 0; i < n; i++)
        NX_CHECK(world_same(c->w, e, offsets[i], (uint8_t *)base + i * stride, record_bytes));
    c->demand_reads += n;
    c->bytes_used += n * record_bytes;
    return NX_OK;
}

static nx_status fetch_whole(consumer *c, nx_extent *e) {
    void *data;
    const nx_status status = nx_whole_fetch(c->m, e, &data);
    if (status != NX_OK) {
        NX_CHECK(data == NULL);
        return status;
    }
    NX_CHECK(world_same(c->w, e, 0, data, e->nbytes));
    nx_whole_free(e, data);
    c->whole_tensors++;
    c->bytes_used += e->nbytes;
    return NX_OK;
}

static nx_status acquire(consumer *c, nx_extent *e, uint32_t piece) {
    nx_piece *p = &c->held[c->n_held];
    NX_CHECK(c->n_held < sizeof c->held / sizeof *c->held);
    nx_status status = nx_piece_acquire(c->m, p);
    check_ring(c->m);
    if (status == NX_E_BUSY) {
        NX_CHECK(c->n_held > 0); /* or it would be busy for ever */
        release(c, c->n_held);
        p = &c->held[0];
        status = nx_piece_acquire(c->m, p);
        NX_CHECK(status != NX_E_BUSY);
    }
    if (status != NX_OK) return status;
    const uint64_t rows = e->nbytes / e->row_bytes;
    NX_CHECK(p->extent == e);
    NX_CHECK_EQ(p->row, piece * e->slab_rows);
    NX_CHECK_EQ(p->n_rows, piece + 1 < e->n_pieces ? e->slab_rows : rows - p->row);
    NX_CHECK_EQ(p->nbytes, p->n_rows * e->row_bytes);
    NX_CHECK(world_same(c->w, e, p->row * e->row_bytes, p->data, p->nbytes));
    c->n_held++;
    c->held_bytes += p->nbytes;
    c->pieces++;
    c->bytes_used += p->nbytes;
    return NX_OK;
}

static nx_status walk(consumer *c, nx_extent **uses, size_t n_uses) {
    for (size_t i = 0; i < n_uses; i++) {
        for (uint32_t k = 0; k < uses[i]->n_pieces; k++) {
            if (c->held_bytes > nx_ring_share(c->m) || (pick(c, 2) && !nx_piece_ready(c->m))) release(c, c->n_held);
            const nx_status status = acquire(c, uses[i], k);
            if (status != NX_OK) return status;
            if (pick(c, 4) == 0) release(c, pick(c, c->n_held + 1));
        }
        if (c->demands) {
            nx_status status = NX_OK;
            nx_extent *e = uses[pick(c, n_uses)];
            if (pick(c, 3) == 0) status = fetch_rows(c, e);
            if (status == NX_OK && pick(c, 10) == 0) status = fetch_whole(c, e);
            if (status != NX_OK) return status;
            check_held(c);
        }
    }
    nx_piece none;
    NX_CHECK_EQ(nx_piece_ready(c->m), 0);
    NX_CHECK_EQ(nx_piece_acquire(c->m, &none), NX_E_INVALID); /* there is no more */
    return NX_OK;
}

static void end_pass(consumer *c, int failed) {
    check_held(c);
    if (pick(c, 2)) release(c, c->n_held); /* else the end of the turn does */
    c->n_held = 0;
    c->held_bytes = 0;
    nx_turn_end(c->m, failed);
    check_ring(c->m);
}

static nx_status pass(consumer *c, nx_extent **uses, size_t n_uses) {
    nx_status status = nx_turn_begin(c->m, uses, n_uses, c->abort, c->abort_ctx);
    if (status != NX_OK) return status;
    c->passes++;
    check_ring(c->m);
    status = walk(c, uses, n_uses);
    end_pass(c, status != NX_OK);
    return status;
}

static void check_stats(const consumer *c, const nx_stats *since) {
    nx_stats s;
    nx_model_get_stats(c->m, &s);
    NX_CHECK_EQ(s.passes, c->passes);
    NX_CHECK_EQ(s.pieces, c->pieces);
    NX_CHECK_EQ(s.bytes_used, c->bytes_used);
    NX_CHECK_EQ(s.demand_reads, c->demand_reads);
    NX_CHECK_EQ(s.whole_tensors, c->whole_tensors);
    NX_CHECK(s.pieces_ready <= s.pieces);
    NX_CHECK(s.bytes_read >= s.bytes_used); /* nothing is computed with that was not read */
    NX_CHECK_EQ(s.bytes_loaded, 0);
    if (since)
        for (size_t i = 0; i < sizeof s / sizeof(uint64_t); i++)
            NX_CHECK(((const uint64_t *)&s)[i] >= ((const uint64_t *)since)[i]);
}

/* ------------------------------------------------------------ models */

typedef struct shape {
    size_t file;
    uint64_t offset, row_bytes, rows;
} shape;

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

static nx_model *open_shapes(world *w, const shape *shapes, size_t n, uint64_t ring, uint64_t slab, uint64_t scratch,
                             bool direct) {
    world_manifest(w, ring, slab, scratch, 0, direct);
    for (size_t i = 0; i < n; i++) {
        char name[32];
        snprintf(name, sizeof name, "blk.%zu.weight", i);
        world_tensor(w, "nvme", shapes[i].file, shapes[i].offset, shapes[i].row_bytes, shapes[i].rows, 1, 0, name);
    }
    return world_open(w, "", 0);
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

static void shuffle(nx_extent **uses, size_t n, uint64_t *seed) {
    for (size_t i = n; i > 1; i--) {
        const size_t k = nx_test_random(seed) % i;
        nx_extent *e = uses[i - 1];
        uses[i - 1] = uses[k];
        uses[k] = e;
    }
}

/* A plain model for the tests of one thing: 12 matrices of 40 rows of 1000 bytes, slabs of 16 rows. */
#define PLAIN 12
static const uint64_t plain_slab = 16000, plain_ring = 6 * 20480;
static world plain_world;

static nx_model *plain_open(bool direct, nx_extent **uses) {
    shape shapes[PLAIN];
    for (size_t i = 0; i < PLAIN; i++)
        shapes[i] = (shape){.file = i % 2, .offset = 37 + 41000 * i, .row_bytes = 1000, .rows = 40};
    world_init(&plain_world, 2, 600000, 99);
    nx_model *m = open_shapes(&plain_world, shapes, PLAIN, plain_ring, plain_slab, 65536, direct);
    for (size_t i = 0; i < PLAIN; i++) {
        uses[i] = nx_model_extent(m, i);
        NX_CHECK_EQ(uses[i]->n_pieces, 3);
    }
    return m;
}

static void plain_close(nx_model *m) {
    nx_model_release(m);
    world_free(&plain_world);
}

static nx_error last_error(nx_model *m) {
    nx_error error;
    nx_model_last_error(m, &error);
    nx_model_clear_error(m);
    return error;
}

static int never(void *ctx) {
    (void)ctx;
    return 0;
}
static int always(void *ctx) {
    ++*(int *)ctx;
    return 1;
}

static void fault(nx_model *m, int kind, uint64_t begin, uint64_t end, int32_t count) {
    const nx_fault f = {.offset_begin = begin, .offset_end = end, .kind = kind, .count = count};
    NX_CHECK_EQ(nx_model_inject(m, &f), NX_OK);
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

/* ------------------------------------------------------------ what goes wrong */

static void aborts(bool direct) {
    nx_extent *uses[PLAIN];
    nx_model *m = plain_open(direct, uses);
    consumer c = {.w = &plain_world, .m = m, .seed = 5};
    int asked = 0;
    for (int round = 0; round < 4; round++) {
        /* Stopped while it waits; asked again, it goes on where it was. */
        fault(m, NX_FAULT_EAGAIN, 0, UINT64_MAX, -1);
        const nx_abort_fn stop = always;
        NX_CHECK_EQ(nx_turn_begin(m, uses + 4, 8, stop, &asked), NX_OK);
        c.passes++;
        nx_piece piece;
        nx_status status = NX_OK;
        /* the first may have been read ahead */
        while ((status = nx_piece_acquire(m, &piece)) == NX_OK) nx_piece_release(m, 1), c.pieces++, c.bytes_used += piece.nbytes;
        NX_CHECK_EQ(status, NX_E_ABORTED);
        NX_CHECK(asked > 0);
        NX_CHECK_EQ(nx_piece_acquire(m, &piece), NX_E_ABORTED);
        uint64_t offset = 0, stride;
        void *base, *data;
        if (round % 2) {
            nx_model_clear_faults(m);
            m->pager.abort = never;
            const uint64_t first = m->pager.used;
            NX_CHECK_EQ(nx_piece_acquire(m, &piece), NX_OK);
            NX_CHECK(piece.extent == uses[4 + first / 3]);
            NX_CHECK(world_same(&plain_world, piece.extent, piece.row * 1000, piece.data, piece.nbytes));
            c.pieces++;
            c.bytes_used += piece.nbytes;
            nx_turn_end(m, round == 1);
        } else { /* or given up */
            nx_turn_end(m, 1);
            nx_model_clear_faults(m);
        }
        check_ring(m);
        NX_CHECK_EQ(last_error(m).status, NX_OK); /* being asked to stop is no error */
        /* A fetch that is stopped leaves nothing in flight. */
        NX_CHECK_EQ(nx_turn_begin(m, uses, 1, always, &asked), NX_OK);
        c.passes++;
        fault(m, NX_FAULT_EAGAIN, uses[7]->offset, uses[7]->offset + 40000, 50);
        NX_CHECK_EQ(nx_fetch(m, uses[7], &offset, 1, 1000, &base, &stride), NX_E_ABORTED);
        nx_model_clear_faults(m);
        fault(m, NX_FAULT_EAGAIN, uses[7]->offset, uses[7]->offset + 40000, 50);
        NX_CHECK_EQ(nx_whole_fetch(m, uses[7], &data), NX_E_ABORTED);
        NX_CHECK(data == NULL);
        nx_model_clear_faults(m);
        for (size_t i = 0; i < m->pager.demand_capacity; i++) NX_CHECK(m->pager.demand[i].done);
        nx_turn_end(m, 1);
        NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
        check_stats(&c, NULL);
    }
    plain_close(m);
}

static void a_wait_that_is_stopped_can_go_on(void) { world_for_each(aborts); }

/* A pass that fails takes what was read ahead with it. */
static void forget(consumer *c) {
    NX_CHECK_EQ(nx_turn_begin(c->m, NULL, 0, never, NULL), NX_OK);
    c->passes++;
    nx_turn_end(c->m, 1);
}

static void bad_sector(bool direct) {
    nx_extent *uses[PLAIN];
    nx_model *m = plain_open(direct, uses);
    consumer c = {.w = &plain_world, .m = m, .seed = 5, .demands = true};
    for (uint64_t at = 0; at < 10; at++) {
        const nx_extent *e = uses[at];
        NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
        forget(&c);
        const uint64_t bad = e->offset + 17000; /* in its second slab */
        fault(m, NX_FAULT_EIO, bad, bad + 1, -1);
        NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_E_IO);
        nx_error error = last_error(m);
        NX_CHECK(error.status == NX_E_IO && error.sys_errno == EIO);
        NX_CHECK(error.offset <= bad && error.offset + 524288 > bad);
        NX_CHECK(strcmp(error.path, plain_world.files[error.tensor[4] % 2].path) == 0);
        NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_E_IO); /* again, not something stale */
        nx_model_clear_faults(m);
        NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
        nx_model_clear_error(m);
    }
    nx_stats s;
    nx_model_get_stats(m, &s);
    NX_CHECK(s.retries > 0);

    /* The first error is kept until somebody takes it. */
    forget(&c);
    fault(m, NX_FAULT_EIO, 0, UINT64_MAX, -1);
    NX_CHECK_EQ(pass(&c, uses + 2, 3), NX_E_IO);
    NX_CHECK_EQ(pass(&c, uses + 8, 3), NX_E_IO);
    NX_CHECK(strcmp(last_error(m).tensor, uses[2]->name) == 0);
    nx_model_clear_faults(m);

    /* Errors that pass are not seen, but counted. */
    fault(m, NX_FAULT_EIO, uses[0]->offset, uses[0]->offset + 40000, 2);
    fault(m, NX_FAULT_SHORT, 0, UINT64_MAX, 40);
    nx_model_reset_stats(m);
    c.passes = c.pieces = c.bytes_used = c.demand_reads = c.whole_tensors = 0;
    NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
    nx_model_get_stats(m, &s);
    NX_CHECK(s.retries == 2 && s.short_reads > 0);
    check_stats(&c, NULL);
    plain_close(m);
}

static void after_a_read_error_the_next_pass_works(void) { world_for_each(bad_sector); }

/* What fails while it is read ahead belongs to the pass that needs it. */
static void ahead_fails(bool direct) {
    nx_extent *uses[PLAIN];
    nx_model *m = plain_open(direct, uses);
    consumer c = {.w = &plain_world, .m = m, .seed = 5};
    for (int round = 0; round < 6; round++) {
        NX_CHECK_EQ(nx_turn_begin(m, uses, PLAIN, never, NULL), NX_OK);
        c.passes++;
        NX_CHECK_EQ(walk(&c, uses, PLAIN), NX_OK);
        fault(m, NX_FAULT_EIO, 0, UINT64_MAX, -1);
        end_pass(&c, 0); /* what it reads ahead now cannot be read */
        NX_CHECK_EQ(last_error(m).status, NX_OK);
        if (round % 3 == 1) {
            NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_E_IO);
            NX_CHECK_EQ(last_error(m).status, NX_E_IO);
        }
        if (round % 3 == 2) {
            NX_CHECK_EQ(pass(&c, uses, 0), NX_OK); /* a graph that needs none of it */
            NX_CHECK_EQ(last_error(m).status, NX_OK);
            NX_CHECK_EQ(pass(&c, uses + 5, 2), NX_E_IO);
            (void)last_error(m);
        }
        for (uint64_t i = m->pager.tail_slot; i < m->pager.head_slot; i++) /* let them fail */
            (void)nx_io_wait(m->io, &m->pager.slots[i % m->pager.n_slots].read, NULL, NULL);
        nx_model_clear_faults(m);
        NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK); /* it is read again */
    }
    plain_close(m);
}

static void an_error_of_reading_ahead_is_not_kept(void) { world_for_each(ahead_fails); }

static void file_changes(bool direct) {
    for (int how = 0; how < 5; how++) {
        nx_extent *uses[PLAIN];
        nx_model *m = plain_open(direct, uses);
        consumer c = {.w = &plain_world, .m = m, .seed = 5};
        const char *path = plain_world.files[1].path;
        char other[320];
        snprintf(other, sizeof other, "%s.new", path);
        NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
        nx_status wanted = NX_E_CHANGED;
        switch (how) {
        case 0:
            NX_CHECK_EQ(truncate(path, 200000), 0);
            wanted = NX_E_TRUNCATED;
            break;
        case 1: NX_CHECK_EQ(truncate(path, 700000), 0); break;
        case 2: { /* other bytes; the clock of the file system may not have moved since it was written */
            const int fd = open(path, O_WRONLY | O_CLOEXEC);
            const struct timespec times[2] = {{.tv_sec = 1000}, {.tv_sec = 1000}};
            NX_CHECK(fd >= 0 && pwrite(fd, "changed", 7, 50000) == 7 && futimens(fd, times) == 0);
            close(fd);
            break;
        }
        case 3: { /* another file of that name */
            const int fd = open(other, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
            NX_CHECK(fd >= 0 && rename(other, path) == 0);
            close(fd);
            break;
        }
        default: /* in the middle of a pass */
            NX_CHECK_EQ(nx_turn_begin(m, uses, PLAIN, never, NULL), NX_OK);
            NX_CHECK_EQ(truncate(path, 1000), 0);
            NX_CHECK_EQ(walk(&c, uses, PLAIN), NX_E_TRUNCATED);
            end_pass(&c, 1);
            wanted = NX_E_TRUNCATED;
            NX_CHECK_EQ(last_error(m).status, wanted);
        }
        NX_CHECK_EQ(pass(&c, uses, PLAIN), wanted);
        const nx_error error = last_error(m);
        NX_CHECK(error.status == wanted && strcmp(error.path, path) == 0);
        NX_CHECK_EQ(pass(&c, uses, 0), wanted); /* for good: it is another model */
        plain_close(m);
    }
}

static void a_file_that_changes_is_noticed(void) { world_for_each(file_changes); }

static void deleted(bool direct) {
    nx_extent *uses[PLAIN];
    nx_model *m = plain_open(direct, uses);
    consumer c = {.w = &plain_world, .m = m, .seed = 5};
    NX_CHECK_EQ(unlink(plain_world.files[0].path), 0);
    for (int k = 0; k < 3; k++) NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
    plain_close(m);
}

static void a_deleted_file_still_holds_its_bytes(void) { world_for_each(deleted); }

#ifdef __linux__
/* Take io_uring away from the process, as a sandbox may: entering it fails from now on. */
static int break_rings(void) {
    int n = 0;
    DIR *dir = opendir("/proc/self/fd");
    NX_CHECK(dir != NULL);
    for (struct dirent *entry; (entry = readdir(dir));) {
        char path[300], target[64] = "";
        snprintf(path, sizeof path, "/proc/self/fd/%s", entry->d_name);
        if (readlink(path, target, sizeof target - 1) < 0 || !strstr(target, "io_uring")) continue;
        const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
        NX_CHECK(null >= 0 && dup2(null, atoi(entry->d_name)) >= 0);
        close(null);
        n++;
    }
    closedir(dir);
    return n;
}

/* Whenever it breaks: an error in words each time, and memory stays valid until all is released. */
static void a_broken_engine_is_an_error_and_no_crash(void) {
    if (!world_has_engine(NX_IO_ENGINE_URING)) return;
    setenv("NEXUS_IO_ENGINE", "uring", 1);
    for (int when = 0; when < 5; when++) {
        nx_test_about("broken at %d", when);
        nx_extent *uses[PLAIN];
        nx_model *m = plain_open(true, uses);
        consumer c = {.w = &plain_world, .m = m, .seed = 5};
        nx_piece piece;
        uint64_t offsets[2] = {0, 1000}, stride;
        void *base;
        NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
        if (when == 0) NX_CHECK_EQ(break_rings(), 2);
        if (when > 0) {
            NX_CHECK_EQ(nx_turn_begin(m, uses + 3, 4, never, NULL), NX_OK);
            if (when == 4) fault(m, NX_FAULT_EAGAIN, 0, UINT64_MAX, -1);
            NX_CHECK_EQ(break_rings(), 2);
            nx_status status = NX_OK;
            if (when == 1) NX_CHECK_EQ(nx_fetch(m, uses[1], offsets, 2, 1000, &base, &stride), NX_E_IO);
            if (when == 2) NX_CHECK_EQ(nx_whole_fetch(m, uses[1], &base), NX_E_IO);
            for (int k = 0; k < 12 && status == NX_OK; k++)
                if ((status = nx_piece_acquire(m, &piece)) == NX_OK) nx_piece_release(m, 1);
            NX_CHECK_EQ(status, NX_E_IO);
            NX_CHECK_EQ(nx_piece_ready(m), 0);
            NX_CHECK_EQ(nx_fetch(m, uses[1], offsets, 2, 1000, &base, &stride), NX_E_IO);
            NX_CHECK_EQ(nx_whole_fetch(m, uses[1], &base), NX_E_IO);
            nx_turn_end(m, when % 2);
        }
        NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_E_IO);
        const nx_error error = last_error(m);
        NX_CHECK(error.status == NX_E_IO && strstr(error.text, "io_uring") != NULL);
        NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_E_IO);
        NX_CHECK_EQ(last_error(m).status, NX_E_IO); /* said again to whoever asks again */
        plain_close(m);
    }
    unsetenv("NEXUS_IO_ENGINE");
}
#endif

/* ------------------------------------------------------------ threads, lives */

typedef struct worker {
    consumer c;
    nx_extent *uses[PLAIN];
    int n_passes;
    nx_status last;
    pthread_t thread;
} worker;

static void *work(void *arg) {
    worker *own = arg;
    for (int k = 0; k < own->n_passes; k++) {
        const size_t n = 1 + pick(&own->c, PLAIN);
        if (pick(&own->c, 3) == 0) shuffle(own->uses, PLAIN, &own->c.seed);
        own->last = pass(&own->c, own->uses, n);
        if (own->last != NX_OK) break;
    }
    return NULL;
}

static worker *worker_start(nx_model *m, nx_extent **uses, int n_passes, uint64_t seed) {
    worker *own = calloc(1, sizeof *own);
    NX_CHECK(own != NULL);
    own->c = (consumer){.w = &plain_world, .m = m, .seed = seed, .demands = true};
    memcpy(own->uses, uses, sizeof own->uses);
    own->n_passes = n_passes;
    NX_CHECK_EQ(pthread_create(&own->thread, NULL, work, own), 0);
    return own;
}

static void two_threads(bool direct) {
    nx_extent *uses[PLAIN];
    nx_model *m = plain_open(direct, uses);
    nx_model_trace(m, 1);
    worker *a = worker_start(m, uses, 30, 1), *b = worker_start(m, uses, 30, 2);
    nx_stats s, before = {0};
    static nx_event events[NX_EVENTS];
    do { /* statistics and events may be looked at all the while */
        nx_model_get_stats(m, &s);
        for (size_t i = 0; i < sizeof s / sizeof(uint64_t); i++)
            NX_CHECK(((uint64_t *)&s)[i] >= ((uint64_t *)&before)[i]);
        before = s;
        const size_t n = nx_model_events(m, events, NX_EVENTS);
        for (size_t i = 1; i < n; i++) NX_CHECK(events[i].t_ns >= events[i - 1].t_ns);
        (void)last_error(m);
        sched_yield();
    } while (s.passes < 60);
    pthread_join(a->thread, NULL);
    pthread_join(b->thread, NULL);
    NX_CHECK(a->last == NX_OK && b->last == NX_OK);
    consumer sum = a->c;
    sum.passes += b->c.passes;
    sum.pieces += b->c.pieces;
    sum.bytes_used += b->c.bytes_used;
    sum.demand_reads += b->c.demand_reads;
    sum.whole_tensors += b->c.whole_tensors;
    check_stats(&sum, NULL);
    free(a);
    free(b);
    plain_close(m);
}

static void threads_take_turns(void) { world_for_each(two_threads); }

static void *close_model(void *m) {
    nx_model_close(m);
    return NULL;
}

static void closing(bool direct) {
    nx_extent *uses[PLAIN];
    nx_model *m = plain_open(direct, uses);
    consumer c = {.w = &plain_world, .m = m, .seed = 5};
    NX_CHECK_EQ(nx_turn_begin(m, uses, PLAIN, never, NULL), NX_OK);
    worker *waiting = worker_start(m, uses, 1, 1);
    pthread_t closer;
    NX_CHECK_EQ(pthread_create(&closer, NULL, close_model, m), 0);
    pthread_join(waiting->thread, NULL); /* does not wait for our turn to end */
    NX_CHECK_EQ(waiting->last, NX_E_CLOSED);
    c.passes++;
    NX_CHECK_EQ(walk(&c, uses, PLAIN), NX_OK); /* what runs, runs to its end */
    end_pass(&c, 0);
    pthread_join(closer, NULL);
    NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_E_CLOSED);
    nx_model_close(m); /* twice is fine */
    free(waiting);
    plain_close(m);
}

static void closing_ends_waits_and_lets_a_pass_end(void) { world_for_each(closing); }

static size_t open_descriptors(void) {
    size_t n = 0;
    DIR *dir = opendir("/proc/self/fd");
    if (!dir) dir = opendir("/dev/fd");
    NX_CHECK(dir != NULL);
    while (readdir(dir)) n++;
    closedir(dir);
    return n;
}

/* Pages of address space, where the system tells. */
static size_t address_space(void) {
    size_t n = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f) return 0;
    NX_CHECK_EQ(fscanf(f, "%zu", &n), 1);
    fclose(f);
    return n;
}

static void many_lives(bool direct) {
    world w;
    world_init(&w, 2, 200000, 3);
    const shape shapes[3] = {{.offset = 1, .row_bytes = 1000, .rows = 30},
                             {.file = 1, .offset = 5000, .row_bytes = 700, .rows = 33},
                             {.file = 1, .offset = 50000, .row_bytes = 700, .rows = 33}};
    size_t descriptors = 0, pages = 0;
    const int n = ROUNDS * 10 + 10; /* for each engine and mode; 1,040 in all without sanitizers */
    for (int k = 0; k < n; k++) {
        if (k == 10) {
            descriptors = open_descriptors();
            pages = address_space();
        }
        nx_model *m = open_shapes(&w, shapes, 3, 1u << 20, 4096, 1u << 20, direct);
        nx_extent *uses[3] = {nx_model_extent(m, 0), nx_model_extent(m, 1), nx_model_extent(m, 2)};
        consumer *c = calloc(1, sizeof *c);
        *c = (consumer){.w = &w, .m = m, .seed = (uint64_t)k, .demands = true};
        if (k % 4 == 1) NX_CHECK_EQ(pass(c, uses, 3), NX_OK);
        if (k % 4 == 2) { /* released with everything under way */
            NX_CHECK_EQ(nx_turn_begin(m, uses, 3, never, NULL), NX_OK);
            nx_turn_end(m, 0);
        }
        if (k % 4 == 3) {
            fault(m, NX_FAULT_EIO, 0, UINT64_MAX, -1);
            NX_CHECK_EQ(pass(c, uses, 3), NX_E_IO);
        }
        free(c);
        nx_model_release(m);
    }
    NX_CHECK_EQ(open_descriptors(), descriptors);
    NX_CHECK(address_space() <= pages + (64u << 20) / NX_PAGE); /* one leaked ring a life would be more */
    world_free(&w);
}

static void a_thousand_models_leave_nothing_behind(void) { world_for_each(many_lives); }

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
        NX_TEST(a_wait_that_is_stopped_can_go_on),
        NX_TEST(after_a_read_error_the_next_pass_works),
        NX_TEST(an_error_of_reading_ahead_is_not_kept),
        NX_TEST(a_file_that_changes_is_noticed),
        NX_TEST(a_deleted_file_still_holds_its_bytes),
#ifdef __linux__
        NX_TEST(a_broken_engine_is_an_error_and_no_crash),
#endif
        NX_TEST(threads_take_turns),
        NX_TEST(closing_ends_waits_and_lets_a_pass_end),
        NX_TEST(a_thousand_models_leave_nothing_behind),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
