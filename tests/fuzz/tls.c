/* A fuzzer of TLS: a real peer, whose records are cut, flipped, repeated, left out, swapped and joined by others on
 * their way to a stream of the library's, server or client, from the start or by STARTTLS.
 *
 *     make fuzz && build/fuzz/tls -max_len=200 build/fuzz/tls.corpus
 *
 * What must hold:
 *   - what the handler reads over TLS is what the peer has said over TLS, from its beginning, whatever else comes:
 *     nothing of what is injected before, into or behind the handshake is ever read;
 *   - TSRV_EOF means that all the peer has said was read, and its close_notify; any other end is an error;
 *   - if nothing was touched, all of it is read, and all of the answer arrives;
 *   - every stream ends within its times; nothing is left, neither memory nor descriptors.
 * Randomness is a counter, and the certificate is dated, so that a script does the same whenever it is run. */
#define TSRV_TLS_OPENSSL
#define OPENSSL_SUPPRESS_DEPRECATED /* RAND_set_rand_method */
#include "world.h"
#include "certificate.h"

#include <openssl/ec.h>

#define STEPS 60
#define SAID 200000 /* bytes that a peer says at most */
#define RECORD 17000
#define HANDSHAKE_MS 1000
#define READ_MS 500
#define CLOSE_MS 300

/* ---- who is who ---------------------------------------------------------------------------*/

static tsrv_tls *server_tls, *client_tls;
static SSL_CTX *peer_contexts[2]; /* a client, a server */

static void make_contexts(void)
{
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *certificate = make_certificate(key);
    for (int i = 0; i < 2; i++) {
        peer_contexts[i] = SSL_CTX_new(i == 0 ? TLS_client_method() : TLS_server_method());
        need(peer_contexts[i] != NULL, "a context");
        SSL_CTX_set_session_cache_mode(peer_contexts[i], SSL_SESS_CACHE_OFF);
    }
    need(SSL_CTX_use_certificate(peer_contexts[1], certificate) == 1 &&
             SSL_CTX_use_PrivateKey(peer_contexts[1], key) == 1,
         "a context");
    X509_free(certificate);
    EVP_PKEY_free(key);
}

/* ---- the program --------------------------------------------------------------------------*/

static bool is_client, by_starttls;
static bool secured;    /* tsrv_start_tls was called */
static bool injected;   /* plain text stands behind STARTTLS */
static int handled_end; /* what the handler's last call returned; 1 = none has failed yet */
static int closed;
static bool untouched; /* nothing was done to what the peer has sent */

static char said[SAID];
static size_t said_size, got_size, answered_size;
static bool notified; /* the peer has sent its close_notify */
static SSL *peer;
static int peer_fd;

static int secure(tsrv_stream *stream)
{
    tsrv_slice line;
    int rc;
    if (secured) {
        return TSRV_OK;
    }
    if ((rc = tsrv_read_until(stream, "\n", 100, &line)) < 0) {
        return rc;
    }
    if (line.size != 9 || memcmp(line.data, "STARTTLS\n", 9) != 0) {
        fail("the plain text is \"%.*s\"", (int)line.size, line.data);
    }
    secured = true;
    rc = tsrv_start_tls(stream, is_client ? client_tls : server_tls, is_client ? "localhost" : NULL);
    TRACE("tsrv_start_tls = %d\n", rc);
    if (rc != TSRV_OK && !(rc == TSRV_ETLS && injected)) {
        fail("tsrv_start_tls returns %d", rc);
    }
    return rc;
}

static int answer(tsrv_stream *stream, const tsrv_slice *part)
{
    if (part->size > said_size - got_size || memcmp(part->data, said + got_size, part->size) != 0) {
        fail("the handler reads %zu bytes at %zu, but the peer has said %zu in all, or others", part->size, got_size,
             said_size);
    }
    got_size += part->size;
    return tsrv_write(stream, part->data, part->size);
}

