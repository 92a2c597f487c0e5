/* The test harness: every test in a process of its own with a time limit, once for each backend,
 * mode and hardness that it asks for; a server fixture; blocking raw socket clients.
 * Each tests/ program includes this file first, or a header that does: script.h, workers.h. */
#ifndef TEST_H
#define TEST_H

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif

#include "seam.h"

#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include "verify.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define T_SKIPPED 77     /* the exit status of a skipped test */
#ifndef T_SECONDS        /* tests/mutants.py has no time for what hangs */
#define T_SECONDS 60     /* the time limit of a test; TEST_TIMEOUT_SCALE multiplies it */
#define T_PATIENCE 30    /* how long a client waits for the server, in seconds, scaled too */
#endif
#define T_MAX_FD 4096    /* descriptors below it are checked for leaks */
#define T_RECORDS 65536  /* capacity of the log of t_record */

/* The variant that runs now. */
int t_backend; /* TSRV_BACKEND_... */
int t_mode;    /* TSRV_COROUTINE or TSRV_CALLBACK */
bool t_hard;   /* one byte a receive, up to seven a send */

/* The loop and the server of t_run while it runs, else NULL. */
tsrv_loop *t_loop;
tsrv_server *t_server;

/* ---- defining tests -----------------------------------------------------------------------*/

enum { T_PER_BACKEND = 1, T_COROUTINES = 2, T_CALLBACKS = 4, T_PER_HARDNESS = 8, T_PLAIN = 16, T_LONG = 32 };

typedef struct t_test {
    const char *name;
    void (*function)(void);
    int kind; /* bits of the enum above */
    const char *file;
    struct t_test *next;
} t_test;

t_test *t_first;
t_test **t_end = &t_first;

static inline void t_register(t_test *test)
{
#if defined(T_TLS) || defined(T_MEMORY)
    if (test->kind & T_PLAIN) {
        return;
    }
#endif
    *t_end = test;
    t_end = &test->next;
}

#define T_TEST(name, kind)                                                                         \
    static void name(void);                                                                        \
    static t_test name##_entry = {#name, name, kind, __FILE__, NULL};                              \
    __attribute__((constructor)) static void name##_register(void)                                 \
    {                                                                                              \
        t_register(&name##_entry);                                                                 \
    }                                                                                              \
    static void name(void)

#define TEST_ONCE(name) T_TEST(name, 0)
#define TEST_LOOP(name) T_TEST(name, T_PER_BACKEND)
#define TEST_STREAM(name) T_TEST(name, T_PER_BACKEND | T_PER_HARDNESS | T_COROUTINES | T_CALLBACKS)
/* For what TLS changes, sockets, sizes or times: the runs over TLS and over memory leave it out. */
#define TEST_PLAIN_STREAM(name) \
    T_TEST(name, T_PER_BACKEND | T_PER_HARDNESS | T_COROUTINES | T_CALLBACKS | T_PLAIN)
/* For figures that the hard mode would change: without it. */
#define TEST_SOFT(name) T_TEST(name, T_PER_BACKEND | T_COROUTINES | T_CALLBACKS)
#define TEST_PLAIN_SOFT(name) T_TEST(name, T_PER_BACKEND | T_COROUTINES | T_CALLBACKS | T_PLAIN)
#define TEST_COROUTINE(name) T_TEST(name, T_PER_BACKEND | T_PER_HARDNESS | T_COROUTINES)
#define TEST_CALLBACK(name) T_TEST(name, T_PER_BACKEND | T_PER_HARDNESS | T_CALLBACKS)

/* Behind a test that takes seconds of the processor, or many: --short, and so `make test`, leaves it out. */
#define LONG(name)                                                                                 \
    __attribute__((constructor)) static void name##_is_long(void)                                  \
    {                                                                                              \
        name##_entry.kind |= T_LONG;                                                               \
    }                                                                                              \
    typedef int name##_end_of_long /* for the semicolon */

/* ---- checks: print both sides and end the test, from any thread ---------------------------*/

#define T_FAIL(...) (fprintf(stderr, "%s:%d: ", __FILE__, __LINE__), t_fail(__VA_ARGS__))

int t_log_lines; /* since t_watch_log, of its level or above */
int t_log_level;
char t_log[1024]; /* the last of them */

__attribute__((noreturn)) static inline void t_stop(void)
{
    if (t_log_lines > 0) {
        fprintf(stderr, "    the last of %d lines of the log: %s\n", t_log_lines, t_log);
    }
    fflush(stdout);
    _exit(1);
}

__attribute__((noreturn, format(printf, 1, 2))) static inline void t_fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    t_stop();
}

static inline void t_print_code(const char *side, long long value)
{
    bool code = value < 0 && value > -100000;
    fprintf(stderr, "    %s %lld%s%s%s\n", side, value, code ? " (" : "",
            code ? tsrv_strerror((int)value) : "", code ? ")" : "");
}

