/* Other systems, played on this one: sockets without SOCK_NONBLOCK, accept4 and MSG_NOSIGNAL, but with
 * SO_NOSIGPIPE and XNU's rules for it; its EPROTOTYPE; names of sockets as BSD and macOS give them. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "seam.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#undef SOCK_NONBLOCK
#undef SO_NOSIGPIPE
#define SO_NOSIGPIPE SO_OOBINLINE /* the clients of test.h really set it, and this does no harm */

enum { P_FDS = 4096 };
static struct {
    bool quiet;     /* SO_NOSIGPIPE is set */
    bool connected; /* it is, or was */
} p_sockets[P_FDS];
static int p_sends;  /* of the library */
static int p_unsafe; /* those that could have raised SIGPIPE, and connects after which they may */

static int p_socket(int family, int type, int protocol)
{
    int fd = socket(family, type, protocol);
    if (fd >= 0) {
        p_sockets[fd].quiet = p_sockets[fd].connected = false;
    }
    return fd;
}

/* From now on a reset may come, after which the option cannot be set. */
static int p_connect(int fd, const struct sockaddr *address, socklen_t size)
{
    p_unsafe += !p_sockets[fd].quiet;
    p_sockets[fd].connected = true;
    return connect(fd, address, size);
}

/* sonewconn hands the option on. */
static int p_accept(int listener, struct sockaddr *address, socklen_t *size)
{
    int fd = accept(listener, address, size);
    if (fd >= 0) {
        p_sockets[fd].quiet = p_sockets[listener].quiet;
        p_sockets[fd].connected = true;
    }
    return fd;
}

/* sosetoptlock refuses options when both directions are over. */
static int p_setsockopt(int fd, int level, int name, const void *value, socklen_t size)
{
    struct pollfd entry = {fd, 0, 0};
    if (level != SOL_SOCKET || name != SO_NOSIGPIPE) {
        return setsockopt(fd, level, name, value, size);
    }
    if (p_sockets[fd].connected && poll(&entry, 1, 0) == 1 && (entry.revents & POLLHUP) != 0) {
        errno = EINVAL;
        return -1;
    }
    p_sockets[fd].quiet = true;
    return 0;
}

static int p_getsockopt(int fd, int level, int name, void *value, socklen_t *size)
{
    if (level != SOL_SOCKET || name != SO_NOSIGPIPE) {
        return getsockopt(fd, level, name, value, size);
    }
    *(int *)value = p_sockets[fd].quiet;
    return 0;
}

static int p_sending(int fd)
{
    p_sends++;
    p_unsafe += !p_sockets[fd].quiet;
    return fd;
}

/* A unix socket's name comes with the whole room of its path. */
static bool p_pads;

static int p_getsockname(int fd, struct sockaddr *address, socklen_t *size)
{
    int rc = getsockname(fd, address, size);
    if (rc == 0 && p_pads && address->sa_family == AF_UNIX) {
        *size = sizeof(struct sockaddr_un);
    } else if (rc == 0 && p_pads && address->sa_family == AF_INET) {
        ((char *)address)[15] = 1; /* the end of sin_zero */
    }
    return rc;
}

#undef t_sys_accept
#undef t_sys_connect
#undef t_sys_getsockname
#undef t_sys_getsockopt
#undef t_sys_send
#undef t_sys_sendmsg
#undef t_sys_setsockopt
#undef t_sys_socket
#define t_sys_accept(...) p_accept(__VA_ARGS__)
#define t_sys_connect(...) p_connect(__VA_ARGS__)
#define t_sys_getsockname(...) p_getsockname(__VA_ARGS__)
#define t_sys_getsockopt(...) p_getsockopt(__VA_ARGS__)
#define t_sys_send(fd, ...) (t_fault("send") ? -1 : send(p_sending(fd), __VA_ARGS__))
#define t_sys_sendmsg(fd, ...) (t_fault("sendmsg") ? -1 : sendmsg(p_sending(fd), __VA_ARGS__))
#define t_sys_setsockopt(...) p_setsockopt(__VA_ARGS__)
#define t_sys_socket(...) p_socket(__VA_ARGS__)

#include "script.h"

#include "handlers.h"

/* ---- SO_NOSIGPIPE -------------------------------------------------------------------------*/

static void open_echo(void)
{
    p_sends = p_unsafe = 0;
    s_serve(echo_bytes);
}

TEST_SOFT(an_accepted_socket_that_was_reset_already_sends_without_sigpipe)
{
    open_echo();
    int fd = t_connect(s_port);
    t_sends(fd, "abc");
    t_reset(fd);
    s_until(&s_closed, 1);
    CHECK(p_sends > 0);
    CHECK_INT(p_unsafe, 0);
    s_close();
}

TEST_SOFT(a_socket_taken_over_sends_without_sigpipe)
{
    int pair[2];
    open_echo();
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    p_sockets[pair[0]].quiet = false;
    p_sockets[pair[0]].connected = true;
    CHECK_INT(tsrv_server_add_stream(s_server, pair[0]), TSRV_OK);
    s_echo(pair[1], "abc");
    CHECK_INT(p_unsafe, 0);
    t_close(pair[1]);
    s_until(&s_closed, 1);
    s_close();
}

