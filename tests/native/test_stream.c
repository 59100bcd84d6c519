/*
 * test_stream.c: the virtual file that llama.cpp loads from reads like a file, leaves alone what the
 * backend pages, and can be mapped where the runtime wants addresses.
 */
#include <errno.h>
#include <limits.h>
#include <sys/mman.h>

#include "core_internal.h"
#include "nx_test.h"
#include "nx_world.h"

#define HEADER 1000
#define TENSORS 9

/* Two files merged into one virtual one: a header, tensors in another order, gaps of zeros. */
static world w;
static uint8_t header[HEADER], *expected;
static uint64_t virtual_bytes;

typedef struct place {
    const char *tier;
    size_t file;
    uint64_t offset, row_bytes, rows, virtual_offset;
} place;

static const place places[TENSORS] = {
    {"host", 0, 32, 1000, 2, 1024},
    {"nvme", 1, 64, 777, 3, 3040},
    {"host", 1, 4096 + 1323, 10000, 2, 8192 + 1323}, /* lies alike: whole pages can be mapped */
    {"ram", 0, 8192, 4096, 2, 30016},
    {"host", 1, 100, 50, 1, 38208},
    {"host", 0, 50000, 100, 1, 38272},                /* shares a page with the one before, from another file */
    {"host", 0, 4096 + 2000, 9000, 1, 40960 + 2000},  /* alike */
    {"host", 1, 11000, 3000, 1, 40960 + 11040},       /* not alike, and shares a page with the one before */
    {"host", 1, 70000, 1, 1, 60000},
};

static nx_model *merged_open(void) {
    uint64_t seed = 77;
    world_init(&w, 2, 100000, 5);
    virtual_bytes = 60032;
    expected = calloc(1, virtual_bytes);
    NX_CHECK(expected != NULL);
    for (size_t i = 0; i < HEADER; i++) header[i] = (uint8_t)nx_test_random(&seed);
    memcpy(expected, header, HEADER);
    world_manifest(&w, 65536, 4096, 0, virtual_bytes, true);
    for (size_t i = 0; i < TENSORS; i++) {
        const place *p = &places[(i * 4) % TENSORS]; /* the manifest need not be in order */
        char name[32];
        snprintf(name, sizeof name, "tensor %zu", (i * 4) % TENSORS);
        world_tensor(&w, p->tier, p->file, p->offset, p->row_bytes, p->rows, 1, p->virtual_offset, name);
        memcpy(expected + p->virtual_offset, w.files[p->file].bytes + p->offset, p->row_bytes * p->rows);
    }
    world_line(&w, "tensor host 0 0 0 38208 0 1 1 1 F32 empty");
    w.n_tensors++;
    return world_open(&w, header, HEADER);
}

static void merged_close(nx_model *m) {
    nx_model_release(m);
    free(expected);
    world_free(&w);
}

static nx_extent *tensor(nx_model *m, int i) {
    char name[32];
    snprintf(name, sizeof name, "tensor %d", i);
    nx_extent *e = nx_model_find(m, name);
    NX_CHECK(e != NULL);
    return e;
}

static FILE *stream_of(nx_model *m) {
    int has_descriptor = -1;
    FILE *f = nx_model_stream(m, &has_descriptor);
    NX_CHECK(f != NULL && (has_descriptor == 0 || has_descriptor == 1));
    return f;
}

static void it_reads_like_a_file(void) {
    nx_model *m = merged_open();
    FILE *f = stream_of(m);
    uint8_t *buffer = malloc(virtual_bytes + 1);
    NX_CHECK(buffer != NULL);
    NX_CHECK_EQ(ftell(f), 0);
    NX_CHECK_EQ(fread(buffer, 1, virtual_bytes + 1, f), virtual_bytes);
    NX_CHECK(feof(f) && !ferror(f) && memcmp(buffer, expected, virtual_bytes) == 0);
    NX_CHECK_EQ(ftell(f), virtual_bytes);
    rewind(f);
    NX_CHECK(!feof(f));
    NX_CHECK_EQ(fseek(f, 0, SEEK_END), 0);
    NX_CHECK_EQ(ftell(f), virtual_bytes);
    NX_CHECK_EQ(fgetc(f), EOF);
    NX_CHECK_EQ(fseek(f, -1, SEEK_END), 0);
    NX_CHECK_EQ(fgetc(f), expected[virtual_bytes - 1]);
    uint64_t seed = 9;
    for (int k = 0; k < 5000; k++) {
        const uint64_t at = nx_test_random(&seed) % (virtual_bytes + 1);
        const uint64_t size = nx_test_random(&seed) % (k % 2 ? 100 : 20000);
        const uint64_t there = size < virtual_bytes - at ? size : virtual_bytes - at;
        const long here = ftell(f);
        if (k % 3) NX_CHECK_EQ(fseek(f, (long)at, SEEK_SET), 0);
        else NX_CHECK_EQ(fseek(f, (long)at - here, SEEK_CUR), 0);
        NX_CHECK_EQ(ftell(f), at);
        memset(buffer, 0xA5, size + 1);
        NX_CHECK_EQ(fread(buffer, 1, size, f), there);
        NX_CHECK(memcmp(buffer, expected + at, there) == 0 && buffer[size] == 0xA5);
        NX_CHECK_EQ(ftell(f), at + there);
    }
    nx_model_stream_close(f);
    free(buffer);
    merged_close(m);
}

