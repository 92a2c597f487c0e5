/* Output that waits (>>output): peers that read late, slowly or never, beside those that read. What is queued is
 * bounded, and whose it is waits, is told, or is ended. */
#include "memory.h"

#include "script.h"

#include "handlers.h"

/* ---- writes are taken, and the next read pays ----------------------------------------------*/

/* A value for each "get": several writes, of which none may be lost where the first one fills the
 * queue and nothing can wait. */
static int get_large(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    limit_large_output(stream);
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
    char head[64];
    snprintf(head, sizeof head, "VALUE %zu\n", large_size);
    s_expect(fd, head);
    s_expect_bytes(fd, large, large_size);
    s_expect(fd, "END\n");
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
    s_finish(fd);
    CHECK_INT(t_record_count(), 3);
    if (t_mode == TSRV_CALLBACK) {
        CHECK(t_recorded(0) > 0);
    }
    s_close();
    free(large);
}

/* ---- a burst that some cannot take ---------------------------------------------------------*/

enum { READERS = 5, LINE = 1000, BURST = 60, FULL = 16000 };
static int evicted;
static tsrv_stream *slow;

static void write_burst(void *context)
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
    int fds[READERS + 1];
    char got[LINE];
    options.handle_stream = echo_bytes;
    options.max_write_buffer_size = FULL;
    s_open(options);
    for (int i = 0; i <= READERS; i++) {
        fds[i] = s_join();
        if (i == 0) {
            slow = tsrv_server_next(s_server, NULL);
            limit_output_to(slow, 4096);
        }
    }
    if (t_hard) { /* a few bytes a send: the kernel's buffers hold few of such pieces */
        t_clip = 0;
    }
    CHECK_INT(tsrv_loop_post(s_loop, fill_slow, NULL), TSRV_OK);
    s_settle();
    CHECK_INT(tsrv_loop_post(s_loop, write_burst, s_server), TSRV_OK);
    s_until(&t_records_used, 1);
    CHECK_INT(evicted, 1);
    s_expect_reset(fds[0]);
    for (int i = 1; i <= READERS; i++) {
        for (int k = 0; k < BURST; k++) {
            int code;
            CHECK_INT(s_recv(fds[i], got, LINE, &code), LINE);
            CHECK_INT(got[0], 'a' + k % 26);
            CHECK_INT(got[LINE - 1], 'a' + k % 26);
        }
        t_shut(fds[i]);
        s_expect_eof(fds[i]);
    }
    t_close_all(fds, READERS + 1);
    s_close();
}

/* ---- a peer that sends and never reads -----------------------------------------------------*/

enum { MARK = 64 << 10, MOST_INPUT = 128 << 10, CHUNK = 16 << 10, STALL_MS = 300 };

/* Writes what it reads. The limits are small, so that exceeding them shows. */
static int echo_limited(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    limit_output(stream);
    return echo_bytes(stream, address, context);
}

static void never_reads(int port, void *context)
{
    static char data[1 << 16];
    size_t sent = 0, all = (size_t)64 << 20;
    int fd = t_connect_with_room(port, t_hard ? CHUNK : 0); /* byte by byte, the system's takes minutes to fill */
    (void)context;
    t_on_loop(nothing, NULL);
    long before = m_forget();
    int64_t start = t_now_ms(), last = start;
    while (sent < all) {
        ssize_t n = send(fd, data, sizeof data, T_NOSIGNAL);
        if (n <= 0) {
            CHECK(n < 0 && (errno == ECONNRESET || errno == EPIPE));
            break;
        }
        sent += (size_t)n;
        last = n == sizeof data ? t_now_ms() : last; /* less: the end came meanwhile */
    }
    t_wait_records(1);
    int64_t now = t_now_ms();
    printf("%zu KiB were taken, memory grew by %ld KiB; ended %d ms after the last byte\n", sent >> 10,
           m_grown_since(before) >> 10, (int)(now - last));
    CHECK(sent < all);
    CHECK(m_grown_since(before) <= MARK + MOST_INPUT + 3 * CHUNK);
    CHECK_NEAR_MS(now - start, STALL_MS, 10000);
    /* Read in small pieces, what the kernel had taken lasts longer. */
    CHECK_NEAR_MS(now - last, 0, t_hard ? 10000 : STALL_MS + 1000);
    t_close(fd);
}

