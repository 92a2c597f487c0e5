/* Included before an example, so that its servers run in callback mode: the same handler has to do in
 * both. */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

static int callback_server_new(tsrv_server **server, const tsrv_server_options *options)
{
    tsrv_server_options changed = *options;
    changed.mode = TSRV_CALLBACK;
    return tsrv_server_new(server, &changed);
}
#define tsrv_server_new callback_server_new
