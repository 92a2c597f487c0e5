/* redis.c - Redis's protocol: a match function takes each command apart, pipelined or split.
 *
 *   cc -O2 -o redis examples/redis.c
 *   ./redis [port]                    then: redis-cli -p 8888
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include "keyvalue.h"
#include "redis_command.h"

/* Is it the command name, of so many words? */
static bool is(const tsrv_slice *word, const char *name, size_t count)
{
    return word[0].size == count && word[1].size == strlen(name) &&
           strncasecmp(word[1].data, name, word[1].size) == 0;
}

/* One write, which has taken all of it before it waits: of three the first could wait, and another
 * connection set the key anew meanwhile. */
static void send_value(tsrv_stream *stream, const tsrv_slice *value)
{
    char size[32];
    tsrv_slice parts[3] = {{size, 0}, *value, {"\r\n", 2}};
    parts[0].size = (size_t)snprintf(size, sizeof(size), "$%zu\r\n", value->size);
    tsrv_writev(stream, parts, 3);
}

static void execute(tsrv_stream *stream, const tsrv_slice *word)
{
    const tsrv_slice *key = &word[2], *value;
    long long number;
    if (is(word, "PING", 1)) {
        tsrv_printf(stream, "+PONG\r\n");
    } else if (is(word, "PING", 2) || is(word, "ECHO", 2)) {
        send_value(stream, key);
    } else if (is(word, "GET", 2) && (value = get(key)) != NULL) {
        send_value(stream, value);
    } else if (is(word, "GET", 2)) {
        tsrv_printf(stream, "$-1\r\n");
    } else if (is(word, "SET", 3)) {
        tsrv_printf(stream, set(key, &word[3]) ? "+OK\r\n" : "-OOM\r\n");
    } else if (word[0].size > 1 && is(word, "DEL", word[0].size)) {
        int count = 0;
        for (size_t i = 2; i <= word[0].size; i++) {
            count += unset(&word[i]);
        }
        tsrv_printf(stream, ":%d\r\n", count);
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
    while ((rc = tsrv_read_until_match(stream, match_command, word, 0, &all)) == TSRV_OK) {
        if (is(word, "QUIT", 1)) {
            tsrv_printf(stream, "+OK\r\n");
            return 1; /* over, in good order */
        }
        execute(stream, word);
    }
    if (rc == TSRV_ETOOLONG) {
        tsrv_printf(stream, "-ERR Protocol error\r\n");
    }
    return rc;
}

int main(int argc, char **argv)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_address bound;
    options.handle_stream = handle_stream;
    options.max_connections = 10000;
    options.idle_timeout_ms = 300000; /* clients that have gone without a word, too */
    if (!choose_secret()) {
        perror("redis: /dev/urandom");
        return 1;
    }
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1", NULL) != TSRV_OK ||
        tsrv_server_address(server, 0, &bound) != TSRV_OK) {
        return 1;
    }
    printf("redis: listening on port %d\n", tsrv_address_port(&bound));
    fflush(stdout);
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
