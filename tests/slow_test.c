/* Turns that take long (>>slow): they are counted, and logged with who took the most of them. Time is virtual, and so is
 * the processor's counter. */
#include "script.h"

#include "handlers.h"

static const tsrv_server_options defaults;

/* Takes so many milliseconds. */
static void take_ms(int ms)
{
    v_now += (uint64_t)ms * 1000000;
}

static char logged[16][512]; /* the lines of this test */
static int lines;

static void note_line(int level, const char *message, void *context)
{
    (void)context;
    if (level == TSRV_LOG_WARNING && lines < (int)COUNT(logged)) {
        snprintf(logged[lines++], sizeof logged[0], "%s", message);
    }
}

static void expect_line(const char *first, const char *second)
{
    CHECK_INT(lines, 1);
    if (strstr(logged[0], first) == NULL || strstr(logged[0], second) == NULL) {
        T_FAIL("not \"%s\" and \"%s\" in: %s", first, second, logged[0]);
    }
    lines = 0;
}

static void open_with(tsrv_handler handler, tsrv_server_options options)
{
    s_open_with(handler, options);
    tsrv_set_log(note_line, NULL);
}

/* Takes 1.5 s for a line "slow". */
static int dawdle(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        if (line.data[0] == 's') {
            take_ms(1500);
        }
        tsrv_write(stream, line.data, line.size);
    }
    return rc;
}

/* The one of several connections in a turn that takes long is named, and none of those that wait for it. */
TEST_SOFT(slow_handler_is_named_with_its_peer)
{
    enum { CLIENTS = 6 };
    int fds[CLIENTS];
    char name[64];
    struct sockaddr_in own;
    socklen_t size = sizeof own;
    open_with(dawdle, defaults);
    for (int i = 0; i < CLIENTS; i++) {
        fds[i] = s_join();
    }
    CHECK(getsockname(fds[3], (struct sockaddr *)&own, &size) == 0);
    for (int i = 0; i < CLIENTS; i++) {
        t_sends(fds[i], i == 3 ? "slow\n" : "quick\n");
    }
    for (int i = 0; i < CLIENTS; i++) {
        s_expect(fds[i], i == 3 ? "slow\n" : "quick\n");
    }
    snprintf(name, sizeof name, "handle_stream for 127.0.0.1:%d", ntohs(own.sin_port));
    expect_line(name, "took 1500 ms (slow_ms is 1000)");
    CHECK_INT(s_stats().slow_turns, 1);
    CHECK_INT(s_stats().turn_max_ms, 1500);
    for (int i = 0; i < CLIENTS; i++) {
        s_finish(fds[i]);
    }
    CHECK_INT(lines, 0);
    s_close();
}

/* The clock is read again where a time begins, as that of the next read does, and the turn began before. */
TEST_SOFT(slow_handler_is_named_that_reads_on_with_a_limit)
{
    tsrv_server_options options = {0};
    options.read_timeout_ms = 60000;
    open_with(dawdle, options);
    int fd = s_join();
    s_echo(fd, "slow\n");
    expect_line("handle_stream for 127.0.0.1:", "took 1500 ms (slow_ms is 1000)");
    CHECK_INT(s_stats().slow_turns, 1);
    CHECK_INT(s_stats().turn_max_ms, 1500);
    s_finish(fd);
    s_close();
}

/* As long as nothing is slow nothing is said, and the longest turn is known. */
TEST_SOFT(turn_within_the_limit_is_only_measured)
{
    s_loop_options.slow_ms = 2000;
    open_with(dawdle, defaults);
    int fd = s_join();
    s_echo(fd, "slow\n");
    CHECK_INT(lines, 0);
    CHECK_INT(s_stats().slow_turns, 0);
    CHECK_INT(s_stats().turn_max_ms, 1500);
    s_finish(fd);
    s_close();
}

