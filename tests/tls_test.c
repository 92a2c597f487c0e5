/* TLS: contexts, handshakes and how they fail, ends, volume, client certificates, STARTTLS,
 * clients, reload, drain. The clients are OpenSSL's own, in threads. What may be set besides is in
 * tls_options_test.c. That the rest of a stream is the same over TLS is shown by iostream_test.c,
 * which runs over TLS too. */
#define TSRV_TLS_OPENSSL
#include "script.h"
#include "tls.h"

#include <malloc.h>

/* Threads are the clients of most; a script says so. */
__attribute__((constructor)) static void begin_in_real_time(void)
{
    v_stopped = true;
}

/* ---- clients that send and receive at once ------------------------------------------------*/

static unsigned char pattern(uint64_t at)
{
    return (unsigned char)((at * 2654435761u) >> 16);
}

static void fill(unsigned char *into, size_t size, uint64_t at)
{
    for (size_t i = 0; i < size; i++) {
        into[i] = pattern(at + i);
    }
}

static void compare(const unsigned char *data, size_t size, uint64_t at)
{
    for (size_t i = 0; i < size; i++) {
        if (data[i] != pattern(at + i)) {
            T_FAIL("byte %llu is %d, not %d", (unsigned long long)(at + i), data[i],
                   pattern(at + i));
        }
    }
}

enum { PIECE = 32768 };

/* Sends size bytes of the pattern, then close_notify and FIN if it shall, and receives and compares
 * as many. */
static void pump(SSL *ssl, uint64_t size, bool finish)
{
    static unsigned char out[PIECE], in[PIECE];
    uint64_t sent = 0, got = 0;
    int fd = SSL_get_fd(ssl);
    CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
    SSL_set_mode(ssl, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    while (got < size) {
        bool moved = false;
        size_t n = 0;
        if (sent < size) {
            size_t part = size - sent < PIECE ? (size_t)(size - sent) : PIECE;
            fill(out, part, sent);
            if (SSL_write_ex(ssl, out, part, &n) == 1) {
                sent += n;
                moved = true;
            }
            if (sent == size && finish) {
                CHECK(SSL_shutdown(ssl) == 0);
                t_shut(fd);
            }
        }
        ERR_clear_error();
        int rc = SSL_read_ex(ssl, in, sizeof in, &n);
        if (rc == 1) {
            compare(in, n, got);
            got += n;
        } else if (!moved) {
            struct pollfd ready = {fd, (short)(POLLIN | (sent < size ? POLLOUT : 0)), 0};
            if (SSL_get_error(ssl, rc) != SSL_ERROR_WANT_READ) {
                T_FAIL("the end came after %llu of %llu bytes", (unsigned long long)got,
                       (unsigned long long)size);
            }
            CHECK(poll(&ready, 1, t_patience_ms()) == 1);
        }
    }
    CHECK(fcntl(fd, F_SETFL, 0) == 0);
}

/* ---- 1: contexts --------------------------------------------------------------------------*/

/* The log names the option, the file and the reason at the root. */
TEST_ONCE(test_context_files)
{
    tsrv_tls_options options = server_options();
    options.cert_file = path("missing.pem");
    expect_refused(&options, TSRV_ETLS, "/missing.pem: No such file or directory");
    expect_refused(&options, TSRV_ETLS, "TLS: cert_file /");
    options.cert_file = path("garbage.pem");
    expect_refused(&options, TSRV_ETLS, "/garbage.pem: no start line");
    options.cert_file = path("server_cert.pem"); /* has no key in it */
    expect_refused(&options, TSRV_ETLS, "/server_cert.pem: no start line");
    expect_refused(&options, TSRV_ETLS, "TLS: the key in cert_file /");
    options.key_file = path("missing.pem");
    expect_refused(&options, TSRV_ETLS, "/missing.pem: No such file or directory");
    expect_refused(&options, TSRV_ETLS, "TLS: key_file /");
    options.key_file = path("garbage.pem");
    expect_refused(&options, TSRV_ETLS, "/garbage.pem: no start line");
    options.key_file = path("other.pem"); /* another certificate's */
    expect_refused(&options, TSRV_ETLS, "/other.pem: it does not belong to the certificate");
    options.key_file = path("ed_key.pem"); /* not even of its kind */
    expect_refused(&options, TSRV_ETLS, "/ed_key.pem: it does not belong to the certificate");
    options.key_file = path("server_key.pem");
    options.ca_file = path("missing.pem");
    expect_refused(&options, TSRV_ETLS, "TLS: ca_file /");
    expect_refused(&options, TSRV_ETLS, "/missing.pem: No such file or directory");
    options.ca_file = path("garbage.pem");
    expect_refused(&options, TSRV_ETLS, "/garbage.pem: no ");
    options.ca_file = path("ca.pem");
    tsrv_tls_free(make_tls(&options));
    tsrv_tls_free(NULL);
}

/* It is used all the same, and the log says what clients will say. */
TEST_ONCE(test_context_expired)
{
    tsrv_tls_options options = server_options();
    options.cert_file = path("expired.pem");
    t_watch_log_of(TSRV_LOG_INFO);
    tsrv_tls_free(make_tls(&options));
    CHECK_INT(t_logged(), 1);
    CHECK(strstr(t_log, "/expired.pem: the certificate has expired") != NULL);
}

/* Whoever prompts gets the passphrase, from standard input. */
TEST_ONCE(test_context_key_with_passphrase)
{
    tsrv_tls_options options = server_options();
    int input[2], saved = dup(0);
    CHECK(saved >= 0 && pipe(input) == 0 && dup2(input[0], 0) == 0);
    CHECK(write(input[1], "secret\nsecret\n", 14) == 14);
    close(input[1]);
    options.cert_file = path("server_cert.pem");
    options.key_file = path("locked_key.pem");
    expect_refused(&options, TSRV_ETLS, "/locked_key.pem: it is encrypted, and there is no key_password");
    CHECK(dup2(saved, 0) == 0);
    close(input[0]);
    close(saved);
}

TEST_ONCE(test_context_values)
{
    static char name[300], list[600];
    tsrv_tls_options options = server_options();
    tsrv_tls_certificate certificate = {NULL, path("other.pem"), NULL};
    options.ciphers = "NO-SUCH-CIPHER";
    expect_refused(&options, TSRV_ETLS, "NO-SUCH-CIPHER");
    options.ciphers = NULL;
    options.alpn = "h2,,http/1.1";
    expect_refused(&options, TSRV_EINVAL, "ALPN");
    options.alpn = ",h2";
    expect_refused(&options, TSRV_EINVAL, "ALPN");
    options.alpn = "h2,";
    expect_refused(&options, TSRV_EINVAL, "ALPN");
    memset(name, 'x', 256);
    options.alpn = name;
    expect_refused(&options, TSRV_EINVAL, "ALPN");
    memset(list, 'y', 300);
    list[150] = ',';
    options.alpn = list;
    expect_refused(&options, TSRV_EINVAL, "ALPN");
    options.alpn = NULL;
    options.verify_client = TSRV_TLS_REQUIRED;
    expect_refused(&options, TSRV_EINVAL, "ca_file");
    options.verify_client = TSRV_TLS_OPTIONAL;
    expect_refused(&options, TSRV_EINVAL, "ca_file");
    options.ca_file = path("ca.pem");
    options.verify_client = 3;
    expect_refused(&options, TSRV_EINVAL, "verify_client");
    options.verify_client = -1;
    expect_refused(&options, TSRV_EINVAL, "verify_client");
    options.verify_client = TSRV_TLS_NONE;
    options.certificate_count = -1;
    expect_refused(&options, TSRV_EINVAL, "certificate_count");
    options.certificates = &certificate;
    options.certificate_count = 1;
    certificate.server_name = "other.test";
    certificate.cert_file = path("missing.pem");
    expect_refused(&options, TSRV_ETLS, "missing.pem");
}

/* What would otherwise be found out by the first client. */
TEST_ONCE(test_context_values_that_lack_something)
{
    tsrv_tls_options options = server_options();
    tsrv_tls_certificate certificate = {NULL, path("other.pem"), NULL};
    options.certificates = &certificate;
    options.certificate_count = 1;
    expect_refused(&options, TSRV_EINVAL, "server_name");
    certificate.server_name = "other.test";
    certificate.cert_file = NULL;
    expect_refused(&options, TSRV_EINVAL, "other.test");
    options.certificates = NULL;
    expect_refused(&options, TSRV_EINVAL, "certificate");
    options.certificate_count = 0;
    options.cert_file = NULL;
    options.key_file = path("server_key.pem");
    expect_refused(&options, TSRV_EINVAL, "server_key.pem");
}

TEST_ONCE(test_context_min_version)
{
    tsrv_tls_options options = server_options();
    options.min_version = TSRV_TLS_1_2;
    tsrv_tls_free(make_tls(&options));
    options.min_version = TSRV_TLS_1_3;
    tsrv_tls_free(make_tls(&options));
    options.min_version = 0x0302; /* TLS 1.1 is no longer for anybody */
    expect_refused(&options, TSRV_EINVAL, "min_version");
    options.min_version = 1;
    expect_refused(&options, TSRV_EINVAL, "min_version");
}

TEST_ONCE(test_server_without_certificate)
{
    tsrv_tls_options empty;
    tsrv_server_options options;
    tsrv_server *server = (tsrv_server *)(void *)folder;
    memset(&empty, 0, sizeof empty);
    memset(&options, 0, sizeof options);
    options.handle_stream = echo_bytes;
    options.tls = make_tls(&empty);
    t_watch_log_of(TSRV_LOG_INFO);
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
    CHECK(server == NULL);
    tsrv_tls_free(options.tls);
    options.tls = make_tls(NULL);
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
    tsrv_tls_free(options.tls);
}

/* The strings of the options are not looked at again, not even by a reload. */
TEST_ONCE(test_context_copies_strings)
{
    tsrv_tls_options options = server_options();
    tsrv_tls_certificate certificate;
    char *cert = strdup(path("server_cert.pem")), *key = strdup(path("server_key.pem")),
         *ca = strdup(path("ca.pem")), *alpn = strdup("h2,x"), *name = strdup("other.test"),
         *other = strdup(path("other.pem")), *ciphers = strdup("ECDHE+AESGCM");
    options.cert_file = cert;
    options.key_file = key;
    options.ca_file = ca;
    options.alpn = alpn;
    options.ciphers = ciphers;
    certificate.server_name = name;
    certificate.cert_file = other;
    certificate.key_file = other;
    options.certificates = &certificate;
    options.certificate_count = 1;
    tsrv_tls *tls = make_tls(&options);
    char *all[] = {cert, key, ca, alpn, name, other, ciphers};
    for (size_t i = 0; i < COUNT(all); i++) {
        memset(all[i], '?', strlen(all[i]));
        free(all[i]);
    }
    memset(&certificate, 0, sizeof certificate);
    CHECK_INT(tsrv_tls_reload(tls), TSRV_OK);
    tsrv_tls_free(tls);
}

/* ---- 2: echo_bytes, the order of things, getters ------------------------------------------------*/

static void echo_client(int port, const dial *how, const char *version)
{
    SSL *ssl = dial_open(port, how);
    CHECK_STR(SSL_get_version(ssl), version);
    dial_echo(ssl, "hello");
    dial_echo(ssl, "again");
    dial_finish(ssl);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), TSRV_EOF);
}

static void echo_1_3(int port, void *context)
{
    (void)context;
    echo_client(port, &tls_1_3, "TLSv1.3");
}

static void echo_1_2(int port, void *context)
{
    (void)context;
    echo_client(port, &tls_1_2, "TLSv1.2");
}

TEST_STREAM(test_echo_tls_1_3)
{
    serve_echo(echo_1_3, NULL);
}

TEST_STREAM(test_echo_tls_1_2)
{
    serve_echo(echo_1_2, NULL);
}

enum { ENTERED = 1000, SHAKEN, READ, WOKEN };

/* In callback mode it is called several times; a note is made once. */
static void note_once(tsrv_stream *stream, int what)
{
    unsigned *noted = (unsigned *)tsrv_data(stream);
    if ((*noted & 1u << (what - ENTERED)) == 0) {
        *noted |= 1u << (what - ENTERED);
        t_record(what);
    }
}

static int wait_then_echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    note_once(stream, ENTERED);
    if ((rc = tsrv_wait_for_handshake(stream)) < 0) {
        return rc;
    }
    CHECK(tsrv_tls_version(stream)[0] == 'T');
    note_once(stream, SHAKEN);
    CHECK_INT(tsrv_wait_for_handshake(stream), TSRV_OK); /* ..._already_connected */
    return echo_bytes(stream, address, context);
}

static void slow_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_start(port, &usual);
    t_wait_records(1); /* the handler is there before a byte was sent */
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), ENTERED);
    shake_hands(ssl);
    t_wait_records(2);
    CHECK_INT(t_recorded(1), SHAKEN);
    dial_echo(ssl, "hello");
    dial_finish(ssl);
    t_wait_records(3);
    CHECK_INT(t_recorded(2), TSRV_EOF);
}

TEST_STREAM(test_wait_for_handshake_future)
{
    t_case c = {wait_then_echo, t_record_reason, slow_client, NULL, {0}};
    c.options.data_size = sizeof(unsigned);
    run_tls(&c, NULL);
}

/* The handler leaves the stream to others until it is woken. */
static int wait_and_echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    if (*(bool *)tsrv_data(stream)) {
        return echo_bytes(stream, address, context);
    }
    rc = tsrv_wait(stream, TSRV_NEVER);
    *(bool *)tsrv_data(stream) = rc == TSRV_OK;
    return rc == TSRV_OK ? echo_bytes(stream, address, context) : rc;
}

static void read_outside(void *context)
{
    tsrv_stream *stream = tsrv_server_next(t_server, NULL);
    tsrv_slice some;
    (void)context;
    CHECK_INT(tsrv_read_some(stream, 0, &some), TSRV_EAGAIN);
    tsrv_wake(stream);
}

static void mute_at_first_client(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    while (server_stats().accepted == 0) {
        poll(NULL, 0, 1);
    }
    t_on_loop(read_outside, NULL);
    SSL *ssl = dial_on(fd, &usual);
    shake_hands(ssl);
    dial_echo(ssl, "hello");
    dial_finish(ssl);
}

/* Before the handshake there is nothing to read, which is no error. */
TEST_STREAM(test_read_outside_before_handshake)
{
    t_case c = {wait_and_echo, NULL, mute_at_first_client, NULL, {0}};
    c.options.data_size = sizeof(bool);
    run_tls(&c, NULL);
}

static int read_then_end(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    note_once(stream, ENTERED);
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc != TSRV_EAGAIN) {
        note_once(stream, READ);
    }
    return rc == TSRV_OK ? tsrv_write(stream, line.data, line.size) : rc;
}

static void slow_reader_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_start(port, &usual);
    t_wait_records(1);
    shake_hands(ssl);
    CHECK_INT(t_record_count(), 1); /* the read goes on waiting */
    dial_sends(ssl, "line\n");
    dial_expect(ssl, "line\n");
    dial_expect_end(ssl);
    dial_free(ssl);
    t_wait_records(3);
    CHECK_INT(t_recorded(1), READ);
    CHECK_INT(t_recorded(2), TSRV_OK);
}

TEST_STREAM(test_read_waits_for_handshake)
{
    t_case c = {read_then_end, t_record_reason, slow_reader_client, NULL, {0}};
    c.options.data_size = sizeof(unsigned);
    run_tls(&c, NULL);
}

/* Tornado makes a second wait an error (..._already_waiting_error); here any number may wait. */
static void wait_too(void *context)
{
    CHECK_INT(tsrv_wait_for_handshake((tsrv_stream *)context), TSRV_OK);
    t_record(WOKEN);
}

static int wait_with_others(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    CHECK_INT(tsrv_spawn(t_loop, wait_too, stream), TSRV_OK);
    CHECK_INT(tsrv_spawn(t_loop, wait_too, stream), TSRV_OK);
    return wait_then_echo(stream, address, context);
}

static void several_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_start(port, &usual);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), ENTERED);
    shake_hands(ssl);
    t_wait_records(4);
    dial_echo(ssl, "hello");
    dial_finish(ssl);
    t_wait_records(5);
    int woken = 0;
    for (int i = 0; i < 5; i++) {
        woken += t_recorded(i) == WOKEN;
    }
    CHECK_INT(woken, 2);
}

TEST_COROUTINE(test_wait_for_handshake_already_waiting)
{
    t_case c = {wait_with_others, t_record_reason, several_client, NULL, {0}};
    c.options.data_size = sizeof(unsigned);
    run_tls(&c, NULL);
}

/* Who waited behind one that has cut the connection is told so, though the handshake is done. */
static void wait_behind(void *context)
{
    t_record(100 - tsrv_wait_for_handshake((tsrv_stream *)context));
}

static int wait_and_abort(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    CHECK_INT(tsrv_spawn(t_loop, wait_behind, stream), TSRV_OK);
    CHECK_INT(tsrv_wait_for_handshake(stream), TSRV_OK);
    t_record(SHAKEN);
    return tsrv_abort(stream);
}

static void cut_off_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_start(port, &usual);
    SSL_do_handshake(ssl); /* the reset may be quicker than its end */
    t_expect_reset(SSL_get_fd(ssl));
    dial_free(ssl);
    t_wait_records(3);
    CHECK_INT(t_recorded(0), SHAKEN);
    CHECK_INT(t_recorded(1), 100 - TSRV_ECLOSED);
}

TEST_COROUTINE(test_wait_for_handshake_of_a_stream_that_is_cut)
{
    t_case c = {wait_and_abort, t_record_reason, cut_off_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* A deadline counts for it; and outside of the handler it is asked, and not waited for. */
static tsrv_stream *waiting_stream;

static int wait_until_deadline(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    if (waiting_stream == NULL) {
        tsrv_set_deadline(stream, 300);
        waiting_stream = stream;
        t_record(ENTERED);
    }
    int rc = tsrv_wait_for_handshake(stream);
    if (rc != TSRV_EAGAIN) {
        t_record(100 - rc);
    }
    return rc;
}

static void ask_beside(void *context)
{
    *(int *)context = tsrv_wait_for_handshake(waiting_stream);
}

static void deadline_client(int port, void *context)
{
    int rc = 1;
    (void)context;
    waiting_stream = NULL;
    int fd = t_connect(port);
    t_wait_records(1);
    t_on_loop(ask_beside, &rc);
    CHECK_INT(rc, TSRV_EAGAIN);
    t_wait_records(2);
    CHECK_INT(t_recorded(1), 100 - TSRV_ETIMEOUT);
    t_drain_and_close(fd);
}

TEST_STREAM(test_wait_for_handshake_and_deadline)
{
    t_case c = {wait_until_deadline, NULL, deadline_client, NULL, {0}};
    run_tls(&c, NULL);
}

static int greet(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    if (((unsigned *)tsrv_data(stream))[0] == 0) {
        CHECK_INT(tsrv_write(stream, "welcome\n", 8), TSRV_OK);
        CHECK_INT(tsrv_unsent_size(stream), 8);
        note_once(stream, ENTERED);
    }
    return echo_bytes(stream, address, context);
}

static void silent_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_start(port, &usual);
    t_wait_records(1);
    int64_t before = cpu_ms();
    poll(NULL, 0, 300); /* the time in which nothing may be done */
    CHECK(cpu_ms() - before < 50);
    shake_hands(ssl);
    dial_expect(ssl, "welcome\n");
    dial_echo(ssl, "hello");
    dial_finish(ssl);
}

/* Tornado #2373: a write before the handshake cost all of a processor. */
TEST_STREAM(test_write_before_handshake)
{
    t_case c = {greet, t_record_reason, silent_client, NULL, {0}};
    c.options.data_size = sizeof(unsigned);
    run_tls(&c, NULL);
}

/* Writes, and is over before the handshake is. */
static int say_and_go(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    CHECK_INT(tsrv_write(stream, "bye\n", 4), TSRV_OK);
    t_record(ENTERED);
    return TSRV_OK;
}

static void patient_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_start(port, &usual);
    t_wait_records(1);
    shake_hands(ssl);
    dial_expect(ssl, "bye\n");
    dial_expect_end(ssl);
    dial_free(ssl);
    t_wait_records(2);
}

TEST_STREAM(test_close_before_handshake)
{
    t_case c = {say_and_go, t_record_reason, patient_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* Ends its output before the handshake: the FIN has to wait for it, and the input goes on. */
static int shut_first(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice all;
    (void)address, (void)context;
    CHECK_INT(tsrv_shutdown(stream), TSRV_OK);
    note_once(stream, ENTERED);
    int rc = tsrv_read_until_close(stream, 0, &all);
    if (rc == TSRV_OK) {
        CHECK_MEM(all.data, all.size, "question", 8);
        note_once(stream, READ);
    }
    return rc;
}

static void shut_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_start(port, &usual);
    t_wait_records(1);
    shake_hands(ssl);
    dial_expect_end(ssl);
    dial_sends(ssl, "question");
    CHECK(SSL_shutdown(ssl) == 1);
    t_shut(SSL_get_fd(ssl));
    t_wait_records(3);
    CHECK_INT(t_recorded(1), READ);
    CHECK_INT(t_recorded(2), TSRV_OK);
    dial_free(ssl);
}

TEST_STREAM(test_shutdown_before_handshake)
{
    t_case c = {shut_first, t_record_reason, shut_client, NULL, {0}};
    c.options.data_size = sizeof(unsigned);
    run_tls(&c, NULL);
}

/* What the getters say, seen by on_close, when the descriptor is closed already. */
static struct seen {
    char version[16], alpn[64], name[256];
    unsigned char der[4096];
    size_t der_size;
    int der_code;
    bool native;
} seen;

static void look(tsrv_stream *stream, int reason, void *context)
{
    tsrv_slice der;
    (void)context;
    snprintf(seen.version, sizeof seen.version, "%s", tsrv_tls_version(stream));
    snprintf(seen.alpn, sizeof seen.alpn, "%s", tsrv_tls_alpn(stream));
    snprintf(seen.name, sizeof seen.name, "%s", tsrv_tls_server_name(stream));
    seen.native = tsrv_tls_native(stream) != NULL &&
                  SSL_is_server((SSL *)tsrv_tls_native(stream)) == 1;
    seen.der_code = tsrv_tls_peer_certificate(stream, &der);
    CHECK(der.size <= sizeof seen.der);
    memcpy(seen.der, der.data, der.size);
    seen.der_size = der.size;
    t_record(reason);
}

/* Before the handshake there is nothing to see, and after it the same each time. */
static int look_and_echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice der;
    int rc;
    if (tsrv_wait(stream, 0) == TSRV_ETIMEOUT && tsrv_tls_version(stream)[0] == 0) {
        CHECK_STR(tsrv_tls_alpn(stream), "");
        CHECK_INT(tsrv_tls_peer_certificate(stream, &der), TSRV_EINVAL);
        CHECK_INT(der.size, 0);
    }
    if ((rc = tsrv_wait_for_handshake(stream)) < 0) {
        return rc;
    }
    look(stream, 1, context);
    return echo_bytes(stream, address, context);
}

