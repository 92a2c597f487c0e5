/* Waits (>>wait, >>settle): what ends a wait of a handler, or of another coroutine, on a stream. A wake,
 * time, a deadline that is set meanwhile, a reset, a close by somebody else, the end of a drain's grace. */
#include "script.h"

#include "handlers.h"

/* ---- a wait with a time, while input comes -------------------------------------------------*/

static int calls, answers;

/* Takes 300 ms for each line. */
static int answer_slowly(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *paused = (int *)tsrv_data(stream), rc;
    tsrv_slice line;
    (void)address, (void)context;
    calls++;
    for (;;) {
        if (!*paused) {
            if ((rc = tsrv_read_until(stream, "\n", 0, &line)) != TSRV_OK) {
                return rc;
            }
            *paused = 1;
        }
        if ((rc = tsrv_wait(stream, 300)) != TSRV_ETIMEOUT) {
            return rc;
        }
        *paused = 0;
        answers++;
        tsrv_printf(stream, "answer %d\n", answers);
    }
}

TEST_STREAM(row4_pause_while_the_peer_pipelines)
{
    tsrv_server_options options = {0};
    int64_t start;
    options.handle_stream = answer_slowly;
    options.data_size = sizeof(int);
    s_open(options);
    int fd = t_connect(s_port);
    t_sends(fd, "1\n2\n3\n4\n5\n");
    s_until(&calls, 1);
    s_settle();
    start = v_ms();
    s_expect(fd, "answer 1\nanswer 2\nanswer 3\nanswer 4\nanswer 5\n");
    CHECK(v_ms() - start >= 1450 && v_ms() - start <= 1600);
    CHECK(calls <= (t_hard ? 21 : 11)); /* no loop: once for each read and each pause, in hard mode for each byte */
    s_finish(fd);
    s_close();
}

/* ---- in one turn ---------------------------------------------------------------------------*/

static int write_when_woken(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_wait(stream, TSRV_NEVER)) == TSRV_OK && (rc = tsrv_write(stream, "woken\n", 6)) == TSRV_OK) {
    }
    return rc;
}

static void write_beside(void *context)
{
    write_when_woken((tsrv_stream *)context, NULL, NULL);
}

/* What is written by those whom a turn resumes goes out in that turn: the client has it without another one. */
TEST_PLAIN_SOFT(what_the_woken_write_goes_out_in_one_turn)
{
    for (int others = 0; others <= 2; others++) {
        s_serve(write_when_woken);
        int fd = s_join();
        s_settle();
        for (int i = 0; i < others; i++) {
            CHECK_INT(tsrv_spawn(s_loop, write_beside, tsrv_server_next(s_server, NULL)), TSRV_OK);
        }
        s_settle();
        tsrv_wake(tsrv_server_next(s_server, NULL));
        s_turn();
        for (int i = 0; i <= others; i++) {
            t_expect(fd, "woken\n");
        }
        t_reset(fd);
        s_until(&s_closed, 1);
        s_close();
    }
}

/* ---- a read that a callback-mode handler gives up ------------------------------------------*/

static int given_up, helper_rc, second_rc, deadline_ms; /* -1 = none is asked for */

/* Waits in a read and for a wake at once; woken, it only waits, and a helper reads. */
static int leave_it_to_a_helper(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    if (deadline_ms >= 0) {
        tsrv_set_deadline(stream, deadline_ms);
    }
    if (!given_up && (rc = tsrv_read_until(stream, "\n", 0, &line)) != TSRV_EAGAIN) {
        return rc;
    }
    while ((rc = tsrv_wait(stream, TSRV_NEVER)) == TSRV_OK && tsrv_error(stream) == TSRV_OK && helper_rc == 99) {
    }
    return rc;
}

static void read_for_it(void *context)
{
    tsrv_slice line;
    helper_rc = tsrv_read_until((tsrv_stream *)context, "\n", 0, &line);
    tsrv_wake((tsrv_stream *)context);
}

