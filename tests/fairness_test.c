/* Nobody is starved: the bytes, the calls and the accepts of one stream in one turn of the loop are
 * bounded, whatever its peer or its handler does. Everything is counted in turns, bytes and calls,
 * and nothing in milliseconds. */
#include "script.h"

#include "handlers.h"

#define MIB ((size_t)1024 * 1024)

#define TEST_OUTPUT(name) T_TEST(name, T_PER_BACKEND | T_COROUTINES)
#define TEST_PLAIN(name) T_TEST(name, T_PER_BACKEND | T_CALLBACKS)

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* The stream of the client that has joined first: the greedy one. */
static tsrv_stream *greedy;

static bool is_greedy(tsrv_stream *stream)
{
    if (greedy == NULL) {
        greedy = stream;
    }
    return stream == greedy;
}

/* ---- the other client, who must not have to wait ------------------------------------------*/

typedef struct other {
    int fd;
    int turns; /* since it asked */
    int answers;
} other;

static void ask_other(other *o)
{
    o->turns = 0;
    t_sends(o->fd, "ping\n");
}

static other join_other(void)
{
    other o = {s_join(), 0, 0};
    ask_other(&o);
    return o;
}

/* After each turn: its question is answered within a few of them, and it asks again. */
static void look_after(other *o)
{
    char answer[8];
    ssize_t n = recv(o->fd, answer, sizeof answer, MSG_DONTWAIT);
    CHECK(n > 0 || (n < 0 && errno == EAGAIN));
    o->turns++;
    if (n > 0) {
        CHECK_MEM(answer, (size_t)n, "pong\n", 5);
        o->answers++;
        ask_other(o);
    }
    CHECK_MOST(o->turns, 4);
}

static void pong(tsrv_stream *stream, tsrv_slice line)
{
    if (line.size == 5 && memcmp(line.data, "ping\n", 5) == 0) {
        tsrv_write(stream, "pong\n", 5);
    }
}

/* ---- input --------------------------------------------------------------------------------*/

/* Sends what the kernel takes of so many newlines, each of them a line of its own. */
static size_t flood(int fd, size_t size)
{
    static char newlines[256 * 1024];
    memset(newlines, '\n', sizeof newlines);
    CHECK(size <= sizeof newlines);
    ssize_t n = send(fd, newlines, size, MSG_DONTWAIT | T_NOSIGNAL);
    CHECK(n > 0 || (n < 0 && errno == EAGAIN));
    return n > 0 ? (size_t)n : 0;
}

static int handled_lines;

static int take_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    is_greedy(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        handled_lines++;
        pong(stream, line);
    }
    return rc;
}

/* What a stream may hold: the limit is looked at before each recv. */
static size_t unread_limit(size_t max_buffer_size)
{
    size_t size = max_buffer_size != 0 ? max_buffer_size : MIB;
    size_t chunk = 64 * KIB < size / 2 + 1 ? 64 * KIB : size / 2 + 1;
    return size + chunk;
}

enum { FLOOD_TURNS = 200 };

/* The first client floods for so many turns. */
static void flood_beside(other *o, int fd, size_t max_buffer_size)
{
    size_t most = 0, sent = 0;
    for (int turn = 0; turn < FLOOD_TURNS; turn++) {
        sent += flood(fd, 256 * KIB);
        s_turn();
        most = larger(most, tsrv_unread_size(greedy));
        CHECK_MOST(most, unread_limit(max_buffer_size));
        if (o != NULL) {
            look_after(o);
        }
    }
    CHECK_LEAST(sent, 256 * KIB); /* there was a flood */
}

static void open_flooded(tsrv_handler handler, size_t max_buffer_size)
{
    tsrv_server_options options = {0};
    options.handle_stream = handler;
    options.max_buffer_size = max_buffer_size;
    s_open(options);
}

