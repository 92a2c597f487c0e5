/* The floor: an echo server of lines on bare epoll, by hand. What comes is read into one buffer that all connections
 * share and is sent back from there, a run of whole lines at a time; only an unfinished line, or what the kernel does
 * not take, is kept for its connection. It has no timeouts and no log, and can do nothing else.
 *   raw_epoll <port> */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_LINE ((size_t)1 << 20)
#define BUFFER ((size_t)64 << 10)
#define SMALL 4096
#define SPARES 16
#define EVENTS 256

typedef struct bytes {
    char *data;
    size_t size, room;
} bytes;

typedef struct connection {
    int fd;
    bool blocked;  /* there is output: nothing more is read before it is sent */
    bytes in;      /* an unfinished line */
    bytes out;     /* what the kernel has not taken */
    size_t out_at; /* of which so much was sent since */
} connection;

static char buffer[BUFFER];
static bytes spare[SPARES];
static int spares;
static int epoll_fd;

/* Large buffers are kept for the next long line, or each would cost the page faults of a new one. */
static void release(bytes *b)
{
    if (b->room >= BUFFER && spares < SPARES) {
        spare[spares++] = *b;
    } else {
        free(b->data);
    }
    memset(b, 0, sizeof *b);
}

static bool reserve(bytes *b, size_t size)
{
    size_t room = b->room > 0 ? b->room : 1024;
    char *data;
    if (b->data == NULL && size > SMALL && spares > 0) {
        *b = spare[--spares];
        b->size = 0;
        room = b->room;
    }
    if (size <= b->room) {
        return true;
    }
    while (room < size) {
        room *= 2;
    }
    data = realloc(b->data, room);
    if (data == NULL) {
        return false;
    }
    b->data = data;
    b->room = room;
    return true;
}

static void end(connection *c)
{
    close(c->fd);
    release(&c->in);
    release(&c->out);
    free(c);
}

static void wait_for(connection *c, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = c};
    epoll_ctl(epoll_fd, operation, c->fd, &event);
}

/* What the kernel has not taken is sent from where it is, if it has a buffer of its own, and is copied otherwise. */
static bool keep_unsent(connection *c, const char *data, size_t size, size_t sent)
{
    c->blocked = true;
    wait_for(c, EPOLL_CTL_MOD, EPOLLOUT);
    if (data == c->in.data && size == c->in.size) {
        c->out = c->in;
        c->out_at = sent;
        memset(&c->in, 0, sizeof c->in);
        return true;
    }
    if (!reserve(&c->out, size - sent)) {
        return false;
    }
    memcpy(c->out.data, data + sent, size - sent);
    c->out.size = size - sent;
    c->out_at = 0;
    return true;
}

static bool send_or_keep(connection *c, const char *data, size_t size)
{
    ssize_t sent = send(c->fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) {
        return false;
    }
    sent = sent < 0 ? 0 : sent;
    return (size_t)sent == size || keep_unsent(c, data, size, (size_t)sent);
}

static bool on_writable(connection *c)
{
    ssize_t sent = send(c->fd, c->out.data + c->out_at, c->out.size - c->out_at, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
        return errno == EAGAIN;
    }
    c->out_at += (size_t)sent;
    if (c->out_at == c->out.size) {
        release(&c->out);
        c->blocked = false;
        wait_for(c, EPOLL_CTL_MOD, EPOLLIN);
    }
    return true;
}

/* Sends back the whole lines of data, of which the first `seen` bytes have no end of a line. Looks at every line, as a
 * server has to that does something with them. Returns how many bytes were whole lines. */
static bool echo_lines(connection *c, const char *data, size_t size, size_t seen, size_t *done)
{
    const char *end_of_line, *at = data + seen;
    *done = 0;
    while ((end_of_line = memchr(at, '\n', (size_t)(data + size - at))) != NULL) {
        at = end_of_line + 1;
        *done = (size_t)(at - data);
    }
    return *done == 0 || send_or_keep(c, data, *done);
}

/* The first part of a line: it moves out of the shared buffer. */
static bool keep_rest(connection *c, const char *data, size_t size)
{
    if (size == 0) {
        return true;
    }
    if (!reserve(&c->in, size)) {
        return false;
    }
    memcpy(c->in.data, data, size);
    c->in.size = size;
    return true;
}

/* More of an unfinished line: it is read behind the first part. */
static bool read_more(connection *c)
{
    size_t seen = c->in.size, done;
    ssize_t got;
    if (!reserve(&c->in, seen + BUFFER)) {
        return false;
    }
    got = recv(c->fd, c->in.data + seen, c->in.room - seen, MSG_DONTWAIT);
    if (got <= 0) {
        return got < 0 && errno == EAGAIN;
    }
    c->in.size += (size_t)got;
    if (!echo_lines(c, c->in.data, c->in.size, seen, &done)) {
        return false;
    }
    if (c->in.data == NULL) {
        return true; /* it is output now */
    }
    c->in.size -= done;
    if (c->in.size == 0) {
        release(&c->in);
    } else if (done > 0) {
        memmove(c->in.data, c->in.data + done, c->in.size);
    }
    return c->in.size <= MAX_LINE;
}

static bool on_readable(connection *c)
{
    size_t done;
    ssize_t got;
    if (c->in.size > 0) {
        return read_more(c);
    }
    got = recv(c->fd, buffer, sizeof buffer, MSG_DONTWAIT);
    if (got <= 0) {
        return got < 0 && errno == EAGAIN;
    }
    return echo_lines(c, buffer, (size_t)got, 0, &done) && keep_rest(c, buffer + done, (size_t)got - done);
}

static void on_connections(int listener)
{
    for (int i = 0; i < 64; i++) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        connection *c = fd < 0 ? NULL : calloc(1, sizeof *c);
        if (c == NULL) {
            return;
        }
        c->fd = fd;
        wait_for(c, EPOLL_CTL_ADD, EPOLLIN);
    }
}

static int listen_on(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* accepted sockets inherit it */
    if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, 4096) != 0) {
        perror("listen");
        exit(1);
    }
    return fd;
}

int main(int argc, char **argv)
{
    struct epoll_event event = {.events = EPOLLIN}, events[EVENTS];
    int listener = listen_on(argc > 1 ? atoi(argv[1]) : 8888);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int count = epoll_wait(epoll_fd, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            connection *c = events[i].data.ptr;
            if (c == NULL) {
                on_connections(listener);
            } else if (!(c->blocked ? on_writable(c) : on_readable(c))) {
                end(c);
            }
        }
    }
}
