/*
 * nx_world.h: models in real files for the tests of the paging core.
 *
 * A world is a directory with files of random bytes, which it also keeps in memory, and a manifest
 * that grows line by line. Every byte that the core hands out can be compared with what was written.
 */
#ifndef NX_WORLD_H
#define NX_WORLD_H

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "nexus_core.h"
#include "nx_test.h"

#define WORLD_FILES 3

typedef struct world {
    char dir[256];
    size_t n_files;
    struct {
        char path[300];
        uint8_t *bytes;
        uint64_t nbytes;
    } files[WORLD_FILES];
    char *text; /* the manifest */
    size_t n_text, capacity;
    size_t n_tensors;
    uint64_t virtual_end;
} world;

__attribute__((unused)) static void world_write(const world *w, size_t file) {
    const int fd = open(w->files[file].path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    NX_CHECK(fd >= 0);
    for (uint64_t at = 0; at < w->files[file].nbytes;) {
        const ssize_t n = write(fd, w->files[file].bytes + at, w->files[file].nbytes - at);
        NX_CHECK(n > 0);
        at += (uint64_t)n;
    }
    NX_CHECK_EQ(fsync(fd), 0); /* a write-back under way must not compete with what is tested */
    close(fd);
}

/* Files of about `nbytes`, each a little longer than the one before: no multiple of any block. */
__attribute__((unused)) static void world_init(world *w, size_t n_files, uint64_t nbytes, uint64_t seed) {
    const char *tmp = getenv("TMPDIR");
    memset(w, 0, sizeof *w);
    snprintf(w->dir, sizeof w->dir, "%s/nexus-test-XXXXXX", tmp && *tmp ? tmp : "/tmp");
    NX_CHECK(mkdtemp(w->dir) != NULL);
    w->n_files = n_files;
    for (size_t i = 0; i < n_files; i++) {
        snprintf(w->files[i].path, sizeof w->files[i].path, "%s/part %zu.gguf", w->dir, i);
        w->files[i].nbytes = nbytes + 777 * i + 13;
        w->files[i].bytes = malloc(w->files[i].nbytes);
        NX_CHECK(w->files[i].bytes != NULL);
        for (uint64_t at = 0; at < w->files[i].nbytes; at++) {
            if (at % 8 == 0 && w->files[i].nbytes - at >= 8) {
                const uint64_t r = nx_test_random(&seed);
                memcpy(w->files[i].bytes + at, &r, sizeof r);
                at += 7;
            } else {
                w->files[i].bytes[at] = (uint8_t)nx_test_random(&seed);
            }
        }
        world_write(w, i);
    }
}

__attribute__((unused)) static void world_free(world *w) {
    for (size_t i = 0; i < w->n_files; i++) {
        (void)unlink(w->files[i].path);
        free(w->files[i].bytes);
    }
    NX_CHECK_EQ(rmdir(w->dir), 0);
    free(w->text);
    memset(w, 0, sizeof *w);
}

__attribute__((format(printf, 2, 3), unused)) static void world_line(world *w, const char *format, ...) {
    char line[1024];
    va_list args;
    va_start(args, format);
    const int n = vsnprintf(line, sizeof line - 1, format, args);
    va_end(args);
    NX_CHECK(n > 0 && n < (int)sizeof line - 1);
    line[n] = '\n';
    if (w->n_text + (size_t)n + 1 > w->capacity) {
        w->capacity = 2 * w->capacity + 4096;
        w->text = realloc(w->text, w->capacity);
        NX_CHECK(w->text != NULL);
    }
    memcpy(w->text + w->n_text, line, (size_t)n + 1);
    w->n_text += (size_t)n + 1;
}

/* Start a manifest over. */
__attribute__((unused)) static void world_manifest(world *w, uint64_t ring, uint64_t slab, uint64_t scratch,
                                                   uint64_t virtual_bytes, bool direct) {
    w->n_text = 0;
    w->n_tensors = 0;
    world_line(w, "nexus-manifest 1");
    world_line(w, "ring %" PRIu64, ring);
    world_line(w, "slab %" PRIu64, slab);
    world_line(w, "scratch %" PRIu64, scratch);
    world_line(w, "virtual %" PRIu64, virtual_bytes);
    world_line(w, "io %s", direct ? "direct" : "buffered");
    for (size_t i = 0; i < w->n_files; i++)
        world_line(w, "file %" PRIu64 " %s", w->files[i].nbytes, w->files[i].path);
}

/* A tensor of ne1 x ne2 rows of `row_bytes`. */
__attribute__((unused)) static void world_tensor(world *w, const char *tier, size_t file, uint64_t offset,
                                                 uint64_t row_bytes, uint64_t ne1, uint64_t ne2,
                                                 uint64_t virtual_offset, const char *name) {
    NX_CHECK(offset + row_bytes * ne1 * ne2 <= w->files[file].nbytes);
    world_line(w, "tensor %s %zu %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " 1 I8 %s",
               tier, file, offset, row_bytes * ne1 * ne2, virtual_offset, row_bytes, ne1, ne2, name);
    w->n_tensors++;
}

__attribute__((unused)) static nx_model *world_open(world *w, const void *header, size_t header_bytes) {
    world_line(w, "end %zu", w->n_tensors);
    nx_model *m = NULL;
    nx_error error;
    const nx_status status = nx_model_create(w->text, w->n_text, header, header_bytes, &m, &error);
    if (status != NX_OK) fprintf(stderr, "%s\n", error.text);
    NX_CHECK_EQ(status, NX_OK);
    return m;
}

/* Is this what the file holds? */
__attribute__((unused)) static bool world_same(const world *w, const nx_extent *e, uint64_t offset,
                                               const void *data, uint64_t nbytes) {
    return memcmp(data, w->files[e->file].bytes + e->offset + offset, nbytes) == 0;
}

__attribute__((unused)) static bool world_has_engine(int engine) {
    const nx_io_options options = {.engine = engine};
    nx_io *io = NULL;
    const bool has = nx_io_create(&options, &io) == NX_OK;
    nx_io_destroy(io);
    return has;
}

/* Run a test for each engine that this machine has, with direct and with buffered reads. */
__attribute__((unused)) static void world_for_each(void (*test)(bool direct)) {
    static const int engines[] = {NX_IO_ENGINE_URING, NX_IO_ENGINE_THREADS};
    for (size_t i = 0; i < 2; i++) {
        if (!world_has_engine(engines[i])) continue;
        setenv("NEXUS_IO_ENGINE", i == 0 ? "uring" : "threads", 1);
        for (int direct = 1; direct >= 0; direct--) {
            nx_test_about("%s, %s", i == 0 ? "uring" : "threads", direct ? "direct" : "buffered");
            test(direct);
        }
    }
    unsetenv("NEXUS_IO_ENGINE");
}

#endif
