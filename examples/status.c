/* status.c - a service, and a second port to see it by: figures, probes, and a page that draws them.
 *
 *   cc -O2 -o status examples/status.c
 *   ./status [port [admin port [processes [proxies]]]]      then: nc 127.0.0.1 8888, and open
 *                                                           http://127.0.0.1:8889/ in a browser
 * For Prometheus there is /metrics, which the page reads too. /healthz is 200 when somebody answers;
 * so is /readyz, but 503 from a worker that drains. Every worker accepts on the admin port, and can
 * tell of all. With proxies, as in haproxy.cfg, the service's clients come through these only.
 *
 * When the server is told to end, both ports refuse at once: to a probe that connects each time, as
 * Kubernetes' does, "not ready". Who has kept a connection, and asks at least once a second, gets one
 * last answer, 503 from /readyz: nobody who looks on delays the end by more than 5 s, or watches it.
 * So it is in a reload: an old worker does not know the new ones. Believe two in a row. */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include "http_head.h"
#include "status_page.h"

#include <stdio.h>

static tsrv_server *service, *admin;

static void reply(tsrv_stream *stream, const request *r, const char *status, const char *type,
                  const char *text)
{
    tsrv_printf(stream,
                "HTTP/1.1 %s\r\nContent-Type: %s; charset=utf-8\r\nContent-Length: %zu\r\n"
                "Cache-Control: no-store\r\n%s\r\n%s",
                status, type, strlen(text), r->keep ? "" : "Connection: close\r\n",
                strcmp(r->method, "HEAD") == 0 ? "" : text);
}

static void reply_metrics(tsrv_stream *stream, const request *r)
{
    size_t room = (size_t)tsrv_metrics_format(service, NULL, 0) + 4096; /* they grow meanwhile */
    char *text = (char *)malloc(room);
    tsrv_metrics_format(service, text, text != NULL ? room : 0);
    reply(stream, r, text != NULL ? "200 OK" : "503 Service Unavailable",
          "text/plain; version=0.0.4", text != NULL ? text : "");
    free(text);
}

static void answer(tsrv_stream *stream, const request *r)
{
    bool ready = strcmp(r->path, "./readyz") == 0;
    if (r->error != NULL) {
        reply(stream, r, r->error, "text/plain", "");
    } else if (strcmp(r->method, "GET") != 0 && strcmp(r->method, "HEAD") != 0) {
        reply(stream, r, "405 Not Allowed\r\nAllow: GET, HEAD", "text/plain", "");
    } else if (strcmp(r->path, "./") == 0) {
        reply(stream, r, "200 OK", "text/html", status_page);
    } else if (strcmp(r->path, "./metrics") == 0) {
        reply_metrics(stream, r);
    } else if (ready && tsrv_stopping(stream)) {
        reply(stream, r, "503 Service Unavailable", "text/plain", "draining\n");
    } else if (ready || strcmp(r->path, "./healthz") == 0) {
        reply(stream, r, "200 OK", "text/plain", "ok\n");
    } else {
        reply(stream, r, "404 Not Found", "text/plain", "");
    }
}

static int handle_admin(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    request r;
    tsrv_slice head;
    int rc = TSRV_OK;
    (void)address, (void)context;
    r.keep = true;
    while (r.keep && (rc = tsrv_read_until(stream, "\r\n\r\n", 8192, &head)) == TSRV_OK) {
        parse(&head, &r);
        r.keep = r.keep && !(tsrv_stopping(stream) && tsrv_unread_size(stream) == 0);
        answer(stream, &r);
    }
    return rc;
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 4096, &line)) == TSRV_OK &&
           (rc = tsrv_write(stream, line.data, line.size)) == TSRV_OK &&
           !(tsrv_stopping(stream) && tsrv_unread_size(stream) == 0)) {
    }
    return tsrv_stopping(stream) ? tsrv_printf(stream, "bye\n") : rc; /* the rest is not done */
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8888, rc;
    int second = argc > 2 ? atoi(argv[2]) : port + (port != 0);
    tsrv_server_options options = {0}, admin_options = {0};
    tsrv_address bound, also;
    options.handle_stream = handle_stream;
    options.idle_timeout_ms = 60000;
    options.proxy_protocol = argc > 4 ? TSRV_PROXY_REQUIRED : TSRV_PROXY_NONE;
    options.proxy_from = argc > 4 ? argv[4] : NULL;
    admin_options.handle_stream = handle_admin;
    admin_options.idle_timeout_ms = 90000; /* Prometheus may ask once a minute */
    admin_options.grace_ms = 5000;         /* for the rest of a request, or of an answer */
    if (tsrv_server_new(&service, &options) != TSRV_OK ||
        tsrv_server_new(&admin, &admin_options) != TSRV_OK ||
        tsrv_server_bind(service, port, "127.0.0.1", NULL) != TSRV_OK ||
        tsrv_server_bind(admin, second, "127.0.0.1", NULL) != TSRV_OK ||
        tsrv_server_address(service, 0, &bound) != TSRV_OK ||
        tsrv_server_address(admin, 0, &also) != TSRV_OK) {
        return 1; /* tsrv_server_bind has logged the reason */
    }
    printf("status: listening on port %d\nstatus: look at http://127.0.0.1:%d/\n",
           tsrv_address_port(&bound), tsrv_address_port(&also));
    fflush(stdout);
    /* A worker for each processor. 1 would be no fork, and nobody who drains it at SIGTERM. */
    rc = tsrv_server_start(service, argc > 3 ? atoi(argv[3]) : 0, NULL);
    if (rc == TSRV_OK && (rc = tsrv_server_start(admin, 1, NULL)) == TSRV_OK) {
        rc = tsrv_loop_run(NULL);
    }
    return rc == TSRV_OK || rc == TSRV_EPARENT ? 0 : 1;
}