static int handle(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice part;
    int rc = secure(stream);
    (void)address;
    (void)context;
    while (rc == TSRV_OK && (rc = tsrv_read_some(stream, 0, &part)) == TSRV_OK) {
        rc = answer(stream, &part);
    }
    if (rc != TSRV_EAGAIN) {
        TRACE("the handler ends with %d\n", rc);
        handled_end = rc;
    }
    if (rc == TSRV_EOF && !(notified && got_size == said_size) && !(said_size == 0 && !SSL_is_init_finished(peer))) {
        fail("TSRV_EOF after %zu bytes of %zu, %s close_notify", got_size, said_size, notified ? "and" : "without");
    }
    return rc;
}

static void on_close(tsrv_stream *stream, int reason, void *context)
{
    (void)stream;
    (void)context;
    TRACE("closed, %d\n", reason);
    closed++;
}

/* ---- what is on its way -------------------------------------------------------------------*/

static void deliver(const void *data, size_t size)
{
    const char *bytes = (const char *)data;
    while (size != 0) {
        size_t took = client_send(peer_fd, bytes, size);
        bytes += took;
        size -= took;
        if (took == 0) {
            settle();
            took = client_send(peer_fd, bytes, size);
            if (took == 0) {
                return; /* it is closed */
            }
            bytes += took;
            size -= took;
        }
    }
}

/* A record that nobody has sealed. */
static void inject(void)
{
    static const unsigned char types[] = {23, 23, 22, 21, 20, 24, 23, 0};
    static const char *const bodies[] = {"EVIL\n", "\1\0", "\2\50", "\1", "\0\0\0\0", "\30\0\0\1\0"};
    static const unsigned char lengths[] = {5, 2, 2, 1, 4, 5};
    unsigned char record[64];
    unsigned what = draw(6), size = lengths[what];
    record[0] = PICK(types);
    record[1] = 3;
    record[2] = (unsigned char)(draw(4) == 3 ? draw(256) : 3);
    record[3] = 0;
    record[4] = (unsigned char)size;
    memcpy(record + 5, bodies[what], size);
    TRACE("inject type %d, %u bytes\n", record[0], size);
    untouched = false;
    deliver(record, 5 + size);
}

static void deliver_cut(const unsigned char *record, size_t size)
{
    size_t part = 1 + draw(256) % size;
    untouched = untouched && part == size;
    deliver(record, part);
}

static void deliver_flipped(unsigned char *record, size_t size)
{
    size_t at = (draw(4) == 3 ? draw(256) * 67 : draw(256)) % size;
    record[at] ^= (unsigned char)(1u << draw(8));
    untouched = false;
    deliver(record, size);
}

static void deliver_split(const unsigned char *record, size_t size)
{
    size_t part = draw(256) % size;
    deliver(record, part);
    settle();
    deliver(record + part, size - part);
}

static unsigned char held[RECORD + 5]; /* a record that the next one overtakes */
static size_t held_size;

static void deliver_record(unsigned char *record, size_t size)
{
    unsigned what = draw(24);
    TRACE("  record of type %d, %zu bytes: %u\n", record[0], size, what);
    switch (what) {
    case 1:
        deliver_flipped(record, size);
        break;
    case 2:
        deliver_cut(record, size);
        break;
    case 3:
        untouched = false;
        deliver(record, size);
        deliver(record, size);
        break;
    case 4:
        inject();
        deliver(record, size);
        break;
    case 5:
        untouched = false; /* lost */
        break;
    case 6:
        if (held_size == 0) {
            untouched = false;
            memcpy(held, record, size);
            held_size = size;
            return;
        }
        deliver(record, size);
        break;
    case 7:
    case 8:
        deliver_split(record, size);
        break;
    default:
        deliver(record, size);
        break;
    }
    if (held_size != 0) {
        deliver(held, held_size);
        held_size = 0;
    }
    if (what % 2 == 0) {
        settle();
    }
}

