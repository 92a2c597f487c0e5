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

#define MAX_WORDS 16 /* of a command; all of it may have 1 MiB, the default of every stream */
#define CHAINS 65536 /* of a hash table that does not grow: it is slow with millions of keys */

typedef struct command {
    size_t count, at[MAX_WORDS]; /* where the words begin in what was read */
    tsrv_slice word[MAX_WORDS];
} command;

static struct entry {
    struct entry *next;
    tsrv_slice key, value; /* their bytes follow, and a 0 */
} * chains[CHAINS];

/* Takes "get k\r\n" apart. */
static size_t match_typed(const char *data, size_t size, command *c)
{
    size_t at, word;
    for (at = 0; at < size && c->count < MAX_WORDS; at += word + 1) {
        word = strcspn(data + at, " \r\n");
        c->at[c->count] = at;
        c->word[c->count].size = word;
        c->count += word > 0;
    }
    return at < size ? SIZE_MAX : size;
}

/* Takes "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n" apart: the number of words, then the size of each. */
static size_t match(const char *data, size_t size, void *context)
{
    command *c = (command *)context;
    size_t at = 0, left = 1, number;
    for (c->count = 0; left > 0; left--) {
        const char *end = (const char *)memchr(data + at, '\n', size - at);
        char *stop;
        if (end == NULL) {
            return size - at < 4096 ? 0 : SIZE_MAX;
        }
        if (*data != '*') {
            return match_typed(data, (size_t)(end + 1 - data), c);
        }
        number = strtoul(data + at + 1, &stop, 10); /* -1 becomes more than any limit */
        if (data[at] != (at == 0 ? '*' : '$') || number > (at == 0 ? MAX_WORDS : INT_MAX) ||
            stop + 1 != end || *stop != '\r') {
            return SIZE_MAX;
        }
        if (at == 0) {
            left += number;
            at = (size_t)(end + 1 - data);
        } else {
            c->at[c->count] = (size_t)(end + 1 - data);
            c->word[c->count].size = number;
            at = c->at[c->count++] + number + 2;
        }
        if (at > size) {
            return at; /* ask again when that much is there */
        }
    }
    return at;
}

/* The link to the entry of a key, or the one where it would be. */
static struct entry **find(const tsrv_slice *key)
{
    struct entry **link;
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
    struct entry **link = find(key), *old = *link, *made;
    char *bytes;
    if ((made = (struct entry *)malloc(sizeof(*made) + key->size + size + 1)) == NULL) {
        return false;
    }
    bytes = (char *)(made + 1);
    made->next = old != NULL ? old->next : NULL;
    made->key.data = (char *)memcpy(bytes, key->data, made->key.size = key->size);
    made->value.data = (char *)memcpy(bytes + key->size, value, made->value.size = size);
    bytes[key->size + size] = 0;
    *link = made;
    free(old);
    return true;
}

static int unset(const tsrv_slice *key)
{
    struct entry **link = find(key), *old = *link;
    if (old != NULL) {
        *link = old->next;
        free(old);
    }
    return old != NULL;
}

static void reply_word(tsrv_stream *stream, const tsrv_slice *word)
{
    tsrv_printf(stream, "$%zu\r\n", word->size);
    tsrv_write(stream, word->data, word->size);
    tsrv_write(stream, "\r\n", 2);
}

/* A value is an integer if printing it gives the same text: no blanks, no overflow. */
static void increment(tsrv_stream *stream, const tsrv_slice *key)
{
    const struct entry *e = *find(key);
    long long number = e != NULL ? strtoll(e->value.data, NULL, 10) : 0;
    char text[32];
    int size = snprintf(text, sizeof(text), "%lld", number);
    if (number == LLONG_MAX ||
        (e != NULL && ((size_t)size != e->value.size || strcmp(text, e->value.data) != 0))) {
        tsrv_printf(stream, "-ERR value is not an integer or out of range\r\n");
    } else {
        size = snprintf(text, sizeof(text), "%lld", number + 1);
        tsrv_printf(stream, set(key, text, (size_t)size) ? ":%s\r\n" : "-OOM\r\n", text);
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
    const tsrv_slice *word = c->word;
    const struct entry *found;
    if (is(c, "GET", 2, 2)) {
        if ((found = *find(&word[1])) != NULL) {
            reply_word(stream, &found->value);
        } else {
            tsrv_printf(stream, "$-1\r\n");
        }
    } else if (is(c, "SET", 3, 3)) {
        bool done = set(&word[1], word[2].data, word[2].size);
        tsrv_printf(stream, done ? "+OK\r\n" : "-OOM\r\n");
    } else if (is(c, "PING", 1, 1)) {
        tsrv_printf(stream, "+PONG\r\n");
    } else if (is(c, "PING", 2, 2) || is(c, "ECHO", 2, 2)) {
        reply_word(stream, &word[1]);
    } else if (is(c, "INCR", 2, 2)) {
        increment(stream, &word[1]);
    } else if (is(c, "DEL", 2, 2)) {
        tsrv_printf(stream, ":%d\r\n", unset(&word[1]));
    } else if (is(c, "QUIT", 1, 1)) {
        tsrv_printf(stream, "+OK\r\n");
        return false;
    } else if (is(c, "COMMAND", 1, MAX_WORDS) || is(c, "CONFIG", 1, MAX_WORDS)) {
        tsrv_printf(stream, "*0\r\n"); /* which redis-cli and redis-benchmark can live with */
    } else if (c->count > 0) {
        tsrv_printf(stream, "-ERR unknown command, or wrong number of arguments\r\n");
    }
    return true;
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    command c;
    tsrv_slice all;
    size_t i;
    int rc;
    (void)address;
    (void)context;
    do {
        rc = tsrv_read_until_match(stream, match, &c, 0, &all);
        for (i = 0; rc == TSRV_OK && i < c.count; i++) {
            c.word[i].data = all.data + c.at[i];
        }
    } while (rc == TSRV_OK && execute(stream, &c));
    if (rc == TSRV_ETOOLONG) {
        tsrv_printf(stream, "-ERR Protocol error: malformed or too long\r\n");
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
