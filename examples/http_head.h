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
    int minor, hosts, lengths;  /* of HTTP/1.x; how many fields tell the host, and the size */
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

/* "http://host/path" is "/path" here: it is what a proxy is asked (RFC 9112, section 3.2.2). */
static const char *skip_origin(const char *target)
{
    size_t host = strncasecmp(target, "http://", 7) == 0 ? strcspn(target + 7, "/? \t\r") : 0;
    return host > 0 ? target + 7 + host : target;
}

/* "GET /path?query HTTP/1.1", with one blank between them. Returns false for anything else. */
static bool parse_first_line(const char *line, request *r)
{
    size_t method = strspn(line, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"), size;
    const char *target = line + method + 1, *path = skip_origin(target);
    const char *version = target + strcspn(target, " \t\r");
    if (method == 0 || method >= sizeof(r->method) || line[method] != ' ' ||
        (*path != '/' && path == target) || strncmp(version, " HTTP/1.", 8) != 0 ||
        version[8] < '0' || version[8] > '9' || version[9] != '\r') {
        return false;
    }
    path += *path == '/';
    size = strcspn(path, "? \t\r");
    r->error = size + 3 > sizeof(r->path) ? "414 URI Too Long" : NULL;
    memcpy(r->method, line, method);
    memcpy(r->path, "./", 2);
    memcpy(r->path + 2, path, r->error == NULL ? size : 0);
    r->minor = version[8] - '0';
    r->keep = r->minor > 0;
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
static bool parse_field(const char *line, request *r)
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
        r->expects = r->minor > 0 && has_word(value, "100-continue");
    } else if (name == 13 && strncasecmp(line, "Content-Range", name) == 0) {
        return strcmp(r->method, "PUT") != 0; /* a part must not be taken for all of a file */
    } else if (name == 4 && strncasecmp(line, "Host", name) == 0) {
        value += strcspn(value, "/?#@, \t\r");
        value += strspn(value, " \t");
        return ++r->hosts == 1 && *value == '\r';
    } else if (name == 14 && strncasecmp(line, "Content-Length", name) == 0) {
        size_t digits = strspn(value, "0123456789");
        r->size = strtoull(value, NULL, 10);
        r->body = r->size > 0;
        value += digits + strspn(value + digits, " \t");
        return ++r->lengths == 1 && digits > 0 && *value == '\r';
    }
    return true;
}

/* In front of it there may be an empty line, which some clients send behind a body. */
static void parse(const tsrv_slice *head, request *r)
{
    const char *line = head->data + (strncmp(head->data, "\r\n", 2) == 0 ? 2 : 0);
    bool good;
    memset(r, 0, sizeof(*r));
    good = is_text(head) && parse_first_line(line, r);
    while (good && *(line = strstr(line, "\r\n") + 2) != '\r') {
        good = parse_field(line, r);
    }
    if (!good || (r->minor > 0 && r->hosts == 0) || (r->error != NULL && r->lengths > 0)) {
        r->error = "400 Bad Request";
    }
    r->keep = r->keep && r->error == NULL && !r->body; /* a body is never read */
}
