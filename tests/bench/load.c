/* The load: one thread that talks to a server on 127.0.0.1 for a limited time, and prints one line of JSON.
 *   load -m line  -p port   lines to an echo server; each that comes back is followed by the next one, or with -R
 *                           they are sent at a fixed rate, and times count from when a line should have been sent
 *   load -m churn -p port   connect, one line, close; all of it is one request
 *   load -m up|down -p port uploads or downloads of 64 MiB, one after the other, see raw_transfer.c
 *   load -m idle  -p port   connections that do nothing: prints READY, and keeps them until its input ends
 * Options:
 *   -c connections (1)    -s bytes of a line (64)    -P lines of a connection under way (1)    -R lines a second
 *   -i idle connections beside the busy ones (0)     -n requests after which it ends           -u pid of the server
 *   -w seconds of warm-up (0.15)                     -t seconds that are measured (1) */
#define _GNU_SOURCE
#include "bench.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define BUFFER ((size_t)256 << 10)
#define EVENTS 512
#define AHEAD 256 /* lines of a connection under way at a fixed rate, at most */

typedef struct connection {
    int fd;
    size_t sent_at, received_at; /* where in a line it is */
    size_t unsent;               /* bytes that the kernel has not taken */
    uint64_t *times;             /* a ring: when each line under way was sent */
    unsigned oldest, under_way;
    uint64_t began; /* churn */
} connection;

static const char *mode = "line";
static int port, connections = 1, depth = 1, idle, server_pid;
static size_t size = 64;
static double seconds = 1, warm_up = 0.15, rate;
static uint64_t most_requests = UINT64_MAX;

static char *pattern; /* one line behind the other, longer than a line and a buffer */
static size_t pattern_size;
static char buffer[BUFFER];
static int epoll_fd;
static uint64_t requests, errors;
static window measured;
static uint64_t measure_from, measure_until;
static bool measuring;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

/* ---- times of answers: 64 classes for each power of two, so that an error is below 2 % ---- */

static uint64_t classes[64 * 64], answers;

static void add_time(uint64_t ns)
{
    int power = ns < 64 ? 0 : 63 - __builtin_clzll(ns) - 5;
    uint64_t within = power == 0 ? ns : (ns >> (power - 1)) & 63;
    classes[power * 64 + (int)within]++;
    answers++;
}

/* In microseconds. */
static double time_below_which(double part)
{
    uint64_t wanted = (uint64_t)(part * (double)answers), count = 0;
    for (int i = 0; i < 64 * 64; i++) {
        count += classes[i];
        if (count > wanted) {
            int power = i / 64, within = i % 64;
            return (power == 0 ? within : (double)((uint64_t)(64 + within) << (power - 1))) / 1e3;
        }
    }
    return 0;
}

/* ---- the time that is measured ---- */

static void start_clock(void)
{
    uint64_t now = now_ns();
    measure_from = now + (uint64_t)(warm_up * 1e9);
    measure_until = measure_from + (uint64_t)(seconds * 1e9);
}

/* Is there more to do? What was counted while it warmed up is forgotten. */
static bool goes_on(void)
{
    uint64_t now = now_ns();
    if (!measuring && now >= measure_from) {
        measuring = true;
        memset(classes, 0, sizeof classes);
        requests = answers = 0;
        window_begin(&measured, server_pid);
    }
    return now < measure_until && errors < 100 && !(measuring && requests >= most_requests);
}

static void report(void)
{
    window_report(&measured, requests, errors);
    printf(", \"p50_us\": %.1f, \"p99_us\": %.1f}\n", time_below_which(0.5), time_below_which(0.99));
}

/* ---- connections ---- */

/* Connections come from many addresses, or the ports would run out. */
static int dial(int number)
{
    struct sockaddr_in from = {.sin_family = AF_INET}, to = {.sin_family = AF_INET};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    if (fd < 0) {
        fail("socket");
    }
    from.sin_addr.s_addr = htonl(0x7f000002u + (uint32_t)number % 200);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port = htons((uint16_t)port);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&from, sizeof from) != 0 || connect(fd, (struct sockaddr *)&to, sizeof to) != 0) {
        fail("connect");
    }
    return fd;
}

static void watch(connection *c)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event) != 0) {
        fail("epoll_ctl");
    }
}

