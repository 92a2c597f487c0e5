/* A simulated kernel: descriptors, sockets, pipes, epoll, poll and kevent over one model, in one thread and without a
 * real system call. Nothing happens by itself, and the clock moves only in waits, so a run is a function of the
 * decisions that k_choose gives it.
 *
 * The model is Linux's (net/ipv4/tcp*.c, net/unix/af_unix.c, fs/eventpoll.c); kqueue's filters are FreeBSD's over the
 * same sockets. kernel_test.c compares it with the real one. What it leaves out: processes, threads, files with more
 * than a content, urgent data, datagrams.
 *
 * It aborts, by k_violation, where a program that does this has a fault on every kernel: a close of a descriptor that
 * is not open, the use of one, a call that would block, SIGPIPE.
 *
 * Layers: decisions and time; files and descriptors; sockets; what is ready; epoll, poll, kqueue; the rest. */
#ifndef SIM_KERNEL_H
#define SIM_KERNEL_H

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/event.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define K_UNUSED __attribute__((unused))

/* ---- decisions and time -------------------------------------------------------------------*/

#define K_MS ((uint64_t)1000000)

static uint64_t k_now;                            /* nanoseconds */
static unsigned (*k_choose)(unsigned below);      /* a number below `below`; NULL = always 0 */
static void (*k_waits)(void);                     /* told that a wait begins */
static bool k_late;                               /* what is sent over TCP arrives in a later wait */
static bool k_lax;                                /* the program itself may use descriptors that are closed */
static unsigned long k_calls;                     /* of this run */
static char k_message[512];                       /* the violation */

/* How many values each of the run's first decisions had: for who tries all of them (driver.h). */
enum { K_ASKED = 4096 };
static unsigned k_asked[K_ASKED];
static size_t k_asked_count;

K_UNUSED static void k_asks(size_t decision, unsigned below)
{
    if (decision < K_ASKED) {
        k_asked[decision] = below;
        k_asked_count = decision + 1;
    }
}

__attribute__((noreturn, format(printf, 1, 2))) static void k_violation(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(k_message, sizeof k_message, format, arguments);
    va_end(arguments);
    fprintf(stderr, "VIOLATION: %s\n", k_message);
    abort();
}

static unsigned k_decide(unsigned below)
{
    return k_choose == NULL || below <= 1 ? 0 : k_choose(below);
}

/* ---- files --------------------------------------------------------------------------------*/

enum { K_FDS = 256, K_BACKLOG = 16, K_WATCHES = 256, K_FILES = 1024 };

typedef enum k_kind {
    K_SOCKET = 1,
    K_EPOLL,
    K_KQUEUE,
    K_EVENTFD,
    K_PIPE_IN,  /* the end that is read */
    K_PIPE_OUT, /* the end that is written */
    K_REGULAR,
    K_NULL,
    K_RANDOM,
    K_DIRECTORY
} k_kind;

typedef enum k_state { K_NEW, K_LISTENING, K_CONNECTING, K_CONNECTED, K_CLOSED } k_state;

enum { K_IN_OVER = 1, K_OUT_OVER = 2 }; /* sk_shutdown */

typedef union k_address {
    struct sockaddr any;
    struct sockaddr_in four;
    struct sockaddr_in6 six;
    struct sockaddr_un local;
} k_address;

/* Bytes in one direction: `size` of them, of which `arrived` can be read. */
typedef struct k_queue {
    char *data;
    size_t begin, size, room, arrived;
    bool fin; /* follows them */
} k_queue;

typedef struct k_file k_file;

typedef struct k_watch {
    k_file *file;
    int fd;
    int filter;     /* of kqueue */
    uint32_t events; /* epoll's; kqueue's flags */
    uint64_t data;
    void *udata;
    unsigned seen; /* the file's activity when an edge was last told */
    bool told;     /* and whether one was */
} k_watch;

struct k_file {
    k_kind kind;
    int refs; /* descriptors, and the schedule's own */
    int flags;
    uint64_t number; /* of its inode */
    unsigned activity;
    k_file *next; /* all of them */
    /* sockets and pipes */
    int domain;
    k_state state;
    k_file *peer; /* NULL = it is closed, or never was */
    k_queue in;
    size_t capacity; /* of `in` */
    int shut, error;
    bool done;      /* the peer's FIN has arrived */
    bool was_peered;
    bool orphan;    /* no descriptor any more */
    bool abrupt;    /* SO_LINGER with 0 */
    bool only_v6, reuse_port;
    int nowhere;    /* what its connect will come to: an errno; -1 = nothing */
    k_address local, remote;
    socklen_t local_size, remote_size;
    k_file *waiting[K_BACKLOG];
    int waiting_count, backlog;
    /* epoll, kqueue */
    k_watch *watches; /* K_WATCHES of them */
    int watch_count;
    uint64_t count;      /* eventfd */
    char *content; /* regular; malloc'ed */
    size_t content_size;
};

typedef struct k_slot {
    k_file *file;
    bool cloexec;
} k_slot;

/* Names of the file system: unix sockets only. */
typedef struct k_name {
    char path[sizeof(((struct sockaddr_un *)NULL)->sun_path)];
    k_file *file; /* NULL = its socket is gone */
    uint64_t number;
} k_name;

static struct {
    k_slot slots[K_FDS];
    int limit; /* RLIMIT_NOFILE */
    k_file *files;
    k_name names[8];
    uint64_t numbers;
    int port;
    long live_files;
    bool sigpipe_blocked, sigpipe_pending;
    struct sigaction actions[65];
} k;

static k_file *k_file_new(k_kind kind)
{
    k_file *file = (k_file *)calloc(1, sizeof *file);
    file->kind = kind;
    file->watches = kind != K_EPOLL && kind != K_KQUEUE ? NULL : (k_watch *)calloc(K_WATCHES, sizeof(k_watch));
    file->capacity = 65536;
    file->number = ++k.numbers;
    file->next = k.files;
    k.files = file;
    k.live_files++;
    return file;
}

static void k_touch(k_file *file)
{
    if (file != NULL) {
        file->activity++;
    }
}

static void k_queue_free(k_queue *queue)
{
    free(queue->data);
    memset(queue, 0, sizeof *queue);
}

static void k_queue_put(k_queue *queue, const void *data, size_t size)
{
    if (queue->begin + queue->size + size > queue->room) {
        if (queue->begin != 0) {
            memmove(queue->data, queue->data + queue->begin, queue->size);
            queue->begin = 0;
        }
        if (queue->size + size > queue->room) {
            queue->room = (queue->size + size) * 2;
            queue->data = (char *)realloc(queue->data, queue->room);
        }
    }
    memcpy(queue->data + queue->begin + queue->size, data, size);
    queue->size += size;
}

static void k_queue_drop(k_queue *queue, size_t size)
{
    queue->begin += size;
    queue->size -= size;
    queue->arrived -= size;
    if (queue->size == 0) {
        queue->begin = 0;
    }
}

static void k_release(k_file *file);

/* Nobody waits for it any more. */
static void k_unwatch(const k_file *file)
{
    for (k_file *set = k.files; set != NULL; set = set->next) {
        for (int i = set->kind == K_EPOLL || set->kind == K_KQUEUE ? set->watch_count - 1 : -1; i >= 0; i--) {
            if (set->watches[i].file == file) {
                memmove(&set->watches[i], &set->watches[i + 1],
                        (size_t)(--set->watch_count - i) * sizeof(k_watch));
            }
        }
    }
}

