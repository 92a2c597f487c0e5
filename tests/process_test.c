/* Workers and their supervisor. Its core is what Tornado's process_test.py and the TestMultiprocess of
 * its tcpserver_test.py check. Each test is the runner: it starts a program in a process of its own,
 * which forks workers, talks to these, and is the reaper of every orphan, so that it sees what the
 * program leaves behind. */
#include "test.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/un.h>

enum { WORKERS_MAX = 8, PIDS = 64 };

/* What all processes of a test share. */
static struct board {
    int port;      /* of the program's server; 0 = not bound yet; atomic */
    int forks;     /* workers that have begun; atomic */
    int results;   /* programs whose parent has got its result; atomic */
    int result;    /* the last of them */
    int ids[PIDS]; /* of the workers in the order in which they began */
    pid_t pids[PIDS];
    int exits; /* calls of on_exit; atomic */
    struct {
        int id, pid, status;
    } exit[PIDS];
    tsrv_stats stats; /* what the parent saw in the end */
    int value;        /* for the test; atomic */
} *board;

/* Set before a program is launched. */
static int workers;
static tsrv_fork_options fork_options;
static tsrv_server_options server_options;
static tsrv_bind_options bind_options;

/* ---- programs -----------------------------------------------------------------------------*/

static bool in_program;

/* In each worker, before the library goes on: the thread's own loop has the backend of the test. */
static void forked(void)
{
    tsrv_loop_options options = {t_backend};
    if (in_program) {
        t_fault_at = 0; /* faults are for the parent */
        CHECK_INT(tsrv_loop_new(&tsrvi_own_loop, &options), TSRV_OK);
    }
}

__attribute__((constructor)) static void set_up(void)
{
    CHECK_INT(pthread_atfork(NULL, NULL, forked), 0);
}

static void note_exit(int task_id, int pid, int status, void *context)
{
    int index = __atomic_load_n(&board->exits, __ATOMIC_RELAXED);
    CHECK(context == &fork_options);
    CHECK(index < PIDS);
    board->exit[index].id = task_id;
    board->exit[index].pid = pid;
    board->exit[index].status = status;
    __atomic_store_n(&board->exits, index + 1, __ATOMIC_RELEASE);
}

static void note_worker(void)
{
    int index = __atomic_fetch_add(&board->forks, 1, __ATOMIC_ACQ_REL);
    CHECK(index < PIDS);
    board->ids[index] = tsrv_task_id();
    __atomic_store_n(&board->pids[index], getpid(), __ATOMIC_RELEASE);
}

static void on_start(tsrv_server *server, void *context)
{
    tsrv_address address;
    (void)context;
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
    CHECK(tsrv_address_port(&address) != 0);
    if (tsrv_task_id() >= 0) {
        note_worker();
    }
}

enum { BIG = 1 << 20 };

static char pattern(size_t at)
{
    return (char)('a' + at % 23);
}

static void answer_big(tsrv_stream *stream)
{
    char piece[4096];
    for (size_t at = 0; at < BIG; at += sizeof piece) {
        for (size_t i = 0; i < sizeof piece; i++) {
            piece[i] = pattern(at + i);
        }
        tsrv_write(stream, piece, sizeof piece);
    }
}

/* The parent and its answer are those of the process that the line reaches. */
static void obey(tsrv_stream *stream, const char *line)
{
    tsrv_stats stats;
    int number = 0;
    if (strncmp(line, "id", 2) == 0) {
        tsrv_printf(stream, "%d %ld %ld\n", tsrv_task_id(), (long)getpid(), (long)getppid());
    } else if (sscanf(line, "exit %d", &number) == 1) {
        _exit(number);
    } else if (sscanf(line, "signal %d", &number) == 1) {
        signal(number, SIG_DFL);
        raise(number);
    } else if (strncmp(line, "hang", 4) == 0) {
        for (;;) {
            poll(NULL, 0, 1000);
        }
    } else if (strncmp(line, "big", 3) == 0) {
        answer_big(stream);
    } else if (sscanf(line, "stats %d", &number) == 1) {
        int rc = tsrv_server_worker_stats(tsrv_stream_server(stream), number, &stats);
        tsrv_printf(stream, "%d %d %d %d %d\n", rc, (int)stats.accepted, (int)stats.open,
                    (int)stats.ended_well, (int)stats.restarts);
    } else if (strncmp(line, "own", 3) == 0) {
        tsrv_server_stats(tsrv_stream_server(stream), &stats);
        tsrv_printf(stream, "%d %d\n", (int)stats.accepted, (int)stats.open);
    } else {
        tsrv_write(stream, line, strlen(line));
    }
}

