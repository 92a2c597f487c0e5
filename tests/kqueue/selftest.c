/* Tests of sys/event.h in this folder, on its own and without the library.
 * Build: cc -Itests/kqueue tests/kqueue/selftest.c -o build/kqueue_selftest -pthread */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <sys/event.h>

#include <arpa/inet.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>

static int passed, failed;

#define CHECK_INT(actual, expected)                                                                \
    check_int(__LINE__, #actual, (long long)(actual), #expected, (long long)(expected))

static void check_int(int line, const char *what, long long actual, const char *wanted,
                      long long expected)
{
    if (actual == expected) {
        passed++;
        return;
    }
    failed++;
    printf("selftest.c:%d: %s is %lld, expected %s (%lld)\n", line, what, actual, wanted, expected);
    fflush(stdout);
}

static char tag_read, tag_write, tag_other; /* only their addresses matter */
static const struct timespec zero = {0, 0};
static const struct timespec second = {1, 0};

/* Apply one change; 0 or errno. */
static int change(int kq, int fd, int filter, int flags, void *udata)
{
    struct kevent event;
    EV_SET(&event, fd, filter, flags, 0, 0, udata);
    return kevent(kq, &event, 1, NULL, 0, NULL) == 0 ? 0 : errno;
}

static int look(int kq, struct kevent *events, int nevents)
{
    return kevent(kq, NULL, 0, events, nevents, &zero);
}

/* Wait up to a second for at least one event; for what the kernel does in its own time. */
static int wait_for(int kq, struct kevent *events, int nevents)
{
    return kevent(kq, NULL, 0, events, nevents, &second);
}

static void make_pair(int pair[2])
{
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) abort();
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* pair[0] is accepted, pair[1] has connected. */
static void make_tcp_pair(int pair[2])
{
    struct sockaddr_in address;
    socklen_t size = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(&address, 0, sizeof(address));
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    pair[1] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof(address)) != 0) abort();
    if (listen(listener, 1) != 0) abort();
    if (getsockname(listener, (struct sockaddr *)&address, &size) != 0) abort();
    if (connect(pair[1], (struct sockaddr *)&address, sizeof(address)) != 0) abort();
    pair[0] = accept(listener, NULL, NULL);
    if (pair[0] < 0) abort();
    close(listener);
}

static void test_filters_are_separate(void)
{
    struct kevent events[4];
    int pair[2], kq = kqueue(), round;
    char byte;
    make_pair(pair);
    CHECK_INT(fcntl(kq, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD, &tag_read), 0);
    CHECK_INT(look(kq, events, 4), 0);
    CHECK_INT(change(kq, pair[0], EVFILT_WRITE, EV_ADD, &tag_write), 0);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].filter, EVFILT_WRITE);
    CHECK_INT(events[0].ident, pair[0]);
    CHECK_INT(events[0].udata == &tag_write, 1);
    CHECK_INT(events[0].flags & (EV_EOF | EV_ERROR), 0);
    CHECK_INT(write(pair[1], "abc", 3), 3);
    for (round = 0; round < 3; round++) { /* level-triggered: told until it is read */
        CHECK_INT(look(kq, events, 4), 2);
        CHECK_INT(events[0].filter, EVFILT_READ);
        CHECK_INT(events[0].udata == &tag_read, 1);
        CHECK_INT(events[0].data, 3 - round);
        CHECK_INT(events[1].filter, EVFILT_WRITE);
        CHECK_INT(events[1].udata == &tag_write, 1);
        CHECK_INT(read(pair[0], &byte, 1), 1);
    }
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(change(kq, pair[0], EVFILT_WRITE, EV_DELETE, NULL), 0);
    CHECK_INT(look(kq, events, 4), 0);
    CHECK_INT(write(pair[1], "d", 1), 1);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD, &tag_other), 0); /* again: modifies */
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].udata == &tag_other, 1);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_DELETE, NULL), 0);
    CHECK_INT(look(kq, events, 4), 0);
    close(pair[0]);
    close(pair[1]);
    close(kq);
}