/* Nobody has it any more. */
static void k_file_free(k_file *file)
{
    k_file **link = &k.files;
    while (*link != file) {
        link = &(*link)->next;
    }
    *link = file->next;
    for (int i = 0; i < 8; i++) {
        if (k.names[i].file == file) {
            k.names[i].file = NULL;
        }
    }
    k_queue_free(&file->in);
    free(file->content);
    free(file->watches);
    free(file);
    k.live_files--;
}

/* ---- descriptors --------------------------------------------------------------------------*/

static bool k_is_open(int fd)
{
    return fd >= 0 && fd < K_FDS && k.slots[fd].file != NULL;
}

/* The lowest number from `from` on; -1 and errno. */
static int k_install(k_file *file, int from, bool cloexec)
{
    for (int fd = from; fd < k.limit; fd++) {
        if (k.slots[fd].file == NULL) {
            k.slots[fd].file = file;
            k.slots[fd].cloexec = cloexec;
            file->refs++;
            return fd;
        }
    }
    errno = EMFILE;
    return -1;
}

/* A new file's descriptor, or no file. */
static int k_install_new(k_file *file, int flags, bool cloexec)
{
    int fd = k_install(file, 0, cloexec);
    file->flags = flags;
    if (fd < 0) {
        file->refs = 1;
        k_release(file);
        errno = EMFILE;
    }
    return fd;
}

static k_file *k_get(int fd, const char *call)
{
    if (!k_is_open(fd)) {
        if (!k_lax) {
            k_violation("%s of descriptor %d, which is not open", call, fd);
        }
        errno = EBADF;
        return NULL;
    }
    return k.slots[fd].file;
}

static k_file *k_get_socket(int fd, const char *call)
{
    k_file *file = k_get(fd, call);
    if (file != NULL && file->kind != K_SOCKET) {
        errno = ENOTSOCK;
        return NULL;
    }
    return file;
}

/* A call that finds nothing: an error where it may not wait. */
static ssize_t k_nothing(const k_file *file, int flags, const char *call)
{
    if ((file->flags & O_NONBLOCK) == 0 && (flags & MSG_DONTWAIT) == 0) {
        k_violation("%s would block", call);
    }
    errno = EAGAIN;
    return -1;
}

static ssize_t k_broken(int flags)
{
    if ((flags & MSG_NOSIGNAL) == 0) {
        if (!k.sigpipe_blocked) {
            k_violation("SIGPIPE is raised");
        }
        k.sigpipe_pending = true;
    }
    errno = EPIPE;
    return -1;
}

/* ---- what happens between two sockets -----------------------------------------------------*/

static bool k_is_tcp(const k_file *file)
{
    return file->domain != AF_UNIX;
}

/* A reset arrives. What has arrived before can still be read. */
static void k_reset(k_file *file)
{
    if (file == NULL || file->state == K_CLOSED) {
        return;
    }
    file->error = file->state == K_CONNECTING ? ECONNREFUSED : file->done ? EPIPE : ECONNRESET;
    file->state = K_CLOSED;
    file->shut = K_IN_OVER | K_OUT_OVER;
    file->in.size = file->in.arrived;
    file->in.fin = false;
    if (file->peer != NULL) {
        file->peer->peer = NULL;
        file->peer = NULL;
    }
    k_touch(file);
}

/* Both FINs have arrived. */
static void k_finish(k_file *file)
{
    file->state = K_CLOSED;
    file->shut = K_IN_OVER | K_OUT_OVER;
    k_touch(file);
}

/* Is this side's FIN with the other one? */
static bool k_fin_has_arrived(const k_file *file)
{
    return (file->shut & K_OUT_OVER) != 0 && (file->peer == NULL || file->peer->done);
}

/* So many bytes of what is on its way to `file` arrive, and what is behind the last of them. */
static void k_arrive(k_file *file, size_t size)
{
    k_queue *in = &file->in;
    k_file *peer = file->peer;
    if (file->state != K_CONNECTED || (in->arrived == in->size && (!in->fin || file->done))) {
        return;
    }
    if (file->orphan && in->size != 0) { /* nobody is there to read it */
        file->state = K_CLOSED;
        file->peer = NULL;
        if (peer != NULL) {
            peer->peer = NULL;
            k_reset(peer);
        }
        return;
    }
    if (in->arrived != in->size && file->shut == (K_IN_OVER | K_OUT_OVER) && !file->done && k_is_tcp(file)) {
        file->peer = NULL; /* shutdown(2) for both */
        if (peer != NULL) {
            peer->peer = NULL;
            k_reset(peer);
        }
        in->size = in->arrived;
        k_reset(file);
        return;
    }
    in->arrived += size < in->size - in->arrived ? size : in->size - in->arrived;
    k_touch(file);
    if (in->fin && in->arrived == in->size && !file->done) {
        file->done = true;
        file->shut |= K_IN_OVER;
        if (k_fin_has_arrived(file)) {
            k_finish(file);
            if (peer != NULL) {
                k_finish(peer);
            }
        }
    }
}

static void k_send_arrives(k_file *peer)
{
    if (peer != NULL && (!k_late || !k_is_tcp(peer))) {
        k_arrive(peer, SIZE_MAX);
    }
}

/* Orphans whose end has come go. */
static void k_bury(void)
{
    for (k_file *file = k.files, *next; file != NULL; file = next) {
        bool over = file->state == K_CLOSED || file->peer == NULL || (file->done && k_fin_has_arrived(file));
        next = file->next;
        if (file->orphan && over) {
            if (file->peer != NULL) {
                file->peer->peer = NULL;
            }
            k_file_free(file);
        }
    }
}

/* What is on its way goes on; all of it where nothing is late. */
static void k_deliver(void)
{
    for (k_file *file = k.files; file != NULL; file = file->next) {
        if (file->kind == K_SOCKET && file->state == K_CONNECTING && file->nowhere >= 0 &&
            (!k_late || k_decide(4) == 0)) {
            if (file->nowhere == 0) {
                file->state = K_CONNECTED;
            } else {
                k_reset(file);
                file->error = file->nowhere;
            }
            k_touch(file);
        }
        if (file->kind == K_SOCKET && k_is_tcp(file) && (file->in.arrived != file->in.size || file->in.fin)) {
            k_arrive(file, k_late && k_decide(4) != 0 ? k_decide(256) * 64 : SIZE_MAX);
        }
    }
    k_bury();
}

static void k_close_unix(k_file *file)
{
    k_file *peer = file->peer;
    if (peer != NULL) {
        peer->shut = K_IN_OVER | K_OUT_OVER;
        if (file->in.size != 0) {
            peer->error = ECONNRESET;
        }
        peer->peer = NULL;
        file->peer = NULL;
        k_touch(peer);
    }
    k_file_free(file);
}

static void k_close_tcp(k_file *file)
{
    k_file *peer = file->peer;
    file->orphan = true;
    if (file->state == K_CONNECTING && peer != NULL) {
        file->state = K_CONNECTED; /* the other side thinks so already */
    }
    if (file->state != K_CONNECTED || peer == NULL) {
        if (peer != NULL) {
            peer->peer = NULL;
        }
        file->peer = NULL;
    } else if (file->in.size != 0 || file->abrupt) {
        file->state = K_CLOSED;
        file->peer = NULL;
        peer->peer = NULL;
        k_reset(peer);
    } else if ((file->shut & K_OUT_OVER) == 0) {
        file->shut |= K_OUT_OVER;
        peer->in.fin = true;
        k_send_arrives(peer);
    }
    k_bury();
}