static int serve_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        obey(stream, line.data);
    }
    return rc;
}

static tsrv_server *new_server(void)
{
    tsrv_server *server;
    server_options.mode = t_mode;
    server_options.handle_stream = serve_lines;
    CHECK_INT(tsrv_server_new(&server, &server_options), TSRV_OK);
    return server;
}

/* Bound to a port that the test reads from the board. */
static tsrv_server *new_bound_server(void)
{
    tsrv_server *server = new_server();
    tsrv_address address;
    CHECK_INT(tsrv_server_bind(server, 0, "127.0.0.1", &bind_options), TSRV_OK);
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
    __atomic_store_n(&board->port, tsrv_address_port(&address), __ATOMIC_RELEASE);
    return server;
}

/* bind and start: the second way of Tornado. */
static int program_bind_start(void)
{
    server_options.on_start = on_start;
    tsrv_server *server = new_bound_server();
    int rc = tsrv_server_start(server, workers, &fork_options);
    if (rc == TSRV_OK) {
        rc = tsrv_loop_run(NULL);
    } else {
        tsrv_server_stats(server, &board->stats);
    }
    tsrv_server_free(server);
    return rc;
}

/* bind_sockets, fork_processes and add_sockets: the third. */
static int program_add_sockets(void)
{
    int fds[4], rc, count = tsrv_bind_sockets(0, "127.0.0.1", &bind_options, fds, 4);
    tsrv_address address;
    tsrv_server *server;
    CHECK_INT(count, 1);
    CHECK_INT(tsrvi_address_get(fds[0], tsrvi_getsockname, &address), TSRV_OK);
    __atomic_store_n(&board->port, tsrv_address_port(&address), __ATOMIC_RELEASE);
    if ((rc = tsrv_fork_processes(workers, &fork_options)) < 0) {
        t_close(fds[0]);
        return rc;
    }
    CHECK_INT(rc, tsrv_task_id());
    server_options.mode = t_mode;
    server_options.handle_stream = serve_lines;
    server_options.on_start = on_start;
    CHECK_INT(tsrv_server_new(&server, &server_options), TSRV_OK);
    CHECK_INT(tsrv_server_add_sockets(server, fds, count), TSRV_OK);
    rc = tsrv_loop_run(NULL);
    tsrv_server_free(server);
    return rc;
}

/* Workers without a loop. */
static int (*bare_worker)(void);

static int program_bare(void)
{
    int rc = tsrv_fork_processes(workers, &fork_options);
    if (rc < 0) {
        return rc;
    }
    CHECK_INT(rc, tsrv_task_id());
    note_worker();
    return bare_worker();
}

static void run_program(int (*program)(void))
{
    int fds = t_open_fds(), rc;
    long long allocations = (long long)t_live_allocations;
    in_program = true;
    rc = program();
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
    CHECK_INT(t_live_allocations, allocations);
    if (tsrv_task_id() < 0) {
        CHECK_INT(t_open_fds(), fds);
        board->result = rc;
        __atomic_add_fetch(&board->results, 1, __ATOMIC_ACQ_REL);
        CHECK_INT(waitpid(-1, NULL, WNOHANG), -1); /* and it has no child any more */
        CHECK_INT(errno, ECHILD);
    }
    exit(rc == TSRV_OK || rc == TSRV_EPARENT ? 0 : 1);
}

/* ---- the runner ---------------------------------------------------------------------------*/

static void open_board(void)
{
    board = (struct board *)mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE,
                                 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(board != MAP_FAILED);
    fork_options.on_exit = note_exit;
    fork_options.context = &fork_options;
    CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0);
}

static pid_t launch(int (*program)(void))
{
    pid_t pid;
    open_board();
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        run_program(program);
    }
    return pid;
}

