/* For the tests that run once more over TLS: every server gets a certificate, and between each raw
 * client and its server stands a relay, a thread that speaks TLS with the server and plain TCP with
 * the client. Ends are passed on as what they are: a FIN becomes close_notify and FIN, a reset a reset.
 * Included by test.h when T_TLS is defined. */
#ifndef RELAY_H
#define RELAY_H

#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>

static int t_relays; /* that run; atomic */
static SSL_CTX *t_relay_context;
static tsrv_tls *t_tls;

/* A server's context with a certificate of its own making. */
static inline SSL_CTX *t_server_context(void)
{
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *certificate = X509_new();
    X509_NAME *name = X509_get_subject_name(certificate);
    CHECK(context != NULL && key != NULL && certificate != NULL);
    X509_gmtime_adj(X509_getm_notBefore(certificate), -60);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 3600);
    X509_set_pubkey(certificate, key);
    X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const unsigned char *)"test", -1, -1, 0);
    X509_set_issuer_name(certificate, name);
    CHECK(X509_sign(certificate, key, EVP_sha256()) > 0);
    CHECK(SSL_CTX_use_certificate(context, certificate) == 1);
    CHECK(SSL_CTX_use_PrivateKey(context, key) == 1);
    SSL_CTX_set_read_ahead(context, 1);
    X509_free(certificate);
    EVP_PKEY_free(key);
    return context;
}

/* Before the balance of a test is taken. */
static inline void t_relay_set_up(void)
{
    tsrv_tls_options options;
    memset(&options, 0, sizeof options);
    options.native_context = t_server_context();
    t_relay_context = SSL_CTX_new(TLS_client_method());
    CHECK(t_relay_context != NULL);
    SSL_CTX_set_mode(t_relay_context,
                     SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    CHECK_INT(tsrv_tls_new(&t_tls, &options), TSRV_OK);
}

static inline int t_server_new(tsrv_server **server, const tsrv_server_options *options)
{
    tsrv_server_options secured;
    if (options == NULL) {
        return tsrv_server_new(server, options);
    }
    secured = *options;
    secured.tls = secured.tls == NULL ? t_tls : secured.tls;
    return tsrv_server_new(server, &secured);
}
#define tsrv_server_new(server, options) t_server_new(server, options)

/* ---- one relay ----------------------------------------------------------------------------*/

typedef struct t_pipe {
    char data[16384];
    size_t begin, end;
    bool over; /* no more comes, and the other side has been told */
    bool told;
} t_pipe;

typedef struct t_relay {
    int plain, secret; /* sockets */
    SSL *ssl;
    t_pipe out, in; /* to the server, from it */
    bool broken;    /* reset by either side */
} t_relay;

static inline void t_relay_reset(int fd)
{
    struct linger now = {1, 0};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
}

/* What SSL_read or SSL_write has returned. True: it may be tried again. */
static inline bool t_relay_again(t_relay *r, int result)
{
    int error = SSL_get_error(r->ssl, result);
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE) {
        return true;
    }
    if (error == SSL_ERROR_ZERO_RETURN) {
        r->in.over = true;
        return false;
    }
    r->broken = true; /* a reset; or an end without close_notify, which is no better */
    return false;
}

static inline void t_relay_to_server(t_relay *r)
{
    t_pipe *p = &r->out;
    if (p->begin == p->end && !p->over) {
        ssize_t n = recv(r->plain, p->data, sizeof p->data, MSG_DONTWAIT);
        p->begin = 0;
        p->end = n > 0 ? (size_t)n : 0;
        p->over = n == 0;
        r->broken = r->broken || (n < 0 && errno != EAGAIN && errno != EINTR);
    }
    while (p->begin < p->end && !r->broken) {
        int n = SSL_write(r->ssl, p->data + p->begin, (int)(p->end - p->begin));
        if (n <= 0) {
            t_relay_again(r, n);
            return;
        }
        p->begin += (size_t)n;
    }
    if (p->over && !p->told && !r->broken) {
        SSL_shutdown(r->ssl);
        shutdown(r->secret, SHUT_WR);
        p->told = true;
    }
}

