/* xxh3.c: XXH3-64 with seed 0, after its specification (xxhash.com, doc/xxhash_spec.md).
 *
 * Long inputs are read as stripes of 64 bytes into eight sums that do not depend on each other,
 * which the compiler turns into vector instructions.
 */
#include "nexus_codec.h"

#include <string.h>

#define P32_1 0x9E3779B1u
#define P32_2 0x85EBCA77u
#define P32_3 0xC2B2AE3Du
#define P64_1 0x9E3779B185EBCA87u
#define P64_2 0xC2B2AE3D27D4EB4Fu
#define P64_3 0x165667B19E3779F9u
#define P64_4 0x85EBCA77C2B2AE63u
#define P64_5 0x27D4EB2F165667C5u
#define PRIME_MX1 0x165667919E3779F9u
#define PRIME_MX2 0x9FB21C651E98DF25u

#define STRIPE 64u
#define SECRET_BYTES 192u
#define PER_BLOCK ((SECRET_BYTES - STRIPE) / 8) /* stripes, after which the sums are scrambled */

/* The default secret: part of the definition. */
static const uint8_t secret[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static uint32_t get32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline uint64_t get64(const uint8_t *p) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    uint64_t value;
    memcpy(&value, p, 8);
    return value;
#else
    return get32(p) | (uint64_t)get32(p + 4) << 32;
#endif
}

static uint64_t swap64(uint64_t x) {
    uint64_t y = 0;
    for (unsigned i = 0; i < 8; i++) y = y << 8 | (x >> 8 * i & 0xFF);
    return y;
}

static uint64_t rotl64(uint64_t x, unsigned n) { return x << n | x >> (64 - n); }

/* Product of 128 bits, its halves folded. */
static uint64_t fold(uint64_t a, uint64_t b) {
    uint64_t al = (uint32_t)a, ah = a >> 32, bl = (uint32_t)b, bh = b >> 32;
    uint64_t low = al * bl, cross = ah * bl + (low >> 32), other = al * bh + (uint32_t)cross;
    uint64_t high = ah * bh + (cross >> 32) + (other >> 32);
    return (other << 32 | (uint32_t)low) ^ high;
}

static uint64_t avalanche(uint64_t h) {
    h ^= h >> 37;
    h *= PRIME_MX1;
    return h ^ h >> 32;
}

static uint64_t avalanche_xxh64(uint64_t h) {
    h ^= h >> 33;
    h *= P64_2;
    h ^= h >> 29;
    h *= P64_3;
    return h ^ h >> 32;
}

static uint64_t mix16(const uint8_t *p, const uint8_t *key) {
    return fold(get64(p) ^ get64(key), get64(p + 8) ^ get64(key + 8));
}

static uint64_t up_to_16(const uint8_t *p, size_t n) {
    if (n > 8) {
        uint64_t low = get64(p) ^ (get64(secret + 24) ^ get64(secret + 32));
        uint64_t high = get64(p + n - 8) ^ (get64(secret + 40) ^ get64(secret + 48));
        return avalanche(n + swap64(low) + high + fold(low, high));
    }
    if (n >= 4) {
        uint64_t both = get32(p + n - 4) + ((uint64_t)get32(p) << 32);
        uint64_t h = both ^ (get64(secret + 8) ^ get64(secret + 16));
        h ^= rotl64(h, 49) ^ rotl64(h, 24);
        h *= PRIME_MX2;
        h ^= (h >> 35) + n;
        h *= PRIME_MX2;
        return h ^ h >> 28;
    }
    if (n) {
        uint32_t both = (uint32_t)p[0] << 16 | (uint32_t)p[n >> 1] << 24 | p[n - 1] | (uint32_t)n << 8;
        return avalanche_xxh64(both ^ (uint64_t)(get32(secret) ^ get32(secret + 4)));
    }
    return avalanche_xxh64(get64(secret + 56) ^ get64(secret + 64));
}