static void seeks_beyond_the_end_and_before_the_beginning(void) {
    nx_model *m = merged_open();
    FILE *f = stream_of(m);
    uint8_t byte;
    NX_CHECK_EQ(fseek(f, 1 << 30, SEEK_SET), 0);
    NX_CHECK_EQ(fread(&byte, 1, 1, f), 0);
    NX_CHECK(feof(f) && !ferror(f));
    NX_CHECK_EQ(fseek(f, 10, SEEK_SET), 0);
    NX_CHECK(fseek(f, -11, SEEK_CUR) != 0);
    NX_CHECK(fseek(f, -1, SEEK_SET) != 0);
    NX_CHECK(fseek(f, LONG_MAX, SEEK_END) != 0);
    NX_CHECK(fseek(f, LONG_MIN, SEEK_END) != 0);
    NX_CHECK_EQ(ftell(f), 10);
    NX_CHECK_EQ(fgetc(f), expected[10]);
    nx_model_stream_close(f);
    merged_close(m);
}

/* Claimed tensors are not read: their file may be gone, and what lies around them is right. */
static void what_is_claimed_is_not_read(void) {
    nx_model *m = merged_open();
    FILE *f = stream_of(m);
    uint8_t *buffer = malloc(virtual_bytes);
    NX_CHECK(buffer != NULL);
    for (int i = 1; i < TENSORS; i++)
        if (places[i].file == 1) NX_CHECK_EQ(nx_model_claim(m, tensor(m, i)), NX_OK);
    NX_CHECK_EQ(truncate(w.files[1].path, 0), 0);
    uint64_t seed = 3;
    for (int k = 0; k < 500; k++) {
        const uint64_t at = nx_test_random(&seed) % virtual_bytes;
        const uint64_t size = nx_test_random(&seed) % (virtual_bytes - at + 1);
        NX_CHECK_EQ(fseek(f, (long)at, SEEK_SET), 0);
        NX_CHECK_EQ(fread(buffer, 1, size, f), size);
        for (int i = 0; i < TENSORS; i++) /* leave them out of the comparison */
            for (uint64_t j = 0; places[i].file == 1 && j < places[i].row_bytes * places[i].rows; j++) {
                const uint64_t byte = places[i].virtual_offset + j;
                if (byte >= at && byte < at + size) buffer[byte - at] = expected[byte];
            }
        NX_CHECK(memcmp(buffer, expected + at, size) == 0);
    }
    NX_CHECK(!ferror(f));
    nx_model_stream_close(f);
    free(buffer);
    merged_close(m);
}

static void an_error_of_the_file_is_an_error_of_the_stream(void) {
    nx_model *m = merged_open();
    FILE *f = stream_of(m);
    uint8_t buffer[8000];
    NX_CHECK_EQ(truncate(w.files[0].path, 500), 0);
    NX_CHECK_EQ(fseek(f, 900, SEEK_SET), 0);
    NX_CHECK_EQ(fread(buffer, 1, 124, f), 124); /* header and gap */
    NX_CHECK(memcmp(buffer, expected + 900, 124) == 0);
    NX_CHECK(fread(buffer, 1, 2000, f) < 2000);
    NX_CHECK(ferror(f) && !feof(f));
    nx_error error;
    nx_model_last_error(m, &error);
    NX_CHECK(error.status == NX_E_TRUNCATED && strcmp(error.tensor, "tensor 0") == 0);
    NX_CHECK_EQ(error.offset, 500);
    clearerr(f);
    NX_CHECK_EQ(fseek(f, (long)places[1].virtual_offset, SEEK_SET), 0); /* the other file is well */
    NX_CHECK_EQ(fread(buffer, 1, 777, f), 777);
    NX_CHECK(memcmp(buffer, expected + places[1].virtual_offset, 777) == 0);
    nx_model_stream_close(f);
    merged_close(m);
}

