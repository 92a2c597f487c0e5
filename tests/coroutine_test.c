/* Coroutines: spawning, sleeping, waiting for descriptors, stacks, and several on one stream. */
#include "test.h"

#include "handlers.h"

#include <sys/resource.h>
#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__i386__))
#include <execinfo.h>
#include <ucontext.h>
#endif
#if TSRVI_HAS_ASAN && defined(__linux__)
#include <sanitizer/lsan_interface.h>
#endif

static void run_and_free(tsrv_loop *loop)
{
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

static void check_records(const int *expected, int count)
{
    for (int i = 0; i < count && i < t_record_count(); i++) {
        CHECK_INT(t_recorded(i), expected[i]);
    }
    CHECK_INT(t_record_count(), count);
}

/* ---- spawn and sleep ----------------------------------------------------------------------*/

static void spawn_two(void *context)
{
    int *ids = (int *)context;
    CHECK_INT(tsrv_spawn(tsrv_loop_current(), t_record_call, &ids[0]), TSRV_OK);
    CHECK_INT(tsrv_spawn(tsrv_loop_current(), t_record_call, &ids[1]), TSRV_OK);
    t_record(100);
}

TEST_LOOP(spawned_functions_run_from_the_loop_in_order)
{
    static const int expected[] = {0, 100, 1, 2};
    int ids[] = {0, 1, 2};
    tsrv_loop *loop = t_new_loop();
    CHECK_INT(tsrv_spawn(loop, t_record_call, &ids[0]), TSRV_OK);
    CHECK_INT(tsrv_spawn(loop, spawn_two, &ids[1]), TSRV_OK);
    CHECK_INT(t_record_count(), 0);
    run_and_free(loop);
    check_records(expected, 4);
}

TEST_LOOP(callbacks_may_spawn)
{
    static const int expected[] = {100, 1, 2, 100, 1, 2};
    int ids[] = {1, 2};
    tsrv_timer timer = {0};
    tsrv_loop *loop = t_new_loop();
    CHECK_INT(tsrv_loop_post(loop, spawn_two, ids), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(tsrv_timer_start(loop, &timer, 0, spawn_two, ids), TSRV_OK);
    run_and_free(loop);
    check_records(expected, 6);
}

static void yield_thrice(void *context)
{
    int id = *(int *)context;
    for (int round = 0; round < 3; round++) {
        t_record(round * 10 + id);
        CHECK_INT(tsrv_sleep(0), TSRV_OK);
    }
}

TEST_LOOP(sleeping_0_lets_each_other_go_once)
{
    static const int expected[] = {1, 2, 3, 11, 12, 13, 21, 22, 23};
    int ids[] = {1, 2, 3};
    tsrv_loop *loop = t_new_loop();
    for (int i = 0; i < 3; i++) {
        CHECK_INT(tsrv_spawn(loop, yield_thrice, &ids[i]), TSRV_OK);
    }
    run_and_free(loop);
    check_records(expected, 9);
}

static uint64_t due_last;

/* Who wakes later was due later; which of them that is depends on when each began. */
static void sleep_and_record(void *context)
{
    int delay = *(int *)context;
    int64_t start = t_now_ms();
    CHECK_INT(tsrv_sleep(delay), TSRV_OK);
    CHECK(t_now_ms() - start >= delay);
    CHECK(tsrvi_thread.running->coroutines.running->due >= due_last);
    due_last = tsrvi_thread.running->coroutines.running->due;
    t_record(delay);
}

TEST_LOOP(sleepers_wake_in_order_and_never_early)
{
    int delays[] = {60, 30, 90, 1};
    tsrv_loop *loop = t_new_loop();
    due_last = 0;
    for (int i = 0; i < 4; i++) {
        CHECK_INT(tsrv_spawn(loop, sleep_and_record, &delays[i]), TSRV_OK);
    }
    run_and_free(loop);
    CHECK_INT(t_record_count(), 4);
}

static void negative_sleep(void *context)
{
    (void)context;
    CHECK_INT(tsrv_sleep(-1), TSRV_EINVAL);
    t_record(1);
}

static void try_to_wait(void *context)
{
    CHECK_INT(tsrv_sleep(0), TSRV_EINVAL);
    CHECK_INT(tsrv_sleep(1), TSRV_EINVAL);
    CHECK_INT(tsrv_wait_fd(*(int *)context, TSRV_READABLE, 0), TSRV_EINVAL);
    CHECK_INT(tsrv_wait_fd(*(int *)context, TSRV_READABLE, TSRV_NEVER), TSRV_EINVAL);
    t_record(2);
}

TEST_LOOP(waiting_needs_a_coroutine)
{
    tsrv_timer timer = {0};
    int fds[2];
    tsrv_loop *loop = t_new_loop();
    CHECK(pipe(fds) == 0);
    try_to_wait(&fds[0]);
    CHECK_INT(tsrv_loop_post(loop, try_to_wait, &fds[0]), TSRV_OK);
    CHECK_INT(tsrv_timer_start(loop, &timer, 0, try_to_wait, &fds[0]), TSRV_OK);
    CHECK_INT(tsrv_spawn(loop, negative_sleep, NULL), TSRV_OK);
    run_and_free(loop);
    CHECK_INT(t_record_count(), 4);
    t_close_all(fds, 2);
}

static int try_to_sleep(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    CHECK_INT(tsrv_sleep(0), TSRV_EINVAL);
    CHECK_INT(tsrv_wait_fd(0, TSRV_READABLE, 0), TSRV_EINVAL);
    return 0;
}

TEST_CALLBACK(callback_mode_handler_is_no_coroutine)
{
    t_case c = {.handler = try_to_sleep, .client = expect_end};
    t_run(&c);
}

/* ---- descriptors --------------------------------------------------------------------------*/

typedef struct fd_case {
    tsrv_loop *loop;
    int fds[2];
    tsrv_timer timer;
    tsrv_watch watch;
    int steps;
} fd_case;

static void write_a_byte(void *context)
{
    CHECK(write(((fd_case *)context)->fds[1], "x", 1) == 1);
}

static void wait_for_pipe(void *context)
{
    fd_case *c = (fd_case *)context;
    int64_t start;
    char byte;
    CHECK_INT(tsrv_wait_fd(c->fds[0], TSRV_READABLE, 0), TSRV_ETIMEOUT);
    start = t_now_ms();
    CHECK_INT(tsrv_wait_fd(c->fds[0], TSRV_READABLE, 20), TSRV_ETIMEOUT);
    CHECK_NEAR_MS(t_now_ms() - start, 20, 1000);

    CHECK_INT(tsrv_timer_start(c->loop, &c->timer, 10, write_a_byte, c), TSRV_OK);
    CHECK_INT(tsrv_wait_fd(c->fds[0], TSRV_READABLE, TSRV_NEVER), TSRV_OK);
    CHECK_INT(tsrv_wait_fd(c->fds[0], TSRV_READABLE, 0), TSRV_OK);
    CHECK_INT(tsrv_wait_fd(c->fds[0], TSRV_READABLE, 60000), TSRV_OK);
    CHECK(read(c->fds[0], &byte, 1) == 1);
    CHECK_INT(tsrv_wait_fd(c->fds[0], TSRV_READABLE, 0), TSRV_ETIMEOUT);

    CHECK_INT(tsrv_wait_fd(c->fds[1], TSRV_WRITABLE, TSRV_NEVER), TSRV_OK);
    CHECK_INT(tsrv_wait_fd(c->fds[1], TSRV_READABLE | TSRV_WRITABLE, TSRV_NEVER), TSRV_OK);
    c->steps++;
}

TEST_LOOP(wait_fd_waits_for_a_pipe)
{
    fd_case c = {0};
    c.loop = t_new_loop();
    CHECK(pipe(c.fds) == 0);
    CHECK_INT(tsrv_spawn(c.loop, wait_for_pipe, &c), TSRV_OK);
    run_and_free(c.loop);
    CHECK_INT(c.steps, 1);
    t_close_all(c.fds, 2);
}

static void wait_long(void *context)
{
    fd_case *c = (fd_case *)context;
    CHECK_INT(tsrv_wait_fd(c->fds[0], TSRV_READABLE, TSRV_NEVER), TSRV_OK);
    c->steps++;
}

static void wait_in_vain(void *context)
{
    fd_case *c = (fd_case *)context;
    static const int bad_events[] = {0, 4, -1};
    for (int i = 0; i < 3; i++) {
        CHECK_INT(tsrv_wait_fd(c->fds[1], bad_events[i], 0), TSRV_EINVAL);
    }
    CHECK(tsrv_wait_fd(-1, TSRV_READABLE, 10) < 0);
    CHECK_INT(tsrv_wait_fd(c->fds[0], TSRV_READABLE, TSRV_NEVER), TSRV_EBUSY);
    CHECK_INT(tsrv_watch_start(c->loop, &c->watch, c->fds[0], TSRV_READABLE, never_called, NULL),
              TSRV_EBUSY);
    c->steps++;
    write_a_byte(c);
}

TEST_LOOP(wait_fd_refuses_a_second_waiter_and_bad_arguments)
{
    fd_case c = {0};
    c.loop = t_new_loop();
    CHECK(pipe(c.fds) == 0);
    CHECK_INT(tsrv_spawn(c.loop, wait_long, &c), TSRV_OK);
    CHECK_INT(tsrv_spawn(c.loop, wait_in_vain, &c), TSRV_OK);
    run_and_free(c.loop);
    CHECK_INT(c.steps, 2);
    t_close_all(c.fds, 2);
}

/* ---- stacks and registers -----------------------------------------------------------------*/

/* TSan knows no more than 8128 fibers; and on 32-bit MIPS a program has 2 GiB of addresses, 384 KiB of them a stack's. */
#if defined(__mips__) && !defined(__mips64)
enum { SLEEPERS = 4000 };
#else
enum { SLEEPERS = TSRVI_HAS_TSAN ? 5000 : 10000 };
#endif
static int awake;

static void sleep_with_a_mark(void *context)
{
    volatile uintptr_t mark[8];
    for (unsigned i = 0; i < 8; i++) {
        mark[i] = (uintptr_t)context + i;
    }
    CHECK_INT(tsrv_sleep(200), TSRV_OK);
    for (unsigned i = 0; i < 8; i++) {
        CHECK(mark[i] == (uintptr_t)context + i);
    }
    awake++;
}

TEST_LOOP(ten_thousand_coroutines_sleep_at_once)
{
    static char marks[SLEEPERS];
    tsrv_loop *loop = t_new_loop();
    for (int i = 0; i < SLEEPERS; i++) {
        CHECK_INT(tsrv_spawn(loop, sleep_with_a_mark, &marks[i]), TSRV_OK);
    }
    run_and_free(loop);
    CHECK_INT(awake, SLEEPERS);
}

/* More live values of each kind than there are registers; the compiler may keep them in those that
 * a call preserves, and all must come back. */
static void keep_values(void *context)
{
    double base = *(double *)context, d[12];
    long n[12];
    float f = (float)base / 2;
    for (int i = 0; i < 12; i++) {
        d[i] = base * (i + 1);
        n[i] = (long)base * (i + 3);
    }
    double d0 = base + 0.5, d1 = base + 1.5, d2 = base * 3, d3 = base / 3;
    long n0 = (long)base, n1 = n0 * 7, n2 = n0 ^ 0x5555, n3 = ~n0, n4 = n0 + 11, n5 = n0 - 13;
    for (int round = 0; round < 20; round++) {
        CHECK_INT(tsrv_sleep(round % 5 == 4 ? 1 : 0), TSRV_OK);
        d0 += 1, d1 += 2, d2 += 4, d3 += 8, f += 1;
        n0 += 1, n1 += 2, n2 += 3, n3 += 4, n4 += 5, n5 += 6;
    }
    long n_base = (long)base;
    CHECK(d0 == base + 20.5 && d1 == base + 41.5 && d2 == base * 3 + 80);
    CHECK(d3 > base / 3 + 159.999 && d3 < base / 3 + 160.001);
    CHECK(f == (float)base / 2 + 20);
    CHECK(n0 == n_base + 20 && n1 == n_base * 7 + 40 && n2 == (n_base ^ 0x5555) + 60);
    CHECK(n3 == ~n_base + 80 && n4 == n_base + 111 && n5 == n_base + 107);
    for (int i = 0; i < 12; i++) {
        CHECK(d[i] == base * (i + 1));
        CHECK_INT(n[i], n_base * (i + 3));
    }
    t_record(1);
}

TEST_LOOP(locals_survive_switches)
{
    enum { COUNT = 50 };
    static double bases[COUNT];
    tsrv_loop *loop = t_new_loop();
    for (int i = 0; i < COUNT; i++) {
        bases[i] = 1024.0 * (i + 1);
        CHECK_INT(tsrv_spawn(loop, keep_values, &bases[i]), TSRV_OK);
    }
    run_and_free(loop);
    CHECK_INT(t_record_count(), COUNT);
}

/* What coroutines share has to be looked up again behind a wait. */
static void hold_what_is_shared(void *context)
{
    const char **shared = (const char **)context, *held = *shared;
    CHECK_INT(tsrv_sleep(0), TSRV_OK);
    CHECK_STR(held, "old");
    CHECK_STR(*shared, "new");
    t_record(1);
}

static void change_what_is_shared(void *context)
{
    *(const char **)context = "new";
}

TEST_LOOP(another_coroutine_changes_what_is_shared_during_a_wait)
{
    const char *shared = "old";
    tsrv_loop *loop = t_new_loop();
    CHECK_INT(tsrv_spawn(loop, hold_what_is_shared, &shared), TSRV_OK);
    CHECK_INT(tsrv_spawn(loop, change_what_is_shared, &shared), TSRV_OK);
    run_and_free(loop);
    CHECK_INT(t_record_count(), 1);
}

enum { FRAME = 4096 };

/* Uses the stack page by page, and waits at the deepest point. */
static int dig(int depth)
{
    volatile char frame[FRAME];
    frame[0] = (char)depth;
    frame[FRAME - 1] = (char)depth;
    int below = depth > 1 ? dig(depth - 1) : tsrv_sleep(1) == TSRV_OK;
    CHECK(frame[0] == (char)depth && frame[FRAME - 1] == (char)depth);
    return below;
}

static int dig_in_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address;
    CHECK_INT(dig(*(int *)context), 1);
    return tsrv_write(stream, "deep\n", 5);
}

static void three_diggers(int port, void *context)
{
    int fds[3];
    (void)context;
    for (int i = 0; i < 3; i++) {
        fds[i] = t_connect(port);
    }
    for (int i = 0; i < 3; i++) {
        t_expect(fds[i], "deep\n");
        t_leave(fds[i]);
    }
}

/* Of each stack about two thirds are used: sanitizers make frames larger. */
TEST_COROUTINE(stack_size_is_there_to_be_used)
{
    static const size_t sizes[] = {0, 64 * 1024, 2 * 1024 * 1024};
    for (int i = 0; i < 3; i++) {
        size_t size = sizes[i] != 0 ? sizes[i] : 256 * 1024;
        int depth = (int)(size * 2 / 3 / FRAME);
        t_case c = {.handler = dig_in_handler, .client = three_diggers, .context = &depth,
                    .options = {.stack_size = sizes[i]}};
        t_run(&c);
    }
}

static void dig_too_deep(void *context)
{
    CHECK_INT(dig(*(int *)context), 1);
}

/* Run function(context) in a child, which has to die of touching what it must not. */
static void expect_crash(void (*function)(void *), void *context)
{
    struct rlimit no_core = {0, 0};
    int status;
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        setrlimit(RLIMIT_CORE, &no_core);
        signal(SIGSEGV, SIG_DFL); /* a sanitizer would catch it */
        signal(SIGBUS, SIG_DFL);
        function(context);
        _exit(1);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFSIGNALED(status));
    CHECK(WTERMSIG(status) == SIGSEGV || WTERMSIG(status) == SIGBUS);
}