static void k_close_socket(k_file *file)
{
    if (file->state == K_LISTENING) {
        for (int i = 0; i < file->waiting_count; i++) {
            k_file *one = file->waiting[i];
            one->abrupt = true;
            if (k_is_tcp(file)) {
                k_close_tcp(one);
            } else {
                if (one->peer != NULL) {
                    one->peer->error = ECONNRESET;
                }
                k_close_unix(one);
            }
        }
        file->waiting_count = 0;
        k_file_free(file);
    } else if (k_is_tcp(file)) {
        k_close_tcp(file);
    } else {
        k_close_unix(file);
    }
}

/* One reference less. */
static void k_release(k_file *file)
{
    if (--file->refs > 0) {
        return;
    }
    k_unwatch(file);
    if (file->kind == K_SOCKET) {
        k_close_socket(file);
    } else {
        if (file->peer != NULL) {
            file->peer->peer = NULL;
            k_touch(file->peer);
        }
        k_file_free(file);
    }
}

static int k_close(int fd)
{
    k_file *file;
    if (!k_is_open(fd)) {
        if (!k_lax) {
            k_violation("close of descriptor %d, which is not open", fd);
        }
        errno = EBADF;
        return -1;
    }
    file = k.slots[fd].file;
    for (k_file *set = k.files; set != NULL; set = set->next) { /* kqueue's filters go with the descriptor */
        for (int i = set->kind == K_KQUEUE ? set->watch_count - 1 : -1; i >= 0; i--) {
            if (set->watches[i].fd == fd) {
                memmove(&set->watches[i], &set->watches[i + 1],
                        (size_t)(--set->watch_count - i) * sizeof(k_watch));
            }
        }
    }
    k.slots[fd].file = NULL;
    k_release(file);
    return 0;
}

K_UNUSED static int k_dup2(int old, int fd)
{
    k_file *file = k_get(old, "dup2");
    if (file == NULL) {
        return -1;
    }
    if (old != fd) {
        file->refs++;
        if (k.slots[fd].file != NULL) {
            k_close(fd);
        }
        k.slots[fd].file = file;
        k.slots[fd].cloexec = false;
    }
    return fd;
}

static int k_fcntl(int fd, int command, ...)
{
    int argument = 0;
    k_file *file;
    if (command != F_GETFD && command != F_GETFL) {
        va_list arguments;
        va_start(arguments, command);
        argument = va_arg(arguments, int);
        va_end(arguments);
    }
    if (command == F_GETFD && !k_is_open(fd)) { /* this asks whether it is open */
        errno = EBADF;
        return -1;
    }
    file = k_get(fd, "fcntl");
    if (file == NULL) {
        return -1;
    }
    switch (command) {
    case F_GETFD:
        return k.slots[fd].cloexec ? FD_CLOEXEC : 0;
    case F_SETFD:
        k.slots[fd].cloexec = (argument & FD_CLOEXEC) != 0;
        return 0;
    case F_GETFL:
        return file->flags | O_RDWR;
    case F_SETFL:
        file->flags = argument & O_NONBLOCK;
        return 0;
    case F_DUPFD_CLOEXEC:
        return k_install(file, argument, true);
    default:
        errno = EINVAL;
        return -1;
    }
}

/* ---- sockets ------------------------------------------------------------------------------*/

static int k_socket(int domain, int type, int protocol)
{
    k_file *file;
    (void)protocol;
    if (domain != AF_INET && domain != AF_INET6 && domain != AF_UNIX) {
        errno = EAFNOSUPPORT;
        return -1;
    }
    file = k_file_new(K_SOCKET);
    file->domain = domain;
    file->state = K_NEW;
    file->local.any.sa_family = (sa_family_t)domain;
    file->local_size = domain == AF_INET    ? (socklen_t)sizeof file->local.four
                       : domain == AF_INET6 ? (socklen_t)sizeof file->local.six
                                            : (socklen_t)sizeof(sa_family_t);
    return k_install_new(file, (type & SOCK_NONBLOCK) != 0 ? O_NONBLOCK : 0, (type & SOCK_CLOEXEC) != 0);
}

/* Two sockets that are connected. */
static void k_join(k_file *one, k_file *other)
{
    one->peer = other;
    other->peer = one;
    one->state = other->state = K_CONNECTED;
    one->was_peered = other->was_peered = true;
}

K_UNUSED static int k_socketpair(int domain, int type, int protocol, int *fds)
{
    fds[0] = k_socket(domain, type, protocol);
    fds[1] = fds[0] < 0 ? -1 : k_socket(domain, type, protocol);
    if (fds[1] < 0) {
        if (fds[0] >= 0) {
            k_close(fds[0]);
        }
        errno = EMFILE;
        return -1;
    }
    k_join(k.slots[fds[0]].file, k.slots[fds[1]].file);
    return 0;
}

static in_port_t *k_port_of(k_address *address)
{
    return address->any.sa_family == AF_INET ? &address->four.sin_port : &address->six.sin6_port;
}

static bool k_same_name(const k_address *a, socklen_t a_size, const k_address *b, socklen_t b_size)
{
    return a_size == b_size && a_size > (socklen_t)sizeof(sa_family_t) && memcmp(a, b, a_size) == 0;
}

/* Is an address any, or are they the same? Ports are compared before. */
static bool k_same_host(const k_address *a, const k_address *b)
{
    static const struct in6_addr any = IN6ADDR_ANY_INIT;
    if (a->any.sa_family == AF_INET) {
        return a->four.sin_addr.s_addr == b->four.sin_addr.s_addr || a->four.sin_addr.s_addr == 0 ||
               b->four.sin_addr.s_addr == 0;
    }
    return memcmp(&a->six.sin6_addr, &b->six.sin6_addr, sizeof any) == 0 ||
           memcmp(&a->six.sin6_addr, &any, sizeof any) == 0 || memcmp(&b->six.sin6_addr, &any, sizeof any) == 0;
}

/* The socket that is bound to, or listens on, an address. */
static k_file *k_find_bound(const k_address *address, socklen_t size, bool listening, const k_file *but)
{
    for (k_file *file = k.files; file != NULL; file = file->next) {
        if (file->kind != K_SOCKET || file == but || file->was_peered ||
            file->local.any.sa_family != address->any.sa_family ||
            (listening ? file->state != K_LISTENING : file->state != K_NEW && file->state != K_LISTENING)) {
            continue;
        }
        if (!k_is_tcp(file) ? k_same_name(&file->local, file->local_size, address, size)
                            : *k_port_of(&file->local) != 0 &&
                                  *k_port_of(&file->local) == *k_port_of((k_address *)(uintptr_t)address) &&
                                  k_same_host(&file->local, address)) {
            return file;
        }
    }
    return NULL;
}

static k_name *k_find_name(const char *path)
{
    for (int i = 0; i < 8; i++) {
        if (k.names[i].path[0] != 0 && strcmp(k.names[i].path, path) == 0) {
            return &k.names[i];
        }
    }
    return NULL;
}

