/* The supervisor and tsrv_serve, from outside: what ends them, what they survive, reloads, upgrades. Each
 * test starts a program, changes how new workers behave by way of the board that all processes share,
 * and waits for what has to follow. Where a time of the library has to pass, the clock of all
 * processes is set forward. */
#include "workers.h"

#include <grp.h>
#include <pwd.h>
#include <sys/resource.h>
#include <sys/stat.h>

/* What a process that begins does, by board->value: see behave_as. */
enum {
    IS_FINE,
    HANGS,      /* for ever */
    HANGS_DEAF, /* with every signal blocked */
    EXITS_0,
    EXITS_1,
    FAILS_LATER, /* when board->go is set */
    IS_SLOW      /* goes on when board->go is set */
};

/* In a process that begins. */
static void behave_as(int how)
{
    sigset_t all;
    if (how == IS_FINE) {
        return;
    }
    if (how == HANGS_DEAF) {
        sigfillset(&all);
        CHECK(sigprocmask(SIG_BLOCK, &all, NULL) == 0);
    }
    __atomic_add_fetch(&board->held, 1, __ATOMIC_ACQ_REL);
    if (how == EXITS_0 || how == EXITS_1) {
        _exit(how == EXITS_1);
    }
    while (how == HANGS || how == HANGS_DEAF || get(&board->go) == 0) {
        poll(NULL, 0, 1);
    }
    if (how == FAILS_LATER) {
        _exit(1);
    }
}

static void behave(void)
{
    behave_as(get(&board->value));
}

static void behave_in_start(tsrv_server *server, void *context)
{
    note_port(server);
    behave();
    on_start(server, context);
}

/* ---- signals that were ignored or blocked at the start -------------------------------------*/

static int spoiled;

static void ignore_spoiled(void)
{
    signal(spoiled, SIG_IGN);
}

static void block_spoiled(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, spoiled);
    CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
}

/* Serves, and finds its signals afterwards as they were. */
static int program_serve_and_look(void)
{
    struct sigaction before, after;
    sigset_t mask_before, mask_after;
    CHECK(sigaction(spoiled, NULL, &before) == 0);
    CHECK(sigprocmask(SIG_SETMASK, NULL, &mask_before) == 0);
    int rc = program_serve();
    if (tsrv_task_id() < 0) {
        CHECK(sigaction(spoiled, NULL, &after) == 0);
        CHECK(sigprocmask(SIG_SETMASK, NULL, &mask_after) == 0);
        CHECK(before.sa_handler == after.sa_handler);
        CHECK_INT(sigismember(&mask_after, spoiled), sigismember(&mask_before, spoiled));
    }
    return rc;
}

/* The signal drains what was started with it ignored or blocked. */
static void check_obeyed(void (*spoil)(void), int count)
{
    static const int signals[] = {SIGINT, SIGQUIT, SIGTERM};
    for (int i = 0; i < 3; i++) {
        begin(count);
        spoiled = signals[i];
        before_program = spoil;
        fork_options.grace_ms = 20000;
        pid_t pid = launch(program_serve_and_look);
        await_forks(count);
        int fd = start_request();
        tell(pid, spoiled);
        AWAIT(is_refused());
        finish_request(fd);
        check_end(pid, 0, TSRV_OK);
        check_exits_are_good();
    }
}

TEST_LOOP(signals_ignored_at_the_start_end_one_process)
{
    check_obeyed(ignore_spoiled, 1);
}

TEST_LOOP(signals_ignored_at_the_start_end_workers)
{
    check_obeyed(ignore_spoiled, 2);
}

TEST_LOOP(signals_blocked_at_the_start_end_one_process)
{
    check_obeyed(block_spoiled, 1);
}

TEST_LOOP(signals_blocked_at_the_start_end_workers)
{
    check_obeyed(block_spoiled, 2);
}

/* nohup, and launchers that leave a mask: reloads, restarts and the parent's death do what they do. */
static void check_all_works(void (*spoil)(void), int signo)
{
    begin(2);
    spoiled = signo;
    before_program = spoil;
    pid_t pid = launch(program_serve);
    await_forks(2);
    reload(pid);
    AWAIT(is_settled());
    tell(board->pids[3], SIGKILL);
    AWAIT(is_settled() && forks_seen() == 5);
    stop_well(pid, TSRV_OK);

    begin(2);
    pid = launch(program_serve);
    await_forks(2);
    tell(pid, SIGKILL);
    AWAIT(no_child_left(NULL));
}

#ifdef __linux__
static void spoil_nothing(void)
{
}

static void hang_in_start(tsrv_server *server, void *context)
{
    on_start(server, context);
    for (;;) {
        pause();
    }
}

/* One that hangs cannot see that its parent is dead: the kernel tells it, with a signal that comes through. */
TEST_ONCE(hung_workers_end_with_their_parent_whatever_was_ignored_or_blocked)
{
    static const struct {
        void (*spoil)(void);
        int signo;
    } rows[] = {{spoil_nothing, 0}, {ignore_spoiled, SIGTERM}, {block_spoiled, SIGTERM}, {block_spoiled, SIGALRM}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        begin(2);
        spoiled = rows[i].signo;
        before_program = rows[i].spoil;
        server_options.on_start = hang_in_start;
        pid_t pid = launch(program_serve);
        await_forks(2);
        tell(pid, SIGKILL);
        AWAIT(no_child_left(NULL));
    }
    before_program = NULL;
}
static void hang(void *context)
{
    (void)context;
    __atomic_add_fetch(&board->held, 1, __ATOMIC_ACQ_REL);
    for (;;) {
        pause();
    }
}

static void block_in_start(tsrv_server *server, void *context)
{
    on_start(server, context);
    spoiled = SIGTERM;
    block_spoiled();
    CHECK_INT(tsrv_loop_post(NULL, hang, NULL), TSRV_OK);
}

/* Also if it is on_start that has blocked what would tell it. */
TEST_LOOP(hung_workers_end_with_their_parent_whatever_on_start_has_blocked)
{
    begin(2);
    server_options.on_start = block_in_start;
    pid_t pid = launch(program_serve);
    AWAIT(get(&board->held) == 2);
    tell(pid, SIGKILL);
    AWAIT(no_child_left(NULL));
}

static void fork_in_start(tsrv_server *server, void *context)
{
    int status = 0;
    on_start(server, context);
    in_program = false; /* it is no worker */
    pid_t child = fork();
    in_program = true;
    if (child == 0) {
        raise(SIGTERM);
        _exit(alarm(0) != 0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    put(&board->value, status == 0 ? 1 : -1);
}

/* A worker's child has another parent, which is no reason to end. */
TEST_ONCE(a_signal_does_not_end_what_a_worker_has_forked)
{
    begin(2);
    server_options.on_start = fork_in_start;
    pid_t pid = launch(program_serve);
    AWAIT(get(&board->value) != 0);
    CHECK_INT(get(&board->value), 1);
    await_forks(2);
    AWAIT(is_settled());
    stop_well(pid, TSRV_OK);
}
#endif

TEST_ONCE(a_hangup_that_was_ignored_at_the_start_reloads)
{
    check_all_works(ignore_spoiled, SIGHUP);
}

TEST_ONCE(a_hangup_that_was_blocked_at_the_start_reloads)
{
    check_all_works(block_spoiled, SIGHUP);
}

TEST_ONCE(ends_of_workers_are_seen_with_sigchld_ignored_at_the_start)
{
    check_all_works(ignore_spoiled, SIGCHLD);
}

TEST_ONCE(ends_of_workers_are_seen_with_sigchld_blocked_at_the_start)
{
    check_all_works(block_spoiled, SIGCHLD);
}

TEST_ONCE(workers_end_with_their_parent_with_sigterm_ignored_at_the_start)
{
    check_all_works(ignore_spoiled, SIGTERM);
}

TEST_ONCE(workers_end_with_their_parent_with_sigterm_blocked_at_the_start)
{
    check_all_works(block_spoiled, SIGTERM);
}

/* ---- a stop refuses new connections --------------------------------------------------------*/

/* From the first moment, while an old client is still being served. */
static void check_refusal(int (*program)(void), int count, int signo)
{
    begin(count);
    pid_t pid = launch(program);
    await_forks(count);
    int fd = start_request();
    tell(pid, signo);
    AWAIT(is_refused());
    for (int i = 0; i < 20; i++) {
        CHECK(is_refused());
    }
    if (count > 1) {
        check_rests();
    }
    CHECK_INT(board->results, 0);
    finish_request(fd);
    check_end(pid, 0, program == program_serve ? TSRV_OK : TSRV_EPARENT);
    check_exits_are_good();
}

TEST_LOOP(a_stop_of_one_process_refuses_new_connections)
{
    check_refusal(program_serve, 1, SIGTERM);
    check_refusal(program_serve, 1, SIGINT);
}

TEST_LOOP(a_stop_of_workers_refuses_new_connections)
{
    check_refusal(program_serve, 2, SIGTERM);
    check_refusal(program_serve, 3, SIGQUIT);
}

TEST_LOOP(a_stop_of_bind_and_start_refuses_new_connections)
{
    check_refusal(program_bind_start, 2, SIGTERM);
    check_refusal(program_bind_start, 2, SIGINT);
}

TEST_LOOP(a_stop_of_sockets_that_were_added_refuses_new_connections)
{
    check_refusal(program_add_sockets, 2, SIGTERM);
    check_refusal(program_add_sockets, 1, SIGTERM);
    hands_fds_over = true;
    check_refusal(program_add_sockets, 2, SIGTERM);
}

TEST_LOOP(a_stop_refuses_new_connections_with_reuse_port)
{
    bind_options.reuse_port = true;
    check_refusal(program_bind_start, 3, SIGTERM);
    server_options.bind = &bind_options;
    check_refusal(program_serve, 3, SIGTERM);
    check_refusal(program_serve, 1, SIGTERM);
}

TEST_LOOP(a_stop_refuses_new_connections_of_unix_sockets)
{
    use_unix_socket();
    check_refusal(program_serve, 1, SIGTERM);
    check_refusal(program_serve, 2, SIGTERM);
    check_refusal(program_bind_start, 2, SIGTERM);
    check_refusal(program_add_sockets, 2, SIGTERM);
    unix_path = NULL;
    remove_directory();
}

/* A listening socket that the library knows nothing of.
 *   path  of a unix socket; NULL = of a port, which is kept there */
static int listen_plainly(const char *path, int *port_number)
{
    int fd, port_there;
    if (path != NULL) {
        struct sockaddr_un local = t_unix_address(path);
        fd = socket(AF_UNIX, SOCK_STREAM, 0);
        CHECK(bind(fd, (struct sockaddr *)&local, sizeof local) == 0);
        CHECK(listen(fd, 10) == 0);
    } else {
        fd = t_raw_socket(SOCK_STREAM, true, &port_there);
        put(port_number, port_there);
    }
    return fd;
}

/* Sockets that the library has not bound, of which one is named twice, and what is no listening socket. */
static int program_own_sockets(void)
{
    int fds[4], pipe_fds[2];
    CHECK(pipe(pipe_fds) == 0);
    fds[0] = fds[2] = listen_plainly(NULL, &board->port);
    fds[1] = listen_plainly(NULL, &board->second_port);
    fds[3] = pipe_fds[0];
    fork_options.fds = fds;
    fork_options.fd_count = 4;
    int rc = tsrv_fork_processes(workers, &fork_options);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    if (rc < 0) {
        close(fds[0]);
        close(fds[1]);
        return rc;
    }
    tsrv_server *server = new_server();
    CHECK_INT(tsrv_server_add_sockets(server, fds, 2), TSRV_OK);
    note_worker();
    rc = tsrv_loop_run(NULL);
    tsrv_server_free(server);
    return rc;
}

/* The parent stops listening on what the options name, too. */
TEST_ONCE(a_stop_refuses_new_connections_of_sockets_that_are_named)
{
    begin(2);
    pid_t pid = launch(program_own_sockets);
    await_forks(2);
    int ports[2] = {get(&board->port), get(&board->second_port)}, fds[2];
    for (int i = 0; i < 2; i++) {
        put(&board->port, ports[i]);
        fds[i] = start_request();
    }
    tell(pid, SIGTERM);
    for (int i = 0; i < 2; i++) {
        put(&board->port, ports[i]);
        AWAIT(is_refused());
    }
    finish_request(fds[0]);
    finish_request(fds[1]);
    check_end(pid, 0, TSRV_EPARENT);
    check_exits_are_good();
}

static int fills[T_MAX_FD], fill_count;

/* When the first worker has ended, the parent has no descriptor left. */
static void fill_in_exit(int task_id, int pid, int status, void *context)
{
    struct rlimit limit;
    int fd;
    note_exit(task_id, pid, status, context);
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    limit.rlim_cur = 200;
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    while ((fd = open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0) {
        fills[fill_count++] = fd;
    }
    CHECK_INT(errno, EMFILE);
}

static int program_full(void)
{
    fork_options.on_exit = fill_in_exit;
    int rc = program_serve();
    while (fill_count > 0) {
        close(fills[--fill_count]);
    }
    return rc;
}

/* What the parent needs in order to refuse it has already. */
TEST_ONCE(a_stop_at_the_limit_of_descriptors_refuses_new_connections)
{
    long who = 0;
    begin(2);
    pid_t pid = launch(program_full);
    await_forks(2);
    int fd = connect_to(1, &who);
    t_sends(fd, "unfin");
    command(0, "exit 1\n");
    AWAIT(strstr(board->log, tsrv_strerror(-EMFILE)) != NULL);
    tell(pid, SIGTERM);
    AWAIT(is_refused());
    for (int i = 0; i < 20; i++) {
        CHECK(is_refused());
    }
    finish_request(fd);
    check_end(pid, 0, TSRV_OK);
}

/* A supervisor that gives up stops the siblings. */
TEST_LOOP(a_supervisor_that_gives_up_refuses_new_connections)
{
    begin(2);
    fork_options.max_restarts = 1;
    pid_t pid = launch(program_bind_start);
    await_forks(2);
    long who = 0;
    int fd = connect_to(1, &who);
    t_sends(fd, "unfin");
    command(0, "exit 1\n");
    await_forks(3);
    command(0, "exit 1\n");
    AWAIT(is_refused());
    CHECK(is_refused());
    finish_request(fd);
    check_end(pid, 1, TSRV_ERESTARTS);
}

/* ---- how many processes --------------------------------------------------------------------*/

/* There is a parent, so that a dead worker is made good, and a reload is possible. */
static void check_one_worker(int (*program)(void), int result)
{
    int id = -1;
    long who = 0, parent = 0;
    begin(0);
    before_program = t_use_one_processor;
    pid_t pid = launch(program);
    await_forks(1);
    int fd = reach();
    ask_id(fd, &id, &who, &parent);
    t_close(fd);
    CHECK_INT(id, 0);
    CHECK_INT(parent, pid);
    workers = 1; /* for is_settled */
    reload(pid);
    AWAIT(is_settled());
    tell(board->pids[1], SIGKILL);
    AWAIT(is_settled() && forks_seen() == 3);
    stop_well(pid, result);
}

TEST_ONCE(zero_processes_are_one_worker_on_one_processor)
{
    check_one_worker(program_serve, TSRV_OK);
    check_one_worker(program_bind_start, TSRV_EPARENT);
}

TEST_ONCE(zero_bare_processes_are_one_worker_on_one_processor)
{
    begin(0);
    before_program = t_use_one_processor;
    bare_worker = returns_well;
    pid_t pid = launch(program_bare);
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(forks_seen(), 1);
    CHECK_INT(board->ids[0], 0);
    CHECK(board->pids[0] != pid);
}

/* One process is this one. */
TEST_ONCE(one_process_is_not_forked)
{
    int id = 0;
    long who = 0, parent = 0;
    begin(1);
    pid_t pid = launch(program_serve);
    await_forks(1);
    int fd = reach();
    ask_id(fd, &id, &who, &parent);
    t_close(fd);
    CHECK_INT(id, -1);
    CHECK_INT(who, pid);
    stop_well(pid, TSRV_OK);
}

/* ---- workers that do not come up -----------------------------------------------------------*/

/* bind and start with workers that behave before their loop; serve in on_start. */
static int (*way)(void);

static int program_behaves(void)
{
    before_loop = behave;
    return program_bind_start();
}

static int program_behaves_in_start(void)
{
    server_options.on_start = behave_in_start;
    return program_serve();
}

static int result_of_way(void)
{
    return way == program_behaves ? TSRV_EPARENT : TSRV_OK;
}

typedef void (*scenario)(int how);

/* Before the loop and in it, told to end and deaf to it. */
static void for_each_way(scenario s)
{
    static const int kinds[] = {HANGS, HANGS_DEAF};
    for (int i = 0; i < 4; i++) {
        way = i < 2 ? program_behaves : program_behaves_in_start;
        fork_options.start_timeout_ms = i % 2 ? 10000 : 0;
        s(kinds[i % 2]);
    }
}

static int start_ms(void)
{
    return fork_options.start_timeout_ms == 0 ? START_MS : fork_options.start_timeout_ms;
}

/* In the first start both hang; they are ended, and made good. */
static void hang_first(int how)
{
    begin(2);
    put(&board->value, how);
    pid_t pid = launch(way);
    AWAIT(get(&board->held) == 2);
    advance(pid, start_ms() / 2);
    CHECK_INT(exits_seen(), 0);
    check_rests();
    put(&board->value, IS_FINE);
    advance_until_exits(pid, start_ms() / 2 + 1, 2);
    CHECK(warnings() >= 2);
    AWAIT(is_settled());
    CHECK_INT(board->ids[forks_seen() - 1] + board->ids[forks_seen() - 2], 1);
    check_served();
    stop_well(pid, result_of_way());
}

TEST_ONCE(workers_that_hang_at_the_first_start_are_replaced)
{
    for_each_way(hang_first);
}

/* All of them, again and again: that is given up like other bad ends. */
TEST_ONCE(workers_that_always_hang_are_given_up)
{
    begin(2);
    fork_options.max_restarts = 2;
    fork_options.start_timeout_ms = 1000;
    put(&board->value, HANGS_DEAF);
    pid_t pid = launch(program_behaves);
    AWAIT(get(&board->held) == 2);
    int status = advance_until_end(pid);
    CHECK(WIFEXITED(status));
    CHECK_INT(board->result, TSRV_ERESTARTS);
    check_no_child();
}

/* A worker that was replaced hangs; its sibling does not notice. */
static void hang_again(int how)
{
    long sibling = 0, now = 0;
    begin(2);
    pid_t pid = launch(way);
    await_forks(2);
    int fd = connect_to(1, &sibling);
    put(&board->value, how);
    command(0, "exit 3\n");
    AWAIT(get(&board->held) == 1);
    advance_until_exits(pid, start_ms() + 1, 2);
    put(&board->value, IS_FINE);
    AWAIT(is_settled());
    int id = -1;
    ask_id(fd, &id, &now, NULL);
    CHECK_INT(now, sibling);
    t_close(fd);
    t_close(connect_to(0, &now));
    stop_well(pid, result_of_way());
}

TEST_ONCE(a_worker_that_hangs_at_a_restart_is_replaced)
{
    for_each_way(hang_again);
}

/* A reload to workers that hang: the old ones stay, it is said, and the next reload works. */
static void hang_reload(int how)
{
    long who[2], now = 0;
    begin(2);
    pid_t pid = launch(way);
    await_forks(2);
    int fds[2] = {connect_to(0, &who[0]), connect_to(1, &who[1])};
    put(&board->value, how);
    tell(pid, SIGHUP);
    AWAIT(get(&board->held) > 0);
    check_rests();
    advance_until_exits(pid, start_ms() + 1, 1);
    AWAIT(warnings() > 0);
    for (int i = 0; i < 2; i++) {
        int id = -1;
        ask_id(fds[i], &id, &now, NULL);
        CHECK_INT(now, who[i]);
        t_close(fds[i]);
    }
    check_served();
    check_rests();
    for (int i = 0; i < exits_seen(); i++) {
        CHECK(board->exit[i].pid != who[0] && board->exit[i].pid != who[1]);
    }
    put(&board->value, IS_FINE);
    reload(pid);
    AWAIT(is_settled());
    stop_well(pid, result_of_way());
}

TEST_ONCE(a_reload_to_workers_that_hang_leaves_the_old_ones)
{
    for_each_way(hang_reload);
}

/* Workers without a server need not accept. */
TEST_ONCE(bare_workers_have_no_start_timeout_of_their_own)
{
    begin(2);
    bare_worker = sleeps;
    pid_t pid = launch(program_bare);
    await_forks(2);
    advance(pid, 2 * START_MS);
    CHECK_INT(exits_seen(), 0);
    check_rests();
    stop_well(pid, TSRV_EPARENT);
}

/* Who has no loop yet has nothing to drain, and ends by the signal: that was asked for, and is no failure. */
TEST_ONCE(workers_that_are_told_before_their_loop_end_by_the_signal)
{
    begin(2);
    put(&board->value, HANGS);
    pid_t pid = launch(program_behaves);
    AWAIT(get(&board->held) == 2);
    stop_well(pid, TSRV_EPARENT);
    CHECK_INT(exits_seen(), 2);
    for (int i = 0; i < 2; i++) {
        CHECK_INT(WTERMSIG(board->exit[i].status), SIGTERM);
    }
    CHECK_INT(warnings(), 0);
    CHECK_INT(board->stats.restarts, 0);
}

static void hold_start(tsrv_server *server, void *context)
{
    on_start(server, context);
    __atomic_add_fetch(&board->held, 1, __ATOMIC_ACQ_REL);
    AWAIT(get(&board->go) == 1);
}

/* Who accepts before it hears of the stop has something to drain, though it had nothing when it was told. */
TEST_LOOP(workers_that_are_told_before_they_accept_have_their_grace_if_they_do)
{
    begin(2);
    server_options.on_start = hold_start;
    pid_t pid = launch(program_serve);
    AWAIT(get(&board->held) == 2);
    int fd = reach();
    t_sends(fd, "unfin");
    tell(pid, SIGTERM);
    AWAIT(said("stopping: no new connections") == 1);
    poke(pid);
    put(&board->go, 1);
    AWAIT(said("drain: begins, 1 connections") == 1);
    await_exits(1); /* the other one has none; where it is slow, it would be killed now */
    advance(pid, 3000);
    finish_request(fd);
    check_end(pid, 0, TSRV_OK);
    check_exits_are_good();
}

static void hang_for_good(void *context)
{
    (void)context;
    __atomic_add_fetch(&board->held, 1, __ATOMIC_ACQ_REL);
    sleeps();
}

static void hold_start_and_hang(tsrv_server *server, void *context)
{
    hold_start(server, context);
    CHECK_INT(tsrv_loop_post(tsrv_loop_current(), hang_for_good, NULL), TSRV_OK);
}

/* Told twice they have no grace, if they do: only the time that who was told twice has to hear of it. */
TEST_LOOP(workers_that_are_told_twice_before_they_accept_have_no_grace_if_they_do)
{
    begin(2);
    server_options.on_start = hold_start_and_hang;
    fork_options.grace_ms = 10 * GRACE_MS;
    pid_t pid = launch(program_serve);
    AWAIT(get(&board->held) == 2);
    tell(pid, SIGTERM);
    AWAIT(said("stopping: no new connections") == 1);
    tell(pid, SIGTERM);
    AWAIT(said("stopping: told again") == 1);
    put(&board->go, 1);
    AWAIT(get(&board->held) == 4);
    advance(pid, KILL_MS);
    CHECK_INT(exits_seen(), 0);
    advance(pid, 2 * STEP_MS);
    await_exits(2);
    CHECK_INT(said("does not end and is killed"), 2);
    check_end(pid, 1, TSRV_ETIMEOUT);
}

/* But one that is given holds for them: who does not accept in time is ended, and made good. */
TEST_ONCE(bare_workers_have_the_start_timeout_that_is_given)
{
    begin(2);
    bare_worker = sleeps;
    fork_options.start_timeout_ms = 5000;
    pid_t pid = launch(program_bare);
    await_forks(2);
    advance(pid, 4000);
    CHECK_INT(exits_seen(), 0);
    AWAIT(said("does not accept within") == 2 || (advance(pid, STEP_MS), false));
    await_exits(2); /* no more time passes: who is slow to leave a core would be killed */
    for (int i = 0; i < 2; i++) {
        CHECK_INT(WTERMSIG(board->exit[i].status), SIGABRT);
    }
    AWAIT(forks_seen() >= 4 || (advance(pid, 100), false));
    stop_well(pid, TSRV_EPARENT);
}

/* Only the second accepts, and that late. */
static int program_serves_in_one(void)
{
    int fds[2], rc;
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, fds, 2), 1);
    if ((rc = tsrv_fork_processes(workers, &fork_options)) < 0) {
        close(fds[0]);
        return rc;
    }
    note_worker();
    if (rc == 0) {
        sleeps();
    }
    behave_as(IS_SLOW);
    tsrv_server *server = new_server();
    CHECK_INT(tsrv_server_add_sockets(server, fds, 1), TSRV_OK);
    rc = tsrv_loop_run(NULL);
    tsrv_server_free(server);
    return rc;
}

/* When the first one accepts all have to, and who has had its time already is late at once. */
TEST_ONCE(bare_workers_have_to_accept_when_one_does)
{
    begin(2);
    pid_t pid = launch(program_serves_in_one);
    await_forks(2);
    AWAIT(get(&board->held) == 1);
    advance(pid, START_MS + STEP_MS);
    CHECK_INT(exits_seen(), 0);
    put(&board->go, 1);
    await_exits(1);
    CHECK_INT(board->exit[0].id, 0);
    CHECK_INT(WTERMSIG(board->exit[0].status), SIGABRT);
    CHECK_INT(said("worker 0 (pid"), 2); /* it is late, and has ended */
    await_forks(3);
    stop_well(pid, TSRV_EPARENT);
}

/* A stop reaches workers that are not ready yet. */
static void stop_at_start(int how)
{
    begin(2);
    put(&board->value, how);
    fork_options.grace_ms = 2000;
    pid_t pid = launch(way);
    AWAIT(get(&board->held) == 2);
    tell(pid, SIGTERM);
    AWAIT(is_refused());
    check_rests();
    if (how == HANGS && way == program_behaves) {
        await_end(pid); /* it has no loop yet, and the signal ends it */
    } else {
        advance_until_end(pid);
    }
    check_no_child();
    CHECK_INT(board->results, 1);
}

TEST_ONCE(a_stop_reaches_workers_that_still_start)
{
    for_each_way(stop_at_start);
}

/* ---- workers that end ----------------------------------------------------------------------*/

static void check_replaced(int (*program)(void), int result)
{
    static const int signals[] = {SIGTERM, SIGKILL, SIGSEGV, SIGINT, SIGQUIT};
    long sibling = 0, who = 0, now = 0;
    int id = -1, ends = 0;
    begin(2);
    pid_t pid = launch(program);
    await_forks(2);
    int fd = connect_to(0, &sibling);
    for (int i = 0; i < 5; i++) {
        if (i < 3) {
            t_close(connect_to(1, &who));
            tell((pid_t)who, signals[i]);
        } else {
            command(1, i == 3 ? "exit 0\n" : "exit 1\n");
        }
        ends++;
        await_exits(ends);
        CHECK_INT(board->exit[ends - 1].id, 1);
        CHECK(board->logged > 0);
        if (i < 3 && signals[i] == SIGKILL) { /* one that no sanitizer catches */
            CHECK_INT(said("was ended by signal 9, unasked"), 1);
        }
        advance(pid, GRACE_MS); /* the back-off */
        await_forks(2 + ends);
        CHECK_INT(board->ids[1 + ends], 1);
    }
    ask_id(fd, &id, &now, NULL);
    CHECK_INT(now, sibling);
    t_close(fd);
    stop_well(pid, result);
    CHECK_INT(exits_seen(), 7);
}

TEST_LOOP(a_worker_of_serve_that_ends_is_replaced)
{
    check_replaced(program_serve, TSRV_OK);
}

TEST_LOOP(a_worker_of_start_that_ends_is_replaced)
{
    check_replaced(program_bind_start, TSRV_EPARENT);
}

/* All at once, and with a good status: nobody has told them to. */
TEST_LOOP(workers_that_all_exit_well_are_replaced)
{
    begin(2);
    pid_t pid = launch(program_serve);
    await_forks(2);
    command(0, "exit 0\n");
    command(1, "exit 0\n");
    await_forks(4);
    check_served();
    CHECK_INT(board->results, 0);
    stop_well(pid, TSRV_OK);
}

/* A SIGTERM to one worker lets it finish what is under way. */
TEST_LOOP(a_worker_that_is_told_to_end_finishes_its_request)
{
    long who = 0;
    begin(2);
    pid_t pid = launch(program_serve);
    await_forks(2);
    int fd = connect_to(1, &who);
    t_sends(fd, "unfin");
    tell((pid_t)who, SIGTERM);
    poke(pid);
    finish_request(fd);
    await_forks(3);
    CHECK_INT(board->ids[2], 1);
    CHECK_INT(board->exit[0].status, 0);
    stop_well(pid, TSRV_OK);
}

static int exits_0_or_fails_once(void)
{
    if (tsrv_task_id() == 1 && __atomic_add_fetch(&board->value, 1, __ATOMIC_ACQ_REL) == 1) {
        return -EIO; /* run_program makes it exit status 1 */
    }
    return TSRV_OK;
}

TEST_ONCE(a_bare_worker_that_exits_well_has_finished)
{
    begin(2);
    bare_worker = exits_0_or_fails_once;
    check_end(launch(program_bare), 0, TSRV_EPARENT);
    CHECK_INT(forks_seen(), 3);
    CHECK_INT(exits_seen(), 3);
    CHECK_INT(board->ids[2], 1);
}

/* The back-off is 100 ms at first, doubles to 30 s, and begins anew after a good minute. */
TEST_ONCE(restarts_come_later_each_time)
{
    begin(0);
    before_program = t_use_one_processor;
    fork_options.max_restarts = TSRV_NEVER;
    put(&board->value, EXITS_1);
    pid_t pid = launch(program_behaves);
    for (int k = 1; k <= 10; k++) {
        await_exits(k);
        poke(pid);
        int backoff = 100 << (k - 1) < 30000 ? 100 << (k - 1) : 30000;
        int64_t start = t_now_ms();
        if (backoff > 10000) {
            advance(pid, backoff / 2);
            CHECK(get(&board->held) == k || t_now_ms() - start > backoff / 2);
        }
        put(&board->value, k == 10 ? IS_FINE : EXITS_1);
        AWAIT(get(&board->held) > k || forks_seen() > 0 || (advance(pid, STEP_MS), false));
    }
    await_forks(1);
    advance(pid, 61000);
    tell(board->pids[0], SIGKILL);
    await_exits(11);
    int64_t start = t_now_ms();
    await_forks(2);
    CHECK(t_now_ms() - start < 25000);
    stop_well(pid, TSRV_EPARENT);
}

/* ---- reloads -------------------------------------------------------------------------------*/

/* Three generations serve side by side, each with a client. */
TEST_LOOP(a_hangup_does_not_wait_for_the_drain_of_another)
{
    begin(2);
    fork_options.grace_ms = NEVER_DUE_MS;
    pid_t pid = launch(program_serve);
    await_forks(2);
    int first = start_request();
    reload(pid);
    AWAIT(has_version(1) && exits_seen() >= 1); /* the old one without a client */
    int second = start_request();
    reload(pid);
    AWAIT(has_version(2) && exits_seen() >= 2); /* the old one without a client */
    int third = start_request();
    reload(pid);
    AWAIT(has_version(3) && exits_seen() >= 3); /* the old one without a client */
    check_rests();
    finish_request(first);
    finish_request(second);
    finish_request(third);
    AWAIT(is_settled());
    check_exits_are_good();
    stop_well(pid, TSRV_OK);
}

TEST_LOOP(ten_hangups_at_once_lead_to_the_last_version)
{
    begin(2);
    pid_t pid = launch(program_serve);
    await_forks(2);
    for (int i = 0; i < 10; i++) {
        reload(pid);
    }
    AWAIT(is_settled());
    check_served();
    check_exits_are_good();
    stop_well(pid, TSRV_OK);
}

/* Every generation has a client that keeps it: where there is no room for more, the next one waits. */
TEST_LOOP(many_generations_drain_side_by_side)
{
    enum { MANY = 20 };
    int fds[MANY];
    begin(0);
    before_program = t_use_one_processor;
    fork_options.grace_ms = NEVER_DUE_MS;
    pid_t pid = launch(program_serve);
    await_forks(1);
    workers = 1; /* for is_settled */
    for (int i = 0; i < MANY; i++) {
        fds[i] = start_request();
        reload(pid);
        if (i < 10) {
            AWAIT(has_version(i + 1));
            poke(pid);
        }
    }
    check_rests();
    for (int i = 0; i < MANY; i++) {
        finish_request(fds[i]);
    }
    AWAIT(is_settled());
    check_served();
    stop_well(pid, TSRV_OK);
}

/* A request to that very process. */
static int start_request_at(pid_t process)
{
    int64_t end = t_patience();
    for (;;) {
        int fd = reach(), id = 0;
        long pid = 0;
        ask_id(fd, &id, &pid, NULL);
        if (pid == process) {
            t_sends(fd, "unfin");
            return fd;
        }
        t_close(fd);
        CHECK(t_now_ms() < end);
    }
}

/* A reload that has no place for one more process waits for an end, and says so once. */
TEST_LOOP(a_reload_without_a_place_says_so_once)
{
    int fds[TSRVI_GENERATIONS];
    begin(0);
    before_program = t_use_one_processor;
    fork_options.grace_ms = NEVER_DUE_MS;
    pid_t pid = launch(program_serve);
    await_forks(1);
    workers = 1; /* for has_version */
    for (int i = 0; i < TSRVI_GENERATIONS; i++) {
        AWAIT(said("reload: done") == i);
        fds[i] = start_request_at(board->pids[i]);
        reload(pid);
    }
    AWAIT(said("reload: waits until") == 1);
    for (int i = 0; i < 3; i++) {
        reload(pid);
        poke(pid);
    }
    CHECK_INT(said("reload: waits until"), 1);
    CHECK(!has_version(get(&board->version)));
    check_rests();
    finish_request(fds[0]);
    AWAIT(said("reload: done") == TSRVI_GENERATIONS);
    CHECK(has_version(get(&board->version)));
    CHECK_INT(said("reload: waits until"), 1);
    for (int i = 1; i < TSRVI_GENERATIONS; i++) {
        finish_request(fds[i]);
    }
    AWAIT(is_settled());
    stop_well(pid, TSRV_OK);
}

/* The first ends badly after the second has come. */
static void reload_again(int how)
{
    begin(2);
    pid_t pid = launch(way);
    await_forks(2);
    put(&board->value, how);
    reload(pid);
    AWAIT(get(&board->held) > 0);
    put(&board->value, IS_FINE); /* repaired */
    reload(pid);
    poke(pid);
    put(&board->go, 1);
    for (int i = 0; i < 200 && !is_settled() && how == HANGS_DEAF; i++) {
        poll(NULL, 0, 1); /* it need not wait for the first */
    }
    if (how == HANGS_DEAF && exits_seen() == 0) {
        advance_until_exits(pid, START_MS, 1);
    }
    AWAIT(is_settled());
    advance_until_exits(pid, 0, 3); /* the one that failed, and the old ones */
    stop_well(pid, result_of_way());
}

TEST_ONCE(a_hangup_during_a_reload_that_fails_is_not_lost)
{
    way = program_behaves_in_start;
    reload_again(FAILS_LATER);
    way = program_behaves;
    reload_again(FAILS_LATER);
}

TEST_ONCE(a_hangup_during_a_reload_that_hangs_is_not_lost)
{
    way = program_behaves;
    reload_again(HANGS_DEAF);
    way = program_behaves_in_start;
    reload_again(HANGS_DEAF);
}

/* The worker that a reload is about to replace dies meanwhile, and a newer reload overtakes the one that has been
 * begun: it is forked again. */
TEST_ONCE(a_worker_that_dies_in_a_reload_that_is_overtaken_is_replaced)
{
    begin(2);
    pid_t pid = launch(program_behaves);
    await_forks(2);
    put(&board->value, HANGS_DEAF);
    tell(pid, SIGHUP);
    AWAIT(get(&board->held) == 1);
    tell(board->pids[board->ids[0] == 0 ? 0 : 1], SIGKILL);
    await_exits(1);
    put(&board->value, IS_FINE);
    reload(pid);
    int version = get(&board->version);
    AWAIT((advance(pid, STEP_MS), has_version(version)));
    check_served();
    stop_well(pid, TSRV_EPARENT);
}

static bool forks_by_itself;

/* What a daemon(3) between bind and start does: the parent of the workers is a fork of who has bound. */
static int program_daemon(void)
{
    server_options.on_start = on_start;
    tsrv_server *server = new_bound_server();
    in_program = false; /* this fork makes no worker */
    pid_t pid = fork();
    in_program = true;
    CHECK(pid >= 0);
    if (pid > 0) {
        int status = 0;
        CHECK(waitpid(pid, &status, 0) == pid);
        _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
    }
    put(&board->value, getpid());
    int rc = forks_by_itself ? tsrv_fork_processes(workers, &fork_options) : TSRV_OK;
    if (rc >= 0) {
        rc = tsrv_server_start(server, forks_by_itself ? 1 : workers, &fork_options);
    }
    if (rc == TSRV_OK) {
        rc = tsrv_loop_run(NULL);
    }
    tsrv_server_free(server);
    return rc;
}

TEST_ONCE(a_daemon_refuses_new_connections_and_removes_its_file)
{
    for (int i = 0; i < 2; i++) {
        begin(2);
        forks_by_itself = i == 1;
        use_unix_socket();
        pid_t pid = launch(program_daemon);
        await_forks(2);
        int fd = start_request();
        tell((pid_t)get(&board->value), SIGTERM);
        AWAIT(is_refused());
        CHECK(access(unix_path, F_OK) != 0);
        finish_request(fd);
        CHECK_INT(await_end(pid), 0);
        remove_directory();
    }
}

/* What a launcher has bound for another service is that one's. */
TEST_ONCE(workers_leave_the_file_of_a_socket_that_their_server_has_not_bound)
{
    const char *path;
    int other;
    use_unix_socket();
    path = unix_path;
    unix_path = NULL;
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &other), TSRV_OK);
    begin(2);
    pid_t pid = launch(program_serve);
    await_forks(2);
    stop_well(pid, TSRV_OK);
    CHECK(access(path, F_OK) == 0);
    tsrvi_bound_close(other);
    CHECK(access(path, F_OK) != 0);
    remove_directory();
}

