/*
 * test_predict.c: records that are read ahead are whole when they are used, are given up when they are
 * stale, take no slot from anything in use, and are counted; prediction is switched on when it helps.
 */
#include <errno.h>

#include "nx_consumer.h"
#include "predict.h"

#define EXPERTS 24
#define SLOTS 7
#define PARTS 3
#define GROUPS 2
#define ROWS 16
#define ROW_BYTES 512

static world here;

static nx_model *open_model(bool direct) {
    world_init(&here, 2, 1500000, 31);
    world_manifest(&here, 0, 0, 100000, 0, direct);
    for (size_t g = 0; g < GROUPS; g++)
        for (size_t p = 0; p < PARTS; p++) {
            char name[32];
            snprintf(name, sizeof name, "blk.%zu.part.%zu", g, p);
            world_tensor(&here, "nvme", p % 2, 4096 + (g * PARTS + p) * 220000, ROW_BYTES, ROWS, EXPERTS, 0, name);
        }
    world_line(&here, "experts %d 0 1 2", SLOTS);
    world_line(&here, "experts %d 3 4 5", SLOTS);
    return world_open(&here, "", 0);
}

static void close_model(nx_model *m) {
    nx_model_release(m);
    world_free(&here);
}

static void check_record(const nx_group *g, int32_t expert) {
    const int32_t slot = nx_expert_slot(g, expert);
    NX_CHECK(slot >= 0);
    for (uint32_t p = 0; p < PARTS; p++) {
        uint64_t stride;
        const uint8_t *base = nx_group_part(g, p, &stride);
        NX_CHECK(world_same(&here, g->part[p], (uint64_t)expert * ROWS * ROW_BYTES, base + (uint64_t)slot * stride,
                            ROWS * ROW_BYTES));
    }
}

static nx_status use(nx_group *g, const int32_t *experts, size_t n) {
    nx_status status = nx_experts_acquire(g, experts, n);
    if (status != NX_OK) return status;
    for (uint32_t p = 0; p < PARTS && status == NX_OK; p++) status = nx_experts_wait(g, p, experts, n);
    for (size_t i = 0; i < n && status == NX_OK; i++) check_record(g, experts[i]);
    nx_experts_release(g, experts, n);
    return status;
}

static void let_arrive(nx_model *m, nx_group *g, const int32_t *experts, size_t n) {
    for (size_t i = 0; i < n; i++)
        for (uint32_t p = 0; p < PARTS && g->slot_of[experts[i]] >= 0; p++)
            while (!g->records[g->slot_of[experts[i]]].reads[p].done) (void)nx_reads_go_on(m);
}

static nx_stats stats_of(nx_model *m) {
    nx_stats s;
    nx_model_get_stats(m, &s);
    return s;
}

static const uint64_t record = (uint64_t)PARTS * ROWS * ROW_BYTES;

static void counted(bool direct) {
    nx_model *m = open_model(direct);
    nx_group *g = &m->groups[0];
    NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, never, NULL), NX_OK);
    NX_CHECK_EQ(nx_experts_prefetch(g, (int32_t[]){3, 5, 7}, 3, 2), NX_OK); /* 7 is beyond the limit */
    NX_CHECK(g->slot_of[3] >= 0 && g->slot_of[5] >= 0 && g->slot_of[7] < 0);
    NX_CHECK_EQ(stats_of(m).prefetched, 2 * record);
    let_arrive(m, g, (int32_t[]){3, 5}, 2);
    NX_CHECK_EQ(nx_reads_go_on(m), 1);
    NX_CHECK_EQ(use(g, (int32_t[]){3, 9}, 2), NX_OK);
    nx_stats s = stats_of(m);
    NX_CHECK_EQ(s.prefetch_used, record);
    NX_CHECK(s.expert_uses == 2 && s.expert_misses == 1);
    NX_CHECK_EQ(s.prefetch_wasted, 0);
    /* 5 was read in vain: it is what leaves first. */
    NX_CHECK_EQ(use(g, (int32_t[]){0, 1, 2, 4, 6}, 5), NX_OK);
    NX_CHECK(g->slot_of[5] < 0 && g->slot_of[3] >= 0 && g->slot_of[9] >= 0);
    s = stats_of(m);
    NX_CHECK(s.prefetch_wasted >= record && s.prefetch_used == record); /* alignment included */
    NX_CHECK_EQ(use(g, (int32_t[]){3}, 1), NX_OK);
    NX_CHECK_EQ(stats_of(m).prefetch_used, record); /* once */
    nx_turn_end(m, 0);
    close_model(m);
}

