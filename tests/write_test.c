/* Writes (>>write): data is the writer's again, writes keep their order and stay in one piece while others wait,
 * tsrv_writev needs no memory of its own, and tsrv_sendfile. */
#include "script.h"

#include "handlers.h"

/* ---- written data is the writer's again ----------------------------------------------------*/

static char *item;
static int got_item;

/* "get" sends the shared item, "delete" frees it. */
static int share_an_item(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        if (strcmp(line.data, "delete\n") == 0) {
            memset(item, 'X', large_size);
            free(item);
            item = NULL;
            tsrv_write(stream, "DELETED\n", 8);
        } else {
            got_item++;
            tsrv_write(stream, item, large_size);
        }
    }
    return rc;
}

/* What the kernel did not take is a copy by the time another one deletes the item. */
TEST_STREAM(row6_written_data_is_the_writers_again)
{
    tsrv_server_options options = {0};
    options.handle_stream = share_an_item;
    options.write_timeout_ms = TSRV_NEVER;
    make_large(t_hard ? 300000 : 8 << 20);
    options.write_high_water = large_size / 16;
    s_open(options);
    item = (char *)malloc(large_size);
    memcpy(item, large, large_size);
    int reader = t_connect(s_port), other = t_connect(s_port);
    t_sends(reader, "get\n");
    s_until(&got_item, 1);
    s_settle();
    t_sends(other, "delete\n");
    s_expect(other, "DELETED\n");
    CHECK(item == NULL);
    s_expect_bytes(reader, large, large_size);
    s_finish(reader);
    t_reset(other);
    s_settle();
    s_close();
    free(large);
}

/* ---- a limit that is set while the output is blocked ---------------------------------------*/

/* Writes more than anybody takes. */
static int write_too_much(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *begun = (bool *)tsrv_data(stream);
    (void)address, (void)context;
    if (!*begun) {
        *begun = true;
        limit_output(stream);
        tsrv_write(stream, large, large_size);
    }
    return tsrv_wait(stream, TSRV_NEVER) == TSRV_EAGAIN ? TSRV_EAGAIN : tsrv_flush(stream);
}

/* Returns how long the stream lasts behind the second limit; -1: the kernel, whose time is not virtual, has still taken
 * something then. */
static int64_t outlast(int before_ms, int then_ms)
{
    tsrv_server_options options = {0};
    bool moved = false;
    options.data_size = sizeof(bool);
    options.max_write_buffer_size = 2 * large_size;
    options.write_timeout_ms = before_ms;
    s_open_with(write_too_much, options);
    int fd = s_join();
    s_run_ms(100);
    int64_t start = v_ms(), limit = t_patience();
    tsrv_stream *stream = tsrv_server_next(s_server, NULL);
    size_t unsent = tsrv_unsent_size(stream);
    tsrv_set_timeout(stream, 0, then_ms);
    while (s_closed == 0) {
        moved = moved || (tsrv_error(stream) == TSRV_OK && tsrv_unsent_size(stream) != unsent);
        CHECK(t_now_ms() < limit);
        s_turn_ms(10);
    }
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    t_close(fd);
    s_close();
    return moved ? -1 : s_closed_ms - start;
}

/* It counts from then on, and does not wait for the peer to take a byte first. A longer one does not help who has
 * stalled already. */
TEST_SOFT(write_timeout_that_is_set_while_the_output_is_blocked)
{
    static const int limits[][2] = {{TSRV_NEVER, 200}, {30000, 200}, {400, 5000}};
    make_large(4 << 20);
    for (size_t i = 0; i < COUNT(limits); i++) {
        int64_t took = -1;
        for (int64_t limit = t_patience(); took < 0;) {
            CHECK(t_now_ms() < limit);
            took = outlast(limits[i][0], limits[i][1]);
        }
        CHECK_LEAST(took, 150);
        CHECK_MOST(took, 450);
    }
    free(large);
}

/* Writes more than the kernel takes at once, which are megabytes. */
static int write_more(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *begun = (bool *)tsrv_data(stream);
    (void)address, (void)context;
    if (!*begun) {
        *begun = true;
        tsrv_write(stream, large, large_size);
    }
    return tsrv_wait(stream, TSRV_NEVER) == TSRV_EAGAIN ? TSRV_EAGAIN : tsrv_flush(stream);
}

/* Until a socket is writable again a third of that has to go: for longer than the time it is not, though its peer reads
 * all the while. Who then stops has stalled. */
TEST_PLAIN_SOFT(peer_that_reads_slowly_has_not_stalled)
{
    static char some[40000];
    tsrv_server_options options = {0};
    make_large(16 << 20);
    options.data_size = sizeof(bool);
    options.max_write_buffer_size = 2 * large_size;
    options.write_timeout_ms = 1000;
    s_open_with(write_more, options);
    int fd = s_join();
    for (int i = 0; i < 60 && s_closed == 0; i++) {
        s_run_ms(100);
        CHECK(recv(fd, some, sizeof some, MSG_DONTWAIT) > 0 || errno == EAGAIN);
    }
    CHECK_INT(s_closed, 0);
    int64_t start = v_ms();
    s_run_ms(3000);
    CHECK_INT(s_closed, 1);
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    CHECK_MOST(s_closed_ms - start, 1600);
    t_close(fd);
    s_close();
    free(large);
}

#ifdef __linux__
/* Where the system does not tell what it keeps, or not any more, a socket that is not writable for so long has
 * stalled. */
static void stall_unknown(long first)
{
    tsrv_server_options options = {0};
    options.data_size = sizeof(bool);
    options.max_write_buffer_size = 2 * large_size;
    options.write_timeout_ms = 1000;
    s_open_with(write_more, options);
    int fd = s_join();
    t_fail_call("ioctl", EINVAL, first, true);
    int64_t start = v_ms();
    s_run_ms(3000);
    CHECK(t_fault_hits > 0);
    t_fault_at = 0;
    CHECK_INT(s_closed, 1);
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    CHECK_NEAR_MS(s_closed_ms - start, 900, 1600);
    t_close(fd);
    s_close();
}

TEST_PLAIN_SOFT(peer_of_whom_nothing_is_known_has_stalled)
{
    make_large(16 << 20);
    stall_unknown(1);
    stall_unknown(2);
    free(large);
}
#endif

/* ---- tsrv_try_write during a write that waits ----------------------------------------------*/

static tsrv_stream *shared_stream;
static int tried, taken;
static bool written;

