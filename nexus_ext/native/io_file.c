/*
 * io_file.c: one open file. Which alignment direct reads of it need, whether they can be trusted,
 * and whether it is still the file that was opened.
 */
#include "io_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <sys/vfs.h>
#endif

/* Without word from the kernel: right for every disk with blocks of up to 4 KiB. */
#define NX_FILE_ALIGN 4096u
#define NX_FILE_ALIGN_MAX (1u << 20)
#define NX_FILE_TRIAL_BYTES 4096u

static int64_t mtime_ns(const struct stat *st) {
#ifdef __APPLE__
    return (int64_t)st->st_mtimespec.tv_sec * 1000000000 + st->st_mtimespec.tv_nsec;
#else
    return (int64_t)st->st_mtim.tv_sec * 1000000000 + st->st_mtim.tv_nsec;
#endif
}

/* A later chdir must not change what the path means. Links stay: they are part of the name. */
static char *absolute_path(const char *path) {
    if (path[0] == '/') return strdup(path);
    char *cwd = getcwd(NULL, 0);
    if (!cwd) return NULL;
    size_t nbytes = strlen(cwd) + strlen(path) + 2;
    char *joined = malloc(nbytes);
    if (joined) snprintf(joined, nbytes, "%s/%s", cwd, path);
    free(cwd);
    return joined;
}

static bool usable_align(uint32_t align) {
    return align > 0 && align <= NX_FILE_ALIGN_MAX && (align & (align - 1)) == 0;
}

#ifdef __linux__

/* struct statx is fixed by the kernel's binary interface; older headers lack its newer fields. */
typedef struct nx_statx {
    uint32_t mask;
    uint32_t before[37];
    uint32_t dio_mem_align, dio_offset_align; /* bytes 152 and 156 */
    uint32_t after[24];
} nx_statx;
_Static_assert(sizeof(nx_statx) == 256, "struct statx is 256 bytes");
_Static_assert(offsetof(nx_statx, dio_mem_align) == 152, "stx_dio_mem_align");
#define NX_STATX_DIOALIGN 0x2000u
#define NX_AT_EMPTY_PATH 0x1000

#define NX_TMPFS_MAGIC 0x01021994u
#define NX_RAMFS_MAGIC 0x858458f6u

/* A plan must not take the speed of memory for that of a disk. */
static bool in_memory(const nx_file *file) {
    struct statfs fs;
    if (fstatfs(file->fd_buffered, &fs) != 0) return false;
    return (uint32_t)fs.f_type == NX_TMPFS_MAGIC || (uint32_t)fs.f_type == NX_RAMFS_MAGIC;
}

/* false: the file system says that it has no direct reads for this file. */
static bool ask_alignment(nx_file *file) {
    file->offset_align = file->mem_align = NX_FILE_ALIGN;
#ifdef SYS_statx
    nx_statx sx;
    memset(&sx, 0, sizeof sx);
    if (syscall(SYS_statx, file->fd_buffered, "", NX_AT_EMPTY_PATH, NX_STATX_DIOALIGN, &sx) == 0 &&
        (sx.mask & NX_STATX_DIOALIGN)) {
        if (sx.dio_offset_align == 0 || sx.dio_mem_align == 0) return false;
        if (usable_align(sx.dio_offset_align) && usable_align(sx.dio_mem_align)) {
            file->offset_align = sx.dio_offset_align;
            file->mem_align = sx.dio_mem_align;
        }
    }
#endif
    return true;
}

/*
 * Read the span that covers [offset, offset + NX_FILE_TRIAL_BYTES) both ways, the direct one to the
 * least aligned address that should do. 0: the same bytes; an errno: refused; -1: other bytes.
 */
