/* For tests that are scripts: server, clients and test share one thread, and time is virtual. It passes only while the
 * loop has nothing to do, so that a test says exactly when something happens and never sleeps for it: a real
 * millisecond without an event counts as up to V_STEP_MS. Included first, in place of test.h. A test whose clients are
 * threads or processes may stand beside scripts: t_run and t_new_loop keep to real time. */
#ifndef SCRIPT_H
#define SCRIPT_H

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "seam.h"

#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <time.h>
#ifdef __linux__
#include <sys/epoll.h>
#endif

#define V_STEP_MS 50

static uint64_t v_now = 1000000000000u; /* the loop's clock, in nanoseconds; moves on a little whenever it is read */
static bool v_stopped;                  /* time is real in this test */
static bool v_hung;                     /* and stands still while a helper thread works, unless that hangs */
#define TSRVI_TICKS v_now               /* by which the loop finds what took most of a turn */

static inline bool v_works(void);

static pthread_mutex_t v_mutex = PTHREAD_MUTEX_INITIALIZER;

static inline int v_clock(clockid_t id, struct timespec *now)
{
    if (v_stopped) {
        return clock_gettime(id, now);
    }
    pthread_mutex_lock(&v_mutex); /* threads that log look at it too */
    v_now += 1000;
    now->tv_sec = (time_t)(v_now / 1000000000);
    now->tv_nsec = (long)(v_now % 1000000000);
    pthread_mutex_unlock(&v_mutex);
    return 0;
}

/* How long a wait lasts in truth. */
static inline int v_real(int timeout_ms)
{
    return v_stopped ? timeout_ms : timeout_ms == 0 ? 0 : 1;
}

/* A wait has found count events: none of them, and time passes. */
static inline int v_waited(int count, int timeout_ms)
{
    if (!v_stopped && count == 0 && timeout_ms > 0 && (v_hung || !v_works())) {
        v_now += (uint64_t)(timeout_ms < V_STEP_MS ? timeout_ms : V_STEP_MS) * 1000000;
    }
    return count;
}

static inline int v_poll(struct pollfd *entries, nfds_t count, int timeout_ms)
{
    return v_waited(poll(entries, count, v_real(timeout_ms)), timeout_ms);
}

#undef t_sys_clock_gettime
#undef t_sys_poll
#define t_sys_clock_gettime(...) v_clock(__VA_ARGS__)
#define t_sys_poll(...) (t_fault("poll") ? -1 : v_poll(__VA_ARGS__))

#ifdef __linux__
static inline int v_epoll_wait(int fd, struct epoll_event *events, int size, int timeout_ms)
{
    return v_waited(epoll_wait(fd, events, size, v_real(timeout_ms)), timeout_ms);
}

#undef t_sys_epoll_wait
#define t_sys_epoll_wait(...) (t_fault("epoll_wait") ? -1 : v_epoll_wait(__VA_ARGS__))
#endif

#if defined(__has_include) && !defined(TSRV_NO_KQUEUE)
#if __has_include(<sys/event.h>)
#include <sys/event.h>

static inline int v_kevent(int fd, const struct kevent *changes, int count, struct kevent *events, int size,
                           const struct timespec *limit)
{
    struct timespec real = {0, 0};
    int timeout_ms = limit == NULL ? -1 : (int)(limit->tv_sec * 1000 + limit->tv_nsec / 1000000);
    if (size == 0 || v_stopped) {
        return kevent(fd, changes, count, events, size, limit);
    }
    real.tv_nsec = v_real(timeout_ms) * 1000000L;
    return v_waited(kevent(fd, changes, count, events, size, &real), timeout_ms);
}

#undef t_sys_kevent
#define t_sys_kevent(kq, changes, count, ...)                                                      \
    (t_fault((count) > 0 ? "kevent_set" : "kevent") ? -1 : v_kevent(kq, changes, count, __VA_ARGS__))
#endif
#endif

#include "test.h"

/* Coroutines only, and not in pieces: for scripts whose figures the hard mode would change. */
#define TEST_SCRIPT(name) T_TEST(name, T_PER_BACKEND | T_COROUTINES)

