/* The supervisor while system calls fail: each of them, once and for as long as the fault lasts, in the parent or in
 * its workers, while the program starts, is reloaded, is upgraded and is stopped. Whatever fails, nobody spins, a
 * request under way is finished, the log names the error, and when the fault is over all works again. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "seam.h"
#include <unistd.h>

/* Only what comes over life-lines fails: what connections receive is the business of other tests. */
#undef t_sys_recv
#define t_sys_recv(fd, data, size, flags) \
    ((size) == 1 && t_fault("recv") ? -1 : recv(fd, data, size, flags))

/* Some systems' setuid has said that it went well when it did nothing, or left the way back to root open; so does this
 * one, when it is to fail so. */
enum { LIES = 4000, LIES_IN_PART };
#undef t_sys_setuid
#define t_sys_setuid(uid) (t_fault("setuid") ? lie(uid) : setuid(uid))

static inline int lie(unsigned uid)
{
    if (errno == LIES_IN_PART) {
        return setresuid(uid, uid, 0);
    }
    return errno == LIES ? 0 : -1;
}

#include <grp.h>

static struct group *group_of_root; /* whom it has; NULL = whom the system says */
#undef t_sys_getgrgid
#define t_sys_getgrgid(gid) (t_fault("getgrgid") ? NULL : group_of_root != NULL ? group_of_root : getgrgid(gid))

/* Who is not found leaves errno as it is here, which POSIX lets a system do. */
#include <pwd.h>
#undef t_sys_getpwnam
#undef t_sys_getpwuid
#undef t_sys_getgrnam
#define t_sys_getpwnam(name) (t_fault("getpwnam") ? NULL : find_user(name))
#define t_sys_getpwuid(uid) (t_fault("getpwuid") ? NULL : find_user_of(uid))
#define t_sys_getgrnam(name) (t_fault("getgrnam") ? NULL : find_group(name))

static inline struct passwd *find_user(const char *name)
{
    int before = errno;
    struct passwd *user = getpwnam(name);
    errno = before;
    return user;
}

static inline struct passwd *find_user_of(uid_t uid)
{
    int before = errno;
    struct passwd *user = getpwuid(uid);
    errno = before;
    return user;
}

static inline struct group *find_group(const char *name)
{
    int before = errno;
    struct group *group = getgrnam(name);
    errno = before;
    return group;
}

#include "workers.h"

enum { PARENT = 1, WORKERS = 2, QUIET = 4, SERVES = 8, STOPS = 16, STARTS = 32, ALONE = 64 };
enum { WATCH_MS = 100, AT_ONCE = 12, EVER = 1 << 30 };

