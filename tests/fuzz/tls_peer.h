/* Peers that speak TLS, for api.c with FUZZ_TLS=1: OpenSSL itself, 1.2 or 1.3, whose records come in pieces, and with
 * new keys now and then. A script's streams speak it from the beginning, or from where the program calls
 * tsrv_start_tls, at any moment. The peer begins then, if all that it has sent was received; else it goes on with
 * bytes that are no TLS, and nothing is known of that stream but that it comes to its end.
 *
 * The oracle is that of plain streams, in plaintext: what of it the library receives is counted by a transport that
 * stands before its own. Besides, the peer must find no fault with a record, and hear a close_notify before an end in
 * good order.
 *
 * A script does the same whenever it is run: Ed25519's signatures and X25519's keys are as long whatever is random, so
 * every record is; and what is random is a counter. */
#ifndef FUZZ_TLS_PEER_H
#define FUZZ_TLS_PEER_H

#include "certificate.h"

static tsrv_tls *server_tls;
static SSL_CTX *peer_context;
static tsrvi_transport counting; /* the library's, but that what it receives is counted */
static bool by_command;          /* TLS begins with tsrv_start_tls */

static void peer_gets(connection *on, const char *data, size_t size);

/* ---- what the library receives ------------------------------------------------------------*/

/* The header's idle time counts bytes of the socket, also of a part of a record. */
static void count_activity(connection *on, bool got)
{
    if (got || tsrvi_tls_of(on->stream)->received != 0) {
        on->active = this_moment();
    }
}

static ssize_t counting_recv(tsrv_stream *stream, char *into, size_t size)
{
    connection *on = *(connection **)tsrv_data(stream);
    bool lingers = stream->phase == TSRVI_LINGER;
    ssize_t got = tsrvi_tls_recv(stream, into, size);
    if (got > 0) {
        happened();
        *(lingers ? &on->lingered : &on->received) += (uint64_t)got;
    }
    count_activity(on, got > 0);
    return got;
}

static int counting_shake(tsrv_stream *stream)
{
    connection *on = *(connection **)tsrv_data(stream);
    int rc = tsrvi_tls_shake(stream);
    if (rc == TSRV_OK) {
        TRACE("%d: the handshake is done, %s\n", number_of(on), SSL_get_version(tsrvi_tls_of(stream)->ssl));
        on->established = true;
    }
    count_activity(on, false);
    return rc;
}

/* ---- the beginning ------------------------------------------------------------------------*/

static void tls_begin_once(void)
{
    static const unsigned char secret[32] = "a key that is always the same";
    EVP_PKEY *key = EVP_PKEY_new_raw_private_key(EVP_PKEY_ED25519, NULL, secret, sizeof secret);
    tsrv_tls_options tls_options;
    RAND_set_rand_method(&random_method);
    X509_free(make_certificate(key));
    EVP_PKEY_free(key);
    memset(&tls_options, 0, sizeof tls_options);
    tls_options.cert_pem = certificate_text;
    tls_options.key_pem = key_text;
    need(tsrv_tls_new(&server_tls, &tls_options) == TSRV_OK, "a context");
    need((peer_context = SSL_CTX_new(TLS_client_method())) != NULL, "a peer's context");
    need(SSL_CTX_set1_groups_list(peer_context, "X25519") == 1, "X25519");
    counting = tsrvi_tls_transport;
    counting.recv = counting_recv;
    counting.shake = counting_shake;
    t_live_allocations = 0; /* it stays */
}

static void tls_begin_script(bool starttls)
{
    randomness = 1;
    by_command = starttls;
    options.tls = starttls ? NULL : server_tls;
}

static void tls_end_script(connection *on)
{
    SSL_free(on->tls);
}

