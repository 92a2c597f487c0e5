/* The floor for TLS: an echo server of OpenSSL and epoll, and nothing else. No error is looked at that
 * a benchmark does not meet.
 *   openssl_echo port certificate key */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static int epoll_fd;

static void accept_one(int listener, SSL_CTX *context)
{
    struct epoll_event event;
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK), on = 1;
    SSL *ssl;
    if (fd < 0) {
        return;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    ssl = SSL_new(context);
    SSL_set_fd(ssl, fd);
    SSL_set_accept_state(ssl);
    event.events = EPOLLIN;
    event.data.ptr = ssl;
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

static void echo(SSL *ssl)
{
    static char buffer[65536];
    int got;
    while ((got = SSL_read(ssl, buffer, sizeof buffer)) > 0) {
        SSL_write(ssl, buffer, got);
    }
    if (SSL_get_error(ssl, got) != SSL_ERROR_WANT_READ) {
        close(SSL_get_fd(ssl));
        SSL_free(ssl);
    }
}

int main(int argc, char **argv)
{
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());
    struct epoll_event event, events[64];
    struct sockaddr_in address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    if (argc < 4 || SSL_CTX_use_certificate_chain_file(context, argv[2]) != 1 ||
        SSL_CTX_use_PrivateKey_file(context, argv[3], SSL_FILETYPE_PEM) != 1) {
        return 1;
    }
    SSL_CTX_set_read_ahead(context, 1);
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((unsigned short)atoi(argv[1]));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 128) != 0) {
        return 1;
    }
    epoll_fd = epoll_create1(0);
    event.events = EPOLLIN;
    event.data.ptr = NULL;
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int count = epoll_wait(epoll_fd, events, 64, -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr == NULL) {
                accept_one(listener, context);
            } else {
                echo((SSL *)events[i].data.ptr);
            }
        }
    }
}