static int k_bind(int fd, const struct sockaddr *name, socklen_t size)
{
    k_file *file = k_get_socket(fd, "bind");
    k_address address;
    if (file == NULL) {
        return -1;
    }
    memset(&address, 0, sizeof address);
    memcpy(&address, name, size);
    if (k_is_tcp(file)) {
        k_file *other;
        if (*k_port_of(&address) == 0) {
            *k_port_of(&address) = htons((uint16_t)(40000 + k.port++ % 20000));
        }
        other = k_find_bound(&address, size, false, file);
        if (other != NULL && !(other->reuse_port && file->reuse_port)) {
            errno = EADDRINUSE;
            return -1;
        }
    } else if (address.local.sun_path[0] != 0) {
        int i = 0;
        if (k_find_name(address.local.sun_path) != NULL) {
            errno = EADDRINUSE;
            return -1;
        }
        while (i < 7 && k.names[i].path[0] != 0) {
            i++;
        }
        memcpy(k.names[i].path, address.local.sun_path, sizeof k.names[i].path);
        k.names[i].file = file;
        k.names[i].number = ++k.numbers;
    } else if (k_find_bound(&address, size, false, file) != NULL) {
        errno = EADDRINUSE;
        return -1;
    }
    file->local = address;
    file->local_size = size;
    return 0;
}

static int k_listen(int fd, int backlog)
{
    k_file *file = k_get_socket(fd, "listen");
    if (file == NULL) {
        return -1;
    }
    file->state = K_LISTENING;
    file->backlog = backlog < K_BACKLOG ? backlog : K_BACKLOG;
    return 0;
}

/* The other end of a connection to `listener`, which waits there to be accepted; NULL = there is no room. */
static k_file *k_queue_connection(k_file *listener, k_file *client)
{
    k_file *made;
    if (listener->waiting_count >= listener->backlog) {
        return NULL;
    }
    made = k_file_new(K_SOCKET);
    made->domain = listener->domain;
    made->local = listener->local;
    made->local_size = listener->local_size;
    made->remote = client->local;
    made->remote_size = client->local_size;
    client->remote = listener->local;
    client->remote_size = listener->local_size;
    k_join(made, client);
    listener->waiting[listener->waiting_count++] = made;
    k_touch(listener);
    return made;
}

/* A client of the schedule's, without a descriptor; NULL = there is no room. */
K_UNUSED static k_file *k_client(k_file *listener, const k_address *from)
{
    k_file *client = k_file_new(K_SOCKET);
    client->domain = listener->domain;
    client->refs = 1;
    client->flags = O_NONBLOCK;
    client->local.any.sa_family = (sa_family_t)listener->domain;
    client->local_size = listener->domain == AF_UNIX ? (socklen_t)sizeof(sa_family_t) : listener->local_size;
    if (from != NULL && listener->domain != AF_UNIX) {
        client->local = *from;
    } else if (listener->domain != AF_UNIX) {
        client->local = listener->local;
        *k_port_of(&client->local) = htons((uint16_t)(1024 + k.port++ % 20000));
    }
    if (k_queue_connection(listener, client) == NULL) {
        k_release(client);
        return NULL;
    }
    return client;
}

static void k_give_name(const k_address *address, socklen_t size, struct sockaddr *to, socklen_t *room)
{
    if (to != NULL) {
        memcpy(to, address, size < *room ? size : *room);
        *room = size;
    }
}

static int k_accept4(int fd, struct sockaddr *address, socklen_t *size, int flags)
{
    k_file *listener = k_get_socket(fd, "accept"), *made;
    int accepted;
    if (listener == NULL) {
        return -1;
    }
    if (listener->state != K_LISTENING) {
        errno = EINVAL;
        return -1;
    }
    accepted = k_install(listener, 0, (flags & SOCK_CLOEXEC) != 0); /* also when nobody waits */
    if (accepted < 0) {
        return -1;
    }
    listener->refs--;
    k.slots[accepted].file = NULL;
    if (listener->waiting_count == 0) {
        return (int)k_nothing(listener, 0, "accept");
    }
    made = listener->waiting[0];
    k.slots[accepted].file = made;
    made->refs++;
    made->flags = (flags & SOCK_NONBLOCK) != 0 ? O_NONBLOCK : 0;
    memmove(listener->waiting, listener->waiting + 1, (size_t)(--listener->waiting_count) * sizeof(k_file *));
    k_give_name(&made->remote, made->remote_size, address, size);
    return accepted;
}

K_UNUSED static int k_accept(int fd, struct sockaddr *address, socklen_t *size)
{
    return k_accept4(fd, address, size, 0);
}

static int k_connect_unix(k_file *file, const k_address *address, socklen_t size)
{
    k_name *name = address->local.sun_path[0] != 0 ? k_find_name(address->local.sun_path) : NULL;
    k_file *listener = address->local.sun_path[0] == 0 ? k_find_bound(address, size, true, file)
                       : name != NULL                  ? name->file
                                                       : NULL;
    if (address->local.sun_path[0] != 0 && name == NULL) {
        errno = ENOENT;
        return -1;
    }
    if (listener == NULL || listener->state != K_LISTENING) {
        errno = ECONNREFUSED;
        return -1;
    }
    if (k_queue_connection(listener, file) == NULL) {
        return (int)k_nothing(file, 0, "connect");
    }
    return 0;
}

/* Where nobody listens: 127.0.0.0/8 and ::1 refuse, 192.0.2.1 cannot be reached, others never answer. */
static int k_answer_of(const k_address *address)
{
    if (address->any.sa_family == AF_INET6 || ntohl(address->four.sin_addr.s_addr) >> 24 == 127) {
        return ECONNREFUSED;
    }
    return ntohl(address->four.sin_addr.s_addr) == 0xC0000201u ? EHOSTUNREACH : -1;
}

static int k_connect(int fd, const struct sockaddr *to, socklen_t size)
{
    k_file *file = k_get_socket(fd, "connect"), *listener;
    k_address address;
    if (file == NULL) {
        return -1;
    }
    memset(&address, 0, sizeof address);
    memcpy(&address, to, size);
    if (file->state != K_NEW) {
        errno = file->state == K_CONNECTING ? EALREADY : EISCONN;
        return -1;
    }
    if (!k_is_tcp(file)) {
        return k_connect_unix(file, &address, size);
    }
    listener = k_find_bound(&address, size, true, file);
    *k_port_of(&file->local) = htons((uint16_t)(1024 + k.port++ % 20000));
    file->nowhere = listener != NULL && k_queue_connection(listener, file) != NULL ? 0
                    : listener != NULL                                            ? -1
                                                                                  : k_answer_of(&address);
    file->remote = address;
    file->remote_size = size;
    file->state = K_CONNECTING;
    if ((file->flags & O_NONBLOCK) != 0) {
        errno = EINPROGRESS;
        return -1;
    }
    if (file->nowhere != 0) {
        k_violation("connect would block");
    }
    file->state = K_CONNECTED;
    return 0;
}

static int k_shutdown(int fd, int how)
{
    k_file *file = k_get_socket(fd, "shutdown"), *peer;
    if (file == NULL) {
        return -1;
    }
    peer = file->peer;
    if (k_is_tcp(file) && file->state != K_CONNECTED) {
        errno = ENOTCONN;
        return -1;
    }
    if (how != SHUT_WR) {
        file->shut |= K_IN_OVER;
        if (!k_is_tcp(file) && peer != NULL) {
            peer->shut |= K_OUT_OVER;
        }
    }
    if (how != SHUT_RD && !k_is_tcp(file)) {
        file->shut |= K_OUT_OVER;
        if (peer != NULL) {
            peer->shut |= K_IN_OVER;
        }
    } else if (how != SHUT_RD && (file->shut & K_OUT_OVER) == 0) {
        file->shut |= K_OUT_OVER;
        if (peer != NULL) {
            peer->in.fin = true;
            k_send_arrives(peer);
        }
    }
    k_touch(file);
    k_touch(peer);
    return 0;
}

