/* Reads (>>input, >>attempt, >>read): tsrv_read_until_match and its limits, lines that never end or come byte by
 * byte, and requests that come when the server stops. */
#include "memory.h"

#include "script.h"

#include "handlers.h"

/* ---- tsrv_read_until_match -----------------------------------------------------------------*/

/* Ten bytes, if one more is there. */
static size_t match_ten(const char *data, size_t size, void *context)
{
    (void)data, (void)context;
    return size > 10 ? 10 : 0;
}

static size_t match_none(const char *data, size_t size, void *context)
{
    (void)data, (void)size, (void)context;
    return 0;
}

/* The first byte is how many thousands there are, itself included. */
static size_t match_thousands(const char *data, size_t size, void *context)
{
    (void)size, (void)context;
    return (size_t)(data[0] - '0') * 1000;
}

static tsrv_match match;
static size_t match_most;
static bool match_drops;
static int step, codes[2];
static char message[64], rest[64];

static void keep(char *to, const tsrv_slice *slice)
{
    snprintf(to, 64, "%s", slice->data);
}

/* One message, and then a line. */
static int read_match(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice = {"", 0};
    int rc;
    (void)address, (void)context;
    if (step == 0) {
        rc = tsrv_read_until_match(stream, match, NULL, match_most, match_drops ? NULL : &slice);
        if (rc == TSRV_EAGAIN) {
            return rc;
        }
        codes[0] = rc;
        keep(message, &slice);
        step = 1;
    }
    if (step == 1) {
        rc = tsrv_read_until(stream, "\n", 0, &slice);
        if (rc == TSRV_EAGAIN) {
            return rc;
        }
        codes[1] = rc;
        keep(rest, &slice);
        step = 2;
    }
    return tsrv_read_until_close(stream, 0, NULL);
}

static int open_match(tsrv_match function, size_t most, bool drops, size_t max_buffer_size)
{
    tsrv_server_options options = {0};
    options.max_buffer_size = max_buffer_size;
    match = function;
    match_most = most;
    match_drops = drops;
    step = 0;
    s_open_with(read_match, options);
    return s_join();
}

static void close_match(int fd)
{
    s_finish(fd);
    s_close();
}

/* As many bytes as allowed, of which the function cannot tell: one more may decide it. */
TEST_STREAM(a_match_waits_at_its_limit)
{
    int fd = open_match(match_ten, 10, false, 0);
    t_sends(fd, "0123456789");
    s_run_ms(100);
    CHECK_INT(step, 0);
    t_sends(fd, "x\n");
    s_until(&step, 2);
    CHECK_INT(codes[0], TSRV_OK);
    CHECK_STR(message, "0123456789");
    CHECK_STR(rest, "x\n");
    close_match(fd);
}

TEST_STREAM(a_match_above_its_limit_is_too_long)
{
    int fd = open_match(match_none, 10, false, 0);
    t_sends(fd, "0123456789");
    s_run_ms(100);
    CHECK_INT(step, 0);
    t_sends(fd, "x");
    s_until(&step, 1);
    CHECK_INT(codes[0], TSRV_ETOOLONG);
    CHECK_STR(message, "");
    t_sends(fd, "\n");
    s_until(&step, 2);
    CHECK_STR(rest, "0123456789x\n"); /* nothing was taken */
    close_match(fd);
}

/* The same limits as of tsrv_read_until. */
TEST_STREAM(a_match_at_the_buffer_limit)
{
    static char data[4097];
    int fd = open_match(match_none, 0, false, 4096);
    memset(data, 'm', sizeof data);
    t_send(fd, data, 4096);
    s_settle();
    s_run_ms(100);
    CHECK_INT(step, 0);
    t_send(fd, data, 1);
    s_until(&step, 1);
    CHECK_INT(codes[0], TSRV_ETOOLONG);
    close_match(fd);
}

/* Without a slice max_bytes does not matter, however the message comes. */
TEST_STREAM(a_dropped_match_may_be_longer_than_max_bytes)
{
    int fd = open_match(match_line, 10, true, 0);
    t_sends(fd, "012345678901234");
    s_run_ms(100);
    CHECK_INT(step, 0);
    t_sends(fd, "56789\n");
    s_until(&step, 1);
    CHECK_INT(codes[0], TSRV_OK);
    t_sends(fd, "next\n");
    s_until(&step, 2);
    CHECK_STR(rest, "next\n");
    close_match(fd);
}

/* Where the size is known at once, not even max_buffer_size does. */
TEST_STREAM(a_dropped_match_may_be_longer_than_the_buffer)
{
    int fd = open_match(match_thousands, 10, true, 2000);
    char *data = new_pattern(9000);
    data[0] = '9';
    s_send(fd, data, 5000);
    s_run_ms(100);
    CHECK_INT(step, 0);
    s_send(fd, data + 5000, 4000);
    s_until(&step, 1);
    CHECK_INT(codes[0], TSRV_OK);
    t_sends(fd, "next\n");
    s_until(&step, 2);
    CHECK_STR(rest, "next\n");
    close_match(fd);
    free(data);
}

TEST_STREAM(a_dropped_match_that_never_ends_is_too_long)
{
    int fd = open_match(match_none, 10, true, 2000);
    char *data = new_pattern(2001);
    s_send(fd, data, 2000);
    s_run_ms(100);
    CHECK_INT(step, 0);
    t_send(fd, data, 1);
    s_until(&step, 1);
    CHECK_INT(codes[0], TSRV_ETOOLONG);
    close_match(fd);
    free(data);
}

/* ---- one handler for a protocol with values, in both modes ---------------------------------*/

enum { MAX_LINE = 250, MAX_MESSAGE = 5000 };

typedef struct store {
    char key[MAX_LINE], value[MAX_MESSAGE];
    int size, calls;
} store;

static size_t match_request(const char *data, size_t size, void *context)
{
    const char *end = (const char *)memchr(data, '\n', size);
    unsigned long bytes;
    ((store *)context)->calls++;
    if (end == NULL) {
        return size > MAX_LINE ? SIZE_MAX : 0;
    }
    if (strncmp(data, "set ", 4) != 0) {
        return (size_t)(end - data) + 1;
    }
    if (sscanf(data, "set %*s %lu", &bytes) != 1) {
        return SIZE_MAX;
    }
    return (size_t)(end - data) + 1 + bytes + 2; /* the line, the value and its end */
}

