/* redis.c - keys and values over Redis's protocol. One call with a match function reads a command,
 * typed or sent by a client library, split or pipelined; so the handler needs no state.
 *
 *   cc -O2 -o redis examples/redis.c
 *   ./redis [port]                    then: redis-cli -p 8888
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { MAX_WORDS = 64, MAX_LINE = 65536, CHAINS = 65536 };

typedef struct command {
    size_t count, at[MAX_WORDS]; /* where the words begin in what was read */
    tsrv_slice word[MAX_WORDS];
} command;

typedef struct entry {
    struct entry *next;
    tsrv_slice key, value; /* their bytes follow, and a 0 */
} entry;

static entry *chains[CHAINS]; /* a hash table that does not grow: slow with millions of keys */

static void add_word(command *c, size_t at, size_t size)
{
    c->at[c->count] = at;
    c->word[c->count++].size = size;
}

/* Takes "get k" apart; the size includes the newline. */
static size_t match_typed(const char *data, size_t size, command *c)
{
    size_t at, word;
    for (at = 0; at < size; at += word + 1) {
        word = strcspn(data + at, " \r\n");
        if (word > 0 && c->count == MAX_WORDS) {
            return SIZE_MAX;
        }
        if (word > 0) {
            add_word(c, at, word);
        }
    }
    return size;
}

/* Takes "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n" apart. Asks for what is missing of a word as a whole. */
static size_t match(const char *data, size_t size, void *context)
{
    command *c = (command *)context;
    size_t at = 0, left = 1, number;
    for (c->count = 0; left > 0; left--) {
        const char *end = (const char *)memchr(data + at, '\n', size - at);
        size_t after = end != NULL ? (size_t)(end + 1 - data) : 0;
        char *stop;
        if (end == NULL) {
            return size - at < MAX_LINE ? 0 : SIZE_MAX;
        }
        if (*data != '*') {
            return match_typed(data, after, c);
        }
        number = strtoul(data + at + 1, &stop, 10); /* of "-1": more than any limit */
        if (data[at] != (at == 0 ? '*' : '$') || stop + 1 != end || *stop != '\r' ||
            number > (at == 0 ? MAX_WORDS : INT_MAX)) {
            return SIZE_MAX;
        }
        if (at == 0) {
            left += number;
            at = after;
        } else {
            add_word(c, after, number);
            at = after + number + 2;
        }
        if (at > size) {
            return at;
        }
    }
    return at;
}

/* The link to the entry of a key, or the one where it would be. */
static entry **find(const tsrv_slice *key)
{
    entry **link;
    size_t hash = 5381, i;
    for (i = 0; i < key->size; i++) {
        hash = hash * 33 + (unsigned char)key->data[i];
    }
    link = &chains[hash % CHAINS];
    while (*link != NULL && ((*link)->key.size != key->size ||
                             memcmp((*link)->key.data, key->data, key->size) != 0)) {
        link = &(*link)->next;
    }
    return link;
}

static bool set(const tsrv_slice *key, const char *value, size_t size)
{
    entry **link = find(key), *old = *link;
    entry *e = (entry *)malloc(sizeof(*e) + key->size + size + 1);
    char *bytes = (char *)(e + 1);
    if (e == NULL) {
        return false;
    }
    memcpy(bytes, key->data, key->size);
    memcpy(bytes + key->size, value, size);
    bytes[key->size + size] = 0;
    e->key.data = bytes;
    e->key.size = key->size;
    e->value.data = bytes + key->size;
    e->value.size = size;
    e->next = old != NULL ? old->next : NULL;
    *link = e;
    free(old);
    return true;
}

static int unset(const tsrv_slice *key)
{
    entry **link = find(key), *old = *link;
    if (old != NULL) {
        *link = old->next;
        free(old);
    }
    return old != NULL;
}

static void reply(tsrv_stream *stream, const char *text)
{
    tsrv_write(stream, text, strlen(text));
}

