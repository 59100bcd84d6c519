/* demand.c: what cannot be read ahead: rows of the embedding, experts without a cache, and whole tensors
 * for operations that cannot be cut.
 *
 * A demand goes to the engine ahead of everything that is only read ahead, into the scratch area, of
 * which one half can be read while the other is computed with. Only the holder of the turn calls these.
 */
#include <errno.h>
#include <stdlib.h>

#include "core_internal.h"

/* Between two records lies slack for both (see NX_IO_SLACK); rows stay 64-byte aligned for kernels. */
static uint64_t record_stride(uint64_t record_bytes) {
    return nx_round_up(record_bytes, 512) + 2 * NX_IO_SLACK;
}

/* Room for the descriptors of n reads. They outlive a fetch: a broken engine never lets go of them. */
static nx_status demand_room(nx_model *m, nx_demand *d, size_t n) {
    if (m->pager.broken) return NX_E_IO;
    if (d->n) return NX_E_BUSY;
    if (n <= d->capacity) return NX_OK;
    nx_read *reads = realloc(d->reads, n * sizeof *reads);
    if (!reads) return NX_E_NOMEM;
    d->reads = reads;
    d->capacity = n;
    return NX_OK;
}

/* Read all of d->reads ahead of everything. */
static nx_status demand_start(nx_model *m, nx_demand *d) {
    nx_read **list = malloc((d->n ? d->n : 1) * sizeof *list);
    nx_status status = list ? NX_OK : NX_E_NOMEM;
    for (size_t i = 0; list && i < d->n; i++) list[i] = &d->reads[i];
    if (list && nx_io_submit_front(m->io, list, d->n) != NX_OK) status = nx_engine_failed(m, errno);
    free(list);
    if (status != NX_OK) d->n = 0;
    return status;
}

/* None of its reads is in flight afterwards, unless the engine is broken. */
static nx_status demand_end(nx_model *m, nx_demand *d) {
    nx_status status = NX_OK;
    for (size_t i = 0; i < d->n && !m->pager.broken; i++) {
        nx_read *read = &d->reads[i];
        if (!read->done && !nx_io_cancel(m->io, read)) (void)nx_io_wait(m->io, read, NULL, NULL);
        if (!read->done) status = nx_engine_failed(m, read->sys_errno);
    }
    d->n = 0;
    nx_stats_see(m->io, &m->run_seen);
    return status;
}

static nx_status demand_wait(nx_model *m, nx_demand *d) {
    nx_status status = m->pager.broken ? NX_E_IO : NX_OK;
    for (size_t i = 0; i < d->n && status == NX_OK; i++) {
        status = nx_pager_wait(m, d->extent->first_piece, &d->reads[i]);
        if (status == NX_OK && d->reads[i].status != NX_OK) status = nx_pager_fail(m, d->extent, &d->reads[i]);
    }
    const nx_status ended = demand_end(m, d);
    return status == NX_OK ? ended : status;
}

size_t nx_fetch_max(const nx_model *m, uint64_t record_bytes) {
    const uint64_t scratch_bytes = m->pager.scratch_bytes;
    return record_bytes > scratch_bytes ? 0 : (size_t)(scratch_bytes / record_stride(record_bytes));
}

/* Where the records of an extent lie within a page. If they are whole pages apart, as experts usually are,
 * all as in the file: then direct reads land without a copy. The scratch area has a page to spare for it. */
static uint64_t record_lead(const nx_extent *e, uint64_t record_bytes) {
    return record_bytes % NX_PAGE == 0 ? e->offset % NX_PAGE : 0;
}

/* Records from place `first` of the scratch area on. */
static nx_status fetch_start(nx_model *m, nx_extent *e, nx_demand *d, size_t first, const uint64_t *offsets,
                             size_t n, uint64_t record_bytes) {
    for (size_t i = 0; i < n; i++)
        if (offsets[i] > e->nbytes || record_bytes > e->nbytes - offsets[i]) return NX_E_INVALID;
    nx_status status = demand_room(m, d, n);
    if (status != NX_OK) return status;
    d->n = n;
    d->extent = e;
    d->record_bytes = record_bytes;
    d->stride = record_stride(record_bytes);
    uint8_t *base = m->pager.scratch + NX_IO_SLACK + record_lead(e, record_bytes) + first * d->stride;
    for (size_t i = 0; i < n; i++) {
        d->reads[i] = (nx_read){.dst = base + i * d->stride};
        nx_extent_locate(e, offsets[i], record_bytes, &d->reads[i]);
    }
    return demand_start(m, d);
}