static void what_was_read_ahead_is_counted_as_used_or_wasted(void) { world_for_each(counted); }

static void spared(bool direct) {
    nx_model *m = open_model(direct);
    nx_group *g = &m->groups[1];
    const int32_t held[] = {0, 1, 2, 3, 4, 5}, all[] = {6, 0, 1, 2, 3, 4, 5, 7, 8};
    NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, never, NULL), NX_OK);
    NX_CHECK_EQ(use(g, (int32_t[]){0, 1, 2, 3, 4, 5, 6}, 7), NX_OK);
    NX_CHECK_EQ(nx_experts_acquire(g, held, 6), NX_OK);
    NX_CHECK_EQ(nx_experts_prefetch(g, (int32_t[]){7, 8}, 2, 2), NX_OK); /* only 6 is free to leave */
    NX_CHECK(g->slot_of[7] >= 0 && g->slot_of[6] < 0 && g->slot_of[8] < 0);
    for (size_t i = 0; i < 6; i++) NX_CHECK(g->slot_of[held[i]] >= 0);
    let_arrive(m, g, (int32_t[]){7}, 1);
    nx_experts_release(g, held, 6);
    /* What is predicted and there evicts nothing that is predicted, although nothing is in use. */
    NX_CHECK_EQ(nx_experts_prefetch(g, all, 9, 9), NX_OK);
    for (size_t i = 1; i < 8; i++) NX_CHECK(g->slot_of[all[i]] >= 0);
    NX_CHECK(g->slot_of[6] < 0 && g->slot_of[8] < 0);
    for (uint32_t s = 0; s < SLOTS; s++) NX_CHECK_EQ(g->records[s].in_use, 0);
    nx_turn_end(m, 0);
    close_model(m);
}

static void reading_ahead_takes_no_slot_of_what_is_in_use_or_predicted(void) { world_for_each(spared); }

/* With nothing to spare, what is stale is never read; what is wanted is raised. */
static void stale(bool direct) {
    nx_model *m = open_model(direct);
    nx_group *g = &m->groups[0];
    NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, never, NULL), NX_OK);
    nx_io_spare_limits(m->io, 1, 0);
    fault(m, NX_FAULT_EAGAIN, 0, UINT64_MAX, -1); /* nothing arrives */
    NX_CHECK_EQ(nx_experts_prefetch(g, (int32_t[]){3, 5, 7}, 3, 3), NX_OK);
    NX_CHECK_EQ(nx_experts_acquire(g, (int32_t[]){7}, 1), NX_OK);
    const nx_record *wanted = &g->records[g->slot_of[7]];
    for (uint32_t p = 0; p < PARTS; p++) NX_CHECK(!wanted->reads[p].done && !wanted->reads[p].nx_spare);
    NX_CHECK(g->slot_of[5] < 0); /* of which nothing had been issued: its slot is empty again */
    nx_model_clear_faults(m);
    for (uint32_t p = 0; p < PARTS; p++) NX_CHECK_EQ(nx_experts_wait(g, p, (int32_t[]){7}, 1), NX_OK);
    check_record(g, 7);
    nx_experts_release(g, (int32_t[]){7}, 1);
    NX_CHECK_EQ(use(g, (int32_t[]){3, 5}, 2), NX_OK); /* given up, and read again */
    const nx_stats s = stats_of(m);
    NX_CHECK_EQ(s.prefetch_used, record);
    NX_CHECK(s.prefetch_wasted <= 2 * record);
    nx_turn_end(m, 0);
    close_model(m);
}

static void what_is_stale_is_not_read_and_what_is_wanted_is_raised(void) { world_for_each(stale); }

