/*
 * nx_policies.h: cache policies of plugins that do what they must not, for tests.
 */
#ifndef NX_POLICIES_H
#define NX_POLICIES_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "nexus_plugin.h"

/* Each is right for a while, so that it fails somewhere in the middle. */
typedef struct hostile {
    int kind;
    uint32_t left; /* questions until it does harm */
} hostile;

enum { NAMES_NONE, NAMES_TWICE, NAMES_BELOW, NAMES_ABOVE, NAMES_INCOMING, NAMES_HELD, FAILS, HOSTILE_KINDS };

static const char *const hostile_why[HOSTILE_KINDS] = {
    [NAMES_NONE] = "which there is not",   [NAMES_TWICE] = "twice",
    [NAMES_BELOW] = "which there is not",  [NAMES_ABOVE] = "which there is not",
    [NAMES_INCOMING] = "not in the cache", [NAMES_HELD] = "which is in use",
    [FAILS] = "failed with 7",
};

/* The last expert that a graph found in the cache: it is held while the question is asked. */
static int32_t hostile_held = -1;

static void hostile_used(void *state, const nxp_cache_use *use) {
    (void)state;
    hostile_held = -1;
    for (uint32_t i = 0; i < use->n_experts; i++)
        if (use->hit[i]) hostile_held = use->experts[i];
}

static int hostile_victims(void *state, const nxp_cache_ask *ask, int32_t *out) {
    hostile *h = state;
    for (uint32_t i = 0; i < ask->n_wanted; i++) out[i] = ask->experts[ask->n_candidates - 1 - i];
    if (h->kind == NAMES_TWICE && ask->n_wanted < 2) return 0;
    if (h->kind == NAMES_HELD && (hostile_held < 0 || ask->reason != NXP_DEMAND)) return 0;
    if (h->left && h->left--) return 0;
    int32_t *last = &out[ask->n_wanted - 1];
    switch (h->kind) {
    case NAMES_NONE: memset(out, 0xff, ask->n_wanted * sizeof *out); break;
    case NAMES_TWICE: *last = out[0]; break;
    case NAMES_BELOW: *last = INT32_MIN; break;
    case NAMES_ABOVE: *last = 1 << 20; break;
    case NAMES_INCOMING: *last = ask->incoming[0]; break;
    case NAMES_HELD: *last = hostile_held; break;
    case FAILS: return 7;
    }
    return 0;
}

static nxp_cache_policy hostile_policy(hostile *h) {
    nxp_cache_policy p = {.head = NXP_HEAD(nxp_cache_policy, NXP_CACHE_POLICY, "hostile"), .user = h,
                          .used = hostile_used, .victims = hostile_victims};
    return p;
}

#endif
