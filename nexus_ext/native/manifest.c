/* manifest.c: the text that describes a model to the core, and the extents that come of it.
 *
 *   nexus-manifest 1
 *   ring BYTES | slab BYTES | scratch BYTES | virtual BYTES
 *   io direct|buffered
 *   view PATH                     (the file that the runtime opens instead: nexus_view.h)
 *   file BYTES PATH
 *   tensor TIER FILE OFFSET BYTES VIRTUAL_OFFSET NE0 NE1 NE2 NE3 TYPE NAME
 *   chunks MATRICES BYTES         (the tensor before is stored in chunks of so many bytes: chunks.h)
 *   chunk FILE OFFSET STORED_BYTES CODEC HASH        (each of them, in order; HASH in hexadecimal)
 *   verify first|always           (of chunks that are stored as they are: the hashes are compared)
 *   decoders N                    (threads that read and decode chunks)
 *   experts SLOTS TENSOR_NUMBER ...      (tensors that are cached together, counted from 0)
 *   kernels MORE_BYTES TYPE ...          (weights of these types are for our own kernels)
 *   opencl                               (and resident ones go to the OpenCL device)
 *   end N_TENSORS
 *
 * TIER is host, ram, nvme or elastic (nvme until it is promoted, see residency.c). PATH and NAME run to the end of their line. The same text serves Python
 * and a foreign runtime (through the environment), so there is one way to describe a model.
 */
#include "manifest.h"

#include "cache.h"
#include "nexus_ternary.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

typedef struct cursor {
    const char *at, *end, *text_end;
    unsigned line;
    uint32_t n_chunks; /* of the last tensor, so far */
} cursor;

static bool at_end(cursor *c) {
    while (c->at < c->end && *c->at == ' ') c->at++;
    return c->at == c->end;
}

/* The next word of the line, copied into `word`; false at the end of the line or when too long. */
static bool take_word(cursor *c, char *word, size_t size) {
    word[0] = 0;
    if (at_end(c)) return false;
    size_t n = 0;
    while (c->at < c->end && *c->at != ' ') {
        if (n + 1 >= size) return false;
        word[n++] = *c->at++;
        word[n] = 0;
    }
    return true;
}

static bool take_number(cursor *c, uint64_t *value) {
    char word[24];
    if (!take_word(c, word, sizeof word) || word[0] < '0' || word[0] > '9') return false;
    char *end = NULL;
    errno = 0;
    *value = strtoull(word, &end, 10);
    return errno == 0 && *end == 0;
}

/* The last word of a line. */
static bool take_last_number(cursor *c, uint64_t *value) { return take_number(c, value) && at_end(c); }

/* What is left of the line, without the one space before it. */
static bool take_rest(cursor *c, char *text, size_t size) {
    if (c->at < c->end && *c->at == ' ') c->at++;
    size_t n = (size_t)(c->end - c->at);
    if (n == 0 || n >= size) return false;
    memcpy(text, c->at, n);
    text[n] = 0;
    return true;
}

static bool parse_file(nx_model *m, cursor *c) {
    uint64_t nbytes;
    char path[4096];
    if (!take_number(c, &nbytes) || !take_rest(c, path, sizeof path)) return false;
    nx_model_file *files = realloc(m->files, (m->n_files + 1) * sizeof *files);
    if (!files) return false;
    m->files = files;
    files[m->n_files] = (nx_model_file){.path = strdup(path), .nbytes = nbytes, .fd = -1};
    return files[m->n_files++].path != NULL;
}

static bool parse_view(nx_model *m, cursor *c) {
    char path[4096];
    if (m->view || !take_rest(c, path, sizeof path)) return false;
    m->view = strdup(path);
    return m->view != NULL;
}

/* The tensor of this line is stored in chunks. */
static bool chunks_follow(const cursor *c) {
    static const char next[] = "\nchunks ";
    return (size_t)(c->text_end - c->end) >= sizeof next - 1 && memcmp(c->end, next, sizeof next - 1) == 0;
}

