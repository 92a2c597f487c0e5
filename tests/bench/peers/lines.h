/* For the peers that are handed bytes by their library: finds lines, and keeps the unfinished one of a connection. */
#ifndef LINES_H
#define LINES_H

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define MAX_LINE ((size_t)1 << 20)
#define LARGE ((size_t)64 << 10)
#define SPARES 16

typedef struct rest {
    char *data;
    size_t size, room;
} rest;

/* Is handed a run of whole lines; false = the connection has failed. */
typedef bool (*lines_out)(void *context, const char *data, size_t size);

/* Large buffers are kept for the next long line, as the floor does: what is compared are the libraries. */
static rest lines_spare[SPARES];
static int lines_spares;

static inline void lines_release(rest *r)
{
    if (r->room >= LARGE && lines_spares < SPARES) {
        lines_spare[lines_spares++] = *r;
    } else {
        free(r->data);
    }
    memset(r, 0, sizeof *r);
}

static inline bool lines_append(rest *r, const char *data, size_t size)
{
    if (r->data == NULL && size >= 4096 && lines_spares > 0) {
        *r = lines_spare[--lines_spares];
        r->size = 0;
    }
    if (r->size + size > r->room) {
        size_t room = r->room > 0 ? r->room : 1024;
        while (room < r->size + size) {
            room *= 2;
        }
        char *larger = (char *)realloc(r->data, room);
        if (larger == NULL) {
            return false;
        }
        r->data = larger;
        r->room = room;
    }
    memcpy(r->data + r->size, data, size);
    r->size += size;
    return true;
}

/* How many bytes of data are whole lines. It looks at every line, as a server has to that does something with them. */
static inline size_t lines_whole(const char *data, size_t size)
{
    const char *end, *at = data;
    while ((end = (const char *)memchr(at, '\n', (size_t)(data + size - at))) != NULL) {
        at = end + 1;
    }
    return (size_t)(at - data);
}

/* More bytes of a connection. False = a line is too long, or the connection has failed. */
static inline bool lines_feed(rest *r, const char *data, size_t size, lines_out out, void *context)
{
    size_t whole = lines_whole(data, size);
    if (whole > 0 && r->size == 0 && !out(context, data, whole)) {
        return false;
    }
    if (whole > 0 && r->size > 0) {
        if (!lines_append(r, data, whole) || !out(context, r->data, r->size)) {
            return false;
        }
        lines_release(r);
    }
    return (size == whole || lines_append(r, data + whole, size - whole)) && r->size <= MAX_LINE;
}

#endif
