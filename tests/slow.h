/* Included before an example, so that whatever it writes waits: its sends take one byte each, and one
 * byte is much to be unsent. */
#define _GNU_SOURCE /* as tcpserver.h does, which comes second here */
#include "seam.h"
#undef t_sys_send
#define t_sys_send(fd, data, size, flags) send(fd, data, (size) < 1 ? (size) : 1, flags)

#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

static inline int slow_server_new(tsrv_server **server, const tsrv_server_options *options)
{
    tsrv_server_options changed = *options;
    changed.write_high_water = 1;
    return tsrv_server_new(server, &changed);
}
#define tsrv_server_new slow_server_new