static bool parse_tensor(nx_model *m, cursor *c, uint32_t capacity) {
    if (m->n_extents >= capacity) return false;
    nx_extent *e = &m->extents[m->n_extents];
    char tier[8];
    uint64_t file;
    if (!take_word(c, tier, sizeof tier) || !take_number(c, &file) || !take_number(c, &e->offset) ||
        !take_number(c, &e->nbytes) || !take_number(c, &e->virtual_offset))
        return false;
    for (int i = 0; i < NX_MAX_DIMS; i++)
        if (!take_number(c, &e->ne[i])) return false;
    if (!take_word(c, e->type, sizeof e->type) || !take_rest(c, e->name, sizeof e->name)) return false;
    if (strcmp(tier, "host") == 0) e->tier = NX_TIER_HOST;
    else if (strcmp(tier, "ram") == 0) e->tier = NX_TIER_RAM;
    else if (strcmp(tier, "nvme") == 0) e->tier = NX_TIER_NVME;
    else if (strcmp(tier, "elastic") == 0) e->tier = NX_TIER_NVME, e->elastic = 1;
    else return false;
    if (file >= m->n_files) return false;
    const uint64_t size = m->files[file].nbytes;
    uint64_t rows = 1, virtual_end;
    if (e->offset > size || (!chunks_follow(c) && e->nbytes > size - e->offset)) return false;
    if (__builtin_add_overflow(e->virtual_offset, e->nbytes, &virtual_end)) return false;
    for (int i = 1; i < NX_MAX_DIMS; i++)
        if (__builtin_mul_overflow(rows, e->ne[i], &rows)) return false;
    if (rows == 0 || e->ne[0] == 0) {
        if (e->nbytes != 0 || e->tier != NX_TIER_HOST) return false; /* there is nothing to page */
    } else {
        if (e->nbytes == 0 || e->nbytes % rows != 0) return false;
        e->row_bytes = e->nbytes / rows;
    }
    e->file = (uint32_t)file;
    e->model = m;
    m->n_extents++;
    return true;
}

/* All chunks of the last tensor were told. */
static bool tensor_is_whole(const nx_model *m, const cursor *c) {
    const nx_extent *e = m->n_extents ? &m->extents[m->n_extents - 1] : NULL;
    return !e || !e->chunks || c->n_chunks == e->chunks->n;
}

static bool parse_chunks(nx_model *m, cursor *c) {
    uint64_t n_matrices, nbytes;
    if (!m->n_extents || !take_number(c, &n_matrices) || !take_last_number(c, &nbytes)) return false;
    nx_extent *e = &m->extents[m->n_extents - 1];
    if (e->chunks || (n_matrices != 1 && n_matrices != e->ne[2])) return false;
    /* No more chunks than there is text for: a line of one has at least this many bytes. */
    const uint64_t room = (uint64_t)(c->text_end - c->end) / 16;
    if (!nbytes || !n_matrices || n_matrices > room || e->nbytes / n_matrices / nbytes > room / n_matrices) return false;
    e->chunks = nx_chunks_create(e->nbytes, n_matrices, nbytes);
    if (e->chunks) e->chunks->verify = m->verify;
    return e->chunks != NULL;
}

static bool parse_chunk(nx_model *m, cursor *c) {
    nx_extent *e = m->n_extents ? &m->extents[m->n_extents - 1] : NULL;
    uint64_t file, offset, stored;
    char codec[64], hash[20], *end = NULL;
    if (!e || !e->chunks || c->n_chunks >= e->chunks->n) return false;
    if (!take_number(c, &file) || !take_number(c, &offset) || !take_number(c, &stored) ||
        !take_word(c, codec, sizeof codec) || !take_word(c, hash, sizeof hash) || !at_end(c))
        return false;
    nx_chunk *k = &e->chunks->chunk[c->n_chunks++];
    if (!nx_codec_find(codec, &k->codec) || file >= m->n_files || !stored || stored > k->raw ||
        (k->codec == NX_CODEC_RAW && stored != k->raw))
        return false;
    if (offset > m->files[file].nbytes || stored > m->files[file].nbytes - offset) return false;
    k->offset = offset;
    k->stored = (uint32_t)stored;
    k->hash = strtoull(hash, &end, 16);
    k->file = (nx_file *)(uintptr_t)file; /* its number until it is open: nx_stored_init */
    return hash[0] != '-' && hash[0] != '+' && *end == 0;
}

