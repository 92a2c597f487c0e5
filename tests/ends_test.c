/* How a stream comes to its end (>>ends): half-closes, answers with unread input behind them, resets at every
 * point, peers that stay, and the ends of the two streams of a proxy. */
#include "script.h"

#include "handlers.h"

#include <sys/ioctl.h>

/* ---- a proxy -------------------------------------------------------------------------------*/

/* In tsrv_data of the client's stream, so valid until its handler has returned. */
typedef struct proxy_pair {
    tsrv_stream *client, *upstream;
    bool done; /* the second direction */
    bool over; /* both; rc is the first one's end */
    int rc;
} proxy_pair;

static int upstream_port, proxied, proxy_ends;
static int waits_in_join, waits_in_handler; /* few: a dead stream wakes each once */

static int pump(tsrv_stream *from, tsrv_stream *to)
{
    tsrv_slice data;
    int rc;
    while ((rc = tsrv_read_some(from, 0, &data)) == TSRV_OK &&
           (rc = tsrv_write(to, data.data, data.size)) == TSRV_OK) {
    }
    if (rc == TSRV_EOF) {
        tsrv_shutdown(to);
        return rc;
    }
    tsrv_abort(from); /* ends the other direction too, and frees nothing */
    tsrv_abort(to);
    return rc;
}

static void pump_back(void *context)
{
    proxy_pair *p = (proxy_pair *)context;
    pump(p->upstream, p->client);
    p->done = true;
    tsrv_wake(p->client);
}

/* In a coroutine. The second direction is one of its own, which this one outlives. */
static int pump_both(proxy_pair *p)
{
    int rc = tsrv_connect("127.0.0.1", upstream_port, NULL, &p->upstream);
    if (rc != TSRV_OK) {
        return rc;
    }
    CHECK_INT(tsrv_spawn(tsrv_stream_loop(p->client), pump_back, p), TSRV_OK);
    proxied++;
    rc = pump(p->client, p->upstream);
    while (!p->done) {
        waits_in_join++;
        tsrv_wait(p->client, TSRV_NEVER);
    }
    CHECK_INT(tsrv_close(p->upstream), TSRV_OK);
    return rc;
}

static void pump_apart(void *context)
{
    proxy_pair *p = (proxy_pair *)context;
    p->rc = pump_both(p);
    p->over = true;
    tsrv_wake(p->client);
}

/* In callback mode both directions are coroutines, and the handler only waits for their end. */
static int proxy(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    proxy_pair *p = (proxy_pair *)tsrv_data(stream);
    (void)address, (void)context;
    if (p->client == NULL) {
        p->client = stream;
        limit_large_output(stream);
        if (t_mode == TSRV_CALLBACK) {
            CHECK_INT(tsrv_spawn(tsrv_stream_loop(stream), pump_apart, p), TSRV_OK);
        } else {
            p->rc = pump_both(p);
            p->over = true;
        }
    }
    while (!p->over) {
        waits_in_handler++;
        if (tsrv_wait(stream, TSRV_NEVER) == TSRV_EAGAIN) {
            return TSRV_EAGAIN;
        }
    }
    proxy_ends++;
    return p->rc;
}

/* Answers when it has seen the end of the input. */
static int answer_the_whole(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice all;
    int rc = tsrv_read_until_close(stream, 0, &all);
    (void)address, (void)context;
    return rc == TSRV_OK ? tsrv_write(stream, all.data, all.size) : rc;
}

static tsrv_server *upstream;

static void open_proxy(tsrv_handler behind, tsrv_server_options options)
{
    proxied = proxy_ends = waits_in_join = waits_in_handler = 0;
    options.data_size = sizeof(proxy_pair);
    s_open_with(proxy, options);
    options.handle_stream = behind;
    upstream = s_new_server(options);
    upstream_port = t_listen(upstream);
}

static void close_proxy(void)
{
    CHECK_INT(proxy_ends, proxied);
    s_settle();
    tsrv_server_free(upstream);
    s_close();
}

TEST_STREAM(row1_half_close_proxy)
{
    enum { SIZE = 6000 };
    char data[SIZE], got[SIZE + 1];
    int code;
    tsrv_server_options options = {0};
    open_proxy(answer_the_whole, options);
    fill_pattern(data, 0, SIZE);
    int fd = t_connect(s_port);
    s_send(fd, data, SIZE);
    t_shut(fd);
    CHECK_MEM(got, s_recv(fd, got, SIZE + 1, &code), data, SIZE);
    CHECK_INT(code, 0);
    t_close(fd);
    s_until(&proxy_ends, 1);
    close_proxy();
}

