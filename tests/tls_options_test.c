/* What may be set of TLS: texts instead of files, passwords, lists of revoked certificates, answers
 * to staple, on_server_name, ticket keys that turn over; the name of a peer; dates; SSLKEYLOGFILE.
 * The clients are OpenSSL's own. The library's wall clock can be put ahead, OpenSSL's goes right. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif

#include "seam.h"

#include <malloc.h>
#include <time.h>

static long wall_ahead; /* seconds; atomic */

static int wall_clock(clockid_t id, struct timespec *now)
{
    int rc = clock_gettime(id, now);
    now->tv_sec += id == CLOCK_REALTIME ? __atomic_load_n(&wall_ahead, __ATOMIC_RELAXED) : 0;
    return rc;
}

static const char *hidden;         /* must not be in memory that is given back; NULL = whatever */
static int hidden_frees, all_frees;

static void looking_free(void *memory)
{
    if (memory != NULL && hidden != NULL) {
        all_frees++;
        hidden_frees += memmem(memory, malloc_usable_size(memory), hidden, strlen(hidden)) != NULL;
    }
    t_free(memory);
}

#undef TSRV_FREE
#define TSRV_FREE(pointer) looking_free(pointer)
#undef t_sys_clock_gettime
#define t_sys_clock_gettime(...) wall_clock(__VA_ARGS__)

#include "tls.h"

#include <openssl/pkcs12.h>

static void expect_accepted(const tsrv_tls_options *options)
{
    t_watch_log_of(TSRV_LOG_INFO);
    tsrv_tls_free(make_tls(options));
    CHECK_INT(t_logged(), 0);
}

/* It is taken, and the log warns. */
static void expect_warned(const tsrv_tls_options *options, const char *word)
{
    t_watch_log_of(TSRV_LOG_INFO);
    tsrv_tls_free(make_tls(options));
    if (t_logged() != 1 || strstr(t_log, word) == NULL) {
        T_FAIL("%d log lines, the last is \"%s\", without \"%s\"", t_logged(), t_log, word);
    }
}

static int any_alert;

/* One connection: true = it was served, false = refused, and *alert tells why. */
static bool is_served(int port, const dial *how, int *alert)
{
    int count = t_record_count();
    SSL *ssl = dial_start(port, how);
    bool served;
    char byte;
    ERR_clear_error();
    served = SSL_do_handshake(ssl) == 1 && SSL_write(ssl, "x", 1) == 1 &&
             SSL_read(ssl, &byte, 1) == 1;
    unsigned long code = ERR_peek_error();
    *alert = code == 0 ? 0 : ERR_GET_REASON(code) - SSL_AD_REASON_OFFSET;
    ERR_clear_error();
    if (served) {
        dial_finish(ssl);
    } else {
        dial_free(ssl);
    }
    t_wait_records(count + 1);
    return served;
}

static void expect_served(int port, const dial *how)
{
    int alert;
    if (!is_served(port, how, &alert)) {
        T_FAIL("refused: alert %d, %s", alert, how->certificate == NULL ? "-" : how->certificate);
    }
}

static void expect_alert(int port, const dial *how, int expected)
{
    int alert;
    CHECK(!is_served(port, how, &alert));
    CHECK_INT(alert, expected);
}

/* ---- texts --------------------------------------------------------------------------------*/

TEST_ONCE(test_texts_and_files_exclude_each_other)
{
    tsrv_tls_options options = server_options();
    options.cert_pem = text_of("server.pem");
    expect_refused(&options, TSRV_EINVAL, "cert_file and cert_pem are both given");
    options.cert_file = NULL;
    options.key_file = path("server_key.pem");
    options.key_pem = text_of("server_key.pem");
    expect_refused(&options, TSRV_EINVAL, "key_file and key_pem are both given");
    options.key_file = NULL;
    options.ca_file = path("ca.pem");
    options.ca_pem = text_of("ca.pem");
    expect_refused(&options, TSRV_EINVAL, "ca_file and ca_pem are both given");
    options.ca_file = NULL;
    expect_accepted(&options);
    options.cert_pem = NULL;
    expect_refused(&options, TSRV_EINVAL, "there is a key and no certificate: key_pem");
}

