// The implementation compiled as C++, and the ways C++ has to start a struct with zeros.
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"

#include "smoke.h"

int main()
{
    tsrv_server_options options = {};
    tsrv_bind_options bind_options = {};
    tsrv_loop_options loop_options = {};
    tsrv_timer timer = {};
    if (options.handle_stream != nullptr || bind_options.backlog != 0) return 1;
    if (loop_options.backend != TSRV_BACKEND_BEST || timer.callback != nullptr) return 1;
    return smoke(true);
}