/* Whatever limits are, or were, in force. */
TEST_CALLBACK(a_read_that_was_given_up_leaves_the_stream_to_others)
{
    static const int deadlines[] = {-1, 0, 10000};
    tsrv_server_options options = {0};
    for (size_t i = 0; i < COUNT(deadlines); i++) {
        given_up = 0;
        helper_rc = 99;
        deadline_ms = deadlines[i];
        s_open_with(leave_it_to_a_helper, options);
        int fd = s_join();
        s_settle();
        tsrv_stream *stream = tsrv_server_next(s_server, NULL);
        given_up = 1;
        tsrv_wake(stream);
        s_settle();
        CHECK_INT(tsrv_spawn(s_loop, read_for_it, stream), TSRV_OK);
        s_settle();
        t_sends(fd, "line\n");
        s_until(&s_closed, 1);
        CHECK_INT(helper_rc, TSRV_OK);
        t_close(fd);
        s_close();
    }
}

/* Gives one read up, and begins another, with a limit. */
static int read_something_else(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice data;
    (void)address, (void)context;
    if (given_up == 0) {
        if (deadline_ms >= 0) {
            tsrv_set_deadline(stream, deadline_ms);
        }
        CHECK_INT(tsrv_read_until(stream, "\n", 0, &data), TSRV_EAGAIN);
        return tsrv_wait(stream, TSRV_NEVER);
    }
    if (given_up == 1) {
        CHECK_INT(tsrv_wait(stream, TSRV_NEVER), TSRV_OK);
        tsrv_set_timeout(stream, 100, 0);
        given_up = 2;
    }
    second_rc = tsrv_read_bytes(stream, 10, &data);
    return second_rc;
}

T_TEST(a_read_behind_one_that_was_given_up_has_its_limit, T_PER_BACKEND | T_CALLBACKS)
{
    tsrv_server_options options = {0};
    for (deadline_ms = -1; deadline_ms <= 0; deadline_ms++) {
        given_up = 0;
        s_open_with(read_something_else, options);
        int fd = s_join();
        s_settle();
        given_up = 1;
        tsrv_wake(tsrv_server_next(s_server, NULL));
        s_until(&s_closed, 1);
        CHECK_INT(second_rc, TSRV_ETIMEOUT);
        t_close(fd);
        s_close();
    }
}

/* Whichever comes first: a wake or a line, which is there already. */
static int wait_or_read(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc = tsrv_wait(stream, 1000);
    (void)address, (void)context;
    if (rc == TSRV_EAGAIN) {
        rc = tsrv_read_until(stream, "\n", 0, &line);
        if (rc == TSRV_OK) {
            CHECK_INT(tsrv_write(stream, line.data, line.size), TSRV_OK);
        }
    }
    return rc;
}

T_TEST(a_wait_and_a_read_are_waited_for_together, T_PER_BACKEND | T_CALLBACKS)
{
    for (int line = 0; line <= 1; line++) {
        s_serve(wait_or_read);
        int fd = s_join();
        if (line) {
            t_sends(fd, "hello\n");
            s_expect(fd, "hello\n");
        } else {
            s_settle();
            tsrv_wake(tsrv_server_next(s_server, NULL));
        }
        s_until(&s_closed, 1);
        CHECK_INT(s_reason, TSRV_OK);
        t_close(fd);
        s_close();
    }
}

/* A read of nothing is a read, behind which a wait begins anew. */
static int waits_begun, wait_code;

static int wait_behind_nothing(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    (void)address, (void)context;
    if (waits_begun++ == 0) {
        CHECK_INT(tsrv_read_bytes(stream, 5, &slice), TSRV_EAGAIN);
        return tsrv_wait(stream, 100);
    }
    if (waits_begun == 2) {
        CHECK_INT(tsrv_read_bytes(stream, 0, &slice), TSRV_OK);
    }
    wait_code = tsrv_wait(stream, TSRV_NEVER);
    return wait_code;
}

TEST_CALLBACK(wait_behind_a_read_of_nothing_has_its_own_time)
{
    tsrv_server_options options = {0};
    waits_begun = 0;
    s_open_with(wait_behind_nothing, options);
    int fd = s_join();
    s_settle();
    t_sends(fd, "input");
    s_until(&waits_begun, 2);
    s_run_ms(1000);
    CHECK_INT(wait_code, TSRV_EAGAIN);
    CHECK_INT(s_closed, 0);
    tsrv_wake(tsrv_server_next(s_server, NULL));
    s_until(&s_closed, 1);
    CHECK_INT(wait_code, TSRV_OK);
    t_close(fd);
    s_close();
}