/* What the peer wants to send, record for record. */
static void deliver_all(void)
{
    unsigned char *data;
    BIO *out = SSL_get_wbio(peer);
    long left = BIO_get_mem_data(out, &data);
    while (left >= 5) {
        unsigned char record[RECORD + 5];
        long size = 5 + ((long)data[3] << 8 | data[4]);
        if (size > left || size > (long)sizeof record) {
            fail("the peer sends no records");
        }
        memcpy(record, data, (size_t)size);
        deliver_record(record, (size_t)size);
        data += size;
        left -= size;
    }
    (void)BIO_reset(out);
    settle();
}

/* What has come back. */
static void receive_all(void)
{
    char buffer[16384];
    ssize_t got;
    size_t size;
    while ((got = recv(peer_fd, buffer, sizeof buffer, MSG_DONTWAIT)) > 0) {
        BIO_write(SSL_get_rbio(peer), buffer, (int)got);
    }
    if (!SSL_is_init_finished(peer)) {
        SSL_do_handshake(peer);
    }
    while (SSL_is_init_finished(peer) && SSL_read_ex(peer, buffer, sizeof buffer, &size) == 1) {
        if (size > said_size - answered_size || memcmp(buffer, said + answered_size, size) != 0) {
            fail("the answer is not what was said");
        }
        answered_size += size;
    }
    ERR_clear_error();
}

/* What has come is read, though nothing comes behind it. */
static void check_rest(void)
{
    if (untouched && got_size != said_size) {
        fail("%zu bytes of %zu are read, and nobody goes on", got_size, said_size);
    }
}

/* Both, until there is no more. */
static void exchange(void)
{
    for (int i = 0; i < 30; i++) {
        receive_all();
        if (BIO_pending(SSL_get_wbio(peer)) == 0) {
            settle();
            receive_all();
            if (BIO_pending(SSL_get_wbio(peer)) == 0) {
                check_rest();
                return;
            }
        }
        deliver_all();
    }
}

/* ---- what the peer does -------------------------------------------------------------------*/

static void say(void)
{
    static const size_t scales[] = {1, 1, 60, 1000};
    size_t size = (draw(64) + 1) * PICK(scales), taken = 0;
    if (!SSL_is_init_finished(peer) || notified || size > SAID - said_size) {
        return;
    }
    for (size_t i = 0; i < size; i++) {
        said[said_size + i] = (char)('a' + (said_size + i) * 7 % 26 + (said_size + i) / 999 % 3);
    }
    if (SSL_write_ex(peer, said + said_size, size, &taken) == 1) {
        TRACE("say %zu\n", taken);
        said_size += taken;
    }
    ERR_clear_error();
}

static void change_keys(void)
{
    if (SSL_is_init_finished(peer) && !notified) {
        if (SSL_version(peer) == TLS1_3_VERSION) {
            SSL_key_update(peer, draw(2) == 0 ? SSL_KEY_UPDATE_REQUESTED : SSL_KEY_UPDATE_NOT_REQUESTED);
        } else {
            untouched = false; /* which is refused */
            SSL_renegotiate(peer);
        }
        SSL_do_handshake(peer);
        ERR_clear_error();
    }
}

static void notify(void)
{
    if (SSL_is_init_finished(peer) && !notified) {
        TRACE("close_notify\n");
        SSL_shutdown(peer);
        notified = true;
        ERR_clear_error();
    }
}

static void end_input(void)
{
    untouched = untouched && notified && BIO_pending(SSL_get_wbio(peer)) == 0; /* which is sent then */
    shutdown(peer_fd, SHUT_WR);
}

static void act(void)
{
    unsigned what = draw(32);
    if (what < 12) {
        exchange();
    } else if (what < 20) {
        say();
    } else if (what < 22) {
        inject();
    } else if (what < 24) {
        change_keys();
    } else if (what == 24) {
        notify();
    } else if (what == 25) {
        end_input();
    } else if (what == 26) {
        untouched = false;
        settle_for((int)draw(8) * 100);
    } else if (what == 27) {
        deliver_all();
    } else {
        receive_all();
    }
}

