/* Listening, accepting and the lives of streams. Its core is what Tornado's tcpserver_test.py
 * checks, except what needs worker processes. */
#include "test.h"

#include "handlers.h"

#include <sys/resource.h>
#include <sys/un.h>

/* A loop and a server for tests that run them themselves, with raw clients in the same thread. */
typedef struct site {
    tsrv_loop *loop;
    tsrv_server *server;
} site;

static site open_site(tsrv_server_options options)
{
    site s = {NULL, NULL};
    s.loop = t_new_loop();
    options.loop = s.loop;
    options.mode = t_mode;
    options.read_chunk_size = t_hard ? 1 : 0;
    CHECK_INT(tsrv_server_new(&s.server, &options), TSRV_OK);
    return s;
}

static void close_site(site *s)
{
    tsrv_server_free(s->server);
    CHECK_INT(tsrv_loop_free(s->loop), TSRV_OK);
}

static void run_for(tsrv_loop *loop, int duration_ms)
{
    tsrv_timer timer = {0};
    CHECK_INT(tsrv_timer_start(loop, &timer, duration_ms, t_stop_loop, loop), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
}

/* Echoes lines until the peer's end; *context counts the handlers that were entered. */
static int enter_and_echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *entered = (int *)tsrv_data(stream);
    if (*entered == 0) {
        *entered = 1;
        ++*(int *)context;
    }
    return echo_lines(stream, address, context);
}

static tsrv_server_options echo_options(int *entered)
{
    tsrv_server_options options = {0};
    options.handle_stream = enter_and_echo;
    options.data_size = sizeof(int);
    options.context = entered;
    return options;
}

/* ---- what a handler returns ---------------------------------------------------------------*/

typedef struct return_case {
    int value;
    int lines; /* of log that it costs */
} return_case;

static const return_case returns[] = {
    {-EIO, 1}, {0, 0}, {TSRV_EINVAL, 1}, {7, 0}, {TSRV_EOF, 0}, {TSRV_ECLOSED, 0},
    {TSRV_ETIMEOUT, 0}, {TSRV_ETOOLONG, 1}, {TSRV_EPROXY, 1}, {2147483647, 0},
};
enum { RETURNS = COUNT(returns) };

static char return_peer[TSRV_ADDRESS_SIZE];
static int return_at, return_closed;

static int return_a_value(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)context;
    tsrv_address_format(address, return_peer, sizeof return_peer);
    t_log_lines = 0;
    return returns[return_at++].value;
}

static void check_return(tsrv_stream *stream, int reason, void *context)
{
    const return_case *row = &returns[return_closed++];
    (void)stream, (void)context;
    CHECK_INT(reason, row->value);
    CHECK_INT(t_log_lines, row->lines);
    if (row->lines > 0 && strstr(t_log, return_peer) == NULL) {
        T_FAIL("\"%s\" does not name the peer %s", t_log, return_peer);
    }
    t_record(reason);
}

static void connect_for_each_return(int port, void *context)
{
    (void)context;
    for (int i = 0; i < RETURNS; i++) {
        int fd = t_connect(port);
        t_leave(fd);
        t_wait_records(i + 1);
    }
}

/* Tornado's test_handle_stream_coroutine_logging: a failure is logged once, the server lives on. */
TEST_STREAM(test_handle_stream_coroutine_logging)
{
    t_watch_log();
    t_case c = {.handler = return_a_value, .on_close = check_return,
                .client = connect_for_each_return};
    t_run(&c);
    CHECK_INT(return_closed, RETURNS);
}

static int read_to_the_end(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_some(stream, 0, &slice)) == TSRV_OK) {
        t_record((int)slice.size);
    }
    return rc;
}

static void connect_and_reset(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_sends(fd, "x");
    t_wait_records(1);
    t_reset(fd);
    t_wait_records(2);
}

TEST_STREAM(reset_by_the_peer_is_no_failure)
{
    t_watch_log();
    t_case c = {.handler = read_to_the_end, .on_close = t_record_reason,
                .client = connect_and_reset};
    t_run(&c);
    CHECK_INT(t_record_count(), 2);
    CHECK_INT(t_recorded(0), 1);
    CHECK_INT(t_recorded(1), -ECONNRESET);
    CHECK_INT(t_log_lines, 0);
}

static int write_then_close(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address;
    CHECK_INT(tsrv_write(stream, "data", 4), TSRV_OK);
    if (*(bool *)context) {
        CHECK_INT(tsrv_close(stream), TSRV_OK);
        CHECK_INT(tsrv_close(stream), TSRV_OK);
        CHECK_INT(tsrv_write(stream, "more", 4), TSRV_ECLOSED);
        CHECK(tsrv_server_next(tsrv_stream_server(stream), NULL) == NULL);
    }
    return 3;
}

static void expect_data(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_expect(fd, "data");
    t_leave(fd);
}

/* Tornado's test_handle_stream_native_coroutine. */
TEST_STREAM(test_handle_stream_native_coroutine)
{
    for (int i = 0; i < 2; i++) {
        bool close_too = i == 1;
        t_case c = {.handler = write_then_close, .on_close = t_record_reason, .client = expect_data,
                    .context = &close_too};
        t_run(&c);
        CHECK_INT(t_record_count(), i + 1);
        CHECK_INT(t_recorded(i), 3);
    }
}

/* ---- listening and stopping ---------------------------------------------------------------*/

TEST_STREAM(test_stop_twice)
{
    int entered = 0;
    site s = open_site(echo_options(&entered));
    tsrv_address address;
    tsrv_server_stop(s.server);
    int port = t_listen(s.server);
    int fd = t_connect(port);
    t_turn_until(s.loop, &entered, 1);
    tsrv_server_stop(s.server);
    tsrv_server_stop(s.server);
    CHECK_INT(tsrv_server_address(s.server, 0, &address), TSRV_EINVAL);
    CHECK(t_is_refused(port));

    /* What was accepted goes on, and the loop ends with it. */
    t_sends(fd, "still here\n");
    t_shut(fd);
    CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK);
    t_expect(fd, "still here\n");
    t_leave(fd);

    fd = t_connect(t_listen(s.server));
    t_sends(fd, "again\n");
    t_turn_until(s.loop, &entered, 2);
    tsrv_server_stop(s.server);
    t_shut(fd);
    CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK);
    t_expect(fd, "again\n");
    t_leave(fd);
    close_site(&s);
}

static int stop_the_server(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address;
    ++*(int *)context;
    tsrv_server_stop(tsrv_stream_server(stream));
    return 0;
}

/* Tornado's test_stop_in_callback: the rest of the batch is let go without an error. */
TEST_STREAM(test_stop_in_callback)
{
    enum { CLIENTS = 40 };
    tsrv_server_options options = {0};
    int fds[CLIENTS], entered = 0;
    t_watch_log();
    options.handle_stream = stop_the_server;
    options.context = &entered;
    options.close_timeout_ms = 20; /* the clients hold still */
    site s = open_site(options);
    int port = t_listen(s.server);
    for (int i = 0; i < CLIENTS; i++) {
        fds[i] = t_connect(port);
    }
    CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK);
    CHECK(entered >= 1 && entered <= CLIENTS);
    CHECK(t_is_refused(port));
    for (int i = 0; i < CLIENTS; i++) {
        t_drain_and_close(fds[i]);
    }
    CHECK_INT(t_log_lines, 0);
    close_site(&s);
}

/* Tornado's test_listen_single: one process that listens, runs and ends has nothing to complain of. */
TEST_LOOP(test_listen_single)
{
    int fds[2], status;
    char text[512];
    CHECK(pipe(fds) == 0);
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        int entered = 0;
        tsrv_stats stats;
        CHECK(dup2(fds[1], 1) == 1 && dup2(fds[1], 2) == 2);
        t_close_all(fds, 2);
        tsrv_set_log_level(TSRV_LOG_WARNING);
        site s = open_site(echo_options(&entered));
        int fd = t_connect(t_listen(s.server));
        t_turn_until(s.loop, &entered, 1);
        t_close(fd);
        do {
            CHECK(tsrv_loop_run_once(s.loop, TSRV_NEVER) > 0);
            tsrv_server_stats(s.server, &stats);
        } while (stats.closed < 1);
        close_site(&s);
        _exit(0);
    }
    t_close(fds[1]);
    ssize_t n = read(fds[0], text, sizeof text);
    CHECK(n >= 0);
    CHECK_MEM(text, (size_t)n, "", 0);
    t_close(fds[0]);
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST_STREAM(one_server_listens_on_several_ports)
{
    enum { PORTS = 3 };
    int entered = 0, fds[PORTS], ports[PORTS];
    site s = open_site(echo_options(&entered));
    tsrv_address address;
    char text[TSRV_ADDRESS_SIZE], expected[32];
    CHECK_INT(tsrv_server_address(s.server, 0, &address), TSRV_EINVAL);
    for (int i = 0; i < PORTS; i++) {
        CHECK_INT(tsrv_server_listen(s.server, 0, "127.0.0.1", NULL), TSRV_OK);
        CHECK_INT(tsrv_server_address(s.server, i, &address), TSRV_OK);
        CHECK_INT(tsrv_address_family(&address), AF_INET);
        ports[i] = tsrv_address_port(&address);
        CHECK(ports[i] > 0 && (i == 0 || ports[i] != ports[i - 1]));
        snprintf(expected, sizeof expected, "127.0.0.1:%d", ports[i]);
        CHECK_STR(tsrv_address_format(&address, text, sizeof text), expected);
    }
    for (int bad = -1; bad <= PORTS; bad += PORTS + 1) {
        CHECK_INT(tsrv_server_address(s.server, 0, &address), TSRV_OK);
        CHECK_INT(tsrv_server_address(s.server, bad, &address), TSRV_EINVAL);
        CHECK_INT(tsrv_address_family(&address), 0); /* not what was there before */
    }
    for (int i = 0; i < PORTS; i++) {
        fds[i] = t_connect(ports[i]);
        t_sends(fds[i], "hello\n");
        t_shut(fds[i]);
    }
    t_turn_until(s.loop, &entered, PORTS);
    tsrv_server_stop(s.server);
    CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK);
    for (int i = 0; i < PORTS; i++) {
        CHECK(t_is_refused(ports[i]));
        t_expect(fds[i], "hello\n");
        t_leave(fds[i]);
    }
    close_site(&s);
}

