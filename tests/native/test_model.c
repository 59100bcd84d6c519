/*
 * test_model.c: what is claimed is read into place, however often that is stopped or fails first;
 * accounting, errors and the trace of a model.
 */
#include <errno.h>
#include <pthread.h>

#include "nx_consumer.h"

#define PINNED 20

/* 20 pinned tensors of odd sizes in two files, next to streamed and host ones. */
static world pinned_world;

static nx_model *pinned_open(bool direct) {
    uint64_t offset = 3;
    world_init(&pinned_world, 2, 3u << 20, 17);
    world_manifest(&pinned_world, 1u << 16, 4096, 0, 0, direct);
    for (uint64_t i = 0; i < PINNED; i++) {
        char name[32];
        snprintf(name, sizeof name, "blk.%" PRIu64 ".weight", i);
        const uint64_t row_bytes = 1 + 977 * i, rows = 1 + i % 9;
        world_tensor(&pinned_world, "ram", i % 2, i % 5 == 0 ? 4096 * i : offset, row_bytes, rows, 1, 0, name);
        offset += row_bytes * rows;
    }
    world_tensor(&pinned_world, "nvme", 0, 99, 100, 100, 1, 0, "streamed");
    world_tensor(&pinned_world, "host", 1, 99, 100, 100, 1, 0, "host");
    world_tensor(&pinned_world, "ram", 1, 5000, 100000, 10, 1, 0, "never claimed");
    return world_open(&pinned_world, "", 0);
}

static void pinned_close(nx_model *m) {
    nx_model_release(m);
    world_free(&pinned_world);
}

static uint64_t claim_all(nx_model *m) {
    uint64_t nbytes = 0;
    for (size_t i = 0; i < PINNED + 2; i++) {
        nx_extent *e = nx_model_extent(m, (i * 7) % (PINNED + 2)); /* not in the order of the manifest */
        NX_CHECK_EQ(nx_model_claim(m, e), NX_OK);
        NX_CHECK_EQ(nx_model_claim(m, e), NX_OK); /* twice is once */
        if (e->tier == NX_TIER_RAM) nbytes += e->nbytes;
    }
    return nbytes;
}

static void check_pinned(nx_model *m) {
    for (size_t i = 0; i < nx_model_n_extents(m); i++) {
        nx_extent *e = nx_model_extent(m, i);
        NX_CHECK((e->tier == NX_TIER_RAM) == (e->pinned != NULL));
        if (e->claimed && e->pinned) NX_CHECK(world_same(&pinned_world, e, 0, e->pinned, e->nbytes));
    }
}

typedef struct watch {
    uint64_t calls, done, total, stop_at; /* stop when so much is done */
} watch;

static int watching(void *ctx, uint64_t done, uint64_t total) {
    watch *w = ctx;
    NX_CHECK(done >= w->done && done <= total);
    NX_CHECK(w->calls == 0 || total == w->total);
    w->calls++;
    w->done = done;
    w->total = total;
    return done >= w->stop_at;
}

static void loading(bool direct) {
    nx_model *m = pinned_open(direct);
    watch w = {.stop_at = UINT64_MAX};
    NX_CHECK_EQ(nx_model_finish_load(m, watching, &w), NX_OK); /* nothing is claimed, nothing to do */
    NX_CHECK_EQ(w.calls, 0);
    const uint64_t nbytes = claim_all(m);
    NX_CHECK_EQ(nx_model_finish_load(m, watching, &w), NX_OK);
    NX_CHECK(w.calls > 0 && w.done == nbytes && w.total == nbytes);
    check_pinned(m);
    nx_stats s;
    nx_model_get_stats(m, &s);
    NX_CHECK(s.bytes_loaded >= nbytes && s.bytes_read == s.bytes_loaded);
    NX_CHECK(s.load_ns > 0);
    uint64_t pinned = 0;
    for (size_t i = 0; i < nx_model_n_extents(m); i++)
        if (nx_model_extent(m, i)->pinned) pinned += nx_model_extent(m, i)->nbytes;
    NX_CHECK(s.pinned_bytes >= pinned && s.pinned_bytes <= pinned + (PINNED + 3) * 2 * NX_PAGE);
    NX_CHECK(s.ring_bytes == 1u << 16 && s.host_bytes == 10000 && s.bytes_used == 0);
    w.calls = 0;
    NX_CHECK_EQ(nx_model_finish_load(m, watching, &w), NX_OK); /* all is there */
    NX_CHECK_EQ(w.calls, 0);
    /* One more, later. */
    nx_extent *late = nx_model_find(m, "never claimed");
    NX_CHECK_EQ(nx_model_claim(m, late), NX_OK);
    NX_CHECK_EQ(nx_model_finish_load(m, NULL, NULL), NX_OK);
    check_pinned(m);
    NX_CHECK(world_same(&pinned_world, late, 0, late->pinned, late->nbytes));
    pinned_close(m);
}