static int execute(tsrv_stream *stream, store *s, const tsrv_slice *request)
{
    const char *value = strchr(request->data, '\n') + 1;
    char key[MAX_LINE];
    if (strncmp(request->data, "set ", 4) == 0) {
        sscanf(request->data, "set %249s %d", s->key, &s->size);
        memcpy(s->value, value, (size_t)s->size);
        return tsrv_printf(stream, "STORED\r\n");
    }
    if (sscanf(request->data, "get %249s", key) == 1) {
        if (strcmp(key, s->key) == 0) {
            tsrv_printf(stream, "VALUE %s %d\r\n%.*s\r\n", key, s->size, s->size, s->value);
        }
        return tsrv_printf(stream, "END\r\n");
    }
    return strncmp(request->data, "quit", 4) == 0 ? 1 : tsrv_printf(stream, "ERROR\r\n");
}

static int memcached(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    store *s = (store *)context;
    tsrv_slice request;
    int rc;
    (void)address;
    while ((rc = tsrv_read_until_match(stream, match_request, s, MAX_MESSAGE, &request)) == TSRV_OK &&
           (rc = execute(stream, s, &request)) == TSRV_OK) {
    }
    if (rc == TSRV_ETOOLONG) {
        tsrv_printf(stream, "SERVER_ERROR object too large for cache\r\n");
    }
    return rc;
}

static void ask(const char *request, const char *answer)
{
    int fd = t_connect(s_port);
    s_send(fd, request, strlen(request));
    s_expect(fd, answer);
    s_leave(fd);
}

TEST_STREAM(row10_one_handler_for_both_modes)
{
    static store s;
    tsrv_server_options options = {0};
    char set[4600], answer[4600];
    options.handle_stream = memcached;
    options.on_close = t_record_reason;
    options.context = &s;
    s_open(options);
    ask("set k 5\r\nhello\r\nget k\r\nget other\r\nwhat\r\nquit\r\nget k\r\n",
        "STORED\r\nVALUE k 5\r\nhello\r\nEND\r\nEND\r\nERROR\r\n");

    /* Asked once for the line and once for the value, however it arrives. */
    s.calls = 0;
    snprintf(set, sizeof set, "set k 4000\r\n%04000d\r\nquit\r\n", 7);
    ask(set, "STORED\r\n");
    CHECK(s.calls <= (int)strlen("set k 4000\r\n") + 1 + (int)strlen("quit\r\n"));
    snprintf(answer, sizeof answer, "VALUE k 4000\r\n%04000d\r\nEND\r\n", 7);
    ask("get k\r\nquit\r\n", answer);

    /* Refused before it is sent; malformed; a line that is too long. */
    ask("set k 9999999\r\n", "SERVER_ERROR object too large for cache\r\n");
    ask("set k x\r\n", "SERVER_ERROR object too large for cache\r\n");
    snprintf(set, sizeof set, "%0300d", 1);
    ask(set, "SERVER_ERROR object too large for cache\r\n");
    s_settle();
    CHECK_INT(t_recorded(0), 1);
    CHECK_INT(t_recorded(t_record_count() - 1), TSRV_ETOOLONG);
    s_close();
}

/* ---- one byte at a time --------------------------------------------------------------------*/

enum { LIMIT_MS = 300, STEP_MS = 50 };

/* Reads lines until one takes too long. */
static int read_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *begun = (bool *)tsrv_data(stream);
    int rc;
    (void)address;
    if (!*begun && *(const char *)context == 'd') {
        tsrv_set_deadline(stream, LIMIT_MS);
    } else if (!*begun && *(const char *)context == 's') {
        tsrv_set_timeout(stream, LIMIT_MS, 0);
    }
    *begun = true;
    while ((rc = tsrv_read_until(stream, "\n", 0, NULL)) == TSRV_OK) {
    }
    return rc;
}

/* Sends a byte every STEP_MS until the server ends the connection, or limit bytes. Returns when it did, counted from
 * the first byte that counts, of those that are sent. */
static int64_t trickle(const char *kind, tsrv_server_options options, const char *bytes, int limit, int counts)
{
    char context[2] = {kind[0], 0};
    int64_t start = 0;
    int sent = 0;
    options.data_size = sizeof(bool);
    options.context = context;
    s_open_with(read_lines, options);
    int fd = s_join();
    s_settle();
    while (s_closed == 0) {
        if (sent < limit) {
            t_send(fd, &bytes[sent % (int)strlen(bytes)], 1);
            start = sent <= counts ? v_ms() : start;
            sent++;
        }
        s_run_ms(STEP_MS);
    }
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    s_leave(fd);
    s_close();
    return s_closed_ms - start;
}

/* Slow clients hold a connection for ever where each byte starts the time again. */
static void expect_the_limit(const char *kind, tsrv_server_options options, const char *bytes)
{
    int64_t took = trickle(kind, options, bytes, 1000, 0);
    CHECK_LEAST(took, LIMIT_MS - STEP_MS); /* which began when it was accepted */
    CHECK_MOST(took, LIMIT_MS + STEP_MS);
}

TEST_STREAM(a_trickle_ends_at_the_read_timeout)
{
    tsrv_server_options options = {0};
    options.read_timeout_ms = LIMIT_MS;
    expect_the_limit("server's", options, "x");
}

TEST_STREAM(a_trickle_ends_at_the_streams_timeout)
{
    tsrv_server_options options = {0};
    expect_the_limit("stream's", options, "x");
}

TEST_STREAM(a_trickle_of_lines_ends_at_the_deadline)
{
    tsrv_server_options options = {0};
    expect_the_limit("deadline", options, "x\n");
}

/* Waits until the deadline, behind which there is a line. */
static int outlive_a_deadline(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *at = (int *)tsrv_data(stream);
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    if (*at == 0) {
        *at = 1;
        tsrv_set_deadline(stream, LIMIT_MS);
    }
    if (*at == 1 && (rc = tsrv_wait(stream, TSRV_NEVER)) == TSRV_ETIMEOUT) {
        CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_ETIMEOUT);
        CHECK_INT(tsrv_read_bytes(stream, 1, &line), TSRV_ETIMEOUT);
        tsrv_set_deadline(stream, 0);
        *at = 2;
    } else if (*at == 1) {
        return rc;
    }
    if ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        tsrv_write(stream, line.data, line.size);
    }
    return rc;
}