/* ---- both directions of a proxy ------------------------------------------------------------*/

static int producers;

static void produce(void *context)
{
    proxy_pair *p = (proxy_pair *)context;
    CHECK_INT(tsrv_write(p->client, large, large_size), TSRV_OK);
    p->done = true;
    tsrv_wake(p->client);
}

static void consume(void *context)
{
    proxy_pair *p = (proxy_pair *)context;
    CHECK_INT(tsrv_read_bytes(p->client, large_size, NULL), TSRV_OK);
    p->over = true;
    tsrv_wake(p->client);
}

/* Sends all the time, and takes all the time; by coroutines, since in callback mode the handler's
 * own reads are held back while output waits. */
static int stream_both_ways(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    proxy_pair *p = (proxy_pair *)tsrv_data(stream);
    (void)address, (void)context;
    if (p->client == NULL) {
        p->client = stream;
        producers++;
        CHECK_INT(tsrv_spawn(tsrv_stream_loop(stream), produce, p), TSRV_OK);
        CHECK_INT(tsrv_spawn(tsrv_stream_loop(stream), consume, p), TSRV_OK);
    }
    while (!p->done || !p->over) {
        if (tsrv_wait(stream, TSRV_NEVER) == TSRV_EAGAIN) {
            return TSRV_EAGAIN;
        }
    }
    return TSRV_OK;
}

/* Turns until as much output waits as may: the peer takes no more. */
static void until_held_up(tsrv_stream *stream, size_t high_water)
{
    int64_t limit = t_patience();
    while (tsrv_unsent_size(stream) < high_water) {
        s_turn();
        CHECK(t_now_ms() < limit);
    }
}

/* The client does not read before it has written all; output that is held up holds up no input. */
TEST_STREAM(row2_directions_of_a_proxy_are_independent)
{
    tsrv_server_options options = {0};
    options.write_timeout_ms = TSRV_NEVER;
    options.write_high_water = t_hard ? 2000 : 100000;
    make_large(t_hard ? 120000 : 16 << 20);
    open_proxy(stream_both_ways, options);
    int fd = t_connect(s_port);
    s_until(&producers, 1);
    tsrv_stream *held = tsrv_server_next(s_server, NULL);
    until_held_up(held, options.write_high_water);
    s_send(fd, large, large_size);
    CHECK(tsrv_unsent_size(held) > 0);
    s_expect_bytes(fd, large, large_size);
    s_finish(fd);
    s_until(&proxy_ends, 1);
    close_proxy();
    free(large);
}

/* ---- a join under every end ----------------------------------------------------------------*/

/* A client whose proxy has a helper that reads from upstream. */
static int open_joined(void)
{
    tsrv_server_options options = {0};
    open_proxy(echo_bytes, options);
    int fd = t_connect(s_port);
    s_echo(fd, "through\n");
    CHECK_INT(proxied, 1);
    return fd;
}

TEST_STREAM(row8_join_when_the_client_resets)
{
    int fd = open_joined();
    t_reset(fd);
    s_until(&s_closed, 1);
    CHECK_INT(proxy_ends, 1);
    CHECK_INT(s_reason, -ECONNRESET);
    CHECK(waits_in_join <= 3 && waits_in_handler <= 3);
    close_proxy();
}

static void abort_upstreams(void *context)
{
    (void)context;
    for (tsrv_stream *s = tsrv_server_next(upstream, NULL); s != NULL;
         s = tsrv_server_next(upstream, s)) {
        tsrv_abort(s);
    }
}

TEST_STREAM(row8_join_when_the_upstream_resets)
{
    int fd = open_joined();
    CHECK_INT(tsrv_loop_post(s_loop, abort_upstreams, NULL), TSRV_OK);
    s_expect_reset(fd);
    s_until(&s_closed, 1);
    CHECK(waits_in_join <= 3 && waits_in_handler <= 3);
    t_close(fd);
    close_proxy();
}

TEST_STREAM(row8_join_in_a_drain)
{
    int fd = open_joined();
    s_drainer d = s_new_drain(0);
    s_begin_drain(&d);
    s_expect_eof(fd); /* the end of the input goes upstream, and comes back as one */
    t_close(fd);
    s_until(&d.done, 1);
    CHECK_INT(d.rc, TSRV_OK);
    CHECK_INT(proxy_ends, 1);
    CHECK_INT(s_reason, TSRV_EOF);
    close_proxy();
}

