/* Reads, writes and ends of accepted streams: what Tornado's iostream_test.py checks, under its
 * names, and then what this library promises beyond it. */
#include "test.h"

#include "handlers.h"

/* ---- plays: a table of steps for the handler, a list of moves for the client ----------------
 *
 * The handler makes the calls in order and compares their results; in callback mode it returns
 * TSRV_EAGAIN and repeats the step. The client's moves are texts; their first letter says what:
 *   >text  send          .  wait until the server has received all that was sent
 *   <text  expect        =  expect the end of the server's output
 *   |  end our output    !  reset          ~  expect a reset
 *   c  have the loop close the stream      a  abort it      w  wake it
 * At its end the client expects the server's end, unless the connection is gone already. */

enum {
    OP_UNTIL, OP_MATCH, OP_BYTES, OP_SOME, OP_INTO, OP_UNTIL_CLOSE, OP_WRITE, OP_FLUSH, OP_SHUTDOWN,
    OP_TIMEOUT, OP_DEADLINE, OP_WAIT, OP_WAKE, OP_PAUSE, OP_RETURN
};

typedef struct call {
    int line;           /* for messages */
    int op;             /* OP_... */
    int code;           /* expected; for OP_RETURN what is returned, and on_close's reason */
    size_t size;        /* max_bytes, count or milliseconds */
    const char *text;   /* the delimiter, or what is written */
    const char *result; /* what is read; NULL = drop it */
    tsrv_match match;
} call;

#define UNTIL(text, max, code, result) {__LINE__, OP_UNTIL, code, max, text, result, NULL}
#define MATCH(match, max, code, result) {__LINE__, OP_MATCH, code, max, NULL, result, match}
#define BYTES(count, code, result) {__LINE__, OP_BYTES, code, count, NULL, result, NULL}
/* All of result, by as many reads of at most max bytes as it takes. */
#define SOME(max, code, result) {__LINE__, OP_SOME, code, max, NULL, result, NULL}
#define INTO(size, code, result) {__LINE__, OP_INTO, code, size, NULL, result, NULL}
#define UNTIL_CLOSE(max, code, result) {__LINE__, OP_UNTIL_CLOSE, code, max, NULL, result, NULL}
#define WRITE(text, code) {__LINE__, OP_WRITE, code, 0, text, NULL, NULL}
#define FLUSH(code) {__LINE__, OP_FLUSH, code, 0, NULL, NULL, NULL}
#define SHUTDOWN(code) {__LINE__, OP_SHUTDOWN, code, 0, NULL, NULL, NULL}
#define TIMEOUT(ms) {__LINE__, OP_TIMEOUT, TSRV_OK, ms, NULL, NULL, NULL}
#define DEADLINE(ms) {__LINE__, OP_DEADLINE, TSRV_OK, ms, NULL, NULL, NULL}
#define WAIT(ms, code) {__LINE__, OP_WAIT, code, ms, NULL, NULL, NULL}
#define WAKE() {__LINE__, OP_WAKE, TSRV_OK, 0, NULL, NULL, NULL}
/* Lets something arrive: the time or the stream's end is over, no matter which. */
#define PAUSE(ms) {__LINE__, OP_PAUSE, TSRV_OK, ms, NULL, NULL, NULL}
#define RETURN(code) {__LINE__, OP_RETURN, code, 0, NULL, NULL, NULL}

typedef struct play {
    const call *steps;
    const char *const *moves;
} play;

typedef struct play_state {
    int at;       /* the current step */
    size_t some;  /* bytes of the current OP_SOME that have been read */
    char into[64];
} play_state;

static int play_read(tsrv_stream *stream, play_state *state, const call *step, tsrv_slice *slice)
{
    tsrv_slice *wanted = step->result != NULL ? slice : NULL;
    int rc;
    switch (step->op) {
    case OP_UNTIL:
        return tsrv_read_until(stream, step->text, step->size, wanted);
    case OP_MATCH:
        return tsrv_read_until_match(stream, step->match, NULL, step->size, wanted);
    case OP_BYTES:
        return tsrv_read_bytes(stream, step->size, wanted);
    case OP_SOME:
        return tsrv_read_some(stream, step->size, wanted);
    case OP_UNTIL_CLOSE:
        return tsrv_read_until_close(stream, step->size, wanted);
    default:
        CHECK(step->op == OP_INTO && step->size < sizeof state->into);
        rc = tsrv_read_into(stream, state->into, step->size);
        state->into[step->size] = 0;
        slice->data = rc == TSRV_OK ? state->into : "";
        slice->size = rc == TSRV_OK ? step->size : 0;
        return rc;
    }
}

static int play_call(tsrv_stream *stream, const call *step)
{
    int rc;
    switch (step->op) {
    case OP_WRITE:
        return tsrv_write(stream, step->text, strlen(step->text));
    case OP_FLUSH:
        return tsrv_flush(stream);
    case OP_SHUTDOWN:
        return tsrv_shutdown(stream);
    case OP_TIMEOUT:
        tsrv_set_timeout(stream, (int)step->size, 0);
        return TSRV_OK;
    case OP_DEADLINE:
        tsrv_set_deadline(stream, (int)step->size);
        return TSRV_OK;
    case OP_WAKE:
        tsrv_wake(stream);
        return TSRV_OK;
    case OP_PAUSE:
        rc = tsrv_wait(stream, (int)step->size);
        return rc == TSRV_ETIMEOUT ? TSRV_OK : rc;
    default:
        CHECK(step->op == OP_WAIT);
        return tsrv_wait(stream, (int)step->size);
    }
}

/* True when the step is over; false when an OP_SOME has more to read. */
static bool play_compare(play_state *state, const call *step, int rc, const tsrv_slice *slice)
{
    const char *result = step->result;
    size_t size = result != NULL ? strlen(result) : 0;
    if (rc == step->code && result == NULL) {
        return true;
    }
    if (rc == step->code && rc == TSRV_OK && step->op == OP_SOME) {
        CHECK(slice->size > 0 && slice->size <= size - state->some);
        CHECK(step->size == 0 || slice->size <= step->size);
        result += state->some;
        state->some += slice->size;
        size = slice->size;
    }
    if (rc != step->code || slice->data == NULL || slice->size != size ||
        memcmp(slice->data, result, size) != 0) {
        fprintf(stderr, "%s:%d: this step:\n", __FILE__, step->line);
    }
    CHECK_INT(rc, step->code);
    CHECK(slice->data != NULL);
    CHECK_MEM(slice->data, slice->size, result, size);
    CHECK_INT(slice->data[slice->size], 0);
    return step->op != OP_SOME || rc != TSRV_OK || result[size] == 0;
}

static int play_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    const call *steps = ((const play *)context)->steps;
    play_state *state = (play_state *)tsrv_data(stream);
    (void)address;
    while (steps[state->at].op != OP_RETURN) {
        const call *step = &steps[state->at];
        tsrv_slice slice = {NULL, 0};
        int rc = step->op <= OP_UNTIL_CLOSE ? play_read(stream, state, step, &slice)
                                            : play_call(stream, step);
        if (rc == TSRV_EAGAIN && t_mode == TSRV_CALLBACK) {
            return rc;
        }
        if (play_compare(state, step, rc, &slice)) {
            state->at++;
            state->some = 0;
        }
    }
    return steps[state->at].code;
}

static void play_client(int port, void *context)
{
    int fd = t_connect(port);
    size_t sent = 0;
    for (const char *const *move = ((play *)context)->moves; *move != NULL; move++) {
        const char *text = *move + 1;
        switch (**move) {
        case '>':
            t_sends(fd, text);
            sent += strlen(text);
            break;
        case '<':
            t_expect(fd, text);
            break;
        case '.':
            wait_received(sent);
            break;
        case '=':
            t_expect_eof(fd);
            break;
        case '|':
            t_shut(fd);
            break;
        case '!':
            t_reset(fd);
            fd = -1;
            break;
        case '~':
            t_expect_reset(fd);
            t_close(fd);
            fd = -1;
            break;
        default:
            CHECK(**move == 'c' || **move == 'a' || **move == 'w');
            t_on_loop(**move == 'c' ? close_first : **move == 'a' ? abort_first : wake_first,
                      NULL);
        }
    }
    if (fd >= 0) {
        t_leave(fd);
    }
    t_wait_records(1);
}

static void play_run(const call *steps, const tsrv_server_options *options,
                     const char *const *moves)
{
    play p = {steps, moves};
    t_case c = {.handler = play_handler, .on_close = t_record_reason, .client = play_client,
                .context = &p};
    if (options != NULL) {
        c.options = *options;
    }
    c.options.data_size = sizeof(play_state);
    t_records_used = 0;
    t_run(&c);
    while (steps->op != OP_RETURN) {
        steps++;
    }
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), steps->code);
}

#define PLAY_WITH(options, steps, ...)                                                             \
    play_run(steps, options, (const char *const[]){__VA_ARGS__, NULL})
#define PLAY(steps, ...) PLAY_WITH(NULL, steps, __VA_ARGS__)

/* ---- Tornado: over a web server ------------------------------------------------------------*/

TEST_STREAM(test_connection_closed)
{
    static const call steps[] = {UNTIL("\n", 0, TSRV_OK, "hello\n"), BYTES(1, TSRV_EOF, ""),
                                 WRITE("bye", TSRV_OK), RETURN(0)};
    PLAY(steps, ">hello\n", "|", "<bye");
}

TEST_STREAM(test_read_until_close)
{
    static const call steps[] = {UNTIL("\r\n\r\n", 0, TSRV_OK, "PUT / HTTP/1.0\r\n\r\n"),
                                 UNTIL_CLOSE(0, TSRV_OK, "all of the body"),
                                 WRITE("done", TSRV_OK), RETURN(0)};
    PLAY(steps, ">PUT / HTTP/1.0\r\n\r\nall of ", ".", ">the body", "|", "<done");
}

TEST_STREAM(test_read_zero_bytes)
{
    static const call steps[] = {BYTES(0, TSRV_OK, ""), UNTIL("\n", 0, TSRV_OK, "line\n"),
                                 BYTES(0, TSRV_OK, ""), BYTES(3, TSRV_OK, "abc"),
                                 BYTES(0, TSRV_OK, ""), BYTES(2, TSRV_OK, "de"), RETURN(0)};
    PLAY(steps, ">line\nabcde");
}

TEST_STREAM(test_future_interface)
{
    static const call steps[] = {WRITE("HTTP/1.0 200 OK\r\n", TSRV_OK),
                                 UNTIL("\r\n\r\n", 0, TSRV_OK, "Content-Length: 12\r\n\r\n"),
                                 BYTES(12, TSRV_OK, "Hello, world"), RETURN(0)};
    PLAY(steps, "<HTTP/1.0 200 OK\r\n", ">Content-Length: 12\r\n\r\nHello,", ".", "> world");
}

