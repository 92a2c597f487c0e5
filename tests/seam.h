/* The seams of tcpserver.h as the tests use them: every system call and every allocation can be made to fail, receives
 * and sends can be cut short, and allocations are counted. Included before the header. */
#ifndef SEAM_H
#define SEAM_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Hard mode: sends are cut to 1..t_clip_size bytes, in turn, and behind t_clip_small of them to multiples
 * of that, so that long answers do not take for ever. Receives are cut by read_chunk_size. */
static int t_clip;
static unsigned t_clip_turn;
static const size_t t_clip_size = 7;
static const unsigned t_clip_small = 5000;

static long t_live_allocations; /* atomic */

/* The fault to inject: the t_fault_at-th call from now on, counted over all calls or over those named t_fault_name. */
static long t_fault_calls;       /* calls counted so far; atomic */
static long t_fault_at;          /* 0 = none fails */
static bool t_fault_sticky;      /* all later ones fail too */
static const char *t_fault_name; /* NULL = every call */
static int t_fault_errno;        /* 0 = each call's usual one */
static long t_fault_hits;
static const char *t_fault_last; /* the name of the last call that was made to fail */

static void (*t_seen)(const char *name); /* told of every call, when set */
static void (*t_verify)(void);           /* called by every call: what must hold then */

/* What a call usually fails with. */
static inline int t_usual_errno(const char *name)
{
    static const struct {
        const char *name;
        int code;
    } usual[] = {
        {"accept4", ECONNABORTED}, {"recv", ECONNRESET},   {"send", EPIPE},         {"sendmsg", ECONNRESET},
        {"sendfile", EIO},         {"socket", EMFILE},     {"bind", EADDRINUSE},    {"listen", EADDRINUSE},
        {"epoll_wait", EINTR},     {"poll", EINTR},        {"kevent", EINTR},       {"epoll_create1", EMFILE},
        {"eventfd", EMFILE},       {"close", EINTR},       {"setsockopt", ENOBUFS}, {"getpeername", ENOTCONN},
        {"read", EAGAIN},          {"write", EAGAIN},      {"shutdown", ENOTCONN},  {"fcntl", EBADF},
        {"sigaction", EINVAL},     {"connect", ECONNREFUSED}, {"waitpid", EINTR},
    };
    for (size_t i = 0; i < sizeof(usual) / sizeof(usual[0]); i++) {
        if (strcmp(usual[i].name, name) == 0) {
            return usual[i].code;
        }
    }
    return ENOMEM;
}

/* Count a call; true = it has to fail, and errno is set. */
static inline bool t_fault(const char *name)
{
    long call;
    if (t_verify != NULL) {
        t_verify();
    }
    if (t_seen != NULL) {
        t_seen(name);
    }
    if (t_fault_name != NULL && strcmp(t_fault_name, name) != 0) {
        return false;
    }
    call = __atomic_add_fetch(&t_fault_calls, 1, __ATOMIC_RELAXED);
    if (t_fault_at == 0 || call < t_fault_at || (call > t_fault_at && !t_fault_sticky)) {
        return false;
    }
    t_fault_hits++;
    t_fault_last = name;
    errno = t_fault_errno != 0 ? t_fault_errno : t_usual_errno(name);
    return true;
}

static const char *t_root = ""; /* stands before the files that the library opens */

static inline const char *t_path(const char *path)
{
    static char whole[1024];
    size_t root = strlen(t_root), size = strlen(path) + 1;
    if (root + size > sizeof whole) {
        return path;
    }
    memcpy(whole, t_root, root);
    memcpy(whole + root, path, size);
    return whole;
}

static inline size_t t_clipped(size_t size)
{
    size_t most = size;
    if (t_clip) {
        most = (1 + t_clip_turn % t_clip_size) * (t_clip_turn < t_clip_small ? 1 : 29);
        t_clip_turn++;
    }
    return size < most ? size : most;
}

/* From now on: the first-th call of that name fails, and with sticky all later ones too. code 0 = its usual one. */
static inline void t_fail_call(const char *name, int code, long first, bool sticky)
{
    t_fault_name = name;
    t_fault_errno = code;
    t_fault_calls = t_fault_hits = 0;
    t_fault_sticky = sticky;
    t_fault_at = first;
}