/* ---- one script ---------------------------------------------------------------------------*/

static void begin_once(void)
{
    tsrv_tls_options options = {0}, trusting = {0};
    if (server_tls != NULL) {
        return;
    }
    world_begin();
    RAND_set_rand_method(&random_method);
    make_contexts();
    options.cert_pem = certificate_text;
    options.key_pem = key_text;
    trusting.ca_pem = certificate_text;
    if (tsrv_tls_new(&server_tls, &options) != TSRV_OK || tsrv_tls_new(&client_tls, &trusting) != TSRV_OK) {
        fail("no TLS");
    }
}

static void begin(unsigned how)
{
    tsrv_server_options options = {0};
    is_client = (how & 4) != 0;
    by_starttls = (how & 8) != 0 || is_client;
    world_open((how & 2) != 0 ? TSRV_BACKEND_POLL : TSRV_BACKEND_EPOLL);
    options.loop = loop;
    options.mode = (how & 1) != 0 ? TSRV_CALLBACK : TSRV_COROUTINE;
    options.handle_stream = handle;
    options.on_close = on_close;
    options.tls = by_starttls ? NULL : server_tls;
    options.handshake_timeout_ms = HANDSHAKE_MS;
    options.read_timeout_ms = READ_MS;
    options.close_timeout_ms = CLOSE_MS;
    options.read_chunk_size = (how & 0x40) != 0 ? 7 : 0;
    if (tsrv_server_new(&server, &options) != TSRV_OK) {
        fail("no server");
    }
    peer = SSL_new(peer_contexts[is_client ? 1 : 0]);
    need(peer != NULL, "a peer");
    SSL_set_bio(peer, BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem()));
    SSL_set_max_proto_version(peer, (how & 0x10) != 0 ? TLS1_2_VERSION : TLS1_3_VERSION);
    is_client ? SSL_set_accept_state(peer) : SSL_set_connect_state(peer);
    peer_fd = connect_client();
}

/* Plain text first. */
static void begin_starttls(unsigned how)
{
    injected = by_starttls && (how & 0x20) != 0;
    if (by_starttls) {
        deliver("STARTTLS\nEVIL\n", injected ? 14 : 9);
        settle();
        untouched = !injected;
    }
}

/* Nothing was done to it: it has to come out well. */
static void finish_untouched(void)
{
    exchange();
    notify();
    exchange();
    exchange();
    if (!SSL_is_init_finished(peer) || got_size != said_size || answered_size != said_size ||
        handled_end != TSRV_EOF) {
        fail("of %zu bytes %zu are read, %zu come back, and the handler ends with %d", said_size, got_size,
             answered_size, handled_end);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int descriptors;
    long allocations;
    unsigned how;
    tsrv_stats stats;
    begin_once();
    descriptors = open_descriptors();
    allocations = t_live_allocations;
    randomness = 1;
    script_is(data, size);
    how = draw(256);
    secured = false;
    said_size = got_size = answered_size = held_size = 0;
    notified = false;
    untouched = true;
    handled_end = 1;
    closed = 0;
    begin(how);
    secured = !by_starttls;
    begin_starttls(how);
    for (int i = 0; i < STEPS && !script_is_over(); i++) {
        act();
    }
    script_back = script_front;
    if (untouched) {
        finish_untouched();
    }
    for (int i = 0; i < 3; i++) {
        settle_for(HANDSHAKE_MS + READ_MS + CLOSE_MS + 10);
        receive_all();
    }
    tsrv_server_stats(server, &stats);
    if (stats.open != 0 || closed != 1) {
        fail("at the end %llu streams are open, on_close was called %d times", (unsigned long long)stats.open, closed);
    }
    SSL_free(peer);
    close(peer_fd);
    t_live_allocations -= allocations; /* of the contexts */
    world_close_all();
    t_live_allocations += allocations;
    if (open_descriptors() != descriptors) {
        fail("descriptors are left");
    }
    return 0;
}