/* Every 10 ms while the large one is under way. */
static void try_between(void *context)
{
    (void)context;
    for (int i = 0; i < 50; i++) {
        int rc = tsrv_try_write(shared_stream, "<try>", 5);
        CHECK(rc == TSRV_OK || rc == TSRV_EFULL);
        taken += rc == TSRV_OK;
        tried++;
        CHECK_INT(tsrv_sleep(10), TSRV_OK);
    }
    tsrv_wake(shared_stream);
}

static void write_large(void *context)
{
    CHECK_INT(tsrv_write(shared_stream, large, large_size * *(size_t *)context), TSRV_OK);
    written = true;
    tsrv_wake(shared_stream);
}

static int write_and_be_tried(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address;
    if (shared_stream == NULL) {
        shared_stream = stream;
        limit_large_output(stream);
        CHECK_INT(tsrv_spawn(tsrv_stream_loop(stream), write_large, context), TSRV_OK);
        CHECK_INT(tsrv_spawn(tsrv_stream_loop(stream), try_between, NULL), TSRV_OK);
    }
    while (tried < 50 || !written) {
        if (tsrv_wait(stream, TSRV_NEVER) == TSRV_EAGAIN) {
            return TSRV_EAGAIN;
        }
    }
    return TSRV_OK;
}

/* Whatever was taken comes whole, behind the write that waits; what was not leaves nothing. */
static void try_during(size_t times)
{
    tsrv_server_options options = {0};
    tried = taken = 0;
    written = false;
    shared_stream = NULL;
    options.handle_stream = write_and_be_tried;
    options.context = &times;
    options.max_write_buffer_size = large_size;
    options.write_high_water = large_size / 8;
    options.write_timeout_ms = TSRV_NEVER;
    s_open(options);
    int fd = t_connect(s_port);
    s_run_ms(200);
    CHECK(tried > 10);
    s_expect_bytes(fd, large, large_size * times);
    s_until(&tried, 50);
    for (int i = 0; i < taken; i++) {
        s_expect(fd, "<try>");
    }
    s_leave(fd);
    s_close();
}

TEST_STREAM(try_write_during_a_write_that_waits)
{
    make_large(4 * (t_hard ? 100000 : 4 << 20));
    large_size /= 4;
    try_during(1);
    try_during(4); /* taken in pieces */
    free(large);
}

/* ---- a write behind one that is larger than the limit --------------------------------------*/

enum { L_WRITE, L_WRITEV, L_PRINTF, L_SENDFILE, L_KINDS };
enum { L_HUGE = 40 << 20 };
static tsrv_server *sink;
static tsrv_stream *upstream;
static int sink_port, sink_reads, sink_done, l_kind, l_huge_done, l_huge_code, l_codes[2], l_error;
static FILE *l_file;
static char *l_huge;
static size_t sink_got;

static char sink_last[4];

/* Reads nothing, then everything: each byte must come in the order of the writes. */
static int take_late(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice some;
    int rc;
    (void)address, (void)context;
    while (!sink_reads) {
        CHECK_INT(tsrv_sleep(10), TSRV_OK);
    }
    while ((rc = tsrv_read_some(stream, 0, &some)) == TSRV_OK) {
        for (size_t i = 0; i < some.size; i++, sink_got++) {
            if (sink_got < L_HUGE) {
                CHECK_INT(some.data[i], 0);
            } else {
                CHECK(sink_got < L_HUGE + sizeof sink_last);
                sink_last[sink_got - L_HUGE] = some.data[i];
            }
        }
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

/* Its writes are taken behind the helper's huge one, and the first waits until the grace of its server is over: what
 * was taken stays where it is. */
static int write_behind(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    CHECK_INT(tsrv_connect("127.0.0.1", sink_port, NULL, &upstream), TSRV_OK);
    CHECK_INT(tsrv_spawn(s_loop, write_huge, NULL), TSRV_OK);
    CHECK_INT(tsrv_sleep(20), TSRV_OK);
    l_codes[0] = write_one('B');
    l_error = tsrv_error(upstream);
    sink_reads = 1;
    l_codes[1] = write_one('C');
    while (!l_huge_done) {
        tsrv_sleep(1);
    }
    tsrv_close(upstream);
    return TSRV_OK;
}

static void check_cut_write(int which)
{
    static const char *const last[] = {"BC", "BBCC", "BC", "BB"};
    tsrv_server_options options = {0};
    l_kind = which;
    sink_reads = sink_done = l_huge_done = 0;
    sink_got = 0;
    s_serve(write_behind);
    options.handle_stream = take_late;
    sink = s_new_server(options);
    sink_port = t_listen(sink);
    int fd = s_join();
    s_run_ms(100);
    CHECK_INT(tsrv_server_drain(s_server, 100), TSRV_EAGAIN);
    s_until(&sink_done, 1);
    s_until(&s_closed, 1);
    CHECK_INT(l_codes[0], TSRV_ECLOSED);
    CHECK_INT(l_error, TSRV_OK);
    CHECK_INT(l_codes[1], TSRV_OK);
    CHECK_INT(l_huge_code, TSRV_OK);
    CHECK_MEM(sink_last, sink_got - L_HUGE, last[which], strlen(last[which]));
    t_close(fd);
    tsrv_server_free(sink);
    s_close();
}

TEST_SCRIPT(a_write_whose_wait_is_cut_keeps_its_place)
{
    l_huge = (char *)calloc(1, L_HUGE);
    l_file = tmpfile();
    CHECK(l_huge != NULL && l_file != NULL && fwrite("BB", 2, 1, l_file) == 1);
    fflush(l_file);
    for (int which = 0; which < L_KINDS; which++) {
        check_cut_write(which);
    }
    fclose(l_file);
    free(l_huge);
}

/* ---- tsrv_writev ---------------------------------------------------------------------------*/

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
    s_serve(answer_in_pieces);
    int fd = s_join();
    t_sends(fd, "one\n\nthree\n");
    s_expect(fd, "<one>\n<>\n<three>\n");
    s_finish(fd);
    s_close();
}

TEST_SOFT(pieces_need_no_memory_of_their_own)
{
    s_serve(answer_in_pieces);
    int fd = s_join();
    for (int i = 0; i < 210; i++) {
        if (i == 10) {
            count_calls("malloc", "realloc");
        }
        t_sends(fd, "ask\n");
        s_expect(fd, "<ask>\n");
    }
    t_seen = NULL;
    CHECK_INT(calls_counted, 0);
    s_finish(fd);
    s_close();
}

/* Many lines in one go, so that the answers fill several blocks of the queue. */
TEST_SOFT(pieces_that_fill_blocks_need_no_memory_of_their_own)
{
    enum { LINES = 200, LINE = 300, ROUNDS = 12 };
    static char lines[LINES * LINE], answers[LINES * (LINE + 2)];
    for (int i = 0; i < LINES; i++) {
        char *line = lines + i * LINE, *answer = answers + i * (LINE + 2);
        fill_pattern(line, 0, LINE);
        line[LINE - 1] = '\n';
        answer[0] = '<';
        memcpy(answer + 1, line, LINE - 1);
        memcpy(answer + LINE, ">\n", 2);
    }
    s_serve(answer_in_pieces);
    int fd = s_join();
    for (int i = 0; i < ROUNDS; i++) {
        if (i == 4) {
            count_calls("malloc", "realloc");
        }
        s_send(fd, lines, sizeof lines);
        s_expect_bytes(fd, answers, sizeof answers);
    }
    t_seen = NULL;
    CHECK_INT(calls_counted, 0);
    s_finish(fd);
    s_close();
}

/* ---- pieces of any size, against an oracle -------------------------------------------------*/

#ifdef TSRV_VALGRIND /* where each round takes seconds */
enum { ANY_PIECES = 9, ANY_LARGEST = 70000, ANY_ROUNDS = 6 };
#else
enum { ANY_PIECES = 9, ANY_LARGEST = 70000, ANY_ROUNDS = 60 };
#endif
static char *any_source;            /* bytes that pieces are made of, */
static size_t any_at, any_promised; /* how many have been made so, and written with success */
static uint32_t any_seed;
static bool any_tries; /* by tsrv_try_writev */

static size_t any_below(size_t limit)
{
    any_seed = any_seed * 1664525u + 1013904223u;
    return (size_t)(any_seed >> 8) % limit;
}

/* For each line a write of pieces, most of them small, some large, some empty. */
static int write_any_pieces(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice pieces[ANY_PIECES];
    int rc;
    (void)address, (void)context;
    limit_output(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, NULL)) == TSRV_OK) {
        int count = (int)any_below(ANY_PIECES + 1);
        size_t total = 0;
        for (int i = 0; i < count; i++) {
            size_t most = any_below(3) == 0 ? ANY_LARGEST : any_below(2) == 0 ? 5000 : 20;
            pieces[i].size = any_below(5) == 0 ? 0 : any_below(most);
            pieces[i].data = pieces[i].size == 0 ? NULL : any_source + any_at + total;
            total += pieces[i].size;
        }
        rc = any_tries ? tsrv_try_writev(stream, pieces, count) : tsrv_writev(stream, pieces, count);
        if (rc == TSRV_OK) {
            any_at += total;
            any_promised += total;
        } else if (rc != TSRV_EFULL || !any_tries) {
            return rc;
        }
    }
    return rc;
}