TEST_LOOP(failing_listen_is_logged_and_leaves_nothing)
{
    int entered = 0, port, fd = t_raw_socket(SOCK_STREAM, true, &port);
    char text[16];
    tsrv_address address;
    site s = open_site(echo_options(&entered));
    t_watch_log();
    CHECK_INT(tsrv_server_listen(s.server, port, "127.0.0.1", NULL), -EADDRINUSE);
    CHECK_INT(t_log_lines, 1);
    snprintf(text, sizeof text, "%d", port);
    CHECK(strstr(t_log, text) != NULL);
    CHECK(strstr(t_log, "127.0.0.1") != NULL);
    CHECK_INT(tsrv_server_listen(s.server, -1, "127.0.0.1", NULL), TSRV_EINVAL);
    CHECK(strstr(t_log, "127.0.0.1 port -1: ") != NULL);
    CHECK_INT(tsrv_server_listen(s.server, 65536, "127.0.0.1", NULL), TSRV_EINVAL);
    CHECK(strstr(t_log, "127.0.0.1 port 65536: ") != NULL);
    CHECK_INT(tsrv_server_address(s.server, 0, &address), TSRV_EINVAL);
    CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK); /* nothing is left */
    t_close(fd);
    CHECK(t_listen(s.server) > 0);
    close_site(&s);
}

/* Every failure says where it was to listen; a unix socket has no port. */
TEST_ONCE(failing_listen_says_where)
{
    static const struct {
        const char *address, *text;
    } rows[] = {{NULL, "cannot listen on * port 70000: "},
                {"", "cannot listen on * port 70000: "},
                {"127.0.0.1", "cannot listen on 127.0.0.1 port 70000: "},
                {"unix:/none/there", "cannot listen on unix:/none/there: "}};
    int entered = 0;
    site s = open_site(echo_options(&entered));
    t_watch_log();
    for (size_t i = 0; i < COUNT(rows); i++) {
        CHECK(tsrv_server_listen(s.server, 70000, rows[i].address, NULL) < 0);
        CHECK(strncmp(t_log, rows[i].text, strlen(rows[i].text)) == 0);
    }
    CHECK_INT(tsrv_server_add_sockets(s.server, NULL, -1), TSRV_EINVAL);
    CHECK_INT(tsrv_server_add_sockets(s.server, NULL, 0), TSRV_OK);
    close_site(&s);
}

/* What is bound before a failure is closed, and what was bound with it. */
TEST_ONCE(failing_bind_closes_all_of_an_address)
{
    int entered = 0, kept = -1;
    tsrv_address address;
    if (!t_has_ipv6()) {
        SKIP("IPv6 loopback");
    }
    site s = open_site(echo_options(&entered));
    t_watch_log();
    CHECK_INT(tsrv_server_bind(s.server, 0, "127.0.0.1", NULL), TSRV_OK);
    kept = s.server->bound[0].fd;
    int before = t_open_fds();
    for (long at = 1; at <= 2; at++) {
        t_fail_call("realloc", 0, at, false);
        CHECK_INT(tsrv_server_bind(s.server, 0, NULL, NULL), -ENOMEM);
        CHECK_INT(t_fault_hits, 1);
        t_fault_at = 0;
        CHECK_INT(t_open_fds(), before);
        CHECK_INT(t_log_lines, at);
        CHECK(strncmp(t_log, "cannot bind on * port 0: ", 25) == 0);
        CHECK_INT(s.server->bound_count, 1);
        CHECK_INT(s.server->bound[0].fd, kept);
    }
    CHECK_INT(tsrv_server_address(s.server, 1, &address), TSRV_EINVAL);
    close_site(&s);
}

/* A listener that comes while the server is full is deaf until there is room again. */
TEST_LOOP(listener_that_comes_in_a_pause_waits_for_its_end)
{
    int entered = 0;
    tsrv_stats stats;
    tsrv_server_options options = echo_options(&entered);
    options.max_connections = 1;
    site s = open_site(options);
    int port = t_listen(s.server), first = t_connect(port), second = t_connect(port);
    do {
        CHECK(tsrv_loop_run_once(s.loop, 10) > 0);
        tsrv_server_stats(s.server, &stats);
    } while (stats.accept_pauses < 1);
    CHECK_INT(tsrv_server_listen(s.server, 0, "127.0.0.1", NULL), TSRV_OK);
    int third = t_connect(t_port(s.server, 1));
    run_for(s.loop, 20);
    tsrv_server_stats(s.server, &stats);
    CHECK_INT(stats.accept_pauses, 1); /* nor does it pause once more */
    CHECK_INT(entered, 1);
    t_close(first);
    t_turn_until(s.loop, &entered, 2);
    t_close(second);
    t_turn_until(s.loop, &entered, 3);
    t_sends(third, "third\n");
    t_turn_until_text(s.loop, third, "third\n");
    t_close(third);
    close_site(&s);
}

/* ---- whose loop it is ----------------------------------------------------------------------*/

static tsrv_server *listening;

static void listen_here(void *context)
{
    *(int *)context = tsrv_server_listen(listening, 0, "127.0.0.1", NULL);
}

/* Options of a loop are for one that is made: not where the thread has its own, or runs another one. */
TEST_ONCE(loop_of_the_thread_is_made_once)
{
    tsrv_loop_options loop_options = {0};
    tsrv_server_options options = {0};
    int entered = 0, rc = 1;
    loop_options.slow_ms = 77;
    options = echo_options(&entered);
    options.loop_options = &loop_options;
    tsrv_loop *running = t_new_loop();
    CHECK_INT(tsrv_server_new(&listening, &options), TSRV_OK);
    CHECK_INT(tsrv_loop_post(running, listen_here, &rc), TSRV_OK);
    CHECK_INT(tsrv_loop_run_once(running, 0), 1);
    CHECK_INT(rc, TSRV_OK);
    CHECK(listening->loop == running);
    tsrv_server_free(listening);
    CHECK_INT(tsrv_loop_free(running), TSRV_OK);
    CHECK_INT(tsrv_server_new(&listening, &options), TSRV_OK);
    t_fail_call("malloc", 0, 1, false);
    t_watch_log();
    CHECK_INT(tsrv_server_listen(listening, 0, "127.0.0.1", NULL), -ENOMEM);
    t_fault_at = 0;
    CHECK(listening->loop == NULL);
    tsrv_loop *own = tsrv_loop_current();
    CHECK_INT(tsrv_server_listen(listening, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK(listening->loop == own && own->slow.limit != 77 * TSRVI_MS);
    tsrv_server_free(listening);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
}

/* ---- without room for one more timer -------------------------------------------------------*/

static void to_be_refused(void *context)
{
    (void)context;
    T_FAIL("this could not be begun");
}

static void connect_in_vain(void *context)
{
    tsrv_stream *stream = NULL;
    *(int *)context = tsrv_connect("127.0.0.1", 1, NULL, &stream);
}

/* Whatever may need a timer later begins by making room for it: where there is none it does not begin. */
TEST_LOOP(without_room_for_its_timers_nothing_begins)
{
    enum { MOST = 64 };
    static tsrv_timer timers[MOST];
    tsrv_server_options options;
    tsrv_server *second;
    tsrv_timer last = {0};
    tsrv_stats stats;
    int entered = 0, used = 0, connected = 1;
    site s = open_site(options = echo_options(&entered));
    int fd = t_connect(t_listen(s.server));
    options.loop = s.loop;
    CHECK_INT(tsrv_server_new(&second, &options), TSRV_OK);
    if (TSRVI_HAS_COROUTINES) {
        CHECK_INT(tsrv_spawn(s.loop, connect_in_vain, &connected), TSRV_OK);
    }
    memset(timers, 0, sizeof timers);
    while (s.loop->heap.reserved < s.loop->heap.capacity) {
        CHECK(used < MOST);
        CHECK_INT(tsrv_timer_start(s.loop, &timers[used++], 3600000, to_be_refused, NULL), TSRV_OK);
    }
    t_watch_log();
    t_fail_call("realloc", 0, 1, true);
    CHECK_INT(tsrv_timer_start(s.loop, &last, 0, to_be_refused, NULL), -ENOMEM);
    CHECK_INT(tsrv_spawn(s.loop, to_be_refused, NULL), TSRVI_HAS_COROUTINES ? -ENOMEM : TSRV_ENOTSUP);
    CHECK_INT(tsrv_server_listen(second, 0, "127.0.0.1", NULL), -ENOMEM);
    CHECK(second->loop == NULL);
    do {
        CHECK(tsrv_loop_run_once(s.loop, 10) > 0);
        tsrv_server_stats(s.server, &stats);
    } while (stats.accept_errors < 1);
    CHECK_INT(connected, TSRVI_HAS_COROUTINES ? -ENOMEM : 1);
    CHECK_INT(entered, 0);
    if (s.loop->heap.reserved == s.loop->heap.capacity) {
        tsrv_timer_stop(&timers[--used]);
    }
    CHECK_INT(s.loop->heap.capacity - s.loop->heap.reserved, 1); /* a server takes two */
    CHECK_INT(tsrv_server_listen(second, 0, "127.0.0.1", NULL), -ENOMEM);
    t_fault_at = 0;
    t_expect_eof(fd);
    while (used > 0) {
        tsrv_timer_stop(&timers[--used]);
    }
    t_close(fd);
    tsrv_server_free(second);
    close_site(&s);
}

TEST_ONCE(server_refuses_bad_options_and_needs_no_loop)
{
    tsrv_server_options options = {0};
    tsrv_server *server = (tsrv_server *)&options; /* to see it cleared */
    tsrv_server_free(NULL);
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
    CHECK(server == NULL);
    options.handle_stream = enter_and_echo;
    options.mode = 2;
    server = (tsrv_server *)&options;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
    CHECK(server == NULL);
    options.mode = TSRV_CALLBACK;
    int fds = t_open_fds();
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    CHECK_INT(t_open_fds(), fds);
    tsrv_server_stop(server);
    tsrv_server_free(server);
}

/* The default loop is that of the thread that listens first. */
TEST_ONCE(server_without_a_loop_takes_the_threads)
{
    int entered = 0;
    tsrv_server_options options = echo_options(&entered);
    tsrv_server *server;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    options.handle_stream = NULL; /* it was copied */
    options.data_size = 0;
    int fd = t_connect(t_listen(server));
    t_sends(fd, "hello\n");
    t_turn_until(tsrv_loop_current(), &entered, 1);
    tsrv_server_stop(server);
    t_shut(fd);
    CHECK_INT(tsrv_loop_run(NULL), TSRV_OK);
    t_expect(fd, "hello\n");
    t_close(fd);
    tsrv_server_free(server);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
}

typedef struct start_case {
    tsrv_timer timer;
    tsrv_loop *loop;
    int starts, entered, timers;
} start_case;

static void count_timer(void *context)
{
    ((start_case *)context)->timers++;
}

static void note_start(tsrv_server *server, void *context)
{
    start_case *c = (start_case *)context;
    CHECK_INT(c->entered, 0);
    CHECK(t_port(server, 0) > 0);
    CHECK(t_port(server, 1) > 0);
    CHECK(tsrv_loop_current() == c->loop);
    CHECK_INT(tsrv_timer_start(c->loop, &c->timer, 1, count_timer, c), TSRV_OK);
    c->starts++;
}

static int count_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address;
    ((start_case *)context)->entered++;
    return 0;
}

TEST_STREAM(on_start_is_called_once_before_the_first_connection)
{
    static start_case c;
    tsrv_server_options options = {0};
    options.handle_stream = count_handler;
    options.on_start = note_start;
    options.context = &c;
    options.close_timeout_ms = 10;
    site s = open_site(options);
    c.loop = s.loop;
    t_listen(s.server);
    CHECK_INT(tsrv_server_listen(s.server, 0, "127.0.0.1", NULL), TSRV_OK);
    int first = t_connect(t_port(s.server, 0)), second = t_connect(t_port(s.server, 1));
    CHECK_INT(c.starts, 0);
    t_turn_until(s.loop, &c.entered, 2);
    t_turn_until(s.loop, &c.timers, 1);
    tsrv_server_stop(s.server);
    int third = t_connect(t_listen(s.server));
    t_turn_until(s.loop, &c.entered, 3);
    CHECK_INT(c.starts, 1);
    close_site(&s);
    t_close(first);
    t_close(second);
    t_close(third);
}

static void count_start(tsrv_server *server, void *context)
{
    (void)server;
    ((start_case *)context)->starts++;
}

/* A listener that could not be had is no start; the first that can is. */
TEST_STREAM(failed_listen_does_not_start_the_server)
{
    static start_case c;
    tsrv_server_options options = {0};
    int port, taken = t_raw_socket(SOCK_STREAM, true, &port), fds[2];
    t_watch_log();
    options.handle_stream = count_handler;
    options.on_start = count_start;
    options.context = &c;
    options.close_timeout_ms = 10;
    site s = open_site(options);
    for (int i = 0; i < 2; i++) {
        CHECK_INT(tsrv_server_listen(s.server, port, "127.0.0.1", NULL), -EADDRINUSE);
        CHECK(pipe(fds) == 0);
        CHECK_INT(tsrv_server_add_sockets(s.server, fds, 2), TSRV_EINVAL);
        CHECK_INT(tsrv_server_add_sockets(s.server, fds, 0), TSRV_OK);
        CHECK_INT(tsrv_server_add_stream(s.server, -1), -EBADF);
        CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK); /* nothing is left to be called */
    }
    CHECK_INT(c.starts, 0);
    int first = t_connect(t_listen(s.server));
    CHECK_INT(tsrv_server_listen(s.server, port, "127.0.0.1", NULL), -EADDRINUSE);
    CHECK_INT(tsrv_server_listen(s.server, 0, "127.0.0.1", NULL), TSRV_OK);
    int second = t_connect(t_port(s.server, 1));
    t_turn_until(s.loop, &c.entered, 2);
    tsrv_server_stop(s.server);
    CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK);
    CHECK_INT(c.starts, 1);
    close_site(&s);
    t_close(first);
    t_close(second);
    t_close(taken);
}

