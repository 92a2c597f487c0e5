/* tsrv_server_drain, tsrv_stopping, grace_ms: who is idle, what is finished, and how it ends; then
 * closing and freeing from inside every callback. */
#include "script.h"

#include "handlers.h"

#include <sys/un.h>

/* ---- handlers -----------------------------------------------------------------------------*/

static int entered, lines;

/* What most handlers do at the end of their input. */
static int say_goodbye(tsrv_stream *stream, int rc)
{
    if (rc == TSRV_EOF && tsrv_stopping(stream)) {
        tsrv_write(stream, "BYE\n", 4);
    }
    return rc;
}

typedef struct session {
    bool entered;
    int step, size;
    char body[16];
} session;

static session *enter(tsrv_stream *stream)
{
    session *s = (session *)tsrv_data(stream);
    if (!s->entered) {
        s->entered = true;
        entered++;
    }
    return s;
}

/* Answers each line with itself. */
static int echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    enter(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        lines++;
        tsrv_write(stream, line.data, line.size);
    }
    return say_goodbye(stream, rc);
}

/* A server that listens, with everything at its start. */
static void open_server(tsrv_handler handler, tsrv_server_options options)
{
    entered = lines = 0;
    options.data_size = sizeof(session);
    s_open_with(handler, options);
}

static const tsrv_server_options defaults;

/* A client whose handler has been entered. */
static int join_with_room(int receive_room)
{
    int fd = t_connect_with_room(s_port, receive_room);
    s_until(&entered, entered + 1);
    return fd;
}

static int join(void)
{
    return join_with_room(0);
}

/* A client that has had an answer. */
static int join_and_ask(void)
{
    int fd = join();
    s_echo(fd, "hello\n");
    s_settle();
    return fd;
}

/* A client whose request has begun, and does not end. */
static int join_with_half_a_line(void)
{
    int fd = join();
    t_sends(fd, "half a line");
    s_settle();
    return fd;
}

/* ---- who is idle --------------------------------------------------------------------------*/

TEST_STREAM(answered_stream_ends_after_a_second_and_in_good_order)
{
    open_server(echo, defaults);
    s_drainer d = s_new_drain(5000);
    int fd = join_and_ask();
    CHECK_INT(tsrv_stopping(tsrv_server_next(s_server, NULL)), false);
    s_begin_drain(&d);
    s_run_ms(1000);
    t_expect_silence(fd); /* its next request may be on its way */
    s_expect(fd, "BYE\n");
    s_leave(fd);
    s_check_drain(&d, TSRV_OK, 1000, 1400);
    CHECK_INT(s_closed, 1);
    CHECK_INT(s_reason, TSRV_EOF);
    CHECK_INT(t_log_lines, 0);
    s_close();
}

/* Its requests come less than a second after each other, and each is answered; it is told to stop by
 * the last of them, as the handlers of protocols that can say so do. */
static int echo_until_stopping(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    enter(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        tsrv_write(stream, line.data, line.size);
        if (++lines == 9) {
            CHECK_INT(tsrv_stopping(stream), true);
            return tsrv_write(stream, "BYE\n", 4);
        }
    }
    return rc;
}

TEST_STREAM(busy_client_is_not_cut)
{
    open_server(echo_until_stopping, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join_and_ask();
    s_begin_drain(&d);
    for (int i = 0; i < 8; i++) {
        s_run_ms(1000);
        t_expect_silence(fd);
        s_echo(fd, "next\n");
    }
    s_expect(fd, "BYE\n");
    s_leave(fd);
    s_check_drain(&d, TSRV_OK, 8000, 8400);
    CHECK_INT(t_log_lines, 0);
    s_close();
}

/* The kernel has accepted it when the drain begins, and the loop has not turned since. */
static void check_accepted_by_the_kernel(bool drained)
{
    enum { CLIENTS = 5 };
    int fds[CLIENTS];
    open_server(echo, defaults);
    for (int i = 0; i < CLIENTS; i++) {
        fds[i] = t_connect(s_port);
        t_sends(fds[i], "hello\n");
    }
    if (drained) {
        CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_EAGAIN);
    } else {
        tsrv_server_stop(s_server);
    }
    CHECK_INT(entered, 0); /* nothing calls back from inside a call */
    CHECK(t_is_refused(s_port));
    for (int i = 0; i < CLIENTS; i++) {
        s_expect(fds[i], drained ? "hello\nBYE\n" : "hello\n");
        t_shut(fds[i]);
        s_leave(fds[i]);
    }
    s_until(&s_closed, CLIENTS);
    CHECK_INT(s_stats().accepted, CLIENTS);
    CHECK_INT(s_stats().ended_well, CLIENTS);
    s_close();
}

TEST_STREAM(connection_in_the_kernels_queue_is_served_by_a_drain)
{
    check_accepted_by_the_kernel(true);
}

TEST_STREAM(connection_in_the_kernels_queue_is_served_after_a_stop)
{
    check_accepted_by_the_kernel(false);
}

