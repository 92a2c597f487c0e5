/* Programs with workers, for tests that look at them from outside. A test is the runner: it starts a program
 * in a process of its own, which forks workers, talks to these, and is the reaper of every orphan, so
 * that it sees what the program leaves behind. Included first, in place of test.h. */
#ifndef WORKERS_H
#define WORKERS_H

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "seam.h"

#include <stdint.h>
#include <sys/socket.h>
#include <time.h>

/* The clock of all processes of a test can be set forward, so that nothing has to wait for half a minute. */
static int64_t *clock_ahead_ns; /* atomic; NULL = it is the system's */

static inline int workers_clock(clockid_t id, struct timespec *now)
{
    int rc = clock_gettime(id, now);
    if (rc == 0 && clock_ahead_ns != NULL) {
        int64_t ns = now->tv_nsec + __atomic_load_n(clock_ahead_ns, __ATOMIC_ACQUIRE);
        now->tv_sec += (time_t)(ns / 1000000000);
        now->tv_nsec = (long)(ns % 1000000000);
    }
    return rc;
}
#undef t_sys_clock_gettime
#define t_sys_clock_gettime(...) workers_clock(__VA_ARGS__)

static void (*behind_send)(void); /* called when the library has sent something; NULL = nothing is */

static inline ssize_t workers_send(int fd, const void *data, size_t size, int flags)
{
    ssize_t rc = t_sys_send(fd, data, size, flags);
    if (behind_send != NULL) {
        behind_send();
    }
    return rc;
}
#undef t_sys_send
#define t_sys_send(...) workers_send(__VA_ARGS__)

#include "test.h"

#include <sched.h>
#include <sys/mman.h>
#ifdef __linux__
#include <sys/mount.h>
#include <sys/prctl.h>
#endif
#include <sys/stat.h>
#include <sys/un.h>

#if defined(__SANITIZE_ADDRESS__)
#define WITH_LEAK_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define WITH_LEAK_SANITIZER
#endif
#endif

enum { PIDS = 64 };

/* What all processes of a test share. */
static struct board {
    int port;      /* of the program's server; 0 = not bound yet; atomic */
    int begun;     /* processes that have begun to accept, or bare workers; atomic */
    int forks;     /* those of them that stand in ids, versions and pids; atomic */
    int results;   /* programs whose parent has got its result; atomic */
    int result;    /* the last of them */
    int ids[PIDS]; /* of the workers in the order in which they began */
    int versions[PIDS];
    pid_t pids[PIDS];
    int exits; /* calls of on_exit; atomic */
    struct {
        int id, pid, status;
    } exit[PIDS];
    tsrv_stats stats; /* what the parent saw in the end */
    int value;        /* for the test; atomic, as are the next two */
    int held;
    int go;
    int version;      /* of what workers are made from; atomic */
    int64_t ahead_ns; /* see clock_ahead_ns */
    int turns;        /* times that a parent has called poll; atomic */
    int calls;        /* that all other processes have made; atomic */
    int failing;      /* calls that are to fail; atomic; set by fail */
    int passing;      /* those before them that are not; atomic */
    int failed;       /* those that have; atomic */
    int failing_in_children, failing_errno;
    char failing_name[24];
    struct {              /* of a program that an upgrade starts */
        int how, workers; /* see the test */
        int pid, count;   /* the last one, how many; atomic */
    } next;
    int second_port; /* of a program that binds two */
    int facts[80];   /* what on_start has seen, see the test */
    int fact_count;  /* atomic */
    size_t logged;   /* bytes; atomic */
    char log[65536];
} * board;

/* Set before a program is launched. */
int workers;
const char *unix_path; /* where it is bound; NULL = a port of 127.0.0.1 that the kernel chooses */
int (*bare_worker)(void); /* for program_bare */
void (*before_program)(
    void); /* NULL = nothing; called in the program, before its balance is taken */
static tsrv_fork_options fork_options;
static tsrv_server_options server_options;
static tsrv_bind_options bind_options;