/* The stream's bytes are TLS from now on, and the peer's. */
static void tls_begin_peer(connection *on)
{
    on->secured = true;
    on->stream->session->transport = &counting;
    on->plain = on->written - on->delivered;
    TRACE("%d: the peer begins TLS\n", number_of(on));
    need((on->tls = SSL_new(peer_context)) != NULL, "a peer");
    SSL_set_bio(on->tls, BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem()));
    BIO_set_mem_eof_return(SSL_get_rbio(on->tls), -1);
    SSL_set_connect_state(on->tls);
    if (draw(2) == 1) {
        SSL_set_max_proto_version(on->tls, TLS1_2_VERSION);
    }
    SSL_do_handshake(on->tls);
    ERR_clear_error();
}

/* A stream is added. */
static void tls_begin_stream(connection *on)
{
    if (!by_command) {
        tls_begin_peer(on);
    }
}

/* What no peer answers can only fail. */
static void tls_begin_alone(connection *on)
{
    on->secured = true;
    on->stream->session->transport = &counting;
    on->ending = on->aborted = on->strayed = on->unsure = true;
}

/* Has it ended either way, or may it have? */
static bool may_be_over(const connection *on)
{
    return has_ended(on) || on->perhaps || on->shut || on->refused || on->told || on->peer_fin || on->peer_gone ||
           tsrv_stopping(on->stream);
}

static void check_start(const connection *on, int rc, bool again, size_t unread)
{
    if (rc == TSRV_OK && (again || unread != 0)) {
        fail("%d: TLS begins %s", number_of(on), again ? "twice" : "before the plaintext is read");
    }
    if (rc != TSRV_OK && rc != (again ? TSRV_EINVAL : TSRV_EBUSY) && !(rc == TSRV_ETLS && on->received != on->read)) {
        fail("%d: tsrv_start_tls returns %d", number_of(on), rc);
    }
}

static void start_tls(connection *on)
{
    static const char *const hosts[] = {NULL, NULL, NULL, "localhost"};
    const char *host = PICK(hosts);
    size_t unread = tsrv_unread_size(on->stream);
    bool again = on->secured, excused = may_be_over(on);
    int rc;
    on->secured = true; /* a client's handshake begins at once */
    rc = tsrv_start_tls(on->stream, server_tls, host);
    on->secured = again || rc == TSRV_OK;
    excused = excused || unclean;
    TRACE("%d: start_tls(%s) = %d\n", number_of(on), host == NULL ? "NULL" : host, rc);
    if (!excused) {
        check_start(on, rc, again, unread);
    }
    if (rc == TSRV_OK && host == NULL && on->sent == on->received && !on->unsure && !on->short_file && !excused) {
        tls_begin_peer(on);
    } else if (rc == TSRV_OK) {
        tls_begin_alone(on);
    }
}

/* ---- what it explains ---------------------------------------------------------------------*/

static bool tls_is_shaking(const connection *on)
{
    return on->tls != NULL && !SSL_is_init_finished(on->tls);
}

static bool tls_explains(const connection *on, int rc)
{
    return (rc == TSRV_ETLS && on->secured && (on->peer_gone || unclean || on->tls == NULL)) ||
           (rc == TSRV_ECLOSED && tls_is_shaking(on) && tsrv_stopping(on->stream));
}

/* At on_close: half a message that wants an answer keeps the last word, too, so all must have come. */
static void tls_ends(connection *on)
{
    on->notified = on->good && on->established && on->sealed_sent == on->sealed_received;
}

static void check_last_word(const connection *on)
{
    if (on->notified && (SSL_get_shutdown(on->tls) & SSL_RECEIVED_SHUTDOWN) == 0) {
        fail("%d: no close_notify comes before the end", number_of(on));
    }
}

/* ---- what the peer does -------------------------------------------------------------------*/

static size_t tls_unsent(const connection *on)
{
    char *data;
    return on->tls == NULL ? 0 : (size_t)BIO_get_mem_data(SSL_get_wbio(on->tls), &data);
}

