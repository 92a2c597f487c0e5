/* Included before an example, so that its server expects the PROXY protocol from the addresses in $PROXY_FROM, and
 * tells of each connection what it knows, as its handler begins:
 *
 *   from 127.0.0.1:41000 by 127.0.0.1:50312 failed 0 refused 0 tlv 03:{....} 20:{....!..TLSv1.3}
 *
 * Where it connects to another server it says for whom, and does so over TLS with $PROXY_CA, whom to trust then.
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <stdio.h>
#include <stdlib.h>

static tsrv_handler proxied_handler;
static tsrv_address proxied_client; /* of the handler that has begun last */

static void proxied_print(int type, const tsrv_slice *value)
{
    printf(" %02x:{", (unsigned)type);
    for (size_t i = 0; i < value->size; i++) {
        putchar(value->data[i] > ' ' && value->data[i] <= '~' ? value->data[i] : '.');
    }
    putchar('}');
}

static int proxied_handle(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    char client[TSRV_ADDRESS_SIZE], sender[TSRV_ADDRESS_SIZE];
    tsrv_address by;
    tsrv_stats stats;
    tsrv_slice value;
    tsrv_server_stats(tsrv_stream_server(stream), &stats);
    if (tsrv_proxy_address(stream, &by) != TSRV_OK) {
        return TSRV_EINVAL;
    }
    printf("from %s by %s failed %llu refused %llu tlv",
           tsrv_address_format(address, client, sizeof client), tsrv_address_format(&by, sender, sizeof sender),
           (unsigned long long)stats.proxies_failed, (unsigned long long)stats.refused);
    for (int type = 0; type < 256; type++) {
        if (tsrv_proxy_tlv(stream, type, &value) == TSRV_OK) {
            proxied_print(type, &value);
        }
    }
    putchar('\n');
    fflush(stdout);
    proxied_client = *address;
    return proxied_handler(stream, address, context);
}

static inline int proxied_server_new(tsrv_server **server, const tsrv_server_options *options)
{
    tsrv_server_options changed = *options;
    proxied_handler = options->handle_stream;
    changed.handle_stream = proxied_handle;
    changed.proxy_protocol = TSRV_PROXY_REQUIRED;
    changed.proxy_from = getenv("PROXY_FROM");
    return tsrv_server_new(server, &changed);
}
#define tsrv_server_new proxied_server_new

static inline int proxied_connect(const char *host, int port, const tsrv_connect_options *options, tsrv_stream **stream)
{
    static tsrv_tls *tls;
    tsrv_tls_options tls_options = {0};
    tsrv_connect_options changed = {0};
    tls_options.ca_file = getenv("PROXY_CA");
    if (tls_options.ca_file != NULL && tls == NULL && tsrv_tls_new(&tls, &tls_options) != TSRV_OK) {
        return TSRV_ETLS;
    }
    changed = options != NULL ? *options : changed;
    changed.tls = tls;
    changed.proxy_for = &proxied_client;
    return tsrv_connect(host, port, &changed, stream);
}
#define tsrv_connect proxied_connect
