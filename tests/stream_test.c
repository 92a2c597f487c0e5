/* A stream that more than its handler has to do with: reads from outside, the times of its ends, unix
 * peers that go, what on_close may not call, and the log line of a limit that was met. */
#include "script.h"

#include "handlers.h"

static const tsrv_server_options defaults;
static int entered;

static void open_with(tsrv_handler handler, tsrv_server_options options)
{
    entered = 0;
    s_open_with(handler, options);
}

static tsrv_stream *first_stream(void)
{
    tsrv_stream *stream = tsrv_server_next(s_server, NULL);
    CHECK(stream != NULL);
    return stream;
}

/* ---- reads from outside -------------------------------------------------------------------*/

enum { R_SOME, R_UNTIL, R_BYTES, R_MATCH, R_INTO, R_DROP, R_KINDS };
enum { PLACE_TIMER, PLACE_POST, PLACE_HANDLER, PLACE_COROUTINE, PLACES };
enum { PATTERN = 40000 };
static char pattern[PATTERN];
static size_t was_read;
static int place, reads;
static bool handler_echoes;
static tsrv_stream *target; /* the stream that others read */

static size_t match_nine(const char *data, size_t size, void *context)
{
    (void)data, (void)size, (void)context;
    return 9;
}

/* One read of any kind; what it gives is what was sent. */
static int read_a_piece(tsrv_stream *stream)
{
    char memory[7];
    tsrv_slice slice = {memory, sizeof memory};
    int rc;
    switch (reads++ % R_KINDS) {
    case R_SOME: rc = tsrv_read_some(stream, 100, &slice); break;
    case R_UNTIL: rc = tsrv_read_until(stream, "k", 0, &slice); break;
    case R_BYTES: rc = tsrv_read_bytes(stream, 33, &slice); break;
    case R_MATCH: rc = tsrv_read_until_match(stream, match_nine, NULL, 0, &slice); break;
    case R_INTO: rc = tsrv_read_into(stream, memory, sizeof memory); break;
    default: rc = tsrv_read_until(stream, "k", 0, NULL); slice.size = 0;
    }
    if (rc == TSRV_OK && slice.size == 0) { /* dropped, up to the next k */
        was_read = (size_t)((char *)memchr(pattern + was_read, 'k', PATTERN - was_read) - pattern) + 1;
    } else if (rc == TSRV_OK) {
        CHECK_MEM(slice.data, slice.size, pattern + was_read, slice.size);
        CHECK(reads % R_KINDS == R_INTO + 1 || slice.data[slice.size] == 0);
        was_read += slice.size;
    }
    return rc;
}

static tsrv_timer reader;

static void read_outside(void *context)
{
    tsrv_stream *stream = (tsrv_stream *)context;
    int rc = TSRV_OK;
    for (int i = 0; i < 3 && rc == TSRV_OK; i++) {
        rc = read_a_piece(stream);
        CHECK(rc == TSRV_OK || rc == TSRV_EAGAIN || target == NULL);
    }
}

static void read_in_timer(void *context)
{
    read_outside(context);
    CHECK_INT(tsrv_timer_start(s_loop, &reader, 1, read_in_timer, context), TSRV_OK);
}

/* In a coroutine beside the handler, which lets others run while it has a slice. */
static void read_in_coroutine(void *context)
{
    tsrv_stream *stream = (tsrv_stream *)context;
    tsrv_slice slice;
    while (tsrv_read_some(stream, 100, &slice) == TSRV_OK) {
        CHECK_MEM(slice.data, slice.size, pattern + was_read, slice.size);
        was_read += slice.size;
        if (tsrv_sleep(1) != TSRV_OK) {
            break;
        }
    }
}

/* The first stream leaves its input to others; the handler of the second one reads from it. */
static int leave_to_others(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice byte;
    int rc = TSRV_EAGAIN;
    (void)address, (void)context;
    entered++;
    if (handler_echoes) {
        while ((rc = tsrv_read_some(stream, 0, &byte)) == TSRV_OK) {
            tsrv_write(stream, byte.data, byte.size);
        }
    } else if (target != NULL && stream != target) {
        while ((rc = tsrv_read_some(stream, 0, &byte)) == TSRV_OK) {
            read_outside(target);
        }
    }
    return rc;
}

static void feed(int fd, size_t *sent, size_t size)
{
    size = size < PATTERN - *sent ? size : PATTERN - *sent;
    ssize_t n = send(fd, pattern + *sent, size, MSG_DONTWAIT | T_NOSIGNAL);
    *sent += n > 0 ? (size_t)n : 0;
}

static void check_outside(void)
{
    tsrv_server_options options = defaults;
    size_t sent = 0;
    options.read_chunk_size = t_hard ? 64 : 2000;
    was_read = 0;
    reads = 0;
    handler_echoes = false;
    open_with(leave_to_others, options);
    int fd = t_add_pair(s_server), other = t_add_pair(s_server);
    target = first_stream();
    s_settle();
    if (place == PLACE_TIMER) {
        read_in_timer(target);
    } else if (place == PLACE_COROUTINE) {
        CHECK_INT(tsrv_spawn(s_loop, read_in_coroutine, target), TSRV_OK);
    }
    int64_t limit = t_patience();
    for (int i = 0; was_read < PATTERN - 200; i++) {
        feed(fd, &sent, (size_t)(i * 37 % 900));
        if (place == PLACE_POST) {
            CHECK_INT(tsrv_loop_post(s_loop, read_outside, target), TSRV_OK);
        } else if (place == PLACE_HANDLER) {
            t_sends(other, "x");
        }
        s_turn_ms(1);
        CHECK(t_now_ms() < limit);
    }
    tsrv_timer_stop(&reader);
    target = NULL;
    t_close(fd);
    t_close(other);
    s_close();
}

/* With 1-byte delimiters, sizes and matches of every kind in turn, while more input comes. */
TEST_STREAM(reads_from_outside_get_every_byte_as_it_was_sent)
{
    fill_pattern(pattern, 0, PATTERN);
    for (place = 0; place < PLACES; place++) {
        check_outside();
    }
}

/* The handler waits for more input; its buffer is full, and so nobody waits for the descriptor. Then
 * somebody else makes room. */
TEST_STREAM(handler_hears_of_input_after_a_read_from_outside)
{
    tsrv_server_options options = defaults;
    static const char line[] = "0123456789abcdef";
    tsrv_slice slice;
    options.max_buffer_size = 64;
    handler_echoes = false;
    open_with(leave_to_others, options);
    int fd = t_add_pair(s_server);
    s_settle();
    CHECK_INT(entered, 1);
    for (int i = 0; i < 16; i++) {
        t_sends(fd, line);
        s_settle();
    }
    int before = entered;
    CHECK_INT(tsrv_read_bytes(first_stream(), 64, &slice), TSRV_OK);
    CHECK_MEM(slice.data, 16, line, 16);
    s_settle();
    CHECK(entered > before);
    handler_echoes = true;
    before = entered;
    CHECK_INT(tsrv_read_bytes(first_stream(), 16, &slice), TSRV_OK);
    s_settle();
    CHECK(entered > before);
    for (int i = 0; i < 16 - 5; i++) {
        s_expect(fd, line);
    }
    t_close(fd);
    s_close();
}

/* What a read from outside has dropped is no message that has begun: a drain ends the stream. */
TEST_STREAM(drop_from_outside_is_over_when_it_is_over)
{
    handler_echoes = false;
    open_with(leave_to_others, defaults);
    int fd = t_add_pair(s_server);
    s_settle();
    t_sends(fd, "abc");
    CHECK_INT(tsrv_read_until(first_stream(), "d", 0, NULL), TSRV_EAGAIN);
    t_sends(fd, "d");
    int64_t limit = t_patience();
    while (tsrv_read_until(first_stream(), "d", 0, NULL) != TSRV_OK) {
        s_turn();
        CHECK(t_now_ms() < limit);
    }
    handler_echoes = true;
    s_echo(fd, "line\n");
    s_run_ms(1500);
    CHECK_INT(tsrv_server_drain(s_server, TSRV_NEVER), TSRV_EAGAIN);
    s_leave(fd);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_EOF);
    s_close();
}