TEST_ONCE(a_reload_to_workers_that_end_leaves_the_old_ones)
{
    static const int kinds[] = {EXITS_0, EXITS_1};
    for (int i = 0; i < 2; i++) {
        begin(2);
        fork_options.max_restarts = 1;
        pid_t pid = launch(i == 0 ? program_behaves : program_behaves_in_start);
        await_forks(2);
        put(&board->value, kinds[i]);
        for (int k = 0; k < 3; k++) { /* they are no bad ends of workers */
            int held = get(&board->held), before = warnings();
            tell(pid, SIGHUP);
            AWAIT(get(&board->held) > held && warnings() > before);
            poke(pid);
        }
        check_served();
        check_rests();
        CHECK(!has_exited(board->pids[0]) && !has_exited(board->pids[1]));
        put(&board->value, IS_FINE);
        reload(pid);
        AWAIT(is_settled());
        stop_well(pid, i == 0 ? TSRV_EPARENT : TSRV_OK);
    }
}

static int second_finishes(void)
{
    return tsrv_task_id() == 1 ? TSRV_OK : sleeps();
}

/* Who has finished is not begun anew by a reload. */
TEST_ONCE(a_reload_leaves_bare_workers_that_have_finished)
{
    begin(2);
    bare_worker = second_finishes;
    pid_t pid = launch(program_bare);
    await_forks(2);
    await_exits(1);
    tell(pid, SIGHUP);
    await_forks(3);
    advance_until_exits(pid, STEP_MS, 2);
    AWAIT(said("reload: done") == 1);
    CHECK_INT(forks_seen(), 3);
    CHECK_INT(board->ids[2], 0);
    stop_well(pid, TSRV_EPARENT);
}

/* The old worker dies while its replacement hangs: there is one in the end. */
TEST_ONCE(an_old_worker_that_dies_in_a_reload_is_made_good)
{
    begin(2);
    pid_t pid = launch(program_behaves);
    await_forks(2);
    put(&board->value, IS_SLOW);
    reload(pid);
    AWAIT(get(&board->held) > 0);
    tell(board->pids[0], SIGKILL);
    tell(board->pids[1], SIGKILL);
    await_exits(2);
    put(&board->value, IS_FINE);
    put(&board->go, 1);
    AWAIT(is_settled());
    check_served();
    stop_well(pid, TSRV_EPARENT);
}

/* An old worker that ends by itself while another one is replaced has not failed with what is new. */
TEST_ONCE(a_worker_that_dies_in_a_reload_is_waited_for)
{
    begin(2);
    server_options.on_start = behave_in_start;
    pid_t pid = launch(program_serve);
    await_forks(2);
    int one = board->ids[0] == 1 ? 0 : 1;
    put(&board->value, IS_SLOW);
    tell(pid, SIGHUP);
    AWAIT(get(&board->held) == 1);
    tell(board->pids[one], SIGKILL);
    await_exits(1);
    put(&board->value, IS_FINE);
    put(&board->go, 1);
    AWAIT(said("reload: done") + said("reload: over") == 1);
    CHECK_INT(said("reload: done, all 2 workers are new"), 1);
    CHECK_INT(forks_seen(), 4);
    stop_well(pid, TSRV_OK);
}

/* The harness does not know the group: the end of the runner is the program's too. */
static void lead_a_group(void)
{
    CHECK(setpgid(0, 0) == 0);
    CHECK(prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) == 0);
}

static void check_none_died_of(int signo)
{
    for (int i = 0; i < exits_seen(); i++) {
        CHECK(!WIFSIGNALED(board->exit[i].status) || WTERMSIG(board->exit[i].status) != signo);
    }
}

/* pkill -HUP, or a terminal that closes. */
TEST_ONCE(a_hangup_of_the_whole_tree_kills_no_worker_that_starts)
{
    for (int i = 0; i < 2; i++) {
        way = i == 0 ? program_behaves : program_behaves_in_start;
        begin(2);
        before_program = lead_a_group;
        put(&board->value, IS_SLOW);
        pid_t pid = launch(way);
        AWAIT(get(&board->held) == 2);
        put(&board->version, 1);
        tell(-pid, SIGHUP);
        poke(pid);
        put(&board->go, 1);
        AWAIT(is_settled());
        for (int k = 0; k < 3; k++) { /* and later ones neither */
            put(&board->version, 2 + k);
            tell(-pid, SIGHUP);
            AWAIT(is_settled());
        }
        check_none_died_of(SIGHUP);
        check_served();
        stop_well(pid, result_of_way());
    }
}

TEST_ONCE(a_hangup_kills_no_bare_worker)
{
    begin(2);
    bare_worker = sleeps;
    pid_t pid = launch(program_bare);
    await_forks(2);
    for (int i = 0; i < 20; i++) {
        tell(board->pids[i % 2], SIGHUP);
        poll(NULL, 0, 1);
    }
    poke(pid);
    CHECK_INT(exits_seen(), 0);
    stop_well(pid, TSRV_EPARENT);
}

/* A single process has no certificates here, and nothing to read anew. */
TEST_LOOP(a_hangup_does_not_end_a_single_process)
{
    begin(1);
    put(&board->value, IS_SLOW);
    pid_t pid = launch(program_behaves_in_start);
    AWAIT(get(&board->held) == 1);
    tell(pid, SIGHUP);
    put(&board->go, 1);
    await_forks(1);
    for (int i = 0; i < 10; i++) {
        tell(pid, SIGHUP);
        check_served();
    }
    int fd = start_request();
    tell(pid, SIGTERM);
    AWAIT(is_refused());
    tell(pid, SIGHUP); /* neither while it drains */
    finish_request(fd);
    check_end(pid, 0, TSRV_OK);
}

/* It has no parent that could hand its sockets over. */
TEST_LOOP(an_upgrade_of_a_single_process_is_refused_and_explained)
{
    static char *argv[] = {(char *)"false", NULL};
    begin(1);
    fork_options.upgrade_argv = argv;
    pid_t pid = launch(program_serve);
    await_forks(1);
    tell(pid, SIGUSR2);
    AWAIT(strstr(board->log, "upgrade: refused") != NULL);
    check_served();
    stop_well(pid, TSRV_OK);
}

/* How it ended has been told; "cannot start" would be said of what has served for hours. */
TEST_LOOP(what_ends_by_force_is_not_called_a_start_that_failed)
{
    begin(2);
    fork_options.grace_ms = 1000;
    pid_t pid = launch(program_bind_start);
    await_forks(2);
    int fd = reach();
    t_sends(fd, "hang\n");
    poke(pid);
    tell(pid, SIGTERM);
    advance(pid, 1000 + KILL_MS);
    advance_until_end(pid);
    CHECK_INT(board->result, TSRV_ETIMEOUT);
    CHECK(strstr(board->log, "is killed") != NULL);
    CHECK(strstr(board->log, "cannot start") == NULL);
    t_close(fd);
}

TEST_LOOP(a_hangup_during_a_drain_changes_nothing)
{
    begin(2);
    pid_t pid = launch(program_serve);
    await_forks(2);
    int fd = start_request();
    tell(pid, SIGTERM);
    AWAIT(is_refused());
    tell(pid, SIGHUP);
    poke(pid);
    CHECK(is_refused());
    finish_request(fd);
    check_end(pid, 0, TSRV_OK);
    CHECK_INT(forks_seen(), 2);
    check_exits_are_good();
}

/* A stop that comes while a single process starts is obeyed. */
TEST_LOOP(a_stop_while_a_single_process_starts_is_obeyed)
{
    begin(1);
    put(&board->value, IS_SLOW);
    pid_t pid = launch(program_behaves_in_start);
    AWAIT(get(&board->held) == 1);
    tell(pid, SIGTERM);
    put(&board->go, 1);
    check_end(pid, 0, TSRV_OK);
}

/* ---- forks that fail -----------------------------------------------------------------------*/

/* The limit of processes is reached in a reload: it is no bad end, the old ones stay. */
TEST_ONCE(a_reload_whose_forks_fail_leaves_the_old_ones)
{
    begin(2);
    fork_options.max_restarts = 2;
    pid_t pid = launch(program_serve);
    await_forks(2);
    fail("fork", EAGAIN, 1000, IN_PARENT);
    for (int i = 0; i < 5; i++) {
        int before = get(&board->failing), said = warnings();
        tell(pid, SIGHUP);
        AWAIT(get(&board->failing) < before && warnings() > said);
        advance(pid, GRACE_MS);
    }
    check_rests();
    CHECK_INT(exits_seen(), 0);
    check_served();
    put(&board->failing, 0);
    reload(pid);
    AWAIT(is_settled());
    stop_well(pid, TSRV_OK);
}

/* In a restart it is tried again, more often than bad ends are made good. */
TEST_ONCE(a_restart_whose_fork_fails_is_tried_again)
{
    begin(2);
    fork_options.max_restarts = 2;
    fork_options.start_timeout_ms = TSRV_NEVER;
    pid_t pid = launch(program_serve);
    await_forks(2);
    fail("fork", EAGAIN, 6, IN_PARENT);
    tell(board->pids[0], SIGKILL);
    await_exits(1);
    AWAIT((advance(pid, STEP_MS), get(&board->failing) == 0));
    check_rests();
    AWAIT((advance(pid, STEP_MS), forks_seen() == 3));
    CHECK_INT(exits_seen(), 1);
    check_served();
    stop_well(pid, TSRV_OK);
}

/* When no worker at all can be forked the parent goes on trying, and can be told to stop. */
TEST_ONCE(a_start_whose_forks_all_fail_can_be_stopped)
{
    begin(2);
    fail("fork", EAGAIN, 1000000, IN_PARENT);
    pid_t pid = launch(program_serve);
    AWAIT(get(&board->failing) <= 1000000 - 4 || get(&board->results) > 0);
    if (get(&board->results) == 0) {
        check_rests();
        tell(pid, SIGTERM);
    }
    await_end(pid);
    check_no_child();
    CHECK_INT(forks_seen(), 0);
    CHECK(warnings() > 0);
}

static int program_two_ports(void);

/* ---- other calls that fail -----------------------------------------------------------------*/

static int fault_at;

static void end_in_start(tsrv_server *server, void *context)
{
    (void)server, (void)context; /* which may have been stopped already, by the other worker */
    if (tsrv_task_id() == 0) {
        CHECK(kill(getppid(), SIGTERM) == 0);
    } else if (tsrv_task_id() < 0) {
        tsrv_loop_stop(NULL);
    }
}

/* Returns what ends well, whatever the call's failure has led to: run_program checks the rest. */
static int program_fault(void)
{
    server_options.on_start = end_in_start;
    tsrv_server *server = new_bound_server();
    t_fault_calls = 0;
    t_fault_at = fault_at;
    int rc = tsrv_server_start(server, workers, &fork_options);
    t_fault_at = 0;
    if (tsrv_task_id() < 0) {
        put(&board->value, (int)t_fault_hits);
    }
    if (rc == TSRV_OK) {
        tsrv_loop_run(NULL);
    }
    tsrv_server_free(server);
    return TSRV_OK;
}

static int program_serve_fault(void)
{
    server_options.mode = t_mode;
    server_options.handle_stream = serve_lines;
    server_options.on_start = end_in_start;
    server_options.fork = &fork_options;
    t_fault_calls = 0;
    t_fault_at = fault_at;
    tsrv_serve(0, "127.0.0.1", workers, &server_options);
    t_fault_at = 0;
    if (tsrv_task_id() < 0) {
        put(&board->value, (int)t_fault_hits);
    }
    return TSRV_OK;
}

/* Every call of the parent's fails in turn, once: it ends, nobody is left behind, and nothing leaks. */
static void check_calls(int (*program)(void), int count)
{
    fault_at = 0;
    do {
        fault_at++;
        begin(count);
        int status = await_end(launch(program));
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
            T_FAIL("call %d: status %#x\n%s", fault_at, (unsigned)status, board->log);
        }
        check_no_child();
    } while (board->value > 0);
    CHECK(fault_at > 5);
}

