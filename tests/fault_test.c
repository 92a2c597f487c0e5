/* Every call that the library makes through its seams is made to fail in turn, once and for good, in
 * short scenarios; after each run the same invariants are checked: nothing leaks, hangs or spins,
 * codes are documented ones, what a client got is a prefix of what was sent, and the next connection
 * is served. The clock is virtual: a wait that would last is skipped, so that no run takes time.
 * FAULT="name:call:errno:once" (or sticky, or leaving) in the environment repeats one run. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "seam.h"

#include <poll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/epoll.h>
#endif

/* ---- virtual time: real waits of at most 1 ms, the rest is added to the clock ---------------*/

static uint64_t v_skew_ms; /* how far the loop's clock is ahead of the real one */
static long v_waits;       /* calls that waited or could have */
static bool v_quiet;       /* the last wait had no limit, and nothing came */
static bool v_nothing;     /* nothing came in the last wait */

static int v_real(int timeout_ms)
{
    v_waits++;
    v_quiet = false;
    return timeout_ms == 0 ? 0 : 1;
}

static int v_waited(int count, int timeout_ms)
{
    if (count == 0 && timeout_ms > 1) {
        v_skew_ms += (uint64_t)timeout_ms;
    }
    v_quiet = count == 0 && timeout_ms < 0;
    v_nothing = count == 0;
    return count;
}

static int v_clock(clockid_t id, struct timespec *now)
{
    int rc = clock_gettime(id, now);
    now->tv_sec += (time_t)(v_skew_ms / 1000);
    now->tv_nsec += (long)(v_skew_ms % 1000) * 1000000;
    now->tv_sec += now->tv_nsec / 1000000000;
    now->tv_nsec %= 1000000000;
    return rc;
}

static int v_poll(struct pollfd *entries, nfds_t count, int timeout_ms)
{
    return v_waited(poll(entries, count, v_real(timeout_ms)), timeout_ms);
}

#undef t_sys_clock_gettime
#undef t_sys_poll
#define t_sys_clock_gettime(...) v_clock(__VA_ARGS__)
#define t_sys_poll(...) (t_fault("poll") ? v_waits++, -1 : v_poll(__VA_ARGS__))

#ifdef __linux__
static int v_epoll_wait(int fd, struct epoll_event *events, int size, int timeout_ms)
{
    return v_waited(epoll_wait(fd, events, size, v_real(timeout_ms)), timeout_ms);
}

#undef t_sys_epoll_wait
#define t_sys_epoll_wait(...) (t_fault("epoll_wait") ? v_waits++, -1 : v_epoll_wait(__VA_ARGS__))

/* What an old kernel does not know in a call fails by a name of its own. */
#undef t_sys_epoll_ctl
#define t_sys_epoll_ctl(fd, operation, watched, event)                                             \
    (t_fault(((event)->events & EPOLLEXCLUSIVE) != 0 ? "epoll_ctl_exclusive" : "epoll_ctl")        \
         ? -1                                                                                      \
         : epoll_ctl(fd, operation, watched, event))

#undef t_sys_socket
#define t_sys_socket(family, type, protocol)                                                       \
    (t_fault(((type) & SOCK_NONBLOCK) != 0 ? "socket_flags" : "socket")                            \
         ? -1                                                                                      \
         : socket(family, type, protocol))
#endif

/* Reads of files are cut short, like sends. */
#undef t_sys_pread
#define t_sys_pread(fd, data, size, offset)                                                        \
    (t_fault("pread") ? -1 : pread(fd, data, t_clipped(size), offset))

#if defined(__has_include) && !defined(TSRV_NO_KQUEUE)
#if __has_include(<sys/event.h>)
#include <sys/event.h>

static int v_kevent(int fd, const struct kevent *changes, int count, struct kevent *events,
                    int size, const struct timespec *limit)
{
    struct timespec real = {0, 0};
    int timeout_ms = limit == NULL ? -1 : (int)(limit->tv_sec * 1000 + limit->tv_nsec / 1000000);
    if (size == 0) {
        return kevent(fd, changes, count, events, size, limit);
    }
    real.tv_nsec = v_real(timeout_ms) * 1000000L;
    return v_waited(kevent(fd, changes, count, events, size, &real), timeout_ms);
}

#undef t_sys_kevent
/* Adding a filter can fail; deleting one that exists cannot, says kevent(2). */
#define t_sys_kevent(kq, changes, count, ...)                                                      \
    (v_kevent_fails(changes, count) ? v_waits++, -1 : v_kevent(kq, changes, count, __VA_ARGS__))

static bool v_kevent_fails(const struct kevent *changes, int count)
{
    if (count > 0 && (changes[0].flags & EV_DELETE) != 0) {
        return false;
    }
    return t_fault(count > 0 ? "kevent_set" : "kevent");
}
#endif
#endif

#include "test.h"

#include <sys/un.h>

/* ---- what fails ---------------------------------------------------------------------------*/

/* LEAVING: sticky, and it stays so while all is freed. DENIED: nothing of it may be felt. */
enum { ONCE, STICKY, LEAVING, DENIED };

