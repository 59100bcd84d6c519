/*
 * io_fixture.h: what test_io.c and test_io_engine.c share: a file of known content, an engine over
 * it, destinations with guards, faults.
 *
 * Nothing here depends on time: to look at a read that is under way, a fault makes the kernel's
 * answer EAGAIN for as long as the test wants.
 */
#ifndef NX_IO_FIXTURE_H
#define NX_IO_FIXTURE_H

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "nexus_io.h"
#include "nx_test.h"

/* No test file uses all of it. */
#define NX_FIXTURE __attribute__((unused)) static

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

NX_FIXTURE fixture fixture_open(int engine, nx_io_mode mode, uint32_t depth, int drop_cache) {
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

NX_FIXTURE void fixture_close(fixture *f) {
    nx_io_destroy(f->io);
    nx_file_close(f->file);
}

/* Run a test for each engine and mode. */
NX_FIXTURE void for_each(uint32_t depth, void (*test)(fixture *)) {
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
NX_FIXTURE void target_init(target *t, nx_file *file, uint64_t offset, uint64_t nbytes,
                            uint32_t shift) {
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

/* Each byte equals the one before it: one call, which the sanitizers need not look into. */
NX_FIXTURE void check_guard(const uint8_t *begin, const uint8_t *end) {
    NX_CHECK_EQ(*begin, GUARD);
    NX_CHECK(memcmp(begin, begin + 1, (size_t)(end - begin) - 1) == 0);
}

NX_FIXTURE void target_free(target *t) {
    check_guard(t->memory, t->low);
    check_guard(t->high, t->memory + t->memory_bytes);
    free(t->memory);
}

NX_FIXTURE void check_arrived(const target *t) {
    const nx_read *r = &t->read;
    NX_CHECK_EQ(r->done, 1);
    NX_CHECK_EQ(r->status, NX_OK);
    NX_CHECK(r->bytes_read >= r->nbytes);
    NX_CHECK(memcmp(r->dst, content + r->offset, r->nbytes) == 0);
}

NX_FIXTURE nx_status submit(nx_io *io, target *t) {
    nx_read *read = &t->read;
    return nx_io_submit(io, &read, 1);
}

NX_FIXTURE void read_and_check(fixture *f, uint64_t offset, uint64_t nbytes, uint32_t shift) {
    target t;
    target_init(&t, f->file, offset, nbytes, shift);
    NX_CHECK_EQ(submit(f->io, &t), NX_OK);
    NX_CHECK_EQ(nx_io_wait(f->io, &t.read, NULL, NULL), NX_OK);
    check_arrived(&t);
    target_free(&t);
}

NX_FIXTURE void fault(nx_io *io, int kind, uint64_t begin, uint64_t end, int32_t count) {
    nx_fault one = {.offset_begin = begin, .offset_end = end, .kind = kind, .count = count};
    NX_CHECK_EQ(nx_io_inject(io, &one), NX_OK);
}

NX_FIXTURE void poll_often(nx_io *io) {
    for (int i = 0; i < 200; i++) NX_CHECK_EQ(nx_io_poll(io), NX_OK);
}

NX_FIXTURE void write_file(const char *path, size_t nbytes) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    NX_CHECK(fd >= 0);
    for (size_t at = 0; at < nbytes;) {
        ssize_t n = write(fd, content + at, nbytes - at);
        NX_CHECK(n > 0);
        at += (size_t)n;
    }
    NX_CHECK_EQ(close(fd), 0);
}

NX_FIXTURE void set_mtime(const char *path, time_t seconds) {
    struct timespec t[2] = {{.tv_sec = seconds}, {.tv_sec = seconds}};
    NX_CHECK_EQ(utimensat(AT_FDCWD, path, t, 0), 0);
}

NX_FIXTURE void clean_up(void) {
    unlink(test_path);
    rmdir(test_dir);
}

NX_FIXTURE void set_up(void) {
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

#endif