/* Who is stopped before the loop turns has not begun: the next listener is its start. */
TEST_STREAM(a_server_that_is_stopped_before_its_first_turn_does_not_start)
{
    static start_case c;
    tsrv_server_options options = {0};
    options.handle_stream = count_handler;
    options.on_start = count_start;
    options.context = &c;
    options.close_timeout_ms = 10;
    site s = open_site(options);
    t_listen(s.server);
    tsrv_server_stop(s.server);
    CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK);
    CHECK_INT(c.starts, 0);
    int fd = t_connect(t_listen(s.server));
    t_turn_until(s.loop, &c.entered, 1);
    CHECK_INT(c.starts, 1);
    close_site(&s);
    t_close(fd);
}

static void free_at_start(tsrv_server *server, void *context)
{
    ((start_case *)context)->starts++;
    tsrv_server_free(server);
}

TEST_STREAM(server_may_be_freed_in_on_start)
{
    static start_case c;
    tsrv_server_options options = {0};
    options.handle_stream = count_handler;
    options.on_start = free_at_start;
    options.context = &c;
    site s = open_site(options);
    int fd = t_connect(t_listen(s.server));
    CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK);
    CHECK_INT(c.starts, 1);
    CHECK_INT(c.entered, 0);
    CHECK_INT(tsrv_loop_free(s.loop), TSRV_OK);
    t_drain_and_close(fd);
}

static int times_ready;

static void count_ready(void)
{
    times_ready++;
}

static void stop_at_start(tsrv_server *server, void *context)
{
    ((start_case *)context)->starts++;
    tsrv_server_stop(server);
}

static void stop_now(void *context)
{
    tsrv_server_stop((tsrv_server *)context);
}

static void free_now(void *context)
{
    tsrv_server_free((tsrv_server *)context);
}

/* A worker is ready when all of its servers have begun, and one listens: not only if that is the last one. */
TEST_LOOP(process_is_ready_whichever_server_ends_at_its_start)
{
    enum { STOPS, FREES, STOPPED_BEFORE, FREED_BEFORE, ALL_STOP, HOWS };
    for (int how = 0; how < HOWS; how++) {
        static start_case c;
        tsrv_server_options first = {0}, second = {0};
        tsrv_server *servers[2];
        tsrv_loop *loop = t_new_loop();
        const tsrvi_hooks hooks = {NULL, NULL, NULL, count_ready};
        memset(&c, 0, sizeof c);
        first.handle_stream = second.handle_stream = count_handler;
        first.context = second.context = &c;
        first.loop = second.loop = loop;
        first.on_start = how == ALL_STOP ? stop_at_start : count_start;
        const bool before = how == STOPPED_BEFORE || how == FREED_BEFORE;
        second.on_start = how == FREES ? free_at_start : before ? count_start : stop_at_start;
        CHECK_INT(tsrv_server_new(&servers[0], &first), TSRV_OK);
        CHECK_INT(tsrv_server_new(&servers[1], &second), TSRV_OK);
        times_ready = 0;
        loop->worker.hooks = &hooks;
        int port = t_listen(servers[0]), fd = -1;
        t_listen(servers[1]);
        if (before) { /* when a client has made the first one begin, and before its own turn */
            fd = t_connect(port);
            CHECK_INT(tsrv_loop_post(loop, how == STOPPED_BEFORE ? stop_now : free_now, servers[1]), TSRV_OK);
        }
        for (int turns = 0; turns < 3; turns++) {
            tsrv_loop_run_once(loop, 0);
        }
        CHECK_INT(c.starts, before ? 1 : 2);
        CHECK_INT(times_ready, how == ALL_STOP ? 0 : 1);
        loop->worker.hooks = NULL;
        tsrv_server_free(servers[0]);
        tsrv_server_free(how == FREES || how == FREED_BEFORE ? NULL : servers[1]);
        CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
        if (fd >= 0) {
            t_drain_and_close(fd);
        }
    }
}

/* ---- addresses ----------------------------------------------------------------------------*/

/* Writes the peer's address as the handler sees it, and as the stream tells it. */
static int tell_address(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    char given[TSRV_ADDRESS_SIZE], kept[TSRV_ADDRESS_SIZE], local[TSRV_ADDRESS_SIZE];
    tsrv_address peer, ours;
    ++*(int *)context;
    CHECK_INT(tsrv_peer_address(stream, &peer), TSRV_OK);
    CHECK_INT(tsrv_local_address(stream, &ours), TSRV_OK);
    CHECK(tsrv_address_format(address, given, sizeof given) == given);
    CHECK_STR(tsrv_address_format(&peer, kept, sizeof kept), given);
    CHECK_INT(tsrv_address_family(&ours), tsrv_address_family(address));
    CHECK_INT(tsrv_printf(stream, "%s|%s", given,
                          tsrv_address_format(&ours, local, sizeof local)), TSRV_OK);
    return 0;
}

/* Connects to a listener's address, or to the loopback one where that is the wildcard. */
static int connect_to(const tsrv_address *listener)
{
    struct sockaddr_storage to;
    int fd = socket(tsrv_address_family(listener), SOCK_STREAM, 0);
    CHECK(fd >= 0);
    t_prepare(fd);
    memset(&to, 0, sizeof to);
    memcpy(&to, listener->storage, listener->size);
    if (to.ss_family == AF_INET) {
        ((struct sockaddr_in *)&to)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    } else if (to.ss_family == AF_INET6) {
        ((struct sockaddr_in6 *)&to)->sin6_addr.s6_addr[15] = 1;
    }
    CHECK(connect(fd, (struct sockaddr *)&to, listener->size) == 0);
    return fd;
}

/* Turns the loop until the server has closed the connection; text receives all it sent. */
static void turn_until_eof(tsrv_loop *loop, int fd, char *text, size_t capacity)
{
    int64_t end = t_patience();
    size_t size = 0;
    for (;;) {
        ssize_t n = recv(fd, text + size, capacity - 1 - size, MSG_DONTWAIT);
        if (n == 0) {
            break;
        }
        size += n > 0 ? (size_t)n : 0;
        CHECK(size < capacity - 1);
        CHECK(t_now_ms() < end);
        CHECK(tsrv_loop_run_once(loop, 10) >= 0);
    }
    text[size] = 0;
}

/* One connection to the index-th listener; the server must name the peer and itself as expected,
 * where %d stands for the port of each. */
static void check_addresses(site *s, int *entered, int index, const char *peer, const char *local)
{
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
        struct sockaddr_storage storage;
    } name;
    socklen_t size = sizeof name;
    char text[600], expected[600];
    tsrv_address listener;
    int before = *entered;
    CHECK_INT(tsrv_server_address(s->server, index, &listener), TSRV_OK);
    int fd = connect_to(&listener);
    CHECK(getsockname(fd, &name.any, &size) == 0);
    int port = name.any.sa_family == AF_INET ? ntohs(name.v4.sin_port) :
               name.any.sa_family == AF_INET6 ? ntohs(name.v6.sin6_port) : 0;
    t_turn_until(s->loop, entered, before + 1);
    turn_until_eof(s->loop, fd, text, sizeof text);
    if (port > 0) {
        snprintf(expected, sizeof expected, "%s:%d|%s:%d", peer, port, local,
                 tsrv_address_port(&listener));
    } else {
        snprintf(expected, sizeof expected, "%s|%s", peer, local);
    }
    CHECK_STR(text, expected);
    t_close(fd);
}

static tsrv_server_options tell_options(int *entered)
{
    tsrv_server_options options = {0};
    options.handle_stream = tell_address;
    options.context = entered;
    options.close_timeout_ms = 10;
    return options;
}