/* ---- one timer for all of a stream's times ------------------------------------------------*/

static int wait_ms;

static int wait_a_while(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    (void)address, (void)context;
    entered++;
    while ((rc = tsrv_wait(stream, wait_ms)) == TSRV_OK) {
    }
    return rc == TSRV_EAGAIN ? rc : 0;
}

/* The peer does not close its side: lingering ends by its time, and the handler's wait by its own. */
static void check_wait_and_linger(int own_ms, int linger_ms)
{
    tsrv_server_options options = defaults;
    options.close_timeout_ms = linger_ms;
    wait_ms = own_ms;
    open_with(wait_a_while, options);
    int fd = t_connect(s_port);
    s_until(&entered, 1);
    int64_t start = v_ms();
    CHECK_INT(tsrv_close(first_stream()), TSRV_OK);
    s_run_ms(own_ms + linger_ms + 1000);
    CHECK_INT(s_closed, 1);
    int64_t longest = own_ms > linger_ms ? own_ms : linger_ms;
    CHECK(s_closed_ms - start >= longest - 1);
    CHECK(s_closed_ms - start <= longest + 500);
    t_close(fd);
    s_close();
}

TEST_STREAM(wait_and_lingering_each_end_by_their_own_time)
{
    check_wait_and_linger(1000, 300);
    check_wait_and_linger(300, 1000);
    check_wait_and_linger(600, 600);
}

/* The peer takes nothing: the output of a stream that is closed ends by write_timeout_ms. */
static int write_and_wait(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char much[1 << 20];
    if (entered == 0) {
        limit_output_to(stream, 4096);
        CHECK_INT(tsrv_try_write(stream, much, sizeof much), TSRV_OK);
    }
    return wait_a_while(stream, address, context);
}

TEST_PLAIN_STREAM(wait_outlives_the_timeout_of_a_closed_streams_output)
{
    tsrv_server_options options = defaults;
    options.write_timeout_ms = 300;
    wait_ms = 1500;
    open_with(write_and_wait, options);
    int fd = t_add_pair(s_server);
    s_until(&entered, 1);
    int64_t start = v_ms();
    CHECK_INT(tsrv_close(first_stream()), TSRV_OK);
    s_run_ms(4000);
    CHECK_INT(s_closed, 1);
    CHECK(s_closed_ms - start >= 1490 && s_closed_ms - start <= 2000);
    t_close(fd);
    s_close();
}

/* ---- lingering, or not --------------------------------------------------------------------*/

static const char *good_bye;

/* Echoes lines until none comes for a while. */
static int echo_until_silence(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        tsrv_write(stream, line.data, line.size);
    }
    if (rc == TSRV_ETIMEOUT && good_bye != NULL) {
        tsrv_write(stream, good_bye, strlen(good_bye));
    }
    return rc;
}

/* Delayed acknowledgements take time, and not the loop's. */
static void until_delivered(tsrv_stream *stream)
{
    int64_t limit = t_patience();
    while (!tsrvi_transport_of(stream)->is_delivered(stream)) {
        CHECK(t_now_ms() < limit);
        usleep(1000);
    }
}

/* How long after the connect, or the last line, it is s_closed. */
static int64_t closes_after(const char *said, const char *answer, bool shut)
{
    tsrv_server_options options = defaults;
    options.read_timeout_ms = 500;
    options.close_timeout_ms = 2000;
    open_with(echo_until_silence, options);
    int fd = t_connect(s_port);
    t_sends(fd, said);
    s_expect(fd, answer);
    s_settle();
    until_delivered(first_stream());
    int64_t start = v_ms();
    if (shut) {
        t_shut(fd);
    }
    s_until(&s_closed, 1);
    s_expect(fd, good_bye != NULL && !shut ? good_bye : "");
    s_leave(fd);
    s_close();
    return s_closed_ms - start;
}

TEST_STREAM(silent_peer_is_not_waited_for)
{
    good_bye = NULL;
    int64_t ms = closes_after("", "", false);
    CHECK(ms >= 400 && ms <= 700);
    ms = closes_after("hello\n", "hello\n", false);
    CHECK(ms >= 400 && ms <= 700);
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    ms = closes_after("hello\nhalf a line", "hello\n", false); /* it is dropped */
    CHECK(ms >= 400 && ms <= 700);
}

/* What a unix socket has taken is with the peer at once, so that there is nothing to wait for. */
TEST_PLAIN_STREAM(silent_peer_of_a_unix_socket_is_not_waited_for)
{
    tsrv_server_options options = defaults;
    options.read_timeout_ms = 500;
    options.close_timeout_ms = 2000;
    good_bye = NULL;
    open_with(echo_until_silence, options);
    int fd = t_add_pair(s_server);
    t_sends(fd, "hello\n");
    s_expect(fd, "hello\n");
    s_settle();
    int64_t start = v_ms();
    s_until(&s_closed, 1);
    CHECK(s_closed_ms - start >= 400 && s_closed_ms - start <= 700);
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    s_leave(fd);
    s_close();
}

static int answer_and_wait(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char answer[65536];
    int *step = (int *)tsrv_data(stream), rc;
    (void)address, (void)context;
    if (*step == 0) {
        if ((rc = tsrv_read_until(stream, "\n", 0, NULL)) != TSRV_OK) {
            return rc;
        }
        memset(answer, 'a', sizeof answer);
        CHECK_INT(tsrv_write(stream, answer, sizeof answer), TSRV_OK);
        CHECK_INT(tsrv_unsent_size(stream), 0);
        *step = 1;
    }
    return tsrv_read_until(stream, "\n", 0, NULL);
}

/* It reads slowly: the kernel has all of the answer, the peer's has not when the next read's time is over. What it sends
 * then must not become a reset that takes the answer away. */
TEST_PLAIN_SOFT(answer_under_way_is_no_silence)
{
    tsrv_server_options options = defaults;
    char answer[65536];
    int code;
    options.read_timeout_ms = 500;
    options.data_size = sizeof(int);
    open_with(answer_and_wait, options);
    int fd = t_connect_with_room(s_port, 4096);
    t_sends(fd, "hello\n");
    s_run_ms(1000);
    CHECK_INT(s_closed, 0);
    t_sends(fd, "x");
    s_settle();
    CHECK_INT(s_recv(fd, answer, sizeof answer, &code), sizeof answer);
    s_leave(fd);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    s_close();
}

/* A good-bye must not be turned into a reset. */
TEST_STREAM(peer_that_gets_a_good_bye_is_waited_for)
{
    good_bye = "421 bye\n";
    int64_t ms = closes_after("hello\n", "hello\n", false);
    CHECK(ms >= 2400 && ms <= 2800);
}

/* ---- unix peers ---------------------------------------------------------------------------*/

enum { WRITES_NOTHING, WRITES_BEFORE, WRITES_AFTER, WRITINGS };
static int writing, upload_rc;
static size_t upload_size;
static bool go_on;

/* "PUT", then it is busy, then all of the upload. */
static int take_upload(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *step = (int *)tsrv_data(stream), rc;
    tsrv_slice slice;
    (void)address, (void)context;
    if (*step == 0) {
        if ((rc = tsrv_read_until(stream, "\n", 0, &slice)) != TSRV_OK) {
            return rc;
        }
        if (writing == WRITES_BEFORE) {
            tsrv_write(stream, "100\n", 4);
        }
        *step = 1;
        entered++;
    }
    while (*step == 1 && !go_on) {
        if ((rc = tsrv_wait(stream, TSRV_NEVER)) != TSRV_OK) {
            return rc;
        }
    }
    if (*step == 1 && writing == WRITES_AFTER) {
        tsrv_write(stream, "100\n", 4);
        tsrv_flush(stream);
    }
    *step = 2;
    if ((rc = tsrv_read_until_close(stream, 0, &slice)) != TSRV_EAGAIN) {
        upload_rc = rc;
        upload_size = rc == TSRV_OK ? slice.size : tsrv_unread_size(stream);
    }
    return rc;
}