static inline void t_check_int(const char *file, int line, const char *text, long long actual,
                               long long expected)
{
    if (actual != expected) {
        fprintf(stderr, "%s:%d: CHECK_INT(%s)\n", file, line, text);
        t_print_code("actual  ", actual);
        t_print_code("expected", expected);
        t_stop();
    }
}

static inline void t_print_bytes(const char *side, const char *data, size_t size)
{
    fprintf(stderr, "    %s %zu bytes: \"", side, size);
    for (size_t i = 0; i < size && i < 200; i++) {
        unsigned char byte = (unsigned char)data[i];
        if (byte >= ' ' && byte < 127) {
            fputc(byte, stderr);
        } else {
            fprintf(stderr, "\\x%02x", byte);
        }
    }
    fprintf(stderr, size > 200 ? "\"...\n" : "\"\n");
}

static inline void t_check_mem(const char *file, int line, const char *text, const void *actual,
                               size_t actual_size, const void *expected, size_t expected_size)
{
    const char *a = (const char *)actual, *e = (const char *)expected;
    size_t at = 0;
    while (at < actual_size && at < expected_size && a[at] == e[at]) {
        at++;
    }
    if (at < actual_size || at < expected_size) {
        size_t from = at > 40 ? at - 40 : 0;
        fprintf(stderr, "%s:%d: CHECK(%s), different at %zu, shown from %zu\n", file, line,
                text, at, from);
        t_print_bytes("actual  ", a + from, actual_size - from);
        t_print_bytes("expected", e + from, expected_size - from);
        t_stop();
    }
}

static inline void t_check_str(const char *file, int line, const char *text, const char *actual,
                               const char *expected)
{
    t_check_mem(file, line, text, actual, strlen(actual), expected, strlen(expected));
}

static inline void t_check_near(const char *file, int line, const char *text, long long actual,
                                long long low, long long high)
{
    if (actual < low || actual > high) {
        fprintf(stderr, "%s:%d: ", file, line);
        t_fail("CHECK_NEAR_MS(%s)\n    actual %lld\n    limits %lld to %lld", text, actual, low,
               high);
    }
}

#define CHECK(condition) ((condition) ? (void)0 : T_FAIL("CHECK(%s)", #condition))
#define CHECK_INT(actual, expected)                                                                \
    t_check_int(__FILE__, __LINE__, #actual ", " #expected, (long long)(actual),                   \
                (long long)(expected))
#define CHECK_MEM(actual, actual_size, expected, expected_size)                                    \
    t_check_mem(__FILE__, __LINE__, #actual ", " #expected, (actual), (actual_size), (expected),   \
                (expected_size))