TEST_STREAM(fresh_connection_has_a_second_to_begin)
{
    open_server(echo, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join();
    s_begin_drain(&d);
    s_run_ms(1000);
    t_expect_silence(fd);
    s_expect(fd, "BYE\n");
    s_leave(fd);
    s_check_drain(&d, TSRV_OK, 1000, 1400);
    s_close();
}

TEST_STREAM(first_request_in_flight_is_served)
{
    open_server(echo, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join();
    s_begin_drain(&d);
    s_run_ms(500);
    t_sends(fd, "one\n");
    s_expect(fd, "one\nBYE\n");
    s_leave(fd);
    s_check_drain(&d, TSRV_OK, 1500, 1900);
    CHECK_INT(s_reason, TSRV_EOF);
    s_close();
}

/* It was accepted long ago, and then idle. */
TEST_STREAM(connection_that_never_asked_ends_at_once)
{
    open_server(echo, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join();
    s_run_ms(1500);
    s_begin_drain(&d);
    s_expect(fd, "BYE\n");
    s_leave(fd);
    s_check_drain(&d, TSRV_OK, 0, 100);
    s_close();
}

static int ending_fd;
static bool ending_resets;

/* Its client's end comes after the loop has looked, and just before the drain. */
static void end_and_drain(void *context)
{
    (void)context;
    if (ending_resets) {
        t_reset(ending_fd);
    } else {
        t_shut(ending_fd);
    }
    CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_EAGAIN);
}

/* What the kernel knows already of a client that is idle is what its handler reads, and not the drain's end. */
TEST_PLAIN_SOFT(an_end_just_before_a_drain_is_the_clients)
{
    for (int i = 0; i < 2; i++) {
        open_server(echo, defaults);
        ending_fd = join_and_ask();
        ending_resets = i == 1;
        s_run_ms(1500);
        CHECK_INT(tsrv_loop_post(s_loop, end_and_drain, NULL), TSRV_OK);
        s_until(&s_closed, 1);
        CHECK_INT(s_reason, i == 1 ? -ECONNRESET : TSRV_EOF);
        if (i == 0) {
            s_expect(ending_fd, "BYE\n");
            s_leave(ending_fd);
        }
        s_close();
    }
}

/* A stream that comes while the drain goes on, by tsrv_server_add_stream, is drained too. */
TEST_STREAM(stream_added_during_a_drain_is_drained)
{
    open_server(echo, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join();
    s_begin_drain(&d);
    int late = t_add_pair(s_server);
    t_sends(late, "late\n");
    s_expect(late, "late\nBYE\n");
    s_leave(late);
    s_expect(fd, "BYE\n");
    s_leave(fd);
    s_check_drain(&d, TSRV_OK, 1000, 1400);
    CHECK_INT(s_closed, 2);
    s_close();
}

/* Waits for input without a read. */
static int wait_for_nothing(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    session *s = enter(stream);
    s->step++;
    return say_goodbye(stream, s->step == 1 ? (int)TSRV_EAGAIN : (int)TSRV_EOF);
}

TEST_STREAM(handler_that_only_returns_eagain_is_called_once_more)
{
    open_server(wait_for_nothing, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join();
    s_run_ms(1500);
    s_begin_drain(&d);
    s_expect(fd, "BYE\n");
    s_leave(fd);
    s_check_drain(&d, TSRV_OK, 0, 100);
    s_close();
}

static int read_all(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice all;
    (void)address, (void)context;
    enter(stream);
    int rc = tsrv_read_until_close(stream, 0, &all);
    if (rc == TSRV_OK) {
        lines++;
        tsrv_printf(stream, "%zu bytes\n", all.size);
    }
    return say_goodbye(stream, rc);
}

TEST_STREAM(read_until_close_of_nothing_ends)
{
    open_server(read_all, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join();
    s_run_ms(1500);
    s_begin_drain(&d);
    s_expect(fd, "BYE\n");
    s_leave(fd);
    s_check_drain(&d, TSRV_OK, 0, 100);
    CHECK_INT(s_reason, TSRV_EOF);
    CHECK_INT(lines, 0);
    s_close();
}

/* An upload of unknown length is cut by nobody but its client. */
TEST_STREAM(read_until_close_of_something_goes_on)
{
    open_server(read_all, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join();
    t_sends(fd, "half ");
    s_run_ms(1500);
    s_begin_drain(&d);
    s_run_ms(3000);
    t_expect_silence(fd);
    t_sends(fd, "done");
    t_shut(fd);
    s_expect(fd, "9 bytes\n");
    s_leave(fd);
    s_check_drain(&d, TSRV_OK, 3000, 3200);
    s_close();
}

/* ---- what is under way --------------------------------------------------------------------*/

/* "size\n" and then a body of so many bytes, in two reads; the answer is the size. */
static int read_message(tsrv_stream *stream, session *s, int (*read_body)(tsrv_stream *, session *))
{
    tsrv_slice line;
    int rc;
    if (s->step == 0) {
        if ((rc = tsrv_read_until(stream, "\n", 0, &line)) != TSRV_OK) {
            return rc;
        }
        s->size = atoi(line.data);
        s->step = 1;
        lines++;
    }
    if ((rc = read_body(stream, s)) == TSRV_OK) {
        s->step = 0;
        tsrv_printf(stream, "%d bytes\n", s->size);
    }
    return rc;
}

static int body_as_slice(tsrv_stream *stream, session *s)
{
    tsrv_slice body;
    return tsrv_read_bytes(stream, (size_t)s->size, &body);
}

static int body_into(tsrv_stream *stream, session *s)
{
    return tsrv_read_into(stream, s->body, (size_t)s->size);
}

static int body_dropped(tsrv_stream *stream, session *s)
{
    return tsrv_read_bytes(stream, (size_t)s->size, NULL);
}

/* The context is how the body is read. */
typedef struct body_reader {
    int (*read)(tsrv_stream *, session *);
} body_reader;

static int serve_messages(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    session *s = enter(stream);
    int rc;
    (void)address;
    while ((rc = read_message(stream, s, ((body_reader *)context)->read)) == TSRV_OK) {
    }
    return say_goodbye(stream, rc);
}

static body_reader readers[] = {{body_as_slice}, {body_into}, {body_dropped}};
enum { READERS = COUNT(readers) };

static void open_messages(body_reader *reader)
{
    tsrv_server_options options = defaults;
    options.context = reader;
    open_server(serve_messages, options);
}

TEST_STREAM(request_whose_header_was_read_is_finished)
{
    for (int i = 0; i < READERS; i++) {
        open_messages(&readers[i]);
        s_drainer d = s_new_drain(0);
        int fd = join();
        t_sends(fd, "8\n");
        s_until(&lines, 1);
        s_begin_drain(&d);
        s_run_ms(300); /* the last act was a read */
        t_expect_silence(fd);
        t_sends(fd, "01234567");
        s_expect(fd, "8 bytes\nBYE\n");
        s_leave(fd);
        s_check_drain(&d, TSRV_OK, 1290, 1700);
        s_close();
    }
}

/* The header alone does not keep the stream for ever. */
TEST_STREAM(request_whose_body_does_not_begin_ends_after_a_second)
{
    for (int i = 0; i < READERS; i++) {
        open_messages(&readers[i]);
        s_drainer d = s_new_drain(0);
        int fd = join();
        t_sends(fd, "8\n");
        s_until(&lines, 1);
        s_begin_drain(&d);
        s_expect(fd, "BYE\n");
        s_leave(fd);
        s_check_drain(&d, TSRV_OK, 950, 1400);
        s_close();
    }
}

/* Stalls for longer than a second, half-way: what has arrived may be unread, in the caller's memory
 * or dropped.
 *   apart  it comes when the body is waited for already */
static void check_stalled_uploads(bool apart)
{
    for (int i = 0; i < READERS; i++) {
        open_messages(&readers[i]);
        s_drainer d = s_new_drain(0);
        int fd = join();
        t_sends(fd, apart ? "8\n" : "8\n0123");
        s_until(&lines, 1);
        if (apart) {
            s_settle();
            t_sends(fd, "0123");
        }
        s_run_ms(1500); /* stalls already when the drain begins */
        s_begin_drain(&d);
        s_run_ms(1500);
        t_expect_silence(fd);
        t_sends(fd, "4567");
        s_expect(fd, "8 bytes\nBYE\n");
        s_leave(fd);
        s_check_drain(&d, TSRV_OK, 2490, 2900);
        s_close();
    }
}

TEST_STREAM(stalled_upload_is_not_cut)
{
    check_stalled_uploads(false);
}

TEST_STREAM(stalled_upload_that_began_during_the_read_is_not_cut)
{
    check_stalled_uploads(true);
}

TEST_STREAM(stalled_upload_is_cut_by_the_grace)
{
    for (int i = 0; i < READERS; i++) {
        open_messages(&readers[i]);
        s_drainer d = s_new_drain(2000);
        int fd = join();
        t_sends(fd, "8\n0123");
        s_until(&lines, 1);
        s_begin_drain(&d);
        s_run_ms(1900);
        t_expect_silence(fd);
        s_expect_reset(fd);
        s_check_drain(&d, TSRV_ETIMEOUT, 2000, 2100);
        CHECK_INT(s_reason, TSRV_ECLOSED);
        CHECK_INT(t_log_lines, 1);
        CHECK(strstr(t_log, "drain") != NULL && strstr(t_log, " 1 ") != NULL);
        t_close(fd);
        s_close();
    }
}

/* Half a line is unread in the library. */
TEST_STREAM(unread_bytes_are_not_idle)
{
    open_server(echo, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join_and_ask();
    t_sends(fd, "li");
    s_run_ms(1500);
    s_begin_drain(&d);
    s_run_ms(2500);
    t_expect_silence(fd);
    t_sends(fd, "ne\n");
    s_expect(fd, "line\nBYE\n");
    s_leave(fd);
    s_check_drain(&d, TSRV_OK, 3490, 3900);
    s_close();
}

/* The kernel alone has the request when the drain looks: the loop has not turned since. */
TEST_STREAM(unread_bytes_in_the_kernel_are_not_idle)
{
    open_server(echo, defaults);
    int fd = join_and_ask(), other = join_and_ask();
    s_run_ms(1500);
    t_sends(fd, "two\n");
    CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_EAGAIN);
    s_expect(fd, "two\nBYE\n");
    s_expect(other, "BYE\n");
    s_leave(fd);
    s_leave(other);
    s_until(&s_closed, 2);
    CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_OK);
    s_close();
}

/* The handler is elsewhere while its client sends on. */
static int pause_between_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    enter(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        tsrv_write(stream, line.data, line.size);
        lines++;
        CHECK_INT(tsrv_sleep(300), TSRV_OK);
    }
    return say_goodbye(stream, rc);
}

TEST_COROUTINE(requests_that_came_while_the_handler_slept_are_answered)
{
    open_server(pause_between_lines, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join();
    t_sends(fd, "one\n");
    s_until(&lines, 1);
    s_begin_drain(&d);
    t_sends(fd, "two\nthree\n");
    s_expect(fd, "one\ntwo\nthree\nBYE\n");
    s_leave(fd);
    s_check_drain(&d, TSRV_OK, 1000, 1900);
    s_close();
}

/* ---- unsent output ------------------------------------------------------------------------*/

/* Sends of a few bytes each take long: in hard mode less is big. */
enum { BIG = 2 << 20 };

/* A handler that sends the pattern for each line. */
static int answer_large(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    enter(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        tsrv_write(stream, large, large_size);
        lines++;
    }
    return say_goodbye(stream, rc);
}

/* A client that has asked for it and reads nothing yet. The kernel takes little of it, the less
 * the smaller receive_room is; but small pieces fill a small room so soon that it drops some, and
 * they come again only after 200 ms. */
static int join_slowly(int receive_room)
{
    int fd = join_with_room(receive_room);
    for (tsrv_stream *s = tsrv_server_next(s_server, NULL); s != NULL;
         s = tsrv_server_next(s_server, s)) {
        limit_output_to(s, 65536);
    }
    t_sends(fd, "go\n");
    return fd;
}

static int count_unsent(void)
{
    int count = 0;
    for (tsrv_stream *s = tsrv_server_next(s_server, NULL); s != NULL;
         s = tsrv_server_next(s_server, s)) {
        count += tsrv_unsent_size(s) > 0;
    }
    return count;
}

static void await_unsent(int count)
{
    int64_t limit = t_patience();
    while (count_unsent() < count) {
        s_turn();
        CHECK(t_now_ms() < limit);
    }
}

/* The writer waits in its next read, with output queued, or in the write, above the high water. */
static void drain_with_unsent_output(size_t high_water)
{
    tsrv_server_options options = defaults;
    options.write_high_water = high_water;
    open_server(answer_large, options);
    make_large(bulk(BIG, 200000)); /* twice what the kernel takes */
    s_drainer d = s_new_drain(TSRV_NEVER);
    int fd = join_slowly(16384);
    await_unsent(1);
    s_run_ms(1500);
    s_begin_drain(&d);
    s_run_ms(3000);
    CHECK_INT(count_unsent(), 1);
    s_expect_bytes(fd, large, large_size);
    s_expect(fd, "BYE\n");
    s_leave(fd);
    s_check_drain(&d, TSRV_OK, 3000, INT64_MAX);
    s_close();
    free(large);
}

TEST_STREAM(unsent_output_is_not_idle)
{
    drain_with_unsent_output(16 << 20);
}

TEST_STREAM(unsent_output_above_the_high_water_is_not_idle)
{
    drain_with_unsent_output(16384);
}

/* ---- streams without requests and answers -------------------------------------------------*/

/* Takes lines and never answers. */
static int take_all_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    enter(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        lines++;
    }
    return say_goodbye(stream, rc);
}

TEST_STREAM(one_way_stream_ends_after_a_second_of_silence)
{
    open_server(take_all_lines, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join();
    s_begin_drain(&d);
    for (int i = 1; i <= 8; i++) {
        t_sends(fd, "data\n");
        s_until(&lines, i);
        s_run_ms(800);
        t_expect_silence(fd);
    }
    s_expect(fd, "BYE\n");
    s_leave(fd);
    s_check_drain(&d, TSRV_OK, 7 * 800 + 950, 7 * 800 + 1400);
    CHECK_INT(lines, 8);
    s_close();
}

/* What one says goes to all others: their last act is a write that they did not make. */
static int chat(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    enter(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        for (tsrv_stream *s = tsrv_server_next(s_server, NULL); s != NULL;
             s = tsrv_server_next(s_server, s)) {
            if (s != stream) {
                CHECK_INT(tsrv_try_write(s, line.data, line.size), TSRV_OK);
            }
        }
        lines++;
    }
    return say_goodbye(stream, rc);
}

TEST_STREAM(chat_ends_listeners_first_and_the_speaker_after_a_second)
{
    open_server(chat, defaults);
    s_drainer d = s_new_drain(0);
    int speaker = join(), listeners[3];
    for (int i = 0; i < 3; i++) {
        listeners[i] = join();
    }
    s_run_ms(1500); /* the listeners have been silent since */
    t_sends(speaker, "hi all\n");
    s_until(&lines, 1);
    s_begin_drain(&d);
    for (int i = 0; i < 3; i++) {
        s_expect(listeners[i], "hi all\nBYE\n");
        s_leave(listeners[i]);
    }
    s_until(&s_closed, 3);
    s_run_ms(800);
    t_expect_silence(speaker);
    t_sends(speaker, "anybody?\n"); /* another second */
    s_until(&lines, 2);
    s_run_ms(800);
    t_expect_silence(speaker);
    s_expect(speaker, "BYE\n");
    s_leave(speaker);
    s_check_drain(&d, TSRV_OK, 1700, 2200);
    s_close();
}

/* ---- handlers that wait for something else ------------------------------------------------*/

static int waits; /* calls of tsrv_wait */

static int wait_for_the_drain(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    enter(stream);
    while (!tsrv_stopping(stream)) {
        waits++;
        int rc = tsrv_wait(stream, TSRV_NEVER);
        if (rc != TSRV_OK) {
            return rc;
        }
    }
    return tsrv_write(stream, "BYE\n", 4);
}

TEST_STREAM(wait_is_woken_when_the_drain_begins)
{
    open_server(wait_for_the_drain, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join();
    s_run_ms(2000);
    s_begin_drain(&d);
    s_expect(fd, "BYE\n");
    s_leave(fd);
    s_check_drain(&d, TSRV_OK, 0, 100);
    CHECK_INT(waits, 1);
    s_close();
}

/* The ways in which a handler waits that a drain does not end before the grace is over. */
enum { IN_SLEEP, IN_WAIT_FD, IN_CONNECT, IN_CLIENT_READ, IN_OTHER_DRAIN, IN_WAYS };

typedef struct elsewhere {
    int way, rc, calls;
    int pipe[2];
    int full;       /* a unix listener whose queue is full */
    char name[64];  /* of it */
    int port;       /* of a listener that accepts and says nothing */
    int silent;     /* that listener */
    tsrv_server *other;
} elsewhere;

static int connect_and_read(elsewhere *e)
{
    tsrv_stream *client;
    tsrv_slice slice;
    int rc = tsrv_connect("127.0.0.1", e->port, NULL, &client);
    CHECK_INT(rc, TSRV_OK);
    rc = tsrv_read_some(client, 0, &slice);
    CHECK_INT(tsrv_close(client), TSRV_OK);
    return rc;
}

static int be_elsewhere(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    elsewhere *e = (elsewhere *)context;
    tsrv_stream *client = NULL;
    (void)address;
    enter(stream);
    e->calls++;
    switch (e->way) {
    case IN_SLEEP: e->rc = tsrv_sleep(60000); break;
    case IN_WAIT_FD: e->rc = tsrv_wait_fd(e->pipe[0], TSRV_READABLE, TSRV_NEVER); break;
    case IN_CONNECT: {
        tsrv_connect_options options = {0};
        options.timeout_ms = TSRV_NEVER;
        e->rc = tsrv_connect(e->name, 0, &options, &client);
        CHECK(client == NULL);
        break;
    }
    case IN_CLIENT_READ: e->rc = connect_and_read(e); break;
    default: e->rc = tsrv_server_drain(e->other, TSRV_NEVER);
    }
    /* Once: the next wait is a wait again. */
    CHECK_INT(tsrv_sleep(10), TSRV_OK);
    return TSRV_OK;
}

/* Linux's abstract name space has no files to leave behind. */
static int full_unix_listener(char *name, size_t size, int *fillers, int count)
{
    struct sockaddr_un address;
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    snprintf(name, size, "unix:@drain_test.%ld", (long)getpid());
    memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    memcpy(address.sun_path + 1, name + 6, strlen(name + 6));
    socklen_t length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name + 6));
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&address, length) == 0 && listen(fd, 0) == 0);
    for (int i = 0; i < count; i++) {
        fillers[i] = socket(AF_UNIX, SOCK_STREAM, 0);
        CHECK(fillers[i] >= 0 && fcntl(fillers[i], F_SETFL, O_NONBLOCK) == 0);
        if (connect(fillers[i], (struct sockaddr *)&address, length) != 0) {
            CHECK_INT(errno, EAGAIN);
        }
    }
    return fd;
}

static void elsewhere_until_the_grace(int way)
{
    elsewhere e = {0};
    tsrv_server_options options = {0};
    int fillers[3];
    e.way = way;
    CHECK(pipe(e.pipe) == 0);
    e.full = full_unix_listener(e.name, sizeof e.name, fillers, 3);
    e.silent = t_raw_socket(SOCK_STREAM, true, &e.port);
    options.context = &e;
    open_server(be_elsewhere, options);
    options.handle_stream = take_all_lines;
    options.data_size = sizeof(session);
    e.other = s_new_server(options);
    int others = t_add_pair(e.other);
    t_sends(others, "unread"); /* keeps the other server busy */
    s_drainer d = s_new_drain(700);
    int fd = t_connect(s_port);
    s_until(&e.calls, 1);
    s_run_ms(2000);
    s_begin_drain(&d);
    s_run_ms(600);
    CHECK_INT(s_closed, 0);
    t_expect_silence(fd);
    s_expect_reset(fd);
    s_check_drain(&d, TSRV_ETIMEOUT, 700, 800);
    CHECK_INT(e.rc, TSRV_ECLOSED);
    CHECK_INT(e.calls, 1);
    CHECK_INT(s_closed, 1);
    CHECK_INT(t_log_lines, 1);
    CHECK(strstr(t_log, "drain") != NULL);
    tsrv_server_free(e.other);
    CHECK_INT(tsrv_loop_run(s_loop), TSRV_OK); /* nothing is left */
    s_close();
    t_close(fd);
    t_close(e.full);
    t_close(e.silent);
    t_close(others);
    t_close_all(fillers, 3);
    t_close_all(e.pipe, 2);
}

TEST_COROUTINE(grace_ends_other_waits_once)
{
    for (int way = 0; way < IN_WAYS; way++) {
#ifndef __linux__
        if (way == IN_CONNECT) {
            continue; /* a full queue refuses there */
        }
#endif
        elsewhere_until_the_grace(way);
    }
}

static int ignored;

/* Treats the end of its wait as nothing. */
static int sleep_through(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    enter(stream);
    for (int i = 0; i < 10; i++) {
        ignored += tsrv_sleep(1000) == TSRV_ECLOSED;
    }
    return TSRV_OK;
}

TEST_COROUTINE(stubborn_handler_does_not_hold_up_the_drain)
{
    open_server(sleep_through, defaults);
    s_drainer d = s_new_drain(500);
    int fd = join();
    s_begin_drain(&d);
    s_expect_reset(fd);
    s_check_drain(&d, TSRV_ETIMEOUT, 1500, 1700);
    CHECK_INT(s_closed, 0);
    CHECK_INT(t_log_lines, 2);
    CHECK(strstr(t_log, "handlers still run") != NULL);
    t_close(fd);

    /* It comes to its end all the same. */
    s_until(&s_closed, 1);
    CHECK_INT(ignored, 1);
    CHECK_INT(s_reason, TSRV_OK); /* what it returned: closing on this side is no error */
    CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_OK);
    s_close();
}

/* ---- lingering ----------------------------------------------------------------------------*/

TEST_STREAM(peer_that_never_closes_is_waited_for_by_its_time_limit)
{
    open_server(echo, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join_and_ask();
    s_begin_drain(&d);
    s_expect(fd, "BYE\n");
    s_check_drain(&d, TSRV_OK, 5900, 6400); /* close_timeout_ms, after a second */
    t_close(fd);
    s_close();
}

TEST_STREAM(lingering_counts_towards_the_grace)
{
    open_server(echo, defaults);
    s_drainer d = s_new_drain(3000);
    int fd = join_and_ask();
    s_begin_drain(&d);
    s_expect(fd, "BYE\n");
    s_expect_eof(fd);
    s_check_drain(&d, TSRV_ETIMEOUT, 3000, 3100);
    CHECK_INT(t_log_lines, 1);
    t_close(fd);
    s_close();
}

/* ---- the grace ----------------------------------------------------------------------------*/

/* How long a drain with this argument takes when nothing ends by itself. */
static void check_grace(int option_ms, int argument_ms, int64_t expected_ms)
{
    tsrv_server_options options = defaults;
    options.grace_ms = option_ms;
    open_server(echo, options);
    s_drainer d = s_new_drain(argument_ms);
    int fd = join_with_half_a_line();
    s_begin_drain(&d);
    s_check_drain(&d, TSRV_ETIMEOUT, expected_ms, expected_ms + 100);
    t_close(fd);
    s_close();
}

TEST_LOOP(grace_is_the_argument_else_the_option_else_30_s)
{
    check_grace(0, 0, 30000);
    check_grace(300, 0, 300);
    check_grace(300, 800, 800);
    check_grace(TSRV_NEVER, 400, 400);
    check_grace(0, 1, 1);
}

/* Somebody asks for the second time. */
TEST_LOOP(cut_ends_the_grace_at_once)
{
    tsrv_server_options options = defaults;
    options.grace_ms = TSRV_NEVER;
    open_server(echo, options);
    s_drainer d = s_new_drain(0);
    int fd = join_with_half_a_line();
    tsrvi_loop_cut(s_loop); /* nothing is being drained */
    s_begin_drain(&d);
    s_run_ms(5000);
    t_expect_silence(fd);
    tsrvi_loop_cut(s_loop);
    tsrvi_loop_cut(s_loop);
    s_expect_reset(fd);
    s_check_drain(&d, TSRV_ETIMEOUT, 5000, 5100);
    CHECK_INT(t_log_lines, 1);
    t_close(fd);
    s_close();
}

static char told[4][128]; /* what was logged for the curious */
static int told_count;

static void see_info(int level, const char *message, void *context)
{
    (void)context;
    if (level == TSRV_LOG_INFO && told_count < 4) {
        snprintf(told[told_count++], sizeof told[0], "%s", message);
    }
}

TEST_LOOP(drain_tells_its_beginning_and_its_end)
{
    open_server(echo, defaults);
    tsrv_set_log(see_info, NULL);
    s_drainer d = s_new_drain(2000);
    int good = join_and_ask(), stalled = join_with_half_a_line();
    s_begin_drain(&d);
    CHECK_INT(told_count, 1);
    CHECK_STR(told[0], "drain: begins, 2 connections are open");
    s_expect(good, "BYE\n");
    s_leave(good);
    s_expect_reset(stalled);
    s_until(&d.done, 1);
    CHECK_INT(told_count, 2);
    CHECK_STR(told[1], "drain: over, 1 connections have ended, 1 were aborted");
    CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_OK); /* again: nothing to tell */
    CHECK_INT(told_count, 2);
    t_close(stalled);
    s_close();
}

TEST_LOOP(grace_can_be_without_limit_and_be_shortened_later)
{
    tsrv_server_options options = defaults;
    options.grace_ms = TSRV_NEVER;
    open_server(echo, options);
    s_drainer d = s_new_drain(0);
    int fd = join_with_half_a_line();
    s_begin_drain(&d);
    s_run_ms(60000); /* the default would be over */
    CHECK_INT(d.done, 0);
    t_expect_silence(fd);
    CHECK_INT(tsrv_server_drain(s_server, 2000), TSRV_EAGAIN);
    CHECK_INT(tsrv_server_drain(s_server, 5000), TSRV_EAGAIN); /* does not lengthen it */
    CHECK_INT(tsrv_server_drain(s_server, TSRV_NEVER), TSRV_EAGAIN);
    s_check_drain(&d, TSRV_ETIMEOUT, 62000, 62200);
    t_close(fd);
    s_close();
}

/* ---- who calls it -------------------------------------------------------------------------*/

TEST_LOOP(drain_of_nothing_is_over_at_once)
{
    tsrv_server_options options = {0};
    open_server(echo, options);
    tsrv_server *unused;
    options.handle_stream = echo;
    unused = s_new_server(options);
    s_drainer d = s_new_drain(0), e = s_new_drain(0);
    e.server = unused;
    CHECK_INT(tsrv_server_drain(unused, 0), TSRV_OK); /* never listened */
    s_begin_drain(&e);
    s_check_drain(&e, TSRV_OK, 0, 1);
    CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_OK);
    s_begin_drain(&d);
    s_check_drain(&d, TSRV_OK, 0, 1);
    CHECK_INT(tsrv_loop_run(s_loop), TSRV_OK); /* it listens no more */
    tsrv_server_free(unused);
    s_close();
}

