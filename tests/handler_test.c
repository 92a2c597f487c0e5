/* Handlers in callback mode (>>handler): when they are called again, and for what. They repeat the call that
 * has returned TSRV_EAGAIN, may end or wake their own stream before, and share it with others that wait. */
#include "script.h"

#include "handlers.h"

/* ---- a callback-mode handler that ends or wakes its own stream -----------------------------*/

enum { O_ABORT, O_CLOSE, O_REFUSED, O_TRY_AND_ABORT, O_WAKE, O_WAKE_TIMED, O_DRAIN };
enum { WOKEN = 7 };
static int own, own_calls;

static void end_own(tsrv_stream *stream)
{
    static char much[70000];
    switch (own) {
    case O_ABORT: tsrv_abort(stream); break;
    case O_CLOSE: tsrv_close(stream); break;
    case O_REFUSED: CHECK_INT(tsrv_write(stream, much, sizeof much), TSRV_EFULL); break;
    case O_TRY_AND_ABORT:
        CHECK_INT(tsrv_try_write(stream, much, sizeof much), TSRV_EFULL);
        tsrv_abort(stream);
        break;
    case O_DRAIN: CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_EAGAIN); break;
    default: tsrv_wake(stream);
    }
}

/* Its call returns TSRV_EAGAIN, and before it returns that, it does something to its own stream. */
static int end_after_eagain(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    own_calls++;
    if (own == O_WAKE || own == O_WAKE_TIMED) {
        rc = tsrv_wait(stream, own == O_WAKE ? TSRV_NEVER : 300);
    } else {
        rc = tsrv_read_until(stream, "\n", 0, &line);
    }
    if (own_calls == 1) {
        CHECK_INT(rc, TSRV_EAGAIN);
        end_own(stream);
    }
    return rc == TSRV_OK ? WOKEN : rc;
}

static int open_own(int which)
{
    tsrv_server_options options = {0};
    own = which;
    own_calls = 0;
    options.max_write_buffer_size = 4096;
    options.write_high_water = 1024;
    s_open_with(end_after_eagain, options);
    return s_join();
}

/* The handler is called once more, its call returns how the stream has ended, and that is that. */
static void check_own_end(int which, int reason, bool reset)
{
    int fd = open_own(which);
    if (reset) {
        s_expect_reset(fd);
    } else {
        s_expect_eof(fd);
    }
    t_close(fd);
    s_until(&s_closed, 1);
    s_settle();
    CHECK_INT(s_closed, 1);
    CHECK_INT(own_calls, 2);
    CHECK_INT(s_reason, reason);
    s_close();
    CHECK_INT(s_closed, 1);
}

/* tsrv_server_free does not wait for a client that stays. */
static void check_own_end_is_freed(int which)
{
    int fd = open_own(which);
    s_close();
    CHECK_INT(s_closed, 1);
    t_close(fd);
}

TEST_CALLBACK(abort_of_its_own_after_eagain)
{
    check_own_end(O_ABORT, TSRV_ECLOSED, true);
    check_own_end_is_freed(O_ABORT);
}

TEST_CALLBACK(close_of_its_own_after_eagain)
{
    check_own_end(O_CLOSE, TSRV_ECLOSED, false);
    check_own_end_is_freed(O_CLOSE);
}

TEST_CALLBACK(refused_write_of_its_own_after_eagain)
{
    check_own_end(O_REFUSED, TSRV_EFULL, true);
    check_own_end_is_freed(O_REFUSED);
}

TEST_CALLBACK(broadcast_that_throws_itself_out_after_eagain)
{
    check_own_end(O_TRY_AND_ABORT, TSRV_ECLOSED, true);
    check_own_end_is_freed(O_TRY_AND_ABORT);
}

TEST_CALLBACK(drain_of_its_own_after_eagain)
{
    check_own_end(O_DRAIN, TSRV_EOF, false);
    check_own_end_is_freed(O_DRAIN);
}

TEST_CALLBACK(wake_of_its_own_after_eagain)
{
    check_own_end(O_WAKE, WOKEN, false);
    check_own_end(O_WAKE_TIMED, WOKEN, false);
}

/* ---- callback mode: what the last wait leaves behind ---------------------------------------*/

static int waits_over, got_lines, got_code;
static int64_t line_came, wait_ended;

/* Waits, wakes itself, and has its wake: after that it waits for nothing but input. */
static int wake_and_return(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    if (own_calls++ == 0) {
        CHECK_INT(tsrv_wait(stream, TSRV_NEVER), TSRV_EAGAIN);
        tsrv_wake(stream);
        CHECK_INT(tsrv_wait(stream, TSRV_NEVER), TSRV_OK);
        return TSRV_EAGAIN;
    }
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        got_lines++;
    }
    return rc;
}

TEST_CALLBACK(input_calls_a_handler_whose_wait_is_over)
{
    own_calls = got_lines = 0;
    s_serve(wake_and_return);
    int fd = s_join();
    s_run_ms(200);
    CHECK_INT(own_calls, 1); /* nothing of that wait is left */
    t_sends(fd, "more\n");
    s_until(&got_lines, 1);
    s_finish(fd);
    s_until(&s_closed, 1);
    s_close();
}