TEST_ONCE(every_call_of_a_parent_with_a_server_may_fail)
{
    bind_options.reuse_port = true;
    check_calls(program_fault, 2);
}

TEST_ONCE(every_call_of_a_start_without_a_fork_may_fail)
{
    fork_options.user = geteuid() == 0 ? "nobody" : NULL;
    check_calls(program_fault, 1);
}

TEST_ONCE(every_call_of_serve_may_fail)
{
    check_calls(program_serve_fault, 1);
    check_calls(program_serve_fault, 2);
}

/* A listener of its own that a worker cannot have ends the start, whatever was to be made next. */
TEST_ONCE(listeners_that_cannot_be_made_for_all_workers_end_the_start)
{
    begin(3);
    bind_options.reuse_port = true;
    fail_after(2, "listen", ENOBUFS, 1, IN_PARENT); /* behind those of the two ports */
    check_end(launch(program_two_ports), 1, -ENOBUFS);
    CHECK_INT(forks_seen(), 0);
}

/* A worker that cannot watch a signal, or its life-line, is told in another way. The first calls of
 * sigaction give back what the parent had found, which does not fail. */
TEST_LOOP(a_worker_whose_watches_fail_is_told)
{
    for (int i = 0; i < 11; i++) {
        begin(0);
        before_program = t_use_one_processor;
        fail_after(i < 5 ? i + 1 : i, i < 5 ? "epoll_ctl" : "sigaction", ENOMEM, 1, IN_CHILDREN);
        pid_t pid = launch(program_serve);
        await_forks(1);
        stop_well(pid, TSRV_OK);
    }
}

/* Whether the program has a handler of its own cannot be learnt: the worker drains. */
TEST_LOOP(a_worker_that_cannot_look_for_handlers_drains)
{
    begin(2);
    pid_t pid = launch(program_serve);
    await_forks(2);
    int fd = start_request();
    fail("sigaction", ENOMEM, 2, IN_CHILDREN);
    tell(pid, SIGTERM);
    AWAIT(get(&board->failed) == 2);
    finish_request(fd);
    check_end(pid, 0, TSRV_OK);
    check_exits_are_good();
}

/* A parent whose life-line to a worker fails sends signals; a worker that cannot read its own hears them. */
TEST_LOOP(a_life_line_that_fails_is_made_good_by_signals)
{
    begin(2);
    pid_t pid = launch(program_serve);
    await_forks(2);
    fail("send", EIO, 2, IN_PARENT);
    stop_well(pid, TSRV_OK);

    begin(2);
    pid = launch(program_serve);
    await_forks(2);
    poke(pid);
    fail("recv", EIO, 2, IN_CHILDREN);
    stop_well(pid, TSRV_OK);
}

/* A signal that cannot be sent is sent again. */
TEST_ONCE(a_worker_that_cannot_be_killed_at_first_is_killed_later)
{
    begin(2);
    fork_options.start_timeout_ms = 1000;
    put(&board->value, HANGS_DEAF);
    pid_t pid = launch(program_behaves);
    AWAIT(get(&board->held) == 2);
    put(&board->value, IS_FINE);
    fail("kill", EPERM, 4, IN_PARENT);
    AWAIT((advance(pid, STEP_MS), get(&board->failing) == 0));
    fork_options.start_timeout_ms = 0;
    AWAIT(exits_seen() >= 2 || (advance(pid, STEP_MS), poll(NULL, 0, 50), false));
    AWAIT(is_settled());
    stop_well(pid, TSRV_EPARENT);
}

static FILE *full;

static void print_to_full(void)
{
    full = fopen("/dev/full", "w");
    CHECK(full != NULL);
    fputs("text", full);
}

/* What the program has printed and nobody can take does not keep workers from being forked. */
TEST_ONCE(output_that_cannot_be_flushed_is_no_obstacle)
{
    begin(2);
    before_program = print_to_full;
    pid_t pid = launch(program_serve);
    await_forks(2);
    reload(pid);
    AWAIT(is_settled());
    stop_well(pid, TSRV_OK);
}

static char report_path[300];

static void print_exit(int task_id, int pid, int status, void *context)
{
    note_exit(task_id, pid, status, context);
    printf("%d has ended\n", pid); /* into a buffer */
}

static int program_prints_exits(void)
{
    CHECK(freopen(report_path, "w", stdout) != NULL);
    fork_options.on_exit = print_exit;
    int rc = program_serve();
    CHECK(fflush(stdout) == 0); /* as exit(3) does, in workers too */
    return rc;
}

/* What on_exit prints is printed once, and not again by each worker that is forked behind it. */
TEST_ONCE(output_of_on_exit_is_printed_once)
{
    char line[64];
    int lines = 0;
    begin(2);
    snprintf(report_path, sizeof report_path, "%s/report", t_make_directory());
    pid_t pid = launch(program_prints_exits);
    await_forks(2);
    tell(board->pids[0], SIGKILL);
    await_forks(3);
    reload(pid);
    AWAIT(is_settled());
    stop_well(pid, TSRV_OK);
    FILE *file = fopen(report_path, "r");
    CHECK(file != NULL);
    while (fgets(line, sizeof line, file) != NULL) {
        lines++;
    }
    CHECK(fclose(file) == 0);
    CHECK_INT(lines, exits_seen());
    CHECK_INT(lines, 5);
    CHECK(unlink(report_path) == 0);
}

static int program_prints_to_nobody(void)
{
    static const char zeros[4096];
    int fds[2], nowhere = open("/dev/null", O_WRONLY), rc;
    CHECK(pipe(fds) == 0 && fcntl(fds[1], F_SETFL, O_NONBLOCK) == 0);
    while (write(fds[1], zeros, sizeof zeros) > 0) {
    }
    CHECK(fcntl(fds[1], F_SETFL, 0) == 0);
    CHECK(fflush(stdout) == 0 && dup2(fds[1], STDOUT_FILENO) == STDOUT_FILENO);
    t_close(fds[1]);
    fork_options.on_exit = print_exit;
    rc = program_serve();
    CHECK(dup2(nowhere, STDOUT_FILENO) == STDOUT_FILENO); /* exit(3) would wait */
    t_close(nowhere);
    t_close(fds[0]);
    return rc;
}

/* Whoever reads it has stopped, and the parent goes on. */
TEST_ONCE(output_of_on_exit_that_nobody_reads_is_no_obstacle)
{
    begin(2);
    pid_t pid = launch(program_prints_to_nobody);
    await_forks(2);
    tell(board->pids[0], SIGKILL);
    await_forks(3);
    AWAIT(is_settled());
    stop_well(pid, TSRV_OK);
}

/* Somebody else takes the status of a worker: it has ended all the same. */
static void take_another(int task_id, int pid, int status, void *context)
{
    note_exit(task_id, pid, status, context);
    if (get(&board->go) == 1) {
        put(&board->go, 2);
        CHECK(waitpid(-1, NULL, 0) > 0);
    }
}

static int program_takes_statuses(void)
{
    fork_options.on_exit = take_another;
    return program_serve();
}

TEST_ONCE(a_worker_whose_status_was_taken_is_replaced)
{
    begin(2);
    pid_t pid = launch(program_takes_statuses);
    await_forks(2);
    put(&board->go, 1);
    tell(pid, SIGSTOP); /* so that it sees both at once */
    tell(board->pids[0], SIGKILL);
    tell(board->pids[1], SIGKILL);
    tell(pid, SIGCONT);
    await_forks(4);
    check_served();
    stop_well(pid, TSRV_OK);
}

/* Takes the status of a worker that the parent has not looked at, and asks for a stop. */
static void take_and_stop(int task_id, int pid, int status, void *context)
{
    note_exit(task_id, pid, status, context);
    if (task_id == 1 && get(&board->go) == 0) {
        pid_t other = board->pids[board->pids[0] == pid];
        put(&board->go, 1);
        CHECK(kill(other, SIGKILL) == 0);
        CHECK_INT(waitpid(other, NULL, 0), other);
        CHECK(kill(getpid(), SIGTERM) == 0);
    }
}

static int program_takes_and_stops(void)
{
    fork_options.on_exit = take_and_stop;
    return program_serve();
}

/* Who is told to end and is not there any more needs no word about it. */
TEST_ONCE(a_worker_whose_status_was_taken_can_be_told)
{
    begin(2);
    pid_t pid = launch(program_takes_and_stops);
    await_forks(2);
    command(1, "exit 1\n");
    check_end(pid, 0, TSRV_OK);
    CHECK_INT(exits_seen(), 2);
    CHECK_INT(said("cannot be sent"), 0);
}

enum { STORM = 1200 }; /* more than the parent reads at once */

static void storm_in_exit(int task_id, int pid, int status, void *context)
{
    note_exit(task_id, pid, status, context);
    for (int i = 0; i < STORM && get(&board->go) == 0; i++) {
        CHECK(raise(SIGHUP) == 0);
    }
    put(&board->go, 1);
}

static int program_storms(void)
{
    fork_options.on_exit = storm_in_exit;
    return program_serve();
}

/* All of them are one reload, and the parent sleeps again. */
TEST_ONCE(a_thousand_hangups_at_once_are_one_reload)
{
    begin(2);
    pid_t pid = launch(program_storms);
    await_forks(2);
    __atomic_add_fetch(&board->version, 1, __ATOMIC_ACQ_REL);
    tell(board->pids[1], SIGKILL);
    AWAIT(get(&board->go) == 1 && is_settled());
    poke(pid);
    check_rests();
    CHECK_INT(said("reload: 2 workers are replaced"), 1);
    check_served();
    stop_well(pid, TSRV_OK);
}

/* More signals than it can act on do not keep the parent from its work. */
TEST_ONCE(a_storm_of_signals_does_not_stop_the_parent)
{
    begin(2);
    pid_t pid = launch(program_serve);
    await_forks(2);
    for (int64_t end = t_now_ms() + 100; t_now_ms() < end;) {
        kill(pid, SIGCHLD);
        kill(pid, SIGCONT);
    }
    tell(board->pids[0], SIGKILL);
    for (int i = 0; i < 2000; i++) {
        kill(pid, SIGCHLD);
    }
    await_forks(3);
    stop_well(pid, TSRV_OK);
}

/* ---- calls that are refused ----------------------------------------------------------------*/

static void *fork_too(void *context)
{
    (void)context;
    put(&board->value, tsrv_fork_processes(2, NULL));
    return NULL;
}

/* A second supervisor in another thread, while the first is at work; and another one afterwards. */
static void fork_in_exit(int task_id, int pid, int status, void *context)
{
    pthread_t thread;
    note_exit(task_id, pid, status, context);
    if (get(&board->go) == 0) {
        put(&board->go, 1);
        CHECK_INT(pthread_create(&thread, NULL, fork_too, NULL), 0);
        CHECK_INT(pthread_join(thread, NULL), 0);
    }
}

