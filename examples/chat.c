/* chat.c - a chat room: the first line is the nick name, every other line goes to all others.
 * A reader too slow for its queue is thrown out, so that it costs the others nothing.
 *
 *   cc -o chat examples/chat.c
 *   ./chat [port]                     then, in several terminals: nc 127.0.0.1 8888
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LINE = 512 };
typedef struct member {
    bool asked;
    char nick[32]; /* "" until it has said who it is */
} member;

static member *member_of(tsrv_stream *stream)
{
    return (member *)tsrv_data(stream);
}

/* To everybody in the room but one. tsrv_try_write never waits: no slow reader holds up the walk. */
static void broadcast(tsrv_stream *from, const char *text, size_t size)
{
    tsrv_server *server = tsrv_stream_server(from);
    tsrv_stream *s;
    for (s = tsrv_server_next(server, NULL); s != NULL; s = tsrv_server_next(server, s)) {
        if (s != from && member_of(s)->nick[0] != 0 &&
            tsrv_try_write(s, text, size) == TSRV_EFULL) {
            tsrv_abort(s);
        }
    }
}

/* Control characters would act on the terminals of the others: those of ASCII, and C1, in UTF-8 (c2
 * 80 to c2 9f) or alone. `more` is how many bytes of a character are still to come. */
static bool acts(unsigned char before, unsigned char c, int more)
{
    return c < ' ' || c == 127 || (c >= 0x80 && c < 0xa0 && (more == 0 || before == 0xc2));
}

static void say(tsrv_stream *from, const char *what, const char *text, int size)
{
    char line[MAX_LINE + 64], *c;
    unsigned char before = 0, byte;
    int used = snprintf(line, sizeof(line), "%s%s%.*s\n", member_of(from)->nick, what, size, text);
    int more = 0;
    for (c = line; *c != '\n'; c++, before = byte) {
        byte = (unsigned char)*c;
        *c = acts(before, byte, more) ? '?' : *c;
        more = byte >= 0x80 && byte < 0xc0  ? more - (more > 0)
               : byte < 0xc2 || byte > 0xf4 ? 0
               : byte < 0xe0                ? 1
               : byte < 0xf0                ? 2
                                            : 3;
    }
    broadcast(from, line, (size_t)used);
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    member *me = member_of(stream);
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    me->asked = me->asked || tsrv_printf(stream, "your name? ") == TSRV_OK;
    while ((rc = tsrv_read_until(stream, "\n", MAX_LINE, &line)) == TSRV_OK) {
        int size = (int)strcspn(line.data, "\r\n");
        if (me->nick[0] != 0) {
            say(stream, ": ", line.data, size);
        } else if (size > 0) {
            snprintf(me->nick, sizeof(me->nick), "%.*s", size, line.data);
            say(stream, " has joined", "", 0);
        }
    }
    if (rc == TSRV_ETOOLONG) {
        tsrv_printf(stream, "too long, good bye\n");
        rc = 1; /* over, in good order, with a value of our own */
    }
    return rc;
}

/* However it has ended. Of this stream only tsrv_data may be used here; the others go on. */
static void on_close(tsrv_stream *stream, int reason, void *context)
{
    (void)reason, (void)context;
    if (member_of(stream)->nick[0] != 0) {
        say(stream, " has left", "", 0);
    }
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8888;
    tsrv_server_options options = {0};
    tsrv_server *server;
    options.handle_stream = handle_stream;
    options.on_close = on_close;
    options.data_size = sizeof(member);
    options.max_write_buffer_size = 64 * 1024; /* what a reader may lag behind */
    options.idle_timeout_ms = 3600000;         /* nothing was said, by anybody */
    options.max_connections = 1000;
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, port, NULL, NULL) != TSRV_OK) {
        return 1;
    }
    printf("chat: listening on port %d\n", port);
    fflush(stdout);
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
