/* test_view.c: a view has its size while it is shown, and what a program maps of it is right. */
#include <sys/mman.h>

#include "core_internal.h"
#include "nexus_view.h"
#include "nx_test.h"
#include "nx_world.h"

#define BEGIN 5000u
#define THEIRS 30000u
#define SIZE 60000u

static world w;
static char view[300];

static nx_model *opened(void) {
    world_init(&w, 1, 100000, 3);
    snprintf(view, sizeof view, "%s/a view.gguf", w.dir);
    const int fd = open(view, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    NX_CHECK(fd >= 0);
    NX_CHECK_EQ(ftruncate(fd, BEGIN), 0);
    close(fd);
    world_manifest(&w, 65536, 4096, 0, SIZE, true);
    world_tensor(&w, "ram", 0, 64, 1000, 20, 1, BEGIN, "ours");
    world_tensor(&w, "ram", 0, 40000, 1000, 9, 1, THEIRS, "theirs");
    world_line(&w, "view %s", view);
    nx_model *m = world_open(&w, NULL, 0);
    NX_CHECK(nx_model_has_view(m));
    NX_CHECK_EQ(nx_model_claim(m, nx_model_extent(m, 0)), NX_OK);
    return m;
}

static void closed(nx_model *m) {
    nx_model_release(m);
    (void)unlink(view);
    world_free(&w);
}

static uint64_t view_size(void) {
    struct stat st;
    NX_CHECK_EQ(stat(view, &st), 0);
    return (uint64_t)st.st_size;
}

static uint8_t *mapped(void) {
    const int fd = open(view, O_RDONLY | O_CLOEXEC);
    NX_CHECK(fd >= 0);
    uint8_t *base = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, fd, 0);
    NX_CHECK(base != MAP_FAILED);
    close(fd);
    return base;
}

static void it_has_its_size_while_it_is_shown(void) {
    nx_model *m = opened();
    nx_error error;
    NX_CHECK_EQ(view_size(), BEGIN);
    for (int i = 0; i < 2; i++) { /* a second process may do it again */
        NX_CHECK_EQ(nx_view_show(m, &error), NX_OK);
        NX_CHECK_EQ(view_size(), SIZE);
    }
    nx_view_hide(m);
    NX_CHECK_EQ(view_size(), BEGIN);
    closed(m);
}

static void a_file_that_is_something_else_is_refused(void) {
    nx_model *m = opened();
    nx_error error;
    NX_CHECK_EQ(truncate(view, BEGIN - 1), 0);
    NX_CHECK_EQ(nx_view_show(m, &error), NX_E_CHANGED);
    NX_CHECK(strstr(error.text, "a view.gguf is not the header") != NULL);
    NX_CHECK_EQ(unlink(view), 0);
    NX_CHECK_EQ(nx_view_show(m, &error), NX_E_IO);
    NX_CHECK(!nx_view_is_mapped(m));
    closed(m);
}

#ifdef __linux__
static void a_mapping_gets_what_the_backend_does_not_get(void) {
    nx_model *m = opened();
    nx_error error;
    const nx_extent *ours = nx_model_extent(m, 0), *theirs = nx_model_extent(m, 1);
    for (int round = 0; round < 2; round++) { /* the model is loaded, and later once more */
        NX_CHECK_EQ(nx_view_show(m, &error), NX_OK);
        NX_CHECK(!nx_view_is_mapped(m));
        nx_view_expect(m, ours);
        uint8_t *base = mapped();
        NX_CHECK(nx_view_is_mapped(m));
        for (uint64_t i = 0; i < SIZE; i++) NX_CHECK_EQ(base[i], 0); /* and all pages are there */
        for (int i = 0; i < 2; i++) NX_CHECK_EQ(nx_view_settle(m), NX_OK);
        unsigned char resident = 1;
        NX_CHECK_EQ(mincore(base + 4 * NX_PAGE, 1, &resident), 0);
        NX_CHECK_EQ(resident & 1, 0); /* what the mapping took is given back */
        NX_CHECK(world_same(&w, theirs, 0, base + THEIRS, theirs->nbytes));
        for (uint64_t i = 0; i < THEIRS; i++) NX_CHECK_EQ(base[i], 0);
        NX_CHECK_EQ(nx_view_check(m, base + BEGIN, ours->nbytes, ours), NX_OK);
        NX_CHECK_EQ(view_size(), SIZE);
        munmap(base, SIZE);
        NX_CHECK(!nx_view_is_mapped(m));
        nx_view_hide(m);
    }
    closed(m);
}
#endif

static void noted(nx_model *m, const char *text) {
    nx_error error;
    nx_model_last_error(m, &error);
    NX_CHECK(strstr(error.text, text) != NULL);
    nx_model_clear_error(m);
}

static void what_would_be_zeros_is_refused(void) {
    nx_model *m = opened();
    nx_error error;
    const nx_extent *ours = nx_model_extent(m, 0), *theirs = nx_model_extent(m, 1);
    NX_CHECK_EQ(nx_view_show(m, &error), NX_OK);
    nx_view_expect(m, ours);
    NX_CHECK_EQ(nx_view_settle(m), NX_E_UNSUPPORTED); /* nothing is mapped */
    noted(m, "tensor theirs is kept from the backend");
    NX_CHECK_EQ(nx_view_show(m, &error), NX_OK);
    nx_view_expect(m, ours);
    nx_view_expect(m, theirs);
    NX_CHECK_EQ(nx_view_settle(m), NX_OK);
    uint8_t memory[1000] = {0};
    NX_CHECK_EQ(nx_view_check(m, memory, sizeof memory, ours), NX_E_UNSUPPORTED); /* it did not come */
    noted(m, "tensor theirs is kept from the backend, which was offered it before");
    NX_CHECK_EQ(nx_model_claim(m, nx_model_extent(m, 1)), NX_OK);
    NX_CHECK_EQ(nx_view_check(m, memory, sizeof memory, ours), NX_OK);
    memory[7] = 1;
    NX_CHECK_EQ(nx_view_check(m, memory, sizeof memory, ours), NX_E_INVALID);
    noted(m, "tensor ours was loaded from another file");
    closed(m);
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(it_has_its_size_while_it_is_shown),
        NX_TEST(a_file_that_is_something_else_is_refused),
#ifdef __linux__
        NX_TEST(a_mapping_gets_what_the_backend_does_not_get),
#endif
        NX_TEST(what_would_be_zeros_is_refused),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
