/*
 * test_manifest.c: the text that describes a model is read as it is written, or refused; and matrices
 * are cut into slabs that compute the same.
 */
#include "manifest.h"
#include "nx_test.h"
#include "nx_world.h"

/* ------------------------------------------------------------ parsing alone */

static nx_status parse_bytes(nx_model *m, const char *text, size_t nbytes, nx_error *error) {
    /* A copy that ends where the text ends: reading beyond it is seen by the sanitizers. */
    char *copy = malloc(nbytes ? nbytes : 1);
    NX_CHECK(copy != NULL);
    memcpy(copy, text, nbytes);
    memset(m, 0, sizeof *m);
    const nx_status status = nx_manifest_parse(m, copy, nbytes, error);
    free(copy);
    return status;
}

static void parsed_free(nx_model *m) {
    for (uint32_t i = 0; i < m->n_files; i++) free(m->files[i].path);
    free(m->files);
    free(m->extents);
    free(m->view);
}

static void refused(const char *text, const char *in_message) {
    nx_model m;
    nx_error error;
    nx_test_about("%.200s", text);
    NX_CHECK_EQ(parse_bytes(&m, text, strlen(text), &error), NX_E_INVALID);
    NX_CHECK_EQ(error.status, NX_E_INVALID);
    NX_CHECK(strstr(error.text, in_message) != NULL);
    parsed_free(&m);
}

static void accepted(const char *text) {
    nx_model m;
    nx_error error;
    nx_test_about("%.200s", text);
    NX_CHECK_EQ(parse_bytes(&m, text, strlen(text), &error), NX_OK);
    parsed_free(&m);
}

#define HEAD "nexus-manifest 1\n"
#define FILE_LINE "file 1000 /a b/c.gguf\n"
#define TENSOR "tensor nvme 0 100 64 7 8 4 2 1 Q8_0 blk.0.ffn_up.weight\n"

static void a_manifest_is_read_as_written(void) {
    const char *text = HEAD "ring 65536\nslab 8192\nscratch 4096\nvirtual 5000\nio buffered\n" FILE_LINE
                            "file 18446744073709551615 /x\n\n   \n"
                            "tensor nvme 0 100 64 7 8 4 2 1 Q8_0 a name with spaces \n"
                            "tensor ram 1 0 1 0 1 1 1 1 F32  leading\n"
                            "tensor host 0 1000 0 0 0 3 1 1 F32 empty\n"
                            "end 3\n";
    nx_model m;
    nx_error error;
    NX_CHECK_EQ(parse_bytes(&m, text, strlen(text), &error), NX_OK);
    NX_CHECK_EQ(m.pager.ring_bytes, 65536);
    NX_CHECK_EQ(m.pager.slab_bytes, 8192);
    NX_CHECK_EQ(m.pager.scratch_bytes, 4096);
    NX_CHECK_EQ(m.virtual_bytes, 5000);
    NX_CHECK_EQ(m.io_mode, NX_IO_BUFFERED);
    NX_CHECK_EQ(m.n_files, 2);
    NX_CHECK(strcmp(m.files[0].path, "/a b/c.gguf") == 0);
    NX_CHECK_EQ(m.files[0].nbytes, 1000);
    NX_CHECK(m.files[1].nbytes == UINT64_MAX);
    NX_CHECK_EQ(m.n_extents, 3);
    const nx_extent *e = m.extents;
    NX_CHECK(e[0].tier == NX_TIER_NVME && e[1].tier == NX_TIER_RAM && e[2].tier == NX_TIER_HOST);
    NX_CHECK(e[0].file == 0 && e[0].offset == 100 && e[0].nbytes == 64 && e[0].virtual_offset == 7);
    NX_CHECK(e[0].ne[0] == 8 && e[0].ne[1] == 4 && e[0].ne[2] == 2 && e[0].ne[3] == 1);
    NX_CHECK_EQ(e[0].row_bytes, 8);
    NX_CHECK(strcmp(e[0].type, "Q8_0") == 0 && strcmp(e[0].name, "a name with spaces ") == 0);
    NX_CHECK(strcmp(e[1].name, " leading") == 0);
    NX_CHECK_EQ(e[2].nbytes, 0);
    parsed_free(&m);
    accepted(HEAD "end 0\n");
    accepted(HEAD "end 0");
    accepted(HEAD FILE_LINE TENSOR "end 1\n\n  \n");
}