static nx_status fetch_wait(nx_model *m, nx_demand *d, void **base, uint64_t *stride) {
    const size_t n = d->n;
    *base = n ? d->reads[0].dst : NULL;
    *stride = d->stride;
    const nx_status status = demand_wait(m, d);
    if (status != NX_OK) return status;
    NX_COUNT(m, demand_reads, n);
    NX_COUNT(m, bytes_used, n * d->record_bytes);
    nx_event_add(m, NX_EVENT_DEMAND, (uint32_t)n, n * d->record_bytes);
    return NX_OK;
}

nx_status nx_fetch_start(nx_model *m, nx_extent *e, unsigned half, const uint64_t *offsets, size_t n,
                         uint64_t record_bytes) {
    const size_t most = nx_fetch_max(m, record_bytes) / 2;
    if (half > 1) return NX_E_INVALID;
    const nx_demand *other = &m->pager.demand[1 - half];
    if (n > most || (other->n && other->record_bytes != record_bytes)) return NX_E_BUSY;
    return fetch_start(m, e, &m->pager.demand[half], half * most, offsets, n, record_bytes);
}

nx_status nx_fetch_wait(nx_model *m, unsigned half, void **base, uint64_t *stride) {
    return half > 1 ? NX_E_INVALID : fetch_wait(m, &m->pager.demand[half], base, stride);
}

void nx_fetch_drop(nx_model *m, unsigned half) {
    if (half <= 1) (void)demand_end(m, &m->pager.demand[half]);
}

nx_status nx_fetch(nx_model *m, nx_extent *e, const uint64_t *offsets, size_t n, uint64_t record_bytes,
                   void **base, uint64_t *stride) {
    nx_demand *d = m->pager.demand;
    if (n > nx_fetch_max(m, record_bytes) || d[1].n) return NX_E_BUSY;
    const nx_status status = fetch_start(m, e, &d[0], 0, offsets, n, record_bytes);
    return status == NX_OK ? fetch_wait(m, &d[0], base, stride) : status;
}

nx_status nx_whole_fetch(nx_model *m, nx_extent *e, void **data) {
    nx_pager *p = &m->pager;
    const nx_model_file *f = &m->files[e->file];
    const uint64_t span = nx_span(f, e->offset, e->nbytes);
    *data = NULL;
    nx_demand *d = &p->demand[0];
    nx_status status = demand_room(m, d, 1);
    if (status != NX_OK) return status;
    uint8_t *memory = nx_memory_map(span);
    if (!memory) {
        nx_error error;
        nx_error_set(&error, NX_E_NOMEM, ENOMEM, "%llu bytes for tensor %s cannot be allocated",
                     (unsigned long long)e->nbytes, e->name);
        nx_model_fail(m, &error);
        return NX_E_NOMEM;
    }
    d->n = 1;
    d->extent = e;
    d->reads[0] = (nx_read){.dst = memory + nx_lead(f, e->offset)};
    nx_extent_locate(e, 0, e->nbytes, &d->reads[0]);
    status = demand_start(m, d);
    if (status == NX_OK) status = demand_wait(m, d);
    if (status == NX_OK) {
        *data = d->reads[0].dst;
        NX_COUNT(m, whole_tensors, 1);
        NX_COUNT(m, bytes_used, e->nbytes);
    } else if (p->broken) {
        p->orphan = memory; /* the only one: nothing is read any more */
        p->orphan_bytes = span;
    } else {
        nx_memory_unmap(memory, span);
    }
    return status;
}

void nx_whole_free(nx_extent *e, void *data) {
    const nx_model_file *f = &e->model->files[e->file];
    if (data) nx_memory_unmap((uint8_t *)data - nx_lead(f, e->offset), nx_span(f, e->offset, e->nbytes));
}
