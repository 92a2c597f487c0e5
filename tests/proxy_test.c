/* The PROXY protocol (>>proxy_header, >>proxy, >>admit): what a header says, byte by byte and with what follows it in one
 * piece; who may send one; what comes of a bad one. Beside HAProxy and nginx: see proxies.sh. */
#include "script.h"

#include "handlers.h"

/* ---- headers -------------------------------------------------------------------------------*/

static char built[70000];
static size_t built_size;

static void put(const void *bytes, size_t size)
{
    memcpy(built + built_size, bytes, size);
    built_size += size;
}

/* The beginning of a header of version 2, for so many bytes of addresses and TLVs. */
static void begin_header(int command, int kind, size_t size)
{
    unsigned char fixed[16] = {'\r', '\n', '\r', '\n', 0, '\r', '\n', 'Q', 'U', 'I', 'T', '\n'};
    fixed[12] = (unsigned char)command;
    fixed[13] = (unsigned char)kind;
    fixed[14] = (unsigned char)(size >> 8);
    fixed[15] = (unsigned char)size;
    built_size = 0;
    put(fixed, sizeof fixed);
}

static void put_tlv(int type, const char *value, size_t size)
{
    unsigned char head[3] = {(unsigned char)type, (unsigned char)(size >> 8), (unsigned char)size};
    put(head, 3);
    put(value, size);
    built[14] = (char)((built_size - 16) >> 8);
    built[15] = (char)(built_size - 16);
}

static const char four[12] = {1, 2, 3, 4, 127, 0, 0, 1, 0x12, 0x34, 0x56, 0x78}; /* 1.2.3.4:4660 */

static void build_four(void)
{
    begin_header(0x21, 0x11, sizeof four);
    put(four, sizeof four);
}

static void build_line(const char *line)
{
    built_size = 0;
    put(line, strlen(line));
}

/* What the header in `built` says: the client's address as text, "-" for none, or "?" and what is wrong. */
static const char *parsed(tsrvi_proxied *proxied)
{
    static char text[TSRV_ADDRESS_SIZE];
    const char *fault = tsrvi_proxy_parse(built, built_size, proxied);
    if (fault != NULL) {
        return "?";
    }
    return proxied->client.size == 0 ? "-" : tsrv_address_format(&proxied->client, text, sizeof text);
}

static void expect_header(const char *line, const char *says)
{
    tsrvi_proxied proxied;
    build_line(line);
    if (tsrvi_proxy_size(built, built_size) != built_size) {
        CHECK_STR(says, "?");
        return;
    }
    if (strcmp(parsed(&proxied), says) != 0) {
        T_FAIL("%s says %s, not %s", line, parsed(&proxied), says);
    }
    CHECK_INT(proxied.tlvs, built_size);
}

TEST_ONCE(lines_say_who_the_client_is)
{
    expect_header("PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n", "1.2.3.4:9");
    expect_header("PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", "255.255.255.255:65535");
    expect_header("PROXY TCP6 2001:db8::1 ::1 1 2\r\n", "[2001:db8::1]:1");
    expect_header("PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n",
                "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535");
    expect_header("PROXY TCP4 1.2.3.4 5.6.7.8 0 0\r\n", "1.2.3.4:0");
    expect_header("PROXY UNKNOWN\r\n", "-");
    expect_header("PROXY UNKNOWN ffff::1 whatever 1 2 3 4\r\n", "-");
}

TEST_ONCE(lines_that_are_not_as_they_must_be_are_refused)
{
    static const char *const bad[] = {
        "PROXY TCP4 1.2.3.4 5.6.7.8 9\r\n", "PROXY TCP4 1.2.3.4 5.6.7.8 9 10 11\r\n", "PROXY TCP4 1.2.3.4 5.6.7.8 9 10\n",
        "PROXY TCP4  1.2.3.4 5.6.7.8 9 10\r\n", "PROXY TCP4 1.2.3.4 5.6.7.8 9 10 \r\n", "PROXY TCP4 1.2.3 5.6.7.8 9 10\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7 9 10\r\n", "PROXY TCP4 1.2.3.256 5.6.7.8 9 10\r\n", "PROXY TCP4 ::1 ::1 9 10\r\n",
        "PROXY TCP6 1.2.3.4 5.6.7.8 9 10\r\n", "PROXY TCP4 1.2.3.4 5.6.7.8 65536 10\r\n", "PROXY TCP4 1.2.3.4 5.6.7.8 9 65536\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 -9 10\r\n", "PROXY TCP4 1.2.3.4 5.6.7.8 +9 10\r\n", "PROXY TCP4 1.2.3.4 5.6.7.8 09 10\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 9 1a\r\n", "PROXY TCP4 1.2.3.4 5.6.7.8 100000 1\r\n", "PROXY TCP5 1.2.3.4 5.6.7.8 9 10\r\n",
        "PROXY tcp4 1.2.3.4 5.6.7.8 9 10\r\n", "PROXY UNKNOWNS\r\n", "PROXY \r\n         ", "PROXY TCP4\r\n  ",
        "PROXY UNKNOWN\n  ", "GET / HTTP/1.1\r\n", "proxy TCP4 1.2.3.4 5.6.7.8 9 10\r\n",
        "PROXY UNKNOWN 1234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890\r\n"};
    for (size_t i = 0; i < COUNT(bad); i++) {
        expect_header(bad[i], "?");
    }
    build_line("PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n");
    built[12] = 0;
    tsrvi_proxied proxied;
    CHECK_STR(parsed(&proxied), "?");
}

