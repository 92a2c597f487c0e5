/* The rules of the model, each by the failure that another rule produced: the rows are those of a
 * review of an earlier draft of the interface. Row 5 (uploads and good-byes when the server stops)
 * is drain_test.c, row 9 (slices end with a 0) is test_slices_are_terminated in iostream_test.c. */
#include "script.h"

/* Have the kernel take little of what is written. */
static void hold_little(tsrv_stream *stream)
{
    int room = t_hard ? 16384 : 131072;
    CHECK(setsockopt(tsrv_fd(stream), SOL_SOCKET, SO_SNDBUF, &room, sizeof room) == 0);
}

/* ---- a proxy ----------------------------------------------------------------------------------*/

/* In tsrv_data of the client's stream, so valid until its handler has returned. */
typedef struct pair {
    tsrv_stream *client, *upstream;
    bool done; /* the second direction */
    bool over; /* both; rc is the first one's end */
    int rc;
} pair;

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
    pair *p = (pair *)context;
    pump(p->upstream, p->client);
    p->done = true;
    tsrv_wake(p->client);
}

/* In a coroutine. The second direction is one of its own, which this one outlives. */
static int pump_both(pair *p)
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
    pair *p = (pair *)context;
    p->rc = pump_both(p);
    p->over = true;
    tsrv_wake(p->client);
}

/* In callback mode both directions are coroutines, and the handler only waits for their end. */
static int proxy(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    pair *p = (pair *)tsrv_data(stream);
    (void)address, (void)context;
    if (p->client == NULL) {
        p->client = stream;
        hold_little(stream);
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

static int echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice some;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_some(stream, 0, &some)) == TSRV_OK) {
        tsrv_write(stream, some.data, some.size);
    }
    return rc;
}

static tsrv_server *upstream;

static void open_proxy(tsrv_handler behind, tsrv_server_options options)
{
    proxied = proxy_ends = waits_in_join = waits_in_handler = 0;
    options.handle_stream = proxy;
    options.data_size = sizeof(pair);
    s_open(options);
    options.handle_stream = behind;
    options.on_close = NULL;
    upstream = s_new_server(options);
    upstream_port = s_listen(upstream);
}

static void close_proxy(void)
{
    CHECK_INT(proxy_ends, proxied);
    s_settle();
    tsrv_server_free(upstream);
    s_close();
}

static void fill(char *data, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        data[i] = (char)('a' + i % 23);
    }
}

TEST_STREAM(row1_half_close_proxy)
{
    enum { SIZE = 6000 };
    char data[SIZE], got[SIZE + 1];
    int code;
    tsrv_server_options options = {0};
    open_proxy(answer_the_whole, options);
    fill(data, SIZE);
    int fd = t_connect(s_port);
    s_send(fd, data, SIZE);
    t_shut(fd);
    CHECK_MEM(got, s_recv(fd, got, SIZE + 1, &code), data, SIZE);
    CHECK_INT(code, 0);
    t_close(fd);
    s_until(&proxy_ends, 1);
    close_proxy();
}

/* ---- row 2 --------------------------------------------------------------------------------*/

static char *large;
static size_t large_size;
static int producers;

static void make_large(size_t size)
{
    large_size = size;
    large = (char *)malloc(size);
    CHECK(large != NULL);
    fill(large, size);
}

static void produce(void *context)
{
    pair *p = (pair *)context;
    CHECK_INT(tsrv_write(p->client, large, large_size), TSRV_OK);
    p->done = true;
    tsrv_wake(p->client);
}

static void consume(void *context)
{
    pair *p = (pair *)context;
    CHECK_INT(tsrv_read_bytes(p->client, large_size, NULL), TSRV_OK);
    p->over = true;
    tsrv_wake(p->client);
}

/* Sends all the time, and takes all the time; by coroutines, since in callback mode the handler's
 * own reads are held back while output waits. */
