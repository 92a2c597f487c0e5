/* A user-space kqueue for Linux: with this folder in the include path the library's kqueue backend
 * compiles and runs here. For tests only. A kqueue is an epoll descriptor and a table that tells
 * which of its two filters each descriptor has; epoll's one registration waits for their union.
 *   - The rules are those of FreeBSD's and XNU's kern_event.c and uipc_socket.c: EVFILT_WRITE is at
 *     its end when nothing can be sent any more, also by our own shutdown(2), EVFILT_READ when
 *     nothing more can arrive, with the bytes before it in data; fflags is the socket's error. An
 *     end is reported again and again, unless EV_CLEAR is set: then once for each change. EV_ADD of
 *     a filter that exists gives it the new udata and looks at it anew, but changes no flag and
 *     enables nothing.
 *   - EV_CLEAR is only for a descriptor that has one filter; what would mix is refused with EINVAL.
 *     With it, EVFILT_WRITE also wakes for the peer's FIN, which BSD does not do, not for every
 *     acknowledgement, which BSD does, and not for our own FIN on a unix socket.
 *   - data of EVFILT_WRITE is 1, and of a listening unix socket too. Regular files are refused with
 *     EPERM.
 *   - A closed descriptor loses its filters, as in the kernel. epoll only forgets it when the last
 *     duplicate is closed, so every event and every change first asks epoll whether a registration
 *     is still about the file behind its number. One that cannot be removed any more, because the
 *     number is gone, is left behind in an old epoll that a fresh one replaces.
 *   - EV_EOF after an error has ECONNRESET in fflags, whatever it was: asking would clear it.
 *   - kq is closed by a plain close(); a fresh kqueue() on the same number starts empty.
 *     A child of fork has no kqueue: kevent says EBADF there.
 *   - One mutex guards all tables; it is not held while waiting. */
#ifndef KQSHIM_SYS_EVENT_H
#define KQSHIM_SYS_EVENT_H
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* FreeBSD's values. */
#define EVFILT_READ (-1)
#define EVFILT_WRITE (-2)
#define EV_ADD 0x0001
#define EV_DELETE 0x0002
#define EV_ENABLE 0x0004
#define EV_DISABLE 0x0008
#define EV_ONESHOT 0x0010
#define EV_CLEAR 0x0020
#define EV_RECEIPT 0x0040
#define EV_ERROR 0x4000
#define EV_EOF 0x8000

struct kevent {
    uintptr_t ident;
    short filter;
    unsigned short flags;
    unsigned fflags;
    int64_t data;
    void *udata;
};
#define EV_SET(kevp, a, b, c, d, e, f)                                                            \
    do {                                                                                          \
        struct kevent *kqshim_kevp = (kevp);                                                      \
        kqshim_kevp->ident = (uintptr_t)(a), kqshim_kevp->filter = (short)(b);                    \
        kqshim_kevp->flags = (unsigned short)(c), kqshim_kevp->fflags = (unsigned)(d);            \
        kqshim_kevp->data = (int64_t)(e), kqshim_kevp->udata = (f);                               \
    } while (0)

/* One descriptor in one queue; filter 0 is EVFILT_READ, 1 is EVFILT_WRITE. */
struct kqshim_slot {
    void *udata[2];
    uint32_t generation; /* of the registration, to recognise an older one */
    unsigned round;      /* the kevent that has told of it last */
    unsigned char present, enabled, oneshot, clear, last; /* bits: 1 << filter; the one reported last */
};

#define KQSHIM_UNUSED __attribute__((unused))
#define KQSHIM_IN ((uint32_t)EPOLLIN | (uint32_t)EPOLLRDHUP)
#define KQSHIM_END ((uint32_t)EPOLLHUP | (uint32_t)EPOLLERR)
#define KQSHIM_QUEUES 4096
#define KQSHIM_SLOTS (1 << 18) /* memory is only touched where descriptors are */
static struct {
    struct kqshim_slot *slots; /* by descriptor */
    uint32_t generation;
    pid_t owner; /* 0 = never used */
} kqshim_queues[KQSHIM_QUEUES]; /* by kq */
static pthread_mutex_t kqshim_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t kqshim_once = PTHREAD_ONCE_INIT;
static void kqshim_lock(void) { pthread_mutex_lock(&kqshim_mutex); }
static void kqshim_unlock(void) { pthread_mutex_unlock(&kqshim_mutex); }
/* A child must not inherit the mutex locked by a thread that it does not have. */
static void kqshim_start(void) { pthread_atfork(kqshim_lock, kqshim_unlock, kqshim_unlock); }

