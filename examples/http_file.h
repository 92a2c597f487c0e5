/* http_file.h - from the path of a request to a file, for http.c. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* "%20" is a blank, and so on (RFC 3986, section 2.1), in place. Returns false for what is no path.
 */
static bool decode(char *path)
{
    char *to = path;
    for (const char *from = path; *from != 0; from++, to++) {
        *to = *from;
        if (*from == '%') {
            char digits[3] = {from[1], from[1] != 0 ? from[2] : (char)0, 0};
            *to = (char)strtoul(digits, NULL, 16);
            if (strspn(digits, "0123456789ABCDEFabcdef") != 2 || *to == 0) {
                return false;
            }
            from += 2;
        }
    }
    *to = 0;
    return true;
}

/* Returns a descriptor, or -1 and errno. O_NONBLOCK: a pipe in the directory must not stop the
 * server. */
static int open_file(const char *path, struct stat *file)
{
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd >= 0 && (fstat(fd, file) != 0 || !S_ISREG(file->st_mode))) {
        close(fd);
        errno = ENOENT;
        return -1;
    }
    return fd;
}

/* Who is told that there is no such file believes it: not when there is only no descriptor for it,
 * or no memory. */
static bool is_passing(int error)
{
    return error == EMFILE || error == ENFILE || error == ENOMEM || error == EINTR;
}
