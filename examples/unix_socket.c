/* unix_socket.c - serves on a socket file that only its owner and group may open, and tells each
 * client who it is.
 *
 *   cc -o unix_socket examples/unix_socket.c
 *   ./unix_socket [path]              then: nc -U unix_socket.sock
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

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

static void on_start(tsrv_server *server, void *context)
{
    (void)server;
    printf("unix_socket: listening on %s\n", (const char *)context);
    fflush(stdout);
}

/* The library removes the file at the end. What a program has to tidy up itself stands behind
 * tsrv_serve, where tsrv_task_id() is negative: workers, if there are any, come there too. */
int main(int argc, char **argv)
{
    static char path[] = "unix_socket.sock";
    char address[TSRV_ADDRESS_SIZE];
    tsrv_bind_options bind_options = {0};
    tsrv_server_options options = {0};
    options.context = argc > 1 ? argv[1] : path;
    snprintf(address, sizeof(address), "unix:%s", (const char *)options.context);
    bind_options.unix_mode = 0660;
    options.handle_stream = handle_stream;
    options.on_start = on_start;
    options.idle_timeout_ms = 300000;
    options.bind = &bind_options;
    return tsrv_serve(0, address, 1, &options) == TSRV_OK ? 0 : 1; /* the log has said why */
}