/* The end of a connection behind so many records. */
static void await_look(int before)
{
    t_wait_records(before + 2);
    while (t_recorded(t_record_count() - 1) == 1) {
        t_wait_records(t_record_count() + 1); /* callback mode looks in every call */
    }
}

/* One connection, and what its stream's getters said at its end. */
static void look_once(int port, const dial *how)
{
    int before = t_record_count();
    memset(&seen, 0, sizeof seen);
    SSL *ssl = dial_open(port, how);
    dial_echo(ssl, "hello");
    dial_finish(ssl);
    await_look(before);
}

static void getters_client(int port, void *context)
{
    static unsigned char der[4096];
    unsigned char *end = der;
    (void)context;
    dial how = {.version = TLS1_2_VERSION, .certificate = "good.pem"};
    FILE *file = fopen(path("good.pem"), "r");
    CHECK(file != NULL);
    X509 *mine = PEM_read_X509(file, NULL, NULL, NULL);
    CHECK(mine != NULL && fclose(file) == 0);
    int size = i2d_X509(mine, &end);
    CHECK(size > 0 && size < (int)sizeof der);
    X509_free(mine);
    for (int i = 0; i < 2; i++) {
        look_once(port, &how);
        CHECK_STR(seen.version, i == 0 ? "TLSv1.2" : "TLSv1.3");
        CHECK_STR(seen.name, "localhost");
        CHECK_STR(seen.alpn, "");
        CHECK(seen.native);
        CHECK_INT(seen.der_code, TSRV_OK);
        CHECK_MEM(seen.der, seen.der_size, der, (size_t)size);
        how.version = TLS1_3_VERSION;
    }
    how.certificate = NULL;
    look_once(port, &how);
    CHECK_INT(seen.der_code, TSRV_EINVAL);
    CHECK_INT(seen.der_size, 0);
}

TEST_STREAM(test_getters)
{
    t_case c = {look_and_echo, look, getters_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    options.ca_file = path("ca.pem");
    options.verify_client = TSRV_TLS_OPTIONAL;
    run_tls(&c, &options);
}

/* A stream without TLS answers too. */
static int plain_getters(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice der;
    (void)address, (void)context;
    CHECK_STR(tsrv_tls_version(stream), "");
    CHECK_STR(tsrv_tls_alpn(stream), "");
    CHECK_STR(tsrv_tls_server_name(stream), "");
    CHECK(tsrv_tls_native(stream) == NULL);
    CHECK_INT(tsrv_tls_peer_certificate(stream, &der), TSRV_EINVAL);
    CHECK_INT(tsrv_wait_for_handshake(stream), TSRV_EINVAL);
    return TSRV_OK;
}

TEST_STREAM(test_getters_of_plain_stream)
{
    t_case c = {plain_getters, NULL, expect_end, NULL, {0}};
    t_run(&c);
}

/* What the hello has said, also when a session is resumed that was another name's. */
static void resumed_name_client(int port, void *context)
{
    (void)context;
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        dial how = {.version = version, .server_name = "localhost", .trusting = true};
        for (int i = 0; i < 2; i++) {
            int before = t_record_count();
            SSL *ssl = dial_open(port, &how);
            dial_echo(ssl, "hello");
            CHECK_INT(SSL_session_reused(ssl), i);
            SSL_SESSION_free(how.session);
            how.session = SSL_get1_session(ssl);
            dial_finish(ssl);
            await_look(before);
            CHECK_STR(seen.name, how.server_name);
            how.server_name = "other.test";
        }
        SSL_SESSION_free(how.session);
    }
}

TEST_SOFT(test_server_name_of_a_resumed_session)
{
    t_case c = {look_and_echo, look, resumed_name_client, NULL, {0}};
    run_tls(&c, NULL);
}

static void alpn_client(int port, void *context)
{
    dial how = {.alpn = "\010http/1.1\002h2"};
    (void)context;
    look_once(port, &how); /* our first, not the client's */
    CHECK_STR(seen.alpn, "h2");
    how.version = TLS1_2_VERSION;
    how.alpn = "\001x\010http/1.1";
    look_once(port, &how);
    CHECK_STR(seen.alpn, "http/1.1");
    how.alpn = NULL;
    look_once(port, &how);
    CHECK_STR(seen.alpn, "");
    t_watch_log_of(TSRV_LOG_INFO);
    how.alpn = "\004spdy\001h";
    for (int i = 0; i < 2; i++) {
        CHECK_INT(dial_refused(dial_start(port, &how)), SSL_AD_NO_APPLICATION_PROTOCOL);
        how.version = TLS1_3_VERSION;
    }
    CHECK_INT(handshakes_failed(), 2);
    CHECK_INT(t_logged(), 2);
}

TEST_STREAM(test_alpn)
{
    t_case c = {look_and_echo, look, alpn_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    options.alpn = "h2,http/1.1";
    run_tls(&c, &options);
}

static void expect_certificate(int port, const char *server_name, bool right, const char *expected)
{
    char name[64];
    dial how = {.server_name = server_name, .trusting = !right};
    SSL *ssl = dial_open(port, &how);
    CHECK_STR(peer_name(ssl, name, sizeof name), expected);
    dial_echo(ssl, "hello");
    dial_finish(ssl);
}

static void sni_client(int port, void *context)
{
    static char longest[256];
    int before = t_record_count();
    (void)context;
    expect_certificate(port, "localhost", true, "server");
    expect_certificate(port, "other.test", true, "other");
    expect_certificate(port, "OTHER.Test", true, "other");
    expect_certificate(port, "a.wild.test", true, "wild");
    expect_certificate(port, "A.WILD.test", true, "wild");
    expect_certificate(port, "exact.wild.test", true, "exact"); /* before the wildcard */
    expect_certificate(port, "a.b.wild.test", false, "server"); /* one label only */
    expect_certificate(port, "wild.test", false, "server");
    expect_certificate(port, "other.test.", false, "server");
    expect_certificate(port, "xother.test", false, "server");
    expect_certificate(port, "other.tes", false, "server");
    expect_certificate(port, "unknown.test", false, "server");
    expect_certificate(port, "*.wild.test", false, "wild"); /* the client's affair */
    expect_certificate(port, "lost.test", false, "server"); /* "*" is a label, and no part of one */
    memset(longest, 'a', 255);
    expect_certificate(port, longest, false, "server");
    t_wait_records(before + 15);
}

TEST_SOFT(test_sni)
{
    tsrv_tls_options options = server_options();
    tsrv_tls_certificate certificates[] = {{"*.wild.test", path("wild.pem"), NULL},
                                           {"exact.wild.test", path("exact.pem"), NULL},
                                           {"*st.test", path("wild.pem"), NULL},
                                           {"other.test", path("other.pem"), path("other.pem")}};
    options.certificates = certificates;
    options.certificate_count = 4;
    serve_echo(sni_client, &options);
}

/* "*" stands for a label, not for nothing. */
static void empty_label_client(int port, void *context)
{
    (void)context;
    expect_certificate(port, ".wild.test", false, "server");
    t_wait_records(1);
}

TEST_SOFT(test_sni_empty_label)
{
    tsrv_tls_options options = server_options();
    tsrv_tls_certificate certificate = {"*.wild.test", path("wild.pem"), NULL};
    options.certificates = &certificate;
    options.certificate_count = 1;
    serve_echo(empty_label_client, &options);
}

/* ALPN and client certificates go with every name. */
static void sni_rules_client(int port, void *context)
{
    dial how = {.server_name = "other.test", .alpn = "\002h2", .certificate = "good.pem"};
    (void)context;
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        how.version = version;
        how.certificate = "good.pem";
        look_once(port, &how);
        CHECK_STR(seen.alpn, "h2");
        CHECK_STR(seen.name, "other.test");
        CHECK_INT(seen.der_code, TSRV_OK);
        how.certificate = NULL;
        CHECK_INT(dial_refused(dial_start(port, &how)), version == TLS1_2_VERSION
                                                               ? SSL_AD_HANDSHAKE_FAILURE
                                                               : SSL_AD_CERTIFICATE_REQUIRED);
        how.certificate = "foreign.pem";
        CHECK_INT(dial_refused(dial_start(port, &how)), SSL_AD_UNKNOWN_CA);
    }
}

TEST_STREAM(test_sni_keeps_rules)
{
    t_case c = {look_and_echo, look, sni_rules_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    tsrv_tls_certificate certificate = {"other.test", path("other.pem"), NULL};
    options.certificates = &certificate;
    options.certificate_count = 1;
    options.alpn = "h2";
    options.ca_file = path("ca.pem");
    options.verify_client = TSRV_TLS_REQUIRED;
    run_tls(&c, &options);
}

/* A ready context, "instead of all but alpn". */
static void native_client(int port, void *context)
{
    dial how = {.alpn = "\001x\002h2"};
    (void)context;
    look_once(port, &how);
    CHECK_STR(seen.version, "TLSv1.3");
    CHECK_STR(seen.alpn, "h2");
}

TEST_STREAM(test_native_context)
{
    t_case c = {look_and_echo, look, native_client, NULL, {0}};
    tsrv_tls_options options;
    SSL_CTX *native = SSL_CTX_new(TLS_server_method());
    CHECK(SSL_CTX_use_certificate_chain_file(native, path("server.pem")) == 1);
    CHECK(SSL_CTX_use_PrivateKey_file(native, path("server.pem"), SSL_FILETYPE_PEM) == 1);
    memset(&options, 0, sizeof options);
    options.native_context = native;
    options.alpn = "h2";
    server_tls = make_tls(&options);
    SSL_CTX_free(native); /* it has a reference of its own */
    CHECK_INT(tsrv_tls_reload(server_tls), TSRV_EINVAL);
    c.options.tls = server_tls;
    t_run(&c);
    tsrv_tls_free(server_tls);
}

/* ---- 3: handshakes that fail --------------------------------------------------------------*/

/* The bytes of a ClientHello. */
static size_t record_hello(unsigned char *hello, size_t capacity)
{
    SSL *ssl = dial_ssl(&usual);
    BIO *in = BIO_new(BIO_s_mem()), *out = BIO_new(BIO_s_mem());
    SSL_set_bio(ssl, in, out);
    CHECK(SSL_do_handshake(ssl) == -1);
    int size = BIO_read(out, hello, (int)capacity);
    CHECK(size > 100 && size < (int)capacity);
    SSL_free(ssl);
    return (size_t)size;
}

/* What the handler's read says is what on_close says. */
static int last_code; /* atomic */

static int read_code(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice some;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_some(stream, 0, &some)) == TSRV_OK) {
        tsrv_write(stream, some.data, some.size);
    }
    if (rc != TSRV_EAGAIN) {
        __atomic_store_n(&last_code, rc, __ATOMIC_RELEASE);
        CHECK_INT(tsrv_read_some(stream, 0, &some), rc); /* again, without waiting */
        CHECK_INT(some.size, 0);
    }
    return rc;
}

/* Sends that instead of a hello and waits for the end of the stream. Returns its reason. */
static int send_instead(int port, const void *data, size_t size)
{
    int count = t_record_count(), fd = t_connect(port);
    t_send(fd, data, size);
    t_shut(fd);
    t_wait_records(count + 1);
    t_close(fd);
    CHECK_INT(__atomic_load_n(&last_code, __ATOMIC_ACQUIRE), t_recorded(count));
    return t_recorded(count);
}

static void garbage_client(int port, void *context)
{
    static const char http[] = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    static const unsigned char sslv2[48] = {0x80, 0x2e, 1, 0, 2,    0, 0x15,
                                            0,    0,    0, 0x10, 7, 0, 0xc0};
    static const unsigned char too_long[] = {22, 3, 1, 0xff, 0xff, 1, 0, 0xff, 0xfb, 3, 3};
    static unsigned char noise[100000];
    (void)context;
    const struct {
        const void *data;
        size_t size;
    } all[] = {{http, sizeof http - 1}, {sslv2, sizeof sslv2}, {too_long, sizeof too_long},
               {noise, 1000}, {noise, sizeof noise}};
    fill(noise, sizeof noise, 12345);
    SSL *served = dial_open(port, &usual);
    for (size_t i = 0; i < COUNT(all); i++) {
        t_watch_log_of(TSRV_LOG_INFO);
        CHECK_INT(send_instead(port, all[i].data, all[i].size), TSRV_ETLS);
        CHECK_INT(t_logged(), 1);
        CHECK(strstr(t_log, "127.0.0.1:") != NULL);
        CHECK_INT(handshakes_failed(), i + 1);
        dial_echo(served, "still here");
    }
    dial_finish(served);
}

TEST_STREAM(test_handshake_garbage)
{
    t_case c = {read_code, t_record_reason, garbage_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* A handler whose read has timed out leaves before the handshake: nothing is on its way to be lost. */
static int read_in_vain(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice some;
    (void)address, (void)context;
    tsrv_set_timeout(stream, 50, 0);
    int rc = tsrv_read_some(stream, 0, &some);
    if (rc != TSRV_EAGAIN) {
        t_record(rc);
    }
    return rc == TSRV_EAGAIN ? rc : (int)TSRV_OK;
}

static void never_shaking_client(int port, void *context)
{
    (void)context;
    int fd = t_connect(port);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), TSRV_ETIMEOUT);
    t_leave(fd);
}

