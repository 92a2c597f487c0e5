/* The memory of all streams of a loop together: max_total_buffer (>>settle, >>write). */
#include "memory.h"

#include <sys/resource.h>

#include "script.h"

#include "handlers.h"

#define MIB (1024 * KIB)
#define TOTAL (4 * MIB)
#define ANSWER MIB

static char answer[ANSWER];
static int asked; /* requests that a handler has seen */
static const tsrv_server_options defaults;

/* An answer of 1 MiB for each line; "v": in pieces, "s": in small ones. */
static int answer_large(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line, parts[3] = {{answer, 10}, {answer + 10, ANSWER - 20}, {answer + ANSWER - 10, 10}};
    int rc;
    (void)address, (void)context;
    limit_output(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        char how = line.data[0];
        asked++;
        if (how == 'v') {
            tsrv_writev(stream, parts, 3);
        } else if (how == 's') {
            for (size_t at = 0; at < ANSWER; at += 2 * KIB) {
                tsrv_write(stream, answer + at, 2 * KIB);
            }
        } else if (how == 'e') {
            tsrv_write(stream, line.data, line.size);
        } else {
            tsrv_write(stream, answer, ANSWER);
        }
    }
    return rc;
}

static void open_total(tsrv_server_options options)
{
    fill_pattern(answer, 0, ANSWER);
    s_loop_options.max_total_buffer = TOTAL;
    options.write_timeout_ms = TSRV_NEVER;
    s_open_with(answer_large, options);
}

/* Forty ask, and read nothing until all have been asked: of 40 MiB the server keeps 4, and the answer that a handler
 * in callback mode cannot wait with; then all get all of it. */
static void check_slow_readers(const char *request)
{
    enum { READERS = 40 };
    int fds[READERS];
    size_t most = TOTAL + (t_mode == TSRV_CALLBACK ? ANSWER + 128 * KIB : 0) + 512 * KIB;
    open_total(defaults);
    for (int i = 0; i < READERS; i++) {
        fds[i] = t_connect_with_room(s_port, 4096);
    }
    s_settle();
    long before = m_forget();
    for (int i = 0; i < READERS; i++) {
        t_sends(fds[i], request);
    }
    s_run_ms(1000);
    CHECK((size_t)m_grown_since(before) <= most);
    CHECK((size_t)m_grown_since(before) >= TOTAL / 2);
    CHECK(t_mode == TSRV_COROUTINE || asked < READERS); /* how many coroutines fit depends on their slices */
    for (int i = 0; i < READERS; i++) {
        s_expect_bytes(fds[i], answer, ANSWER);
    }
    CHECK_INT(asked, READERS);
    CHECK((size_t)m_grown_since(before) <= most);
    for (int i = 0; i < READERS; i++) {
        s_finish(fds[i]);
    }
    s_close();
}

TEST_PLAIN_SOFT(slow_readers_take_no_more_than_the_total)
{
    check_slow_readers("get\n");
}

TEST_PLAIN_SOFT(slow_readers_of_pieces_take_no_more_than_the_total)
{
    check_slow_readers("v\n");
}

TEST_PLAIN_SOFT(slow_readers_of_small_writes_take_no_more_than_the_total)
{
    check_slow_readers("s\n");
}

/* While memory is tight, who has sent a part of a line is served, and who comes anew waits until it is not. */
/* Some of what waits for a client, of which it has had so much before. */
static size_t receive_some(int fd, size_t had)
{
    static char got[256 * KIB];
    ssize_t n = recv(fd, got, sizeof got, MSG_DONTWAIT);
    if (n < 0) {
        CHECK(errno == EAGAIN || errno == EWOULDBLOCK);
        return 0;
    }
    CHECK(n > 0 && had + (size_t)n <= ANSWER);
    CHECK(memcmp(got, answer + had, (size_t)n) == 0);
    return (size_t)n;
}

static int answer_with_much_room(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    limit_large_output(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK &&
           (rc = tsrv_write(stream, answer, ANSWER)) == TSRV_OK) {
    }
    return rc;
}

/* The case that the limit is there for: 5,000 ask for 1 MiB each, and read a part of it now and then. Of 5 GiB the
 * server never has more than 64 MiB, and all get all of it. */