/* ---- bytes --------------------------------------------------------------------------------*/

static ssize_t k_take_error(k_file *file)
{
    errno = file->error;
    file->error = 0;
    return -1;
}

static size_t k_space(const k_file *peer)
{
    return peer->capacity > peer->in.size ? peer->capacity - peer->in.size : 0;
}

/* Before bytes can go: 0, or the call's error. */
static ssize_t k_may_send(k_file *file, int flags)
{
    if (file->kind == K_PIPE_OUT) {
        return file->peer == NULL ? k_broken(flags) : 0;
    }
    if (file->state == K_NEW || file->state == K_LISTENING) {
        if (!k_is_tcp(file)) {
            errno = ENOTCONN;
            return -1;
        }
        return k_broken(flags);
    }
    if (file->state == K_CONNECTING) {
        return k_nothing(file, flags, "send");
    }
    if (!k_is_tcp(file)) {
        if ((file->shut & K_OUT_OVER) != 0) {
            return k_broken(flags);
        }
        return file->error != 0                                              ? k_take_error(file)
               : file->peer == NULL || (file->peer->shut & K_IN_OVER) != 0 ? k_broken(flags)
                                                                             : 0;
    }
    if (file->error != 0 && file->error != EPIPE) {
        return k_take_error(file);
    }
    if (file->error != 0 || (file->shut & K_OUT_OVER) != 0) {
        file->error = 0;
        return k_broken(flags);
    }
    return 0;
}

/* Send pieces as one. */
static ssize_t k_send_pieces(k_file *file, const struct iovec *pieces, size_t count, int flags)
{
    ssize_t rc = k_may_send(file, flags);
    size_t total = 0, sent = 0, space;
    k_file *peer = file->peer;
    if (rc < 0) {
        return rc;
    }
    for (size_t i = 0; i < count; i++) {
        total += pieces[i].iov_len;
    }
    if (peer == NULL) { /* it was closed in good order: what comes now is answered by a reset */
        k_reset(file);
        return (ssize_t)total;
    }
    space = k_space(peer);
    if (space == 0 && total != 0) {
        return k_nothing(file, flags, "send");
    }
    for (size_t i = 0; i < count && space > 0; i++) {
        size_t size = pieces[i].iov_len < space ? pieces[i].iov_len : space;
        k_queue_put(&peer->in, pieces[i].iov_base, size);
        sent += size;
        space -= size;
    }
    if (file->kind == K_PIPE_OUT) {
        peer->in.arrived = peer->in.size;
        k_touch(peer);
    } else {
        k_send_arrives(peer);
    }
    return (ssize_t)sent;
}

static ssize_t k_send(int fd, const void *data, size_t size, int flags)
{
    k_file *file = k_get_socket(fd, "send");
    struct iovec piece;
    piece.iov_base = (void *)(uintptr_t)data;
    piece.iov_len = size;
    return file == NULL ? -1 : k_send_pieces(file, &piece, 1, flags);
}

static ssize_t k_sendmsg(int fd, const struct msghdr *message, int flags)
{
    k_file *file = k_get_socket(fd, "sendmsg");
    return file == NULL ? -1 : k_send_pieces(file, message->msg_iov, message->msg_iovlen, flags);
}

static ssize_t k_receive(k_file *file, void *data, size_t size, int flags)
{
    size_t there = file->in.arrived < size ? file->in.arrived : size;
    if (there != 0) {
        bool was_full = file->in.size >= file->capacity - file->capacity / 3;
        memcpy(data, file->in.data + file->in.begin, there);
        if ((flags & MSG_PEEK) == 0) {
            k_queue_drop(&file->in, there);
            if (was_full) {
                k_touch(file->peer);
            }
        }
        return (ssize_t)there;
    }
    if (file->kind == K_PIPE_IN) {
        return file->peer == NULL ? 0 : k_nothing(file, flags, "read");
    }
    if (file->done) {
        return 0;
    }
    if (file->error != 0) {
        return k_take_error(file);
    }
    if ((file->shut & K_IN_OVER) != 0) {
        return 0;
    }
    if (file->state == K_NEW || file->state == K_LISTENING || file->state == K_CLOSED) {
        errno = k_is_tcp(file) ? ENOTCONN : EINVAL;
        return -1;
    }
    return k_nothing(file, flags, "recv");
}

static ssize_t k_recv(int fd, void *data, size_t size, int flags)
{
    k_file *file = k_get_socket(fd, "recv");
    return file == NULL ? -1 : k_receive(file, data, size, flags);
}

static ssize_t k_read_random(void *data, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        ((unsigned char *)data)[i] = (unsigned char)(i * 37 + 11);
    }
    return (ssize_t)size;
}

static ssize_t k_read(int fd, void *data, size_t size)
{
    k_file *file = k_get(fd, "read");
    if (file == NULL) {
        return -1;
    }
    switch (file->kind) {
    case K_SOCKET:
    case K_PIPE_IN:
        return k_receive(file, data, size, 0);
    case K_EVENTFD:
        if (file->count == 0) {
            return k_nothing(file, 0, "read");
        }
        memcpy(data, &file->count, sizeof file->count);
        file->count = 0;
        return (ssize_t)sizeof file->count;
    case K_RANDOM:
        return k_read_random(data, size);
    case K_NULL:
        return 0;
    default:
        errno = EINVAL;
        return -1;
    }
}

static ssize_t k_write(int fd, const void *data, size_t size)
{
    k_file *file = k_get(fd, "write");
    struct iovec piece;
    uint64_t number;
    if (file == NULL) {
        return -1;
    }
    piece.iov_base = (void *)(uintptr_t)data;
    piece.iov_len = size;
    switch (file->kind) {
    case K_SOCKET:
    case K_PIPE_OUT:
        return k_send_pieces(file, &piece, 1, 0);
    case K_EVENTFD:
        memcpy(&number, data, sizeof number);
        file->count += number;
        k_touch(file);
        return (ssize_t)size;
    case K_NULL:
        return (ssize_t)size;
    case K_REGULAR:
        file->content = (char *)realloc(file->content, file->content_size + size + 1);
        memcpy(file->content + file->content_size, data, size);
        file->content_size += size;
        return (ssize_t)size;
    default:
        errno = EINVAL;
        return -1;
    }
}

K_UNUSED static ssize_t k_pread(int fd, void *data, size_t size, off_t offset)
{
    k_file *file = k_get(fd, "pread");
    size_t there;
    if (file == NULL) {
        return -1;
    }
    if (file->kind != K_REGULAR) {
        errno = ESPIPE;
        return -1;
    }
    there = (size_t)offset < file->content_size ? file->content_size - (size_t)offset : 0;
    there = there < size ? there : size;
    if (there != 0) {
        memcpy(data, file->content + offset, there);
    }
    return (ssize_t)there;
}

/* As Linux does: a signal when the socket is broken, also behind a part that went. */
K_UNUSED static ssize_t k_sendfile(int fd, int from, off_t *offset, size_t size)
{
    k_file *file = k_get_socket(fd, "sendfile"), *source = k_get(from, "sendfile");
    struct iovec piece;
    ssize_t sent;
    if (file == NULL || source == NULL) {
        return -1;
    }
    piece.iov_len = (size_t)*offset < source->content_size ? source->content_size - (size_t)*offset : 0;
    piece.iov_len = piece.iov_len < size ? piece.iov_len : size;
    if (piece.iov_len == 0) {
        return 0;
    }
    piece.iov_base = source->content + *offset;
    sent = k_send_pieces(file, &piece, 1, 0);
    *offset += sent > 0 ? sent : 0;
    return sent;
}

