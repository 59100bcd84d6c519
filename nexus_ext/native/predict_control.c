/* predict_control.c: prediction is off unless it is measured to help.
 *
 *   WATCHING --- little stall, or a disk that is never idle ---> NO_STALL, NO_IDLE (off for a while)
 *      '-------- both are there ---> TRYING: blocks of passes off and on in turn, medians compared
 *                                       |-- on is shorter by 3 % --> FASTER (on; tried again later)
 *                                       '-- else ------------------> SLOWER (off, each time for longer)
 *
 * Blocks take turns so that a slow second of the machine hits both sides. What was on stays on unless it is
 * slower, what was off stays off unless the other is clearly faster: noise alone switches nothing.
 */
#include "predict_control.h"

#include <stdlib.h>
#include <string.h>

static void enter(nx_control *c, nx_control_state state, bool on) {
    c->state = state;
    c->n = 0;
    c->on = on;
    c->watch_ns = c->watch_idle_ns = c->watch_stall_ns = 0;
}

void nx_control_init(nx_control *c, bool automatic, bool on) {
    memset(c, 0, sizeof *c);
    c->automatic = automatic;
    c->patience = NX_SETTLED;
    enter(c, automatic ? NX_CONTROL_WATCHING : NX_CONTROL_FIXED, on && !automatic);
}

static int by_value(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static double median(uint64_t *values, uint32_t n) {
    qsort(values, n, sizeof *values, by_value);
    return n % 2 ? (double)values[n / 2] : ((double)values[n / 2 - 1] + (double)values[n / 2]) / 2;
}

/* Off, until it is worth another look; each time longer. */
static void rest(nx_control *c, nx_control_state why) {
    enter(c, why, false);
    c->was_on = false;
}

static void watch(nx_control *c, uint64_t pass_ns, uint64_t idle_ns, uint64_t stall_ns) {
    c->watch_ns += pass_ns;
    c->watch_idle_ns += idle_ns;
    c->watch_stall_ns += stall_ns;
    if (c->n < NX_WATCH || !c->watch_ns) return;
    c->idle = (double)c->watch_idle_ns / (double)c->watch_ns;
    c->stall = (double)c->watch_stall_ns / (double)c->watch_ns;
    if (c->stall < NX_STALL_LEAST || c->idle < NX_IDLE_LEAST) {
        rest(c, c->stall < NX_STALL_LEAST ? NX_CONTROL_NO_STALL : NX_CONTROL_NO_IDLE);
        return;
    }
    c->n_taken[0] = c->n_taken[1] = 0;
    c->trials++;
    enter(c, NX_CONTROL_TRYING, false);
}

static void judge(nx_control *c) {
    c->off_ns = median(c->taken[0], c->n_taken[0]);
    c->on_ns = median(c->taken[1], c->n_taken[1]);
    const bool keep = c->on_ns <= c->off_ns * (c->was_on ? 1.0 : 1.0 - NX_GAIN);
    if (keep != c->was_on) c->switches++;
    if (keep) {
        c->was_on = true;
        c->patience = NX_SETTLED;
        enter(c, NX_CONTROL_FASTER, true);
    } else {
        rest(c, NX_CONTROL_SLOWER);
        if (c->patience < NX_PATIENCE) c->patience *= 2;
    }
}

static void try_one(nx_control *c, uint64_t pass_ns) {
    const uint64_t at = (c->n - 1) % NX_BLOCK;
    if (at) c->taken[c->on][c->n_taken[c->on]++] = pass_ns; /* the first pass still sees the other side */
    if (c->n == NX_BLOCK * NX_BLOCKS) judge(c);
    else if (c->n % NX_BLOCK == 0) c->on = !c->on;
}

void nx_control_pass(nx_control *c, uint64_t pass_ns, uint64_t idle_ns, uint64_t stall_ns) {
    if (!c->automatic) return;
    c->n++;
    switch (c->state) {
    case NX_CONTROL_WATCHING: watch(c, pass_ns, idle_ns, stall_ns); break;
    case NX_CONTROL_TRYING: try_one(c, pass_ns); break;
    case NX_CONTROL_FASTER:
        if (c->n == NX_SETTLED) enter(c, NX_CONTROL_WATCHING, false);
        break;
    default:
        if (c->n == c->patience) enter(c, NX_CONTROL_WATCHING, false);
    }
}

void nx_control_get(const nx_control *c, nx_prediction *out) {
    *out = (nx_prediction){.state = c->state, .on = c->on, .trials = c->trials, .switches = c->switches,
                           .idle = c->idle, .stall = c->stall, .on_ns = c->on_ns, .off_ns = c->off_ns};
}