static const struct {
    const char *name;
    int codes[12]; /* ended by 0; sticky runs use those that a kernel could repeat for ever */
} f_table[] = {
    {"malloc", {ENOMEM}},
    {"realloc", {ENOMEM}},
    {"mmap", {ENOMEM, EAGAIN}},
    {"madvise", {EINVAL, ENOMEM}},
    {"mprotect", {ENOMEM}},
    {"accept4", {ECONNABORTED, EAGAIN, EINTR, EMFILE, ENFILE, ENOMEM, EPROTO, EPERM, EBADF, ENOSYS}},
    {"accept", {ECONNABORTED, EAGAIN, EINTR, EMFILE, ENFILE, ENOMEM, EPROTO, EPERM, EBADF, ENOSYS}},
    {"recv", {ECONNRESET, EAGAIN, EINTR, ETIMEDOUT, ENOMEM, EBADF}},
    {"send", {EPIPE, ECONNRESET, EAGAIN, EINTR, ENOBUFS, ETIMEDOUT, EBADF}},
    {"sendmsg", {ECONNRESET, EPIPE, EAGAIN, EINTR, ENOBUFS, EBADF}},
    {"sendfile", {EIO, EAGAIN, EINTR, EINVAL, EPIPE, ENOMEM, ENOSYS, EPERM, EOPNOTSUPP, EOVERFLOW}},
    {"pread", {EIO, EINTR}},
    {"socket", {EMFILE, ENFILE, ENOBUFS, EACCES, EAFNOSUPPORT}},
    {"socket_flags", {EMFILE, ENFILE, ENOBUFS, EACCES, EAFNOSUPPORT, EINVAL}},
    {"bind", {EADDRINUSE, EACCES, EADDRNOTAVAIL}},
    {"listen", {EADDRINUSE, EOPNOTSUPP}},
    {"connect", {ECONNREFUSED, EINTR, EACCES}},
    {"epoll_wait", {EINTR, EBADF}},
    {"poll", {EINTR, ENOMEM}},
    {"kevent", {EINTR, EBADF}},
    {"kevent_set", {ENOMEM, EBADF}},
    {"kqueue", {EMFILE, ENOMEM}},
    {"epoll_create1", {EMFILE, ENFILE, ENOMEM}},
    {"epoll_ctl", {ENOMEM, ENOSPC, EBADF, ENOENT, EPERM}},
    {"eventfd", {EMFILE, ENFILE, ENODEV, ENOSYS, EPERM}},
    {"pipe", {EMFILE, ENFILE}},
    {"close", {EINTR, EIO}},
    {"setsockopt", {ENOBUFS, EINVAL, ENOPROTOOPT}},
    {"getsockopt", {ENOTSOCK, EBADF}},
    {"getsockname", {ENOBUFS, EBADF}},
    {"getpeername", {ENOTCONN, EBADF}},
    {"fcntl", {EBADF, EMFILE}},
    {"fstat", {EIO, EBADF}},
    {"lstat", {EACCES, ENOENT}},
    {"unlink", {EACCES, ENOENT}},
    {"chmod", {EPERM, ENOENT}},
    {"fchmod", {EINVAL, EPERM, ENOSYS}},
    {"flock", {EINTR, ENOLCK, EOPNOTSUPP, ENOSYS}},
    {"open", {EACCES, EMFILE, ENOSYS}},
    {"read", {EAGAIN, EINTR}},
    {"write", {EAGAIN, EINTR}},
    {"shutdown", {ENOTCONN, EBADF}},
    {"sigaction", {EINVAL}},
    {"getaddrinfo", {ENOMEM}},
};
#define F_TABLE (sizeof f_table / sizeof f_table[0])
#define F_NAMES 64
#define F_MOST 40 /* of one name in one scenario; above it, every n-th */

static const char *f_names[F_NAMES]; /* what the dry run called, */
static long f_counts[F_NAMES];       /* and how often */
static int f_used;
static long f_total;

static char f_label[256]; /* the run, to repeat it */
static int f_kind, f_errno;
static long f_second;    /* pairs: where the second fault comes */
static int f_failures;   /* checks that failed in this test */
static long f_runs;
static bool f_counting;

static void f_seen(const char *name)
{
    int i = 0;
    if (f_second != 0 && t_fault_hits == 1) {
        t_fault_at = f_second;
    }
    if (!f_counting) {
        return;
    }
    while (i < f_used && strcmp(f_names[i], name) != 0) {
        i++;
    }
    CHECK(i < F_NAMES);
    if (i == f_used) {
        f_names[f_used] = name;
        f_counts[f_used++] = 0;
    }
    f_counts[i]++;
    f_total++;
}

/* One failed check does not end the test, so that one fault does not hide the others. */
__attribute__((format(printf, 1, 2))) static void f_bad(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "FAULT=\"%s\" (hits %ld, last %s): ", f_label, t_fault_hits,
            t_fault_last != NULL ? t_fault_last : "none");
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    if (++f_failures >= 20) {
        t_stop();
    }
}

/* The library promises that none comes. */
static volatile sig_atomic_t f_pipes;

static void f_sigpipe(int signo)
{
    (void)signo;
    f_pipes = 1;
}

__attribute__((unused)) static void f_crashed(int signo)
{
    char text[512];
    int size = snprintf(text, sizeof text, "FAULT=\"%s\": signal %d; last failed call: %s\n", f_label,
                        signo, t_fault_last != NULL ? t_fault_last : "none");
    signal(signo, SIG_DFL);
    if (write(2, text, (size_t)size) == size) {
        raise(signo);
    }
}

/* A run takes no time, so this is a loop inside the library, or a wait that nothing ends. */
static void f_watchdog(int signo)
{
    char text[512];
    int size = snprintf(text, sizeof text, "FAULT=\"%s\": hangs; last failed call: %s\n", f_label,
                        t_fault_last != NULL ? t_fault_last : "none");
    (void)signo;
    if (write(2, text, (size_t)size) == size) {
        _exit(1);
    }
    _exit(2);
}

static int f_open_fds(void)
{
    int count = 0;
    for (int fd = 0; fd < 64; fd++) {
        count += fcntl(fd, F_GETFD) != -1;
    }
    return count;
}

static bool f_documented(int rc)
{
    return rc == TSRV_OK || (rc <= TSRV_EAGAIN && rc >= TSRV_EPARENT) || (rc < 0 && rc > -134);
}

/* ---- a run --------------------------------------------------------------------------------*/

typedef struct scenario {
    const char *name;
    tsrv_handler handler;
    int (*start)(void);     /* listens; NULL = on 127.0.0.1 */
    void (*extra)(void);    /* starts something else */
    bool (*over)(void);     /* has that ended? */
    void (*finish)(void);   /* checks it, and stops it */
    void (*after)(void);    /* called when the loop is gone */
    const char *request;    /* what the client sends */
    size_t repeat;          /* so many times */
    bool shut;              /* and then it ends its output */
    bool slow;              /* the client reads only when the server has come to rest */
    size_t big;             /* bytes of the file and of large writes */
} scenario;

typedef struct peer {
    int fd;
    size_t sent, size, got;
    char *request, *buffer;
    bool shut, slow, over, lost, gave_up;
} peer;

/* Of each stream. */
typedef struct mark {
    bool entered, closed, sent;
    int step;
} mark;