/* Waits until the condition holds. */
#define AWAIT(condition)                                                 \
    do {                                                                 \
        int64_t await_end_ = t_patience(); \
        while (!(condition)) {                                           \
            if (t_now_ms() > await_end_) {                               \
                T_FAIL("not in time: %s\n%s", #condition, board->log);   \
            }                                                            \
            poll(NULL, 0, 1);                                            \
        }                                                                \
    } while (0)

/* ---- programs -----------------------------------------------------------------------------*/

static bool in_program, in_parent;

/* Takes one away, of those that are left, whoever else does. */
static inline bool take_one(int *left)
{
    int now = __atomic_load_n(left, __ATOMIC_ACQUIRE);
    while (now > 0 && !__atomic_compare_exchange_n(left, &now, now - 1, false, __ATOMIC_ACQ_REL,
                                                   __ATOMIC_ACQUIRE)) {
    }
    return now > 0;
}

/* Told of every call of the library: the parent's are counted, and some fail when they are to. */
static inline void look_at_call(const char *name)
{
    if (!in_parent) {
        __atomic_add_fetch(&board->calls, 1, __ATOMIC_ACQ_REL);
    } else if (strcmp(name, "poll") == 0) {
        __atomic_add_fetch(&board->turns, 1, __ATOMIC_ACQ_REL);
    }
    if (__atomic_load_n(&board->failing, __ATOMIC_ACQUIRE) > 0 &&
        board->failing_in_children == !in_parent && strcmp(name, board->failing_name) == 0 &&
        !take_one(&board->passing) && take_one(&board->failing)) {
        __atomic_add_fetch(&board->failed, 1, __ATOMIC_ACQ_REL);
        t_fault_name = board->failing_name;
        t_fault_errno = board->failing_errno;
        t_fault_calls = 0;
        t_fault_at = 1;
    }
}

enum { IN_PARENT, IN_CHILDREN };

/* Behind the next `passing` calls of that name so many fail, in the parent or in what it forks. */
static inline void fail_after(int passing, const char *name, int code, int count, int where)
{
    __atomic_store_n(&board->failing, 0, __ATOMIC_RELEASE);
    snprintf(board->failing_name, sizeof board->failing_name, "%s", name);
    board->failing_errno = code;
    board->failing_in_children = where;
    __atomic_store_n(&board->passing, passing, __ATOMIC_RELEASE);
    __atomic_store_n(&board->failed, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&board->failing, count, __ATOMIC_RELEASE);
}

static inline void fail(const char *name, int code, int count, int where)
{
    fail_after(0, name, code, count, where);
}

/* No more calls fail. */
static inline void end_fault(void)
{
    __atomic_store_n(&board->failing, 0, __ATOMIC_RELEASE);
}

/* In each worker, before the library goes on: the thread's own loop has the backend of the test. */
static inline void forked(void)
{
    tsrv_loop_options options = {0};
    options.backend = t_backend;
    void (*seen)(const char *) = t_seen;
    if (in_program) {
        in_parent = false;
        t_fault_at = 0; /* faults are for the parent, */
        t_seen = NULL;  /* or for the library alone */
        CHECK_INT(tsrv_loop_new(&tsrvi_thread.own, &options), TSRV_OK);
        t_seen = seen;
    }
}

__attribute__((constructor)) static void set_up_workers(void)
{
    CHECK_INT(pthread_atfork(NULL, NULL, forked), 0);
}

static inline void note_exit(int task_id, int pid, int status, void *context)
{
    int index = __atomic_load_n(&board->exits, __ATOMIC_RELAXED);
    CHECK(context == &fork_options);
    CHECK(index < PIDS);
    board->exit[index].id = task_id;
    board->exit[index].pid = pid;
    board->exit[index].status = status;
    __atomic_store_n(&board->exits, index + 1, __ATOMIC_RELEASE);
}

static inline void note_worker(void)
{
    int index = __atomic_fetch_add(&board->begun, 1, __ATOMIC_ACQ_REL);
    CHECK(index < PIDS);
    board->ids[index] = tsrv_task_id();
    board->versions[index] = __atomic_load_n(&board->version, __ATOMIC_ACQUIRE);
    __atomic_store_n(&board->pids[index], getpid(), __ATOMIC_RELEASE);
    __atomic_add_fetch(&board->forks, 1, __ATOMIC_ACQ_REL); /* who sees it, finds all of the above */
}

static inline void note_port(tsrv_server *server)
{
    tsrv_address address;
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
    CHECK(unix_path != NULL || tsrv_address_port(&address) != 0);
    __atomic_store_n(&board->port, tsrv_address_port(&address), __ATOMIC_RELEASE);
}

static inline void on_start(tsrv_server *server, void *context)
{
    (void)context;
    note_port(server);
    note_worker();
}

/* The log of all processes: "level text" in lines. */
static inline void keep_log(int level, const char *message, void *context)
{
    char line[600];
    size_t size = (size_t)snprintf(line, sizeof line, "%d %s\n", level, message);
    size_t at = __atomic_fetch_add(&board->logged, size < sizeof line ? size : sizeof line - 1,
                                   __ATOMIC_ACQ_REL);
    (void)context;
    if (at + sizeof line < sizeof board->log) {
        memcpy(board->log + at, line, size < sizeof line ? size : sizeof line - 1);
    }
}

/* How many lines of the log are warnings, or worse. */
static inline int warnings(void)
{
    int count = 0;
    for (const char *line = board->log; *line != 0; line = strchr(line, '\n') + 1) {
        count += *line - '0' <= TSRV_LOG_WARNING;
        if (strchr(line, '\n') == NULL) {
            break;
        }
    }
    return count;
}

enum { BIG = 1 << 20 };

static inline char pattern(size_t at)
{
    return (char)('a' + at % 23);
}

static inline void answer_big(tsrv_stream *stream)
{
    char piece[4096];
    for (size_t at = 0; at < BIG; at += sizeof piece) {
        for (size_t i = 0; i < sizeof piece; i++) {
            piece[i] = pattern(at + i);
        }
        tsrv_write(stream, piece, sizeof piece);
    }
}

/* How many workers the metrics tell of, and what they have accepted. */
static inline void answer_metrics(tsrv_stream *stream)
{
    static char text[65536];
    const char *at = text;
    int count = 0, worker, accepted, sum = 0;
    CHECK(tsrv_metrics_format(tsrv_stream_server(stream), text, sizeof text) < (int)sizeof text);
    while ((at = strstr(at, "tsrv_connections_accepted_total{")) != NULL) {
        CHECK_INT(sscanf(at, "tsrv_connections_accepted_total{worker=\"%d\"} %d", &worker, &accepted), 2);
        CHECK_INT(worker, count++);
        sum += accepted;
        at++;
    }
    tsrv_printf(stream, "%d %d\n", count, sum);
}

/* The parent and its answer are those of the process that the line reaches. */
static inline void obey(tsrv_stream *stream, const char *line)
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
    } else if (strncmp(line, "metrics", 7) == 0) {
        answer_metrics(stream);
    } else if (strncmp(line, "own", 3) == 0) {
        tsrv_server_stats(tsrv_stream_server(stream), &stats);
        tsrv_printf(stream, "%d %d\n", (int)stats.accepted, (int)stats.open);
    } else {
        tsrv_write(stream, line, strlen(line));
    }
}