/* Send what the peer's TLS has made, or a part. Returns whether anything went. */
static bool tls_flush(connection *on, size_t most)
{
    char dropped[4096], *data;
    bool any = false;
    while (on->peer >= 0 && most != 0 && tls_unsent(on) != 0) {
        size_t left = (size_t)BIO_get_mem_data(SSL_get_wbio(on->tls), &data);
        size_t part = left < most ? left : most;
        ssize_t sent = send(on->peer, data, part < sizeof dropped ? part : sizeof dropped, MSG_DONTWAIT | MSG_NOSIGNAL);
        on->peer_gone = on->peer_gone || (sent < 0 && errno != EAGAIN);
        on->good = on->good && !(tcp && on->closed); /* as for plain bytes */
        if (sent <= 0) {
            break;
        }
        BIO_read(SSL_get_wbio(on->tls), dropped, (int)sent);
        on->sealed_sent += (uint64_t)sent;
        most -= (size_t)sent;
        any = true;
    }
    return any;
}

/* What has come is opened. Returns whether there was plaintext in it. */
static bool tls_open(connection *on)
{
    static char buffer[65536];
    bool any = false;
    int got;
    while ((got = SSL_read(on->tls, buffer, sizeof buffer)) > 0) {
        peer_gets(on, buffer, (size_t)got);
        any = true;
    }
    if (SSL_get_error(on->tls, got) == SSL_ERROR_SSL && !unclean) {
        fail("%d: the peer's TLS says: %s", number_of(on), ERR_reason_error_string(ERR_peek_error()));
    }
    ERR_clear_error();
    return any;
}

/* Send and receive. Returns whether anything went or came. */
static bool tls_peer_receive(connection *on, size_t most)
{
    static char buffer[65536];
    bool any = tls_flush(on, most);
    size_t size = on->plain != 0 && on->plain < most ? (size_t)on->plain : most;
    ssize_t got = recv(on->peer, buffer, size < sizeof buffer ? size : sizeof buffer, MSG_DONTWAIT);
    on->peer_saw_end = on->peer_saw_end || got == 0;
    if (got > 0 && on->plain != 0) {
        on->plain -= (uint64_t)got;
        peer_gets(on, buffer, (size_t)got);
    } else if (got > 0) {
        need(BIO_write(SSL_get_rbio(on->tls), buffer, (int)got) == got, "memory");
    }
    any = tls_open(on) || got > 0 || any;
    any = tls_flush(on, most) || any;
    if (any) {
        happened();
    }
    return any;
}

/* Returns how much of it is in records. */
static ssize_t tls_peer_send(connection *on, size_t size)
{
    int sent;
    if (tls_is_shaking(on) || tls_unsent(on) != 0) {
        return 0;
    }
    if (draw(4) == 3 && SSL_version(on->tls) == TLS1_3_VERSION) {
        TRACE("%d: the peer has new keys\n", number_of(on));
        SSL_key_update(on->tls, draw(2) ? SSL_KEY_UPDATE_REQUESTED : SSL_KEY_UPDATE_NOT_REQUESTED);
    }
    sent = SSL_write(on->tls, input_from(on->sent), (int)size);
    need(sent > 0, "records");
    tls_flush(on, draw(2) ? SIZE_MAX : PICK(chunks));
    return sent;
}

/* close_notify, and perhaps the socket's end. Returns false if it cannot be said now. */
static bool tls_peer_shutdown(connection *on)
{
    if (tls_is_shaking(on) || tls_unsent(on) != 0) {
        return false;
    }
    SSL_shutdown(on->tls);
    ERR_clear_error();
    tls_flush(on, SIZE_MAX);
    if (tls_unsent(on) == 0 && draw(2) == 1) {
        shutdown(on->peer, SHUT_WR);
    }
    return true;
}

/* Peers go on with their handshakes whatever else they do. */
static void tls_shake_all(void)
{
    for (int i = 0; i < STREAMS; i++) {
        if (connections[i].peer >= 0 && tls_is_shaking(&connections[i]) && draw(2) == 1) {
            tls_peer_receive(&connections[i], SIZE_MAX);
        }
    }
}

#endif