static void test_errors(void)
{
    struct kevent events[4];
    struct timespec bad = {0, 1000000000};
    int pair[2], kq = kqueue(), closed;
    FILE *file = tmpfile();
    make_pair(pair);
    closed = dup(pair[0]);
    close(closed);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_DELETE, NULL), ENOENT);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ENABLE, NULL), ENOENT);
    CHECK_INT(change(kq, pair[0], EVFILT_WRITE, EV_ADD, NULL), 0);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_DELETE, NULL), ENOENT);
    CHECK_INT(change(kq, closed, EVFILT_READ, EV_ADD, NULL), EBADF);
    CHECK_INT(change(kq, -1, EVFILT_READ, EV_ADD, NULL), EBADF);
    CHECK_INT(change(kq, pair[0], -5, EV_ADD, NULL), EINVAL);
    CHECK_INT(change(kq, fileno(file), EVFILT_READ, EV_ADD, NULL), EPERM);
    CHECK_INT(change(-1, pair[0], EVFILT_READ, EV_ADD, NULL), EBADF);
    CHECK_INT(change(closed, pair[0], EVFILT_READ, EV_ADD, NULL), EBADF);
    CHECK_INT(change(pair[0], pair[1], EVFILT_READ, EV_ADD, NULL), EBADF);
    CHECK_INT(kevent(kq, NULL, 0, events, 4, &bad), -1);
    CHECK_INT(errno, EINVAL);
    CHECK_INT(kevent(kq, NULL, 0, NULL, 0, NULL), 0);
    fclose(file);
    close(pair[0]);
    close(pair[1]);
    close(kq);
}

/* The same memory for changes and events, as is common: errors come back first in the list, what
 * comes after them is still done, and nobody waits. */
static void test_error_events(void)
{
    struct kevent events[4];
    int pair[2], kq = kqueue();
    make_pair(pair);
    EV_SET(&events[0], pair[0], EVFILT_READ, EV_DELETE, 0, 0, &tag_other);
    EV_SET(&events[1], pair[0], EVFILT_WRITE, EV_ADD | EV_RECEIPT, 0, 0, &tag_write);
    EV_SET(&events[2], pair[1], EVFILT_WRITE, EV_ADD, 0, 0, NULL);
    CHECK_INT(kevent(kq, events, 3, events, 3, NULL), 2);
    CHECK_INT(events[0].flags, EV_ERROR);
    CHECK_INT(events[0].data, ENOENT);
    CHECK_INT(events[0].ident, pair[0]);
    CHECK_INT(events[0].udata == &tag_other, 1);
    CHECK_INT(events[1].flags, EV_ERROR);
    CHECK_INT(events[1].data, 0);
    CHECK_INT(events[1].udata == &tag_write, 1);
    CHECK_INT(look(kq, events, 4), 2);
    EV_SET(&events[0], pair[0], EVFILT_READ, EV_DELETE, 0, 0, NULL);
    EV_SET(&events[1], pair[1], EVFILT_READ, EV_DELETE, 0, 0, NULL);
    CHECK_INT(kevent(kq, events, 2, events, 1, NULL), -1); /* no room for the second */
    CHECK_INT(errno, ENOENT);
    close(pair[0]);
    close(pair[1]);
    close(kq);
}