static int last_rc = 1, polls;
static tsrv_timer poll_timer;

/* A callback that asks until it is over. */
static void drain_by_timer(void *context)
{
    last_rc = tsrv_server_drain(s_server, *(int *)context);
    polls++;
    if (last_rc == TSRV_EAGAIN) {
        CHECK_INT(tsrv_timer_start(s_loop, &poll_timer, 100, drain_by_timer, context), TSRV_OK);
    }
}

TEST_STREAM(drain_from_a_timer_reports_its_end_once)
{
    int grace_ms = 1000;
    open_server(echo, defaults);
    int fd = join_with_half_a_line();
    CHECK_INT(tsrv_timer_start(s_loop, &poll_timer, 0, drain_by_timer, &grace_ms), TSRV_OK);
    s_until(&polls, 1);
    CHECK_INT(last_rc, TSRV_EAGAIN);
    s_expect_reset(fd);
    s_run_ms(200);
    CHECK_INT(last_rc, TSRV_ETIMEOUT);
    CHECK(polls >= 10 && polls <= 13);
    CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_OK);
    t_close(fd);
    s_close();
}

TEST_STREAM(drain_from_outside_goes_on_in_the_turns)
{
    open_server(echo, defaults);
    int fd = join_and_ask();
    CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_EAGAIN);
    CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_EAGAIN); /* twice: the same drain */
    s_expect(fd, "BYE\n");
    s_leave(fd);
    CHECK_INT(tsrv_loop_run(s_loop), TSRV_OK); /* until nothing is left */
    CHECK_INT(s_closed, 1);
    CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_OK);
    s_close();
}