static void dig_in_a_loop(void *context)
{
    tsrv_loop *loop = t_new_loop();
    CHECK_INT(tsrv_spawn(loop, dig_too_deep, context), TSRV_OK);
    tsrv_loop_run(loop);
}

TEST_LOOP(stack_overflow_ends_in_the_guard)
{
    int depth = 1 << 20;
    expect_crash(dig_in_a_loop, &depth);
}

/* Frames that are larger than what is left of the stack, whose lowest bytes are touched first, while
 * other coroutines have their stacks around. */
typedef struct leap {
    size_t frame, stack_size;
    bool refused; /* the kernel does not know guards that need no mapping */
    bool handler; /* in a server's coroutine */
} leap;

__attribute__((noinline)) static void touch_lowest(size_t size)
{
    volatile char *frame = (volatile char *)__builtin_alloca(size);
    frame[0] = 1;
}

/* Uses the stack up to its last 8 KiB before. */
__attribute__((noinline)) static void leap_down(size_t frame)
{
    char *here = (char *)__builtin_frame_address(0);
    size_t left = (size_t)(here - (const char *)tsrvi_co_self()->fiber.bottom);
    volatile char *used = (volatile char *)__builtin_alloca(left - 8192);
    used[0] = 1;
    touch_lowest(frame);
    CHECK(used[0] == 1);
}