TEST_ONCE(binary_headers_say_who_the_client_is)
{
    char six[36] = {0x20, 1, 0x0d, (char)0xb8}, local[216] = "/run/client";
    tsrvi_proxied proxied;
    six[15] = 1, six[33] = 7;
    build_four();
    CHECK_STR(parsed(&proxied), "1.2.3.4:4660");
    CHECK_INT(proxied.tlvs, built_size);
    begin_header(0x21, 0x21, sizeof six);
    put(six, sizeof six);
    CHECK_STR(parsed(&proxied), "[2001:db8::1]:7");
    begin_header(0x21, 0x31, sizeof local);
    put(local, sizeof local);
    CHECK_STR(parsed(&proxied), "unix:/run/client");
    built[16] = 0;
    CHECK_STR(parsed(&proxied), "unix:@run/client");
    memset(built + 16, 0, sizeof local);
    CHECK_STR(parsed(&proxied), "unix:");
    memset(built + 16, 'x', 108);
    CHECK(strncmp(parsed(&proxied), "unix:xxxx", 9) == 0);
    begin_header(0x20, 0, 0);
    CHECK_STR(parsed(&proxied), "-");
    begin_header(0x21, 0, 0);
    CHECK_STR(parsed(&proxied), "-");
    begin_header(0x20, 0x11, sizeof four); /* LOCAL, whatever it says */
    put(four, sizeof four);
    CHECK_STR(parsed(&proxied), "-");
    begin_header(0x20, 0xFF, 3); /* it is passed over */
    put("abc", 3);
    CHECK_STR(parsed(&proxied), "-");
    CHECK_INT(proxied.tlvs, built_size);
    begin_header(0x21, 0x01, sizeof four); /* a stream of an unknown family */
    put(four, sizeof four);
    memset(built + 16, 0, sizeof four); /* TLVs that say nothing */
    CHECK_STR(parsed(&proxied), "-");
    begin_header(0x21, 0x12, sizeof four); /* a datagram */
    put(four, sizeof four);
    CHECK_STR(parsed(&proxied), "-");
}

TEST_ONCE(binary_headers_that_are_not_as_they_must_be_are_refused)
{
    static const unsigned char bad[][2] = {{0x11, 0x11}, {0x31, 0x11}, {0x22, 0x11}, {0x2F, 0x11}, {0x01, 0x11},
                                           {0x21, 0x41}, {0x21, 0x13}, {0x21, 0xF1}};
    tsrvi_proxied proxied;
    for (size_t i = 0; i < COUNT(bad); i++) {
        begin_header(bad[i][0], bad[i][1], sizeof four);
        put(four, sizeof four);
        CHECK_STR(parsed(&proxied), "?");
    }
    for (size_t size = 0; size < sizeof four; size++) {
        begin_header(0x21, 0x11, size);
        put(four, size);
        CHECK_STR(parsed(&proxied), "?");
    }
}

TEST_ONCE(tlvs_are_found_and_must_fill_the_header)
{
    tsrvi_proxied proxied;
    tsrv_slice value;
    build_four();
    put_tlv(0x02, "example.org", 11);
    put_tlv(0x04, "", 0);
    put_tlv(0x02, "second", 6);
    CHECK_STR(parsed(&proxied), "1.2.3.4:4660");
    CHECK(tsrvi_proxy_find(built, built_size, proxied.tlvs, 2, &value));
    CHECK_MEM(value.data, value.size, "example.org", 11);
    CHECK(tsrvi_proxy_find(built, built_size, proxied.tlvs, 4, &value));
    CHECK_INT(value.size, 0);
    CHECK(!tsrvi_proxy_find(built, built_size, proxied.tlvs, 5, &value));
    for (size_t cut = 1; cut < 9; cut++) { /* the last one is not whole */
        built[15] = (char)(built_size - 16 - cut);
        tsrvi_proxied again;
        CHECK(tsrvi_proxy_parse(built, built_size - cut, &again) != NULL);
    }
}

/* RFC 3720, B.4, has the sum of 32 zeros, of 32 ones, and of what counts up. */
TEST_ONCE(checksum_is_looked_at)
{
    char bytes[36] = {0};
    tsrvi_proxied proxied;
    uint32_t crc;
    CHECK(tsrvi_proxy_crc32c(bytes, 32, 32) == 0x8A9136AAu);
    memset(bytes, 0xFF, 32);
    CHECK(tsrvi_proxy_crc32c(bytes, 32, 32) == 0x62A8AB43u);
    for (int i = 0; i < 32; i++) {
        bytes[i] = (char)i;
    }
    CHECK(tsrvi_proxy_crc32c(bytes, 32, 32) == 0x46DD794Eu);
    build_four();
    put_tlv(0x03, "\0\0\0\0", 4);
    put_tlv(0x02, "example.org", 11);
    CHECK_STR(parsed(&proxied), "?");
    crc = tsrvi_proxy_crc32c(built, built_size, 31);
    for (int i = 0; i < 4; i++) {
        built[31 + i] = (char)(crc >> (24 - 8 * i));
    }
    CHECK_STR(parsed(&proxied), "1.2.3.4:4660");
    for (size_t i = 16; i < built_size; i += i == 27 ? 2 : 1) { /* but for its type */
        built[i] ^= 1;
        CHECK_STR(parsed(&proxied), "?");
        built[i] ^= 1;
    }
    build_four();
    put_tlv(0x03, "\0\0\0", 3);
    CHECK_STR(parsed(&proxied), "?");
}

/* Bytes that begin like a header and go on at random: nothing is read beyond them (ASan, Valgrind), and of a header that
 * is accepted the TLVs lie in it. */
