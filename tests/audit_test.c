/* What two audits of the library found, each by the rule that it broke. */
#include "script.h"

#define KIB ((size_t)1024)
#define MIB ((size_t)1024 * 1024)

/* For scripts of coroutines whose figures the hard mode would change. */
#define TEST_SCRIPT(name) T_TEST(name, T_PER_BACKEND | T_COROUTINES)

#define CHECK_MOST(actual, limit)                                                                  \
    ((int64_t)(actual) <= (int64_t)(limit)                                                         \
         ? (void)0                                                                                 \
         : T_FAIL("CHECK_MOST(%s)\n    actual %lld\n    limit  %lld", #actual,                     \
                  (long long)(actual), (long long)(limit)))
#define CHECK_LEAST(actual, limit)                                                                 \
    ((int64_t)(actual) >= (int64_t)(limit)                                                         \
         ? (void)0                                                                                 \
         : T_FAIL("CHECK_LEAST(%s)\n    actual %lld\n    limit  %lld", #actual,                    \
                  (long long)(actual), (long long)(limit)))

static int closed, reason_of_last;

static void on_close(tsrv_stream *stream, int reason, void *context)
{
    (void)stream, (void)context;
    closed++;
    reason_of_last = reason;
}

static tsrv_stats counted(void)
{
    tsrv_stats stats;
    tsrv_server_stats(s_server, &stats);
    return stats;
}

static void open_with(tsrv_handler handler, tsrv_server_options options)
{
    closed = reason_of_last = 0;
    options.handle_stream = handler;
    options.on_close = on_close;
    s_open(options);
}

static void open_server(tsrv_handler handler)
{
    tsrv_server_options options = {0};
    open_with(handler, options);
}

/* A client whose handler has been called. */
static int join_with_room(int receive_room)
{
    uint64_t before = counted().accepted;
    int64_t limit = s_patience();
    int fd = t_connect_with_room(s_port, receive_room);
    while (counted().accepted == before) {
        s_turn();
        CHECK(t_now_ms() < limit);
    }
    return fd;
}

static int join(void)
{
    return join_with_room(0);
}

static void fill(char *data, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        data[i] = (char)('a' + i % 23);
    }
}

static char *make(size_t size)
{
    char *data = (char *)malloc(size + 1);
    CHECK(data != NULL);
    fill(data, size);
    data[size] = 0;
    return data;
}

/* Have the kernel take little of what is written. */
static void hold_little(tsrv_stream *stream)
{
    int room = 16384;
    CHECK(setsockopt(tsrv_fd(stream), SOL_SOCKET, SO_SNDBUF, &room, sizeof room) == 0);
}

/* How often the library has made a system call or an allocation. */
static const char *counted_names[2];
static int calls_counted;

static void count_call(const char *name)
{
    for (int i = 0; i < 2; i++) {
        calls_counted += counted_names[i] != NULL && strcmp(name, counted_names[i]) == 0;
    }
}

static void count_calls(const char *name, const char *other_name)
{
    counted_names[0] = name;
    counted_names[1] = other_name;
    calls_counted = 0;
    t_seen = count_call;
}

/* ---- a stream that goes while a coroutine lets the others run ------------------------------*/

enum { READ_SOME, READ_UNTIL, READ_BYTES, READ_MATCH, READ_CLOSE, READ_INTO, READ_NOTHING, FLUSH,
       WAIT, READS };

static tsrv_stream *dying, *busy;
static int kind, result, dying_closed, helped;

static size_t match_line(const char *data, size_t size, void *context)
{
    const char *end = (const char *)memchr(data, '\n', size);
    (void)context;
    return end == NULL ? 0 : (size_t)(end - data) + 1;
}

static int call_it(tsrv_stream *stream, tsrv_slice *slice)
{
    static char memory[4];
    switch (kind) {
    case READ_SOME: return tsrv_read_some(stream, 0, slice);
    case READ_UNTIL: return tsrv_read_until(stream, "\r\n", 0, slice);
    case READ_BYTES: return tsrv_read_bytes(stream, 4, slice);
    case READ_MATCH: return tsrv_read_until_match(stream, match_line, NULL, 0, slice);
    case READ_CLOSE: return tsrv_read_until_close(stream, 0, slice);
    case READ_INTO: return tsrv_read_into(stream, memory, sizeof memory);
    case READ_NOTHING: return tsrv_read_bytes(stream, 0, slice);
    case FLUSH: return tsrv_flush(stream);
    default: return tsrv_wait(stream, TSRV_NEVER);
    }
}

/* Woken by the handler of the dying stream, in its last act: uses up its calls, so that the next
 * one has to let the others run first. */
static void call_late(void *context)
{
    tsrv_slice slice;
    (void)context;
    CHECK_INT(tsrv_wait(busy, TSRV_NEVER), TSRV_OK);
    for (int i = 0; i < 256; i++) {
        CHECK_INT(tsrv_read_until(busy, "\n", 0, &slice), TSRV_OK);
    }
    CHECK_INT(dying_closed, 0);
    result = call_it(dying, &slice);
    CHECK_INT(dying_closed, 1); /* it has let them run, and must not touch the stream any more */
    helped = 1;
}

static int die_or_be_busy(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    (void)address, (void)context;
    if (dying == NULL) {
        dying = stream;
        CHECK_INT(tsrv_read_until(stream, "\n", 0, &slice), TSRV_EOF);
        while (busy == NULL) {
            CHECK_INT(tsrv_sleep(1), TSRV_OK);
        }
        CHECK_INT(tsrv_sleep(10), TSRV_OK);
        tsrv_wake(busy);
        return TSRV_OK;
    }
    busy = stream;
    CHECK_INT(tsrv_read_bytes(stream, 1, &slice), TSRV_OK); /* the rest is in the buffer */
    CHECK_INT(tsrv_spawn(s_loop, call_late, NULL), TSRV_OK);
    while (!helped) {
        CHECK_INT(tsrv_sleep(1), TSRV_OK);
    }
    return TSRV_OK;
}

static void note_dying(tsrv_stream *stream, int reason, void *context)
{
    dying_closed += stream == dying;
    on_close(stream, reason, context);
}

