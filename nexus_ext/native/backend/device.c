/* device.c: the NEXUS device as ggml sees it: buffer type, buffers, device, registry.
 *
 * Two faces. The registered device offers our paged buffer type as its default, so that the loader
 * offers us each CPU weight first; it accepts the tensors that the plan of the model being loaded calls
 * ram or nvme. A backend's own device is a twin whose default is the CPU's buffer type, so that
 * activations and the KV cache live in plain memory and the scheduler puts the whole graph on us.
 *
 * This file is glue: what is resident, what is read and when is decided in the core.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>

#include "walk.h"

#define PAGE 4096u
#define THREADPOOL_PARAMS_BYTES 4096 /* more than ggml_threadpool_params has in any version */

nxb_cpu nxb_delegate;
static gx_reg registry;
static gx_device device;
static gx_buft paged;
static char refusal[512];

/* What a buffer of ours is. Weights of a planned model get address space only (`model` is set): ram
 * extents are redirected to pinned memory, nvme extents get an address when a graph needs them, and an
 * access by anybody else faults instead of reading zeros. Everything else (LoRA adapters, say) gets
 * plain memory. */
typedef struct buffer {
    nx_model *model;
    uint8_t *base;
    size_t size;
    bool computing; /* a graph has run: weights can no longer be set */
    struct tensor_extent {
        const gx_tensor *tensor;
        nx_extent *extent;
    } *extents; /* hash of tensor addresses: open addressing, NULL is empty. Not in tensor->extra: some */
    size_t mask; /* CPU kernels take a tensor that has one for repacked and round differently. */
} buffer;

static bool is_ours(const gx_buffer *b) { return b && b->buft == &paged && b->context; }

static struct tensor_extent *find_slot(const buffer *own, const gx_tensor *t) {
    size_t at = ((uintptr_t)t >> 4) * 0x9E3779B97F4A7C15u >> 20 & own->mask;
    while (own->extents[at].tensor && own->extents[at].tensor != t) at = (at + 1) & own->mask;
    return &own->extents[at];
}

nx_extent *nxb_extent(const gx_tensor *t) {
    if (!is_ours(t->buffer)) return NULL;
    const buffer *own = t->buffer->context;
    return own->model ? find_slot(own, t)->extent : NULL;
}

void nxb_mark_computing(const gx_tensor *t) { ((buffer *)t->buffer->context)->computing = true; }

/* -- buffers ------------------------------------------------------------------------------------ */

static nx_model *model_being_loaded(void) {
    nx_model *m = nx_loading_get();
    return m ? m : nxb_foreign_available();
}

/* The extent that the plan of `m` has for this tensor: same name, type and shape. */
static nx_extent *planned(nx_model *m, const gx_tensor *t) {
    if (!m) return NULL;
    nx_extent *e = nx_model_find(m, t->name);
    if (!e || e->tier == NX_TIER_HOST || strcasecmp(e->type, gx.type_name(t->type)) != 0) return NULL;
    for (int i = 0; i < NX_MAX_DIMS; i++)
        if ((uint64_t)t->ne[i] != e->ne[i]) return NULL;
    return gx.nbytes(t) == e->nbytes ? e : NULL;
}

static void buffer_free(gx_buffer *b) {
    buffer *own = b->context;
    if (!own) return;
    if (own->model) {
        munmap(own->base, own->size);
        if (own->model == nxb_foreign_model()) nxb_foreign_taken(false);
        nx_model_release(own->model);
    } else {
        free(own->base);
    }
    free(own->extents);
    free(own);
}

static void *buffer_base(gx_buffer *b) { return ((buffer *)b->context)->base; }

static int buffer_init_tensor(gx_buffer *b, gx_tensor *t) {
    buffer *own = b->context;
    if (!own->model || t->view_src) return GX_SUCCESS;
    nx_extent *e = planned(own->model, t);
    if (!e) { /* somebody put a tensor here that no plan speaks of: it gets the memory it expects */
        uint8_t *begin = (uint8_t *)((uintptr_t)t->data / PAGE * PAGE);
        const size_t span = (size_t)((uint8_t *)t->data + gx.nbytes(t) - begin);
        return mprotect(begin, span, PROT_READ | PROT_WRITE) == 0 ? GX_SUCCESS : GX_ALLOC_FAILED;
    }
    *find_slot(own, t) = (struct tensor_extent){t, e};
    if (e->pinned) t->data = e->pinned;
    return nx_model_claim(own->model, e) == NX_OK ? GX_SUCCESS : GX_FAILED;
}

