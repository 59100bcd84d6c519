/* policy.c: which records leave the cache: the question to a policy, and its answer, which is not trusted.
 *
 * The question lists what may leave, so that a policy need not know what is in use or on its way. An answer that names
 * anything else disables the policy, and lfru, which needs no state, answers the same question: no graph notices. */
#include "policy.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "cache.h"

#define HALF_LIFE 64.0 /* graphs after which half of a use is forgotten: routing/policies.py has it as well */

float nx_frequency_after(float frequency, uint64_t age) { return frequency * (float)exp2(-(double)age / HALF_LIFE); }

/* -- plugins in general ----------------------------------------------------------------------------- */

static nx_status refuse(nx_error *error, nx_status status, const char *format, ...) {
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    nx_error_set(error, status, 0, "%s", text);
    return status;
}

nx_status nx_plugin_take(const nxp_head *from, uint32_t kind, const char *what, size_t least, void *to, size_t size,
                         nx_plugin *plugin, nx_error *error) {
    memset(plugin, 0, sizeof *plugin);
    if (!from) return refuse(error, NX_E_ABI, "a %s has the address 0", what);
    /* Before anything else is looked at: in another version it may lie elsewhere. */
    if (from->api_version != NXP_API_VERSION)
        return refuse(error, NX_E_ABI,
                      "a %s was built for version %u of nexus_plugin.h and this nexus_ext has version %u: %s", what,
                      from->api_version, NXP_API_VERSION,
                      from->api_version > NXP_API_VERSION
                          ? "install a newer nexus_ext, or an older version of the plugin"
                          : "install a newer version of the plugin, or build it with nexus_ext.get_include()");
    if (from->struct_size < sizeof *from || from->kind != kind)
        return refuse(error, NX_E_ABI, "what should be a %s is another struct (%u bytes, kind %08x instead of %08x)",
                      what, from->struct_size, from->kind, kind);
    const char *name = from->name;
    if (!name || !*name || strnlen(name, sizeof plugin->info.name) == sizeof plugin->info.name)
        return refuse(error, NX_E_ABI, "a %s has no name of 1 to %zu bytes", what, sizeof plugin->info.name - 1);
    if (from->struct_size < least)
        return refuse(error, NX_E_ABI,
                      "the %s %s has a struct of %u bytes and version %u has %zu at least: build it with "
                      "nexus_ext.get_include()", what, name, from->struct_size, NXP_API_VERSION, least);
    memset(to, 0, size);
    memcpy(to, from, from->struct_size < size ? from->struct_size : size);
    memcpy(plugin->info.name, name, strlen(name) + 1);
    return NX_OK;
}

void nx_plugin_disable(nx_model *m, nx_plugin *plugin, const char *format, ...) {
    va_list args;
    va_start(args, format);
    pthread_mutex_lock(&m->lock);
    plugin->failed = true;
    plugin->info.disabled = 1;
    vsnprintf(plugin->info.why, sizeof plugin->info.why, format, args);
    pthread_mutex_unlock(&m->lock);
    va_end(args);
}

void nx_plugin_count(nx_plugin *plugin, uint64_t begin_ns) {
    (void)__atomic_fetch_add(&plugin->info.calls, 1, __ATOMIC_RELAXED);
    (void)__atomic_fetch_add(&plugin->info.ns, nx_now_ns() - begin_ns, __ATOMIC_RELAXED);
}

void nx_plugin_get(nx_model *m, const nx_plugin *plugin, nx_plugin_info *out) {
    pthread_mutex_lock(&m->lock);
    memcpy(out->name, plugin->info.name, sizeof out->name);
    memcpy(out->why, plugin->info.why, sizeof out->why);
    out->disabled = plugin->info.disabled;
    pthread_mutex_unlock(&m->lock);
    out->calls = __atomic_load_n(&plugin->info.calls, __ATOMIC_RELAXED);
    out->ns = __atomic_load_n(&plugin->info.ns, __ATOMIC_RELAXED);
}

nx_status nx_turn_borrow(nx_model *m) {
    pthread_mutex_lock(&m->lock);
    atomic_fetch_add(&m->turn_waiters, 1);
    while (m->turn && !m->closed) pthread_cond_wait(&m->turn_free, &m->lock);
    atomic_fetch_sub(&m->turn_waiters, 1);
    const bool closed = m->closed;
    if (!closed) m->turn = true;
    pthread_mutex_unlock(&m->lock);
    return closed ? NX_E_CLOSED : NX_OK;
}

/* -- life ------------------------------------------------------------------------------------------- */

static uint32_t most_slots(const nx_group *g) {
    return g->stride ? (uint32_t)(g->pool_bytes / g->stride) : g->n_slots; /* n_slots may be fewer for a while */
}