/* The client sends and closes while the handler is busy. */
static void check_upload(int how, int expected)
{
    tsrv_server_options options = defaults;
    options.data_size = sizeof(int);
    writing = how;
    go_on = false;
    upload_rc = 1;
    open_with(take_upload, options);
    int fd = t_add_pair(s_server);
    t_sends(fd, "PUT\n");
    s_until(&entered, 1);
    s_settle();
    t_sends(fd, "the upload");
    t_close(fd); /* with unread input, when something was written before */
    s_settle();
    go_on = true;
    tsrv_wake(first_stream());
    s_until(&s_closed, 1);
    CHECK_INT(upload_rc, expected);
    CHECK_INT(upload_size, 10);
    s_close();
}

TEST_PLAIN_STREAM(unix_peer_that_has_closed_in_good_order_has_sent_all)
{
    check_upload(WRITES_NOTHING, TSRV_OK);
    check_upload(WRITES_AFTER, TSRV_OK);
}

/* It has not read all: that is a reset, and comes after the bytes. */
TEST_STREAM(unix_peer_that_has_closed_with_unread_input_is_a_reset)
{
    check_upload(WRITES_BEFORE, -ECONNRESET);
}

/* It has gone before the stream is added, and so has its name. */
TEST_STREAM(unix_peer_that_has_gone_before_is_none_that_has_reset)
{
    tsrv_server_options options = defaults;
    int pair[2];
    options.data_size = sizeof(int);
    writing = WRITES_NOTHING;
    go_on = false;
    upload_rc = 1;
    open_with(take_upload, options);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    t_sends(pair[0], "PUT\nthe upload");
    t_close(pair[0]);
    CHECK_INT(tsrv_server_add_stream(s_server, pair[1]), TSRV_OK);
    s_until(&entered, 1);
    s_settle();
    go_on = true;
    tsrv_wake(first_stream());
    s_until(&s_closed, 1);
    CHECK_INT(upload_rc, TSRV_OK);
    CHECK_INT(upload_size, 10);
    s_close();
}

#if defined(__linux__) && defined(MSG_OOB)
static long receives;

static void count_receives(const char *name)
{
    receives += strcmp(name, "recv") == 0;
}

/* An urgent byte, which no read would take, is not told of in every turn while the handler is busy. */
TEST_PLAIN_STREAM(urgent_byte_of_a_unix_peer_is_dropped)
{
    tsrv_server_options options = defaults;
    options.data_size = sizeof(int);
    writing = WRITES_NOTHING;
    go_on = false;
    upload_rc = 1;
    open_with(take_upload, options);
    int fd = t_add_pair(s_server);
    t_sends(fd, "PUT\n");
    s_until(&entered, 1);
    s_settle();
    if (send(fd, "!", 1, MSG_OOB) < 0) {
        SKIP("urgent bytes of unix sockets (Linux 5.15)");
    }
    s_settle();
    t_seen = count_receives;
    s_settle();
    CHECK_INT(receives, 0);
    t_seen = NULL;
    t_sends(fd, "the upload");
    t_close(fd);
    go_on = true;
    tsrv_wake(first_stream());
    s_until(&s_closed, 1);
    CHECK_INT(upload_rc, TSRV_OK);
    CHECK_INT(upload_size, 10);
    s_close();
}
#endif

/* ---- on_close -----------------------------------------------------------------------------*/

static int end_at_once(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    entered++;
    tsrv_wake(stream); /* nobody waits: it is kept for the next tsrv_wait */
    return 7;
}

/* Each call that could do something returns a code, and does not. */
static void call_everything(tsrv_stream *stream, int reason, void *context)
{
    char memory[4];
    tsrv_slice slice = {"x", 1};
    CHECK_INT(tsrv_wait(stream, 0), TSRV_EINVAL);
    CHECK_INT(tsrv_wait(stream, 1000), TSRV_EINVAL);
    CHECK_INT(tsrv_wait(stream, TSRV_NEVER), TSRV_EINVAL);
    CHECK_INT(tsrv_read_some(stream, 0, &slice), TSRV_ECLOSED);
    CHECK_INT(slice.size, 0);
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &slice), TSRV_ECLOSED);
    CHECK_INT(tsrv_read_bytes(stream, 1, NULL), TSRV_ECLOSED);
    CHECK_INT(tsrv_read_bytes(stream, 0, &slice), TSRV_ECLOSED);
    CHECK_INT(tsrv_read_into(stream, memory, sizeof memory), TSRV_ECLOSED);
    CHECK_INT(tsrv_read_until_match(stream, match_nine, NULL, 0, &slice), TSRV_ECLOSED);
    CHECK_INT(tsrv_read_until_close(stream, 0, &slice), TSRV_ECLOSED);
    CHECK_INT(tsrv_write(stream, "x", 1), TSRV_ECLOSED);
    CHECK_INT(tsrv_try_write(stream, "x", 1), TSRV_ECLOSED);
    CHECK_INT(tsrv_writev(stream, &slice, 1), TSRV_ECLOSED);
    CHECK_INT(tsrv_printf(stream, "%d", 1), TSRV_ECLOSED);
    CHECK_INT(tsrv_sendfile(stream, 0, 0, 1), TSRV_ECLOSED);
    CHECK_INT(tsrv_flush(stream), TSRV_ECLOSED);
    CHECK_INT(tsrv_shutdown(stream), TSRV_ECLOSED);
    CHECK_INT(tsrv_wait_for_handshake(stream), TSRV_ECLOSED);
    CHECK_INT(tsrv_start_tls(stream, NULL, NULL), TSRV_ECLOSED);
    CHECK_INT(tsrv_set_nodelay(stream, true), TSRV_ECLOSED);
    CHECK_INT(tsrv_close(stream), TSRV_OK);
    CHECK_INT(tsrv_abort(stream), TSRV_OK);
    tsrv_wake(stream);
    tsrv_set_timeout(stream, 1, 1);
    tsrv_set_deadline(stream, 1);
    CHECK_INT(tsrv_sleep(0), TSRV_EINVAL);
    CHECK_INT(tsrv_fd(stream), -1);
    CHECK_INT(tsrv_error(stream), TSRV_OK);
    s_note_close(stream, reason, context);
}

TEST_STREAM(on_close_can_call_nothing_that_waits_or_does)
{
    tsrv_server_options options = defaults;
    options.on_close = call_everything;
    open_with(end_at_once, options);
    int fd = t_connect(s_port);
    s_leave(fd);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, 7);
    s_run_ms(100);
    CHECK_INT(s_closed, 1);
    s_close();
}

/* ---- the log of a limit -------------------------------------------------------------------*/

static int limited_by;

static int meet_a_limit(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char much[4096];
    tsrv_slice slice;
    (void)address, (void)context;
    switch (limited_by) {
    case 0: return tsrv_read_until(stream, "\n", 100, &slice);
    case 1: return tsrv_read_until(stream, "\n", 0, &slice);
    case 2: return tsrv_read_bytes(stream, 2000, &slice);
    case 3: return tsrv_read_until_close(stream, 50, &slice);
    case 4: return tsrv_read_until_match(stream, match_nine, NULL, 8, &slice);
    case 5: return tsrv_try_write(stream, much, sizeof much);
    default: return TSRV_ETOOLONG; /* the program's own */
    }
}