static inline bool v_works(void)
{
    return tsrvi_thread.running != NULL && tsrvi_thread.running->work.left != 0;
}

static inline int64_t v_ms(void)
{
    return (int64_t)(v_now / 1000000);
}

/* ---- a loop, a server, and the log --------------------------------------------------------*/

static tsrv_loop *s_loop;
static tsrv_server *s_server;
static int s_port;

static tsrv_loop_options s_loop_options; /* all zeros unless a test says otherwise */

static inline void s_open_loop(void)
{
    tsrv_loop_options options = s_loop_options;
    options.backend = t_backend;
    CHECK_INT(tsrv_loop_new(&s_loop, &options), TSRV_OK);
    t_watch_log();
}

static inline tsrv_server *s_new_server(tsrv_server_options options)
{
    tsrv_server *server;
    options.loop = s_loop;
    options.mode = t_mode;
    if (t_hard && options.read_chunk_size == 0) {
        options.read_chunk_size = 1;
    }
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    return server;
}

static inline void s_open(tsrv_server_options options)
{
    s_open_loop();
    s_server = s_new_server(options);
    s_port = t_listen(s_server);
}

static inline void s_close(void)
{
    tsrv_server_free(s_server);
    s_server = NULL;
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
    s_loop = NULL;
}

static inline tsrv_stats s_stats(void)
{
    tsrv_stats stats;
    tsrv_server_stats(s_server, &stats);
    return stats;
}

static int s_closed; /* streams since s_open_with */
static int s_reason; /* of the last one's end */
static int64_t s_closed_ms; /* when that was */

/* An on_close. */
static inline void s_note_close(tsrv_stream *stream, int reason, void *context)
{
    (void)stream, (void)context;
    s_closed++;
    s_closed_ms = v_ms();
    s_reason = reason;
}

/* A server whose ends of streams are counted. */
static inline void s_open_with(tsrv_handler handler, tsrv_server_options options)
{
    s_closed = s_reason = 0;
    options.handle_stream = handler;
    if (options.on_close == NULL) {
        options.on_close = s_note_close;
    }
    s_open(options);
}

static inline void s_serve(tsrv_handler handler)
{
    tsrv_server_options options = {0};
    s_open_with(handler, options);
}

/* ---- turns --------------------------------------------------------------------------------*/

/* One turn of at most so many virtual milliseconds. Time passes too when the loop has nothing left. */
static inline void s_turn_ms(int limit_ms)
{
    int rc = tsrv_loop_run_once(s_loop, limit_ms);
    CHECK(rc >= 0);
    if (rc == 0) {
        v_waited(0, limit_ms);
    }
}

static inline void s_turn(void)
{
    s_turn_ms(V_STEP_MS);
}

static inline void s_run_ms(int duration_ms)
{
    int64_t end = v_ms() + duration_ms, limit = t_patience();
    while (v_ms() < end) {
        s_turn_ms(end - v_ms() < V_STEP_MS ? (int)(end - v_ms()) : V_STEP_MS);
        CHECK(t_now_ms() < limit);
    }
}

/* Turns until *counter has reached value. */
static inline void s_until(const int *counter, int value)
{
    int64_t limit = t_patience();
    while (*counter < value) {
        s_turn();
        if (t_now_ms() > limit) {
            T_FAIL("a counter stays at %d, not %d", *counter, value);
        }
    }
}

/* Turns until nothing happens any more: input that is on its way has been handled. */
static inline void s_settle(void)
{
    for (int i = 0; i < 20; i++) {
        int rc = tsrv_loop_run_once(s_loop, 0);
        CHECK(rc >= 0);
    }
}

/* ---- a drain that a coroutine waits for ---------------------------------------------------*/

typedef struct s_drainer {
    tsrv_server *server;
    int grace_ms;
    int rc, done;
    int64_t started_ms, took_ms;
} s_drainer;

static inline void s_drain(void *context)
{
    s_drainer *d = (s_drainer *)context;
    d->started_ms = v_ms();
    d->rc = tsrv_server_drain(d->server, d->grace_ms);
    d->took_ms = v_ms() - d->started_ms;
    d->done++;
}

