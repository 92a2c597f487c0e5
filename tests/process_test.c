/* Workers and their supervisor. Its core is what Tornado's process_test.py and the TestMultiprocess of
 * its tcpserver_test.py check. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "seam.h"
#include <unistd.h>

static int processors; /* that this machine is to have; 0 = those that it has */

#undef t_sys_sched_getaffinity
#undef t_sys_sysconf
#define t_sys_sched_getaffinity(...) (processors > 0 ? -1 : sched_getaffinity(__VA_ARGS__))
#define t_sys_sysconf(name) ((name) == _SC_NPROCESSORS_ONLN && processors > 0 ? processors : sysconf(name))

#include "workers.h"

/* ---- what Tornado tests -------------------------------------------------------------------*/

/* Two workers exit 2 and 3 and are replaced, a third exits 4 and is replaced; exit 0 is not. */
TEST_LOOP(test_multi_process)
{
    workers = 3;
    fork_options.max_restarts = 3;
    pid_t pid = launch(program_add_sockets);
    await_forks(3);
    command(0, "exit 2\n");
    command(1, "exit 3\n");
    await_forks(5);
    command(2, "exit 4\n");
    await_forks(6);
    CHECK_INT(board->exit[2].id, 2);
    CHECK(WIFEXITED(board->exit[2].status) && WEXITSTATUS(board->exit[2].status) == 4);
    CHECK(board->pids[5] != board->exit[2].pid);
    int again = 0;
    for (int i = 3; i < 6; i++) {
        again |= 1 << board->ids[i];
    }
    CHECK_INT(again, 7); /* the same task ids */
    for (int i = 0; i < 3; i++) {
        command(i, "exit 0\n");
    }
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(forks_seen(), 6);
    CHECK_INT(exits_seen(), 6);
}

/* bind and start(3): the workers have the ids 0, 1 and 2, the parent ends with 0, and nothing was
 * said. */
TEST_LOOP(test_bind_start)
{
    int seen = 0;
    workers = 3;
    pid_t pid = launch(program_bind_start);
    await_forks(3);
    for (int i = 0; i < 3; i++) {
        seen |= 1 << board->ids[i];
    }
    CHECK_INT(seen, 7);
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
}

TEST_LOOP(test_add_sockets)
{
    long who = 0;
    workers = 3;
    pid_t pid = launch(program_add_sockets);
    await_forks(3);
    for (int i = 0; i < 3; i++) {
        t_close(connect_to(i, &who));
    }
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(forks_seen(), 3);
}

/* Three processes each bind the same port for themselves. */
static int bind_for_myself(void)
{
    tsrv_bind_options options = {0};
    int fds[2];
    options.reuse_port = true;
    CHECK_INT(tsrv_bind_sockets(board->value, "127.0.0.1", &options, fds, 2), 1);
    t_close(fds[0]);
    return TSRV_OK;
}

TEST_LOOP(test_listen_multi_reuse_port)
{
    int fds[2];
    tsrv_address address;
    tsrv_bind_options options = {0};
    options.reuse_port = true;
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", &options, fds, 2), 1);
    CHECK_INT(tsrvi_address_get(fds[0], tsrvi_getsockname, &address), TSRV_OK);
    workers = 3;
    bare_worker = bind_for_myself;
    open_board();
    int taken = tsrv_address_port(&address);
    pid_t pid = fork();
    if (pid == 0) {
        board->value = taken;
        t_close(fds[0]);
        run_program(program_bare);
    }
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(forks_seen(), 3);
    CHECK_INT(exits_seen(), 3);
    t_close(fds[0]);
}

/* ---- what is refused ----------------------------------------------------------------------*/

static int nested_worker(void)
{
    CHECK_INT(tsrv_fork_processes(2, NULL), TSRV_EINVAL);
    return TSRV_OK;
}

TEST_ONCE(refused_in_a_worker)
{
    workers = 2;
    bare_worker = nested_worker;
    check_end(launch(program_bare), 0, TSRV_EPARENT);
    CHECK_INT(forks_seen(), 2);
}

