/* The seams of tcpserver.h, on the simulated kernel: every system call and every allocation knows the place in the
 * header that makes it (its site), and can be made to fail there. Included before the header.
 *
 * What fails, and how, is up to s_plan: a function that is asked at every call that can fail, and answers with one of
 * the codes of the call's class. S_SHORT moves one byte. */
#ifndef SIM_SYS_H
#define SIM_SYS_H

#include "kernel.h"

#include <arpa/inet.h>
#include <grp.h>
#include <pwd.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/wait.h>

#define TSRV_NO_THREADS /* there is one thread; names are looked up at once */

enum { S_CODES = 15, S_SHORT = -1 };

/* A place in the header. */
typedef struct s_site {
    const char *name, *function;
    int line;
    unsigned long calls;
    unsigned long done[2][S_CODES]; /* once and sticky, by the code's place in its class */
} __attribute__((aligned(64))) s_site; /* which compilers would else align as they like */

extern s_site __start_s_sites[], __stop_s_sites[];

static s_site *s_at; /* the one that calls */

#define S_HERE(text, call)                                                                                            \
    __extension__({                                                                                                   \
        static s_site s_here __attribute__((section("s_sites"), used)) = {text, __func__, __LINE__, 0, {{0}}};       \
        s_at = &s_here;                                                                                               \
        call;                                                                                                         \
    })

/* What calls may fail with. The list ends with a 0. */
typedef struct s_class {
    const char *name;
    int codes[S_CODES];
} s_class;

static const s_class s_classes[] = {
    {"accept",
     {EAGAIN, EINTR, ECONNABORTED, EPROTO, EPERM, ENETDOWN, EHOSTUNREACH, EMFILE, ENFILE, ENOBUFS, ENOMEM, EBADF,
      EINVAL}},
    {"accept4",
     {EAGAIN, EINTR, ECONNABORTED, EPROTO, EPERM, ENETDOWN, EHOSTUNREACH, EMFILE, ENFILE, ENOBUFS, ENOMEM, EBADF,
      EINVAL, ENOSYS}},
    {"bind", {EADDRINUSE, EACCES, EADDRNOTAVAIL, EINVAL, ENOMEM}},
    {"chmod", {EPERM, ENOENT, EROFS}},
    {"close", {EINTR, EIO}},
    {"connect", {ECONNREFUSED, ENETUNREACH, EHOSTUNREACH, ETIMEDOUT, EADDRNOTAVAIL, EACCES, EAGAIN, EINTR}},
    {"dup2", {EMFILE, EBADF}},
    {"epoll_create1", {EMFILE, ENFILE, ENOMEM, ENOSYS}},
    {"epoll_ctl", {ENOMEM, ENOSPC, EINVAL, EBADF, EPERM}},
    {"epoll_wait", {EINTR}},
    {"eventfd", {EMFILE, ENFILE, ENOMEM, ENOSYS}},
    {"fchmod", {EPERM, EINVAL}},
    {"fcntl", {EBADF, EINVAL, EMFILE}},
    {"flock", {EAGAIN, EINTR, ENOLCK}},
    {"fstat", {EIO, ENOMEM}},
    {"getaddrinfo", {EAI_MEMORY, EAI_AGAIN, EAI_NONAME, EAI_FAIL}},
    {"getpeername", {ENOTCONN, ENOBUFS}},
    {"getsockname", {ENOBUFS, EBADF}},
    {"getsockopt", {ENOBUFS, EINVAL}},
    {"ioctl", {EINVAL, ENOTTY}},
    {"kevent", {EINTR}},
    {"kevent_set", {ENOMEM, EINTR}},
    {"kqueue", {EMFILE, ENFILE, ENOMEM}},
    {"listen", {EADDRINUSE, EACCES, ENOMEM}},
    {"lstat", {ENOENT, EACCES, EIO}},
    {"madvise", {EINVAL, ENOMEM}},
    {"malloc", {ENOMEM}},
    {"mmap", {ENOMEM}},
    {"mprotect", {ENOMEM}},
    {"munmap", {ENOMEM, EINVAL}},
    {"open", {EMFILE, ENFILE, ENOENT, EACCES, ENOMEM}},
    {"pipe", {EMFILE, ENFILE}},
    {"poll", {EINTR, ENOMEM}},
    {"pread", {EINTR, EIO, S_SHORT}},
    {"read", {EINTR, EIO, S_SHORT}},
    {"realloc", {ENOMEM}},
    {"recv", {EAGAIN, EINTR, ECONNRESET, ETIMEDOUT, EHOSTUNREACH, EPIPE, EIO, ENOMEM, S_SHORT}},
    {"send", {EAGAIN, EINTR, EPIPE, ECONNRESET, ETIMEDOUT, EHOSTUNREACH, ENOBUFS, ENOMEM, S_SHORT}},
    {"sendfile", {EAGAIN, EINTR, EPIPE, ECONNRESET, EIO, ENOSYS, EINVAL, EPERM, EOVERFLOW, ENOMEM, S_SHORT}},
    {"sendmsg", {EAGAIN, EINTR, EPIPE, ECONNRESET, ETIMEDOUT, EHOSTUNREACH, ENOBUFS, ENOMEM, S_SHORT}},
    {"setsockopt", {EINVAL, ENOPROTOOPT, ENOBUFS}},
    {"shutdown", {ENOTCONN}},
    {"sigaction", {EINVAL}},
    {"socket", {EMFILE, ENFILE, ENOBUFS, ENOMEM, EAFNOSUPPORT, EACCES}},
    {"socketpair", {EMFILE, ENFILE, ENOMEM}},
    {"unlink", {ENOENT, EACCES, EROFS}},
    {"write", {EAGAIN, EINTR, ENOSPC, S_SHORT}},
};

