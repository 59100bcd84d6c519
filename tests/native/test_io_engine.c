/*
 * test_io_engine.c: files that change, order, cancelling, threads, signals, the choice of the
 * engine and the probe: the promises of nexus_io.h that are not about the bytes of one read.
 */
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>

#include "io_fixture.h"

/* ---------------------------------------------------------------- files */

static void a_file_that_was_truncated_is_noticed(void) {
    char path[320];
    snprintf(path, sizeof path, "%s/short", test_dir);
    for (size_t e = 0; e < n_engines; e++) {
        fixture f = fixture_open(engines[e], NX_IO_DIRECT, 8, 0);
        nx_file *file;
        target t;
        write_file(path, 300000);
        NX_CHECK_EQ(nx_file_open(path, NX_IO_DIRECT, &file), NX_OK);
        NX_CHECK_EQ(nx_file_check(file), NX_OK);
        NX_CHECK_EQ(truncate(path, 100001), 0);
        target_init(&t, file, 50000, 200000, 50000);
        NX_CHECK_EQ(submit(f.io, &t), NX_OK);
        NX_CHECK_EQ(nx_io_wait(f.io, &t.read, NULL, NULL), NX_E_TRUNCATED);
        NX_CHECK_EQ(t.read.error_offset, 100001);
        NX_CHECK_EQ(nx_file_check(file), NX_E_TRUNCATED);
        target_free(&t);
        nx_file_close(file);
        fixture_close(&f);
    }
    NX_CHECK_EQ(unlink(path), 0);
}

static void a_file_that_was_overwritten_or_replaced_is_noticed(void) {
    char path[320], other[320];
    nx_file *file;
    snprintf(path, sizeof path, "%s/model", test_dir);
    snprintf(other, sizeof other, "%s/other", test_dir);

    write_file(path, 5000);
    set_mtime(path, 1000000000);
    NX_CHECK_EQ(nx_file_open(path, NX_IO_DIRECT, &file), NX_OK);
    NX_CHECK_EQ(nx_file_check(file), NX_OK);
    write_file(path, 5000); /* the same size, in place */
    NX_CHECK_EQ(nx_file_check(file), NX_E_CHANGED);
    set_mtime(path, 1000000000);
    NX_CHECK_EQ(nx_file_check(file), NX_OK);
    write_file(path, 6000);
    NX_CHECK_EQ(nx_file_check(file), NX_E_CHANGED);
    nx_file_close(file);

    NX_CHECK_EQ(nx_file_open(path, NX_IO_DIRECT, &file), NX_OK);
    write_file(other, 6000);
    NX_CHECK_EQ(rename(other, path), 0);
    NX_CHECK_EQ(nx_file_check(file), NX_E_CHANGED);
    NX_CHECK_EQ(unlink(path), 0);
    NX_CHECK_EQ(nx_file_check(file), NX_OK); /* its bytes are still what they were */
    nx_file_close(file);
}

static void what_cannot_be_read_is_refused_at_open(void) {
    char path[320];
    nx_file *file;
    snprintf(path, sizeof path, "%s/absent", test_dir);
    errno = 0;
    NX_CHECK_EQ(nx_file_open(path, NX_IO_DIRECT, &file), NX_E_IO);
    NX_CHECK_EQ(errno, ENOENT);
    NX_CHECK(file == NULL);
    NX_CHECK_EQ(nx_file_open(test_dir, NX_IO_DIRECT, &file), NX_E_INVALID);
    NX_CHECK_EQ(errno, EISDIR);
}

static void an_empty_file_can_be_opened(void) {
    char path[320];
    nx_file *file;
    nx_file_info info;
    snprintf(path, sizeof path, "%s/empty", test_dir);
    write_file(path, 0);
    NX_CHECK_EQ(nx_file_open(path, NX_IO_DIRECT, &file), NX_OK);
    nx_file_get_info(file, &info);
    NX_CHECK_EQ(info.nbytes, 0);
    NX_CHECK_EQ(info.direct, 0);
    NX_CHECK(strlen(info.reason) > 0);
    nx_file_close(file);
    NX_CHECK_EQ(unlink(path), 0);
}