static void reply_word(tsrv_stream *stream, const tsrv_slice *word)
{
    char head[32];
    tsrv_slice parts[3] = {{head, 0}, *word, {"\r\n", 2}};
    parts[0].size = (size_t)snprintf(head, sizeof(head), "$%zu\r\n", word->size);
    tsrv_writev(stream, parts, 3);
}

/* A value is an integer if printing it gives the same text: no blanks, no overflow. */
static void increment(tsrv_stream *stream, const tsrv_slice *key)
{
    const entry *e = *find(key);
    long long number = e != NULL ? strtoll(e->value.data, NULL, 10) : 0;
    char text[32];
    size_t size = (size_t)snprintf(text, sizeof(text), "%lld", number);
    if (number == LLONG_MAX ||
        (e != NULL && (size != e->value.size || memcmp(text, e->value.data, size) != 0))) {
        reply(stream, "-ERR value is not an integer or out of range\r\n");
        return;
    }
    size = (size_t)snprintf(text, sizeof(text), "%lld", number + 1);
    if (set(key, text, size)) {
        tsrv_printf(stream, ":%s\r\n", text);
    } else {
        reply(stream, "-OOM out of memory\r\n");
    }
}

static bool is(const command *c, const char *name, size_t least, size_t most)
{
    return c->count >= least && c->count <= most && c->word[0].size == strlen(name) &&
           strncasecmp(c->word[0].data, name, strlen(name)) == 0;
}

/* Returns false when the client wants to leave. */
static bool execute(tsrv_stream *stream, const command *c)
{
    const entry *found;
    size_t i;
    int count = 0;
    if (is(c, "GET", 2, 2)) {
        if ((found = *find(&c->word[1])) != NULL) {
            reply_word(stream, &found->value);
        } else {
            reply(stream, "$-1\r\n");
        }
    } else if (is(c, "SET", 3, 3)) {
        bool done = set(&c->word[1], c->word[2].data, c->word[2].size);
        reply(stream, done ? "+OK\r\n" : "-OOM out of memory\r\n");
    } else if (is(c, "PING", 1, 1)) {
        reply(stream, "+PONG\r\n");
    } else if (is(c, "PING", 2, 2) || is(c, "ECHO", 2, 2)) {
        reply_word(stream, &c->word[1]);
    } else if (is(c, "INCR", 2, 2)) {
        increment(stream, &c->word[1]);
    } else if (is(c, "DEL", 2, MAX_WORDS)) {
        for (i = 1; i < c->count; i++) {
            count += unset(&c->word[i]);
        }
        tsrv_printf(stream, ":%d\r\n", count);
    } else if (is(c, "QUIT", 1, 1)) {
        reply(stream, "+OK\r\n");
        return false;
    } else if (is(c, "COMMAND", 1, MAX_WORDS) || is(c, "CONFIG", 2, MAX_WORDS)) {
        reply(stream, "*0\r\n"); /* redis-cli and redis-benchmark ask, and live with it */
    } else if (c->count > 0) {
        reply(stream, "-ERR unknown command, or wrong number of arguments\r\n");
    }
    return true;
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice all;
    command c;
    size_t i;
    int rc;
    (void)address;
    (void)context;
    do {
        if ((rc = tsrv_read_until_match(stream, match, &c, 0, &all)) != TSRV_OK) {
            break;
        }
        for (i = 0; i < c.count; i++) {
            c.word[i].data = all.data + c.at[i];
        }
    } while (execute(stream, &c));
    if (rc == TSRV_ETOOLONG) {
        reply(stream, "-ERR Protocol error: malformed or too long\r\n");
    }
    return rc;
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8888;
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_address bound;
    options.handle_stream = handle_stream;
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, port, "127.0.0.1", NULL) != TSRV_OK ||
        tsrv_server_address(server, 0, &bound) != TSRV_OK) {
        return 1;
    }
    printf("redis: listening on port %d\n", tsrv_address_port(&bound));
    fflush(stdout);
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