static int kqshim_control(int kq, int op, int fd, const struct kqshim_slot *slot)
{
    struct epoll_event event;
    event.events = slot->enabled & 1u ? KQSHIM_IN : 0u;
    if (slot->enabled & 2u) event.events |= (uint32_t)EPOLLOUT;
    /* Hang-ups cannot be masked; where all filters are disabled they are told only once. */
    if (slot->enabled == 0) event.events = (uint32_t)EPOLLET;
    if (slot->enabled & slot->clear) event.events |= (uint32_t)EPOLLET;
    event.data.u64 = (uint64_t)slot->generation << 32 | (uint32_t)fd;
    return epoll_ctl(kq, op, fd, &event) == 0 ? 0 : errno;
}

/* Empty the slot of fd if what it tells about is closed. Returns whether it has filters. Adding it
 * once more tells without waking a filter that has EV_CLEAR again, as changing it would. */
static int kqshim_probe(int kq, int fd)
{
    struct kqshim_slot *slot = &kqshim_queues[kq].slots[fd];
    int error = slot->present ? kqshim_control(kq, EPOLL_CTL_ADD, fd, slot) : ENOENT;
    if (error == 0) epoll_ctl(kq, EPOLL_CTL_DEL, fd, NULL); /* the number is another file's now */
    if (error != EEXIST) slot->present = 0;
    return slot->present != 0;
}

/* Give fd these filters, and tell epoll. Returns errno. */
static int kqshim_update(int kq, int fd, unsigned present, unsigned enabled)
{
    struct kqshim_slot *slot = &kqshim_queues[kq].slots[fd], old = *slot;
    int error, op = !old.present ? EPOLL_CTL_ADD : !present ? EPOLL_CTL_DEL : EPOLL_CTL_MOD;
    slot->present = (unsigned char)present;
    slot->enabled = (unsigned char)(enabled & present);
    if (op == EPOLL_CTL_ADD) slot->generation = ++kqshim_queues[kq].generation;
    error = kqshim_control(kq, op, fd, slot);
    /* The number was closed and then given to a duplicate of the same file. */
    if (error == EEXIST) error = kqshim_control(kq, EPOLL_CTL_MOD, fd, slot);
    if (error != 0) *slot = old;
    return error;
}

static int kqshim_change(int kq, const struct kevent *change)
{
    int fd = (int)change->ident, which = change->filter == EVFILT_WRITE, error, is_new;
    struct kqshim_slot *slot = &kqshim_queues[kq].slots[fd & (KQSHIM_SLOTS - 1)];
    unsigned bit = 1u << which, flags = change->flags, enabled, clear;
    if (change->filter != EVFILT_READ && !which) return EINVAL;
    if (change->ident >= KQSHIM_SLOTS) return EBADF;
    if (!kqshim_probe(kq, fd) && fcntl(fd, F_GETFD) < 0) return EBADF;
    is_new = !(slot->present & bit);
    if (is_new && (flags & (EV_ADD | EV_DELETE)) != EV_ADD) return ENOENT;
    if (is_new && slot->present && (flags & EV_CLEAR || slot->clear)) return EINVAL;
    if (flags & EV_DELETE) return kqshim_update(kq, fd, slot->present & ~bit, slot->enabled);
    enabled = slot->enabled | (is_new || flags & EV_ENABLE ? bit : 0u);
    if (flags & EV_DISABLE) enabled &= ~bit;
    clear = slot->clear;
    if (is_new) slot->clear = flags & EV_CLEAR ? (unsigned char)bit : 0;
    error = kqshim_update(kq, fd, slot->present | bit, enabled);
    if (error != 0) return slot->clear = (unsigned char)clear, error;
    slot->udata[which] = change->udata;
    if (!is_new) return 0;
    slot->oneshot = (unsigned char)(slot->oneshot & ~bit);
    if (flags & EV_ONESHOT) slot->oneshot = (unsigned char)(slot->oneshot | bit);
    return 0;
}