TEST_STREAM(what_is_there_is_not_read_behind_the_deadline)
{
    tsrv_server_options options = {0};
    options.data_size = sizeof(int);
    s_open_with(outlive_a_deadline, options);
    int fd = s_join();
    s_settle();
    t_sends(fd, "late\n");
    s_run_ms(LIMIT_MS + STEP_MS);
    s_expect_bytes(fd, "late\n", 5);
    s_leave(fd);
    s_close();
}

/* Outlives it with a line unread, and ends for it. */
static int end_at_a_deadline(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *begun = (bool *)tsrv_data(stream);
    tsrv_slice line;
    int rc = *begun ? (int)TSRV_OK : tsrv_read_until(stream, "\n", 0, &line);
    (void)address, (void)context;
    if (rc == TSRV_OK && !*begun) {
        tsrv_set_deadline(stream, LIMIT_MS);
        *begun = true;
    }
    if (rc == TSRV_OK && (rc = tsrv_wait(stream, TSRV_NEVER)) == TSRV_ETIMEOUT) {
        CHECK_LEAST(tsrv_unread_size(stream), 4);
        CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_ETIMEOUT);
    }
    return rc;
}

/* Who is ahead at the deadline may send more: the socket lingers, as that would be answered with a reset. */
TEST_PLAIN_SOFT(who_is_ahead_at_the_deadline_is_not_silent)
{
    tsrv_server_options options = {0};
    options.data_size = sizeof(bool);
    s_open_with(end_at_a_deadline, options);
    int fd = s_join();
    t_sends(fd, "one\ntwo\n");
    s_settle();
    s_run_ms(LIMIT_MS + STEP_MS);
    s_expect_eof(fd);
    s_settle();
    CHECK_INT(s_stats().open, 1);
    t_sends(fd, "three\n");
    s_settle();
    CHECK_INT(s_stats().open, 1);
    t_close(fd);
    s_settle();
    CHECK_INT(s_stats().open, 0);
    s_close();
}

/* Here the first nine bytes do start it again, and the end comes once there are no more. */
TEST_STREAM(a_trickle_keeps_the_idle_time_away_but_silence_does_not)
{
    tsrv_server_options options = {0};
    options.idle_timeout_ms = LIMIT_MS;
    int64_t took = trickle("idle", options, "x", 9, 8);
    CHECK_LEAST(took, LIMIT_MS);
    CHECK_MOST(took, LIMIT_MS + STEP_MS);
}

static int read_one_line(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    return tsrv_read_until(stream, "\n", 0, NULL);
}

/* Only `open` tells of it. */
TEST_SOFT(who_says_nothing_stays_where_no_time_is_set)
{
    int fds[3];
    s_serve(read_one_line);
    for (int i = 0; i < 3; i++) {
        fds[i] = s_join();
        s_settle();
        v_now += 24 * (uint64_t)3600 * 1000000000u;
        s_settle();
        CHECK_INT(s_stats().open, i + 1);
    }
    CHECK_INT(s_closed, 0);
    t_close_all(fds, 3);
    s_close();
}

/* A line, then so much work that it lasts longer than the idle time, and another line. */
static int work_between_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *worked = (bool *)tsrv_data(stream);
    tsrv_slice line;
    int rc = *worked ? (int)TSRV_OK : tsrv_read_until(stream, "\n", 0, &line);
    (void)address, (void)context;
    if (rc == TSRV_OK && !*worked) {
        *worked = true;
        v_now += 2 * LIMIT_MS * 1000000u;
    }
    return rc == TSRV_OK ? tsrv_read_until(stream, "\n", 0, &line) : rc;
}

/* A peer is idle while it is waited for, and not while the handler works. */
TEST_SOFT(idle_time_begins_with_the_read)
{
    tsrv_server_options options = {0};
    options.data_size = sizeof(bool);
    options.idle_timeout_ms = LIMIT_MS;
    s_open_with(work_between_lines, options);
    int fd = s_join();
    t_sends(fd, "one\n");
    s_run_ms(2 * LIMIT_MS + LIMIT_MS / 2);
    CHECK_INT(s_closed, 0);
    t_sends(fd, "two\n");
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_OK);
    t_close(fd);
    s_close();
}

/* ---- after a pause -------------------------------------------------------------------------*/

static int lines_in_time, lines_late;
static bool greets, wakes;
static char filler[1 << 16];

/* Reads a line, and then writes to all, or wakes them. */
static int tell_all(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    (void)address, (void)context;
    if (rc == TSRV_EAGAIN) {
        tsrv_wait(stream, TSRV_NEVER); /* in callback mode it may be woken, too */
        return rc;
    }
    lines_late += rc == TSRV_ETIMEOUT;
    lines_in_time += rc == TSRV_OK;
    for (tsrv_stream *s = NULL; (s = tsrv_server_next(s_server, s)) != NULL;) {
        if (greets) {
            CHECK_INT(tsrv_try_write(s, "hello\n", 6), TSRV_OK);
        }
        if (wakes) {
            tsrv_wake(s);
        }
    }
    return rc;
}

/* All lines have come when the process goes on: nobody's read is timed out for the pause, however many there are, and
 * whatever is done to the streams before they are looked at. */
TEST_PLAIN_SOFT(lines_that_have_come_in_a_pause_are_read)
{
    enum { CLIENTS = 300 };
    for (int way = 0; way < 5; way++) {
        static int fds[CLIENTS][2];
        tsrv_server_options options = {0};
        const bool fills = way == 4; /* then each may be read and be written to again, which can be two events */
        lines_in_time = lines_late = 0;
        greets = (way & 1) != 0;
        wakes = (way & 2) != 0;
        options.read_timeout_ms = LIMIT_MS;
        s_open_with(tell_all, options);
        for (int i = 0; i < CLIENTS; i++) {
            CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds[i]) == 0);
            CHECK_INT(tsrv_server_add_stream(s_server, fds[i][0]), TSRV_OK);
        }
        s_settle();
        for (tsrv_stream *s = NULL; fills && (s = tsrv_server_next(s_server, s)) != NULL;) {
            int room = 4096;
            CHECK(setsockopt(tsrv_fd(s), SOL_SOCKET, SO_SNDBUF, &room, sizeof room) == 0);
            CHECK_INT(tsrv_try_write(s, filler, sizeof filler), TSRV_OK);
        }
        s_settle();
        for (int i = 0; i < CLIENTS; i++) {
            CHECK(!fills || recv(fds[i][1], filler, sizeof filler, MSG_DONTWAIT) > 0);
            t_sends(fds[i][1], "x\n");
        }
        v_now += 5 * LIMIT_MS * 1000000u;
        s_settle();
        CHECK_INT(lines_late, 0);
        CHECK_INT(lines_in_time, CLIENTS);
        for (int i = 0; i < CLIENTS; i++) {
            t_close(fds[i][1]);
        }
        s_until(&s_closed, CLIENTS);
        s_close();
    }
}

