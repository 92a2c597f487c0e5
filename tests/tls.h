/* For tests of TLS: certificates, which are made at the start and are gone at the end; servers; and
 * OpenSSL's own clients, which block. */
#ifndef TLS_H
#define TLS_H

#define TSRV_TLS_OPENSSL
#include "test.h"

#include "handlers.h"

#include <dirent.h>
#include <openssl/ec.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/ocsp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <sys/stat.h>

/* ---- certificates -------------------------------------------------------------------------*/

static char folder[64];
static pid_t folder_owner;

/* A file of the folder. The text lives until sixty-four more were asked for by the same thread. */
static inline const char *path(const char *name)
{
    static __thread char texts[64][400];
    static __thread unsigned turn;
    char *text = texts[turn++ % 64];
    snprintf(text, sizeof texts[0], "%s/%s", folder, name);
    return text;
}

typedef struct identity {
    X509 *certificate;
    EVP_PKEY *key;
} identity;

static inline EVP_PKEY *make_key(void)
{
    EVP_PKEY *key = NULL;
    EVP_PKEY_CTX *maker = EVP_PKEY_CTX_new_id(EVP_PKEY_EC, NULL);
    CHECK(maker != NULL && EVP_PKEY_keygen_init(maker) == 1);
    CHECK(EVP_PKEY_CTX_set_ec_paramgen_curve_nid(maker, NID_X9_62_prime256v1) == 1);
    CHECK(EVP_PKEY_keygen(maker, &key) == 1);
    EVP_PKEY_CTX_free(maker);
    return key;
}

static inline void add_extension(X509 *certificate, X509 *issuer, int nid, const char *value)
{
    X509V3_CTX context;
    X509V3_set_ctx(&context, issuer, certificate, NULL, NULL, 0);
    X509_EXTENSION *extension = X509V3_EXT_conf_nid(NULL, &context, nid, value);
    CHECK(extension != NULL && X509_add_ext(certificate, extension, -1) == 1);
    X509_EXTENSION_free(extension);
}

/* issuer NULL: signed by itself. names and usage: extensions, NULL = none. Valid until a month after
 * now, or a day before. */
static inline identity make_identity(const identity *issuer, const char *common, const char *names,
                              const char *usage, bool authority, bool expired)
{
    static long serial = 1000;
    identity made = {X509_new(), make_key()};
    X509_NAME *name = X509_get_subject_name(made.certificate);
    const identity *signer = issuer != NULL ? issuer : &made;
    const long day = 24 * 60 * 60;
    X509_set_version(made.certificate, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(made.certificate), serial++);
    X509_gmtime_adj(X509_getm_notBefore(made.certificate), -2 * day);
    X509_gmtime_adj(X509_getm_notAfter(made.certificate), expired ? -day : 30 * day);
    CHECK(X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const unsigned char *)common, -1,
                                     -1, 0) == 1);
    X509_set_issuer_name(made.certificate, X509_get_subject_name(signer->certificate));
    X509_set_pubkey(made.certificate, made.key);
    add_extension(made.certificate, signer->certificate, NID_basic_constraints,
                  authority ? "critical,CA:TRUE" : "critical,CA:FALSE");
    if (names != NULL) {
        add_extension(made.certificate, signer->certificate, NID_subject_alt_name, names);
    }
    if (usage != NULL) {
        add_extension(made.certificate, signer->certificate, NID_ext_key_usage, usage);
    }
    CHECK(X509_sign(made.certificate, signer->key, EVP_sha256()) > 0);
    return made;
}

static inline void free_identity(identity *one)
{
    X509_free(one->certificate);
    EVP_PKEY_free(one->key);
}

static inline FILE *create(const char *name)
{
    FILE *file = fopen(path(name), "w");
    CHECK(file != NULL);
    return file;
}

/* What the file says: a certificate, a key, or both, in PEM. */
static inline void save(const char *name, X509 *certificate, EVP_PKEY *key, const char *passphrase)
{
    FILE *file = create(name);
    if (certificate != NULL) {
        CHECK(PEM_write_X509(file, certificate) == 1);
    }
    if (key != NULL && passphrase == NULL) {
        CHECK(PEM_write_PKCS8PrivateKey(file, key, NULL, NULL, 0, NULL, NULL) == 1);
    } else if (key != NULL) {
        CHECK(PEM_write_PKCS8PrivateKey(file, key, EVP_aes_128_cbc(), passphrase,
                                        (int)strlen(passphrase), NULL, NULL) == 1);
    }
    CHECK(fclose(file) == 0);
}

