/* Is the simulated kernel right? The same calls are made to it and to the real one, on two ends of connections over TCP
 * and unix sockets, and everything they return has to be the same: results, errors, bytes, what poll, epoll and kevent
 * tell of. First scripts for what matters, then random sequences of calls; a difference prints the whole sequence.
 *
 *     kernel_test [sequences [first seed]] */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "kernel.h"

#include <arpa/inet.h>

enum { REAL, MODEL, WORLDS, HANDLES = 6, BYTES = 4096 };

static int fds[WORLDS][HANDLES]; /* 0 and 1: a connection's ends; 2: its listener; 3: a set; 4 and 5: others */
static int over_tcp;
static char text[8192]; /* what has been done */
static size_t text_size;
static int passed, failed;

typedef struct result {
    long rc;
    int code; /* errno of -1 */
    unsigned sum; /* of the bytes that came */
} result;

static result result_of(long rc, const char *data)
{
    result made = {rc, rc < 0 ? errno : 0, 0};
    for (long i = 0; data != NULL && i < rc; i++) {
        made.sum = made.sum * 31 + (unsigned char)data[i];
    }
    return made;
}

#define CALL(name, ...) (world == REAL ? name(__VA_ARGS__) : k_##name(__VA_ARGS__))

/* ---- the calls ----------------------------------------------------------------------------*/

static char output[BYTES];
static unsigned written; /* so that no two pieces are alike */

static result do_send(int world, int which, int size)
{
    char data[BYTES];
    for (int i = 0; i < size; i++) {
        data[i] = (char)(written + (unsigned)i * 7);
    }
    return result_of(CALL(send, fds[world][which], data, (size_t)size, MSG_NOSIGNAL | MSG_DONTWAIT), NULL);
}

static result do_sendmsg(int world, int which, int size)
{
    struct iovec pieces[2];
    struct msghdr message;
    memset(&message, 0, sizeof message);
    memset(output, (int)written, sizeof output);
    pieces[0].iov_base = pieces[1].iov_base = output;
    pieces[0].iov_len = (size_t)size / 3;
    pieces[1].iov_len = (size_t)size - (size_t)size / 3;
    message.msg_iov = pieces;
    message.msg_iovlen = 2;
    return result_of(CALL(sendmsg, fds[world][which], &message, MSG_NOSIGNAL | MSG_DONTWAIT), NULL);
}

static result do_recv(int world, int which, int size)
{
    char data[BYTES];
    long rc = CALL(recv, fds[world][which], data, (size_t)size, MSG_DONTWAIT);
    return result_of(rc, data);
}

static result do_peek(int world, int which, int size)
{
    char data[BYTES];
    long rc = CALL(recv, fds[world][which], data, (size_t)size, MSG_DONTWAIT | MSG_PEEK);
    return result_of(rc, data);
}

static result do_shutdown(int world, int which, int how)
{
    return result_of(CALL(shutdown, fds[world][which], how), NULL);
}

static result do_close(int world, int which, int abrupt)
{
    struct linger now = {1, 0};
    if (abrupt) {
        CALL(setsockopt, fds[world][which], SOL_SOCKET, SO_LINGER, &now, (socklen_t)sizeof now);
    }
    return result_of(CALL(close, fds[world][which]), NULL);
}

static result do_poll(int world, int which, int events)
{
    struct pollfd entry = {0, 0, 0};
    long rc;
    entry.fd = fds[world][which];
    entry.events = (short)events;
    rc = CALL(poll, &entry, 1, 0);
    return result_of(rc < 0 ? rc : entry.revents, NULL);
}

static result do_epoll(int world, int which, int events)
{
    struct epoll_event event, got;
    int set = CALL(epoll_create1, EPOLL_CLOEXEC);
    long rc;
    memset(&event, 0, sizeof event);
    memset(&got, 0, sizeof got);
    event.events = (uint32_t)events;
    CALL(epoll_ctl, set, EPOLL_CTL_ADD, fds[world][which], &event);
    rc = CALL(epoll_wait, set, &got, 1, 0);
    CALL(close, set);
    return result_of(rc < 0 ? rc : (long)got.events, NULL);
}