static void test_end_of_input(void)
{
    struct kevent events[4];
    int pair[2], pipes[2], kq = kqueue();
    char buffer[8];
    make_tcp_pair(pair);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD, NULL), 0);
    CHECK_INT(write(pair[1], "bye", 3), 3);
    CHECK_INT(shutdown(pair[1], SHUT_WR), 0);
    do {
        CHECK_INT(wait_for(kq, events, 4), 1);
    } while (!(events[0].flags & EV_EOF) && failed == 0);
    CHECK_INT(events[0].data, 3); /* the data before the end counts */
    CHECK_INT(events[0].fflags, 0);
    CHECK_INT(read(pair[0], buffer, sizeof(buffer)), 3);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].flags & EV_EOF, EV_EOF);
    CHECK_INT(events[0].data, 0);
    CHECK_INT(look(kq, events, 4), 1); /* level-triggered: the end stays */
    CHECK_INT(events[0].flags & EV_EOF, EV_EOF);
    CHECK_INT(change(kq, pair[0], EVFILT_WRITE, EV_ADD, NULL), 0);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_DELETE, NULL), 0);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].flags & EV_EOF, 0); /* the other direction is still open */
    close(pair[0]);
    close(pair[1]);
    if (pipe(pipes) != 0) abort();
    CHECK_INT(change(kq, pipes[0], EVFILT_READ, EV_ADD, NULL), 0);
    close(pipes[1]);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].flags & EV_EOF, EV_EOF);
    CHECK_INT(events[0].data, 0);
    close(pipes[0]);
    close(kq);
}

static void test_reset(void)
{
    struct kevent events[4];
    struct linger linger = {1, 0};
    int pair[2], kq = kqueue();
    char buffer[8];
    make_tcp_pair(pair);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD, NULL), 0);
    CHECK_INT(setsockopt(pair[1], SOL_SOCKET, SO_LINGER, &linger, sizeof(linger)), 0);
    close(pair[1]);
    CHECK_INT(wait_for(kq, events, 4), 1);
    CHECK_INT(events[0].flags & EV_EOF, EV_EOF);
    CHECK_INT(events[0].fflags, ECONNRESET);
    CHECK_INT(change(kq, pair[0], EVFILT_WRITE, EV_ADD, NULL), 0);
    CHECK_INT(look(kq, events, 4), 2);
    CHECK_INT(events[1].flags & EV_EOF, EV_EOF);
    CHECK_INT(events[1].fflags, ECONNRESET);
    CHECK_INT(read(pair[0], buffer, sizeof(buffer)), -1); /* the error is still the program's */
    CHECK_INT(errno, ECONNRESET);
    close(pair[0]);
    close(kq);
}

/* Our own FIN is the end for writing, and only that, and of no error. */
static void test_own_end(void)
{
    struct kevent events[4];
    int tcp, round;
    for (tcp = 0; tcp < 2; tcp++) {
        int pair[2], kq = kqueue();
        if (tcp) make_tcp_pair(pair);
        else make_pair(pair);
        CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD, &tag_read), 0);
        CHECK_INT(change(kq, pair[0], EVFILT_WRITE, EV_ADD, &tag_write), 0);
        CHECK_INT(look(kq, events, 4), 1);
        CHECK_INT(events[0].flags & EV_EOF, 0);
        CHECK_INT(shutdown(pair[0], SHUT_WR), 0);
        for (round = 0; round < 2; round++) { /* level-triggered: it comes again and again */
            CHECK_INT(look(kq, events, 4), 1);
            CHECK_INT(events[0].filter, EVFILT_WRITE);
            CHECK_INT(events[0].flags & EV_EOF, EV_EOF);
            CHECK_INT(events[0].fflags, 0);
        }
        CHECK_INT(write(pair[1], "late", 4), 4);
        CHECK_INT(change(kq, pair[0], EVFILT_WRITE, EV_DELETE, NULL), 0);
        CHECK_INT(wait_for(kq, events, 4), 1);
        CHECK_INT(events[0].flags & EV_EOF, 0); /* reading goes on */
        CHECK_INT(events[0].data, 4);
        close(pair[0]);
        close(pair[1]);
        close(kq);
    }
}

/* A peer that has closed in good order ends both directions of a unix socket, without an error. */
static void test_closed_unix_peer(void)
{
    struct kevent events[4];
    int pair[2], kq = kqueue();
    make_pair(pair);
    CHECK_INT(write(pair[1], "bye", 3), 3);
    close(pair[1]);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD, &tag_read), 0);
    CHECK_INT(change(kq, pair[0], EVFILT_WRITE, EV_ADD, &tag_write), 0);
    CHECK_INT(look(kq, events, 4), 2);
    CHECK_INT(events[0].flags & events[1].flags & EV_EOF, EV_EOF);
    CHECK_INT(events[0].fflags | events[1].fflags, 0);
    CHECK_INT(events[0].data, 3);
    close(pair[0]);
    close(kq);
}