TEST_STREAM(log_names_the_limit_that_was_met)
{
    static const char *const names[] = {
        "longer than allowed: more than 100 bytes (max_bytes)",        "longer than allowed: more than 1000 bytes (max_buffer_size)",
        "longer than allowed: more than 1000 bytes (max_buffer_size)", "longer than allowed: more than 50 bytes (max_bytes)",
        "longer than allowed: more than 8 bytes (max_bytes)",          "the output queue is full: more than 3000 bytes (max_write_buffer_size)",
        "longer than allowed"};
    char much[1500];
    memset(much, 'x', sizeof much);
    much[sizeof much - 1] = 0;
    for (limited_by = 0; limited_by < (int)(COUNT(names)); limited_by++) {
        tsrv_server_options options = defaults;
        options.max_buffer_size = 1000;
        options.max_write_buffer_size = 3000;
        open_with(meet_a_limit, options);
        int fd = t_add_pair(s_server);
        t_sends(fd, much);
        t_shut(fd);
        s_until(&s_closed, 1);
        CHECK_INT(t_log_lines, 1);
        CHECK_STR(t_log + strlen("handle_stream for unix:: "), names[limited_by]);
        t_close(fd);
        s_close();
    }
}

static int fail_upstream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    return TSRV_ETLS;
}

/* The code is that of somebody else's TLS, as tsrv_connect gives it: nothing has said why this stream ends. */
TEST_PLAIN_SOFT(log_names_a_failure_of_tls_that_was_not_this_streams)
{
    open_with(fail_upstream, defaults);
    int fd = t_connect(s_port);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_ETLS);
    CHECK_INT(t_log_lines, 1);
    CHECK(strstr(t_log, tsrv_strerror(TSRV_ETLS)) != NULL);
    t_close(fd);
    s_close();
}

#if !TSRVI_HAS_TLS
static int start_nothing(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    CHECK_INT(tsrv_start_tls(stream, NULL, NULL), TSRV_ENOTSUP);
    return TSRV_OK;
}

/* Without TLS there is no context, and so it is no mistake that none is given. */
TEST_PLAIN_SOFT(tls_that_is_not_built_in_is_said_to_be_absent)
{
    open_with(start_nothing, defaults);
    int fd = t_connect(s_port);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_OK);
    CHECK_INT(t_log_lines, 1);
    t_close(fd);
    s_close();
}
#endif

/* ---- on_close while a loop is being freed -------------------------------------------------*/

static tsrv_stream *pair_of_streams[2];
static int pair_begun, pair_ended;

/* Not to be moved: tsrv_loop_free drops it where it stands. */
static int wait_for_ever(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    pair_of_streams[pair_begun++] = stream;
    for (;;) {
        tsrv_wait(stream, TSRV_NEVER);
    }
    return TSRV_OK;
}

static void wake_the_other(tsrv_stream *stream, int reason, void *context)
{
    (void)reason, (void)context;
    if (pair_ended++ == 0) {
        tsrv_wake(pair_of_streams[stream == pair_of_streams[0]]);
    }
}

/* Whoever waited for it was on a stack that is gone. */
TEST_ONCE(on_close_may_wake_a_stream_whose_coroutine_was_dropped)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    int ends[2];
    options.handle_stream = wait_for_ever;
    options.on_close = wake_the_other;
    CHECK_INT(tsrv_loop_new(&options.loop, NULL), TSRV_OK);
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    for (int i = 0; i < 2; i++) {
        ends[i] = t_add_pair(server);
    }
    while (pair_begun < 2) {
        CHECK(tsrv_loop_run_once(options.loop, 1) >= 0);
    }
    CHECK_INT(tsrv_loop_free(options.loop), TSRV_OK);
    CHECK_INT(pair_ended, 2);
    tsrv_server_free(server);
    t_close_all(ends, 2);
}

/* ---- a read_into that is complete, and not asked for yet ------------------------------------*/

enum { INTO = 16, MUCH = 400000 };

static char into[INTO], much[MUCH];
static bool writes_first;
static int into_codes[3], into_calls;

/* It writes what others have left for it before it asks for its read again. */
static int write_and_read_into(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    (void)address, (void)context;
    if (writes_first) {
        writes_first = false;
        CHECK_INT(tsrv_write(stream, much, MUCH), TSRV_OK);
    }
    rc = tsrv_read_into(stream, into, INTO);
    if (rc == TSRV_OK) {
        into_codes[into_calls++] = rc;
        rc = tsrv_read_into(stream, into, INTO);
        into_codes[into_calls++] = rc;
    }
    return rc;
}

/* More input and room for output come at once: a recv of no bytes must not be taken for the end. */
TEST_ONCE(read_into_that_is_complete_does_not_see_an_end)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    static char got[65536];
    options.handle_stream = write_and_read_into;
    options.mode = TSRV_CALLBACK;
    options.write_high_water = 100000;
    CHECK_INT(tsrv_loop_new(&options.loop, NULL), TSRV_OK);
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    int fd = t_add_pair(server);
    CHECK(tsrv_loop_run_once(options.loop, 1) >= 0);
    writes_first = true;
    t_sends(fd, "0123456789abcdef");
    for (int i = 0; i < 2; i++) {
        CHECK(tsrv_loop_run_once(options.loop, 1) >= 0);
    }
    t_sends(fd, "next");
    for (int i = 0; i < 1000 && into_calls < 2; i++) {
        while (recv(fd, got, sizeof got, MSG_DONTWAIT) > 0) {
        }
        CHECK(tsrv_loop_run_once(options.loop, 1) >= 0);
    }
    CHECK_INT(into_codes[0], TSRV_OK);
    CHECK_INT(into_codes[1], TSRV_EAGAIN);
    tsrv_server_free(server);
    CHECK_INT(tsrv_loop_free(options.loop), TSRV_OK);
    t_close(fd);
}

/* ---- a drop that ends at a delimiter of two bytes ---------------------------------------------*/

static int drop_calls;

static int drop_to_two_bytes(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc = tsrv_read_until(stream, "\r\n", 0, NULL);
    (void)address, (void)context;
    drop_calls++;
    return rc;
}

/* What is kept of each piece may be the beginning of the delimiter: no call is made for it again. */
TEST_CALLBACK(drop_with_a_long_delimiter_calls_nobody_in_vain)
{
    drop_calls = 0;
    open_with(drop_to_two_bytes, defaults);
    int fd = t_add_pair(s_server);
    s_settle();
    int before = drop_calls;
    t_sends(fd, "some\r");
    s_settle();
    s_run_ms(100);
    CHECK(drop_calls - before <= (t_hard ? 5 : 1));
    t_sends(fd, "more\r\n");
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_OK);
    t_close(fd);
    s_close();
}

/* ---- waits that begin when the stream has ended -----------------------------------------------*/

static int late_waits, late_code, late_done;

static void wait_twice(void *context)
{
    tsrv_stream *stream = (tsrv_stream *)context;
    late_code = tsrv_wait(stream, TSRV_NEVER);
    late_waits++;
    CHECK_INT(late_code, TSRV_OK);
    late_code = tsrv_wait(stream, TSRV_NEVER);
    late_waits++;
    CHECK_INT(s_closed, 0); /* it has kept the stream */
    late_done = 1;
}

static int end_when_told(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    CHECK_INT(tsrv_spawn(s_loop, wait_twice, stream), TSRV_OK);
    CHECK_INT(tsrv_sleep(10), TSRV_OK);
    tsrv_abort(stream);
    CHECK_INT(tsrv_sleep(10), TSRV_OK);
    CHECK_INT(late_waits, 1); /* by the end; the next one waits */
    return TSRV_OK;
}

/* A helper's tsrv_wait that begins between the end of a stream and its on_close is over before that. */
TEST_COROUTINE(waits_are_over_before_on_close)
{
    late_waits = late_done = 0;
    open_with(end_when_told, defaults);
    int fd = t_add_pair(s_server);
    s_until(&s_closed, 1);
    CHECK_INT(late_done, 1);
    CHECK_INT(late_code, TSRV_OK);
    t_close(fd);
    s_close();
}

/* ---- a slice that was read from outside -------------------------------------------------------*/

static int echoed_outside;

