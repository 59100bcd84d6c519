/* manifest.c: the text that describes a model to the core, and the extents that come of it.
 *
 *   nexus-manifest 1
 *   ring BYTES | slab BYTES | scratch BYTES | virtual BYTES
 *   io direct|buffered
 *   file BYTES PATH
 *   tensor TIER FILE OFFSET BYTES VIRTUAL_OFFSET NE0 NE1 NE2 NE3 TYPE NAME
 *   end N_TENSORS
 *
 * TIER is host, ram or nvme. PATH and NAME run to the end of their line. The same text serves Python
 * and a foreign runtime (through the environment), so there is one way to describe a model.
 */
#include "manifest.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

typedef struct cursor {
    const char *at, *end;
    unsigned line;
} cursor;

/* The next word of the line, copied into `word`; false at the end of the line or when too long. */
static bool take_word(cursor *c, char *word, size_t size) {
    while (c->at < c->end && *c->at == ' ') c->at++;
    size_t n = 0;
    while (c->at < c->end && *c->at != ' ') {
        if (n + 1 >= size) return false;
        word[n++] = *c->at++;
    }
    word[n] = 0;
    return n > 0;
}

static bool take_number(cursor *c, uint64_t *value) {
    char word[24];
    if (!take_word(c, word, sizeof word) || word[0] < '0' || word[0] > '9') return false;
    char *end = NULL;
    errno = 0;
    *value = strtoull(word, &end, 10);
    return errno == 0 && *end == 0;
}

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

static bool parse_tensor(nx_model *m, cursor *c, uint32_t capacity) {
    if (m->n_extents >= capacity) return false;
    nx_extent *e = &m->extents[m->n_extents];
    char tier[8];
    uint64_t file;
    if (!take_word(c, tier, sizeof tier) || !take_number(c, &file) || !take_number(c, &e->offset) ||
        !take_number(c, &e->nbytes) || !take_number(c, &e->virtual_offset))
        return false;
    for (int i = 0; i < NX_MAX_DIMS; i++)
        if (!take_number(c, &e->ne[i]) || e->ne[i] == 0) return false;
    if (!take_word(c, e->type, sizeof e->type) || !take_rest(c, e->name, sizeof e->name)) return false;
    if (strcmp(tier, "host") == 0) e->tier = NX_TIER_HOST;
    else if (strcmp(tier, "ram") == 0) e->tier = NX_TIER_RAM;
    else if (strcmp(tier, "nvme") == 0) e->tier = NX_TIER_NVME;
    else return false;
    if (file >= m->n_files) return false;
    const uint64_t size = m->files[file].nbytes;
    if (e->nbytes == 0 || e->offset > size || e->nbytes > size - e->offset) return false;
    uint64_t rows = 1;
    for (int i = 1; i < NX_MAX_DIMS; i++)
        if (__builtin_mul_overflow(rows, e->ne[i], &rows)) return false;
    if (e->nbytes % rows != 0) return false;
    e->row_bytes = e->nbytes / rows;
    e->file = (uint32_t)file;
    e->model = m;
    m->n_extents++;
    return true;
}

/* Each line that starts with "tensor " is at most one extent: an upper bound before allocation. */
static uint32_t count_tensors(const char *text, size_t nbytes) {
    uint32_t n = 0;
    for (const char *at = text, *end = text + nbytes; at < end; at++)
        if ((at == text || at[-1] == '\n') && end - at > 7 && memcmp(at, "tensor ", 7) == 0) n++;
    return n;
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
    for (const char *at = text, *end = text + nbytes; at < end && !ended;) {
        const char *newline = memchr(at, '\n', (size_t)(end - at));
        cursor c = {.at = at, .end = newline ? newline : end, .line = ++line};
        at = newline ? newline + 1 : end;
        char key[24], word[24];
        uint64_t n = 0;
        bool good = take_word(&c, key, sizeof key);
        if (!good) continue;
        if (line == 1) good = strcmp(key, "nexus-manifest") == 0 && take_number(&c, &n) && n == 1;
        else if (strcmp(key, "ring") == 0) good = take_number(&c, &m->pager.ring_bytes);
        else if (strcmp(key, "slab") == 0) good = take_number(&c, &m->pager.slab_bytes);
        else if (strcmp(key, "scratch") == 0) good = take_number(&c, &m->pager.scratch_bytes);
        else if (strcmp(key, "virtual") == 0) good = take_number(&c, &m->virtual_bytes);
        else if (strcmp(key, "io") == 0) {
            good = take_word(&c, word, sizeof word) &&
                   (strcmp(word, "direct") == 0 || strcmp(word, "buffered") == 0);
            m->io_mode = good && word[0] == 'b' ? NX_IO_BUFFERED : NX_IO_DIRECT;
        } else if (strcmp(key, "file") == 0) good = parse_file(m, &c);
        else if (strcmp(key, "tensor") == 0) good = parse_tensor(m, &c, capacity);
        else if (strcmp(key, "end") == 0) good = ended = take_number(&c, &n) && n == m->n_extents;
        else good = false;
        if (!good) {
            nx_error_set(error, NX_E_INVALID, 0, "line %u of the manifest (\"%s\") is not valid", line, key);
            return NX_E_INVALID;
        }
    }
    if (!ended) {
        nx_error_set(error, NX_E_INVALID, 0, "the manifest ends after line %u without \"end\"", line);
        return NX_E_INVALID;
    }
    return NX_OK;
}

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
        *n_slabs = (uint32_t)((rows + target - 1) / target);
        return;
    }
    const uint64_t class = rows % 4 == 2 ? 2 : 1;
    target = target > class ? (target - class) / 4 * 4 + class : class;
    while (((rows + target - 1) / target) % 2 == 0) {
        if (target <= class) { /* one row a slab and an even number of them: do not cut */
            *slab_rows = rows;
            *n_slabs = 1;
            return;
        }
        target -= 4;
    }
    *slab_rows = target;
    *n_slabs = (uint32_t)((rows + target - 1) / target);
}
