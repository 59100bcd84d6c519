/*
 * test_pager_faults.c: what the pager does when waiting is stopped, reads fail, files change, the engine
 * breaks, threads meet and models end. Nothing depends on time: a read that must stay under way is
 * answered EAGAIN for as long as the test wants.
 */
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>

#include "nx_consumer.h"

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
        const nx_demand *d = &m->pager.demand[0]; /* both fetched one record */
        NX_CHECK(d->capacity >= 1);
        NX_CHECK_EQ(d->n, 0);
        NX_CHECK(d->reads[0].done);
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
    size_t descriptors = 0, pages __attribute__((unused)) = 0;
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
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) /* they keep what is freed */
    NX_CHECK(address_space() <= pages + (64u << 20) / NX_PAGE); /* a ring leaked each time is more */
#endif
    world_free(&w);
}

static void a_thousand_models_leave_nothing_behind(void) { world_for_each(many_lives); }

int main(int argc, char **argv) {
    static const nx_test tests[] = {
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