/* Between the turns: what a freed stream was is overwritten, should it be looked at. */
static void *overwrite(void)
{
    void *memory = malloc(sizeof(struct tsrv_stream));
    CHECK(memory != NULL);
    memset(memory, 0x5A, sizeof(struct tsrv_stream));
    return memory;
}

static void check_late_call(int which)
{
    enum { LINES = 600 };
    char newlines[LINES];
    void *over = NULL;
    int64_t limit = s_patience();
    tsrv_server_options options = {0};
    dying = busy = NULL;
    dying_closed = helped = closed = 0;
    kind = which;
    options.handle_stream = die_or_be_busy;
    options.on_close = note_dying;
    s_open(options);
    int dead = join();
    t_shut(dead);
    memset(newlines, '\n', sizeof newlines);
    int fd = join();
    t_send(fd, newlines, sizeof newlines);
    while (!helped) {
        s_turn();
        if (dying_closed && over == NULL) {
            over = overwrite();
        }
        CHECK(t_now_ms() < limit);
    }
    free(over);
    s_expect_eof(dead);
    t_close(dead);
    t_close(fd);
    s_until(&closed, 2);
    s_close();
    CHECK_INT(result, which == WAIT ? TSRV_OK : TSRV_ECLOSED);
}

TEST_SCRIPT(a_read_that_yields_outlives_its_stream)
{
    for (int which = READ_SOME; which <= READ_INTO; which++) {
        check_late_call(which);
    }
}

TEST_SCRIPT(a_read_of_nothing_that_yields_outlives_its_stream)
{
    check_late_call(READ_NOTHING);
}

TEST_SCRIPT(a_flush_that_yields_outlives_its_stream)
{
    check_late_call(FLUSH);
}

TEST_SCRIPT(a_wait_that_yields_outlives_its_stream)
{
    check_late_call(WAIT);
}

/* A client that takes all before each of the server's sends, so that no write has to wait. */
static int taker = -1;

static void take_before_sends(const char *name)
{
    static char buffer[65536];
    if (strcmp(name, "send") == 0 || strcmp(name, "sendmsg") == 0) {
        while (recv(taker, buffer, sizeof buffer, MSG_DONTWAIT) > 0) {
        }
    }
}

enum { ABORT_IT, CLOSE_IT, WRITE_IT = 0, PIECES_IT, PRINT_IT };
static int writing, writes, ended, how_it_ends, how_it_writes;

static void end_when_writing(void *context)
{
    (void)context;
    while (!writing) {
        CHECK_INT(tsrv_sleep(0), TSRV_OK);
    }
    ended = 1;
    if (how_it_ends == ABORT_IT) {
        tsrv_abort(dying);
    } else {
        tsrv_close(dying);
    }
}

/* Writes until a write fails; the first one that lets the others run has to. */
static void write_late(void *context)
{
    static char block[32768];
    tsrv_slice pieces[2] = {{block, 20000}, {block, 12768}};
    (void)context;
    memset(block, 'w', sizeof block);
    writing = 1;
    do {
        switch (how_it_writes) {
        case WRITE_IT: result = tsrv_write(dying, block, sizeof block); break;
        case PIECES_IT: result = tsrv_writev(dying, pieces, 2); break;
        default: result = tsrv_printf(dying, "%.*s", (int)sizeof block, block); break;
        }
        writes++;
        CHECK(result != TSRV_OK || !ended);
    } while (result == TSRV_OK && writes < 200);
    helped = 1;
}

static int spawn_both(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    dying = stream;
    CHECK_INT(tsrv_spawn(s_loop, end_when_writing, NULL), TSRV_OK);
    CHECK_INT(tsrv_spawn(s_loop, write_late, NULL), TSRV_OK);
    return tsrv_read_until_close(stream, 0, NULL);
}

static void check_late_write(int ends, int writes_how)
{
    how_it_ends = ends;
    how_it_writes = writes_how;
    writing = writes = ended = helped = 0;
    open_server(spawn_both);
    taker = t_connect(s_port);
    t_seen = take_before_sends;
    s_until(&helped, 1);
    t_seen = NULL;
    CHECK_INT(result, TSRV_ECLOSED);
    CHECK_MOST(writes, 40); /* a MiB, and not all of them */
    CHECK_LEAST(writes, 2);
    t_close(taker);
    s_until(&closed, 1);
    CHECK_INT(closed, 1);
    s_close();
}

TEST_SCRIPT(a_write_that_yields_learns_that_its_stream_has_ended)
{
    for (int i = 0; i < 6; i++) {
        check_late_write(i % 2, i / 2);
    }
}

/* ---- tsrv_read_until_match ----------------------------------------------------------------*/

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
    open_with(read_match, options);
    return join();
}

static void close_match(int fd)
{
    t_shut(fd);
    s_expect_eof(fd);
    t_close(fd);
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
    char *data = make(9000);
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
    char *data = make(2001);
    s_send(fd, data, 2000);
    s_run_ms(100);
    CHECK_INT(step, 0);
    t_send(fd, data, 1);
    s_until(&step, 1);
    CHECK_INT(codes[0], TSRV_ETOOLONG);
    close_match(fd);
    free(data);
}

/* ---- tsrv_set_deadline while a call waits -------------------------------------------------*/

enum { D_READ, D_READ_TIMED, D_READ_INTO, D_DROP, D_WAIT, D_WAIT_TIMED, D_FLUSH, D_KINDS };
static const char *const d_names[] = {"read", "read with a timeout", "read into memory",
                                      "read that drops", "wait", "wait with a timeout", "flush"};

enum { D_OUTPUT = 200000 };
static int d_kind, d_first_ms, d_begun, d_over, d_code;
static int64_t d_start, d_took;
static tsrv_stream *d_stream;
static char d_memory[10];

static int d_call(tsrv_stream *stream)
{
    tsrv_slice slice;
    switch (d_kind) {
    case D_READ:
    case D_READ_TIMED: return tsrv_read_until(stream, "\n", 0, &slice);
    case D_READ_INTO: return tsrv_read_into(stream, d_memory, sizeof d_memory);
    case D_DROP: return tsrv_read_bytes(stream, sizeof d_memory, NULL);
    case D_WAIT: return tsrv_wait(stream, TSRV_NEVER);
    case D_WAIT_TIMED: return tsrv_wait(stream, 10000);
    default: return tsrv_flush(stream);
    }
}

