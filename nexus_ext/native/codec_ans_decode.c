/* codec_ans_decode.c: bytes that anyone may have written, to weights. See formats/SPEC.md, "ans".
 *
 * Planes are decoded some thousand symbols at a time into a buffer that stays in the first cache,
 * and put together from there. Everything that is read from `stored` is compared with what is left
 * of it first.
 */
#include "codec_ans.h"

#include <stdlib.h>
#include <string.h>

/* Of one plane and segment. A segment is a multiple of ANS_LANES blocks, so that it ends a round in
 * every plane. */
#define SEGMENT_BYTES 16384u

typedef struct plane {
    uint8_t offset, width, mode, value;
    const uint8_t *data; /* ANS_MODE_RAW: what was not used yet */
    ans_stream stream;   /* ANS_MODE_CODED */
} plane;

/* Fill `s` from the data of a coded plane. */
static int open_stream(ans_stream *s, const uint8_t *data, size_t n_bytes) {
    if (n_bytes < 32) return 0;
    const uint8_t *bitmap = data, *p = data + 32, *end = data + n_bytes;
    unsigned start = 0, n_symbols = 0;
    for (unsigned symbol = 0; symbol < 256; symbol++) {
        if (!(bitmap[symbol / 8] >> (symbol % 8) & 1)) continue;
        if (end - p < 2) return 0;
        unsigned frequency = ans_load16(p) + 1;
        p += 2;
        if (frequency > ANS_SCALE - start) return 0;
        for (unsigned i = 0; i < frequency; i++) {
            s->slot[start + i] = i << 20 | (frequency & (ANS_SCALE - 1)) << 8 | symbol;
        }
        start += frequency;
        n_symbols++;
    }
    /* With one symbol its frequency would be ANS_SCALE, which has no room in a slot. */
    if (start != ANS_SCALE || n_symbols < 2) return 0;
    if ((size_t)(end - p) < 4 * ANS_LANES || (end - p) % 2) return 0;
    for (unsigned lane = 0; lane < ANS_LANES; lane++, p += 4) {
        s->state[lane] = ans_load32(p);
        if (s->state[lane] < ANS_LOW) return 0;
    }
    s->words = p;
    s->end = end;
    return 1;
}

/* Decode n symbols, lane after lane from the first on; 0 when words are missing. */
static int decode_carefully(ans_stream *s, uint8_t *out, size_t n) {
    const uint8_t *words = s->words, *end = s->end;
    for (size_t i = 0; i < n; i++) {
        uint32_t x = s->state[i % ANS_LANES], slot = s->slot[x & (ANS_SCALE - 1)];
        out[i] = ans_symbol(slot);
        x = ans_step(x, slot);
        if (x < ANS_LOW) {
            if (words == end) return 0;
            x = x << 16 | ans_load16(words);
            words += 2;
        }
        s->state[i % ANS_LANES] = x;
    }
    s->words = words;
    return 1;
}

/* The same for any machine, without a test for the end in every step, and without a branch: which lanes
 * take a word is as good as random. Compilers make a branch of a choice, so it is written as a mask. */
static size_t rounds_portable(ans_stream *s, uint8_t *restrict out, size_t n_rounds) {
    const uint32_t *restrict table = s->slot;
    const uint8_t *words = s->words;
    uint32_t state[ANS_LANES];
    memcpy(state, s->state, sizeof state);
    size_t round = 0;
    for (; round < n_rounds && (size_t)(s->end - words) >= 2 * ANS_LANES; round++) {
#pragma GCC unroll 8
        for (unsigned lane = 0; lane < ANS_LANES; lane++) {
            uint32_t x = state[lane], slot = table[x & (ANS_SCALE - 1)];
            out[lane] = ans_symbol(slot);
            x = ans_step(x, slot);
            const uint32_t below = 0u - (x < ANS_LOW), longer = x << 16 | ans_load16(words);
            state[lane] = x ^ ((x ^ longer) & below);
            words += 2 & below;
        }
        out += ANS_LANES;
    }
    memcpy(s->state, state, sizeof state);
    s->words = words;
    return round;
}

static int decode_symbols(ans_stream *s, ans_rounds rounds, uint8_t *out, size_t n) {
    size_t done = 0;
    if ((size_t)(s->end - s->words) >= 2 * ANS_LANES) {
        done = ANS_LANES * rounds(s, out, n / ANS_LANES);
    }
    return decode_carefully(s, out + done, n - done);
}

static int is_finished(const ans_stream *s) {
    if (s->words != s->end) return 0;
    for (unsigned lane = 0; lane < ANS_LANES; lane++) {
        if (s->state[lane] != ANS_LOW) return 0;
    }
    return 1;
}