/* ---- an end that comes while nobody asks for it ---------------------------------------------*/

static bool busy_over; /* what the handler is busy with */
static int end_seen;

/* Answers a line, is busy, and then only waits. */
static int be_busy_and_wait(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *step = (int *)tsrv_data(stream), rc = TSRV_OK;
    tsrv_slice line;
    (void)address, (void)context;
    if (*step == 0 && (rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        limit_output(stream);
        CHECK_INT(tsrv_write(stream, large, large_size), TSRV_OK);
        ++*step;
    }
    if (*step == 1 && rc == TSRV_OK && (rc = tsrv_flush(stream)) == TSRV_OK) {
        ++*step;
    }
    while (t_mode == TSRV_COROUTINE && !busy_over) {
        CHECK_INT(tsrv_sleep(1), TSRV_OK);
    }
    if (*step == 2 && rc == TSRV_OK && (rc = tsrv_wait(stream, TSRV_NEVER)) == TSRV_OK) {
        CHECK_INT(tsrv_read_some(stream, 0, &line), TSRV_EOF);
        end_seen++;
    }
    return rc;
}

/* It ends the next tsrv_wait, as a wake does that comes a moment too early. */
TEST_STREAM(an_end_that_comes_too_early_ends_the_next_wait)
{
    tsrv_server_options options = {0};
    options.handle_stream = be_busy_and_wait;
    options.data_size = sizeof(int);
    options.write_high_water = SIZE_MAX;
    make_large(t_hard ? 100000 : 4 << 20);
    busy_over = false;
    end_seen = 0;
    s_open(options);
    int fd = s_join_with_room(4096);
    t_sends(fd, "go\n");
    s_settle();
    t_shut(fd);
    s_settle(); /* its end is known */
    s_expect_bytes(fd, large, large_size);
    s_settle();
    busy_over = true;
    s_until(&end_seen, 1);
    s_leave(fd);
    s_close();
    free(large);
}

/* An end that a read has told of is no news. */
static int read_and_wait(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *ended = (bool *)tsrv_data(stream);
    tsrv_slice line;
    int rc = *ended ? (int)TSRV_EOF : tsrv_read_until(stream, "\n", 0, &line);
    (void)address, (void)context;
    if (rc != TSRV_EAGAIN) {
        CHECK_INT(rc, TSRV_EOF);
        *ended = true;
        rc = tsrv_wait(stream, 50);
    }
    end_seen += rc == TSRV_ETIMEOUT;
    return rc;
}

TEST_STREAM(an_end_that_was_read_ends_no_wait)
{
    tsrv_server_options options = {0};
    options.handle_stream = read_and_wait;
    options.data_size = sizeof(bool);
    end_seen = 0;
    s_open(options);
    int fd = s_join();
    s_settle();
    t_shut(fd);
    s_until(&end_seen, 1);
    s_leave(fd);
    s_close();
}

/* Answers two lines that come together, the second one when the output has gone. It then only waits. */
static int answer_two_and_wait(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char memory[8];
    int *step = (int *)tsrv_data(stream), rc = TSRV_OK;
    tsrv_slice line;
    (void)address;
    if (*step == 0 && (rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        limit_output(stream);
        CHECK_INT(tsrv_write(stream, large, large_size), TSRV_OK);
        ++*step;
    }
    if (*step == 1 && rc == TSRV_OK) {
        rc = context != NULL ? tsrv_read_into(stream, memory, 4) : tsrv_read_until(stream, "\n", 0, &line);
        *step += rc == TSRV_OK;
    }
    if (*step == 2 && rc == TSRV_OK && (rc = tsrv_wait(stream, TSRV_NEVER)) == TSRV_OK) {
        CHECK_INT(tsrv_read_some(stream, 0, &line), TSRV_EOF);
        end_seen++;
    }
    return rc;
}

/* A read that has its message, and waits for the output, does not tell of an end which comes meanwhile. */
TEST_STREAM(an_end_behind_a_message_ends_the_next_wait)
{
    for (int into = 0; into <= 1; into++) {
        tsrv_server_options options = {0};
        options.handle_stream = answer_two_and_wait;
        options.context = into ? &end_seen : NULL;
        options.data_size = sizeof(int);
        options.write_high_water = 1;
        make_large(t_hard ? 100000 : 4 << 20);
        end_seen = 0;
        s_open(options);
        int fd = s_join_with_room(4096);
        t_sends(fd, "one\ntwo\n");
        s_settle();
        t_shut(fd);
        s_settle(); /* its end is known */
        s_expect_bytes(fd, large, large_size);
        s_until(&end_seen, 1);
        s_leave(fd);
        s_close();
        free(large);
    }
}

/* ---- a stream that goes while a coroutine lets the others run ------------------------------*/

enum { READ_SOME, READ_UNTIL, READ_BYTES, READ_MATCH, READ_CLOSE, READ_INTO, READ_NOTHING, FLUSH,
       WAIT, READS };

static tsrv_stream *dying, *busy;
static int kind, result, dying_closed, helped;

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
    CHECK_INT(dying_closed, 0); /* it has let them run, and the stream has waited for it */
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
    s_note_close(stream, reason, context);
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
    int64_t limit = t_patience();
    tsrv_server_options options = {0};
    dying = busy = NULL;
    dying_closed = helped = s_closed = 0;
    kind = which;
    options.handle_stream = die_or_be_busy;
    options.on_close = note_dying;
    s_open(options);
    int dead = s_join();
    t_shut(dead);
    memset(newlines, '\n', sizeof newlines);
    int fd = s_join();
    t_send(fd, newlines, sizeof newlines);
    while (!helped) {
        s_turn();
        if (dying_closed && over == NULL) {
            over = overwrite();
        }
        CHECK(t_now_ms() < limit);
    }
    free(over);
    s_leave(dead);
    t_close(fd);
    s_until(&s_closed, 2);
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
    s_serve(spawn_both);
    taker = t_connect(s_port);
    t_seen = take_before_sends;
    s_until(&helped, 1);
    t_seen = NULL;
    CHECK_INT(result, TSRV_ECLOSED);
    CHECK_MOST(writes, 40); /* a MiB, and not all of them */
    CHECK_LEAST(writes, 2);
    t_close(taker);
    s_until(&s_closed, 1);
    CHECK_INT(s_closed, 1);
    s_close();
}

TEST_SCRIPT(a_write_that_yields_learns_that_its_stream_has_ended)
{
    for (int i = 0; i < 6; i++) {
        check_late_write(i % 2, i / 2);
    }
}

/* ---- tsrv_set_deadline while a call waits --------------------------------------------------*/

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
        char *data = new_pattern(D_OUTPUT);
        limit_output(stream);
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
    s_open_with(d_handle, options);
    int fd = s_join_with_room(4096);
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
        s_finish(fd);
    }
    s_until(&s_closed, 1);
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
        char *data = new_pattern(D_OUTPUT);
        s_expect_bytes(fd, data, D_OUTPUT);
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

