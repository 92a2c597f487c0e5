/* embed_loop.c - the library inside a program that has a loop of its own: here poll(), which also
 * watches stdin. What is typed goes to every client, and what they send is printed.
 *
 *   cc -o embed_loop examples/embed_loop.c
 *   ./embed_loop [port]               then: nc 127.0.0.1 8888; Ctrl-D ends it
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address;
    (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        fwrite(line.data, 1, line.size, stdout);
        fflush(stdout);
    }
    return rc;
}

/* Returns false at the end of stdin. */
static bool send_stdin(tsrv_server *server)
{
    char text[4096];
    tsrv_stream *s;
    ssize_t size = read(STDIN_FILENO, text, sizeof(text));
    if (size <= 0) {
        return size < 0 && (errno == EINTR || errno == EAGAIN);
    }
    for (s = tsrv_server_next(server, NULL); s != NULL; s = tsrv_server_next(server, s)) {
        if (tsrv_try_write(s, text, (size_t)size) == TSRV_EFULL) {
            tsrv_abort(s);
        }
    }
    return true;
}

/* The program's loop: three calls are all that the library needs of it. How long it may sleep is
 * asked last, because what was done before may have left work or started a timer. */
static int run(tsrv_loop *loop, tsrv_server *server)
{
    struct pollfd fds[2] = {{STDIN_FILENO, POLLIN, 0}, {-1, POLLIN, 0}};
    int rc;
    if ((fds[1].fd = tsrv_loop_fd(loop)) < 0) {
        return fds[1].fd; /* the poll backend has no such descriptor */
    }
    do {
        if (poll(fds, 2, tsrv_loop_timeout_ms(loop)) < 0) {
            if (errno != EINTR) {
                return -errno;
            }
            fds[0].revents = 0;
        }
        if (fds[0].revents != 0 && !send_stdin(server)) {
            fds[0].fd = -1;                  /* poll() leaves it out from now on */
            tsrv_server_drain(server, 5000); /* after it nothing is left: the loop returns 0 */
        }
        rc = tsrv_loop_run_once(loop, 0);
    } while (rc > 0);
    return rc;
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8888, rc;
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_address bound;
    options.handle_stream = handle_stream;
    options.idle_timeout_ms = 3600000; /* what is typed counts, too */
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, port, "127.0.0.1", NULL) != TSRV_OK ||
        tsrv_server_address(server, 0, &bound) != TSRV_OK) {
        return 1;
    }
    printf("embed_loop: listening on port %d\n", tsrv_address_port(&bound));
    fflush(stdout);
    rc = run(tsrv_loop_current(), server);
    if (rc < 0) {
        fprintf(stderr, "embed_loop: %s\n", tsrv_strerror(rc));
    }
    tsrv_server_free(server);
    return rc < 0 ? 1 : 0;
}