static void d_begin(tsrv_stream *stream)
{
    d_begun = 1;
    d_stream = stream;
    d_start = v_ms();
    if (d_first_ms != 0) {
        tsrv_set_deadline(stream, d_first_ms);
    }
    if (d_kind == D_READ_TIMED) {
        tsrv_set_timeout(stream, 10000, 0);
    }
    if (d_kind == D_FLUSH) {
        char *data = make(D_OUTPUT);
        hold_little(stream);
        CHECK_INT(tsrv_write(stream, data, D_OUTPUT), TSRV_OK);
        free(data);
    }
}

static int d_handle(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    (void)address, (void)context;
    if (!d_begun) {
        d_begin(stream);
    }
    if (!d_over) {
        rc = d_call(stream);
        if (rc == TSRV_EAGAIN) {
            return rc;
        }
        d_code = rc;
        d_took = v_ms() - d_start;
        d_over = 1;
        tsrv_set_deadline(stream, 0);
    }
    return tsrv_read_until_close(stream, 0, NULL);
}

/* What a timer does at_ms after the call began. */
typedef struct setting {
    int at_ms, delay_ms;
} setting;

static tsrv_timer d_timers[2];

static void set_deadline(void *context)
{
    tsrv_set_deadline(d_stream, ((setting *)context)->delay_ms);
}

static int d_open(int which, int first_ms, setting *plan, int count)
{
    tsrv_server_options options = {0};
    d_kind = which;
    d_first_ms = first_ms;
    d_begun = d_over = 0;
    options.write_timeout_ms = TSRV_NEVER;
    open_with(d_handle, options);
    int fd = join_with_room(4096);
    for (int i = 0; i < count; i++) {
        CHECK_INT(tsrv_timer_start(s_loop, &d_timers[i], plan[i].at_ms, set_deadline, &plan[i]),
                  TSRV_OK);
    }
    return fd;
}

static void d_close(int fd)
{
    if (d_kind == D_FLUSH) {
        t_reset(fd);
    } else {
        t_shut(fd);
        s_expect_eof(fd);
        t_close(fd);
    }
    s_until(&closed, 1);
    s_close();
}

/* The call ends with its deadline, after so many milliseconds. */
static void check_deadline(int first_ms, setting *plan, int count, int expected_ms)
{
    for (int which = 0; which < D_KINDS; which++) {
        int fd = d_open(which, first_ms, plan, count);
        s_run_ms(700);
        if (!d_over) {
            T_FAIL("a %s still waits, long after its deadline", d_names[which]);
        }
        if (d_code != TSRV_ETIMEOUT || d_took < expected_ms || d_took > expected_ms + 10) {
            T_FAIL("a %s ended after %lld ms, not %d: %s", d_names[which], (long long)d_took,
                   expected_ms, tsrv_strerror(d_code));
        }
        d_close(fd);
    }
}

TEST_SOFT(a_deadline_set_during_a_call_ends_it)
{
    setting plan[] = {{50, 100}};
    check_deadline(0, plan, 1, 150);
}

TEST_SOFT(an_earlier_deadline_set_during_a_call_ends_it)
{
    setting plan[] = {{50, 1000}, {100, 100}};
    check_deadline(0, plan, 2, 200);
}

TEST_SOFT(a_deadline_set_before_a_call_can_come_nearer)
{
    setting plan[] = {{50, 100}};
    check_deadline(1000, plan, 1, 150);
}

TEST_SOFT(a_deadline_set_before_a_call_can_be_put_off)
{
    setting plan[] = {{50, 300}};
    check_deadline(100, plan, 1, 350);
}

TEST_SOFT(a_deadline_set_during_a_call_can_be_put_off)
{
    setting plan[] = {{50, 100}, {100, 300}};
    check_deadline(0, plan, 2, 400);
}

/* Ends what waits, in good order. */
static void d_satisfy(int fd)
{
    if (d_kind == D_WAIT || d_kind == D_WAIT_TIMED) {
        tsrv_wake(d_stream);
    } else if (d_kind == D_FLUSH) {
        char *data = make(D_OUTPUT), *got = make(D_OUTPUT);
        int code;
        CHECK_MEM(got, s_recv(fd, got, D_OUTPUT, &code), data, D_OUTPUT);
        free(got);
        free(data);
    } else {
        t_sends(fd, "012345678\n");
    }
    s_until(&d_over, 1);
}

static void check_no_deadline(int first_ms, setting *plan, int count)
{
    for (int which = 0; which < D_KINDS; which++) {
        int fd = d_open(which, first_ms, plan, count);
        s_run_ms(500);
        if (d_over) {
            T_FAIL("a %s ended after %lld ms: %s", d_names[which], (long long)d_took,
                   tsrv_strerror(d_code));
        }
        d_satisfy(fd);
        CHECK_INT(d_code, TSRV_OK);
        d_close(fd);
    }
}

TEST_SOFT(a_deadline_set_before_a_call_can_be_taken_away)
{
    setting plan[] = {{50, 0}};
    check_no_deadline(100, plan, 1);
}

TEST_SOFT(a_deadline_set_during_a_call_can_be_taken_away)
{
    setting plan[] = {{50, 100}, {100, 0}};
    check_no_deadline(0, plan, 2);
}

/* ---- a callback-mode handler that ends or wakes its own stream -----------------------------*/

enum { O_ABORT, O_CLOSE, O_REFUSED, O_TRY_AND_ABORT, O_WAKE, O_WAKE_TIMED, O_DRAIN };
enum { WOKEN = 7 };
static int own, own_calls;