static const s_class *s_class_of(const char *name)
{
    for (size_t i = 0; i < sizeof s_classes / sizeof s_classes[0]; i++) {
        if (strcmp(s_classes[i].name, name) == 0) {
            return &s_classes[i];
        }
    }
    return NULL;
}

static int s_code_count(const s_class *class)
{
    int count = 0;
    while (count < S_CODES && class->codes[count] != 0) {
        count++;
    }
    return count;
}

static int (*s_plan)(const s_class *class); /* 0 = this call goes well; else a code of the class */
static void (*s_moves)(void);               /* told when something has moved: bytes, connections */
static void (*s_calls)(void);               /* told of every call */
static int s_code;                          /* what the call is made to fail with */

/* Does the call fail? Then errno is set, but for S_SHORT. */
static bool s_fault(const char *name)
{
    static const char *last_name;
    static const s_class *last;
    if (last_name != name) {
        last_name = name;
        last = s_class_of(name);
    }
    s_at->calls++;
    k_calls++;
    if (s_calls != NULL) {
        s_calls();
    }
    s_code = s_plan == NULL || last == NULL ? 0 : s_plan(last);
    if (s_code > 0) {
        errno = s_code;
    }
    return s_code != 0 && s_code != S_SHORT;
}

static size_t s_cut(size_t size)
{
    return s_code == S_SHORT && size > 1 ? 1 : size;
}

static void s_moved(void)
{
    if (s_moves != NULL) {
        s_moves();
    }
}

/* ---- calls that move bytes ----------------------------------------------------------------*/

/* An error that ends a connection has ended it. */
static ssize_t s_broken(int fd)
{
    bool ends = errno == ENOTCONN || errno == ECONNRESET || errno == ETIMEDOUT || errno == EHOSTUNREACH ||
                errno == EPIPE;
    int saved = errno;
    if (ends && k_is_open(fd) && k.slots[fd].file->kind == K_SOCKET && k.slots[fd].file->state == K_CONNECTED) {
        k_file *file = k.slots[fd].file, *peer = file->peer;
        file->peer = NULL;
        k_reset(file);
        file->error = 0;
        if (peer != NULL) {
            peer->peer = NULL;
            k_reset(peer);
            peer->state = K_CLOSED;
            peer->shut = K_IN_OVER | K_OUT_OVER;
        }
    }
    errno = saved;
    return -1;
}

static ssize_t s_done(ssize_t count)
{
    if (count > 0) {
        s_moved();
    }
    return count;
}

K_UNUSED static ssize_t s_recv(int fd, void *data, size_t size, int flags)
{
    return s_fault("recv") ? s_broken(fd) : s_done(k_recv(fd, data, s_cut(size), flags));
}

K_UNUSED static ssize_t s_send(int fd, const void *data, size_t size, int flags)
{
    return s_fault("send") ? s_broken(fd) : s_done(k_send(fd, data, s_cut(size), flags));
}

K_UNUSED static ssize_t s_sendmsg(int fd, const struct msghdr *message, int flags)
{
    if (s_fault("sendmsg")) {
        return s_broken(fd);
    }
    if (s_code == S_SHORT) {
        return s_done(k_send(fd, message->msg_iov[0].iov_base, s_cut(message->msg_iov[0].iov_len), flags));
    }
    return s_done(k_sendmsg(fd, message, flags));
}

