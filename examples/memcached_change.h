/* memcached_change.h - the verbs that make a new item out of an old one, for memcached.c. Each says
 * what is answered. */
#include <inttypes.h>
#include <stdio.h>

static const char bad_line[] = "CLIENT_ERROR bad command line format";
static const char too_large[] = "SERVER_ERROR object too large for cache";
static const char no_memory[] = "SERVER_ERROR out of memory storing object";

/* After cache_take, when nothing has come of the change: it is as it was. */
static void put_back(item *it)
{
    uint64_t unique = it->unique;
    cache_put(it);
    it->unique = unique;
}

/* append and prepend: both become one, with the flags and the time of the old one. */
static const char *join(item *old, const item *coming, bool append)
{
    const item *first = append ? old : coming, *second = append ? coming : old;
    size_t size = old->size + coming->size;
    item *made;
    if (size > MAX_VALUE) {
        return too_large;
    }
    cache_take(old); /* or cache_make might free it */
    if ((made = cache_make(old->key, size)) == NULL) {
        put_back(old);
        return no_memory;
    }
    memcpy(made->value, first->value, first->size);
    memcpy(made->value + first->size, second->value, second->size + 2);
    made->flags = old->flags;
    made->ends_ms = old->ends_ms;
    cache_free(old);
    cache_put(made);
    return "STORED";
}

/* incr and decr: a sum of more than 64 bits begins again at 0, a difference ends there. */
static const char *count(item *old, bool up, const char *word)
{
    static char text[24];
    uint64_t by, value;
    item *made;
    if (!number(word, strlen(word), UINT64_MAX, &by)) {
        return "CLIENT_ERROR invalid numeric delta argument";
    } else if (!number(old->value, old->size, UINT64_MAX, &value)) {
        return "CLIENT_ERROR cannot increment or decrement non-numeric value";
    }
    value = up ? value + by : value < by ? 0 : value - by;
    snprintf(text, sizeof(text), "%" PRIu64 "\r\n", value);
    cache_take(old);
    if ((made = cache_make(old->key, strlen(text) - 2)) == NULL) {
        put_back(old);
        return no_memory;
    }
    memcpy(made->value, text, strlen(text));
    made->flags = old->flags;
    made->ends_ms = old->ends_ms;
    cache_free(old);
    cache_put(made);
    text[made->size] = 0;
    return text;
}