static inline s_drainer s_new_drain(int grace_ms)
{
    s_drainer d = {s_server, grace_ms, 1, 0, 0, 0};
    return d;
}

/* Spawns it and lets it begin. */
static inline void s_begin_drain(s_drainer *d)
{
    CHECK_INT(tsrv_spawn(s_loop, s_drain, d), TSRV_OK);
    s_settle();
}

/* Waits for its end and checks its result and how long it took. */
static inline void s_check_drain(s_drainer *d, int rc, int64_t low_ms, int64_t high_ms)
{
    s_until(&d->done, 1);
    CHECK_INT(d->rc, rc);
    if (d->took_ms < low_ms || d->took_ms > high_ms) {
        T_FAIL("the drain took %lld ms, not %lld to %lld", (long long)d->took_ms, (long long)low_ms,
               (long long)high_ms);
    }
}

/* ---- clients ------------------------------------------------------------------------------*/

/* A client that has been accepted. */
static inline int s_join_with_room(int receive_room)
{
    uint64_t before = s_stats().accepted;
    int64_t limit = t_patience();
    int fd = t_connect_with_room(s_port, receive_room);
    while (s_stats().accepted == before) {
        s_turn();
        CHECK(t_now_ms() < limit);
    }
    return fd;
}

static inline int s_join(void)
{
    return s_join_with_room(0);
}

/* Receives up to size bytes, turning the loop meanwhile. Returns how many came until the end;
 * *code is 0 or the errno that ended it. Patience counts from the last byte: how long the whole
 * takes depends on the machine, and is limited by the time of the test. */
static inline size_t s_recv(int fd, void *buffer, size_t size, int *code)
{
    size_t got = 0;
    int64_t limit = t_patience();
    *code = 0;
    while (got < size) {
        ssize_t n = recv(fd, (char *)buffer + got, size - got, MSG_DONTWAIT);
        if (n > 0) {
            got += (size_t)n;
            limit = t_patience();
        } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
            *code = n == 0 ? 0 : errno;
            break;
        } else if (t_now_ms() > limit) {
            t_print_bytes("got", (const char *)buffer, got);
            T_FAIL("client: %zu of %zu bytes came", got, size);
        } else {
            s_turn();
        }
    }
    return got;
}

static inline void s_expect_bytes(int fd, const char *data, size_t size)
{
    char *buffer = (char *)malloc(size + 1);
    int code;
    CHECK(buffer != NULL);
    size_t got = s_recv(fd, buffer, size, &code);
    CHECK_MEM(buffer, got, data, size);
    CHECK_INT(code, 0);
    free(buffer);
}

static inline void s_expect(int fd, const char *text)
{
    s_expect_bytes(fd, text, strlen(text));
}

static inline void s_expect_eof(int fd)
{
    char byte;
    int code;
    CHECK_MEM(&byte, s_recv(fd, &byte, 1, &code), "", 0);
    CHECK_INT(code, 0);
}

/* Expects the server's end, and goes. */
static inline void s_leave(int fd)
{
    s_expect_eof(fd);
    t_close(fd);
}

/* Ends its own side first. */
static inline void s_finish(int fd)
{
    t_shut(fd);
    s_leave(fd);
}

/* With a server that echoes. */
static inline void s_echo(int fd, const char *text)
{
    t_sends(fd, text);
    s_expect(fd, text);
}

/* Drops what comes before it. */
static inline void s_expect_reset(int fd)
{
    char buffer[4096];
    int code = 0;
    while (s_recv(fd, buffer, sizeof buffer, &code) == sizeof buffer) {
    }
    CHECK_INT(code, ECONNRESET);
}

/* Sends all, turning the loop meanwhile. */
static inline void s_send(int fd, const void *data, size_t size)
{
    size_t sent = 0;
    int64_t limit = t_patience();
    while (sent < size) {
        ssize_t n = send(fd, (const char *)data + sent, size - sent, MSG_DONTWAIT | T_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) {
            T_FAIL("client: send after %zu of %zu bytes: %s", sent, size, strerror(errno));
        }
        sent += n > 0 ? (size_t)n : 0;
        if (n < 0) {
            CHECK(t_now_ms() < limit);
            s_turn();
        }
    }
}

#endif