TEST_ONCE(any_bytes_are_parsed_within_their_bounds)
{
    uint32_t seed = 1;
    for (int i = 0; i < 200000; i++) {
        static const char *const begins[] = {"PROXY TCP4 1.2.3.4 ", "PROXY TCP6 ::1 ", "PROXY ", "\r\n\r\n\0\r\nQUIT\n!", ""};
        size_t begin = (size_t)i % 5, kept = begin == 3 ? 13 : strlen(begins[begin]), size = kept + (size_t)i % 150;
        char *bytes = (char *)malloc(size + 1);
        tsrvi_proxied proxied;
        CHECK(bytes != NULL);
        memcpy(bytes, begins[begin], kept);
        for (size_t k = kept; k < size; k++) {
            seed = seed * 1664525u + 1013904223u;
            bytes[k] = begin < 3 ? "0123 :.f\r\nT"[(seed >> 16) % 11] : (char)((seed >> 16) % 4 == 0 ? seed >> 24 : 0x11);
        }
        for (size_t have = 0; have <= size; have++) {
            size_t whole = tsrvi_proxy_size(bytes, have);
            if (whole == SIZE_MAX || whole > size) {
                break;
            }
            if (whole == have && have != 0) {
                char *exact = (char *)malloc(have);
                CHECK(exact != NULL);
                memcpy(exact, bytes, have);
                if (tsrvi_proxy_parse(exact, have, &proxied) == NULL) {
                    CHECK(proxied.tlvs <= have);
                }
                free(exact);
                break;
            }
        }
        free(bytes);
    }
}

/* What tsrv_connect sends is what a server reads. */
TEST_ONCE(built_headers_are_read_as_they_were_meant)
{
    static const char *const clients[] = {"1.2.3.4", "2001:db8::7", "unix:/run/a", "unix:@b"};
    tsrvi_proxied proxied;
    tsrv_address to;
    CHECK(tsrvi_proxy_address(AF_INET, "5.6.7.8", "9", &to));
    for (size_t i = 0; i < COUNT(clients); i++) {
        tsrv_address client;
        tsrvi_sockaddr inside;
        socklen_t size;
        char text[TSRV_ADDRESS_SIZE], again[TSRV_ADDRESS_SIZE];
        if (i < 2) {
            CHECK(tsrvi_proxy_address(i == 0 ? AF_INET : AF_INET6, clients[i], "443", &client));
        } else {
            CHECK_INT(tsrvi_unix_address(clients[i] + 5, &inside, &size), TSRV_OK);
            tsrvi_address_store(&client, &inside, size);
        }
        built_size = tsrvi_proxy_build(&client, &to, built);
        CHECK_INT(tsrvi_proxy_size(built, built_size), built_size);
        CHECK(tsrvi_proxy_parse(built, built_size, &proxied) == NULL);
        CHECK_STR(tsrv_address_format(&proxied.client, again, sizeof again),
                  tsrv_address_format(&client, text, sizeof text));
        if (i == 0) {
            CHECK_MEM(built + 20, 4, "\5\6\7\10", 4);
        }
    }
    memset(&to, 0, sizeof to);
    built_size = tsrvi_proxy_build(&to, &to, built);
    CHECK_INT(built_size, 16);
    CHECK_STR(parsed(&proxied), "-");
}

/* ---- who may send one ----------------------------------------------------------------------*/

static bool is_in(const char *list, int family, const char *host)
{
    tsrvi_network *networks;
    tsrv_address address;
    int count = tsrvi_networks_parse(list, &networks);
    CHECK(count >= 0);
    if (family == AF_UNIX) {
        tsrvi_sockaddr inside;
        socklen_t size;
        CHECK_INT(tsrvi_unix_address(host, &inside, &size), TSRV_OK);
        tsrvi_address_store(&address, &inside, size);
    } else {
        CHECK(tsrvi_proxy_address(family, host, "1", &address));
    }
    bool is = tsrvi_networks_have(networks, count, &address);
    TSRV_FREE(networks);
    return is;
}

TEST_ONCE(lists_say_whom_to_trust)
{
    CHECK(is_in("10.0.0.0/8, ::1, unix:", AF_INET, "10.255.0.1"));
    CHECK(!is_in("10.0.0.0/8, ::1, unix:", AF_INET, "11.0.0.1"));
    CHECK(is_in("10.0.0.0/8, ::1, unix:", AF_INET6, "::1"));
    CHECK(!is_in("10.0.0.0/8, ::1, unix:", AF_INET6, "::2"));
    CHECK(is_in("10.0.0.0/8, ::1, unix:", AF_UNIX, "/run/x"));
    CHECK(!is_in("10.0.0.0/8 ::1", AF_UNIX, "/run/x"));
    CHECK(is_in("10.0.0.0/8", AF_INET6, "::ffff:10.1.1.1"));
    CHECK(is_in("127.0.0.1", AF_INET, "127.0.0.1"));
    CHECK(!is_in("127.0.0.1", AF_INET, "127.0.0.2"));
    CHECK(is_in("127.0.0.1/31", AF_INET, "127.0.0.0"));
    CHECK(!is_in("127.0.0.1/31", AF_INET, "127.0.0.2"));
    CHECK(is_in("0.0.0.0/0", AF_INET, "200.1.1.1"));
    CHECK(!is_in("0.0.0.0/0", AF_INET6, "2001::1"));
    CHECK(is_in("::/0", AF_INET, "200.1.1.1"));
    CHECK(is_in("2001:db8::/33", AF_INET6, "2001:db8:7fff::1"));
    CHECK(!is_in("2001:db8::/33", AF_INET6, "2001:db8:8000::1"));
    CHECK(!is_in("", AF_INET, "127.0.0.1"));
}