TEST_ONCE(test_texts_that_cannot_be_used)
{
    tsrv_tls_options options = server_options();
    options.cert_file = NULL;
    options.cert_pem = "this is no PEM";
    expect_refused(&options, TSRV_ETLS, "TLS: cert_pem: no start line");
    options.cert_pem = "";
    expect_refused(&options, TSRV_ETLS, "TLS: cert_pem: ");
    options.cert_pem = text_of("server_cert.pem");
    expect_refused(&options, TSRV_ETLS, "TLS: the key in cert_pem: no start line");
    options.key_pem = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    expect_refused(&options, TSRV_ETLS, "TLS: key_pem: ");
    options.key_pem = text_of("other.pem");
    expect_refused(&options, TSRV_ETLS, "TLS: key_pem: it does not belong to the certificate");
    options.key_pem = text_of("server_key.pem");
    options.ca_pem = "nothing";
    expect_refused(&options, TSRV_ETLS, "TLS: ca_pem: no certificate in PEM format");
    options.ca_pem = text_of("server_key.pem");
    expect_refused(&options, TSRV_ETLS, "TLS: ca_pem: no certificate in PEM format");
    options.ca_pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    expect_refused(&options, TSRV_ETLS, "TLS: ca_pem: ");
    options.ca_pem = text_of("ca.pem");
    expect_accepted(&options);
    /* A certificate of the chain that is broken is not passed over. */
    static char broken[32768];
    snprintf(broken, sizeof broken, "%s%s", text_of("server.pem"),
             "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    options.cert_pem = broken;
    expect_refused(&options, TSRV_ETLS, "TLS: cert_pem: ");
}

/* A certificate to trust that is broken in itself is nobody's; the others of the file count. */
TEST_ONCE(test_authority_that_is_broken)
{
    tsrv_tls_options options = server_options();
    identity ca = load_identity("ca_key.pem");
    X509 *broken = X509_dup(ca.certificate);
    ASN1_OCTET_STRING *nothing = ASN1_OCTET_STRING_new();
    X509_EXTENSION *extension = NULL;
    CHECK(ASN1_OCTET_STRING_set(nothing, (const unsigned char *)"nothing", 7) == 1);
    X509_EXTENSION_free(X509_delete_ext(broken, X509_get_ext_by_NID(broken, NID_basic_constraints, -1)));
    extension = X509_EXTENSION_create_by_NID(NULL, NID_basic_constraints, 1, nothing);
    CHECK(extension != NULL && X509_add_ext(broken, extension, -1) == 1);
    CHECK(X509_sign(broken, ca.key, EVP_sha256()) > 0);
    save("broken.pem", broken, NULL, NULL);
    append("ca.pem", "broken.pem");
    options.ca_file = path("broken.pem");
    expect_accepted(&options);
    X509_EXTENSION_free(extension);
    ASN1_OCTET_STRING_free(nothing);
    X509_free(broken);
    free_identity(&ca);
}

/* Everything from texts; a reload, for which nothing on the disk is needed, changes nothing. */
static void texts_client(int port, void *context)
{
    dial how = {.certificate = "good.pem"};
    (void)context;
    for (int i = 0; i < 2; i++) {
        expect_served(port, &how);
        CHECK_INT(reload(), TSRV_OK);
    }
    how.certificate = "foreign.pem";
    expect_alert(port, &how, SSL_AD_UNKNOWN_CA);
}

TEST_SOFT(test_texts)
{
    t_case c = {echo_bytes, t_record_reason, texts_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    char *texts[] = {strdup(text_of("server_cert.pem")), strdup(text_of("server_key.pem")),
                     strdup(text_of("ca.pem"))};
    options.cert_file = NULL;
    options.cert_pem = texts[0];
    options.key_pem = texts[1];
    options.ca_pem = texts[2];
    options.verify_client = TSRV_TLS_REQUIRED;
    tsrv_set_log(t_no_log, NULL);
    server_tls = make_tls(&options);
    for (int i = 0; i < 3; i++) {
        memset(texts[i], '?', strlen(texts[i]));
        free(texts[i]);
    }
    c.options.tls = server_tls;
    t_run(&c);
    tsrv_tls_free(server_tls);
}

/* The chain is sent along, from a file and from a text. */
static void chain_client(int port, void *context)
{
    (void)context;
    expect_served(port, &usual);
    CHECK_INT(reload(), TSRV_OK);
    expect_served(port, &tls_1_2);
}

static void make_chain(const char *name, const char *usage)
{
    identity ca = load_identity("ca_key.pem");
    identity middle = make_identity(&ca, "middle", NULL, NULL, true, false);
    identity leaf = make_identity(&middle, "leaf", SERVER_NAMES, usage, false, false);
    save("middle.pem", middle.certificate, middle.key, NULL);
    save("leaf.pem", leaf.certificate, leaf.key, NULL);
    copy_file("leaf.pem", name);
    append("middle.pem", name);
    free_identity(&ca);
    free_identity(&middle);
    free_identity(&leaf);
}

static void run_chain(bool text)
{
    t_case c = {echo_bytes, t_record_reason, chain_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    make_chain("chain.pem", "serverAuth");
    options.cert_file = text ? NULL : path("chain.pem");
    options.cert_pem = text ? text_of("chain.pem") : NULL;
    run_tls(&c, &options);
}

TEST_SOFT(test_chain_in_a_file)
{
    run_chain(false);
}

TEST_SOFT(test_chain_in_a_text)
{
    run_chain(true);
}

/* A file is read anew, the text stays: they may not go together any more. */
TEST_ONCE(test_reload_of_a_file_with_a_key_that_is_a_text)
{
    tsrv_tls_options options = server_options();
    copy_file("server.pem", "reload.pem");
    options.cert_file = path("reload.pem");
    options.key_pem = text_of("server_key.pem");
    tsrv_tls *tls = make_tls(&options);
    CHECK_INT(tsrv_tls_reload(tls), TSRV_OK);
    copy_file("server2.pem", "reload.pem");
    t_watch_log_of(TSRV_LOG_INFO);
    CHECK_INT(tsrv_tls_reload(tls), TSRV_ETLS);
    CHECK(strstr(t_log, "key_pem: it does not belong to the certificate") != NULL);
    tsrv_tls_free(tls);
}

/* ---- passwords ----------------------------------------------------------------------------*/

/* A key as OpenSSL 0.9 has sealed it. */
static void save_old_key(const char *name)
{
    identity server = load_identity("server.pem");
    unsigned char secret[] = "secret";
    BIO *bio = BIO_new_file(path(name), "w");
    CHECK(bio != NULL && PEM_write_bio_PrivateKey_traditional(bio, server.key, EVP_aes_128_cbc(),
                                                              secret, 6, NULL, NULL) == 1);
    BIO_free(bio);
    free_identity(&server);
}

/* What the password opens is no key of a kind that anybody knows: as what a wrong one may make of it. */
static void save_opened_garbage(const char *name)
{
    static const unsigned char nothing[64];
    identity server = load_identity("server.pem");
    PKCS8_PRIV_KEY_INFO *key = EVP_PKEY2PKCS8(server.key);
    unsigned char *copy = (unsigned char *)OPENSSL_memdup(nothing, sizeof nothing);
    FILE *file = create(name);
    CHECK(key != NULL && PKCS8_pkey_set0(key, OBJ_nid2obj(NID_sha256), 0, V_ASN1_NULL, NULL, copy, sizeof nothing));
    X509_SIG *locked = PKCS8_encrypt(-1, EVP_aes_128_cbc(), "secret", 6, NULL, 0, 0, key);
    CHECK(locked != NULL && PEM_write_PKCS8(file, locked) == 1 && fclose(file) == 0);
    X509_SIG_free(locked);
    PKCS8_PRIV_KEY_INFO_free(key);
    free_identity(&server);
}

TEST_ONCE(test_key_password)
{
    static char both[32768], longer[2000];
    tsrv_tls_options options = server_options();
    tsrv_tls_certificate other = {"other.test", path("server_cert.pem"), path("locked_key.pem")};
    save_old_key("old_key.pem");
    for (int i = 0; i < 4; i++) {
        const char *locked = i % 2 == 0 ? "locked_key.pem" : "old_key.pem";
        memset(&options, 0, sizeof options);
        options.key_password = "secret";
        snprintf(both, sizeof both, "%s%s", text_of("server_cert.pem"), text_of(locked));
        options.cert_pem = both;
        if (i < 2) { /* else it is in cert_pem */
            options.cert_pem = text_of("server_cert.pem");
            options.key_file = path(locked);
        }
        expect_accepted(&options);
        options.key_password = "Secret";
        expect_refused(&options, TSRV_ETLS, "key_password does not open it");
        expect_refused(&options, TSRV_ETLS, i < 2 ? "TLS: key_file /" : "TLS: the key in cert_pem: ");
        options.key_password = "";
        expect_refused(&options, TSRV_ETLS, "key_password does not open it");
        memset(longer, 'x', sizeof longer - 1);
        options.key_password = longer;
        expect_refused(&options, TSRV_ETLS, "key_password does not open it");
        options.key_password = NULL;
        expect_refused(&options, TSRV_ETLS, "it is encrypted, and there is no key_password");
    }
    options = server_options(); /* which needs none */
    options.key_password = "secret";
    options.certificates = &other;
    options.certificate_count = 1;
    expect_accepted(&options);
    options.key_password = "terces";
    expect_refused(&options, TSRV_ETLS, "key_password does not open it");
    save_opened_garbage("opened_garbage.pem");
    other.key_file = path("opened_garbage.pem");
    options.key_password = "secret";
    expect_refused(&options, TSRV_ETLS, "key_password does not open it");
}

/* What is given back holds neither the password nor the key. */
TEST_ONCE(test_secrets_are_wiped)
{
    tsrv_tls_options options = server_options();
    char key[32], *text = text_of("server_key.pem");
    options.key_password = "a password that is easily found";
    options.cert_file = NULL;
    options.cert_pem = text_of("server_cert.pem");
    options.key_pem = text;
    memcpy(key, strchr(text, '\n') + 1, 31);
    key[31] = 0;
    for (int i = 0; i < 2; i++) {
        tsrv_tls *tls = make_tls(&options);
        hidden = i == 0 ? options.key_password : key;
        tsrv_tls_free(tls);
        CHECK(all_frees > 3);
        CHECK_INT(hidden_frees, 0);
        hidden = NULL;
    }
}

/* ---- dates --------------------------------------------------------------------------------*/

static void save_dated(const char *name, long begin, long end)
{
    identity ca = load_identity("ca_key.pem"),
             one = make_identity(&ca, "dated", SERVER_NAMES, "serverAuth", false, false);
    X509_gmtime_adj(X509_getm_notBefore(one.certificate), begin);
    X509_gmtime_adj(X509_getm_notAfter(one.certificate), end);
    CHECK(X509_sign(one.certificate, ca.key, EVP_sha256()) > 0);
    save(name, one.certificate, one.key, NULL);
    free_identity(&ca);
    free_identity(&one);
}

TEST_ONCE(test_dates)
{
    const long day = 86400;
    tsrv_tls_options options = server_options();
    char expected[128];
    options.cert_file = path("dated.pem");
    save_dated("dated.pem", -day, 8 * day);
    expect_accepted(&options);
    save_dated("dated.pem", -day, 6 * day);
    time_t end = time(NULL) + 6 * day;
    struct tm date;
    gmtime_r(&end, &date);
    snprintf(expected, sizeof expected, "/dated.pem: the certificate expires on %04d-%02d-%02d ",
             date.tm_year + 1900, date.tm_mon + 1, date.tm_mday);
    expect_warned(&options, expected);
    tsrv_tls_certificate one = {"other.test", path("dated.pem"), NULL};
    tsrv_tls_options others = server_options();
    others.certificates = &one;
    others.certificate_count = 1;
    expect_warned(&others, expected);
    save_dated("dated.pem", -10 * day, -day);
    expect_warned(&options, "TLS: cert_file /");
    expect_warned(&options, "/dated.pem: the certificate has expired on 20");
    save_dated("dated.pem", day, 100 * day);
    expect_warned(&options, "/dated.pem: the certificate is not valid before 20");
    options.cert_pem = text_of("dated.pem");
    options.cert_file = NULL;
    expect_warned(&options, "TLS: cert_pem: the certificate is not valid before 20");
    /* A reload says it again. */
    tsrv_tls *tls = make_tls(&options);
    t_watch_log_of(TSRV_LOG_INFO);
    CHECK_INT(tsrv_tls_reload(tls), TSRV_OK);
    CHECK_INT(t_logged(), 1);
    tsrv_tls_free(tls);
}

/* ---- lists of revoked certificates --------------------------------------------------------*/

TEST_ONCE(test_lists_that_cannot_be_used)
{
    tsrv_tls_options options = server_options();
    options.crl_file = path("missing.pem");
    expect_refused(&options, TSRV_ETLS, "TLS: crl_file /");
    expect_refused(&options, TSRV_ETLS, "/missing.pem: No such file or directory");
    options.crl_file = path("ca.pem");
    expect_refused(&options, TSRV_ETLS, "/ca.pem: no list of revoked certificates in PEM format");
    FILE *file = create("broken.crl");
    CHECK(fputs("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", file) >= 0);
    CHECK(fclose(file) == 0);
    options.crl_file = path("broken.crl");
    expect_refused(&options, TSRV_ETLS, "/broken.crl: ");
    save_list("ca.crl", "ca_key.pem", NULL, -1000);
    options.crl_file = path("ca.crl");
    expect_warned(&options, "/ca.crl: whom its CA has signed is refused: the list has expired on 20");
    save_list("ca.crl", "ca_key.pem", NULL, 100000);
    expect_accepted(&options);
    save_list("ca.crl", "ca_key.pem", NULL, 0);
    expect_accepted(&options);
}

static SSL_SESSION *session_of_dial(int port, const dial *how, bool *resumed)
{
    int count = t_record_count();
    SSL *ssl = dial_open(port, how);
    *resumed = SSL_session_reused(ssl) == 1;
    dial_echo(ssl, "hello"); /* TLS 1.3 sends its tickets behind the handshake */
    SSL_SESSION *session = SSL_get1_session(ssl);
    CHECK(session != NULL && SSL_SESSION_is_resumable(session));
    dial_finish(ssl);
    t_wait_records(count + 1);
    return session;
}

static void revoked_client(int port, void *context)
{
    (void)context;
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        dial good = {.version = version, .certificate = "good.pem"};
        bool resumed;
        save_list("ca.crl", "ca_key.pem", "expired.pem", 100000);
        CHECK_INT(reload(), TSRV_OK);
        expect_served(port, &good);
        good.session = session_of_dial(port, &good, &resumed);
        SSL_SESSION_free(session_of_dial(port, &good, &resumed));
        CHECK(resumed);
        CHECK_INT(reload(), TSRV_OK); /* the same list: sessions stay */
        SSL_SESSION_free(session_of_dial(port, &good, &resumed));
        CHECK(resumed);
        save_list("ca.crl", "ca_key.pem", "good.pem", 100000);
        CHECK_INT(reload(), TSRV_OK);
        expect_alert(port, &good, SSL_AD_CERTIFICATE_REVOKED); /* its session does not help it */
        SSL_SESSION_free(good.session);
        good.session = NULL;
        t_watch_log_of(TSRV_LOG_INFO);
        expect_alert(port, &good, SSL_AD_CERTIFICATE_REVOKED);
        CHECK(strstr(t_log, "certificate verify failed: certificate revoked") != NULL);
        tsrv_set_log(t_no_log, NULL);
        save_list("ca.crl", "ca_key.pem", NULL, -1000);
        CHECK_INT(reload(), TSRV_OK);
        CHECK(!is_served(port, &good, &any_alert));
        save_list("ca.crl", "other_ca.pem", NULL, 100000); /* another CA's */
        CHECK_INT(reload(), TSRV_OK);
        CHECK(!is_served(port, &good, &any_alert));
    }
}

TEST_SOFT(test_revoked_clients)
{
    t_case c = {echo_bytes, t_record_reason, revoked_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    identity other = make_identity(NULL, "Other CA", NULL, NULL, true, false);
    save("other_ca.pem", other.certificate, other.key, NULL);
    free_identity(&other);
    save_list("ca.crl", "ca_key.pem", NULL, 100000);
    options.ca_file = path("ca.pem");
    options.crl_file = path("ca.crl");
    options.verify_client = TSRV_TLS_REQUIRED;
    tsrv_set_log(t_no_log, NULL);
    run_tls(&c, &options);
}

/* Every CA of the chain needs a list, and one in the middle can be revoked. */
static void revoked_chain_client(int port, void *context)
{
    dial how = {.certificate = "chain.pem"};
    (void)context;
    CHECK(!is_served(port, &how, &any_alert)); /* the root's alone */
    append("middle.crl", "ca.crl");
    CHECK_INT(reload(), TSRV_OK);
    expect_served(port, &how);
    save_list("ca.crl", "ca_key.pem", "middle.pem", 100000);
    append("middle.crl", "ca.crl");
    CHECK_INT(reload(), TSRV_OK);
    expect_alert(port, &how, SSL_AD_CERTIFICATE_REVOKED);
    copy_file("middle.crl", "ca.crl"); /* the root's is missing */
    CHECK_INT(reload(), TSRV_OK);
    CHECK(!is_served(port, &how, &any_alert));
}

TEST_SOFT(test_revoked_chain)
{
    t_case c = {echo_bytes, t_record_reason, revoked_chain_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    make_chain("chain.pem", "clientAuth");
    save_list("ca.crl", "ca_key.pem", NULL, 100000);
    save_list("middle.crl", "middle.pem", NULL, 100000);
    options.ca_file = path("ca.pem");
    options.crl_file = path("ca.crl");
    options.verify_client = TSRV_TLS_OPTIONAL;
    tsrv_set_log(t_no_log, NULL);
    run_tls(&c, &options);
}

/* A client looks its server up, too. */
typedef struct attempt {
    int port;
    tsrv_tls *tls;
} attempt;

static void connect_now(void *context)
{
    const attempt *a = (const attempt *)context;
    tsrv_connect_options options;
    tsrv_stream *stream;
    memset(&options, 0, sizeof options);
    options.tls = a->tls;
    int rc = tsrv_connect("localhost", a->port, &options, &stream);
    if (rc == TSRV_OK) {
        rc = tsrv_wait_for_handshake(stream);
        tsrv_close(stream);
    }
    t_record(rc - 10);
}

static void spawn_connect(void *context)
{
    CHECK_INT(tsrv_spawn(t_loop, connect_now, context), TSRV_OK);
}

static void connecting_client(int port, void *context)
{
    tsrv_tls_options options;
    (void)context;
    for (int i = 0; i < 2; i++) {
        memset(&options, 0, sizeof options);
        save_list("ca.crl", "ca_key.pem", i == 0 ? NULL : "server.pem", 100000);
        options.ca_pem = text_of("ca.pem");
        options.crl_file = path("ca.crl");
        attempt a = {port, make_tls(&options)};
        t_records_used = 0;
        t_on_loop(spawn_connect, &a);
        t_wait_records(2);
        CHECK(t_recorded(0) == (i == 0 ? TSRV_OK : TSRV_ETLS) - 10 ||
              t_recorded(1) == (i == 0 ? TSRV_OK : TSRV_ETLS) - 10);
        tsrv_tls_free(a.tls);
    }
}

TEST_COROUTINE(test_revoked_server)
{
    t_case c = {echo_bytes, t_record_reason, connecting_client, NULL, {0}};
    tsrv_set_log(t_no_log, NULL);
    run_tls(&c, NULL);
}

/* ---- answers to staple --------------------------------------------------------------------*/

static void save_refusal(const char *name)
{
    OCSP_RESPONSE *answer = OCSP_response_create(OCSP_RESPONSE_STATUS_TRYLATER, NULL);
    BIO *bio = BIO_new_file(path(name), "wb");
    CHECK(answer != NULL && bio != NULL && i2d_OCSP_RESPONSE_bio(bio, answer) == 1);
    BIO_free(bio);
    OCSP_RESPONSE_free(answer);
}

TEST_ONCE(test_answers_that_cannot_be_used)
{
    tsrv_tls_options options = server_options();
    options.ocsp_file = path("missing.der");
    expect_refused(&options, TSRV_ETLS, "TLS: ocsp_file /");
    expect_refused(&options, TSRV_ETLS, "/missing.der: No such file or directory");
    options.ocsp_file = path("ca.pem");
    expect_refused(&options, TSRV_ETLS, "/ca.pem: it is no answer of OCSP in DER");
    options.ocsp_file = path("answer.der");
    save_refusal("answer.der");
    expect_refused(&options, TSRV_ETLS, "/answer.der: the CA has answered with an error");
    save_answer("answer.der", "other.pem", V_OCSP_CERTSTATUS_GOOD, -1000, 1000);
    expect_refused(&options, TSRV_ETLS, "/answer.der: it is about another certificate");
    save_answer("answer.der", "server.pem", V_OCSP_CERTSTATUS_REVOKED, -1000, 1000);
    expect_refused(&options, TSRV_ETLS, "that the certificate is not good");
    save_answer("answer.der", "server.pem", V_OCSP_CERTSTATUS_UNKNOWN, -1000, 1000);
    expect_refused(&options, TSRV_ETLS, "that the certificate is not good");
    save_answer("answer.der", "server.pem", V_OCSP_CERTSTATUS_GOOD, -2000, -1000);
    expect_warned(&options, "/answer.der: it is not stapled: it has expired on 20");
    save_answer("answer.der", "server.pem", V_OCSP_CERTSTATUS_GOOD, 5000, 9000);
    expect_warned(&options, "/answer.der: it is not stapled: it is not valid before 20");
    save_answer("answer.der", "server.pem", V_OCSP_CERTSTATUS_GOOD, 5000, 0);
    expect_warned(&options, "/answer.der: it is not stapled: it is not valid before 20");
    save_answer("answer.der", "server.pem", V_OCSP_CERTSTATUS_GOOD, -1000, 0);
    expect_accepted(&options);
    options.cert_file = NULL;
    expect_refused(&options, TSRV_EINVAL, "there is an ocsp_file and no certificate: /");
}

/* What is stapled for a client: a file's bytes, or NULL = nothing. */
static void expect_stapled(int port, int version, bool asks, const char *server_name,
                           const char *file)
{
    dial how = {.version = version, .server_name = server_name};
    unsigned char expected[4096];
    const unsigned char *stapled = NULL;
    int count = t_record_count();
    SSL *ssl = dial_start(port, &how);
    if (asks) {
        CHECK(SSL_set_tlsext_status_type(ssl, TLSEXT_STATUSTYPE_ocsp) == 1);
    }
    shake_hands(ssl);
    long size = SSL_get_tlsext_status_ocsp_resp(ssl, &stapled);
    if (file == NULL) {
        CHECK_INT(size, -1);
    } else {
        FILE *in = fopen(path(file), "rb");
        CHECK(in != NULL);
        size_t length = fread(expected, 1, sizeof expected, in);
        CHECK(fclose(in) == 0 && size > 0);
        CHECK_MEM(stapled, (size_t)size, expected, length);
    }
    dial_echo(ssl, "hello");
    dial_finish(ssl);
    t_wait_records(count + 1);
}

/* openssl s_client's own opinion. */
static bool s_client_says(int port, const char *options, const char *word)
{
    char command[1200], text[32768];
    if (system("command -v openssl >/dev/null") != 0) {
        SKIP("openssl");
    }
    snprintf(command, sizeof command,
             "openssl s_client -connect 127.0.0.1:%d -CAfile %s -verify_return_error %s "
             "</dev/null 2>&1", port, path("ca.pem"), options);
    FILE *tool = popen(command, "r");
    CHECK(tool != NULL);
    size_t size = fread(text, 1, sizeof text - 1, tool);
    text[size] = 0;
    pclose(tool);
    return strstr(text, word) != NULL;
}

static void stapled_client(int port, void *context)
{
    (void)context;
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        __atomic_store_n(&wall_ahead, 0, __ATOMIC_RELAXED);
        save_answer("answer.der", "server.pem", V_OCSP_CERTSTATUS_GOOD, -1000, 5000);
        copy_file("answer.der", "first.der");
        CHECK_INT(reload(), TSRV_OK);
        expect_stapled(port, version, true, NULL, "first.der");
        expect_stapled(port, version, false, NULL, NULL);
        expect_stapled(port, version, true, "other.test", NULL); /* another certificate's */
        save_answer("answer.der", "server.pem", V_OCSP_CERTSTATUS_GOOD, -1000, 6000);
        expect_stapled(port, version, true, NULL, "first.der");
        CHECK_INT(reload(), TSRV_OK);
        expect_stapled(port, version, true, NULL, "answer.der");
        copy_file("answer.der", "first.der");
        save_answer("answer.der", "other.pem", V_OCSP_CERTSTATUS_GOOD, -1000, 6000);
        CHECK_INT(reload(), TSRV_ETLS);
        expect_stapled(port, version, true, NULL, "first.der");
        __atomic_store_n(&wall_ahead, 5900, __ATOMIC_RELAXED);
        expect_stapled(port, version, true, NULL, "first.der");
        __atomic_store_n(&wall_ahead, 6100, __ATOMIC_RELAXED); /* it has expired meanwhile */
        expect_stapled(port, version, true, NULL, NULL);
    }
    __atomic_store_n(&wall_ahead, 0, __ATOMIC_RELAXED);
    CHECK(s_client_says(port, "-status", "OCSP Response Status: successful"));
    t_wait_records(15);
}

TEST_SOFT(test_stapled)
{
    t_case c = {echo_bytes, t_record_reason, stapled_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    tsrv_tls_certificate other = {"other.test", path("other.pem"), NULL};
    save_answer("answer.der", "server.pem", V_OCSP_CERTSTATUS_GOOD, -1000, 5000);
    options.ocsp_file = path("answer.der");
    options.certificates = &other;
    options.certificate_count = 1;
    tsrv_set_log(t_no_log, NULL);
    run_tls(&c, &options);
}

/* ---- on_server_name -----------------------------------------------------------------------*/

static tsrv_tls *chosen_tls; /* for other.test */
static tsrv_tls *bare_tls;   /* has no certificate */
static int asked;            /* atomic */
static char asked_name[256];

static int choose(const char *name, tsrv_tls **tls, void *context)
{
    CHECK(context == (void *)&chosen_tls);
    CHECK(*tls == NULL);
    snprintf(asked_name, sizeof asked_name, "%s", name);
    __atomic_add_fetch(&asked, 1, __ATOMIC_RELAXED);
    if (strcmp(name, "refused.test") == 0) {
        return -EPERM;
    }
    *tls = strcmp(name, "other.test") == 0 ? chosen_tls
           : strcmp(name, "bare.test") == 0             ? bare_tls
           : strcmp(name, "own.test") == 0              ? server_tls
                                                        : NULL;
    return TSRV_OK;
}

static tsrv_tls_options choosing_options(void)
{
    tsrv_tls_options options = server_options();
    options.on_server_name = choose;
    options.context = &chosen_tls;
    return options;
}

/* Serves with choosing_options, or others, and chosen_tls made of options. */
static void run_choosing(tsrv_handler handler, void (*client)(int, void *),
                         const tsrv_tls_options *own, const tsrv_tls_options *others)
{
    t_case c = {handler, t_record_reason, client, NULL, {0}};
    tsrv_tls_options empty, usual_options = choosing_options();
    memset(&empty, 0, sizeof empty);
    tsrv_set_log(t_no_log, NULL);
    chosen_tls = make_tls(others);
    bare_tls = make_tls(&empty);
    run_tls(&c, own != NULL ? own : &usual_options);
    tsrv_tls_free(chosen_tls);
    tsrv_tls_free(bare_tls);
}

static SSL *start_asking(int port, const dial *how, const char *alpn, const char *certificate)
{
    dial more = *how;
    more.alpn = alpn;
    more.certificate = certificate;
    return dial_start(port, &more);
}

static void expect_named(SSL *ssl, const char *common, const char *alpn)
{
    const unsigned char *protocol;
    unsigned size;
    char name[64];
    shake_hands(ssl);
    CHECK_STR(peer_name(ssl, name, sizeof name), common);
    SSL_get0_alpn_selected(ssl, &protocol, &size);
    CHECK_MEM(protocol, size, alpn, strlen(alpn));
    dial_echo(ssl, "hello");
    dial_finish(ssl);
}

/* Everything of the other one counts: certificate, ALPN, whether a certificate is asked for and of
 * which CA, versions. */
static void choosing_client(int port, void *context)
{
    static const char both[] = "\001a\001b";
    dial other = {.version = TLS1_3_VERSION, .server_name = "other.test"};
    (void)context;
    int before = __atomic_load_n(&asked, __ATOMIC_RELAXED);
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        dial own = {.version = version};
        expect_named(start_asking(port, &own, both, NULL), "server", "a");
        CHECK_STR(asked_name, "localhost");
        SSL *anonymous = start_asking(port, &own, both, NULL);
        CHECK(SSL_set_tlsext_host_name(anonymous, NULL) == 1);
        expect_named(anonymous, "server", "a");
        CHECK_STR(asked_name, "");
        own.server_name = "own.test";
        own.trusting = true;
        expect_named(start_asking(port, &own, both, NULL), "server", "a");
        own.server_name = "refused.test";
        CHECK_INT(dial_refused(start_asking(port, &own, both, NULL)), SSL_AD_UNRECOGNIZED_NAME);
        own.server_name = "bare.test";
        CHECK_INT(dial_refused(start_asking(port, &own, both, NULL)), SSL_AD_INTERNAL_ERROR);
    }
    expect_named(start_asking(port, &other, both, "good.pem"), "other", "b");
    CHECK_STR(asked_name, "other.test");
    CHECK_INT(dial_refused(start_asking(port, &other, both, NULL)), SSL_AD_CERTIFICATE_REQUIRED);
    CHECK_INT(dial_refused(start_asking(port, &other, both, "foreign.pem")), SSL_AD_UNKNOWN_CA);
    CHECK_INT(dial_refused(start_asking(port, &other, "\001a", "good.pem")),
              SSL_AD_NO_APPLICATION_PROTOCOL);
    other.version = TLS1_2_VERSION;
    CHECK_INT(dial_refused(start_asking(port, &other, both, "good.pem")),
              SSL_AD_PROTOCOL_VERSION);
    CHECK_INT(__atomic_load_n(&asked, __ATOMIC_RELAXED), before + 15);
    CHECK(s_client_says(port, "-servername other.test", "CN = other"));
    CHECK(s_client_says(port, "-servername localhost", "CN = server"));
    CHECK(s_client_says(port, "-servername refused.test", "unrecognized name"));
    t_wait_records(18);
}

TEST_STREAM(test_on_server_name)
{
    tsrv_tls_options own = choosing_options(), others = server_options();
    own.alpn = "a";
    others.cert_file = path("other.pem");
    others.ca_file = path("ca.pem");
    others.verify_client = TSRV_TLS_REQUIRED;
    others.min_version = TSRV_TLS_1_3;
    others.alpn = "b";
    run_choosing(echo_bytes, choosing_client, &own, &others);
}

/* The other way round: what the first one demands is not demanded by the other. */
static void lenient_client(int port, void *context)
{
    dial how = {.version = TLS1_2_VERSION};
    (void)context;
    CHECK_INT(dial_refused(dial_start(port, &how)), SSL_AD_PROTOCOL_VERSION);
    how.server_name = "other.test";
    expect_named(dial_start(port, &how), "other", "");
    t_wait_records(2);
}

TEST_SOFT(test_on_server_name_that_demands_less)
{
    tsrv_tls_options own = choosing_options(), others = server_options();
    own.ca_file = path("ca.pem");
    own.verify_client = TSRV_TLS_REQUIRED;
    own.min_version = TSRV_TLS_1_3;
    own.alpn = "a";
    others.cert_file = path("other.pem");
    run_choosing(echo_bytes, lenient_client, &own, &others);
}

/* The log says who has refused it, once. */
static void refused_client(int port, void *context)
{
    dial how = {.server_name = "refused.test"};
    (void)context;
    t_watch_log_of(TSRV_LOG_INFO);
    CHECK_INT(dial_refused(dial_start(port, &how)), SSL_AD_UNRECOGNIZED_NAME);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), TSRV_ETLS);
    CHECK_INT(t_logged(), 1);
    CHECK(strstr(t_log, ": on_server_name has refused the name") != NULL);
    CHECK_INT(handshakes_failed(), 1);
}

TEST_STREAM(test_on_server_name_refuses)
{
    tsrv_tls_options others = server_options();
    run_choosing(echo_bytes, refused_client, NULL, &others);
}

/* Certificates by name: those of the one that was chosen, and not of the first. */
static void nested_client(int port, void *context)
{
    dial how = {.server_name = "other.test"};
    (void)context;
    expect_named(dial_start(port, &how), "wild", "");
    how.server_name = "localhost";
    expect_named(dial_start(port, &how), "server2", "");
    t_wait_records(2);
}

TEST_SOFT(test_on_server_name_and_certificates)
{
    tsrv_tls_options own = choosing_options(), others = server_options();
    tsrv_tls_certificate of_own[] = {{"other.test", path("other.pem"), NULL},
                                     {"localhost", path("server2.pem"), NULL}};
    own.certificates = of_own;
    own.certificate_count = 2;
    others.cert_file = path("wildly.pem");
    identity ca = load_identity("ca_key.pem");
    save_new("wildly.pem", &ca, "wild", "DNS:other.test", "serverAuth", false);
    free_identity(&ca);
    run_choosing(echo_bytes, nested_client, &own, &others);
}

/* Who is known to one host is not known to another; where the rules are the same, sessions are. */
static void sessions_client(int port, void *context)
{
    (void)context;
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        dial own = {.version = version},
             other = {.version = version, .server_name = "other.test", .certificate = "good.pem"};
        bool resumed;
        own.session = session_of_dial(port, &own, &resumed);
        other.session = session_of_dial(port, &other, &resumed);
        CHECK(!resumed);
        SSL_SESSION_free(session_of_dial(port, &own, &resumed));
        CHECK(resumed);
        SSL_SESSION_free(session_of_dial(port, &other, &resumed));
        CHECK(resumed);
        /* Without a certificate, but with a session of the host that wants none. */
        dial thief = {.version = version, .server_name = "other.test", .session = own.session};
        CHECK(SSL_SESSION_set1_hostname(own.session, "other.test") == 1);
        CHECK(!is_served(port, &thief, &any_alert));
        CHECK_INT(any_alert, version == TLS1_2_VERSION ? SSL_AD_HANDSHAKE_FAILURE
                                                       : SSL_AD_CERTIFICATE_REQUIRED);
        /* And the other way round: served, and not by that session. */
        own.session = other.session;
        CHECK(SSL_SESSION_set1_hostname(other.session, "localhost") == 1);
        SSL_SESSION_free(session_of_dial(port, &own, &resumed));
        CHECK(!resumed);
        SSL_SESSION_free(thief.session);
        SSL_SESSION_free(other.session);
    }
}