/* A router may name an expert twice. */
static void repeated(bool direct) {
    nx_model *m = open_model(direct);
    nx_group *g = &m->groups[0];
    NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, never, NULL), NX_OK);
    NX_CHECK_EQ(use(g, (int32_t[]){1, 1}, 2), NX_OK);
    NX_CHECK_EQ(stats_of(m).expert_misses, 1);
    /* 3 is not there, 1 is; each is held as often as it is let go. */
    NX_CHECK_EQ(nx_experts_prefetch(g, (int32_t[]){3, 1, 3, 1, 3, 4}, 6, 6), NX_OK);
    NX_CHECK_EQ(stats_of(m).prefetched, 2 * record);
    for (uint32_t s = 0; s < SLOTS; s++) NX_CHECK_EQ(g->records[s].in_use, 0);
    NX_CHECK_EQ(nx_experts_acquire(g, (int32_t[]){9, 3, 9, 3, 1}, 5), NX_OK);
    NX_CHECK(g->records[g->slot_of[9]].in_use == 2 && g->records[g->slot_of[3]].in_use == 2);
    for (uint32_t p = 0; p < PARTS; p++) NX_CHECK_EQ(nx_experts_wait(g, p, (int32_t[]){9, 3, 9, 3, 1}, 5), NX_OK);
    nx_experts_release(g, (int32_t[]){9, 3}, 2);
    NX_CHECK(g->records[g->slot_of[9]].in_use == 1 && g->records[g->slot_of[3]].in_use == 1);
    nx_experts_release(g, (int32_t[]){9, 3, 1}, 3);
    for (uint32_t s = 0; s < SLOTS; s++) NX_CHECK(g->records[s].in_use == 0 && !g->records[s].wanted);
    /* All slots can leave again. */
    NX_CHECK_EQ(use(g, (int32_t[]){10, 11, 12, 13, 14, 15, 16}, SLOTS), NX_OK);
    nx_turn_end(m, 0);
    close_model(m);
}

static void an_expert_that_is_named_twice_is_read_once(void) { world_for_each(repeated); }

/* What could not be read ahead gives its slot back by itself, and is read ahead again. */
static void failing_ahead(bool direct) {
    nx_model *m = open_model(direct);
    nx_group *g = &m->groups[0];
    NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, never, NULL), NX_OK);
    NX_CHECK_EQ(use(g, (int32_t[]){0, 1, 2, 4, 6}, 5), NX_OK);
    fault(m, NX_FAULT_EIO, 0, UINT64_MAX, -1);
    NX_CHECK_EQ(nx_experts_prefetch(g, (int32_t[]){3, 5}, 2, 2), NX_OK);
    let_arrive(m, g, (int32_t[]){3, 5}, 2);
    NX_CHECK_EQ(nx_group_empty_slots(g), 2);
    NX_CHECK(g->slot_of[3] < 0 && g->slot_of[5] < 0);
    NX_CHECK_EQ(nx_experts_prefetch(g, (int32_t[]){3}, 1, 1), NX_OK);
    let_arrive(m, g, (int32_t[]){3}, 1);
    nx_model_clear_faults(m);
    NX_CHECK_EQ(nx_experts_prefetch(g, (int32_t[]){3}, 1, 1), NX_OK); /* not taken for one that is there */
    let_arrive(m, g, (int32_t[]){3}, 1);
    check_record(g, 3);
    fault(m, NX_FAULT_EIO, 0, UINT64_MAX, -1);
    NX_CHECK_EQ(nx_experts_prefetch(g, (int32_t[]){5}, 1, 1), NX_OK);
    let_arrive(m, g, (int32_t[]){5}, 1);
    nx_model_clear_faults(m);
    /* A graph that wants neither finds the slot empty, and evicts nothing. */
    const uint64_t evicted = stats_of(m).expert_evictions;
    NX_CHECK_EQ(use(g, (int32_t[]){7}, 1), NX_OK);
    NX_CHECK_EQ(stats_of(m).expert_evictions, evicted);
    nx_turn_end(m, 0);
    close_model(m);
}

static void what_could_not_be_read_ahead_takes_no_slot(void) { world_for_each(failing_ahead); }

/* Everything in any order, with failures and stops: whatever is used is whole, nothing stays in use. */
static int stops(void *ctx) { return nx_test_random(ctx) % 40 == 0; }