/* What has come must be the pieces, and all of them where all writes have succeeded. */
static void check_any_pieces(tsrv_server_options options, uint32_t seed)
{
    char *got;
    int code;
    bool ended = false;
    any_at = any_promised = 0;
    any_seed = seed;
    s_open_with(write_any_pieces, options);
    int fd = t_connect_with_room(s_port, 4096);
    for (int i = 0; i < ANY_ROUNDS; i++) {
        if (send(fd, "ask\n", 4, T_NOSIGNAL) != 4) {
            CHECK(t_fault_at != 0); /* the stream has ended, which is told once */
            ended = true;
        }
        if (any_below(3) == 0) {
            s_run_ms(20);
        }
    }
    shutdown(fd, SHUT_WR);
    got = (char *)malloc((size_t)ANY_ROUNDS * ANY_PIECES * ANY_LARGEST);
    size_t size = s_recv(fd, got, (size_t)ANY_ROUNDS * ANY_PIECES * ANY_LARGEST, &code);
    CHECK_MEM(got, size < any_promised ? size : any_promised, any_source, size < any_promised ? size : any_promised);
    CHECK(size == any_promised || (t_fault_at != 0 && (ended || code == ECONNRESET)));
    free(got);
    t_close(fd);
    s_until(&s_closed, 1);
    s_close();
}

static void make_any_source(void)
{
    size_t size = (size_t)ANY_ROUNDS * ANY_PIECES * ANY_LARGEST;
    any_source = (char *)malloc(size);
    CHECK(any_source != NULL);
    fill_pattern(any_source, 0, size);
}

static void check_any_limits(void)
{
    static const size_t limits[] = {0, 40000, 300000};
    make_any_source();
    for (size_t i = 0; i < COUNT(limits); i++) {
        tsrv_server_options options = {0};
        if (t_mode == TSRV_CALLBACK && limits[i] != 0 && !any_tries) {
            continue; /* a write above the limit ends the stream: elsewhere */
        }
        options.max_write_buffer_size = limits[i];
        for (uint32_t seed = 1; seed <= 3; seed++) {
            check_any_pieces(options, seed);
            s_loop_options.max_total_buffer = s_loop_options.max_total_buffer == 0 ? 200000 : 0;
        }
    }
    free(any_source);
}

TEST_PLAIN_SOFT(any_pieces_come_whole_and_in_order)
{
    check_any_limits();
}

TEST_PLAIN_SOFT(any_pieces_that_are_tried_come_whole_or_not_at_all)
{
    any_tries = true;
    check_any_limits();
}

/* Without memory the stream ends, and what has come until then is right. */
TEST_PLAIN_SOFT(any_pieces_without_memory_leave_no_gap)
{
    tsrv_server_options options = {0};
    long hits = 0;
    make_any_source();
    for (int i = 1; i < 40; i += 3) {
        t_fail_call("malloc", ENOMEM, 20 + i, i % 2 == 0);
        check_any_pieces(options, (uint32_t)i);
        hits += t_fault_hits;
        t_fail_call("malloc", 0, 0, false);
    }
    CHECK_LEAST(hits, 1);
    free(any_source);
}

/* Very many pieces that are closed before they have gone keep their order, and cost what they are. */
static int write_many_pieces(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    enum { MANY = 50000, EACH = 12 };
    tsrv_slice *pieces = (tsrv_slice *)malloc(MANY * sizeof *pieces);
    (void)address, (void)context;
    CHECK(pieces != NULL);
    limit_output(stream);
    for (int i = 0; i < MANY; i++) {
        pieces[i].data = any_source + i * EACH;
        pieces[i].size = EACH;
    }
    any_promised = (size_t)MANY * EACH;
    CHECK_INT(tsrv_writev(stream, pieces, MANY), TSRV_ECLOSED);
    free(pieces);
    return TSRV_OK;
}

static void close_only(void *context)
{
    (void)context;
    tsrv_close(tsrv_server_next(s_server, NULL));
}