static int try_span(const nx_file *file, uint64_t offset, uint8_t *direct, uint8_t *buffered) {
    uint64_t begin = nx_io_floor(offset, file->offset_align);
    size_t nbytes = (size_t)nx_io_ceil(NX_FILE_TRIAL_BYTES, file->offset_align);
    uint8_t *dst = direct + file->mem_align;
    memset(dst, 0x5a, nbytes);
    ssize_t expected, got;
    do expected = pread(file->fd_buffered, buffered, nbytes, (off_t)begin);
    while (expected < 0 && errno == EINTR);
    if (expected < 0) return errno;
    do got = pread(file->fd_direct, dst, nbytes, (off_t)begin);
    while (got < 0 && errno == EINTR);
    if (got < 0) return errno;
    return got == expected && memcmp(dst, buffered, (size_t)got) == 0 ? 0 : -1;
}

/* The first block, one in the middle that is a multiple of nothing larger, and the tail. */
static int try_direct(const nx_file *file) {
    size_t room = 2 * (size_t)file->offset_align + 2 * NX_FILE_TRIAL_BYTES;
    size_t align = file->mem_align > NX_FILE_ALIGN ? file->mem_align : NX_FILE_ALIGN;
    void *direct, *buffered = malloc(room);
    if (!buffered) return ENOMEM;
    if (posix_memalign(&direct, align, room + file->mem_align) != 0) {
        free(buffered);
        return ENOMEM;
    }
    int rc = try_span(file, 0, direct, buffered);
    uint64_t middle = nx_io_floor(file->nbytes / 2, 2 * (uint64_t)file->offset_align);
    if (rc == 0) rc = try_span(file, middle + file->offset_align, direct, buffered);
    if (rc == 0) rc = try_span(file, file->nbytes - 1, direct, buffered);
    free(direct);
    free(buffered);
    return rc;
}