/* The result that nobody asked for belongs to the drain that is over, not to the next. */
TEST_STREAM(result_of_an_old_drain_is_not_taken_for_the_next)
{
    open_server(echo, defaults);
    int fd = join_with_half_a_line();
    CHECK_INT(tsrv_server_drain(s_server, 100), TSRV_EAGAIN);
    s_expect_reset(fd);
    t_close(fd);
    s_until(&s_closed, 1);
    s_run_ms(200);

    s_port = t_listen(s_server);
    fd = join_and_ask();
    CHECK_INT(tsrv_server_drain(s_server, 5000), TSRV_EAGAIN);
    s_expect(fd, "BYE\n");
    s_leave(fd);
    s_until(&s_closed, 2);
    CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_OK);
    s_close();
}

/* "quit" shuts the server down from inside. */
static int quit_rc;

static int quit_by_line(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    enter(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        lines++;
        quit_rc = tsrv_server_drain(s_server, 0);
        CHECK_INT(tsrv_stopping(stream), true);
        tsrv_write(stream, "bye all\n", 8);
    }
    return say_goodbye(stream, rc);
}

TEST_STREAM(drain_in_an_own_handler_does_not_wait_for_itself)
{
    open_server(quit_by_line, defaults);
    int fd = join(), other = join();
    s_run_ms(1500);
    t_sends(fd, "quit\n");
    s_expect(fd, "bye all\nBYE\n");
    s_leave(fd);
    s_expect(other, "BYE\n");
    s_leave(other);
    s_until(&s_closed, 2);
    CHECK_INT(quit_rc, TSRV_EAGAIN);
    CHECK_INT(tsrv_loop_run(s_loop), TSRV_OK);
    s_close();
}

