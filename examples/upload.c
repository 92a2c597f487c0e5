/* upload.c - keeps what is sent to it as files. What blocks is run in threads: a slow disk holds up
 * who sends, and nobody else. (In a coroutine tsrv_run_in_thread is tsrv_work and the wait for it;
 * callback mode would take tsrv_work, tsrv_wait, and a step in tsrv_data.)
 *
 *   cc -O2 -o upload examples/upload.c
 *   ./upload [port [directory]]       then: curl -T file http://127.0.0.1:8888/
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include "http_head.h"
#include "upload_file.h"

#include <limits.h>
#include <stdio.h>

enum { MAX_SIZE = INT_MAX };        /* of a file */
enum { BLOCK = 256 * 1024 };        /* is written at a time */
enum { BYTES_IN_A_SECOND = 10000 }; /* on the average: who is slower is cut */

/* The next block is read when this one is written. Meanwhile the kernel receives what it has room
 * for, and then the client waits. A read of a whole block, rather than of some bytes, tells a drain
 * that there is more to come. */
static int receive(tsrv_stream *stream, upload *u, size_t left)
{
    int rc = TSRV_OK;
    while (left > 0 && rc == TSRV_OK && u->error == 0) {
        rc = tsrv_read_bytes(stream, left < BLOCK ? left : BLOCK, &u->block);
        if (rc == TSRV_OK) {
            left -= u->block.size;
            rc = tsrv_run_in_thread(write_block, u);
        }
    }
    return rc;
}

static const char *receive_file(tsrv_stream *stream, const request *r)
{
    upload u = {".upload-XXXXXX", r->path + 2, {NULL, 0}, 0, -1, 0, false};
    tsrv_callback end;
    int rc = tsrv_run_in_thread(create, &u);
    if (rc == TSRV_OK && u.error == 0) {
        rc = receive(stream, &u, (size_t)r->size);
        end = rc == TSRV_OK && u.error == 0 ? keep : discard;
        if (tsrv_run_in_thread(end, &u) != TSRV_OK) {
            end(&u); /* no thread is given any more: the program ends */
        }
    }
    if (rc == TSRV_OK && u.error == 0) {
        return u.replaced ? "200 OK" : "201 Created";
    }
    return rc == TSRV_EOF        ? "400 Bad Request"
           : rc == TSRV_ETIMEOUT ? "408 Request Timeout"
           : u.error == ENOSPC   ? "507 Insufficient Storage"
                                 : "500 Internal Server Error";
}

/* A name that stays in the directory, and is none of ours. NULL: nothing is wrong. */
static const char *refusal(const request *r)
{
    const char *name = r->path + 2;
    if (r->error != NULL) {
        return r->error;
    } else if (strcmp(r->method, "PUT") != 0) {
        return "405 Not Allowed\r\nAllow: PUT";
    } else if (name[0] == 0 || name[0] == '.' ||
               name[strspn(name,
                           "-._0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")] !=
                   0) {
        return "404 Not Found";
    }
    return r->size > MAX_SIZE ? "413 Content Too Large" : NULL;
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    request r;
    tsrv_slice head;
    const char *status;
    int rc = tsrv_read_until(stream, "\r\n\r\n", 8192, &head);
    (void)address, (void)context;
    if (rc != TSRV_OK) {
        return rc;
    }
    parse(&head, &r);
    if ((status = refusal(&r)) == NULL) {
        if (r.expects) {
            tsrv_printf(stream, "HTTP/1.1 100 Continue\r\n\r\n");
        }
        tsrv_set_deadline(stream, 60000 + (int)(r.size * 1000 / BYTES_IN_A_SECOND));
        status = receive_file(stream, &r);
    }
    tsrv_printf(stream, "HTTP/1.1 %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", status);
    return 1; /* over, in good order */
}

static void on_start(tsrv_server *server, void *context)
{
    tsrv_address bound;
    (void)context;
    if (tsrv_server_address(server, 0, &bound) == TSRV_OK) {
        printf("upload: listening on port %d\n", tsrv_address_port(&bound));
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    tsrv_server_options options = {0};
    options.handle_stream = handle_stream;
    options.on_start = on_start;
    options.read_chunk_size = BLOCK;
    options.read_timeout_ms = 30000;
    options.max_connections = 100;
    if (argc > 2 && chdir(argv[2]) != 0) {
        perror(argv[2]);
        return 1;
    }
    return tsrv_serve(argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1", 1, &options) != TSRV_OK;
}