/* Each turn handles a few hundred lines, and brings no more than are handled. */
static void check_pipeline(size_t max_buffer_size)
{
    open_flooded(take_lines, max_buffer_size);
    int fd = s_join();
    other o = join_other();
    flood_beside(&o, fd, max_buffer_size);
    CHECK_LEAST(o.answers, FLOOD_TURNS / 4);
    CHECK_LEAST(handled_lines, FLOOD_TURNS * 100);
    CHECK_MOST(handled_lines, FLOOD_TURNS * 600);
    t_close(fd);
    t_close(o.fd);
    s_close();
}

TEST_SOFT(pipelined_lines_are_not_piled_up)
{
    check_pipeline(0);
}

TEST_SOFT(pipelined_lines_are_not_piled_up_in_a_small_buffer)
{
    check_pipeline(4 * KIB);
}

/* Keeps the connection, and reads from the first client's nothing at all. */
static int read_nothing(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    return is_greedy(stream) ? (int)TSRV_EAGAIN : take_lines(stream, address, context);
}

static void check_unread(size_t max_buffer_size)
{
    open_flooded(read_nothing, max_buffer_size);
    int fd = s_join();
    other o = join_other();
    flood_beside(&o, fd, max_buffer_size);
    CHECK_LEAST(tsrv_unread_size(greedy), max_buffer_size != 0 ? max_buffer_size : MIB);
    CHECK_LEAST(o.answers, FLOOD_TURNS / 4);
    t_close(fd);
    t_close(o.fd);
    s_close();
}

TEST_SOFT(input_that_no_handler_reads_is_bounded)
{
    check_unread(0);
}

TEST_SOFT(input_that_no_handler_reads_is_bounded_in_a_small_buffer)
{
    check_unread(4 * KIB);
}

/* Answers the first client and closes; the peer goes on sending all the same. */
static int close_at_once(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    return is_greedy(stream) ? tsrv_write(stream, "no\n", 3)
                                  : take_lines(stream, address, context);
}

TEST_SOFT(input_after_our_close_is_dropped_bit_by_bit)
{
    size_t most = 0, sent = 0, dropped;
    tsrv_server_options options = {0};
    options.handle_stream = close_at_once;
    s_open(options);
    int keeper = s_join(); /* is told "no" */
    s_expect(keeper, "no\n");
    s_settle(); /* its stream is lingering, and not listed any more than by the counters */
    uint64_t start = s_stats().bytes_in;
    for (int turn = 0; turn < FLOOD_TURNS; turn++) {
        uint64_t before = s_stats().bytes_in;
        sent += flood(keeper, 256 * KIB);
        s_turn();
        most = larger(most, (size_t)(s_stats().bytes_in - before));
    }
    dropped = (size_t)(s_stats().bytes_in - start);
    CHECK_MOST(most, 64 * KIB);
    CHECK_LEAST(most, 1);
    CHECK_LEAST(dropped, MIB); /* it is dropped, for the answer's sake */
    CHECK_LEAST(sent, dropped);
    CHECK_INT(s_stats().open, 1);
    s_run_ms(6000);
    CHECK_INT(s_stats().open, 0);
    t_close(keeper);
    s_close();
}

/* ---- output -------------------------------------------------------------------------------*/

enum { ONE_WRITE, BLOCKS, BLOCKS_AND_FLUSH, SMALL, SMALL_AND_FLUSH, PIECES, PRINTED };

/* How much is written, and in how large writes. */
static int how;
static size_t volume, unit;
static size_t written, writes;
static char *material;
static int written_all;

static int write_unit(tsrv_stream *stream)
{
    tsrv_slice pieces[2] = {{material, unit / 2}, {material + unit / 2, unit - unit / 2}};
    int rc;
    switch (how) {
    case PIECES: rc = tsrv_writev(stream, pieces, 2); break;
    case PRINTED: rc = tsrv_printf(stream, "%.*s", (int)unit, material); break;
    default: rc = tsrv_write(stream, material, unit); break;
    }
    if (rc == TSRV_OK && (how == BLOCKS_AND_FLUSH || how == SMALL_AND_FLUSH)) {
        rc = tsrv_flush(stream);
    }
    written += unit;
    writes++;
    return rc;
}