TEST_STREAM(test_future_close_while_reading)
{
    static const call steps[] = {BYTES(1024, TSRV_EOF, ""), BYTES(3, TSRV_OK, "abc"),
                                 BYTES(1, TSRV_EOF, ""), RETURN(TSRV_EOF)};
    PLAY(steps, ">abc", ".", "|");
}

TEST_STREAM(test_future_read_until_close)
{
    static const call steps[] = {UNTIL_CLOSE(0, TSRV_OK, "data"), SOME(0, TSRV_EOF, ""),
                                 UNTIL("\n", 0, TSRV_EOF, ""), RETURN(TSRV_EOF)};
    PLAY(steps, ">data", "|");
}

/* ---- Tornado: reads and writes -------------------------------------------------------------*/

TEST_STREAM(test_write_zero_bytes)
{
    static const call steps[] = {WRITE("", TSRV_OK), FLUSH(TSRV_OK), WRITE("a", TSRV_OK),
                                 WRITE("", TSRV_OK), FLUSH(TSRV_OK), RETURN(0)};
    PLAY(steps, "<a");
}

TEST_STREAM(test_future_delayed_close_callback)
{
    static const call steps[] = {BYTES(1, TSRV_OK, "1"), PAUSE(30), BYTES(1, TSRV_OK, "2"),
                                 BYTES(1, TSRV_EOF, ""), RETURN(0)};
    PLAY(steps, ">12", "|");
}

TEST_STREAM(test_close_buffered_data)
{
    static const call steps[] = {BYTES(1, TSRV_OK, "a"), PAUSE(30),
                                 BYTES(20, TSRV_OK, "bcdefghijklmnopqrstu"),
                                 BYTES(1, TSRV_EOF, ""), RETURN(0)};
    tsrv_server_options options = {.read_chunk_size = 2};
    PLAY_WITH(&options, steps, ">abcdefghijklmnopqrstu", "|");
}

TEST_STREAM(test_read_until_close_after_close)
{
    static const call steps[] = {BYTES(1, TSRV_OK, "1"), PAUSE(30), UNTIL_CLOSE(0, TSRV_OK, "234"),
                                 RETURN(0)};
    PLAY(steps, ">1234", "|");
}

static int large_line_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc = tsrv_read_until(stream, "\r\n", 0, &line);
    (void)address;
    if (rc == TSRV_OK) {
        CHECK_INT(line.size, *(size_t *)context + 2);
        rc = tsrv_write(stream, "ok", 2);
    }
    return rc;
}

static void large_line_client(int port, void *context)
{
    int fd = t_connect(port);
    char piece[1024];
    memset(piece, '\r', sizeof piece);
    for (size_t sent = 0; sent < *(size_t *)context; sent += sizeof piece) {
        t_send(fd, piece, sizeof piece);
    }
    t_sends(fd, "\r\n");
    t_expect(fd, "ok");
    t_leave(fd);
}

/* Searching all of it again for each piece would take thousands of times as long. */
TEST_STREAM(test_large_read_until)
{
    size_t size = bulk(4 << 20, 16 << 10);
    t_case c = {.handler = large_line_handler, .client = large_line_client, .context = &size,
                .options = {.max_buffer_size = 16 << 20}};
    int64_t start = cpu_ms();
    t_run(&c);
    CHECK_NEAR_MS(cpu_ms() - start, 0, 1500);
}

TEST_STREAM(test_read_until_with_close_after_second_packet)
{
    static const call steps[] = {UNTIL("\r\n\r\n", 0, TSRV_OK, "GET / HTTP/1.0\r\n\r\n"),
                                 RETURN(0)};
    PLAY(steps, ">GET / HTTP/1.0", ".", ">\r\n\r\n", "|");
}

TEST_STREAM(test_read_until_unsatisfied_after_close)
{
    static const call steps[] = {UNTIL("\n", 10, TSRV_EOF, ""), UNTIL("\n", 10, TSRV_EOF, ""),
                                 BYTES(4, TSRV_OK, "data"), RETURN(TSRV_EOF)};
    PLAY(steps, ">data", "|");
}

TEST_STREAM(test_close_callback_with_pending_read)
{
    static const call steps[] = {WRITE("OK", TSRV_OK), UNTIL("\n", 0, TSRV_EOF, ""),
                                 RETURN(TSRV_EOF)};
    PLAY(steps, "<OK", "|");
}

/* Reads one byte a call and waits for nothing afterwards. */
static int one_byte_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc = tsrv_read_bytes(stream, 1, &slice);
    (void)address, (void)context;
    if (rc == TSRV_OK) {
        t_record(slice.data[0]);
        rc = TSRV_EAGAIN;
    }
    return rc;
}

static void close_idle_client(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_sends(fd, "x");
    t_wait_records(1);
    t_close(fd);
    t_wait_records(2);
}

TEST_STREAM(test_future_close_callback)
{
    t_case c = {.handler = one_byte_handler, .on_close = t_record_reason,
                .client = close_idle_client};
    t_run(&c);
    CHECK_INT(t_record_count(), 2);
    CHECK_INT(t_recorded(1), TSRV_EOF);
}

TEST_STREAM(test_read_bytes_partial)
{
    static const call steps[] = {SOME(50, TSRV_OK, "hello"), WRITE("1", TSRV_OK),
                                 SOME(2, TSRV_OK, "world"), BYTES(0, TSRV_OK, ""),
                                 SOME(0, TSRV_EOF, ""), RETURN(0)};
    PLAY(steps, ">hello", "<1", ">world", "|");
}

TEST_STREAM(test_read_until_max_bytes)
{
    static const call steps[] = {
        UNTIL("def", 50, TSRV_OK, "abcdef"), WRITE("1", TSRV_OK),
        UNTIL("def", 6, TSRV_OK, "abcdef"), WRITE("2", TSRV_OK),
        UNTIL("def", 5, TSRV_ETOOLONG, ""), WRITE("3", TSRV_OK),
        UNTIL("def", 5, TSRV_ETOOLONG, ""), BYTES(6, TSRV_OK, "123456"), RETURN(TSRV_ETOOLONG)};
    PLAY(steps, ">abcdef", "<1", ">abcdef", "<2", ">123456", "<3");
}

TEST_STREAM(test_read_until_max_bytes_inline)
{
    static const call steps[] = {BYTES(1, TSRV_OK, "x"), UNTIL("def", 5, TSRV_ETOOLONG, ""),
                                 BYTES(6, TSRV_OK, "123456"), RETURN(0)};
    PLAY(steps, ">x123456");
}

TEST_STREAM(test_read_until_max_bytes_ignores_extra)
{
    static const call steps[] = {UNTIL("def", 5, TSRV_ETOOLONG, ""),
                                 UNTIL("def", 6, TSRV_OK, "abcdef"), RETURN(0)};
    PLAY(steps, ">abcdef");
}

/* Tornado's regular expressions are a match function here; its test_read_into_partial has no
 * counterpart, since tsrv_read_some is what reads in part, and test_write_while_connecting none, since
 * tsrv_connect returns when it has connected. */
static size_t match_def(const char *data, size_t size, void *context)
{
    const char *found = strstr(data, "def");
    (void)context;
    CHECK_INT(data[size], 0);
    return found != NULL ? (size_t)(found - data) + 3 : 0;
}

TEST_STREAM(test_read_until_match_max_bytes)
{
    static const call steps[] = {
        MATCH(match_def, 50, TSRV_OK, "abcdef"), WRITE("1", TSRV_OK),
        MATCH(match_def, 6, TSRV_OK, "abcdef"), WRITE("2", TSRV_OK),
        MATCH(match_def, 5, TSRV_ETOOLONG, ""), WRITE("3", TSRV_OK),
        BYTES(6, TSRV_OK, "123456"), RETURN(0)};
    PLAY(steps, ">abcdef", "<1", ">abcdef", "<2", ">123456", "<3");
}

TEST_STREAM(test_read_until_match_max_bytes_inline)
{
    static const call steps[] = {BYTES(1, TSRV_OK, "x"), MATCH(match_def, 5, TSRV_ETOOLONG, ""),
                                 BYTES(6, TSRV_OK, "123456"), RETURN(0)};
    PLAY(steps, ">x123456");
}

TEST_STREAM(test_read_until_match_max_bytes_ignores_extra)
{
    static const call steps[] = {MATCH(match_def, 5, TSRV_ETOOLONG, ""),
                                 MATCH(match_def, 6, TSRV_OK, "abcdef"), RETURN(0)};
    PLAY(steps, ">abcdef");
}

#define SMALL_READS 100

typedef struct small_reads {
    bool until; /* else by size */
} small_reads;

static int small_reads_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *count = (int *)tsrv_data(stream);
    bool until = ((small_reads *)context)->until;
    tsrv_slice slice;
    (void)address;
    for (; *count < SMALL_READS; ++*count) {
        int rc = until ? tsrv_read_until(stream, "\n", 1024, &slice)
                       : tsrv_read_bytes(stream, 1024, &slice);
        if (rc != TSRV_OK) {
            return rc;
        }
        CHECK_INT(slice.size, 1024);
        CHECK_INT(slice.data[0], 'a' + *count % 26);
        CHECK_INT(slice.data[1023], '\n');
        CHECK(tsrv_unread_size(stream) <= 10240);
    }
    return tsrv_write(stream, "ok", 2);
}

static void small_reads_client(int port, void *context)
{
    int fd = t_connect(port);
    char piece[1024];
    (void)context;
    for (int i = 0; i < SMALL_READS; i++) {
        memset(piece, 'a' + i % 26, sizeof piece);
        piece[1023] = '\n';
        t_send(fd, piece, sizeof piece);
    }
    t_expect(fd, "ok");
    t_leave(fd);
}

static void run_small_reads(bool until)
{
    small_reads context = {until};
    t_case c = {.handler = small_reads_handler, .client = small_reads_client, .context = &context,
                .options = {.data_size = sizeof(int), .max_buffer_size = 10240}};
    t_run(&c);
}

TEST_STREAM(test_small_reads_from_large_buffer)
{
    run_small_reads(false);
}

TEST_STREAM(test_small_read_untils_from_large_buffer)
{
    run_small_reads(true);
}

typedef struct flow {
    size_t part; /* bytes of each of ten reads */
} flow;

typedef struct flow_state {
    int reads;
    bool pausing;
} flow_state;