/* ---- a line without an end -----------------------------------------------------------------*/

enum { LONGEST = 1000, SHORT_BUFFER = 16 << 10 };

static int complain_and_drop(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *dropping = (bool *)tsrv_data(stream);
    tsrv_slice line;
    int rc;
    (void)address;
    (void)context;
    for (;;) {
        rc = tsrv_read_until(stream, "\n", LONGEST, *dropping ? NULL : &line);
        if (rc == TSRV_ETOOLONG) {
            CHECK(!*dropping);
            *dropping = true;
            tsrv_write(stream, "500\n", 4);
        } else if (rc != TSRV_OK) {
            return rc;
        } else {
            if (!*dropping) {
                tsrv_write(stream, line.data, line.size);
            }
            *dropping = false;
        }
    }
}

/* The complaint comes while the line still goes on. */
static void endless_client(int port, void *context)
{
    static char part[65536];
    size_t size = bulk(8 << 20, 64 << 10);
    int fd = t_connect(port);
    (void)context;
    memset(part, 'x', sizeof part);
    round_trip(fd);
    t_on_loop(nothing, NULL);
    long before = m_forget();
    for (int round = 0; round < 3; round++) {
        t_send(fd, part, LONGEST + 1);
        t_expect(fd, "500\n");
        for (size_t sent = 0; sent < size; sent += sizeof part) {
            t_send(fd, part, sizeof part);
        }
        t_sends(fd, "\nhello\n");
        t_expect(fd, "hello\n");
        round_trip(fd);
    }
    printf("memory grew by %ld bytes\n", m_grown_since(before));
    CHECK(m_grown_since(before) <= 2 * SHORT_BUFFER);
    t_shut(fd);
    expect_clean_end(fd);
    t_close(fd);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), TSRV_EOF);
}

TEST_STREAM(an_endless_line_is_answered_and_dropped)
{
    t_case c = {.handler = complain_and_drop, .on_close = t_record_reason, .client = endless_client};
    c.options.data_size = sizeof(bool);
    c.options.max_buffer_size = SHORT_BUFFER;
    c.options.read_chunk_size = bulk(4096, 1);
    t_run(&c);
}

/* A handler that has read nothing may have more unread than max_buffer_size, and a line among it that is longer,
 * though its end is near. */
static int look_first(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    (void)address, (void)context;
    if (tsrv_unread_size(stream) < 10) {
        return TSRV_EAGAIN;
    }
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &slice), TSRV_ETOOLONG);
    CHECK_INT(tsrv_read_until(stream, "\n", 9, &slice), TSRV_ETOOLONG);
    CHECK_INT(tsrv_read_bytes(stream, 7, &slice), TSRV_OK);
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &slice), TSRV_OK);
    CHECK_MEM(slice.data, slice.size, "89\n", 3);
    return 0;
}

T_TEST(a_short_line_may_be_too_long, T_PER_BACKEND | T_CALLBACKS)
{
    tsrv_server_options options = {0};
    options.max_buffer_size = 8;
    s_open_with(look_first, options);
    int fd = s_join();
    s_send(fd, "1234567", 7);
    s_settle();
    s_send(fd, "89\n", 3);
    s_finish(fd);
    CHECK_INT(s_reason, 0);
    s_close();
}

/* ---- large messages ------------------------------------------------------------------------*/

static void echo_large(int fd)
{
    s_send(fd, large, large_size);
    s_expect_bytes(fd, large, large_size);
}

/* A read that says how much it needs has room made for that at once, though the buffer for it is new. */
static int read_count(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_bytes(stream, large_size, &slice)) == TSRV_OK) {
        CHECK_MEM(slice.data, slice.size, large, large_size);
        tsrv_write(stream, "ok", 2);
    }
    return rc;
}

TEST_SOFT(read_bytes_makes_room_once)
{
    tsrv_server_options options = {0};
    make_large(1000000);
    s_open_with(read_count, options);
    int fd = s_join();
    s_settle();
    s_send(fd, large, 1);
    s_settle(); /* the loop's own buffer is there */
    count_calls("malloc", "realloc");
    s_send(fd, large + 1, large_size - 1);
    s_expect(fd, "ok");
    CHECK_MOST(calls_counted, 3); /* for the message, for the answer, and for what the kernel has cut off first */
    s_finish(fd);
    s_close();
    free(large);
}

/* After the first few, and when there are none for a while the memory is given back. */
TEST_SOFT(large_messages_allocate_nothing)
{
    tsrv_server_options options = {0};
    int fds[2];
    make_large((1 << 20) - 1);
    large[large_size - 1] = '\n';
    s_open_with(echo_lines, options);
    for (int i = 0; i < 2; i++) {
        fds[i] = s_join();
    }
    for (int i = 0; i < 4; i++) {
        echo_large(fds[i % 2]);
    }
    s_settle();
    count_calls("malloc", "realloc");
    for (int i = 0; i < 6; i++) {
        echo_large(fds[i % 2]);
    }
    CHECK_INT(calls_counted, 0);
    CHECK(s_loop->streams.pool.large_size >= large_size);
    s_run_ms(2500);
    CHECK_INT(s_loop->streams.pool.large_size, 0);
    echo_large(fds[0]);
    for (int i = 0; i < 2; i++) {
        s_finish(fds[i]);
    }
    s_close();
    free(large);
}

/* ---- a request that comes too late for a drain ---------------------------------------------*/