/* Takes all, and says nothing. */
static int swallow(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    return tsrv_read_until_close(stream, 0, NULL);
}

/* A client that never pauses: the grace ends the handler's read, and that the helper's. */
TEST_STREAM(row8_join_when_the_grace_is_over)
{
    tsrv_server_options options = {0};
    open_proxy(swallow, options);
    int fd = t_connect(s_port);
    s_until(&proxied, 1);
    s_drainer d = s_new_drain(500);
    s_begin_drain(&d);
    for (int i = 0; i < 3; i++) {
        t_sends(fd, "more");
        s_run_ms(160);
        CHECK_INT(d.done, 0);
    }
    int64_t start = v_ms();
    s_expect_reset(fd);
    s_until(&d.done, 1);
    CHECK(v_ms() - start <= 100);
    CHECK_INT(d.rc, TSRV_ETIMEOUT);
    CHECK_INT(proxy_ends, 1);
    CHECK(waits_in_join <= 3 && waits_in_handler <= 5);
    t_close(fd);
    close_proxy();
}

static int sleep_on(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_wait(stream, 20000)) == TSRV_OK) { /* the end of the input */
    }
    return rc;
}

/* The client has half-closed already, and upstream will not say anything: nothing of the client's
 * can end the helper. The drain does not wait for it for longer than a second. */
TEST_STREAM(row8_join_that_waits_for_a_silent_upstream)
{
    tsrv_server_options options = {0};
    open_proxy(sleep_on, options);
    int fd = t_connect(s_port);
    t_shut(fd);
    s_until(&waits_in_join, 1);
    int64_t start = v_ms();
    s_drainer d = s_new_drain(500);
    s_begin_drain(&d);
    s_until(&d.done, 1);
    CHECK(v_ms() - start >= 1500 && v_ms() - start <= 1650);
    CHECK_INT(d.rc, TSRV_ETIMEOUT);
    CHECK(waits_in_join <= 4 && waits_in_handler <= 7);
    s_expect_reset(fd);
    t_close(fd);
    s_until(&s_closed, 1); /* when upstream ends */
    close_proxy();
}

TEST_STREAM(row8_join_when_the_loop_is_freed)
{
    int fd = open_joined();
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
    CHECK_INT(proxy_ends, 1);
    CHECK_INT(s_closed, 1);
    CHECK_INT(t_log_lines, 0); /* no coroutine was dropped */
    tsrv_server_free(upstream);
    tsrv_server_free(s_server);
    t_expect_reset(fd);
    t_close(fd);
}

TEST_STREAM(row8_join_when_the_server_is_freed)
{
    int fd = open_joined();
    tsrv_server_free(s_server);
    s_server = NULL;
    CHECK_INT(proxy_ends, 1);
    CHECK_INT(s_closed, 1);
    s_expect_reset(fd);
    t_close(fd);
    close_proxy();
}

/* ---- half-close ----------------------------------------------------------------------------*/

static int echo_until_end(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc = echo_bytes(stream, address, NULL);
    (void)context;
    if (rc == TSRV_EOF) {
        t_record(1);
    }
    return rc;
}

/* What fits into the kernel is only read after the server has seen the end: its answer comes behind
 * the FIN. */
static void half_close_once(int port, size_t size)
{
    sender s;
    start_sending(&s, t_connect(port), size);
    if (size <= 65536) {
        t_wait_records(1);
    } else if (!t_hard) {
        wait_unsent(0); /* all the buffers in between are full */
    }
    expect_pattern_from(s.fd, 0, size);
    expect_clean_end(s.fd);
    join_sender(&s);
    t_close(s.fd);
    t_wait_records(2);
    CHECK_INT(t_recorded(0), 1);
    CHECK_INT(t_recorded(1), TSRV_EOF);
    t_records_used = 0;
}

static void half_close_client(int port, void *context)
{
    (void)context;
    half_close_once(port, 1);
    half_close_once(port, bulk(65536, 8192));
    half_close_once(port, bulk(32 << 20, 256 << 10));
}

/* Three peers take a FIN for the end of the connection, and drop the answer. */
TEST_STREAM(a_half_close_gets_the_whole_answer)
{
    t_case c = {.handler = echo_until_end, .on_close = t_record_reason, .client = half_close_client};
    t_run(&c);
}

/* ---- an answer with unread input behind it -------------------------------------------------*/

typedef struct unread_case {
    size_t answer;
    size_t junk;  /* before the handler returns; as much follows later */
    char *answer_data;
    int rounds;
} unread_case;