TEST_STREAM(test_close_before_handshake_of_the_silent)
{
    t_case c = {read_in_vain, NULL, never_shaking_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* The handshake's time is over, whatever the handler waits for. */
static void half_hello_client(int port, void *context)
{
    unsigned char hello[2048];
    size_t size = record_hello(hello, sizeof hello);
    (void)context;
    SSL *served = dial_open(port, &usual);
    t_watch_log_of(TSRV_LOG_INFO);
    for (int i = 0; i < 3; i++) {
        int64_t begin = t_now_ms(); /* before the accept, however long this thread waits for its turn */
        int count = t_record_count(), fd = t_connect(port);
        t_send(fd, hello, i == 0 ? 0 : i == 1 ? size / 2 : 5);
        t_wait_records(count + 1);
        CHECK_NEAR_MS(t_now_ms() - begin, 190, 1500);
        CHECK_INT(t_recorded(count), TSRV_ETIMEOUT);
        CHECK_INT(handshakes_failed(), i + 1);
        t_close(fd);
        dial_echo(served, "still here");
    }
    CHECK_INT(t_logged(), 0);
    dial_finish(served);
}

TEST_STREAM(test_handshake_timeout)
{
    t_case c = {read_code, t_record_reason, half_hello_client, NULL, {0}};
    c.options.handshake_timeout_ms = 200;
    run_tls(&c, NULL);
}

/* Is over at once, with a client that stays in the middle of its hello: a close has its own time,
 * and is no failed handshake. */
static int go_at_once(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    return TSRV_OK;
}

static void staying_client(int port, void *context)
{
    unsigned char hello[2048];
    size_t size = record_hello(hello, sizeof hello);
    int64_t begin = t_now_ms(); /* before the accept, however long this thread waits for its turn */
    int fd = t_connect(port);
    (void)context;
    t_send(fd, hello, size / 2);
    t_wait_records(1);
    CHECK_NEAR_MS(t_now_ms() - begin, 390, 1500);
    CHECK_INT(t_recorded(0), TSRV_OK);
    CHECK_INT(handshakes_failed(), 0);
    t_close(fd);
}

TEST_STREAM(test_close_within_handshake)
{
    t_case c = {go_at_once, t_record_reason, staying_client, NULL, {0}};
    c.options.handshake_timeout_ms = 200;
    c.options.close_timeout_ms = 400;
    run_tls(&c, NULL);
}

/* A byte from time to time does not extend it. */
static void trickling_client(int port, void *context)
{
    unsigned char hello[2048];
    (void)context;
    CHECK(record_hello(hello, sizeof hello) > 100);
    int64_t begin = t_now_ms(); /* before the accept, however long this thread waits for its turn */
    int fd = t_connect(port), sent = 0;
    while (t_record_count() == 0 && send(fd, hello + sent, 1, MSG_NOSIGNAL) == 1) {
        sent++;
        CHECK(sent < 100 * t_scale());
        poll(NULL, 0, 20);
    }
    t_wait_records(1);
    CHECK_NEAR_MS(t_now_ms() - begin, 190, 1500);
    CHECK_INT(t_recorded(0), TSRV_ETIMEOUT);
    t_close(fd);
}

TEST_STREAM(test_handshake_timeout_is_not_extended)
{
    t_case c = {read_code, t_record_reason, trickling_client, NULL, {0}};
    c.options.handshake_timeout_ms = 200;
    run_tls(&c, NULL);
}

static void look_when_active(void *context)
{
    *(uint32_t *)context = tsrv_server_next(t_server, NULL)->active_ms;
}

/* Bytes of a handshake are activity as any others: from them on the peer is idle, or not. */
static void active_client(int port, void *context)
{
    unsigned char hello[2048];
    size_t size = record_hello(hello, sizeof hello);
    uint32_t before, active;
    (void)context;
    int fd = t_connect(port);
    t_wait_records(1);
    t_on_loop(look_when_active, &before);
    for (int i = 0; i < 2; i++) {
        int64_t end = t_patience();
        poll(NULL, 0, 3);
        t_send(fd, hello + (i == 0 ? 0 : size / 2), size / 2);
        do {
            t_on_loop(look_when_active, &active);
            CHECK(t_now_ms() < end);
        } while (active == before);
        before = active;
    }
    t_close(fd);
    t_wait_records(2);
}

static int note_and_read(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    if (t_record_count() == 0) {
        t_record(0);
    }
    return read_code(stream, address, context);
}

TEST_STREAM(test_handshake_is_no_idleness)
{
    t_case c = {note_and_read, t_record_reason, active_client, NULL, {0}};
    run_tls(&c, NULL);
}

static int wait_code(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    int rc = tsrv_wait_for_handshake(stream);
    if (rc != TSRV_EAGAIN) {
        CHECK_INT(tsrv_wait_for_handshake(stream), rc);
        __atomic_store_n(&last_code, rc, __ATOMIC_RELEASE);
    }
    return rc;
}

/* Scans and health checks: gone after n bytes of a hello, politely or not. None is logged. */
static void gone_client(int port, void *context)
{
    unsigned char hello[2048];
    size_t size = record_hello(hello, sizeof hello);
    uint64_t failed = 0;
    (void)context;
    t_watch_log_of(TSRV_LOG_INFO);
    for (size_t cut = 0; cut < size; cut += 20) {
        for (int reset = 0; reset < 2; reset++) {
            int count = t_record_count(), fd = t_connect(port);
            t_send(fd, hello, cut);
            reset ? t_reset(fd) : t_close(fd);
            failed++;
            t_wait_records(count + 1);
            int reason = t_recorded(count);
            CHECK_INT(reason, reset ? -ECONNRESET : TSRV_ETLS);
            CHECK_INT(__atomic_load_n(&last_code, __ATOMIC_ACQUIRE), reason);
        }
    }
    CHECK_INT(handshakes_failed(), failed);
    CHECK_INT(t_logged(), 0);
}

TEST_STREAM(test_handshake_client_gone_while_handler_reads)
{
    t_case c = {read_code, t_record_reason, gone_client, NULL, {0}};
    run_tls(&c, NULL);
}

TEST_STREAM(test_handshake_client_gone_while_handler_waits_for_it)
{
    t_case c = {wait_code, t_record_reason, gone_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* Gone in the middle, when the server's answer is on its way. */
static void gone_later_client(int port, void *context)
{
    unsigned char hello[2048], answer[64];
    size_t size = record_hello(hello, sizeof hello);
    (void)context;
    t_watch_log_of(TSRV_LOG_INFO);
    for (int how = 0; how < 3; how++) {
        int count = t_record_count(), fd = t_connect(port);
        t_send(fd, hello, size);
        CHECK_INT(t_recv(fd, answer, sizeof answer), sizeof answer);
        how == 0 ? t_shut(fd) : how == 1 ? t_reset(fd) : t_close(fd);
        t_wait_records(count + 1);
        int reason = t_recorded(count);
        CHECK(reason == TSRV_ETLS || (how != 0 && reason == -ECONNRESET));
        if (how == 0) {
            t_close(fd);
        }
    }
    CHECK_INT(handshakes_failed(), 3);
    CHECK_INT(t_logged(), 0);
}

TEST_STREAM(test_handshake_client_gone_after_hello)
{
    t_case c = {read_code, t_record_reason, gone_later_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* A hello that comes byte by byte is as good as any. */
static void slow_hello_client(int port, void *context)
{
    unsigned char hello[4096];
    size_t size, got = 0;
    BIO *in = BIO_new(BIO_s_mem()), *out = BIO_new(BIO_s_mem());
    SSL *ssl = dial_ssl(&usual);
    int fd = t_connect(port), rc;
    (void)context;
    SSL_set_bio(ssl, in, out);
    while ((rc = SSL_do_handshake(ssl)) != 1 || BIO_ctrl_pending(out) != 0) {
        size = BIO_ctrl_pending(out) == 0 ? 0 : (size_t)BIO_read(out, hello, sizeof hello);
        for (size_t i = 0; i < size; i++) {
            t_send(fd, hello + i, 1);
        }
        if (rc != 1) {
            got = t_recv(fd, hello, 1);
            CHECK(got == 1 && BIO_write(in, hello, 1) == 1);
        }
    }
    SSL_free(ssl);
    t_close(fd);
    t_wait_records(2);
    CHECK_INT(t_recorded(0), SHAKEN);
    CHECK_INT(handshakes_failed(), 0);
}

static int note_handshake(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc = tsrv_wait_for_handshake(stream);
    if (rc < 0) {
        return rc;
    }
    note_once(stream, SHAKEN);
    return echo_bytes(stream, address, context);
}

TEST_STREAM(test_handshake_byte_by_byte)
{
    t_case c = {note_handshake, t_record_reason, slow_hello_client, NULL, {0}};
    c.options.data_size = sizeof(unsigned);
    run_tls(&c, NULL);
}

/* A client that does not like the certificate says so, and that is one log line. */
static void distrusting_client(int port, void *context)
{
    dial how = {.server_name = "unknown.test"};
    (void)context;
    t_watch_log_of(TSRV_LOG_INFO);
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        how.version = version;
        int count = t_record_count();
        SSL *ssl = dial_start(port, &how);
        CHECK(SSL_do_handshake(ssl) != 1);
        t_wait_records(count + 1);
        CHECK_INT(t_recorded(count), TSRV_ETLS);
        dial_free(ssl);
    }
    CHECK_INT(t_logged(), 2);
    CHECK_INT(handshakes_failed(), 2);
}

TEST_STREAM(test_handshake_fail)
{
    t_case c = {read_code, t_record_reason, distrusting_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* ---- 4: ends ------------------------------------------------------------------------------*/

/* Reads a line, answers, and is over: the server's end comes first. */
static void server_ends_client(int port, void *context)
{
    (void)context;
    for (int i = 0; i < 2; i++) {
        SSL *ssl = dial_open(port, i == 0 ? &tls_1_2 : &tls_1_3);
        dial_sends(ssl, "line\n");
        dial_expect(ssl, "line\n");
        dial_expect_end(ssl); /* close_notify, and then FIN */
        dial_free(ssl);
        t_wait_records(i + 1);
        CHECK_INT(t_recorded(i), TSRV_OK);
    }
}

static int answer_line(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    return rc == TSRV_OK ? tsrv_write(stream, line.data, line.size) : rc;
}

TEST_STREAM(test_end_of_server)
{
    t_case c = {answer_line, t_record_reason, server_ends_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* Reads until the end, and answers what the end was. */
static int tell_end(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice all;
    (void)address, (void)context;
    int rc = tsrv_read_until_close(stream, 0, &all);
    if (rc != TSRV_EAGAIN) {
        CHECK_INT(tsrv_error(stream), rc);
        t_record(rc);
        if (rc == TSRV_ETLS) { /* what came before is still there */
            CHECK_INT(tsrv_read_some(stream, 0, &all), TSRV_OK);
        }
        tsrv_printf(stream, "%d:", (int)all.size);
        CHECK_INT(tsrv_write(stream, all.data, all.size), TSRV_OK);
        CHECK_INT(tsrv_read_some(stream, 0, &all), rc == TSRV_OK ? TSRV_EOF : rc);
    }
    return rc;
}

/* A FIN alone is no clean end, but who only stops sending still gets the answer. */
static void truncating_client(int port, void *context)
{
    (void)context;
    t_watch_log_of(TSRV_LOG_INFO);
    for (int i = 0; i < 4; i++) {
        bool clean = i & 1;
        SSL *ssl = dial_open(port, i < 2 ? &tls_1_2 : &tls_1_3);
        dial_sends(ssl, "all of it");
        if (clean) {
            CHECK_INT(SSL_shutdown(ssl), 0);
        }
        t_shut(SSL_get_fd(ssl));
        dial_expect(ssl, "9:all of it");
        dial_expect_end(ssl);
        dial_free(ssl);
        t_wait_records(2 * i + 2);
        CHECK_INT(t_recorded(2 * i), clean ? TSRV_OK : TSRV_ETLS);
        CHECK_INT(t_recorded(2 * i + 1), clean ? TSRV_OK : TSRV_ETLS);
    }
    CHECK_INT(t_logged(), 0);
    CHECK_INT(handshakes_failed(), 0);
}

TEST_STREAM(test_end_without_close_notify)
{
    t_case c = {tell_end, t_record_reason, truncating_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* close_notify alone, without a FIN behind it, is an end. */
static void notify_client(int port, void *context)
{
    (void)context;
    for (int i = 0; i < 2; i++) {
        SSL *ssl = dial_open(port, i == 0 ? &tls_1_2 : &tls_1_3);
        dial_sends(ssl, "x");
        dial_expect(ssl, "x");
        dial_finish(ssl);
        t_wait_records(i + 1);
        CHECK_INT(t_recorded(i), TSRV_EOF);
    }
}

TEST_STREAM(test_end_by_close_notify)
{
    serve_echo(notify_client, NULL);
}

/* An end in the middle of a record is none either. */
static void cut_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_open(port, &usual);
    static const unsigned char head[] = {23, 3, 3, 0, 100, 1, 2, 3};
    dial_echo(ssl, "x");
    t_send(SSL_get_fd(ssl), head, sizeof head);
    t_shut(SSL_get_fd(ssl));
    dial_expect_end(ssl);
    dial_free(ssl);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), TSRV_ETLS);
}

TEST_STREAM(test_end_within_record)
{
    serve_echo(cut_client, NULL);
}

/* What is no record of the session, though it looks like one. */
static const unsigned char forged[] = {23, 3, 3, 0, 32, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                       15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29,
                                       30, 31, 32};

/* The records that the client would send. */
static size_t dial_seal(SSL *ssl, const void *data, size_t size, unsigned char *records, size_t room)
{
    BIO *socket = SSL_get_wbio(ssl), *memory = BIO_new(BIO_s_mem());
    CHECK(BIO_up_ref(socket) == 1);
    SSL_set0_wbio(ssl, memory);
    dial_send(ssl, data, size);
    int sealed = BIO_read(memory, records, (int)room);
    CHECK(sealed > (int)size && sealed < (int)room);
    SSL_set0_wbio(ssl, socket);
    return (size_t)sealed;
}

/* It waits for its client: what its session holds still is nobody's any more, and turns no loop. */
static void check_server_rests(void)
{
    poll(NULL, 0, 20);
    uint32_t before = __atomic_load_n(&t_loop->turns, __ATOMIC_RELAXED);
    poll(NULL, 0, 50);
    CHECK(__atomic_load_n(&t_loop->turns, __ATOMIC_RELAXED) - before <= 20);
}

/* Reads a line, and then only waits for its client's end, which the context expects to be in good order. */
static int wait_for_the_end(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *read = (bool *)tsrv_data(stream);
    tsrv_slice line;
    int rc = TSRV_OK;
    (void)address;
    if (!*read && (rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        *read = true;
    }
    if (rc == TSRV_OK && (rc = tsrv_wait(stream, TSRV_NEVER)) == TSRV_OK && context != NULL) {
        CHECK_INT(tsrv_read_some(stream, 0, &line), TSRV_EOF);
        CHECK_INT(tsrv_write(stream, "bye\n", 4), TSRV_OK);
    }
    return rc;
}

/* close_notify in the segment of the last data, and no FIN: the socket has no more to tell, and the session has. */
static void ending_at_once_client(int port, void *context)
{
    const dial *const versions[] = {&tls_1_2, &tls_1_3};
    (void)context;
    for (size_t i = 0; i < COUNT(versions); i++) {
        unsigned char records[200];
        SSL *ssl = dial_open(port, versions[i]);
        size_t size = dial_seal(ssl, "hi\n", 3, records, 100);
        BIO *socket = SSL_get_wbio(ssl), *memory = BIO_new(BIO_s_mem());
        CHECK(BIO_up_ref(socket) == 1);
        SSL_set0_wbio(ssl, memory);
        CHECK_INT(SSL_shutdown(ssl), 0);
        size += (size_t)BIO_read(memory, records + size, 100);
        SSL_set0_wbio(ssl, socket);
        t_send(SSL_get_fd(ssl), records, size);
        dial_expect(ssl, "bye\n");
        dial_expect_end(ssl);
        dial_free(ssl);
        t_wait_records((int)i + 1);
        CHECK_INT(t_recorded((int)i), TSRV_OK);
    }
}

TEST_STREAM(test_end_behind_data_wakes)
{
    t_case c = {wait_for_the_end, t_record_reason, ending_at_once_client, (void *)&tls_1_3, {0}};
    c.options.data_size = sizeof(bool);
    run_tls(&c, NULL);
}

/* The same with more data: nothing turns the loop while nobody reads it. */
static void sending_more_client(int port, void *context)
{
    unsigned char records[400];
    (void)context;
    SSL *ssl = dial_open(port, &usual);
    size_t size = dial_seal(ssl, "hi\n", 3, records, 200);
    size += dial_seal(ssl, "more\n", 5, records + size, 200);
    t_send(SSL_get_fd(ssl), records, size);
    check_server_rests();
    dial_free(ssl);
    t_wait_records(1);
}

TEST_STREAM(test_data_behind_data_does_not_spin)
{
    t_case c = {wait_for_the_end, t_record_reason, sending_more_client, NULL, {0}};
    c.options.data_size = sizeof(bool);
    run_tls(&c, NULL);
}

/* Nothing is to come but that alert, and most bytes before it. */
static void dial_expect_alert(SSL *ssl, int alert, size_t most)
{
    char bytes[16];
    int kind;
    CHECK(dial_recv(ssl, bytes, sizeof bytes, &kind) <= most);
    CHECK_INT(kind, SSL_ERROR_SSL);
    CHECK_INT(ERR_GET_REASON(ERR_peek_error()), SSL_AD_REASON_OFFSET + alert);
    ERR_clear_error();
}

/* Lines are few, and yet none is uncounted. */
static int flood_lines, flood_more;

static void add_flood(int level, const char *message, void *context)
{
    const char *more = strstr(message, "TLS: and ");
    (void)level, (void)context;
    flood_lines += strstr(message, "TLS with 127.0.0.1:") != NULL;
    flood_more += more != NULL ? atoi(more + 9) : 0;
}

static void flooding_client(int port, void *context)
{
    (void)context;
    tsrv_set_log(add_flood, NULL);
    for (unsigned i = 0; i < 100; i++) {
        CHECK_INT(send_instead(port, "GET / HTTP/1.1\r\n\r\n", 18), TSRV_ETLS);
    }
    CHECK_INT(handshakes_failed(), 100);
}

TEST_SOFT(test_garbage_does_not_flood_the_log)
{
    t_case c = {read_code, t_record_reason, flooding_client, NULL, {0}};
    run_tls(&c, NULL);
    CHECK_INT(flood_lines + flood_more, 100);
    CHECK(flood_lines >= 10);
}

/* A record that was tampered with ends the stream with an alert and one log line; behind: it comes
 * together with a good one. */
static void forge(int port, const dial *how, bool behind)
{
    unsigned char records[200];
    SSL *ssl = dial_open(port, how);
    int count = t_record_count();
    dial_echo(ssl, "x");
    t_watch_log_of(TSRV_LOG_INFO);
    size_t size = behind ? dial_seal(ssl, "y", 1, records, 100) : 0;
    memcpy(records + size, forged, sizeof forged);
    t_send(SSL_get_fd(ssl), records, size + sizeof forged);
    dial_expect_alert(ssl, SSL_AD_BAD_RECORD_MAC, behind);
    check_server_rests();
    t_shut(SSL_get_fd(ssl)); /* the server waits for this, so that the alert is not lost */
    t_wait_records(count + 1);
    CHECK_INT(t_recorded(count), TSRV_ETLS);
    CHECK_INT(t_logged(), 1);
    CHECK(strstr(t_log, "127.0.0.1:") != NULL);
    CHECK_INT(handshakes_failed(), 0);
    dial_free(ssl);
}

/* Who is still sending gets the alert too, not a reset. */
static void forging_and_sending_client(int port, void *context)
{
    static const char noise[300000];
    (void)context;
    for (int i = 0; i < 2; i++) {
        SSL *ssl = dial_open(port, i == 0 ? &tls_1_2 : &tls_1_3);
        dial_echo(ssl, "x");
        t_send(SSL_get_fd(ssl), forged, sizeof forged);
        t_wait_records(2 * i + 1);
        CHECK_INT(t_recorded(2 * i), TSRV_ETLS);
        t_send(SSL_get_fd(ssl), noise, sizeof noise);
        t_shut(SSL_get_fd(ssl));
        dial_expect_alert(ssl, SSL_AD_BAD_RECORD_MAC, 0);
        dial_free(ssl);
        t_wait_records(2 * i + 2);
        CHECK_INT(t_recorded(2 * i + 1), TSRV_ETLS);
    }
}

static int echo_and_record(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc = echo_bytes(stream, address, context);
    if (rc != TSRV_EAGAIN) {
        t_record(rc);
    }
    return rc;
}

TEST_STREAM(test_forged_record_of_who_goes_on_sending)
{
    t_case c = {echo_and_record, t_record_reason, forging_and_sending_client, NULL, {0}};
    tsrv_set_log(t_no_log, NULL);
    run_tls(&c, NULL);
}

static void forging_client(int port, void *context)
{
    (void)context;
    forge(port, &tls_1_2, false);
    forge(port, &tls_1_3, false);
    forge(port, &tls_1_2, true);
    forge(port, &tls_1_3, true);
}

TEST_STREAM(test_forged_record)
{
    serve_echo(forging_client, NULL);
}

enum { LARGE = 20000 }; /* goes out from the caller's memory */

/* The write meets the error that came behind the line. */
static int answer_behind_a_forgery(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static const char answer[LARGE];
    tsrv_slice line;
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc == TSRV_OK) {
        rc = tsrv_write(stream, answer, sizeof answer);
        t_record(rc);
    }
    return rc;
}

static int sends, second_code;

/* The alert is not taken at first, and then not either, or never. */
static void fail_two_sends(const char *name)
{
    if (strcmp(name, "send") == 0) {
        t_fail_call("send", sends == 0 ? EAGAIN : second_code, sends < 2, false);
        sends++;
    }
}

static void forging_behind_a_line_client(int port, void *context)
{
    unsigned char records[200];
    SSL *ssl = dial_open(port, &usual);
    size_t size = dial_seal(ssl, "hi\n", 3, records, 100);
    (void)context;
    memcpy(records + size, forged, sizeof forged);
    sends = 0;
    t_seen = second_code != 0 ? fail_two_sends : NULL;
    t_send(SSL_get_fd(ssl), records, size + sizeof forged);
    t_wait_records(1);
    if (second_code != ECONNRESET) {
        dial_expect_alert(ssl, SSL_AD_BAD_RECORD_MAC, 0);
    }
    t_shut(SSL_get_fd(ssl));
    t_wait_records(2);
    CHECK(second_code == 0 || sends >= 2);
    t_seen = NULL;
    dial_free(ssl);
}

/* The alert goes out as soon as the socket takes it, unless that never takes anything more. */
TEST_PLAIN_SOFT(test_large_write_behind_a_forged_record)
{
    static const int codes[] = {0, EAGAIN, ECONNRESET};
    for (size_t i = 0; i < COUNT(codes); i++) {
        t_case c = {answer_behind_a_forgery, t_record_reason, forging_behind_a_line_client, NULL, {0}};
        second_code = codes[i];
        t_records_used = 0;
        tsrv_set_log(t_no_log, NULL);
        run_tls(&c, NULL);
        CHECK_INT(t_recorded(0), second_code == 0 ? TSRV_ETLS : TSRV_OK);
        CHECK_INT(t_recorded(1), second_code == ECONNRESET ? -ECONNRESET : TSRV_ETLS);
    }
}

/* Nobody reads, but the handler wants to know of the end. */
static int echo_byte_and_wait(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice one;
    int rc;
    (void)address, (void)context;
    if (*(unsigned *)tsrv_data(stream) == 0) {
        if ((rc = tsrv_read_bytes(stream, 1, &one)) < 0) {
            return rc;
        }
        tsrv_write(stream, one.data, one.size);
        *(unsigned *)tsrv_data(stream) = 1;
    }
    rc = tsrv_wait(stream, TSRV_NEVER);
    return rc == TSRV_OK ? tsrv_read_some(stream, 0, &one) : rc;
}

static void forging_to_who_waits(int port, void *context)
{
    (void)context;
    forge(port, &tls_1_2, false);
    forge(port, &tls_1_3, false);
}

TEST_STREAM(test_forged_record_while_handler_waits)
{
    t_case c = {echo_byte_and_wait, t_record_reason, forging_to_who_waits, NULL, {0}};
    c.options.data_size = sizeof(unsigned);
    run_tls(&c, NULL);
}

/* ... or the stream is busy with output that the peer does not take. */
enum { ANSWER = 2 << 20 };

static unsigned char big_answer[ANSWER];

enum { IN_WRITE = 0, IN_FLUSH, IN_WAIT, IN_NOTHING };

static int output_and_more(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc = TSRV_OK, how = *(int *)context;
    (void)address;
    if (*(unsigned *)tsrv_data(stream) == 0) {
        if ((rc = tsrv_read_until(stream, "\n", 0, &line)) < 0) {
            return rc;
        }
        limit_output(stream);
        note_once(stream, ENTERED);
        rc = how == IN_WRITE ? tsrv_write(stream, big_answer, ANSWER)
                             : tsrv_try_write(stream, big_answer, ANSWER);
    }
    if (rc == TSRV_OK && how == IN_FLUSH) {
        rc = tsrv_flush(stream);
    }
    if (rc == TSRV_OK && how == IN_WAIT) {
        rc = tsrv_wait(stream, TSRV_NEVER);
        rc = rc == TSRV_OK ? tsrv_read_some(stream, 0, &line) : rc;
    }
    return rc;
}

/* Asks, forges a record when the answer is stuck, and then takes what comes: whole records that were
 * sealed before, and the alert. */
static void forging_and_taking_client(int port, void *context)
{
    static unsigned char buffer[ANSWER + 1];
    dial how = {.receive_room = 4096};
    int kind;
    (void)context;
    for (int i = 0; i < 2; i++) {
        how.version = i == 0 ? TLS1_2_VERSION : TLS1_3_VERSION;
        int count = t_record_count();
        SSL *ssl = dial_open(port, &how);
        dial_sends(ssl, "go\n");
        t_wait_records(count + 1);
        t_watch_log_of(TSRV_LOG_INFO);
        t_send(SSL_get_fd(ssl), forged, sizeof forged);
        t_shut(SSL_get_fd(ssl));
        size_t got = dial_recv(ssl, buffer, sizeof buffer, &kind);
        printf("%zu bytes, then %d\n", got, kind);
        compare(buffer, got, 0);
        t_wait_records(count + 2);
        CHECK_INT(t_recorded(count + 1), TSRV_ETLS);
        CHECK_INT(kind, SSL_ERROR_SSL);
        CHECK_INT(ERR_GET_REASON(ERR_peek_error()), SSL_AD_REASON_OFFSET + SSL_AD_BAD_RECORD_MAC);
        CHECK_INT(t_logged(), 1);
        dial_free(ssl);
    }
}

static void forge_behind_output(int how)
{
    t_case c = {output_and_more, t_record_reason, forging_and_taking_client, &how, {0}};
    c.options.data_size = sizeof(unsigned);
    c.options.max_write_buffer_size = 2 * ANSWER;
    c.options.write_high_water = how == IN_WAIT ? 4096 : 0; /* less than what is sealed at a time */
    fill(big_answer, ANSWER, 0);
    run_tls(&c, NULL);
}

TEST_STREAM(test_forged_record_during_write)
{
    forge_behind_output(IN_WRITE);
}

TEST_STREAM(test_forged_record_during_flush)
{
    forge_behind_output(IN_FLUSH);
}

TEST_STREAM(test_forged_record_during_wait)
{
    forge_behind_output(IN_WAIT);
}

TEST_STREAM(test_forged_record_behind_handler)
{
    forge_behind_output(IN_NOTHING);
}

/* Forges a record when the answer is stuck, and takes nothing. */
static void forging_and_stubborn_client(int port, void *context)
{
    dial how = {.receive_room = 4096};
    SSL *ssl = dial_open(port, &how);
    (void)context;
    dial_sends(ssl, "go\n");
    t_wait_records(1);
    t_send(SSL_get_fd(ssl), forged, sizeof forged);
    t_wait_records(2);
    CHECK_INT(t_recorded(1), TSRV_ETLS);
    t_expect_reset(SSL_get_fd(ssl));
    dial_free(ssl);
}

/* An alert is not waited for any longer than a close, and the reason is still what it tells. */
TEST_PLAIN_SOFT(test_alert_that_nobody_takes)
{
    int how = IN_NOTHING;
    t_case c = {output_and_more, t_record_reason, forging_and_stubborn_client, &how, {0}};
    c.options.data_size = sizeof(unsigned);
    c.options.max_write_buffer_size = 2 * ANSWER;
    c.options.write_timeout_ms = TSRV_NEVER;
    c.options.close_timeout_ms = 100;
    tsrv_set_log(t_no_log, NULL);
    run_tls(&c, NULL);
}

/* Its read has timed out, and it ends when the client has sent something else, and a line. */
static int end_behind_silence(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    char bytes[200];
    tsrv_slice line;
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc == TSRV_ETIMEOUT) {
        t_record(1);
        while (t_record_count() < 2 ||
               recv(tsrv_fd(stream), bytes, sizeof bytes, MSG_PEEK | MSG_DONTWAIT) < t_recorded(1)) {
            poll(NULL, 0, 1);
        }
    }
    return rc;
}

static void updating_client(int port, void *context)
{
    unsigned char records[200];
    char bytes[4096];
    int kind;
    ssize_t n;
    SSL *ssl = dial_open(port, &tls_1_3);
    (void)context;
    t_wait_records(1);
    CHECK(SSL_key_update(ssl, SSL_KEY_UPDATE_REQUESTED) == 1);
    size_t size = dial_seal(ssl, "late\n", 5, records, sizeof records);
    t_send(SSL_get_fd(ssl), records, size);
    t_record((int)size);
    CHECK_INT(dial_recv(ssl, bytes, 1, &kind), 0);
    CHECK_INT(kind, SSL_ERROR_ZERO_RETURN);
    while ((n = recv(SSL_get_fd(ssl), bytes, sizeof bytes, 0)) > 0) {
    }
    CHECK_INT(n, 0); /* and no reset */
    dial_free(ssl);
}

/* A message that wants an answer comes just before the end, of somebody who was silent until then. */
TEST_PLAIN_SOFT(test_key_update_at_the_end)
{
    t_case c = {end_behind_silence, NULL, updating_client, NULL, {0}};
    c.options.read_timeout_ms = 500;
    run_tls(&c, NULL);
}

static int say_the_last_word_and_read(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    CHECK_INT(tsrv_shutdown(stream), TSRV_OK);
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    CHECK_INT(BIO_write(SSL_get_wbio((SSL *)tsrv_tls_native(stream)), "x", 1), 1); /* as OpenSSL 1.1.1 answers */
    CHECK_INT(stream->unsent, 0);
    t_record(rc);
    return TSRV_OK;
}

static void updating_late_client(int port, void *context)
{
    unsigned char records[200];
    char bytes[100];
    int kind;
    SSL *ssl = dial_open(port, &tls_1_3);
    (void)context;
    CHECK_INT(dial_recv(ssl, bytes, 1, &kind), 0);
    CHECK_INT(kind, SSL_ERROR_ZERO_RETURN);
    CHECK(SSL_key_update(ssl, SSL_KEY_UPDATE_REQUESTED) == 1);
    size_t size = dial_seal(ssl, "late\n", 5, records, sizeof records);
    t_send(SSL_get_fd(ssl), records, size);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), TSRV_OK);
    CHECK_INT(recv(SSL_get_fd(ssl), bytes, sizeof bytes, 0), 0);
    dial_free(ssl);
}

/* After its last word the server reads on, and has no answer to what wants one. */
TEST_COROUTINE(test_key_update_behind_the_last_word)
{
    t_case c = {say_the_last_word_and_read, NULL, updating_late_client, NULL, {0}};
    run_tls(&c, NULL);
}

static int refused_sends; /* atomic */

static void refuse_sends(const char *name)
{
    if (strcmp(name, "send") == 0 || strcmp(name, "sendmsg") == 0) {
        t_fail_call(name, EAGAIN, 1, true);
        __atomic_add_fetch(&refused_sends, 1, __ATOMIC_ACQ_REL);
    }
}

static void set_short_times(void *context)
{
    (void)context;
    tsrv_set_timeout(tsrv_server_next(t_server, NULL), TSRV_NEVER, 10);
}

static void refused_at_first_client(int port, void *context)
{
    int fd = t_connect(port);
    SSL *ssl = dial_on(fd, &usual);
    (void)context;
    t_seen = refuse_sends;
    CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0 && SSL_do_handshake(ssl) < 0);
    while (__atomic_load_n(&refused_sends, __ATOMIC_ACQUIRE) == 0) {
        poll(NULL, 0, 1);
    }
    t_on_loop(set_short_times, NULL);
    poll(NULL, 0, 50);
    t_seen = NULL;
    t_fail_call(NULL, 0, 0, false);
    CHECK(fcntl(fd, F_SETFL, 0) == 0);
    shake_hands(ssl);
    dial_echo(ssl, "hello");
    dial_finish(ssl);
}

/* A handshake has a time of its own: a limit of writes that is set meanwhile is for what comes behind it. */
TEST_PLAIN_SOFT(test_limit_of_writes_within_a_handshake)
{
    t_case c = {echo_bytes, NULL, refused_at_first_client, NULL, {0}};
    run_tls(&c, NULL);
}

static int write_bye(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    return tsrv_write(stream, "bye\n", 4);
}

static void do_nothing(void *context)
{
    (void)context;
}

static void drain_slowly(void *context)
{
    static tsrv_timer long_one; /* the loop has something left until the client is done */
    (void)context;
    CHECK_INT(tsrv_timer_start(t_loop, &long_one, 60000, do_nothing, NULL), TSRV_OK);
    CHECK_INT(tsrv_server_drain(t_server, 10000), TSRV_EAGAIN);
}

static void late_client(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    while (server_stats().accepted == 0) {
        poll(NULL, 0, 1);
    }
    t_on_loop(drain_slowly, NULL);
    SSL *ssl = dial_on(fd, &usual);
    shake_hands(ssl);
    dial_expect(ssl, "bye\n");
    dial_expect_end(ssl);
    dial_free(ssl);
}

/* Who has an answer waiting for its handshake is not mute. */
TEST_PLAIN_SOFT(test_drain_of_an_answer_that_waits_for_the_handshake)
{
    t_case c = {write_bye, NULL, late_client, NULL, {0}};
    run_tls(&c, NULL);
}

static int swallow(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice some;
    int rc;
    (void)address;
    while ((rc = tsrv_read_some(stream, 0, &some)) == TSRV_OK) {
        *(size_t *)context += some.size;
    }
    return rc;
}

static void finishing_client(int port, void *context)
{
    static const char data[2000];
    SSL *ssl = dial_open(port, &usual);
    (void)context;
    t_on_loop(drain_slowly, NULL);
    dial_send(ssl, data, sizeof data);
    dial_finish(ssl);
}

/* What is in the session is no idleness, though nothing is in a buffer. */
TEST_PLAIN_SOFT(test_drain_of_a_record_that_is_read_in_pieces)
{
    size_t swallowed = 0;
    t_case c = {swallow, t_record_reason, finishing_client, &swallowed, {0}};
    c.options.read_chunk_size = 1;
    run_tls(&c, NULL);
    CHECK_INT(swallowed, 2000);
    CHECK_INT(t_recorded(0), TSRV_EOF);
}

/* A record that takes longer than the idle timeout is no silence. */
static void trickled_record_client(int port, void *context)
{
    unsigned char record[100];
    (void)context;
    SSL *ssl = dial_open(port, &usual);
    size_t size = dial_seal(ssl, "x", 1, record, sizeof record), piece = size / 8;
    for (size_t at = 0; at < size; at += piece) {
        poll(NULL, 0, 250);
        t_send(SSL_get_fd(ssl), record + at, at + piece < size ? piece : size - at);
    }
    dial_expect(ssl, "x");
    dial_finish(ssl);
}

TEST_SOFT(test_idle_timeout_and_slow_record)
{
    t_case c = {echo_bytes, t_record_reason, trickled_record_client, NULL, {0}};
    c.options.idle_timeout_ms = 1000;
    run_tls(&c, NULL);
}

/* Our half first: the client sees the end and goes on sending. */
static int shut_then_read(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice all;
    int rc = tsrv_wait_for_handshake(stream);
    (void)address, (void)context;
    if (rc < 0) {
        return rc;
    }
    if (tsrv_data(stream) != NULL && *(unsigned *)tsrv_data(stream) == 0) {
        CHECK_INT(tsrv_write(stream, "said", 4), TSRV_OK);
        CHECK_INT(tsrv_shutdown(stream), TSRV_OK);
        CHECK_INT(tsrv_shutdown(stream), TSRV_OK);
        CHECK_INT(tsrv_write(stream, "more", 4), TSRV_ECLOSED);
        note_once(stream, ENTERED);
    }
    rc = tsrv_read_until_close(stream, 0, &all);
    if (rc == TSRV_OK) {
        CHECK_MEM(all.data, all.size, "answered", 8);
    }
    return rc;
}

static void half_client(int port, void *context)
{
    (void)context;
    for (int i = 0; i < 2; i++) {
        SSL *ssl = dial_open(port, i == 0 ? &tls_1_2 : &tls_1_3);
        dial_expect(ssl, "said");
        dial_expect_end(ssl);
        dial_sends(ssl, "answered");
        CHECK(SSL_shutdown(ssl) == 1);
        t_shut(SSL_get_fd(ssl));
        t_wait_records(2 * i + 2);
        CHECK_INT(t_recorded(2 * i + 1), TSRV_OK);
        dial_free(ssl);
    }
}

TEST_STREAM(test_shutdown)
{
    t_case c = {shut_then_read, t_record_reason, half_client, NULL, {0}};
    c.options.data_size = sizeof(unsigned);
    run_tls(&c, NULL);
}

static void half_closing_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_open(port, &usual);
    pump(ssl, 16 << 20, true);
    dial_expect_end(ssl);
    dial_free(ssl);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), TSRV_EOF);
}

TEST_SOFT(test_half_close_of_16_mib)
{
    serve_echo(half_closing_client, NULL);
}

/* Lingering: the answer is not cut by the reset that unread input would cause. */
static int answer_unread(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice one;
    (void)address, (void)context;
    int rc = tsrv_read_bytes(stream, 1, &one);
    return rc == TSRV_OK ? tsrv_write(stream, big_answer, ANSWER) : rc;
}

static void unread_client(int port, void *context)
{
    static unsigned char buffer[ANSWER];
    (void)context;
    for (int i = 0; i < 10; i++) {
        int kind;
        SSL *ssl = dial_open(port, i & 1 ? &tls_1_2 : &tls_1_3);
        dial_send(ssl, big_answer, 100000);
        CHECK_INT(dial_recv(ssl, buffer, ANSWER, &kind), ANSWER);
        compare(buffer, ANSWER, 0);
        dial_expect_end(ssl);
        dial_free(ssl);
    }
    t_wait_records(10);
}

TEST_SOFT(test_close_with_unread_input)
{
    t_case c = {answer_unread, t_record_reason, unread_client, NULL, {0}};
    c.options.max_write_buffer_size = 4 << 20;
    fill(big_answer, ANSWER, 0);
    run_tls(&c, NULL);
}

static int abort_on_line(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc == TSRV_OK) {
        tsrv_write(stream, "lost", 4);
        CHECK_INT(tsrv_abort(stream), TSRV_OK);
        CHECK_INT(tsrv_wait_for_handshake(stream), TSRV_ECLOSED);
    }
    return rc;
}