static void end_own(tsrv_stream *stream)
{
    static char large[70000];
    switch (own) {
    case O_ABORT: tsrv_abort(stream); break;
    case O_CLOSE: tsrv_close(stream); break;
    case O_REFUSED: CHECK_INT(tsrv_write(stream, large, sizeof large), TSRV_EFULL); break;
    case O_TRY_AND_ABORT:
        CHECK_INT(tsrv_try_write(stream, large, sizeof large), TSRV_EFULL);
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
    open_with(end_after_eagain, options);
    return join();
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
    s_until(&closed, 1);
    s_settle();
    CHECK_INT(closed, 1);
    CHECK_INT(own_calls, 2);
    CHECK_INT(reason_of_last, reason);
    s_close();
    CHECK_INT(closed, 1);
}

/* tsrv_server_free does not wait for a client that stays. */
static void check_own_end_is_freed(int which)
{
    int fd = open_own(which);
    s_close();
    CHECK_INT(closed, 1);
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
    open_server(wake_and_return);
    int fd = join();
    s_run_ms(200);
    CHECK_INT(own_calls, 1); /* nothing of that wait is left */
    t_sends(fd, "more\n");
    s_until(&got_lines, 1);
    t_shut(fd);
    s_expect_eof(fd);
    t_close(fd);
    s_until(&closed, 1);
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
    open_server(time_out_and_return);
    int fd = join();
    s_run_ms(300);
    CHECK_INT(waits_over, 1);
    CHECK_INT(own_calls, 2);
    t_sends(fd, "more\n");
    s_until(&got_lines, 1);
    t_shut(fd);
    s_expect_eof(fd);
    t_close(fd);
    s_until(&closed, 1);
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
    open_server(give_each_its_time);
    int fd = join();
    s_run_ms(150);
    t_sends(fd, "a\n");
    s_until(&got_lines, 1);
    s_until(&waits_over, 1);
    CHECK_INT(got_code, TSRV_ETIMEOUT);
    CHECK_LEAST(wait_ended - line_came, 200);
    CHECK_MOST(wait_ended - line_came, 210);
    s_expect_eof(fd);
    t_close(fd);
    s_until(&closed, 1);
    s_close();
}

/* ---- the handler's waits, and those of others on its stream -------------------------------*/

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
    open_server(wait_a_second);
    int fd = join();
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
    s_expect_eof(fd);
    t_close(fd);
    s_until(&closed, 1);
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
        hold_little(stream);
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
    open_server(flush_once);
    int fd = join_with_room(4096);
    s_run_ms(100);
    CHECK_INT(own_calls, 1);
    CHECK_INT(tsrv_spawn(s_loop, flush_too, NULL), TSRV_OK);
    s_run_ms(100);
    CHECK_INT(waits_over + others_flushed, 0);
    CHECK_INT(s_recv(fd, got, sizeof got, &code), sizeof got);
    s_until(&others_flushed, 1);
    s_until(&waits_over, 1);
    s_expect_eof(fd);
    t_close(fd);
    s_until(&closed, 1);
    s_close();
}

/* ---- a reset while nobody reads -----------------------------------------------------------*/

enum { R_SHUTDOWN = 1, R_UNREAD = 2 };
static int r_case, r_begun, r_woken, r_error;

static int wait_for_the_reset(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    (void)address, (void)context;
    if (!r_begun) {
        r_begun = 1;
        if ((r_case & R_SHUTDOWN) != 0) {
            CHECK_INT(tsrv_shutdown(stream), TSRV_OK);
        }
    }
    do {
        rc = tsrv_wait(stream, TSRV_NEVER);
        if (rc == TSRV_EAGAIN) {
            return rc;
        }
        CHECK_INT(rc, TSRV_OK);
        r_woken++;
        r_error = tsrv_error(stream);
    } while (r_error == TSRV_OK && tsrv_fd(stream) >= 0);
    return TSRV_OK;
}

TEST_SOFT(a_reset_wakes_a_wait_in_every_state)
{
    for (r_case = 0; r_case < 4; r_case++) {
        r_begun = r_woken = r_error = 0;
        open_server(wait_for_the_reset);
        int fd = join();
        if ((r_case & R_UNREAD) != 0) {
            t_sends(fd, "abc");
        }
        s_settle();
        CHECK_INT(r_woken, 0);
        t_reset(fd);
        for (int i = 0; i < 20 && closed == 0; i++) {
            s_turn();
        }
        if (closed != 1 || r_error != -ECONNRESET || r_woken != 1) {
            T_FAIL("%s tsrv_shutdown, %s unread bytes: closed %d times, woken %d times, %s",
                   (r_case & R_SHUTDOWN) != 0 ? "after" : "without",
                   (r_case & R_UNREAD) != 0 ? "with" : "without", closed, r_woken,
                   tsrv_strerror(r_error));
        }
        CHECK_INT(reason_of_last, -ECONNRESET);
        s_close();
    }
}

/* After our own FIN, the peer's is a hang-up too, and not a reset. */
TEST_SOFT(an_end_after_our_end_is_no_reset)
{
    r_begun = r_woken = r_error = 0;
    r_case = R_SHUTDOWN;
    open_server(wait_for_the_reset);
    int fd = join();
    t_sends(fd, "abc");
    s_settle();
    t_shut(fd);
    s_run_ms(200);
    CHECK_INT(r_error, TSRV_OK);
    CHECK_INT(closed, 0);
    CHECK_MOST(r_woken, 1);
    t_reset(fd);
    s_close();
    CHECK_INT(closed, 1);
}

/* ---- the end of a drain's grace -----------------------------------------------------------*/

enum { G_SLEEP, G_WAIT_FD, G_CONNECT, G_WAITS };
static int g_wait, g_code, g_next_code, g_done, g_pipe[2];
static int64_t g_took, g_next_took;

static int g_wait_for(void)
{
    tsrv_stream *made;
    switch (g_wait) {
    case G_SLEEP: return tsrv_sleep(4000);
    case G_WAIT_FD: return tsrv_wait_fd(g_pipe[0], TSRV_READABLE, 4000);
    default: return tsrv_connect("127.0.0.1", s_port, NULL, &made);
    }
}

/* Ready to run whenever the loop looks, until its stream is gone. Then it waits. */
static int run_on(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int64_t start;
    (void)address, (void)context;
    while (tsrv_fd(stream) >= 0) {
        v_now += 10 * 1000000u;
        CHECK_INT(tsrv_sleep(0), TSRV_OK);
    }
    start = v_ms();
    g_code = g_wait_for();
    g_took = v_ms() - start;
    start = v_ms();
    g_next_code = tsrv_sleep(50);
    g_next_took = v_ms() - start;
    g_done = 1;
    return TSRV_OK;
}

