/* echo_tls.c - the echo server over TLS.
 *
 *   make cert                         makes build/cert.pem and build/key.pem, for localhost
 *   cc -o echo_tls examples/echo_tls.c -lssl -lcrypto
 *   ./echo_tls [port [certificate [key]]]
 *
 * then: openssl s_client -quiet -connect 127.0.0.1:8888 -CAfile build/cert.pem
 */
#define TSRV_TLS_OPENSSL
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <stdio.h>
#include <stdlib.h>

/* Called before the handshake; the read waits for it. */
static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address;
    (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK &&
           (rc = tsrv_write(stream, line.data, line.size)) == TSRV_OK) {
    }
    return rc;
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8888;
    tsrv_tls_options tls_options = {0};
    tsrv_server_options options = {0};
    tsrv_server *server;
    tls_options.cert_file = argc > 2 ? argv[2] : "build/cert.pem";
    tls_options.key_file = argc > 3 ? argv[3] : "build/key.pem";
    options.handle_stream = handle_stream;
    if (tsrv_tls_new(&options.tls, &tls_options) != TSRV_OK ||
        tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, port, "127.0.0.1", NULL) != TSRV_OK) {
        return 1; /* the log has said why, and of which file */
    }
    printf("echo_tls: listening on port %d\n", port);
    fflush(stdout);
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