/* The calls of the sections, and with what they can fail. */
static const struct {
    const char *name;
    int where; /* who makes it; QUIET: nothing has to be said; then the scenarios in which it has to fail, see below;
                * ALONE: a test of its own */
    int codes[4];
} calls[] = {
    {"bind", PARENT | STARTS, {EADDRINUSE, EACCES, ENOMEM}},
    {"close", PARENT | WORKERS | QUIET | SERVES, {EINTR, EIO}},
    {"dup2", PARENT | WORKERS | SERVES | STOPS, {EBUSY, EINTR, EMFILE}},
    {"epoll_ctl", WORKERS | QUIET | SERVES, {ENOMEM, ENOSPC}},
    {"execvp", WORKERS | SERVES, {ENOENT, EACCES, ENOMEM, ETXTBSY}},
    {"fchmod", PARENT | QUIET | STARTS, {EINVAL}},
    {"fcntl", PARENT | WORKERS | SERVES, {EMFILE, EINVAL}},
    {"fflush", PARENT | QUIET | SERVES | STARTS, {EPIPE, ENOSPC}},
    {"flock", PARENT | STARTS, {ENOLCK, EINTR}},
    {"fork", PARENT | SERVES | STARTS, {EAGAIN, ENOMEM}},
    {"fstat", PARENT | QUIET | STOPS, {ENOMEM}},
    {"getgrgid", WORKERS | ALONE, {EMFILE}},
    {"getgrnam", PARENT | STARTS, {EMFILE}},
    {"getgroups", WORKERS | ALONE, {EINVAL}},
    {"getpwnam", PARENT | STARTS, {EMFILE}},
    {"getpwuid", PARENT | QUIET | STARTS, {EMFILE}},
    {"getsockname", PARENT | STOPS | STARTS, {ENOBUFS}},
    {"getsockopt", PARENT | QUIET | STOPS, {ENOMEM}},
    {"initgroups", WORKERS | SERVES | STARTS, {EPERM, ENOMEM}},
    {"kill", PARENT | ALONE, {EPERM}},
    {"listen", PARENT | STARTS, {EADDRINUSE}},
    {"lstat", PARENT | STOPS, {EACCES, ENOMEM}},
    {"malloc", PARENT | SERVES | STARTS, {ENOMEM}},
    {"mmap", PARENT | STARTS, {ENOMEM}},
    {"munmap", PARENT | QUIET | ALONE, {ENOMEM}},
    {"nanosleep", PARENT | QUIET | ALONE, {EINTR}},
    {"open", PARENT | QUIET | STARTS, {EMFILE, ENOENT}},
    {"pipe", PARENT | SERVES | STARTS, {EMFILE, ENFILE}},
    {"poll", PARENT | QUIET | SERVES, {EINTR, ENOMEM}},
    {"prctl", WORKERS | QUIET | SERVES, {EINVAL}},
    {"read", PARENT | QUIET | SERVES, {EINTR, EIO}},
    {"recv", WORKERS | QUIET | SERVES | STOPS, {EINTR, ENOMEM}},
    {"send", PARENT | QUIET | SERVES | STOPS, {EAGAIN, EPIPE, ENOBUFS}},
    {"sendto", PARENT | SERVES, {EAGAIN, ECONNREFUSED, ENOENT}},
    {"setenv", WORKERS | SERVES, {ENOMEM}},
    {"seteuid", WORKERS | QUIET | SERVES, {EPERM}},
    {"setgid", WORKERS | SERVES, {EPERM}},
    {"setgroups", WORKERS | SERVES, {EPERM, ENOMEM}},
    {"setsockopt", PARENT | STARTS, {ENOBUFS}},
    {"setuid", WORKERS | SERVES | STARTS, {EPERM, EAGAIN}},
    {"sigaction", PARENT | QUIET | STARTS, {EINVAL}},
    {"socket", PARENT | QUIET | SERVES, {EMFILE, ENOBUFS}},
    {"socketpair", PARENT | SERVES | STARTS, {EMFILE, ENOMEM}},
    {"unlink", PARENT | STOPS, {EACCES}},
    {"waitid", PARENT | QUIET | ALONE, {EINTR}},
    {"waitpid", PARENT | SERVES, {EINTR}},
    {"write", PARENT | WORKERS | QUIET | SERVES, {EAGAIN, EPIPE}},
};

enum { CALLS = sizeof calls / sizeof calls[0] };

/* Calls that cannot fail with these arguments, and one that does not come back. */
static const char *const safe[] = {"_exit",       "getegid", "getenv",    "geteuid",     "getgid",
                                   "getpid",      "getppid", "getuid",    "sigaddset",   "sigemptyset",
                                   "sigfillset",  "sigismember", "sigprocmask", "unsetenv"};

enum { SAFE = sizeof safe / sizeof safe[0] };

/* One fault of one program. */
typedef struct fault_case {
    int call, code; /* see calls */
    bool in_workers, once;
    int variant; /* 0 = a port with a listener for each worker, and a user; 1 = a unix socket, and a group */
} fault_case;

/* Which calls have failed, in all processes of a test. */
static int *reached; /* atomic, each */

static int notes = -1; /* where the service manager listens */

/* ---- one program --------------------------------------------------------------------------*/

static void take_notes(void)
{
    char note[2000];
    while (recv(notes, note, sizeof note, MSG_DONTWAIT) > 0) {
    }
}

static void listen_for_notes(void)
{
    struct sockaddr_un address = t_unix_address(path_of("board"));
    notes = socket(AF_UNIX, SOCK_DGRAM, 0);
    CHECK(notes >= 0 && fcntl(notes, F_SETFD, FD_CLOEXEC) == 0);
    CHECK(bind(notes, (struct sockaddr *)&address, sizeof address) == 0);
    CHECK(setenv("NOTIFY_SOCKET", address.sun_path, 1) == 0);
}

