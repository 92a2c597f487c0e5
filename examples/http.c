/* http.c - serves the files of a directory over HTTP/1.1: keep-alive, pipelining, sendfile.
 *
 *   cc -o http examples/http.c
 *   ./http [port] [directory]         then: curl http://127.0.0.1:8888/
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct request {
    char method[8], path[256]; /* "./" and so on; no method = malformed */
    bool keep;                 /* another request may follow */
} request;

/* A body is never read: the connection ends after a request that has one, of whatever size. */
static void parse(const tsrv_slice *head, request *r)
{
    char minor[2], end[2];
    if (sscanf(head->data, "%7[A-Z] %254[^ \r\n] HTTP/1.%1[01]%1[\r]", r->method, r->path + 1,
               minor, end) != 4 ||
        r->path[1] != '/' || strlen(head->data) != head->size) {
        memset(r, 0, sizeof(*r));
        return;
    }
    r->path[strcspn(r->path, "?")] = 0;
    r->keep = *minor == '1' && strcasestr(head->data, "\r\nConnection: close") == NULL &&
              strcasestr(head->data, "\r\nContent-Length:") == NULL &&
              strcasestr(head->data, "\r\nTransfer-Encoding:") == NULL;
}

static void reply(tsrv_stream *stream, const request *r, const char *status, int64_t size)
{
    tsrv_printf(stream, "HTTP/1.1 %s\r\nContent-Length: %lld\r\n%s\r\n", status, (long long)size,
                r->keep ? "" : "Connection: close\r\n");
}

static void answer(tsrv_stream *stream, const request *r)
{
    int get = strcmp(r->method, "GET") == 0, fd;
    struct stat file;
    if (!get && strcmp(r->method, "HEAD") != 0) {
        reply(stream, r, *r->method ? "405 Not Allowed\r\nAllow: GET, HEAD" : "400 Bad Request", 0);
    } else if (strcmp(r->path, "./") == 0) {
        reply(stream, r, "200 OK", 10);
        tsrv_write(stream, "It works.\n", get ? 10 : 0);
    } else if (strstr(r->path, "/.") != NULL /* ".." would lead out of the directory */ ||
               stat(r->path, &file) != 0 || !S_ISREG(file.st_mode) ||
               (fd = open(r->path, O_RDONLY)) < 0) {
        reply(stream, r, "404 Not Found", 0);
    } else {
        reply(stream, r, "200 OK", file.st_size);
        tsrv_sendfile(stream, fd, 0, get ? (size_t)file.st_size : 0);
        close(fd); /* the library has a duplicate while it needs one */
    }
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    request r = {"", ".", true};
    tsrv_slice head;
    int rc = TSRV_OK;
    (void)address;
    (void)context;
    while (r.keep && (rc = tsrv_read_until(stream, "\r\n\r\n", 8192, &head)) == TSRV_OK) {
        parse(&head, &r);
        answer(stream, &r);
    }
    if (rc == TSRV_ETOOLONG) {
        reply(stream, &r, "431 Request Header Fields Too Large\r\nConnection: close", 0);
    }
    return rc;
}

int main(int argc, char **argv)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_address bound;
    options.handle_stream = handle_stream;
    options.read_timeout_ms = 30000; /* for a head, or for the next one to come */
    if (argc > 2 && chdir(argv[2]) != 0) {
        perror(argv[2]);
        return 1;
    }
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1", NULL) != TSRV_OK ||
        tsrv_server_address(server, 0, &bound) != TSRV_OK) {
        return 1;
    }
    printf("http: listening on port %d\n", tsrv_address_port(&bound));
    fflush(stdout);
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