TEST_STREAM(test_on_server_name_keeps_sessions_apart)
{
    tsrv_tls_options others = server_options();
    others.cert_file = path("other.pem");
    others.ca_file = path("ca.pem");
    others.verify_client = TSRV_TLS_REQUIRED;
    run_choosing(echo_bytes, sessions_client, NULL, &others);
}

static void remade_client(int port, void *context)
{
    tsrv_tls *first = chosen_tls;
    (void)context;
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        dial other = {.version = version, .server_name = "other.test", .certificate = "good.pem"};
        tsrv_tls_options others = server_options();
        bool resumed;
        other.session = session_of_dial(port, &other, &resumed);
        others.cert_file = path("other.pem");
        others.ca_file = path("ca.pem");
        others.verify_client = TSRV_TLS_REQUIRED;
        chosen_tls = make_tls(&others); /* as another worker would make one, of its own */
        SSL_SESSION_free(session_of_dial(port, &other, &resumed));
        CHECK(resumed);
        tsrv_tls_free(chosen_tls);
        chosen_tls = first;
        SSL_SESSION_free(other.session);
    }
}

TEST_SOFT(test_on_server_name_resumes_where_rules_are_the_same)
{
    tsrv_tls_options others = server_options();
    others.cert_file = path("other.pem");
    others.ca_file = path("ca.pem");
    others.verify_client = TSRV_TLS_REQUIRED;
    run_choosing(echo_bytes, remade_client, NULL, &others);
}

