/*
 * test_interrupt.c: Ctrl-C is noticed while armed, by us and by whoever listened before, and only then.
 */
#include <signal.h>

#include "nexus_core.h"
#include "nx_test.h"

static volatile sig_atomic_t n_plain, n_info, n_other;

static void plain_handler(int number) { n_plain += number == SIGINT; }
static void other_handler(int number) { n_other += number == SIGINT; }
static void info_handler(int number, siginfo_t *info, void *context) {
    n_info += number == SIGINT && info && context && info->si_signo == SIGINT;
}

static void install(void (*handler)(int), int flags) {
    struct sigaction action = {.sa_flags = flags};
    action.sa_handler = handler;
    sigemptyset(&action.sa_mask);
    NX_CHECK_EQ(sigaction(SIGINT, &action, NULL), 0);
}

static struct sigaction installed(void) {
    struct sigaction now;
    NX_CHECK_EQ(sigaction(SIGINT, NULL, &now), 0);
    return now;
}

static void a_signal_is_noticed_and_passed_on(void) {
    install(plain_handler, 0);
    n_plain = 0;
    raise(SIGINT);
    NX_CHECK(n_plain == 1 && !nx_interrupted()); /* not armed: not ours */
    nx_interrupt_arm();
    NX_CHECK(!nx_interrupted() && !nx_interrupted_callback(NULL));
    raise(SIGINT);
    NX_CHECK(nx_interrupted() && nx_interrupted_callback(NULL));
    NX_CHECK_EQ(n_plain, 2);
    raise(SIGINT);
    NX_CHECK_EQ(n_plain, 3);
    nx_interrupt_disarm();
    NX_CHECK(!nx_interrupted());
    raise(SIGINT);
    NX_CHECK(n_plain == 4 && !nx_interrupted());
    NX_CHECK(installed().sa_handler == plain_handler);
}

static void a_handler_with_information_gets_it(void) {
    struct sigaction action = {.sa_flags = SA_SIGINFO};
    action.sa_sigaction = info_handler;
    sigemptyset(&action.sa_mask);
    NX_CHECK_EQ(sigaction(SIGINT, &action, NULL), 0);
    n_info = 0;
    nx_interrupt_arm();
    raise(SIGINT);
    NX_CHECK(n_info == 1 && nx_interrupted());
    nx_interrupt_disarm();
    NX_CHECK((installed().sa_flags & SA_SIGINFO) && installed().sa_sigaction == info_handler);
}

static void arms_are_counted(void) {
    install(plain_handler, 0);
    n_plain = 0;
    nx_interrupt_arm();
    nx_interrupt_arm();
    raise(SIGINT);
    nx_interrupt_arm(); /* does not forget what has happened */
    NX_CHECK(nx_interrupted());
    nx_interrupt_disarm();
    nx_interrupt_disarm();
    NX_CHECK(nx_interrupted());
    NX_CHECK(installed().sa_handler != plain_handler);
    nx_interrupt_disarm();
    NX_CHECK(!nx_interrupted());
    NX_CHECK(installed().sa_handler == plain_handler);
    nx_interrupt_disarm(); /* once too often: nothing */
    NX_CHECK(installed().sa_handler == plain_handler);
    nx_interrupt_arm();
    raise(SIGINT);
    NX_CHECK(nx_interrupted() && n_plain == 2);
    nx_interrupt_disarm();
}

static void what_is_ignored_stays_ignored(void) {
    install(SIG_IGN, 0);
    nx_interrupt_arm();
    NX_CHECK(installed().sa_handler == SIG_IGN);
    raise(SIGINT);
    NX_CHECK(!nx_interrupted());
    nx_interrupt_disarm();
    NX_CHECK(installed().sa_handler == SIG_IGN);
}

static void a_signal_that_would_kill_only_interrupts(void) {
    install(SIG_DFL, 0);
    nx_interrupt_arm();
    raise(SIGINT);
    NX_CHECK(nx_interrupted());
    nx_interrupt_disarm();
    NX_CHECK(installed().sa_handler == SIG_DFL);
}

static void a_handler_set_in_the_meantime_stays(void) {
    install(plain_handler, 0);
    nx_interrupt_arm();
    install(other_handler, 0);
    nx_interrupt_disarm();
    NX_CHECK(installed().sa_handler == other_handler);
    n_other = 0;
    raise(SIGINT);
    NX_CHECK_EQ(n_other, 1);
}

/* Somebody saved our handler while it was there and puts it back later. */
static void our_own_handler_never_comes_before_itself(void) {
    install(plain_handler, 0);
    nx_interrupt_arm();
    const struct sigaction ours = installed();
    nx_interrupt_disarm();
    NX_CHECK_EQ(sigaction(SIGINT, &ours, NULL), 0);
    nx_interrupt_arm();
    n_plain = 0;
    raise(SIGINT);
    NX_CHECK(n_plain == 1 && nx_interrupted());
    nx_interrupt_disarm();
    NX_CHECK(installed().sa_handler == plain_handler);
}

static void the_flags_of_the_handler_before_are_kept(void) {
    install(plain_handler, SA_RESTART | SA_ONSTACK);
    nx_interrupt_arm();
    NX_CHECK((installed().sa_flags & (SA_RESTART | SA_ONSTACK)) == (SA_RESTART | SA_ONSTACK));
    nx_interrupt_disarm();
    install(plain_handler, 0);
    nx_interrupt_arm();
    NX_CHECK((installed().sa_flags & (SA_RESTART | SA_ONSTACK)) == 0);
    nx_interrupt_disarm();
}

static void a_request_is_an_interrupt(void) {
    nx_interrupt_arm();
    nx_interrupt_request();
    NX_CHECK(nx_interrupted());
    nx_interrupt_disarm();
    NX_CHECK(!nx_interrupted());
    nx_interrupt_request();
    nx_interrupt_arm(); /* a new operation starts clean */
    NX_CHECK(!nx_interrupted());
    nx_interrupt_disarm();
}

int main(int argc, char **argv) {
    static const nx_test tests[] = {
        NX_TEST(a_signal_is_noticed_and_passed_on),
        NX_TEST(a_handler_with_information_gets_it),
        NX_TEST(arms_are_counted),
        NX_TEST(what_is_ignored_stays_ignored),
        NX_TEST(a_signal_that_would_kill_only_interrupts),
        NX_TEST(a_handler_set_in_the_meantime_stays),
        NX_TEST(our_own_handler_never_comes_before_itself),
        NX_TEST(the_flags_of_the_handler_before_are_kept),
        NX_TEST(a_request_is_an_interrupt),
    };
    return nx_test_main(tests, sizeof tests / sizeof *tests, argc, argv);
}