#define CHECK_STR(actual, expected)                                                                \
    t_check_str(__FILE__, __LINE__, #actual ", " #expected, (actual), (expected))
/* The upper limit grows with TEST_TIMEOUT_SCALE, the lower one does not. */
#define CHECK_NEAR_MS(actual, low, high)                                                           \
    t_check_near(__FILE__, __LINE__, #actual, (long long)(actual), (low),                          \
                 (long long)(high) * t_scale())
#define SKIP(tool) (fprintf(stderr, "%s\n", tool), _exit(T_SKIPPED))

/* For tests of what Linux tells there: below a bare root it is an empty directory. */
static inline void t_need_proc(void)
{
    if (access("/proc/self/exe", F_OK) != 0) {
        SKIP("/proc");
    }
}

/* ---- time, threads, records ---------------------------------------------------------------*/

static inline int t_scale(void)
{
    const char *text = getenv("TEST_TIMEOUT_SCALE");
    int scale = text != NULL ? atoi(text) : 1;
    return scale > 1 ? scale : 1;
}

/* Microseconds of a monotonic clock. */
static inline int64_t t_now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static inline int64_t t_now_ms(void)
{
    return t_now_us() / 1000;
}

/* How long somebody waits for what has to come. */
static inline int t_patience_ms(void)
{
    return T_PATIENCE * 1000 * t_scale();
}

/* When it is over: for loops that must come to an end. */
static inline int64_t t_patience(void)
{
    return t_now_ms() + t_patience_ms();
}

/* In a file of scripts, whose time is virtual elsewhere. */
static inline void t_use_real_time(void)
{
#ifdef SCRIPT_H
    v_stopped = true;
#endif
}

/* Polls condition every millisecond. False: it did not become true in time. */
static inline bool t_wait_until(bool (*condition)(void *), void *context)
{
    int64_t end = t_patience();
    while (!condition(context)) {
        if (t_now_ms() > end) {
            return false;
        }
        poll(NULL, 0, 1);
    }
    return true;
}

/* A log of numbers that any thread may write and read: who did what, in which order. */
pthread_mutex_t t_record_mutex = PTHREAD_MUTEX_INITIALIZER;
int t_records[T_RECORDS];
int t_records_used;

static inline void t_record(int value)
{
    pthread_mutex_lock(&t_record_mutex);
    if (t_records_used == T_RECORDS) {
        T_FAIL("more than %d records", T_RECORDS);
    }
    t_records[t_records_used++] = value;
    pthread_mutex_unlock(&t_record_mutex);
}

static inline int t_record_count(void)
{
    pthread_mutex_lock(&t_record_mutex);
    int count = t_records_used;
    pthread_mutex_unlock(&t_record_mutex);
    return count;
}

static inline int t_recorded(int index)
{
    if (index < 0 || index >= t_record_count()) {
        T_FAIL("record %d of %d", index, t_record_count());
    }
    pthread_mutex_lock(&t_record_mutex);
    int value = t_records[index];
    pthread_mutex_unlock(&t_record_mutex);
    return value;
}

static inline bool t_has_records(void *count)
{
    return t_record_count() >= *(int *)count;
}

/* Waits until there are at least count records. */
static inline void t_wait_records(int count)
{
    if (!t_wait_until(t_has_records, &count)) {
        T_FAIL("only %d of %d records came", t_record_count(), count);
    }
}

typedef struct t_call {
    void (*function)(void *);
    void *context;
    int pipe[2];
} t_call;

static inline void t_run_call(void *context)
{
    t_call *call = (t_call *)context;
    call->function(call->context);
    CHECK(write(call->pipe[1], "", 1) == 1);
}

/* For clients: have the loop of t_run call function(context), and wait until it has. */
static inline void t_on_loop(void (*function)(void *), void *context)
{
    t_call call = {function, context, {-1, -1}};
    char byte;
    CHECK(pipe(call.pipe) == 0);
    CHECK_INT(tsrv_loop_post(t_loop, t_run_call, &call), TSRV_OK);
    CHECK(read(call.pipe[0], &byte, 1) == 1);
    close(call.pipe[0]);
    close(call.pipe[1]);
}

/* ---- raw clients: blocking sockets that give up after T_PATIENCE seconds ------------------*/

/* For any connected socket: the limits, and no SIGPIPE where send has no flag for it. */
static inline void t_prepare(int fd)
{
    struct timeval patience = {T_PATIENCE * t_scale(), 0};
    CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) == 0);
    CHECK(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) == 0);
#ifdef SO_NOSIGPIPE
    int on = 1;
    CHECK(setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on) == 0);
#endif
}

#ifdef MSG_NOSIGNAL
#define T_NOSIGNAL MSG_NOSIGNAL
#else
#define T_NOSIGNAL 0
#endif

/* 127.0.0.1 */
static inline struct sockaddr_in t_address(int port)
{
    struct sockaddr_in address;
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static inline struct sockaddr_un t_unix_address(const char *path)
{
    struct sockaddr_un address;
    memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    CHECK(strlen(path) < sizeof address.sun_path);
    memcpy(address.sun_path, path, strlen(path));
    return address;
}

/* A socket of 127.0.0.1 without the library, and behind the back of its seams. port may be NULL. */
static inline int t_raw_socket(int type, bool listening, int *port)
{
    struct sockaddr_in address = t_address(0);
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, type, 0);
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&address, size) == 0);
    CHECK(!listening || listen(fd, 16) == 0);
    CHECK(getsockname(fd, (struct sockaddr *)&address, &size) == 0);
    if (port != NULL) {
        *port = ntohs(address.sin_port);
    }
    return fd;
}

/* Connects to 127.0.0.1. Nagle is off, so that pieces sent apart can arrive apart. receive_room
 * is the socket's SO_RCVBUF in bytes, which counts only before the connection; 0: the system's. */
static inline int t_connect_tcp(int port, int receive_room)
{
    struct sockaddr_in address = t_address(port);
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    struct pollfd connected = {fd, POLLOUT, 0};
    CHECK(fd >= 0);
    t_prepare(fd);
    if (receive_room > 0) {
        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &receive_room, sizeof receive_room) == 0);
    }
    /* Not by a connect that blocks: it would report, and so take away, the reset of a server that
     * was quicker than this thread. */
    CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0 && errno != EINPROGRESS) {
        T_FAIL("connect to port %d: %s", port, strerror(errno));
    }
    if (poll(&connected, 1, t_patience_ms()) != 1) {
        T_FAIL("connect to port %d: no answer", port);
    }
    CHECK(fcntl(fd, F_SETFL, 0) == 0);
    CHECK(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0);
    return fd;
}

#ifdef T_TLS
#include "relay.h"