TEST_SCRIPT(pieces_that_are_closed_go_all_the_same)
{
    tsrv_server_options options = {0};
    tsrv_timer timer = {0};
    char *got;
    int code;
    make_any_source();
    options.max_write_buffer_size = 100000;
    options.close_timeout_ms = TSRV_NEVER;
    s_open_with(write_many_pieces, options);
    int fd = s_join_with_room(4096);
    CHECK_INT(tsrv_timer_start(s_loop, &timer, 10, close_only, NULL), TSRV_OK);
    s_run_ms(100);
    got = (char *)malloc(any_promised + 1);
    CHECK(got != NULL);
    CHECK_INT(s_recv(fd, got, any_promised + 1, &code), any_promised);
    CHECK_MEM(got, any_promised, any_source, any_promised);
    free(got);
    t_close(fd);
    s_until(&s_closed, 1);
    s_close();
    free(any_source);
}

/* ---- two that write pieces -----------------------------------------------------------------*/

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
    limit_output(stream);
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
    char *got = new_pattern(size);
    s_open_with(two_write_pieces, options);
    int fd = s_join_with_room(4096);
    CHECK_INT(s_recv(fd, got, size, &code), size);
    check_messages(got, size);
    s_leave(fd);
    s_until(&s_closed, 1);
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

/* ---- a flush that is done when the stream is closed ----------------------------------------*/

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
    s_serve(end_beside_a_flush);
    int fd = t_connect(s_port);
    s_settle();
    CHECK_INT(flushed, 0);
    while (recv(fd, much, sizeof much, MSG_DONTWAIT) > 0) {
    }
    t_sends(fd, "x");
    s_until(&flushed, 1);
    CHECK_INT(flush_code, TSRV_OK);
    t_close(fd);
    s_until(&s_closed, 1);
    s_close();
}

/* ---- tsrv_sendfile of small files ----------------------------------------------------------*/

static char *file_bytes;
static size_t file_promised;
static int file_code, file_served;
static FILE *file;

/* A file of so many bytes. */
static void make_file(size_t size)
{
    file = tmpfile();
    file_bytes = new_pattern(size);
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
    s_expect(fd, "head\n");
    s_expect_bytes(fd, file_bytes, size);
    s_expect(fd, "tail\n");
}

/* Returns how many calls of sendfile, or of fcntl, which duplicates, it took. */
static int serve_file(size_t size, size_t max_write_buffer_size)
{
    tsrv_server_options options = {0};
    options.max_write_buffer_size = max_write_buffer_size;
    file_served = 0;
    make_file(size);
    s_open_with(send_file, options);
    int fd = s_join();
    count_calls("sendfile", "fcntl");
    t_sends(fd, "one\ntwo\n");
    expect_file(fd, size);
    expect_file(fd, size);
    CHECK_INT(file_code, TSRV_OK);
    int calls = calls_counted;
    t_seen = NULL;
    s_finish(fd);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_EOF);
    s_close();
    remove_file();
    return calls;
}

TEST_STREAM(small_files_are_read_at_once)
{
    static const size_t sizes[] = {1, 100, 8192, 16000, 16383};
    for (size_t i = 0; i < COUNT(sizes); i++) {
        CHECK_INT(serve_file(sizes[i], 0), 0);
    }
}

/* Two small parts of a file, and then text, none of which the kernel takes. */
static int send_parts(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int fd = open_file();
    (void)address, (void)context;
    limit_output(stream);
    while (send(tsrv_fd(stream), file_bytes, 4 * KIB, MSG_DONTWAIT | T_NOSIGNAL) > 0) {
    }
    CHECK(errno == EAGAIN);
    for (int i = 0; i < 2; i++) {
        CHECK_INT(tsrv_sendfile(stream, fd, 0, 7 * KIB), TSRV_OK);
    }
    t_close(fd);
    file_code = tsrv_try_write(stream, file_bytes, 8 * KIB);
    CHECK_INT(tsrv_try_write(stream, file_bytes, 9 * KIB), TSRV_EFULL);
    tsrv_abort(stream);
    return TSRV_ECLOSED;
}

/* What is read of a file at once does not count against max_write_buffer_size either. */
TEST_PLAIN_SOFT(small_files_do_not_count)
{
    tsrv_server_options options = {0};
    options.max_write_buffer_size = 16 * KIB;
    make_file(16 * KIB);
    s_open_with(send_parts, options);
    int fd = s_join();
    s_until(&s_closed, 1);
    CHECK_INT(file_code, TSRV_OK);
    t_close(fd);
    s_close();
    remove_file();
}

/* Else an answer would be its head, and then the next one. */
static int send_no_file(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc != TSRV_OK) {
        return rc;
    }
    CHECK_INT(tsrv_write(stream, "head\n", 5), TSRV_OK);
    CHECK_INT(tsrv_sendfile(stream, -1, 0, 100), -EBADF);
    CHECK_INT(tsrv_write(stream, "tail\n", 5), -EBADF);
    return tsrv_read_until(stream, "\n", 0, &line);
}

TEST_STREAM(file_that_cannot_be_looked_at_ends_the_stream)
{
    s_serve(send_no_file);
    int fd = s_join();
    t_sends(fd, "one\n");
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, -EBADF);
    t_close(fd);
    s_close();
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
    t_fail_call("pread", EINTR, 1, false);
    CHECK_INT(serve_file(3000, 0), 0);
    CHECK_INT(t_fault_hits, 1);
}

static void check_broken_file(size_t size, size_t promised)
{
    file_served = 0;
    make_file(size);
    file_promised = promised;
    s_serve(send_file);
    int fd = s_join();
    t_sends(fd, "one\n");
    s_expect_reset(fd);
    s_until(&s_closed, 1);
    CHECK_INT(file_served, 1);
    CHECK_INT(s_reason, -EIO);
    t_close(fd);
    s_close();
    CHECK_INT(s_closed, 1);
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
    t_fail_call("pread", EIO, 1, false);
    check_broken_file(100, 100);
    CHECK_INT(file_code, -EIO);
}

static int send_file_without_memory(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc == TSRV_OK) {
        int fd = open_file();
        t_fail_call("malloc", 0, 1, false);
        rc = tsrv_sendfile(stream, fd, 0, file_promised);
        t_fault_at = 0;
        CHECK_INT(t_fault_hits, 1);
        t_close(fd);
    }
    return rc;
}

TEST_STREAM(small_files_that_find_no_memory)
{
    make_file(10000);
    s_serve(send_file_without_memory);
    tsrv_set_log(t_no_log, NULL);
    int fd = s_join();
    t_sends(fd, "one\n");
    s_expect_reset(fd);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, -ENOMEM);
    t_close(fd);
    s_close();
    remove_file();
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
    s_serve(send_to_nobody);
    gone_fd = s_join();
    t_sends(gone_fd, "now\n");
    s_until(&s_closed, 1);
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

