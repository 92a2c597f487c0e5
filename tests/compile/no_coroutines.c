/* Without coroutines the same functions exist and say so. */
#define TSRV_NO_COROUTINES
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"

#include "smoke.h"

int main(void)
{
    tsrv_server_options options;
    tsrv_server *server = NULL;
    memset(&options, 0, sizeof(options));
    options.mode = TSRV_COROUTINE;
    options.handle_stream = smoke_handler;
    SMOKE_CHECK(tsrv_server_new(&server, &options) == TSRV_ENOTSUP);
    SMOKE_CHECK(server == NULL);
    return smoke(false);
}
