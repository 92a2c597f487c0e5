/* Included before an example, so that each of its reads has limits of time. */
#define TCPSERVER_IMPLEMENTATION
#include "../../tcpserver.h"

static inline int timed_server_new(tsrv_server **server, const tsrv_server_options *options)
{
    tsrv_server_options changed = *options;
    changed.read_timeout_ms = 30000;
    changed.idle_timeout_ms = 60000;
    return tsrv_server_new(server, &changed);
}
#define tsrv_server_new timed_server_new