static inline int serve_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        obey(stream, line.data);
    }
    return rc;
}

/* Where the program is bound. */
static inline const char *bound_address(void)
{
    static char text[200];
    if (unix_path == NULL) {
        return "127.0.0.1";
    }
    snprintf(text, sizeof text, "unix:%s", unix_path);
    return text;
}

static inline tsrv_server *new_server(void)
{
    tsrv_server *server;
    server_options.mode = t_mode;
    server_options.handle_stream = serve_lines;
    CHECK_INT(tsrv_server_new(&server, &server_options), TSRV_OK);
    return server;
}

/* Bound to a port that the test reads from the board. */
static inline tsrv_server *new_bound_server(void)
{
    tsrv_server *server = new_server();
    tsrv_address address;
    CHECK_INT(tsrv_server_bind(server, board->port, bound_address(), &bind_options), TSRV_OK);
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
    __atomic_store_n(&board->port, tsrv_address_port(&address), __ATOMIC_RELEASE);
    return server;
}

/* Called in each worker between tsrv_server_start and its loop. */
void (*before_loop)(void);

/* bind and start: the second way of Tornado. */
static inline int program_bind_start(void)
{
    if (server_options.on_start == NULL) {
        server_options.on_start = on_start;
    }
    tsrv_server *server = new_bound_server();
    int rc = tsrv_server_start(server, workers, &fork_options);
    if (rc == TSRV_OK) {
        if (before_loop != NULL) {
            before_loop();
        }
        rc = tsrv_loop_run(NULL);
    } else {
        tsrv_server_stats(server, &board->stats);
    }
    tsrv_server_free(server);
    return rc;
}