/* After a HelloRetryRequest it is not asked again. */
static int retry_then_echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    SSL *ssl = (SSL *)tsrv_tls_native(stream);
    if (tsrv_tls_version(stream)[0] == 0) {
        CHECK(SSL_set1_groups_list(ssl, "P-384") == 1);
    }
    return echo_bytes(stream, address, context);
}

static void retried_client(int port, void *context)
{
    dial how = {.version = TLS1_3_VERSION, .server_name = "other.test"};
    (void)context;
    SSL *ssl = dial_start(port, &how);
    CHECK(SSL_set1_groups_list(ssl, "X25519:P-384:P-256") == 1);
    expect_named(ssl, "other", "");
    CHECK_INT(__atomic_load_n(&asked, __ATOMIC_RELAXED), 1);
    how.server_name = "localhost"; /* this time nothing else is chosen */
    ssl = dial_start(port, &how);
    CHECK(SSL_set1_groups_list(ssl, "X25519:P-384:P-256") == 1);
    expect_named(ssl, "server", "");
    CHECK_INT(__atomic_load_n(&asked, __ATOMIC_RELAXED), 2);
    t_wait_records(2);
}

TEST_STREAM(test_on_server_name_and_retried_hello)
{
    tsrv_tls_options others = choosing_options(); /* it would be asked by the second hello */
    others.cert_file = path("other.pem");
    run_choosing(retry_then_echo, retried_client, NULL, &others);
}