/* Before a program is launched whose calls will fail. */
static void begin_case(const fault_case *c)
{
    static char *ends_at_once[] = {(char *)"false", NULL};
    static char path[100];
    make_directory();
    listen_for_notes();
    begin(2);
    memset(&bind_options, 0, sizeof bind_options);
    bind_options.reuse_port = c->variant == 0;
    snprintf(path, sizeof path, "%s", path_of("socket"));
    unix_path = c->variant == 0 ? NULL : path;
    server_options.bind = &bind_options;
    fork_options.grace_ms = 1000000; /* so that no clock that is set forward ends it */
    fork_options.upgrade_argv = ends_at_once;
    if (getuid() == 0) {
        const char *user = strcmp(calls[c->call].name, "getpwuid") == 0 ? "65534" : "nobody";
        fork_options.user = c->variant == 0 ? user : NULL;
        fork_options.group = c->variant == 0 ? NULL : "nogroup";
    }
}

static void end_case(const fault_case *c)
{
    __atomic_add_fetch(&reached[c->call], get(&board->failed), __ATOMIC_ACQ_REL);
    CHECK(close(notes) == 0);
    remove_directory();
}

static void fail_case(const fault_case *c, int skip)
{
    fail_after(skip, calls[c->call].name, calls[c->call].codes[c->code], c->once ? 1 : EVER,
               c->in_workers ? IN_CHILDREN : IN_PARENT);
}

/* For a while, in which the fault does what it does: the parent turns no more often than its brake lets it, its workers
 * are no busier than a few restarts make them, and nobody fills the log. */
static void watch(void)
{
    int turns = get(&board->turns), made = get(&board->calls);
    size_t logged = __atomic_load_n(&board->logged, __ATOMIC_ACQUIRE);
    int64_t begun = t_now_ms();
    poll(NULL, 0, WATCH_MS);
    int elapsed = (int)(t_now_ms() - begun);
    turns = get(&board->turns) - turns;
    made = get(&board->calls) - made;
    logged = __atomic_load_n(&board->logged, __ATOMIC_ACQUIRE) - logged;
    if (turns > 2 * TSRVI_ROUNDS + elapsed / 10 || made > 5000 + 10 * elapsed || logged > 4000) {
        T_FAIL("%d turns of the parent, %d calls of workers, %d bytes of log in %d ms\n%s", turns,
               made, (int)logged, elapsed, board->log);
    }
    take_notes();
}

/* The log names the error of a call that has failed, as soon as who has made it comes to that. */
static void check_said(const fault_case *c)
{
    const char *error = tsrv_strerror(-calls[c->call].codes[c->code]);
    AWAIT(get(&board->failed) == 0 || (calls[c->call].where & QUIET) != 0 || strstr(board->log, error) != NULL);
}

/* The fault is over: a reload makes all workers new, and clients are served. */
static void check_works(pid_t pid)
{
    end_fault();
    reload(pid);
    int version = get(&board->version);
    AWAIT(has_version(version));
    take_notes();
    check_served();
}

/* ---- faults of a program that serves -------------------------------------------------------*/

/* A worker dies, a reload and an upgrade are asked for, while a request is under way. */
static void fail_while_serving(const fault_case *c)
{
    begin_case(c);
    pid_t pid = launch(program_serve);
    await_forks(2);
    long busy = 0;
    int fd = connect_to(0, &busy);
    t_sends(fd, "unfin");
    fail_case(c, 0);
    tell(board->pids[board->pids[0] == busy], SIGKILL);
    poke(pid);
    watch();
    reload(pid);
    poke(pid);
    watch();
    tell(pid, SIGUSR2);
    poke(pid);
    watch();
    check_said(c);
    check_works(pid);
    finish_request(fd);
    stop_well(pid, TSRV_OK);
    end_case(c);
}

/* A stop is asked for, while a request is under way. */
static void fail_while_stopping(const fault_case *c)
{
    begin_case(c);
    pid_t pid = launch(program_serve);
    await_forks(2);
    int fd = start_request();
    fail_case(c, 0);
    tell(pid, SIGTERM);
    poke(pid);
    watch();
    check_said(c);
    end_fault();
    finish_request(fd);
    check_end(pid, 0, TSRV_OK);
    end_case(c);
}

/* ---- faults of a program that starts -------------------------------------------------------*/

static bool has_begun(void)
{
    return forks_seen() >= 2 || get(&board->results) > 0;
}

/* On a busy machine it can take a while until a program comes to the call that fails. */
static bool has_met_it(void)
{
    return get(&board->failed) > 0 || has_begun();
}

/* It ends in good order; or it has ended, and said why. */
static void check_ended(pid_t pid)
{
    if (get(&board->results) == 0) {
        stop_well(pid, TSRV_OK);
    } else {
        CHECK(board->result < 0);
        CHECK(warnings() > 0 || board->result == -ENOMEM); /* of a server that is not there yet */
        check_end(pid, 1, board->result);
    }
}

