/* Included before an example, so that its disk does what the test says: each write to a file takes a
 * letter from stdin first, and waits for it. 'e': the disk is full. At the end of stdin it is an
 * ordinary disk again. */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <errno.h>
#include <unistd.h>

static inline ssize_t gated_pwrite(int fd, const void *data, size_t size, off_t at)
{
    char letter = 'w';
    while (read(0, &letter, 1) < 0 && errno == EINTR) {
    }
    if (letter == 'e') {
        errno = ENOSPC;
        return -1;
    }
    return pwrite(fd, data, size, at);
}
#define pwrite gated_pwrite