/* The same with the wait's time over, instead of a wake. */
static int time_out_and_return(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    own_calls++;
    if (!waits_over) {
        rc = tsrv_wait(stream, 100);
        waits_over = rc == TSRV_ETIMEOUT;
        CHECK(waits_over || rc == TSRV_EAGAIN);
        return TSRV_EAGAIN;
    }
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        got_lines++;
    }
    return rc;
}

TEST_CALLBACK(input_calls_a_handler_whose_wait_has_timed_out)
{
    own_calls = got_lines = waits_over = 0;
    s_serve(time_out_and_return);
    int fd = s_join();
    s_run_ms(300);
    CHECK_INT(waits_over, 1);
    CHECK_INT(own_calls, 2);
    t_sends(fd, "more\n");
    s_until(&got_lines, 1);
    s_finish(fd);
    s_until(&s_closed, 1);
    s_close();
}

/* Gives each line 200 ms to come. */
static int give_each_its_time(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    own_calls++;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        got_lines++;
        line_came = v_ms();
    }
    CHECK_INT(rc, TSRV_EAGAIN);
    if ((rc = tsrv_wait(stream, 200)) != TSRV_EAGAIN) {
        got_code = rc;
        wait_ended = v_ms();
        waits_over = 1;
        return 1;
    }
    return rc;
}

TEST_CALLBACK(a_wait_after_a_read_has_a_time_of_its_own)
{
    waits_over = got_lines = own_calls = 0;
    s_serve(give_each_its_time);
    int fd = s_join();
    s_run_ms(150);
    t_sends(fd, "a\n");
    s_until(&got_lines, 1);
    s_until(&waits_over, 1);
    CHECK_INT(got_code, TSRV_ETIMEOUT);
    CHECK_LEAST(wait_ended - line_came, 200);
    CHECK_MOST(wait_ended - line_came, 210);
    s_leave(fd);
    s_until(&s_closed, 1);
    s_close();
}

/* ---- the handler's waits, and those of others on its stream --------------------------------*/

static int others_step, others_flushed;

/* In callback mode, and does nothing but repeat its call. */
static int wait_a_second(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    got_code = tsrv_wait(stream, 1000);
    if (got_code != TSRV_EAGAIN) {
        wait_ended = v_ms();
        waits_over = 1;
        return 1;
    }
    return TSRV_EAGAIN;
}

static void look_on(void *context)
{
    (void)context;
    CHECK_INT(tsrv_wait(tsrv_server_next(s_server, NULL), 0), TSRV_ETIMEOUT);
    others_step++;
}

/* It leaves the handler's wait alone, and takes no wake-up that is the handler's. */
static void wait_beside(void *context)
{
    tsrv_stream *stream = tsrv_server_next(s_server, NULL);
    CHECK_INT(tsrv_wait(stream, 0), TSRV_ETIMEOUT);
    CHECK_INT(tsrv_wait(stream, 100), TSRV_ETIMEOUT);
    CHECK_INT(waits_over, 0);
    if (*(bool *)context) {
        tsrv_wake(stream);
        CHECK_INT(tsrv_wait(stream, 0), TSRV_ETIMEOUT);
        CHECK_INT(waits_over, 0);
    }
    others_step++;
}

static void check_waits_of_others(bool wakes)
{
    waits_over = others_step = 0;
    s_serve(wait_a_second);
    int fd = s_join();
    int64_t start = v_ms();
    CHECK_INT(tsrv_loop_post(s_loop, look_on, NULL), TSRV_OK);
    s_until(&others_step, 1);
    s_run_ms(100);
    CHECK_INT(tsrv_spawn(s_loop, wait_beside, &wakes), TSRV_OK);
    s_until(&others_step, 2);
    s_until(&waits_over, 1);
    CHECK_INT(got_code, wakes ? (int)TSRV_OK : (int)TSRV_ETIMEOUT);
    CHECK_LEAST(wait_ended - start, wakes ? 200 : 1000);
    CHECK_MOST(wait_ended - start, wakes ? 230 : 1030);
    s_leave(fd);
    s_until(&s_closed, 1);
    s_close();
}

TEST_CALLBACK(a_handlers_wait_survives_those_of_others)
{
    check_waits_of_others(false);
}

TEST_CALLBACK(a_wake_is_the_waiting_handlers)
{
    check_waits_of_others(true);
}

static int flush_once(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char data[200000];
    int rc;
    (void)address, (void)context;
    if (own_calls++ == 0) {
        limit_output(stream);
        CHECK_INT(tsrv_write(stream, data, sizeof data), TSRV_OK);
    }
    if ((rc = tsrv_flush(stream)) == TSRV_OK) {
        waits_over = 1;
        return 1;
    }
    return rc;
}

static void flush_too(void *context)
{
    (void)context;
    CHECK_INT(tsrv_flush(tsrv_server_next(s_server, NULL)), TSRV_OK);
    others_flushed = 1;
}