TEST_STREAM(handler_gets_the_peers_address)
{
    int entered = 0;
    site s = open_site(tell_options(&entered));
    CHECK_INT(tsrv_server_listen(s.server, 0, "127.0.0.1", NULL), TSRV_OK);
    check_addresses(&s, &entered, 0, "127.0.0.1", "127.0.0.1");
    if (t_has_ipv6()) {
        CHECK_INT(tsrv_server_listen(s.server, 0, "::1", NULL), TSRV_OK);
        check_addresses(&s, &entered, 1, "[::1]", "[::1]");
    }
    close_site(&s);
}

TEST_STREAM(default_address_is_both_families_on_one_port)
{
    int entered = 0;
    tsrv_address v4, v6, none;
    if (!t_has_ipv6()) {
        SKIP("IPv6 loopback");
    }
    site s = open_site(tell_options(&entered));
    CHECK_INT(tsrv_server_listen(s.server, 0, NULL, NULL), TSRV_OK);
    CHECK_INT(tsrv_server_address(s.server, 0, &v4), TSRV_OK);
    CHECK_INT(tsrv_server_address(s.server, 1, &v6), TSRV_OK);
    CHECK_INT(tsrv_server_address(s.server, 2, &none), TSRV_EINVAL);
    CHECK_INT(tsrv_address_family(&v4), AF_INET);
    CHECK_INT(tsrv_address_family(&v6), AF_INET6);
    CHECK(tsrv_address_port(&v4) > 0);
    CHECK_INT(tsrv_address_port(&v6), tsrv_address_port(&v4));
    check_addresses(&s, &entered, 0, "127.0.0.1", "127.0.0.1");
    check_addresses(&s, &entered, 1, "[::1]", "[::1]");
    close_site(&s);
}

TEST_STREAM(unix_clients_have_addresses_too)
{
    int entered = 0;
    char path[100], address[120], client_path[100], text[600], expected[600];
    tsrv_address listener;
    const char *directory = t_make_directory();
    site s = open_site(tell_options(&entered));
    snprintf(path, sizeof path, "%s/s", directory);
    snprintf(client_path, sizeof client_path, "%s/c", directory);
    snprintf(address, sizeof address, "unix:%s", path);
    CHECK_INT(tsrv_server_listen(s.server, -1, address, NULL), TSRV_OK); /* it has no port */
    check_addresses(&s, &entered, 0, "unix:", address);

    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(fd >= 0);
    t_prepare(fd);
    struct sockaddr_un name = t_unix_address(client_path);
    CHECK(bind(fd, (struct sockaddr *)&name, sizeof name) == 0);
    CHECK_INT(tsrv_server_address(s.server, 0, &listener), TSRV_OK);
    CHECK(connect(fd, (struct sockaddr *)listener.storage, listener.size) == 0);
    t_turn_until(s.loop, &entered, 2);
    turn_until_eof(s.loop, fd, text, sizeof text);
    snprintf(expected, sizeof expected, "unix:%s|%s", client_path, address);
    CHECK_STR(text, expected);
    t_close(fd);
#ifdef __linux__
    snprintf(address, sizeof address, "unix:@tsrv-test-%d", (int)getpid());
    CHECK_INT(tsrv_server_listen(s.server, 0, address, NULL), TSRV_OK);
    check_addresses(&s, &entered, 1, "unix:", address);
#endif
    close_site(&s);
    CHECK(access(path, F_OK) != 0 && errno == ENOENT); /* Tornado leaves the file there */
    CHECK(unlink(client_path) == 0);
    CHECK(rmdir(directory) == 0);
}

/* ---- sockets from elsewhere ---------------------------------------------------------------*/

TEST_STREAM(add_sockets_takes_over_listeners)
{
    int entered = 0, sockets[9], port;
    tsrv_address address;
    site s = open_site(tell_options(&entered));
    int count = tsrv_bind_sockets(0, "127.0.0.1", NULL, sockets, 8);
    CHECK_INT(count, 1);
    /* A blocking one must not hold up the loop when there is nobody to accept. */
    sockets[1] = t_raw_socket(SOCK_STREAM, true, &port);
    CHECK((fcntl(sockets[1], F_GETFL) & O_NONBLOCK) == 0);
    CHECK_INT(tsrv_server_add_sockets(s.server, sockets, 2), TSRV_OK);
    CHECK((fcntl(sockets[1], F_GETFL) & O_NONBLOCK) != 0);
    CHECK_INT(tsrv_server_address(s.server, 1, &address), TSRV_OK);
    CHECK_INT(tsrv_address_port(&address), port);
    CHECK(tsrv_loop_run_once(s.loop, 0) > 0);
    check_addresses(&s, &entered, 0, "127.0.0.1", "127.0.0.1");
    check_addresses(&s, &entered, 1, "127.0.0.1", "127.0.0.1");
    check_addresses(&s, &entered, 1, "127.0.0.1", "127.0.0.1");
    tsrv_server_stop(s.server);
    CHECK(!t_is_open(sockets[0]) && !t_is_open(sockets[1]));
    close_site(&s);
}

TEST_LOOP(add_sockets_refuses_what_does_not_listen_and_closes_all)
{
    static const int expected[] = {TSRV_EINVAL, TSRV_EINVAL, TSRV_EINVAL, -EBADF};
    t_watch_log();
    for (int kind = 0; kind < 4; kind++) {
        int entered = 0, fds[3], other[2] = {-1, -1};
        tsrv_address address;
        site s = open_site(tell_options(&entered));
        fds[0] = t_raw_socket(SOCK_STREAM, true, NULL);
        fds[2] = t_raw_socket(SOCK_STREAM, true, NULL);
        switch (kind) {
        case 0: fds[1] = t_raw_socket(SOCK_STREAM, false, NULL); break;
        case 1: fds[1] = t_raw_socket(SOCK_DGRAM, false, NULL); break;
        case 2:
            CHECK(pipe(other) == 0);
            fds[1] = other[0];
            break;
        default:
            fds[1] = dup(fds[0]);
            t_close(fds[1]);
        }
        CHECK_INT(tsrv_server_add_sockets(s.server, fds, 3), expected[kind]);
        for (int i = 0; i < 3; i++) {
            CHECK(!t_is_open(fds[i]));
        }
        CHECK_INT(tsrv_server_address(s.server, 0, &address), TSRV_EINVAL);
        CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK);
        if (kind == 2) {
            t_close(other[1]);
        }
        close_site(&s);
    }
}

/* Whatever the library closes is opened again at once, so that a second close would hit that. */
static int given[3], given_count, given_closes;

static void reopen_closed(const char *name)
{
    if (strcmp(name, "close") != 0) {
        return;
    }
    given_closes++;
    for (int i = 0; i < given_count; i++) {
        if (!t_is_open(given[i])) {
            CHECK_INT(fcntl(2, F_DUPFD, given[i]), given[i]);
        }
    }
}

TEST_LOOP(add_sockets_refuses_the_same_one_twice_and_closes_it_once)
{
    static const int orders[][3] = {{0, 0, -1}, {0, 0, 0}, {0, 1, 0}, {0, 1, 1}, {0, 0, 1}};
    for (int row = 0; row < 5; row++) {
        int entered = 0, sockets[2];
        tsrv_address address;
        site s = open_site(tell_options(&entered));
        for (int i = 0; i < 2; i++) {
            sockets[i] = t_raw_socket(SOCK_STREAM, true, NULL);
        }
        for (given_count = 0; given_count < 3 && orders[row][given_count] >= 0; given_count++) {
            given[given_count] = sockets[orders[row][given_count]];
        }
        given_closes = 0;
        t_seen = reopen_closed;
        CHECK_INT(tsrv_server_add_sockets(s.server, given, given_count), TSRV_EBUSY);
        t_seen = NULL;
        CHECK_INT(given_closes, row < 2 ? 1 : 2);
        CHECK_INT(tsrv_server_address(s.server, 0, &address), TSRV_EINVAL);
        t_close_all(sockets, 2);
        CHECK(t_listen(s.server) > 0);
        check_addresses(&s, &entered, 0, "127.0.0.1", "127.0.0.1");
        close_site(&s);
    }
}

TEST_STREAM(add_stream_serves_a_socket_pair)
{
    int entered = 0, fds[2];
    tsrv_stats stats;
    site s = open_site(echo_options(&entered));
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    t_prepare(fds[1]);
    t_sends(fds[1], "over a pair\n");
    CHECK_INT(tsrv_server_add_stream(s.server, fds[0]), TSRV_OK);
    CHECK_INT(entered, 0);
    t_turn_until(s.loop, &entered, 1);
    CHECK((fcntl(fds[0], F_GETFL) & O_NONBLOCK) != 0);
    t_shut(fds[1]);
    CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK); /* nothing is left when it has ended */
    t_expect(fds[1], "over a pair\n");
    t_expect_eof(fds[1]);
    tsrv_server_stats(s.server, &stats);
    CHECK_INT(stats.accepted, 1);
    CHECK_INT(stats.closed, 1);
    CHECK(!t_is_open(fds[0]));
    t_close(fds[1]);
    close_site(&s);
}

/* As under inetd. */
TEST_STREAM(add_stream_knows_the_peers_address)
{
    int entered = 0, port;
    char text[300], peer[64];
    struct sockaddr_in name;
    socklen_t size = sizeof name;
    site s = open_site(tell_options(&entered));
    int listener = t_raw_socket(SOCK_STREAM, true, &port), fd = t_connect(port);
    CHECK_INT(tsrv_server_add_stream(s.server, accept(listener, NULL, NULL)), TSRV_OK);
    CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK);
    CHECK_INT(entered, 1);
    text[t_recv_all(fd, text, sizeof text - 1)] = 0;
    CHECK(getsockname(fd, (struct sockaddr *)&name, &size) == 0);
    snprintf(peer, sizeof peer, "127.0.0.1:%d|127.0.0.1:%d", ntohs(name.sin_port), port);
    CHECK_STR(text, peer);
    t_close(fd);
    t_close(listener);
    close_site(&s);
}

/* Who reads from stdin later does not take the client's bytes, nor those of another one that has got the number. */
TEST_LOOP(add_stream_leaves_descriptor_0_to_the_program)
{
    int entered = 0, fds[2];
    struct stat info;
    site s = open_site(echo_options(&entered));
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    CHECK_INT(dup2(fds[0], 0), 0);
    t_close(fds[0]);
    CHECK_INT(tsrv_server_add_stream(s.server, 0), TSRV_OK);
    CHECK(tsrv_fd(tsrv_server_next(s.server, NULL)) > 2);
    t_sends(fds[1], "as under inetd\n");
    t_shut(fds[1]);
    CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK);
    t_expect(fds[1], "as under inetd\n");
    t_expect_eof(fds[1]);
    CHECK(fstat(0, &info) == 0 && S_ISCHR(info.st_mode)); /* /dev/null */
    t_close(fds[1]);
    close_site(&s);
}

