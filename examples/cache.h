/* cache.h - what memcached.c keeps: items by their keys, in bounded memory, and nothing about
 * connections. When it is full, what was not used for the longest time makes room. */
#include <stdlib.h>
#include <string.h>

enum {
    MAX_VALUE = 1024 * 1024,
    MAX_STORED = 64 * 1024 * 1024, /* bytes of all items, also of those that are still coming */
    CHAINS = 65536,
    MAX_CHAIN = 64 /* whoever makes keys collide loses some of them, but costs nobody time */
};

typedef struct item {
    struct item *next;          /* in its chain */
    struct item *older, *newer; /* by the last use, in a ring */
    uint64_t unique;            /* a greater one each time that it is put */
    int64_t ends_ms;            /* on the loop's clock; INT64_MAX = never */
    uint32_t flags;
    size_t size;
    char *key, *value; /* they follow, the value with room for "\r\n" */
} item;

static item *chains[CHAINS];
static item ring = {.older = &ring, .newer = &ring}; /* between the newest and the oldest */
static size_t stored;
static uint64_t last_unique, flushed; /* items up to this one are gone */

static size_t size_of(const char *key, size_t size)
{
    return sizeof(item) + strlen(key) + 1 + size + 2;
}

/* The link to the item of a key; or to where it would be, which is the place of another one when
 * the chain is full. */
static item **find(const char *key)
{
    item **link;
    uint32_t hash = 5381;
    int length;
    for (const char *at = key; *at != 0; at++) {
        hash = hash * 33 + (unsigned char)*at;
    }
    link = &chains[hash % CHAINS];
    for (length = 1; *link != NULL && length < MAX_CHAIN && strcmp((*link)->key, key) != 0;) {
        link = &(*link)->next;
        length++;
    }
    return link;
}

static void cache_free(item *it)
{
    stored -= size_of(it->key, it->size);
    free(it);
}

/* Now it is the caller's, as what cache_make returns. */
static item *cache_take(item *it)
{
    *find(it->key) = it->next;
    it->older->newer = it->newer;
    it->newer->older = it->older;
    return it;
}

/* Makes an item that nobody finds before cache_put, and room for it. NULL: there is no memory, or
 * it is all taken by others that are still coming. */
static item *cache_make(const char *key, size_t size)
{
    size_t bytes = size_of(key, size);
    item *made = NULL;
    while (stored + bytes > MAX_STORED && ring.newer != &ring) {
        cache_free(cache_take(ring.newer));
    }
    if (stored + bytes <= MAX_STORED && (made = (item *)malloc(bytes)) != NULL) {
        stored += bytes;
        memset(made, 0, sizeof(*made));
        made->size = size;
        made->key = strcpy((char *)(made + 1), key);
        made->value = made->key + strlen(key) + 1;
    }
    return made;
}

/* Valid until the next call of any of these. NULL: there is none, or its time is over. */
static item *cache_find(const char *key)
{
    item *it = *find(key);
    if (it == NULL || strcmp(it->key, key) != 0) {
        return NULL;
    }
    if (it->unique <= flushed || it->ends_ms <= tsrv_loop_now_ms(NULL)) {
        cache_free(cache_take(it));
        return NULL;
    }
    it->older->newer = it->newer; /* and to the newest end of the ring: */
    it->newer->older = it->older;
    it->newer = &ring;
    it->older = ring.older;
    it->older->newer = ring.older = it;
    return it;
}

/* In the place of the item with the same key, if there is one. */
static void cache_put(item *it)
{
    item **link = find(it->key);
    if (*link != NULL) {
        cache_free(cache_take(*link));
    }
    it->next = *link;
    *link = it;
    it->unique = ++last_unique;
    it->newer = &ring;
    it->older = ring.older;
    it->older->newer = ring.older = it;
}