static void leap_when_spawned(void *context)
{
    CHECK_INT(tsrv_sleep(0), TSRV_OK);
    leap_down(((leap *)context)->frame);
    _exit(1);
}

static int leap_in_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address;
    leap_when_spawned(context);
    return 0;
}

static void leap_among_others(void *context)
{
    leap *l = (leap *)context;
    tsrv_loop *loop = t_new_loop();
    tsrv_server_options options = {0};
    tsrv_server *server;
    int pair[2];
    t_fault_name = "madvise";
    t_fault_sticky = true;
    t_fault_at = l->refused;
    options.loop = loop;
    options.handle_stream = leap_in_handler;
    options.context = l;
    options.stack_size = l->stack_size;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    for (int i = 0; i < 20; i++) {
        CHECK_INT(tsrv_spawn(loop, i == 10 && !l->handler ? leap_when_spawned : sleep_long, l), TSRV_OK);
        if (i == 10 && l->handler) {
            CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
            CHECK_INT(tsrv_server_add_stream(server, pair[0]), TSRV_OK);
            CHECK_INT(tsrv_loop_run_once(loop, 0), 1);
        }
    }
    tsrv_loop_run(loop);
}

/* Emulators of other processors take the advice and do nothing. */
static bool guards_need_no_mapping(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    int fds[2];
    void *memory = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED && pipe(fds) == 0);
    bool guarded = madvise(memory, page, TSRVI_MADV_GUARD_INSTALL) == 0 && write(fds[1], memory, 1) < 0;
    close(fds[0]);
    close(fds[1]);
    munmap(memory, page);
    return guarded;
}

TEST_LOOP(frames_cannot_pass_over_the_guard)
{
    size_t most = (sizeof(void *) > 4 ? 1024 : 64) << 10;
    bool known = guards_need_no_mapping();
    for (unsigned i = 0; i < 12; i++) {
        leap l = {most >> i / 4, i & 2 ? 512 << 10 : 0, !known || (i & 1) != 0, i & 2};
        expect_crash(leap_among_others, &l);
    }
}

/* ---- what finds its way on stacks ----------------------------------------------------------*/

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__i386__)) && !TSRVI_HAS_TSAN && \
    !defined(TSRV_VALGRIND)
static volatile bool stepping;
static volatile int steps, endless;

/* After every instruction, and once at the beginning and at the end. */
static void unwind(int signo, siginfo_t *info, void *context)
{
    ucontext_t *machine = (ucontext_t *)context;
    void *frames[100];
    (void)signo, (void)info;
    if (stepping) {
        machine->uc_mcontext.gregs[REG_EFL] |= 0x100; /* the processor's trap flag */
    } else {
        machine->uc_mcontext.gregs[REG_EFL] &= ~0x100;
    }
    steps++;
    endless += backtrace(frames, 100) == 100;
}

/* Profilers unwind in a signal handler, wherever the program is. */
TEST_LOOP(every_instruction_of_a_switch_can_be_unwound_from)
{
    struct sigaction action;
    void *frames[4];
    int ids[2] = {1, 2};
    tsrv_loop *loop = t_new_loop();
    memset(&action, 0, sizeof action);
    action.sa_sigaction = unwind;
    action.sa_flags = SA_SIGINFO;
    CHECK(sigaction(SIGTRAP, &action, NULL) == 0);
    backtrace(frames, 4); /* loads what it needs */
    CHECK_INT(tsrv_spawn(loop, yield_thrice, &ids[0]), TSRV_OK);
    CHECK_INT(tsrv_spawn(loop, yield_thrice, &ids[1]), TSRV_OK);
    stepping = true;
    CHECK(raise(SIGTRAP) == 0);
    while (tsrv_loop_run_once(loop, 0) > 0) {
    }
    stepping = false;
    CHECK(raise(SIGTRAP) == 0);
    CHECK_INT(t_record_count(), 6);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    CHECK(steps > 500);
    CHECK_INT(endless, 0);
}
#endif