/* ---- a reset while nobody reads ------------------------------------------------------------*/

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
        s_serve(wait_for_the_reset);
        int fd = s_join();
        if ((r_case & R_UNREAD) != 0) {
            t_sends(fd, "abc");
        }
        s_settle();
        CHECK_INT(r_woken, 0);
        t_reset(fd);
        for (int i = 0; i < 20 && s_closed == 0; i++) {
            s_turn();
        }
        if (s_closed != 1 || r_error != -ECONNRESET || r_woken != 1) {
            T_FAIL("%s tsrv_shutdown, %s unread bytes: closed %d times, woken %d times, %s",
                   (r_case & R_SHUTDOWN) != 0 ? "after" : "without",
                   (r_case & R_UNREAD) != 0 ? "with" : "without", s_closed, r_woken,
                   tsrv_strerror(r_error));
        }
        CHECK_INT(s_reason, -ECONNRESET);
        s_close();
    }
}

/* After our own FIN, the peer's is a hang-up too, and not a reset. */
TEST_SOFT(an_end_after_our_end_is_no_reset)
{
    r_begun = r_woken = r_error = 0;
    r_case = R_SHUTDOWN;
    s_serve(wait_for_the_reset);
    int fd = s_join();
    t_sends(fd, "abc");
    s_settle();
    t_shut(fd);
    s_run_ms(200);
    CHECK_INT(r_error, TSRV_OK);
    CHECK_INT(s_closed, 0);
    CHECK_MOST(r_woken, 1);
    t_reset(fd);
    s_close();
    CHECK_INT(s_closed, 1);
}