static inline void save_new(const char *name, const identity *issuer, const char *common,
                     const char *names, const char *usage, bool expired)
{
    identity made = make_identity(issuer, common, names, usage, false, expired);
    save(name, made.certificate, made.key, NULL);
    free_identity(&made);
}

static inline void copy_file(const char *from, const char *to)
{
    char buffer[8192];
    FILE *in = fopen(path(from), "r"), *out = create(to);
    CHECK(in != NULL);
    size_t size = fread(buffer, 1, sizeof buffer, in);
    CHECK(size < sizeof buffer && fwrite(buffer, 1, size, out) == size);
    CHECK(fclose(in) == 0 && fclose(out) == 0);
}

#define SERVER_NAMES "DNS:localhost,IP:127.0.0.1"

static inline void make_files(void)
{
    identity ca = make_identity(NULL, "Test CA", NULL, NULL, true, false);
    identity foreign = make_identity(NULL, "Foreign CA", NULL, NULL, true, false);
    identity server = make_identity(&ca, "server", SERVER_NAMES, "serverAuth", false, false);
    save("ca.pem", ca.certificate, NULL, NULL);
    save("ca_key.pem", ca.certificate, ca.key, NULL);
    save("foreign_ca.pem", foreign.certificate, NULL, NULL);
    save("server.pem", server.certificate, server.key, NULL);
    save("server_cert.pem", server.certificate, NULL, NULL);
    save("server_key.pem", NULL, server.key, NULL);
    save("locked_key.pem", NULL, server.key, "secret");
    save_new("server2.pem", &ca, "server2", SERVER_NAMES, "serverAuth", false);
    save_new("six.pem", &ca, "six", "DNS:localhost,IP:::1,IP:fe80::1", "serverAuth", false);
    save_new("other.pem", &ca, "other", "DNS:other.test", "serverAuth", false);
    save_new("wild.pem", &ca, "wild", "DNS:*.wild.test,DNS:f*.part.test", "serverAuth", false);
    save_new("exact.pem", &ca, "exact", "DNS:exact.wild.test", "serverAuth", false);
    save_new("good.pem", &ca, "good", NULL, "clientAuth", false);
    save_new("late.pem", &ca, "late", SERVER_NAMES, "serverAuth", true);
    save_new("expired.pem", &ca, "expired", NULL, "clientAuth", true);
    save_new("self.pem", NULL, "self", NULL, "clientAuth", false);
    save_new("foreign.pem", &foreign, "foreign", NULL, "clientAuth", false);
    save_new("purpose.pem", &ca, "purpose", NULL, "serverAuth", false);
    EVP_PKEY *other_kind = NULL;
    EVP_PKEY_CTX *maker = EVP_PKEY_CTX_new_id(EVP_PKEY_ED25519, NULL);
    CHECK(maker != NULL && EVP_PKEY_keygen_init(maker) == 1 && EVP_PKEY_keygen(maker, &other_kind) == 1);
    save("ed_key.pem", NULL, other_kind, NULL);
    EVP_PKEY_CTX_free(maker);
    EVP_PKEY_free(other_kind);
    FILE *file = create("garbage.pem");
    CHECK(fputs("this is no PEM\n", file) >= 0 && fclose(file) == 0);
    free_identity(&ca);
    free_identity(&foreign);
    free_identity(&server);
}

static inline void remove_files(void)
{
    if (getpid() == folder_owner) {
        DIR *all = opendir(folder);
        for (struct dirent *one; all != NULL && (one = readdir(all)) != NULL;) {
            unlink(path(one->d_name));
        }
        closedir(all);
        rmdir(folder);
    }
}

/* A file of the folder, whole. The text lives until eight more were asked for. */
static inline char *text_of(const char *name)
{
    static char texts[8][16384];
    static unsigned turn;
    char *text = texts[turn++ % 8];
    FILE *file = fopen(path(name), "r");
    CHECK(file != NULL);
    size_t size = fread(text, 1, sizeof texts[0] - 1, file);
    CHECK(size < sizeof texts[0] - 1 && fclose(file) == 0);
    text[size] = 0;
    return text;
}

static inline identity load_identity(const char *name)
{
    identity one;
    FILE *file = fopen(path(name), "r");
    CHECK(file != NULL);
    one.certificate = PEM_read_X509(file, NULL, NULL, NULL);
    rewind(file);
    one.key = PEM_read_PrivateKey(file, NULL, NULL, NULL);
    CHECK(one.certificate != NULL && one.key != NULL && fclose(file) == 0);
    return one;
}

static inline void append(const char *from, const char *to)
{
    FILE *file = fopen(path(to), "a");
    const char *text = text_of(from);
    CHECK(file != NULL && fputs(text, file) >= 0 && fclose(file) == 0);
}