static void each_malformed_line_is_refused_by_its_number(void) {
    refused("", "without \"end\"");
    refused("\n" HEAD "end 0\n", "line 1 ");
    refused("nexus-manifest 2\nend 0\n", "line 1 ");
    refused("nexus-manifest\nend 0\n", "line 1 ");
    refused("nexus-manifest 1 1\nend 0\n", "line 1 ");
    refused("end 0\n", "line 1 ");
    refused("a-word-that-is-longer-than-any-key-of-ours 1\nend 0\n", "line 1 ");
    static const char *const bad[] = {
        "ring", "ring x", "ring -1", "ring +1", "ring 1x", "ring 0x10", "ring 1.0", "ring 18446744073709551616",
        "ring 99999999999999999999999999999", "ring 1 2", "slab", "slab 1 k", "scratch", "scratch \t1",
        "virtual", "virtual 9223372036854775808", "io", "io fast", "io direct now", "io directly", "Ring 1",
        "a-word-that-is-longer-than-any-key-of-ours 1", "ring\r", "io direct\r", "file", "file 10", "file x /a",
        "file 10 ", "tensor", "unknown 1", "end", "end x", "end 1", "end 0 0", "nexus-manifest 1",
        /* tensors, but there is no file */
        "tensor host 0 0 8 0 8 1 1 1 F32 name",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[512];
        snprintf(text, sizeof text, HEAD "%s\nend 0\n", bad[i]);
        refused(text, "line 2 ");
        snprintf(text, sizeof text, HEAD "%s", bad[i]);
        refused(text, "line 2 ");
    }
    static const char *const bad_tensor[] = {
        "tensor gpu 0 0 8 0 8 1 1 1 F32 name",           /* no such tier */
        "tensor nvmenvme 0 0 8 0 8 1 1 1 F32 name",      /* a word too long */
        "tensor nvme 1 0 8 0 8 1 1 1 F32 name",          /* no such file */
        "tensor nvme 4294967296 0 8 0 8 1 1 1 F32 name", /* no such file, in 32 bits it is */
        "tensor nvme 0 993 8 0 8 1 1 1 F32 name",        /* ends beyond the file */
        "tensor nvme 0 1001 8 0 8 1 1 1 F32 name",
        "tensor nvme 0 18446744073709551615 8 0 8 1 1 1 F32 name", /* offset + bytes wraps */
        "tensor nvme 0 0 8 18446744073709551615 8 1 1 1 F32 name",
        "tensor nvme 0 0 0 0 8 1 1 1 F32 name", /* without bytes */
        "tensor nvme 0 0 8 0 0 1 1 1 F32 name", /* without elements */
        "tensor nvme 0 0 8 0 8 0 1 1 F32 name",
        "tensor nvme 0 0 0 0 8 0 1 1 F32 name",
        "tensor ram 0 0 0 0 8 1 1 0 F32 name",
        "tensor host 0 0 8 0 8 1 0 1 F32 name",
        "tensor host 0 0 0 0 8 1 1 1 F32 name",
        "tensor nvme 0 0 8 0 8 3 1 1 F32 name", /* 8 bytes are not 3 rows */
        "tensor nvme 0 0 8 0 8 16 1 1 F32 name",
        "tensor nvme 0 0 8 0 8 4294967296 4294967296 1 F32 name", /* rows wrap to 0 */
        "tensor nvme 0 0 8 0 8 4294967296 4294967296 4294967296 F32 name",
        "tensor nvme 0 0 8 0 8 6148914691236517206 3 1 F32 name", /* rows wrap to 2 */
        "tensor nvme 0 0 8 0 8 1 1 1 F32", /* no name */
        "tensor nvme 0 0 8 0 8 1 1 1 F32 ",
        "tensor nvme 0 0 8 0 8 1 1 1",
        "tensor nvme 0 0 8 0 8 1 1 1 a-type-of-more-than-23-chars name",
        "tensor nvme 0 0 8 0 8 1 1",
        "tensor nvme 0 0 -8 0 8 1 1 1 F32 name",
        " tensor nvme 0 0 8 0 8 1 1 1 F32 name", /* not counted as a tensor: refused, not overrun */
    };
    for (size_t i = 0; i < sizeof bad_tensor / sizeof *bad_tensor; i++) {
        char text[512];
        snprintf(text, sizeof text, HEAD FILE_LINE "%s\nend 1\n", bad_tensor[i]);
        refused(text, "line 3 ");
    }
    refused(HEAD FILE_LINE TENSOR, "without \"end\"");
    refused(HEAD FILE_LINE TENSOR "end 2\n", "line 4 ");
    refused(HEAD FILE_LINE TENSOR "end 0\n", "line 4 ");
    refused(HEAD FILE_LINE TENSOR "end 1\nring 5\n", "line 5 ");
    refused(HEAD "end 0\nend 0\n", "line 3 ");
    accepted(HEAD "view /a b/v.gguf\nend 0\n");
    refused(HEAD "view\nend 0\n", "line 2 ");
    refused(HEAD "view /v\nview /v\nend 0\n", "line 3 ");
}