bool hands_fds_over; /* program_add_sockets names its sockets in the options */

/* bind_sockets, fork_processes and add_sockets: the third. */
static inline int program_add_sockets(void)
{
    int fds[4], rc, count = tsrv_bind_sockets(0, bound_address(), &bind_options, fds, 4);
    tsrv_address address;
    tsrv_server *server;
    CHECK_INT(count, 1);
    CHECK_INT(tsrvi_address_get(fds[0], tsrvi_getsockname, &address), TSRV_OK);
    __atomic_store_n(&board->port, tsrv_address_port(&address), __ATOMIC_RELEASE);
    if (hands_fds_over) {
        fork_options.fds = fds;
        fork_options.fd_count = count;
    }
    if ((rc = tsrv_fork_processes(workers, &fork_options)) < 0) {
        close(fds[0]); /* which the stop of the parent may have done */
        return rc;
    }
    CHECK_INT(rc, tsrv_task_id());
    server_options.on_start = on_start;
    server = new_server();
    CHECK_INT(tsrv_server_add_sockets(server, fds, count), TSRV_OK);
    rc = tsrv_loop_run(NULL);
    tsrv_server_free(server);
    return rc;
}

/* Workers without a loop. */
static inline int program_bare(void)
{
    int rc = tsrv_fork_processes(workers, &fork_options);
    if (rc < 0) {
        return rc;
    }
    CHECK_INT(rc, tsrv_task_id());
    note_worker();
    return bare_worker();
}

/* All in one call. */
static inline int program_serve(void)
{
    tsrv_loop_options options = {0};
    options.backend = t_backend;
    if (workers == 1) {
        CHECK_INT(tsrv_loop_new(&tsrvi_thread.own, &options), TSRV_OK);
    }
    server_options.mode = t_mode;
    server_options.handle_stream = serve_lines;
    if (server_options.on_start == NULL) {
        server_options.on_start = on_start;
    }
    server_options.fork = &fork_options;
    return tsrv_serve(board->port, bound_address(), workers, &server_options);
}

static inline void run_program(int (*program)(void))
{
    if (before_program != NULL) {
        before_program();
    }
    int fds = t_open_fds(), rc;
    long long allocations = (long long)t_live_allocations;
    in_program = true;
    in_parent = true;
    t_seen = look_at_call;
    rc = program();
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
    CHECK_INT(t_live_allocations, allocations);
    if (tsrv_task_id() < 0) {
        CHECK_INT(t_open_fds(), fds + (tsrvi_process.log.kept != 0)); /* who has become another user */
        board->result = rc;
        __atomic_add_fetch(&board->results, 1, __ATOMIC_ACQ_REL);
        if (__atomic_load_n(&board->next.count, __ATOMIC_ACQUIRE) == 0) { /* it is not upgraded */
            CHECK_INT(waitpid(-1, NULL, WNOHANG), -1);                    /* and has no child */
            CHECK_INT(errno, ECHILD);
        }
    }
    exit(rc == TSRV_OK || rc == TSRV_EPARENT ? 0 : 1);
}

/* ---- the runner ---------------------------------------------------------------------------*/

/* file: where programs that are started by an upgrade find it; -1 = there are none. */
static inline void map_board(int file)
{
    board = (struct board *)mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE,
                                 MAP_SHARED | (file < 0 ? MAP_ANONYMOUS : 0), file, 0);
    CHECK(board != MAP_FAILED);
    clock_ahead_ns = &board->ahead_ns;
}

