/*
 * io_threads.c: the engine for machines without io_uring: a pool of threads that call pread.
 *
 * The driver owns `fresh`. `work` and `finished` are under the lock, and so is the handing over of
 * requests: between push and nx_io_completed a request belongs to the pool. No lock is held over a
 * read.
 */
#include "io_internal.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NX_THREAD_STACK_BYTES (256u << 10)

typedef struct request_list {
    nx_request *head, *tail;
} request_list;

typedef struct nx_threads {
    pthread_mutex_t lock;
    pthread_cond_t work_there, finished_there;
    request_list work, finished, fresh;
    bool stopping;
    uint32_t n_threads;
    pthread_t threads[];
} nx_threads;

static void list_append(request_list *list, nx_request *q) {
    q->next = NULL;
    *(list->tail ? &list->tail->next : &list->head) = q;
    list->tail = q;
}

static nx_request *list_take(request_list *list) {
    nx_request *q = list->head;
    if (q) {
        list->head = q->next;
        if (!list->head) list->tail = NULL;
        q->next = NULL;
    }
    return q;
}

static void *worker(void *arg) {
    nx_threads *pool = arg;
#ifdef __linux__
    pthread_setname_np(pthread_self(), "nexus-io");
#endif
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        nx_request *q = list_take(&pool->work);
        if (!q) {
            if (pool->stopping) break;
            pthread_cond_wait(&pool->work_there, &pool->lock);
            continue;
        }
        pthread_mutex_unlock(&pool->lock);
        uint64_t at = q->begin + q->have;
        ssize_t got;
        do got = pread(q->fd, q->mem + q->have, (size_t)(q->end - at), (off_t)at);
        while (got < 0 && errno == EINTR);
        q->result = got < 0 ? -(int64_t)errno : (int64_t)got;
        pthread_mutex_lock(&pool->lock);
        bool first = !pool->finished.head;
        list_append(&pool->finished, q);
        if (first) pthread_cond_signal(&pool->finished_there);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

int nx_io_cond_init(pthread_cond_t *cond) {
#ifdef __APPLE__
    return pthread_cond_init(cond, NULL);
#else
    pthread_condattr_t attr;
    int rc = pthread_condattr_init(&attr);
    if (rc != 0) return rc;
    rc = pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    if (rc == 0) rc = pthread_cond_init(cond, &attr);
    pthread_condattr_destroy(&attr);
    return rc;
#endif
}

void nx_io_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock, int64_t ns) {
#ifdef __APPLE__
    struct timespec t = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    (void)pthread_cond_timedwait_relative_np(cond, lock, &t);
#else
    uint64_t until = nx_io_now_ns() + (uint64_t)ns;
    struct timespec t = {.tv_sec = (time_t)(until / 1000000000u),
                         .tv_nsec = (long)(until % 1000000000u)};
    (void)pthread_cond_timedwait(cond, lock, &t);
#endif
}

static void threads_free(nx_threads *pool) {
    pthread_mutex_lock(&pool->lock);
    pool->stopping = true;
    pthread_cond_broadcast(&pool->work_there);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->n_threads; i++) pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->finished_there);
    pthread_cond_destroy(&pool->work_there);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

/* As many threads as can be had: fewer are slower, none is an error. */
static nx_status start_workers(nx_threads *pool, uint32_t wanted) {
    pthread_attr_t attr;
    sigset_t all, before;
    if (pthread_attr_init(&attr) != 0) return NX_E_NOMEM;
    (void)pthread_attr_setstacksize(&attr, NX_THREAD_STACK_BYTES);
    /* The process's signals are for its own threads: a handler must not run on one of ours. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool->n_threads < wanted &&
           pthread_create(&pool->threads[pool->n_threads], &attr, worker, pool) == 0)
        pool->n_threads++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return pool->n_threads > 0 ? NX_OK : NX_E_NOMEM;
}

static nx_status threads_start(nx_io *io) {
    uint32_t wanted = io->options.n_threads;
    nx_threads *pool = calloc(1, sizeof *pool + wanted * sizeof *pool->threads);
    if (!pool) return NX_E_NOMEM;
    if (pthread_mutex_init(&pool->lock, NULL) != 0) {
        free(pool);
        return NX_E_NOMEM;
    }
    if (pthread_cond_init(&pool->work_there, NULL) != 0) {
        pthread_mutex_destroy(&pool->lock);
        free(pool);
        return NX_E_NOMEM;
    }
    if (nx_io_cond_init(&pool->finished_there) != 0) {
        pthread_cond_destroy(&pool->work_there);
        pthread_mutex_destroy(&pool->lock);
        free(pool);
        return NX_E_NOMEM;
    }
    nx_status status = start_workers(pool, wanted);
    if (status != NX_OK) {
        threads_free(pool);
        return status;
    }
    io->engine_state = pool;
    return NX_OK;
}

static void threads_push(nx_io *io, nx_request *q) {
    list_append(&((nx_threads *)io->engine_state)->fresh, q);
}

static int threads_turn(nx_io *io, int64_t wait_ns) {
    nx_threads *pool = io->engine_state;
    nx_request *q;
    pthread_mutex_lock(&pool->lock);
    if (pool->fresh.head) {
        bool several = pool->fresh.head != pool->fresh.tail;
        while ((q = list_take(&pool->fresh))) list_append(&pool->work, q);
        if (several)
            pthread_cond_broadcast(&pool->work_there);
        else
            pthread_cond_signal(&pool->work_there);
    }
    if (wait_ns > 0 && !pool->finished.head)
        nx_io_cond_wait(&pool->finished_there, &pool->lock, wait_ns);
    request_list done = pool->finished;
    pool->finished = (request_list){NULL, NULL};
    pthread_mutex_unlock(&pool->lock);
    while ((q = list_take(&done))) nx_io_completed(io, q, q->result);
    return 0;
}

static void threads_stop(nx_io *io) {
    while (io->in_flight > 0) (void)threads_turn(io, 1000000000);
    threads_free(io->engine_state);
    io->engine_state = NULL;
}

const nx_engine nx_engine_threads = {
    .name = "threads",
    .number = NX_IO_ENGINE_THREADS,
    .start = threads_start,
    .push = threads_push,
    .turn = threads_turn,
    .stop = threads_stop,
};
