/* predict_control.h: whether to predict, decided from what passes took. Pure: no clock, no I/O. */
#ifndef NEXUS_PREDICT_CONTROL_H
#define NEXUS_PREDICT_CONTROL_H

#include <stdbool.h>

#include "nexus_predict.h"

#define NX_WATCH 16         /* passes that are watched before anything is tried */
#define NX_BLOCK 5          /* passes of a block of a trial; the first of them is not counted */
#define NX_BLOCKS 8         /* off, on, off, on, ... */
#define NX_SETTLED 512      /* passes between two trials while prediction is on */
#define NX_PATIENCE 16384   /* most passes between two trials while it is off */
#define NX_IDLE_LEAST 0.05  /* shares of the time below which nothing is tried */
#define NX_STALL_LEAST 0.03
#define NX_GAIN 0.03        /* to be switched on, a pass must be shorter by this; to stay on, not longer */

typedef struct nx_control {
    bool automatic, on;
    nx_control_state state;
    uint64_t n;        /* passes in this state */
    uint64_t patience; /* passes until the next look, while off */
    uint64_t watch_ns, watch_idle_ns, watch_stall_ns;
    uint64_t taken[2][NX_BLOCKS / 2 * NX_BLOCK]; /* of the trial: [on] */
    uint32_t n_taken[2];
    bool was_on; /* before the trial */
    uint64_t trials, switches;
    double idle, stall, on_ns, off_ns;
} nx_control;

void nx_control_init(nx_control *, bool automatic, bool on);
void nx_control_pass(nx_control *, uint64_t pass_ns, uint64_t idle_ns, uint64_t stall_ns);
void nx_control_get(const nx_control *, nx_prediction *out);

#endif