/* ---- closing from another coroutine, for every call that waits -----------------------------*/

/* The last four are writes, in which only a coroutine waits. */
enum { K_SOME, K_BYTES, K_DROP, K_MATCH, K_MEM, K_FLUSH, K_PIECES, K_WRITEV, K_PRINTF, K_SENDFILE, K_CALLS };

typedef struct kick {
    int call, rc, waiting, ended, file;
    bool abort;
    tsrv_stream *stream;
} kick;

static size_t match_never(const char *data, size_t size, void *context)
{
    (void)data, (void)context;
    return size + 1;
}

static int wait_in(kick *k)
{
    tsrv_slice slice, pieces[2] = {{large, large_size / 2}, {large, large_size / 2}};
    switch (k->call) {
    case K_SOME: return tsrv_read_some(k->stream, 0, &slice);
    case K_BYTES: return tsrv_read_bytes(k->stream, 100, &slice);
    case K_DROP: return tsrv_read_bytes(k->stream, 100, NULL);
    case K_MATCH: return tsrv_read_until_match(k->stream, match_never, NULL, 0, &slice);
    case K_MEM: return tsrv_read_until_mem(k->stream, "\0\n", 2, 0, &slice);
    case K_FLUSH: return tsrv_flush(k->stream);
    case K_PIECES: return tsrv_write(k->stream, large, large_size * 4);
    case K_WRITEV: return tsrv_writev(k->stream, pieces, 2);
    case K_PRINTF: return tsrv_printf(k->stream, "%.*s", (int)large_size, large);
    default: return tsrv_sendfile(k->stream, k->file, 0, large_size * 4);
    }
}

static int be_kicked(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    kick *k = (kick *)context;
    tsrv_slice slice;
    (void)address;
    if (k->waiting == 0) {
        k->stream = stream;
        limit_large_output(stream);
        if (k->call == K_FLUSH) {
            CHECK_INT(tsrv_try_write(stream, large, large_size), TSRV_OK);
        }
        k->waiting = 1;
    }
    k->rc = wait_in(k);
    if (k->rc == TSRV_EAGAIN && t_mode == TSRV_CALLBACK) {
        return TSRV_EAGAIN;
    }
    CHECK_INT(tsrv_read_some(stream, 0, &slice), TSRV_ECLOSED);
    CHECK_INT(tsrv_write(stream, "x", 1), TSRV_ECLOSED);
    k->ended++;
    return TSRV_ECLOSED;
}

static void kick_it(void *context)
{
    kick *k = (kick *)context;
    CHECK_INT(k->ended, 0); /* it waits */
    CHECK_INT(k->abort ? tsrv_abort(k->stream) : tsrv_close(k->stream), TSRV_OK);
}

static void run_kick(int call, bool abort, int file)
{
    kick k = {call, 1, 0, 0, file, abort, NULL};
    tsrv_server_options options = {0};
    options.handle_stream = be_kicked;
    options.context = &k;
    options.max_write_buffer_size = large_size;
    options.write_high_water = large_size / 8;
    s_open(options);
    int fd = t_connect(s_port);
    if (call == K_BYTES || call == K_DROP || call == K_MATCH) {
        t_sends(fd, "some");
    }
    s_until(&k.waiting, 1);
    s_run_ms(50);
    CHECK_INT(tsrv_spawn(s_loop, kick_it, &k), TSRV_OK);
    s_settle();
    CHECK_INT(k.ended, 1);
    if (call == K_SENDFILE || call == K_WRITEV || call == K_PRINTF) {
        CHECK(k.rc == TSRV_ECLOSED || k.rc == TSRV_OK); /* taken as a whole before it waited */
    } else {
        CHECK_INT(k.rc, TSRV_ECLOSED);
    }
    t_reset(fd);
    s_settle();
    s_close();
}

TEST_STREAM(close_by_another_coroutine_ends_every_waiting_call)
{
    char path[] = "/tmp/wait_test.XXXXXX";
    int file = mkstemp(path);
    make_large(t_hard ? 400000 : 4 << 20);
    large = (char *)realloc(large, large_size * 4);
    CHECK(large != NULL && file >= 0 && unlink(path) == 0);
    fill_pattern(large, 0, large_size * 4);
    CHECK(write(file, large, large_size * 4) == (ssize_t)(large_size * 4));
    for (int call = 0; call < (t_mode == TSRV_CALLBACK ? K_PIECES : K_CALLS); call++) {
        run_kick(call, false, file);
        run_kick(call, true, file);
    }
    t_close(file);
    free(large);
}

