/* echo.c - sends back every line, each connection in a coroutine of its own.
 *
 *   cc -o echo examples/echo.c        (or: make run)
 *   ./echo [port]                     then: nc 127.0.0.1 8888
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <stdio.h>
#include <stdlib.h>

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address;
    (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK &&
           (rc = tsrv_write(stream, line.data, line.size)) == TSRV_OK) {
    }
    return rc;
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8888;
    tsrv_server_options options = {0};
    tsrv_server *server;
    options.handle_stream = handle_stream;
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, port, NULL, NULL) != TSRV_OK) {
        return 1; /* the reason is in the log */
    }
    printf("echo: listening on port %d\n", port);
    fflush(stdout);
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