/* A program that has it blocked finds none afterwards that it did not raise, */
TEST_SOFT(no_sigpipe_from_a_file_where_it_is_blocked)
{
    signal(SIGPIPE, SIG_DFL);
    t_block_sigpipe();
    check_no_sigpipe();
}

/* and still finds its own. */
TEST_SOFT(a_sigpipe_that_was_pending_stays)
{
    signal(SIGPIPE, SIG_DFL);
    t_block_sigpipe();
    raise(SIGPIPE);
    CHECK(sigpipe_is_pending());
    check_no_sigpipe();
}

/* ---- a queue that is full, and a kernel that is not --------------------------------------------*/

enum { FULL_LIMIT = 8192, FULL_PIECE = 1000, FULL_PIECES = 40 };

/* Answers with much more than may be unsent, in pieces that are collected: those of writev, of printf, or plain. */
static int answer_in_excess(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    char piece[FULL_PIECE + 1];
    tsrv_slice line, halves[2];
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    (void)address, (void)context;
    for (int i = 0; rc == TSRV_OK && i < FULL_PIECES; i++) {
        memset(piece, 'a' + i % 26, FULL_PIECE);
        piece[FULL_PIECE] = 0;
        halves[0].data = piece;
        halves[0].size = 1;
        halves[1].data = piece + 1;
        halves[1].size = FULL_PIECE - 1;
        rc = i % 3 == 0   ? tsrv_write(stream, piece, FULL_PIECE)
             : i % 3 == 1 ? tsrv_writev(stream, halves, 2)
                          : tsrv_printf(stream, "%s", piece);
        CHECK_INT(rc, TSRV_OK);
        CHECK(tsrv_unsent_size(stream) <= FULL_LIMIT + 1024); /* records of TLS are longer than what is in them */
    }
    return rc;
}

/* What is queued is sent before anything is refused: a peer that reads has not been given its chance in this call. */
TEST_SOFT(nothing_is_refused_that_the_kernel_would_take)
{
    char expected[FULL_PIECES * FULL_PIECE];
    tsrv_server_options options = {0};
    options.handle_stream = answer_in_excess;
    options.max_write_buffer_size = FULL_LIMIT;
    for (int i = 0; i < FULL_PIECES; i++) {
        memset(expected + i * FULL_PIECE, 'a' + i % 26, FULL_PIECE);
    }
    s_open(options);
    int fd = s_join();
    t_sends(fd, "go\n");
    s_expect_bytes(fd, expected, sizeof expected);
    s_expect_eof(fd);
    s_leave(fd);
    s_close();
}

/* ---- what cannot be written ------------------------------------------------------------------*/

static int arguments_seen;

/* Sizes that no memory has, negative counts and offsets: refused, and the stream is in use as before. */
static int write_nonsense(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    const tsrv_slice huge[] = {{"abc", SIZE_MAX - 1}, {"def", 2}}, good[] = {{"g", 1}, {"ood", 3}};
    FILE *text = tmpfile();
    (void)address, (void)context;
    CHECK(text != NULL && fputs("text", text) >= 0 && fflush(text) == 0);
    CHECK_INT(tsrv_writev(stream, huge, 2), TSRV_EINVAL);
    CHECK_INT(tsrv_try_writev(stream, huge, 2), TSRV_EINVAL);
    CHECK_INT(tsrv_writev(stream, good, -1), TSRV_EINVAL);
    CHECK_INT(tsrv_try_writev(stream, good, -1), TSRV_EINVAL);
    CHECK_INT(tsrv_try_write(stream, "x", SIZE_MAX), TSRV_EFULL);
    CHECK_INT(tsrv_sendfile(stream, fileno(text), -1, 1), TSRV_EINVAL);
    CHECK_INT(tsrv_writev(stream, good, 0), TSRV_OK);
    CHECK_INT(tsrv_try_writev(stream, good, 0), TSRV_OK);
    CHECK_INT(tsrv_writev(stream, good, 2), TSRV_OK);
    CHECK_INT(tsrv_sendfile(stream, fileno(text), 1, 3), TSRV_OK);
    fclose(text);
    arguments_seen++;
    return 0;
}

TEST_STREAM(what_cannot_be_written_is_refused)
{
    arguments_seen = 0;
    s_serve(write_nonsense);
    int fd = s_join();
    s_expect(fd, "goodext");
    s_finish(fd);
    s_close();
    CHECK_INT(arguments_seen, 1);
}

/* Longer than the library formats on its stack. */
static int print_long(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc, kind = *(int *)context;
    (void)address;
    t_fail_call("malloc", 0, 1, kind != 0);
    if (kind == 0) {
        t_fault_at = 0;
    }
    if (kind == 2) {
        tsrv_close(stream);
    }
    rc = tsrv_printf(stream, "%0300d", 7);
    t_fault_at = 0;
    t_record(rc);
    return rc;
}

TEST_SOFT(long_texts_that_find_no_memory_end_the_stream)
{
    static const int codes[] = {TSRV_OK, -ENOMEM, TSRV_ECLOSED};
    for (int kind = 0; kind < 3; kind++) {
        tsrv_server_options options = {0};
        options.handle_stream = print_long;
        options.context = &kind;
        t_watch_log();
        s_open(options);
        int fd = s_join();
        s_turn();
        t_wait_records(kind + 1);
        CHECK_INT(t_recorded(kind), codes[kind]);
        t_close(fd);
        s_close();
    }
}

/* ---- what cannot be written, or read ---------------------------------------------------------*/

static int misused;