static void names_and_paths_have_a_limit(void) {
    char text[8192], name[5000];
    memset(name, 'n', sizeof name);
    snprintf(text, sizeof text, HEAD FILE_LINE "tensor host 0 0 8 0 8 1 1 1 F32 %.*s\nend 1\n", NX_NAME_BYTES - 1, name);
    accepted(text);
    snprintf(text, sizeof text, HEAD FILE_LINE "tensor host 0 0 8 0 8 1 1 1 F32 %.*s\nend 1\n", NX_NAME_BYTES, name);
    refused(text, "line 3 ");
    snprintf(text, sizeof text, HEAD "file 1 %.*s\nend 0\n", 4095, name);
    accepted(text);
    snprintf(text, sizeof text, HEAD "file 1 %.*s\nend 0\n", 4096, name);
    refused(text, "line 2 ");
}

static void a_zero_byte_is_no_text(void) {
    static const char text[] = HEAD "file 10 /a\0b\nend 0\n";
    nx_model m;
    nx_error error;
    NX_CHECK_EQ(parse_bytes(&m, text, sizeof text - 1, &error), NX_E_INVALID);
    parsed_free(&m);
    NX_CHECK_EQ(parse_bytes(&m, HEAD "end 0\n", sizeof HEAD "end 0\n", &error), NX_E_INVALID);
    parsed_free(&m);
}

/* ------------------------------------------------------------ whole models */

static nx_status create(const world *w, nx_error *error) {
    nx_model *m = NULL;
    const nx_status status = nx_model_create(w->text, w->n_text, NULL, 0, &m, error);
    NX_CHECK((status == NX_OK) == (m != NULL));
    nx_model_release(m);
    return status;
}