/* ---- the end of a drain's grace ------------------------------------------------------------*/

enum { G_SLEEP, G_WAIT_FD, G_CONNECT, G_YIELD, G_WAITS };
static int g_wait, g_code, g_next_code, g_done, g_pipe[2];
static int64_t g_took, g_next_took;

static int g_wait_for(void)
{
    tsrv_stream *made;
    switch (g_wait) {
    case G_SLEEP: return tsrv_sleep(4000);
    case G_WAIT_FD: return tsrv_wait_fd(g_pipe[0], TSRV_READABLE, 4000);
    case G_YIELD: return tsrv_sleep(0);
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
    s_serve(run_on);
    int fd = s_join();
    CHECK_INT(tsrv_server_drain(s_server, 300), TSRV_EAGAIN);
    s_until(&g_done, 1);
    CHECK_INT(g_code, TSRV_ECLOSED);
    CHECK_MOST(g_took, 1);
    CHECK_INT(g_next_code, TSRV_OK); /* only once */
    CHECK_LEAST(g_next_took, 50);
    s_expect_reset(fd);
    t_close(fd);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_OK);
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
    s_serve(sleep_twice);
    int fd = s_join();
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

/* ---- waits that begin before a stream's handler, or end behind it ----------------------------*/

static int woken_times, last_wait;

static void wait_to_the_last(void *context)
{
    while ((last_wait = tsrv_wait((tsrv_stream *)context, TSRV_NEVER)) == TSRV_OK && woken_times < 10) {
        woken_times++;
    }
}

static int nap(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    return tsrv_sleep(100);
}

/* A helper's wait ends with the stream, the next one with its handler, and behind that there is none. */
TEST_SCRIPT(a_wait_behind_the_handler_is_the_last)
{
    woken_times = 0;
    s_serve(nap);
    int fd = s_join();
    s_settle();
    tsrv_stream *stream = tsrv_server_next(s_server, NULL);
    CHECK_INT(tsrv_spawn(s_loop, wait_to_the_last, stream), TSRV_OK);
    s_settle();
    tsrv_abort(stream);
    s_settle();
    CHECK_INT(woken_times, 1);
    s_until(&s_closed, 1);
    CHECK_INT(woken_times, 2);
    CHECK_INT(last_wait, TSRV_ECLOSED);
    t_close(fd);
    s_close();
}

static void wait_for_the_new(void *context)
{
    (void)context;
    last_wait = tsrv_wait(tsrv_server_next(s_server, NULL), 100);
}

/* Who waits for a stream before its handler is called is no obstacle to that. */
TEST_STREAM(a_wait_before_the_handler)
{
    last_wait = 99;
    s_serve(echo_lines);
    CHECK_INT(tsrv_spawn(s_loop, wait_for_the_new, NULL), TSRV_OK);
    int fd = t_add_pair(s_server);
    s_echo(fd, "hello\n");
    s_run_ms(200);
    CHECK_INT(last_wait, TSRV_ETIMEOUT);
    s_finish(fd);
    s_close();
}

static int read_in_time(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    return tsrv_read_until(stream, "\n", 0, &line);
}

static void wake_it(void *context)
{
    tsrv_wake((tsrv_stream *)context);
}

/* Its time is over when something else happens to the stream, before its timer has fired. */
TEST_SOFT(a_read_whose_time_is_over_when_it_is_looked_at)
{
    tsrv_server_options options = {0};
    options.read_timeout_ms = 100;
    s_open_with(read_in_time, options);
    int fd = s_join();
    s_settle();
    v_now += (uint64_t)200 * 1000000;
    CHECK_INT(tsrv_loop_post(s_loop, wake_it, tsrv_server_next(s_server, NULL)), TSRV_OK);
    s_settle();
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    t_close(fd);
    s_close();
}

/* ---- when a time begins, and how long it may be ----------------------------------------------*/

static int64_t late_ms;

/* Takes 5 s for a line, and has 1 s for it to come. */
static int take_long_and_read(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *was_busy = (bool *)tsrv_data(stream);
    tsrv_slice line;
    int rc = TSRV_OK;
    (void)address, (void)context;
    while (rc == TSRV_OK) {
        if (!*was_busy) {
            *was_busy = true;
            v_now += (uint64_t)5000 * 1000000;
        }
        if ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
            tsrv_write(stream, line.data, line.size);
            *was_busy = false;
        }
    }
    if (rc == TSRV_ETIMEOUT) {
        late_ms = v_ms();
    }
    return rc;
}