static void fail_start(const fault_case *c)
{
    int hits = 1;
    for (int skip = 0; hits > 0 && skip < (c->once ? 8 : 1); skip++) {
        begin_case(c);
        fail_case(c, skip);
        pid_t pid = launch(program_serve);
        if (!c->once) {
            AWAIT(has_met_it());
            watch();
            end_fault();
        }
        AWAIT(has_begun());
        hits = get(&board->failed);
        if (get(&board->results) == 0) {
            check_works(pid);
        }
        check_ended(pid);
        end_case(c);
    }
}

/* ---- faults of a single process ------------------------------------------------------------*/

/* Its loop is made by the library. */
static int program_alone(void)
{
    server_options.mode = t_mode;
    server_options.handle_stream = serve_lines;
    server_options.on_start = on_start;
    server_options.fork = &fork_options;
    return tsrv_serve(0, bound_address(), 1, &server_options);
}

static void fail_alone_at_start(const fault_case *c, int skip)
{
    begin_case(c);
    workers = 1;
    fail_case(c, skip);
    pid_t pid = launch(program_alone);
    if (!c->once) {
        AWAIT(has_met_it() || forks_seen() >= 1);
        watch();
        end_fault();
    }
    AWAIT(forks_seen() >= 1 || get(&board->results) > 0);
    end_fault(); /* what a connection needs is the business of other tests */
    if (get(&board->results) == 0) {
        check_served();
    }
    check_ended(pid);
    end_case(c);
}

static void fail_alone_at_stop(const fault_case *c)
{
    begin_case(c);
    workers = 1;
    pid_t pid = launch(program_alone);
    await_forks(1);
    int fd = start_request();
    fail_case(c, 0);
    tell(pid, SIGHUP);
    tell(pid, SIGTERM);
    watch();
    end_fault();
    finish_request(fd);
    check_end(pid, 0, TSRV_OK);
    end_case(c);
}

/* In a single process there are no workers: it does what they do. */
static void fail_alone(const fault_case *c)
{
    static const char *const others[] = {"sigaction", /* without a handler the signal ends it */
                                         "epoll_ctl", "getsockname"}; /* of streams, and of on_start */
    fault_case own = *c;
    own.in_workers = false;
    for (int i = 0; i < 3; i++) {
        if (strcmp(calls[c->call].name, others[i]) == 0 || c->variant == 1) {
            return;
        }
    }
    for (int skip = 0; skip < (c->once ? 3 : 1); skip++) {
        fail_alone_at_start(&own, skip);
    }
    fail_alone_at_stop(&own);
}

/* ---- all cases ----------------------------------------------------------------------------*/

static void (*scenario)(const fault_case *);
static char (*labels)[100]; /* of what each process does now */

static void run_case(int process, int number, const fault_case *c)
{
    if (number % AT_ONCE == process) {
        snprintf(labels[process], sizeof labels[process], "%s %s in %s, %s, variant %d",
                 calls[c->call].name, strerror(calls[c->call].codes[c->code]),
                 c->in_workers ? "workers" : "the parent", c->once ? "once" : "for ever", c->variant);
        scenario(c);
    }
}

/* Every AT_ONCE-th of all cases of a call. */
static int run_cases_of(int call, int process, int number, bool once)
{
    for (int code = 0; code < 4 && calls[call].codes[code] != 0; code++) {
        for (int i = 0; i < 4; i++) {
            fault_case c = {call, code, i % 2 != 0, once, i / 2};
            if ((calls[call].where & (c.in_workers ? WORKERS : PARENT)) != 0) {
                run_case(process, number++, &c);
            }
        }
    }
    return number;
}

static void run_cases(int process, bool once)
{
    int number = 0;
    for (int call = 0; call < CALLS; call++) {
        number = run_cases_of(call, process, number, once);
    }
}

/* Beside so many others a process may come to a call when its fault is over: then once more, alone. */
static void check_reached(int call, bool once)
{
    for (int process = 0; process < AT_ONCE && reached[call] == 0; process++) {
        run_cases_of(call, process, 0, once);
    }
    if (reached[call] == 0) {
        T_FAIL("%s has not been called", calls[call].name);
    }
}

/* Several at once: most of their time is spent waiting.
 *   kind  SERVES, STOPS or STARTS: calls of which one has to have failed */