static void file_info_tells_what_was_opened(void) {
    nx_file *file;
    nx_file_info info;
    struct stat st;
    NX_CHECK_EQ(stat(test_path, &st), 0);
    NX_CHECK_EQ(nx_file_open(test_path, NX_IO_DIRECT, &file), NX_OK);
    nx_file_get_info(file, &info);
    NX_CHECK_EQ(info.nbytes, FILE_BYTES);
    NX_CHECK_EQ(info.device, st.st_dev);
    NX_CHECK_EQ(info.inode, st.st_ino);
    NX_CHECK(info.offset_align >= 1 && info.mem_align >= 1);
    NX_CHECK(strlen(info.reason) > 0);
    nx_file_close(file);
}

/* ---------------------------------------------------------------- order */

typedef struct asked {
    int n, stop_at;
} asked;

static int ask(void *ctx) {
    asked *a = ctx;
    return ++a->n >= a->stop_at;
}

static void abort_leaves_the_read(fixture *f) {
    asked a = {.stop_at = 3};
    target t;
    fault(f->io, NX_FAULT_EAGAIN, 0, FILE_BYTES, -1);
    target_init(&t, f->file, 777, 500000, 777);
    NX_CHECK_EQ(submit(f->io, &t), NX_OK);
    NX_CHECK_EQ(nx_io_wait(f->io, &t.read, ask, &a), NX_E_ABORTED);
    NX_CHECK_EQ(a.n, 3);
    NX_CHECK_EQ(t.read.done, 0);
    nx_io_clear_faults(f->io);
    NX_CHECK_EQ(nx_io_wait(f->io, &t.read, NULL, NULL), NX_OK);
    check_arrived(&t);
    target_free(&t);
}

static void an_aborted_wait_leaves_a_read_that_completes(void) {
    for_each(4, abort_leaves_the_read);
}

static void cancel_only_what_waits(fixture *f) {
    target first, second;
    fault(f->io, NX_FAULT_EAGAIN, 0, 4096, -1);
    target_init(&first, f->file, 0, 1000, 0);
    target_init(&second, f->file, 100000, 1000, 0);
    NX_CHECK_EQ(submit(f->io, &first), NX_OK);
    NX_CHECK_EQ(submit(f->io, &second), NX_OK); /* the depth is 1: it is not issued */
    NX_CHECK_EQ(nx_io_cancel(f->io, &first.read), 0);
    NX_CHECK_EQ(nx_io_cancel(f->io, &second.read), 1);
    NX_CHECK_EQ(second.read.done, 1);
    NX_CHECK_EQ(second.read.status, NX_E_ABORTED);
    NX_CHECK_EQ(nx_io_cancel(f->io, &second.read), 0);
    nx_io_clear_faults(f->io);
    NX_CHECK_EQ(nx_io_wait(f->io, &first.read, NULL, NULL), NX_OK);
    NX_CHECK_EQ(submit(f->io, &second), NX_OK);
    NX_CHECK_EQ(nx_io_wait(f->io, &second.read, NULL, NULL), NX_OK);
    check_arrived(&second);
    target_free(&first);
    target_free(&second);
}

static void a_read_that_was_not_issued_can_be_cancelled(void) {
    for_each(1, cancel_only_what_waits);
}

/* With one request at a time, a read that never ends holds up what comes after it, and nothing
 * else. */
