/* Listeners: accept, and waiting for it, that fails once or for good. Nothing spins, nothing stays
 * deaf, and each listener pauses for itself. */
#include "script.h"

static const tsrv_server_options defaults;
static int entered;

/* Answers each line with itself. */
static int echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    if (!*(bool *)tsrv_data(stream)) {
        *(bool *)tsrv_data(stream) = true;
        entered++;
    }
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        tsrv_write(stream, line.data, line.size);
    }
    return rc;
}

static void open_echo(int max_connections)
{
    tsrv_server_options options = defaults;
    entered = 0;
    options.handle_stream = echo;
    options.data_size = sizeof(bool);
    options.max_connections = max_connections;
    s_open(options);
}

static int ask(int port)
{
    int fd = t_connect(port);
    t_sends(fd, "hello\n");
    return fd;
}

static void expect_answer(int fd)
{
    s_expect(fd, "hello\n");
    t_close(fd);
}

static void fail_from_now_on(const char *name, int code, long first, bool sticky)
{
    t_fault_name = name;
    t_fault_errno = code;
    t_fault_calls = t_fault_hits = 0;
    t_fault_sticky = sticky;
    t_fault_at = first;
}

/* A policy that forbids accept4 is taken to forbid that call only, so here it is done without. */
static void forbid_accept(int code, bool sticky)
{
    __atomic_fetch_or(&tsrvi_without, TSRVI_WITHOUT_ACCEPT4, __ATOMIC_RELAXED);
    fail_from_now_on("accept", code, 1, sticky);
}

/* ---- accept -------------------------------------------------------------------------------*/

static const int for_good[] = {EPERM, EACCES, ENOSYS, EPROTO, ECONNABORTED, EBADF, EINVAL, ENOTSOCK, EOPNOTSUPP};
enum { FOR_GOOD = sizeof for_good / sizeof for_good[0] };

TEST_LOOP(accept_that_fails_for_good_is_tried_some_times_a_second)
{
    for (int i = 0; i < FOR_GOOD; i++) {
        tsrv_stats stats;
        open_echo(0);
        forbid_accept(for_good[i], true);
        int fd = ask(s_port);
        s_run_ms(3000);
        CHECK(t_fault_hits >= 3);
        CHECK(t_fault_hits <= 100);
        CHECK(s_log_lines >= 1 && s_log_lines <= 4);
        CHECK(strstr(s_log, strerror(for_good[i])) != NULL);
        CHECK(strstr(s_log, "127.0.0.1:") != NULL);
        tsrv_server_stats(s_server, &stats);
        CHECK(stats.accept_pauses >= 3);
        CHECK_INT(stats.accept_errors, t_fault_hits);
        CHECK_INT(stats.accepted, 0);

        /* What has forbidden it changes its mind. */
        t_fault_at = 0;
        s_run_ms(1100);
        CHECK_INT(entered, 1);
        expect_answer(fd);
        s_close();
    }
}

/* An error or two belong to their connections. */
TEST_LOOP(accept_that_fails_once_costs_no_time)
{
    for (int i = 0; i < FOR_GOOD; i++) {
        open_echo(0);
        int fd = ask(s_port);
        forbid_accept(for_good[i], false);
        s_settle();
        CHECK_INT(t_fault_hits, 1);
        t_fault_at = 0;
        CHECK_INT(entered, 1);
        CHECK_INT(s_log_lines, 0);
        expect_answer(fd);
        s_close();
    }
}

/* ---- waiting for a listener ---------------------------------------------------------------*/

/* What the backend asks the kernel with. */
static const char *wait_call(void)
{
    return t_backend == TSRV_BACKEND_EPOLL ? "epoll_ctl" : t_backend == TSRV_BACKEND_KQUEUE ? "kevent_set" : "fcntl";
}

/* One client is in, another has to wait, and the first one goes. */
static int make_room(void)
{
    int first = ask(s_port);
    s_expect(first, "hello\n");
    int second = ask(s_port);
    s_settle();
    CHECK_INT(entered, 1);
    return t_close(first), second;
}