static const scenario *s_now;
static tsrv_loop *s_loop;
static tsrv_server *s_server;
static int s_entered, s_closed, s_reason, s_file = -1;
static size_t s_big;
static char s_folder[64], s_path[96];
static int s_add[2] = {-1, -1}; /* the client's ends of socket pairs */
static char s_pattern[1 << 18], s_expected[(1 << 18) + 4096];
static size_t s_expected_size;

static mark *s_enter(tsrv_stream *stream)
{
    mark *m = (mark *)tsrv_data(stream);
    if (!m->entered) {
        m->entered = true;
        s_entered++;
    }
    if (m->closed) {
        f_bad("the handler was called after on_close");
    }
    return m;
}

/* What may end a stream: our own ends, what was injected, or what the client does then. */
static bool s_expected_reason(int rc)
{
    return rc == TSRV_OK || rc == TSRV_EOF || rc == TSRV_ECLOSED || rc == -ECONNRESET ||
           rc == -EPIPE || rc == TSRV_ETIMEOUT || (t_fault_hits > 0 && rc == -f_errno) ||
           (t_fault_hits > 0 && rc == -ENOMEM) ||
           (t_fault_hits > 0 && f_errno == 0 && rc < 0 && f_documented(rc));
}

static void s_on_close(tsrv_stream *stream, int reason, void *context)
{
    mark *m = (mark *)tsrv_data(stream);
    (void)context;
    if (m->closed || !m->entered) {
        f_bad("on_close %s", m->closed ? "twice" : "without the handler");
    }
    if (!s_expected_reason(reason)) {
        f_bad("on_close has an unexpected reason: %d (%s)", reason, tsrv_strerror(reason));
    }
    m->closed = true;
    s_closed++;
    s_reason = reason;
}

static void s_expect(const char *data, size_t size)
{
    memcpy(s_expected + s_expected_size, data, size);
    s_expected_size += size;
}

/* One port for all runs of a test: thousands of listeners in a row would leave connections in
 * TIME_WAIT on thousands of ports, until the system has none left to give for port 0. */
static int start_tcp(void)
{
    static int port;
    for (int tries = 0;; tries++) {
        long hits = t_fault_hits;
        port = port == 0 ? t_free_port() : port;
        int rc = tsrv_server_listen(s_server, port, "127.0.0.1", NULL);
        if (rc != -EADDRINUSE || t_fault_hits != hits || tries == 8) {
            return rc;
        }
        port = 0; /* somebody's client was given it meanwhile */
    }
}

/* Two families, by name, so that one failure must take back what the other has. */
static int start_both(void)
{
    int fds[8], count = tsrv_bind_sockets(0, "localhost", NULL, fds, 8);
    return count < 0 ? count : tsrv_server_add_sockets(s_server, fds, count);
}

static int start_unix(void)
{
    char text[128];
    snprintf(text, sizeof text, "unix:%s", s_path);
    return tsrv_server_listen(s_server, 0, text, NULL);
}

static int start_pair(void)
{
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    int rc = tsrv_server_add_stream(s_server, pair[1]);
    if (rc < 0) {
        close(pair[0]);
    } else {
        s_add[s_add[0] < 0 ? 0 : 1] = pair[0];
    }
    return rc;
}

/* A connection to whatever the scenario listens on; -1 when nobody listens. */
static int p_connect(bool slow)
{
    int fd, small = 4096;
    if (s_now->start == start_pair) {
        if (s_add[0] < 0 && start_pair() < 0 && start_pair() < 0) {
            return -1;
        }
        fd = s_add[0];
        s_add[0] = s_add[1];
        s_add[1] = -1;
    } else if (s_now->start == start_unix) {
        struct sockaddr_un local = t_unix_address(s_path);
        fd = socket(AF_UNIX, SOCK_STREAM, 0);
        if (connect(fd, (struct sockaddr *)&local, sizeof local) < 0) {
            close(fd);
            return -1;
        }
    } else {
        struct sockaddr_storage address;
        socklen_t size = sizeof address;
        if (s_server->listeners == NULL ||
            getsockname(s_server->listeners->io.fd, (struct sockaddr *)&address, &size) < 0) {
            return -1;
        }
        fd = socket(address.ss_family, SOCK_STREAM, 0);
        if (slow) {
            CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small) == 0);
        }
        if (connect(fd, (struct sockaddr *)&address, size) < 0) {
            close(fd);
            return -1;
        }
    }
    CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
    return fd;
}

/* Whatever can be done without waiting. Returns whether something was. */
static bool p_step(peer *p)
{
    bool progress = false;
    ssize_t n;
    while (!p->lost && p->sent < p->size &&
           (n = send(p->fd, p->request + p->sent, p->size - p->sent, T_NOSIGNAL)) != 0) {
        if (n < 0) {
            p->lost = errno != EAGAIN;
            break;
        }
        p->sent += (size_t)n;
        progress = true;
    }
    if (p->sent == p->size && p->shut) {
        p->shut = false;
        shutdown(p->fd, SHUT_WR);
        progress = true;
    }
    if (p->slow) {
        return progress;
    }
    for (;;) {
        n = recv(p->fd, p->buffer + p->got, sizeof s_expected + 1 - p->got, 0);
        if (n <= 0) {
            p->over = n == 0;
            p->lost = p->lost || (n < 0 && errno != EAGAIN);
            return progress || n == 0;
        }
        p->got += (size_t)n;
        progress = true;
    }
}

/* One turn. Returns false when the loop could not wait. */
static void s_turn(int limit_ms)
{
    int rc = tsrv_loop_run_once(s_loop, limit_ms);
    if (rc < 0 && (t_fault_hits == 0 || (f_errno != 0 && rc != -f_errno))) {
        f_bad("tsrv_loop_run_once: %d (%s)", rc, tsrv_strerror(rc));
    }
}

static long s_spin_limit = 1000;
static bool s_spun; /* one spin is said once; then leave at once */

static bool s_stuck(long waits, uint64_t since)
{
    if (v_waits - waits > s_spin_limit && !s_spun) {
        s_spun = true;
        if (f_kind == ONCE) {
            f_bad("spins: %ld waits", v_waits - waits);
        }
    }
    return s_spun || v_skew_ms - since > 15000;
}