/* It waits until the unread input is in the kernel, so that a plain close would reset for sure. */
static int answer_and_return(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    unread_case *u = (unread_case *)context;
    int *step = (int *)tsrv_data(stream), rc, there = 0;
    (void)address;
    if (*step == 0) {
        if ((rc = tsrv_read_until(stream, "\n", 0, NULL)) != TSRV_OK) {
            return rc;
        }
        *step = 1;
        CHECK_INT(tsrv_write(stream, "ready\n", 6), TSRV_OK);
    }
    if ((rc = tsrv_wait(stream, TSRV_NEVER)) != TSRV_OK) {
        return rc;
    }
    CHECK(ioctl(tsrv_fd(stream), FIONREAD, &there) == 0);
    CHECK(there > 0);
    CHECK_INT(tsrv_write(stream, u->answer_data, u->answer), TSRV_OK);
    return TSRV_OK;
}

static void unread_client(int port, void *context)
{
    unread_case *u = (unread_case *)context;
    char *junk = new_pattern(u->junk);
    for (int round = 0; round < u->rounds; round++) {
        int fd = t_connect(port);
        t_sends(fd, "go\n");
        t_expect(fd, "ready\n");
        t_send(fd, junk, u->junk);
        t_on_loop(wake_first, NULL);
        expect_pattern_from(fd, 0, u->answer / 2);
        t_send(fd, junk, u->junk);
        expect_pattern_from(fd, u->answer / 2, u->answer);
        expect_clean_end(fd);
        t_close(fd);
        t_wait_records(round + 1);
        CHECK_INT(t_recorded(round), 0);
    }
    free(junk);
}

/* Unread input turns a plain close into a reset, which destroyed the answer 20 times of 20. */
TEST_STREAM(an_answer_survives_unread_input)
{
    unread_case u = {bulk(2 << 20, 128 << 10), bulk(96 << 10, 8 << 10), NULL, (int)bulk(20, 5)};
    t_case c = {.handler = answer_and_return, .on_close = t_record_reason, .client = unread_client,
                .context = &u};
    u.answer_data = new_pattern(u.answer);
    c.options.data_size = sizeof(int);
    t_run(&c);
    free(u.answer_data);
    CHECK_INT(t_record_count(), u.rounds);
}

/* ---- what a quiet server holds -------------------------------------------------------------*/

/* What a quiet server holds: a leak makes one of these grow. The pool and the shared chunk, which
 * the loop keeps for later, are left out. */
typedef struct balance {
    long allocations;
    int fds;
    uint64_t open;
} balance;

static void take_balance(void *context)
{
    balance *b = (balance *)context;
    b->allocations = t_live_allocations - t_loop->streams.pool.count - (t_loop->streams.input != NULL);
    for (const tsrvi_buffer *kept = t_loop->streams.pool.large; kept != NULL; kept = kept->next) {
        b->allocations--;
    }
    b->fds = t_open_fds();
    b->open = t_server->stats->open;
}

static void check_balance(const balance *before, const char *name)
{
    balance now;
    t_on_loop(take_balance, &now);
    if (now.allocations != before->allocations || now.fds != before->fds ||
        now.open != before->open) {
        T_FAIL("after \"%s\": %ld allocations (%ld before), %d descriptors (%d), %d open (%d)", name,
               now.allocations, before->allocations, now.fds, before->fds, (int)now.open,
               (int)before->open);
    }
}

/* ---- resets at every point -----------------------------------------------------------------*/

static int entered; /* connections whose handler has been called */

static void note_entered(void)
{
    __atomic_add_fetch(&entered, 1, __ATOMIC_RELAXED);
}

enum { REPLY = 4 << 20 };

/* What the server does for the next connection. */
enum { ECHO, WAIT_FIRST, ANSWER, ANSWER_FLUSH, ANSWER_FILE, ANSWER_CLOSE, SHORT_CLOSE, READS_INTO };

static struct {
    int serves;
    char *reply;
    FILE *file;
    char into[100];
} point;

static void answer_at_point(tsrv_stream *stream)
{
    switch (point.serves) {
    case ANSWER_FILE: tsrv_sendfile(stream, fileno(point.file), 0, REPLY); break;
    case SHORT_CLOSE: tsrv_write(stream, "bye\n", 4); break;
    default: tsrv_write(stream, point.reply, REPLY);
    }
}