static void a_stream_keeps_its_model(void) {
    nx_model *m = merged_open();
    FILE *a = stream_of(m), *b = stream_of(m);
    nx_model_release(m);
    NX_CHECK_EQ(fseek(a, 5, SEEK_SET), 0);
    NX_CHECK_EQ(fgetc(a), expected[5]);
    NX_CHECK_EQ(fgetc(b), expected[0]); /* each has a place of its own */
    nx_model_stream_close(a);
    NX_CHECK_EQ(fgetc(b), expected[1]);
    nx_model_stream_close(b);
    free(expected);
    world_free(&w);
}

static void two_tensors_in_one_place_are_refused(void) {
    world_init(&w, 1, 5000, 1);
    world_manifest(&w, 0, 0, 0, 5000, true);
    world_tensor(&w, "host", 0, 0, 100, 1, 1, 1000, "one");
    world_tensor(&w, "host", 0, 0, 100, 1, 1, 1099, "two");
    nx_model *m = world_open(&w, "", 0);
    int has_descriptor;
    errno = 0;
    NX_CHECK(nx_model_stream(m, &has_descriptor) == NULL && errno == EINVAL);
    nx_error error;
    nx_model_last_error(m, &error);
    NX_CHECK(strstr(error.text, "one") != NULL && strstr(error.text, "two") != NULL);
    nx_model_release(m);
    world_free(&w);
}

/* The runtime maps the descriptor, and hands over addresses: those that nobody claimed hold bytes then. */
static void a_mapping_gets_what_nobody_claimed(void) {
    for (int first = 0; first < TENSORS; first++) {
        for (int claim = 0; claim < 2; claim++) {
            nx_test_about("told of tensor %d, %s", first, claim ? "two claimed" : "none claimed");
            nx_model *m = merged_open();
            int has_descriptor;
            FILE *f = nx_model_stream(m, &has_descriptor);
            NX_CHECK(f != NULL);
            if (!has_descriptor) { /* not with this C library */
                nx_model_stream_close(f);
                merged_close(m);
                return;
            }
            const size_t length = nx_round_up(virtual_bytes, NX_PAGE);
            uint8_t *base = mmap(NULL, virtual_bytes, PROT_READ, MAP_SHARED, fileno(f), 0);
            NX_CHECK(base != MAP_FAILED);
            NX_CHECK_EQ(fgetc(f), expected[0]); /* it still reads */
            if (claim) {
                NX_CHECK_EQ(nx_model_claim(m, tensor(m, 1)), NX_OK);
                NX_CHECK_EQ(nx_model_claim(m, tensor(m, 3)), NX_OK);
            }
            NX_CHECK_EQ(nx_model_overlay(m, base + places[first].virtual_offset, tensor(m, first)), NX_OK);
            for (int i = 0; i < TENSORS; i++) {
                const place *p = &places[i];
                if (claim && (i == 1 || i == 3)) continue;
                NX_CHECK(memcmp(base + p->virtual_offset, expected + p->virtual_offset, p->row_bytes * p->rows) == 0);
            }
            NX_CHECK_EQ(munmap(base, length), 0);
            /* Once is enough: the address is the runtime's now. */
            NX_CHECK_EQ(nx_model_overlay(m, base + places[first].virtual_offset, tensor(m, first)), NX_OK);
            nx_model_stream_close(f);
            merged_close(m);
        }
    }
}

static void addresses_that_are_no_mapping_are_left_alone(void) {
    nx_model *m = merged_open();
    int has_descriptor;
    FILE *f = nx_model_stream(m, &has_descriptor);
    NX_CHECK(f != NULL);
    uint8_t *memory = calloc(1, virtual_bytes + NX_PAGE);
    NX_CHECK(memory != NULL);
    uint8_t *odd = memory + (((uintptr_t)memory % NX_PAGE) ? 0 : 1); /* no mapping begins here */
    NX_CHECK_EQ(nx_model_overlay(m, odd + places[2].virtual_offset, tensor(m, 2)), NX_OK);
    for (uint64_t i = 0; i < virtual_bytes; i++) NX_CHECK_EQ(odd[i], 0);
    free(memory);
    nx_model_stream_close(f);
    merged_close(m);
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(it_reads_like_a_file),
        NX_TEST(seeks_beyond_the_end_and_before_the_beginning),
        NX_TEST(what_is_claimed_is_not_read),
        NX_TEST(an_error_of_the_file_is_an_error_of_the_stream),
        NX_TEST(a_stream_keeps_its_model),
        NX_TEST(two_tensors_in_one_place_are_refused),
        NX_TEST(a_mapping_gets_what_nobody_claimed),
        NX_TEST(addresses_that_are_no_mapping_are_left_alone),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
