/* Lines to an echo server, in rounds: every connection sends its lines, then each reads them back. So a server sees
 * the same calls in every run, and can be measured by counting.
 *   lines <port> <connections> <lines of a round> <bytes of a line> <rounds> [<pid>]
 * With the server's pid it prints the page faults that each round has cost it, a line for a round. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static struct pollfd ends[1000];
static size_t sent[1000], received[1000];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int dial(int port)
{
    struct sockaddr_in address = {0};
    int fd = -1, on = 1;
    address.sin_family = AF_INET;
    address.sin_port = htons((unsigned short)port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int tries = 0; tries < 1000; tries++) { /* until the server listens */
        fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0) {
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
            return fd;
        }
        close(fd);
        usleep(10000);
    }
    fail("connect");
    return -1;
}

/* Minor faults of a process, from its stat; 0 without one. */
static long faults_of(const char *pid)
{
    char path[64], text[1024] = "";
    long faults = 0;
    if (pid == NULL) {
        return 0;
    }
    snprintf(path, sizeof path, "/proc/%s/stat", pid);
    FILE *file = fopen(path, "r");
    if (file == NULL || fread(text, 1, sizeof text - 1, file) == 0 ||
        sscanf(strrchr(text, ')') + 1, " %*c %*d %*d %*d %*d %*d %*u %ld", &faults) != 1) {
        fail(path);
    }
    fclose(file);
    return faults;
}

static void play_round(int count, const char *lines, char *buffer, size_t size)
{
    int over = 0;
    for (int i = 0; i < count; i++) {
        sent[i] = received[i] = 0;
        while (sent[i] < size) {
            ssize_t n = send(ends[i].fd, lines + sent[i], size - sent[i], MSG_DONTWAIT);
            if (n < 0) {
                break;
            }
            sent[i] += (size_t)n;
        }
        ends[i].events = (short)(POLLIN | (sent[i] < size ? POLLOUT : 0));
    }
    while (over < count) {
        if (poll(ends, (nfds_t)count, 30000) <= 0) {
            fail("poll");
        }
        for (int i = 0; i < count; i++) {
            if (ends[i].revents & POLLOUT) {
                ssize_t n = send(ends[i].fd, lines + sent[i], size - sent[i], MSG_DONTWAIT);
                sent[i] += n > 0 ? (size_t)n : 0;
                ends[i].events = (short)(POLLIN | (sent[i] < size ? POLLOUT : 0));
            }
            if (ends[i].revents & ~POLLOUT) {
                ssize_t n = recv(ends[i].fd, buffer, size - received[i], MSG_DONTWAIT);
                if (n == 0 || (n < 0 && errno != EAGAIN)) {
                    fail("recv");
                }
                received[i] += n > 0 ? (size_t)n : 0;
                if (received[i] == size) {
                    over++;
                    ends[i].events = 0;
                }
            }
        }
    }
}

int main(int argc, char **argv)
{
    if (argc < 6) {
        fprintf(stderr, "usage: lines <port> <connections> <lines> <bytes> <rounds> [<pid>]\n");
        return 2;
    }
    int count = atoi(argv[2]), lines = atoi(argv[3]), rounds = atoi(argv[5]);
    size_t line = (size_t)atol(argv[4]), size = line * (size_t)lines;
    const char *pid = argc > 6 ? argv[6] : NULL;
    char *data = malloc(size), *buffer = malloc(size);
    if (data == NULL || buffer == NULL || count > 1000) {
        fail("malloc");
    }
    memset(data, 'x', size);
    for (int i = 1; i <= lines; i++) {
        data[(size_t)i * line - 1] = '\n';
    }
    for (int i = 0; i < count; i++) {
        ends[i].fd = dial(atoi(argv[1]));
    }
    for (int round = 0; round < rounds; round++) {
        long faults = faults_of(pid);
        play_round(count, data, buffer, size);
        if (pid != NULL) {
            printf("%ld\n", faults_of(pid) - faults);
        }
    }
    return 0;
}