TEST_ONCE(lists_with_mistakes_are_refused)
{
    static const char *const bad[] = {"10.0.0.0/33", "10.0.0", "::1/129", "unix:/run/x", "localhost", "10.0.0.0/", "10.0.0.0/8x",
                                      "::1/x", "/8", "10.0.0.0/-1", "10.0.0.0//8", "1.2.3.4;5.6.7.8"};
    tsrv_server_options options = {0};
    tsrv_server *server;
    options.handle_stream = echo_lines;
    tsrv_set_log(t_no_log, NULL);
    options.proxy_protocol = TSRV_PROXY_REQUIRED;
    for (size_t i = 0; i < COUNT(bad); i++) {
        options.proxy_from = bad[i];
        CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
        CHECK(server == NULL);
    }
    options.proxy_from = NULL;
    options.proxy_protocol = 2;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
    options.proxy_from = "127.0.0.1"; /* which would refuse nobody */
    options.proxy_protocol = TSRV_PROXY_NONE;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
}

/* ---- streams -------------------------------------------------------------------------------*/

static int entered, accepted;
static char accepted_for[TSRV_ADDRESS_SIZE];

/* Says who the client is, who has sent the header, and a TLV; then echoes lines. */
static int tell(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    char client[TSRV_ADDRESS_SIZE], by[TSRV_ADDRESS_SIZE];
    tsrv_address from;
    tsrv_slice line, name;
    int rc;
    (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        if (line.size > 1) {
            tsrv_write(stream, line.data, line.size);
            continue;
        }
        entered++;
        CHECK_INT(tsrv_proxy_address(stream, &from), TSRV_OK);
        tsrv_proxy_tlv(stream, 2, &name);
        tsrv_printf(stream, "%s by %.*s, %.*s\n", tsrv_address_format(address, client, sizeof client), 9,
                    tsrv_address_format(&from, by, sizeof by), (int)name.size, name.data);
    }
    return rc;
}

static int note_accept(tsrv_server *server, const tsrv_address *address, void *context)
{
    (void)server;
    accepted++;
    tsrv_address_format(address, accepted_for, sizeof accepted_for);
    return context != NULL ? *(int *)context : TSRV_OK;
}

static void open_proxied(tsrv_server_options options)
{
    options.proxy_protocol = TSRV_PROXY_REQUIRED;
    s_open_with(tell, options);
}

static const tsrv_server_options defaults;

TEST_PLAIN_STREAM(header_and_first_bytes_come_in_one_piece)
{
    open_proxied(defaults);
    int fd = t_connect(s_port);
    t_sends(fd, "PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n\nhello\n");
    s_expect(fd, "1.2.3.4:9 by 127.0.0.1, \nhello\n");
    s_finish(fd);
    fd = t_connect(s_port);
    build_four();
    put_tlv(2, "example.org", 11);
    put("\nhello\n", 7);
    t_send(fd, built, built_size);
    s_expect(fd, "1.2.3.4:4660 by 127.0.0.1, example.org\nhello\n");
    s_finish(fd);
    CHECK_INT(s_stats().proxies_failed, 0);
    s_close();
}

TEST_PLAIN_STREAM(header_comes_byte_by_byte)
{
    open_proxied(defaults);
    for (int version = 1; version <= 2; version++) {
        int fd = s_join();
        if (version == 1) {
            build_line("PROXY TCP6 2001:db8::1 ::1 1 2\r\n");
        } else {
            build_four();
            put_tlv(2, "example.org", 11);
        }
        size_t size = built_size;
        put("\nhello\n", 7);
        for (size_t i = 0; i < built_size; i++) {
            t_send(fd, built + i, 1);
            s_settle();
            CHECK_INT(entered, (version - 1) + (i >= size));
            CHECK((tsrv_server_next(s_server, NULL) == NULL) == (i + 1 < size)); /* the program does not know it */
        }
        s_expect(fd, version == 1 ? "[2001:db8::1]:1 by 127.0.0.1, \nhello\n"
                                  : "1.2.3.4:4660 by 127.0.0.1, example.org\nhello\n");
        CHECK_INT(entered, version);
        s_finish(fd);
        s_until(&s_closed, version);
    }
    s_close();
}

static char closed_for[TSRV_ADDRESS_SIZE];

static void note_client(tsrv_stream *stream, int reason, void *context)
{
    tsrv_address client;
    CHECK_INT(tsrv_peer_address(stream, &client), TSRV_OK);
    tsrv_address_format(&client, closed_for, sizeof closed_for);
    s_note_close(stream, reason, context);
}

/* The handler takes two seconds of its loop's, which the log is told, and ends. */
static int take_your_time(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_address client;
    char text[TSRV_ADDRESS_SIZE], again[TSRV_ADDRESS_SIZE];
    int rc = tsrv_read_until(stream, "\n", 0, NULL);
    (void)context;
    if (rc == TSRV_OK) {
        CHECK_INT(tsrv_peer_address(stream, &client), TSRV_OK);
        CHECK_STR(tsrv_address_format(&client, text, sizeof text), tsrv_address_format(address, again, sizeof again));
        v_now += (uint64_t)2000 * 1000000;
        tsrv_write(stream, "done\n", 5);
    }
    return rc;
}