static void a_model_that_cannot_be_is_refused_in_words(void) {
    world w;
    nx_error error;
    world_init(&w, 1, 100000, 1);

    world_manifest(&w, 65536, 4096, 0, 0, true);
    world_tensor(&w, "nvme", 0, 0, 10, 10, 1, 0, "twice");
    world_tensor(&w, "nvme", 0, 0, 10, 10, 1, 0, "once");
    world_tensor(&w, "host", 0, 0, 10, 10, 1, 0, "twice");
    world_line(&w, "end 3");
    NX_CHECK_EQ(create(&w, &error), NX_E_INVALID);
    NX_CHECK(strstr(error.text, "twice") != NULL);

    world_manifest(&w, 65536, 4096, 0, 0, true);
    world_line(&w, "file 10 %s/not there", w.dir);
    world_line(&w, "end 0");
    NX_CHECK_EQ(create(&w, &error), NX_E_IO);
    NX_CHECK(strstr(error.text, "not there") != NULL && strstr(error.path, "not there") != NULL);

    world_manifest(&w, 65536, 4096, 0, 0, true);
    world_line(&w, "file 10 %s", w.dir);
    world_line(&w, "end 0");
    NX_CHECK(create(&w, &error) != NX_OK);

    world_manifest(&w, 65536, 4096, 0, 0, true);
    world_line(&w, "file 100 %s", w.files[0].path); /* it has more */
    world_line(&w, "end 0");
    NX_CHECK_EQ(create(&w, &error), NX_E_CHANGED);

    world_manifest(&w, 0, 0, UINT64_MAX / 2, 0, true); /* more scratch than there are addresses */
    world_line(&w, "end 0");
    NX_CHECK_EQ(create(&w, &error), NX_E_NOMEM);

    NX_CHECK_EQ(nx_model_create("", 0, NULL, 0, &(nx_model *){NULL}, NULL), NX_E_INVALID); /* no error wanted */
    world_free(&w);
}

/* A file without blocks that is larger than any disk here. */
static void more_pieces_than_numbers_are_refused(void) {
    world w;
    nx_error error;
    world_init(&w, 1, 4096, 1);
    const uint64_t nbytes = (uint64_t)5 << 32;
    if (truncate(w.files[0].path, (off_t)nbytes) == 0) {
        w.files[0].nbytes = nbytes;
        world_manifest(&w, 65536, 1, 0, 0, false);
        world_tensor(&w, "nvme", 0, 0, 1, nbytes - 1, 1, 0, "rows"); /* an odd number: one row a slab */
        world_line(&w, "end 1");
        NX_CHECK_EQ(create(&w, &error), NX_E_INVALID);
        NX_CHECK(strstr(error.text, "pieces") != NULL);
    }
    world_free(&w);
}

static void names_are_found(void) {
    world w;
    world_init(&w, 1, 100000, 1);
    world_manifest(&w, 0, 0, 0, 0, true);
    char name[64];
    for (int i = 0; i < 1000; i++) {
        snprintf(name, sizeof name, "blk.%d.weight", i);
        world_tensor(&w, "host", 0, (uint64_t)i, 1, 1, 1, 0, name);
    }
    nx_model *m = world_open(&w, "", 0);
    for (int i = 0; i < 1000; i++) {
        snprintf(name, sizeof name, "blk.%d.weight", i);
        nx_extent *e = nx_model_find(m, name);
        NX_CHECK(e == nx_model_extent(m, (size_t)i) && e->offset == (uint64_t)i && e->model == m);
    }
    NX_CHECK(nx_model_find(m, "blk.1000.weight") == NULL && nx_model_find(m, "") == NULL);
    NX_CHECK_EQ(nx_model_n_extents(m), 1000);
    NX_CHECK(nx_model_extent(m, 1000) == NULL);
    nx_model_release(m);
    world_free(&w);
}

/* ------------------------------------------------------------ rubbish */

