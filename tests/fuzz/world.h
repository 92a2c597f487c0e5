/* A small world for fuzzers of one server: a clock that stands still unless told, a loop that is turned until nothing
 * happens any more, and socket pairs. Included in place of the header. */
#ifndef WORLD_H
#define WORLD_H

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif

#include "fuzz.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MS ((uint64_t)1000000)
#define MOST_TURNS 400000 /* until nothing happens any more; a byte may take four of them */

static uint64_t now;       /* the loop's clock, in nanoseconds */
static bool passing;       /* time passes when nothing happens */
static bool idle;          /* the last wait has found nothing, and would have slept */
static int64_t limit_ms;   /* no wait lasts beyond this */

static int64_t now_ms(void)
{
    return (int64_t)(now / MS);
}

static int world_clock(clockid_t id, struct timespec *result)
{
    (void)id;
    result->tv_sec = (time_t)(now / 1000000000);
    result->tv_nsec = (long)(now % 1000000000);
    return 0;
}

static int world_waited(int count, int timeout_ms)
{
    idle = count == 0 && timeout_ms != 0;
    if (idle && passing) {
        int64_t most_ms = limit_ms - now_ms();
        now += (uint64_t)(timeout_ms < 0 || timeout_ms > most_ms ? most_ms : timeout_ms) * MS;
    }
    return count;
}

static int world_epoll_wait(int set, struct epoll_event *events, int size, int timeout_ms)
{
    return world_waited(epoll_wait(set, events, size, 0), timeout_ms);
}

static int world_poll(struct pollfd *entries, nfds_t size, int timeout_ms)
{
    return world_waited(poll(entries, size, 0), timeout_ms);
}

static int world_close(int fd)
{
    if (close(fd) < 0) {
        fail("close of a descriptor that is not open: %d", fd);
    }
    return 0;
}

#undef t_sys_clock_gettime
#undef t_sys_close
#undef t_sys_epoll_wait
#undef t_sys_poll
#define t_sys_clock_gettime(...) world_clock(__VA_ARGS__)
#define t_sys_close(...) world_close(__VA_ARGS__)
#define t_sys_epoll_wait(...) world_epoll_wait(__VA_ARGS__)
#define t_sys_poll(...) world_poll(__VA_ARGS__)

#define TCPSERVER_IMPLEMENTATION
#include FUZZ_HEADER
#include "../verify.h"

static tsrv_loop *loop;
static tsrv_server *server;

static void world_log(int level, const char *message, void *context)
{
    (void)level;
    (void)context;
    TRACE("log: %s\n", message);
}

/* Once, before the first script. */
static void world_begin(void)
{
    static bool begun;
    if (!begun) {
        tracing = getenv("FUZZ_TRACE") != NULL;
        tsrv_set_log(world_log, NULL);
        t_verify = t_verify_streams;
        begun = true;
    }
}

static void world_open(int backend)
{
    tsrv_loop_options options = {0};
    options.backend = backend;
    now = 1000000 * MS;
    passing = false;
    if (tsrv_loop_new(&loop, &options) != TSRV_OK) {
        fail("no loop");
    }
}

static void world_close_all(void)
{
    tsrv_server_free(server);
    server = NULL;
    if (tsrv_loop_free(loop) != TSRV_OK) {
        fail("tsrv_loop_free fails");
    }
    loop = NULL;
    if (t_live_allocations != 0) {
        fail("%ld allocations are left", t_live_allocations);
    }
}

/* Turn the loop until nothing happens any more. */
static void settle(void)
{
    for (int turns = 0;; turns++) {
        int rc = tsrv_loop_run_once(loop, 1000000);
        if (rc < 0) {
            fail("a turn fails: %d", rc);
        }
        if (rc == 0 || idle) {
            return;
        }
        if (turns > MOST_TURNS) {
            fail("the loop does not come to rest");
        }
    }
}

/* The same while so much time passes. */
static void settle_for(int ms)
{
    limit_ms = now_ms() + ms;
    settle();
    passing = true;
    while (now_ms() < limit_ms) {
        int rc = tsrv_loop_run_once(loop, 1000000);
        if (rc < 0) {
            fail("a turn fails: %d", rc);
        }
        if (rc == 0) {
            now += (uint64_t)(limit_ms - now_ms()) * MS;
        }
    }
    passing = false;
    settle();
}

/* A connection over a socket pair. Returns the client's end. */
static int connect_client(void)
{
    int ends[2], rc;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0) {
        fail("no socket pair: %s", strerror(errno));
    }
    rc = tsrv_server_add_stream(server, ends[0]);
    if (rc != TSRV_OK) {
        fail("add_stream returns %d", rc);
    }
    return ends[1];
}

/* Send what the kernel takes. Returns how much; 0 also when the other end is closed. */
static size_t client_send(int fd, const void *data, size_t size)
{
    ssize_t sent = send(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    return sent < 0 ? 0 : (size_t)sent;
}

/* Has the other end been closed? What it has sent is thrown away. */
static bool client_sees_end(int fd)
{
    char buffer[4096];
    ssize_t got;
    while ((got = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT)) > 0) {
    }
    return got == 0 || errno != EAGAIN;
}

#endif