/* In a handler, in on_close and in the log it is the client, of whatever family. */
TEST_PLAIN_SOFT(hooks_and_the_log_name_the_client)
{
    static const char *const expected[] = {"1.2.3.4:9", "[2001:db8::1]:1", "unix:/run/client", "unix:@client"};
    tsrv_server_options options = {0};
    options.proxy_protocol = TSRV_PROXY_REQUIRED;
    options.on_close = note_client;
    s_open_with(take_your_time, options);
    for (int i = 0; i < (int)COUNT(expected); i++) {
        char local[216] = "/run/client", slow[128];
        int fd = s_join();
        if (i == 3) {
            memcpy(local, "\0client\0\0\0", 11);
        }
        if (i < 2) {
            build_line(i == 0 ? "PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n" : "PROXY TCP6 2001:db8::1 ::1 1 2\r\n");
        } else {
            begin_header(0x21, 0x31, sizeof local);
            put(local, sizeof local);
        }
        put("\n", 1);
        t_send(fd, built, built_size);
        s_expect(fd, "done\n");
        t_close(fd);
        s_until(&s_closed, i + 1);
        CHECK_STR(closed_for, expected[i]);
        snprintf(slow, sizeof slow, "handle_stream for %s", expected[i]);
        if (strstr(t_log, slow) == NULL) {
            T_FAIL("\"%s\" is not in: %s", slow, t_log);
        }
    }
    s_close();
}

/* What the sender says of itself: a health check, or a proxy that knows nothing. */
TEST_PLAIN_SOFT(connections_of_the_proxy_itself_keep_its_address)
{
    open_proxied(defaults);
    for (int version = 1; version <= 2; version++) {
        int fd = s_join();
        char reply[128];
        struct sockaddr_in own;
        socklen_t size = sizeof own;
        CHECK(getsockname(fd, (struct sockaddr *)&own, &size) == 0);
        if (version == 1) {
            build_line("PROXY UNKNOWN\r\n");
        } else {
            begin_header(0x20, 0, 0);
        }
        put("\n", 1);
        t_send(fd, built, built_size);
        snprintf(reply, sizeof reply, "127.0.0.1:%d by 127.0.0.1, \n", ntohs(own.sin_port));
        s_expect(fd, reply);
        s_finish(fd);
    }
    s_close();
}

/* It is reset, counted, and told of within the limits of the log; no handler is called, and no on_close. */
static void check_bad(const char *bytes, size_t size, const char *log)
{
    uint64_t failed = s_stats().proxies_failed;
    int fd = s_join(), lines = t_log_lines;
    t_send(fd, bytes, size);
    s_expect_reset(fd);
    t_close(fd);
    s_settle();
    CHECK_INT(s_stats().proxies_failed, failed + 1);
    CHECK_INT(t_log_lines, lines + (log != NULL));
    CHECK(log == NULL || strstr(t_log, log) != NULL);
    CHECK_INT(s_stats().open, 0);
    CHECK_INT(entered, 0);
    CHECK_INT(s_closed, 0);
}

TEST_PLAIN_STREAM(bad_headers_are_reset)
{
    open_proxied(defaults);
    check_bad("GET / HTTP/1.1\r\n", 16, "PROXY header from 127.0.0.1:");
    check_bad("G", 1, "there is none");
    check_bad("PROXY TCP4 1.2.3.4 5.6.7.8 9\r\n", 30, "malformed: its addresses");
    build_four();
    built[12] = 0x31;
    check_bad(built, built_size, "its version");
    CHECK_INT(s_stats().ended_error, 4);
    s_close();
}

/* A line that ends too soon, wherever, with much behind it. */
TEST_PLAIN_SOFT(lines_that_end_at_once_are_reset)
{
    static char much[8192];
    open_proxied(defaults);
    for (size_t at = 0; at < 20; at++) {
        int fd = s_join();
        memset(much, 'x', sizeof much);
        memcpy(much, "PROXY TCP4 1.2.3.4 5", 20);
        much[at] = '\n';
        t_send(fd, much, sizeof much);
        s_expect_reset(fd);
        t_close(fd);
    }
    CHECK_INT(s_stats().proxies_failed, 20);
    CHECK_INT(entered, 0);
    s_close();
}

/* Those that connect and go, as health checks do, are counted and not told of; nor is what comes too late. */
TEST_PLAIN_SOFT(connections_without_a_header_are_counted)
{
    tsrv_server_options options = {0};
    options.handshake_timeout_ms = 500;
    open_proxied(options);
    int fd = s_join();
    t_shut(fd);
    s_expect_reset(fd);
    t_close(fd);
    fd = s_join();
    t_reset(fd);
    s_settle();
    CHECK_INT(s_stats().open, 0);
    CHECK_INT(s_stats().proxies_failed, 2);
    fd = s_join();
    t_sends(fd, "PROXY TCP4");
    s_run_ms(450);
    CHECK_INT(s_stats().open, 1);
    s_run_ms(100);
    s_expect_reset(fd);
    t_close(fd);
    CHECK_INT(s_stats().proxies_failed, 3);
    CHECK_INT(s_stats().ended_timeout, 1);
    CHECK_INT(t_log_lines, 0);
    fd = s_join();
    t_sends(fd, "PROXY TCP4");
    t_shut(fd);
    s_expect_reset(fd);
    t_close(fd);
    CHECK(strstr(t_log, "has ended within it") != NULL);
    CHECK_INT(entered, 0);
    s_close();
}

TEST_PLAIN_SOFT(strangers_are_refused)
{
    tsrv_server_options options = {0};
    options.proxy_from = "10.0.0.0/8";
    open_proxied(options);
    int fd = t_connect(s_port);
    s_expect_reset(fd);
    t_close(fd);
    CHECK_INT(s_stats().refused, 1);
    CHECK_INT(s_stats().accepted, 0);
    CHECK(strstr(t_log, "is not in proxy_from") != NULL);
    s_close();
}