#if TSRVI_HAS_ASAN && defined(__linux__)
static int told_leaks; /* when only the stack of a coroutine knows of it */

static void own_and_wait(void *context)
{
    char *volatile own = (char *)malloc(100);
    CHECK(own != NULL);
    while (tsrv_sleep(*(int *)context) == TSRV_OK) {
    }
    free(own);
}

static void look_for_leaks(void *context)
{
    (void)context;
    told_leaks = __lsan_do_recoverable_leak_check();
}

/* What waits may own memory, and so may the function that called tsrv_loop_run. */
TEST_LOOP(stacks_that_wait_are_looked_at_for_leaks)
{
    int hour = 3600000;
    char *volatile own = (char *)malloc(100);
    tsrv_loop *loop = t_new_loop();
    CHECK_INT(tsrv_spawn(loop, own_and_wait, &hour), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    look_for_leaks(NULL);
    CHECK_INT(told_leaks, 0);
    CHECK_INT(tsrv_spawn(loop, look_for_leaks, NULL), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(told_leaks, 0);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    free(own);
}
#endif

/* ---- stacks that cannot be unmapped --------------------------------------------------------*/

static int maps, unmaps;

static void count_mapping_calls(const char *name)
{
    maps += strcmp(name, "mmap") == 0;
    unmaps += strcmp(name, "munmap") == 0;
}

static void do_nothing(void *context)
{
    (void)context;
}

static void run_at_once(tsrv_loop *loop, int count)
{
    for (int i = 0; i < count; i++) {
        CHECK_INT(tsrv_spawn(loop, do_nothing, NULL), TSRV_OK);
    }
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
}

/* As at vm.max_map_count, where unmapping the middle of a mapping fails. */
TEST_LOOP(stacks_that_cannot_be_unmapped_are_used_again)
{
    enum { COUNT = TSRVI_STACK_POOL * 2 };
    tsrv_loop *loop = t_new_loop();
    t_seen = count_mapping_calls;
    t_fail_call("munmap", 0, 1, true);
    run_at_once(loop, COUNT);
    CHECK_INT(maps, COUNT);
    run_at_once(loop, COUNT);
    CHECK_INT(maps, COUNT);
    CHECK(unmaps <= 2 * COUNT);
    t_fault_at = 0;
    unmaps = 0;
    run_at_once(loop, 1);
    CHECK_INT(unmaps, COUNT - TSRVI_STACK_POOL);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    CHECK_INT(unmaps, COUNT);
}

/* The first time all fail, but the last: then its neighbours can be unmapped. */
TEST_LOOP(all_stacks_are_unmapped_in_the_end)
{
    tsrv_loop *loop = t_new_loop();
    run_at_once(loop, 100);
    t_seen = count_mapping_calls;
    t_fail_call("munmap", 0, 1, false);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    CHECK_INT(unmaps, 101);
}

/* ---- the end of the loop ------------------------------------------------------------------*/

static void sleep_until_the_end(void *context)
{
    int rc = tsrv_sleep(3600000);
    CHECK_INT(rc, TSRV_ECLOSED);
    ++*(int *)context;
}

static void wait_until_the_end(void *context)
{
    fd_case *c = (fd_case *)context;
    CHECK_INT(tsrv_wait_fd(c->fds[0], TSRV_READABLE, TSRV_NEVER), TSRV_ECLOSED);
    c->steps++;
}

TEST_LOOP(freeing_the_loop_ends_every_wait_once)
{
    fd_case c = {0};
    int slept = 0;
    c.loop = t_new_loop();
    t_watch_log_of(TSRV_LOG_INFO);
    CHECK(pipe(c.fds) == 0);
    CHECK_INT(tsrv_spawn(c.loop, sleep_until_the_end, &slept), TSRV_OK);
    CHECK_INT(tsrv_spawn(c.loop, sleep_until_the_end, &slept), TSRV_OK);
    CHECK_INT(tsrv_spawn(c.loop, wait_until_the_end, &c), TSRV_OK);
    CHECK(tsrv_loop_run_once(c.loop, 0) > 0);
    CHECK(tsrv_loop_run_once(c.loop, 0) > 0);
    CHECK_INT(tsrv_loop_free(c.loop), TSRV_OK);
    CHECK_INT(slept, 2);
    CHECK_INT(c.steps, 1);
    CHECK_INT(t_log_lines, 0);
    t_close_all(c.fds, 2);
}

typedef struct stubborn {
    int entered, closed, other;
} stubborn;

static void sleep_for_ever(void *context)
{
    stubborn *s = (stubborn *)context;
    s->entered++;
    for (;;) {
        int rc = tsrv_sleep(3600000);
        s->closed += rc == TSRV_ECLOSED;
        s->other += rc != TSRV_ECLOSED;
    }
}

TEST_LOOP(coroutine_that_ignores_the_end_is_dropped_and_logged)
{
    stubborn s = {0, 0, 0};
    tsrv_loop *loop = t_new_loop();
    t_watch_log_of(TSRV_LOG_INFO);
    CHECK_INT(tsrv_spawn(loop, sleep_for_ever, &s), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(s.entered, 1);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    CHECK_INT(s.closed, 1);
    CHECK_INT(s.other, 0);
    CHECK(t_log_lines >= 1);
}

typedef struct end_case {
    int reading;
    int reason;
    int closes;
} end_case;

static int read_until_the_end(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    end_case *e = (end_case *)context;
    tsrv_slice slice;
    (void)address;
    e->reading++;
    int rc = tsrv_read_bytes(stream, 1, &slice);
    CHECK_INT(rc, TSRV_ECLOSED);
    CHECK_INT(tsrv_read_bytes(stream, 1, &slice), TSRV_ECLOSED);
    return rc;
}

static void note_reason(tsrv_stream *stream, int reason, void *context)
{
    end_case *e = (end_case *)context;
    (void)stream;
    e->reason = reason;
    e->closes++;
}

/* The server may be freed after its loop. */
TEST_LOOP(freeing_the_loop_ends_reads_and_aborts_streams)
{
    end_case e = {0, 0, 0};
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_address address;
    int fd;
    options.handle_stream = read_until_the_end;
    options.on_close = note_reason;
    options.context = &e;
    options.loop = t_new_loop();
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    CHECK_INT(tsrv_server_listen(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
    fd = t_connect(tsrv_address_port(&address));
    while (e.reading == 0) {
        CHECK(tsrv_loop_run_once(options.loop, 1000) > 0);
    }
    CHECK_INT(tsrv_loop_free(options.loop), TSRV_OK);
    CHECK_INT(e.closes, 1);
    CHECK_INT(e.reason, TSRV_ECLOSED);
    tsrv_server_free(server);
    t_expect_reset(fd);
    t_close(fd);
}

/* ---- several coroutines on one stream -----------------------------------------------------*/

typedef struct helper {
    tsrv_stream *stream;
    bool done;
} helper;

static void count_to_ten(void *context)
{
    helper *h = (helper *)context;
    for (int i = 0; i < 10; i++) {
        CHECK_INT(tsrv_printf(h->stream, "%d\n", i), TSRV_OK);
        CHECK_INT(tsrv_sleep(i % 3), TSRV_OK);
    }
    h->done = true;
    tsrv_wake(h->stream);
}

static int join_a_helper(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    helper h = {stream, false};
    int waits = 0;
    (void)address, (void)context;
    CHECK_INT(tsrv_spawn(tsrv_stream_loop(stream), count_to_ten, &h), TSRV_OK);
    while (!h.done) {
        CHECK_INT(tsrv_wait(stream, TSRV_NEVER), TSRV_OK);
        CHECK(++waits <= 3); /* it sleeps, and does not spin */
    }
    return tsrv_write(stream, "joined\n", 7);
}

static void expect_ten(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_expect(fd, "0\n1\n2\n3\n4\n5\n6\n7\n8\n9\njoined\n");
    t_leave(fd);
}

TEST_COROUTINE(handler_joins_its_helper)
{
    t_case c = {.handler = join_a_helper, .client = expect_ten};
    t_run(&c);
}

static void read_too(void *context)
{
    helper *h = (helper *)context;
    tsrv_slice slice;
    char byte;
    CHECK_INT(tsrv_read_some(h->stream, 0, &slice), TSRV_EBUSY);
    CHECK(slice.size == 0 && slice.data[0] == 0);
    CHECK_INT(tsrv_read_into(h->stream, &byte, 1), TSRV_EBUSY);
    h->done = true;
    t_record(1);
}

static int read_line_alone(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    helper h = {stream, false};
    tsrv_slice line;
    (void)address, (void)context;
    CHECK_INT(tsrv_spawn(tsrv_stream_loop(stream), read_too, &h), TSRV_OK);
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_OK);
    CHECK(h.done);
    return tsrv_write(stream, line.data, line.size);
}

static void send_line_later(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_wait_records(1);
    t_echo(fd, "line\n");
    t_leave(fd);
}

TEST_COROUTINE(second_reader_is_refused_and_the_first_goes_on)
{
    t_case c = {.handler = read_line_alone, .client = send_line_later};
    t_run(&c);
}

/* A coroutine that a drain has to end when it runs, as behind tsrv_run_in_thread, is told by its next wait, once. */
static int read_doomed(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_OK);
    CHECK_INT(line.size, 4);
    tsrvi_co_self()->doomed = true;
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_ECLOSED);
    CHECK(line.size == 0 && line.data[0] == 0);
    t_record(1);
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_OK);
    return tsrv_write(stream, line.data, line.size);
}

static void send_one_then_line(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_sends(fd, "one\n");
    t_wait_records(1);
    t_echo(fd, "line\n");
    t_leave(fd);
}

TEST_COROUTINE(read_that_may_not_wait_says_so_behind_one_that_had_its_line)
{
    t_case c = {.handler = read_doomed, .client = send_one_then_line};
    t_run(&c);
}

/* As in a proxy: the handler reads, its helper writes, and neither is held up by the other. The
 * client sends all before it reads anything, so that a read that waited for the output would never
 * end. */
typedef struct duplex {
    helper h;
    size_t size;
    size_t received;
} duplex;

static void write_pattern(void *context)
{
    duplex *d = (duplex *)context;
    char block[1000];
    for (size_t at = 0; at < d->size; at += sizeof block) {
        fill_pattern(block, at, sizeof block);
        CHECK_INT(tsrv_write(d->h.stream, block, sizeof block), TSRV_OK);
    }
    d->h.done = true;
    tsrv_wake(d->h.stream);
}

static int read_while_writing(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    duplex d = {{stream, false}, *(size_t *)context, 0};
    tsrv_slice slice;
    int rc;
    (void)address;
    CHECK_INT(tsrv_spawn(tsrv_stream_loop(stream), write_pattern, &d), TSRV_OK);
    while ((rc = tsrv_read_some(stream, 0, &slice)) == TSRV_OK) {
        for (size_t i = 0; i < slice.size; i++) {
            CHECK(slice.data[i] == pattern_at(d.received + i));
        }
        d.received += slice.size;
    }
    CHECK_INT(rc, TSRV_EOF);
    CHECK_INT(d.received, d.size);
    while (!d.h.done) {
        CHECK_INT(tsrv_wait(stream, TSRV_NEVER), TSRV_OK);
    }
    return TSRV_OK;
}

static void send_all_then_read(int port, void *context)
{
    size_t size = *(size_t *)context;
    char *data = new_pattern(size);
    int fd = t_connect(port);
    t_send(fd, data, size);
    t_shut(fd);
    expect_pattern_from(fd, 0, size);
    t_leave(fd);
    free(data);
}

TEST_COROUTINE(reader_and_writer_do_not_hold_each_other_up)
{
    size_t size = t_hard ? 60000 : 12000000;
    t_case c = {.handler = read_while_writing, .client = send_all_then_read, .context = &size,
                .options = {.write_high_water = t_hard ? 2000 : 0}};
    t_run(&c);
}

/* Five coroutines write while the peer reads nothing. The third block is larger than all that may
 * be unsent, and goes in pieces: the others must still not get between them. */
enum { WRITERS = 5, WRITE_LIMIT = 65536 };

typedef struct writers {
    tsrv_stream *stream;
    int entered, left;
    size_t sizes[WRITERS];
} writers;

static void write_a_block(void *context)
{
    writers *w = (writers *)context;
    int me = w->entered++;
    size_t size = w->sizes[me];
    char *block = (char *)malloc(size);
    CHECK(block != NULL);
    memset(block, 'A' + me, size);
    t_record(me);
    CHECK_INT(tsrv_write(w->stream, block, size), TSRV_OK);
    memset(block, '?', size); /* ours again */
    free(block);
    w->left--;
    tsrv_wake(w->stream);
}

static int spawn_writers(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    writers *w = (writers *)context;
    (void)address;
    w->stream = stream;
    w->left = WRITERS;
    limit_output_to(stream, 8192);
    for (int i = 0; i < WRITERS; i++) {
        CHECK_INT(tsrv_spawn(tsrv_stream_loop(stream), write_a_block, w), TSRV_OK);
    }
    while (w->left > 0) {
        CHECK_INT(tsrv_wait(stream, TSRV_NEVER), TSRV_OK);
    }
    return tsrv_write(stream, "end", 3);
}

static void expect_blocks(int port, void *context)
{
    writers *w = (writers *)context;
    int fd = t_connect(port);
    t_wait_records(WRITERS);
    for (int i = 0; i < WRITERS; i++) {
        char *expected = (char *)malloc(w->sizes[i]), *block = (char *)malloc(w->sizes[i]);
        CHECK(expected != NULL && block != NULL);
        memset(expected, 'A' + i, w->sizes[i]);
        CHECK_MEM(block, t_recv(fd, block, w->sizes[i]), expected, w->sizes[i]);
        free(expected);
        free(block);
    }
    t_expect(fd, "end");
    t_leave(fd);
}

TEST_COROUTINE(writers_go_in_call_order_each_in_one_piece)
{
    writers w = {NULL, 0, 0, {100, 3000, 0, 5000, 10}};
    t_case c = {0};
    w.sizes[2] = t_hard ? 3 * WRITE_LIMIT : 8000000;
    c.handler = spawn_writers;
    c.client = expect_blocks;
    c.context = &w;
    c.options.max_write_buffer_size = WRITE_LIMIT;
    c.options.write_high_water = WRITE_LIMIT / 4;
    t_run(&c);
}

/* Others try again and again, in all turns that the large write takes: also in those in which the
 * queue has just run empty and its next piece is not there yet. */
enum { DOTS = 400 };

typedef struct dots {
    tsrv_stream *stream;
    size_t size;  /* of the large write */
    int spawned;  /* the number of the next dot */
    int left;
} dots;

static void write_large(void *context)
{
    dots *d = (dots *)context;
    char *block = (char *)malloc(d->size);
    CHECK(block != NULL);
    memset(block, 'B', d->size);
    CHECK_INT(tsrv_write(d->stream, block, d->size), TSRV_OK);
    free(block);
    d->left--;
    tsrv_wake(d->stream);
}

static void write_dot(void *context)
{
    dots *d = (dots *)context;
    for (int turns = d->spawned++; turns > 0; turns--) {
        CHECK_INT(tsrv_sleep(0), TSRV_OK);
    }
    CHECK_INT(tsrv_write(d->stream, ".", 1), TSRV_OK);
    d->left--;
    tsrv_wake(d->stream);
}

static int write_large_and_dots(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    dots *d = (dots *)context;
    (void)address;
    d->stream = stream;
    d->left = DOTS + 1;
    CHECK_INT(tsrv_spawn(tsrv_stream_loop(stream), write_large, d), TSRV_OK);
    for (int i = 0; i < DOTS; i++) {
        CHECK_INT(tsrv_spawn(tsrv_stream_loop(stream), write_dot, d), TSRV_OK);
    }
    while (d->left > 0) {
        CHECK_INT(tsrv_wait(stream, TSRV_NEVER), TSRV_OK);
    }
    return TSRV_OK;
}

static void expect_dots_last(int port, void *context)
{
    dots *d = (dots *)context;
    size_t size = d->size + DOTS;
    char *expected = (char *)malloc(size), *received = (char *)malloc(size);
    int fd = t_connect(port);
    CHECK(expected != NULL && received != NULL);
    memset(expected, 'B', d->size);
    memset(expected + d->size, '.', DOTS);
    CHECK_MEM(received, t_recv_all(fd, received, size), expected, size);
    t_close(fd);
    free(expected);
    free(received);
}

TEST_COROUTINE(small_writes_do_not_get_into_a_large_one)
{
    dots d = {NULL, 0, 0, 0};
    t_case c = {0};
    d.size = t_hard ? 100000 : 20000000;
    c.handler = write_large_and_dots;
    c.client = expect_dots_last;
    c.context = &d;
    c.options.max_write_buffer_size = t_hard ? 4096 : WRITE_LIMIT;
    c.options.write_high_water = t_hard ? 1024 : WRITE_LIMIT / 4;
    t_run(&c);
}

/* ---- closing from another coroutine -------------------------------------------------------*/

static void close_it(void *context)
{
    CHECK_INT(tsrv_close((tsrv_stream *)context), TSRV_OK);
}

static void abort_it(void *context)
{
    CHECK_INT(tsrv_abort((tsrv_stream *)context), TSRV_OK);
}

typedef struct kick_case {
    tsrv_callback kick;
    int kind; /* what the handler waits in */
} kick_case;

static int wait_to_be_kicked(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    kick_case *k = (kick_case *)context;
    tsrv_slice slice;
    char byte;
    int rc = TSRV_OK;
    (void)address;
    CHECK_INT(tsrv_spawn(tsrv_stream_loop(stream), k->kick, stream), TSRV_OK);
    switch (k->kind) {
    case 0: rc = tsrv_read_until(stream, "\n", 0, &slice); break;
    case 1: rc = tsrv_read_into(stream, &byte, 1); break;
    case 2: rc = tsrv_read_until_close(stream, 0, &slice); break;
    default: CHECK_INT(tsrv_wait(stream, TSRV_NEVER), TSRV_OK); /* woken, see the condition */
    }
    if (k->kind < 3) {
        CHECK_INT(rc, TSRV_ECLOSED);
    }
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &slice), TSRV_ECLOSED);
    CHECK_INT(tsrv_write(stream, "x", 1), TSRV_ECLOSED);
    CHECK_INT(tsrv_flush(stream), TSRV_ECLOSED);
    t_record(k->kind);
    return TSRV_ECLOSED;
}