static void check_cases(void (*what)(const fault_case *), int kind, bool once)
{
    int failed = 0;
    pid_t pids[AT_ONCE];
    scenario = what;
    reached = (int *)mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(reached != MAP_FAILED);
    labels = (char(*)[100])(void *)(reached + 1024);
    for (int i = 0; i < AT_ONCE; i++) {
        pids[i] = fork();
        CHECK(pids[i] >= 0);
        if (pids[i] == 0) {
            run_cases(i, once);
            _exit(0);
        }
    }
    for (int i = 0; i < AT_ONCE; i++) {
        int status = 0;
        CHECK(waitpid(pids[i], &status, 0) == pids[i]);
        if (status != 0) {
            fprintf(stderr, "^ one of these: %s\n", labels[i]);
            failed++;
        }
    }
    CHECK_INT(failed, 0);
    for (int call = 0; call < CALLS && getuid() == 0; call++) {
        if ((calls[call].where & kind) != 0) {
            check_reached(call, once);
        }
    }
    CHECK(munmap(reached, 8192) == 0);
}

TEST_ONCE(calls_that_fail_once_harm_nobody)
{
    check_cases(fail_while_serving, SERVES, true);
}

TEST_ONCE(calls_that_go_on_failing_harm_nobody)
{
    check_cases(fail_while_serving, SERVES, false);
}
LONG(calls_that_go_on_failing_harm_nobody);

TEST_ONCE(calls_that_fail_once_in_a_stop_harm_nobody)
{
    check_cases(fail_while_stopping, STOPS, true);
}

TEST_ONCE(calls_that_go_on_failing_in_a_stop_harm_nobody)
{
    check_cases(fail_while_stopping, STOPS, false);
}
LONG(calls_that_go_on_failing_in_a_stop_harm_nobody);

TEST_ONCE(calls_that_fail_once_in_a_start_are_explained)
{
    check_cases(fail_start, STARTS, true);
}
LONG(calls_that_fail_once_in_a_start_are_explained);

TEST_ONCE(calls_that_go_on_failing_in_a_start_are_explained)
{
    check_cases(fail_start, STARTS, false);
}
LONG(calls_that_go_on_failing_in_a_start_are_explained);

TEST_ONCE(calls_that_fail_once_in_a_single_process_harm_nobody)
{
    check_cases(fail_alone, 0, true);
}
LONG(calls_that_fail_once_in_a_single_process_harm_nobody);

TEST_ONCE(calls_that_go_on_failing_in_a_single_process_harm_nobody)
{
    check_cases(fail_alone, 0, false);
}
LONG(calls_that_go_on_failing_in_a_single_process_harm_nobody);

/* ---- calls that come only in cases of their own --------------------------------------------*/

/* SIGKILL is sent again until it can be. */
TEST_ONCE(a_kill_that_fails_is_tried_again)
{
    begin(2);
    fork_options.grace_ms = 1000;
    pid_t pid = launch(program_serve);
    await_forks(2);
    int fd = reach();
    t_sends(fd, "hang\n");
    fail("kill", EPERM, EVER, IN_PARENT);
    tell(pid, SIGTERM);
    advance(pid, 1000 + 2 * KILL_MS);
    AWAIT(get(&board->failed) >= 1);
    check_rests();
    CHECK(strstr(board->log, tsrv_strerror(-EPERM)) != NULL);
    end_fault();
    AWAIT(get(&board->results) > 0 || (advance(pid, STEP_MS), false));
    check_end(pid, 1, TSRV_ETIMEOUT);
    t_close(fd);
}

/* Each brake of the parent is interrupted: it makes no more rounds than it is woken for. */
TEST_ONCE(a_brake_that_fails_does_not_make_the_parent_spin)
{
    begin(2);
    pid_t pid = launch(program_serve);
    await_forks(2);
    fail("nanosleep", EINTR, EVER, IN_PARENT);
    AWAIT((poke(pid), get(&board->failed) >= 10));
    poll(NULL, 0, 10);
    check_rests();
    check_works(pid);
    stop_well(pid, TSRV_OK);
}

/* Orphans of process 1 wait until they can be buried. */
TEST_ONCE(orphans_that_cannot_be_looked_for_make_process_1_not_spin)
{
    begin(2);
    pid_t pid = launch_as_process_1(program_serve);
    await_forks(2);
    fail("waitid", EINTR, EVER, IN_PARENT);
    command(0, "signal 9\n");
    AWAIT(forks_seen() == 3 && get(&board->failed) > 0);
    check_rests();
    check_works(pid);
    stop_well(pid, TSRV_OK);
}