/* The one that was chosen is freed between the server's answer and the client's, which with a
 * HelloRetryRequest is another hello: its protocols are still to be looked at. */
static void free_chosen(void *context)
{
    (void)context;
    tsrv_tls_free(chosen_tls);
    chosen_tls = NULL;
}

static void freed_client(int port, void *context)
{
    (void)context;
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        dial how = {.version = version, .server_name = "other.test", .alpn = "\001a"};
        SSL *ssl = dial_ssl(&how);
        CHECK(SSL_set1_groups_list(ssl, "X25519:P-384:P-256") == 1);
        BIO *out = BIO_new(BIO_s_mem());
        unsigned char hello[4096];
        int fd = t_connect(port);
        SSL_set_bio(ssl, BIO_new(BIO_s_mem()), out);
        CHECK(SSL_do_handshake(ssl) != 1);
        t_send(fd, hello, (size_t)BIO_read(out, hello, sizeof hello));
        CHECK(recv(fd, hello, 1, MSG_PEEK) == 1); /* the server has chosen */
        t_on_loop(free_chosen, NULL);
        CHECK(SSL_set_fd(ssl, fd) == 1);
        expect_named(ssl, "other", "a");
        tsrv_tls_options others = server_options();
        others.cert_file = path("other.pem");
        others.alpn = "a";
        chosen_tls = make_tls(&others);
    }
    t_wait_records(2);
}

