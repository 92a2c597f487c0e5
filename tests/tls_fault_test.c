/* OpenSSL without memory: each of its allocations fails in turn, once, and from there on, while contexts are made and
 * read anew and while servers and clients have their handshakes. What fails has to be a code, and never a crash; what
 * works in spite of it is whole; nothing leaks; what was there before stays as it was, and the next client is served.
 * The clients live in the loop's own thread, so that every run is the same as the one before.
 * FAULT=n in the environment has only the n-th allocation fail. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif

#include <openssl/crypto.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef __GLIBC__
#include <execinfo.h>
#endif

static bool o_armed;            /* now they are counted, and may fail */
static bool o_sticky;           /* all later ones fail too */
static long o_at;               /* which fails; 0 = none */
static long o_calls;            /* that were counted */
static long o_hits;             /* that have failed */
static long o_live;             /* allocations that were not freed yet */
static const char *o_file = ""; /* of OpenSSL: where the first one has failed */
static int o_line;
static void (*o_seen)(void);    /* called once, by the next allocation; NULL = nothing */
static bool o_choosing;         /* no run with a fault: which are to fail? */

/* One run makes thousands of allocations, and most of them again and again by the same way. Of each way, which is the
 * functions that it leads through, one is to fail. */
#define O_WAYS (1 << 16)
#define O_MOST (O_WAYS / 2)
static uint64_t o_ways[O_WAYS]; /* a hash table; 0 = free */
static long o_chosen[O_MOST];
static int o_count; /* of them */

static uint64_t o_mixed(uint64_t hash, uint64_t more)
{
    hash = (hash ^ more) * 0x9E3779B97F4A7C15u;
    return hash ^ hash >> 29;
}

/* Without glibc a way is where the last three allocations were. */
static uint64_t o_way(const char *file, int line)
{
    static uint64_t before[2];
    uint64_t here = o_mixed((uint64_t)(uintptr_t)file, (uint64_t)line), hash = here;
#ifdef __GLIBC__
    void *frames[64];
    int depth = backtrace(frames, 64);
    for (int i = 0; i < depth; i++) {
        hash = o_mixed(hash, (uint64_t)(uintptr_t)frames[i]);
    }
#else
    hash = o_mixed(o_mixed(hash, before[0]), before[1]);
#endif
    before[1] = before[0];
    before[0] = here;
    return hash | 1;
}

static void o_choose(const char *file, int line)
{
    uint64_t way = o_way(file, line);
    size_t i = (size_t)(way >> 40) % O_WAYS;
    while (o_ways[i] != 0 && o_ways[i] != way) {
        i = (i + 1) % O_WAYS;
    }
    if (o_ways[i] == 0 && o_count < O_MOST) {
        o_ways[i] = way;
        o_chosen[o_count++] = o_calls;
    }
}

static bool o_fails(const char *file, int line)
{
    if (o_seen != NULL) {
        void (*seen)(void) = o_seen;
        o_seen = NULL;
        seen();
    }
    if (!o_armed) {
        return false;
    }
    o_calls++;
    if (o_choosing) {
        o_choose(file, line);
    }
    if (o_at == 0 || o_calls < o_at || (o_calls > o_at && !o_sticky)) {
        return false;
    }
    if (o_hits++ == 0) {
        o_file = file;
        o_line = line;
    }
    return true;
}

static void *o_malloc(size_t size, const char *file, int line)
{
    void *memory = size == 0 || o_fails(file, line) ? NULL : malloc(size);
    o_live += memory != NULL;
    return memory;
}

static void o_free(void *memory, const char *file, int line)
{
    (void)file, (void)line;
    o_live -= memory != NULL;
    free(memory);
}

static void *o_realloc(void *old, size_t size, const char *file, int line)
{
    if (old == NULL) {
        return o_malloc(size, file, line);
    }
    if (size == 0) {
        o_free(old, file, line);
        return NULL;
    }
    return o_fails(file, line) ? NULL : realloc(old, size);
}

static int o_refused; /* OpenSSL had allocated before */

/* Before tls.h makes its certificates. */
__attribute__((constructor(101))) static void o_set_up(void)
{
    o_refused = CRYPTO_set_mem_functions(o_malloc, o_realloc, o_free) != 1;
}