TEST_PLAIN_SOFT(five_thousand_slow_readers_keep_to_the_total)
{
    enum { READERS = 5000 };
    static int fds[READERS];
    static size_t had[READERS];
    struct rlimit files;
    size_t all = 0, readers = READERS;
    CHECK(getrlimit(RLIMIT_NOFILE, &files) == 0);
    files.rlim_cur = files.rlim_max;
    CHECK(setrlimit(RLIMIT_NOFILE, &files) == 0);
    if (files.rlim_cur < 2 * READERS + 100) {
        readers = (size_t)(files.rlim_cur - 100) / 2;
    }
    fill_pattern(answer, 0, ANSWER);
    s_loop_options.max_total_buffer = 64 * MIB;
    s_open_with(answer_with_much_room, defaults);
    for (size_t i = 0; i < readers; i++) {
        fds[i] = t_connect_with_room(s_port, 65536);
        s_turn_ms(0);
    }
    s_settle();
    long before = m_forget();
    for (size_t i = 0; i < readers; i++) {
        t_sends(fds[i], "x\n");
        s_turn_ms(0);
    }
    CHECK_LEAST(m_grown_since(before), (long)(32 * MIB));
    for (int64_t limit = t_patience(); all < readers * ANSWER;) {
        size_t before_pass = all;
        for (size_t i = 0; i < readers; i++) {
            size_t got = had[i] == ANSWER ? 0 : receive_some(fds[i], had[i]);
            had[i] += got;
            all += got;
        }
        limit = all != before_pass ? t_patience() : limit;
        CHECK(t_now_ms() < limit);
        s_turn_ms(all == before_pass ? 1 : 0);
    }
    CHECK_MOST(m_grown_since(before), (long)(65 * MIB + (t_mode == TSRV_CALLBACK ? ANSWER : 0)));
    for (size_t i = 0; i < readers; i++) {
        t_close(fds[i]);
    }
    s_until(&s_closed, (int)readers);
    s_close();
}

LONG(five_thousand_slow_readers_keep_to_the_total);

TEST_PLAIN_SOFT(input_that_has_begun_comes_first)
{
    enum { HOLDERS = 8 };
    int fds[HOLDERS], first, late;
    char rest[700 * KIB];
    open_total(defaults);
    memset(rest, 'e', sizeof rest);
    for (int i = 0; i < HOLDERS; i++) {
        fds[i] = t_connect(s_port);
    }
    first = t_connect(s_port);
    late = t_connect(s_port);
    t_sends(first, "e"); /* holds a byte */
    s_settle();
    for (int i = 0; i < HOLDERS; i++) {
        s_send(fds[i], rest, sizeof rest);
        s_settle();
    }
    CHECK(s_loop->streams.pool.tight);
    t_sends(late, "e late\n");
    s_run_ms(100);
    CHECK_INT(asked, 0);
    t_sends(first, " first\n");
    s_expect(first, "e first\n");
    CHECK_INT(asked, 1);
    for (int i = 0; i < HOLDERS; i++) {
        t_reset(fds[i]);
    }
    s_expect(late, "e late\n");
    CHECK(!s_loop->streams.pool.tight);
    s_finish(first);
    s_finish(late);
    s_close();
}

static int answer_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    limit_output(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        tsrv_write(stream, answer, 2 * KIB);
    }
    return rc;
}

/* Those that have begun come first, and their pipelines keep to the total all the same: a handler in callback mode
 * waits for each answer to be sent, also in the midst of what it has received. */
TEST_PLAIN_SOFT(pipelines_that_have_begun_keep_to_the_total)
{
    enum { READERS = 100 };
    int fds[READERS];
    char lines[4 * KIB];
    memset(lines, '\n', sizeof lines);
    s_loop_options.max_total_buffer = TOTAL;
    s_open_with(answer_lines, defaults);
    for (int i = 0; i < READERS; i++) {
        fds[i] = t_connect_with_room(s_port, 4096);
        t_sends(fds[i], "e");
        s_settle();
    }
    long before = m_forget();
    for (int i = 0; i < READERS; i++) {
        s_send(fds[i], lines, sizeof lines);
        s_settle();
        CHECK((size_t)m_grown_since(before) <= TOTAL + 3 * MIB / 2); /* their pipelines themselves, too */
    }
    CHECK((size_t)m_grown_since(before) >= TOTAL / 2);
    for (int i = 0; i < READERS; i++) {
        t_reset(fds[i]);
    }
    s_until(&s_closed, READERS);
    s_close();
}

static int taken_step;