/* With EV_CLEAR there is one event for each change, and none for what has not changed. */
static void test_clear(void)
{
    struct kevent events[4];
    int pair[2], kq = kqueue();
    make_pair(pair);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD | EV_CLEAR, &tag_read), 0);
    CHECK_INT(write(pair[1], "ab", 2), 2);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].data, 2);
    CHECK_INT(look(kq, events, 4), 0);
    CHECK_INT(write(pair[1], "c", 1), 1);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].data, 3);
    CHECK_INT(look(kq, events, 4), 0);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD, &tag_other), 0); /* it stays what it was, */
    CHECK_INT(look(kq, events, 4), 1); /* but is looked at anew */
    CHECK_INT(events[0].udata == &tag_other, 1);
    CHECK_INT(look(kq, events, 4), 0);
    CHECK_INT(change(kq, pair[0], EVFILT_WRITE, EV_ADD, NULL), EINVAL); /* the emulation's limit */
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_DELETE, NULL), 0);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD, &tag_read), 0);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD | EV_CLEAR, &tag_read), 0);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(look(kq, events, 4), 1); /* nor does adding make it what it was not */
    close(pair[0]);
    close(pair[1]);
    close(kq);
}

/* How the library hears of a reset while nobody reads: after our own FIN, with input unread. */
static void test_clear_until_reset(void)
{
    struct kevent events[4];
    struct linger linger = {1, 0};
    int pair[2], kq = kqueue();
    make_tcp_pair(pair);
    CHECK_INT(change(kq, pair[0], EVFILT_WRITE, EV_ADD | EV_CLEAR, &tag_write), 0);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].flags & EV_EOF, 0);
    CHECK_INT(write(pair[1], "unread", 6), 6);
    CHECK_INT(look(kq, events, 4), 0); /* input is not its business */
    CHECK_INT(shutdown(pair[0], SHUT_WR), 0);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].flags & EV_EOF, EV_EOF);
    CHECK_INT(events[0].fflags, 0);
    CHECK_INT(look(kq, events, 4), 0);
    CHECK_INT(setsockopt(pair[1], SOL_SOCKET, SO_LINGER, &linger, sizeof(linger)), 0);
    close(pair[1]);
    CHECK_INT(wait_for(kq, events, 4), 1);
    CHECK_INT(events[0].flags & EV_EOF, EV_EOF);
    CHECK_INT(events[0].fflags, ECONNRESET);
    CHECK_INT(look(kq, events, 4), 0);
    close(pair[0]);
    close(kq);
}

/* A listening socket tells how many connections wait. */
static void test_listener(void)
{
    struct kevent events[4];
    struct sockaddr_in address;
    socklen_t size = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), clients[3], kq = kqueue(), i;
    memset(&address, 0, sizeof(address));
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (struct sockaddr *)&address, sizeof(address)) != 0) abort();
    if (listen(listener, 8) != 0) abort();
    if (getsockname(listener, (struct sockaddr *)&address, &size) != 0) abort();
    CHECK_INT(change(kq, listener, EVFILT_READ, EV_ADD, &tag_read), 0);
    CHECK_INT(look(kq, events, 4), 0);
    for (i = 0; i < 3; i++) {
        clients[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(clients[i], (struct sockaddr *)&address, sizeof(address)) != 0) abort();
    }
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].data, 3);
    CHECK_INT(events[0].flags & EV_EOF, 0);
    close(accept(listener, NULL, NULL));
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].data, 2);
    for (i = 0; i < 3; i++) close(clients[i]);
    close(listener);
    close(kq);
}