/* Limits and on_accept are the client's. */
TEST_PLAIN_SOFT(limits_count_clients)
{
    tsrv_server_options options = {0};
    options.max_per_address = 2;
    options.on_accept = note_accept;
    open_proxied(options);
    int fds[4];
    for (int i = 0; i < 4; i++) {
        fds[i] = s_join();
        t_sends(fds[i], i == 3 ? "PROXY TCP4 1.2.3.5 5.6.7.8 9 10\r\nhi\n" : "PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\nhi\n");
        if (i == 2) {
            s_expect_reset(fds[i]);
        } else {
            s_expect(fds[i], "hi\n");
        }
    }
    CHECK_INT(accepted, 3);
    CHECK_STR(accepted_for, "1.2.3.5:9");
    CHECK_INT(s_stats().refused, 1);
    CHECK_INT(s_stats().proxies_failed, 0);
    CHECK(strstr(t_log, "1.2.3.4:9 has max_per_address") != NULL);
    for (int i = 0; i < 4; i++) {
        if (i != 2) {
            s_finish(fds[i]);
        }
        t_close(i == 2 ? fds[i] : dup(0));
    }
    s_until(&s_closed, 3);
    CHECK_INT(s_server->addresses.used, 0);
    fds[0] = s_join(); /* those that end without a header were never counted */
    t_reset(fds[0]);
    s_settle();
    CHECK_INT(s_server->addresses.used, 0);
    s_close();
}

TEST_PLAIN_SOFT(on_accept_refuses_clients)
{
    tsrv_server_options options = {0};
    int answer = TSRV_ECLOSED;
    options.on_accept = note_accept;
    options.context = &answer;
    open_proxied(options);
    int fd = s_join();
    CHECK_INT(accepted, 0);
    t_sends(fd, "PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\nhi\n");
    s_expect_reset(fd);
    t_close(fd);
    CHECK_INT(accepted, 1);
    CHECK_INT(s_stats().refused, 1);
    CHECK_INT(entered, 0);
    CHECK_INT(s_closed, 0);
    s_close();
}

/* What on_accept may do to the stream, or to the server, before it answers. */
enum { ABORT_ALL, FREE_SERVER, STOP_SERVER, DRAIN_SERVER };

static int meddle(tsrv_server *server, const tsrv_address *address, void *context)
{
    (void)address;
    accepted++;
    switch (*(int *)context) {
    case ABORT_ALL:
        for (tsrv_stream *s = tsrv_server_next(server, NULL); s != NULL; s = tsrv_server_next(server, NULL)) {
            tsrv_abort(s);
        }
        break;
    case FREE_SERVER: tsrv_server_free(server); break;
    case STOP_SERVER: tsrv_server_stop(server); break;
    default: tsrv_server_drain(server, 0); break;
    }
    return TSRV_OK;
}

TEST_PLAIN_SOFT(on_accept_may_end_what_it_is_asked_for)
{
    for (int what = ABORT_ALL; what <= DRAIN_SERVER; what++) {
        tsrv_server_options options = {0};
        options.max_per_address = 2;
        options.on_accept = meddle;
        options.context = &what;
        open_proxied(options);
        accepted = 0;
        int fd = s_join();
        t_sends(fd, "PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\nhi\n");
        if (what == ABORT_ALL) {
            s_expect(fd, "hi\n"); /* it does not see the stream yet */
            s_finish(fd);
            s_until(&s_closed, 1);
            CHECK_INT(s_server->addresses.used, 0);
        } else {
            s_expect_reset(fd);
            t_close(fd);
        }
        CHECK_INT(accepted, 1);
        if (what == FREE_SERVER) {
            s_server = NULL;
        }
        s_close();
    }
}

/* Who has not introduced itself when the server stops may come in, unless on_accept lets nobody in any more. */
TEST_PLAIN_SOFT(on_accept_is_asked_also_when_nobody_listens)
{
    for (int drains = 0; drains <= 1; drains++) {
        tsrv_server_options options = {0};
        int what = DRAIN_SERVER;
        options.max_per_address = 2;
        options.on_accept = drains ? meddle : note_accept;
        options.context = drains ? &what : NULL;
        open_proxied(options);
        accepted = 0;
        int fd = s_join();
        tsrv_server_stop(s_server);
        t_sends(fd, "PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\nhi\n");
        if (drains) {
            s_expect_reset(fd);
            t_close(fd);
        } else {
            s_expect(fd, "hi\n");
            s_finish(fd);
            s_until(&s_closed, 1);
        }
        CHECK_INT(accepted, 1);
        CHECK_INT(s_stats().refused, drains);
        CHECK_INT(s_server->addresses.used, 0);
        s_close();
    }
}

/* In a drain it is asked, too; and another one changes nothing. */
TEST_PLAIN_SOFT(on_accept_is_asked_in_a_drain)
{
    tsrv_server_options options = {0};
    int what = DRAIN_SERVER;
    options.on_accept = meddle;
    options.context = &what;
    open_proxied(options);
    int fd = s_join();
    t_sends(fd, "PROXY");
    s_settle();
    s_drainer d = s_new_drain(9000);
    s_begin_drain(&d);
    t_sends(fd, " TCP4 1.2.3.4 5.6.7.8 9 10\r\nhi\n");
    s_expect(fd, "hi\n");
    s_finish(fd);
    s_check_drain(&d, TSRV_OK, 0, 1000);
    CHECK_INT(accepted, 1);
    CHECK_INT(s_closed, 1);
    CHECK_INT(s_stats().refused, 0);
    s_close();
}

static int abort_unseen(tsrv_server *server, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    accepted++;
    CHECK(tsrv_server_next(server, NULL) == NULL);
    tsrv_abort(TSRVI_CONTAINER(server->streams.next, tsrv_stream, link));
    return TSRV_OK;
}