TEST_SOFT(limit_is_as_short_as_is_asked_for)
{
    s_loop_options.slow_ms = 20;
    open_with(dawdle, defaults);
    int fd = s_join();
    s_echo(fd, "slow\n");
    expect_line("(slow_ms is 20)", "handle_stream for 127.0.0.1:");
    CHECK_INT(s_stats().slow_turns, 1);
    s_finish(fd);
    s_close();
}

TEST_SOFT(no_turn_is_slow_without_a_limit)
{
    s_loop_options.slow_ms = TSRV_NEVER;
    open_with(dawdle, defaults);
    int fd = s_join();
    s_echo(fd, "slow\n");
    CHECK_INT(lines, 0);
    CHECK_INT(s_stats().slow_turns, 0);
    CHECK_INT(s_stats().turn_max_ms, 1500);
    s_finish(fd);
    s_close();
}

/* ---- other pieces --------------------------------------------------------------------------*/

static int called;

static void dawdle_callback(void *context)
{
    (void)context;
    take_ms(1500);
    called++;
}

static void dawdle_event(int events, void *context)
{
    (void)events;
    tsrv_watch_stop((tsrv_watch *)context);
    dawdle_callback(NULL);
}

static void do_nothing(void *context)
{
    (void)context;
}

static void expect_named(const char *name)
{
    char address[32];
    snprintf(address, sizeof address, "(0x%lx)", (unsigned long)(uintptr_t)dawdle_callback);
    s_until(&called, 1);
    called = 0;
    s_settle();
    expect_line(name, address);
}

TEST_LOOP(timers_posts_and_signals_are_named)
{
    tsrv_timer timer = {0};
    tsrv_signal signal = {0};
    s_open_loop();
    tsrv_set_log(note_line, NULL);
    CHECK_INT(tsrv_timer_start(s_loop, &timer, 10, dawdle_callback, NULL), TSRV_OK);
    expect_named("a timer's callback");
    CHECK_INT(tsrv_loop_post(s_loop, dawdle_callback, NULL), TSRV_OK);
    expect_named("what was posted");
    CHECK_INT(tsrv_signal_start(s_loop, &signal, SIGUSR1, dawdle_callback, NULL), TSRV_OK);
    CHECK(kill(getpid(), SIGUSR1) == 0);
    expect_named("a signal's callback");
    tsrv_signal_stop(&signal);
    CHECK_INT(tsrv_spawn(s_loop, dawdle_callback, NULL), TSRV_OK);
    expect_named("a coroutine");
    CHECK_INT(tsrv_work(s_loop, do_nothing, dawdle_callback, NULL), TSRV_OK);
    expect_named("what follows work");
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
}

TEST_LOOP(watches_are_named)
{
    tsrv_watch watch = {0};
    int fds[2];
    char address[32];
    s_open_loop();
    tsrv_set_log(note_line, NULL);
    CHECK(pipe(fds) == 0 && write(fds[1], "x", 1) == 1);
    CHECK_INT(tsrv_watch_start(s_loop, &watch, fds[0], TSRV_READABLE, dawdle_event, &watch), TSRV_OK);
    s_until(&called, 1);
    s_settle();
    snprintf(address, sizeof address, "(0x%lx)", (unsigned long)(uintptr_t)dawdle_event);
    expect_line("a watch's callback", address);
    t_close(fds[0]);
    t_close(fds[1]);
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
}

static void dawdle_at_the_end(tsrv_stream *stream, int reason, void *context)
{
    take_ms(1500);
    s_note_close(stream, reason, context);
}

static int dawdle_before(tsrv_server *server, const tsrv_address *address, void *context)
{
    (void)server, (void)address, (void)context;
    take_ms(1500);
    return TSRV_OK;
}

static void dawdle_first(tsrv_server *server, void *context)
{
    (void)server, (void)context;
    take_ms(1500);
    called++;
}