/* A bare root has no file of hosts; a resolver would ask others for the name then. */
static inline const char *t_host(const char *host)
{
    bool here = host != NULL && strcmp(host, "localhost") == 0;
    return here && access("/etc/hosts", F_OK) != 0 ? "127.0.0.1" : host;
}

static inline void *t_malloc(size_t size)
{
    void *memory = t_fault("malloc") ? NULL : malloc(size);
    if (memory != NULL) {
        memset(memory, 0xA5, size); /* nothing may count on zeros */
        __atomic_add_fetch(&t_live_allocations, 1, __ATOMIC_RELAXED);
    }
    return memory;
}

static inline void *t_realloc(void *old, size_t size)
{
    void *memory = t_fault("realloc") ? NULL : realloc(old, size);
    if (old == NULL && memory != NULL) {
        __atomic_add_fetch(&t_live_allocations, 1, __ATOMIC_RELAXED);
    }
    return memory;
}

static inline void t_free(void *memory)
{
    if (memory != NULL) {
        __atomic_sub_fetch(&t_live_allocations, 1, __ATOMIC_RELAXED);
    }
    free(memory);
}

#define TSRV_MALLOC(size) t_malloc(size)
#define TSRV_REALLOC(pointer, size) t_realloc(pointer, size)
#define TSRV_FREE(pointer) t_free(pointer)
#define TSRV_SYS(name, arguments) t_sys_##name arguments

#define t_sys_accept(...) (t_fault("accept") ? -1 : accept(__VA_ARGS__))
#define t_sys_accept4(...) (t_fault("accept4") ? -1 : accept4(__VA_ARGS__))
#define t_sys_alarm(...) alarm(__VA_ARGS__)
#define t_sys_bind(...) (t_fault("bind") ? -1 : bind(__VA_ARGS__))
#define t_sys_chmod(...) (t_fault("chmod") ? -1 : chmod(__VA_ARGS__))
#define t_sys_clock_gettime(...) clock_gettime(__VA_ARGS__)
#define t_sys_close(...) (close(__VA_ARGS__) < 0 || t_fault("close") ? -1 : 0)
#define t_sys_connect(...) (t_fault("connect") ? -1 : connect(__VA_ARGS__))
#define t_sys_dup2(...) (t_fault("dup2") ? -1 : dup2(__VA_ARGS__))
#define t_sys_epoll_create1(...) (t_fault("epoll_create1") ? -1 : epoll_create1(__VA_ARGS__))
#define t_sys_epoll_ctl(...) (t_fault("epoll_ctl") ? -1 : epoll_ctl(__VA_ARGS__))
#define t_sys_epoll_wait(...) (t_fault("epoll_wait") ? -1 : epoll_wait(__VA_ARGS__))
#define t_sys_eventfd(...) (t_fault("eventfd") ? -1 : eventfd(__VA_ARGS__))
#define t_sys_execvp(...) (t_fault("execvp") ? -1 : execvp(__VA_ARGS__))
#define t_sys__exit(...) _exit(__VA_ARGS__)
#define t_sys_fchmod(...) (t_fault("fchmod") ? -1 : fchmod(__VA_ARGS__))
#define t_sys_fchmodat(...) (t_fault("fchmodat") ? -1 : fchmodat(__VA_ARGS__))
#define t_sys_fcntl(...) (t_fault("fcntl") ? -1 : fcntl(__VA_ARGS__))
#define t_sys_fflush(...) (t_fault("fflush") ? EOF : fflush(__VA_ARGS__))
#define t_sys_flock(...) (t_fault("flock") ? -1 : flock(__VA_ARGS__))
#define t_sys_fork() (t_fault("fork") ? -1 : fork())
#define t_sys_freeaddrinfo(...) freeaddrinfo(__VA_ARGS__)
#define t_sys_fstat(...) (t_fault("fstat") ? -1 : fstat(__VA_ARGS__))
#define t_sys_getaddrinfo(host, ...) \
    (t_fault("getaddrinfo") ? EAI_MEMORY : getaddrinfo(t_host(host), __VA_ARGS__))