TEST_STREAM(test_on_server_name_and_free)
{
    tsrv_tls_options others = server_options();
    others.cert_file = path("other.pem");
    others.alpn = "a";
    run_choosing(retry_then_echo, freed_client, NULL, &others);
}

/* A name that is none is refused before anybody is asked. */
static void malformed_client(int port, void *context)
{
    static const unsigned char name[] = "\000\014\000\000\011localhost";
    (void)context;
    for (int i = 0; i < 7; i++) {
        unsigned char hello[4096];
        SSL *ssl = dial_ssl(&usual);
        BIO *in = BIO_new(BIO_s_mem()), *out = BIO_new(BIO_s_mem());
        int fd = t_connect(port), before = __atomic_load_n(&asked, __ATOMIC_RELAXED);
        SSL_set_bio(ssl, in, out);
        CHECK(SSL_do_handshake(ssl) != 1);
        int size = BIO_read(out, hello, sizeof hello);
        unsigned char *at = (unsigned char *)memmem(hello, (size_t)size, name, sizeof name - 1);
        CHECK(at != NULL);
        switch (i) {
        case 0: at[2] = 1; break;    /* not a host's */
        case 1: at[1] = 13; break;   /* the list is longer than the message */
        case 2: at[4] = 10; break;   /* so is the name */
        case 3: at[4] = 8; break;    /* it is shorter */
        case 4: at[8] = 0; break;    /* it holds a NUL */
        case 5: at[4] = 0; break;    /* it is empty, and something follows */
        case 6: /* there is no room for a name's size; what is left is another extension */
            at[-1] = 4;
            memcpy(at + 4, "\377\360\000\006", 4);
            break;
        }
        t_send(fd, hello, (size_t)size);
        unsigned char alert[7];
        CHECK(t_recv(fd, alert, sizeof alert) == sizeof alert);
        CHECK_INT(alert[0], SSL3_RT_ALERT);
        CHECK_INT(alert[6], SSL_AD_DECODE_ERROR);
        t_close(fd);
        SSL_free(ssl);
        t_wait_records(i + 1);
        CHECK_INT(__atomic_load_n(&asked, __ATOMIC_RELAXED), before);
    }
}

/* Puts a byte into a hello's name, and counts it in all the sizes that it is in: of the record, of the message, of
 * the extensions, of this one, of its list, of the name. */
static size_t lengthen_name(unsigned char *hello, size_t size)
{
    size_t extensions = 44 + (size_t)hello[43];
    extensions += 2 + (size_t)(hello[extensions] << 8 | hello[extensions + 1]);
    extensions += 1 + (size_t)hello[extensions];
    unsigned char *name = (unsigned char *)memmem(hello, size, "aaaa", 4);
    CHECK(name != NULL && extensions < size);
    unsigned char *sizes[] = {hello + 3, hello + 7, hello + extensions, name - 7, name - 5, name - 2};
    for (size_t i = 0; i < COUNT(sizes); i++) {
        int more = (sizes[i][0] << 8 | sizes[i][1]) + 1;
        sizes[i][0] = (unsigned char)(more >> 8);
        sizes[i][1] = (unsigned char)more;
    }
    memmove(name + 1, name, size - (size_t)(name - hello));
    return size + 1;
}

/* The longest name that there is, and one that is longer. */
static void long_name_client(int port, void *context)
{
    char name[256];
    dial how = {.server_name = name, .trusting = true};
    (void)context;
    memset(name, 'a', 255);
    name[255] = 0;
    expect_named(dial_start(port, &how), "server", "");
    CHECK_STR(asked_name, name);
    unsigned char hello[4096], alert[7];
    SSL *ssl = dial_ssl(&how);
    BIO *in = BIO_new(BIO_s_mem()), *out = BIO_new(BIO_s_mem());
    int fd = t_connect(port);
    SSL_set_bio(ssl, in, out);
    CHECK(SSL_do_handshake(ssl) != 1);
    int size = BIO_read(out, hello, sizeof hello - 1);
    CHECK(size > 300);
    t_send(fd, hello, lengthen_name(hello, (size_t)size));
    CHECK(t_recv(fd, alert, sizeof alert) == sizeof alert);
    CHECK_INT(alert[0], SSL3_RT_ALERT);
    CHECK_INT(alert[6], SSL_AD_DECODE_ERROR);
    t_close(fd);
    SSL_free(ssl);
    t_wait_records(2);
}

TEST_STREAM(test_on_server_name_and_long_names)
{
    tsrv_tls_options others = server_options();
    run_choosing(echo_bytes, long_name_client, NULL, &others);
}

/* A context whose versions are no TLS's cannot be gone on with. */
static void datagram_client(int port, void *context)
{
    dial how = {.server_name = "other.test"};
    (void)context;
    CHECK(SSL_CTX_set_max_proto_version(server_tls->set->context, TLS1_3_VERSION) == 1); /* as openssl.cnf can */
    CHECK_INT(dial_refused(dial_start(port, &how)), SSL_AD_INTERNAL_ERROR);
    how.server_name = NULL;
    expect_named(dial_start(port, &how), "server", "");
    t_wait_records(2);
}

TEST_SOFT(test_on_server_name_chooses_a_context_for_datagrams)
{
    tsrv_tls_options others;
    SSL_CTX *native = SSL_CTX_new(DTLS_server_method());
    CHECK(SSL_CTX_set_min_proto_version(native, DTLS1_2_VERSION) == 1);
    memset(&others, 0, sizeof others);
    others.native_context = native;
    run_choosing(echo_bytes, datagram_client, NULL, &others);
    SSL_CTX_free(native);
}

TEST_STREAM(test_on_server_name_and_malformed_names)
{
    tsrv_tls_options others = server_options();
    run_choosing(echo_bytes, malformed_client, NULL, &others);
}

/* ---- ticket keys --------------------------------------------------------------------------*/

static void put_ahead(long seconds)
{
    __atomic_store_n(&wall_ahead, seconds, __ATOMIC_RELAXED);
}

/* How far to put the clock ahead for `into` seconds behind the begin of a period. */
static long period_begin(long hours, long into)
{
    long length = hours * 3600, now = (long)time(NULL);
    return length - now % length + into;
}

static bool is_resumed(int port, const dial *how, SSL_SESSION *session)
{
    dial again = *how;
    bool resumed;
    again.session = session;
    SSL_SESSION_free(session_of_dial(port, &again, &resumed));
    return resumed;
}

static void key_name(const SSL_SESSION *session, unsigned char *name)
{
    const unsigned char *ticket;
    size_t size;
    SSL_SESSION_get0_ticket(session, &ticket, &size);
    CHECK(size > 16);
    memcpy(name, ticket, 16);
}

