/* view.c: see nexus_view.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* fallocate */
#endif
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#ifdef __linux__
#include <sys/sysmacros.h>
#endif
#include <unistd.h>

#include "core_internal.h"
#include "nexus_view.h"

#define LOOKED_AT 64u /* bytes of what the program hands over */

int nx_model_has_view(const nx_model *m) { return m->view != NULL; }

/* Where the first tensor may be: the header ends before. */
static uint64_t data_begin(const nx_model *m) {
    uint64_t begin = m->virtual_bytes;
    for (uint32_t i = 0; i < m->n_extents; i++)
        if (m->extents[i].nbytes && m->extents[i].virtual_offset < begin) begin = m->extents[i].virtual_offset;
    return begin;
}

static nx_status set_size(const nx_model *m, uint64_t nbytes, nx_error *error) {
    const int fd = open(m->view, O_RDWR | O_CLOEXEC);
    nx_status status = NX_E_IO;
    struct stat st;
    if (fd >= 0 && fstat(fd, &st) == 0) {
        const bool ours = S_ISREG(st.st_mode) && ((uint64_t)st.st_size == data_begin(m) || (uint64_t)st.st_size == m->virtual_bytes);
        if (!ours) status = NX_E_CHANGED;
        else if (ftruncate(fd, (off_t)nbytes) == 0) status = NX_OK;
    }
    const int code = errno;
    if (status == NX_E_CHANGED)
        nx_error_set(error, status, 0, "%s is not the header of this model", m->view);
    else if (status != NX_OK)
        nx_error_set(error, status, code, "%s cannot be given %" PRIu64 " bytes: %s", m->view, nbytes, strerror(code));
    if (fd >= 0) close(fd);
    return status;
}

nx_status nx_view_show(nx_model *m, nx_error *error) {
    if (!m->view_expected) m->view_expected = malloc(m->n_extents + 1);
    if (!m->view_expected) {
        nx_error_set(error, NX_E_NOMEM, ENOMEM, "no memory for a list of tensors");
        return NX_E_NOMEM;
    }
    memset(m->view_expected, 0, m->n_extents + 1);
    m->view_settled = m->view_checked = m->overlaid = false;
    return set_size(m, m->virtual_bytes, error);
}

void nx_view_hide(nx_model *m) { (void)set_size(m, data_begin(m), NULL); }

/* Look for mappings of the view. `whole`: for one of all of it, and where it begins. */
static bool find_mapping(const nx_model *m, uint8_t **whole) {
    struct stat st;
    bool found = false;
#ifdef __linux__
    FILE *maps = stat(m->view, &st) == 0 ? fopen("/proc/self/maps", "re") : NULL;
    if (!maps) return false;
    char *line = NULL;
    size_t room = 0;
    while (!found && getline(&line, &room, maps) > 0) {
        uint64_t from, to, offset, inode;
        unsigned major_number, minor_number;
        int path_at = 0;
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %" SCNx64 " %x:%x %" SCNu64 " %n", &from, &to, &offset,
                   &major_number, &minor_number, &inode, &path_at) != 6)
            continue;
        line[strcspn(line, "\n")] = 0;
        /* By its name as well: some file systems have other numbers here than for stat(). */
        const bool same = inode == st.st_ino && major_number == major(st.st_dev) && minor_number == minor(st.st_dev);
        if (!same && strcmp(line + path_at, m->view) != 0) continue;
        found = !whole || (offset == 0 && to - from >= m->virtual_bytes);
        if (whole && found) *whole = (uint8_t *)(uintptr_t)from;
    }
    free(line);
    fclose(maps);
#else
    (void)m, (void)whole, (void)st;
#endif
    return found;
}

int nx_view_is_mapped(const nx_model *m) { return find_mapping(m, NULL); }

/* What mapping the view has taken: pages of zeros, as many as the weights have. */
static void give_back(const nx_model *m) {
#ifdef FALLOC_FL_PUNCH_HOLE
    const uint64_t begin = nx_round_up(data_begin(m), NX_PAGE);
    const int fd = open(m->view, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    if (m->virtual_bytes > begin)
        (void)fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)begin, (off_t)(m->virtual_bytes - begin));
    close(fd);
#else
    (void)m;
#endif
}

static nx_status refuse(nx_model *m, nx_status status, const char *name, const char *why) {
    nx_error error;
    nx_error_set(&error, status, 0, "tensor %s %s", name, why);
    nx_model_fail(m, &error);
    return status;
}

void nx_view_expect(nx_model *m, const nx_extent *e) { m->view_expected[e - m->extents] = 1; }

nx_status nx_view_settle(nx_model *m) {
    if (m->view_settled) return NX_OK;
    const nx_extent *missing = NULL;
    for (uint32_t i = 0; i < m->n_extents && !missing; i++)
        if (m->extents[i].nbytes && !m->view_expected[i]) missing = &m->extents[i];
    uint8_t *base = NULL;
    const bool mapped = find_mapping(m, &base);
    nx_status status = NX_OK;
    if (missing && !mapped)
        status = refuse(m, NX_E_UNSUPPORTED, missing->name,
                        "is kept from the backend, and the program cannot read it itself: let it map the file, or keep "
                        "no weights from the backend");
    else if (missing)
        status = nx_model_overlay(m, base + missing->virtual_offset, missing);
    if (mapped) give_back(m);
    m->view_settled = true;
    return status;
}

nx_status nx_view_check(nx_model *m, const void *data, uint64_t nbytes, const nx_extent *at) {
    static const uint8_t zeros[LOOKED_AT];
    if (nbytes && memcmp(data, zeros, nbytes < LOOKED_AT ? nbytes : LOOKED_AT) != 0)
        return refuse(m, NX_E_INVALID, at->name, "was loaded from another file than the one that was planned for");
    for (uint32_t i = 0; i < m->n_extents && !m->view_checked; i++)
        if (m->extents[i].nbytes && m->view_expected[i] && !__atomic_load_n(&m->extents[i].claimed, __ATOMIC_RELAXED))
            return refuse(m, NX_E_UNSUPPORTED, m->extents[i].name,
                          "is kept from the backend, which was offered it before: start the program again without it");
    m->view_checked = true;
    return NX_OK;
}