/* Each is refused by itself, and the stream goes on. */
static int misuse(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static const wchar_t none[] = {0x20ac, 0}; /* the locale does not have it */
    char delimiter[300];
    tsrv_slice huge[3] = {{"a", SIZE_MAX - 1}, {"b", 2}, {"c", 1}}, slice;
    FILE *empty = tmpfile();
    (void)address, (void)context;
    CHECK(empty != NULL);
    memset(delimiter, 'x', sizeof delimiter);
    CHECK_INT(tsrv_printf(stream, "%ls", none), TSRV_EINVAL);
    CHECK_INT(tsrv_writev(stream, huge, 3), TSRV_EINVAL);
    CHECK_INT(tsrv_writev(stream, huge, -1), TSRV_EINVAL);
    CHECK_INT(tsrv_try_writev(stream, huge, 3), TSRV_EINVAL);
    CHECK_INT(tsrv_read_until_mem(stream, delimiter, sizeof delimiter, 0, &slice), TSRV_EINVAL);
    CHECK_INT(tsrv_read_until_mem(stream, delimiter, 0, 0, &slice), TSRV_EINVAL);
    CHECK_INT(tsrv_read_until_match(stream, NULL, NULL, 0, &slice), TSRV_EINVAL);
    CHECK_INT(tsrv_read_into(stream, NULL, 1), TSRV_EINVAL);
    CHECK_INT(tsrv_sendfile(stream, fileno(empty), INT64_MAX - 1, 2), TSRV_EINVAL);
    if (sizeof(size_t) == 8) { /* with what is written then all would be 0 bytes, which are sent already */
        CHECK_INT(tsrv_sendfile(stream, fileno(empty), 0, SIZE_MAX), TSRV_EINVAL);
    }
    CHECK_INT(tsrv_write(stream, "good\n", 5), TSRV_OK);
    CHECK_INT(tsrv_unsent_size(stream), 5);
    if (sizeof(size_t) == 8) { /* nor is there so much to send behind what is unsent */
        CHECK_INT(tsrv_sendfile(stream, fileno(empty), 0, INT64_MAX - 4), TSRV_EINVAL);
        CHECK_INT(tsrv_unsent_size(stream), 5);
    }
    fclose(empty);
    misused++;
    return TSRV_OK;
}

TEST_SOFT(sizes_and_arguments_that_cannot_be_are_refused)
{
    tsrv_server_options options = {0};
    options.max_buffer_size = 256;
    options.read_chunk_size = 256;
    s_open_with(misuse, options);
    int fd = s_join();
    s_until(&misused, 1);
    s_expect(fd, "good\n");
    s_finish(fd);
    s_close();
}

/* Where nothing can wait, more than the queue may hold ends the stream, in one piece as in several. */
static int overfill(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char zeros[3000];
    tsrv_slice pieces[2] = {{zeros, sizeof zeros}, {zeros, sizeof zeros}};
    (void)address;
    *(int *)context = tsrv_writev(stream, pieces, 2);
    CHECK_INT(tsrv_writev(stream, pieces, 2), TSRV_EFULL);
    return TSRV_OK;
}

TEST_CALLBACK(pieces_that_do_not_fit_end_the_stream)
{
    tsrv_server_options options = {0};
    int rc = 1;
    options.max_write_buffer_size = 5000;
    options.context = &rc;
    s_open_with(overfill, options);
    int fd = s_join();
    s_expect_reset(fd);
    CHECK_INT(rc, TSRV_EFULL);
    t_close(fd);
    s_close();
}

static size_t most_left;

/* In hard mode the kernel takes all but the last byte of some of them. */
static int write_more_than_queued(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc = TSRV_OK;
    (void)address, (void)context;
    for (int i = 0; i < 50 && rc == TSRV_OK; i++) {
        rc = tsrv_write(stream, "ab", 2);
        most_left = tsrv_unsent_size(stream) > most_left ? tsrv_unsent_size(stream) : most_left;
    }
    return rc;
}

/* In a coroutine it waits until all of it has gone, to the last byte. */
T_TEST(a_write_above_the_limit_waits_for_its_last_byte,
       T_PER_BACKEND | T_PER_HARDNESS | T_COROUTINES | T_PLAIN)
{
    tsrv_server_options options = {0};
    char got[100];
    int code;
    options.max_write_buffer_size = 1;
    most_left = 0;
    s_open_with(write_more_than_queued, options);
    int fd = s_join();
    CHECK_INT(s_recv(fd, got, sizeof got, &code), sizeof got);
    s_expect_eof(fd);
    CHECK_INT(most_left, 0);
    t_close(fd);
    s_close();
}

static int after_shutdown_rc[3];

/* tsrv_shutdown again, and of an output that has failed. */
static int shut_twice(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    (void)address, (void)context;
    if (after_shutdown_rc[0] == 1) {
        after_shutdown_rc[0] = tsrv_shutdown(stream);
        after_shutdown_rc[1] = tsrv_shutdown(stream);
    }
    return tsrv_read_bytes(stream, 1, &slice);
}

TEST_SOFT(shutdown_twice_is_one)
{
    after_shutdown_rc[0] = 1;
    s_serve(shut_twice);
    int fd = s_join();
    s_expect_eof(fd);
    CHECK_INT(after_shutdown_rc[0], TSRV_OK);
    CHECK_INT(after_shutdown_rc[1], TSRV_OK);
    tsrv_stream *stream = tsrv_server_next(s_server, NULL);
    stream->out_end = -EPIPE;
    CHECK_INT(tsrv_shutdown(stream), -EPIPE);
    t_close(fd);
    s_until(&s_closed, 1);
    s_close();
}

#ifdef __linux__
static void refuse_files(const char *name)
{
    if (strcmp(name, "sendfile") == 0) {
        t_fail_call(name, ENOSYS, 1, true);
    } else if (strcmp(name, "pread") == 0) {
        t_fail_call(name, EIO, 1, true);
    }
}

static int file_to_send = -1, send_code;

static int send_unreadable(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    int rc = tsrv_sendfile(stream, file_to_send, 0, 1 << 20);
    return rc == TSRV_OK ? tsrv_flush(stream) : rc;
}

static void note_code(tsrv_stream *stream, int reason, void *context)
{
    (void)stream, (void)context;
    send_code = reason;
    s_closed++;
}

/* The kernel does not send it, and it cannot be read either. */
TEST_PLAIN_SOFT(file_that_cannot_be_read_ends_the_stream)
{
    tsrv_server_options options = {0};
    FILE *zeros = tmpfile();
    CHECK(zeros != NULL && ftruncate(fileno(zeros), 1 << 20) == 0);
    file_to_send = fileno(zeros);
    options.on_close = note_code;
    s_open_with(send_unreadable, options);
    t_seen = refuse_files;
    int fd = s_join();
    s_until(&s_closed, 1);
    t_seen = NULL;
    t_fault_at = 0;
    CHECK_INT(send_code, -EIO);
    t_close(fd);
    fclose(zeros);
    s_close();
}
#endif

/* ---- pieces and failures ---------------------------------------------------------------------*/

enum { SCRAPS = 400, SCRAP = 100, NO_FAULT = 0, NO_MEMORY, NO_PEER, NO_PEER_FOR_TRY };
static int scraps_rc;