/* A worker of process 1 whose status cannot be taken is not buried as an orphan, which would lose its end. */
TEST_ONCE(a_worker_that_cannot_be_waited_for_is_no_orphan)
{
    begin(2);
    pid_t pid = launch_as_process_1(program_serve);
    await_forks(2);
    poke(pid);
    fail("waitpid", EINTR, EVER, IN_PARENT);
    command(0, "exit 7\n");
    AWAIT(get(&board->failed) > 4);
    watch(); /* it looks again and again, no more often than its brake lets it */
    CHECK_INT(exits_seen(), 0);
    end_fault();
    await_forks(3);
    CHECK_INT(WEXITSTATUS(board->exit[0].status), 7);
    stop_well(pid, TSRV_OK);
}

/* Workers are forked twice; the counters of the first time stay where they are. */
static int program_twice(void)
{
    int rc = program_bare();
    return rc == TSRV_EPARENT && tsrv_task_id() < 0 ? program_bare() : rc;
}

TEST_ONCE(counters_that_cannot_be_unmapped_harm_nobody)
{
    begin(2);
    bare_worker = returns_well;
    fail("munmap", ENOMEM, EVER, IN_PARENT);
    check_end(launch(program_twice), 0, TSRV_EPARENT);
    CHECK_INT(exits_seen(), 4);
    CHECK(get(&board->failed) > 0);
}

/* Each variable that a new program needs. */
TEST_ONCE(variables_that_cannot_be_set_end_an_upgrade)
{
    static char *ends_at_once[] = {(char *)"false", NULL};
    CHECK(setenv("WATCHDOG_PID", "1", 1) == 0);
    CHECK(setenv("LISTEN_FDNAMES", "web", 1) == 0);
    begin(2);
    fork_options.upgrade_argv = ends_at_once;
    pid_t pid = launch(program_serve);
    await_forks(2);
    for (int passing = 0; passing < 6; passing++) {
        int before = warnings();
        fail_after(passing, "setenv", ENOMEM, 1, IN_CHILDREN);
        tell(pid, SIGUSR2);
        AWAIT(warnings() >= before + 3); /* why, its end, and that the upgrade is given up */
        CHECK_INT(get(&board->failed), 1);
    }
    check_works(pid);
    stop_well(pid, TSRV_OK);
}

/* Who is not known is not, whatever has failed before. */
TEST_ONCE(an_error_from_before_a_lookup_is_not_its_own)
{
    tsrvi_identity identity;
    begin(1);
    errno = EIO;
    CHECK_INT(tsrvi_identity_find("no.such.user", NULL, &identity), TSRV_EINVAL);
    errno = EIO;
    CHECK_INT(tsrvi_identity_find(NULL, "no.such.group", &identity), TSRV_EINVAL);
    t_fail_call("getpwnam", EIO, 1, false); /* it is found, or not, by its number */
    CHECK_INT(tsrvi_identity_find("2000000001", NULL, &identity), TSRV_EINVAL);
    CHECK_INT(t_fault_hits, 1);
    CHECK_INT(said("is not known"), 3);
}

static void be_nobody_of_two_groups(void)
{
    const gid_t two[] = {54322, 0};
    const struct passwd *nobody = getpwnam("nobody");
    CHECK(nobody != NULL && setgroups(2, two) == 0 && setgid(nobody->pw_gid) == 0 && setuid(nobody->pw_uid) == 0);
}

/* Whose groups cannot be looked at, or compared with root's, has too many. */
TEST_ONCE(groups_that_cannot_be_looked_at_start_no_worker)
{
    static const struct {
        const char *name;
        int passing, code, result;
    } faults[] = {{"getgroups", 0, EINVAL, -EINVAL},
                  {"getgroups", 1, EINVAL, -EINVAL},
                  {"malloc", 0, ENOMEM, -ENOMEM},
                  {"getgrgid", 0, EMFILE, -EPERM}};
    if (getuid() != 0) {
        SKIP("root");
    }
    for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++) {
        begin(2);
        before_program = be_nobody_of_two_groups;
        fork_options.user = "nobody";
        fail_after(faults[i].passing, faults[i].name, faults[i].code, EVER, IN_CHILDREN); /* whichever is first */
        check_end(launch(program_serve), 1, faults[i].result);
        CHECK(get(&board->failed) >= 1);
        CHECK_INT(forks_seen(), 0);
        CHECK(strstr(board->log, "cannot become user") != NULL);
    }
    before_program = NULL;
}