/* Four peers grow until memory ends. */
TEST_STREAM(a_peer_that_never_reads_is_bounded_and_ended)
{
    t_case c = {.handler = echo_limited, .on_close = t_record_reason, .client = never_reads};
    c.options.write_high_water = MARK;
    c.options.max_buffer_size = MOST_INPUT;
    c.options.read_chunk_size = bulk(CHUNK, 1);
    c.options.write_timeout_ms = STALL_MS;
    t_run(&c);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), TSRV_ETIMEOUT);
}

static long most_resident, first_resident;

static void look_resident(void *context)
{
    long now = resident();
    (void)context;
    most_resident = now > most_resident ? now : most_resident;
}

/* It sends as long as the server takes it: blocked for 200 ms is the end, as is all of 64 MiB. */
static void client_never_reads(int port, void *context)
{
    static char lines[1 << 20];
    struct timeval patience = {0, 200000};
    size_t sent = 0;
    int fd = t_connect(port);
    (void)context;
    memset(lines, 'x', sizeof lines);
    for (size_t i = 63; i < sizeof lines; i += 64) {
        lines[i] = '\n';
    }
    t_on_loop(look_resident, NULL);
    first_resident = resident();
    CHECK(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) == 0);
    while (sent < 64u << 20) {
        ssize_t n = send(fd, lines, sizeof lines, T_NOSIGNAL);
        if (n <= 0) {
            break;
        }
        sent += (size_t)n;
        t_on_loop(look_resident, NULL);
    }
    printf("sent %zu KiB, grown by %ld KiB\n", sent >> 10, (most_resident - first_resident) >> 10);
    CHECK(sent < 64u << 20);
    t_reset(fd);
}

TEST_SOFT(a_peer_that_never_reads_costs_bounded_memory)
{
    t_case c = {.handler = echo_lines, .on_close = t_record_reason, .client = client_never_reads};
    most_resident = 0;
    t_run(&c);
    if (!TSRVI_HAS_ASAN && !TSRVI_HAS_TSAN && first_resident > 0) {
        CHECK(most_resident - first_resident < 4l << 20);
    }
}

/* ---- slow readers --------------------------------------------------------------------------*/

enum { PART = 8 << 10, QUEUE = 256 << 10 };

typedef struct writer {
    int parts;
    char *data; /* of all parts */
    long before; /* bytes of memory */
} writer;

/* Writes part after part, and never reads what it was asked. */
static int write_parts(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    writer *w = (writer *)context;
    int *written = (int *)tsrv_data(stream), rc = TSRV_OK;
    (void)address;
    limit_output(stream);
    while (rc == TSRV_OK && *written < w->parts) {
        rc = tsrv_write(stream, w->data + *written * PART, PART);
        CHECK(rc != TSRV_EAGAIN);
        *written += rc == TSRV_OK;
        CHECK(tsrv_unsent_size(stream) <= (t_mode == TSRV_CALLBACK ? QUEUE : QUEUE / 2));
    }
    if (t_mode == TSRV_CALLBACK) {
        tsrv_slice none;
        CHECK_INT(rc, TSRV_EFULL);
        CHECK(*written >= QUEUE / PART && *written < w->parts);
        CHECK_INT(tsrv_read_some(stream, 0, &none), TSRV_EFULL);
        CHECK_INT(tsrv_unsent_size(stream), 0);
        return TSRV_OK; /* on_close gets the error even so */
    }
    CHECK_INT(*written, w->parts);
    return rc;
}

static void wait_for_parts(int port, void *context)
{
    writer *w = (writer *)context;
    int fd = t_connect(port);
    if (t_mode == TSRV_CALLBACK) {
        t_wait_records(1);
        t_expect_reset(fd);
    } else {
        wait_unsent(0);
        size_t size = (size_t)w->parts * PART, first = 3 * PART;
        expect_pattern_from(fd, 0, first);
        CHECK(has_unsent(NULL));
        expect_pattern_from(fd, first, size);
        expect_clean_end(fd);
    }
    t_close(fd);
    t_wait_records(1);
}

