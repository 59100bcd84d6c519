#include "nexus_core.h"

typedef struct nx_model nx_model;

typedef struct {
    nx_status status;
    int sys_errno;
    uint64_t offset, nbytes;
    char path[512];
    char tensor[128];
    char text[256];
} nx_error;

typedef struct {
    uint64_t passes;
    uint64_t segments;
    uint64_t bytes_read;
    uint64_t bytes_loaded;
    uint64_t bytes_used;
    uint64_t pieces, pieces_ready;
    uint64_t pieces_dropped;
    uint64_t demand_reads;
    uint64_t whole_tensors;
    uint64_t wait_ns;
    uint64_t compute_ns;
    uint64_t pass_ns;
    uint64_t load_ns;
    uint64_t retries, short_reads, bounces;
    uint64_t expert_uses, expert_misses, expert_evictions;
    uint64_t prefetched, prefetch_used, prefetch_wasted;
    uint64_t preloaded, idle_ns, predict_ns;
    uint64_t pinned_bytes, ring_bytes, scratch_bytes, host_bytes, cache_bytes;
    uint64_t bounce_bytes, stored_bytes, raw_bytes, decode_ns;
} nx_stats;

#define NX_EVENT_PASS_BEGIN ...
#define NX_EVENT_PASS_END ...
#define NX_EVENT_ISSUE ...
#define NX_EVENT_WAIT ...
#define NX_EVENT_COMPUTE ...
#define NX_EVENT_DEMAND ...
#define NX_EVENT_DROP ...

typedef struct {
    uint64_t t_ns;
    uint32_t kind;
    uint32_t a;
    uint64_t b;
} nx_event;

nx_status nx_model_create(const char *manifest, size_t manifest_bytes, const void *header,
                          size_t header_bytes, nx_model **out, nx_error *error);
void nx_model_release(nx_model *);
nx_status nx_model_finish_load(nx_model *, int (*progress)(void *, uint64_t, uint64_t), void *ctx);
void nx_model_close(nx_model *);
void nx_model_get_stats(nx_model *, nx_stats *);
void nx_model_reset_stats(nx_model *);
const char *nx_model_io_engine(const nx_model *);
nx_status nx_model_file_info(const nx_model *, uint32_t file, nx_file_info *);
void nx_model_trace(nx_model *, int on);
size_t nx_model_events(nx_model *, nx_event *out, size_t max);
void nx_model_last_error(nx_model *, nx_error *);
void nx_model_clear_error(nx_model *);
nx_status nx_model_inject(nx_model *, const nx_fault *);
void nx_model_clear_faults(nx_model *);
FILE *nx_model_stream(nx_model *, int *has_descriptor);
void nx_model_stream_close(FILE *);
void nx_loading_set(nx_model *);
nx_status nx_cache_set_policy(nx_model *, const char *name);
void nx_routing_record(nx_model *, int on);
size_t nx_routing_take(nx_model *, int32_t *out, size_t max);
uint64_t nx_routing_lost(const nx_model *);

void nx_interrupt_arm(void);
void nx_interrupt_disarm(void);
int nx_interrupted(void);
void nx_interrupt_request(void);

extern "Python" int nx_python_progress(void *, uint64_t, uint64_t);
_Bool nx_interrupted_callback(void *);