static void aborted_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_open(port, &usual);
    dial_sends(ssl, "now\n");
    t_expect_reset(SSL_get_fd(ssl));
    dial_free(ssl);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), TSRV_OK);
}

TEST_STREAM(test_abort)
{
    t_case c = {abort_on_line, t_record_reason, aborted_client, NULL, {0}};
    run_tls(&c, NULL);
}

static void resetting_client(int port, void *context)
{
    (void)context;
    t_watch_log_of(TSRV_LOG_INFO);
    SSL *ssl = dial_open(port, &usual);
    dial_echo(ssl, "hello");
    struct linger now = {1, 0};
    CHECK(setsockopt(SSL_get_fd(ssl), SOL_SOCKET, SO_LINGER, &now, sizeof now) == 0);
    dial_free(ssl);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), -ECONNRESET);
    CHECK_INT(__atomic_load_n(&last_code, __ATOMIC_ACQUIRE), -ECONNRESET);
    CHECK_INT(t_logged(), 0);
}

TEST_STREAM(test_reset_by_peer)
{
    t_case c = {read_code, t_record_reason, resetting_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* tsrv_wait is woken by the peer's end, with the handler in no read. */
static int wait_for_end(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    unsigned *state = (unsigned *)tsrv_data(stream);
    int rc;
    (void)address, (void)context;
    if (*state == 0) {
        if ((rc = tsrv_read_until(stream, "\n", 0, &line)) < 0) {
            return rc;
        }
        note_once(stream, READ);
    }
    rc = tsrv_wait(stream, 5000);
    if (rc == TSRV_EAGAIN) {
        return rc;
    }
    t_record(rc == TSRV_OK ? WOKEN : rc);
    return tsrv_read_some(stream, 0, &line);
}

static void leaving_client(int port, void *context)
{
    (void)context;
    for (int how = 0; how < 4; how++) {
        int count = t_record_count();
        SSL *ssl = dial_open(port, &usual);
        dial_sends(ssl, "line\n");
        if (how < 3) {
            t_wait_records(count + 1);
        }
        if (how != 1) { /* 0, 3: as it should be; 1: FIN only; 2: close_notify only */
            CHECK_INT(SSL_shutdown(ssl), 0);
        }
        if (how != 2) {
            t_shut(SSL_get_fd(ssl));
        }
        t_wait_records(count + 3);
        if (t_recorded(count + 1) != WOKEN) {
            T_FAIL("end %d did not wake", how);
        }
        CHECK_INT(t_recorded(count + 2), how == 1 ? TSRV_ETLS : TSRV_EOF);
        dial_free(ssl);
    }
}

TEST_STREAM(test_wait_is_woken_by_end)
{
    t_case c = {wait_for_end, t_record_reason, leaving_client, NULL, {0}};
    c.options.data_size = sizeof(unsigned);
    run_tls(&c, NULL);
}

/* ---- 5: volume ----------------------------------------------------------------------------*/

static void volume_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_open(port, &usual);
    pump(ssl, 64 << 20, true);
    dial_expect_end(ssl);
    dial_free(ssl);
}

TEST_SOFT(test_64_mib_each_way)
{
    serve_echo(volume_client, NULL);
}
LONG(test_64_mib_each_way);

enum { TINY = 20000 };

static int read_tiny(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice all;
    (void)address, (void)context;
    int rc = tsrv_read_bytes(stream, TINY, &all);
    if (rc == TSRV_OK) {
        compare((const unsigned char *)all.data, all.size, 0);
        rc = tsrv_write(stream, "ok", 2);
    }
    return rc;
}

static void tiny_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_open(port, &usual);
    for (int i = 0; i < TINY; i++) {
        unsigned char byte = pattern((uint64_t)i);
        dial_send(ssl, &byte, 1);
    }
    dial_expect(ssl, "ok");
    dial_expect_end(ssl);
    dial_free(ssl);
}

TEST_STREAM(test_tiny_records)
{
    t_case c = {read_tiny, t_record_reason, tiny_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* One record, and then silence: what is inside the session must not wait for an event. */
enum { RECORD = 16384 };

static int read_single_bytes(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    unsigned *count = (unsigned *)tsrv_data(stream);
    tsrv_slice one;
    int rc = TSRV_OK;
    (void)address, (void)context;
    while (*count < RECORD && (rc = tsrv_read_bytes(stream, 1, &one)) == TSRV_OK) {
        compare((const unsigned char *)one.data, one.size, (*count)++);
    }
    if (rc == TSRV_OK && *count == RECORD) {
        tsrv_write(stream, "all", 3);
        ++*count;
    }
    return rc == TSRV_OK ? tsrv_read_some(stream, 0, &one) : rc;
}

static void record_client(int port, void *context)
{
    static unsigned char record[RECORD];
    (void)context;
    fill(record, RECORD, 0);
    SSL *ssl = dial_open(port, &usual);
    dial_send(ssl, record, RECORD);
    dial_expect(ssl, "all");
    dial_finish(ssl);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), TSRV_EOF);
}

TEST_STREAM(test_input_inside_session)
{
    t_case c = {read_single_bytes, t_record_reason, record_client, NULL, {0}};
    c.options.data_size = sizeof(unsigned);
    run_tls(&c, NULL);
}

TEST_STREAM(test_input_inside_session_and_small_reads)
{
    t_case c = {read_single_bytes, t_record_reason, record_client, NULL, {0}};
    c.options.data_size = sizeof(unsigned);
    c.options.read_chunk_size = 1000;
    c.options.max_buffer_size = 4000;
    run_tls(&c, NULL);
}

static unsigned char into[1 << 20];

static size_t into_size(void)
{
    return t_hard ? 50000 : sizeof into;
}

static int read_into(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    int rc = tsrv_read_into(stream, into, into_size());
    if (rc == TSRV_OK) {
        compare(into, into_size(), 0);
        tsrv_write(stream, "ok", 2);
    }
    return rc;
}

static void into_client(int port, void *context)
{
    static unsigned char data[sizeof into];
    (void)context;
    fill(data, sizeof data, 0);
    SSL *ssl = dial_open(port, &usual);
    dial_send(ssl, data, into_size());
    dial_expect(ssl, "ok");
    dial_expect_end(ssl);
    dial_free(ssl);
}

TEST_STREAM(test_read_into)
{
    t_case c = {read_into, t_record_reason, into_client, NULL, {0}};
    run_tls(&c, NULL);
}

static int file = -1;

static size_t file_size(void)
{
    return t_hard ? 20000 : (size_t)4 << 20;
}

/* Between the file's parts there is text, and the order stays. */
static int send_file(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc == TSRV_OK) {
        tsrv_write(stream, "<", 1);
        CHECK_INT(tsrv_sendfile(stream, file, 5, 10), TSRV_OK);
        tsrv_write(stream, "|", 1);
        CHECK_INT(tsrv_sendfile(stream, file, 0, file_size()),
                  TSRV_OK);
        rc = tsrv_write(stream, ">", 1);
    }
    return rc;
}

enum { FLOOD = 250000 };

/* Reads when all of it is in the socket: what it gets, and one callback of the loop between. */
static int read_a_flood(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice data;
    int room = 1 << 20, rc;
    (void)address, (void)context;
    if (*(unsigned *)tsrv_data(stream) == 0) {
        CHECK(setsockopt(tsrv_fd(stream), SOL_SOCKET, SO_RCVBUF, &room, sizeof room) == 0);
        if ((rc = tsrv_wait_for_handshake(stream)) < 0) {
            return rc;
        }
        note_once(stream, ENTERED);
        while (t_record_count() < 2) {
            poll(NULL, 0, 1); /* the client sends meanwhile */
        }
    }
    rc = tsrv_read_bytes(stream, FLOOD, &data);
    if (rc == TSRV_OK) {
        compare((const unsigned char *)data.data, data.size, 0);
        rc = tsrv_write(stream, "all\n", 4);
    }
    return rc;
}

static void flood_client(int port, void *context)
{
    static unsigned char data[FLOOD];
    SSL *ssl = dial_open(port, &usual);
    (void)context;
    fill(data, sizeof data, 0);
    t_wait_records(1);
    dial_send(ssl, data, sizeof data);
    t_record(2);
    dial_expect(ssl, "all\n");
    dial_free(ssl);
}

/* One read takes more from the socket than the session does at a time, and nothing is lost. */
TEST_PLAIN_SOFT(test_read_of_more_than_a_session_takes)
{
    t_case c = {read_a_flood, t_record_reason, flood_client, NULL, {0}};
    c.options.data_size = sizeof(unsigned);
    c.options.read_chunk_size = 1 << 20;
    c.options.max_buffer_size = 1 << 20;
    run_tls(&c, NULL);
}

static void file_client(int port, void *context)
{
    static unsigned char data[4 << 20];
    int kind;
    (void)context;
    SSL *ssl = dial_open(port, &usual);
    dial_sends(ssl, "go\n");
    dial_expect(ssl, "<");
    CHECK_INT(dial_recv(ssl, data, 10, &kind), 10);
    compare(data, 10, 5);
    dial_expect(ssl, "|");
    CHECK_INT(dial_recv(ssl, data, file_size(), &kind), file_size());
    compare(data, file_size(), 0);
    dial_expect(ssl, ">");
    dial_expect_end(ssl);
    dial_free(ssl);
}

static void make_big_file(void)
{
    static unsigned char data[4 << 20];
    file = open(path("big"), O_RDWR | O_CREAT | O_TRUNC, 0600);
    fill(data, sizeof data, 0);
    CHECK(file >= 0 && write(file, data, sizeof data) == (ssize_t)sizeof data);
}

TEST_STREAM(test_sendfile)
{
    t_case c = {send_file, t_record_reason, file_client, NULL, {0}};
    make_big_file();
    run_tls(&c, NULL);
    close(file);
}

/* A file that turns out shorter leaves a gap, so the stream is cut. */
static int send_too_much(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc == TSRV_OK) {
        rc = tsrv_sendfile(stream, file, 10, 4 << 20);
    }
    return rc;
}

static void short_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_open(port, &usual);
    dial_sends(ssl, "go\n");
    t_expect_reset(SSL_get_fd(ssl));
    dial_free(ssl);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), -EIO);
}

TEST_STREAM(test_sendfile_shorter)
{
    t_case c = {send_too_much, t_record_reason, short_client, NULL, {0}};
    make_big_file();
    tsrv_set_log(t_no_log, NULL);
    run_tls(&c, NULL);
    close(file);
}

/* So does one that cannot be read. */
static void unreadable_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_open(port, &usual);
    t_fail_call("pread", EIO, 3, true);
    dial_sends(ssl, "go\n");
    t_expect_reset(SSL_get_fd(ssl));
    CHECK(t_fault_hits > 0);
    t_fail_call(NULL, 0, 0, false);
    dial_free(ssl);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), -EIO);
}

TEST_SOFT(test_sendfile_unreadable)
{
    t_case c = {send_too_much, t_record_reason, unreadable_client, NULL, {0}};
    make_big_file();
    run_tls(&c, NULL);
    close(file);
}

static int tries; /* atomic: writes that were taken */

static int fill_up(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    unsigned char data[1000];
    tsrv_slice line;
    int count = 0;
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    if (rc < 0) {
        return rc;
    }
    do {
        fill(data, sizeof data, (uint64_t)count * sizeof data);
        rc = tsrv_try_write(stream, data, sizeof data);
        count += rc == TSRV_OK;
    } while (rc == TSRV_OK && count < 1000000);
    CHECK_INT(rc, TSRV_EFULL);
    CHECK_INT(tsrv_error(stream), TSRV_OK);
    /* Sealing what goes out makes it longer, by a little. */
    CHECK(tsrv_unsent_size(stream) > 200000 && tsrv_unsent_size(stream) < 330000);
    __atomic_store_n(&tries, count, __ATOMIC_RELEASE);
    t_record(ENTERED);
    return TSRV_OK;
}

static void lazy_client(int port, void *context)
{
    static unsigned char data[1000];
    dial how = {.receive_room = 4096};
    int kind;
    (void)context;
    SSL *ssl = dial_open(port, &how);
    dial_sends(ssl, "go\n");
    t_wait_records(1);
    for (int i = 0; i < __atomic_load_n(&tries, __ATOMIC_ACQUIRE); i++) {
        CHECK_INT(dial_recv(ssl, data, sizeof data, &kind), sizeof data);
        compare(data, sizeof data, (uint64_t)i * sizeof data);
    }
    dial_expect_end(ssl);
    dial_free(ssl);
}