/* Serve one client until it is at its end, or nothing moves any more. */
static void s_serve(peer *p)
{
    uint64_t since = v_skew_ms;
    long waits = v_waits;
    int quiet = 0;
    while (!p->over && !p->lost && !p->gave_up) {
        bool progress = p_step(p);
        if (progress) {
            since = v_skew_ms;
            quiet = 0;
        }
        if (p->over || p->lost) {
            break;
        }
        s_turn(progress || p->slow ? 0 : TSRV_NEVER);
        quiet += v_quiet && !progress;
        p->slow = p->slow && (progress || !v_nothing);
        p->gave_up = quiet > 3 || s_stuck(waits, since);
    }
    close(p->fd);
}

/* Turn until every stream is closed, and what extra has begun is over. */
static void s_rest(const char *when)
{
    uint64_t since = v_skew_ms;
    long waits = v_waits;
    int quiet = 0;
    tsrv_stats stats;
    for (;;) {
        tsrv_server_stats(s_server, &stats);
        if (stats.open == 0 && s_closed == s_entered && (s_now->over == NULL || s_now->over())) {
            return;
        }
        s_turn(TSRV_NEVER);
        quiet += v_quiet;
        if (quiet > 3 || s_stuck(waits, since)) {
            break;
        }
    }
    if (f_kind == ONCE) {
        f_bad("%s: %llu streams open, %d handlers without on_close, or a callback did not come",
              when, (unsigned long long)stats.open, s_entered - s_closed);
    }
}

static void p_free(peer *p)
{
    free(p->buffer);
    free(p->request);
}

/* Connect, send, receive. Returns false when there was no connection. */
static bool p_run(peer *p, const char *request, size_t repeat, bool shut, bool slow)
{
    size_t size = strlen(request);
    memset(p, 0, sizeof *p);
    p->fd = p_connect(slow);
    if (p->fd < 0) {
        return false;
    }
    p->size = size * repeat;
    p->request = (char *)malloc(p->size + 1);
    p->buffer = (char *)malloc(sizeof s_expected + 1);
    CHECK(p->request != NULL && p->buffer != NULL);
    for (size_t i = 0; i < repeat; i++) {
        memcpy(p->request + i * size, request, size);
    }
    p->shut = shut;
    p->slow = slow;
    s_reason = 1;
    s_serve(p);
    return true;
}

/* The scenario's own client: what it got is the beginning of what it should have. */
static void s_client(void)
{
    long hits = t_fault_hits;
    peer p;
    if (!p_run(&p, s_now->request, s_now->repeat, s_now->shut, s_now->slow)) {
        if (t_fault_hits == 0) {
            f_bad("the client cannot connect");
        }
        return;
    }
    s_rest("after the client");
    if (p.got > s_expected_size || memcmp(p.buffer, s_expected, p.got) != 0) {
        f_bad("the client got %zu wrong bytes", p.got);
    }
    if ((t_fault_hits == 0 || f_kind == DENIED || (s_reason == TSRV_OK && !p.gave_up && !p.lost)) &&
        p.got != s_expected_size) {
        f_bad("success, but the client got %zu of %zu bytes (hits %ld before)", p.got,
              s_expected_size, hits);
    }
    if (f_kind == ONCE && p.gave_up && f_errno != EBADF) {
        f_bad("the client waited in vain, having got %zu of %zu bytes", p.got, s_expected_size);
    }
    p_free(&p);
}

/* A call of the set-up: its failures are the injected ones, and it works once they are over. */
static bool s_set_up(int (*function)(void), const char *what)
{
    int rc = TSRV_OK;
    for (int i = 0; i < 4; i++) {
        long hits = t_fault_hits;
        rc = function();
        if (rc >= 0) {
            return true;
        }
        if (f_kind == DENIED) {
            break;
        }
        if (t_fault_hits == hits || !f_documented(rc) || rc == TSRV_EAGAIN) {
            f_bad("%s: %d (%s)", what, rc, tsrv_strerror(rc));
            return false;
        }
        if (f_kind == STICKY) {
            t_fault_at = 0;
        } else if (f_kind == LEAVING) {
            return false;
        }
    }
    f_bad("%s keeps failing: %d (%s)", what, rc, tsrv_strerror(rc));
    return false;
}

/* A connection after the fault has to be served as if nothing had happened. */
static void s_probe(void)
{
    for (int i = 0; i < 3; i++) {
        static const char wanted[] = "ping\nquit\n";
        long hits = t_fault_hits;
        peer p;
        bool good = p_run(&p, wanted, 1, false, false);
        if (good) {
            good = p.got == 10 && memcmp(p.buffer, wanted, 10) == 0 && p.over;
            s_rest("after the second client");
            p_free(&p);
        }
        if (good) {
            return;
        }
        if (t_fault_hits == hits) {
            f_bad("the next connection is not served");
            return;
        }
    }
    if (f_second == 0) {
        f_bad("no connection is served any more");
    }
}

static int set_up_loop(void)
{
    tsrv_loop_options options = {0};
    options.backend = t_backend;
    int rc = tsrv_loop_new(&s_loop, &options);
    CHECK((rc == TSRV_OK) == (s_loop != NULL));
    return rc;
}

static int set_up_server(void)
{
    tsrv_server_options options;
    memset(&options, 0, sizeof options);
    options.mode = t_mode;
    options.handle_stream = s_now->handler;
    options.on_close = s_on_close;
    options.loop = s_loop;
    options.data_size = sizeof(mark);
    options.write_high_water = 16384;
    options.write_timeout_ms = 4000;
    options.keep_alive = true;
    options.read_chunk_size = t_hard ? 3 : 4096;
    int rc = tsrv_server_new(&s_server, &options);
    CHECK((rc == TSRV_OK) == (s_server != NULL));
    return rc;
}

static void s_life(void)
{
    if (!s_set_up(set_up_loop, "tsrv_loop_new")) {
        return;
    }
    if (!s_set_up(set_up_server, "tsrv_server_new") ||
        !s_set_up(s_now->start != NULL ? s_now->start : start_tcp, "listen")) {
        return;
    }
    if (s_now->extra != NULL) {
        s_now->extra();
    }
    s_client();
    if (f_kind == STICKY) {
        t_fault_at = 0; /* the trouble is over */
        s_spun = false;
        s_rest("after the trouble");
    }
    if (f_kind != LEAVING) {
        s_probe();
    }
}