TEST_STREAM(two_coroutines_wait_for_one_drain)
{
    open_server(echo, defaults);
    s_drainer d = s_new_drain(0), e = s_new_drain(1000);
    int fd = join_with_half_a_line();
    s_begin_drain(&d);
    s_run_ms(500);
    s_begin_drain(&e); /* shortens it for both */
    s_check_drain(&d, TSRV_ETIMEOUT, 1500, 1650);
    s_check_drain(&e, TSRV_ETIMEOUT, 1000, 1100);
    CHECK_INT(t_log_lines, 1);
    CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_OK); /* they have had the result */
    t_close(fd);
    s_close();
}

TEST_STREAM(freeing_the_server_ends_the_wait_in_drain)
{
    open_server(echo, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join_with_half_a_line();
    s_begin_drain(&d);
    tsrv_server_free(s_server);
    s_server = NULL;
    s_expect_reset(fd);
    s_check_drain(&d, TSRV_ECLOSED, 0, 100);
    CHECK_INT(s_closed, 1);
    t_close(fd);
    s_close();
}

static void free_server(void *context)
{
    tsrv_server_free((tsrv_server *)context);
}

TEST_STREAM(freeing_the_server_inside_the_loop_ends_the_wait_in_drain)
{
    open_server(echo, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join_with_half_a_line();
    s_begin_drain(&d);
    CHECK_INT(tsrv_loop_post(s_loop, free_server, s_server), TSRV_OK);
    s_server = NULL;
    s_check_drain(&d, TSRV_ECLOSED, 0, 100);
    s_expect_reset(fd);
    t_close(fd);
    s_close();
}

TEST_STREAM(freeing_the_loop_ends_the_wait_in_drain)
{
    open_server(echo, defaults);
    s_drainer d = s_new_drain(0);
    int fd = join_with_half_a_line();
    s_begin_drain(&d);
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
    CHECK_INT(d.done, 1);
    CHECK_INT(d.rc, TSRV_ECLOSED);
    CHECK_INT(s_closed, 1);
    CHECK_INT(t_log_lines, 0);
    tsrv_server_free(s_server);
    t_expect_reset(fd);
    t_close(fd);
}

TEST_STREAM(server_serves_again_after_a_drain)
{
    open_server(echo, defaults);
    for (int round = 0; round < 3; round++) {
        s_drainer d = s_new_drain(0);
        int fd = join_and_ask();
        CHECK_INT(tsrv_stopping(tsrv_server_next(s_server, NULL)), false);
        s_begin_drain(&d);
        s_expect(fd, "BYE\n");
        s_leave(fd);
        s_check_drain(&d, TSRV_OK, 1000, 1400);
        s_port = t_listen(s_server);
    }
    CHECK_INT(s_closed, 3);
    s_close();
}

/* ---- SIGTERM, as a program would have it --------------------------------------------------*/

static int terminated;

static void shut_down(void *context)
{
    last_rc = tsrv_server_drain((tsrv_server *)context, 0);
}

static void on_sigterm(void *context)
{
    terminated++;
    CHECK_INT(tsrv_spawn(NULL, shut_down, context), TSRV_OK);
}

TEST_STREAM(sigterm_in_the_middle_of_twenty_replies)
{
    enum { CLIENTS = 20 };
    tsrv_server_options options = {0};
    tsrv_signal signal_watch = {0};
    int fds[CLIENTS], rc;
    options.grace_ms = TSRV_NEVER; /* the clients take their time */
    options.write_timeout_ms = TSRV_NEVER;
    open_server(answer_large, options);
    make_large(bulk(BIG, 50000));
    CHECK_INT(tsrv_signal_start(s_loop, &signal_watch, SIGTERM, on_sigterm, s_server), TSRV_OK);
    for (int i = 0; i < CLIENTS; i++) {
        fds[i] = join_slowly(0);
    }
    await_unsent(CLIENTS);
    CHECK(raise(SIGTERM) == 0);
    s_until(&terminated, 1);
    for (int i = 0; i < CLIENTS; i++) {
        s_expect_bytes(fds[i], large, large_size);
        s_expect(fds[i], "BYE\n");
        s_leave(fds[i]);
    }
    while ((rc = tsrv_loop_run_once(s_loop, TSRV_NEVER)) > 0) {
    }
    CHECK_INT(rc, 0);
    CHECK_INT(tsrv_loop_run(s_loop), TSRV_OK); /* the signal watch does not hold it */
    CHECK_INT(last_rc, TSRV_OK);
    CHECK_INT(s_closed, CLIENTS);
    CHECK_INT(t_log_lines, 0);
    tsrv_signal_stop(&signal_watch);
    s_close();
    free(large);
}

/* ---- everything from everywhere -----------------------------------------------------------
 *
 * Two clients are there, and a timer, a watch and a signal watch are active. Then one callback of
 * each kind ends something, itself maybe; afterwards nothing may be left, or called again. */

enum {
    P_HANDLER,
    P_ON_CLOSE,
    P_ON_START,
    P_TIMER,
    P_WATCH,
    P_POST,
    P_SIGNAL,
    P_COROUTINE,
    P_DRAINED, /* a coroutine when its drain is over */
    SEATS
};

typedef struct cell {
    int place;
    void (*action)(struct cell *);
    int acted;
    int open;     /* streams that were open then */
    int calls;    /* of the timer, the watch and the signal watch, afterwards */
    int anew;     /* the same after they were started anew; bits */
    int code;     /* what the action returned */
    int clients[2];
    int pipe[2];
    tsrv_timer timer;
    tsrv_watch watch;
    tsrv_signal signal_watch;
} cell;

static cell now;

static void act(int place)
{
    if (now.place != place || now.acted != 0) {
        return;
    }
    for (tsrv_stream *s = tsrv_server_next(s_server, NULL); s != NULL;
         s = tsrv_server_next(s_server, s)) {
        now.open++;
    }
    now.action(&now);
    now.acted = 1;
}

static void cell_timer(void *context)
{
    (void)context;
    now.calls += now.acted;
    act(P_TIMER);
}

static void cell_watch(int events, void *context)
{
    char byte;
    (void)context;
    CHECK_INT(events, TSRV_READABLE);
    CHECK_INT(read(now.pipe[0], &byte, 1), 1);
    now.calls += now.acted;
    act(P_WATCH);
}

static void cell_signal(void *context)
{
    (void)context;
    now.calls += now.acted;
    act(P_SIGNAL);
}

static void cell_post(void *context)
{
    (void)context;
    act(P_POST);
}

static void cell_coroutine(void *context)
{
    (void)context;
    act(P_COROUTINE);
}

static void cell_drained(void *context)
{
    (void)context;
    CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_OK);
    act(P_DRAINED);
}

static void cell_on_start(tsrv_server *server, void *context)
{
    (void)server, (void)context;
    act(P_ON_START);
}

static void cell_on_close(tsrv_stream *stream, int reason, void *context)
{
    s_note_close(stream, reason, context);
    act(P_ON_CLOSE);
}

static int cell_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    enter(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        bool go = strcmp(line.data, "go\n") == 0;
        tsrv_write(stream, line.data, line.size);
        if (go) {
            act(P_HANDLER);
        }
    }
    return rc;
}

