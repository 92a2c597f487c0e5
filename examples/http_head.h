/* http_head.h - takes the head of a request apart, for all examples that speak HTTP. It is strict:
 * what others could read in another way, and take another part of the input for the next request,
 * is malformed. */
#include <stdlib.h>
#include <string.h>
#include <strings.h>

typedef struct request {
    char method[12], path[256]; /* "./" and so on, up to a query */
    const char *error;          /* what to answer to a malformed head; NULL = it is none */
    bool body, keep;            /* it has one; another request may follow */
    bool expects;               /* it is sent when it was asked for, with "100 Continue" */
    unsigned long long size;    /* of the body; ULLONG_MAX = more than can be told */
} request;

/* Lines end with "\r\n", and there are no control characters but tabs in them. */
static bool is_text(const tsrv_slice *head)
{
    const unsigned char *at = (const unsigned char *)head->data, *end = at + head->size;
    for (; at < end; at++) {
        if (*at == '\r' && at[1] == '\n') {
            at++;
        } else if ((*at < ' ' && *at != '\t') || *at == 127) {
            return false;
        }
    }
    return true;
}

/* "GET /path?query HTTP/1.1", with one blank between them. Returns false for anything else. */
static bool parse_first_line(const char *line, request *r)
{
    size_t method = strspn(line, "ABCDEFGHIJKLMNOPQRSTUVWXYZ");
    const char *path = line + method + 1;
    size_t size = line[method] == ' ' ? strcspn(path, " \t\r") : 0;
    const char *version = path + size;
    if (method == 0 || method >= sizeof(r->method) || size == 0 || size + 1 >= sizeof(r->path) ||
        *path != '/' || strncmp(version, " HTTP/1.", 8) != 0 ||
        (version[8] != '0' && version[8] != '1') || version[9] != '\r') {
        return false;
    }
    memcpy(r->method, line, method);
    r->path[0] = '.';
    memcpy(r->path + 1, path, strcspn(path, "? \t\r"));
    r->keep = version[8] == '1';
    return true;
}

static bool has_word(const char *value, const char *word)
{
    while (*value != '\r') {
        size_t size = strcspn(value, ", \t\r");
        if (size == strlen(word) && strncasecmp(value, word, size) == 0) {
            return true;
        }
        value += size;
        value += strspn(value, ", \t");
    }
    return false;
}

/* What matters of "Name: value" is in r afterwards. Returns false when it is malformed. */
static bool parse_field(const char *line, request *r, int *lengths)
{
    size_t name = strcspn(line, " \t\r:"); /* a blank in front of the colon, or of the line: no */
    const char *value = line + name + 1;
    if (name == 0 || line[name] != ':') {
        return false;
    }
    value += strspn(value, " \t");
    if (name == 10 && strncasecmp(line, "Connection", name) == 0) {
        r->keep = r->keep && !has_word(value, "close");
    } else if (name == 17 && strncasecmp(line, "Transfer-Encoding", name) == 0) {
        r->error = "501 Not Implemented"; /* what a proxy may send, but a browser does not */
    } else if (name == 6 && strncasecmp(line, "Expect", name) == 0) {
        r->expects = has_word(value, "100-continue");
    } else if (name == 14 && strncasecmp(line, "Content-Length", name) == 0) {
        size_t digits = strspn(value, "0123456789");
        r->size = strtoull(value, NULL, 10);
        r->body = r->size > 0;
        value += digits + strspn(value + digits, " \t");
        return ++*lengths == 1 && digits > 0 && *value == '\r';
    }
    return true;
}

static void parse(const tsrv_slice *head, request *r)
{
    const char *line = head->data;
    int lengths = 0; /* how many fields tell the size of the body */
    bool good;
    memset(r, 0, sizeof(*r));
    good = is_text(head) && parse_first_line(line, r);
    while (good && *(line = strstr(line, "\r\n") + 2) != '\r') {
        good = parse_field(line, r, &lengths);
    }
    if (!good || (r->error != NULL && lengths > 0)) {
        r->error = "400 Bad Request";
    }
    r->keep = r->keep && r->error == NULL && !r->body; /* a body is never read */
}
