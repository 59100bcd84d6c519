/*
 * test_cache.c: records of experts are whole while they are held, whatever is asked for, in whatever
 * order, under every policy, when reads fail and when graphs are stopped; and nothing stays in use.
 */
#include <errno.h>

#include "cache.h"
#include "nx_consumer.h"
#include "nx_policies.h"

#define GROUPS 4
#define HELD 6

static world cache_world;

/* Parts of records: aligned to pages and not, in one file and in two; a single part, four parts. */
static const struct {
    uint32_t n_experts, n_slots, n_parts;
    uint64_t row_bytes, rows; /* of one expert */
    uint64_t offset;
} kinds[GROUPS] = {
    {8, 3, 3, 512, 24, 4096},
    {2, 1, 1, 1000, 7, 400001},
    {37, 9, 2, 333, 11, 450017},
    {5, 5, 4, 4096, 2, 900000 / 4096 * 4096},
};

static nx_model *cache_open(bool direct) {
    world_init(&cache_world, 2, 1500000, 23);
    world_manifest(&cache_world, 0, 0, 100000, 0, direct);
    size_t number = 0, first[GROUPS];
    for (size_t g = 0; g < GROUPS; g++) {
        first[g] = number;
        for (uint32_t p = 0; p < kinds[g].n_parts; p++, number++) {
            char name[32];
            snprintf(name, sizeof name, "blk.%zu.part.%u", g, p);
            const uint64_t rows = kinds[g].rows + p; /* parts of a record differ in size */
            world_tensor(&cache_world, "nvme", p % 2, kinds[g].offset + p / 2 * kinds[g].n_experts * 14000,
                         kinds[g].row_bytes, rows, kinds[g].n_experts, 0, name);
        }
    }
    for (size_t g = 0; g < GROUPS; g++) {
        char line[64];
        int n = snprintf(line, sizeof line, "experts %u", kinds[g].n_slots);
        for (uint32_t p = 0; p < kinds[g].n_parts; p++)
            n += snprintf(line + n, sizeof line - (size_t)n, " %zu", first[g] + p);
        world_line(&cache_world, "%s", line);
    }
    nx_model *m = world_open(&cache_world, "", 0);
    NX_CHECK_EQ(m->n_groups, GROUPS);
    return m;
}

static void cache_close(nx_model *m) {
    nx_model_release(m);
    world_free(&cache_world);
}

/* ------------------------------------------------------------ what is held */

typedef struct holding {
    nx_group *group;
    int32_t experts[64];
    size_t n;
    bool ready[NX_MAX_PARTS];
} holding;

typedef struct fuzz {
    nx_model *m;
    uint64_t seed;
    holding held[HELD];
    size_t n_held;
    uint64_t stop_one_in; /* 0: never */
    uint64_t uses;
} fuzz;

static uint64_t any(fuzz *f, uint64_t n) { return nx_test_random(&f->seed) % n; }

static int stops(void *ctx) {
    fuzz *f = ctx;
    return f->stop_one_in && any(f, f->stop_one_in) == 0;
}

static uint64_t record_bytes(const nx_extent *e) { return e->nbytes / e->ne[2]; }

static bool is_whole(const nx_group *group, uint32_t part, int32_t expert) {
    const nx_extent *e = group->part[part];
    uint64_t stride;
    const uint8_t *base = nx_group_part(group, part, &stride);
    const int32_t slot = nx_expert_slot(group, expert);
    NX_CHECK(slot >= 0 && (uint32_t)slot < group->n_slots);
    return world_same(&cache_world, e, (uint64_t)expert * record_bytes(e), base + (uint64_t)slot * stride,
                      record_bytes(e));
}

/* What is ready and held is byte by byte what the files say; maps agree; holds are counted. */
static void check(const fuzz *f) {
    for (size_t i = 0; i < f->n_held; i++) {
        const holding *h = &f->held[i];
        for (uint32_t p = 0; p < h->group->n_parts; p++) {
            if (!h->ready[p]) continue;
            for (size_t k = 0; k < h->n; k++) NX_CHECK(is_whole(h->group, p, h->experts[k]));
        }
    }
    for (uint32_t g = 0; g < f->m->n_groups; g++) {
        const nx_group *group = &f->m->groups[g];
        uint32_t in_use[64] = {0}, n_cached = 0;
        for (size_t i = 0; i < f->n_held; i++)
            for (size_t k = 0; f->held[i].group == group && k < f->held[i].n; k++)
                in_use[f->held[i].experts[k]]++;
        for (uint32_t s = 0; s < group->n_slots; s++) {
            const nx_record *r = &group->records[s];
            NX_CHECK((r->expert < 0) == (r->state == NX_RECORD_EMPTY));
            NX_CHECK_EQ(r->in_use, r->expert < 0 ? 0 : in_use[r->expert]);
            if (r->expert >= 0) NX_CHECK_EQ(group->slot_of[r->expert], s);
        }
        for (uint32_t e = 0; e < group->n_experts; e++) {
            if (in_use[e]) NX_CHECK(group->slot_of[e] >= 0);
            n_cached += group->slot_of[e] >= 0;
        }
        NX_CHECK(n_cached <= group->n_slots);
    }
}