enum { T_UNTIL, T_SOME, T_BYTES, T_MATCH, T_INTO, T_DROP, T_LATE_READS };
static int late_kind, late_code, late_done, late_answers, late_left;
static tsrv_slice late_slice;
static char late_memory[4];

static int read_request(tsrv_stream *stream, tsrv_slice *slice)
{
    switch (late_kind) {
    case T_UNTIL: return tsrv_read_until(stream, "\n", 0, slice);
    case T_SOME: return tsrv_read_some(stream, 4, slice);
    case T_BYTES: return tsrv_read_bytes(stream, 4, slice);
    case T_MATCH: return tsrv_read_until_match(stream, match_line, NULL, 0, slice);
    case T_INTO: return tsrv_read_into(stream, late_memory, 4);
    default: return tsrv_read_bytes(stream, 4, NULL);
    }
}

/* Answers each request; of the read that fails, everything is looked at. */
static int serve_until_stopped(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice = {"", 0};
    char in_kernel[16];
    int rc;
    (void)address, (void)context;
    while ((rc = read_request(stream, &slice)) == TSRV_OK) {
        late_answers++;
        tsrv_write(stream, "ok\n", 3);
    }
    if (rc != TSRV_EAGAIN) {
        ssize_t n = recv(tsrv_fd(stream), in_kernel, sizeof in_kernel, MSG_PEEK | MSG_DONTWAIT);
        late_left = (int)tsrv_unread_size(stream) + (n > 0 ? (int)n : 0);
        late_code = rc;
        late_slice = slice;
        late_done = 1;
    }
    return rc;
}

static void check_late_request(int which)
{
    late_kind = which;
    late_done = late_answers = 0;
    s_serve(serve_until_stopped);
    int fd = s_join();
    if (which == T_SOME && t_hard) { /* each byte is a request */
        t_sends(fd, "a");
    } else {
        t_sends(fd, "one\n");
    }
    s_expect(fd, "ok\n");
    s_settle();
    int answers = late_answers;
    s_run_ms(1500); /* now it is idle */
    /* The reader is told of the end, and before it runs the request is there. */
    CHECK_INT(tsrv_server_drain(s_server, 1000), TSRV_EAGAIN);
    t_sends(fd, "two\n");
    s_until(&late_done, 1);
    CHECK_INT(late_code, TSRV_EOF);
    CHECK_INT(late_answers, answers);
    CHECK_INT(late_slice.size, 0);
    CHECK_INT(late_left, 4);
    s_leave(fd);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_EOF);
    s_close();
}

TEST_STREAM(a_request_after_the_drains_end_is_not_taken)
{
    for (int which = 0; which < T_LATE_READS; which++) {
        check_late_request(which);
    }
}

/* ---- slices are the program's until the next read ------------------------------------------*/

/* Answers each line in capitals, which it makes where the line lies; what is behind it is still to be read. */
static int shout(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        char *text = (char *)(uintptr_t)line.data;
        for (size_t i = 0; i < line.size; i++) {
            text[i] = (char)(text[i] >= 'a' && text[i] <= 'z' ? text[i] - 32 : text[i]);
        }
        if (line.size > 1 && t_mode == TSRV_COROUTINE) {
            tsrv_sleep(1); /* others receive meanwhile */
        }
        tsrv_write(stream, line.data, line.size);
    }
    return rc;
}

TEST_STREAM(slices_may_be_changed_in_place)
{
    enum { CLIENTS = 3 };
    int fds[CLIENTS];
    s_serve(shout);
    for (int i = 0; i < CLIENTS; i++) {
        fds[i] = s_join();
        t_sends(fds[i], "one\ntwo\n\nthr"); /* the terminator stands where the next line begins */
    }
    for (int i = 0; i < CLIENTS; i++) {
        s_expect(fds[i], "ONE\nTWO\n\n");
        t_sends(fds[i], "ee\nfour\n");
        s_expect(fds[i], "THREE\nFOUR\n");
        s_finish(fds[i]);
    }
    s_close();
}

/* ---- a read that fails has an empty slice ----------------------------------------------------*/

enum { FRESH_LINE, FRESH_WIDE, FRESH_MATCH, FRESH_BYTES, FRESH_CLOSE, FRESH_SOME, FRESH_READS };
enum { NOTHING_CAME, A_PART_CAME, INPUT_ENDED, CLOSED_HERE, WAYS };

static int reading, fresh_codes[WAYS];

/* What was in the slice before is not seen again, TSRV_EAGAIN included. */
static int read_afresh(tsrv_stream *stream)
{
    tsrv_slice slice = {"old", 3};
    int rc = reading == FRESH_LINE    ? tsrv_read_until(stream, "\n", 0, &slice)
             : reading == FRESH_WIDE  ? tsrv_read_until(stream, "\r\n", 0, &slice)
             : reading == FRESH_MATCH ? tsrv_read_until_match(stream, match_none, NULL, 0, &slice)
             : reading == FRESH_BYTES ? tsrv_read_bytes(stream, 5, &slice)
             : reading == FRESH_CLOSE ? tsrv_read_until_close(stream, 0, &slice)
                                      : tsrv_read_some(stream, 0, &slice);
    if (rc != TSRV_OK) {
        CHECK_STR(slice.data, "");
        CHECK_INT(slice.size, 0);
    }
    return rc;
}

static int fail_in_all_ways(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    while (step < WAYS) {
        int rc = read_afresh(stream);
        if (rc == TSRV_EAGAIN) {
            return rc;
        }
        fresh_codes[step++] = rc;
        if (step == INPUT_ENDED) {
            tsrv_set_timeout(stream, TSRV_NEVER, 0);
        } else if (step == CLOSED_HERE) {
            tsrv_close(stream);
        }
    }
    return TSRV_OK;
}

