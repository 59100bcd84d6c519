/*
 * test_io.c: the promises of nexus_io.h, for every engine that this machine has and for both modes.
 *
 * Nothing here depends on time: to look at a read that is under way, a fault makes the kernel's answer
 * EAGAIN for as long as the test wants.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include "nexus_io.h"
#include "nx_test.h"

#define FILE_BYTES ((4u << 20) + 1234u) /* no multiple of any block */
#define REQUEST_BYTES (64u << 10)       /* so that ordinary reads are cut */
#define GUARD_BYTES 64u
#define GUARD 0xA5

static char test_dir[256];
static char test_path[300];
static uint8_t *content; /* of the file */
static int engines[2];
static size_t n_engines;

/* ------------------------------------------------------------ fixtures */

typedef struct fixture {
    nx_io *io;
    nx_file *file;
    int engine;
    nx_io_mode mode;
    int direct; /* what the file system made of the mode */
} fixture;

static fixture fixture_open(int engine, nx_io_mode mode, uint32_t depth, int drop_cache) {
    nx_io_options options = {.engine = engine,
                             .depth = depth,
                             .request_bytes = REQUEST_BYTES,
                             .n_threads = 3,
                             .drop_cache = drop_cache};
    fixture f = {.engine = engine, .mode = mode};
    nx_file_info info;
    NX_CHECK_EQ(nx_io_create(&options, &f.io), NX_OK);
    NX_CHECK_EQ(nx_file_open(test_path, mode, &f.file), NX_OK);
    nx_file_get_info(f.file, &info);
    f.direct = info.direct;
    nx_test_about("%s, %s%s", nx_io_engine_name(f.io), mode == NX_IO_DIRECT ? "direct" : "buffered",
                  mode == NX_IO_DIRECT && !f.direct ? " (refused here)" : "");
    return f;
}

static void fixture_close(fixture *f) {
    nx_io_destroy(f->io);
    nx_file_close(f->file);
}

/* Run a test for each engine and mode. */
static void for_each(uint32_t depth, void (*test)(fixture *)) {
    for (size_t e = 0; e < n_engines; e++) {
        for (int mode = NX_IO_DIRECT; mode <= NX_IO_BUFFERED; mode++) {
            fixture f = fixture_open(engines[e], (nx_io_mode)mode, depth, 0);
            test(&f);
            fixture_close(&f);
        }
    }
}

/* A destination with its slack, and guards that nobody may touch beyond it. */
typedef struct target {
    uint8_t *memory;
    size_t memory_bytes;
    uint8_t *low, *high; /* the bytes that the engine may write */
    nx_read read;
} target;

/* dst is at `shift` modulo 4096 */
static void target_init(target *t, nx_file *file, uint64_t offset, uint64_t nbytes, uint32_t shift) {
    memset(t, 0, sizeof *t);
    t->memory_bytes = nbytes + 2 * NX_IO_SLACK + 2 * GUARD_BYTES + 8192;
    t->memory = malloc(t->memory_bytes);
    NX_CHECK(t->memory != NULL);
    memset(t->memory, GUARD, t->memory_bytes);
    uintptr_t least = (uintptr_t)t->memory + GUARD_BYTES + NX_IO_SLACK;
    uintptr_t dst = (least + 4095) / 4096 * 4096 + shift % 4096;
    t->read.file = file;
    t->read.offset = offset;
    t->read.nbytes = nbytes;
    t->read.dst = t->memory + (dst - (uintptr_t)t->memory);
    t->low = (uint8_t *)t->read.dst - NX_IO_SLACK;
    t->high = (uint8_t *)t->read.dst + nbytes + NX_IO_SLACK;
    NX_CHECK(t->high + GUARD_BYTES <= t->memory + t->memory_bytes);
}

static void target_free(target *t) {
    for (uint8_t *p = t->memory; p < t->low; p++) NX_CHECK_EQ(*p, GUARD);
    for (uint8_t *p = t->high; p < t->memory + t->memory_bytes; p++) NX_CHECK_EQ(*p, GUARD);
    free(t->memory);
}

