/* membench.c: read bandwidth of main memory, all threads at once. See nexus_membench.h.
 *
 * One mutex guards the struct bench below; the threads touch nothing else of each other. A pass:
 *   controller: sets `sweeps`, clears `begin_ns`, `end_ns` and `n_done`, counts `pass` up, signals
 *   thread:     sees the new `pass`, notes its begin, reads its part `sweeps` times, notes its end
 *   controller: waits for `n_done` to reach the number of threads; the pass took from the first begin
 *               to the last end, so waking threads up is not part of it unless they start late
 */
#include "nexus_membench.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

#define MIN_PASSES 3u
#define MAX_PASSES 256u
#define MIN_PASS_NS 5000000u /* shorter passes measure the waking of threads */
#define MAX_SWEEPS 1024u
#define DEFAULT_BUFFER_BYTES (256u << 20)
#define DEFAULT_NS 400000000u

typedef struct bench {
    pthread_mutex_t lock;
    pthread_cond_t go, done;
    uint64_t part_bytes;
    uint32_t pass, sweeps, n_done;
    uint64_t begin_ns, end_ns; /* first begin and last end of this pass */
    uint64_t checksum;         /* of the parts of this pass */
    bool stop;
} bench;

typedef struct worker {
    pthread_t thread;
    bench *bench;
    void *part;
    uint32_t number;
} worker;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* One register each: a vector type wider than the machine's registers is spilled to the stack. */
typedef uint64_t vec16 __attribute__((vector_size(16), may_alias));

/* Eight sums, so that no addition waits for the one before. `n_bytes` is whole pages. */
#define SUM_BODY(vec)                                                                               \
    const vec *p = data, *end = p + n_bytes / sizeof(vec);                                          \
    vec a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0}, g = {0}, h = {0};                     \
    for (; p < end; p += 8) {                                                                       \
        a += p[0];                                                                                  \
        b += p[1];                                                                                  \
        c += p[2];                                                                                  \
        d += p[3];                                                                                  \
        e += p[4];                                                                                  \
        f += p[5];                                                                                  \
        g += p[6];                                                                                  \
        h += p[7];                                                                                  \
    }                                                                                               \
    a += b + c + d + e + f + g + h;                                                                 \
    uint64_t sum = 0;                                                                               \
    for (size_t i = 0; i < sizeof(vec) / sizeof(uint64_t); i++) {                                   \
        sum += a[i];                                                                                \
    }                                                                                               \
    return sum;

static uint64_t sum_plain(const void *data, size_t n_bytes) {
    SUM_BODY(vec16)
}

#if defined(__x86_64__)
typedef uint64_t vec32 __attribute__((vector_size(32), may_alias));

__attribute__((target("avx2"))) static uint64_t sum_avx2(const void *data, size_t n_bytes) {
    SUM_BODY(vec32)
}

static uint64_t sum_bytes(const void *data, size_t n_bytes) {
    return __builtin_cpu_supports("avx2") ? sum_avx2(data, n_bytes) : sum_plain(data, n_bytes);
}
#else
static uint64_t sum_bytes(const void *data, size_t n_bytes) {
    return sum_plain(data, n_bytes);
}
#endif

/* Every page gets bytes of its own: untouched pages would all be the one zero page, and equal ones
 * might be merged. */
static void fill(worker *w) {
    uint64_t *words = w->part;
    uint64_t value = w->number + 1;
    for (uint64_t i = 0; i < w->bench->part_bytes / sizeof(uint64_t); i++) {
        value += 0x9e3779b97f4a7c15u;
        words[i] = value ^ (value >> 29);
    }
}

static void *work(void *argument) {
    worker *w = argument;
    bench *b = w->bench;
    uint32_t seen = 0;
    fill(w);
    pthread_mutex_lock(&b->lock);
    b->n_done++;
    pthread_cond_signal(&b->done);
    for (;;) {
        while (!b->stop && b->pass == seen) {
            pthread_cond_wait(&b->go, &b->lock);
        }
        if (b->stop) {
            break;
        }
        seen = b->pass;
        const uint32_t sweeps = b->sweeps;
        pthread_mutex_unlock(&b->lock);

        const uint64_t begin_ns = now_ns();
        uint64_t sum = 0;
        for (uint32_t i = 0; i < sweeps; i++) {
            sum += sum_bytes(w->part, b->part_bytes);
            /* The sweeps are equal; this keeps the compiler from making one of them. */
            __asm__ volatile("" : "+r"(sum) : : "memory");
        }
        const uint64_t end_ns = now_ns();

        pthread_mutex_lock(&b->lock);
        b->begin_ns = begin_ns < b->begin_ns ? begin_ns : b->begin_ns;
        b->end_ns = end_ns > b->end_ns ? end_ns : b->end_ns;
        b->checksum += sum;
        b->n_done++;
        pthread_cond_signal(&b->done);
    }
    pthread_mutex_unlock(&b->lock);
    return NULL;
}