/* A weight of ours is what its file says, for good. */
static void refuse_write(nx_extent *e) {
    nx_error error;
    nx_error_set(&error, NX_E_UNSUPPORTED, 0, "tensor %s is paged from its file and cannot be written", e->name);
    nx_model_fail(e->model, &error);
}

static void buffer_memset(gx_buffer *b, gx_tensor *t, uint8_t value, size_t offset, size_t size) {
    (void)b;
    nx_extent *e = nxb_extent(t);
    if (e) refuse_write(e);
    else memset((char *)t->data + offset, value, size);
}

static void buffer_set(gx_buffer *b, gx_tensor *t, const void *data, size_t offset, size_t size) {
    nx_extent *e = nxb_extent(t);
    if (!e) {
        memcpy((char *)t->data + offset, data, size);
        return;
    }
    /* The loader hands over what it read, or did not read at all (stream.c): we read it ourselves. */
    if (((buffer *)b->context)->computing) refuse_write(e);
    else if (e->model == nx_loading_get()) (void)nx_model_overlay(e->model, (void *)(uintptr_t)data, e);
    else if (e->model == nxb_foreign_model() && offset == 0) nxb_foreign_set(e, data, size);
}

static void buffer_get(gx_buffer *b, const gx_tensor *t, void *data, size_t offset, size_t size) {
    (void)b;
    nx_extent *e = nxb_extent(t);
    if (!e) memcpy(data, (const char *)t->data + offset, size);
    else if (nx_model_read(e->model, e, offset, data, size) != NX_OK) memset(data, 0, size); /* noted as error */
}

static void buffer_clear(gx_buffer *b, uint8_t value) {
    buffer *own = b->context;
    if (!own->model) memset(own->base, value, own->size);
}

static const gx_buffer_i buffer_iface = {
    .free_buffer = buffer_free,
    .get_base = buffer_base,
    .init_tensor = buffer_init_tensor,
    .memset_tensor = buffer_memset,
    .set_tensor = buffer_set,
    .get_tensor = buffer_get,
    .set_tensor_2d = NULL, /* optional: ggml copies row by row */
    .get_tensor_2d = NULL,
    .cpy_tensor = NULL, /* optional: ggml goes through get and set */
    .clear = buffer_clear,
    .reset = NULL,
};

/* -- buffer type -------------------------------------------------------------------------------- */

static const char *paged_name(gx_buft *t) { (void)t; return NXB_NAME; }
static size_t paged_alignment(gx_buft *t) { (void)t; return 64; }

static gx_buffer *paged_alloc(gx_buft *t, size_t size) {
    buffer *own = calloc(1, sizeof *own);
    if (!own) return NULL;
    nx_model *m = model_being_loaded();
    own->size = size;
    if (m) {
        size_t capacity = 16;
        while (capacity < 2 * nx_model_n_extents(m)) capacity *= 2;
        own->mask = capacity - 1;
        own->extents = calloc(capacity, sizeof *own->extents);
        own->base = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (own->base == MAP_FAILED) own->base = NULL;
        if (own->base && !own->extents) {
            munmap(own->base, size);
            own->base = NULL;
        }
    } else if (posix_memalign((void **)&own->base, PAGE, size) != 0) {
        own->base = NULL;
    }
    if (!own->base) {
        free(own->extents);
        free(own);
        return NULL;
    }
    if (m) {
        nx_model_retain(m);
        own->model = m;
        if (m == nxb_foreign_model()) nxb_foreign_taken(true);
    }
    return gx.backend_buffer_init(t, buffer_iface, own, size);
}

/* Not host memory, although it often is: a loader without mmap would read weights straight into address
 * space that nothing backs, and the CPU backend could pick up nodes whose weights are not there. */
static bool paged_is_host(gx_buft *t) { (void)t; return false; }

/* -- device: the two faces ---------------------------------------------------------------------- */

static const char *device_name(gx_device *d) { (void)d; return NXB_NAME; }
static const char *device_description(gx_device *d) { (void)d; return "weights paged from disk, in front of the CPU"; }
static int device_type(gx_device *d) { (void)d; return GX_DEVICE_ACCEL; }

/* Nothing of its own: the CPU device reports the memory that this one uses. */
static void device_memory(gx_device *d, size_t *free_bytes, size_t *total_bytes) {
    (void)d;
    *free_bytes = *total_bytes = 0;
}

static void device_props(gx_device *d, gx_device_props *props) {
    props->name = device_name(d);
    props->description = device_description(d);
    props->type = device_type(d);
    props->memory_free = props->memory_total = 0;
    props->device_id = NULL;
    props->caps.async = props->caps.host_buffer = props->caps.buffer_from_host_ptr = props->caps.events = false;
}