static int flow_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    size_t part = ((flow *)context)->part;
    flow_state *state = (flow_state *)tsrv_data(stream);
    int rc;
    (void)address;
    while (state->reads < 10) {
        if (state->pausing) {
            if ((rc = tsrv_wait(stream, 10)) != TSRV_ETIMEOUT) {
                return rc;
            }
            state->pausing = false;
        }
        tsrv_slice slice;
        if ((rc = tsrv_read_bytes(stream, part, &slice)) != TSRV_OK) {
            return rc;
        }
        char *expected = (char *)malloc(part);
        CHECK(expected != NULL);
        fill_pattern(expected, (size_t)state->reads * part, part);
        CHECK_MEM(slice.data, slice.size, expected, part);
        free(expected);
        CHECK(tsrv_unread_size(stream) <= 5 * part);
        state->reads++;
        state->pausing = true;
    }
    return tsrv_write(stream, "ok", 2);
}

static void flow_client(int port, void *context)
{
    size_t size = 10 * ((flow *)context)->part;
    char *data = new_pattern(size);
    int fd = t_connect(port);
    t_send(fd, data, size);
    t_expect(fd, "ok");
    t_leave(fd);
    free(data);
}

TEST_STREAM(test_flow_control)
{
    flow context = {bulk(1 << 20, 4 << 10)};
    t_case c = {.handler = flow_handler, .client = flow_client, .context = &context};
    c.options.data_size = sizeof(flow_state);
    c.options.max_buffer_size = 5 * context.part;
    t_run(&c);
}

TEST_STREAM(test_read_into)
{
    static const call steps[] = {BYTES(1, TSRV_OK, "a"), INTO(4, TSRV_OK, "bcde"),
                                 INTO(4, TSRV_OK, "fghi"), UNTIL("\n", 0, TSRV_OK, "jk\n"),
                                 INTO(2, TSRV_OK, "lm"), INTO(1, TSRV_EOF, ""), RETURN(0)};
    PLAY(steps, ">abcdefg", ".", ">hijk\nlm", "|");
}

TEST_STREAM(test_read_into_zero_bytes)
{
    static const call steps[] = {INTO(0, TSRV_OK, ""), WRITE("1", TSRV_OK),
                                 UNTIL("\n", 0, TSRV_OK, "a\n"), INTO(0, TSRV_OK, ""),
                                 INTO(1, TSRV_OK, "b"), RETURN(0)};
    PLAY(steps, "<1", ">a\nb");
}

/* Any mix of reads returns the same bytes as were sent. */
typedef struct mixed {
    char *data;
    size_t size;
    unsigned kinds; /* the first so many of read_mixed's */
    size_t longest; /* of one read */
} mixed;

typedef struct mixed_state {
    unsigned random;
    unsigned kind;  /* of the read under way, from 1; 0 = none */
    size_t size;    /* of the read under way */
    size_t offset;  /* bytes read so far */
    char into[4096];
} mixed_state;

static int read_mixed(tsrv_stream *stream, mixed_state *state, tsrv_slice *slice)
{
    int rc;
    switch (state->kind) {
    case 1:
        return tsrv_read_bytes(stream, state->size, slice);
    case 2:
        return tsrv_read_some(stream, state->size, slice);
    case 3:
        return tsrv_read_until(stream, "\n", 0, slice);
    default:
        rc = tsrv_read_into(stream, state->into, state->size);
        slice->data = state->into;
        slice->size = state->size;
        return rc;
    }
}

static int mixed_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    mixed *m = (mixed *)context;
    mixed_state *state = (mixed_state *)tsrv_data(stream);
    tsrv_slice slice;
    int rc;
    (void)address;
    while (state->offset < m->size) {
        size_t left = m->size - state->offset;
        if (state->kind == 0) {
            state->kind = 1 + next_random(&state->random) % m->kinds;
            state->size = 1 + next_random(&state->random) % m->longest;
            state->size = state->size < left ? state->size : left;
        }
        if ((rc = read_mixed(stream, state, &slice)) != TSRV_OK) {
            return rc;
        }
        if (state->kind == 1) {
            CHECK_INT(slice.size, state->size);
        } else if (state->kind == 2) {
            CHECK(slice.size >= 1 && slice.size <= state->size);
        } else if (state->kind == 3) {
            CHECK(memchr(slice.data, '\n', slice.size) == slice.data + slice.size - 1);
        }
        CHECK(slice.size <= left);
        CHECK_MEM(slice.data, slice.size, m->data + state->offset, slice.size);
        state->offset += slice.size;
        state->kind = 0;
    }
    if ((rc = tsrv_read_some(stream, 0, &slice)) == TSRV_EOF) {
        rc = tsrv_write(stream, "ok", 2);
    }
    return rc;
}

static void mixed_client(int port, void *context)
{
    mixed *m = (mixed *)context;
    unsigned random = 7;
    int fd = t_connect(port);
    for (size_t sent = 0; sent < m->size;) {
        size_t piece = 1 + next_random(&random) % 9000;
        piece = piece < m->size - sent ? piece : m->size - sent;
        t_send(fd, m->data + sent, piece);
        sent += piece;
    }
    t_shut(fd);
    t_expect(fd, "ok");
    t_leave(fd);
}

static void run_mixed(size_t size, unsigned kinds, size_t longest)
{
    mixed context = {new_pattern(size), size, kinds, longest};
    unsigned random = 1;
    for (size_t i = 0; i < size; i++) {
        context.data[i] = (char)next_random(&random);
    }
    context.data[size - 1] = '\n';
    t_case c = {.handler = mixed_handler, .client = mixed_client, .context = &context,
                .options = {.data_size = sizeof(mixed_state)}};
    t_run(&c);
    free(context.data);
}

TEST_STREAM(test_many_mixed_reads)
{
    run_mixed(bulk(1 << 20, 32 << 10), 4, 4096);
}

/* Tornado's tests of StreamBuffer itself: random appends and removals, small and large. */
TEST_STREAM(test_stream_buffer_small)
{
    run_mixed(bulk(64 << 10, 8 << 10), 1, 20);
}

TEST_STREAM(test_stream_buffer_large)
{
    run_mixed(bulk(4 << 20, 32 << 10), 2, 200 << 10);
}

/* ---- Tornado: the rest ---------------------------------------------------------------------*/

TEST_STREAM(test_read_until_close_with_error)
{
    static const call steps[] = {BYTES(1, TSRV_OK, "x"), UNTIL_CLOSE(3, TSRV_ETOOLONG, ""),
                                 BYTES(4, TSRV_OK, "abcd"), RETURN(0)};
    PLAY(steps, ">xabcd", "|");
}

/* The first call after the reset returns it, and nothing is logged. */
TEST_STREAM(test_inline_read_error)
{
    static const call steps[] = {BYTES(1, TSRV_OK, "a"), PAUSE(1000), BYTES(1, -ECONNRESET, ""),
                                 BYTES(1, -ECONNRESET, ""), RETURN(-ECONNRESET)};
    t_watch_log();
    PLAY(steps, ">a", ".", "!");
    CHECK_INT(t_log_lines, 0);
}

/* What a handler returns is logged once when nobody could have expected it. */
TEST_STREAM(test_async_read_error_logging)
{
    static const struct {
        int code, logged;
    } rows[] = {{0, 0}, {5, 0}, {TSRV_EOF, 0}, {TSRV_ECLOSED, 0}, {TSRV_ETIMEOUT, 0},
                {TSRV_ETOOLONG, 1}, {TSRV_EINVAL, 1}, {-EIO, 1}};
    t_watch_log();
    for (size_t i = 0; i < COUNT(rows); i++) {
        call steps[] = {UNTIL("\n", 0, TSRV_OK, "a\n"), RETURN(rows[i].code)};
        t_log_lines = 0;
        PLAY(steps, ">a\n");
        CHECK_INT(t_log_lines, rows[i].logged);
        CHECK(rows[i].logged == 0 || strstr(t_log, "127.0.0.1:") != NULL);
    }
}

#define WRITERS 10
#define WRITE_SIZE 5000

typedef struct writers {
    tsrv_stream *stream;
    int writes;  /* of each writer */
    int started; /* names them */
    int running;
} writers;

static void writer(void *context)
{
    writers *w = (writers *)context;
    char data[WRITE_SIZE];
    memset(data, 'a' + w->started++, sizeof data);
    for (int i = 0; i < w->writes; i++) {
        CHECK_INT(tsrv_write(w->stream, data, sizeof data), TSRV_OK);
        CHECK_INT(tsrv_flush(w->stream), TSRV_OK);
    }
    w->running--;
    tsrv_wake(w->stream);
}

static int writers_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    writers *w = (writers *)context;
    (void)address;
    w->stream = stream;
    limit_output(stream);
    for (; w->running < WRITERS; w->running++) {
        CHECK_INT(tsrv_spawn(t_loop, writer, w), TSRV_OK);
    }
    while (w->running > 0) {
        CHECK_INT(tsrv_wait(stream, TSRV_NEVER), TSRV_OK);
    }
    return 0;
}

static void writers_client(int port, void *context)
{
    int fd = t_connect(port), writes = ((writers *)context)->writes, counts[WRITERS] = {0};
    char actual[WRITE_SIZE], expected[WRITE_SIZE];
    for (int i = 0; i < writes * WRITERS; i++) {
        size_t size = t_recv(fd, actual, sizeof actual);
        CHECK(actual[0] >= 'a' && actual[0] < 'a' + WRITERS);
        memset(expected, actual[0], sizeof expected);
        CHECK_MEM(actual, size, expected, sizeof expected);
        counts[actual[0] - 'a']++;
    }
    for (int i = 0; i < WRITERS; i++) {
        CHECK_INT(counts[i], writes);
    }
    t_leave(fd);
}

/* Ten writers at once: each write in one piece, each flush comes back. */
TEST_COROUTINE(test_future_write)
{
    writers context = {NULL, t_hard ? 4 : 200, 0, 0};
    t_case c = {.handler = writers_handler, .client = writers_client, .context = &context};
    t_run(&c);
    CHECK_INT(context.running, 0);
}

static void add_refused(void *context)
{
    CHECK_INT(tsrv_server_add_stream(t_server, *(int *)context), TSRV_EINVAL);
}

static void pipe_client(int port, void *context)
{
    int fds[2], fd = connect_pair();
    (void)port, (void)context;
    t_echo(fd, "hello");
    t_echo(fd, "world");
    t_finish(fd);

    CHECK(pipe(fds) == 0);
    t_on_loop(add_refused, &fds[0]);
    CHECK(!t_is_open(fds[0]));
    t_close(fds[1]);
}

/* Pipes are socket pairs here; a pipe itself is refused, and closed as all that is handed over. */
TEST_PLAIN_STREAM(test_pipe_iostream)
{
    t_case c = {.handler = echo_bytes, .client = pipe_client};
    t_run(&c);
}