/* Many small pieces, which are copied, though together they are large. */
static int write_scraps(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char text[SCRAPS][SCRAP];
    tsrv_slice pieces[SCRAPS];
    int fault = *(int *)context;
    (void)address;
    for (int i = 0; i < SCRAPS; i++) {
        memset(text[i], 'a' + i % 26, SCRAP);
        pieces[i].data = text[i];
        pieces[i].size = SCRAP;
    }
    CHECK(SCRAPS * SCRAP >= TSRVI_DIRECT && SCRAP < TSRVI_LENT_LEAST);
    if (fault == NO_MEMORY) {
        t_fail_call("malloc", 0, 1, true);
        scraps_rc = tsrv_writev(stream, pieces, 3);
    } else if (fault == NO_PEER_FOR_TRY) {
        t_fail_call("send", EAGAIN, 1, true);
        CHECK_INT(tsrv_try_write(stream, text, 2000), TSRV_OK);
        t_fail_call("send", ECONNRESET, 1, true);
        scraps_rc = tsrv_try_write(stream, text, sizeof text);
    } else {
        t_fail_call("sendmsg", EPIPE, 1, fault == NO_PEER);
        t_fault_at = fault == NO_PEER;
        pieces[0].size = 0;
        scraps_rc = tsrv_writev(stream, pieces, SCRAPS);
    }
    t_fault_at = 0;
    if (scraps_rc < 0) {
        CHECK_INT(tsrv_write(stream, "x", 1), scraps_rc); /* it is over */
    }
    return scraps_rc;
}

TEST_PLAIN_SOFT(small_pieces_of_much_are_copied)
{
    static const int codes[] = {TSRV_OK, -ENOMEM, -EPIPE, -ECONNRESET};
    char expected[SCRAP];
    for (int fault = NO_FAULT; fault <= NO_PEER_FOR_TRY; fault++) {
        tsrv_server_options options = {0};
        options.context = &fault;
        options.max_write_buffer_size = 41000;
        scraps_rc = 1;
        s_open_with(write_scraps, options);
        int fd = s_join();
        s_until(&s_closed, 1);
        CHECK_INT(scraps_rc, codes[fault]);
        for (int i = 1; i < SCRAPS && fault == NO_FAULT; i++) {
            memset(expected, 'a' + i % 26, SCRAP);
            s_expect_bytes(fd, expected, SCRAP);
        }
        t_close(fd);
        s_close();
    }
}

/* ---- from outside ----------------------------------------------------------------------------*/

static int wait_to_be_woken(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    int rc = tsrv_wait(stream, TSRV_NEVER);
    return rc == TSRV_OK ? tsrv_error(stream) : rc;
}

/* Nothing can wait there: reads take what is there, and a flush says whether all has gone. */
TEST_PLAIN_SOFT(reads_and_flushes_from_outside_do_not_wait)
{
    static char zeros[1 << 20];
    char three[4] = "";
    tsrv_slice slice;
    s_serve(wait_to_be_woken);
    int fd = s_join_with_room(4096);
    tsrv_stream *stream = tsrv_server_next(s_server, NULL);
    s_settle();
    tsrv_set_log(t_no_log, NULL);
    CHECK_INT(tsrv_read_into(stream, three, 3), TSRV_EAGAIN);
    t_sends(fd, "abc");
    CHECK_INT(tsrv_read_into(stream, three, 3), TSRV_OK);
    CHECK_STR(three, "abc");
    t_sends(fd, "defghi");
    CHECK_INT(tsrv_read_bytes(stream, 3, &slice), TSRV_OK);
    CHECK_MEM(slice.data, slice.size, "def", 3);
    CHECK_INT(tsrv_read_into(stream, three, 3), TSRV_OK);
    CHECK_STR(three, "ghi");
    t_sends(fd, "x");
    CHECK_INT(tsrv_read_some(stream, 0, &slice), TSRV_OK);
    CHECK_MEM(slice.data, slice.size, "x", 1);
    CHECK_INT(tsrv_flush(stream), TSRV_OK);
    CHECK_INT(tsrv_try_write(stream, zeros, 50000), TSRV_OK);
    for (int i = 0; i < 1000 && tsrv_flush(stream) == TSRV_OK; i++) {
        CHECK_INT(tsrv_try_write(stream, zeros, 50000), TSRV_OK);
    }
    CHECK_INT(tsrv_flush(stream), TSRV_EAGAIN);
    CHECK(tsrv_unsent_size(stream) > 0);
    tsrv_abort(stream);
    s_until(&s_closed, 1);
    t_close(fd);
    s_close();
}

TEST_PLAIN_SOFT(nothing_until_the_end_is_read_from_outside)
{
    tsrv_slice slice = {NULL, 1};
    int rc;
    s_serve(wait_to_be_woken);
    int fd = s_join();
    tsrv_stream *stream = tsrv_server_next(s_server, NULL);
    s_settle();
    tsrv_set_log(t_no_log, NULL);
    t_shut(fd);
    for (int64_t end = t_patience(); (rc = tsrv_read_until_close(stream, 0, &slice)) == TSRV_EAGAIN;) {
        CHECK(t_now_ms() < end);
    }
    CHECK_INT(rc, TSRV_OK);
    CHECK_MEM(slice.data, slice.size, "", 0);
    tsrv_abort(stream);
    s_until(&s_closed, 1);
    t_close(fd);
    s_close();
}

/* ---- more than goes at a time, and limits ----------------------------------------------------*/

static char *much;

enum { LARGE_PART = 700000, LARGE_PARTS = 4 };

static int write_large_parts(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *begun = (bool *)tsrv_data(stream);
    tsrv_slice line;
    (void)address, (void)context;
    if (!*begun) {
        *begun = true;
        for (int i = 0; i < 2; i++) {
            CHECK_INT(tsrv_try_write(stream, much + i * LARGE_PART, LARGE_PART), TSRV_OK);
        }
        CHECK_INT(tsrv_write(stream, much + 2 * LARGE_PART, (LARGE_PARTS - 2) * LARGE_PART), TSRV_OK);
    }
    return tsrv_read_until(stream, "\n", 0, &line);
}

/* A queue of more than is sent in one go comes whole, and what is written behind it, too. */
TEST_PLAIN_SOFT(large_parts_of_a_queue_come_in_order)
{
    tsrv_server_options options = {0};
    much = new_pattern(LARGE_PARTS * LARGE_PART);
    options.data_size = sizeof(bool);
    options.max_write_buffer_size = 2 * LARGE_PARTS * LARGE_PART;
    s_open_with(write_large_parts, options);
    int fd = s_join();
    s_expect_bytes(fd, much, LARGE_PARTS * LARGE_PART);
    s_finish(fd);
    s_close();
    free(much);
}

static int echo_in_halves(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        tsrv_write(stream, line.data, line.size / 2);
        tsrv_write(stream, line.data + line.size / 2, line.size - line.size / 2);
    }
    return rc;
}