static inline void open_board(void)
{
    if (board == NULL) {
        map_board(-1);
    }
    fork_options.on_exit = note_exit;
    fork_options.context = &fork_options;
#ifdef __linux__ /* elsewhere orphans are init's, and not seen here */
    CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0);
#endif
}

/* For the next program of this test. */
static inline void clear_board(void)
{
    memset(board, 0, sizeof *board);
}

static inline pid_t launch(int (*program)(void))
{
    pid_t pid;
    open_board();
    fflush(NULL);
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        run_program(program);
    }
    return pid;
}

static inline int exits_seen(void)
{
    return __atomic_load_n(&board->exits, __ATOMIC_ACQUIRE);
}

static inline int forks_seen(void)
{
    return __atomic_load_n(&board->forks, __ATOMIC_ACQUIRE);
}

static inline bool has_forks(void *count)
{
    return forks_seen() >= *(int *)count;
}

static inline void await_forks(int count)
{
    if (!t_wait_until(has_forks, &count)) {
        T_FAIL("only %d of %d workers began\n%s", forks_seen(), count, board->log);
    }
}

static inline bool has_exits(void *count)
{
    return exits_seen() >= *(int *)count;
}

static inline void await_exits(int count)
{
    if (!t_wait_until(has_exits, &count)) {
        T_FAIL("only %d of %d workers ended\n%s", exits_seen(), count, board->log);
    }
}

static inline bool has_value(void *value)
{
    return __atomic_load_n(&board->value, __ATOMIC_ACQUIRE) >= *(int *)value;
}

static inline int port(void)
{
    return __atomic_load_n(&board->port, __ATOMIC_ACQUIRE);
}

/* Waits for a child of ours and returns its wait status. */
static inline int await_end(pid_t pid)
{
    int status = 0;
    AWAIT(waitpid(pid, &status, WNOHANG) != 0);
    return status;
}

/* Every process that the program has left behind is ours now: there is none. */
static inline void check_no_child(void)
{
    pid_t pid = waitpid(-1, NULL, WNOHANG);
#ifdef WITH_LEAK_SANITIZER
    while (pid > 0) { /* LeakSanitizer looks from a process of its own, which ends last */
        pid = waitpid(-1, NULL, WNOHANG);
    }
#endif
    if (pid != -1 || errno != ECHILD) {
        T_FAIL("a process has been left behind (%ld)\n%s", (long)pid, board->log);
    }
}

/* The program's parent ends with this exit status and result, and nothing is left. */
static inline void check_end(pid_t pid, int exit_status, int result)
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

/* A worker does not see that its parent dies: no loop, or one that hangs. */
static inline int sleeps(void)
{
    for (;;) {
        poll(NULL, 0, 1000);
    }
    return TSRV_OK;
}

static inline bool no_child_left(void *unused)
{
    (void)unused;
    while (waitpid(-1, NULL, WNOHANG) > 0) {
    }
    return waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD;
}

#ifdef __linux__
/* Starts the program as process 1 of a namespace, and returns its pid here. What makes the namespace is
 * a process of its own, which could not fork any more once process 1 has ended. */
static inline pid_t launch_as_process_1(int (*program)(void))
{
    open_board();
    pid_t maker = fork(), pid;
    CHECK(maker >= 0);
    if (maker == 0) {
        if (unshare(CLONE_NEWPID | CLONE_NEWNS) != 0 ||
            mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0) {
            _exit(T_SKIPPED); /* also where the root is no mount point, as after chroot */
        }
        pid = fork();
        if (pid == 0) {
            CHECK_INT(getpid(), 1); /* LeakSanitizer looks itself up in /proc */
            CHECK(mount("proc", "/proc", "proc", 0, NULL) == 0);
            run_program(program);
        }
        board->pids[PIDS - 1] = pid;
        _exit(0);
    }
    int status = await_end(maker); /* and the program becomes ours */
    if (WEXITSTATUS(status) == T_SKIPPED) {
        SKIP("the right to make PID and mount namespaces (root, and no chroot)");
    }
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    return board->pids[PIDS - 1];
}
#else
static inline pid_t launch_as_process_1(int (*program)(void))
{
    (void)program;
    SKIP("PID namespaces (Linux)");
}
#endif