static void check_arrived(const target *t) {
    const nx_read *r = &t->read;
    NX_CHECK_EQ(r->done, 1);
    NX_CHECK_EQ(r->status, NX_OK);
    NX_CHECK(r->bytes_read >= r->nbytes);
    NX_CHECK(memcmp(r->dst, content + r->offset, r->nbytes) == 0);
}

static nx_status submit(nx_io *io, target *t) {
    nx_read *read = &t->read;
    return nx_io_submit(io, &read, 1);
}

static void read_and_check(fixture *f, uint64_t offset, uint64_t nbytes, uint32_t shift) {
    target t;
    target_init(&t, f->file, offset, nbytes, shift);
    NX_CHECK_EQ(submit(f->io, &t), NX_OK);
    NX_CHECK_EQ(nx_io_wait(f->io, &t.read, NULL, NULL), NX_OK);
    check_arrived(&t);
    target_free(&t);
}

static void fault(nx_io *io, int kind, uint64_t begin, uint64_t end, int32_t count) {
    nx_fault one = {.offset_begin = begin, .offset_end = end, .kind = kind, .count = count};
    NX_CHECK_EQ(nx_io_inject(io, &one), NX_OK);
}

static void poll_often(nx_io *io) {
    for (int i = 0; i < 200; i++) NX_CHECK_EQ(nx_io_poll(io), NX_OK);
}

static void write_file(const char *path, size_t nbytes) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    NX_CHECK(fd >= 0);
    for (size_t at = 0; at < nbytes;) {
        ssize_t n = write(fd, content + at, nbytes - at);
        NX_CHECK(n > 0);
        at += (size_t)n;
    }
    NX_CHECK_EQ(close(fd), 0);
}

static void set_mtime(const char *path, time_t seconds) {
    struct timespec t[2] = {{.tv_sec = seconds}, {.tv_sec = seconds}};
    NX_CHECK_EQ(utimensat(AT_FDCWD, path, t, 0), 0);
}

/* ---------------------------------------------------------------- reads */

static void bytes_land(fixture *f) {
    static const uint64_t offsets[] = {0, 1, 31, 32, 511, 512, 513, 4095, 4096, 4097, 65535, 65536, 1000003};
    static const uint64_t sizes[] = {1, 2, 31, 511, 512, 513, 4096, 4097, 65536, 65537, 200001, 1u << 20};
    for (size_t o = 0; o < sizeof offsets / sizeof *offsets; o++)
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            read_and_check(f, offsets[o], sizes[s], (uint32_t)offsets[o]); /* in place */
            read_and_check(f, offsets[o], sizes[s], (uint32_t)(offsets[o] + 7 * s + 1));
        }
}

static void every_byte_lands_at_its_place_and_none_beyond_the_slack(void) {
    for_each(8, bytes_land);
}

static void tail_is_read(fixture *f) {
    for (uint64_t back = 1; back < 9000; back += 211) {
        uint64_t offset = FILE_BYTES - back;
        read_and_check(f, offset, back, (uint32_t)offset);
        read_and_check(f, offset, back, (uint32_t)offset + 5);
    }
    read_and_check(f, 0, FILE_BYTES, 0);
    read_and_check(f, 0, FILE_BYTES, 3);
}

static void the_tail_of_a_file_of_odd_size_is_read(void) {
    for_each(8, tail_is_read);
}

static void aligned_needs_no_bounce(fixture *f) {
    nx_io_stats stats;
    read_and_check(f, 12321, 300000, 12321);
    nx_io_get_stats(f->io, &stats);
    NX_CHECK_EQ(stats.bounces, 0);
    NX_CHECK_EQ(stats.requests, 5); /* 300000 bytes in parts of 64 KiB */
    read_and_check(f, 12321, 300000, 12322);
    nx_io_get_stats(f->io, &stats);
    NX_CHECK(f->direct ? stats.bounces > 0 : stats.bounces == 0);
}