TEST_LOOP(add_stream_refuses_other_descriptors_and_closes_them)
{
    int entered = 0, pipe_fds[2];
    site s = open_site(echo_options(&entered));
    t_watch_log();
    CHECK(pipe(pipe_fds) == 0);
    CHECK_INT(tsrv_server_add_stream(s.server, pipe_fds[0]), TSRV_EINVAL);
    CHECK(!t_is_open(pipe_fds[0]));
    CHECK_INT(tsrv_server_add_stream(s.server, pipe_fds[0]), -EBADF);
    CHECK_INT(tsrv_server_add_stream(s.server, -1), -EBADF);
    int fd = t_raw_socket(SOCK_DGRAM, false, NULL);
    CHECK_INT(tsrv_server_add_stream(s.server, fd), TSRV_EINVAL);
    CHECK(!t_is_open(fd));
    CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK);
    CHECK_INT(entered, 0);
    t_close(pipe_fds[1]);
    close_site(&s);
}

static const char *nameless[2]; /* calls that fail */

static void lose_names(const char *name)
{
    for (int i = 0; i < 2; i++) {
        if (nameless[i] != NULL && strcmp(nameless[i], name) == 0) {
            t_fail_call(name, ENOTCONN, 1, true);
        }
    }
}

/* Nobody says whose a socket is: it is served all the same. */
TEST_LOOP(add_stream_takes_one_without_a_peers_address)
{
    static const struct {
        bool tcp;
        const char *also, *text;
    } rows[] = {{false, NULL, "unix:"}, {false, "getsockname", "unknown"}, {true, NULL, "unknown"}};
    for (size_t i = 0; i < COUNT(rows); i++) {
        int entered = 0, fds[2], port;
        char text[TSRV_ADDRESS_SIZE];
        tsrv_address peer;
        site s = open_site(echo_options(&entered));
        if (!rows[i].tcp) {
            CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
        } else {
            int listener = t_raw_socket(SOCK_STREAM, true, &port);
            fds[1] = t_connect(port);
            fds[0] = accept(listener, NULL, NULL);
            t_close(listener);
        }
        nameless[0] = "getpeername";
        nameless[1] = rows[i].also;
        t_seen = lose_names;
        CHECK_INT(tsrv_server_add_stream(s.server, fds[0]), TSRV_OK);
        t_seen = NULL;
        t_fault_at = 0;
        tsrv_peer_address(tsrv_server_next(s.server, NULL), &peer);
        CHECK_STR(tsrv_address_format(&peer, text, sizeof text), rows[i].text);
        t_prepare(fds[1]);
        t_sends(fds[1], "hello\n");
        t_turn_until_text(s.loop, fds[1], "hello\n");
        t_close(fds[1]);
        close_site(&s);
    }
}

/* A path that a unix client has bound takes memory. */
TEST_LOOP(client_whose_path_finds_no_memory_is_lost)
{
    int entered = 0;
    char address[100], path[100];
    const char *directory = t_make_directory();
    tsrv_stats stats;
    site s = open_site(echo_options(&entered));
    snprintf(address, sizeof address, "unix:%s/socket", directory);
    snprintf(path, sizeof path, "%s/client", directory);
    CHECK_INT(tsrv_server_listen(s.server, 0, address, NULL), TSRV_OK);
    struct sockaddr_un own = t_unix_address(path), to = t_unix_address(address + 5);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    t_prepare(fd);
    CHECK(bind(fd, (struct sockaddr *)&own, sizeof own) == 0);
    CHECK(connect(fd, (struct sockaddr *)&to, sizeof to) == 0);
    t_fail_call("malloc", 0, 2, false); /* the first is the stream's */
    do {
        CHECK(tsrv_loop_run_once(s.loop, 10) > 0);
        tsrv_server_stats(s.server, &stats);
    } while (stats.accept_errors < 1 && entered == 0);
    CHECK_INT(t_fault_hits, 1);
    t_fault_at = 0;
    CHECK_INT(entered, 0);
    t_expect_eof(fd);
    t_close(fd);
    close_site(&s);
    CHECK(unlink(path) == 0 && rmdir(directory) == 0);
}

static void count_close(tsrv_stream *stream, int reason, void *context)
{
    (void)stream, (void)reason;
    ++*(int *)context;
}

/* on_close belongs to the handler's entry. */
TEST_STREAM(stream_that_was_never_entered_has_no_on_close)
{
    int calls = 0, fds[2];
    tsrv_server_options options = {0};
    options.handle_stream = enter_and_echo;
    options.on_close = count_close;
    options.context = &calls;
    site s = open_site(options);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    CHECK_INT(tsrv_server_add_stream(s.server, fds[0]), TSRV_OK);
    close_site(&s);
    CHECK_INT(calls, 0);
    CHECK(!t_is_open(fds[0]));
    t_close(fds[1]);
}

/* ---- sockets of streams -------------------------------------------------------------------*/

static int check_socket(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    const tsrv_server_options *options = (const tsrv_server_options *)context;
    int fd = tsrv_fd(stream);
    (void)address;
    CHECK(fd >= 0);
    CHECK((fcntl(fd, F_GETFL) & O_NONBLOCK) != 0);
    CHECK((fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0);
    CHECK_INT(t_socket_option(fd, IPPROTO_TCP, TCP_NODELAY) != 0, !options->nagle);
    CHECK_INT(t_socket_option(fd, SOL_SOCKET, SO_KEEPALIVE) != 0, options->keep_alive);
    CHECK_INT(tsrv_set_nodelay(stream, options->nagle), TSRV_OK);
    CHECK_INT(t_socket_option(fd, IPPROTO_TCP, TCP_NODELAY) != 0, options->nagle);
    CHECK_INT(tsrv_close(stream), TSRV_OK);
    return tsrv_write(stream, "", 0);
}

static void connect_twice(int port, void *context)
{
    (void)context;
    for (int i = 0; i < 2; i++) {
        int fd = t_connect(port);
        t_leave(fd);
    }
}

TEST_STREAM(accepted_sockets_are_set_up)
{
    for (int i = 0; i < 4; i++) {
        t_case c = {.handler = check_socket, .on_close = t_record_reason, .client = connect_twice,
                    .context = &c.options,
                    .options = {.nagle = (i & 1) != 0, .keep_alive = (i & 2) != 0}};
        t_run(&c);
        CHECK_INT(t_record_count(), 2 * (i + 1));
        CHECK_INT(t_recorded(2 * i), TSRV_ECLOSED);
    }
}

/* ---- a stream's own bytes and handler -----------------------------------------------------*/

typedef union any_type {
    long double number;
    long long integer;
    void *pointer;
    void (*function)(void);
} any_type;

static bool is_filled(const unsigned char *data, size_t size, unsigned char byte)
{
    for (size_t i = 0; i < size; i++) {
        if (data[i] != byte) {
            return false;
        }
    }
    return true;
}

static int keep_data(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    CHECK_INT(tsrv_address_family(address), AF_INET);
    CHECK(is_filled((unsigned char *)tsrv_data(stream), *(size_t *)context, 0x5A));
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        CHECK_INT(tsrv_write(stream, line.data, line.size), TSRV_OK);
    }
    return rc;
}

static int fill_data(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    size_t size = *(size_t *)context;
    unsigned char *data = (unsigned char *)tsrv_data(stream);
    (void)address;
    if (size == 0) {
        CHECK(data == NULL);
    } else {
        CHECK(data != NULL);
        CHECK((uintptr_t)data % __alignof__(any_type) == 0);
        CHECK(is_filled(data, size, 0));
        memset(data, 0x5A, size);
    }
    tsrv_set_handler(stream, keep_data);
    return TSRV_EAGAIN;
}

static void check_data(tsrv_stream *stream, int reason, void *context)
{
    CHECK_INT(reason, TSRV_EOF);
    CHECK(is_filled((unsigned char *)tsrv_data(stream), *(size_t *)context, 0x5A));
    t_record(1);
}

static void echo_on_eight(int port, void *context)
{
    (void)context;
    for (int i = 0; i < 8; i++) {
        int fd = t_connect(port);
        t_echo(fd, "one\ntwo\n");
        t_echo(fd, "three\n");
        t_finish(fd);
    }
}

TEST_STREAM(data_is_zeroed_aligned_and_kept)
{
    static size_t sizes[] = {0, 1, 7, 64, 5000};
    for (int i = 0; i < 5; i++) {
        t_case c = {.handler = fill_data, .on_close = check_data, .client = echo_on_eight,
                    .context = &sizes[i], .options = {.data_size = sizes[i]}};
        t_run(&c);
        CHECK_INT(t_record_count(), 8 * (i + 1));
    }
}

static int second_protocol(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, ";", 0, &line);
    if (rc != TSRV_OK) {
        return rc;
    }
    CHECK_INT(tsrv_printf(stream, "2%s", line.data), TSRV_OK);
    return TSRV_EAGAIN;
}

static int first_protocol(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc != TSRV_OK) {
        return rc;
    }
    if (strcmp(line.data, "switch\n") == 0) {
        tsrv_set_handler(stream, second_protocol);
    }
    CHECK_INT(tsrv_printf(stream, "1%s", line.data), TSRV_OK);
    return TSRV_EAGAIN;
}

static void switch_protocols(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_sends(fd, "hello\nswitch\nhello;again;");
    t_expect(fd, "1hello\n1switch\n2hello;2again;");
    t_sends(fd, "\n;");
    t_expect(fd, "2\n;");
    t_finish(fd);
}

TEST_STREAM(handler_can_be_exchanged)
{
    t_case c = {.handler = first_protocol, .on_close = t_record_reason, .client = switch_protocols};
    t_run(&c);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), TSRV_EOF);
}

/* ---- counting and walking -----------------------------------------------------------------*/

static bool two_are_left(void *context)
{
    tsrv_stats *stats = (tsrv_stats *)context;
    *stats = server_stats();
    return stats->open == 2;
}

static void count_things(int port, void *context)
{
    tsrv_stats stats;
    int fds[3];
    (void)context;
    stats = server_stats();
    CHECK_INT(stats.accepted + stats.open + stats.closed + stats.bytes_in + stats.bytes_out, 0);
    for (int i = 0; i < 3; i++) {
        fds[i] = t_connect(port);
        t_echo(fds[i], "hello\n");
    }
    stats = server_stats();
    CHECK_INT(stats.accepted, 3);
    CHECK_INT(stats.open, 3);
    CHECK_INT(stats.closed, 0);
    CHECK_INT(stats.bytes_in, 18);
    CHECK_INT(stats.bytes_out, 18);
    CHECK_INT(stats.accept_pauses, 0);
    CHECK_INT(stats.accept_errors, 0);
    t_close(fds[0]);
    CHECK(t_wait_until(two_are_left, &stats));
    CHECK_INT(stats.accepted, 3);
    CHECK_INT(stats.closed, 1);
    t_close(fds[1]);
    t_close(fds[2]);
}