/* What TCP says about a socket; 0 when it is none. */
static int kqshim_tcp(int fd, struct tcp_info *info)
{
    socklen_t size = sizeof(*info);
    return getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &size) == 0;
}

/* Can nothing be sent any more, whatever the reason? poll(2) does not tell of our own FIN, but a
 * connection's state does, and a unix socket does not even send nothing any more. */
static int kqshim_cannot_send(int fd)
{
    struct tcp_info tcp;
    int domain = 0, type = 0;
    socklen_t size = sizeof(domain);
    if (kqshim_tcp(fd, &tcp)) {
        return tcp.tcpi_state != TCP_ESTABLISHED && tcp.tcpi_state != TCP_CLOSE_WAIT &&
               tcp.tcpi_state != TCP_SYN_SENT && tcp.tcpi_state != TCP_SYN_RECV;
    }
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size);
    getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size);
    return domain == AF_UNIX && type == SOCK_STREAM &&
           send(fd, "", 0, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno == EPIPE;
}

/* How much there is to read; of a listening socket, how many connections wait. */
static int64_t kqshim_amount(int fd)
{
    struct tcp_info tcp;
    int bytes;
    if (ioctl(fd, FIONREAD, &bytes) == 0) return bytes;
    return kqshim_tcp(fd, &tcp) ? tcp.tcpi_unacked : 1;
}

/* Turn an epoll event into at most `room` kevents. Returns how many; -1 when it is about a file
 * whose number was closed. */
static int kqshim_report(int kq, const struct epoll_event *event, struct kevent *out, int room)
{
    int fd = (int)(uint32_t)event->data.u64, count = 0, step;
    struct kqshim_slot *slot = &kqshim_queues[kq].slots[fd];
    uint32_t got = event->events;
    if (slot->generation != (uint32_t)(event->data.u64 >> 32)) return -1;
    if (slot->present != 0 && slot->enabled == 0) return 0;
    if (!kqshim_probe(kq, fd)) return -1;
    for (step = 0; step < 2 && count < room; step++) {
        int which = step ^ (room == 1 && slot->last == 0); /* where one fits, they take turns */
        unsigned bit = 1u << which;
        uint32_t ready = KQSHIM_END | (which ? (uint32_t)EPOLLOUT : KQSHIM_IN);
        int eof = (got & (which ? KQSHIM_END : KQSHIM_END | (uint32_t)EPOLLRDHUP)) != 0;
        if (!(slot->enabled & bit) || !(got & ready)) continue;
        if (which && !eof) eof = kqshim_cannot_send(fd);
        EV_SET(&out[count], fd, which ? EVFILT_WRITE : EVFILT_READ, eof ? EV_EOF : 0,
               got & (uint32_t)EPOLLERR ? ECONNRESET : 0, which ? 1 : kqshim_amount(fd),
               slot->udata[which]);
        slot->last = (unsigned char)which;
        count++;
        if (slot->oneshot & bit) kqshim_update(kq, fd, slot->present & ~bit, slot->enabled);
    }
    return count;
}

/* Put a fresh epoll in the place of one with registrations that cannot be removed. */
static int kqshim_renew(int kq)
{
    int fresh = epoll_create1(EPOLL_CLOEXEC), fd;
    struct kqshim_slot *slots = kqshim_queues[kq].slots;
    if (fresh < 0) return -1;
    for (fd = 0; fd < KQSHIM_SLOTS; fd++) {
        if (kqshim_probe(kq, fd)) kqshim_control(fresh, EPOLL_CTL_ADD, fd, &slots[fd]);
    }
    if (dup2(fresh, kq) == kq) fcntl(kq, F_SETFD, FD_CLOEXEC);
    return close(fresh);
}

static int64_t kqshim_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Turn `count` events into kevents behind `total` of them, but those that this round has told of
 * already. Returns the new total; *more: there may be others. */