static size_t mutate(char *text, size_t n, size_t capacity, uint64_t *seed) {
    static const char *const words[] = {"18446744073709551615", "18446744073709551616", "0", "-1", "tensor ", "\n",
                                        " ", "end", "nvme", "ram", "9223372036854775807", "4294967296", "%s"};
    for (uint64_t k = 1 + nx_test_random(seed) % 4; k > 0; k--) {
        const size_t at = n ? nx_test_random(seed) % n : 0;
        switch (nx_test_random(seed) % 6) {
        case 0:
            if (n) text[at] = (char)nx_test_random(seed);
            break;
        case 1:
            if (n) text[at] = (char)('0' + nx_test_random(seed) % 10);
            break;
        case 2: n = at; break;
        case 3: { /* leave something out */
            const size_t gone = nx_test_random(seed) % (n - at + 1);
            memmove(text + at, text + at + gone, n - at - gone);
            n -= gone;
            break;
        }
        case 4: { /* put a word in */
            const char *word = words[nx_test_random(seed) % (sizeof words / sizeof *words)];
            const size_t length = strlen(word);
            if (n + length > capacity) break;
            memmove(text + at + length, text + at, n - at);
            memcpy(text + at, word, length);
            n += length;
            break;
        }
        default: { /* say something again, elsewhere */
            size_t length = nx_test_random(seed) % 80;
            const size_t from = n ? nx_test_random(seed) % n : 0;
            if (length > n - from) length = n - from;
            if (n + length > capacity || length > 80) break;
            char copy[80];
            memcpy(copy, text + from, length);
            memmove(text + at + length, text + at, n - at);
            memcpy(text + at, copy, length);
            n += length;
        }
        }
    }
    return n;
}

static void check_sane(const nx_model *m) {
    for (uint32_t i = 0; i < m->n_extents; i++) {
        const nx_extent *e = &m->extents[i];
        NX_CHECK(e->file < m->n_files);
        NX_CHECK(e->offset <= m->files[e->file].nbytes && e->nbytes <= m->files[e->file].nbytes - e->offset);
        NX_CHECK(e->virtual_offset + e->nbytes >= e->virtual_offset);
        NX_CHECK(e->nbytes % (e->row_bytes ? e->row_bytes : 1) == 0);
        NX_CHECK(e->tier == NX_TIER_HOST || (e->nbytes > 0 && e->row_bytes > 0));
        NX_CHECK(strlen(e->name) > 0);
    }
}

static void rubbish_never_crashes(void) {
    world w;
    world_init(&w, 2, 100000, 1);
    world_manifest(&w, 65536, 4096, 16384, 90000, true);
    for (uint64_t i = 0; i < 12; i++) {
        char name[32];
        snprintf(name, sizeof name, "blk.%" PRIu64 ".weight", i);
        world_tensor(&w, i % 3 == 0 ? "host" : i % 3 == 1 ? "ram" : "nvme", i % 2, 100 * i, 17 + i, 40 + i, 1 + i % 2,
                     7000 * i, name);
    }
    world_line(&w, "end %zu", w.n_tensors);
    const size_t capacity = w.n_text + 4096;
    char *text = malloc(capacity);
    NX_CHECK(text != NULL);
    uint64_t seed = 42;
    int n_valid = 0, n_created = 0;
    for (int round = 0; round < 20000; round++) {
        nx_test_about("mutation %d", round);
        memcpy(text, w.text, w.n_text);
        const size_t n = mutate(text, w.n_text, capacity, &seed);
        nx_model parsed;
        nx_error error;
        const nx_status status = parse_bytes(&parsed, text, n, &error);
        uint64_t memory = parsed.pager.ring_bytes | parsed.pager.scratch_bytes;
        if (status == NX_OK) {
            n_valid++;
            check_sane(&parsed);
        } else {
            NX_CHECK(status == NX_E_INVALID && error.text[0] && memchr(error.text, 0, sizeof error.text));
        }
        parsed_free(&parsed);
        if (status != NX_OK || memory > (64u << 20) || n_created >= 200) continue;
        nx_model *m = NULL; /* what is well formed is opened as well, or refused */
        if (nx_model_create(text, n, "", 0, &m, &error) == NX_OK) {
            int has_descriptor;
            FILE *f = nx_model_stream(m, &has_descriptor);
            if (f) nx_model_stream_close(f);
            nx_model_release(m);
        } else {
            NX_CHECK(error.status != NX_OK && error.text[0]);
        }
        n_created++;
    }
    NX_CHECK(n_valid > 100 && n_created > 50); /* the test tests something */
    free(text);
    world_free(&w);
}