static void cell_begin(int place, void (*action)(cell *))
{
    tsrv_server_options options = {0};
    char byte = 0;
    memset(&now, 0, sizeof now);
    now.place = place;
    now.action = action;
    options.on_close = cell_on_close;
    options.on_start = cell_on_start;
    open_server(cell_handler, options);
    CHECK(pipe(now.pipe) == 0);
    signal(SIGUSR1, SIG_IGN);
    CHECK_INT(tsrv_watch_start(s_loop, &now.watch, now.pipe[0], TSRV_READABLE, cell_watch, NULL),
              TSRV_OK);
    CHECK_INT(tsrv_signal_start(s_loop, &now.signal_watch, SIGUSR1, cell_signal, NULL), TSRV_OK);
    for (int i = 0; i < 2; i++) {
        now.clients[i] = t_connect(s_port);
    }
    if (place != P_ON_START) {
        s_until(&entered, 2);
    }
    CHECK_INT(tsrv_timer_start(s_loop, &now.timer, place == P_TIMER ? 0 : 100000, cell_timer, NULL),
              TSRV_OK);
    switch (place) {
    case P_HANDLER: t_sends(now.clients[0], "go\n"); break;
    case P_ON_CLOSE: t_shut(now.clients[0]); break;
    case P_WATCH: CHECK(write(now.pipe[1], &byte, 1) == 1); break;
    case P_POST: CHECK_INT(tsrv_loop_post(s_loop, cell_post, NULL), TSRV_OK); break;
    case P_SIGNAL: CHECK(raise(SIGUSR1) == 0); break;
    case P_COROUTINE: CHECK_INT(tsrv_spawn(s_loop, cell_coroutine, NULL), TSRV_OK); break;
    case P_DRAINED:
        for (int i = 0; i < 2; i++) {
            t_shut(now.clients[i]);
        }
        CHECK_INT(tsrv_spawn(s_loop, cell_drained, NULL), TSRV_OK);
        break;
    default: break;
    }
}

