/* The declarations alone: no implementation, no libc header but stddef, stdint and stdbool, no
 * feature macro. Every type can be used as a value where it is not opaque. */
#include "tcpserver.h"

#if defined(_GNU_SOURCE) && !defined(__cplusplus)
#error "the declarations define _GNU_SOURCE"
#endif
/* glibc's include guards. */
#if defined(_STDIO_H) || defined(_STDLIB_H) || defined(_STRING_H) || defined(_UNISTD_H) ||         \
    defined(_ERRNO_H) || defined(_SYS_SOCKET_H) || defined(_NETDB_H) || defined(_SIGNAL_H) ||      \
    defined(_SYS_TYPES_H) || defined(_TIME_H)
#error "the declarations include more than stddef.h, stdint.h and stdbool.h"
#endif

/* The first member of every options struct is an integer, so that {0} is C and C++. */
struct declared {
    tsrv_loop *loop;
    tsrv_server *server;
    tsrv_stream *stream;
    tsrv_slice slice;
    tsrv_address address;
    tsrv_handler handler;
    tsrv_callback callback;
    tsrv_watch_callback watch_callback;
    tsrv_log_function log_function;
    tsrv_match match;
    tsrv_timer timer;
    tsrv_watch watch;
    tsrv_signal signal;
    tsrv_stats stats;
    tsrv_loop_options loop_options;
    tsrv_bind_options bind_options;
    tsrv_server_options server_options;
};

#if TSRV_VERSION_NUM != TSRV_VERSION_MAJOR * 10000 + TSRV_VERSION_MINOR * 100 + TSRV_VERSION_PATCH
#error "TSRV_VERSION_NUM"
#endif

size_t declared_size(void);
size_t declared_size(void) { return sizeof(struct declared) + sizeof(TSRV_VERSION); }