TEST_SOFT(test_try_write_full)
{
    t_case c = {fill_up, t_record_reason, lazy_client, NULL, {0}};
    c.options.max_write_buffer_size = 300000;
    run_tls(&c, NULL);
}

static int write_much(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    static char much[12 << 20];
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    return rc == TSRV_OK ? tsrv_write(stream, much, sizeof much) : rc;
}

static void unreading_client(int port, void *context)
{
    dial how = {.receive_room = 4096};
    (void)context;
    SSL *ssl = dial_open(port, &how);
    int64_t begin = t_now_ms();
    dial_sends(ssl, "go\n");
    t_wait_records(1);
    CHECK_NEAR_MS(t_now_ms() - begin, 190, 1500);
    CHECK_INT(t_recorded(0), TSRV_ETIMEOUT);
    dial_free(ssl);
}

TEST_SOFT(test_write_timeout)
{
    t_case c = {write_much, t_record_reason, unreading_client, NULL, {0}};
    c.options.write_timeout_ms = 200;
    run_tls(&c, NULL);
}

/* Key updates that ask for one in return cost the server output without being input. A client that
 * sends them and does not read must not fill the memory. */
static void update_client(int port, void *context)
{
    dial how = {.version = TLS1_3_VERSION, .receive_room = 4096};
    (void)context;
    SSL *ssl = dial_open(port, &how);
    dial_echo(ssl, "hello");
    CHECK(fcntl(SSL_get_fd(ssl), F_SETFL, O_NONBLOCK) == 0);
    tsrv_stats stats;
    for (int i = 0; i < 300000; i++) {
        int rc = SSL_key_update(ssl, SSL_KEY_UPDATE_REQUESTED);
        rc = rc == 1 ? SSL_do_handshake(ssl) : rc;
        if (rc != 1) {
            break; /* refused, or no more is taken */
        }
    }
    stats = server_stats();
    if (stats.open == 1) {
        size_t unsent = 0;
        for (int i = 0; i < 20; i++) {
            stats = server_stats();
            unsent = stats.open == 1 ? tsrv_unsent_size(tsrv_server_next(t_server, NULL)) : 0;
            poll(NULL, 0, 5);
        }
        CHECK(unsent < 400000); /* max_write_buffer_size and a little */
    }
    dial_free(ssl);
    t_wait_records(1);
}

TEST_SOFT(test_key_update_flood)
{
    t_case c = {echo_bytes, t_record_reason, update_client, NULL, {0}};
    c.options.max_write_buffer_size = 300000;
    run_tls(&c, NULL);
}
LONG(test_key_update_flood);

/* It reads a greeting, and then only waits for what others have to say. */
static int echo_and_wait(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *greeted = (bool *)tsrv_data(stream);
    tsrv_slice word;
    int rc = TSRV_OK, room = 4096; /* of the kernel, which would keep megabytes of answers */
    (void)address, (void)context;
    if (!*greeted && (rc = tsrv_read_bytes(stream, 5, &word)) == TSRV_OK) {
        CHECK(setsockopt(tsrv_fd(stream), SOL_SOCKET, SO_SNDBUF, &room, sizeof room) == 0);
        *greeted = true;
        rc = tsrv_write(stream, word.data, word.size);
    }
    while (rc == TSRV_OK && tsrvi_stream_ended(stream) == 0) {
        rc = tsrv_wait(stream, TSRV_NEVER);
    }
    return rc;
}

TEST_SOFT(test_key_update_flood_that_nobody_reads)
{
    t_case c = {echo_and_wait, t_record_reason, update_client, NULL, {0}};
    c.options.max_write_buffer_size = 300000;
    c.options.data_size = sizeof(bool);
    run_tls(&c, NULL);
}

/* ---- scripts: the client is of the same thread, and time is virtual --------------------------*/

/* A client of TLS 1.3 that has shaken hands, on fd. */
static SSL *join_secretly(int fd)
{
    SSL *ssl = dial_on(fd, &tls_1_3);
    CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
    for (int64_t limit = t_patience(); SSL_do_handshake(ssl) != 1; CHECK(t_now_ms() < limit)) {
        s_turn();
    }
    s_settle();
    return ssl;
}

static void open_secretly(tsrv_handler handler, tsrv_server_options options)
{
    tsrv_tls_options usual_options = server_options();
    v_stopped = false;
    server_tls = make_tls(&usual_options);
    options.tls = server_tls;
    s_open_with(handler, options);
}

static void close_secretly(SSL *ssl)
{
    dial_free(ssl);
    s_close();
    tsrv_tls_free(server_tls);
}

/* As much as the kernel takes, and so little more that all of it is in records already. */
static int write_a_little_more(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static const char some[TSRVI_DIRECT];
    bool *begun = (bool *)tsrv_data(stream);
    int rc = tsrv_wait_for_handshake(stream), room = 100000;
    (void)address, (void)context;
    if (rc == TSRV_OK && !*begun) {
        *begun = true;
        CHECK(setsockopt(tsrv_fd(stream), SOL_SOCKET, SO_SNDBUF, &room, sizeof room) == 0);
        while (tsrv_unsent_size(stream) == 0) {
            CHECK_INT(tsrv_write(stream, some, sizeof some), TSRV_OK);
        }
        CHECK(stream->out == NULL);
    }
    return rc == TSRV_OK ? tsrv_flush(stream) : rc;
}

/* What a peer takes that reads slowly is seen in the kernel's queue, though all that is unsent is in records. */
TEST_PLAIN_SOFT(test_peer_that_reads_slowly_has_not_stalled)
{
    static char some[1500];
    tsrv_server_options options = {0};
    options.data_size = sizeof(bool);
    options.write_timeout_ms = 1000;
    open_secretly(write_a_little_more, options);
    int fd = s_join_with_room(4096);
    SSL *ssl = join_secretly(fd);
    for (int i = 0; i < 40 && s_closed == 0; i++) {
        s_run_ms(100);
        CHECK(recv(fd, some, sizeof some, MSG_DONTWAIT) > 0 || errno == EAGAIN);
    }
    CHECK_INT(s_closed, 0);
    close_secretly(ssl);
}

/* New keys cost what much input costs: who asks for many leaves time for the others in between. */
TEST_PLAIN_SOFT(test_key_updates_take_turns)
{
    enum { UPDATES = 4000 };
    tsrv_server_options options = {0};
    open_secretly(echo_bytes, options);
    SSL *ssl = join_secretly(s_join());
    for (int i = 0; i < UPDATES; i++) {
        CHECK(SSL_key_update(ssl, SSL_KEY_UPDATE_REQUESTED) == 1 && SSL_do_handshake(ssl) == 1);
    }
    uint64_t begin = s_stats().bytes_out, sent = 0;
    for (int64_t limit = t_patience(); sent < (UPDATES - 1) * 27; CHECK(t_now_ms() < limit)) {
        s_turn();
        uint64_t now = s_stats().bytes_out - begin;
        CHECK_MOST(now - sent, 1300 * 27); /* of those that two receives bring */
        sent = now;
    }
    close_secretly(ssl);
}

/* A read where nothing waits, of which nothing comes but what the session has to answer: that goes out all the same. */
TEST_PLAIN_SOFT(test_key_update_that_is_read_outside)
{
    tsrv_server_options options = {0};
    tsrv_slice slice;
    options.data_size = sizeof(bool);
    open_secretly(echo_and_wait, options);
    SSL *ssl = join_secretly(s_join());
    dial_sends(ssl, "hello");
    s_settle();
    tsrv_stream *stream = tsrv_server_next(s_server, NULL);
    uint64_t sent = s_stats().bytes_out;
    for (int i = 0; i < 2; i++) { /* OpenSSL answers the first one when it has the second */
        CHECK(SSL_key_update(ssl, SSL_KEY_UPDATE_REQUESTED) == 1 && SSL_do_handshake(ssl) == 1);
    }
    CHECK_INT(tsrv_read_some(stream, 0, &slice), TSRV_EAGAIN);
    s_settle();
    CHECK_INT(tsrv_unsent_size(stream), 0);
    CHECK(s_stats().bytes_out > sent);
    close_secretly(ssl);
}

/* ---- 6: client certificates ---------------------------------------------------------------*/

static void verified_client(int port, void *context)
{
    static const char *const files[] = {NULL,       "good.pem",    "expired.pem",
                                        "self.pem", "foreign.pem", "purpose.pem"};
    int verify = *(int *)context;
    uint64_t failed = 0;
    tsrv_set_log(t_no_log, NULL);
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        for (int i = 0; i < 6; i++) {
            dial how = {.version = version, .certificate = files[i]};
            bool right = verify == TSRV_TLS_NONE || i == 1 ||
                         (i == 0 && verify == TSRV_TLS_OPTIONAL);
            int count = t_record_count();
            SSL *ssl = dial_start(port, &how);
            if (right) {
                shake_hands(ssl);
                dial_echo(ssl, "hello");
                dial_finish(ssl);
            } else {
                CHECK(dial_refused(ssl) != 0);
                failed++;
            }
            t_wait_records(count + 1);
            if (t_recorded(count) != (right ? TSRV_EOF : TSRV_ETLS)) {
                T_FAIL("%s with version %x: %d", files[i] == NULL ? "none" : files[i], version,
                       t_recorded(count));
            }
        }
    }
    CHECK_INT(handshakes_failed(), failed);
}

static void verify(int kind)
{
    t_case c = {read_code, t_record_reason, verified_client, &kind, {0}};
    tsrv_tls_options options = server_options();
    options.verify_client = kind;
    options.ca_file = path("ca.pem");
    run_tls(&c, &options);
}

TEST_STREAM(test_client_certificate_none)
{
    verify(TSRV_TLS_NONE);
}

TEST_STREAM(test_client_certificate_optional)
{
    verify(TSRV_TLS_OPTIONAL);
}

TEST_STREAM(test_client_certificate_required)
{
    verify(TSRV_TLS_REQUIRED);
}

/* ---- 7: versions and ciphers --------------------------------------------------------------*/

static void old_client(int port, void *context)
{
    dial how = {.version = TLS1_1_VERSION, .ciphers = "ALL:@SECLEVEL=0"};
    (void)context;
    CHECK_INT(dial_refused(dial_start(port, &how)), SSL_AD_PROTOCOL_VERSION);
    how.version = TLS1_2_VERSION;
    how.ciphers = "ECDHE-ECDSA-AES128-SHA:ECDHE-ECDSA-AES256-SHA384"; /* CBC */
    CHECK_INT(dial_refused(dial_start(port, &how)), SSL_AD_HANDSHAKE_FAILURE);
    how.ciphers = "AES128-GCM-SHA256"; /* not forward-secret */
    CHECK_INT(dial_refused(dial_start(port, &how)), SSL_AD_HANDSHAKE_FAILURE);
    CHECK_INT(handshakes_failed(), 3);
    how.ciphers = "ECDHE-ECDSA-AES256-GCM-SHA384";
    SSL *ssl = dial_open(port, &how);
    CHECK(SSL_get_current_compression(ssl) == NULL);
    dial_echo(ssl, "hello");
    dial_finish(ssl);
}

TEST_STREAM(test_old_clients)
{
    tsrv_set_log(t_no_log, NULL);
    serve_echo(old_client, NULL);
}

static void newest_client(int port, void *context)
{
    (void)context;
    CHECK_INT(dial_refused(dial_start(port, &tls_1_2)), SSL_AD_PROTOCOL_VERSION);
    SSL *ssl = dial_open(port, &tls_1_3);
    dial_echo(ssl, "hello");
    dial_finish(ssl);
}

TEST_STREAM(test_min_version)
{
    tsrv_tls_options options = server_options();
    options.min_version = TSRV_TLS_1_3;
    tsrv_set_log(t_no_log, NULL);
    serve_echo(newest_client, &options);
}

static void chosen_client(int port, void *context)
{
    dial how = {.version = TLS1_2_VERSION,
                .ciphers = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-CHACHA20-POLY1305"};
    (void)context;
    SSL *ssl = dial_open(port, &how);
    CHECK_STR(SSL_get_cipher_name(ssl), "ECDHE-ECDSA-CHACHA20-POLY1305");
    dial_echo(ssl, "hello");
    dial_finish(ssl);
}

/* Our order of ciphers, not the client's. */
TEST_LOOP(test_ciphers)
{
    tsrv_tls_options options = server_options();
    options.ciphers = "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-ECDSA-AES128-GCM-SHA256";
    serve_echo(chosen_client, &options);
}

static void renegotiating_client(int port, void *context)
{
    (void)context;
    SSL *other = dial_open(port, &usual), *ssl = dial_open(port, &tls_1_2);
    dial_echo(ssl, "hello");
    CHECK(SSL_renegotiate(ssl) == 1);
    int rc = SSL_do_handshake(ssl); /* OpenSSL takes a refusal for a failure */
    CHECK(rc != 1);
    ERR_clear_error();
    dial_free(ssl);
    t_wait_records(1);
    dial_echo(other, "still here");
    dial_finish(other);
}

TEST_STREAM(test_renegotiation)
{
    tsrv_set_log(t_no_log, NULL);
    serve_echo(renegotiating_client, NULL);
}

/* ---- 8: STARTTLS --------------------------------------------------------------------------*/

/* A line server. What start_tls said is recorded as 100 minus the code, what a read says at the end
 * as 200 minus it. */
static int serve_mail(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\r\n", 0, &line)) == TSRV_OK) {
        if (strncmp(line.data, "STARTTLS", 8) == 0) {
            CHECK_INT(tsrv_write(stream, "220 go ahead\r\n", 14), TSRV_OK);
            rc = tsrv_start_tls(stream, server_tls, NULL);
            t_record(100 - rc);
            if (rc < 0) {
                return rc;
            }
            CHECK_INT(tsrv_start_tls(stream, server_tls, NULL), TSRV_EINVAL);
            CHECK(stream->in != NULL); /* what the slice is in; it lives until the next read */
            CHECK_MEM(line.data, line.size, "STARTTLS\r\n", 10);
        } else {
            tsrv_printf(stream, "250 %s%.*s", tsrv_tls_version(stream), (int)line.size, line.data);
        }
    }
    if (rc != TSRV_EAGAIN) {
        t_record(200 - rc);
    }
    return rc;
}

static void run_mail(void (*client)(int, void *))
{
    t_case c = {serve_mail, NULL, client, NULL, {0}};
    tsrv_tls_options options = server_options();
    server_tls = make_tls(&options);
    t_run(&c);
    tsrv_tls_free(server_tls);
}

static int mail_dialogue(int port)
{
    int fd = t_connect(port);
    t_sends(fd, "EHLO\r\n");
    char buffer[64];
    CHECK_MEM(buffer, t_recv(fd, buffer, 10), "250 EHLO\r\n", 10);
    return fd;
}

static void mail_client(int port, void *context)
{
    char buffer[64];
    (void)context;
    for (int i = 0; i < 2; i++) {
        int fd = mail_dialogue(port);
        t_sends(fd, "STARTTLS\r\n");
        CHECK_MEM(buffer, t_recv(fd, buffer, 14), "220 go ahead\r\n", 14);
        t_wait_records(2 * i + 1);
        CHECK_INT(t_recorded(2 * i), 100);
        SSL *ssl = dial_on(fd, i == 0 ? &tls_1_2 : &tls_1_3);
        shake_hands(ssl);
        dial_sends(ssl, "EHLO\r\n");
        dial_expect(ssl, i == 0 ? "250 TLSv1.2EHLO\r\n" : "250 TLSv1.3EHLO\r\n");
        dial_finish(ssl);
        t_wait_records(2 * i + 2);
        CHECK_INT(t_recorded(2 * i + 1), 200 - TSRV_EOF);
    }
}

TEST_STREAM(test_start_tls_smtp)
{
    run_mail(mail_client);
}

/* The failure, and where TLS has begun what TSRV_DEBUG says of serve_mail, which begins it again. */
static int lines_of_injection(void)
{
#ifdef TSRV_DEBUG
    return t_hard ? 2 : 1;
#else
    return 1;
#endif
}

/* A command behind STARTTLS, which somebody between may have put there, is not carried out: neither
 * now nor over TLS. */
static void injecting_client(int port, void *context)
{
    char buffer[256];
    (void)context;
    int fd = mail_dialogue(port);
    t_watch_log_of(TSRV_LOG_INFO);
    t_sends(fd, "STARTTLS\r\nMAIL evil\r\n");
    size_t size = 0;
    ssize_t n;
    while ((n = recv(fd, buffer + size, sizeof buffer - 1 - size, 0)) > 0) {
        size += (size_t)n;
    }
    buffer[size] = 0;
    CHECK(strstr(buffer, "evil") == NULL);
    t_close(fd);
    t_wait_records(1);
    if (t_hard) { /* it is still in the socket, and no hello */
        CHECK_INT(t_recorded(0), 100);
        t_wait_records(2);
        CHECK_INT(t_recorded(1), 200 - TSRV_ETLS);
    } else {
        CHECK_INT(t_recorded(0), 100 - TSRV_ETLS);
        CHECK_STR(buffer, "220 go ahead\r\n");
        CHECK(strstr(t_log, "STARTTLS injection") != NULL);
    }
    CHECK_INT(t_logged(), lines_of_injection());
    CHECK(strstr(t_log, "TLS with 127.0.0.1:") == t_log);
}

TEST_STREAM(test_start_tls_with_input)
{
    t_watch_log_of(TSRV_LOG_INFO);
    run_mail(injecting_client);
    CHECK_INT(t_logged(), lines_of_injection());
    CHECK(t_hard || strstr(t_log, "injection") != NULL);
}

/* Then the handler fails for a reason of its own, which no limit of the library's has given it. */
static int refuse_and_complain(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    (void)address, (void)context;
    if (rc != TSRV_OK) {
        return rc;
    }
    CHECK_INT(tsrv_start_tls(stream, server_tls, NULL), TSRV_ETLS);
    return TSRV_ETOOLONG;
}

static void complaining_client(int port, void *context)
{
    (void)context;
    int fd = t_connect(port);
    t_sends(fd, "STARTTLS\nMAIL evil\n");
    t_wait_records(1);
    CHECK_INT(t_recorded(0), TSRV_ETOOLONG);
    t_close(fd);
}

TEST_SOFT(refused_start_tls_is_no_limit)
{
    t_case c = {refuse_and_complain, t_record_reason, complaining_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    server_tls = make_tls(&options);
    t_watch_log_of(TSRV_LOG_ERROR);
    t_run(&c);
    CHECK_INT(t_logged(), 1);
    CHECK(strstr(t_log, "longer than allowed") != NULL && strstr(t_log, "more than") == NULL);
    tsrv_tls_free(server_tls);
}

/* What was written before is sent as it is, however much it is, and files too. */
static int much_then_tls(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    if (((unsigned *)tsrv_data(stream))[0] == 0) {
        tsrv_slice line;
        int rc = tsrv_read_until(stream, "\n", 0, &line);
        if (rc < 0) {
            return rc;
        }
        note_once(stream, ENTERED);
        CHECK_INT(tsrv_write(stream, big_answer, 100000), TSRV_OK);
        CHECK_INT(tsrv_sendfile(stream, file, 100000, 100000), TSRV_OK);
        CHECK_INT(tsrv_write(stream, "!", 1), TSRV_OK);
        CHECK_INT(tsrv_start_tls(stream, server_tls, NULL), TSRV_OK);
        CHECK_INT(tsrv_write(stream, "secret", 6), TSRV_OK);
    }
    return echo_bytes(stream, address, context);
}

static void much_client(int port, void *context)
{
    static unsigned char data[200001];
    (void)context;
    int fd = t_connect_with_room(port, 4096);
    t_sends(fd, "go\n");
    t_wait_records(1);
    CHECK_INT(t_recv(fd, data, sizeof data), sizeof data);
    compare(data, 200000, 0);
    CHECK_INT(data[200000], '!');
    SSL *ssl = dial_on(fd, &usual);
    shake_hands(ssl);
    dial_expect(ssl, "secret");
    dial_echo(ssl, "hello");
    dial_finish(ssl);
}

TEST_STREAM(test_start_tls_behind_output)
{
    t_case c = {much_then_tls, NULL, much_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    fill(big_answer, ANSWER, 0);
    make_big_file();
    server_tls = make_tls(&options);
    c.options.data_size = sizeof(unsigned);
    c.options.write_high_water = 1 << 20;
    t_run(&c);
    tsrv_tls_free(server_tls);
    close(file);
}

/* A file that is shorter than was promised cuts the stream, also when the handshake waits behind it; as a client it
 * begins within the call. */
static const char *short_name;

static int short_then_tls(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    if (!tsrv_tls_native(stream)) {
        tsrv_slice line;
        int rc = tsrv_read_until(stream, "\n", 0, &line);
        if (rc < 0) {
            return rc;
        }
        CHECK_INT(tsrv_sendfile(stream, file, (4 << 20) - 100000, 200000), TSRV_OK);
        CHECK_INT(tsrv_start_tls(stream, server_tls, short_name), TSRV_OK);
    }
    return wait_code(stream, address, context);
}

static void short_then_tls_client(int port, void *context)
{
    static unsigned char data[100001];
    size_t got = 0;
    ssize_t n;
    (void)context;
    int fd = t_connect(port);
    t_sends(fd, "go\n");
    while ((n = recv(fd, data + got, sizeof data - got, 0)) > 0) {
        got += (size_t)n;
    }
    CHECK(n < 0 && errno == ECONNRESET); /* which may have taken some of it away */
    compare(data, got, (4 << 20) - 100000);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), -EIO);
    CHECK_INT(__atomic_load_n(&last_code, __ATOMIC_ACQUIRE), -EIO);
    t_close(fd);
}