static int pattern_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    size_t size = *(size_t *)context;
    char *data = new_pattern(size);
    int rc = tsrv_write(stream, data, size);
    (void)address;
    free(data);
    return rc;
}

static void pipe_pattern_client(int port, void *context)
{
    int fd = connect_pair();
    (void)port;
    expect_pattern_from(fd, 0, *(size_t *)context);
    t_leave(fd);
}

TEST_PLAIN_STREAM(test_pipe_iostream_big_write)
{
    size_t size = bulk(1 << 20, 64 << 10);
    t_case c = {.handler = pattern_handler, .client = pipe_pattern_client, .context = &size};
    t_run(&c);
}

/* ---- read_until and its limit --------------------------------------------------------------*/

/* One below, exactly, one above, with the line there already or split at any place. */
TEST_STREAM(test_max_bytes)
{
    static const char *const rows[][2] = {
        {"abcde\n", "\n"}, {"abcd\r\n", "\r\n"}, {"ab\r\n.\r\n", "\r\n.\r\n"}, {"\n", "\n"}};
    for (size_t row = 0; row < COUNT(rows); row++) {
        const char *line = rows[row][0], *end = rows[row][1];
        size_t size = strlen(line);
        for (size_t limit = size - 1; limit <= size + 1; limit++) {
            bool fits = limit >= size;
            call steps[] = {BYTES(1, TSRV_OK, "x"),
                            UNTIL(end, limit, fits ? TSRV_OK : TSRV_ETOOLONG, fits ? line : ""),
                            UNTIL(end, 0, TSRV_OK, line), WRITE("ok", TSRV_OK), RETURN(0)};
            for (size_t split = 0; split < size && limit > 0; split++) {
                char all[64], first[64];
                snprintf(all, sizeof all, ">x%s%s", line, fits ? line : "");
                snprintf(first, sizeof first, "%.*s", (int)split + 2, all);
                if (split == 0) {
                    PLAY(steps, all, "<ok");
                } else {
                    all[split + 1] = '>';
                    PLAY(steps, first, ".", all + split + 1, "<ok");
                }
            }
        }
    }
}

/* More than max_bytes without the delimiter fail at once; exactly so many go on waiting, as in Tornado. */
TEST_STREAM(test_max_bytes_at_the_limit)
{
    static const call over[] = {UNTIL("\r\n", 5, TSRV_ETOOLONG, ""), WRITE("T", TSRV_OK),
                                UNTIL("\r\n", 0, TSRV_OK, "abcdef\r\n"), RETURN(0)};
    static const call exact[] = {UNTIL("\r\n", 5, TSRV_ETOOLONG, ""), WRITE("T", TSRV_OK),
                                 UNTIL("\r\n", 0, TSRV_OK, "abcde\r\n"), RETURN(0)};
    static const call possible[] = {UNTIL("\r\n", 5, TSRV_OK, "abc\r\n"), RETURN(0)};
    PLAY(over, ">abcdef", "<T", ">\r\n");
    PLAY(exact, ">abcde", ".", ">\r\n", "<T");
    PLAY(possible, ">abc\r", ".", ">\n");
}

/* Beginnings of the delimiter that turn out to be none come first. */
TEST_STREAM(test_delimiter_split)
{
    static const char *const rows[][2] = {{"a\r", "\r\n"}, {"\r\n\r", "\r\n\r\n"}, {"aaa", "aab"},
                                          {"abab", "ababc"}, {"\r\n.\r", "\r\n.\r\n"}};
    for (size_t row = 0; row < COUNT(rows); row++) {
        const char *end = rows[row][1];
        char all[32], message[32];
        snprintf(all, sizeof all, "%s%s", rows[row][0], end);
        size_t size = (size_t)(strstr(all, end) - all) + strlen(end);
        snprintf(message, sizeof message, "%.*s", (int)size, all);
        call steps[] = {UNTIL(end, 0, TSRV_OK, message), WRITE("1", TSRV_OK),
                        UNTIL("next", 0, TSRV_OK, NULL), RETURN(0)};
        for (size_t split = 1; split < size; split++) {
            char first[32], second[32];
            snprintf(first, sizeof first, ">%.*s", (int)split, all);
            snprintf(second, sizeof second, ">%s", all + split);
            PLAY(steps, first, ".", second, "<1", ">next");
        }
    }
}

typedef struct search {
    const char *delimiter;
    char data[3000];
} search;

static int search_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc;
    (void)address;
    while ((rc = tsrv_read_until(stream, ((search *)context)->delimiter, 0, &slice)) == TSRV_OK) {
        CHECK_INT(tsrv_printf(stream, "%zu\n", slice.size), TSRV_OK);
    }
    if (rc == TSRV_EOF && (rc = tsrv_read_until_close(stream, 0, &slice)) == TSRV_OK) {
        rc = tsrv_printf(stream, "rest %zu\n", slice.size);
    }
    return rc;
}

static void search_client(int port, void *context)
{
    static char actual[32768], expected[32768];
    search *s = (search *)context;
    size_t size = strlen(s->data), used = 0;
    unsigned random = 3;
    int fd = t_connect(port);
    for (size_t sent = 0; sent < size;) {
        size_t piece = 1 + next_random(&random) % 9;
        piece = piece < size - sent ? piece : size - sent;
        t_send(fd, s->data + sent, piece);
        sent += piece;
    }
    t_shut(fd);
    const char *at = s->data;
    for (const char *found; (found = strstr(at, s->delimiter)) != NULL;) {
        found += strlen(s->delimiter);
        used += (size_t)sprintf(expected + used, "%d\n", (int)(found - at));
        at = found;
    }
    used += (size_t)sprintf(expected + used, "rest %zu\n", strlen(at));
    CHECK_MEM(actual, t_recv_all(fd, actual, sizeof actual), expected, used);
    t_close(fd);
}

/* Against a naive search, with delimiters that overlap themselves. */
TEST_STREAM(test_delimiter_search)
{
    static const char *const rows[][2] = {{"aab", "ab"}, {"aa", "ab"}, {"abab", "ab"},
                                          {"\r\n\r\n", "\r\n"}, {"abaabaaab", "aab"}};
    unsigned random = 5;
    for (size_t row = 0; row < COUNT(rows); row++) {
        static search s;
        s.delimiter = rows[row][0];
        for (size_t i = 0; i + 1 < sizeof s.data; i++) {
            s.data[i] = rows[row][1][next_random(&random) % strlen(rows[row][1])];
        }
        t_case c = {.handler = search_handler, .client = search_client, .context = &s};
        t_run(&c);
    }
}

TEST_STREAM(test_empty_delimiter)
{
    static const call steps[] = {UNTIL("", 0, TSRV_EINVAL, ""), UNTIL("", 0, TSRV_EINVAL, NULL),
                                 UNTIL("\n", 0, TSRV_OK, "a\n"), RETURN(0)};
    PLAY(steps, ">a\n");
}

static int until_mem_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc;
    (void)address, (void)context;
    CHECK_INT(tsrv_read_until_mem(stream, "x", 0, 0, &slice), TSRV_EINVAL);
    CHECK_MEM(slice.data, slice.size, "", 0);
    while ((rc = tsrv_read_until_mem(stream, "\0\n", 2, 0, &slice)) == TSRV_OK) {
        CHECK_INT(slice.data[slice.size], 0);
        CHECK_INT(tsrv_write(stream, slice.data, slice.size), TSRV_OK);
    }
    return rc;
}

static void until_mem_client(int port, void *context)
{
    char buffer[16];
    int fd = t_connect(port);
    (void)context;
    t_send(fd, "a\0b\n\0\0\n\0\n\0", 10);
    t_shut(fd);
    CHECK_MEM(buffer, t_recv_all(fd, buffer, sizeof buffer), "a\0b\n\0\0\n\0\n", 9);
    t_close(fd);
}

TEST_STREAM(test_read_until_mem)
{
    t_case c = {.handler = until_mem_handler, .client = until_mem_client};
    t_run(&c);
}

/* Every step of a play checks it. Here bytes follow each slice, and none of them is lost by it. */
TEST_STREAM(test_slices_are_terminated)
{
    static const call steps[] = {UNTIL(" ", 0, TSRV_OK, "12 "), BYTES(3, TSRV_OK, "345"),
                                 SOME(1, TSRV_OK, "6"), MATCH(match_def, 0, TSRV_OK, "7def"),
                                 UNTIL_CLOSE(0, TSRV_OK, "8"), RETURN(0)};
    PLAY(steps, ">12 34567def8", "|");
}

/* ---- other reads ---------------------------------------------------------------------------*/

/* Whatever is dropped does not count against the limit, wherever the buffer ends in it. */
TEST_STREAM(test_drop_until)
{
    static const char *const ends[] = {"\n", "\r\n", "aab", "\r\n\r\n"};
    tsrv_server_options options = {.max_buffer_size = 64, .read_chunk_size = t_hard ? 1 : 16};
    for (size_t i = 0; i < COUNT(ends); i++) {
        for (int size = 58; size <= 70; size++) {
            call steps[] = {UNTIL(ends[i], 0, TSRV_OK, NULL), UNTIL("\n", 0, TSRV_OK, "next\n"),
                            UNTIL(ends[i], 0, TSRV_EOF, NULL), RETURN(0)};
            char text[256];
            snprintf(text, sizeof text, ">%0*d%snext\n", size, 0, ends[i]);
            PLAY_WITH(&options, steps, text, "|");
        }
    }
}

static size_t match_digit(const char *data, size_t size, void *context)
{
    (void)size, (void)context;
    return data[0] == 'X' ? SIZE_MAX : 1 + (size_t)(data[0] - '0');
}

TEST_STREAM(test_drop_others)
{
    static const call steps[] = {BYTES(1000, TSRV_OK, NULL), BYTES(3, TSRV_OK, "abc"),
                                 MATCH(match_digit, 0, TSRV_OK, NULL), BYTES(1, TSRV_OK, "d"),
                                 SOME(1, TSRV_OK, NULL), BYTES(1, TSRV_OK, "f"),
                                 UNTIL_CLOSE(0, TSRV_OK, NULL), BYTES(1, TSRV_EOF, ""), RETURN(0)};
    tsrv_server_options options = {.max_buffer_size = 64, .read_chunk_size = t_hard ? 1 : 16};
    char first[1024], last[1024];
    snprintf(first, sizeof first, ">%01000dabc3...def", 0);
    snprintf(last, sizeof last, ">%01000d", 0);
    PLAY_WITH(&options, steps, first, last, "|");
}