TEST_ONCE(refused_when_a_loop_exists)
{
    t_watch_log();
    CHECK(tsrv_loop_current() != NULL);
    CHECK_INT(tsrv_fork_processes(2, NULL), TSRV_EINVAL);
    CHECK_INT(t_log_lines, 1);
    CHECK_INT(t_count(t_log, "cannot fork workers: this process has a loop already"), 1);
    tsrv_server *server = new_server();
    CHECK_INT(tsrv_server_bind(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_start(server, 2, NULL), TSRV_EINVAL);
    CHECK(t_log_lines > 1);
    tsrv_server_free(server);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
    check_no_child();
}

TEST_ONCE(start_wants_something_bound_and_only_once)
{
    tsrv_server *server = new_server();
    tsrv_address before, after;
    t_watch_log();
    CHECK_INT(tsrv_server_start(server, 1, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_server_start(server, 3, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_server_bind(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_bind(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_start(server, -1, NULL), TSRV_EINVAL);
    CHECK(tsrvi_thread.own == NULL); /* none of this needs a loop */
    CHECK_INT(tsrv_server_address(server, 1, &before), TSRV_OK);
    CHECK_INT(tsrv_server_start(server, 1, NULL), TSRV_OK);
    CHECK_INT(tsrv_task_id(), -1);
    CHECK_INT(tsrv_server_address(server, 1, &after), TSRV_OK);
    CHECK_INT(tsrv_address_port(&after), tsrv_address_port(&before));
    CHECK_INT(tsrv_server_address(server, 2, &after), TSRV_EINVAL);
    CHECK_INT(tsrv_server_start(server, 1, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_server_bind(server, 0, "127.0.0.1", NULL), TSRV_OK); /* accepts at once */
    CHECK_INT(tsrv_server_address(server, 2, &after), TSRV_OK);
    tsrv_server_free(server);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
    check_no_child();
}

TEST_ONCE(what_was_bound_goes_with_the_server)
{
    tsrv_server *server = new_server();
    tsrv_address address;
    CHECK_INT(tsrv_server_bind(server, 0, "127.0.0.1", NULL), TSRV_OK);
    tsrv_server_stop(server);
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_EINVAL);
    CHECK_INT(tsrv_server_bind(server, 0, "127.0.0.1", NULL), TSRV_OK);
    tsrv_server_free(server);
}

/* ---- restarts -----------------------------------------------------------------------------*/

static int exit_at_once(void)
{
    return -EIO; /* run_program makes it exit status 1 */
}

TEST_ONCE(a_worker_that_exits_at_once_is_not_forked_in_a_loop)
{
    workers = 1;
    bare_worker = exit_at_once;
    tsrv_set_log(t_no_log, NULL);
    pid_t pid = launch(program_bare);
    int64_t end = t_now_ms() + 10000;
    while (t_now_ms() < end) {
        CHECK(forks_seen() <= 12);
        poll(NULL, 0, 10);
    }
    int forks = forks_seen();
    CHECK(forks >= 2 && forks <= 12);
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
}

static int fails_unless_zero(void)
{
    if (tsrv_task_id() == 0) {
        CHECK(tsrv_loop_current() != NULL);
        for (;;) {
            poll(NULL, 0, 1000);
        }
    }
    await_forks(2); /* or the sibling may be stopped before it began */
    return -EIO;
}

/* The sibling, which does not even have a loop that runs, is stopped. */
TEST_ONCE(restart_limit_stops_the_siblings)
{
    workers = 2;
    bare_worker = fails_unless_zero;
    fork_options.max_restarts = 3;
    tsrv_set_log(t_no_log, NULL);
    pid_t pid = launch(program_bare);
    check_end(pid, 1, TSRV_ERESTARTS);
    CHECK_INT(forks_seen(), 5); /* one sibling, one first start, three restarts */
    CHECK_INT(exits_seen(), 5);
}

TEST_LOOP(restart_limit_drains_the_siblings)
{
    long who = 0;
    workers = 2;
    fork_options.max_restarts = 1;
    tsrv_set_log(t_no_log, NULL);
    pid_t pid = launch(program_bind_start);
    await_forks(2);
    int fd = connect_to(1, &who);
    t_sends(fd, "big\n"); /* which it is in the middle of */
    command(0, "exit 1\n");
    await_forks(3);
    command(0, "exit 1\n");
    await_exits(2);
    for (size_t at = 0; at < BIG; at++) {
        char byte = 0;
        CHECK_INT(recv(fd, &byte, 1, 0), 1);
        CHECK_INT(byte, pattern(at));
    }
    t_leave(fd);
    check_end(pid, 1, TSRV_ERESTARTS);
}

static int ends_by_signal(void)
{
    if (__atomic_add_fetch(&board->value, 1, __ATOMIC_ACQ_REL) <= 2) {
        raise(SIGKILL);
    }
    return TSRV_OK;
}

TEST_ONCE(an_end_by_a_signal_is_made_good)
{
    workers = 1;
    bare_worker = ends_by_signal;
    tsrv_set_log(t_no_log, NULL);
    check_end(launch(program_bare), 0, TSRV_EPARENT);
    CHECK_INT(forks_seen(), 3);
    CHECK(WIFSIGNALED(board->exit[1].status) && WTERMSIG(board->exit[1].status) == SIGKILL);
}

/* ---- ends ---------------------------------------------------------------------------------*/

static void kill_and_look(pid_t pid)
{
    int64_t start = t_now_ms();
    CHECK(kill(pid, SIGKILL) == 0);
    CHECK(t_wait_until(no_child_left, NULL));
    CHECK_NEAR_MS(t_now_ms() - start, 0, 1100);
}

TEST_ONCE(bare_workers_end_with_a_parent_that_is_killed)
{
    workers = 3;
    bare_worker = sleeps;
    pid_t pid = launch(program_bare);
    await_forks(3);
    kill_and_look(pid);
}

/* One is idle, one has a client in the middle of an answer, one hangs in its handler. */
TEST_LOOP(workers_end_with_a_parent_that_is_killed)
{
    long who = 0;
    workers = 3;
    tsrv_set_log(t_no_log, NULL);
    pid_t pid = launch(program_bind_start);
    await_forks(3);
    int busy = connect_to(0, &who), hung = connect_to(1, &who), idle = connect_to(2, &who);
    t_sends(busy, "big\n");
    t_sends(hung, "hang\n");
    poll(NULL, 0, 50); /* to hang it has to have read that; if it has not, the test is easier */
    kill_and_look(pid);
    t_close(busy);
    t_close(hung);
    t_close(idle);
}

/* The parent is told to end while a hundred connections are in the middle of an answer. */
static void term_in_the_middle(int signo)
{
    enum { CLIENTS = 100 };
    int fds[CLIENTS];
    workers = 4;
    server_options.write_high_water = 16 << 20;
    pid_t pid = launch(program_bind_start);
    await_forks(4);
    for (int i = 0; i < CLIENTS; i++) {
        fds[i] = t_connect_with_room(port(), 8192);
        t_sends(fds[i], "big\n");
    }
    for (int i = 0; i < CLIENTS; i++) {
        char byte = 0;
        CHECK_INT(recv(fds[i], &byte, 1, MSG_PEEK), 1); /* its answer has begun */
    }
    CHECK(kill(pid, signo) == 0);
    char *got = (char *)malloc(BIG + 1);
    for (int i = 0; i < CLIENTS; i++) {
        CHECK_INT(t_recv_all(fds[i], got, BIG + 1), BIG);
        for (size_t at = 0; at < BIG; at++) {
            if (got[at] != pattern(at)) {
                T_FAIL("client %d: byte %zu is wrong", i, at);
            }
        }
        t_close(fds[i]);
    }
    free(got);
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(exits_seen(), 4);
    for (int i = 0; i < 4; i++) {
        CHECK(WIFEXITED(board->exit[i].status) && WEXITSTATUS(board->exit[i].status) == 0);
    }
}

TEST_SOFT(sigterm_finishes_every_reply)
{
    term_in_the_middle(SIGTERM);
}

TEST_LOOP(sigint_finishes_every_reply)
{
    term_in_the_middle(SIGINT);
}

/* As Ctrl-C does: the whole process group gets it. */
TEST_LOOP(ctrl_c_drains_too)
{
    long who = 0;
    workers = 2;
    pid_t pid = launch(program_bind_start);
    await_forks(2);
    int fd = connect_to(0, &who);
    t_sends(fd, "big\n");
    for (int i = 0; i < 2; i++) {
        CHECK(kill(board->pids[i], SIGINT) == 0);
    }
    CHECK(kill(pid, SIGINT) == 0);
    char *got = (char *)malloc(BIG + 1);
    CHECK_INT(t_recv_all(fd, got, BIG + 1), BIG);
    free(got);
    t_close(fd);
    check_end(pid, 0, TSRV_EPARENT);
}

static int ignores_sigterm(void)
{
    signal(SIGTERM, SIG_IGN);
    __atomic_add_fetch(&board->value, 1, __ATOMIC_ACQ_REL);
    return sleeps();
}

TEST_ONCE(who_does_not_end_is_killed)
{
    int one = 1;
    workers = 1;
    bare_worker = ignores_sigterm;
    fork_options.grace_ms = 100;
    tsrv_set_log(t_no_log, NULL);
    pid_t pid = launch(program_bare);
    CHECK(t_wait_until(has_value, &one));
    int64_t start = t_now_ms();
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 1, TSRV_ETIMEOUT);
    CHECK_NEAR_MS(t_now_ms() - start, 5100, 7000);
    CHECK(WIFSIGNALED(board->exit[0].status) && WTERMSIG(board->exit[0].status) == SIGKILL);
}

/* What a worker does after its loop is not cut short by another signal. */
static int program_cleans_up(void)
{
    int rc = program_bind_start();
    if (tsrv_task_id() >= 0) {
        tsrv_loop_free(NULL);
        for (int i = 0; i < 20; i++) {
            raise(i % 2 ? SIGTERM : SIGINT);
        }
        __atomic_add_fetch(&board->value, 1, __ATOMIC_ACQ_REL);
    }
    return rc;
}

TEST_LOOP(clean_up_after_the_loop_is_not_cut)
{
    workers = 2;
    pid_t pid = launch(program_cleans_up);
    await_forks(2);
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(board->value, 2);
}

/* The connection is cut at once. */
TEST_LOOP(an_own_watch_replaces_the_drain)
{
    long who = 0;
    workers = 2;
    server_options.on_start = watch_term;
    pid_t pid = launch(program_own_watch);
    await_forks(2);
    int fd = connect_to(0, &who);
    t_sends(fd, "unfinished"); /* which a drain would wait for */
    CHECK(kill(pid, SIGTERM) == 0);
    t_expect_reset(fd);
    t_close(fd);
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(board->value, 2);
}

/* A timer of the program's does not keep a drained worker. */
static tsrv_timer far;

static void never(void *context)
{
    (void)context;
    T_FAIL("the timer has fired");
}

static void start_timer(tsrv_server *server, void *context)
{
    on_start(server, context);
    CHECK_INT(tsrv_timer_start(NULL, &far, 1000000, never, NULL), TSRV_OK);
}

TEST_LOOP(a_timer_does_not_keep_a_drained_worker)
{
    workers = 2;
    server_options.on_start = start_timer;
    pid_t pid = launch(program_own_watch); /* which leaves on_start to the test */
    await_forks(2);
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
}

/* ---- the host -----------------------------------------------------------------------------*/

static void host_handler(int signo)
{
    (void)signo;
}

static const int host_signals[] = {SIGCHLD, SIGHUP, SIGTERM, SIGINT, SIGQUIT, SIGUSR2};

static void check_host_signals(void)
{
    sigset_t mask;
    for (int i = 0; i < 6; i++) {
        struct sigaction action;
        CHECK(sigaction(host_signals[i], NULL, &action) == 0);
        CHECK(action.sa_handler == (host_signals[i] == SIGHUP ? SIG_IGN : host_handler));
    }
    CHECK(sigprocmask(SIG_SETMASK, NULL, &mask) == 0);
    CHECK(sigismember(&mask, SIGUSR1) == 1 && sigismember(&mask, SIGTERM) == 1);
    CHECK(sigismember(&mask, SIGCHLD) == 0);
}

static int checks_signals(void)
{
    check_host_signals();
    return TSRV_OK;
}

static int program_with_host(void)
{
    sigset_t mask;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    for (int i = 0; i < 6; i++) {
        action.sa_handler = host_signals[i] == SIGHUP ? SIG_IGN : host_handler;
        CHECK(sigaction(host_signals[i], &action, NULL) == 0);
    }
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR1);
    sigaddset(&mask, SIGTERM);
    CHECK(sigprocmask(SIG_SETMASK, &mask, NULL) == 0);
    pid_t foreign = fork();
    if (foreign == 0) {
        _exit(42);
    }
    int rc = program_bare();
    if (tsrv_task_id() < 0) {
        int status = 0;
        check_host_signals();
        CHECK_INT(waitpid(foreign, &status, 0), foreign); /* nobody has taken its status */
        CHECK_INT(WEXITSTATUS(status), 42);
    }
    return rc;
}

TEST_ONCE(handlers_mask_and_children_of_the_host_are_left_alone)
{
    workers = 2;
    bare_worker = checks_signals;
    check_end(launch(program_with_host), 0, TSRV_EPARENT);
}

static FILE *printed;

static void print_log(int level, const char *message, void *context)
{
    (void)context;
    fprintf(printed, "%d %s\n", level, message);
}

/* Buffered output is not printed once more by every worker; nor is the log, if it is that. */
static int program_with_buffer(bool logs)
{
    CHECK(freopen("/dev/null", "w", stdout) != NULL);
    printed = fdopen(board->value, "w");
    CHECK(printed != NULL);
    if (logs) {
        tsrv_set_log(print_log, NULL);
    } else {
        fputs("once\n", printed);
    }
    int rc = program_bare();
    fclose(printed);
    return rc;
}

static const char *print_in_workers(bool logs)
{
    static char text[4096];
    int pipe_fds[2];
    memset(text, 0, sizeof text);
    workers = 3;
    bare_worker = returns_well;
    CHECK(pipe(pipe_fds) == 0);
    open_board();
    board->value = pipe_fds[1];
    pid_t pid = fork();
    if (pid == 0) {
        /* the balance of descriptors does not hold for what the program closes itself */
        in_program = true;
        int rc = program_with_buffer(logs);
        _exit(rc == TSRV_EPARENT || rc == TSRV_OK ? 0 : 1);
    }
    t_close(pipe_fds[1]);
    size_t size = 0;
    for (ssize_t n = 1; n > 0; size += n > 0 ? (size_t)n : 0) {
        n = read(pipe_fds[0], text + size, sizeof text - 1 - size);
        CHECK(n >= 0);
    }
    t_close(pipe_fds[0]);
    int status = await_end(pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    check_no_child();
    return text;
}

TEST_ONCE(buffered_output_is_printed_once)
{
    CHECK_STR(print_in_workers(false), "once\n");
}

TEST_ONCE(a_log_that_is_buffered_is_printed_once)
{
    const char *text = print_in_workers(true);
    CHECK_INT(t_count(text, "3 workers are started"), 1);
    CHECK_INT(t_count(text, "exited with status 0"), 3);
}

/* ---- process 1 ----------------------------------------------------------------------------*/

#ifdef __linux__
/* A worker makes an orphan, which process 1 inherits. */
static int makes_an_orphan(void)
{
    pid_t pid = fork();
    if (pid == 0) {
        pid = fork();
        if (pid == 0) {
            poll(NULL, 0, 50);
        }
        _exit(0);
    }
    waitpid(pid, NULL, 0);
    __atomic_add_fetch(&board->value, 1, __ATOMIC_ACQ_REL);
    return sleeps();
}

/* The children of a process that have ended and not been waited for. */
static int zombies_of(pid_t parent)
{
    int count = 0;
    char command_line[256];
    snprintf(command_line, sizeof command_line, "ps -o stat= --ppid %ld", (long)parent);
    FILE *list = popen(command_line, "r");
    char line[64];
    CHECK(list != NULL);
    while (fgets(line, sizeof line, list) != NULL) {
        count += line[0] == 'Z';
    }
    pclose(list);
    return count;
}

static bool no_zombie(void *pid)
{
    return zombies_of(*(pid_t *)pid) == 0;
}

TEST_ONCE(works_as_process_1)
{
    int ready = 2;
    if (system("command -v ps >/dev/null") != 0) {
        SKIP("ps");
    }
    workers = 2;
    bare_worker = makes_an_orphan;
    pid_t pid = launch_as_process_1(program_bare);
    CHECK(t_wait_until(has_value, &ready));
    poll(NULL, 0, 100);
    CHECK(t_wait_until(no_zombie, &pid));
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(forks_seen(), 2);
}
#endif

/* ---- sharing a listener -------------------------------------------------------------------*/

static int accepted_by(int worker)
{
    int rc = -1, accepted = -1, fd = t_connect(port());
    char line[128];
    snprintf(line, sizeof line, "stats %d\n", worker);
    t_sends(fd, line);
    CHECK(read_line(fd, line, sizeof line));
    CHECK_INT(sscanf(line, "%d %d", &rc, &accepted), 2);
    CHECK_INT(rc, TSRV_OK);
    t_close(fd);
    return accepted;
}

enum { SPREAD_CONNECTIONS = 800, SPREAD_WORKERS = 4 };

/* 800 connections into four workers, one in so many milliseconds; 0 = all at once. Returns what the
 * busiest has got. */
static int spread(int ms)
{
    static int fds[SPREAD_CONNECTIONS];
    int before[SPREAD_WORKERS], most = 0;
    for (int i = 0; i < SPREAD_WORKERS; i++) {
        before[i] = accepted_by(i);
    }
    int64_t start = t_now_ms();
    for (int i = 0; i < SPREAD_CONNECTIONS; i++) {
        while (t_now_ms() < start + i * ms) {
            poll(NULL, 0, 1);
        }
        fds[i] = t_connect(port());
    }
    for (int i = 0; i < SPREAD_CONNECTIONS; i++) {
        t_sends(fds[i], "x\n"); /* so that all have been accepted */
        t_expect(fds[i], "x\n");
        t_close(fds[i]);
    }
    for (int i = 0; i < SPREAD_WORKERS; i++) {
        int count = accepted_by(i) - before[i];
        fprintf(stderr, "worker %d: %d\n", i, count);
        most = count > most ? count : most;
    }
    return most;
}

/* Workers that other programs keep from running cannot accept: then it is tried again. */
TEST_LOOP(connections_are_spread_evenly)
{
    int tries = 0;
    workers = SPREAD_WORKERS;
    pid_t pid = launch(program_bind_start);
    await_forks(SPREAD_WORKERS);
    while (spread(1) * SPREAD_WORKERS >= SPREAD_CONNECTIONS * 12 / 10) {
        CHECK(++tries < 4);
    }
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
}

/* Who has a processor must not take what is there before the others get one. */
TEST_LOOP(a_crowd_is_spread_evenly)
{
    enum { CROWDS = 5 };
    int most = 0;
    workers = SPREAD_WORKERS;
    bind_options.backlog = SPREAD_CONNECTIONS;
    pid_t pid = launch(program_bind_start);
    await_forks(SPREAD_WORKERS);
    for (int i = 0; i < CROWDS; i++) {
        most += spread(0);
    }
    CHECK(most * SPREAD_WORKERS < CROWDS * SPREAD_CONNECTIONS * 12 / 10);
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
}

/* Workers that hang are killed while connections wait in their queues: none is lost. */
static void kill_with_a_backlog(void)
{
    enum { CLIENTS = 60 };
    int fds[CLIENTS], hung[2];
    long pids[2];
    workers = 2;
    tsrv_set_log(t_no_log, NULL);
    pid_t pid = launch(program_bind_start);
    await_forks(2);
    hung[0] = connect_to(0, &pids[0]);
    hung[1] = connect_to(1, &pids[1]);
    t_sends(hung[0], "hang\n");
    t_sends(hung[1], "hang\n");
    poll(NULL, 0, 50); /* that they have read it; if not, the test is easier */
    for (int i = 0; i < CLIENTS; i++) {
        fds[i] = t_connect(port());
        t_sends(fds[i], "hello\n");
    }
    CHECK(kill((pid_t)pids[0], SIGKILL) == 0);
    CHECK(kill((pid_t)pids[1], SIGKILL) == 0);
    for (int i = 0; i < CLIENTS; i++) {
        t_expect(fds[i], "hello\n");
        t_close(fds[i]);
    }
    t_close_all(hung, 2);
    await_forks(4); /* one of them can have answered all before the other began */
    CHECK_INT(forks_seen(), 4);
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
}

TEST_LOOP(a_killed_worker_loses_no_queued_connection)
{
    kill_with_a_backlog();
}

TEST_LOOP(a_killed_worker_loses_no_queued_connection_with_reuse_port)
{
    bind_options.reuse_port = true;
    kill_with_a_backlog();
}

/* Who is ahead of the others leaves them what comes, but for a moment only: they may hang. */
TEST_LOOP(a_worker_whose_sibling_hangs_serves_all)
{
    enum { CLIENTS = 60 };
    long who = 0;
    workers = 2;
    tsrv_set_log(t_no_log, NULL);
    pid_t pid = launch(program_bind_start);
    await_forks(2);
    int hung = connect_to(0, &who);
    t_sends(hung, "hang\n");
    poll(NULL, 0, 50); /* that it has read it; if not, the test is easier */
    for (int i = 0; i < CLIENTS; i++) {
        int fd = t_connect(port());
        t_sends(fd, "hello\n");
        t_expect(fd, "hello\n");
        t_close(fd);
    }
    CHECK(kill((pid_t)who, SIGKILL) == 0);
    t_close(hung);
    await_forks(3);
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
}

/* With reuse_port each worker has a socket of its own: it is served by that worker alone. */
TEST_LOOP(reuse_port_spreads_over_sockets)
{
    int seen[4] = {0};
    workers = 4;
    bind_options.reuse_port = true;
    pid_t pid = launch(program_bind_start);
    await_forks(4);
    for (int i = 0; i < 200; i++) {
        int fd = t_connect(port()), id = -1;
        long who = 0;
        ask_id(fd, &id, &who, NULL);
        seen[id]++;
        t_close(fd);
    }
    for (int i = 0; i < 4; i++) {
        CHECK(seen[i] > 0);
    }
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
}

/* Also where the processors say how many that are. */
TEST_LOOP(reuse_port_spreads_over_as_many_as_there_are_processors)
{
    long who = 0;
    processors = 3;
    t_root = "/nowhere"; /* and no quota */
    workers = 0;
    bind_options.reuse_port = true;
    pid_t pid = launch(program_bind_start);
    await_forks(3);
    for (int i = 0; i < 3; i++) {
        t_close(connect_to(i, &who));
    }
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(forks_seen(), 3);
}

/* ---- load ---------------------------------------------------------------------------------*/

/* SIGHUP: every worker is replaced, and nobody notices. The long client's worker is left last. */
TEST_SOFT(a_rolling_restart_under_load_fails_nobody)
{
    load l;
    workers = 3;
    server_options.write_high_water = 16 << 20;
    pid_t pid = launch(program_bind_start);
    await_forks(3);
    load_begin(&l);
    CHECK(kill(pid, SIGHUP) == 0);
    await_forks(6);
    await_exits(2); /* all but the one with the long client */
    int before = __atomic_load_n(&l.served, __ATOMIC_ACQUIRE);
    fprintf(stderr, "%d short connections served, 0 failed\n", before);
    load_end(&l);
    await_exits(3);
    for (int i = 0; i < 3; i++) {
        CHECK(WIFEXITED(board->exit[i].status) && WEXITSTATUS(board->exit[i].status) == 0);
        CHECK_INT(board->ids[3 + i], i);
    }
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(forks_seen(), 6);
}

/* A replacement that does not get to accept does not cost the old worker its place. */
static int program_fails_later(void)
{
    tsrv_server *server = new_bound_server();
    int rc = tsrv_server_start(server, workers, &fork_options);
    if (rc == TSRV_OK && __atomic_load_n(&board->value, __ATOMIC_ACQUIRE) != 0) {
        rc = -EIO;
    } else if (rc == TSRV_OK) {
        rc = tsrv_loop_run(NULL);
    }
    tsrv_server_free(server);
    return rc;
}

TEST_LOOP(a_rolling_restart_that_fails_changes_nothing)
{
    long before = 0, after = 0;
    workers = 2;
    server_options.on_start = on_start;
    tsrv_set_log(t_no_log, NULL);
    pid_t pid = launch(program_fails_later);
    await_forks(2);
    int fd = connect_to(0, &before);
    __atomic_store_n(&board->value, 1, __ATOMIC_RELEASE);
    CHECK(kill(pid, SIGHUP) == 0);
    await_exits(1);
    int id = -1;
    ask_id(fd, &id, &after, NULL);
    CHECK_INT(after, before);
    __atomic_store_n(&board->value, 0, __ATOMIC_RELEASE);
    CHECK(kill(pid, SIGHUP) == 0); /* the next one works */
    await_forks(4);
    t_close(fd);
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
}

/* ---- a hung worker ------------------------------------------------------------------------*/

TEST_LOOP(a_worker_that_hangs_is_replaced)
{
    long hung = 0, other = 0, now = 0;
    workers = 2;
    fork_options.heartbeat_ms = 400 * t_scale();
    tsrv_set_log(t_no_log, NULL);
    pid_t pid = launch(program_bind_start);
    await_forks(2);
    int fd = connect_to(0, &hung), fine = connect_to(1, &other);
    t_sends(fd, "hang\n");
    await_exits(1);
    CHECK_INT(board->exit[0].id, 0);
    CHECK_INT(board->exit[0].pid, hung);
    CHECK(WIFSIGNALED(board->exit[0].status) && WTERMSIG(board->exit[0].status) == SIGABRT);
    await_forks(3);
    int id = -1;
    ask_id(fine, &id, &now, NULL);
    CHECK_INT(now, other); /* its sibling has not noticed */
    t_close(connect_to(0, &now));
    CHECK(now != hung);
    t_close(fd);
    t_close(fine);
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
}

/* ---- started without stdin, stdout and stderr ---------------------------------------------*/

static int program_without_stderr(void)
{
    for (int fd = 0; fd < 3; fd++) {
        close(fd);
    }
    return program_bind_start();
}

/* What the parent logs goes nowhere, and not into the pipe by which workers learn of its death. */
TEST_LOOP(a_log_line_without_stderr_reaches_no_worker)
{
    long died = 0, other = 0, now = 0;
    workers = 2;
    pid_t pid = launch(program_without_stderr);
    await_forks(2);
    t_close(connect_to(0, &died));
    int fine = connect_to(1, &other), id = -1;
    CHECK(kill((pid_t)died, SIGKILL) == 0);
    await_forks(3); /* it is replaced, behind the line that says so */
    ask_id(fine, &id, &now, NULL);
    CHECK_INT(now, other);
    CHECK_INT(exits_seen(), 1);
    t_close(fine);
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
}

/* ---- a parent that dies while a worker prepares itself ------------------------------------*/

static bool has_lost_parent(void *unused)
{
    (void)unused;
    return getppid() != __atomic_load_n(&board->value, __ATOMIC_ACQUIRE);
}

static bool all_have_begun(void *unused)
{
    (void)unused;
    return __atomic_load_n(&board->held, __ATOMIC_ACQUIRE) == workers;
}

static void lose_parent(tsrv_server *server, void *context)
{
    (void)server, (void)context;
    __atomic_add_fetch(&board->held, 1, __ATOMIC_ACQ_REL);
    if (tsrv_task_id() == 0) {
        CHECK(t_wait_until(all_have_begun, NULL)); /* or its end finds one that is no worker yet */
        CHECK(kill(__atomic_load_n(&board->value, __ATOMIC_ACQUIRE), SIGKILL) == 0);
    }
    CHECK(t_wait_until(has_lost_parent, NULL));
}

static int program_lose_parent(void)
{
    tsrv_server *server = new_bound_server();
    __atomic_store_n(&board->value, getpid(), __ATOMIC_RELEASE);
    int rc = tsrv_server_start(server, workers, &fork_options);
    if (rc == TSRV_OK) {
        rc = tsrv_loop_run(NULL);
    }
    tsrv_server_free(server);
    return rc;
}

/* To tell it that this worker is ready raises no SIGPIPE: the worker ends in good order. */
TEST_LOOP(a_worker_that_is_ready_behind_its_parent_drains)
{
    int status;
    pid_t worker;
    workers = 2;
    server_options.on_start = lose_parent;
    tsrv_set_log(t_no_log, NULL);
    pid_t pid = launch(program_lose_parent);
    CHECK_INT(await_end(pid), SIGKILL);
    while ((worker = waitpid(-1, &status, 0)) > 0) {
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
            T_FAIL("a worker's status is %d", status);
        }
    }
    CHECK_INT(errno, ECHILD);
}

/* ---- counters -----------------------------------------------------------------------------*/

static int lost_streams; /* with a worker that died */

static bool one_open(void *fd)
{
    int rc = -1, accepted = -1, open = -1, well = -1, restarts = -1;
    char line[128];
    t_sends(*(int *)fd, "stats -1\n");
    CHECK(read_line(*(int *)fd, line, sizeof line));
    CHECK_INT(sscanf(line, "%d %d %d %d %d", &rc, &accepted, &open, &well, &restarts), 5);
    CHECK_INT(rc, TSRV_OK);
    board->stats.accepted = (uint64_t)accepted;
    board->stats.ended_well = (uint64_t)well;
    board->stats.restarts = (uint64_t)restarts;
    return open == 1 && accepted == 1 + well + lost_streams; /* the ends have been counted too */
}

TEST_LOOP(counters_of_all_workers)
{
    enum { CLIENTS = 30 };
    long who = 0;
    int served = 0, mine = 0, open = 0;
    char line[64];
    workers = 3;
    tsrv_set_log(t_no_log, NULL);
    pid_t pid = launch(program_bind_start);
    await_forks(3);
    int fd = t_connect(port());
    for (int i = 0; i < CLIENTS; i++, served++) {
        int client = t_connect(port());
        t_echo(client, "x\n");
        t_close(client);
    }
    CHECK(t_wait_until(one_open, &fd));
    CHECK_INT(board->stats.accepted, 1 + served);
    CHECK_INT(board->stats.ended_well, served);
    int sum = 0;
    for (int i = 0; i < 3; i++) {
        int rc = -1, accepted = -1;
        snprintf(line, sizeof line, "stats %d\n", i);
        t_sends(fd, line);
        CHECK(read_line(fd, line, sizeof line));
        CHECK_INT(sscanf(line, "%d %d", &rc, &accepted), 2);
        sum += accepted;
    }
    CHECK_INT(sum, 1 + served);
    t_sends(fd, "stats 3\n");
    CHECK(read_line(fd, line, sizeof line));
    CHECK_INT(atoi(line), TSRV_EINVAL);
    t_sends(fd, "metrics\n");
    CHECK(read_line(fd, line, sizeof line));
    CHECK_INT(sscanf(line, "%d %d", &mine, &sum), 2);
    CHECK_INT(mine, 3);
    CHECK_INT(sum, 1 + served);
    int id = -1;
    ask_id(fd, &id, &who, NULL);
    t_sends(fd, "own\n");
    CHECK(read_line(fd, line, sizeof line));
    CHECK_INT(sscanf(line, "%d %d", &mine, &open), 2);
    CHECK(mine >= 1 && mine <= 1 + served);
    CHECK_INT(open, 1);

    /* A worker dies with its connection: it is closed, and the restart is counted. */
    int other = (id + 1) % 3;
    int lost = connect_to(other, &who);
    CHECK(kill((pid_t)who, SIGKILL) == 0);
    await_forks(4);
    lost_streams = 1;
    CHECK(t_wait_until(one_open, &fd));
    CHECK_INT(board->stats.restarts, 1);
    t_close(lost);
    t_close(fd);
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(board->stats.open, 0); /* the parent's view */
    CHECK_INT(board->stats.closed, board->stats.accepted);
    CHECK_INT(board->stats.restarts, 1);
    CHECK_INT(board->stats.ended_error, 1);
    CHECK_INT(board->stats.ended_well + board->stats.ended_error, board->stats.accepted);
}

/* ---- faults -------------------------------------------------------------------------------*/

static int fault_at;

static int program_fault(void)
{
    t_fault_calls = 0;
    t_fault_at = fault_at;
    int rc = program_bare();
    t_fault_at = 0;
    if (tsrv_task_id() >= 0) {
        return TSRV_OK;
    }
    return rc < 0 ? TSRV_EPARENT : rc; /* any code will do; run_program checks the rest */
}

/* Every call of the supervisor's fails in turn, once. */
TEST_ONCE(every_call_may_fail)
{
    workers = 2;
    bare_worker = returns_well;
    fork_options.max_restarts = 5;
    tsrv_set_log(t_no_log, NULL);
    for (fault_at = 1; fault_at <= 45; fault_at++) {
        check_end(launch(program_fault), 0, TSRV_EPARENT);
        clear_board();
    }
}

static int program_fork_fails(void)
{
    t_fail_call("fork", EAGAIN, 2, false);
    return program_bind_start();
}

/* fork fails for the second worker: the first serves on, and the second comes later. */
TEST_LOOP(a_failing_fork_is_tried_again)
{
    long who = 0;
    workers = 2;
    tsrv_set_log(t_no_log, NULL);
    pid_t pid = launch(program_fork_fails);
    await_forks(2);
    t_close(connect_to(0, &who));
    t_close(connect_to(1, &who));
    CHECK_INT(exits_seen(), 0);
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
}

/* A storm of signals and children: no status is lost. */
static int ends_soon(void)
{
    poll(NULL, 0, 5 * tsrv_task_id());
    return TSRV_OK;
}

TEST_ONCE(a_storm_of_signals)
{
    workers = 8;
    bare_worker = ends_soon;
    pid_t pid = launch(program_bare);
    while (__atomic_load_n(&board->results, __ATOMIC_ACQUIRE) == 0) {
        kill(pid, SIGCHLD); /* until it ends; a zombie does not mind */
    }
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(exits_seen(), 8);
}

/* ---- serve --------------------------------------------------------------------------------*/

static void serve_and_stop(int count, int signo)
{
    workers = count;
    pid_t pid = launch(program_serve);
    await_forks(count);
    int fd = t_connect(port());
    t_echo(fd, "hello\n");
    t_sends(fd, "big\n");
    char byte = 0;
    CHECK_INT(recv(fd, &byte, 1, MSG_PEEK), 1);
    CHECK(kill(pid, signo) == 0);
    char *got = (char *)malloc(BIG + 1);
    CHECK_INT(t_recv_all(fd, got, BIG + 1), BIG);
    free(got);
    t_close(fd);
    check_end(pid, 0, TSRV_OK);
}

TEST_SOFT(serve_in_one_process_drains_on_sigterm)
{
    serve_and_stop(1, SIGTERM);
}

TEST_SOFT(serve_in_one_process_drains_on_sigint)
{
    serve_and_stop(1, SIGINT);
}

TEST_SOFT(serve_in_workers_drains_on_sigterm)
{
    serve_and_stop(3, SIGTERM);
}

TEST_ONCE(serve_says_why_it_does_not)
{
    int fds[2];
    tsrv_address address;
    server_options.handle_stream = serve_lines;
    t_watch_log();
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, fds, 2), 1);
    CHECK_INT(tsrvi_address_get(fds[0], tsrvi_getsockname, &address), TSRV_OK);
    CHECK_INT(tsrv_serve(tsrv_address_port(&address), "127.0.0.1", 1, &server_options), -EADDRINUSE);
    CHECK_INT(tsrv_serve(tsrv_address_port(&address), "127.0.0.1", 3, &server_options), -EADDRINUSE);
    CHECK_INT(t_log_lines, 2);
    CHECK_INT(tsrv_serve(0, "127.0.0.1", 1, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_serve(0, "127.0.0.1", -1, &server_options), TSRV_EINVAL);
    t_close(fds[0]);
    check_no_child();
}

/* ---- upgrade ------------------------------------------------------------------------------*/

/* The program that is upgraded: this file again, found by its variable before the tests begin. */
static int upgradable(const char *text)
{
    static char *arguments[2];
    int count = 0, new_port = 0;
    arguments[0] = own_path();
    CHECK_INT(sscanf(text, "%d %d %d %d", &new_port, &count, &t_backend, &t_mode), 4);
    memset(&server_options, 0, sizeof server_options);
    memset(&fork_options, 0, sizeof fork_options);
    fork_options.upgrade_argv = arguments;
    server_options.handle_stream = serve_lines;
    server_options.mode = t_mode;
    server_options.write_high_water = 16 << 20;
    server_options.fork = &fork_options;
    in_program = true;
    return tsrv_serve(new_port, "127.0.0.1", count, &server_options);
}

__attribute__((constructor(200))) static void be_upgraded(void)
{
    const char *text = getenv(UPGRADE_VARIABLE);
    if (text != NULL) {
        pthread_atfork(NULL, NULL, forked);
        _exit(upgradable(text) == TSRV_OK ? 0 : 1);
    }
}

/* Asks again and again until the answering process has another parent than before. */
static bool has_new_parent(void *before)
{
    long pid = 0, parent = 0;
    int id = -1, fd = t_connect(port());
    ask_id(fd, &id, &pid, &parent);
    t_close(fd);
    return parent != *(long *)before;
}

TEST_SOFT(an_upgrade_under_load_fails_nobody)
{
    load l;
    char text[64], *self = own_path();
    long worker = 0, parent = 0;
    int id = -1;
    open_board();
    board->port = t_free_port();
    snprintf(text, sizeof text, "%d %d %d %d", board->port, 2, t_backend, t_mode);
    CHECK(setenv(UPGRADE_VARIABLE, text, 1) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        execl(self, self, (char *)NULL);
        _exit(127);
    }
    int fd = -1;
    AWAIT((fd = dial()) >= 0);
    ask_id(fd, &id, &worker, &parent);
    t_close(fd);
    CHECK_INT(parent, pid);
    load_begin(&l);
    CHECK(kill(pid, SIGUSR2) == 0);
    CHECK(t_wait_until(has_new_parent, &parent));
    fprintf(stderr, "%d connections served, 0 failed\n", load_end(&l));
    int status = await_end(pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    /* The new program has become ours. */
    fd = t_connect(port());
    ask_id(fd, &id, &worker, &parent);
    t_close(fd);
    CHECK(parent != pid);
    CHECK(kill((pid_t)parent, SIGTERM) == 0);
    status = await_end((pid_t)parent);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    check_no_child();
}

static char *missing_program[] = {(char *)"/nonexistent/program", NULL};

TEST_LOOP(an_upgrade_to_nothing_changes_nothing)
{
    long before = 0, after = 0;
    int id = -1;
    workers = 2;
    fork_options.upgrade_argv = missing_program;
    tsrv_set_log(t_no_log, NULL);
    pid_t pid = launch(program_bind_start);
    await_forks(2);
    int fd = connect_to(0, &before);
    for (int i = 0; i < 2; i++) { /* and the next one may begin */
        CHECK(kill(pid, SIGUSR2) == 0);
        poll(NULL, 0, 100);
    }
    ask_id(fd, &id, &after, NULL);
    CHECK_INT(after, before);
    t_close(fd);
    CHECK_INT(exits_seen(), 0);
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
}

/* ---- tables -------------------------------------------------------------------------------*/

static char banner[8192]; /* the comment above the supervisor, as it stands in the header */

static void read_banner(void)
{
    const char *text = header_text();
    const char *start = strstr(text, "\n * >>process "), *end = NULL;
    CHECK(start != NULL && (end = strstr(start, "*/")) != NULL);
    CHECK((size_t)(end - start) < sizeof banner);
    memcpy(banner, start, (size_t)(end - start));
}

/* The word in a column of the row that begins with a name, or "". */
static const char *cell(const char *row, int column)
{
    static char word[32];
    char start[48];
    snprintf(start, sizeof start, "\n *     %s ", row);
    const char *at = strstr(banner, start);
    word[0] = 0;
    if (at != NULL) {
        at += strlen(start);
        for (int i = 0; i <= column; i++) {
            int used = 0;
            word[0] = 0;
            sscanf(at, " %31[^ \n]%n", word, &used);
            at += used;
        }
    }
    return word;
}

/* What can happen to a child, and to the parent, is what the table above the code says. */
TEST_ONCE(the_tables_above_the_supervisor_are_those_of_the_code)
{
    static const char *const states[] = {"VACANT", "DUE", "STARTING", "SERVING", "LEAVING", "DYING"};
    static const char *const parents[] = {"RUNNING", "ENDING", "STOPPING", "CUT"};
    static const struct {
        const char *name;
        tsrvi_child_action action;
    } actions[] = {
        {".", NULL},
        {"-", tsrvi_child_ignore},
        {"fork", tsrvi_child_fork},
        {"cancel", tsrvi_child_cancel},
        {"late", tsrvi_child_late},
        {"serve", tsrvi_child_serve},
        {"tell", tsrvi_child_tell},
        {"abort", tsrvi_child_abort},
        {"kill", tsrvi_child_kill},
        {"leave", tsrvi_child_leave},
        {"replace", tsrvi_child_replace},
        {"bury", tsrvi_child_bury},
    };
    static const struct {
        const char *name;
        tsrvi_parent_action action;
    } parent_actions[] = {
        {".", NULL},
        {"-", tsrvi_parent_ignore},
        {"stop", tsrvi_parent_stop},
        {"hear", tsrvi_parent_hear},
        {"cut", tsrvi_parent_cut},
        {"reload", tsrvi_parent_reload},
        {"upgrade", tsrvi_parent_upgrade},
        {"refuse", tsrvi_parent_refuse},
        {"yield", tsrvi_parent_yield},
        {"give_up", tsrvi_parent_give_up},
    };
    read_banner();
    for (int state = 0; state < TSRVI_CHILD_STATES; state++) {
        for (int event = 0; event < TSRVI_CHILD_EVENTS; event++) {
            size_t i = 0;
            while (i < 12 && strcmp(actions[i].name, cell(states[state], event)) != 0) {
                i++;
            }
            if (i == 12 || actions[i].action != tsrvi_child_table[state][event]) {
                T_FAIL("%s, event %d: \"%s\"", states[state], event, cell(states[state], event));
            }
        }
    }
    for (int state = 0; state < TSRVI_PARENT_STATES; state++) {
        for (int event = 0; event < TSRVI_PARENT_EVENTS; event++) {
            size_t i = 0;
            while (i < 10 && strcmp(parent_actions[i].name, cell(parents[state], event)) != 0) {
                i++;
            }
            if (i == 10 || parent_actions[i].action != tsrvi_parent_table[state][event]) {
                T_FAIL("%s, event %d: \"%s\"", parents[state], event, cell(parents[state], event));
            }
        }
    }
}