static void run_short(const char *server_name)
{
    t_case c = {short_then_tls, t_record_reason, short_then_tls_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    make_big_file();
    short_name = server_name;
    server_tls = make_tls(&options);
    tsrv_set_log(t_no_log, NULL);
    t_run(&c);
    tsrv_tls_free(server_tls);
    close(file);
}

TEST_STREAM(test_start_tls_behind_a_short_file)
{
    run_short(NULL);
}

TEST_STREAM(test_start_tls_of_client_behind_a_short_file)
{
    run_short("localhost");
}

/* When the answer to a hello cannot be sent there will be no handshake, and who waits for it is told why. */
static int fail_to_answer(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    t_fault_name = "send";
    t_fault_errno = EPIPE;
    t_fault_calls = 0;
    t_fault_at = 1;
    return wait_code(stream, address, context);
}

static void unanswered_client(int port, void *context)
{
    unsigned char hello[2048];
    size_t size = record_hello(hello, sizeof hello);
    (void)context;
    int fd = t_connect(port);
    t_send(fd, hello, size);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), -EPIPE);
    CHECK_INT(__atomic_load_n(&last_code, __ATOMIC_ACQUIRE), -EPIPE);
    CHECK_INT(t_fault_hits, 1);
    t_close(fd);
}

TEST_STREAM(test_handshake_whose_answer_cannot_be_sent)
{
    t_case c = {fail_to_answer, t_record_reason, unanswered_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* Answers a line, waits for something else before it starts TLS, and behind that only for its client's end. */
static int start_tls_late(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *step = (int *)tsrv_data(stream), rc = TSRV_OK;
    tsrv_slice line;
    (void)address, (void)context;
    if (*step == 0 && (rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        CHECK_INT(tsrv_write(stream, line.data, line.size), TSRV_OK);
        ++*step;
    }
    if (*step == 1 && rc == TSRV_OK && (rc = tsrv_wait(stream, TSRV_NEVER)) == TSRV_OK) {
        CHECK_INT(tsrv_start_tls(stream, server_tls, NULL), TSRV_OK);
        ++*step;
    }
    if (*step == 2 && rc == TSRV_OK && (rc = tsrv_wait_for_handshake(stream)) == TSRV_OK) {
        ++*step;
    }
    if (*step == 3 && rc == TSRV_OK && (rc = tsrv_wait(stream, TSRV_NEVER)) == TSRV_OK) {
        CHECK_INT(tsrv_read_some(stream, 0, &line), TSRV_EOF);
    }
    return rc;
}

/* Has the stream seen that there is input, which nobody wants? */
static void has_looked(void *context)
{
    tsrv_stream *stream = tsrv_server_next(t_server, NULL);
    *(bool *)context = stream != NULL && tsrvi_is(stream, TSRVI_LOOKED);
}

/* Its hello does not wait to be asked for. */
static void hasty_client(int port, void *context)
{
    const dial *const versions[] = {&tls_1_2, &tls_1_3};
    (void)context;
    for (size_t i = 0; i < COUNT(versions); i++) {
        unsigned char hello[2000];
        char line[9];
        bool looked = false;
        int fd = t_connect(port);
        SSL *ssl = dial_on(fd, versions[i]);
        BIO *socket = SSL_get_wbio(ssl), *memory = BIO_new(BIO_s_mem());
        t_sends(fd, "STARTTLS\n");
        CHECK_MEM(line, t_recv(fd, line, 9), "STARTTLS\n", 9);
        CHECK(BIO_up_ref(socket) == 1);
        SSL_set0_wbio(ssl, memory);
        fcntl(fd, F_SETFL, O_NONBLOCK);
        CHECK_INT(SSL_get_error(ssl, SSL_do_handshake(ssl)), SSL_ERROR_WANT_READ);
        fcntl(fd, F_SETFL, 0);
        int size = BIO_read(memory, hello, (int)sizeof hello);
        SSL_set0_wbio(ssl, socket);
        CHECK(size > 0);
        t_send(fd, hello, (size_t)size);
        while (!looked) { /* the test's time limit ends it */
            t_on_loop(has_looked, &looked);
        }
        t_on_loop(wake_first, NULL);
        shake_hands(ssl);
        dial_finish(ssl);
        t_wait_records((int)i + 1);
        CHECK_INT(t_recorded((int)i), TSRV_OK);
    }
}

TEST_STREAM(test_start_tls_behind_an_early_hello)
{
    t_case c = {start_tls_late, t_record_reason, hasty_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    server_tls = make_tls(&options);
    c.options.data_size = sizeof(int);
    t_run(&c);
    tsrv_tls_free(server_tls);
}

/* Not while somebody reads. */
static void start_tls_now(void *context)
{
    *(int *)context = tsrv_start_tls(tsrv_server_next(t_server, NULL), server_tls, NULL);
}

static void busy_client(int port, void *context)
{
    int rc = TSRV_OK;
    (void)context;
    int fd = mail_dialogue(port);
    t_on_loop(start_tls_now, &rc); /* its handler waits for the next line, or is about to */
    CHECK_INT(rc, TSRV_EBUSY);
    t_sends(fd, "STARTTLS\r\n");
    char buffer[64];
    CHECK_MEM(buffer, t_recv(fd, buffer, 14), "220 go ahead\r\n", 14);
    SSL *ssl = dial_on(fd, &usual);
    shake_hands(ssl);
    dial_sends(ssl, "EHLO\r\n");
    dial_expect(ssl, "250 TLSv1.3EHLO\r\n");
    dial_finish(ssl);
}

TEST_STREAM(test_start_tls_while_read_waits)
{
    run_mail(busy_client);
}

/* Reads into its own memory, where so many bytes are there, and gives that up for TLS when it is woken. */
static int give_up_for_tls(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char some[8];
    const int *came = (const int *)context;
    int *calls = (int *)tsrv_data(stream), rc;
    (void)address;
    if (++*calls == 1) {
        while (*came > 0 && recv(tsrv_fd(stream), some, sizeof some, MSG_PEEK | MSG_DONTWAIT) < *came) {
            poll(NULL, 0, 1);
        }
        CHECK_INT(tsrv_read_into(stream, some, sizeof some), TSRV_EAGAIN);
        t_record(0);
        return tsrv_wait(stream, TSRV_NEVER);
    }
    if (tsrv_tls_native(stream) == NULL) {
        rc = tsrv_start_tls(stream, server_tls, NULL);
        t_record(100 - rc);
        if (rc < 0) {
            return rc;
        }
    }
    rc = tsrv_read_into(stream, some, sizeof some);
    return rc == TSRV_OK ? tsrv_write(stream, some, sizeof some) : rc;
}

static void woken_for_tls_client(int port, void *context)
{
    int came = *(int *)context, fd = t_connect(port);
    t_watch_log_of(TSRV_LOG_INFO);
    t_send(fd, "evil", (size_t)came);
    t_wait_records(1);
    t_on_loop(wake_first, NULL);
    t_wait_records(2);
    if (came != 0) {
        CHECK_INT(t_recorded(1), 100 - TSRV_ETLS);
        t_drain_and_close(fd);
    } else {
        CHECK_INT(t_recorded(1), 100);
        SSL *ssl = dial_on(fd, &usual);
        shake_hands(ssl);
        dial_echo(ssl, "8 bytes\n");
        dial_expect_end(ssl);
        dial_free(ssl);
    }
}

static void start_tls_within_a_read(int came)
{
    t_case c = {give_up_for_tls, NULL, woken_for_tls_client, &came, {0}};
    tsrv_tls_options options = server_options();
    server_tls = make_tls(&options);
    c.options.data_size = sizeof(int);
    t_run(&c);
    CHECK_INT(t_logged(), came != 0);
    CHECK(came == 0 || strstr(t_log, "STARTTLS injection") != NULL);
    tsrv_tls_free(server_tls);
}

/* What has come for the read came before TLS, and would count as if it had come over it. */
T_TEST(test_start_tls_behind_a_part_of_a_read, T_PER_BACKEND | T_CALLBACKS)
{
    start_tls_within_a_read(4);
}

/* If nothing has come, there is nothing against it. */
T_TEST(test_start_tls_behind_a_read_in_vain, T_PER_BACKEND | T_CALLBACKS)
{
    start_tls_within_a_read(0);
}

/* Bad arguments, and a stream that is over. */
static int start_badly(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    char longer[257] = "";
    tsrv_tls *empty = make_tls(NULL);
    (void)address, (void)context;
    CHECK_INT(tsrv_start_tls(stream, NULL, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_start_tls(stream, empty, NULL), TSRV_EINVAL); /* has no certificate */
    memset(longer, 'a', sizeof longer - 1); /* than names can be */
    CHECK_INT(tsrv_start_tls(stream, empty, longer), TSRV_EINVAL);
    tsrv_tls_free(empty);
    tsrv_close(stream);
    CHECK_INT(tsrv_start_tls(stream, server_tls, NULL), TSRV_ECLOSED);
    return TSRV_OK;
}

TEST_STREAM(test_start_tls_errors)
{
    t_case c = {start_badly, NULL, expect_end, NULL, {0}};
    tsrv_tls_options options = server_options();
    tsrv_set_log(t_no_log, NULL);
    server_tls = make_tls(&options);
    t_run(&c);
    tsrv_tls_free(server_tls);
}

/* ---- 9: clients of this library -----------------------------------------------------------*/

/* A connection attempt in a coroutine of the server's loop; its code is recorded. */
typedef struct attempt {
    const char *host;
    int port;
    tsrv_connect_options options;
    bool echo; /* when it succeeds, talk to an echo server */
    char version[16], alpn[16];
} attempt;

static void talk_to_echo(tsrv_stream *stream)
{
    tsrv_slice all;
    CHECK_INT(tsrv_write(stream, "hello", 5), TSRV_OK);
    CHECK_INT(tsrv_read_bytes(stream, 5, &all), TSRV_OK);
    CHECK_MEM(all.data, all.size, "hello", 5);
    CHECK_INT(tsrv_shutdown(stream), TSRV_OK);
    CHECK_INT(tsrv_read_until_close(stream, 0, &all), TSRV_OK);
    CHECK_INT(all.size, 0);
}

static void connect_now(void *context)
{
    attempt *a = (attempt *)context;
    tsrv_stream *stream = (tsrv_stream *)context;
    tsrv_slice der;
    int rc = tsrv_connect(a->host, a->port, &a->options, &stream);
    CHECK((rc == TSRV_OK) == (stream != NULL));
    if (rc == TSRV_OK) {
        CHECK_INT(tsrv_wait_for_handshake(stream), TSRV_OK);
        CHECK_INT(tsrv_start_tls(stream, a->options.tls, "x"), TSRV_EINVAL);
        CHECK_INT(tsrv_tls_peer_certificate(stream, &der), TSRV_OK);
        CHECK(der.size > 100);
        snprintf(a->version, sizeof a->version, "%s", tsrv_tls_version(stream));
        snprintf(a->alpn, sizeof a->alpn, "%s", tsrv_tls_alpn(stream));
        talk_to_echo(stream);
        tsrv_close(stream);
    }
    t_record(rc);
}

static void spawn_connect(void *context)
{
    CHECK_INT(tsrv_spawn(t_loop, connect_now, context), TSRV_OK);
}

static int try_connect(attempt *a)
{
    int count = t_record_count();
    t_on_loop(spawn_connect, a);
    t_wait_records(count + 1);
    return t_recorded(count);
}

static tsrv_tls *client_tls(const char *ca, const char *alpn)
{
    tsrv_tls_options options;
    memset(&options, 0, sizeof options);
    options.ca_file = ca == NULL ? NULL : path(ca);
    options.alpn = alpn;
    return make_tls(&options);
}

static void connecting_client(int port, void *context)
{
    tsrv_tls *ours = client_tls("ca.pem", "x,h2"), *others = client_tls("foreign_ca.pem", NULL),
             *systems = client_tls(NULL, NULL);
    (void)context;
    attempt a = {"localhost", port, {0, ours, NULL, NULL}, true, "", ""};
    CHECK_INT(try_connect(&a), TSRV_OK);
    CHECK_STR(a.version, "TLSv1.3");
    CHECK_STR(a.alpn, "h2");
    a.host = "127.0.0.1"; /* a number has to be in the certificate too */
    CHECK_INT(try_connect(&a), TSRV_OK);
    a.options.server_name = "localhost";
    CHECK_INT(try_connect(&a), TSRV_OK);
    a.options.server_name = "LOCALHOST";
    CHECK_INT(try_connect(&a), TSRV_OK);
    t_watch_log_of(TSRV_LOG_INFO);
    static const char *const wrong[] = {"wrong.test", "127.0.0.2", "::1", "local", "xlocalhost",
                                        "*.host", "localhost.x"};
    for (size_t i = 0; i < COUNT(wrong); i++) {
        a.options.server_name = wrong[i];
        CHECK_INT(try_connect(&a), TSRV_ETLS);
        CHECK(t_logged() > (int)i);
    }
    a.options.server_name = NULL;
    a.options.tls = others;
    CHECK_INT(try_connect(&a), TSRV_ETLS);
    a.options.tls = systems;
    CHECK_INT(try_connect(&a), TSRV_ETLS);
    a.options.tls = ours;
    CHECK_INT(try_connect(&a), TSRV_OK); /* as before */
    tsrv_tls_free(ours);
    tsrv_tls_free(others);
    tsrv_tls_free(systems);
}

/* Source: CheckHostname test_match, test_no_match. */
TEST_STREAM(test_check_hostname)
{
    t_case c = {echo_bytes, NULL, connecting_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    options.alpn = "h2,x";
    run_tls(&c, &options);
}

/* Hosts as tsrv_connect and people write them: with brackets, a zone, a dot at the end. The server is told the bare
 * name, and no number (RFC 6066, 3). */
static char told_name[256];

static int echo_and_note_name(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc = tsrv_wait_for_handshake(stream);
    snprintf(told_name, sizeof told_name, "%s", tsrv_tls_server_name(stream));
    return rc == TSRV_OK ? echo_bytes(stream, address, context) : rc;
}

static void dressed_names_client(int port, void *context)
{
    static const char *const good[] = {"[::1]", "::1", "[fe80::1%lo]", "fe80::1%eth0", "localhost."},
                            *const wrong[] = {"[::2]", "[localhost]x", "localhost..", "[127.0.0.1]", "::1]",
                                              "localhost%lo"};
    char longest[258];
    tsrv_tls *ours = client_tls("ca.pem", NULL);
    (void)context;
    attempt a = {"127.0.0.1", port, {0, ours, NULL, NULL}, true, "", ""};
    tsrv_set_log(t_no_log, NULL);
    for (size_t i = 0; i < COUNT(good); i++) {
        a.options.server_name = good[i];
        CHECK_INT(try_connect(&a), TSRV_OK);
        CHECK_STR(told_name, i < COUNT(good) - 1 ? "" : "localhost");
    }
    for (size_t i = 0; i < COUNT(wrong); i++) {
        a.options.server_name = wrong[i];
        CHECK_INT(try_connect(&a), TSRV_ETLS);
    }
    memset(longest, 'a', sizeof longest);
    a.options.server_name = longest;
    longest[256] = 0; /* longer than names can be */
    CHECK_INT(try_connect(&a), TSRV_EINVAL);
    longest[255] = 0;
    CHECK_INT(try_connect(&a), TSRV_ETLS);
    tsrv_tls_free(ours);
}

TEST_STREAM(test_connect_dressed_names)
{
    t_case c = {echo_and_note_name, NULL, dressed_names_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    options.cert_file = path("six.pem");
    run_tls(&c, &options);
}

/* ---- half of a message that follows the handshake -------------------------------------------*/

typedef struct halved {
    int port, fd;
    SSL *ssl;        /* the server */
    tsrv_tls *tls;   /* the client's */
    bool only_ends;   /* the client has nothing to write, and ends its output */
    int writes, code; /* it is about to; 1 + how it went */
} halved;

static int fill_ticket(SSL *ssl, void *context)
{
    static const char much[2000];
    (void)context;
    return SSL_SESSION_set1_ticket_appdata(SSL_get_session(ssl), much, sizeof much);
}

static SSL_TICKET_RETURN take_no_ticket(SSL *ssl, SSL_SESSION *session, const unsigned char *name, size_t size,
                                        SSL_TICKET_STATUS status, void *context)
{
    (void)ssl, (void)session, (void)name, (void)size, (void)status, (void)context;
    return SSL_TICKET_RETURN_IGNORE;
}

static void write_behind_half_a_ticket(void *context)
{
    halved *h = (halved *)context;
    tsrv_connect_options options = {0};
    tsrv_stream *stream;
    tsrv_slice slice;
    options.tls = h->tls;
    options.server_name = "localhost";
    CHECK_INT(tsrv_connect("127.0.0.1", h->port, &options, &stream), TSRV_OK);
    tsrv_set_timeout(stream, 50, 0);
    CHECK_INT(tsrv_read_some(stream, 0, &slice), TSRV_ETIMEOUT);
    h->writes = 1;
    int rc = h->only_ends ? tsrv_shutdown(stream) : tsrv_write(stream, "bye\n", 4);
    if (h->only_ends) {
        tsrv_set_timeout(stream, TSRV_NEVER, 0);
        CHECK_INT(tsrv_read_some(stream, 0, &slice), TSRV_ETLS); /* the server goes without a word */
    }
    h->code = 1 + (rc < 0 ? rc : tsrv_flush(stream));
    tsrv_close(stream);
}

/* Gives the server what has come, and the client at most so much of what the server says. Returns what is kept back. */
static size_t halved_pump(halved *h, char *kept, size_t most)
{
    static char bytes[65536];
    ssize_t got = recv(h->fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (got > 0) {
        CHECK_INT(BIO_write(SSL_get_rbio(h->ssl), bytes, (int)got), got);
    }
    int shaken = SSL_do_handshake(h->ssl);
    CHECK(shaken == 1 || SSL_get_error(h->ssl, shaken) == SSL_ERROR_WANT_READ);
    int made = BIO_read(SSL_get_wbio(h->ssl), bytes, sizeof bytes);
    size_t size = made > 0 ? (size_t)made : 0, sent = shaken == 1 && size > most ? most : size;
    CHECK_INT(send(h->fd, bytes, sent, T_NOSIGNAL), (ssize_t)sent);
    memcpy(kept, bytes + sent, size - sent);
    return size - sent;
}

/* A ticket comes in several records, of which the client has the first when it writes: it waits for the others. So
 * does the end of its output, or the server would take it for a cut. */
static void check_half_a_ticket(bool only_ends)
{
    static char kept[65536], said[16];
    static halved h;
    tsrv_loop *loop = t_new_loop();
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());
    CHECK(SSL_CTX_use_certificate_chain_file(context, path("server.pem")) == 1 &&
          SSL_CTX_use_PrivateKey_file(context, path("server.pem"), SSL_FILETYPE_PEM) == 1);
    SSL_CTX_set_max_send_fragment(context, 512);
    SSL_CTX_set_num_tickets(context, 1);
    SSL_CTX_set_session_ticket_cb(context, fill_ticket, take_no_ticket, NULL);
    memset(&h, 0, sizeof h);
    h.only_ends = only_ends;
    int listener = t_raw_socket(SOCK_STREAM, true, &h.port);
    h.tls = client_tls("ca.pem", NULL);
    h.ssl = SSL_new(context);
    SSL_set_bio(h.ssl, BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem()));
    SSL_set_accept_state(h.ssl);
    CHECK_INT(tsrv_spawn(loop, write_behind_half_a_ticket, &h), TSRV_OK);
    tsrv_loop_run_once(loop, 0);
    h.fd = accept(listener, NULL, NULL);
    CHECK(h.fd >= 0);
    size_t rest = 0;
    for (int64_t limit = t_patience(); rest == 0; CHECK(t_now_ms() < limit)) {
        tsrv_loop_run_once(loop, 1);
        rest = halved_pump(&h, kept, 700);
    }
    t_turn_until(loop, &h.writes, 1);
    for (int i = 0; i < 5; i++) {
        tsrv_loop_run_once(loop, 1);
    }
    CHECK_INT(h.code, 0);
    CHECK_INT(send(h.fd, kept, rest, T_NOSIGNAL), (ssize_t)rest);
    for (int64_t limit = t_patience(); only_ends && SSL_get_shutdown(h.ssl) == 0; CHECK(t_now_ms() < limit)) {
        tsrv_loop_run_once(loop, 1);
        halved_pump(&h, kept, SIZE_MAX);
        CHECK(SSL_read(h.ssl, said, sizeof said) <= 0);
    }
    if (!only_ends) {
        t_turn_until(loop, &h.code, 1);
        halved_pump(&h, kept, SIZE_MAX);
        CHECK_INT(SSL_read(h.ssl, said, sizeof said), 4);
        CHECK(memcmp(said, "bye\n", 4) == 0);
    }
    close(listener);
    close(h.fd);
    while (tsrv_loop_run_once(loop, 10) > 0) {
    }
    SSL_free(h.ssl);
    SSL_CTX_free(context);
    tsrv_tls_free(h.tls);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

TEST_ONCE(test_write_behind_half_a_ticket)
{
    check_half_a_ticket(false);
}

TEST_ONCE(test_end_behind_half_a_ticket)
{
    check_half_a_ticket(true);
}

static char passing_name[] = "localhost";

static void overwrite_name(void *context)
{
    (void)context;
    memset(passing_name, 'x', sizeof passing_name - 1);
}

/* The connect runs until it waits, and then the other one. */
static void spawn_connect_and_overwrite(void *context)
{
    spawn_connect(context);
    CHECK_INT(tsrv_spawn(t_loop, overwrite_name, NULL), TSRV_OK);
}

static void hasty_connect_client(int port, void *context)
{
    tsrv_tls *ours = client_tls("ca.pem", NULL);
    (void)context;
    attempt a = {"127.0.0.1", port, {0, ours, passing_name, NULL}, true, "", ""};
    t_on_loop(spawn_connect_and_overwrite, &a);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), TSRV_OK);
    CHECK_STR(told_name, "localhost");
    CHECK_STR(passing_name, "xxxxxxxxx");
    tsrv_tls_free(ours);
}

/* The name that was asked for is kept, whatever the memory is used for while the call waits. */
TEST_STREAM(test_connect_copies_the_name)
{
    t_case c = {echo_and_note_name, NULL, hasty_connect_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* A wildcard certificate, a certificate for a client, one that is over. */
static void other_names_client(int port, void *context)
{
    tsrv_tls *ours = client_tls("ca.pem", NULL);
    (void)context;
    attempt a = {"127.0.0.1", port, {0, ours, "a.wild.test", NULL}, true, "", ""};
    tsrv_set_log(t_no_log, NULL);
    CHECK_INT(try_connect(&a), TSRV_OK);
    a.options.server_name = "a.b.wild.test";
    CHECK_INT(try_connect(&a), TSRV_ETLS);
    a.options.server_name = "wild.test";
    CHECK_INT(try_connect(&a), TSRV_ETLS);
    a.options.server_name = "foo.part.test"; /* a label is one, or "*": RFC 9525, 6.3 */
    CHECK_INT(try_connect(&a), TSRV_ETLS);
    a.options.server_name = ".wild.test"; /* which X509_check_host takes for every host below */
    CHECK_INT(try_connect(&a), TSRV_EINVAL);
    a.options.server_name = "127.0.0.1"; /* which an empty name would match too */
    CHECK_INT(try_connect(&a), TSRV_ETLS);
    a.options.server_name = "";
    CHECK(try_connect(&a) < 0);
    tsrv_tls_free(ours);
}

TEST_STREAM(test_connect_wildcard)
{
    t_case c = {echo_bytes, NULL, other_names_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    options.cert_file = path("wild.pem");
    run_tls(&c, &options);
}

/* A certificate without alternative names goes by its common name. */
static void common_name_client(int port, void *context)
{
    tsrv_tls *ours = client_tls("ca.pem", NULL);
    (void)context;
    attempt a = {"127.0.0.1", port, {0, ours, "purpose", NULL}, true, "", ""};
    CHECK_INT(try_connect(&a), TSRV_OK);
    tsrv_set_log(t_no_log, NULL);
    a.options.server_name = "purposes";
    CHECK_INT(try_connect(&a), TSRV_ETLS);
    tsrv_tls_free(ours);
}

TEST_STREAM(test_connect_common_name)
{
    t_case c = {echo_bytes, NULL, common_name_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    options.cert_file = path("purpose.pem");
    run_tls(&c, &options);
}

static const char *refusal; /* what one of the two ends must log */
static int refusals;        /* atomic; lines that do */

static void see_refusal(int level, const char *message, void *context)
{
    (void)level, (void)context;
    __atomic_add_fetch(&refusals, strstr(message, refusal) != NULL, __ATOMIC_RELAXED);
}

static void refusing_client(int port, void *context)
{
    tsrv_tls *ours = client_tls("ca.pem", NULL);
    (void)context;
    attempt a = {"127.0.0.1", port, {0, ours, NULL, NULL}, true, "", ""};
    refusal = (const char *)context;
    tsrv_set_log(see_refusal, NULL);
    CHECK_INT(try_connect(&a), TSRV_ETLS);
    CHECK_INT(__atomic_load_n(&refusals, __ATOMIC_RELAXED), 1);
    tsrv_tls_free(ours);
}

TEST_STREAM(test_connect_expired)
{
    t_case c = {echo_bytes, NULL, refusing_client, (void *)"verify failed: certificate has expired", {0}};
    tsrv_tls_options options = server_options();
    options.cert_file = path("late.pem");
    run_tls(&c, &options);
}

TEST_STREAM(test_connect_wrong_purpose)
{
    t_case c = {echo_bytes, NULL, refusing_client, (void *)" certificate purpose", {0}};
    tsrv_tls_options options = server_options();
    options.cert_file = path("good.pem");
    run_tls(&c, &options);
}

/* A plain server, which sends the hello back. */
TEST_STREAM(test_connect_to_plain_server)
{
    t_case c = {echo_bytes, NULL, refusing_client, (void *)"TLS with ", {0}};
    t_run(&c);
}

/* And one that says nothing. */
static void silent_server_client(int port, void *context)
{
    tsrv_tls *ours = client_tls("ca.pem", NULL);
    int silent_port, listener = t_raw_socket(SOCK_STREAM, true, &silent_port);
    (void)port, (void)context;
    attempt a = {"127.0.0.1", silent_port, {200, ours, NULL, NULL}, true, "", ""};
    int64_t begin = t_now_ms();
    CHECK_INT(try_connect(&a), TSRV_ETIMEOUT);
    CHECK_NEAR_MS(t_now_ms() - begin, 190, 1500);
    int fd = accept(listener, NULL, NULL);
    CHECK(fd >= 0);
    t_prepare(fd);
    t_expect_reset(fd); /* the socket is not left behind: Tornado #3614 */
    close(fd);
    close(listener);
    tsrv_tls_free(ours);
}

TEST_STREAM(test_connect_to_silent_server)
{
    t_case c = {echo_bytes, NULL, silent_server_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* A client certificate of ours, wanted by a server of ours. */
static void mutual_client(int port, void *context)
{
    tsrv_tls_options options;
    tsrv_tls *without = client_tls("ca.pem", NULL);
    (void)context;
    memset(&options, 0, sizeof options);
    options.ca_file = path("ca.pem");
    options.cert_file = path("good.pem");
    tsrv_tls *with = make_tls(&options);
    attempt a = {"localhost", port, {0, with, NULL, NULL}, true, "", ""};
    CHECK_INT(try_connect(&a), TSRV_OK);
    tsrv_tls_free(with);
    tsrv_tls_free(without);
}

TEST_STREAM(test_connect_mutual)
{
    t_case c = {echo_bytes, NULL, mutual_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    options.ca_file = path("ca.pem");
    options.verify_client = TSRV_TLS_REQUIRED;
    run_tls(&c, &options);
}

/* STARTTLS from the client's side. */
static void ask_for_tls(void *context)
{
    attempt *a = (attempt *)context;
    tsrv_stream *stream;
    tsrv_slice line;
    CHECK_INT(tsrv_connect(a->host, a->port, NULL, &stream), TSRV_OK);
    CHECK_INT(tsrv_write(stream, "EHLO\r\nSTARTTLS\r\n", 16), TSRV_OK);
    CHECK_INT(tsrv_read_until(stream, "\r\n", 0, &line), TSRV_OK);
    CHECK_INT(tsrv_read_until(stream, "\r\n", 0, &line), TSRV_OK);
    CHECK_MEM(line.data, line.size, "220 go ahead\r\n", 14);
    CHECK_INT(tsrv_start_tls(stream, a->options.tls, a->options.server_name), TSRV_OK);
    int rc = tsrv_wait_for_handshake(stream);
    if (rc == TSRV_OK) {
        CHECK_INT(tsrv_write(stream, "EHLO\r\n", 6), TSRV_OK);
        CHECK_INT(tsrv_read_until(stream, "\r\n", 0, &line), TSRV_OK);
        CHECK_MEM(line.data, line.size, "250 TLSv1.3EHLO\r\n", 17);
    } else {
        CHECK_INT(tsrv_read_until(stream, "\r\n", 0, &line), rc);
        CHECK_INT(tsrv_write(stream, "EHLO\r\n", 6), rc);
    }
    tsrv_close(stream);
    t_record(300 - rc);
}

static void spawn_ask(void *context)
{
    CHECK_INT(tsrv_spawn(t_loop, ask_for_tls, context), TSRV_OK);
}

static void asking_client(int port, void *context)
{
    tsrv_tls *ours = client_tls("ca.pem", NULL);
    (void)context;
    attempt a = {"127.0.0.1", port, {0, ours, "localhost", NULL}, true, "", ""};
    t_on_loop(spawn_ask, &a);
    t_wait_records(3); /* start_tls, and both ends, in any order */
    CHECK_INT(t_recorded(0), 100);
    CHECK(t_recorded(1) == 300 || t_recorded(2) == 300);
    a.options.server_name = "wrong.test";
    t_on_loop(spawn_ask, &a);
    t_wait_records(6);
    CHECK_INT(t_recorded(3), 100);
    CHECK(t_recorded(4) == 300 - TSRV_ETLS || t_recorded(5) == 300 - TSRV_ETLS);
    tsrv_tls_free(ours);
}

TEST_COROUTINE(test_start_tls_of_client)
{
    tsrv_set_log(t_no_log, NULL);
    run_mail(asking_client);
}

/* ---- 9b: small stacks ----------------------------------------------------------------------*/

static tsrv_tls *asking_tls;

/* What waits in a flush seals records on the handler's stack. */
static int echo_and_flush(tsrv_stream *stream)
{
    tsrv_slice line;
    int rc;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        CHECK_INT(tsrv_write(stream, line.data, line.size), TSRV_OK);
        CHECK_INT(tsrv_flush(stream), TSRV_OK);
    }
    return rc;
}

/* The first connection's handler looks up a name, and asks the server itself over TLS. */
static int relay_line(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static bool connected;
    tsrv_connect_options options = {0};
    tsrv_stream *other;
    tsrv_address own;
    tsrv_slice line;
    (void)address, (void)context;
    if (!connected) {
        connected = true;
        options.tls = asking_tls;
        CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_OK);
        CHECK_INT(tsrv_server_address(t_server, 0, &own), TSRV_OK);
        CHECK_INT(tsrv_connect("localhost", tsrv_address_port(&own), &options, &other), TSRV_OK);
        CHECK_INT(tsrv_write(other, line.data, line.size), TSRV_OK);
        CHECK_INT(tsrv_flush(other), TSRV_OK);
        CHECK_INT(tsrv_read_until(other, "\n", 0, &line), TSRV_OK);
        CHECK_INT(tsrv_write(stream, line.data, line.size), TSRV_OK);
        tsrv_close(other);
    }
    return echo_and_flush(stream);
}

static int start_then_echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_OK);
    CHECK_INT(tsrv_write(stream, "go\n", 3), TSRV_OK);
    CHECK_INT(tsrv_start_tls(stream, server_tls, NULL), TSRV_OK);
    return echo_and_flush(stream);
}

static void small_client(int port, void *context)
{
    (void)context;
    SSL *ssl = dial_open(port, &usual);
    dial_echo(ssl, "relayed\n");
    dial_echo(ssl, "echoed\n");
    dial_finish(ssl);
}

static void small_start_client(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_sends(fd, "STARTTLS\n");
    t_expect(fd, "go\n");
    SSL *ssl = dial_on(fd, &usual);
    shake_hands(ssl);
    dial_echo(ssl, "echoed\n");
    dial_finish(ssl);
}

/* However small stack_size is, TLS has the stack that it needs. */
TEST_COROUTINE(test_small_stack)
{
    t_case c = {relay_line, NULL, small_client, NULL, {0}};
    c.options.stack_size = 1;
    asking_tls = client_tls("ca.pem", NULL);
    run_tls(&c, NULL);
    tsrv_tls_free(asking_tls);
}

TEST_COROUTINE(test_small_stack_start_tls)
{
    t_case c = {start_then_echo, NULL, small_start_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    c.options.stack_size = 1;
    server_tls = make_tls(&options);
    t_run(&c);
    tsrv_tls_free(server_tls);
}

/* ---- 10: reload, and sessions that are resumed --------------------------------------------*/

static void reload_client(int port, void *context)
{
    char name[64];
    (void)context;
    SSL *old = dial_open(port, &usual), *begun = dial_start(port, &usual);
    dial_echo(old, "before");
    t_wait_records(2);
    t_watch_log_of(TSRV_LOG_INFO);
    static const char *const bad[] = {"garbage.pem", "server_cert.pem", "server_key.pem"};
    for (int i = 0; i < 3; i++) {
        copy_file(bad[i], "reload.pem");
        CHECK_INT(reload(), TSRV_ETLS);
        CHECK_INT(t_logged(), i + 1);
        SSL *ssl = dial_open(port, &usual);
        CHECK_STR(peer_name(ssl, name, sizeof name), "server");
        dial_echo(ssl, "still");
        dial_finish(ssl);
    }
    copy_file("server2.pem", "reload.pem");
    CHECK_INT(reload(), TSRV_OK);
    SSL *new = dial_open(port, &usual);
    CHECK_STR(peer_name(new, name, sizeof name), "server2");
    dial_echo(new, "after");
    dial_echo(old, "the old one goes on");
    shake_hands(begun); /* accepted before the reload */
    CHECK_STR(peer_name(begun, name, sizeof name), "server");
    dial_echo(begun, "hello");
    dial_finish(begun);
    dial_finish(old);
    dial_finish(new);
}

static int note_and_echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    note_once(stream, ENTERED);
    return echo_bytes(stream, address, context);
}

TEST_STREAM(test_reload)
{
    t_case c = {note_and_echo, NULL, reload_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    copy_file("server.pem", "reload.pem");
    options.cert_file = path("reload.pem");
    c.options.data_size = sizeof(unsigned);
    run_tls(&c, &options);
}

/* A process whose files are read anew on SIGHUP; its port comes out of a pipe. */
static int port_pipe[2];

static void tell_port(tsrv_server *server, void *context)
{
    int port = t_port(server, 0);
    (void)context;
    CHECK(write(port_pipe[1], &port, sizeof port) == (ssize_t)sizeof port);
}

static pid_t launch_serve(int num_processes, int *port)
{
    CHECK(pipe(port_pipe) == 0);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        tsrv_tls_options tls_options = server_options();
        tsrv_server_options options;
        memset(&options, 0, sizeof options);
        tls_options.cert_file = path("reload.pem");
        options.tls = make_tls(&tls_options);
        options.mode = t_mode;
        options.handle_stream = echo_bytes;
        options.on_start = tell_port;
        _exit(tsrv_serve(0, "127.0.0.1", num_processes, &options) == TSRV_OK ? 0 : 1);
    }
    for (int i = 0; i < num_processes; i++) {
        CHECK(read(port_pipe[0], port, sizeof *port) == (ssize_t)sizeof *port);
    }
    return pid;
}

static bool is_served_as(int port, const char *expected)
{
    char name[64];
    SSL *ssl = dial_open(port, &usual);
    bool same = strcmp(peer_name(ssl, name, sizeof name), expected) == 0;
    dial_echo(ssl, "hello");
    dial_finish(ssl);
    return same;
}

/* What cannot be read changes nothing and ends nobody. */
static void hang_up(int num_processes)
{
    int port = 0, status = 0;
    int64_t end = t_patience();
    copy_file("server.pem", "reload.pem");
    tsrv_set_log(t_no_log, NULL);
    pid_t pid = launch_serve(num_processes, &port);
    CHECK(is_served_as(port, "server"));
    copy_file("garbage.pem", "reload.pem");
    for (int i = 0; i < 5; i++) {
        CHECK(kill(pid, SIGHUP) == 0);
        CHECK(is_served_as(port, "server"));
    }
    copy_file("server2.pem", "reload.pem");
    CHECK(kill(pid, SIGHUP) == 0);
    while (!is_served_as(port, "server2")) {
        CHECK(t_now_ms() < end);
    }
    CHECK(kill(pid, SIGTERM) == 0);
    CHECK_INT(waitpid(pid, &status, 0), pid);
    CHECK_INT(status, 0);
    t_close_all(port_pipe, 2);
}

TEST_ONCE(test_hangup_reads_the_files_anew_in_one_process)
{
    hang_up(1);
}

TEST_ONCE(test_hangup_reads_the_files_anew_for_workers)
{
    hang_up(2);
}

/* What a process says of its files goes into the pipe. */
static void hear_of_files(int level, const char *message, void *context)
{
    int all = level == TSRV_LOG_INFO && strcmp(message, "SIGHUP: certificates and keys have been read anew") == 0;
    (void)context;
    if (strncmp(message, "SIGHUP: ", 8) == 0) {
        int some = level == TSRV_LOG_WARNING &&
                   strcmp(message, "SIGHUP: some certificates and keys stay as they are") == 0;
        dprintf(port_pipe[1], all ? "all " : some ? "some " : "?");
    }
}

/* Two servers, of which one's file has gone bad: the other's is read all the same, and both are said. */
TEST_ONCE(test_hangup_reads_what_it_can)
{
    int port = 0, status = 0;
    char heard[9];
    copy_file("server.pem", "bad.pem");
    tsrv_tls_options options = server_options();
    options.cert_file = path("bad.pem");
    tsrv_server *other = NULL;
    tsrv_server_options other_options = {0};
    other_options.tls = make_tls(&options);
    other_options.handle_stream = echo_bytes;
    CHECK_INT(tsrv_server_new(&other, &other_options), TSRV_OK);
    copy_file("garbage.pem", "bad.pem");
    copy_file("server.pem", "reload.pem");
    tsrv_set_log(hear_of_files, NULL);
    pid_t pid = launch_serve(1, &port);
    CHECK(is_served_as(port, "server"));
    copy_file("server2.pem", "reload.pem");
    CHECK(kill(pid, SIGHUP) == 0);
    CHECK_INT(read(port_pipe[0], heard, 4), 4);
    CHECK_INT(read(port_pipe[0], heard + 4, 5), 5);
    CHECK_MEM(heard, sizeof heard, "all some ", 9);
    CHECK(is_served_as(port, "server2"));
    CHECK(kill(pid, SIGTERM) == 0);
    CHECK_INT(waitpid(pid, &status, 0), pid);
    CHECK_INT(status, 0);
    t_close_all(port_pipe, 2);
    tsrv_server_free(other);
    tsrv_tls_free(other_options.tls);
}

/* A session: TLS 1.3 sends its tickets behind the handshake, so something has to be read. */
static SSL_SESSION *session_of(int port, const dial *how)
{
    SSL *ssl = dial_open(port, how);
    CHECK_INT(SSL_session_reused(ssl), how->session != NULL);
    dial_echo(ssl, "hello");
    SSL_SESSION *session = SSL_get1_session(ssl);
    CHECK(session != NULL && SSL_SESSION_is_resumable(session));
    dial_finish(ssl);
    return session;
}

static void tickets_client(int port, void *context)
{
    (void)context;
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        for (int i = 0; i < 2; i++) { /* the default, and a name of SNI */
            dial how = {.version = version,
                        .server_name = i == 0 ? NULL : "other.test",
                        .certificate = "good.pem"};
            SSL_SESSION *first = session_of(port, &how);
            how.session = first;
            SSL_SESSION *second = session_of(port, &how);
            CHECK_INT(reload(), TSRV_OK);
            how.session = second;
            SSL_SESSION *third = session_of(port, &how);
            CHECK_INT(reload(), TSRV_OK);
            CHECK_INT(reload(), TSRV_OK);
            how.session = third;
            SSL_SESSION_free(session_of(port, &how));
            SSL_SESSION_free(first);
            SSL_SESSION_free(second);
            SSL_SESSION_free(third);
        }
    }
}

TEST_SOFT(test_reload_keeps_sessions)
{
    tsrv_tls_options options = server_options();
    tsrv_tls_certificate certificate = {"other.test", path("other.pem"), NULL};
    options.certificates = &certificate;
    options.certificate_count = 1;
    options.ca_file = path("ca.pem");
    options.verify_client = TSRV_TLS_REQUIRED; /* who is known by a ticket is known */
    serve_echo(tickets_client, &options);
}

/* Resumed, the client's certificate is still known. */
static void resumed_client(int port, void *context)
{
    (void)context;
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        dial how = {.version = version, .certificate = "good.pem"};
        SSL *ssl = dial_open(port, &how);
        dial_echo(ssl, "hello");
        how.session = SSL_get1_session(ssl);
        dial_finish(ssl);
        look_once(port, &how);
        CHECK_INT(seen.der_code, TSRV_OK);
        CHECK(seen.der_size > 100);
        SSL_SESSION_free(how.session);
    }
}

TEST_SOFT(test_resumed_client_certificate)
{
    t_case c = {look_and_echo, look, resumed_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    options.ca_file = path("ca.pem");
    options.verify_client = TSRV_TLS_REQUIRED;
    run_tls(&c, &options);
}

TEST_SOFT(test_workers_resume_each_others_sessions)
{
    tsrv_tls_options options = server_options();
    tsrv_tls *tls = make_tls(&options);
    int ports[2];
    pid_t pids[2];
    for (int i = 0; i < 2; i++) {
        pids[i] = start_worker(tls, &ports[i]);
    }
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        dial how = {.version = version};
        SSL_SESSION *session = session_of(ports[0], &how);
        for (int i = 1; i < 4; i++) {
            how.session = session;
            SSL_SESSION *next = session_of(ports[i % 2], &how);
            SSL_SESSION_free(session);
            session = next;
        }
        SSL_SESSION_free(session);
    }
    for (int i = 0; i < 2; i++) {
        CHECK(kill(pids[i], SIGKILL) == 0 && waitpid(pids[i], NULL, 0) == pids[i]);
    }
    tsrv_tls_free(tls);
}

/* ---- 11: drain ----------------------------------------------------------------------------*/

/* Keeps the loop alive when the server is drained. */
static tsrv_timer keeper;

static void drain_now(void *context)
{
    CHECK_INT(tsrv_timer_start(t_loop, &keeper, 3600 * 1000, nothing, NULL), TSRV_OK);
    CHECK_INT(tsrv_server_drain(t_server, *(int *)context), TSRV_EAGAIN);
}

static int say_bye(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc = echo_bytes(stream, address, context);
    if (rc == TSRV_EOF && tsrv_stopping(stream)) {
        CHECK_INT(tsrv_write(stream, "BYE", 3), TSRV_OK);
    }
    return rc;
}

/* Send the ClientHello, and read nothing yet. */
static void begin_handshake(SSL *ssl)
{
    int fd = SSL_get_fd(ssl), flags = fcntl(fd, F_GETFL);
    char *hello;
    CHECK(fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0);
    SSL_set0_wbio(ssl, BIO_new(BIO_s_mem()));
    CHECK_INT(SSL_get_error(ssl, SSL_do_handshake(ssl)), SSL_ERROR_WANT_READ);
    CHECK(fcntl(fd, F_SETFL, flags) == 0);
    long size = BIO_get_mem_data(SSL_get_wbio(ssl), &hello);
    CHECK(size > 0);
    t_send(fd, hello, (size_t)size);
    SSL_set0_wbio(ssl, BIO_new_socket(fd, BIO_NOCLOSE));
}

/* Who takes its leave within the handshake has not shaken hands. */
static void notifying_client(int port, void *context)
{
    static const char close_notify[] = "\025\003\003\000\002\001\000";
    (void)context;
    SSL *ssl = dial_start(port, &tls_1_2);
    begin_handshake(ssl);
    t_send(SSL_get_fd(ssl), close_notify, sizeof close_notify - 1);
    t_drain_and_close(SSL_get_fd(ssl));
    SSL_free(ssl);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), TSRV_ETLS);
    CHECK_INT(handshakes_failed(), 1);
}

TEST_STREAM(test_handshake_close_notify)
{
    t_case c = {read_code, t_record_reason, notifying_client, NULL, {0}};
    run_tls(&c, NULL);
}

static void drained_client(int port, void *context)
{
    SSL *ssl[2] = {dial_open(port, &tls_1_2), dial_open(port, &tls_1_3)};
    SSL *begun = dial_start(port, &usual), *idle = dial_open(port, &usual);
    int grace_ms = 60000;
    (void)context;
    begin_handshake(begun);
    dial_echo(ssl[0], "hello");
    dial_echo(ssl[1], "hello");
    t_wait_records(4);
    t_on_loop(drain_now, &grace_ms);
    for (int i = 0; i < 2; i++) {
        dial_expect(ssl[i], "BYE");
        dial_expect_end(ssl[i]);
        dial_free(ssl[i]);
    }
    shake_hands(begun); /* was under way, so it is finished, and served */
    dial_echo(begun, "hello");
    dial_expect(begun, "BYE");
    dial_expect_end(begun);
    dial_free(begun);
    dial_expect(idle, "BYE"); /* it has never said anything: as soon as it is no longer new */
    dial_expect_end(idle);
    dial_free(idle);
}

static int note_and_say_bye(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    note_once(stream, ENTERED);
    return say_bye(stream, address, context);
}

TEST_STREAM(test_drain)
{
    t_case c = {note_and_say_bye, NULL, drained_client, NULL, {0}};
    c.options.data_size = sizeof(unsigned);
    run_tls(&c, NULL);
}

/* Who was answered, and has begun its next record, is not idle. */
static void drained_within_record_client(int port, void *context)
{
    unsigned char record[100];
    size_t begun = *(size_t *)context;
    int grace_ms = 60000;
    SSL *ssl = dial_open(port, &usual), *other = dial_open(port, &usual);
    dial_echo(ssl, "hello");
    size_t size = dial_seal(ssl, "again", 5, record, sizeof record);
    t_send(SSL_get_fd(ssl), record, begun);
    dial_echo(other, "the server has seen it");
    t_on_loop(drain_now, &grace_ms);
    dial_expect(other, "BYE");
    dial_expect_end(other);
    dial_free(other);
    t_send(SSL_get_fd(ssl), record + begun, size - begun);
    dial_expect(ssl, "againBYE");
    dial_expect_end(ssl);
    dial_free(ssl);
}

TEST_STREAM(test_drain_within_record)
{
    for (size_t begun = 5; begun <= 10; begun += 5) { /* its header, which the session has taken; and some of it */
        t_case c = {note_and_say_bye, NULL, drained_within_record_client, &begun, {0}};
        c.options.data_size = sizeof(unsigned);
        run_tls(&c, NULL);
    }
}

/* Who has connected, and not even begun a handshake, holds no drain; who has begun one is waited for. */
static void mute_client(int port, void *context)
{
    int grace_ms = 60000, mute = t_connect(port);
    unsigned char hello[] = {22, 3, 1};
    int begun = t_connect(port);
    (void)context;
    t_send(begun, hello, sizeof hello);
    t_on_loop(drain_now, &grace_ms);
    t_expect_reset(mute);
    t_wait_records(1);
    t_expect_silence(begun);
    t_close(mute);
    t_close(begun);
    t_wait_records(2);
}

TEST_SOFT(test_drain_of_the_mute)
{
    t_case c = {echo_bytes, t_record_reason, mute_client, NULL, {0}};
    run_tls(&c, NULL);
    CHECK_INT(t_recorded(0), TSRV_ECLOSED);
}

/* When the grace is over, also a handshake that has not ended, and output that nobody takes. */
static void forced_client(int port, void *context)
{
    dial how = {.receive_room = 4096};
    int grace_ms = 300;
    (void)context;
    SSL *begun = dial_start(port, &usual), *lazy = dial_open(port, &how);
    dial_sends(lazy, "go\n");
    t_wait_records(1); /* its answer has been written */
    int64_t begin = t_now_ms();
    t_on_loop(drain_now, &grace_ms);
    t_expect_reset(SSL_get_fd(begun));
    t_expect_reset(SSL_get_fd(lazy));
    CHECK_NEAR_MS(t_now_ms() - begin, 290, 1500);
    dial_free(begun);
    dial_free(lazy);
    t_wait_records(3);
}

static int write_and_wait(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    static char much[8 << 20];
    tsrv_slice line;
    (void)address, (void)context;
    if (((unsigned *)tsrv_data(stream))[0] == 0) {
        int rc = tsrv_read_until(stream, "\n", 0, &line);
        if (rc < 0) {
            return rc;
        }
        note_once(stream, READ);
        if ((rc = tsrv_write(stream, much, sizeof much)) < 0) {
            return rc;
        }
    }
    return tsrv_read_some(stream, 0, &line);
}

TEST_SOFT(test_drain_grace)
{
    t_case c = {write_and_wait, t_record_reason, forced_client, NULL, {0}};
    c.options.data_size = sizeof(unsigned);
    run_tls(&c, NULL);
}

/* ---- 12: memory of idle sessions ----------------------------------------------------------*/

enum { SESSIONS = 300, LINE = 1000 };

static int large_blocks; /* atomic; of OpenSSL's, alive, at least the size of a record */

static int is_large(void *block)
{
    return block != NULL && malloc_usable_size(block) >= 16384;
}

static void *counting_malloc(size_t size, const char *name, int line)
{
    void *block = malloc(size);
    (void)name, (void)line;
    __atomic_add_fetch(&large_blocks, is_large(block), __ATOMIC_RELAXED);
    return block;
}

static void *counting_realloc(void *block, size_t size, const char *name, int line)
{
    int before = is_large(block);
    void *larger = realloc(block, size);
    (void)name, (void)line;
    if (larger != NULL || size == 0) {
        __atomic_add_fetch(&large_blocks, is_large(larger) - before, __ATOMIC_RELAXED);
    }
    return larger;
}

static void counting_free(void *block, const char *name, int line)
{
    (void)name, (void)line;
    __atomic_sub_fetch(&large_blocks, is_large(block), __ATOMIC_RELAXED);
    free(block);
}

/* Before set_up, since OpenSSL takes them only before its first allocation. */
__attribute__((constructor(101))) static void count_blocks(void)
{
    CHECK_INT(CRYPTO_set_mem_functions(counting_malloc, counting_realloc, counting_free), 1);
}

static int go_on; /* atomic */

/* Echoes; but of what begins with p only the first byte is read, until it may go on. */
static int pause_or_echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice part;
    int rc = tsrv_read_bytes(stream, 1, &part);
    if (rc < 0 || part.data[0] != 'p') {
        return rc < 0 || (rc = tsrv_write(stream, part.data, 1)) < 0
                   ? rc
                   : echo_bytes(stream, address, context);
    }
    CHECK(SSL_pending((SSL *)tsrv_tls_native(stream)) > 0); /* which is what must not be lost */
    tsrv_write(stream, "p", 1);
    while (rc == TSRV_OK && !__atomic_load_n(&go_on, __ATOMIC_ACQUIRE)) {
        rc = tsrv_sleep(1);
    }
    if (rc == TSRV_OK && (rc = tsrv_read_bytes(stream, LINE - 1, &part)) == TSRV_OK) {
        rc = tsrv_write(stream, part.data, part.size);
    }
    return rc;
}

static void idle_client(int port, void *context)
{
    static SSL *sessions[SESSIONS];
    static char record[LINE + 1];
    (void)context;
    int before = __atomic_load_n(&large_blocks, __ATOMIC_RELAXED);
    SSL *paused = dial_open(port, &usual);
    memset(record, 'x', LINE);
    record[0] = 'p';
    dial_sends(paused, record);
    dial_expect(paused, "p");
    for (int i = 0; i < SESSIONS; i++) {
        sessions[i] = dial_open(port, &usual);
        dial_echo(sessions[i], "hello");
        CHECK_INT(SSL_free_buffers(sessions[i]), 1); /* what is left are the server's */
    }
    int blocks = __atomic_load_n(&large_blocks, __ATOMIC_RELAXED) - before;
    printf("%d idle sessions keep %d large blocks\n", SESSIONS, blocks);
    CHECK(blocks > TSRVI_TLS_RECENT && blocks < 2 * TSRVI_TLS_RECENT + 20);
    __atomic_store_n(&go_on, 1, __ATOMIC_RELEASE);
    dial_expect(paused, record + 1);
    dial_expect_end(paused);
    dial_free(paused);
    for (int i = 0; i < SESSIONS; i++) {
        dial_echo(sessions[i], "again");
        dial_finish(sessions[i]);
    }
    t_wait_records(SESSIONS + 1);
}

TEST_COROUTINE(test_idle_sessions_give_up_their_buffers)
{
    t_case c = {pause_or_echo, t_record_reason, idle_client, NULL, {0}};
    c.options.read_chunk_size = 64;
    run_tls(&c, NULL);
}
LONG(test_idle_sessions_give_up_their_buffers);

/* Walks through the sessions that have buffers. */
static void count_sessions(void *context)
{
    const tsrvi_link *ring = &t_loop->streams.sessions;
    int count = 0;
    for (const tsrvi_link *link = ring->next; link != ring && count < 10; link = link->next) {
        CHECK(link->next->previous == link);
        count++;
    }
    CHECK_INT(t_loop->streams.session_count, count);
    *(int *)context = count;
}

static void taking_turns_client(int port, void *context)
{
    SSL *sessions[3];
    int count = 0;
    (void)context;
    for (int i = 0; i < 9; i++) {
        sessions[i % 3] = i < 3 ? dial_open(port, &usual) : sessions[i % 3];
        dial_echo(sessions[i % 3], "hello");
    }
    t_on_loop(count_sessions, &count);
    CHECK_INT(count, 3);
    for (int i = 0; i < 3; i++) {
        dial_finish(sessions[i]);
    }
    t_wait_records(3);
}

/* Those that take turns are there once each. */
TEST_SOFT(test_sessions_that_take_turns)
{
    t_case c = {echo_bytes, t_record_reason, taking_turns_client, NULL, {0}};
    run_tls(&c, NULL);
}

/* ---- 13: no memory ------------------------------------------------------------------------*/

static const char *fault_name;
static long fault_at;

static void arm(void *context)
{
    (void)context;
    t_fault_calls = 0;
    t_fault_hits = 0;
    t_fault_name = fault_name;
    t_fault_at = fault_at;
}

static void disarm(void *context)
{
    *(long *)context = t_fault_hits;
    t_fault_at = 0;
}

static int fault_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    if (((unsigned *)tsrv_data(stream))[0] == 0) {
        note_once(stream, ENTERED);
        tsrv_write(stream, "welcome\n", 8);
    }
    int rc = echo_bytes(stream, address, context);
    if (rc == TSRV_EOF) {
        tsrv_write(stream, big_answer, 70000);
    }
    return rc;
}

/* Handshake, echo and close, as far as it gets: what comes is what is expected, up to an end. */
static bool try_all(int port, const dial *how)
{
    static const char text[] = "hello, world";
    static unsigned char data[70000];
    char buffer[64];
    int kind;
    SSL *ssl = dial_start(port, how);
    bool all = false;
    size_t sent, got = 0;
    ERR_clear_error();
    if (SSL_do_handshake(ssl) == 1) {
        got = dial_recv(ssl, buffer, 8, &kind);
        CHECK_MEM(buffer, got, "welcome\n", got);
        if (got == 8 && SSL_write_ex(ssl, text, sizeof text, &sent) == 1) {
            got = dial_recv(ssl, buffer, sizeof text, &kind);
            CHECK_MEM(buffer, got, text, got);
            if (got == sizeof text && SSL_shutdown(ssl) == 0) {
                got = dial_recv(ssl, data, sizeof data, &kind);
                compare(data, got, 0);
                all = got == sizeof data;
            }
        }
    }
    ERR_clear_error();
    dial_free(ssl);
    return all;
}

static long fault_hits;

static void fault_client(int port, void *context)
{
    const dial *how = (const dial *)context;
    t_on_loop(arm, NULL);
    bool all = try_all(port, how);
    __atomic_store_n(&t_fault_at, 0, __ATOMIC_SEQ_CST); /* what follows is not to fail */
    t_on_loop(disarm, &fault_hits);
    CHECK(all || fault_hits > 0);
    CHECK(try_all(port, how)); /* the server goes on */
}

static void run_faults(const char *name, int version)
{
    dial how = {.version = version};
    fill(big_answer, ANSWER, 0);
    tsrv_set_log(t_no_log, NULL);
    fault_name = name;
    fault_at = 0;
    do {
        t_case c = {fault_handler, NULL, fault_client, &how, {0}};
        c.options.data_size = sizeof(unsigned);
        fault_at++;
        CHECK(fault_at < 500);
        t_records_used = 0;
        run_tls(&c, NULL);
    } while (fault_hits > 0);
    CHECK(fault_at > 2); /* something was made to fail */
}

TEST_SOFT(test_no_memory_tls_1_2)
{
    run_faults("malloc", TLS1_2_VERSION);
}

TEST_SOFT(test_no_memory_tls_1_3)
{
    run_faults("malloc", TLS1_3_VERSION);
}

/* A receive that fails ends one stream. */
TEST_SOFT(test_failing_recv)
{
    t_fault_errno = ECONNRESET;
    run_faults("recv", 0);
}

/* Receives and sends that are interrupted, or find nothing after all, change nothing. */
static void interrupted_client(int port, void *context)
{
    (void)context;
    t_on_loop(arm, NULL);
    CHECK(try_all(port, &usual)); /* in spite of it */
    __atomic_store_n(&t_fault_at, 0, __ATOMIC_SEQ_CST);
    t_on_loop(disarm, &fault_hits);
}

static void run_interruptions(const char *name, int code)
{
    fill(big_answer, ANSWER, 0);
    fault_name = name;
    fault_at = 0;
    do {
        t_case c = {fault_handler, NULL, interrupted_client, NULL, {0}};
        c.options.data_size = sizeof(unsigned);
        fault_at++;
        CHECK(fault_at < 500);
        t_records_used = 0;
        t_fault_errno = code;
        run_tls(&c, NULL);
    } while (fault_hits > 0);
    CHECK(fault_at > 2);
}

TEST_SOFT(test_interrupted_calls)
{
    static const char *const names[] = {"recv", "send"};
    static const int codes[] = {EINTR, EAGAIN};
    for (int i = 0; i < 4; i++) {
        run_interruptions(names[i / 2], codes[i % 2]);
    }
}

/* Contexts: every allocation fails once. */
TEST_ONCE(test_no_memory_for_contexts)
{
    tsrv_tls_options options = server_options();
    tsrv_tls_certificate certificates[] = {{"*.wild.test", path("wild.pem"), NULL},
                                           {"other.test", path("other.pem"), path("other.pem")}};
    tsrv_tls *tls;
    long k = 0;
    int rc;
    options.certificates = certificates;
    options.certificate_count = 2;
    options.ca_file = path("ca.pem");
    options.alpn = "h2";
    options.ciphers = "ECDHE+AESGCM";
    tsrv_set_log(t_no_log, NULL);
    do {
        tls = (tsrv_tls *)(void *)folder;
        t_fault_calls = 0;
        t_fault_hits = 0;
        t_fault_name = "malloc";
        t_fault_at = ++k;
        rc = tsrv_tls_new(&tls, &options);
        t_fault_at = 0;
        CHECK_INT(rc, t_fault_hits > 0 ? -ENOMEM : TSRV_OK);
        CHECK((tls == NULL) == (rc < 0));
    } while (rc < 0);
    CHECK(k > 10);
    k = 0;
    do {
        t_fault_calls = 0;
        t_fault_hits = 0;
        t_fault_at = ++k;
        rc = tsrv_tls_reload(tls);
        t_fault_at = 0;
        CHECK_INT(rc, t_fault_hits > 0 ? -ENOMEM : TSRV_OK);
    } while (rc < 0);
    CHECK(k > 3);
    tsrv_tls_free(tls);
}

/* ---- SIGHUP -------------------------------------------------------------------------------*/

static int hup_port, hup_second, hup_processes;
static tsrv_server *hup_other;

/* As status.c has it: workers have a second server, which the first one's parent has made. */
static void start_second(tsrv_server *server, void *context)
{
    (void)server, (void)context;
    CHECK_INT(tsrv_server_start(hup_other, 1, NULL), TSRV_OK);
}

static void make_second(tsrv_tls *tls)
{
    tsrv_server_options options;
    memset(&options, 0, sizeof options);
    options.mode = t_mode;
    options.handle_stream = echo_bytes;
    options.tls = tls;
    CHECK_INT(tsrv_server_new(&hup_other, &options), TSRV_OK);
    CHECK_INT(tsrv_server_bind(hup_other, hup_second, "127.0.0.1", NULL), TSRV_OK);
}

/* Whole servers in a process of its own, with the certificate that is replaced. */
static pid_t serve_reload(void)
{
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        tsrv_tls_options tls_options = server_options();
        tsrv_server_options options;
        tsrv_tls *second;
        memset(&options, 0, sizeof options);
        tls_options.cert_file = path("reload.pem");
        options.mode = t_mode;
        options.on_start = start_second;
        if (tsrv_tls_new(&second, &tls_options) != TSRV_OK) {
            _exit(2);
        }
        make_second(second);
        options.handle_stream = echo_bytes;
        if (tsrv_tls_new(&options.tls, &tls_options) != TSRV_OK) {
            _exit(2);
        }
        int rc = tsrv_serve(hup_port, "127.0.0.1", hup_processes, &options);
        tsrv_server_free(hup_other);
        tsrv_tls_free(second);
        tsrv_tls_free(options.tls);
        _exit(rc == TSRV_OK ? 0 : 1);
    }
    return pid;
}

static bool hup_listens(void *context)
{
    struct sockaddr_in address = t_address(hup_port);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    (void)context;
    bool listens = connect(fd, (struct sockaddr *)&address, sizeof address) == 0;
    t_close(fd);
    return listens;
}

static bool hup_serves_at(int port, const char *expected)
{
    char name[64];
    SSL *ssl = dial_open(port, &usual);
    bool serves = strcmp(peer_name(ssl, name, sizeof name), expected) == 0;
    dial_echo(ssl, "hello");
    dial_finish(ssl);
    return serves;
}

/* Do new connections get this certificate, from both servers? */
static bool hup_serves(void *expected)
{
    return hup_serves_at(hup_port, (const char *)expected) &&
           hup_serves_at(hup_second, (const char *)expected);
}

static void hup(int processes)
{
    int status = 0;
    hup_processes = processes;
    hup_port = t_free_port();
    do {
        hup_second = t_free_port();
    } while (hup_second == hup_port);
    copy_file("server.pem", "reload.pem");
    pid_t pid = serve_reload();
    CHECK(t_wait_until(hup_listens, NULL));
    CHECK(hup_serves((void *)"server"));
    SSL *old = dial_open(hup_port, &usual);
    dial_echo(old, "before");
    copy_file("server2.pem", "reload.pem");
    CHECK(kill(pid, SIGHUP) == 0);
    CHECK(t_wait_until(hup_serves, (void *)"server2"));
    if (processes == 1) {
        dial_echo(old, "the old one goes on");
        dial_finish(old);
    } else { /* it is idle, and its worker is drained: TLS's own end, not a reset */
        dial_expect_end(old);
        dial_free(old);
    }
    CHECK(kill(pid, SIGTERM) == 0);
    CHECK_INT(waitpid(pid, &status, 0), pid);
    CHECK(WIFEXITED(status));
    CHECK_INT(WEXITSTATUS(status), 0);
}

TEST_SOFT(test_sighup_reloads_a_single_process)
{
    hup(1);
}

TEST_SOFT(test_sighup_reloads_workers)
{
    hup(2);
}

/* ---- the PROXY protocol before TLS -----------------------------------------------------------*/

static int echo_for_client(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    if (tsrv_unread_size(stream) == 0 && tsrv_address_port(address) != 9) {
        t_record(-1);
    }
    return echo_bytes(stream, address, context);
}

/* A header and the first message of the handshake, in one piece or byte by byte. */
static void check_behind_header(int port, bool whole)
{
    static const char header[] = "PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n";
    char first[4096];
    int fd = t_connect(port), size = (int)strlen(header);
    SSL *ssl = dial_ssl(&usual);
    BIO *hello = BIO_new(BIO_s_mem());
    BIO_up_ref(hello);
    SSL_set0_wbio(ssl, hello);
    SSL_set0_rbio(ssl, BIO_new_socket(fd, BIO_NOCLOSE));
    BIO_socket_nbio(fd, 1);
    CHECK(SSL_do_handshake(ssl) < 0);
    BIO_socket_nbio(fd, 0);
    memcpy(first, header, (size_t)size);
    size += BIO_read(hello, first + size, (int)sizeof first - size);
    BIO_free(hello);
    CHECK(size > (int)strlen(header) + 100);
    SSL_set0_wbio(ssl, BIO_new_socket(fd, BIO_NOCLOSE));
    if (whole) {
        t_send(fd, first, (size_t)size);
    }
    for (int i = 0; i < size && !whole; i++) {
        t_send(fd, first + i, 1);
        if (i % 16 == 0) {
            usleep(100); /* so that they come one by one, though nothing depends on it */
        }
    }
    shake_hands(ssl);
    dial_echo(ssl, "hello");
    dial_finish(ssl);
}

static void client_behind_headers(int port, void *context)
{
    (void)context;
    check_behind_header(port, true);
    check_behind_header(port, false);
    SSL *ssl = dial_start(port, &usual); /* a handshake without a header */
    CHECK(SSL_do_handshake(ssl) < 0);
    dial_free(ssl);
}

TEST_STREAM(test_proxy_header_comes_before_the_handshake)
{
    t_case c = {echo_for_client, t_record_reason, client_behind_headers, NULL, {0}};
    c.options.proxy_protocol = TSRV_PROXY_REQUIRED;
    c.options.proxy_from = "127.0.0.0/8";
    tsrv_set_log(t_no_log, NULL);
    run_tls(&c, NULL);
    CHECK_INT(t_record_count(), 2); /* two ends, and no wrong address */
    CHECK(t_recorded(0) != -1 && t_recorded(1) != -1);
}
