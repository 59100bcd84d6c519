/* model.c: a model's life: files, extents, pinned memory and how it is filled, errors, statistics. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "attach_internal.h"
#include "cache.h"
#include "manifest.h"

uint64_t nx_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#define HUGE_PAGE (2u << 20)

/* Large areas begin at a huge page and ask for such pages: fewer TLB misses in kernels, and direct reads
 * that are faster by half and cost a sixth, since the system has fewer pages to hold on to. */
void *nx_memory_map(uint64_t nbytes) {
    const uint64_t spare = nbytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 0;
    uint8_t *p = mmap(NULL, nbytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    if (spare) {
        const uint64_t before = (HUGE_PAGE - (uintptr_t)p % HUGE_PAGE) % HUGE_PAGE;
        const uint64_t used = nx_round_up(nbytes, NX_PAGE);
        if (before) munmap(p, before);
        p += before;
        if (nbytes + spare - before > used) munmap(p + used, nbytes + spare - before - used);
    }
#ifdef MADV_HUGEPAGE
    (void)madvise(p, nbytes, MADV_HUGEPAGE);
#endif
    return p;
}

void nx_memory_unmap(void *p, uint64_t nbytes) {
    if (p) munmap(p, nbytes);
}

/* -- errors, events ----------------------------------------------------------------------------- */

void nx_error_set(nx_error *error, nx_status status, int sys_errno, const char *format, ...) {
    if (!error) return;
    memset(error, 0, sizeof *error);
    error->status = status;
    error->sys_errno = sys_errno;
    va_list args;
    va_start(args, format);
    vsnprintf(error->text, sizeof error->text, format, args);
    va_end(args);
}

void nx_read_error(nx_model *m, const nx_extent *e, const nx_read *read, nx_error *error) {
    const char *path = m->files[e->file].path;
    nx_error_set(error, read->status, read->sys_errno, "%s while reading tensor %s",
                 nx_status_text(read->status), e->name);
    snprintf(error->path, sizeof error->path, "%s", path);
    snprintf(error->tensor, sizeof error->tensor, "%s", e->name);
    error->offset = read->error_offset;
    error->nbytes = read->nbytes;
    if (e->chunks && (read->status == NX_E_DAMAGED || (read->file && read->file->chunks)))
        nx_stored_error(m, e, read, error);
}

void nx_model_fail(nx_model *m, const nx_error *error) {
    pthread_mutex_lock(&m->lock);
    if (m->last_error.status == NX_OK) m->last_error = *error; /* the first one explains the rest */
    pthread_mutex_unlock(&m->lock);
}

void nx_model_last_error(nx_model *m, nx_error *out) {
    pthread_mutex_lock(&m->lock);
    *out = m->last_error;
    pthread_mutex_unlock(&m->lock);
}

void nx_model_clear_error(nx_model *m) {
    pthread_mutex_lock(&m->lock);
    memset(&m->last_error, 0, sizeof m->last_error);
    pthread_mutex_unlock(&m->lock);
}

void nx_event_add(nx_model *m, nx_event_kind kind, uint32_t a, uint64_t b) {
    if (!atomic_load_explicit(&m->tracing, memory_order_relaxed)) return;
    pthread_mutex_lock(&m->lock);
    if (m->events) m->events[m->n_events++ % NX_EVENTS] = (nx_event){nx_now_ns(), kind, a, b};
    pthread_mutex_unlock(&m->lock);
}

void nx_model_trace(nx_model *m, int on) {
    pthread_mutex_lock(&m->lock);
    if (on && !m->events) m->events = calloc(NX_EVENTS, sizeof *m->events);
    atomic_store(&m->tracing, on && m->events);
    pthread_mutex_unlock(&m->lock);
}

size_t nx_model_events(nx_model *m, nx_event *out, size_t max) {
    pthread_mutex_lock(&m->lock);
    uint64_t n = m->n_events < NX_EVENTS ? m->n_events : NX_EVENTS;
    if (n > max) n = max;
    for (uint64_t i = 0; i < n; i++) out[i] = m->events[(m->n_events - n + i) % NX_EVENTS];
    pthread_mutex_unlock(&m->lock);
    return (size_t)n;
}

/* -- creation ----------------------------------------------------------------------------------- */

static uint32_t name_hash(const char *name) {
    uint32_t h = 2166136261u; /* FNV-1a */
    for (; *name; name++) h = (h ^ (uint8_t)*name) * 16777619u;
    return h;
}

static nx_status index_names(nx_model *m, nx_error *error) {
    uint32_t size = 16;
    while (size < 2 * m->n_extents) size *= 2;
    m->index = malloc(size * sizeof *m->index);
    if (!m->index) {
        nx_error_set(error, NX_E_NOMEM, ENOMEM, "no memory for the index of tensor names");
        return NX_E_NOMEM;
    }
    memset(m->index, 0xff, size * sizeof *m->index);
    m->index_mask = size - 1;
    for (uint32_t i = 0; i < m->n_extents; i++) {
        uint32_t at = name_hash(m->extents[i].name) & m->index_mask;
        for (; m->index[at] != UINT32_MAX; at = (at + 1) & m->index_mask) {
            if (strcmp(m->extents[m->index[at]].name, m->extents[i].name) == 0) {
                nx_error_set(error, NX_E_INVALID, 0, "the manifest names tensor %s twice", m->extents[i].name);
                return NX_E_INVALID;
            }
        }
        m->index[at] = i;
    }
    return NX_OK;
}

nx_extent *nx_model_find(nx_model *m, const char *name) {
    for (uint32_t at = name_hash(name) & m->index_mask; m->index[at] != UINT32_MAX;
         at = (at + 1) & m->index_mask)
        if (strcmp(m->extents[m->index[at]].name, name) == 0) return &m->extents[m->index[at]];
    return NULL;
}

static nx_status open_files(nx_model *m, nx_error *error) {
    for (uint32_t i = 0; i < m->n_files; i++) {
        nx_model_file *f = &m->files[i];
        nx_file_info info;
        nx_status status = nx_file_open(f->path, m->io_mode, &f->file);
        int code = errno;
        if (status == NX_OK) {
            f->fd = open(f->path, O_RDONLY | O_CLOEXEC);
            code = errno;
            if (f->fd < 0) status = NX_E_IO;
        }
        if (status != NX_OK) {
            nx_error_set(error, status, code, "%s cannot be opened: %s", f->path, strerror(code));
            snprintf(error->path, sizeof error->path, "%s", f->path);
            return status;
        }
        nx_file_get_info(f->file, &info);
        if (info.offset_align > NX_PAGE) f->slack = NX_IO_SLACK;
        struct stat st;
        if (fstat(f->fd, &st) != 0 || (uint64_t)st.st_dev != info.device || (uint64_t)st.st_ino != info.inode) {
            nx_error_set(error, NX_E_CHANGED, 0, "%s was replaced while it was being opened", f->path);
            snprintf(error->path, sizeof error->path, "%s", f->path);
            return NX_E_CHANGED;
        }
        if ((uint64_t)st.st_size != f->nbytes || info.nbytes != f->nbytes) {
            nx_error_set(error, NX_E_CHANGED, 0, "%s has %lld bytes, its header was read when it had %llu",
                         f->path, (long long)st.st_size, (unsigned long long)f->nbytes);
            snprintf(error->path, sizeof error->path, "%s", f->path);
            return NX_E_CHANGED;
        }
#ifdef POSIX_FADV_RANDOM
        (void)posix_fadvise(f->fd, 0, 0, POSIX_FADV_RANDOM); /* no read-ahead into the page cache */
#endif
    }
    return NX_OK;
}

/* Give each pinned extent its place. */
static nx_status place_pinned(nx_model *m, nx_error *error) {
    uint64_t total = 0;
    for (uint32_t i = 0; i < m->n_extents; i++) {
        nx_extent *e = &m->extents[i];
        if (e->tier == NX_TIER_HOST) m->host_bytes += e->nbytes;
        if (e->tier != NX_TIER_RAM) continue;
        total += nx_span(&m->files[e->file], e->offset, e->nbytes);
        if (total > INT64_MAX) break; /* extents may overlap, and be more than there is of anything */
    }
    /* A page of slack on both sides: the reader may write there. */
    m->pinned_bytes = total ? total + 2 * NX_PAGE : 0;
    if (!total) return NX_OK;
    if (total <= INT64_MAX) m->pinned = nx_memory_map(m->pinned_bytes);
    if (!m->pinned) {
        nx_error_set(error, NX_E_NOMEM, ENOMEM, "%llu bytes for resident weights cannot be allocated",
                     (unsigned long long)m->pinned_bytes);
        return NX_E_NOMEM;
    }
    uint8_t *at = m->pinned + NX_PAGE;
    for (uint32_t i = 0; i < m->n_extents; i++) {
        nx_extent *e = &m->extents[i];
        if (e->tier != NX_TIER_RAM) continue;
        e->pinned = at + nx_lead(&m->files[e->file], e->offset);
        at += nx_span(&m->files[e->file], e->offset, e->nbytes);
    }
    return NX_OK;
}

static void model_free(nx_model *m) {
    nx_prefault_end(m);
    nx_io_destroy(m->load_io); /* waits for reads in flight: they write into our memory */
    nx_pager_free(m);
    nx_predict_plugin_free(m);
    nx_cache_free(m); /* after the engine: its reads wrote here */
    nx_attachments_free(m);
    nx_memory_unmap(m->pinned, m->pinned_bytes);
    nx_residency_free(m);
    nx_stored_free(m);
    for (uint32_t i = 0; i < m->n_files; i++) {
        if (m->files[i].file) nx_file_close(m->files[i].file);
        if (m->files[i].fd >= 0) close(m->files[i].fd);
        free(m->files[i].path);
    }
    free(m->files);
    free(m->extents);
    free(m->index);
    free(m->piece_extent);
    free(m->header);
    free(m->view);
    free(m->view_expected);
    free(m->load_reads);
    free(m->load_state);
    free(m->events);
    free(m->routing.numbers);
    pthread_cond_destroy(&m->turn_free);
    pthread_mutex_destroy(&m->load_lock);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

nx_status nx_model_create(const char *manifest, size_t manifest_bytes, const void *header,
                          size_t header_bytes, nx_model **out, nx_error *error) {
    *out = NULL;
    nx_error ignored;
    if (!error) error = &ignored;
    nx_model *m = calloc(1, sizeof *m);
    if (!m) {
        nx_error_set(error, NX_E_NOMEM, ENOMEM, "no memory for a model");
        return NX_E_NOMEM;
    }
    atomic_init(&m->references, 1);
    nx_control_init(&m->predict.control, false, false);
    pthread_mutex_init(&m->lock, NULL);
    pthread_mutex_init(&m->load_lock, NULL);
    pthread_cond_init(&m->turn_free, NULL);
    nx_status status = nx_manifest_parse(m, manifest, manifest_bytes, error);
    if (status == NX_OK) status = index_names(m, error);
    if (status == NX_OK) status = open_files(m, error);
    if (status == NX_OK) status = nx_stored_init(m, error);
    if (status == NX_OK) status = place_pinned(m, error);
    if (status == NX_OK) status = nx_residency_init(m, error);
    if (status == NX_OK) status = nx_pager_init(m, error);
    if (status == NX_OK) status = nx_cache_init(m, error);
    if (status == NX_OK) {
        const nx_io_options options = {.engine = NX_IO_ENGINE_AUTO};
        m->load_reads = calloc(m->n_extents + 1, sizeof *m->load_reads);
        m->load_state = calloc(m->n_extents + 1, 1);
        m->header = malloc(header_bytes ? header_bytes : 1);
        if (!m->load_reads || !m->load_state || !m->header) status = NX_E_NOMEM;
        else status = nx_io_create(&options, &m->load_io);
        if (status != NX_OK) nx_error_set(error, status, errno, "the read engine cannot be set up");
        else nx_io_set_pool(m->load_io, m->pool);
    }
    if (status != NX_OK) {
        model_free(m);
        return status;
    }
    if (header_bytes) memcpy(m->header, header, header_bytes);
    m->header_bytes = header_bytes;
    atomic_init(&m->loaded, true);
    *out = m;
    return NX_OK;
}

void nx_model_retain(nx_model *m) { atomic_fetch_add(&m->references, 1); }

void nx_model_release(nx_model *m) {
    if (m && atomic_fetch_sub(&m->references, 1) == 1) model_free(m);
}

size_t nx_model_n_extents(const nx_model *m) { return m->n_extents; }
nx_extent *nx_model_extent(nx_model *m, size_t i) { return i < m->n_extents ? &m->extents[i] : NULL; }

void nx_model_close(nx_model *m) {
    pthread_mutex_lock(&m->lock);
    m->closed = true;
    pthread_cond_broadcast(&m->turn_free); /* who waits for a turn need not wait for it to end */
    while (m->turn) pthread_cond_wait(&m->turn_free, &m->lock);
    const bool first = !m->ended;
    m->ended = true;
    pthread_mutex_unlock(&m->lock);
    if (!first) return;
    nx_policy_end(m);
    nx_predict_plugin_end(m);
}

/* -- pinned memory ------------------------------------------------------------------------------ */

/* With load_lock held. */
static nx_status load_start(nx_model *m, nx_extent *e) {
    const uint32_t i = (uint32_t)(e - m->extents);
    nx_read *read = &m->load_reads[i];
    if (m->load_state[i] && !(read->done && read->status != NX_OK)) return NX_OK;
    m->load_state[i] = 0;
    *read = (nx_read){.dst = e->pinned};
    nx_extent_locate(e, 0, e->nbytes, read);
    atomic_store(&m->loaded, false);
    nx_prefault_add(m, e->pinned, e->nbytes);
    nx_status status = nx_io_submit(m->load_io, &read, 1);
    if (status != NX_OK && status != NX_E_IO) return status;
    if (!m->load_begin_ns) __atomic_store_n(&m->load_begin_ns, nx_now_ns(), __ATOMIC_RELAXED);
    m->load_state[i] = 1; /* also if the engine failed (NX_E_IO): it still knows the read */
    return status;
}

nx_status nx_model_claim(nx_model *m, nx_extent *e) {
    pthread_mutex_lock(&m->load_lock);
    __atomic_store_n(&e->claimed, 1, __ATOMIC_RELAXED);
    nx_status status = e->tier == NX_TIER_RAM ? load_start(m, e) : NX_OK;
    nx_stats_see(m->load_io, &m->load_seen);
    pthread_mutex_unlock(&m->load_lock);
    return status;
}

typedef struct load_abort {
    int (*progress)(void *, uint64_t, uint64_t);
    void *ctx;
    uint64_t done, total;
} load_abort;

static int load_should_stop(void *ctx) {
    load_abort *a = ctx;
    if (nx_interrupted()) return 1;
    return a->progress ? a->progress(a->ctx, a->done, a->total) : 0;
}

nx_status nx_model_finish_load(nx_model *m, int (*progress)(void *, uint64_t, uint64_t), void *ctx) {
    if (atomic_load(&m->loaded)) return NX_OK;
    nx_status result = NX_OK;
    pthread_mutex_lock(&m->load_lock);
    load_abort state = {.progress = progress, .ctx = ctx};
    for (uint32_t i = 0; i < m->n_extents; i++)
        if (m->extents[i].tier == NX_TIER_RAM && m->extents[i].claimed) {
            state.total += m->extents[i].nbytes;
            nx_status status = load_start(m, &m->extents[i]); /* again, if it failed before */
            if (status != NX_OK && result == NX_OK) result = status;
        }
    for (uint32_t i = 0; i < m->n_extents && result == NX_OK; i++) {
        nx_extent *e = &m->extents[i];
        if (m->load_state[i] == 1) {
            result = nx_io_wait(m->load_io, &m->load_reads[i], load_should_stop, &state);
            nx_stats_see(m->load_io, &m->load_seen);
            if (result == NX_OK && (result = m->load_reads[i].status) == NX_OK) m->load_state[i] = 2;
            else if (m->load_reads[i].done) {
                m->load_state[i] = 0;
                nx_error error;
                nx_read_error(m, e, &m->load_reads[i], &error);
                nx_model_fail(m, &error);
            } else if (result != NX_E_ABORTED) { /* to be asked to stop is no error */
                nx_error error;
                nx_error_set(&error, result, m->load_reads[i].sys_errno, "the read engine failed");
                nx_model_fail(m, &error);
            }
        }
        if (m->load_state[i] == 2) state.done += e->nbytes;
        if (result == NX_OK && load_should_stop(&state)) result = NX_E_ABORTED;
    }
    if (result == NX_OK) {
        nx_prefault_end(m); /* before memory is given back */
        nx_model_pack(m);
        nx_cache_prefault(m);
        __atomic_store_n(&m->load_end_ns, nx_now_ns(), __ATOMIC_RELAXED);
        atomic_store(&m->loaded, true);
    }
    pthread_mutex_unlock(&m->load_lock);
    return result;
}

nx_status nx_model_read(nx_model *m, const nx_extent *e, uint64_t offset, void *dst, uint64_t nbytes) {
    if (offset > e->nbytes || nbytes > e->nbytes - offset) return NX_E_INVALID;
    nx_read place = {.dst = dst};
    nx_extent_locate(e, offset, nbytes, &place);
    if (nbytes && (place.file->chunks || place.check)) return nx_stored_read(m, e, offset, dst, nbytes);
    uint8_t *at = dst;
    uint64_t from = place.offset;
    const int fd = e->chunks ? place.file->fd_buffered : m->files[e->file].fd;
    while (nbytes) {
        ssize_t n = pread(fd, at, nbytes, (off_t)from);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            nx_read failed = {.status = n < 0 ? NX_E_IO : NX_E_TRUNCATED,
                              .sys_errno = n < 0 ? errno : 0, .error_offset = from, .nbytes = nbytes};
            nx_error error;
            nx_read_error(m, e, &failed, &error);
            nx_model_fail(m, &error);
            return failed.status;
        }
        at += n;
        from += (uint64_t)n;
        nbytes -= (uint64_t)n;
    }
    return NX_OK;
}

/* -- facts -------------------------------------------------------------------------------------- */

/* Counters are words that are written without a lock, by whoever has the turn, and read at any time. */
static void copy_words(void *to, const void *from, size_t nbytes) {
    for (size_t i = 0; i < nbytes / sizeof(uint64_t); i++)
        __atomic_store_n((uint64_t *)to + i, __atomic_load_n((const uint64_t *)from + i, __ATOMIC_RELAXED),
                         __ATOMIC_RELAXED);
}

void nx_stats_see(const nx_io *io, nx_io_stats *seen) {
    nx_io_stats now;
    nx_io_get_stats(io, &now);
    copy_words(seen, &now, sizeof now);
}

void nx_model_get_stats(nx_model *m, nx_stats *out) {
    nx_io_stats run, load;
    pthread_mutex_lock(&m->lock);
    copy_words(out, &m->stats, sizeof *out);
    copy_words(&run, &m->run_seen, sizeof run);
    copy_words(&load, &m->load_seen, sizeof load);
    out->bytes_loaded = load.bytes_read - m->load_base.bytes_read;
    out->bytes_read = run.bytes_read - m->run_base.bytes_read + out->bytes_loaded;
    out->retries = run.retries - m->run_base.retries + load.retries - m->load_base.retries;
    out->short_reads = run.short_reads - m->run_base.short_reads + load.short_reads - m->load_base.short_reads;
    out->bounces = run.bounces - m->run_base.bounces + load.bounces - m->load_base.bounces;
    const uint64_t begin = __atomic_load_n(&m->load_begin_ns, __ATOMIC_RELAXED);
    const uint64_t end = __atomic_load_n(&m->load_end_ns, __ATOMIC_RELAXED);
    out->load_ns = end > begin ? end - begin : 0;
    out->pinned_bytes = m->pinned_bytes;
    out->ring_bytes = m->pager.ring_bytes;
    out->scratch_bytes = m->pager.scratch_bytes;
    out->host_bytes = m->host_bytes;
    out->cache_bytes = m->cache_bytes;
    nx_stored_stats(m, out);
    pthread_mutex_unlock(&m->lock);
}

void nx_model_reset_stats(nx_model *m) {
    static const nx_stats zero;
    pthread_mutex_lock(&m->lock);
    copy_words(&m->stats, &zero, sizeof zero);
    copy_words(&m->run_base, &m->run_seen, sizeof m->run_base);
    copy_words(&m->load_base, &m->load_seen, sizeof m->load_base);
    if (m->pool) nx_pool_get_stats(m->pool, &m->pool_base);
    pthread_mutex_unlock(&m->lock);
}

const char *nx_model_io_engine(const nx_model *m) { return nx_io_engine_name(m->io); }

nx_status nx_model_file_info(const nx_model *m, uint32_t file, struct nx_file_info *out) {
    if (file >= m->n_files) return NX_E_INVALID;
    nx_file_get_info(m->files[file].file, out);
    return NX_OK;
}

nx_status nx_model_inject(nx_model *m, const nx_fault *fault) {
    nx_status status = nx_io_inject(m->io, fault);
    if (status == NX_OK && m->pool) status = nx_pool_inject(m->pool, fault);
    return status == NX_OK ? nx_io_inject(m->load_io, fault) : status;
}

void nx_model_clear_faults(nx_model *m) {
    nx_io_clear_faults(m->io);
    nx_io_clear_faults(m->load_io);
    if (m->pool) nx_pool_clear_faults(m->pool);
}

static _Thread_local nx_model *loading;
void nx_loading_set(nx_model *m) { loading = m; }
nx_model *nx_loading_get(void) { return loading; }