/* ---- clients ------------------------------------------------------------------------------*/

/* A connection to the program, or -errno. */
static inline int dial(void)
{
    int fd = socket(unix_path != NULL ? AF_UNIX : AF_INET, SOCK_STREAM, 0), rc;
    CHECK(fd >= 0);
    t_prepare(fd);
    if (unix_path != NULL) {
        struct sockaddr_un local = t_unix_address(unix_path);
        rc = connect(fd, (struct sockaddr *)&local, sizeof local);
    } else {
        struct sockaddr_in tcp = t_address(port());
        rc = connect(fd, (struct sockaddr *)&tcp, sizeof tcp);
    }
    if (rc != 0) {
        rc = -errno;
        t_close(fd);
        return rc;
    }
    return fd;
}

/* The same where one has to succeed. */
static inline int reach(void)
{
    int fd = dial();
    if (fd < 0) {
        T_FAIL("connect: %s", strerror(-fd));
    }
    return fd;
}

/* One line of any length up to size. False: the end, or a reset. */
static inline bool read_line(int fd, char *line, size_t size)
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
static inline void ask_id(int fd, int *id, long *pid, long *parent)
{
    char line[64];
    long unused = 0;
    t_sends(fd, "id\n");
    CHECK(read_line(fd, line, sizeof line));
    CHECK_INT(sscanf(line, "%d %ld %ld", id, pid, parent != NULL ? parent : &unused), 3);
}

/* A connection to the worker with that task id. */
static inline int connect_to(int wanted, long *pid)
{
    int64_t end = t_patience();
    for (;;) {
        int fd = reach(), id = -1;
        ask_id(fd, &id, pid, NULL);
        if (id == wanted) {
            return fd;
        }
        t_close(fd);
        CHECK(t_now_ms() < end);
    }
}

static inline void command(int worker, const char *text)
{
    long pid = 0;
    int fd = connect_to(worker, &pid);
    t_sends(fd, text);
    char byte;
    ssize_t n = recv(fd, &byte, 1, 0);
    CHECK(n == 0 || (n < 0 && errno == ECONNRESET)); /* it is dead */
    t_close(fd);
}

/* ---- programs that are told ----------------------------------------------------------------*/

enum { STEP_MS = 1000, NEVER_DUE_MS = 1000000, START_MS = 60000, GRACE_MS = 30000, KILL_MS = 5000 };

static inline int get(const int *where)
{
    return __atomic_load_n(where, __ATOMIC_ACQUIRE);
}

static inline void put(int *where, int value)
{
    __atomic_store_n(where, value, __ATOMIC_RELEASE);
}

/* Before a program of so many workers is launched. */
static inline void begin(int count)
{
    workers = count;
    open_board();
    clear_board();
    tsrv_set_log(keep_log, NULL);
}

static inline void tell(pid_t pid, int signo)
{
    CHECK(pid != 0 && pid != -1); /* which would be the test itself, and everybody */
    CHECK(kill(pid, signo) == 0);
}

/* Waits until the parent has seen everything that was there before the call, and sleeps again. */
static inline void poke(pid_t pid)
{
    int before = get(&board->turns);
    AWAIT((kill(pid, SIGCHLD), get(&board->turns) >= before + 2 || get(&board->results) > 0));
}

/* Sets the clock forward, by steps of what the parent at most means to sleep: a longer one is a time in
 * which it did not run. */
static inline void advance(pid_t pid, int64_t ms)
{
    for (; ms > 0; ms -= STEP_MS) {
        int64_t step = ms < STEP_MS ? ms : STEP_MS;
        __atomic_add_fetch(&board->ahead_ns, step * 1000000, __ATOMIC_ACQ_REL);
        poke(pid);
    }
}

/* Time passes, at least so long, until so many workers have ended. */
static inline void advance_until_exits(pid_t pid, int64_t ms, int count)
{
    advance(pid, ms);
    AWAIT(exits_seen() >= count || (advance(pid, STEP_MS), exits_seen() >= count));
}

