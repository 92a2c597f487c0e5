/* app.c - a project that uses the header, as packages.sh builds it in each of the ways that README
 * has: a server, and a client that sends it a line. It is C++, too.
 *
 *   app [certificate key]             with TLS, if the package has it
 *
 * Prints the header's version, the protocol, and the line that came back.
 */
#ifdef TSRV_TLS_OPENSSL
#define TSRV_TLS_OPENSSL /* what the examples do: no warning, since the packages' has no value */
#endif
#define TCPSERVER_IMPLEMENTATION
#include <tcpserver.h>

#include <stdio.h>

static tsrv_server *server;
static tsrv_tls *tls; /* both ends'; NULL = plain TCP */
static int result;

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    (void)address, (void)context;
    return rc == TSRV_OK ? tsrv_write(stream, line.data, line.size) : rc;
}

static int ask(void)
{
    tsrv_connect_options options = {0};
    tsrv_stream *stream;
    tsrv_address address;
    tsrv_slice line;
    int rc = tsrv_server_address(server, 0, &address);
    options.tls = tls;
    if (rc != TSRV_OK ||
        (rc = tsrv_connect("127.0.0.1", tsrv_address_port(&address), &options, &stream)) < 0) {
        return rc;
    }
    tsrv_write(stream, "hello\n", 6);
    if ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        printf("%s %s %s", tsrv_version(), tls ? tsrv_tls_version(stream) : "TCP", line.data);
    }
    tsrv_close(stream);
    return rc;
}

static void client(void *context)
{
    (void)context;
    result = ask();
    tsrv_loop_stop(NULL);
}

int main(int argc, char **argv)
{
    tsrv_tls_options tls_options = {0};
    tsrv_server_options options = {0};
    int rc = TSRV_OK;
    options.handle_stream = handle_stream;
    if (argc > 2) {
        tls_options.cert_file = tls_options.ca_file = argv[1];
        tls_options.key_file = argv[2];
        rc = tsrv_tls_new(&tls, &tls_options);
        options.tls = tls;
    }
    if (rc == TSRV_OK && (rc = tsrv_server_new(&server, &options)) == TSRV_OK &&
        (rc = tsrv_server_listen(server, 0, "127.0.0.1", NULL)) == TSRV_OK &&
        (rc = tsrv_spawn(NULL, client, NULL)) == TSRV_OK && (rc = tsrv_loop_run(NULL)) == TSRV_OK) {
        rc = result;
    }
    if (rc != TSRV_OK) {
        fprintf(stderr, "app: %s\n", tsrv_strerror(rc));
    }
    return rc == TSRV_OK ? 0 : 1;
}