TEST_STREAM(test_read_bytes_limit)
{
    static const call steps[] = {BYTES(9, TSRV_ETOOLONG, ""), BYTES(SIZE_MAX, TSRV_ETOOLONG, ""),
                                 WRITE("1", TSRV_OK), BYTES(8, TSRV_OK, "12345678"),
                                 UNTIL("\n", 100, TSRV_ETOOLONG, ""), BYTES(8, TSRV_OK, "abcdefgh"),
                                 RETURN(0)};
    tsrv_server_options options = {.max_buffer_size = 8};
    PLAY_WITH(&options, steps, "<1", ">12345678abcdefgh\n");
}

TEST_STREAM(test_read_until_match)
{
    static const call steps[] = {
        MATCH(match_digit, 0, TSRV_OK, "3abc"), MATCH(match_digit, 0, TSRV_OK, "0"),
        MATCH(match_digit, 6, TSRV_OK, "5hello"), WRITE("1", TSRV_OK),
        MATCH(match_digit, 9, TSRV_ETOOLONG, ""), WRITE("2", TSRV_OK),
        MATCH(match_digit, 10, TSRV_OK, "9123456789"), WRITE("3", TSRV_OK),
        MATCH(match_digit, 0, TSRV_ETOOLONG, ""), BYTES(1, TSRV_OK, "X"),
        MATCH(match_digit, 0, TSRV_EOF, ""), BYTES(2, TSRV_OK, "2a"), RETURN(0)};
    PLAY(steps, ">3ab", ".", ">c05hel", ".", ">lo", "<1", ">9", "<2", ">123456789", "<3", ">X2a",
         "|");
}

static int match_calls;

static size_t match_counting(const char *data, size_t size, void *context)
{
    match_calls++;
    return match_digit(data, size, context);
}

/* A match that says how many bytes it wants is not asked before they are there: once at the
 * first byte, once with all of them, and once more by the repeated call of a callback. */
TEST_STREAM(test_read_until_match_asks_seldom)
{
    static const call steps[] = {MATCH(match_counting, 0, TSRV_OK, "9123456789"), RETURN(0)};
    PLAY(steps, ">9", ".", ">1", ".", ">2", ".", ">3", ".", ">4", ".", ">5", ".", ">6", ".", ">7",
         ".", ">8", ".", ">9");
    CHECK(match_calls >= 2 && match_calls <= 3);
}

TEST_STREAM(test_read_into_keeps_bytes)
{
    static const call timeout[] = {TIMEOUT(100), INTO(10, TSRV_ETIMEOUT, ""), WRITE("T", TSRV_OK),
                                   BYTES(4, TSRV_OK, "abcd"), TIMEOUT(20000),
                                   INTO(4, TSRV_OK, "efgh"), RETURN(0)};
    static const call again[] = {TIMEOUT(100), INTO(10, TSRV_ETIMEOUT, ""), WRITE("T", TSRV_OK),
                                 TIMEOUT(20000), INTO(8, TSRV_OK, "abcdefgh"), RETURN(0)};
    static const call eof[] = {INTO(10, TSRV_EOF, ""), BYTES(4, TSRV_OK, "abcd"),
                               BYTES(1, TSRV_EOF, ""), RETURN(0)};
    PLAY(timeout, ">abcd", "<T", ">efgh");
    PLAY(again, ">ab", ".", ">cd", "<T", ">efgh");
    PLAY(eof, ">ab", ".", ">cd", ".", "|");
}

typedef struct large_into {
    char *buffer;
    size_t size;
} large_into;

static int large_into_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    large_into *into = (large_into *)context;
    int rc;
    (void)address;
    while ((rc = tsrv_read_into(stream, into->buffer, into->size)) == TSRV_ETIMEOUT) {
        t_record(TSRV_ETIMEOUT);
    }
    return rc == TSRV_OK ? tsrv_write(stream, "ok", 2) : rc;
}

static void large_into_client(int port, void *context)
{
    large_into *into = (large_into *)context;
    char *data = new_pattern(into->size);
    size_t part = into->size / 3;
    int fd = t_connect(port);
    t_send(fd, data, part);
    wait_received(part);
    t_wait_records(t_record_count() + 1);
    t_send(fd, data + part, part);
    wait_received(2 * part);
    t_wait_records(t_record_count() + 1);
    t_send(fd, data + 2 * part, into->size - 2 * part);
    t_expect(fd, "ok");
    t_expect_eof(fd);
    CHECK_MEM(into->buffer, into->size, data, into->size);
    free(data);
    t_close(fd);
}

/* More than the stream's own buffer may hold, with timeouts on the way. */
TEST_STREAM(test_read_into_large)
{
    large_into context = {NULL, bulk(300 << 10, 3 << 10)};
    context.buffer = (char *)malloc(context.size);
    CHECK(context.buffer != NULL);
    t_case c = {.handler = large_into_handler, .client = large_into_client, .context = &context};
    c.options.max_buffer_size = bulk(16 << 10, 256);
    c.options.read_timeout_ms = 30;
    t_run(&c);
    free(context.buffer);
}

TEST_STREAM(test_read_until_close_ends)
{
    static const call empty[] = {UNTIL_CLOSE(0, TSRV_OK, ""), RETURN(0)};
    static const call exact[] = {UNTIL_CLOSE(4, TSRV_OK, "abcd"), RETURN(0)};
    static const call over[] = {UNTIL_CLOSE(4, TSRV_ETOOLONG, ""), WRITE("T", TSRV_OK),
                                BYTES(5, TSRV_OK, "abcde"), UNTIL_CLOSE(4, TSRV_OK, "f"),
                                RETURN(0)};
    static const call reset[] = {UNTIL_CLOSE(0, -ECONNRESET, ""), BYTES(3, TSRV_OK, "abc"),
                                 UNTIL_CLOSE(0, -ECONNRESET, ""), RETURN(-ECONNRESET)};
    PLAY(empty, "|");
    PLAY(exact, ">ab", ".", ">cd", "|");
    PLAY(over, ">abcde", "<T", ">f", "|");
    PLAY(reset, ">abc", ".", "!");
}

TEST_PLAIN_STREAM(test_bytes_before_the_end)
{
    static const call eof[] = {UNTIL("\n", 0, TSRV_EOF, ""), BYTES(2, TSRV_OK, "ab"),
                               SOME(0, TSRV_OK, "c"), SOME(0, TSRV_EOF, ""),
                               WRITE("still there", TSRV_OK), RETURN(TSRV_EOF)};
    static const call reset[] = {UNTIL("\n", 0, -ECONNRESET, ""), BYTES(2, TSRV_OK, "ab"),
                                 SOME(0, TSRV_OK, "c"), SOME(0, -ECONNRESET, ""),
                                 RETURN(-ECONNRESET)};
    PLAY(eof, ">abc", ".", "|", "<still there");
    PLAY(reset, ">abc", ".", "!");
#ifdef __linux__
    /* Other systems may drop what the kernel still holds when a reset comes. */
    static const call unread[] = {BYTES(1, TSRV_OK, "a"), PAUSE(1000), BYTES(2, TSRV_OK, "bc"),
                                  BYTES(1, -ECONNRESET, ""), RETURN(-ECONNRESET)};
    PLAY(unread, ">abc", "!");
#endif
}

static void second_reader(void *context)
{
    tsrv_stream *stream = (tsrv_stream *)context;
    tsrv_slice slice;
    char byte;
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &slice), TSRV_EBUSY);
    CHECK_MEM(slice.data, slice.size, "", 0);
    CHECK_INT(tsrv_read_until_mem(stream, "\n", 1, 0, NULL), TSRV_EBUSY);
    CHECK_INT(tsrv_read_until_match(stream, match_def, NULL, 0, &slice), TSRV_EBUSY);
    CHECK_INT(tsrv_read_bytes(stream, 1, &slice), TSRV_EBUSY);
    CHECK_INT(tsrv_read_some(stream, 0, &slice), TSRV_EBUSY);
    CHECK_INT(tsrv_read_into(stream, &byte, 1), TSRV_EBUSY);
    CHECK_INT(tsrv_read_until_close(stream, 0, &slice), TSRV_EBUSY);
    CHECK_INT(tsrv_write(stream, "busy", 4), TSRV_OK);
    CHECK_INT(tsrv_flush(stream), TSRV_OK);
}

static int second_reader_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    (void)address, (void)context;
    CHECK_INT(tsrv_spawn(t_loop, second_reader, stream), TSRV_OK);
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &slice), TSRV_OK);
    CHECK_MEM(slice.data, slice.size, "line\n", 5);
    return 0;
}

static void second_reader_client(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_expect(fd, "busy");
    t_sends(fd, "line\n");
    t_leave(fd);
}

TEST_COROUTINE(test_second_reader)
{
    t_case c = {.handler = second_reader_handler, .client = second_reader_client};
    t_run(&c);
}

/* ---- writes --------------------------------------------------------------------------------*/

static void half_close_client(int port, void *context)
{
    sender s;
    start_sending(&s, t_connect(port), *(size_t *)context);
    /* All the buffers between the two fill up first. */
    poll(NULL, 0, 50);
    expect_pattern_from(s.fd, 0, s.size);
    t_expect_eof(s.fd);
    join_sender(&s);
    t_close(s.fd);
    t_wait_records(1);
}

TEST_STREAM(test_half_close)
{
    size_t size = bulk(32 << 20, 128 << 10);
    t_case c = {.handler = echo_bytes, .on_close = t_record_reason, .client = half_close_client,
                .context = &size};
    t_run(&c);
    CHECK_INT(t_recorded(0), TSRV_EOF);
}

#define ANSWER 4096
#define HIGH_WATER 16384

typedef struct answers {
    int wanted;
    int written; /* the loop's thread only */
    char data[ANSWER];
} answers;

static int answers_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    answers *a = (answers *)context;
    tsrv_slice slice;
    int rc;
    (void)address;
    limit_output(stream);
    while ((rc = tsrv_read_bytes(stream, 1, &slice)) == TSRV_OK) {
        CHECK_INT(tsrv_write(stream, a->data, ANSWER), TSRV_OK);
        CHECK(tsrv_unsent_size(stream) <= HIGH_WATER + (t_mode == TSRV_CALLBACK ? ANSWER : 0));
        a->written++;
    }
    return rc;
}

static void check_held(void *context)
{
    answers *a = (answers *)context;
    CHECK(a->written < a->wanted);
    CHECK(tsrv_unsent_size(tsrv_server_next(t_server, NULL)) <= HIGH_WATER + ANSWER);
}