/* A program that ignores the results of writes is protected; one that may wait, waits. */
TEST_STREAM(queued_writes_wait_or_kill)
{
    writer w = {(int)bulk(256, 128), NULL, 0};
    t_case c = {.handler = write_parts, .on_close = t_record_reason, .client = wait_for_parts,
                .context = &w};
    c.options.data_size = sizeof(int);
    c.options.max_write_buffer_size = QUEUE;
    c.options.write_high_water = QUEUE / 2;
    w.data = new_pattern((size_t)w.parts * PART);
    w.before = m_forget();
    t_run(&c);
    free(w.data);
    printf("memory grew by %ld KiB\n", m_grown_since(w.before) >> 10);
    CHECK(m_grown_since(w.before) <= 2 * QUEUE + (160 << 10));
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), t_mode == TSRV_CALLBACK ? TSRV_EFULL : TSRV_OK);
}

enum { FAST = 5, MESSAGE = 4 << 10 };

typedef struct broadcast {
    int number;  /* of messages so far */
    int refused; /* by the one that is stuck */
    int taken;
    char taken_first[256]; /* the first byte of each that it took */
} broadcast;

/* The stream that is stuck said so; the others get every message. */
static void broadcast_one(void *context)
{
    static char message[MESSAGE];
    broadcast *b = (broadcast *)context;
    memset(message, 'a' + b->number++ % 26, sizeof message);
    for (tsrv_stream *s = tsrv_server_next(t_server, NULL); s != NULL;
         s = tsrv_server_next(t_server, s)) {
        bool stuck = *(bool *)tsrv_data(s);
        size_t before = tsrv_unsent_size(s);
        int rc = tsrv_try_write(s, message, sizeof message);
        if (!stuck) {
            CHECK_INT(rc, TSRV_OK);
        } else if (rc == TSRV_OK) {
            CHECK(b->taken < (int)sizeof b->taken_first);
            b->taken_first[b->taken++] = message[0];
        } else {
            CHECK_INT(rc, TSRV_EFULL);
            CHECK_INT(tsrv_error(s), TSRV_OK);
            CHECK(tsrv_unsent_size(s) <= before);
            b->refused++;
        }
    }
}

static int listen_to_all(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address;
    (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        if (strcmp(line.data, "stuck\n") == 0) {
            *(bool *)tsrv_data(stream) = true;
            limit_output(stream);
        }
        tsrv_write(stream, line.data, line.size);
    }
    return rc;
}

static void expect_message(int fd, char letter)
{
    char actual[MESSAGE], expected[MESSAGE];
    memset(expected, letter, sizeof expected);
    CHECK_MEM(actual, t_recv(fd, actual, sizeof actual), expected, sizeof expected);
}

static void broadcast_client(int port, void *context)
{
    broadcast *b = (broadcast *)context;
    int fast[FAST], stuck = t_connect(port), least = (int)bulk(100, 40);
    t_echo(stuck, "stuck\n");
    for (int i = 0; i < FAST; i++) {
        fast[i] = t_connect(port);
        round_trip(fast[i]);
    }
    while (b->number < least || b->refused < 10) {
        CHECK(b->number < 5000);
        t_on_loop(broadcast_one, b);
        for (int i = 0; i < FAST; i++) {
            expect_message(fast[i], (char)('a' + (b->number - 1) % 26));
        }
    }
    printf("%d messages, of which the stuck one got %d\n", b->number, b->taken);
    CHECK(b->taken >= 1);
    for (int i = 0; i < b->taken; i++) {
        expect_message(stuck, b->taken_first[i]); /* whole ones, and in order */
    }
    round_trip(stuck); /* it is in use again */
    t_reset(stuck);
    for (int i = 0; i < FAST; i++) {
        t_reset(fast[i]);
    }
    t_wait_records(FAST + 1);
}

TEST_STREAM(a_broadcast_reaches_all_but_the_one_that_is_stuck)
{
    static broadcast b;
    t_case c = {.handler = listen_to_all, .on_close = t_record_reason, .client = broadcast_client,
                .context = &b};
    c.options.data_size = sizeof(bool);
    c.options.max_write_buffer_size = 4 * MESSAGE;
    t_run(&c);
}