static int program_twice(void)
{
    CHECK_INT(tsrv_fork_processes(-1, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_fork_processes(5000, NULL), TSRV_EINVAL);
    fork_options.on_exit = fork_in_exit;
    int rc = program_bare();
    if (rc == TSRV_EPARENT) {
        rc = tsrv_fork_processes(2, NULL);
        if (rc >= 0) {
            note_worker();
            rc = TSRV_OK;
        }
    }
    return rc;
}

static void upgrade_in_exit(int task_id, int pid, int status, void *context)
{
    note_exit(task_id, pid, status, context);
    tell(getpid(), SIGUSR2);
}

/* The first supervisor can be upgraded, and is told so when it is over; the second cannot. */
static int program_upgradable_once(void)
{
    static char *argv[] = {(char *)"/no/such/program", NULL};
    fork_options.upgrade_argv = argv;
    fork_options.on_exit = upgrade_in_exit;
    int rc = program_bare();
    if (rc == TSRV_EPARENT) {
        CHECK_INT(forks_seen(), 1);
        fork_options.upgrade_argv = NULL;
        fork_options.on_exit = NULL;
        rc = program_bare();
    }
    return rc;
}

TEST_ONCE(an_upgrade_that_came_too_late_is_not_the_next_supervisors)
{
    begin(1);
    bare_worker = returns_well;
    check_end(launch(program_upgradable_once), 0, TSRV_EPARENT);
    CHECK_INT(forks_seen(), 2);
    CHECK_INT(warnings(), 0);
}

TEST_ONCE(one_supervisor_at_a_time)
{
    begin(2);
    bare_worker = returns_well;
    check_end(launch(program_twice), 0, TSRV_EPARENT);
    CHECK_INT(board->value, TSRV_EBUSY);
    CHECK_INT(forks_seen(), 4);
}

/* Who is refused because another thread supervises changes nothing for that: whose files SIGHUP reads anew. */
TEST_ONCE(a_refused_start_leaves_the_first_ones_files_alone)
{
    tsrv_server *first, *second;
    begin(2);
    first = new_bound_server();
    board->port = 0;
    second = new_bound_server();
    tsrvi_process.reloaded = first;
    tsrvi_process.supervising = (int)getpid();
    CHECK_INT(tsrv_server_start(second, 2, NULL), TSRV_EBUSY);
    CHECK(tsrvi_process.reloaded == first);
    tsrvi_process.reloaded = NULL;
    tsrvi_process.supervising = 0;
    tsrv_server_free(first);
    tsrv_server_free(second);
}

TEST_ONCE(too_many_processes_are_refused)
{
    begin(5000);
    pid_t pid = launch(program_bind_start);
    check_end(pid, 1, TSRV_EINVAL);
    begin(5000);
    pid = launch(program_serve);
    check_end(pid, 1, TSRV_EINVAL);
}

/* ---- the end of a grace --------------------------------------------------------------------*/

static void check_cut(int fd)
{
    char byte;
    ssize_t n = recv(fd, &byte, 1, 0);
    CHECK(n == 0 || (n < 0 && errno == ECONNRESET));
    t_close(fd);
}

static void end_grace(int (*program)(void), int count, int first, int second)
{
    begin(count);
    server_options.grace_ms = NEVER_DUE_MS;
    fork_options.grace_ms = NEVER_DUE_MS;
    pid_t pid = launch(program);
    await_forks(count);
    int fd = start_request();
    tell(pid, first);
    AWAIT(is_refused());
    tell(pid, second);
    check_cut(fd);
    check_end(pid, 0, program == program_serve ? TSRV_OK : TSRV_EPARENT);
    check_exits_are_good();
}

static void end_graces(int (*program)(void), int count)
{
    static const int pairs[][2] = {{SIGTERM, SIGTERM},
                                   {SIGINT, SIGINT},
                                   {SIGQUIT, SIGQUIT},
                                   {SIGTERM, SIGINT}};
    for (int i = 0; i < 4; i++) {
        end_grace(program, count, pairs[i][0], pairs[i][1]);
    }
}

TEST_LOOP(a_second_signal_ends_the_grace_of_one_process)
{
    end_graces(program_serve, 1);
}

TEST_LOOP(a_second_signal_ends_the_grace_of_workers)
{
    end_graces(program_serve, 2);
}

TEST_LOOP(a_second_signal_ends_the_grace_of_bind_and_start)
{
    end_graces(program_bind_start, 2);
}

/* A grace that has no end of its own. */
TEST_LOOP(a_second_signal_ends_a_grace_without_an_end)
{
    for (int count = 1; count <= 2; count++) {
        begin(count);
        server_options.grace_ms = TSRV_NEVER;
        fork_options.grace_ms = TSRV_NEVER;
        pid_t pid = launch(program_serve);
        await_forks(count);
        int fd = start_request();
        tell(pid, SIGTERM);
        AWAIT(is_refused());
        tell(pid, SIGTERM);
        check_cut(fd);
        check_end(pid, 0, TSRV_OK);
    }
}

/* Old generations, which drain since a reload, are told too. */
TEST_LOOP(a_second_signal_ends_the_grace_of_old_generations)
{
    begin(2);
    server_options.grace_ms = NEVER_DUE_MS;
    fork_options.grace_ms = NEVER_DUE_MS;
    pid_t pid = launch(program_serve);
    await_forks(2);
    int old = start_request();
    reload(pid);
    AWAIT(has_version(1));
    int fresh = start_request();
    tell(pid, SIGTERM);
    AWAIT(is_refused());
    tell(pid, SIGTERM);
    check_cut(old);
    check_cut(fresh);
    check_end(pid, 0, TSRV_OK);
}

/* Ctrl-C reaches the whole process group: each worker hears of it twice, and that is no second one. */
static void check_ctrl_c(int count)
{
    begin(count);
    before_program = lead_a_group;
    server_options.grace_ms = NEVER_DUE_MS;
    fork_options.grace_ms = NEVER_DUE_MS;
    pid_t pid = launch(program_serve);
    await_forks(count);
    int fd = start_request(), other = start_request();
    tell(-pid, SIGINT);
    AWAIT(is_refused());
    for (int i = 0; i < 10; i++) {
        t_sends(fd, "ished\nunfin");
        t_expect(fd, "unfinished\n");
        t_sends(other, "ished\nunfin");
        t_expect(other, "unfinished\n");
        if (count > 1) {
            poke(pid);
        }
        poll(NULL, 0, 5);
    }
    finish_request(fd);
    tell(-pid, SIGINT); /* but the second one is */
    check_cut(other);
    check_end(pid, 0, TSRV_OK);
    check_exits_are_good();
}

TEST_LOOP(one_ctrl_c_does_not_cut_the_grace_of_workers)
{
    check_ctrl_c(3);
}

TEST_LOOP(one_ctrl_c_does_not_cut_the_grace_of_one_process)
{
    check_ctrl_c(1);
}

/* A worker whose handler hangs is killed 5 s after the grace, and that is told. */
TEST_LOOP(a_worker_that_hangs_in_a_stop_is_killed)
{
    long who = 0;
    begin(2);
    server_options.grace_ms = GRACE_MS;
    fork_options.grace_ms = GRACE_MS;
    pid_t pid = launch(program_serve);
    await_forks(2);
    int fd = connect_to(0, &who);
    t_sends(fd, "hang\n");
    tell(pid, SIGTERM);
    await_exits(1); /* the sibling */
    check_rests();
    advance(pid, GRACE_MS);
    check_rests();
    advance_until_exits(pid, KILL_MS, 2);
    check_end(pid, 1, TSRV_ETIMEOUT);
    CHECK_INT(board->exit[1].pid, who);
    CHECK(WIFSIGNALED(board->exit[1].status));
    CHECK_INT(WTERMSIG(board->exit[1].status), SIGKILL);
    t_close(fd);
}

/* Two servers, of which the second has graces of its own, and is the one that is asked. */
static int program_two_graces(void)
{
    tsrv_server *server = new_bound_server(), *second;
    tsrv_server_options options = server_options;
    tsrv_address address;
    options.mode = t_mode;
    options.handle_stream = serve_lines;
    options.on_start = on_start;
    options.grace_ms = board->value;
    CHECK_INT(tsrv_server_new(&second, &options), TSRV_OK);
    CHECK_INT(tsrv_server_bind(second, 0, "127.0.0.1", &bind_options), TSRV_OK);
    CHECK_INT(tsrv_server_address(second, 0, &address), TSRV_OK);
    put(&board->second_port, tsrv_address_port(&address));
    int rc = tsrv_server_start(server, workers, &fork_options);
    rc = rc == TSRV_OK ? tsrv_server_start(second, 1, NULL) : rc;
    rc = rc == TSRV_OK ? tsrv_loop_run(NULL) : rc;
    tsrv_server_free(second);
    tsrv_server_free(server);
    return rc;
}

/* Who waits for half a line of the second server waits no longer than that one's own grace, nor longer
 * than the first one's; but for the workers' grace, if there is one. */
TEST_LOOP(each_server_of_a_worker_has_its_own_grace)
{
    static const struct {
        int first, second, given, lasts;
    } cases[] = {{60000, 10000, 0, 10000}, {10000, 60000, 0, 10000}, {10000, 60000, 30000, 30000}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        begin(2);
        server_options.grace_ms = cases[i].first;
        fork_options.grace_ms = cases[i].given;
        put(&board->value, cases[i].second);
        pid_t pid = launch(program_two_graces);
        await_forks(2);
        AWAIT(get(&board->second_port) != 0);
        int fd = t_connect(get(&board->second_port));
        t_echo(fd, "a line\n");
        t_sends(fd, "half a ");
        tell(pid, SIGTERM);
        AWAIT(is_refused());
        await_exits(1); /* the sibling */
        check_rests();
        advance(pid, cases[i].lasts - 2 * STEP_MS);
        t_sends(fd, "long ");
        check_rests();
        CHECK_INT(exits_seen(), 1);
        advance(pid, 3 * STEP_MS);
        send(fd, "line, ", 6, MSG_NOSIGNAL); /* the worker looks at the clock, if it has not, and all is over */
        check_end(pid, 0, TSRV_EPARENT);
        t_close(fd);
    }
}

/* Several of them, and after a supervisor has given up: that result stays. */
TEST_LOOP(workers_that_hang_after_all_was_given_up_are_killed)
{
    long who = 0;
    begin(3);
    fork_options.grace_ms = 1000;
    fork_options.max_restarts = 1;
    pid_t pid = launch(program_bind_start);
    await_forks(3);
    int fds[2] = {connect_to(0, &who), connect_to(1, &who)};
    command(2, "exit 1\n");
    await_forks(4);
    t_sends(fds[0], "hang\n");
    t_sends(fds[1], "hang\n");
    tell(board->pids[3], SIGKILL);
    await_exits(2);
    advance_until_exits(pid, 0, 4);
    check_end(pid, 1, TSRV_ERESTARTS);
    t_close_all(fds, 2);
}

/* ---- states that must not spin -------------------------------------------------------------*/

/* A stop while a new worker hangs that no signal reaches. */
static void stop_in_reload(int how)
{
    begin(2);
    fork_options.grace_ms = 100000;
    pid_t pid = launch(way);
    await_forks(2);
    put(&board->value, how);
    tell(pid, SIGHUP);
    AWAIT(get(&board->held) > 0);
    tell(pid, SIGTERM);
    AWAIT(is_refused());
    static const int steps[] = {0, 31000, 30000};
    for (int i = 0; i < 3 && get(&board->results) == 0; i++) {
        advance(pid, steps[i]);
        check_rests();
    }
    advance_until_end(pid);
    check_no_child();
    CHECK_INT(board->results, 1);
}

TEST_ONCE(a_stop_during_a_reload_that_hangs_before_its_loop_does_not_spin)
{
    way = program_behaves;
    stop_in_reload(HANGS_DEAF);
}

TEST_ONCE(a_stop_during_a_reload_that_hangs_in_its_loop_does_not_spin)
{
    way = program_behaves_in_start;
    stop_in_reload(HANGS_DEAF);
}

/* A stop while a worker waits for its back-off: nothing is forked any more. */
TEST_ONCE(a_stop_during_a_back_off_ends_at_once)
{
    begin(2);
    put(&board->value, EXITS_1);
    pid_t pid = launch(program_behaves);
    await_exits(4);
    tell(pid, SIGTERM);
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(exits_seen(), get(&board->held));
}

/* The log says how long workers have. */
TEST_ONCE(a_stop_says_how_long_it_may_take)
{
    static const struct {
        int grace_ms;
        const char *text;
    } graces[] = {{0, "workers have 30000 ms to end"}, {1234, "workers have 1234 ms to end"},
                  {TSRV_NEVER, "workers have any time to end"}};
    for (int i = 0; i < 3; i++) {
        begin(2);
        fork_options.grace_ms = graces[i].grace_ms;
        pid_t pid = launch(program_serve);
        await_forks(2);
        stop_well(pid, TSRV_OK);
        CHECK_INT(said(graces[i].text), 1);
    }
}

TEST_ONCE(an_idle_parent_sleeps)
{
    begin(2);
    fork_options.heartbeat_ms = 10000;
    pid_t pid = launch(program_serve);
    await_forks(2);
    check_rests();
    stop_well(pid, TSRV_OK);
}

/* ---- a pause of the whole tree -------------------------------------------------------------*/

/* Frozen and continued an hour later, the parent first: no worker is to blame. */
TEST_LOOP(workers_survive_a_pause_of_the_whole_tree)
{
    begin(2);
    fork_options.heartbeat_ms = 20000;
    pid_t pid = launch(program_serve);
    await_forks(2);
    int fd = start_request();
    for (int round = 0; round < 2; round++) {
        tell(pid, SIGSTOP);
        tell(board->pids[0], SIGSTOP);
        tell(board->pids[1], SIGSTOP);
        oversleep();
        tell(pid, SIGCONT);
        poke(pid); /* it sees how late everybody is */
        check_rests();
        tell(board->pids[0], SIGCONT);
        tell(board->pids[1], SIGCONT);
        for (int i = 0; i < 5; i++) {
            poke(pid);
            check_served();
        }
        CHECK_INT(exits_seen(), 0);
    }
    finish_request(fd);
    stop_well(pid, TSRV_OK);
}

/* A machine that slept: all clocks are ahead by hours at once. */
TEST_LOOP(a_jump_of_the_clock_makes_no_worker_hung)
{
    begin(2);
    fork_options.heartbeat_ms = 20000;
    pid_t pid = launch(program_serve);
    await_forks(2);
    for (int i = 0; i < 3; i++) {
        oversleep();
        poke(pid);
        check_served();
        check_rests();
    }
    CHECK_INT(exits_seen(), 0);
    stop_well(pid, TSRV_OK);
}

/* Who hangs is still found after it. */
TEST_ONCE(a_worker_that_hangs_after_a_pause_is_replaced)
{
    long who = 0;
    begin(2);
    fork_options.heartbeat_ms = 1000 * t_scale();
    pid_t pid = launch(program_serve);
    await_forks(2);
    int fd = connect_to(0, &who);
    t_sends(fd, "hang\n");
    oversleep();
    AWAIT(has_exited((pid_t)who));
    t_close(fd);
    t_close(connect_to(0, &who));
    stop_well(pid, TSRV_OK);
}

static void start_when_told(tsrv_server *server, void *context)
{
    __atomic_add_fetch(&board->held, 1, __ATOMIC_ACQ_REL);
    while (get(&board->go) == 0) {
        poll(NULL, 0, 1);
    }
    on_start(server, context);
}

/* on_start has start_timeout_ms; from its end on the loop has to turn, also before its first beat is due. */
TEST_LOOP(a_slow_start_is_not_taken_for_a_hang)
{
    long who = 0;
    begin(2);
    fork_options.heartbeat_ms = 1000 * t_scale();
    fork_options.start_timeout_ms = TSRV_NEVER;
    server_options.on_start = start_when_told;
    pid_t pid = launch(program_serve);
    AWAIT(get(&board->held) == 2);
    advance(pid, 20 * fork_options.heartbeat_ms);
    put(&board->go, 1);
    await_forks(2);
    CHECK_INT(exits_seen(), 0);
    int fd = connect_to(0, &who);
    t_sends(fd, "hang\n");
    AWAIT(has_exited((pid_t)who));
    CHECK_INT(said("hangs: its loop has not turned"), 1);
    t_close(fd);
    stop_well(pid, TSRV_OK);
}

static void turn_by_hand(void)
{
    while (tsrv_loop_run_once(NULL, TSRV_NEVER) > 0) {
    }
}

/* A worker may turn its loop itself: it is ready when it accepts, and nobody expects it to say that it turns. */
TEST_LOOP(workers_that_turn_their_loops_by_hand_are_ready)
{
    begin(2);
    fork_options.heartbeat_ms = 1000 * t_scale();
    before_loop = turn_by_hand;
    pid_t pid = launch(program_bind_start);
    await_forks(2);
    reload(pid);
    AWAIT(is_settled());
    CHECK_INT(exits_seen(), 2);
    advance(pid, 20 * fork_options.heartbeat_ms);
    check_served();
    CHECK_INT(exits_seen(), 2);
    stop_well(pid, TSRV_EPARENT);
}

/* ---- a reload of workers that always end ----------------------------------------------------*/

/* Both workers end at once, until it takes them long to be started again. Returns how many have ended. */
static int wear_out(pid_t pid)
{
    enum { ROUNDS = 8 };
    for (int k = 1; k <= ROUNDS; k++) {
        AWAIT(exits_seen() >= 2 * k || (advance(pid, STEP_MS), false));
    }
    poke(pid);
    return exits_seen();
}

/* What made them end has been repaired: they are started at once, and the reload is over when they accept. */
TEST_ONCE(a_reload_starts_workers_that_wait_to_be_started)
{
    begin(2);
    fork_options.max_restarts = TSRV_NEVER;
    server_options.on_start = behave_in_start;
    put(&board->value, EXITS_1);
    pid_t pid = launch(program_serve);
    int ended = wear_out(pid);
    put(&board->value, IS_SLOW);
    int64_t start = t_now_ms();
    tell(pid, SIGHUP);
    AWAIT(get(&board->held) == ended + 2);
    CHECK(t_now_ms() - start < 10000);
    poke(pid);
    CHECK_INT(said("reload: done"), 0);
    put(&board->go, 1);
    await_forks(2);
    AWAIT(said("reload: done, all 2 workers are new") == 1);
    CHECK_INT(exits_seen(), ended);
    stop_well(pid, TSRV_OK);
}

/* It has not been: the reload is over, and says so. */
TEST_ONCE(a_reload_of_workers_that_end_again_says_so)
{
    begin(2);
    fork_options.max_restarts = TSRV_NEVER;
    server_options.on_start = behave_in_start;
    put(&board->value, EXITS_1);
    pid_t pid = launch(program_serve);
    int ended = wear_out(pid);
    tell(pid, SIGHUP);
    AWAIT(said("reload: over, but 2 of 2 workers do not come up") == 1);
    CHECK(exits_seen() >= ended + 2);
    CHECK_INT(said("reload: done"), 0);
    put(&board->value, IS_FINE);
    tell(pid, SIGHUP);
    AWAIT(said("reload: done, all 2 workers are new") == 1);
    stop_well(pid, TSRV_OK);
}

/* ---- loops in several threads --------------------------------------------------------------*/

enum { END_SLOWLY = -1 }; /* board->go: the turn in which the first of the loops ends lasts until it is another */

static void end_slowly(tsrv_stream *stream, int reason, void *context)
{
    (void)stream, (void)reason, (void)context;
    if (get(&board->go) == END_SLOWLY && __atomic_fetch_add(&board->held, 1, __ATOMIC_ACQ_REL) == 0) {
        tsrv_loop_stop(NULL);
        while (get(&board->go) == END_SLOWLY) {
            poll(NULL, 0, 1);
        }
    }
}

static void *run_a_loop(void *context)
{
    tsrv_loop *loop = t_new_loop();
    tsrv_server_options options;
    tsrv_server *server;
    tsrv_address address;
    memset(&options, 0, sizeof options);
    options.mode = t_mode;
    options.handle_stream = serve_lines;
    options.on_close = end_slowly;
    options.loop = loop;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    CHECK_INT(tsrv_server_listen(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
    put((int *)context, tsrv_address_port(&address));
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    __atomic_add_fetch(&board->value, 1, __ATOMIC_ACQ_REL);
    tsrv_server_free(server);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    return NULL;
}

static int two_loops(void)
{
    pthread_t threads[2];
    int *ports[2] = {&board->port, &board->second_port};
    for (int i = 0; i < 2; i++) {
        CHECK_INT(pthread_create(&threads[i], NULL, run_a_loop, ports[i]), 0);
    }
    for (int i = 0; i < 2; i++) {
        CHECK_INT(pthread_join(threads[i], NULL), 0);
    }
    return TSRV_OK;
}

static void start_two_loops(pid_t *pid, int *fds)
{
    begin(1);
    bare_worker = two_loops;
    *pid = launch(program_bare);
    AWAIT(get(&board->port) != 0 && get(&board->second_port) != 0);
    fds[0] = start_request();
    board->port = board->second_port;
    fds[1] = start_request();
}

TEST_LOOP(every_loop_of_a_worker_drains)
{
    static const int signals[] = {SIGTERM, SIGINT, SIGQUIT};
    int fds[2];
    pid_t pid;
    for (int i = 0; i < 3; i++) {
        start_two_loops(&pid, fds);
        tell(pid, signals[i]);
        AWAIT(is_refused());
        finish_request(fds[0]);
        finish_request(fds[1]);
        check_end(pid, 0, TSRV_EPARENT);
        CHECK_INT(board->value, 2);
        check_exits_are_good();
    }
}

TEST_LOOP(every_loop_of_a_worker_that_is_told_itself_drains)
{
    int fds[2];
    pid_t pid;
    start_two_loops(&pid, fds);
    tell(board->pids[0], SIGTERM);
    AWAIT(is_refused());
    finish_request(fds[0]);
    finish_request(fds[1]);
    await_exits(1);
    CHECK_INT(board->value, 2);
    check_exits_are_good();
    kill(pid, SIGTERM); /* without a server of tsrv_server_start's it may be over */
    CHECK_INT(await_end(pid), 0);
    check_no_child();
}

TEST_LOOP(every_loop_of_a_worker_ends_with_the_parent)
{
    int fds[2];
    pid_t pid;
    start_two_loops(&pid, fds);
    tell(pid, SIGKILL);
    AWAIT(no_child_left(NULL));
    CHECK_INT(board->value, 2);
    t_close_all(fds, 2);
}

/* The second signal ends the grace of every loop. */
TEST_LOOP(a_second_signal_ends_the_grace_of_every_loop)
{
    int fds[2];
    pid_t pid;
    fork_options.grace_ms = NEVER_DUE_MS;
    start_two_loops(&pid, fds);
    tell(pid, SIGTERM);
    AWAIT(is_refused());
    tell(pid, SIGTERM);
    check_cut(fds[0]);
    check_cut(fds[1]);
    check_end(pid, 0, TSRV_EPARENT);
}

/* Also of one that outlives the others: whichever of the two loops was the first, which listens to the
 * parent, the other one takes its place. */
TEST_LOOP(a_second_signal_ends_the_grace_of_the_last_loop)
{
    for (int first = 0; first < 2; first++) {
        int fds[2];
        pid_t pid;
        fork_options.grace_ms = NEVER_DUE_MS;
        start_two_loops(&pid, fds);
        tell(pid, SIGTERM);
        AWAIT(is_refused());
        finish_request(fds[first]);
        AWAIT(get(&board->value) == 1);
        tell(pid, SIGTERM);
        check_cut(fds[1 - first]);
        check_end(pid, 0, TSRV_EPARENT);
        check_exits_are_good();
    }
}

/* Also if it comes in the last turn of that one. */
TEST_LOOP(a_second_signal_in_the_last_turn_of_a_loop_is_the_next_ones)
{
    for (int first = 0; first < 2; first++) {
        int fds[2];
        pid_t pid;
        fork_options.grace_ms = NEVER_DUE_MS;
        start_two_loops(&pid, fds);
        tell(pid, SIGTERM);
        AWAIT(said("drain: begins") == 2); /* and nobody else has connected, whose end would be the first */
        put(&board->go, END_SLOWLY);
        finish_request(fds[first]);
        AWAIT(get(&board->held) == 1);
        tell(pid, SIGTERM);
        AWAIT(said("stopping: told again, the grace is over") == 1);
        poke(pid);
        put(&board->go, 1);
        check_cut(fds[1 - first]);
        check_end(pid, 0, TSRV_EPARENT);
        check_exits_are_good();
    }
}

/* A signal that is sent to the worker itself then makes the others drain, and ends nothing at once. */
TEST_LOOP(a_signal_in_the_last_turn_of_a_loop_makes_the_next_ones_drain)
{
    for (int first = 0; first < 2; first++) {
        int fds[2];
        pid_t pid;
        fork_options.grace_ms = NEVER_DUE_MS;
        start_two_loops(&pid, fds);
        put(&board->go, END_SLOWLY);
        finish_request(fds[first]);
        AWAIT(get(&board->held) == 1);
        tell(board->pids[0], SIGTERM);
        put(&board->go, 1);
        AWAIT(said("drain: begins") >= 1);
        finish_request(fds[1 - first]);
        await_exits(1);
        CHECK_INT(board->value, 2);
        check_exits_are_good();
        kill(pid, SIGTERM); /* without a server of tsrv_server_start's it may be over */
        CHECK_INT(await_end(pid), 0);
        check_no_child();
    }
}

/* A loop that is run again is told too. */
static int program_runs_twice(void)
{
    tsrv_server *server = new_bound_server();
    int rc = tsrv_server_start(server, workers, &fork_options);
    if (rc == TSRV_OK) {
        for (int i = 0; i < 3; i++) {
            CHECK_INT(tsrv_loop_post(NULL, t_stop_loop, tsrv_loop_current()), TSRV_OK);
            CHECK_INT(tsrv_loop_run(NULL), TSRV_OK);
        }
        note_worker();
        rc = tsrv_loop_run(NULL);
    }
    tsrv_server_free(server);
    return rc;
}

static void nothing_in_start(tsrv_server *server, void *context)
{
    (void)server, (void)context;
}

TEST_LOOP(a_loop_that_runs_again_drains)
{
    begin(2);
    server_options.on_start = nothing_in_start;
    pid_t pid = launch(program_runs_twice);
    await_forks(2);
    int fd = start_request();
    tell(pid, SIGTERM);
    AWAIT(is_refused());
    finish_request(fd);
    check_end(pid, 0, TSRV_EPARENT);
}

/* ---- told twice in an upgrade --------------------------------------------------------------*/

static int predecessor[2];

/* As an upgrade starts a program: the test waits at the other end of a pipe until it serves. */
static void have_predecessor(void)
{
    char number[24];
    CHECK(pipe(predecessor) == 0);
    CHECK(fcntl(predecessor[0], F_SETFL, O_NONBLOCK) == 0);
    snprintf(number, sizeof number, "%d", predecessor[1]);
    CHECK(setenv("TSRV_READY_FD", number, 1) == 0);
}

/* The second worker does not come up. */
static void start_one(tsrv_server *server, void *context)
{
    on_start(server, context);
    while (tsrv_task_id() == 1) {
        poll(NULL, 0, 1000);
    }
}

/* A stop of all processes reaches a new program twice, as the old one passes it on: the grace is not cut. */
TEST_LOOP(a_stop_that_the_program_before_passes_on_is_not_the_second)
{
    begin(2);
    have_predecessor();
    server_options.on_start = start_one;
    pid_t pid = launch(program_serve);
    await_forks(2);
    int fd = start_request();
    tell(pid, SIGTERM);
    AWAIT(said("stopping: no new connections") == 1);
    tell(pid, SIGTERM);
    AWAIT(said("stopping: ") == 2);
    CHECK_INT(said("told again"), 0);
    finish_request(fd);
    check_end(pid, 0, TSRV_OK);
    t_close_all(predecessor, 2);
}

static void be_told_in_start(tsrv_server *server, void *context)
{
    on_start(server, context);
    AWAIT(get(&board->go) == 1);
    CHECK(raise(SIGTERM) == 0);
}

/* The same in a single process; and as it ends, the program before it is not told that it serves. */
TEST_LOOP(a_single_process_that_is_stopped_in_an_upgrade_is_not_relied_on)
{
    char byte;
    begin(1);
    have_predecessor();
    server_options.on_start = be_told_in_start;
    pid_t pid = launch(program_serve);
    await_forks(1);
    int fd = reach();
    t_sends(fd, "unfin");
    put(&board->go, 1);
    AWAIT(said("drain: begins, 1 connections") == 1);
    tell(pid, SIGTERM);
    poll(NULL, 0, 20); /* that it has seen it; if not, the test is easier */
    __atomic_add_fetch(&board->ahead_ns, (int64_t)3000 * 1000000, __ATOMIC_ACQ_REL);
    for (int i = 0; i < 3; i++) { /* in turns of its loop */
        t_sends(fd, "ished\nunfin");
        t_expect(fd, "unfinished\n");
    }
    finish_request(fd);
    check_end(pid, 0, TSRV_OK);
    CHECK_INT(read(predecessor[0], &byte, 1), -1);
    t_close_all(predecessor, 2);
}

/* ---- what a worker forks -------------------------------------------------------------------*/

static tsrv_timer until_told;

/* Stops the loop when board->go is set. */
static void wait_for_go(void *unused)
{
    (void)unused;
    if (get(&board->go) == 1) {
        tsrv_loop_stop(NULL);
    } else {
        CHECK_INT(tsrv_timer_start(NULL, &until_told, 5, wait_for_go, NULL), TSRV_OK);
    }
}

static void count_helper(void *unused)
{
    (void)unused;
    __atomic_add_fetch(&board->held, 1, __ATOMIC_ACQ_REL);
}

/* With a loop of its own; it is no worker, and no program of these tests. */
static void fork_helper(void)
{
    in_program = false;
    pid_t pid = fork();
    in_program = true;
    if (pid == 0) {
        tsrv_loop *loop;
        CHECK_INT(tsrv_loop_new(&loop, NULL), TSRV_OK);
        CHECK_INT(tsrv_loop_post(loop, count_helper, NULL), TSRV_OK);
        CHECK_INT(tsrv_timer_start(loop, &until_told, 0, wait_for_go, NULL), TSRV_OK);
        CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
        CHECK_INT(tsrv_task_id(), -1);
        _exit(0);
    }
}

/* What the parent says is for the worker, and not for its child, which goes on. */
TEST_LOOP(a_workers_child_with_a_loop_does_not_hear_what_the_worker_is_told)
{
    begin(2);
    fork_options.grace_ms = 1000;
    before_loop = fork_helper;
    pid_t pid = launch(program_bind_start);
    await_forks(2);
    AWAIT(get(&board->held) == 2);
    tell(pid, SIGTERM);
    await_exits(2);
    check_exits_are_good();
    put(&board->go, 1);
    CHECK_INT(await_end(pid), 0);
    AWAIT(no_child_left(NULL));
}

/* In a child of a worker that has no loop. */
static int in_a_child(int (*program)(void))
{
    int status = 0;
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
    in_program = false;
    pid_t pid = fork();
    in_program = true;
    if (pid == 0) {
        _exit(program() == TSRV_OK ? 0 : 1);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK_INT(status, 0);
    return TSRV_OK;
}

/* As if it had closed all that it has inherited, and opened files of its own. */
static int opens_files(void)
{
    enum { FILES = 64 };
    tsrv_loop *loop;
    int null = open("/dev/null", O_RDWR), rc;
    for (int fd = 3; fd < FILES; fd++) {
        CHECK_INT(dup2(null, fd), fd);
    }
    rc = tsrv_loop_new(&loop, NULL);
    for (int fd = 3; fd < FILES && rc == TSRV_OK; fd++) {
        rc = fcntl(fd, F_GETFD) < 0 ? -errno : TSRV_OK;
    }
    return rc;
}

static int opens_files_in_a_child(void)
{
    return in_a_child(opens_files);
}

/* The numbers that the worker's life-line and pipe had are other files' there. */
TEST_ONCE(a_workers_child_that_makes_a_loop_keeps_its_files)
{
    begin(1);
    fork_options.max_restarts = 1;
    bare_worker = opens_files_in_a_child;
    check_end(launch(program_bare), 0, TSRV_EPARENT);
}

static void tell_self_in_start(tsrv_server *server, void *context)
{
    (void)server, (void)context;
    CHECK_INT(kill(getpid(), SIGTERM), 0);
}

static int serves_alone(void)
{
    server_options.on_start = tell_self_in_start;
    server_options.handle_stream = serve_lines;
    return tsrv_serve(0, "127.0.0.1", 1, &server_options);
}

static int serves_in_a_child(void)
{
    return in_a_child(serves_alone);
}

/* It is a single process, and drains when it is told to. */
TEST_ONCE(a_workers_child_serves_alone)
{
    begin(1);
    fork_options.max_restarts = 1;
    bare_worker = serves_in_a_child;
    check_end(launch(program_bare), 0, TSRV_EPARENT);
}

static int forks_workers(void)
{
    int rc = tsrv_fork_processes(1, NULL);
    return rc == TSRV_EPARENT ? TSRV_OK : rc; /* the worker's is 0 */
}

static int forks_workers_in_a_child(void)
{
    return in_a_child(forks_workers);
}

TEST_ONCE(a_workers_child_has_workers_of_its_own)
{
    begin(1);
    fork_options.max_restarts = 1;
    bare_worker = forks_workers_in_a_child;
    check_end(launch(program_bare), 0, TSRV_EPARENT);
}

/* Its loop ends once while connections are open, and a child frees its copy of the server. */
static int program_forks_between_loops(void)
{
    tsrv_server *server = new_bound_server();
    int rc = tsrv_server_start(server, workers, &fork_options), status = 0;
    if (rc == TSRV_OK) {
        CHECK_INT(tsrv_timer_start(NULL, &until_told, 0, wait_for_go, NULL), TSRV_OK);
        CHECK_INT(tsrv_loop_run(NULL), TSRV_OK);
        in_program = false;
        pid_t pid = fork();
        in_program = true;
        if (pid == 0) {
            tsrv_server_free(server);
            _exit(0);
        }
        CHECK(waitpid(pid, &status, 0) == pid && status == 0);
        rc = tsrv_loop_run(NULL);
    }
    tsrv_server_free(server);
    return rc;
}

/* What workers count is shared with their children: a copy of a server does not count any more. */
TEST_LOOP(a_workers_child_that_frees_its_server_does_not_count)
{
    char line[64];
    begin(2);
    server_options.on_start = on_start;
    pid_t pid = launch(program_forks_between_loops);
    await_forks(2);
    int fd = start_request();
    put(&board->go, 1);
    t_sends(fd, "\n");
    CHECK(read_line(fd, line, sizeof line));
    t_sends(fd, "own\n");
    CHECK(read_line(fd, line, sizeof line));
    CHECK_STR(line, "1 1\n");
    t_close(fd);
    stop_well(pid, TSRV_EPARENT);
}

/* ---- a loop that has ended -----------------------------------------------------------------*/


static bool wants_watch;

/* In the last turn of a worker's loop, which goes on when board->go is set. */
static void end_loop(void *context)
{
    __atomic_add_fetch(&board->held, 1, __ATOMIC_ACQ_REL);
    while (get(&board->go) == 0) {
        poll(NULL, 0, 1);
    }
    tsrv_loop_stop((tsrv_loop *)context);
}

static void count_term(void *context)
{
    (void)context;
    __atomic_add_fetch(&board->value, 1, __ATOMIC_ACQ_REL);
    tsrv_loop_stop(NULL);
}

static void end_loop_told(void *context)
{
    tsrv_loop_stop((tsrv_loop *)context);
    CHECK(raise(SIGTERM) == 0);
}

static tsrv_callback last_turn = end_loop;

/* Its workers do something else when their loops have ended; or, with a watch of their own, run them again. */
static int program_outlives_its_loop(void)
{
    server_options.on_start = nothing_in_start;
    tsrv_server *server = new_bound_server();
    int rc = tsrv_server_start(server, workers, &fork_options);
    if (rc == TSRV_OK) {
        if (wants_watch) {
            CHECK_INT(tsrv_signal_start(NULL, &own_watch, SIGTERM, count_term, NULL), TSRV_OK);
        }
        CHECK_INT(tsrv_loop_post(NULL, last_turn, tsrv_loop_current()), TSRV_OK);
        CHECK_INT(tsrv_loop_run(NULL), TSRV_OK);
        note_worker();
        rc = wants_watch ? tsrv_loop_run(NULL) : sleeps();
        tsrv_signal_stop(&own_watch);
    }
    tsrv_server_free(server);
    return rc;
}

/* Who has no loop any more is told by the signal itself. */
TEST_LOOP(a_worker_whose_loop_has_ended_ends_with_a_stop)
{
    begin(2);
    fork_options.grace_ms = NEVER_DUE_MS;
    put(&board->go, 1);
    pid_t pid = launch(program_outlives_its_loop);
    await_forks(2);
    stop_well(pid, TSRV_EPARENT);
    for (int i = 0; i < 2; i++) {
        CHECK_INT(board->exit[i].status, SIGTERM);
    }
}

/* The stop comes when the loop will not look at the life-line any more. */
static void stop_in_the_last_turn(void)
{
    begin(2);
    fork_options.grace_ms = NEVER_DUE_MS;
    pid_t pid = launch(program_outlives_its_loop);
    AWAIT(get(&board->held) == 2);
    poke(pid);
    tell(pid, SIGTERM);
    AWAIT(said("stopping: no new connections") == 1);
    poke(pid);
    put(&board->go, 1);
    check_end(pid, 0, TSRV_EPARENT);
}

TEST_LOOP(a_stop_in_the_last_turn_of_a_loop_is_not_lost)
{
    stop_in_the_last_turn();
    for (int i = 0; i < 2; i++) {
        CHECK_INT(board->exit[i].status, SIGTERM);
    }
    wants_watch = true;
    stop_in_the_last_turn();
    check_exits_are_good();
    CHECK_INT(board->value, 2);
}

/* Neither is a signal that is sent to the worker itself then: it has its own effect. */
TEST_LOOP(a_signal_in_the_last_turn_of_a_loop_is_not_lost)
{
    begin(2);
    fork_options.max_restarts = 1;
    last_turn = end_loop_told;
    check_end(launch(program_outlives_its_loop), 1, TSRV_ERESTARTS);
    for (int i = 0; i < exits_seen(); i++) {
        CHECK_INT(board->exit[i].status, SIGTERM);
    }
}

/* SIGUSR1 ends the loops of its workers. */
static int program_with_an_end(void)
{
    server_options.on_start = on_start;
    tsrv_server *server = new_bound_server();
    int rc = tsrv_server_start(server, workers, &fork_options);
    if (rc == TSRV_OK) {
        CHECK_INT(tsrv_signal_start(NULL, &own_watch, SIGUSR1, end_loop, NULL), TSRV_OK);
        rc = tsrv_loop_run(NULL);
        tsrv_signal_stop(&own_watch);
    }
    tsrv_server_free(server);
    return rc;
}

/* Who drains already has been told: what it does after its loop is not cut. */
TEST_LOOP(a_stop_in_the_last_turn_of_a_drain_cuts_nothing)
{
    long who = 0;
    begin(2);
    fork_options.grace_ms = NEVER_DUE_MS;
    pid_t pid = launch(program_with_an_end);
    await_forks(2);
    int fd = connect_to(0, &who);
    t_sends(fd, "unfin");
    tell((pid_t)who, SIGTERM);
    AWAIT(said("drain: begins") == 1);
    tell((pid_t)who, SIGUSR1);
    AWAIT(get(&board->held) == 1);
    tell(pid, SIGTERM);
    AWAIT(said("stopping: no new connections") == 1);
    poke(pid);
    put(&board->go, 1);
    check_cut(fd);
    check_end(pid, 0, TSRV_EPARENT);
    check_exits_are_good();
}

/* ---- tsrv_serve in a worker ----------------------------------------------------------------*/

static void note_port_in_start(tsrv_server *server, void *context)
{
    (void)context;
    note_port(server);
}

static int serves_in_worker(void)
{
    server_options.mode = t_mode;
    server_options.handle_stream = serve_lines;
    server_options.on_start = note_port_in_start;
    return tsrv_serve(0, "127.0.0.1", 1, &server_options);
}

/* A single process that is a worker has a parent, whom it obeys. */
TEST_LOOP(serve_in_a_bare_worker_ends_with_the_parents_stop)
{
    for (int i = 0; i < 2; i++) {
        begin(1);
        fork_options.grace_ms = NEVER_DUE_MS;
        fork_options.start_timeout_ms = 5000;
        bare_worker = serves_in_worker;
        pid_t pid = launch(program_bare);
        AWAIT(get(&board->port) != 0);
        int fd = start_request();
        advance(pid, 6000); /* it has said in time that it accepts */
        CHECK_INT(exits_seen(), 0);
        if (i == 0) {
            tell(pid, SIGTERM);
            AWAIT(is_refused());
            finish_request(fd);
            check_end(pid, 0, TSRV_EPARENT);
            check_exits_are_good();
        } else {
            tell(pid, SIGKILL);
            check_cut(fd);
            AWAIT(no_child_left(NULL));
        }
    }
}

/* The loops of other threads are no business of tsrv_serve's in a single process. */
static void *run_until_stopped(void *context)
{
    CHECK_INT(tsrv_loop_run((tsrv_loop *)context), TSRV_OK);
    return NULL;
}

static tsrv_timer ticks;

static void count_tick(void *context)
{
    __atomic_add_fetch(&board->value, 1, __ATOMIC_ACQ_REL);
    CHECK_INT(tsrv_timer_start((tsrv_loop *)context, &ticks, 2, count_tick, context), TSRV_OK);
}

static tsrv_loop *other_loop;
static pthread_t other_thread;

static void run_other_in_start(tsrv_server *server, void *context)
{
    CHECK_INT(pthread_create(&other_thread, NULL, run_until_stopped, other_loop), 0);
    on_start(server, context);
}

static int program_serves_beside_a_loop(void)
{
    other_loop = t_new_loop();
    CHECK_INT(tsrv_timer_start(other_loop, &ticks, 2, count_tick, other_loop), TSRV_OK);
    server_options.on_start = run_other_in_start;
    int rc = program_serve();
    CHECK_INT(tsrv_loop_post(other_loop, t_stop_loop, other_loop), TSRV_OK); /* it runs still */
    CHECK_INT(pthread_join(other_thread, NULL), 0);
    tsrv_timer_stop(&ticks);
    CHECK_INT(tsrv_loop_free(other_loop), TSRV_OK);
    return rc;
}

TEST_LOOP(serve_in_one_process_leaves_other_loops_alone)
{
    begin(1);
    pid_t pid = launch(program_serves_beside_a_loop);
    await_forks(1);
    AWAIT(get(&board->value) > 0);
    int fd = start_request();
    tell(pid, SIGTERM);
    AWAIT(is_refused());
    int before = get(&board->value);
    AWAIT(get(&board->value) >= before + 3);
    finish_request(fd);
    check_end(pid, 0, TSRV_OK);
}

static int goes;

/* Goes on, whatever happens: its server's end is nothing to it. */
static int go_on_and_on(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    for (put(&board->held, 1); get(&board->go) == 0;) {
        tsrv_sleep(50);
    }
    put(&board->value, 1);
    return TSRV_OK;
}

/* The loop is the program's, which can use it for something else afterwards: for a last turn of that handler. */
static int program_serves_in_its_own_loop(void)
{
    tsrv_loop *loop = tsrv_loop_current();
    server_options.handle_stream = go_on_and_on;
    server_options.on_start = on_start;
    int rc = tsrv_serve(0, "127.0.0.1", 1, &server_options);
    CHECK_INT(get(&board->value), 0);
    put(&board->go, goes);
    CHECK(tsrv_loop_current() == loop);
    if (goes) {
        CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
        CHECK_INT(get(&board->value), 1);
    }
    return rc;
}

/* A handler that does not end after the grace is not waited for, in no loop. */
TEST_COROUTINE(serve_in_a_loop_of_the_programs_ends_after_a_forced_drain)
{
    for (goes = 0; goes < 2; goes++) {
        begin(1);
        pid_t pid = launch(program_serves_in_its_own_loop);
        await_forks(1);
        int fd = reach();
        AWAIT(get(&board->held) == 1);
        tell(pid, SIGTERM);
        AWAIT(said("drain: begins") == 1);
        tell(pid, SIGTERM);
        check_end(pid, 0, TSRV_OK);
        t_close(fd);
    }
}

/* ---- one tsrv_serve at a time --------------------------------------------------------------*/

static int second_count;

static void *serve_too(void *context)
{
    tsrv_server_options options;
    (void)context;
    memset(&options, 0, sizeof options);
    options.handle_stream = serve_lines;
    put(&board->value, tsrv_serve(0, "127.0.0.1", second_count, &options));
    return NULL;
}

static pthread_t second_thread;

static void start_second(tsrv_server *server, void *context)
{
    on_start(server, context);
    CHECK_INT(pthread_create(&second_thread, NULL, serve_too, NULL), 0);
}

/* When it is over, it can be called again. */
static int program_serve_in_two_threads(void)
{
    server_options.on_start = start_second;
    int rc = program_serve();
    CHECK_INT(pthread_join(second_thread, NULL), 0);
    if (rc == TSRV_OK) {
        CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
        server_options.on_start = on_start;
        board->port = 0;
        rc = program_serve();
    }
    return rc;
}

TEST_LOOP(serve_is_refused_while_another_thread_serves)
{
    for (second_count = 1; second_count <= 2; second_count++) {
        begin(1);
        pid_t pid = launch(program_serve_in_two_threads);
        await_forks(1);
        AWAIT(get(&board->value) != 0);
        CHECK_INT(board->value, TSRV_EBUSY);
        check_served();
        tell(pid, SIGTERM);
        await_forks(2);
        AWAIT(get(&board->port) != 0);
        check_served();
        stop_well(pid, TSRV_OK);
    }
}

/* ---- counters ------------------------------------------------------------------------------*/

/* Of one process, which has accepted nothing yet. */
static void check_own_counts(void)
{
    char line[100];
    int rc = -1, accepted = 0, open = 0, own_accepted = 0, own_open = 0;
    check_served();
    int fd = reach();
    t_sends(fd, "stats -1\n");
    CHECK(read_line(fd, line, sizeof line));
    CHECK_INT(sscanf(line, "%d %d %d", &rc, &accepted, &open), 3);
    t_sends(fd, "own\n");
    CHECK(read_line(fd, line, sizeof line));
    CHECK_INT(sscanf(line, "%d %d", &own_accepted, &own_open), 2);
    CHECK_INT(rc, TSRV_OK);
    CHECK_INT(accepted, 2);
    CHECK_INT(accepted, own_accepted);
    CHECK(open >= own_open);
    t_sends(fd, "stats 0\n"); /* there is no worker */
    CHECK(read_line(fd, line, sizeof line));
    CHECK_INT(atoi(line), TSRV_EINVAL);
    t_sends(fd, "stats -2\n");
    CHECK(read_line(fd, line, sizeof line));
    CHECK_INT(atoi(line), TSRV_EINVAL);
    t_close(fd);
}

static void check_sum_is_own(int (*program)(void))
{
    begin(1);
    pid_t pid = launch(program);
    await_forks(1);
    check_own_counts();
    tell(pid, program == program_serve ? SIGTERM : SIGKILL);
    int status = await_end(pid);
    CHECK(program != program_serve || status == 0);
}

TEST_LOOP(the_sum_of_all_counts_a_single_process)
{
    check_sum_is_own(program_serve);
    check_sum_is_own(program_bind_start);
}

static int program_serves_with_workers_and_then_alone(void)
{
    int rc = program_serve();
    if (tsrv_task_id() < 0) {
        CHECK_INT(rc, TSRV_OK);
        put(&board->port, 0);
        workers = 1;
        rc = program_serve();
    }
    return rc;
}

/* What workers have counted that have been is not what a process counts by itself. */
TEST_LOOP(a_single_process_does_not_count_what_workers_did)
{
    begin(2);
    pid_t pid = launch(program_serves_with_workers_and_then_alone);
    await_forks(2);
    check_served();
    check_served();
    tell(pid, SIGTERM);
    await_forks(3);
    check_own_counts();
    stop_well(pid, TSRV_OK);
}

/* ---- how tsrv_serve binds ------------------------------------------------------------------*/

enum { FACT_FAMILY, FACT_BACKLOG, FACT_REUSE, FACTS };

/* What the process listens on. */
static void note_listeners(tsrv_server *server, void *context)
{
    int count = 0;
    for (int fd = 0; fd < T_MAX_FD; fd++) {
        int on = 0;
        struct sockaddr_storage name;
        struct tcp_info info;
        socklen_t size = sizeof on, name_size = sizeof name, info_size = sizeof info;
        if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &on, &size) != 0 || !on) {
            continue;
        }
        CHECK(getsockname(fd, (struct sockaddr *)&name, &name_size) == 0);
        CHECK(count < 8);
        int *fact = board->facts + FACTS * count++;
        fact[FACT_FAMILY] = name.ss_family;
        if (name.ss_family != AF_UNIX) {
            CHECK(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &info_size) == 0);
            fact[FACT_BACKLOG] = (int)info.tcpi_sacked; /* of a listener: the most */
            fact[FACT_REUSE] = t_socket_option(fd, SOL_SOCKET, SO_REUSEPORT);
        }
    }
    put(&board->fact_count, count);
    on_start(server, context);
}

static int program_serve_localhost(void)
{
    server_options.mode = t_mode;
    server_options.handle_stream = serve_lines;
    server_options.on_start = note_listeners;
    server_options.fork = &fork_options;
    return tsrv_serve(0, "localhost", workers, &server_options);
}

TEST_ONCE(serve_binds_as_it_is_told)
{
    for (int count = 1; count <= 2; count++) {
        begin(count);
        bind_options.family = AF_INET;
        bind_options.backlog = 17;
        bind_options.reuse_port = true;
        server_options.bind = &bind_options;
        pid_t pid = launch(program_serve_localhost);
        await_forks(count);
        check_served();
        CHECK_INT(board->fact_count, 1);
        CHECK_INT(board->facts[FACT_FAMILY], AF_INET);
        CHECK_INT(board->facts[FACT_BACKLOG], 17);
        CHECK_INT(board->facts[FACT_REUSE], 1);
        stop_well(pid, TSRV_OK);
    }
    begin(1);
    server_options.bind = NULL; /* the defaults */
    pid_t pid = launch(program_serve_localhost);
    await_forks(1);
    CHECK_INT(board->facts[FACT_BACKLOG], 128);
    CHECK_INT(board->facts[FACT_REUSE], 0);
    stop_well(pid, TSRV_OK);
}

TEST_ONCE(serve_gives_a_unix_socket_its_mode)
{
    struct stat info;
    use_unix_socket();
    for (int count = 1; count <= 2; count++) {
        begin(count);
        bind_options.unix_mode = 0640;
        server_options.bind = &bind_options;
        pid_t pid = launch(program_serve);
        await_forks(count);
        CHECK(stat(unix_path, &info) == 0);
        CHECK_INT(info.st_mode & 0777, 0640);
        stop_well(pid, TSRV_OK);
    }
    unix_path = NULL;
    remove_directory();
}

/* ---- the file of a unix socket -------------------------------------------------------------*/

static void check_file(int (*program)(void), int count, int result)
{
    begin(count);
    pid_t pid = launch(program);
    await_forks(count);
    CHECK(access(unix_path, F_OK) == 0);
    if (count > 1) {
        reload(pid);
        AWAIT(is_settled());
        check_served();
        tell(board->pids[2], SIGKILL);
        AWAIT(is_settled() && forks_seen() == 5);
        check_served();
        tell(board->pids[3], SIGTERM);
        AWAIT(is_settled() && forks_seen() == 6);
        check_served();
    }
    stop_well(pid, result);
    CHECK(access(unix_path, F_OK) != 0 && errno == ENOENT);
}

TEST_ONCE(the_file_of_a_unix_socket_goes_with_the_last_process)
{
    use_unix_socket();
    check_file(program_serve, 1, TSRV_OK);
    check_file(program_serve, 2, TSRV_OK);
    check_file(program_bind_start, 2, TSRV_EPARENT);
    unix_path = NULL;
    remove_directory();
}

/* Somebody else has taken the path meanwhile: that file is not ours. */
TEST_ONCE(the_file_of_another_socket_stays)
{
    use_unix_socket();
    for (int count = 1; count <= 2; count++) {
        int other = -1;
        begin(count);
        pid_t pid = launch(program_serve);
        await_forks(count);
        CHECK(unlink(unix_path) == 0);
        CHECK_INT(tsrv_bind_unix_socket(unix_path, NULL, &other), TSRV_OK);
        stop_well(pid, TSRV_OK);
        CHECK(access(unix_path, F_OK) == 0);
        t_close(other);
        unlink(unix_path);
    }
    unix_path = NULL;
    remove_directory();
}

/* ---- another user --------------------------------------------------------------------------*/

enum {
    RIGHTS_UID,
    RIGHTS_EUID,
    RIGHTS_SUID,
    RIGHTS_GID,
    RIGHTS_EGID,
    RIGHTS_SGID,
    RIGHTS_DEATH,
    RIGHTS_TASK,
    RIGHTS_GROUPS
};

/* Who the process is. */
static void note_rights(void)
{
    int *fact = board->facts, death = 0, count;
    uid_t uid[3];
    gid_t gid[3], groups[64];
    CHECK(getresuid(&uid[0], &uid[1], &uid[2]) == 0);
    CHECK(getresgid(&gid[0], &gid[1], &gid[2]) == 0);
    count = getgroups(64, groups);
    CHECK(count >= 0);
    CHECK(prctl(PR_GET_PDEATHSIG, &death, 0, 0, 0) == 0);
    for (int i = 0; i < 3; i++) {
        fact[RIGHTS_UID + i] = (int)uid[i];
        fact[RIGHTS_GID + i] = (int)gid[i];
    }
    fact[RIGHTS_DEATH] = death;
    fact[RIGHTS_TASK] = tsrv_task_id();
    for (int i = 0; i < count; i++) {
        fact[RIGHTS_GROUPS + i] = (int)groups[i];
    }
    put(&board->fact_count, count);
}

static void note_rights_in_start(tsrv_server *server, void *context)
{
    note_rights();
    on_start(server, context);
}

static void stop_in_start(tsrv_server *server, void *context)
{
    note_rights_in_start(server, context);
    tsrv_loop_stop(NULL);
}

static int note_rights_bare(void)
{
    note_rights();
    return sleeps();
}

static void want_root(void)
{
    if (geteuid() != 0) {
        SKIP("root");
    }
    if (getpwnam("nobody") == NULL) {
        SKIP("a user nobody");
    }
}

/* What was noted is nobody, with this group and the supplementary ones that go with both. */
static void check_nobody(gid_t group, bool is_worker)
{
    const struct passwd *nobody = getpwnam("nobody");
    gid_t groups[64];
    int count = 64, *fact = board->facts;
    CHECK(getgrouplist("nobody", group, groups, &count) >= 0);
    for (int i = 0; i < 3; i++) {
        CHECK_INT(fact[RIGHTS_UID + i], nobody->pw_uid);
        CHECK_INT(fact[RIGHTS_GID + i], group);
    }
    CHECK_INT(board->fact_count, count);
    for (int i = 0; i < count; i++) {
        bool found = false;
        for (int k = 0; k < count; k++) {
            found = found || fact[RIGHTS_GROUPS + i] == (int)groups[k];
        }
        CHECK(found);
    }
    CHECK_INT(fact[RIGHTS_TASK] >= 0, is_worker);
    CHECK(!is_worker || fact[RIGHTS_DEATH] != 0);
}

TEST_ONCE(workers_run_as_the_user_that_is_named)
{
    want_root();
    begin(2);
    fork_options.user = "nobody";
    server_options.on_start = note_rights_in_start;
    pid_t pid = launch(program_serve);
    await_forks(2);
    check_nobody(getpwnam("nobody")->pw_gid, true);
    memset(board->facts, 0, sizeof board->facts);
    reload(pid); /* those that come later too */
    AWAIT(is_settled());
    check_nobody(getpwnam("nobody")->pw_gid, true);
    check_served();
    stop_well(pid, TSRV_OK);
}

TEST_ONCE(workers_run_in_the_group_that_is_named)
{
    const struct group *other = getgrnam("daemon");
    want_root();
    if (other == NULL) {
        SKIP("a group daemon");
    }
    gid_t gid = other->gr_gid;
    begin(2);
    fork_options.user = "nobody";
    fork_options.group = "daemon";
    server_options.on_start = note_rights_in_start;
    pid_t pid = launch(program_bind_start);
    await_forks(2);
    check_nobody(gid, true);
    stop_well(pid, TSRV_EPARENT);

    begin(2);
    fork_options.user = NULL;
    pid = launch(program_bind_start);
    await_forks(2);
    for (int i = 0; i < 3; i++) {
        CHECK_INT(board->facts[RIGHTS_GID + i], gid);
        CHECK_INT(board->facts[RIGHTS_UID + i], 0);
    }
    stop_well(pid, TSRV_EPARENT);
}

TEST_ONCE(bare_workers_run_as_the_user_that_is_named)
{
    want_root();
    begin(2);
    fork_options.user = "nobody";
    bare_worker = note_rights_bare;
    pid_t pid = launch(program_bare);
    AWAIT(forks_seen() == 2 && get(&board->fact_count) > 0);
    check_nobody(getpwnam("nobody")->pw_gid, true);
    stop_well(pid, TSRV_EPARENT);
}

TEST_ONCE(a_single_process_becomes_the_user_that_is_named)
{
    want_root();
    begin(1);
    fork_options.user = "nobody";
    server_options.on_start = note_rights_in_start;
    pid_t pid = launch(program_serve);
    await_forks(1);
    check_nobody(getpwnam("nobody")->pw_gid, false);
    check_served();
    stop_well(pid, TSRV_OK);

    begin(1);
    server_options.on_start = stop_in_start;
    pid = launch(program_bind_start);
    check_end(pid, 0, TSRV_OK);
    check_nobody(getpwnam("nobody")->pw_gid, false);
}

/* Numbers of users have 32 bits, and the last one means none: a directory may well give such large ones. */
TEST_ONCE(numbers_of_users_are_as_large_as_the_systems)
{
    tsrvi_identity identity;
    CHECK_INT(tsrvi_identity_find("4294967294", "3000000000", &identity), TSRV_OK);
    CHECK_INT(identity.uid, 4294967294u);
    CHECK_INT(identity.gid, 3000000000u);
    CHECK_INT(tsrvi_identity_find("4294967295", "1", &identity), TSRV_EINVAL);
    CHECK_INT(tsrvi_identity_find("1", "4294967295", &identity), TSRV_EINVAL);
}

static void log_to_a_pipe(void)
{
    int fds[2];
    CHECK(pipe(fds) == 0 && dup2(fds[1], 2) == 2); /* its other end stays open, and nobody reads it */
    close(fds[1]);
}

static void note_kept_log(tsrv_server *server, void *context)
{
    struct stat own, kept;
    on_start(server, context);
    board->facts[0] = tsrvi_process.log.kept > 2 && fstat(2, &own) == 0 &&
                      fstat(tsrvi_process.log.kept, &kept) == 0 && own.st_ino == kept.st_ino &&
                      (fcntl(tsrvi_process.log.kept, F_GETFL) & O_NONBLOCK) != 0;
    __atomic_store_n(&board->fact_count, 1, __ATOMIC_RELEASE);
}

/* The pipe that is the log is root's: who becomes another user cannot open it anew later, and must not wait for it. */
TEST_ONCE(who_becomes_another_user_keeps_a_log_that_does_not_wait)
{
    want_root();
    t_need_proc();
    for (int count = 1; count <= 2; count++) {
        begin(count);
        before_program = log_to_a_pipe;
        fork_options.user = "nobody";
        server_options.on_start = note_kept_log;
        pid_t pid = launch(program_serve);
        AWAIT(get(&board->fact_count) == 1);
        CHECK_INT(board->facts[0], 1);
        stop_well(pid, TSRV_OK);
    }
}

static void become_nobody(void)
{
    const struct passwd *nobody = getpwnam("nobody");
    CHECK(setgroups(0, NULL) == 0 && setgid(nobody->pw_gid) == 0 && setuid(nobody->pw_uid) == 0);
}

static void check_nobody_starts(int (*program)(void), int count)
{
    begin(count);
    pid_t pid = launch(program);
    int status = await_end(pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    CHECK(board->result < 0 && board->result != TSRV_EPARENT);
    CHECK_INT(forks_seen(), 0);
    CHECK(warnings() > 0);
    check_no_child();
}

static void check_nobody_starts_at_all(void)
{
    bare_worker = note_rights_bare;
    for (int count = 1; count <= 2; count++) {
        check_nobody_starts(program_serve, count);
        check_nobody_starts(program_bind_start, count);
        check_nobody_starts(program_bare, count);
    }
}

TEST_ONCE(an_unknown_user_or_group_starts_no_worker)
{
    want_root();
    fork_options.user = "no-such-user";
    check_nobody_starts_at_all();
    fork_options.user = "nobody";
    fork_options.group = "no-such-group";
    check_nobody_starts_at_all();
    fork_options.user = NULL;
    check_nobody_starts_at_all();
}

/* Who may not change its user starts nothing as somebody else. */
TEST_ONCE(a_user_that_may_not_be_had_starts_no_worker)
{
    want_root();
    before_program = become_nobody;
    fork_options.user = "root";
    check_nobody_starts_at_all();
    fork_options.user = NULL;
    fork_options.group = "root";
    check_nobody_starts_at_all();
}

static void be_nobody_with_the_rights_of_others(void)
{
    const struct passwd *nobody = getpwnam("nobody");
    CHECK(setgroups(0, NULL) == 0 && setgid(nobody->pw_gid) == 0);
    CHECK(setresuid(nobody->pw_uid, 54321, 54321) == 0);
}

static void be_nobody_with_the_group_of_others(void)
{
    const struct passwd *nobody = getpwnam("nobody");
    CHECK(setgroups(0, NULL) == 0 && setresgid(nobody->pw_gid, 54321, 54321) == 0);
    CHECK(setuid(nobody->pw_uid) == 0);
}

static void be_nobody_with(gid_t group)
{
    const struct passwd *nobody = getpwnam("nobody");
    CHECK(setgroups(1, &group) == 0 && setgid(nobody->pw_gid) == 0 && setuid(nobody->pw_uid) == 0);
}

static void be_nobody_with_the_group_of_root(void)
{
    be_nobody_with(0);
}

static void be_nobody_with_another_group(void)
{
    be_nobody_with(54322);
}

/* A program with the set-user-ID or set-group-ID bit of somebody who is not root cannot give that up, nor root's group
 * that a launcher has left it: it does not start as a user that it is only in part. */
TEST_ONCE(a_user_that_one_is_only_in_part_starts_no_worker)
{
    want_root();
    fork_options.user = "nobody";
    before_program = be_nobody_with_the_group_of_root;
    check_nobody_starts_at_all();
    before_program = be_nobody_with_the_rights_of_others;
    check_nobody_starts_at_all();
    before_program = be_nobody_with_the_group_of_others;
    check_nobody_starts_at_all();
}

/* Other groups may have been given on purpose. */
TEST_ONCE(a_user_that_one_is_already_keeps_its_groups)
{
    want_root();
    begin(2);
    before_program = be_nobody_with_another_group;
    fork_options.user = "nobody";
    server_options.on_start = note_rights_in_start;
    pid_t pid = launch(program_serve);
    await_forks(2);
    CHECK_INT(board->fact_count, 1);
    CHECK_INT(board->facts[RIGHTS_GROUPS], 54322);
    stop_well(pid, TSRV_OK);
    before_program = NULL;
}

/* What cannot be looked at is not taken for good. */
TEST_ONCE(groups_that_cannot_be_looked_at_are_an_error)
{
    static const struct {
        const char *call;
        int code, at;
    } rows[] = {{"getgroups", EIO, 1}, {"getgroups", EIO, 2}, {"malloc", ENOMEM, 1}};
    tsrvi_identity nobody;
    memset(&nobody, 0, sizeof nobody);
    nobody.uid = nobody.gid = 54321;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        t_fail_call(rows[i].call, rows[i].code, rows[i].at, false);
        CHECK_INT(tsrvi_identity_check_groups(&nobody), -rows[i].code);
        CHECK_INT(t_fault_hits, 1);
        t_fault_at = 0;
    }
}

/* Numbers do where there are no names. */
TEST_ONCE(users_and_groups_may_be_numbers)
{
    want_root();
    static const char *const users[][2] = {{"54321", "54322"}, {"0", "54322"}, {NULL, "54322"}};
    static const int uids[] = {54321, 0, 0};
    for (int i = 0; i < 3; i++) {
        begin(2);
        fork_options.user = users[i][0];
        fork_options.group = users[i][1];
        server_options.on_start = note_rights_in_start;
        pid_t pid = launch(program_serve);
        await_forks(2);
        for (int k = 0; k < 3; k++) {
            CHECK_INT(board->facts[RIGHTS_UID + k], uids[i]);
            CHECK_INT(board->facts[RIGHTS_GID + k], 54322);
        }
        stop_well(pid, TSRV_OK);
    }
    fork_options.user = "54321"; /* has no group that anybody knows */
    fork_options.group = NULL;
    check_nobody_starts_at_all();
}

/* What cannot be looked up may exist: it is not said to be unknown. */
TEST_ONCE(a_user_that_cannot_be_looked_up_is_not_called_unknown)
{
    static const struct {
        const char *call, *user, *group;
        int code, result;
        const char *text;
    } rows[] = {
        {"getpwnam", "nobody", NULL, EMFILE, -EMFILE, "user: \"nobody\" cannot be looked up: "},
        {"getpwuid", "54321", NULL, EIO, -EIO, "user: \"54321\" cannot be looked up: "},
        {"getgrnam", NULL, "daemon", EMFILE, -EMFILE, "group: \"daemon\" cannot be looked up: "},
        {"getpwnam", "nobody", NULL, ENOENT, TSRV_EINVAL, "user: \"nobody\" is not known"},
        {"getgrnam", NULL, "daemon", ESRCH, TSRV_EINVAL, "group: \"daemon\" is not known"},
    };
    for (int i = 0; i < 2 * (int)(sizeof rows / sizeof rows[0]); i++) {
        int row = i / 2, count = 1 + i % 2;
        begin(count);
        fork_options.user = rows[row].user;
        fork_options.group = rows[row].group;
        fail(rows[row].call, rows[row].code, 1000, IN_PARENT);
        check_end(launch(program_serve), 1, rows[row].result);
        CHECK_INT(forks_seen(), 0);
        CHECK(said(rows[row].text) > 0);
    }
}

/* Only the parent of workers can take root up again. */
static int program_lays_root_aside(void)
{
    const struct passwd *nobody = getpwnam("nobody");
    CHECK(setegid(nobody->pw_gid) == 0 && seteuid(nobody->pw_uid) == 0);
    int rc = program_serve();
    if (tsrv_task_id() < 0) {
        CHECK_INT(seteuid(0), workers > 1 ? 0 : -1);
    }
    return rc;
}

/* Root that is only laid aside could be taken up again: nothing of it is left. */
TEST_ONCE(root_that_is_laid_aside_is_given_up)
{
    want_root();
    for (int count = 1; count <= 2; count++) {
        begin(count);
        fork_options.user = "nobody";
        server_options.on_start = note_rights_in_start;
        pid_t pid = launch(program_lays_root_aside);
        await_forks(count);
        check_nobody(getpwnam("nobody")->pw_gid, count > 1);
        stop_well(pid, TSRV_OK);
    }
}

/* Who is that user already needs no right to become it. */
TEST_ONCE(a_user_that_one_is_already_is_no_obstacle)
{
    want_root();
    before_program = become_nobody;
    for (int count = 1; count <= 2; count++) {
        begin(count);
        fork_options.user = "nobody";
        server_options.on_start = note_rights_in_start;
        pid_t pid = launch(program_serve);
        await_forks(count);
        CHECK_INT(board->facts[RIGHTS_UID], (int)getpwnam("nobody")->pw_uid);
        stop_well(pid, TSRV_OK);
    }
}

/* A worker that cannot become its user: the first start is given up, a restart is tried again, a reload
 * leaves the old ones. */
TEST_ONCE(a_worker_that_cannot_become_its_user_does_not_start)
{
    static const char *const calls[] = {"initgroups", "setgid", "setuid"};
    want_root();
    fork_options.user = "nobody";
    for (int i = 0; i < 3; i++) {
        begin(2);
        fail(calls[i], EAGAIN, 1000, IN_CHILDREN);
        pid_t pid = launch(program_serve);
        int status = await_end(pid);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1);
        CHECK_INT(forks_seen(), 0);
        CHECK(warnings() > 0);
        check_no_child();

        begin(2);
        server_options.on_start = note_rights_in_start;
        pid = launch(program_serve);
        await_forks(2);
        fail(calls[i], EAGAIN, 1, IN_CHILDREN);
        tell(board->pids[0], SIGKILL);
        AWAIT(get(&board->failing) == 0 && forks_seen() == 3);
        CHECK_INT(board->facts[RIGHTS_UID], (int)getpwnam("nobody")->pw_uid);
        int before = warnings();
        fail(calls[i], EAGAIN, 1, IN_CHILDREN);
        tell(pid, SIGHUP);
        AWAIT(get(&board->failing) == 0 && warnings() > before);
        check_served();
        reload(pid);
        AWAIT(is_settled());
        stop_well(pid, TSRV_OK);
    }
}