static void end_state(const nxp_cache_policy *table, void *state) {
    if (table->create && table->destroy && state) table->destroy(state);
}

/* States for all groups, or none. */
static bool begin_states(nx_model *m, const nxp_cache_policy *table, void **states) {
    for (uint32_t i = 0; i < m->n_groups; i++) {
        const nx_group *g = &m->groups[i];
        const nxp_cache_layer layer = {.struct_size = sizeof layer, .layer = g->layer,
                                       .n_layers = g->layer + m->n_groups - i, .n_experts = g->n_experts,
                                       .n_slots = most_slots(g), .record_bytes = g->stride};
        states[i] = table->create ? table->create(table->user, &layer) : table->user;
        if (states[i] || !table->create) continue;
        while (i--) end_state(table, states[i]);
        return false;
    }
    return true;
}

/* From now on this one. With the turn, or alone. */
static void put(nx_model *m, const nxp_cache_policy *table, const nx_plugin *plugin, void *const *states) {
    for (uint32_t i = 0; i < m->n_groups; i++) {
        end_state(&m->policy.table, m->groups[i].policy_state);
        m->groups[i].policy_state = states ? states[i] : NULL;
    }
    pthread_mutex_lock(&m->lock);
    m->policy.table = *table;
    m->policy.plugin = *plugin;
    pthread_mutex_unlock(&m->lock);
}

nx_status nx_policy_init(nx_model *m, nx_error *error) {
    nx_policy *p = &m->policy;
    size_t n = 1;
    for (uint32_t i = 0; i < m->n_groups; i++)
        if (m->groups[i].n_slots > n) n = m->groups[i].n_slots;
    p->experts = malloc(n * sizeof *p->experts);
    p->slots = malloc(n * sizeof *p->slots);
    p->victims = malloc(n * sizeof *p->victims);
    p->absent = malloc(n * sizeof *p->absent);
    p->taken = malloc(n * sizeof *p->taken);
    p->ages = malloc(n * sizeof *p->ages);
    p->frequencies = malloc(n * sizeof *p->frequencies);
    p->hit = malloc(n * sizeof *p->hit);
    p->scores = malloc(n * sizeof *p->scores);
    const bool there = p->experts && p->slots && p->victims && p->absent && p->taken && p->ages && p->frequencies &&
                       p->hit && p->scores;
    if (there && nx_cache_use_policy(m, &nx_policy_adaptive, NULL) == NX_OK) return NX_OK;
    nx_error_set(error, NX_E_NOMEM, ENOMEM, "no memory for the policy of %u expert caches", m->n_groups);
    return NX_E_NOMEM;
}

void nx_policy_end(nx_model *m) {
    static const nxp_cache_policy none;
    nx_plugin plugin = m->policy.plugin;
    plugin.failed = true; /* who asks after this gets the built-in, which needs no state */
    put(m, &none, &plugin, NULL);
}

void nx_policy_free(nx_model *m) {
    nx_policy *p = &m->policy;
    nx_policy_end(m);
    free(p->experts);
    free(p->slots);
    free(p->victims);
    free(p->absent);
    free(p->taken);
    free(p->ages);
    free(p->frequencies);
    free(p->hit);
    free(p->scores);
}

nx_status nx_cache_use_policy(nx_model *m, const nxp_cache_policy *policy, nx_error *error) {
    nxp_cache_policy table;
    nx_plugin plugin;
    const size_t least = offsetof(nxp_cache_policy, victims) + sizeof policy->victims;
    nx_status status = nx_plugin_take(policy ? &policy->head : NULL, NXP_CACHE_POLICY, "cache policy", least, &table,
                                      sizeof table, &plugin, error);
    if (status != NX_OK) return status;
    if (!table.victims)
        return refuse(error, NX_E_INVALID, "the cache policy %s has no function `victims`", plugin.info.name);
    status = nx_turn_borrow(m);
    if (status != NX_OK) return refuse(error, status, "the model is closed");
    void **states = malloc((m->n_groups + 1) * sizeof *states);
    if (!states || !begin_states(m, &table, states))
        status = refuse(error, NX_E_NOMEM, "the cache policy %s could not set itself up for %u layers",
                        plugin.info.name, m->n_groups);
    if (status == NX_OK) put(m, &table, &plugin, states);
    free(states);
    nx_turn_give(m);
    return status;
}

nx_status nx_cache_set_policy(nx_model *m, const char *name) {
    const nxp_cache_policy *builtin = nx_cache_builtin(name);
    return builtin ? nx_cache_use_policy(m, builtin, NULL) : NX_E_INVALID;
}

void nx_cache_policy_get(nx_model *m, nx_plugin_info *out) { nx_plugin_get(m, &m->policy.plugin, out); }

/* -- questions -------------------------------------------------------------------------------------- */