#define t_sys_getcontext(...) getcontext(__VA_ARGS__)
#define t_sys_getegid() getegid()
#define t_sys_geteuid() geteuid()
#define t_sys_getgid() getgid()
#define t_sys_getenv(...) getenv(__VA_ARGS__)
#define t_sys_getgrgid(...) (t_fault("getgrgid") ? NULL : getgrgid(__VA_ARGS__))
#define t_sys_getgrnam(...) (t_fault("getgrnam") ? NULL : getgrnam(__VA_ARGS__))
#define t_sys_getgroups(...) (t_fault("getgroups") ? -1 : getgroups(__VA_ARGS__))
#define t_sys_getpeername(...) (t_fault("getpeername") ? -1 : getpeername(__VA_ARGS__))
#define t_sys_getpid() (t_seen != NULL ? t_seen("getpid") : (void)0, getpid())
#define t_sys_getppid() getppid()
#define t_sys_getpwnam(...) (t_fault("getpwnam") ? NULL : getpwnam(__VA_ARGS__))
#define t_sys_getpwuid(...) (t_fault("getpwuid") ? NULL : getpwuid(__VA_ARGS__))
#define t_sys_getsockname(...) (t_fault("getsockname") ? -1 : getsockname(__VA_ARGS__))
#define t_sys_getsockopt(...) (t_fault("getsockopt") ? -1 : getsockopt(__VA_ARGS__))
#define t_sys_getuid() getuid()
#define t_sys_inet_ntop(...) inet_ntop(__VA_ARGS__)
#define t_sys_inet_pton(...) inet_pton(__VA_ARGS__)
#define t_sys_initgroups(...) (t_fault("initgroups") ? -1 : initgroups(__VA_ARGS__))
#define t_sys_ioctl(...) (t_fault("ioctl") ? -1 : ioctl(__VA_ARGS__))
#define t_sys_kill(...) (t_fault("kill") ? -1 : kill(__VA_ARGS__))
#define t_sys_kevent(kq, changes, count, ...) \
    (t_fault((count) > 0 ? "kevent_set" : "kevent") ? -1 : kevent(kq, changes, count, __VA_ARGS__))
#define t_sys_kqueue() (t_fault("kqueue") ? -1 : kqueue())
#define t_sys_listen(...) (t_fault("listen") ? -1 : listen(__VA_ARGS__))
#define t_sys_lstat(...) (t_fault("lstat") ? -1 : lstat(__VA_ARGS__))
#define t_sys_madvise(...) (t_fault("madvise") ? -1 : madvise(__VA_ARGS__))
#define t_sys_mmap(...) (t_fault("mmap") ? MAP_FAILED : mmap(__VA_ARGS__))
#define t_sys_mprotect(...) (t_fault("mprotect") ? -1 : mprotect(__VA_ARGS__))
#define t_sys_munmap(...) (t_fault("munmap") ? -1 : munmap(__VA_ARGS__))
#define t_sys_nanosleep(...) (t_fault("nanosleep") ? -1 : nanosleep(__VA_ARGS__))
#define t_sys_open(path, ...) (t_fault("open") ? -1 : open(t_path(path), __VA_ARGS__))
#define t_sys_pipe(...) (t_fault("pipe") ? -1 : pipe(__VA_ARGS__))
#define t_sys_poll(...) (t_fault("poll") ? -1 : poll(__VA_ARGS__))
#define t_sys_prctl(...) (t_fault("prctl") ? -1 : prctl(__VA_ARGS__))
#define t_sys_pread(...) (t_fault("pread") ? -1 : pread(__VA_ARGS__))
#define t_sys_pthread_cond_broadcast(...) pthread_cond_broadcast(__VA_ARGS__)
#define t_sys_pthread_cond_destroy(...) pthread_cond_destroy(__VA_ARGS__)
#define t_sys_pthread_cond_init(...) (t_fault("pthread_cond_init") ? ENOMEM : pthread_cond_init(__VA_ARGS__))
#define t_sys_pthread_cond_signal(...) pthread_cond_signal(__VA_ARGS__)
#define t_sys_pthread_cond_wait(...) pthread_cond_wait(__VA_ARGS__)
#define t_sys_pthread_create(...) (t_fault("pthread_create") ? EAGAIN : pthread_create(__VA_ARGS__))
#define t_sys_pthread_join(...) pthread_join(__VA_ARGS__)
#define t_sys_pthread_mutex_destroy(...) pthread_mutex_destroy(__VA_ARGS__)
#define t_sys_pthread_mutex_init(...) (t_fault("pthread_mutex_init") ? ENOMEM : pthread_mutex_init(__VA_ARGS__))
#define t_sys_pthread_mutex_lock(...) pthread_mutex_lock(__VA_ARGS__)
#define t_sys_pthread_mutex_unlock(...) pthread_mutex_unlock(__VA_ARGS__)
#define t_sys_pthread_sigmask(...) pthread_sigmask(__VA_ARGS__)
#define t_sys_read(...) (t_fault("read") ? -1 : read(__VA_ARGS__))
#define t_sys_recv(...) (t_fault("recv") ? -1 : recv(__VA_ARGS__))
#define t_sys_sched_getaffinity(...) (t_fault("sched_getaffinity") ? -1 : sched_getaffinity(__VA_ARGS__))
#define t_sys_sched_yield() (t_seen != NULL ? t_seen("sched_yield") : (void)0, sched_yield())
#define t_sys_send(fd, data, size, flags) (t_fault("send") ? -1 : send(fd, data, t_clipped(size), flags))
#define t_sys_sendfile(out, in, offset, size) \
    (t_fault("sendfile") ? -1 : sendfile(out, in, offset, t_clipped(size)))
