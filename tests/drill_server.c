/* drill_server.c - example http's handler in workers that can be reloaded and upgraded, and a client that
 * looks at a drain: for drill.sh.
 *
 *   drill_server PORT WORKERS PIDFILE     serves; PIDFILE gets the parent's pid
 *   drill_server probe PORT PID COUNT     tells PID to end while a request is under way, and counts how
 *                                         many of COUNT new connections are refused meanwhile
 */
#define main http_main
int http_main(int argc, char **argv);
#include "../examples/http.c"
#undef main

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>

/* Returns a socket that connects, or -1: it was refused at once. */
static int connect_to(int port)
{
    struct sockaddr_in address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), code = 0;
    struct pollfd connected = {fd, POLLOUT, 0};
    socklen_t size = sizeof code;
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        code = errno;
    }
    if (code == EINPROGRESS && poll(&connected, 1, 100) == 1) {
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &code, &size);
    }
    if (code == ECONNREFUSED) {
        close(fd);
        return -1;
    }
    return fd;
}

static int count_refused(int port, int count)
{
    int refused = 0;
    for (int i = 0; i < count; i++) {
        int fd = connect_to(port);
        refused += fd < 0;
        close(fd);
    }
    return refused;
}

/* Returns whether there is an answer within five seconds. */
static bool has_answer(int fd)
{
    char answer[256];
    struct pollfd ready = {fd, POLLIN, 0};
    return poll(&ready, 1, 5000) == 1 && recv(fd, answer, sizeof answer, 0) > 0;
}

/* A request and half of the next, the signal, at most a second for it to be seen, the connections, and
 * the other half. */
static int probe(int port, pid_t pid, int count)
{
    static const char first[] = "HEAD / HTTP/1.1\r\nHost: x\r\n\r\nHEAD / HTTP/1.1\r\n";
    static const char second[] = "Host: x\r\n\r\n";
    int fd = connect_to(port), refused, waited = 0;
    if (fd < 0 || send(fd, first, sizeof first - 1, MSG_NOSIGNAL) < 0 || !has_answer(fd) ||
        kill(pid, SIGTERM) != 0) {
        perror("probe");
        return 1;
    }
    while (waited < 1000 && count_refused(port, 1) == 0) {
        poll(NULL, 0, 20);
        waited += 20;
    }
    refused = count_refused(port, count);
    if (send(fd, second, sizeof second - 1, MSG_NOSIGNAL) < 0 || !has_answer(fd)) {
        printf("refused %d of %d; the request under way was cut\n", refused, count);
        return 1;
    }
    printf("refused %d of %d; the request under way was answered\n", refused, count);
    return refused == count ? 0 : 1;
}

int main(int argc, char **argv)
{
    tsrv_fork_options fork_options = {0};
    tsrv_server_options options = {0};
    FILE *file;
    if (argc == 5) {
        return probe(atoi(argv[2]), (pid_t)atoi(argv[3]), atoi(argv[4]));
    }
    if (argc != 4 || (file = fopen(argv[3], "w")) == NULL) {
        return 2;
    }
    fprintf(file, "%ld\n", (long)getpid());
    fclose(file);
    fork_options.upgrade_argv = argv;
    options.fork = &fork_options;
    options.handle_stream = handle_stream;
    options.on_start = on_start;
    options.read_timeout_ms = 30000;
    options.grace_ms = 20000;
    return tsrv_serve(atoi(argv[1]), "127.0.0.1", atoi(argv[2]), &options) != TSRV_OK;
}