/* A byte that it knows, and then six into memory of its own: the first have come, when memory becomes tight. */
static int read_into_or_hold(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char memory[6];
    tsrv_slice line;
    (void)address, (void)context;
    if (tsrv_stream_server(stream) != s_server || stream != tsrv_server_next(s_server, NULL)) {
        return tsrv_read_until(stream, "\n", 0, &line);
    }
    int rc = tsrv_read_into(stream, memory, sizeof memory);
    if (rc == TSRV_OK) {
        taken_step++;
        rc = tsrv_write(stream, memory, sizeof memory);
    }
    return rc;
}

/* What has come of a read into memory has left the buffers, and it goes on all the same. */
TEST_PLAIN_SOFT(a_read_into_that_has_begun_goes_on)
{
    enum { HOLDERS = 8 };
    int fds[HOLDERS];
    tsrv_server_options options = {0};
    char rest[700 * KIB];
    s_loop_options.max_total_buffer = 4 * MIB;
    options.max_buffer_size = MIB;
    memset(rest, 'e', sizeof rest);
    taken_step = 0;
    s_open_with(read_into_or_hold, options);
    tsrv_set_log(t_no_log, NULL);
    int first = s_join();
    t_sends(first, "abc");
    s_settle();
    for (int i = 0; i < HOLDERS; i++) {
        fds[i] = s_join();
        s_send(fds[i], rest, sizeof rest);
        s_settle();
    }
    CHECK(s_loop->streams.pool.tight);
    CHECK_INT(taken_step, 0);
    t_sends(first, "def");
    s_expect(first, "abcdef");
    CHECK(s_loop->streams.pool.tight);
    for (int i = 0; i < HOLDERS; i++) {
        t_reset(fds[i]);
    }
    s_leave(first);
    s_until(&s_closed, HOLDERS + 1);
    s_close();
}

/* The end of a peer that waits is not held back. */
TEST_PLAIN_SOFT(ends_are_told_while_memory_is_tight)
{
    enum { HOLDERS = 8 };
    int fds[HOLDERS], quiet, newcomer;
    char rest[700 * KIB];
    open_total(defaults);
    memset(rest, 'e', sizeof rest);
    quiet = s_join();
    for (int i = 0; i < HOLDERS; i++) {
        fds[i] = t_connect(s_port);
        s_send(fds[i], rest, sizeof rest);
        s_settle();
    }
    CHECK(s_loop->streams.pool.tight);
    newcomer = s_join();
    s_settle();
    s_finish(quiet);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, TSRV_EOF);
    s_finish(newcomer);
    s_until(&s_closed, 2);
    CHECK_INT(s_reason, TSRV_EOF);
    for (int i = 0; i < HOLDERS; i++) {
        t_reset(fds[i]);
    }
    s_until(&s_closed, HOLDERS + 2);
    s_close();
}

static int tried; /* what the last tsrv_try_write returned */

static void try_answer(void *context)
{
    tsrv_slice parts[2] = {{answer, ANSWER / 2}, {answer + ANSWER / 2, ANSWER / 2}};
    tsrv_stream *stream = tsrv_server_next(s_server, NULL);
    while ((tried = tsrv_try_writev(stream, parts, 2)) == TSRV_OK) {
        (*(int *)context)++;
    }
}

/* A broadcast is refused what would go beyond the total, though the stream itself has room. */
TEST_PLAIN_SOFT(try_write_keeps_to_the_total)
{
    int written = 0;
    tsrv_server_options options = {0};
    options.max_write_buffer_size = 64 * MIB;
    open_total(options);
    int fd = t_connect_with_room(s_port, 4096);
    t_sends(fd, "e\n");
    s_expect(fd, "e\n");
    CHECK_INT(tsrv_loop_post(s_loop, try_answer, &written), TSRV_OK);
    s_settle();
    CHECK_INT(tried, TSRV_EFULL);
    CHECK(written >= 3 && written <= 4);
    CHECK_INT(tsrv_error(tsrv_server_next(s_server, NULL)), TSRV_OK);
    for (int i = 0; i < written; i++) {
        s_expect_bytes(fd, answer, ANSWER);
    }
    s_finish(fd);
    s_close();
}

/* ---- what a handler waits for is not held back ---------------------------------------------*/

static int backend_port;

static int say_yes(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        tsrv_write(stream, "yes\n", 4);
    }
    return rc;
}