static void release_one(fuzz *f, size_t i) {
    check(f);
    const holding h = f->held[i];
    f->held[i] = f->held[--f->n_held];
    nx_experts_release(h.group, h.experts, h.n);
    check(f);
}

/* In the order of arrival: what is named as there is whole, and all are named once. */
static nx_status take_in_order(fuzz *f, holding *h, uint32_t part) {
    int32_t before[64];
    memcpy(before, h->experts, sizeof before);
    for (size_t done = 0, first = 0; done < h->n; first = done) {
        const nx_status status = nx_experts_next(h->group, part, h->experts, h->n, &done);
        if (status != NX_OK) return status;
        NX_CHECK(done > first && done <= h->n);
        for (size_t k = first; k < done; k++) NX_CHECK(is_whole(h->group, part, h->experts[k]));
        if (any(f, 4) == 0) check(f);
    }
    for (size_t k = 0; k < h->n; k++) {
        size_t found = 0;
        for (size_t i = 0; i < h->n; i++) found += h->experts[i] == before[k];
        NX_CHECK_EQ(found, 1);
    }
    return NX_OK;
}

/* A decision: hold, wait part by part, or give up somewhere in between. */
static nx_status decide(fuzz *f) {
    holding *h = &f->held[f->n_held];
    *h = (holding){.group = &f->m->groups[any(f, f->m->n_groups)]};
    const nx_group *g = h->group;
    h->n = 1 + any(f, g->n_slots + 1 < g->n_experts ? g->n_slots + 1 : g->n_experts);
    int32_t all[64];
    for (uint32_t e = 0; e < g->n_experts; e++) all[e] = (int32_t)e;
    for (uint32_t k = 0; k < h->n; k++) {
        /* Some experts are more popular than others. */
        const uint64_t a = any(f, g->n_experts - k), b = any(f, g->n_experts - k), at = k + (a < b ? a : b);
        h->experts[k] = all[at];
        all[at] = all[k];
    }
    size_t elsewhere = 0; /* slots that others hold with other experts */
    for (uint32_t s = 0; s < g->n_slots; s++) {
        bool wanted = false;
        for (size_t k = 0; k < h->n; k++) wanted = wanted || g->records[s].expert == h->experts[k];
        elsewhere += g->records[s].in_use && !wanted;
    }
    nx_status status = nx_experts_acquire(h->group, h->experts, h->n);
    if (h->n + elsewhere > g->n_slots) {
        NX_CHECK(status == NX_E_BUSY || (f->stop_one_in && status == NX_E_ABORTED));
        check(f);
        return status == NX_E_BUSY ? NX_OK : status;
    }
    if (status != NX_OK) {
        NX_CHECK_EQ(status, NX_E_ABORTED);
        check(f);
        return status;
    }
    f->uses += h->n;
    f->n_held++;
    check(f);
    for (uint32_t p = 0; p < g->n_parts; p++) {
        if (any(f, 20) == 0) break; /* not everything that is asked for is used */
        status = any(f, 2) ? take_in_order(f, h, p) : nx_experts_wait(h->group, p, h->experts, h->n);
        if (status != NX_OK) return status;
        h->ready[p] = true;
        check(f);
    }
    return NX_OK;
}

static nx_status graph(fuzz *f) {
    nx_status status = nx_turn_begin(f->m, NULL, 0, stops, f);
    NX_CHECK_EQ(status, NX_OK);
    for (size_t k = 0; k < 12 && status == NX_OK; k++) {
        if (f->n_held == HELD || (f->n_held && any(f, 2))) release_one(f, any(f, f->n_held));
        else status = decide(f);
    }
    while (f->n_held) release_one(f, any(f, f->n_held));
    nx_turn_end(f->m, status != NX_OK);
    check(f);
    return status;
}