/* The first client gets the volume, the others get answers. */
static int write_much(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc = TSRV_OK;
    if (!is_greedy(stream)) {
        return take_lines(stream, address, context);
    }
    while (rc == TSRV_OK && written < volume) {
        rc = write_unit(stream);
    }
    CHECK_INT(rc, TSRV_OK);
    CHECK_INT(written, volume);
    written_all = 1;
    return tsrv_read_until_close(stream, 0, NULL);
}

static int ticks;
static tsrv_timer ticker;

static void tick(void *context)
{
    ticks++;
    CHECK_INT(tsrv_timer_start(s_loop, &ticker, 0, tick, context), TSRV_OK);
}

typedef struct turns {
    int count;
    size_t most_bytes, most_writes;
} turns;

/* Turns until everything has been taken. */
static turns turn_until_taken(other *o)
{
    turns t = {0, 0, 0};
    int64_t limit = t_patience();
    uint64_t sent_at_first = s_stats().bytes_out;
    while (!written_all || taker_got < volume) {
        uint64_t sent = s_stats().bytes_out;
        size_t before = writes;
        s_turn();
        take_all();
        t.count++;
        t.most_bytes = larger(t.most_bytes, (size_t)(s_stats().bytes_out - sent));
        t.most_writes = larger(t.most_writes, writes - before);
        look_after(o);
        if (t_now_ms() > limit) {
            T_FAIL("%zu of %zu bytes were taken", taker_got, volume);
        }
    }
    CHECK_LEAST(s_stats().bytes_out - sent_at_first, volume);
    return t;
}

static void start_ticker(void)
{
    CHECK_INT(tsrv_timer_start(s_loop, &ticker, 0, tick, NULL), TSRV_OK);
}

/* A server that writes so much, in such writes. */
static void open_writer(tsrv_handler handler, int kind, size_t total, size_t size,
                        size_t high_water)
{
    tsrv_server_options options = {0};
    how = kind;
    volume = total;
    unit = size;
    material = (char *)malloc(unit + 1);
    CHECK(material != NULL);
    memset(material, 'm', unit);
    material[unit] = 0;
    options.handle_stream = handler;
    options.write_high_water = high_water;
    s_open(options);
}

static void close_writer(other *o)
{
    t_seen = NULL;
    tsrv_timer_stop(&ticker);
    t_close(taker);
    t_close(o->fd);
    s_close();
    free(material);
}

/* Waits for the other client, and then writes. */
static int write_when_joined(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    while (is_greedy(stream) && s_stats().accepted < 2) {
        tsrv_wait(stream, TSRV_NEVER);
    }
    return write_much(stream, address, context);
}

static void check_output(int kind, size_t total, size_t size, size_t most_writes)
{
    open_writer(write_when_joined, kind, total, size, 0);
    taker = s_join();
    other o = join_other();
    tsrv_wake(greedy);
    start_ticker();
    t_seen = take_before_sends;
    turns t = turn_until_taken(&o);
    /* One go of the event that says that there is room, and one of the coroutine: it ends with the
     * write that goes over a MiB, or with the flush of what that leaves in the queue. */
    size_t limit = 2 * MIB + (size < 256 * KIB ? size : 256 * KIB) + 256 * KIB;
    CHECK_MOST(t.most_bytes, limit);
    CHECK_MOST(t.most_writes, most_writes);
    CHECK_LEAST(t.count, volume / limit);
    CHECK_LEAST(ticks, t.count - 1); /* a timer without a delay has fired in every one */
    CHECK_LEAST(o.answers, t.count / 4 - 1);
    close_writer(&o);
}