static void check_end_of_grace(int wait)
{
    g_wait = wait;
    g_done = 0;
    CHECK(pipe(g_pipe) == 0);
    open_server(run_on);
    int fd = join();
    CHECK_INT(tsrv_server_drain(s_server, 300), TSRV_EAGAIN);
    s_until(&g_done, 1);
    CHECK_INT(g_code, TSRV_ECLOSED);
    CHECK_MOST(g_took, 1);
    CHECK_INT(g_next_code, TSRV_OK); /* only once */
    CHECK_LEAST(g_next_took, 50);
    s_expect_reset(fd);
    t_close(fd);
    s_until(&closed, 1);
    CHECK_INT(reason_of_last, TSRV_OK);
    s_close();
    close(g_pipe[0]);
    close(g_pipe[1]);
}

TEST_SCRIPT(the_end_of_the_grace_ends_the_next_wait_of_one_that_runs)
{
    for (int wait = 0; wait < G_WAITS; wait++) {
        check_end_of_grace(wait);
    }
}

/* A coroutine that waits in something else has that wait ended, and no other. */
static int sleep_twice(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    g_code = tsrv_sleep(4000);
    g_next_code = tsrv_sleep(50);
    g_done = 1;
    return TSRV_OK;
}

TEST_SCRIPT(the_end_of_the_grace_ends_one_wait_of_one_that_waits)
{
    g_done = 0;
    open_server(sleep_twice);
    int fd = join();
    int64_t start = v_ms();
    CHECK_INT(tsrv_server_drain(s_server, 300), TSRV_EAGAIN);
    s_until(&g_done, 1);
    CHECK_INT(g_code, TSRV_ECLOSED);
    CHECK_INT(g_next_code, TSRV_OK);
    CHECK_LEAST(v_ms() - start, 350);
    CHECK_MOST(v_ms() - start, 500);
    t_close(fd);
    s_close();
}

/* ---- a write that is lost while it waits for its turn --------------------------------------*/

enum { L_WRITE, L_WRITEV, L_PRINTF, L_SENDFILE, L_KINDS };
enum { L_HUGE = 40 << 20 };
static tsrv_server *sink;
static tsrv_stream *upstream;
static int sink_port, sink_reads, sink_done, l_kind, l_huge_done, l_huge_code, l_codes[2], l_error;
static FILE *l_file;
static char *l_huge;
static size_t sink_got;

/* Reads nothing, then everything. Nothing of a later write may come. */
static int take_late(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice some;
    int rc;
    (void)address, (void)context;
    while (!sink_reads) {
        CHECK_INT(tsrv_sleep(10), TSRV_OK);
    }
    while ((rc = tsrv_read_some(stream, 0, &some)) == TSRV_OK) {
        CHECK(memchr(some.data, 'B', some.size) == NULL);
        CHECK(memchr(some.data, 'C', some.size) == NULL);
        sink_got += some.size;
    }
    sink_done = 1;
    return rc;
}

static void write_huge(void *context)
{
    (void)context;
    l_huge_code = tsrv_write(upstream, l_huge, L_HUGE);
    l_huge_done = 1;
}

static int write_one(char byte)
{
    char text[2] = {byte, byte};
    tsrv_slice pieces[2] = {{text, 1}, {text + 1, 1}};
    switch (l_kind) {
    case L_WRITE: return tsrv_write(upstream, text, 1);
    case L_WRITEV: return tsrv_writev(upstream, pieces, 2);
    case L_PRINTF: return tsrv_printf(upstream, "%c", byte);
    default: return tsrv_sendfile(upstream, fileno(l_file), 0, 1);
    }
}

/* Its second write waits behind the helper's huge one, until the grace of its server is over. */
static int write_behind(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    CHECK_INT(tsrv_connect("127.0.0.1", sink_port, NULL, &upstream), TSRV_OK);
    CHECK_INT(tsrv_spawn(s_loop, write_huge, NULL), TSRV_OK);
    CHECK_INT(tsrv_sleep(20), TSRV_OK);
    l_codes[0] = write_one('B');
    l_error = tsrv_error(upstream);
    l_codes[1] = write_one('C');
    sink_reads = 1;
    while (!l_huge_done) {
        tsrv_sleep(1);
    }
    tsrv_close(upstream);
    return TSRV_OK;
}

static void check_lost_write(int which)
{
    tsrv_server_options options = {0};
    l_kind = which;
    sink_reads = sink_done = l_huge_done = 0;
    sink_got = 0;
    open_server(write_behind);
    options.handle_stream = take_late;
    sink = s_new_server(options);
    sink_port = s_listen(sink);
    int fd = join();
    s_run_ms(100);
    CHECK_INT(tsrv_server_drain(s_server, 100), TSRV_EAGAIN);
    s_until(&sink_done, 1);
    s_until(&closed, 1);
    CHECK_INT(l_codes[0], TSRV_ECLOSED);
    CHECK(l_error != TSRV_OK || l_codes[1] == TSRV_ECLOSED);
    CHECK(l_codes[1] < 0);
    CHECK(l_huge_code < 0);
    CHECK(sink_got < L_HUGE);
    t_close(fd);
    tsrv_server_free(sink);
    s_close();
}

TEST_SCRIPT(a_write_that_loses_its_turn_ends_the_stream)
{
    l_huge = (char *)calloc(1, L_HUGE);
    l_file = tmpfile();
    CHECK(l_huge != NULL && l_file != NULL && fwrite("BB", 2, 1, l_file) == 1);
    fflush(l_file);
    for (int which = 0; which < L_KINDS; which++) {
        check_lost_write(which);
    }
    fclose(l_file);
    free(l_huge);
}

/* ---- no memory for stacks -----------------------------------------------------------------*/

static int echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        tsrv_write(stream, line.data, line.size);
    }
    return rc;
}

enum { CROWD = 80 };
static int crowd[CROWD], before_crowd;