static void be_kicked(int port, void *context)
{
    kick_case *k = (kick_case *)context;
    int fd = t_connect(port);
    if (k->kick == close_it) {
        t_expect_eof(fd);
    } else {
        t_expect_reset(fd);
    }
    t_close(fd);
}

TEST_COROUTINE(closing_ends_a_wait_of_another_coroutine)
{
    for (int i = 0; i < 8; i++) {
        kick_case k = {i % 2 ? abort_it : close_it, i / 2};
        t_case c = {.handler = wait_to_be_kicked, .client = be_kicked, .context = &k};
        t_run(&c);
        CHECK_INT(t_record_count(), i + 1);
    }
}

/* ---- slices across waits ------------------------------------------------------------------*/

/* All streams of a loop may share one buffer to receive into: what a handler still holds when it
 * waits must be its own by then. Each message tells its length and seed, and how it is read. */
enum { SLICES_PEERS = 40, SLICES_ROUNDS = 6 };

static size_t make_message(unsigned seed, char *message)
{
    size_t size = 20 + seed * 2654435761u % 1500;
    size_t used = (size_t)sprintf(message, "%c %u %zu ", (int)('a' + seed % 4), seed, size);
    for (size_t i = used; i < size - 1; i++) {
        message[i] = (char)('A' + (i * seed + seed) % 26);
    }
    message[size - 1] = '\n';
    return size;
}