/* Over a relay; see there. */
static inline int t_connect_with_room(int port, int receive_room)
{
    int on = 1, secret = t_connect_tcp(port, 0), relay_port;
    int listener = t_raw_socket(SOCK_STREAM, true, &relay_port), fd = t_connect_tcp(relay_port, receive_room);
    int plain = accept(listener, NULL, NULL);
    CHECK(plain >= 0);
    CHECK(setsockopt(plain, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0);
    close(listener);
    t_relay_start(plain, secret);
    return fd;
}

#else
static inline int t_connect_with_room(int port, int receive_room)
{
    return t_connect_tcp(port, receive_room);
}
#endif

static inline int t_connect(int port)
{
    return t_connect_with_room(port, 0);
}

static inline void t_send(int fd, const void *data, size_t size)
{
    size_t sent = 0;
    while (sent < size) {
        ssize_t n = send(fd, (const char *)data + sent, size - sent, T_NOSIGNAL);
        if (n < 0 && errno != EINTR) {
            T_FAIL("client: send after %zu of %zu bytes: %s", sent, size, strerror(errno));
        }
        sent += n > 0 ? (size_t)n : 0;
    }
}

static inline void t_sends(int fd, const char *text)
{
    t_send(fd, text, strlen(text));
}

/* Receives until size bytes or the end. Returns how many. */
static inline size_t t_recv(int fd, void *buffer, size_t size)
{
    size_t received = 0;
    while (received < size) {
        ssize_t n = recv(fd, (char *)buffer + received, size - received, 0);
        if (n < 0 && errno != EINTR) {
            T_FAIL("client: recv after %zu of %zu bytes: %s", received, size, strerror(errno));
        }
        if (n == 0) {
            break;
        }
        received += n > 0 ? (size_t)n : 0;
    }
    return received;
}

/* Receives until the end. */
static inline size_t t_recv_all(int fd, char *buffer, size_t capacity)
{
    char more;
    size_t size = t_recv(fd, buffer, capacity);
    if (size == capacity && t_recv(fd, &more, 1) != 0) {
        T_FAIL("client: more than %zu bytes", capacity);
    }
    return size;
}

static inline void t_expect(int fd, const char *text)
{
    size_t size = strlen(text);
    char *buffer = (char *)malloc(size + 1);
    CHECK(buffer != NULL);
    size_t received = t_recv(fd, buffer, size);
    CHECK_MEM(buffer, received, text, size);
    free(buffer);
}

static inline void t_expect_eof(int fd)
{
    char byte;
    size_t received = t_recv(fd, &byte, 1);
    CHECK_MEM(&byte, received, "", 0);
}

/* Nothing has come, and no end. Says something once the server is known to have had its turn. */
static inline void t_expect_silence(int fd)
{
    char byte;
    ssize_t n = recv(fd, &byte, 1, MSG_DONTWAIT | MSG_PEEK);
    if (n >= 0 || errno != EAGAIN) {
        T_FAIL("client: %s", n > 0 ? "a byte came" : n == 0 ? "the end came" : strerror(errno));
    }
}

/* Drops what comes before the reset. */
static inline void t_expect_reset(int fd)
{
    char buffer[4096];
    ssize_t n;
    do {
        n = recv(fd, buffer, sizeof buffer, 0);
    } while (n > 0 || (n < 0 && errno == EINTR));
    if (n == 0 || errno != ECONNRESET) {
        T_FAIL("client: %s, expected a reset", n == 0 ? "end of input" : strerror(errno));
    }
}

static inline void t_shut(int fd)
{
    CHECK(shutdown(fd, SHUT_WR) == 0);
}

static inline void t_close(int fd)
{
    CHECK(close(fd) == 0);
}

/* Does nobody listen there? */
static inline bool t_is_refused(int port)
{
    struct sockaddr_in address = t_address(port);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(fd >= 0);
    bool refused = connect(fd, (struct sockaddr *)&address, sizeof address) != 0 &&
                   errno == ECONNREFUSED;
    t_close(fd);
    return refused;
}

static inline void t_reset(int fd)
{
    struct linger now = {1, 0};
    CHECK(setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now) == 0);
    t_close(fd);
}

/* Expects the server's end, and goes. */
static inline void t_leave(int fd)
{
    t_expect_eof(fd);
    t_close(fd);
}

/* Ends its own side first. */
static inline void t_finish(int fd)
{
    t_shut(fd);
    t_leave(fd);
}

/* With a server that echoes. */
static inline void t_echo(int fd, const char *text)
{
    t_sends(fd, text);
    t_expect(fd, text);
}

/* Reads until the end, be it a FIN or a reset. */
static inline void t_drain_and_close(int fd)
{
    char buffer[4096];
    ssize_t n;
    while ((n = recv(fd, buffer, sizeof buffer, 0)) > 0) {
    }
    CHECK(n == 0 || errno == ECONNRESET);
    t_close(fd);
}