#include "tls_seam.h"

#include "tls.h"

/* ---- each allocation in turn --------------------------------------------------------------*/

/* Like CHECK, and says which allocation has failed. */
#define HOLDS(condition)                                                                           \
    ((condition) ? (void)0                                                                         \
                 : T_FAIL("%s, FAULT=%ld: %ld failed, the first at %s:%d", #condition, o_at,       \
                          o_hits, o_file, o_line))

static void crashed(int signo)
{
    char text[256];
    int size = snprintf(text, sizeof text, "FAULT=%ld%s: signal %d; failed at %s:%d\n", o_at,
                        o_sticky ? ", sticky" : "", signo, o_file, o_line);
    signal(signo, SIG_DFL);
    if (write(2, text, (size_t)size) == size) {
        raise(signo);
    }
}

/* What OpenSSL keeps for a thread, errors and random numbers, is made anew by the next run, so that this may fail, too,
 * and so that what lives is the same number each time. */
static long live_now(void)
{
    OPENSSL_thread_stop();
    return o_live;
}

static void run_with_fault(void (*run)(void), long at, bool sticky)
{
    o_at = at;
    o_sticky = sticky;
    o_calls = o_hits = 0;
    run();
    HOLDS(!o_armed);
}

static void reload_context(void);

/* Has the allocations fail that a run makes, one of each way; with thin > 1 only every so
 * manieth of these. Returns how many. */
static int sweep(void (*run)(void), bool sticky, int thin)
{
    const char *only = getenv("FAULT");
    long live;
    CHECK(!o_refused);
    signal(SIGSEGV, crashed);
    signal(SIGABRT, crashed);
    run_with_fault(run, 0, false); /* what OpenSSL makes once, and keeps */
    live_now();
    memset(o_ways, 0, sizeof o_ways);
    o_count = 0;
    o_choosing = true;
    run_with_fault(run, 0, false);
    o_choosing = false;
    live = live_now();
    CHECK(o_count < O_MOST);
    printf("%ld allocations, %d of them fail\n", o_calls, o_count / thin);
    for (int i = 0; i < o_count; i += thin) {
        run_with_fault(run, only != NULL ? atol(only) : o_chosen[i], sticky);
        HOLDS(o_hits > 0 || only != NULL);
        HOLDS(live_now() == live || run == reload_context); /* what it keeps may hold more, or less */
        if (only != NULL) {
            break;
        }
    }
    return o_count;
}

/* ---- contexts -----------------------------------------------------------------------------*/

static tsrv_tls_options context_options; /* of the running sweep */
static tsrv_tls *context_tls;            /* whose files are read anew */

/* All that a context was made of. */
typedef struct traits {
    int chain, authorities, objects, verify, ciphers, stapled;
    unsigned long flags;
    bool good; /* there are a certificate and its key */
} traits;

static traits traits_of(SSL_CTX *context, const tsrv_tls *tls)
{
    STACK_OF(X509) *chain = NULL;
    traits found;
    X509_STORE *store = SSL_CTX_get_cert_store(context);
    memset(&found, 0, sizeof found);
    found.good = SSL_CTX_check_private_key(context) == 1;
    CHECK(SSL_CTX_get0_chain_certs(context, &chain) == 1);
    found.chain = sk_X509_num(chain);
    found.authorities = sk_X509_NAME_num(SSL_CTX_get_client_CA_list(context));
    found.objects = sk_X509_OBJECT_num(X509_STORE_get0_objects(store));
    found.verify = SSL_CTX_get_verify_mode(context);
    found.ciphers = sk_SSL_CIPHER_num(SSL_CTX_get_ciphers(context));
    found.flags = X509_VERIFY_PARAM_get_flags(X509_STORE_get0_param(store));
    found.stapled = tls->set->answer_size;
    return found;
}

static void expect_whole(tsrv_tls *tls)
{
    static traits whole, other;
    traits now = traits_of(tls->set->context, tls);
    HOLDS(tls->set->count == 1);
    traits now_other = traits_of(tls->set->others[0], tls);
    if (o_at == 0) {
        whole = now;
        other = now_other;
        CHECK(now.good && now.chain == 1 && now.authorities == 2 && now.stapled > 0);
        CHECK(now.objects == 3 && (now.flags & X509_V_FLAG_CRL_CHECK) != 0);
        CHECK(now_other.good && now_other.chain == -1 && now_other.authorities == 2);
    }
    HOLDS(memcmp(&now, &whole, sizeof now) == 0);
    HOLDS(memcmp(&now_other, &other, sizeof now) == 0);
}

