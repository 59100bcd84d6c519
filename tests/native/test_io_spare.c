/*
 * test_io_spare.c: reads that may be in vain take what the device has to spare: they never stand in
 * the way of others, few of them are in hand at a time, and they can be raised or dropped.
 */
#include "io_fixture.h"
#include "io_internal.h"

#define N 12

typedef struct spares {
    target t[N];
    nx_read *r[N];
} spares;

/* N reads of `nbytes`, 200000 bytes apart from `first` on. */
static void spares_submit(fixture *f, spares *s, uint64_t first, uint64_t nbytes) {
    for (int i = 0; i < N; i++) {
        target_init(&s->t[i], f->file, first + (uint64_t)i * 200000, nbytes, (uint32_t)first);
        s->r[i] = &s->t[i].read;
    }
    NX_CHECK_EQ(nx_io_submit_spare(f->io, s->r, N), NX_OK);
}

static void spares_end(fixture *f, spares *s) {
    nx_io_clear_faults(f->io);
    for (int i = 0; i < N; i++) {
        if (!s->r[i]->done) NX_CHECK_EQ(nx_io_wait(f->io, s->r[i], NULL, NULL), NX_OK);
        if (s->r[i]->status == NX_OK) check_arrived(&s->t[i]);
        target_free(&s->t[i]);
    }
    NX_CHECK_EQ(f->io->spare_active, 0);
    NX_CHECK_EQ(f->io->n_requests, 0);
    NX_CHECK(f->io->head == NULL && f->io->spare == NULL);
}

static int n_done(const spares *s) {
    int n = 0;
    for (int i = 0; i < N; i++) n += s->r[i]->done;
    return n;
}

/* A read that does not end: of [0, 1000). */
static void hold(fixture *f, target *t) {
    fault(f->io, NX_FAULT_EAGAIN, 0, 1000, -1);
    target_init(t, f->file, 0, 1000, 0);
    NX_CHECK_EQ(submit(f->io, t), NX_OK);
}

static void nothing_beside_others(fixture *f) {
    target held, late;
    spares s;
    hold(f, &held);
    spares_submit(f, &s, 200000, 5000);
    poll_often(f->io);
    NX_CHECK_EQ(n_done(&s), 0);
    NX_CHECK_EQ(f->io->spare_active, 0);
    target_init(&late, f->file, 100000, 5000, 0); /* asked for after them, and served before */
    NX_CHECK_EQ(submit(f->io, &late), NX_OK);
    NX_CHECK_EQ(nx_io_wait(f->io, &late.read, NULL, NULL), NX_OK);
    check_arrived(&late);
    NX_CHECK_EQ(n_done(&s), 0);
    nx_io_spare_limits(f->io, 0, 1); /* unless it is allowed */
    for (int i = 0; i < 10000 && n_done(&s) < N; i++) {
        NX_CHECK_EQ(nx_io_poll(f->io), NX_OK);
        usleep(100);
    }
    NX_CHECK_EQ(n_done(&s), N);
    NX_CHECK_EQ(held.read.done, 0);
    nx_io_clear_faults(f->io);
    NX_CHECK_EQ(nx_io_wait(f->io, &held.read, NULL, NULL), NX_OK);
    target_free(&held);
    target_free(&late);
    spares_end(f, &s);
}

static void spare_reads_wait_until_nothing_else_is_in_hand(void) { for_each(8, nothing_beside_others); }

static void few_at_a_time(fixture *f) {
    spares s;
    nx_io_spare_limits(f->io, 3, 0);
    fault(f->io, NX_FAULT_EAGAIN, 0, FILE_BYTES, -1);
    spares_submit(f, &s, 0, 150000); /* several requests each */
    poll_often(f->io);
    NX_CHECK_EQ(f->io->spare_active, 3);
    nx_io_clear_faults(f->io);
    fault(f->io, NX_FAULT_EAGAIN, 0, 400000, -1); /* the first two hang, the device has room for others */
    read_and_check(f, 3000000, 100000, 0);
    NX_CHECK(f->io->spare_active <= 3);
    spares_end(f, &s);
}