static void test_closed_descriptor(void)
{
    struct kevent events[4];
    struct timespec short_time = {0, 20000000};
    int pair[2], other[2], kq = kqueue(), number, copy;
    char byte;
    make_pair(pair);
    number = pair[0];
    CHECK_INT(change(kq, number, EVFILT_READ, EV_ADD, &tag_read), 0);
    CHECK_INT(change(kq, number, EVFILT_WRITE, EV_ADD, &tag_write), 0);
    close(number);
    CHECK_INT(look(kq, events, 4), 0);
    CHECK_INT(change(kq, number, EVFILT_READ, EV_DELETE, NULL), EBADF);
    close(pair[1]);
    make_pair(pair); /* the same number again: only what is added now exists */
    CHECK_INT(pair[0], number);
    CHECK_INT(change(kq, number, EVFILT_WRITE, EV_DELETE, NULL), ENOENT);
    CHECK_INT(write(pair[1], "x", 1), 1);
    CHECK_INT(change(kq, number, EVFILT_READ, EV_ADD, &tag_other), 0);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].filter, EVFILT_READ);
    CHECK_INT(events[0].udata == &tag_other, 1);

    /* A duplicate keeps the file open, and epoll's registration of the number with it. */
    copy = dup(number);
    make_pair(other);
    CHECK_INT(change(kq, other[0], EVFILT_READ, EV_ADD, &tag_read), 0);
    close(number);
    CHECK_INT(kevent(kq, NULL, 0, events, 4, &short_time), 0);
    CHECK_INT(fcntl(kq, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    CHECK_INT(write(other[1], "x", 1), 1);
    CHECK_INT(look(kq, events, 4), 1); /* the others are still there */
    CHECK_INT(events[0].ident, other[0]);
    CHECK_INT(events[0].udata == &tag_read, 1);
    CHECK_INT(read(other[0], &byte, 1), 1);

    /* The number now belongs to another file, while the old one is still readable. */
    CHECK_INT(change(kq, copy, EVFILT_READ, EV_ADD, NULL), 0);
    number = copy;
    copy = dup(number);
    CHECK_INT(dup2(other[0], number), number);
    CHECK_INT(kevent(kq, NULL, 0, events, 4, &short_time), 0);
    CHECK_INT(dup2(copy, number), number);
    CHECK_INT(look(kq, events, 4), 0);
    CHECK_INT(change(kq, number, EVFILT_READ, EV_ADD, &tag_other), 0);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].udata == &tag_other, 1);

    /* The same, and the new one is added before anybody looks. */
    CHECK_INT(dup2(other[0], number), number);
    CHECK_INT(change(kq, number, EVFILT_READ, EV_ADD, NULL), 0);
    CHECK_INT(look(kq, events, 4), 0);

    /* Closed, and then the number of a duplicate of the same file: epoll has it still. */
    CHECK_INT(dup2(copy, number), number);
    CHECK_INT(change(kq, number, EVFILT_READ, EV_ADD, &tag_read), 0);
    close(number);
    CHECK_INT(change(kq, number, EVFILT_READ, EV_DELETE, NULL), EBADF);
    CHECK_INT(dup2(copy, number), number);
    CHECK_INT(change(kq, number, EVFILT_READ, EV_DELETE, NULL), ENOENT);
    CHECK_INT(change(kq, number, EVFILT_READ, EV_ADD, &tag_write), 0);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].udata == &tag_write, 1);
    close(number);
    close(copy);
    close(pair[1]);
    close(other[0]);
    close(other[1]);
    close(kq);
}

static void test_disable_and_oneshot(void)
{
    struct kevent events[4];
    int pair[2], kq = kqueue();
    make_pair(pair);
    CHECK_INT(write(pair[1], "x", 1), 1);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD | EV_DISABLE, &tag_read), 0);
    CHECK_INT(look(kq, events, 4), 0);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ENABLE, &tag_read), 0);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_DISABLE, &tag_read), 0);
    CHECK_INT(look(kq, events, 4), 0);
    CHECK_INT(change(kq, pair[0], EVFILT_WRITE, EV_ADD | EV_ONESHOT, &tag_write), 0);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].filter, EVFILT_WRITE);
    CHECK_INT(look(kq, events, 4), 0);
    CHECK_INT(change(kq, pair[0], EVFILT_WRITE, EV_DELETE, NULL), ENOENT);
    close(pair[1]);
    CHECK_INT(look(kq, events, 4), 0); /* disabled: not even the hang-up */
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD, &tag_other), 0);
    CHECK_INT(look(kq, events, 4), 0); /* adding what is there does not enable it */
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ENABLE, &tag_read), 0);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(events[0].flags & EV_EOF, EV_EOF);
    CHECK_INT(events[0].udata == &tag_read, 1);
    close(pair[0]);
    close(kq);
}