static result do_kevent(int world, int which, int unused)
{
    struct kevent changes[2], got[2];
    struct timespec now = {0, 0};
    int set = CALL(kqueue);
    long count, told = 0;
    (void)unused;
    EV_SET(&changes[0], (uintptr_t)fds[world][which], EVFILT_READ, EV_ADD, 0, 0, NULL);
    EV_SET(&changes[1], (uintptr_t)fds[world][which], EVFILT_WRITE, EV_ADD, 0, 0, NULL);
    count = CALL(kevent, set, changes, 2, NULL, 0, NULL);
    if (count == 0) {
        count = CALL(kevent, set, NULL, 0, got, 2, &now);
    }
    for (long i = 0; i < count; i++) {
        told += (got[i].filter == EVFILT_READ ? 1 : 16) * ((got[i].flags & EV_EOF) != 0 ? 3 : 1);
    }
    CALL(close, set);
    return result_of(count < 0 ? count : told, NULL);
}

static result do_error(int world, int which, int unused)
{
    int error = 0;
    socklen_t size = sizeof error;
    long rc = CALL(getsockopt, fds[world][which], SOL_SOCKET, SO_ERROR, &error, &size);
    (void)unused;
    return result_of(rc < 0 ? rc : error, NULL);
}

static result do_getpeername(int world, int which, int unused)
{
    struct sockaddr_un address;
    socklen_t size = sizeof address;
    long rc = CALL(getpeername, fds[world][which], (struct sockaddr *)&address, &size);
    (void)unused;
    return result_of(rc < 0 ? rc : (long)size, NULL);
}

/* Over TCP it depends on when the other side acknowledges. */
static result do_outq(int world, int which, int unused)
{
    int kept = 0;
    long rc = CALL(ioctl, fds[world][which], TIOCOUTQ, &kept);
    (void)unused;
    return result_of(rc < 0 ? rc : kept != 0 && !over_tcp, NULL);
}