static int stream_both_ways(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    pair *p = (pair *)tsrv_data(stream);
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
    int64_t limit = s_patience();
    while (tsrv_unsent_size(stream) < high_water) {
        s_turn();
        CHECK(t_now_ms() < limit);
    }
}

/* The client does not read before it has written all; output that is held up holds up no input. */
TEST_STREAM(row2_directions_of_a_proxy_are_independent)
{
    tsrv_server_options options = {0};
    int code;
    options.write_timeout_ms = TSRV_NEVER;
    options.write_high_water = t_hard ? 2000 : 100000;
    make_large(t_hard ? 120000 : 16 << 20);
    open_proxy(stream_both_ways, options);
    char *got = (char *)malloc(large_size);
    int fd = t_connect(s_port);
    s_until(&producers, 1);
    tsrv_stream *held = tsrv_server_next(s_server, NULL);
    until_held_up(held, options.write_high_water);
    s_send(fd, large, large_size);
    CHECK(tsrv_unsent_size(held) > 0);
    CHECK_MEM(got, s_recv(fd, got, large_size, &code), large, large_size);
    t_shut(fd);
    s_expect_eof(fd);
    t_close(fd);
    s_until(&proxy_ends, 1);
    close_proxy();
    free(got);
    free(large);
}

/* ---- row 3 --------------------------------------------------------------------------------*/

/* A value for each "get": several writes, of which none may be lost where the first one fills the
 * queue and nothing can wait. */
static int get_large(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    hold_little(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        CHECK_INT(tsrv_printf(stream, "VALUE %zu\n", large_size), TSRV_OK);
        CHECK_INT(tsrv_write(stream, large, large_size), TSRV_OK);
        CHECK_INT(tsrv_printf(stream, "END\n"), TSRV_OK);
        t_record((int)tsrv_unsent_size(stream));
    }
    return rc;
}

static void expect_large(int fd)
{
    char head[64], *got = (char *)malloc(large_size);
    int code;
    snprintf(head, sizeof head, "VALUE %zu\n", large_size);
    s_expect(fd, head);
    CHECK_MEM(got, s_recv(fd, got, large_size, &code), large, large_size);
    s_expect(fd, "END\n");
    free(got);
}

TEST_STREAM(row3_writes_are_taken_and_the_next_read_pays)
{
    tsrv_server_options options = {0};
    options.handle_stream = get_large;
    options.write_timeout_ms = TSRV_NEVER;
    make_large(t_hard ? 300000 : 8 << 20);
    options.write_high_water = large_size / 8;
    s_open(options);
    int fd = t_connect(s_port);
    t_sends(fd, "get\nget\nget\n");
    s_run_ms(1000);
    CHECK(t_record_count() <= 1); /* the second get waits for the first one's reader */
    for (int i = 0; i < 3; i++) {
        expect_large(fd);
    }
    t_shut(fd);
    s_expect_eof(fd);
    t_close(fd);
    CHECK_INT(t_record_count(), 3);
    if (t_mode == TSRV_CALLBACK) {
        CHECK(t_recorded(0) > 0);
    }
    s_close();
    free(large);
}

/* ---- row 4 --------------------------------------------------------------------------------*/

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
    t_shut(fd);
    s_expect_eof(fd);
    t_close(fd);
    s_close();
}

/* ---- row 6 --------------------------------------------------------------------------------*/

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
    int code;
    options.handle_stream = share_an_item;
    options.write_timeout_ms = TSRV_NEVER;
    make_large(t_hard ? 300000 : 8 << 20);
    options.write_high_water = large_size / 16;
    s_open(options);
    item = (char *)malloc(large_size);
    memcpy(item, large, large_size);
    char *got = (char *)malloc(large_size);
    int reader = t_connect(s_port), other = t_connect(s_port);
    t_sends(reader, "get\n");
    s_until(&got_item, 1);
    s_settle();
    t_sends(other, "delete\n");
    s_expect(other, "DELETED\n");
    CHECK(item == NULL);
    CHECK_MEM(got, s_recv(reader, got, large_size, &code), large, large_size);
    t_shut(reader);
    s_expect_eof(reader);
    t_close(reader);
    t_reset(other);
    s_settle();
    s_close();
    free(got);
    free(large);
}