/* It reads from one stream and writes to another, and to the same, what may end it. */
static void use_slice_outside(void *context)
{
    tsrv_stream *stream = (tsrv_stream *)context;
    tsrv_slice slice;
    CHECK_INT(tsrv_read_some(stream, 0, &slice), TSRV_OK);
    CHECK_MEM(slice.data, slice.size, "slice", 5);
    CHECK_INT(tsrv_abort(stream), TSRV_OK);
    CHECK_MEM(slice.data, slice.size, "slice", 5); /* a sanitizer would see it freed */
    CHECK_INT(slice.data[slice.size], 0);
    CHECK_INT(tsrv_write(stream, slice.data, slice.size), TSRV_ECLOSED);
    CHECK_MEM(slice.data, slice.size, "slice", 5);
    echoed_outside = 1;
}

static int wait_only(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    target = stream;
    entered++;
    return tsrv_wait(stream, TSRV_NEVER) == TSRV_EAGAIN ? TSRV_EAGAIN : TSRV_OK;
}

TEST_SOFT(slice_from_outside_outlives_an_abort)
{
    echoed_outside = 0;
    open_with(wait_only, defaults);
    int fd = t_add_pair(s_server);
    s_until(&entered, 1);
    t_sends(fd, "slice");
    CHECK_INT(tsrv_loop_post(s_loop, use_slice_outside, target), TSRV_OK);
    s_until(&echoed_outside, 1);
    s_until(&s_closed, 1);
    t_close(fd);
    s_close();
}

/* ---- writes that are larger than the limit ----------------------------------------------------*/

enum { HUGE_WRITE = 3 << 20, LENT_LIMIT = 100000 };

static int huge_code, huge_done, huge_writes;
static bool overwrite_after;

/* Three of them at once, and small ones between; afterwards the memory is the program's again. */
static void write_huge_one(void *context)
{
    tsrv_stream *stream = (tsrv_stream *)context;
    char letter = (char)('a' + huge_writes++);
    char *own = (char *)malloc(HUGE_WRITE);
    CHECK(own != NULL);
    memset(own, letter, HUGE_WRITE);
    huge_code = tsrv_write(stream, own, HUGE_WRITE);
    if (overwrite_after) {
        memset(own, '!', HUGE_WRITE);
    }
    free(own);
    huge_done++;
}

static int have_three_write(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    target = stream;
    for (int i = 0; i < 3; i++) {
        CHECK_INT(tsrv_spawn(s_loop, write_huge_one, stream), TSRV_OK);
        CHECK_INT(tsrv_sleep(1), TSRV_OK);
        tsrv_write(stream, "-", 1);
    }
    while (huge_done < 3) {
        CHECK_INT(tsrv_sleep(1), TSRV_OK);
    }
    return TSRV_OK;
}

static void open_lent(tsrv_handler handler)
{
    tsrv_server_options options = {0};
    options.max_write_buffer_size = LENT_LIMIT;
    huge_writes = huge_done = 0;
    overwrite_after = true;
    open_with(handler, options);
}

static void take_huge(int fd, char letter)
{
    static char piece[65536];
    size_t left = HUGE_WRITE;
    int code;
    while (left > 0) {
        size_t got = s_recv(fd, piece, left < sizeof piece ? left : sizeof piece, &code);
        CHECK(got > 0);
        for (size_t i = 0; i < got; i++) {
            CHECK_INT(piece[i], letter);
        }
        left -= got;
    }
}

TEST_SCRIPT(lent_writes_come_in_the_order_of_the_calls)
{
    open_lent(have_three_write);
    int fd = t_add_pair(s_server);
    for (int i = 0; i < 3; i++) {
        take_huge(fd, (char)('a' + i));
        s_expect(fd, "-");
    }
    s_expect_eof(fd);
    CHECK_INT(huge_code, TSRV_OK);
    t_close(fd);
    s_until(&s_closed, 1);
    s_close();
}

static int write_until_closed(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    target = stream;
    CHECK_INT(tsrv_spawn(s_loop, write_huge_one, stream), TSRV_OK);
    CHECK_INT(tsrv_sleep(1), TSRV_OK);
    CHECK_INT(tsrv_write(stream, "-", 1), TSRV_ECLOSED); /* its pause is ended, and it has been taken */
    while (huge_done < 1) {
        CHECK_INT(tsrv_sleep(1), TSRV_OK);
    }
    return TSRV_OK;
}

/* tsrv_close ends the call at once, and gives the memory back; what was taken still comes, whole. */
TEST_SCRIPT(lent_write_that_a_close_ends_still_comes)
{
    open_lent(write_until_closed);
    int fd = t_add_pair(s_server);
    s_run_ms(50);
    CHECK_INT(huge_done, 0);
    CHECK_INT(tsrv_close(target), TSRV_OK);
    s_until(&huge_done, 1);
    CHECK_INT(huge_code, TSRV_ECLOSED);
    take_huge(fd, 'a');
    s_expect(fd, "-");
    s_leave(fd);
    s_until(&s_closed, 1);
    s_close();
}

/* A reset drops it: the call says so, and nobody looks at the memory again. */
TEST_SCRIPT(lent_write_is_dropped_by_an_abort)
{
    open_lent(write_until_closed);
    int fd = t_add_pair(s_server);
    s_run_ms(50);
    CHECK_INT(tsrv_abort(target), TSRV_OK);
    s_until(&huge_done, 1);
    CHECK_INT(huge_code, TSRV_ECLOSED);
    s_until(&s_closed, 1);
    t_close(fd);
    s_close();
}

/* ---- what a rewrite had lost ------------------------------------------------------------------*/

enum { MANY_LINES = 1000 };
static int lines_read, last_code, calls;

static int answer_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    while ((last_code = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        lines_read++;
        tsrv_write(stream, line.data, line.size);
    }
    return last_code;
}

/* A coroutine lets others run behind so many reads; that the output has failed meanwhile ends no read. */
TEST_PLAIN_SOFT(failed_output_ends_no_read_of_what_has_come)
{
    char lines[4 * MANY_LINES];
    for (size_t i = 0; i < sizeof lines; i++) {
        lines[i] = "abc\n"[i % 4];
    }
    lines_read = 0;
    open_with(answer_lines, defaults);
    int fd = t_add_pair(s_server);
    t_send(fd, lines, sizeof lines);
    t_close(fd);
    s_until(&s_closed, 1);
    CHECK_INT(lines_read, MANY_LINES);
    CHECK_INT(last_code, TSRV_EOF);
    s_close();
}

static int busy_reads, other_reads;
static bool reader_done;

/* Reads beside the handler, whenever that lets it: the handler is within a read of its own then. */
static void read_beside(void *context)
{
    tsrv_slice line;
    while (!reader_done) {
        int rc = tsrv_read_until((tsrv_stream *)context, "\n", 0, &line);
        busy_reads += rc == TSRV_EBUSY;
        other_reads += rc != TSRV_EBUSY;
        CHECK_INT(tsrv_sleep(0), TSRV_OK);
    }
}

static int read_many_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    CHECK_INT(tsrv_spawn(s_loop, read_beside, stream), TSRV_OK);
    while (tsrv_read_until(stream, "\n", 0, &line) == TSRV_OK) {
        lines_read++;
    }
    reader_done = true;
    return TSRV_OK;
}

/* A read that lets others run first is a read all the same: nobody else gets what it will get. */
TEST_SCRIPT(read_that_lets_others_run_keeps_other_readers_out)
{
    char lines[4 * MANY_LINES];
    for (size_t i = 0; i < sizeof lines; i++) {
        lines[i] = "abc\n"[i % 4];
    }
    lines_read = busy_reads = other_reads = 0;
    reader_done = false;
    open_with(read_many_lines, defaults);
    int fd = t_add_pair(s_server);
    t_send(fd, lines, sizeof lines);
    t_shut(fd);
    s_until(&s_closed, 1);
    CHECK_INT(lines_read, MANY_LINES);
    CHECK_INT(other_reads, 0);
    CHECK(busy_reads >= MANY_LINES / 256);
    t_close(fd);
    s_run_ms(5);
    s_close();
}

