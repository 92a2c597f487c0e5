/* http.c - serves the files of a directory over HTTP/1.1: keep-alive, pipelining, sendfile.
 *
 *   cc -o http examples/http.c
 *   ./http [port] [directory]         then: curl http://127.0.0.1:8888/
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include "http_file.h"
#include "http_head.h"

#include <stdio.h>

static int reply(tsrv_stream *stream, const request *r, const char *status, int64_t size)
{
    return tsrv_printf(stream, "HTTP/1.1 %s\r\nContent-Length: %lld\r\n%s\r\n", status,
                       (long long)size, r->keep ? "" : "Connection: close\r\n");
}

/* The result matters: when the file cannot be sent after its size was, nothing else may follow. */
static int answer(tsrv_stream *stream, const request *r)
{
    int get = strcmp(r->method, "GET") == 0, fd, rc;
    struct stat file;
    if (r->error != NULL) {
        return reply(stream, r, r->error, 0);
    } else if (!get && strcmp(r->method, "HEAD") != 0) {
        return reply(stream, r, "405 Not Allowed\r\nAllow: GET, HEAD", 0);
    } else if (r->body) {
        return reply(stream, r, "413 Content Too Large", 0);
    } else if (strcmp(r->path, "./") == 0) {
        reply(stream, r, "200 OK", 10);
        return tsrv_write(stream, "It works.\n", get ? 10 : 0);
    } else if (strstr(r->path, "/.") != NULL) { /* ".." would lead out of the directory */
        return reply(stream, r, "404 Not Found", 0);
    } else if ((fd = open_file(r->path, &file)) < 0) {
        return reply(stream, r, is_passing(errno) ? "503 Service Unavailable" : "404 Not Found", 0);
    }
    reply(stream, r, "200 OK", file.st_size);
    rc = tsrv_sendfile(stream, fd, 0, get ? (size_t)file.st_size : 0);
    close(fd); /* the library has a duplicate while it needs one */
    return rc;
}

/* In a drain the last answer of those that have been asked for says that it is the last. */
static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    request r;
    tsrv_slice head;
    int rc = TSRV_OK;
    (void)address, (void)context;
    for (r.keep = true; r.keep && rc == TSRV_OK;) {
        if ((rc = tsrv_read_until(stream, "\r\n\r\n", 8192, &head)) == TSRV_OK) {
            parse(&head, &r);
            if (r.error == NULL && !decode(r.path)) {
                r.error = "400 Bad Request";
            }
            r.keep = r.keep && !(tsrv_stopping(stream) && tsrv_unread_size(stream) == 0);
            rc = answer(stream, &r);
        }
    }
    if (rc == TSRV_ETOOLONG) {
        reply(stream, &r, "431 Request Header Fields Too Large\r\nConnection: close", 0);
    }
    return rc;
}

static void on_start(tsrv_server *server, void *context)
{
    tsrv_address bound;
    (void)context;
    if (tsrv_server_address(server, 0, &bound) == TSRV_OK) {
        printf("http: listening on port %d\n", tsrv_address_port(&bound));
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    tsrv_server_options options = {0};
    options.handle_stream = handle_stream;
    options.on_start = on_start;
    options.read_timeout_ms = 30000; /* for a head, or for the next one to come */
    if (argc > 2 && chdir(argv[2]) != 0) {
        perror(argv[2]);
        return 1;
    }
    return tsrv_serve(argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1", 1, &options) != TSRV_OK;
}