/* A port of 127.0.0.1 that is free now. */
static inline int t_free_port(void)
{
    int port, fd = t_raw_socket(SOCK_STREAM, false, &port);
    t_close(fd);
    return port;
}

/* For clients that do not use T_NOSIGNAL, and to see that the library raises none. */
static inline void t_block_sigpipe(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
}

/* How often the text has that part in it. */
static inline int t_count(const char *text, const char *part)
{
    int count = 0;
    for (const char *at = strstr(text, part); at != NULL; at = strstr(at + 1, part)) {
        count++;
    }
    return count;
}

/* Reads a line without its newline, of a pipe too. False: there are no more. */
static inline bool t_read_line(int fd, char *line, size_t capacity)
{
    size_t used = 0;
    for (;;) {
        struct pollfd ready = {fd, POLLIN, 0};
        if (poll(&ready, 1, t_patience_ms()) != 1) {
            T_FAIL("no line comes, but \"%.*s\"", (int)used, line);
        }
        CHECK(used + 1 < capacity);
        ssize_t n = read(fd, line + used, 1);
        CHECK(n >= 0);
        if (n == 0 || line[used] == '\n') {
            line[used] = 0;
            return n > 0;
        }
        used++;
    }
}

#ifdef __linux__
/* As a container with one processor. */
static inline void t_use_one_processor(void)
{
    cpu_set_t set, one;
    size_t cpu = 0;
    CHECK(sched_getaffinity(0, sizeof set, &set) == 0);
    while (!CPU_ISSET(cpu, &set)) {
        cpu++;
    }
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
}
#endif

/* A directory of its own, below build/ where there is one. */
static inline char *t_make_directory(void)
{
    static char name[64];
    snprintf(name, sizeof name, "%s/tsrv-XXXXXX", access("build", W_OK) == 0 ? "build" : "/tmp");
    CHECK(mkdtemp(name) != NULL);
    return name;
}

static inline bool t_is_open(int fd)
{
    return fcntl(fd, F_GETFD) != -1;
}

static inline void t_close_all(const int *fds, int count)
{
    for (int i = 0; i < count; i++) {
        t_close(fds[i]);
    }
}

/* Has the machine ::1? */
static inline bool t_has_ipv6(void)
{
    struct sockaddr_in6 address;
    int fd = socket(AF_INET6, SOCK_STREAM, 0);
    memset(&address, 0, sizeof address);
    address.sin6_family = AF_INET6;
    address.sin6_addr.s6_addr[15] = 1;
    bool has = fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) == 0;
    if (fd >= 0) {
        t_close(fd);
    }
    return has;
}

static inline int t_socket_option(int fd, int level, int name)
{
    int value = -1;
    socklen_t size = sizeof value;
    CHECK(getsockopt(fd, level, name, &value, &size) == 0);
    return value;
}

/* ---- callbacks that many tests need --------------------------------------------------------*/

/* An on_close. */
static inline void t_record_reason(tsrv_stream *stream, int reason, void *context)
{
    (void)context;
    CHECK_INT(tsrv_fd(stream), -1);
    t_record(reason);
}

/* For tsrv_loop_post, tsrv_spawn and timers; its context is the number. */
static inline void t_record_call(void *context)
{
    t_record(*(int *)context);
}

static inline void t_no_log(int level, const char *message, void *context)
{
    (void)level, (void)message, (void)context;
}

static inline void t_see_log(int level, const char *message, void *context)
{
    (void)context;
    if (level <= t_log_level) {
        pthread_mutex_lock(&t_record_mutex); /* any thread may log */
        snprintf(t_log, sizeof t_log, "%s", message);
        pthread_mutex_unlock(&t_record_mutex);
        __atomic_add_fetch(&t_log_lines, 1, __ATOMIC_RELEASE);
    }
}

/* level is the least one that counts. */
static inline void t_watch_log_of(int level)
{
    t_log_level = level;
    t_log_lines = 0;
    t_log[0] = 0;
    tsrv_set_log(t_see_log, NULL);
}

/* Without what is merely INFO. */
static inline void t_watch_log(void)
{
    t_watch_log_of(TSRV_LOG_WARNING);
}

static inline void t_see_info(int level, const char *message, void *context)
{
    CHECK_INT(level, TSRV_LOG_INFO);
    t_see_log(level, message, context);
}

/* No line may be worse than INFO. */
static inline void t_watch_info(void)
{
    t_watch_log_of(TSRV_LOG_INFO);
    tsrv_set_log(t_see_info, NULL);
}

/* t_log_lines, for other threads than the loop's. */
static inline int t_logged(void)
{
    return __atomic_load_n(&t_log_lines, __ATOMIC_ACQUIRE);
}