/* Asks for much, takes a line instead, and returns without a wait. */
static int ask_and_take(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc = tsrv_read_bytes(stream, 100, &slice);
    (void)address;
    if (rc == TSRV_EAGAIN && (rc = tsrv_read_until(stream, (const char *)context, 0, &slice)) == TSRV_OK) {
        lines_read++;
        rc = TSRV_EAGAIN;
    }
    return rc;
}

/* A read that succeeds takes back what an earlier one of the call has waited for, also by the quickest way. */
TEST_CALLBACK(read_that_succeeds_takes_back_the_wait_before)
{
    static char delimiters[2][3] = {"\n", "\r\n"};
    for (int i = 0; i < 2; i++) {
        tsrv_server_options options = {0};
        options.context = delimiters[i];
        lines_read = 0;
        open_with(ask_and_take, options);
        int fd = t_add_pair(s_server);
        t_sends(fd, "one\r\ntwo\r\nthree\r\n");
        s_until(&lines_read, 3);
        t_shut(fd);
        s_until(&s_closed, 1);
        t_close(fd);
        s_close();
    }
}

static int sleep_and_return(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    if (calls++ == 0) {
        CHECK_INT(tsrv_sleep(50), TSRV_OK);
        return TSRV_EAGAIN;
    }
    return tsrv_read_until(stream, "\n", 0, &line);
}

/* Something else than its stream has resumed it last: it is called for input all the same. */
TEST_COROUTINE(handler_that_has_slept_is_called_again)
{
    calls = 0;
    open_with(sleep_and_return, defaults);
    int fd = t_add_pair(s_server);
    s_run_ms(200);
    CHECK_INT(calls, 1);
    t_sends(fd, "line\n");
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_OK);
    t_close(fd);
    s_close();
}

static int helper_woken, handler_woken;

static void wait_beside(void *context)
{
    CHECK_INT(tsrv_wait((tsrv_stream *)context, 1000), TSRV_OK);
    helper_woken = 1;
}

static int wake_itself(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    (void)address, (void)context;
    if (calls++ == 0) {
        CHECK_INT(tsrv_spawn(s_loop, wait_beside, stream), TSRV_OK);
        return tsrv_wait(stream, 10) == TSRV_EAGAIN ? TSRV_EAGAIN : TSRV_EINVAL;
    }
    rc = tsrv_wait(stream, 1000);
    if (calls == 2) {
        CHECK_INT(rc, TSRV_ETIMEOUT);
        rc = tsrv_wait(stream, 1000);
        CHECK_INT(rc, TSRV_EAGAIN);
        tsrv_wake(stream);
    } else if (rc != TSRV_EAGAIN) {
        handler_woken = 1;
        CHECK_INT(rc, TSRV_OK);
    }
    return rc;
}

/* tsrv_wake ends every wait, the one that the handler has just begun as well as a coroutine's. */
TEST_CALLBACK(wake_of_its_own_ends_its_wait_and_those_of_others)
{
    calls = helper_woken = handler_woken = 0;
    open_with(wake_itself, defaults);
    int fd = t_add_pair(s_server);
    s_until(&handler_woken, 1);
    s_until(&helper_woken, 1);
    t_close(fd);
    s_until(&s_closed, 1);
    s_close();
}

static char given_up[10];

static int give_a_read_up(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice some;
    (void)address, (void)context;
    switch (calls++) {
    case 0: return tsrv_read_into(stream, given_up, sizeof given_up);
    case 1: return TSRV_EAGAIN;
    default:
        last_code = tsrv_read_some(stream, 0, &some);
        return last_code;
    }
}

static void wake_for_nothing(void *context)
{
    tsrv_set_deadline((tsrv_stream *)context, 10);
}

/* What a read into the program's memory has got is not lost in silence when the handler goes on with another. */
T_TEST(partial_read_that_is_not_repeated_refuses_others, T_PER_BACKEND | T_CALLBACKS)
{
    calls = 0;
    last_code = TSRV_OK;
    open_with(give_a_read_up, defaults);
    int fd = t_add_pair(s_server);
    t_sends(fd, "abc");
    s_run_ms(20);
    CHECK_INT(calls, 1);
    CHECK_INT(tsrv_loop_post(s_loop, wake_for_nothing, first_stream()), TSRV_OK);
    s_run_ms(50);
    CHECK_INT(calls, 2);
    t_sends(fd, "def");
    s_until(&s_closed, 1);
    CHECK_INT(last_code, TSRV_EINVAL);
    CHECK_INT(calls, 3);
    t_close(fd);
    s_close();
}

/* ---- TSRV_DEBUG: mistakes of a program --------------------------------------------------------*/

#ifdef TSRV_DEBUG
static int mistakes, mistaken;
static char mistake_said[2000];

static void see_mistakes(int level, const char *message, void *context)
{
    (void)level, (void)context;
    if (strncmp(message, "TSRV_DEBUG: ", 12) == 0) {
        mistakes++;
        snprintf(mistake_said, sizeof mistake_said, "%s", message + 12);
    }
}

static void expect_mistake(const char *function, const char *text)
{
    CHECK_INT(mistakes, 1);
    if (strncmp(mistake_said, function, strlen(function)) != 0 || strstr(mistake_said, text) == NULL) {
        T_FAIL("the log says \"%s\"", mistake_said);
    }
}

/* Each client makes it once more: it is told once. */
static void check_mistake(tsrv_handler handler, const char *function, const char *text)
{
    int fds[3];
    mistakes = mistaken = 0;
    open_with(handler, defaults);
    tsrv_set_log(see_mistakes, NULL);
    for (int i = 0; i < 3; i++) {
        fds[i] = t_add_pair(s_server);
        t_sends(fds[i], "some");
        s_settle();
        t_sends(fds[i], " bytes, and more of them\n");
        t_shut(fds[i]);
    }
    s_until(&s_closed, 3);
    CHECK_INT(mistaken, 3);
    expect_mistake(function, text);
    t_close_all(fds, 3);
    s_close();
}

static int read_otherwise(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    (void)address, (void)context;
    int *called = (int *)tsrv_data(stream);
    if ((*called)++ == 0) {
        return tsrv_read_until(stream, "\n", 0, &slice);
    }
    mistaken++;
    CHECK_INT(tsrv_read_bytes(stream, 2, &slice), TSRV_OK);
    return TSRV_OK;
}

static int go_on_failing(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &slice)) == TSRV_OK) {
    }
    if (rc == TSRV_EOF) {
        mistaken++;
        tsrv_shutdown(stream);
        for (int i = 0; i < 5000; i++) {
            CHECK_INT(tsrv_write(stream, "x", 1), TSRV_ECLOSED);
        }
    }
    return rc;
}

static void wait_outside(void *context)
{
    mistaken++;
    CHECK_INT(tsrv_wait((tsrv_stream *)context, TSRV_NEVER), TSRV_EAGAIN);
}

static int have_others_wait(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int *waits = (int *)tsrv_data(stream), rc;
    (void)address, (void)context;
    if (*waits == 0 && (rc = tsrv_read_until(stream, "\n", 0, &slice)) != TSRV_OK) {
        return rc;
    }
    if ((*waits)++ == 0) {
        CHECK_INT(tsrv_loop_post(s_loop, wait_outside, stream), TSRV_OK);
    }
    return tsrv_wait(stream, 100) == TSRV_EAGAIN ? TSRV_EAGAIN : TSRV_OK;
}

enum { NEXT_NOTHING, NEXT_LINE, NEXT_WIDE_LINE, NEXT_MATCH, NEXT_BYTES, NEXT_INTO, NEXT_CLOSE, NEXT_READS };

static int next_read;