static void order_is_kept(fixture *f) {
    enum { HOLD, BACK_1, BACK_2, FRONT_1, FRONT_2, FRONT_3, N };
    static const int expected[] = {FRONT_3, FRONT_1, FRONT_2, BACK_1, BACK_2};
    target t[N];
    nx_read *r[N];
    for (int i = 0; i < N; i++) {
        target_init(&t[i], f->file, (uint64_t)i * 200000, 100000, 0); /* two requests each */
        r[i] = &t[i].read;
    }
    fault(f->io, NX_FAULT_EAGAIN, 0, 50000, -1);
    NX_CHECK_EQ(nx_io_submit(f->io, r, 3), NX_OK);
    NX_CHECK_EQ(nx_io_submit_front(f->io, &r[FRONT_1], 2), NX_OK);
    NX_CHECK_EQ(nx_io_submit_front(f->io, &r[FRONT_3], 1), NX_OK);
    for (size_t i = 0; i < 5; i++) {
        uint64_t held = (uint64_t)expected[i] * 200000;
        nx_io_clear_faults(f->io);
        fault(f->io, NX_FAULT_EAGAIN, held, held + 100000, -1);
        if (i > 0) NX_CHECK_EQ(nx_io_wait(f->io, r[expected[i - 1]], NULL, NULL), NX_OK);
        poll_often(f->io);
        for (size_t later = i; later < 5; later++) NX_CHECK_EQ(r[expected[later]]->done, 0);
    }
    nx_io_clear_faults(f->io);
    for (int i = 0; i < N; i++) {
        NX_CHECK_EQ(nx_io_wait(f->io, r[i], NULL, NULL), NX_OK);
        check_arrived(&t[i]);
        target_free(&t[i]);
    }
}

static void reads_are_issued_in_demand_order_with_the_front_first(void) {
    for_each(1, order_is_kept);
}

static void bad_submits_queue_nothing(fixture *f) {
    target good;
    nx_read none = {.file = NULL, .nbytes = 1, .dst = &none};
    nx_read far = {.file = f->file, .offset = UINT64_MAX - 5, .nbytes = 10, .dst = &far};
    target_init(&good, f->file, 0, 100, 0);
    nx_read *with_none[] = {&good.read, &none};
    nx_read *with_far[] = {&good.read, &far};
    nx_read *twice[] = {&good.read, &good.read};
    NX_CHECK_EQ(nx_io_submit(f->io, with_none, 2), NX_E_INVALID);
    NX_CHECK_EQ(nx_io_submit(f->io, with_far, 2), NX_E_INVALID);
    NX_CHECK_EQ(nx_io_submit(f->io, twice, 2), NX_E_BUSY);
    NX_CHECK_EQ(nx_io_wait(f->io, &good.read, NULL, NULL), NX_E_INVALID); /* never submitted */
    fault(f->io, NX_FAULT_EAGAIN, 0, FILE_BYTES, -1);
    NX_CHECK_EQ(submit(f->io, &good), NX_OK);
    NX_CHECK_EQ(submit(f->io, &good), NX_E_BUSY);
    nx_io_clear_faults(f->io);
    NX_CHECK_EQ(nx_io_wait(f->io, &good.read, NULL, NULL), NX_OK);
    check_arrived(&good);
    target_free(&good);
}

static void a_submit_with_a_mistake_queues_nothing(void) {
    for_each(4, bad_submits_queue_nothing);
}

/* -------------------------------------------------------------- threads */

typedef struct submitter {
    nx_io *io;
    nx_read **reads;
    size_t n;
} submitter;

static void *submit_and_end(void *arg) {
    submitter *s = arg;
    NX_CHECK_EQ(nx_io_submit(s->io, s->reads, s->n), NX_OK);
    return NULL;
}

static void driver_changes(fixture *f) {
    enum { N = 16 };
    target t[N];
    nx_read *r[N];
    for (int i = 0; i < N; i++) {
        target_init(&t[i], f->file, (uint64_t)i * 12345, 300000, (uint32_t)i * 12345);
        r[i] = &t[i].read;
    }
    submitter s = {f->io, r, N};
    pthread_t thread;
    NX_CHECK_EQ(pthread_create(&thread, NULL, submit_and_end, &s), 0);
    NX_CHECK_EQ(pthread_join(thread, NULL), 0);
    for (int i = 0; i < N; i++) {
        NX_CHECK_EQ(nx_io_wait(f->io, r[i], NULL, NULL), NX_OK);
        check_arrived(&t[i]);
        target_free(&t[i]);
    }
}