K_UNUSED static ssize_t s_sendfile(int fd, int from, off_t *offset, size_t size)
{
    return s_fault("sendfile") ? s_broken(fd) : s_done(k_sendfile(fd, from, offset, s_cut(size)));
}

K_UNUSED static int s_accept4(int fd, struct sockaddr *address, socklen_t *size, int flags, const char *name)
{
    int rc;
    if (s_fault(name)) {
        k_file *listener = k_is_open(fd) ? k.slots[fd].file : NULL;
        int saved = errno;
        if (saved == ECONNABORTED && listener != NULL && listener->waiting_count != 0) {
            int lost = k_accept4(fd, NULL, NULL, 0);
            if (lost >= 0) {
                k.slots[lost].file->abrupt = true;
                k_close(lost);
            }
        }
        errno = saved;
        return -1;
    }
    rc = k_accept4(fd, address, size, flags);
    if (rc >= 0) {
        s_moved();
    }
    return rc;
}

/* It is closed all the same. */
K_UNUSED static int s_close(int fd)
{
    int rc = k_close(fd);
    s_moved();
    return s_fault("close") ? -1 : rc;
}

/* After EINTR the changes have been made, says kevent(2). */
K_UNUSED static int s_kevent(int kq, const struct kevent *changes, int count, struct kevent *events, int size,
                             const struct timespec *limit)
{
    bool adds = false;
    for (int i = 0; i < count; i++) {
        adds = adds || (changes[i].flags & EV_ADD) != 0;
    }
    if ((count > 0 && !adds) || !s_fault(count > 0 ? "kevent_set" : "kevent")) { /* to remove takes no memory */
        return k_kevent(kq, changes, count, events, size, limit);
    }
    if (count > 0 && errno == EINTR && k_kevent(kq, changes, count, NULL, 0, NULL) == 0) {
        errno = EINTR;
    }
    return -1;
}

/* ---- memory -------------------------------------------------------------------------------*/

enum { S_HEAD = 32 };

static long s_live, s_live_bytes;

static void *s_give(char *memory, size_t size)
{
    memcpy(memory, &size, sizeof size);
    s_live++;
    s_live_bytes += (long)size;
    return memory + S_HEAD;
}

K_UNUSED static void *s_malloc(size_t size)
{
    char *memory;
    if (s_fault("malloc")) {
        return NULL;
    }
    memory = (char *)malloc(size + S_HEAD);
    memset(memory + S_HEAD, 0xA5, size < 4096 ? size : 4096); /* nothing may count on zeros */
    return s_give(memory, size);
}

K_UNUSED static void s_free(void *memory)
{
    size_t size;
    if (memory == NULL) {
        return;
    }
    memcpy(&size, (char *)memory - S_HEAD, sizeof size);
    s_live--;
    s_live_bytes -= (long)size;
    memset(memory, 0xDD, size < 4096 ? size : 4096); /* what still looks at it finds this */
    free((char *)memory - S_HEAD);
}

/* It always moves. */
K_UNUSED static void *s_realloc(void *old, size_t size)
{
    size_t before = 0;
    char *memory;
    if (s_fault("realloc")) {
        return NULL;
    }
    if (old != NULL) {
        memcpy(&before, (char *)old - S_HEAD, sizeof before);
    }
    memory = (char *)malloc(size + S_HEAD);
    memory = (char *)s_give(memory, size);
    if (old != NULL) {
        memcpy(memory, old, before < size ? before : size);
    }
    s_free(old);
    return memory;
}

#define TSRV_MALLOC(size) S_HERE("malloc", s_malloc(size))
#define TSRV_REALLOC(pointer, size) S_HERE("realloc", s_realloc(pointer, size))
#define TSRV_FREE(pointer) s_free(pointer)
#define TSRV_SYS(name, arguments) S_HERE(#name, s_sys_##name arguments)
#define TSRVI_TICKS k_now

/* ---- names --------------------------------------------------------------------------------*/

