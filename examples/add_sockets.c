/* add_sockets.c - the third of three ways to start: fork where you like.
 *
 *   cc -o add_sockets examples/add_sockets.c
 *   ./add_sockets [port [processes]]  then: nc 127.0.0.1 8888; kill -TERM ends it gracefully
 *
 * What is made before the fork is shared by all workers, what is made after it is each one's own.
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <stdio.h>
#include <stdlib.h>

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address;
    return tsrv_printf(stream, "hello from worker %d\n", *(int *)context);
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8888, processes = argc > 2 ? atoi(argv[2]) : 0;
    int fds[8], count = tsrv_bind_sockets(port, "127.0.0.1", NULL, fds, 8), task, rc;
    tsrv_server_options options = {0};
    tsrv_server *server;
    if (count < 0) {
        fprintf(stderr, "add_sockets: port %d: %s\n", port, tsrv_strerror(count));
        return 1;
    }
    printf("add_sockets: listening on port %d\n", port);
    task = tsrv_fork_processes(processes, NULL);
    if (task < 0) {
        return task == TSRV_EPARENT ? 0 : 1; /* this is the parent, and its workers have ended */
    }
    options.handle_stream = handle_stream;
    options.context = &task;
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_add_sockets(server, fds, count) != TSRV_OK) {
        return 1; /* this worker is forked again, a little later */
    }
    rc = tsrv_loop_run(NULL);
    tsrv_server_free(server);
    tsrv_loop_free(NULL);
    return rc == TSRV_OK ? 0 : 1;
}
