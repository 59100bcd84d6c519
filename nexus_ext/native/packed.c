/* packed.c: resident weights of few bits, packed for our own kernels when they are read.
 *
 * The packed matrix takes the place of the stored bytes, whose pages go back to the system while it is made.
 * An operation that needs them after all (nobody knows all graphs beforehand) has them read again, and then
 * they take the place of the packed matrix: the memory of a weight holds it once, in either form. Weights that
 * stay are packed when the model is loaded; elastic ones each time they come, and their packed form goes when
 * they go. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "attach_internal.h"
#include "core_internal.h"

#define MAX_THREADS 16

static bool is_for_us(const nx_model *m, const nx_extent *e, nx_ternary_type *type) {
    *type = nx_ternary_type_of(e->type);
    if (*type == NX_TERNARY_TYPES || !(m->own_types >> *type & 1)) return false;
    return e->claimed && e->ne[2] == 1 && e->ne[3] == 1 && e->ne[1] >= 8 && e->ne[0] <= UINT32_MAX && e->ne[1] <= UINT32_MAX &&
           e->ne[0] % nx_ternary_block(*type) == 0 &&
           strcmp(e->name, "token_embd.weight") != 0; /* whose rows are fetched as they are stored */
}

typedef struct part {
    pthread_t thread;
    bool started;
    nx_ternary *packed;
    const nx_extent *extent;
    uint32_t begin, end;
} part;

#define STEP_BYTES (256u << 10) /* of stored bytes that are in memory beside what they were packed to */

/* Pages that lie wholly within stored bytes [begin, end) of the extent go back to the system. */
static void release(const nx_extent *e, uint64_t begin, uint64_t end) {
    uint8_t *from = (uint8_t *)nx_round_up((uintptr_t)e->pinned + begin, NX_PAGE);
    uint8_t *to = (uint8_t *)(((uintptr_t)e->pinned + end) / NX_PAGE * NX_PAGE);
    if (from < to) (void)madvise(from, (size_t)(to - from), MADV_DONTNEED);
}

static void *pack_part(void *argument) {
    const part *p = argument;
    const nx_extent *e = p->extent;
    const uint32_t unit = nx_ternary_row_unit(p->packed->type);
    const uint32_t step = (uint32_t)(STEP_BYTES / (unit * e->row_bytes) + 1) * unit;
    for (uint32_t begin = p->begin, end; begin < p->end; begin = end) {
        end = p->end - begin > step ? begin + step : p->end;
        nx_ternary_pack(p->packed, (const uint8_t *)e->pinned + begin * e->row_bytes, e->row_bytes, begin, end);
        release(e, begin * e->row_bytes, end * e->row_bytes);
    }
    return NULL;
}

static void pack_all(nx_ternary *packed, const nx_extent *e, uint32_t n_threads) {
    part parts[MAX_THREADS];
    const uint64_t unit = nx_ternary_row_unit(packed->type), units = (e->ne[1] + unit - 1) / unit;
    for (uint32_t t = 0; t < n_threads; t++) {
        uint64_t end = units * (t + 1) / n_threads * unit;
        if (end > e->ne[1]) end = e->ne[1];
        parts[t] = (part){.packed = packed, .extent = e, .end = (uint32_t)end,
                          .begin = (uint32_t)(units * t / n_threads * unit)};
        parts[t].started = t > 0 && pthread_create(&parts[t].thread, NULL, pack_part, &parts[t]) == 0;
    }
    for (uint32_t t = 0; t < n_threads; t++)
        if (!parts[t].started) pack_part(&parts[t]);
    for (uint32_t t = 0; t < n_threads; t++)
        if (parts[t].started) pthread_join(parts[t].thread, NULL);
    nx_ternary_finish(packed);
}

/* The pages that hold nothing but this extent: at its ends there is room. */
static void release_all(const nx_extent *e) {
    uint8_t *begin = (uint8_t *)((uintptr_t)e->pinned / NX_PAGE * NX_PAGE);
    uint8_t *end = (uint8_t *)nx_round_up((uintptr_t)e->pinned + e->nbytes, NX_PAGE);
    (void)madvise(begin, (size_t)(end - begin), MADV_DONTNEED);
}

static uint32_t threads(void) {
    const long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    return cpus < 1 ? 1 : cpus > MAX_THREADS ? MAX_THREADS : (uint32_t)cpus;
}

static uint64_t memory_of(const nx_extent *e, nx_ternary_type type) {
    return nx_ternary_packed_bytes(type, (uint32_t)e->ne[0], (uint32_t)e->ne[1]) + 2 * NX_PAGE;
}

uint64_t nx_extent_packed_bytes(const nx_model *m, const nx_extent *e) {
    nx_ternary_type type;
    return m->own_types && is_for_us(m, e, &type) ? memory_of(e, type) : 0;
}