/* The option cannot be set any more, and nothing that is sent could arrive. */
TEST_SOFT(a_socket_taken_over_when_it_is_over_sends_nothing)
{
    int pair[2];
    open_echo();
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    p_sockets[pair[0]].quiet = false;
    p_sockets[pair[0]].connected = true;
    t_sends(pair[1], "abc");
    t_close(pair[1]);
    CHECK_INT(tsrv_server_add_stream(s_server, pair[0]), TSRV_OK);
    s_until(&s_closed, 1);
    CHECK_INT(p_sends, 0);
    CHECK_INT(s_reason, -EPIPE);
    s_close();
}

#if TSRVI_HAS_COROUTINES
static int connected;

static void connect_and_send(void *context)
{
    tsrv_stream *stream;
    tsrv_slice part;
    (void)context;
    CHECK_INT(tsrv_connect("127.0.0.1", s_port, NULL, &stream), TSRV_OK);
    CHECK_INT(tsrv_write(stream, "abc", 3), TSRV_OK);
    CHECK_INT(tsrv_read_bytes(stream, 3, &part), TSRV_OK);
    tsrv_close(stream);
    connected = 1;
}

TEST_LOOP(a_socket_that_connects_sends_without_sigpipe)
{
    open_echo();
    connected = 0;
    CHECK_INT(tsrv_spawn(s_loop, connect_and_send, NULL), TSRV_OK);
    s_until(&connected, 1);
    s_until(&s_closed, 1);
    CHECK(p_sends >= 2);
    CHECK_INT(p_unsafe, 0);
    s_close();
}
#endif

/* ---- EPROTOTYPE ---------------------------------------------------------------------------*/

TEST_SOFT(a_send_that_a_reset_overtakes_is_a_reset)
{
    open_echo();
    int fd = t_connect(s_port);
    t_fail_call("send", EPROTOTYPE, 1, true);
    t_sends(fd, "abc");
    s_settle();
    CHECK(t_fault_hits > 0);
    t_fault_at = 0;
    t_close(fd);
    s_until(&s_closed, 1);
    CHECK_INT(s_reason, -ECONNRESET);
    CHECK_INT(t_log_lines, 0); /* as of every peer that has gone */
    s_close();
}

/* ---- names of sockets ---------------------------------------------------------------------*/

/* As the program before this one has left it. */
static void hand_over(int fd)
{
    p_pads = true;
    tsrvi_process.handed.looked = true;
    tsrvi_process.handed.count = fd - TSRVI_LISTEN_FIRST + 1;
    tsrvi_process.handed.free[fd - TSRVI_LISTEN_FIRST] = true;
}

TEST_ONCE(a_unix_socket_is_known_by_its_path)
{
    char path[64];
    int fd, again;
    snprintf(path, sizeof path, "/tmp/platform_test.%ld", (long)getpid());
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), TSRV_OK);
    hand_over(fd);
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &again), TSRV_OK);
    CHECK_INT(again, fd);
    CHECK(unlink(path) == 0);
    t_close(fd);
}

TEST_ONCE(a_port_is_known_by_what_counts)
{
    tsrv_address address;
    int fd, again;
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, &fd, 1), 1);
    CHECK_INT(tsrvi_address_get(fd, tsrvi_getsockname, &address), TSRV_OK);
    hand_over(fd);
    CHECK_INT(tsrv_bind_sockets(tsrv_address_port(&address), "127.0.0.1", NULL, &again, 1), 1);
    CHECK_INT(again, fd);
    t_close(fd);
}

static tsrv_address unix_name(const char *path, size_t size, size_t beyond)
{
    tsrv_address address;
    tsrvi_sockaddr inside;
    memset(&inside, 0, sizeof inside);
    inside.local.sun_family = AF_UNIX;
    memcpy(inside.local.sun_path, path, size);
    tsrvi_address_store(&address, &inside, offsetof(struct sockaddr_un, sun_path) + size + beyond);
    return address;
}

TEST_ONCE(addresses_are_compared_by_what_tells_them_apart)
{
    char longest[sizeof(((struct sockaddr_un *)0)->sun_path)];
    tsrv_address one = unix_name("/run/a", 6, 0), other;
    memset(longest, 'x', sizeof longest);
    longest[0] = '/';
    other = unix_name("/run/a", 6, 1);
    CHECK(tsrvi_address_same(&one, &other));
    other = unix_name("/run/a", 6, 90);
    CHECK(tsrvi_address_same(&one, &other));
    other = unix_name("/run/ab", 7, 0);
    CHECK(!tsrvi_address_same(&one, &other));
    other = unix_name("/run/", 5, 0);
    CHECK(!tsrvi_address_same(&one, &other));
    one = unix_name(longest, sizeof longest, 0);
    other = one;
    CHECK(tsrvi_address_same(&one, &other));
    other = unix_name(longest, sizeof longest - 1, 0);
    CHECK(!tsrvi_address_same(&one, &other));
    one = unix_name("\0name", 5, 0); /* Linux: abstract, where every byte counts */
    other = unix_name("\0name", 5, 0);
    CHECK(tsrvi_address_same(&one, &other));
    other = unix_name("\0name", 5, 1);
    CHECK(!tsrvi_address_same(&one, &other));
    other = unix_name("", 0, 0);
    CHECK(!tsrvi_address_same(&one, &other));
}