static void only_misaligned_destinations_bounce(void) {
    for_each(8, aligned_needs_no_bounce);
}

static void counts(fixture *f) {
    nx_file_info info;
    nx_io_stats stats;
    target t;
    nx_file_get_info(f->file, &info);
    uint64_t align = info.offset_align;
    target_init(&t, f->file, 4097, 70000, 4097);
    NX_CHECK_EQ(submit(f->io, &t), NX_OK);
    NX_CHECK_EQ(nx_io_wait(f->io, &t.read, NULL, NULL), NX_OK);
    uint64_t begin = 4097 / align * align, end = (4097 + 70000 + align - 1) / align * align;
    NX_CHECK_EQ(t.read.bytes_read, end - begin);
    nx_io_get_stats(f->io, &stats);
    NX_CHECK_EQ(stats.bytes_read, end - begin);
    target_free(&t);
}

static void bytes_read_counts_what_alignment_costs(void) {
    for_each(8, counts);
}

static void empty_read_is_done(fixture *f) {
    nx_read read = {.file = f->file, .offset = 17};
    nx_read *reads = &read;
    NX_CHECK_EQ(nx_io_submit(f->io, &reads, 1), NX_OK);
    NX_CHECK_EQ(read.done, 1);
    NX_CHECK_EQ(nx_io_wait(f->io, &read, NULL, NULL), NX_OK);
}

static void a_read_of_nothing_is_done_at_once(void) {
    for_each(8, empty_read_is_done);
}

static void dropping_keeps_bytes_right(void) {
    for (size_t e = 0; e < n_engines; e++) {
        fixture f = fixture_open(engines[e], NX_IO_BUFFERED, 8, 1);
        read_and_check(&f, 4097, 1 << 20, 0);
        read_and_check(&f, 1, FILE_BYTES - 1, 0);
        fixture_close(&f);
    }
}

/* --------------------------------------------------------------- errors */

static void short_reads_go_on(fixture *f) {
    nx_io_stats stats;
    fault(f->io, NX_FAULT_SHORT, 0, FILE_BYTES, 1);
    read_and_check(f, 100, 50000, 100);
    nx_io_get_stats(f->io, &stats);
    NX_CHECK_EQ(stats.short_reads, 1);
    nx_io_clear_faults(f->io);
    fault(f->io, NX_FAULT_SHORT, 0, FILE_BYTES, 7);
    read_and_check(f, 100, 300000, 103);
    nx_io_clear_faults(f->io);
    fault(f->io, NX_FAULT_SHORT, 0, FILE_BYTES, -1);
    read_and_check(f, 4096, 200000, 4096);
    read_and_check(f, FILE_BYTES - 5000, 5000, 1);
}

static void short_reads_continue_where_they_stopped(void) {
    for_each(4, short_reads_go_on);
}

static void eio_is_retried(fixture *f) {
    nx_io_stats stats;
    fault(f->io, NX_FAULT_EIO, 70000, 70001, 1);
    read_and_check(f, 33, 200000, 33);
    nx_io_get_stats(f->io, &stats);
    NX_CHECK_EQ(stats.retries, 1);
    NX_CHECK_EQ(stats.errors, 0);
}

static void one_eio_is_retried_and_the_bytes_are_the_same(void) {
    for_each(8, eio_is_retried);
}

