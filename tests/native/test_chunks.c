/*
 * test_chunks.c: tensors in chunks arrive decoded and checked, from the pool as on the spot; what goes
 * wrong is named by its chunk, and nothing is lost by it.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include "chunks.h"
#include "nexus_codec.h"
#include "nexus_core.h"
#include "nx_test.h"

#define MATRICES 3u
#define MATRIX 250000u
#define CHUNK 100000u
#define NBYTES (MATRICES * MATRIX)
#define GUARD 0xA5
#define FILE_ROOM (2u << 20)

static char path[300];

typedef struct stored {
    uint8_t *raw;
    nx_file *file;
    nx_chunks *c;
    nx_chunk_pool *pool;
    nx_io *io;
} stored;

/* A BF16 tensor in a file, every third chunk as it is, at odd places. */
static stored stored_open(nx_io_mode mode, int damaged) {
    static const nx_ans_layout layout = {.rotate = 2, .block = 2, .n_planes = 2, .offset = {1, 0}, .width = {1, 1}};
    stored s = {.raw = malloc(NBYTES), .c = nx_chunks_create(NBYTES, MATRICES, CHUNK)};
    uint8_t *file = calloc(1, FILE_ROOM);
    uint64_t seed = 7, at = 4097, stored_max = 0;
    NX_CHECK(s.raw && s.c && file);
    NX_CHECK_EQ(s.c->n, 9);
    for (uint32_t i = 0; i < NBYTES; i++) s.raw[i] = (uint8_t)(i % 2 ? 0x3e + nx_test_random(&seed) % 3 : nx_test_random(&seed));
    for (uint32_t i = 0; i < s.c->n; i++) {
        nx_chunk *k = &s.c->chunk[i];
        const uint8_t *raw = s.raw + i / s.c->per_matrix * MATRIX + i % s.c->per_matrix * CHUNK;
        size_t n = k->raw;
        k->codec = i % 3 == 2 ? NX_CODEC_RAW : NX_CODEC_ANS;
        if (k->codec == NX_CODEC_RAW) memcpy(file + at, raw, n);
        else NX_CHECK_EQ(nx_ans_encode(&layout, raw, k->raw, file + at, FILE_ROOM - at, &n), NX_OK);
        k->offset = at;
        k->stored = (uint32_t)n;
        k->hash = nx_xxh3_64(file + at, n);
        if ((int)i == damaged) file[at + n / 2] ^= 1;
        if (n > stored_max) stored_max = n;
        at += n + 321;
    }
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    NX_CHECK(fd >= 0);
    NX_CHECK_EQ(write(fd, file, at), (int64_t)at);
    NX_CHECK_EQ(fsync(fd), 0);
    close(fd);
    free(file);
    NX_CHECK_EQ(nx_file_open(path, mode, &s.file), NX_OK);
    for (uint32_t i = 0; i < s.c->n; i++) s.c->chunk[i].file = s.file;
    NX_CHECK_EQ(nx_pool_create(3, stored_max, CHUNK, &s.pool), NX_OK);
    NX_CHECK_EQ(nx_io_create(NULL, &s.io), NX_OK);
    nx_io_set_pool(s.io, s.pool);
    return s;
}

static void stored_close(stored *s) {
    nx_io_destroy(s->io);
    nx_pool_destroy(s->pool);
    nx_chunks_free(s->c);
    nx_file_close(s->file);
    free(s->raw);
}

typedef struct part {
    nx_read read;
    uint8_t *memory;
} part;

static void part_init(part *p, const stored *s, uint64_t from, uint64_t nbytes) {
    p->memory = malloc(nbytes + 128);
    NX_CHECK(p->memory != NULL);
    memset(p->memory, GUARD, nbytes + 128);
    p->read = (nx_read){.file = &s->c->as_file, .offset = from, .nbytes = nbytes, .dst = p->memory + 64};
}

static void part_check(const part *p, const stored *s) {
    NX_CHECK_EQ(memcmp(p->read.dst, s->raw + p->read.offset, p->read.nbytes), 0);
    for (size_t i = 0; i < 64; i++) NX_CHECK(p->memory[i] == GUARD && p->memory[64 + p->read.nbytes + i] == GUARD);
}