static void fuzz(bool direct) {
    nx_model *m = open_model(direct);
    uint64_t seed = 5;
    size_t n_failed = 0, n_used = 0;
    for (size_t k = 0; k < ROUNDS * 12; k++) {
        static const char *const policies[] = {"adaptive", "lru", "random"};
        NX_CHECK_EQ(nx_cache_set_policy(m, policies[nx_test_random(&seed) % 3]), NX_OK);
        nx_io_spare_limits(m->io, 1 + (uint32_t)(nx_test_random(&seed) % 4), (uint32_t)(nx_test_random(&seed) % 2) * 32);
        const bool failing = nx_test_random(&seed) % 4 == 0, stopping = nx_test_random(&seed) % 4 == 0;
        if (failing)
            fault(m, NX_FAULT_EIO, nx_test_random(&seed) % 1400000, UINT64_MAX, nx_test_random(&seed) % 2 ? 5 : -1);
        NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, stopping ? stops : never, &seed), NX_OK);
        nx_status status = NX_OK;
        for (size_t i = 0; i < 10 && status == NX_OK; i++) {
            nx_group *g = &m->groups[nx_test_random(&seed) % GROUPS];
            int32_t experts[EXPERTS];
            for (int32_t e = 0; e < EXPERTS; e++) experts[e] = e;
            for (size_t e = 0; e < EXPERTS; e++) {
                const size_t at = e + nx_test_random(&seed) % (EXPERTS - e);
                const int32_t swap = experts[e];
                experts[e] = experts[at];
                experts[at] = swap;
            }
            const size_t n = 1 + nx_test_random(&seed) % SLOTS, limit = nx_test_random(&seed) % 4;
            if (nx_test_random(&seed) % 8 == 0) experts[1] = experts[0]; /* named twice */
            if (nx_test_random(&seed) % 2) {
                status = nx_experts_prefetch(g, experts, nx_test_random(&seed) % 2 ? n : EXPERTS, limit);
                NX_CHECK_EQ(status, NX_OK);
                if (nx_test_random(&seed) % 2) (void)nx_reads_go_on(m);
                if (nx_test_random(&seed) % 2) continue;
            }
            if (nx_test_random(&seed) % 3 == 0) n_used += nx_experts_favour(g, experts, EXPERTS) > 0;
            else status = use(g, experts, n);
        }
        NX_CHECK(status == NX_OK || (failing && status == NX_E_IO) || (stopping && status == NX_E_ABORTED));
        n_failed += status != NX_OK;
        nx_turn_end(m, status != NX_OK);
        for (uint32_t i = 0; i < GROUPS; i++)
            for (uint32_t s = 0; s < SLOTS; s++) {
                const nx_record *r = &m->groups[i].records[s];
                NX_CHECK_EQ(r->in_use, 0);
                NX_CHECK(!r->wanted && (!r->ahead || r->expert >= 0));
                if (r->expert >= 0) NX_CHECK_EQ(m->groups[i].slot_of[r->expert], s);
            }
        nx_model_clear_faults(m);
        nx_model_clear_error(m);
    }
    NX_CHECK(n_failed > 0 && n_used > 0);
    const nx_stats s = stats_of(m);
    NX_CHECK(s.prefetch_used > 0 && s.prefetch_wasted > 0 && s.prefetch_used <= s.prefetched);
    (void)nx_experts_prefetch(&m->groups[0], (int32_t[]){1, 2, 3}, 3, 3); /* freed while it is read */
    close_model(m);
}

static void reading_ahead_changes_no_byte_whatever_happens(void) { world_for_each(fuzz); }

/* ------------------------------------------------------------ popularity */

static void preloads(bool direct) {
    nx_model *m = open_model(direct);
    uint64_t counts[EXPERTS] = {0};
    int32_t popular[EXPERTS];
    for (uint64_t e = 0; e < 10; e++) counts[e * 2] = 100 + e; /* even ones; 18 most */
    nx_popularity_set(m, 0, counts);
    NX_CHECK_EQ(nx_experts_popular(&m->groups[0], popular, 3), 3);
    NX_CHECK(popular[0] == 18 && popular[1] == 16 && popular[2] == 14);
    NX_CHECK_EQ(nx_experts_popular(&m->groups[1], popular, 3), 0);
    while (nx_cache_preload(m, 100000) > 0) {}
    for (int32_t e = 18; e > 18 - 2 * SLOTS; e -= 2) check_record(&m->groups[0], e);
    for (uint32_t s = 0; s < SLOTS; s++) NX_CHECK(m->groups[0].records[s].frequency > 0);
    NX_CHECK_EQ(stats_of(m).preloaded, SLOTS * record);
    NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, never, NULL), NX_OK);
    NX_CHECK_EQ(nx_cache_preload(m, 1000000), 0); /* somebody has the turn */
    nx_model_reset_stats(m);
    NX_CHECK_EQ(use(&m->groups[0], (int32_t[]){18, 6}, 2), NX_OK);
    NX_CHECK_EQ(stats_of(m).expert_misses, 0);
    nx_experts_seen(&m->groups[0], (int32_t[]){1, 18, 1}, 3);
    nx_experts_seen(&m->groups[0], (int32_t[]){4, 1, 4}, 3);
    NX_CHECK_EQ(nx_experts_latest(&m->groups[0], popular, EXPERTS), 2);
    NX_CHECK(popular[0] == 4 && popular[1] == 1);
    nx_turn_end(m, 0);
    NX_CHECK_EQ(nx_cache_preload(m, 1000000), 0); /* a graph has run */
    nx_popularity_get(m, 0, counts);
    NX_CHECK(counts[1] == 3 && counts[18] == 1 && counts[4] == 2 && counts[0] == 0); /* of this session */
    uint32_t extent;
    NX_CHECK_EQ(nx_model_n_groups(m), GROUPS);
    NX_CHECK(nx_group_experts(m, 1, &extent) == EXPERTS && extent == PARTS);
    NX_CHECK_EQ(nx_group_experts(m, GROUPS, &extent), 0);
    close_model(m);
}