/* A ticket lives for two hours: so do keys, behind the time in which they seal. */
static void turning_client(int port, void *context)
{
    long hours = *(long *)context, length = hours * 3600;
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        dial how = {.version = version};
        long begin = period_begin(hours, 60), end = begin + length - 120;
        unsigned char names[3][16];
        bool resumed;
        put_ahead(begin);
        SSL_SESSION *first = session_of_dial(port, &how, &resumed);
        CHECK(is_resumed(port, &how, first));
        put_ahead(end);
        CHECK(is_resumed(port, &how, first));
        SSL_SESSION *last = session_of_dial(port, &how, &resumed);
        put_ahead(end + 120); /* a new key */
        CHECK(is_resumed(port, &how, last));
        how.session = last;
        SSL_SESSION *renewed = session_of_dial(port, &how, &resumed);
        CHECK(resumed);
        how.session = NULL;
        key_name(first, names[0]);
        key_name(last, names[1]);
        key_name(renewed, names[2]);
        CHECK_MEM(names[0], 16, names[1], 16);
        CHECK(memcmp(names[1], names[2], 16) != 0);
        put_ahead(end + 7200); /* a minute before two hours are over */
        CHECK(is_resumed(port, &how, last));
        put_ahead(end + 7200 + 120);
        CHECK(!is_resumed(port, &how, last));
        CHECK(is_resumed(port, &how, renewed));
        put_ahead(begin); /* the clock was put back: the key is of the future */
        CHECK(!is_resumed(port, &how, renewed));
        SSL_SESSION_free(first);
        SSL_SESSION_free(last);
        SSL_SESSION_free(renewed);
    }
}

static void run_turning(int option, long hours)
{
    t_case c = {echo_bytes, t_record_reason, turning_client, &hours, {0}};
    tsrv_tls_options options = server_options();
    options.ticket_hours = option;
    run_tls(&c, &options);
}

TEST_SOFT(test_ticket_keys_turn_over_each_day)
{
    run_turning(0, 24);
}

TEST_SOFT(test_ticket_keys_turn_over_each_hour)
{
    run_turning(1, 1);
}

TEST_SOFT(test_ticket_keys_turn_over_each_week)
{
    run_turning(168, 168);
}

static void constant_client(int port, void *context)
{
    (void)context;
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        dial how = {.version = version};
        bool resumed;
        put_ahead(0);
        SSL_SESSION *first = session_of_dial(port, &how, &resumed);
        put_ahead(1000L * 86400);
        CHECK(is_resumed(port, &how, first));
        SSL_SESSION_free(first);
    }
}

TEST_SOFT(test_ticket_key_that_stays)
{
    t_case c = {echo_bytes, t_record_reason, constant_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    options.ticket_hours = TSRV_NEVER;
    run_tls(&c, &options);
}

TEST_ONCE(test_ticket_hours)
{
    tsrv_tls_options options = server_options();
    options.ticket_hours = -2;
    expect_refused(&options, TSRV_EINVAL, "ticket_hours");
    options.ticket_hours = INT_MAX;
    expect_accepted(&options);
}

/* Workers, one that is forked a day later, and behind a reload: all have the same keys. Another
 * tsrv_tls has others. */
TEST_SOFT(test_ticket_keys_of_workers)
{
    tsrv_tls_options options = server_options();
    tsrv_tls *tls = make_tls(&options), *another = make_tls(&options);
    long begin = period_begin(24, 86400 - 60);
    int ports[4];
    pid_t pids[4];
    for (int i = 0; i < 4; i++) {
        put_ahead(begin + (i >= 2 ? 120 : 0)); /* they inherit it: the next period */
        if (i == 2) {
            CHECK_INT(tsrv_tls_reload(tls), TSRV_OK);
        }
        pids[i] = start_worker(i == 3 ? another : tls, &ports[i]);
    }
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        for (int i = 0; i < 4; i++) {
            dial how = {.version = version};
            SSL *ssl = dial_open(ports[0], &how);
            dial_echo(ssl, "hello");
            how.session = SSL_get1_session(ssl);
            dial_finish(ssl);
            ssl = dial_open(ports[i], &how);
            CHECK_INT(SSL_session_reused(ssl), i < 3);
            dial_echo(ssl, "hello");
            dial_finish(ssl);
            SSL_SESSION_free(how.session);
        }
    }
    for (int i = 0; i < 4; i++) {
        CHECK(kill(pids[i], SIGKILL) == 0 && waitpid(pids[i], NULL, 0) == pids[i]);
    }
    tsrv_tls_free(tls);
    tsrv_tls_free(another);
}

/* To trust another CA is to ask everybody again. */
static void distrusted_client(int port, void *context)
{
    (void)context;
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        dial how = {.version = version, .certificate = "good.pem"};
        bool resumed;
        copy_file("ca.pem", "trusted.pem");
        CHECK_INT(reload(), TSRV_OK);
        how.session = session_of_dial(port, &how, &resumed);
        CHECK_INT(reload(), TSRV_OK);
        SSL_SESSION_free(session_of_dial(port, &how, &resumed));
        CHECK(resumed);
        copy_file("foreign_ca.pem", "trusted.pem");
        CHECK_INT(reload(), TSRV_OK);
        expect_alert(port, &how, SSL_AD_UNKNOWN_CA);
        SSL_SESSION_free(how.session);
    }
}

TEST_SOFT(test_another_ca_ends_sessions)
{
    t_case c = {echo_bytes, t_record_reason, distrusted_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    copy_file("ca.pem", "trusted.pem");
    options.ca_file = path("trusted.pem");
    options.verify_client = TSRV_TLS_REQUIRED;
    tsrv_set_log(t_no_log, NULL);
    run_tls(&c, &options);
}

/* ---- the name of a peer -------------------------------------------------------------------*/

static int tell_name(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    char name[512];
    tsrv_slice line;
    name[0] = 'x';
    if (tsrv_wait(stream, 0) == TSRV_ETIMEOUT && tsrv_tls_version(stream)[0] == 0) {
        CHECK_INT(tsrv_tls_peer_name(stream, name, sizeof name), TSRV_EINVAL);
        CHECK_STR(name, "");
    }
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    (void)address, (void)context;
    memset(name, 'x', sizeof name);
    if (rc == TSRV_OK) {
        int code = tsrv_tls_peer_name(stream, name, (size_t)atoi(line.data));
        rc = tsrv_printf(stream, "%d %s\n", code, name[0] == 'x' ? "-" : name);
    }
    return rc;
}

static void expect_name(int port, const char *certificate, int size, int code, const char *name)
{
    dial how = {.certificate = certificate};
    char expected[600], question[16];
    SSL *ssl = dial_open(port, &how);
    snprintf(question, sizeof question, "%d\n", size);
    snprintf(expected, sizeof expected, "%d %s\n", code, name);
    dial_sends(ssl, question);
    dial_expect(ssl, expected);
    dial_free(ssl);
}

/* The subject: a country, and a common name of bytes that must not come through. */
static void save_named(const char *name, const unsigned char *common, int size, bool empty)
{
    identity ca = load_identity("ca_key.pem"),
             one = make_identity(&ca, "named", NULL, "clientAuth", false, false);
    X509_NAME *subject = X509_NAME_new();
    CHECK(subject != NULL);
    if (!empty) {
        CHECK(X509_NAME_add_entry_by_txt(subject, "C", MBSTRING_ASC, (const unsigned char *)"DE",
                                         -1, -1, 0) == 1);
        CHECK(X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_UTF8, common, size, -1, 0) == 1);
    }
    CHECK(X509_set_subject_name(one.certificate, subject) == 1);
    CHECK(X509_sign(one.certificate, ca.key, EVP_sha256()) > 0);
    save(name, one.certificate, one.key, NULL);
    X509_NAME_free(subject);
    free_identity(&ca);
    free_identity(&one);
}

static void named_client(int port, void *context)
{
    static const unsigned char odd[] = "a,b+\"\n\033[1m\303\244\0z";
    (void)context;
    save_named("named.pem", (const unsigned char *)"alice", -1, false);
    save_named("odd.pem", odd, (int)sizeof odd - 1, false);
    save_named("empty.pem", odd, 0, true);
    expect_name(port, "named.pem", 512, TSRV_OK, "CN=alice,C=DE");
    expect_name(port, "named.pem", 14, TSRV_OK, "CN=alice,C=DE");
    expect_name(port, "named.pem", 13, TSRV_ETOOLONG, "CN=alice,C=D");
    expect_name(port, "named.pem", 1, TSRV_ETOOLONG, "");
    expect_name(port, "named.pem", 0, TSRV_ETOOLONG, "-");
    expect_name(port, "odd.pem", 512, TSRV_OK,
                "CN=a\\,b\\+\\\"\\0A\\1B[1m\\C3\\A4\\00z,C=DE");
    expect_name(port, "empty.pem", 512, TSRV_OK, "");
    expect_name(port, "empty.pem", 1, TSRV_OK, "");
    expect_name(port, NULL, 512, TSRV_EINVAL, "");
    expect_name(port, NULL, 0, TSRV_EINVAL, "-");
    t_wait_records(10);
}