static void make_context(void)
{
    tsrv_tls *tls = (tsrv_tls *)(void *)folder;
    o_armed = true;
    int rc = tsrv_tls_new(&tls, &context_options);
    o_armed = false;
    HOLDS(rc == TSRV_OK || ((rc == -ENOMEM || rc == TSRV_ETLS) && o_hits > 0));
    HOLDS((tls == NULL) == (rc < 0));
    if (rc == TSRV_OK) {
        expect_whole(tls);
        o_armed = true;
        tsrv_tls_free(tls);
        o_armed = false;
    }
}

/* What fails changes nothing. */
static void reload_context(void)
{
    const tsrvi_tls_set *before = context_tls->set;
    o_armed = true;
    int rc = tsrv_tls_reload(context_tls);
    o_armed = false;
    HOLDS(rc == TSRV_OK || ((rc == -ENOMEM || rc == TSRV_ETLS) && o_hits > 0));
    HOLDS((context_tls->set == before) == (rc < 0));
    expect_whole(context_tls);
}

static void set_context_options(bool texts)
{
    static tsrv_tls_certificate other = {"other.test", NULL, NULL};
    other.cert_file = path("other.pem");
    copy_file("server.pem", "chain.pem");
    append("ca.pem", "chain.pem");
    copy_file("ca.pem", "both.pem");
    append("foreign_ca.pem", "both.pem");
    save_list("ca.crl", "ca_key.pem", NULL, 100000);
    save_answer("answer.der", "server.pem", V_OCSP_CERTSTATUS_GOOD, -1000, 5000);
    context_options.cert_file = texts ? NULL : path("chain.pem");
    context_options.key_file = texts ? NULL : path("locked_key.pem");
    context_options.ca_file = texts ? NULL : path("both.pem");
    context_options.cert_pem = texts ? text_of("chain.pem") : NULL;
    context_options.key_pem = texts ? text_of("locked_key.pem") : NULL;
    context_options.ca_pem = texts ? text_of("both.pem") : NULL;
    context_options.key_password = "secret";
    context_options.crl_file = path("ca.crl");
    context_options.ocsp_file = path("answer.der");
    context_options.verify_client = TSRV_TLS_REQUIRED;
    context_options.alpn = "h2";
    context_options.certificates = &other;
    context_options.certificate_count = 1;
}

static void sweep_contexts(bool texts, bool sticky, int thin)
{
    set_context_options(texts);
    tsrv_set_log(t_no_log, NULL);
    CHECK_LEAST(sweep(make_context, sticky, thin), 300);
    long live = live_now();
    context_tls = make_tls(&context_options);
    CHECK_LEAST(sweep(reload_context, sticky, thin), 300);
    tsrv_tls_free(context_tls);
    CHECK_INT(live_now(), live);
}

TEST_ONCE(test_contexts)
{
    sweep_contexts(false, false, 53);
}

TEST_ONCE(test_each_context_of_files)
{
    sweep_contexts(false, false, 1);
}
LONG(test_each_context_of_files);

TEST_ONCE(test_each_context_of_texts)
{
    sweep_contexts(true, false, 1);
}
LONG(test_each_context_of_texts);

TEST_ONCE(test_each_context_and_no_more_memory)
{
    sweep_contexts(false, true, 1);
}
LONG(test_each_context_and_no_more_memory);