/* One run with the fault that is set. */
static void s_run(const scenario *s)
{
    int fds = f_open_fds();
    long live = t_live_allocations;
    s_now = s;
    s_loop = NULL;
    s_server = NULL;
    s_entered = s_closed = 0;
    s_spun = false;
    t_fault_hits = 0;
    t_fault_calls = 0;
    t_fault_last = NULL;
    tsrvi_process.without = 0; /* as in a new process */
    f_runs++;
    alarm((unsigned)(5 * t_scale()));
    s_life();
    if (s->finish != NULL && s_server != NULL && s_loop != NULL) {
        s->finish();
    }
    if (s_server != NULL) {
        tsrv_server_free(s_server);
    }
    if (s_loop != NULL) {
        int rc = tsrv_loop_free(s_loop);
        if (rc != TSRV_OK) {
            f_bad("tsrv_loop_free: %d", rc);
        }
    }
    alarm(0);
    if (s->after != NULL) {
        s->after();
    }
    for (int i = 0; i < 2; i++) {
        if (s_add[i] >= 0) {
            close(s_add[i]);
            s_add[i] = -1;
        }
    }
    t_fault_at = 0;
    if (f_pipes) {
        f_bad("SIGPIPE was raised");
        f_pipes = 0;
    }
    if (f_kind == STICKY && strncmp(t_fault_name, "accept", 6) == 0 && t_fault_hits > 300) {
        f_bad("accept spins"); /* some calls a second, for the 15 s after which a client gives up */
    }
    if (s_closed != s_entered) {
        f_bad("%d handlers, but %d on_close", s_entered, s_closed);
    }
    if (t_live_allocations != live) {
        f_bad("%ld allocations are lost", t_live_allocations - live);
        t_live_allocations = live;
    }
    if (f_open_fds() != fds) {
        f_bad("%d descriptors are lost", f_open_fds() - fds);
        T_FAIL("the next runs would only repeat this");
    }
}

static void s_fail(const scenario *s, const char *name, long at, int code, int kind)
{
    static const char *const kinds[] = {"once", "sticky", "leaving", "denied"};
    const char *only = getenv("FAULT");
    snprintf(f_label, sizeof f_label, "%s:%ld:%d:%s", name, at, code, kinds[kind]);
    if (only != NULL && strcmp(only, f_label) != 0) {
        return;
    }
    t_fault_name = name;
    t_fault_at = at;
    t_fault_errno = f_errno = code;
    t_fault_sticky = kind != ONCE;
    f_kind = kind;
    s_run(s);
}

static int s_told; /* lines of the log: what is done without */

static void s_see_log(int level, const char *message, void *context)
{
    (void)context;
    if (level != TSRV_LOG_INFO) {
        f_bad("logged: %s", message);
    }
    s_told += strstr(message, "doing without it") != NULL;
}

/* What a kernel does not have, or a policy denies: from the at-th call on these fail, and nothing of it
 * is felt; it is said once at most. Returns how many calls failed. */
static long s_deny(const scenario *s, const char *name, const int *codes)
{
    long hits = 0;
    for (; *codes != 0; codes++) {
        for (long at = 1; at <= 3; at++) {
            tsrv_set_log(s_see_log, NULL);
            s_told = 0;
            s_fail(s, name, at, *codes, DENIED);
            hits += t_fault_hits;
            if (s_told > 1) {
                f_bad("%d lines in the log", s_told);
            }
            tsrv_set_log(t_no_log, NULL);
        }
    }
    return hits;
}

/* Can a kernel answer so for ever? EINTR and EAGAIN on a ready descriptor it cannot, and the loop is
 * right to try again. */
static bool f_lasts(int code)
{
    return code != EINTR && code != EAGAIN;
}

static void s_prepare(const scenario *s)
{
    signal(SIGALRM, f_watchdog);
    signal(SIGPIPE, f_sigpipe);
#if !TSRVI_HAS_ASAN
    signal(SIGSEGV, f_crashed);
    signal(SIGABRT, f_crashed);
#endif
    tsrv_set_log(t_no_log, NULL);
    snprintf(s_folder, sizeof s_folder, "/tmp/tsrv-fault-XXXXXX");
    CHECK(mkdtemp(s_folder) != NULL);
    snprintf(s_path, sizeof s_path, "%s/socket", s_folder);
    for (size_t i = 0; i < sizeof s_pattern; i++) {
        s_pattern[i] = (char)('a' + (i * 7 + i / 251) % 26);
    }
    s_big = t_hard && s->big > 300 ? 300 : s->big;
    s_spin_limit = t_hard ? 2000 : s_spin_limit;
    if (s->big != 0) {
        char path[96];
        snprintf(path, sizeof path, "%s/file", s_folder);
        s_file = open(path, O_RDWR | O_CREAT, 0600);
        CHECK(s_file >= 0);
        CHECK(write(s_file, s_pattern, s_big) == (ssize_t)s_big);
        CHECK(unlink(path) == 0);
    }
}

static void s_all(const scenario *s)
{
    s_prepare(s);
    t_seen = f_seen;
    snprintf(f_label, sizeof f_label, "no fault");
    s_run(s); /* for what is done once in a process */
    f_counting = true;
    s_run(s);
    f_counting = false;
    if (f_failures == 0) {
        for (int n = 0; n < f_used; n++) {
            size_t row = 0;
            while (row < F_TABLE && strcmp(f_table[row].name, f_names[n]) != 0) {
                row++;
            }
            if (strcmp(f_names[n], "getpid") == 0 || strcmp(f_names[n], "munmap") == 0 ||
                strcmp(f_names[n], "sched_yield") == 0) {
                continue; /* these do not fail */
            }
            if (row == F_TABLE) {
                T_FAIL("no errno is known for %s", f_names[n]);
            }
            long step = f_counts[n] / F_MOST + 1;
            for (long at = 1; at <= f_counts[n]; at += step) {
                for (int i = 0; f_table[row].codes[i] != 0; i++) {
                    s_fail(s, f_names[n], at, f_table[row].codes[i], ONCE);
                    if (f_lasts(f_table[row].codes[i])) {
                        s_fail(s, f_names[n], at, f_table[row].codes[i],
                               (at + i) % 2 == 0 ? STICKY : LEAVING);
                    }
                }
            }
        }
    }
    printf("%ld runs\n", f_runs);
    CHECK(f_runs > 100 || getenv("FAULT") != NULL || f_failures != 0);
    if (s_file >= 0) {
        close(s_file);
    }
    unlink(s_path);
    rmdir(s_folder);
    CHECK_INT(f_failures, 0);
}

