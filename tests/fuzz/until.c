/* A fuzzer of reads: any bytes, in any pieces, read by any sequence of calls, beside an oracle that looks at the whole
 * string of bytes and knows nothing of pieces.
 *
 *     make fuzz && build/fuzz/until -max_len=600 build/fuzz/until.corpus
 *
 * A script is: how the server is, the calls, the pieces, and the rest is what the client sends, perhaps many times
 * over, before it ends its output. What must hold:
 *   - each call returns, in its turn, what the oracle says: the same bytes, the same error; what a failing read leaves,
 *     TSRV_ETOOLONG and TSRV_ETIMEOUT above all, is read by those after it;
 *   - no call waits for more than its result needs, and none is over before that is there;
 *   - a slice, and what a match function is shown, ends with 0. */
#include "world.h"

#include <sys/ioctl.h>

#define CALLS 16
#define PIECES 16
#define LARGEST 70000 /* bytes that are sent, in all: more than the loop receives at once */

enum { UNTIL, UNTIL_MEM, MATCH, BYTES, SOME, INTO, UNTIL_CLOSE, DROP_UNTIL, DROP_BYTES, KINDS };

static const char *const names[] = {"until", "until_mem", "match",      "bytes",     "some",
                                    "into",  "close",     "drop_until", "drop_bytes"};

typedef struct call {
    int kind;
    size_t size; /* of the result, for those that say so */
    size_t max;
    char delimiter[40];
    size_t delimiter_size;
    unsigned variant; /* of match */
} call;

static call calls[CALLS + 1];
static int call_count, current; /* the last reads what all of them have left */
static char sent_bytes[LARGEST];
static size_t total; /* bytes that are sent in the end */
static size_t sent;  /* so far */
static size_t at;    /* what is read before this */
static bool ended;   /* and then the input */
static bool handled, closed;
static int read_ms;      /* the time that a call has; 0 = any */
static int64_t began_ms; /* when it was made first; -1 = it was not yet */
static size_t max_buffer_size;
static char into[LARGEST];
static size_t need; /* bytes that the match function has asked for */
static int server_fd;
static bool waits; /* it is a coroutine that reads */

/* ---- the oracle ---------------------------------------------------------------------------*/

/* The first bytes up to a delimiter's end; 0 = it is not there. */
static size_t delimited(const call *c, const char *data, size_t size)
{
    const char *found = (const char *)memmem(data, size, c->delimiter, c->delimiter_size);
    return found == NULL ? 0 : (size_t)(found - data) + c->delimiter_size;
}

/* What the match function says; more bytes never make it say otherwise, but where it cannot tell. */
static size_t matched(const call *c, const char *data, size_t size)
{
    const unsigned char *bytes = (const unsigned char *)data;
    switch (c->variant % 4) {
    case 0:
        return delimited(c, data, size);
    case 1:
        return 1 + (size_t)bytes[0];
    case 2:
        return bytes[0] == 0xff ? SIZE_MAX : size < 2 ? 2 : 2 + (((size_t)bytes[0] << 8 | bytes[1]) % 5000);
    default:
        return 0;
    }
}

static size_t longest(const call *c)
{
    return c->max == 0 || c->max > max_buffer_size ? max_buffer_size : c->max;
}

static int too_short_or_long(size_t size, size_t most, bool over)
{
    return size > most ? TSRV_ETOOLONG : over ? TSRV_EOF : TSRV_EAGAIN;
}

static int predict_until(const call *c, const char *data, size_t size, bool over, size_t *result)
{
    bool drops = c->kind == DROP_UNTIL;
    size_t found = delimited(c, data, size);
    if (c->delimiter_size > max_buffer_size) {
        return TSRV_EINVAL;
    }
    *result = found;
    return found != 0 && (drops || found <= longest(c)) ? TSRV_OK
                                                        : too_short_or_long(size, drops ? SIZE_MAX : longest(c), over);
}