static inline void t_relay_to_client(t_relay *r)
{
    t_pipe *p = &r->in;
    if (p->begin == p->end && !p->over) {
        int n = SSL_read(r->ssl, p->data, sizeof p->data);
        p->begin = 0;
        p->end = n > 0 ? (size_t)n : 0;
        if (n <= 0) {
            t_relay_again(r, n);
        }
    }
    while (p->begin < p->end) {
        ssize_t n = send(r->plain, p->data + p->begin, p->end - p->begin, MSG_DONTWAIT | T_NOSIGNAL);
        if (n < 0) {
            r->broken = r->broken || (errno != EAGAIN && errno != EINTR);
            return;
        }
        p->begin += (size_t)n;
    }
    if (p->over && !p->told) {
        shutdown(r->plain, SHUT_WR);
        p->told = true;
    }
}

static inline void t_relay_wait(t_relay *r)
{
    struct pollfd entries[2] = {{r->plain, 0, 0}, {r->secret, 0, 0}};
    bool out = r->out.begin < r->out.end, in = r->in.begin < r->in.end;
    entries[0].events = (short)((!out && !r->out.over ? POLLIN : 0) | (in ? POLLOUT : 0));
    entries[1].events = (short)((!in && !r->in.over ? POLLIN : 0) | (out ? POLLOUT : 0));
    if (!in && SSL_has_pending(r->ssl)) {
        return;
    }
    poll(entries, 2, 10);
}

static inline void *t_relay_run(void *context)
{
    t_relay *r = (t_relay *)context;
    int result;
    while ((result = SSL_connect(r->ssl)) != 1 && !r->broken && t_relay_again(r, result)) {
        struct pollfd entry = {r->secret, POLLIN, 0};
        poll(&entry, 1, 10);
    }
    while (!r->broken && !(r->out.told && r->in.told)) {
        t_relay_to_server(r);
        t_relay_to_client(r);
        if (!r->broken && !(r->out.told && r->in.told)) {
            t_relay_wait(r);
        }
    }
    if (r->broken) {
        t_relay_reset(r->plain);
        t_relay_reset(r->secret);
    }
    SSL_free(r->ssl);
    close(r->plain);
    close(r->secret);
    free(r);
    OPENSSL_thread_stop(); /* else at the thread's end, while exit may clean OpenSSL up */
    __atomic_sub_fetch(&t_relays, 1, __ATOMIC_ACQ_REL);
    return NULL;
}

/* The client's end of a plain connection has come to `plain`, the server is behind `secret`. */
static inline void t_relay_start(int plain, int secret)
{
    t_relay *r = (t_relay *)calloc(1, sizeof *r);
    pthread_attr_t attributes;
    pthread_t thread;
    CHECK(r != NULL);
    r->plain = plain;
    r->secret = secret;
    r->ssl = SSL_new(t_relay_context);
    CHECK(r->ssl != NULL && SSL_set_fd(r->ssl, secret) == 1);
    CHECK(fcntl(plain, F_SETFL, O_NONBLOCK) == 0 && fcntl(secret, F_SETFL, O_NONBLOCK) == 0);
    __atomic_add_fetch(&t_relays, 1, __ATOMIC_ACQ_REL);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    CHECK_INT(pthread_create(&thread, &attributes, t_relay_run, r), 0);
    pthread_attr_destroy(&attributes);
}

/* After a test: all relays have ended with their connections. */
static inline void t_relay_await(void)
{
    int64_t end = t_patience();
    while (__atomic_load_n(&t_relays, __ATOMIC_ACQUIRE) != 0) {
        CHECK(t_now_ms() < end);
        poll(NULL, 0, 1);
    }
}

#endif /* RELAY_H */
