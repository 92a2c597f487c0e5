/* More seams of tcpserver.h, of OpenSSL: calls that fail when memory is short, so that each can be made to fail by name.
 * Included before tcpserver.h. What fails leaves no error in OpenSSL's queue. */
#ifndef TLS_SEAM_H
#define TLS_SEAM_H

#include "seam.h"

#include <openssl/ec.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/ocsp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#if OPENSSL_VERSION_NUMBER >= 0x30000000L
#include <openssl/core_names.h>
#endif

#define X509_check_purpose(...) (t_fault("X509_check_purpose") ? 0 : X509_check_purpose(__VA_ARGS__))
#define X509_dup(...) (t_fault("X509_dup") ? NULL : X509_dup(__VA_ARGS__))
#define PEM_read_bio_X509(...) (t_fault("PEM_read_bio_X509") ? NULL : PEM_read_bio_X509(__VA_ARGS__))
#define EVP_Digest(...) (t_fault("EVP_Digest") ? 0 : EVP_Digest(__VA_ARGS__))
#define X509_digest(...) (t_fault("X509_digest") ? 0 : X509_digest(__VA_ARGS__))
#define X509_CRL_digest(...) (t_fault("X509_CRL_digest") ? 0 : X509_CRL_digest(__VA_ARGS__))
#define X509_STORE_add_cert(...) (t_fault("X509_STORE_add_cert") ? 0 : X509_STORE_add_cert(__VA_ARGS__))
#define X509_STORE_add_crl(...) (t_fault("X509_STORE_add_crl") ? 0 : X509_STORE_add_crl(__VA_ARGS__))
#define SSL_CTX_add_client_CA(...) (t_fault("SSL_CTX_add_client_CA") ? 0 : SSL_CTX_add_client_CA(__VA_ARGS__))
#define SSL_CTX_set_session_id_context(...) \
    (t_fault("SSL_CTX_set_session_id_context") ? 0 : SSL_CTX_set_session_id_context(__VA_ARGS__))
#define SSL_CTX_set_default_verify_file(...) \
    (t_fault("SSL_CTX_set_default_verify_file") ? 0 : SSL_CTX_set_default_verify_file(__VA_ARGS__))
#define SSL_CTX_set_default_verify_dir(...) \
    (t_fault("SSL_CTX_set_default_verify_dir") ? 0 : SSL_CTX_set_default_verify_dir(__VA_ARGS__))
#define SSL_set_SSL_CTX(...) (t_fault("SSL_set_SSL_CTX") ? NULL : SSL_set_SSL_CTX(__VA_ARGS__))
#define SSL_set1_host(...) (t_fault("SSL_set1_host") ? 0 : SSL_set1_host(__VA_ARGS__))
#define SSL_set_alpn_protos(...) (t_fault("SSL_set_alpn_protos") ? 1 : SSL_set_alpn_protos(__VA_ARGS__))
#define X509_VERIFY_PARAM_set1_ip_asc(...) \
    (t_fault("X509_VERIFY_PARAM_set1_ip_asc") ? 0 : X509_VERIFY_PARAM_set1_ip_asc(__VA_ARGS__))
#define BIO_meth_new(...) (t_fault("BIO_meth_new") ? NULL : BIO_meth_new(__VA_ARGS__))
#define BIO_new(...) (t_fault("BIO_new") ? NULL : BIO_new(__VA_ARGS__))
#define SSL_new(...) (t_fault("SSL_new") ? NULL : SSL_new(__VA_ARGS__))
#define i2d_X509(...) (t_fault("i2d_X509") ? -1 : i2d_X509(__VA_ARGS__))
#define ASN1_TIME_diff(...) (t_fault("ASN1_TIME_diff") ? 0 : ASN1_TIME_diff(__VA_ARGS__))
/* These are macros of OpenSSL's. */
#undef SSL_CTX_set_min_proto_version
#define SSL_CTX_set_min_proto_version(context, version) \
    (t_fault("SSL_CTX_set_min_proto_version") \
         ? 0 \
         : SSL_CTX_ctrl(context, SSL_CTRL_SET_MIN_PROTO_VERSION, version, NULL))
#undef SSL_set_max_proto_version
#define SSL_set_max_proto_version(ssl, version) \
    (t_fault("SSL_set_max_proto_version") ? 0 : SSL_ctrl(ssl, SSL_CTRL_SET_MAX_PROTO_VERSION, version, NULL))
#undef SSL_set_tlsext_host_name
#define SSL_set_tlsext_host_name(ssl, name) \
    (t_fault("SSL_set_tlsext_host_name") \
         ? 0 \
         : SSL_ctrl(ssl, SSL_CTRL_SET_TLSEXT_HOSTNAME, TLSEXT_NAMETYPE_host_name, (void *)(name)))

#endif