TEST_STREAM(a_read_that_fails_has_an_empty_slice)
{
    for (reading = 0; reading < FRESH_READS; reading++) {
        tsrv_server_options options = {0};
        options.read_timeout_ms = 100;
        step = 0;
        s_open_with(fail_in_all_ways, options);
        int fd = s_join();
        s_settle();
        CHECK_INT(read_afresh(tsrv_server_next(s_server, NULL)), TSRV_EBUSY);
        s_until(&step, A_PART_CAME);
        t_sends(fd, "a");
        s_until(&step, INPUT_ENDED);
        t_shut(fd);
        s_until(&step, WAYS);
        CHECK_INT(fresh_codes[NOTHING_CAME], TSRV_ETIMEOUT);
        CHECK_INT(fresh_codes[A_PART_CAME], reading == FRESH_SOME ? TSRV_OK : TSRV_ETIMEOUT);
        CHECK_INT(fresh_codes[INPUT_ENDED], reading == FRESH_CLOSE ? TSRV_OK : TSRV_EOF);
        CHECK_INT(fresh_codes[CLOSED_HERE], TSRV_ECLOSED);
        s_leave(fd);
        s_close();
    }
}

/* ---- a read of too many bytes is one -----------------------------------------------------------*/

static int refusals, enough;

/* Each of its calls is refused at once; every few hundred of them others run first. */
static int read_too_much(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc = TSRV_ETOOLONG;
    (void)address, (void)context;
    while (!enough && (rc = tsrv_read_bytes(stream, SIZE_MAX, &slice)) == TSRV_ETOOLONG) {
        refusals++;
    }
    return rc == TSRV_ETOOLONG ? TSRV_OK : rc;
}

/* Nobody else may read while it lets them run. */
TEST_STREAM(a_read_of_too_many_bytes_that_lets_others_run_is_a_read)
{
    tsrv_slice slice;
    tsrv_set_log(t_no_log, NULL);
    refusals = enough = 0;
    s_serve(read_too_much);
    int fd = s_join();
    s_until(&refusals, 1);
    for (int i = 0; i < 3; i++) {
        int before = refusals;
        CHECK_INT(tsrv_read_some(tsrv_server_next(s_server, NULL), 0, &slice), TSRV_EBUSY);
        s_turn();
        CHECK(refusals > before);
    }
    enough = 1;
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_OK);
    t_close(fd);
    s_close();
}

/* ---- tsrv_read_into, repeated as another call ------------------------------------------------*/

static char whole[8], elsewhere[8];
static int wrong[6];
static bool keeping_fails;

/* Its first call has taken a part, so that another one cannot take its place; the same one goes on. */
static int read_into_and_others(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc;
    (void)address, (void)context;
    if (step++ > 0 && wrong[0] == 0) {
        wrong[0] = tsrv_read_into(stream, elsewhere, sizeof whole);
        wrong[1] = tsrv_read_into(stream, whole, sizeof whole - 1);
        wrong[2] = tsrv_read_until(stream, "\n", 0, &slice);
        wrong[3] = tsrv_read_some(stream, 0, &slice);
        wrong[4] = tsrv_read_until_match(stream, match_ten, NULL, 0, &slice);
        wrong[5] = tsrv_read_until_match(stream, match_ten, NULL, 0, NULL);
    }
    if (keeping_fails) {
        t_fail_call("malloc", 0, 1, false);
    }
    rc = tsrv_read_into(stream, whole, sizeof whole);
    t_fault_at = 0;
    if (rc == TSRV_EAGAIN) {
        return rc;
    }
    return rc < 0 ? rc : tsrv_write(stream, whole, sizeof whole);
}

TEST_CALLBACK(another_call_does_not_take_the_place_of_a_read_into)
{
    memset(elsewhere, 0, sizeof elsewhere);
    memset(wrong, 0, sizeof wrong);
    step = 0;
    tsrv_set_log(t_no_log, NULL);
    s_serve(read_into_and_others);
    int fd = s_join();
    t_sends(fd, "012");
    s_settle();
    t_sends(fd, "34");
    s_settle();
    t_sends(fd, "567");
    s_expect(fd, "01234567");
    for (int i = 0; i < 6; i++) {
        CHECK_INT(wrong[i], TSRV_EINVAL);
    }
    CHECK_INT(elsewhere[0], 0);
    s_finish(fd);
    s_close();
}

/* Without memory for what it has done so far the stream ends: bytes are never lost in silence. */
TEST_CALLBACK(a_read_into_that_cannot_be_kept_ends_the_stream)
{
    step = 0;
    keeping_fails = true;
    t_watch_log();
    s_serve(read_into_and_others);
    int fd = s_join();
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, -ENOMEM);
    CHECK_INT(step, 1);
    t_close(fd);
    s_close();
}

/* A match that reads is a mistake, and a code; nothing is lost but what it has read. */
static size_t match_that_reads(const char *data, size_t size, void *context)
{
    tsrv_slice slice;
    (void)data;
    tsrv_read_some((tsrv_stream *)context, 1, &slice);
    return size;
}

static int have_the_match_read(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    (void)address, (void)context;
    int rc = tsrv_read_until_match(stream, match_that_reads, stream, 0, &slice);
    if (rc == TSRV_EAGAIN) {
        return rc;
    }
    CHECK_INT(rc, TSRV_EBUSY);
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &slice), TSRV_OK);
    CHECK_MEM(slice.data, slice.size, "ine\n", 4);
    return TSRV_OK;
}

T_TEST(a_match_that_reads_is_a_code, T_PER_BACKEND | T_CALLBACKS)
{
    s_serve(have_the_match_read);
    int fd = s_join();
    t_sends(fd, "line\n");
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_OK);
    t_close(fd);
    s_close();
}

/* Nothing can wait in a match, also where its bytes are there already and a coroutine has called the read. */
static size_t match_that_waits(const char *data, size_t size, void *context)
{
    const char *end = (const char *)memchr(data, '\n', size);
    CHECK_INT(tsrv_sleep(0), TSRV_EINVAL);
    CHECK_INT(tsrv_wait((tsrv_stream *)context, TSRV_NEVER), TSRV_EAGAIN);
    CHECK_INT(((tsrv_stream *)context)->own.kinds, 0); /* nor is a wait noted for the handler */
    step++;
    if (step == 3) {
        CHECK_INT(tsrv_abort((tsrv_stream *)context), TSRV_OK);
    }
    return end == NULL ? 0 : (size_t)(end - data) + 1;
}

static int have_the_match_wait(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until_match(stream, match_that_waits, stream, 0, &slice)) == TSRV_OK) {
        CHECK_MEM(slice.data, slice.size, "line\n", 5);
        CHECK(step < 3); /* when it has ended the stream */
    }
    CHECK(rc == TSRV_EAGAIN || (rc == TSRV_ECLOSED && step == 3));
    return rc;
}

