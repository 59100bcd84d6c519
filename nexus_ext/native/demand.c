/* demand.c: what cannot be read ahead: rows of the embedding, experts without a cache, and whole tensors
 * for operations that cannot be cut.
 *
 * A demand goes to the engine ahead of everything that is only read ahead, into the scratch area. Only
 * the holder of the turn calls these.
 */
#include <errno.h>
#include <stdlib.h>

#include "core_internal.h"

/* Between two records lies slack for both (see NX_IO_SLACK); rows stay 64-byte aligned for kernels. */
static uint64_t record_stride(uint64_t record_bytes) {
    return nx_round_up(record_bytes, 512) + 2 * NX_IO_SLACK;
}

/* Room for the descriptors of n reads. They outlive a fetch: a broken engine never lets go of them. */
static nx_status demand_room(nx_model *m, size_t n) {
    nx_pager *p = &m->pager;
    if (p->broken) return NX_E_IO;
    if (n <= p->demand_capacity) return NX_OK;
    nx_read *reads = realloc(p->demand, n * sizeof *reads);
    if (!reads) return NX_E_NOMEM;
    p->demand = reads;
    p->demand_capacity = n;
    return NX_OK;
}

/* Read demand[0, n) ahead of everything. None of them is in flight afterwards, however it ends, unless
 * the engine is broken. */
static nx_status demand(nx_model *m, const nx_extent *e, size_t n) {
    nx_pager *p = &m->pager;
    nx_read **list = malloc((n ? n : 1) * sizeof *list);
    if (!list) return NX_E_NOMEM;
    for (size_t i = 0; i < n; i++) list[i] = &p->demand[i];
    nx_status status = nx_io_submit_front(m->io, list, n);
    free(list);
    if (status != NX_OK) return nx_engine_failed(m, errno);
    for (size_t i = 0; i < n && status == NX_OK; i++) {
        status = nx_pager_wait(m, e->first_piece, &p->demand[i]);
        if (status == NX_OK && p->demand[i].status != NX_OK) status = nx_pager_fail(m, e, &p->demand[i]);
    }
    for (size_t i = 0; i < n && !p->broken; i++) {
        nx_read *read = &p->demand[i];
        if (!read->done && !nx_io_cancel(m->io, read)) (void)nx_io_wait(m->io, read, NULL, NULL);
        if (!read->done) status = nx_engine_failed(m, read->sys_errno);
    }
    nx_stats_see(m->io, &m->run_seen);
    return status;
}

size_t nx_fetch_max(const nx_model *m, uint64_t record_bytes) {
    const uint64_t scratch_bytes = m->pager.scratch_bytes;
    return record_bytes > scratch_bytes ? 0 : (size_t)(scratch_bytes / record_stride(record_bytes));
}

nx_status nx_fetch(nx_model *m, nx_extent *e, const uint64_t *offsets, size_t n, uint64_t record_bytes,
                   void **base, uint64_t *stride) {
    nx_pager *p = &m->pager;
    for (size_t i = 0; i < n; i++)
        if (offsets[i] > e->nbytes || record_bytes > e->nbytes - offsets[i]) return NX_E_INVALID;
    if (n > nx_fetch_max(m, record_bytes)) return NX_E_BUSY;
    nx_status status = demand_room(m, n);
    if (status != NX_OK) return status;
    *stride = record_stride(record_bytes);
    *base = n ? p->scratch + NX_IO_SLACK : NULL;
    for (size_t i = 0; i < n; i++)
        p->demand[i] = (nx_read){.file = m->files[e->file].file, .offset = e->offset + offsets[i],
                                 .nbytes = record_bytes, .dst = (uint8_t *)*base + i * *stride};
    status = demand(m, e, n);
    if (status != NX_OK) return status;
    NX_COUNT(m, demand_reads, n);
    NX_COUNT(m, bytes_used, n * record_bytes);
    nx_event_add(m, NX_EVENT_DEMAND, (uint32_t)n, n * record_bytes);
    return NX_OK;
}

nx_status nx_whole_fetch(nx_model *m, nx_extent *e, void **data) {
    nx_pager *p = &m->pager;
    const nx_model_file *f = &m->files[e->file];
    const uint64_t span = nx_span(f, e->offset, e->nbytes);
    *data = NULL;
    nx_status status = demand_room(m, 1);
    if (status != NX_OK) return status;
    uint8_t *memory = nx_memory_map(span);
    if (!memory) {
        nx_error error;
        nx_error_set(&error, NX_E_NOMEM, ENOMEM, "%llu bytes for tensor %s cannot be allocated",
                     (unsigned long long)e->nbytes, e->name);
        nx_model_fail(m, &error);
        return NX_E_NOMEM;
    }
    p->demand[0] = (nx_read){
        .file = f->file, .offset = e->offset, .nbytes = e->nbytes, .dst = memory + nx_lead(f, e->offset)};
    status = demand(m, e, 1);
    if (status == NX_OK) {
        *data = p->demand[0].dst;
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