static void popular_experts_are_there_before_the_first_graph(void) { world_for_each(preloads); }

static void *preload_all(void *arg) {
    while (nx_cache_preload(arg, 200000) > 0) {}
    return NULL;
}

/* A graph that comes while experts are preloaded gets its turn and the right bytes. */
static void races(bool direct) {
    for (size_t k = 0; k < 6; k++) {
        nx_model *m = open_model(direct);
        uint64_t counts[EXPERTS];
        for (uint64_t e = 0; e < EXPERTS; e++) counts[e] = e + 1;
        for (uint32_t g = 0; g < GROUPS; g++) nx_popularity_set(m, g, counts);
        if (k % 3 == 2) fault(m, NX_FAULT_EIO, 0, UINT64_MAX, -1); /* what fails is for the graph to find out */
        pthread_t thread;
        NX_CHECK_EQ(pthread_create(&thread, NULL, preload_all, m), 0);
        for (size_t spin = 0; spin < k * 500; spin++) (void)stats_of(m);
        NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, never, NULL), NX_OK);
        const nx_status status = use(&m->groups[1], (int32_t[]){23, 0, 20}, 3);
        NX_CHECK_EQ(status, k % 3 == 2 ? NX_E_IO : NX_OK);
        nx_turn_end(m, status != NX_OK);
        pthread_join(thread, NULL);
        nx_model_clear_faults(m);
        NX_CHECK_EQ(nx_turn_begin(m, NULL, 0, never, NULL), NX_OK);
        NX_CHECK_EQ(use(&m->groups[1], (int32_t[]){23, 0, 20}, 3), NX_OK);
        nx_turn_end(m, 0);
        close_model(m);
    }
}

static void a_graph_does_not_wait_for_preloading(void) { world_for_each(races); }

/* ------------------------------------------------------------ control */

typedef struct machine {
    uint64_t off_ns, on_ns, idle_ns, stall_ns, noise;
} machine;

static void passes(nx_control *c, const machine *now, size_t n, uint64_t *seed) {
    for (size_t i = 0; i < n; i++) {
        uint64_t ns = c->on ? now->on_ns : now->off_ns;
        if (now->noise) ns += nx_test_random(seed) % now->noise;
        nx_control_pass(c, ns, now->idle_ns, now->stall_ns);
    }
}