/* The program does not know the stream; whatever ends it then, it is over and counts no more. */
TEST_PLAIN_SOFT(stream_that_ends_while_on_accept_is_asked_is_over)
{
    tsrv_server_options options = {0};
    options.max_per_address = 1;
    options.on_accept = abort_unseen;
    open_proxied(options);
    for (int i = 0; i < 2; i++) {
        int fd = s_join();
        t_sends(fd, "PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\nhi\n");
        s_expect_reset(fd);
        t_close(fd);
        CHECK_INT(accepted, i + 1);
        CHECK_INT(s_server->addresses.used, 0);
    }
    CHECK_INT(s_stats().refused, 0);
    CHECK_INT(s_stats().open, 0);
    CHECK_INT(s_closed, 0);
    s_close();
}

/* A server that is stopped, drained or freed meanwhile: who has not introduced itself is not in its way. */
TEST_PLAIN_SOFT(header_that_is_awaited_survives_a_stop_and_no_more)
{
    s_drainer d;
    open_proxied(defaults);
    int late = s_join(), never = s_join();
    tsrv_server_stop(s_server);
    t_sends(late, "PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\nhi\n");
    s_expect(late, "hi\n");
    s_finish(late);
    t_sends(never, "PROXY");
    d = s_new_drain(300);
    s_begin_drain(&d);
    s_check_drain(&d, TSRV_ETIMEOUT, 300, 400);
    s_expect_reset(never);
    t_close(never);
    CHECK_INT(entered, 0);
    CHECK_INT(s_closed, 1);
    s_close();
}

/* Who has said nothing for a second holds no drain. */
TEST_PLAIN_SOFT(silence_holds_no_drain)
{
    s_drainer d;
    open_proxied(defaults);
    int fd = s_join();
    d = s_new_drain(9000);
    s_begin_drain(&d);
    s_check_drain(&d, TSRV_OK, 1000, 2000);
    s_expect_reset(fd);
    t_close(fd);
    s_close();
}

TEST_PLAIN_SOFT(server_is_freed_while_headers_are_awaited)
{
    open_proxied(defaults);
    int fd = s_join(), other = s_join();
    t_sends(other, "PROXY TCP4 1.2");
    s_settle();
    s_close();
    t_expect_reset(fd);
    t_close(fd);
    t_close(other);
    CHECK_INT(s_closed, 0);
}

TEST_PLAIN_SOFT(stream_that_is_added_has_a_header_too)
{
    tsrv_server_options options = {0};
    int fds[2];
    options.on_accept = note_accept; /* which is not asked for it, behind the header neither */
    open_proxied(options);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    CHECK_INT(tsrv_server_add_stream(s_server, fds[0]), TSRV_OK);
    t_sends(fds[1], "PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n\n");
    s_expect(fds[1], "1.2.3.4:9 by unix:, \n");
    CHECK_INT(accepted, 0);
    s_finish(fds[1]);
    s_close();
}

TEST_PLAIN_SOFT(without_the_option_there_is_no_header)
{
    tsrv_address address;
    tsrv_slice value;
    s_open_with(echo_lines, defaults);
    int fd = s_join();
    s_echo(fd, "PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n");
    CHECK_INT(tsrv_peer_address(tsrv_server_next(s_server, NULL), &address), TSRV_OK);
    CHECK_INT(tsrv_proxy_address(tsrv_server_next(s_server, NULL), &address), TSRV_EINVAL);
    CHECK_INT(tsrv_address_family(&address), 0); /* not what was there before */
    value.data = "old";
    value.size = 3;
    CHECK_INT(tsrv_proxy_tlv(tsrv_server_next(s_server, NULL), 2, &value), TSRV_EINVAL);
    CHECK_MEM(value.data, value.size, "", 0);
    CHECK_STR(value.data, "");
    s_finish(fd);
    s_close();
}

/* The program's bytes lie behind those of the header. */
static int use_data(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    char *data = (char *)tsrv_data(stream);
    CHECK((uintptr_t)data % 16 == 0);
    if (data[0] == 0) {
        for (int i = 0; i < 100; i++) {
            CHECK_INT(data[i], 0);
        }
        memset(data, 1, 100);
    }
    return tell(stream, address, context);
}

TEST_PLAIN_SOFT(data_of_a_stream_is_its_own)
{
    tsrv_server_options options = {0};
    options.data_size = 100;
    options.proxy_protocol = TSRV_PROXY_REQUIRED;
    s_open_with(use_data, options);
    int fd = s_join();
    build_four();
    put_tlv(2, "example.org", 11);
    put("\n", 1);
    t_send(fd, built, built_size);
    s_expect(fd, "1.2.3.4:4660 by 127.0.0.1, example.org\n");
    t_sends(fd, "\n");
    s_expect(fd, "1.2.3.4:4660 by 127.0.0.1, example.org\n");
    s_finish(fd);
    s_close();
}

/* Every allocation fails once: the connection in hand is lost, and no other. */
TEST_PLAIN_SOFT(memory_that_fails_costs_one_connection)
{
    open_proxied(defaults);
    begin_header(0x21, 0x31, 216);
    memset(built + 16, 0, 216);
    memcpy(built + 16, "/run/client", 11);
    built_size += 216;
    put_tlv(2, "example.org", 11);
    put("\n", 1);
    for (int i = 1; i < 12; i++) {
        for (int which = 0; which < 2; which++) {
            t_fail_call(which == 0 ? "malloc" : "realloc", ENOMEM, i, false);
            int fd = t_connect(s_port), code;
            char reply[256];
            send(fd, built, built_size, T_NOSIGNAL);
            size_t got = s_recv(fd, reply, strlen("unix:/run/client by 127.0.0.1, example.org\n"), &code);
            CHECK(got == 0 || got == strlen("unix:/run/client by 127.0.0.1, example.org\n"));
            CHECK(got != 0 || t_fault_hits > 0);
            t_close(fd);
            s_settle();
            t_fail_call("malloc", 0, 0, false);
            CHECK_INT(s_stats().open, 0);
        }
        s_run_ms(2000); /* accepting has perhaps paused */
    }
    s_close();
}

