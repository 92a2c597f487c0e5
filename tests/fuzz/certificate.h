/* What fuzzers of TLS have in common, so that a script does the same whenever it is run: randomness that is a counter,
 * and a certificate that is dated. Included behind fuzz.h, with OPENSSL_SUPPRESS_DEPRECATED. */
#ifndef FUZZ_CERTIFICATE_H
#define FUZZ_CERTIFICATE_H

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

static uint64_t randomness;

static int random_bytes(unsigned char *bytes, int size)
{
    for (int i = 0; i < size; i++) {
        randomness = randomness * 6364136223846793005u + 1442695040888963407u;
        bytes[i] = (unsigned char)(randomness >> 56);
    }
    return 1;
}

static int random_is_there(void)
{
    return 1;
}

static const RAND_METHOD random_method = {NULL, random_bytes, NULL, NULL, random_bytes, random_is_there};

static char certificate_text[4000], key_text[1000];

static void need(bool condition, const char *what)
{
    if (!condition) {
        ERR_print_errors_fp(stderr);
        fail("OpenSSL: %s", what);
    }
}

static void to_text(BIO *bio, char *text, size_t size)
{
    int got = BIO_read(bio, text, (int)size - 1);
    need(got > 0 && got < (int)size - 1, "PEM");
    text[got] = 0;
    BIO_free(bio);
}

/* For localhost, and signed by itself. It and its key are certificate_text and key_text, too. */
static X509 *make_certificate(EVP_PKEY *key)
{
    X509 *certificate = X509_new();
    X509_NAME *name = X509_get_subject_name(certificate);
    X509_EXTENSION *names = X509V3_EXT_conf_nid(NULL, NULL, NID_subject_alt_name, "DNS:localhost");
    BIO *bio = BIO_new(BIO_s_mem()), *key_bio = BIO_new(BIO_s_mem());
    need(key != NULL && names != NULL, "a certificate");
    X509_set_version(certificate, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
    ASN1_TIME_set_string(X509_getm_notBefore(certificate), "20200101000000Z");
    ASN1_TIME_set_string(X509_getm_notAfter(certificate), "20991231235959Z");
    X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const unsigned char *)"localhost", -1, -1, 0);
    X509_set_issuer_name(certificate, name);
    X509_set_pubkey(certificate, key);
    X509_add_ext(certificate, names, -1);
    need(X509_sign(certificate, key, EVP_PKEY_base_id(key) == EVP_PKEY_ED25519 ? NULL : EVP_sha256()) > 0, "signing");
    need(PEM_write_bio_X509(bio, certificate) == 1, "PEM");
    need(PEM_write_bio_PKCS8PrivateKey(key_bio, key, NULL, NULL, 0, NULL, NULL) == 1, "PEM");
    to_text(bio, certificate_text, sizeof certificate_text);
    to_text(key_bio, key_text, sizeof key_text);
    X509_EXTENSION_free(names);
    return certificate;
}

#endif