/* Calls of OpenSSL's, each of which fails in turn, wherever it is made. */
TEST_ONCE(test_contexts_whose_calls_fail)
{
    static const char *const calls[] = {"X509_check_purpose",  "PEM_read_bio_X509",
                                        "EVP_Digest",          "X509_digest",
                                        "X509_CRL_digest",     "X509_STORE_add_cert",
                                        "X509_STORE_add_crl",  "SSL_CTX_add_client_CA",
                                        "SSL_CTX_set_min_proto_version", "SSL_CTX_set_session_id_context"};
    set_context_options(false);
    for (size_t i = 0; i < COUNT(calls); i++) {
        for (long at = 1; t_fault_hits > 0 || at == 1; at++) {
            tsrv_tls *tls = (tsrv_tls *)(void *)folder;
            t_watch_log();
            t_fail_call(calls[i], 0, at, false);
            int rc = tsrv_tls_new(&tls, &context_options);
            t_fault_at = 0;
            CHECK(t_fault_hits > 0 || at > 1);
            CHECK(t_fault_hits > 0 ? rc == -ENOMEM || (rc == TSRV_ETLS && t_log_lines == 1) : rc == TSRV_OK);
            CHECK((tls == NULL) == (rc < 0));
            CHECK(ERR_peek_error() == 0);
            tsrv_tls_free(tls);
        }
        t_fault_hits = 0;
    }
}

static void fail_both(const char *name)
{
    if (strcmp(name, "X509_check_purpose") == 0 || strcmp(name, "X509_dup") == 0) {
        t_fail_call(name, 0, 1, true);
    }
}

/* A certificate that cannot be looked at a second time is not taken for one that is broken in itself. */
TEST_ONCE(test_a_certificate_that_cannot_be_looked_at)
{
    tsrv_tls *tls = (tsrv_tls *)(void *)folder;
    set_context_options(false);
    t_watch_log();
    t_seen = fail_both;
    CHECK_INT(tsrv_tls_new(&tls, &context_options), TSRV_ETLS);
    t_seen = NULL;
    t_fault_at = 0;
    CHECK(tls == NULL && t_fault_hits > 0);
    CHECK(strstr(t_log, "cert_file") != NULL);
}

/* A time that cannot be compared is over, which is said and no obstacle. */
TEST_ONCE(test_a_date_that_cannot_be_compared)
{
    tsrv_tls_options options = server_options();
    t_watch_log();
    t_fail_call("ASN1_TIME_diff", 0, 1, true);
    tsrv_tls *tls = make_tls(&options);
    t_fault_at = 0;
    CHECK(t_fault_hits > 0 && t_log_lines > 0);
    tsrv_tls_free(tls);
}

/* ---- handshakes ---------------------------------------------------------------------------*/

static tsrv_loop *here;
static tsrv_server *served_by;
static SSL_CTX *client_context;
static SSL_CTX *stranger_context;   /* with a certificate of another CA */
static SSL_SESSION *client_session; /* to resume; NULL = none */
static bool keeping;                /* the next one is kept as client_session */
static const char *asked_for;       /* the name that the client asks for */
static const char *expected_name;   /* of the certificate that it gets */
static const char *expected_peer = ""; /* that the server sees; "" = it asks for none */
static int64_t visit_end;           /* when it has lasted too long */
static bool arming;                 /* turns are those that may fail */
static tsrv_tls *fresh_tls;         /* its files are read anew before each run; NULL = nothing */
static int served;                  /* connections whose handler has got something */
static int resumed;                 /* that have resumed a session */

/* The server's turn. */
static void turn(void)
{
    o_armed = arming;
    int rc = tsrv_loop_run_once(here, 10);
    o_armed = false;
    HOLDS(rc >= 0 && t_now_ms() < visit_end);
}

static bool is_code(int rc)
{
    return rc == TSRV_OK || (rc == -ENOMEM && ((o_armed && o_hits > 0) || t_fault_hits > 0));
}

/* What a handler asks a session for, and then an echo. */
static int tell_and_echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    char name[64];
    tsrv_slice some;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_some(stream, 0, &some)) == TSRV_OK &&
           (rc = tsrv_write(stream, some.data, some.size)) == TSRV_OK) {
        served++;
        rc = tsrv_tls_peer_name(stream, name, sizeof name);
        HOLDS(expected_peer[0] == 0 ? rc == TSRV_EINVAL : is_code(rc));
        HOLDS(rc != TSRV_OK || strcmp(name, expected_peer) == 0);
        rc = tsrv_tls_peer_certificate(stream, &some);
        HOLDS(expected_peer[0] == 0 ? rc == TSRV_EINVAL : is_code(rc));
        HOLDS((some.size != 0) == (rc == TSRV_OK));
    }
    return rc;
}