/* Not at the beginning of the turn, which lasts that long. */
TEST_SOFT(the_time_of_a_read_begins_with_the_call)
{
    tsrv_server_options options = {0};
    options.read_timeout_ms = 1000;
    options.data_size = sizeof(bool);
    s_open_with(take_long_and_read, options);
    int fd = s_join();
    for (int i = 0; i < 2; i++) {
        s_run_ms(500);
        s_echo(fd, "hello\n");
    }
    int64_t start = v_ms();
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    CHECK(late_ms - start >= 1000 && late_ms - start <= 1100);
    t_close(fd);
    s_close();
}

static int busy_peer, served_peer;

static int time_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        if (line.size == 3) { /* "go": while this goes on, a line comes for the other stream, in time */
            v_now += (uint64_t)600 * 1000000;
            t_sends(served_peer, "hello\n");
            v_now += (uint64_t)600 * 1000000;
        } else {
            tsrv_write(stream, line.data, line.size);
        }
    }
    late_ms = rc == TSRV_ETIMEOUT ? v_ms() : late_ms;
    return rc;
}

static void take_long_and_serve(void *context)
{
    (void)context;
    v_now += (uint64_t)5000 * 1000000;
    served_peer = t_add_pair(s_server);
    late_ms = v_ms();
}

/* Nor when something else began to take long in the same turn. */
TEST_SOFT(the_time_of_a_read_begins_behind_what_took_long)
{
    tsrv_server_options options = {0};
    options.read_timeout_ms = 1000;
    s_open_with(time_lines, options);
    CHECK_INT(tsrv_loop_post(s_loop, take_long_and_serve, NULL), TSRV_OK);
    s_settle();
    int64_t start = late_ms;
    CHECK_INT(s_closed, 0);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    CHECK_LEAST(late_ms - start, 1000);
    CHECK_MOST(late_ms - start, 1100);
    t_close(served_peer);
    s_close();
}

/* Whose bytes came before its time was over is served, though the loop hears of both at once. */
TEST_SOFT(bytes_that_come_in_time_while_another_takes_long_are_read)
{
    tsrv_server_options options = {0};
    options.read_timeout_ms = 1000;
    s_open_with(time_lines, options);
    served_peer = s_join();
    busy_peer = s_join();
    s_settle();
    t_sends(busy_peer, "go\n");
    s_expect(served_peer, "hello\n");
    CHECK_INT(s_closed, 0);
    t_close(served_peer);
    t_close(busy_peer);
    s_until(&s_closed, 2);
    s_close();
}

/* Limits the first line, waits for the next without a limit, and limits it when something of it is there. */
static int limit_what_has_begun(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *count = (int *)tsrv_data(stream);
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    tsrv_set_timeout(stream, ++*count == 2 ? TSRV_NEVER : 1000, 0);
    rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc == TSRV_OK) {
        *count = 2;
        tsrv_set_timeout(stream, TSRV_NEVER, 0);
        rc = tsrv_read_until(stream, "\n", 0, &line);
    }
    late_ms = rc == TSRV_ETIMEOUT ? v_ms() : late_ms;
    return rc;
}

T_TEST(a_limit_begins_with_the_call_that_is_the_first_to_have_one, T_PER_BACKEND | T_CALLBACKS)
{
    tsrv_server_options options = {0};
    options.data_size = sizeof(int);
    s_open_with(limit_what_has_begun, options);
    int fd = s_join();
    s_send(fd, "one\n", 4);
    s_run_ms(5000);
    CHECK_INT(s_closed, 0);
    int64_t start = v_ms();
    s_send(fd, "t", 1);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    CHECK_LEAST(late_ms - start, 1000);
    CHECK_MOST(late_ms - start, 1200);
    t_close(fd);
    s_close();
}

static tsrv_stream *unlimited;