/* "two" has two addresses, "lost" none that answers, others do not exist. Numbers are themselves. */
K_UNUSED static int s_getaddrinfo(const char *host, const char *service, const struct addrinfo *hints,
                                  struct addrinfo **all)
{
    static const char *const two[] = {"::1", "127.0.0.1"}, *const lost[] = {"10.0.0.1", "192.0.2.1"};
    const char *const *names = &host;
    int count = 1, rc = 0;
    if (s_fault("getaddrinfo")) {
        return s_code;
    }
    if (host != NULL && (strcmp(host, "two") == 0 || strcmp(host, "localhost") == 0)) {
        names = two, count = 2;
    } else if (host != NULL && strcmp(host, "lost") == 0) {
        names = lost, count = 2;
    } else if (host != NULL && strspn(host, "0123456789.:abcdef") != strlen(host)) {
        return EAI_NONAME;
    }
    *all = NULL;
    for (int i = 0; i < count && rc == 0; i++) {
        struct addrinfo numeric = *hints, *one = NULL, **last = all;
        numeric.ai_flags |= AI_NUMERICHOST | AI_NUMERICSERV;
        numeric.ai_flags &= ~AI_ADDRCONFIG;
        rc = getaddrinfo(names[i], service, &numeric, &one);
        while (*last != NULL) {
            last = &(*last)->ai_next;
        }
        *last = one;
        if (rc == EAI_ADDRFAMILY || rc == EAI_NONAME) {
            rc = count > 1 ? 0 : rc; /* of the other family */
        }
    }
    s_live += *all != NULL;
    return rc != 0 ? rc : *all == NULL ? EAI_NONAME : 0;
}

K_UNUSED static void s_freeaddrinfo(struct addrinfo *all)
{
    s_live--;
    freeaddrinfo(all);
}

K_UNUSED static int s_ok(void)
{
    return 0;
}

#define S_OR(name, failure, call) (s_fault(name) ? (failure) : (call))

#define s_sys_accept(fd, address, size) s_accept4(fd, address, size, 0, "accept")
#define s_sys_accept4(fd, address, size, flags) s_accept4(fd, address, size, flags, "accept4")
#define s_sys_alarm(...) 0u
#define s_sys_bind(...) S_OR("bind", -1, k_bind(__VA_ARGS__))
#define s_sys_chmod(path, mode) ((void)(path), (void)(mode), S_OR("chmod", -1, s_ok()))
#define s_sys_clock_gettime(...) k_clock_gettime(__VA_ARGS__)
#define s_sys_close(...) s_close(__VA_ARGS__)
#define s_sys_connect(...) S_OR("connect", -1, k_connect(__VA_ARGS__))
#define s_sys_dup2(...) S_OR("dup2", -1, k_dup2(__VA_ARGS__))
#define s_sys_epoll_create1(...) S_OR("epoll_create1", -1, k_epoll_create1(__VA_ARGS__))
#define s_sys_epoll_ctl(set, operation, fd, event)                                                                    \
    ((operation) == EPOLL_CTL_ADD && s_fault("epoll_ctl") ? -1 : k_epoll_ctl(set, operation, fd, event))