/* The kernel forgets that the parent's death is to be told when the user changes: a worker that hangs
 * has nothing else. */
static void end_with_parent(int (*program)(void))
{
    long who = 0;
    begin(2);
    pid_t pid = launch(program);
    await_forks(2);
    int fd = connect_to(0, &who), idle = connect_to(1, &who);
    t_sends(fd, "hang\n");
    poll(NULL, 0, 20); /* that it has read it; if not, the test is easier */
    tell(pid, SIGKILL);
    AWAIT(no_child_left(NULL));
    t_close(fd);
    t_close(idle);
}

static void become_nobody_in_start(tsrv_server *server, void *context)
{
    become_nobody();
    on_start(server, context);
}

TEST_LOOP(workers_of_another_user_end_with_their_parent)
{
    want_root();
    fork_options.user = "nobody";
    end_with_parent(program_serve);
}

TEST_LOOP(workers_that_have_changed_their_user_end_with_their_parent)
{
    want_root();
    server_options.on_start = become_nobody_in_start;
    end_with_parent(program_serve);
    before_loop = become_nobody;
    server_options.on_start = NULL;
    end_with_parent(program_bind_start);
}

/* ---- the host ------------------------------------------------------------------------------*/

/* A worker's own watch on SIGTERM takes the place of the drain when the parent is told to stop, and is
 * called once. */