/* Call with the lock held. */
static void wait_for_all(bench *b, uint32_t n_threads) {
    while (b->n_done < n_threads) {
        pthread_cond_wait(&b->done, &b->lock);
    }
}

/* Returns what the pass took, at least 1. Call with the lock held. */
static uint64_t run_pass(bench *b, uint32_t n_threads, uint32_t sweeps) {
    b->sweeps = sweeps;
    b->n_done = 0;
    b->begin_ns = UINT64_MAX;
    b->end_ns = 0;
    b->checksum = 0;
    b->pass++;
    pthread_cond_broadcast(&b->go);
    wait_for_all(b, n_threads);
    return b->end_ns > b->begin_ns ? b->end_ns - b->begin_ns : 1;
}

static int compare(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Call with the lock held. */
static void measure(bench *b, uint32_t n_threads, uint64_t max_ns, nx_membench_result *out) {
    double rates[MAX_PASSES];
    const uint64_t sweep_bytes = b->part_bytes * n_threads;

    wait_for_all(b, n_threads); /* filled */
    const uint64_t deadline_ns = now_ns() + max_ns;
    /* The first pass warms the TLBs up and tells how many sweeps make a pass long enough. */
    const uint64_t first_ns = run_pass(b, n_threads, 1);
    out->checksum = b->checksum;
    uint64_t sweeps = MIN_PASS_NS / first_ns + 1;
    sweeps = sweeps < MAX_SWEEPS ? sweeps : MAX_SWEEPS;

    for (uint32_t i = 0; i < MAX_PASSES && (i < MIN_PASSES || now_ns() < deadline_ns); i++) {
        const uint64_t ns = run_pass(b, n_threads, (uint32_t)sweeps);
        rates[i] = (double)(sweep_bytes * sweeps) * 1e9 / (double)ns;
        out->bytes += sweep_bytes * sweeps;
        out->ns += ns;
        out->n_passes = i + 1;
    }
    qsort(rates, out->n_passes, sizeof(rates[0]), compare);
    const uint32_t middle = out->n_passes / 2;
    out->bytes_s = out->n_passes % 2 ? rates[middle] : (rates[middle - 1] + rates[middle]) / 2;
}

static uint32_t usable_cpus(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) {
        return (uint32_t)CPU_COUNT(&set);
    }
#endif
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (uint32_t)n : 1;
}

static nx_status run(bench *b, worker *workers, uint32_t n_threads, uint64_t max_ns,
                     nx_membench_result *out) {
    const uint64_t total_bytes = b->part_bytes * n_threads;
    void *buffer =
        mmap(NULL, total_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED) {
        return NX_E_NOMEM;
    }
    uint32_t n_started = 0;
    for (; n_started < n_threads; n_started++) {
        worker *w = &workers[n_started];
        w->bench = b;
        w->number = n_started;
        w->part = (char *)buffer + b->part_bytes * n_started;
        if (pthread_create(&w->thread, NULL, work, w) != 0) {
            break;
        }
    }
    pthread_mutex_lock(&b->lock);
    if (n_started == n_threads) {
        measure(b, n_threads, max_ns, out);
    }
    b->stop = true;
    pthread_cond_broadcast(&b->go);
    pthread_mutex_unlock(&b->lock);
    for (uint32_t i = 0; i < n_started; i++) {
        pthread_join(workers[i].thread, NULL);
    }
    munmap(buffer, total_bytes);
    return n_started == n_threads ? NX_OK : NX_E_NOMEM;
}

nx_status nx_membench_read(const nx_membench_options *options, nx_membench_result *out) {
    const nx_membench_options none = {0};
    const nx_membench_options *o = options ? options : &none;
    if (!out) {
        return NX_E_INVALID;
    }
    memset(out, 0, sizeof(*out));
    const uint32_t n_threads = o->n_threads ? o->n_threads : usable_cpus();
    if (n_threads > NX_MEMBENCH_MAX_THREADS) {
        return NX_E_INVALID;
    }
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    const uint64_t asked = o->buffer_bytes ? o->buffer_bytes : DEFAULT_BUFFER_BYTES;
    const uint64_t pages = asked / n_threads / page;
    bench b = {.part_bytes = (pages ? pages : 1) * page};
    if (b.part_bytes > (uint64_t)SIZE_MAX / 2 / n_threads) {
        return NX_E_NOMEM;
    }
    worker *workers = calloc(n_threads, sizeof(*workers));
    if (!workers) {
        return NX_E_NOMEM;
    }
    pthread_mutex_init(&b.lock, NULL);
    pthread_cond_init(&b.go, NULL);
    pthread_cond_init(&b.done, NULL);
    const nx_status status =
        run(&b, workers, n_threads, o->max_ns ? o->max_ns : DEFAULT_NS, out);
    if (status == NX_OK) {
        out->buffer_bytes = b.part_bytes * n_threads;
        out->n_threads = n_threads;
    } else {
        memset(out, 0, sizeof(*out));
    }
    pthread_cond_destroy(&b.done);
    pthread_cond_destroy(&b.go);
    pthread_mutex_destroy(&b.lock);
    free(workers);
    return status;
}