TEST_OUTPUT(one_huge_write_is_sent_in_many_turns)
{
    check_output(ONE_WRITE, 64 * MIB, 64 * MIB, 1);
}

TEST_OUTPUT(a_write_that_fits_is_sent_in_many_turns)
{
    check_output(ONE_WRITE, 16 * MIB, 16 * MIB, 1);
}

TEST_OUTPUT(many_writes_let_others_run)
{
    check_output(BLOCKS, 48 * MIB, 32 * KIB, 34);
}

TEST_OUTPUT(many_flushed_writes_let_others_run)
{
    check_output(BLOCKS_AND_FLUSH, 32 * MIB, 16 * KIB, 66);
}

/* Below 16 KiB a write is collected, and sent by the flush. */
TEST_OUTPUT(many_flushed_collections_let_others_run)
{
    check_output(BLOCKS_AND_FLUSH, 30 * MIB, 15 * KIB, 2 * 71);
}

TEST_OUTPUT(many_small_writes_let_others_run)
{
    check_output(SMALL, 16 * MIB, 64, (MIB + 512 * KIB) / 64);
}

TEST_OUTPUT(many_small_flushed_writes_let_others_run)
{
    check_output(SMALL_AND_FLUSH, MIB, 64, 520);
}

TEST_OUTPUT(many_writes_in_pieces_let_others_run)
{
    check_output(PIECES, 16 * MIB, 4 * KIB, (MIB + 512 * KIB) / (4 * KIB));
}

TEST_OUTPUT(many_large_writes_in_pieces_let_others_run)
{
    check_output(PIECES, 32 * MIB, 64 * KIB, 18);
}

TEST_OUTPUT(much_formatted_text_lets_others_run)
{
    check_output(PRINTED, 8 * MIB, KIB, (MIB + 512 * KIB) / KIB);
}

/* In callback mode a handler is asked for the volume line by line. */
static int write_for_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    if (!is_greedy(stream)) {
        return take_lines(stream, address, context);
    }
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        CHECK_INT(write_unit(stream), TSRV_OK);
        written_all = written == volume;
    }
    return rc;
}

static void check_answers(size_t total, size_t size, size_t high_water, size_t most_writes)
{
    open_writer(write_for_lines, BLOCKS, total, size, high_water);
    taker = s_join();
    other o = join_other();
    start_ticker();
    t_seen = take_before_sends;
    for (size_t lines = volume / unit; lines > 0;) {
        size_t sent = flood(taker, lines < 16 * KIB ? lines : 16 * KIB);
        CHECK_LEAST(sent, 1);
        lines -= sent;
    }
    turns t = turn_until_taken(&o);
    size_t limit = 2 * (MIB + size) + KIB;
    CHECK_MOST(t.most_bytes, limit);
    CHECK_MOST(t.most_writes, most_writes);
    CHECK_LEAST(t.count, volume / limit);
    CHECK_LEAST(ticks, t.count - 1);
    CHECK_LEAST(o.answers, t.count / 4 - 1);
    close_writer(&o);
}

/* The handler may be called twice in a turn: by an event, and because it was not finished. */
TEST_SOFT(large_answers_to_a_pipeline_let_others_run)
{
    check_answers(64 * MIB, 32 * KIB, 0, 2 * 34);
}

/* A write below the high water never pauses: then the next read does. */
TEST_SOFT(large_answers_below_a_very_high_water_let_others_run)
{
    check_answers(64 * MIB, 32 * KIB, 16 * MIB, 2 * 34);
}

TEST_SOFT(huge_answers_to_a_pipeline_let_others_run)
{
    check_answers(64 * MIB, MIB, 0, 2 * 2);
}

TEST_SOFT(small_answers_to_a_pipeline_let_others_run)
{
    check_answers(2 * MIB, 64, 0, 2 * 258);
}

/* ---- a write below the high water lets nobody in -------------------------------------------*/