TEST_LOOP(an_own_watch_hears_of_the_parents_stop)
{
    begin(2);
    server_options.on_start = watch_term;
    pid_t pid = launch(program_own_watch);
    await_forks(2);
    int fd = start_request();
    tell(pid, SIGTERM);
    check_cut(fd);
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(board->value, 2);
    check_exits_are_good();
}

static int program_cleans_up(void)
{
    int rc = program_own_watch();
    if (tsrv_task_id() >= 0) {
        __atomic_add_fetch(&board->held, 1, __ATOMIC_ACQ_REL);
        AWAIT(get(&board->go) == 1);
    }
    return rc;
}

static void await_clean_up(void)
{
    static int told;
    if (in_parent) {
        told++;
        AWAIT(get(&board->held) == told);
    }
}

/* The parent has told it, and is slow: until it goes on, the worker's loop has ended. What the worker does
 * behind that is not cut. */
TEST_LOOP(a_worker_that_has_heard_of_the_stop_is_not_told_again)
{
    begin(2);
    server_options.on_start = watch_term;
    behind_send = await_clean_up;
    pid_t pid = launch(program_cleans_up);
    await_forks(2);
    AWAIT(is_settled());
    tell(pid, SIGTERM);
    AWAIT(get(&board->held) == 2);
    poke(pid);
    put(&board->go, 1);
    check_end(pid, 0, TSRV_EPARENT);
    CHECK_INT(board->value, 2);
    check_exits_are_good();
}

static void on_own_signal(int signo)
{
    (void)signo;
    __atomic_add_fetch(&board->value, 1, __ATOMIC_ACQ_REL);
    _exit(0);
}

static void on_own_info(int signo, siginfo_t *info, void *machine)
{
    (void)info, (void)machine;
    on_own_signal(signo);
}

static bool wants_info;

static void handle_term(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_own_signal;
    if (wants_info) {
        action.sa_flags = SA_SIGINFO;
        action.sa_sigaction = on_own_info;
    }
    CHECK(sigaction(SIGTERM, &action, NULL) == 0);
    CHECK(sigaction(SIGHUP, &action, NULL) == 0);
}

/* A handler of the program's own is called when the parent is told to stop. */
TEST_LOOP(an_own_handler_hears_of_the_parents_stop)
{
    for (int i = 0; i < 2; i++) {
        begin(2);
        wants_info = i == 1;
        before_loop = handle_term;
        pid_t pid = launch(program_bind_start);
        await_forks(2);
        stop_well(pid, TSRV_EPARENT);
        CHECK_INT(board->value, 2);
        check_exits_are_good();
    }
}

static void count_info(int signo, siginfo_t *info, void *machine)
{
    (void)signo, (void)info, (void)machine;
    __atomic_add_fetch(&board->value, 1, __ATOMIC_ACQ_REL);
}

static void handle_hangups(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    action.sa_sigaction = count_info;
    CHECK(sigaction(SIGHUP, &action, NULL) == 0);
}

/* A handler that the host has installed before the fork stays its workers'. */
TEST_ONCE(a_worker_keeps_the_hosts_handler_of_hangups)
{
    begin(2);
    before_program = handle_hangups;
    pid_t pid = launch(program_serve);
    await_forks(2);
    tell(board->pids[0], SIGHUP);
    AWAIT(get(&board->value) == 1);
    check_served();
    stop_well(pid, TSRV_OK);
    CHECK_INT(get(&board->value), 1);
    check_exits_are_good();
}

static pid_t foreign;

static int program_with_a_child(void)
{
    int status = 0;
    foreign = fork();
    if (foreign == 0) {
        while (get(&board->go) == 0) {
            poll(NULL, 0, 1);
        }
        _exit(42);
    }
    int rc = program_serve();
    if (tsrv_task_id() < 0) {
        CHECK_INT(waitpid(foreign, &status, 0), foreign);
        CHECK_INT(WEXITSTATUS(status), 42);
    }
    return rc;
}

/* The status of a child of the host's is nobody else's. */
TEST_ONCE(only_workers_are_reaped)
{
    begin(2);
    pid_t pid = launch(program_with_a_child);
    await_forks(2);
    put(&board->go, 1);
    tell(board->pids[0], SIGKILL);
    AWAIT(is_settled() && forks_seen() == 3);
    reload(pid);
    AWAIT(is_settled());
    for (int i = 0; i < 5; i++) {
        poke(pid);
    }
    stop_well(pid, TSRV_OK);
}

static void count_exit(void)
{
    __atomic_add_fetch(&board->value, 1, __ATOMIC_ACQ_REL);
}

static char *missing_argv[] = {(char *)"/nonexistent/program", NULL};

static int program_with_exit_handler(void)
{
    CHECK(atexit(count_exit) == 0);
    return program_serve();
}

/* What cannot be executed leaves by _exit; workers and their parent by main, once each. */
TEST_ONCE(exit_handlers_run_where_main_ends)
{
    begin(2);
    fork_options.upgrade_argv = missing_argv;
    pid_t pid = launch(program_with_exit_handler);
    await_forks(2);
    tell(pid, SIGUSR2);
    AWAIT(warnings() > 0);
    poke(pid);
    CHECK_INT(get(&board->value), 0);
    stop_well(pid, TSRV_OK);
    CHECK_INT(get(&board->value), 3);
}

/* Started with descriptors 0, 1 and 2 closed: what is printed there must not reach a socket or a pipe of
 * the library's. */
static void look_at_low_fds(tsrv_server *server, void *context)
{
    for (int fd = 0; fd < 3; fd++) {
        struct stat info;
        if (fstat(fd, &info) == 0 && !S_ISCHR(info.st_mode)) {
            put(&board->value, 1 + fd);
        }
    }
    on_start(server, context);
}

static int program_closed(void)
{
    tsrv_set_log(NULL, NULL); /* the default, which prints */
    for (int fd = 0; fd < 3; fd++) {
        t_close(fd);
    }
    server_options.on_start = look_at_low_fds;
    int rc = program_serve();
    for (int fd = 0; fd < 3; fd++) {
        if (fcntl(fd, F_GETFD) < 0) {
            CHECK_INT(open("/dev/null", O_RDWR), fd);
        }
    }
    return rc;
}

TEST_LOOP(closed_descriptors_0_to_2_end_nobody)
{
    for (int count = 1; count <= 3; count += 2) {
        begin(count);
        pid_t pid = launch(program_closed);
        await_forks(count);
        if (count > 1) {
            tell(board->pids[0], SIGKILL); /* which is logged */
            await_forks(count + 1);
            tell(pid, SIGHUP);
            await_forks(2 * count + 1);
        }
        check_served();
        CHECK_INT(board->value, 0);
        stop_well(pid, TSRV_OK);
        CHECK(count == 1 || exits_seen() == 2 * count + 1);
    }
}

/* ---- process 1 -----------------------------------------------------------------------------*/

TEST_ONCE(serves_as_process_1)
{
    begin(2);
    fork_options.upgrade_argv = missing_argv;
    pid_t pid = launch_as_process_1(program_serve);
    await_forks(2);
    command(0, "signal 9\n");
    AWAIT(is_settled() && forks_seen() == 3);
    reload(pid);
    AWAIT(is_settled());
    int before = warnings();
    tell(pid, SIGUSR2); /* process 1 cannot be replaced: it says so, and goes on */
    AWAIT(warnings() > before);
    check_rests();
    int fd = start_request();
    tell(pid, SIGTERM);
    AWAIT(is_refused());
    finish_request(fd);
    check_end(pid, 0, TSRV_OK);
}

/* ---- upgrades ------------------------------------------------------------------------------*/

/* What the program that an upgrade starts does, by board->next.how. */
enum {
    NEXT_SERVES,
    NEXT_EXITS_0,
    NEXT_EXITS_1,
    NEXT_HANGS, /* before it serves */
    NEXT_HANGS_DEAF,
    NEXT_WORKERS_HANG,   /* in on_start */
    NEXT_ONE_HANGS,      /* the second of its workers */
    NEXT_ONE_IS_SLOW,    /* until board->go */
    NEXT_CRASHES,        /* all workers, 50 ms after they accept */
    NEXT_ONE_CRASHES,    /* the second */
    NEXT_PARENT_EXITS_0, /* its parent, 50 ms after its workers accept */
    NEXT_PARENT_CRASHES,
    NEXT_IS_SLOW,     /* before it serves, until board->go */
    NEXT_TWO_FILES,   /* serves on the unix sockets of program_two_files */
    NEXT_TWO_SERVERS, /* is program_two_servers */
    NEXT_MANY_FILES,  /* is program_many_files */
    NEXT_IS_LATE      /* deaf until board->go, then says that it serves, and hangs */
};

static int program_two_files(void);
static int program_two_servers(void);
static int program_many_files(void);

static char *next_argv[2];
static tsrv_timer next_timer;

static void next_crash(void *context)
{
    (void)context;
    raise(SIGKILL);
}

/* In the new program's parent, which SIGUSR1 ends. */
static void next_exit(int signo)
{
    (void)signo;
    if (get(&board->next.how) == NEXT_PARENT_EXITS_0) {
        _exit(0);
    }
    raise(SIGKILL);
}

/* When both workers accept, their parent ends. */
static void next_end_parent(void *context)
{
    (void)context;
    if (forks_seen() < 4) {
        CHECK_INT(tsrv_timer_start(NULL, &next_timer, 5, next_end_parent, NULL), TSRV_OK);
    } else {
        kill(getppid(), SIGUSR1);
    }
}

enum { SIGNALS = 32, BLOCKED = 1, IGNORED = 2, HANDLED = 4 };

/* Behind the signals, see note_signals: how many descriptors the single process has, or each worker. */
static int *fact_of_fds(int id)
{
    return &board->facts[SIGNALS + 1 + id];
}

static void note_fds(void)
{
    put(fact_of_fds(tsrv_task_id()), t_open_fds());
}

static void next_start(tsrv_server *server, void *context)
{
    int how = get(&board->next.how), id = tsrv_task_id();
    note_fds();
    if (how == NEXT_WORKERS_HANG || (how == NEXT_ONE_HANGS && id == 1)) {
        behave_as(HANGS);
    }
    if (how == NEXT_ONE_IS_SLOW && id == 1) {
        behave_as(IS_SLOW);
    }
    on_start(server, context);
    if (how == NEXT_CRASHES || (how == NEXT_ONE_CRASHES && id == 1)) {
        CHECK_INT(tsrv_timer_start(NULL, &next_timer, 50, next_crash, NULL), TSRV_OK);
    }
    if ((how == NEXT_PARENT_EXITS_0 || how == NEXT_PARENT_CRASHES) && id == 1) {
        CHECK_INT(tsrv_timer_start(NULL, &next_timer, 50, next_end_parent, NULL), TSRV_OK);
    }
}

/* What comes of each signal here. */
static void note_signals(int *facts)
{
    struct sigaction action;
    sigset_t mask;
    CHECK(sigprocmask(SIG_SETMASK, NULL, &mask) == 0);
    for (int signo = 1; signo < SIGNALS; signo++) {
        CHECK(sigaction(signo, NULL, &action) == 0);
        facts[signo] = (sigismember(&mask, signo) ? BLOCKED : 0) |
                       (action.sa_handler == SIG_IGN   ? IGNORED
                        : action.sa_handler == SIG_DFL ? 0
                                                       : HANDLED);
    }
}

/* The log says how the sockets are called that were handed over. */
static void note_names(void)
{
    char name[300];
    tsrv_address address;
    for (int fd = 3; tsrvi_address_get(fd, tsrvi_getsockname, &address) == TSRV_OK; fd++) {
        tsrvi_log(TSRV_LOG_INFO, "port %d is named \"%s\"", tsrv_address_port(&address),
                  tsrv_listen_fd_name(fd, name, sizeof name));
    }
}

static int run_next(int how)
{
    return how == NEXT_TWO_FILES     ? program_two_files()
           : how == NEXT_TWO_SERVERS ? program_two_servers()
           : how == NEXT_MANY_FILES  ? program_many_files()
                                     : program_serve();
}

static void be_late(void)
{
    int fds[8];
    sigset_t all;
    sigfillset(&all);
    CHECK(sigprocmask(SIG_BLOCK, &all, NULL) == 0);
    CHECK(tsrv_listen_fds(fds, 8) >= 1);
    behave_as(IS_SLOW);
    CHECK_INT(tsrv_notify("READY=1"), 0); /* there is no service manager */
    behave_as(HANGS);
}

static int program_next(void)
{
    int how = get(&board->next.how);
    note_signals(board->facts);
    note_names();
    put(&board->next.pid, (int)getpid());
    __atomic_add_fetch(&board->next.count, 1, __ATOMIC_ACQ_REL);
    if (how == NEXT_EXITS_0 || how == NEXT_EXITS_1) {
        _exit(how == NEXT_EXITS_1);
    }
    if (how == NEXT_HANGS || how == NEXT_HANGS_DEAF) {
        behave_as(how == NEXT_HANGS ? HANGS : HANGS_DEAF);
    }
    if (how == NEXT_IS_SLOW) {
        behave_as(IS_SLOW);
    }
    if (how == NEXT_IS_LATE) {
        be_late();
    }
    signal(SIGUSR1, next_exit);
    workers = board->next.workers;
    server_options.on_start = next_start;
    server_options.bind = &bind_options;
    return run_next(how);
}

/* This file again, started by an upgrade: found by its variable before the tests begin. The variable is
 * the path of the board, and behind a blank whether reuse_port is wanted, and the unix socket's path. */
__attribute__((constructor(200))) static void be_upgraded(void)
{
    static char path[200], local[200];
    const char *text = getenv(UPGRADE_VARIABLE);
    int reuse = 0, fd;
    if (text == NULL) {
        return;
    }
    CHECK(sscanf(text, "%199s %d %d %199s", path, &reuse, &t_backend, local) >= 3);
    fd = open(path, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0);
    map_board(fd);
    t_close(fd);
    unix_path = local[0] != 0 ? local : NULL;
    snprintf(directory, sizeof directory, "%.*s", (int)(strrchr(path, '/') - path), path);
    bind_options.reuse_port = reuse != 0;
    pthread_atfork(NULL, NULL, forked);
    in_program = true;
    tsrv_set_log(keep_log, NULL);
    next_argv[0] = own_path();
    fork_options.upgrade_argv = next_argv;
    fork_options.on_exit = note_exit;
    fork_options.context = &fork_options;
    fork_options.grace_ms = board->next.how == NEXT_SERVES ? 0 : 100;
    exit(program_next() == TSRV_OK ? 0 : 1);
}