static void cell_end(void)
{
    t_close_all(now.clients, 2);
    s_settle();
    tsrv_timer_stop(&now.timer);
    tsrv_watch_stop(&now.watch);
    tsrv_signal_stop(&now.signal_watch);
    s_close();
    CHECK_INT(s_closed, entered);
    t_close_all(now.pipe, 2);
}

/* Each place's cell leaves nothing. */
static void in_every_place(void (*run_cell)(int place))
{
    for (int place = 0; place < SEATS; place++) {
        int fds = t_open_fds();
        long live = t_live_allocations;
        run_cell(place);
        CHECK_INT(t_open_fds(), fds);
        CHECK_INT(t_live_allocations, live);
    }
}

static void (*cell_action)(cell *), (*cell_check)(cell *);

static void act_and_check(int place)
{
    cell_begin(place, cell_action);
    s_until(&now.acted, 1);
    cell_check(&now);
    cell_end();
}

static void run_cells(void (*action)(cell *), void (*check)(cell *))
{
    cell_action = action;
    cell_check = check;
    in_every_place(act_and_check);
}

/* The client whose stream is open whenever one is. */
static int last_client(const cell *c)
{
    return c->clients[1];
}

static void check_cell_served(cell *c)
{
    if (c->place != P_DRAINED) {
        s_echo(last_client(c), "still there?\n");
    }
}

static void close_all(cell *c)
{
    (void)c;
    for (tsrv_stream *s = tsrv_server_next(s_server, NULL); s != NULL;
         s = tsrv_server_next(s_server, s)) {
        CHECK_INT(tsrv_close(s), TSRV_OK);
    }
}

static void abort_all(cell *c)
{
    (void)c;
    for (tsrv_stream *s = tsrv_server_next(s_server, NULL); s != NULL;
         s = tsrv_server_next(s_server, s)) {
        CHECK_INT(tsrv_abort(s), TSRV_OK);
    }
}

/* Where none was open yet, or any more, there is nothing to end. */
static void check_closed(cell *c)
{
    if (c->open == 0) {
        CHECK(c->place == P_ON_START || c->place == P_DRAINED);
        check_cell_served(c);
        return;
    }
    s_expect_eof(last_client(c));
    CHECK_INT(c->open, c->place == P_ON_CLOSE ? 1 : 2);
}

static void check_aborted(cell *c)
{
    if (c->open == 0) {
        check_closed(c);
        return;
    }
    s_expect_reset(last_client(c));
    s_until(&s_closed, 2);
}

TEST_STREAM(every_callback_may_close_streams)
{
    run_cells(close_all, check_closed);
}

TEST_STREAM(every_callback_may_abort_streams)
{
    run_cells(abort_all, check_aborted);
}

static void stop_server(cell *c)
{
    (void)c;
    tsrv_server_stop(s_server);
    tsrv_server_stop(s_server);
}

static void check_stopped(cell *c)
{
    tsrv_address address;
    CHECK_INT(tsrv_server_address(s_server, 0, &address), TSRV_EINVAL);
    if (c->open > 0) {
        check_cell_served(c);
    }
}

TEST_STREAM(every_callback_may_stop_the_server)
{
    run_cells(stop_server, check_stopped);
}

static void free_it(cell *c)
{
    (void)c;
    tsrv_server_free(s_server);
    s_server = NULL;
}

static void check_freed(cell *c)
{
    if (c->open > 0) {
        s_expect_reset(last_client(c));
        s_until(&s_closed, 2);
        CHECK_INT(entered, 2);
    }
    tsrv_timer_stop(&c->timer);
    tsrv_watch_stop(&c->watch);
    CHECK_INT(tsrv_loop_run(s_loop), TSRV_OK); /* nothing is left */
}

TEST_STREAM(every_callback_may_free_the_server)
{
    run_cells(free_it, check_freed);
}

static void drain_it(cell *c)
{
    c->code = tsrv_server_drain(s_server, 0);
}

/* Coroutines have waited for the end; the clients leave when they are told. */
static void check_drained(cell *c)
{
    tsrv_address address;
    /* In on_start the clients wait in the kernel's queue, and are taken. */
    CHECK_INT(c->code, c->place == P_DRAINED || c->place == P_COROUTINE ? TSRV_OK : TSRV_EAGAIN);
    CHECK_INT(tsrv_server_address(s_server, 0, &address), TSRV_EINVAL);
    if (c->open > 0 || c->place == P_ON_START) {
        s_expect_eof(last_client(c));
    }
}

static void run_drain_cell(int place)
{
    cell_begin(place, drain_it);
    if (place == P_HANDLER) {
        s_expect(now.clients[0], "go\n");
    }
    if (place == P_COROUTINE) {
        for (int i = 0; i < 2; i++) {
            s_expect_eof(now.clients[i]);
            t_shut(now.clients[i]);
        }
    }
    s_until(&now.acted, 1);
    check_drained(&now);
    cell_end();
}

TEST_STREAM(every_callback_may_drain_the_server)
{
    in_every_place(run_drain_cell);
}

static void stop_the_loop(cell *c)
{
    (void)c;
    tsrv_loop_stop(s_loop);
}

static void run_stop_cell(int place)
{
    cell_begin(place, stop_the_loop);
    CHECK_INT(tsrv_loop_run(s_loop), TSRV_OK); /* with the timer and the watch still active */
    CHECK_INT(now.acted, 1);
    if (now.open > 0) {
        check_cell_served(&now); /* it can run on */
    }
    cell_end();
}

TEST_STREAM(every_callback_may_stop_the_loop)
{
    in_every_place(run_stop_cell);
}

static void free_the_loop(cell *c)
{
    c->code = tsrv_loop_free(s_loop);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK); /* the thread's own, which there is none of */
    CHECK_INT(tsrv_loop_run(s_loop), TSRV_EBUSY);
    CHECK_INT(tsrv_loop_run_once(s_loop, 0), TSRV_EBUSY);
}