static int kqshim_tell(int kq, const struct epoll_event *ready, int count, struct kevent *out,
                       int nevents, int total, unsigned round, int *more)
{
    int stale = 0, i;
    *more = 0;
    kqshim_lock();
    for (i = 0; i < count; i++) {
        struct kqshim_slot *slot = &kqshim_queues[kq].slots[(uint32_t)ready[i].data.u64];
        int made;
        if (slot->round != round) *more = 1;
        else if (!(slot->enabled & slot->clear)) continue; /* of what is clear epoll tells once */
        slot->round = round;
        made = kqshim_report(kq, &ready[i], out + total, nevents - total);
        stale |= made < 0;
        total += made < 0 ? 0 : made;
    }
    if (stale && kqshim_renew(kq) < 0 && total == 0) total = -1; /* out of descriptors */
    kqshim_unlock();
    return total;
}

/* Wait until `end`, in nanoseconds; -1 = without end. As many are told of as there is room for:
 * epoll puts those that it has told of behind the others. */
static int kqshim_wait(int kq, struct kevent *out, int nevents, int64_t end)
{
    static unsigned rounds;
    struct epoll_event ready[64];
    unsigned round = __atomic_add_fetch(&rounds, 1, __ATOMIC_RELAXED);
    int total = 0, more = 1;
    while (total == 0 || (more && total > 0 && total < nevents)) {
        int64_t now = kqshim_now(), left = end < now ? 0 : (end - now + 999999) / 1000000;
        int wait_ms = total > 0 ? 0 : end < 0 ? -1 : left > 1000000 ? 1000000 : (int)left, count;
        /* Each may become two events, and one that is fetched must not be dropped. */
        int room = nevents - total, limit = room < 2 ? 1 : room > 128 ? 64 : room / 2;
        count = epoll_wait(kq, ready, limit, wait_ms);
        if (total == 0 && (count < 0 || (count == 0 && left <= wait_ms))) return count;
        if (total == 0) round = __atomic_add_fetch(&rounds, 1, __ATOMIC_RELAXED);
        total = kqshim_tell(kq, ready, count < 0 ? 0 : count, out, nevents, total, round, &more);
    }
    return total;
}

static KQSHIM_UNUSED int kqueue(void)
{
    struct kqshim_slot *slots = NULL;
    int kq = epoll_create1(EPOLL_CLOEXEC);
    if (kq < 0) return -1;
    if (kq < KQSHIM_QUEUES) slots = (struct kqshim_slot *)calloc(KQSHIM_SLOTS, sizeof(*slots));
    if (slots == NULL) return close(kq), errno = EMFILE, -1;
    pthread_once(&kqshim_once, kqshim_start);
    kqshim_lock();
    free(kqshim_queues[kq].slots); /* of the closed kqueue that had this number */
    kqshim_queues[kq].slots = slots;
    kqshim_queues[kq].owner = getpid();
    kqshim_unlock();
    return kq;
}

#ifndef __cplusplus
#define kqshim_kevent kevent
#endif
static KQSHIM_UNUSED int kqshim_kevent(int kq, const struct kevent *changes, int nchanges,
                                       struct kevent *events, int nevents,
                                       const struct timespec *timeout)
{
    int error = 0, count = 0, i;
    int64_t end = -1;
    if (timeout != NULL) {
        end = timeout->tv_sec > 1000000000 ? 1000000000 : timeout->tv_sec;
        if (end < 0 || timeout->tv_nsec < 0 || timeout->tv_nsec > 999999999) error = EINVAL;
        else end = kqshim_now() + end * 1000000000 + timeout->tv_nsec;
    }
    kqshim_lock();
    if (kq < 0 || kq >= KQSHIM_QUEUES || fcntl(kq, F_GETFD) < 0) error = EBADF;
    else if (kqshim_queues[kq].owner != getpid()) error = EBADF;
    for (i = 0; i < nchanges && error == 0; i++) {
        struct kevent change = changes[i]; /* a copy: both lists may be the same memory */
        error = kqshim_change(kq, &change);
        if (error == 0 && !(change.flags & EV_RECEIPT)) continue;
        if (count == nevents) break;
        EV_SET(&events[count++], change.ident, change.filter, EV_ERROR, 0, error, change.udata);
        error = 0;
    }
    kqshim_unlock();
    if (error != 0) return errno = error, -1;
    return count > 0 || nevents == 0 ? count : kqshim_wait(kq, events, nevents, end);
}
#ifdef __cplusplus /* where a function with a type's name is shadowing, but a reference is not */
static KQSHIM_UNUSED decltype(kqshim_kevent) &kevent = kqshim_kevent;
#endif
#endif