static nx_status read_part(stored *s, part *p) {
    nx_read *list = &p->read;
    NX_CHECK_EQ(nx_io_submit(s->io, &list, 1), NX_OK);
    return nx_io_wait(s->io, list, NULL, NULL);
}

static void any_range_arrives_decoded(void) {
    for (int mode = NX_IO_DIRECT; mode <= NX_IO_BUFFERED; mode++) {
        stored s = stored_open((nx_io_mode)mode, -1);
        uint64_t seed = 3;
        for (int i = 0; i < 40; i++) {
            const uint64_t from = i ? nx_test_random(&seed) % NBYTES : 0;
            const uint64_t n = i ? 1 + nx_test_random(&seed) % (NBYTES - from) : NBYTES;
            part p;
            part_init(&p, &s, from, n);
            NX_CHECK_EQ(read_part(&s, &p), NX_OK);
            part_check(&p, &s);
            uint32_t bad;
            int code;
            memset(p.read.dst, 0, n);
            NX_CHECK_EQ(nx_chunks_read(s.c, from, p.read.dst, n, &bad, &code), NX_OK);
            part_check(&p, &s);
            free(p.memory);
        }
        nx_pool_stats stats;
        nx_pool_get_stats(s.pool, &stats);
        NX_CHECK(stats.raw_bytes > stats.stored_bytes && stats.stored_bytes > 0);
        NX_CHECK(stats.bytes_read >= stats.stored_bytes);
        stored_close(&s);
    }
}

static void what_lies_there_as_it_is_needs_no_pool(void) {
    stored s = stored_open(NX_IO_DIRECT, -1);
    nx_file *file;
    uint64_t offset;
    NX_CHECK(nx_chunks_plain(s.c, 2 * CHUNK + 5, 100, &file, &offset)); /* the third chunk is raw */
    NX_CHECK(file == s.file);
    NX_CHECK_EQ(offset, s.c->chunk[2].offset + 5);
    NX_CHECK(!nx_chunks_plain(s.c, 2 * CHUNK - 1, 2, &file, &offset));
    NX_CHECK_EQ(nx_chunks_plain(s.c, 2 * CHUNK + 5, 100, &file, &offset), NX_PLAIN);
    stored_close(&s);
}

static void what_lies_there_as_it_is_is_checked_once_or_always(void) {
    for (int always = 0; always < 2; always++) {
        stored s = stored_open(NX_IO_DIRECT, -1);
        nx_file *file;
        uint64_t offset, checked = 0;
        uint32_t bad;
        s.c->verify = always ? NX_VERIFY_ALWAYS : NX_VERIFY_FIRST;
        const uint64_t begin = 2 * CHUNK, n = s.c->chunk[2].raw;
        NX_CHECK_EQ(nx_chunks_plain(s.c, begin + 5, 100, &file, &offset), NX_PLAIN_NOT); /* not all of the chunk */
        NX_CHECK_EQ(nx_chunks_plain(s.c, begin, n, &file, &offset), NX_PLAIN_CHECK);
        NX_CHECK_EQ(nx_chunks_check(s.c, begin + 1, n - 1, s.raw + begin + 1, &bad, &checked), NX_E_INVALID);
        s.raw[begin + 7] ^= 1;
        NX_CHECK_EQ(nx_chunks_check(s.c, begin, n, s.raw + begin, &bad, &checked), NX_E_DAMAGED);
        NX_CHECK_EQ(bad, 2);
        NX_CHECK_EQ(checked, 0);
        s.raw[begin + 7] ^= 1;
        part p;
        part_init(&p, &s, begin + 5, 100); /* by the pool, which has all of it */
        NX_CHECK_EQ(read_part(&s, &p), NX_OK);
        part_check(&p, &s);
        free(p.memory);
        NX_CHECK_EQ(nx_chunks_plain(s.c, begin + 5, 100, &file, &offset), always ? NX_PLAIN_NOT : NX_PLAIN);
        NX_CHECK_EQ(nx_chunks_check(s.c, begin, n, s.raw + begin, &bad, &checked), NX_OK);
        NX_CHECK_EQ(checked, always ? n : 0);
        stored_close(&s);
    }
}

