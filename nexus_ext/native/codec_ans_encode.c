/* codec_ans_encode.c: weights to fewer bytes. See formats/SPEC.md, "ans".
 *
 * Each plane is looked at by itself: one value, worth coding, or kept as it is. Symbols are encoded
 * from the last to the first, so that the decoder meets them in order.
 */
#include "codec_ans.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void store16(uint8_t *p, uint32_t value) {
    p[0] = (uint8_t)value;
    p[1] = (uint8_t)(value >> 8);
}

static void store32(uint8_t *p, uint32_t value) {
    store16(p, value);
    store16(p + 2, value >> 16);
}

size_t nx_ans_bound(size_t raw_bytes) {
    return ANS_HEAD + NX_ANS_MAX_PLANES * ANS_PLANE + raw_bytes;
}

static int is_valid(const nx_ans_layout *l) {
    uint8_t covered[256] = {0};
    unsigned n_covered = 0;
    if (!l->block || !l->n_planes || l->n_planes > NX_ANS_MAX_PLANES) return 0;
    if (l->rotate && ((l->rotate != 2 && l->rotate != 4) || l->block % l->rotate)) return 0;
    for (unsigned i = 0; i < l->n_planes; i++) {
        if (!l->width[i] || (unsigned)l->offset[i] + l->width[i] > l->block) return 0;
        for (unsigned b = l->offset[i]; b < (unsigned)l->offset[i] + l->width[i]; b++) {
            if (covered[b]++) return 0;
            n_covered++;
        }
    }
    return n_covered == l->block;
}

/* Copy with every word of `rotate` bytes rotated to the left by one bit. */
static void rotate_words(uint8_t *out, const uint8_t *raw, size_t n_bytes, unsigned rotate) {
    memcpy(out, raw, n_bytes);
    if (rotate == 2) {
        for (size_t i = 0; i + 2 <= n_bytes; i += 2) {
            uint32_t word = ans_load16(raw + i);
            store16(out + i, word << 1 | word >> 15);
        }
    } else if (rotate == 4) {
        for (size_t i = 0; i + 4 <= n_bytes; i += 4) {
            uint32_t word = ans_load32(raw + i);
            store32(out + i, word << 1 | word >> 31);
        }
    }
}

static void take_plane(uint8_t *out, const uint8_t *from, size_t n, size_t block, size_t width) {
    if (width == 1) {
        for (size_t i = 0; i < n; i++) out[i] = from[i * block];
        return;
    }
    for (size_t i = 0; i < n; i++) memcpy(out + i * width, from + i * block, width);
}

static void count(const uint8_t *data, size_t n, uint32_t total[256]) {
    /* Four tables: equal neighbours would wait for each other. */
    static const size_t ways = 4;
    uint32_t counts[4][256] = {{0}};
    size_t i = 0;
    for (; i + ways <= n; i += ways) {
        for (size_t w = 0; w < ways; w++) counts[w][data[i + w]]++;
    }
    for (; i < n; i++) counts[0][data[i]]++;
    for (unsigned s = 0; s < 256; s++) {
        total[s] = counts[0][s] + counts[1][s] + counts[2][s] + counts[3][s];
    }
}

/* Scale counts to a sum of ANS_SCALE in which every symbol that occurs has a part. */
static void scale(const uint32_t counts[256], size_t n, uint32_t frequency[256]) {
    uint32_t sum = 0;
    for (unsigned s = 0; s < 256; s++) {
        frequency[s] = 0;
        if (!counts[s]) continue;
        uint64_t part = ((uint64_t)counts[s] * ANS_SCALE + n / 2) / n;
        frequency[s] = part ? (uint32_t)part : 1;
        sum += frequency[s];
    }
    while (sum != ANS_SCALE) {
        unsigned largest = 0;
        for (unsigned s = 1; s < 256; s++) {
            if (frequency[s] > frequency[largest]) largest = s;
        }
        /* A quarter of the largest at most, so that none is bent out of shape. */
        uint32_t room = frequency[largest] / 4 + 1;
        uint32_t off = sum > ANS_SCALE ? sum - ANS_SCALE : ANS_SCALE - sum;
        uint32_t change = off < room ? off : room;
        frequency[largest] += sum > ANS_SCALE ? 0u - change : change;
        sum += sum > ANS_SCALE ? 0u - change : change;
    }
}

/* What coding would take, without the words that rounding costs. */
static double coded_bytes(const uint32_t counts[256], const uint32_t frequency[256]) {
    double bits = 0;
    unsigned n_symbols = 0;
    for (unsigned s = 0; s < 256; s++) {
        if (!counts[s]) continue;
        bits += counts[s] * (ANS_SCALE_BITS - log2(frequency[s]));
        n_symbols++;
    }
    return bits / 8 + 32 + 2 * n_symbols + 4 * ANS_LANES;
}