/* Its step is kept in tsrv_data: 0 = not entered yet, 1 = it waits for the line, 2 = answered. */
static int serve_point(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *step = (int *)tsrv_data(stream), rc = TSRV_OK;
    if (*step == 0) {
        limit_output(stream);
        *step = 1;
        note_entered();
    }
    switch (point.serves) {
    case ECHO: return echo_lines(stream, address, context);
    case WAIT_FIRST:
        if (*step == 1 && (rc = tsrv_wait(stream, TSRV_NEVER)) == TSRV_OK) {
            *step = 2;
        }
        break;
    case READS_INTO: rc = tsrv_read_into(stream, point.into, sizeof point.into); break;
    default:
        if (*step == 1 && (rc = tsrv_read_until(stream, "\n", 0, NULL)) == TSRV_OK) {
            *step = 2;
            answer_at_point(stream);
            rc = point.serves == ANSWER_CLOSE || point.serves == SHORT_CLOSE ? 1 : TSRV_OK;
        }
        if (*step == 2 && rc == TSRV_OK && point.serves == ANSWER_FLUSH) {
            rc = tsrv_flush(stream);
        }
    }
    return rc == TSRV_OK ? echo_lines(stream, address, context) : rc;
}

static bool is_entered(void *before)
{
    return __atomic_load_n(&entered, __ATOMIC_RELAXED) > *(int *)before;
}

/* One client: each letter of the script is one thing it does.
 *   h u  hold the loop, and let it go on      c e  connect; wait until the handler is entered
 *   l p  send a line, a part of one           w    wait until the server has received all
 *   j    send 64 KiB that nobody wants        b    wait until output is stuck in the server
 *   r f  receive a part; up to the FIN        s !  shut down; reset */
static void play_script(int port, const char *script)
{
    static char junk[65536];
    hold h;
    int fd = -1, before = entered;
    uint64_t sent = 0, received = server_stats().bytes_in;
    for (; *script != 0; script++) {
        switch (*script) {
        case 'h': open_hold(&h), hold_loop(&h); break;
        case 'u': release_loop(&h), close_hold(&h); break;
        case 'c': fd = t_connect(port); break;
        case 'e': CHECK(t_wait_until(is_entered, &before)); break;
        case 'l': t_sends(fd, "go\n"), sent += 3; break;
        case 'p': t_sends(fd, "par"), sent += 3; break;
        case 'w': wait_received(received + sent); break;
        case 'j': t_send(fd, junk, sizeof junk); break;
        case 'b': wait_unsent(0); break;
        case 'r': CHECK_INT(t_recv(fd, junk, bulk(50000, 500)), bulk(50000, 500)); break;
        case 'f': t_expect(fd, "bye\n"), t_expect_eof(fd); break;
        case 's': t_shut(fd); break;
        case '!': t_reset(fd); break;
        default: T_FAIL("no such letter: %c", *script);
        }
    }
}

static const struct {
    const char *name;
    int serves;
    const char *script;
    int reasons[3]; /* what on_close may get besides a reset */
} points[] = {
    {"before accept", ECHO, "hc!u", {0}},
    {"a line, before accept", ECHO, "hcl!u", {0}},
    {"a half-close, before accept", ECHO, "hcs!u", {TSRV_EOF}},
    {"between accept and first read", WAIT_FIRST, "ce!", {0}},
    {"unread input, before the first read", WAIT_FIRST, "celj!", {0}},
    {"before sending", ECHO, "ce!", {0}},
    {"mid-line", ECHO, "cpw!", {0}},
    {"behind a line", ECHO, "clw!", {0}},
    {"mid-line, behind a line", ECHO, "clwpw!", {0}},
    {"after half-close", ECHO, "cls!", {TSRV_EOF}},
    {"mid-read into the program's memory", READS_INTO, "cpw!", {0}},
    {"before the reply was read", ANSWER, "clb!", {0}},
    {"mid-reply", ANSWER, "clbr!", {0}},
    {"mid-reply, with unread input", ANSWER, "clbjr!", {0}},
    {"mid-reply, after half-close", ANSWER, "clsbr!", {TSRV_EOF}},
    {"mid-flush", ANSWER_FLUSH, "clbr!", {0}},
    {"mid-file", ANSWER_FILE, "clbr!", {0}},
    {"closing, with unsent output", ANSWER_CLOSE, "clr!", {0}},
    {"lingering", SHORT_CLOSE, "clf!", {1}},
    {"lingering, with unread input", SHORT_CLOSE, "cljf!", {1}},
    {"lingering, after half-close", SHORT_CLOSE, "clsf!", {1}},
};

