/* keyvalue.h - what redis.c keeps: a hash table of bytes by bytes, and nothing about connections.
 * What get returns is valid until the next set, unset or increment, whoever calls it. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    CHAINS = 65536,               /* it does not grow: it is slow with millions of keys */
    PRIME = 2147483647,           /* 2^31 - 1 */
    MAX_STORED = 64 * 1024 * 1024 /* bytes: clients must not be able to fill the memory */
};

static uint64_t secret; /* who knows it can make all keys fall into one chain */

static size_t stored;

static struct entry {
    struct entry *next;
    tsrv_slice key, value; /* their bytes follow, and a 0 */
} * chains[CHAINS];

static size_t size_of(const tsrv_slice *key, const tsrv_slice *value)
{
    return sizeof(struct entry) + key->size + value->size + 1;
}

/* Returns false and errno. Before anything else. */
static bool choose_secret(void)
{
    FILE *random = fopen("/dev/urandom", "rb");
    bool good = random != NULL && fread(&secret, sizeof(secret), 1, random) == 1;
    if (random != NULL) {
        fclose(random);
    }
    secret = secret % (PRIME - 2) + 2;
    return good;
}

/* The link to the entry of a key, or the one where it would be. */
static struct entry **find(const tsrv_slice *key)
{
    struct entry **link;
    uint64_t hash = key->size;
    for (size_t i = 0; i < key->size; i++) {
        hash = (hash * secret + (unsigned char)key->data[i]) % PRIME;
    }
    link = &chains[hash % CHAINS];
    while (*link != NULL && ((*link)->key.size != key->size ||
                             memcmp((*link)->key.data, key->data, key->size) != 0)) {
        link = &(*link)->next;
    }
    return link;
}

/* Returns NULL when there is no such key. */
static const tsrv_slice *get(const tsrv_slice *key)
{
    const struct entry *entry = *find(key);
    return entry != NULL ? &entry->value : NULL;
}

/* Returns false when there is no memory, or too much is stored; then the old value stays. */
static bool set(const tsrv_slice *key, const tsrv_slice *value)
{
    struct entry **link = find(key), *old = *link, *made;
    size_t without = stored - (old != NULL ? size_of(key, &old->value) : 0);
    char *bytes;
    if (size_of(key, value) > MAX_STORED - without ||
        (made = (struct entry *)malloc(size_of(key, value))) == NULL) {
        return false;
    }
    stored = without + size_of(key, value);
    bytes = (char *)(made + 1);
    made->next = old != NULL ? old->next : NULL;
    made->key.data = (char *)memcpy(bytes, key->data, key->size);
    made->key.size = key->size;
    made->value.data = (char *)memcpy(bytes + key->size, value->data, value->size);
    made->value.size = value->size;
    bytes[key->size + value->size] = 0;
    *link = made;
    free(old);
    return true;
}

/* Returns false when there was no such key. */
static bool unset(const tsrv_slice *key)
{
    struct entry **link = find(key), *old = *link;
    if (old != NULL) {
        *link = old->next;
        stored -= size_of(key, &old->value);
        free(old);
    }
    return old != NULL;
}

/* Adds one; no value counts as 0. A value is a number if printing it gives the same text: no
 * blanks, no overflow. Returns false when it is none, or as set. */
static bool increment(const tsrv_slice *key, long long *number)
{
    const tsrv_slice zero = {"0", 1}, *old = get(key) != NULL ? get(key) : &zero;
    char text[32];
    tsrv_slice made = {text, 0};
    *number = strtoll(old->data, NULL, 10);
    if ((size_t)snprintf(text, sizeof(text), "%lld", *number) != old->size ||
        strcmp(text, old->data) != 0 || *number == LLONG_MAX) {
        return false;
    }
    ++*number;
    made.size = (size_t)snprintf(text, sizeof(text), "%lld", *number);
    return set(key, &made);
}