/* A step of the client's, with the server's turns that it needs. Returns what the call does at last. */
static int step(SSL *ssl, int (*call)(SSL *))
{
    int rc, kind;
    do {
        ERR_clear_error();
        rc = call(ssl);
        kind = rc > 0 ? SSL_ERROR_NONE : SSL_get_error(ssl, rc);
        if (kind == SSL_ERROR_WANT_READ) {
            turn();
        }
    } while (kind == SSL_ERROR_WANT_READ);
    CHECK(kind != SSL_ERROR_WANT_WRITE);
    ERR_clear_error();
    return rc;
}

static char came[16]; /* from the server */

static int send_hello(SSL *ssl)
{
    return SSL_write(ssl, "hello", 5);
}

static int take_hello(SSL *ssl)
{
    return SSL_read(ssl, came, sizeof came);
}

/* What the handshake has agreed on, whatever has failed. */
static void expect_agreed(SSL *ssl)
{
    const unsigned char *protocol;
    unsigned size;
    char name[64];
    HOLDS(strcmp(peer_name(ssl, name, sizeof name), expected_name) == 0);
    SSL_get0_alpn_selected(ssl, &protocol, &size);
    HOLDS(size == 2 && memcmp(protocol, "h2", 2) == 0);
}

/* One connection. True: it was served to its end. */
static bool visit(SSL_CTX *context, bool armed)
{
    tsrv_stats stats;
    int fd = t_add_pair(served_by);
    SSL *ssl = SSL_new(context);
    bool all = false;
    CHECK(ssl != NULL && fcntl(fd, F_SETFL, O_NONBLOCK) == 0 && SSL_set_fd(ssl, fd) == 1);
    CHECK(SSL_set_tlsext_host_name(ssl, asked_for) == 1 && SSL_set1_host(ssl, asked_for) == 1);
    CHECK(SSL_set_tlsext_status_type(ssl, TLSEXT_STATUSTYPE_ocsp) == 1);
    CHECK(client_session == NULL || SSL_set_session(ssl, client_session) == 1);
    arming = armed;
    visit_end = t_patience();
    if (step(ssl, SSL_connect) == 1) {
        expect_agreed(ssl);
        resumed += SSL_session_reused(ssl);
        if (step(ssl, send_hello) == 5 && step(ssl, take_hello) > 0) {
            HOLDS(memcmp(came, "hello", 5) == 0);
            all = SSL_shutdown(ssl) == 0 && step(ssl, take_hello) == 0 &&
                  (SSL_get_shutdown(ssl) & SSL_RECEIVED_SHUTDOWN) != 0;
        }
        if (all && keeping) {
            client_session = SSL_get1_session(ssl);
            keeping = false;
        }
    }
    SSL_free(ssl);
    t_close(fd);
    do {
        turn();
        tsrv_server_stats(served_by, &stats);
    } while (stats.open > 0);
    arming = false;
    return all;
}

static void refresh(void)
{
    if (fresh_tls != NULL) {
        CHECK_INT(tsrv_tls_reload(fresh_tls), TSRV_OK);
    }
}

/* One connection without memory; the next one is served again. */
static void visit_twice(void)
{
    refresh();
    bool all = visit(client_context, true);
    HOLDS(all || o_hits > 0);
    HOLDS(visit(client_context, false));
}

/* Whatever fails, who is to be refused is refused; the next one is served. */
static void refuse_stranger(void)
{
    int before = served;
    refresh();
    HOLDS(!visit(stranger_context, true));
    HOLDS(served == before);
    HOLDS(visit(client_context, false));
}

static BIO_METHOD *nested_method;

static void make_method(void)
{
    nested_method = tsrvi_tls_bio_method();
}

/* What is made once for a process: without memory, and by two threads at once, of which one comes to be too late. */
TEST_ONCE(test_method_of_sessions)
{
    live_now();
    long live = o_live;
    o_sticky = false;
    for (o_at = 1; o_at < 3; o_at++) {
        o_calls = o_hits = 0;
        o_armed = true;
        CHECK(tsrvi_tls_bio_method() == NULL);
        o_armed = false;
        CHECK_INT(o_hits, 1);
        ERR_clear_error();
        CHECK_INT(live_now(), live);
    }
    o_seen = make_method;
    BIO_METHOD *method = tsrvi_tls_bio_method();
    CHECK(method != NULL && o_seen == NULL && nested_method == method);
    CHECK(tsrvi_tls_bio_method() == method);
    CHECK_INT(live_now(), live + 2);
}