static void few_spare_requests_are_at_the_device_and_others_pass_them(void) { for_each(8, few_at_a_time); }

static void raised(fixture *f) {
    target held;
    spares s;
    hold(f, &held);
    spares_submit(f, &s, 200000, 150000);
    nx_io_raise(f->io, s.r[7]); /* in the middle */
    NX_CHECK_EQ(nx_io_poll(f->io), NX_OK);
    NX_CHECK_EQ(nx_io_wait(f->io, s.r[7], NULL, NULL), NX_OK);
    nx_io_raise(f->io, s.r[7]);                                  /* done: nothing to raise */
    NX_CHECK_EQ(nx_io_wait(f->io, s.r[0], NULL, NULL), NX_OK); /* waiting raises as well */
    NX_CHECK_EQ(nx_io_wait(f->io, s.r[N - 1], NULL, NULL), NX_OK);
    NX_CHECK_EQ(n_done(&s), 3);
    NX_CHECK_EQ(nx_io_submit_spare(f->io, &s.r[3], 1), NX_E_BUSY);
    nx_io_clear_faults(f->io);
    NX_CHECK_EQ(nx_io_wait(f->io, &held.read, NULL, NULL), NX_OK);
    target_free(&held);
    spares_end(f, &s);
}

static void a_spare_read_that_is_wanted_goes_ahead(void) { for_each(8, raised); }

static void dropped(fixture *f) {
    target held;
    spares s;
    hold(f, &held);
    spares_submit(f, &s, 200000, 150000);
    NX_CHECK_EQ(nx_io_drop(f->io, s.r[2]), 1); /* not begun: done at once */
    NX_CHECK(s.r[2]->done && s.r[2]->status == NX_E_ABORTED);
    NX_CHECK_EQ(nx_io_drop(f->io, s.r[2]), 0);
    NX_CHECK_EQ(nx_io_drop(f->io, s.r[0]), 1); /* the first of the spare ones */
    nx_io_clear_faults(f->io);
    NX_CHECK_EQ(nx_io_wait(f->io, &held.read, NULL, NULL), NX_OK);
    /* Begun: what is in hand ends, the rest is not read. */
    for (int i = 0; i < N; i++)
        if (!s.r[i]->done) NX_CHECK_EQ(nx_io_wait(f->io, s.r[i], NULL, NULL), NX_OK);
    nx_io_spare_limits(f->io, 1, 0);
    target big;
    target_init(&big, f->file, 3000000, 500000, 0);
    nx_read *r = &big.read;
    fault(f->io, NX_FAULT_EAGAIN, 0, FILE_BYTES, -1);
    NX_CHECK_EQ(nx_io_submit_spare(f->io, &r, 1), NX_OK);
    poll_often(f->io);
    NX_CHECK_EQ(f->io->spare_active, 1);
    NX_CHECK_EQ(nx_io_drop(f->io, r), 1);
    NX_CHECK_EQ(r->done, 0);
    NX_CHECK_EQ(nx_io_drop(f->io, r), 0); /* nothing is left to drop */
    nx_io_clear_faults(f->io);
    (void)nx_io_wait(f->io, r, NULL, NULL);
    NX_CHECK(r->done && r->status == NX_E_ABORTED && r->bytes_read <= REQUEST_BYTES + 8192);
    target_free(&held);
    target_free(&big);
    spares_end(f, &s);
}

static void a_spare_read_that_nobody_wants_is_not_read(void) { for_each(8, dropped); }

