/*
 * nx_consumer.h: for the tests of the pager: a consumer that acquires, holds and releases as
 * backend/graph.c does, and compares every byte with the file for as long as it holds it.
 */
#ifndef NX_CONSUMER_H
#define NX_CONSUMER_H

#include "manifest.h"
#include "nx_test.h"
#include "nx_world.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define ROUNDS 6
#else
#define ROUNDS 25
#endif

/* A program that includes this does not need all of it. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

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
        /* Of many slots only the neighbours: they are made in order, round and round. */
        const uint64_t last = p->head_slot - i > 50 ? i + 4 : p->head_slot;
        for (uint64_t k = i + 1; k < last; k++) {
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
    check_ring(c->m);
    nx_turn_end(c->m, failed); /* from here on the ring is somebody else's */
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
    NX_CHECK(s.bytes_read + s.ring_bytes >= s.bytes_used); /* all was read, some before a reset */
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

#pragma GCC diagnostic pop

#endif