TEST_CALLBACK(a_handlers_flush_survives_that_of_another)
{
    static char got[200000];
    int code;
    own_calls = waits_over = others_flushed = 0;
    s_serve(flush_once);
    int fd = s_join_with_room(4096);
    s_run_ms(100);
    CHECK_INT(own_calls, 1);
    CHECK_INT(tsrv_spawn(s_loop, flush_too, NULL), TSRV_OK);
    s_run_ms(100);
    CHECK_INT(waits_over + others_flushed, 0);
    CHECK_INT(s_recv(fd, got, sizeof got, &code), sizeof got);
    s_until(&others_flushed, 1);
    s_until(&waits_over, 1);
    s_leave(fd);
    s_until(&s_closed, 1);
    s_close();
}

/* ---- a handler that takes one message a call ------------------------------------------------*/

enum { TAKE_LINE, TAKE_WIDE, TAKE_MATCH, TAKE_BYTES, TAKE_SOME, TAKE_INTO, DROP_LINE, DROP_BYTES, DROP_MATCH, TAKES };

static int taking;

static int take_message(tsrv_stream *stream)
{
    static char memory[4];
    tsrv_slice slice;
    switch (taking) {
    case TAKE_LINE: return tsrv_read_until(stream, "\n", 0, &slice);
    case TAKE_WIDE: return tsrv_read_until(stream, "\r\n", 0, &slice);
    case TAKE_MATCH: return tsrv_read_until_match(stream, match_line, NULL, 0, &slice);
    case TAKE_BYTES: return tsrv_read_bytes(stream, 4, &slice);
    case TAKE_SOME: return tsrv_read_some(stream, 4, &slice);
    case TAKE_INTO: return tsrv_read_into(stream, memory, sizeof memory);
    case DROP_LINE: return tsrv_read_until(stream, "\n", 0, NULL);
    case DROP_BYTES: return tsrv_read_bytes(stream, 4, NULL);
    default: return tsrv_read_until_match(stream, match_line, NULL, 0, NULL);
    }
}

/* Begins when three of them are there. */
static int take_one_a_call(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    (void)address, (void)context;
    if (got_lines == 0 && tsrv_unread_size(stream) < 12) {
        return TSRV_EAGAIN;
    }
    if ((rc = take_message(stream)) != TSRV_OK) {
        return rc;
    }
    got_lines++;
    return TSRV_EAGAIN;
}

/* It waits for nothing: as long as it has consumed some and some is left, it is called again, in whatever way it
 * reads. */
TEST_CALLBACK(who_consumes_some_is_called_for_the_rest)
{
    for (taking = 0; taking < TAKES; taking++) {
        got_lines = 0;
        s_serve(take_one_a_call);
        int fd = s_join();
        t_sends(fd, "1.\r\n2.\r\n3.\r\n");
        s_until(&got_lines, 3);
        s_settle();
        CHECK_INT(got_lines, 3);
        t_reset(fd);
        s_until(&s_closed, 1);
        s_close();
    }
}

/* ---- ends that nobody has waited for ---------------------------------------------------------*/

static int abort_and_wait(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    if (own_calls++ == 0) {
        tsrv_abort(stream);
        return TSRV_EAGAIN;
    }
    CHECK_INT(tsrv_write(stream, "x", 1), TSRV_ECLOSED);
    return own_calls < 10 ? TSRV_EAGAIN : TSRV_OK;
}

/* Who ends its stream and waits for nothing is called once more, to learn of it, and not for ever. */
TEST_CALLBACK(an_end_of_its_own_is_told_once)
{
    own_calls = 0;
    s_serve(abort_and_wait);
    int fd = s_join();
    s_until(&s_closed, 1);
    s_settle();
    CHECK_INT(own_calls, 2);
    CHECK_INT(s_reason, TSRV_ECLOSED);
    t_close(fd);
    s_close();
}

/* ---- what the log says of it -----------------------------------------------------------------*/

static int fail_behind_a_limit(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address;
    int rc = tsrv_read_until(stream, "\n", 10, &line);
    if (rc == TSRV_EAGAIN) {
        return rc;
    }
    CHECK_INT(rc, TSRV_ETOOLONG);
    return *(int *)context;
}

/* The limit that was met is named if the handler has failed for it, and not for something else. */
TEST_SOFT(a_limit_is_named_where_it_is_the_reason)
{
    static const struct {
        int code;
        bool named;
    } rows[] = {{TSRV_ETOOLONG, true}, {TSRV_EFULL, true}, {-EPROTO, false}};
    for (size_t i = 0; i < COUNT(rows); i++) {
        tsrv_server_options options = {0};
        int code = rows[i].code;
        options.context = &code;
        s_open_with(fail_behind_a_limit, options);
        int fd = s_join();
        t_sends(fd, "01234567890123456789");
        s_until(&s_closed, 1);
        CHECK_INT(s_reason, code);
        CHECK_INT(t_log_lines, 1);
        CHECK(strstr(t_log, tsrv_strerror(code)) != NULL);
        CHECK((strstr(t_log, "more than 10 bytes") != NULL) == rows[i].named);
        t_close(fd);
        s_close();
    }
}
