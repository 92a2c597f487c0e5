/* Uploads and downloads with tcpserver.h; what they are is said in raw_transfer.c. The handler does for both modes: in
 * callback mode it is called from its beginning after every wait, so what is under way is kept in tsrv_data.
 *   transfer <port> */
#define TCPSERVER_IMPLEMENTATION
#include "../../tcpserver.h"
#include "bench.h"

#include <stdlib.h>

#define BLOCK ((size_t)1 << 20)

typedef struct session {
    bool uploads;
    size_t to_send;
} session;

static char block[BLOCK];

static int receive(tsrv_stream *stream, session *s)
{
    int rc = tsrv_read_bytes(stream, TRANSFER, NULL);
    if (rc == TSRV_OK) {
        s->uploads = false;
        tsrv_printf(stream, "ok\n");
    }
    return rc;
}

/* The flush paces it: without it a handler in callback mode would write all of it at once. */
static int send_block(tsrv_stream *stream, session *s)
{
    int rc = tsrv_flush(stream);
    if (rc == TSRV_OK) {
        s->to_send -= BLOCK;
        tsrv_write(stream, block, BLOCK);
    }
    return rc;
}

static int next_command(tsrv_stream *stream, session *s)
{
    tsrv_slice line;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc == TSRV_OK) {
        s->uploads = line.data[0] == 'u';
        s->to_send = s->uploads ? 0 : TRANSFER;
    }
    return rc;
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    session *s = (session *)tsrv_data(stream);
    int rc = TSRV_OK;
    (void)address;
    (void)context;
    while (rc == TSRV_OK) {
        rc = s->uploads ? receive(stream, s) : s->to_send > 0 ? send_block(stream, s) : next_command(stream, s);
    }
    return rc;
}

int main(int argc, char **argv)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    options.handle_stream = handle_stream;
    options.data_size = sizeof(session);
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1", NULL) != TSRV_OK) {
        return 1;
    }
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
