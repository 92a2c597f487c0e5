/* unix_socket.c - serves on a socket file that only its owner and group may open, and tells each
 * client who it is.
 *
 *   cc -o unix_socket examples/unix_socket.c
 *   ./unix_socket [path]              then: nc -U unix_socket.sock
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>

/* The kernel knows who called connect: nobody can lie about it. */
static void greet(tsrv_stream *stream)
{
#ifdef __linux__
    struct ucred peer;
    socklen_t size = sizeof(peer);
    if (getsockopt(tsrv_fd(stream), SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0) {
        tsrv_printf(stream, "hello, user %ld in process %ld\n", (long)peer.uid, (long)peer.pid);
        return;
    }
#endif
    tsrv_printf(stream, "hello, whoever you are\n");
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address;
    (void)context;
    greet(stream);
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK &&
           (rc = tsrv_write(stream, line.data, line.size)) == TSRV_OK) {
    }
    return rc;
}

static void on_signal(void *context)
{
    (void)context;
    tsrv_loop_stop(NULL);
}

int main(int argc, char **argv)
{
    const char *path = argc > 1 ? argv[1] : "unix_socket.sock";
    tsrv_bind_options bind_options = {0};
    tsrv_server_options options = {0};
    tsrv_signal interrupted = {0}, terminated = {0};
    tsrv_server *server;
    int fd, rc;
    bind_options.unix_mode = 0660;
    options.handle_stream = handle_stream;
    options.idle_timeout_ms = 300000;
    if ((rc = tsrv_bind_unix_socket(path, &bind_options, &fd)) != TSRV_OK) {
        fprintf(stderr, "unix_socket: %s: %s\n", path, tsrv_strerror(rc));
        return 1;
    }
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_add_sockets(server, &fd, 1) != TSRV_OK ||
        tsrv_signal_start(NULL, &interrupted, SIGINT, on_signal, NULL) != TSRV_OK ||
        tsrv_signal_start(NULL, &terminated, SIGTERM, on_signal, NULL) != TSRV_OK) {
        return 1;
    }
    printf("unix_socket: listening on %s\n", path);
    fflush(stdout);
    rc = tsrv_loop_run(NULL);
    tsrv_server_free(server); /* the socket's file goes too */
    return rc == TSRV_OK ? 0 : 1;
}