/* A list of this CA's; revoked NULL = nobody is on it. Valid until so many seconds from now; 0 = it does not say. */
static inline void save_list(const char *name, const char *ca_name, const char *revoked, long end)
{
    identity ca = load_identity(ca_name);
    X509_CRL *list = X509_CRL_new();
    ASN1_TIME *time = ASN1_TIME_new();
    X509_CRL_set_version(list, 1);
    X509_CRL_set_issuer_name(list, X509_get_subject_name(ca.certificate));
    X509_gmtime_adj(time, -1000000);
    X509_CRL_set1_lastUpdate(list, time);
    if (end != 0) {
        X509_gmtime_adj(time, end);
        X509_CRL_set1_nextUpdate(list, time);
    }
    if (revoked != NULL) {
        identity one = load_identity(revoked);
        X509_REVOKED *entry = X509_REVOKED_new();
        X509_gmtime_adj(time, -1000);
        X509_REVOKED_set_serialNumber(entry, X509_get_serialNumber(one.certificate));
        X509_REVOKED_set_revocationDate(entry, time);
        CHECK(X509_CRL_add0_revoked(list, entry) == 1);
        free_identity(&one);
    }
    CHECK(X509_CRL_sort(list) == 1 && X509_CRL_sign(list, ca.key, EVP_sha256()) > 0);
    FILE *file = create(name);
    CHECK(PEM_write_X509_CRL(file, list) == 1 && fclose(file) == 0);
    ASN1_TIME_free(time);
    X509_CRL_free(list);
    free_identity(&ca);
}

/* What a CA answers about a certificate. end 0 = it says no end. */
static inline void save_answer(const char *name, const char *about, int status, long begin,
                               long end)
{
    identity ca = load_identity("ca_key.pem"), one = load_identity(about);
    OCSP_BASICRESP *basic = OCSP_BASICRESP_new();
    OCSP_CERTID *id = OCSP_cert_to_id(NULL, one.certificate, ca.certificate);
    ASN1_TIME *from = X509_gmtime_adj(NULL, begin), *until = X509_gmtime_adj(NULL, end),
              *when = X509_gmtime_adj(NULL, -1000);
    CHECK(OCSP_basic_add1_status(basic, id, status, 0,
                                 status == V_OCSP_CERTSTATUS_REVOKED ? when : NULL, from,
                                 end == 0 ? NULL : until) != NULL);
    CHECK(OCSP_basic_sign(basic, ca.certificate, ca.key, EVP_sha256(), NULL, 0) == 1);
    OCSP_RESPONSE *answer = OCSP_response_create(OCSP_RESPONSE_STATUS_SUCCESSFUL, basic);
    BIO *bio = BIO_new_file(path(name), "wb");
    CHECK(answer != NULL && bio != NULL && i2d_OCSP_RESPONSE_bio(bio, answer) == 1);
    BIO_free(bio);
    OCSP_RESPONSE_free(answer);
    OCSP_BASICRESP_free(basic);
    OCSP_CERTID_free(id);
    ASN1_TIME_free(from);
    ASN1_TIME_free(until);
    ASN1_TIME_free(when);
    free_identity(&ca);
    free_identity(&one);
}

__attribute__((constructor)) static void set_up(void)
{
    snprintf(folder, sizeof folder, "/tmp/tls_test.XXXXXX");
    CHECK(mkdtemp(folder) != NULL);
    folder_owner = getpid();
    CHECK(atexit(remove_files) == 0);
    make_files();
}

/* ---- servers ------------------------------------------------------------------------------*/

static tsrv_tls *server_tls __attribute__((unused)); /* of the running test */

static inline tsrv_tls_options server_options(void)
{
    tsrv_tls_options options;
    memset(&options, 0, sizeof options);
    options.cert_file = path("server.pem");
    return options;
}

static inline tsrv_tls *make_tls(const tsrv_tls_options *options)
{
    tsrv_tls *tls = NULL;
    CHECK_INT(tsrv_tls_new(&tls, options), TSRV_OK);
    CHECK(tls != NULL);
    return tls;
}

/* t_run over TLS. options NULL = those of server_options. */
static inline void run_tls(t_case *c, const tsrv_tls_options *options)
{
    tsrv_tls_options usual = server_options();
    server_tls = make_tls(options != NULL ? options : &usual);
    c->options.tls = server_tls;
    t_run(c);
    tsrv_tls_free(server_tls);
    server_tls = NULL;
}

