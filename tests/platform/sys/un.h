/* BSD's sockaddr_un: see tests/platforms.sh. */
#ifndef PLATFORM_SYS_UN_H
#define PLATFORM_SYS_UN_H
#include <stdint.h>
#include <sys/socket.h>

struct sockaddr_un {
    uint8_t sun_len;
    uint8_t sun_family;
    char sun_path[104];
};
#endif