static bool reason_is_fine(size_t i, int reason)
{
    for (size_t k = 0; k < COUNT(points[i].reasons); k++) {
        if (points[i].reasons[k] != 0 && points[i].reasons[k] == reason) {
            return true;
        }
    }
    /* Once the FIN has come all is said, and how the peer takes its leave does not count. */
    return strchr(points[i].script, 'f') == NULL && (reason == -ECONNRESET || reason == -EPIPE);
}

/* Resets there; then the next client is served. Both leave nothing. */
static void reset_at_point(int port, size_t i)
{
    point.serves = points[i].serves;
    play_script(port, points[i].script);
    if (!t_wait_until(t_has_records, &(int){1})) {
        T_FAIL("reset %s: no on_close", points[i].name);
    }
    point.serves = ECHO;
    int fd = t_connect(port);
    round_trip(fd);
    t_reset(fd);
    t_wait_records(2);
    if (!reason_is_fine(i, t_recorded(0))) {
        T_FAIL("reset %s: on_close got %d (%s)", points[i].name, t_recorded(0),
               tsrv_strerror(t_recorded(0)));
    }
    CHECK_INT(t_recorded(1), -ECONNRESET);
    CHECK_INT(t_record_count(), 2);
    t_records_used = 0;
}

static void resets_client(int port, void *context)
{
    balance before;
    int connections = 0;
    (void)context;
    reset_at_point(port, COUNT(points) - 1); /* fills the pools */
    t_on_loop(take_balance, &before);
    CHECK_INT(before.open, 0);
    for (int round = 0; round < 2; round++) {
        for (size_t i = 0; i < COUNT(points); i++) {
            reset_at_point(port, i);
            check_balance(&before, points[i].name);
            connections += 2;
        }
    }
    CHECK_INT(__atomic_load_n(&entered, __ATOMIC_RELAXED), connections + 2);
    CHECK_INT(t_logged(), 0); /* a reset is everyday life */
}

TEST_STREAM(resets_at_every_point)
{
    t_case c = {.handler = serve_point, .on_close = t_record_reason, .client = resets_client};
    c.options.data_size = sizeof(int);
    c.options.close_timeout_ms = 60000; /* what ends has to end by the reset */
    point.reply = new_pattern(REPLY);
    point.file = tmpfile();
    CHECK(point.file != NULL && fwrite(point.reply, 1, REPLY, point.file) == REPLY);
    CHECK(fflush(point.file) == 0);
    t_watch_log();
    t_run(&c);
    tsrv_set_log(NULL, NULL);
    CHECK(fclose(point.file) == 0);
    free(point.reply);
}

/* ---- a peer that never answers the FIN -----------------------------------------------------*/

/* BUSY_MS is what a busy machine may take on top. */
enum { CLOSE_MS = 200, BUSY_MS = 1000 };

static int say_bye(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc = tsrv_read_until(stream, "\n", 0, NULL);
    (void)address;
    (void)context;
    if (rc == TSRV_OK) {
        tsrv_write(stream, "bye\n", 4);
        rc = 7;
    }
    return rc;
}

/* A connection to the server: over TCP, or one end of a pair. */
static int half_open_connect(int port, bool tcp)
{
    return tcp ? t_connect(port) : connect_pair();
}

/* It gets the FIN and stays, silent or sending; neither makes the wait longer. */
static void half_open_once(int port, bool tcp, bool sends)
{
    char data[1024] = {0};
    int fd = half_open_connect(port, tcp), before = t_record_count();
    int64_t start = t_now_ms();
    t_sends(fd, "go\n");
    do {
        if (sends && send(fd, data, sizeof data, T_NOSIGNAL) < 0) {
            CHECK(errno == EPIPE || errno == ECONNRESET);
        }
        poll(NULL, 0, 5);
        CHECK_NEAR_MS(t_now_ms() - start, 0, 5000);
    } while (t_record_count() == before);
    CHECK_NEAR_MS(t_now_ms() - start, CLOSE_MS - 1, CLOSE_MS + BUSY_MS);
    CHECK_INT(t_recorded(before), 7);
    CHECK_INT(server_stats().open, 0);
    if (!sends) {
        t_expect(fd, "bye\n"); /* still there, and no reset yet */
        t_expect_eof(fd);
    }
    t_close(fd);
}