/* The bytes are there before they are checked, and the read fails by what they are. */
static void a_read_in_place_is_checked_when_it_is_done(void) {
    for (int damaged = -1; damaged <= 2; damaged += 3) {
        stored s = stored_open(NX_IO_DIRECT, damaged);
        s.c->verify = NX_VERIFY_FIRST;
        part p;
        part_init(&p, &s, 2 * CHUNK, s.c->chunk[2].raw);
        NX_CHECK_EQ(nx_chunks_plain(s.c, p.read.offset, p.read.nbytes, &p.read.file, &p.read.offset), NX_PLAIN_CHECK);
        p.read.check = nx_chunks_check_read;
        p.read.check_ctx = s.c;
        p.read.check_item = 2 * CHUNK;
        NX_CHECK_EQ(read_part(&s, &p), damaged < 0 ? NX_OK : NX_E_DAMAGED);
        nx_pool_stats stats;
        nx_pool_get_stats(s.pool, &stats);
        NX_CHECK_EQ(stats.raw_bytes, damaged < 0 ? s.c->chunk[2].raw : 0);
        if (damaged < 0) {
            p.read.offset = 2 * CHUNK; /* where part_check looks */
            part_check(&p, &s);
        } else {
            NX_CHECK_EQ(p.read.error_chunk, 2);
            NX_CHECK_EQ(p.read.error_offset, s.c->chunk[2].offset);
        }
        free(p.memory);
        stored_close(&s);
    }
}

static void a_flipped_bit_is_named_by_its_chunk(void) {
    for (int damaged = 1; damaged <= 2; damaged++) { /* encoded, and as it is */
        stored s = stored_open(NX_IO_DIRECT, damaged);
        part p, other;
        part_init(&p, &s, 0, NBYTES);
        NX_CHECK_EQ(read_part(&s, &p), NX_E_DAMAGED);
        NX_CHECK_EQ(p.read.error_chunk, damaged);
        NX_CHECK_EQ(p.read.error_offset, s.c->chunk[damaged].offset);
        part_init(&other, &s, MATRIX, MATRIX); /* the others are as good as before */
        NX_CHECK_EQ(read_part(&s, &other), NX_OK);
        part_check(&other, &s);
        uint32_t bad;
        int code;
        NX_CHECK_EQ(nx_chunks_read(s.c, 0, p.read.dst, NBYTES, &bad, &code), NX_E_DAMAGED);
        NX_CHECK_EQ(bad, damaged);
        free(p.memory);
        free(other.memory);
        stored_close(&s);
    }
}

static void errors_are_tried_again_then_named(void) {
    for (int mode = NX_IO_DIRECT; mode <= NX_IO_BUFFERED; mode++) {
        stored s = stored_open((nx_io_mode)mode, -1);
        part p;
        part_init(&p, &s, 0, NBYTES);
        NX_CHECK_EQ(nx_pool_inject(s.pool, &(nx_fault){0, FILE_ROOM, NX_FAULT_EIO, 3}), NX_OK);
        NX_CHECK_EQ(nx_pool_inject(s.pool, &(nx_fault){0, FILE_ROOM, NX_FAULT_EAGAIN, 5}), NX_OK);
        NX_CHECK_EQ(nx_pool_inject(s.pool, &(nx_fault){0, FILE_ROOM, NX_FAULT_SHORT, 7}), NX_OK);
        NX_CHECK_EQ(read_part(&s, &p), NX_OK);
        part_check(&p, &s);
        nx_pool_clear_faults(s.pool);
        const nx_chunk *k = &s.c->chunk[4];
        NX_CHECK_EQ(nx_pool_inject(s.pool, &(nx_fault){k->offset, k->offset + 1, NX_FAULT_EIO, -1}), NX_OK);
        NX_CHECK_EQ(read_part(&s, &p), NX_E_IO);
        NX_CHECK_EQ(p.read.sys_errno, EIO);
        /* Chunks share pages with their neighbours: a direct read of one meets the fault of the next. */
        NX_CHECK(p.read.error_chunk >= 3 && p.read.error_chunk <= 5);
        nx_pool_clear_faults(s.pool);
        NX_CHECK_EQ(nx_pool_inject(s.pool, &(nx_fault){0, FILE_ROOM, NX_FAULT_EINVAL, 1}), NX_OK);
        NX_CHECK_EQ(read_part(&s, &p), NX_OK); /* refused directly, taken through the page cache */
        part_check(&p, &s);
        nx_pool_clear_faults(s.pool);
        NX_CHECK_EQ(truncate(path, (off_t)s.c->chunk[7].offset + 1), 0);
        NX_CHECK_EQ(read_part(&s, &p), NX_E_TRUNCATED);
        NX_CHECK_EQ(p.read.error_chunk, 7);
        free(p.memory);
        stored_close(&s);
    }
}