/* ---- options and names --------------------------------------------------------------------*/

static int k_setsockopt(int fd, int level, int name, const void *value, socklen_t size)
{
    k_file *file = k_get_socket(fd, "setsockopt");
    int number = 0;
    if (file == NULL) {
        return -1;
    }
    memcpy(&number, value, size < sizeof number ? size : sizeof number);
    if (level == IPPROTO_TCP && !k_is_tcp(file)) {
        errno = EOPNOTSUPP;
        return -1;
    }
    if (level == SOL_SOCKET && name == SO_LINGER) {
        const struct linger *linger = (const struct linger *)value;
        file->abrupt = linger->l_onoff != 0 && linger->l_linger == 0;
    } else if (level == SOL_SOCKET && name == SO_REUSEPORT) {
        file->reuse_port = number != 0;
    } else if (level == SOL_SOCKET && name == SO_SNDBUF && file->peer != NULL) {
        file->peer->capacity = number < 4000 ? 4000 : (size_t)number;
    } else if (level == IPPROTO_IPV6 && name == IPV6_V6ONLY) {
        file->only_v6 = number != 0;
    }
    return 0;
}

static int k_getsockopt(int fd, int level, int name, void *value, socklen_t *size)
{
    k_file *file = k_get_socket(fd, "getsockopt");
    int number;
    if (file == NULL) {
        return -1;
    }
    if (level == SOL_SOCKET && name == SO_ERROR) {
        number = file->error;
        file->error = 0;
    } else if (level == SOL_SOCKET && name == SO_TYPE) {
        number = SOCK_STREAM;
    } else if (level == SOL_SOCKET && name == SO_ACCEPTCONN) {
        number = file->state == K_LISTENING;
    } else if (level == SOL_SOCKET && name == SO_REUSEPORT) {
        number = file->reuse_port;
    } else if (level == IPPROTO_IPV6 && name == IPV6_V6ONLY) {
        number = file->only_v6;
    } else {
        errno = ENOPROTOOPT;
        return -1;
    }
    memcpy(value, &number, sizeof number);
    *size = (socklen_t)sizeof number;
    return 0;
}

static int k_getsockname(int fd, struct sockaddr *address, socklen_t *size)
{
    k_file *file = k_get_socket(fd, "getsockname");
    if (file == NULL) {
        return -1;
    }
    k_give_name(&file->local, file->local_size, address, size);
    return 0;
}

static int k_getpeername(int fd, struct sockaddr *address, socklen_t *size)
{
    k_file *file = k_get_socket(fd, "getpeername");
    if (file == NULL) {
        return -1;
    }
    if (k_is_tcp(file) ? file->state != K_CONNECTED : !file->was_peered) {
        errno = ENOTCONN;
        return -1;
    }
    k_give_name(&file->remote, file->remote_size == 0 ? (socklen_t)sizeof(sa_family_t) : file->remote_size, address,
                size);
    return 0;
}

/* TIOCOUTQ: what the other side has not got yet. */
static int k_ioctl(int fd, unsigned long request, int *value)
{
    k_file *file = k_get_socket(fd, "ioctl");
    if (file == NULL) {
        return -1;
    }
    if (request != TIOCOUTQ) {
        errno = EINVAL;
        return -1;
    }
    *value = file->peer == NULL  ? 0
             : k_is_tcp(file) ? (int)(file->peer->in.size - file->peer->in.arrived)
                              : (int)file->peer->in.size;
    return 0;
}

/* ---- what is ready ------------------------------------------------------------------------*/

static bool k_can_send(const k_file *file)
{
    return file->peer == NULL || k_space(file->peer) * 3 >= file->peer->capacity;
}

/* poll(2)'s events, which are epoll's too. */
static int k_ready_socket(const k_file *file)
{
    int events = file->error != 0 ? POLLERR : 0;
    if (file->state == K_LISTENING) {
        return file->waiting_count != 0 ? POLLIN : 0;
    }
    if (file->state == K_CONNECTING) {
        return events;
    }
    if (file->state == K_NEW) {
        return POLLOUT | POLLHUP;
    }
    if (file->shut == (K_IN_OVER | K_OUT_OVER) || file->state == K_CLOSED) {
        events |= POLLHUP;
    }
    if (file->in.arrived != 0 || (file->shut & K_IN_OVER) != 0) {
        events |= POLLIN;
    }
    if ((file->shut & K_IN_OVER) != 0) {
        events |= POLLRDHUP;
    }
    if ((k_is_tcp(file) && (file->shut & K_OUT_OVER) != 0) || k_can_send(file)) {
        events |= POLLOUT;
    }
    return events;
}

static int k_ready_set(k_file *set);

static int k_ready(k_file *file)
{
    switch (file->kind) {
    case K_SOCKET:
        return k_ready_socket(file);
    case K_EVENTFD:
        return (file->count != 0 ? POLLIN : 0) | POLLOUT;
    case K_PIPE_IN:
        return (file->in.arrived != 0 ? POLLIN : 0) | (file->peer == NULL ? POLLHUP : 0);
    case K_PIPE_OUT:
        return file->peer == NULL ? POLLERR | POLLOUT : k_can_send(file) ? POLLOUT : 0;
    case K_EPOLL:
    case K_KQUEUE:
        return k_ready_set(file);
    default:
        return POLLIN | POLLOUT;
    }
}

/* ---- waits --------------------------------------------------------------------------------*/

static bool k_for_ever; /* the last wait found nothing, and had no limit */
static int k_wait_ms;   /* how long the last one was asked to wait; 0 where it found something */

/* A wait finds nothing: time passes. */
static void k_pass(int timeout_ms)
{
    k_wait_ms = timeout_ms;
    if (timeout_ms < 0) {
        k_for_ever = true;
    } else {
        k_now += (uint64_t)timeout_ms * K_MS;
    }
}

static void k_wait_begins(void)
{
    k_for_ever = false;
    k_wait_ms = 0;
    if (k_waits != NULL) {
        k_waits();
    }
    k_deliver();
}

/* Is a wait for `timeout_ms` over, having found nothing? What the schedule withholds is there the next time. */
static bool k_wait_goes_on(int timeout_ms, bool withheld)
{
    if (timeout_ms == 0 || withheld) {
        return false;
    }
    k_pass(timeout_ms);
    k_deliver();
    return true;
}

/* A decision of the schedule about one event that is ready: true = this wait does not tell of it. */
static bool k_withholds(void)
{
    return k_decide(8) == 1;
}

static int k_poll(struct pollfd *entries, nfds_t size, int timeout_ms)
{
    bool withheld = false;
    if (size == 0) { /* to sleep */
        k_pass(timeout_ms);
        return 0;
    }
    k_wait_begins();
    for (int round = 0; round < 2; round++) {
        int count = 0;
        for (nfds_t i = 0; i < size; i++) {
            struct pollfd *entry = &entries[i];
            entry->revents = 0;
            if (entry->fd >= 0) {
                int events = k_is_open(entry->fd) ? k_ready(k.slots[entry->fd].file) : POLLNVAL;
                entry->revents = (short)(events & (entry->events | POLLERR | POLLHUP | POLLNVAL));
            }
            if (entry->revents != 0 && timeout_ms != 0 && k_withholds()) {
                entry->revents = 0;
                withheld = true;
            }
            count += entry->revents != 0;
        }
        if (count != 0 || round == 1 || !k_wait_goes_on(timeout_ms, withheld)) {
            return count;
        }
    }
    return 0;
}