static void eio_for_good(fixture *f) {
    nx_io_stats stats;
    target bad, good;
    fault(f->io, NX_FAULT_EIO, 1000000, 1000001, -1);
    target_init(&bad, f->file, 900001, 1 << 20, 900001);
    target_init(&good, f->file, 2500000, 400000, 0);
    NX_CHECK_EQ(submit(f->io, &bad), NX_OK);
    NX_CHECK_EQ(submit(f->io, &good), NX_OK);
    NX_CHECK_EQ(nx_io_wait(f->io, &bad.read, NULL, NULL), NX_E_IO);
    NX_CHECK_EQ(bad.read.done, 1);
    NX_CHECK_EQ(bad.read.sys_errno, EIO);
    /* the offset of the request that holds the bad byte */
    NX_CHECK(bad.read.error_offset <= 1000000 && bad.read.error_offset + REQUEST_BYTES > 1000000);
    NX_CHECK_EQ(nx_io_wait(f->io, &good.read, NULL, NULL), NX_OK);
    check_arrived(&good);
    nx_io_get_stats(f->io, &stats);
    NX_CHECK_EQ(stats.retries, 3);
    NX_CHECK_EQ(stats.errors, 1);

    nx_io_clear_faults(f->io); /* the same nx_read again, now well */
    NX_CHECK_EQ(submit(f->io, &bad), NX_OK);
    NX_CHECK_EQ(nx_io_wait(f->io, &bad.read, NULL, NULL), NX_OK);
    check_arrived(&bad);
    target_free(&bad);
    target_free(&good);
}

static void eio_for_good_is_reported_and_the_engine_goes_on(void) {
    for_each(4, eio_for_good);
}

static void first_error_wins(fixture *f) {
    target t;
    fault(f->io, NX_FAULT_EIO, 900000, 900001, -1);
    fault(f->io, NX_FAULT_EIO, 500000, 500001, -1);
    target_init(&t, f->file, 400000, 1 << 20, 400000);
    NX_CHECK_EQ(submit(f->io, &t), NX_OK);
    NX_CHECK_EQ(nx_io_wait(f->io, &t.read, NULL, NULL), NX_E_IO);
    NX_CHECK(t.read.error_offset <= 500000);
    target_free(&t);
}

static void of_several_errors_the_lowest_offset_is_reported(void) {
    for_each(32, first_error_wins);
}

static void einval_falls_back(fixture *f) {
    nx_file_info info;
    nx_io_stats stats;
    if (f->mode == NX_IO_BUFFERED) {
        fault(f->io, NX_FAULT_EINVAL, 0, FILE_BYTES, -1);
        target t;
        target_init(&t, f->file, 0, 100, 0);
        NX_CHECK_EQ(submit(f->io, &t), NX_OK);
        NX_CHECK_EQ(nx_io_wait(f->io, &t.read, NULL, NULL), NX_E_IO);
        NX_CHECK_EQ(t.read.sys_errno, EINVAL);
        target_free(&t);
        return;
    }
    fault(f->io, NX_FAULT_EINVAL, 0, FILE_BYTES, 1);
    read_and_check(f, 12345, 1 << 20, 12345);
    read_and_check(f, 12345, 1 << 20, 3);
    nx_file_get_info(f->file, &info);
    NX_CHECK_EQ(info.direct, 0);
    NX_CHECK_EQ(info.offset_align, 1);
    nx_io_get_stats(f->io, &stats);
    NX_CHECK_EQ(stats.errors, 0);
    if (f->direct) {
        NX_CHECK_EQ(stats.retries, 0);
        NX_CHECK_EQ(info.sys_errno, EINVAL);
    }
}

static void a_direct_read_refused_late_makes_the_file_buffered(void) {
    for_each(8, einval_falls_back);
}

static void seeming_end(fixture *f) {
    target t;
    fault(f->io, NX_FAULT_EOF, 150001, FILE_BYTES, -1);
    target_init(&t, f->file, 100000, 200000, 100000);
    NX_CHECK_EQ(submit(f->io, &t), NX_OK);
    NX_CHECK_EQ(nx_io_wait(f->io, &t.read, NULL, NULL), NX_E_TRUNCATED);
    NX_CHECK_EQ(t.read.error_offset, 150001);
    target_free(&t);
}

static void a_file_that_ends_early_is_reported_with_the_first_missing_byte(void) {
    for_each(8, seeming_end);
}