static void send_all(int fd, const char *data, size_t count)
{
    while (count > 0) {
        ssize_t sent = send(fd, data, count, MSG_NOSIGNAL);
        if (sent <= 0) {
            fail("send");
        }
        data += sent;
        count -= (size_t)sent;
    }
}

/* Connections that have sent a line, had it back, and are silent from then on. */
static int *dial_idle(int count, bool speak)
{
    int *fds = calloc((size_t)count + 1, sizeof *fds);
    for (int i = 0; i < count; i++) {
        fds[i] = dial(i);
        if (speak) {
            send_all(fds[i], pattern, size);
        }
    }
    for (int i = 0; i < count && speak; i++) {
        if (recv(fds[i], buffer, size, MSG_WAITALL) != (ssize_t)size) {
            fail("recv");
        }
    }
    return fds;
}

/* ---- line ---- */

static void send_more(connection *c)
{
    while (c->unsent > 0) {
        size_t part = pattern_size - c->sent_at < c->unsent ? pattern_size - c->sent_at : c->unsent;
        ssize_t sent = send(c->fd, pattern + c->sent_at, part, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) {
            fail("send");
        }
        if (sent < 0) {
            return;
        }
        c->unsent -= (size_t)sent;
        c->sent_at = (c->sent_at + (size_t)sent) % size;
    }
}

/* A connection that has too many lines under way already has this one counted as an error. */
static void add_line(connection *c, uint64_t now)
{
    if (c->under_way == AHEAD) {
        errors++;
        return;
    }
    c->times[(c->oldest + c->under_way++) % AHEAD] = now;
    c->unsent += size;
}

static void take_answers(connection *c, size_t count)
{
    uint64_t now = now_ns();
    for (size_t i = 0; i < count; i++) {
        add_time(now - c->times[c->oldest]);
        c->oldest = (c->oldest + 1) % AHEAD;
        c->under_way--;
        if (rate == 0) {
            add_line(c, now);
        }
    }
    requests += count;
    send_more(c);
}

static void receive_lines(connection *c)
{
    ssize_t got;
    while ((got = recv(c->fd, buffer, BUFFER, MSG_DONTWAIT)) > 0) {
        if (memcmp(buffer, pattern + c->received_at, (size_t)got) != 0) {
            fprintf(stderr, "load: what came back is not what was sent\n");
            exit(1);
        }
        c->received_at += (size_t)got;
        if (c->received_at >= size) {
            size_t count = c->received_at / size;
            c->received_at %= size;
            take_answers(c, count);
        }
        if ((size_t)got < BUFFER) {
            return;
        }
    }
    if (got == 0 || errno != EAGAIN) {
        fail("recv");
    }
}

/* Sends what is due. The loop does not sleep at a fixed rate, and so never oversleeps. */
static void send_due(connection *all, uint64_t *due)
{
    static int next;
    for (uint64_t now = now_ns(); *due <= now; *due += (uint64_t)(1e9 / rate)) {
        connection *c = &all[next];
        next = (next + 1) % connections;
        add_line(c, *due);
        send_more(c);
    }
}

static connection *dial_lines(void)
{
    connection *all = calloc((size_t)connections, sizeof *all);
    for (int i = 0; i < connections; i++) {
        all[i].times = calloc(AHEAD, sizeof *all[i].times);
        all[i].fd = dial(i);
        watch(&all[i]);
    }
    return all;
}

static void lines(void)
{
    struct epoll_event events[EVENTS];
    int *silent = dial_idle(idle, true);
    connection *all = dial_lines();
    uint64_t due = now_ns();
    start_clock();
    for (int i = 0; i < connections && rate == 0; i++) {
        for (int k = 0; k < depth; k++) {
            add_line(&all[i], now_ns());
        }
        send_more(&all[i]);
    }
    while (goes_on()) {
        if (rate > 0) {
            send_due(all, &due);
        }
        int count = epoll_wait(epoll_fd, events, EVENTS, rate > 0 ? 0 : 100);
        for (int i = 0; i < count; i++) {
            connection *c = events[i].data.ptr;
            send_more(c);
            if ((events[i].events & ~(uint32_t)EPOLLOUT) != 0) {
                receive_lines(c);
            }
        }
    }
    report();
    free(silent);
}

/* ---- churn ---- */