/* ------------------------------------------------------------ slabs */

/* How a kernel sees a number of rows: tiles of 4, pairs, or one by one. */
static int class_of(uint64_t rows) { return rows % 4 == 0 ? 0 : rows % 2 == 0 ? 2 : 1; }

static void check_split(uint64_t rows, uint64_t row_bytes, uint64_t slab_bytes) {
    uint64_t slab_rows = 0;
    uint32_t n = 0;
    nx_test_about("%" PRIu64 " rows of %" PRIu64 " bytes, slabs of %" PRIu64, rows, row_bytes, slab_bytes);
    nx_slab_split(rows, row_bytes, slab_bytes, &slab_rows, &n);
    NX_CHECK(n >= 1 && slab_rows >= 1 && slab_rows <= rows);
    NX_CHECK((uint64_t)(n - 1) * slab_rows < rows && (uint64_t)n * slab_rows >= rows); /* covers, no slab is empty */
    const uint64_t last = rows - (uint64_t)(n - 1) * slab_rows;
    if (n > 1) {
        NX_CHECK_EQ(class_of(slab_rows), class_of(rows));
        NX_CHECK_EQ(class_of(last), class_of(rows));
        if (class_of(rows) != 0) NX_CHECK_EQ(n % 2, 1);
        /* no larger than asked, if rows of that class can be that few */
        NX_CHECK(slab_rows * row_bytes <= slab_bytes || slab_rows <= 4);
    }
    if (rows * row_bytes <= slab_bytes) NX_CHECK_EQ(n, 1);
    /* not many more than needed: alignment may halve a slab, parity takes some rows more */
    const uint64_t most = slab_bytes / row_bytes;
    if (most >= 64) NX_CHECK(n <= 4 * (rows / most + 1));
}

static void slabs_cover_a_matrix_and_keep_its_class(void) {
    for (uint64_t rows = 1; rows <= 300; rows++)
        for (uint64_t slab = 1; slab <= 320; slab++) check_split(rows, 1, slab);
    uint64_t seed = 7;
    for (int i = 0; i < 200000; i++) {
        const uint64_t rows = 1 + nx_test_random(&seed) % (1u << (1 + nx_test_random(&seed) % 20));
        const uint64_t row_bytes = 1 + nx_test_random(&seed) % (1u << (1 + nx_test_random(&seed) % 17));
        check_split(rows, row_bytes, 1 + nx_test_random(&seed) % (1u << (1 + nx_test_random(&seed) % 24)));
    }
    static const uint64_t shapes[] = {151936, 151935, 151934, 32000, 128256, 49155, 50257, 50258, 250002};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (uint64_t slab = 4096; slab <= (64u << 20); slab = slab * 3 / 2) check_split(shapes[i], 4352, slab);
}

/* Found in steps that grow with the number of slabs, not of rows. */
static void a_matrix_of_any_size_is_split_at_once(void) {
    for (uint64_t d = 0; d < 4; d++)
        for (uint64_t slab = 1; slab < 60; slab++) {
            uint64_t slab_rows;
            uint32_t n;
            const uint64_t rows = ((uint64_t)1 << 60) + d;
            nx_slab_split(rows, 1, rows / slab + d, &slab_rows, &n);
            NX_CHECK((uint64_t)(n - 1) * slab_rows < rows && rows <= (uint64_t)n * slab_rows);
        }
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(a_manifest_is_read_as_written),
        NX_TEST(each_malformed_line_is_refused_by_its_number),
        NX_TEST(names_and_paths_have_a_limit),
        NX_TEST(a_zero_byte_is_no_text),
        NX_TEST(a_model_that_cannot_be_is_refused_in_words),
        NX_TEST(more_pieces_than_numbers_are_refused),
        NX_TEST(names_are_found),
        NX_TEST(rubbish_never_crashes),
        NX_TEST(slabs_cover_a_matrix_and_keep_its_class),
        NX_TEST(a_matrix_of_any_size_is_split_at_once),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
