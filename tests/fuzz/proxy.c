/* A fuzzer of PROXY headers: any bytes, in any pieces, at a server that asks for one, beside a parser of HAProxy's
 * doc/proxy-protocol.txt that is written as naively as can be.
 *
 *     make fuzz && build/fuzz/proxy -max_len=400 build/fuzz/proxy.corpus
 *
 * What must hold:
 *   - the handler is called, once, if and only if the header is good, as soon as its last byte is there and not
 *     before, with the client's address; all TLVs are found, and no others; what lies behind the header is read as it
 *     was sent; whatever the pieces are;
 *   - what has no good header is over when its input ends, or handshake_timeout_ms are, and no handler sees it;
 *   - a header that the library makes says what was asked for. */
#include "world.h"

#include <sys/un.h>

#define WIRE 70000
#define PIECES 16
#define HANDSHAKE_MS 1000

static char wire[WIRE];
static size_t wire_size;

/* ---- the oracle ---------------------------------------------------------------------------*/

typedef struct verdict {
    size_t size; /* of a good header; 0 = it is none, or not all of it is there */
    size_t tlvs; /* where they begin in it */
    int family;  /* of the client; AF_UNSPEC = the sender itself */
    unsigned char ip[16];
    unsigned port;
    char path[108];
    size_t path_size;
} verdict;

static bool parse_number(const char *text, size_t size, unsigned most, unsigned *number)
{
    *number = 0;
    if (size == 0 || size > 5 || (size > 1 && text[0] == '0')) {
        return false;
    }
    for (size_t i = 0; i < size; i++) {
        if (text[i] < '0' || text[i] > '9') {
            return false;
        }
        *number = *number * 10 + (unsigned)(text[i] - '0');
    }
    return *number <= most;
}

static bool parse_four(const char *text, size_t size, unsigned char *ip)
{
    for (int i = 0; i < 4; i++) {
        const char *dot = (const char *)memchr(text, '.', size);
        size_t part = i == 3 ? size : dot == NULL ? 0 : (size_t)(dot - text);
        unsigned number;
        if (!parse_number(text, part, 255, &number)) {
            return false;
        }
        ip[i] = (unsigned char)number;
        text += part + 1;
        size -= i == 3 ? part : part + 1;
    }
    return true;
}

static int hex_digit(char letter)
{
    const char *digits = "0123456789abcdef0123456789ABCDEF";
    const char *found = letter == 0 ? NULL : strchr(digits, letter);
    return found == NULL ? -1 : (int)(found - digits) % 16;
}

/* One group of 16 bits, or at the end a dotted quad. Returns how many bytes it gives; 0 = it is none. */
static int parse_group(const char *text, size_t size, bool last, unsigned char *ip, size_t room)
{
    int value = 0;
    if (last && room >= 4 && memchr(text, '.', size) != NULL) {
        return parse_four(text, size, ip) ? 4 : 0;
    }
    if (size == 0 || size > 4 || room < 2) {
        return 0;
    }
    for (size_t i = 0; i < size; i++) {
        int digit = hex_digit(text[i]);
        if (digit < 0) {
            return 0;
        }
        value = value * 16 + digit;
    }
    ip[0] = (unsigned char)(value >> 8);
    ip[1] = (unsigned char)value;
    return 2;
}

/* Groups with a colon between. Returns their bytes; -1 = something is wrong with them. */
static int parse_groups(const char *text, size_t size, bool last, unsigned char *ip)
{
    int bytes = 0;
    while (size != 0) {
        const char *colon = (const char *)memchr(text, ':', size);
        size_t part = colon == NULL ? size : (size_t)(colon - text);
        int got = parse_group(text, part, last && colon == NULL, ip + bytes, 16 - (size_t)bytes);
        if (got == 0 || (colon != NULL && part + 1 == size)) {
            return -1;
        }
        bytes += got;
        text += colon == NULL ? part : part + 1;
        size -= colon == NULL ? part : part + 1;
    }
    return bytes;
}

/* RFC 4291, 2.2. */
static bool parse_six(const char *text, size_t size, unsigned char *ip)
{
    const char *gap = (const char *)memmem(text, size, "::", 2);
    unsigned char front[20], back[20];
    int before, behind;
    if (gap == NULL) {
        return parse_groups(text, size, true, ip) == 16;
    }
    before = parse_groups(text, (size_t)(gap - text), false, front);
    behind = parse_groups(gap + 2, size - (size_t)(gap + 2 - text), true, back);
    if (before < 0 || behind < 0 || before + behind > 14) {
        return false;
    }
    memset(ip, 0, 16);
    memcpy(ip, front, (size_t)before);
    memcpy(ip + 16 - behind, back, (size_t)behind);
    return true;
}

