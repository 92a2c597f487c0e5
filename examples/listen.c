/* listen.c - the first of three ways to start: one process.
 *
 *   cc -o listen examples/listen.c
 *   ./listen [port]                   then: nc 127.0.0.1 8888
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <stdio.h>
#include <stdlib.h>

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address;
    (void)context;
    return tsrv_printf(stream, "hello from worker %d\n", tsrv_task_id()); /* -1: there are none */
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8888;
    tsrv_server_options options = {0};
    tsrv_server *server;
    options.handle_stream = handle_stream;
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, port, "127.0.0.1", NULL) != TSRV_OK) {
        return 1; /* the reason has been logged */
    }
    printf("listen: listening on port %d\n", port);
    fflush(stdout);
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
