/* The same as streams.c over TLS, from the beginning or by tsrv_start_tls: see tests/fuzz/tls_peer.h. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#define FUZZ_TLS 1

/* OpenSSL makes no simulated calls: its headers come before the names of those are replaced. */
#define OPENSSL_SUPPRESS_DEPRECATED /* RAND_set_rand_method */
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#include "streams.c"
