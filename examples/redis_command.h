/* redis_command.h - takes Redis's commands apart: the match function of redis.c. */
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { MAX_WORDS = 15, MAX_WORD = 1 << 20, MAX_LINE = 4096 };

/* The number in a line such as "$3\r\n", whose '\n' is at end: digits, and nothing else. SIZE_MAX:
 * there is none, or it is above most. */
static size_t number_in(const char *line, const char *end, char sign, size_t most)
{
    size_t digits = strspn(line + 1, "0123456789");
    unsigned long number = strtoul(line + 1, NULL, 10); /* ULONG_MAX when it does not fit */
    bool good = *line == sign && digits > 0 && line + 1 + digits + 1 == end && end[-1] == '\r';
    return good && number <= most ? (size_t)number : SIZE_MAX;
}

/* A line as one types it: words between blanks. Returns its size; SIZE_MAX: too many, or a 0. */
static size_t split(const char *line, const char *end, tsrv_slice *word)
{
    const char *at = line + strspn(line, " \t\r");
    while (at < end && *at != 0 && word[0].size < MAX_WORDS) {
        tsrv_slice *next = &word[++word[0].size];
        next->data = at;
        next->size = strcspn(at, " \t\r\n");
        at += next->size;
        at += strspn(at, " \t\r");
    }
    return at == end ? (size_t)(end + 1 - line) : SIZE_MAX;
}

/* For tsrv_read_until_match: "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n" is the same command as "GET k\r\n".
 * The context is an array word[1 + MAX_WORDS]; word[0].size is how many follow it. */
static size_t match_command(const char *data, size_t size, void *context)
{
    tsrv_slice *word = (tsrv_slice *)context;
    size_t at = 0, i;
    for (i = word[0].size = 0; i <= word[0].size && at <= size; i++) {
        const char *line = data + at, *end = (const char *)memchr(line, '\n', size - at);
        if ((end != NULL ? (size_t)(end - line) : size - at) >= MAX_LINE) {
            return SIZE_MAX; /* also if its end is there: the packets must not decide */
        }
        if (end == NULL || *data != '*') {
            return end == NULL ? 0 : split(line, end, word);
        }
        word[i].data = end + 1;
        word[i].size = number_in(line, end, i == 0 ? '*' : '$', i == 0 ? MAX_WORDS : MAX_WORD);
        if (word[i].size == SIZE_MAX) {
            return SIZE_MAX;
        }
        at = (size_t)(end + 1 - data) + (i == 0 ? 0 : word[i].size + 2);
        if (i > 0 && at <= size && memcmp(data + at - 2, "\r\n", 2) != 0) {
            return SIZE_MAX;
        }
    }
    return at; /* more than size: asks again when that much is there */
}