/* A tsrv_callback; its context is the loop. */
static inline void t_stop_loop(void *context)
{
    tsrv_loop_stop((tsrv_loop *)context);
}

/* ---- turns: for tests whose clients live in the loop's own thread --------------------------*/

static inline tsrv_loop *t_new_loop(void)
{
    tsrv_loop_options options = {0};
    options.backend = t_backend;
    options.slow_ms = TSRV_NEVER; /* a busy machine's turns are no business of who counts log lines */
    tsrv_loop *loop = NULL;
    t_use_real_time();
    CHECK_INT(tsrv_loop_new(&loop, &options), TSRV_OK);
    CHECK(loop != NULL);
    return loop;
}

/* Turns until *counter has reached value. */
static inline void t_turn_until(tsrv_loop *loop, const int *counter, int value)
{
    int64_t end = t_patience();
    while (*counter < value) {
        CHECK(tsrv_loop_run_once(loop, 10) >= 0);
        CHECK(t_now_ms() < end);
    }
}

/* Turns until the client fd has received text. */
static inline void t_turn_until_text(tsrv_loop *loop, int fd, const char *text)
{
    int64_t end = t_patience();
    size_t size = strlen(text), received = 0;
    char buffer[256];
    CHECK(size <= sizeof buffer);
    while (received < size) {
        ssize_t n = recv(fd, buffer + received, size - received, MSG_DONTWAIT);
        CHECK(n > 0 || (n < 0 && errno == EAGAIN));
        received += n > 0 ? (size_t)n : 0;
        CHECK(n > 0 || tsrv_loop_run_once(loop, 10) >= 0);
        CHECK(t_now_ms() < end);
    }
    CHECK_MEM(buffer, received, text, size);
}

#ifdef T_MEMORY
#include "transport.h"
#endif

/* The port of the index-th listener. */
static inline int t_port(tsrv_server *server, int index)
{
    tsrv_address address;
    CHECK_INT(tsrv_server_address(server, index, &address), TSRV_OK);
    return tsrv_address_port(&address);
}

/* Returns the port. */
static inline int t_listen(tsrv_server *server)
{
    CHECK_INT(tsrv_server_listen(server, 0, "127.0.0.1", NULL), TSRV_OK);
    return t_port(server, 0);
}

/* The client's end of a pair of unix sockets, whose other end the server gets. */
static inline int t_add_pair(tsrv_server *server)
{
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    t_prepare(pair[0]);
    CHECK_INT(tsrv_server_add_stream(server, pair[1]), TSRV_OK);
    return pair[0];
}

/* ---- the fixture --------------------------------------------------------------------------*/

typedef struct t_case {
    tsrv_handler handler;
    void (*on_close)(tsrv_stream *stream, int reason, void *context);
    void (*client)(int port, void *context); /* runs in a thread of its own */
    void *context;                           /* handed to all three */
    tsrv_server_options options;             /* the rest; t_run fills in what is above */
} t_case;

typedef struct t_client {
    t_case *c;
    int port;
    bool done; /* the loop's thread only */
} t_client;

static inline void t_client_done(void *context)
{
    ((t_client *)context)->done = true;
}

static inline void *t_client_thread(void *context)
{
    t_client *client = (t_client *)context;
    client->c->client(client->port, client->c->context);
    CHECK_INT(tsrv_loop_post(t_loop, t_client_done, client), TSRV_OK);
    return NULL;
}

/* Serves on 127.0.0.1 until the client has returned and no stream is open. A client that does not
 * wait for the server's end of a connection has to wait for a record, to be sure of its accept. */
static inline void t_run(t_case *c)
{
    tsrv_loop_options loop_options = {0};
    loop_options.backend = t_backend;
    tsrv_server_options options = c->options;
    t_client client = {c, 0, false};
    tsrv_stats stats;
    pthread_t thread;

    t_use_real_time();
    CHECK_INT(tsrv_loop_new(&t_loop, &loop_options), TSRV_OK);
    options.mode = t_mode;
    options.handle_stream = c->handler;
    options.on_close = c->on_close;
    options.context = c->context;
    options.loop = t_loop;
    if (t_hard && options.read_chunk_size == 0) {
        options.read_chunk_size = 1;
    }
    CHECK_INT(tsrv_server_new(&t_server, &options), TSRV_OK);
    client.port = t_listen(t_server);
    CHECK_INT(pthread_create(&thread, NULL, t_client_thread, &client), 0);
    do {
        int rc = tsrv_loop_run_once(t_loop, TSRV_NEVER);
        if (rc <= 0) {
            T_FAIL("the loop ended early: %s", rc == 0 ? "nothing left" : tsrv_strerror(rc));
        }
        tsrv_server_stats(t_server, &stats);
    } while (!client.done || stats.open > 0);
    CHECK_INT(pthread_join(thread, NULL), 0);
    tsrv_server_free(t_server);
    t_server = NULL;
    CHECK_INT(tsrv_loop_free(t_loop), TSRV_OK);
    t_loop = NULL;
}