static int predict_match(const call *c, const char *data, size_t size, bool over, size_t *result)
{
    size_t found = size == 0 ? 0 : matched(c, data, size);
    if (found > longest(c) || (found == 0 && size > longest(c))) {
        return TSRV_ETOOLONG;
    }
    *result = found;
    return found != 0 && found <= size ? TSRV_OK : over ? TSRV_EOF : TSRV_EAGAIN;
}

/* What a read of these bytes should return; over = nothing comes behind them. Of `some` the result is how much there
 * is at most. */
static int predict(const call *c, const char *data, size_t size, bool over, size_t *result)
{
    *result = c->size;
    switch (c->kind) {
    case UNTIL:
    case UNTIL_MEM:
    case DROP_UNTIL:
        return predict_until(c, data, size, over, result);
    case MATCH:
        return predict_match(c, data, size, over, result);
    case SOME:
        *result = size < longest(c) ? size : longest(c);
        return size != 0 ? TSRV_OK : over ? TSRV_EOF : TSRV_EAGAIN;
    case UNTIL_CLOSE:
        *result = size;
        return size > longest(c) ? TSRV_ETOOLONG : over ? TSRV_OK : TSRV_EAGAIN;
    case BYTES:
        if (c->size > max_buffer_size) {
            return TSRV_ETOOLONG;
        } /* falls through */
    default:
        return size >= c->size ? TSRV_OK : over ? TSRV_EOF : TSRV_EAGAIN;
    }
}

/* ---- the program --------------------------------------------------------------------------*/

static size_t match(const char *data, size_t size, void *context)
{
    const call *c = (const call *)context;
    size_t found;
    if (size < need || size > total - at || memcmp(data, sent_bytes + at, size) != 0 || data[size] != 0) {
        fail("match is shown %zu bytes, which are not what was sent, or less than %zu", size, need);
    }
    found = matched(c, data, size);
    need = found > size && waits ? found : 0; /* a call that is repeated asks anew */
    return found;
}

static int make_call(tsrv_stream *stream, const call *c, tsrv_slice *slice)
{
    switch (c->kind) {
    case UNTIL:
        return tsrv_read_until(stream, c->delimiter, c->max, slice);
    case UNTIL_MEM:
        return tsrv_read_until_mem(stream, c->delimiter, c->delimiter_size, c->max, slice);
    case MATCH:
        return tsrv_read_until_match(stream, match, (void *)(uintptr_t)c, c->max, slice);
    case BYTES:
        return tsrv_read_bytes(stream, c->size, slice);
    case SOME:
        return tsrv_read_some(stream, c->max, slice);
    case INTO:
        return tsrv_read_into(stream, into, c->size);
    case UNTIL_CLOSE:
        return tsrv_read_until_close(stream, c->max, slice);
    case DROP_UNTIL:
        return tsrv_read_until_mem(stream, c->delimiter, c->delimiter_size, c->max, NULL);
    default:
        return tsrv_read_bytes(stream, c->size, NULL);
    }
}

/* A read that drops has failed: how much is gone it alone knows. */
static void after_drop(tsrv_stream *stream, const call *c, int rc)
{
    int kernel = 0;
    size_t left;
    ioctl(server_fd, FIONREAD, &kernel);
    left = tsrv_unread_size(stream) + (size_t)kernel;
    if (left > sent - at || (c->kind == DROP_UNTIL && rc == TSRV_EOF && left >= c->delimiter_size) ||
        (c->kind == DROP_BYTES && (rc == TSRV_EOF ? left != 0 : sent - at - left >= c->size))) {
        fail("%s leaves %zu bytes of %zu", names[c->kind], left, sent - at);
    }
    at = sent - left;
}