static inline void serve_echo(void (*client)(int, void *), const tsrv_tls_options *options)
{
    t_case c = {echo_bytes, t_record_reason, client, NULL, {0}};
    run_tls(&c, options);
}

static inline void expect_refused(const tsrv_tls_options *options, int code, const char *word)
{
    tsrv_tls *tls = (tsrv_tls *)(void *)folder;
    t_watch_log_of(TSRV_LOG_INFO);
    CHECK_INT(tsrv_tls_new(&tls, options), code);
    CHECK(tls == NULL);
    if (t_logged() != 1 || strstr(t_log, word) == NULL) {
        T_FAIL("%d log lines, the last is \"%s\", without \"%s\"", t_logged(), t_log, word);
    }
}

static inline void reload_now(void *context)
{
    *(int *)context = tsrv_tls_reload(server_tls);
}

static inline int reload(void)
{
    int rc = 1;
    t_on_loop(reload_now, &rc);
    return rc;
}

/* A worker of its own process and its own port. */
static inline pid_t start_worker(tsrv_tls *tls, int *port)
{
    int result[2];
    CHECK(pipe(result) == 0);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        tsrv_server_options options;
        tsrv_address address;
        tsrv_server *server;
        memset(&options, 0, sizeof options);
        options.handle_stream = echo_bytes;
        options.loop = t_new_loop();
        options.mode = t_mode;
        options.tls = tls;
        CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
        CHECK_INT(tsrv_server_listen(server, 0, "127.0.0.1", NULL), TSRV_OK);
        CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
        *port = tsrv_address_port(&address);
        CHECK(write(result[1], port, sizeof *port) == sizeof *port);
        tsrv_loop_run(options.loop);
        _exit(1);
    }
    CHECK(read(result[0], port, sizeof *port) == sizeof *port);
    close(result[0]);
    close(result[1]);
    return pid;
}

static inline uint64_t handshakes_failed(void)
{
    return server_stats().handshakes_failed;
}

/* ---- clients: blocking, of OpenSSL --------------------------------------------------------*/

typedef struct dial {
    int version;             /* the only one offered; 0 = what OpenSSL offers */
    const char *server_name; /* SNI, and whose certificate it must be; NULL = localhost */
    const char *alpn;        /* as on the wire */
    const char *certificate; /* a file of the folder */
    const char *ciphers;     /* of TLS 1.2 */
    SSL_SESSION *session;    /* to resume */
    bool trusting;           /* does not look at the server's certificate */
    int receive_room;        /* SO_RCVBUF */
} dial;

static const dial usual __attribute__((unused)),
    tls_1_2 __attribute__((unused)) = {.version = TLS1_2_VERSION},
    tls_1_3 __attribute__((unused)) = {.version = TLS1_3_VERSION};

static inline SSL_CTX *dial_context(const dial *how)
{
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());
    CHECK(context != NULL);
    CHECK(SSL_CTX_load_verify_locations(context, path("ca.pem"), NULL) == 1);
    if (how->version != 0) {
        CHECK(SSL_CTX_set_min_proto_version(context, how->version) == 1);
        CHECK(SSL_CTX_set_max_proto_version(context, how->version) == 1);
    }
    if (how->ciphers != NULL) {
        CHECK(SSL_CTX_set_cipher_list(context, how->ciphers) == 1);
    }
    if (how->certificate != NULL) {
        const char *file = path(how->certificate);
        CHECK(SSL_CTX_use_certificate_chain_file(context, file) == 1);
        CHECK(SSL_CTX_use_PrivateKey_file(context, file, SSL_FILETYPE_PEM) == 1);
    }
    if (how->alpn != NULL) {
        CHECK(SSL_CTX_set_alpn_protos(context, (const unsigned char *)how->alpn,
                                      (unsigned)strlen(how->alpn)) == 0);
    }
    return context;
}

/* A client that has not begun its handshake, without a socket. */
static inline SSL *dial_ssl(const dial *how)
{
    const char *name = how->server_name != NULL ? how->server_name : "localhost";
    SSL_CTX *context = dial_context(how);
    SSL *ssl = SSL_new(context);
    t_block_sigpipe(); /* only the library promises that it raises none */
    ERR_clear_error();
    CHECK(ssl != NULL);
    SSL_CTX_free(context);
    SSL_set_connect_state(ssl);
    CHECK(SSL_set_tlsext_host_name(ssl, name) == 1);
    if (!how->trusting) {
        SSL_set_verify(ssl, SSL_VERIFY_PEER, NULL);
        CHECK(SSL_set1_host(ssl, name) == 1);
    }
    if (how->session != NULL) {
        CHECK(SSL_set_session(ssl, how->session) == 1);
    }
    return ssl;
}