static int steps; /* of the other coroutine */
static int step_on;

static void step(void *context)
{
    (void)context;
    while (step_on) {
        steps++;
        CHECK_INT(tsrv_sleep(0), TSRV_OK);
    }
}

/* Nobody else has run between any two of the writes: what belongs together needs no lock. */
static int write_alone(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    step_on = 1;
    CHECK_INT(tsrv_spawn(s_loop, step, NULL), TSRV_OK);
    CHECK_INT(tsrv_sleep(0), TSRV_OK);
    CHECK_INT(tsrv_sleep(0), TSRV_OK);
    CHECK_LEAST(steps, 1);
    int before = steps;
    while (written + unit <= volume) {
        CHECK_INT(write_unit(stream), TSRV_OK);
        if (steps != before) {
            T_FAIL("another coroutine ran after %zu writes and %zu bytes", writes, written);
        }
    }
    CHECK_INT(tsrv_sleep(0), TSRV_OK);
    CHECK_LEAST(steps, before + 1);
    step_on = 0;
    written_all = 1;
    return tsrv_read_until_close(stream, 0, NULL);
}

/* The bytes total at most the high water. take: the client takes them meanwhile. */
static void check_alone(int kind, size_t high_water, size_t size, bool take)
{
    open_writer(write_alone, kind, high_water != 0 ? high_water : 256 * KIB, size, high_water);
    taker = s_join();
    t_seen = take ? take_before_sends : NULL;
    int64_t limit = t_patience();
    while (!written_all || taker_got < written) {
        s_turn();
        take_all();
        CHECK(t_now_ms() < limit);
    }
    t_seen = NULL;
    s_finish(taker);
    s_close();
    free(material);
}

TEST_OUTPUT(small_writes_below_the_high_water_let_nobody_in)
{
    check_alone(SMALL, 0, 64, false);
}

TEST_OUTPUT(formatted_writes_below_the_high_water_let_nobody_in)
{
    check_alone(PRINTED, 0, 100, false);
}

TEST_OUTPUT(writes_in_pieces_below_the_high_water_let_nobody_in)
{
    check_alone(PIECES, 0, 300, false);
}

TEST_OUTPUT(large_writes_below_the_high_water_let_nobody_in)
{
    check_alone(BLOCKS, 0, 32 * KIB, true);
}

/* Also where the high water is above what is sent in one go. */
TEST_OUTPUT(writes_below_a_very_high_water_let_nobody_in)
{
    check_alone(BLOCKS, 6 * MIB, 32 * KIB, true);
}

TEST_OUTPUT(writes_below_a_very_high_water_let_nobody_in_when_none_is_taken)
{
    check_alone(BLOCKS, 6 * MIB, 100 * KIB, false);
}

/* ---- calls that complete at once ----------------------------------------------------------*/

enum {
    WAIT,
    READ_NO_BYTES,
    READ_INTO_NO_BYTES,
    READ_LINE,
    READ_LONG_DELIMITER,
    READ_BYTE,
    READ_SOME,
    READ_INTO,
    READ_MATCH,
    FLUSH
};
enum { CALLS = 6000 };

static int kind_of_call, completed, handler_calls, calls_done;

static size_t match_one(const char *data, size_t size, void *context)
{
    (void)data, (void)size, (void)context;
    return 1;
}

static int complete_at_once(tsrv_stream *stream)
{
    tsrv_slice slice;
    char byte;
    switch (kind_of_call) {
    case WAIT: tsrv_wake(stream); return tsrv_wait(stream, TSRV_NEVER);
    case READ_NO_BYTES: return tsrv_read_bytes(stream, 0, &slice);
    case READ_INTO_NO_BYTES: return tsrv_read_into(stream, &byte, 0);
    case READ_LINE: return tsrv_read_until(stream, "\n", 0, &slice);
    case READ_LONG_DELIMITER: return tsrv_read_until_mem(stream, "\n\n", 2, 0, &slice);
    case READ_BYTE: return tsrv_read_bytes(stream, 1, &slice);
    case READ_SOME: return tsrv_read_some(stream, 1, &slice);
    case READ_INTO: return tsrv_read_into(stream, tsrv_data(stream), 1);
    case READ_MATCH: return tsrv_read_until_match(stream, match_one, NULL, 0, &slice);
    default: return tsrv_flush(stream);
    }
}