/* One client has its stack; then there is no memory for any, and many clients come. */
static void open_without_stacks(void)
{
    open_server(echo);
    before_crowd = join();
    t_fault_name = "mmap";
    t_fault_calls = 0;
    t_fault_at = 1;
    t_fault_sticky = true;
    for (int i = 0; i < CROWD; i++) {
        crowd[i] = t_connect(s_port);
        t_sends(crowd[i], "x\n");
    }
}

/* There is memory again: who was not lost is served. */
static void close_with_stacks(void)
{
    int served = 0, lost = 0;
    t_fault_at = 0;
    for (int i = 0; i < CROWD; i++) {
        char answer[2];
        int code;
        size_t got = s_recv(crowd[i], answer, 2, &code);
        served += got == 2;
        lost += code == ECONNRESET;
        t_close(crowd[i]);
    }
    CHECK_INT(lost, t_fault_hits);
    CHECK_INT(served, CROWD - lost);
    t_close(before_crowd);
    s_until(&closed, served + 1);
    s_settle();
    CHECK_INT(closed, served + 1); /* none for those whose handler was never entered */
    s_close();
}

TEST_SCRIPT(without_memory_for_stacks_the_listener_pauses)
{
    open_without_stacks();
    s_settle();
    CHECK_MOST(t_fault_hits, 2);
    CHECK_INT(s_log_lines, 1);
    CHECK_LEAST(counted().accept_pauses, 1);
    s_run_ms(2000);
    CHECK_LEAST(t_fault_hits, 2); /* it tries again */
    CHECK_MOST(t_fault_hits, 45);
    CHECK_LEAST(s_log_lines, 1);
    CHECK_MOST(s_log_lines, 3); /* one a second */
    CHECK_INT(counted().accept_errors, t_fault_hits);
    CHECK_INT(counted().open, 1);
    t_sends(before_crowd, "still here\n");
    s_expect(before_crowd, "still here\n");
    close_with_stacks();
}

/* 50, 100, 200, 400, 800 and 1000 ms: each of these tries costs a client its connection. */
TEST_SCRIPT(without_memory_for_stacks_the_pauses_grow)
{
    open_without_stacks();
    s_run_ms(3500);
    CHECK_LEAST(t_fault_hits, 4);
    CHECK_MOST(t_fault_hits, 10);
    close_with_stacks();
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
    open_server(serve_until_stopped);
    int fd = join();
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
    s_expect_eof(fd);
    t_close(fd);
    s_until(&closed, 1);
    CHECK_INT(reason_of_last, TSRV_EOF);
    s_close();
}

TEST_STREAM(a_request_after_the_drains_end_is_not_taken)
{
    for (int which = 0; which < T_LATE_READS; which++) {
        check_late_request(which);
    }
}

/* ---- tsrv_writev --------------------------------------------------------------------------*/

/* Answers a line with itself in pieces, some of which are empty. */
static int answer_in_pieces(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice pieces[6] = {{"", 0}, {"<", 1}, {NULL, 0}, {NULL, 0}, {">\n", 2}, {"", 0}};
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &pieces[3])) == TSRV_OK) {
        pieces[3].size--;
        CHECK_INT(tsrv_writev(stream, pieces, 6), TSRV_OK);
        CHECK_INT(tsrv_writev(stream, pieces, 1), TSRV_OK);
        CHECK_INT(tsrv_writev(stream, pieces, 0), TSRV_OK);
    }
    return rc;
}

TEST_STREAM(pieces_of_any_size_come_as_one)
{
    open_server(answer_in_pieces);
    int fd = join();
    t_sends(fd, "one\n\nthree\n");
    s_expect(fd, "<one>\n<>\n<three>\n");
    t_shut(fd);
    s_expect_eof(fd);
    t_close(fd);
    s_close();
}

TEST_SOFT(pieces_need_no_memory_of_their_own)
{
    open_server(answer_in_pieces);
    int fd = join();
    for (int i = 0; i < 210; i++) {
        if (i == 10) {
            count_calls("malloc", "realloc");
        }
        t_sends(fd, "ask\n");
        s_expect(fd, "<ask>\n");
    }
    t_seen = NULL;
    CHECK_INT(calls_counted, 0);
    t_shut(fd);
    s_expect_eof(fd);
    t_close(fd);
    s_close();
}

/* Many lines in one go, so that the answers fill several blocks of the queue. */
TEST_SOFT(pieces_that_fill_blocks_need_no_memory_of_their_own)
{
    enum { LINES = 200, LINE = 300, ROUNDS = 12 };
    static char lines[LINES * LINE], answers[LINES * (LINE + 2)], got[sizeof answers];
    for (int i = 0; i < LINES; i++) {
        char *line = lines + i * LINE, *answer = answers + i * (LINE + 2);
        fill(line, LINE);
        line[LINE - 1] = '\n';
        answer[0] = '<';
        memcpy(answer + 1, line, LINE - 1);
        memcpy(answer + LINE, ">\n", 2);
    }
    open_server(answer_in_pieces);
    int fd = join();
    for (int i = 0; i < ROUNDS; i++) {
        int code;
        if (i == 4) {
            count_calls("malloc", "realloc");
        }
        s_send(fd, lines, sizeof lines);
        CHECK_MEM(got, s_recv(fd, got, sizeof got, &code), answers, sizeof answers);
    }
    t_seen = NULL;
    CHECK_INT(calls_counted, 0);
    t_shut(fd);
    s_expect_eof(fd);
    t_close(fd);
    s_close();
}

static size_t p_body;
static int p_messages, p_writers;

static void write_pieces(tsrv_stream *stream, char letter)
{
    char *body = (char *)malloc(p_body);
    CHECK(body != NULL);
    memset(body, letter, p_body);
    tsrv_slice pieces[5] = {{"<", 1}, {body, p_body / 2}, {"", 0}, {body, p_body - p_body / 2},
                            {">", 1}};
    for (int i = 0; i < p_messages; i++) {
        CHECK_INT(tsrv_writev(stream, pieces, 5), TSRV_OK);
    }
    free(body);
    p_writers--;
}

static void write_pieces_too(void *context)
{
    write_pieces((tsrv_stream *)context, 'b');
}

