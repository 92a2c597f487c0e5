/* With TLS compiled in, as C and as C++; a context without files is a client's. */
#define TSRV_TLS_OPENSSL
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"

#include "smoke.h"

int main(void)
{
    tsrv_tls *tls;
    SMOKE_CHECK(tsrv_tls_new(&tls, NULL) == TSRV_OK);
    tsrv_tls_free(tls);
    return smoke(true);
}