static bool parse_experts(nx_model *m, cursor *c) {
    nx_group g = {.model = m};
    uint64_t n_slots, number;
    if (!take_number(c, &n_slots) || n_slots == 0) return false;
    while (take_number(c, &number)) {
        if (g.n_parts == NX_MAX_PARTS || number >= m->n_extents) return false;
        nx_extent *e = &m->extents[number];
        if (e->tier != NX_TIER_NVME || e->elastic || e->ne[2] < 2 || e->ne[2] > INT32_MAX || e->ne[3] != 1) return false;
        if (g.n_parts && e->ne[2] != g.n_experts) return false;
        for (uint32_t i = 0; i < m->n_groups; i++)
            for (uint32_t k = 0; k < m->groups[i].n_parts; k++)
                if (m->groups[i].part[k] == e) return false; /* an extent has one cache */
        for (uint32_t k = 0; k < g.n_parts; k++)
            if (g.part[k] == e) return false;
        g.n_experts = (uint32_t)e->ne[2];
        g.part[g.n_parts++] = e;
    }
    if (g.n_parts == 0 || c->at < c->end) return false;
    g.n_slots = (uint32_t)(n_slots < g.n_experts ? n_slots : g.n_experts);
    nx_group *groups = realloc(m->groups, (m->n_groups + 1) * sizeof *groups);
    if (!groups) return false;
    m->groups = groups;
    groups[m->n_groups++] = g;
    return true;
}

/* kernels MORE TYPE...: our own kernels compute with weights of these types. */
static bool parse_kernels(nx_model *m, cursor *c) {
    char word[24];
    if (!take_number(c, &m->own_more_bytes)) return false;
    while (!at_end(c)) {
        if (!take_word(c, word, sizeof word)) return false;
        const nx_ternary_type type = nx_ternary_type_of(word);
        if (type == NX_TERNARY_TYPES) return false;
        m->own_types |= 1u << type;
    }
    return m->own_types != 0;
}

/* Each line that starts with "tensor " is at most one extent: an upper bound before allocation. */
static uint32_t count_tensors(const char *text, size_t nbytes) {
    uint32_t n = 0;
    for (const char *at = text, *end = text + nbytes; at < end; at++)
        if ((at == text || at[-1] == '\n') && end - at > 7 && memcmp(at, "tensor ", 7) == 0) n++;
    return n;
}

/* What follows `key` on its line. */
static bool parse_line(nx_model *m, cursor *c, const char *key, uint32_t capacity, bool *ended) {
    char word[24];
    uint64_t n = 0;
    if (c->line == 1) return strcmp(key, "nexus-manifest") == 0 && take_last_number(c, &n) && n == 1;
    if (strcmp(key, "ring") == 0) return take_last_number(c, &m->pager.ring_bytes);
    if (strcmp(key, "slab") == 0) return take_last_number(c, &m->pager.slab_bytes);
    if (strcmp(key, "scratch") == 0) return take_last_number(c, &m->pager.scratch_bytes);
    if (strcmp(key, "virtual") == 0)
        return take_last_number(c, &m->virtual_bytes) && m->virtual_bytes <= INT64_MAX;
    if (strcmp(key, "io") == 0) {
        const bool one = take_word(c, word, sizeof word) && at_end(c);
        m->io_mode = strcmp(word, "buffered") == 0 ? NX_IO_BUFFERED : NX_IO_DIRECT;
        return one && (m->io_mode == NX_IO_BUFFERED || strcmp(word, "direct") == 0);
    }
    if (strcmp(key, "view") == 0) return parse_view(m, c);
    if (strcmp(key, "file") == 0) return parse_file(m, c);
    if (strcmp(key, "verify") == 0) {
        if (m->n_extents || !take_word(c, word, sizeof word) || !at_end(c)) return false;
        m->verify = strcmp(word, "always") == 0 ? NX_VERIFY_ALWAYS : NX_VERIFY_FIRST;
        return m->verify == NX_VERIFY_ALWAYS || strcmp(word, "first") == 0;
    }
    if (strcmp(key, "decoders") == 0) {
        if (!take_last_number(c, &n) || !n || n > 64) return false;
        m->n_decoders = (uint32_t)n;
        return true;
    }
    if (strcmp(key, "chunk") == 0) return parse_chunk(m, c);
    if (strcmp(key, "chunks") == 0) return c->n_chunks = 0, parse_chunks(m, c);
    if (!tensor_is_whole(m, c)) return false;
    if (strcmp(key, "tensor") == 0) return parse_tensor(m, c, capacity);
    if (strcmp(key, "experts") == 0) return parse_experts(m, c);
    if (strcmp(key, "kernels") == 0) return parse_kernels(m, c);
    if (strcmp(key, "opencl") == 0) return at_end(c) && m->own_types && (m->own_opencl = true);
    *ended = strcmp(key, "end") == 0 && take_last_number(c, &n) && n == m->n_extents;
    return *ended;
}