/* All kinds at once, with faults that heal: all bytes right, nothing left over. */
static void fuzz(fixture *f) {
    enum { SLOTS = 20, ROUNDS = 800 };
    target t[SLOTS];
    int live[SLOTS] = {0};
    uint64_t seed = 777 + (uint64_t)f->engine * 10 + f->mode;
    for (int round = 0; round < ROUNDS; round++) {
        const int s = (int)(nx_test_random(&seed) % SLOTS);
        nx_read *read = &t[s].read;
        if (round % 50 == 0)
            nx_io_spare_limits(f->io, 1 + (uint32_t)(nx_test_random(&seed) % 4), (uint32_t)(nx_test_random(&seed) % 3));
        if (live[s]) {
            switch (nx_test_random(&seed) % 6) {
            case 0: (void)nx_io_drop(f->io, read); break;
            case 1: (void)nx_io_cancel(f->io, read); break;
            case 2: nx_io_raise(f->io, read); break;
            default: break;
            }
            const nx_status status = nx_io_wait(f->io, read, NULL, NULL);
            NX_CHECK(status == NX_OK || status == NX_E_ABORTED);
            if (status == NX_OK) check_arrived(&t[s]);
            target_free(&t[s]);
        }
        const uint64_t nbytes = 1 + nx_test_random(&seed) % (nx_test_random(&seed) % 4 ? 9000 : 300000);
        const uint64_t offset = nx_test_random(&seed) % (FILE_BYTES - nbytes + 1);
        target_init(&t[s], f->file, offset, nbytes, (uint32_t)offset);
        const uint64_t kind = nx_test_random(&seed) % 4;
        NX_CHECK_EQ(kind == 0   ? nx_io_submit(f->io, &read, 1)
                    : kind == 1 ? nx_io_submit_front(f->io, &read, 1)
                                : nx_io_submit_spare(f->io, &read, 1),
                    NX_OK);
        live[s] = 1;
        NX_CHECK(f->io->spare_active <= f->io->n_requests);
        if (round % 40 == 0) {
            static const int kinds[] = {NX_FAULT_EIO, NX_FAULT_SHORT, NX_FAULT_EAGAIN};
            nx_io_clear_faults(f->io);
            fault(f->io, kinds[round / 40 % 3], 0, FILE_BYTES, 3);
        }
    }
    nx_io_clear_faults(f->io);
    for (int s = 0; s < SLOTS; s++) {
        if (!live[s]) continue;
        NX_CHECK_EQ(nx_io_wait(f->io, &t[s].read, NULL, NULL), NX_OK);
        check_arrived(&t[s]);
        target_free(&t[s]);
    }
    NX_CHECK_EQ(f->io->spare_active, 0);
    NX_CHECK_EQ(f->io->n_requests, 0);
    NX_CHECK(f->io->spare == NULL);
}

static void reads_of_all_kinds_bring_the_right_bytes(void) { for_each(4, fuzz); }

static void destroyed(fixture *f) {
    nx_io_options options = {.engine = f->engine};
    nx_io *io;
    target t[N];
    NX_CHECK_EQ(nx_io_create(&options, &io), NX_OK);
    for (int i = 0; i < N; i++) {
        target_init(&t[i], f->file, (uint64_t)i * 100000, 90000, 0);
        nx_read *read = &t[i].read;
        NX_CHECK_EQ(nx_io_submit_spare(io, &read, 1), NX_OK);
    }
    nx_io_destroy(io);
    for (int i = 0; i < N; i++) {
        NX_CHECK(t[i].read.done && (t[i].read.status == NX_OK || t[i].read.status == NX_E_CLOSED));
        target_free(&t[i]);
    }
}

static void an_engine_with_spare_reads_can_be_destroyed(void) { for_each(8, destroyed); }

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(spare_reads_wait_until_nothing_else_is_in_hand),
        NX_TEST(few_spare_requests_are_at_the_device_and_others_pass_them),
        NX_TEST(a_spare_read_that_is_wanted_goes_ahead),
        NX_TEST(a_spare_read_that_nobody_wants_is_not_read),
        NX_TEST(reads_of_all_kinds_bring_the_right_bytes),
        NX_TEST(an_engine_with_spare_reads_can_be_destroyed),
    };
    set_up();
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