TEST_LOOP(resume_that_fails_once_is_tried_again)
{
    open_echo(1);
    int fd = make_room();
    fail_from_now_on(wait_call(), ENOMEM, 1, false);
    s_settle();
    CHECK_INT(t_fault_hits, 1);
    t_fault_at = 0;
    CHECK_INT(s_log_lines, 1);
    CHECK(strstr(s_log, "cannot accept") != NULL);
    s_run_ms(200);
    CHECK_INT(entered, 2);
    expect_answer(fd);
    s_close();
}

TEST_LOOP(resume_that_fails_for_long_is_tried_again)
{
    open_echo(1);
    int fd = make_room();
    fail_from_now_on(wait_call(), ENOSPC, 1, true);
    s_run_ms(3000);
    CHECK(t_fault_hits >= 3 && t_fault_hits <= 20);
    CHECK(s_log_lines >= 1 && s_log_lines <= 4);
    t_fault_at = 0;
    s_run_ms(1100);
    CHECK_INT(entered, 2);
    expect_answer(fd);
    s_close();
}

/* Workers go to the end of the queue of those who wait for a listener; with poll there is none. */
TEST_LOOP(worker_that_cannot_queue_again_is_not_deaf)
{
    for (int sticky = 0; sticky <= 1 && t_backend != TSRV_BACKEND_POLL; sticky++) {
        open_echo(0);
        tsrvi_worker_id = 0;
        fail_from_now_on(wait_call(), ENOMEM, 2, sticky);
        tsrvi_listener_requeue(s_server->listeners);
        CHECK_INT(t_fault_hits, 1);
        int fd = ask(s_port);
        s_run_ms(sticky ? 2000 : 200);
        CHECK_INT(entered, !sticky);
        CHECK(t_fault_hits < 20);
        CHECK(s_log_lines >= 1 && s_log_lines <= 3);
        t_fault_at = 0;
        s_run_ms(1100);
        CHECK_INT(entered, 1);
        tsrvi_worker_id = -1;
        expect_answer(fd);
        s_close();
    }
}

/* ---- one of two listeners is lost ---------------------------------------------------------*/

enum { OTHER_FILE, CLOSED, SHUT, OTHER_SOCKET, UNLISTENED, LOSSES };

/* By a mistake of the program's, which must not know the number. */
static void lose(int loss, int fd)
{
    int other = loss == OTHER_FILE ? open("/dev/null", O_RDONLY | O_CLOEXEC)
                : loss == OTHER_SOCKET ? socket(AF_INET, SOCK_DGRAM, 0)
                : loss == UNLISTENED ? socket(AF_INET, SOCK_STREAM, 0) : -1;
    if (other >= 0) {
        CHECK(dup2(other, fd) == fd);
        CHECK(close(other) == 0);
    } else if (loss == SHUT) {
        CHECK(shutdown(fd, SHUT_RDWR) == 0);
    } else {
        CHECK(close(fd) == 0);
    }
}

TEST_LOOP(lost_listener_does_not_silence_the_other)
{
    for (int loss = 0; loss < LOSSES; loss++) {
        tsrv_address address;
        int fds[3];
        open_echo(1);
        CHECK_INT(tsrv_server_listen(s_server, 0, "127.0.0.1", NULL), TSRV_OK);
        CHECK_INT(tsrv_server_address(s_server, 1, &address), TSRV_OK);
        int port = tsrv_address_port(&address);
        lose(loss, s_server->listeners->io.fd);
        for (int i = 0; i < 3; i++) {
            fds[i] = ask(port); /* max_connections is 1: all but the first have to wait */
        }
        long waits = 0;
        for (int i = 0; i < 3; i++) {
            expect_answer(fds[i]);
        }
        int64_t end = v_ms() + 3000;
        for (; v_ms() < end; waits++) {
            s_turn();
        }
        CHECK(waits < 1000);
        CHECK(s_log_lines <= 8);
        fds[0] = ask(port);
        expect_answer(fds[0]);
        if (loss == CLOSED) {
            CHECK_INT(s_server->listeners->io.fd, -1); /* the number is the first connection's */
        }
        s_close();
    }
}
