/* memcached_line.h - takes the lines of memcached's protocol apart, in place: what a read hands out
 * is the program's, to change, until the next read. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_KEY = 250, MAX_WORDS = 7, MONTH = 30 * 24 * 3600 };

/* Behind those up to CAS a block of bytes follows; those up to VERBOSITY can have a "noreply". */
enum { SET, ADD, REPLACE, APPEND, PREPEND, CAS, DELETE, INCR, DECR, TOUCH, FLUSH, VERBOSITY };
enum { STATS = VERBOSITY + 1, VERSION, QUIT, GET, GETS, UNKNOWN };

static const struct verb {
    const char *name;
    int least, most; /* words behind it, besides "noreply" */
} verbs[UNKNOWN] = {{"set", 4, 4},     {"add", 4, 4},     {"replace", 4, 4},   {"append", 4, 4},
                    {"prepend", 4, 4}, {"cas", 5, 5},     {"delete", 1, 2},    {"incr", 2, 2},
                    {"decr", 2, 2},    {"touch", 2, 2},   {"flush_all", 0, 1}, {"verbosity", 1, 1},
                    {"stats", 0, 0},   {"version", 0, 0}, {"quit", 0, 0},      {"get", 0, 0},
                    {"gets", 0, 0}};

typedef struct command {
    int verb, words;
    char *word[MAX_WORDS]; /* the first is the key, where there is one */
    char *rest;            /* what follows get and gets */
    bool quiet;            /* "noreply" */
} command;

/* Returns false when there are control characters in the line. */
static bool parse_line(const tsrv_slice *line, command *c)
{
    char *text = (char *)line->data, *at = text, *name;
    size_t end = line->size - 1;
    memset(c, 0, sizeof(*c));
    end -= end > 0 && text[end - 1] == '\r';
    for (text[end] = 0; (unsigned char)*at >= ' ' && *at != 127;) {
        at++;
    }
    if (at != text + end) {
        return false;
    }
    name = strtok_r(text, " ", &c->rest);
    while (c->verb < UNKNOWN && (name == NULL || strcmp(name, verbs[c->verb].name) != 0)) {
        c->verb++;
    }
    while (c->verb < GET && c->words < MAX_WORDS && (at = strtok_r(NULL, " ", &c->rest)) != NULL) {
        c->word[c->words++] = at;
    }
    /* A key may have that name: only delete has a key and nothing behind it. */
    c->quiet = c->verb < STATS && c->words > (c->verb == DELETE) &&
               strcmp(c->word[c->words - 1], "noreply") == 0;
    c->words -= c->quiet;
    return true;
}

/* Are these digits, and nothing else, and no more than most? */
static bool number(const char *text, size_t size, uint64_t most, uint64_t *value)
{
    errno = 0;
    *value = strtoull(text, NULL, 10);
    return size > 0 && strspn(text, "0123456789") == size && errno == 0 && *value <= most;
}

/* Seconds from now, or since 1970 if they are many; 0 = never, and a negative time is over. */
static bool end_time(const char *word, int64_t *ends_ms)
{
    size_t sign = *word == '-';
    uint64_t value;
    int64_t seconds;
    if (!number(word + sign, strlen(word + sign), UINT32_MAX, &value)) {
        return false;
    }
    seconds = sign ? -1 : value > MONTH ? (int64_t)value - time(NULL) : (int64_t)value;
    *ends_ms = value == 0 ? INT64_MAX : tsrv_loop_now_ms(NULL) + seconds * 1000;
    return true;
}
