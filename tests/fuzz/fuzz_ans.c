/* fuzz_ans.c: any bytes to the decoder, by every path; and any bytes there and back.
 *
 *   clang -fsanitize=fuzzer,address,undefined ... fuzz_ans.c       with libFuzzer
 *   run.sh                                                         with whatever compiler there is
 *
 * The first two bytes of the input choose what is done and the decoded size.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nexus_codec.h"

#define MAX_RAW 70000u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void demand(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "fuzz_ans: %s\n", what);
    abort();
}

static void decode_anything(const uint8_t *data, size_t n, size_t raw_bytes) {
    static uint8_t first[MAX_RAW], out[MAX_RAW];
    nx_status status = nx_ans_decode_by(NX_ANS_PORTABLE, data, n, first, raw_bytes);
    demand(status == NX_OK || status == NX_E_INVALID, "an unknown status");
    for (int path = 1; path < NX_ANS_PATHS; path++) {
        if (!nx_ans_has((nx_ans_path)path)) continue;
        nx_status other = nx_ans_decode_by((nx_ans_path)path, data, n, out, raw_bytes);
        demand(other == status, "paths that do not agree whether it decodes");
        if (status == NX_OK) demand(!memcmp(first, out, raw_bytes), "paths that decode differently");
    }
}

static void there_and_back(uint8_t kind, const uint8_t *data, size_t n) {
    static const nx_ans_layout layouts[] = {
        {0, 1, 1, {0}, {1}},           {2, 2, 2, {1, 0}, {1, 1}}, {4, 4, 4, {3, 2, 1, 0}, {1, 1, 1, 1}},
        {0, 34, 3, {0, 1, 2}, {1, 1, 32}}, {4, 8, 2, {4, 0}, {4, 4}},
    };
    static uint8_t stored[MAX_RAW + 1024], out[MAX_RAW];
    size_t used = 0;
    if (n > MAX_RAW) n = MAX_RAW;
    const nx_ans_layout *layout = &layouts[kind % (sizeof layouts / sizeof *layouts)];
    demand(nx_ans_encode(layout, data, n, stored, sizeof stored, &used) == NX_OK, "not encoded");
    for (int path = 0; path < NX_ANS_PATHS; path++) {
        if (!nx_ans_has((nx_ans_path)path)) continue;
        demand(nx_ans_decode_by((nx_ans_path)path, stored, used, out, n) == NX_OK, "not decoded");
        demand(!memcmp(out, data, n), "decoded to something else");
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    if (n < 3) return 0;
    uint8_t kind = data[0];
    data += 1;
    n -= 1;
    if (kind < 64) {
        there_and_back(kind, data, n);
    } else {
        /* The size that the bytes themselves name comes first: others are refused at once. */
        size_t raw_bytes = n >= 8 ? (size_t)data[4] | (size_t)data[5] << 8 | (size_t)data[6] << 16 : 0;
        /* A copy of the exact size, so that a read too far is seen. */
        uint8_t *copy = malloc(n);
        if (!copy) return 0;
        memcpy(copy, data, n);
        decode_anything(copy, n, raw_bytes % (MAX_RAW + 1));
        free(copy);
    }
    return 0;
}