static void test_timeouts(void)
{
    struct kevent events[4];
    static const struct timespec times[] = {{0, 1}, {0, 1500000}, {0, 20000001}};
    int kq = kqueue();
    size_t i;
    for (i = 0; i < sizeof(times) / sizeof(times[0]); i++) {
        int64_t start = now_ns();
        CHECK_INT(kevent(kq, NULL, 0, events, 4, &times[i]), 0);
        CHECK_INT(now_ns() - start >= times[i].tv_nsec, 1); /* never early */
    }
    close(kq);
}

/* Every number of a kqueue can be used again, and a new one knows nothing of the old one. */
static void test_reused_number(void)
{
    struct kevent events[4];
    int pair[2], kq = kqueue(), number = kq;
    make_pair(pair);
    CHECK_INT(change(kq, pair[0], EVFILT_WRITE, EV_ADD, NULL), 0);
    close(kq);
    CHECK_INT(kevent(kq, NULL, 0, events, 4, &zero), -1);
    CHECK_INT(errno, EBADF);
    kq = kqueue();
    CHECK_INT(kq, number);
    CHECK_INT(look(kq, events, 4), 0);
    CHECK_INT(change(kq, pair[0], EVFILT_WRITE, EV_DELETE, NULL), ENOENT);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD, NULL), 0);
    CHECK_INT(look(kq, events, 4), 0);
    close(pair[0]);
    close(pair[1]);
    close(kq);
}

static void test_pollable(void)
{
    struct kevent events[4];
    struct pollfd item;
    int pair[2], kq = kqueue();
    char byte;
    make_pair(pair);
    memset(&item, 0, sizeof(item));
    item.fd = kq;
    item.events = POLLIN;
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD, NULL), 0);
    CHECK_INT(poll(&item, 1, 0), 0);
    CHECK_INT(write(pair[1], "x", 1), 1);
    CHECK_INT(poll(&item, 1, 0), 1);
    CHECK_INT(look(kq, events, 4), 1);
    CHECK_INT(poll(&item, 1, 0), 1); /* level-triggered here too */
    CHECK_INT(read(pair[0], &byte, 1), 1);
    CHECK_INT(look(kq, events, 4), 0);
    CHECK_INT(poll(&item, 1, 0), 0);
    close(pair[0]);
    close(pair[1]);
    close(kq);
}

/* A short list of events starves no descriptor and no filter. */
static void test_fairness(void)
{
    enum { PAIRS = 20 };
    struct kevent events[3];
    int pairs[PAIRS][2], seen[2][1024], capacity, round, i, least;
    for (capacity = 1; capacity <= 3; capacity++) {
        int kq = kqueue();
        memset(seen, 0, sizeof(seen));
        for (i = 0; i < PAIRS; i++) {
            make_pair(pairs[i]);
            CHECK_INT(write(pairs[i][1], "x", 1), 1);
            CHECK_INT(change(kq, pairs[i][0], EVFILT_READ, EV_ADD, NULL), 0);
            CHECK_INT(change(kq, pairs[i][0], EVFILT_WRITE, EV_ADD, NULL), 0);
        }
        for (round = 0; round < 4 * PAIRS; round++) {
            int count = look(kq, events, capacity);
            CHECK_INT(count >= 1 && count <= capacity, 1);
            for (i = 0; i < count; i++) seen[events[i].filter == EVFILT_WRITE][events[i].ident]++;
        }
        for (least = round, i = 0; i < PAIRS; i++) {
            int fd = pairs[i][0];
            if (seen[0][fd] < least) least = seen[0][fd];
            if (seen[1][fd] < least) least = seen[1][fd];
            close(pairs[i][0]);
            close(pairs[i][1]);
        }
        CHECK_INT(least >= 1, 1);
        close(kq);
    }
}