static result do_accept(int world, int which, int unused)
{
    struct sockaddr_un address;
    socklen_t size = sizeof address;
    int rc = CALL(accept4, fds[world][which], (struct sockaddr *)&address, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    result made = result_of(rc < 0 ? rc : (long)size, NULL);
    (void)unused;
    if (rc >= 0) {
        CALL(close, rc);
    }
    return made;
}

/* A connection that waits in the listener, and ends there: 0 = not, 1 = in good order, 2 = by a reset. */
static result do_visit(int world, int which, int how)
{
    struct sockaddr_un address;
    struct linger now = {1, 0};
    socklen_t size = sizeof address;
    int fd, rc;
    (void)which;
    CALL(getsockname, fds[world][2], (struct sockaddr *)&address, &size);
    fd = CALL(socket, ((struct sockaddr *)&address)->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    rc = CALL(connect, fd, (struct sockaddr *)&address, size);
    if (world == MODEL) {
        k_deliver();
    }
    if (how == 2) {
        CALL(setsockopt, fd, SOL_SOCKET, SO_LINGER, &now, (socklen_t)sizeof now);
    }
    CALL(close, fd);
    return result_of(rc, NULL);
}

typedef struct operation {
    const char *name;
    result (*function)(int world, int which, int value);
    int values[4];
} operation;

static const operation operations[] = {
    {"send", do_send, {1, 10, 700, 100}},
    {"sendmsg", do_sendmsg, {3, 30, 900, 1}},
    {"recv", do_recv, {1, 10, 1000, 4000}},
    {"peek", do_peek, {1, 10, 1000, 4000}},
    {"shutdown", do_shutdown, {SHUT_WR, SHUT_WR, SHUT_WR, SHUT_RDWR}},
    {"close", do_close, {0, 0, 1, 0}},
    {"poll", do_poll, {POLLIN, POLLOUT, POLLIN | POLLOUT, POLLIN | POLLOUT | POLLRDHUP}},
    {"epoll", do_epoll, {EPOLLIN, EPOLLOUT, 0, EPOLLIN | EPOLLOUT | EPOLLRDHUP}},
    {"kevent", do_kevent, {0, 0, 0, 0}},
    {"error", do_error, {0, 0, 0, 0}},
    {"getpeername", do_getpeername, {0, 0, 0, 0}},
    {"outq", do_outq, {0, 0, 0, 0}},
    {"visit", do_visit, {0, 1, 2, 0}},
    {"accept", do_accept, {0, 0, 0, 0}},
};

enum { SEND, SENDMSG, RECV, PEEK, SHUTDOWN, CLOSE, POLL, EPOLL, KEVENT, ERROR, GETPEERNAME, OUTQ, VISIT, ACCEPT,
       KINDS };

/* ---- both worlds --------------------------------------------------------------------------*/

static void open_world(int world)
{
    k_address address;
    socklen_t size = sizeof(sa_family_t) + 12;
    int domain = over_tcp ? AF_INET : AF_UNIX, on = 1;
    memset(&address, 0, sizeof address);
    address.any.sa_family = (sa_family_t)domain;
    if (over_tcp) {
        size = sizeof address.four;
        address.four.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    } else {
        snprintf(address.local.sun_path + 1, 12, "k%010d", (int)getpid());
    }
    fds[world][2] = CALL(socket, domain, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    CALL(bind, fds[world][2], &address.any, size);
    CALL(listen, fds[world][2], 8);
    if (over_tcp) {
        size = sizeof address;
        CALL(getsockname, fds[world][2], &address.any, &size);
    }
    fds[world][0] = CALL(socket, domain, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    CALL(connect, fds[world][0], &address.any, size);
    if (world == MODEL) {
        k_deliver();
    }
    fds[world][1] = CALL(accept4, fds[world][2], NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fds[world][1] < 0) {
        printf("no connection: %s\n", strerror(errno));
        exit(1);
    }
    for (int which = 0; which < 2 && over_tcp; which++) { /* so that bytes arrive at once */
        CALL(setsockopt, fds[world][which], IPPROTO_TCP, TCP_NODELAY, &on, (socklen_t)sizeof on);
    }
}

static void open_worlds(bool tcp)
{
    k_boot();
    over_tcp = tcp;
    text_size = 0;
    written = 0;
    open_world(REAL);
    open_world(MODEL);
}

static void close_worlds(void)
{
    for (int which = 0; which < 3; which++) {
        if (fds[MODEL][which] >= 0) {
            close(fds[REAL][which]);
            k_close(fds[MODEL][which]);
        }
        fds[MODEL][which] = -1;
    }
    k_deliver();
    if (k.live_files != 3) {
        printf("FAIL the model has kept %ld files\n", k.live_files - 3);
        failed++;
    }
}

static bool is_the_same(result a, result b)
{
    return a.rc == b.rc && a.code == b.code && a.sum == b.sum;
}

/* What TCP does takes effect behind the call, in the real kernel: a difference counts when it stays. */
static bool is_late(int kind, result real, result model)
{
    bool looks = kind >= POLL && kind <= OUTQ && kind != ERROR;
    return !is_the_same(real, model) &&
           (looks || (kind == PEEK) || (real.rc < 0 && real.code == EAGAIN) || (kind == ERROR && real.rc == 0));
}

/* Make a call in both worlds. false = they differ. */
static bool make(int kind, int which, int value)
{
    const operation *what = &operations[kind];
    result model, real;
    if (fds[MODEL][which] < 0) {
        return true;
    }
    model = what->function(MODEL, which, value);
    real = what->function(REAL, which, value);
    for (int tries = 0; tries < 200 && over_tcp && is_late(kind, real, model); tries++) {
        usleep(100);
        real = what->function(REAL, which, value);
    }
    written += 13;
    if (kind == CLOSE) {
        fds[MODEL][which] = -1;
    }
    text_size += (size_t)snprintf(text + text_size, sizeof text - text_size,
                                  "    %s(%d, %d) = real %ld %s, model %ld %s\n", what->name, which, value, real.rc,
                                  real.code != 0 ? strerrorname_np(real.code) : "", model.rc,
                                  model.code != 0 ? strerrorname_np(model.code) : "");
    return is_the_same(real, model);
}

static void judge(bool good, const char *name)
{
    if (good) {
        passed++;
        return;
    }
    failed++;
    printf("FAIL %s, over %s:\n%s", name, over_tcp ? "TCP" : "unix sockets", text);
}

/* ---- scripts ------------------------------------------------------------------------------*/

enum { END = -1 };

typedef struct step {
    int kind, which, value;
} step;

#define ALL_EVENTS (POLLIN | POLLOUT | POLLRDHUP)

static const struct {
    const char *name;
    step steps[16];
} scripts[] = {
    {"bytes come in order, and in parts",
     {{SEND, 0, 100}, {POLL, 1, ALL_EVENTS}, {RECV, 1, 10}, {PEEK, 1, 50}, {RECV, 1, 4000}, {RECV, 1, 1}, {END, 0, 0}}},
    {"a FIN is an end, behind the bytes",
     {{SEND, 0, 10}, {SHUTDOWN, 0, SHUT_WR}, {POLL, 1, ALL_EVENTS}, {KEVENT, 1, 0}, {RECV, 1, 4}, {RECV, 1, 40},
      {RECV, 1, 4}, {RECV, 1, 4}, {SEND, 1, 5}, {RECV, 0, 5}, {SEND, 0, 1}, {SHUTDOWN, 0, SHUT_WR}, {END, 0, 0}}},
    {"two FINs are a hang-up",
     {{SHUTDOWN, 0, SHUT_WR}, {POLL, 0, ALL_EVENTS}, {KEVENT, 0, 0}, {SHUTDOWN, 1, SHUT_WR}, {POLL, 0, ALL_EVENTS},
      {POLL, 1, ALL_EVENTS}, {KEVENT, 0, 0}, {KEVENT, 1, 0}, {RECV, 0, 1}, {RECV, 1, 1}, {SEND, 0, 1},
      {SHUTDOWN, 1, SHUT_WR}, {GETPEERNAME, 1, 0}, {END, 0, 0}}},
    {"a close with everything read is a FIN, and what comes then a reset",
     {{CLOSE, 1, 0}, {POLL, 0, ALL_EVENTS}, {GETPEERNAME, 0, 0}, {SEND, 0, 5}, {POLL, 0, ALL_EVENTS}, {KEVENT, 0, 0},
      {SEND, 0, 5}, {RECV, 0, 5}, {SEND, 0, 5}, {ERROR, 0, 0}, {END, 0, 0}}},
    {"a close with bytes unread is a reset",
     {{SEND, 0, 50}, {SEND, 1, 20}, {CLOSE, 1, 0}, {POLL, 0, ALL_EVENTS}, {EPOLL, 0, 0}, {KEVENT, 0, 0}, {RECV, 0, 5},
      {RECV, 0, 50}, {RECV, 0, 5}, {RECV, 0, 5}, {SEND, 0, 5}, {POLL, 0, ALL_EVENTS}, {END, 0, 0}}},
    {"a reset, and the error of a send",
     {{CLOSE, 1, 1}, {POLL, 0, ALL_EVENTS}, {SEND, 0, 5}, {SEND, 0, 5}, {RECV, 0, 5}, {SHUTDOWN, 0, SHUT_WR},
      {GETPEERNAME, 0, 0}, {POLL, 0, ALL_EVENTS}, {END, 0, 0}}},
    {"a reset behind a FIN",
     {{SHUTDOWN, 1, SHUT_WR}, {POLL, 0, ALL_EVENTS}, {CLOSE, 1, 1}, {POLL, 0, ALL_EVENTS}, {RECV, 0, 5}, {SEND, 0, 5},
      {SEND, 0, 5}, {ERROR, 0, 0}, {END, 0, 0}}},
    {"a reset's error is asked for once",
     {{CLOSE, 1, 1}, {ERROR, 0, 0}, {ERROR, 0, 0}, {RECV, 0, 5}, {POLL, 0, ALL_EVENTS}, {END, 0, 0}}},
    {"connections that end before they are accepted",
     {{ACCEPT, 2, 0}, {VISIT, 2, 0}, {POLL, 2, ALL_EVENTS}, {ACCEPT, 2, 0}, {ACCEPT, 2, 0}, {VISIT, 2, 2},
      {ACCEPT, 2, 0}, {ACCEPT, 2, 0}, {END, 0, 0}}},
    {"a listener takes no bytes",
     {{SEND, 2, 1}, {RECV, 2, 1}, {GETPEERNAME, 2, 0}, {KEVENT, 2, 0}, {END, 0, 0}}},
};

static void run_scripts(void)
{
    for (size_t i = 0; i < sizeof scripts / sizeof scripts[0]; i++) {
        for (int tcp = 0; tcp < 2; tcp++) {
            bool good = true;
            open_worlds(tcp != 0);
            for (const step *next = scripts[i].steps; next->kind != END && good; next++) {
                good = make(next->kind, next->which, next->value);
            }
            judge(good, scripts[i].name);
            close_worlds();
        }
    }
}

/* Until nothing has moved for a fifth of a second: TCP acknowledges what it has taken some time later. */
static void drive(bool tcp, bool fills)
{
    static char data[65536];
    for (int world = 0; world < WORLDS; world++) {
        for (int idle = 0; idle < (world == REAL && tcp ? 200 : 1); idle++) {
            while ((fills ? CALL(send, fds[world][0], data, sizeof data, MSG_DONTWAIT | MSG_NOSIGNAL)
                          : CALL(recv, fds[world][1], data, sizeof data, MSG_DONTWAIT)) > 0) {
                idle = 0;
            }
            usleep(world == REAL && tcp ? 1000 : 0);
        }
    }
}

/* What fills up: sizes differ, but not that a full pipe is not writable, and one that has been read is. */
static void fill(bool tcp)
{
    bool good;
    open_worlds(tcp);
    drive(tcp, true);
    good = make(SEND, 0, 100) && make(POLL, 0, POLLIN | POLLOUT);
    drive(tcp, false);
    good = good && make(RECV, 1, 10) && make(POLL, 0, POLLIN | POLLOUT) && make(KEVENT, 0, 0) && make(SEND, 0, 10) &&
           make(RECV, 1, 100);
    judge(good, "what is full cannot be written to, and what is empty can");
    close_worlds();
}

/* ---- other descriptors --------------------------------------------------------------------*/

#define SAME(what, expression)                                                                                        \
    do {                                                                                                              \
        result results[WORLDS];                                                                                       \
        for (int world = 0; world < WORLDS; world++) {                                                                \
            errno = 0;                                                                                                \
            results[world] = result_of((long)(expression), NULL);                                                     \
        }                                                                                                             \
        text_size += (size_t)snprintf(text + text_size, sizeof text - text_size,                                      \
                                      "    %s: real %ld %d, model %ld %d\n", what,                                 \
                                      results[0].rc, results[0].code, results[1].rc, results[1].code);          \
        good = good && is_the_same(results[0], results[1]);                                                           \
    } while (0)

static void compare_others(void)
{
    int pipes[WORLDS][2], sets[WORLDS], wakes[WORLDS], nulls[WORLDS];
    uint64_t number = 1;
    struct epoll_event event;
    char data[64];
    bool good = true;
    open_worlds(false);
    memset(&event, 0, sizeof event);
    event.events = EPOLLIN;
    for (int world = 0; world < WORLDS; world++) {
        good = good && CALL(pipe, pipes[world]) == 0;
        CALL(fcntl, pipes[world][0], F_SETFL, O_NONBLOCK);
        CALL(fcntl, pipes[world][1], F_SETFL, O_NONBLOCK);
        sets[world] = CALL(epoll_create1, 0);
        wakes[world] = CALL(eventfd, 0, EFD_NONBLOCK);
        nulls[world] = CALL(open, "/dev/null", O_RDWR);
    }
    SAME("an empty pipe", CALL(read, pipes[world][0], data, 10));
    SAME("an empty eventfd", CALL(read, wakes[world], data, 64));
    SAME("add", CALL(epoll_ctl, sets[world], EPOLL_CTL_ADD, wakes[world], &event));
    SAME("add again", CALL(epoll_ctl, sets[world], EPOLL_CTL_ADD, wakes[world], &event));
    SAME("change what is not there", CALL(epoll_ctl, sets[world], EPOLL_CTL_MOD, pipes[world][0], &event));
    SAME("remove what is not there", CALL(epoll_ctl, sets[world], EPOLL_CTL_DEL, pipes[world][0], &event));
    SAME("add what is not open", CALL(epoll_ctl, sets[world], EPOLL_CTL_ADD, 200, &event));
    SAME("add /dev/null", CALL(epoll_ctl, sets[world], EPOLL_CTL_ADD, nulls[world], &event));
    SAME("nothing yet", CALL(epoll_wait, sets[world], &event, 1, 0));
    SAME("wake", CALL(write, wakes[world], &number, sizeof number));
    SAME("it is there", CALL(epoll_wait, sets[world], &event, 1, 0));
    SAME("it stays there", CALL(epoll_wait, sets[world], &event, 1, 0));
    SAME("take", CALL(read, wakes[world], data, 64));
    SAME("it is gone", CALL(epoll_wait, sets[world], &event, 1, 0));
    SAME("write", CALL(write, pipes[world][1], "12345", 5));
    SAME("read", CALL(read, pipes[world][0], data, 3));
    SAME("the writer goes", CALL(close, pipes[world][1]));
    SAME("the rest", CALL(read, pipes[world][0], data, 30));
    SAME("the end", CALL(read, pipes[world][0], data, 30));
    SAME("close-on-exec", CALL(fcntl, pipes[world][0], F_GETFD));
    SAME("set it", CALL(fcntl, pipes[world][0], F_SETFD, FD_CLOEXEC));
    SAME("it is set", CALL(fcntl, pipes[world][0], F_GETFD));
    SAME("a number that is closed", CALL(fcntl, 200, F_GETFD));
    for (int world = 0; world < WORLDS; world++) {
        CALL(close, pipes[world][0]);
        CALL(close, sets[world]);
        CALL(close, wakes[world]);
        CALL(close, nulls[world]);
    }
    judge(good, "pipes, eventfd, epoll's errors, descriptors");
    close_worlds();
}

/* Connects that fail, and addresses in use. */
static void compare_connects(void)
{
    int clients[WORLDS] = {-1, -1}, lone[WORLDS] = {-1, -1};
    struct sockaddr_in nobody[WORLDS];
    struct sockaddr_un path;
    bool good = true;
    socklen_t size = sizeof nobody[0];
    open_worlds(true);
    memset(&path, 0, sizeof path);
    path.sun_family = AF_UNIX;
    snprintf(path.sun_path, sizeof path.sun_path, "build/kernel_test.sock");
    unlink(path.sun_path);
    for (int world = 0; world < WORLDS; world++) { /* a port at which nobody listens */
        memset(&nobody[world], 0, sizeof nobody[world]);
        nobody[world].sin_family = AF_INET;
        nobody[world].sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        lone[world] = CALL(socket, AF_INET, SOCK_STREAM, 0);
        CALL(bind, lone[world], (struct sockaddr *)&nobody[world], size);
        CALL(getsockname, lone[world], (struct sockaddr *)&nobody[world], &size);
        clients[world] = CALL(socket, AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    }
    SAME("poll what is not connected", do_poll(world, 2, POLLIN | POLLOUT).rc);
    SAME("bind what is bound", CALL(bind, clients[world], (struct sockaddr *)&nobody[world], size));
    SAME("connect", CALL(connect, clients[world], (struct sockaddr *)&nobody[world], size));
    for (int world = 0; world < WORLDS; world++) {
        fds[world][4] = clients[world];
    }
    usleep(2000);
    k_deliver();
    SAME("it is refused", do_poll(world, 4, POLLIN | POLLOUT | POLLRDHUP).rc);
    SAME("kevent", do_kevent(world, 4, 0).rc);
    SAME("why", do_error(world, 4, 0).rc);
    SAME("once", do_error(world, 4, 0).rc);
    SAME("send", do_send(world, 4, 3).rc);
    for (int world = 0; world < WORLDS; world++) {
        CALL(close, clients[world]);
        CALL(close, lone[world]);
        clients[world] = CALL(socket, AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
        lone[world] = CALL(socket, AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    }
    SAME("a path that is not there", CALL(connect, clients[world], (struct sockaddr *)&path, sizeof path));
    SAME("bind", CALL(bind, lone[world], (struct sockaddr *)&path, sizeof path));
    SAME("nobody listens", CALL(connect, clients[world], (struct sockaddr *)&path, sizeof path));
    SAME("listen", CALL(listen, lone[world], 5));
    SAME("connected", CALL(connect, clients[world], (struct sockaddr *)&path, sizeof path));
    for (int world = 0; world < WORLDS; world++) {
        CALL(close, lone[world]);
        fds[world][4] = clients[world];
    }
    SAME("the listener is closed", do_poll(world, 4, POLLIN | POLLOUT).rc);
    SAME("and the client reset", do_recv(world, 4, 3).rc);
    for (int world = 0; world < WORLDS; world++) {
        CALL(close, clients[world]);
    }
    unlink(path.sun_path);
    judge(good, "connects that fail");
    close_worlds();
}

/* ---- random sequences ---------------------------------------------------------------------*/

static uint64_t state;

static unsigned random_below(unsigned below)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(state >> 33) % below;
}

static void run_random(unsigned long sequences, unsigned long seed)
{
    unsigned long calls = 0;
    int before = passed;
    for (unsigned long i = 0; i < sequences && failed < 5; i++) {
        char name[64];
        bool good = true;
        state = (seed + i) * 2654435761u + 1;
        random_below(2);
        open_worlds(random_below(3) != 0);
        for (unsigned count = 4 + random_below(20); count > 0 && good; count--, calls++) {
            int kind = (int)random_below(KINDS);
            int which = kind == VISIT || kind == ACCEPT ? 2 : (int)random_below(2);
            if (kind == CLOSE && random_below(4) != 0) {
                kind = RECV;
            }
            good = make(kind, which, operations[kind].values[random_below(4)]);
        }
        snprintf(name, sizeof name, "random sequence %lu", seed + i);
        judge(good, name);
        close_worlds();
    }
    printf("%d random sequences, %lu calls in each kernel\n", passed - before, calls);
    passed = before + (passed != before); /* one test */
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    run_scripts();
    fill(false);
    fill(true);
    compare_others();
    compare_connects();
    run_random(argc > 1 ? strtoul(argv[1], NULL, 10) : 2000, argc > 2 ? strtoul(argv[2], NULL, 10) : 1);
    printf("%d passed, %d failed, 0 skipped\n", passed, failed);
    return failed != 0;
}
