/* redis.c - Redis's protocol: a match function takes each command apart, pipelined or split.
 *   cc -O2 -o redis examples/redis.c && ./redis [port]     then: redis-cli -p 8888
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include "keyvalue.h"

#include <stdio.h>
#include <strings.h>

enum { MAX_WORDS = 15, MAX_WORD = 1 << 20 };

/* Takes "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n" apart: word[0].size is how many words follow. Any other line
 * is one word. */
static size_t match(const char *data, size_t size, void *context)
{
    tsrv_slice *word = (tsrv_slice *)context;
    size_t at = 0, i;
    for (i = word[0].size = 0; i <= word[0].size && at <= size; i++) {
        const char *end = (const char *)memchr(data + at, '\n', size - at);
        char *stop;
        if (end == NULL) {
            return size - at < 4096 ? 0 : SIZE_MAX;
        }
        if (*data != '*') {
            word[1].data = data;
            word[1].size = strcspn(data, "\r\n");
            word[0].size = word[1].size > 0;
            return (size_t)(end + 1 - data);
        }
        word[i].data = end + 1;
        word[i].size = strtoul(data + at + 1, &stop, 10);
        if (data[at] != (i == 0 ? '*' : '$') || word[i].size > (i == 0 ? MAX_WORDS : MAX_WORD) ||
            *stop != '\r' || stop + 1 != end) {
            return SIZE_MAX;
        }
        at = (size_t)(end + 1 - data) + (i == 0 ? 0 : word[i].size + 2);
    }
    return at; /* more than size: asks again when that much is there */
}

static bool is(const tsrv_slice *word, const char *name, size_t count)
{
    return word[0].size == count && word[1].size == strlen(name) &&
           strncasecmp(word[1].data, name, word[1].size) == 0;
}

static void execute(tsrv_stream *stream, const tsrv_slice *word)
{
    const tsrv_slice *key = &word[2], *value;
    long long number;
    if (is(word, "PING", 1)) {
        tsrv_printf(stream, "+PONG\r\n");
    } else if (is(word, "GET", 2) && (value = get(key)) != NULL) {
        tsrv_printf(stream, "$%zu\r\n", value->size);
        tsrv_write(stream, value->data, value->size);
        tsrv_printf(stream, "\r\n");
    } else if (is(word, "GET", 2)) {
        tsrv_printf(stream, "$-1\r\n");
    } else if (is(word, "SET", 3)) {
        tsrv_printf(stream, set(key, &word[3]) ? "+OK\r\n" : "-OOM\r\n");
    } else if (is(word, "DEL", 2)) {
        tsrv_printf(stream, ":%d\r\n", unset(key));
    } else if (is(word, "INCR", 2) && increment(key, &number)) {
        tsrv_printf(stream, ":%lld\r\n", number);
    } else if (word[0].size > 0) {
        tsrv_printf(stream, "-ERR %s\r\n",
                    is(word, "INCR", 2) ? "value is not an integer" : "unknown command");
    }
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice all, word[1 + MAX_WORDS];
    int rc;
    (void)address;
    (void)context;
    while ((rc = tsrv_read_until_match(stream, match, word, 0, &all)) == TSRV_OK) {
        execute(stream, word);
    }
    tsrv_printf(stream, "%s", rc == TSRV_ETOOLONG ? "-ERR Protocol error\r\n" : "");
    return rc;
}

int main(int argc, char **argv)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_address bound;
    options.handle_stream = handle_stream;
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1", NULL) != TSRV_OK ||
        tsrv_server_address(server, 0, &bound) != TSRV_OK) {
        return 1;
    }
    printf("redis: listening on port %d\n", tsrv_address_port(&bound));
    fflush(stdout);
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