/* Reads that nobody wants any more, reads in vain, and an engine that goes away with reads in hand. */
static void reads_are_raised_dropped_and_left(void) {
    enum { N = 12 };
    for (int round = 0; round < 8; round++) {
        stored s = stored_open(NX_IO_BUFFERED, -1);
        part p[N];
        nx_read *list[N];
        for (int i = 0; i < N; i++) {
            part_init(&p[i], &s, 0, NBYTES);
            list[i] = &p[i].read;
        }
        nx_read *twice[2] = {list[0], list[0]};
        NX_CHECK_EQ(nx_io_submit(s.io, twice, 2), NX_E_BUSY);
        NX_CHECK_EQ(nx_io_submit(s.io, list, 2), NX_OK);
        NX_CHECK_EQ(nx_io_submit_spare(s.io, list + 2, N - 2), NX_OK);
        (void)nx_io_cancel(s.io, list[1]);
        (void)nx_io_drop(s.io, list[N - 2]);
        NX_CHECK_EQ(nx_io_wait(s.io, list[N - 1], NULL, NULL), NX_OK); /* waiting raises it */
        part_check(&p[N - 1], &s);
        if (round % 2) { /* to the end, in any order */
            for (int i = 0; i < N; i++) {
                const nx_status status = list[i]->done ? list[i]->status : nx_io_wait(s.io, list[i], NULL, NULL);
                NX_CHECK(status == NX_OK || (status == NX_E_ABORTED && (i == 1 || i == N - 2)));
                if (status == NX_OK) part_check(&p[i], &s);
            }
            NX_CHECK(nx_io_only_spare(s.io));
        }
        nx_io *io = s.io;
        nx_io_destroy(io);
        for (int i = 0; i < N; i++) NX_CHECK(list[i]->done);
        NX_CHECK_EQ(nx_io_create(NULL, &s.io), NX_OK);
        for (int i = 0; i < N; i++) free(p[i].memory);
        stored_close(&s);
    }
}

static void *read_all_of_it(void *arg) {
    stored *s = arg;
    stored own = *s;
    NX_CHECK_EQ(nx_io_create(NULL, &own.io), NX_OK);
    nx_io_set_pool(own.io, s->pool);
    for (int i = 0; i < 10; i++) {
        part p;
        part_init(&p, s, (uint64_t)i * 1000, NBYTES / 2);
        NX_CHECK_EQ(read_part(&own, &p), NX_OK);
        part_check(&p, s);
        free(p.memory);
    }
    nx_io_destroy(own.io);
    return NULL;
}

static void two_engines_share_a_pool(void) {
    stored s = stored_open(NX_IO_DIRECT, -1);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) NX_CHECK_EQ(pthread_create(&threads[i], NULL, read_all_of_it, &s), 0);
    for (int i = 0; i < 2; i++) NX_CHECK_EQ(pthread_join(threads[i], NULL), 0);
    stored_close(&s);
}

static void without_a_pool_such_reads_are_refused(void) {
    stored s = stored_open(NX_IO_DIRECT, -1);
    part p;
    part_init(&p, &s, 0, 10);
    nx_read *list = &p.read;
    nx_io_set_pool(s.io, NULL);
    NX_CHECK_EQ(nx_io_submit(s.io, &list, 1), NX_E_INVALID);
    nx_io_set_pool(s.io, s.pool);
    p.read.offset = NBYTES - 9; /* beyond the end */
    NX_CHECK_EQ(nx_io_submit(s.io, &list, 1), NX_E_INVALID);
    free(p.memory);
    stored_close(&s);
}

