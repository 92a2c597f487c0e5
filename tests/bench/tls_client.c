/* Sends lines of 64 bytes over TLS, one at a time, and waits for each to come back.
 *   tls_client port count */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <openssl/ssl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    SSL *ssl = SSL_new(SSL_CTX_new(TLS_client_method()));
    struct sockaddr_in address;
    int fd = socket(AF_INET, SOCK_STREAM, 0), tries = 0, count = argc > 2 ? atoi(argv[2]) : 0;
    char line[64], back[64];
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((unsigned short)(argc > 1 ? atoi(argv[1]) : 0));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    while (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        if (++tries == 600) {
            return 1; /* the server does not come up */
        }
        usleep(50000);
    }
    memset(line, 'x', sizeof line);
    line[63] = '\n';
    if (SSL_set_fd(ssl, fd) != 1 || SSL_connect(ssl) != 1) {
        return 1;
    }
    for (int i = 0; i < count; i++) {
        int got = 0, part = 0;
        usleep(2000); /* the server has found nothing more and sleeps, as it would if it were not traced */
        if (SSL_write(ssl, line, 64) != 64) {
            return 1;
        }
        while (got < 64 && (part = SSL_read(ssl, back + got, 64 - got)) > 0) {
            got += part;
        }
        if (got != 64 || memcmp(line, back, 64) != 0) {
            return 1;
        }
    }
    return 0;
}