static int two_write_pieces(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    hold_little(stream);
    CHECK_INT(tsrv_spawn(s_loop, write_pieces_too, stream), TSRV_OK);
    write_pieces(stream, 'a');
    while (p_writers > 0) {
        tsrv_wait(stream, 10);
    }
    return TSRV_OK;
}

/* Every message is whole, and they change hands. */
static void check_messages(const char *got, size_t size)
{
    int changes = 0;
    char last = 0;
    for (const char *m = got; m < got + size; m += p_body + 2) {
        CHECK(m[0] == '<' && m[p_body + 1] == '>');
        CHECK(m[1] == 'a' || m[1] == 'b');
        for (size_t i = 1; i <= p_body; i++) {
            if (m[i] != m[1]) {
                T_FAIL("message %d is mixed at %zu", (int)((size_t)(m - got) / (p_body + 2)), i);
            }
        }
        changes += last != 0 && m[1] != last;
        last = m[1];
    }
    CHECK_LEAST(changes, 1);
}

static void check_pieces_stay_together(size_t body, int messages)
{
    tsrv_server_options options = {0};
    int code;
    options.write_high_water = 4 * KIB;
    options.max_write_buffer_size = 64 * KIB;
    options.write_timeout_ms = TSRV_NEVER;
    p_body = body;
    p_messages = messages;
    p_writers = 2;
    size_t size = 2 * (size_t)messages * (body + 2);
    char *got = make(size);
    open_with(two_write_pieces, options);
    int fd = join_with_room(4096);
    CHECK_INT(s_recv(fd, got, size, &code), size);
    check_messages(got, size);
    s_expect_eof(fd);
    t_close(fd);
    s_until(&closed, 1);
    s_close();
    free(got);
}

TEST_COROUTINE(small_pieces_of_two_writers_stay_together)
{
    check_pieces_stay_together(1999, t_hard ? 15 : 60);
}

TEST_COROUTINE(large_pieces_of_two_writers_stay_together)
{
    check_pieces_stay_together(20000, t_hard ? 3 : 12);
}

/* Above max_write_buffer_size they are taken in parts. */
TEST_COROUTINE(huge_pieces_of_two_writers_stay_together)
{
    check_pieces_stay_together(80000, t_hard ? 2 : 5);
}

/* ---- a flush that is done when the stream is closed --------------------------------------------*/

static int flush_code, flushed;

static void flush_beside(void *context)
{
    flush_code = tsrv_flush((tsrv_stream *)context);
    flushed++;
}

/* Writes more than the kernel takes, by less than it will take at once, and ends with the first byte
 * that comes. */
static int end_beside_a_flush(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static const char block[16384];
    tsrv_slice byte;
    (void)address, (void)context;
    do {
        CHECK_INT(tsrv_write(stream, block, sizeof block), TSRV_OK);
    } while (tsrv_unsent_size(stream) == 0);
    CHECK_INT(tsrv_spawn(tsrv_stream_loop(stream), flush_beside, stream), TSRV_OK);
    return tsrv_read_bytes(stream, 1, &byte);
}

/* The output goes and the byte comes in the same turn, so that the handler, which is called for its
 * byte at once, closes the stream before the coroutine that waited for the output goes on. */
TEST_COROUTINE(a_flush_that_is_done_stays_so_when_the_stream_is_closed)
{
    static char much[65536];
    t_clip = 0;
    open_server(end_beside_a_flush);
    int fd = t_connect(s_port);
    s_settle();
    CHECK_INT(flushed, 0);
    while (recv(fd, much, sizeof much, MSG_DONTWAIT) > 0) {
    }
    t_sends(fd, "x");
    s_until(&flushed, 1);
    CHECK_INT(flush_code, TSRV_OK);
    t_close(fd);
    s_until(&closed, 1);
    s_close();
}

/* ---- stacks of two sizes ------------------------------------------------------------------*/

static int spawned;

static void note_spawned(void *context)
{
    (void)context;
    spawned++;
}

static void count_mappings(size_t stack_size)
{
    tsrv_server_options options = {0};
    spawned = 0;
    options.stack_size = stack_size;
    open_with(echo, options);
    count_calls("mmap", "munmap");
    for (int i = 0; i < 100; i++) {
        int fd = join();
        CHECK_INT(tsrv_spawn(s_loop, note_spawned, NULL), TSRV_OK);
        t_sends(fd, "x\n");
        s_expect(fd, "x\n");
        t_close(fd);
        s_until(&closed, i + 1);
        s_until(&spawned, i + 1);
    }
    t_seen = NULL;
    CHECK_MOST(calls_counted, 8);
    s_close();
}

TEST_SCRIPT(stacks_of_two_sizes_are_both_kept)
{
    count_mappings(64 * KIB);
}

TEST_SCRIPT(stacks_of_the_usual_size_are_kept)
{
    count_mappings(0);
}

/* ---- tsrv_sendfile of small files ---------------------------------------------------------*/

static char *file_bytes;
static size_t file_promised;
static int file_code, file_served;
static FILE *file;

/* A file of so many bytes. */
static void make_file(size_t size)
{
    file = tmpfile();
    file_bytes = make(size);
    CHECK(file != NULL && (size == 0 || fwrite(file_bytes, size, 1, file) == 1));
    CHECK(fflush(file) == 0);
    file_promised = size;
}

static void remove_file(void)
{
    fclose(file);
    free(file_bytes);
}

/* A descriptor of it, to be closed. */
static int open_file(void)
{
    int fd = dup(fileno(file));
    CHECK(fd >= 0);
    return fd;
}

/* For each line, the file between two writes. The descriptor is closed at once, and its number
 * used for something else. */
static int send_file(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        int fd = open_file(), other;
        tsrv_write(stream, "head\n", 5);
        file_code = tsrv_sendfile(stream, fd, 0, file_promised);
        t_close(fd);
        other = open("/dev/null", O_RDONLY);
        tsrv_write(stream, "tail\n", 5);
        t_close(other);
        file_served++;
    }
    return rc;
}

static void expect_file(int fd, size_t size)
{
    char *got = make(size);
    int code;
    s_expect(fd, "head\n");
    CHECK_MEM(got, s_recv(fd, got, size, &code), file_bytes, size);
    s_expect(fd, "tail\n");
    free(got);
}