/* Makes many calls that could all be answered at once. */
static int call_on(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    if (!is_greedy(stream)) {
        return take_lines(stream, address, context);
    }
    handler_calls++;
    while (completed < CALLS) {
        if ((rc = complete_at_once(stream)) != TSRV_OK) {
            CHECK_INT(rc, t_mode == TSRV_CALLBACK ? TSRV_EAGAIN : TSRV_OK);
            return rc;
        }
        completed++;
    }
    calls_done = 1;
    return tsrv_read_until_close(stream, 0, NULL);
}

/* Has the input come into the buffer. */
static int buffer_input(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc = tsrv_read_some(stream, 1, &slice);
    if (rc == TSRV_OK) {
        tsrv_set_handler(stream, call_on);
        rc = call_on(stream, address, context);
    }
    return rc;
}

/* Waits for the other client. */
static int call_when_joined(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    if (!is_greedy(stream)) {
        return take_lines(stream, address, context);
    }
    while (s_stats().accepted < 2) {
        if ((rc = tsrv_wait(stream, TSRV_NEVER)) != TSRV_OK) {
            return rc;
        }
    }
    tsrv_set_handler(stream, buffer_input);
    return buffer_input(stream, address, context);
}

/* At most two goes in a turn: the one that an event begins, and the one that goes on. */
static void check_calls(int kind)
{
    size_t most = 0, most_calls = 0;
    int count = 0;
    int64_t limit = t_patience();
    tsrv_server_options options = {0};
    kind_of_call = kind;
    options.handle_stream = call_when_joined;
    options.data_size = 16;
    s_open(options);
    int fd = s_join();
    other o = join_other();
    CHECK_INT(flood(fd, 2 * CALLS + 2), 2 * CALLS + 2);
    tsrv_wake(greedy);
    start_ticker();
    while (!calls_done) {
        int before = completed, calls_before = handler_calls;
        s_turn();
        count++;
        most = larger(most, (size_t)(completed - before));
        most_calls = larger(most_calls, (size_t)(handler_calls - calls_before));
        look_after(&o);
        CHECK(t_now_ms() < limit);
    }
    CHECK_MOST(most, 2 * 258);
    CHECK_MOST(most_calls, 2);
    CHECK_LEAST(count, CALLS / (2 * 258));
    CHECK_MOST(count, CALLS / 100); /* and it is not one call a turn */
    CHECK_LEAST(ticks, count - 1);
    CHECK_LEAST(o.answers, count / 4 - 1);
    tsrv_timer_stop(&ticker);
    t_close(fd);
    t_close(o.fd);
    s_close();
}

TEST_SOFT(waits_that_complete_at_once_let_others_run)
{
    check_calls(WAIT);
}

TEST_SOFT(reads_of_nothing_let_others_run)
{
    check_calls(READ_NO_BYTES);
}

TEST_SOFT(reads_of_nothing_into_memory_let_others_run)
{
    check_calls(READ_INTO_NO_BYTES);
}

TEST_SOFT(buffered_lines_let_others_run)
{
    check_calls(READ_LINE);
}

TEST_SOFT(buffered_lines_with_a_long_end_let_others_run)
{
    check_calls(READ_LONG_DELIMITER);
}

TEST_SOFT(buffered_bytes_let_others_run)
{
    check_calls(READ_BYTE);
}

TEST_SOFT(buffered_bytes_one_by_one_let_others_run)
{
    check_calls(READ_SOME);
}

