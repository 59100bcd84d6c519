/* Does the bandwidth measurement read every byte with every thread, and give everything back? */
#include "nexus_membench.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "nx_test.h"

#define MIB ((uint64_t)1 << 20)

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED
#endif
#endif

/* Each thread fills its part with a sequence of its own; see fill() in membench.c. */
static uint64_t expected_checksum(uint32_t n_threads, uint64_t part_bytes) {
    uint64_t sum = 0;
    for (uint32_t thread = 0; thread < n_threads; thread++) {
        uint64_t value = thread + 1;
        for (uint64_t i = 0; i < part_bytes / sizeof(value); i++) {
            value += 0x9e3779b97f4a7c15u;
            sum += value ^ (value >> 29);
        }
    }
    return sum;
}

static void every_byte_is_read_by_any_number_of_threads(void) {
    const uint32_t threads[] = {1, 2, 3, 8};
    const uint64_t sizes[] = {1, 4096, 100000, MIB, 5 * MIB + 12345};
    for (size_t t = 0; t < sizeof threads / sizeof threads[0]; t++) {
        for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
            nx_test_about("%" PRIu32 " threads, %" PRIu64 " bytes", threads[t], sizes[s]);
            const nx_membench_options options = {
                .n_threads = threads[t], .buffer_bytes = sizes[s], .max_ns = 1};
            nx_membench_result result;
            NX_CHECK_EQ(nx_membench_read(&options, &result), NX_OK);
            NX_CHECK_EQ(result.n_threads, threads[t]);
            NX_CHECK_EQ(result.buffer_bytes % threads[t], 0);
            const uint64_t part_bytes = result.buffer_bytes / threads[t];
            const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
            NX_CHECK_EQ(part_bytes % page, 0);
            /* Never more than was allowed, but for the one page that each thread needs. */
            NX_CHECK(result.buffer_bytes <= sizes[s] || part_bytes == page);
            NX_CHECK_EQ(result.checksum, expected_checksum(threads[t], part_bytes));
        }
    }
}

static void a_result_adds_up(void) {
    const nx_membench_options options = {.n_threads = 2, .buffer_bytes = 8 * MIB, .max_ns = 1};
    nx_membench_result result;
    NX_CHECK_EQ(nx_membench_read(&options, &result), NX_OK);
    NX_CHECK_EQ(result.n_passes, 3); /* however little time there is */
    NX_CHECK_EQ(result.bytes % result.buffer_bytes, 0);
    NX_CHECK(result.bytes >= result.n_passes * result.buffer_bytes);
    NX_CHECK(result.ns > 0);
    NX_CHECK(result.bytes_s > 0);
}

static void defaults_use_the_cpus_of_this_process(void) {
    nx_membench_result result;
    NX_CHECK_EQ(nx_membench_read(NULL, &result), NX_OK);
    NX_CHECK(result.n_threads >= 1);
    NX_CHECK(result.buffer_bytes <= 256 * MIB);
    NX_CHECK(result.n_passes >= 3);
}

static void what_cannot_be_is_refused_and_the_result_is_zero(void) {
    nx_membench_result result, zero;
    memset(&zero, 0, sizeof zero);
    const nx_membench_options many = {.n_threads = NX_MEMBENCH_MAX_THREADS + 1};
    memset(&result, 0xff, sizeof result);
    NX_CHECK_EQ(nx_membench_read(&many, &result), NX_E_INVALID);
    NX_CHECK(memcmp(&result, &zero, sizeof result) == 0);
    NX_CHECK_EQ(nx_membench_read(NULL, NULL), NX_E_INVALID);

    const uint64_t sizes[] = {(uint64_t)1 << 60, UINT64_MAX};
    for (size_t i = 0; i < 2; i++) {
        const nx_membench_options huge = {.n_threads = 1, .buffer_bytes = sizes[i]};
        memset(&result, 0xff, sizeof result);
        NX_CHECK_EQ(nx_membench_read(&huge, &result), NX_E_NOMEM);
        NX_CHECK(memcmp(&result, &zero, sizeof result) == 0);
    }
}

#ifndef SANITIZED
/* In a child: the limit on address space stays with a process. (Sanitizers need terabytes of it.) */
static void too_few_threads_end_those_that_run(void) {
    const pid_t child = fork();
    if (child == 0) {
        const struct rlimit limit = {256 * MIB, 256 * MIB};
        const nx_membench_options options = {
            .n_threads = NX_MEMBENCH_MAX_THREADS, .buffer_bytes = 4 * MIB, .max_ns = 1};
        nx_membench_result result;
        if (setrlimit(RLIMIT_AS, &limit) != 0) _exit(2);
        _exit(nx_membench_read(&options, &result) == NX_E_NOMEM && result.n_threads == 0 ? 0 : 1);
    }
    NX_CHECK(child > 0);
    int status = -1;
    NX_CHECK_EQ(waitpid(child, &status, 0), child);
    NX_CHECK(WIFEXITED(status));
    NX_CHECK_EQ(WEXITSTATUS(status), 0);
}
#endif

int main(int argc, char **argv) {
    const nx_test tests[] = {
        NX_TEST(every_byte_is_read_by_any_number_of_threads),
        NX_TEST(a_result_adds_up),
        NX_TEST(defaults_use_the_cpus_of_this_process),
        NX_TEST(what_cannot_be_is_refused_and_the_result_is_zero),
#ifndef SANITIZED
        NX_TEST(too_few_threads_end_those_that_run),
#endif
    };
    return nx_test_main(tests, sizeof tests / sizeof tests[0], argc, argv);
}