TEST_STREAM(a_match_cannot_wait)
{
    step = 0;
    tsrv_set_log(t_no_log, NULL);
    s_serve(have_the_match_wait);
    int fd = s_join();
    t_sends(fd, "line\nline\nline\n");
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_ECLOSED);
    CHECK_INT(step, 3);
    t_close(fd);
    s_close();
}

/* ---- what a read into memory gives back -----------------------------------------------------*/

enum { BACK = 20000 }; /* bytes that it has got: as many as the buffer's limit */

static int back_codes[3], back_step;

/* A read into memory times out; what it has got can be read by others, up to the limit and not beyond. */
static int read_what_is_given_back(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char memory[BACK + 1000];
    tsrv_slice slice;
    (void)address, (void)context;
    while (back_step < 3) {
        int rc = back_step == 0   ? tsrv_read_into(stream, memory, sizeof memory)
                 : back_step == 1 ? tsrv_read_until_match(stream, match_none, NULL, 0, &slice)
                                  : tsrv_read_bytes(stream, BACK, &slice);
        if (rc == TSRV_EAGAIN) {
            return rc;
        }
        back_codes[back_step++] = rc;
        tsrv_set_timeout(stream, TSRV_NEVER, 0);
    }
    return tsrv_write(stream, slice.data, slice.size);
}

TEST_STREAM(what_a_read_into_gives_back_can_be_as_much_as_the_limit)
{
    tsrv_server_options options = {0};
    char *data = new_pattern(BACK);
    options.read_timeout_ms = 100;
    options.max_buffer_size = BACK;
    back_step = 0;
    s_open_with(read_what_is_given_back, options);
    int fd = s_join();
    s_send(fd, data, BACK);
    s_until(&back_step, 1);
    s_run_ms(100);
    CHECK_INT(back_step, 1);
    t_sends(fd, "x");
    s_expect_bytes(fd, data, BACK);
    CHECK_INT(back_codes[0], TSRV_ETIMEOUT);
    CHECK_INT(back_codes[1], TSRV_ETOOLONG);
    CHECK_INT(back_codes[2], TSRV_OK);
    t_close(fd);
    s_until(&s_closed, 1);
    s_close();
    free(data);
}

/* Without memory to give it back in the stream ends: bytes are never lost in silence. */
TEST_SOFT(a_read_into_that_cannot_give_back_ends_the_stream)
{
    tsrv_server_options options = {0};
    char *data = new_pattern(BACK);
    options.read_timeout_ms = 100;
    options.max_buffer_size = BACK;
    back_step = 0;
    s_open_with(read_what_is_given_back, options);
    tsrv_set_log(t_no_log, NULL);
    int fd = s_join();
    s_send(fd, data, BACK);
    s_settle();
    t_fail_call("malloc", 0, 1, true);
    s_until(&s_closed, 1);
    t_fault_at = 0;
    CHECK(t_fault_hits > 0);
    CHECK_INT(back_codes[0], TSRV_ETIMEOUT);
    CHECK_INT(back_codes[1], -ENOMEM);
    CHECK_INT(s_reason, -ENOMEM);
    t_close(fd);
    s_close();
    free(data);
}

/* Two reads in vain, and one of what there is. */
static int read_behind_the_end(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char memory[8];
    tsrv_slice slice;
    (void)address, (void)context;
    int rc = tsrv_read_bytes(stream, 100, &slice);
    if (rc == TSRV_EAGAIN) {
        return rc;
    }
    CHECK_INT(rc, TSRV_EOF);
    CHECK_INT(tsrv_read_into(stream, memory, sizeof memory), TSRV_EOF);
    CHECK_INT(tsrv_read_some(stream, 0, &slice), TSRV_OK);
    return tsrv_write(stream, slice.data, slice.size);
}

TEST_STREAM(a_read_into_gives_back_what_others_had_left)
{
    s_serve(read_behind_the_end);
    int fd = s_join();
    t_sends(fd, "ab");
    t_shut(fd);
    s_expect(fd, "ab");
    s_leave(fd);
    s_close();
}

/* ---- reads beside others ---------------------------------------------------------------------*/

static int beside_rc;

static int sleep_a_while(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    return tsrv_sleep(100);
}

/* While a handler sleeps nobody reads its stream: it can be read from outside. */
TEST_SCRIPT(a_stream_whose_handler_sleeps_can_be_read)
{
    tsrv_slice slice;
    s_serve(sleep_a_while);
    int fd = s_join();
    s_settle();
    t_sends(fd, "ab");
    CHECK_INT(tsrv_read_some(tsrv_server_next(s_server, NULL), 0, &slice), TSRV_OK);
    CHECK_MEM(slice.data, slice.size, "ab", 2);
    s_until(&s_closed, 1);
    t_close(fd);
    s_close();
}

static void read_beside(void *context)
{
    tsrv_slice slice;
    beside_rc = tsrv_read_some((tsrv_stream *)context, 0, &slice);
}

static void wait_for_it(void *context)
{
    CHECK_INT(tsrv_wait((tsrv_stream *)context, TSRV_NEVER), TSRV_OK);
}

/* Reads too much until the others run first. */
static int read_too_much_at_once(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc, most = 100000;
    (void)address, (void)context;
    if (step == 0 && (rc = tsrv_read_until(stream, "\n", 0, &slice)) != TSRV_OK) {
        return rc;
    }
    if (step++ == 0) {
        while ((rc = tsrv_read_bytes(stream, SIZE_MAX, &slice)) == TSRV_ETOOLONG && most > 0) {
            most--;
        }
        CHECK_INT(rc, TSRV_EAGAIN);
        CHECK_INT(tsrv_loop_post(s_loop, read_beside, stream), TSRV_OK);
        return rc;
    }
    CHECK_INT(tsrv_read_bytes(stream, SIZE_MAX, &slice), TSRV_ETOOLONG);
    tsrv_abort(stream);
    for (int i = 0; i < 100000; i++) {
        CHECK_INT(tsrv_read_bytes(stream, 0, &slice), TSRV_ECLOSED);
    }
    return TSRV_OK;
}