enum { CERTIFICATES = 1, HOOK = 2, MUTUAL = 4, STAPLED = 8, RESUMED = 16, STRANGER = 32, FRESH = 64 };

static tsrv_tls *hooked; /* what the hook chooses for other.test */

static int choose(const char *name, tsrv_tls **tls, void *context)
{
    (void)context;
    *tls = strcmp(name, "other.test") == 0 ? hooked : NULL;
    return TSRV_OK;
}

/* A server, and the context of its client. Returns what to free. */
static tsrv_tls *begin_visits(int version, int kinds)
{
    tsrv_tls_options options = server_options();
    tsrv_tls_certificate other = {"other.test", path("other.pem"), NULL};
    tsrv_server_options serving;
    dial how = {.version = version, .alpn = "\002h2"};
    options.alpn = "h2";
    options.certificates = &other;
    options.certificate_count = (kinds & CERTIFICATES) != 0;
    options.ca_file = path("ca.pem");
    options.verify_client = (kinds & MUTUAL) != 0 ? TSRV_TLS_REQUIRED : TSRV_TLS_NONE;
    options.ocsp_file = (kinds & STAPLED) != 0 ? path("answer.der") : NULL;
    save_answer("answer.der", "server.pem", V_OCSP_CERTSTATUS_GOOD, -1000, 5000);
    options.on_server_name = (kinds & HOOK) != 0 ? choose : NULL;
    how.certificate = (kinds & MUTUAL) != 0 ? "good.pem" : NULL;
    expected_peer = (kinds & MUTUAL) != 0 ? "CN=good" : "";
    asked_for = (kinds & (CERTIFICATES | HOOK)) != 0 ? "other.test" : "localhost";
    expected_name = (kinds & (CERTIFICATES | HOOK)) != 0 ? "other" : "server";
    tsrv_tls *tls = make_tls(&options);
    if ((kinds & HOOK) != 0) {
        options.on_server_name = NULL;
        options.ocsp_file = NULL;
        options.cert_file = path("other.pem");
        hooked = make_tls(&options);
    }
    memset(&serving, 0, sizeof serving);
    here = t_new_loop();
    serving.loop = here;
    serving.mode = t_mode;
    serving.handle_stream = tell_and_echo;
    serving.tls = tls;
    CHECK_INT(tsrv_server_new(&served_by, &serving), TSRV_OK);
    client_context = dial_context(&how);
    SSL_CTX_set_verify(client_context, (kinds & CERTIFICATES) != 0 ? SSL_VERIFY_NONE : SSL_VERIFY_PEER,
                       NULL);
    how.certificate = "foreign.pem";
    fresh_tls = (kinds & FRESH) != 0 ? tls : NULL;
    stranger_context = (kinds & STRANGER) != 0 ? dial_context(&how) : NULL;
    t_block_sigpipe();
    return tls;
}

static void end_visits(tsrv_tls *tls)
{
    SSL_SESSION_free(client_session);
    client_session = NULL;
    SSL_CTX_free(client_context);
    SSL_CTX_free(stranger_context);
    tsrv_server_free(served_by);
    CHECK_INT(tsrv_loop_free(here), TSRV_OK);
    tsrv_tls_free(tls);
    tsrv_tls_free(hooked);
    hooked = NULL;
}

static void sweep_visits(int version, int kinds, bool sticky, int thin)
{
    tsrv_set_log(t_no_log, NULL);
    tsrv_tls *tls = begin_visits(version, kinds);
    if ((kinds & RESUMED) != 0) {
        keeping = true;
        CHECK(visit(client_context, false));
        CHECK(client_session != NULL);
    }
    CHECK_LEAST(sweep((kinds & STRANGER) != 0 ? refuse_stranger : visit_twice, sticky, thin), 100);
    CHECK(client_session == NULL || resumed > 0);
    end_visits(tls);
}