/* An hour passes in which nobody runs. */
static inline void oversleep(void)
{
    __atomic_add_fetch(&board->ahead_ns, (int64_t)3600 * 1000000000, __ATOMIC_ACQ_REL);
}

/* Time passes until the program has ended: its wait status. */
static inline int advance_until_end(pid_t pid)
{
    int status = 0;
    AWAIT(waitpid(pid, &status, WNOHANG) == pid || (advance(pid, STEP_MS), false));
    return status;
}

/* The parent of the workers has nothing to do: it is asleep most of the time. A state that spins makes
 * thousands of calls meanwhile. */
static inline void check_rests(void)
{
    int before = get(&board->turns);
    poll(NULL, 0, 200);
    int turns = get(&board->turns) - before;
    if (turns > 40) {
        T_FAIL("%d turns of the parent in 200 ms\n%s", turns, board->log);
    }
}

static inline bool has_exited(pid_t pid)
{
    for (int i = 0, count = exits_seen(); i < count; i++) {
        if (board->exit[i].pid == pid) {
            return true;
        }
    }
    return false;
}

/* Do all workers that are there, and no more than that, come from the last version? */
static inline bool is_settled(void)
{
    int live = 0, version = get(&board->version);
    for (int i = 0, count = forks_seen(); i < count; i++) {
        pid_t pid = __atomic_load_n(&board->pids[i], __ATOMIC_ACQUIRE);
        if (!has_exited(pid)) {
            if (pid == 0 || board->versions[i] != version) {
                return false;
            }
            live++;
        }
    }
    return live == workers;
}

/* Does every worker have a process of this version, whatever else is there still? */
static inline bool has_version(int version)
{
    int seen = 0;
    for (int i = 0, count = forks_seen(); i < count; i++) {
        if (__atomic_load_n(&board->pids[i], __ATOMIC_ACQUIRE) != 0 &&
            board->versions[i] == version) {
            seen |= 1 << board->ids[i];
        }
    }
    return seen == (1 << workers) - 1;
}

/* A new version of what workers are made of, and a signal that asks for it. */
static inline void reload(pid_t pid)
{
    __atomic_add_fetch(&board->version, 1, __ATOMIC_ACQ_REL);
    tell(pid, SIGHUP);
}

/* What workers have been ended by, or have exited with: 0 each. */
static inline void check_exits_are_good(void)
{
    for (int i = 0; i < exits_seen(); i++) {
        CHECK_INT(board->exit[i].status, 0);
    }
}

/* The program stops, in good order. */
static inline void stop_well(pid_t pid, int result)
{
    tell(pid, SIGTERM);
    check_end(pid, 0, result);
}

static inline void check_served(void)
{
    int fd = reach();
    t_echo(fd, "hello\n");
    t_close(fd);
}

/* A connection that has sent half of a request to a process that has accepted it. */
static inline int start_request(void)
{
    int fd = reach(), id = 0;
    long pid = 0;
    ask_id(fd, &id, &pid, NULL);
    t_sends(fd, "unfin");
    return fd;
}

static inline void finish_request(int fd)
{
    t_sends(fd, "ished\n");
    t_expect(fd, "unfinished\n");
    t_close(fd);
}

/* Is a new connection refused? One that is not is served, or ended, but never left alone. */
static inline bool is_refused(void)
{
    char byte;
    int fd = dial();
    if (fd >= 0) {
        if (send(fd, "x\n", 2, T_NOSIGNAL) == 2 && recv(fd, &byte, 1, 0) < 0) {
            CHECK(errno == ECONNRESET || errno == EPIPE);
        }
        t_close(fd);
        return false;
    }
    if (fd == -ECONNRESET) {
        return false; /* at the very moment */
    }
    if (fd != -ENOENT || unix_path == NULL) {
        CHECK_INT(fd, -ECONNREFUSED);
    }
    return true;
}

/* A directory of this test, below build/ where there is one, and paths in it. */
static char directory[64];

static inline void make_directory(void)
{
    snprintf(directory, sizeof directory, "%s", t_make_directory());
    CHECK(chmod(directory, 0755) == 0);
}

static inline const char *path_of(const char *name)
{
    static char paths[4][100];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(paths[turn], sizeof paths[turn], "%s/%s", directory, name);
    return paths[turn];
}