static void answers_client(int port, void *context)
{
    answers *a = (answers *)context;
    int fd = t_connect(port);
    char actual[ANSWER];
    for (int i = 0; i < a->wanted; i++) {
        t_sends(fd, "?");
    }
    t_shut(fd);
    wait_unsent(HIGH_WATER);
    t_on_loop(check_held, a);
    for (int i = 0; i < a->wanted; i++) {
        CHECK_MEM(actual, t_recv(fd, actual, ANSWER), a->data, ANSWER);
    }
    t_leave(fd);
}

/* A client that does not read holds its handler back: inside the write or in the next read. */
TEST_PLAIN_STREAM(test_write_high_water)
{
    static answers context;
    context.wanted = t_hard ? 60 : 500;
    fill_pattern(context.data, 0, ANSWER);
    t_case c = {.handler = answers_handler, .client = answers_client, .context = &context,
                .options = {.write_high_water = HIGH_WATER}};
    t_run(&c);
    CHECK_INT(context.written, context.wanted);
}

#define WRITE_LIMIT 65536

static int too_much_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    char *data = new_pattern(1 << 20);
    tsrv_slice slice;
    (void)address, (void)context;
    limit_output(stream);
    CHECK_INT(tsrv_write(stream, data, 1 << 20), TSRV_EFULL);
    CHECK_INT(tsrv_read_some(stream, 0, &slice), TSRV_EFULL);
    CHECK_INT(tsrv_write(stream, "x", 1), TSRV_EFULL);
    CHECK_INT(tsrv_error(stream), TSRV_EFULL);
    free(data);
    return 0;
}

static void drained_client(int port, void *context)
{
    (void)context;
    t_drain_and_close(t_connect(port));
    t_wait_records(1);
}

TEST_CALLBACK(test_write_too_much)
{
    t_case c = {.handler = too_much_handler, .on_close = t_record_reason, .client = drained_client,
                .options = {.max_write_buffer_size = WRITE_LIMIT}};
    t_run(&c);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), TSRV_EFULL);
}

typedef struct pieces {
    tsrv_stream *stream;
    size_t size;
    bool done; /* the other writer */
} pieces;

static void other_writer(void *context)
{
    pieces *p = (pieces *)context;
    CHECK_INT(tsrv_write(p->stream, "other", 5), TSRV_OK);
    p->done = true;
    tsrv_wake(p->stream);
}

static int pieces_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    pieces *p = (pieces *)context;
    char *data = new_pattern(p->size);
    (void)address;
    p->stream = stream;
    limit_output(stream);
    CHECK_INT(tsrv_spawn(t_loop, other_writer, p), TSRV_OK);
    CHECK_INT(tsrv_write(stream, data, p->size), TSRV_OK);
    free(data);
    while (!p->done) {
        CHECK_INT(tsrv_wait(stream, TSRV_NEVER), TSRV_OK);
    }
    return 0;
}

static void pieces_client(int port, void *context)
{
    int fd = t_connect(port);
    wait_unsent(0);
    expect_pattern_from(fd, 0, ((pieces *)context)->size);
    t_expect(fd, "other");
    t_leave(fd);
}

/* More than the stream may hold goes out in pieces, with no other write between them. */
TEST_COROUTINE(test_write_in_pieces)
{
    pieces context = {NULL, bulk(2 << 20, 256 << 10), false};
    t_case c = {.handler = pieces_handler, .client = pieces_client, .context = &context,
                .options = {.max_write_buffer_size = WRITE_LIMIT, .write_high_water = HIGH_WATER}};
    t_run(&c);
    CHECK(context.done);
}

static int try_write_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *written = (int *)tsrv_data(stream), rc;
    tsrv_slice slice;
    char data[1000];
    (void)address, (void)context;
    if (*written == 0) {
        limit_output(stream);
        memset(data, 'd', sizeof data);
        while ((rc = tsrv_try_write(stream, data, sizeof data)) == TSRV_OK) {
            ++*written;
        }
        CHECK_INT(rc, TSRV_EFULL);
        size_t unsent = tsrv_unsent_size(stream);
        CHECK(unsent > WRITE_LIMIT - sizeof data && unsent <= WRITE_LIMIT);
        CHECK_INT(tsrv_try_write(stream, data, sizeof data), TSRV_EFULL);
        CHECK_INT(tsrv_unsent_size(stream), unsent);
        CHECK_INT(tsrv_error(stream), TSRV_OK);
        t_record(*written);
    }
    if ((rc = tsrv_read_bytes(stream, 1, &slice)) == TSRV_OK) {
        rc = tsrv_try_write(stream, "end", 3);
    }
    return rc;
}

static void try_write_client(int port, void *context)
{
    int fd = t_connect(port);
    char byte;
    (void)context;
    t_wait_records(1);
    for (int i = 0; i < t_recorded(0) * 1000; i++) {
        CHECK_MEM(&byte, t_recv(fd, &byte, 1), "d", 1);
    }
    t_sends(fd, "x");
    t_expect(fd, "end");
    t_leave(fd);
}

TEST_STREAM(test_try_write)
{
    t_case c = {.handler = try_write_handler, .client = try_write_client,
                .options = {.data_size = sizeof(int), .max_write_buffer_size = WRITE_LIMIT,
                            .write_high_water = HIGH_WATER}};
    t_run(&c);
}

#define LONG_TEXT 100000

static int formats_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static const tsrv_slice slices[] = {{"one ", 4}, {"", 0}, {"two ", 4}, {"three", 5}};
    (void)address, (void)context;
    CHECK_INT(tsrv_write(stream, "[", 1), TSRV_OK);
    CHECK_INT(tsrv_writev(stream, slices, 4), TSRV_OK);
    CHECK_INT(tsrv_writev(stream, slices, 0), TSRV_OK);
    CHECK_INT(tsrv_printf(stream, "] %d%% %s\n", 5, "of"), TSRV_OK);
    CHECK_INT(tsrv_printf(stream, "%0*d", LONG_TEXT, 7), TSRV_OK);
    CHECK_INT(tsrv_printf(stream, "%s", ""), TSRV_OK);
    return tsrv_write(stream, "end", 3);
}

static void formats_client(int port, void *context)
{
    static char text[LONG_TEXT + 1];
    int fd = t_connect(port);
    (void)context;
    snprintf(text, sizeof text, "%0*d", LONG_TEXT, 7);
    t_expect(fd, "[one two three] 5% of\n");
    t_expect(fd, text);
    t_expect(fd, "end");
    t_leave(fd);
}

TEST_STREAM(test_writev_and_printf)
{
    t_case c = {.handler = formats_handler, .client = formats_client};
    t_run(&c);
}

/* A file with the pattern in it, without a name. */
static int pattern_file(size_t size)
{
    FILE *file = tmpfile();
    char *data = new_pattern(size);
    CHECK(file != NULL);
    CHECK_INT(fwrite(data, 1, size, file), size);
    CHECK_INT(fflush(file), 0);
    int fd = dup(fileno(file));
    CHECK(fd >= 0);
    fclose(file);
    free(data);
    return fd;
}

static int sendfile_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    size_t size = *(size_t *)context;
    bool *written = (bool *)tsrv_data(stream);
    tsrv_slice slice;
    (void)address;
    if (!*written) {
        int fd = pattern_file(size);
        *written = true;
        limit_output(stream);
        CHECK_INT(tsrv_sendfile(stream, fd, 0, 0), TSRV_OK);
        CHECK_INT(tsrv_write(stream, "before", 6), TSRV_OK);
        CHECK_INT(tsrv_sendfile(stream, fd, 0, size), TSRV_OK);
        CHECK_INT(tsrv_write(stream, "between", 7), TSRV_OK);
        CHECK_INT(tsrv_sendfile(stream, fd, 65, 2), TSRV_OK);
        CHECK_INT(tsrv_write(stream, "after", 5), TSRV_OK);
        close(fd);
    }
    return tsrv_read_some(stream, 0, &slice);
}

static void sendfile_client(int port, void *context)
{
    int fd = t_connect(port);
    t_expect(fd, "before");
    expect_pattern_from(fd, 0, *(size_t *)context);
    t_expect(fd, "between");
    t_expect(fd, "no");
    t_expect(fd, "after");
    t_finish(fd);
}

/* Much more than the stream may hold, in order with the writes around it. */
TEST_STREAM(test_sendfile)
{
    size_t size = bulk(4 << 20, 256 << 10);
    t_case c = {.handler = sendfile_handler, .client = sendfile_client, .context = &size,
                .options = {.data_size = sizeof(bool), .max_write_buffer_size = WRITE_LIMIT,
                            .write_high_water = HIGH_WATER}};
    t_run(&c);
}

static int short_file_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *written = (bool *)tsrv_data(stream);
    tsrv_slice slice;
    (void)address, (void)context;
    if (!*written) {
        int fd = pattern_file(100);
        *written = true;
        int rc = tsrv_sendfile(stream, fd, 0, 200);
        CHECK(rc == TSRV_OK || rc == -EIO);
        close(fd);
    }
    return tsrv_read_some(stream, 0, &slice);
}

TEST_STREAM(test_sendfile_of_a_short_file)
{
    t_case c = {.handler = short_file_handler, .on_close = t_record_reason,
                .client = drained_client, .options = {.data_size = sizeof(bool)}};
    t_run(&c);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), -EIO);
}

static int huge_file_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    size_t size = 4294967296u - 100;
    int fd = pattern_file(100);
    (void)address;
    (void)context;
    CHECK_INT(tsrv_sendfile(stream, fd, 0, size), TSRV_OK);
    CHECK_INT(tsrv_unsent_size(stream), size);
    for (size_t i = 1; i <= 5; i++) {
        CHECK_INT(tsrv_write(stream, "thirty bytes, and no one fewer", 30), TSRV_OK);
        CHECK(tsrv_unsent_size(stream) == (30 * i <= SIZE_MAX - size ? size + 30 * i : SIZE_MAX));
    }
    CHECK_INT(tsrv_sendfile(stream, fd, 0, size), TSRV_OK);
    CHECK(tsrv_unsent_size(stream) >= size);
    close(fd);
    tsrv_abort(stream);
    return 0;
}

/* What is unsent may be more than memory could hold, where that has 32 bits. In callback mode nothing
 * is sent before the handler returns. */
TEST_CALLBACK(unsent_output_of_more_than_4_gib)
{
    t_case c = {.handler = huge_file_handler, .on_close = t_record_reason, .client = drained_client};
    t_run(&c);
}

static int no_file_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int fd = *(int *)context;
    (void)address;
    CHECK_INT(tsrv_sendfile(stream, fd, 0, 1), fd < 0 ? -EBADF : TSRV_EINVAL);
    return 0;
}