/* ---- row 7 --------------------------------------------------------------------------------*/

enum { FAST = 5, LINE = 1000, BURST = 60, FULL = 16000 };
static int evicted;
static tsrv_stream *slow;

static void broadcast(void *context)
{
    char line[LINE];
    tsrv_server *server = (tsrv_server *)context;
    for (int i = 0; i < BURST; i++) {
        memset(line, 'a' + i % 26, sizeof line);
        for (tsrv_stream *s = tsrv_server_next(server, NULL); s != NULL;
             s = tsrv_server_next(server, s)) {
            if (tsrv_try_write(s, line, sizeof line) == TSRV_EFULL) {
                evicted++;
                CHECK_INT(s == slow, true);
                CHECK_INT(tsrv_error(s), TSRV_OK);
                tsrv_abort(s);
            }
        }
    }
    t_record(1);
}

static void fill_slow(void *context)
{
    char bytes[LINE] = {0};
    (void)context;
    while (tsrv_try_write(slow, bytes, sizeof bytes) == TSRV_OK) {
    }
}

/* One turn, more lines than a queue holds: only who cannot take them is thrown out. */
TEST_STREAM(row7_burst_evicts_only_who_does_not_read)
{
    tsrv_server_options options = {0};
    int fds[FAST + 1], room = 4096;
    char got[LINE];
    options.handle_stream = echo;
    options.max_write_buffer_size = FULL;
    s_open(options);
    for (int i = 0; i <= FAST; i++) {
        tsrv_stats stats;
        fds[i] = t_connect(s_port);
        do {
            s_turn();
            tsrv_server_stats(s_server, &stats);
        } while ((int)stats.open <= i);
        if (i == 0) {
            slow = tsrv_server_next(s_server, NULL);
            CHECK(setsockopt(tsrv_fd(slow), SOL_SOCKET, SO_SNDBUF, &room, sizeof room) == 0);
        }
    }
    if (t_hard) { /* a few bytes a send: the kernel's buffers hold few of such pieces */
        t_clip = 0;
    }
    CHECK_INT(tsrv_loop_post(s_loop, fill_slow, NULL), TSRV_OK);
    s_settle();
    CHECK_INT(tsrv_loop_post(s_loop, broadcast, s_server), TSRV_OK);
    s_until(&t_records_used, 1);
    CHECK_INT(evicted, 1);
    s_expect_reset(fds[0]);
    for (int i = 1; i <= FAST; i++) {
        for (int k = 0; k < BURST; k++) {
            int code;
            CHECK_INT(s_recv(fds[i], got, LINE, &code), LINE);
            CHECK_INT(got[0], 'a' + k % 26);
            CHECK_INT(got[LINE - 1], 'a' + k % 26);
        }
        t_shut(fds[i]);
        s_expect_eof(fds[i]);
    }
    for (int i = 0; i <= FAST; i++) {
        t_close(fds[i]);
    }
    s_close();
}

/* ---- row 8: a join under every end --------------------------------------------------------*/

static int proxy_reason, proxy_closed;

static void note_proxy_end(tsrv_stream *stream, int reason, void *context)
{
    (void)stream, (void)context;
    proxy_reason = reason;
    proxy_closed++;
}

/* A client whose proxy has a helper that reads from upstream. */
static int open_joined(void)
{
    tsrv_server_options options = {0};
    options.on_close = note_proxy_end;
    proxy_closed = 0;
    open_proxy(echo, options);
    int fd = t_connect(s_port);
    t_sends(fd, "through\n");
    s_expect(fd, "through\n");
    CHECK_INT(proxied, 1);
    return fd;
}

