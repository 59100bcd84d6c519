/* nexus_core.h: what Python (through CFFI) and the ggml glue know of the paging core.
 *
 * A model is a set of extents (one per tensor) over the files that hold them. An extent is
 *   host  - left to the runtime (weights on a GPU);
 *   ram   - read once, into memory of ours that is never evicted ("pinned");
 *   nvme  - read at each use: dense matrices in slabs of whole rows through a ring, rows and experts
 *           on demand into a scratch area.
 * The core knows nothing of ggml and never looks inside a tensor.
 *
 * Threads: every function may be called from any thread. One graph at a time uses a model's ring and
 * scratch (nx_turn_begin/nx_turn_end); pinned memory is immutable once read.
 */
#ifndef NEXUS_CORE_H
#define NEXUS_CORE_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "nexus_io.h"
#include "nexus_status.h"

#ifdef __cplusplus
extern "C" {
#endif

#ifndef NX_API
#define NX_API __attribute__((visibility("default")))
#endif

#define NX_MAX_DIMS 4
#define NX_NAME_BYTES 128 /* longest tensor name kept, terminator included */

typedef struct nx_model nx_model;
typedef struct nx_group nx_group; /* the expert tensors of one layer, cached together */

typedef enum { NX_TIER_HOST = 0, NX_TIER_RAM = 1, NX_TIER_NVME = 2 } nx_tier;

/* One tensor of the manifest. Immutable after nx_model_create, apart from the fields marked "load". */
typedef struct nx_extent {
    nx_model *model;
    char name[NX_NAME_BYTES];
    char type[24]; /* ggml type name, compared without case */
    uint64_t ne[NX_MAX_DIMS];
    nx_tier tier;
    uint32_t file;
    uint64_t offset, nbytes; /* in that file */
    uint64_t row_bytes;
    uint32_t first_piece, n_pieces; /* slabs, numbered through the model; nvme only */
    uint64_t slab_rows;             /* rows of every piece but the last */
    void *pinned;                   /* ram and elastic: where the bytes are; valid from creation on */
    uint64_t virtual_offset;        /* in the stream that llama.cpp loads from */
    int elastic;                    /* its tier changes between ram and nvme: nexus_residency.h */
    int claimed;                    /* load: a tensor of the runtime stands for this extent */
    nx_group *group;                /* nvme experts with a cache; NULL: none */
    uint32_t group_part;            /* which part of the group's records it is */
    struct nx_chunks *chunks; /* how it is stored, see chunks.h; NULL: as it is, at `offset` */
    struct nx_attachment *attached; /* what our own kernels have for it, see nexus_attach.h; atomic */
} nx_extent;

/* The first thing that went wrong, in words and numbers. */
typedef struct nx_error {
    nx_status status;
    int sys_errno;
    uint64_t offset, nbytes;
    char path[512];
    char tensor[NX_NAME_BYTES];
    char text[256];
} nx_error;

typedef struct nx_stats {
    uint64_t passes;          /* graphs computed */
    uint64_t segments;        /* calls of the delegate */
    uint64_t bytes_read;      /* from the device, alignment included, completed reads only */
    uint64_t bytes_loaded;    /* the part of bytes_read that filled pinned memory */
    uint64_t bytes_used;      /* streamed bytes that a computation consumed */
    uint64_t pieces, pieces_ready; /* slabs used; those that were there when they were asked for */
    uint64_t pieces_dropped;  /* read ahead, then not used */
    uint64_t demand_reads;    /* rows and experts fetched on demand */
    uint64_t whole_tensors;   /* tensors fetched whole because an op cannot use slabs */
    uint64_t wait_ns;         /* computation stood still for a read */
    uint64_t compute_ns;      /* inside the delegate */
    uint64_t pass_ns;         /* inside graph computation, waits included */
    uint64_t load_ns;         /* from the first to the last read of pinned memory */
    uint64_t retries, short_reads, bounces;
    uint64_t expert_uses, expert_misses, expert_evictions;
    uint64_t prefetched, prefetch_used, prefetch_wasted; /* bytes of experts read before they were asked for */
    uint64_t preloaded; /* bytes of experts read before the first graph */
    uint64_t idle_ns;   /* computing while nothing was being read, but for what is read ahead of routers */
    uint64_t predict_ns; /* computing predictions */
    uint64_t pinned_bytes, ring_bytes, scratch_bytes, host_bytes, cache_bytes;
    uint64_t bounce_bytes; /* memory of the threads that decode chunks */
    uint64_t stored_bytes, raw_bytes; /* of chunks that were checked and decoded: as stored, and decoded */
    uint64_t decode_ns; /* that this took, summed over threads */
} nx_stats;

typedef enum {
    NX_EVENT_PASS_BEGIN = 1,
    NX_EVENT_PASS_END,
    NX_EVENT_ISSUE,   /* a = piece, b = bytes */
    NX_EVENT_WAIT,    /* a = piece, b = ns waited */
    NX_EVENT_COMPUTE, /* a = first node, b = ns */
    NX_EVENT_DEMAND,  /* a = records, b = bytes */
    NX_EVENT_DROP,    /* a = piece, b = bytes */
} nx_event_kind;

typedef struct nx_event {
    uint64_t t_ns;
    uint32_t kind;
    uint32_t a;
    uint64_t b;
} nx_event;

/* -- models ------------------------------------------------------------------------------------- */

/* Build a model from a manifest (lines of text, see model.c) and the bytes of one GGUF header that
 * describes all its files as one (may be empty when the runtime opens the files itself). Opens the
 * files, checks their sizes, reserves memory; reads nothing. The caller owns one reference. */
NX_API nx_status nx_model_create(const char *manifest, size_t manifest_bytes, const void *header,
                                 size_t header_bytes, nx_model **out, nx_error *error);
NX_API void nx_model_retain(nx_model *);
NX_API void nx_model_release(nx_model *);

NX_API size_t nx_model_n_extents(const nx_model *);
NX_API nx_extent *nx_model_extent(nx_model *, size_t index);
NX_API nx_extent *nx_model_find(nx_model *, const char *name);

/* Mark an extent as used by the runtime; a ram extent starts to be read. */
NX_API nx_status nx_model_claim(nx_model *, nx_extent *);
/* Wait until all claimed ram extents are read. `progress` (may be NULL) gets done and total bytes and
 * may return nonzero to stop. Failed reads can be tried again by calling this again. */
NX_API nx_status nx_model_finish_load(nx_model *, int (*progress)(void *, uint64_t, uint64_t),
                                      void *ctx);
/* Read part of an extent into plain memory, from the files, whatever its tier. */
NX_API nx_status nx_model_read(nx_model *, const nx_extent *, uint64_t offset, void *dst,
                               uint64_t nbytes);
/* No new pass starts (NX_E_CLOSED); a running one ends first. */
NX_API void nx_model_close(nx_model *);

NX_API void nx_model_get_stats(nx_model *, nx_stats *);
NX_API void nx_model_reset_stats(nx_model *);
NX_API const char *nx_model_io_engine(const nx_model *);
NX_API nx_status nx_model_file_info(const nx_model *, uint32_t file, struct nx_file_info *);
/* Copy the newest events, oldest first; returns how many. Tracing is off until events are asked for
 * with nx_model_trace(m, 1). */
NX_API void nx_model_trace(nx_model *, int on);
NX_API size_t nx_model_events(nx_model *, nx_event *out, size_t max);
/* The last error of a pass or a load; status NX_OK when there is none. */
NX_API void nx_model_last_error(nx_model *, nx_error *);
NX_API void nx_model_clear_error(nx_model *);
/* For tests: faults at the read layer of this model. */
NX_API nx_status nx_model_inject(nx_model *, const nx_fault *);
NX_API void nx_model_clear_faults(nx_model *);

/* The model as one virtual GGUF: header, then tensors at their virtual offsets. Bytes of claimed
 * extents are not read (what a reader gets for them means nothing): the runtime hands them to the backend,
 * which knows better. With a descriptor the stream can be loaded from in mmap mode, where not even the
 * pointers are followed. NULL: no memory. */
NX_API FILE *nx_model_stream(nx_model *, int *has_descriptor);
NX_API void nx_model_stream_close(FILE *);
/* The runtime hands over `data`, an address in its mapping of the stream, as the bytes of extent `at`:
 * the first time, give it the extents that nobody claimed. */
NX_API nx_status nx_model_overlay(nx_model *, void *data, const nx_extent *at);

/* The model that tensors belong to which this thread's runtime creates from now on (NULL: none). */
NX_API void nx_loading_set(nx_model *);
NX_API nx_model *nx_loading_get(void);

/* -- one graph ---------------------------------------------------------------------------------- */

typedef int (*nx_abort_fn)(void *); /* nonzero: stop */

/* Get the model's ring for one graph. `uses` are the nvme extents that the graph multiplies by, in
 * order, one entry for each use. Blocks while another graph of this model runs. */
NX_API nx_status nx_turn_begin(nx_model *, nx_extent *const *uses, size_t n_uses, nx_abort_fn,
                               void *ctx);
/* `failed`: forget what was read ahead. */
NX_API void nx_turn_end(nx_model *, int failed);

/* The next piece (slab) in the order of `uses`, after `n_held` pieces that were acquired and not yet
 * released: nx_piece_ready tells if it can be had without waiting. */
typedef struct nx_piece {
    nx_extent *extent;
    uint64_t row, n_rows;
    uint64_t nbytes;
    void *data;
} nx_piece;

NX_API int nx_piece_ready(nx_model *);
/* Wait for the next piece and acquire it. The caller must release held pieces first when the ring
 * cannot hold one more (NX_E_BUSY says so). */
NX_API nx_status nx_piece_acquire(nx_model *, nx_piece *out);
/* Release the oldest `n` acquired pieces: no computation reads them any more. */
NX_API void nx_piece_release(nx_model *, size_t n);
/* Bytes of acquired pieces that the ring can hold while it still reads ahead. */
NX_API uint64_t nx_ring_share(const nx_model *);

/* Read `n` records of `record_bytes` (record i at byte offsets[i] of the extent) into the scratch area;
 * record i is then at *base + i * *stride. Valid until the next fetch or the end of the turn. */
NX_API nx_status nx_fetch(nx_model *, nx_extent *, const uint64_t *offsets, size_t n,
                          uint64_t record_bytes, void **base, uint64_t *stride);
/* The most records that fit in the scratch area at once (0: not even one). */
NX_API size_t nx_fetch_max(const nx_model *, uint64_t record_bytes);
/* The same in two steps, and in two halves: while one is computed with, the other is read. Half 0 and
 * half 1 hold nx_fetch_max / 2 records each, of the same size (NX_E_BUSY: more are asked for). A half
 * that was started is waited for or dropped before it is started again. */
NX_API nx_status nx_fetch_start(nx_model *, nx_extent *, unsigned half, const uint64_t *offsets, size_t n,
                                uint64_t record_bytes);
NX_API nx_status nx_fetch_wait(nx_model *, unsigned half, void **base, uint64_t *stride);
/* Nothing of that half is read any more. */
NX_API void nx_fetch_drop(nx_model *, unsigned half);
/* A whole extent in memory of its own, outside of ring and scratch; free with nx_whole_free. */
NX_API nx_status nx_whole_fetch(nx_model *, nx_extent *, void **data);
NX_API void nx_whole_free(nx_extent *, void *data);

/* -- the expert cache ---------------------------------------------------------------------------- */

/* The group that an extent is cached with, and which of its parts it is; NULL: not cached. */
NX_API nx_group *nx_extent_group(const nx_extent *, uint32_t *part);
NX_API uint32_t nx_group_slots(const nx_group *);
/* Order `experts` so that first come those that can be held without evicting anything: what is there, then
 * as many others as there are free slots. Returns how many these are; the rest counts as missed. */
NX_API size_t nx_experts_favour(nx_group *, int32_t *experts, size_t n);
/* Hold the records of these experts and start to read what is missing; one that is named twice is held twice,
 * and read once. NX_E_BUSY: more than there are slots. On any error nothing is held. */
NX_API nx_status nx_experts_acquire(nx_group *, const int32_t *experts, size_t n);
/* Wait until this part of all of them is there. */
NX_API nx_status nx_experts_wait(nx_group *, uint32_t part, const int32_t *experts, size_t n);
/* In the order of arrival: of experts[*done .. n), bring those of which this part is there to the front and
 * add how many they are to *done. Waits only while there is none. */
NX_API nx_status nx_experts_next(nx_group *, uint32_t part, int32_t *experts, size_t n, size_t *done);
NX_API void nx_experts_release(nx_group *, const int32_t *experts, size_t n);
/* Where a held expert is; part `part` of slot s lies at the returned address + s * *stride. */
NX_API int32_t nx_expert_slot(const nx_group *, int32_t expert);
NX_API void *nx_group_part(const nx_group *, uint32_t part, uint64_t *stride);
/* "adaptive" (the default), "lfru", "lru", "lfu", "least-stale", or for tests "random"; NX_E_INVALID for others. */
NX_API nx_status nx_cache_set_policy(nx_model *, const char *name);

/* The router's decisions, while they are recorded: for each product with streamed experts the number of
 * its extent, of tokens and of experts a token, then the experts of each token. `on` is 2: predictions too,
 * for the first product of each layer, with their kind in the bits of the first number from 24 on. */
typedef enum {
    NX_ROUTED,         /* what the router decided */
    NX_ROUTED_GATE,    /* what the router would decide about what was known one layer before */
    NX_ROUTED_CONTROL, /* the same with what it did decide about: equal, or the computing is wrong */
} nx_routed;
NX_API void nx_routing_record(nx_model *, int on);
NX_API void nx_routing_note(nx_model *, const nx_extent *, nx_routed kind, int32_t n_tokens, int32_t n_used,
                            const int32_t *experts);
NX_API int nx_routing_recording(const nx_model *);
NX_API void nx_routing_add(nx_model *, const nx_extent *, int32_t n_tokens, int32_t n_used, const int32_t *experts);
/* Take up to `max` numbers of what was recorded (whole entries only); how many there were. An entry that
 * could not be kept for lack of memory ends the record: nx_routing_lost counts those. */
NX_API size_t nx_routing_take(nx_model *, int32_t *out, size_t max);
NX_API uint64_t nx_routing_lost(const nx_model *);

/* Account for a computation, and for a whole graph. */
NX_API void nx_note_pass(nx_model *, uint64_t ns);
NX_API void nx_note_compute(nx_model *, uint32_t first_node, uint64_t ns);

NX_API uint64_t nx_now_ns(void);
NX_API void nx_error_set(nx_error *, nx_status, int sys_errno, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
NX_API void nx_model_fail(nx_model *, const nx_error *);

/* -- interruption ------------------------------------------------------------------------------- */

/* While armed, SIGINT sets a flag at once (then runs the handler that was there): native code that
 * runs for seconds can stop although the interpreter cannot look. Nested arms are counted. */
NX_API void nx_interrupt_arm(void);
NX_API void nx_interrupt_disarm(void); /* the last one also clears the flag */
NX_API int nx_interrupted(void);
NX_API void nx_interrupt_request(void);
/* An abort callback of ggml's shape. */
NX_API _Bool nx_interrupted_callback(void *);

#ifdef __cplusplus
}
#endif
#endif