static void reads_outlive_the_thread_that_submitted_them(void) {
    for_each(32, driver_changes);
}

static void destroy_waits(fixture *f) {
    enum { N = 64 };
    target t[N];
    nx_read *r[N];
    nx_io *io;
    nx_io_options options = {
        .engine = f->engine, .depth = 4, .request_bytes = 1 << 20, .n_threads = 4};
    NX_CHECK_EQ(nx_io_create(&options, &io), NX_OK);
    for (int i = 0; i < N; i++) {
        target_init(&t[i], f->file, (uint64_t)i * 1000, 2000000, (uint32_t)(i % 3));
        r[i] = &t[i].read;
    }
    fault(io, NX_FAULT_EAGAIN, 0, 500, -1); /* the first is under way for ever */
    NX_CHECK_EQ(nx_io_submit(io, r, N), NX_OK);
    nx_io_destroy(io);
    for (int i = 0; i < N; i++) {
        NX_CHECK_EQ(r[i]->done, 1);
        NX_CHECK(r[i]->status == NX_E_CLOSED || (i > 0 && r[i]->status == NX_OK));
        if (r[i]->status == NX_OK) check_arrived(&t[i]);
        target_free(&t[i]);
    }
    NX_CHECK_EQ(r[N - 1]->status, NX_E_CLOSED);
}

static void destroy_leaves_every_read_done(void) {
    for_each(4, destroy_waits);
}

/* ----------------------------------------------------------------- fuzz */

static void on_alarm(int signal_number) {
    (void)signal_number;
}

/* Reads of all kinds, many at once, with faults that heal, cancels and signals: all bytes right. */
static void fuzz(fixture *f) {
    enum { SLOTS = 24, ROUNDS = 1500 };
    target t[SLOTS];
    int live[SLOTS] = {0};
    uint64_t seed = 12345 + (uint64_t)f->engine * 10 + f->mode;
    size_t n_done = 0;
    for (int round = 0; round < ROUNDS; round++) {
        int s = (int)(nx_test_random(&seed) % SLOTS);
        nx_test_about("engine %d, mode %d, round %d", f->engine, f->mode, round);
        if (live[s]) {
            if (nx_test_random(&seed) % 16 == 0 && nx_io_cancel(f->io, &t[s].read)) {
                NX_CHECK_EQ(t[s].read.status, NX_E_ABORTED);
            } else {
                NX_CHECK_EQ(nx_io_wait(f->io, &t[s].read, NULL, NULL), NX_OK);
                check_arrived(&t[s]);
                n_done++;
            }
            target_free(&t[s]);
        }
        uint64_t largest = nx_test_random(&seed) % 4 ? 9000 : 300000;
        uint64_t nbytes = 1 + nx_test_random(&seed) % largest;
        uint64_t offset = nx_test_random(&seed) % (FILE_BYTES - nbytes + 1);
        uint32_t shift =
            nx_test_random(&seed) % 2 ? (uint32_t)offset : (uint32_t)nx_test_random(&seed);
        target_init(&t[s], f->file, offset, nbytes, shift);
        nx_read *read = &t[s].read;
        NX_CHECK_EQ(nx_test_random(&seed) % 4 ? nx_io_submit(f->io, &read, 1)
                                              : nx_io_submit_front(f->io, &read, 1),
                    NX_OK);
        live[s] = 1;
        if (round % 40 == 0) {
            static const int kinds[] = {NX_FAULT_EIO, NX_FAULT_SHORT, NX_FAULT_EAGAIN,
                                        NX_FAULT_SHORT};
            nx_io_clear_faults(f->io);
            fault(f->io, kinds[round / 40 % 4], 0, FILE_BYTES, 3);
        }
    }
    for (int s = 0; s < SLOTS; s++) {
        if (!live[s]) continue;
        NX_CHECK_EQ(nx_io_wait(f->io, &t[s].read, NULL, NULL), NX_OK);
        check_arrived(&t[s]);
        target_free(&t[s]);
        n_done++;
    }
    NX_CHECK(n_done > ROUNDS / 2);
}