static int exits_seen(void)
{
    return __atomic_load_n(&board->exits, __ATOMIC_ACQUIRE);
}

static int forks_seen(void)
{
    return __atomic_load_n(&board->forks, __ATOMIC_ACQUIRE);
}

static bool has_forks(void *count)
{
    return forks_seen() >= *(int *)count;
}

static void await_forks(int count)
{
    if (!t_wait_until(has_forks, &count)) {
        T_FAIL("only %d of %d workers began", forks_seen(), count);
    }
}

static bool has_exits(void *count)
{
    return exits_seen() >= *(int *)count;
}

static void await_exits(int count)
{
    if (!t_wait_until(has_exits, &count)) {
        T_FAIL("only %d of %d workers ended", exits_seen(), count);
    }
}

static int port(void)
{
    return __atomic_load_n(&board->port, __ATOMIC_ACQUIRE);
}

/* Waits for a child of ours and returns its wait status. */
static int await_end(pid_t pid)
{
    int status = 0;
    int64_t end = t_now_ms() + T_PATIENCE * 1000 * t_scale();
    while (waitpid(pid, &status, WNOHANG) == 0) {
        CHECK(t_now_ms() < end);
        poll(NULL, 0, 1);
    }
    return status;
}

/* Every process that the program has left behind is ours now: there is none. */
static void check_no_child(void)
{
    pid_t pid = waitpid(-1, NULL, WNOHANG);
    if (pid != -1 || errno != ECHILD) {
        T_FAIL("a process has been left behind (%ld)", (long)pid);
    }
}

/* The program's parent ends with this exit status and result, and nothing is left. */
static void check_end(pid_t pid, int exit_status, int result)
{
    int status = await_end(pid);
    if (!WIFEXITED(status)) {
        T_FAIL("the program was ended by signal %d", WTERMSIG(status));
    }
    CHECK_INT(board->result, result);
    CHECK_INT(WEXITSTATUS(status), exit_status);
    CHECK_INT(board->results, 1);
    check_no_child();
}

/* One line of any length up to size. False: the end, or a reset. */
static bool read_line(int fd, char *line, size_t size)
{
    size_t used = 0;
    while (used + 1 < size) {
        ssize_t n = recv(fd, line + used, 1, 0);
        if (n <= 0) {
            CHECK(n == 0 || errno == ECONNRESET);
            return false;
        }
        if (line[used++] == '\n') {
            break;
        }
    }
    line[used] = 0;
    return true;
}

/* Asks a worker who it is. */
static void ask_id(int fd, int *id, long *pid, long *parent)
{
    char line[64];
    long unused = 0;
    t_sends(fd, "id\n");
    CHECK(read_line(fd, line, sizeof line));
    CHECK_INT(sscanf(line, "%d %ld %ld", id, pid, parent != NULL ? parent : &unused), 3);
}

/* A connection to the worker with that task id. */
static int connect_to(int wanted, long *pid)
{
    int64_t end = t_now_ms() + T_PATIENCE * 1000 * t_scale();
    for (;;) {
        int fd = t_connect(port()), id = -1;
        ask_id(fd, &id, pid, NULL);
        if (id == wanted) {
            return fd;
        }
        t_close(fd);
        CHECK(t_now_ms() < end);
    }
}

static void command(int worker, const char *text)
{
    long pid = 0;
    int fd = connect_to(worker, &pid);
    t_sends(fd, text);
    char byte;
    ssize_t n = recv(fd, &byte, 1, 0);
    CHECK(n == 0 || (n < 0 && errno == ECONNRESET)); /* it is dead */
    t_close(fd);
}

/* ---- what Tornado tests -------------------------------------------------------------------*/