static int wait_for_ever(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    unlimited = stream;
    return tsrv_read_until(stream, "\n", 0, &line);
}

/* Not even if its handler is called for a part of what it waits for. */
T_TEST(a_limit_that_comes_while_a_read_waits_is_for_the_next_one, T_PER_BACKEND | T_CALLBACKS)
{
    tsrv_server_options options = {0};
    s_open_with(wait_for_ever, options);
    int fd = s_join();
    s_settle();
    for (int i = 0; i < 2; i++) {
        tsrv_set_timeout(unlimited, 100, 0);
        for (int part = 0; part < 3; part++) {
            s_send(fd, "t", 1);
            s_run_ms(1000);
            CHECK_INT(s_closed, 0);
        }
    }
    s_send(fd, "\n", 1);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_OK);
    t_close(fd);
    s_close();
}

static bool third_by_deadline;

/* Echoes; before the third line it limits what follows, as its case says. */
static int limit_the_third(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *lines = (int *)tsrv_data(stream);
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        tsrv_write(stream, line.data, line.size);
        if (++*lines == 2 && third_by_deadline) {
            tsrv_set_deadline(stream, 100);
        } else if (*lines == 2) {
            tsrv_set_timeout(stream, 100, 0);
        }
    }
    late_ms = v_ms();
    return rc;
}

/* A timer that is armed for a later time, or not at all, is set anew. */
TEST_SOFT(a_shorter_time_begins_with_the_next_read)
{
    for (int i = 0; i < 4; i++) {
        tsrv_server_options options = {0};
        options.data_size = sizeof(int);
        options.read_timeout_ms = i % 2 == 0 ? 10000 : 0;
        third_by_deadline = i / 2 == 1;
        s_open_with(limit_the_third, options);
        int fd = s_join();
        s_run_ms(300);
        s_echo(fd, "one\n");
        s_run_ms(300);
        int64_t start = v_ms();
        s_echo(fd, "two\n");
        s_until(&s_closed, 1);
        CHECK_INT(s_reason, TSRV_ETIMEOUT);
        CHECK_LEAST(late_ms - start, 99);
        CHECK_MOST(late_ms - start, 200);
        t_close(fd);
        s_close();
    }
}

/* Nor at that of the last turn, for what is called between two. */
TEST_SOFT(the_time_of_a_write_from_outside_begins_with_the_call)
{
    tsrv_server_options options = {0};
    options.write_timeout_ms = 2000;
    s_open_with(echo_lines, options);
    int fd = s_join_with_room(4096);
    s_echo(fd, "hello\n");
    s_settle();
    tsrv_stream *stream = tsrv_server_next(s_server, NULL);
    limit_output(stream);
    make_large(4 << 20);
    v_now += (uint64_t)10000 * 1000000; /* the program was busy elsewhere */
    int64_t start = v_ms();
    CHECK_INT(tsrv_write(stream, large, large_size), TSRV_OK);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    CHECK_LEAST(s_closed_ms - start, 2000);
    CHECK_MOST(s_closed_ms - start, 4100); /* the kernel, whose time is not ours, may move some more meanwhile */
    t_close(fd);
    s_close();
    free(large);
}

static int long_code;

/* Was busy until behind its deadline, and then waits as long as an int can say. */
static int wait_for_very_long(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *begun = (int *)tsrv_data(stream);
    tsrv_slice line;
    (void)address, (void)context;
    if (!*begun) {
        *begun = 1;
        tsrv_set_timeout(stream, INT_MAX, 0);
        tsrv_set_deadline(stream, 100);
        v_now += (uint64_t)1000 * 1000000;
    }
    long_code = tsrv_read_until(stream, "\n", 0, &line);
    return long_code;
}

/* Of two times the one that is past is the earlier one, also if the other is the farthest. */
TEST_SCRIPT(a_long_wait_hides_no_deadline_that_is_past)
{
    tsrv_server_options options = {0};
    options.idle_timeout_ms = INT_MAX;
    options.data_size = sizeof(int);
    long_code = 99;
    s_open_with(wait_for_very_long, options);
    int fd = s_join();
    s_run_ms(1000);
    CHECK_INT(long_code, TSRV_ETIMEOUT);
    t_close(fd);
    s_until(&s_closed, 1);
    s_close();
}