static void thousands_of_random_reads_bring_the_bytes_of_the_file(void) {
    for_each(7, fuzz);
}

static void signals_do_not_disturb_reads(void) {
    struct sigaction action = {.sa_handler = on_alarm}, before; /* no SA_RESTART: calls see EINTR */
    struct itimerval often = {{0, 1000}, {0, 1000}}, never = {{0, 0}, {0, 0}};
    NX_CHECK_EQ(sigaction(SIGALRM, &action, &before), 0);
    NX_CHECK_EQ(setitimer(ITIMER_REAL, &often, NULL), 0);
    for_each(5, fuzz);
    NX_CHECK_EQ(setitimer(ITIMER_REAL, &never, NULL), 0);
    NX_CHECK_EQ(sigaction(SIGALRM, &before, NULL), 0);
}

/* --------------------------------------------------------------- engine */

static int count_fds(void) {
    int n = 0;
    for (int fd = 0; fd < 1024; fd++) n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

static void read_a_little(fixture *f) {
    read_and_check(f, 100, 1000, 0);
}

static void no_descriptor_is_leaked(void) {
    int before = count_fds();
    for (int i = 0; i < 20; i++) {
        for_each(8, read_a_little);
        nx_file *file;
        NX_CHECK(nx_file_open(test_dir, NX_IO_DIRECT, &file) != NX_OK);
        nx_probe_result result;
        nx_probe_options options = {.max_bytes = 4096, .block_bytes = 4096, .depth = 2};
        NX_CHECK_EQ(nx_io_probe(test_path, &options, &result), NX_OK);
    }
    NX_CHECK_EQ(count_fds(), before);
}

static void the_environment_chooses_the_engine_of_auto_only(void) {
    nx_io *io;
    nx_io_options threads = {.engine = NX_IO_ENGINE_THREADS}, odd = {.engine = 17};
    NX_CHECK_EQ(setenv("NEXUS_IO_ENGINE", "threads", 1), 0);
    NX_CHECK_EQ(nx_io_create(NULL, &io), NX_OK);
    NX_CHECK(strcmp(nx_io_engine_name(io), "threads") == 0);
    NX_CHECK(strcmp(nx_io_engine_note(io), "") == 0);
    nx_io_destroy(io);
    NX_CHECK_EQ(setenv("NEXUS_IO_ENGINE", "floppy", 1), 0);
    NX_CHECK_EQ(nx_io_create(NULL, &io), NX_E_INVALID);
    NX_CHECK(io == NULL);
    NX_CHECK_EQ(nx_io_create(&threads, &io), NX_OK);
    nx_io_destroy(io);
    NX_CHECK_EQ(unsetenv("NEXUS_IO_ENGINE"), 0);
    NX_CHECK_EQ(nx_io_create(&odd, &io), NX_E_INVALID);
}

/* Without descriptors io_uring cannot be had, just as when it is forbidden. */
static void without_io_uring_auto_takes_threads_and_says_so(void) {
    struct rlimit before, none;
    nx_io *io, *refused;
    nx_io_options uring = {.engine = NX_IO_ENGINE_URING};
    NX_CHECK_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
    none = before;
    none.rlim_cur = 0;
    NX_CHECK_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
    nx_status status = nx_io_create(NULL, &io);
    nx_status status_uring = nx_io_create(&uring, &refused);
    NX_CHECK_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
    NX_CHECK_EQ(status, NX_OK);
    NX_CHECK_EQ(status_uring, NX_E_UNSUPPORTED);
    NX_CHECK(strcmp(nx_io_engine_name(io), "threads") == 0);
    NX_CHECK(strlen(nx_io_engine_note(io)) > 0);
    nx_io_destroy(io);
}

static void every_status_has_a_text(void) {
    for (int s = NX_OK; s <= NX_E_BUSY + 1; s++) NX_CHECK(strlen(nx_status_text((nx_status)s)) > 0);
    NX_CHECK(strcmp(nx_status_text(NX_E_BUSY), nx_status_text((nx_status)99)) != 0);
}

/* ---------------------------------------------------------------- probe */

static void the_probe_counts_what_it_read(void) {
    nx_probe_result result;
    for (size_t e = 0; e < n_engines; e++) {
        for (int random = 0; random <= 1; random++) {
            nx_probe_options options = {.block_bytes = 65536,
                                        .depth = 4,
                                        .random = random,
                                        .max_bytes = 1 << 20,
                                        .max_ns = UINT64_MAX,
                                        .engine = engines[e],
                                        .seed = 7};
            NX_CHECK_EQ(nx_io_probe(test_path, &options, &result), NX_OK);
            NX_CHECK_EQ(result.bytes, 1 << 20);
            NX_CHECK(result.ns > 0);
            NX_CHECK_EQ(result.engine, engines[e]);
            NX_CHECK(strlen(result.how_cold) > 0);
        }
        /* sequential: no block twice, however much is asked for */
        nx_probe_options options = {
            .block_bytes = 1 << 20, .max_ns = UINT64_MAX, .engine = engines[e]};
        NX_CHECK_EQ(nx_io_probe(test_path, &options, &result), NX_OK);
        NX_CHECK_EQ(result.bytes, 4 << 20);
        options.max_ns = 1; /* the time is over at once: what was asked for still counts */
        NX_CHECK_EQ(nx_io_probe(test_path, &options, &result), NX_OK);
        NX_CHECK(result.bytes > 0);
    }
}

static void the_probe_reports_what_it_cannot_measure(void) {
    char path[320];
    nx_probe_result result;
    nx_probe_options large = {.block_bytes = 8 << 20}, odd = {.block_bytes = 1000};
    snprintf(path, sizeof path, "%s/absent", test_dir);
    NX_CHECK_EQ(nx_io_probe(path, NULL, &result), NX_E_IO);
    NX_CHECK_EQ(result.sys_errno, ENOENT);
    NX_CHECK_EQ(nx_io_probe(test_path, &large, &result), NX_E_TRUNCATED);
    NX_CHECK_EQ(nx_io_probe(test_path, &odd, &result), NX_E_INVALID);
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(a_file_that_was_truncated_is_noticed),
        NX_TEST(a_file_that_was_overwritten_or_replaced_is_noticed),
        NX_TEST(what_cannot_be_read_is_refused_at_open),
        NX_TEST(an_empty_file_can_be_opened),
        NX_TEST(file_info_tells_what_was_opened),
        NX_TEST(an_aborted_wait_leaves_a_read_that_completes),
        NX_TEST(a_read_that_was_not_issued_can_be_cancelled),
        NX_TEST(reads_are_issued_in_demand_order_with_the_front_first),
        NX_TEST(a_submit_with_a_mistake_queues_nothing),
        NX_TEST(reads_outlive_the_thread_that_submitted_them),
        NX_TEST(destroy_leaves_every_read_done),
        NX_TEST(thousands_of_random_reads_bring_the_bytes_of_the_file),
        NX_TEST(signals_do_not_disturb_reads),
        NX_TEST(no_descriptor_is_leaked),
        NX_TEST(the_environment_chooses_the_engine_of_auto_only),
        NX_TEST(without_io_uring_auto_takes_threads_and_says_so),
        NX_TEST(every_status_has_a_text),
        NX_TEST(the_probe_counts_what_it_read),
        NX_TEST(the_probe_reports_what_it_cannot_measure),
    };
    set_up();
    int rc = nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
    free(content);
    return rc;
}
