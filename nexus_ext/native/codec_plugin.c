/* codec_plugin.c: codecs of plugins, by the names that files know them by. Process-wide; what was registered stays. */
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "chunks.h"
#include "core_internal.h"

#define MAX_CODECS 32u

typedef struct codec {
    nxp_codec table;
    const nxp_codec *from;
    char name[64];
    bool gated;
    atomic_uint registered; /* a number that grows: of one name the highest is meant */
} codec;

/* Written before `n_codecs` says so, and but for `registered` never changed after: readers need no lock. */
static codec codecs[MAX_CODECS];
static atomic_uint n_codecs, n_registered;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
/* How many are inside a gated one, and whether anybody may still go in. */
static pthread_cond_t gate_free = PTHREAD_COND_INITIALIZER;
static unsigned n_inside;
static bool gate_closed;

nx_status nx_codec_register(const nxp_codec *from, int gated, nx_error *error) {
    static const size_t least = offsetof(nxp_codec, decode) + sizeof from->decode;
    nxp_codec table;
    nx_plugin plugin;
    nx_status status = nx_plugin_take(from ? &from->head : NULL, NXP_CODEC, "codec", least, &table, sizeof table, &plugin,
                                      error);
    if (status == NX_OK && !table.decode) {
        nx_error_set(error, NX_E_INVALID, 0, "the codec %s has no function `decode`", plugin.info.name);
        status = NX_E_INVALID;
    }
    if (status != NX_OK) return status;
    pthread_mutex_lock(&lock);
    const unsigned n = atomic_load(&n_codecs);
    const unsigned number = atomic_fetch_add(&n_registered, 1) + 1;
    bool known = false;
    for (unsigned i = 0; i < n && !known; i++) {
        known = codecs[i].from == from && strcmp(codecs[i].name, plugin.info.name) == 0;
        if (known) atomic_store(&codecs[i].registered, number);
    }
    if (!known && n == MAX_CODECS) {
        nx_error_set(error, NX_E_NOMEM, 0, "%u codecs of plugins are in use, there is no room for %s", n, plugin.info.name);
        status = NX_E_NOMEM;
    } else if (!known) {
        codec *c = &codecs[n];
        c->table = table;
        c->from = from;
        c->gated = gated != 0;
        memcpy(c->name, plugin.info.name, sizeof c->name);
        atomic_store(&c->registered, number);
        atomic_store(&n_codecs, n + 1);
    }
    pthread_mutex_unlock(&lock);
    return status;
}

int nx_codec_find(const char *name, nx_codec *out) {
    static const char *const builtin[] = {"raw", "ans", "zstd"};
    for (int i = 0; i < 3; i++)
        if (strcmp(builtin[i], name) == 0) {
            *out = (nx_codec)i;
            return 1;
        }
    const unsigned n = atomic_load(&n_codecs);
    unsigned latest = 0;
    for (unsigned i = 0; i < n; i++) {
        const unsigned registered = atomic_load(&codecs[i].registered);
        if (strcmp(codecs[i].name, name) != 0 || registered < latest) continue;
        latest = registered;
        *out = (nx_codec)(NX_CODEC_PLUGIN + i);
    }
    return latest != 0;
}

const char *nx_codec_plugin_name(nx_codec number) {
    const unsigned i = (unsigned)number - NX_CODEC_PLUGIN;
    return i < atomic_load(&n_codecs) ? codecs[i].name : NULL;
}

static bool go_in(void) {
    pthread_mutex_lock(&lock);
    const bool open = !gate_closed;
    n_inside += open;
    pthread_mutex_unlock(&lock);
    return open;
}

static void come_out(void) {
    pthread_mutex_lock(&lock);
    n_inside--;
    pthread_cond_broadcast(&gate_free);
    pthread_mutex_unlock(&lock);
}

nx_status nx_codec_plugin_decode(nx_codec number, const void *stored, size_t stored_bytes, void *raw, size_t raw_bytes) {
    const unsigned i = (unsigned)number - NX_CODEC_PLUGIN;
    if (i >= atomic_load(&n_codecs)) return NX_E_UNSUPPORTED;
    const codec *c = &codecs[i];
    if (c->gated && !go_in()) return NX_E_CLOSED;
    const int failed = c->table.decode(c->table.user, stored, stored_bytes, raw, raw_bytes);
    if (c->gated) come_out();
    return failed ? NX_E_DAMAGED : NX_OK;
}

void nx_codec_gate(int open) {
    pthread_mutex_lock(&lock);
    gate_closed = !open;
    while (gate_closed && n_inside) pthread_cond_wait(&gate_free, &lock);
    pthread_mutex_unlock(&lock);
}