static const int all_kinds[] = {0, MUTUAL | STAPLED, CERTIFICATES, CERTIFICATES | RESUMED, HOOK,
                                HOOK | MUTUAL | RESUMED, MUTUAL | STRANGER,
                                MUTUAL | FRESH};

static void sweep_all_visits(int version, bool sticky, int thin)
{
    for (size_t i = 0; i < COUNT(all_kinds); i++) {
        sweep_visits(version, all_kinds[i], sticky, thin);
    }
}

TEST_ONCE(test_handshakes)
{
    sweep_all_visits(TLS1_2_VERSION, false, 29);
    sweep_all_visits(TLS1_3_VERSION, false, 29);
}

TEST_ONCE(test_each_handshake_of_tls_1_2)
{
    sweep_all_visits(TLS1_2_VERSION, false, 1);
}
LONG(test_each_handshake_of_tls_1_2);

T_TEST(test_each_handshake_of_tls_1_3, T_COROUTINES | T_CALLBACKS)
{
    sweep_all_visits(TLS1_3_VERSION, false, 1);
}
LONG(test_each_handshake_of_tls_1_3);

TEST_ONCE(test_each_handshake_of_tls_1_2_and_no_more_memory)
{
    sweep_all_visits(TLS1_2_VERSION, true, 2);
}
LONG(test_each_handshake_of_tls_1_2_and_no_more_memory);

TEST_ONCE(test_each_handshake_of_tls_1_3_and_no_more_memory)
{
    sweep_all_visits(TLS1_3_VERSION, true, 2);
}
LONG(test_each_handshake_of_tls_1_3_and_no_more_memory);

/* The client is refused where a call fails that its session cannot do without; the next one is served. */
TEST_ONCE(test_sessions_whose_calls_fail)
{
    static const struct {
        const char *call;
        int kinds;
        bool served;
    } rows[] = {{"SSL_set_SSL_CTX", CERTIFICATES, false},
                {"SSL_set_SSL_CTX", HOOK, false},
                {"SSL_set_max_proto_version", HOOK, false},
                {"i2d_X509", MUTUAL, true}};
    tsrv_set_log(t_no_log, NULL);
    for (size_t i = 0; i < COUNT(rows); i++) {
        tsrv_tls *tls = begin_visits(TLS1_3_VERSION, rows[i].kinds);
        t_fail_call(rows[i].call, 0, 1, false);
        HOLDS(visit(client_context, false) == rows[i].served);
        t_fault_at = 0;
        CHECK_INT(t_fault_hits, 1);
        HOLDS(visit(client_context, false));
        end_visits(tls);
    }
}