/* Nobody else reads meanwhile, whoever waits for something else; behind the end nothing waits any more. */
TEST_CALLBACK(a_read_of_too_much_that_waits_is_a_read)
{
    step = 0;
    beside_rc = 99;
    s_serve(read_too_much_at_once);
    tsrv_set_log(t_no_log, NULL);
    int fd = s_join();
    s_settle();
    CHECK_INT(tsrv_spawn(s_loop, wait_for_it, tsrv_server_next(s_server, NULL)), TSRV_OK);
    s_settle();
    t_sends(fd, "line\nmore");
    s_until(&s_closed, 1);
    CHECK_INT(beside_rc, TSRV_EBUSY);
    t_close(fd);
    s_close();
}

/* Has a part of a message, only waits when it is woken, and goes on when it is woken once more. */
static int pause_within_a_read(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char memory[4];
    int rc;
    (void)address, (void)context;
    if (step++ == 1) {
        CHECK_INT(tsrv_wait(stream, TSRV_NEVER), TSRV_OK);
        return tsrv_wait(stream, TSRV_NEVER);
    }
    rc = tsrv_read_into(stream, memory, sizeof memory);
    if (rc == TSRV_EAGAIN && step == 1) {
        return tsrv_wait(stream, TSRV_NEVER);
    }
    return rc == TSRV_OK ? tsrv_write(stream, memory, sizeof memory) : rc;
}

/* A part of it belongs to a read, also while that is not repeated: nobody else may read. */
TEST_CALLBACK(a_read_into_that_pauses_is_a_read)
{
    step = 0;
    beside_rc = 99;
    s_serve(pause_within_a_read);
    int fd = s_join();
    t_sends(fd, "ab");
    s_settle();
    tsrv_stream *stream = tsrv_server_next(s_server, NULL);
    tsrv_wake(stream);
    s_settle();
    CHECK_INT(step, 2);
    read_beside(stream);
    CHECK_INT(beside_rc, TSRV_EBUSY);
    t_sends(fd, "cd");
    s_settle();
    tsrv_wake(stream);
    s_expect(fd, "abcd");
    s_leave(fd);
    s_close();
}

/* Has a part of a message, waits for anything when it is woken, and goes on behind its deadline. */
static int give_up_within_a_read(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char memory[8];
    tsrv_slice all;
    (void)address, (void)context;
    if (step++ == 0) {
        tsrv_set_deadline(stream, LIMIT_MS);
        CHECK_INT(tsrv_read_into(stream, memory, sizeof memory), TSRV_EAGAIN);
        return tsrv_wait(stream, TSRV_NEVER);
    }
    if (step < 3 || tsrv_unread_size(stream) < 4) {
        return TSRV_EAGAIN; /* any input, which is not the read's */
    }
    CHECK_INT(tsrv_read_into(stream, memory, sizeof memory), TSRV_ETIMEOUT);
    tsrv_set_deadline(stream, 0);
    CHECK_INT(tsrv_read_bytes(stream, 7, &all), TSRV_OK);
    keep(message, &all);
    return TSRV_OK;
}

/* What it had, and what has come while it did not read, are unread again in their order. */
TEST_CALLBACK(a_read_into_that_is_given_up_gives_back_all_that_came)
{
    step = 0;
    s_serve(give_up_within_a_read);
    int fd = s_join();
    t_sends(fd, "abc");
    s_settle();
    tsrv_wake(tsrv_server_next(s_server, NULL));
    s_settle();
    CHECK_INT(step, 2);
    s_run_ms(2 * LIMIT_MS);
    t_sends(fd, "defg");
    s_until(&s_closed, 1);
    CHECK_STR(message, "abcdefg");
    t_close(fd);
    s_close();
}

/* ---- reads that time out ---------------------------------------------------------------------*/

/* An answer that nobody takes, and a read in vain. */
static int answer_and_time_out(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    if (step == 0) {
        limit_output(stream);
        CHECK_INT(tsrv_try_write(stream, large, large_size), TSRV_OK);
        step = 1;
    }
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc == TSRV_ETIMEOUT) {
        step = 2;
    }
    return rc;
}

/* Its peer is not taken for silent: what it still says does not destroy the answer. */
TEST_PLAIN_SOFT(a_read_that_times_out_behind_an_answer_keeps_it)
{
    tsrv_server_options options = {0};
    make_large(2 << 20);
    options.max_write_buffer_size = 2 * large_size;
    options.write_high_water = 2 * large_size;
    options.read_timeout_ms = 100;
    step = 0;
    s_open_with(answer_and_time_out, options);
    int fd = s_join_with_room(4096);
    s_until(&step, 2);
    t_sends(fd, "late\n");
    s_expect_bytes(fd, large, large_size);
    s_expect_eof(fd);
    t_close(fd);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    s_close();
    free(large);
}

/* Ten bytes, of which some do not come; then anything, behind its deadline. */
static int time_out_twice(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    (void)address, (void)context;
    CHECK_INT(tsrv_read_bytes(stream, 10, &slice), TSRV_ETIMEOUT);
    tsrv_set_deadline(stream, 50);
    CHECK_INT(tsrv_wait(stream, TSRV_NEVER), TSRV_ETIMEOUT);
    return tsrv_read_some(stream, 0, &slice);
}

/* Nothing has come since a read has waited in vain: its peer stays silent, and is not waited for. */
TEST_SCRIPT(who_was_silent_before_the_deadline_is_silent)
{
    tsrv_server_options options = {0};
    options.read_timeout_ms = 100;
    options.close_timeout_ms = 10000;
    s_open_with(time_out_twice, options);
    int fd = s_join();
    t_sends(fd, "abc");
    s_run_ms(1000);
    CHECK_INT(s_closed, 1);
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    s_expect_eof(fd);
    t_close(fd);
    s_close();
}

/* Its client speaks up when its read has just timed out. */
static int speak_late(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc == TSRV_ETIMEOUT) {
        t_sends(*(int *)context, "late\n");
    }
    return rc;
}

/* To close at once would be answered with a reset: it lingers. */
TEST_PLAIN_SOFT(who_speaks_up_when_the_time_is_over_gets_the_end)
{
    tsrv_server_options options = {0};
    int fd = -1;
    options.read_timeout_ms = 100;
    options.context = &fd;
    s_open_with(speak_late, options);
    fd = s_join();
    s_run_ms(1000);
    CHECK_INT(s_stats().open, 1);
    s_expect_eof(fd);
    t_close(fd);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    s_close();
}