/* It does not get what it wants, at least not at once. */
static int read_next(tsrv_stream *stream)
{
    static char memory[8];
    tsrv_slice slice;
    switch (next_read) {
    case NEXT_NOTHING: return tsrv_read_bytes(stream, 0, &slice);
    case NEXT_LINE: return tsrv_read_until(stream, "\n", 0, &slice);
    case NEXT_WIDE_LINE: return tsrv_read_until(stream, "\r\n", 0, &slice);
    case NEXT_MATCH: return tsrv_read_until_match(stream, match_nine, NULL, 0, &slice);
    case NEXT_BYTES: return tsrv_read_bytes(stream, sizeof memory, &slice);
    case NEXT_INTO: return tsrv_read_into(stream, memory, sizeof memory);
    default: return tsrv_read_until_close(stream, 0, &slice);
    }
}

static int keep_a_slice(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice first;
    int rc;
    (void)address, (void)context;
    if ((rc = tsrv_read_until(stream, "\n", 0, &first)) != TSRV_OK) {
        return rc;
    }
    char *kept = (char *)first.data; /* NOLINT: a mistake on purpose */
    CHECK_INT(kept[0], 's');
    size_t size = first.size;
    tsrv_set_timeout(stream, 10, 0);
    rc = read_next(stream);
    CHECK_INT(rc, next_read == NEXT_NOTHING ? TSRV_OK : t_mode == TSRV_CALLBACK ? TSRV_EAGAIN : TSRV_ETIMEOUT);
    for (size_t i = 0; i < size; i++) {
        CHECK_INT((unsigned char)kept[i], 0xDD);
    }
    mistaken++;
    return 7;
}

T_TEST(debug_names_a_read_that_is_not_the_one_that_waited, T_PER_BACKEND | T_CALLBACKS)
{
    tsrv_server_options options = {0};
    options.data_size = sizeof(int);
    mistakes = mistaken = 0;
    open_with(read_otherwise, options);
    tsrv_set_log(see_mistakes, NULL);
    for (int i = 0; i < 3; i++) {
        int fd = t_add_pair(s_server);
        t_sends(fd, "a line\n");
        s_until(&s_closed, i + 1);
        t_close(fd);
    }
    expect_mistake("tsrv_read_bytes", "waited in another read");
    s_close();
}

static size_t first_count, second_count;

/* Forgets which of two it waits for, if they differ. */
static int read_two_counts(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice bytes;
    int rc;
    (void)address, (void)context;
    if ((rc = tsrv_read_bytes(stream, first_count, &bytes)) == TSRV_OK) {
        rc = tsrv_read_bytes(stream, second_count, &bytes);
    }
    return rc;
}

T_TEST(debug_names_a_read_of_another_count, T_PER_BACKEND | T_CALLBACKS)
{
    for (second_count = 4; second_count >= 2; second_count -= 2) {
        first_count = 2;
        mistakes = 0;
        open_with(read_two_counts, defaults);
        tsrv_set_log(see_mistakes, NULL);
        int fd = t_add_pair(s_server);
        t_sends(fd, "ab");
        s_settle();
        t_sends(fd, "cd");
        s_settle();
        t_close(fd);
        s_until(&s_closed, 1);
        if (second_count != first_count) {
            expect_mistake("tsrv_read_bytes", "another count");
        } else {
            CHECK_INT(mistakes, 0);
        }
        s_close();
    }
}

static int ends_by;

/* A reason of its own to end, behind a read that waits; or a drain is one. */
static int end_beside_a_read(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    if (tsrv_read_until(stream, "\n", 0, &line) != TSRV_EAGAIN || ++mistaken == 1) {
        return TSRV_EAGAIN;
    }
    if (ends_by == 0) {
        tsrv_close(stream);
    } else if (ends_by == 1) {
        tsrv_shutdown(stream);
    }
    return TSRV_OK;
}

T_TEST(debug_names_no_end_that_has_another_reason, T_PER_BACKEND | T_CALLBACKS)
{
    for (ends_by = 0; ends_by < 3; ends_by++) {
        mistakes = mistaken = 0;
        open_with(end_beside_a_read, defaults);
        tsrv_set_log(see_mistakes, NULL);
        int fd = t_add_pair(s_server);
        s_settle();
        CHECK_INT(mistaken, 1);
        if (ends_by == 2) {
            CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_EAGAIN);
        }
        s_settle();
        t_sends(fd, "some");
        s_until(&s_closed, 1);
        CHECK_INT(mistakes, 0);
        t_close(fd);
        s_close();
    }
}

TEST_SOFT(debug_names_a_loop_over_calls_that_fail)
{
    check_mistake(go_on_failing, "tsrv_write", "always fails");
}

/* A clock's ticks, or a peer that is asked in vain: each call has waited for its time. */
static int wait_in_vain(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc = TSRV_ETIMEOUT;
    (void)address, (void)context;
    tsrv_set_timeout(stream, 1, 0);
    for (; mistaken < 2400 && rc == TSRV_ETIMEOUT; mistaken += rc == TSRV_ETIMEOUT) {
        rc = mistaken < 1200 ? tsrv_wait(stream, 1) : tsrv_read_some(stream, 0, &slice);
    }
    return rc;
}

TEST_SOFT(debug_names_no_loop_over_calls_that_have_waited)
{
    mistakes = mistaken = 0;
    open_with(wait_in_vain, defaults);
    tsrv_set_log(see_mistakes, NULL);
    int fd = t_add_pair(s_server);
    s_until(&s_closed, 1);
    CHECK_INT(mistaken, 2400);
    CHECK_INT(mistakes, 0);
    t_close(fd);
    s_close();
}

TEST_CALLBACK(debug_names_a_wait_where_nothing_can_wait)
{
    tsrv_server_options options = {0};
    options.data_size = sizeof(int);
    mistakes = mistaken = 0;
    open_with(have_others_wait, options);
    tsrv_set_log(see_mistakes, NULL);
    for (int i = 0; i < 2; i++) {
        int fd = t_add_pair(s_server);
        t_sends(fd, "a line\n");
        s_until(&s_closed, i + 1);
        t_close(fd);
    }
    expect_mistake("tsrv_wait", "nothing can wait here");
    s_close();
}

/* Each is told once, and without a coroutine to wait in none of them waits. */
TEST_ONCE(debug_names_calls_that_need_a_coroutine)
{
    tsrv_stream *stream;
    tsrv_set_log(see_mistakes, NULL);
    for (int i = 0; i < 3; i++) {
        static const char *const names[] = {"tsrv_sleep", "tsrv_wait_fd", "tsrv_connect"};
        mistakes = 0;
        for (int twice = 0; twice < 2; twice++) {
            CHECK_INT(i == 0   ? tsrv_sleep(1)
                      : i == 1 ? tsrv_wait_fd(0, TSRV_READABLE, 1)
                               : tsrv_connect("127.0.0.1", 1, NULL, &stream),
                      TSRV_EINVAL);
        }
        expect_mistake(names[i], "only a coroutine can wait");
    }
    tsrv_set_log(NULL, NULL);
}

static void nothing_to_do(void *context)
{
    (void)context;
}

static void make_no_sense(tsrv_stream *stream, int which)
{
    static tsrv_timer timer;
    static tsrv_watch watch;
    static tsrv_signal signal;
    tsrv_slice slices[1] = {{"", 0}};
    int fds[2], null = open("/dev/null", O_RDONLY);
    CHECK_INT(which == 0    ? tsrv_timer_start(NULL, &timer, -1, nothing_to_do, NULL)
              : which == 1  ? tsrv_timer_start(NULL, &timer, 1, NULL, NULL)
              : which == 2  ? tsrv_watch_start(NULL, &watch, 0, 4, NULL, NULL)
              : which == 3  ? tsrv_signal_start(NULL, &signal, 1000, nothing_to_do, NULL)
              : which == 4  ? tsrv_loop_post(NULL, NULL, NULL)
              : which == 5  ? tsrv_spawn(NULL, NULL, NULL)
              : which == 6  ? tsrv_work(NULL, NULL, NULL, NULL)
              : which == 7  ? tsrv_bind_sockets(65536, NULL, NULL, fds, 2)
              : which == 8  ? tsrv_bind_sockets(0, "unix:", NULL, fds, 2)
              : which == 9  ? tsrv_server_add_stream(s_server, null)
              : which == 10 ? tsrv_server_start(s_server, 1, NULL)
              : which == 11 ? tsrv_read_until(stream, "", 0, slices)
              : which == 12 ? tsrv_read_until_match(stream, NULL, NULL, 0, slices)
              : which == 13 ? tsrv_writev(stream, slices, -1)
              : which == 14 ? tsrv_sendfile(stream, null, 0, 1)
                            : tsrv_read_into(stream, NULL, 1),
              TSRV_EINVAL);
    if (which != 9) { /* which closes it */
        CHECK(close(null) == 0);
    }
}