/* Two bytes, rotated back to the right by one bit. */
static void join_words(uint8_t *out, const uint8_t *low, const uint8_t *high, size_t n, int rotate) {
    if (rotate) {
        for (size_t i = 0; i < n; i++) {
            uint16_t word = (uint16_t)(high[i] << 8 | low[i]);
            word = (uint16_t)(word >> 1 | word << 15);
            memcpy(out + 2 * i, &word, 2);
        }
    } else {
        for (size_t i = 0; i < n; i++) {
            uint16_t word = (uint16_t)(high[i] << 8 | low[i]);
            memcpy(out + 2 * i, &word, 2);
        }
    }
}

static void join_long_words(uint8_t *out, const uint8_t *const part[4], size_t n, int rotate) {
    for (size_t i = 0; i < n; i++) {
        uint32_t word = (uint32_t)part[0][i] | (uint32_t)part[1][i] << 8 | (uint32_t)part[2][i] << 16 |
                        (uint32_t)part[3][i] << 24;
        if (rotate) word = word >> 1 | word << 31;
        memcpy(out + 4 * i, &word, 4);
    }
}

static void put_plane(uint8_t *out, const uint8_t *from, size_t n, size_t block, size_t width) {
    /* Widths that blocks of ggml have, so that the compiler knows them. */
    switch (width) {
#define FIXED(w)                                                                                    \
    case w:                                                                                         \
        for (size_t i = 0; i < n; i++) memcpy(out + i * block, from + i * w, w);                    \
        return;
        FIXED(1) FIXED(2) FIXED(4) FIXED(12) FIXED(16) FIXED(32) FIXED(64) FIXED(128)
#undef FIXED
    default:
        for (size_t i = 0; i < n; i++) memcpy(out + i * block, from + i * width, width);
    }
}

static void rotate_back(uint8_t *out, size_t n_bytes, unsigned rotate) {
    if (rotate == 2) {
        for (size_t i = 0; i + 2 <= n_bytes; i += 2) {
            uint32_t word = ans_load16(out + i);
            word = word >> 1 | word << 15;
            out[i] = (uint8_t)word;
            out[i + 1] = (uint8_t)(word >> 8);
        }
    } else if (rotate == 4) {
        for (size_t i = 0; i + 4 <= n_bytes; i += 4) {
            uint32_t word = ans_load32(out + i);
            word = word >> 1 | word << 31;
            for (unsigned b = 0; b < 4; b++) out[i + b] = (uint8_t)(word >> 8 * b);
        }
    }
}

typedef struct layout {
    unsigned rotate, block, n_planes;
    size_t n_blocks, tail;
} layout;

/* Read the head: sizes, and that the planes cover a block once. */
static int read_layout(layout *l, plane *planes, const uint8_t *stored, size_t stored_bytes,
                       size_t raw_bytes) {
    if (stored_bytes < ANS_HEAD || stored[0] != ANS_VERSION || raw_bytes > NX_ANS_MAX_BYTES) return 0;
    l->rotate = stored[1];
    l->block = stored[2];
    l->n_planes = stored[3];
    if (l->rotate != 0 && l->rotate != 2 && l->rotate != 4) return 0;
    if (!l->block || (l->rotate && l->block % l->rotate)) return 0;
    if (!l->n_planes || l->n_planes > NX_ANS_MAX_PLANES || ans_load32(stored + 4) != raw_bytes) return 0;
    l->n_blocks = raw_bytes / l->block;
    l->tail = raw_bytes % l->block;
    size_t at = ANS_HEAD + (size_t)l->n_planes * ANS_PLANE;
    if (stored_bytes < at + l->tail) return 0;
    size_t left = stored_bytes - at - l->tail;
    uint8_t covered[256] = {0};
    unsigned n_covered = 0;
    for (unsigned i = 0; i < l->n_planes; i++) {
        const uint8_t *p = stored + ANS_HEAD + i * ANS_PLANE;
        size_t n_bytes = ans_load32(p + 4);
        if (ans_load32(p + 8) || !p[1] || (unsigned)p[0] + p[1] > l->block || n_bytes > left) return 0;
        for (unsigned b = p[0]; b < (unsigned)p[0] + p[1]; b++) {
            if (covered[b]++) return 0;
            n_covered++;
        }
        planes[i].offset = p[0];
        planes[i].width = p[1];
        planes[i].mode = p[2];
        planes[i].value = p[3];
        planes[i].data = stored + at;
        if (p[2] != ANS_MODE_VALUE && p[3]) return 0;
        if (p[2] == ANS_MODE_RAW) {
            if (n_bytes != l->n_blocks * p[1]) return 0;
        } else if (p[2] == ANS_MODE_VALUE) {
            if (n_bytes) return 0;
        } else if (p[2] != ANS_MODE_CODED || !open_stream(&planes[i].stream, planes[i].data, n_bytes)) {
            return 0;
        }
        at += n_bytes;
        left -= n_bytes;
    }
    return left == 0 && n_covered == l->block;
}