void nx_policy_used(nx_group *g, const int32_t *experts, size_t n) {
    nx_policy *p = &g->model->policy;
    if (p->plugin.failed || !p->table.used) return;
    for (size_t i = 0; i < n; i++) p->hit[i] = g->slot_of[experts[i]] >= 0;
    const nxp_cache_use use = {.struct_size = sizeof use, .n_experts = (uint32_t)n, .clock = g->clock,
                               .experts = experts, .hit = p->hit};
    const uint64_t begin = nx_now_ns();
    p->table.used(g->policy_state, &use);
    nx_plugin_count(&p->plugin, begin);
}

/* Empty slots, in order. */
static size_t empty_slots(const nx_group *g, size_t n, int32_t *slots) {
    size_t found = 0;
    for (uint32_t s = 0; s < g->n_slots && found < n; s++)
        if (g->records[s].state == NX_RECORD_EMPTY) slots[found++] = (int32_t)s;
    return found;
}

static uint32_t candidates(const nx_group *g, nx_policy *p) {
    uint32_t n = 0;
    for (uint32_t s = 0; s < g->n_slots; s++) {
        const nx_record *r = &g->records[s];
        if (!nx_record_may_leave(g, r)) continue;
        p->experts[n] = r->expert;
        p->ages[n] = g->clock - r->last_use;
        p->frequencies[n++] = nx_frequency_after(r->frequency, g->clock - r->last_use);
    }
    return n;
}

/* Is every one of them a candidate, and named once? Says what is wrong. */
static bool is_answer(nx_group *g, const int32_t *victims, uint32_t n) {
    nx_model *m = g->model;
    nx_plugin *plugin = &m->policy.plugin;
    for (uint32_t i = 0; i < n; i++) {
        const int32_t expert = victims[i];
        const int32_t slot = expert >= 0 && (uint32_t)expert < g->n_experts ? g->slot_of[expert] : -1;
        const char *wrong = NULL;
        if (expert < 0 || (uint32_t)expert >= g->n_experts) wrong = "which there is not";
        else if (slot < 0 || (uint32_t)slot >= g->n_slots) wrong = "which is not in the cache";
        else if (!nx_record_may_leave(g, &g->records[slot])) wrong = "which is in use";
        for (uint32_t k = 0; k < i && !wrong; k++)
            if (victims[k] == expert) wrong = "twice";
        if (!wrong) continue;
        nx_plugin_disable(m, plugin, "in layer %u (%u experts) it named expert %d, %s", g->layer, g->n_experts, (int)expert,
                          wrong);
        return false;
    }
    return true;
}

static void choose_victims(nx_group *g, const nxp_cache_ask *ask) {
    nx_model *m = g->model;
    nx_policy *p = &m->policy;
    if (!p->plugin.failed) {
        memset(p->victims, 0xff, ask->n_wanted * sizeof *p->victims); /* what is not written names nobody */
        const uint64_t begin = nx_now_ns();
        const int failed = p->table.victims(g->policy_state, ask, p->victims);
        nx_plugin_count(&p->plugin, begin);
        if (failed) nx_plugin_disable(m, &p->plugin, "its function `victims` failed with %d", failed);
        else if (is_answer(g, p->victims, ask->n_wanted)) return;
    }
    /* The question was the plugin's to read, and may not be what it was. */
    const nxp_cache_ask again = {.struct_size = sizeof again, .reason = ask->reason, .n_wanted = ask->n_wanted,
                                 .n_candidates = candidates(g, p), .clock = g->clock, .experts = p->experts,
                                 .ages = p->ages, .frequencies = p->frequencies, .incoming = ask->incoming};
    (void)nx_policy_lowest(nx_score_lfru, NULL, p->scores, &again, p->victims);
}

size_t nx_policy_slots(nx_group *g, nxp_cache_reason reason, const int32_t *incoming, size_t n, int32_t *slots) {
    nx_policy *p = &g->model->policy;
    const size_t n_empty = empty_slots(g, n, slots);
    if (n_empty == n) return n;
    const uint32_t n_candidates = candidates(g, p);
    const uint32_t n_wanted = n - n_empty < n_candidates ? (uint32_t)(n - n_empty) : n_candidates;
    if (!n_wanted) return n_empty;
    const nxp_cache_ask ask = {.struct_size = sizeof ask, .reason = reason, .n_wanted = n_wanted,
                               .n_candidates = n_candidates, .clock = g->clock, .experts = p->experts, .ages = p->ages,
                               .frequencies = p->frequencies, .incoming = incoming + n_empty};
    choose_victims(g, &ask);
    for (uint32_t i = 0; i < n_wanted; i++) slots[n_empty + i] = g->slot_of[p->victims[i]];
    return n_empty + n_wanted;
}