static gx_buft *registered_buffer_type(gx_device *d) { (void)d; return &paged; }
static gx_buft *twin_buffer_type(gx_device *d) { (void)d; return gx.backend_dev_buffer_type(nxb_delegate.device); }

/* The loader asks with a weight in a buffer of ours: is it one that the plan gives us, and can the CPU
 * compute with it? Streamed weights are good for any op (graph.c), but cheap only in products. */
static bool registered_supports_op(gx_device *d, const gx_tensor *op) {
    (void)d;
    for (int s = 0; s < GX_MAX_SRC && op->src[s]; s++) {
        const gx_tensor *w = op->src[s];
        if (!w->buffer || w->buffer->buft != &paged) continue;
        nx_extent *e = planned(model_being_loaded(), w);
        if (!e || !gx.backend_dev_supports_op(nxb_delegate.device, op)) return false;
        nxb_foreign_offer(e);
        return true;
    }
    return false;
}

static bool twin_supports_op(gx_device *d, const gx_tensor *op) {
    (void)d;
    return gx.backend_dev_supports_op(nxb_delegate.device, op);
}

static bool device_supports_buft(gx_device *d, gx_buft *t) {
    (void)d;
    return t == &paged || gx.backend_dev_supports_buft(nxb_delegate.device, t);
}

static gx_backend *device_init(gx_device *d, const char *params);

static const gx_device_i registered_iface = {
    .get_name = device_name,
    .get_description = device_description,
    .get_memory = device_memory,
    .get_type = device_type,
    .get_props = device_props,
    .init_backend = device_init,
    .get_buffer_type = registered_buffer_type,
    .get_host_buffer_type = NULL,
    .buffer_from_host_ptr = NULL,
    .supports_op = registered_supports_op,
    .supports_buft = device_supports_buft,
    .offload_op = NULL,
    .event_new = NULL,
    .event_free = NULL,
    .event_synchronize = NULL,
};

/* -- backend ------------------------------------------------------------------------------------ */

static const char *backend_name(gx_backend *b) { (void)b; return NXB_NAME; }

static void drop_threadpool(nxb_backend *own) {
    if (!own->threadpool) return;
    nxb_delegate.set_threadpool(own->cpu, NULL);
    nxb_delegate.threadpool_free(own->threadpool);
    own->threadpool = NULL;
}

static void backend_free(gx_backend *b) {
    nxb_backend *own = b->context;
    drop_threadpool(own);
    gx.backend_free(own->cpu);
    gx.free(own->ctx);
    free(own->uses);
    free(own->wave_memory);
    nxb_ours_free(own);
    nxb_products_free(own);
    nxb_predictor_free(own->predictor);
    free(own);
}

static const gx_backend_i backend_iface = {
    .get_name = backend_name,
    .free = backend_free,
    .synchronize = NULL, /* graph_compute returns when all is done */
    .graph_compute = nxb_graph_compute,
};

static uint8_t guid[16] = "nexus-ext-paged";

/* Asked between two nodes, by the thread that waits for the computation. */
static bool should_abort(void *ctx) {
    nxb_backend *own = ctx;
    nxb_reads_go_on(own);
    return nx_interrupted() || (own->abort && own->abort(own->abort_ctx));
}

static gx_backend *device_init(gx_device *d, const char *params) {
    (void)params;
    if (!nxb_foreign_context()) return NULL;
    nxb_backend *own = calloc(1, sizeof *own);
    if (!own) return NULL;
    own->base = (gx_backend){.guid = guid, .iface = backend_iface, .device = &own->twin, .context = own};
    own->twin = *d;
    own->twin.iface.get_buffer_type = twin_buffer_type;
    own->twin.iface.supports_op = twin_supports_op;
    own->cpu = gx.backend_dev_init(nxb_delegate.device, NULL);
    own->ctx = gx.init((gx_init_params){.mem_size = gx.graph_overhead_custom(64, false) + 4096, .no_alloc = true});
    if (own->ctx) own->graph = gx.new_graph_custom(own->ctx, 64, false);
    if (!own->cpu || !own->graph) {
        if (own->cpu) gx.backend_free(own->cpu);
        if (own->ctx) gx.free(own->ctx);
        free(own);
        return NULL;
    }
    nxb_delegate.set_abort(own->cpu, should_abort, own);
    return &own->base;
}

/* A CPU backend without OpenMP starts its threads for every graph it computes, and we cut graphs into
 * segments: give it threads that last. */