static uint64_t up_to_240(const uint8_t *p, size_t n) {
    uint64_t h = n * P64_1;
    if (n <= 128) {
        for (size_t i = (n - 1) / 32 + 1; i-- > 0;) {
            h += mix16(p + 16 * i, secret + 32 * i);
            h += mix16(p + n - 16 * (i + 1), secret + 32 * i + 16);
        }
        return avalanche(h);
    }
    size_t rounds = n / 16;
    for (size_t i = 0; i < 8; i++) h += mix16(p + 16 * i, secret + 16 * i);
    h = avalanche(h);
    for (size_t i = 8; i < rounds; i++) h += mix16(p + 16 * i, secret + 16 * (i - 8) + 3);
    h += mix16(p + n - 16, secret + 136 - 17);
    return avalanche(h);
}

#define ACCUMULATE_BODY                                                                             \
    for (size_t s = 0; s < n_stripes; s++) {                                                        \
        const uint8_t *in = p + s * STRIPE, *k = key + 8 * s;                                       \
        uint64_t value[8], keyed[8];                                                                \
        for (unsigned i = 0; i < 8; i++) value[i] = get64(in + 8 * i);                              \
        for (unsigned i = 0; i < 8; i++) keyed[i] = value[i] ^ get64(k + 8 * i);                    \
        for (unsigned i = 0; i < 8; i++) {                                                          \
            sum[i] += value[i ^ 1] + (keyed[i] & 0xFFFFFFFFu) * (keyed[i] >> 32);                   \
        }                                                                                           \
    }

typedef void (*accumulate)(uint64_t sum[8], const uint8_t *p, const uint8_t *key, size_t n_stripes);

static void accumulate_plain(uint64_t sum[8], const uint8_t *p, const uint8_t *key, size_t n_stripes) {
    ACCUMULATE_BODY
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void accumulate_avx2(uint64_t sum[8], const uint8_t *p,
                                                            const uint8_t *key, size_t n_stripes) {
    ACCUMULATE_BODY
}
__attribute__((target("avx512f,avx512dq,prefer-vector-width=512"))) static void
accumulate_avx512(uint64_t sum[8], const uint8_t *p, const uint8_t *key, size_t n_stripes) {
    ACCUMULATE_BODY
}
#endif

static accumulate best(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return accumulate_avx512;
    if (__builtin_cpu_supports("avx2")) return accumulate_avx2;
#endif
    return accumulate_plain;
}

static uint64_t long_input(const uint8_t *p, size_t n) {
    accumulate add = best();
    uint64_t sum[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    size_t block_bytes = PER_BLOCK * STRIPE, n_blocks = (n - 1) / block_bytes;
    for (size_t b = 0; b < n_blocks; b++) {
        add(sum, p + b * block_bytes, secret, PER_BLOCK);
        for (unsigned i = 0; i < 8; i++) {
            sum[i] ^= sum[i] >> 47;
            sum[i] ^= get64(secret + SECRET_BYTES - STRIPE + 8 * i);
            sum[i] *= P32_1;
        }
    }
    size_t left = n - 1 - n_blocks * block_bytes;
    add(sum, p + n_blocks * block_bytes, secret, left / STRIPE);
    add(sum, p + n - STRIPE, secret + SECRET_BYTES - STRIPE - 7, 1);
    uint64_t h = n * P64_1;
    for (unsigned i = 0; i < 4; i++) {
        const uint8_t *key = secret + 11 + 16 * i;
        h += fold(sum[2 * i] ^ get64(key), sum[2 * i + 1] ^ get64(key + 8));
    }
    return avalanche(h);
}

uint64_t nx_xxh3_64(const void *data, size_t n_bytes) {
    if (n_bytes <= 16) return up_to_16(data, n_bytes);
    if (n_bytes <= 240) return up_to_240(data, n_bytes);
    return long_input(data, n_bytes);
}
