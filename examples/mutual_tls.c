/* mutual_tls.c - clients show a certificate, and choose one of two protocols by ALPN.
 *
 *   make cert                         makes build/cert.pem and build/key.pem, which serve both ends
 *   cc -o mutual_tls examples/mutual_tls.c -lssl -lcrypto
 *   ./mutual_tls [port [certificate [key [CA]]]]
 *
 * then: openssl s_client -quiet -connect 127.0.0.1:8888 -CAfile build/cert.pem -alpn upper \
 *               -cert build/cert.pem -key build/key.pem
 */
#define TSRV_TLS_OPENSSL
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Answers each line in capitals, or as it is. */
static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line, certificate;
    int rc = tsrv_wait_for_handshake(stream); /* it speaks first, and wants to know to whom */
    bool upper = strcmp(tsrv_tls_alpn(stream), "upper") == 0;
    (void)address;
    (void)context;
    if (rc != TSRV_OK || (rc = tsrv_tls_peer_certificate(stream, &certificate)) != TSRV_OK) {
        return rc;
    }
    tsrv_printf(stream, "%s, %s, your certificate has %lu bytes\n", tsrv_tls_version(stream),
                upper ? "upper" : "echo", (unsigned long)certificate.size);
    while ((rc = tsrv_read_until(stream, "\n", 1024, &line)) == TSRV_OK) {
        for (size_t i = 0; i < line.size; i++) {
            char c = upper ? (char)toupper((unsigned char)line.data[i]) : line.data[i];
            tsrv_write(stream, &c, 1);
        }
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
    tls_options.ca_file =
        argc > 4 ? argv[4] : tls_options.cert_file; /* whom clients must come from */
    tls_options.verify_client = TSRV_TLS_REQUIRED;
    tls_options.alpn = "upper,echo";
    options.handle_stream = handle_stream;
    options.idle_timeout_ms = 300000; /* the handshake has its own, of 10 s */
    if (tsrv_tls_new(&options.tls, &tls_options) != TSRV_OK ||
        tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, port, "127.0.0.1", NULL) != TSRV_OK) {
        return 1;
    }
    printf("mutual_tls: listening on port %d\n", port);
    fflush(stdout);
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