static void what_is_claimed_is_read_into_place(void) { world_for_each(loading); }

static void stopped(bool direct) {
    nx_model *m = pinned_open(direct);
    const uint64_t nbytes = claim_all(m);
    for (uint64_t part = 0; part <= 4; part++) {
        watch w = {.stop_at = nbytes * part / 4};
        NX_CHECK_EQ(nx_model_finish_load(m, watching, &w), NX_E_ABORTED);
        NX_CHECK(w.done >= w.stop_at && w.total == nbytes);
        NX_CHECK_EQ(last_error(m).status, NX_OK); /* to be asked to stop is no error */
    }
    nx_interrupt_request(); /* Ctrl-C */
    NX_CHECK_EQ(nx_model_finish_load(m, NULL, NULL), NX_E_ABORTED);
    nx_interrupt_arm();
    nx_interrupt_disarm();
    NX_CHECK_EQ(nx_model_finish_load(m, NULL, NULL), NX_OK);
    check_pinned(m);
    pinned_close(m);
    m = pinned_open(direct); /* released in the middle of it */
    claim_all(m);
    pinned_close(m);
}

static void a_load_that_is_stopped_goes_on_where_it_was(void) { world_for_each(stopped); }

static void fails(bool direct) {
    nx_model *m = pinned_open(direct);
    nx_extent *bad = nx_model_extent(m, 13);
    fault(m, NX_FAULT_EIO, bad->offset + 5, bad->offset + 6, -1);
    const uint64_t nbytes = claim_all(m);
    for (int k = 0; k < 3; k++) {
        watch w = {.stop_at = UINT64_MAX};
        NX_CHECK_EQ(nx_model_finish_load(m, watching, &w), NX_E_IO);
        NX_CHECK(w.done < nbytes);
        const nx_error error = last_error(m);
        NX_CHECK(error.status == NX_E_IO && error.sys_errno == EIO && error.tensor[0]);
        NX_CHECK(strcmp(error.path, pinned_world.files[nx_model_find(m, error.tensor)->file].path) == 0);
        NX_CHECK(error.offset <= bad->offset + 5);
    }
    nx_model_clear_faults(m);
    fault(m, NX_FAULT_SHORT, 0, UINT64_MAX, 30);
    watch w = {.stop_at = UINT64_MAX};
    NX_CHECK_EQ(nx_model_finish_load(m, watching, &w), NX_OK);
    NX_CHECK_EQ(w.done, nbytes);
    check_pinned(m);
    pinned_close(m);

    m = pinned_open(direct); /* a file that is cut off in the meantime */
    NX_CHECK_EQ(truncate(pinned_world.files[1].path, 4096), 0);
    claim_all(m);
    NX_CHECK_EQ(nx_model_finish_load(m, NULL, NULL), NX_E_TRUNCATED);
    NX_CHECK_EQ(last_error(m).status, NX_E_TRUNCATED);
    pinned_close(m);
}

static void a_load_that_failed_can_be_tried_again(void) { world_for_each(fails); }