TEST_STREAM(test_sendfile_of_no_file)
{
    int fds[2], none = -1;
    CHECK(pipe(fds) == 0);
    t_case c = {.handler = no_file_handler, .on_close = t_record_reason, .client = drained_client,
                .context = &fds[0]};
    t_run(&c);
    c.context = &none;
    t_records_used = 0;
    t_run(&c);
    t_close_all(fds, 2);
}

static int flush_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *written = (bool *)tsrv_data(stream);
    size_t size = *(size_t *)context;
    (void)address;
    if (!*written) {
        char *data = new_pattern(size);
        *written = true;
        limit_output(stream);
        CHECK_INT(tsrv_write(stream, data, size), TSRV_OK);
        free(data);
    }
    int rc = tsrv_flush(stream);
    if (rc == TSRV_OK) {
        CHECK_INT(tsrv_unsent_size(stream), 0);
        t_record(1);
        rc = tsrv_write(stream, "end", 3);
    }
    return rc;
}

static void flush_client(int port, void *context)
{
    int fd = t_connect(port);
    wait_unsent(0);
    CHECK_INT(t_record_count(), 0);
    expect_pattern_from(fd, 0, *(size_t *)context);
    t_expect(fd, "end");
    t_leave(fd);
}

TEST_STREAM(test_flush)
{
    size_t size = bulk(2 << 20, 256 << 10);
    t_case c = {.handler = flush_handler, .client = flush_client, .context = &size,
                .options = {.data_size = sizeof(bool), .write_high_water = SIZE_MAX}};
    t_run(&c);
    CHECK_INT(t_record_count(), 1);
}

typedef struct broken_state {
    int step;
    int code; /* what the flush said */
} broken_state;

static int broken_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    broken_state *state = (broken_state *)tsrv_data(stream);
    tsrv_slice slice;
    int rc;
    (void)address, (void)context;
    if (state->step == 0) {
        if ((rc = tsrv_read_until(stream, "\n", 0, &slice)) != TSRV_OK) {
            return rc;
        }
        t_record(1);
        state->step = 1;
    }
    if (state->step == 1) {
        if ((rc = tsrv_wait(stream, 1000)) == TSRV_EAGAIN) {
            return rc;
        }
        state->step = 2;
    }
    while (state->code == TSRV_OK) {
        if ((rc = tsrv_write(stream, "x", 1)) == TSRV_OK) {
            rc = tsrv_flush(stream);
        }
        if (rc == TSRV_EAGAIN) {
            return rc;
        }
        state->code = rc;
    }
    CHECK(state->code == -EPIPE || state->code == -ECONNRESET);
    CHECK_INT(tsrv_read_some(stream, 0, &slice), state->code);
    CHECK_INT(tsrv_error(stream), state->code);
    return state->code;
}

static void broken_client(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_sends(fd, "go\n");
    t_wait_records(1);
    t_reset(fd);
    t_wait_records(2);
}

/* Writing to a peer that is gone is a code, not a signal. */
TEST_PLAIN_STREAM(test_write_error)
{
    t_case c = {.handler = broken_handler, .on_close = t_record_reason, .client = broken_client,
                .options = {.data_size = sizeof(broken_state)}};
    t_run(&c);
    CHECK_INT(t_record_count(), 2);
    CHECK(t_recorded(1) == -EPIPE || t_recorded(1) == -ECONNRESET);
}

/* ---- ends ----------------------------------------------------------------------------------*/

TEST_STREAM(test_shutdown)
{
    static const call steps[] = {WRITE("bye", TSRV_OK), SHUTDOWN(TSRV_OK),
                                 WRITE("x", TSRV_ECLOSED), SHUTDOWN(TSRV_OK),
                                 UNTIL("\n", 0, TSRV_OK, "still here\n"), BYTES(1, TSRV_EOF, ""),
                                 RETURN(0)};
    PLAY(steps, "<bye", "=", ">still here\n", "|");
}

typedef struct linger_case {
    size_t size; /* of the answer */
    size_t junk; /* that the handler never reads */
    bool close;  /* else the handler just returns */
} linger_case;

static int linger_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    linger_case *l = (linger_case *)context;
    tsrv_slice slice;
    int rc = tsrv_read_until(stream, "\n", 0, &slice);
    (void)address;
    if (rc != TSRV_OK) {
        return rc;
    }
    rc = pattern_handler(stream, address, &l->size);
    CHECK_INT(rc, TSRV_OK);
    if (l->close) {
        CHECK_INT(tsrv_close(stream), TSRV_OK);
        CHECK_INT(tsrv_close(stream), TSRV_OK);
        CHECK_INT(tsrv_read_some(stream, 0, &slice), TSRV_ECLOSED);
        CHECK_INT(tsrv_write(stream, "x", 1), TSRV_ECLOSED);
        CHECK_INT(tsrv_try_write(stream, "x", 1), TSRV_ECLOSED);
        CHECK_INT(tsrv_flush(stream), TSRV_ECLOSED);
        CHECK_INT(tsrv_error(stream), TSRV_OK);
    }
    return 0;
}

static void linger_client(int port, void *context)
{
    linger_case *l = (linger_case *)context;
    char *junk = new_pattern(l->junk);
    int fd = t_connect(port);
    t_sends(fd, "go\n");
    t_send(fd, junk, l->junk);
    expect_pattern_from(fd, 0, l->size);
    t_leave(fd);
    t_wait_records(1);
    free(junk);
}

/* Unread input turns a plain close into a reset that destroys the answer on its way. */
TEST_STREAM(test_close_lingers)
{
    linger_case context = {bulk(2 << 20, 256 << 10), bulk(128 << 10, 16 << 10), false};
    t_case c = {.handler = linger_handler, .on_close = t_record_reason, .client = linger_client,
                .context = &context};
    t_run(&c);
    context.close = true;
    t_records_used = 0;
    t_run(&c);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), 0);
}

static int abort_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc = tsrv_read_until(stream, "\n", 0, &slice);
    (void)address, (void)context;
    if (rc == TSRV_OK) {
        CHECK_INT(tsrv_write(stream, "never sent", 10), TSRV_OK);
        CHECK_INT(tsrv_abort(stream), TSRV_OK);
        CHECK_INT(tsrv_abort(stream), TSRV_OK);
        CHECK_INT(tsrv_write(stream, "x", 1), TSRV_ECLOSED);
        rc = tsrv_read_some(stream, 0, &slice);
        CHECK_INT(rc, TSRV_ECLOSED);
    }
    return rc;
}

static void abort_client(int port, void *context)
{
    char byte;
    int fd = t_connect(port);
    (void)context;
    t_sends(fd, "go\n");
    CHECK_INT(recv(fd, &byte, 1, 0), -1);
    CHECK_INT(errno, ECONNRESET);
    t_close(fd);
    t_wait_records(1);
}

TEST_STREAM(test_abort)
{
    t_case c = {.handler = abort_handler, .on_close = t_record_reason, .client = abort_client};
    t_run(&c);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), TSRV_ECLOSED);
}

TEST_STREAM(test_close_ends_waiting_reads)
{
    static const call reads[] = {UNTIL("\n", 0, TSRV_ECLOSED, ""), BYTES(9, TSRV_ECLOSED, ""),
                                 MATCH(match_def, 0, TSRV_ECLOSED, ""), INTO(9, TSRV_ECLOSED, ""),
                                 UNTIL_CLOSE(0, TSRV_ECLOSED, ""), BYTES(2000, TSRV_ECLOSED, NULL),
                                 SOME(0, TSRV_ECLOSED, "")};
    for (size_t i = 0; i < COUNT(reads); i++) {
        call steps[] = {WRITE("?", TSRV_OK), {0, 0, 0, 0, NULL, NULL, NULL},
                        BYTES(1, TSRV_ECLOSED, ""), WRITE("x", TSRV_ECLOSED), RETURN(TSRV_ECLOSED)};
        steps[1] = reads[i];
        PLAY(steps, "<?", "c");
        PLAY(steps, "<?", "a", "~");
    }
}

/* A client that is kicked has no more commands executed, although they have arrived. */
TEST_STREAM(test_close_drops_pipelined_input)
{
    static const call steps[] = {UNTIL("\n", 0, TSRV_OK, "one\n"), WRITE("1", TSRV_OK),
                                 PAUSE(5000), UNTIL("\n", 0, TSRV_ECLOSED, ""),
                                 BYTES(1, TSRV_ECLOSED, ""), RETURN(TSRV_ECLOSED)};
    PLAY(steps, ">one\ntwo\nthree\n", "<1", "c");
    PLAY(steps, ">one\ntwo\nthree\n", "<1", "a", "~");
}

static int waiting_write_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    size_t size = *(size_t *)context;
    char *data = new_pattern(size);
    (void)address;
    limit_output(stream);
    CHECK_INT(tsrv_write(stream, data, size), TSRV_ECLOSED);
    CHECK_INT(tsrv_flush(stream), TSRV_ECLOSED);
    free(data);
    return TSRV_ECLOSED;
}

static void waiting_write_client(int port, void *context)
{
    int fd = t_connect(port);
    wait_unsent(HIGH_WATER);
    t_on_loop(close_first, NULL);
    expect_pattern_from(fd, 0, *(size_t *)context);
    t_leave(fd);
}

/* What the waiting write had handed over is sent all the same. */
TEST_COROUTINE(test_close_ends_waiting_write)
{
    size_t size = bulk(2 << 20, 256 << 10);
    t_case c = {.handler = waiting_write_handler, .client = waiting_write_client,
                .context = &size, .options = {.write_high_water = HIGH_WATER}};
    t_run(&c);
}

static int return_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address;
    *(int *)tsrv_data(stream) = 42;
    t_record(1);
    return *(int *)context;
}

static void returned(tsrv_stream *stream, int reason, void *context)
{
    (void)context;
    CHECK_INT(*(int *)tsrv_data(stream), 42);
    CHECK_INT(tsrv_fd(stream), -1);
    CHECK_INT(tsrv_error(stream), TSRV_OK);
    t_record(reason);
}

/* on_close: once, after the handler, with what it returned. */
TEST_PLAIN_STREAM(test_on_close_gets_what_was_returned)
{
    static const int codes[] = {0, 5, TSRV_EOF, TSRV_ETOOLONG, -EIO};
    for (size_t i = 0; i < COUNT(codes); i++) {
        int code = codes[i];
        t_case c = {.handler = return_handler, .on_close = returned, .client = expect_end,
                    .context = &code, .options = {.data_size = sizeof(int)}};
        t_records_used = 0;
        t_run(&c);
        CHECK_INT(t_record_count(), 2);
        CHECK_INT(t_recorded(0), 1);
        CHECK_INT(t_recorded(1), code);
    }
}

