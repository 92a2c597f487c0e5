/* libev: one ev_io for each connection, one buffer to read into for all; what the kernel does not take is kept.
 *   ev_echo <port> */
#define _GNU_SOURCE
#include "lines.h"

#include <errno.h>
#include <ev.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

typedef struct connection {
    ev_io io; /* first: a watcher is its connection */
    rest in, out;
    size_t out_at;
} connection;

static char buffer[64 << 10];

static void end(struct ev_loop *loop, connection *c)
{
    ev_io_stop(loop, &c->io);
    close(c->io.fd);
    lines_release(&c->in);
    lines_release(&c->out);
    free(c);
}

static void wait_for(struct ev_loop *loop, connection *c, int events)
{
    ev_io_stop(loop, &c->io);
    ev_io_set(&c->io, c->io.fd, events);
    ev_io_start(loop, &c->io);
}

static bool echo(void *context, const char *data, size_t size)
{
    connection *c = context;
    ssize_t sent = send(c->io.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) {
        return false;
    }
    sent = sent < 0 ? 0 : sent;
    return (size_t)sent == size || lines_append(&c->out, data + sent, size - (size_t)sent);
}

static bool on_writable(struct ev_loop *loop, connection *c)
{
    ssize_t sent = send(c->io.fd, c->out.data + c->out_at, c->out.size - c->out_at, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
        return errno == EAGAIN;
    }
    c->out_at += (size_t)sent;
    if (c->out_at == c->out.size) {
        lines_release(&c->out);
        c->out_at = 0;
        wait_for(loop, c, EV_READ);
    }
    return true;
}

static bool on_readable(struct ev_loop *loop, connection *c)
{
    ssize_t got = recv(c->io.fd, buffer, sizeof buffer, MSG_DONTWAIT);
    if (got <= 0) {
        return got < 0 && errno == EAGAIN;
    }
    if (!lines_feed(&c->in, buffer, (size_t)got, echo, c)) {
        return false;
    }
    if (c->out.size > 0) {
        wait_for(loop, c, EV_WRITE);
    }
    return true;
}

static void on_event(struct ev_loop *loop, ev_io *io, int events)
{
    connection *c = (connection *)io;
    if (!((events & EV_WRITE) ? on_writable(loop, c) : on_readable(loop, c))) {
        end(loop, c);
    }
}

static void on_connection(struct ev_loop *loop, ev_io *listener, int events)
{
    (void)events;
    for (int i = 0; i < 64; i++) {
        int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        connection *c = fd < 0 ? NULL : calloc(1, sizeof *c);
        if (c == NULL) {
            return;
        }
        ev_io_init(&c->io, on_event, fd, EV_READ);
        ev_io_start(loop, &c->io);
    }
}

int main(int argc, char **argv)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    struct sockaddr_in address = {.sin_family = AF_INET};
    struct ev_loop *loop = ev_default_loop(EVBACKEND_EPOLL);
    ev_io listener;
    address.sin_port = htons((unsigned short)(argc > 1 ? atoi(argv[1]) : 8888));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* accepted sockets inherit it */
    if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, 4096) != 0) {
        return 1;
    }
    ev_io_init(&listener, on_connection, fd, EV_READ);
    ev_io_start(loop, &listener);
    ev_run(loop, 0);
    return 0;
}