/* Encode a plane at `out`; 0 if that takes more than `capacity` bytes. */
static size_t encode_plane(const uint8_t *data, size_t n, const uint32_t frequency[256], uint8_t *out,
                           size_t capacity) {
    uint32_t state[ANS_LANES], start[256], sum = 0;
    uint8_t *p = out;
    if (capacity < 32 + 2 * 256 + 4 * ANS_LANES) return 0;
    memset(p, 0, 32);
    p += 32;
    for (unsigned s = 0; s < 256; s++) {
        start[s] = sum;
        if (!frequency[s]) continue;
        sum += frequency[s];
        out[s / 8] |= (uint8_t)(1u << s % 8);
        store16(p, frequency[s] - 1);
        p += 2;
    }
    /* Words are found from the last to the first: they go to the end of the room and move down. */
    uint8_t *first = p + 4 * ANS_LANES, *words = out + capacity - (size_t)(out + capacity - first) % 2;
    uint8_t *end = words;
    for (unsigned lane = 0; lane < ANS_LANES; lane++) state[lane] = ANS_LOW;
    for (size_t i = n; i-- > 0;) {
        uint32_t x = state[i % ANS_LANES], f = frequency[data[i]];
        if (x >= (uint64_t)f << (32 - ANS_SCALE_BITS)) {
            if (words == first) return 0;
            words -= 2;
            store16(words, x);
            x >>= 16;
        }
        state[i % ANS_LANES] = (x / f << ANS_SCALE_BITS) + x % f + start[data[i]];
    }
    for (unsigned lane = 0; lane < ANS_LANES; lane++) store32(p + 4 * lane, state[lane]);
    memmove(first, words, (size_t)(end - words));
    return (size_t)(first - out) + (size_t)(end - words);
}

nx_status nx_ans_encode(const nx_ans_layout *layout, const void *raw, size_t raw_bytes, void *out,
                        size_t capacity, size_t *out_bytes) {
    if (!layout || !out || !out_bytes || (!raw && raw_bytes) || !is_valid(layout) ||
        raw_bytes > NX_ANS_MAX_BYTES || capacity < nx_ans_bound(raw_bytes)) {
        return NX_E_INVALID;
    }
    size_t block = layout->block, n_blocks = raw_bytes / block, tail = raw_bytes % block;
    uint8_t *rotated = malloc(raw_bytes + 1), *symbols = malloc(n_blocks * block + 1);
    if (!rotated || !symbols) {
        free(rotated);
        free(symbols);
        return NX_E_NOMEM;
    }
    rotate_words(rotated, raw, n_blocks * block, layout->rotate);
    uint8_t *head = out, *at = head + ANS_HEAD + (size_t)layout->n_planes * ANS_PLANE;
    head[0] = ANS_VERSION;
    head[1] = layout->rotate;
    head[2] = layout->block;
    head[3] = layout->n_planes;
    store32(head + 4, (uint32_t)raw_bytes);
    for (unsigned i = 0; i < layout->n_planes; i++) {
        size_t n = n_blocks * layout->width[i], n_bytes = n;
        uint32_t counts[256], frequency[256];
        uint8_t mode = ANS_MODE_RAW, value = 0;
        take_plane(symbols, rotated + layout->offset[i], n_blocks, block, layout->width[i]);
        count(symbols, n, counts);
        if (n && counts[symbols[0]] == n) {
            mode = ANS_MODE_VALUE;
            value = symbols[0];
            n_bytes = 0;
        } else if (n) {
            scale(counts, n, frequency);
            if (coded_bytes(counts, frequency) < 0.99 * (double)n) {
                size_t coded = encode_plane(symbols, n, frequency, at, n);
                if (coded) {
                    mode = ANS_MODE_CODED;
                    n_bytes = coded;
                }
            }
        }
        if (mode == ANS_MODE_RAW) memcpy(at, symbols, n);
        uint8_t *p = head + ANS_HEAD + i * ANS_PLANE;
        p[0] = layout->offset[i];
        p[1] = layout->width[i];
        p[2] = mode;
        p[3] = value;
        store32(p + 4, (uint32_t)n_bytes);
        store32(p + 8, 0);
        at += n_bytes;
    }
    if (tail) memcpy(at, (const uint8_t *)raw + n_blocks * block, tail);
    *out_bytes = (size_t)(at + tail - head);
    free(rotated);
    free(symbols);
    return NX_OK;
}