static void check_nothing_in_use(const nx_model *m) {
    for (uint32_t g = 0; g < m->n_groups; g++)
        for (uint32_t s = 0; s < m->groups[g].n_slots; s++) NX_CHECK_EQ(m->groups[g].records[s].in_use, 0);
}

/* ------------------------------------------------------------ tests */

static const char *const policies[] = {"adaptive", "lfru", "lru", "lfu", "least-stale", "random"};

static void whole(bool direct) {
    nx_model *m = cache_open(direct);
    fuzz f = {.m = m, .seed = 1};
    for (size_t k = 0; k < ROUNDS * 6; k++) {
        NX_CHECK_EQ(nx_cache_set_policy(m, policies[k % 6]), NX_OK);
        NX_CHECK_EQ(graph(&f), NX_OK);
    }
    nx_stats s;
    nx_model_get_stats(m, &s);
    NX_CHECK_EQ(s.expert_uses, f.uses);
    NX_CHECK(s.expert_misses > 0 && s.expert_misses < s.expert_uses && s.expert_evictions > 0);
    NX_CHECK(s.expert_evictions <= s.expert_misses);
    NX_CHECK_EQ(nx_cache_set_policy(m, "no such policy"), NX_E_INVALID);
    check_nothing_in_use(m);
    cache_close(m);
}

static void records_are_whole_while_they_are_held(void) { world_for_each(whole); }

/* Whatever a policy answers: what is held stays whole, and the built-in goes on from there. */
static void against(bool direct) {
    nx_model *m = cache_open(direct);
    fuzz f = {.m = m, .seed = 11};
    for (int kind = 0; kind < HOSTILE_KINDS; kind++) {
        nx_plugin_info info = {0};
        for (uint32_t round = 0; round < ROUNDS && !info.disabled; round++) {
            hostile h = {.kind = kind, .left = round % 3};
            const nxp_cache_policy policy = hostile_policy(&h);
            NX_CHECK_EQ(nx_cache_use_policy(m, &policy, NULL), NX_OK);
            for (size_t k = 0; k < 20 && !info.disabled; k++) {
                NX_CHECK_EQ(graph(&f), NX_OK);
                nx_cache_policy_get(m, &info);
            }
            const uint64_t calls = info.calls;
            if (info.disabled) NX_CHECK_EQ(graph(&f), NX_OK);
            nx_cache_policy_get(m, &info);
            if (info.disabled) NX_CHECK_EQ(info.calls, calls); /* it is not asked again */
        }
        NX_CHECK(info.disabled && strcmp(info.name, "hostile") == 0);
        nx_test_about("%s", info.why);
        NX_CHECK(strstr(info.why, hostile_why[kind]) != NULL);
        NX_CHECK_EQ(nx_cache_set_policy(m, "adaptive"), NX_OK); /* what `h` was is gone */
        nx_cache_policy_get(m, &info);
        NX_CHECK(!info.disabled && !info.why[0]);
    }
    check_nothing_in_use(m);
    cache_close(m);
}

static void records_are_whole_whatever_a_policy_answers(void) { world_for_each(against); }

static void faulty(bool direct) {
    nx_model *m = cache_open(direct);
    fuzz f = {.m = m, .seed = 2};
    size_t n_failed = 0;
    /* What fails depends on what is cached and on what arrives when: as long as it takes. */
    for (size_t k = 0; k < ROUNDS * (n_failed ? 8 : 80); k++) {
        NX_CHECK_EQ(nx_cache_set_policy(m, policies[any(&f, 5)]), NX_OK);
        const uint64_t begin = any(&f, 1400000), end = begin + 1 + any(&f, 200000);
        const int32_t count = any(&f, 2) ? -1 : 1 + (int32_t)any(&f, 9);
        fault(m, any(&f, 3) ? NX_FAULT_EIO : NX_FAULT_SHORT, begin, end, count);
        const nx_status status = graph(&f);
        NX_CHECK(status == NX_OK || status == NX_E_IO);
        const nx_error error = last_error(m);
        NX_CHECK_EQ(error.status, status);
        if (status != NX_OK) NX_CHECK(error.sys_errno == EIO && error.tensor[0] && error.path[0]);
        n_failed += status != NX_OK;
        nx_model_clear_faults(m);
        NX_CHECK_EQ(graph(&f), NX_OK); /* what failed is read again */
    }
    NX_CHECK(n_failed > 0);
    check_nothing_in_use(m);
    cache_close(m);
}

