/* Without helper threads the same functions exist and say so, and nothing of pthreads is called. */
#define TSRV_NO_THREADS
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"

#include "smoke.h"

static void no_work(void *context)
{
    (void)context;
}

int main(void)
{
    SMOKE_CHECK(tsrv_work(NULL, no_work, NULL, NULL) == TSRV_ENOTSUP);
    SMOKE_CHECK(tsrv_run_in_thread(no_work, NULL) == TSRV_ENOTSUP);
    return smoke(true);
}
