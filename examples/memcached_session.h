/* memcached_session.h - what memcached.c answers to a line, and to the block of bytes that follows
 * some of them: nothing about connections. */
#include <limits.h>

typedef struct session {
    int verb;
    item *coming;    /* gets the block that is read next; NULL = a line is */
    uint64_t unique; /* that cas has named */
    size_t skip;     /* bytes of a block that nobody wants */
    bool quiet;      /* nothing is answered */
    bool over;       /* nobody knows where the next command begins */
} session;

/* Nothing is answered before the block has come. One that is refused is skipped. If its size is not
 * known, what follows must not be taken for commands: it could be anybody's. */
static const char *begin_block(session *s, const command *c)
{
    uint64_t flags, size;
    int64_t ends_ms;
    item *old;
    if ((s->over = !number(c->word[3], strlen(c->word[3]), INT_MAX, &size))) {
        return bad_line;
    }
    s->skip = (size_t)size + 2;
    if (strlen(c->word[0]) > MAX_KEY || !end_time(c->word[2], &ends_ms) ||
        !number(c->word[1], strlen(c->word[1]), UINT32_MAX, &flags) ||
        (c->verb == CAS && !number(c->word[4], strlen(c->word[4]), UINT64_MAX, &s->unique))) {
        return bad_line;
    }
    if (size <= MAX_VALUE && (s->coming = cache_make(c->word[0], (size_t)size)) != NULL) {
        s->coming->flags = (uint32_t)flags;
        s->coming->ends_ms = ends_ms;
        s->skip = 0;
        return NULL;
    }
    if (c->verb == SET && (old = cache_find(c->word[0])) != NULL) {
        cache_free(cache_take(old)); /* it is out of date, whether there is a new one or not */
    }
    return size > MAX_VALUE ? too_large : no_memory;
}

static const char *end_block(session *s)
{
    item *coming = s->coming, *old = cache_find(coming->key);
    const char *answer = s->verb != CAS ? "NOT_STORED" : old == NULL ? "NOT_FOUND" : "EXISTS";
    s->coming = NULL;
    s->over = memcmp(coming->value + coming->size, "\r\n", 2) != 0;
    if (s->over) {
        answer = "CLIENT_ERROR bad data chunk";
    } else if (old != NULL && (s->verb == APPEND || s->verb == PREPEND)) {
        answer = join(old, coming, s->verb == APPEND);
    } else if (s->verb == SET || (s->verb == ADD && old == NULL) ||
               (s->verb == REPLACE && old != NULL) ||
               (s->verb == CAS && old != NULL && old->unique == s->unique)) {
        cache_put(coming);
        return "STORED";
    }
    cache_free(coming);
    return answer;
}

static const char *statistics(void)
{
    static char text[96];
    snprintf(text, sizeof(text), "STAT bytes %zu\r\nSTAT limit_maxbytes %d\r\nEND", stored,
             MAX_STORED);
    return text;
}

/* Every verb but get. NULL: the answer will be known when the block has come. */
static const char *execute(session *s, const command *c)
{
    item *it;
    int64_t ends_ms = 0;
    s->verb = c->verb;
    s->quiet = c->quiet;
    if (c->verb == UNKNOWN || c->words < verbs[c->verb].least || c->words > verbs[c->verb].most) {
        s->over = c->verb <= CAS;
        return "ERROR";
    } else if (c->verb <= CAS) {
        return begin_block(s, c);
    } else if (c->verb == QUIT) {
        s->over = true;
        return NULL;
    } else if (c->verb == FLUSH) {
        if (c->words > 0 && strcmp(c->word[0], "0") != 0) {
            return "CLIENT_ERROR it cannot wait";
        }
        flushed = last_unique; /* all that there are */
        return "OK";
    } else if (c->verb == VERBOSITY) {
        return "OK"; /* it says nothing anyway */
    } else if (c->verb == STATS) {
        return statistics();
    } else if (c->verb == VERSION) {
        return "VERSION " TSRV_VERSION;
    } else if (strlen(c->word[0]) > MAX_KEY ||
               (c->verb == DELETE && c->words > 1 && strcmp(c->word[1], "0") != 0)) {
        return bad_line; /* old clients say for how long the key is to be kept from others: 0 */
    } else if (c->verb == TOUCH && !end_time(c->word[1], &ends_ms)) {
        return "CLIENT_ERROR invalid exptime argument";
    } else if ((it = cache_find(c->word[0])) == NULL) {
        return "NOT_FOUND";
    } else if (c->verb == TOUCH) {
        it->ends_ms = ends_ms;
        return "TOUCHED";
    } else if (c->verb == DELETE) {
        cache_free(cache_take(it));
        return "DELETED";
    }
    return count(it, c->verb == INCR, c->word[1]);
}