static void a_record_that_failed_is_not_handed_out_and_is_read_again(void) { world_for_each(faulty); }

static void stopped(bool direct) {
    nx_model *m = cache_open(direct);
    fuzz f = {.m = m, .seed = 3};
    size_t n_stopped = 0;
    for (size_t k = 0; k < ROUNDS * 8; k++) {
        NX_CHECK_EQ(nx_cache_set_policy(m, policies[any(&f, 5)]), NX_OK);
        f.stop_one_in = 1 + any(&f, 20);
        const bool failing = any(&f, 2);
        if (failing) fault(m, NX_FAULT_EIO, any(&f, 1400000), UINT64_MAX, -1);
        const nx_status status = graph(&f);
        NX_CHECK(status == NX_OK || status == NX_E_ABORTED || (failing && status == NX_E_IO));
        n_stopped += status == NX_E_ABORTED;
        f.stop_one_in = 0;
        nx_model_clear_error(m);
        if (failing) { /* what nobody waits for any more fails by itself */
            const nx_status again = graph(&f);
            NX_CHECK(again == NX_OK || again == NX_E_IO);
            nx_model_clear_faults(m);
            nx_model_clear_error(m);
        }
        NX_CHECK_EQ(graph(&f), NX_OK);
    }
    NX_CHECK(n_stopped > 0 || !direct); /* what is in the page cache is there at once */
    check_nothing_in_use(m);
    f.stop_one_in = 1; /* freed while reads are in flight */
    (void)graph(&f);
    cache_close(m);
}

static void a_graph_that_is_stopped_leaves_nothing_in_use(void) { world_for_each(stopped); }

/* Reading fails after the graph that asked for it was stopped: nobody has seen it fail. */
static void unseen(bool direct) {
    nx_model *m = cache_open(direct);
    nx_group *g = &m->groups[0];
    const int32_t experts[] = {6, 1};
    int calls = 0;
    fault(m, NX_FAULT_EIO, 0, UINT64_MAX, -1);
    NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, always, &calls), NX_OK);
    NX_CHECK_EQ(nx_experts_acquire(g, experts, 2), NX_OK);
    const nx_status status = nx_experts_wait(g, 0, experts, 2);
    NX_CHECK(status == NX_E_ABORTED || status == NX_E_IO);
    nx_experts_release(g, experts, 2);
    nx_turn_end(m, 1);
    for (int32_t s = 0; s < 2; s++)
        for (uint32_t p = 0; p < g->n_parts; p++)
            if (g->records[s].expert >= 0) (void)nx_io_wait(m->io, &g->records[s].reads[p], NULL, NULL);
    nx_model_clear_faults(m);
    nx_model_clear_error(m);
    fuzz f = {.m = m, .seed = 4};
    NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, never, NULL), NX_OK);
    f.held[f.n_held++] = (holding){.group = g, .experts = {6, 1}, .n = 2};
    NX_CHECK_EQ(nx_experts_acquire(g, experts, 2), NX_OK);
    for (uint32_t p = 0; p < g->n_parts; p++) {
        NX_CHECK_EQ(nx_experts_wait(g, p, experts, 2), NX_OK);
        f.held[0].ready[p] = true;
    }
    release_one(&f, 0);
    nx_turn_end(m, 0);
    cache_close(m);
}

static void a_failure_that_nobody_saw_does_not_fail_the_next_graph(void) { world_for_each(unseen); }