/* Put the planes of some blocks together, each of which lies in `parts`. */
static void join(const layout *l, const plane *planes, const uint8_t *const *parts, uint8_t *out,
                 size_t n) {
    const uint8_t *by_offset[4] = {0};
    int single = l->block == l->n_planes && (l->block == 2 || l->block == 4);
    for (unsigned i = 0; single && i < l->n_planes; i++) by_offset[planes[i].offset] = parts[i];
    if (single && l->block == 2 && l->rotate != 4) {
        join_words(out, by_offset[0], by_offset[1], n, l->rotate != 0);
    } else if (single && l->block == 4 && l->rotate != 2) {
        join_long_words(out, by_offset, n, l->rotate != 0);
    } else {
        for (unsigned i = 0; i < l->n_planes; i++) {
            put_plane(out + planes[i].offset, parts[i], n, l->block, planes[i].width);
        }
        rotate_back(out, n * l->block, l->rotate);
    }
}

static nx_status decode(ans_rounds rounds, const uint8_t *stored, size_t stored_bytes, uint8_t *out,
                        size_t raw_bytes) {
    nx_status status = NX_E_INVALID;
    layout l;
    unsigned n_planes = stored_bytes >= ANS_HEAD ? stored[3] : 0;
    if (!n_planes || n_planes > NX_ANS_MAX_PLANES) return NX_E_INVALID;
    plane *planes = malloc(n_planes * sizeof *planes);
    /* A plane is at most a block wide, so that all planes of a segment take so much. */
    uint8_t *segments = malloc(SEGMENT_BYTES + 64 * 255);
    if (!planes || !segments) {
        status = NX_E_NOMEM;
        goto done;
    }
    if (!read_layout(&l, planes, stored, stored_bytes, raw_bytes)) goto done;
    size_t step = SEGMENT_BYTES / l.block / ANS_LANES * ANS_LANES;
    if (step < ANS_LANES) step = ANS_LANES;
    for (size_t block = 0; block < l.n_blocks;) {
        size_t n = l.n_blocks - block < step ? l.n_blocks - block : step;
        const uint8_t *parts[NX_ANS_MAX_PLANES];
        uint8_t *segment = segments;
        for (unsigned i = 0; i < l.n_planes; i++) {
            plane *p = &planes[i];
            size_t n_bytes = n * p->width;
            parts[i] = segment;
            if (p->mode == ANS_MODE_RAW) {
                parts[i] = p->data;
                p->data += n_bytes;
            } else if (p->mode == ANS_MODE_VALUE) {
                memset(segment, p->value, n_bytes);
            } else if (!decode_symbols(&p->stream, rounds, segment, n_bytes)) {
                goto done;
            }
            segment += n_bytes;
        }
        join(&l, planes, parts, out + block * l.block, n);
        block += n;
    }
    for (unsigned i = 0; i < l.n_planes; i++) {
        if (planes[i].mode == ANS_MODE_CODED && !is_finished(&planes[i].stream)) goto done;
    }
    memcpy(out + l.n_blocks * l.block, stored + stored_bytes - l.tail, l.tail);
    status = NX_OK;
done:
    free(segments);
    free(planes);
    return status;
}

int nx_ans_has(nx_ans_path path) {
    switch (path) {
    case NX_ANS_PORTABLE: return 1;
#if defined(__x86_64__)
    case NX_ANS_AVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
    case NX_ANS_AVX512:
        return nx_ans_has(NX_ANS_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#elif defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    case NX_ANS_NEON: return 1;
#endif
    default: return 0;
    }
}

nx_ans_path nx_ans_best(void) {
    nx_ans_path path = NX_ANS_PATHS - 1;
    while (!nx_ans_has(path)) path--;
    return path;
}

nx_status nx_ans_decode_by(nx_ans_path path, const void *stored, size_t stored_bytes, void *out,
                           size_t raw_bytes) {
    if (!stored || (!out && raw_bytes)) return NX_E_INVALID;
    if (!nx_ans_has(path)) return NX_E_UNSUPPORTED;
    ans_rounds rounds = rounds_portable;
#if defined(__x86_64__)
    if (path == NX_ANS_AVX512) rounds = nx_ans_rounds_avx512;
    if (path == NX_ANS_AVX2) rounds = nx_ans_rounds_avx2;
#elif defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    if (path == NX_ANS_NEON) rounds = nx_ans_rounds_neon;
#endif
    return decode(rounds, stored, stored_bytes, out, raw_bytes);
}

nx_status nx_ans_decode(const void *stored, size_t stored_bytes, void *out, size_t raw_bytes) {
    return nx_ans_decode_by(nx_ans_best(), stored, stored_bytes, out, raw_bytes);
}
