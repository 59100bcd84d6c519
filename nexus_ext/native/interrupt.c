/* interrupt.c: Ctrl-C in the middle of a token.
 *
 * An interpreter only looks at signals between its own instructions, and one token of a large model
 * can take half a minute inside native code. While armed, a handler of ours notes the signal in a flag
 * that abort callbacks read, and then runs the handler that was installed before.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>

#include "nexus_core.h"

static atomic_int flag;
static struct sigaction before;
static int armed;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void on_sigint(int number, siginfo_t *info, void *context) {
    atomic_store(&flag, 1);
    if (before.sa_flags & SA_SIGINFO) before.sa_sigaction(number, info, context);
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) before.sa_handler(number);
}

static int is_ours(const struct sigaction *action) {
    return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == on_sigint;
}

void nx_interrupt_arm(void) {
    pthread_mutex_lock(&lock);
    if (armed++ == 0) {
        atomic_store(&flag, 0);
        struct sigaction now;
        sigaction(SIGINT, NULL, &now);
        /* SIG_IGN stays ignored: a background job must not die of the terminal's Ctrl-C. Ours may be
         * there although nothing is armed, when somebody has put it back: it must not come before itself. */
        if (!is_ours(&now) && ((now.sa_flags & SA_SIGINFO) || now.sa_handler != SIG_IGN)) {
            before = now;
            struct sigaction ours = {.sa_mask = now.sa_mask,
                                     .sa_flags = SA_SIGINFO | (now.sa_flags & (SA_RESTART | SA_ONSTACK))};
            ours.sa_sigaction = on_sigint;
            sigaction(SIGINT, &ours, NULL);
        }
    }
    pthread_mutex_unlock(&lock);
}

void nx_interrupt_disarm(void) {
    pthread_mutex_lock(&lock);
    if (armed > 0 && --armed == 0) {
        struct sigaction now;
        sigaction(SIGINT, NULL, &now);
        if (is_ours(&now)) sigaction(SIGINT, &before, NULL); /* else somebody has set another since */
        atomic_store(&flag, 0);
    }
    pthread_mutex_unlock(&lock);
}

int nx_interrupted(void) { return atomic_load(&flag); }
void nx_interrupt_request(void) { atomic_store(&flag, 1); }
_Bool nx_interrupted_callback(void *unused) {
    (void)unused;
    return nx_interrupted() != 0;
}
