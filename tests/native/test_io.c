/*
 * test_io.c: every byte lands where nexus_io.h says, or the read fails and says where; for every
 * engine that this machine has and for both modes.
 */

#include "io_fixture.h"

/* ---------------------------------------------------------------- reads */

static void bytes_land(fixture *f) {
    static const uint64_t offsets[] = {0,    1,    31,   32,    511,   512,    513,
                                       4095, 4096, 4097, 65535, 65536, 1000003};
    static const uint64_t sizes[] = {1,    2,    31,    511,   512,    513,
                                     4096, 4097, 65536, 65537, 200001, 1u << 20};
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

static void the_first_of_several_reads_ends_a_wait_for_any(void) {
    for (size_t e = 0; e < n_engines; e++) {
        fixture f = fixture_open(engines[e], NX_IO_DIRECT, 1, 0);
        target t[3];
        nx_read *reads[3];
        for (size_t i = 0; i < 3; i++) {
            target_init(&t[i], f.file, 4096 * i, 4096, 0);
            reads[2 - i] = &t[i].read;
        }
        NX_CHECK_EQ(nx_io_wait_any(f.io, reads, 3, NULL, NULL), NX_E_INVALID); /* not submitted */
        NX_CHECK_EQ(nx_io_wait_any(f.io, reads, 0, NULL, NULL), NX_E_INVALID);
        for (size_t i = 0; i < 3; i++) NX_CHECK_EQ(submit(f.io, &t[i]), NX_OK);
        NX_CHECK_EQ(nx_io_wait_any(f.io, reads, 3, NULL, NULL), NX_OK);
        NX_CHECK(t[0].read.done); /* one at a time, in the order of submission */
        NX_CHECK_EQ(nx_io_wait_any(f.io, reads, 2, NULL, NULL), NX_OK);
        NX_CHECK(t[1].read.done);
        const nx_fault fault = {.offset_begin = 8192, .offset_end = 12288, .kind = NX_FAULT_EIO, .count = -1};
        NX_CHECK(t[2].read.done || nx_io_inject(f.io, &fault) == NX_OK);
        NX_CHECK_EQ(nx_io_wait_any(f.io, reads, 1, NULL, NULL), NX_OK); /* also one that failed */
        NX_CHECK(t[2].read.done);
        for (size_t i = 0; i < 3; i++) target_free(&t[i]);
        fixture_close(&f);
    }
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
        NX_TEST(the_first_of_several_reads_ends_a_wait_for_any),
    };
    set_up();
    int rc = nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
    free(content);
    return rc;
}