TEST_STREAM(test_peer_name)
{
    t_case c = {tell_name, t_record_reason, named_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    options.ca_file = path("ca.pem");
    options.verify_client = TSRV_TLS_OPTIONAL;
    tsrv_set_log(t_no_log, NULL);
    run_tls(&c, &options);
}

static int plain_name(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    char name[8] = "x";
    (void)address, (void)context;
    CHECK_INT(tsrv_tls_peer_name(stream, name, sizeof name), TSRV_EINVAL);
    CHECK_STR(name, "");
    return TSRV_OK;
}

TEST_SOFT(test_peer_name_of_plain_stream)
{
    t_case c = {plain_name, NULL, expect_end, NULL, {0}};
    t_run(&c);
}

/* ---- SSLKEYLOGFILE ------------------------------------------------------------------------*/

static void logged_client(int port, void *context)
{
    (void)context;
    expect_served(port, &tls_1_2);
    expect_served(port, &tls_1_3);
}

TEST_SOFT(test_key_log)
{
    t_case c = {echo_bytes, t_record_reason, logged_client, NULL, {0}};
    tsrv_tls_options options = server_options();
    struct stat file;
    umask(0);
    unlink(path("keys"));
    CHECK(setenv("SSLKEYLOGFILE", "", 1) == 0);
    expect_accepted(&options);
    CHECK(setenv("SSLKEYLOGFILE", path("keys"), 1) == 0);
    t_watch_log();
    run_tls(&c, &options);
    tsrv_tls_free(make_tls(&options));
#ifdef TSRV_DEBUG
    char *text = text_of("keys");
    CHECK_INT(t_logged(), 1);
    CHECK(strstr(t_log, "TSRV_DEBUG: the keys of all TLS sessions go to SSLKEYLOGFILE, ") != NULL);
    CHECK(stat(path("keys"), &file) == 0);
    CHECK_INT(file.st_mode & 07777, 0600);
    CHECK(strncmp(text, "CLIENT_RANDOM ", 14) == 0);
    CHECK(strstr(text, "\nSERVER_TRAFFIC_SECRET_0 ") != NULL);
    CHECK_INT(t_count(text, "\nCLIENT_TRAFFIC_SECRET_0 "), 1);
    CHECK(text[strlen(text) - 1] == '\n');
    /* Where the file is gone, or is not asked for any more, and for what is no line, nothing is written. */
    size_t size = strlen(text);
    char line[600];
    memset(line, 'x', sizeof line - 1);
    line[sizeof line - 1] = 0;
    tsrvi_tls_keep_key(NULL, line);
    CHECK(setenv("SSLKEYLOGFILE", path("missing/keys"), 1) == 0);
    tsrvi_tls_keep_key(NULL, "line");
    CHECK(unsetenv("SSLKEYLOGFILE") == 0);
    tsrvi_tls_keep_key(NULL, "line");
    CHECK_INT(strlen(text_of("keys")), size);
#else
    CHECK_INT(t_logged(), 0);
    CHECK(stat(path("keys"), &file) < 0);
#endif
}

/* ---- a context of the program's, and no memory --------------------------------------------*/

/* All but alpn is left alone, as before. */
static void native_client(int port, void *context)
{
    dial how = {.server_name = "refused.test", .trusting = true};
    (void)context;
    expect_served(port, &how);
    CHECK_INT(__atomic_load_n(&asked, __ATOMIC_RELAXED), 0);
}

TEST_SOFT(test_native_context_ignores_the_rest)
{
    t_case c = {echo_bytes, t_record_reason, native_client, NULL, {0}};
    tsrv_tls_options options = choosing_options();
    SSL_CTX *native = SSL_CTX_new(TLS_server_method());
    CHECK(SSL_CTX_use_certificate_chain_file(native, path("server.pem")) == 1);
    CHECK(SSL_CTX_use_PrivateKey_file(native, path("server.pem"), SSL_FILETYPE_PEM) == 1);
    options.native_context = native;
    options.cert_file = NULL;
    options.cert_pem = "nothing";
    options.crl_file = options.ocsp_file = path("missing.pem");
    run_tls(&c, &options);
    options.cert_pem = NULL;
    options.verify_client = TSRV_TLS_REQUIRED;
    tsrv_tls_free(make_tls(&options));
    SSL_CTX_free(native);
}

/* Several may have the same one: each has its own names, or none, however many come and go. */
static const char *native_names;

static void client_of_several(int port, void *context)
{
    dial how = {.alpn = "\001a\001b"};
    (void)context;
    expect_named(dial_start(port, &how), "server", native_names);
}

TEST_SOFT(test_native_context_of_several)
{
    static const char *const names[] = {"a", "b", NULL, "b,a"};
    SSL_CTX *native = SSL_CTX_new(TLS_server_method());
    tsrv_tls *several[4];
    CHECK(SSL_CTX_use_certificate_chain_file(native, path("server.pem")) == 1);
    CHECK(SSL_CTX_use_PrivateKey_file(native, path("server.pem"), SSL_FILETYPE_PEM) == 1);
    for (int i = 0; i < 4; i++) {
        tsrv_tls_options options;
        memset(&options, 0, sizeof options);
        options.native_context = native;
        options.alpn = names[i];
        several[i] = make_tls(&options);
    }
    for (int i = 0; i < 4; i++) {
        t_case c = {echo_bytes, t_record_reason, client_of_several, NULL, {0}};
        c.options.tls = several[i];
        native_names = i == 0 ? "a" : i == 2 ? "" : "b";
        t_run(&c);
        tsrv_tls_free(several[i]);
    }
    SSL_CTX_free(native);
}

/* Chosen by on_server_name, it counts as it is. */
static void chosen_native_client(int port, void *context)
{
    dial how = {.version = TLS1_2_VERSION, .server_name = "other.test"};
    (void)context;
    CHECK_INT(dial_refused(dial_start(port, &how)), SSL_AD_PROTOCOL_VERSION);
    how.version = TLS1_3_VERSION;
    expect_named(dial_start(port, &how), "other", "");
    t_wait_records(2);
}

TEST_SOFT(test_on_server_name_chooses_a_native_context)
{
    tsrv_tls_options own = choosing_options(), others;
    tsrv_tls_certificate of_own = {"other.test", path("server.pem"), NULL};
    SSL_CTX *native = SSL_CTX_new(TLS_server_method());
    CHECK(SSL_CTX_use_certificate_chain_file(native, path("other.pem")) == 1);
    CHECK(SSL_CTX_use_PrivateKey_file(native, path("other.pem"), SSL_FILETYPE_PEM) == 1);
    SSL_CTX_set_options(native, SSL_OP_NO_TLSv1 | SSL_OP_NO_TLSv1_1 | SSL_OP_NO_TLSv1_2);
    memset(&others, 0, sizeof others);
    others.native_context = native;
    own.certificates = &of_own;
    own.certificate_count = 1;
    own.alpn = "a";
    run_choosing(echo_bytes, chosen_native_client, &own, &others);
    SSL_CTX_free(native);
}

TEST_ONCE(test_no_memory_for_options)
{
    tsrv_tls_options options = choosing_options();
    tsrv_tls *tls;
    int rc;
    save_list("ca.crl", "ca_key.pem", NULL, 100000);
    save_answer("answer.der", "server.pem", V_OCSP_CERTSTATUS_GOOD, -1000, 5000);
    options.cert_file = NULL;
    options.cert_pem = text_of("server_cert.pem");
    options.key_pem = text_of("locked_key.pem");
    options.key_password = "secret";
    options.ca_pem = text_of("ca.pem");
    options.crl_file = path("ca.crl");
    options.ocsp_file = path("answer.der");
    tsrv_set_log(t_no_log, NULL);
    for (long k = 1;; k++) {
        t_fail_call("malloc", 0, k, false);
        rc = tsrv_tls_new(&tls, &options);
        t_fault_at = 0;
        if (t_fault_hits == 0) {
            CHECK(k > 8);
            break;
        }
        CHECK_INT(rc, -ENOMEM);
        CHECK(tls == NULL);
    }
    CHECK_INT(rc, TSRV_OK);
    tsrv_tls_free(tls);
    CHECK_INT(t_live_allocations, 0);
}