static void absurd_tables_are_refused(void) {
    NX_CHECK(nx_chunks_create(10, 3, 1) == NULL);
    NX_CHECK(nx_chunks_create(UINT64_MAX, 1, 1) == NULL);
    NX_CHECK(nx_chunks_create(1ull << 40, 1ull << 40, 1) == NULL);
    NX_CHECK(nx_chunks_create(0, 1, 1) == NULL);
    NX_CHECK(nx_chunks_create(8, 2, 0) == NULL);
}

static nx_status open_manifest(const char *lines, nx_error *error) {
    char text[1000];
    nx_model *m = NULL;
    snprintf(text, sizeof text,
             "nexus-manifest 1\nring 0\nslab 0\nscratch 0\nvirtual 2000000\nio buffered\nfile 5000 %s\n"
             "tensor ram 0 0 8000 64 1000 2 1 1 F32 t\n%send 1\n", path, lines);
    const nx_status status = nx_model_create(text, strlen(text), "", 0, &m, error);
    nx_model_release(m);
    return status;
}

static void manifests_say_where_chunks_are(void) {
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    NX_CHECK_EQ(ftruncate(fd, 5000), 0);
    close(fd);
    nx_error error;
    NX_CHECK_EQ(open_manifest("chunks 1 4000\nchunk 0 0 4000 raw 0\nchunk 0 4000 1000 ans ffff\n", &error), NX_OK);
    static const char *const wrong[] = {
        "",                                                            /* 8000 bytes of a file of 5000 */
        "chunks 1 4000\n",                                             /* none */
        "chunks 1 4000\nchunk 0 0 4000 raw 0\n",                       /* too few */
        "chunks 1 8000\nchunk 0 0 9 ans 0\nchunk 0 0 9 ans 0\n",       /* too many */
        "chunks 1 4000\nchunk 0 0 4000 raw 0\nchunk 0 4000 999 raw 0\n",  /* smaller, and raw */
        "chunks 1 4000\nchunk 0 0 4000 raw 0\nchunk 0 4001 1000 ans 0\n", /* beyond the end */
        "chunks 1 4000\nchunk 0 0 4000 raw 0\nchunk 1 0 1000 ans 0\n",    /* no such file */
        "chunks 1 4000\nchunk 0 0 4000 raw 0\nchunk 0 0 1000 lzma 0\n",   /* no such codec */
        "chunks 1 4000\nchunk 0 0 4000 raw 0\nchunk 0 0 1000 ans xyz\n",
        "chunks 1 8000\nchunk 0 0 8001 ans 0\n", /* grows */
        "chunks 1 8000\nchunk 0 0 0 ans 0\n",
        "chunks 3 4000\n",
        "chunks 1 0\n",
        "chunks 1 1\n", /* more chunks than there is text for */
        "chunk 0 0 8000 raw 0\n",
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        nx_test_about("%s", wrong[i]);
        NX_CHECK_EQ(open_manifest(wrong[i], &error), NX_E_INVALID);
        NX_CHECK(strstr(error.text, "line") != NULL);
    }
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(any_range_arrives_decoded),
        NX_TEST(what_lies_there_as_it_is_needs_no_pool),
        NX_TEST(what_lies_there_as_it_is_is_checked_once_or_always),
        NX_TEST(a_read_in_place_is_checked_when_it_is_done),
        NX_TEST(a_flipped_bit_is_named_by_its_chunk),
        NX_TEST(errors_are_tried_again_then_named),
        NX_TEST(reads_are_raised_dropped_and_left),
        NX_TEST(two_engines_share_a_pool),
        NX_TEST(without_a_pool_such_reads_are_refused),
        NX_TEST(absurd_tables_are_refused),
        NX_TEST(manifests_say_where_chunks_are),
    };
    const char *tmp = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/nexus-test-chunks-%d", tmp && *tmp ? tmp : "/tmp", (int)getpid());
    const int rc = nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
    unlink(path);
    return rc;
}