static void check_busy(cell *c)
{
    CHECK_INT(c->code, TSRV_EBUSY);
    check_cell_served(c);
}

TEST_STREAM(no_callback_may_free_or_run_the_loop)
{
    run_cells(free_the_loop, check_busy);
}

static void stop_own(cell *c)
{
    for (int i = 0; i < 2; i++) {
        tsrv_timer_stop(&c->timer);
        tsrv_watch_stop(&c->watch);
        tsrv_signal_stop(&c->signal_watch);
    }
}

static void check_own_stopped(cell *c)
{
    char byte = 0;
    CHECK(write(c->pipe[1], &byte, 1) == 1);
    CHECK(raise(SIGUSR1) == 0); /* ignored again, as before the watch */
    s_run_ms(200);
    CHECK_INT(c->calls, 0);
    check_cell_served(c);
}

TEST_STREAM(every_callback_may_stop_timers_watches_and_signals)
{
    run_cells(stop_own, check_own_stopped);
}

static void anew_timer(void *context)
{
    ((cell *)context)->anew |= 1;
}

static void anew_watch(int events, void *context)
{
    char byte;
    CHECK_INT(events, TSRV_READABLE);
    CHECK_INT(read(((cell *)context)->pipe[0], &byte, 1), 1);
    ((cell *)context)->anew |= 2;
}

static void anew_signal(void *context)
{
    ((cell *)context)->anew |= 4;
}

static void start_anew(cell *c)
{
    stop_own(c);
    for (int i = 0; i < 2; i++) { /* the second time it is active */
        CHECK_INT(tsrv_timer_start(s_loop, &c->timer, 30, anew_timer, c), TSRV_OK);
        CHECK_INT(tsrv_watch_start(s_loop, &c->watch, c->pipe[0], TSRV_READABLE, anew_watch, c),
                  TSRV_OK);
        CHECK_INT(tsrv_signal_start(s_loop, &c->signal_watch, SIGUSR1, anew_signal, c), TSRV_OK);
    }
}

static void check_anew(cell *c)
{
    char byte = 0;
    CHECK_INT(c->anew, 0);
    CHECK(write(c->pipe[1], &byte, 1) == 1);
    CHECK(raise(SIGUSR1) == 0);
    s_run_ms(20);
    CHECK_INT(c->anew, 6);
    s_run_ms(50);
    CHECK_INT(c->anew, 7);
    CHECK_INT(c->calls, 0);
    check_cell_served(c);
}

TEST_STREAM(every_callback_may_start_timers_watches_and_signals_anew)
{
    run_cells(start_anew, check_anew);
}

/* ---- a loop that is left ---------------------------------------------------------------------*/

static tsrv_stream *own_client;
static int own_client_rc = 1, sleeper_woken;

static void connect_own(void *context)
{
    (void)context;
    own_client_rc = tsrv_connect("127.0.0.1", s_port, NULL, &own_client);
}

static tsrv_server *freed_first;

static void free_and_leave(void *context)
{
    (void)context;
    tsrv_server_free(freed_first);
    tsrvi_loop_leave(s_loop, 5000, false);
    tsrvi_loop_leave(s_loop, 5000, false);
    CHECK(!freed_first->draining);
}

/* Its servers are drained, but for those that are freed already, and the program's own connections stay. */
TEST_LOOP(leaving_a_loop_drains_what_serves)
{
    tsrv_server_options options = {0};
    s_serve(echo_lines);
    CHECK_INT(tsrv_spawn(s_loop, connect_own, NULL), TSRV_OK);
    s_settle();
    CHECK_INT(own_client_rc, TSRV_OK);
    options.handle_stream = echo_lines;
    freed_first = s_new_server(options);
    int other = t_connect(t_listen(freed_first));
    s_settle();
    CHECK_INT(tsrv_loop_post(s_loop, free_and_leave, NULL), TSRV_OK);
    CHECK(tsrv_loop_run_once(s_loop, 0) >= 0);
    CHECK(s_server->draining);
    CHECK(!s_loop->servers.clients->draining);
    CHECK_INT(tsrv_error(own_client), TSRV_OK);
    s_expect_reset(other);
    t_close(other);
    tsrv_close(own_client);
    s_settle();
    s_close();
}

static int keep_sleeping(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    while (tsrv_sleep(500) == TSRV_OK) {
    }
    sleeper_woken++;
    tsrv_sleep(300);
    sleeper_woken++;
    return TSRV_OK;
}

/* Whoever is told twice to end ends the grace, and a third time changes nothing. */
TEST_COROUTINE(cutting_drains_short_is_done_once)
{
    s_serve(keep_sleeping);
    int fd = s_join();
    s_drainer d = s_new_drain(90000);
    s_begin_drain(&d);
    CHECK(s_server->draining && !s_server->forced);
    tsrvi_loop_cut(s_loop);
    s_until(&sleeper_woken, 1);
    CHECK(s_server->forced);
    uint64_t due = s_server->drain_due;
    s_run_ms(10);
    tsrvi_loop_cut(s_loop);
    CHECK(s_server->drain_due == due);
    s_check_drain(&d, TSRV_ETIMEOUT, 0, 1000);
    CHECK_INT(sleeper_woken, 2);
    t_close(fd);
    s_close();
}

/* ---- a fork's copy ---------------------------------------------------------------------------*/

/* Its memory is the child's, and is given back there. */
TEST_LOOP(freeing_a_servers_copy_in_a_child_frees_its_memory)
{
    int status;
    s_serve(echo_lines);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        long before = t_live_allocations;
        tsrv_server_free(s_server);
        _exit(t_live_allocations < before ? 0 : 1);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK_INT(status, 0);
    s_close();
}

/* A handler that is over, and leaves output behind. */
static int answer_large_and_end(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    CHECK_INT(tsrv_write(stream, large, large_size), TSRV_OK);
    lines++;
    return TSRV_OK;
}

/* Nor does the child end what is under way in the parent. */
TEST_LOOP(freeing_a_servers_copy_in_a_child_leaves_output_to_its_parent)
{
    int status;
    tsrv_server_options options = defaults;
    options.write_high_water = 64 << 20;
    make_large(16 << 20); /* more than the kernel takes */
    open_server(answer_large_and_end, options);
    int fd = s_join_with_room(16384);
    s_until(&lines, 1);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        s_reason = 1;
        tsrv_server_free(s_server);
        CHECK_INT(s_reason, TSRV_OK); /* how it has ended is known by then */
        _exit(0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK_INT(status, 0);
    s_expect_bytes(fd, large, large_size);
    s_leave(fd);
    s_close();
    free(large);
}

/* ---- what was only bound -----------------------------------------------------------------------*/

TEST_ONCE(a_drain_closes_what_was_only_bound)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_address address;
    options.handle_stream = echo_lines;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    CHECK_INT(tsrv_server_bind(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
    CHECK_INT(tsrv_server_drain(server, 0), TSRV_OK);
    struct sockaddr_in to = t_address(tsrv_address_port(&address));
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(connect(fd, (struct sockaddr *)&to, sizeof to) < 0 && errno == ECONNREFUSED);
    close(fd);
    tsrv_server_free(server);
}