static size_t match_message(const char *data, size_t size, void *context)
{
    const char *end = (const char *)memchr(data, '\n', size);
    (void)context;
    return end != NULL ? (size_t)(end - data) + 1 : 0;
}

static int hold_slices(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    char expected[2000];
    tsrv_slice slice;
    unsigned seed, rounds = 0;
    int rc;
    (void)address, (void)context;
    for (;;) {
        size_t size;
        rc = tsrv_read_until(stream, " ", 0, &slice);
        if (rc != TSRV_OK) {
            break;
        }
        /* Held across a sleep while its message is still being received. */
        char kind = slice.data[0];
        CHECK_INT(slice.size, 2);
        CHECK_INT(tsrv_sleep((int)(rounds++ % 3)), TSRV_OK);
        CHECK(slice.data[0] == kind && slice.data[1] == ' ' && slice.data[2] == 0);
        CHECK_INT(tsrv_read_until(stream, " ", 0, &slice), TSRV_OK);
        CHECK(sscanf(slice.data, "%u ", &seed) == 1);
        size = make_message(seed, expected);
        CHECK(expected[0] == kind);
        size_t used = 2 + slice.size;
        switch (kind) {
        case 'a': rc = tsrv_read_until(stream, "\n", 0, &slice); break;
        case 'b': rc = tsrv_read_bytes(stream, size - used, &slice); break;
        case 'c': rc = tsrv_read_until_match(stream, match_message, NULL, 0, &slice); break;
        default: rc = tsrv_read_until_mem(stream, "\n", 1, 0, &slice);
        }
        CHECK_INT(rc, TSRV_OK);
        for (int waits = 0; waits < 3; waits++) {
            CHECK_INT(tsrv_sleep(waits), TSRV_OK);
            CHECK_MEM(slice.data, slice.size, expected + used, size - used);
            CHECK(slice.data[slice.size] == 0);
        }
        CHECK_INT(tsrv_write(stream, slice.data, slice.size), TSRV_OK);
    }
    return rc;
}