/* ---- handlers -----------------------------------------------------------------------------*/

static int handle_lines(tsrv_stream *stream, mark *m, bool *quit)
{
    tsrv_slice line;
    int rc = tsrv_read_until(stream, "\n", 100, &line);
    (void)m;
    if (rc == TSRV_OK) {
        *quit = line.size == 5 && memcmp(line.data, "quit\n", 5) == 0;
        rc = tsrv_write(stream, line.data, line.size);
    }
    return rc;
}

/* Checks what a read or a write may return. */
static int handled(int rc)
{
    if (rc == TSRV_EAGAIN ? t_mode == TSRV_COROUTINE : !s_expected_reason(rc)) {
        f_bad("a call of the handler returned %d (%s)", rc, tsrv_strerror(rc));
    }
    return rc;
}

static int handle_echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    mark *m = s_enter(stream);
    bool quit = false;
    int rc;
    (void)address;
    (void)context;
    while ((rc = handled(handle_lines(stream, m, &quit))) == TSRV_OK && !quit) {
    }
    return rc;
}

/* Whatever comes before "quit" or the end is echoed; the probe needs that of all handlers. */
static int handle_write(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    mark *m = s_enter(stream);
    int small = 4096, rc;
    tsrv_slice line;
    while ((rc = handled(tsrv_read_until(stream, "\n", 0, &line))) == TSRV_OK) {
        tsrv_slice pieces[3] = {{"one ", 4}, {"two ", 4}, {"three\n", 6}};
        if (memcmp(line.data, "go\n", line.size < 3 ? line.size : 3) != 0) {
            rc = handled(tsrv_write(stream, line.data, line.size));
            if (rc != TSRV_OK || line.data[0] == 'q') {
                return rc;
            }
            continue;
        }
        CHECK(setsockopt(tsrv_fd(stream), SOL_SOCKET, SO_SNDBUF, &small, sizeof small) == 0 ||
              t_fault_hits > 0);
        if ((rc = handled(tsrv_printf(stream, "%d %s\n", 42, "words"))) != TSRV_OK ||
            (rc = handled(tsrv_writev(stream, pieces, 3))) != TSRV_OK ||
            (rc = handled(tsrv_write(stream, s_pattern, s_big))) != TSRV_OK ||
            (rc = handled(tsrv_try_write(stream, "end\n", 4))) != TSRV_OK) {
            return rc;
        }
    }
    (void)m;
    (void)address;
    (void)context;
    return rc == TSRV_EOF ? TSRV_OK : rc;
}

static int handle_file(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    tsrv_slice line;
    s_enter(stream);
    (void)address;
    (void)context;
    while ((rc = handled(tsrv_read_until(stream, "\n", 0, &line))) == TSRV_OK) {
        bool quit = line.data[0] == 'q';
        if (memcmp(line.data, "go\n", line.size < 3 ? line.size : 3) == 0) {
            rc = tsrv_sendfile(stream, s_file, 0, s_big);
        } else {
            rc = tsrv_write(stream, line.data, line.size);
        }
        if (handled(rc) != TSRV_OK || quit) {
            return rc;
        }
    }
    return rc;
}

/* Reads all kinds: a number, bytes into memory, dropped ones, the rest until the end. */
static int handle_upload(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    mark *m = s_enter(stream);
    static char into[8];
    tsrv_slice slice;
    int rc = TSRV_OK;
    (void)address;
    (void)context;
    if (m->step == 0) {
        if ((rc = handled(tsrv_read_bytes(stream, 5, &slice))) != TSRV_OK) {
            return rc;
        }
        if (memcmp(slice.data, "ping\n", 5) == 0) { /* the probe */
            m->step = 10;
            if ((rc = handled(tsrv_write(stream, "ping\nquit\n", 10))) != TSRV_OK) {
                return rc;
            }
        } else {
            m->step = 1;
        }
    }
    if (m->step == 10) {
        rc = handled(tsrv_read_until(stream, "quit\n", 0, &slice));
        return rc;
    }
    if (m->step == 1) {
        if ((rc = handled(tsrv_read_into(stream, into, sizeof into))) != TSRV_OK) {
            return rc;
        }
        m->step = 2;
    }
    if (m->step == 2) {
        if ((rc = handled(tsrv_read_bytes(stream, 20, NULL))) != TSRV_OK) {
            return rc;
        }
        m->step = 3;
    }
    if ((rc = handled(tsrv_read_until_close(stream, 0, &slice))) != TSRV_OK) {
        return rc;
    }
    return handled(tsrv_printf(stream, "%.8s %zu\n", into, slice.size));
}

/* ---- what else runs -----------------------------------------------------------------------*/

#define X_COUNT 3
static int x_rc[X_COUNT], x_calls, x_order[X_COUNT];
static int x_pipe[2] = {-1, -1};
static tsrv_timer x_timer;
static tsrv_watch x_watch;
static tsrv_signal x_signal;

/* The pipe outlives the coroutine that waits for it. */
static void x_pipe_close(void)
{
    for (int i = 0; i < 2; i++) {
        if (x_pipe[i] >= 0) {
            close(x_pipe[i]);
            x_pipe[i] = -1;
        }
    }
}

static int x_wanted(void)
{
    int wanted = 0;
    for (int i = 0; i < X_COUNT; i++) {
        wanted += x_rc[i] == TSRV_OK;
    }
    return wanted;
}

static bool x_over(void)
{
    return x_calls >= x_wanted();
}

static void x_reset(void)
{
    x_calls = 0;
    for (int i = 0; i < X_COUNT; i++) {
        x_rc[i] = 1;
    }
}