/* A mark that is less than a line stops nobody for good. */
TEST_STREAM(lines_above_the_high_water_are_echoed)
{
    tsrv_server_options options = {0};
    options.write_high_water = 10;
    s_open_with(echo_in_halves, options);
    int fd = s_join();
    for (int i = 0; i < 3; i++) {
        s_echo(fd, "a line that is longer than the mark\n");
    }
    s_finish(fd);
    s_close();
}

static int lent_code, lent_done;

static int lend_much(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    lent_code = tsrv_write(stream, much, LARGE_PART);
    lent_done++;
    return tsrv_wait(stream, TSRV_NEVER);
}

/* What the kernel has room for again goes as soon as anybody looks for room: the writer learns of it. */
TEST_SCRIPT(a_write_that_somebody_else_sends_is_done)
{
    tsrv_server_options options = {0};
    much = new_pattern(LARGE_PART);
    options.max_write_buffer_size = 1000;
    lent_done = 0;
    s_open_with(lend_much, options);
    int fd = t_add_pair(s_server);
    s_settle();
    tsrv_stream *stream = tsrv_server_next(s_server, NULL);
    char *got = (char *)malloc(LARGE_PART);
    size_t size = 0;
    CHECK(got != NULL);
    for (int64_t limit = t_patience(); tsrv_unsent_size(stream) > 0;) {
        ssize_t n;
        CHECK_INT(lent_done, 0);
        while ((n = recv(fd, got + size, LARGE_PART - size, MSG_DONTWAIT)) > 0) {
            size += (size_t)n;
        }
        CHECK_INT(tsrv_try_write(stream, much, 1001), TSRV_EFULL);
        CHECK(t_now_ms() < limit);
    }
    s_until(&lent_done, 1);
    CHECK_INT(lent_code, TSRV_OK);
    s_expect_bytes(fd, much + size, LARGE_PART - size);
    CHECK_MEM(got, size, much, size);
    t_close(fd);
    s_until(&s_closed, 1);
    s_close();
    free(got);
    free(much);
}

static void fail_to_send(const char *name)
{
    if (strcmp(name, "send") == 0 || strcmp(name, "sendmsg") == 0) {
        t_fail_call(name, ECONNRESET, 1, true);
    }
}

/* Where there is no room it is tried to make some: that the peer has gone is the reason then, and not the limit. */
TEST_PLAIN_SOFT(a_write_without_room_to_a_peer_that_has_gone)
{
    enum { LIMIT = 65536 };
    tsrv_server_options options = {0};
    much = new_pattern(LIMIT);
    options.max_write_buffer_size = LIMIT;
    s_open_with(echo_in_halves, options);
    int fd = t_add_pair(s_server);
    s_settle();
    tsrv_stream *stream = tsrv_server_next(s_server, NULL);
    while (tsrv_unsent_size(stream) < LIMIT / 2) {
        CHECK_INT(tsrv_write(stream, much, 8192), TSRV_OK);
        s_turn_ms(0);
    }
    t_seen = fail_to_send;
    CHECK_INT(tsrv_write(stream, much, LIMIT), -ECONNRESET);
    t_seen = NULL;
    t_fault_at = 0;
    CHECK_INT(tsrv_error(stream), -ECONNRESET);
    t_close(fd);
    s_until(&s_closed, 1);
    s_close();
    free(much);
}

/* A large part of a file, and behind it a small one, which is read at once. */
static int send_two_parts(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc == TSRV_OK) {
        int fd = open_file();
        limit_output(stream);
        CHECK_INT(tsrv_sendfile(stream, fd, 0, file_promised - 100), TSRV_OK);
        CHECK_INT(tsrv_sendfile(stream, fd, (int64_t)file_promised - 100, 100), TSRV_OK);
        t_close(fd);
    }
    return rc;
}

static int open_two_parts(void)
{
    tsrv_server_options options = {0};
    make_file(2 << 20);
    options.write_high_water = 4 << 20;
    s_open_with(send_two_parts, options);
    int fd = s_join_with_room(4096);
    t_sends(fd, "go\n");
    return fd;
}

TEST_PLAIN_SOFT(small_parts_behind_large_ones_come_in_order)
{
    int fd = open_two_parts();
    s_expect_bytes(fd, file_bytes, file_promised);
    s_leave(fd);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_OK);
    s_close();
    remove_file();
}

/* A file that cannot be sent on, just when the peer says something: the end comes first. */
TEST_PLAIN_SOFT(a_file_that_fails_when_input_comes)
{
    static char some[1 << 20];
    int fd = open_two_parts();
    ssize_t n;
    tsrv_set_log(t_no_log, NULL);
    s_settle();
    CHECK_INT(s_closed, 0);
    t_fail_call("sendfile", EIO, 1, true);
    t_sends(fd, "more\n");
    while ((n = recv(fd, some, sizeof some, MSG_DONTWAIT)) > 0) {
    }
    s_until(&s_closed, 1);
    CHECK(t_fault_hits > 0);
    t_fault_at = 0;
    CHECK_INT(s_reason, -EIO);
    s_expect_reset(fd);
    t_close(fd);
    s_close();
    remove_file();
}

static int code_behind_the_file;

static int send_a_file_and_read(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *sent = (bool *)tsrv_data(stream);
    tsrv_slice line;
    int rc = *sent ? (int)TSRV_OK : send_two_parts(stream, address, context);
    if (rc == TSRV_OK) {
        *sent = true;
        rc = code_behind_the_file = tsrv_read_until(stream, "\n", 0, &line);
    }
    return rc;
}

/* The connection is lost, and not the file: there is no gap, and what has come from the peer is there to be read. */
TEST_PLAIN_SOFT(a_connection_that_is_lost_while_a_file_is_sent_is_no_gap)
{
    static const int codes[] = {EPIPE, ECONNRESET, ETIMEDOUT, EHOSTUNREACH,
                                ENETUNREACH, ENETDOWN, ENOTCONN, ECONNABORTED};
    static char some[1 << 20];
    for (size_t i = 0; i < COUNT(codes); i++) {
        tsrv_server_options options = {0};
        options.write_high_water = 4 << 20;
        options.data_size = sizeof(bool);
        make_file(2 << 20);
        s_open_with(send_a_file_and_read, options);
        int fd = s_join_with_room(4096);
        t_sends(fd, "go\n");
        s_settle();
        t_fail_call("sendfile", codes[i], 1, true);
        while (t_fault_hits == 0) { /* once there is room again */
            while (recv(fd, some, sizeof some, MSG_DONTWAIT) > 0) {
            }
            s_turn();
        }
        t_fault_at = 0;
        t_sends(fd, "more\n");
        s_settle();
        CHECK_INT(code_behind_the_file, TSRV_OK);
        t_close(fd);
        s_until(&s_closed, 1);
        s_close();
        remove_file();
    }
}