static inline void remove_directory(void)
{
    static const char *const names[] = {"socket", "second", "board", "next"};
    for (int i = 0; i < 4; i++) {
        unlink(path_of(names[i]));
    }
    CHECK(rmdir(directory) == 0);
}

static inline void use_unix_socket(void)
{
    static char path[100];
    make_directory();
    snprintf(path, sizeof path, "%s", path_of("socket"));
    unix_path = path;
}

/* ---- load ---------------------------------------------------------------------------------*/

/* Clients that come and go while something happens to the workers; long ones read slowly. */
typedef struct load {
    pthread_t threads[3];
    bool stop;  /* atomic */
    int served; /* atomic */
} load;

/* One line, then the end. Whatever goes wrong fails the test. */
static inline void *short_clients(void *context)
{
    load *l = (load *)context;
    while (!__atomic_load_n(&l->stop, __ATOMIC_ACQUIRE)) {
        int fd = t_connect(port());
        t_echo(fd, "hello\n");
        t_close(fd);
        __atomic_add_fetch(&l->served, 1, __ATOMIC_ACQ_REL);
    }
    return NULL;
}

/* A large answer that is read from the beginning of the load to its end. */
static inline void *long_client(void *context)
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

static inline bool load_runs(void *context)
{
    return __atomic_load_n(&((load *)context)->served, __ATOMIC_ACQUIRE) > 50;
}

static inline void load_begin(load *l)
{
    memset(l, 0, sizeof *l);
    CHECK_INT(pthread_create(&l->threads[0], NULL, short_clients, l), 0);
    CHECK_INT(pthread_create(&l->threads[1], NULL, short_clients, l), 0);
    CHECK_INT(pthread_create(&l->threads[2], NULL, long_client, l), 0);
    CHECK(t_wait_until(load_runs, l));
}

static inline int load_end(load *l)
{
    __atomic_store_n(&l->stop, true, __ATOMIC_RELEASE);
    for (int i = 0; i < 3; i++) {
        CHECK_INT(pthread_join(l->threads[i], NULL), 0);
    }
    return l->served;
}

/* ---- programs that are started by an upgrade ----------------------------------------------*/

#define UPGRADE_VARIABLE "TEST_UPGRADE"

/* This very program. */
static inline char *own_path(void)
{
    static char path[4096];
    t_need_proc();
    ssize_t size = readlink("/proc/self/exe", path, sizeof path - 1);
    CHECK(size > 0);
    path[size] = 0;
    return path;
}

/* How often the log says this. */
static inline int said(const char *text)
{
    return t_count(board->log, text);
}

/* A worker that has nothing to do. */
static inline int returns_well(void)
{
    return TSRV_OK;
}

/* A program's own watch on SIGTERM, which counts in board->value and ends the loop. */
static tsrv_signal own_watch;

static inline void own_term(void *context)
{
    (void)context;
    __atomic_add_fetch(&board->value, 1, __ATOMIC_ACQ_REL);
    tsrv_loop_stop(NULL);
}

static inline void watch_term(tsrv_server *server, void *context)
{
    on_start(server, context);
    CHECK_INT(tsrv_signal_start(NULL, &own_watch, SIGTERM, own_term, NULL), TSRV_OK);
}

static inline int program_own_watch(void)
{
    tsrv_server *server = new_bound_server();
    int rc = tsrv_server_start(server, workers, &fork_options);
    if (rc == TSRV_OK) {
        rc = tsrv_loop_run(NULL);
        tsrv_signal_stop(&own_watch);
    }
    tsrv_server_free(server);
    return rc;
}

/* The header, as it stands in its file. */
static inline const char *header_text(void)
{
    static char text[1 << 20];
    char path[256];
    const char *slash = strrchr(__FILE__, '/');
    snprintf(path, sizeof path, "%.*stcpserver.h", slash == NULL ? 0 : (int)(slash - __FILE__ - 5),
             __FILE__);
    FILE *file = fopen(path, "r");
    CHECK(file != NULL);
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    CHECK(fclose(file) == 0);
    return text;
}

#endif /* WORKERS_H */