/* A program of two workers that can be upgraded; argv[0] is a link in the test's directory. */
static void begin_upgradable(void)
{
    char text[500];
    if (directory[0] == 0) {
        make_directory();
    }
    int fd = open(path_of("board"), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    CHECK(fd >= 0 && ftruncate(fd, sizeof *board) == 0);
    map_board(fd);
    t_close(fd);
    begin(2);
    board->next.workers = 2;
    snprintf(text, sizeof text, "%s %d %d %s", path_of("board"), bind_options.reuse_port, t_backend,
             unix_path != NULL ? unix_path : "");
    CHECK(setenv(UPGRADE_VARIABLE, text, 1) == 0);
    CHECK(symlink(own_path(), path_of("next")) == 0 || errno == EEXIST);
    next_argv[0] = strdup(path_of("next"));
    fork_options.upgrade_argv = next_argv;
}

static void end_upgradable(void)
{
    free(next_argv[0]);
    CHECK(unsetenv(UPGRADE_VARIABLE) == 0);
    CHECK(munmap(board, sizeof *board) == 0);
    board = NULL;
    clock_ahead_ns = NULL;
    remove_directory();
    directory[0] = 0;
}

/* Whose child answers? -1: who has accepted does not. */
static long parent_that_answers(void)
{
    char line[64];
    int fd = reach(), id = 0;
    long pid = 0, parent = -1;
    if (send(fd, "id\n", 3, T_NOSIGNAL) == 3 && read_line(fd, line, sizeof line)) {
        CHECK_INT(sscanf(line, "%d %ld %ld", &id, &pid, &parent), 3);
    }
    t_close(fd);
    return parent;
}

/* The old program leaves in good order, the new one serves, all its workers, and ends in good order. */
static void check_upgraded(pid_t old, int count)
{
    int status = await_end(old);
    CHECK(WIFEXITED(status));
    CHECK_INT(WEXITSTATUS(status), 0);
    pid_t next = (pid_t)get(&board->next.pid);
    long who = 0;
    for (int i = 0; i < 10 && count > 1; i++) {
        CHECK_INT(parent_that_answers(), next);
    }
    for (int id = 0; id < count && count > 1; id++) {
        t_close(connect_to(id, &who));
    }
    check_served();
    tell(next, SIGTERM);
    status = await_end(next);
    CHECK(WIFEXITED(status));
    CHECK_INT(WEXITSTATUS(status), 0);
    AWAIT(no_child_left(NULL)); /* orphans of programs that have failed are buried here */
}

static void upgrade_to(pid_t pid, int how)
{
    put(&board->value, IS_FINE);
    put(&board->next.how, how);
    put(&board->version, 100);
    tell(pid, SIGUSR2);
}

static void upgrade(pid_t pid)
{
    upgrade_to(pid, NEXT_SERVES);
}

/* Orphans of the new program are ours, and buried here. */
static bool is_gone(pid_t pid)
{
    waitpid(pid, NULL, WNOHANG);
    return kill(pid, 0) != 0 && errno == ESRCH;
}

/* The upgrade to such a program does not happen: it goes, which is said, the old one serves on, and the
 * next upgrade works. */
static void check_not_upgraded(int how)
{
    begin_upgradable();
    board->next.how = how;
    fork_options.start_timeout_ms = how == NEXT_HANGS ? 10000 : 0;
    pid_t pid = launch(program_serve);
    await_forks(2);
    long who = 0;
    int fd = connect_to(0, &who);
    int before = warnings();
    tell(pid, SIGUSR2);
    AWAIT(get(&board->next.count) == 1);
    pid_t next = (pid_t)get(&board->next.pid);
    if (how == NEXT_HANGS || how == NEXT_HANGS_DEAF || how == NEXT_WORKERS_HANG ||
        how == NEXT_ONE_HANGS) {
        AWAIT(get(&board->held) > 0);
        check_rests();
        advance(pid, how == NEXT_HANGS ? 10001 : START_MS + 1);
        AWAIT(is_gone(next) || (advance(pid, STEP_MS), is_gone(next)));
    }
    AWAIT(is_gone(next));
    AWAIT(warnings() > before);
    for (int i = 0; i < 20; i++) {
        AWAIT(parent_that_answers() == pid);
    }
    int id = -1;
    long now = 0;
    ask_id(fd, &id, &now, NULL);
    CHECK_INT(now, who);
    t_close(fd);
    check_rests();
    CHECK(!has_exited(board->pids[0]) && !has_exited(board->pids[1]));
    upgrade(pid);
    check_upgraded(pid, 2);
    end_upgradable();
}

#define TEST_UPGRADE_FAILS(name, how) \
    TEST_ONCE(name)                   \
    {                                 \
        check_not_upgraded(how);      \
    }

TEST_UPGRADE_FAILS(an_upgrade_to_a_program_that_exits_well_at_once_is_given_up, NEXT_EXITS_0)
TEST_UPGRADE_FAILS(an_upgrade_to_a_program_that_fails_at_once_is_given_up, NEXT_EXITS_1)
TEST_UPGRADE_FAILS(an_upgrade_to_a_program_that_hangs_is_given_up, NEXT_HANGS)
TEST_UPGRADE_FAILS(an_upgrade_to_a_program_that_hangs_deaf_is_given_up, NEXT_HANGS_DEAF)
TEST_UPGRADE_FAILS(an_upgrade_to_workers_that_hang_is_given_up, NEXT_WORKERS_HANG)
TEST_UPGRADE_FAILS(an_upgrade_to_workers_of_which_one_hangs_is_given_up, NEXT_ONE_HANGS)
TEST_UPGRADE_FAILS(an_upgrade_to_workers_that_crash_soon_is_given_up, NEXT_CRASHES)
TEST_UPGRADE_FAILS(an_upgrade_to_workers_of_which_one_crashes_soon_is_given_up, NEXT_ONE_CRASHES)
TEST_UPGRADE_FAILS(an_upgrade_to_a_parent_that_exits_soon_is_given_up, NEXT_PARENT_EXITS_0)
TEST_UPGRADE_FAILS(an_upgrade_to_a_parent_that_crashes_soon_is_given_up, NEXT_PARENT_CRASHES)

/* What cannot be executed, neither once nor again. */
static void check_not_executed(bool is_there)
{
    begin_upgradable();
    pid_t pid = launch(program_serve);
    await_forks(2);
    CHECK(unlink(path_of("next")) == 0);
    if (is_there) {
        int file = open(path_of("next"), O_WRONLY | O_CREAT, 0600);
        CHECK(file >= 0);
        t_close(file);
    }
    for (int k = 0; k < 2; k++) {
        int before = warnings();
        tell(pid, SIGUSR2);
        AWAIT(warnings() > before);
        poke(pid);
        check_rests(); /* the child that could not has been buried meanwhile */
    }
    CHECK_INT(parent_that_answers(), pid);
    unlink(path_of("next"));
    CHECK(symlink(own_path(), path_of("next")) == 0);
    upgrade(pid);
    check_upgraded(pid, 2);
    end_upgradable();
}

TEST_ONCE(an_upgrade_to_a_program_that_is_missing_is_given_up)
{
    check_not_executed(false);
}

TEST_ONCE(an_upgrade_to_what_is_no_program_is_given_up)
{
    check_not_executed(true);
}

/* It is complete when all new workers accept, not only the first. */
TEST_ONCE(an_upgrade_waits_for_all_new_workers)
{
    begin_upgradable();
    board->next.how = NEXT_ONE_IS_SLOW;
    pid_t pid = launch(program_serve);
    await_forks(2);
    tell(pid, SIGUSR2);
    AWAIT(get(&board->held) == 1);
    await_forks(3); /* its sibling accepts */
    for (int i = 0; i < 5; i++) {
        advance(pid, STEP_MS); /* of that worker's life */
        poll(NULL, 0, 20);
    }
    CHECK_INT(exits_seen(), 0);
    AWAIT(parent_that_answers() == pid);
    put(&board->go, 1);
    check_upgraded(pid, 2);
    end_upgradable();
}

static void check_counts(int before, int after)
{
    begin_upgradable();
    workers = before;
    board->next.workers = after;
    pid_t pid = launch(program_serve);
    await_forks(before);
    upgrade(pid);
    check_upgraded(pid, after);
    end_upgradable();
}

TEST_ONCE(an_upgrade_to_more_workers)
{
    check_counts(2, 4);
}

TEST_ONCE(an_upgrade_to_fewer_workers)
{
    check_counts(3, 2);
}

TEST_ONCE(an_upgrade_to_a_single_process)
{
    check_counts(2, 1);
}

/* Nobody's connection is reset or refused, with a listener for each worker. */
TEST_LOOP(an_upgrade_with_reuse_port_resets_nobody)
{
    load l;
    bind_options.reuse_port = true;
    begin_upgradable();
    workers = 3;
    board->next.workers = 3;
    server_options.bind = &bind_options;
    server_options.write_high_water = 16 << 20;
    pid_t pid = launch(program_serve);
    await_forks(3);
    load_begin(&l);
    upgrade(pid);
    await_forks(6);
    AWAIT(exits_seen() >= 2); /* all but the one with the long client, if that is an old one */
    load_end(&l);
    check_upgraded(pid, 3);
    end_upgradable();
}

/* Descriptors in use lie between the free ones. */
static void make_holes(void)
{
    int last = 0;
    while (last < 100) {
        last = open("/dev/null", O_RDONLY | O_CLOEXEC);
        CHECK(last >= 0);
    }
    for (int fd = 10; fd < 100; fd += 2) {
        close(fd);
    }
}

static void fill_low(void)
{
    int last = 0;
    while (last < 20) {
        last = open("/dev/null", O_RDONLY | O_CLOEXEC);
        CHECK(last >= 0);
    }
}

/* Every descriptor from 3 on, in the way and in use. */
static void fill_all_but_a_few(void)
{
    int last = 0;
    while (last < 300) {
        last = open("/dev/null", O_RDONLY | O_CLOEXEC);
        CHECK(last >= 0);
    }
    for (int fd = 5; fd < 300; fd += 3) {
        close(fd);
    }
}

static void check_holes(void (*make)(void), bool reuse, int (*program)(void))
{
    bind_options.reuse_port = reuse;
    begin_upgradable();
    server_options.bind = &bind_options;
    before_program = make;
    pid_t pid = launch(program);
    await_forks(2);
    upgrade(pid);
    check_upgraded(pid, 2);
    end_upgradable();
}

TEST_ONCE(an_upgrade_hands_a_listener_over_when_free_descriptors_lie_apart)
{
    check_holes(make_holes, false, program_serve);
}

TEST_ONCE(an_upgrade_hands_many_listeners_over_when_free_descriptors_lie_apart)
{
    check_holes(make_holes, true, program_serve);
}

TEST_ONCE(an_upgrade_hands_listeners_over_from_above)
{
    check_holes(fill_low, true, program_serve);
}

TEST_ONCE(an_upgrade_hands_listeners_over_from_between_others)
{
    check_holes(fill_all_but_a_few, true, program_serve);
}

TEST_ONCE(an_upgrade_hands_listeners_of_two_ports_over)
{
    check_holes(make_holes, false, program_two_ports);
}

TEST_ONCE(an_upgrade_hands_many_listeners_of_two_ports_over)
{
    check_holes(fill_all_but_a_few, true, program_two_ports);
}

/* Two listeners, of which the new program takes the first. */
static int program_two_ports(void)
{
    server_options.on_start = on_start;
    tsrv_server *server = new_bound_server();
    tsrv_address address;
    CHECK_INT(tsrv_server_bind(server, 0, "127.0.0.1", &bind_options), TSRV_OK);
    CHECK_INT(tsrv_server_address(server, 1, &address), TSRV_OK);
    put(&board->second_port, tsrv_address_port(&address));
    int rc = tsrv_server_start(server, workers, &fork_options);
    rc = rc == TSRV_OK ? tsrv_loop_run(NULL) : rc;
    tsrv_server_free(server);
    return rc;
}

/* What it does not take is closed there, so that clients are refused instead of left alone. */
static void check_not_taken(bool reuse)
{
    bind_options.reuse_port = reuse;
    begin_upgradable();
    pid_t pid = launch(program_two_ports);
    await_forks(2);
    upgrade(pid);
    int status = await_end(pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    int first = board->port;
    board->port = board->second_port;
    CHECK(is_refused());
    board->port = first;
    pid_t next = (pid_t)get(&board->next.pid);
    check_served();
    tell(next, SIGTERM);
    CHECK_INT(await_end(next), 0);
    check_no_child();
    end_upgradable();
}

TEST_ONCE(a_listener_that_an_upgrade_does_not_take_is_closed)
{
    check_not_taken(false);
}

TEST_ONCE(listeners_that_an_upgrade_does_not_take_are_closed)
{
    check_not_taken(true);
}

TEST_ONCE(the_file_of_a_unix_socket_outlives_an_upgrade)
{
    use_unix_socket();
    begin_upgradable();
    pid_t pid = launch(program_serve);
    await_forks(2);
    for (int i = 0; i < 2; i++) { /* and the next one */
        put(&board->version, 100 + i);
        put(&board->next.count, 0);
        tell(pid, SIGUSR2);
        AWAIT(get(&board->next.count) == 1);
        int status = await_end(pid);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        CHECK(access(unix_path, F_OK) == 0);
        pid = (pid_t)get(&board->next.pid);
        CHECK_INT(parent_that_answers(), pid);
    }
    put(&board->version, 200);
    tell(pid, SIGHUP);
    AWAIT(has_version(200));
    check_served();
    tell(pid, SIGTERM);
    CHECK_INT(await_end(pid), 0);
    CHECK(access(unix_path, F_OK) != 0 && errno == ENOENT);
    check_no_child();
    end_upgradable();
}

/* One at a time, and that is said. */
TEST_ONCE(a_second_upgrade_while_one_is_under_way_is_explained)
{
    begin_upgradable();
    board->next.how = NEXT_IS_SLOW;
    pid_t pid = launch(program_serve);
    await_forks(2);
    tell(pid, SIGUSR2);
    AWAIT(get(&board->held) == 1);
    check_rests();
    size_t before = __atomic_load_n(&board->logged, __ATOMIC_ACQUIRE);
    tell(pid, SIGUSR2);
    AWAIT(__atomic_load_n(&board->logged, __ATOMIC_ACQUIRE) > before);
    CHECK_INT(get(&board->next.count), 1);
    put(&board->go, 1);
    check_upgraded(pid, 2);
    CHECK_INT(get(&board->next.count), 1);
    end_upgradable();
}

/* One that does not end when it is late is killed behind the grace, in which its workers may have accepted
 * by then, and the time in which it kills these. */
TEST_ONCE(a_new_program_that_is_deaf_is_killed_behind_one_grace)
{
    begin_upgradable();
    board->next.how = NEXT_HANGS_DEAF;
    pid_t pid = launch(program_serve);
    await_forks(2);
    for (int count = 1; count <= 2; count++) { /* the first, and the next one */
        tell(pid, SIGUSR2);
        AWAIT(get(&board->held) == count);
        pid_t next = (pid_t)get(&board->next.pid);
        advance(pid, START_MS + 2 * STEP_MS);
        AWAIT(said("does not accept within start_timeout_ms") == count);
        advance(pid, GRACE_MS + 2 * KILL_MS + STEP_MS);
        AWAIT(is_gone(next));
        AWAIT((poke(pid), said("upgrade: given up") == count));
    }
    stop_well(pid, TSRV_OK);
    end_upgradable();
}

/* As long as one that was late has not ended there is no other one, also if it says then that it serves. */
TEST_ONCE(an_upgrade_that_is_late_is_under_way_until_it_has_ended)
{
    begin_upgradable();
    board->next.how = NEXT_IS_LATE;
    pid_t pid = launch(program_serve);
    await_forks(2);
    tell(pid, SIGUSR2);
    AWAIT(get(&board->held) == 1);
    pid_t next = (pid_t)get(&board->next.pid);
    advance(pid, START_MS + 2 * STEP_MS);
    AWAIT(said("does not accept within start_timeout_ms") == 1);
    put(&board->go, 1);
    AWAIT(get(&board->held) == 2);
    poke(pid);
    tell(pid, SIGUSR2);
    AWAIT(said("one is under way already") == 1);
    CHECK_INT(get(&board->next.count), 1);
    AWAIT(is_gone(next) || (advance(pid, STEP_MS), is_gone(next)));
    upgrade(pid);
    check_upgraded(pid, 2);
    end_upgradable();
}

static void start_and_note_fds(tsrv_server *server, void *context)
{
    note_fds();
    on_start(server, context);
}

/* The first worker dies: the one that takes its place has no descriptor more. */
static void check_fds_of_next_worker(void)
{
    int before = get(fact_of_fds(0));
    CHECK(before > 0);
    put(fact_of_fds(0), 0);
    command(0, "signal 9\n");
    AWAIT(get(fact_of_fds(0)) != 0);
    CHECK_INT(get(fact_of_fds(0)), before);
}

TEST_ONCE(a_worker_that_begins_during_an_upgrade_has_nothing_of_it)
{
    begin_upgradable();
    board->next.how = NEXT_IS_SLOW;
    server_options.on_start = start_and_note_fds;
    pid_t pid = launch(program_serve);
    await_forks(2);
    tell(pid, SIGUSR2);
    AWAIT(get(&board->held) == 1);
    check_fds_of_next_worker();
    await_forks(3);
    put(&board->go, 1);
    check_upgraded(pid, 2);
    end_upgradable();
}

TEST_ONCE(workers_that_begin_before_an_upgrade_is_over_have_nothing_of_it)
{
    begin_upgradable();
    pid_t pid = launch(program_serve);
    await_forks(2);
    upgrade(pid);
    CHECK_INT(await_end(pid), 0);
    check_fds_of_next_worker();
    check_upgraded(pid, 2);
    end_upgradable();
}

/* A stop while the new program hangs: that one goes too, and the port is free. */
static void stop_in_upgrade(int how)
{
    begin_upgradable();
    board->next.how = how;
    fork_options.grace_ms = 100;
    pid_t pid = launch(program_serve);
    await_forks(2);
    tell(pid, SIGUSR2);
    AWAIT(get(&board->held) == 1);
    tell(pid, SIGTERM);
    if (how == NEXT_HANGS) {
        await_end(pid);
    } else {
        check_rests();
        advance_until_end(pid);
    }
    AWAIT(no_child_left(NULL));
    CHECK(is_refused());
    end_upgradable();
}

TEST_ONCE(a_stop_during_an_upgrade_ends_the_new_program_too)
{
    stop_in_upgrade(NEXT_HANGS);
    stop_in_upgrade(NEXT_HANGS_DEAF);
}

/* A reload that was asked for while an upgrade hangs, which is given up then. */
TEST_ONCE(a_hangup_during_an_upgrade_that_fails_is_not_lost)
{
    begin_upgradable();
    board->next.how = NEXT_HANGS_DEAF;
    pid_t pid = launch(program_serve);
    await_forks(2);
    tell(pid, SIGUSR2);
    AWAIT(get(&board->held) == 1);
    put(&board->value, IS_FINE);
    reload(pid);
    poke(pid);
    for (int i = 0; i < 500 && !is_settled(); i++) {
        poll(NULL, 0, 1); /* it need not wait for that */
    }
    pid_t next = (pid_t)get(&board->next.pid);
    AWAIT(is_gone(next) || (advance(pid, is_settled() ? 10 * STEP_MS : STEP_MS), is_gone(next)));
    AWAIT(is_settled());
    upgrade(pid);
    check_upgraded(pid, 2);
    end_upgradable();
}

/* An upgrade while a reload hangs: everything old goes. */
TEST_ONCE(an_upgrade_during_a_reload_that_hangs)
{
    begin_upgradable();
    fork_options.grace_ms = 100;
    server_options.on_start = behave_in_start;
    pid_t pid = launch(program_serve);
    await_forks(2);
    put(&board->value, HANGS_DEAF);
    tell(pid, SIGHUP);
    AWAIT(get(&board->held) > 0);
    upgrade(pid);
    AWAIT((advance(pid, STEP_MS), poll(NULL, 0, 50), forks_seen() >= 4)); /* at once, or after it */
    AWAIT(has_exited(board->pids[0]) && has_exited(board->pids[1]));
    advance_until_end(pid);
    pid_t next = (pid_t)get(&board->next.pid);
    CHECK_INT(parent_that_answers(), next);
    tell(next, SIGTERM);
    CHECK_INT(await_end(next), 0);
    check_no_child();
    end_upgradable();
}

/* Again and again; the new program reloads as well. */
TEST_ONCE(upgrades_follow_each_other)
{
    begin_upgradable();
    pid_t pid = launch(program_serve);
    await_forks(2);
    for (int i = 0; i < 2; i++) {
        put(&board->version, 100 + 2 * i);
        put(&board->next.count, 0);
        tell(pid, SIGUSR2);
        AWAIT(get(&board->next.count) == 1);
        int status = await_end(pid);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        pid = (pid_t)get(&board->next.pid);
        put(&board->version, 101 + 2 * i);
        tell(pid, SIGHUP);
        AWAIT(has_version(101 + 2 * i));
        CHECK_INT(parent_that_answers(), pid);
    }
    int fd = start_request();
    tell(pid, SIGTERM);
    AWAIT(is_refused());
    finish_request(fd);
    CHECK_INT(await_end(pid), 0);
    check_no_child();
    end_upgradable();
}

/* A client of the old program's finishes its request after the new one has taken over. */
TEST_LOOP(an_upgrade_finishes_the_requests_of_the_old_program)
{
    begin_upgradable();
    fork_options.grace_ms = NEVER_DUE_MS;
    pid_t pid = launch(program_serve);
    await_forks(2);
    int fd = start_request();
    upgrade(pid);
    AWAIT(parent_that_answers() != pid);
    pid_t next = (pid_t)get(&board->next.pid);
    AWAIT(exits_seen() >= 1); /* the old one without a client; the other one has been told by then, */
    int row = 0;
    AWAIT((row = parent_that_answers() == next ? row + 1 : 0) == 10); /* and hears of it soon */
    check_rests();
    finish_request(fd);
    check_upgraded(pid, 2);
    end_upgradable();
}

/* The old program dies while the new one starts: that has nobody to tell, and lives. */
static void die_in_upgrade(int how)
{
    begin_upgradable();
    board->next.how = how;
    pid_t pid = launch(program_serve);
    await_forks(2);
    tell(pid, SIGUSR2);
    AWAIT(get(&board->held) == 1);
    tell(pid, SIGKILL);
    await_end(pid);
    AWAIT(is_gone(board->pids[0]) && is_gone(board->pids[1]));
    put(&board->go, 1);
    await_forks(4);
    pid_t next = (pid_t)get(&board->next.pid);
    CHECK_INT(parent_that_answers(), next);
    poll(NULL, 0, 20);
    CHECK_INT(waitpid(next, NULL, WNOHANG), 0);
    tell(next, SIGTERM);
    CHECK_INT(await_end(next), 0);
    check_no_child();
    end_upgradable();
}

TEST_ONCE(a_new_program_lives_when_the_old_one_dies)
{
    die_in_upgrade(NEXT_IS_SLOW);
    die_in_upgrade(NEXT_ONE_IS_SLOW);
}

/* Without a server of tsrv_server_start's the end of a worker can be a good one; a program's cannot. */
TEST_ONCE(an_upgrade_of_workers_with_sockets_that_were_added_may_fail)
{
    begin_upgradable();
    hands_fds_over = true;
    board->next.how = NEXT_EXITS_0;
    pid_t pid = launch(program_add_sockets);
    await_forks(2);
    int before = warnings();
    tell(pid, SIGUSR2);
    AWAIT(warnings() > before);
    poke(pid);
    CHECK_INT(parent_that_answers(), pid);
    CHECK_INT(exits_seen(), 0);
    tell(pid, SIGTERM);
    CHECK_INT(await_end(pid), 0);
    check_no_child();
    end_upgradable();
}

/* Sockets that were added are handed over when the options name them. */
TEST_ONCE(an_upgrade_hands_sockets_over_that_were_added)
{
    begin_upgradable();
    hands_fds_over = true;
    pid_t pid = launch(program_add_sockets);
    await_forks(2);
    upgrade(pid);
    check_upgraded(pid, 2);
    end_upgradable();
}

/* What an upgrade needs and does not get, in the parent and in the child that becomes the new program. */
TEST_ONCE(an_upgrade_whose_calls_fail_is_given_up)
{
    static const struct {
        const char *name;
        int skip, code, where;
    } rows[] = {{"fork", 0, EAGAIN, IN_PARENT},     {"malloc", 0, ENOMEM, IN_PARENT},
                {"pipe", 0, EMFILE, IN_PARENT},     {"fcntl", 0, EMFILE, IN_CHILDREN},
                {"fcntl", 1, EMFILE, IN_CHILDREN},  {"dup2", 0, EMFILE, IN_CHILDREN},
                {"dup2", 1, EMFILE, IN_CHILDREN},   {"setenv", 0, ENOMEM, IN_CHILDREN},
                {"setenv", 1, ENOMEM, IN_CHILDREN}, {"setenv", 2, ENOMEM, IN_CHILDREN},
                {"setenv", 3, ENOMEM, IN_CHILDREN}, {"execvp", 0, EACCES, IN_CHILDREN}};
    begin_upgradable();
    CHECK(setenv("WATCHDOG_PID", "1", 1) == 0); /* another variable that names the process */
    pid_t pid = launch(program_serve);
    await_forks(2);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        int before = warnings();
        fail_after(rows[i].skip, rows[i].name, rows[i].code, 1, rows[i].where);
        tell(pid, SIGUSR2);
        /* In a child: why, its end, and that the upgrade is given up. */
        AWAIT(warnings() >= before + (rows[i].where == IN_CHILDREN ? 3 : 1));
        if (get(&board->failing) != 0) {
            T_FAIL("%s was not called\n%s", rows[i].name, board->log);
        }
        poke(pid);
        CHECK_INT(parent_that_answers(), pid);
    }
    CHECK_INT(exits_seen(), 0);
    upgrade(pid);
    check_upgraded(pid, 2);
    CHECK(unsetenv("WATCHDOG_PID") == 0);
    end_upgradable();
}

/* ---- what an upgraded program finds --------------------------------------------------------*/

/* The old program leaves, and the new one then ends in good order. */
static void check_taken(pid_t old)
{
    CHECK_INT(await_end(old), 0);
    pid_t next = (pid_t)get(&board->next.pid);
    check_served();
    tell(next, SIGTERM);
    CHECK_INT(await_end(next), 0);
    AWAIT(no_child_left(NULL));
}

static void spoil_two(void)
{
    spoiled = SIGALRM;
    block_spoiled();
    spoiled = SIGHUP;
    ignore_spoiled();
}

/* Its mask and what it ignores are the host's, and no handler is left. */
TEST_ONCE(an_upgraded_program_has_the_signals_of_the_host)
{
    static const int kinds[] = {SIGCHLD, SIGHUP, SIGTERM, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGPIPE};
    int facts[SIGNALS];
    begin_upgradable();
    before_program = spoil_two;
    note_signals(facts);
    facts[SIGALRM] |= BLOCKED;
    facts[SIGHUP] |= IGNORED;
    pid_t pid = launch(program_serve);
    await_forks(2);
    upgrade(pid);
    check_upgraded(pid, 2);
    for (int signo = 1; signo < SIGNALS; signo++) {
        CHECK_INT(board->facts[signo] & BLOCKED, facts[signo] & BLOCKED);
    }
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        CHECK_INT(board->facts[kinds[i]], facts[kinds[i]]);
    }
    end_upgradable();
}

/* The new program ends itself while the old one drains: that is no business of the old one's any more. */
TEST_ONCE(a_new_program_that_ends_during_the_drain_of_the_old_one_disturbs_nobody)
{
    static const int signals[] = {SIGTERM, SIGKILL};
    for (int i = 0; i < 2; i++) {
        begin_upgradable();
        fork_options.grace_ms = NEVER_DUE_MS;
        pid_t pid = launch(program_serve);
        await_forks(2);
        int fd = start_request();
        upgrade(pid);
        AWAIT(said("this program ends") == 1);
        pid_t next = (pid_t)get(&board->next.pid);
        tell(next, signals[i]);
        AWAIT(is_refused());
        for (int k = 0; k < 3; k++) {
            advance(pid, STEP_MS);
        }
        check_rests();
        CHECK_INT(waitpid(pid, NULL, WNOHANG), 0);
        finish_request(fd);
        CHECK_INT(await_end(pid), 0);
        AWAIT(no_child_left(NULL));
        end_upgradable();
    }
}

/* After an upgrade everything old ends already, but nobody has asked for that: the first signal is not
 * the second. */
TEST_LOOP(the_first_signal_after_an_upgrade_cuts_no_grace)
{
    begin_upgradable();
    fork_options.grace_ms = NEVER_DUE_MS;
    pid_t pid = launch(program_serve);
    await_forks(2);
    int first = start_request();
    int second = start_request();
    upgrade(pid);
    AWAIT(said("this program ends") == 1);
    tell(pid, SIGTERM);
    AWAIT(said("everything ends already") == 1);
    poke(pid);
    finish_request(first);
    tell(pid, SIGTERM);
    check_cut(second);
    check_upgraded(pid, 2);
    end_upgradable();
}

/* The predecessor is dead: who has nobody to leave the place to makes its workers good, and the file of
 * its socket goes with it. */
TEST_ONCE(a_new_program_whose_predecessor_is_dead_is_on_its_own)
{
    use_unix_socket();
    begin_upgradable();
    board->next.how = NEXT_IS_SLOW;
    pid_t pid = launch(program_serve);
    await_forks(2);
    tell(pid, SIGUSR2);
    AWAIT(get(&board->held) == 1);
    tell(pid, SIGKILL);
    await_end(pid);
    AWAIT(is_gone(board->pids[0]) && is_gone(board->pids[1]));
    put(&board->go, 1);
    await_forks(4);
    tell(board->pids[2], SIGKILL);
    await_forks(5);
    check_served();
    pid_t next = (pid_t)get(&board->next.pid);
    tell(next, SIGTERM);
    CHECK_INT(await_end(next), 0);
    CHECK(access(unix_path, F_OK) != 0 && errno == ENOENT);
    check_no_child();
    end_upgradable();
}