static void be_nobody_in_the_group_of_root(void)
{
    const gid_t two[] = {54322, 0};
    CHECK(setgroups(2, two) == 0 && setgid(0) == 0 && setuid(getpwnam("nobody")->pw_uid) == 0);
}

/* Who is to have root's group, or is one of those whom it has, keeps it; others do not. */
TEST_ONCE(a_user_that_is_of_the_group_of_root_keeps_it)
{
    static char daemon[] = "daemon", nobody[] = "nobody";
    static char *members[][3] = {{daemon, nobody, NULL}, {daemon, NULL, NULL}};
    struct group root = {(char *)"root", (char *)"x", 0, members[0]};
    if (getuid() != 0) {
        SKIP("root");
    }
    for (int i = 0; i < 2; i++) {
        begin(2);
        group_of_root = i == 0 ? NULL : &root;
        before_program = i == 0 ? be_nobody_in_the_group_of_root : be_nobody_of_two_groups;
        fork_options.user = "nobody";
        fork_options.group = i == 0 ? "root" : NULL;
        pid_t pid = launch(program_serve);
        await_forks(2);
        check_works(pid);
        stop_well(pid, TSRV_OK);
    }
    begin(2);
    root.gr_mem = members[1];
    check_end(launch(program_serve), 1, -EPERM);
    CHECK_INT(forks_seen(), 0);
    CHECK(strstr(board->log, "cannot become user") != NULL);
    group_of_root = NULL;
    before_program = NULL;
}

/* It says that the user was changed, and it was not, or not for good. */
TEST_ONCE(a_change_of_the_user_is_looked_at)
{
    static const int lies[] = {LIES, LIES_IN_PART};
    if (getuid() != 0) {
        SKIP("root");
    }
    for (int i = 0; i < 2; i++) {
        begin(2);
        fork_options.user = "nobody";
        fail("setuid", lies[i], EVER, IN_CHILDREN);
        check_end(launch(program_serve), 1, -EPERM);
        CHECK_INT(forks_seen(), 0);
        CHECK(strstr(board->log, "cannot become user") != NULL);
    }
}

/* What has failed is the result, and not merely that it is somebody else. */
TEST_ONCE(a_change_of_the_user_that_fails_says_why)
{
    static const char *const names[] = {"initgroups", "setgid", "setuid"};
    if (getuid() != 0) {
        SKIP("root");
    }
    for (int i = 0; i < 3; i++) {
        begin(2);
        fork_options.user = "nobody";
        fail(names[i], ENOMEM, EVER, IN_CHILDREN);
        check_end(launch(program_serve), 1, -ENOMEM);
        CHECK_INT(forks_seen(), 0);
        CHECK(strstr(board->log, tsrv_strerror(-ENOMEM)) != NULL);
    }
}

/* READY=1 that the service manager has no room for comes later: it would end the service without. */
TEST_ONCE(readiness_is_told_again_until_it_is_heard)
{
    static const fault_case c = {0, 0, false, false, 1};
    static const int codes[] = {EAGAIN, ENOBUFS};
    char note[200];
    for (int i = 0; i < 2; i++) {
        begin_case(&c);
        fail("sendto", codes[i], 2, IN_PARENT);
        pid_t pid = launch(program_serve);
        ssize_t size = -1;
        AWAIT((size = recv(notes, note, sizeof note, MSG_DONTWAIT)) >= 0);
        CHECK_MEM(note, (size_t)size, "READY=1", 7);
        CHECK_INT(get(&board->failed), 2);
        stop_well(pid, TSRV_OK);
        CHECK(close(notes) == 0);
        remove_directory();
    }
}

/* The service manager is not there yet: its socket is missing, or nobody listens on it. */
static void tell_later(bool is_missing, int count)
{
    static const fault_case c = {0, 0, false, false, 1};
    char note[200];
    ssize_t size = -1;
    begin_case(&c);
    CHECK(close(notes) == 0);
    if (is_missing) {
        CHECK(unlink(path_of("board")) == 0);
    }
    workers = count;
    int64_t begun = t_now_ms();
    pid_t pid = launch(count == 1 ? program_alone : program_serve);
    await_forks(count);
    for (int i = 0; i < 40 && count > 1; i++) {
        poke(pid); /* who is told nothing is told it again whenever the parent is awake */
    }
    AWAIT(said("cannot be told READY=1") > 0);
    int seconds = 2 + (int)((t_now_ms() - begun) / 1000);
    CHECK(said("cannot be told READY=1") <= seconds * (int)TSRVI_LOG_RATE);
    CHECK(said(tsrv_strerror(is_missing ? -ENOENT : -ECONNREFUSED)) > 0);
    unlink(path_of("board"));
    listen_for_notes();
    AWAIT((size = recv(notes, note, sizeof note, MSG_DONTWAIT)) >= 0);
    CHECK_MEM(note, (size_t)size, "READY=1", 7);
    stop_well(pid, TSRV_OK);
    CHECK(close(notes) == 0);
    remove_directory();
}

