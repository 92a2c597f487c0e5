/* tls_server.c - a server with all that TLS has options for, in two workers that can be reloaded and upgraded, for
 * tls.sh:
 *
 *   tls_server PORT DIRECTORY PASSWORD     DIRECTORY has what tls.sh has made with openssl
 *
 * It answers a line, and a request of HTTP, with what it knows:
 *
 *   worker 1 pid 4711 TLSv1.3 asked localhost chose http/1.1 peer CN=good,O=Test
 */
#define TSRV_TLS_OPENSSL
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static tsrv_tls *other; /* for other.test */

/* What a file holds, for a server that has its certificate from elsewhere. */
static char *text_of(const char *name)
{
    static char texts[2][16384];
    static int count;
    char *text = texts[count++];
    FILE *file = fopen(name, "r");
    if (file != NULL) {
        text[fread(text, 1, sizeof texts[0] - 1, file)] = 0;
        fclose(file);
    }
    return text;
}

static int choose(const char *name, tsrv_tls **tls, void *context)
{
    (void)context;
    if (strcmp(name, "other.test") == 0) {
        *tls = other;
    }
    return strcmp(name, "refused.test") == 0 ? TSRV_EINVAL : TSRV_OK;
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    char peer[256] = "", text[1024];
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 4096, &line)) == TSRV_OK) {
        bool http = strncmp(line.data, "GET ", 4) == 0;
        if (http && (rc = tsrv_read_until(stream, "\r\n\r\n", 8192, NULL)) != TSRV_OK) {
            break;
        }
        tsrv_tls_peer_name(stream, peer, sizeof peer);
        int size = snprintf(text, sizeof text, "worker %d pid %ld %s asked %s chose %s peer %s\n", tsrv_task_id(),
                            (long)getpid(), tsrv_tls_version(stream), tsrv_tls_server_name(stream),
                            tsrv_tls_alpn(stream), peer);
        if (http) {
            tsrv_printf(stream, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size);
        }
        tsrv_write(stream, text, (size_t)size);
    }
    return rc;
}

static void on_start(tsrv_server *server, void *context)
{
    (void)server, (void)context;
    printf("worker %d accepts\n", tsrv_task_id());
    fflush(stdout);
}

int main(int argc, char **argv)
{
    tsrv_tls_options own = {0}, others = {0};
    tsrv_fork_options fork_options = {0};
    tsrv_bind_options bind_options = {0};
    tsrv_server_options options = {0};
    if (argc != 4 || chdir(argv[2]) != 0) {
        return 2;
    }
    others.cert_pem = text_of("other.pem");
    others.key_pem = text_of("other.key");
    others.key_password = own.key_password = argv[3];
    own.cert_file = "server.pem";
    own.key_file = "server.key"; /* encrypted, as the other one is */
    own.ca_file = "ca.pem";
    own.crl_file = "ca.crl";
    own.ocsp_file = "server.ocsp";
    own.verify_client = TSRV_TLS_OPTIONAL;
    own.alpn = "h2,http/1.1";
    own.on_server_name = choose;
    fork_options.upgrade_argv = argv;
    bind_options.reuse_port = true; /* so that the kernel gives both workers their share */
    options.handle_stream = handle_stream;
    options.on_start = on_start;
    options.fork = &fork_options;
    options.bind = &bind_options;
    options.grace_ms = 2000;
    if (tsrv_tls_new(&other, &others) != TSRV_OK || tsrv_tls_new(&options.tls, &own) != TSRV_OK) {
        return 1;
    }
    return tsrv_serve(atoi(argv[1]), "127.0.0.1", 2, &options) != TSRV_OK;
}