/* ---- running tests ------------------------------------------------------------------------*/

static const char *const t_backend_names[] = {"best", "epoll", "kqueue", "poll"};

pid_t t_child; /* 0 = none */
int t_number, t_passed, t_failed, t_skipped;

static inline int t_open_fds(void)
{
    int count = 0;
    for (int fd = 0; fd < T_MAX_FD; fd++) {
        count += fcntl(fd, F_GETFD) != -1;
    }
    return count;
}

/* The child's life. It leaves by exit, so that sanitizers and coverage have their say. */
static inline void t_run_child(const t_test *test, int output)
{
    setpgid(0, 0);
    for (int i = 0; i < 4; i++) { /* nohup, and shells in the background, have some of them ignored */
        static const int defaults[] = {SIGHUP, SIGINT, SIGQUIT, SIGTERM};
        signal(defaults[i], SIG_DFL);
    }
    if (dup2(output, 1) < 0 || dup2(output, 2) < 0) {
        _exit(1);
    }
    close(output);
#ifdef T_TLS
    t_relay_set_up();
#endif
    int fds = t_open_fds();
    long long allocations = (long long)t_live_allocations;
    t_clip = t_hard;
    t_verify = t_verify_streams;
    test->function();
    t_verify = NULL;
    t_clip = 0;
#ifdef T_TLS
    t_relay_await();
#endif
    CHECK_INT(t_open_fds(), fds);
    CHECK_INT(t_live_allocations, allocations);
    exit(0);
}

/* Ctrl-C does not reach the child, which leads a process group of its own. */
static inline void t_interrupted(int signo)
{
    if (t_child > 0) {
        kill(-t_child, SIGKILL);
    }
    signal(signo, SIG_DFL);
    raise(signo);
}

/* Collects what the child prints until it has ended. Returns false when it had to be killed. A
 * grandchild may hold the pipe open for longer, so that its end is not waited for. */
static inline bool t_watch_child(int input, char *output, size_t capacity, int *status)
{
    char buffer[4096];
    size_t used = 0;
    int64_t end = t_now_ms() + T_SECONDS * 1000 * t_scale();
    bool in_time = true, open = true, ended = false;
    while (in_time && !ended) {
        struct pollfd ready = {input, POLLIN, 0};
        ssize_t n = poll(&ready, open ? 1 : 0, open ? 50 : 1) > 0
                        ? read(input, buffer, sizeof buffer) : -1;
        for (ssize_t i = 0; i < n && used + 1 < capacity; i++) {
            output[used++] = buffer[i];
        }
        open = open && n != 0;
        ended = n <= 0 && waitpid(t_child, status, WNOHANG) == t_child;
        in_time = t_now_ms() < end;
    }
    output[used] = 0;
    kill(-t_child, SIGKILL);
    if (!ended) {
        waitpid(t_child, status, 0);
    }
    return ended;
}

/* What SKIP has said, behind the log of what ran before. */
static inline const char *t_last_line(const char *text)
{
    const char *last = text;
    for (; *text != 0; text++) {
        last = *text == '\n' && text[1] != 0 ? text + 1 : last;
    }
    return last;
}