/* "PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n" */
static void parse_line(const char *data, size_t size, verdict *v)
{
    const char *end = (const char *)memchr(data, '\n', size < 107 ? size : 107), *words[8];
    size_t line = end == NULL ? 0 : (size_t)(end - data) + 1, sizes[8] = {0};
    unsigned char ours[16];
    unsigned port;
    int count = 0;
    bool four;
    if (line < 2 || data[line - 2] != '\r' || memchr(data, 0, line) != NULL) { /* a 0 is no part of a line of text */
        return;
    }
    if (line >= 15 && memcmp(data, "PROXY UNKNOWN", 13) == 0 && (line == 15 || data[13] == ' ')) {
        v->size = v->tlvs = line; /* whatever is said behind it */
        return;
    }
    words[0] = data;
    for (const char *at = data; at < data + line - 2 && count < 7; at++) {
        if (*at == ' ') {
            words[++count] = at + 1;
        } else {
            sizes[count]++;
        }
    }
    four = sizes[1] == 4 && memcmp(words[1], "TCP4", 4) == 0;
    if (count != 5 || sizes[0] != 5 || (!four && (sizes[1] != 4 || memcmp(words[1], "TCP6", 4) != 0)) ||
        !(four ? parse_four : parse_six)(words[2], sizes[2], v->ip) ||
        !(four ? parse_four : parse_six)(words[3], sizes[3], ours) ||
        !parse_number(words[4], sizes[4], 65535, &v->port) || !parse_number(words[5], sizes[5], 65535, &port)) {
        return;
    }
    v->size = v->tlvs = line;
    v->family = four ? AF_INET : AF_INET6;
}

/* CRC32c, RFC 9260, appendix A, bit by bit, the highest first. */
static uint32_t crc32c(const unsigned char *data, size_t size, size_t hole)
{
    uint32_t crc = 0xFFFFFFFFu, mirrored = 0;
    for (size_t i = 0; i < size * 8; i++) {
        unsigned byte = i / 8 >= hole && i / 8 < hole + 4 ? 0 : data[i / 8];
        uint32_t bit = (byte >> (i % 8) & 1) ^ (crc >> 31);
        crc = (crc << 1) ^ (bit != 0 ? 0x1EDC6F41u : 0);
    }
    for (int i = 0; i < 32; i++) {
        mirrored |= (crc >> i & 1) << (31 - i);
    }
    return ~mirrored;
}

static bool good_tlvs(const unsigned char *bytes, size_t size, size_t at)
{
    bool summed = false;
    while (at < size) {
        size_t length = at + 3 > size ? SIZE_MAX : (size_t)bytes[at + 1] << 8 | bytes[at + 2];
        if (length == SIZE_MAX || at + 3 + length > size) {
            return false;
        }
        if (bytes[at] == 3 && !summed) { /* PP2_TYPE_CRC32C */
            uint32_t sum = length != 4 ? 0
                                       : (uint32_t)bytes[at + 3] << 24 | (uint32_t)bytes[at + 4] << 16 |
                                             (uint32_t)bytes[at + 5] << 8 | bytes[at + 6];
            if (length != 4 || sum != crc32c(bytes, size, at + 3)) {
                return false;
            }
            summed = true;
        }
        at += 3 + length;
    }
    return true;
}

static void client_of(const unsigned char *bytes, int kind, verdict *v)
{
    const unsigned char *from = bytes + 16;
    if (kind == 0x11) {
        v->family = AF_INET;
        memcpy(v->ip, from, 4);
        v->port = (unsigned)from[8] << 8 | from[9];
    } else if (kind == 0x21) {
        v->family = AF_INET6;
        memcpy(v->ip, from, 16);
        v->port = (unsigned)from[32] << 8 | from[33];
    } else if (kind == 0x31) {
        v->family = AF_UNIX;
        memcpy(v->path, from, 108);
        v->path_size = 108;
        while (v->path_size != 0 && v->path[v->path_size - 1] == 0) {
            v->path_size--;
        }
    }
}

