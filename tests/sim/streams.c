/* The fuzzer's program (tests/fuzz/api.c: every call of streams, with an oracle) over the simulated kernel instead of
 * the real one: several times as many scripts a second, TCP whose bytes are late, and kqueue. See driver.h. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "kernel.h"
#include "process.h"

#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/wait.h>

/* What follows makes the simulated calls. */
#define accept k_accept
#define accept4 k_accept4
#define bind k_bind
#define close k_close
#define connect k_connect
#define dup2 k_dup2
#define epoll_create1 k_epoll_create1
#define epoll_ctl k_epoll_ctl
#define epoll_wait k_epoll_wait
#define eventfd k_eventfd
#define fcntl k_fcntl
#define fstat k_fstat
#define getpeername k_getpeername
#define getsockname k_getsockname
#define getsockopt k_getsockopt
#define ioctl k_ioctl
#define kevent(...) k_kevent(__VA_ARGS__)
#define kqueue k_kqueue
#define listen k_listen
#define lstat k_lstat
#define memfd_create k_memfd_create
#define open k_open
#define pipe k_pipe
#define poll k_poll
#define pread k_pread
#define read k_read
#define recv k_recv
#define send k_send
#define sendfile k_sendfile
#define sendmsg k_sendmsg
#define setsockopt k_setsockopt
#define shutdown k_shutdown
#define sigpending k_sigpending
#define sigprocmask k_sigprocmask
#define sigtimedwait k_sigtimedwait
#define socket k_socket
#define socketpair k_socketpair
#define unlink k_unlink
#define write k_write

#define FUZZ_LATE k_late
#define LLVMFuzzerTestOneInput stream_script
#include "../fuzz/api.c"
#undef LLVMFuzzerTestOneInput

#include "driver.h"

static unsigned late(unsigned below)
{
    return draw_back() % below;
}

static void d_run(const uint8_t *data, size_t size)
{
    if (k.limit == 0) {
        k_boot();
        k_choose = late;
    }
    k_late = size > 4 && data[3] % 4 == 1;
    stream_script(data, size);
}
