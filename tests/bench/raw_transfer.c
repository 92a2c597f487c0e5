/* The floor for uploads and downloads: recv and send on bare epoll, and nothing else. A client that sends the line "up"
 * goes on with 64 MiB, which are dropped and answered by a line; to "down" it is sent 64 MiB.
 *   raw_transfer <port> */
#define _GNU_SOURCE
#include "bench.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define BLOCK ((size_t)1 << 20)

typedef struct connection {
    int fd;
    size_t to_receive, to_send;
} connection;

static char in[64 << 10], out[BLOCK];
static int epoll_fd;

static void wait_for(connection *c, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = c};
    epoll_ctl(epoll_fd, operation, c->fd, &event);
}

/* Until the kernel takes no more. */
static bool send_on(connection *c)
{
    while (c->to_send > 0) {
        size_t size = c->to_send < BLOCK ? c->to_send : BLOCK;
        ssize_t sent = send(c->fd, out, size, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0) {
            return errno == EAGAIN;
        }
        c->to_send -= (size_t)sent;
    }
    wait_for(c, EPOLL_CTL_MOD, EPOLLIN);
    return true;
}

/* A command comes alone, or with the bytes of an upload behind it. */
static bool on_command(connection *c, size_t size)
{
    const char *end = memchr(in, '\n', size);
    if (end == NULL) {
        return false;
    }
    if (in[0] == 'd') {
        c->to_send = TRANSFER;
        wait_for(c, EPOLL_CTL_MOD, EPOLLOUT);
        return send_on(c);
    }
    c->to_receive = TRANSFER - (size - (size_t)(end + 1 - in));
    return true;
}

static bool on_readable(connection *c)
{
    ssize_t got = recv(c->fd, in, sizeof in, MSG_DONTWAIT);
    if (got <= 0) {
        return got < 0 && errno == EAGAIN;
    }
    if (c->to_receive == 0) {
        return on_command(c, (size_t)got);
    }
    c->to_receive -= (size_t)got;
    return c->to_receive > 0 || send(c->fd, "ok\n", 3, MSG_NOSIGNAL) == 3;
}

static void on_connection(int listener)
{
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    connection *c = fd < 0 ? NULL : calloc(1, sizeof *c);
    if (c != NULL) {
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
    if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, 128) != 0) {
        perror("listen");
        exit(1);
    }
    return fd;
}

int main(int argc, char **argv)
{
    struct epoll_event event = {.events = EPOLLIN}, events[64];
    int listener = listen_on(argc > 1 ? atoi(argv[1]) : 8888);
    memset(out, 'x', sizeof out);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int count = epoll_wait(epoll_fd, events, 64, -1);
        for (int i = 0; i < count; i++) {
            connection *c = events[i].data.ptr;
            if (c == NULL) {
                on_connection(listener);
            } else if (!(c->to_send > 0 ? send_on(c) : on_readable(c))) {
                close(c->fd);
                free(c);
            }
        }
    }
}