TEST_STREAM(row8_join_when_the_client_resets)
{
    int fd = open_joined();
    t_reset(fd);
    s_until(&proxy_closed, 1);
    CHECK_INT(proxy_ends, 1);
    CHECK_INT(proxy_reason, -ECONNRESET);
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
    s_until(&proxy_closed, 1);
    CHECK(waits_in_join <= 3 && waits_in_handler <= 3);
    t_close(fd);
    close_proxy();
}

typedef struct drainer {
    int rc, grace_ms;
} drainer;

static void drain(void *context)
{
    drainer *d = (drainer *)context;
    d->rc = tsrv_server_drain(s_server, d->grace_ms);
    t_record(1);
}

TEST_STREAM(row8_join_in_a_drain)
{
    drainer d = {1, 0};
    int fd = open_joined();
    CHECK_INT(tsrv_spawn(s_loop, drain, &d), TSRV_OK);
    s_expect_eof(fd); /* the end of the input goes upstream, and comes back as one */
    t_close(fd);
    s_until(&t_records_used, 1);
    CHECK_INT(d.rc, TSRV_OK);
    CHECK_INT(proxy_ends, 1);
    CHECK_INT(proxy_reason, TSRV_EOF);
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
    drainer d = {1, 500};
    options.on_close = note_proxy_end;
    open_proxy(swallow, options);
    int fd = t_connect(s_port);
    s_until(&proxied, 1);
    CHECK_INT(tsrv_spawn(s_loop, drain, &d), TSRV_OK);
    for (int i = 0; i < 3; i++) {
        t_sends(fd, "more");
        s_run_ms(160);
        CHECK_INT(t_record_count(), 0);
    }
    int64_t start = v_ms();
    s_expect_reset(fd);
    s_until(&t_records_used, 1);
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
    drainer d = {1, 500};
    options.on_close = note_proxy_end;
    open_proxy(sleep_on, options);
    int fd = t_connect(s_port);
    t_shut(fd);
    s_until(&waits_in_join, 1);
    int64_t start = v_ms();
    CHECK_INT(tsrv_spawn(s_loop, drain, &d), TSRV_OK);
    s_until(&t_records_used, 1);
    CHECK(v_ms() - start >= 1500 && v_ms() - start <= 1650);
    CHECK_INT(d.rc, TSRV_ETIMEOUT);
    CHECK(waits_in_join <= 4 && waits_in_handler <= 7);
    s_expect_reset(fd);
    t_close(fd);
    s_until(&proxy_closed, 1); /* when upstream ends */
    close_proxy();
}

TEST_STREAM(row8_join_when_the_loop_is_freed)
{
    int fd = open_joined();
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
    CHECK_INT(proxy_ends, 1);
    CHECK_INT(proxy_closed, 1);
    CHECK_INT(s_log_lines, 0); /* no coroutine was dropped */
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
    CHECK_INT(proxy_closed, 1);
    s_expect_reset(fd);
    t_close(fd);
    close_proxy();
}

/* ---- row 10: one handler for a protocol with values, in both modes ------------------------*/

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
    s_expect_eof(fd);
    t_close(fd);
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

/* ---- closing from another coroutine, for every call that waits ----------------------------*/

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
        hold_little(stream);
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
    char path[] = "/tmp/rules_test.XXXXXX";
    int file = mkstemp(path);
    make_large(t_hard ? 400000 : 4 << 20);
    large = (char *)realloc(large, large_size * 4);
    CHECK(large != NULL && file >= 0 && unlink(path) == 0);
    fill(large, large_size * 4);
    CHECK(write(file, large, large_size * 4) == (ssize_t)(large_size * 4));
    for (int call = 0; call < (t_mode == TSRV_CALLBACK ? K_PIECES : K_CALLS); call++) {
        run_kick(call, false, file);
        run_kick(call, true, file);
    }
    t_close(file);
    free(large);
}

