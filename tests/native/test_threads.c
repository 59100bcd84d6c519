/* Threads are bound to the processors they are told, and a mask that was asked for is given back. */
#include "nexus_threads.h"
#include "nx_consumer.h"

static world w;

static nx_model *open_model(void) {
    world_init(&w, 1, 200000, 3);
    world_manifest(&w, 1u << 16, 4096, 0, 0, true);
    world_line(&w, "tensor ram 0 0 4096 0 1024 1 1 1 F32 plain");
    w.n_tensors++;
    return world_open(&w, "", 0);
}

static void a_model_keeps_its_processors(void) {
    nx_model *m = open_model();
    uint32_t seen[NX_MAX_CORES];
    const uint32_t cores[] = {3, 1, 1023}, beyond[] = {0, 1024};
    NX_CHECK_EQ(nx_model_cores(m, seen), 0);
#ifdef __linux__
    NX_CHECK_EQ(nx_model_set_cores(m, cores, 3), NX_OK);
    NX_CHECK_EQ(nx_model_cores(m, seen), 3);
    NX_CHECK(memcmp(seen, cores, sizeof cores) == 0);
#else
    NX_CHECK_EQ(nx_model_set_cores(m, cores, 3), NX_E_UNSUPPORTED);
#endif
    NX_CHECK_EQ(nx_model_set_cores(m, beyond, 2), NX_E_INVALID);
    NX_CHECK_EQ(nx_model_set_cores(m, cores, NX_MAX_CORES + 1), NX_E_INVALID);
    NX_CHECK_EQ(nx_model_set_cores(m, NULL, 0), NX_OK);
    NX_CHECK_EQ(nx_model_cores(m, seen), 0);
    nx_model_release(m);
    world_free(&w);
}

static void a_thread_is_bound_and_free_again(void) {
    nx_thread_mask before, bound, after;
    if (nx_thread_get_mask(&before) != NX_OK) return; /* a system that binds no threads */
    uint32_t cpu = 0;
    while (!(before.bits[cpu / 64] >> cpu % 64 & 1)) cpu++;
    NX_CHECK_EQ(nx_thread_bind(cpu), NX_OK);
    NX_CHECK_EQ(nx_thread_get_mask(&bound), NX_OK);
    for (uint32_t i = 0; i < 1024; i++) NX_CHECK_EQ(bound.bits[i / 64] >> i % 64 & 1, i == cpu);
    NX_CHECK_EQ(nx_thread_set_mask(&before), NX_OK);
    NX_CHECK_EQ(nx_thread_get_mask(&after), NX_OK);
    NX_CHECK(memcmp(&before, &after, sizeof before) == 0);
    NX_CHECK_EQ(nx_thread_bind(1024), NX_E_INVALID);
    NX_CHECK_EQ(nx_thread_bind(1023), NX_E_IO); /* no machine of ours has as many */
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(a_model_keeps_its_processors),
        NX_TEST(a_thread_is_bound_and_free_again),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