static void send_messages(int port, void *context)
{
    static char messages[SLICES_PEERS][2][2000];
    int fds[SLICES_PEERS], peers = t_hard ? 10 : SLICES_PEERS;
    unsigned seed = 1;
    (void)context;
    for (int i = 0; i < peers; i++) {
        fds[i] = t_connect(port);
    }
    for (int round = 0; round < SLICES_ROUNDS; round++) {
        size_t sizes[SLICES_PEERS][2];
        for (int i = 0; i < peers; i++) {
            char both[4000];
            sizes[i][0] = make_message(seed++, messages[i][0]);
            sizes[i][1] = make_message(seed++, messages[i][1]);
            memcpy(both, messages[i][0], sizes[i][0]);
            memcpy(both + sizes[i][0], messages[i][1], sizes[i][1]);
            t_send(fds[i], both, sizes[i][0] + sizes[i][1]);
        }
        for (int k = 0; k < 2 * peers; k++) {
            const char *message = messages[k / 2][k % 2];
            size_t size = sizes[k / 2][k % 2];
            char back[2000];
            const char *rest = strchr(message + 2, ' ') + 1; /* what follows kind and seed */
            size_t expected = size - (size_t)(rest - message);
            CHECK_MEM(back, t_recv(fds[k / 2], back, expected), rest, expected);
        }
    }
    for (int i = 0; i < peers; i++) {
        t_finish(fds[i]);
    }
}

TEST_COROUTINE(slices_survive_sleeps_and_the_reads_of_others)
{
    t_case c = {.handler = hold_slices, .client = send_messages};
    t_run(&c);
}

/* A slice also survives waits of other kinds, and writes that wait. */
static int hold_across_other_waits(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static const char expected[] = "the first line\n";
    tsrv_slice slice;
    (void)address, (void)context;
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &slice), TSRV_OK);
    CHECK_INT(tsrv_wait(stream, 5), TSRV_ETIMEOUT);
    CHECK_MEM(slice.data, slice.size, expected, sizeof expected - 1);
    for (int i = 0; i < 100; i++) {
        CHECK_INT(tsrv_write(stream, slice.data, slice.size), TSRV_OK);
    }
    CHECK_INT(tsrv_flush(stream), TSRV_OK);
    CHECK_MEM(slice.data, slice.size, expected, sizeof expected - 1);
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &slice), TSRV_OK);
    CHECK_MEM(slice.data, slice.size, "the second\n", 11);
    return tsrv_write(stream, slice.data, slice.size);
}

static void send_two_lines(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_sends(fd, "the first line\nthe second\n");
    for (int i = 0; i < 100; i++) {
        t_expect(fd, "the first line\n");
    }
    t_expect(fd, "the second\n");
    t_leave(fd);
}

TEST_COROUTINE(slice_survives_wait_write_and_flush)
{
    t_case c = {.handler = hold_across_other_waits, .client = send_two_lines,
                .options = {.write_high_water = 100}};
    t_run(&c);
}

/* ---- TSRV_EAGAIN from a coroutine ---------------------------------------------------------*/

static int one_line_a_call(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    t_record(1);
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc == TSRV_OK) {
        rc = tsrv_write(stream, line.data, line.size);
    }
    return rc == TSRV_OK ? TSRV_EAGAIN : rc;
}

static void note_end(tsrv_stream *stream, int reason, void *context)
{
    (void)stream;
    *(int *)context = reason;
}

static void send_lines(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_echo(fd, "a\nb\nc\n");
    t_echo(fd, "d\n");
    t_finish(fd);
}

TEST_COROUTINE(handler_that_returns_eagain_is_called_again)
{
    t_case c = {0};
    int reason = 1;
    c.handler = one_line_a_call;
    c.on_close = note_end;
    c.client = send_lines;
    c.context = &reason;
    t_run(&c);
    CHECK_INT(reason, TSRV_EOF);
    CHECK(t_record_count() >= 5); /* four lines and the end */
}

/* ---- dropped where they stand -------------------------------------------------------------*/

static void wait_for_ever(void *context)
{
    const int *fds = (const int *)context;
    for (;;) {
        t_record(tsrv_wait_fd(fds[0], TSRV_READABLE, TSRV_NEVER)); /* takes no notice of the end */
    }
}

/* What it waits with lies on its stack, which goes before the loop does. */
TEST_LOOP(loop_free_drops_a_coroutine_that_waits_for_a_descriptor_again)
{
    tsrv_loop *loop;
    int fds[2];
    tsrv_set_log(t_no_log, NULL);
    CHECK(pipe(fds) == 0);
    loop = t_new_loop();
    CHECK_INT(tsrv_spawn(loop, wait_for_ever, fds), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), TSRV_ECLOSED);
    t_close_all(fds, 2);
}

static int never_return(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream;
    (void)address;
    while (context == NULL) {
        tsrv_sleep(1000);
    }
    return 0;
}

TEST_LOOP(loop_free_drops_handlers_that_never_return)
{
    enum { STREAMS = 3 };
    tsrv_server_options server_options;
    tsrv_loop *loop;
    tsrv_server *server;
    int pairs[STREAMS][2];
    memset(&server_options, 0, sizeof server_options);
    tsrv_set_log(t_no_log, NULL);
    loop = t_new_loop();
    server_options.loop = loop;
    server_options.handle_stream = never_return;
    server_options.on_close = t_record_reason;
    CHECK_INT(tsrv_server_new(&server, &server_options), TSRV_OK);
    for (int i = 0; i < STREAMS; i++) {
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pairs[i]) == 0);
        CHECK_INT(tsrv_server_add_stream(server, pairs[i][0]), TSRV_OK);
    }
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    CHECK_INT(t_record_count(), STREAMS); /* on_close, once for each */
    for (int i = 0; i < STREAMS; i++) {
        CHECK_INT(t_recorded(i), TSRV_ECLOSED);
        t_close(pairs[i][1]);
    }
    tsrv_server_free(server);
}

