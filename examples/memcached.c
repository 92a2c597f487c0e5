/* memcached.c - memcached's protocol: lines, and blocks of bytes behind some. What is read next is
 * kept in tsrv_data, so the same handler does in both modes.
 *
 *   cc -O2 -o memcached examples/memcached.c
 *   ./memcached [port [seconds for a block]]        then: memccapable -h 127.0.0.1 -p 8888 -a
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include "cache.h"
#include "memcached_line.h"
#include "memcached_change.h"
#include "memcached_session.h"

/* Of a get, which names many keys; the latter in callback mode, where a write does not wait. */
enum { MAX_LINE = 64 * 1024, MAX_UNSENT = 8 * 1024 * 1024 };
static int block_ms = 10000; /* for a block to come: others lack its memory meanwhile */

/* One write, which has taken all of it before it waits: the item may be freed meanwhile. */
static void send_item(tsrv_stream *stream, const item *it, bool with_unique)
{
    char head[MAX_KEY + 64], unique[32] = "";
    tsrv_slice parts[2] = {{head, 0}, {it->value, it->size + 2}};
    if (with_unique) {
        snprintf(unique, sizeof(unique), " %" PRIu64, it->unique);
    }
    parts[0].size = (size_t)snprintf(head, sizeof(head), "VALUE %s %" PRIu32 " %zu%s\r\n", it->key,
                                     it->flags, it->size, unique);
    tsrv_writev(stream, parts, 2);
}

static const char *get(tsrv_stream *stream, command *c)
{
    char *key = strtok_r(NULL, " ", &c->rest);
    const item *it;
    if (key == NULL) {
        return "ERROR";
    }
    for (; key != NULL; key = strtok_r(NULL, " ", &c->rest)) {
        if (strlen(key) > MAX_KEY) {
            return bad_line;
        } else if (tsrv_unsent_size(stream) > MAX_UNSENT) {
            return "SERVER_ERROR out of memory writing get response";
        } else if ((it = cache_find(key)) != NULL) {
            send_item(stream, it, c->verb == GETS);
        }
    }
    return "END";
}

static const char *answer_line(tsrv_stream *stream, session *s, const tsrv_slice *line)
{
    command c;
    s->quiet = false;
    s->over = !parse_line(line, &c);
    if (s->over) {
        return bad_line;
    }
    return c.verb == GET || c.verb == GETS ? get(stream, &c) : execute(s, &c);
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    session *s = (session *)tsrv_data(stream);
    const char *answer = NULL;
    tsrv_slice line;
    int rc = TSRV_OK;
    (void)address, (void)context;
    for (; rc == TSRV_OK && !s->over; answer = NULL) {
        if (s->coming != NULL) { /* straight to where it stays */
            if ((rc = tsrv_read_into(stream, s->coming->value, s->coming->size + 2)) == TSRV_OK) {
                answer = end_block(s);
                tsrv_set_deadline(stream, TSRV_NEVER);
            }
        } else if (s->skip > 0) {
            rc = tsrv_read_bytes(stream, s->skip, NULL);
            s->skip = rc == TSRV_OK ? 0 : s->skip;
        } else if ((rc = tsrv_read_until(stream, "\n", MAX_LINE, &line)) == TSRV_OK) {
            answer = answer_line(stream, s, &line);
            tsrv_set_deadline(stream, s->coming != NULL ? block_ms : TSRV_NEVER);
        } else if (rc == TSRV_ETOOLONG) {
            answer = "CLIENT_ERROR line too long";
            s->quiet = false;
        }
        if (answer != NULL && !s->quiet) {
            tsrv_printf(stream, "%s\r\n", answer);
        }
    }
    return rc == TSRV_ETOOLONG ? 1 : rc;
}

/* However it has ended: in the middle of a block, for instance. */
static void on_close(tsrv_stream *stream, int reason, void *context)
{
    session *s = (session *)tsrv_data(stream);
    (void)reason, (void)context;
    if (s->coming != NULL) {
        cache_free(s->coming);
    }
}

int main(int argc, char **argv)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_address bound;
    block_ms = argc > 2 ? 1000 * atoi(argv[2]) : block_ms;
    options.handle_stream = handle_stream;
    options.on_close = on_close;
    options.data_size = sizeof(session);
    options.max_connections = 10000;
    options.idle_timeout_ms = 3600000;
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1", NULL) != TSRV_OK ||
        tsrv_server_address(server, 0, &bound) != TSRV_OK) {
        return 1;
    }
    printf("memcached: listening on port %d\n", tsrv_address_port(&bound));
    fflush(stdout);
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