static void reads(bool direct) {
    nx_model *m = pinned_open(direct);
    uint64_t seed = 4;
    uint8_t *out = malloc(1 << 20);
    NX_CHECK(out != NULL);
    for (size_t i = 0; i < nx_model_n_extents(m); i++) {
        const nx_extent *e = nx_model_extent(m, i);
        for (int k = 0; k < 20; k++) {
            const uint64_t offset = nx_test_random(&seed) % (e->nbytes + 1);
            const uint64_t n = nx_test_random(&seed) % (e->nbytes - offset + 1);
            memset(out, 0xA5, n + 1);
            NX_CHECK_EQ(nx_model_read(m, e, offset, out, n), NX_OK);
            NX_CHECK(world_same(&pinned_world, e, offset, out, n) && out[n] == 0xA5);
        }
        NX_CHECK_EQ(nx_model_read(m, e, 0, out, e->nbytes + 1), NX_E_INVALID);
        NX_CHECK_EQ(nx_model_read(m, e, e->nbytes + 1, out, 0), NX_E_INVALID);
        NX_CHECK_EQ(nx_model_read(m, e, UINT64_MAX, out, 2), NX_E_INVALID);
        NX_CHECK_EQ(nx_model_read(m, e, 1, out, UINT64_MAX), NX_E_INVALID);
    }
    NX_CHECK_EQ(last_error(m).status, NX_OK);
    NX_CHECK_EQ(truncate(pinned_world.files[1].path, 0), 0);
    NX_CHECK_EQ(nx_model_read(m, nx_model_find(m, "host"), 0, out, 10), NX_E_TRUNCATED);
    const nx_error error = last_error(m);
    NX_CHECK(error.status == NX_E_TRUNCATED && strcmp(error.tensor, "host") == 0 && error.offset == 99);
    free(out);
    pinned_close(m);
}

static void parts_of_tensors_are_read_whatever_their_tier(void) { world_for_each(reads); }

/* ------------------------------------------------------------ accounting */

static void resets(bool direct) {
    nx_model *m = pinned_open(direct);
    nx_extent *streamed = nx_model_find(m, "streamed");
    fault(m, NX_FAULT_EIO, 0, UINT64_MAX, 1);
    claim_all(m);
    NX_CHECK_EQ(nx_model_finish_load(m, NULL, NULL), NX_OK);
    nx_model_clear_faults(m);
    nx_stats s;
    nx_model_get_stats(m, &s);
    NX_CHECK(s.bytes_loaded > 0 && s.retries == 1);
    nx_model_reset_stats(m);
    nx_model_get_stats(m, &s);
    NX_CHECK(s.bytes_read == 0 && s.bytes_loaded == 0 && s.retries == 0 && s.passes == 0);
    NX_CHECK(s.pinned_bytes > 0 && s.ring_bytes > 0); /* what is, is */
    consumer c = {.w = &pinned_world, .m = m, .seed = 1};
    for (int k = 0; k < 3; k++) {
        NX_CHECK_EQ(pass(&c, &streamed, 1), NX_OK);
        nx_note_compute(m, 7, 100);
        nx_note_pass(m, 1000);
        check_stats(&c, NULL);
        nx_model_get_stats(m, &s);
        NX_CHECK(s.bytes_read >= s.bytes_loaded && s.segments == 1 && s.compute_ns == 100 && s.pass_ns == 1000);
        nx_model_reset_stats(m);
        c.passes = c.pieces = c.bytes_used = 0;
    }
    pinned_close(m);
}

static void statistics_start_again_when_reset(void) { world_for_each(resets); }

