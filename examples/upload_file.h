/* upload_file.h - a file that comes in blocks, for upload.c. All of this blocks, and is run in
 * threads: there is no call of the library here. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

typedef struct upload {
    char partial[24]; /* its name until all of it is there: nobody ever sees half a file */
    const char *name;
    tsrv_slice block;
    off_t at;
    int fd, error; /* errno; 0 = all is well */
    bool replaced; /* an older file, which a client wants to know */
} upload;

static void create(void *context)
{
    upload *u = (upload *)context;
    u->fd = mkstemp(u->partial);
    u->error = u->fd < 0 ? errno : 0;
}

static void write_block(void *context)
{
    upload *u = (upload *)context;
    while (u->block.size > 0 && u->error == 0) {
        ssize_t n = pwrite(u->fd, u->block.data, u->block.size, u->at);
        if (n > 0) {
            u->block.data += n, u->block.size -= (size_t)n, u->at += n;
        } else if (n == 0 || errno != EINTR) {
            u->error = n < 0 ? errno : EIO;
        }
    }
}

static void discard(void *context)
{
    upload *u = (upload *)context;
    close(u->fd);
    unlink(u->partial);
}

/* What has been answered with "201 Created" or "200 OK" outlives a power failure, and so does its name. */
static void keep(void *context)
{
    upload *u = (upload *)context;
    int directory = open(".", O_RDONLY | O_CLOEXEC);
    u->replaced = access(u->name, F_OK) == 0;
    if (directory < 0 || fsync(u->fd) != 0 || rename(u->partial, u->name) != 0) {
        u->error = errno;
        unlink(u->partial);
    } else if (fsync(directory) != 0 && errno != EINVAL) { /* some file systems cannot do that */
        u->error = errno;
        unlink(u->name);
    }
    close(directory);
    close(u->fd);
}