/* Returns how many calls of sendfile, or of fcntl, which duplicates, it took. */
static int serve_file(size_t size, size_t max_write_buffer_size)
{
    tsrv_server_options options = {0};
    options.max_write_buffer_size = max_write_buffer_size;
    file_served = 0;
    make_file(size);
    open_with(send_file, options);
    int fd = join();
    count_calls("sendfile", "fcntl");
    t_sends(fd, "one\ntwo\n");
    expect_file(fd, size);
    expect_file(fd, size);
    CHECK_INT(file_code, TSRV_OK);
    int calls = calls_counted;
    t_seen = NULL;
    t_shut(fd);
    s_expect_eof(fd);
    t_close(fd);
    s_until(&closed, 1);
    CHECK_INT(reason_of_last, TSRV_EOF);
    s_close();
    remove_file();
    return calls;
}

TEST_STREAM(small_files_are_read_at_once)
{
    static const size_t sizes[] = {1, 100, 8192, 16000, 16383};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        CHECK_INT(serve_file(sizes[i], 0), 0);
    }
}

TEST_STREAM(large_files_are_not_read)
{
#if TSRVI_HAS_SENDFILE
    CHECK_LEAST(serve_file(16384, 0), 4); /* for each of two a duplicate, and a sendfile */
    CHECK_LEAST(serve_file(t_hard ? 17000 : 100000, 0), 4);
#else
    CHECK_INT(serve_file(t_hard ? 17000 : 100000, 0), 2);
#endif
}

/* A file does not count against the limit, so one for which there is no room is not copied. */
TEST_STREAM(small_files_above_the_write_limit_are_not_read)
{
    CHECK_LEAST(serve_file(5000, 1000), 2);
}

/* A read that was interrupted goes on. */
TEST_STREAM(small_files_whose_read_is_interrupted)
{
    t_fault_name = "pread";
    t_fault_errno = EINTR;
    t_fault_calls = 0;
    t_fault_at = 1;
    CHECK_INT(serve_file(3000, 0), 0);
    CHECK_INT(t_fault_hits, 1);
}

static void check_broken_file(size_t size, size_t promised)
{
    file_served = 0;
    make_file(size);
    file_promised = promised;
    open_server(send_file);
    int fd = join();
    t_sends(fd, "one\n");
    s_expect_reset(fd);
    s_until(&closed, 1);
    CHECK_INT(file_served, 1);
    CHECK_INT(reason_of_last, -EIO);
    t_close(fd);
    s_close();
    CHECK_INT(closed, 1);
    remove_file();
}

/* What was promised cannot be made good: the stream ends, so that nothing follows the gap. */
TEST_STREAM(small_files_that_are_shorter_than_promised)
{
    check_broken_file(100, 101);
    CHECK_INT(file_code, -EIO);
    check_broken_file(0, 1);
    CHECK_INT(file_code, -EIO);
    check_broken_file(9000, 16383);
    CHECK_INT(file_code, -EIO);
}

TEST_STREAM(small_files_that_cannot_be_read)
{
    t_fault_name = "pread";
    t_fault_errno = EIO;
    t_fault_calls = 0;
    t_fault_at = 1;
    check_broken_file(100, 100);
    CHECK_INT(file_code, -EIO);
}

/* ---- tsrv_sendfile to a peer that is gone --------------------------------------------------*/

static int gone_fd, gone_entered, gone_code;

/* Its client, which lives in this thread too, resets while the handler runs, and the system has
 * told so already: what is sent now raises SIGPIPE where nothing is done about it. */
static int send_to_nobody(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    (void)address, (void)context;
    if (!gone_entered) {
        tsrv_slice line;
        char byte;
        if ((rc = tsrv_read_until(stream, "\n", 0, &line)) != TSRV_OK) {
            return rc;
        }
        gone_entered = 1;
        t_reset(gone_fd);
        CHECK(recv(tsrv_fd(stream), &byte, 1, MSG_DONTWAIT) < 0);
        CHECK_INT(errno, ECONNRESET);
        int fd = open_file();
        CHECK_INT(tsrv_sendfile(stream, fd, 0, file_promised), TSRV_OK);
        t_close(fd);
    }
    if ((rc = tsrv_flush(stream)) != TSRV_EAGAIN) {
        gone_code = rc;
    }
    return rc;
}

static bool sigpipe_is_pending(void)
{
    sigset_t pending;
    CHECK(sigpending(&pending) == 0);
    return sigismember(&pending, SIGPIPE) == 1;
}

static bool sigpipe_is_blocked(void)
{
    sigset_t blocked;
    CHECK(pthread_sigmask(SIG_BLOCK, NULL, &blocked) == 0);
    return sigismember(&blocked, SIGPIPE) == 1;
}

static void check_no_sigpipe(void)
{
    bool blocked = sigpipe_is_blocked(), pending = sigpipe_is_pending();
    gone_entered = 0;
    gone_code = TSRV_OK;
    make_file(100000);
    open_server(send_to_nobody);
    gone_fd = join();
    t_sends(gone_fd, "now\n");
    s_until(&closed, 1);
    CHECK_INT(gone_entered, 1);
    CHECK_INT(gone_code, -EPIPE);
    CHECK_INT(sigpipe_is_blocked(), blocked);
    CHECK_INT(sigpipe_is_pending(), pending);
    s_close();
    remove_file();
}

/* The default would end the process. */
TEST_SOFT(no_sigpipe_from_a_file)
{
    signal(SIGPIPE, SIG_DFL);
    check_no_sigpipe();
}

static void block_sigpipe(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
}

/* A program that has it blocked finds none afterwards that it did not raise, */
TEST_SOFT(no_sigpipe_from_a_file_where_it_is_blocked)
{
    signal(SIGPIPE, SIG_DFL);
    block_sigpipe();
    check_no_sigpipe();
}

/* and still finds its own. */
TEST_SOFT(a_sigpipe_that_was_pending_stays)
{
    signal(SIGPIPE, SIG_DFL);
    block_sigpipe();
    raise(SIGPIPE);
    CHECK(sigpipe_is_pending());
    check_no_sigpipe();
}