#define t_sys_sendmsg(...) (t_fault("sendmsg") ? -1 : sendmsg(__VA_ARGS__))
#define t_sys_sendto(...) (t_fault("sendto") ? -1 : sendto(__VA_ARGS__))
#define t_sys_setenv(...) (t_fault("setenv") ? -1 : setenv(__VA_ARGS__))
#define t_sys_seteuid(...) (t_fault("seteuid") ? -1 : seteuid(__VA_ARGS__))
#define t_sys_setgid(...) (t_fault("setgid") ? -1 : setgid(__VA_ARGS__))
#define t_sys_setgroups(...) (t_fault("setgroups") ? -1 : setgroups(__VA_ARGS__))
#define t_sys_setsockopt(...) (t_fault("setsockopt") ? -1 : setsockopt(__VA_ARGS__))
#define t_sys_setuid(...) (t_fault("setuid") ? -1 : setuid(__VA_ARGS__))
#define t_sys_shutdown(...) (t_fault("shutdown") ? -1 : shutdown(__VA_ARGS__))
#define t_sys_sigaction(...) (t_fault("sigaction") ? -1 : sigaction(__VA_ARGS__))
#define t_sys_sigaddset(...) sigaddset(__VA_ARGS__)
#define t_sys_sigdelset(...) sigdelset(__VA_ARGS__)
#define t_sys_sigemptyset(...) sigemptyset(__VA_ARGS__)
#define t_sys_sigismember(...) sigismember(__VA_ARGS__)
#define t_sys_sigpending(...) sigpending(__VA_ARGS__)
#define t_sys_sigprocmask(...) sigprocmask(__VA_ARGS__)
#define t_sys_sigtimedwait(...) sigtimedwait(__VA_ARGS__)
#define t_sys_sigwait(...) sigwait(__VA_ARGS__)
#define t_sys_sigfillset(...) sigfillset(__VA_ARGS__)
#define t_sys_socket(...) (t_fault("socket") ? -1 : socket(__VA_ARGS__))
#define t_sys_socketpair(...) (t_fault("socketpair") ? -1 : socketpair(__VA_ARGS__))
#define t_sys_swapcontext(...) swapcontext(__VA_ARGS__)
#define t_sys_sysconf(name) ((name) == _SC_NPROCESSORS_ONLN && t_fault("sysconf") ? -1 : sysconf(name))
#define t_sys_tcgetpgrp(...) (t_fault("tcgetpgrp") ? -1 : tcgetpgrp(__VA_ARGS__))
#define t_sys_unlink(...) (t_fault("unlink") ? -1 : unlink(__VA_ARGS__))
#define t_sys_unsetenv(...) unsetenv(__VA_ARGS__)
#define t_sys_waitid(...) (t_fault("waitid") ? -1 : waitid(__VA_ARGS__))
#define t_sys_waitpid(...) (t_fault("waitpid") ? -1 : waitpid(__VA_ARGS__))
#define t_sys_write(...) (t_fault("write") ? -1 : write(__VA_ARGS__))

#endif