/* Holds a large request while it asks another server about it. */
static int ask_about(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice request, answer_line;
    tsrv_stream *backend;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &request)) == TSRV_OK) {
        tsrv_sleep(100); /* until all have come */
        CHECK_INT(tsrv_connect("127.0.0.1", backend_port, NULL, &backend), TSRV_OK);
        tsrv_write(backend, "may I?\n", 7);
        CHECK_INT(tsrv_read_until(backend, "\n", 0, &answer_line), TSRV_OK);
        tsrv_write(stream, answer_line.data, answer_line.size);
        tsrv_close(backend);
    }
    return rc;
}

TEST_COROUTINE(answers_of_others_come_while_memory_is_tight)
{
    enum { CLIENTS = 12 };
    static char request[500 * KIB];
    tsrv_server_options options = {0};
    int fds[CLIENTS];
    s_loop_options.max_total_buffer = TOTAL;
    s_open_with(ask_about, defaults);
    options.handle_stream = say_yes;
    options.loop = NULL;
    /* The backend has a loop of its own thread in life; here it must not be held, so it is not of this loop. */
    tsrv_loop *other;
    CHECK_INT(tsrv_loop_new(&other, NULL), TSRV_OK);
    options.loop = other;
    tsrv_server *backend;
    CHECK_INT(tsrv_server_new(&backend, &options), TSRV_OK);
    backend_port = t_listen(backend);
    memset(request, 'r', sizeof request);
    request[sizeof request - 1] = '\n';
    for (int i = 0; i < CLIENTS; i++) {
        fds[i] = t_connect(s_port);
        s_send(fds[i], request, sizeof request);
    }
    for (int i = 0; i < CLIENTS; i++) {
        char got[4];
        size_t size = 0;
        int64_t limit = t_patience();
        while (size < sizeof got) {
            ssize_t n = recv(fds[i], got + size, sizeof got - size, MSG_DONTWAIT);
            size += n > 0 ? (size_t)n : 0;
            CHECK(t_now_ms() < limit);
            s_turn_ms(1);
            CHECK(tsrv_loop_run_once(other, 0) >= 0);
        }
        CHECK_MEM(got, 4, "yes\n", 4);
    }
    for (int i = 0; i < CLIENTS; i++) {
        t_close(fds[i]);
    }
    s_until(&s_closed, CLIENTS);
    tsrv_server_free(backend);
    CHECK_INT(tsrv_loop_free(other), TSRV_OK);
    s_close();
}

/* Where the limit is smaller than a buffer, too, all are served, one after the other: who has begun comes first. */
TEST_PLAIN_SOFT(small_totals_serve_all)
{
    static const size_t totals[] = {1, 20000, 65536, 86000};
    for (size_t i = 0; i < COUNT(totals); i++) {
        int fds[8];
        s_loop_options.max_total_buffer = totals[i];
        s_open_with(echo_lines, defaults);
        for (int k = 0; k < 8; k++) {
            fds[k] = t_connect(s_port);
            t_sends(fds[k], "a part of a line ");
        }
        s_settle();
        for (int k = 0; k < 8; k++) {
            t_sends(fds[k], "and the rest\n");
        }
        for (int k = 0; k < 8; k++) {
            s_expect(fds[k], "a part of a line and the rest\n");
            s_finish(fds[k]);
        }
        CHECK(!s_loop->streams.pool.tight);
        s_close();
    }
}

/* A server's loop_options are those of the thread's loop, if it makes that. */
TEST_SOFT(loop_options_of_a_server_are_its_loops)
{
    tsrv_server_options options = {0};
    tsrv_loop_options loop_options = {0};
    tsrv_server *server;
    options.handle_stream = echo_lines;
    options.mode = t_mode;
    options.loop_options = &loop_options;
    loop_options.backend = t_backend;
    loop_options.max_total_buffer = 12345;
    loop_options.slow_ms = 77;
    tsrv_set_log(t_no_log, NULL);
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    memset(&loop_options, 0, sizeof loop_options); /* they were copied */
    CHECK_INT(tsrv_server_listen(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_loop_current()->streams.most, 12345);
    CHECK_INT(tsrv_loop_current()->slow.limit, 77000000);
    CHECK_INT(tsrv_loop_backend(NULL), t_backend == TSRV_BACKEND_BEST ? tsrv_loop_backend(NULL) : t_backend);
    tsrv_server_free(server);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
}