/* ---- tsrv_try_write during a write that waits ---------------------------------------------*/

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
        hold_little(stream);
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
    int code;
    tried = taken = 0;
    written = false;
    shared_stream = NULL;
    options.handle_stream = write_and_be_tried;
    options.context = &times;
    options.max_write_buffer_size = large_size;
    options.write_high_water = large_size / 8;
    options.write_timeout_ms = TSRV_NEVER;
    s_open(options);
    char *got = (char *)malloc(large_size * times);
    int fd = t_connect(s_port);
    s_run_ms(200);
    CHECK(tried > 10);
    CHECK_MEM(got, s_recv(fd, got, large_size * times, &code), large, large_size * times);
    s_until(&tried, 50);
    for (int i = 0; i < taken; i++) {
        s_expect(fd, "<try>");
    }
    s_expect_eof(fd);
    t_close(fd);
    s_close();
    free(got);
}

TEST_STREAM(try_write_during_a_write_that_waits)
{
    make_large(4 * (t_hard ? 100000 : 4 << 20));
    large_size /= 4;
    try_during(1);
    try_during(4); /* taken in pieces */
    free(large);
}

/* ---- options at their ends ----------------------------------------------------------------*/

static int echo_line(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        tsrv_write(stream, line.data, line.size);
    }
    return rc;
}

/* The server serves lines, and lets go of its client. */
static void check_options(tsrv_server_options options)
{
    options.handle_stream = echo_line;
    s_open(options);
    int fd = t_connect(s_port);
    t_sends(fd, "one\ntwo\n");
    s_expect(fd, "one\ntwo\n");
    t_sends(fd, "three\n");
    s_expect(fd, "three\n");
    t_shut(fd);
    s_expect_eof(fd);
    t_close(fd);
    s_settle();
    s_close();
}

TEST_STREAM(every_time_at_0_never_and_max)
{
    static const size_t members[] = {
        offsetof(tsrv_server_options, idle_timeout_ms), offsetof(tsrv_server_options, read_timeout_ms),
        offsetof(tsrv_server_options, write_timeout_ms), offsetof(tsrv_server_options, close_timeout_ms),
        offsetof(tsrv_server_options, grace_ms),
    };
    static const int values[] = {0, TSRV_NEVER, INT_MAX, -2};
    for (size_t i = 0; i < sizeof members / sizeof members[0]; i++) {
        for (size_t k = 0; k < sizeof values / sizeof values[0]; k++) {
            tsrv_server_options options = {0};
            memcpy((char *)&options + members[i], &values[k], sizeof(int));
            check_options(options);
        }
    }
}

TEST_STREAM(every_size_at_0_16_and_max)
{
    static const size_t members[] = {
        offsetof(tsrv_server_options, max_buffer_size), offsetof(tsrv_server_options, read_chunk_size),
        offsetof(tsrv_server_options, max_write_buffer_size), offsetof(tsrv_server_options, write_high_water),
        offsetof(tsrv_server_options, stack_size), offsetof(tsrv_server_options, data_size),
    };
    static const size_t values[] = {0, 16, SIZE_MAX};
    for (size_t i = 0; i < sizeof members / sizeof members[0]; i++) {
        for (size_t k = 0; k < sizeof values / sizeof values[0]; k++) {
            tsrv_server_options options = {0};
            tsrv_server *server;
            if (values[k] == SIZE_MAX && i >= 4) { /* no switch for these two */
                options.handle_stream = echo_line;
                memcpy((char *)&options + members[i], &values[k], sizeof(size_t));
                CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
                CHECK(server == NULL);
                continue;
            }
            memcpy((char *)&options + members[i], &values[k], sizeof(size_t));
            check_options(options);
        }
    }
}

TEST_ONCE(other_options_at_their_ends)
{
    tsrv_server_options options = {0};
    tsrv_server *server = NULL;
    CHECK_INT(tsrv_server_new(&server, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL); /* no handler */
    options.handle_stream = echo_line;
    options.max_connections = -1;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
    options.max_connections = 0;
    options.mode = 2;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
    options.mode = -1;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
    CHECK(server == NULL);
    options.mode = TSRV_CALLBACK;
    options.max_connections = INT_MAX;
    check_options(options);
}