/* ---- a look at a descriptor ------------------------------------------------------------------*/

static void look_at_a_pipe(void *context)
{
    int fds[2];
    CHECK(pipe(fds) == 0);
    CHECK_INT(tsrv_wait_fd(fds[0], TSRV_READABLE, 0), TSRV_ETIMEOUT);
    CHECK_INT(tsrv_wait_fd(fds[1], TSRV_WRITABLE, 0), TSRV_OK);
    CHECK_INT(tsrv_wait_fd(fds[1], TSRV_READABLE | TSRV_WRITABLE, 0), TSRV_OK);
    CHECK(write(fds[1], "x", 1) == 1);
    t_fail_call("poll", EINTR, 1, false);
    CHECK_INT(tsrv_wait_fd(fds[0], TSRV_READABLE, 0), TSRV_OK);
    CHECK_INT(t_fault_hits, 1);
    t_fail_call("poll", ENOMEM, 1, false);
    CHECK_INT(tsrv_wait_fd(fds[0], TSRV_READABLE, 0), -ENOMEM);
    t_fault_at = 0;
    t_close_all(fds, 2);
    CHECK_INT(tsrv_wait_fd(fds[0], TSRV_READABLE, 0), -EBADF);
    *(int *)context = 1;
}

TEST_LOOP(wait_fd_of_no_time_is_a_look)
{
    tsrv_loop *loop = t_new_loop();
    int looked = 0;
    CHECK_INT(tsrv_spawn(loop, look_at_a_pipe, &looked), TSRV_OK);
    t_turn_until(loop, &looked, 1);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* A client library that takes what is there for as long as there is something, as from a peer that floods it. */
static void look_again_and_again(void *over)
{
    int fds[2];
    CHECK(pipe(fds) == 0);
    for (int looks = 0; *(int *)over == 0; looks++) {
        CHECK(looks < 100000);
        CHECK_INT(tsrv_wait_fd(fds[0], TSRV_READABLE, 0), TSRV_ETIMEOUT);
        CHECK_INT(tsrv_wait_fd(fds[1], TSRV_WRITABLE, 0), TSRV_OK);
    }
    t_close_all(fds, 2);
}

static void end_it(void *over)
{
    *(int *)over = 1;
}

TEST_LOOP(looks_let_others_run)
{
    tsrv_loop *loop = t_new_loop();
    int over = 0;
    CHECK_INT(tsrv_spawn(loop, look_again_and_again, &over), TSRV_OK);
    CHECK_INT(tsrv_spawn(loop, end_it, &over), TSRV_OK);
    t_turn_until(loop, &over, 1);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* ---- coroutines that cannot be made ----------------------------------------------------------*/

static void note_run(void *context)
{
    ++*(int *)context;
}

TEST_LOOP(a_coroutine_that_cannot_be_made_is_an_error)
{
    tsrv_loop *loop = t_new_loop();
    int calls = 0;
    t_fail_call("mmap", ENOMEM, 1, true);
    CHECK_INT(tsrv_spawn(loop, note_run, &calls), -ENOMEM);
    t_fail_call("mprotect", ENOMEM, 1, true);
    t_fault_name = NULL;
    CHECK_INT(tsrv_spawn(loop, note_run, &calls), -ENOMEM);
    t_fault_at = 0;
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(calls, 0);
    CHECK_INT(tsrv_spawn(loop, note_run, &calls), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(calls, 1);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* ---- ends that come together -----------------------------------------------------------------*/

static int yield_codes[2];

static void yield_at_the_end(void *context)
{
    (void)context;
    yield_codes[0] = tsrv_sleep(3600 * 1000);
    yield_codes[1] = tsrv_sleep(0);
    T_FAIL("a loop that is freed lets a coroutine yield twice");
}

/* In a loop that goes nobody else has a turn. */
TEST_LOOP(yielding_in_a_loop_that_is_freed_ends_like_any_wait)
{
    tsrv_loop *loop = t_new_loop();
    yield_codes[0] = yield_codes[1] = 1;
    t_watch_log();
    CHECK_INT(tsrv_spawn(loop, yield_at_the_end, NULL), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    CHECK_INT(yield_codes[0], TSRV_ECLOSED);
    CHECK_INT(yield_codes[1], 1);
    CHECK_INT(t_log_lines, 1);
    CHECK_STR(t_log, "tsrv_loop_free: 1 coroutines still waited and were dropped");
}

typedef struct batch_case {
    tsrv_server *server;
    tsrv_watch watches[2];
    int pipes[3][2], waiting, rc;
    bool freed;
} batch_case;

static int wait_for_the_pipe(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    batch_case *b = (batch_case *)context;
    (void)stream, (void)address;
    CHECK_INT(tsrv_watch_start(b->watches[0].loop, &b->watches[0], b->pipes[0][0], TSRV_READABLE,
                               b->watches[0].callback, b),
              TSRV_OK);
    b->waiting = 1;
    b->rc = tsrv_wait_fd(b->pipes[1][0], TSRV_READABLE, TSRV_NEVER);
    CHECK_INT(b->rc, b->freed ? TSRV_ECLOSED : TSRV_OK); /* whichever came first */
    return b->rc;
}

static void free_in_the_batch(int events, void *context)
{
    batch_case *b = (batch_case *)context;
    (void)events;
    for (int i = 0; i < 2; i++) {
        tsrv_watch_stop(&b->watches[i]);
    }
    b->freed = true;
    tsrv_server_free(b->server);
}

/* Its descriptor is ready, and before that is told the server goes: the wait ends once. */
TEST_COROUTINE(wait_fd_that_is_ready_when_its_server_is_freed)
{
    tsrv_server_options options = {0};
    batch_case b;
    memset(&b, 0, sizeof b);
    b.rc = 1;
    options.handle_stream = wait_for_the_pipe;
    options.context = &b;
    options.loop = t_new_loop();
    CHECK_INT(tsrv_server_new(&b.server, &options), TSRV_OK);
    for (int i = 0; i < 3; i++) {
        CHECK(pipe(b.pipes[i]) == 0);
    }
    for (int i = 0; i < 2; i++) {
        CHECK_INT(tsrv_watch_start(options.loop, &b.watches[i], b.pipes[2 * i][0], TSRV_READABLE, free_in_the_batch,
                                   &b),
                  TSRV_OK);
    }
    int fd = t_connect(t_listen(b.server));
    t_turn_until(options.loop, &b.waiting, 1);
    for (int i = 0; i < 3; i++) {
        CHECK(write(b.pipes[2 - i][1], "x", 1) == 1); /* the server goes before or behind */
    }
    CHECK(tsrv_loop_run(options.loop) == TSRV_OK);
    CHECK(b.freed && b.rc <= TSRV_OK);
    t_close(fd);
    for (int i = 0; i < 3; i++) {
        t_close_all(b.pipes[i], 2);
    }
    CHECK_INT(tsrv_loop_free(options.loop), TSRV_OK);
}