TEST_STREAM(server_keeps_counters)
{
    int entered = 0;
    t_case c = {.handler = enter_and_echo, .client = count_things, .context = &entered,
                .options = {.data_size = sizeof(int)}};
    t_run(&c);
    CHECK_INT(entered, 3);
}

enum { WALKED = 6 };

static int count_walk(void)
{
    int count = 0;
    for (tsrv_stream *s = tsrv_server_next(t_server, NULL); s != NULL;
         s = tsrv_server_next(t_server, s)) {
        CHECK(tsrv_stream_server(s) == t_server);
        CHECK(tsrv_stream_loop(s) == t_loop);
        CHECK(count++ < WALKED);
    }
    return count;
}

/* Closes and aborts while it walks; what is being closed is left out at once. */
static void walk_and_close(void *context)
{
    int at = 0;
    (void)context;
    CHECK_INT(count_walk(), WALKED);
    for (tsrv_stream *s = tsrv_server_next(t_server, NULL); s != NULL;
         s = tsrv_server_next(t_server, s)) {
        switch (at++ % 3) {
        case 0: CHECK_INT(tsrv_close(s), TSRV_OK); break;
        case 1: CHECK_INT(tsrv_abort(s), TSRV_OK); break;
        default: CHECK_INT(tsrv_write(s, "survivor", 8), TSRV_OK);
        }
    }
    CHECK_INT(at, WALKED);
    CHECK_INT(count_walk(), WALKED / 3);
    for (tsrv_stream *s = tsrv_server_next(t_server, NULL); s != NULL;
         s = tsrv_server_next(t_server, s)) {
        CHECK_INT(tsrv_close(s), TSRV_OK);
    }
    CHECK_INT(count_walk(), 0);
}

static int enter_and_read(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *entered = (int *)tsrv_data(stream);
    (void)address, (void)context;
    if (*entered == 0) {
        *entered = 1;
        t_record(1);
    }
    return tsrv_read_until(stream, "\n", 0, NULL);
}

static void be_walked(int port, void *context)
{
    int fds[WALKED], survivors = 0, ends = 0;
    (void)context;
    for (int i = 0; i < WALKED; i++) {
        fds[i] = t_connect(port);
    }
    t_wait_records(WALKED);
    t_on_loop(walk_and_close, NULL);
    for (int i = 0; i < WALKED; i++) {
        char text[16];
        ssize_t n = recv(fds[i], text, sizeof text, MSG_WAITALL);
        survivors += n == 8;
        ends += n == 0;
        CHECK(n >= 0 || errno == ECONNRESET);
        t_close(fds[i]);
    }
    CHECK_INT(survivors, WALKED / 3);
    CHECK_INT(ends, WALKED / 3);
    t_wait_records(2 * WALKED);
}

TEST_STREAM(walk_over_open_streams)
{
    t_case c = {.handler = enter_and_read, .on_close = t_record_reason, .client = be_walked,
                .options = {.data_size = sizeof(int)}};
    t_run(&c);
    for (int i = 0; i < WALKED; i++) {
        CHECK_INT(t_recorded(WALKED + i), TSRV_ECLOSED);
    }
}

/* ---- limits -------------------------------------------------------------------------------*/

static void others_are_served(int port, void *context)
{
    int silent = t_connect(port), fds[5];
    (void)context;
    t_sends(silent, "no end of line");
    for (int i = 0; i < 5; i++) {
        fds[i] = t_connect(port);
        t_echo(fds[i], "line\n");
    }
    t_sends(silent, "\n");
    t_expect(silent, "no end of line\n");
    t_close_all(fds, 5);
    t_close(silent);
}

TEST_STREAM(waiting_handler_does_not_hold_up_accepting)
{
    int entered = 0;
    t_case c = {.handler = enter_and_echo, .client = others_are_served, .context = &entered,
                .options = {.data_size = sizeof(int)}};
    t_run(&c);
    CHECK_INT(entered, 6);
}

enum { LIMIT = 2, CROWD = 7 };

static int echo_within_limit(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_stats stats;
    int before = *(int *)context;
    tsrv_server_stats(tsrv_stream_server(stream), &stats);
    CHECK(stats.open <= LIMIT);
    int rc = enter_and_echo(stream, address, context);
    if (*(int *)context > before) {
        t_record(1);
    }
    return rc;
}

static void crowd(int port, void *context)
{
    tsrv_stats stats;
    int fds[CROWD];
    (void)context;
    for (int i = 0; i < CROWD; i++) {
        fds[i] = t_connect(port);
        t_sends(fds[i], "hi\n");
    }
    for (int i = 0; i < CROWD; i++) {
        t_expect(fds[i], "hi\n"); /* in the order of their connects */
        for (int turn = 0; turn < 3; turn++) {
            stats = server_stats();
            CHECK(stats.open <= LIMIT);
        }
        CHECK(stats.accepted <= (uint64_t)(i > LIMIT ? i : LIMIT) + 1);
        if (i >= LIMIT - 1) {
            CHECK_INT(stats.open, LIMIT);
            CHECK_INT(stats.accepted, i + 1);
            t_close(fds[i + 1 - LIMIT]);
        }
    }
    CHECK(stats.accept_pauses >= 1);
    for (int i = CROWD + 1 - LIMIT; i < CROWD; i++) {
        t_close(fds[i]);
    }
}

TEST_STREAM(max_connections_pauses_and_resumes)
{
    int entered = 0;
    t_case c = {.handler = echo_within_limit, .client = crowd, .context = &entered,
                .options = {.max_connections = LIMIT, .data_size = sizeof(int)}};
    t_run(&c);
    CHECK_INT(entered, CROWD);
}

typedef struct shortage {
    int fillers[T_MAX_FD];
    int filled;
} shortage;

#ifdef TSRV_VALGRIND
/* Valgrind accepts above the limit and then throws the connection away, which no kernel does. So
 * the limit is played here: accept4 takes from a stock of descriptors, and every close adds to it. */
static int spare_fds;

static void count_spare(const char *name)
{
    if (strcmp(name, "close") == 0) {
        spare_fds++;
    } else if (strcmp(name, "accept4") == 0) {
        t_fault_at = spare_fds == 0 ? 1 : 0;
        spare_fds -= spare_fds > 0;
    }
}

static void begin_shortage(shortage *s, int fd, int highest, int spare)
{
    (void)s, (void)fd, (void)highest;
    spare_fds = spare;
    t_fault_name = "accept4";
    t_fault_errno = EMFILE;
    t_fault_sticky = true;
    t_seen = count_spare;
}

/* Tells nobody. */
static void end_shortage(shortage *s)
{
    (void)s;
    CHECK(t_fault_hits > 0);
    t_seen = NULL;
    t_fault_at = 0;
}
#else
/* Takes all descriptors but spare; copies of fd fill the rest. */
static void begin_shortage(shortage *s, int fd, int highest, int spare)
{
    struct rlimit low;
    CHECK(getrlimit(RLIMIT_NOFILE, &low) == 0);
    low.rlim_cur = (rlim_t)highest + 20;
    CHECK(setrlimit(RLIMIT_NOFILE, &low) == 0);
    while ((s->fillers[s->filled] = dup(fd)) >= 0) {
        CHECK(++s->filled < T_MAX_FD);
    }
    CHECK(errno == EMFILE && s->filled > spare);
    while (spare-- > 0) {
        t_close(s->fillers[--s->filled]);
    }
}

/* Tells nobody. */
static void end_shortage(shortage *s)
{
    while (s->filled > 0) {
        t_close(s->fillers[--s->filled]);
    }
}
#endif

/* Tornado spins at the descriptor limit: 13,505 log records and 0.99 s of CPU in one second. */
TEST_LOOP(running_out_of_descriptors_pauses_accepting)
{
    enum { CLIENTS = 10, SPARE = 3, MILLISECONDS = 1500 };
    static shortage few;
    int entered = 0, fds[CLIENTS];
    tsrv_stats stats;
    site s = open_site(echo_options(&entered));
    int port = t_listen(s.server);
    t_watch_log();
    for (int i = 0; i < CLIENTS; i++) {
        fds[i] = t_connect(port);
    }
    begin_shortage(&few, fds[0], fds[CLIENTS - 1], SPARE);

    int64_t start = t_now_ms(), cpu = cpu_ms();
    run_for(s.loop, MILLISECONDS);
    CHECK_INT(entered, SPARE);
    CHECK_NEAR_MS(cpu_ms() - cpu, 0, MILLISECONDS * 5 / 100);
    CHECK(t_log_lines >= 1);
    CHECK(t_log_lines <= 1 + (t_now_ms() - start) / 1000);
    tsrv_server_stats(s.server, &stats);
    CHECK(stats.accept_pauses >= 1);
    CHECK_INT(stats.open, SPARE);

    /* Open connections are served on. */
    t_sends(fds[1], "hello\n");
    t_turn_until_text(s.loop, fds[1], "hello\n");

    /* One that ends makes room for the next, without waiting for the end of the pause. Its
     * descriptor here is copied by the fillers, so that its end has to be told. */
    t_shut(fds[0]);
    start = t_now_ms();
    t_turn_until(s.loop, &entered, SPARE + 1);
    CHECK_NEAR_MS(t_now_ms() - start, 0, 400);

    /* A descriptor that somebody else closed is found after a while. */
    end_shortage(&few);
    t_turn_until(s.loop, &entered, CLIENTS);
    for (int i = 1; i < CLIENTS; i++) {
        t_sends(fds[i], "all served\n");
    }
    for (int i = 1; i < CLIENTS; i++) {
        t_turn_until_text(s.loop, fds[i], "all served\n");
        t_close(fds[i]);
    }
    t_close(fds[0]);
    close_site(&s);
}

/* ---- ends from everywhere -----------------------------------------------------------------*/

enum { OWN_HANDLER, OTHER_HANDLER, TIMER, WATCH, POST, SIGNAL, COROUTINE, PLACES };
enum { CLOSE, ABORT, FREE_SERVER, ACTIONS };

typedef struct end_case {
    site s;
    int place, action;
    int target;              /* index of the stream that is closed or aborted */
    tsrv_stream *streams[2]; /* in the order of their handlers' first calls */
    int reasons[2];
    int opened, closed;
    tsrv_timer timer;
    tsrv_watch watch;
    tsrv_signal signal_watch;
    int fds[2];
} end_case;

/* Memory of the program's own, which it frees in on_close. */
typedef struct end_data {
    int index;
    char *memory;
} end_data;