nx_ternary nx_extent_pack(const nx_model *m, nx_extent *e) {
    nx_ternary_type type;
    nx_ternary packed = {0};
    if (!m->own_types || !is_for_us(m, e, &type) || !nx_attachment_get(e)) return packed;
    if (nx_ternary_create(type, (uint32_t)e->ne[0], (uint32_t)e->ne[1], &packed) != NX_OK) return (nx_ternary){0};
    pack_all(&packed, e, threads());
    release_all(e);
    return packed;
}

void nx_extent_put_packed(nx_model *m, nx_extent *e, nx_ternary packed) {
    nx_attachment *a = nx_extent_attached(e); /* nx_extent_pack made it */
    pthread_mutex_lock(&m->lock); /* statistics look at it */
    a->packed = packed;
    pthread_mutex_unlock(&m->lock);
    __atomic_store_n(&a->released, 1, __ATOMIC_RELEASE);
}

void nx_extent_unpack(nx_model *m, nx_extent *e) {
    nx_attachment *a = nx_extent_attached(e);
    if (!a) return;
    pthread_mutex_lock(&m->lock);
    nx_ternary_free(&a->packed);
    pthread_mutex_unlock(&m->lock);
    __atomic_store_n(&a->released, 0, __ATOMIC_RELEASE);
    a->given_up = 0;
}

/* A device that has no room leaves the weight to the CPU. */
static bool to_device(nx_extent *e, nx_ternary_type type) {
    nx_opencl_matrix *matrix;
    if (nx_opencl_matrix_create(type, e->pinned, e->row_bytes, (uint32_t)e->ne[0], (uint32_t)e->ne[1], &matrix) != NX_OK)
        return false;
    nx_attachment *a = nx_attachment_get(e);
    if (!a) {
        nx_opencl_matrix_free(matrix);
        return false;
    }
    a->opencl = matrix;
    __atomic_store_n(&a->released, 1, __ATOMIC_RELEASE);
    release_all(e);
    return true;
}

void nx_model_pack(nx_model *m) {
    if (!m->own_types) return;
    uint64_t more = m->own_more_bytes;
    for (uint32_t i = 0; i < m->n_extents; i++) {
        nx_extent *e = &m->extents[i];
        nx_ternary_type type;
        nx_attachment *a = nx_extent_attached(e);
        if (e->elastic || e->tier != NX_TIER_RAM || !is_for_us(m, e, &type) || (a && (a->packed.codes || a->opencl || a->given_up || a->kernel)))
            continue;
        if (m->own_opencl && to_device(e, type)) continue;
        const uint64_t bytes = memory_of(e, type);
        const uint64_t grows = bytes > e->nbytes ? bytes - e->nbytes : 0;
        /* Codes and scales begin pages: two more at most, for which no room is asked. */
        if (grows > more && grows > 2 * NX_PAGE) continue; /* ggml keeps this one */
        const nx_ternary packed = nx_extent_pack(m, e);
        if (!packed.codes) return;
        nx_extent_put_packed(m, e, packed);
        more -= grows < more ? grows : more;
    }
}

/* With load_lock held: the packed matrix goes. A graph that is being computed has the turn and keeps it
 * there; one that has looked at it and not begun sees the generation change and looks again. */
static nx_status give_up(nx_model *m, nx_attachment *a) {
    if (!a->packed.codes) return NX_OK;
    const nx_status turn = nx_turn_take(m);
    if (turn != NX_OK) return turn;
    pthread_mutex_lock(&m->lock); /* statistics look at it */
    nx_ternary_free(&a->packed);
    pthread_mutex_unlock(&m->lock);
    a->given_up = 1;
    atomic_fetch_add(&m->generation, 1);
    nx_turn_give(m);
    return NX_OK;
}

nx_status nx_extent_restore(nx_extent *e) {
    nx_attachment *a = nx_extent_attached(e);
    /* Weights of others may be on their way under the lock: who needs nothing does not wait for them. */
    if (!a || !__atomic_load_n(&a->released, __ATOMIC_ACQUIRE)) return NX_OK;
    nx_model *m = e->model;
    pthread_mutex_lock(&m->load_lock);
    const bool wanted = __atomic_load_n(&a->released, __ATOMIC_ACQUIRE);
    nx_status status = wanted ? give_up(m, a) : NX_OK;
    if (wanted && status == NX_OK) {
        status = nx_model_read(m, e, 0, e->pinned, e->nbytes);
        if (status == NX_OK) __atomic_store_n(&a->released, 0, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&m->load_lock);
    return status;
}

uint32_t nx_model_n_packed(const nx_model *m) {
    pthread_mutex_t *lock = (pthread_mutex_t *)(uintptr_t)&m->lock; /* which is no part of what is const */
    uint32_t n = 0;
    pthread_mutex_lock(lock);
    for (uint32_t i = 0; i < m->n_extents; i++) {
        const nx_attachment *a = nx_extent_attached(&m->extents[i]);
        n += a && (a->packed.codes || a->opencl);
    }
    pthread_mutex_unlock(lock);
    return n;
}