TEST_SOFT(buffered_bytes_into_memory_let_others_run)
{
    check_calls(READ_INTO);
}

TEST_SOFT(buffered_messages_let_others_run)
{
    check_calls(READ_MATCH);
}

TEST_SOFT(flushes_of_nothing_let_others_run)
{
    check_calls(FLUSH);
}

/* A stream that has ended answers every call at once, for ever. */
static int call_after_the_end(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc;
    if (!is_greedy(stream)) {
        return take_lines(stream, address, context);
    }
    while (completed < CALLS) {
        if ((rc = tsrv_read_some(stream, 0, &slice)) == TSRV_EAGAIN) {
            return rc;
        }
        CHECK_INT(rc, TSRV_EOF);
        completed++;
    }
    calls_done = 1;
    return TSRV_EOF;
}

TEST_SOFT(reads_after_the_end_let_others_run)
{
    size_t most = 0;
    int64_t limit = t_patience();
    tsrv_server_options options = {0};
    options.handle_stream = call_after_the_end;
    s_open(options);
    int fd = s_join();
    other o = join_other();
    t_shut(fd);
    while (!calls_done) {
        int before = completed;
        s_turn();
        most = larger(most, (size_t)(completed - before));
        look_after(&o);
        CHECK(t_now_ms() < limit);
    }
    CHECK_MOST(most, 2 * 258);
    s_leave(fd);
    t_close(o.fd);
    s_close();
}

/* ---- accepts ------------------------------------------------------------------------------*/

enum { PEERS = 300, QUEUED = 110 }; /* a queue of 128 is what every system gives */

/* Clients arrive as fast as they are accepted. Each turn accepts more of them, up to a limit, and
 * the stream that was there before is served in all of them. */
TEST_SOFT(accepts_leave_time_for_streams)
{
    static int fds[PEERS];
    int arrived = 0, count = 0;
    size_t most = 0;
    int64_t limit = t_patience();
    tsrv_server_options options = {0};
    options.handle_stream = take_lines;
    s_open(options);
    other o = join_other();
    uint64_t first = s_stats().accepted;
    while (s_stats().accepted < first + PEERS) {
        uint64_t before = s_stats().accepted;
        while (arrived < PEERS && arrived < (int)(before - first) + QUEUED) {
            fds[arrived++] = t_connect(s_port);
        }
        s_turn();
        count++;
        most = larger(most, (size_t)(s_stats().accepted - before));
        look_after(&o);
        CHECK(t_now_ms() < limit);
    }
    CHECK_MOST(most, 64);
    CHECK_LEAST(most, 8); /* a crowd is not accepted one by one */
    CHECK_LEAST(o.answers, count / 4 - 1);
    t_close_all(fds, PEERS);
    t_close(o.fd);
    s_close();
}

/* ---- several greedy streams ---------------------------------------------------------------*/

enum { GREEDY = 4 };
static int shares[GREEDY + 1];

static int count_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *mine = (int *)tsrv_data(stream), rc;
    tsrv_slice line;
    (void)address, (void)context;
    if (*mine == 0) {
        static int joined;
        *mine = ++joined;
    }
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        shares[*mine - 1]++;
    }
    return rc;
}

/* All of them flood: each gets the same share of the turns. */
TEST_SOFT(floods_get_equal_shares)
{
    int fds[GREEDY];
    tsrv_server_options options = {0};
    options.handle_stream = count_lines;
    options.data_size = sizeof(int);
    s_open(options);
    for (int i = 0; i < GREEDY; i++) {
        fds[i] = s_join();
        s_settle();
    }
    for (int turn = 0; turn < FLOOD_TURNS; turn++) {
        for (int i = 0; i < GREEDY; i++) {
            flood(fds[i], 64 * KIB);
        }
        s_turn();
    }
    for (int i = 0; i < GREEDY; i++) {
        CHECK_LEAST(shares[i], FLOOD_TURNS * 200);
        CHECK_MOST(shares[i], shares[0] + shares[0] / 10);
        CHECK_LEAST(shares[i], shares[0] - shares[0] / 10);
        t_close(fds[i]);
    }
    s_close();
}