TEST_ONCE(readiness_is_told_to_a_service_manager_that_comes_later)
{
    for (int i = 0; i < 4; i++) {
        tell_later(i / 2 == 0, 1 + i % 2);
    }
}

static void outlive_the_parent(void)
{
    pid_t parent = getppid();
    if (in_program && !in_parent && get(&board->go) == 0) {
        kill(parent, SIGKILL);
        while (getppid() == parent) {
            poll(NULL, 0, 1);
        }
    }
}

/* The parent dies just when it has forked: the worker, which nobody would tell, ends at once. */
TEST_ONCE(a_worker_whose_parent_dies_at_its_birth_ends)
{
    begin(2);
    CHECK(pthread_atfork(NULL, NULL, outlive_the_parent) == 0);
    put(&board->go, 1);
    pid_t pid = launch(program_serve);
    await_forks(2);
    put(&board->go, 0);
    tell(board->pids[0], SIGKILL);
    int status = await_end(pid); /* some systems' macros want a variable */
    CHECK(WIFSIGNALED(status));
    AWAIT(no_child_left(NULL));
    CHECK_INT(forks_seen(), 2);
}

/* A worker that cannot read its life-line learns from a beat that the parent is dead. */
TEST_ONCE(a_worker_whose_life_line_fails_ends_with_the_parent)
{
    begin(2);
    fork_options.heartbeat_ms = 80;
    fork_options.grace_ms = 1000000;
    pid_t pid = launch(program_serve);
    await_forks(2);
    int fd = start_request();
    fail("recv", EIO, EVER, IN_CHILDREN);
    tell(pid, SIGKILL);
    AWAIT(said("the parent is dead") > 0);
    AWAIT(no_child_left(NULL));
    t_close(fd);
}

/* One that could not read it once takes nobody for dead: it reads what it was told at its next beat, and drains. */
TEST_ONCE(a_worker_whose_life_line_fails_once_hears_the_parent)
{
    begin(2);
    fork_options.heartbeat_ms = 80;
    pid_t pid = launch(program_serve);
    await_forks(2);
    int fd = start_request();
    fail("recv", EIO, 2, IN_CHILDREN);
    tell(pid, SIGTERM);
    AWAIT(get(&board->failed) == 2);
    finish_request(fd);
    check_end(pid, 0, TSRV_OK);
    CHECK_INT(said("the parent is dead"), 0);
    check_exits_are_good();
}

static void wrap_beat(tsrv_server *server, void *context)
{
    on_start(server, context);
    tsrvi_process.place_own->beat = UINT_MAX;
}

/* After billions of beats they begin anew, not with none. */
TEST_ONCE(beats_that_wrap_around_hang_nobody)
{
    begin(2);
    fork_options.heartbeat_ms = 80;
    server_options.on_start = wrap_beat;
    pid_t pid = launch(program_serve);
    await_forks(2);
    poll(NULL, 0, 200);
    check_served();
    stop_well(pid, TSRV_OK);
}

/* ---- the table ----------------------------------------------------------------------------*/

static bool is_known(const char *name)
{
    for (int i = 0; i < SAFE; i++) {
        if (strcmp(safe[i], name) == 0) {
            return true;
        }
    }
    for (int i = 0; i < CALLS; i++) {
        if (strcmp(calls[i].name, name) == 0) {
            return true;
        }
    }
    return false;
}

/* Every system call of the sections about processes stands in the table above. */
TEST_ONCE(every_call_of_the_supervisor_fails_in_a_test)
{
    const char *at = strstr(header_text(), "\n * >>notify "), *end = strstr(at, "\n * >>history ");
    char name[32];
    int count = 0;
    CHECK(at != NULL && end != NULL);
    while ((at = strstr(at, "TSRV_SYS(")) != NULL && at < end) {
        at += strlen("TSRV_SYS(");
        CHECK_INT(sscanf(at, "%31[a-z0-9_]", name), 1);
        if (!is_known(name)) {
            T_FAIL("%s is missing", name);
        }
        count++;
    }
    CHECK(count > 50);
}