/* Nothing is left of a session that cannot be made. */
TEST_ONCE(test_sessions_that_cannot_be_made)
{
    static const char *const calls[] = {"BIO_meth_new", "BIO_new", "SSL_new"};
    tsrv_tls *tls = begin_visits(TLS1_3_VERSION, 0);
    for (size_t i = 0; i < COUNT(calls); i++) {
        int pair[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
        t_fail_call(calls[i], 0, 1, false);
        CHECK_INT(tsrv_server_add_stream(served_by, pair[1]), -ENOMEM);
        t_fault_at = 0;
        CHECK_INT(t_fault_hits, 1);
        t_expect_eof(pair[0]);
        t_close(pair[0]);
        CHECK(tsrv_server_next(served_by, NULL) == NULL);
    }
    HOLDS(visit(client_context, false));
    end_visits(tls);
}

/* The name of a peer that there is no memory for: a code, and the session goes on. */
TEST_ONCE(test_a_name_without_memory)
{
    tsrv_set_log(t_no_log, NULL);
    tsrv_tls *tls = begin_visits(TLS1_3_VERSION, MUTUAL);
    t_fail_call("BIO_new", 0, 2, false);
    HOLDS(visit(client_context, false));
    t_fault_at = 0;
    CHECK_INT(t_fault_hits, 1);
    HOLDS(visit(client_context, false));
    end_visits(tls);
}

/* ---- clients ------------------------------------------------------------------------------*/

static tsrv_tls *asking_tls;
static const char *asking_name; /* of the server that it wants */
static int asked_port, asked_rc;
static bool asked_over;

/* Both ends are the library's. */
static void ask(void *context)
{
    tsrv_connect_options options;
    tsrv_stream *stream = NULL;
    tsrv_slice some;
    (void)context;
    memset(&options, 0, sizeof options);
    options.tls = asking_tls;
    options.server_name = asking_name;
    asked_rc = tsrv_connect("127.0.0.1", asked_port, &options, &stream);
    if (asked_rc == TSRV_OK) {
        HOLDS(strcmp(tsrv_tls_alpn(stream), "h2") == 0);
        asked_rc = tsrv_write(stream, "hello", 5);
        asked_rc = asked_rc < 0 ? asked_rc : tsrv_read_bytes(stream, 5, &some);
        HOLDS(asked_rc < 0 || memcmp(some.data, "hello", 5) == 0);
        tsrv_close(stream);
    }
    asked_over = true;
}

static int ask_once(bool armed)
{
    tsrv_stats stats;
    asked_over = false;
    visit_end = t_patience();
    CHECK_INT(tsrv_spawn(here, ask, NULL), TSRV_OK);
    arming = armed;
    do {
        turn();
        tsrv_server_stats(served_by, &stats);
    } while (!asked_over || stats.open > 0);
    arming = false;
    return asked_rc;
}

/* What OpenSSL could not read of the system's certificates it does not say: they are read anew. */
static void ask_twice(void)
{
    refresh();
    int rc = ask_once(true);
    HOLDS(rc == TSRV_OK || (rc < 0 && o_hits > 0));
    if (asking_tls->options.ca_file == NULL) {
        refresh();
    }
    rc = ask_once(false);
    HOLDS(rc == TSRV_OK);
}

/* A server without an answer to staple. system: whom to trust is looked up where the system has it. */
static tsrv_tls *begin_asking(const char *name, bool system)
{
    tsrv_tls_options options;
    tsrv_set_log(t_no_log, NULL);
    memset(&options, 0, sizeof options);
    tsrv_tls *tls = begin_visits(TLS1_3_VERSION, 0);
    options.ca_file = system ? NULL : path("ca.pem");
    options.alpn = "h2";
    CHECK(setenv("SSL_CERT_FILE", path("ca.pem"), 1) == 0);
    fresh_tls = asking_tls = make_tls(&options);
    asking_name = name;
    asked_port = t_listen(served_by);
    return tls;
}

static void end_asking(tsrv_tls *tls)
{
    tsrv_tls_free(asking_tls);
    end_visits(tls);
}

static void sweep_clients(const char *name, bool system, bool sticky, int thin)
{
    tsrv_tls *tls = begin_asking(name, system);
    CHECK_LEAST(sweep(ask_twice, sticky, thin), 100);
    end_asking(tls);
}

/* What a client needs to be sure of its server: without it there is no connection. */
TEST_ONCE(test_clients_whose_calls_fail)
{
    static const struct {
        const char *call, *name;
        bool system;
    } rows[] = {{"SSL_set1_host", "localhost", false},
                {"SSL_set_tlsext_host_name", "localhost", false},
                {"SSL_set_alpn_protos", "localhost", false},
                {"X509_VERIFY_PARAM_set1_ip_asc", "127.0.0.1", false},
                {"SSL_CTX_set_default_verify_file", "localhost", true},
                {"SSL_CTX_set_default_verify_dir", "localhost", true}};
    for (size_t i = 0; i < COUNT(rows); i++) {
        tsrv_tls *tls = begin_asking(rows[i].name, rows[i].system);
        t_fail_call(rows[i].call, 0, 1, false);
        CHECK_INT(ask_once(false), -ENOMEM);
        t_fault_at = 0;
        CHECK_INT(t_fault_hits, 1);
        CHECK_INT(ask_once(false), TSRV_OK);
        end_asking(tls);
    }
}

TEST_ONCE(test_clients)
{
    sweep_clients("localhost", false, false, 29);
    sweep_clients("127.0.0.1", true, false, 29);
}

TEST_ONCE(test_each_client)
{
    sweep_clients("localhost", false, false, 1);
    sweep_clients("127.0.0.1", true, false, 1);
}
LONG(test_each_client);

TEST_ONCE(test_each_client_and_no_more_memory)
{
    sweep_clients("localhost", false, true, 2);
    sweep_clients("127.0.0.1", true, true, 2);
}
LONG(test_each_client_and_no_more_memory);