static void act(void *context)
{
    end_case *e = (end_case *)context;
    switch (e->action) {
    case CLOSE: CHECK_INT(tsrv_close(e->streams[e->target]), TSRV_OK); break;
    case ABORT: CHECK_INT(tsrv_abort(e->streams[e->target]), TSRV_OK); break;
    default: tsrv_server_free(e->s.server);
    }
    t_record(e->place);
}

static void act_in_watch(int events, void *context)
{
    CHECK_INT(events, TSRV_READABLE);
    tsrv_watch_stop(&((end_case *)context)->watch);
    act(context);
}

static void start_acting(end_case *e)
{
    tsrv_loop *loop = e->s.loop;
    switch (e->place) {
    case TIMER: CHECK_INT(tsrv_timer_start(loop, &e->timer, 0, act, e), TSRV_OK); break;
    case WATCH:
        CHECK_INT(tsrv_watch_start(loop, &e->watch, e->fds[0], TSRV_READABLE, act_in_watch, e),
                  TSRV_OK);
        break;
    case POST: CHECK_INT(tsrv_loop_post(loop, act, e), TSRV_OK); break;
    case SIGNAL: CHECK(raise(SIGUSR1) == 0); break;
    case COROUTINE: CHECK_INT(tsrv_spawn(loop, act, e), TSRV_OK); break;
    default: break; /* the second client's line does it */
    }
}

static int wait_for_the_end(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    end_case *e = (end_case *)context;
    end_data *data = (end_data *)tsrv_data(stream);
    tsrv_slice line;
    int rc;
    (void)address;
    if (data->memory == NULL) {
        data->memory = (char *)calloc(1, 100);
        CHECK(data->memory != NULL && e->opened < 2);
        data->index = e->opened++;
        e->streams[data->index] = stream;
        if (e->opened == 2) {
            start_acting(e);
        }
    }
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        CHECK_STR(line.data, "go\n");
        act(e);
    }
    data->memory[0] = rc != TSRV_EAGAIN;
    return rc;
}

static void note_the_end(tsrv_stream *stream, int reason, void *context)
{
    end_case *e = (end_case *)context;
    end_data *data = (end_data *)tsrv_data(stream);
    tsrv_address peer;
    CHECK_INT(data->memory[0], 1); /* its handler has returned */
    CHECK_INT(tsrv_fd(stream), -1);
    CHECK_INT(tsrv_peer_address(stream, &peer), TSRV_OK);
    CHECK_INT(tsrv_address_family(&peer), AF_INET);
    CHECK_INT(tsrv_error(stream), TSRV_OK);
    free(data->memory);
    e->reasons[data->index] = reason;
    e->closed++;
}

static void end_from(int place, int action)
{
    static end_case e;
    tsrv_server_options options = {0};
    int clients[2], rc;
    memset(&e, 0, sizeof e);
    e.place = place;
    e.action = action;
    e.target = place == OWN_HANDLER;
    options.handle_stream = wait_for_the_end;
    options.on_close = note_the_end;
    options.context = &e;
    options.data_size = sizeof(end_data);
    options.close_timeout_ms = 10; /* the clients hold still */
    e.s = open_site(options);
    int port = t_listen(e.s.server);
    CHECK(pipe(e.fds) == 0 && write(e.fds[1], "x", 1) == 1);
    CHECK_INT(tsrv_signal_start(e.s.loop, &e.signal_watch, SIGUSR1, act, &e), TSRV_OK);
    for (int i = 0; i < 2; i++) {
        clients[i] = t_connect(port);
    }
    if (place == OWN_HANDLER || place == OTHER_HANDLER) {
        t_sends(clients[1], "go\n");
    }
    t_turn_until(e.s.loop, &e.closed, action == FREE_SERVER ? 2 : 1);
    CHECK_INT(e.opened, 2);
    CHECK_INT(e.reasons[e.target], TSRV_ECLOSED);
    if (action == FREE_SERVER) {
        CHECK_INT(e.reasons[1 - e.target], TSRV_ECLOSED);
        t_expect_reset(clients[0]);
        t_expect_reset(clients[1]);
        while ((rc = tsrv_loop_run_once(e.s.loop, TSRV_NEVER)) > 0) {
        }
        CHECK_INT(rc, 0);
    } else {
        if (action == CLOSE) {
            t_expect_eof(clients[e.target]);
        } else {
            t_expect_reset(clients[e.target]);
        }
        /* The other one has not noticed. */
        CHECK_INT(e.closed, 1);
        t_shut(clients[1 - e.target]);
        t_turn_until(e.s.loop, &e.closed, 2);
        CHECK_INT(e.reasons[1 - e.target], TSRV_EOF);
        tsrv_server_free(e.s.server);
    }
    tsrv_signal_stop(&e.signal_watch);
    CHECK_INT(tsrv_loop_free(e.s.loop), TSRV_OK);
    for (int i = 0; i < 2; i++) {
        t_close(clients[i]);
        t_close(e.fds[i]);
    }
}

TEST_STREAM(close_from_every_callback)
{
    for (int place = 0; place < PLACES; place++) {
        end_from(place, CLOSE);
        CHECK_INT(t_recorded(place), place);
    }
    CHECK_INT(t_record_count(), PLACES);
}

TEST_STREAM(abort_from_every_callback)
{
    for (int place = 0; place < PLACES; place++) {
        end_from(place, ABORT);
        CHECK_INT(t_recorded(place), place);
    }
    CHECK_INT(t_record_count(), PLACES);
}

TEST_STREAM(free_the_server_from_every_callback)
{
    for (int place = 0; place < PLACES; place++) {
        end_from(place, FREE_SERVER);
        CHECK_INT(t_recorded(place), place);
    }
    CHECK_INT(t_record_count(), PLACES);
}

TEST_STREAM(freeing_outside_the_loop_returns_after_the_last_on_close)
{
    enum { CLIENTS = 5 };
    tsrv_server_options options = {0};
    int fds[CLIENTS];
    options.handle_stream = enter_and_read;
    options.on_close = t_record_reason;
    options.data_size = sizeof(int);
    site s = open_site(options);
    int port = t_listen(s.server);
    for (int i = 0; i < CLIENTS; i++) {
        fds[i] = t_connect(port);
    }
    while (t_record_count() < CLIENTS) {
        CHECK(tsrv_loop_run_once(s.loop, 10) > 0);
    }
    tsrv_server_free(s.server);
    CHECK_INT(t_record_count(), 2 * CLIENTS);
    for (int i = 0; i < CLIENTS; i++) {
        CHECK_INT(t_recorded(CLIENTS + i), TSRV_ECLOSED);
        t_expect_reset(fds[i]);
        t_close(fds[i]);
    }
    CHECK_INT(tsrv_loop_run(s.loop), TSRV_OK); /* nothing is left */
    CHECK_INT(tsrv_loop_free(s.loop), TSRV_OK);
}

static int sleep_in_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address;
    ++*(int *)context;
    int rc = tsrv_sleep(60);
    CHECK(rc == TSRV_OK || rc == TSRV_ECLOSED);
    CHECK_INT(tsrv_sleep(20), TSRV_OK); /* such a wait is ended once */
    t_record(1);
    return 0;
}

/* The handler waits for something else than its stream: the server outlives it all the same. */
TEST_COROUTINE(freeing_the_server_waits_for_a_sleeping_handler)
{
    tsrv_server_options options = {0};
    int entered = 0;
    options.handle_stream = sleep_in_handler;
    options.on_close = t_record_reason;
    options.context = &entered;
    site s = open_site(options);
    int fd = t_connect(t_listen(s.server));
    t_turn_until(s.loop, &entered, 1);
    tsrv_server_free(s.server);
    CHECK_INT(t_record_count(), 2);
    CHECK_INT(t_recorded(0), 1);
    CHECK_INT(tsrv_loop_free(s.loop), TSRV_OK);
    t_drain_and_close(fd);
}

/* ---- ends from on_close -------------------------------------------------------------------
 *
 * Two servers in one loop, with two streams each. The first on_close of all acts, while its stream
 * ends alone, while the loop is freed (with handlers that return, or with such as never do), or
 * while its server is freed outside the loop. Every stream must get its on_close, and nothing may
 * be freed twice or not at all. */

enum { PEER_ENDS, LOOP_FREED, LOOP_FREED_STUBBORN, SERVER_FREED, SERVER_FREED_INSIDE, OCCASIONS };
enum { FREE_OWN, FREE_OTHER, CLOSE_OTHERS, ABORT_OTHERS, START_AND_STOP, GIVE_MORE, DEEDS };

typedef struct deed_case {
    tsrv_loop *loop;
    tsrv_server *servers[2]; /* NULL = freed */
    int clients[4], fds[2];
    int occasion, deed;
    int entered, closed;
    bool done;
    tsrv_timer armed, late;
    tsrv_watch watch;
    tsrv_signal signal_watch;
} deed_case;

static void not_called(void *context)
{
    (void)context;
    T_FAIL("a stopped timer fired");
}

static void ignore_event(int events, void *context)
{
    (void)events, (void)context;
}

/* All that on_close can leave behind in the loop. */
static void start_and_stop(deed_case *c)
{
    tsrv_timer_stop(&c->armed);
    CHECK_INT(tsrv_timer_start(c->loop, &c->late, 0, nothing, c), TSRV_OK);
    CHECK_INT(tsrv_watch_start(c->loop, &c->watch, c->fds[0], TSRV_READABLE, ignore_event, c),
              TSRV_OK);
    CHECK_INT(tsrv_signal_start(c->loop, &c->signal_watch, SIGUSR1, nothing, c), TSRV_OK);
    CHECK_INT(tsrv_loop_post(c->loop, nothing, c), TSRV_OK);
    CHECK_INT(tsrv_spawn(c->loop, sleep_long, c), TSRV_OK);
    CHECK_INT(tsrv_spawn(c->loop, nothing, c), TSRV_OK);
}

static void end_others(deed_case *c)
{
    for (int i = 0; i < 2; i++) {
        for (tsrv_stream *s = tsrv_server_next(c->servers[i], NULL); s != NULL;
             s = tsrv_server_next(c->servers[i], s)) {
            CHECK_INT(c->deed == CLOSE_OTHERS ? tsrv_close(s) : tsrv_abort(s), TSRV_OK);
        }
    }
}

/* As a server that stopped when it was full listens again when there is room. */
static void give_more(deed_case *c, tsrv_server *server)
{
    int code = c->occasion == PEER_ENDS ? TSRV_OK : TSRV_ECLOSED, pair[2], fd;
    CHECK_INT(tsrv_server_listen(server, 0, "127.0.0.1", NULL), code);
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, &fd, 1), 1);
    CHECK_INT(tsrv_server_add_sockets(server, &fd, 1), code);
    if (code != TSRV_OK) {
        CHECK(fcntl(fd, F_GETFD) < 0);
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
        CHECK_INT(tsrv_server_add_stream(server, pair[0]), code);
        CHECK(fcntl(pair[0], F_GETFD) < 0);
        t_close(pair[1]);
    }
}