/* On a socket that it owns from now on. */
static inline SSL *dial_on(int fd, const dial *how)
{
    SSL *ssl = dial_ssl(how);
    CHECK(SSL_set_fd(ssl, fd) == 1);
    return ssl;
}

static inline SSL *dial_start(int port, const dial *how)
{
    return dial_on(t_connect_with_room(port, how->receive_room), how);
}

static inline void expect_1(int rc, const char *what)
{
    if (rc != 1) {
        fprintf(stderr, "client: %s: ", what);
        ERR_print_errors_fp(stderr);
        T_FAIL("%s failed", what);
    }
}

static inline void shake_hands(SSL *ssl)
{
    expect_1(SSL_do_handshake(ssl), "handshake");
}

static inline SSL *dial_open(int port, const dial *how)
{
    SSL *ssl = dial_start(port, how);
    shake_hands(ssl);
    return ssl;
}

static inline void dial_send(SSL *ssl, const void *data, size_t size)
{
    size_t sent;
    expect_1(SSL_write_ex(ssl, data, size, &sent), "write");
    CHECK(sent == size);
}

static inline void dial_sends(SSL *ssl, const char *text)
{
    dial_send(ssl, text, strlen(text));
}

/* Receives until size bytes or an end. Returns how many; *kind is SSL_ERROR_NONE or the end. */
static inline size_t dial_recv(SSL *ssl, void *buffer, size_t size, int *kind)
{
    size_t got = 0;
    *kind = SSL_ERROR_NONE;
    while (got < size) {
        size_t more = 0;
        int rc;
        ERR_clear_error();
        rc = SSL_read_ex(ssl, (char *)buffer + got, size - got, &more);
        got += more;
        if (rc != 1) {
            *kind = SSL_get_error(ssl, rc);
            CHECK(*kind != SSL_ERROR_WANT_READ); /* its patience is over */
            break;
        }
    }
    return got;
}

static inline void dial_expect(SSL *ssl, const char *text)
{
    char buffer[1024];
    int kind;
    CHECK(strlen(text) <= sizeof buffer);
    size_t got = dial_recv(ssl, buffer, strlen(text), &kind);
    CHECK_MEM(buffer, got, text, strlen(text));
}

static inline void dial_free(SSL *ssl)
{
    int fd = SSL_get_fd(ssl);
    SSL_free(ssl);
    t_close(fd);
}

/* The server's close_notify, and then its FIN. */
static inline void dial_expect_end(SSL *ssl)
{
    char byte;
    int kind;
    size_t got = dial_recv(ssl, &byte, 1, &kind);
    CHECK_MEM(&byte, got, "", 0);
    CHECK_INT(kind, SSL_ERROR_ZERO_RETURN);
    CHECK((SSL_get_shutdown(ssl) & SSL_RECEIVED_SHUTDOWN) != 0);
    t_expect_eof(SSL_get_fd(ssl));
}

/* Says close_notify, and waits for the server's. */
static inline void dial_finish(SSL *ssl)
{
    CHECK(SSL_shutdown(ssl) >= 0);
    dial_expect_end(ssl);
    dial_free(ssl);
}

static inline void dial_echo(SSL *ssl, const char *text)
{
    dial_sends(ssl, text);
    dial_expect(ssl, text);
}

/* The handshake fails, at once or (TLS 1.3: a client's certificate) at the first read. Returns the
 * alert that told why; 0 = the connection merely ended. */
static inline int dial_refused(SSL *ssl)
{
    char byte;
    unsigned long code;
    int alert;
    ERR_clear_error();
    int rc = SSL_do_handshake(ssl);
    if (rc == 1) {
        rc = SSL_read(ssl, &byte, 1);
    }
    CHECK(rc <= 0);
    CHECK(SSL_get_error(ssl, rc) != SSL_ERROR_WANT_READ);
    CHECK(SSL_get_error(ssl, rc) != SSL_ERROR_ZERO_RETURN);
    code = ERR_peek_error();
    alert = code == 0 ? 0 : ERR_GET_REASON(code) - SSL_AD_REASON_OFFSET;
    ERR_clear_error();
    dial_free(ssl);
    return alert < 0 || alert > 255 ? 0 : alert;
}

static inline const char *peer_name(SSL *ssl, char *buffer, int size)
{
    X509 *certificate = SSL_get_peer_certificate(ssl);
    CHECK(certificate != NULL);
    CHECK(X509_NAME_get_text_by_NID(X509_get_subject_name(certificate), NID_commonName, buffer,
                                    size) > 0);
    X509_free(certificate);
    return buffer;
}

#endif /* TLS_H */