static int ignore_error_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc = tsrv_read_bytes(stream, 2, &slice);
    (void)address, (void)context;
    return rc == TSRV_EAGAIN ? rc : 7;
}

static void reset_client(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_sends(fd, "a");
    wait_received(1);
    t_reset(fd);
    t_wait_records(1);
}

TEST_STREAM(test_on_close_gets_the_error)
{
    t_case c = {.handler = ignore_error_handler, .on_close = t_record_reason,
                .client = reset_client};
    t_run(&c);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), -ECONNRESET);
}

/* ---- handlers that return TSRV_EAGAIN without a wait ---------------------------------------*/

static int unwilling_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    t_record(1);
    return TSRV_EAGAIN;
}

static void unwilling_client(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_wait_records(1);
    t_sends(fd, "x");
    t_wait_records(2);
    int64_t start = cpu_ms();
    poll(NULL, 0, 300);
    CHECK_NEAR_MS(cpu_ms() - start, 0, 100);
    CHECK_INT(t_record_count(), 2);
    t_finish(fd);
    t_wait_records(4);
}

/* Called for the connection, for the input, for its end: no busy loop, and no zombie. */
TEST_STREAM(test_handler_that_never_reads)
{
    t_case c = {.handler = unwilling_handler, .on_close = t_record_reason,
                .client = unwilling_client};
    t_run(&c);
    CHECK_INT(t_record_count(), 4);
    CHECK_INT(t_recorded(2), 1);
    CHECK_INT(t_recorded(3), TSRV_EOF);
}

static void one_byte_client(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_sends(fd, "abc");
    t_wait_records(3);
    t_sends(fd, "d");
    t_wait_records(4);
    int64_t start = cpu_ms();
    poll(NULL, 0, 200);
    CHECK_NEAR_MS(cpu_ms() - start, 0, 100);
    t_sends(fd, "ef");
    t_finish(fd);
    t_wait_records(7);
}

/* Called again while input is left, before and after the end. */
TEST_STREAM(test_handler_that_reads_a_byte_a_call)
{
    t_case c = {.handler = one_byte_handler, .on_close = t_record_reason, .client = one_byte_client};
    t_run(&c);
    CHECK_INT(t_record_count(), 7);
    for (int i = 0; i < 6; i++) {
        CHECK_INT(t_recorded(i), 'a' + i);
    }
    CHECK_INT(t_recorded(6), TSRV_EOF);
}

static int second_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    (void)address, (void)context;
    return rc == TSRV_OK ? tsrv_printf(stream, "second %s", line.data) : rc;
}

static int first_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    (void)address, (void)context;
    if (rc == TSRV_OK) {
        CHECK_INT(tsrv_printf(stream, "first %s", line.data), TSRV_OK);
        tsrv_set_handler(stream, second_handler);
        rc = TSRV_EAGAIN;
    }
    return rc;
}

static void set_handler_client(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_sends(fd, "one\ntwo\n");
    t_expect(fd, "first one\nsecond two\n");
    t_leave(fd);
}

TEST_STREAM(test_set_handler)
{
    t_case c = {.handler = first_handler, .client = set_handler_client};
    t_run(&c);
}

/* ---- time ----------------------------------------------------------------------------------*/

static int stall_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *written = (bool *)tsrv_data(stream);
    tsrv_slice slice;
    (void)address;
    if (!*written) {
        *written = true;
        limit_output(stream);
        tsrv_set_timeout(stream, 0, 100);
        int rc = pattern_handler(stream, address, context);
        CHECK_INT(rc, t_mode == TSRV_CALLBACK ? TSRV_OK : TSRV_ETIMEOUT);
    }
    int rc = tsrv_read_some(stream, 0, &slice);
    if (rc != TSRV_EAGAIN) {
        CHECK_INT(rc, TSRV_ETIMEOUT);
        CHECK_INT(tsrv_error(stream), TSRV_ETIMEOUT);
        CHECK_INT(tsrv_write(stream, "x", 1), TSRV_ETIMEOUT);
    }
    return rc;
}

static void stall_client(int port, void *context)
{
    int fd = t_connect(port);
    int64_t start = t_now_ms();
    (void)context;
    t_wait_records(1);
    CHECK_NEAR_MS(t_now_ms() - start, 90, 5000);
    t_expect_reset(fd);
    t_close(fd);
}

TEST_PLAIN_STREAM(test_write_timeout)
{
    size_t size = 1 << 20;
    t_case c = {.handler = stall_handler, .on_close = t_record_reason, .client = stall_client,
                .context = &size,
                .options = {.data_size = sizeof(bool), .write_high_water = HIGH_WATER}};
    t_run(&c);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), TSRV_ETIMEOUT);
}

typedef struct timeout_state {
    int64_t start; /* of the first read, by the loop's clock; 0 = not yet */
    bool over;
} timeout_state;

static int timeout_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    timeout_state *state = (timeout_state *)tsrv_data(stream);
    tsrv_slice slice;
    int rc;
    (void)address, (void)context;
    if (state->start == 0) {
        state->start = tsrv_loop_now_ms(t_loop);
        tsrv_set_timeout(stream, 200, 0);
    }
    if (!state->over) {
        if ((rc = tsrv_read_until(stream, "\n", 0, &slice)) == TSRV_EAGAIN) {
            return rc;
        }
        CHECK_INT(rc, TSRV_ETIMEOUT);
        CHECK_MEM(slice.data, slice.size, "", 0);
        CHECK_NEAR_MS(tsrv_loop_now_ms(t_loop) - state->start, 200, 1500);
        CHECK_INT(tsrv_write(stream, "T", 1), TSRV_OK);
        tsrv_set_timeout(stream, TSRV_NEVER, 0);
        state->over = true;
    }
    if ((rc = tsrv_read_until(stream, "\n", 0, &slice)) == TSRV_OK) {
        rc = tsrv_printf(stream, " %zu", slice.size);
    }
    return rc;
}

static void timeout_client(int port, void *context)
{
    int fd = t_connect(port), sent = 0;
    char text[32];
    struct pollfd answer = {fd, POLLIN, 0};
    (void)context;
    do {
        t_sends(fd, "x");
        sent++;
    } while (poll(&answer, 1, 20) == 0);
    t_sends(fd, "\n");
    snprintf(text, sizeof text, "T %d", sent + 1);
    t_expect(fd, text);
    t_leave(fd);
}

/* One byte every 20 ms does not extend it, and the bytes are still there afterwards. */
TEST_STREAM(test_read_timeout)
{
    t_case c = {.handler = timeout_handler, .client = timeout_client,
                .options = {.data_size = sizeof(timeout_state)}};
    t_run(&c);
}

TEST_STREAM(test_read_timeout_of_the_server)
{
    static const call steps[] = {UNTIL("\n", 0, TSRV_ETIMEOUT, ""), WRITE("1", TSRV_OK),
                                 BYTES(9, TSRV_ETIMEOUT, ""), WRITE("2", TSRV_OK),
                                 TIMEOUT(20000), UNTIL("\n", 0, TSRV_OK, "ab\n"), RETURN(0)};
    tsrv_server_options options = {.read_timeout_ms = 50};
    int64_t start = t_now_ms();
    PLAY_WITH(&options, steps, ">a", "<12", ">b\n");
    CHECK_NEAR_MS(t_now_ms() - start, 90, 5000);
}

TEST_STREAM(test_deadline)
{
    const size_t deadline = (size_t)(200 * t_scale());
    call steps[] = {DEADLINE(deadline), UNTIL("\n", 0, TSRV_OK, "a\n"),
                    UNTIL("\n", 0, TSRV_ETIMEOUT, ""), BYTES(1, TSRV_ETIMEOUT, ""),
                    WAIT(30000, TSRV_ETIMEOUT), WRITE("T", TSRV_OK), DEADLINE(0),
                    UNTIL("\n", 0, TSRV_OK, "b\n"), RETURN(0)};
    int64_t start = t_now_ms();
    PLAY(steps, ">a\n", "<T", ">b\n");
    CHECK_NEAR_MS(t_now_ms() - start, 190, 5000);
}

static void idle_client(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    for (int i = 0; i < 6; i++) {
        t_sends(fd, "x");
        poll(NULL, 0, 60);
    }
    int64_t start = t_now_ms();
    t_expect(fd, "T");
    CHECK_NEAR_MS(t_now_ms() - start, 150, 5000);
    t_sends(fd, "\n");
    t_leave(fd);
    t_wait_records(1);
}

/* Every byte starts it again; afterwards the stream goes on, with the bytes still there. */
TEST_STREAM(test_idle_timeout)
{
    static const call steps[] = {UNTIL("\n", 0, TSRV_ETIMEOUT, ""), WRITE("T", TSRV_OK),
                                 UNTIL("\n", 0, TSRV_OK, "xxxxxx\n"), RETURN(0)};
    play p = {steps, NULL};
    t_case c = {.handler = play_handler, .on_close = t_record_reason, .client = idle_client,
                .context = &p, .options = {.data_size = sizeof(play_state)}};
    c.options.idle_timeout_ms = 300 * t_scale();
    t_run(&c);
    CHECK_INT(t_recorded(0), 0);
}

/* ---- tsrv_wait and tsrv_wake ---------------------------------------------------------------*/

TEST_STREAM(test_wait)
{
    static const call steps[] = {WAIT(0, TSRV_ETIMEOUT), WAIT(30, TSRV_ETIMEOUT), WAKE(), WAKE(),
                                 WAIT(30000, TSRV_OK), WAIT(0, TSRV_ETIMEOUT), WAKE(),
                                 WAIT(0, TSRV_OK), WRITE("?", TSRV_OK), WAIT(30000, TSRV_OK),
                                 WRITE("!", TSRV_OK), BYTES(2, TSRV_OK, "ab"), RETURN(0)};
    int64_t start = t_now_ms();
    PLAY(steps, ">ab", "<?", "w", "<!");
    CHECK_NEAR_MS(t_now_ms() - start, 25, 5000);
}

/* Once, so that a loop around the wait does not spin. */
TEST_STREAM(test_wait_is_woken_by_the_end)
{
    static const call closed[] = {WRITE("?", TSRV_OK), WAIT(30000, TSRV_OK),
                                  WAIT(50, TSRV_ETIMEOUT), RETURN(0)};
    static const call reset[] = {BYTES(1, TSRV_OK, "a"), WAIT(30000, TSRV_OK),
                                 WAIT(50, TSRV_ETIMEOUT), RETURN(-ECONNRESET)};
    PLAY(closed, "<?", "c");
    PLAY(closed, "<?", "a", "~");
    PLAY(reset, ">a", ".", "!");
}
