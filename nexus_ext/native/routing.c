/* routing.c: what the routers of a model decided, kept until somebody takes it (traces, replay). */
#include <stdlib.h>
#include <string.h>

#include "core_internal.h"

#define ENTRY_HEAD 3                   /* extent, tokens, experts a token */
#define MOST_NUMBERS ((size_t)64 << 20) /* 256 MiB: a trace that nobody takes does not eat the machine */

void nx_routing_record(nx_model *m, int on) {
    atomic_store(&m->routing.on, on);
}

int nx_routing_recording(const nx_model *m) {
    return atomic_load_explicit(&m->routing.on, memory_order_relaxed);
}

void nx_routing_add(nx_model *m, const nx_extent *e, int32_t n_tokens, int32_t n_used, const int32_t *experts) {
    nx_routing_note(m, e, NX_ROUTED, n_tokens, n_used, experts);
}

void nx_routing_note(nx_model *m, const nx_extent *e, nx_routed kind, int32_t n_tokens, int32_t n_used,
                     const int32_t *experts) {
    nx_routing *r = &m->routing;
    pthread_mutex_lock(&m->lock);
    if (r->on) {
        const size_t n = (size_t)n_tokens * (size_t)n_used, wanted = r->n + ENTRY_HEAD + n;
        if (wanted > r->capacity && wanted <= MOST_NUMBERS) {
            const size_t capacity = wanted > 2 * r->capacity ? wanted : 2 * r->capacity;
            int32_t *numbers = realloc(r->numbers, capacity * sizeof *numbers);
            if (numbers) {
                r->numbers = numbers;
                r->capacity = capacity;
            }
        }
        if (wanted <= r->capacity) {
            const int32_t head[ENTRY_HEAD] = {(int32_t)(e - m->extents) | (int32_t)kind << 24, n_tokens, n_used};
            memcpy(r->numbers + r->n, head, sizeof head);
            memcpy(r->numbers + r->n + ENTRY_HEAD, experts, n * sizeof *experts);
            r->n = wanted;
        } else {
            r->lost++;
        }
    }
    pthread_mutex_unlock(&m->lock);
}

size_t nx_routing_take(nx_model *m, int32_t *out, size_t max) {
    nx_routing *r = &m->routing;
    pthread_mutex_lock(&m->lock);
    size_t n = 0;
    while (n + ENTRY_HEAD <= r->n) {
        const size_t entry = ENTRY_HEAD + (size_t)r->numbers[n + 1] * (size_t)r->numbers[n + 2];
        if (n + entry > max) break;
        n += entry;
    }
    if (n) {
        memcpy(out, r->numbers, n * sizeof *out);
        memmove(r->numbers, r->numbers + n, (r->n - n) * sizeof *out);
        r->n -= n;
    }
    pthread_mutex_unlock(&m->lock);
    return n;
}

uint64_t nx_routing_lost(const nx_model *m) { return m->routing.lost; }
