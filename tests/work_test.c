/* Threads for what blocks: tsrv_work and tsrv_run_in_thread. */
#include "test.h"

#include "handlers.h"

#include <dirent.h>

static tsrv_loop *loop;
static pthread_t loop_thread;

static void *idle_thread(void *context)
{
    return context;
}

static void open_with(int max_threads)
{
    tsrv_loop_options options = {0};
    pthread_t first; /* with which a sanitizer's own begins */
    CHECK_INT(pthread_create(&first, NULL, idle_thread, NULL), 0);
    CHECK_INT(pthread_join(first, NULL), 0);
    options.backend = t_backend;
    options.max_threads = max_threads;
    loop_thread = pthread_self();
    CHECK_INT(tsrv_loop_new(&loop, &options), TSRV_OK);
}

static int threads_of_process(void)
{
    int count = 0;
    DIR *tasks = opendir("/proc/self/task");
    while (tasks != NULL && readdir(tasks) != NULL) {
        count++;
    }
    if (tasks != NULL) {
        closedir(tasks);
    }
    return count - 2;
}

/* One that was joined is seen there for a moment longer. */
static void wait_for_threads(int count)
{
    int64_t limit = t_patience();
    while (threads_of_process() != count) {
        CHECK(t_now_ms() < limit);
        usleep(500);
    }
}

/* ---- one job ------------------------------------------------------------------------------*/

typedef struct job {
    int id;
    bool worked; /* and done */
} job;

static void work(void *context)
{
    job *j = (job *)context;
    CHECK(!pthread_equal(pthread_self(), loop_thread));
    CHECK(!j->worked);
    j->worked = true;
    t_record(j->id);
}

static void done(void *context)
{
    job *j = (job *)context;
    CHECK(pthread_equal(pthread_self(), loop_thread));
    CHECK(j->worked);
    t_record(100 + j->id);
}