#define s_sys_epoll_wait(...) S_OR("epoll_wait", -1, k_epoll_wait(__VA_ARGS__))
#define s_sys_eventfd(...) S_OR("eventfd", -1, k_eventfd(__VA_ARGS__))
#define s_sys_execvp(...) execvp(__VA_ARGS__)
#define s_sys__exit(...) _exit(__VA_ARGS__)
#define s_sys_fchmod(fd, mode) ((void)(fd), (void)(mode), S_OR("fchmod", -1, s_ok()))
#define s_sys_fchmodat(...) -1
#define s_sys_fcntl(...) S_OR("fcntl", -1, k_fcntl(__VA_ARGS__))
#define s_sys_fflush(...) 0
#define s_sys_flock(fd, how) ((void)(fd), (void)(how), S_OR("flock", -1, s_ok()))
#define s_sys_fork() -1
#define s_sys_freeaddrinfo(...) s_freeaddrinfo(__VA_ARGS__)
#define s_sys_fstat(...) S_OR("fstat", -1, k_fstat(__VA_ARGS__))
#define s_sys_getaddrinfo(...) s_getaddrinfo(__VA_ARGS__)
#define s_sys_getegid() 0u
#define s_sys_getenv(...) ((char *)NULL)
#define s_sys_geteuid() 0u
#define s_sys_getgid() 0u
#define s_sys_getgrgid(...) ((struct group *)NULL)
#define s_sys_getgroups(...) 0
#define s_sys_getgrnam(...) ((struct group *)NULL)
#define s_sys_getpeername(...) S_OR("getpeername", -1, k_getpeername(__VA_ARGS__))
#define s_sys_getpid() 4711
#define s_sys_getppid() 1
#define s_sys_getpwnam(...) ((struct passwd *)NULL)
#define s_sys_getpwuid(...) ((struct passwd *)NULL)
#define s_sys_getsockname(...) S_OR("getsockname", -1, k_getsockname(__VA_ARGS__))
#define s_sys_getsockopt(...) S_OR("getsockopt", -1, k_getsockopt(__VA_ARGS__))
#define s_sys_getuid() 0u
#define s_sys_inet_ntop(...) inet_ntop(__VA_ARGS__)
#define s_sys_inet_pton(...) inet_pton(__VA_ARGS__)
#define s_sys_initgroups(...) -1
#define s_sys_ioctl(...) S_OR("ioctl", -1, k_ioctl(__VA_ARGS__))
#define s_sys_kevent(...) s_kevent(__VA_ARGS__)
#define s_sys_kill(...) -1
#define s_sys_kqueue() S_OR("kqueue", -1, k_kqueue())
#define s_sys_listen(...) S_OR("listen", -1, k_listen(__VA_ARGS__))
#define s_sys_lstat(...) S_OR("lstat", -1, k_lstat(__VA_ARGS__))
#define s_sys_madvise(...) S_OR("madvise", -1, madvise(__VA_ARGS__))
#define s_sys_mmap(...) S_OR("mmap", MAP_FAILED, mmap(__VA_ARGS__))
#define s_sys_mprotect(...) S_OR("mprotect", -1, mprotect(__VA_ARGS__))
#define s_sys_munmap(...) S_OR("munmap", -1, munmap(__VA_ARGS__))
#define s_sys_nanosleep(...) 0
#define s_sys_open(...) S_OR("open", -1, k_open(__VA_ARGS__))
#define s_sys_pipe(...) S_OR("pipe", -1, k_pipe(__VA_ARGS__))
#define s_sys_poll(...) S_OR("poll", -1, k_poll(__VA_ARGS__))
#define s_sys_prctl(...) 0
#define s_sys_pread(fd, data, size, offset) S_OR("pread", -1, k_pread(fd, data, s_cut(size), offset))
#define s_sys_read(fd, data, size) S_OR("read", -1, k_read(fd, data, s_cut(size)))
#define s_sys_recv(...) s_recv(__VA_ARGS__)
#define s_sys_sched_getaffinity(...) -1
#define s_sys_sched_yield() 0
#define s_sys_send(...) s_send(__VA_ARGS__)
#define s_sys_sendfile(...) s_sendfile(__VA_ARGS__)
#define s_sys_sendmsg(...) s_sendmsg(__VA_ARGS__)
#define s_sys_sendto(...) -1
#define s_sys_setenv(...) 0
#define s_sys_seteuid(...) -1
#define s_sys_setgid(...) -1
#define s_sys_setgroups(...) -1
#define s_sys_setsockopt(...) S_OR("setsockopt", -1, k_setsockopt(__VA_ARGS__))
#define s_sys_setuid(...) -1
#define s_sys_shutdown(fd, how) (s_fault("shutdown") ? (int)s_broken(fd) : k_shutdown(fd, how))
#define s_sys_sigaction(...) S_OR("sigaction", -1, k_sigaction(__VA_ARGS__))
#define s_sys_sigaddset(...) sigaddset(__VA_ARGS__)
#define s_sys_sigdelset(...) sigdelset(__VA_ARGS__)
#define s_sys_sigemptyset(...) sigemptyset(__VA_ARGS__)
#define s_sys_sigfillset(...) sigfillset(__VA_ARGS__)
#define s_sys_sigismember(...) sigismember(__VA_ARGS__)
#define s_sys_sigpending(...) k_sigpending(__VA_ARGS__)
#define s_sys_sigprocmask(...) k_sigprocmask(__VA_ARGS__)
#define s_sys_sigtimedwait(...) k_sigtimedwait(__VA_ARGS__)
#define s_sys_sigwait(...) sigwait(__VA_ARGS__)
#define s_sys_socket(...) S_OR("socket", -1, k_socket(__VA_ARGS__))
#define s_sys_socketpair(...) S_OR("socketpair", -1, k_socketpair(__VA_ARGS__))
#define s_sys_sysconf(...) sysconf(__VA_ARGS__)
#define s_sys_tcgetpgrp(...) -1
#define s_sys_unlink(...) S_OR("unlink", -1, k_unlink(__VA_ARGS__))
#define s_sys_unsetenv(...) 0
#define s_sys_waitid(...) -1
#define s_sys_waitpid(...) -1
#define s_sys_write(fd, data, size) S_OR("write", -1, k_write(fd, data, s_cut(size)))

#endif