nx_status nx_manifest_parse(nx_model *m, const char *text, size_t nbytes, nx_error *error) {
    const uint32_t capacity = count_tensors(text, nbytes);
    m->extents = calloc(capacity ? capacity : 1, sizeof *m->extents);
    if (!m->extents) {
        nx_error_set(error, NX_E_NOMEM, ENOMEM, "no memory for %u tensors of the manifest", capacity);
        return NX_E_NOMEM;
    }
    bool ended = false;
    unsigned line = 0;
    uint32_t n_chunks = 0;
    if (nbytes && memchr(text, 0, nbytes)) { /* or a path or a name would end where it does not */
        nx_error_set(error, NX_E_INVALID, 0, "the manifest is not text: it holds a zero byte");
        return NX_E_INVALID;
    }
    for (const char *at = text, *end = text + nbytes; at < end;) {
        const char *newline = memchr(at, '\n', (size_t)(end - at));
        cursor c = {.at = at, .end = newline ? newline : end, .text_end = end, .line = ++line, .n_chunks = n_chunks};
        at = newline ? newline + 1 : end;
        char key[24];
        if (line > 1 && at_end(&c)) continue;
        if (!take_word(&c, key, sizeof key) || ended || !parse_line(m, &c, key, capacity, &ended)) {
            nx_error_set(error, NX_E_INVALID, 0, "line %u of the manifest (\"%s\") is not valid", line, key);
            return NX_E_INVALID;
        }
        n_chunks = c.n_chunks;
    }
    if (!ended) {
        nx_error_set(error, NX_E_INVALID, 0, "the manifest ends after line %u without \"end\"", line);
        return NX_E_INVALID;
    }
    return NX_OK;
}

/* Too many for a number is too many for the pager, which says so. */
static uint32_t bounded(uint64_t n) { return n < UINT32_MAX ? (uint32_t)n : UINT32_MAX; }

/* Rows of one slab, and how many slabs a matrix of `rows` rows makes.
 *
 * A product must come out bit by bit as if it had not been cut. CPU kernels choose their path by
 * rows % 4 (tiled or not) and rows % 2 (two rows at a time or one), so every slab must be of the class
 * of the whole: multiples of 64 rows when rows % 4 == 0; otherwise an odd number of slabs, each of
 * rows = 1 or 2 (mod 4), which leaves the last one in the same class too. */
void nx_slab_split(uint64_t rows, uint64_t row_bytes, uint64_t slab_bytes, uint64_t *slab_rows,
                   uint32_t *n_slabs) {
    uint64_t target = slab_bytes / row_bytes;
    if (target >= rows || rows <= 4) {
        *slab_rows = rows;
        *n_slabs = 1;
        return;
    }
    if (rows % 4 == 0) {
        uint64_t unit = target >= 64 ? 64 : target >= 16 ? 16 : 4;
        target = target / unit * unit;
        if (target == 0) target = 4;
        *slab_rows = target;
        *n_slabs = bounded((rows - 1) / target + 1);
        return;
    }
    const uint64_t class = rows % 4 == 2 ? 2 : 1;
    target = target > class ? (target - class) / 4 * 4 + class : class;
    uint64_t n = (rows - 1) / target + 1;
    while (n % 2 == 0) { /* ends: slabs of `class` rows are an odd number */
        target = ((rows - 1) / n - class) / 4 * 4 + class; /* the largest that makes more than n */
        n = (rows - 1) / target + 1;
    }
    *slab_rows = target;
    *n_slabs = bounded(n);
}