TEST_LOOP(work_is_done_on_a_thread_and_told_on_the_loop)
{
    job one = {1, false}, two = {2, false};
    open_with(0);
    int before = threads_of_process();
    CHECK_INT(tsrv_work(loop, work, done, &one), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK); /* until it is over */
    CHECK_INT(t_record_count(), 2);
    CHECK_INT(t_recorded(0), 1);
    CHECK_INT(t_recorded(1), 101);
    CHECK_INT(tsrv_work(loop, work, NULL, &two), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK(two.worked);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    wait_for_threads(before);
}

TEST_LOOP(arguments_of_work_are_checked)
{
    tsrv_loop_options options = {0};
    options.max_threads = -1;
    CHECK_INT(tsrv_loop_new(&loop, &options), TSRV_EINVAL);
    CHECK(loop == NULL);
    open_with(0);
    CHECK_INT(tsrv_work(loop, NULL, done, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_run_in_thread(work, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

TEST_LOOP(work_begins_in_order)
{
    job jobs[100];
    int seen = 0;
    open_with(1);
    for (int i = 0; i < 100; i++) {
        jobs[i].id = i;
        jobs[i].worked = false;
        CHECK_INT(tsrv_work(loop, work, NULL, &jobs[i]), TSRV_OK);
    }
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    for (; seen < 100; seen++) {
        CHECK_INT(t_recorded(seen), seen);
    }
    CHECK_INT(t_record_count(), 100);
}

/* ---- how many threads ---------------------------------------------------------------------*/

static int at_once, most_at_once, gate; /* atomic */

static void wait_for_gate(void *context)
{
    int now = __atomic_add_fetch(&at_once, 1, __ATOMIC_SEQ_CST), most = __atomic_load_n(&most_at_once, __ATOMIC_SEQ_CST);
    (void)context;
    while (now > most &&
           !__atomic_compare_exchange_n(&most_at_once, &most, now, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    while (!__atomic_load_n(&gate, __ATOMIC_SEQ_CST)) {
        usleep(500);
    }
    __atomic_sub_fetch(&at_once, 1, __ATOMIC_SEQ_CST);
}

static void wait_until_at_once(int count)
{
    int64_t limit = t_patience();
    while (__atomic_load_n(&at_once, __ATOMIC_SEQ_CST) < count) {
        CHECK(t_now_ms() < limit);
        usleep(500);
    }
}

/* The post comes a moment before. */
static void wait_until_idle(void)
{
    int64_t limit = t_patience();
    for (int idle = 0; idle == 0;) {
        CHECK(t_now_ms() < limit);
        usleep(500);
        pthread_mutex_lock(&loop->work.lock);
        idle = loop->work.idle;
        pthread_mutex_unlock(&loop->work.lock);
    }
}

static void check_most_threads(int max_threads, int most)
{
    at_once = most_at_once = gate = 0;
    open_with(max_threads);
    int before = threads_of_process();
    for (int i = 0; i < 3 * most; i++) {
        CHECK_INT(tsrv_work(loop, wait_for_gate, NULL, NULL), TSRV_OK);
    }
    wait_until_at_once(most);
    wait_for_threads(before + most);
    __atomic_store_n(&gate, 1, __ATOMIC_SEQ_CST);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(most_at_once, most);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    wait_for_threads(before);
}

TEST_LOOP(threads_are_made_as_they_are_needed)
{
    job one = {1, false};
    t_need_proc();
    check_most_threads(0, 4);
    check_most_threads(1, 1);
    check_most_threads(7, 7);
    open_with(0);
    int before = threads_of_process();
    for (int i = 0; i < 3; i++) { /* one at a time needs one */
        one.worked = false;
        CHECK_INT(tsrv_work(loop, work, NULL, &one), TSRV_OK);
        CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
        wait_until_idle();
    }
    CHECK_INT(threads_of_process() - before, 1);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

static int echo_once(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    (void)address, (void)context;
    return rc == TSRV_OK ? tsrv_write(stream, line.data, line.size) : rc;
}

/* A client of a server of the same loop, by number; all that there is then is this thread. */
static void ask_without_work(void *context)
{
    tsrv_stream *stream;
    tsrv_slice line;
    CHECK_INT(tsrv_connect("127.0.0.1", *(const int *)context, NULL, &stream), TSRV_OK);
    CHECK_INT(tsrv_write(stream, "hello\n", 6), TSRV_OK);
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_OK);
    CHECK_INT(tsrv_close(stream), TSRV_OK);
    CHECK_INT(tsrv_sleep(1), TSRV_OK);
    t_record(threads_of_process());
    tsrv_loop_stop(NULL);
}

TEST_LOOP(nobody_has_threads_without_work)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_address address;
    t_need_proc();
    open_with(0); /* a sanitizer's thread is there from now on */
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    int before = threads_of_process(), port;
    open_with(0);
    options.handle_stream = echo_once;
    options.loop = loop;
    tsrv_set_log(t_no_log, NULL);
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    CHECK_INT(tsrv_server_listen(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
    port = tsrv_address_port(&address);
    CHECK_INT(tsrv_spawn(loop, ask_without_work, &port), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), before);
    tsrv_server_free(server);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* ---- failures -----------------------------------------------------------------------------*/

TEST_LOOP(failing_call_leaves_no_trace)
{
    static const struct {
        const char *name;
        long calls;
        int code;
    } faults[] = {{"malloc", 2, -ENOMEM}, {"realloc", 1, -ENOMEM}, {"pthread_mutex_init", 1, -ENOMEM}, {"pthread_cond_init", 1, -ENOMEM}, {"pthread_create", 1, -EAGAIN}};
    for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++) {
        for (long at = 1; at <= faults[i].calls; at++) {
            job one = {1, false};
            open_with(0);
            t_fail_call(faults[i].name, 0, at, false);
            CHECK_INT(tsrv_work(loop, work, done, &one), faults[i].code);
            CHECK_INT(t_fault_hits, 1);
            t_fail_call("", 0, 0, false);
            CHECK(!one.worked && loop->active == 0);
            CHECK_INT(tsrv_work(loop, work, done, &one), TSRV_OK);
            CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
            CHECK(one.worked);
            CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
        }
    }
    CHECK_INT(t_live_allocations, 0);
}

/* With one thread the rest may be refused. */
TEST_LOOP(one_thread_is_enough)
{
    job jobs[5];
    open_with(0);
    t_fail_call("pthread_create", 0, 2, true);
    for (int i = 0; i < 5; i++) {
        jobs[i].id = i;
        jobs[i].worked = false;
        CHECK_INT(tsrv_work(loop, work, done, &jobs[i]), TSRV_OK);
    }
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(t_record_count(), 10);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* ---- signals ------------------------------------------------------------------------------*/

static void check_signals_blocked(void *context)
{
    sigset_t blocked;
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &blocked) == 0);
    for (int signo = 1; signo < 32; signo++) {
        bool fault = signo == SIGSEGV || signo == SIGBUS || signo == SIGFPE || signo == SIGILL || signo == SIGTRAP || signo == SIGSYS;
        CHECK(signo == SIGKILL || signo == SIGSTOP || sigismember(&blocked, signo) == (fault ? 0 : 1));
    }
    *(bool *)context = true;
}

TEST_LOOP(signals_are_the_loops)
{
    sigset_t before, after;
    bool checked = false;
    open_with(0);
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &before) == 0);
    CHECK_INT(tsrv_work(loop, check_signals_blocked, NULL, &checked), TSRV_OK);
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &after) == 0);
    for (int signo = 1; signo < 32; signo++) {
        CHECK_INT(sigismember(&after, signo), sigismember(&before, signo));
    }
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK(checked);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* ---- in a coroutine -----------------------------------------------------------------------*/

static void run_three(void *context)
{
    (void)context;
    for (int i = 1; i <= 3; i++) {
        job mine = {i, false}; /* on this stack */
        CHECK_INT(tsrv_run_in_thread(work, &mine), TSRV_OK);
        CHECK(mine.worked);
    }
    CHECK_INT(tsrv_run_in_thread(NULL, NULL), TSRV_EINVAL);
    t_record(1000);
}

static void open_gate(void *context)
{
    (void)context;
    __atomic_store_n(&gate, 1, __ATOMIC_SEQ_CST);
}

/* The loop opens the gate while the coroutine waits. */
static void run_until_gate(void *context)
{
    (void)context;
    CHECK_INT(tsrv_loop_post(loop, open_gate, NULL), TSRV_OK);
    CHECK_INT(tsrv_run_in_thread(wait_for_gate, NULL), TSRV_OK);
    t_record(2000);
}

TEST_LOOP(coroutine_waits_while_others_run)
{
    at_once = most_at_once = gate = 0;
    open_with(0);
    CHECK_INT(tsrv_spawn(loop, run_three, NULL), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(t_record_count(), 4);
    CHECK_INT(t_recorded(3), 1000);
    CHECK_INT(tsrv_spawn(loop, run_until_gate, NULL), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(t_recorded(4), 2000);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

static void run_in_vain(void *context)
{
    (void)context;
    CHECK_INT(tsrv_run_in_thread(wait_for_gate, NULL), -EAGAIN);
    t_record(3000);
}

TEST_LOOP(failure_of_a_thread_is_told_to_the_coroutine)
{
    open_with(0);
    t_fail_call("pthread_create", 0, 1, true);
    CHECK_INT(tsrv_spawn(loop, run_in_vain, NULL), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(t_recorded(0), 3000);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* ---- ends ---------------------------------------------------------------------------------*/

static void end_of_a_wait(void *context)
{
    CHECK_INT(tsrv_run_in_thread(wait_for_gate, NULL), TSRV_OK);
    t_record(*(int *)context);
    CHECK_INT(tsrv_sleep(1000000), TSRV_ECLOSED); /* which it is told here, once */
    t_record(*(int *)context);
    CHECK_INT(tsrv_run_in_thread(wait_for_gate, NULL), TSRV_ECLOSED);
    CHECK_INT(tsrv_work(loop, work, done, NULL), TSRV_ECLOSED);
    t_record(*(int *)context);
}

static void *open_gate_later(void *context)
{
    (void)context;
    wait_until_at_once(1);
    usleep(20000); /* by then tsrv_loop_free waits, or else it has less to do */
    open_gate(NULL);
    return NULL;
}

/* What has begun, and what has not. */
TEST_LOOP(freeing_the_loop_waits_for_all_work)
{
    job one = {1, false};
    pthread_t opener;
    int id = 50;
    at_once = most_at_once = gate = 0;
    open_with(1);
    CHECK_INT(tsrv_spawn(loop, end_of_a_wait, &id), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(tsrv_work(loop, work, done, &one), TSRV_OK);
    CHECK_INT(pthread_create(&opener, NULL, open_gate_later, NULL), 0);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    CHECK_INT(pthread_join(opener, NULL), 0);
    CHECK(one.worked);
    CHECK_INT(t_record_count(), 5);
    CHECK_INT(t_live_allocations, 0);
}

/* A child of a program with work under way, and with work that has not begun, has neither threads nor a loop, and is told
 * so at once; here all is done once. */
TEST_LOOP(work_under_way_is_not_the_childs)
{
    job one = {1, false};
    int status;
    at_once = most_at_once = gate = 0;
    open_with(1);
    CHECK_INT(tsrv_work(loop, wait_for_gate, NULL, NULL), TSRV_OK);
    CHECK_INT(tsrv_work(loop, work, done, &one), TSRV_OK);
    wait_until_at_once(1);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        tsrv_set_log(t_no_log, NULL);
        alarm(20);
        CHECK_INT(tsrv_work(loop, work, done, &one), TSRV_EINVAL);
        CHECK_INT(tsrv_loop_run(loop), TSRV_EINVAL);
        CHECK_INT(tsrv_loop_free(loop), TSRV_EINVAL);
        _exit(7);
    }
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
    CHECK(!one.worked);
    open_gate(NULL);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK(one.worked);
    CHECK_INT(t_record_count(), 2);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* A drain's grace ends while a handler's work is under way: the handler learns it in its next wait. */
static int ended;

static int work_in_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    CHECK_INT(tsrv_run_in_thread(wait_for_gate, NULL), TSRV_OK);
    CHECK_INT(tsrv_sleep(1000000), TSRV_ECLOSED);
    CHECK_INT(tsrv_read_bytes(stream, 1, NULL), TSRV_ECLOSED);
    ended++;
    return TSRV_OK;
}

static void drain_and_open(void *context)
{
    tsrv_server *server = (tsrv_server *)context;
    CHECK_INT(tsrv_server_drain(server, 1), TSRV_ETIMEOUT);
    ended += 10;
}

/* The next wait may be a read of another stream: that is told nothing but the end, and waits no more. */
static int read_upstream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_stream *upstream;
    tsrv_slice slice = {"unset", 5};
    (void)stream, (void)address;
    CHECK_INT(tsrv_connect("127.0.0.1", *(const int *)context, NULL, &upstream), TSRV_OK);
    CHECK_INT(tsrv_run_in_thread(wait_for_gate, NULL), TSRV_OK);
    CHECK_INT(tsrv_read_until(upstream, "\n", 100, &slice), TSRV_ECLOSED);
    CHECK_INT(slice.size, 0);
    CHECK_INT(tsrv_close(upstream), TSRV_OK);
    CHECK_INT(tsrv_sleep(1), TSRV_OK);
    ended++;
    return TSRV_OK;
}

static void drain_with(int (*handler)(tsrv_stream *, const tsrv_address *, void *), void *context)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_timer timer = {0};
    int pair[2];
    at_once = most_at_once = gate = ended = 0;
    open_with(0);
    options.handle_stream = handler;
    options.context = context;
    options.loop = loop;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK_INT(tsrv_server_add_stream(server, pair[0]), TSRV_OK);
    CHECK_INT(tsrv_spawn(loop, drain_and_open, server), TSRV_OK);
    CHECK_INT(tsrv_timer_start(loop, &timer, 100, open_gate, NULL), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(ended, 11);
    close(pair[1]);
    tsrv_server_free(server);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

TEST_LOOP(drain_does_not_cut_work)
{
    drain_with(work_in_handler, NULL);
}

TEST_LOOP(read_of_another_stream_is_told_that_the_grace_is_over)
{
    int port, upstream = t_raw_socket(SOCK_STREAM, true, &port);
    drain_with(read_upstream, &port);
    close(upstream);
}

/* In callback mode: work, and a wake when it is done. */
static int wakes, peer;

static void wake_stream(void *context)
{
    wakes++;
    tsrv_wake((tsrv_stream *)context);
}

static void work_a_little(void *context)
{
    (void)context;
    t_record(1);
}

static int work_and_wait(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    if (t_record_count() == 0 && wakes == 0) {
        CHECK_INT(tsrv_work(loop, work_a_little, wake_stream, stream), TSRV_OK);
    }
    int rc = tsrv_wait(stream, TSRV_NEVER);
    if (rc == TSRV_EAGAIN) {
        return rc;
    }
    CHECK_INT(wakes, 1);
    ended++;
    close(peer);
    return rc;
}

TEST_LOOP(handler_of_callback_mode_is_woken)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    int pair[2];
    wakes = ended = 0;
    open_with(0);
    options.handle_stream = work_and_wait;
    options.mode = TSRV_CALLBACK;
    options.loop = loop;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK_INT(tsrv_server_add_stream(server, pair[0]), TSRV_OK);
    peer = pair[1];
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(ended, 1);
    tsrv_server_free(server);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}
