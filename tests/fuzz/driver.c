/* driver.c: a plain stand-in for libFuzzer, for compilers that do not have it.
 *
 *   driver SECONDS [SEED]          try inputs for so long
 *   driver --inputs N DIRECTORY    write N of them there, for libFuzzer to begin with
 *
 * Makes inputs by encoding structured bytes and changing a few of them, so that most get past the
 * first checks; it has no feedback of coverage. A crash ends it, and the input is in crash.bin.
 */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "nexus_codec.h"

#define MAX_INPUT 80000u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static uint8_t input[MAX_INPUT];
static size_t input_bytes;
static uint64_t state;

static uint32_t dice(uint32_t n) {
    state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return n ? (uint32_t)(state >> 33) % n : 0;
}

static void keep(int signal_number) {
    FILE *file = fopen("crash.bin", "wb");
    if (file) {
        fwrite(input, 1, input_bytes, file);
        fclose(file);
    }
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

static size_t some_bytes(uint8_t *out, size_t most) {
    size_t n = dice(2) ? dice((uint32_t)most) : dice(300);
    uint32_t kind = dice(4), spread = 1 + dice(255);
    for (size_t i = 0; i < n; i++) {
        uint32_t r = dice(1u << 30);
        uint32_t few = (uint32_t)__builtin_ctz(r | 256u);
        out[i] = (uint8_t)(kind == 0 ? r : kind == 1 ? r % spread : kind == 2 ? few : 9u);
    }
    return n;
}

static void make_input(void) {
    static uint8_t raw[40000];
    static const uint8_t blocks[] = {1, 2, 4, 18, 34, 144, 255};
    if (!dice(4)) {
        input[0] = (uint8_t)dice(256);
        input_bytes = 1 + some_bytes(input + 1, 20000);
        return;
    }
    nx_ans_layout layout = {0};
    layout.block = blocks[dice(sizeof blocks)];
    layout.rotate = layout.block == 2 ? 2 : layout.block == 4 ? (uint8_t)(2 * dice(3)) : 0;
    for (unsigned at = 0; at < layout.block;) {
        unsigned i = layout.n_planes++, width = 1 + dice(layout.block - at);
        if (i == NX_ANS_MAX_PLANES - 1) width = layout.block - at;
        layout.offset[i] = (uint8_t)at;
        layout.width[i] = (uint8_t)width;
        at += width;
    }
    size_t n = some_bytes(raw, sizeof raw), used = 0;
    input[0] = 255;
    if (nx_ans_encode(&layout, raw, n, input + 1, MAX_INPUT - 1, &used) != NX_OK) abort();
    for (uint32_t changes = dice(5); changes-- > 0;) {
        size_t range = dice(3) && used > 600 ? 600 : used;
        uint8_t *p = input + 1 + dice((uint32_t)range);
        *p = dice(2) ? (uint8_t)(*p ^ 1u << dice(8)) : (uint8_t)dice(256);
    }
    if (!dice(6)) used = dice((uint32_t)used + 1);
    input_bytes = 1 + used;
}

static int write_inputs(unsigned long n, const char *directory) {
    state = 1;
    for (unsigned long i = 0; i < n; i++) {
        char path[4096];
        make_input();
        snprintf(path, sizeof path, "%s/%lu", directory, i);
        FILE *file = fopen(path, "wb");
        if (!file || fwrite(input, 1, input_bytes, file) != input_bytes || fclose(file) != 0) {
            perror(path);
            return 1;
        }
    }
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 4 && strcmp(argv[1], "--inputs") == 0) return write_inputs(strtoul(argv[2], NULL, 10), argv[3]);
    double seconds = argc > 1 ? atof(argv[1]) : 10;
    state = argc > 2 ? strtoull(argv[2], NULL, 10) : (uint64_t)time(NULL);
    uint64_t first = state, runs = 0;
    signal(SIGABRT, keep);
    signal(SIGSEGV, keep);
    time_t end = time(NULL) + (time_t)seconds;
    while (time(NULL) < end) {
        for (int i = 0; i < 100; i++, runs++) {
            make_input();
            LLVMFuzzerTestOneInput(input, input_bytes);
        }
    }
    printf("%llu inputs, seed %llu: nothing found\n", (unsigned long long)runs, (unsigned long long)first);
    return 0;
}
