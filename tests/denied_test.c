/* System calls that a container's filter denies, in truth: a seccomp filter answers them with ENOSYS or EPERM, each of
 * those that the library can do without, then all of them, and a server serves on. What happens when one of them fails
 * now and then, or under a kernel that does not know it, fault_test.c and ioloop_test.c play at the seam. */
#include "test.h"

#if defined(__linux__) && TSRVI_HAS_EPOLL
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#ifndef SECCOMP_RET_ERRNO
#define SECCOMP_RET_ERRNO 0x00050000U
#endif

#define D_MOST 16 /* calls of one filter */

typedef struct denial {
    const char *name;
    long numbers[3]; /* 0 = there are no more */
} denial;

/* Some have an older call's number beside their own, which C libraries use where it is there. */
static const denial optional[] = {
#ifdef SYS_epoll_create
    {"epoll_create1", {SYS_epoll_create1, SYS_epoll_create}},
#else
    {"epoll_create1", {SYS_epoll_create1}},
#endif
    {"eventfd2", {SYS_eventfd2}},
    {"accept4", {SYS_accept4}},
    {"sendfile", {SYS_sendfile}},
    {"madvise", {SYS_madvise}},
    {"prctl", {SYS_prctl}},
    {"getpeername", {SYS_getpeername}},
    {"setsockopt", {SYS_setsockopt}},
    {"getsockopt", {SYS_getsockopt}},
    {"shutdown", {SYS_shutdown}},
    {"flock", {SYS_flock}},
    {"fchmod", {SYS_fchmod}},
    {"sched_getaffinity", {SYS_sched_getaffinity}},
    {"rt_sigtimedwait", {SYS_rt_sigtimedwait}},
};
#define OPTIONAL ((int)(sizeof optional / sizeof optional[0]))

/* From now on, for this process and its children. Returns whether the kernel has such filters. */
static bool deny(const denial *denials, int count, int code)
{
    struct sock_filter rules[2 * 3 * D_MOST + 2];
    struct sock_fprog program = {0, rules};
    unsigned short size = 0;
    rules[size++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < count; i++) {
        for (int n = 0; n < 3 && denials[i].numbers[n] != 0; n++) {
            unsigned number = (unsigned)denials[i].numbers[n];
            rules[size++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1);
            rules[size++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)code);
        }
    }
    rules[size++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    program.len = size;
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

/* ---- what is done meanwhile ---------------------------------------------------------------*/

static int file, ports[2]; /* a pipe by which the client hears of the port */
static int closed;

static int echo_and_file(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        if (line.size == 5 && memcmp(line.data, "file\n", 5) == 0) {
            tsrv_sendfile(stream, file, 0, 6);
        } else {
            tsrv_write(stream, line.data, line.size);
        }
    }
    return rc;
}

static void stop_at_last(tsrv_stream *stream, int reason, void *context)
{
    (void)context;
    CHECK_INT(reason, TSRV_EOF);
    if (++closed == 2) {
        tsrv_server_stop(tsrv_stream_server(stream));
    }
}

static void bind_a_file(void *context)
{
    char path[64];
    int fd;
    (void)context;
    snprintf(path, sizeof path, "/tmp/denied_test.%ld", (long)getpid());
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), TSRV_OK);
    CHECK(unlink(path) == 0);
    t_close(fd);
}

static tsrv_server *new_server(void)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    options.mode = t_mode;
    options.handle_stream = echo_and_file;
    options.on_close = stop_at_last;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    return server;
}

/* Until two clients have come and gone. */
static void serve(void)
{
    tsrv_server *server = new_server();
    tsrv_address address;
    int port;
    CHECK_INT(tsrv_server_listen(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
    port = tsrv_address_port(&address);
    CHECK_INT(tsrv_loop_post(NULL, bind_a_file, NULL), TSRV_OK);
    CHECK(tsrv_cpu_count() >= 1);
    CHECK(write(ports[1], &port, sizeof port) == sizeof port);
    CHECK_INT(tsrv_loop_run(NULL), TSRV_OK);
    CHECK_INT(closed, 2);
    tsrv_server_free(server);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
}

/* Nothing is denied to the client. */
static void visit(void)
{
    int port, first, second;
    if (read(ports[0], &port, sizeof port) != sizeof port) {
        return; /* the server says why */
    }
    first = t_connect(port);
    t_sends(first, "hello\n");
    t_expect(first, "hello\n");
    second = t_connect(port);
    t_sends(second, "file\nand more\n");
    t_expect(second, "abcdefand more\n");
    t_finish(first);
    t_finish(second);
}

/* In a process of its own, since a filter is for ever. Returns its exit status. */
static int serve_denied(const denial *denials, int count, int code)
{
    int status;
    pid_t child;
    CHECK(pipe(ports) == 0 && (child = fork()) >= 0);
    if (child == 0) {
        if (!deny(denials, count, code)) {
            _exit(T_SKIPPED);
        }
        serve();
        _exit(0);
    }
    t_close(ports[1]);
    visit();
    t_close(ports[0]);
    CHECK(waitpid(child, &status, 0) == child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static void check_denied(const char *name, const denial *denials, int count)
{
    static const int codes[] = {ENOSYS, EPERM};
    for (int mode = TSRV_COROUTINE; mode <= TSRV_CALLBACK; mode++) {
        for (int i = 0; i < 2; i++) {
            int status;
            t_mode = mode;
            status = serve_denied(denials, count, codes[i]);
            if (status == T_SKIPPED) {
                SKIP("seccomp filters, which this kernel, or the emulator, does not have");
            }
            if (status != 0) {
                T_FAIL("%s answered with %s: the server ends with status %d", name, strerror(codes[i]), status);
            }
        }
    }
}

static void open_file(void)
{
    file = memfd_create("denied", MFD_CLOEXEC);
    CHECK(file >= 0 && write(file, "abcdef", 6) == 6);
}

TEST_ONCE(a_server_does_without_each_call_that_a_filter_denies)
{
    open_file();
    for (int i = 0; i < OPTIONAL; i++) {
        check_denied(optional[i].name, &optional[i], 1);
    }
    t_close(file);
}

TEST_ONCE(a_server_does_without_all_of_them)
{
    open_file();
    check_denied("everything optional", optional, OPTIONAL);
    t_close(file);
}

/* What it cannot do without is named. */
TEST_ONCE(a_denied_socket_is_an_error_that_is_named)
{
    static const denial needed[] = {{"listen", {SYS_listen}}};
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        tsrv_server *server;
        if (!deny(needed, 1, EPERM)) {
            _exit(T_SKIPPED);
        }
        server = new_server();
        t_watch_log();
        CHECK_INT(tsrv_server_listen(server, 0, "127.0.0.1", NULL), -EPERM);
        CHECK_INT(t_log_lines, 1);
        CHECK(strstr(t_log, "127.0.0.1") != NULL && strstr(t_log, tsrv_strerror(-EPERM)) != NULL);
        tsrv_server_free(server);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    if (WEXITSTATUS(status) == T_SKIPPED) {
        SKIP("seccomp filters, which this kernel, or the emulator, does not have");
    }
    CHECK_INT(WEXITSTATUS(status), 0);
}
#endif
