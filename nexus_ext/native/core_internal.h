/* core_internal.h: the model as model.c, pager.c and stream.c share it. Not installed. */
#ifndef NEXUS_CORE_INTERNAL_H
#define NEXUS_CORE_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "chunks.h"
#include "nexus_core.h"
#include "nexus_threads.h"
#include "policy.h"
#include "predict_control.h"

#define NX_PAGE 4096u
#define NX_NO_PIECE UINT32_MAX
#define NX_EVENTS 4096u

typedef struct nx_model_file {
    char *path;
    uint64_t nbytes;
    nx_file *file; /* for the engine */
    uint64_t slack; /* what a direct read may overwrite beyond whole pages, before and after */
    int fd;        /* plain reads: small tensors, rows asked for by tools */
} nx_model_file;

/* One reservation of ring memory, in FIFO order. LOADING ends when `read.done`; HELD means acquired.
 * Only the holder of the turn touches slots. */
typedef enum { NX_SLOT_LOADING, NX_SLOT_HELD, NX_SLOT_RELEASED, NX_SLOT_DROPPED } nx_slot_state;

typedef struct nx_slot {
    uint32_t piece;
    nx_slot_state state;
    uint64_t start, span; /* in the ring */
    nx_read read;
} nx_slot;

/* Records that are read into one part of the scratch area. */
typedef struct nx_demand {
    nx_read *reads; /* kept from one fetch to the next */
    size_t capacity;
    size_t n; /* of the fetch that was started and not waited for; 0: none */
    nx_extent *extent;
    uint64_t record_bytes, stride;
} nx_demand;

typedef struct nx_pager {
    uint8_t *ring;
    uint64_t ring_bytes, slab_bytes;
    uint64_t head; /* first free byte; the oldest byte in use is the tail slot's `start` */
    nx_slot *slots;
    uint64_t n_slots, tail_slot, head_slot; /* positions only grow; slot i lives at i % n_slots */
    uint64_t next_slot;                     /* the next one to acquire, if < head_slot */
    uint32_t *order;                        /* pieces of this turn */
    size_t n_order, order_capacity, issued, used;
    uint32_t *successor;  /* piece -> the piece that followed it last time */
    uint32_t *ahead;      /* piece -> its slots that are LOADING */
    uint32_t last_issued; /* where reading ahead goes on beyond the end of `order` */
    uint32_t last_used;   /* the last piece of the last graph that used any */
    nx_demand demand[2];  /* two fetches at a time, see demand.c */
    void *orphan; /* memory that a broken engine may still write into */
    uint64_t orphan_bytes;
    bool broken; /* the engine failed, not a read: only nx_io_destroy is left */
    uint8_t *scratch;
    uint64_t scratch_bytes;
    nx_abort_fn abort;
    void *abort_ctx;
} nx_pager;

typedef struct nx_routing {
    atomic_int on; /* see nx_routing_record */
    int32_t *numbers; /* entries, see nx_routing_take */
    size_t n, capacity;
    uint64_t lost;
} nx_routing;

typedef struct nx_predict {
    nx_predictor predictor;
    nx_control control;             /* read by the holder of the turn, written under the lock */
    uint64_t idle_seen, wait_seen;
    nx_predict_plugin plugin; /* NX_PREDICT_PLUGIN */
} nx_predict;

struct nx_model {
    atomic_int references;
    pthread_mutex_t lock; /* guards: turn, closed, events, last_error */
    pthread_cond_t turn_free;
    bool turn, closed, ended; /* ended: nothing of any plugin is called any more */
    bool ran;                /* a graph has had the turn */
    atomic_int turn_waiters; /* graphs that wait for it */
    nx_io_mode io_mode;

    nx_model_file *files;
    uint32_t n_files;
    nx_extent *extents;
    uint32_t n_extents;
    uint32_t *index; /* hash of names: open addressing, UINT32_MAX is empty */
    uint32_t index_mask;
    uint32_t n_pieces;
    uint32_t *piece_extent;

    uint8_t *header;
    size_t header_bytes;
    uint64_t virtual_bytes;
    bool overlaid; /* load: see nx_model_overlay */
    char *view;    /* see nexus_view.h; NULL: none */
    uint8_t *view_expected; /* by extent */
    bool view_settled, view_checked;

    uint8_t *pinned;
    uint64_t pinned_bytes, host_bytes;
    uint8_t *elastic; /* addresses for elastic extents, see residency.c */
    uint64_t elastic_reserved;
    atomic_uint_least64_t elastic_bytes, generation;
    atomic_bool columns; /* see nx_model_set_columns */
    pthread_mutex_t load_lock; /* guards load_io and the reads of pinned memory */
    nx_io *load_io;
    nx_read *load_reads; /* one per extent, used for ram */
    struct nx_prefault *prefault; /* while pinned memory is filled, see prefault.c */
    uint8_t *load_state; /* per extent: 0 not asked for, 1 reading, 2 there */
    uint64_t load_begin_ns, load_end_ns; /* atomic: read by nx_model_get_stats */
    atomic_bool loaded; /* nothing claimed is missing */
    uint32_t own_types;      /* bit t: weights of nx_ternary_type t are for our own kernels */
    uint64_t own_more_bytes; /* by how much packing them may add to what weights take */
    bool own_opencl;         /* packed ones go to the OpenCL device */
    struct nx_kernel_use *kernels; /* of plugins */
    uint64_t own_products[4]; /* by nx_own_kind; atomic */
    uint32_t cores[NX_MAX_CORES]; /* see nexus_threads.h; guarded by lock */
    size_t n_cores;

