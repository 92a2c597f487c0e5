/* Included before an example, so that its servers run in callback mode: the same handler has to do in
 * both. */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

static inline int callback_server_new(tsrv_server **server, const tsrv_server_options *options)
{
    tsrv_server_options changed = *options;
    changed.mode = TSRV_CALLBACK;
    return tsrv_server_new(server, &changed);
}
#define tsrv_server_new callback_server_new

static inline int callback_serve(int port, const char *address, int num_processes,
                                 const tsrv_server_options *options)
{
    tsrv_server_options changed = *options;
    changed.mode = TSRV_CALLBACK;
    return tsrv_serve(port, address, num_processes, &changed);
}
#define tsrv_serve callback_serve