static k_file *k_get_set(int fd, k_kind kind, const char *call)
{
    k_file *set = k_get(fd, call);
    if (set != NULL && set->kind != kind) {
        errno = EINVAL;
        return NULL;
    }
    return set;
}

static int k_epoll_create1(int flags)
{
    return k_install_new(k_file_new(K_EPOLL), 0, (flags & EPOLL_CLOEXEC) != 0);
}

static void k_watch_add(k_file *set, k_file *file, int fd)
{
    k_watch *watch;
    if (set->watch_count == K_WATCHES) {
        k_violation("more descriptors are waited for than the model has room for");
    }
    watch = &set->watches[set->watch_count++];
    memset(watch, 0, sizeof *watch);
    watch->file = file;
    watch->fd = fd;
}

static k_watch *k_watch_find(k_file *set, const k_file *file, int fd, int filter)
{
    for (int i = 0; i < set->watch_count; i++) {
        k_watch *watch = &set->watches[i];
        if (watch->file == file && watch->fd == fd && watch->filter == filter) {
            return watch;
        }
    }
    return NULL;
}

static void k_watch_remove(k_file *set, k_watch *watch)
{
    memmove(watch, watch + 1, (size_t)(&set->watches[set->watch_count--] - watch - 1) * sizeof *watch);
}

static int k_epoll_ctl(int fd, int operation, int target, struct epoll_event *event)
{
    k_file *set = k_get_set(fd, K_EPOLL, "epoll_ctl"), *file;
    k_watch *watch;
    if (set == NULL) {
        return -1;
    }
    if (!k_is_open(target)) { /* to be told so is how one finds out */
        errno = EBADF;
        return -1;
    }
    file = k.slots[target].file;
    if (file->kind == K_REGULAR || file->kind == K_NULL || file->kind == K_DIRECTORY) {
        errno = EPERM;
        return -1;
    }
    watch = k_watch_find(set, file, target, 0);
    if (operation == EPOLL_CTL_ADD ? watch != NULL : watch == NULL) {
        errno = watch != NULL ? EEXIST : ENOENT;
        return -1;
    }
    if (operation == EPOLL_CTL_DEL) {
        k_watch_remove(set, watch);
        return 0;
    }
    if (operation == EPOLL_CTL_MOD && ((event->events | watch->events) & EPOLLEXCLUSIVE) != 0) {
        errno = EINVAL;
        return -1;
    }
    if (watch == NULL) {
        k_watch_add(set, file, target);
        watch = &set->watches[set->watch_count - 1];
    }
    watch->events = event->events;
    watch->data = event->data.u64;
    return 0;
}

static uint32_t k_epoll_events(const k_watch *watch)
{
    return (uint32_t)k_ready(watch->file) & (watch->events | EPOLLERR | EPOLLHUP);
}

static int k_epoll_look(k_file *set, struct epoll_event *events, int size, bool *withheld)
{
    int count = 0, from = set->watch_count == 0 ? 0 : (int)k_decide((unsigned)set->watch_count);
    for (int i = 0; i < set->watch_count && count < size; i++) {
        const k_watch *watch = &set->watches[(from + i) % set->watch_count];
        uint32_t got = k_epoll_events(watch);
        if (got != 0 && withheld != NULL && k_withholds()) {
            *withheld = true;
        } else if (got != 0) {
            events[count].events = got;
            events[count++].data.u64 = watch->data;
        }
    }
    return count;
}

static int k_epoll_wait(int fd, struct epoll_event *events, int size, int timeout_ms)
{
    k_file *set = k_get_set(fd, K_EPOLL, "epoll_wait");
    bool withheld = false;
    int count;
    if (set == NULL) {
        return -1;
    }
    k_wait_begins();
    count = k_epoll_look(set, events, size, timeout_ms != 0 ? &withheld : NULL);
    if (count == 0 && k_wait_goes_on(timeout_ms, withheld)) {
        count = k_epoll_look(set, events, size, NULL);
    }
    return count;
}

/* ---- kqueue -------------------------------------------------------------------------------*/

static int k_kqueue(void)
{
    return k_install_new(k_file_new(K_KQUEUE), 0, false);
}

static int k_kevent_change(k_file *set, const struct kevent *change)
{
    int fd = (int)change->ident;
    k_file *file;
    k_watch *watch;
    if (!k_is_open(fd)) {
        return EBADF;
    }
    file = k.slots[fd].file;
    if (file->kind == K_REGULAR) {
        return EPERM;
    }
    watch = k_watch_find(set, file, fd, change->filter);
    if ((change->flags & EV_DELETE) != 0) {
        if (watch == NULL) {
            return ENOENT;
        }
        k_watch_remove(set, watch);
        return 0;
    }
    if (watch == NULL) {
        k_watch_add(set, file, fd);
        watch = &set->watches[set->watch_count - 1];
        watch->filter = change->filter;
        watch->events = change->flags & (EV_CLEAR | EV_ONESHOT);
    }
    watch->told = false; /* EV_ADD looks anew */
    watch->udata = change->udata;
    return 0;
}

/* FreeBSD's filt_soread and filt_sowrite. 0 = not ready; else the flags, and 1. */
static unsigned k_kevent_flags(const k_watch *watch, unsigned *error)
{
    k_file *file = watch->file;
    bool writes = watch->filter == EVFILT_WRITE;
    int ready = k_ready(file);
    *error = 0;
    if (file->kind != K_SOCKET || file->state == K_LISTENING) {
        return (ready & (writes ? POLLOUT : POLLIN)) != 0 ? 1 : 0;
    }
    if ((file->shut & (writes ? K_OUT_OVER : K_IN_OVER)) != 0) {
        *error = (unsigned)file->error;
        return EV_EOF | 1;
    }
    if (file->error != 0) {
        return 1;
    }
    if (file->state != K_CONNECTED) {
        return 0;
    }
    return (writes ? k_can_send(file) : file->in.arrived != 0) ? 1 : 0;
}

static int k_kevent_look(k_file *set, struct kevent *events, int size, bool *withheld)
{
    int count = 0, from = set->watch_count == 0 ? 0 : (int)k_decide((unsigned)set->watch_count);
    for (int i = 0; i < set->watch_count && count < size; i++) {
        k_watch *watch = &set->watches[(from + i) % set->watch_count];
        unsigned error, flags = k_kevent_flags(watch, &error);
        if (flags == 0 || ((watch->events & EV_CLEAR) != 0 && watch->told && watch->seen == watch->file->activity)) {
            continue;
        }
        if (withheld != NULL && k_withholds()) {
            *withheld = true;
            continue;
        }
        watch->told = true;
        watch->seen = watch->file->activity;
        EV_SET(&events[count], watch->fd, watch->filter, flags & EV_EOF, error,
               watch->filter == EVFILT_WRITE ? 1 : (int64_t)watch->file->in.arrived, watch->udata);
        count++;
    }
    return count;
}