/* Two servers, of two ports, in the same workers. */
static int program_two_servers(void)
{
    if (server_options.on_start == NULL) {
        server_options.on_start = on_start;
    }
    tsrv_server *first = new_bound_server(), *second;
    tsrv_address address;
    server_options.on_start = nothing_in_start;
    second = new_server();
    CHECK_INT(tsrv_server_bind(second, board->second_port, "127.0.0.1", &bind_options), TSRV_OK);
    CHECK_INT(tsrv_server_address(second, 0, &address), TSRV_OK);
    put(&board->second_port, tsrv_address_port(&address));
    int rc = tsrv_server_start(first, workers, &fork_options);
    if (rc == TSRV_OK) {
        CHECK_INT(tsrv_server_start(second, 1, NULL), TSRV_OK);
        rc = tsrv_loop_run(NULL);
    }
    tsrv_server_free(second);
    tsrv_server_free(first);
    return rc == TSRV_EPARENT ? (int)TSRV_OK : rc;
}

TEST_ONCE(an_upgrade_hands_the_ports_of_two_servers_over)
{
    begin_upgradable();
    pid_t pid = launch(program_two_servers);
    await_forks(2);
    int ports[2] = {board->port, board->second_port};
    upgrade_to(pid, NEXT_TWO_SERVERS);
    CHECK_INT(await_end(pid), 0);
    pid_t next = (pid_t)get(&board->next.pid);
    for (int i = 0; i < 2; i++) {
        put(&board->port, ports[i]);
        CHECK_INT(parent_that_answers(), next);
    }
    tell(next, SIGTERM);
    CHECK_INT(await_end(next), 0);
    CHECK(is_refused());
    check_no_child();
    end_upgradable();
}

/* ---- sockets of a service manager over an upgrade ------------------------------------------*/

static void close_above_2(void)
{
    for (int fd = 3; fd < T_MAX_FD; fd++) {
        close(fd);
    }
}

/* As a service manager hands so many sockets over, which are open from 3 on. */
static void set_handed(int count)
{
    char text[24];
    snprintf(text, sizeof text, "%ld", (long)getpid());
    CHECK(setenv("LISTEN_PID", text, 1) == 0);
    snprintf(text, sizeof text, "%d", count);
    CHECK(setenv("LISTEN_FDS", text, 1) == 0);
}

/* One server on two unix sockets. */
static int program_two_files(void)
{
    char second[120];
    if (server_options.on_start == NULL) {
        server_options.on_start = on_start;
    }
    tsrv_server *server = new_bound_server();
    snprintf(second, sizeof second, "unix:%s", path_of("second"));
    CHECK_INT(tsrv_server_bind(server, 0, second, &bind_options), TSRV_OK);
    int rc = tsrv_server_start(server, workers, &fork_options);
    rc = rc == TSRV_OK ? tsrv_loop_run(NULL) : rc;
    tsrv_server_free(server);
    return rc == TSRV_EPARENT ? (int)TSRV_OK : rc;
}

static int program_handed_file(void)
{
    CHECK_INT(listen_plainly(unix_path, NULL), 3);
    set_handed(1);
    return program_two_files();
}

/* The file of a socket that the service manager has made is the manager's: it stays, while our own goes. */
TEST_ONCE(the_file_of_a_service_managers_socket_stays)
{
    use_unix_socket();
    begin_upgradable();
    before_program = close_above_2;
    pid_t pid = launch(program_handed_file);
    await_forks(2);
    for (int i = 0; i < 2; i++) {
        put(&board->next.count, 0);
        upgrade_to(pid, NEXT_TWO_FILES);
        AWAIT(get(&board->next.count) == 1);
        CHECK_INT(await_end(pid), 0);
        pid = (pid_t)get(&board->next.pid);
        CHECK(access(unix_path, F_OK) == 0 && access(path_of("second"), F_OK) == 0);
        CHECK_INT(parent_that_answers(), pid);
    }
    tell(pid, SIGTERM);
    CHECK_INT(await_end(pid), 0);
    CHECK(access(unix_path, F_OK) == 0);
    CHECK(access(path_of("second"), F_OK) != 0 && errno == ENOENT);
    check_no_child();
    end_upgradable();
}

/* Two sockets that a service manager has named, behind one of our own. */
static int program_handed_names(void)
{
    CHECK_INT(listen_plainly(NULL, &board->port), 3);
    CHECK_INT(listen_plainly(NULL, &board->second_port), 4);
    set_handed(2);
    CHECK(setenv("LISTEN_FDNAMES", "web:api", 1) == 0);
    tsrv_server *server = new_server();
    tsrv_address address;
    CHECK_INT(tsrv_server_bind(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
    put(&board->held, tsrv_address_port(&address));
    CHECK_INT(tsrv_server_bind(server, board->second_port, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_bind(server, board->port, "127.0.0.1", NULL), TSRV_OK);
    int rc = tsrv_server_start(server, workers, &fork_options);
    if (rc == TSRV_OK) {
        note_worker();
        rc = tsrv_loop_run(NULL);
    }
    tsrv_server_free(server);
    return rc == TSRV_EPARENT ? (int)TSRV_OK : rc;
}

static bool is_named(int port_number, const char *name)
{
    char text[100];
    snprintf(text, sizeof text, "port %d is named \"%s\"", port_number, name);
    return said(text) > 0;
}

/* Each socket keeps its name; what the program has bound has none. */
TEST_ONCE(an_upgrade_keeps_the_names_of_sockets)
{
    begin_upgradable();
    before_program = close_above_2;
    pid_t pid = launch(program_handed_names);
    await_forks(2);
    int web = get(&board->port), api = get(&board->second_port), own = get(&board->held);
    upgrade(pid);
    check_taken(pid);
    CHECK(is_named(own, ""));
    CHECK(is_named(web, "web"));
    CHECK(is_named(api, "api"));
    end_upgradable();
}

/* ---- many files ----------------------------------------------------------------------------*/

enum { MANY_FILES = 200 };

static const char *many_path(int number)
{
    static char path[120];
    snprintf(path, sizeof path, "%s/%d", directory, number);
    return path;
}

/* A server on a port, and on that many unix sockets. */
static int program_many_files(void)
{
    if (server_options.on_start == NULL) {
        server_options.on_start = on_start;
    }
    tsrv_server *server = new_bound_server();
    for (int i = 0; i < MANY_FILES; i++) {
        char address[140];
        snprintf(address, sizeof address, "unix:%s", many_path(i));
        CHECK_INT(tsrv_server_bind(server, 0, address, NULL), TSRV_OK);
    }
    int rc = tsrv_server_start(server, workers, &fork_options);
    rc = rc == TSRV_OK ? tsrv_loop_run(NULL) : rc;
    tsrv_server_free(server);
    return rc == TSRV_EPARENT ? (int)TSRV_OK : rc;
}

/* However many they are, the last program removes them. */
TEST_ONCE(the_files_of_many_unix_sockets_go_after_an_upgrade)
{
    begin_upgradable();
    pid_t pid = launch(program_many_files);
    await_forks(2);
    upgrade_to(pid, NEXT_MANY_FILES);
    CHECK_INT(await_end(pid), 0);
    for (int i = 0; i < MANY_FILES; i++) {
        CHECK(access(many_path(i), F_OK) == 0);
    }
    check_taken(pid);
    for (int i = 0; i < MANY_FILES; i++) {
        CHECK(access(many_path(i), F_OK) != 0 && errno == ENOENT);
    }
    end_upgradable();
}

/* ---- what a service manager is told in an upgrade -------------------------------------------*/

/* Where the service manager listens, who learns the sender's process id. */
static int listen_for_notes(void)
{
    struct sockaddr_un local = t_unix_address(path_of("second"));
    int on = 1, fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&local, sizeof local) == 0);
    CHECK(setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) == 0);
    CHECK(setenv("NOTIFY_SOCKET", local.sun_path, 1) == 0);
    return fd;
}

/* Adds what this process has told to the lines of the text. */
static void take_notes(int notes, pid_t pid, char *text, size_t size)
{
    union {
        struct cmsghdr header;
        char room[256];
    } control;
    char note[200];
    struct iovec part = {note, sizeof note - 1};
    struct msghdr header;
    struct ucred who;
    for (;;) {
        memset(&header, 0, sizeof header);
        header.msg_iov = &part;
        header.msg_iovlen = 1;
        header.msg_control = &control;
        header.msg_controllen = sizeof control;
        ssize_t got = recvmsg(notes, &header, MSG_DONTWAIT);
        if (got < 0) {
            return;
        }
        note[got] = 0;
        memcpy(&who, CMSG_DATA(CMSG_FIRSTHDR(&header)), sizeof who);
        if (who.pid == pid) {
            size_t used = strlen(text);
            snprintf(text + used, size - used, "%.*s\n", (int)strcspn(note, "\n"), note);
        }
    }
}

/* A reload that an upgrade overtakes has its end: a service manager that waits for it (Type=notify-reload)
 * would believe nothing else. */
TEST_ONCE(a_reload_that_an_upgrade_overtakes_is_said_to_be_over)
{
    char text[1000] = "", expected[100];
    begin_upgradable();
    int notes = listen_for_notes();
    fork_options.grace_ms = 100;
    fork_options.start_timeout_ms = TSRV_NEVER; /* the reload does not end by itself */
    server_options.on_start = behave_in_start;
    pid_t pid = launch(program_serve);
    await_forks(2);
    poke(pid); /* it has seen that they accept, and said so */
    put(&board->value, HANGS_DEAF);
    tell(pid, SIGHUP);
    AWAIT(get(&board->held) > 0);
    upgrade(pid);
    AWAIT((advance(pid, STEP_MS), poll(NULL, 0, 20), said("this program ends") == 1));
    advance_until_end(pid);
    take_notes(notes, pid, text, sizeof text);
    pid_t next = (pid_t)get(&board->next.pid);
    snprintf(expected, sizeof expected, "READY=1\nRELOADING=1\nREADY=1\nMAINPID=%ld\n", (long)next);
    CHECK_STR(text, expected);
    tell(next, SIGTERM);
    CHECK_INT(await_end(next), 0);
    check_no_child();
    CHECK(unsetenv("NOTIFY_SOCKET") == 0);
    t_close(notes);
    end_upgradable();
}

/* Others' states, until the service manager has no room for one more. */
static void fill_notes(void)
{
    struct sockaddr_un local = t_unix_address(path_of("second"));
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&local, sizeof local) == 0);
    while (send(fd, "STATUS=another", 14, 0) == 14) {
    }
    CHECK_INT(errno, EAGAIN);
    t_close(fd);
}

/* What has replaced this program is told again until it is heard: the service would end with this program, which
 * stays so long, but not for ever. */
static void yield_untold(bool is_heard)
{
    char text[1000] = "", expected[100];
    begin_upgradable();
    int notes = listen_for_notes();
    pid_t pid = launch(program_serve);
    await_forks(2);
    poke(pid);
    AWAIT((take_notes(notes, pid, text, sizeof text), text[0] != 0));
    fill_notes();
    upgrade(pid);
    AWAIT((advance(pid, STEP_MS), poll(NULL, 0, 20), said("this program ends") == 1));
    AWAIT(exits_seen() == 2);
    if (is_heard) {
        AWAIT((take_notes(notes, pid, text, sizeof text), strstr(text, "MAINPID") != NULL));
        CHECK_INT(await_end(pid), 0);
    } else {
        advance_until_end(pid);
        take_notes(notes, pid, text, sizeof text);
    }
    pid_t next = (pid_t)get(&board->next.pid);
    snprintf(expected, sizeof expected, is_heard ? "READY=1\nMAINPID=%ld\n" : "READY=1\n", (long)next);
    CHECK_STR(text, expected);
    CHECK_INT(said("cannot be told MAINPID"), 1);
    tell(next, SIGTERM);
    CHECK_INT(await_end(next), 0);
    check_no_child();
    CHECK(unsetenv("NOTIFY_SOCKET") == 0);
    t_close(notes);
    end_upgradable();
}

TEST_ONCE(an_upgrade_is_told_again_until_it_is_heard)
{
    yield_untold(true);
}

TEST_ONCE(an_upgrade_that_nobody_hears_of_ends_all_the_same)
{
    yield_untold(false);
}

/* What was not heard in time is not said behind the end. */
TEST_ONCE(readiness_is_not_told_behind_the_end)
{
    char text[1000] = "";
    begin_upgradable();
    int notes = listen_for_notes();
    fill_notes();
    pid_t pid = launch(program_serve);
    await_forks(2);
    AWAIT(said("cannot be told READY=1") == 1);
    int fd = start_request();
    tell(pid, SIGTERM);
    AWAIT(said("cannot be told STOPPING=1") == 1);
    take_notes(notes, pid, text, sizeof text);
    for (int i = 0; i < 10; i++) {
        poke(pid);
    }
    finish_request(fd);
    CHECK_INT(await_end(pid), 0);
    take_notes(notes, pid, text, sizeof text);
    CHECK_STR(text, "");
    CHECK(unsetenv("NOTIFY_SOCKET") == 0);
    t_close(notes);
    end_upgradable();
}

/* A reload ends, and a service manager would take READY=1 for the start's: it comes when a worker accepts. */
TEST_ONCE(a_reload_before_anybody_accepts_is_no_readiness)
{
    char text[1000] = "";
    make_directory();
    int notes = listen_for_notes();
    begin(2);
    fork_options.max_restarts = TSRV_NEVER;
    server_options.on_start = behave_in_start;
    put(&board->value, EXITS_1);
    pid_t pid = launch(program_serve);
    await_exits(2);
    tell(pid, SIGHUP);
    AWAIT(said("reload: over, but 2 of 2 workers do not come up") == 1);
    poke(pid);
    take_notes(notes, pid, text, sizeof text);
    CHECK_STR(text, "");
    put(&board->value, IS_FINE);
    AWAIT((take_notes(notes, pid, text, sizeof text), text[0] != 0));
    CHECK_STR(text, "READY=1\n");
    stop_well(pid, TSRV_OK);
    CHECK(unsetenv("NOTIFY_SOCKET") == 0);
    t_close(notes);
    remove_directory();
}

static void hang_up_early(void)
{
    spoiled = SIGHUP;
    block_spoiled();
    CHECK(raise(SIGHUP) == 0);
}

/* Nor is that of a single process before its on_start has returned. */
TEST_ONCE(a_hangup_that_waits_at_the_start_is_no_readiness)
{
    char text[1000] = "";
    make_directory();
    int notes = listen_for_notes();
    begin(1);
    before_program = hang_up_early;
    server_options.on_start = behave_in_start;
    put(&board->value, IS_SLOW);
    pid_t pid = launch(program_serve);
    AWAIT(get(&board->held) == 1);
    take_notes(notes, pid, text, sizeof text);
    CHECK_STR(text, "");
    put(&board->go, 1);
    await_forks(1);
    AWAIT((take_notes(notes, pid, text, sizeof text), text[0] != 0));
    CHECK_STR(text, "READY=1\n");
    tell(pid, SIGTERM);
    CHECK_INT(await_end(pid), 0);
    CHECK(unsetenv("NOTIFY_SOCKET") == 0);
    t_close(notes);
    remove_directory();
}

enum { STOPS, DRAINS };

static int other_end;

static void close_other_end(tsrv_stream *stream, int reason, void *context)
{
    (void)stream, (void)reason, (void)context;
    t_close(other_end);
}

/* Listens no more when it begins, and has a connection. */
static void take_one_and_end(tsrv_server *server, void *context)
{
    int pair[2];
    on_start(server, context);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    other_end = pair[1];
    CHECK_INT(tsrv_server_add_stream(server, pair[0]), TSRV_OK);
    if (get(&board->value) == STOPS) {
        tsrv_server_stop(server);
    } else {
        CHECK_INT(tsrv_server_drain(server, TSRV_NEVER), TSRV_EAGAIN);
    }
    put(&board->held, 1);
}

/* Who has stopped in its on_start serves those that it has; who drains is at its end. */
TEST_LOOP(an_on_start_that_stops_is_readiness_and_one_that_drains_is_none)
{
    for (int how = STOPS; how <= DRAINS; how++) {
        begin(1);
        put(&board->value, how);
        server_options.on_start = take_one_and_end;
        server_options.on_close = close_other_end;
        pid_t pid = launch(program_serve);
        AWAIT(get(&board->held) == 1);
        if (how == STOPS) {
            AWAIT(said("ready: process") == 1);
            tell(pid, SIGTERM);
        }
        check_end(pid, 0, TSRV_OK);
        CHECK_INT(said("ready: process"), how == STOPS);
    }
}

/* A service manager that waits for the end of a reload (Type=notify-reload) hears of a single process's, too. */
TEST_ONCE(a_reload_of_a_single_process_is_told)
{
    char text[1000] = "";
    make_directory();
    int notes = listen_for_notes();
    begin(1);
    pid_t pid = launch(program_serve);
    await_forks(1);
    AWAIT((take_notes(notes, pid, text, sizeof text), strcmp(text, "READY=1\n") == 0));
    text[0] = 0;
    tell(pid, SIGHUP);
    AWAIT((take_notes(notes, pid, text, sizeof text), strstr(text, "READY=1") != NULL));
    CHECK_STR(text, "RELOADING=1\nREADY=1\n");
    text[0] = 0;
    int fd = start_request();
    tell(pid, SIGTERM);
    AWAIT(is_refused());
    tell(pid, SIGHUP);
    finish_request(fd);
    CHECK_INT(await_end(pid), 0);
    take_notes(notes, pid, text, sizeof text);
    CHECK_STR(text, "STOPPING=1\n");
    CHECK(unsetenv("NOTIFY_SOCKET") == 0);
    t_close(notes);
    remove_directory();
}

/* ---- workers behind their loop -------------------------------------------------------------*/

/* A worker tidies up until the test lets it go. */
static int program_tidies_up(void)
{
    int rc = program_serve();
    if (tsrv_task_id() >= 0) {
        __atomic_add_fetch(&board->held, 1, __ATOMIC_ACQ_REL);
        while (get(&board->go) == 0) {
            poll(NULL, 0, 1);
        }
    }
    return rc;
}

/* Its loop does not turn any more, and need not. */
TEST_LOOP(a_worker_that_tidies_up_is_not_taken_for_hung)
{
    begin(2);
    fork_options.heartbeat_ms = 1000 * t_scale();
    pid_t pid = launch(program_tidies_up);
    await_forks(2);
    tell(board->pids[0], SIGTERM);
    tell(board->pids[1], SIGTERM);
    AWAIT(get(&board->held) == 2);
    advance(pid, 20 * fork_options.heartbeat_ms);
    CHECK_INT(exits_seen(), 0);
    put(&board->go, 1);
    await_exits(2);
    for (int i = 0; i < 2; i++) {
        CHECK(WIFEXITED(board->exit[i].status) && WEXITSTATUS(board->exit[i].status) == 0);
    }
    stop_well(pid, TSRV_OK);
}

static void stop_running(void *context)
{
    (void)context;
    tsrv_loop_stop(NULL);
}

/* SIGUSR1 ends a worker's loop. A second later, in which its beat was due, the server is freed, which
 * turns the loop until the connections have ended; then the worker tidies up. */
static int program_frees_and_tidies_up(void)
{
    tsrv_server *server = new_bound_server();
    int rc = tsrv_server_start(server, workers, &fork_options);
    if (rc == TSRV_OK) {
        CHECK_INT(tsrv_signal_start(NULL, &own_watch, SIGUSR1, stop_running, NULL), TSRV_OK);
        rc = tsrv_loop_run(NULL);
        tsrv_signal_stop(&own_watch);
        __atomic_add_fetch(&board->ahead_ns, (int64_t)1000000000, __ATOMIC_ACQ_REL);
    }
    tsrv_server_free(server);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
    if (tsrv_task_id() >= 0) {
        __atomic_add_fetch(&board->held, 1, __ATOMIC_ACQ_REL);
        AWAIT(get(&board->go) == 1);
    }
    return rc;
}

static pid_t tidy_up_behind_the_loop(void)
{
    int fds[2];
    long who = 0;
    begin(2);
    server_options.on_start = on_start;
    pid_t pid = launch(program_frees_and_tidies_up);
    await_forks(2);
    for (int i = 0; i < 2; i++) {
        fds[i] = connect_to(i, &who);
        tell((pid_t)who, SIGUSR1);
        AWAIT(get(&board->held) == i + 1);
    }
    t_close_all(fds, 2);
    return pid;
}

/* Whatever has turned the loop behind its end: the parent does not take it for one that still turns. */
TEST_LOOP(a_worker_that_has_freed_its_server_behind_its_loop_is_not_taken_for_hung)
{
    fork_options.heartbeat_ms = 1000 * t_scale();
    pid_t pid = tidy_up_behind_the_loop();
    advance(pid, 20 * fork_options.heartbeat_ms);
    CHECK_INT(exits_seen(), 0);
    put(&board->go, 1);
    await_exits(2);
    check_exits_are_good();
    stop_well(pid, TSRV_EPARENT);
}

TEST_LOOP(a_worker_that_has_freed_its_server_behind_its_loop_ends_with_a_stop)
{
    fork_options.grace_ms = NEVER_DUE_MS;
    stop_well(tidy_up_behind_the_loop(), TSRV_EPARENT);
    for (int i = 0; i < 2; i++) {
        CHECK_INT(board->exit[i].status, SIGTERM);
    }
}

/* One that hangs there ends with its parent, whether it was told to end before or not. */
TEST_ONCE(workers_that_hang_behind_their_loop_end_with_the_parent)
{
    for (int told = 0; told < 2; told++) {
        begin(2);
        pid_t pid = launch(program_tidies_up);
        await_forks(2);
        if (told) {
            tell(pid, SIGTERM);
            AWAIT(get(&board->held) == 2);
        }
        tell(pid, SIGKILL);
        await_end(pid);
        for (int i = 0; i < 2; i++) {
            if (!has_exited(board->pids[i])) { /* orphans are this process's */
                await_end(board->pids[i]);
            }
        }
        clear_board();
    }
}

static int program_starts_another(void)
{
    int rc = program_serve();
    if (tsrv_task_id() >= 0) {
        put(&board->value, system("exec 2>/dev/null; kill -TERM $$; exit 3")); /* which it has not ignored */
    }
    return rc;
}

/* What a worker starts there can be ended as usual. */
TEST_ONCE(programs_that_a_worker_starts_behind_its_loop_ignore_nothing)
{
    begin(2);
    pid_t pid = launch(program_starts_another);
    await_forks(2);
    stop_well(pid, TSRV_OK);
    CHECK_INT(WTERMSIG(get(&board->value)), SIGTERM);
}

/* ---- who has bound, and then goes on in a child --------------------------------------------*/

/* As with daemon(3), whose parent ends. */
static int program_goes_on_in_a_child(void)
{
    int fds[2], rc;
    tsrv_address address;
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, fds, 2), 1);
    CHECK_INT(tsrvi_address_get(fds[0], tsrvi_getsockname, &address), TSRV_OK);
    in_program = false; /* it is no worker */
    pid_t child = fork();
    in_program = true;
    if (child != 0) {
        int status = 0;
        tsrvi_bound_close(fds[0]);
        put(&board->value, child);
        CHECK(waitpid(child, &status, 0) == child && status == 0);
        return TSRV_OK;
    }
    put(&board->port, tsrv_address_port(&address));
    if ((rc = tsrv_fork_processes(2, &fork_options)) < 0) {
        close(fds[0]);
        _exit(rc == TSRV_EPARENT ? 0 : 1);
    }
    server_options.on_start = on_start;
    tsrv_server *server = new_server();
    CHECK_INT(tsrv_server_add_sockets(server, fds, 1), TSRV_OK);
    CHECK_INT(tsrv_loop_run(NULL), TSRV_OK);
    tsrv_server_free(server);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
    _exit(0);
}

TEST_ONCE(a_parent_that_has_inherited_its_sockets_stops_listening)
{
    begin(2);
    pid_t pid = launch(program_goes_on_in_a_child);
    await_forks(2);
    int fd = start_request();
    tell(get(&board->value), SIGTERM);
    AWAIT(is_refused());
    for (int i = 0; i < 20; i++) {
        CHECK(is_refused());
    }
    finish_request(fd);
    CHECK(await_end(pid) == 0);
}

/* ---- what is refused -----------------------------------------------------------------------*/

TEST_ONCE(sockets_to_hand_over_that_are_none_are_refused)
{
    tsrv_fork_options options = {0};
    int fds[1] = {0};
    tsrv_set_log(t_no_log, NULL);
    options.fd_count = -1;
    options.fds = fds;
    CHECK_INT(tsrv_fork_processes(2, &options), TSRV_EINVAL);
    options.fd_count = 1;
    options.fds = NULL;
    CHECK_INT(tsrv_fork_processes(2, &options), TSRV_EINVAL);
}

/* Its workers could run no loop: they would have that of the process before. */
TEST_ONCE(a_child_of_a_process_with_a_loop_starts_no_workers)
{
    CHECK(tsrv_loop_current() != NULL);
    pid_t pid = fork();
    if (pid == 0) {
        tsrv_server_options options = {0};
        tsrv_set_log(t_no_log, NULL);
        options.handle_stream = serve_lines;
        _exit(tsrv_serve(0, "127.0.0.1", 2, &options) == TSRV_EINVAL ? 0 : 1);
    }
    CHECK(await_end(pid) == 0);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
}
