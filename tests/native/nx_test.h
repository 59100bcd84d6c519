/*
 * nx_test.h: a test harness in one header, without dependencies.
 *
 * A test is a function without arguments; NX_CHECK stops the program at the first broken promise
 * and says where, since what follows a broken invariant tells nothing. nx_test_main runs all tests,
 * or those whose name contains one of the arguments.
 */
#ifndef NX_TEST_H
#define NX_TEST_H

#include <inttypes.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct nx_test {
    const char *name;
    void (*run)(void);
} nx_test;

#define NX_TEST(function) {#function, function}

/* What the running test is about just now, printed when it fails: engine, mode, seed. */
static char nx_test_context[256];

__attribute__((format(printf, 1, 2), unused)) static void nx_test_about(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(nx_test_context, sizeof nx_test_context, format, args);
    va_end(args);
}

__attribute__((noreturn, unused)) static void
nx_test_fail(const char *file, int line, const char *what, int64_t seen, int64_t wanted) {
    fprintf(stderr, "%s:%d: %s: %" PRId64 ", not %" PRId64 " [%s]\n", file, line, what, seen,
            wanted, nx_test_context);
    exit(1);
}

#define NX_CHECK(condition)                                                   \
    do {                                                                      \
        if (!(condition)) nx_test_fail(__FILE__, __LINE__, #condition, 0, 1); \
    } while (0)

#define NX_CHECK_EQ(seen, wanted)                                                      \
    do {                                                                               \
        int64_t seen_ = (int64_t)(seen), wanted_ = (int64_t)(wanted);                  \
        if (seen_ != wanted_) nx_test_fail(__FILE__, __LINE__, #seen, seen_, wanted_); \
    } while (0)

/* splitmix64 */
__attribute__((unused)) static uint64_t nx_test_random(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

__attribute__((unused)) static int nx_test_main(const nx_test *tests, size_t n, int argc,
                                                char **argv) {
    size_t n_run = 0;
    for (size_t i = 0; i < n; i++) {
        int chosen = argc < 2;
        for (int a = 1; a < argc; a++) chosen |= strstr(tests[i].name, argv[a]) != NULL;
        if (!chosen) continue;
        nx_test_about("%s", "");
        printf("  %s\n", tests[i].name);
        fflush(stdout);
        tests[i].run();
        n_run++;
    }
    printf("%zu tests passed\n", n_run);
    return n_run > 0 ? 0 : 1;
}

#endif