/* What comes after the close is taken and dropped, and the answer can still be read after it. */
static void half_open_then_read(int port, bool tcp)
{
    static char junk[32768];
    int fd = half_open_connect(port, tcp), before = t_record_count();
    uint64_t received = server_stats().bytes_in;
    t_sends(fd, "go\n");
    wait_received(received += 3);
    for (int i = 0; i < 4; i++) {
        t_send(fd, junk, bulk(sizeof junk, 512));
        wait_received(received += bulk(sizeof junk, 512));
    }
    t_expect(fd, "bye\n");
    expect_clean_end(fd);
    t_close(fd);
    t_wait_records(before + 1);
    CHECK_INT(t_recorded(before), 7);
}

static void half_open_client(int port, void *context)
{
    (void)context;
    for (int tcp = 0; tcp < 2; tcp++) {
        half_open_once(port, tcp, false);
        half_open_once(port, tcp, true);
    }
}

TEST_STREAM(a_peer_that_stays_after_the_fin_is_left)
{
    t_case c = {.handler = say_bye, .on_close = t_record_reason, .client = half_open_client};
    c.options.close_timeout_ms = CLOSE_MS;
    t_run(&c);
}

static void dropped_client(int port, void *context)
{
    (void)context;
    for (int round = 0; round < 10; round++) {
        half_open_then_read(port, round % 2 != 0);
    }
}

TEST_STREAM(input_after_the_close_does_not_destroy_the_answer)
{
    t_case c = {.handler = say_bye, .on_close = t_record_reason, .client = dropped_client};
    c.options.close_timeout_ms = 60000;
    t_run(&c);
}

/* ---- a peer that is known to be gone is not waited for ---------------------------------------*/

/* The peer stays, and says nothing: but what was sent to it has failed, so that nothing of an answer can be lost. */
static void check_no_linger(int fd)
{
    int64_t before = v_ms();
    t_sends(fd, "go\n");
    s_until(&s_closed, 1);
    CHECK_NEAR_MS(s_closed_ms - before, 0, 1000); /* of close_timeout_ms, 5 seconds */
    s_leave(fd);
    s_close();
}

TEST_PLAIN_STREAM(a_peer_that_reads_no_more_is_not_waited_for)
{
    int pair[2];
    s_serve(say_bye);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK_INT(tsrv_server_add_stream(s_server, pair[1]), TSRV_OK);
    CHECK(shutdown(pair[0], SHUT_RD) == 0); /* now the answer is EPIPE */
    check_no_linger(pair[0]);
}

TEST_PLAIN_STREAM(a_peer_that_cannot_be_sent_to_is_not_waited_for)
{
    s_serve(say_bye);
    int fd = s_join();
    t_fail_call("send", EHOSTUNREACH, 1, true);
    check_no_linger(fd);
}

/* ---- churn ---------------------------------------------------------------------------------*/

enum { CHURN = 2000, BATCH = 50 };

/* Each of a batch goes in another way, and all by a reset, so that no TIME_WAIT stays. The last one
 * is served: so all before it have been accepted. */
static void churn_batch(int port)
{
    for (int i = 0; i < BATCH - 1; i++) {
        int fd = t_connect(port);
        switch (i % 4) {
        case 1: t_sends(fd, "half a li"); break;
        case 2: t_sends(fd, "hello\nhello\nhello\nhe"); break;
        case 3: t_shut(fd); break;
        default: break;
        }
        t_reset(fd);
    }
    int fd = t_connect(port);
    round_trip(fd);
    t_reset(fd);
}

static bool all_closed(void *context)
{
    tsrv_stats stats = server_stats();
    (void)context;
    return stats.open == 0 && stats.accepted + stats.accept_errors >= CHURN;
}

static void churn_client(int port, void *context)
{
    balance before;
    (void)context;
    churn_batch(port); /* fills the pools */
    t_wait_records(BATCH);
    t_on_loop(take_balance, &before);
    for (int i = BATCH; i < CHURN; i += BATCH) {
        churn_batch(port);
    }
    CHECK(t_wait_until(all_closed, NULL));
    tsrv_stats stats = server_stats();
    CHECK_INT(stats.accepted, CHURN);
    CHECK_INT(stats.closed, stats.accepted);
    CHECK_INT(t_record_count(), stats.accepted);
    CHECK_INT(stats.accept_pauses, 0);
    for (int i = 0; i < t_record_count(); i++) {
        int reason = t_recorded(i);
        CHECK(reason == -ECONNRESET || reason == -EPIPE || reason == TSRV_EOF);
    }
    check_balance(&before, "churn");
}

TEST_STREAM(churn_leaves_nothing)
{
    t_case c = {.handler = echo_lines, .on_close = t_record_reason, .client = churn_client};
    t_run(&c);
}