static int senseless(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static const char *const said[][2] = {
        {"tsrv_timer_start", "delay_ms < 0"},
        {"tsrv_timer_start", "callback == NULL"},
        {"tsrv_watch_start", "callback == NULL"},
        {"tsrv_signal_start", "signo"},
        {"tsrv_loop_post", "callback == NULL"},
        {"tsrv_spawn", "callback == NULL"},
        {"tsrv_work", "work == NULL"},
        {"tsrv_bind_sockets", "port < 0 || port > 65535"},
        {"\"unix:\"", "path is empty"},
        {"tsrv_server_add_stream", "no stream socket"},
        {"tsrv_server_start", "bound_count == 0"},
        {"tsrv_read_until", "delimiter is empty"},
        {"tsrv_read_until_match", "match == NULL"},
        {"tsrv_writev", "count is negative"},
        {"tsrv_sendfile", "no regular file"},
        {"tsrv_read_into", "buffer == NULL"},
    };
    (void)address, (void)context;
    for (int i = 0; i < (int)(sizeof said / sizeof said[0]); i++) {
        mistakes = 0;
        make_no_sense(stream, i);
        make_no_sense(stream, i);
        expect_mistake(said[i][0], said[i][1]);
    }
    return TSRV_OK;
}

/* What is TSRV_EINVAL is told once, with the argument. */
TEST_ONCE(debug_names_wrong_arguments)
{
    open_with(senseless, defaults);
    tsrv_set_log(see_mistakes, NULL);
    int fd = t_add_pair(s_server);
    s_until(&s_closed, 1);
    t_close(fd);
    s_close();
}

static int swallow_eagain(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    if (tsrv_read_until(stream, "\n", 0, &line) < 0) {
        mistaken++;
        return TSRV_OK;
    }
    return TSRV_OK;
}

T_TEST(debug_names_a_wait_that_the_handler_swallows, T_PER_BACKEND | T_CALLBACKS)
{
    mistakes = mistaken = 0;
    open_with(swallow_eagain, defaults);
    tsrv_set_log(see_mistakes, NULL);
    for (int i = 0; i < 2; i++) {
        int fd = t_add_pair(s_server);
        t_sends(fd, "half a line");
        s_until(&s_closed, i + 1);
        t_close(fd);
    }
    CHECK_INT(mistaken, 2);
    expect_mistake("tsrv_read_until", "returned something else");
    s_close();
}

#if !TSRVI_HAS_TSAN /* which would name it, too */
static void write_elsewhere(void *context)
{
    tsrv_write((tsrv_stream *)context, "x", 1);
}

static int write_on_another_thread(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    mistaken++;
    CHECK_INT(tsrv_run_in_thread(write_elsewhere, stream), TSRV_OK);
    return TSRV_OK;
}

T_TEST(debug_names_a_call_on_another_thread, T_PER_BACKEND | T_COROUTINES)
{
    mistakes = mistaken = 0;
    open_with(write_on_another_thread, defaults);
    tsrv_set_log(see_mistakes, NULL);
    for (int i = 0; i < 2; i++) {
        int fd = t_add_pair(s_server);
        s_until(&s_closed, i + 1);
        t_close(fd);
    }
    CHECK_INT(mistaken, 2);
    expect_mistake("tsrv_write", "on another thread");
    s_close();
}
#endif

/* Whatever read comes next, and whether something is there for it or not. */
TEST_STREAM(debug_overwrites_what_a_slice_held)
{
    static const char *const messages[] = {"slice\n", "slice\nrest"};
    for (next_read = 0; next_read < NEXT_READS; next_read++) {
        for (size_t i = 0; i < bulk(COUNT(messages), 1); i++) { /* byte by byte, the rest would be moved there */
            mistaken = 0;
            open_with(keep_a_slice, defaults);
            tsrv_set_log(t_no_log, NULL); /* TSRV_EAGAIN that is swallowed is another mistake */
            int fd = t_add_pair(s_server);
            t_sends(fd, messages[i]);
            s_until(&s_closed, 1);
            CHECK_INT(mistaken, 1);
            t_close(fd);
            s_close();
        }
    }
}
#endif

/* ---- addresses of peers --------------------------------------------------------------------*/

static void check_kept(const void *inside, size_t size)
{
    tsrv_address given, back;
    tsrvi_peer peer;
    memset(&given, 0, sizeof given);
    memset(&back, 0, sizeof back);
    memset(&peer, 0, sizeof peer);
    memcpy(given.storage, inside, size);
    given.size = (unsigned)size;
    CHECK_INT(tsrvi_peer_store(&peer, &given), TSRV_OK);
    tsrvi_peer_load(&peer, &back);
    tsrvi_peer_free(&peer);
    CHECK_MEM(back.storage, back.size, given.storage, given.size);
}

/* Every byte of them: a stream keeps an address in fewer. */
TEST_ONCE(addresses_of_peers_are_kept_whole)
{
    unsigned seed = 7;
    for (int i = 0; i < 1000; i++) {
        struct sockaddr_in four = t_address((int)(next_random(&seed) % 65536));
        struct sockaddr_in6 six;
        struct sockaddr_un local = t_unix_address("/run/somebody");
        unsigned char *ip = (unsigned char *)&six.sin6_addr;
        memset(&six, 0, sizeof six);
        six.sin6_family = AF_INET6;
        six.sin6_port = (in_port_t)next_random(&seed);
        six.sin6_scope_id = next_random(&seed);
        four.sin_addr.s_addr = next_random(&seed) * 257U;
        for (int byte = 0; byte < 16; byte++) {
            ip[byte] = (unsigned char)next_random(&seed);
        }
        check_kept(&four, sizeof four);
        check_kept(&six, sizeof six);
        check_kept(&local, sizeof local - next_random(&seed) % 90);
    }
}

/* ---- what a stream tells without a connection, or without TCP --------------------------------*/

static int answered[4];

static int set_nodelay_on_a_pair(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    answered[0] = tsrv_set_nodelay(stream, true);
    answered[1] = tsrv_set_nodelay(stream, false);
    return 0;
}

static void ask_the_closed(tsrv_stream *stream, int reason, void *context)
{
    tsrv_address address;
    (void)reason;
    answered[2] = tsrv_set_nodelay(stream, true);
    answered[3] = tsrv_local_address(stream, &address);
    ++*(int *)context;
}

TEST_STREAM(no_delay_is_nothing_to_a_unix_socket_and_closed_to_a_closed_one)
{
    tsrv_server_options options = {0};
    int ended_streams = 0;
    memset(answered, 0x7f, sizeof answered);
    options.handle_stream = set_nodelay_on_a_pair;
    options.on_close = ask_the_closed;
    options.context = &ended_streams;
    s_open(options);
    int fd = t_add_pair(s_server);
    t_close(fd);
    s_until(&ended_streams, 1);
    s_close();
    CHECK_INT(answered[0], TSRV_OK);
    CHECK_INT(answered[1], TSRV_OK);
    CHECK_INT(answered[2], TSRV_ECLOSED);
    CHECK_INT(answered[3], TSRV_ECLOSED);
}