/* With show, what a test that has passed has to say, its figures, is printed too. */
static inline void t_run_variant(const t_test *test, const char *label, bool show)
{
    static char output[65536];
    int pipe_fds[2], status = 0;
    fflush(NULL);
    if (pipe(pipe_fds) != 0 || (t_child = fork()) < 0) {
        perror("test");
        exit(1);
    }
    if (t_child == 0) {
        close(pipe_fds[0]);
        t_run_child(test, pipe_fds[1]);
    }
    setpgid(t_child, t_child);
    close(pipe_fds[1]);
    bool ended = t_watch_child(pipe_fds[0], output, sizeof output, &status);
    close(pipe_fds[0]);
    t_child = 0;

    const char *ci = getenv("CI");
    bool skip = ended && WIFEXITED(status) && WEXITSTATUS(status) == T_SKIPPED;
    if (ended && WIFEXITED(status) && WEXITSTATUS(status) == 0) {
        t_passed++;
        if (show && output[0] != 0) {
            printf("%s: %s", label, output);
        }
    } else if (skip && (ci == NULL || strcmp(ci, "true") != 0)) {
        t_skipped++;
        printf("SKIP %s: %s", label, t_last_line(output));
    } else {
        t_failed++;
        printf("FAIL %s: ", label);
        if (!ended) {
            printf("not over after %d s", T_SECONDS * t_scale());
        } else if (WIFSIGNALED(status)) {
            printf("signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
        } else {
            printf(skip ? "skipped under CI" : "exit status %d", WEXITSTATUS(status));
        }
        printf("\n%s", output);
    }
}

typedef struct t_choice {
    const char *filter;  /* a part of the label; NULL = all */
    bool exact;          /* the whole label */
    const char *backend; /* NULL = all */
    int part, parts;     /* every so manieth of them, so that several processes share them */
    bool brief;          /* one backend, none in hard mode, none that is LONG */
    bool list;
} t_choice;

/* Several files of tests may be one program, which has a name for each: under a file's name it runs the tests of
 * that file, and under any other name all of them. */
static inline bool t_is_named(const t_test *test, const char *program)
{
    const char *slash = strrchr(program, '/'), *name = slash != NULL ? slash + 1 : program;
    const char *file = strrchr(test->file, '/') != NULL ? strrchr(test->file, '/') + 1 : test->file;
    size_t size = strlen(name);
    return strncmp(file, name, size) == 0 && strcmp(file + size, ".c") == 0;
}

static inline bool t_any_is_named(const char *program)
{
    const t_test *test = t_first;
    while (test != NULL && !t_is_named(test, program)) {
        test = test->next;
    }
    return test != NULL;
}

/* All variants of one test: t_backend, t_mode and t_hard in turn. */
static inline void t_run_test(const t_test *test, const t_choice *choice, const int *backends,
                              int count)
{
    char label[256];
    for (int i = 0; i < ((test->kind & T_PER_BACKEND) ? count : 1); i++) {
        for (int variant = 0; variant < 4; variant++) {
            bool callback = variant & 1, hard = variant & 2;
            int modes = test->kind & (T_COROUTINES | T_CALLBACKS);
            if (modes ? !(modes & (callback ? T_CALLBACKS : T_COROUTINES)) : callback) {
                continue;
            }
            if (hard && (choice->brief || !(test->kind & T_PER_HARDNESS))) {
                continue;
            }
            t_backend = (test->kind & T_PER_BACKEND) ? backends[i] : TSRV_BACKEND_BEST;
            t_mode = callback ? TSRV_CALLBACK : TSRV_COROUTINE;
            t_hard = hard;
            snprintf(label, sizeof label, "%s/%s%s%s", test->name, t_backend_names[t_backend],
                     modes == 0 ? "" : callback ? "/callback" : "/coroutine", hard ? "/hard" : "");
            if (choice->filter != NULL && (choice->exact ? strcmp(label, choice->filter) != 0
                                                         : strstr(label, choice->filter) == NULL)) {
                continue;
            }
            if ((test->kind & T_PER_BACKEND) && choice->backend != NULL &&
                strcmp(choice->backend, t_backend_names[t_backend]) != 0) {
                continue;
            }
            if (t_number++ % choice->parts != choice->part) {
                continue;
            }
            if (choice->list) {
                puts(label);
            } else {
                t_run_variant(test, label, choice->filter != NULL && !choice->exact);
            }
        }
    }
}

int main(int argc, char **argv)
{
    static const int backends[] = {
#if TSRVI_HAS_EPOLL
        TSRV_BACKEND_EPOLL,
#endif
#if TSRVI_HAS_KQUEUE
        TSRV_BACKEND_KQUEUE,
#endif
        TSRV_BACKEND_POLL};
    t_choice choice = {NULL, false, NULL, 0, 1, false, false};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--list") == 0) {
            choice.list = true;
        } else if (strcmp(argv[i], "--exact") == 0) {
            choice.exact = true;
        } else if (strcmp(argv[i], "--short") == 0) {
            choice.brief = true;
        } else if (strcmp(argv[i], "--backend") == 0 && i + 1 < argc) {
            choice.backend = argv[++i];
        } else if (strcmp(argv[i], "--part") == 0 && i + 1 < argc &&
                   sscanf(argv[i + 1], "%d/%d", &choice.part, &choice.parts) == 2 && choice.parts > 0) {
            i++;
        } else {
            choice.filter = argv[i];
        }
    }
    signal(SIGINT, t_interrupted);
    signal(SIGTERM, t_interrupted);
    int count = choice.brief && choice.backend == NULL ? 1 : (int)(sizeof backends / sizeof backends[0]);
    bool all = !t_any_is_named(argv[0]);
    for (const t_test *test = t_first; test != NULL; test = test->next) {
        if ((all || t_is_named(test, argv[0])) && !(choice.brief && (test->kind & T_LONG))) {
            t_run_test(test, &choice, backends, count);
        }
    }
    if (!choice.list) {
        printf("%d passed, %d failed, %d skipped\n", t_passed, t_failed, t_skipped);
    }
    return t_failed > 0;
}

#endif /* TEST_H */