static void parse_binary(const char *data, size_t size, verdict *v)
{
    static const size_t addresses[] = {0, 12, 36, 216};
    const unsigned char *bytes = (const unsigned char *)data;
    size_t whole = size < 16 ? SIZE_MAX : 16 + ((size_t)bytes[14] << 8 | bytes[15]);
    int kind;
    if (size < whole || bytes[12] / 16 != 2 || bytes[12] % 16 > 1) {
        return;
    }
    kind = bytes[13];
    if (bytes[12] % 16 == 0) { /* LOCAL */
        v->size = v->tlvs = whole;
        return;
    }
    if (kind / 16 > 3 || kind % 16 > 2 || whole < 16 + addresses[kind / 16] ||
        !good_tlvs(bytes, whole, 16 + addresses[kind / 16])) {
        return;
    }
    v->size = whole;
    v->tlvs = 16 + addresses[kind / 16];
    client_of(bytes, kind, v);
}

static verdict judge(const char *data, size_t size)
{
    verdict v = {0};
    if (size >= 12 && memcmp(data, "\r\n\r\n\0\r\nQUIT\n", 12) == 0) {
        parse_binary(data, size, &v);
    } else if (size >= 6 && memcmp(data, "PROXY ", 6) == 0) {
        parse_line(data, size, &v);
    }
    return v;
}

/* ---- addresses ----------------------------------------------------------------------------*/

static void check_address(const tsrv_address *address, const verdict *v, const char *what)
{
    tsrvi_sockaddr inside;
    int family = tsrv_address_family(address);
    bool same;
    tsrvi_address_load(address, &inside);
    if (v->family == AF_INET) {
        same = family == AF_INET && memcmp(&inside.four.sin_addr, v->ip, 4) == 0 &&
               tsrv_address_port(address) == (int)v->port;
    } else if (v->family == AF_INET6) {
        same = family == AF_INET6 && memcmp(&inside.six.sin6_addr, v->ip, 16) == 0 &&
               tsrv_address_port(address) == (int)v->port;
    } else { /* the sender, which has no name, has none either */
        size_t size = address->size - offsetof(struct sockaddr_un, sun_path);
        same = family == AF_UNIX && size >= v->path_size && size <= v->path_size + 1 &&
               memcmp(inside.local.sun_path, v->path, v->path_size) == 0 &&
               (size == v->path_size || inside.local.sun_path[v->path_size] == 0);
    }
    if (!same) {
        char text[TSRV_ADDRESS_SIZE];
        fail("%s is %s", what, tsrv_address_format(address, text, sizeof text));
    }
}

/* A header that is made from the address says the same. */
static void check_built(const tsrv_address *address, const verdict *v)
{
    char header[TSRVI_PROXY_LARGEST];
    tsrv_address nothing = {0};
    size_t size = tsrvi_proxy_build(address, (wire_size & 1) != 0 ? address : &nothing, header);
    verdict made = judge(header, size);
    if (made.size != size || made.tlvs != size || made.family != v->family || made.port != v->port ||
        memcmp(made.ip, v->ip, sizeof v->ip) != 0 || made.path_size != v->path_size ||
        memcmp(made.path, v->path, v->path_size) != 0) {
        fail("a header of %zu bytes that the library has made says something else", size);
    }
}

/* ---- the program --------------------------------------------------------------------------*/

static verdict expected;
static int handled, closed;
static bool looked;
static char payload[WIRE];
static size_t payload_size;

static void check_tlvs(tsrv_stream *stream)
{
    const unsigned char *bytes = (const unsigned char *)wire;
    for (int type = 0; type < 256; type++) {
        tsrv_slice value = {NULL, 0};
        size_t at = expected.tlvs, length = 0;
        int rc = tsrv_proxy_tlv(stream, type, &value);
        for (; at < expected.size && bytes[at] != type; at += 3 + length) {
            length = (size_t)bytes[at + 1] << 8 | bytes[at + 2];
        }
        if (rc != (at < expected.size ? (int)TSRV_OK : (int)TSRV_EINVAL)) {
            fail("tsrv_proxy_tlv of %d returns %d", type, rc);
        }
        length = at < expected.size ? (size_t)bytes[at + 1] << 8 | bytes[at + 2] : 0;
        if (rc == TSRV_OK && (value.size != length || memcmp(value.data, wire + at + 3, length) != 0)) {
            fail("tsrv_proxy_tlv of %d finds %zu bytes, which are wrong", type, value.size);
        }
    }
}

static void look(tsrv_stream *stream, const tsrv_address *address)
{
    static const verdict nobody = {0};
    tsrv_address other;
    bool named = expected.family != AF_UNSPEC;
    handled++;
    if (expected.size == 0) {
        fail("a header that is none is taken");
    }
    check_address(address, named ? &expected : &nobody, "the handler's address");
    tsrv_peer_address(stream, &other);
    check_address(&other, named ? &expected : &nobody, "tsrv_peer_address");
    if (tsrv_proxy_address(stream, &other) != TSRV_OK) {
        fail("tsrv_proxy_address fails");
    }
    check_address(&other, &nobody, "tsrv_proxy_address");
    check_tlvs(stream);
    if (named && (expected.family != AF_UNIX || expected.path_size < 108)) {
        check_built(address, &expected);
    }
}