static nx_status open_direct(nx_file *file) {
    struct stat st;
    if (file->nbytes == 0) {
        file->how = NX_FILE_BUFFERED_EMPTY;
        return NX_OK;
    }
    if (in_memory(file)) {
        file->how = NX_FILE_BUFFERED_MEMORY;
        return NX_OK;
    }
    if (!ask_alignment(file)) {
        file->how = NX_FILE_BUFFERED_REFUSED;
        return NX_OK;
    }
    file->fd_direct = open(file->path, O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (file->fd_direct < 0) {
        file->how = NX_FILE_BUFFERED_REFUSED;
        file->sys_errno = errno;
        return NX_OK;
    }
    if (fstat(file->fd_direct, &st) != 0) return NX_E_IO;
    if ((uint64_t)st.st_dev != file->device || (uint64_t)st.st_ino != file->inode)
        return NX_E_CHANGED; /* replaced between the two opens */

    /* Reads are cut at multiples of offset_align, and that must keep the memory aligned, too. */
    if (file->mem_align > file->offset_align) file->offset_align = file->mem_align;
    int rc = try_direct(file);
    if (rc == EINVAL && (file->offset_align < NX_FILE_ALIGN || file->mem_align < NX_FILE_ALIGN)) {
        file->offset_align = file->mem_align = NX_FILE_ALIGN;
        rc = try_direct(file);
    }
    if (rc == 0) {
        file->how = NX_FILE_DIRECT;
    } else {
        file->how = rc < 0 ? NX_FILE_BUFFERED_LIES : NX_FILE_BUFFERED_FAILED;
        file->sys_errno = rc < 0 ? 0 : rc;
    }
    return NX_OK;
}

#else

static nx_status open_direct(nx_file *file) {
#ifdef F_NOCACHE
    if (fcntl(file->fd_buffered, F_NOCACHE, 1) == 0) {
        file->how = NX_FILE_DIRECT_UNCACHED;
        return NX_OK;
    }
    file->sys_errno = errno;
#endif
    file->how = NX_FILE_BUFFERED_REFUSED;
    return NX_OK;
}

#endif

static nx_status open_into(nx_file *file, nx_io_mode wanted) {
    struct stat st;
    if (!file->path) return NX_E_NOMEM;
    file->fd_buffered = open(file->path, O_RDONLY | O_CLOEXEC);
    if (file->fd_buffered < 0 || fstat(file->fd_buffered, &st) != 0) return NX_E_IO;
    if (!S_ISREG(st.st_mode)) {
        errno = S_ISDIR(st.st_mode) ? EISDIR : EINVAL;
        return NX_E_INVALID;
    }
    file->nbytes = (uint64_t)st.st_size;
    file->device = (uint64_t)st.st_dev;
    file->inode = (uint64_t)st.st_ino;
    file->mtime_ns = mtime_ns(&st);
    return wanted == NX_IO_DIRECT ? open_direct(file) : NX_OK;
}

nx_status nx_file_open(const char *path, nx_io_mode wanted, nx_file **out) {
    *out = NULL;
    nx_file *file = calloc(1, sizeof *file);
    if (!file) return NX_E_NOMEM;
    file->fd_buffered = file->fd_direct = -1;
    file->offset_align = file->mem_align = 1;
    atomic_init(&file->how, NX_FILE_BUFFERED_WANTED);
    atomic_init(&file->sys_errno, 0);
    file->path = absolute_path(path);
    nx_status status = open_into(file, wanted);
    if (status != NX_OK) {
        int saved = errno;
        nx_file_close(file);
        errno = saved;
        return status;
    }
    *out = file;
    return NX_OK;
}

void nx_file_close(nx_file *file) {
    if (!file) return;
    if (file->fd_direct >= 0) close(file->fd_direct);
    if (file->fd_buffered >= 0) close(file->fd_buffered);
    free(file->path);
    free(file);
}

void nx_file_distrust(nx_file *file, int sys_errno) {
    int direct = NX_FILE_DIRECT;
    if (atomic_compare_exchange_strong(&file->how, &direct, NX_FILE_BUFFERED_LATE))
        file->sys_errno = sys_errno;
}

static const char *how_text(nx_file_how how) {
    switch (how) {
    case NX_FILE_DIRECT: return "O_DIRECT, compared with buffered reads";
    case NX_FILE_DIRECT_UNCACHED: return "F_NOCACHE";
    case NX_FILE_BUFFERED_WANTED: return "buffered reads were asked for";
    case NX_FILE_BUFFERED_EMPTY: return "the file is empty";
    case NX_FILE_BUFFERED_MEMORY: return "the file system keeps its files in memory";
    case NX_FILE_BUFFERED_REFUSED: return "the file system offers no direct reads";
    case NX_FILE_BUFFERED_FAILED: return "a direct read for trial failed";
    case NX_FILE_BUFFERED_LIES:
        return "a direct read for trial brought other bytes than a buffered one";
    case NX_FILE_BUFFERED_LATE: return "a direct read was refused later on";
    }
    return "unknown";
}

void nx_file_get_info(const nx_file *file, nx_file_info *out) {
    int how = atomic_load(&((nx_file *)file)->how);
    bool direct = how == NX_FILE_DIRECT;
    memset(out, 0, sizeof *out);
    out->nbytes = file->nbytes;
    out->device = file->device;
    out->inode = file->inode;
    out->mtime_ns = file->mtime_ns;
    out->offset_align = direct ? file->offset_align : 1;
    out->mem_align = direct ? file->mem_align : 1;
    out->direct = direct || how == NX_FILE_DIRECT_UNCACHED;
    out->sys_errno = atomic_load(&((nx_file *)file)->sys_errno);
    snprintf(out->reason, sizeof out->reason, "%s", how_text((nx_file_how)how));
}

nx_status nx_file_check(nx_file *file) {
    struct stat st;
    if (fstat(file->fd_buffered, &st) != 0) return NX_E_IO;
    if ((uint64_t)st.st_size < file->nbytes) return NX_E_TRUNCATED;
    if ((uint64_t)st.st_size != file->nbytes || mtime_ns(&st) != file->mtime_ns)
        return NX_E_CHANGED;
    if (stat(file->path, &st) != 0) return errno == ENOENT || errno == ENOTDIR ? NX_OK : NX_E_IO;
    if ((uint64_t)st.st_dev != file->device || (uint64_t)st.st_ino != file->inode)
        return NX_E_CHANGED;
    return NX_OK;
}