static int k_kevent(int fd, const struct kevent *changes, int change_count, struct kevent *events, int size,
                    const struct timespec *limit)
{
    k_file *set = k_get_set(fd, K_KQUEUE, "kevent");
    int timeout_ms = limit == NULL ? -1 : (int)(limit->tv_sec * 1000 + (limit->tv_nsec + 999999) / 1000000), count;
    bool withheld = false;
    if (set == NULL) {
        return -1;
    }
    for (int i = 0; i < change_count; i++) {
        int error = k_kevent_change(set, &changes[i]);
        if (error != 0) {
            errno = error;
            return -1;
        }
    }
    if (size == 0) {
        return 0;
    }
    k_wait_begins();
    count = k_kevent_look(set, events, size, timeout_ms != 0 ? &withheld : NULL);
    if (count == 0 && k_wait_goes_on(timeout_ms, withheld)) {
        count = k_kevent_look(set, events, size, NULL);
    }
    return count;
}

/* Has a set that is itself waited for anything to tell? */
static int k_ready_set(k_file *set)
{
    for (int i = 0; i < set->watch_count; i++) {
        unsigned error;
        if (set->kind == K_EPOLL ? k_epoll_events(&set->watches[i]) != 0
                                 : k_kevent_flags(&set->watches[i], &error) != 0) {
            return POLLIN;
        }
    }
    return 0;
}

/* ---- the rest -----------------------------------------------------------------------------*/

K_UNUSED static int k_clock_gettime(clockid_t id, struct timespec *result)
{
    (void)id;
    result->tv_sec = (time_t)(k_now / 1000000000);
    result->tv_nsec = (long)(k_now % 1000000000);
    return 0;
}

static int k_eventfd(unsigned count, int flags)
{
    k_file *file = k_file_new(K_EVENTFD);
    file->count = count;
    return k_install_new(file, (flags & EFD_NONBLOCK) != 0 ? O_NONBLOCK : 0, (flags & EFD_CLOEXEC) != 0);
}

static int k_pipe(int *fds)
{
    k_file *in = k_file_new(K_PIPE_IN), *out = k_file_new(K_PIPE_OUT);
    in->peer = out;
    out->peer = in;
    fds[0] = k_install_new(in, 0, false);
    fds[1] = k_install_new(out, 0, false);
    if (fds[0] < 0 || fds[1] < 0) {
        if (fds[0] >= 0) {
            k_close(fds[0]);
        }
        errno = EMFILE;
        return -1;
    }
    return 0;
}

/* An empty regular file. */
K_UNUSED static int k_memfd_create(const char *name, unsigned flags)
{
    (void)name, (void)flags;
    return k_install_new(k_file_new(K_REGULAR), 0, true);
}

static int k_open(const char *path, int flags, ...)
{
    k_kind kind = strcmp(path, "/dev/null") == 0      ? K_NULL
                  : strcmp(path, "/proc/self/fd/2") == 0 ? K_NULL
                  : strcmp(path, "/dev/urandom") == 0 ? K_RANDOM
                  : (flags & O_DIRECTORY) != 0        ? K_DIRECTORY
                                                      : K_REGULAR;
    k_file *file;
    if (kind == K_REGULAR && k_find_name(path) == NULL) {
        errno = ENOENT;
        return -1;
    }
    file = k_file_new(kind);
    file->number = kind == K_REGULAR ? k_find_name(path)->number : file->number;
    return k_install_new(file, 0, (flags & O_CLOEXEC) != 0);
}

static void k_describe(struct stat *info, mode_t mode, uint64_t number, size_t size)
{
    memset(info, 0, sizeof *info);
    info->st_mode = mode;
    info->st_ino = (ino_t)number;
    info->st_dev = 1;
    info->st_size = (off_t)size;
}

K_UNUSED static int k_fstat(int fd, struct stat *info)
{
    k_file *file = k_get(fd, "fstat");
    if (file == NULL) {
        return -1;
    }
    k_describe(info,
               file->kind == K_SOCKET                                 ? S_IFSOCK
               : file->kind == K_REGULAR                              ? S_IFREG
               : file->kind == K_PIPE_IN || file->kind == K_PIPE_OUT ? S_IFIFO
               : file->kind == K_DIRECTORY                            ? S_IFDIR
                                                                      : S_IFCHR,
               file->number, file->content_size);
    if (file->kind == K_REGULAR && file->content_size == 0) { /* a name, opened with O_PATH */
        info->st_mode = S_IFSOCK;
    }
    return 0;
}

K_UNUSED static int k_lstat(const char *path, struct stat *info)
{
    k_name *name = k_find_name(path);
    if (name == NULL) {
        errno = ENOENT;
        return -1;
    }
    k_describe(info, S_IFSOCK, name->number, 0);
    return 0;
}

K_UNUSED static int k_unlink(const char *path)
{
    k_name *name = k_find_name(path);
    if (name == NULL) {
        errno = ENOENT;
        return -1;
    }
    memset(name, 0, sizeof *name);
    return 0;
}

/* ---- signals: those of one thread, which are raised by the schedule ------------------------*/

K_UNUSED static int k_sigprocmask(int how, const sigset_t *set, sigset_t *before)
{
    if (before != NULL) {
        sigemptyset(before);
        if (k.sigpipe_blocked) {
            sigaddset(before, SIGPIPE);
        }
    }
    if (set != NULL && how == SIG_SETMASK) {
        k.sigpipe_blocked = sigismember(set, SIGPIPE) == 1;
        if (!k.sigpipe_blocked && k.sigpipe_pending) {
            k_violation("SIGPIPE is delivered");
        }
    } else if (set != NULL && how == SIG_BLOCK && sigismember(set, SIGPIPE) == 1) {
        k.sigpipe_blocked = true;
    }
    return 0;
}

K_UNUSED static int k_sigpending(sigset_t *set)
{
    sigemptyset(set);
    if (k.sigpipe_pending) {
        sigaddset(set, SIGPIPE);
    }
    return 0;
}

K_UNUSED static int k_sigtimedwait(const sigset_t *set, siginfo_t *info, const struct timespec *limit)
{
    (void)info, (void)limit;
    if (k.sigpipe_pending && sigismember(set, SIGPIPE) == 1) {
        k.sigpipe_pending = false;
        return SIGPIPE;
    }
    errno = EAGAIN;
    return -1;
}

K_UNUSED static int k_sigaction(int signo, const struct sigaction *action, struct sigaction *before)
{
    if (signo < 1 || signo > 64) {
        errno = EINVAL;
        return -1;
    }
    if (before != NULL) {
        *before = k.actions[signo];
    }
    if (action != NULL) {
        k.actions[signo] = *action;
    }
    return 0;
}

/* The schedule sends a signal; true = somebody handles it. */
K_UNUSED static bool k_raise(int signo)
{
    if (k.actions[signo].sa_handler == SIG_DFL || k.actions[signo].sa_handler == SIG_IGN) {
        return false;
    }
    k.actions[signo].sa_handler(signo);
    return true;
}

/* ---- a run --------------------------------------------------------------------------------*/

/* Everything is as after boot: descriptors 0 to 2 are open. */
static void k_boot(void)
{
    while (k.files != NULL) {
        k_file *next = k.files->next;
        k_queue_free(&k.files->in);
        free(k.files->content);
        free(k.files->watches);
        free(k.files);
        k.files = next;
    }
    memset(&k, 0, sizeof k);
    k.limit = K_FDS;
    k_late = k_lax = false;
    k_calls = 0;
    for (int fd = 0; fd < 3; fd++) {
        k_install(k_file_new(K_NULL), 0, false);
    }
}

K_UNUSED static int k_open_count(void)
{
    int count = 0;
    for (int fd = 0; fd < K_FDS; fd++) {
        count += k.slots[fd].file != NULL;
    }
    return count;
}

#endif
