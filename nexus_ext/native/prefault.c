/* prefault.c: memory that is about to be read into, made present by a thread ahead of the reads.
 *
 * A page of new memory is cleared when it is first touched. A direct read touches it while it is being
 * issued, so without this the one thread that issues reads would also clear all memory, and the disk
 * would wait for it. Nothing depends on this thread: what it has not reached is cleared by the read.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "core_internal.h"

#if defined(__linux__) && !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23 /* Linux 5.14; older ones refuse it */
#endif

#define STEP_BYTES (4u << 20) /* between two looks at `stopping` */

typedef struct area {
    uint8_t *begin, *end; /* whole pages */
} area;

struct nx_prefault {
    pthread_t thread;
    pthread_mutex_t lock; /* guards all that follows */
    pthread_cond_t more;
    area *areas; /* [next, n) are to do */
    size_t next, n, capacity;
    bool stopping;
};

#ifdef MADV_POPULATE_WRITE

/* false: stop, or this system cannot do it. */
static bool make_present(nx_prefault *p, area a) {
    while (a.begin < a.end) {
        const size_t left = (size_t)(a.end - a.begin), n = left < STEP_BYTES ? left : STEP_BYTES;
        if (madvise(a.begin, n, MADV_POPULATE_WRITE) != 0 && errno != EINTR && errno != EAGAIN) return false;
        a.begin += n;
        pthread_mutex_lock(&p->lock);
        const bool stopping = p->stopping;
        pthread_mutex_unlock(&p->lock);
        if (stopping) return false;
    }
    return true;
}

static void *work(void *arg) {
    nx_prefault *p = arg;
#ifdef __linux__
    pthread_setname_np(pthread_self(), "nexus-prefault");
#endif
    for (bool able = true; able;) {
        pthread_mutex_lock(&p->lock);
        while (p->next == p->n && !p->stopping) pthread_cond_wait(&p->more, &p->lock);
        const bool stopping = p->stopping;
        const area a = stopping ? (area){NULL, NULL} : p->areas[p->next++];
        pthread_mutex_unlock(&p->lock);
        able = !stopping && make_present(p, a);
    }
    return NULL;
}

static nx_prefault *begin(void) {
    nx_prefault *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->more, NULL);
    /* The process's signals are for its own threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int failed = pthread_create(&p->thread, NULL, work, p);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!failed) return p;
    pthread_cond_destroy(&p->more);
    pthread_mutex_destroy(&p->lock);
    free(p);
    return NULL;
}

void nx_prefault_add(nx_model *m, void *memory, uint64_t nbytes) {
    if (!m->prefault) m->prefault = begin();
    nx_prefault *p = m->prefault;
    if (!p) return;
    pthread_mutex_lock(&p->lock);
    if (p->n == p->capacity) {
        const size_t capacity = p->capacity ? 2 * p->capacity : 64;
        area *areas = realloc(p->areas, capacity * sizeof *areas);
        if (areas) {
            p->areas = areas;
            p->capacity = capacity;
        }
    }
    if (p->n < p->capacity) {
        uint8_t *at = (uint8_t *)((uintptr_t)memory / NX_PAGE * NX_PAGE);
        p->areas[p->n++] = (area){at, at + nx_round_up((uint64_t)((uint8_t *)memory - at) + nbytes, NX_PAGE)};
    }
    pthread_cond_signal(&p->more);
    pthread_mutex_unlock(&p->lock);
}

#else

void nx_prefault_add(nx_model *m, void *memory, uint64_t nbytes) {
    (void)m;
    (void)memory;
    (void)nbytes;
}

#endif

void nx_prefault_end(nx_model *m) {
    nx_prefault *p = m->prefault;
    if (!p) return;
    pthread_mutex_lock(&p->lock);
    p->stopping = true;
    pthread_cond_signal(&p->more);
    pthread_mutex_unlock(&p->lock);
    pthread_join(p->thread, NULL);
    pthread_cond_destroy(&p->more);
    pthread_mutex_destroy(&p->lock);
    free(p->areas);
    free(p);
    m->prefault = NULL;
}