static void it_is_switched_on_only_where_it_helps(void) {
    static const struct {
        machine m;
        nx_control_state state;
        bool on;
    } cases[] = {
        {{1000, 800, 300, 300, 0}, NX_CONTROL_FASTER, true},
        {{1000, 800, 300, 300, 100}, NX_CONTROL_FASTER, true},
        {{1000, 980, 300, 300, 0}, NX_CONTROL_SLOWER, false}, /* not by enough */
        {{1000, 1200, 300, 300, 0}, NX_CONTROL_SLOWER, false},
        {{1000, 800, 20, 300, 0}, NX_CONTROL_NO_IDLE, false},
        {{1000, 800, 300, 10, 0}, NX_CONTROL_NO_STALL, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        nx_control c;
        uint64_t seed = 3;
        nx_control_init(&c, true, true);
        NX_CHECK(!c.on && c.state == NX_CONTROL_WATCHING);
        passes(&c, &cases[i].m, NX_WATCH + NX_BLOCK * NX_BLOCKS, &seed);
        NX_CHECK_EQ(c.state, cases[i].state);
        NX_CHECK_EQ(c.on, cases[i].on);
        nx_prediction p;
        nx_control_get(&c, &p);
        NX_CHECK(p.on == cases[i].on && p.state == cases[i].state);
        NX_CHECK_EQ(p.trials, cases[i].state == NX_CONTROL_FASTER || cases[i].state == NX_CONTROL_SLOWER);
        NX_CHECK(p.idle == (double)cases[i].m.idle_ns / (double)cases[i].m.off_ns || cases[i].m.noise);
    }
}

static void it_follows_what_changes_and_stays_where_it_is_at_a_draw(void) {
    const machine helps = {1000, 800, 300, 300, 0}, same = {1000, 1000, 300, 300, 0}, hurts = {1000, 1100, 300, 300, 0};
    nx_control c;
    uint64_t seed = 4;
    nx_control_init(&c, true, true);
    passes(&c, &same, 3000, &seed);
    NX_CHECK(!c.on && c.switches == 0);
    NX_CHECK(c.trials >= 2 && c.trials <= 4); /* ever more rarely */
    passes(&c, &helps, 40000, &seed);
    NX_CHECK_EQ(c.switches, 1);
    size_t n_on = 0;
    for (size_t i = 0; i < 2000; i++) {
        n_on += c.on;
        passes(&c, &same, 1, &seed);
    }
    NX_CHECK(n_on > 1700 && c.switches == 1); /* it has earned its place, and is looked at now and then */
    passes(&c, &hurts, 2000, &seed);
    NX_CHECK(!c.on && c.switches == 2);
}

static void a_fixed_choice_is_left_alone(void) {
    const machine hurts = {1000, 3000, 0, 0, 0};
    nx_control c;
    uint64_t seed = 1;
    for (int on = 0; on < 2; on++) {
        nx_control_init(&c, false, on);
        passes(&c, &hurts, 5000, &seed);
        NX_CHECK(c.on == on && c.state == NX_CONTROL_FIXED && c.trials == 0);
    }
}

static void chosen(bool direct) {
    nx_model *m = open_model(direct);
    nx_prediction p;
    NX_CHECK_EQ(nx_predict_now(m, 1), NX_PREDICT_NONE);
    NX_CHECK_EQ(nx_predict_set(m, "crystal ball"), NX_E_INVALID);
    NX_CHECK_EQ(nx_predict_set(m, "popular"), NX_OK);
    NX_CHECK(nx_predict_now(m, 1) == NX_PREDICT_POPULAR && nx_predict_now(m, 0) == NX_PREDICT_POPULAR);
    NX_CHECK_EQ(nx_predict_set(m, "none"), NX_OK);
    NX_CHECK(nx_predict_now(m, 1) == NX_PREDICT_NONE && nx_predict_now(m, 0) == NX_PREDICT_NONE);
    NX_CHECK_EQ(nx_predict_set(m, "auto"), NX_OK); /* off at first for one token; a batch is another matter */
    NX_CHECK(nx_predict_now(m, 1) == NX_PREDICT_NONE && nx_predict_now(m, 0) == NX_PREDICT_GATE);
    for (int i = 0; i < NX_WATCH; i++) {
        nx_note_idle(m, 400);
        __atomic_fetch_add(&m->stats.wait_ns, 500, __ATOMIC_RELAXED);
        nx_predict_pass(m, 1000);
    }
    nx_predict_get(m, &p);
    NX_CHECK(p.state == NX_CONTROL_TRYING && p.idle == 0.4 && p.stall == 0.5);
    nx_model_reset_stats(m); /* counters that fall say nothing */
    nx_predict_pass(m, 1000);
    close_model(m);
}

static void a_predictor_is_chosen_by_name(void) { chosen(true); }

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(what_was_read_ahead_is_counted_as_used_or_wasted),
        NX_TEST(reading_ahead_takes_no_slot_of_what_is_in_use_or_predicted),
        NX_TEST(what_is_stale_is_not_read_and_what_is_wanted_is_raised),
        NX_TEST(an_expert_that_is_named_twice_is_read_once),
        NX_TEST(what_could_not_be_read_ahead_takes_no_slot),
        NX_TEST(reading_ahead_changes_no_byte_whatever_happens),
        NX_TEST(popular_experts_are_there_before_the_first_graph),
        NX_TEST(a_graph_does_not_wait_for_preloading),
        NX_TEST(it_is_switched_on_only_where_it_helps),
        NX_TEST(it_follows_what_changes_and_stays_where_it_is_at_a_draw),
        NX_TEST(a_fixed_choice_is_left_alone),
        NX_TEST(a_predictor_is_chosen_by_name),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