static void check_result(const call *c, const tsrv_slice *slice, size_t size)
{
    bool sliced = c->kind != INTO && c->kind < DROP_UNTIL;
    const char *data = sliced ? slice->data : into;
    if (sliced && c->kind == SOME ? slice->size == 0 || slice->size > size : sliced && slice->size != size) {
        fail("%s returns %zu bytes, not %zu", names[c->kind], slice->size, size);
    }
    size = sliced ? slice->size : size;
    if ((sliced || c->kind == INTO) && memcmp(data, sent_bytes + at, size) != 0) {
        fail("%s returns other bytes than were sent", names[c->kind]);
    }
    if (sliced && data[size] != 0) {
        fail("the slice of %s does not end with 0", names[c->kind]);
    }
    at += size;
}

/* One call, or its repetition. Returns whether it is over. */
static bool step(tsrv_stream *stream)
{
    const call *c = &calls[current];
    tsrv_slice slice = {"x", 1};
    size_t size;
    int rc, expected;
    began_ms = began_ms < 0 ? now_ms() : began_ms;
    rc = make_call(stream, c, &slice);
    expected = predict(c, sent_bytes + at, sent - at, ended, &size);
    if (rc == TSRV_EAGAIN) {
        return false;
    }
    TRACE("%s at %zu of %zu%s = %d\n", names[c->kind], at, sent, ended ? ", all" : "", rc);
    if (rc == TSRV_ETIMEOUT && read_ms != 0 && now_ms() - began_ms >= read_ms && expected == TSRV_EAGAIN) {
        expected = rc;
    }
    if (rc != expected) {
        fail("%s returns %d, not %d", names[c->kind], rc, expected);
    }
    if (rc == TSRV_OK) {
        check_result(c, &slice, size);
    } else if (c->kind >= DROP_UNTIL) {
        after_drop(stream, c, rc);
    } else if (c->kind != INTO && (slice.size != 0 || slice.data[0] != 0)) {
        fail("%s fails, but its slice is not empty", names[c->kind]);
    }
    current += c == &calls[call_count] ? rc == TSRV_EOF : rc != TSRV_ETIMEOUT;
    began_ms = -1;
    need = 0;
    return true;
}

static int handle(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address;
    (void)context;
    handled = true;
    server_fd = tsrv_fd(stream);
    while (current <= call_count) {
        if (!step(stream)) {
            return TSRV_EAGAIN;
        }
    }
    return TSRV_OK;
}

static void on_close(tsrv_stream *stream, int reason, void *context)
{
    (void)stream;
    (void)context;
    if (reason != TSRV_OK || current <= call_count) {
        fail("the stream ends with %d in call %d", reason, current);
    }
    closed = true;
}

/* ---- one script ---------------------------------------------------------------------------*/

static void draw_delimiter(call *c)
{
    static const char *const usual[] = {"\n", "\r\n", "\r\n\r\n", "aaab", "aba"};
    unsigned what = draw(16);
    c->delimiter_size = 1 + draw(what < 14 ? 4 : sizeof c->delimiter - 1);
    if (what < 5) {
        c->delimiter_size = strlen(usual[what]);
        memcpy(c->delimiter, usual[what], c->delimiter_size);
        return;
    }
    for (size_t i = 0; i < c->delimiter_size; i++) {
        c->delimiter[i] = (char)(what < 10 ? 'a' + (int)draw(2) : (int)draw(256));
    }
    if (c->kind == UNTIL) {
        c->delimiter[c->delimiter_size] = 0;
        c->delimiter[0] = c->delimiter[0] == 0 ? 'a' : c->delimiter[0];
        c->delimiter_size = strlen(c->delimiter);
    }
}

static void draw_calls(void)
{
    static const size_t scales[] = {1, 1, 1, 7, 90, 1000};
    call_count = (int)draw(CALLS + 1);
    memset(calls, 0, sizeof calls);
    for (int i = 0; i < call_count; i++) {
        call *c = &calls[i];
        c->kind = (int)draw(KINDS);
        c->size = draw(256) * PICK(scales);
        c->max = draw(64) * PICK(scales);
        c->variant = c->kind == MATCH ? draw(4) : 0;
        if (c->kind <= MATCH || c->kind == DROP_UNTIL) {
            draw_delimiter(c);
        }
    }
    calls[call_count].kind = SOME;
}

