/* websocket.c - a page, and the WebSocket that it opens: what is typed comes back. Each frame is
 * one read, and the handshake gives way to another handler, so that it does in both modes.
 *
 *   cc -O2 -o websocket examples/websocket.c
 *   ./websocket [port [seconds of silence]]     then open http://127.0.0.1:8888/ in a browser
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include "http_head.h"
#include "websocket_frame.h"
#include "websocket_handshake.h"
#include "websocket_message.h"

#include <stdio.h>

static const char page[] =
    "<!doctype html><meta charset='utf-8'><link rel='icon' href='data:,'><title>websocket</title>\n"
    "<form><input autofocus></form><pre></pre>\n"
    "<script>\n"
    "const $ = name => document.querySelector(name), say = text => $('pre').append(text, '\\n');\n"
    "const socket = new WebSocket(location.origin.replace('http', 'ws') + '/socket');\n"
    "socket.onopen = () => socket.send('hello, h\\u00e9llo');\n"
    "socket.onmessage = event => say(event.data);\n"
    "socket.onclose = event => say('closed: ' + event.code);\n"
    "$('form').onsubmit = () => (socket.send($('input').value), $('input').value = '', false);\n"
    "</script>\n";

/* What the program does with a message: it sends it back. */
static int take_message(tsrv_stream *stream, int opcode, const char *data, size_t size)
{
    if (opcode == TEXT && !is_utf8(data, size)) {
        return INVALID_DATA;
    }
    send_frame(stream, opcode, data, size);
    return 0;
}

/* The only answer on this connection, whatever else was asked for. */
static int reply(tsrv_stream *stream, const char *status, const char *text)
{
    tsrv_printf(stream,
                "HTTP/1.1 %s\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: %zu\r\n"
                "Connection: close\r\n\r\n%s",
                status, strlen(text), text);
    return 1;
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    const char *refusal;
    char proof[29];
    request r;
    tsrv_slice head;
    int rc = tsrv_read_until(stream, "\r\n\r\n", 8192, &head);
    if (rc != TSRV_OK) {
        return rc == TSRV_ETOOLONG ? reply(stream, "431 Request Header Fields Too Large", "") : rc;
    }
    parse(&head, &r);
    if (r.error != NULL) {
        return reply(stream, r.error, "");
    } else if (strcmp(r.method, "GET") != 0) {
        return reply(stream, "405 Not Allowed\r\nAllow: GET", "");
    } else if (strcmp(r.path, "./") == 0) {
        return reply(stream, "200 OK", page);
    } else if (strcmp(r.path, "./socket") != 0) {
        return reply(stream, "404 Not Found", "");
    } else if ((refusal = open_socket(&head, &r, proof)) != NULL) {
        return reply(stream, refusal, "");
    }
    tsrv_printf(stream,
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Accept: %s\r\n\r\n",
                proof);
    tsrv_set_handler(stream, handle_frames); /* in callback mode it is called from now on */
    return handle_frames(stream, address, context);
}

static void on_close(tsrv_stream *stream, int reason, void *context)
{
    (void)reason, (void)context;
    drop_message((session *)tsrv_data(stream));
}

static void on_start(tsrv_server *server, void *context)
{
    tsrv_address bound;
    (void)context;
    if (tsrv_server_address(server, 0, &bound) == TSRV_OK) {
        printf("websocket: listening on port %d\n", tsrv_address_port(&bound));
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    tsrv_server_options options = {0};
    options.handle_stream = handle_stream;
    options.on_close = on_close;
    options.on_start = on_start;
    options.data_size = sizeof(session);
    options.max_connections = 1000;
    options.read_timeout_ms = argc > 2 ? 1000 * atoi(argv[2]) : 30000;
    return tsrv_serve(argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1", 1, &options) != TSRV_OK;
}
