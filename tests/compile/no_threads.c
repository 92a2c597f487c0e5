/* Without helper threads the same functions exist and say so, and nothing of pthreads is called. */
#define TSRV_NO_THREADS
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"

#include "smoke.h"

static void no_work(void *context)
{
    (void)context;
}

/* A name is looked up at once then. The listener's queue has room for the connection. */
static void connect_by_name(void *context)
{
    tsrv_stream *stream;
    int *result = SMOKE_CAST(int *, context);
    *result = tsrv_connect("localhost", *result, NULL, &stream);
    if (*result == TSRV_OK) tsrv_close(stream);
}

static int smoke_name(void)
{
    tsrv_server_options options;
    tsrv_server *server;
    tsrv_address address;
    int result;
    memset(&options, 0, sizeof(options));
    options.handle_stream = smoke_handler;
    tsrv_set_log_level(TSRV_LOG_WARNING);
    SMOKE_CHECK(tsrv_server_new(&server, &options) == TSRV_OK);
    SMOKE_CHECK(tsrv_server_bind(server, 0, "localhost", NULL) == TSRV_OK);
    SMOKE_CHECK(tsrv_server_address(server, 0, &address) == TSRV_OK);
    result = tsrv_address_port(&address);
    SMOKE_CHECK(tsrv_spawn(NULL, connect_by_name, &result) == TSRV_OK);
    SMOKE_CHECK(tsrv_loop_run(NULL) == TSRV_OK);
    SMOKE_CHECK(result == TSRV_OK);
    tsrv_server_free(server);
    return tsrv_loop_free(NULL) != TSRV_OK;
}

int main(void)
{
    SMOKE_CHECK(tsrv_work(NULL, no_work, NULL, NULL) == TSRV_ENOTSUP);
    SMOKE_CHECK(tsrv_run_in_thread(no_work, NULL) == TSRV_ENOTSUP);
    return smoke_name() != 0 ? 1 : smoke(true);
}
