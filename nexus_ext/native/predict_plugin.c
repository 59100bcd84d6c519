/* predict_plugin.c: a predictor in C of a plugin (nexus_plugin.h): what it is told, what it is asked, and its answer,
 * which is not trusted. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "predict.h"

static void end_state(const nxp_predictor *table, void *state) {
    if (table->create && table->destroy && state) table->destroy(state);
}

void nx_predict_plugin_end(nx_model *m) {
    nx_predict_plugin *p = &m->predict.plugin;
    end_state(&p->table, p->state);
    memset(&p->table, 0, sizeof p->table);
    p->state = NULL;
    p->plugin.failed = true;
}

void nx_predict_plugin_free(nx_model *m) {
    nx_predict_plugin_end(m);
    free(m->predict.plugin.out);
    free(m->predict.plugin.seen);
}

/* False: no memory for it, or for what it answers. */
static bool begin_state(nx_model *m, const nxp_predictor *table, nx_predict_plugin *made) {
    uint32_t *numbers = malloc(2 * (m->n_groups + 1) * sizeof *numbers), *slots = numbers + m->n_groups;
    made->n_experts = 1;
    for (uint32_t i = 0; numbers && i < m->n_groups; i++) {
        numbers[i] = m->groups[i].n_experts;
        slots[i] = m->groups[i].n_slots;
        if (numbers[i] > made->n_experts) made->n_experts = numbers[i];
    }
    made->out = malloc(made->n_experts * sizeof *made->out);
    made->seen = malloc(made->n_experts);
    if (numbers && made->out && made->seen) {
        const nxp_layers layers = {.struct_size = sizeof layers, .n_layers = m->n_groups, .n_experts = numbers,
                                   .n_slots = slots};
        made->state = table->create ? table->create(table->user, &layers) : table->user;
    }
    const bool begun = numbers && made->out && made->seen && (made->state || !table->create);
    free(numbers);
    return begun;
}

nx_status nx_predict_use(nx_model *m, const nxp_predictor *predictor, int automatic, nx_error *error) {
    nx_predict_plugin made = {0};
    const size_t least = offsetof(nxp_predictor, predict) + sizeof predictor->predict;
    nx_status status = nx_plugin_take(predictor ? &predictor->head : NULL, NXP_PREDICTOR, "predictor", least,
                                      &made.table, sizeof made.table, &made.plugin, error);
    if (status != NX_OK) return status;
    const char *name = made.plugin.info.name;
    if (!made.table.predict) {
        nx_error_set(error, NX_E_INVALID, 0, "the predictor %s has no function `predict`", name);
        return NX_E_INVALID;
    }
    status = nx_turn_borrow(m);
    if (status != NX_OK) {
        nx_error_set(error, status, 0, "the model is closed");
        return status;
    }
    if (begin_state(m, &made.table, &made)) {
        nx_predict_plugin_free(m);
        pthread_mutex_lock(&m->lock);
        m->predict.plugin = made;
        m->predict.predictor = NX_PREDICT_PLUGIN;
        nx_control_init(&m->predict.control, automatic, true);
        pthread_mutex_unlock(&m->lock);
    } else {
        free(made.out);
        free(made.seen);
        status = NX_E_NOMEM;
        nx_error_set(error, status, ENOMEM, "the predictor %s could not set itself up for %u layers", name, m->n_groups);
    }
    nx_turn_give(m);
    return status;
}

void nx_predict_plugin_get(nx_model *m, nx_plugin_info *out) { nx_plugin_get(m, &m->predict.plugin.plugin, out); }

/* -- with the turn ---------------------------------------------------------------------------------- */

int nx_predict_listens(const nx_model *m) {
    const nx_predict *p = &m->predict;
    return p->predictor == NX_PREDICT_PLUGIN && !p->plugin.plugin.failed && p->plugin.table.routed;
}

void nx_predict_routed(nx_group *g, const int32_t *experts, uint32_t n_tokens, uint32_t n_used) {
    nx_predict_plugin *p = &g->model->predict.plugin;
    const nxp_routed routed = {.struct_size = sizeof routed, .layer = g->layer, .n_tokens = n_tokens,
                               .n_used = n_used, .experts = experts};
    const uint64_t begin = nx_now_ns();
    p->table.routed(p->state, &routed);
    nx_plugin_count(&p->plugin, begin);
}

/* It is not asked again: what nexus_ext brings predicts from now on. */
static size_t give_up(nx_model *m) {
    pthread_mutex_lock(&m->lock);
    m->predict.predictor = NX_PREDICT_GATE;
    nx_control_init(&m->predict.control, true, true);
    pthread_mutex_unlock(&m->lock);
    return 0;
}

size_t nx_predict_ask(nx_group *g, uint32_t n_tokens, uint32_t n_used, size_t limit, int32_t **out) {
    nx_model *m = g->model;
    nx_predict_plugin *p = &m->predict.plugin;
    const nxp_predict_ask ask = {.struct_size = sizeof ask, .layer = g->layer, .n_tokens = n_tokens, .n_used = n_used,
                                 .capacity = g->n_experts, .limit = (uint32_t)limit};
    if (p->plugin.failed) return 0;
    const uint64_t begin = nx_now_ns();
    const int32_t n = p->table.predict(p->state, &ask, p->out);
    nx_plugin_count(&p->plugin, begin);
    *out = p->out;
    if (n < 0 || (uint32_t)n > g->n_experts) {
        nx_plugin_disable(m, &p->plugin, "in layer %u (%u experts) its function `predict` returned %d", g->layer,
                          g->n_experts, (int)n);
        return give_up(m);
    }
    memset(p->seen, 0, g->n_experts);
    for (int32_t i = 0; i < n; i++) {
        const int32_t expert = p->out[i];
        const bool there = expert >= 0 && (uint32_t)expert < g->n_experts;
        if (there && !p->seen[expert]) {
            p->seen[expert] = 1;
            continue;
        }
        nx_plugin_disable(m, &p->plugin, "in layer %u (%u experts) it named expert %d, %s", g->layer, g->n_experts,
                          (int)expert, there ? "twice" : "which there is not");
        return give_up(m);
    }
    return (size_t)n;
}