/* ---- one stream's coroutines --------------------------------------------------------------*/

static bool ticking; /* while the reader beside the ticker has not got its line */
static int tickers;

static void tick_on(void *context)
{
    tsrv_stream *stream = (tsrv_stream *)context;
    while (ticking && tsrv_write(stream, ".", 1) == TSRV_OK && tsrv_flush(stream) == TSRV_OK) {
    }
    tickers--;
    tsrv_wake(stream);
}

static int read_beside_ticker(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    if (ticking && tickers == 0) {
        tickers++;
        CHECK_INT(tsrv_spawn(NULL, tick_on, stream), TSRV_OK);
    }
    if (ticking && (rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_EAGAIN) {
        return rc;
    }
    ticking = false;
    while (tickers != 0) {
        if (tsrv_wait(stream, TSRV_NEVER) == TSRV_EAGAIN) {
            return TSRV_EAGAIN;
        }
    }
    return TSRV_OK;
}

/* A coroutine that never has to wait for what it does lets others run, and also who reads the same stream: its line,
 * or its end, is seen within a few turns. */
TEST_SOFT(writer_that_never_waits_lets_its_streams_reader_read)
{
    for (int ends = 0; ends < 2; ends++) {
        static char ticked[64 * KIB];
        int turn;
        ticking = true;
        s_serve(read_beside_ticker);
        int fd = s_join();
        for (turn = 0; turn < 20; turn++) {
            s_turn();
            CHECK(recv(fd, ticked, sizeof ticked, MSG_DONTWAIT) != 0);
        }
        CHECK(ticking);
        if (ends) {
            t_shut(fd);
        } else {
            t_sends(fd, "stop\n");
        }
        for (turn = 0; ticking; turn++) {
            CHECK_MOST(turn, 8);
            s_turn();
            CHECK(recv(fd, ticked, sizeof ticked, MSG_DONTWAIT) != 0);
        }
        t_close(fd);
        s_until(&s_closed, 1);
        CHECK_INT(tickers, 0);
        s_close();
    }
}

/* ---- timers -------------------------------------------------------------------------------*/

static tsrv_stream *slow_reader;
static tsrv_timer busy_timer;
static int busy_calls;

/* Takes longer than its period, and a time begins in it. */
static void be_busy(void *context)
{
    (void)context;
    CHECK_INT(tsrv_timer_start(s_loop, &busy_timer, 10, be_busy, NULL), TSRV_OK);
    v_now += 15 * 1000000u;
    tsrv_set_timeout(slow_reader, 0, 30000);
    CHECK_MOST(++busy_calls, 1000);
}

static int block_or_pong(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char unread[256 * KIB];
    if (slow_reader == NULL) {
        slow_reader = stream;
        limit_output(stream);
        tsrv_try_write(stream, unread, sizeof unread);
    }
    return take_lines(stream, address, context);
}

/* Timers that are due again by the time they have been called wait for the next turn, though the clock is read again
 * where a time begins. */
TEST_PLAIN_SOFT(timers_that_take_longer_than_their_period_leave_time_for_streams)
{
    s_serve(block_or_pong);
    int fd = s_join_with_room(4096);
    s_settle();
    CHECK(tsrvi_is(slow_reader, TSRVI_BLOCKED));
    other o = join_other();
    be_busy(NULL);
    for (int turn = 0; turn < 50; turn++) {
        int before = busy_calls;
        s_turn();
        CHECK_MOST(busy_calls, before + 1);
        look_after(&o);
    }
    CHECK_LEAST(busy_calls, 40);
    tsrv_timer_stop(&busy_timer);
    t_close(o.fd);
    t_close(fd);
    s_close();
}
