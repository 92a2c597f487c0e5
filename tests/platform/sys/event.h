/* kqueue's types as each BSD has them, over Linux's C library, for a compiler's warnings only: see
 * tests/platforms.sh. PLATFORM_UDATA_IS_INTEGER: NetBSD before 10. */
#ifndef PLATFORM_SYS_EVENT_H
#define PLATFORM_SYS_EVENT_H
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#if defined(__NetBSD__)
#define PLATFORM_BIT(number) number##U
#define EVFILT_READ 0U
#define EVFILT_WRITE 1U
typedef uint32_t platform_filter;
typedef uint32_t platform_flags;
typedef size_t platform_count;
#else
#define PLATFORM_BIT(number) number
#define EVFILT_READ (-1)
#define EVFILT_WRITE (-2)
typedef short platform_filter;
typedef unsigned short platform_flags;
typedef int platform_count;
#endif

#ifdef PLATFORM_UDATA_IS_INTEGER
typedef intptr_t platform_udata;
#else
typedef void *platform_udata;
#endif

#define EV_ADD PLATFORM_BIT(0x0001)
#define EV_DELETE PLATFORM_BIT(0x0002)
#define EV_CLEAR PLATFORM_BIT(0x0020)
#define EV_ERROR PLATFORM_BIT(0x4000)
#define EV_EOF PLATFORM_BIT(0x8000)

struct kevent {
    uintptr_t ident;
    platform_filter filter;
    platform_flags flags;
    uint32_t fflags;
    int64_t data;
    platform_udata udata;
};

/* Nothing is cast here, as nothing is in the systems' own. */
#define EV_SET(kevp, a, b, c, d, e, f) \
    do {                               \
        struct kevent *to = (kevp);    \
        to->ident = (a);               \
        to->filter = (b);              \
        to->flags = (c);               \
        to->fflags = (d);              \
        to->data = (e);                \
        to->udata = (f);               \
    } while (0)

#ifdef __cplusplus
extern "C" {
#endif
int kqueue(void);
int kevent(int kq, const struct kevent *changes, platform_count change_count,
           struct kevent *events, platform_count event_count, const struct timespec *timeout);
#ifdef __cplusplus
}
#endif
#endif