/* It closes with a reset, which leaves no port in TIME_WAIT. */
static void churn_begin(connection *c)
{
    static int number;
    struct linger reset = {1, 0};
    c->began = now_ns();
    c->received_at = 0;
    c->fd = dial(number++);
    setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    send_all(c->fd, pattern, size);
    watch(c);
}

static void churn_receive(connection *c)
{
    ssize_t got = recv(c->fd, buffer, size - c->received_at, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) {
        return;
    }
    c->received_at += got > 0 ? (size_t)got : 0;
    if (got > 0 && c->received_at < size) {
        return;
    }
    if (got > 0) {
        requests++;
        add_time(now_ns() - c->began);
    } else {
        errors++;
    }
    close(c->fd);
    churn_begin(c);
}

static void churn(void)
{
    struct epoll_event events[EVENTS];
    connection *all = calloc((size_t)connections, sizeof *all);
    start_clock();
    for (int i = 0; i < connections; i++) {
        churn_begin(&all[i]);
    }
    while (goes_on()) {
        int count = epoll_wait(epoll_fd, events, EVENTS, 100);
        for (int i = 0; i < count; i++) {
            churn_receive(events[i].data.ptr);
        }
    }
    report();
}

/* ---- up, down ---- */

static void receive_all(int fd, size_t count)
{
    while (count > 0) {
        ssize_t got = recv(fd, buffer, count < BUFFER ? count : BUFFER, 0);
        if (got <= 0) {
            fail("recv");
        }
        count -= (size_t)got;
    }
}

static void transfer(int fd, bool up)
{
    send_all(fd, up ? "up\n" : "down\n", up ? 3 : 5);
    for (size_t sent = 0; up && sent < TRANSFER; sent += BUFFER) {
        send_all(fd, buffer, BUFFER);
    }
    receive_all(fd, up ? 3 : TRANSFER);
}

/* The clock is looked at between transfers only, so that none is counted by half. */
static void transfers(bool up)
{
    int fd = dial(0);
    start_clock();
    while (goes_on() || requests == 0) {
        uint64_t began = now_ns();
        transfer(fd, up);
        requests++;
        add_time(now_ns() - began);
    }
    report();
}

/* ---- idle ---- */

static void keep_idle(void)
{
    int *fds = dial_idle(connections, size > 1), dead = 0;
    struct pollfd input = {.fd = 0, .events = POLLIN};
    printf("READY\n");
    fflush(stdout);
    poll(&input, 1, 60000);
    for (int i = 0; i < connections; i++) {
        ssize_t got = recv(fds[i], buffer, 1, MSG_DONTWAIT);
        dead += got == 0 || (got < 0 && errno != EAGAIN);
    }
    printf("{\"dead\": %d}\n", dead);
}

static void make_pattern(void)
{
    pattern_size = (BUFFER / size + 2) * size;
    pattern = malloc(pattern_size);
    for (size_t i = 0; i < pattern_size; i++) {
        pattern[i] = i % size == size - 1 ? '\n' : (char)('a' + i % size % 26);
    }
}

static void options(int argc, char **argv)
{
    for (int option; (option = getopt(argc, argv, "m:p:c:s:P:R:i:n:u:w:t:")) != -1;) {
        switch (option) {
        case 'm': mode = optarg; break;
        case 'p': port = atoi(optarg); break;
        case 'c': connections = atoi(optarg); break;
        case 's': size = (size_t)atol(optarg); break;
        case 'P': depth = atoi(optarg); break;
        case 'R': rate = atof(optarg); break;
        case 'i': idle = atoi(optarg); break;
        case 'n': most_requests = strtoull(optarg, NULL, 10); break;
        case 'u': server_pid = atoi(optarg); break;
        case 'w': warm_up = atof(optarg); break;
        case 't': seconds = atof(optarg); break;
        default: exit(2);
        }
    }
    if (port <= 0 || connections < 1 || size < 1 || depth < 1 || depth > AHEAD || !(seconds <= 60)) {
        fprintf(stderr, "load: the arguments are described at the top of load.c\n");
        exit(2);
    }
}

int main(int argc, char **argv)
{
    options(argc, argv);
    make_pattern();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (strcmp(mode, "line") == 0) {
        lines();
    } else if (strcmp(mode, "churn") == 0) {
        churn();
    } else if (strcmp(mode, "idle") == 0) {
        keep_idle();
    } else {
        transfers(strcmp(mode, "up") == 0);
    }
    return errors > 0 ? 3 : 0;
}