/* What is left of the script, over and over. */
static void make_bytes(unsigned times)
{
    size_t size = script_back - script_front;
    total = 0;
    for (unsigned i = 0; i < times && total + size <= LARGEST; i++) {
        memcpy(sent_bytes + total, script + script_front, size);
        total += size;
    }
}

/* What is there by now is enough for nothing more: else somebody sleeps. */
static void check_rest(void)
{
    size_t size;
    int kernel = 0;
    settle();
    if (current > call_count || !handled) {
        if (!handled) {
            fail("the handler is not called");
        }
        return;
    }
    ioctl(server_fd, FIONREAD, &kernel);
    if (predict(&calls[current], sent_bytes + at, sent - at, ended, &size) != TSRV_EAGAIN) {
        fail("%s still waits for what is there, %zu bytes (%d in the kernel)", names[calls[current].kind], sent - at,
             kernel);
    }
}

static void send_all(int fd, const uint8_t *pieces, size_t count)
{
    for (size_t i = 0; sent < total; i++) {
        unsigned piece = count == 0 ? 255 : pieces[i % count];
        size_t size = piece < 200 ? 1 + piece % 32 : piece < 240 ? (piece - 199) * 90 : total;
        bool whole = piece % 8 != 7;
        size = size < total - sent ? size : total - sent;
        size = i < 100 ? size : total - sent;
        while (size != 0) {
            size_t took = client_send(fd, sent_bytes + sent, size);
            sent += took;
            size -= took;
            if (took == 0) {
                check_rest(); /* to make room */
            }
        }
        if (whole) {
            check_rest();
        }
        if (read_ms != 0 && piece % 16 == 3) {
            settle_for(read_ms + 3);
        }
    }
}

static void begin(unsigned how)
{
    static const size_t buffers[] = {0, 1, 16, 100, 1000, 5000}, receives[] = {0, 0, 1, 7, 100, 4096};
    tsrv_server_options options = {0};
    world_open((how & 2) != 0 ? TSRV_BACKEND_POLL : TSRV_BACKEND_EPOLL);
    options.loop = loop;
    waits = (how & 1) == 0;
    options.mode = waits ? TSRV_COROUTINE : TSRV_CALLBACK;
    options.handle_stream = handle;
    options.on_close = on_close;
    options.max_buffer_size = PICK(buffers);
    options.read_chunk_size = PICK(receives);
    options.read_timeout_ms = read_ms;
    max_buffer_size = options.max_buffer_size == 0 ? 1024 * 1024 : options.max_buffer_size;
    if (tsrv_server_new(&server, &options) != TSRV_OK) {
        fail("no server");
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const unsigned repeats[] = {1, 1, 1, 2, 5, 30, 400};
    int descriptors = open_descriptors(), fd;
    unsigned how, times;
    const uint8_t *pieces;
    size_t count;
    world_begin();
    script_is(data, size);
    how = draw(256);
    read_ms = (how & 4) != 0 ? 10 : 0;
    begin(how);
    draw_calls();
    times = PICK(repeats);
    count = draw(PIECES);
    count = count < script_back - script_front ? count : script_back - script_front;
    pieces = script + script_front;
    script_front += count;
    make_bytes(times);
    current = 0;
    began_ms = -1;
    at = sent = need = 0;
    ended = handled = closed = false;
    fd = connect_client();
    send_all(fd, pieces, count);
    check_rest();
    shutdown(fd, SHUT_WR);
    ended = true;
    settle();
    if (!closed || at != total) {
        fail("after the end of the input call %d (%s) waits, at %zu of %zu", current,
             current <= call_count ? names[calls[current].kind] : "none", at, total);
    }
    close(fd);
    world_close_all();
    if (open_descriptors() != descriptors) {
        fail("descriptors are left");
    }
    return 0;
}
