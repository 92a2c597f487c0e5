/* graceful_stop.c - a server that finishes what is under way before it ends.
 *
 *   cc -o graceful_stop examples/graceful_stop.c
 *   ./graceful_stop [port]            then: nc 127.0.0.1 8888, and Ctrl-C once, or twice
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#define GRACE_MS 10000 /* what is left to the clients after the first signal */

static tsrv_signal interrupted, terminated;
static bool stopping;

/* The end of the input may be the client's or ours: while a client waits for its next line, the
 * drain makes that read return TSRV_EOF. One that is never idle is told after an answer. */
static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address;
    (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        tsrv_write(stream, line.data, line.size);
        if (tsrv_stopping(stream) && tsrv_unread_size(stream) == 0) {
            break;
        }
    }
    if (tsrv_stopping(stream)) {
        tsrv_printf(stream, "good bye\n");
    }
    return rc;
}

/* In a coroutine the drain can be waited for. After it nothing is left, and the loop ends. */
static void stop(void *context)
{
    int rc = tsrv_server_drain((tsrv_server *)context, GRACE_MS);
    printf("graceful_stop: %s\n", rc == TSRV_OK ? "all clients are served" : "some were cut off");
    fflush(stdout);
}

/* The second signal leaves the same drain one more millisecond. */
static void on_signal(void *context)
{
    tsrv_server *server = (tsrv_server *)context;
    if (stopping) {
        tsrv_server_drain(server, 1);
    } else if (tsrv_spawn(NULL, stop, server) != TSRV_OK) {
        tsrv_server_drain(server, GRACE_MS); /* no memory: it drains, and nobody waits for it */
    }
    stopping = true;
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8888, rc;
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_address bound;
    options.handle_stream = handle_stream;
    options.idle_timeout_ms = 300000;
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_signal_start(NULL, &interrupted, SIGINT, on_signal, server) != TSRV_OK ||
        tsrv_signal_start(NULL, &terminated, SIGTERM, on_signal, server) != TSRV_OK ||
        tsrv_server_listen(server, port, "127.0.0.1", NULL) != TSRV_OK ||
        tsrv_server_address(server, 0, &bound) != TSRV_OK) {
        return 1;
    }
    printf("graceful_stop: listening on port %d\n", tsrv_address_port(&bound));
    fflush(stdout);
    rc = tsrv_loop_run(NULL);
    tsrv_signal_stop(&interrupted);
    tsrv_signal_stop(&terminated);
    tsrv_server_free(server);
    tsrv_loop_free(NULL);
    return rc == TSRV_OK ? 0 : 1;
}
