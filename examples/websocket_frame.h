/* websocket_frame.h - WebSocket's frames, as RFC 6455 has them in section 5: the match function of
 * websocket.c, and what else it takes to read and to write them. */

enum { MAX_MESSAGE = 256 * 1024 };
enum { CONTINUATION, TEXT, BINARY, CLOSE = 8, PING, PONG };

/* Why a WebSocket is closed. */
enum {
    NORMAL = 1000,
    GOING_AWAY,
    PROTOCOL_ERROR,
    INVALID_DATA = 1007,
    TOO_BIG = 1009,
    SERVER_ERROR = 1011
};

typedef struct frame {
    int opcode;
    bool last;         /* of its message */
    size_t head, size; /* the four bytes of the mask are the head's last */
    int error;         /* with TSRV_ETOOLONG: what is wrong */
} frame;

/* For tsrv_read_until_match; the context is a frame. */
static size_t match_frame(const char *data, size_t size, void *context)
{
    const unsigned char *at = (const unsigned char *)data;
    frame *f = (frame *)context;
    size_t more, i;
    uint64_t length;
    if (size < 2) {
        return 2;
    }
    f->opcode = at[0] & 15;
    f->last = (at[0] & 128) != 0;
    f->error = PROTOCOL_ERROR;
    length = at[1] & 127;
    if ((at[0] & 0x70) != 0 || (at[1] & 128) == 0 /* not masked */ ||
        (f->opcode & 7) > PING - CLOSE + 1 || (f->opcode >= CLOSE && (!f->last || length > 125))) {
        return SIZE_MAX;
    }
    more = length == 126 ? 2 : length == 127 ? 8 : 0;
    f->head = 2 + more + 4;
    if (size < f->head) {
        return f->head;
    }
    for (i = 0, length = more > 0 ? 0 : length; i < more; i++) {
        length = length << 8 | at[2 + i];
    }
    if ((more == 2 && length < 126) || (more == 8 && length < 65536)) {
        return SIZE_MAX; /* there is one way only to write a length */
    } else if (length > MAX_MESSAGE) {
        f->error = TOO_BIG;
        return SIZE_MAX;
    }
    f->size = (size_t)length;
    return f->head + f->size;
}

/* In place: what a read hands out is the program's, to change, until the next read. */
static char *unmask(const frame *f, const tsrv_slice *all)
{
    char *payload = (char *)all->data + f->head;
    for (size_t i = 0; i < f->size; i++) {
        payload[i] = (char)(payload[i] ^ all->data[f->head - 4 + i % 4]);
    }
    return payload;
}

static void send_frame(tsrv_stream *stream, int opcode, const char *data, size_t size)
{
    char head[10] = {(char)(128 | opcode), (char)(size < 126 ? size : size < 65536 ? 126 : 127)};
    size_t more = size < 126 ? 0 : size < 65536 ? 2 : 8, i;
    tsrv_slice parts[2] = {{head, 2 + more}, {data, size}};
    for (i = 0; i < more; i++) {
        head[2 + i] = (char)((uint64_t)size >> 8 * (more - 1 - i));
    }
    tsrv_writev(stream, parts, 2);
}

static void send_close(tsrv_stream *stream, int code)
{
    char text[2] = {(char)(code >> 8), (char)code};
    send_frame(stream, CLOSE, text, 2);
}

/* No more bytes than it takes, no surrogates, nothing above 10FFFF. */
static bool is_utf8(const char *text, size_t size)
{
    const unsigned char *at = (const unsigned char *)text, *end = at + size;
    while (at < end) {
        int more = *at < 0x80 ? 0 : *at >= 0xf0 ? 3 : *at >= 0xe0 ? 2 : 1;
        unsigned second = more > 0 && end - at > 1 ? at[1] : 0;
        if (end - at <= more || (*at >= 0x80 && *at < 0xc2) || *at > 0xf4 ||
            (*at == 0xe0 && second < 0xa0) || (*at == 0xed && second > 0x9f) ||
            (*at == 0xf0 && second < 0x90) || (*at == 0xf4 && second > 0x8f)) {
            return false;
        }
        for (at++; more > 0; more--, at++) {
            if ((*at & 0xc0) != 0x80) {
                return false;
            }
        }
    }
    return true;
}

/* What to answer to a close frame. */
static int close_code(const char *data, size_t size)
{
    int code = size < 2 ? NORMAL : (unsigned char)data[0] << 8 | (unsigned char)data[1];
    bool known = (code >= 1000 && code <= 1014 && (code < 1004 || code > 1006)) ||
                 (code >= 3000 && code <= 4999);
    if (size == 1 || !known) {
        return PROTOCOL_ERROR;
    }
    return size > 2 && !is_utf8(data + 2, size - 2) ? INVALID_DATA : code;
}