/* Two workers exit 2 and 3 and are replaced, a third exits 4 and is replaced; exit 0 is not. */
TEST_LOOP(test_multi_process)
{
    workers = 3;
    fork_options.max_restarts = 3;
    pid_t pid = launch(program_bind_start);
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

static int log_lines;

static void count_log(int level, const char *message, void *context)
{
    (void)level, (void)message, (void)context;
    log_lines++;
}

TEST_ONCE(refused_when_a_loop_exists)
{
    tsrv_set_log(count_log, NULL);
    CHECK(tsrv_loop_current() != NULL);
    CHECK_INT(tsrv_fork_processes(2, NULL), TSRV_EINVAL);
    CHECK_INT(log_lines, 1);
    tsrv_server *server = new_server();
    CHECK_INT(tsrv_server_bind(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_start(server, 2, NULL), TSRV_EINVAL);
    CHECK(log_lines > 1);
    tsrv_server_free(server);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
    check_no_child();
}

TEST_ONCE(start_wants_something_bound_and_only_once)
{
    tsrv_server *server = new_server();
    tsrv_address before, after;
    tsrv_set_log(count_log, NULL);
    CHECK_INT(tsrv_server_start(server, 1, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_server_start(server, 3, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_server_bind(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_bind(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_start(server, -1, NULL), TSRV_EINVAL);
    CHECK(tsrvi_own_loop == NULL); /* none of this needs a loop */
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
    t_expect_eof(fd);
    t_close(fd);
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

/* A worker does not see that its parent dies: no loop, or one that hangs. */
static int sleeps(void)
{
    for (;;) {
        poll(NULL, 0, 1000);
    }
    return TSRV_OK;
}

static bool no_child_left(void *unused)
{
    (void)unused;
    while (waitpid(-1, NULL, WNOHANG) > 0) {
    }
    return waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD;
}

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

static bool has_value(void *value)
{
    return __atomic_load_n(&board->value, __ATOMIC_ACQUIRE) >= *(int *)value;
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

static tsrv_signal own_signal;

static void own_term(void *context)
{
    (void)context;
    __atomic_add_fetch(&board->value, 1, __ATOMIC_ACQ_REL);
    tsrv_loop_stop(NULL);
}

static void start_own_signal(tsrv_server *server, void *context)
{
    on_start(server, context);
    CHECK_INT(tsrv_signal_start(NULL, &own_signal, SIGTERM, own_term, NULL), TSRV_OK);
}

/* An own watch on SIGTERM replaces the drain: the connection is cut at once. */
static int program_own_signal(void)
{
    tsrv_server *server = new_bound_server();
    int rc = tsrv_server_start(server, workers, &fork_options);
    if (rc == TSRV_OK) {
        rc = tsrv_loop_run(NULL);
        tsrv_signal_stop(&own_signal);
    }
    tsrv_server_free(server);
    return rc;
}

TEST_LOOP(an_own_watch_replaces_the_drain)
{
    long who = 0;
    workers = 2;
    server_options.on_start = start_own_signal;
    pid_t pid = launch(program_own_signal);
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
    pid_t pid = launch(program_own_signal); /* which leaves on_start to the test */
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

/* Buffered output is not printed once more by every worker. */
static int program_with_buffer(void)
{
    CHECK(freopen("/dev/null", "w", stdout) != NULL);
    FILE *file = fdopen(board->value, "w");
    CHECK(file != NULL);
    fputs("once\n", file);
    int rc = program_bare();
    fclose(file);
    return rc;
}

static int returns_well(void)
{
    return TSRV_OK;
}

TEST_ONCE(buffered_output_is_printed_once)
{
    int pipe_fds[2];
    char text[64] = "";
    workers = 3;
    bare_worker = returns_well;
    CHECK(pipe(pipe_fds) == 0);
    open_board();
    board->value = pipe_fds[1];
    pid_t pid = fork();
    if (pid == 0) {
        /* the balance of descriptors does not hold for what the program closes itself */
        in_program = true;
        int rc = program_with_buffer();
        _exit(rc == TSRV_EPARENT || rc == TSRV_OK ? 0 : 1);
    }
    t_close(pipe_fds[1]);
    size_t size = 0;
    for (ssize_t n = 1; n > 0; size += n > 0 ? (size_t)n : 0) {
        n = read(pipe_fds[0], text + size, sizeof text - size);
        CHECK(n >= 0);
    }
    CHECK_MEM(text, size, "once\n", 5);
    t_close(pipe_fds[0]);
    int status = await_end(pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    check_no_child();
}

/* ---- process 1 ----------------------------------------------------------------------------*/

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

/* Starts the program as process 1 of a namespace, and returns its pid here. What makes the namespace is
 * a process of its own, which could not fork any more once process 1 has ended. */
static pid_t launch_as_process_1(void)
{
    pid_t maker = fork(), pid;
    CHECK(maker >= 0);
    if (maker == 0) {
        if (unshare(CLONE_NEWPID) != 0) {
            _exit(T_SKIPPED);
        }
        pid = fork();
        if (pid == 0) {
            CHECK_INT(getpid(), 1);
            CHECK(unshare(CLONE_NEWNS) == 0); /* LeakSanitizer looks itself up in /proc */
            CHECK(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0);
            CHECK(mount("proc", "/proc", "proc", 0, NULL) == 0);
            run_program(program_bare);
        }
        board->pids[PIDS - 1] = pid;
        _exit(0);
    }
    int status = await_end(maker); /* and the program becomes ours */
    if (WEXITSTATUS(status) == T_SKIPPED) {
        SKIP("the right to make a PID namespace (root)");
    }
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    return board->pids[PIDS - 1];
}

TEST_ONCE(works_as_process_1)
{
    int ready = 2;
    workers = 2;
    bare_worker = makes_an_orphan;
    open_board();
    pid_t pid = launch_as_process_1();
    CHECK(t_wait_until(has_value, &ready));
    poll(NULL, 0, 100);
    CHECK(t_wait_until(no_zombie, &pid));
    CHECK(kill(pid, SIGTERM) == 0);
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(forks_seen(), 2);
}

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

/* A connection a millisecond, 800 in all, into four workers. Returns what the busiest has got. */
static int spread(void)
{
    static int fds[SPREAD_CONNECTIONS];
    int before[SPREAD_WORKERS], most = 0;
    for (int i = 0; i < SPREAD_WORKERS; i++) {
        before[i] = accepted_by(i);
    }
    int64_t start = t_now_ms();
    for (int i = 0; i < SPREAD_CONNECTIONS; i++) {
        while (t_now_ms() < start + i) {
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
    while (spread() * SPREAD_WORKERS >= SPREAD_CONNECTIONS * 12 / 10) {
        CHECK(++tries < 4);
    }
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
    t_close(hung[0]);
    t_close(hung[1]);
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

/* ---- load ---------------------------------------------------------------------------------*/

/* Clients that come and go while something happens to the workers; long ones read slowly. */
typedef struct load {
    pthread_t threads[3];
    bool stop; /* atomic */
    int served;  /* atomic */
} load;

/* One line, then the end. Whatever goes wrong fails the test. */
static void *short_clients(void *context)
{
    load *l = (load *)context;
    while (!__atomic_load_n(&l->stop, __ATOMIC_ACQUIRE)) {
        int fd = t_connect(port());
        t_sends(fd, "hello\n");
        t_expect(fd, "hello\n");
        t_close(fd);
        __atomic_add_fetch(&l->served, 1, __ATOMIC_ACQ_REL);
    }
    return NULL;
}

/* A large answer that is read from the beginning of the load to its end. */
static void *long_client(void *context)
{
    load *l = (load *)context;
    int fd = t_connect_with_room(port(), 16384);
    char *got = (char *)malloc(BIG + 1);
    t_sends(fd, "big\n");
    size_t half = t_recv(fd, got, BIG / 2);
    CHECK_INT(half, BIG / 2);
    __atomic_add_fetch(&l->served, 1, __ATOMIC_ACQ_REL);
    while (!__atomic_load_n(&l->stop, __ATOMIC_ACQUIRE)) {
        poll(NULL, 0, 1);
    }
    CHECK_INT(t_recv(fd, got + half, BIG - half), BIG - half);
    for (size_t at = 0; at < BIG; at++) {
        CHECK_INT(got[at], pattern(at));
    }
    free(got);
    t_close(fd);
    return NULL;
}

static bool load_runs(void *context)
{
    return __atomic_load_n(&((load *)context)->served, __ATOMIC_ACQUIRE) > 50;
}

static void load_begin(load *l)
{
    memset(l, 0, sizeof *l);
    CHECK_INT(pthread_create(&l->threads[0], NULL, short_clients, l), 0);
    CHECK_INT(pthread_create(&l->threads[1], NULL, short_clients, l), 0);
    CHECK_INT(pthread_create(&l->threads[2], NULL, long_client, l), 0);
    CHECK(t_wait_until(load_runs, l));
}

static int load_end(load *l)
{
    __atomic_store_n(&l->stop, true, __ATOMIC_RELEASE);
    for (int i = 0; i < 3; i++) {
        CHECK_INT(pthread_join(l->threads[i], NULL), 0);
    }
    return l->served;
}

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

/* ---- a unix socket's file -----------------------------------------------------------------*/

static char unix_folder[64], unix_path[80];

static void on_unix_start(tsrv_server *server, void *context)
{
    (void)server, (void)context;
    note_worker();
}

static int program_unix(void)
{
    char address[100];
    server_options.on_start = on_unix_start;
    tsrv_server *server = new_server();
    snprintf(address, sizeof address, "unix:%s", unix_path);
    CHECK_INT(tsrv_server_bind(server, 0, address, NULL), TSRV_OK);
    int rc = tsrv_server_start(server, workers, &fork_options);
    if (rc == TSRV_OK) {
        rc = tsrv_loop_run(NULL);
    }
    tsrv_server_free(server);
    return rc;
}

static int connect_unix(void)
{
    struct sockaddr_un name;
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(fd >= 0);
    t_prepare(fd);
    memset(&name, 0, sizeof name);
    name.sun_family = AF_UNIX;
    snprintf(name.sun_path, sizeof name.sun_path, "%s", unix_path);
    CHECK(connect(fd, (struct sockaddr *)&name, sizeof name) == 0);
    return fd;
}

static bool has_gone(void *path)
{
    return access((const char *)path, F_OK) != 0;
}

/* Workers that end, and new ones, leave it alone; it goes when the parent begins to stop, while a
 * worker still finishes what it has. */
TEST_LOOP(socket_file_goes_when_the_parent_stops)
{
    workers = 2;
    tsrv_set_log(t_no_log, NULL);
    snprintf(unix_folder, sizeof unix_folder, "/tmp/tsrv-process-XXXXXX");
    CHECK(mkdtemp(unix_folder) != NULL);
    snprintf(unix_path, sizeof unix_path, "%s/socket", unix_folder);
    pid_t pid = launch(program_unix);
    await_forks(2);
    CHECK(kill(pid, SIGHUP) == 0);
    await_forks(4);
    await_exits(2);
    int fd = connect_unix();
    t_sends(fd, "first\nsecond ");
    t_expect(fd, "first\n");
    CHECK(kill(pid, SIGTERM) == 0);
    CHECK(t_wait_until(has_gone, unix_path));
    CHECK(exits_seen() < 4);
    t_sends(fd, "half\n");
    t_expect(fd, "second half\n");
    t_close(fd);
    check_end(pid, 0, TSRV_EPARENT);
    CHECK(rmdir(unix_folder) == 0);
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

/* Milliseconds in 4 bytes: they wrap, and 0 means that there was none. */
TEST_ONCE(beats_are_told_by_their_age)
{
    static const uint64_t wrap_ms = (uint64_t)1 << 32;
    static const uint64_t starts_ms[] = {1, 1000, ((uint64_t)1 << 31) - 5, ((uint64_t)1 << 32) - 5,
                                         (uint64_t)1 << 32, 5 * ((uint64_t)1 << 32) - 1};
    tsrvi_place place;
    memset(&place, 0, sizeof place);
    CHECK_INT(tsrvi_beat_age_ms(&place, 12345 * TSRVI_MS), -1);
    for (size_t i = 0; i < sizeof starts_ms / sizeof starts_ms[0]; i++) {
        uint64_t start = starts_ms[i] * TSRVI_MS;
        int late = starts_ms[i] % wrap_ms == 0; /* by 1 ms, so that it is not "none" */
        tsrvi_beat_store(&place, start);
        CHECK_INT(tsrvi_beat_age_ms(&place, start), 0);
        CHECK_INT(tsrvi_beat_age_ms(&place, start + 999 * TSRVI_MS), 999 - late);
        CHECK_INT(tsrvi_beat_age_ms(&place, start + 86400000 * TSRVI_MS), 86400000 - late);
        CHECK_INT(tsrvi_beat_age_ms(&place, start - TSRVI_MS), 0); /* seen by who looked before it */
        tsrvi_beat_store(&place, 0);
        CHECK_INT(tsrvi_beat_age_ms(&place, start), -1);
    }
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
        t_sends(client, "x\n");
        t_expect(client, "x\n");
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
        CHECK(munmap(board, sizeof *board) == 0);
    }
}

static int program_fork_fails(void)
{
    t_fault_name = "fork";
    t_fault_errno = EAGAIN;
    t_fault_calls = 0;
    t_fault_at = 2;
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

static int serve_port;

static int program_serve(void)
{
    server_options.mode = t_mode;
    server_options.handle_stream = serve_lines;
    server_options.on_start = on_start;
    server_options.fork = &fork_options;
    return tsrv_serve(serve_port, "127.0.0.1", workers, &server_options);
}

static void serve_and_stop(int count, int signo)
{
    workers = count;
    serve_port = t_free_port();
    pid_t pid = launch(program_serve);
    board->port = serve_port;
    if (count > 1) {
        await_forks(count);
    }
    int64_t end = t_now_ms() + T_PATIENCE * 1000 * t_scale();
    int fd = -1, probe;
    do { /* a single process cannot tell us that it listens */
        struct sockaddr_in address;
        memset(&address, 0, sizeof address);
        address.sin_family = AF_INET;
        address.sin_port = htons((uint16_t)serve_port);
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        fd = socket(AF_INET, SOCK_STREAM, 0);
        probe = connect(fd, (struct sockaddr *)&address, sizeof address);
        t_close(fd);
        CHECK(t_now_ms() < end);
    } while (probe != 0);
    fd = t_connect(serve_port);
    t_sends(fd, "hello\n");
    t_expect(fd, "hello\n");
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
    tsrv_set_log(count_log, NULL);
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, fds, 2), 1);
    CHECK_INT(tsrvi_address_get(fds[0], tsrvi_getsockname, &address), TSRV_OK);
    CHECK_INT(tsrv_serve(tsrv_address_port(&address), "127.0.0.1", 1, &server_options), -EADDRINUSE);
    CHECK_INT(tsrv_serve(tsrv_address_port(&address), "127.0.0.1", 3, &server_options), -EADDRINUSE);
    CHECK_INT(log_lines, 2);
    CHECK_INT(tsrv_serve(0, "127.0.0.1", 1, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_serve(0, "127.0.0.1", -1, &server_options), TSRV_EINVAL);
    t_close(fds[0]);
    check_no_child();
}

/* ---- upgrade ------------------------------------------------------------------------------*/

#define UPGRADE_VARIABLE "TEST_UPGRADE"

/* The program that is upgraded: this file again, found by its variable before the tests begin. */
static int upgradable(const char *text)
{
    char self[4096];
    static char *arguments[2];
    int count = 0, new_port = 0;
    ssize_t size = readlink("/proc/self/exe", self, sizeof self - 1);
    CHECK(size > 0);
    self[size] = 0;
    arguments[0] = self;
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
    char text[64], self[4096];
    long worker = 0, parent = 0;
    int id = -1;
    ssize_t size = readlink("/proc/self/exe", self, sizeof self - 1);
    CHECK(size > 0);
    self[size] = 0;
    open_board();
    board->port = t_free_port();
    snprintf(text, sizeof text, "%d %d %d %d", board->port, 2, t_backend, t_mode);
    CHECK(setenv(UPGRADE_VARIABLE, text, 1) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        execl(self, self, (char *)NULL);
        _exit(127);
    }
    int64_t end = t_now_ms() + T_PATIENCE * 1000 * t_scale();
    for (bool up = false; !up;) {
        struct sockaddr_in address;
        memset(&address, 0, sizeof address);
        address.sin_family = AF_INET;
        address.sin_port = htons((uint16_t)board->port);
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        int probe = socket(AF_INET, SOCK_STREAM, 0);
        up = connect(probe, (struct sockaddr *)&address, sizeof address) == 0;
        t_close(probe);
        CHECK(t_now_ms() < end);
        poll(NULL, 0, 1);
    }
    int fd = t_connect(port());
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