static void test_fork(void)
{
    int pair[2], kq = kqueue(), status = -1;
    pid_t pid;
    make_pair(pair);
    pid = fork();
    if (pid == 0) {
        struct kevent event;
        int own, ok = change(kq, pair[0], EVFILT_READ, EV_ADD, NULL) == EBADF;
        own = kqueue();
        ok = ok && change(own, pair[0], EVFILT_WRITE, EV_ADD, NULL) == 0;
        ok = ok && look(own, &event, 1) == 1;
        _exit(ok ? 0 : 1);
    }
    CHECK_INT(pid > 0, 1);
    CHECK_INT(waitpid(pid, &status, 0), pid);
    CHECK_INT(status, 0);
    CHECK_INT(change(kq, pair[0], EVFILT_READ, EV_ADD, NULL), 0);
    close(pair[0]);
    close(pair[1]);
    close(kq);
}

static void on_signal(int signo) { (void)signo; }

static void test_interrupted(void)
{
    struct kevent events[1];
    struct sigaction action, old;
    sigset_t mask, before;
    int kq = kqueue();
    memset(&action, 0, sizeof(action));
    action.sa_handler = on_signal;
    sigaction(SIGALRM, &action, &old);
    sigemptyset(&mask);
    sigaddset(&mask, SIGALRM);
    sigprocmask(SIG_UNBLOCK, &mask, &before);
    alarm(1);
    CHECK_INT(kevent(kq, NULL, 0, events, 1, NULL), -1);
    CHECK_INT(errno, EINTR);
    sigprocmask(SIG_SETMASK, &before, NULL);
    sigaction(SIGALRM, &old, NULL);
    close(kq);
}

/* Makes and closes kqueues of its own, whose numbers the threads get from each other. */
static void *thread_main(void *argument)
{
    int *wrong = (int *)argument, round, i;
    for (round = 0; round < 50; round++) {
        struct kevent events[2];
        int pair[2], kq = kqueue();
        char byte = 'x';
        make_pair(pair);
        if (change(kq, pair[0], EVFILT_READ, EV_ADD, &pair) != 0) ++*wrong;
        for (i = 0; i < 5; i++) {
            if (write(pair[1], &byte, 1) != 1) ++*wrong;
            if (kevent(kq, NULL, 0, events, 2, NULL) != 1) ++*wrong;
            if (events[0].udata != &pair || events[0].data != 1) ++*wrong;
            if (read(pair[0], &byte, 1) != 1) ++*wrong;
        }
        close(pair[0]);
        close(pair[1]);
        close(kq);
    }
    return NULL;
}

static void test_threads(void)
{
    pthread_t threads[4];
    int wrong[4] = {0, 0, 0, 0}, i;
    for (i = 0; i < 4; i++) {
        if (pthread_create(&threads[i], NULL, thread_main, &wrong[i]) != 0) abort();
    }
    for (i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        CHECK_INT(wrong[i], 0);
    }
}

static int open_descriptors(void)
{
    int fd, count = 0;
    for (fd = 0; fd < 1024; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

int main(void)
{
    int before = open_descriptors();
    test_filters_are_separate();
    test_errors();
    test_error_events();
    test_end_of_input();
    test_reset();
    test_own_end();
    test_closed_unix_peer();
    test_clear();
    test_clear_until_reset();
    test_listener();
    test_closed_descriptor();
    test_disable_and_oneshot();
    test_timeouts();
    test_reused_number();
    test_pollable();
    test_fairness();
    test_fork();
    test_interrupted();
    test_threads();
    CHECK_INT(open_descriptors(), before);
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