/* ---- tsrv_connect --------------------------------------------------------------------------*/

static int connected;

static void connect_for(void *context)
{
    tsrv_connect_options options = {0};
    tsrv_address client;
    tsrv_stream *stream;
    tsrv_slice line;
    const char *expected = (const char *)context;
    memset(&client, 0, sizeof client);
    if (strncmp(expected, "127.0.0.1", 9) != 0) {
        CHECK(tsrvi_proxy_address(AF_INET6, "2001:db8::7", "443", &client));
    }
    options.proxy_for = &client;
    CHECK_INT(tsrv_connect("127.0.0.1", s_port, &options, &stream), TSRV_OK);
    tsrv_write(stream, "\n", 1);
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_OK);
    CHECK(strncmp(line.data, expected, strlen(expected)) == 0);
    tsrv_close(stream);
    connected++;
}

TEST_COROUTINE(clients_say_for_whom_they_connect)
{
    static char client[] = "[2001:db8::7]:443 by 127.0.0.1", own[] = "127.0.0.1:";
    open_proxied(defaults);
    CHECK_INT(tsrv_spawn(s_loop, connect_for, client), TSRV_OK);
    CHECK_INT(tsrv_spawn(s_loop, connect_for, own), TSRV_OK);
    s_until(&connected, 2);
    s_until(&s_closed, 2);
    s_close();
}

static tsrv_connect_options shared_options;
static tsrv_address shared_client;

static void connect_and_wait(void *context)
{
    tsrv_stream *stream;
    tsrv_slice line;
    memset(&shared_options, 0, sizeof shared_options);
    CHECK(tsrvi_proxy_address(AF_INET6, "2001:db8::7", "443", &shared_client));
    shared_options.proxy_for = &shared_client;
    CHECK_INT(tsrv_connect("localhost", s_port, &shared_options, &stream), TSRV_OK);
    tsrv_write(stream, "\n", 1);
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_OK);
    CHECK(strncmp(line.data, "[2001:db8::7]:443 by", 20) == 0);
    tsrv_close(stream);
    *(int *)context = 1;
}

/* What was asked for holds, whatever the memory is used for while the call waits. */
TEST_COROUTINE(options_of_a_client_are_copied)
{
    int over = 0;
    open_proxied(defaults);
    CHECK_INT(tsrv_spawn(s_loop, connect_and_wait, &over), TSRV_OK);
    CHECK(tsrv_loop_run_once(s_loop, 0) > 0);
    CHECK(shared_options.proxy_for != NULL); /* it waits for the name */
    CHECK_INT(over, 0);
    memset(&shared_options, 0, sizeof shared_options);
    memset(&shared_client, 0, sizeof shared_client);
    s_until(&over, 1);
    s_until(&s_closed, 1);
    s_close();
}

/* Who finds no memory to say it has no connection. */
static void connect_in_vain(void *context)
{
    tsrv_connect_options options = {0};
    tsrv_address client;
    tsrv_stream *stream = NULL;
    int rc = -ENOMEM;
    memset(&client, 0, sizeof client);
    options.proxy_for = &client;
    for (long at = 1; rc != TSRV_OK; at++) {
        CHECK(at < 20);
        t_fail_call("malloc", 0, at, false);
        rc = tsrv_connect("127.0.0.1", s_port, &options, &stream);
        CHECK_INT(rc, t_fault_hits > 0 ? -ENOMEM : TSRV_OK);
        CHECK((stream != NULL) == (rc == TSRV_OK));
        t_fault_at = 0;
    }
    CHECK(tsrv_unsent_size(stream) > 0);
    tsrv_close(stream);
    *(int *)context = 1;
}

TEST_COROUTINE(client_that_cannot_say_for_whom_it_connects)
{
    int over = 0;
    open_proxied(defaults);
    CHECK_INT(tsrv_spawn(s_loop, connect_in_vain, &over), TSRV_OK);
    s_until(&over, 1);
    s_settle();
    s_close();
}

/* A header that has others. */
TEST_PLAIN_SOFT(tlv_that_did_not_come_is_none)
{
    open_proxied(defaults);
    int fd = s_join();
    build_four();
    put_tlv(5, "example.org", 11);
    put("\n", 1);
    t_send(fd, built, built_size);
    s_expect(fd, "1.2.3.4:4660 by 127.0.0.1, \n");
    s_finish(fd);
    s_close();
}

/* ---- drains ----------------------------------------------------------------------------------*/

static int late_fd;

/* The header comes after the loop has looked, and just before the drain. */
static void introduce_and_drain(void *context)
{
    (void)context;
    t_sends(late_fd, "PROXY TCP4 127.0.0.2 127.0.0.1 1000 80\r\nhello\n");
    CHECK_INT(tsrv_server_drain(s_server, 0), TSRV_EAGAIN);
}

/* Who has been mute for long is not closed by a drain when its header has come by then. */
TEST_PLAIN_STREAM(a_header_just_before_a_drain_is_read)
{
    open_proxied(defaults);
    late_fd = s_join();
    s_run_ms(1500);
    CHECK_INT(tsrv_loop_post(s_loop, introduce_and_drain, NULL), TSRV_OK);
    s_expect(late_fd, "hello\n");
    s_leave(late_fd);
    s_until(&s_closed, 1);
    s_close();
}