static void x_check(void)
{
    for (int i = 0; i < X_COUNT; i++) {
        if (x_rc[i] < 0 && (t_fault_hits == 0 || !f_documented(x_rc[i]))) {
            f_bad("call %d: %d (%s)", i, x_rc[i], tsrv_strerror(x_rc[i]));
        }
    }
    if (f_kind == ONCE && x_calls != x_wanted()) {
        f_bad("%d callbacks, %d wanted", x_calls, x_wanted());
    }
}

static void x_called(void *context)
{
    if (x_calls < X_COUNT) {
        x_order[x_calls] = *(int *)context;
    }
    x_calls++;
}

static int x_ids[X_COUNT] = {0, 1, 2};

static void *x_post_thread(void *context)
{
    for (int i = 0; i < X_COUNT; i++) {
        x_rc[i] = tsrv_loop_post(s_loop, x_called, &x_ids[i]);
    }
    return context;
}

/* The thread ends before the loop goes on: so the calls are counted in a fixed order. */
static void x_post(void)
{
    pthread_t thread;
    x_reset();
    CHECK(pthread_create(&thread, NULL, x_post_thread, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}

static void x_post_finish(void)
{
    x_check();
    for (int i = 1; i < x_calls && i < X_COUNT; i++) {
        if (x_order[i] <= x_order[i - 1]) {
            f_bad("posts out of order");
        }
    }
}

static void x_signals(void)
{
    x_reset();
    memset(&x_signal, 0, sizeof x_signal);
    x_rc[0] = tsrv_signal_start(s_loop, &x_signal, SIGUSR1, x_called, &x_ids[0]);
    if (x_rc[0] == TSRV_OK) {
        raise(SIGUSR1);
    }
}

static void x_signals_finish(void)
{
    struct sigaction action;
    x_check();
    tsrv_signal_stop(&x_signal);
    CHECK(sigaction(SIGUSR1, NULL, &action) == 0);
    if (action.sa_handler != SIG_DFL && t_fault_hits == 0) {
        f_bad("the signal handler was not put back");
    }
    signal(SIGUSR1, SIG_DFL);
}

static void x_watched(int events, void *context)
{
    char byte;
    CHECK((events & TSRV_READABLE) != 0);
    CHECK(read(x_pipe[0], &byte, 1) == 1);
    tsrv_watch_stop(&x_watch);
    x_called(context);
}

static void x_events(void)
{
    x_reset();
    CHECK(pipe(x_pipe) == 0);
    CHECK(write(x_pipe[1], "x", 1) == 1);
    memset(&x_watch, 0, sizeof x_watch);
    memset(&x_timer, 0, sizeof x_timer);
    x_rc[0] = tsrv_timer_start(s_loop, &x_timer, 20, x_called, &x_ids[0]);
    x_rc[1] = tsrv_watch_start(s_loop, &x_watch, x_pipe[0], TSRV_READABLE, x_watched, &x_ids[1]);
}

static void x_events_finish(void)
{
    x_check();
    tsrv_watch_stop(&x_watch);
    tsrv_timer_stop(&x_timer);
}

static void x_coroutine(void *context)
{
    int rc = tsrv_sleep(5);
    if (rc == TSRV_OK) {
        rc = tsrv_wait_fd(x_pipe[0], TSRV_READABLE, 1000);
    }
    if (rc != TSRV_OK && t_fault_hits == 0) {
        f_bad("tsrv_sleep or tsrv_wait_fd: %d", rc);
    }
    if (!f_documented(rc) || rc == TSRV_EAGAIN) {
        f_bad("tsrv_sleep or tsrv_wait_fd: %d is not documented", rc);
    }
    x_called(context);
}

static void x_spawn(void)
{
    x_reset();
    CHECK(pipe(x_pipe) == 0);
    CHECK(write(x_pipe[1], "x", 1) == 1);
    for (int i = 0; i < 2; i++) {
        x_rc[i] = tsrv_spawn(s_loop, x_coroutine, &x_ids[i]);
        if (i == 0 && x_rc[i] == TSRV_OK) {
            break; /* two may not wait for one descriptor */
        }
    }
}

/* ---- the tests ----------------------------------------------------------------------------*/

static const scenario s_echo = {.handler = handle_echo, .request = "hello\nquit\n", .repeat = 1};

static void s_echo_expected(const char *text)
{
    s_expected_size = 0;
    s_expect(text, strlen(text));
}

TEST_STREAM(fault_echo)
{
    s_echo_expected("hello\nquit\n");
    s_all(&s_echo);
}

TEST_STREAM(fault_listen_by_name)
{
    scenario s = s_echo;
    s.start = start_both;
    s_echo_expected("hello\nquit\n");
    s_all(&s);
}

TEST_STREAM(fault_unix)
{
    scenario s = s_echo;
    s.start = start_unix; /* from the second run on over a stale file */
    s_echo_expected("hello\nquit\n");
    s_all(&s);
}

TEST_STREAM(fault_add_stream)
{
    scenario s = s_echo;
    s.start = start_pair;
    s_echo_expected("hello\nquit\n");
    s_all(&s);
}

TEST_STREAM(fault_write)
{
    scenario s = {.handler = handle_write, .start = start_unix, .request = "go\n", .repeat = 1, .shut = true,
                  .slow = true, .big = 120000};
    s_expected_size = 0;
    s_expect("42 words\none two three\n", 23);
    for (size_t i = 0; i < sizeof s_pattern; i++) {
        s_pattern[i] = (char)('a' + (i * 7 + i / 251) % 26);
    }
    s_expect(s_pattern, t_hard ? 300 : s.big);
    s_expect("end\n", 4);
    s_all(&s);
}

TEST_STREAM(fault_sendfile)
{
    scenario s = {.handler = handle_file, .start = start_unix, .request = "go\nquit\n", .repeat = 1, .slow = true,
                  .big = 120000};
    s_expected_size = 0;
    for (size_t i = 0; i < sizeof s_pattern; i++) {
        s_pattern[i] = (char)('a' + (i * 7 + i / 251) % 26);
    }
    s_expect(s_pattern, t_hard ? 300 : s.big);
    s_expect("quit\n", 5);
    s_all(&s);
}

static void s_deny_end(void)
{
    if (s_file >= 0) {
        close(s_file);
    }
    unlink(s_path);
    rmdir(s_folder);
    CHECK(f_runs > 0);
    CHECK_INT(f_failures, 0);
}

#ifdef __linux__
/* Calls that there is another way for, or that only make things better. */
TEST_STREAM(denied_calls_are_done_without)
{
    static const struct {
        const char *name;
        int codes[8];
        int (*start)(void);
    } rows[] = {
        {"eventfd", {ENOSYS, EPERM, EINVAL, EACCES}, start_tcp},
        {"socket_flags", {EINVAL, EPERM, EACCES, EOPNOTSUPP}, start_tcp},
        {"socket_flags", {EINVAL, EPERM, EACCES, EOPNOTSUPP}, start_unix},
        {"accept4", {ENOSYS, EPERM, EACCES}, start_tcp},
        {"accept4", {ENOSYS, EPERM, EACCES}, start_unix},
        {"setsockopt", {ENOSYS, EPERM, EACCES}, start_both},
        {"getsockopt", {ENOSYS, EPERM, EACCES}, start_tcp},
        {"getpeername", {ENOSYS, EPERM, EACCES}, start_pair},
        {"shutdown", {ENOSYS, EPERM, EACCES}, start_tcp},
        {"madvise", {ENOSYS, EPERM, EINVAL}, start_tcp},
        {"flock", {ENOSYS, EPERM, EACCES, EINVAL, ENOLCK, EOPNOTSUPP}, start_unix},
        {"fchmod", {ENOSYS, EPERM, EACCES, EINVAL}, start_unix},
        {"open", {ENOSYS, EPERM, EACCES, EINVAL}, start_unix},
    };
    scenario s = s_echo;
    s_echo_expected("hello\nquit\n");
    s_prepare(&s);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        s.start = rows[i].start;
        long hits = s_deny(&s, rows[i].name, rows[i].codes);
        bool maps = strcmp(rows[i].name, "madvise") != 0 || t_mode == TSRV_COROUTINE;
        if (hits == 0 && maps && getenv("FAULT") == NULL) {
            T_FAIL("%s is not called", rows[i].name);
        }
    }
    s_deny_end();
}
#endif

#if TSRVI_HAS_EPOLL
/* Before Linux 4.5; only workers ask for it. */
TEST_STREAM(epoll_without_exclusive_wake_ups)
{
    static const int codes[] = {EINVAL, 0};
    if (t_backend != TSRV_BACKEND_EPOLL) {
        return;
    }
    s_echo_expected("hello\nquit\n");
    s_prepare(&s_echo);
    tsrvi_process.number = 1;
    CHECK(s_deny(&s_echo, "epoll_ctl_exclusive", codes) > 0 || getenv("FAULT") != NULL);
    tsrvi_process.number = 0;
    s_deny_end();
}
#endif

/* Not a byte is lost or doubled when the kernel does not send the file, from whichever call on; also
 * when it is read in small pieces, or reading it is interrupted. */
TEST_STREAM(refused_sendfile_reads_and_sends)
{
    static const int codes[] = {ENOSYS, EINVAL, EPERM, EACCES, EOPNOTSUPP, EOVERFLOW, 0};
    scenario s = {.handler = handle_file, .start = start_unix, .request = "go\ngo\nquit\n", .repeat = 1,
                  .slow = true, .big = 120000};
    s_prepare(&s);
    s_big = s.big;
    CHECK(pwrite(s_file, s_pattern, s_big, 0) == (ssize_t)s_big);
    s_expected_size = 0;
    s_expect(s_pattern, s.big);
    s_expect(s_pattern, s.big);
    s_expect("quit\n", 5);
    CHECK(s_deny(&s, "sendfile", codes) > 0 || getenv("FAULT") != NULL);
    s_deny_end();
}

TEST_STREAM(fault_upload)
{
    scenario s = {.handler = handle_upload, .request = "0123456789", .repeat = 4000, .shut = true};
    if (t_hard) {
        s.repeat = 20;
    }
    s_echo_expected(t_hard ? "56789012 167\n" : "56789012 39967\n");
    s_all(&s);
}

TEST_STREAM(fault_post)
{
    scenario s = s_echo;
    s.extra = x_post;
    s.over = x_over;
    s.finish = x_post_finish;
    s_echo_expected("hello\nquit\n");
    s_all(&s);
}

TEST_STREAM(fault_signal)
{
    scenario s = s_echo;
    s.extra = x_signals;
    s.over = x_over;
    s.finish = x_signals_finish;
    s_echo_expected("hello\nquit\n");
    s_all(&s);
}

TEST_STREAM(fault_timer_and_watch)
{
    scenario s = s_echo;
    s.extra = x_events;
    s.over = x_over;
    s.finish = x_events_finish;
    s.after = x_pipe_close;
    s_echo_expected("hello\nquit\n");
    s_all(&s);
}

TEST_COROUTINE(fault_spawn)
{
    scenario s = s_echo;
    s.extra = x_spawn;
    s.over = x_over;
    s.finish = x_check;
    s.after = x_pipe_close;
    s_echo_expected("hello\nquit\n");
    s_all(&s);
}

/* No path that handles a failure may need something that fails. */
TEST_STREAM(fault_pairs)
{
    const char *only = getenv("FAULT");
    int64_t end = t_now_ms() + 2500;
    s_echo_expected("hello\nquit\n");
    s_prepare(&s_echo);
    t_seen = f_seen;
    snprintf(f_label, sizeof f_label, "no fault");
    s_run(&s_echo);
    f_counting = true;
    s_run(&s_echo);
    f_counting = false;
    CHECK(f_total > 10 && f_total < 1000);
    t_fault_name = NULL;
    t_fault_errno = f_errno = 0;
    t_fault_sticky = false;
    f_kind = ONCE;
    /* Short of time, the distance grows. */
    for (long distance = 1; distance < f_total && t_now_ms() < end; distance++) {
        for (long i = 1; i + distance <= f_total + 20; i++) {
            snprintf(f_label, sizeof f_label, "pair:%ld:%ld", i, i + distance);
            if (only != NULL && strcmp(only, f_label) != 0) {
                continue;
            }
            t_fault_at = i;
            f_second = i + distance;
            s_run(&s_echo);
        }
    }
    printf("%ld runs, %ld calls a run\n", f_runs, f_total);
    f_second = 0;
    rmdir(s_folder);
    CHECK_INT(f_failures, 0);
}
