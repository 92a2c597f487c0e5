/* proxy.c - passes every connection on to another server, and what that one answers back.
 *
 *   cc -o proxy examples/proxy.c
 *   ./proxy [port] [host] [port]      then: curl --proxy "" http://127.0.0.1:8888/
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <stdio.h>
#include <stdlib.h>

typedef struct target {
    const char *host;
    int port;
} target;

/* The two connections of one client. It lives on the stack of handle_stream, which waits for done
 * before it returns. */
typedef struct tunnel {
    tsrv_stream *client;
    tsrv_stream *server;
    bool done; /* nothing will come back from the server any more */
} tunnel;

/* Copies one direction until it ends. A write waits while its receiver is slow, and nothing is read
 * meanwhile: so the sender is slowed down, too. The end of the input is passed on as an end, and
 * the other direction goes on; anything else, such as a reset, is passed on as a reset. */
static void copy(tsrv_stream *from, tsrv_stream *to)
{
    tsrv_slice some;
    int rc;
    while ((rc = tsrv_read_some(from, 0, &some)) == TSRV_OK &&
           (rc = tsrv_write(to, some.data, some.size)) == TSRV_OK) {
    }
    if (rc == TSRV_EOF) {
        tsrv_shutdown(to);
    } else {
        tsrv_abort(from);
        tsrv_abort(to);
    }
}

static void copy_back(void *context)
{
    tunnel *t = (tunnel *)context;
    copy(t->server, t->client);
    t->done = true;
    tsrv_wake(t->client);
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    const target *to = (const target *)context;
    tunnel t = {stream, NULL, false};
    int rc = tsrv_connect(to->host, to->port, NULL, &t.server);
    (void)address;
    if (rc == TSRV_OK && (rc = tsrv_spawn(NULL, copy_back, &t)) == TSRV_OK) {
        copy(t.client, t.server);
        while (!t.done) {
            tsrv_wait(stream, TSRV_NEVER);
        }
    } else {
        tsrv_abort(stream); /* the client sees a reset; the library logs rc */
    }
    if (t.server != NULL) {
        tsrv_close(t.server);
    }
    return rc;
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8888;
    target to = {argc > 2 ? argv[2] : "127.0.0.1", argc > 3 ? atoi(argv[3]) : 80};
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_address bound;
    options.handle_stream = handle_stream;
    options.context = &to;
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, port, "127.0.0.1", NULL) != TSRV_OK ||
        tsrv_server_address(server, 0, &bound) != TSRV_OK) {
        return 1;
    }
    printf("proxy: listening on port %d\n", tsrv_address_port(&bound));
    fflush(stdout);
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