TEST_SOFT(calls_around_the_handler_are_named)
{
    tsrv_server_options options = {0};
    options.on_start = dawdle_first;
    open_with(dawdle, options);
    s_until(&called, 1);
    s_settle();
    expect_line("nearly all of it", "on_start");
    s_close();
    options.on_start = NULL;
    options.on_accept = dawdle_before;
    open_with(dawdle, options);
    int fd = s_join();
    s_settle();
    expect_line("nearly all of it", "on_accept");
    s_finish(fd);
    s_close();
    options.on_accept = NULL;
    options.on_close = dawdle_at_the_end;
    open_with(dawdle, options);
    s_finish(s_join());
    s_until(&s_closed, 1);
    s_settle();
    expect_line("on_close for 127.0.0.1:", "nearly all of it");
    s_close();
}

/* Takes 1.5 s to see that there is not all of a line. */
static size_t dawdle_in_a_match(const char *data, size_t size, void *context)
{
    const char *end = (const char *)memchr(data, '\n', size);
    (void)context;
    if (end == NULL) {
        take_ms(1500);
    }
    return end == NULL ? 0 : (size_t)(end + 1 - data);
}

static int dawdle_and_match(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until_match(stream, dawdle_in_a_match, NULL, 0, &line)) == TSRV_OK) {
        tsrv_write(stream, line.data, line.size);
    }
    return rc;
}

/* It is called for a coroutine that goes on waiting: the next handler of the turn has nothing to do with it. */
TEST_SOFT(a_match_function_is_named)
{
    open_with(dawdle_and_match, defaults);
    int slow = s_join(), quick = s_join();
    t_sends(slow, "li");
    t_sends(quick, "line\n");
    s_expect(quick, "line\n");
    if (t_mode == TSRV_COROUTINE) {
        expect_line("a match function", "took 1500 ms (slow_ms is 1000), nearly all of it");
    } else {
        expect_line("handle_stream for", "took 1500 ms (slow_ms is 1000), nearly all of it");
    }
    t_sends(slow, "ne\n");
    s_expect(slow, "line\n");
    s_finish(slow);
    s_finish(quick);
    s_close();
}

/* Of forty that take as long as each other none is blamed. */
TEST_LOOP(many_pieces_are_nobodys_fault)
{
    s_open_loop();
    s_server = NULL;
    tsrv_set_log(note_line, NULL);
    for (int i = 0; i < 40; i++) {
        CHECK_INT(tsrv_loop_post(s_loop, dawdle_callback, NULL), TSRV_OK);
    }
    s_until(&called, 40);
    s_settle();
    expect_line("took 60000 ms", "in many pieces");
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
}

/* ---- timers of a turn that takes long ------------------------------------------------------*/

static tsrv_stream *stuck; /* its output is not taken */
static tsrv_timer again[2];
static int times;

/* Fills the kernel's buffers, and waits. */
static int write_much(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char much[8 << 20];
    (void)address, (void)context;
    stuck = stream;
    return tsrv_write(stream, much, sizeof much);
}

/* Is due again before it returns, and has the clock read again. */
static void take_long_again(void *context)
{
    tsrv_timer *timer = (tsrv_timer *)context;
    CHECK_INT(tsrv_timer_start(s_loop, timer, 1, take_long_again, timer), TSRV_OK);
    take_ms(2);
    tsrv_set_timeout(stuck, 0, 60000);
    CHECK(++times < 1000);
}

TEST_SOFT(timers_of_a_turn_are_those_due_when_it_began)
{
    tsrv_server_options options = {0};
    options.max_write_buffer_size = 16 << 20;
    open_with(write_much, options);
    int fd = s_join_with_room(4096);
    s_settle();
    CHECK(stuck != NULL);
    for (int i = 0; i < 2; i++) {
        CHECK_INT(tsrv_timer_start(s_loop, &again[i], 1, take_long_again, &again[i]), TSRV_OK);
    }
    for (int i = 0; i < 20; i++) {
        s_turn();
    }
    CHECK(times >= 10 && times <= 40);
    for (int i = 0; i < 2; i++) {
        tsrv_timer_stop(&again[i]);
    }
    t_reset(fd);
    s_settle();
    s_close();
}