static void beyond_the_end(fixture *f) {
    target t;
    target_init(&t, f->file, FILE_BYTES - 10, 20, 0);
    NX_CHECK_EQ(submit(f->io, &t), NX_OK);
    NX_CHECK_EQ(nx_io_wait(f->io, &t.read, NULL, NULL), NX_E_TRUNCATED);
    NX_CHECK_EQ(t.read.error_offset, FILE_BYTES);
    target_free(&t);
    target_init(&t, f->file, (uint64_t)FILE_BYTES + 100000, 20, 0);
    NX_CHECK_EQ(submit(f->io, &t), NX_OK);
    NX_CHECK_EQ(nx_io_wait(f->io, &t.read, NULL, NULL), NX_E_TRUNCATED);
    target_free(&t);
}

static void reading_beyond_the_end_is_truncated(void) {
    for_each(8, beyond_the_end);
}

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

/* With one request at a time, a read that never ends holds up what comes after it, and nothing else. */
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
    nx_io_options options = {.engine = f->engine, .depth = 4, .request_bytes = 1 << 20, .n_threads = 4};
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
        uint32_t shift = nx_test_random(&seed) % 2 ? (uint32_t)offset : (uint32_t)nx_test_random(&seed);
        target_init(&t[s], f->file, offset, nbytes, shift);
        nx_read *read = &t[s].read;
        NX_CHECK_EQ(nx_test_random(&seed) % 4 ? nx_io_submit(f->io, &read, 1)
                                              : nx_io_submit_front(f->io, &read, 1), NX_OK);
        live[s] = 1;
        if (round % 40 == 0) {
            static const int kinds[] = {NX_FAULT_EIO, NX_FAULT_SHORT, NX_FAULT_EAGAIN, NX_FAULT_SHORT};
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

static void no_descriptor_is_leaked(void) {
    int before = count_fds();
    for (int i = 0; i < 20; i++) {
        for_each(8, empty_read_is_done);
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
        nx_probe_options options = {.block_bytes = 1 << 20, .max_ns = UINT64_MAX, .engine = engines[e]};
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

/* ----------------------------------------------------------------- main */

static void clean_up(void) {
    unlink(test_path);
    rmdir(test_dir);
}

static void set_up(void) {
    const char *base = getenv("TMPDIR");
    uint64_t seed = 1;
    nx_io *io;
    nx_io_options uring = {.engine = NX_IO_ENGINE_URING};
    unsetenv("NEXUS_IO_ENGINE");
    snprintf(test_dir, sizeof test_dir, "%s/nexus-io-XXXXXX", base && *base ? base : "/tmp");
    NX_CHECK(mkdtemp(test_dir) != NULL);
    snprintf(test_path, sizeof test_path, "%s/file", test_dir);
    atexit(clean_up);
    content = malloc(FILE_BYTES + 8);
    NX_CHECK(content != NULL);
    for (size_t i = 0; i < FILE_BYTES; i += 8) {
        uint64_t word = nx_test_random(&seed);
        memcpy(content + i, &word, 8);
    }
    write_file(test_path, FILE_BYTES);
    if (nx_io_create(&uring, &io) == NX_OK) {
        nx_io_destroy(io);
        engines[n_engines++] = NX_IO_ENGINE_URING;
    } else {
        printf("  io_uring is not available here: the threads engine alone is tested\n");
    }
    engines[n_engines++] = NX_IO_ENGINE_THREADS;
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(every_byte_lands_at_its_place_and_none_beyond_the_slack),
        NX_TEST(the_tail_of_a_file_of_odd_size_is_read),
        NX_TEST(only_misaligned_destinations_bounce),
        NX_TEST(bytes_read_counts_what_alignment_costs),
        NX_TEST(a_read_of_nothing_is_done_at_once),
        NX_TEST(dropping_keeps_bytes_right),
        NX_TEST(short_reads_continue_where_they_stopped),
        NX_TEST(one_eio_is_retried_and_the_bytes_are_the_same),
        NX_TEST(eio_for_good_is_reported_and_the_engine_goes_on),
        NX_TEST(of_several_errors_the_lowest_offset_is_reported),
        NX_TEST(a_direct_read_refused_late_makes_the_file_buffered),
        NX_TEST(a_file_that_ends_early_is_reported_with_the_first_missing_byte),
        NX_TEST(reading_beyond_the_end_is_truncated),
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
