/* io_faults.c: reads that go wrong on purpose, for tests. */
#include "io_internal.h"

#include <errno.h>

int64_t nx_fault_apply(nx_fault *faults, uint32_t n, uint64_t begin, uint64_t end, int64_t result) {
    for (uint32_t i = 0; i < n; i++) {
        nx_fault *f = &faults[i];
        if (f->count == 0 || begin >= f->offset_end || end <= f->offset_begin) continue;
        if (f->count > 0) f->count--;
        switch (f->kind) {
        case NX_FAULT_EIO: return -EIO;
        case NX_FAULT_EINVAL: return -EINVAL;
        case NX_FAULT_EAGAIN: return -EAGAIN;
        case NX_FAULT_SHORT: return result > 1 ? result / 2 : result;
        case NX_FAULT_EOF: {
            int64_t left = f->offset_begin > begin ? (int64_t)(f->offset_begin - begin) : 0;
            return result > left ? left : result;
        }
        default: break;
        }
    }
    return result;
}

int64_t nx_io_apply_faults(nx_io *io, const nx_request *q, int64_t result) {
    return nx_fault_apply(io->faults, io->n_faults, q->begin + q->have, q->end, result);
}

nx_status nx_io_inject(nx_io *io, const nx_fault *fault) {
    if (fault->kind < NX_FAULT_EIO || fault->kind > NX_FAULT_EAGAIN) return NX_E_INVALID;
    if (io->n_faults == NX_IO_FAULTS) return NX_E_NOMEM;
    io->faults[io->n_faults++] = *fault;
    return NX_OK;
}

void nx_io_clear_faults(nx_io *io) {
    io->n_faults = 0;
}