    nx_chunk_pool *pool; /* NULL: nothing is stored in chunks */
    uint32_t n_decoders;
    nx_verify verify; /* see manifest.c */
    nx_pool_stats pool_base;

    nx_io *io; /* only the holder of the turn touches it */
    nx_group *groups; /* expert tensors that are cached together, see cache.c */
    uint32_t n_groups;
    uint64_t cache_bytes;
    nx_policy policy;
    nx_routing routing; /* guarded by lock */
    nx_predict predict;
    nx_pager pager;

    nx_stats stats;
    /* What the engines have counted: as their drivers saw it last, and at the last reset. */
    nx_io_stats run_seen, load_seen, run_base, load_base;
    nx_error last_error;
    atomic_bool tracing;
    nx_event *events;
    uint64_t n_events;
};

/* Statistics are read while a graph runs. */
#define NX_COUNT(m, field, n) \
    ((void)__atomic_fetch_add(&(m)->stats.field, (uint64_t)(n), __ATOMIC_RELAXED))

nx_status nx_pager_init(nx_model *, nx_error *);
/* Wait for a read of the turn, counted as waiting (`piece`: for the trace). NX_OK when it is done,
 * however it ended. */
nx_status nx_pager_wait(nx_model *, uint32_t piece, nx_read *);
/* The same until one of the n reads is done. */
nx_status nx_pager_wait_any(nx_model *, uint32_t piece, nx_read *const *reads, size_t n);
/* Note the failed read as the model's error; returns its status. */
nx_status nx_pager_fail(nx_model *, const nx_extent *, const nx_read *);
/* The engine itself has failed: what it had in hand stays where it is until it is destroyed. */
nx_status nx_engine_failed(nx_model *, int sys_errno);
void nx_pager_free(nx_model *);
/* The turn without a graph; NX_E_CLOSED when there is none to be had any more. */
nx_status nx_turn_take(nx_model *);
void nx_turn_give(nx_model *);
/* With the turn: nothing is read ahead any more, and what used to follow what is forgotten. */
void nx_pager_forget(nx_model *);
nx_status nx_residency_init(nx_model *, nx_error *);
void nx_residency_free(nx_model *);
void nx_event_add(nx_model *, nx_event_kind, uint32_t a, uint64_t b);
void nx_read_error(nx_model *, const nx_extent *, const nx_read *, nx_error *);
/* Publish an engine's counters. Only its driver may ask the engine; anyone may ask for statistics. */
void nx_stats_see(const nx_io *, nx_io_stats *seen);

/* Memory of this size is about to be read into; until nx_prefault_end, which waits for its thread. With
 * load_lock held. */
typedef struct nx_prefault nx_prefault;
void nx_prefault_add(nx_model *, void *memory, uint64_t nbytes);
void nx_prefault_end(nx_model *);

/* Anonymous memory, page aligned; NULL when it cannot be had. */
void *nx_memory_map(uint64_t nbytes);
void nx_memory_unmap(void *, uint64_t nbytes);

/* Name in `read` where bytes of an extent are: in a file, or in its chunks. */
void nx_extent_locate(const nx_extent *, uint64_t from, uint64_t nbytes, nx_read *);
/* The files are open: point chunks to them, check where they lie, start the threads. */
nx_status nx_stored_init(nx_model *, nx_error *);
void nx_stored_free(nx_model *);
nx_status nx_stored_read(nx_model *, const nx_extent *, uint64_t offset, void *dst, uint64_t nbytes);
void nx_stored_stats(const nx_model *, nx_stats *);
/* A failed read of a tensor in chunks, in words. */
void nx_stored_error(nx_model *, const nx_extent *, const nx_read *, nx_error *);

static inline uint64_t nx_round_up(uint64_t value, uint64_t to) {
    return (value + to - 1) / to * to;
}

/* Where a read lands in page aligned memory: `lead` bytes after its start, in `span` bytes. The offset
 * within the page is that in the file, so that a direct read of whole pages lands without a copy and
 * stays within the span. */
static inline uint64_t nx_lead(const nx_model_file *f, uint64_t offset) {
    return f->slack + offset % NX_PAGE;
}
static inline uint64_t nx_span(const nx_model_file *f, uint64_t offset, uint64_t nbytes) {
    return nx_round_up(offset % NX_PAGE + nbytes, NX_PAGE) + 2 * f->slack;
}

#endif
