/* bind_start.c - the second of three ways to start: bind, then several processes.
 *
 *   cc -o bind_start examples/bind_start.c
 *   ./bind_start [port [processes]]   then: nc 127.0.0.1 8888; kill -TERM ends it gracefully
 *
 * 0 processes, the default here, is one for each processor; 1 would be this one, without a fork.
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <stdio.h>
#include <stdlib.h>

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address;
    (void)context;
    return tsrv_printf(stream, "hello from worker %d\n", tsrv_task_id());
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8888, processes = argc > 2 ? atoi(argv[2]) : 0, rc;
    tsrv_server_options options = {0};
    tsrv_server *server;
    options.handle_stream = handle_stream;
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_bind(server, port, "127.0.0.1", NULL) != TSRV_OK) {
        return 1;
    }
    printf("bind_start: listening on port %d\n", port);
    rc = tsrv_server_start(server, processes, NULL);
    if (rc == TSRV_OK) {
        rc = tsrv_loop_run(NULL); /* in each worker; after SIGTERM it returns */
    }
    tsrv_server_free(server);
    tsrv_loop_free(NULL);
    return rc == TSRV_OK || rc == TSRV_EPARENT ? 0 : 1; /* the parent comes here last */
}
