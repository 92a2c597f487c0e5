/* What every program of this folder does after it has been built: enough for a stack switch, an
 * aliasing or an inlining that a compiler option broke to be noticed. Included after the
 * implementation; C99 that is also C++11. */
#ifndef SMOKE_H
#define SMOKE_H

#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define SMOKE_CHECK(condition)                                                                     \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);              \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

#ifdef __cplusplus
#define SMOKE_CAST(type, value) static_cast<type>(value)
#else
#define SMOKE_CAST(type, value) ((type)(value))
#endif

static char smoke_log[32];
static size_t smoke_log_size;

/* Keeps integers and floating point in registers across a switch. */
static void smoke_coroutine(void *context)
{
    const char *name = SMOKE_CAST(const char *, context);
    double sum = 0.5;
    int round, code = 0;
    for (round = 1; round <= 3 && code == TSRV_OK; round++) {
        smoke_log[smoke_log_size++] = *name;
        code = tsrv_sleep(0);
        sum += round * 0.25;
    }
    if (sum != 2.0 || code != TSRV_OK) smoke_log[smoke_log_size++] = '!';
}

static void smoke_timer(void *context) { *SMOKE_CAST(int *, context) += 1; }

/* Two coroutines take turns, and a timer fires. */
static int smoke_loop(bool coroutines)
{
    static char first[] = "a", second[] = "b";
    tsrv_loop *loop = NULL;
    tsrv_timer timer;
    int fired = 0, expected = coroutines ? TSRV_OK : TSRV_ENOTSUP;
    memset(&timer, 0, sizeof(timer));
    smoke_log_size = 0;
    SMOKE_CHECK(tsrv_loop_new(&loop, NULL) == TSRV_OK);
    SMOKE_CHECK(tsrv_timer_start(loop, &timer, 1, smoke_timer, &fired) == TSRV_OK);
    SMOKE_CHECK(tsrv_spawn(loop, smoke_coroutine, first) == expected);
    SMOKE_CHECK(tsrv_spawn(loop, smoke_coroutine, second) == expected);
    SMOKE_CHECK(tsrv_loop_run(loop) == TSRV_OK);
    SMOKE_CHECK(tsrv_loop_free(loop) == TSRV_OK);
    SMOKE_CHECK(fired == 1);
    SMOKE_CHECK(smoke_log_size == (coroutines ? 6u : 0u));
    SMOKE_CHECK(memcmp(smoke_log, "ababab", smoke_log_size) == 0);
    return 0;
}

static int smoke_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int code;
    (void)address;
    (void)context;
    while ((code = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        if ((code = tsrv_write(stream, line.data, line.size)) != TSRV_OK) break;
    }
    return code;
}

/* One connection whose input is there already: both lines come back, then the end. */
static int smoke_echo(int mode)
{
    static const char text[] = "one\ntwo\n";
    tsrv_server_options options;
    tsrv_server *server = NULL;
    tsrv_loop *loop = NULL;
    char reply[16];
    size_t size = 0;
    ssize_t got;
    int pair[2];
    memset(&options, 0, sizeof(options));
    options.mode = mode;
    options.handle_stream = smoke_handler;
    SMOKE_CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    SMOKE_CHECK(write(pair[1], text, sizeof(text) - 1) ==
                SMOKE_CAST(ssize_t, sizeof(text) - 1));
    SMOKE_CHECK(shutdown(pair[1], SHUT_WR) == 0);
    SMOKE_CHECK(tsrv_loop_new(&loop, NULL) == TSRV_OK);
    options.loop = loop;
    SMOKE_CHECK(tsrv_server_new(&server, &options) == TSRV_OK);
    SMOKE_CHECK(tsrv_server_add_stream(server, pair[0]) == TSRV_OK);
    SMOKE_CHECK(tsrv_loop_run(loop) == TSRV_OK);
    tsrv_server_free(server);
    SMOKE_CHECK(tsrv_loop_free(loop) == TSRV_OK);
    while (size < sizeof(reply) && (got = read(pair[1], reply + size, sizeof(reply) - size)) > 0) {
        size += SMOKE_CAST(size_t, got);
    }
    close(pair[1]);
    SMOKE_CHECK(size == sizeof(text) - 1);
    SMOKE_CHECK(memcmp(reply, text, size) == 0);
    return 0;
}

static int smoke(bool coroutines)
{
    alarm(60); /* a hang ends as a failure */
    SMOKE_CHECK(strcmp(tsrv_version(), TSRV_VERSION) == 0);
    SMOKE_CHECK(strlen(tsrv_strerror(TSRV_EOF)) > 0);
    if (smoke_loop(coroutines) != 0) return 1;
    if (coroutines && smoke_echo(TSRV_COROUTINE) != 0) return 1;
    return smoke_echo(TSRV_CALLBACK);
}

#endif
