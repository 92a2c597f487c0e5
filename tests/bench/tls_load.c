/* Lines to an echo server over TLS, in rounds: every connection sends a line, then each reads its own back. Prints one
 * line of JSON, as load.c does. Handshakes are not measured.
 *   tls_load -p port [-c connections] [-s bytes of a line] [-w seconds of warm-up] [-t seconds] [-u pid of the server] */
#define _GNU_SOURCE
#include "bench.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 1000

static SSL *sessions[MOST];
static int port, connections = 1, line_size = 64, server_pid;
static double seconds = 1, warm_up = 0.15;
static char *line, *back;

static void fail(const char *what)
{
    fprintf(stderr, "tls_load: %s\n", what);
    exit(1);
}

static SSL *dial(SSL_CTX *context)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    SSL *ssl = SSL_new(context);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        fail("no connection");
    }
    if (SSL_set_fd(ssl, fd) != 1 || SSL_connect(ssl) != 1) {
        fail("no handshake");
    }
    return ssl;
}

static void play_round(void)
{
    for (int i = 0; i < connections; i++) {
        if (SSL_write(sessions[i], line, line_size) != line_size) {
            fail("a write has failed");
        }
    }
    for (int i = 0; i < connections; i++) {
        int got = 0, part = 0;
        while (got < line_size && (part = SSL_read(sessions[i], back + got, line_size - got)) > 0) {
            got += part;
        }
        if (got != line_size || memcmp(line, back, (size_t)line_size) != 0) {
            fail("what came back is not what was sent");
        }
    }
}

static uint64_t play_for(double time)
{
    uint64_t until = now_ns() + (uint64_t)(time * 1e9), count = 0;
    do {
        play_round();
        count += (uint64_t)connections;
    } while (now_ns() < until);
    return count;
}

static void options(int argc, char **argv)
{
    for (int option; (option = getopt(argc, argv, "p:c:s:w:t:u:")) != -1;) {
        switch (option) {
        case 'p': port = atoi(optarg); break;
        case 'c': connections = atoi(optarg); break;
        case 's': line_size = atoi(optarg); break;
        case 'w': warm_up = atof(optarg); break;
        case 't': seconds = atof(optarg); break;
        case 'u': server_pid = atoi(optarg); break;
        default: exit(2);
        }
    }
    if (port <= 0 || connections < 1 || connections > MOST || line_size < 2 || !(seconds <= 60)) {
        fail("the arguments are described at the top of tls_load.c");
    }
}

int main(int argc, char **argv)
{
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());
    window measured;
    options(argc, argv);
    line = malloc((size_t)line_size);
    back = malloc((size_t)line_size);
    memset(line, 'x', (size_t)line_size);
    line[line_size - 1] = '\n';
    for (int i = 0; i < connections; i++) {
        sessions[i] = dial(context);
    }
    play_for(warm_up);
    window_begin(&measured, server_pid);
    window_report(&measured, play_for(seconds), 0);
    printf("}\n");
    return 0;
}