/* ---- what the system does not tell -----------------------------------------------------------*/

#ifdef __linux__
static int read_in_time(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    return tsrv_read_until(stream, "\n", 0, &line);
}

/* Has the peer's system all that was sent? Where that is not known a silent peer is waited for like any other. */
TEST_PLAIN_SOFT(silent_peer_of_whom_nothing_is_known_is_waited_for)
{
    for (int known = 0; known <= 1; known++) {
        tsrv_server_options options = {0};
        options.read_timeout_ms = 100;
        s_open_with(read_in_time, options);
        int fd = s_join();
        t_fail_call("ioctl", EINVAL, known ? 0 : 1, true);
        s_expect_eof(fd);
        s_settle();
        CHECK_INT(t_fault_hits > 0, !known);
        t_fault_at = 0;
        CHECK_INT(s_stats().open, !known);
        t_close(fd);
        s_settle();
        CHECK_INT(s_stats().open, 0);
        s_close();
    }
}
#endif

static int woken_and_read(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    int rc = tsrv_wait(stream, TSRV_NEVER);
    return rc == TSRV_OK ? tsrv_read_until(stream, "\n", 0, &line) : rc;
}

/* A peer that has closed a unix socket may have left an error, or not. */
TEST_PLAIN_SOFT(hang_up_without_an_error_is_the_end_of_the_input)
{
    s_serve(woken_and_read);
    int fd = t_add_pair(s_server);
    s_settle();
    tsrv_stream *stream = tsrv_server_next(s_server, NULL);
    CHECK(stream != NULL);
    t_fail_call("getsockopt", EBADF, 1, true);
    t_close(fd);
    s_settle();
    t_fault_at = 0;
    CHECK(s_closed == 1 || tsrv_error(stream) == TSRV_OK);
    if (s_closed == 0) {
        tsrv_wake(stream);
    }
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_EOF);
    s_close();
}

/* A limit for reads counts from the next one on, whoever sets it. */
TEST_PLAIN_SOFT(limit_that_is_set_from_outside_is_the_next_reads)
{
    s_serve(echo_lines);
    int fd = s_join();
    s_settle();
    tsrv_set_timeout(tsrv_server_next(s_server, NULL), 100, 0);
    t_sends(fd, "one");
    s_run_ms(1000);
    CHECK_INT(s_closed, 0);
    t_sends(fd, "two\n");
    s_expect(fd, "onetwo\n");
    int64_t begin = v_ms();
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_ETIMEOUT);
    CHECK(v_ms() - begin >= 90 && v_ms() - begin <= 200);
    t_close(fd);
    s_close();
}

/* ---- what this side has ended ----------------------------------------------------------------*/

static bool kicked;

/* Its second call, in callback mode, finds the stream closed, and does not care for the rest. */
static int read_four_or_what_comes(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char memory[4];
    tsrv_slice slice;
    (void)address, (void)context;
    return kicked ? tsrv_read_some(stream, 0, &slice)
                  : tsrv_read_into(stream, memory, sizeof memory);
}

/* Whoever waits has not heard of it yet, or has a part already: a read is told nothing else. */
TEST_STREAM(every_read_behind_a_close_says_so_at_once)
{
    for (int aborts = 0; aborts <= 1; aborts++) {
        tsrv_slice slice;
        char byte;
        kicked = false;
        s_serve(read_four_or_what_comes);
        int fd = s_join();
        t_sends(fd, "ab");
        s_settle();
        tsrv_stream *stream = tsrv_server_next(s_server, NULL);
        CHECK_INT(tsrv_read_some(stream, 0, &slice), TSRV_EBUSY);
        CHECK_INT(aborts ? tsrv_abort(stream) : tsrv_close(stream), TSRV_OK);
        kicked = true;
        CHECK_INT(tsrv_read_some(stream, 0, &slice), TSRV_ECLOSED);
        CHECK_MEM(slice.data, slice.size, "", 0);
        CHECK_INT(tsrv_read_until(stream, "\n", 0, NULL), TSRV_ECLOSED);
        CHECK_INT(tsrv_read_bytes(stream, 1, &slice), TSRV_ECLOSED);
        CHECK_INT(tsrv_read_into(stream, &byte, 1), TSRV_ECLOSED);
        CHECK_INT(tsrv_read_until_close(stream, 0, &slice), TSRV_ECLOSED);
        t_close(fd);
        s_until(&s_closed, 1);
        CHECK_INT(s_reason, TSRV_ECLOSED);
        s_close();
    }
}