static void favours(bool direct) {
    nx_model *m = cache_open(direct);
    nx_group *g = &m->groups[2]; /* 37 experts, 9 slots */
    nx_stats s;
    for (size_t cached = 0; cached <= g->n_slots; cached += 3) {
        NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, never, NULL), NX_OK);
        int32_t have[9], wanted[20];
        for (size_t i = 0; i < cached; i++) have[i] = 36 - (int32_t)i;
        NX_CHECK_EQ(nx_experts_acquire(g, have, cached), NX_OK);
        for (uint32_t p = 0; p < g->n_parts; p++) NX_CHECK_EQ(nx_experts_wait(g, p, have, cached), NX_OK);
        nx_experts_release(g, have, cached);
        for (size_t i = 0; i < 20; i++) wanted[i] = (int32_t)(i < 15 ? i : 17 + i); /* 0 to 14, 32 to 36 */
        const size_t n_there = cached < 5 ? cached : 5, n_free = 9 - cached;
        nx_model_reset_stats(m);
        NX_CHECK_EQ(nx_experts_favour(g, wanted, 20), n_there + n_free);
        nx_model_get_stats(m, &s);
        NX_CHECK(s.expert_uses == 20 - n_there - n_free && s.expert_misses == s.expert_uses);
        uint64_t seen = 0;
        for (size_t i = 0; i < 20; i++) seen |= UINT64_C(1) << wanted[i];
        NX_CHECK(seen == (UINT64_C(0x7fff) | UINT64_C(31) << 32)); /* the same, in another order */
        for (size_t i = 0; i < n_there; i++) NX_CHECK(nx_expert_slot(g, wanted[i]) >= 0);
        NX_CHECK_EQ(nx_experts_acquire(g, wanted, n_there + n_free), NX_OK);
        nx_model_get_stats(m, &s);
        NX_CHECK_EQ(s.expert_evictions, 0);
        nx_experts_release(g, wanted, n_there + n_free);
        nx_turn_end(m, 0);
        cache_close(m);
        m = cache_open(direct);
        g = &m->groups[2];
    }
    cache_close(m);
}

static void what_can_be_held_without_eviction_comes_first(void) { world_for_each(favours); }

/* ------------------------------------------------------------ scratch in halves */

static void halves(bool direct) {
    nx_model *m = cache_open(direct);
    nx_extent *e = nx_model_extent(m, 0);
    const uint64_t bytes = record_bytes(e);
    const size_t most = nx_fetch_max(m, bytes) / 2;
    NX_CHECK(most >= 2);
    fuzz f = {.m = m, .seed = 6};
    for (size_t k = 0; k < ROUNDS * 4; k++) {
        uint64_t offsets[2][64];
        size_t n[2] = {0, 0};
        f.stop_one_in = k % 3 == 1 ? 3 : 0;
        if (k % 3 == 2) fault(m, NX_FAULT_EIO, e->offset + any(&f, e->nbytes), UINT64_MAX, -1);
        NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, stops, &f), NX_OK);
        nx_status status = NX_OK;
        for (unsigned half = 0, i = 0; i < 9 && status == NX_OK; i++, half = 1 - half) {
            if (n[half]) {
                void *base;
                uint64_t stride;
                status = nx_fetch_wait(m, half, &base, &stride);
                for (int again = 0; again < 2 && status == NX_OK; again++) /* while the other is read */
                    for (size_t r = 0; r < n[half]; r++)
                        NX_CHECK(world_same(&cache_world, e, offsets[half][r], (uint8_t *)base + r * stride, bytes));
                n[half] = 0;
                if (status != NX_OK) break;
            }
            n[half] = 1 + any(&f, most);
            for (size_t r = 0; r < n[half]; r++) offsets[half][r] = any(&f, e->ne[2]) * bytes;
            NX_CHECK_EQ(nx_fetch_start(m, e, half, offsets[half], most + 1, bytes), NX_E_BUSY);
            NX_CHECK_EQ(nx_fetch_start(m, e, half, offsets[half], n[half], bytes), NX_OK);
            NX_CHECK_EQ(nx_fetch_start(m, e, half, offsets[half], n[half], bytes), NX_E_BUSY);
        }
        NX_CHECK(status == NX_OK || (k % 3 == 1 && status == NX_E_ABORTED) || (k % 3 == 2 && status == NX_E_IO));
        nx_fetch_drop(m, 0);
        nx_fetch_drop(m, 1);
        nx_turn_end(m, status != NX_OK);
        nx_model_clear_faults(m);
        nx_model_clear_error(m);
    }
    NX_CHECK_EQ(nx_fetch_start(m, e, 2, NULL, 0, bytes), NX_E_INVALID);
    cache_close(m);
}

static void one_half_of_the_scratch_area_is_read_while_the_other_is_used(void) { world_for_each(halves); }

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(records_are_whole_while_they_are_held),
        NX_TEST(records_are_whole_whatever_a_policy_answers),
        NX_TEST(a_record_that_failed_is_not_handed_out_and_is_read_again),
        NX_TEST(a_graph_that_is_stopped_leaves_nothing_in_use),
        NX_TEST(a_failure_that_nobody_saw_does_not_fail_the_next_graph),
        NX_TEST(what_can_be_held_without_eviction_comes_first),
        NX_TEST(one_half_of_the_scratch_area_is_read_while_the_other_is_used),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
