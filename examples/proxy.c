/* proxy.c - passes every connection on to another server, and what that one answers back.
 *
 *   cc -o proxy examples/proxy.c
 *   ./proxy [port] [host] [port]      for instance in front of http.c: ./http 8080 &
 *   ./proxy 8888 127.0.0.1 8080       then: curl --noproxy '*' http://127.0.0.1:8888/
 * When the server is told to end, tunnels stay until an end closes them, or grace_ms is over. A proxy
 * of your own, such as SOCKS, can have tunnel, copy and copy_back as they are. */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <stdio.h>
#include <stdlib.h>

#define IDLE_MS 300000 /* a tunnel through which nothing comes for so long is given up */

static const char *host = "127.0.0.1";
static int port = 80;

/* The two connections of one client, on the stack of handle_stream, which outlives copy_back. */
typedef struct tunnel {
    tsrv_stream *client, *server;
    int64_t moved_ms; /* when something has come, from either side */
    int copying;      /* how many directions go on */
    bool done;        /* copy_back will not look at this any more */
} tunnel;

/* Copies one direction until it ends. A write waits while its receiver is slow, and nothing is read
 * meanwhile: so the sender is slowed down, too. The end of the input is passed on as an end, and
 * the other direction goes on; anything else, such as a reset, is passed on as a reset. */
static void copy(tunnel *t, tsrv_stream *from, tsrv_stream *to)
{
    tsrv_slice some;
    int rc = TSRV_OK;
    while (rc == TSRV_OK) {
        if ((rc = tsrv_read_some(from, 0, &some)) == TSRV_OK) {
            t->moved_ms = tsrv_loop_now_ms(NULL);
            rc = tsrv_write(to, some.data, some.size);
        } else if (rc == TSRV_ETIMEOUT && tsrv_loop_now_ms(NULL) - t->moved_ms < IDLE_MS) {
            rc = TSRV_OK; /* there is life in the other direction */
        }
    }
    if (rc == TSRV_EOF) { /* or this server stops, which is no end to be passed on */
        rc = tsrv_stopping(from) ? (int)TSRV_OK : tsrv_shutdown(to);
    }
    t->copying--;
    tsrv_wake(to); /* the other direction may be here already: */
    while (rc == TSRV_OK && t->copying > 0) {
        tsrv_wait(from,
                  TSRV_NEVER); /* for that one's end, or a reset behind the end of the input */
        rc = tsrv_fd(from) < 0 ? (int)TSRV_ECLOSED : tsrv_error(from);
    }
    if (rc != TSRV_OK) {
        tsrv_abort(from);
        tsrv_abort(to);
    }
}

static void copy_back(void *context)
{
    tunnel *t = (tunnel *)context;
    copy(t, t->server, t->client);
    t->done = true;
    tsrv_wake(t->client);
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tunnel t = {stream, NULL, tsrv_loop_now_ms(NULL), 2, false};
    int rc = tsrv_connect(host, port, NULL, &t.server);
    (void)address, (void)context;
    if (rc == TSRV_OK && (rc = tsrv_spawn(NULL, copy_back, &t)) == TSRV_OK) {
        tsrv_set_timeout(t.server, IDLE_MS, 0);
        copy(&t, t.client, t.server);
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
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_address bound;
    host = argc > 2 ? argv[2] : host;
    port = argc > 3 ? atoi(argv[3]) : port;
    options.handle_stream = handle_stream;
    options.read_timeout_ms = IDLE_MS;
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1", NULL) != TSRV_OK ||
        tsrv_server_address(server, 0, &bound) != TSRV_OK) {
        return 1;
    }
    printf("proxy: listening on port %d\n", tsrv_address_port(&bound));
    fflush(stdout);
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