static int handle(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice part;
    int rc;
    (void)context;
    if (!looked) {
        looked = true;
        look(stream, address);
    }
    while ((rc = tsrv_read_some(stream, 0, &part)) == TSRV_OK) {
        if (part.size > sizeof payload - payload_size) {
            fail("more is read than was sent");
        }
        memcpy(payload + payload_size, part.data, part.size);
        payload_size += part.size;
    }
    return rc;
}

static void on_close(tsrv_stream *stream, int reason, void *context)
{
    (void)stream;
    (void)context;
    closed++;
    if (reason != TSRV_EOF && reason != TSRV_OK) {
        fail("the stream ends with %d", reason);
    }
}

/* ---- one script ---------------------------------------------------------------------------*/

static void put(const void *data, size_t size)
{
    size = size < WIRE - wire_size ? size : WIRE - wire_size;
    memcpy(wire + wire_size, data, size);
    wire_size += size;
}

static void put_text(const char *text)
{
    put(text, strlen(text));
}

/* A line whose words are good, or nearly so. */
static void make_line(void)
{
    static const char *const fours[] = {"1.2.3.4", "0.0.0.0", "255.255.255.255", "1.2.3.256", "1.2.3.04", "1.2.3", ""};
    static const char *const sixes[] = {"::1", "2001:db8::8:800:200c:417A", "::ffff:1.2.3.4", "1:2:3:4:5:6:7::",
                                        "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7:8::", "1::2::3", "12345::", ":1::2"};
    static const char *const numbers[] = {"0", "443", "65535", "65536", "00", "07", "123456", "-1", "+1", "4 4", ""};
    bool six = draw(2) == 1;
    put_text(six ? "PROXY TCP6" : "PROXY TCP4");
    for (int i = 0; i < 4; i++) {
        bool other = draw(16) == 15;
        put_text(" ");
        put_text(i >= 2 ? PICK(numbers) : six != other ? PICK(sixes) : PICK(fours));
    }
    put_text(draw(16) == 15 ? "\n" : draw(16) == 15 ? " x\r\n" : "\r\n");
}

/* A header of version 2 with a length that is right, and perhaps a checksum. */
static void make_binary(bool summed, unsigned wrong)
{
    static const unsigned char kinds[] = {0x11, 0x21, 0x31, 0x00, 0x12, 0x22, 0x32, 0x11};
    size_t left = script_back - script_front, size = draw(256);
    unsigned scale = draw(8);
    unsigned char fixed[16] = "\r\n\r\n\0\r\nQUIT\n", sum[7] = {3, 0, 4, 0, 0, 0, 0};
    uint32_t crc;
    size = size * (scale == 7 ? 200 : 1);
    fixed[12] = draw(8) == 7 ? (unsigned char)draw(256) : draw(8) == 7 ? 0x20 : 0x21;
    fixed[13] = draw(16) == 15 ? (unsigned char)draw(256) : PICK(kinds);
    left = script_back - script_front;
    put(fixed, 16);
    for (size_t i = 0; i < size; i++) { /* over and over, if that is not enough */
        put(left == 0 ? (const uint8_t *)"" : script + script_front + i % left, 1);
    }
    put(sum, summed ? sizeof sum : 0);
    wire[14] = (char)((wire_size - 16) >> 8);
    wire[15] = (char)(wire_size - 16);
    if (summed) {
        crc = crc32c((const unsigned char *)wire, wire_size, wire_size - 4) ^ (wrong == 0 ? 0 : 1u << wrong % 32);
        for (size_t i = 0; i < 4; i++) {
            wire[wire_size - 1 - i] = (char)(crc >> (8 * i));
        }
    }
    script_front += size < left ? size : left;
}

static void make_wire(void)
{
    unsigned what = draw(6), wrong = 0;
    wire_size = 0;
    if (what == 1) {
        static const char *const begins[] = {"PROXY ", "PROXY TCP4 ", "PROXY TCP6 ", "PROXY UNKNOWN"};
        put_text(PICK(begins));
    } else if (what >= 4) {
        wrong = what == 5 ? draw(64) : 0;
        make_binary(what == 5, wrong < 32 ? 0 : wrong);
    } else if (what == 3) {
        make_line();
    } else if (what == 2) {
        put("\r\n\r\n\0\r\nQUIT\n", 12);
    }
    put(script + script_front, script_back - script_front);
}