static void traces(bool direct) {
    nx_extent *uses[PLAIN];
    nx_model *m = plain_open(direct, uses);
    consumer c = {.w = &plain_world, .m = m, .seed = 1};
    static nx_event events[NX_EVENTS + 1];
    NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
    NX_CHECK_EQ(nx_model_events(m, events, NX_EVENTS), 0); /* off until asked for */
    nx_model_trace(m, 1);
    NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
    size_t n = nx_model_events(m, events, NX_EVENTS);
    NX_CHECK(n > 2 && events[0].kind == NX_EVENT_PASS_BEGIN && events[0].a == 3 * PLAIN);
    NX_CHECK(events[n - 1].kind == NX_EVENT_PASS_END && events[n - 1].a == 3 * PLAIN);
    NX_CHECK_EQ(nx_model_events(m, events, 1), 1); /* the newest */
    NX_CHECK_EQ(events[0].kind, NX_EVENT_PASS_END);
    nx_model_trace(m, 0);
    NX_CHECK_EQ(pass(&c, uses, PLAIN), NX_OK);
    NX_CHECK_EQ(nx_model_events(m, events, NX_EVENTS), n);
    nx_model_trace(m, 1);
    for (uint32_t k = 0; k < NX_EVENTS + 10; k++) nx_note_compute(m, k, k);
    NX_CHECK_EQ(nx_model_events(m, events, NX_EVENTS + 1), NX_EVENTS); /* so many are kept */
    for (uint32_t k = 0; k < NX_EVENTS; k++) NX_CHECK(events[k].a == k + 10 && events[k].b == k + 10);
    plain_close(m);
}

static void the_trace_keeps_the_newest_events(void) { world_for_each(traces); }

static void the_facts_of_a_file_are_told(void) {
    nx_model *m = pinned_open(true);
    struct nx_file_info info;
    for (uint32_t i = 0; i < 2; i++) {
        NX_CHECK_EQ(nx_model_file_info(m, i, &info), NX_OK);
        NX_CHECK(info.nbytes == pinned_world.files[i].nbytes && info.reason[0]);
    }
    NX_CHECK_EQ(nx_model_file_info(m, 2, &info), NX_E_INVALID);
    NX_CHECK(strlen(nx_model_io_engine(m)) > 0);
    pinned_close(m);
}

static void *other_thread(void *seen) {
    *(nx_model **)seen = nx_loading_get();
    return NULL;
}

static void the_model_being_loaded_is_that_of_the_thread(void) {
    nx_model *m = pinned_open(true), *seen = m;
    pthread_t thread;
    NX_CHECK(nx_loading_get() == NULL);
    nx_loading_set(m);
    NX_CHECK(nx_loading_get() == m);
    NX_CHECK_EQ(pthread_create(&thread, NULL, other_thread, &seen), 0);
    pthread_join(thread, NULL);
    NX_CHECK(seen == NULL);
    nx_loading_set(NULL);
    NX_CHECK(nx_loading_get() == NULL);
    pinned_close(m);
}

/* Claims, statistics and graphs from several threads at once. */
static void *claimer(void *m) {
    claim_all(m);
    NX_CHECK_EQ(nx_model_finish_load(m, NULL, NULL), NX_OK);
    return NULL;
}

static void several(bool direct) {
    nx_model *m = pinned_open(direct);
    nx_extent *streamed = nx_model_find(m, "streamed");
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) NX_CHECK_EQ(pthread_create(&threads[i], NULL, claimer, m), 0);
    consumer c = {.w = &pinned_world, .m = m, .seed = 1};
    nx_stats s;
    for (int k = 0; k < 20; k++) {
        NX_CHECK_EQ(pass(&c, &streamed, 1), NX_OK);
        nx_model_get_stats(m, &s);
        NX_CHECK(s.bytes_read >= s.bytes_loaded);
    }
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    check_pinned(m);
    pinned_close(m);
}

static void threads_may_load_and_compute_at_once(void) { world_for_each(several); }

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(what_is_claimed_is_read_into_place),
        NX_TEST(a_load_that_is_stopped_goes_on_where_it_was),
        NX_TEST(a_load_that_failed_can_be_tried_again),
        NX_TEST(parts_of_tensors_are_read_whatever_their_tier),
        NX_TEST(statistics_start_again_when_reset),
        NX_TEST(the_trace_keeps_the_newest_events),
        NX_TEST(the_facts_of_a_file_are_told),
        NX_TEST(the_model_being_loaded_is_that_of_the_thread),
        NX_TEST(threads_may_load_and_compute_at_once),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
