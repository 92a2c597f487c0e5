/* What BSD's sys/socket.h has otherwise than Linux' does: see tests/platforms.sh. */
#ifndef PLATFORM_SYS_SOCKET_H
#define PLATFORM_SYS_SOCKET_H
#define msghdr platform_linux_msghdr
#define sendmsg platform_linux_sendmsg
#include_next <sys/socket.h>
#undef msghdr
#undef sendmsg

#ifdef __OpenBSD__
typedef unsigned platform_iovlen;
#else
typedef int platform_iovlen;
#define SO_NOSIGPIPE 0x0800
#endif

struct msghdr {
    void *msg_name;
    socklen_t msg_namelen;
    struct iovec *msg_iov;
    platform_iovlen msg_iovlen;
    void *msg_control;
    socklen_t msg_controllen;
    int msg_flags;
};

#ifdef __cplusplus
extern "C" {
#endif
ssize_t sendmsg(int fd, const struct msghdr *message, int flags);
#ifdef __cplusplus
}
#endif
#endif