static void begin(unsigned how)
{
    tsrv_server_options options = {0};
    world_open((how & 2) != 0 ? TSRV_BACKEND_POLL : TSRV_BACKEND_EPOLL);
    options.loop = loop;
    options.mode = (how & 1) != 0 ? TSRV_CALLBACK : TSRV_COROUTINE;
    options.handle_stream = handle;
    options.on_close = on_close;
    options.proxy_protocol = TSRV_PROXY_REQUIRED;
    options.proxy_from = (how & 8) != 0 ? "10.0.0.0/8, unix:" : NULL;
    options.handshake_timeout_ms = HANDSHAKE_MS;
    if (tsrv_server_new(&server, &options) != TSRV_OK) {
        fail("no server");
    }
}

/* Send up to there, and see. */
static size_t send_up_to(int fd, size_t from, size_t to, bool rest)
{
    while (from < to) {
        size_t took = client_send(fd, wire + from, to - from);
        from += took;
        if (took == 0 && client_sees_end(fd)) {
            return wire_size;
        }
        if (took == 0) {
            settle();
        }
    }
    if (rest) {
        settle();
        if (handled != (expected.size != 0 && from >= expected.size)) {
            fail("%zu bytes are there, and the handler was called %d times", from, handled);
        }
    }
    return from;
}

/* One connection with all of it. */
static void play(unsigned how, const uint8_t *pieces, size_t count, bool timed)
{
    int fd;
    size_t at = 0;
    tsrv_stats stats;
    begin(how);
    handled = closed = 0;
    looked = false;
    payload_size = 0;
    fd = connect_client();
    for (size_t i = 0; i < count && at < wire_size; i++) {
        size_t size = pieces[i] < 128 ? 1 + pieces[i] % 20u : (pieces[i] - 127) * 40u;
        at = send_up_to(fd, at, at + size < wire_size ? at + size : wire_size, pieces[i] % 4 != 3);
    }
    if (count == 0 && expected.size != 0) {
        at = send_up_to(fd, at, expected.size - 1, true);
        at = send_up_to(fd, at, expected.size, true);
    }
    send_up_to(fd, at, wire_size, true);
    if (timed && expected.size == 0) {
        settle_for(HANDSHAKE_MS + 10);
    } else {
        shutdown(fd, SHUT_WR);
        settle();
    }
    tsrv_server_stats(server, &stats);
    if (!client_sees_end(fd) || stats.open != 0 || handled != (expected.size != 0) || closed != handled ||
        stats.proxies_failed != (expected.size == 0)) {
        fail("at the end %llu streams are open, handlers were called %d times, on_close %d times",
             (unsigned long long)stats.open, handled, closed);
    }
    if (handled != 0 && (payload_size != wire_size - expected.size ||
                         memcmp(payload, wire + expected.size, payload_size) != 0)) {
        fail("%zu bytes behind the header are read, of %zu", payload_size, wire_size - expected.size);
    }
    close(fd);
    world_close_all();
}

/* No look at a part of it goes beyond that part, or is wrong about where it ends. */
static void check_sizes(void)
{
    size_t size = 0;
    for (size_t have = 0; have <= wire_size && have <= 300 && (have == 0 || size != have - 1); have++) {
        char *part = (char *)malloc(have + 1);
        memcpy(part + 1, wire, have); /* where it ends the sanitizer sees */
        size = tsrvi_proxy_size(part + 1, have);
        free(part);
        if (size == SIZE_MAX && expected.size == 0) {
            return;
        }
        if (size != 0 && (size < have || (expected.size != 0 && size > expected.size))) {
            fail("%zu bytes are said to need %zu, of %zu", have, size, expected.size);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int descriptors = open_descriptors();
    unsigned how;
    size_t count;
    world_begin();
    script_is(data, size);
    how = draw(256);
    count = draw(PIECES);
    count = count < script_back - script_front ? count : script_back - script_front;
    script_front += count;
    make_wire();
    expected = judge(wire, wire_size);
    TRACE("%zu bytes, %zu are a header, TLVs from %zu, family %d\n", wire_size, expected.size, expected.tlvs,
          expected.family);
    check_sizes();
    play(how, NULL, 0, false);
    play(how, (const uint8_t *)"\xff\xff", 2, false);
    if (count != 0) {
        play(how, data + 2, count, (how & 4) != 0);
    }
    if (open_descriptors() != descriptors) {
        fail("descriptors are left");
    }
    return 0;
}