static void act_in_close(tsrv_stream *stream, int reason, void *context)
{
    deed_case *c = (deed_case *)context;
    int own = tsrv_stream_server(stream) == c->servers[1];
    int freed = c->deed == FREE_OWN ? own : !own;
    (void)reason;
    c->closed++;
    if (c->done) {
        return;
    }
    c->done = true;
    switch (c->deed) {
    case FREE_OWN:
    case FREE_OTHER:
        tsrv_server_free(c->servers[freed]);
        c->servers[freed] = NULL;
        break;
    case START_AND_STOP: start_and_stop(c); break;
    case GIVE_MORE: give_more(c, c->servers[own]); break;
    default: end_others(c);
    }
}

static int read_or_never_return(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    deed_case *c = (deed_case *)context;
    int *entered = (int *)tsrv_data(stream);
    (void)address;
    if (*entered == 0) {
        *entered = 1;
        c->entered++;
    }
    while (c->occasion == LOOP_FREED_STUBBORN) {
        tsrv_sleep(1000);
    }
    return tsrv_read_until(stream, "\n", 0, NULL);
}

static void open_deed(deed_case *c)
{
    tsrv_server_options options = {0};
    c->loop = t_new_loop();
    options.mode = t_mode;
    options.handle_stream = read_or_never_return;
    options.on_close = act_in_close;
    options.context = c;
    options.loop = c->loop;
    options.data_size = sizeof(int);
    options.close_timeout_ms = 10; /* the clients hold still */
    for (int i = 0; i < 4; i++) {
        if (i % 2 == 0) {
            CHECK_INT(tsrv_server_new(&c->servers[i / 2], &options), TSRV_OK);
            t_listen(c->servers[i / 2]);
        }
        c->clients[i] = t_add_pair(c->servers[i / 2]);
    }
    CHECK(pipe(c->fds) == 0);
    CHECK_INT(tsrv_timer_start(c->loop, &c->armed, 3600000, not_called, c), TSRV_OK);
    t_turn_until(c->loop, &c->entered, 4);
}

static void let_one_end(deed_case *c)
{
    static const int closed[DEEDS] = {2, 3, 4, 4, 1, 1};
    t_shut(c->clients[0]);
    t_turn_until(c->loop, &c->closed, closed[c->deed]);
    CHECK_INT(tsrv_loop_run_once(c->loop, 0) > 0, 1);
    CHECK_INT(c->closed, closed[c->deed]);
}

static void free_second(void *context)
{
    tsrv_server_free(((deed_case *)context)->servers[1]);
}

static int mappings; /* stacks that are there */

static void count_mappings(const char *name)
{
    mappings += (strcmp(name, "mmap") == 0) - (strcmp(name, "munmap") == 0);
}

static void do_in_close(int occasion, int deed)
{
    static deed_case c;
    memset(&c, 0, sizeof c);
    t_seen = count_mappings;
    c.occasion = occasion;
    c.deed = deed;
    open_deed(&c);
    if (occasion == PEER_ENDS) {
        let_one_end(&c);
    } else if (occasion == SERVER_FREED) {
        tsrv_server *server = c.servers[1];
        tsrv_server_free(server);
        CHECK(c.closed >= 2);
        c.servers[1] = NULL;
    } else if (occasion == SERVER_FREED_INSIDE) {
        CHECK_INT(tsrv_loop_post(c.loop, free_second, &c), TSRV_OK);
        t_turn_until(c.loop, &c.closed, 2);
        c.servers[1] = NULL;
    }
    CHECK_INT(tsrv_loop_free(c.loop), TSRV_OK);
    CHECK(c.done);
    for (int i = 0; i < 2; i++) {
        tsrv_server_free(c.servers[i]); /* none is left in the loop, and this calls nobody */
    }
    CHECK_INT(c.closed, 4);
    CHECK_INT(mappings, 0);
    tsrv_timer_stop(&c.armed);
    tsrv_timer_stop(&c.late);
    tsrv_watch_stop(&c.watch);
    tsrv_signal_stop(&c.signal_watch);
    t_close_all(c.clients, 4);
    t_close_all(c.fds, 2);
}

/* But a callback-mode handler always returns. */
static void do_on_every_occasion(int deed)
{
    tsrv_set_log(t_no_log, NULL); /* of coroutines that are dropped */
    for (int occasion = 0; occasion < OCCASIONS; occasion++) {
        if (occasion != LOOP_FREED_STUBBORN || t_mode == TSRV_COROUTINE) {
            do_in_close(occasion, deed);
        }
    }
}

TEST_STREAM(on_close_may_free_its_server)
{
    do_on_every_occasion(FREE_OWN);
}

TEST_STREAM(on_close_may_free_another_server)
{
    do_on_every_occasion(FREE_OTHER);
}

TEST_STREAM(on_close_may_close_other_streams)
{
    do_on_every_occasion(CLOSE_OTHERS);
}

TEST_STREAM(on_close_may_abort_other_streams)
{
    do_on_every_occasion(ABORT_OTHERS);
}

TEST_STREAM(on_close_gives_nothing_to_a_server_that_goes)
{
    do_on_every_occasion(GIVE_MORE);
}

TEST_STREAM(on_close_may_start_and_stop_what_the_loop_has)
{
    do_on_every_occasion(START_AND_STOP);
}

/* ---- forks --------------------------------------------------------------------------------*/

static int turn_waits, new_sets;

static void count_turn_waits(const char *name)
{
    turn_waits += strcmp(name, "epoll_wait") == 0 || strcmp(name, "poll") == 0 ||
                  strcmp(name, "kevent") == 0;
    new_sets += strcmp(name, "epoll_create1") == 0;
}

/* The set that the kernel keeps is the parent's: the child's copy of the server, which has room
 * again once the child has dropped its connections, must not accept in it. */
TEST_STREAM(child_that_frees_a_paused_server_leaves_the_parents_alone)
{
    int entered = 0, status;
    tsrv_stats stats;
    tsrv_server_options options = echo_options(&entered);
    options.max_connections = 1;
    site s = open_site(options);
    t_watch_log();
    int port = t_listen(s.server), first = t_connect(port), second = t_connect(port);
    do {
        CHECK(tsrv_loop_run_once(s.loop, 10) > 0);
        tsrv_server_stats(s.server, &stats);
    } while (stats.accept_pauses < 1);
    CHECK_INT(entered, 1);
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        tsrv_server_free(s.server);
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);

    /* The second still waits in the backlog, and the loop in its wait. */
    t_seen = count_turn_waits;
    run_for(s.loop, 50);
    t_seen = NULL;
    CHECK(turn_waits <= 5);
    CHECK_INT(new_sets, 0); /* it would repair what the child has done */
    CHECK_INT(entered, 1);
    t_sends(first, "first\n");
    t_turn_until_text(s.loop, first, "first\n");
    t_sends(second, "second\n");
    t_shut(first);
    t_turn_until_text(s.loop, second, "second\n");
    t_shut(second);
    int third = t_connect(port);
    t_sends(third, "third\n");
    t_turn_until_text(s.loop, third, "third\n");
    tsrv_server_stats(s.server, &stats);
    CHECK_INT(entered, 3);
    CHECK_INT(stats.accepted, 3);
    CHECK_INT(stats.accept_errors, 0);
    CHECK_INT(t_log_lines, 0);
    t_close(first);
    t_close(second);
    t_close(third);
    close_site(&s);
}

/* ---- stale events -------------------------------------------------------------------------
 *
 * The client does all of a round while the loop is held, so that one batch has ends, resets, new
 * connections and data in it, and descriptors are used again within it. Each connection has a
 * number; everything on it starts with that number, and comes back on it alone. */

enum { STALE_CLIENTS = 60, STALE_ROUNDS = 20 };

static int echo_own_number(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *own = (int *)tsrv_data(stream), number, rc;
    tsrv_slice line;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        CHECK(sscanf(line.data, "%d ", &number) == 1);
        *own = *own == 0 ? number : *own;
        CHECK_INT(number, *own);
        if ((rc = tsrv_write(stream, line.data, line.size)) != TSRV_OK) {
            break;
        }
    }
    return rc;
}

typedef struct stale_client {
    int fd, number;
    bool sent; /* a line in this round, while the loop was held */
} stale_client;

static void connect_stale(stale_client *client, int port)
{
    static int last;
    client->fd = t_connect(port);
    client->number = ++last;
}

static void send_stale(const stale_client *client, const char *what)
{
    char line[64];
    snprintf(line, sizeof line, "%d %s\n", client->number, what);
    t_sends(client->fd, line);
}

static void expect_stale(const stale_client *client, const char *what)
{
    char line[64];
    snprintf(line, sizeof line, "%d %s\n", client->number, what);
    t_expect(client->fd, line);
}

/* Leaves with a last line, without one or by a reset, and comes back as another; or stays. */
static void change_stale(stale_client *client, unsigned kind, int port)
{
    if (kind == 0) {
        send_stale(client, "leaving");
    }
    if (kind < 2) {
        t_close(client->fd);
    } else if (kind == 2) {
        t_reset(client->fd);
    }
    if (kind < 3) {
        connect_stale(client, port);
    }
    client->sent = kind < 4;
    if (client->sent) {
        send_stale(client, "held");
    }
}

static void change_clients(int port, void *context)
{
    static stale_client clients[STALE_CLIENTS];
    int count = t_hard ? 15 : STALE_CLIENTS;
    unsigned seed = 1;
    hold h;
    (void)context;
    open_hold(&h);
    for (int i = 0; i < count; i++) {
        connect_stale(&clients[i], port);
    }
    for (int round = 0; round < STALE_ROUNDS; round++) {
        hold_loop(&h);
        for (int i = 0; i < count; i++) {
            change_stale(&clients[i], (next_random(&seed) >> 8) % 5, port);
        }
        release_loop(&h);
        for (int i = 0; i < count; i++) {
            send_stale(&clients[i], "released");
        }
        for (int i = 0; i < count; i++) {
            if (clients[i].sent) {
                expect_stale(&clients[i], "held");
            }
            expect_stale(&clients[i], "released");
        }
    }
    for (int i = 0; i < count; i++) {
        t_finish(clients[i].fd);
    }
    close_hold(&h);
}

TEST_STREAM(descriptors_reused_in_a_batch_keep_connections_apart)
{
    t_case c = {.handler = echo_own_number, .client = change_clients,
                .options = {.data_size = sizeof(int)}};
    t_run(&c);
}