static void set_n_threads(gx_backend *b, int n) {
    nxb_backend *own = b->context;
    nxb_delegate.set_n_threads(own->cpu, n);
    own->n_threads_asked = n;
    if (nxb_delegate.openmp || n == own->n_threads || !nxb_delegate.threadpool_new) return;
    drop_threadpool(own);
    own->n_threads = n;
    _Alignas(16) char tpp[THREADPOOL_PARAMS_BYTES];
    gx.threadpool_params_init(tpp, n);
    own->threadpool = nxb_delegate.threadpool_new(tpp);
    if (own->threadpool) nxb_delegate.set_threadpool(own->cpu, own->threadpool);
}

static void set_abort_callback(gx_backend *b, bool (*abort)(void *), void *ctx) {
    nxb_backend *own = b->context;
    own->abort = abort;
    own->abort_ctx = ctx;
}

/* -- registry ----------------------------------------------------------------------------------- */

typedef struct feature {
    const char *name, *value;
} feature;

/* The CPU device, and what of its backend is only to be had by name. It may be registered after us. */
static bool find_delegate(void) {
    if (nxb_delegate.device) return true;
    gx_device *cpu = gx.backend_dev_by_type(GX_DEVICE_CPU);
    if (!cpu) return false;
    gx_reg *reg = gx.backend_dev_backend_reg(cpu);
    nxb_cpu found = {.device = cpu};
    const struct {
        const char *name;
        void *slot;
    } wanted[] = {{"ggml_backend_set_n_threads", &found.set_n_threads},
                  {"ggml_backend_set_abort_callback", &found.set_abort},
                  {"ggml_backend_cpu_set_threadpool", &found.set_threadpool},
                  {"ggml_threadpool_new", &found.threadpool_new},
                  {"ggml_threadpool_free", &found.threadpool_free}};
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *symbol = gx.backend_reg_get_proc_address(reg, wanted[i].name);
        memcpy(wanted[i].slot, &symbol, sizeof symbol);
    }
    if (!found.set_n_threads || !found.set_abort) return false;
    feature *(*features)(gx_reg *);
    void *symbol = gx.backend_reg_get_proc_address(reg, "ggml_backend_get_features");
    memcpy(&features, &symbol, sizeof features);
    for (feature *f = features ? features(reg) : NULL; f && f->name; f++)
        if (strcmp(f->name, "OPENMP") == 0) found.openmp = true;
    nxb_delegate = found;
    return true;
}

static const char *reg_name(gx_reg *r) { (void)r; return NXB_NAME; }
static size_t reg_device_count(gx_reg *r) { (void)r; return 1; }

static gx_device *reg_device(gx_reg *r, size_t index) {
    (void)r;
    return index == 0 ? &device : NULL;
}

static void *reg_proc_address(gx_reg *r, const char *name) {
    (void)r;
    void *address = NULL;
    void (*threads)(gx_backend *, int) = set_n_threads;
    void (*abort)(gx_backend *, bool (*)(void *), void *) = set_abort_callback;
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) memcpy(&address, &threads, sizeof address);
    if (strcmp(name, "ggml_backend_set_abort_callback") == 0) memcpy(&address, &abort, sizeof address);
    return address;
}

/* Why ggml_backend_init refused, or "". */
NX_API const char *nx_backend_refusal(void) { return refusal; }

/* The one symbol that ggml looks for. */
NX_API gx_reg *ggml_backend_init(void) {
    refusal[0] = 0;
    char why[400];
    bool good = gx_resolve(__builtin_extract_return_addr(__builtin_return_address(0)), why, sizeof why) &&
                gx_self_test(why, sizeof why);
    if (good && !find_delegate()) {
        snprintf(why, sizeof why, "no CPU backend is registered, or it lacks functions that NEXUS needs");
        good = false;
    }
    if (!good) {
        snprintf(refusal, sizeof refusal, "this ggml is not compatible: %s", why);
        nxb_foreign_report("refused", refusal);
        return NULL;
    }
    if (!registry.api_version) {
        registry = (gx_reg){.api_version = GX_API_VERSION,
                            .iface = {.get_name = reg_name,
                                      .get_device_count = reg_device_count,
                                      .get_device = reg_device,
                                      .get_proc_address = reg_proc_address}};
        device = (gx_device){.iface = registered_iface, .reg = &registry};
        paged = (gx_buft){.iface = {.get_name = paged_name,
                                    .alloc_buffer = paged_alloc,
                                    .get_alignment = paged_alignment,
                                    .get_max_size = NULL,
                                    .get_alloc_size = NULL,
                                    .is_host = paged_is_host},
                          .device = &device};
    }
    nxb_foreign_report("registered", gx.version());
    (void)nxb_foreign_model(); /* before the runtime opens the file */
    return &registry;
}
