/*
 * tcpserver.h 0.2.0 - Tornado's TCPServer, IOStream and IOLoop for C, in one header
 *
 * SPDX-License-Identifier: MIT
 *
 * A library for TCP servers of any protocol: a hand-written epoll / kqueue / poll loop, buffered
 * streams with read_until and write, and handlers that are written as straight code. It needs a C
 * compiler (gcc or clang) and a POSIX system, and nothing else. C99 and C++11.
 *
 * QUICK START
 *
 * Copy this file into your tree. In exactly one source file define TCPSERVER_IMPLEMENTATION before
 * you include it, and include it before any libc header (or compile with -std=gnu99).
 *
 * A whole server; each connection is a coroutine:                                    [compiles]
 *
 *     #define TCPSERVER_IMPLEMENTATION
 *     #include "tcpserver.h"
 *
 *     static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
 *     {
 *         tsrv_slice line;
 *         int rc;
 *         (void)address;
 *         (void)context;
 *         while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK &&
 *                (rc = tsrv_write(stream, line.data, line.size)) == TSRV_OK) {
 *         }
 *         return rc;
 *     }
 *
 *     int main(void)
 *     {
 *         tsrv_server_options options = {0};
 *         tsrv_server *server;
 *         options.handle_stream = handle_stream;
 *         if (tsrv_server_new(&server, &options) != TSRV_OK ||
 *             tsrv_server_listen(server, 8888, NULL, NULL) != TSRV_OK) {
 *             return 1;
 *         }
 *         return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
 *     }
 *
 * With options.mode = TSRV_CALLBACK the same handler is a plain function, without a stack of its
 * own: an idle connection then costs 250 bytes. A protocol whose requests take several reads keeps
 * its step in tsrv_data:                                                             [compiles]
 *
 *     typedef struct session {
 *         size_t size; // of the message that follows; 0 = its header is to be read
 *     } session;
 *
 *     static int handle_message(tsrv_stream *stream, const tsrv_address *address, void *context)
 *     {
 *         session *s = (session *)tsrv_data(stream); // options.data_size = sizeof(session)
 *         tsrv_slice part;
 *         int rc;
 *         (void)address;
 *         (void)context;
 *         for (;;) {
 *             if (s->size == 0) {
 *                 if ((rc = tsrv_read_bytes(stream, 1, &part)) != TSRV_OK) {
 *                     return rc; // TSRV_EAGAIN included: called again, it comes back to this read
 *                 }
 *                 s->size = (unsigned char)part.data[0];
 *             }
 *             if ((rc = tsrv_read_bytes(stream, s->size, &part)) != TSRV_OK) {
 *                 return rc;
 *             }
 *             s->size = 0;
 *             tsrv_write(stream, part.data, part.size);
 *         }
 *     }
 *
 * MODEL
 *
 * A call that cannot finish yet waits. In a coroutine, waiting suspends the coroutine. In a plain
 * callback, waiting returns TSRV_EAGAIN; the handler returns it, is called again when there is
 * news, and repeats the same call. So there is one set of functions for both.
 *
 *   - Where a call is made decides. A coroutine (a handler in coroutine mode, or what tsrv_spawn
 *     runs) waits on any stream. A callback-mode handler waits on its own stream only. Everywhere
 *     else (timers, posts, signals, another stream's callback) nothing waits: TSRV_EAGAIN there
 *     means "not now". tsrv_connect, tsrv_sleep, tsrv_wait_fd, tsrv_condition_wait and
 *     tsrv_run_in_thread need a coroutine.
 *   - Reads wait; writes are taken: sent or copied as a whole, in the order of the calls. A
 *     coroutine then pauses in the write while more than write_high_water is unsent; a
 *     callback-mode handler pays in its next read.
 *   - What the handler returns decides: TSRV_EAGAIN keeps the connection, everything else ends it,
 *     after the queued output was sent. It cannot leak a connection.
 *   - Reading and writing end separately: TSRV_EOF ends reading only, and the answer still goes.
 *     A reset ends both, after what came before it was read. tsrv_close and tsrv_abort end every
 *     call at once. A refused or stalled write ends the stream, and the next read says so: the
 *     result of a write may be ignored.
 *   - Nothing calls the program back from inside a library call, but for what a call is given to
 *     ask (a match function), the log's function, and the calls that turn a loop: tsrv_loop_run
 *     and its kin, and outside of the loop tsrv_server_free and tsrv_loop_free.
 *
 * CODES, and what to do about each
 *
 *   TSRV_EAGAIN     a callback-mode handler returns it, and repeats the call when it is called
 *                   again; elsewhere: not now
 *   TSRV_EOF        the peer has sent all that it will send: answer what is left, and return it.
 *                   With tsrv_stopping(stream) it is a drain: say good-bye, and return it (a relay
 *                   does not pass that on, and goes on with the other direction)
 *   TSRV_ECLOSED    this side has closed or aborted the stream, or a grace is over: return it
 *   TSRV_ETIMEOUT   of a read or a wait: nothing is lost; say so and return it, or go on. Of a
 *                   write: the peer takes nothing, and the stream is over
 *   TSRV_ETOOLONG   the bytes are still there: answer, then drop them (a read without a slice), or
 *                   return it. Is max_buffer_size, or the call's max_bytes, what you want?
 *   TSRV_EFULL      tsrv_try_write: later. Of another write: the stream is over, since more than
 *                   max_write_buffer_size would be unsent; write less at a time, or flush
 *   TSRV_EBUSY      somebody else reads, runs or serves already, or waits for that descriptor: a
 *                   mistake of the program
 *   TSRV_EINVAL     a mistake of the program, of which nothing has come: with TSRV_DEBUG the log
 *                   names the argument. Of a getter: there is no such thing
 *   TSRV_ENOTSUP    compile it in (TSRV_TLS_OPENSSL, TSRV_NO_...), or do without
 *   TSRV_ERESOLVE   look at the name, and at the system's name servers; try again later
 *   TSRV_ETLS       the log has OpenSSL's reason, but not that a peer has merely gone. Instead of
 *                   TSRV_EOF: the end was not the peer's own, so what has come may not be whole
 *   TSRV_EPROXY     the proxy does not send the header, or somebody came past the proxy
 *   TSRV_ERESTARTS  the workers' ends are in the log; repair, and start again
 *   TSRV_EPARENT    all went well: the parent of workers returns from main
 *   -ECONNRESET, -EPIPE, -ETIMEDOUT of a stream: the peer is gone: return it, it is not logged
 *   -EMFILE, -ENFILE  raise `ulimit -n`; accepting goes on by itself when there are descriptors
 *   -ECONNREFUSED, -EHOSTUNREACH and the like of tsrv_connect: nobody listens there, or there is no
 *                   way: try again later, or elsewhere
 *   -EADDRINUSE     another process has the port or the path; -EEXIST: the path is no socket
 *   -EACCES         ports below 1024 need a privilege (CAP_NET_BIND_SERVICE)
 *   -ENOMEM         the stream at hand is over, and the server goes on
 *
 * OPTIONS, their defaults, and what switches them off. Times are milliseconds, those of streams 12
 * days at most; sizes are bytes.
 *
 *   tsrv_server_options      default         off           what
 *   mode                     TSRV_COROUTINE                or TSRV_CALLBACK
 *   handle_stream            -                             the program; required
 *   on_close, on_start, on_accept  NULL                    called for each stream, process, client
 *   context                  NULL                          handed to all of them
 *   loop, loop_options       this thread's                 on which loop, and how that is made
 *   tls                      NULL                          plain TCP without
 *   data_size                0                             zeroed bytes for each stream
 *   max_buffer_size          1 MiB           SIZE_MAX      unread input of a stream
 *   read_chunk_size          64 KiB                        of one recv; 1 MiB at most
 *   max_write_buffer_size    16 MiB          SIZE_MAX      unsent output of a stream
 *   write_high_water         256 KiB         SIZE_MAX      unsent output above which writers wait
 *   stack_size               256 KiB                       of a coroutine; less than 64 KiB is 64
 *   max_connections          0 = no limit    0             open streams
 *   max_per_address          0 = no limit    0             the same of one address
 *   proxy_protocol           TSRV_PROXY_NONE               or TSRV_PROXY_REQUIRED
 *   proxy_from               NULL = all                    who may send its header
 *   handshake_timeout_ms     10 s            TSRV_NEVER    PROXY header and TLS together
 *   idle_timeout_ms          0 = off         0             no byte either way
 *   read_timeout_ms          0 = off         0             a whole read
 *   write_timeout_ms         60 s            TSRV_NEVER    unsent output, of which nothing goes
 *   close_timeout_ms         5 s             TSRV_NEVER    for the peer's end, behind ours
 *   grace_ms                 30 s            TSRV_NEVER    that a drain leaves
 *   nagle                    false                         true: leave Nagle's algorithm on
 *   keep_alive               false                         SO_KEEPALIVE; on with any of its three
 *   keep_alive_idle_ms, keep_alive_interval_ms, keep_alive_count   0 = the system's
 *   user_timeout_ms          0 = the system's              sent, and not acknowledged (Linux)
 *   fork, bind               NULL = defaults               for tsrv_serve
 *
 *   tsrv_loop_options
 *   backend                  TSRV_BACKEND_BEST             epoll, kqueue, else poll
 *   max_threads              4                             for tsrv_work and its kin
 *   slow_ms                  1 s             TSRV_NEVER    a turn of the loop that is logged
 *   max_total_buffer         0 = no limit    0             what all streams hold
 *
 *   tsrv_bind_options
 *   family                   0 = both                      AF_INET, AF_INET6
 *   backlog                  128                           connections that the kernel queues
 *   reuse_port               false                         a queue for each worker
 *   unix_mode                0600                          of a socket file
 *
 *   tsrv_fork_options
 *   max_restarts             100             TSRV_NEVER    bad ends in a row
 *   grace_ms                 the server's, 30 s  TSRV_NEVER  5 s later a worker is killed
 *   start_timeout_ms         60 s            TSRV_NEVER    for a new worker to accept
 *   heartbeat_ms             0 = off         0             a loop that does not turn
 *   on_exit, context         NULL                          called for each worker's end
 *   upgrade_argv             NULL            NULL          what SIGUSR2 starts
 *   fds, fd_count            NULL, 0                       more sockets, to be handed over
 *   user, group              NULL = as they are            whom workers become
 *
 *   tsrv_connect_options
 *   timeout_ms               10 s            TSRV_NEVER    for everything together
 *   tls, server_name         NULL, the host                whose certificate it must be
 *   proxy_for                NULL                          send a PROXY header for that client
 *
 *   tsrv_tls_options
 *   verify_client            TSRV_TLS_NONE                 must clients have a certificate?
 *   min_version              TSRV_TLS_1_2                  or TSRV_TLS_1_3
 *   cert_file, key_file, cert_pem, key_pem, key_password, certificates, certificate_count
 *                            NULL                          who this is; a server needs one
 *   ca_file, ca_pem          the system's                  whom to trust; verify_client needs one
 *   crl_file, ocsp_file      NULL                          what was revoked, what was not
 *   alpn, ciphers            NULL, AEAD                    protocols; ciphers of TLS 1.2
 *   on_server_name, context  NULL                          which certificate, by the host asked for
 *   ticket_hours             24 h            TSRV_NEVER    that a key seals tickets
 *   native_context           NULL                          an SSL_CTX of your own
 *
 * MISTAKES that are often made, and what is seen. Those with a D are shown by a program that was
 * compiled with -DTSRV_DEBUG, all but the second by a line in the log: develop with it.
 *
 *    1   A handler blocks (sleep, getaddrinfo, a file on a slow disk) or computes for long: all
 *        others of its loop stand still. The log: "a turn of the loop took 2000 ms (slow_ms is
 *        1000), nearly all of it handle_stream for ...". tsrv_sleep, tsrv_run_in_thread.
 *    2 D A slice is used after the next read, or kept: wrong bytes, silently; with TSRV_DEBUG they
 *        are all 0xDD, until other bytes come to that place. Copy what must last.
 *    3 D A callback-mode handler makes two different reads and keeps no step: called again, it
 *        begins with the first one. Keep the step in tsrv_data.
 *    4 D A callback-mode handler does not return the TSRV_EAGAIN of its read: the connection ends
 *        before its answer. `if (rc != TSRV_OK) return rc;`
 *    5 D A loop goes on though its calls fail: a processor at full load; in callback mode the
 *        server hangs. A loop ends with the first result that is not TSRV_OK.
 *    6 D A timer, a post or another stream's callback calls what waits (tsrv_wait, tsrv_flush), or
 *        what needs a coroutine: nothing happens. tsrv_spawn. (A read there only looks, and is not
 *        named: TSRV_EAGAIN, or TSRV_EBUSY if the stream's own handler reads.)
 *    7 D A stream is used on another thread: anything may happen. tsrv_loop_post takes the work
 *        to its loop. (Named are reads, waits, flushes and first writes.)
 *    8   A coroutine has a large array or recurses deeply: SIGSEGV, in the guard below its stack; a
 *        worker is replaced, and the log says by which signal it ended. -Wframe-larger-than finds
 *        the function, stack_size makes room.
 *    9   A process forks workers after it has made a loop: TSRV_EINVAL, "cannot fork workers: this
 *        process has a loop already". Fork first; on_start is the place for timers.
 *   10   A pointer into what coroutines share is held over a call that waits (a read, a write above
 *        the mark): another one has changed it by the time you go on. Look it up again.
 *   11   What stands behind tsrv_serve, and exit handlers, run in each worker: a pid file goes with
 *        the first reload. `if (tsrv_task_id() < 0)`.
 *   12   No time is set: clients that say nothing stay for ever, and the counter `open` only grows.
 *        idle_timeout_ms, read_timeout_ms, tsrv_set_deadline.
 *   13   A proxy connects to any host that its client names: also to this machine's own ports, and
 *        with "unix:/path" to its sockets. Refuse what begins with "unix:". For a name call
 *        getaddrinfo in tsrv_run_in_thread, look at the addresses, and connect to the number: a
 *        second look-up may say something else.
 *
 * DEBUGGING
 *
 *   gdb        gdb -x tests/gdb.py has the command tsrv-coroutines: it lists the coroutines that
 *              wait, with their stacks, in a core file, too.
 *   Sanitizers -fsanitize=address,undefined and -fsanitize=thread know about the stacks by
 *              themselves. Valgrind needs -DTSRV_VALGRIND.
 *   Profiles   perf record --call-graph=fp finds a coroutine's callers up to its beginning if the
 *              program has frame pointers (-fno-omit-frame-pointer).
 *   Stacks     -Wframe-larger-than=16384 names the functions that need much; with
 *              -fstack-clash-protection no frame, however large, can jump over the guard. An idle
 *              coroutine keeps the pages that it has ever touched: /proc/<pid>/smaps_rollup.
 *   System     strace -f -e trace=network shows one recv and one send for a request.
 *   A server   kill -TERM drains it, and a log line says what is left; tsrv_metrics_format, or
 *              examples/status.c, says how connections ended.
 *
 * C++
 *
 * Write {} where these examples write {0}, and no exception may leave a handler. What is made can
 * be owned by objects, and a lambda without captures is a handler:             [compiles as C++]
 *
 *     #include <memory> // behind tcpserver.h
 *     #include <stdexcept>
 *     #include <string>
 *
 *     struct failure : std::runtime_error {
 *         int code;
 *         explicit failure(int rc) : std::runtime_error(tsrv_strerror(rc)), code(rc) {}
 *     };
 *
 *     struct server_end {
 *         void operator()(tsrv_server *server) const { tsrv_server_free(server); }
 *     };
 *     typedef std::unique_ptr<tsrv_server, server_end> server_ptr;
 *
 *     static int check(int rc)
 *     {
 *         return rc >= 0 ? rc : throw failure(rc);
 *     }
 *
 *     static server_ptr listen(int port, tsrv_handler handler)
 *     {
 *         tsrv_server_options options = {};
 *         tsrv_server *server;
 *         options.handle_stream = handler;
 *         check(tsrv_server_new(&server, &options));
 *         server_ptr owned(server);
 *         check(tsrv_server_listen(server, port, "127.0.0.1", nullptr));
 *         return owned;
 *     }
 *
 *     static std::string read_line(tsrv_stream *stream) // in a coroutine
 *     {
 *         tsrv_slice line;
 *         check(tsrv_read_until(stream, "\n", 0, &line));
 *         return std::string(line.data, line.size); // a copy: it may be kept
 *     }
 *
 * The body of a handler is then try { ... } catch (const failure &e) { return e.code; }, with
 * another catch for what else may be thrown. The library's own memory goes with the stream, also
 * when a coroutine is dropped where it stands (tsrv_loop_free): what lies on its stack is not
 * destroyed then.
 *
 * OTHER LANGUAGES
 *
 * A binding needs callback mode (other languages' stacks do not move), a shared library, and the
 * layout of a few structs, in which every field that is not set is 0:
 *
 *     cc -shared -fPIC -DTCPSERVER_IMPLEMENTATION -o libtcpserver.so -x c tcpserver.h
 *
 * Keep callbacks alive for as long as the server, and let no exception leave them: the connection
 * would end with an arbitrary code. In Python (python3 upper.py ./libtcpserver.so 8888):
 *
 *     import ctypes as c, signal, sys
 *
 *     class Slice(c.Structure):
 *         _fields_ = [("data", c.c_void_p), ("size", c.c_size_t)]
 *
 *     Handler = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_void_p, c.c_void_p)
 *
 *     class Options(c.Structure):  # the first two fields, and more than all of the others
 *         _fields_ = [("mode", c.c_int), ("handle_stream", Handler), ("rest", c.c_char * 1024)]
 *
 *     lib = c.CDLL(sys.argv[1])
 *     for name in "server_new", "server_listen", "read_until", "write", "loop_run":
 *         getattr(lib, "tsrv_" + name).restype = c.c_int
 *
 *     @Handler
 *     def handle_stream(stream, address, context):
 *         line = Slice()
 *         while True:
 *             rc = lib.tsrv_read_until(c.c_void_p(stream), b"\n", c.c_size_t(0), c.byref(line))
 *             if rc != 0:
 *                 return rc  # TSRV_EAGAIN included
 *             text = c.string_at(line.data, line.size).upper()
 *             lib.tsrv_write(c.c_void_p(stream), text, c.c_size_t(len(text)))
 *
 *     signal.signal(signal.SIGINT, signal.SIG_DFL)  # else Ctrl-C waits for the next callback
 *     options, server = Options(mode=1, handle_stream=handle_stream), c.c_void_p()
 *     rc = lib.tsrv_server_new(c.byref(server), c.byref(options)) or \
 *         lib.tsrv_server_listen(server, int(sys.argv[2]), b"127.0.0.1", None) or \
 *         lib.tsrv_loop_run(None)
 *     sys.exit(rc != 0)
 *
 * CONDITIONS
 *
 * A tsrv_condition_wait may end early: with TSRV_ETIMEOUT or TSRV_ECLOSED, or for what another has
 * taken meanwhile. What is built on it bears that. It is used by the coroutines of one loop.
 *
 * A join waits until all helpers have ended. It lies on the stack of who waits, so join_wait does
 * not return before: when its time is over it asks the helpers to end, and waits on. A helper that
 * waits in a read or a write does not see that: tsrv_abort of its stream ends it.       [compiles]
 *
 *     typedef struct join {
 *         int running; // helpers; each is counted before it is spawned
 *         bool over;   // helpers look at it, and end
 *         tsrv_condition ended;
 *     } join;
 *
 *     static void join_end(join *j) // the last thing that a helper does
 *     {
 *         tsrv_condition_notify(&j->ended, --j->running == 0 ? SIZE_MAX : 0);
 *     }
 *
 *     static int join_wait(join *j, int timeout_ms)
 *     {
 *         int rc = TSRV_OK;
 *         while (j->running > 0) {
 *             int woken = tsrv_condition_wait(&j->ended, rc == TSRV_OK ? timeout_ms : TSRV_NEVER);
 *             rc = rc == TSRV_OK ? woken : rc;
 *             j->over = rc != TSRV_OK;
 *         }
 *         return rc;
 *     }
 *
 * A semaphore lets n in at a time. Who comes takes what is free only if there is more of it than
 * others wait for: nobody is overtaken. Who gives up passes on what was freed for it.   [compiles]
 *
 *     typedef struct semaphore {
 *         int free, waiting; // at first n, and 0
 *         tsrv_condition more;
 *     } semaphore;
 *
 *     static int semaphore_take(semaphore *s, int timeout_ms)
 *     {
 *         int rc = TSRV_OK;
 *         if (s->free <= s->waiting) {
 *             s->waiting++;
 *             while ((rc = tsrv_condition_wait(&s->more, timeout_ms)) == TSRV_OK && s->free == 0) {
 *             }
 *             s->waiting--;
 *         }
 *         s->free -= rc == TSRV_OK;
 *         tsrv_condition_notify(&s->more, rc != TSRV_OK && s->free > 0);
 *         return rc;
 *     }
 *
 *     static void semaphore_give(semaphore *s)
 *     {
 *         s->free++;
 *         tsrv_condition_notify(&s->more, 1);
 *     }
 *
 * A pool is a semaphore and a stack of what is idle. Who waits for it is not told that its client
 * has gone: look at tsrv_error(stream) before the work begins. What was idle may have been closed:
 * tsrv_wait_fd(fd, TSRV_READABLE, 0) says TSRV_ETIMEOUT if not.               [compiles behind it]
 *
 *     enum { PLACES = 8 };
 *
 *     typedef struct pool {
 *         semaphore places; // {PLACES, 0, {0}} at first
 *         void *idle[PLACES];
 *         int idle_count;
 *     } pool;
 *
 *     static int pool_take(pool *p, void **taken, int timeout_ms) // *taken NULL: make one
 *     {
 *         int rc = semaphore_take(&p->places, timeout_ms);
 *         *taken = rc == TSRV_OK && p->idle_count > 0 ? p->idle[--p->idle_count] : NULL;
 *         return rc;
 *     }
 *
 *     static void pool_give(pool *p, void *taken) // NULL: it broke, or could not be made
 *     {
 *         if (taken != NULL) {
 *             p->idle[p->idle_count++] = taken;
 *         }
 *         semaphore_give(&p->places);
 *     }
 *
 * A bounded queue is two semaphores. What could not be put is the caller's.   [compiles behind it]
 *
 *     typedef struct queue {
 *         semaphore room, filled; // {16, 0, {0}} and {0} at first
 *         void *items[16];
 *         unsigned put, got; // so far
 *     } queue;
 *
 *     static int queue_put(queue *q, void *item, int timeout_ms)
 *     {
 *         int rc = semaphore_take(&q->room, timeout_ms);
 *         if (rc == TSRV_OK) {
 *             q->items[q->put++ % 16] = item;
 *             semaphore_give(&q->filled);
 *         }
 *         return rc;
 *     }
 *
 *     static int queue_get(queue *q, void **item, int timeout_ms)
 *     {
 *         int rc = semaphore_take(&q->filled, timeout_ms);
 *         if (rc == TSRV_OK) {
 *             *item = q->items[q->got++ % 16];
 *             semaphore_give(&q->room);
 *         }
 *         return rc;
 *     }
 *
 * RULES
 *
 *   Threads    A loop, its servers and its streams belong to the thread that runs the loop. Only
 *              tsrv_loop_post may be called from another one. One loop per thread scales.
 *   Forks      Fork before the first loop exists. A child that uses its parent's loop is refused.
 *              A child forked inside a callback must exec or _exit. tsrv_fork_processes,
 *              tsrv_server_start and tsrv_serve return in the parent too, when its workers have
 *              ended: check what they return.
 *   Workers    The parent only supervises. It acts on SIGTERM, SIGINT, SIGQUIT (all end, in good
 *              order; a second one cuts the grace), SIGHUP (workers are replaced one by one) and,
 *              if asked to, SIGUSR2 (the program is replaced); workers end with it. In a worker
 *              tsrv_loop_run drains its servers when the parent is told to end, and returns.
 *   Ownership  The library owns streams: a server's stream is valid until its handler and on_close
 *              have returned. Timers, watches and signals are the caller's memory; stop them first.
 *              Options are copied. Slices are borrowed until the next read. What a coroutine has
 *              allocated is its own to free: tsrv_loop_free ends its waits, once, but drops one
 *              that then waits again, with all that it holds.
 *   Errors     What fails returns a negative code: -errno, or one of TSRV_E...; tsrv_strerror
 *              knows both. Out of memory is a code too, never an exit.
 *   Limits     Everything that a peer could make grow has a limit by default: unread input 1 MiB,
 *              unsent output 16 MiB, a stalled write 60 s, a lingering close 5 s. The time of reads
 *              has one only with read_timeout_ms or idle_timeout_ms, the buffers of all streams
 *              with max_total_buffer, and connections with max_connections and max_per_address.
 *   Proxies    Behind HAProxy and its like all clients seem to have one address; with
 *              proxy_protocol they have their own.
 *   Log        Lines go to stderr, or to tsrv_set_log's function. The loop never waits for its log,
 *              and peers cannot flood it. INFO is what a server does, see tsrv_set_log_level.
 *   Descriptors
 *              The library raises no SIGPIPE, and no descriptor of its own is ever 0, 1 or 2: when
 *              one of these is closed and would be given to it, /dev/null takes that place.
 *   TLS        A stream over TLS is used like any other; what is unsent counts as it is sent, and
 *              an end without close_notify is TSRV_ETLS. A tsrv_tls belongs to one thread at a
 *              time.
 *   C++        No exception may leave what the library calls: catch inside the handler. One that
 *              leaves a callback goes through tsrv_loop_run, and that loop can neither be run again
 *              nor freed. A coroutine may wait inside a catch block: the exceptions that are being
 *              handled go with it (on macOS if the implementing file is C++).
 *   Stacks     256 KiB each, touched as needed, above a guard of 1 MiB of address space (128 KiB on
 *              32-bit systems): an overflow is a SIGSEGV, also by a local array of 1 MiB (64 KiB).
 *              For larger ones compile the program with -fstack-clash-protection. Where memory
 *              must not be overcommitted the guard counts. Hardware shadow stacks need
 *              TSRV_USE_UCONTEXT. The floating point environment (rounding, exception masks) is
 *              not switched.
 *   Platforms  Coroutines are there on x86, x86-64, ARM, AArch64, 64-bit RISC-V, ppc64le and s390x,
 *              and with every C library that has makecontext; on other processors with musl,
 *              Android (from API level 23) or OpenBSD it is as with TSRV_NO_COROUTINES.
 *
 * CONFIGURATION
 *
 * Macros, defined before the include; all but TSRV_API matter in the implementing file only, and
 * none changes a declaration or a layout.
 *
 *   TCPSERVER_IMPLEMENTATION      emit the code, in exactly one file
 *   TSRV_STATIC                   make the public functions static in that file
 *   TSRV_API                      how they are declared; default extern
 *   TSRV_ASSERT(condition)        for broken invariants; default assert
 *   TSRV_MALLOC(size), TSRV_REALLOC(pointer, size), TSRV_FREE(pointer)
 *                                 all three or none
 *   TSRV_LOG(level, message)      where log lines go, instead of tsrv_set_log
 *   TSRV_SYS(name, arguments)     how system calls are made; default name arguments
 *   TSRV_NO_EPOLL, TSRV_NO_KQUEUE leave a backend out
 *   TSRV_NO_COROUTINES            callback mode only; the waiting calls return TSRV_ENOTSUP
 *   TSRV_NO_THREADS               no helper threads, and no call of pthreads; tsrv_work and
 *                                 tsrv_run_in_thread return TSRV_ENOTSUP. With them, and a glibc
 *                                 older than 2.34, link with -pthread
 *   TSRV_USE_UCONTEXT             switch stacks by ucontext instead of by hand
 *   TSRV_TLS_OPENSSL              compile TLS in; link -lssl -lcrypto
 *   TSRV_DEBUG                    name MISTAKES, those with a D, and what is TSRV_EINVAL, in the
 *                                 log, each once; overwrite what a slice held when it dies; verify
 *                                 the library itself
 *   TSRV_VALGRIND                 tell Valgrind about stacks (needs valgrind/valgrind.h)
 *
 * CONTENTS, in the order of the layers; search for the tag
 *
 *     >>api         declarations: codes, the log, the loop, sockets
 *     >>api_server  declarations: processes, TLS, servers, clients
 *     >>api_stream  declarations: streams
 *     >>platform    what the system offers, and the seams
 *     >>list        doubly linked list
 *     >>globals     what all of a process shares
 *     >>util        codes, clock, descriptors
 *     >>log         the log: its default, its limits
 *     >>buffer      bytes that have come, and bytes to send
 *     >>heap        timers, the earliest first
 *     >>backend     the seam to epoll, kqueue and poll
 *     >>epoll       Linux
 *     >>kqueue      macOS and the BSDs
 *     >>poll        everywhere
 *     >>switch      stacks, and the jump from one to another
 *     >>loop        tasks, and a loop's life
 *     >>slow        turns that take long
 *     >>sources     timers, watches, posts, signals
 *     >>turn        turns
 *     >>stacks      stacks that are free
 *     >>coroutine   functions that can wait
 *     >>condition   coroutines that wait for each other
 *     >>work        threads, for what blocks
 *     >>socket      addresses, sockets
 *     >>handed      sockets that were handed over
 *     >>bound       what this process has bound
 *     >>bind        binding
 *     >>tls         contexts: names, protocols, times
 *     >>tls_files   what contexts are made from: certificates, keys, lists, answers
 *     >>tls_options contexts from options
 *     >>shared      counters of all workers
 *     >>peer        a peer's address
 *     >>proxy_header the PROXY protocol's headers
 *     >>addresses   how many connections an address has
 *     >>times       times of streams
 *     >>stream      one connection: what is known of it
 *     >>debug       mistakes of a program, named
 *     >>transport   what carries its bytes
 *     >>proxy       a stream before its PROXY header has come
 *     >>tls_session sessions: their socket, as OpenSSL sees it
 *     >>tls_hello   what a client's first message decides: names, tickets
 *     >>tls_transport TLS as a transport
 *     >>wait        who waits for a stream
 *     >>output      what is queued, and how it goes
 *     >>ends        how a stream comes to its end
 *     >>input       what comes, and where it is kept
 *     >>attempt     can this read be answered?
 *     >>read        reads
 *     >>write       writes
 *     >>files       writing files, flushing
 *     >>state       waiting for something else, and what a stream tells
 *     >>tls_stream  TLS, as a program asks for it
 *     >>handler     the handler: when it is called, and what its return means
 *     >>settle      what follows from facts
 *     >>event       what happens to a stream
 *     >>server      servers: their options
 *     >>admit       who may connect
 *     >>accept      listeners: accepting, and pausing
 *     >>listen      servers: starting and stopping
 *     >>metrics     counters as text
 *     >>client      connecting
 *     >>drain       draining servers, freeing servers and loops
 *     >>cpus        processors that this process may use
 *     >>notify      telling the service manager, and the program before this one
 *     >>worker      a process that is told when to end
 *     >>identity    the user that workers run as
 *     >>process     the supervisor: its state, its signals
 *     >>children    workers: their birth, and what happens to them
 *     >>supervise   reloads and upgrades
 *     >>rounds      rounds of the supervisor
 *     >>start       servers in workers
 *     >>serve       a whole server in one call
 *     >>history     what changed
 *     >>license     MIT
 */
#ifndef TCPSERVER_H
#define TCPSERVER_H

#if defined(_WIN32)
#error "tcpserver.h needs POSIX sockets and fork: it does not build on Windows (WSL works)"
#endif

/* With the implementation in this file, Linux has to show accept4 and its kin. This only works
 * before the first libc header; where it comes too late the code below has fallbacks. */
#if defined(TCPSERVER_IMPLEMENTATION) && defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TSRV_VERSION_MAJOR 0
#define TSRV_VERSION_MINOR 2
#define TSRV_VERSION_PATCH 0
#define TSRV_VERSION "0.2.0"
#define TSRV_VERSION_NUM \
    (TSRV_VERSION_MAJOR * 10000 + TSRV_VERSION_MINOR * 100 + TSRV_VERSION_PATCH)

/* How the public functions are linked: `static` with TSRV_STATIC (in the implementing file),
 * else what TSRV_API says, for example a visibility attribute. */
#ifndef TSRV_API
#ifdef TSRV_STATIC
#define TSRV_API static __attribute__((unused))
#else
#define TSRV_API extern
#endif
#endif

#if defined(__GNUC__)
#define TSRVI_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define TSRVI_PRINTF(text, first)
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ============================================================================
 * >>api  Declarations: codes, the log, the loop, sockets
 *
 * Unless a comment says otherwise: a function is called on the loop's thread
 * (before the loop runs, the thread that will run it), also from inside any
 * callback, handler or coroutine; no pointer is kept after it returns; NULL is
 * not allowed; it returns TSRV_OK (0) or a negative code. Durations are
 * milliseconds, sizes are bytes.
 * ==========================================================================*/

/* Switches off a time that limits something, as does any other negative one (which
 * tsrv_condition_wait and ticket_hours refuse). The delays of tsrv_sleep and tsrv_timer_start are
 * not negative. SIZE_MAX switches a size off. */
#define TSRV_NEVER (-1)

/* The library's own codes, from -10001 down; everything else negative is -errno. */
#define TSRVI_CODES(X)                                                                           \
    X(TSRV_EAGAIN, -10001, "not now: it would wait")                                             \
    X(TSRV_EOF, -10002, "the peer has sent all it will send")                                    \
    X(TSRV_ECLOSED, -10003, "closed on this side")                                               \
    X(TSRV_ETIMEOUT, -10004, "timed out")                                                        \
    X(TSRV_ETOOLONG, -10005, "longer than allowed")                                              \
    X(TSRV_EFULL, -10006, "the output queue is full")                                            \
    X(TSRV_EBUSY, -10007, "in use already")                                                      \
    X(TSRV_EINVAL, -10008, "a wrong argument, or called where it may not be (TSRV_DEBUG tells)") \
    X(TSRV_ENOTSUP, -10009, "not supported here, or not compiled in")                            \
    X(TSRV_ERESOLVE, -10010, "the host name cannot be resolved")                                 \
    X(TSRV_ETLS, -10011, "TLS failed")                                                           \
    X(TSRV_EPROXY, -10012, "the PROXY header is missing or malformed")                           \
    X(TSRV_ERESTARTS, -10013, "too many worker restarts")                                        \
    X(TSRV_EPARENT, -10014, "this is the parent, and all its workers have ended well")

/* What functions return. */
enum {
    TSRV_OK = 0, /* done */
#define TSRVI_ENUMERATOR(name, value, text) name = value,
    TSRVI_CODES(TSRVI_ENUMERATOR)
#undef TSRVI_ENUMERATOR
};

/* How a server runs its handlers (tsrv_server_options.mode). */
enum {
    TSRV_COROUTINE = 0, /* each handler on a stack of its own; a call that must wait suspends it */
    TSRV_CALLBACK = 1   /* a plain function; a call that must wait returns TSRV_EAGAIN */
};

/* Ways to wait for descriptors (tsrv_loop_options.backend). */
enum {
    TSRV_BACKEND_BEST = 0,   /* the first of the following that the system has, and allows */
    TSRV_BACKEND_EPOLL = 1,  /* Linux */
    TSRV_BACKEND_KQUEUE = 2, /* macOS and the BSDs */
    TSRV_BACKEND_POLL = 3    /* everywhere; the cost of a turn grows with the descriptors */
};

/* What a descriptor can be ready for; bits. */
enum {
    TSRV_READABLE = 1, /* a read will not block: data, the end of the input, or an error */
    TSRV_WRITABLE = 2  /* a write will not block, or fails */
};

/* How much a log message matters. */
enum {
    TSRV_LOG_ERROR = 1,   /* something that was asked for did not happen */
    TSRV_LOG_WARNING = 2, /* the server goes on, but somebody should know */
    TSRV_LOG_INFO = 3     /* what a server does: it starts, drains, ends */
};

typedef struct tsrv_loop tsrv_loop;     /* waits for events and runs what waits for them (IOLoop) */
typedef struct tsrv_server tsrv_server; /* listeners and the streams they accepted (TCPServer) */
typedef struct tsrv_stream tsrv_stream; /* one connection with its buffers (IOStream) */
typedef struct tsrv_tls tsrv_tls;       /* certificates and rules of TLS (SSLContext) */

/* Bytes that a read hands out: borrowed, never freed by the caller. data[size] is 0 and not
 * counted, so that sscanf and strncasecmp are safe. Valid until the next read on the same stream
 * is called or the handler returns (TSRV_EAGAIN included); other waits of a coroutine do not
 * touch it. Read where nothing can wait (a timer, another stream's callback-mode handler) it is
 * valid until that returns. Until then its `size` bytes are the program's, which may change them in
 * place (cast the const away): to unmask a WebSocket frame, for example, needs no copy. After a
 * read that failed it is "" with size 0. */
typedef struct tsrv_slice {
    const char *data; /* never NULL after a read */
    size_t size;      /* bytes */
} tsrv_slice;

/* The address of a socket: a plain value, copy it to keep it. */
typedef struct tsrv_address {
    uint64_t storage[16]; /* `size` bytes of a struct sockaddr */
    uint32_t size;        /* bytes in use; 0 = unknown */
} tsrv_address;

/* Bytes that hold every text that tsrv_address_format writes, its final 0 included. */
#define TSRV_ADDRESS_SIZE 128

/* A connection's program: called when it has been accepted, in coroutine mode once, in callback
 * mode again whenever what it waits for is ready. Source: TCPServer.handle_stream.
 *   address  the peer; valid during this call, copy it to keep it
 *   context  tsrv_server_options.context
 * What it returns decides: TSRV_EAGAIN = keep the connection and call me again; everything else
 * = over: queued output is flushed, the connection is closed, on_close gets the value. A
 * negative value is logged, unless it is TSRV_EOF, TSRV_ECLOSED, TSRV_ETIMEOUT or the peer's
 * reset.
 * TSRV_EAGAIN from one that waits in no call: it is called when more input has come, or in a later
 * turn if it has consumed some; and once more at the input's end, when TSRV_EAGAIN counts as
 * TSRV_EOF. While max_buffer_size bytes are unread nothing more comes, the end neither, but for a
 * reset: who leaves that much has to go on by itself. */
typedef int (*tsrv_handler)(tsrv_stream *stream, const tsrv_address *address, void *context);

/* Called by the loop, never from inside the call that registered it. */
typedef void (*tsrv_callback)(void *context);

/* As tsrv_callback, for a watch: events is TSRV_READABLE, TSRV_WRITABLE or both. */
typedef void (*tsrv_watch_callback)(int events, void *context);

/* Receives each log message: one line without its newline. It must not call the library. */
typedef void (*tsrv_log_function)(int level, const char *message, void *context);

/* Finds the end of the first message for tsrv_read_until_match; it must not use the stream.
 *   data     what has arrived; data[size] is 0
 *   size     bytes in data, at least 1
 * Returns the size of the first message when all of it is there; 0 when it cannot tell yet; more
 * than `size` to be asked again when that many bytes are there; SIZE_MAX when the input is
 * malformed. What the call that found the end was given is where the read's slice is: pointers
 * into it, kept in the context, are valid as long as the slice. */
typedef size_t (*tsrv_match)(const char *data, size_t size, void *context);

/* ---- codes, version, log ---------------------------------------------------*/

/* The text of a code: the library's own, or the system's for -errno. Never NULL. The library's
 * texts are constants; the system's may be overwritten by the next call. Any thread. */
TSRV_API const char *tsrv_strerror(int code);

/* The version of the implementation, to compare with TSRV_VERSION. Any thread. */
TSRV_API const char *tsrv_version(void);

/* Send log messages elsewhere than to the default logger. For the whole process: call it before the
 * first loop runs. Of messages that a peer can cause, at most ten of a kind come in a second, and
 * then one that says how many more there were; in a flood that goes on, ten in two seconds, then in
 * four, and so on up to 64. Control characters are escaped in all of them.
 *   function  NULL = the default again
 *   context   handed to it
 * The default logger writes to descriptor 2, one line with one write:
 *     2026-01-31T23:59:59.999Z 4711 WARNING text       the time in UTC, the process, the level
 * It raises no signal, and never waits (without a /proc only for a pipe that another process fills
 * at that moment). What cannot be written at once (a full pipe or disk, a descriptor that is
 * closed, a reader that has gone) is lost, and the next line that can be written is preceded by one
 * that says how many were. A socket is not written to, for where stderr was closed it may be a
 * client's; but the one that JOURNAL_STREAM names is systemd's journal, and is. */
TSRV_API void tsrv_set_log(tsrv_log_function function, void *context);

/* Up to which level the default logger prints; TSRV_LOG_INFO at first, so everything. Any thread.
 *   level  TSRV_LOG_ERROR, _WARNING or _INFO; 0 = nothing */
TSRV_API void tsrv_set_log_level(int level);

/* ---- loop (IOLoop) ---------------------------------------------------------*/

typedef struct tsrv_loop_options {
    int backend;     /* TSRV_BACKEND_...; 0 = the best there is */
    int max_threads; /* for tsrv_work, at most; 0 = 4 */
    int slow_ms;     /* a turn that takes longer is logged, with who took the most of it, and
                        counted; 0 = 1 s; TSRV_NEVER */
    size_t max_total_buffer; /* unread input and unsent output of all streams together, OpenSSL's
                                own memory apart; above it no stream of a server receives input if
                                it has none, writes of coroutines wait until the kernel has taken
                                them from where they lie, and handlers in callback mode read on when
                                all that they have written is sent. So who does not read, or ends
                                no message, keeps newcomers waiting until write_timeout_ms or
                                read_timeout_ms: make both short. Many times max_buffer_size; 0 = no
                                limit */
} tsrv_loop_options;

/* The loop that runs on this thread, else the thread's own, which is made on first use and lives
 * until tsrv_loop_free. NULL when it cannot be made (out of memory or of descriptors), or when
 * this process is a fork of the one that made it. Any thread. Source: IOLoop.current. */
TSRV_API tsrv_loop *tsrv_loop_current(void);

/* Make a loop. A NULL loop argument elsewhere means tsrv_loop_current(), so most programs never
 * call this.
 *   options  NULL = all defaults
 * Returns TSRV_OK, TSRV_ENOTSUP (the system lacks that backend), TSRV_EINVAL (a negative count),
 * -ENOMEM, -EMFILE, -ENOSYS and the like; then *loop is NULL. Any thread; the loop belongs to the
 * thread that runs it. */
TSRV_API int tsrv_loop_new(tsrv_loop **loop, const tsrv_loop_options *options);

/* Free a loop and what it still has: every wait ends once with TSRV_ECLOSED, streams are
 * aborted, and the loop turns until nothing can run and no work of tsrv_work is left; what still
 * waits then is dropped where it stands, and logged. It waits for names that are being looked up,
 * too. Servers on this loop stop and are freed by the caller, before or after.
 *   loop  NULL = this thread's own, if there is one
 * Returns TSRV_OK; TSRV_EBUSY from inside this loop; TSRV_EINVAL in a forked child. */
TSRV_API int tsrv_loop_free(tsrv_loop *loop);

/* Run until tsrv_loop_stop, or until nothing is left but signal watches: no listener, stream,
 * timer, watch, coroutine, work of tsrv_work or posted callback. A stop that came before makes it
 * return at once.
 * Source: IOLoop.start.
 * Returns TSRV_OK; TSRV_EBUSY when it runs already; TSRV_EINVAL in a fork of the process that
 * made the loop; -errno when the backend fails (-EBADF: somebody closed its descriptor). */
TSRV_API int tsrv_loop_run(tsrv_loop *loop);

/* Run one turn: wait for events, at most timeout_ms, and handle them. A worker that is not in
 * tsrv_loop_run is ended by the parent's SIGTERM as any process is, without a drain, and
 * heartbeat_ms does not see it.
 *   timeout_ms  0 = do not wait; TSRV_NEVER = until something happens
 * Returns a positive value when something can still happen, 0 when nothing is left, or as
 * tsrv_loop_run. */
TSRV_API int tsrv_loop_run_once(tsrv_loop *loop, int timeout_ms);

/* Make tsrv_loop_run return after the current turn; before a run, the next one. Loop's thread:
 * from another one post a callback that calls it. */
TSRV_API void tsrv_loop_stop(tsrv_loop *loop);

/* To embed the loop in another one: a descriptor that is readable when tsrv_loop_run_once(loop,
 * 0) has events to handle. Timers are not in it: see tsrv_loop_timeout_ms. The loop owns it.
 * Returns it, or TSRV_ENOTSUP with the poll backend. */
TSRV_API int tsrv_loop_fd(tsrv_loop *loop);

/* How long the outer loop may sleep before it calls tsrv_loop_run_once; ask last before
 * sleeping.
 * Returns milliseconds, rounded up; 0 = there is work now; -1 = no limit. */
TSRV_API int tsrv_loop_timeout_ms(tsrv_loop *loop);

/* The loop's monotonic clock, read once a turn; only differences mean something. */
TSRV_API int64_t tsrv_loop_now_ms(tsrv_loop *loop);

/* Which backend it uses: TSRV_BACKEND_EPOLL, TSRV_BACKEND_KQUEUE or TSRV_BACKEND_POLL. */
TSRV_API int tsrv_loop_backend(tsrv_loop *loop);

/* Have the loop call callback(context), after those posted before; wakes it when it sleeps. From
 * any thread, as long as the loop exists; not from a signal handler: see tsrv_signal_start. A
 * loop freed before drops it. Source: IOLoop.add_callback.
 *   loop  from another thread than the loop's never NULL
 * Returns TSRV_OK, -ENOMEM, or TSRV_EINVAL in a fork of the process that made the loop. */
TSRV_API int tsrv_loop_post(tsrv_loop *loop, tsrv_callback callback, void *context);

/* Private to the library, here because tsrv_timer contains it. */
typedef struct tsrvi_timer {
    uint64_t due; /* nanoseconds of the monotonic clock */
    void (*fire)(struct tsrvi_timer *);
    uint32_t sequence; /* orders equal times: first started, first fired */
    uint32_t position; /* in the heap, from 1; 0 = not armed */
} tsrvi_timer;

/* A timer; the caller's memory, {0} at first, stopped before it goes. All fields private. */
typedef struct tsrv_timer {
    tsrvi_timer node;
    tsrv_loop *loop;
    tsrv_callback callback;
    void *context;
} tsrv_timer;

/* Call callback(context) once, delay_ms from now and never earlier; timers due at the same time
 * fire in the order of their start. Starting an armed timer changes it; to repeat, start it
 * again in the callback.
 * Source: IOLoop.call_later.
 *   delay_ms  0 = in the next turn
 * Returns TSRV_OK, -ENOMEM, TSRV_EINVAL (negative delay, or a forked child). */
TSRV_API int tsrv_timer_start(tsrv_loop *loop, tsrv_timer *timer, int delay_ms,
                              tsrv_callback callback, void *context);

/* Disarm a timer: it will not fire, also when it is due in this turn. Not armed: nothing
 * happens.
 * Source: IOLoop.remove_timeout. */
TSRV_API void tsrv_timer_stop(tsrv_timer *timer);

/* Private to the library, here because tsrv_watch contains it. */
typedef struct tsrvi_io {
    int fd;           /* -1 = none */
    uint8_t interest; /* what the backend was asked for; 0 = not registered */
    void (*on_event)(struct tsrvi_io *, int events);
} tsrvi_io;

/* A watch on a descriptor; the caller's memory, {0} at first, stopped before it or the
 * descriptor goes. All fields private. */
typedef struct tsrv_watch {
    tsrvi_io io;
    tsrv_loop *loop;
    tsrv_watch_callback callback;
    void *context;
} tsrv_watch;

/* Call callback(events, context) in every turn in which fd is ready (level-triggered). Starting
 * an active watch changes it. Errors and hang-ups are reported as the events asked for. Source:
 * IOLoop.add_handler.
 *   fd      any descriptor that the backend can wait for; stays the caller's
 *   events  TSRV_READABLE, TSRV_WRITABLE or both
 * Returns TSRV_OK, TSRV_EBUSY (something else in this loop waits for fd), TSRV_EINVAL (bad
 * arguments, or a forked child), -ENOMEM, -EBADF, -EPERM (a regular file with epoll); after one of
 * these but TSRV_EINVAL a watch that was to change may have been stopped. */
TSRV_API int tsrv_watch_start(tsrv_loop *loop, tsrv_watch *watch, int fd, int events,
                              tsrv_watch_callback callback, void *context);

/* End a watch: no callback any more, also when its event is already in this turn's batch. Not
 * active: nothing happens. Source: IOLoop.remove_handler. */
TSRV_API void tsrv_watch_stop(tsrv_watch *watch);

/* A signal watch; the caller's memory, {0} at first, stopped before it goes. All fields private. */
typedef struct tsrv_signal {
    int signo; /* 0 = not active */
    tsrv_loop *loop;
    struct tsrv_signal *next;
    tsrv_callback callback;
    void *context;
    unsigned round; /* in which it was started */
} tsrv_signal;

/* Call callback(context) from the loop after the process has received signo; several receptions
 * before the loop looks are one call. The process's own handler is put back when the last watch
 * on signo stops. A signal belongs to one loop; in that loop it may have many watches. It does
 * not keep the loop running.
 * Returns TSRV_OK, TSRV_EBUSY (another loop watches signo), TSRV_EINVAL (no such signal, or a
 * forked child), -errno of sigaction (SIGKILL, SIGSTOP); after the others than TSRV_EINVAL a watch
 * that was to change is stopped. */
TSRV_API int tsrv_signal_start(tsrv_loop *loop, tsrv_signal *signal, int signo,
                               tsrv_callback callback, void *context);

/* End a signal watch. Not active: nothing happens. */
TSRV_API void tsrv_signal_stop(tsrv_signal *signal);

/* Run a function as a coroutine, from the loop's next turn on. It may use every call that waits.
 * Source: IOLoop.spawn_callback.
 * Returns TSRV_OK, -ENOMEM, TSRV_ENOTSUP (as with TSRV_NO_COROUTINES), TSRV_EINVAL (a
 * forked child). */
TSRV_API int tsrv_spawn(tsrv_loop *loop, tsrv_callback callback, void *context);

/* Wait; other coroutines run meanwhile. In a coroutine only. Source: gen.sleep.
 *   delay_ms  0 = let the others go first, once
 * Returns TSRV_OK; TSRV_ECLOSED when the loop is being freed; TSRV_EINVAL outside a coroutine,
 * or for a negative delay. */
TSRV_API int tsrv_sleep(int delay_ms);

/* Wait until a descriptor is ready: how a database or DNS client joins in. In a coroutine only.
 * Nothing of it is kept: between two calls it may be closed, and its number used again.
 *   fd          stays the caller's; must not be a stream's
 *   events      TSRV_READABLE, TSRV_WRITABLE or both: any of them
 *   timeout_ms  0 = only look (after many looks the others run first); TSRV_NEVER
 * Returns TSRV_OK, TSRV_ETIMEOUT, TSRV_EBUSY (something else in this loop waits for fd),
 * TSRV_ECLOSED (the loop is being freed), TSRV_EINVAL outside a coroutine, or as
 * tsrv_watch_start. */
TSRV_API int tsrv_wait_fd(int fd, int events, int timeout_ms);

/* Coroutines of one loop that wait for something which another piece of the program brings about;
 * the caller's memory, {0} at first. All fields private. Source: locks.Condition. */
typedef struct tsrv_condition {
    struct tsrvi_co *first, *last;
} tsrv_condition;

/* Wait until the condition is notified; who came first is woken first. What one waits for may have
 * been undone by another by the time it runs, so look in a loop: joins, semaphores, pools and
 * queues are that loop. In a coroutine only. Source: Condition.wait.
 *   timeout_ms  0 = only let the others go first; TSRV_NEVER
 * Returns TSRV_OK; TSRV_ETIMEOUT; TSRV_ECLOSED when the loop is being freed, or the grace of a
 * drain is over; TSRV_EINVAL outside a coroutine, or when coroutines of another loop wait. */
TSRV_API int tsrv_condition_wait(tsrv_condition *condition, int timeout_ms);

/* Wake those who wait, up to `count` of them, the oldest first; they run in the next turn. Without
 * any it does nothing, and nobody will know of it. Loop's thread. Source: Condition.notify.
 *   count  SIZE_MAX = all
 * Returns TSRV_OK. */
TSRV_API int tsrv_condition_notify(tsrv_condition *condition, size_t count);

/* ---- threads, for what blocks ----------------------------------------------*/

/* Run work(context) on a helper thread, then done(context) on the loop: for what would block it,
 * such as a file, a compressor or somebody's client library. Work begins in the order of the calls.
 * The threads, tsrv_loop_options.max_threads of them at most, are made when they are needed, and
 * end with the loop. Work that was taken is run, come what may: tsrv_loop_free waits for it, a
 * drain does not, and a fork's child has none of it. In `work` the only call of this library is
 * tsrv_loop_post. Signals are blocked there, which a program that it starts inherits: unblock them
 * in its child (posix_spawnattr_setsigmask).
 * Source: IOLoop.run_in_executor, uv_queue_work.
 *   done  NULL = not wanted
 * Returns TSRV_OK; TSRV_EINVAL (no work, or a forked child); -ENOMEM; -EAGAIN (the system gives no
 * thread, and there is none yet); TSRV_ECLOSED (the loop is being freed); TSRV_ENOTSUP with
 * TSRV_NO_THREADS. */
TSRV_API int tsrv_work(tsrv_loop *loop, tsrv_callback work, tsrv_callback done, void *context);

/* The same in a coroutine, which waits for it, also when the loop is freed or a drain's grace is
 * over: so the context may be on its stack. While the loop is being freed nothing new is taken
 * (TSRV_ECLOSED): what must be tidied up then is done directly. In a coroutine only.
 * Returns TSRV_OK when work(context) has run; TSRV_EINVAL outside a coroutine, and as tsrv_work,
 * when it has not. */
TSRV_API int tsrv_run_in_thread(tsrv_callback work, void *context);

/* ---- sockets (netutil) -----------------------------------------------------*/

typedef struct tsrv_bind_options {
    int family;         /* AF_INET, AF_INET6; 0 = both */
    int backlog;        /* connections the kernel queues; 0 = 128, or as it is handed over */
    bool reuse_port;    /* SO_REUSEPORT: see below */
    unsigned unix_mode; /* permissions of a unix socket that is made; 0 = 0600 */
} tsrv_bind_options;

/* reuse_port: several sockets listen on one port, each with a queue of its own. On Linux, and with
 * FreeBSD's SO_REUSEPORT_LB, which this library does not set, the kernel spreads connections over
 * them; macOS and the other BSDs give them to one of the sockets. What is queued in a socket is
 * reset when its last descriptor is closed. tsrv_server_bind with tsrv_server_start makes one
 * socket for each worker and keeps them all in the parent, so that a worker's death loses nothing;
 * a program that binds in each of its processes loses the queue of one that dies. */

/* Make listening sockets: non-blocking, close-on-exec, SO_REUSEADDR, IPv6 ones for IPv6 only, IPv4
 * first. With port 0 the kernel chooses one port, the same for all of them. Source:
 * netutil.bind_sockets.
 *   port      0 to 65535; not used for unix paths
 *   address   a name or number; "localhost"; "unix:/path", "unix:@abstract"; NULL or "" = every
 *             interface
 *   options   NULL = all defaults
 *   fds       receives them; the caller closes them or hands them to tsrv_server_add_sockets
 *   capacity  how many fit: 2 suffice but for names with many addresses
 * Returns how many, at least 1; TSRV_ERESOLVE; TSRV_EINVAL (bad port, or more than capacity);
 * -EADDRINUSE, -EACCES and the like; after an error none is open. A family that the host does not
 * have, or that a policy denies, is left out when there is an address of another one. A name that
 * is not a number is looked up by getaddrinfo, which blocks. Any thread, before and after a fork.
 */
TSRV_API int tsrv_bind_sockets(int port, const char *address, const tsrv_bind_options *options,
                               int *fds, int capacity);

/* Make one listening unix socket. A socket file that nobody serves is replaced; a live one is
 * -EADDRINUSE and any other file -EEXIST. Of several that ask for one path at the same moment only
 * one gets it: the others wait their turn, on a lock (flock) of the directory, for a second at
 * most. The file goes when the library closes the socket (tsrv_server_stop, tsrv_server_free, the
 * end of tsrv_serve) in the process that has bound it, not in its workers and other children, and
 * not when the program closes it: then the next to ask for the path replaces it. Source:
 * netutil.bind_unix_socket.
 *   path  of the file, absolute if the program changes its directory, or it is not found again;
 *         "@name" = Linux's abstract name space
 *   fd    receives it
 * Returns TSRV_OK, -ENAMETOOLONG, or as above. */
TSRV_API int tsrv_bind_unix_socket(const char *path, const tsrv_bind_options *options, int *fd);

/* The listening sockets that systemd (socket activation), or the program that this one replaces in
 * an upgrade, has handed over: the LISTEN_FDS, if LISTEN_PID is this process. Only listening stream
 * sockets are given out; all are made close-on-exec, these non-blocking too. tsrv_bind_sockets and
 * what builds on it take one that is bound to just the address they are asked for by themselves, so
 * most programs need not call this. The first call of either reads these variables and removes
 * them: before a fork, and before other threads use the environment. LISTEN_FDNAMES stays.
 *   fds       receives those that nothing has taken yet; hand them to tsrv_server_add_sockets, and
 *             never shutdown(2) them: the service manager holds them too
 *   capacity  how many fit
 * Returns how many; 0 = none; TSRV_EINVAL (malformed; or more than capacity, then none is taken) */
TSRV_API int tsrv_listen_fds(int *fds, int capacity);

/* The name that the service manager gave a descriptor of tsrv_listen_fds (FileDescriptorName=, in
 * LISTEN_FDNAMES): the order of several sockets is not defined, their names are.
 *   size  of buffer; names have at most 255 bytes, less cuts them
 * Returns buffer; "" = it has none. */
TSRV_API const char *tsrv_listen_fd_name(int fd, char *buffer, size_t size);

/* Write an address as text: "127.0.0.1:80", "[::1]:80", "unix:/run/x", "unix:@name", "unix:"
 * (unnamed).
 *   size  of buffer; TSRV_ADDRESS_SIZE always suffices, less cuts the text
 * Returns buffer. Any thread. */
TSRV_API char *tsrv_address_format(const tsrv_address *address, char *buffer, size_t size);

/* The port in host byte order, or 0 when the address has none. Any thread. */
TSRV_API int tsrv_address_port(const tsrv_address *address);

/* AF_INET, AF_INET6 or AF_UNIX; 0 = unknown. Any thread. */
TSRV_API int tsrv_address_family(const tsrv_address *address);

/* ============================================================================
 * >>api_server  Declarations: processes, TLS, servers, clients
 * ==========================================================================*/

/* ---- processes (process) ---------------------------------------------------*/

typedef struct tsrv_fork_options {
    int max_restarts; /* bad ends of workers, each less than a minute after the last, that are made
                         good before the supervisor gives up; 0 = 100; TSRV_NEVER = it never does */
    int grace_ms;     /* for a worker to end after it was told to; 5 s later it is killed; 0 = 30 s,
                         in tsrv_server_start the server's grace_ms, while other servers of the
                         worker have their own, if it is shorter; TSRV_NEVER */
    /* Called in the parent after a worker's process has ended; NULL = not wanted. status: as from
     * waitpid. It must not fork, and make no loop. */
    void (*on_exit)(int task_id, int pid, int status, void *context);
    void *context;    /* handed to it */
    int heartbeat_ms; /* a worker whose loop has not turned for so long is ended by SIGABRT and
                         replaced, on_start apart, which has start_timeout_ms; 0 = off */
    char *const *upgrade_argv; /* on SIGUSR2 start this program: it gets the listening sockets, and
                                  when all its workers have accepted for a second this one is
                                  drained and ends; until then, and if it fails, this one goes on.
                                  NULL = SIGUSR2 is left alone */
    const int *fds; /* listening sockets of the program's own making: an upgrade's program gets them
                       too, and the parent stops listening on them. What tsrv_server_bind,
                       tsrv_bind_sockets and their kin have bound is known by itself */
    int fd_count;
    int start_timeout_ms; /* for a new worker to accept, and for an upgrade's program to do so with
                             all of its; what is late is ended, in an upgrade and a reload with the
                             old ones left in place; 0 = 60 s, in tsrv_fork_processes from the
                             moment on at which its first worker accepts; TSRV_NEVER */
    const char *user;     /* name or number that workers become, after binding and before on_start;
                             with its supplementary groups; NULL = they stay who they are. Who
                             is that user already, and not root, keeps groups, root's apart */
    const char *group;    /* name or number; NULL = the user's */
} tsrv_fork_options;

/* Fork workers, and look after them. Each worker is a copy of this process, in which the call
 * returns its task id; the parent stays inside until all have ended. A worker that exits with
 * status 0 has finished, unless tsrv_server_start has made it, or a signal that was sent to it
 * alone has ended it. Any other end that the parent has not asked for is a failure: the worker is
 * forked again with the same task id, after 100 ms, doubling to 30 s, reset when it has lived for a
 * minute. A fork that fails is tried again in the same way, but for the very first. The parent acts
 * on
 *   SIGTERM, SIGINT, SIGQUIT   it stops listening, and tells the workers, whatever they have
 *                              ignored or blocked: in a worker tsrv_loop_run, on each thread,
 *                              answers by draining its servers, and then returns (an own
 *                              tsrv_signal_start for that signal replaces this); before its loop,
 *                              and behind it, the signal has its own effect. What has not ended 5 s
 *                              after the grace is killed, and after 1 s what does not accept yet,
 *                              as its listening sockets are open for as long as it lives. A second
 *                              signal ends the grace at once
 *   SIGHUP                     a reload: for one worker after the other a new one is forked, and
 *                              when it accepts the old one is told to end. If it ends before, or is
 *                              late (start_timeout_ms), the old ones stay. A worker that is to be
 *                              forked again later is so now. A SIGHUP during a reload leads to
 *                              another one, which does not wait for those that drain
 *   SIGUSR2                    an upgrade: see upgrade_argv
 * and puts the handlers and the mask back that it found. Workers end with the parent, also when
 * that is killed, within a second; one that hangs where SIGTERM has a handler of the program's own
 * is left to that. Only its own children are waited for; process 1 buries whatever child ends.
 * A stop, and giving up, closes what this process listens on: bind anew. Call
 * it before anything else makes a loop or a thread. What follows the call runs in the parent too:
 * check the result. Source: process.fork_processes.
 *   num_processes  0 = one for each processor (tsrv_cpu_count)
 *   options        NULL = all defaults; used until the call returns
 * Returns in a worker its task id, from 0; in the parent TSRV_EPARENT when all have ended well,
 * TSRV_ERESTARTS (gave up; the others have been stopped), TSRV_ETIMEOUT (some had to be killed at
 * the end), TSRV_EINVAL (this process has a loop, or is a worker itself; no such user or group),
 * TSRV_EBUSY (another thread is inside), -ENOMEM, -EMFILE, -EAGAIN (the first fork failed), -EPERM
 * (it may not become the user) and the like. */
TSRV_API int tsrv_fork_processes(int num_processes, const tsrv_fork_options *options);

/* Which worker this process is, from 0; the same again after a restart; -1 when it is none, as a
 * worker's child once it has a loop of its own. Any thread. Source: process.task_id. */
TSRV_API int tsrv_task_id(void);

/* The processors that this process may use, at least 1: its affinity and its control group's quota,
 * rounded up, are respected. Any thread. Source: process.cpu_count. */
TSRV_API int tsrv_cpu_count(void);

/* Tell the service manager (systemd) how this process is: "READY=1", "RELOADING=1" (the time that
 * goes with it is added), "STOPPING=1", "STATUS=text", "WATCHDOG=1", "MAINPID=n", or several of
 * them, in lines. tsrv_serve, and the parent of workers, say when they are ready, reload, stop, and
 * are alive, by themselves; another single process does not. "READY=1" at the beginning also tells
 * the program that this one replaces in an upgrade. Any thread.
 * Returns 1 when it was told, 0 when there is no service manager, TSRV_ETOOLONG above 1,000 bytes,
 * or -errno. */
TSRV_API int tsrv_notify(const char *state);

/* ---- TLS (SSLIOStream) -----------------------------------------------------
 *
 * Compiled in with TSRV_TLS_OPENSSL (OpenSSL 1.1.1 or 3; link -lssl -lcrypto); else the functions
 * return TSRV_ENOTSUP and log what to define. A stream over TLS is used like any other. */

/* Whether clients must show a certificate (tsrv_tls_options.verify_client). */
enum {
    TSRV_TLS_NONE = 0,     /* none is asked for */
    TSRV_TLS_OPTIONAL = 1, /* one that is shown must be valid */
    TSRV_TLS_REQUIRED = 2  /* without a valid one the handshake fails */
};

/* Values of tsrv_server_options.proxy_protocol. */
enum { TSRV_PROXY_NONE = 0, TSRV_PROXY_REQUIRED = 1 };

/* Values of tsrv_tls_options.min_version. */
enum {
    TSRV_TLS_1_2 = 0x0303, /* the default */
    TSRV_TLS_1_3 = 0x0304
};

/* A certificate for one host of several (SNI). */
typedef struct tsrv_tls_certificate {
    const char *server_name; /* "www.example.org", or "*.example.org" for one label */
    const char *cert_file;   /* as below */
    const char *key_file;
} tsrv_tls_certificate;

/* A certificate, a key and whom to trust are given as a file or, when they are not kept on the
 * disk, as a text; not as both. */
typedef struct tsrv_tls_options {
    int verify_client;     /* TSRV_TLS_NONE (0), TSRV_TLS_OPTIONAL or TSRV_TLS_REQUIRED */
    int min_version;       /* TSRV_TLS_1_2 (0) or TSRV_TLS_1_3 */
    const char *cert_file; /* PEM: the certificate, then its chain; servers need one. Files are
                              named by absolute paths if the program changes its directory, or
                              tsrv_tls_reload does not find them */
    const char *key_file;  /* PEM; NULL = it is in cert_file, or cert_pem */
    const char *ca_file;   /* PEM: whom to trust; NULL = the system's (as a client) */
    const char *alpn;      /* protocols, the best first: "h2,http/1.1"; NULL = none */
    const char *ciphers;   /* of TLS 1.2, as OpenSSL lists them; NULL = forward-secret AEAD only */
    const tsrv_tls_certificate *certificates; /* for other host names; NULL = none */
    int certificate_count;
    void *native_context; /* an SSL_CTX to use as it is, instead of all but alpn, for which its
                             callback becomes ours; NULL = none */
    const char *cert_pem; /* the text of what would be cert_file; perhaps with the key */
    const char *key_pem;
    const char *ca_pem;
    const char *key_password; /* of the keys that are encrypted; NULL = such a key is an error:
                                 nobody is asked on the terminal */
    const char *crl_file;  /* PEM: lists of revoked certificates. Every CA of the peer's chain, the
                              root too, needs one that has not expired, else the peer is refused;
                              NULL = nothing is looked up */
    const char *ocsp_file; /* DER: the answer of the CA that the certificate is not revoked, for
                              clients that ask for one. Replace it and reload before it expires:
                              after that they get none. NULL = none */
    /* Called with the host that a client asks for, before anything of its handshake is done; NULL =
     * not wanted. To go on with another tsrv_tls set *tls, which is NULL at first: all of that
     * one's options count, but for on_server_name and ticket_hours. Left NULL: this one's. The
     * other one may be freed or reloaded as soon as this has returned. It is called from the loop,
     * inside the handshake: it must not wait, nor call anything for streams, servers and loops.
     *   name  "" = the client asks for none
     * Returns TSRV_OK, or a negative code to refuse the handshake: unrecognized_name. */
    int (*on_server_name)(const char *name, tsrv_tls **tls, void *context);
    void *context;    /* handed to it */
    int ticket_hours; /* that a key seals session tickets, by the wall clock; then another does; 0 =
                         24; TSRV_NEVER = the same one always. A ticket is good for two hours. */
} tsrv_tls_options;

/* Read certificates and keys, for servers (tsrv_server_options.tls), for tsrv_start_tls and for
 * tsrv_connect. A failure is logged with the file and OpenSSL's reason; that a certificate is out
 * of its time, or will be within a week, is a warning. Made before a fork, it is shared by all
 * workers, also those that come later, which then resume each other's sessions; but not by the
 * program that takes over in an upgrade. With TSRV_DEBUG the environment's SSLKEYLOGFILE is
 * written, for Wireshark. Source: ssl_options, SSLContext.
 *   options  copied, strings included; native_context gets one more reference; NULL = a client that
 *            trusts whom the system does
 * Returns TSRV_OK, TSRV_ETLS (a file or a text, or what is in it), TSRV_EINVAL, -ENOMEM,
 * TSRV_ENOTSUP; then *tls is NULL. */
TSRV_API int tsrv_tls_new(tsrv_tls **tls, const tsrv_tls_options *options);

/* Streams that use it go on. NULL: nothing happens. Free the servers that use it first. */
TSRV_API void tsrv_tls_free(tsrv_tls *tls);

/* Read the files anew, for streams that begin from now on; texts stay as they are. Sessions are
 * resumed as before, without asking for the client's certificate again, unless what is in ca_file
 * or crl_file has changed. When anything fails nothing has changed. tsrv_serve and the parent of
 * tsrv_server_start's workers do so on SIGHUP, for all servers but those of other threads' loops;
 * on_start in new workers can for what servers do not name. Not while another thread uses tls.
 * Returns as tsrv_tls_new; TSRV_EINVAL with a native_context. */
TSRV_API int tsrv_tls_reload(tsrv_tls *tls);

/* ---- server (TCPServer) ----------------------------------------------------*/

/* 0 is the default named behind each; TSRV_NEVER switches a time off, SIZE_MAX a size. */
typedef struct tsrv_server_options {
    int mode;                   /* TSRV_COROUTINE (0) or TSRV_CALLBACK */
    tsrv_handler handle_stream; /* required */
    /* Called once for every stream whose handler was entered, last of all, after its descriptor is
     * closed, which may be close_timeout_ms after the handler's end; NULL = not wanted. reason: the
     * error that ended the stream, else what the handler returned. In it only tsrv_data and the
     * getters may be used: every other call on the stream does nothing, and returns a code. Other
     * streams may be written to as everywhere. */
    void (*on_close)(tsrv_stream *stream, int reason, void *context);
    /* Called once in each process that accepts, from its loop, before the first connection; NULL =
     * not wanted. The place for timers, and to learn the port of listen(0). */
    void (*on_start)(tsrv_server *server, void *context);
    /* Called from the loop for every connection that was accepted, before anything is made for it;
     * NULL = not wanted. Returns TSRV_OK, or a negative code to refuse it: then it is reset,
     * counted, and not logged; so it is when this call stops, drains or frees the server. The
     * address is valid during the call. It is not asked for who has max_per_address connections,
     * nor for tsrv_server_add_stream; and those that wait to be accepted when tsrv_server_stop is
     * called are refused where there is one, since it is not called from inside that. With
     * proxy_protocol it is asked when the header has come, for the client's address. */
    int (*on_accept)(tsrv_server *server, const tsrv_address *address, void *context);
    void *context;                /* handed to all of them */
    tsrv_loop *loop;              /* NULL = the thread's, at the first listen or add_sockets */
    tsrv_tls *tls;                /* NULL = plain TCP; must outlive the server */
    size_t data_size;             /* zeroed bytes for each stream: tsrv_data; 0 = none */
    size_t max_buffer_size;       /* unread input of a stream; 0 = 1 MiB */
    size_t read_chunk_size;       /* of one recv; 0 = 64 KiB; 1 MiB, and about half of the above, at
                                     most */
    size_t max_write_buffer_size; /* unsent output of a stream; 0 = 16 MiB */
    size_t write_high_water; /* unsent output above which a writer waits; 0 = 256 KiB; more than the
                                above is cut to that */
    size_t stack_size;       /* of a coroutine, reserved, touched as needed; 0 = 256 KiB; less than
                                64 KiB, which TLS, resolving a name and printf need, is 64 KiB */
    int max_connections;     /* open streams above which the listeners pause; 0 = no limit */
    int max_per_address;     /* open streams of one IPv4 address, or of one /64 of IPv6, in this
                                 process, also those that wait for the peer's end after ours
                                 (close_timeout_ms); one too many is reset before a handler sees
                                 it, and counted; a proxy's own connections, as its health checks,
                                 count for its address; 0 = no limit */
    int proxy_protocol;      /* TSRV_PROXY_NONE (0) or TSRV_PROXY_REQUIRED: every connection must
                                 begin with a header of the PROXY protocol, version 1 or 2, before
                                 TLS, and is the client's then: in tsrv_peer_address, the limits,
                                 on_accept and the log. What has no good one is TSRV_EPROXY: reset,
                                 counted and logged, and the handler is not called */
    const char *proxy_from;  /* who may send one, others are reset: "10.0.0.0/8, ::1, unix:"; NULL
                                 = everyone, who could then claim to be anybody; without
                                 proxy_protocol it is TSRV_EINVAL */
    int handshake_timeout_ms;   /* of the PROXY header and TLS together; 0 = 10 s */
    int idle_timeout_ms;        /* no byte either way while a handler waits in a read; 0 = off */
    int read_timeout_ms;        /* a whole read; 0 = off */
    int write_timeout_ms;       /* unsent output and no byte of it taken for so long, neither by the
                                   system nor, from it, by the peer; 0 = 60 s */
    int close_timeout_ms;       /* after the last byte and FIN, to wait for the peer's; 0 = 5 s; see
                                 tsrv_close */
    int grace_ms;               /* that a drain leaves to what is under way; 0 = 30 s */
    bool nagle;                 /* true = leave Nagle's algorithm on; else TCP_NODELAY is set */
    bool keep_alive;            /* SO_KEEPALIVE; also switched on by any of its three: */
    int keep_alive_idle_ms;     /* without a byte before the first probe; 0 = the system's */
    int keep_alive_interval_ms; /* between probes, in whole seconds like the former; 0 = the same */
    int keep_alive_count;       /* probes without an answer that end the connection; 0 = the same */
    int user_timeout_ms;        /* sent, and not acknowledged for so long: the connection ends with
                                 -ETIMEDOUT (TCP_USER_TIMEOUT, Linux only); 0 = the system's */
    const tsrv_fork_options *fork;         /* for tsrv_serve; NULL = all defaults */
    const tsrv_bind_options *bind;         /* the same */
    const tsrv_loop_options *loop_options; /* for the thread's loop, if this server is the first to
                                              need it, also in a worker: so tsrv_serve has no other
                                              way to set them; NULL = all defaults */
} tsrv_server_options;

/* Counters of one server. */
typedef struct tsrv_stats {
    uint64_t accepted;      /* connections taken, add_stream included, those refused not, unless for
                               what their PROXY header says */
    uint64_t open;          /* streams whose descriptor is open now */
    uint64_t closed;        /* streams whose descriptor has been closed */
    uint64_t bytes_in;      /* received */
    uint64_t bytes_out;     /* taken by the kernel */
    uint64_t accept_pauses; /* times the listeners paused: max_connections, or the system was out of
                               something; and times that one did, because accept failed for good */
    uint64_t accept_errors; /* failures of accept, and connections lost between the peer's connect
                               and our accept */
    uint64_t refused;       /* connections reset at once: max_per_address, on_accept, proxy_from */
    uint64_t ended_well;    /* streams by the reason of their end: their handler's, or the peer's */
    uint64_t ended_reset;   /* the peer has reset it */
    uint64_t ended_timeout; /* TSRV_ETIMEOUT */
    uint64_t ended_here;    /* tsrv_close, tsrv_abort, the end of a drain: TSRV_ECLOSED */
    uint64_t ended_error;   /* every other code, and the connections of a worker that died */
    uint64_t handshakes_failed; /* of TLS: port scans and health checks too */
    uint64_t restarts;          /* of workers after a bad end; counted with the first server */
    uint64_t proxies_failed;    /* connections without a good PROXY header: health checks too */
    uint64_t slow_turns;        /* turns of the loop that took longer than slow_ms */
    uint64_t turn_max_ms;       /* the longest turn */
    uint64_t lag_ms;     /* how late the loop was when last measured; in workers and tsrv_serve */
    uint64_t lag_max_ms; /* the most it ever was */
} tsrv_stats;

/* Make a server. No loop and no descriptor is touched, so it may be made before a fork.
 *   options  copied; handle_stream is required
 * Returns TSRV_OK, TSRV_EINVAL, -ENOMEM, TSRV_ENOTSUP (coroutine mode, compiled without);
 * *server is then NULL. */
TSRV_API int tsrv_server_new(tsrv_server **server, const tsrv_server_options *options);

/* Stop listening, as tsrv_server_stop does, abort what is open, free. Outside the loop it returns
 * after the last on_close; inside it goes on in later turns, and the server is not to be used any
 * more. What it is given meanwhile, as by an on_close that listens again, is refused: TSRV_ECLOSED.
 * NULL: nothing happens. */
TSRV_API void tsrv_server_free(tsrv_server *server);

/* Bind, listen and accept, at once; may be called many times. A failure is logged. Source:
 * TCPServer.listen. Arguments and codes as tsrv_bind_sockets, -ENOMEM, and TSRV_ECLOSED (the
 * server, or its loop, is being freed); after an error nothing of this call listens.
 *   options  NULL = all defaults */
TSRV_API int tsrv_server_listen(tsrv_server *server, int port, const char *address,
                                const tsrv_bind_options *options);

/* Bind and listen now, accept from tsrv_server_start on; may be called many times, and touches no
 * loop. After tsrv_server_start it is tsrv_server_listen. A failure is logged. Source:
 * TCPServer.bind. Arguments and codes as tsrv_server_listen. */
TSRV_API int tsrv_server_bind(tsrv_server *server, int port, const char *address,
                              const tsrv_bind_options *options);

/* Accept on all that tsrv_server_bind has bound, in this process or in workers: as
 * tsrv_fork_processes, which it calls. Once for each server. A failure is logged. Source:
 * TCPServer.start.
 *   num_processes  1 = here, without a fork; 0 = a worker for each processor, also for a single
 *                  one; else so many
 *   options        NULL = all defaults; without a fork only user and group are used
 * Returns TSRV_OK where the server runs: run the loop; in the parent what tsrv_fork_processes
 * returns there; TSRV_EINVAL when nothing is bound, or at the second call. */
TSRV_API int tsrv_server_start(tsrv_server *server, int num_processes,
                               const tsrv_fork_options *options);

/* Accept on sockets that listen already: from tsrv_bind_sockets, from a parent, from systemd.
 * Takes them over (they are made non-blocking, and closed by tsrv_server_stop), also when it
 * fails, then closing them.
 * Source: TCPServer.add_sockets.
 * Returns TSRV_OK, TSRV_EINVAL (not a listening stream socket), -EBADF, -ENOMEM, TSRV_ECLOSED (the
 * server, or its loop, is being freed). */
TSRV_API int tsrv_server_add_sockets(tsrv_server *server, const int *fds, int count);

/* Serve a connected stream socket as if it had been accepted: inetd, descriptor passing,
 * socketpair in tests. The handler is called from the loop. Takes fd over, also when it fails; 0, 1
 * and 2 become /dev/null. Source: IOStream(socket).
 * Returns TSRV_OK, TSRV_EINVAL (not a stream socket), -EBADF, -ENOMEM; TSRV_ECLOSED: its peer
 * has max_per_address connections, and it was reset, or the server, or its loop, is being freed. */
TSRV_API int tsrv_server_add_stream(tsrv_server *server, int fd);

/* Stop listening: connections that wait to be accepted already are, as far as max_connections
 * allows; then the listeners are closed, and new ones are refused. The file of a unix socket is
 * removed by the process that has bound it, if it is still there. Streams go on. Again: nothing
 * happens; a later listen works.
 * Source: TCPServer.stop. */
TSRV_API void tsrv_server_stop(tsrv_server *server);

/* Stop listening, as tsrv_server_stop, let what is under way come to its end, and close every
 * stream. A stream that is idle reads TSRV_EOF with tsrv_stopping(stream) true, and can still
 * write its good-bye; tsrv_wait is woken at once. Idle means: it waits in a read of which nothing
 * has arrived, with nothing unread, here or in the kernel, and nothing unsent, and nothing was
 * received, and it was not accepted, within the last second, whatever it has written. So a request
 * or an upload under way is finished, a client whose first request is in flight is served, and no
 * request is cut of a client that sends at least one a second: the handler of its next one sees
 * tsrv_stopping, and can say in its answer that it is the last. Between two calls of
 * tsrv_read_some nothing tells that more is to come: who reads a body reads all of it, or blocks
 * of it, by tsrv_read_bytes or tsrv_read_into. Who has begun neither its PROXY header nor its
 * handshake for a second is closed. A stream whose client goes on sending is left until the grace
 * is over. Then what is left is aborted, every other wait of the handlers ends once with
 * TSRV_ECLOSED, and a warning is logged. The TSRV_EOF of a drain is final: what the peer answers to
 * the good-bye, or had under way, cannot be read any more. Called again, it goes on with the same
 * drain, and can only shorten its grace. Source: HTTPServer.close_all_connections.
 *   grace_ms  0 = the server's grace_ms; TSRV_NEVER; one below 1.5 s leaves a client that was busy
 *             a moment ago no time to be found idle
 * In a coroutine it waits for the last on_close, at most a second longer than the grace; elsewhere,
 * and in one of this server's own handlers, it starts the drain and returns.
 * Returns TSRV_OK when nothing is open any more; TSRV_ETIMEOUT when that took an abort; TSRV_EAGAIN
 * while it goes on; TSRV_ECLOSED when the server or its loop was freed meanwhile; TSRV_EINVAL in a
 * forked child. */
TSRV_API int tsrv_server_drain(tsrv_server *server, int grace_ms);

/* What was bound: listen(0)'s port.
 *   index  0 for the first listener, and so on
 * Returns TSRV_OK; TSRV_EINVAL when there is no such listener; -errno of getsockname. */
TSRV_API int tsrv_server_address(tsrv_server *server, int index, tsrv_address *address);

/* Walk the open streams: for (s = tsrv_server_next(v, NULL); s != NULL; s = tsrv_server_next(v,
 * s)). Streams that are being closed are left out, and those whose PROXY header has not come; not
 * those that have said nothing yet, or are in their handshake: a flag in tsrv_data tells. Closing s
 * is fine; do not wait inside the walk.
 *   stream  NULL = the first
 * Returns the next, or NULL. */
TSRV_API tsrv_stream *tsrv_server_next(tsrv_server *server, tsrv_stream *stream);

/* Copy the counters: this process's; in a worker what all processes of its task id have counted, in
 * the parent of workers what all of them have. Never waits for anybody. */
TSRV_API void tsrv_server_stats(tsrv_server *server, tsrv_stats *stats);

/* The counters of any worker, or the sum of all, as seen from the parent and from every worker.
 * Servers are matched by the order in which each process has made them; the first 8 count.
 *   task_id  -1 = the sum; in a single process what it has counted itself
 * Returns TSRV_OK, or TSRV_EINVAL when there is no such worker. */
TSRV_API int tsrv_server_worker_stats(tsrv_server *server, int task_id, tsrv_stats *stats);

/* The counters of all workers as text for Prometheus (its exposition format, 0.0.4): send it as
 * "Content-Type: text/plain; version=0.0.4". Each sample has the label worker, the task id; a
 * single process is worker 0, as is what a server from the 9th on counts here. Times are seconds.
 * Of two servers it is the same text: send them apart.
 *   buffer  gets as much of it as fits, and a final 0; NULL with size 0 = only measure
 * Returns the bytes of all of it, without the 0, as snprintf: if that is `size` or more, ask again
 * with more room, and some to spare, since counters grow. */
TSRV_API int tsrv_metrics_format(tsrv_server *server, char *buffer, size_t size);

/* A whole server: make, bind, start, run, and clean up. SIGTERM and SIGINT drain it, in a single
 * process and in workers; under a service manager it tells READY=1 and the like. To upgrade the
 * program without closing the port, set options->fork->upgrade_argv (main's argv, with a path in
 * argv[0]), run workers, and send SIGUSR2. SIGHUP replaces the workers; a single process reads the
 * files of its servers' tls anew. A second SIGTERM, SIGINT or SIGQUIT ends the grace. A single
 * process acts on these signals whether it was started with them ignored or blocked, or not, but
 * leaves them to a handler or a tsrv_signal_start of the program's. Once at a time in a process.
 *   port, address  as tsrv_server_bind
 *   num_processes  as tsrv_server_start: 1 = this process; 0 = one worker for each processor
 *   options        as tsrv_server_new; a loop that it makes is freed at the end. In another one a
 *                  handler that has outlived the grace, and a second, goes on until it ends, or
 *                  that loop does; so do on_close and context
 * It returns in the parent and in each worker, so a reload returns from it too: what is to be done
 * once, at the very end, is for where tsrv_task_id() is -1.
 * Returns TSRV_OK after a drain, also if some connections had to be aborted; TSRV_EBUSY (another
 * thread is inside); else what tsrv_server_new, tsrv_server_bind, tsrv_server_start or
 * tsrv_loop_run say. */
TSRV_API int tsrv_serve(int port, const char *address, int num_processes,
                        const tsrv_server_options *options);

/* ---- client (TCPClient) ----------------------------------------------------*/

typedef struct tsrv_connect_options {
    int timeout_ms; /* for all addresses and the handshake together; 0 = 10 s, TSRV_NEVER */
    tsrv_tls *tls;  /* NULL = plain TCP */
    const char *server_name;       /* whose certificate it must be, by an alternative name of it, in
                                      which "*" is a whole label, or, with none, by its common name;
                                      NULL = host */
    const tsrv_address *proxy_for; /* send a PROXY header of version 2 first, for that client; one
                                      without a family: the connection is our own (LOCAL); where it
                                      came to is said to be the address that we connect to, or
                                      zeros if the families differ. HAProxy refuses clients of unix
                                      sockets. NULL = none */
} tsrv_connect_options;

/* Connect, in a coroutine. A name's addresses are tried as Happy Eyeballs, RFC 8305: families in
 * turn, the next one when one has failed or said nothing for 250 ms; the first to connect wins, and
 * the others are closed. The stream is the caller's: tsrv_close gives it back and is the last thing
 * done with it (what is queued is still sent); tsrv_abort cuts it, may be called by anybody, and
 * frees nothing. It has the limits of tsrv_server_options' defaults, so its reads have no time
 * until tsrv_set_timeout gives them one, and no idle time: a relay notes when either side sent its
 * last byte, and goes on at TSRV_ETIMEOUT while that is recent. It has no data and no on_close. A
 * host that a peer has named may be "unix:/path", too, or this machine: look at it first.
 * Source: TCPClient.connect.
 *   host     a name, a number ("[::1]" too) or "unix:/path", "unix:@abstract"; a name is looked up
 *            by getaddrinfo on a helper thread, half of them at most, within the time limit; with
 *            TSRV_NO_THREADS that blocks the loop
 *   port     1 to 65535; not used for unix paths
 *   options  NULL = all defaults
 *   stream   receives it; NULL after an error
 * Returns TSRV_OK, with TLS after the handshake; TSRV_ETLS (it failed; the reason is logged, but
 * not that the peer has merely gone), TSRV_ETIMEOUT, TSRV_ERESOLVE, TSRV_ECLOSED (the loop is being
 * freed, or the grace of a drain is over), TSRV_EINVAL (not in a coroutine, bad port; a name of
 * more than 255 bytes), -ENOMEM, -EAGAIN (the system gives no thread to look the name up), or
 * -errno of the last address: -ECONNREFUSED, -ENETUNREACH, -EMFILE and the like. */
TSRV_API int tsrv_connect(const char *host, int port, const tsrv_connect_options *options,
                          tsrv_stream **stream);

/* ============================================================================
 * >>api_stream  Declarations: streams
 * ==========================================================================*/

/* ---- stream: reads (IOStream) ----------------------------------------------
 *
 * All of them:
 *   max_bytes  the longest result; 0 = the server's max_buffer_size, and never more than that
 *   slice      receives the bytes; NULL = drop what is read, of any size
 * Return TSRV_OK; TSRV_EOF (the peer will send no more, and what is there does not make a result);
 * TSRV_ETIMEOUT (the read, the deadline or the idle time is over); TSRV_ETOOLONG; TSRV_EBUSY
 * (another coroutine reads this stream); TSRV_EINVAL; TSRV_ECLOSED (closed on this side);
 * -ECONNRESET and the like, after the bytes before it were read; the error of a write that ended
 * the stream; TSRV_EAGAIN where the call cannot wait: in callback mode the handler returns it, is
 * called again when there is news, and repeats the same call. Failing reads consume nothing, but
 * one that drops has dropped what had come. One read at a time. */

/* Read until a delimiter; the slice ends with it. TSRV_ETOOLONG when it ends behind max_bytes, or
 * when more than max_bytes are there without it; they can still be read, or dropped.
 * Source: IOStream.read_until.
 *   delimiter  a C string, not empty */
TSRV_API int tsrv_read_until(tsrv_stream *stream, const char *delimiter, size_t max_bytes,
                             tsrv_slice *slice);

/* The same with a delimiter that may contain 0.
 *   delimiter_size  at least 1 */
TSRV_API int tsrv_read_until_mem(tsrv_stream *stream, const void *delimiter, size_t delimiter_size,
                                 size_t max_bytes, tsrv_slice *slice);

/* Read the first message that match finds: your own framing, with no state between calls.
 *   match    see tsrv_match; more than max_bytes (SIZE_MAX: malformed) is TSRV_ETOOLONG at once.
 *            While it cannot tell, a slice of NULL drops nothing: max_buffer_size is its limit
 *   context  handed to match */
TSRV_API int tsrv_read_until_match(tsrv_stream *stream, tsrv_match match, void *context,
                                   size_t max_bytes, tsrv_slice *slice);

/* Read exactly count bytes. Source: IOStream.read_bytes.
 *   count  0 = an empty slice at once; more than max_buffer_size: TSRV_ETOOLONG, unless slice is
 *          NULL */
TSRV_API int tsrv_read_bytes(tsrv_stream *stream, size_t count, tsrv_slice *slice);

/* Read what is there, at least 1 byte. Source: IOStream.read_bytes(partial=True).
 * Not for bodies of a known size: between two calls a drain takes the stream for idle, and TSRV_EOF
 * while tsrv_stopping(stream) is then not the peer's end. tsrv_read_bytes and tsrv_read_into are
 * waited for. */
TSRV_API int tsrv_read_some(tsrv_stream *stream, size_t max_bytes, tsrv_slice *slice);

/* Read exactly size bytes into the caller's memory, of any size, without a second copy. Source:
 * IOStream.read_into. In callback mode the buffer must stay where it is and be the same when the
 * call is repeated, else TSRV_EINVAL. */
TSRV_API int tsrv_read_into(tsrv_stream *stream, void *buffer, size_t size);

/* Read all until the peer ends its output; then the result may be empty. Source:
 * IOStream.read_until_close. A reset is an error here, not an end: the bytes are still there. */
TSRV_API int tsrv_read_until_close(tsrv_stream *stream, size_t max_bytes, tsrv_slice *slice);

/* ---- stream: writes --------------------------------------------------------
 *
 * What is written is collected, and sent when the handler waits or returns. A write is taken as a
 * whole and in the order of the calls, or refused; it never returns TSRV_EAGAIN. A coroutine then
 * waits inside it while more than write_high_water is unsent; a callback-mode handler waits in its
 * next read instead. A refused write ends the stream, both ways and at once, so its result may be
 * ignored: the next read returns it. Return TSRV_OK; TSRV_EFULL (more than max_write_buffer_size
 * would be unsent); -ENOMEM; TSRV_ECLOSED (tsrv_close, tsrv_abort or tsrv_shutdown was called);
 * TSRV_ETIMEOUT (the peer took nothing for write_timeout_ms); -EPIPE, -ECONNRESET and the like.
 * SIGPIPE is never raised. */

/* Write bytes; afterwards data is the caller's again, and others may change or free it even while
 * this coroutine waits inside, but for the sizes below. Source: IOStream.write.
 *   size  0 = nothing happens, but the stream's state is returned; more than there is room for, in
 *         max_write_buffer_size beside what is unsent already, or in max_total_buffer: a coroutine
 *         has it sent from where it lies, in its place among the other writes, and data must be
 *         left alone until the call returns. Where several coroutines write to one stream, or
 *         max_total_buffer is set, that can be any size. If the wait is ended by tsrv_close, what
 *         is left is copied, and still goes */
TSRV_API int tsrv_write(tsrv_stream *stream, const void *data, size_t size);

/* Write if there is room, and never wait: for broadcasts. What was queued before is sent first,
 * if the peer takes it. In callback mode a read receives nothing while more than write_high_water
 * is unsent, whoever has written it, and its times go on: who broadcasts to such streams sets
 * write_high_water to SIZE_MAX, and a small max_write_buffer_size.
 * Returns as above, but TSRV_EFULL, which max_total_buffer of the loop gives too, leaves the stream
 * as it was, with nothing of data in it. */
TSRV_API int tsrv_try_write(tsrv_stream *stream, const void *data, size_t size);

/* Write several pieces as one, which are the caller's again when tsrv_write's would be. Large ones
 * are sent from where they lie, as far as the kernel takes them. */
TSRV_API int tsrv_writev(tsrv_stream *stream, const tsrv_slice *slices, int count);

/* The same as tsrv_try_write does: all of them, or TSRV_EFULL and nothing. */
TSRV_API int tsrv_try_writev(tsrv_stream *stream, const tsrv_slice *slices, int count);

/* Write formatted text, without a limit of its own. TSRV_EINVAL: the format failed. */
TSRV_API int tsrv_printf(tsrv_stream *stream, const char *format, ...) TSRVI_PRINTF(2, 3);

/* Write a part of a file; it does not count against max_write_buffer_size. A file that turns out
 * shorter ends the stream with -EIO. In a coroutine it waits like any write, in callback mode
 * the next read does.
 *   fd      a regular file; a duplicate is kept while needed, so it may be closed at once
 *   offset  of the first byte
 *   size    bytes; 0 = nothing happens
 * Returns as tsrv_write, and -EBADF, -EMFILE and the like, which end the stream, too; TSRV_EINVAL
 * (no regular file, or nothing that one can have), which does not. */
TSRV_API int tsrv_sendfile(tsrv_stream *stream, int fd, int64_t offset, size_t size);

/* Wait until the kernel has taken all that was written. Source: awaiting IOStream.write.
 * Returns as a write, and TSRV_EAGAIN where the call cannot wait. */
TSRV_API int tsrv_flush(tsrv_stream *stream);

/* ---- stream: ends ----------------------------------------------------------*/

/* End our output: FIN follows what is queued. Does not wait; later writes return TSRV_ECLOSED;
 * reading goes on.
 * Returns TSRV_OK, again too; or the error that ended the output before. */
TSRV_API int tsrv_shutdown(tsrv_stream *stream);

/* Close: every call on the stream, also one that waits, returns TSRV_ECLOSED at once; queued
 * output is sent in the background, then FIN, then input is dropped until the peer's end or
 * close_timeout_ms, so that the answer is not turned into a reset: input that finds the descriptor
 * closed does that. It is closed without waiting for the peer when that has ended its output
 * before, and when it has let a read time out, with nothing unsent then, not even by the system,
 * and nothing written or received since: then no answer can be on its way. With TLS close_notify
 * precedes the FIN, but not when half of a ticket or of new keys has come: tsrv_shutdown waits for
 * the rest. The stream stays valid until its handler and on_close have returned. Source:
 * IOStream.close.
 * Returns TSRV_OK, again too. */
TSRV_API int tsrv_close(tsrv_stream *stream);

/* Close with a reset, at once; unsent output is dropped. Else as tsrv_close. */
TSRV_API int tsrv_abort(tsrv_stream *stream);

/* ---- stream: TLS -----------------------------------------------------------*/

/* Wait until the handshake is done. A handler is called before it; any read waits for it too, so
 * this is for those that want to know, or speak first. Source: SSLIOStream.wait_for_handshake.
 * Returns TSRV_OK, again too; TSRV_ETLS, TSRV_ETIMEOUT, -ECONNRESET and the like when it failed;
 * TSRV_EAGAIN where the call cannot wait; TSRV_EINVAL for a plain stream. */
TSRV_API int tsrv_wait_for_handshake(tsrv_stream *stream);

/* Go over to TLS (STARTTLS). What was written before is sent as it is, what is written from now on
 * is not; the handshake begins. Does not wait. Source: IOStream.start_tls.
 *   server_name  NULL = this is the server, else the client, which accepts a certificate of that
 *                name or number only
 * Returns TSRV_OK; TSRV_ETLS, logged, when there is unread input, which must not count as having
 * come over TLS; TSRV_EBUSY (a read waits, or a write that there is no room for);
 * TSRV_EINVAL (TLS already; no certificate);
 * TSRV_ENOTSUP, or the error that ended the stream. */
TSRV_API int tsrv_start_tls(tsrv_stream *stream, tsrv_tls *tls, const char *server_name);

/* The protocol that ALPN has chosen; "" = none, or not yet. Valid as long as the stream, until the
 * next call. */
TSRV_API const char *tsrv_tls_alpn(tsrv_stream *stream);

/* The host that the client named (SNI); "" = none. Valid as long as the stream. */
TSRV_API const char *tsrv_tls_server_name(tsrv_stream *stream);

/* "TLSv1.3"; "" = no TLS, or not yet. A constant. */
TSRV_API const char *tsrv_tls_version(tsrv_stream *stream);

/* The peer's certificate in DER. Valid as long as the stream, until the next call for it.
 * Returns TSRV_OK; TSRV_EINVAL when it has shown none, or before the handshake; -ENOMEM. */
TSRV_API int tsrv_tls_peer_certificate(tsrv_stream *stream, tsrv_slice *slice);

/* Whom the peer's certificate is for, as RFC 2253 writes it: "CN=alice,O=Example". Every byte that
 * is not printable ASCII is escaped.
 * To allow somebody compare the whole text: to look for "CN=alice" in it finds others, too.
 *   size  of buffer; 512 is enough for most
 * Returns TSRV_OK; TSRV_EINVAL when it has shown none, or before the handshake, which a handler
 * that has read nothing waits for by tsrv_wait_for_handshake; TSRV_ETOOLONG: the buffer holds what
 * fits; -ENOMEM; TSRV_ENOTSUP. The buffer is terminated in any case. */
TSRV_API int tsrv_tls_peer_name(tsrv_stream *stream, char *buffer, size_t size);

/* The SSL of the stream, to look at; NULL = no TLS. It must not be read from or written to. */
TSRV_API void *tsrv_tls_native(tsrv_stream *stream);

/* ---- stream: waiting for something else ------------------------------------*/

/* Wait for tsrv_wake(stream), in both modes: the end of a helper coroutine, a thread's result,
 * or simply time. The stream's end and the start of a drain wake too, once: check the condition in
 * a loop. It does not say which: look at the condition first, then at tsrv_stopping (a drain) and
 * tsrv_error (a reset). Else the peer has ended its output, and may still read: who sends a request
 * and half-closes looks the same as who has left. That end counts when it is seen: bytes that come
 * before it during the wait stay in the kernel and hide it; a reset counts at once.
 *   timeout_ms  0 = only look; TSRV_NEVER
 * Returns TSRV_OK, TSRV_ETIMEOUT, TSRV_EAGAIN where the call cannot wait, TSRV_EINVAL in the
 * stream's on_close, TSRV_ECLOSED to a helper coroutine when nothing but on_close is left to
 * come. */
TSRV_API int tsrv_wait(tsrv_stream *stream, int timeout_ms);

/* End every tsrv_wait on the stream; with none, the next one. Loop's thread: from others by
 * tsrv_loop_post. */
TSRV_API void tsrv_wake(tsrv_stream *stream);

/* ---- stream: state ---------------------------------------------------------*/

/* The stream's own bytes, data_size of them, zeroed at first, aligned for every type; NULL when
 * data_size is 0. Freed after on_close. */
TSRV_API void *tsrv_data(tsrv_stream *stream);

/* Have another handler called from the next call on: a state machine in callback mode, a
 * protocol switch. */
TSRV_API void tsrv_set_handler(tsrv_stream *stream, tsrv_handler handler);

/* TCP_NODELAY on or off; no effect on unix sockets. Source: IOStream.set_nodelay.
 * Returns TSRV_OK, TSRV_ECLOSED, -errno of setsockopt. */
TSRV_API int tsrv_set_nodelay(tsrv_stream *stream, bool on);

/* Limit calls that begin from now on.
 *   read_ms   a whole read; one byte a second does not extend it; then TSRV_ETIMEOUT, and the
 *             stream goes on
 *   write_ms  unsent output of which no byte is taken for so long, counted from now at the latest;
 *             then the stream ends with TSRV_ETIMEOUT
 * 0 = the server's, which is not "off"; TSRV_NEVER. A handler in callback mode is called from its
 * beginning again: what it changes later stands behind a flag in tsrv_data. */
TSRV_API void tsrv_set_timeout(tsrv_stream *stream, int read_ms, int write_ms);

/* Limit all reads and waits from now on together: they return TSRV_ETIMEOUT once it has passed,
 * until it is set again, also where there would be something to read; but for what has come in time
 * and could not be looked at before. A handler in callback mode is called from its beginning again,
 * so it sets it once, behind a flag in tsrv_data.
 *   delay_ms  from now; 0 or TSRV_NEVER = no deadline */
TSRV_API void tsrv_set_deadline(tsrv_stream *stream, int delay_ms);

/* The peer's address, kept from accept. Returns TSRV_OK. */
TSRV_API int tsrv_peer_address(tsrv_stream *stream, tsrv_address *address);

/* Who has sent the stream's PROXY header: tsrv_peer_address is the client's then. Returns TSRV_OK;
 * TSRV_EINVAL without tsrv_server_options.proxy_protocol. */
TSRV_API int tsrv_proxy_address(tsrv_stream *stream, tsrv_address *address);

/* What the PROXY header says besides addresses: the first TLV of a type, such as 0x02
 * (PP2_TYPE_AUTHORITY, the name that the client has asked for) or 0x20 (PP2_TYPE_SSL). Valid as
 * long as the stream.
 *   type   0 to 255; see HAProxy's proxy-protocol.txt, 2.2
 *   slice  receives its value; not terminated
 * Returns TSRV_OK; TSRV_EINVAL when there is none. */
TSRV_API int tsrv_proxy_tlv(tsrv_stream *stream, int type, tsrv_slice *slice);

/* Our own address; behind a proxy that of the connection from it. Returns TSRV_OK, TSRV_ECLOSED,
 * -errno of getsockname. */
TSRV_API int tsrv_local_address(tsrv_stream *stream, tsrv_address *address);

/* The descriptor, for socket options only; -1 when closed. Not for SO_LINGER with a time, for which
 * close(2) would wait, O_NONBLOCK, SO_RCVLOWAT, or what fills its error queue (SO_TIMESTAMPING). */
TSRV_API int tsrv_fd(tsrv_stream *stream);

/* The error that ended the stream: -errno, TSRV_ETIMEOUT, TSRV_EFULL; TSRV_OK while it is open
 * or has ended in good order (the peer's end, our close). Source: IOStream.error. */
TSRV_API int tsrv_error(tsrv_stream *stream);

/* Has a drain of the stream's server begun? Then a TSRV_EOF may be the drain's, and is the moment
 * to say good-bye. A relay, which has none to say, does not pass it on: it goes on with the other
 * direction. */
TSRV_API bool tsrv_stopping(tsrv_stream *stream);

/* Bytes received and not yet read. */
TSRV_API size_t tsrv_unread_size(tsrv_stream *stream);

/* Bytes written and not yet taken by the kernel, those of files included. */
TSRV_API size_t tsrv_unsent_size(tsrv_stream *stream);

/* The server that accepted the stream; NULL for one that tsrv_connect made. */
TSRV_API tsrv_server *tsrv_stream_server(tsrv_stream *stream);

/* The loop that it belongs to. */
TSRV_API tsrv_loop *tsrv_stream_loop(tsrv_stream *stream);

#ifdef __cplusplus
}
#endif
#endif /* TCPSERVER_H */

#if defined(TCPSERVER_IMPLEMENTATION) && !defined(TSRVI_IMPLEMENTED)
#define TSRVI_IMPLEMENTED

/* A map for whoever has to change this.
 *
 * A byte that comes: the kernel -> tsrvi_epoll_wait -> tsrvi_poller_dispatch -> tsrvi_stream_event
 * (>>event) -> tsrvi_stream_feed -> tsrvi_stream_receive (>>input) -> tsrvi_plain_recv
 * (>>transport), or a session's -> the loop's buffer. Then tsrvi_wait_end (>>settle) ->
 * tsrvi_attempt_until and its kin (>>attempt) -> the slice -> the coroutine goes on; or
 * tsrvi_own_end -> tsrvi_stream_call (>>handler) -> the handler, whose read attempts the same. What
 * is not as simple as that goes by way of tsrvi_stream_happens and tsrvi_stream_settle.
 *
 * A byte that goes: tsrv_write (>>write) -> a buffer of the queue (>>buffer) -> when the handler
 * waits or returns, tsrvi_stream_settled -> tsrvi_stream_flush (>>ends) -> send(2), or
 * tsrvi_plain_send (>>transport), or a session's -> the kernel. Large ones go from tsrvi_write_take
 * straight to tsrvi_stream_send.
 *
 * Where to change what
 *   a new kind of wait        a TSRVI_FOR_... and its predicate in tsrvi_wait_is_over (>>settle)
 *   a new read                an attempt (>>attempt), and a public function around it (>>read)
 *   a new end, or phase       the table in >>stream, >>ends, tsrvi_stream_verify (>>settle)
 *   a new transport           a table as in >>transport; tests/transport.h has one
 *   another event interface   a table as in >>backend, and a line in tsrvi_backends (>>poll)
 *   another processor         >>switch
 *   accepting                 >>accept; a drain: >>drain; processes: the tables in >>process
 *   an option                 its declaration, its default in tsrvi_server_defaults (>>server)
 * Tests are named after what they test, and tests/check_header.sh holds the rules of this text. */

/* ============================================================================
 * >>platform  What the system offers, and the seams
 *
 * This section turns system macros into TSRVI_HAS_... macros that are always 0
 * or 1; after it no system is named any more. Every system call goes through
 * TSRV_SYS and every allocation through TSRV_MALLOC and its kin, so that tests
 * can make each of them fail; by default they are the plain calls.
 * ==========================================================================*/

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#if !defined(AI_PASSIVE) || !defined(MAP_ANONYMOUS)
#error "tcpserver.h: include it before every libc header, or compile with -std=gnu99"
#elif !defined(__GNUC__)
#error "tcpserver.h: needs gcc or clang (__thread, __atomic_*, inline assembly)"
#else

/* The code is C that C++ takes too, and C has one cast only. */
#ifdef __cplusplus
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wold-style-cast"
#endif

#if defined(__linux__) && !defined(TSRV_NO_EPOLL)
#define TSRVI_HAS_EPOLL 1
#include <sys/epoll.h>
#else
#define TSRVI_HAS_EPOLL 0
#endif

#if defined(__has_include) && !defined(TSRV_NO_KQUEUE)
#if __has_include(<sys/event.h>)
#define TSRVI_HAS_KQUEUE 1
#include <sys/event.h>
#endif
#endif
#ifndef TSRVI_HAS_KQUEUE
#define TSRVI_HAS_KQUEUE 0
#endif

#ifdef TSRV_NO_THREADS
#define TSRVI_HAS_THREADS 0
#else
#define TSRVI_HAS_THREADS 1
#include <pthread.h>
#endif

#if defined(__linux__)
#define TSRVI_HAS_EVENTFD 1
#define TSRVI_HAS_SENDFILE 1
#define TSRVI_HAS_PDEATHSIG 1
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#else
#define TSRVI_HAS_EVENTFD 0
#define TSRVI_HAS_SENDFILE 0
#define TSRVI_HAS_PDEATHSIG 0
#endif

/* Which processors this process may use; glibc shows it with _GNU_SOURCE only. */
#if defined(__linux__) && defined(CPU_ISSET)
#define TSRVI_HAS_AFFINITY 1
#else
#define TSRVI_HAS_AFFINITY 0
#endif

/* Linux 4.5: of the processes that wait for one listener, wake one. */
#if TSRVI_HAS_EPOLL && defined(EPOLLEXCLUSIVE)
#define TSRVI_EPOLLEXCLUSIVE ((uint32_t)EPOLLEXCLUSIVE)
#else
#define TSRVI_EPOLLEXCLUSIVE 0u
#endif

#if TSRVI_HAS_KQUEUE && defined(__NetBSD__)
typedef size_t tsrvi_kevent_count; /* of changes, as kevent takes it */
#elif TSRVI_HAS_KQUEUE
typedef int tsrvi_kevent_count;
#endif

/* accept4 and SOCK_CLOEXEC save two system calls a connection. glibc shows accept4 with _GNU_SOURCE
 * only. */
#if defined(SOCK_NONBLOCK) && defined(SOCK_CLOEXEC) && (!defined(__GLIBC__) || defined(__USE_GNU))
#define TSRVI_HAS_ACCEPT4 1
#else
#define TSRVI_HAS_ACCEPT4 0
#endif

/* Locks that go with the open file, so that they can be held on a directory. */
#if defined(LOCK_EX) && defined(O_DIRECTORY)
#define TSRVI_HAS_FLOCK 1
#else
#define TSRVI_HAS_FLOCK 0
#endif

/* Descriptors that name a file, without opening it; glibc shows O_PATH with _GNU_SOURCE only. */
#ifdef O_PATH
#define TSRVI_HAS_O_PATH 1
#else
#define TSRVI_HAS_O_PATH 0
#endif

/* Can a 64-bit number be read in one piece? Else __atomic_load_n of one would be a function of
 * libatomic. */
#if defined(__GCC_ATOMIC_LLONG_LOCK_FREE) && __GCC_ATOMIC_LLONG_LOCK_FREE == 2
#define TSRVI_HAS_ATOMIC_64 1
#else
#define TSRVI_HAS_ATOMIC_64 0
#endif

#ifdef MSG_NOSIGNAL
#define TSRVI_SEND_FLAGS (MSG_NOSIGNAL | MSG_DONTWAIT)
#else
#define TSRVI_SEND_FLAGS MSG_DONTWAIT /* SO_NOSIGPIPE is set on the socket instead */
#endif

/* Take a pending signal away without waiting for one; macOS and OpenBSD cannot in one call. */
#if defined(_POSIX_REALTIME_SIGNALS) && _POSIX_REALTIME_SIGNALS > 0
#define TSRVI_HAS_SIGTIMEDWAIT 1
#else
#define TSRVI_HAS_SIGTIMEDWAIT 0
#endif

/* A socket address of BSD's and macOS' begins with its own length. */
#if defined(__APPLE__) || defined(__FreeBSD__) || defined(__NetBSD__) || defined(__OpenBSD__) || \
    defined(__DragonFly__)
#define TSRVI_SET_LENGTH(member, size) ((member) = (uint8_t)(size))
#else
#define TSRVI_SET_LENGTH(member, size) ((void)0)
#endif

/* When the first probe of SO_KEEPALIVE is sent. */
#if defined(TCP_KEEPIDLE)
#define TSRVI_KEEPIDLE TCP_KEEPIDLE
#elif defined(TCP_KEEPALIVE)
#define TSRVI_KEEPIDLE TCP_KEEPALIVE /* macOS */
#endif

/* Linux 6.13: guard pages without a mapping of their own, so that 100,000 stacks do not exhaust
 * vm.max_map_count. Older C libraries do not name it. Valgrind does not know it either: its search
 * for leaks would fault at each of the guard's words, 0.15 s a stack. */
#if defined(__linux__) && !defined(TSRV_VALGRIND)
#define TSRVI_MADV_GUARD_INSTALL 102
#else
#define TSRVI_MADV_GUARD_INSTALL (-1)
#endif

#ifdef MAP_STACK
#define TSRVI_MAP_STACK MAP_STACK
#else
#define TSRVI_MAP_STACK 0
#endif

#ifdef MAP_NORESERVE
#define TSRVI_MAP_NORESERVE MAP_NORESERVE
#else
#define TSRVI_MAP_NORESERVE 0
#endif

/* How stacks are switched: by hand where >>switch knows the processor, else by ucontext where the C
 * library has it. musl, Android and OpenBSD have not: on other processors there are no coroutines.
 */
#define TSRVI_NO_SWITCH 0
#define TSRVI_UCONTEXT 1
#define TSRVI_X86_64 2
#define TSRVI_X86 3
#define TSRVI_AARCH64 4
#define TSRVI_ARM 5
#define TSRVI_RISCV64 6
#define TSRVI_PPC64 7 /* with the second ELF ABI, which all that is little-endian uses */
#define TSRVI_S390X 8
#if defined(TSRV_NO_COROUTINES)
#define TSRVI_SWITCH TSRVI_NO_SWITCH
#elif defined(TSRV_USE_UCONTEXT)
#define TSRVI_SWITCH TSRVI_UCONTEXT
#elif defined(__x86_64__) && !defined(__ILP32__)
#define TSRVI_SWITCH TSRVI_X86_64
#elif defined(__i386__)
#define TSRVI_SWITCH TSRVI_X86
#elif defined(__aarch64__)
#define TSRVI_SWITCH TSRVI_AARCH64
#elif defined(__arm__) && (!defined(__thumb__) || defined(__thumb2__))
#define TSRVI_SWITCH TSRVI_ARM
#elif defined(__riscv) && __riscv_xlen == 64 && !defined(__riscv_32e)
#define TSRVI_SWITCH TSRVI_RISCV64
#elif defined(__powerpc64__) && defined(_CALL_ELF) && _CALL_ELF == 2
#define TSRVI_SWITCH TSRVI_PPC64
#elif defined(__s390x__)
#define TSRVI_SWITCH TSRVI_S390X
#elif (defined(__linux__) && !defined(__GLIBC__)) || defined(__OpenBSD__)
#define TSRVI_SWITCH TSRVI_NO_SWITCH
#else
#define TSRVI_SWITCH TSRVI_UCONTEXT
#endif
#if TSRVI_SWITCH == TSRVI_NO_SWITCH
#define TSRVI_HAS_COROUTINES 0
#else
#define TSRVI_HAS_COROUTINES 1
#endif
#if TSRVI_SWITCH == TSRVI_UCONTEXT
#include <ucontext.h>
#endif

/* Sanitizers and Valgrind have to be told when the stack changes under them. */
#if defined(__has_feature)
#define TSRVI_FEATURE(name) __has_feature(name)
#else
#define TSRVI_FEATURE(name) 0
#endif
#if defined(__SSE2__) && !TSRVI_FEATURE(memory_sanitizer)
#define TSRVI_HAS_SSE2 1 /* with which bytes are looked at, and masked, that nobody has written */
#include <emmintrin.h>
#else
#define TSRVI_HAS_SSE2 0
#endif
#if defined(__SANITIZE_ADDRESS__) || TSRVI_FEATURE(address_sanitizer)
#define TSRVI_HAS_ASAN 1
#include <sanitizer/asan_interface.h>
#else
#define TSRVI_HAS_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__) || TSRVI_FEATURE(thread_sanitizer)
#define TSRVI_HAS_TSAN 1
#include <sanitizer/tsan_interface.h>
#else
#define TSRVI_HAS_TSAN 0
#endif
#if defined(TSRV_VALGRIND)
#include <valgrind/valgrind.h>
#define TSRVI_STACK_REGISTER(low, high) VALGRIND_STACK_REGISTER(low, high)
#define TSRVI_STACK_DEREGISTER(id) VALGRIND_STACK_DEREGISTER(id)
#else
#define TSRVI_STACK_REGISTER(low, high) 0u
#define TSRVI_STACK_DEREGISTER(id) ((void)(id))
#endif

/* A function that is NULL where the program does not have it. Its own name is given as text, so
 * that no declaration of others is contradicted. Mach-O wants it to be there when the program is
 * linked, which is only certain in C++. */
#define TSRVI_TEXT_OF(name) #name
#define TSRVI_TEXT(name) TSRVI_TEXT_OF(name)
#define TSRVI_WEAK(name) __asm__(TSRVI_TEXT(__USER_LABEL_PREFIX__) name) __attribute__((weak))
#if defined(__ELF__)
#define TSRVI_HAS_LSAN 1
#else
#define TSRVI_HAS_LSAN 0
#endif
#if defined(__ELF__) || defined(__cplusplus)
#define TSRVI_HAS_EXCEPTIONS 1
#else
#define TSRVI_HAS_EXCEPTIONS 0
#endif

#if defined(TSRV_TLS_OPENSSL)
#define TSRVI_HAS_TLS 1
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/ocsp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#if OPENSSL_VERSION_NUMBER >= 0x30000000L
#include <openssl/core_names.h>
#endif
#if OPENSSL_VERSION_NUMBER < 0x10101000L
#error "tcpserver.h: TSRV_TLS_OPENSSL needs OpenSSL 1.1.1 or newer"
#endif
#else
#define TSRVI_HAS_TLS 0
#endif

#ifndef TSRV_SYS
#define TSRV_SYS(name, arguments) name arguments
#endif

#if defined(TSRV_MALLOC) && defined(TSRV_REALLOC) && defined(TSRV_FREE)
#elif defined(TSRV_MALLOC) || defined(TSRV_REALLOC) || defined(TSRV_FREE)
#error "tcpserver.h: define all of TSRV_MALLOC, TSRV_REALLOC and TSRV_FREE, or none"
#else
#define TSRV_MALLOC(size) malloc(size)
#define TSRV_REALLOC(pointer, size) realloc(pointer, size)
#define TSRV_FREE(pointer) free(pointer)
#endif

#ifndef TSRV_ASSERT
#include <assert.h>
#define TSRV_ASSERT(condition) assert(condition)
#endif

#define TSRVI_LIKELY(condition) __builtin_expect(!!(condition), 1)
#define TSRVI_UNLIKELY(condition) __builtin_expect(!!(condition), 0)
/* For what every request goes through: measured, a call of these costs as much as what they do. */
#define TSRVI_INLINE __attribute__((always_inline))
/* So that a short common case does not pay for the registers of the long way. */
#define TSRVI_APART __attribute__((noinline))

/* The object that contains a member, from a pointer to the member. */
#define TSRVI_CONTAINER(pointer, type, member) \
    ((type *)(void *)((char *)(pointer)-offsetof(type, member)))

/* Each object of a list; none may leave it meanwhile. */
#define TSRVI_EACH(type, one, head, member)                                               \
    for (type *one = TSRVI_CONTAINER((head)->next, type, member); &one->member != (head); \
         one = TSRVI_CONTAINER(one->member.next, type, member))

/* ============================================================================
 * >>list  Doubly linked list inside the objects it links
 *
 * The head is a link like the others, so no case is special. A link that is in
 * no list points at itself, so removing it twice does no harm.
 * ==========================================================================*/

typedef struct tsrvi_link {
    struct tsrvi_link *next;
    struct tsrvi_link *previous;
} tsrvi_link;

static void tsrvi_list_init(tsrvi_link *link)
{
    link->next = link;
    link->previous = link;
}

static bool tsrvi_list_empty(const tsrvi_link *head)
{
    return head->next == head;
}

static void tsrvi_list_append(tsrvi_link *head, tsrvi_link *link)
{
    link->previous = head->previous;
    link->next = head;
    head->previous->next = link;
    head->previous = link;
}

static void tsrvi_list_remove(tsrvi_link *link)
{
    link->previous->next = link->next;
    link->next->previous = link->previous;
    tsrvi_list_init(link);
}

/* ============================================================================
 * >>globals  What all of a process shares
 *
 * Each layer has its part of one struct, which is all zeros at first. What is
 * atomic says so; the rest belongs to who holds the lock of its part, or to the
 * one thread that supervises, or serves.
 * ==========================================================================*/

/* Lines that peers can cause, or a fault that lasts, by kind. */
enum {
    TSRVI_LOG_HANDLER, /* handlers that failed */
    TSRVI_LOG_REFUSED, /* addresses with too many connections */
    TSRVI_LOG_TLS,     /* peers that broke the rules of TLS */
    TSRVI_LOG_PROXY,   /* peers that broke those of the PROXY protocol */
    TSRVI_LOG_SLOW,    /* turns that took long */
    TSRVI_LOG_TIGHT,   /* more than max_total_buffer */
    TSRVI_LOG_NOTIFY,  /* a service manager that cannot be told */
    TSRVI_LOG_WAIT,    /* ends of processes that cannot be learnt */
    TSRVI_LOG_KINDS
};

#ifdef NSIG
#define TSRVI_SIGNALS NSIG
#else
#define TSRVI_SIGNALS 65
#endif
#define TSRVI_HANDED_MAX 4096 /* sockets that can be handed over */
#define TSRVI_BOUND_FEW 32    /* more take memory: see >>bound */
#define TSRVI_WORKER_SIGNALS 5
#define TSRVI_SUPERVISED_MAX 8

/* The service manager waits for a sign of life; see >>notify. */
typedef struct tsrvi_watchdog {
    uint64_t due; /* TSRVI_FOREVER = it waits for none */
    uint64_t interval;
} tsrvi_watchdog;

/* One that this process has bound; see >>bound. */
typedef struct tsrvi_bound_socket {
    int fd;
    pid_t pid; /* who has bound it */
    dev_t device;
    ino_t inode;
    bool has_file;
    dev_t file_device;
    ino_t file_inode;
} tsrvi_bound_socket;

struct tsrvi_place;

static struct tsrvi_process {
    /* Of >>log. All but the level are of one process: a fork's child begins anew. 32 bits, since
     * some processors have no atomics of 64. */
    struct {
        tsrv_log_function function; /* NULL = the default logger */
        void *context;
        int level;        /* atomic; how far above TSRV_LOG_INFO the default logger prints */
        pid_t pid;        /* atomic */
        uint32_t lost;    /* atomic; lines that could not be written, and were not told of */
        uint32_t torn;    /* atomic; a part of the last line was written */
        uint32_t journal; /* atomic; of the inode of the journal's stream, once it was seen; 0 */
        int kept;      /* descriptor 2, opened anew by who may no more; 0 = that was not needed */
        uint32_t owed; /* atomic; some kind has suppressed lines that were not told of */
        struct {
            uint32_t since;  /* atomic; when its window began */
            uint32_t length; /* atomic; of the window, in milliseconds */
            uint32_t count;  /* atomic; lines since then, suppressed ones included */
            int level;       /* atomic; of the last one */
        } kinds[TSRVI_LOG_KINDS];
    } log;
    unsigned without; /* atomic; bits of TSRVI_WITHOUT_... */

    /* Of >>loop: the loops of this process, on all threads. */
    struct {
        int lock;
        tsrvi_link list;
        pid_t pid; /* whose they are: those that a fork copied do not count */
    } loops;
    tsrv_loop *chief;                /* atomic; the loop that stands for the process */
    const struct tsrvi_hooks *hooks; /* of all loops of a worker; NULL = it is none */

    /* Of >>sources: as signal dispositions are, which loop watches a signal, and what was there
     * before. */
    int signal_handlers; /* atomic; that are running, on any thread */
    struct {
        tsrv_loop *loop; /* atomic; NULL = not watched */
        int pending;     /* atomic */
        int kept;        /* atomic; our handler stays, for who watches it next */
        struct sigaction before;
    } signals[TSRVI_SIGNALS];

    /* Of >>handed */
    struct {
        int lock;
        bool looked;
        int code;                    /* what was wrong with the variables */
        int count;                   /* descriptors from TSRVI_LISTEN_FIRST on */
        bool free[TSRVI_HANDED_MAX]; /* one of ours that nothing has taken yet */
        bool file[TSRVI_HANDED_MAX]; /* a unix socket whose file we have to remove in the end */
        bool upgrade;                /* they come from the program that this one replaces */
        int ready;                   /* in an upgrade a pipe's end; -1 = nobody waits any more */
    } handed;

    /* Of >>bound */
    struct {
        int lock;
        tsrvi_bound_socket *many; /* NULL = few suffice */
        int count;
        int size; /* of many */
        tsrvi_bound_socket few[TSRVI_BOUND_FEW];
    } bound;

    /* Of >>shared */
    struct tsrvi_place *places; /* TSRVI_GENERATIONS for each worker; NULL = there are none */
    int place_count;
    struct tsrvi_place *place_own; /* in a worker */
    unsigned server_numbers;       /* atomic; bits: the numbers in use */

    int tls_index; /* of >>tls; atomic; where an SSL has its set, and 1; 0 = nowhere yet */

    /* Of >>server: those that have no loop yet, of all threads. */
    struct {
        int lock;
        tsrvi_link list;
    } servers;

    /* Of >>notify: READY=1 or MAINPID=n that could not be sent, as when the service manager's queue
     * is full: without it the service would be ended. "" = nothing. */
    char notify_owed[32];
    char notify_path[128]; /* NOTIFY_SOCKET, as it was when servers were started; no address has
                            * room for what is cut */

    /* Of >>worker. What is not atomic is the chief's. */
    int number;                  /* its task id and 1; 0 = this is not a worker */
    pid_t parent;                /* who must not die before it; 0 = nobody */
    const tsrv_server *reloaded; /* whose files are read anew on SIGHUP; NULL = nobody's */
    struct {
        pid_t pid;          /* a worker's, and not its children's */
        int wake;           /* the parent's pipe; -1 = no worker */
        int grace_ms;       /* of the drain; 0 = each server's own */
        bool grace_is_most; /* it was not asked for: a server's own may be shorter */
        uint64_t interval;  /* between two beats */
        tsrvi_watchdog watchdog;
        uint64_t ready; /* when a single process began to accept; 0 = not yet */
        int loops;      /* atomic; that are within tsrv_loop_run */
        int told;       /* atomic; TSRVI_STAY and the like */
        int by_parent;  /* times, */
        int by_signal;  /* and times */
        tsrvi_io line;  /* the life-line; fd -1 = none */
        tsrv_signal signals[TSRVI_WORKER_SIGNALS];
        bool upgradable; /* the program expects SIGUSR2 to do something */
        int fatal;       /* atomic; the parent's death is this process's at once */
        sigset_t mask;   /* of the chief's thread, before signals were unblocked */
    } worker;

    /* Of >>process: the signals that the parent has got, and where handlers write to */
    int supervised_got[TSRVI_SUPERVISED_MAX]; /* atomic */
    int supervised_wake;
    int supervising; /* atomic; who supervises: a process id; 0 = nobody */
    int serving;     /* atomic; who is inside tsrv_serve; the same */
} tsrvi_process;

/* This thread's own loop, and the one that is running on it. */
static __thread struct {
    tsrv_loop *own;
    tsrv_loop *running;
} tsrvi_thread;

/* The task id of this process; -1 = it is no worker. */
static int tsrvi_worker_id(void)
{
    return tsrvi_process.number - 1;
}

/* ============================================================================
 * >>util  Codes, clock, descriptors
 *
 * No descriptor of the library is 0, 1 or 2: a program that was started without
 * them still prints to these numbers. Every descriptor goes through tsrvi_fd_own
 * as soon as a system call has returned it.
 *
 * No write of the library raises SIGPIPE: sockets are sent to with MSG_NOSIGNAL,
 * and everything else is written by tsrvi_write_quiet, or between
 * tsrvi_quiet_begin and tsrvi_quiet_end.
 *
 * A log line is text that may come from outside, about events that peers can
 * repeat at will, for a reader who may be slow, dead or somebody else. So the
 * text is escaped, lines that a peer can cause are limited, and the default
 * logger loses a line, and says so later, rather than wait.
 * ==========================================================================*/

TSRV_API const char *tsrv_version(void)
{
    return TSRV_VERSION;
}

TSRV_API const char *tsrv_strerror(int code)
{
    switch (code) {
    case TSRV_OK:
        return "success";
#define TSRVI_CASE(name, value, text) \
    case name:                        \
        return text;
        TSRVI_CODES(TSRVI_CASE)
#undef TSRVI_CASE
    default:
        if (code > 0) {
            return "success, with a value of the program's own";
        }
        return code > -10000 ? strerror(-code) : "unknown code";
    }
}

/* What a failed system call left in errno, as a code. */
static int tsrvi_error(void)
{
    return errno > 0 ? -errno : -EIO;
}

/* Does this error of a call say that it would have had to wait? POSIX lets the two numbers differ;
 * where they do not, to compare with both is a warning of gcc's (-Wlogical-op). */
static inline bool tsrvi_would_block(int error)
{
#if EAGAIN == EWOULDBLOCK
    return error == EAGAIN;
#else
    return error == EAGAIN || error == EWOULDBLOCK;
#endif
}

#define TSRVI_FOREVER UINT64_MAX
#define TSRVI_MS ((uint64_t)1000000) /* nanoseconds */

/* Nanoseconds of the monotonic clock: the wall clock jumps. */
static uint64_t tsrvi_clock(void)
{
    struct timespec t;
    t.tv_sec = 0;
    t.tv_nsec = 0;
    TSRV_SYS(clock_gettime, (CLOCK_MONOTONIC, &t));
    return (uint64_t)t.tv_sec * 1000 * TSRVI_MS + (uint64_t)t.tv_nsec;
}

/* The time delay_ms after `now`; TSRV_NEVER and whatever would wrap is never. */
static uint64_t tsrvi_after(uint64_t now, int delay_ms)
{
    uint64_t delay = (uint64_t)delay_ms * TSRVI_MS;
    return delay_ms < 0 || delay > TSRVI_FOREVER - now ? TSRVI_FOREVER : now + delay;
}

static uint64_t tsrvi_earlier(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static size_t tsrvi_min(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* For numbers that count more than memory: what does not fit is the most. */
static size_t tsrvi_size(uint64_t size)
{
    return size > SIZE_MAX ? SIZE_MAX : (size_t)size;
}

/* A decimal number from 0 to `most`, and nothing else; -1 = it is none. */
static int64_t tsrvi_decimal(const char *text, int64_t most)
{
    int64_t value = 0;
    if (text == NULL || *text == 0) {
        return -1;
    }
    for (; *text != 0; text++) {
        int digit = *text - '0';
        if (digit < 0 || digit > 9 || value > (most - digit) / 10) {
            return -1;
        }
        value = value * 10 + digit;
    }
    return value;
}

/* Zeroed memory, or NULL. */
static void *tsrvi_zalloc(size_t size)
{
    void *memory = TSRV_MALLOC(size);
    if (memory != NULL) {
        memset(memory, 0, size);
    }
    return memory;
}

static int tsrvi_set_flags(int fd)
{
    int flags = TSRV_SYS(fcntl, (fd, F_GETFL));
    if (flags < 0 ||
        ((flags & O_NONBLOCK) == 0 && TSRV_SYS(fcntl, (fd, F_SETFL, flags | O_NONBLOCK)) < 0)) {
        return tsrvi_error();
    }
    return TSRV_SYS(fcntl, (fd, F_SETFD, FD_CLOEXEC)) < 0 ? tsrvi_error() : TSRV_OK;
}

/* close is not repeated after EINTR: the descriptor is gone, and its number may be somebody else's
 * by now. */
static void tsrvi_close_fd(int fd)
{
    int saved = errno;
    if (fd >= 0) {
        TSRV_SYS(close, (fd));
    }
    errno = saved;
}

/* A lock for what all threads of the process share; held for a few lines. It holds the process id
 * of its owner, 0 = free: a child that was forked while another thread held it finds its parent's
 * there, whom nobody in the child will ever release, and takes it. */
static void tsrvi_lock(int *lock)
{
    int self = (int)TSRV_SYS(getpid, ()), owner = 0;
    while (!__atomic_compare_exchange_n(lock, &owner, self, false, __ATOMIC_ACQUIRE,
                                        __ATOMIC_RELAXED)) {
        if (owner == self) {
            owner = 0;
            TSRV_SYS(sched_yield, ());
        }
    }
}

static void tsrvi_unlock(int *lock)
{
    __atomic_store_n(lock, 0, __ATOMIC_RELEASE);
}

/* The low number was free, so the program was started, or goes on, without it. /dev/null takes its
 * place, and that of others like it: what is printed to them goes nowhere, and the next descriptor
 * does not land there. Programs that are started by this one inherit it, and are spared the same.
 */
static TSRVI_APART int tsrvi_fd_move(int fd)
{
    int moved = TSRV_SYS(fcntl, (fd, F_DUPFD_CLOEXEC, 3)), saved = errno, null;
    do {
        null = TSRV_SYS(open, ("/dev/null", O_RDWR));
    } while (null >= 0 && null <= 2);
    if (null < 0 || TSRV_SYS(dup2, (null, fd)) < 0) {
        tsrvi_close_fd(fd);
    }
    tsrvi_close_fd(null);
    errno = saved;
    return moved;
}

/* The descriptor that a system call has just returned becomes the library's: it is never 0, 1 or 2.
 * -1 passes; so does a failure to move it, with errno set and nothing left open. */
static int tsrvi_fd_own(int fd)
{
    return TSRVI_LIKELY(fd > 2) || fd < 0 ? fd : tsrvi_fd_move(fd);
}

/* Two descriptors that were made together, if they were; else both are -1. */
static int tsrvi_fds_own(int *fds, int made)
{
    int rc = TSRV_OK;
    if (made < 0) {
        fds[0] = -1;
        fds[1] = -1;
        return tsrvi_error();
    }
    for (int i = 0; i < 2; i++) { /* both, so that none is left behind at its low number */
        fds[i] = tsrvi_fd_own(fds[i]);
        rc = rc < 0 ? rc : fds[i] < 0 ? tsrvi_error() : tsrvi_set_flags(fds[i]);
    }
    if (rc < 0) {
        tsrvi_close_fd(fds[0]);
        tsrvi_close_fd(fds[1]);
        fds[0] = -1;
        fds[1] = -1;
    }
    return rc;
}

/* A non-blocking, close-on-exec pipe; when it fails both are -1. */
static int tsrvi_pipe(int *fds)
{
    return tsrvi_fds_own(fds, TSRV_SYS(pipe, (fds)));
}

/* ---- writes without signals ------------------------------------------------*/

/* write(2) and sendfile(2) have no MSG_NOSIGNAL: they raise SIGPIPE when nobody reads, and SIGXFSZ
 * at the limit of a file's size. */
typedef struct tsrvi_quiet {
    sigset_t signals; /* these two; in the end, those that may be taken away */
    sigset_t before;  /* the thread's mask */
} tsrvi_quiet;

/* Block them in this thread. Only where the program has one blocked itself may it be pending
 * already, and then it is the program's. */
static void tsrvi_quiet_begin(tsrvi_quiet *quiet)
{
    static const int signals[] = {SIGPIPE, SIGXFSZ};
    sigset_t pending, blocked;
    TSRV_SYS(sigemptyset, (&quiet->signals));
    TSRV_SYS(sigaddset, (&quiet->signals, SIGPIPE));
    TSRV_SYS(sigaddset, (&quiet->signals, SIGXFSZ));
    blocked = quiet->signals;
    TSRV_SYS(sigaddset, (&blocked, SIGTTOU)); /* termios(3), TOSTOP: then it is not even raised */
    TSRV_SYS(sigemptyset, (&quiet->before));
    TSRV_SYS(sigprocmask, (SIG_BLOCK, &blocked, &quiet->before));
    for (int i = 0; i < 2; i++) {
        if (TSRV_SYS(sigismember, (&quiet->before, signals[i])) == 1) {
            TSRV_SYS(sigemptyset, (&pending));
            TSRV_SYS(sigpending, (&pending));
            if (TSRV_SYS(sigismember, (&pending, signals[i])) == 1) {
                TSRV_SYS(sigdelset, (&quiet->signals, signals[i]));
            }
        }
    }
}

static void tsrvi_quiet_take(const sigset_t *signals)
{
#if TSRVI_HAS_SIGTIMEDWAIT
    struct timespec now = {0, 0};
    TSRV_SYS(sigtimedwait, (signals, NULL, &now));
#else
    sigset_t pending;
    int signo;
    TSRV_SYS(sigemptyset, (&pending));
    TSRV_SYS(sigpending, (&pending));
    if ((TSRV_SYS(sigismember, (&pending, SIGPIPE)) == 1 &&
         TSRV_SYS(sigismember, (signals, SIGPIPE)) == 1) ||
        (TSRV_SYS(sigismember, (&pending, SIGXFSZ)) == 1 &&
         TSRV_SYS(sigismember, (signals, SIGXFSZ)) == 1)) {
        TSRV_SYS(sigwait, (signals, &signo));
    }
#endif
}

/* The call has returned `done` for `size` bytes: take away what it has raised, which it may have
 * done behind a first part that went well. */
static void tsrvi_quiet_end(const tsrvi_quiet *quiet, ssize_t done, size_t size)
{
    int saved = errno;
    if (done < 0 ? saved == EPIPE || saved == EFBIG : (size_t)done < size) {
        tsrvi_quiet_take(&quiet->signals);
    }
    TSRV_SYS(sigprocmask, (SIG_SETMASK, &quiet->before, NULL));
    errno = saved;
}

/* write(2), for what is no socket. */
static ssize_t tsrvi_write_quiet(int fd, const void *data, size_t size)
{
    tsrvi_quiet quiet;
    ssize_t written;
    tsrvi_quiet_begin(&quiet);
    do {
        written = TSRV_SYS(write, (fd, data, size));
    } while (written < 0 && errno == EINTR);
    tsrvi_quiet_end(&quiet, written, size);
    return written;
}

/* Who was forked by a worker, and not by its parent, is none: with a loop of its own it would take
 * what the parent says, and be counted, in that one's place. Their descriptors stay open: it may
 * have closed them, and others have their numbers by now. */
static void tsrvi_worker_forget(void)
{
    tsrvi_process.number = 0;
    tsrvi_process.parent = 0;
    tsrvi_process.place_own = NULL;
    tsrvi_process.hooks = NULL;
    tsrvi_process.worker.pid = 0;
}

/* ============================================================================
 * >>log  The log: its default, its limits, what is done without
 * ==========================================================================*/

static const char *const tsrvi_log_kinds[TSRVI_LOG_KINDS] = {"handle_stream", "refused",
                                                             "TLS",           "PROXY",
                                                             "slow turns",    "max_total_buffer",
                                                             "NOTIFY_SOCKET", "waitpid"};

#define TSRVI_LOG_RATE 10u        /* lines of a kind in a window */
#define TSRVI_LOG_WINDOW 1000u    /* in milliseconds; twice as long after each that was exceeded */
#define TSRVI_LOG_LONGEST 64000u  /* a flood of an hour costs some 600 lines, and not 36,000 */
#define TSRVI_LOG_LINE 512        /* bytes: _POSIX_PIPE_BUF, so that a pipe takes it whole */
#define TSRVI_LOG_TEXT (512 - 64) /* without the time and its like */

TSRV_API void tsrv_set_log(tsrv_log_function function, void *context)
{
    tsrvi_process.log.function = function;
    tsrvi_process.log.context = context;
}

TSRV_API void tsrv_set_log_level(int level)
{
    __atomic_store_n(&tsrvi_process.log.level, level - TSRV_LOG_INFO, __ATOMIC_RELAXED);
}

#ifndef TSRV_LOG
#define TSRV_LOG(level, message) tsrvi_log_write(level, message)

/* Is descriptor 2 the stream that systemd has connected to its journal? See systemd.exec(5). Once
 * it was, it is still: the program may clean its environment. */
static bool tsrvi_log_is_journal(const struct stat *info)
{
    uint32_t inode = (uint32_t)info->st_ino;
    const char *journal;
    char own[64];
    if (inode != 0 && __atomic_load_n(&tsrvi_process.log.journal, __ATOMIC_RELAXED) == inode) {
        return true;
    }
    journal = TSRV_SYS(getenv, ("JOURNAL_STREAM"));
    snprintf(own, sizeof(own), "%llu:%llu", (unsigned long long)info->st_dev,
             (unsigned long long)info->st_ino);
    if (journal == NULL || strcmp(journal, own) != 0) {
        return false;
    }
    __atomic_store_n(&tsrvi_process.log.journal, inode, __ATOMIC_RELAXED);
    return true;
}

/* Look at it while the environment is as it was given. */
static void tsrvi_log_look(void)
{
    struct stat info;
    if (TSRV_SYS(fstat, (2, &info)) == 0 && S_ISSOCK(info.st_mode)) {
        tsrvi_log_is_journal(&info);
    }
}

/* Open descriptor 2 anew: O_NONBLOCK on itself would reach all who share it. The terminal may be
 * another user's, but its processes may always open it by this name. -1 = it cannot be done. */
static int tsrvi_log_open(mode_t mode)
{
    const int flags = O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
    int fd = TSRV_SYS(open, ("/proc/self/fd/2", flags));
    if (fd < 0 && S_ISCHR(mode) && TSRV_SYS(tcgetpgrp, (2)) >= 0) {
        fd = TSRV_SYS(open, ("/dev/tty", flags));
    }
    return tsrvi_fd_own(fd);
}

/* The pipe may be another user's than the one that this process is about to become. */
static void tsrvi_log_keep(void)
{
    struct stat info;
    if (tsrvi_process.log.kept == 0 && TSRV_SYS(fstat, (2, &info)) == 0 && S_ISFIFO(info.st_mode)) {
        int fd = tsrvi_log_open(info.st_mode);
        tsrvi_process.log.kept = fd < 0 ? 0 : fd;
    }
}

/* What was kept, if that is still descriptor 2: the program may have closed it, or changed either.
 */
static int tsrvi_log_kept(const struct stat *info)
{
    struct stat kept;
    int fd = tsrvi_process.log.kept;
    return fd != 0 && TSRV_SYS(fstat, (fd, &kept)) == 0 && kept.st_dev == info->st_dev &&
                   kept.st_ino == info->st_ino
               ? fd
               : -1;
}

/* Write a line as a whole to stderr, whatever that is; false: it is lost. A socket is none of ours:
 * where stderr was closed it may be a client's, and under inetd it is. */
static bool tsrvi_log_put(const char *line, size_t size)
{
    struct pollfd entry;
    struct stat info;
    ssize_t written;
    int opened = -1, fd;
    if (TSRV_SYS(fstat, (2, &info)) < 0) {
        return false;
    }
    if (S_ISSOCK(info.st_mode)) {
        return tsrvi_log_is_journal(&info) &&
               TSRV_SYS(send, (2, line, size, TSRVI_SEND_FLAGS)) == (ssize_t)size;
    }
    /* Linux opens a pipe anew, and then no other process can fill it between a look and the write;
     * a terminal that is looked at takes a part, and waits. */
    if (S_ISFIFO(info.st_mode) || S_ISCHR(info.st_mode)) {
        opened = tsrvi_log_open(info.st_mode);
    }
    fd = opened >= 0 ? opened : tsrvi_log_kept(&info);
    entry.fd = 2;
    entry.events = POLLOUT;
    entry.revents = 0;
    if (fd < 0 && TSRV_SYS(poll, (&entry, 1, 0)) <= 0) {
        return false; /* a full pipe, or a terminal that was stopped */
    }
    written = tsrvi_write_quiet(fd < 0 ? 2 : fd, line, size);
    tsrvi_close_fd(opened);
    if (written > 0) {
        __atomic_store_n(&tsrvi_process.log.torn, written < (ssize_t)size ? 1u : 0u,
                         __ATOMIC_RELAXED);
    }
    return written == (ssize_t)size;
}

/* The date of a day since 1970: gmtime_r may take a lock, which in a fork's child nobody might
 * release. Years begin in March here, so that the leap day is the last one. */
static void tsrvi_log_date(uint64_t day, unsigned *year, unsigned *month, unsigned *of_month)
{
    uint64_t days = day + 719468;                /* since March 1st, 0 */
    unsigned of_era = (unsigned)(days % 146097); /* of 400 years */
    unsigned of_year, march;
    *year = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146096) / 365;
    of_year = of_era - (365 * *year + *year / 4 - *year / 100);
    march = (5 * of_year + 2) / 153;
    *of_month = of_year - (153 * march + 2) / 5 + 1;
    *month = march < 10 ? march + 3 : march - 9;
    *year += (unsigned)(days / 146097) * 400 + (*month <= 2);
}

/* One line: the time in UTC, the process, the level, the text. A full disk may have taken a part of
 * the line before it, which it ends then. */
static bool tsrvi_log_print(int level, const char *message)
{
    static const char *const levels[] = {"ERROR", "WARNING", "INFO"};
    char line[TSRVI_LOG_LINE];
    bool torn = __atomic_load_n(&tsrvi_process.log.torn, __ATOMIC_RELAXED) != 0;
    unsigned year, month, day, second;
    struct timespec now;
    int size;
    now.tv_sec = 0;
    now.tv_nsec = 0;
    TSRV_SYS(clock_gettime, (CLOCK_REALTIME, &now));
    tsrvi_log_date((uint64_t)now.tv_sec / 86400, &year, &month, &day);
    second = (unsigned)((uint64_t)now.tv_sec % 86400);
    size = snprintf(line, sizeof(line), "%s%04u-%02u-%02uT%02u:%02u:%02u.%03uZ %ld %s %s\n",
                    torn ? "\n" : "", year, month, day, second / 3600, second / 60 % 60,
                    second % 60, (unsigned)(now.tv_nsec / 1000000), (long)TSRV_SYS(getpid, ()),
                    levels[level - TSRV_LOG_ERROR], message);
    return tsrvi_log_put(line, (size_t)size);
}

static void tsrvi_log_write(int level, const char *message)
{
    uint32_t lost;
    if (tsrvi_process.log.function != NULL) {
        tsrvi_process.log.function(level, message, tsrvi_process.log.context);
        return;
    }
    tsrvi_log_look();
    if (level - TSRV_LOG_INFO > __atomic_load_n(&tsrvi_process.log.level, __ATOMIC_RELAXED)) {
        return;
    }
    lost = __atomic_exchange_n(&tsrvi_process.log.lost, 0, __ATOMIC_RELAXED);
    if (lost != 0) {
        char text[64];
        snprintf(text, sizeof(text), "%lu log lines were lost", (unsigned long)lost);
        if (tsrvi_log_print(TSRV_LOG_WARNING, text)) {
            lost = 0;
        }
    }
    if (lost != 0 || !tsrvi_log_print(level, message)) {
        __atomic_fetch_add(&tsrvi_process.log.lost, lost + 1, __ATOMIC_RELAXED);
    }
}
#else
static void tsrvi_log_keep(void)
{
}
#endif

/* ---- log lines -------------------------------------------------------------*/

/* Bytes of the UTF-8 character that text begins with (RFC 3629); 0 = none, or a control character,
 * which could forge lines or drive a terminal: those of ASCII, and C1. */
static size_t tsrvi_log_character(const char *text)
{
    const unsigned char *c = (const unsigned char *)text;
    size_t size = c[0] < 0xe0 ? 2 : c[0] < 0xf0 ? 3 : 4;
    if (c[0] < 0x80) {
        return c[0] >= 0x20 && c[0] != 0x7f ? 1 : 0;
    }
    if (c[0] < 0xc2 || c[0] > 0xf4 || (c[0] == 0xc2 && c[1] < 0xa0) ||
        (c[0] == 0xe0 && c[1] < 0xa0) || (c[0] == 0xed && c[1] > 0x9f) ||
        (c[0] == 0xf0 && c[1] < 0x90) || (c[0] == 0xf4 && c[1] > 0x8f)) {
        return 0;
    }
    for (size_t i = 1; i < size; i++) {
        if ((c[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    return size;
}

/* Copy a text, with "\x1b" for what must not be shown as it is. A text that is too long ends in
 * "...", and not within a character. */
static void tsrvi_log_escape(const char *text, char *into, size_t room)
{
    size_t used = 0;
    while (*text != 0) {
        size_t size = tsrvi_log_character(text), width = size == 0 ? 4 : size;
        if (used + width + 4 > room) {
            memcpy(into + used, "...", 3);
            used += 3;
            break;
        }
        if (size == 0) {
            snprintf(into + used, room - used, "\\x%02x", (unsigned)(unsigned char)*text);
            size = 1;
        } else {
            memcpy(into + used, text, size);
        }
        text += size;
        used += width;
    }
    into[used] = 0;
}

static uint32_t tsrvi_log_now_ms(void)
{
    return (uint32_t)(tsrvi_clock() / TSRVI_MS);
}

static bool tsrvi_log_window_over(int kind, uint32_t since, uint32_t now)
{
    return now - since >= __atomic_load_n(&tsrvi_process.log.kinds[kind].length, __ATOMIC_RELAXED);
}

/* A new window begins for a kind: say how many lines of the last one were suppressed. Of several
 * threads one does so. */
static void tsrvi_log_turn(int kind, uint32_t since, uint32_t now)
{
    uint32_t began = since, count, length;
    char text[64];
    if (!__atomic_compare_exchange_n(&tsrvi_process.log.kinds[kind].since, &since, now, false,
                                     __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        return;
    }
    count = __atomic_exchange_n(&tsrvi_process.log.kinds[kind].count, 0, __ATOMIC_RELAXED);
    length = 2 * __atomic_load_n(&tsrvi_process.log.kinds[kind].length, __ATOMIC_RELAXED);
    length = length > TSRVI_LOG_LONGEST ? TSRVI_LOG_LONGEST : length;
    if (count <= TSRVI_LOG_RATE || length < TSRVI_LOG_WINDOW || now - began > 2 * length) {
        length = TSRVI_LOG_WINDOW; /* the flood, if there was one, is over */
    }
    __atomic_store_n(&tsrvi_process.log.kinds[kind].length, length, __ATOMIC_RELAXED);
    if (count > TSRVI_LOG_RATE) {
        snprintf(text, sizeof(text), "%s: and %lu more", tsrvi_log_kinds[kind],
                 (unsigned long)(count - TSRVI_LOG_RATE));
        TSRV_LOG(__atomic_load_n(&tsrvi_process.log.kinds[kind].level, __ATOMIC_RELAXED), text);
    }
}

/* Were lines suppressed that nobody was told of? Loops look at it, and wake up for it. */
static bool tsrvi_log_owes(void)
{
    return __atomic_load_n(&tsrvi_process.log.owed, __ATOMIC_RELAXED) != 0;
}

/* Tell of suppressed lines whose window is over; `all`: of the others too. */
static void tsrvi_log_settle(bool all)
{
    uint32_t now;
    if (!tsrvi_log_owes()) {
        return;
    }
    now = tsrvi_log_now_ms();
    __atomic_store_n(&tsrvi_process.log.owed, 0, __ATOMIC_RELAXED);
    for (int i = 0; i < TSRVI_LOG_KINDS; i++) {
        uint32_t since = __atomic_load_n(&tsrvi_process.log.kinds[i].since, __ATOMIC_RELAXED);
        if (__atomic_load_n(&tsrvi_process.log.kinds[i].count, __ATOMIC_RELAXED) <=
            TSRVI_LOG_RATE) {
            continue;
        }
        if (all || tsrvi_log_window_over(i, since, now)) {
            tsrvi_log_turn(i, since, now);
        } else {
            __atomic_store_n(&tsrvi_process.log.owed, 1, __ATOMIC_RELAXED);
        }
    }
}

/* Before each line: what is owed. The counts that a fork has copied are the parent's to tell of. */
static void tsrvi_log_enter(void)
{
    pid_t pid = TSRV_SYS(getpid, ());
    if (__atomic_exchange_n(&tsrvi_process.log.pid, pid, __ATOMIC_RELAXED) != pid) {
        __atomic_store_n(&tsrvi_process.log.lost, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&tsrvi_process.log.torn, 0, __ATOMIC_RELAXED);
        for (int i = 0; i < TSRVI_LOG_KINDS; i++) {
            __atomic_store_n(&tsrvi_process.log.kinds[i].count, 0, __ATOMIC_RELAXED);
        }
    }
    tsrvi_log_settle(false);
}

static void tsrvi_log_format(int level, const char *format, va_list arguments)
{
    char text[TSRVI_LOG_TEXT + 8], message[TSRVI_LOG_TEXT]; /* what is cut here is cut below too */
    if (vsnprintf(text, sizeof(text), format, arguments) < 0) {
        text[0] = 0;
    }
    tsrvi_log_escape(text, message, sizeof(message));
    TSRV_LOG(level, message);
}

/* Log one line. */
static TSRVI_PRINTF(2, 3) void tsrvi_log(int level, const char *format, ...)
{
    int saved = errno;
    va_list arguments;
    tsrvi_log_enter();
    va_start(arguments, format);
    tsrvi_log_format(level, format, arguments);
    va_end(arguments);
    errno = saved;
}

/* Log one line of a kind that a peer can cause, unless there are too many of them. */
static TSRVI_PRINTF(3, 4) void tsrvi_log_limited(int kind, int level, const char *format, ...)
{
    int saved = errno;
    uint32_t now = tsrvi_log_now_ms(), since;
    va_list arguments;
    tsrvi_log_enter();
    since = __atomic_load_n(&tsrvi_process.log.kinds[kind].since, __ATOMIC_RELAXED);
    if (tsrvi_log_window_over(kind, since, now)) {
        tsrvi_log_turn(kind, since, now);
    }
    __atomic_store_n(&tsrvi_process.log.kinds[kind].level, level, __ATOMIC_RELAXED);
    if (__atomic_fetch_add(&tsrvi_process.log.kinds[kind].count, 1, __ATOMIC_RELAXED) <
        TSRVI_LOG_RATE) {
        va_start(arguments, format);
        tsrvi_log_format(level, format, arguments);
        va_end(arguments);
    } else {
        __atomic_store_n(&tsrvi_process.log.owed, 1, __ATOMIC_RELAXED);
    }
    errno = saved;
}

/* ---- what is done without --------------------------------------------------*/

/* Does this code mean that the system does not have a call, or does not allow it: an old kernel, a
 * filter of system calls, a security module? */
static bool tsrvi_is_refusal(int code)
{
    return code == -ENOSYS || code == -EPERM || code == -EACCES || code == -EINVAL ||
           code == -EOPNOTSUPP;
}

/* What was refused, and is done without; a worker inherits what its parent has learnt. */
enum {
    TSRVI_WITHOUT_BACKEND = 1,
    TSRVI_WITHOUT_EVENTFD = 2,
    TSRVI_WITHOUT_EXCLUSIVE = 4,
    TSRVI_WITHOUT_FLAGS = 8,
    TSRVI_WITHOUT_ACCEPT4 = 16,
    TSRVI_WITHOUT_OPTION = 32,
    TSRVI_WITHOUT_FAMILY = 64,
    TSRVI_WITHOUT_SENDFILE = 128
};
static bool tsrvi_does_without(unsigned what)
{
    return (__atomic_load_n(&tsrvi_process.without, __ATOMIC_RELAXED) & what) != 0;
}

/* There is another way: take it, and say so once. */
static void tsrvi_do_without(unsigned what, const char *name, int code)
{
    if ((__atomic_fetch_or(&tsrvi_process.without, what, __ATOMIC_ACQ_REL) & what) == 0) {
        tsrvi_log(TSRV_LOG_INFO, "%s is refused here (%s): doing without it", name,
                  tsrv_strerror(code));
    }
}

#ifdef TSRV_DEBUG
#define TSRVI_MISTAKES 64 /* different ones of a program that are told, each once */

/* Threads may tell the same twice. */
static bool tsrvi_mistake_is_new(const char *function, const char *mistake)
{
    static const char *told[TSRVI_MISTAKES][2];
    int i = 0;
    while (i < TSRVI_MISTAKES && told[i][0] != NULL &&
           (told[i][0] != function || told[i][1] != mistake)) {
        i++;
    }
    if (i == TSRVI_MISTAKES || told[i][0] != NULL) {
        return false;
    }
    told[i][0] = function;
    told[i][1] = mistake;
    return true;
}
#endif

/* Say why it is TSRV_EINVAL, which is returned. */
static int tsrvi_mistake(const char *function, const char *mistake)
{
#ifdef TSRV_DEBUG
    if (tsrvi_mistake_is_new(function, mistake)) {
        tsrvi_log(TSRV_LOG_WARNING, "TSRV_DEBUG: %s: %s", function, mistake);
    }
#else
    (void)function;
    (void)mistake;
#endif
    return TSRV_EINVAL;
}

/* Is an argument wrong? Told is the condition as it is written. */
#define TSRVI_WRONG(condition) \
    ((condition) ? tsrvi_mistake(__func__, #condition " is TSRV_EINVAL") < 0 : false)

/* A function that waits by itself was called outside of a coroutine, or there are none. */
static int tsrvi_mistake_no_coroutine(const char *function)
{
    return TSRVI_HAS_COROUTINES
               ? tsrvi_mistake(function, "only a coroutine can wait here; tsrv_spawn makes one")
               : (int)TSRV_ENOTSUP;
}

/* ============================================================================
 * >>buffer  Bytes that have come, and bytes to send
 *
 * Input and output use one kind of buffer: a header, and capacity bytes of which
 * begin..end are unread, or unsent. TSRVI_NEAR bytes more are allocated, so that a
 * slice can always be terminated, and a search may look at as many at once; what
 * the 0 replaces is kept in `replaced` until the slice dies. `scanned` remembers
 * how far a search has come, so that no byte is searched twice.
 *
 * A queue is a list of buffers; the first one knows the last. Small writes fill
 * buffers of one size, which come from the loop's pool; a large one has a buffer
 * of its own. The pool keeps large ones too, for as long as they are used. Two
 * kinds hold no bytes: a part of a file, and what a suspended writer has lent,
 * which stays where it lies. A queue that is empty holds no memory.
 * ==========================================================================*/

#define TSRVI_POOLED ((size_t)16384) /* bytes of a buffer that the pool keeps, header included */
#define TSRVI_POOL_MOST 64           /* of them */
#define TSRVI_LARGE ((size_t)65536)  /* bytes from which on a buffer is kept as a large one, */
#define TSRVI_LARGE_MOST ((size_t)8 * 1024 * 1024) /* and of all that are */

#define TSRVI_NEAR 64 /* bytes behind the capacity, and those that a search looks at first */

#define TSRVI_DEAD 0xDD /* TSRV_DEBUG: what is in a slice that has died */

enum { TSRVI_OWNED, TSRVI_LENT, TSRVI_DROPPED, TSRVI_FILE }; /* tsrvi_buffer.kind */

typedef struct tsrvi_buffer {
    struct tsrvi_buffer *next;
    struct tsrvi_buffer *last; /* of the first in a queue: the last */
    char *data;
    size_t begin;
    size_t end;
    size_t scanned; /* input: bytes from begin that hold no delimiter with this hash; output: bytes
                       that were read from files */
    size_t room;    /* output: bytes that small writes may add without a further look */
    size_t capacity;
    /* Input: hash of the delimiter that was searched; the first of output: tsrvi_output_kept. */
    uint64_t delimiter;
    int64_t offset;   /* TSRVI_FILE: where byte 0 is in the file */
    int file;         /* the same: a descriptor of ours */
    uint8_t kind;     /* TSRVI_DROPPED: was lent, and has been dropped */
    bool copied;      /* TSRVI_FILE: sendfile does not take it, so it is read and sent */
    int16_t replaced; /* what the terminator of a slice, data[begin], has replaced; -1 = none is */
#ifdef TSRV_DEBUG
    size_t taken;     /* where that slice begins */
#endif
} tsrvi_buffer;

/* Empty buffers: of TSRVI_POOLED bytes, and large ones, since what is made anew for every message
 * costs a page fault for each page. */
typedef struct tsrvi_pool {
    tsrvi_buffer *first;
    int count;
    tsrvi_buffer *large;
    size_t large_size; /* bytes of them */
    size_t size;       /* bytes of all buffers that there are, those in use included */
    bool large_used;   /* since it was looked at last */
    bool tight;        /* more are in use than are wanted: see >>settle */
} tsrvi_pool;

#define TSRVI_POOLED_ROOM (TSRVI_POOLED - sizeof(tsrvi_buffer) - TSRVI_NEAR)

static inline TSRVI_INLINE void tsrvi_buffer_reset(tsrvi_buffer *buffer)
{
    buffer->begin = 0;
    buffer->end = 0;
    buffer->scanned = 0;
    buffer->delimiter = 0;
    buffer->room = 0;
    buffer->kind = TSRVI_OWNED;
    buffer->copied = false;
    buffer->replaced = -1;
}

/* A buffer for `capacity` bytes, or NULL. */
static tsrvi_buffer *tsrvi_buffer_new(tsrvi_pool *pool, size_t capacity)
{
    tsrvi_buffer *buffer;
    if (capacity > SIZE_MAX / 2) {
        return NULL;
    }
    buffer = (tsrvi_buffer *)TSRV_MALLOC(sizeof(tsrvi_buffer) + capacity + TSRVI_NEAR);
    if (buffer != NULL) {
        buffer->data = (char *)(buffer + 1);
        buffer->capacity = capacity;
        pool->size += capacity;
        tsrvi_buffer_reset(buffer);
    }
    return buffer;
}

/* NULL: nothing happens. */
static void tsrvi_buffer_free(tsrvi_pool *pool, tsrvi_buffer *buffer)
{
    pool->size -= buffer == NULL ? 0 : buffer->capacity;
    TSRV_FREE(buffer);
}

/* Bytes of the buffers that are not in the pool. */
static size_t tsrvi_pool_in_use(const tsrvi_pool *pool)
{
    return pool->size - pool->large_size - (size_t)pool->count * TSRVI_POOLED_ROOM;
}

/* The first of the pool, which is not empty. */
static inline TSRVI_INLINE tsrvi_buffer *tsrvi_pool_pop(tsrvi_pool *pool)
{
    tsrvi_buffer *buffer = pool->first;
    pool->first = buffer->next;
    pool->count--;
    tsrvi_buffer_reset(buffer);
    return buffer;
}

/* A large one for `size` bytes, the smallest that will do; roomy: the largest. NULL: no memory. */
static TSRVI_APART tsrvi_buffer *tsrvi_pool_take_large(tsrvi_pool *pool, size_t size, bool roomy)
{
    tsrvi_buffer **best = NULL, *buffer;
    for (tsrvi_buffer **link = &pool->large; *link != NULL; link = &(*link)->next) {
        if ((*link)->capacity >= size &&
            (best == NULL || ((*link)->capacity > (*best)->capacity) == roomy)) {
            best = link;
        }
    }
    pool->large_used = true;
    if (best == NULL) {
        return size > SIZE_MAX / 2
                   ? NULL
                   : tsrvi_buffer_new(pool, (size + TSRVI_LARGE - 1) / TSRVI_LARGE * TSRVI_LARGE);
    }
    buffer = *best;
    *best = buffer->next;
    pool->large_size -= buffer->capacity;
    tsrvi_buffer_reset(buffer);
    return buffer;
}

/* One for `size` bytes, from the pool if it has such; NULL: no memory. */
static tsrvi_buffer *tsrvi_pool_take(tsrvi_pool *pool, size_t size)
{
    if (size > TSRVI_POOLED_ROOM) {
        return size < TSRVI_LARGE ? tsrvi_buffer_new(pool, size)
                                  : tsrvi_pool_take_large(pool, size, false);
    }
    return pool->first == NULL ? tsrvi_buffer_new(pool, TSRVI_POOLED_ROOM) : tsrvi_pool_pop(pool);
}

/* Keep a large one, if there is room for it. */
static TSRVI_APART void tsrvi_pool_give_large(tsrvi_pool *pool, tsrvi_buffer *buffer)
{
    if (buffer->capacity < TSRVI_LARGE || buffer->capacity > TSRVI_LARGE_MOST - pool->large_size) {
        tsrvi_buffer_free(pool, buffer);
        return;
    }
    buffer->next = pool->large;
    pool->large = buffer;
    pool->large_size += buffer->capacity;
    pool->large_used = true;
}

/* Keep one of TSRVI_POOLED bytes. false: it is not, or there are enough. */
static inline TSRVI_INLINE bool tsrvi_pool_keep(tsrvi_pool *pool, tsrvi_buffer *buffer)
{
    if (TSRVI_UNLIKELY(buffer->capacity != TSRVI_POOLED_ROOM || pool->count == TSRVI_POOL_MOST)) {
        return false;
    }
    buffer->next = pool->first;
    pool->first = buffer;
    pool->count++;
    return true;
}

static void tsrvi_pool_give(tsrvi_pool *pool, tsrvi_buffer *buffer)
{
    if (!tsrvi_pool_keep(pool, buffer)) {
        tsrvi_pool_give_large(pool, buffer);
    }
}

/* Free the large ones. */
static void tsrvi_pool_trim(tsrvi_pool *pool)
{
    while (pool->large != NULL) {
        tsrvi_buffer *buffer = pool->large;
        pool->large = buffer->next;
        tsrvi_buffer_free(pool, buffer);
    }
    pool->large_size = 0;
}

static void tsrvi_pool_free(tsrvi_pool *pool)
{
    tsrvi_pool_trim(pool);
    while (pool->first != NULL) {
        tsrvi_buffer *buffer = pool->first;
        pool->first = buffer->next;
        tsrvi_buffer_free(pool, buffer);
    }
    pool->count = 0;
}

/* Bytes that are unread, or unsent. */
static inline TSRVI_INLINE size_t tsrvi_buffer_size(const tsrvi_buffer *buffer)
{
    return buffer == NULL ? 0 : buffer->end - buffer->begin;
}

/* ---- queues ----------------------------------------------------------------*/

static inline TSRVI_INLINE void tsrvi_queue_append(tsrvi_buffer **first, tsrvi_buffer *buffer)
{
    buffer->next = NULL;
    if (*first == NULL) {
        *first = buffer;
    } else {
        (*first)->last->next = buffer;
    }
    (*first)->last = buffer;
}

/* Take the first buffer off. */
static inline TSRVI_INLINE tsrvi_buffer *tsrvi_queue_pop(tsrvi_buffer **first)
{
    tsrvi_buffer *buffer = *first;
    *first = buffer->next;
    if (*first != NULL) {
        (*first)->last = buffer->last;
    }
    return buffer;
}

/* Copy data to the end of a queue: all of it, or nothing and -ENOMEM. */
static int tsrvi_queue_copy(tsrvi_buffer **first, tsrvi_pool *pool, const char *data, size_t size)
{
    tsrvi_buffer *last = *first == NULL ? NULL : (*first)->last;
    size_t head =
        last == NULL || last->kind != TSRVI_OWNED ? 0 : tsrvi_min(size, last->capacity - last->end);
    if (size > head) {
        tsrvi_buffer *more = tsrvi_pool_take(pool, size - head);
        if (more == NULL) {
            return -ENOMEM;
        }
        memcpy(more->data, data + head, size - head);
        more->end = size - head;
        tsrvi_queue_append(first, more);
    }
    if (head != 0) {
        memcpy(last->data + last->end, data, head);
        last->end += head;
        last->room -= tsrvi_min(last->room, head);
    }
    return TSRV_OK;
}

/* ---- input -----------------------------------------------------------------*/

/* Hand out the first `size` unread bytes, at data, terminated. They count as read. */
static inline TSRVI_INLINE void tsrvi_buffer_hand_out(tsrvi_buffer *buffer, char *data, size_t size,
                                                      tsrv_slice *slice)
{
    slice->data = data;
    slice->size = size;
#ifdef TSRV_DEBUG
    buffer->taken = buffer->begin;
#endif
    buffer->begin += size;
    buffer->replaced = (unsigned char)data[size];
    data[size] = 0;
}

static inline TSRVI_INLINE void tsrvi_buffer_take(tsrvi_buffer *buffer, size_t size,
                                                  tsrv_slice *slice)
{
    buffer->scanned = 0;
    tsrvi_buffer_hand_out(buffer, buffer->data + buffer->begin, size, slice);
}

/* Drop the first `size` unread bytes. */
static void tsrvi_buffer_drop(tsrvi_buffer *buffer, size_t size)
{
    buffer->begin += size;
    buffer->scanned = 0;
}

/* Is a slice of it in the program's hands? */
static inline TSRVI_INLINE bool tsrvi_buffer_is_held(const tsrvi_buffer *buffer)
{
    return buffer->replaced >= 0;
}

/* That slice dies. */
static inline TSRVI_INLINE void tsrvi_buffer_bury(tsrvi_buffer *buffer)
{
#ifdef TSRV_DEBUG
    if (tsrvi_buffer_is_held(buffer)) {
        memset(buffer->data + buffer->taken, TSRVI_DEAD, buffer->begin - buffer->taken);
    }
#else
    (void)buffer;
#endif
}

/* The same, and what its terminator has replaced is put back. */
static inline TSRVI_INLINE void tsrvi_buffer_restore(tsrvi_buffer *buffer)
{
    if (tsrvi_buffer_is_held(buffer)) {
        tsrvi_buffer_bury(buffer);
        buffer->data[buffer->begin] = (char)buffer->replaced;
    }
}

static inline TSRVI_INLINE void tsrvi_buffer_release(tsrvi_buffer *buffer)
{
    tsrvi_buffer_restore(buffer);
    buffer->replaced = -1;
}

/* The unread bytes in a buffer of another capacity, or NULL; the old one stays as it is.
 *   roomy  more of them will come: see tsrvi_pool_take_large */
static tsrvi_buffer *tsrvi_buffer_copy(const tsrvi_buffer *buffer, tsrvi_pool *pool,
                                       size_t capacity, bool roomy)
{
    tsrvi_buffer *copy = capacity < TSRVI_LARGE ? tsrvi_buffer_new(pool, capacity)
                                                : tsrvi_pool_take_large(pool, capacity, roomy);
    size_t size = tsrvi_buffer_size(buffer);
    TSRV_ASSERT(!tsrvi_buffer_is_held(buffer) && capacity >= size);
    if (copy != NULL) {
        copy->end = size;
        copy->scanned = buffer->scanned;
        copy->delimiter = buffer->delimiter;
        memcpy(copy->data, buffer->data + buffer->begin, size);
    }
    return copy;
}

/* FNV-1a: tells delimiters apart, so that a search with another one starts anew. */
static uint64_t tsrvi_hash(const char *data, size_t size)
{
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < size; i++) {
        hash = (hash ^ (unsigned char)data[i]) * 1099511628211u;
    }
    return hash;
}

#if TSRVI_HAS_SSE2
/* A bit for each of 16 bytes: is it the wanted one? */
static inline TSRVI_INLINE uint64_t tsrvi_equal(const char *data, __m128i wanted)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)data);
    return (uint64_t)(unsigned)_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, wanted));
}
#endif

/* Offset just behind the first such byte among the first TSRVI_NEAR of data, which lies in a
 * buffer; 0: there is none, or nothing that looks for it. Most lines are short, and memchr costs
 * them as much as all else that a read does; this has no call, and no branch for their length. */
static inline TSRVI_INLINE size_t tsrvi_find_near(const char *data, size_t size, char byte)
{
#if TSRVI_HAS_SSE2
    const __m128i wanted = _mm_set1_epi8(byte);
    uint64_t found = tsrvi_equal(data, wanted) | tsrvi_equal(data + 16, wanted) << 16 |
                     tsrvi_equal(data + 32, wanted) << 32 | tsrvi_equal(data + 48, wanted) << 48;
    if (size < TSRVI_NEAR) {
        found &= ((uint64_t)1 << size) - 1; /* what lies behind them does not count */
    }
    return found == 0 ? 0 : (unsigned)__builtin_ctzll(found) + 1;
#else
    (void)data, (void)size, (void)byte;
    return 0;
#endif
}

/* The same among all of them. */
static inline TSRVI_INLINE size_t tsrvi_find_byte(const char *data, size_t size, char byte)
{
    size_t end = tsrvi_find_near(data, size, byte);
    const char *last;
    if (TSRVI_LIKELY(end != 0)) {
        return end;
    }
    last = (const char *)memchr(data, byte, size);
    return last == NULL ? 0 : (size_t)(last - data) + 1;
}

/* Offset just behind the first delimiter in data, or 0. memchr runs over the delimiter's last byte:
 * it is the rarer one in practice ("\r\n"), and the end offset is what the caller wants. */
static size_t tsrvi_search(const char *data, size_t size, const char *delimiter,
                           size_t delimiter_size)
{
    size_t offset = delimiter_size - 1;
    while (offset < size) {
        const char *last =
            (const char *)memchr(data + offset, delimiter[delimiter_size - 1], size - offset);
        if (last == NULL) {
            return 0;
        }
        offset = (size_t)(last - data) + 1;
        if (memcmp(data + offset - delimiter_size, delimiter, delimiter_size - 1) == 0) {
            return offset;
        }
    }
    return 0;
}

/* Offset behind the first delimiter among the unread bytes, or 0; only bytes that came since the
 * last search for the same delimiter are looked at. */
static inline TSRVI_INLINE size_t tsrvi_buffer_find(tsrvi_buffer *buffer, const char *delimiter,
                                                    size_t delimiter_size)
{
    const char *data = buffer->data + buffer->begin;
    size_t size = tsrvi_buffer_size(buffer), start = 0, found;
    if (TSRVI_UNLIKELY(buffer->scanned != 0) &&
        buffer->delimiter == tsrvi_hash(delimiter, delimiter_size)) {
        start = buffer->scanned;
    }
    if (TSRVI_LIKELY(delimiter_size == 1)) {
        found = tsrvi_find_byte(data + start, size - start, delimiter[0]);
    } else {
        found = tsrvi_search(data + start, size - start, delimiter, delimiter_size);
    }
    if (TSRVI_LIKELY(found != 0)) {
        return start + found;
    }
    if (size >= delimiter_size) {
        buffer->scanned = size - (delimiter_size - 1);
        buffer->delimiter = tsrvi_hash(delimiter, delimiter_size);
    }
    return 0;
}

/* ============================================================================
 * >>heap  Timers, the earliest first
 *
 * A binary heap of pointers; each timer knows its place, so it can be moved and
 * removed. Equal times fire in the order in which they were armed. Whoever may
 * arm a timer later reserves its place first, so arming cannot fail.
 * ==========================================================================*/

typedef struct tsrvi_heap {
    tsrvi_timer **items;
    uint32_t count;
    uint32_t capacity;
    uint32_t reserved; /* places promised, armed ones included */
    uint32_t sequence;
} tsrvi_heap;

static int tsrvi_heap_reserve(tsrvi_heap *heap, uint32_t count)
{
    if (heap->capacity - heap->reserved < count) {
        uint32_t capacity = heap->capacity < 16 ? 16 : heap->capacity * 2;
        tsrvi_timer **items = (tsrvi_timer **)TSRV_REALLOC(heap->items, capacity * sizeof(*items));
        if (items == NULL) {
            return -ENOMEM;
        }
        heap->items = items;
        heap->capacity = capacity;
    }
    heap->reserved += count;
    return TSRV_OK;
}

static bool tsrvi_timer_before(const tsrvi_timer *a, const tsrvi_timer *b)
{
    return a->due != b->due ? a->due < b->due : (int32_t)(a->sequence - b->sequence) < 0;
}

static void tsrvi_heap_put(tsrvi_heap *heap, uint32_t position, tsrvi_timer *timer)
{
    heap->items[position - 1] = timer;
    timer->position = position;
}

static void tsrvi_heap_up(tsrvi_heap *heap, tsrvi_timer *timer, uint32_t position)
{
    while (position > 1 && tsrvi_timer_before(timer, heap->items[position / 2 - 1])) {
        tsrvi_heap_put(heap, position, heap->items[position / 2 - 1]);
        position /= 2;
    }
    tsrvi_heap_put(heap, position, timer);
}

static void tsrvi_heap_down(tsrvi_heap *heap, tsrvi_timer *timer, uint32_t position)
{
    for (;;) {
        uint32_t child = position * 2;
        if (child > heap->count) {
            break;
        }
        if (child < heap->count && tsrvi_timer_before(heap->items[child], heap->items[child - 1])) {
            child++;
        }
        if (!tsrvi_timer_before(heap->items[child - 1], timer)) {
            break;
        }
        tsrvi_heap_put(heap, position, heap->items[child - 1]);
        position = child;
    }
    tsrvi_heap_put(heap, position, timer);
}

static void tsrvi_heap_remove(tsrvi_heap *heap, tsrvi_timer *timer)
{
    uint32_t position = timer->position;
    tsrvi_timer *last;
    if (position == 0) {
        return;
    }
    last = heap->items[--heap->count];
    timer->position = 0;
    if (last != timer) {
        tsrvi_heap_up(heap, last, position);
        tsrvi_heap_down(heap, last, last->position);
    }
}

/* Arm a timer, or move an armed one. Its place has been reserved. */
static void tsrvi_heap_set(tsrvi_heap *heap, tsrvi_timer *timer, uint64_t due)
{
    tsrvi_heap_remove(heap, timer);
    TSRV_ASSERT(heap->count < heap->reserved);
    timer->due = due;
    timer->sequence = heap->sequence++;
    tsrvi_heap_up(heap, timer, ++heap->count);
}

static uint64_t tsrvi_heap_next(const tsrvi_heap *heap)
{
    return heap->count == 0 ? TSRVI_FOREVER : heap->items[0]->due;
}

/* ============================================================================
 * >>backend  The seam to epoll, kqueue and poll
 *
 * The poller maps descriptors to the objects that wait for them. Each slot has
 * a generation, which changes when its descriptor is given up; the kernel hands
 * it back with every event, so an event of a descriptor that was closed, and
 * perhaps reused, in the same batch is recognised and dropped. A backend is one
 * table of functions; all of a platform's are compiled in.
 *
 * Interest is level-triggered and cached in tsrvi_io: the kernel is told only
 * what has changed. TSRVI_HANGUP alone keeps a descriptor registered just to
 * hear of resets; 0 means not registered.
 * ==========================================================================*/

/* With TSRV_READABLE and TSRV_WRITABLE: */
#define TSRVI_HANGUP 4    /* an error, or both directions are over */
#define TSRVI_EXCLUSIVE 8 /* other processes wait for it too, and one is enough */
#define TSRVI_BATCH 256   /* events of one turn; the rest waits for the next */
#define TSRVI_PAGE 256    /* slots of a page: 4 KiB */

typedef struct tsrvi_slot {
    tsrvi_io *io; /* NULL = nobody waits for this descriptor */
    uint32_t generation;
    uint32_t mark; /* the backend's */
} tsrvi_slot;

typedef struct tsrvi_event {
    int fd;
    uint32_t generation;
    int events;
} tsrvi_event;

typedef struct tsrvi_poller {
    const struct tsrvi_backend *backend;
    pid_t pid; /* of its process: in a fork's child the kernel's part still belongs to the parent */
    int fd;    /* of epoll or kqueue; -1 with poll, and while epoll's cannot be made anew */
    bool embedded;      /* another loop waits for fd, so it must stay what it is */
    bool exclusive;     /* the backend's, if the kernel knows it too */
    void *memory;       /* the backend's arrays */
    uint32_t used;      /* the backend's: poll's entries in use; epoll's last turn with a new set */
    uint32_t size;      /* the backend's: entries allocated */
    uint32_t turn;      /* the backend's: epoll counts waits, poll remembers where to look first */
    tsrvi_slot **pages; /* the slots by descriptor, TSRVI_PAGE of them in each; NULL = none of these
                           used yet */
    int page_count;
    bool full; /* kqueue's: it had no room for more events, of which a descriptor may have two */
    int fired_count;
    tsrvi_event fired[TSRVI_BATCH];
} tsrvi_poller;

typedef struct tsrvi_backend {
    const char *name;
    int id;
    bool exclusive;                    /* it knows TSRVI_EXCLUSIVE */
    int (*open)(tsrvi_poller *poller); /* the poller has no descriptor and no memory */
    /* Change what is waited for, from old_interest to new_interest. quiet: do not tell the kernel,
     * because the descriptor is about to be closed, or because it would tell the parent's. */
    int (*set)(tsrvi_poller *poller, int fd, int old_interest, int new_interest, bool quiet);
    /* Wait, at most timeout_ms (-1 = no limit), and fill `fired`. EINTR is not an error. */
    int (*wait)(tsrvi_poller *poller, int timeout_ms);
    /* Events come for a registration that outlived its descriptor; NULL where this cannot be. */
    void (*leaked)(tsrvi_poller *poller);
} tsrvi_backend;

static int tsrvi_poller_fire(tsrvi_poller *poller, int fd, uint32_t generation, int events)
{
    tsrvi_event *event = &poller->fired[poller->fired_count++];
    event->fd = fd;
    event->generation = generation;
    event->events = events;
    return poller->fired_count == TSRVI_BATCH;
}

/* The slot of a descriptor that has been registered before. */
static tsrvi_slot *tsrvi_poller_slot(const tsrvi_poller *poller, int fd)
{
    return &poller->pages[(unsigned)fd / TSRVI_PAGE][(unsigned)fd % TSRVI_PAGE];
}

/* Give up what the backend has opened. */
static void tsrvi_poller_close(tsrvi_poller *poller)
{
    tsrvi_close_fd(poller->fd);
    TSRV_FREE(poller->memory);
    poller->fd = -1;
    poller->memory = NULL;
}

/* Make sure that a descriptor has a slot. Pages never move, and one large descriptor costs one
 * page; a number that is no descriptor costs none, however large it is. */
static int tsrvi_poller_grow(tsrvi_poller *poller, int fd)
{
    int page = fd / TSRVI_PAGE;
    if (page >= poller->page_count) {
        size_t count = (size_t)page + 1;
        if (TSRV_SYS(fcntl, (fd, F_GETFD)) < 0) {
            return tsrvi_error();
        }
        tsrvi_slot **pages = (tsrvi_slot **)TSRV_REALLOC(poller->pages, count * sizeof(*pages));
        if (pages == NULL) {
            return -ENOMEM;
        }
        memset(pages + poller->page_count, 0,
               (count - (size_t)poller->page_count) * sizeof(*pages));
        poller->pages = pages;
        poller->page_count = page + 1;
    }
    if (poller->pages[page] == NULL) {
        poller->pages[page] = (tsrvi_slot *)tsrvi_zalloc(TSRVI_PAGE * sizeof(tsrvi_slot));
    }
    return poller->pages[page] == NULL ? -ENOMEM : TSRV_OK;
}

/* The object that waits for a descriptor, whatever number that is; NULL = none. */
static tsrvi_io *tsrvi_poller_find(const tsrvi_poller *poller, int fd)
{
    tsrvi_slot *page = fd / TSRVI_PAGE < poller->page_count ? poller->pages[fd / TSRVI_PAGE] : NULL;
    return page == NULL ? NULL : page[fd % TSRVI_PAGE].io;
}

/* Tell the kernel what io waits for from now on; 0 ends it. */
static int tsrvi_poller_set(tsrvi_poller *poller, tsrvi_io *io, int interest)
{
    tsrvi_slot *slot;
    int rc;
    if (io->interest == interest) {
        return TSRV_OK;
    }
    if (io->interest == 0 && (rc = tsrvi_poller_grow(poller, io->fd)) < 0) {
        return rc;
    }
    slot = tsrvi_poller_slot(poller, io->fd);
    if (slot->io != io && slot->io != NULL) {
        return TSRV_EBUSY;
    }
    rc = poller->backend->set(poller, io->fd, io->interest, interest,
                              interest == 0 && poller->pid != TSRV_SYS(getpid, ()));
    if (interest == 0) {
        slot->io = NULL;
        slot->generation++;
    } else if (rc < 0) {
        return rc;
    } else {
        slot->io = io;
    }
    io->interest = (uint8_t)interest;
    return TSRV_OK;
}

/* Forget io because its descriptor is about to be closed: then epoll and kqueue forget it by
 * themselves, but for epoll's leaks, which an embedded set cannot afford. */
static void tsrvi_poller_forget(tsrvi_poller *poller, tsrvi_io *io)
{
    if (io->interest != 0) {
        tsrvi_slot *slot = tsrvi_poller_slot(poller, io->fd);
        bool quiet = !poller->embedded || poller->pid != TSRV_SYS(getpid, ());
        poller->backend->set(poller, io->fd, io->interest, 0, quiet);
        slot->io = NULL;
        slot->generation++;
        io->interest = 0;
    }
}

/* Another loop is about to wait for the set: what should no longer be in it goes now. */
static void tsrvi_poller_clean(tsrvi_poller *poller)
{
    if (poller->backend->leaked != NULL) {
        poller->used = poller->turn + 1;
        poller->backend->leaked(poller);
    }
}

/* Hand an event to whom it belongs. */
static void tsrvi_poller_dispatch(tsrvi_poller *poller, const tsrvi_event *event)
{
    tsrvi_slot *slot = tsrvi_poller_slot(poller, event->fd);
    if (slot->io != NULL && slot->generation == event->generation) {
        slot->io->on_event(slot->io, event->events);
    } else if (poller->backend->leaked != NULL && slot->mark != poller->turn) {
        poller->backend->leaked(poller);
    }
}

#if TSRVI_HAS_EPOLL
/* ============================================================================
 * >>epoll  Linux
 *
 * Level-triggered. A registration belongs to the open file, not to the
 * descriptor: while a forked child or a dup still holds the file, closing our
 * descriptor does not end it, EPOLL_CTL_DEL can no longer name it, and its
 * events would come for ever. A DEL before every close would cost a call per
 * connection; instead such an event is recognised by its old generation, and
 * the epoll set is built anew (as libev does). Only while another loop waits for
 * the set itself, and would lose the new one, every close pays for its DEL.
 * ==========================================================================*/

#define TSRVI_EPOLL_RETRY_MS 50 /* when no new set can be made */

static int tsrvi_epoll_open(tsrvi_poller *poller)
{
    poller->memory = TSRV_MALLOC(TSRVI_BATCH * sizeof(struct epoll_event));
    if (poller->memory == NULL) {
        return -ENOMEM;
    }
    poller->fd = tsrvi_fd_own(TSRV_SYS(epoll_create1, (EPOLL_CLOEXEC)));
    return poller->fd < 0 ? tsrvi_error() : TSRV_OK;
}

static int tsrvi_epoll_set(tsrvi_poller *poller, int fd, int old_interest, int new_interest,
                           bool quiet)
{
    struct epoll_event event;
    tsrvi_slot *slot = tsrvi_poller_slot(poller, fd);
    int operation = new_interest == 0   ? EPOLL_CTL_DEL
                    : old_interest == 0 ? EPOLL_CTL_ADD
                                        : EPOLL_CTL_MOD;
    int rc;
    memset(&event, 0, sizeof(event));
    event.events =
        ((new_interest & TSRV_READABLE) != 0 ? (uint32_t)EPOLLIN : 0u) |
        ((new_interest & TSRV_WRITABLE) != 0 ? (uint32_t)EPOLLOUT : 0u) |
        ((new_interest & TSRVI_EXCLUSIVE) != 0 && poller->exclusive ? TSRVI_EPOLLEXCLUSIVE : 0u);
    event.data.u64 = (uint64_t)slot->generation << 32 | (uint32_t)fd;
    if (new_interest == 0) {
        slot->mark = poller->turn;
    }
    if (quiet || poller->fd < 0) {
        return TSRV_OK; /* without a set, the new one will be told */
    }
    if (TSRV_SYS(epoll_ctl, (poller->fd, operation, fd, &event)) == 0) {
        return TSRV_OK;
    }
    rc = tsrvi_error();
    if (rc != -EINVAL || (event.events & TSRVI_EPOLLEXCLUSIVE) == 0) {
        return rc;
    }
    event.events &= ~TSRVI_EPOLLEXCLUSIVE; /* Linux before 4.5 */
    if (TSRV_SYS(epoll_ctl, (poller->fd, operation, fd, &event)) < 0) {
        return tsrvi_error();
    }
    poller->exclusive = false;
    tsrvi_do_without(TSRVI_WITHOUT_EXCLUSIVE, "EPOLLEXCLUSIVE", rc);
    return TSRV_OK;
}

static int tsrvi_epoll_add_all(tsrvi_poller *poller)
{
    for (int fd = 0; fd < poller->page_count * TSRVI_PAGE; fd++) {
        tsrvi_io *io = tsrvi_poller_find(poller, fd);
        int rc = io == NULL ? TSRV_OK : tsrvi_epoll_set(poller, fd, 0, io->interest, false);
        if (rc == -ENOMEM || rc == -ENOSPC) {
            return rc; /* other errors mean that the program has closed fd under its watch */
        }
    }
    return TSRV_OK;
}

/* Build the set anew, without what should no longer be in it; the old one goes first, so that this
 * works also when no descriptor is free. What fails now is tried again by the next wait. */
static void tsrvi_epoll_renew(tsrvi_poller *poller)
{
    tsrvi_close_fd(poller->fd);
    poller->fd = tsrvi_fd_own(TSRV_SYS(epoll_create1, (EPOLL_CLOEXEC)));
    if (poller->fd >= 0 && tsrvi_epoll_add_all(poller) < 0) {
        tsrvi_close_fd(poller->fd);
        poller->fd = -1;
    }
}

/* The rest of the batch may hold more such events: one new set a turn. */
static void tsrvi_epoll_leaked(tsrvi_poller *poller)
{
    if (poller->used != poller->turn) {
        poller->used = poller->turn;
        tsrvi_epoll_renew(poller);
    }
}

/* More than EPOLLIN: the end, or EPOLLOUT with or without it. */
static TSRVI_APART int tsrvi_epoll_fired(uint32_t got)
{
    return (got & (EPOLLHUP | EPOLLERR)) != 0 ? TSRV_READABLE | TSRV_WRITABLE | TSRVI_HANGUP
           : (got & EPOLLIN) != 0             ? TSRV_READABLE | TSRV_WRITABLE
                                              : TSRV_WRITABLE;
}

static int tsrvi_epoll_wait(tsrvi_poller *poller, int timeout_ms)
{
    struct epoll_event *events = (struct epoll_event *)poller->memory;
    int count;
    if (TSRVI_UNLIKELY(poller->fd < 0)) {
        tsrvi_epoll_renew(poller);
        timeout_ms = 0;
    }
    if (TSRVI_UNLIKELY(poller->fd < 0)) {
        TSRV_SYS(poll, (NULL, 0, TSRVI_EPOLL_RETRY_MS));
        return TSRV_OK;
    }
    count = TSRV_SYS(epoll_wait, (poller->fd, events, TSRVI_BATCH, timeout_ms));
    poller->turn++;
    if (count < 0) {
        return errno == EINTR ? TSRV_OK : tsrvi_error();
    }
    for (int i = 0; i < count; i++) {
        uint32_t got = events[i].events;
        int fired = TSRVI_LIKELY(got == EPOLLIN) ? TSRV_READABLE : tsrvi_epoll_fired(got);
        tsrvi_poller_fire(poller, (int)(uint32_t)events[i].data.u64,
                          (uint32_t)(events[i].data.u64 >> 32), fired);
    }
    return TSRV_OK;
}

static const tsrvi_backend tsrvi_epoll = {
    "epoll",         TSRV_BACKEND_EPOLL, TSRVI_EPOLLEXCLUSIVE != 0, tsrvi_epoll_open,
    tsrvi_epoll_set, tsrvi_epoll_wait,   tsrvi_epoll_leaked,
};
#endif

#if TSRVI_HAS_KQUEUE
/* ============================================================================
 * >>kqueue  macOS and the BSDs
 *
 * Reading and writing are two filters of a descriptor, reported one by one; a
 * slot's mark is where the first is in `fired`, so that they become one event.
 * TSRVI_HANGUP alone is a filter for writing with EV_CLEAR: it reports once that
 * the descriptor is writable, which nobody asked for, and then a reset. EV_EOF
 * of EVFILT_WRITE by itself is no hang-up: our own FIN causes it too, and a reset
 * may follow; a hang-up has the socket's error in fflags. EV_CLEAR keeps it from
 * being reported again and again. The generation travels in udata, as bytes,
 * because that is an integer on NetBSD before 10 and a pointer elsewhere.
 * Closing a descriptor removes its filters.
 * EVFILT_TIMER is not used: the heap and the timeout of kevent do.
 * ==========================================================================*/

static int tsrvi_kqueue_open(tsrvi_poller *poller)
{
    poller->memory = TSRV_MALLOC(TSRVI_BATCH * sizeof(struct kevent));
    if (poller->memory == NULL) {
        return -ENOMEM;
    }
    poller->fd = tsrvi_fd_own(TSRV_SYS(kqueue, ()));
    if (poller->fd < 0) {
        return tsrvi_error();
    }
    return TSRV_SYS(fcntl, (poller->fd, F_SETFD, FD_CLOEXEC)) < 0 ? tsrvi_error() : TSRV_OK;
}

/* How an interest asks for EVFILT_WRITE: the flags to add it with; 0 = not at all. */
static int tsrvi_kqueue_write_flags(int interest)
{
    if ((interest & TSRV_WRITABLE) != 0) {
        return EV_ADD;
    }
    return interest == TSRVI_HANGUP ? EV_ADD | EV_CLEAR : 0;
}

static int tsrvi_kqueue_set(tsrvi_poller *poller, int fd, int old_interest, int new_interest,
                            bool quiet)
{
    uintptr_t generation = tsrvi_poller_slot(poller, fd)->generation;
    int before = tsrvi_kqueue_write_flags(old_interest);
    int after = tsrvi_kqueue_write_flags(new_interest);
    struct kevent changes[3];
    tsrvi_kevent_count count = 0;
    if (quiet) {
        return TSRV_OK;
    }
    /* EV_ADD does not change the flags of a filter that exists. */
    if (before != after && before != 0) {
        EV_SET(&changes[count], (uintptr_t)fd, EVFILT_WRITE, EV_DELETE, 0, 0, 0);
        count++;
    }
    if (((old_interest ^ new_interest) & TSRV_READABLE) != 0) {
        EV_SET(&changes[count], (uintptr_t)fd, EVFILT_READ,
               (new_interest & TSRV_READABLE) != 0 ? EV_ADD : EV_DELETE, 0, 0, 0);
        count++;
    }
    if (before != after && after != 0) {
        EV_SET(&changes[count], (uintptr_t)fd, EVFILT_WRITE, (unsigned short)after, 0, 0, 0);
        count++;
    }
    for (int i = 0; i < 3; i++) {
        memcpy(&changes[i].udata, &generation, sizeof(generation));
    }
    /* After EINTR the changes have been made, says kevent(2). */
    if (count != 0 && TSRV_SYS(kevent, (poller->fd, changes, count, NULL, 0, NULL)) < 0 &&
        errno != EINTR) {
        return tsrvi_error();
    }
    return TSRV_OK;
}

static void tsrvi_kqueue_fire(tsrvi_poller *poller, const struct kevent *event)
{
    int fd = (int)event->ident,
        fired = event->filter == EVFILT_WRITE ? TSRV_WRITABLE : TSRV_READABLE;
    bool ended = (event->flags & EV_EOF) != 0;
    uintptr_t udata;
    uint32_t generation;
    tsrvi_slot *slot = tsrvi_poller_slot(poller, fd);
    memcpy(&udata, &event->udata, sizeof(udata));
    generation = (uint32_t)udata;
    if ((event->flags & EV_ERROR) != 0 || (ended && event->fflags != 0)) {
        fired = TSRV_READABLE | TSRV_WRITABLE | TSRVI_HANGUP;
    } else if (ended && fired == TSRV_WRITABLE) {
        fired |= TSRV_READABLE; /* a peer that has closed a unix socket is seen by who looks */
    } else if (fired == TSRV_WRITABLE && slot->io != NULL && slot->io->interest == TSRVI_HANGUP) {
        return;
    }
    if (slot->mark < (uint32_t)poller->fired_count && poller->fired[slot->mark].fd == fd &&
        poller->fired[slot->mark].generation == generation) {
        poller->fired[slot->mark].events |= fired;
    } else {
        slot->mark = (uint32_t)poller->fired_count;
        tsrvi_poller_fire(poller, fd, generation, fired);
    }
}

static int tsrvi_kqueue_wait(tsrvi_poller *poller, int timeout_ms)
{
    struct kevent *events = (struct kevent *)poller->memory;
    struct timespec limit;
    int count;
    limit.tv_sec = timeout_ms / 1000;
    limit.tv_nsec = (long)(timeout_ms % 1000) * 1000000;
    count = TSRV_SYS(kevent,
                     (poller->fd, NULL, 0, events, TSRVI_BATCH, timeout_ms < 0 ? NULL : &limit));
    poller->full = count == TSRVI_BATCH;
    if (count < 0) {
        return errno == EINTR ? TSRV_OK : tsrvi_error();
    }
    for (int i = 0; i < count; i++) {
        tsrvi_kqueue_fire(poller, &events[i]);
    }
    return TSRV_OK;
}

static const tsrvi_backend tsrvi_kqueue = {
    "kqueue",         TSRV_BACKEND_KQUEUE, false, tsrvi_kqueue_open,
    tsrvi_kqueue_set, tsrvi_kqueue_wait,   NULL,
};
#endif

/* ============================================================================
 * >>poll  Everywhere
 *
 * One dense array of pollfd; a slot's mark is its place there. A turn reports at
 * most TSRVI_BATCH events, and the next one starts looking where it stopped, so
 * that the first descriptors cannot starve the others.
 * ==========================================================================*/

static int tsrvi_poll_open(tsrvi_poller *poller)
{
    (void)poller;
    return TSRV_OK;
}

static int tsrvi_poll_grow(tsrvi_poller *poller)
{
    uint32_t size = poller->size < 64 ? 64 : poller->size * 2;
    void *memory = TSRV_REALLOC(poller->memory, size * sizeof(struct pollfd));
    if (memory == NULL) {
        return -ENOMEM;
    }
    poller->memory = memory;
    poller->size = size;
    return TSRV_OK;
}

static int tsrvi_poll_set(tsrvi_poller *poller, int fd, int old_interest, int new_interest,
                          bool quiet)
{
    tsrvi_slot *slot = tsrvi_poller_slot(poller, fd);
    struct pollfd *entries;
    int rc;
    (void)quiet;
    if (old_interest == 0) {
        if (TSRV_SYS(fcntl, (fd, F_GETFD)) < 0) {
            return tsrvi_error(); /* as the other backends do; poll would only say POLLNVAL, in
                                     every turn */
        }
        if (poller->used == poller->size && (rc = tsrvi_poll_grow(poller)) < 0) {
            return rc;
        }
        slot->mark = poller->used++;
    }
    entries = (struct pollfd *)poller->memory;
    if (new_interest == 0) {
        entries[slot->mark] = entries[--poller->used];
        tsrvi_poller_slot(poller, entries[slot->mark].fd)->mark = slot->mark;
        return TSRV_OK;
    }
    entries[slot->mark].fd = fd;
    entries[slot->mark].events = (short)(((new_interest & TSRV_READABLE) != 0 ? POLLIN : 0) |
                                         ((new_interest & TSRV_WRITABLE) != 0 ? POLLOUT : 0));
    return TSRV_OK;
}

static int tsrvi_poll_wait(tsrvi_poller *poller, int timeout_ms)
{
    struct pollfd *entries = (struct pollfd *)poller->memory;
    int count = TSRV_SYS(poll, (entries, (nfds_t)poller->used, timeout_ms));
    if (count < 0) {
        return errno == EINTR ? TSRV_OK : tsrvi_error();
    }
    for (uint32_t i = 0; i < poller->used && count > 0; i++) {
        const struct pollfd *entry = &entries[(poller->turn + i) % poller->used];
        int fired = ((entry->revents & POLLIN) != 0 ? TSRV_READABLE : 0) |
                    ((entry->revents & POLLOUT) != 0 ? TSRV_WRITABLE : 0);
        if (entry->revents == 0) {
            continue;
        }
        if ((entry->revents & (POLLHUP | POLLERR | POLLNVAL)) != 0) {
            fired |= TSRV_READABLE | TSRV_WRITABLE | TSRVI_HANGUP;
        }
        count--;
        if (tsrvi_poller_fire(poller, entry->fd, tsrvi_poller_slot(poller, entry->fd)->generation,
                              fired)) {
            poller->turn += i;
            break;
        }
    }
    return TSRV_OK;
}

static const tsrvi_backend tsrvi_poll = {
    "poll", TSRV_BACKEND_POLL, false, tsrvi_poll_open, tsrvi_poll_set, tsrvi_poll_wait, NULL,
};

/* Best first. */
static const tsrvi_backend *const tsrvi_backends[] = {
#if TSRVI_HAS_EPOLL
    &tsrvi_epoll,
#endif
#if TSRVI_HAS_KQUEUE
    &tsrvi_kqueue,
#endif
    &tsrvi_poll,
};

/* ============================================================================
 * >>switch  Stacks, and the jump from one to another
 *
 * tsrvi_context_make prepares a stack so that the first switch to it calls
 * entry(context); tsrvi_context_switch saves the running code in `from` and goes
 * on with `to`. By hand this costs a few nanoseconds: the stack pointer, the
 * frame pointer and where to go on are kept in the context, the other registers
 * that a function call must preserve are in the clobber list, and the other side
 * is entered with a jump, because a return on a changed stack always misleads
 * the return predictor. The floating point control words are not switched.
 *
 * A signal handler may unwind from any instruction of a switch: nothing is
 * pushed, and the function keeps a frame pointer, from which the compiler then
 * describes the frame: as long as the frame pointer is one side's, that side's
 * frame is found. Unwinding ends at entry, whose return address is 0.
 *
 * The assembly lives inside a function, with numeric labels, so that two static
 * copies of the library link. ucontext makes a system call per switch.
 * ==========================================================================*/

#if defined(__clang__)
#define TSRVI_OPAQUE __attribute__((noinline))
#else
#define TSRVI_OPAQUE \
    __attribute__((noinline, noipa)) /* callers must assume that every register changes */
#endif

/* Make the compiler keep a frame pointer in the function that says so. */
#define TSRVI_KEEP_FRAME() __asm__ volatile("" : : "r"(__builtin_frame_address(0)))

#if TSRVI_SWITCH != TSRVI_ARM && TSRVI_SWITCH != TSRVI_S390X && TSRVI_SWITCH != TSRVI_UCONTEXT
/* These are made by one function. At the top of a new stack is a frame that has no caller: so many
 * words of 0 (TSRVI_TOP_WORDS), at one of which (TSRVI_TOP_FRAME) the frame pointer points. */
typedef struct tsrvi_context {
    void *stack, *frame, *resume;
} tsrvi_context;
#endif

#if TSRVI_SWITCH == TSRVI_X86_64
#define TSRVI_TOP_WORDS 3 /* with entry's return address */
#define TSRVI_TOP_FRAME 1

static TSRVI_OPAQUE void tsrvi_context_switch(tsrvi_context *from, tsrvi_context *to)
{
    TSRVI_KEEP_FRAME();
    __asm__ volatile(
        "leaq 1f(%%rip), %%rax\n\t"
        "movq %%rsp, (%%rdi)\n\t"
        "movq %%rbp, 8(%%rdi)\n\t"
        "movq %%rax, 16(%%rdi)\n\t"
        "movq %%rsi, %%rdi\n\t" /* the argument of entry, when it is entered for the first time */
        "movq 8(%%rsi), %%rbp\n\t"
        "movq (%%rsi), %%rsp\n\t"
        "jmpq *16(%%rdi)\n"
        "1:"
        : "+D"(from), "+S"(to)
        :
        : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0",
          "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
          "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
}
#endif

#if TSRVI_SWITCH == TSRVI_X86
#define TSRVI_TOP_WORDS 5 /* with entry's return address, and its argument, aligned to 16 bytes */
#define TSRVI_TOP_FRAME 3
#define TSRVI_TOP_ARGUMENT 1

static TSRVI_OPAQUE void tsrvi_context_switch(tsrvi_context *from, tsrvi_context *to)
{
    TSRVI_KEEP_FRAME();
    __asm__ volatile("calll 2f\n" /* processors know that this is not a call */
                     "2:\tpopl %%ecx\n\t"
                     "addl $1f-2b, %%ecx\n\t"
                     "movl %%esp, (%%eax)\n\t"
                     "movl %%ebp, 4(%%eax)\n\t"
                     "movl %%ecx, 8(%%eax)\n\t"
                     "movl %%edx, %%eax\n\t" /* entry's argument too, with -mregparm */
                     "movl 4(%%edx), %%ebp\n\t"
                     "movl (%%edx), %%esp\n\t"
                     "jmpl *8(%%eax)\n"
                     "1:"
                     : "+a"(from), "+d"(to)
                     :
                     : "ebx", "ecx", "esi", "edi", "memory", "cc");
}
#endif

#if TSRVI_SWITCH == TSRVI_AARCH64
#define TSRVI_TOP_WORDS 2
#define TSRVI_TOP_FRAME 0

static TSRVI_OPAQUE void tsrvi_context_switch(tsrvi_context *from, tsrvi_context *to)
{
    register tsrvi_context *x0 __asm__("x0") = from;
    register tsrvi_context *x1 __asm__("x1") = to;
    TSRVI_KEEP_FRAME();
    __asm__ volatile(
        "adr x16, 1f\n\t"
        "mov x9, sp\n\t"
        "stp x9, x29, [x0]\n\t"
        "str x16, [x0, #16]\n\t"
        "ldr x16, [x1, #16]\n\t"
        "mov x0, x1\n\t" /* the argument of entry, when it is entered for the first time */
        "mov x30, xzr\n\t"
        "ldp x9, x29, [x1]\n\t"
        "mov sp, x9\n\t"
        "br x16\n"
        "1:\n\t"
        "hint #36" /* bti j: a landing pad where branch protection asks for one */
        : "+r"(x0), "+r"(x1)
        :
        : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15",
          "x16", "x17", "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x30",
          "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13",
          "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26",
          "v27", "v28", "v29", "v30", "v31", "memory", "cc");
}
#endif

#if TSRVI_SWITCH == TSRVI_ARM
typedef struct tsrvi_context {
    void *stack, *resume, *registers[8]; /* r4 to r11: the frame pointer is r7 or r11 */
} tsrvi_context;

static void tsrvi_context_make(tsrvi_context *context, char *stack, size_t size,
                               void (*entry)(tsrvi_context *))
{
    context->stack = stack + (size & ~(size_t)15);
    memcpy((void *)&context->resume, (const void *)&entry, sizeof(entry));
}

#if defined(__thumb__)
#define TSRVI_ARM_RESUME "orr r3, r3, #1\n\t" /* bx goes on in Thumb code */
#else
#define TSRVI_ARM_RESUME ""
#endif
#if defined(__VFP_FP__) && !defined(__SOFTFP__)
#define TSRVI_ARM_FLOATS "d8", "d9", "d10", "d11", "d12", "d13", "d14", "d15",
#else
#define TSRVI_ARM_FLOATS
#endif

static TSRVI_OPAQUE void tsrvi_context_switch(tsrvi_context *from, tsrvi_context *to)
{
    register tsrvi_context *r0 __asm__("r0") = from;
    register tsrvi_context *r1 __asm__("r1") = to;
    TSRVI_KEEP_FRAME();
    __asm__ volatile(
        "mov r2, sp\n\t"
        "adr r3, 1f\n\t" TSRVI_ARM_RESUME "stm r0, {r2-r11}\n\t"
        "mov r0, r1\n\t" /* the argument of entry, when it is entered for the first time */
        "ldm r1!, {r2, r3}\n\t"
        "mov lr, #0\n\t"
        "mov sp, r2\n\t"
        "bx r3\n"
        "1:\n\t"
        "ldm r1, {r4-r11}"
        : "+r"(r0), "+r"(r1)
        :
        : TSRVI_ARM_FLOATS "r2", "r3", "r12", "lr", "memory", "cc");
}
#endif

#if TSRVI_SWITCH == TSRVI_RISCV64
#define TSRVI_TOP_WORDS 2
#define TSRVI_TOP_FRAME 2 /* a frame lies below where that points */

#if defined(__riscv_flen)
#define TSRVI_RISCV_FLOATS \
    "fs0", "fs1", "fs2", "fs3", "fs4", "fs5", "fs6", "fs7", "fs8", "fs9", "fs10", "fs11",
#else
#define TSRVI_RISCV_FLOATS
#endif

static TSRVI_OPAQUE void tsrvi_context_switch(tsrvi_context *from, tsrvi_context *to)
{
    register tsrvi_context *a0 __asm__("a0") = from;
    register tsrvi_context *a1 __asm__("a1") = to;
    TSRVI_KEEP_FRAME();
    __asm__ volatile(
        "lla t1, 1f\n\t"
        "sd sp, 0(a0)\n\t"
        "sd s0, 8(a0)\n\t"
        "sd t1, 16(a0)\n\t"
        "ld t1, 16(a1)\n\t" /* a jump to t0 would count as a return */
        "mv a0, a1\n\t"     /* the argument of entry, when it is entered for the first time */
        "li ra, 0\n\t"
        "ld s0, 8(a1)\n\t"
        "ld sp, 0(a1)\n\t"
        "jr t1\n"
        "1:"
        : "+r"(a0), "+r"(a1)
        :
        : TSRVI_RISCV_FLOATS "ra", "t0", "t1", "t2", "t3", "t4", "t5", "t6", "a2", "a3", "a4", "a5",
          "a6", "a7", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "memory");
}
#endif

#if TSRVI_SWITCH == TSRVI_PPC64
/* Where callees save registers; 0 also where the frame of a switch would have been, since clang
 * describes it by the stack pointer. */
#define TSRVI_TOP_WORDS 80
#define TSRVI_TOP_FRAME 0 /* entry gets none: only who goes on does */

#if defined(__ALTIVEC__)
#define TSRVI_PPC_VECTORS \
    "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31",
#else
#define TSRVI_PPC_VECTORS
#endif

static TSRVI_OPAQUE void tsrvi_context_switch(tsrvi_context *from, tsrvi_context *to)
{
    register tsrvi_context *r3 __asm__("r3") = from;
    register tsrvi_context *r4 __asm__("r4") = to;
    TSRVI_KEEP_FRAME();
    __asm__ volatile(
        "bcl 20, 31, 2f\n" /* processors know that this is not a call */
        "2:\tmflr 12\n\t"
        "addi 12, 12, 1f-2b\n\t"
        "std 1, 0(3)\n\t"
        "std 31, 8(3)\n\t"
        "std 12, 16(3)\n\t"
        "ld 12, 16(4)\n\t" /* entry looks for its own address there */
        "mr 3, 4\n\t"      /* the argument of entry, when it is entered for the first time */
        "mtctr 12\n\t"
        "li 0, 0\n\t"
        "mtlr 0\n\t"
        "ld 1, 0(4)\n\t"
        "bctr\n"
        "1:\tld 31, 8(4)"
        : "+r"(r3), "+r"(r4)
        :
        : TSRVI_PPC_VECTORS "r0", "r5", "r6", "r7", "r8", "r9", "r10", "r11", "r12", "r14", "r15",
          "r16", "r17", "r18", "r19", "r20", "r21", "r22", "r23", "r24", "r25", "r26", "r27", "r28",
          "r29", "r30", "fr14", "fr15", "fr16", "fr17", "fr18", "fr19", "fr20", "fr21", "fr22",
          "fr23", "fr24", "fr25", "fr26", "fr27", "fr28", "fr29", "fr30", "fr31", "cr2", "cr3",
          "cr4", "lr", "ctr", "memory", "cc");
}
#endif

#if TSRVI_SWITCH == TSRVI_S390X
typedef struct tsrvi_context {
    void *resume, *registers[10]; /* r6 to r15: the frame pointer is r11, the stack pointer r15 */
} tsrvi_context;

static void tsrvi_context_make(tsrvi_context *context, char *stack, size_t size,
                               void (*entry)(tsrvi_context *))
{
    void **top = (void **)(void *)(stack + (size & ~(size_t)15));
    top -= 64; /* where callees save registers; 0 also where the frame of a switch would have been,
                  since gcc describes it by the stack pointer */
    memset(top, 0, 64 * sizeof(*top));
    context->registers[9] = top;
    memcpy((void *)&context->resume, (const void *)&entry, sizeof(entry));
}

static TSRVI_OPAQUE void tsrvi_context_switch(tsrvi_context *from, tsrvi_context *to)
{
    register tsrvi_context *r2 __asm__("r2") = from;
    register tsrvi_context *r3 __asm__("r3") = to;
    TSRVI_KEEP_FRAME();
    __asm__ volatile(
        "larl %%r1, 1f\n\t"
        "stg %%r1, 0(%%r2)\n\t"
        "stmg %%r6, %%r15, 8(%%r2)\n\t"
        "lg %%r1, 0(%%r3)\n\t"
        "lgr %%r2, %%r3\n\t" /* the argument of entry, when it is entered for the first time */
        "lghi %%r14, 0\n\t"
        "lg %%r15, 80(%%r3)\n\t"
        "br %%r1\n"
        "1:\tlmg %%r6, %%r13, 8(%%r3)"
        : "+r"(r2), "+r"(r3)
        :
        : "r0", "r1", "r4", "r5", "r14", "f0", "f1", "f2", "f3", "f4", "f5", "f6", "f7", "f8", "f9",
          "f10", "f11", "f12", "f13", "f14", "f15", "memory", "cc");
}
#endif

#if TSRVI_SWITCH == TSRVI_UCONTEXT
typedef struct tsrvi_context {
    ucontext_t machine;
    void (*entry)(struct tsrvi_context *);
} tsrvi_context;

/* makecontext passes ints only, so the pointer comes in two halves. */
static void tsrvi_context_enter(unsigned high, unsigned low)
{
    tsrvi_context *context = (tsrvi_context *)(uintptr_t)((uint64_t)high << 32 | low);
    context->entry(context);
}

static void tsrvi_context_make(tsrvi_context *context, char *stack, size_t size,
                               void (*entry)(tsrvi_context *))
{
    uint64_t address = (uint64_t)(uintptr_t)context;
    void (*enter)(void);
    void (*two)(unsigned, unsigned) = tsrvi_context_enter;
    memcpy((void *)&enter, (const void *)&two, sizeof(enter));
    TSRV_SYS(getcontext, (&context->machine));
    context->machine.uc_stack.ss_sp = stack;
    context->machine.uc_stack.ss_size = size & ~(size_t)15;
    context->machine.uc_link = NULL;
    context->entry = entry;
    makecontext(&context->machine, enter, 2, (unsigned)(address >> 32), (unsigned)address);
}

static void tsrvi_context_switch(tsrvi_context *from, tsrvi_context *to)
{
    TSRV_SYS(swapcontext, (&from->machine, &to->machine));
}
#endif

#if TSRVI_SWITCH == TSRVI_NO_SWITCH
#define TSRVI_TOP_WORDS 1
#define TSRVI_TOP_FRAME 0

/* Nothing is ever switched: tsrvi_co_new makes no coroutine. */
static void tsrvi_context_switch(tsrvi_context *from, tsrvi_context *to)
{
    (void)from;
    (void)to;
}
#endif

#if defined(TSRVI_TOP_WORDS)
static void tsrvi_context_make(tsrvi_context *context, char *stack, size_t size,
                               void (*entry)(tsrvi_context *))
{
    void **top = (void **)(void *)(stack + (size & ~(size_t)15)) - TSRVI_TOP_WORDS;
    memset(top, 0, TSRVI_TOP_WORDS * sizeof(*top));
#if defined(TSRVI_TOP_ARGUMENT)
    top[TSRVI_TOP_ARGUMENT] = context;
#endif
    context->stack = top;
    context->frame = top + TSRVI_TOP_FRAME;
    memcpy((void *)&context->resume, (const void *)&entry, sizeof(entry));
}
#endif

#if TSRVI_HAS_EXCEPTIONS
/* What __cxa_get_globals points to, in libstdc++ and in libc++abi: the exceptions of this thread
 * that are being handled, and how many are on their way to a handler. */
typedef struct tsrvi_exceptions {
    void *caught;
    unsigned uncaught;
#if defined(__ARM_EABI__) && !defined(__ARM_DWARF_EH__)
    void *propagating;
#endif
} tsrvi_exceptions;

extern tsrvi_exceptions *tsrvi_exceptions_of_thread(void) TSRVI_WEAK("__cxa_get_globals");

/* The same in a program that has the C++ runtime: each side has its own exceptions, at first
 * none. */
static TSRVI_APART void tsrvi_context_switch_exceptions(tsrvi_context *from, tsrvi_context *to)
{
    tsrvi_exceptions *exceptions = tsrvi_exceptions_of_thread(), kept = *exceptions;
    memset(exceptions, 0, sizeof(*exceptions));
    tsrvi_context_switch(from, to);
    *exceptions = kept;
}
#endif

#if TSRVI_HAS_LSAN
extern void tsrvi_root_add(const void *, size_t) TSRVI_WEAK("__lsan_register_root_region");
extern void tsrvi_root_remove(const void *, size_t) TSRVI_WEAK("__lsan_unregister_root_region");
#endif

/* Tell LeakSanitizer that what a stack points to is in use, or no longer. */
static void tsrvi_stack_owns(const void *stack, size_t size, bool owns)
{
#if TSRVI_HAS_LSAN
    if (TSRVI_UNLIKELY(tsrvi_root_add != NULL)) {
        (owns ? tsrvi_root_add : tsrvi_root_remove)(stack, size);
    }
#else
    (void)stack;
    (void)size;
    (void)owns;
#endif
}

/* A context, and what the sanitizers want to know about it. */
typedef struct tsrvi_fiber {
    tsrvi_context context;
    const void *bottom; /* lowest address of its stack */
    size_t size;
    void *fake_stack; /* ASan's */
    void *tsan;       /* TSan's fiber */
    bool owns;        /* LeakSanitizer knows its stack for as long as it lives */
} tsrvi_fiber;

/* First thing on the other side of a switch. */
static void tsrvi_fiber_arrived(tsrvi_fiber *self, tsrvi_fiber *other)
{
#if TSRVI_HAS_ASAN
    __sanitizer_finish_switch_fiber(self->fake_stack, &other->bottom, &other->size);
    if (!other->owns) { /* ASan takes self's stack for the thread's, so this one is nobody's */
        tsrvi_stack_owns(other->bottom, other->size, true);
    }
    if (!self->owns) {
        tsrvi_stack_owns(self->bottom, self->size, false);
    }
#else
    (void)self;
    (void)other;
#endif
}

/* Go on with `to`. ending: `from` will not be switched to again. */
static void tsrvi_fiber_switch(tsrvi_fiber *from, tsrvi_fiber *to, bool ending)
{
#if TSRVI_HAS_TSAN
    from->tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to->tsan, 0);
#endif
#if TSRVI_HAS_ASAN
    __sanitizer_start_switch_fiber(ending ? NULL : &from->fake_stack, to->bottom, to->size);
#else
    (void)ending;
#endif
#if TSRVI_HAS_EXCEPTIONS
    if (TSRVI_UNLIKELY(tsrvi_exceptions_of_thread != NULL)) {
        tsrvi_context_switch_exceptions(&from->context, &to->context);
    } else
#endif
    {
        tsrvi_context_switch(&from->context, &to->context);
    }
    tsrvi_fiber_arrived(from, to);
}

/* What is below every stack and faults when it is touched: a frame of 1 MiB (64 KiB where addresses
 * are scarce) does not reach past it, nor what is called from there. A multiple of every page. */
#define TSRVI_STACK_GUARD ((size_t)(sizeof(void *) > 4 ? 1024 + 64 : 64 + 64) * 1024)

/* Map a stack of `size` bytes, a multiple of the page, above its guard. NULL: no memory. */
static char *tsrvi_stack_map(size_t size)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | TSRVI_MAP_STACK | TSRVI_MAP_NORESERVE;
    void *guard =
        TSRV_SYS(mmap, (NULL, TSRVI_STACK_GUARD + size, PROT_READ | PROT_WRITE, flags, -1, 0));
    if (guard == MAP_FAILED) {
        return NULL;
    }
    if ((TSRVI_MADV_GUARD_INSTALL < 0 ||
         TSRV_SYS(madvise, (guard, TSRVI_STACK_GUARD, TSRVI_MADV_GUARD_INSTALL)) < 0) &&
        TSRV_SYS(mprotect, (guard, TSRVI_STACK_GUARD, PROT_NONE)) < 0) {
        TSRV_SYS(munmap, (guard, TSRVI_STACK_GUARD + size));
        return NULL;
    }
    return (char *)guard + TSRVI_STACK_GUARD;
}

static bool tsrvi_stack_unmap(char *stack, size_t size)
{
    return TSRV_SYS(munmap, (stack - TSRVI_STACK_GUARD, TSRVI_STACK_GUARD + size)) == 0;
}

/* ============================================================================
 * >>loop  Tasks, and a loop's life
 *
 * One turn: wait for events, then handle them, then what other threads and
 * signals left, then the timers that are due, then the tasks that were ready
 * when their turn came. A task is something to run: a coroutine to resume, a
 * handler to call, a stream to finish. What becomes ready while ready tasks run
 * waits for the next turn, so nothing can keep the loop from the other events.
 *
 * User code is called from here only, one piece at a time. After each piece the
 * `soon` tasks run: streams that were written to are flushed, once, however
 * many writes there were.
 *
 * The clock is read once a turn.
 * ==========================================================================*/

typedef struct tsrvi_task {
    struct tsrvi_task *next;
    void (*run)(struct tsrvi_task *task);
} tsrvi_task;

typedef struct tsrvi_tasks {
    tsrvi_task *first;
    tsrvi_task *last;
} tsrvi_tasks;

typedef struct tsrvi_post {
    struct tsrvi_post *next;
    tsrv_callback callback;
    void *context;
} tsrvi_post;

struct tsrvi_co;

/* Free stacks of one size; each holds the next one's address at its top. */
typedef struct tsrvi_stacks {
    char *first;
    int count;
    size_t size;
} tsrvi_stacks;

#define TSRVI_THREADS 4    /* helper threads of a loop */
#define TSRVI_SLOW_MS 1000 /* of a turn */
#define TSRVI_TRIM_MS 1000 /* large buffers that nobody has used for so long are freed */
#define TSRVI_BUDGET \
    256 /* calls that may complete at once before a handler has to let others run */

/* Of >>sources. */
typedef struct tsrvi_loop_sources {
    tsrvi_io wake; /* readable when another thread posted or a signal came */
    int wake_write;
    tsrvi_post *posts;          /* atomic; the newest first */
    int posting;                /* atomic; calls of tsrv_loop_post that still use the loop */
    int signal_seen;            /* atomic; a handler ran */
    tsrv_signal *signals;       /* watches */
    tsrv_signal *signal_cursor; /* the next to be looked at, while they are being called */
    unsigned signal_round;      /* of calls */
} tsrvi_loop_sources;

/* Of >>coroutine. */
typedef struct tsrvi_loop_coroutines {
    struct tsrvi_co *running; /* NULL = none */
    tsrvi_link all;           /* that are alive */
    tsrvi_stacks stacks[2];   /* free ones: of the usual size, and of the size last used besides */
    size_t page_size;
    tsrvi_fiber main; /* where they switch back to */
} tsrvi_loop_coroutines;

/* Of >>work. */
typedef struct tsrvi_loop_work {
    int most;             /* threads */
    size_t left;          /* work that was taken, and of which the loop has not seen the end */
#if TSRVI_HAS_THREADS
    bool begun;           /* the following exist */
    pthread_mutex_t lock; /* of all that follows */
    pthread_cond_t more;
    struct tsrvi_job *first, *last; /* that no thread has begun */
    size_t waiting;                 /* of them */
    int idle;                       /* threads */
    int count;
    bool over; /* they are to end */
    pthread_t *threads;
#endif
} tsrvi_loop_work;

/* Of the stream's sections. NULL = none. */
typedef struct tsrvi_loop_streams {
    tsrv_stream *handling;    /* whose callback-mode handler is running */
    tsrv_stream *parting;     /* whose on_close is running */
    tsrv_stream *limited;     /* that has met a limit last, for the log */
    const char *limit;        /* the name of that limit; NULL = what was refused has been logged; */
    size_t limit_size;        /* and how much it is */
    tsrvi_buffer *input;      /* what all receive into */
    tsrv_stream *input_owner; /* whose unread bytes or slice are in it */
    /* A stream's PROXY header has come, or not: see >>admit. Returns as a
     * transport's shake. */
    int (*introduced)(tsrv_stream *stream, const tsrv_address *client, int rc);
    tsrvi_pool pool;        /* of buffers */
    size_t most;            /* max_total_buffer; SIZE_MAX = no limit */
    tsrvi_timer trim;       /* when its large ones are looked at, whether they are used */
    tsrvi_link sessions;    /* that keep their buffers, the last used last */
    int session_count;      /* of them */
    tsrv_address address;   /* the peer's, while a handler is called */
    tsrv_stream *addressed; /* whose it is */
} tsrvi_loop_streams;

/* Of >>server. */
typedef struct tsrvi_loop_servers {
    tsrvi_link all;                             /* that have used this loop */
    tsrv_server *clients;                       /* what tsrv_connect's streams belong to */
    int lookups;                                /* names that threads look up for it */
    tsrv_condition lookup_over;                 /* one of them has ended */
    void (*fd_opened)(tsrv_loop *loop, int fd); /* NULL before the first server */
    void (*fd_closed)(tsrv_loop *loop);         /* likewise */
} tsrvi_loop_servers;

/* Of >>slow. Times are in ticks of the processor. */
typedef struct tsrvi_loop_slow {
    uint64_t limit;   /* nanoseconds of a turn that is slow; TSRVI_FOREVER = none is */
    uint64_t began;   /* by the clock: when this turn began */
    uint64_t turn;    /* the same in ticks; */
    uint64_t piece;   /* what runs now, */
    uint64_t ticked;  /* and when the clock was read last */
    uint64_t longest; /* of this turn's pieces, */
    char name[128];   /* and which that was */
    /* How the streams' sections call what a coroutine runs: false = it is not theirs. NULL before
     * the first server. */
    bool (*describe)(tsrv_callback function, void *context, char *text, size_t size);
    void (*count)(tsrv_loop *loop, uint64_t ms, bool slow); /* the same: a turn took so long */
} tsrvi_loop_slow;

/* What the process wants to hear of a loop: of all of a worker's, and of tsrv_serve's. */
typedef struct tsrvi_hooks {
    void (*entered)(tsrv_loop *); /* tsrv_loop_run begins, */
    void (*exited)(tsrv_loop *);  /* and it ends; NULL = of that nothing */
    void (*told)(tsrv_loop *);    /* after tsrvi_loops_wake */
    void (*ready)(void);          /* a server accepts */
} tsrvi_hooks;

/* Of >>worker. */
typedef struct tsrvi_loop_worker {
    const tsrvi_hooks *hooks; /* tsrv_serve's; NULL = it does not run in this loop */
    tsrvi_timer beat;
    int told; /* how it was told to leave */
} tsrvi_loop_worker;

struct tsrv_loop {
    tsrvi_poller poller;
    tsrvi_heap heap;
    tsrvi_tasks ready; /* run in the next turn */
    tsrvi_tasks soon;  /* run when the piece of user code that is running gives control back */
    uint64_t now;
    uint32_t now_ms;  /* the same for streams, in milliseconds; wraps */
    uint32_t past_ms; /* when timers ran last: all events from before it have been looked at */
    int behind;       /* turns in a row in which timers had to wait for events */
    uint64_t entered; /* when the first turn was asked for: it looks at all that came before */
    uint32_t turns;
    size_t active;  /* what keeps it running: timers, watches, listeners, streams, coroutines */
    int budget;     /* of what is running: see TSRVI_BUDGET; */
    size_t written; /* bytes that were sent since it began */
    struct tsrv_stream *plain; /* the stream that it reads in the short way: see >>read; NULL */
    bool running;
    bool stopping;
    bool leaving;       /* its servers are being drained, and then it stops: see tsrvi_loop_leave */
    bool closing;       /* being freed */
#ifdef TSRV_DEBUG
    const void *thread; /* the tsrvi_thread of the one that runs it */
#endif
    tsrvi_link link;    /* in the loops of the process */
    tsrvi_loop_sources sources;
    tsrvi_loop_coroutines coroutines;
    tsrvi_loop_work work;
    tsrvi_loop_streams streams;
    tsrvi_loop_servers servers;
    tsrvi_loop_slow slow;
    tsrvi_loop_worker worker;
};

/* NULL = nobody listens. */
static const tsrvi_hooks *tsrvi_loop_hooks(const tsrv_loop *loop)
{
    return tsrvi_process.hooks != NULL ? tsrvi_process.hooks : loop->worker.hooks;
}

static void tsrvi_tasks_push(tsrvi_tasks *tasks, tsrvi_task *task)
{
    task->next = NULL;
    if (tasks->first == NULL) {
        tasks->first = task;
    } else {
        tasks->last->next = task;
    }
    tasks->last = task;
}

static tsrvi_task *tsrvi_tasks_pop(tsrvi_tasks *tasks)
{
    tsrvi_task *task = tasks->first;
    tasks->first = task->next;
    return task;
}

/* A descriptor is new: whoever of this loop had its number before has lost it. Only what belongs to
 * a server is told of, so that there is one. */
static void tsrvi_loop_opened_fd(tsrv_loop *loop, int fd)
{
    if (fd >= 0) {
        loop->servers.fd_opened(loop, fd);
    }
}

/* Close a descriptor, and tell the servers that ran out of them. */
static void tsrvi_loop_close_fd(tsrv_loop *loop, int fd)
{
    tsrvi_close_fd(fd);
    if (fd >= 0) {
        loop->servers.fd_closed(loop);
    }
}

/* One of the calls that may complete at once. */
static inline TSRVI_INLINE void tsrvi_loop_pay(tsrv_loop *loop)
{
    if (TSRVI_UNLIKELY(--loop->budget <= 0)) {
        loop->plain = NULL;
    }
}

/* Read the clock: once a turn, and where a time begins late in one: see tsrvi_ms_after. */
static void tsrvi_loop_tick(tsrv_loop *loop)
{
    loop->now = tsrvi_clock();
    loop->now_ms = (uint32_t)(loop->now / TSRVI_MS);
}

/* Run what the last piece of user code left to be done at its end. */
static void tsrvi_loop_settle(tsrv_loop *loop)
{
    while (TSRVI_UNLIKELY(loop->soon.first != NULL)) {
        tsrvi_task *task = tsrvi_tasks_pop(&loop->soon);
        task->run(task);
    }
}

/* Resolve a loop argument: NULL is the thread's, made now if need be. Refuse a loop whose memory a
 * fork copied: it shares the parent's epoll set. */
static int tsrvi_loop_use(tsrv_loop **loop)
{
    if (*loop == NULL) {
        *loop = tsrvi_thread.running != NULL ? tsrvi_thread.running : tsrvi_thread.own;
    }
    if (*loop == NULL) {
        int rc = tsrv_loop_new(&tsrvi_thread.own, NULL);
        *loop = tsrvi_thread.own;
        return rc;
    }
    if ((*loop)->poller.pid != TSRV_SYS(getpid, ())) {
        tsrvi_log(TSRV_LOG_ERROR,
                  "this loop belongs to process %ld, which forked: make a new one in the child",
                  (long)(*loop)->poller.pid);
        return TSRV_EINVAL;
    }
    return TSRV_OK;
}

/* ---- waking ----------------------------------------------------------------*/

static void tsrvi_wake_write(int fd)
{
    uint64_t one = 1;
    int saved = errno;
    /* EAGAIN means that it is readable already. An eventfd wants 8 bytes; a pipe does not mind, and
     * raises no SIGPIPE, as this process reads it too. */
    ssize_t written = TSRV_SYS(write, (fd, &one, sizeof(one)));
    (void)written;
    errno = saved;
}

static void tsrvi_wake_event(tsrvi_io *io, int events)
{
    char buffer[512];
    (void)events;
    while (TSRV_SYS(read, (io->fd, buffer, sizeof(buffer))) == (ssize_t)sizeof(buffer)) {
    }
}

static int tsrvi_wake_open(tsrv_loop *loop)
{
    int fds[2], rc;
#if TSRVI_HAS_EVENTFD
    loop->sources.wake.fd = tsrvi_fd_own(TSRV_SYS(eventfd, (0, EFD_CLOEXEC | EFD_NONBLOCK)));
    loop->sources.wake_write = loop->sources.wake.fd;
    if (loop->sources.wake.fd >= 0) {
        return TSRV_OK;
    }
    rc = tsrvi_error();
    if (!tsrvi_is_refusal(rc)) {
        return rc;
    }
    tsrvi_do_without(TSRVI_WITHOUT_EVENTFD, "eventfd", rc);
#endif
    rc = tsrvi_pipe(fds);
    loop->sources.wake.fd = fds[0];
    loop->sources.wake_write = fds[1];
    return rc;
}

static void tsrvi_wake_close(tsrv_loop *loop)
{
    if (loop->sources.wake_write != loop->sources.wake.fd) {
        tsrvi_close_fd(loop->sources.wake_write);
    }
    tsrvi_close_fd(loop->sources.wake.fd);
}

/* ---- a loop's life ---------------------------------------------------------*/

#define TSRVI_BACKENDS (sizeof(tsrvi_backends) / sizeof(tsrvi_backends[0]))

/* Have a loop wait with this backend, for its wake-up to begin with. */
static int tsrvi_loop_open(tsrv_loop *loop, const tsrvi_backend *backend)
{
    tsrvi_poller *poller = &loop->poller;
    int rc;
    poller->backend = backend;
    poller->exclusive = backend->exclusive && !tsrvi_does_without(TSRVI_WITHOUT_EXCLUSIVE);
    if ((rc = backend->open(poller)) < 0 ||
        (rc = tsrvi_poller_set(poller, &loop->sources.wake, TSRV_READABLE)) < 0) {
        tsrvi_poller_close(poller);
    }
    return rc;
}

/* The same with the one that is asked for, or with the best that is not refused. */
static int tsrvi_loop_open_any(tsrv_loop *loop, int id)
{
    int rc = TSRV_ENOTSUP;
    for (size_t i = 0; i < TSRVI_BACKENDS; i++) {
        if (id == TSRV_BACKEND_BEST || tsrvi_backends[i]->id == id) {
            rc = tsrvi_loop_open(loop, tsrvi_backends[i]);
            if (rc == TSRV_OK || id != TSRV_BACKEND_BEST || !tsrvi_is_refusal(rc)) {
                return rc;
            }
            tsrvi_do_without(TSRVI_WITHOUT_BACKEND, tsrvi_backends[i]->name, rc);
        }
    }
    return rc;
}

/* A signal is watched no more, but its handler may be running on another thread. */
static void tsrvi_signals_quiesce(void)
{
    while (__atomic_load_n(&tsrvi_process.signal_handlers, __ATOMIC_SEQ_CST) != 0) {
        TSRV_SYS(sched_yield, ());
    }
}

/* Nobody knows the loop any more, but another thread may be about to wake it. */
static void tsrvi_loop_quiesce(tsrv_loop *loop)
{
    while (__atomic_load_n(&loop->sources.posting, __ATOMIC_ACQUIRE) != 0) {
        TSRV_SYS(sched_yield, ());
    }
    tsrvi_signals_quiesce();
}

static void tsrvi_signals_forget(void);
/* forward: tsrvi_signals_forget - with its first loop a fork's child is another process */

/* Lock the list of loops; a fork's child begins with an empty one, and with nobody's signals. */
static void tsrvi_loops_lock(void)
{
    pid_t pid = TSRV_SYS(getpid, ());
    tsrvi_lock(&tsrvi_process.loops.lock);
    if (tsrvi_process.loops.pid != pid) {
        tsrvi_signals_forget();
        if (tsrvi_process.worker.pid != 0 && tsrvi_process.worker.pid != pid) {
            tsrvi_worker_forget();
        }
        __atomic_store_n(&tsrvi_process.chief, (tsrv_loop *)NULL, __ATOMIC_RELEASE);
        tsrvi_process.loops.pid = pid;
        tsrvi_list_init(&tsrvi_process.loops.list);
    }
}

static bool tsrvi_loops_exist(void)
{
    bool exist;
    tsrvi_loops_lock();
    exist = !tsrvi_list_empty(&tsrvi_process.loops.list);
    tsrvi_unlock(&tsrvi_process.loops.lock);
    return exist;
}

/* Wake every loop of the process, so that each calls its hook. Any thread. */
static void tsrvi_loops_wake(void)
{
    tsrvi_loops_lock();
    TSRVI_EACH(tsrv_loop, loop, &tsrvi_process.loops.list, link) {
        __atomic_store_n(&loop->sources.signal_seen, 1, __ATOMIC_RELEASE);
        tsrvi_wake_write(loop->sources.wake_write);
    }
    tsrvi_unlock(&tsrvi_process.loops.lock);
}

/* Free the large buffers that nobody has used for a while. */
static void tsrvi_loop_trim(tsrvi_timer *timer)
{
    tsrv_loop *loop = TSRVI_CONTAINER(timer, tsrv_loop, streams.trim);
    tsrvi_pool *pool = &loop->streams.pool;
    if (!pool->large_used) {
        tsrvi_pool_trim(pool);
    } else if (pool->large != NULL) {
        pool->large_used = false;
        tsrvi_heap_set(&loop->heap, timer, tsrvi_after(loop->now, TSRVI_TRIM_MS));
    }
}

static void tsrvi_loop_destroy(tsrv_loop *loop)
{
    tsrv_loop *self = loop;
    tsrvi_loops_lock();
    tsrvi_list_remove(&loop->link);
    tsrvi_unlock(&tsrvi_process.loops.lock);
    __atomic_compare_exchange_n(&tsrvi_process.chief, &self, (tsrv_loop *)NULL, false,
                                __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    tsrvi_loop_quiesce(loop);
    tsrvi_wake_close(loop);
    tsrvi_poller_close(&loop->poller);
    tsrvi_buffer_free(&loop->streams.pool, loop->streams.input);
    tsrvi_pool_free(&loop->streams.pool);
    for (int page = 0; page < loop->poller.page_count; page++) {
        TSRV_FREE(loop->poller.pages[page]);
    }
    TSRV_FREE(loop->poller.pages);
    TSRV_FREE(loop->heap.items);
    while (loop->sources.posts != NULL) {
        tsrvi_post *post = loop->sources.posts;
        loop->sources.posts = post->next;
        TSRV_FREE(post);
    }
    TSRV_FREE(loop);
}

TSRV_API int tsrv_loop_new(tsrv_loop **loop, const tsrv_loop_options *options)
{
    tsrv_loop *made;
    int rc;
    *loop = NULL;
    if (options != NULL && TSRVI_WRONG(options->max_threads < 0)) {
        return TSRV_EINVAL;
    }
    made = (tsrv_loop *)tsrvi_zalloc(sizeof(*made));
    if (made == NULL) {
        return -ENOMEM;
    }
    tsrvi_list_init(&made->link);
    made->poller.pid = TSRV_SYS(getpid, ());
    tsrvi_loop_tick(made);
    made->poller.fd = -1;
    made->sources.wake.fd = -1;
    made->sources.wake.on_event = tsrvi_wake_event;
    made->sources.wake_write = -1;
    made->coroutines.page_size = (size_t)TSRV_SYS(sysconf, (_SC_PAGESIZE));
    tsrvi_list_init(&made->coroutines.all);
    tsrvi_list_init(&made->servers.all);
    made->streams.trim.fire = tsrvi_loop_trim;
    made->streams.most =
        options == NULL || options->max_total_buffer == 0 ? SIZE_MAX : options->max_total_buffer;
    made->slow.limit = options == NULL || options->slow_ms == 0 ? TSRVI_SLOW_MS * TSRVI_MS
                       : options->slow_ms < 0                   ? TSRVI_FOREVER
                                              : (uint64_t)options->slow_ms * TSRVI_MS;
    made->work.most =
        options == NULL || options->max_threads == 0 ? TSRVI_THREADS : options->max_threads;
    if ((rc = tsrvi_wake_open(made)) < 0 ||
        (rc = tsrvi_loop_open_any(made, options == NULL ? TSRV_BACKEND_BEST : options->backend)) <
            0 ||
        (rc = tsrvi_heap_reserve(&made->heap, 2)) < 0) { /* for its beat, and its pool */
        tsrvi_loop_destroy(made);
        return rc;
    }
    tsrvi_loops_lock(); /* others may wake it from now on */
    tsrvi_list_append(&tsrvi_process.loops.list, &made->link);
    tsrvi_unlock(&tsrvi_process.loops.lock);
    *loop = made;
    return TSRV_OK;
}

TSRV_API tsrv_loop *tsrv_loop_current(void)
{
    tsrv_loop *loop = NULL;
    return tsrvi_loop_use(&loop) < 0 ? NULL : loop;
}

/* ============================================================================
 * >>slow  Turns that take long
 *
 * To read the clock behind every piece of user code would cost more than many
 * pieces do, so the processor's own counter is read, which takes two or three
 * instructions. What it counts differs between machines, and only serves to find
 * the piece that took most of a turn, and the turns that are worth a look at the
 * clock.
 * ==========================================================================*/

/* Where it is not known how to read the counter, the clock is. TSRVI_TICKS_FEW are too few to look
 * any further. */
#if defined(TSRVI_TICKS) /* the tests' own */
#define TSRVI_TICKS_FEW 200000
static inline TSRVI_INLINE uint64_t tsrvi_ticks(void)
{
    return TSRVI_TICKS;
}
#elif defined(__x86_64__) || defined(__i386__)
#define TSRVI_TICKS_FEW 500000 /* at 2 to 5 GHz */
static inline TSRVI_INLINE uint64_t tsrvi_ticks(void)
{
    return (uint64_t)__builtin_ia32_rdtsc();
}
#elif defined(__aarch64__)
#define TSRVI_TICKS_FEW 5000 /* at 24 MHz to 1 GHz */
static inline TSRVI_INLINE uint64_t tsrvi_ticks(void)
{
    uint64_t ticks;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(ticks));
    return ticks;
}
#else
#define TSRVI_TICKS_FEW 200000 /* nanoseconds */
static uint64_t tsrvi_ticks(void)
{
    return tsrvi_clock();
}
#endif

/* A piece of user code has given control back, and took so many ticks: if that is the most of its
 * turn so far, its name is kept. */
static void tsrvi_slow_note(tsrv_loop *loop, uint64_t ticks, const char *what, const char *whose)
{
    loop->slow.longest = ticks;
    snprintf(loop->slow.name, sizeof(loop->slow.name), "%s%s", what, whose);
}

/* A piece of user code ends: how many ticks did it take? 0 = too few, or others took more. */
static inline TSRVI_INLINE uint64_t tsrvi_slow_piece(tsrv_loop *loop)
{
    uint64_t now = tsrvi_ticks(), ticks = now - loop->slow.piece;
    loop->slow.piece = now;
    return TSRVI_LIKELY(ticks <= TSRVI_TICKS_FEW) || ticks <= loop->slow.longest ? 0 : ticks;
}

static TSRVI_APART void tsrvi_slow_callback_named(tsrv_loop *loop, uint64_t ticks, const char *what,
                                                  uintptr_t function)
{
    char text[32];
    snprintf(text, sizeof(text), " (0x%lx)", (unsigned long)function);
    tsrvi_slow_note(loop, ticks, what, text);
}

/* A callback has returned.
 *   function  its address, which a debugger knows by name */
static inline TSRVI_INLINE void tsrvi_slow_callback(tsrv_loop *loop, const char *what,
                                                    uintptr_t function)
{
    uint64_t ticks = tsrvi_slow_piece(loop);
    if (TSRVI_UNLIKELY(ticks != 0)) {
        tsrvi_slow_callback_named(loop, ticks, what, function);
    }
}

static inline TSRVI_INLINE void tsrvi_slow_begin_turn(tsrv_loop *loop)
{
    loop->slow.began = loop->now;
    loop->slow.turn = tsrvi_ticks();
    loop->slow.piece = loop->slow.turn;
    loop->slow.ticked = loop->slow.turn;
    loop->slow.longest = 0;
}

/* The turn was worth a look. */
static TSRVI_APART void tsrvi_slow_look(tsrv_loop *loop, uint64_t ticks)
{
    uint64_t took = tsrvi_clock() - loop->slow.began;
    bool slow = took > loop->slow.limit;
    if (loop->slow.count != NULL) {
        loop->slow.count(loop, took / TSRVI_MS, slow);
    }
    if (slow) {
        double part = (double)loop->slow.longest / (double)ticks;
        tsrvi_log_limited(TSRVI_LOG_SLOW, TSRV_LOG_WARNING,
                          "a turn of the loop took %llu ms (slow_ms is %llu)%s%s",
                          (unsigned long long)(took / TSRVI_MS),
                          (unsigned long long)(loop->slow.limit / TSRVI_MS),
                          part < 0.1   ? ", in many pieces"
                          : part < 0.9 ? ", the longest piece of it "
                                       : ", nearly all of it ",
                          part < 0.1 ? "" : loop->slow.name);
    }
}

static inline TSRVI_INLINE void tsrvi_slow_end_turn(tsrv_loop *loop)
{
    uint64_t ticks = tsrvi_ticks() - loop->slow.turn;
    if (TSRVI_UNLIKELY(ticks > TSRVI_TICKS_FEW)) {
        tsrvi_slow_look(loop, ticks);
    }
}

/* ============================================================================
 * >>sources  Timers, watches, posts, signals
 * ==========================================================================*/

static void tsrvi_loop_timer_fire(tsrvi_timer *node)
{
    tsrv_timer *timer = TSRVI_CONTAINER(node, tsrv_timer, node);
    tsrv_loop *loop = timer->loop;
    tsrv_callback callback = timer->callback;
    loop->heap.reserved--;
    loop->active--;
    callback(timer->context);
    tsrvi_slow_callback(loop, "a timer's callback", (uintptr_t)callback);
}

TSRV_API int tsrv_timer_start(tsrv_loop *loop, tsrv_timer *timer, int delay_ms,
                              tsrv_callback callback, void *context)
{
    int rc;
    if (TSRVI_WRONG(delay_ms < 0) || TSRVI_WRONG(callback == NULL)) {
        return TSRV_EINVAL;
    }
    if ((rc = tsrvi_loop_use(&loop)) < 0 || (rc = tsrvi_heap_reserve(&loop->heap, 1)) < 0) {
        return rc;
    }
    tsrv_timer_stop(timer);
    timer->loop = loop;
    timer->node.fire = tsrvi_loop_timer_fire;
    timer->callback = callback;
    timer->context = context;
    loop->active++;
    /* Not the turn's time: after a long callback that would be too early. */
    tsrvi_heap_set(&loop->heap, &timer->node, tsrvi_after(tsrvi_clock(), delay_ms));
    return TSRV_OK;
}

TSRV_API void tsrv_timer_stop(tsrv_timer *timer)
{
    if (timer->node.position != 0) {
        tsrvi_heap_remove(&timer->loop->heap, &timer->node);
        timer->loop->heap.reserved--;
        timer->loop->active--;
    }
}

static void tsrvi_loop_run_timer(tsrv_loop *loop, tsrvi_timer *timer)
{
    tsrvi_heap_remove(&loop->heap, timer);
    timer->fire(timer);
    tsrvi_loop_settle(loop);
}

/* Those that were due when the turn began, and no more, however long their callbacks take. */
/* Those that were due then. */
static void tsrvi_loop_run_timers(tsrv_loop *loop, uint64_t then)
{
    while (loop->heap.count != 0 && loop->heap.items[0]->due <= then) {
        tsrvi_loop_run_timer(loop, loop->heap.items[0]);
    }
}

/* ---- watches ---------------------------------------------------------------*/

static void tsrvi_watch_event(tsrvi_io *io, int events)
{
    tsrv_watch *watch = TSRVI_CONTAINER(io, tsrv_watch, io);
    tsrv_loop *loop = watch->loop;
    tsrv_watch_callback callback = watch->callback;
    events &= watch->io.interest;
    if (events != 0) {
        callback(events, watch->context);
        tsrvi_slow_callback(loop, "a watch's callback", (uintptr_t)callback);
    }
}

TSRV_API int tsrv_watch_start(tsrv_loop *loop, tsrv_watch *watch, int fd, int events,
                              tsrv_watch_callback callback, void *context)
{
    int rc;
    if (TSRVI_WRONG(fd < 0) || TSRVI_WRONG(callback == NULL) ||
        TSRVI_WRONG(events == 0 || (events & ~(TSRV_READABLE | TSRV_WRITABLE)) != 0)) {
        return TSRV_EINVAL;
    }
    if ((rc = tsrvi_loop_use(&loop)) < 0) {
        return rc;
    }
    if (watch->io.interest != 0 && (watch->io.fd != fd || watch->loop != loop)) {
        tsrv_watch_stop(watch);
    }
    watch->io.fd = fd;
    watch->io.on_event = tsrvi_watch_event;
    watch->callback = callback;
    watch->context = context;
    watch->loop = loop;
    if (watch->io.interest == 0) {
        loop->active++;
    }
    rc = tsrvi_poller_set(&loop->poller, &watch->io, events);
    if (watch->io.interest == 0) {
        loop->active--;
    }
    return rc;
}

TSRV_API void tsrv_watch_stop(tsrv_watch *watch)
{
    if (watch->io.interest != 0) {
        tsrvi_poller_set(&watch->loop->poller, &watch->io, 0);
        watch->loop->active--;
    }
}

/* ---- posts -----------------------------------------------------------------*/

/* Any thread. */
static void tsrvi_post_push(tsrv_loop *loop, tsrvi_post *post)
{
    tsrvi_post *newest;
    /* As soon as it is in the list, the callback may run and free the loop: that waits for us. */
    __atomic_fetch_add(&loop->sources.posting, 1, __ATOMIC_ACQUIRE);
    newest = __atomic_load_n(&loop->sources.posts, __ATOMIC_RELAXED);
    do {
        post->next = newest;
    } while (!__atomic_compare_exchange_n(&loop->sources.posts, &newest, post, true,
                                          __ATOMIC_RELEASE, __ATOMIC_RELAXED));
    /* The first one wakes the loop; but on its own thread it is awake, and looks before it sleeps.
     */
    if (newest == NULL && tsrvi_thread.running != loop) {
        tsrvi_wake_write(loop->sources.wake_write);
    }
    __atomic_fetch_sub(&loop->sources.posting, 1, __ATOMIC_RELEASE);
}

TSRV_API int tsrv_loop_post(tsrv_loop *loop, tsrv_callback callback, void *context)
{
    tsrvi_post *post;
    int rc;
    if (TSRVI_WRONG(callback == NULL)) {
        return TSRV_EINVAL;
    }
    if ((rc = tsrvi_loop_use(&loop)) < 0) {
        return rc;
    }
    post = (tsrvi_post *)TSRV_MALLOC(sizeof(*post));
    if (post == NULL) {
        return -ENOMEM;
    }
    post->callback = callback;
    post->context = context;
    tsrvi_post_push(loop, post);
    return TSRV_OK;
}

/* Call what had been posted when this began, the oldest first. */
static void tsrvi_loop_run_posts(tsrv_loop *loop)
{
    tsrvi_post *post =
        __atomic_exchange_n(&loop->sources.posts, (tsrvi_post *)NULL, __ATOMIC_ACQUIRE);
    tsrvi_post *oldest = NULL;
    while (post != NULL) {
        tsrvi_post *next = post->next;
        post->next = oldest;
        oldest = post;
        post = next;
    }
    while (oldest != NULL) {
        tsrvi_post current = *oldest;
        TSRV_FREE(oldest);
        oldest = current.next;
        current.callback(current.context);
        tsrvi_slow_callback(loop, "what was posted", (uintptr_t)current.callback);
        tsrvi_loop_settle(loop);
    }
}

/* ---- signals ---------------------------------------------------------------*/

/* End this process in a second, whatever SIGALRM has been made to do. Async-signal-safe. */
static void tsrvi_signal_alarm(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_handler = SIG_DFL;
    TSRV_SYS(sigaction, (SIGALRM, &action, NULL));
    TSRV_SYS(alarm, (1));
}

/* The parent's death is a signal, too: prctl(2), PR_SET_PDEATHSIG. Nobody is left to end this
 * worker if it hangs, in its loop or behind it. */
static void tsrvi_signal_look_for_parent(void)
{
    if (tsrvi_process.parent != 0 && TSRV_SYS(getpid, ()) == tsrvi_process.worker.pid &&
        TSRV_SYS(getppid, ()) != tsrvi_process.parent) {
        tsrvi_signal_alarm();
    }
}

/* For a signal that is to have no effect, and not on programs that are started either: what is
 * ignored stays so after exec. */
static void tsrvi_signal_nothing(int signo)
{
    (void)signo;
    tsrvi_signal_look_for_parent();
}

/* Async-signal-safe: flags and write(2) only. */
static void tsrvi_signal_handler(int signo)
{
    tsrv_loop *loop;
    __atomic_fetch_add(&tsrvi_process.signal_handlers, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&tsrvi_process.signals[signo].pending, 1, __ATOMIC_SEQ_CST);
    loop = __atomic_load_n(&tsrvi_process.signals[signo].loop, __ATOMIC_SEQ_CST);
    if (loop != NULL) {
        __atomic_store_n(&loop->sources.signal_seen, 1, __ATOMIC_RELEASE);
        tsrvi_wake_write(loop->sources.wake_write);
    }
    tsrvi_signal_look_for_parent();
    __atomic_fetch_sub(&tsrvi_process.signal_handlers, 1, __ATOMIC_SEQ_CST);
}

/* Put back what was there before, unless the program has its own by now, or ours is kept. */
static void tsrvi_signal_uninstall(int signo)
{
    struct sigaction present;
    if (__atomic_load_n(&tsrvi_process.signals[signo].kept, __ATOMIC_SEQ_CST) == 0 &&
        (TSRV_SYS(sigaction, (signo, NULL, &present)) < 0 ||
         ((present.sa_flags & SA_SIGINFO) == 0 && present.sa_handler == tsrvi_signal_handler))) {
        TSRV_SYS(sigaction, (signo, &tsrvi_process.signals[signo].before, NULL));
    }
    __atomic_store_n(&tsrvi_process.signals[signo].loop, (tsrv_loop *)NULL, __ATOMIC_SEQ_CST);
}

/* In a fork's child: the loops that have watched are the parent's, and so are the handlers that
 * were running. */
static void tsrvi_signals_forget(void)
{
    for (int signo = 1; signo < TSRVI_SIGNALS; signo++) {
        if (__atomic_load_n(&tsrvi_process.signals[signo].loop, __ATOMIC_ACQUIRE) != NULL ||
            __atomic_exchange_n(&tsrvi_process.signals[signo].kept, 0, __ATOMIC_SEQ_CST) != 0) {
            __atomic_store_n(&tsrvi_process.signals[signo].kept, 0, __ATOMIC_SEQ_CST);
            tsrvi_signal_uninstall(signo);
        }
    }
    __atomic_store_n(&tsrvi_process.signal_handlers, 0, __ATOMIC_SEQ_CST);
}

static int tsrvi_signal_install(tsrv_loop *loop, int signo)
{
    tsrv_loop *nobody = NULL;
    struct sigaction action, before;
    int kept = __atomic_load_n(&tsrvi_process.signals[signo].kept, __ATOMIC_SEQ_CST);
    if (!__atomic_compare_exchange_n(&tsrvi_process.signals[signo].loop, &nobody, loop, false,
                                     __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        return nobody == loop ? TSRV_OK : TSRV_EBUSY;
    }
    memset(&action, 0, sizeof(action));
    action.sa_handler = tsrvi_signal_handler;
    action.sa_flags = SA_RESTART;
    TSRV_SYS(sigfillset, (&action.sa_mask));
    if (kept == 0) {
        __atomic_store_n(&tsrvi_process.signals[signo].pending, 0, __ATOMIC_RELEASE);
    }
    if (TSRV_SYS(sigaction, (signo, &action, &before)) < 0) {
        int rc = tsrvi_error();
        __atomic_store_n(&tsrvi_process.signals[signo].loop, (tsrv_loop *)NULL, __ATOMIC_RELEASE);
        return rc;
    }
    __atomic_store_n(&tsrvi_process.signals[signo].kept, 0, __ATOMIC_SEQ_CST);
    if (kept == 0) {
        tsrvi_process.signals[signo].before = before;
    } else { /* one may have come while nobody watched */
        __atomic_store_n(&loop->sources.signal_seen, 1, __ATOMIC_RELEASE);
    }
    return TSRV_OK;
}

TSRV_API int tsrv_signal_start(tsrv_loop *loop, tsrv_signal *signal, int signo,
                               tsrv_callback callback, void *context)
{
    tsrv_signal **last;
    int rc;
    if (TSRVI_WRONG(signo <= 0 || signo >= TSRVI_SIGNALS) || TSRVI_WRONG(callback == NULL)) {
        return TSRV_EINVAL;
    }
    if ((rc = tsrvi_loop_use(&loop)) < 0) {
        return rc;
    }
    if (signal->signo == signo && signal->loop == loop) {
        signal->callback = callback; /* a change; what has been received already is not lost */
        signal->context = context;
        return TSRV_OK;
    }
    tsrv_signal_stop(signal);
    if ((rc = tsrvi_signal_install(loop, signo)) < 0) {
        return rc;
    }
    signal->signo = signo;
    signal->loop = loop;
    signal->callback = callback;
    signal->context = context;
    signal->round = loop->sources.signal_round;
    signal->next = NULL;
    for (last = &loop->sources.signals; *last != NULL; last = &(*last)->next) {
    }
    *last = signal;
    return TSRV_OK;
}

TSRV_API void tsrv_signal_stop(tsrv_signal *signal)
{
    tsrv_loop *loop = signal->loop;
    tsrv_signal **link;
    int signo = signal->signo, others = 0;
    if (signo == 0) {
        return;
    }
    for (link = &loop->sources.signals; *link != NULL;) {
        if (*link == signal) {
            *link = signal->next;
        } else {
            others += (*link)->signo == signo;
            link = &(*link)->next;
        }
    }
    if (loop->sources.signal_cursor == signal) {
        loop->sources.signal_cursor = signal->next;
    }
    signal->signo = 0;
    if (others == 0 && /* in a fork's child another loop may watch it by now */
        __atomic_load_n(&tsrvi_process.signals[signo].loop, __ATOMIC_ACQUIRE) == loop) {
        tsrvi_signal_uninstall(signo);
    }
}

static void tsrvi_loop_run_signals(tsrv_loop *loop)
{
    const tsrvi_hooks *hooks = tsrvi_loop_hooks(loop);
    __atomic_store_n(&loop->sources.signal_seen, 0, __ATOMIC_RELAXED);
    for (int signo = 1; signo < TSRVI_SIGNALS; signo++) {
        if (__atomic_load_n(&tsrvi_process.signals[signo].loop, __ATOMIC_ACQUIRE) != loop ||
            __atomic_exchange_n(&tsrvi_process.signals[signo].pending, 0, __ATOMIC_ACQ_REL) == 0) {
            continue;
        }
        loop->sources.signal_round++; /* a watch that starts in it has not been there before */
        for (loop->sources.signal_cursor = loop->sources.signals;
             loop->sources.signal_cursor != NULL;) {
            tsrv_signal *signal = loop->sources.signal_cursor;
            loop->sources.signal_cursor = signal->next;
            if (signal->signo == signo && signal->round != loop->sources.signal_round) {
                tsrv_callback callback = signal->callback;
                callback(signal->context);
                tsrvi_slow_callback(loop, "a signal's callback", (uintptr_t)callback);
                tsrvi_loop_settle(loop);
            }
        }
    }
    if (hooks != NULL) {
        hooks->told(loop);
        tsrvi_loop_settle(loop);
    }
}

/* ============================================================================
 * >>turn  Turns of a loop
 * ==========================================================================*/

static bool tsrvi_loop_has_work(tsrv_loop *loop)
{
    return loop->ready.first != NULL ||
           __atomic_load_n(&loop->sources.signal_seen, __ATOMIC_RELAXED) ||
           __atomic_load_n(&loop->sources.posts, __ATOMIC_RELAXED) != NULL;
}

static bool tsrvi_loop_alive(tsrv_loop *loop)
{
    return loop->active != 0 || tsrvi_loop_has_work(loop);
}

/* Milliseconds until the next timer, rounded up so that it is never too early; -1 = none. */
static int tsrvi_loop_sleep_ms(tsrv_loop *loop, uint64_t now)
{
    uint64_t due = tsrvi_heap_next(&loop->heap), left;
    if (tsrvi_loop_has_work(loop)) {
        return 0;
    }
    if (TSRVI_UNLIKELY(tsrvi_log_owes())) {
        due = tsrvi_earlier(due, now + TSRVI_LOG_WINDOW * TSRVI_MS);
    }
    if (due == TSRVI_FOREVER) {
        return -1;
    }
    left = due <= now ? 0 : (due - now - 1) / TSRVI_MS + 1;
    return left > INT_MAX ? INT_MAX : (int)left;
}

static void tsrvi_loop_run_ready(tsrv_loop *loop)
{
    tsrvi_task *last = loop->ready.first == NULL ? NULL : loop->ready.last;
    while (last != NULL) {
        tsrvi_task *task = tsrvi_tasks_pop(&loop->ready);
        if (task == last) {
            last = NULL;
        }
        task->run(task);
        tsrvi_loop_settle(loop);
    }
}

#define TSRVI_BEHIND_MS 100 /* from then on a timer is late */

/* Has the first timer been due for long, while the loop could have turned? What the program has
 * done before it asked for this turn does not count: the turn has looked at what came meanwhile. */
static bool tsrvi_loop_is_late(const tsrv_loop *loop, uint64_t looked)
{
    uint64_t due = loop->heap.items[0]->due;
    return looked - (due > loop->entered ? due : loop->entered) > TSRVI_BEHIND_MS * TSRVI_MS;
}

/* Are there events that have not been looked at, though they may have come before the time of a
 * timer? The batch was full; or the process, or one handler, has stood still for so long that the
 * first timer is late. Then timers wait for the next turn, which waits for nothing: else everybody
 * would be timed out whose bytes are there. But no longer than it takes to look at every descriptor
 * once; and a worker's beat waits for nobody. */
static bool tsrvi_loop_is_behind(tsrv_loop *loop, uint64_t looked)
{
    bool full = loop->poller.full || loop->poller.fired_count == TSRVI_BATCH;
    int most = loop->poller.page_count * (2 * TSRVI_PAGE / TSRVI_BATCH) + 1; /* two events each */
    if (loop->heap.count != 0 && loop->heap.items[0]->due <= looked && loop->behind < most &&
        (full || (loop->behind == 0 && tsrvi_loop_is_late(loop, looked)))) {
        loop->behind++;
        return true;
    }
    loop->behind = 0;
    return false;
}

static int tsrvi_loop_turn(tsrv_loop *loop, int limit_ms)
{
    int timeout_ms = tsrvi_loop_sleep_ms(loop, loop->now), rc;
    uint64_t looked;
    if (timeout_ms > 0) {
        timeout_ms = tsrvi_loop_sleep_ms(loop, tsrvi_clock()); /* the turn may have taken long */
    }
    if (timeout_ms < 0 || (limit_ms >= 0 && limit_ms < timeout_ms)) {
        timeout_ms = limit_ms;
    }
    loop->poller.fired_count = 0;
    rc = loop->poller.backend->wait(&loop->poller, timeout_ms);
    tsrvi_loop_tick(loop);
    looked = loop->now; /* what comes later is seen by the next turn */
    tsrvi_slow_begin_turn(loop);
    loop->turns++;
    tsrvi_log_settle(false);
    for (int i = 0; i < loop->poller.fired_count; i++) {
        tsrvi_poller_dispatch(&loop->poller, &loop->poller.fired[i]);
        tsrvi_loop_settle(loop);
    }
    if (TSRVI_UNLIKELY(__atomic_load_n(&loop->sources.signal_seen, __ATOMIC_RELAXED))) {
        tsrvi_loop_run_signals(loop);
    }
    if (TSRVI_UNLIKELY(__atomic_load_n(&loop->sources.posts, __ATOMIC_RELAXED) != NULL)) {
        tsrvi_loop_run_posts(loop);
    }
    if (TSRVI_LIKELY(!tsrvi_loop_is_behind(loop, looked))) {
        loop->past_ms = (uint32_t)(looked / TSRVI_MS);
        tsrvi_loop_run_timers(loop, looked);
    } else if (loop->worker.beat.position != 0 && loop->worker.beat.due <= looked) {
        tsrvi_loop_run_timer(loop, &loop->worker.beat); /* it says that the loop turns: it does */
    }
    tsrvi_loop_run_ready(loop);
    tsrvi_slow_end_turn(loop);
    return rc;
}

/* Turn as long as asked: once = one turn, else until stopped or nothing is left. */
static int tsrvi_loop_turns(tsrv_loop *loop, bool once, int limit_ms)
{
    tsrv_loop *outer = tsrvi_thread.running;
    int rc = TSRV_OK;
    if (loop->running) {
        return TSRV_EBUSY;
    }
    tsrvi_thread.running = loop;
    loop->running = true;
#ifdef TSRV_DEBUG
    loop->thread = &tsrvi_thread;
#endif
    tsrvi_loop_tick(loop);
    loop->entered = loop->now;
    tsrvi_loop_settle(loop); /* what was written from outside */
    while (rc == TSRV_OK && (once || (tsrvi_loop_alive(loop) && !loop->stopping))) {
        rc = tsrvi_loop_turn(loop, tsrvi_loop_alive(loop) ? limit_ms : 0);
        if (once) {
            break;
        }
    }
    loop->running = false;
    tsrvi_thread.running = outer;
    return rc;
}

TSRV_API int tsrv_loop_run(tsrv_loop *loop)
{
    const tsrvi_hooks *hooks;
    int rc = tsrvi_loop_use(&loop);
    hooks = rc == TSRV_OK ? tsrvi_loop_hooks(loop) : NULL;
    if (hooks != NULL) {
        hooks->entered(loop);
    }
    if (rc < 0 || (rc = tsrvi_loop_turns(loop, false, TSRV_NEVER)) == TSRV_EBUSY) {
        return rc;
    }
    loop->stopping = loop->leaving = false;
    tsrvi_log_settle(true); /* nobody may be left who would tell of them later */
    if (hooks != NULL && hooks->exited != NULL) {
        hooks->exited(loop);
    }
    return rc;
}

TSRV_API int tsrv_loop_run_once(tsrv_loop *loop, int timeout_ms)
{
    int rc = tsrvi_loop_use(&loop);
    if (rc < 0 || (rc = tsrvi_loop_turns(loop, true, timeout_ms)) < 0) {
        return rc;
    }
    return tsrvi_loop_alive(loop);
}

TSRV_API void tsrv_loop_stop(tsrv_loop *loop)
{
    if (loop != NULL || (loop = tsrv_loop_current()) != NULL) {
        loop->stopping = true;
    }
}

TSRV_API int tsrv_loop_fd(tsrv_loop *loop)
{
    int rc = tsrvi_loop_use(&loop);
    if (rc < 0) {
        return rc;
    }
    if (!loop->poller.embedded) {
        loop->poller.embedded = true;
        tsrvi_poller_clean(&loop->poller);
    }
    return loop->poller.backend->id == TSRV_BACKEND_POLL ? (int)TSRV_ENOTSUP
           : loop->poller.fd < 0                         ? -EMFILE
                                                         : loop->poller.fd;
}

TSRV_API int tsrv_loop_timeout_ms(tsrv_loop *loop)
{
    int rc = tsrvi_loop_use(&loop);
    return rc < 0 ? 0 : loop->soon.first != NULL ? 0 : tsrvi_loop_sleep_ms(loop, tsrvi_clock());
}

TSRV_API int64_t tsrv_loop_now_ms(tsrv_loop *loop)
{
    int rc = tsrvi_loop_use(&loop);
    return rc < 0 ? 0 : (int64_t)(loop->now / TSRVI_MS);
}

TSRV_API int tsrv_loop_backend(tsrv_loop *loop)
{
    int rc = tsrvi_loop_use(&loop);
    return rc < 0 ? rc : loop->poller.backend->id;
}

/* ============================================================================
 * >>stacks  Stacks of a loop that are free
 * ==========================================================================*/

#define TSRVI_STACK_SIZE ((size_t)256 * 1024)
/* Seen: 23 KiB in a TLS handler, most of it a record, 17 in getaddrinfo, 38 in a printf of a long
 * double, 27 with ASan; a signal's frame may take 11 on top. */
#define TSRVI_STACK_LEAST ((size_t)64 * 1024)
#define TSRVI_STACK_POOL 256 /* free stacks that a loop keeps */

static void tsrvi_stacks_push(tsrvi_stacks *stacks, char *stack)
{
    memcpy(stack + stacks->size - sizeof(char *), &stacks->first, sizeof(char *));
    stacks->first = stack;
    stacks->count++;
}

static char *tsrvi_stacks_pop(tsrvi_stacks *stacks)
{
    char *stack = stacks->first;
    memcpy(&stacks->first, stack + stacks->size - sizeof(char *), sizeof(char *));
    stacks->count--;
    return stack;
}

/* Unmap free stacks until there are no more than `count`. At vm.max_map_count munmap fails for a
 * stack that lies between others, since that would make two mappings of one: it is kept. */
static void tsrvi_stacks_trim(tsrvi_stacks *stacks, int count)
{
    while (stacks->count > count) {
        char *stack = tsrvi_stacks_pop(stacks);
        if (!tsrvi_stack_unmap(stack, stacks->size)) {
            tsrvi_stacks_push(stacks, stack);
            return;
        }
    }
}

/* Unmap all. What is at an edge of its mapping always can be, and then what was next to it; of what
 * lies between the stacks of other loops at least the memory is given back. */
static void tsrvi_stacks_free(tsrvi_stacks *stacks)
{
    int before;
    do {
        tsrvi_stacks kept = {NULL, 0, stacks->size};
        before = stacks->count;
        while (stacks->count > 0) {
            char *stack = tsrvi_stacks_pop(stacks);
            if (!tsrvi_stack_unmap(stack, stacks->size)) {
                tsrvi_stacks_push(&kept, stack);
            }
        }
        *stacks = kept;
    } while (stacks->count < before);
    while (stacks->count > 0) {
        TSRV_SYS(madvise, (tsrvi_stacks_pop(stacks), stacks->size, MADV_DONTNEED));
    }
}

/* The pool for stacks of a size. */
static tsrvi_stacks *tsrvi_stacks_for(tsrv_loop *loop, size_t size)
{
    tsrvi_stacks *stacks = &loop->coroutines.stacks[size == TSRVI_STACK_SIZE ? 0 : 1];
    if (stacks->size != size) {
        tsrvi_stacks_free(stacks);
        stacks->size = size;
    }
    return stacks;
}

static char *tsrvi_stack_take(tsrv_loop *loop, size_t size)
{
    tsrvi_stacks *stacks = tsrvi_stacks_for(loop, size);
    return stacks->count == 0 ? tsrvi_stack_map(size) : tsrvi_stacks_pop(stacks);
}

static void tsrvi_stack_give(tsrv_loop *loop, char *stack, size_t size)
{
    tsrvi_stacks *stacks = tsrvi_stacks_for(loop, size);
    tsrvi_stacks_push(stacks, stack);
    tsrvi_stacks_trim(stacks, TSRVI_STACK_POOL);
}

/* ============================================================================
 * >>coroutine  Functions that can wait
 *
 * The control block sits at the top of its stack, so that an idle coroutine
 * costs one or two pages. A coroutine that waits is woken once: by whatever it
 * waits for, by its timer, or because the loop is being freed; the first one
 * wins. Its timer is lazy: it stays armed when the wait ends early and is moved
 * only when it fires, so a read with a timeout does not touch the heap.
 * ==========================================================================*/

typedef struct tsrvi_co {
    tsrvi_fiber fiber;
    tsrvi_task task; /* resumes it */
    tsrvi_link link; /* in the loop's coroutines */
    tsrv_loop *loop;
    tsrvi_timer timer;
    uint64_t due; /* when the wait times out; the timer may fire earlier and move on */
    tsrv_callback function;
    void *context;
    char *stack;
    size_t stack_size;
    unsigned valgrind_id;
    tsrv_condition *condition;        /* that it waits for; NULL = none */
    struct tsrvi_co *before, *behind; /* who waits for it, too */
    int result;                       /* of the wait */
    bool waiting;                     /* nobody has woken it yet */
    bool doomed; /* its next wait ends at once: its loop is being freed, or a drain is over */
    bool over;   /* its function has returned */
} tsrvi_co;

static void tsrvi_co_entry(tsrvi_context *context)
{
    tsrvi_co *co = TSRVI_CONTAINER(context, tsrvi_co, fiber.context);
    tsrvi_fiber_arrived(&co->fiber, &co->loop->coroutines.main);
    co->function(co->context);
    co->over = true;
    tsrvi_fiber_switch(&co->fiber, &co->loop->coroutines.main, true);
    TSRV_ASSERT(false); /* nobody resumes it */
}

/* It does not wait for a condition any more. */
static void tsrvi_co_leave(tsrvi_co *co)
{
    tsrv_condition *condition = co->condition;
    if (condition != NULL) {
        *(co->before != NULL ? &co->before->behind : &condition->first) = co->behind;
        *(co->behind != NULL ? &co->behind->before : &condition->last) = co->before;
        co->condition = NULL;
    }
}

/* Give back what a coroutine holds; it is not running. */
static void tsrvi_co_free(tsrvi_co *co)
{
    tsrv_loop *loop = co->loop;
    tsrvi_co_leave(co);
    tsrvi_heap_remove(&loop->heap, &co->timer);
    loop->heap.reserved--;
    loop->active--;
    tsrvi_list_remove(&co->link);
    TSRVI_STACK_DEREGISTER(co->valgrind_id);
#if TSRVI_HAS_TSAN
    __tsan_destroy_fiber(co->fiber.tsan);
#endif
    tsrvi_stack_owns(co->stack, co->stack_size, false);
    tsrvi_stack_give(loop, co->stack, co->stack_size);
}

/* It has given control back after so many ticks. */
static TSRVI_APART void tsrvi_co_took(const tsrvi_co *co, uint64_t ticks)
{
    tsrv_loop *loop = co->loop;
    char text[96];
    if (loop->slow.describe != NULL &&
        loop->slow.describe(co->function, co->context, text, sizeof(text))) {
        tsrvi_slow_note(loop, ticks, "handle_stream for ", text);
    } else {
        tsrvi_slow_callback_named(loop, ticks, "a coroutine", (uintptr_t)co->function);
    }
}

static inline void tsrvi_co_resume(tsrvi_co *co)
{
    tsrv_loop *loop = co->loop;
    uint64_t ticks;
    loop->coroutines.running = co;
    loop->budget = TSRVI_BUDGET;
    loop->written = 0;
    tsrvi_fiber_switch(&loop->coroutines.main, &co->fiber, false);
    loop->coroutines.running = NULL;
    loop->plain = NULL;
    ticks = tsrvi_slow_piece(loop);
    if (TSRVI_UNLIKELY(ticks != 0)) {
        tsrvi_co_took(co, ticks);
    }
    if (co->over) {
        tsrvi_co_free(co);
    }
}

static void tsrvi_co_run(tsrvi_task *task)
{
    tsrvi_co_resume(TSRVI_CONTAINER(task, tsrvi_co, task));
}

/* End the wait of a coroutine, if it still waits; it runs in the next turn. */
static bool tsrvi_co_wake(tsrvi_co *co, int result)
{
    if (!co->waiting) {
        return false;
    }
    co->waiting = false;
    co->result = result;
    tsrvi_tasks_push(&co->loop->ready, &co->task);
    return true;
}

/* The same from the loop itself, where it may run at once: of one that waits, */
static inline TSRVI_INLINE void tsrvi_co_go_on(tsrvi_co *co, int result)
{
    co->waiting = false;
    co->result = result;
    tsrvi_co_resume(co);
}

/* and of any. */
static void tsrvi_co_wake_now(tsrvi_co *co, int result)
{
    if (co->waiting) {
        tsrvi_co_go_on(co, result);
    }
}

static void tsrvi_co_timer_fire(tsrvi_timer *timer)
{
    tsrvi_co *co = TSRVI_CONTAINER(timer, tsrvi_co, timer);
    if (co->waiting && co->due <= co->loop->now) {
        tsrvi_co_wake_now(co, TSRV_ETIMEOUT);
    } else if (co->waiting && co->due != TSRVI_FOREVER) {
        tsrvi_heap_set(&co->loop->heap, timer, co->due);
    }
}

/* Suspend the running coroutine until it is woken or `due` has come: TSRV_ETIMEOUT, else what it
 * was woken with. */
static inline TSRVI_INLINE int tsrvi_co_wait(tsrvi_co *co, uint64_t due)
{
    tsrv_loop *loop = co->loop;
    if (TSRVI_UNLIKELY(co->doomed)) {
        co->doomed = false;
        return TSRV_ECLOSED;
    }
    co->due = due;
    if (due != TSRVI_FOREVER && (co->timer.position == 0 || co->timer.due > due)) {
        tsrvi_heap_set(&loop->heap, &co->timer, due);
    }
    co->waiting = true;
    tsrvi_fiber_switch(&co->fiber, &loop->coroutines.main, false);
    return co->result;
}

/* Let everything else that is ready run first. Returns `result`, unless somebody changes it. */
static int tsrvi_co_yield(tsrvi_co *co, int result)
{
    if (TSRVI_UNLIKELY(co->loop->closing || co->doomed)) {
        return tsrvi_co_wait(co, TSRVI_FOREVER);
    }
    co->waiting = true;
    tsrvi_co_wake(co, result);
    tsrvi_fiber_switch(&co->fiber, &co->loop->coroutines.main, false);
    return co->result;
}

/* A coroutine that will call function(context). It does not run yet; *made is NULL after an error.
 */
static int tsrvi_co_new(tsrv_loop *loop, size_t stack_size, tsrv_callback function, void *context,
                        tsrvi_co **made)
{
    size_t page = loop->coroutines.page_size, size = stack_size;
    tsrvi_co *co;
    char *stack;
    int rc = TSRVI_HAS_COROUTINES ? tsrvi_heap_reserve(&loop->heap, 1) : (int)TSRV_ENOTSUP;
    *made = NULL;
    if (rc < 0) {
        return rc;
    }
    size = ((size < TSRVI_STACK_LEAST ? TSRVI_STACK_LEAST : size) + page - 1) / page * page;
    stack = tsrvi_stack_take(loop, size);
    if (stack == NULL) {
        loop->heap.reserved--;
        return -ENOMEM;
    }
#if TSRVI_HAS_ASAN
    __asan_unpoison_memory_region(stack, size); /* what the last one left there */
#endif
    tsrvi_stack_owns(stack, size, true);
    co = (tsrvi_co *)(void *)(stack + size - ((sizeof(tsrvi_co) + 63) & ~(size_t)63));
    memset(co, 0, sizeof(*co));
    co->task.run = tsrvi_co_run;
    co->loop = loop;
    co->timer.fire = tsrvi_co_timer_fire;
    co->function = function;
    co->context = context;
    co->doomed = loop->closing;
    co->stack = stack;
    co->stack_size = size;
    co->fiber.owns = true;
    co->fiber.bottom = stack;
    co->fiber.size = (size_t)((char *)co - stack);
    co->valgrind_id = TSRVI_STACK_REGISTER(stack, stack + size);
#if TSRVI_HAS_TSAN
    co->fiber.tsan = __tsan_create_fiber(0);
#endif
    tsrvi_context_make(&co->fiber.context, stack, co->fiber.size, tsrvi_co_entry);
    tsrvi_list_append(&loop->coroutines.all, &co->link);
    loop->active++;
    *made = co;
    return TSRV_OK;
}

TSRV_API int tsrv_spawn(tsrv_loop *loop, tsrv_callback callback, void *context)
{
    tsrvi_co *co;
    int rc;
    if (!TSRVI_HAS_COROUTINES) {
        return TSRV_ENOTSUP;
    }
    if (TSRVI_WRONG(callback == NULL)) {
        return TSRV_EINVAL;
    }
    if ((rc = tsrvi_loop_use(&loop)) < 0 ||
        (rc = tsrvi_co_new(loop, TSRVI_STACK_SIZE, callback, context, &co)) < 0) {
        return rc;
    }
    tsrvi_tasks_push(&loop->ready, &co->task);
    return TSRV_OK;
}

/* End the wait of a coroutine, or the next one if it is about to run. */
static void tsrvi_co_doom(tsrvi_co *co)
{
    if (!tsrvi_co_wake(co, TSRV_ECLOSED)) {
        co->doomed = co != co->loop->coroutines.running;
    }
}

/* The loop is being freed: end every wait, once. */
static void tsrvi_co_cancel_all(tsrv_loop *loop)
{
    TSRVI_EACH(tsrvi_co, co, &loop->coroutines.all, link) {
        co->doomed = !tsrvi_co_wake(co, TSRV_ECLOSED);
    }
}

/* What still waits then is dropped where it stands. Returns how many. */
static size_t tsrvi_co_drop_all(tsrv_loop *loop)
{
    size_t count = 0;
    TSRVI_EACH(tsrvi_co, co, &loop->coroutines.all, link) {
        tsrvi_co_leave(co); /* conditions lie on stacks, too */
    }
    while (!tsrvi_list_empty(&loop->coroutines.all)) {
        tsrvi_co_free(TSRVI_CONTAINER(loop->coroutines.all.next, tsrvi_co, link));
        count++;
    }
    tsrvi_stacks_free(&loop->coroutines.stacks[0]);
    tsrvi_stacks_free(&loop->coroutines.stacks[1]);
    return count;
}

/* The coroutine that calls, or NULL. */
static tsrvi_co *tsrvi_co_self(void)
{
    return tsrvi_thread.running == NULL ? NULL : tsrvi_thread.running->coroutines.running;
}

TSRV_API int tsrv_sleep(int delay_ms)
{
    tsrvi_co *co = tsrvi_co_self();
    int rc;
    if (TSRVI_WRONG(delay_ms < 0)) {
        return TSRV_EINVAL;
    }
    if (co == NULL) {
        return tsrvi_mistake_no_coroutine(__func__);
    }
    rc = delay_ms == 0 ? tsrvi_co_yield(co, TSRV_OK)
                       : tsrvi_co_wait(co, tsrvi_after(tsrvi_clock(), delay_ms));
    return rc == TSRV_ETIMEOUT ? TSRV_OK : rc;
}

/* A coroutine that waits for a descriptor. */
typedef struct tsrvi_fd_wait {
    tsrvi_io io;
    tsrvi_co *co;
} tsrvi_fd_wait;

static void tsrvi_fd_wait_event(tsrvi_io *io, int events)
{
    (void)events;
    tsrvi_co_wake_now(TSRVI_CONTAINER(io, tsrvi_fd_wait, io)->co, TSRV_OK);
}

/* Is fd ready now? */
static int tsrvi_fd_look(int fd, int events)
{
    struct pollfd entry;
    int count;
    entry.fd = fd;
    entry.events = (short)(((events & TSRV_READABLE) != 0 ? POLLIN : 0) |
                           ((events & TSRV_WRITABLE) != 0 ? POLLOUT : 0));
    entry.revents = 0;
    do {
        count = TSRV_SYS(poll, (&entry, 1, 0));
    } while (count < 0 && errno == EINTR);
    return count < 0                         ? tsrvi_error()
           : (entry.revents & POLLNVAL) != 0 ? -EBADF
           : count > 0                       ? TSRV_OK
                                             : TSRV_ETIMEOUT;
}

TSRV_API int tsrv_wait_fd(int fd, int events, int timeout_ms)
{
    tsrvi_fd_wait wait;
    tsrvi_co *co = tsrvi_co_self();
    int rc;
    if (TSRVI_WRONG(fd < 0) ||
        TSRVI_WRONG(events == 0 || (events & ~(TSRV_READABLE | TSRV_WRITABLE)) != 0)) {
        return TSRV_EINVAL;
    }
    if (co == NULL) {
        return tsrvi_mistake_no_coroutine(__func__);
    }
    if (timeout_ms == 0) {
        tsrvi_loop_pay(co->loop);
        rc = co->loop->budget < 0 ? tsrvi_co_yield(co, TSRV_OK) : (int)TSRV_OK;
        return rc < 0 ? rc : tsrvi_fd_look(fd, events);
    }
    memset(&wait, 0, sizeof(wait));
    wait.io.fd = fd;
    wait.io.on_event = tsrvi_fd_wait_event;
    wait.co = co;
    if ((rc = tsrvi_poller_set(&co->loop->poller, &wait.io, events)) < 0) {
        return rc;
    }
    rc = tsrvi_co_wait(co, tsrvi_after(tsrvi_clock(), timeout_ms));
    tsrvi_poller_set(&co->loop->poller, &wait.io, 0);
    return rc;
}

/* ============================================================================
 * >>condition  Coroutines that wait for each other
 * ==========================================================================*/

TSRV_API int tsrv_condition_wait(tsrv_condition *condition, int timeout_ms)
{
    tsrvi_co *co = tsrvi_co_self();
    int rc;
    if (co == NULL) {
        return tsrvi_mistake_no_coroutine(__func__);
    }
    if (TSRVI_WRONG(timeout_ms < TSRV_NEVER)) {
        return TSRV_EINVAL;
    }
    if (condition->first != NULL && condition->first->loop != co->loop) {
        return tsrvi_mistake(__func__, "coroutines of another loop wait");
    }
    co->condition = condition;
    co->before = condition->last;
    co->behind = NULL;
    *(co->before != NULL ? &co->before->behind : &condition->first) = co;
    condition->last = co;
    rc = timeout_ms == 0 ? tsrvi_co_yield(co, TSRV_ETIMEOUT)
                         : tsrvi_co_wait(co, tsrvi_after(tsrvi_clock(), timeout_ms));
    tsrvi_co_leave(co);
    return rc;
}

TSRV_API int tsrv_condition_notify(tsrv_condition *condition, size_t count)
{
    while (count != 0 && condition->first != NULL) {
        tsrvi_co *co = condition->first;
        tsrvi_co_leave(co);
        if (tsrvi_co_wake(co, TSRV_OK) || co->result == TSRV_ETIMEOUT) {
            /* it waited, or has only let others go first; else a drain or the loop has ended it */
            co->result = TSRV_OK;
            count--;
        }
    }
    return TSRV_OK;
}

/* ============================================================================
 * >>work  Threads, for what blocks
 *
 * A job goes from the loop's queue to a helper thread, and comes back as a post.
 * Its memory is taken before it is queued, so that nothing can fail later. A
 * thread is made when a job comes and none is idle, and blocks signals, but for
 * its own faults: they are the loop's. Threads see the queue and nothing else of the loop.
 * ==========================================================================*/

#if TSRVI_HAS_THREADS
typedef struct tsrvi_job {
    struct tsrvi_job *next;
    tsrv_loop *loop;
    tsrv_callback work, done;
    void *context;
    tsrvi_post *post; /* tells the loop that it has run */
} tsrvi_job;

/* On the loop: a job has run. */
static void tsrvi_job_end(void *context)
{
    tsrvi_job job = *(tsrvi_job *)context;
    TSRV_FREE(context);
    job.loop->work.left--;
    job.loop->active--;
    if (job.done != NULL) {
        job.done(job.context);
        tsrvi_slow_callback(job.loop, "what follows work", (uintptr_t)job.done);
    }
}

static void *tsrvi_work_thread(void *context)
{
    tsrv_loop *loop = (tsrv_loop *)context;
    tsrvi_loop_work *work = &loop->work;
    TSRV_SYS(pthread_mutex_lock, (&work->lock));
    while (work->first != NULL || !work->over) {
        tsrvi_job *job = work->first;
        if (job == NULL) {
            work->idle++;
            TSRV_SYS(pthread_cond_wait, (&work->more, &work->lock));
            work->idle--;
            continue;
        }
        work->first = job->next;
        work->waiting--;
        TSRV_SYS(pthread_mutex_unlock, (&work->lock));
        job->work(job->context);
        tsrvi_post_push(loop, job->post);
        TSRV_SYS(pthread_mutex_lock, (&work->lock));
    }
    TSRV_SYS(pthread_mutex_unlock, (&work->lock));
    return NULL;
}

/* One more thread. It takes no signal but those that its own faults raise. The lock is held.
 * Returns TSRV_OK or -errno. */
static int tsrvi_work_grow(tsrv_loop *loop)
{
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS};
    tsrvi_loop_work *work = &loop->work;
    sigset_t most, before;
    int rc;
    pthread_t *threads = (pthread_t *)TSRV_REALLOC(work->threads, ((size_t)work->count + 1) *
                                                                      sizeof(*work->threads));
    if (threads == NULL) {
        return -ENOMEM;
    }
    work->threads = threads;
    TSRV_SYS(sigfillset, (&most));
    for (size_t i = 0; i < sizeof(faults) / sizeof(faults[0]); i++) {
        TSRV_SYS(sigdelset, (&most, faults[i]));
    }
    TSRV_SYS(pthread_sigmask, (SIG_SETMASK, &most, &before));
    rc = TSRV_SYS(pthread_create, (&threads[work->count], NULL, tsrvi_work_thread, loop));
    TSRV_SYS(pthread_sigmask, (SIG_SETMASK, &before, NULL));
    work->count += rc == 0;
    return -rc;
}

/* What threads need, before the first. Returns TSRV_OK or -ENOMEM. */
static int tsrvi_work_begin(tsrvi_loop_work *work)
{
    if (work->begun) {
        return TSRV_OK;
    }
    if (TSRV_SYS(pthread_mutex_init, (&work->lock, NULL)) != 0) {
        return -ENOMEM;
    }
    if (TSRV_SYS(pthread_cond_init, (&work->more, NULL)) != 0) {
        TSRV_SYS(pthread_mutex_destroy, (&work->lock));
        return -ENOMEM;
    }
    work->begun = true;
    return TSRV_OK;
}

/* No work is left: end the threads. */
static void tsrvi_work_end(tsrvi_loop_work *work)
{
    if (!work->begun) {
        return;
    }
    TSRV_SYS(pthread_mutex_lock, (&work->lock));
    work->over = true;
    TSRV_SYS(pthread_cond_broadcast, (&work->more));
    TSRV_SYS(pthread_mutex_unlock, (&work->lock));
    for (int i = 0; i < work->count; i++) {
        TSRV_SYS(pthread_join, (work->threads[i], NULL));
    }
    TSRV_SYS(pthread_cond_destroy, (&work->more));
    TSRV_SYS(pthread_mutex_destroy, (&work->lock));
    TSRV_FREE(work->threads);
}

/* Have a thread run it. Returns TSRV_OK; or why there is none. */
static int tsrvi_work_push(tsrv_loop *loop, tsrvi_job *job)
{
    tsrvi_loop_work *work = &loop->work;
    int rc = TSRV_OK;
    TSRV_SYS(pthread_mutex_lock, (&work->lock));
    if ((size_t)work->idle <= work->waiting && work->count < work->most) {
        rc = tsrvi_work_grow(loop);
    }
    if (rc == TSRV_OK || work->count != 0) {
        rc = TSRV_OK;
        *(work->first == NULL ? &work->first : &work->last->next) = job;
        work->last = job;
        work->waiting++;
        TSRV_SYS(pthread_cond_signal, (&work->more));
    }
    TSRV_SYS(pthread_mutex_unlock, (&work->lock));
    return rc;
}

TSRV_API int tsrv_work(tsrv_loop *loop, tsrv_callback work, tsrv_callback done, void *context)
{
    tsrvi_job *job;
    int rc;
    if (TSRVI_WRONG(work == NULL)) {
        return TSRV_EINVAL;
    }
    if ((rc = tsrvi_loop_use(&loop)) < 0 ||
        (rc = loop->closing ? (int)TSRV_ECLOSED : tsrvi_work_begin(&loop->work)) < 0) {
        return rc;
    }
    job = (tsrvi_job *)tsrvi_zalloc(sizeof(*job));
    if (job == NULL || (job->post = (tsrvi_post *)TSRV_MALLOC(sizeof(*job->post))) == NULL) {
        TSRV_FREE(job);
        return -ENOMEM;
    }
    job->loop = loop;
    job->work = work;
    job->done = done;
    job->context = context;
    job->post->callback = tsrvi_job_end;
    job->post->context = job;
    if ((rc = tsrvi_work_push(loop, job)) < 0) {
        TSRV_FREE(job->post);
        TSRV_FREE(job);
        return rc;
    }
    loop->work.left++;
    loop->active++;
    return TSRV_OK;
}

/* A coroutine that waits for work; on its stack. */
typedef struct tsrvi_work_wait {
    tsrvi_co *co;
    tsrv_callback work;
    void *context;
    bool over;
} tsrvi_work_wait;

static void tsrvi_work_wait_run(void *context)
{
    tsrvi_work_wait *wait = (tsrvi_work_wait *)context;
    wait->work(wait->context);
}

static void tsrvi_work_wait_end(void *context)
{
    tsrvi_work_wait *wait = (tsrvi_work_wait *)context;
    wait->over = true;
    tsrvi_co_wake_now(wait->co, TSRV_OK);
}

TSRV_API int tsrv_run_in_thread(tsrv_callback work, void *context)
{
    tsrvi_work_wait wait;
    bool ended = false;
    int rc;
    wait.co = tsrvi_co_self();
    wait.work = work;
    wait.context = context;
    wait.over = false;
    if (wait.co == NULL) {
        return tsrvi_mistake_no_coroutine(__func__);
    }
    if (TSRVI_WRONG(work == NULL)) {
        return TSRV_EINVAL;
    }
    if ((rc = tsrv_work(wait.co->loop, tsrvi_work_wait_run, tsrvi_work_wait_end, &wait)) < 0) {
        return rc;
    }
    while (!wait.over) { /* work cannot be stopped, and uses what is on this stack */
        ended = tsrvi_co_wait(wait.co, TSRVI_FOREVER) == TSRV_ECLOSED || ended;
    }
    if (ended) { /* that the loop is freed, or the grace over, is for the next wait to tell */
        wait.co->doomed = true;
    }
    return TSRV_OK;
}
#else
static void tsrvi_work_end(tsrvi_loop_work *work)
{
    (void)work;
}

TSRV_API int tsrv_work(tsrv_loop *loop, tsrv_callback work, tsrv_callback done, void *context)
{
    (void)loop;
    (void)work;
    (void)done;
    (void)context;
    return TSRV_ENOTSUP;
}

TSRV_API int tsrv_run_in_thread(tsrv_callback work, void *context)
{
    (void)work;
    (void)context;
    return TSRV_ENOTSUP;
}
#endif

/* ============================================================================
 * >>socket  Addresses, sockets
 * ==========================================================================*/

#include <arpa/inet.h>

/* tsrv_address hides the system's types; this is what is inside, copied out because the types may
 * not alias. */
typedef union tsrvi_sockaddr {
    struct sockaddr any;
    struct sockaddr_in four;
    struct sockaddr_in6 six;
    struct sockaddr_un local;
    struct sockaddr_storage storage;
} tsrvi_sockaddr;

static void tsrvi_address_load(const tsrv_address *address, tsrvi_sockaddr *inside)
{
    memset(inside, 0, sizeof(*inside));
    memcpy(inside, address->storage, tsrvi_min(address->size, sizeof(address->storage)));
}

static void tsrvi_address_store(tsrv_address *address, const void *inside, size_t size)
{
    memset(address, 0, sizeof(*address));
    address->size = (uint32_t)tsrvi_min(size, sizeof(address->storage));
    memcpy(address->storage, inside, address->size);
}

TSRV_API int tsrv_address_family(const tsrv_address *address)
{
    tsrvi_sockaddr inside;
    tsrvi_address_load(address, &inside);
    return address->size < offsetof(struct sockaddr, sa_data) ? 0 : inside.any.sa_family;
}

TSRV_API int tsrv_address_port(const tsrv_address *address)
{
    tsrvi_sockaddr inside;
    tsrvi_address_load(address, &inside);
    switch (tsrv_address_family(address)) {
    case AF_INET:
        return ntohs(inside.four.sin_port);
    case AF_INET6:
        return ntohs(inside.six.sin6_port);
    default:
        return 0;
    }
}

/* A unix address: the kernel need not terminate the path. */
static void tsrvi_unix_format(const tsrv_address *address, const char *path, char *buffer,
                              size_t size)
{
    size_t start = offsetof(struct sockaddr_un, sun_path);
    size_t length = address->size > start ? address->size - start : 0;
    if (length == 0) {
        snprintf(buffer, size, "unix:");
    } else if (path[0] == 0) {
        snprintf(buffer, size, "unix:@%.*s", (int)length - 1, path + 1);
    } else {
        snprintf(buffer, size, "unix:%.*s", (int)length, path);
    }
}

TSRV_API char *tsrv_address_format(const tsrv_address *address, char *buffer, size_t size)
{
    char text[INET6_ADDRSTRLEN] = "", scope[16] = "";
    tsrvi_sockaddr inside;
    tsrvi_address_load(address, &inside);
    if (size == 0) {
        return buffer;
    }
    switch (tsrv_address_family(address)) {
    case AF_INET:
        TSRV_SYS(inet_ntop, (AF_INET, &inside.four.sin_addr, text, sizeof(text)));
        snprintf(buffer, size, "%s:%d", text, tsrv_address_port(address));
        break;
    case AF_INET6:
        TSRV_SYS(inet_ntop, (AF_INET6, &inside.six.sin6_addr, text, sizeof(text)));
        if (inside.six.sin6_scope_id != 0) {
            snprintf(scope, sizeof(scope), "%%%u", (unsigned)inside.six.sin6_scope_id);
        }
        snprintf(buffer, size, "[%s%s]:%d", text, scope, tsrv_address_port(address));
        break;
    case AF_UNIX:
        tsrvi_unix_format(address, inside.local.sun_path, buffer, size);
        break;
    default:
        snprintf(buffer, size, "unknown");
    }
    return buffer;
}

static int tsrvi_getsockname(int fd, struct sockaddr *address, socklen_t *size)
{
    return TSRV_SYS(getsockname, (fd, address, size));
}

static int tsrvi_getpeername(int fd, struct sockaddr *address, socklen_t *size)
{
    return TSRV_SYS(getpeername, (fd, address, size));
}

static int tsrvi_address_get(int fd, int (*getname)(int, struct sockaddr *, socklen_t *),
                             tsrv_address *address)
{
    tsrvi_sockaddr inside;
    socklen_t size = sizeof(inside);
    memset(address, 0, sizeof(*address));
    memset(&inside, 0, sizeof(inside));
    if (getname(fd, &inside.any, &size) < 0) {
        return tsrvi_error();
    }
    tsrvi_address_store(address, &inside, size);
    return TSRV_OK;
}

/* Is this the same address? Some of it says nothing, and systems fill it in as they like: a length
 * at the front, padding, and what a unix socket's size counts behind the end of the path. */
static bool tsrvi_address_same(const tsrv_address *one, const tsrv_address *other)
{
    tsrvi_sockaddr a, b;
    int family = tsrv_address_family(one);
    tsrvi_address_load(one, &a);
    tsrvi_address_load(other, &b);
    if (family != tsrv_address_family(other)) {
        return false;
    }
    switch (family) {
    case AF_INET:
        return a.four.sin_port == b.four.sin_port &&
               a.four.sin_addr.s_addr == b.four.sin_addr.s_addr;
    case AF_INET6:
        return a.six.sin6_port == b.six.sin6_port && a.six.sin6_scope_id == b.six.sin6_scope_id &&
               memcmp(&a.six.sin6_addr, &b.six.sin6_addr, sizeof(a.six.sin6_addr)) == 0;
    default:
        if (family == AF_UNIX && a.local.sun_path[0] != 0) {
            return strncmp(a.local.sun_path, b.local.sun_path, sizeof(a.local.sun_path)) == 0;
        }
        return one->size == other->size && memcmp(one->storage, other->storage, one->size) == 0;
    }
}

static int tsrvi_option(int fd, int level, int name, int value)
{
    return TSRV_SYS(setsockopt, (fd, level, name, &value, sizeof(value))) < 0 ? tsrvi_error()
                                                                              : TSRV_OK;
}

/* Have close(2) reset the connection. */
static void tsrvi_reset(int fd)
{
    struct linger now;
    now.l_onoff = 1;
    now.l_linger = 0;
    TSRV_SYS(setsockopt, (fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now)));
}

/* Switch an option on that a socket can do without where it is refused. */
static int tsrvi_option_on(int fd, int level, int name)
{
    int rc = tsrvi_option(fd, level, name, 1);
    if (rc == -ENOSYS || rc == -EPERM || rc == -EACCES) {
        tsrvi_do_without(TSRVI_WITHOUT_OPTION, "an option of sockets", rc);
        rc = TSRV_OK;
    }
    return rc;
}

/* Is fd a stream socket? TSRV_OK, TSRV_EINVAL or a code; who may not ask has to believe it. */
static int tsrvi_streaming(int fd)
{
    int type = 0;
    socklen_t size = sizeof(type);
    if (TSRV_SYS(getsockopt, (fd, SOL_SOCKET, SO_TYPE, &type, &size)) == 0) {
        return type == SOCK_STREAM ? TSRV_OK : TSRV_EINVAL;
    }
    if (errno == ENOSYS || errno == EPERM || errno == EACCES) {
        return TSRV_OK;
    }
    return errno == ENOTSOCK ? TSRV_EINVAL : tsrvi_error();
}

/* No SIGPIPE from this socket. XNU refuses options (EINVAL) for a connection that is over in both
 * directions; but an accepted one has inherited it from its listener. */
static int tsrvi_no_sigpipe(int fd)
{
    int rc = TSRV_OK;
#ifdef SO_NOSIGPIPE
    rc = tsrvi_option(fd, SOL_SOCKET, SO_NOSIGPIPE, 1);
    if (rc < 0) {
        int set = 0;
        socklen_t size = sizeof(set);
        TSRV_SYS(getsockopt, (fd, SOL_SOCKET, SO_NOSIGPIPE, &set, &size));
        rc = set != 0 ? TSRV_OK : rc;
    }
#else
    (void)fd;
#endif
    return rc;
}

/* A non-blocking, close-on-exec socket, or a code. */
static int tsrvi_socket(int family, int type)
{
    int fd = -1, rc = TSRV_OK, refusal = TSRV_OK;
#if TSRVI_HAS_ACCEPT4
    fd = tsrvi_fd_own(TSRV_SYS(socket, (family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)));
    refusal = fd < 0 ? tsrvi_error() : TSRV_OK;
    if (refusal < 0 && !tsrvi_is_refusal(refusal)) {
        return refusal;
    }
#endif
    if (fd < 0) {
        fd = tsrvi_fd_own(TSRV_SYS(socket, (family, type, 0)));
        if (fd < 0) {
            return tsrvi_error();
        }
        rc = tsrvi_set_flags(fd);
    }
    if (rc < 0 || (rc = tsrvi_no_sigpipe(fd)) < 0) {
        tsrvi_close_fd(fd);
        return rc;
    }
    if (refusal < 0) {
        tsrvi_do_without(TSRVI_WITHOUT_FLAGS, "SOCK_NONBLOCK | SOCK_CLOEXEC", refusal);
    }
    return fd;
}

/* Is fd a listening stream socket? */
static int tsrvi_listening(int fd)
{
    int rc = tsrvi_streaming(fd);
#ifdef SO_ACCEPTCONN
    int value = 0;
    socklen_t size = sizeof(value);
    if (rc == TSRV_OK &&
        TSRV_SYS(getsockopt, (fd, SOL_SOCKET, SO_ACCEPTCONN, &value, &size)) == 0 && value == 0) {
        return TSRV_EINVAL;
    }
#endif
    if (rc == TSRV_OK) {
        tsrvi_no_sigpipe(fd);
    }
    return rc < 0 ? rc : tsrvi_set_flags(fd);
}

/* ============================================================================
 * >>handed  Sockets that were handed over: LISTEN_FDS, TSRV_FILE_FDS
 * ==========================================================================*/

/* Listening sockets from systemd, or from the program that this one replaces: descriptors from 3
 * on, as the environment says. See sd_listen_fds(3). */
#define TSRVI_LISTEN_FIRST 3
#define TSRVI_LISTEN_MAX 64 /* sockets of one call of tsrv_server_listen or tsrv_server_bind */
#define TSRVI_READY_VARIABLE "TSRV_READY_FD" /* whom to tell, in an upgrade, that we accept */
#define TSRVI_FILES_VARIABLE "TSRV_FILE_FDS" /* the unix sockets whose files come with them */

/* Take the descriptors into our care. */
static void tsrvi_handed_adopt(int count)
{
    tsrvi_process.handed.count = count;
    for (int i = 0; i < count; i++) {
        int fd = TSRVI_LISTEN_FIRST + i, rc = tsrvi_listening(fd);
        tsrvi_process.handed.free[i] = rc == TSRV_OK;
        if (rc < 0) {
            TSRV_SYS(fcntl, (fd, F_SETFD, FD_CLOEXEC));
            tsrvi_log(TSRV_LOG_WARNING, "LISTEN_FDS: descriptor %d is no listening stream socket",
                      fd);
        }
    }
}

/* "3,7,": of these sockets the program before this one has made the files. */
static void tsrvi_handed_read_files(const char *text)
{
    int fd = 0;
    for (; text != NULL && *text != 0 && fd < TSRVI_LISTEN_FIRST + TSRVI_HANDED_MAX; text++) {
        if (*text >= '0' && *text <= '9') {
            fd = fd * 10 + (*text - '0');
        } else {
            fd -= TSRVI_LISTEN_FIRST;
            if (fd >= 0) {
                tsrvi_process.handed.file[fd] = true;
            }
            fd = 0;
        }
    }
}

/* The variables are read once, and removed: they are not meant for our children. The lock is held.
 */
static void tsrvi_handed_read(void)
{
    const char *pid = TSRV_SYS(getenv, ("LISTEN_PID")), *fds = TSRV_SYS(getenv, ("LISTEN_FDS"));
    int count = (int)tsrvi_decimal(fds, INT_MAX);
    int ready = (int)tsrvi_decimal(TSRV_SYS(getenv, (TSRVI_READY_VARIABLE)), INT_MAX);
    struct stat info;
    tsrvi_process.handed.looked = true;
    tsrvi_process.handed.upgrade = ready > 2 && TSRV_SYS(fstat, (ready, &info)) == 0 &&
                                   S_ISFIFO(info.st_mode) && tsrvi_set_flags(ready) == TSRV_OK;
    tsrvi_process.handed.ready = tsrvi_process.handed.upgrade ? ready : -1;
    if (tsrvi_process.handed.upgrade) {
        tsrvi_handed_read_files(TSRV_SYS(getenv, (TSRVI_FILES_VARIABLE)));
    }
    TSRV_SYS(unsetenv, (TSRVI_READY_VARIABLE));
    TSRV_SYS(unsetenv, (TSRVI_FILES_VARIABLE));
    if (tsrvi_decimal(pid, INT_MAX) != (int64_t)TSRV_SYS(getpid, ())) {
        return; /* meant for another process */
    }
    if (count < 0 || count > TSRVI_HANDED_MAX) {
        tsrvi_log(TSRV_LOG_ERROR, "LISTEN_FDS is \"%s\": expected 0 to %d", fds == NULL ? "" : fds,
                  TSRVI_HANDED_MAX);
        tsrvi_process.handed.code = TSRV_EINVAL;
        count = 0;
    }
    TSRV_SYS(unsetenv, ("LISTEN_PID"));
    TSRV_SYS(unsetenv, ("LISTEN_FDS"));
    tsrvi_handed_adopt(count);
}

/* Lock what was handed over, and see to it that the variables have been read. */
static void tsrvi_handed_lock(void)
{
    tsrvi_lock(&tsrvi_process.handed.lock);
    if (!tsrvi_process.handed.looked) {
        tsrvi_handed_read();
    }
}

/* A socket that was handed over, is bound to this address and has not been taken; -1 = none. */
static int tsrvi_handed_take(const tsrvi_sockaddr *inside, size_t size)
{
    tsrv_address wanted, has;
    int taken = -1;
    tsrvi_address_store(&wanted, inside, size);
    tsrvi_handed_lock();
    for (int i = 0; i < tsrvi_process.handed.count && taken < 0; i++) {
        if (tsrvi_process.handed.free[i] &&
            tsrvi_address_get(TSRVI_LISTEN_FIRST + i, tsrvi_getsockname, &has) == TSRV_OK &&
            tsrvi_address_same(&has, &wanted)) {
            tsrvi_process.handed.free[i] = false;
            taken = TSRVI_LISTEN_FIRST + i;
        }
    }
    tsrvi_unlock(&tsrvi_process.handed.lock);
    return taken;
}

/* Is this an IPv6 socket that takes this port of IPv4 too? */
static bool tsrvi_handed_is_dual(int fd, in_port_t port)
{
    static const unsigned char everywhere[16] = {0};
    tsrv_address has;
    tsrvi_sockaddr inside;
    int only = 1;
    socklen_t size = sizeof(only);
    if (tsrvi_address_get(fd, tsrvi_getsockname, &has) < 0) {
        return false;
    }
    tsrvi_address_load(&has, &inside);
    return inside.any.sa_family == AF_INET6 && inside.six.sin6_port == port &&
           memcmp(&inside.six.sin6_addr, everywhere, sizeof(everywhere)) == 0 &&
           TSRV_SYS(getsockopt, (fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, &size)) == 0 && only == 0;
}

/* Was an IPv6 socket handed over that takes this port of IPv4 too, as systemd's do by default? */
static bool tsrvi_handed_covers(in_port_t port)
{
    bool covers = false;
    tsrvi_handed_lock();
    for (int i = 0; i < tsrvi_process.handed.count && !covers; i++) {
        covers = tsrvi_process.handed.free[i] && tsrvi_handed_is_dual(TSRVI_LISTEN_FIRST + i, port);
    }
    tsrvi_unlock(&tsrvi_process.handed.lock);
    return covers;
}

/* In an upgrade a socket that this program does not listen on any more is closed: left open, it
 * would go on taking connections that nobody accepts. systemd's are none of our business. */
static void tsrvi_handed_close_rest(void)
{
    tsrvi_handed_lock();
    for (int i = 0; i < tsrvi_process.handed.count && tsrvi_process.handed.upgrade; i++) {
        char text[TSRV_ADDRESS_SIZE] = "";
        tsrv_address address;
        int fd = TSRVI_LISTEN_FIRST + i;
        if (tsrvi_process.handed.free[i]) {
            if (tsrvi_address_get(fd, tsrvi_getsockname, &address) == TSRV_OK) {
                tsrv_address_format(&address, text, sizeof(text));
            }
            tsrvi_log(TSRV_LOG_WARNING, "upgrade: nothing listens on %s any more", text);
            tsrvi_close_fd(fd);
            tsrvi_process.handed.free[i] = false;
        }
    }
    tsrvi_unlock(&tsrvi_process.handed.lock);
}

/* Does the program that this one replaces still wait, and serve? If it has died, nobody reads the
 * pipe, which poll(2) tells by POLLERR. */
static bool tsrvi_handed_waits(void)
{
    struct pollfd entry;
    bool waits;
    tsrvi_lock(&tsrvi_process.handed.lock);
    waits = tsrvi_process.handed.upgrade && tsrvi_process.handed.ready >= 0;
    entry.fd = tsrvi_process.handed.ready;
    tsrvi_unlock(&tsrvi_process.handed.lock);
    entry.events = POLLOUT;
    entry.revents = 0;
    return waits && (TSRV_SYS(poll, (&entry, 1, 0)) <= 0 || (entry.revents & POLLERR) == 0);
}

/* Take the pipe's end on which the program that this one replaces waits; -1 = there is none. */
static int tsrvi_handed_take_ready(void)
{
    int ready;
    tsrvi_lock(&tsrvi_process.handed.lock);
    ready = tsrvi_process.handed.looked ? tsrvi_process.handed.ready : -1;
    tsrvi_process.handed.ready = -1;
    tsrvi_unlock(&tsrvi_process.handed.lock);
    return ready;
}

/* ============================================================================
 * >>bound  What this process has bound, and may have to remove
 * ==========================================================================*/

/* Listening sockets that this process has bound: the file of a unix socket goes with it, and the
 * parent of workers can stop listening at once. The program may have closed one, and its number be
 * another file's: the socket is told by its device and inode. A fork's child inherits the list. Its
 * descriptors are its own, and it may be the one that goes on, as with daemon(3); the files are
 * not. */
static tsrvi_bound_socket *tsrvi_bound_at(int index)
{
    return &(tsrvi_process.bound.many == NULL ? tsrvi_process.bound.few
                                              : tsrvi_process.bound.many)[index];
}

/* Is it still the same listening socket? Some systems have no inodes for sockets. */
static bool tsrvi_bound_is_there(const tsrvi_bound_socket *bound)
{
    struct stat info;
    int listens = 1;
#ifdef SO_ACCEPTCONN
    socklen_t size = sizeof(listens);
    TSRV_SYS(getsockopt, (bound->fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size));
#endif
    return TSRV_SYS(fstat, (bound->fd, &info)) == 0 && S_ISSOCK(info.st_mode) &&
           info.st_dev == bound->device && info.st_ino == bound->inode && listens != 0;
}

/* Does a file go with it, which is this process's? */
static bool tsrvi_bound_owns_file(const tsrvi_bound_socket *bound)
{
    return bound->has_file && bound->pid == TSRV_SYS(getpid, ()) && tsrvi_bound_is_there(bound);
}

/* Is this still the file, whatever else has its name by now? A link is not followed. */
static bool tsrvi_file_is(const char *path, dev_t device, ino_t inode)
{
    struct stat info;
    return TSRV_SYS(lstat, (path, &info)) == 0 && info.st_dev == device && info.st_ino == inode;
}

/* Is that file still there? Whatever else has its name by now is not; a link is not followed.
 *   inside  receives the address, and so the path
 * Returns 1, 0, or -errno. */
static int tsrvi_bound_sees_file(const tsrvi_bound_socket *bound, tsrvi_sockaddr *inside)
{
    struct stat info;
    socklen_t size = sizeof(*inside);
    memset(inside, 0, sizeof(*inside)); /* which ends the path */
    if (TSRV_SYS(getsockname, (bound->fd, &inside->any, &size)) < 0 ||
        TSRV_SYS(lstat, (inside->local.sun_path, &info)) < 0) {
        return tsrvi_error();
    }
    return info.st_dev == bound->file_device && info.st_ino == bound->file_inode;
}

/* Say it, unless it is not there: but with a relative path the directory may be another one. */
static void tsrvi_bound_file_stays(const tsrvi_sockaddr *inside, int code)
{
    const char *path = inside->local.sun_path;
    if (code != -ENOENT || path[0] != '/') {
        tsrvi_log(TSRV_LOG_WARNING, "the file of a socket stays, unix:%s: %s", path,
                  tsrv_strerror(code));
    }
}

static void tsrvi_bound_unlink(const tsrvi_bound_socket *bound)
{
    tsrvi_sockaddr inside;
    int rc;
    if (!tsrvi_bound_owns_file(bound) || tsrvi_handed_waits()) {
        return;
    }
    rc = tsrvi_bound_sees_file(bound, &inside);
    if (rc > 0 && TSRV_SYS(unlink, (inside.local.sun_path)) < 0) {
        rc = tsrvi_error();
    }
    if (rc < 0) {
        tsrvi_bound_file_stays(&inside, rc);
    }
}

static void tsrvi_bound_resize(tsrvi_bound_socket *many, int size)
{
    if (tsrvi_process.bound.many != NULL) {
        TSRV_SYS(munmap,
                 (tsrvi_process.bound.many, (size_t)tsrvi_process.bound.size * sizeof(*many)));
    }
    tsrvi_process.bound.many = many;
    tsrvi_process.bound.size = size;
}

static void tsrvi_bound_drop(int index)
{
    *tsrvi_bound_at(index) = *tsrvi_bound_at(--tsrvi_process.bound.count);
    if (tsrvi_process.bound.count == 0) {
        tsrvi_bound_resize(NULL, 0);
    }
}

static int tsrvi_bound_find(int fd)
{
    int index = tsrvi_process.bound.count - 1;
    while (index >= 0 && tsrvi_bound_at(index)->fd != fd) {
        index--;
    }
    return index;
}

/* Room for one more: the program may have closed some itself. */
static int tsrvi_bound_reserve(void)
{
    int size = tsrvi_process.bound.many == NULL ? TSRVI_BOUND_FEW : tsrvi_process.bound.size;
    void *many;
    if (tsrvi_process.bound.count < size) {
        return TSRV_OK;
    }
    for (int i = tsrvi_process.bound.count - 1; i >= 0; i--) {
        if (!tsrvi_bound_is_there(tsrvi_bound_at(i))) {
            tsrvi_bound_drop(i);
        }
    }
    if (tsrvi_process.bound.count < size / 2) {
        return TSRV_OK;
    }
    many = TSRV_SYS(mmap, (NULL, (size_t)size * 2 * sizeof(tsrvi_bound_socket),
                           PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (many == MAP_FAILED) {
        return -ENOMEM;
    }
    memcpy(many, tsrvi_bound_at(0), (size_t)tsrvi_process.bound.count * sizeof(tsrvi_bound_socket));
    tsrvi_bound_resize((tsrvi_bound_socket *)many, size * 2);
    return TSRV_OK;
}

/* From now on this listening socket is this process's own.
 *   path  of a unix socket's file; NULL = it has none, or it is not ours */
static int tsrvi_bound_remember(int fd, const char *path)
{
    tsrvi_bound_socket made;
    struct stat info;
    int index, rc = TSRV_OK;
    memset(&made, 0, sizeof(made));
    made.fd = fd;
    made.pid = TSRV_SYS(getpid, ());
    if (TSRV_SYS(fstat, (fd, &info)) < 0) {
        return tsrvi_error();
    }
    made.device = info.st_dev;
    made.inode = info.st_ino;
    if (path != NULL && TSRV_SYS(lstat, (path, &info)) == 0 && S_ISSOCK(info.st_mode)) {
        made.has_file = true;
        made.file_device = info.st_dev;
        made.file_inode = info.st_ino;
    }
    tsrvi_lock(&tsrvi_process.bound.lock);
    index = tsrvi_bound_find(fd);
    if (index >= 0 || (rc = tsrvi_bound_reserve()) == TSRV_OK) {
        *tsrvi_bound_at(index >= 0 ? index : tsrvi_process.bound.count++) = made;
    }
    tsrvi_unlock(&tsrvi_process.bound.lock);
    return rc;
}

/* It is about to be closed. In the process that has bound it, its file goes first: while it
 * listens, nobody takes the path for a dead server's. */
static void tsrvi_bound_forget(int fd)
{
    int index;
    tsrvi_lock(&tsrvi_process.bound.lock);
    index = tsrvi_bound_find(fd);
    if (index >= 0) {
        tsrvi_bound_unlink(tsrvi_bound_at(index));
        tsrvi_bound_drop(index);
    }
    tsrvi_unlock(&tsrvi_process.bound.lock);
}

static void tsrvi_bound_close(int fd)
{
    tsrvi_bound_forget(fd);
    tsrvi_close_fd(fd);
}

/* Put something in the place of a listening socket. */
static int tsrvi_bound_refuse(int fd, int blank)
{
    return TSRV_SYS(dup2, (blank, fd)) < 0 ? -1 : TSRV_SYS(fcntl, (fd, F_SETFD, FD_CLOEXEC));
}

/* This process stops listening, at once and on every socket that it has bound; those that share
 * them go on. Their descriptors stay open, on nothing, so that closing them is still right.
 *   keep   leave the files of unix sockets to a program that has taken them over
 *   blank  a descriptor that is nothing to listen on: no new one may be free */
static void tsrvi_bound_refuse_all(bool keep, int blank)
{
    int rc = TSRV_OK;
    tsrvi_lock(&tsrvi_process.bound.lock);
    while (tsrvi_process.bound.count > 0) {
        const tsrvi_bound_socket *bound = tsrvi_bound_at(tsrvi_process.bound.count - 1);
        if (tsrvi_bound_is_there(bound)) {
            if (!keep) {
                tsrvi_bound_unlink(bound);
            }
            rc = tsrvi_bound_refuse(bound->fd, blank) < 0 ? tsrvi_error() : rc;
        }
        tsrvi_bound_drop(tsrvi_process.bound.count - 1);
    }
    tsrvi_unlock(&tsrvi_process.bound.lock);
    if (rc < 0) {
        tsrvi_log(TSRV_LOG_ERROR, "cannot stop listening: %s", tsrv_strerror(rc));
    }
}

/* Which sockets this process has bound, or was handed over.
 *   fds  has room for `capacity`
 * Returns how many there are. */
static int tsrvi_bound_get(int *fds, int capacity)
{
    int count = 0;
    tsrvi_lock(&tsrvi_process.bound.lock);
    for (int i = 0; i < tsrvi_process.bound.count; i++) {
        if (tsrvi_bound_is_there(tsrvi_bound_at(i))) {
            if (count < capacity) {
                fds[count] = tsrvi_bound_at(i)->fd;
            }
            count++;
        }
    }
    tsrvi_unlock(&tsrvi_process.bound.lock);
    return count;
}

/* A program may bind, and then go on in a fork's child, as daemon(3) does: who starts workers owns
 * what they accept on.
 *   fd  -1 = all that there are */
static void tsrvi_bound_claim(int fd)
{
    tsrvi_lock(&tsrvi_process.bound.lock);
    for (int i = 0; i < tsrvi_process.bound.count; i++) {
        if (fd < 0 || tsrvi_bound_at(i)->fd == fd) {
            tsrvi_bound_at(i)->pid = TSRV_SYS(getpid, ());
        }
    }
    tsrvi_unlock(&tsrvi_process.bound.lock);
}

/* Is there a file that goes with this socket? Not one that another server has put in its place. */
static bool tsrvi_bound_has_file(int fd)
{
    tsrvi_sockaddr inside;
    int index, rc = 0;
    tsrvi_lock(&tsrvi_process.bound.lock);
    index = tsrvi_bound_find(fd);
    if (index >= 0 && tsrvi_bound_owns_file(tsrvi_bound_at(index))) {
        rc = tsrvi_bound_sees_file(tsrvi_bound_at(index), &inside);
    }
    tsrvi_unlock(&tsrvi_process.bound.lock);
    if (rc < 0) {
        tsrvi_bound_file_stays(&inside, rc);
    }
    return rc > 0;
}

/* A socket that was handed over is this process's own too, and so may be its file. */
static int tsrvi_bound_adopt(int fd)
{
    tsrvi_sockaddr inside;
    socklen_t size = sizeof(inside);
    bool has_file = tsrvi_process.handed.file[fd - TSRVI_LISTEN_FIRST];
    memset(&inside, 0, sizeof(inside)); /* which ends the path */
    has_file = has_file && TSRV_SYS(getsockname, (fd, &inside.any, &size)) == 0 &&
               inside.any.sa_family == AF_UNIX; /* of another it would be no path */
    return tsrvi_bound_remember(fd, has_file ? inside.local.sun_path : NULL);
}

/* A socket that was handed over, is bound to this address and has not been taken; -1 = none. */
static int tsrvi_bound_take(const tsrvi_sockaddr *inside, size_t size,
                            const tsrv_bind_options *options)
{
    int fd = tsrvi_handed_take(inside, size);
    if (fd >= 0) {
        tsrvi_bound_adopt(fd); /* without memory the parent of workers stops listening later */
    }
    if (fd >= 0 && options != NULL && options->backlog > 0) {
        TSRV_SYS(listen, (fd, options->backlog)); /* if that is refused, the old one stays */
    }
    return fd;
}

TSRV_API int tsrv_listen_fds(int *fds, int capacity)
{
    int count = 0, code;
    tsrvi_handed_lock();
    code = tsrvi_process.handed.code;
    for (int i = 0; i < tsrvi_process.handed.count; i++) {
        count += tsrvi_process.handed.free[i];
    }
    code = code < 0 ? code : TSRVI_WRONG(count > capacity) ? TSRV_EINVAL : count;
    for (int i = 0, taken = 0; taken < code; i++) {
        if (tsrvi_process.handed.free[i]) {
            fds[taken++] = TSRVI_LISTEN_FIRST + i;
            tsrvi_process.handed.free[i] = false;
        }
    }
    tsrvi_unlock(&tsrvi_process.handed.lock);
    for (int i = 0; i < code; i++) {
        tsrvi_bound_adopt(fds[i]);
    }
    return code;
}

#define TSRVI_FD_NAME_SIZE 256 /* bytes: systemd's names have at most 255 */

/* The name of a descriptor that was handed over to this process; "" = it was not. */
static const char *tsrvi_handed_name(int fd, char *buffer, size_t size)
{
    bool handed;
    tsrvi_lock(&tsrvi_process.handed.lock);
    handed = fd < TSRVI_LISTEN_FIRST + tsrvi_process.handed.count; /* and low ones have no names */
    tsrvi_unlock(&tsrvi_process.handed.lock);
    return tsrv_listen_fd_name(handed ? fd : -1, buffer, size);
}

TSRV_API const char *tsrv_listen_fd_name(int fd, char *buffer, size_t size)
{
    const char *names = TSRV_SYS(getenv, ("LISTEN_FDNAMES"));
    size_t length = 0;
    if (size == 0) {
        return "";
    }
    names = fd < TSRVI_LISTEN_FIRST ? NULL : names;
    for (int i = TSRVI_LISTEN_FIRST; names != NULL && i < fd; i++) {
        names = strchr(names, ':');
        names = names == NULL ? NULL : names + 1;
    }
    while (names != NULL && names[length] != 0 && names[length] != ':' && length < size - 1) {
        buffer[length] = names[length];
        length++;
    }
    buffer[length] = 0;
    return buffer;
}

/* ============================================================================
 * >>bind  Binding
 * ==========================================================================*/

static int tsrvi_backlog(const tsrv_bind_options *options)
{
    return options == NULL || options->backlog <= 0 ? 128 : options->backlog;
}

/* TSRV_OK when nobody serves this unix socket, so that its file may be taken away; -EADDRINUSE when
 * somebody does; or why that cannot be told. */
static int tsrvi_unix_unserved(const tsrvi_sockaddr *inside, socklen_t size)
{
    int fd = tsrvi_socket(AF_UNIX, SOCK_STREAM), rc = TSRV_OK;
    if (fd < 0) {
        return fd;
    }
    if (TSRV_SYS(connect, (fd, &inside->any, size)) == 0 || errno != ECONNREFUSED) {
        rc = -EADDRINUSE;
    }
    tsrvi_close_fd(fd);
    return rc;
}

/* Make room for a unix socket's file: only a socket that nobody serves is removed. lstat: a link is
 * never followed. */
static int tsrvi_unix_clear(const tsrvi_sockaddr *inside, socklen_t size)
{
    struct stat info;
    int rc;
    if (TSRV_SYS(lstat, (inside->local.sun_path, &info)) < 0) {
        return errno == ENOENT ? TSRV_OK : tsrvi_error();
    }
    if (!S_ISSOCK(info.st_mode)) {
        return -EEXIST;
    }
    rc = tsrvi_unix_unserved(inside, size);
    if (rc < 0) {
        return rc;
    }
    return TSRV_SYS(unlink, (inside->local.sun_path)) < 0 && errno != ENOENT ? tsrvi_error()
                                                                             : TSRV_OK;
}

/* Fill in a unix address; "@name" is abstract and not terminated. */
static int tsrvi_unix_address(const char *path, tsrvi_sockaddr *inside, socklen_t *size)
{
    size_t length = strlen(path);
    struct sockaddr_un *local = &inside->local;
    memset(inside, 0, sizeof(*inside));
    if (length == 0) {
        return tsrvi_mistake("\"unix:\"", "the path is empty");
    }
    if (length >= sizeof(local->sun_path)) {
        return -ENAMETOOLONG;
    }
    local->sun_family = AF_UNIX;
    memcpy(local->sun_path, path, length);
    if (path[0] == '@') {
        local->sun_path[0] = 0;
    } else {
        length++;
    }
    *size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length);
    TSRVI_SET_LENGTH(local->sun_len, *size);
    return TSRV_OK;
}

#define TSRVI_UNIX_LOCK_TRIES 100 /* for a lock that somebody else holds, and the time */
#define TSRVI_UNIX_LOCK_MS 10     /* between two */

/* Between bind and listen a unix socket looks as if nobody served it, and whoever looks may take
 * its path: so one at a time does either, in each directory. The lock is on the directory itself,
 * and leaves nothing behind. -1 = there is none to be had: the directory cannot be read, its file
 * system has no locks, or somebody holds it for other purposes, as flock(1) does. */
static int tsrvi_unix_lock(const char *path)
{
#if TSRVI_HAS_FLOCK
    char directory[sizeof(struct sockaddr_un)];
    const char *slash = strrchr(path, '/');
    int fd, length = slash == NULL || slash == path ? 1 : (int)(slash - path);
    snprintf(directory, sizeof(directory), "%.*s", length, slash == NULL ? "." : path);
    fd = tsrvi_fd_own(TSRV_SYS(open, (directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC)));
    for (int tries = 0; fd >= 0 && TSRV_SYS(flock, (fd, LOCK_EX | LOCK_NB)) < 0; tries++) {
        if ((errno != EWOULDBLOCK && errno != EINTR) || tries == TSRVI_UNIX_LOCK_TRIES) {
            tsrvi_close_fd(fd);
            return -1;
        }
        TSRV_SYS(poll, (NULL, 0, TSRVI_UNIX_LOCK_MS));
    }
    return fd;
#else
    (void)path;
    return -1;
#endif
}

/* Not by closing alone: another thread's fork may have copied the descriptor, and the lock with
 * it. */
static void tsrvi_unix_unlock(int lock)
{
#if TSRVI_HAS_FLOCK
    if (lock >= 0) {
        TSRV_SYS(flock, (lock, LOCK_UN));
    }
#endif
    tsrvi_close_fd(lock);
}

/* Give a socket's file its mode, and no other file that may have got its name: chmod follows links.
 * Where fchmod before bind counts, this has only to add what the umask has taken away. */
static int tsrvi_unix_chmod(const char *path, mode_t mode, const struct stat *made)
{
    int rc = TSRV_OK;
    if ((made->st_mode & 07777) == mode) {
        return TSRV_OK;
    }
#if TSRVI_HAS_O_PATH
    char name[32];
    struct stat info;
    int fd = tsrvi_fd_own(TSRV_SYS(open, (path, O_PATH | O_NOFOLLOW | O_CLOEXEC)));
    if (fd < 0) {
        return tsrvi_error();
    }
    snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
    if (TSRV_SYS(fstat, (fd, &info)) < 0) {
        rc = tsrvi_error();
    } else if (info.st_dev != made->st_dev || info.st_ino != made->st_ino) {
        rc = -EADDRINUSE;
    } else if (TSRV_SYS(chmod, (name, mode)) < 0 &&
               (errno != ENOENT || TSRV_SYS(chmod, (path, mode)) < 0)) { /* without a /proc */
        rc = tsrvi_error();
    }
    tsrvi_close_fd(fd);
#else
    if (TSRV_SYS(fchmodat, (AT_FDCWD, path, mode, AT_SYMLINK_NOFOLLOW)) < 0) {
        rc = tsrvi_error();
    }
#endif
    return rc;
}

/* Bind a unix socket and listen. Its permissions are right before anybody can connect: that takes
 * listen. Whoever had no lock may have taken the file for a dead server's meanwhile. */
static int tsrvi_unix_listen(int fd, const char *path, const tsrvi_sockaddr *inside, socklen_t size,
                             const tsrv_bind_options *options)
{
    mode_t mode = options == NULL || options->unix_mode == 0 ? 0600 : (mode_t)options->unix_mode;
    bool has_file = path[0] != '@';
    struct stat made;
    int rc = TSRV_OK;
    if (has_file) {
        TSRV_SYS(fchmod, (fd, mode)); /* Linux makes the file so, less the umask */
    }
    if (TSRV_SYS(bind, (fd, &inside->any, size)) < 0) {
        return tsrvi_error();
    }
    if (has_file && TSRV_SYS(lstat, (path, &made)) < 0) {
        return tsrvi_error();
    }
    if (has_file && !S_ISSOCK(made.st_mode)) {
        return -EADDRINUSE; /* the file that bind made is gone already */
    }
    rc = tsrvi_bound_remember(fd, has_file ? path : NULL);
    if (rc == TSRV_OK && has_file) {
        rc = tsrvi_unix_chmod(path, mode, &made);
    }
    if (rc == TSRV_OK && TSRV_SYS(listen, (fd, tsrvi_backlog(options))) < 0) {
        rc = tsrvi_error();
    }
    if (has_file && !tsrvi_file_is(path, made.st_dev, made.st_ino)) {
        rc = rc == TSRV_OK ? -EADDRINUSE : rc;
    } else if (has_file && rc < 0) {
        TSRV_SYS(unlink, (path)); /* what has never listened leaves no file behind */
    }
    return rc;
}

/* A new unix socket, or a code. */
static int tsrvi_unix_new(const char *path, const tsrvi_sockaddr *inside, socklen_t size,
                          const tsrv_bind_options *options)
{
    int fd, rc = path[0] == '@' ? (int)TSRV_OK : tsrvi_unix_clear(inside, size);
    if (rc < 0) {
        return rc;
    }
    if ((fd = tsrvi_socket(AF_UNIX, SOCK_STREAM)) < 0) {
        return fd;
    }
    if ((rc = tsrvi_unix_listen(fd, path, inside, size, options)) < 0) {
        tsrvi_bound_close(fd);
        return rc;
    }
    return fd;
}

TSRV_API int tsrv_bind_unix_socket(const char *path, const tsrv_bind_options *options, int *fd)
{
    tsrvi_sockaddr inside;
    socklen_t size = 0;
    int lock, made, rc = tsrvi_unix_address(path, &inside, &size);
    *fd = -1;
    if (rc < 0 || (*fd = tsrvi_bound_take(&inside, size, options)) >= 0) {
        return rc;
    }
    lock = path[0] == '@' ? -1 : tsrvi_unix_lock(path);
    made = tsrvi_unix_new(path, &inside, size, options);
    tsrvi_unix_unlock(lock);
    if (made < 0) {
        return made;
    }
    *fd = made;
    return TSRV_OK;
}

/* The options that a listener must have before it is bound.
 *   only  an IPv6 socket does not take IPv4's port too, as else it may, depending on the system */
static int tsrvi_bind_prepare(int fd, int family, const tsrv_bind_options *options, int only)
{
    int rc = tsrvi_option_on(fd, SOL_SOCKET, SO_REUSEADDR);
    if (rc == TSRV_OK && options != NULL && options->reuse_port) {
#ifdef SO_REUSEPORT
        rc = tsrvi_option(fd, SOL_SOCKET, SO_REUSEPORT, 1);
#else
        rc = TSRV_ENOTSUP;
#endif
    }
    return rc == TSRV_OK && family == AF_INET6 ? tsrvi_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, only)
                                               : rc;
}

/* A new listening socket. */
static int tsrvi_bind_new(const tsrvi_sockaddr *inside, socklen_t size,
                          const tsrv_bind_options *options, int only)
{
    int fd = tsrvi_socket(inside->any.sa_family, SOCK_STREAM), rc;
    if (fd < 0) {
        return fd;
    }
    rc = tsrvi_bind_prepare(fd, inside->any.sa_family, options, only);
    if (rc == TSRV_OK && (TSRV_SYS(bind, (fd, &inside->any, size)) < 0 ||
                          TSRV_SYS(listen, (fd, tsrvi_backlog(options))) < 0)) {
        rc = tsrvi_error();
    }
    if (rc == TSRV_OK) {
        rc = tsrvi_bound_remember(fd, NULL);
    }
    if (rc < 0) {
        tsrvi_close_fd(fd);
        return rc;
    }
    return fd;
}

/* One listening socket for one result of getaddrinfo; port is in network order. */
static int tsrvi_bind_one(const struct addrinfo *info, in_port_t port,
                          const tsrv_bind_options *options)
{
    tsrvi_sockaddr inside;
    int fd;
    memset(&inside, 0, sizeof(inside));
    memcpy(&inside, info->ai_addr, tsrvi_min(info->ai_addrlen, sizeof(inside)));
    if (info->ai_family == AF_INET6) {
        inside.six.sin6_port = port;
    } else {
        inside.four.sin_port = port;
    }
    fd = tsrvi_bound_take(&inside, info->ai_addrlen, options);
    return fd >= 0 ? fd : tsrvi_bind_new(&inside, info->ai_addrlen, options, 1);
}

/* Results that are not meant for us: a repeated one, and macOS's link-local "localhost". */
static bool tsrvi_bind_skips(const struct addrinfo *all, const struct addrinfo *info,
                             bool localhost)
{
    if (localhost && info->ai_family == AF_INET6) {
        tsrvi_sockaddr inside;
        memcpy(&inside.six, info->ai_addr, sizeof(inside.six));
        if (inside.six.sin6_scope_id != 0) {
            return true;
        }
    }
    for (const struct addrinfo *other = all; other != info; other = other->ai_next) {
        if (other->ai_addrlen == info->ai_addrlen &&
            memcmp(other->ai_addr, info->ai_addr, info->ai_addrlen) == 0) {
            return true;
        }
    }
    return false;
}

/* Errors that mean "not this family": the host does not have it, or a policy denies it. Another
 * address may do. */
static bool tsrvi_bind_forgives(int rc, int family, bool explicit_address)
{
    return rc == -EAFNOSUPPORT || rc == -EPROTONOSUPPORT || rc == -ENOPROTOOPT || rc == -ENOSYS ||
           rc == -EPERM || rc == -EACCES ||
           (rc == -EADDRNOTAVAIL && family == AF_INET6 && !explicit_address);
}

/* Bind every result, IPv4 first. Returns how many, or an error with none open. *shared: the port
 * came from the kernel. */
static int tsrvi_bind_all(const struct addrinfo *all, int port, const char *address,
                          const tsrv_bind_options *options, int *fds, int capacity, bool *shared)
{
    static const int families[] = {AF_INET, AF_INET6};
    bool localhost = address != NULL && strcmp(address, "localhost") == 0;
    bool explicit_address = address != NULL && address[0] != 0 && !localhost;
    bool both = !explicit_address && !localhost && (options == NULL || options->family == 0);
    in_port_t bound = htons((uint16_t)port);
    int count = 0, last = -EADDRNOTAVAIL;
    *shared = false;
    for (int pass = 0; pass < 2; pass++) {
        for (const struct addrinfo *info = all; info != NULL; info = info->ai_next) {
            int fd;
            tsrv_address name;
            if (info->ai_family != families[pass] || tsrvi_bind_skips(all, info, localhost)) {
                continue;
            }
            if (pass == 0 && both && tsrvi_handed_covers(bound)) {
                continue; /* the other one takes IPv4 too */
            }
            fd = count == capacity
                     ? tsrvi_mistake("tsrv_bind_sockets", "more addresses than capacity")
                     : tsrvi_bind_one(info, bound, options);
            if (fd < 0 && !tsrvi_bind_forgives(fd, info->ai_family, explicit_address)) {
                while (count > 0) {
                    tsrvi_bound_close(fds[--count]);
                }
                return fd;
            }
            if (fd < 0) {
                last = fd;
                continue;
            }
            fds[count++] = fd;
            if (bound == 0 && tsrvi_address_get(fd, tsrvi_getsockname, &name) == TSRV_OK) {
                bound = htons((uint16_t)tsrv_address_port(&name));
                *shared = true;
            }
        }
    }
    if (count > 0 && tsrvi_is_refusal(last)) {
        tsrvi_do_without(TSRVI_WITHOUT_FAMILY, "a family of addresses", last);
    }
    return count > 0 ? count : last;
}

/* The addresses of a host; NULL with AI_PASSIVE = every interface. A number is not looked up. */
static int tsrvi_resolve(const char *host, int port, int family, int flags, struct addrinfo **all)
{
    struct addrinfo hints;
    char service[16];
    int rc;
    memset(&hints, 0, sizeof(hints));
    hints.ai_family = family;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = flags | AI_NUMERICSERV;
    snprintf(service, sizeof(service), "%d", port);
    rc = TSRV_SYS(getaddrinfo, (host, service, &hints, all));
    if (rc == 0) {
        return TSRV_OK;
    }
    return rc == EAI_MEMORY ? -ENOMEM : rc == EAI_SYSTEM ? tsrvi_error() : TSRV_ERESOLVE;
}

TSRV_API int tsrv_bind_sockets(int port, const char *address, const tsrv_bind_options *options,
                               int *fds, int capacity)
{
    struct addrinfo *all = NULL;
    bool shared = false;
    int rc, tries = 0;
    if (TSRVI_WRONG(capacity < 1)) {
        return TSRV_EINVAL;
    }
    if (address != NULL && strncmp(address, "unix:", 5) == 0) {
        rc = tsrv_bind_unix_socket(address + 5, options, &fds[0]);
        return rc < 0 ? rc : 1;
    }
    if (TSRVI_WRONG(port < 0 || port > 65535)) {
        return TSRV_EINVAL;
    }
    rc = tsrvi_resolve(address == NULL || address[0] == 0 ? NULL : address, 0,
                       options == NULL ? 0 : options->family, AI_PASSIVE, &all);
    if (rc < 0) {
        return rc;
    }
    /* The port that the kernel chose for the first socket may be taken in the other family: choose
     * anew. */
    do {
        rc = tsrvi_bind_all(all, port, address, options, fds, capacity, &shared);
    } while (rc == -EADDRINUSE && shared && ++tries < 16);
    TSRV_SYS(freeaddrinfo, (all));
    return rc;
}

/* ============================================================================
 * >>tls  Contexts: names, protocols, times
 *
 * Without TSRV_TLS_OPENSSL the functions that make one say so.
 * ==========================================================================*/

#if TSRVI_HAS_TLS
#define TSRVI_TLS_CIPHERS "ECDHE+AESGCM:ECDHE+CHACHA20" /* forward-secret AEAD; for TLS 1.2 */
#define TSRVI_TLS_DIGEST 32                             /* bytes of SHA-256 */
#define TSRVI_TLS_TICKET_LIFE 7200                      /* seconds that a session can be resumed */

/* What a tsrv_tls was made of; sessions keep it when the tsrv_tls gets another. */
typedef struct tsrvi_tls_set {
    int references; /* atomic */
    SSL_CTX *context;
    SSL_CTX **others; /* for the names of SNI */
    char **names;
    int count;
    bool native; /* the context is the program's */
    bool system; /* clients trust whom the system does, and that has not been read yet */
    bool serves; /* there is a certificate */
    int (*on_server_name)(const char *name, tsrv_tls **tls, void *context);
    void *user_context;
    int ticket_hours;
    unsigned char secret[TSRVI_TLS_DIGEST]; /* that the keys of session tickets are made from */
    unsigned char *answer;                  /* of OCSP, to staple; NULL = none */
    int answer_size;
    int64_t answer_until; /* seconds since 1970 */
    unsigned alpn_size;
    unsigned char alpn[256]; /* as on the wire: sizes and names */
} tsrvi_tls_set;

struct tsrv_tls {
    tsrv_tls_options options; /* strings are copies */
    tsrv_tls_certificate *certificates;
    tsrvi_tls_set *set;
    unsigned char secret[TSRVI_TLS_DIGEST]; /* stays, whatever is reloaded */
};

static void tsrvi_tls_set_drop(tsrvi_tls_set *set)
{
    if (set == NULL || __atomic_sub_fetch(&set->references, 1, __ATOMIC_ACQ_REL) != 0) {
        return;
    }
    SSL_CTX_free(set->context);
    for (int i = 0; i < set->count; i++) {
        SSL_CTX_free(set->others[i]);
        TSRV_FREE(set->names[i]);
    }
    TSRV_FREE(set->others);
    TSRV_FREE(set->names);
    OPENSSL_free(set->answer);
    OPENSSL_cleanse(set->secret, sizeof(set->secret));
    TSRV_FREE(set);
}

/* Another session's errors are not this one's. To ask first is cheaper than to clear what is
 * empty. */
static void tsrvi_tls_forget_errors(void)
{
    if (TSRVI_UNLIKELY(ERR_peek_error() != 0)) {
        ERR_clear_error();
    }
}

/* Does an error say no more than that there is no key? OpenSSL 3 tries all kinds of them. */
static bool tsrvi_tls_is_no_key(unsigned long code)
{
#ifdef ERR_LIB_OSSL_DECODER
    return ERR_GET_LIB(code) == ERR_LIB_OSSL_DECODER;
#else
    (void)code;
    return false;
#endif
}

/* OpenSSL's reason for what has just failed; its queue of errors is empty afterwards. The first one
 * is the root: those behind it only say which calls it was handed up through. */
static const char *tsrvi_tls_reason(char *buffer, size_t size)
{
    unsigned long code = ERR_peek_error();
    const char *reason = code == 0 ? NULL : ERR_reason_error_string(code);
    if (ERR_GET_LIB(code) == ERR_LIB_SYS) {
        reason = strerror(ERR_GET_REASON(code)); /* OpenSSL 3 leaves these to the system */
    }
    if (tsrvi_tls_is_no_key(code)) {
        reason = "no start line of a key in PEM format"; /* of OpenSSL 3: "unsupported" */
    }
    snprintf(buffer, size, "%s", reason == NULL ? "unknown reason" : reason);
    ERR_clear_error();
    return buffer;
}

/* An option cannot be followed.
 *   value   a file's name, or what else it is set to; NULL = left out
 *   reason  NULL = OpenSSL's */
static int tsrvi_tls_complain(const char *option, const char *value, const char *reason)
{
    char buffer[128];
    if (reason == NULL) {
        reason = tsrvi_tls_reason(buffer, sizeof(buffer));
    }
    ERR_clear_error();
    tsrvi_log(TSRV_LOG_ERROR, "TLS: %s%s%s: %s", option, value == NULL ? "" : " ",
              value == NULL ? "" : value, reason);
    return TSRV_ETLS;
}

/* ---- contexts --------------------------------------------------------------*/

/* "h2,http/1.1" as ALPN wants it: each name behind its size. */
static int tsrvi_tls_alpn_parse(const char *names, tsrvi_tls_set *set)
{
    set->alpn_size = 0;
    while (names != NULL && *names != 0) {
        const char *comma = strchr(names, ',');
        size_t size = comma == NULL ? strlen(names) : (size_t)(comma - names);
        if (size == 0 || size > 255 || set->alpn_size + size + 1 > sizeof(set->alpn)) {
            tsrvi_log(TSRV_LOG_ERROR, "TLS: the ALPN list (alpn) is malformed, or too long");
            return TSRV_EINVAL;
        }
        set->alpn[set->alpn_size] = (unsigned char)size;
        memcpy(set->alpn + set->alpn_size + 1, names, size);
        set->alpn_size += (unsigned)size + 1;
        names += comma != NULL && comma[1] != 0 ? size + 1 : size;
    }
    return TSRV_OK;
}

/* Where an SSL of a native_context, which several tsrv_tls may have, keeps its own set. */
static int tsrvi_tls_set_index(void)
{
    int *index = &tsrvi_process.tls_index;
    int made = __atomic_load_n(index, __ATOMIC_ACQUIRE), nobodys = 0;
    if (made == 0) {
        made = 1 + SSL_get_ex_new_index(0, NULL, NULL, NULL, NULL);
        if (!__atomic_compare_exchange_n(index, &nobodys, made, false, __ATOMIC_ACQ_REL,
                                         __ATOMIC_ACQUIRE)) {
            made = nobodys; /* another thread's */
        }
    }
    return made - 1;
}

static bool tsrvi_tls_set_note(SSL *ssl, tsrvi_tls_set *set)
{
    return !set->native || set->alpn_size == 0 ||
           SSL_set_ex_data(ssl, tsrvi_tls_set_index(), set) == 1;
}

/* The first of our names that the client offers; no common one is an error (RFC 7301, 3.2). An SSL
 * of a native_context may be nobody's here, or that of a tsrv_tls without names. */
static int tsrvi_tls_alpn_select(SSL *ssl, const unsigned char **out, unsigned char *out_size,
                                 const unsigned char *in, unsigned in_size, void *context)
{
    const tsrvi_tls_set *set =
        (const tsrvi_tls_set *)(context != NULL ? context
                                                : SSL_get_ex_data(ssl, tsrvi_tls_set_index()));
    unsigned char *chosen = NULL;
    if (set == NULL) {
        return SSL_TLSEXT_ERR_NOACK;
    }
    if (SSL_select_next_proto(&chosen, out_size, set->alpn, set->alpn_size, in, in_size) !=
        OPENSSL_NPN_NEGOTIATED) {
        return SSL_TLSEXT_ERR_ALERT_FATAL;
    }
    *out = chosen;
    return SSL_TLSEXT_ERR_OK;
}

static char tsrvi_lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c;
}

/* Does a certificate's name, perhaps with "*." for one label, stand for this host? */
static bool tsrvi_tls_name_matches(const char *pattern, const char *host)
{
    if (pattern[0] == '*' && pattern[1] == '.') {
        const char *dot = strchr(host, '.');
        if (dot == NULL || dot == host) {
            return false;
        }
        host = dot;
        pattern++;
    }
    while (*pattern != 0 && tsrvi_lower(*pattern) == tsrvi_lower(*host)) {
        pattern++;
        host++;
    }
    return *pattern == 0 && *host == 0;
}

/* The client names the host that it wants: exact names before wildcards; others get the default. */
static int tsrvi_tls_choose(SSL *ssl, int *alert, void *context)
{
    const tsrvi_tls_set *set = (const tsrvi_tls_set *)context;
    const char *host = SSL_get_servername(ssl, TLSEXT_NAMETYPE_host_name);
    *alert = SSL_AD_INTERNAL_ERROR; /* without memory */
    if (SSL_get_SSL_CTX(ssl) != set->context) {
        return SSL_TLSEXT_ERR_OK; /* on_server_name has chosen one, which OpenSSL does not mind */
    }
    for (int pass = 0; host != NULL && pass < 2; pass++) {
        for (int i = 0; i < set->count; i++) {
            if ((set->names[i][0] == '*') == (pass == 1) &&
                tsrvi_tls_name_matches(set->names[i], host)) {
                return SSL_set_SSL_CTX(ssl, set->others[i]) != NULL ? SSL_TLSEXT_ERR_OK
                                                                    : SSL_TLSEXT_ERR_ALERT_FATAL;
            }
        }
    }
    return SSL_TLSEXT_ERR_OK;
}

/* ---- times -----------------------------------------------------------------*/

/* Seconds since 1970. */
static int64_t tsrvi_tls_now(void)
{
    struct timespec now;
    now.tv_sec = 0;
    TSRV_SYS(clock_gettime, (CLOCK_REALTIME, &now));
    return (int64_t)now.tv_sec;
}

/* Seconds until then; negative = it is over. What is no date is over, too. */
static int64_t tsrvi_tls_until(const ASN1_TIME *then)
{
    int days = 0, seconds = 0;
    if (ASN1_TIME_diff(&days, &seconds, NULL, then) != 1) {
        ERR_clear_error();
        return -1;
    }
    return (int64_t)days * 86400 + seconds;
}

/* ============================================================================
 * >>tls_files  What contexts are made from: certificates, keys, lists, answers
 *
 * All of it is read by us, from a file or from a text, so that both are held to
 * the same rules. Whom a context trusts is digested as it is read: a session can
 * be resumed where the digest is the same, and a CA or a list that has changed
 * has every client show its certificate again.
 * ==========================================================================*/

#define TSRVI_TLS_SOON (7 * 86400) /* seconds; who sees to certificates needs them to act */

/* Where to read something from. */
typedef struct tsrvi_tls_source {
    const char *option; /* its name, for the log */
    const char *file;   /* NULL = a text */
    const char *text;   /* NULL too = nothing */
} tsrvi_tls_source;

/* One of two options; both NULL = there is nothing to read. */
static tsrvi_tls_source tsrvi_tls_either(const char *file_option, const char *file,
                                         const char *text_option, const char *text)
{
    tsrvi_tls_source source;
    source.option = file != NULL ? file_option : text_option;
    source.file = file;
    source.text = text;
    return source;
}

static bool tsrvi_tls_is_given(const tsrvi_tls_source *source)
{
    return source->file != NULL || source->text != NULL;
}

static BIO *tsrvi_tls_open(const tsrvi_tls_source *source)
{
    return source->file != NULL ? BIO_new_file(source->file, "rb")
                                : BIO_new_mem_buf(source->text, -1);
}

static void tsrvi_tls_warn(const tsrvi_tls_source *source, const char *what, const ASN1_TIME *when)
{
    struct tm date;
    memset(&date, 0, sizeof(date));
    ASN1_TIME_to_tm(when, &date);
    tsrvi_log(TSRV_LOG_WARNING, "TLS: %s%s%s: %s %04d-%02d-%02d %02d:%02d:%02d UTC", source->option,
              source->file == NULL ? "" : " ", source->file == NULL ? "" : source->file, what,
              date.tm_year + 1900, date.tm_mon + 1, date.tm_mday, date.tm_hour, date.tm_min,
              date.tm_sec);
}

/* ---- a certificate and its key ---------------------------------------------*/

/* A server has nobody to ask: without a password OpenSSL would, on the terminal. */
typedef struct tsrvi_tls_password {
    const char *text; /* NULL = there is none */
    bool asked;
} tsrvi_tls_password;

static int tsrvi_tls_give_password(char *buffer, int size, int writing, void *context)
{
    tsrvi_tls_password *password = (tsrvi_tls_password *)context;
    size_t length;
    (void)writing;
    password->asked = true;
    length = password->text == NULL ? 0 : strlen(password->text);
    if (password->text == NULL || length > (size_t)size) {
        return -1;
    }
    memcpy(buffer, password->text, length);
    return (int)length;
}

/* Clients will refuse a certificate out of its time; that is no reason not to serve the others. */
static void tsrvi_tls_check_dates(const X509 *own, const tsrvi_tls_source *source)
{
    const ASN1_TIME *begin = X509_get0_notBefore(own), *end = X509_get0_notAfter(own);
    int64_t left = tsrvi_tls_until(end);
    if (left < 0) {
        tsrvi_tls_warn(source, "the certificate has expired on", end);
    } else if (tsrvi_tls_until(begin) > 0) {
        tsrvi_tls_warn(source, "the certificate is not valid before", begin);
    } else if (left < TSRVI_TLS_SOON) {
        tsrvi_tls_warn(source, "the certificate expires on", end);
    }
}

/* OpenSSL notes down what a certificate may be used for when it first has to know, and for good:
 * had it no memory just then, within a handshake, the certificate would be a broken one from there
 * on, and nobody whom it vouches for would be let in. So it has to know now. False: there is no
 * memory. One that is broken in itself is left to those who verify. */
static bool tsrvi_tls_note(X509 *one)
{
    X509 *again;
    bool broken;
    if (X509_check_purpose(one, -1, 0) == 1) {
        return true;
    }
    again = X509_dup(one);
    broken = again != NULL && X509_check_purpose(again, -1, 0) != 1;
    X509_free(again);
    if (broken) {
        ERR_clear_error();
    }
    return broken;
}

/* The certificate, and behind it its chain. What is no certificate is passed over. */
static bool tsrvi_tls_read_chain(SSL_CTX *context, BIO *bio)
{
    tsrvi_tls_password none = {NULL, false};
    X509 *one = PEM_read_bio_X509_AUX(bio, NULL, tsrvi_tls_give_password, &none);
    bool good = one != NULL && SSL_CTX_use_certificate(context, one) == 1 && tsrvi_tls_note(one);
    X509_free(one);
    while (good && (one = PEM_read_bio_X509(bio, NULL, tsrvi_tls_give_password, &none)) != NULL) {
        good = SSL_CTX_add0_chain_cert(context, one) == 1;
        if (!good) {
            X509_free(one);
        }
    }
    /* The end is an error, too, and nothing else is: without memory OpenSSL may say none at all. */
    good = good && ERR_GET_LIB(ERR_peek_last_error()) == ERR_LIB_PEM &&
           ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
    if (good) {
        ERR_clear_error();
    }
    return good;
}

static int tsrvi_tls_load_certificate(SSL_CTX *context, const tsrvi_tls_source *source)
{
    BIO *bio = tsrvi_tls_open(source);
    bool good = bio != NULL && tsrvi_tls_read_chain(context, bio);
    BIO_free(bio);
    if (!good) {
        return tsrvi_tls_complain(source->option, source->file, NULL);
    }
    tsrvi_tls_check_dates(SSL_CTX_get0_certificate(context), source);
    return TSRV_OK;
}

/* Say why a key cannot be used. */
static int tsrvi_tls_complain_of_key(const tsrvi_tls_source *source, bool other,
                                     const tsrvi_tls_password *password)
{
    char reason[160];
    size_t used;
    if (other) {
        return tsrvi_tls_complain(source->option, source->file,
                                  "it does not belong to the certificate");
    }
    if (!password->asked) {
        return tsrvi_tls_complain(source->option, source->file, NULL);
    }
    if (password->text == NULL) {
        return tsrvi_tls_complain(source->option, source->file,
                                  "it is encrypted, and there is no key_password");
    }
    if (tsrvi_tls_is_no_key(ERR_peek_error())) { /* what a wrong password has made of it */
        return tsrvi_tls_complain(source->option, source->file, "key_password does not open it");
    }
    used = (size_t)snprintf(reason, sizeof(reason), "key_password does not open it: ");
    tsrvi_tls_reason(reason + used, sizeof(reason) - used);
    return tsrvi_tls_complain(source->option, source->file, reason);
}

/* The key, which must belong to the certificate that was loaded before. */
static int tsrvi_tls_load_key(SSL_CTX *context, const tsrvi_tls_source *source,
                              const char *key_password)
{
    tsrvi_tls_password password = {key_password, false};
    BIO *bio = tsrvi_tls_open(source);
    EVP_PKEY *key =
        bio == NULL ? NULL : PEM_read_bio_PrivateKey(bio, NULL, tsrvi_tls_give_password, &password);
    bool taken = key != NULL && SSL_CTX_use_PrivateKey(context, key) == 1;
    bool other = taken || ERR_GET_LIB(ERR_peek_error()) == ERR_LIB_X509;
    int rc = taken && SSL_CTX_check_private_key(context) == 1
                 ? (int)TSRV_OK
                 : tsrvi_tls_complain_of_key(source, other, &password);
    EVP_PKEY_free(key);
    BIO_free(bio);
    return rc;
}

/* ---- whom to trust ---------------------------------------------------------*/

/* Have a digest cover some more bytes. */
static bool tsrvi_tls_digest(unsigned char *digest, const void *data, size_t size)
{
    unsigned char both[2 * TSRVI_TLS_DIGEST];
    memcpy(both, digest, TSRVI_TLS_DIGEST);
    return EVP_Digest(data, size, both + TSRVI_TLS_DIGEST, NULL, EVP_sha256(), NULL) == 1 &&
           EVP_Digest(both, sizeof(both), digest, NULL, EVP_sha256(), NULL) == 1;
}

/* Take over a certificate to trust, whose name clients are told to choose theirs by. */
static bool tsrvi_tls_take_ca(SSL_CTX *context, X509 *one, unsigned char *digest)
{
    unsigned char own[TSRVI_TLS_DIGEST];
    return tsrvi_tls_note(one) && X509_STORE_add_cert(SSL_CTX_get_cert_store(context), one) == 1 &&
           SSL_CTX_add_client_CA(context, one) == 1 &&
           X509_digest(one, EVP_sha256(), own, NULL) == 1 &&
           tsrvi_tls_digest(digest, own, sizeof(own));
}

/* Take over a list of revoked certificates. */
static bool tsrvi_tls_take_crl(SSL_CTX *context, X509_CRL *list, const tsrvi_tls_source *source,
                               unsigned char *digest)
{
    const ASN1_TIME *end = X509_CRL_get0_nextUpdate(list);
    unsigned char own[TSRVI_TLS_DIGEST];
    if (end != NULL && tsrvi_tls_until(end) < 0) {
        tsrvi_tls_warn(source, "whom its CA has signed is refused: the list has expired on", end);
    }
    return X509_STORE_add_crl(SSL_CTX_get_cert_store(context), list) == 1 &&
           X509_CRL_digest(list, EVP_sha256(), own, NULL) == 1 &&
           tsrvi_tls_digest(digest, own, sizeof(own));
}

/* Read all certificates, or all lists. */
static int tsrvi_tls_load_all(SSL_CTX *context, const tsrvi_tls_source *source, bool lists,
                              unsigned char *digest)
{
    tsrvi_tls_password none = {NULL, false};
    BIO *bio = tsrvi_tls_open(source);
    STACK_OF(X509_INFO) *all =
        bio == NULL ? NULL : PEM_X509_INFO_read_bio(bio, NULL, tsrvi_tls_give_password, &none);
    bool good = all != NULL;
    int taken = 0;
    BIO_free(bio);
    for (int i = 0; good && i < sk_X509_INFO_num(all); i++) {
        const X509_INFO *info = sk_X509_INFO_value(all, i);
        if (lists ? info->crl != NULL : info->x509 != NULL) {
            good = lists ? tsrvi_tls_take_crl(context, info->crl, source, digest)
                         : tsrvi_tls_take_ca(context, info->x509, digest);
            taken++;
        }
    }
    sk_X509_INFO_pop_free(all, X509_INFO_free);
    if (!good || taken == 0) {
        return tsrvi_tls_complain(source->option, source->file,
                                  !good   ? NULL
                                  : lists ? "no list of revoked certificates in PEM format"
                                          : "no certificate in PEM format");
    }
    return TSRV_OK;
}

/* Whom to trust, and whether clients must show a certificate. */
static int tsrvi_tls_load_trust(SSL_CTX *context, const tsrv_tls_options *options,
                                unsigned char *digest)
{
    tsrvi_tls_source ca = tsrvi_tls_either("ca_file", options->ca_file, "ca_pem", options->ca_pem),
                     lists = tsrvi_tls_either("crl_file", options->crl_file, "", NULL);
    int rc = TSRV_OK;
    int verify = options->verify_client == TSRV_TLS_REQUIRED
                     ? SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT
                 : options->verify_client == TSRV_TLS_OPTIONAL ? SSL_VERIFY_PEER
                                                               : SSL_VERIFY_NONE;
    SSL_CTX_set_verify(context, verify, NULL);
    if (tsrvi_tls_is_given(&ca)) { /* else the system's, which are many: when a client needs them */
        rc = tsrvi_tls_load_all(context, &ca, false, digest);
    }
    if (rc == TSRV_OK && tsrvi_tls_is_given(&lists)) {
        rc = tsrvi_tls_load_all(context, &lists, true, digest);
        X509_STORE_set_flags(SSL_CTX_get_cert_store(context),
                             X509_V_FLAG_CRL_CHECK | X509_V_FLAG_CRL_CHECK_ALL);
    }
    return rc;
}

/* ---- an answer to staple ---------------------------------------------------*/

/* The part of an answer that is about this certificate; NULL = none. Serial numbers are compared:
 * its CA, by which others are told apart, need not be known here. */
static OCSP_SINGLERESP *tsrvi_tls_find_answer(OCSP_BASICRESP *basic, const X509 *own)
{
    for (int i = 0; i < OCSP_resp_count(basic); i++) {
        OCSP_SINGLERESP *one = OCSP_resp_get0(basic, i);
        ASN1_INTEGER *serial = NULL;
        OCSP_id_get0_info(NULL, NULL, NULL, &serial, (OCSP_CERTID *)OCSP_SINGLERESP_get0_id(one));
        if (ASN1_INTEGER_cmp(serial, X509_get0_serialNumber(own)) == 0) {
            return one;
        }
    }
    return NULL;
}

/* Returns NULL, or what is wrong with an answer. *until is set when it can be stapled: seconds
 * since 1970. */
static const char *tsrvi_tls_check_answer(OCSP_RESPONSE *answer, const X509 *own,
                                          const tsrvi_tls_source *source, int64_t *until)
{
    OCSP_BASICRESP *basic = OCSP_response_status(answer) == OCSP_RESPONSE_STATUS_SUCCESSFUL
                                ? OCSP_response_get1_basic(answer)
                                : NULL;
    OCSP_SINGLERESP *one = basic == NULL ? NULL : tsrvi_tls_find_answer(basic, own);
    ASN1_GENERALIZEDTIME *begin = NULL, *end = NULL;
    const char *wrong = basic == NULL ? "the CA has answered with an error"
                        : one == NULL ? "it is about another certificate"
                                      : NULL;
    if (wrong == NULL &&
        OCSP_single_get0_status(one, NULL, NULL, &begin, &end) != V_OCSP_CERTSTATUS_GOOD) {
        wrong = "the CA has answered that the certificate is not good";
    } else if (wrong == NULL && OCSP_check_validity(begin, end, 300, -1) != 1) {
        bool over = end != NULL && tsrvi_tls_until(end) < 0;
        tsrvi_tls_warn(source,
                       over ? "it is not stapled: it has expired on"
                            : "it is not stapled: it is not valid before",
                       over ? end : begin);
    } else if (wrong == NULL) {
        *until = end == NULL ? INT64_MAX : tsrvi_tls_now() + tsrvi_tls_until(end);
    }
    OCSP_BASICRESP_free(basic);
    ERR_clear_error();
    return wrong;
}

static int tsrvi_tls_load_answer(tsrvi_tls_set *set, const char *file)
{
    tsrvi_tls_source source = tsrvi_tls_either("ocsp_file", file, "", NULL);
    BIO *bio = tsrvi_tls_open(&source);
    OCSP_RESPONSE *answer = bio == NULL ? NULL : d2i_OCSP_RESPONSE_bio(bio, NULL);
    const char *wrong = bio == NULL ? NULL
                        : answer == NULL
                            ? "it is no answer of OCSP in DER"
                            : tsrvi_tls_check_answer(answer, SSL_CTX_get0_certificate(set->context),
                                                     &source, &set->answer_until);
    bool good = answer != NULL && wrong == NULL;
    if (good && set->answer_until != 0) {
        set->answer_size = i2d_OCSP_RESPONSE(answer, &set->answer);
        good = set->answer_size > 0;
    }
    OCSP_RESPONSE_free(answer);
    BIO_free(bio);
    return good ? (int)TSRV_OK : tsrvi_tls_complain(source.option, file, wrong);
}

/* The client asks for an answer. */
static int tsrvi_tls_staple(SSL *ssl, void *context)
{
    const tsrvi_tls_set *set = (const tsrvi_tls_set *)context;
    unsigned char *copy = NULL;
    if (set->answer_until > tsrvi_tls_now()) {
        copy = (unsigned char *)OPENSSL_malloc((size_t)set->answer_size);
    }
    if (copy == NULL) {
        return SSL_TLSEXT_ERR_NOACK; /* it can ask the CA itself */
    }
    memcpy(copy, set->answer, (size_t)set->answer_size);
    SSL_set_tlsext_status_ocsp_resp(ssl, copy, set->answer_size); /* which owns it now */
    return SSL_TLSEXT_ERR_OK;
}

/* ---- keys of sessions, for Wireshark ---------------------------------------*/

#ifdef TSRV_DEBUG
static void tsrvi_tls_keep_key(const SSL *ssl, const char *line)
{
    const char *path = TSRV_SYS(getenv, ("SSLKEYLOGFILE"));
    char text[512];
    int size = snprintf(text, sizeof(text), "%s\n", line), fd;
    (void)ssl;
    if (path == NULL || size >= (int)sizeof(text)) {
        return;
    }
    fd = tsrvi_fd_own(
        TSRV_SYS(open, (path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOCTTY, 0600)));
    if (fd >= 0) {
        tsrvi_write_quiet(fd, text, (size_t)size);
        tsrvi_close_fd(fd);
    }
}

/* Who can read the file can read what is sent: never without TSRV_DEBUG. */
static void tsrvi_tls_keep_keys(SSL_CTX *context)
{
    const char *path = TSRV_SYS(getenv, ("SSLKEYLOGFILE"));
    if (path == NULL || path[0] == 0) {
        return;
    }
    SSL_CTX_set_keylog_callback(context, tsrvi_tls_keep_key);
    if (tsrvi_mistake_is_new(__func__, "SSLKEYLOGFILE")) {
        tsrvi_log(TSRV_LOG_WARNING,
                  "TSRV_DEBUG: the keys of all TLS sessions go to SSLKEYLOGFILE, %s", path);
    }
}
#else
static void tsrvi_tls_keep_keys(SSL_CTX *context)
{
    (void)context;
}
#endif

/* ============================================================================
 * >>tls_options  Contexts from options
 * ==========================================================================*/

/* What sessions are made under, besides whom the peer is verified by: one that was made under other
 * rules is not resumed. A client certificate forbids resumption where nothing is set. */
static bool tsrvi_tls_digest_rules(unsigned char *digest, const tsrv_tls_options *options,
                                   const char *ciphers)
{
    int rules[2];
    rules[0] = options->verify_client;
    rules[1] = options->min_version;
    return tsrvi_tls_digest(digest, rules, sizeof(rules)) &&
           tsrvi_tls_digest(digest, ciphers, strlen(ciphers));
}

/* Secure by default: TLS 1.2 at least, forward-secret AEAD ciphers, our preference, no
 * compression, no renegotiation, stateless sessions only. */
static int tsrvi_tls_configure(SSL_CTX *context, const tsrv_tls_options *options)
{
    const char *ciphers = options->ciphers == NULL ? TSRVI_TLS_CIPHERS : options->ciphers;
    unsigned char digest[TSRVI_TLS_DIGEST] = "tcpserver.h";
    int rc;
    SSL_CTX_set_options(context, SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION |
                                     SSL_OP_CIPHER_SERVER_PREFERENCE);
    SSL_CTX_set_read_ahead(context, 1);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_timeout(context, TSRVI_TLS_TICKET_LIFE);
    tsrvi_tls_keep_keys(context);
    if (SSL_CTX_set_min_proto_version(context, options->min_version == 0
                                                   ? TLS1_2_VERSION
                                                   : options->min_version) != 1) {
        return tsrvi_tls_complain("min_version", NULL, NULL);
    }
    if (SSL_CTX_set_cipher_list(context, ciphers) != 1) {
        return tsrvi_tls_complain("ciphers", ciphers, NULL);
    }
    if ((rc = tsrvi_tls_load_trust(context, options, digest)) < 0) {
        return rc;
    }
    if (!tsrvi_tls_digest_rules(digest, options, ciphers) ||
        SSL_CTX_set_session_id_context(context, digest, sizeof(digest)) != 1) {
        ERR_clear_error();
        return -ENOMEM;
    }
    return TSRV_OK;
}

/* A context with a certificate, unless that is not given. NULL: *rc says why. */
static SSL_CTX *tsrvi_tls_context(const tsrv_tls_options *options,
                                  const tsrvi_tls_source *certificate, const tsrvi_tls_source *key,
                                  int *rc)
{
    SSL_CTX *context = SSL_CTX_new(TLS_method());
    tsrvi_tls_source inside = *certificate;
    if (context == NULL) {
        ERR_clear_error();
        *rc = -ENOMEM;
        return NULL;
    }
    inside.option = inside.file != NULL ? "the key in cert_file" : "the key in cert_pem";
    if (tsrvi_tls_is_given(certificate) &&
        (*rc = tsrvi_tls_load_certificate(context, certificate)) == TSRV_OK) {
        *rc = tsrvi_tls_load_key(context, tsrvi_tls_is_given(key) ? key : &inside,
                                 options->key_password);
    }
    if (*rc == TSRV_OK) {
        *rc = tsrvi_tls_configure(context, options);
    }
    if (*rc < 0) {
        SSL_CTX_free(context);
        context = NULL;
    }
    return context;
}

static char *tsrvi_copy(const char *text, int *rc)
{
    size_t size = text == NULL ? 0 : strlen(text) + 1;
    char *copy = size == 0 ? NULL : (char *)TSRV_MALLOC(size);
    if (copy != NULL) {
        memcpy(copy, text, size);
    } else if (size != 0) {
        *rc = -ENOMEM;
    }
    return copy;
}

/* ---- what a tsrv_tls was made of -------------------------------------------*/

static void tsrvi_tls_set_callbacks(tsrvi_tls_set *set, SSL_CTX *context)
{
    if (set->alpn_size != 0) {
        SSL_CTX_set_alpn_select_cb(context, tsrvi_tls_alpn_select, set->native ? NULL : set);
    }
}

static int tsrvi_tls_set_others(tsrvi_tls_set *set, const tsrv_tls_options *options)
{
    size_t count = (size_t)options->certificate_count;
    int rc = TSRV_OK;
    if (count == 0) {
        return TSRV_OK;
    }
    set->others = (SSL_CTX **)tsrvi_zalloc(count * sizeof(*set->others));
    set->names = (char **)tsrvi_zalloc(count * sizeof(*set->names));
    if (set->others == NULL || set->names == NULL) {
        return -ENOMEM;
    }
    for (int i = 0; rc == TSRV_OK && i < options->certificate_count; i++) {
        const tsrv_tls_certificate *one = &options->certificates[i];
        tsrvi_tls_source certificate = tsrvi_tls_either("cert_file", one->cert_file, "", NULL),
                         key = tsrvi_tls_either("key_file", one->key_file, "", NULL);
        set->names[i] = tsrvi_copy(one->server_name, &rc);
        set->count = i + 1;
        if (rc == TSRV_OK) {
            set->others[i] = tsrvi_tls_context(options, &certificate, &key, &rc);
        }
        if (rc == TSRV_OK) {
            tsrvi_tls_set_callbacks(set, set->others[i]);
        }
    }
    SSL_CTX_set_tlsext_servername_callback(set->context, tsrvi_tls_choose);
    SSL_CTX_set_tlsext_servername_arg(set->context, set);
    return rc;
}

/* Read all files into the set. */
static int tsrvi_tls_set_read(tsrvi_tls_set *set, const tsrv_tls_options *options)
{
    tsrvi_tls_source certificate = tsrvi_tls_either("cert_file", options->cert_file, "cert_pem",
                                                    options->cert_pem),
                     key = tsrvi_tls_either("key_file", options->key_file, "key_pem",
                                            options->key_pem);
    int rc = TSRV_OK;
    set->system = options->ca_file == NULL && options->ca_pem == NULL;
    set->serves = tsrvi_tls_is_given(&certificate);
    set->context = tsrvi_tls_context(options, &certificate, &key, &rc);
    if (rc == TSRV_OK && options->ocsp_file != NULL) {
        rc = tsrvi_tls_load_answer(set, options->ocsp_file);
        SSL_CTX_set_tlsext_status_cb(set->context, tsrvi_tls_staple);
        SSL_CTX_set_tlsext_status_arg(set->context, set);
    }
    if (rc == TSRV_OK) {
        tsrvi_tls_set_callbacks(set, set->context);
        rc = tsrvi_tls_set_others(set, options);
    }
    return rc;
}

/* NULL: *rc says why, and the log says more. */
static tsrvi_tls_set *tsrvi_tls_set_new(const tsrv_tls *tls, int *rc)
{
    const tsrv_tls_options *options = &tls->options;
    tsrvi_tls_set *set = (tsrvi_tls_set *)tsrvi_zalloc(sizeof(*set));
    if (set == NULL) {
        *rc = -ENOMEM;
        return NULL;
    }
    set->references = 1;
    set->on_server_name = options->on_server_name;
    set->user_context = options->context;
    set->ticket_hours = options->ticket_hours == 0 ? 24 : options->ticket_hours;
    memcpy(set->secret, tls->secret, sizeof(set->secret));
    *rc = tsrvi_tls_alpn_parse(options->alpn, set);
    if (*rc == TSRV_OK && options->native_context != NULL) {
        set->context = (SSL_CTX *)options->native_context;
        set->native = true;
        set->serves = true;
        SSL_CTX_up_ref(set->context);
        tsrvi_tls_set_callbacks(set, set->context);
    } else if (*rc == TSRV_OK) {
        *rc = tsrvi_tls_set_read(set, options);
    }
    if (*rc < 0) {
        tsrvi_tls_set_drop(set);
        return NULL;
    }
    return set;
}

/* ---- options ---------------------------------------------------------------*/

/* The strings among the options. */
#define TSRVI_TLS_STRINGS(X) \
    X(cert_file)             \
    X(key_file)              \
    X(ca_file)               \
    X(alpn) X(ciphers) X(cert_pem) X(key_pem) X(ca_pem) X(key_password) X(crl_file) X(ocsp_file)

/* The strings of options are const; these are our copies. Keys and passwords are among them. */
static void tsrvi_free_text(const char *text)
{
    union {
        const char *in;
        char *out;
    } unconst;
    unconst.in = text;
    if (text != NULL) {
        OPENSSL_cleanse(unconst.out, strlen(text));
    }
    TSRV_FREE(unconst.out);
}

TSRV_API void tsrv_tls_free(tsrv_tls *tls)
{
    if (tls == NULL) {
        return;
    }
    tsrvi_tls_set_drop(tls->set);
    for (int i = 0; tls->certificates != NULL && i < tls->options.certificate_count; i++) {
        tsrvi_free_text(tls->certificates[i].server_name);
        tsrvi_free_text(tls->certificates[i].cert_file);
        tsrvi_free_text(tls->certificates[i].key_file);
    }
    TSRV_FREE(tls->certificates);
#define TSRVI_TLS_FREE(name) tsrvi_free_text(tls->options.name);
    TSRVI_TLS_STRINGS(TSRVI_TLS_FREE)
#undef TSRVI_TLS_FREE
    OPENSSL_cleanse(tls->secret, sizeof(tls->secret));
    TSRV_FREE(tls);
}

/* Copy the options with all their strings. */
static int tsrvi_tls_options_copy(tsrv_tls *tls, const tsrv_tls_options *options)
{
    size_t count = (size_t)options->certificate_count;
    int rc = TSRV_OK;
    tls->options = *options;
#define TSRVI_TLS_COPY(name) tls->options.name = tsrvi_copy(options->name, &rc);
    TSRVI_TLS_STRINGS(TSRVI_TLS_COPY)
#undef TSRVI_TLS_COPY
    tls->certificates =
        count == 0 ? NULL
                   : (tsrv_tls_certificate *)tsrvi_zalloc(count * sizeof(tsrv_tls_certificate));
    tls->options.certificates = tls->certificates;
    if (count != 0 && tls->certificates == NULL) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < count; i++) {
        tls->certificates[i].server_name = tsrvi_copy(options->certificates[i].server_name, &rc);
        tls->certificates[i].cert_file = tsrvi_copy(options->certificates[i].cert_file, &rc);
        tls->certificates[i].key_file = tsrvi_copy(options->certificates[i].key_file, &rc);
    }
    return rc;
}

static int tsrvi_tls_refuse(const char *what, const char *name)
{
    tsrvi_log(TSRV_LOG_ERROR, "TLS: %s%s", what, name);
    return TSRV_EINVAL;
}

/* Of a file and a text it could only be guessed which one is meant. */
static int tsrvi_tls_check_sources(const tsrv_tls_options *options)
{
    bool cert = options->cert_file != NULL || options->cert_pem != NULL;
    if (options->cert_file != NULL && options->cert_pem != NULL) {
        return tsrvi_tls_refuse("cert_file and cert_pem are both given", "");
    }
    if (options->key_file != NULL && options->key_pem != NULL) {
        return tsrvi_tls_refuse("key_file and key_pem are both given", "");
    }
    if (options->ca_file != NULL && options->ca_pem != NULL) {
        return tsrvi_tls_refuse("ca_file and ca_pem are both given", "");
    }
    if (options->verify_client != TSRV_TLS_NONE && options->ca_file == NULL &&
        options->ca_pem == NULL && options->native_context == NULL) {
        return tsrvi_tls_refuse("verify_client needs a ca_file or ca_pem", "");
    }
    if ((options->key_file != NULL || options->key_pem != NULL) && !cert) {
        return tsrvi_tls_refuse("there is a key and no certificate: ",
                                options->key_file != NULL ? options->key_file : "key_pem");
    }
    if (options->ocsp_file != NULL && !cert && options->native_context == NULL) {
        return tsrvi_tls_refuse("there is an ocsp_file and no certificate: ", options->ocsp_file);
    }
    return TSRV_OK;
}

/* What cannot be meant. */
static int tsrvi_tls_check(const tsrv_tls_options *options)
{
    if (options->min_version != 0 && options->min_version != TSRV_TLS_1_2 &&
        options->min_version != TSRV_TLS_1_3) {
        return tsrvi_tls_refuse("min_version must be TSRV_TLS_1_2 or TSRV_TLS_1_3", "");
    }
    if (options->verify_client < TSRV_TLS_NONE || options->verify_client > TSRV_TLS_REQUIRED) {
        return tsrvi_tls_refuse("verify_client must be TSRV_TLS_NONE, _OPTIONAL or _REQUIRED", "");
    }
    if (options->ticket_hours < 0 && options->ticket_hours != TSRV_NEVER) {
        return tsrvi_tls_refuse("ticket_hours must be positive, 0 or TSRV_NEVER", "");
    }
    if (options->certificate_count < 0 ||
        (options->certificate_count > 0 && options->certificates == NULL)) {
        return tsrvi_tls_refuse("certificate_count is not that of certificates", "");
    }
    for (int i = 0; i < options->certificate_count; i++) {
        if (options->certificates[i].server_name == NULL) {
            return tsrvi_tls_refuse("a certificate without a server_name", "");
        }
        if (options->certificates[i].cert_file == NULL) {
            return tsrvi_tls_refuse("no cert_file for ", options->certificates[i].server_name);
        }
    }
    return tsrvi_tls_check_sources(options);
}

/* Once, before any fork: all that share it can open each other's tickets. */
static int tsrvi_tls_make_secret(tsrv_tls *tls)
{
    if (RAND_bytes(tls->secret, (int)sizeof(tls->secret)) != 1) {
        return tsrvi_tls_complain("no random numbers", NULL, NULL);
    }
    return TSRV_OK;
}

TSRV_API int tsrv_tls_new(tsrv_tls **tls, const tsrv_tls_options *options)
{
    tsrv_tls_options nothing;
    tsrv_tls *made;
    int rc;
    *tls = NULL;
    memset(&nothing, 0, sizeof(nothing));
    options = options == NULL ? &nothing : options;
    if ((rc = tsrvi_tls_check(options)) < 0) {
        return rc;
    }
    made = (tsrv_tls *)tsrvi_zalloc(sizeof(*made));
    if (made == NULL) {
        return -ENOMEM;
    }
    if ((rc = tsrvi_tls_options_copy(made, options)) < 0 ||
        (rc = tsrvi_tls_make_secret(made)) < 0 ||
        (made->set = tsrvi_tls_set_new(made, &rc)) == NULL) {
        tsrv_tls_free(made);
        return rc;
    }
    *tls = made;
    return TSRV_OK;
}

TSRV_API int tsrv_tls_reload(tsrv_tls *tls)
{
    int rc = TSRV_OK;
    tsrvi_tls_set *set;
    if (TSRVI_WRONG(tls->options.native_context != NULL)) {
        return TSRV_EINVAL;
    }
    set = tsrvi_tls_set_new(tls, &rc);
    if (set == NULL) {
        return rc;
    }
    tsrvi_tls_set_drop(tls->set);
    tls->set = set;
    return TSRV_OK;
}

/* Can it serve? */
static bool tsrvi_tls_serves(const tsrv_tls *tls)
{
    return tls->set->serves;
}

#else
static int tsrvi_tls_absent(void)
{
    tsrvi_log(TSRV_LOG_ERROR, "TLS is not compiled in: define TSRV_TLS_OPENSSL before the "
                              "implementation, and link -lssl -lcrypto");
    return TSRV_ENOTSUP;
}

TSRV_API int tsrv_tls_new(tsrv_tls **tls, const tsrv_tls_options *options)
{
    (void)options;
    *tls = NULL;
    return tsrvi_tls_absent();
}

TSRV_API void tsrv_tls_free(tsrv_tls *tls)
{
    (void)tls;
}

TSRV_API int tsrv_tls_reload(tsrv_tls *tls)
{
    (void)tls;
    return tsrvi_tls_absent();
}

static bool tsrvi_tls_serves(const tsrv_tls *tls)
{
    (void)tls;
    tsrvi_tls_absent();
    return false;
}

#endif

/* ============================================================================
 * >>shared  Counters of all workers
 *
 * A memory that the parent and all workers share. Each process of a worker has a
 * place in it that it alone writes, so there are no locks: the others only read.
 * A worker has several places, since its next process begins before the last has
 * ended; what a place has counted stays there for the process that gets it next.
 * Servers are told apart by their number, which counts them in the order in
 * which they were made: the same in every worker, as all run the same program.
 * ==========================================================================*/

#define TSRVI_SHARED_SERVERS 8 /* more servers than that count for themselves only */
#define TSRVI_GENERATIONS 16   /* processes of one worker at the same time */

typedef struct tsrvi_place {
    int ready;     /* atomic; its first server accepts */
    int listens;   /* atomic; its loop watches the life-line */
    int heard;     /* atomic; how often it was told over that */
    int asked;     /* atomic; a signal that did not come from the parent has told it to end */
    int refused;   /* why it could not begin, a code; 0 = it could */
    int used;      /* atomic; in the first of a worker's: how many have ever been used */
    unsigned beat; /* atomic; changes as long as its loop turns; 0 = it has not begun */
    tsrv_stats stats[TSRVI_SHARED_SERVERS];
} tsrvi_place;

/* The lowest number that no server has; -1 = there is none. */
static int tsrvi_server_number(void)
{
    for (int number = 0; number < TSRVI_SHARED_SERVERS; number++) {
        unsigned bit = 1u << number;
        if ((__atomic_fetch_or(&tsrvi_process.server_numbers, bit, __ATOMIC_ACQ_REL) & bit) == 0) {
            return number;
        }
    }
    return -1;
}

static void tsrvi_server_number_free(int number)
{
    if (number >= 0) {
        __atomic_fetch_and(&tsrvi_process.server_numbers, ~(1u << number), __ATOMIC_ACQ_REL);
    }
}

/* A counter that its owner may be changing. Where it takes two loads, one that is between the two
 * stores of a carry is read again; only an owner that is stopped just there can hide one. */
static uint64_t tsrvi_counter_load(const uint64_t *counter)
{
#if TSRVI_HAS_ATOMIC_64
    return __atomic_load_n(counter, __ATOMIC_RELAXED);
#else
    const volatile uint64_t *looked_at = counter;
    uint64_t value, again = *looked_at;
    do {
        value = again;
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        again = *looked_at;
    } while (value != again);
    return value;
#endif
}

#define TSRVI_STATS (sizeof(tsrv_stats) / sizeof(uint64_t)) /* counters, then times: */
#define TSRVI_STATS_TIMES (offsetof(tsrv_stats, turn_max_ms) / sizeof(uint64_t))

/* Add counters that their owner may be changing: times are not added, the longest counts. */
static void tsrvi_stats_add(tsrv_stats *sum, const tsrv_stats *stats)
{
    uint64_t to[TSRVI_STATS];
    const uint64_t *from = (const uint64_t *)(const void *)stats;
    memcpy(to, sum, sizeof(to));
    for (size_t i = 0; i < TSRVI_STATS; i++) {
        uint64_t value = tsrvi_counter_load(&from[i]);
        to[i] = i < TSRVI_STATS_TIMES ? to[i] + value : value > to[i] ? value : to[i];
    }
    memcpy(sum, to, sizeof(to));
}

/* A new process will have this place. */
static void tsrvi_place_take(int place)
{
    tsrvi_place *own = &tsrvi_process.places[place];
    int index = place % TSRVI_GENERATIONS;
    own->refused = TSRV_OK;
    __atomic_store_n(&own->ready, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&own->listens, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&own->heard, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&own->asked, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&own->beat, 0u, __ATOMIC_RELEASE);
    if ((own - index)->used <= index) {
        __atomic_store_n(&(own - index)->used, index + 1, __ATOMIC_RELEASE);
    }
}

/* The counters of workers that have been are gone: something else is counted from now on. */
static void tsrvi_places_drop(void)
{
    int count = __atomic_exchange_n(&tsrvi_process.place_count, 0, __ATOMIC_ACQ_REL);
    if (count != 0) {
        TSRV_SYS(munmap, (tsrvi_process.places, (size_t)count * sizeof(tsrvi_place)));
        tsrvi_process.places = NULL;
    }
}

/* Add what the workers' processes have counted for the server with that number.
 *   task_id  -1 = all */
static void tsrvi_stats_gather(tsrv_stats *sum, int number, int task_id)
{
    int first = task_id < 0 ? 0 : task_id * TSRVI_GENERATIONS;
    int end = task_id < 0 ? tsrvi_process.place_count : first + TSRVI_GENERATIONS;
    for (; number >= 0 && first < end && end <= tsrvi_process.place_count;
         first += TSRVI_GENERATIONS) {
        const tsrvi_place *places = &tsrvi_process.places[first];
        int used = __atomic_load_n(&places->used, __ATOMIC_ACQUIRE);
        for (int i = 0; i < used; i++) {
            tsrvi_stats_add(sum, &places[i].stats[number]);
        }
    }
}

/* ============================================================================
 * >>peer  A peer's address, as streams keep it
 * ==========================================================================*/

typedef struct tsrvi_peer {
    uint8_t family;
    bool local;    /* it is connected by a unix socket: behind a proxy both are different things */
    uint16_t port; /* network order */
    uint32_t scope;
    union {
        struct sockaddr_in four;
        unsigned char six[16]; /* with port and scope */
        tsrv_address *whole;   /* a unix socket with a name; its own memory */
    } u;
} tsrvi_peer;

/* Only the first address->size bytes are written: this is done before every call of a callback-mode
 * handler. */
static TSRVI_APART void tsrvi_peer_load_other(const tsrvi_peer *peer, tsrv_address *address)
{
    if (peer->family == AF_INET6) {
        struct sockaddr_in6 six;
        memset(&six, 0, sizeof(six));
        TSRVI_SET_LENGTH(six.sin6_len, sizeof(six));
        six.sin6_family = AF_INET6;
        six.sin6_port = peer->port;
        six.sin6_scope_id = peer->scope;
        memcpy(&six.sin6_addr, peer->u.six, 16);
        memcpy(address->storage, &six, sizeof(six));
        address->size = sizeof(six);
    } else if (peer->family == AF_UNIX && peer->u.whole != NULL) {
        *address = *peer->u.whole;
    } else {
        tsrvi_sockaddr unnamed;
        memset(&unnamed, 0, sizeof(unnamed));
        unnamed.any.sa_family = AF_UNIX;
        tsrvi_address_store(address, &unnamed,
                            peer->family == AF_UNIX ? offsetof(struct sockaddr_un, sun_path) : 0);
    }
}

static inline TSRVI_INLINE void tsrvi_peer_load(const tsrvi_peer *peer, tsrv_address *address)
{
    if (TSRVI_LIKELY(peer->family == AF_INET)) {
        memcpy(address->storage, &peer->u.four, sizeof(peer->u.four));
        address->size = sizeof(peer->u.four);
    } else {
        tsrvi_peer_load_other(peer, address);
    }
}

static int tsrvi_peer_store(tsrvi_peer *peer, const tsrv_address *address)
{
    tsrvi_sockaddr inside;
    tsrvi_address_load(address, &inside);
    peer->family = (uint8_t)tsrv_address_family(address);
    peer->local = peer->family == AF_UNIX;
    if (peer->family == AF_INET) {
        peer->u.four = inside.four;
        memset(peer->u.four.sin_zero, 0, sizeof(peer->u.four.sin_zero));
        TSRVI_SET_LENGTH(peer->u.four.sin_len, sizeof(peer->u.four));
    } else if (peer->family == AF_INET6) {
        peer->port = inside.six.sin6_port;
        peer->scope = inside.six.sin6_scope_id;
        memcpy(peer->u.six, &inside.six.sin6_addr, 16);
    } else if (peer->family == AF_UNIX && address->size > offsetof(struct sockaddr_un, sun_path)) {
        peer->u.whole = (tsrv_address *)TSRV_MALLOC(sizeof(tsrv_address));
        if (peer->u.whole == NULL) {
            return -ENOMEM;
        }
        *peer->u.whole = *address;
    }
    return TSRV_OK;
}

/* An address of 4 or 16 bytes and a port, as they stand in headers: in network order. */
static void tsrvi_address_make(tsrv_address *address, int family, const void *ip, uint16_t port)
{
    tsrvi_peer peer;
    memset(&peer, 0, sizeof(peer));
    peer.family = (uint8_t)family;
    if (family == AF_INET) {
        TSRVI_SET_LENGTH(peer.u.four.sin_len, sizeof(peer.u.four));
        peer.u.four.sin_family = AF_INET;
        peer.u.four.sin_port = port;
        memcpy(&peer.u.four.sin_addr, ip, 4);
    } else {
        peer.port = port;
        memcpy(peer.u.six, ip, 16);
    }
    memset(address, 0, sizeof(*address));
    tsrvi_peer_load(&peer, address);
}

static void tsrvi_peer_free(tsrvi_peer *peer)
{
    if (peer->family == AF_UNIX) {
        TSRV_FREE(peer->u.whole);
    }
}

/* As tsrv_address_format. */
static const char *tsrvi_peer_format(const tsrvi_peer *peer, char *buffer, size_t size)
{
    tsrv_address address;
    tsrvi_peer_load(peer, &address);
    return tsrv_address_format(&address, buffer, size);
}

/* ============================================================================
 * >>proxy_header  The PROXY protocol: headers, and who may send them
 *
 * As in HAProxy's doc/proxy-protocol.txt, versions 1 (text) and 2 (binary). The
 * functions here know bytes and addresses, and nothing of streams.
 * ==========================================================================*/

#define TSRVI_PROXY_LINE ((size_t)107) /* the longest header of version 1, CRLF included: 2.1 */
#define TSRVI_PROXY_SIGNATURE ((size_t)12)
#define TSRVI_PROXY_FIXED ((size_t)16)    /* of version 2, before the addresses */
#define TSRVI_PROXY_LARGEST ((size_t)232) /* that we send: two paths of unix sockets */
#define TSRVI_PROXY_CRC32C 0x03           /* a TLV: PP2_TYPE_CRC32C */

static const unsigned char tsrvi_proxy_signature[TSRVI_PROXY_SIGNATURE + 1] =
    "\r\n\r\n\0\r\nQUIT\n";

/* What a header says. */
typedef struct tsrvi_proxied {
    tsrv_address client; /* size 0 = the connection is the sender's own: LOCAL, UNKNOWN */
    size_t tlvs;         /* where the TLVs begin in the header; up to its end */
} tsrvi_proxied;

/* ---- how long is it? -------------------------------------------------------*/

/* Bytes of the header, as far as the first `have` of them tell, and never less than that; 0 = its
 * line has not ended yet; SIZE_MAX = it is none. Nothing that lies behind it may be taken, so that
 * a line which ends within the first bytes, and is no header of either version, is refused here. */
static size_t tsrvi_proxy_size(const char *header, size_t have)
{
    const unsigned char *bytes = (const unsigned char *)header;
    const char *end;
    size_t size;
    if (have == 0) {
        return TSRVI_PROXY_SIGNATURE; /* the shortest of either version is longer */
    }
    if (memcmp(header, tsrvi_proxy_signature, tsrvi_min(have, TSRVI_PROXY_SIGNATURE)) == 0) {
        return have < TSRVI_PROXY_SIGNATURE ? TSRVI_PROXY_SIGNATURE
               : have < TSRVI_PROXY_FIXED
                   ? TSRVI_PROXY_FIXED
                   : TSRVI_PROXY_FIXED + ((size_t)bytes[14] << 8) + bytes[15];
    }
    if (memcmp(header, "PROXY ", tsrvi_min(have, 6)) != 0) {
        return SIZE_MAX;
    }
    if (have < TSRVI_PROXY_SIGNATURE) {
        return TSRVI_PROXY_SIGNATURE;
    }
    end = (const char *)memchr(header, '\n', have);
    size = end == NULL ? 0 : (size_t)(end - header) + 1;
    return (end != NULL && size < have) || (end == NULL && have >= TSRVI_PROXY_LINE) ? SIZE_MAX
                                                                                     : size;
}

/* ---- version 1 -------------------------------------------------------------*/

/* The next word of a line, which a blank ends, or the line's end; NULL = there is none. */
static char *tsrvi_proxy_word(char **rest)
{
    char *word = *rest, *blank = word == NULL ? NULL : strchr(word, ' ');
    if (blank != NULL) {
        *blank = 0;
    }
    *rest = blank == NULL ? NULL : blank + 1;
    return word == NULL || *word == 0 ? NULL : word;
}

/* A decimal number up to 65535, without zeros in front; -1 = it is none. */
static int tsrvi_proxy_port(const char *word)
{
    return word == NULL || (word[0] == '0' && word[1] != 0) ? -1 : (int)tsrvi_decimal(word, 65535);
}

/* An address and a port of a family. Returns whether they are. */
static bool tsrvi_proxy_address(int family, const char *host, const char *service,
                                tsrv_address *address)
{
    unsigned char ip[16];
    int port = tsrvi_proxy_port(service);
    if (host == NULL || port < 0 || TSRV_SYS(inet_pton, (family, host, ip)) != 1) {
        return false;
    }
    tsrvi_address_make(address, family, ip, htons((uint16_t)port));
    return true;
}

/* Returns what is wrong with it, or NULL. */
static const char *tsrvi_proxy_parse_line(const char *header, size_t size, tsrvi_proxied *proxied)
{
    char line[TSRVI_PROXY_LINE + 1], *rest = line, *words[6];
    tsrv_address ours;
    int family;
    if (size > TSRVI_PROXY_LINE || header[size - 2] != '\r' || memchr(header, 0, size) != NULL) {
        return "a line that is too long, or does not end in CRLF";
    }
    memcpy(line, header, size);
    line[size - 2] = 0;
    if (strncmp(line, "PROXY UNKNOWN", 13) == 0 && (line[13] == 0 || line[13] == ' ')) {
        return NULL; /* whatever follows: 2.1 */
    }
    for (int i = 0; i < 6; i++) {
        words[i] = tsrvi_proxy_word(&rest);
    }
    family = words[1] == NULL                ? 0
             : strcmp(words[1], "TCP4") == 0 ? AF_INET
             : strcmp(words[1], "TCP6") == 0 ? AF_INET6
                                             : 0;
    if (family == 0 || rest != NULL ||
        !tsrvi_proxy_address(family, words[2], words[4], &proxied->client) ||
        !tsrvi_proxy_address(family, words[3], words[5], &ours)) {
        return "its addresses";
    }
    return NULL;
}

/* ---- version 2 -------------------------------------------------------------*/

/* Castagnoli's checksum, with the checksum itself as zeros. It is rare, and so without a table.
 *   hole  where that is */
static uint32_t tsrvi_proxy_crc32c(const char *data, size_t size, size_t hole)
{
    uint32_t crc = 0xFFFFFFFFu;
    for (size_t i = 0; i < size; i++) {
        crc ^= i - hole < 4 ? 0 : (unsigned char)data[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = (crc & 1) != 0 ? (crc >> 1) ^ 0x82F63B78u : crc >> 1;
        }
    }
    return ~crc;
}

/* The value of the first TLV of a type. Returns whether there is one. */
static bool tsrvi_proxy_find(const char *header, size_t size, size_t tlvs, int type,
                             tsrv_slice *value)
{
    const unsigned char *bytes = (const unsigned char *)header;
    for (size_t at = tlvs; at + 3 <= size; at += 3 + value->size) {
        value->data = header + at + 3;
        value->size = (size_t)bytes[at + 1] << 8 | bytes[at + 2];
        if (bytes[at] == type) {
            return true;
        }
    }
    return false;
}

/* Do the TLVs fill the header exactly, and is the checksum right if there is one? Returns what is
 * wrong, or NULL. */
static const char *tsrvi_proxy_check_tlvs(const char *header, size_t size, size_t tlvs)
{
    const unsigned char *bytes = (const unsigned char *)header;
    tsrv_slice sum;
    size_t at = tlvs;
    uint32_t crc;
    while (size - at >= 3) {
        size_t length = (size_t)bytes[at + 1] << 8 | bytes[at + 2];
        if (length > size - at - 3) {
            break;
        }
        at += 3 + length;
    }
    if (at != size) {
        return "a TLV that reaches beyond it";
    }
    if (!tsrvi_proxy_find(header, size, tlvs, TSRVI_PROXY_CRC32C, &sum)) {
        return NULL;
    }
    bytes = (const unsigned char *)sum.data;
    crc = sum.size != 4 ? 0
                        : (uint32_t)bytes[0] << 24 | (uint32_t)bytes[1] << 16 |
                              (uint32_t)bytes[2] << 8 | (uint32_t)bytes[3];
    return sum.size == 4 && crc == tsrvi_proxy_crc32c(header, size, (size_t)(sum.data - header))
               ? NULL
               : "its checksum";
}

/* The client's address, in front of ours. Ports stand behind both addresses. */
static void tsrvi_proxy_load(const char *from, int family, tsrv_address *address)
{
    tsrvi_sockaddr inside;
    memset(&inside, 0, sizeof(inside));
    if (family != AF_UNIX) {
        uint16_t port;
        memcpy(&port, from + (family == AF_INET ? 8 : 32), 2);
        tsrvi_address_make(address, family, from, port);
    } else {
        size_t size = tsrvi_min(sizeof(inside.local.sun_path), 108), used = size;
        inside.local.sun_family = AF_UNIX;
        memcpy(inside.local.sun_path, from, size);
        while (used != 0 && from[used - 1] == 0) {
            used--; /* of a path one is its end, and none of an unnamed socket */
        }
        used += used != 0 && used < size && from[0] != 0;
        TSRVI_SET_LENGTH(inside.local.sun_len, offsetof(struct sockaddr_un, sun_path) + used);
        tsrvi_address_store(address, &inside, offsetof(struct sockaddr_un, sun_path) + used);
    }
}

/* Returns what is wrong with it, or NULL. */
static const char *tsrvi_proxy_parse_binary(const char *header, size_t size, tsrvi_proxied *proxied)
{
    static const int families[] = {AF_UNSPEC, AF_INET, AF_INET6, AF_UNIX};
    static const uint8_t sizes[] = {0, 12, 36, 216}; /* of both addresses */
    unsigned command = (unsigned char)header[12], kind = (unsigned char)header[13];
    if (command >> 4 != 2 || (command & 15) > 1) {
        return "its version, or its command";
    }
    if ((command & 15) == 0) {
        return NULL; /* LOCAL: all that follows is to be passed over: 2.2 */
    }
    if (kind >> 4 > 3 || (kind & 15) > 2) {
        return "its family";
    }
    if (size - TSRVI_PROXY_FIXED < sizes[kind >> 4]) {
        return "its addresses";
    }
    proxied->tlvs = TSRVI_PROXY_FIXED + sizes[kind >> 4];
    if ((kind & 15) == 1 && kind >> 4 != 0) { /* STREAM */
        tsrvi_proxy_load(header + TSRVI_PROXY_FIXED, families[kind >> 4], &proxied->client);
    }
    return tsrvi_proxy_check_tlvs(header, size, proxied->tlvs);
}

/* A whole header of either version. Returns what is wrong with it, or NULL. */
static const char *tsrvi_proxy_parse(const char *header, size_t size, tsrvi_proxied *proxied)
{
    memset(proxied, 0, sizeof(*proxied));
    proxied->tlvs = size;
    return header[0] == 'P' ? tsrvi_proxy_parse_line(header, size, proxied)
                            : tsrvi_proxy_parse_binary(header, size, proxied);
}

/* ---- sending one -----------------------------------------------------------*/

/* Write a header of version 2 for a client: where it came to is not known, and said to be `to`, if
 * that is of its family. Of an address without a family the connection is our own: LOCAL. Returns
 * its size. */
static size_t tsrvi_proxy_build(const tsrv_address *client, const tsrv_address *to, char *header)
{
    tsrvi_sockaddr ends[2];
    int family = tsrv_address_family(client);
    size_t ip = family == AF_INET ? 4 : family == AF_INET6 ? 16 : family == AF_UNIX ? 108 : 0;
    size_t size = family == AF_UNIX ? 216 : ip == 0 ? 0 : 2 * ip + 4;
    char *at = header + TSRVI_PROXY_FIXED;
    memset(header, 0, TSRVI_PROXY_FIXED + size);
    memcpy(header, tsrvi_proxy_signature, TSRVI_PROXY_SIGNATURE);
    header[12] = ip == 0 ? 0x20 : 0x21;
    header[13] = family == AF_INET ? 0x11 : family == AF_INET6 ? 0x21 : ip == 0 ? 0 : 0x31;
    header[15] = (char)size;
    tsrvi_address_load(client, &ends[0]);
    memset(&ends[1], 0, sizeof(ends[1]));
    if (tsrv_address_family(to) == family) {
        tsrvi_address_load(to, &ends[1]);
    }
    for (int i = 0; i < 2 && ip != 0; i++, at += ip) {
        const void *from = family == AF_INET    ? (const void *)&ends[i].four.sin_addr
                           : family == AF_INET6 ? (const void *)&ends[i].six.sin6_addr
                                                : (const void *)ends[i].local.sun_path;
        memcpy(at, from, family == AF_UNIX ? tsrvi_min(ip, sizeof(ends[i].local.sun_path)) : ip);
    }
    if (family == AF_INET || family == AF_INET6) {
        for (int i = 0; i < 2; i++) {
            memcpy(at + 2 * i, family == AF_INET ? &ends[i].four.sin_port : &ends[i].six.sin6_port,
                   2);
        }
    }
    return TSRVI_PROXY_FIXED + size;
}

/* ---- who may send one ------------------------------------------------------*/

/* Addresses that begin with the same bits; IPv4 as IPv6 has it. */
typedef struct tsrvi_network {
    unsigned char ip[16];
    int bits; /* -1 = every unix socket */
} tsrvi_network;

static const unsigned char tsrvi_ip_mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF};

/* An address as IPv6 has it. Returns whether it is one of IP. */
static bool tsrvi_address_ip(const tsrv_address *address, unsigned char ip[16])
{
    tsrvi_sockaddr inside;
    int family = tsrv_address_family(address);
    tsrvi_address_load(address, &inside);
    if (family == AF_INET6) {
        memcpy(ip, &inside.six.sin6_addr, 16);
    } else {
        memcpy(ip, tsrvi_ip_mapped, sizeof(tsrvi_ip_mapped));
        memcpy(ip + 12, &inside.four.sin_addr, 4);
    }
    return family == AF_INET || family == AF_INET6;
}

/* One of a list: "10.0.0.0/8", "::1", "unix:". Returns whether it is. */
static bool tsrvi_network_parse(char *text, tsrvi_network *network)
{
    char *slash = strchr(text, '/');
    int bits = slash == NULL ? -1 : tsrvi_proxy_port(slash + 1);
    if (strcmp(text, "unix:") == 0) {
        network->bits = -1;
        return true;
    }
    if (slash != NULL) {
        *slash = 0;
    }
    memcpy(network->ip, tsrvi_ip_mapped, sizeof(tsrvi_ip_mapped));
    if (TSRV_SYS(inet_pton, (AF_INET, text, network->ip + 12)) == 1) {
        network->bits = slash == NULL ? 128 : bits + 96;
        return slash == NULL || (bits >= 0 && bits <= 32);
    }
    network->bits = slash == NULL ? 128 : bits;
    return TSRV_SYS(inet_pton, (AF_INET6, text, network->ip)) == 1 &&
           (slash == NULL || (bits >= 0 && bits <= 128));
}

/* A list of them, with commas or blanks between. Returns how many; TSRV_EINVAL; -ENOMEM. */
static int tsrvi_networks_parse(const char *text, tsrvi_network **networks)
{
    static const char between[] = ", \t";
    size_t most = strlen(text) / 2 + 1;
    int count = 0;
    *networks = (tsrvi_network *)tsrvi_zalloc(most * sizeof(**networks));
    if (*networks == NULL) {
        return -ENOMEM;
    }
    for (text += strspn(text, between); *text != 0; text += strspn(text, between)) {
        char one[INET6_ADDRSTRLEN + 5];
        size_t size = strcspn(text, between);
        memcpy(one, text, tsrvi_min(size, sizeof(one) - 1));
        one[tsrvi_min(size, sizeof(one) - 1)] = 0;
        if (size >= sizeof(one) || !tsrvi_network_parse(one, &(*networks)[count])) {
            TSRV_FREE(*networks);
            *networks = NULL;
            return TSRV_EINVAL;
        }
        count++;
        text += size;
    }
    return count;
}

static bool tsrvi_network_has(const tsrvi_network *network, const unsigned char *ip)
{
    size_t whole = (size_t)network->bits / 8;
    unsigned rest = (unsigned)network->bits % 8;
    return memcmp(network->ip, ip, whole) == 0 &&
           (rest == 0 || (network->ip[whole] ^ ip[whole]) >> (8 - rest) == 0);
}

/* Is the address in one of them? */
static bool tsrvi_networks_have(const tsrvi_network *networks, int count,
                                const tsrv_address *address)
{
    unsigned char ip[16];
    bool is_ip = tsrvi_address_ip(address, ip), local = tsrv_address_family(address) == AF_UNIX;
    for (int i = 0; i < count; i++) {
        if (networks[i].bits < 0 ? local : is_ip && tsrvi_network_has(&networks[i], ip)) {
            return true;
        }
    }
    return false;
}

/* ============================================================================
 * >>addresses  How many connections an address has
 *
 * A table with open addressing: an entry lies where its hash says, or behind
 * that with no gap between. It is half full at most, and shrinks, so that it is
 * bounded by the connections that are open. The hash has a secret key: who can
 * choose addresses cannot choose where they lie.
 * ==========================================================================*/

#define TSRVI_ADDRESSES_LEAST 16 /* entries, a power of 2 */

typedef struct tsrvi_address_count {
    uint64_t key;
    uint64_t count; /* 0 = the entry is free */
} tsrvi_address_count;

typedef struct tsrvi_addresses {
    tsrvi_address_count *entries; /* NULL before the first */
    size_t capacity;              /* a power of 2 */
    size_t used;
    uint64_t secret[2];
} tsrvi_addresses;

/* What is counted as one: an IPv4 address, also where it comes as IPv6, as what a NAT64 has made of
 * it too (RFC 6052, 2.1), behind which all of them would be one; the first half of another IPv6
 * address, since that is what one customer has. Returns whether there is such a thing. */
static bool tsrvi_address_key(const tsrv_address *address, uint64_t *key)
{
    /* IPv4 behind what begins no address of a peer: ff00::/8 is multicast. */
    static const unsigned char translated[12] = {0, 0x64, 0xFF, 0x9B};
    unsigned char ip[16], bytes[8] = {0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0};
    bool is_ip = tsrvi_address_ip(address, ip);
    if (memcmp(ip, tsrvi_ip_mapped, sizeof(tsrvi_ip_mapped)) == 0 ||
        memcmp(ip, translated, sizeof(translated)) == 0) {
        memcpy(bytes + 4, ip + 12, 4);
    } else {
        memcpy(bytes, ip, 8);
    }
    memcpy(key, bytes, sizeof(bytes));
    return is_ip;
}

static void tsrvi_addresses_choose_secret(tsrvi_addresses *table)
{
    int fd = tsrvi_fd_own(TSRV_SYS(open, ("/dev/urandom", O_RDONLY | O_CLOEXEC)));
    ssize_t got = -1;
    if (fd >= 0) {
        got = TSRV_SYS(read, (fd, table->secret, sizeof(table->secret)));
        tsrvi_close_fd(fd);
    }
    if (got != (ssize_t)sizeof(table->secret)) { /* in a bare chroot: better than nothing */
        table->secret[0] ^= tsrvi_clock() * 0x9E3779B97F4A7C15u;
        table->secret[1] ^= (uint64_t)(uintptr_t)table * 0xC2B2AE3D27D4EB4Fu;
    }
    table->secret[1] |= 1;
}

/* Where a key lies, or would lie. */
static size_t tsrvi_addresses_find(const tsrvi_addresses *table, uint64_t key)
{
    uint64_t hash = (key ^ table->secret[0]) * table->secret[1];
    size_t i;
    hash = (hash ^ (hash >> 32)) * table->secret[1];
    i = (size_t)(hash >> 32) & (table->capacity - 1);
    while (table->entries[i].count != 0 && table->entries[i].key != key) {
        i = (i + 1) & (table->capacity - 1);
    }
    return i;
}

/* Returns TSRV_OK, or -ENOMEM; then all is as it was. */
static int tsrvi_addresses_resize(tsrvi_addresses *table, size_t capacity)
{
    tsrvi_addresses grown = *table;
    grown.entries = (tsrvi_address_count *)tsrvi_zalloc(capacity * sizeof(*grown.entries));
    grown.capacity = capacity;
    if (grown.entries == NULL) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < table->capacity; i++) {
        if (table->entries[i].count != 0) {
            grown.entries[tsrvi_addresses_find(&grown, table->entries[i].key)] = table->entries[i];
        }
    }
    TSRV_FREE(table->entries);
    *table = grown;
    return TSRV_OK;
}

/* Count one more. Returns TSRV_OK; TSRV_EFULL: there are `most`; -ENOMEM. */
static int tsrvi_addresses_add(tsrvi_addresses *table, uint64_t key, uint64_t most)
{
    tsrvi_address_count *entry;
    if (table->entries == NULL) {
        tsrvi_addresses_choose_secret(table);
    }
    if ((table->used + 1) * 2 > table->capacity &&
        tsrvi_addresses_resize(table, table->capacity == 0 ? TSRVI_ADDRESSES_LEAST
                                                           : table->capacity * 2) < 0) {
        return -ENOMEM;
    }
    entry = &table->entries[tsrvi_addresses_find(table, key)];
    if (entry->count >= most) {
        return TSRV_EFULL;
    }
    table->used += entry->count == 0;
    entry->key = key;
    entry->count++;
    return TSRV_OK;
}

/* One less. */
static void tsrvi_addresses_remove(tsrvi_addresses *table, uint64_t key)
{
    size_t i = tsrvi_addresses_find(table, key), mask = table->capacity - 1;
    TSRV_ASSERT(table->entries[i].count != 0);
    if (--table->entries[i].count != 0) {
        return;
    }
    table->used--;
    for (i = (i + 1) & mask; table->entries[i].count != 0; i = (i + 1) & mask) {
        tsrvi_address_count moved = table->entries[i]; /* perhaps to where there is a gap now */
        table->entries[i].count = 0;
        table->entries[tsrvi_addresses_find(table, moved.key)] = moved;
    }
    if (table->capacity > TSRVI_ADDRESSES_LEAST && table->used * 8 < table->capacity) {
        tsrvi_addresses_resize(table, table->capacity / 2); /* without memory it stays */
    }
}

/* ============================================================================
 * >>times  Times of streams, in 4 bytes
 * ==========================================================================*/

/* Times of streams are milliseconds, in 4 bytes, which wrap: 0 is never, and the longest are 12
 * days, so that two can be compared of which one is ahead and the other past. They are rounded up,
 * so that nothing is early. */
#define TSRVI_MS_MOST (INT32_MAX / 2)

static uint32_t tsrvi_ms_at(const tsrv_loop *loop, uint64_t due)
{
    uint64_t most = loop->now + (uint64_t)TSRVI_MS_MOST * TSRVI_MS;
    uint32_t ms = (uint32_t)((tsrvi_earlier(due, most) + TSRVI_MS - 1) / TSRVI_MS);
    return due == TSRVI_FOREVER ? 0 : ms == 0 ? 1 : ms;
}

/* Has so much run since the clock was read that the loop's time is behind? */
static inline TSRVI_INLINE bool tsrvi_loop_lags(const tsrv_loop *loop)
{
    return TSRVI_UNLIKELY(tsrvi_ticks() - loop->slow.ticked > TSRVI_TICKS_FEW);
}

/* Then it is read again, before a time begins. */
static inline TSRVI_INLINE void tsrvi_loop_catch_up(tsrv_loop *loop)
{
    if (tsrvi_loop_lags(loop)) {
        tsrvi_loop_tick(loop);
        loop->slow.ticked = tsrvi_ticks();
    }
}

static int tsrvi_ms_most(int delay_ms)
{
    return delay_ms < TSRVI_MS_MOST ? delay_ms : TSRVI_MS_MOST - 1;
}

/* A time, no longer than that, which begins at the loop's. */
static inline TSRVI_INLINE uint32_t tsrvi_ms_from(const tsrv_loop *loop, int delay_ms)
{
    uint32_t ms = loop->now_ms + 1 + (uint32_t)delay_ms;
    return delay_ms < 0 ? 0 : ms + (ms == 0);
}

/* The same of any time, also between turns. */
static uint32_t tsrvi_ms_after(tsrv_loop *loop, int delay_ms)
{
    if (loop->running) {
        tsrvi_loop_catch_up(loop);
    } else {
        tsrvi_loop_tick(loop);
    }
    return tsrvi_ms_from(loop, tsrvi_ms_most(delay_ms));
}

static inline TSRVI_INLINE uint32_t tsrvi_ms_earlier(uint32_t a, uint32_t b)
{
    return a == 0 ? b : b == 0 || (int32_t)(a - b) < 0 ? a : b;
}

/* Not before events that may have come in time have been looked at: see tsrvi_loop_is_behind. */
static bool tsrvi_ms_is_past(const tsrv_loop *loop, uint32_t ms)
{
    uint32_t late_ms = loop->now_ms - ms;
    return ms != 0 && (int32_t)late_ms >= 0 && late_ms >= loop->now_ms - loop->past_ms;
}

/* As the loop's timers want it. */
static uint64_t tsrvi_ms_due(const tsrv_loop *loop, uint32_t ms)
{
    uint64_t now_ms = loop->now / TSRVI_MS;
    int32_t left = (int32_t)(ms - (uint32_t)now_ms);
    return ms == 0 ? TSRVI_FOREVER : left < 0 ? loop->now : (now_ms + (uint64_t)left) * TSRVI_MS;
}

/* ============================================================================
 * >>stream  One connection: what is known of it
 *
 * The core is one idea: a wait is a predicate, and a stream is settled in one
 * place. Calls and events only set facts: bytes came, bytes were queued, the
 * input has ended, the program has closed, a time has passed. A fact puts the
 * stream on one of the loop's lists; tsrvi_stream_settle, in >>settle, then
 *
 *     sends what is queued, and goes on with what follows the output (FIN ...),
 *     ends each wait whose predicate holds, the oldest first,
 *     has the backend wait for what the stream waits for,
 *     arms the timer for the earliest of its times.
 *
 * Nothing else sends (but for large writes, from the caller's memory), ends a
 * wait, arms a timer or registers a descriptor. A fact that an event brings is
 * settled at once. One that a call brings is settled when the piece of user code
 * that made it gives control back (IN_SOON); what then is over runs in the next
 * turn (IN_READY), so that streams which wake each other stop nobody.
 *
 * Reading. When the descriptor is readable and somebody waits for input, there is
 * one recv, into the loop's shared buffer, or behind the stream's unread bytes.
 * Unread bytes stay in the shared buffer until another stream needs it; only
 * then are they copied to one of the stream's own, and if the program still
 * holds a slice, the whole buffer changes hands instead. So an idle stream owns
 * no buffer, and a message that arrives whole is never copied.
 *
 * Writing. Small writes are collected and sent when the stream is settled. Large
 * ones are sent at once from the caller's memory, behind what is queued, and
 * only the rest is copied. A coroutine's write that is larger than the limit is
 * lent: it is queued where it lies. At most TSRVI_SEND_LIMIT bytes go at a time.
 *
 * Ends. in_end and out_end say how each direction has ended, `end` how both have
 * at once, before unread input. FEIGNED is an end of the input that is a drain's
 * doing, and no end of anything else.
 *
 * Phases, and what leads from one to the next:
 *
 *                 tsrv_shutdown  all is sent      tsrv_close,    the peer's  its end is known,
 *                                                 handler over   end         abort, error, time
 *     OPEN        SHUTTING       -                CLOSING        -           CLOSED
 *     SHUTTING    -              SHUT, by FIN     CLOSING        -           CLOSED
 *     SHUT        -              -                CLOSING        -           CLOSED
 *     CLOSING     -              LINGER, by FIN   -              -           CLOSED
 *     LINGER      -              -                -              CLOSED      CLOSED
 *
 * ("All is sent" includes a lent write, and the last words of the transport; FIN
 * is not sent twice. CLOSING with all sent and a peer that has finished, or from
 * which no answer can be on its way, is CLOSED without LINGER.)
 *
 * The handler: NEW -> RUNNING -> WAITING -> RUNNING ... -> OVER. In coroutine
 * mode it is RUNNING while it is suspended, too; WAITING means that it has
 * returned TSRV_EAGAIN. The stream is freed when it is CLOSED, the handler is
 * OVER, no wait is left on it, and on_close has been called: a wait pins it.
 * ==========================================================================*/

#define TSRVI_DIRECT ((size_t)16384) /* writes from here on are sent from the caller's memory */
#define TSRVI_SEND_LIMIT ((size_t)1024 * 1024) /* bytes sent for a stream in one go */
#define TSRVI_SMALL_INPUT ((size_t)1024)       /* least room for unread bytes of a stream's own */
/* For so long after it has sent something a peer is not idle in a drain: one that sends every
 * second by its own clock is late by what its request takes. */
#define TSRVI_FRESH_MS 1200

enum { /* tsrv_stream.phase: see above */
       TSRVI_OPEN,
       TSRVI_SHUTTING,
       TSRVI_SHUT,
       TSRVI_CLOSING,
       TSRVI_LINGER,
       TSRVI_CLOSED
};

enum { TSRVI_NEW, TSRVI_RUNNING, TSRVI_WAITING, TSRVI_OVER }; /* tsrv_stream.state */

enum { /* tsrv_stream.queued */
       TSRVI_NOWHERE,
       TSRVI_IN_SOON,  /* in loop->soon: settled when the user code that runs gives control back */
       TSRVI_IN_READY, /* in loop->ready: settled in the next turn, and what is over runs */
       TSRVI_IN_SETTLE /* it is being settled: facts that are set now are seen to */
};

/* tsrv_stream.flags: facts */
#define TSRVI_ENDED 0x1       /* end, in_end or out_end is set */
#define TSRVI_FEIGNED 0x2     /* a drain has ended the input */
#define TSRVI_DRAINING 0x4    /* its server is being drained */
#define TSRVI_SESSION 0x8     /* it has one: see >>transport */
#define TSRVI_SHAKING 0x10    /* which must shake hands first */
#define TSRVI_BLOCKED 0x20    /* the kernel did not take all: wait until it is writable */
#define TSRVI_BORROWED 0x40   /* a slice, read from outside, dies when that gives control back */
#define TSRVI_FIN 0x80        /* FIN is sent */
#define TSRVI_LOST 0x100      /* some of the output has been dropped */
#define TSRVI_TRUNCATED 0x200 /* the input has ended, but not as the transport wants it */
#define TSRVI_FILLED 0x400    /* the last recv filled its room: there is more */
#define TSRVI_LOOKED 0x800    /* there is input that nobody wants: do not ask for it again */
#define TSRVI_PARTIAL 0x1000  /* a read has taken, or dropped, a part of what it wants */
#define TSRVI_SILENT 0x2000   /* a read has timed out; nothing came or was written since */
#define TSRVI_WOKEN 0x4000    /* tsrv_wake came, and nobody waited */
#define TSRVI_UNARMED 0x8000  /* reads have limits of time, which the timer may not be armed for */
/* A stream without any of these is the common case, which is looked for first. */
/* What hinders a read from taking what is there, or waiting for it, without a further look. */
#define TSRVI_HINDERS (TSRVI_BORROWED | TSRVI_ENDED | TSRVI_FEIGNED | TSRVI_PARTIAL)
#define TSRVI_ODD                                                                   \
    (TSRVI_ENDED | TSRVI_FEIGNED | TSRVI_DRAINING | TSRVI_SESSION | TSRVI_SHAKING | \
     TSRVI_BLOCKED | TSRVI_BORROWED | TSRVI_UNARMED)

/* What is waited for: tsrvi_wait.kinds, tsrv_stream.kinds */
enum {
    TSRVI_FOR_READ = 1,    /* input for a read */
    TSRVI_FOR_INPUT = 2,   /* any more input: a handler that waits for nothing else */
    TSRVI_FOR_ROOM = 4,    /* unsent output below the high water */
    TSRVI_FOR_SENT = 8,    /* no unsent output */
    TSRVI_FOR_LENT = 16,   /* a lent write to be sent */
    TSRVI_FOR_SECURE = 32, /* the end of the handshake */
    TSRVI_FOR_WAKE = 64,   /* tsrv_wake */
    TSRVI_FOR_TURN = 128,  /* the next turn */
    TSRVI_FOR_OUTPUT = TSRVI_FOR_ROOM | TSRVI_FOR_SENT | TSRVI_FOR_LENT | TSRVI_FOR_SECURE
};

/* tsrvi_wait.facts of a stream's own: the handler's */
#define TSRVI_ENTERED 1              /* it has been called; */
#define TSRVI_TOLD 2                 /* after the end of the input */
#define TSRVI_PAYS 4                 /* a read of too much lets others run first */
#define TSRVI_TIMED 8                /* reads have, or have had, limits of time */
#define TSRVI_PARTLY 128             /* u.partial is there */

/* The same in tsrvi_wait.progress: a read in which something is read ends the first two. */
#define TSRVI_IN_READ TSRVI_FOR_READ /* a read is being repeated, whose limit is set; */
#define TSRVI_IN_WAKE TSRVI_FOR_WAKE /* a tsrv_wait */
#define TSRVI_CONSUMED 2             /* it has read something in this call */

/* Bytes that a callback-mode handler's read into its own memory, or its drop, has got so far. */
typedef struct tsrvi_partial {
    char *into; /* NULL = they are dropped */
    size_t size;
    size_t done;
    size_t need; /* as tsrvi_wait.u.need, while the read is not being repeated */
} tsrvi_partial;

/* Who waits for a stream: a coroutine, with this on its stack and one kind, or the stream's
 * handler, between its calls. */
typedef struct tsrvi_wait {
    struct tsrvi_wait *next; /* the younger ones */
    union {
        tsrvi_co *co; /* a coroutine's; of a stream's own: the handler's, while it runs */
        size_t need;  /* of a stream's own: unread bytes below which a read gets no further */
        tsrvi_partial *partial; /* the same, with PARTLY in `facts` */
        int result;             /* the same, OVER: what the handler has returned */
    } u;
    uint32_t due_ms;  /* its own limit; see tsrvi_ms_after */
    uint8_t kinds;    /* 0 = it is in no list */
    uint8_t facts;    /* of a stream's own; of a coroutine that lets others run: TSRVI_IN_READ, 0 */
    uint8_t progress; /* of a stream's own */
    bool woken;       /* tsrv_wake has ended it */
} tsrvi_wait;

/* Accepted connections: by this worker, and by all. */
typedef struct tsrvi_share {
    uint64_t own, all;
} tsrvi_share;

struct tsrv_server {
    tsrv_server_options options;    /* the defaults filled in; times that are off are TSRV_NEVER */
    tsrv_loop_options loop_options; /* to which they point, if they do */
    tsrv_loop *loop;                /* NULL until the first listen */
    tsrvi_link link;                /* in loop->servers.all, or tsrvi_process.servers */
    tsrvi_link streams;
    struct tsrvi_listener *listeners;
    tsrv_stats own;            /* its counters, */
    tsrv_stats *stats;         /* or this process's place among those of all workers */
    int number;                /* see >>shared; -1 = none */
    uint64_t open;             /* streams whose descriptor is open */
    tsrvi_addresses addresses; /* of their peers, with max_per_address */
    tsrvi_network *proxies;    /* proxy_from */
    int proxy_count;
    struct tsrvi_bound *bound; /* what tsrv_server_bind has bound for tsrv_server_start */
    int bound_count;
    bool started;        /* tsrv_server_start has been called */
    tsrvi_task task;     /* on_start, the end of a drain, the end */
    tsrvi_timer retry;   /* when what has paused goes on: the server, and single listeners */
    uint64_t resume_due; /* when the server does; TSRVI_FOREVER = when a descriptor is closed */
    uint64_t logged;     /* when failures to accept were last logged */
    tsrvi_timer drain;   /* when streams are looked at again */
    uint64_t drain_due;  /* when the grace is over */
    tsrv_condition drain_over; /* for coroutines in tsrv_server_drain */
    int drain_code;         /* of the last drain, until it is asked for: TSRV_OK or TSRV_ETIMEOUT */
    uint64_t drained;       /* streams that have ended by themselves in it, */
    uint64_t drain_aborted; /* and that its grace has left */
    bool draining;
    bool forced; /* the grace is over: what was left has been aborted */
    int backoff_ms;
    bool starting;   /* task calls on_start */
    bool paused;     /* none of its listeners accepts for now */
    bool was_away;   /* and it takes the next connection even if it is ahead of other workers, */
    uint32_t back;   /* in this turn from all of its listeners */
    uint64_t others; /* what those had accepted when it was away last, */
    int in_vain;     /* and how often it was since */
    tsrvi_share share[2]; /* what was accepted when it was last looked, and the time before */
    uint64_t share_due;   /* when it is looked at again */
    bool ending;          /* tsrv_server_free was called: it takes nothing new */
    bool freed;           /* by the program: goes with the last stream */
    bool queued;          /* the task is in loop->ready */
};

struct tsrvi_session;

/* 10,000 idle connections are 10,000 of these: at most 216 bytes, which tests hold. */
struct tsrv_stream {
    tsrvi_io io;
    tsrvi_task task; /* settles it */
    tsrv_server *server;
    struct tsrvi_session *session; /* NULL = plain: see >>transport */
    tsrvi_buffer *in;              /* unread input; NULL = none */
    tsrvi_buffer *out;             /* the queue of unsent output; NULL = none */
    uint64_t unsent;               /* bytes in it, and in the transport */
    tsrvi_wait *waits;             /* the oldest first */
    uint8_t phase, state;
    int16_t end;    /* how both directions have ended at once; 0 = they have not */
    uint8_t queued; /* these three are looked at together: see tsrvi_stream_only_reads */
    uint8_t kinds;  /* of all waits */
    uint16_t flags;
    int16_t in_end;       /* how the input has: TSRV_EOF or an error */
    int16_t out_end;      /* how the output has: TSRV_ECLOSED after tsrv_shutdown, or an error */
    uint32_t active_ms;   /* when a byte last went either way, or a read began */
    uint32_t fresh_ms;    /* when bytes last came, or it was accepted */
    uint32_t own_due_ms;  /* when the handshake, the blocked output or the lingering must be over */
    uint32_t deadline_ms; /* of all reads and waits */
    uint32_t wake_due_ms; /* of the callback-mode handler's tsrv_wait */
    int read_ms;          /* TSRV_NEVER = no limit */
    int write_ms;
    tsrvi_wait own; /* the handler's */
    tsrv_handler handler;
    tsrvi_link link; /* in server->streams */
    tsrvi_timer timer;
    tsrvi_peer peer;
#ifdef TSRV_DEBUG
    const char *waited;   /* the read that the callback-mode handler has waited in */
    const char *waits_in; /* the same, in this call */
    size_t count;         /* of its last tsrv_read_bytes */
    uint32_t failed_turn; /* of the loop, when a call last failed */
    uint32_t failing_ms;  /* when the first of those in a row did */
    unsigned failures;    /* in a row */
#endif
};

static tsrv_loop *tsrvi_loop_of(const tsrv_stream *stream)
{
    return stream->server->loop;
}

/* queued, kinds and flags of a stream in one number, so that one comparison looks at all. */
static inline TSRVI_INLINE uint32_t tsrvi_status(int queued, int kinds, int flags)
{
    struct {
        uint8_t queued, kinds;
        uint16_t flags;
    } fields = {(uint8_t)queued, (uint8_t)kinds, (uint16_t)flags};
    uint32_t status;
    memcpy(&status, &fields, sizeof(status));
    return status;
}

static inline TSRVI_INLINE uint32_t tsrvi_stream_status(const tsrv_stream *stream)
{
    uint32_t status;
    memcpy(&status, (const char *)stream + offsetof(tsrv_stream, queued), sizeof(status));
    return status;
}

static inline TSRVI_INLINE bool tsrvi_is(const tsrv_stream *stream, int facts)
{
    return (stream->flags & facts) != 0;
}

static inline TSRVI_INLINE void tsrvi_set(tsrv_stream *stream, int facts)
{
    if ((facts & TSRVI_HINDERS) != 0) {
        tsrvi_loop_of(stream)->plain = NULL;
    }
    stream->flags = (uint16_t)(stream->flags | facts);
}

static inline TSRVI_INLINE void tsrvi_clear(tsrv_stream *stream, int facts)
{
    stream->flags = (uint16_t)(stream->flags & ~facts);
}

/* The same of the handler. */
static inline TSRVI_INLINE void tsrvi_own_set(tsrv_stream *stream, int facts)
{
    if ((facts & TSRVI_PARTLY) != 0) {
        tsrvi_loop_of(stream)->plain = NULL;
    }
    stream->own.facts = (uint8_t)(stream->own.facts | facts);
}

static inline TSRVI_INLINE void tsrvi_own_clear(tsrv_stream *stream, int facts)
{
    stream->own.facts = (uint8_t)(stream->own.facts & ~facts);
}

static inline TSRVI_INLINE void tsrvi_own_begin(tsrv_stream *stream, int progress)
{
    stream->own.progress = (uint8_t)(stream->own.progress | progress);
}

static inline TSRVI_INLINE void tsrvi_own_finish(tsrv_stream *stream, int progress)
{
    stream->own.progress = (uint8_t)(stream->own.progress & ~progress);
}

/* Reads have limits of time from now on, or other ones. */
static inline TSRVI_INLINE void tsrvi_stream_times(tsrv_stream *stream)
{
    tsrvi_own_set(stream, TSRVI_TIMED);
    tsrvi_set(stream, TSRVI_UNARMED);
}

static inline TSRVI_INLINE bool tsrvi_is_timed(const tsrv_stream *stream)
{
    return (stream->own.facts & TSRVI_TIMED) != 0;
}

/* The handler will wait for this when it returns TSRV_EAGAIN; or it will not. */
static inline TSRVI_INLINE void tsrvi_own_wants(tsrv_stream *stream, tsrv_loop *loop, int kinds)
{
    loop->plain = NULL;
    stream->own.kinds = (uint8_t)(stream->own.kinds | kinds);
}

static inline TSRVI_INLINE void tsrvi_own_has(tsrv_stream *stream, int kinds)
{
    stream->own.kinds = (uint8_t)(stream->own.kinds & ~kinds);
}

/* Unread bytes below which the handler's wait for input is not over. */
static size_t *tsrvi_own_need(tsrv_stream *stream)
{
    return (stream->own.facts & TSRVI_PARTLY) != 0 ? &stream->own.u.partial->need
                                                   : &stream->own.u.need;
}

/* The same of its read, which may have all that it wants in memory of its own. */
static inline TSRVI_INLINE size_t tsrvi_own_read_need(const tsrv_stream *stream)
{
    return (stream->own.facts & TSRVI_PARTLY) == 0                      ? stream->own.u.need
           : stream->own.u.partial->done == stream->own.u.partial->size ? 0
                                                                        : 1;
}

/* Run the server's task in the next turn. */
static void tsrvi_server_later(tsrv_server *server)
{
    if (!server->queued) {
        server->queued = true;
        tsrvi_tasks_push(&server->loop->ready, &server->task);
    }
}

/* A call has set a fact: settle the stream when the user code that runs gives control back. */
static inline TSRVI_INLINE void tsrvi_stream_soon(tsrv_stream *stream)
{
    if (stream->queued == TSRVI_NOWHERE) {
        stream->queued = TSRVI_IN_SOON;
        tsrvi_tasks_push(&tsrvi_loop_of(stream)->soon, &stream->task);
    }
}

/* The same in the next turn, and what is over then runs. One that is in `soon` goes from there. */
static void tsrvi_stream_later(tsrv_stream *stream)
{
    if (stream->queued == TSRVI_NOWHERE) {
        stream->queued = TSRVI_IN_READY;
        tsrvi_tasks_push(&tsrvi_loop_of(stream)->ready, &stream->task);
    }
}

/* Go on to a phase: the table above, as bits of those that may follow each. */
static void tsrvi_stream_enter(tsrv_stream *stream, int phase)
{
    static const uint8_t follow[] = {
        1 << TSRVI_SHUTTING | 1 << TSRVI_CLOSING | 1 << TSRVI_CLOSED, /* OPEN */
        1 << TSRVI_SHUT | 1 << TSRVI_CLOSING | 1 << TSRVI_CLOSED,     /* SHUTTING */
        1 << TSRVI_CLOSING | 1 << TSRVI_CLOSED,                       /* SHUT */
        1 << TSRVI_LINGER | 1 << TSRVI_CLOSED,                        /* CLOSING */
        1 << TSRVI_CLOSED,                                            /* LINGER */
        0,                                                            /* CLOSED */
    };
    bool follows = (follow[stream->phase] >> phase & 1) != 0;
    TSRV_ASSERT(follows);
    (void)follows; /* with NDEBUG */
    stream->phase = (uint8_t)phase;
}

/* Will nothing happen any more but on_close? */
static bool tsrvi_stream_finished(const tsrv_stream *stream)
{
    return stream->phase == TSRVI_CLOSED && stream->state == TSRVI_OVER;
}

/* How the input has ended for its readers, a drain's feint included; 0 = it has not. */
static inline TSRVI_INLINE int tsrvi_stream_in_end(const tsrv_stream *stream)
{
    return stream->in_end != 0 ? stream->in_end : tsrvi_is(stream, TSRVI_FEIGNED) ? TSRV_EOF : 0;
}

/* Does no more of the output go out? It does after tsrv_shutdown, until all that was queued has. */
static inline TSRVI_INLINE bool tsrvi_stream_output_failed(const tsrv_stream *stream)
{
    return stream->out_end != 0 && stream->out_end != TSRV_ECLOSED;
}

/* Is more unsent than a writer may leave behind? Where memory is tight that is nothing. */
static inline TSRVI_INLINE bool tsrvi_stream_above_mark(const tsrv_stream *stream)
{
    return stream->unsent != 0 &&
           (stream->unsent > stream->server->options.write_high_water ||
            tsrvi_loop_of(stream)->streams.pool.tight) &&
           !tsrvi_stream_output_failed(stream);
}

/* Remember which limit was met: the log names it if the handler fails for it. */
static int tsrvi_stream_limited(tsrv_stream *stream, int code, const char *limit, size_t size)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    loop->streams.limited = stream;
    loop->streams.limit = limit;
    loop->streams.limit_size = size;
    return code;
}

/* ---- times -----------------------------------------------------------------*/

/* When its peer, from which no byte came and to which none went, has been idle for too long. */
static inline TSRVI_INLINE uint32_t tsrvi_stream_idle_due(const tsrv_stream *stream)
{
    int idle_ms = stream->server->options.idle_timeout_ms;
    uint32_t due = stream->active_ms +
                   (idle_ms < TSRVI_MS_MOST ? (uint32_t)idle_ms + 1 : (uint32_t)TSRVI_MS_MOST);
    return idle_ms < 0 ? 0 : due == 0 ? 1 : due;
}

/* When unsent output of which no byte is taken must have ended. An answer that is the last, for the
 * output has failed, is not waited for any longer than a close. */
static uint32_t tsrvi_stream_write_due(const tsrv_stream *stream)
{
    const tsrv_server_options *options = &stream->server->options;
    return tsrvi_ms_after(tsrvi_loop_of(stream), tsrvi_stream_output_failed(stream)
                                                     ? options->close_timeout_ms
                                                     : stream->write_ms);
}

/* ============================================================================
 * >>debug  Mistakes of a program, named (TSRV_DEBUG)
 *
 * Calls on a stream that can fail go through TSRVI_CHECKED. Each mistake is told
 * once for each function that it is made with.
 * ==========================================================================*/

#ifdef TSRV_DEBUG
#define TSRVI_CHECKED(stream, call) tsrvi_debug_result(stream, __func__, call)
#define TSRVI_DEBUG_FAILURES 1000   /* in a row, none of which has let go for long */
#define TSRVI_DEBUG_FAILURES_MS 100 /* and all in less: one that has waited is no mistake */

/* Say it, if it is new. */
static void tsrvi_debug_tell(const tsrv_stream *stream, const char *function, const char *mistake)
{
    char text[TSRV_ADDRESS_SIZE];
    if (tsrvi_mistake_is_new(function, mistake)) {
        tsrvi_log(TSRV_LOG_WARNING, "TSRV_DEBUG: %s for %s: %s", function,
                  tsrvi_peer_format(&stream->peer, text, sizeof(text)), mistake);
    }
}

/* The handler is called because its read can go on. */
static void tsrvi_debug_call(tsrv_stream *stream)
{
    stream->waited = stream->own.kinds == TSRVI_FOR_READ ? stream->waits_in : NULL;
    stream->waits_in = NULL;
}

/* A read by the callback-mode handler: the first one of a call has to be the one that has waited.
 */
static void tsrvi_debug_read(tsrv_stream *stream, const char *function, int rc)
{
    if (stream->waited != NULL && stream->waited != function) {
        tsrvi_debug_tell(stream, function,
                         "the handler waited in another read, and was called again for that");
    }
    stream->waited = NULL;
    stream->waits_in = rc == TSRV_EAGAIN ? function : NULL;
}

/* A tsrv_read_bytes of the callback-mode handler's begins, or is repeated. */
static void tsrvi_debug_count(tsrv_stream *stream, const char *function, size_t count)
{
    if (tsrvi_loop_of(stream)->streams.handling != stream) {
        return;
    }
    if (stream->waited == function && stream->count != count) {
        tsrvi_debug_tell(stream, function, "the handler waited for another count of bytes");
    }
    stream->count = count;
}

/* A callback-mode handler has returned. */
static void tsrvi_debug_returned(const tsrv_stream *stream, int rc)
{
    if (rc == TSRV_OK && stream->waits_in != NULL && stream->end == 0 &&
        stream->phase == TSRVI_OPEN && !tsrvi_is(stream, TSRVI_DRAINING)) {
        tsrvi_debug_tell(stream, stream->waits_in,
                         "said TSRV_EAGAIN, and the handler returned something else, which ends "
                         "the connection");
    }
}

static int tsrvi_debug_result(tsrv_stream *stream, const char *function, int rc)
{
    const tsrv_loop *loop = tsrvi_loop_of(stream);
    bool reads = strncmp(function, "tsrv_read", 9) == 0;
    if (loop->running && loop->thread != (const void *)&tsrvi_thread) {
        tsrvi_debug_tell(stream, function,
                         "called on another thread than its loop's, where only tsrv_loop_post may "
                         "be called");
        return rc;
    }
    if (loop->streams.handling == stream && reads) {
        tsrvi_debug_read(stream, function, rc);
    } else if (loop->streams.handling == stream && rc != TSRV_EAGAIN) {
        stream->waits_in = NULL; /* there was another reason to end */
    }
    if (rc == TSRV_EAGAIN && !reads && loop->streams.handling != stream) {
        tsrvi_debug_tell(stream, function,
                         "nothing can wait here, neither a coroutine nor the stream's handler");
    }
    if (rc >= 0 || loop->turns - stream->failed_turn > (rc == TSRV_EAGAIN ? 0 : 1)) {
        stream->failures = 0;
    }
    stream->failed_turn = loop->turns;
    if (rc < 0 && stream->failures++ == 0) {
        stream->failing_ms = loop->now_ms;
    }
    if (stream->failures == TSRVI_DEBUG_FAILURES) {
        stream->failures = 0;
        if (loop->now_ms - stream->failing_ms < TSRVI_DEBUG_FAILURES_MS) {
            tsrvi_debug_tell(stream, function, "is called again and again, and always fails");
        }
    }
    return rc;
}
#else
#define TSRVI_CHECKED(stream, call) (call)
#endif

/* ============================================================================
 * >>transport  What carries a stream's bytes
 *
 * A stream's bytes go over its socket as they are, or over a session: TLS, of which
 * see the next sections. A transport is one table of functions, with which a
 * session begins; a stream without one is plain. What a session holds itself,
 * records that are not sent yet, is counted in stream->unsent.
 *
 * None of them waits, ends a stream or calls the program. They return codes, and
 * the stream's sections say what follows from them. These touch the socket nowhere
 * else, but for the common send of a plain stream (>>ends) and what a stream tells
 * of its socket (>>state), so that a stream can do without one.
 * ==========================================================================*/

/* One try to send. */
typedef struct tsrvi_sending {
    const char *data; /* the caller's, behind what is queued */
    size_t size;
    size_t taken; /* bytes of data */
    size_t sent;  /* bytes that the kernel has taken */
    bool gap;     /* an error has left one, so that nothing can follow */
} tsrvi_sending;

typedef struct tsrvi_transport {
    /* Send what is queued, then data, up to TSRVI_SEND_LIMIT. Returns TSRV_OK: all that could be
     * sent has been; TSRV_EAGAIN: go on when the socket is writable; or why the output has ended.
     */
    int (*send)(tsrv_stream *stream, tsrvi_sending *sending);
    /* Receive once. Returns how much came; TSRV_EAGAIN; or how the input has ended. */
    ssize_t (*recv)(tsrv_stream *stream, char *into, size_t size);
    /* Is there input, or has it ended? The bytes stay where they are. Returns TSRV_OK (there is
     * some), TSRV_EAGAIN, TSRV_EOF or an error. */
    int (*peek)(tsrv_stream *stream);
    /* Has the peer's system taken all that was sent? False, too, where the system does not tell. */
    bool (*is_delivered)(const tsrv_stream *stream);
    /* Does the session hold input that no event will tell of? */
    bool (*holds)(const tsrv_stream *stream);
    /* Does it hold nothing at all of what has come? While hands are to be shaken: has nothing come
     * of that? */
    bool (*is_empty)(tsrv_stream *stream);
    /* Go on with the handshake. Returns TSRV_OK when it is done; TSRV_EAGAIN; or why it has failed.
     */
    int (*shake)(tsrv_stream *stream);
    /* All is sent: queue the last words, once. Returns whether there are any. */
    bool (*finish)(tsrv_stream *stream);
    /* The output has ended with code, or the input has: can nothing more come, that would turn the
     * last words into a reset? */
    bool (*is_over)(const tsrv_stream *stream, int code);
    /* The output has ended with code: drop what the session has to send, but for its last words
     * about that. */
    void (*drop)(tsrv_stream *stream, int code);
    void (*free)(tsrv_stream *stream);
    /* Have the loop wait for TSRV_READABLE, TSRV_WRITABLE and TSRVI_HANGUP, and nothing else;
     * stream->io.interest says for what. Returns TSRV_OK or an error. */
    int (*watch)(tsrv_stream *stream, int interest);
    /* FIN, behind what was sent. */
    void (*shut)(tsrv_stream *stream);
    /* The error that a hang-up has left, or TSRV_OK. */
    int (*error)(tsrv_stream *stream);
    /* Give up the socket, or reset it. */
    void (*close)(tsrv_stream *stream, bool reset);
} tsrvi_transport;

typedef struct tsrvi_session {
    const tsrvi_transport *transport;
    uint64_t kept; /* see tsrvi_output_kept */
} tsrvi_session;

/* ---- the queue -------------------------------------------------------------*/

/* Give a buffer back. Large ones are kept for as long as they are used. */
static TSRVI_APART void tsrvi_loop_recycle_large(tsrv_loop *loop, tsrvi_buffer *buffer)
{
    tsrvi_pool_give_large(&loop->streams.pool, buffer);
    if (loop->streams.pool.large != NULL && loop->streams.trim.position == 0) {
        tsrvi_heap_set(&loop->heap, &loop->streams.trim, tsrvi_after(loop->now, TSRVI_TRIM_MS));
    }
}

static inline TSRVI_INLINE void tsrvi_loop_recycle(tsrv_loop *loop, tsrvi_buffer *buffer)
{
    if (TSRVI_UNLIKELY(!tsrvi_pool_keep(&loop->streams.pool, buffer))) {
        tsrvi_loop_recycle_large(loop, buffer);
    }
}

/* A buffer leaves the queue: sent, or dropped. */
static inline TSRVI_INLINE void tsrvi_output_free(tsrv_stream *stream, tsrvi_buffer *buffer)
{
    if (TSRVI_LIKELY(buffer->kind == TSRVI_OWNED)) {
        tsrvi_loop_recycle(tsrvi_loop_of(stream), buffer);
    } else if (buffer->kind == TSRVI_FILE) {
        int file = buffer->file;
        tsrvi_loop_recycle(tsrvi_loop_of(stream), buffer);
        tsrvi_loop_close_fd(tsrvi_loop_of(stream), file);
    } else if (buffer->begin != buffer->end) {
        buffer->kind = TSRVI_DROPPED; /* its writer will see */
    }
}

/* Take what was sent off the queue. Returns what went beyond it. */
static inline TSRVI_INLINE size_t tsrvi_output_sent(tsrv_stream *stream, size_t sent)
{
    tsrvi_buffer *buffer;
    while ((buffer = stream->out) != NULL) {
        size_t size = buffer->end - buffer->begin;
        if (TSRVI_UNLIKELY(sent < size)) {
            buffer->begin += sent;
            stream->unsent -= sent;
            return 0;
        }
        stream->unsent -= size;
        sent -= size;
        buffer->begin = buffer->end;
        tsrvi_output_free(stream, tsrvi_queue_pop(&stream->out));
    }
    return sent;
}

static void tsrvi_output_drop(tsrv_stream *stream)
{
    while (stream->out != NULL) {
        tsrvi_buffer *buffer = tsrvi_queue_pop(&stream->out);
        stream->unsent -= tsrvi_buffer_size(buffer);
        tsrvi_output_free(stream, buffer);
        tsrvi_set(stream, TSRVI_LOST);
    }
}

/* Read the next bytes of a file in the queue. Returns how many, or why not. */
static ssize_t tsrvi_output_read(const tsrvi_buffer *buffer, char *into, size_t size)
{
    ssize_t got;
    do {
        got = TSRV_SYS(pread, (buffer->file, into, tsrvi_min(size, tsrvi_buffer_size(buffer)),
                               (off_t)(buffer->offset + (int64_t)buffer->begin)));
    } while (got < 0 && errno == EINTR);
    return got > 0 ? got : got < 0 ? tsrvi_error() : -EIO; /* it is shorter than was promised */
}

/* ---- plain: the socket -----------------------------------------------------*/

#define TSRVI_SEND_PIECES 64 /* of one sendmsg */

#if TSRVI_HAS_SENDFILE
/* sendfile(2) has no MSG_NOSIGNAL, and raises SIGPIPE also when the reset came behind a first part
 * that it has sent. */
static ssize_t tsrvi_sendfile(int fd, int file, int64_t offset, size_t size)
{
    off_t from = (off_t)offset;
    tsrvi_quiet quiet;
    ssize_t sent;
    tsrvi_quiet_begin(&quiet);
    sent = TSRV_SYS(sendfile, (fd, file, &from, size));
    tsrvi_quiet_end(&quiet, sent, size);
    return sent;
}
#endif

/* Send a part of a file by way of memory. */
static TSRVI_APART ssize_t tsrvi_plain_send_copy(int fd, const tsrvi_buffer *buffer, size_t *tried)
{
    char copy[8192];
    ssize_t got = tsrvi_output_read(buffer, copy, sizeof(copy));
    if (got < 0) {
        errno = (int)-got;
        return -1;
    }
    *tried = (size_t)got;
    return TSRV_SYS(send, (fd, copy, (size_t)got, TSRVI_SEND_FLAGS));
}

/* Send a part of a file. Some files, and some policies, do not have it sent by the kernel: nothing
 * has been sent then. */
static TSRVI_APART ssize_t tsrvi_plain_send_file(int fd, tsrvi_buffer *buffer, size_t *tried)
{
#if TSRVI_HAS_SENDFILE
    if (!buffer->copied) {
        ssize_t sent;
        *tried = tsrvi_min(tsrvi_buffer_size(buffer), TSRVI_SEND_LIMIT);
        sent = tsrvi_sendfile(fd, buffer->file, buffer->offset + (int64_t)buffer->begin, *tried);
        if (sent == 0) {
            errno = EIO; /* it is shorter than was promised */
        }
        if (sent > 0 || (sent == 0 || !(errno == EOVERFLOW || tsrvi_is_refusal(-errno)))) {
            return sent > 0 ? sent : -1;
        }
        tsrvi_do_without(TSRVI_WITHOUT_SENDFILE, "sendfile", -errno);
        buffer->copied = true;
    }
#endif
    return tsrvi_plain_send_copy(fd, buffer, tried);
}

/* Send several buffers, and data behind them, with one call. */
static TSRVI_APART ssize_t tsrvi_plain_send_pieces(int fd, const tsrvi_buffer *buffer,
                                                   const char *data, size_t size, size_t *tried)
{
    struct iovec pieces[TSRVI_SEND_PIECES];
    struct msghdr message;
    size_t total = 0;
    memset(&message, 0, sizeof(message));
    message.msg_iov = pieces;
    /* The kernels' types of msg_iovlen differ: it counts by itself. */
    for (; buffer != NULL && buffer->kind != TSRVI_FILE &&
           message.msg_iovlen < TSRVI_SEND_PIECES - 1 && total < TSRVI_SEND_LIMIT;
         buffer = buffer->next) {
        struct iovec *piece = &pieces[message.msg_iovlen++];
        piece->iov_base = buffer->data + buffer->begin;
        piece->iov_len = tsrvi_min(tsrvi_buffer_size(buffer), TSRVI_SEND_LIMIT - total);
        total += piece->iov_len;
    }
    if (buffer == NULL && size != 0 && total < TSRVI_SEND_LIMIT) {
        union {
            const void *in;
            void *out;
        } unconst; /* iov_base is not const, though sendmsg does not write to it */
        struct iovec *piece = &pieces[message.msg_iovlen++];
        unconst.in = data;
        piece->iov_base = unconst.out;
        piece->iov_len = tsrvi_min(size, TSRVI_SEND_LIMIT - total);
        total += piece->iov_len;
    }
    *tried = total;
    return TSRV_SYS(sendmsg, (fd, &message, TSRVI_SEND_FLAGS));
}

/* Send what is at the head of a queue, and data behind it if it reaches that far. Returns what send
 * does; *tried is how much the kernel was offered. */
static inline TSRVI_INLINE ssize_t tsrvi_plain_send_some(int fd, tsrvi_buffer *buffer,
                                                         const char *data, size_t size,
                                                         size_t *tried)
{
    if (TSRVI_LIKELY(buffer != NULL)) {
        if (TSRVI_UNLIKELY(buffer->kind == TSRVI_FILE)) {
            return tsrvi_plain_send_file(fd, buffer, tried);
        }
        if (TSRVI_UNLIKELY(buffer->next != NULL || size != 0)) {
            return tsrvi_plain_send_pieces(fd, buffer, data, size, tried);
        }
        data = buffer->data + buffer->begin;
        size = buffer->end - buffer->begin;
    }
    *tried = tsrvi_min(size, TSRVI_SEND_LIMIT);
    return TSRV_SYS(send, (fd, data, *tried, TSRVI_SEND_FLAGS));
}

/* Why a send failed. XNU says EPROTOTYPE when a reset comes in between its looks at the connection
 * (tcp_usr_send). */
static int tsrvi_plain_send_error(void)
{
    return tsrvi_would_block(errno) ? (int)TSRV_EAGAIN
           : errno == EPROTOTYPE    ? -ECONNRESET
                                    : tsrvi_error();
}

/* Is the connection over, as tcp(7) and ip(7) tell it? Else it is the file that cannot be read. */
static bool tsrvi_plain_is_lost(int code)
{
    return code == -EPIPE || code == -ECONNRESET || code == -ETIMEDOUT || code == -EHOSTUNREACH ||
           code == -ENETUNREACH || code == -ENETDOWN || code == -ENOTCONN || code == -ECONNABORTED;
}

/* Why it did not send: TSRV_OK after EINTR. A file that cannot be read leaves a gap.
 *   head  what was to be sent first; NULL = the caller's memory */
static TSRVI_APART int tsrvi_plain_send_failed(const tsrvi_buffer *head, tsrvi_sending *sending)
{
    int code = tsrvi_plain_send_error();
    sending->gap = head != NULL && head->kind == TSRVI_FILE && code != TSRV_EAGAIN &&
                   !tsrvi_plain_is_lost(code);
    return code == -EINTR ? (int)TSRV_OK : code;
}

static inline TSRVI_INLINE int tsrvi_plain_send(tsrv_stream *stream, tsrvi_sending *sending)
{
    int rc = TSRV_OK;
    while (rc == TSRV_OK && stream->unsent + (sending->size - sending->taken) != 0) {
        size_t tried = 0;
        ssize_t sent =
            tsrvi_plain_send_some(stream->io.fd, stream->out, sending->data + sending->taken,
                                  sending->size - sending->taken, &tried);
        if (TSRVI_UNLIKELY(sent < 0)) {
            rc = tsrvi_plain_send_failed(stream->out, sending);
            continue;
        }
        sending->sent += (size_t)sent;
        sending->taken += tsrvi_output_sent(stream, (size_t)sent);
        rc = (size_t)sent < tried || sending->sent >= TSRVI_SEND_LIMIT ? (int)TSRV_EAGAIN
                                                                       : (int)TSRV_OK;
    }
    return rc;
}

static inline TSRVI_INLINE ssize_t tsrvi_recv(int fd, char *into, size_t size, int flags)
{
    ssize_t got;
    do {
        got = TSRV_SYS(recv, (fd, into, size, flags));
    } while (got < 0 && errno == EINTR);
    return got > 0                    ? got
           : got == 0                 ? (ssize_t)TSRV_EOF
           : tsrvi_would_block(errno) ? (ssize_t)TSRV_EAGAIN
                                      : tsrvi_error();
}

static inline TSRVI_INLINE ssize_t tsrvi_plain_recv(tsrv_stream *stream, char *into, size_t size)
{
    return tsrvi_recv(stream->io.fd, into, size, MSG_DONTWAIT);
}

/* The same, but the bytes stay where they are. */
static ssize_t tsrvi_plain_peek_at(tsrv_stream *stream, char *into, size_t size)
{
    return tsrvi_recv(stream->io.fd, into, size, MSG_DONTWAIT | MSG_PEEK);
}

static int tsrvi_plain_peek(tsrv_stream *stream)
{
    char byte;
    ssize_t got = tsrvi_plain_peek_at(stream, &byte, 1);
    return got > 0 ? (int)TSRV_OK : (int)got;
}

/* How many bytes the kernel keeps for the peer; negative = it does not say. tcp(7): SIOCOUTQ, which
 * is TIOCOUTQ there; ioctl(2) of the BSDs: FIONWRITE; macOS: SO_NWRITE. */
static int tsrvi_plain_kept(const tsrv_stream *stream)
{
    int kept = -1;
#if defined(SO_NWRITE)
    socklen_t size = sizeof(kept);
    return TSRV_SYS(getsockopt, (stream->io.fd, SOL_SOCKET, SO_NWRITE, &kept, &size)) == 0 ? kept
                                                                                           : -1;
#elif defined(FIONWRITE)
    return TSRV_SYS(ioctl, (stream->io.fd, FIONWRITE, &kept)) == 0 ? kept : -1;
#elif defined(__linux__)
    return TSRV_SYS(ioctl, (stream->io.fd, TIOCOUTQ, &kept)) == 0 ? kept : -1;
#else
    (void)stream;
    return kept;
#endif
}

/* What a unix socket has taken is with the peer at once. */
static bool tsrvi_plain_is_delivered(const tsrv_stream *stream)
{
    return stream->peer.local || tsrvi_plain_kept(stream) == 0;
}

static bool tsrvi_plain_holds(const tsrv_stream *stream)
{
    (void)stream;
    return false;
}

static bool tsrvi_plain_is_empty(tsrv_stream *stream)
{
    (void)stream;
    return true;
}

static bool tsrvi_plain_finish(tsrv_stream *stream)
{
    (void)stream;
    return false;
}

static bool tsrvi_plain_is_over(const tsrv_stream *stream, int code)
{
    (void)stream;
    (void)code;
    return true;
}

static void tsrvi_plain_drop(tsrv_stream *stream, int code)
{
    (void)stream;
    (void)code;
}

static void tsrvi_plain_free(tsrv_stream *stream)
{
    (void)stream;
}

static int tsrvi_plain_watch(tsrv_stream *stream, int interest)
{
    return tsrvi_poller_set(&tsrvi_loop_of(stream)->poller, &stream->io, interest);
}

static void tsrvi_plain_shut(tsrv_stream *stream)
{
    TSRV_SYS(shutdown, (stream->io.fd, SHUT_WR));
}

static int tsrvi_plain_error(tsrv_stream *stream)
{
    int error = 0;
    socklen_t size = sizeof(error);
    return TSRV_SYS(getsockopt, (stream->io.fd, SOL_SOCKET, SO_ERROR, &error, &size)) < 0 ? TSRV_OK
                                                                                          : -error;
}

static void tsrvi_plain_close(tsrv_stream *stream, bool reset)
{
    int fd = stream->io.fd;
    if (reset) {
        tsrvi_reset(fd);
    }
    tsrvi_poller_forget(&tsrvi_loop_of(stream)->poller, &stream->io);
    stream->io.fd = -1;
    tsrvi_loop_close_fd(tsrvi_loop_of(stream), fd);
}

static const tsrvi_transport tsrvi_plain_transport = {
    tsrvi_plain_send,
    tsrvi_plain_recv,
    tsrvi_plain_peek,
    tsrvi_plain_is_delivered,
    tsrvi_plain_holds,
    tsrvi_plain_is_empty,
    NULL,
    tsrvi_plain_finish,
    tsrvi_plain_is_over,
    tsrvi_plain_drop,
    tsrvi_plain_free,
    tsrvi_plain_watch,
    tsrvi_plain_shut,
    tsrvi_plain_error,
    tsrvi_plain_close,
};

/* ---- the seam --------------------------------------------------------------*/

static inline TSRVI_INLINE const tsrvi_transport *tsrvi_transport_of(const tsrv_stream *stream)
{
    return TSRVI_LIKELY(!tsrvi_is(stream, TSRVI_SESSION)) ? &tsrvi_plain_transport
                                                          : stream->session->transport;
}

/* What every message needs goes by a direct call, if it is plain. */
static inline TSRVI_INLINE int tsrvi_transport_send(tsrv_stream *stream, tsrvi_sending *sending)
{
    return TSRVI_LIKELY(!tsrvi_is(stream, TSRVI_SESSION))
               ? tsrvi_plain_send(stream, sending)
               : stream->session->transport->send(stream, sending);
}

/* Has TLS said in the log why it has failed? It has if it was this stream's. */
static bool tsrvi_transport_has_told(const tsrv_stream *stream, int code)
{
    return code == TSRV_ETLS &&
           (stream->session != NULL || tsrvi_loop_of(stream)->streams.limited == stream);
}

static inline TSRVI_INLINE ssize_t tsrvi_transport_recv(tsrv_stream *stream, char *into,
                                                        size_t size)
{
    return TSRVI_LIKELY(!tsrvi_is(stream, TSRVI_SESSION))
               ? tsrvi_plain_recv(stream, into, size)
               : stream->session->transport->recv(stream, into, size);
}

static inline TSRVI_INLINE bool tsrvi_transport_holds(const tsrv_stream *stream)
{
    return TSRVI_UNLIKELY(tsrvi_is(stream, TSRVI_SESSION)) &&
           stream->session->transport->holds(stream);
}

/* ============================================================================
 * >>proxy  The PROXY protocol: a stream before its header has come
 *
 * Where it is on, a stream begins with a session that only shakes hands: it
 * takes the header from the socket, and nothing of what lies behind that, since
 * a TLS handshake may. The handler is not called before, and the program knows
 * nothing of the stream. Then the stream goes on as one of the client: see
 * tsrvi_stream_introduced in >>admit.
 * ==========================================================================*/

#define TSRVI_ALIGNED(type) ((sizeof(type) + 15) & ~(size_t)15)
#define TSRVI_STREAM_SIZE TSRVI_ALIGNED(tsrv_stream)

/* In the stream's memory, behind it. */
typedef struct tsrvi_proxy {
    tsrvi_session session;
    tsrvi_peer sender; /* who has connected; stream->peer becomes the client */
    char *header;      /* NULL before its first byte, and when nothing of it is needed any more */
    size_t size;       /* of it; until it has come what there is room for */
    size_t have;
    size_t tlvs;   /* where they begin */
    bool asks;     /* on_accept is to be asked */
    bool admitted; /* the client is counted */
} tsrvi_proxy;

/* NULL = the stream's server does without. */
static tsrvi_proxy *tsrvi_proxy_of(tsrv_stream *stream)
{
    return stream->server->options.proxy_protocol == TSRV_PROXY_NONE
               ? NULL
               : (tsrvi_proxy *)(void *)((char *)stream + TSRVI_STREAM_SIZE);
}

/* Where the program's own bytes begin in a stream's memory. */
static size_t tsrvi_stream_data_at(const tsrv_server *server)
{
    return TSRVI_STREAM_SIZE +
           (server->options.proxy_protocol == TSRV_PROXY_NONE ? 0 : TSRVI_ALIGNED(tsrvi_proxy));
}

/* Room for so many bytes of the header. */
static int tsrvi_proxy_reserve(tsrvi_proxy *proxy, size_t size)
{
    char *more = size <= proxy->size ? proxy->header : (char *)TSRV_REALLOC(proxy->header, size);
    if (more == NULL) {
        return -ENOMEM;
    }
    proxy->header = more;
    proxy->size = size > proxy->size ? size : proxy->size;
    return TSRV_OK;
}

/* Receive the next part of a line whose length is not known: what lies behind it stays. */
static ssize_t tsrvi_proxy_receive_line(tsrv_stream *stream, char *into, size_t size)
{
    ssize_t got = tsrvi_plain_peek_at(stream, into, size);
    const char *end = got > 0 ? (const char *)memchr(into, '\n', (size_t)got) : NULL;
    return got <= 0 ? got
                    : tsrvi_plain_recv(stream, into,
                                       end != NULL ? (size_t)(end - into) + 1 : (size_t)got);
}

/* Receive more of the header. Returns TSRV_OK: all of it is there; or as a transport's shake. */
static int tsrvi_proxy_receive(tsrv_stream *stream, tsrvi_proxy *proxy)
{
    ssize_t got = 1;
    while (got > 0) {
        size_t size = tsrvi_proxy_size(proxy->header, proxy->have);
        size_t room = size == 0 ? TSRVI_PROXY_LINE : size;
        int rc;
        if (size == proxy->have) {
            return TSRV_OK;
        }
        if (size == SIZE_MAX) {
            return TSRV_EPROXY;
        }
        if ((rc = tsrvi_proxy_reserve(proxy, room)) < 0) {
            return rc;
        }
        TSRV_ASSERT(room > proxy->have && room <= proxy->size);
        got = size == 0 ? tsrvi_proxy_receive_line(stream, proxy->header + proxy->have,
                                                   room - proxy->have)
                        : tsrvi_plain_recv(stream, proxy->header + proxy->have, size - proxy->have);
        proxy->have += got > 0 ? (size_t)got : 0;
    }
    return got == TSRV_EOF ? (int)TSRV_EPROXY : (int)got;
}

/* Say what is wrong with the header of a stream, unless it is only somebody who has connected and
 * gone again, as a health check does. */
static void tsrvi_proxy_complain(const tsrvi_proxy *proxy, const char *fault)
{
    char text[TSRV_ADDRESS_SIZE];
    if (proxy->have != 0) {
        tsrvi_log_limited(TSRVI_LOG_PROXY, TSRV_LOG_WARNING, "PROXY header from %s: %s",
                          tsrvi_peer_format(&proxy->sender, text, sizeof(text)), fault);
    }
}

/* The session's handshake. The stream goes on as what the header makes it, or is over. */
static int tsrvi_proxy_shake(tsrv_stream *stream)
{
    tsrvi_proxy *proxy = tsrvi_proxy_of(stream);
    tsrvi_proxied proxied;
    int rc = tsrvi_proxy_receive(stream, proxy);
    const char *fault;
    if (rc == TSRV_EAGAIN) {
        return rc;
    }
    if (rc == TSRV_EPROXY) {
        tsrvi_proxy_complain(proxy, tsrvi_proxy_size(proxy->header, proxy->have) == SIZE_MAX
                                        ? "there is none"
                                        : "the connection has ended within it");
    }
    memset(&proxied, 0, sizeof(proxied));
    if (rc == TSRV_OK &&
        (fault = tsrvi_proxy_parse(proxy->header, proxy->have, &proxied)) != NULL) {
        char text[96];
        snprintf(text, sizeof(text), "malformed: %s", fault);
        tsrvi_proxy_complain(proxy, text);
        rc = TSRV_EPROXY;
    }
    proxy->size = proxy->have;
    proxy->tlvs = proxied.tlvs;
    if (rc < 0 || proxied.tlvs == proxy->size) {
        TSRV_FREE(proxy->header);
        proxy->header = NULL;
    }
    return tsrvi_loop_of(stream)->streams.introduced(stream, &proxied.client, rc);
}

static bool tsrvi_proxy_is_empty(tsrv_stream *stream)
{
    return tsrvi_proxy_of(stream)->have == 0;
}

/* Nothing is sent meanwhile: nobody knows the stream. */
static const tsrvi_transport tsrvi_proxy_transport = {
    tsrvi_plain_send,    tsrvi_plain_recv,     tsrvi_plain_peek,  tsrvi_plain_is_delivered,
    tsrvi_plain_holds,   tsrvi_proxy_is_empty, tsrvi_proxy_shake, tsrvi_plain_finish,
    tsrvi_plain_is_over, tsrvi_plain_drop,     tsrvi_plain_free,  tsrvi_plain_watch,
    tsrvi_plain_shut,    tsrvi_plain_error,    tsrvi_plain_close};

/* Has the stream's header not come yet? */
static inline TSRVI_INLINE bool tsrvi_stream_is_unknown(const tsrv_stream *stream)
{
    return TSRVI_UNLIKELY(tsrvi_is(stream, TSRVI_SESSION)) &&
           stream->session->transport == &tsrvi_proxy_transport;
}

/* A new stream waits for its header. Returns TSRV_OK or -ENOMEM. */
static int tsrvi_proxy_begin(tsrv_stream *stream, const tsrv_address *peer)
{
    tsrvi_proxy *proxy = tsrvi_proxy_of(stream);
    proxy->session.transport = &tsrvi_proxy_transport;
    stream->session = &proxy->session;
    tsrvi_set(stream, TSRVI_SESSION | TSRVI_SHAKING);
    stream->own_due_ms =
        tsrvi_ms_after(tsrvi_loop_of(stream), stream->server->options.handshake_timeout_ms);
    return tsrvi_peer_store(&proxy->sender, peer);
}

/* The header is there, and the stream the client's, if it names one. Returns TSRV_OK or -ENOMEM. */
static int tsrvi_proxy_end(tsrv_stream *stream, const tsrv_address *client)
{
    bool local = stream->peer.local;
    int rc = TSRV_OK;
    stream->session = NULL;
    tsrvi_clear(stream, TSRVI_SESSION | TSRVI_SHAKING);
    if (client->size != 0) {
        tsrvi_peer_free(&stream->peer);
        memset(&stream->peer, 0, sizeof(stream->peer));
        rc = tsrvi_peer_store(&stream->peer, client);
        stream->peer.local = local;
    }
    return rc;
}

static void tsrvi_proxy_free(tsrv_stream *stream)
{
    tsrvi_proxy *proxy = tsrvi_proxy_of(stream);
    if (proxy != NULL) {
        tsrvi_peer_free(&proxy->sender);
        TSRV_FREE(proxy->header);
    }
}

#if TSRVI_HAS_TLS
/* ============================================================================
 * >>tls_session  Sessions: their socket, as OpenSSL sees it, and their buffers
 *
 * A session turns plaintext into records and back. It never waits, and never
 * writes to the socket itself: what OpenSSL has to send is collected in `sealed`,
 * for the stream to send like any other output, so that no write is ever half
 * done or has to be repeated. What it wants to read it takes from the socket, at
 * most once a turn unless the socket was full: that is told by a short read, as
 * for plain streams, and not by a failing call.
 *
 * Without TSRV_TLS_OPENSSL there are no sessions.
 * ==========================================================================*/

#define TSRVI_TLS_RECORD ((size_t)16384) /* bytes of plaintext in a record: RFC 8446, 5.1 */
#define TSRVI_TLS_SEAL ((size_t)65536)   /* sealed at a time, so that one send takes several */
#define TSRVI_TLS_REPLIES ((size_t)256 * 1024) /* sealed, and not by us: see tsrvi_tls_recv */
#define TSRVI_TLS_TAKE ((size_t)128 * 1024)    /* received at a time, whatever the records hold */
#define TSRVI_TLS_IN_VAIN 2  /* receives of which nothing is for the program: a thousand new keys */
#define TSRVI_TLS_RECENT 128 /* sessions of a loop that keep their buffers */

/* OpenSSL 3 would make an end without close_notify a fatal error; we tell it by `ended`, and can
 * still answer who has only stopped sending. */
#ifdef SSL_OP_IGNORE_UNEXPECTED_EOF
#define TSRVI_TLS_OPTIONS SSL_OP_IGNORE_UNEXPECTED_EOF
#else
#define TSRVI_TLS_OPTIONS 0
#endif

typedef struct tsrvi_tls {
    tsrvi_session session;
    tsrv_stream *stream;
    SSL *ssl;
    tsrvi_tls_set *set;         /* what it was made from */
    tsrvi_tls_set *chosen;      /* what on_server_name has put in its place; NULL = nothing */
    const char *refusal;        /* why the handshake was refused by us; NULL = it was not */
    tsrvi_link recent;          /* in loop->streams.sessions */
    tsrvi_buffer *sealed;       /* the queue of records to send */
    size_t sealed_size;         /* bytes in it */
    size_t received;            /* bytes of the socket, in this call */
    int in_vain;                /* receives since the last plaintext, in this call */
    unsigned char *certificate; /* the peer's, once it was asked for */
    int error;                  /* of the socket, or -ENOMEM */
    bool established;           /* the handshake is done */
    bool notified;              /* close_notify is sealed, */
    bool silent;                /* and nothing may follow it (RFC 8446, 6.1) */
    bool drained;               /* the socket had no more */
    bool more;                  /* the session holds input that no event will tell of */
    bool ended;                 /* the socket's end came */
    bool asked;                 /* the client has said hello, and on_server_name was asked */
    char server_name[256];      /* that the hello named */
    char alpn[256];
} tsrvi_tls;

static tsrvi_tls *tsrvi_tls_of(const tsrv_stream *stream)
{
    return (tsrvi_tls *)(void *)stream->session;
}

/* ---- the session's socket, as OpenSSL sees it ------------------------------*/

/* Everything that OpenSSL writes goes to `sealed`. */
static int tsrvi_tls_bio_write(BIO *bio, const char *data, int size)
{
    tsrvi_tls *tls = (tsrvi_tls *)BIO_get_data(bio);
    size_t bytes = (size_t)size;
    BIO_clear_retry_flags(bio);
    if (tls->silent) {
        return size; /* an answer to a key update, which the peer may send still */
    }
    if (tsrvi_queue_copy(&tls->sealed, &tsrvi_loop_of(tls->stream)->streams.pool, data, bytes) <
        0) {
        tls->error = -ENOMEM;
        return -1;
    }
    tls->sealed_size += bytes;
    tls->stream->unsent += bytes;
    tsrvi_loop_of(tls->stream)->plain = NULL; /* as tsrvi_output_grows has it */
    tsrvi_stream_soon(tls->stream);
    return size;
}

static int tsrvi_tls_bio_read(BIO *bio, char *buffer, int size)
{
    tsrvi_tls *tls = (tsrvi_tls *)BIO_get_data(bio);
    ssize_t got;
    BIO_clear_retry_flags(bio);
    if (tls->ended) {
        return 0;
    }
    if (tls->drained || tls->received >= TSRVI_TLS_TAKE || tls->in_vain == TSRVI_TLS_IN_VAIN) {
        BIO_set_retry_read(bio);
        return -1;
    }
    got = tsrvi_plain_recv(tls->stream, buffer, (size_t)size);
    tls->drained = got < size;
    if (got > 0) {
        tls->received += (size_t)got;
        tls->in_vain++;
        return (int)got;
    }
    if (got == TSRV_EOF) {
        tls->ended = true;
        return 0;
    }
    if (got == TSRV_EAGAIN) {
        BIO_set_retry_read(bio);
    } else {
        tls->error = (int)got;
    }
    return -1;
}

static long tsrvi_tls_bio_control(BIO *bio, int command, long number, void *pointer)
{
    const tsrvi_tls *tls = (const tsrvi_tls *)BIO_get_data(bio);
    (void)number;
    (void)pointer;
    switch (command) {
    case BIO_CTRL_EOF:
        return tls->ended;
    case BIO_CTRL_FLUSH:
        return 1;
    default:
        return 0;
    }
}

/* Made once, by whoever comes first; never freed, like OpenSSL's own tables. */
static BIO_METHOD *tsrvi_tls_bio_method(void)
{
    static BIO_METHOD *method; /* atomic */
    BIO_METHOD *made = __atomic_load_n(&method, __ATOMIC_ACQUIRE), *nobodys = NULL;
    if (made != NULL) {
        return made;
    }
    made = BIO_meth_new(BIO_TYPE_SOURCE_SINK, "tcpserver.h");
    if (made == NULL) {
        return NULL;
    }
    BIO_meth_set_write(made, tsrvi_tls_bio_write);
    BIO_meth_set_read(made, tsrvi_tls_bio_read);
    BIO_meth_set_ctrl(made, tsrvi_tls_bio_control);
    if (!__atomic_compare_exchange_n(&method, &nobodys, made, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_ACQUIRE)) {
        BIO_meth_free(made);
        return nobodys;
    }
    return made;
}

/* ---- OpenSSL's buffers -----------------------------------------------------*/

/* Not even the header of a record? */
static bool tsrvi_tls_has_nothing(const tsrvi_tls *tls)
{
    return SSL_has_pending(tls->ssl) == 0 && strcmp(SSL_rstate_string(tls->ssl), "RH") == 0;
}

static bool tsrvi_tls_is_empty(tsrv_stream *stream)
{
    const tsrvi_tls *tls = tsrvi_tls_of(stream);
    return tsrvi_tls_has_nothing(tls) &&
           (tls->established || SSL_get_state(tls->ssl) == TLS_ST_BEFORE);
}

static void tsrvi_tls_unuse(tsrvi_tls *tls)
{
    if (!tsrvi_list_empty(&tls->recent)) {
        tsrvi_list_remove(&tls->recent);
        tsrvi_loop_of(tls->stream)->streams.session_count--;
    }
}

/* This session is about to need its buffers, which are 35 KiB. The one that has not needed its own
 * for longest gives them up; not if they hold something, which older versions of OpenSSL would free
 * all the same (CVE-2024-4741). SSL_MODE_RELEASE_BUFFERS does so behind every record, and for a
 * tenth of what an echo costs. */
static void tsrvi_tls_use(tsrvi_tls *tls)
{
    tsrv_loop *loop = tsrvi_loop_of(tls->stream);
    if (loop->streams.sessions.previous == &tls->recent) {
        return;
    }
    if (loop->streams.sessions.next == NULL) {
        tsrvi_list_init(&loop->streams.sessions);
    }
    tsrvi_tls_unuse(tls);
    tsrvi_list_append(&loop->streams.sessions, &tls->recent);
    if (++loop->streams.session_count > TSRVI_TLS_RECENT) {
        tsrvi_tls *oldest = TSRVI_CONTAINER(loop->streams.sessions.next, tsrvi_tls, recent);
        tsrvi_tls_unuse(oldest);
        if (tsrvi_tls_has_nothing(oldest)) {
            SSL_free_buffers(oldest->ssl);
        }
    }
}

/* ============================================================================
 * >>tls_hello  What a client's first message decides: names, tickets
 *
 * OpenSSL shows the ClientHello before it has done anything about it. To change
 * over to another context then, and not in its callback for names, is what keeps
 * sessions apart: it resumes one before it calls that, so that who is known to
 * one host would be let in by all. A session's digest of rules (>>tls_files) is
 * that of the context it was made in, and is compared after the change.
 *
 * Tickets are sealed by the context that a session began with, whichever follows.
 * Their keys follow from a secret and from the time, so that workers, and those
 * that come after them, have the same ones without telling each other.
 * ==========================================================================*/

static tsrvi_tls *tsrvi_tls_of_ssl(const SSL *ssl)
{
    return (tsrvi_tls *)BIO_get_data(SSL_get_rbio(ssl));
}

/* ---- names -----------------------------------------------------------------*/

/* The host that the client names, "" = none. RFC 6066, 3: the size of a list, 0 for a host's name,
 * and its size; there is no other kind, and not more than one. False: the message is malformed, or
 * the name is none. It is "" before, as all of a new session is 0. */
static bool tsrvi_tls_hello_name(SSL *ssl, char name[256])
{
    const unsigned char *data = NULL;
    size_t size = 0, length;
    if (SSL_client_hello_get0_ext(ssl, TLSEXT_TYPE_server_name, &data, &size) != 1) {
        return true;
    }
    if (size < 5 || (size_t)(data[0] << 8 | data[1]) != size - 2 ||
        data[2] != TLSEXT_NAMETYPE_host_name) {
        return false;
    }
    length = (size_t)(data[3] << 8 | data[4]);
    if (length != size - 5 || length > 255 || memchr(data + 5, 0, length) != NULL) {
        return false;
    }
    memcpy(name, data + 5, length);
    name[length] = 0;
    return true;
}

/* Go on with another context. SSL_set_SSL_CTX brings its certificates, whom it trusts, its ciphers
 * and callbacks; what SSL_new has copied is brought by us. */
static bool tsrvi_tls_change(tsrvi_tls *tls, tsrvi_tls_set *to)
{
    SSL_CTX *context = to->context;
    if (SSL_set_SSL_CTX(tls->ssl, context) == NULL || !tsrvi_tls_set_note(tls->ssl, to)) {
        return false;
    }
    __atomic_add_fetch(&to->references, 1, __ATOMIC_ACQ_REL);
    tls->chosen = to;
    SSL_set_verify(tls->ssl, SSL_CTX_get_verify_mode(context),
                   SSL_CTX_get_verify_callback(context));
    SSL_set_verify_depth(tls->ssl, SSL_CTX_get_verify_depth(context));
    SSL_clear_options(tls->ssl, SSL_get_options(tls->ssl));
    SSL_set_options(tls->ssl, SSL_CTX_get_options(context) | TSRVI_TLS_OPTIONS);
    return SSL_set_min_proto_version(tls->ssl, SSL_CTX_get_min_proto_version(context)) == 1 &&
           SSL_set_max_proto_version(tls->ssl, SSL_CTX_get_max_proto_version(context)) == 1;
}

static int tsrvi_tls_refuse_hello(tsrvi_tls *tls, const char *why, int *alert, int code)
{
    tls->refusal = why;
    *alert = code;
    return SSL_CLIENT_HELLO_ERROR;
}

/* After a HelloRetryRequest there is a second one, which changes nothing. */
static int tsrvi_tls_hello(SSL *ssl, int *alert, void *context)
{
    tsrvi_tls *tls = tsrvi_tls_of_ssl(ssl);
    const tsrvi_tls_set *set = tls->set;
    tsrv_tls *chosen = NULL;
    bool good;
    int rc;
    (void)context;
    if (tls->asked) {
        return SSL_CLIENT_HELLO_SUCCESS;
    }
    tls->asked = true;
    good = tsrvi_tls_hello_name(ssl, tls->server_name);
    if (set->on_server_name == NULL) {
        return SSL_CLIENT_HELLO_SUCCESS;
    }
    if (!good) {
        return tsrvi_tls_refuse_hello(tls, "the server_name is malformed", alert,
                                      SSL_AD_DECODE_ERROR);
    }
    rc = set->on_server_name(tls->server_name, &chosen, set->user_context);
    tsrvi_slow_callback(tsrvi_loop_of(tls->stream), "on_server_name",
                        (uintptr_t)set->on_server_name);
    if (rc < 0) {
        return tsrvi_tls_refuse_hello(tls, "on_server_name has refused the name", alert,
                                      SSL_AD_UNRECOGNIZED_NAME);
    }
    if (chosen != NULL && !tsrvi_tls_serves(chosen)) {
        return tsrvi_tls_refuse_hello(tls, "on_server_name has chosen one without a certificate",
                                      alert, SSL_AD_INTERNAL_ERROR);
    }
    if (chosen != NULL && chosen->set != set && !tsrvi_tls_change(tls, chosen->set)) {
        return tsrvi_tls_refuse_hello(tls, "no memory for another context", alert,
                                      SSL_AD_INTERNAL_ERROR);
    }
    return SSL_CLIENT_HELLO_SUCCESS;
}

/* ---- session tickets (RFC 5077, 4) -----------------------------------------*/

/* The keys of a period of ticket_hours: their name, one to authenticate, one to encrypt. */
typedef struct tsrvi_tls_keys {
    unsigned char name[32]; /* 16 are used */
    unsigned char mac[32];
    unsigned char cipher[64]; /* 32 are used */
} tsrvi_tls_keys;

static bool tsrvi_tls_keys_make(tsrvi_tls_keys *keys, const unsigned char *secret, int64_t period)
{
    unsigned char text[9], made[128];
    bool good = true;
    for (int i = 0; i < 8; i++) {
        text[i] = (unsigned char)((uint64_t)period >> (8 * i));
    }
    for (int part = 0; good && part < 2; part++) {
        text[8] = (unsigned char)part;
        good = HMAC(EVP_sha512(), secret, TSRVI_TLS_DIGEST, text, sizeof(text), made + 64 * part,
                    NULL) != NULL;
    }
    memcpy(keys, made, sizeof(*keys));
    OPENSSL_cleanse(made, sizeof(made));
    return good;
}

#if OPENSSL_VERSION_NUMBER >= 0x30000000L
typedef EVP_MAC_CTX tsrvi_tls_mac;

static bool tsrvi_tls_mac_begin(tsrvi_tls_mac *mac, tsrvi_tls_keys *keys)
{
    char digest[] = "SHA256";
    OSSL_PARAM settings[3];
    settings[0] =
        OSSL_PARAM_construct_octet_string(OSSL_MAC_PARAM_KEY, keys->mac, sizeof(keys->mac));
    settings[1] = OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, digest, 0);
    settings[2] = OSSL_PARAM_construct_end();
    return EVP_MAC_CTX_set_params(mac, settings) == 1;
}
#else
typedef HMAC_CTX tsrvi_tls_mac;

static bool tsrvi_tls_mac_begin(tsrvi_tls_mac *mac, tsrvi_tls_keys *keys)
{
    return HMAC_Init_ex(mac, keys->mac, (int)sizeof(keys->mac), EVP_sha256(), NULL) == 1;
}
#endif

/* The number of the period that a time is in. */
static int64_t tsrvi_tls_period(const tsrvi_tls_set *set, int64_t seconds)
{
    return set->ticket_hours == TSRV_NEVER ? 0 : seconds / ((int64_t)set->ticket_hours * 3600);
}

/* A ticket is opened with the key of its period as long as a ticket lives, and then sealed anew, as
 * 2 asks for. Returns 1, 2, 0 = none of our keys, the client is to begin anew, -1 = an error. */
static int tsrvi_tls_ticket(SSL *ssl, unsigned char *name, unsigned char *iv,
                            EVP_CIPHER_CTX *cipher, tsrvi_tls_mac *mac, int sealing)
{
    const tsrvi_tls_set *set = tsrvi_tls_of_ssl(ssl)->set;
    int64_t now = tsrvi_tls_now(), newest = tsrvi_tls_period(set, now), at = newest,
            oldest = sealing ? newest : tsrvi_tls_period(set, now - TSRVI_TLS_TICKET_LIFE);
    tsrvi_tls_keys keys;
    bool good = tsrvi_tls_keys_make(&keys, set->secret, at);
    while (good && !sealing && at >= oldest && CRYPTO_memcmp(name, keys.name, 16) != 0) {
        good = tsrvi_tls_keys_make(&keys, set->secret, --at);
    }
    if (good && sealing) {
        memcpy(name, keys.name, 16);
        good = RAND_bytes(iv, EVP_CIPHER_iv_length(EVP_aes_256_cbc())) == 1;
    }
    if (good && at >= oldest) {
        good = EVP_CipherInit_ex(cipher, EVP_aes_256_cbc(), NULL, keys.cipher, iv, sealing) == 1 &&
               tsrvi_tls_mac_begin(mac, &keys);
    }
    OPENSSL_cleanse(&keys, sizeof(keys));
    return !good ? -1 : at < oldest ? 0 : at < newest ? 2 : 1;
}

/* What a server's context asks us, from its first session on. The program's own is left alone. */
static void tsrvi_tls_hear(tsrvi_tls_set *set)
{
    if (set->native) {
        return;
    }
    SSL_CTX_set_client_hello_cb(set->context, tsrvi_tls_hello, NULL);
#if OPENSSL_VERSION_NUMBER >= 0x30000000L
    SSL_CTX_set_tlsext_ticket_key_evp_cb(set->context, tsrvi_tls_ticket);
#else
    SSL_CTX_set_tlsext_ticket_key_cb(set->context, tsrvi_tls_ticket);
#endif
}

/* ============================================================================
 * >>tls_transport  TLS as a transport
 * ==========================================================================*/

/* Begin to look at the socket anew. */
static void tsrvi_tls_look(tsrvi_tls *tls)
{
    tls->drained = false;
    tls->received = 0;
    tls->in_vain = 0;
    tsrvi_tls_use(tls);
    tsrvi_tls_forget_errors();
}

/* A peer has broken the rules of TLS. */
static void tsrvi_tls_log(const tsrv_stream *stream, const char *reason)
{
    char text[TSRV_ADDRESS_SIZE];
    tsrvi_log_limited(TSRVI_LOG_TLS, TSRV_LOG_WARNING, "TLS with %s: %s",
                      tsrvi_peer_format(&stream->peer, text, sizeof(text)), reason);
}

/* Say why, unless it has been said before. */
static void tsrvi_tls_explain(const tsrvi_tls *tls)
{
    unsigned long error = ERR_peek_error();
    char reason[128];
    if (error != 0 && tls->refusal != NULL) {
        ERR_clear_error();
        tsrvi_tls_log(tls->stream, tls->refusal);
    } else if (error != 0) {
        bool refused = ERR_GET_LIB(error) == ERR_LIB_SSL &&
                       ERR_GET_REASON(error) == SSL_R_CERTIFICATE_VERIFY_FAILED;
        size_t used = strlen(tsrvi_tls_reason(reason, sizeof(reason)));
        if (refused) {
            snprintf(reason + used, sizeof(reason) - used, ": %s",
                     X509_verify_cert_error_string(SSL_get_verify_result(tls->ssl)));
        }
        tsrvi_tls_log(tls->stream, reason);
    }
}

/* What a call that failed means: TSRV_EAGAIN, TSRV_EOF, TSRV_ETLS or the socket's error. Who has
 * merely gone is no news. */
static int tsrvi_tls_code(tsrvi_tls *tls, int result)
{
    int kind = SSL_get_error(tls->ssl, result);
    if (kind == SSL_ERROR_WANT_READ) {
        return TSRV_EAGAIN;
    }
    if (kind == SSL_ERROR_ZERO_RETURN && !tls->ended) {
        return TSRV_EOF;
    }
    if (tls->error != 0) {
        ERR_clear_error();
        return tls->error;
    }
    if (tls->ended) { /* the socket's end, and no close_notify before it */
        if (tls->established) {
            tsrvi_set(tls->stream, TSRVI_TRUNCATED);
        }
        ERR_clear_error();
        return TSRV_ETLS;
    }
    tsrvi_tls_explain(tls);
    return TSRV_ETLS;
}

static int tsrvi_tls_shake(tsrv_stream *stream)
{
    tsrvi_tls *tls = tsrvi_tls_of(stream);
    int result;
    tsrvi_tls_look(tls);
    result = SSL_do_handshake(tls->ssl);
    if (tls->received != 0) {
        stream->active_ms = tsrvi_loop_of(stream)->now_ms;
    }
    if (result != 1) {
        result = tsrvi_tls_code(tls, result);
        return result == TSRV_EOF ? (int)TSRV_ETLS : result;
    }
    tls->established = true;
    tls->more = true; /* what the client has sent behind it may be in the session */
    return TSRV_OK;
}

/* A peer that has the session answer (RFC 8446, 4.6.3: key updates) and does not read the answers
 * is cut, whether it is read from or only looked at. */
static bool tsrvi_tls_answers_too_much(const tsrvi_tls *tls)
{
    if (tls->sealed_size <= TSRVI_TLS_REPLIES) { /* of our own there is much less at a time */
        return false;
    }
    tsrvi_tls_log(tls->stream, "too many messages that want an answer, and are not read");
    return true;
}

/* Receive plaintext. What the session has to say in turn, an alert perhaps, becomes unsent output.
 * After our last word the session is over: what still comes is dropped as it is. */
static ssize_t tsrvi_tls_recv(tsrv_stream *stream, char *into, size_t size)
{
    tsrvi_tls *tls = tsrvi_tls_of(stream);
    size_t done = 0;
    int code = TSRV_OK;
    if (stream->phase == TSRVI_LINGER) {
        return tsrvi_plain_recv(stream, into, size);
    }
    if (!tls->established) {
        return TSRV_EAGAIN;
    }
    tsrvi_tls_look(tls);
    while (done < size) {
        size_t got = 0;
        int result = SSL_read_ex(tls->ssl, into + done, size - done, &got);
        if (result != 1) {
            code = tsrvi_tls_code(tls, result);
            break;
        }
        done += got;
        tls->in_vain = 0;
        if (tls->drained && SSL_has_pending(tls->ssl) == 0) {
            code = TSRV_EAGAIN;
            break;
        }
    }
    /* An end or an error that came behind data is met again by the next call. */
    tls->more = done != 0 && code != TSRV_EAGAIN;
    if (tls->received != 0) {
        stream->active_ms = tsrvi_loop_of(stream)->now_ms; /* also by a part of a record */
    }
    return tsrvi_tls_answers_too_much(tls) ? (ssize_t)TSRV_EFULL : done != 0 ? (ssize_t)done : code;
}

static int tsrvi_tls_peek(tsrv_stream *stream)
{
    tsrvi_tls *tls = tsrvi_tls_of(stream);
    char byte;
    size_t got = 0;
    int result, rc = TSRV_OK;
    if (!tls->established) {
        return TSRV_EAGAIN;
    }
    tsrvi_tls_look(tls);
    result = SSL_peek_ex(tls->ssl, &byte, 1, &got);
    if (result != 1) {
        rc = tsrvi_tls_code(tls, result);
    }
    tls->more = rc != TSRV_EAGAIN; /* data or an end, which the kernel has no more */
    return tsrvi_tls_answers_too_much(tls) ? (int)TSRV_EFULL : rc;
}

static bool tsrvi_tls_holds(const tsrv_stream *stream)
{
    return tsrvi_tls_of(stream)->more && stream->phase < TSRVI_LINGER;
}

/* ---- sending ---------------------------------------------------------------*/

/* Half of a message has come that follows the handshake: a ticket, or new keys. OpenSSL writes
 * nothing before the rest of it is there, so this is a handshake that goes on. */
static void tsrvi_tls_go_on_shaking(tsrv_stream *stream)
{
    tsrvi_tls_of(stream)->established = false;
    tsrvi_set(stream, TSRVI_SHAKING);
    stream->own_due_ms =
        tsrvi_ms_after(tsrvi_loop_of(stream), stream->server->options.handshake_timeout_ms);
}

/* Make records of plaintext. Returns how much, at most one record's; 0: see tsrvi_tls_unsealed. */
static size_t tsrvi_tls_seal(tsrvi_tls *tls, const char *data, size_t size)
{
    size_t taken = 0;
    bool broken = SSL_in_init(tls->ssl) != 0;
    tsrvi_tls_use(tls);
    tsrvi_tls_forget_errors();
    if (SSL_write_ex(tls->ssl, data, tsrvi_min(size, TSRVI_TLS_RECORD), &taken) == 1) {
        return taken;
    }
    if (SSL_get_error(tls->ssl, 0) == SSL_ERROR_WANT_READ && tls->stream->in_end == 0) {
        tsrvi_tls_go_on_shaking(tls->stream);
    } else if (!broken && tls->error == 0) {
        tls->error = -ENOMEM;
    }
    ERR_clear_error();
    return 0;
}

/* Why nothing was taken: not yet; for want of memory, which nothing else would tell of; or a read
 * has met an error that it has not told yet. */
static int tsrvi_tls_unsealed(const tsrvi_tls *tls)
{
    return !tls->established ? (int)TSRV_OK : tls->error != 0 ? tls->error : (int)TSRV_ETLS;
}

/* The same with what is at the head of the queue. Returns TSRV_OK or why not. */
static int tsrvi_tls_seal_queued(tsrv_stream *stream)
{
    tsrvi_tls *tls = tsrvi_tls_of(stream);
    const tsrvi_buffer *buffer = stream->out;
    char copy[TSRVI_TLS_RECORD];
    const char *data = buffer->data + buffer->begin;
    size_t size = tsrvi_buffer_size(buffer);
    if (buffer->kind == TSRVI_FILE) {
        ssize_t got = tsrvi_output_read(buffer, copy, sizeof(copy));
        if (got < 0) {
            return (int)got;
        }
        data = copy;
        size = (size_t)got;
    }
    size = tsrvi_tls_seal(tls, data, size);
    tsrvi_output_sent(stream, size);
    return size != 0 ? (int)TSRV_OK : tsrvi_tls_unsealed(tls);
}

/* Make records of what is queued, then of data, until there is enough for one send. */
static int tsrvi_tls_seal_some(tsrv_stream *stream, tsrvi_sending *sending)
{
    tsrvi_tls *tls = tsrvi_tls_of(stream);
    int rc = TSRV_OK;
    while (rc == TSRV_OK && tls->established && tls->sealed_size < TSRVI_TLS_SEAL &&
           !tsrvi_stream_output_failed(stream) &&
           (stream->out != NULL || sending->taken < sending->size)) {
        if (stream->out != NULL) {
            rc = tsrvi_tls_seal_queued(stream);
        } else {
            size_t part =
                tsrvi_tls_seal(tls, sending->data + sending->taken, sending->size - sending->taken);
            rc = part != 0 ? (int)TSRV_OK : tsrvi_tls_unsealed(tls);
            sending->taken += part;
        }
    }
    return rc;
}

/* Send sealed records, with one call. */
static int tsrvi_tls_send_sealed(tsrvi_tls *tls, tsrvi_sending *sending)
{
    tsrv_stream *stream = tls->stream;
    size_t tried = 0, left;
    ssize_t sent;
    do {
        sent = tsrvi_plain_send_some(stream->io.fd, tls->sealed, "", 0, &tried);
    } while (sent < 0 && errno == EINTR);
    if (sent < 0) {
        return tsrvi_plain_send_failed(tls->sealed, sending);
    }
    sending->sent += (size_t)sent;
    tls->sealed_size -= (size_t)sent;
    stream->unsent -= (uint64_t)sent;
    for (left = (size_t)sent; left != 0;) {
        size_t part = tsrvi_min(left, tsrvi_buffer_size(tls->sealed));
        tls->sealed->begin += part;
        left -= part;
        if (tsrvi_buffer_size(tls->sealed) == 0) {
            tsrvi_output_free(stream, tsrvi_queue_pop(&tls->sealed));
        }
    }
    return (size_t)sent < tried ? TSRV_EAGAIN : TSRV_OK;
}

/* While the handshake goes on, plaintext waits, and not for the socket. An error of sealing is told
 * when what is sealed has gone as far as the socket takes it. */
static int tsrvi_tls_send(tsrv_stream *stream, tsrvi_sending *sending)
{
    tsrvi_tls *tls = tsrvi_tls_of(stream);
    int rc, sealing;
    do {
        sealing = tsrvi_tls_seal_some(stream, sending);
        rc = tls->sealed == NULL                 ? (int)TSRV_OK
             : sending->sent >= TSRVI_SEND_LIMIT ? (int)TSRV_EAGAIN
                                                 : tsrvi_tls_send_sealed(tls, sending);
    } while (rc == TSRV_OK && sealing == TSRV_OK &&
             (tls->sealed != NULL || (tls->established && !tsrvi_stream_output_failed(stream) &&
                                      (stream->out != NULL || sending->taken < sending->size))));
    if (sealing < 0 && (rc == TSRV_OK || rc == TSRV_EAGAIN)) {
        sending->gap = sealing != TSRV_ETLS; /* some of it may be sealed, which cannot be undone */
        return sealing;
    }
    return rc;
}

/* ---- the end ---------------------------------------------------------------*/

/* close_notify, RFC 8446, 6.1. It waits for the rest of half a message, too, while somebody reads:
 * behind tsrv_close nobody does, and the peer gets none. */
static bool tsrvi_tls_finish(tsrv_stream *stream)
{
    tsrvi_tls *tls = tsrvi_tls_of(stream);
    if (!tls->established || tls->notified) {
        return false;
    }
    if (SSL_in_init(tls->ssl) && stream->end == 0 && stream->in_end == 0) {
        tsrvi_tls_go_on_shaking(stream);
        return true;
    }
    tls->notified = true;
    ERR_clear_error();
    SSL_shutdown(tls->ssl);
    ERR_clear_error();
    tls->silent = true;
    return true;
}

/* One that has broken the rules of TLS may still be sending, and what arrives at a closed socket
 * causes a reset, which would take the alert away. A client without the certificate that it needs
 * has sent its request with TLS 1.3. A fatal alert of the peer's is its last word: 6.2. */
static bool tsrvi_tls_is_over(const tsrv_stream *stream, int code)
{
    const tsrvi_tls *tls = tsrvi_tls_of(stream);
    return code != TSRV_ETLS || tls->ended || tls->error != 0 ||
           (SSL_get_shutdown(tls->ssl) & SSL_RECEIVED_SHUTDOWN) != 0;
}

/* The alert that tells the peer of an error of TLS is sealed (RFC 8446, 6.2), and goes out as
 * output does, behind records that were sealed before. */
static void tsrvi_tls_drop(tsrv_stream *stream, int code)
{
    tsrvi_tls *tls = tsrvi_tls_of(stream);
    if (code == TSRV_ETLS) {
        return;
    }
    while (tls->sealed != NULL) {
        tsrvi_output_free(stream, tsrvi_queue_pop(&tls->sealed));
        tsrvi_set(stream, TSRVI_LOST);
    }
    stream->unsent -= tls->sealed_size;
    tls->sealed_size = 0;
}

static void tsrvi_tls_end(tsrv_stream *stream)
{
    tsrvi_tls *tls = tsrvi_tls_of(stream);
    tsrvi_tls_drop(stream, TSRV_ECLOSED);
    tsrvi_tls_unuse(tls);
    SSL_free(tls->ssl);
    OPENSSL_free(tls->certificate);
    tsrvi_tls_set_drop(tls->set);
    tsrvi_tls_set_drop(tls->chosen);
    TSRV_FREE(tls);
    stream->session = NULL;
}

static const tsrvi_transport tsrvi_tls_transport = {
    tsrvi_tls_send,    tsrvi_tls_recv,     tsrvi_tls_peek,   tsrvi_plain_is_delivered,
    tsrvi_tls_holds,   tsrvi_tls_is_empty, tsrvi_tls_shake,  tsrvi_tls_finish,
    tsrvi_tls_is_over, tsrvi_tls_drop,     tsrvi_tls_end,    tsrvi_plain_watch,
    tsrvi_plain_shut,  tsrvi_plain_error,  tsrvi_plain_close};

/* ---- the beginning ---------------------------------------------------------*/

/* A host as certificates and hellos have it: a number without its brackets and its zone (RFC 6874,
 * 3), a name without the dot at its end (RFC 6066, 3). False: it is none, or longer than names are.
 */
static bool tsrvi_tls_bare_host(const char *host, char bare[TLSEXT_MAXLEN_host_name + 1])
{
    size_t size = strlen(host), begin = host[0] == '[' && host[size - 1] == ']';
    size_t end = size - begin;
    const char *zone = (const char *)memchr(host, '%', size);
    if (zone != NULL && memchr(host, ':', (size_t)(zone - host)) != NULL) {
        end = (size_t)(zone - host);
    } else if (size > 1 && host[size - 1] == '.') {
        end--;
    }
    if (end == begin || end - begin > TLSEXT_MAXLEN_host_name || host[begin] == '.') {
        return false; /* a dot in front is every host below, for X509_check_host(3) */
    }
    memcpy(bare, host + begin, end - begin);
    bare[end - begin] = 0;
    return true;
}

/* The client's side: whom it wants to reach, and how it makes sure. */
static int tsrvi_tls_expect(tsrvi_tls *tls, const char *host)
{
    unsigned char number[16];
    char server_name[TLSEXT_MAXLEN_host_name + 1];
    bool good;
    if (!tsrvi_tls_bare_host(host, server_name)) {
        return tsrvi_mistake("tsrv_start_tls", "server_name is no name of a host");
    }
    SSL_set_connect_state(tls->ssl);
    SSL_set_verify(tls->ssl, SSL_VERIFY_PEER, NULL);
    if (TSRV_SYS(inet_pton, (AF_INET, server_name, number)) == 1 ||
        TSRV_SYS(inet_pton, (AF_INET6, server_name, number)) == 1) {
        good = X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(tls->ssl), server_name) == 1;
    } else {
        if (!tls->set->native) { /* RFC 9525, 6.3; OpenSSL would take "f*.org" */
            SSL_set_hostflags(tls->ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
        }
        good = SSL_set1_host(tls->ssl, server_name) == 1 &&
               SSL_set_tlsext_host_name(tls->ssl, server_name) == 1;
    }
    if (good && tls->set->alpn_size != 0) {
        good = SSL_set_alpn_protos(tls->ssl, tls->set->alpn, tls->set->alpn_size) == 0;
    }
    tsrvi_tls_forget_errors();
    return good ? (int)TSRV_OK : -ENOMEM;
}

/* An SSL that reads and writes through the session, or NULL. */
static SSL *tsrvi_tls_ssl_new(tsrvi_tls *tls)
{
    BIO_METHOD *method = tsrvi_tls_bio_method();
    BIO *bio = method == NULL ? NULL : BIO_new(method);
    SSL *ssl = bio == NULL ? NULL : SSL_new(tls->set->context);
    if (ssl == NULL) {
        ERR_clear_error();
        BIO_free(bio);
        return NULL;
    }
    BIO_set_data(bio, tls);
    BIO_set_init(bio, 1);
    SSL_set_bio(ssl, bio, bio);
    SSL_set_mode(ssl, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_set_options(ssl, TSRVI_TLS_OPTIONS);
    return ssl;
}

/* Trust whom the system does. SSL_CTX_set_default_verify_paths would have OpenSSL 3 look into the
 * directory once more, as a "store", whose loader it frees twice where there is no memory. */
static bool tsrvi_tls_trust_system(SSL_CTX *context)
{
    bool good = SSL_CTX_set_default_verify_file(context) == 1 &&
                SSL_CTX_set_default_verify_dir(context) == 1;
    tsrvi_tls_forget_errors();
    return good;
}

/* From now on what goes over the stream's socket is TLS. What was queued before goes as it is.
 *   server_name  NULL = this is the server */
static int tsrvi_tls_begin(tsrv_stream *stream, const tsrv_tls *from, const char *server_name)
{
    tsrvi_tls *tls = (tsrvi_tls *)tsrvi_zalloc(sizeof(*tls));
    int rc = TSRV_OK;
    if (tls == NULL) {
        return -ENOMEM;
    }
    if (server_name != NULL && from->set->system) {
        if (!tsrvi_tls_trust_system(from->set->context)) {
            TSRV_FREE(tls);
            return -ENOMEM;
        }
        from->set->system = false;
    }
    tls->session.transport = &tsrvi_tls_transport;
    tls->stream = stream;
    tls->set = from->set;
    tsrvi_list_init(&tls->recent);
    tls->ssl = tsrvi_tls_ssl_new(tls);
    if (tls->ssl == NULL || !tsrvi_tls_set_note(tls->ssl, tls->set)) {
        SSL_free(tls->ssl);
        TSRV_FREE(tls);
        return -ENOMEM;
    }
    if (server_name == NULL) {
        tsrvi_tls_hear(tls->set);
        SSL_set_accept_state(tls->ssl);
    } else if ((rc = tsrvi_tls_expect(tls, server_name)) < 0) {
        SSL_free(tls->ssl);
        TSRV_FREE(tls);
        return rc;
    }
    __atomic_add_fetch(&tls->set->references, 1, __ATOMIC_ACQ_REL);
    stream->session = &tls->session;
    tls->sealed = stream->out;
    tls->sealed_size = tsrvi_size(stream->unsent);
    stream->out = NULL;
    tsrvi_set(stream, TSRVI_SESSION | TSRVI_SHAKING);
    stream->own_due_ms =
        tsrvi_ms_after(tsrvi_loop_of(stream), stream->server->options.handshake_timeout_ms);
    return TSRV_OK;
}
/* Is the handshake done? */
static bool tsrvi_tls_is_ready(const tsrv_stream *stream)
{
    return tsrvi_tls_of(stream)->established;
}
#else
static void tsrvi_tls_log(const tsrv_stream *stream, const char *reason)
{
    (void)stream;
    (void)reason;
}

static bool tsrvi_tls_is_ready(const tsrv_stream *stream)
{
    (void)stream;
    return false;
}

static int tsrvi_tls_begin(tsrv_stream *stream, const tsrv_tls *from, const char *server_name)
{
    (void)stream;
    (void)from;
    (void)server_name;
    return tsrvi_tls_absent();
}
#endif

/* ============================================================================
 * >>wait  Who waits for a stream
 *
 * A coroutine that waits is a record on its stack; the handler, between its
 * calls, is the stream's own. Nobody wakes them: tsrvi_stream_settle finds that
 * their waits are over. Only tsrv_wake, which the program calls, marks those that
 * wait for it.
 * ==========================================================================*/

static TSRVI_APART tsrvi_wait *tsrvi_wait_last(const tsrv_stream *stream)
{
    tsrvi_wait *last = stream->waits;
    while (last->next != NULL) {
        last = last->next;
    }
    return last;
}

/* It says what it waits for, and has not been woken. */
static inline TSRVI_INLINE void tsrvi_wait_add(tsrv_stream *stream, tsrvi_wait *wait)
{
    wait->next = NULL;
    if (TSRVI_LIKELY(stream->kinds == 0)) {
        stream->waits = wait;
    } else {
        tsrvi_wait_last(stream)->next = wait;
    }
    stream->kinds = (uint8_t)(stream->kinds | wait->kinds);
}

static TSRVI_APART void tsrvi_wait_remove_one(tsrv_stream *stream, tsrvi_wait *wait)
{
    tsrvi_wait **link = &stream->waits;
    uint8_t kinds = 0;
    while (*link != wait) {
        kinds = (uint8_t)(kinds | (*link)->kinds);
        link = &(*link)->next;
    }
    *link = wait->next;
    for (const tsrvi_wait *younger = wait->next; younger != NULL; younger = younger->next) {
        kinds = (uint8_t)(kinds | younger->kinds);
    }
    stream->kinds = kinds;
}

static inline TSRVI_INLINE void tsrvi_wait_remove(tsrv_stream *stream, tsrvi_wait *wait)
{
    if (TSRVI_LIKELY(stream->kinds == TSRVI_FOR_READ)) { /* there is one read at a time */
        stream->waits = NULL;
        stream->kinds = 0;
    } else {
        tsrvi_wait_remove_one(stream, wait);
    }
    wait->kinds = 0;
}

/* Suspend the calling coroutine until its wait is over. Returns how it is, or TSRV_ECLOSED when the
 * loop is being freed, or a drain's grace is over, which end every wait once. The stream is there
 * afterwards, but perhaps not when the coroutine waits for something else. */
static inline TSRVI_INLINE int tsrvi_loop_wait(tsrv_loop *loop, tsrv_stream *stream,
                                               tsrvi_wait *wait, int kind)
{
    int rc;
    if (kind != TSRVI_FOR_READ && TSRVI_UNLIKELY(stream->phase == TSRVI_CLOSED) &&
        stream->state == TSRVI_OVER) {
        return TSRV_ECLOSED; /* a read has seen its end */
    }
    wait->u.co = loop->coroutines.running;
    wait->kinds = (uint8_t)kind;
    wait->woken = false;
    loop->plain = NULL; /* until tsrvi_wait_end says so, which a wait that cannot be does not see */
    tsrvi_wait_add(stream, wait);
    tsrvi_stream_soon(stream);
    rc = tsrvi_co_wait(wait->u.co, TSRVI_FOREVER);
    if (kind == TSRVI_FOR_READ && TSRVI_LIKELY(loop->plain == stream)) {
        return TSRV_OK; /* as tsrvi_wait_end has left it */
    }
    if (TSRVI_UNLIKELY(wait->kinds != 0)) {
        tsrvi_wait_remove(stream, wait);
        tsrvi_stream_soon(stream); /* which may have waited for nothing else */
    }
    return rc;
}

static int tsrvi_stream_wait(tsrv_stream *stream, tsrvi_wait *wait, int kind)
{
    return tsrvi_loop_wait(tsrvi_loop_of(stream), stream, wait, kind);
}

/* Let everything else run first.
 *   facts  TSRVI_IN_READ: within a read, and nobody else may read meanwhile; 0 */
static TSRVI_APART int tsrvi_stream_yield(tsrv_stream *stream, int facts)
{
    tsrvi_wait wait;
    wait.due_ms = 0;
    wait.facts = (uint8_t)facts;
    return tsrvi_stream_wait(stream, &wait, TSRVI_FOR_TURN);
}

/* A call that may complete at once. When a coroutine has made many, or has sent much, the others
 * run first. */
static inline TSRVI_INLINE int tsrvi_stream_pay(tsrv_stream *stream, int facts)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    tsrvi_loop_pay(loop);
    return TSRVI_UNLIKELY(loop->budget < 0) && loop->coroutines.running != NULL
               ? tsrvi_stream_yield(stream, facts)
               : (int)TSRV_OK;
}

/* End every tsrv_wait on the stream. Returns whether there was one. */
static bool tsrvi_stream_rouse(tsrv_stream *stream)
{
    bool any = (stream->kinds & TSRVI_FOR_WAKE) != 0;
    for (tsrvi_wait *wait = stream->waits; any && wait != NULL; wait = wait->next) {
        wait->woken = wait->woken || (wait->kinds & TSRVI_FOR_WAKE) != 0;
    }
    tsrvi_stream_soon(stream);
    return any;
}

TSRV_API void tsrv_wake(tsrv_stream *stream)
{
    bool handler = stream->state == TSRVI_RUNNING && (stream->own.kinds & TSRVI_FOR_WAKE) != 0;
    if (!tsrvi_stream_rouse(stream) || handler) { /* which will wait when it has returned */
        tsrvi_set(stream, TSRVI_WOKEN);
    }
}

/* ============================================================================
 * >>output  What is queued, and how it goes
 * ==========================================================================*/

/* Unsent bytes that count: neither a part of a file, of which some may have gone, nor what a writer
 * has lent. */
static uint64_t tsrvi_output_owned(const tsrv_stream *stream)
{
    uint64_t owned = stream->unsent;
    for (const tsrvi_buffer *buffer = stream->out; buffer != NULL; buffer = buffer->next) {
        size_t size = tsrvi_buffer_size(buffer);
        owned -= buffer->kind == TSRVI_OWNED ? tsrvi_min(buffer->scanned, size) : size;
    }
    return owned;
}

/* Is there room for so much more? */
static bool tsrvi_output_fits(const tsrv_stream *stream, size_t size)
{
    size_t limit = stream->server->options.max_write_buffer_size;
    uint64_t owned = stream->unsent;
    if (size <= limit && owned <= limit - size) {
        return true;
    }
    owned = tsrvi_output_owned(stream);
    return size <= limit && owned <= limit - size;
}

/* Bytes of all streams' buffers. That which all receive into is nobody's. */
static size_t tsrvi_loop_buffered(const tsrv_loop *loop)
{
    const tsrvi_buffer *input = loop->streams.input;
    return tsrvi_pool_in_use(&loop->streams.pool) - (input == NULL ? 0 : input->capacity);
}

/* The same of max_total_buffer; buffers are larger than what they hold. */
static bool tsrvi_loop_has_room(const tsrv_loop *loop, size_t size)
{
    size_t most = loop->streams.most;
    return TSRVI_LIKELY(most == SIZE_MAX) ||
           (most > TSRVI_LARGE && size <= most - TSRVI_LARGE &&
            tsrvi_loop_buffered(loop) <= most - TSRVI_LARGE - size);
}

/* So many bytes more are queued. */
static void tsrvi_output_grows(tsrv_stream *stream, size_t size)
{
    stream->unsent += size;
    tsrvi_clear(stream, TSRVI_SILENT);
    tsrvi_loop_of(stream)->plain = NULL; /* the handler's next read may have to wait for room */
    tsrvi_stream_soon(stream);
}

/* Copy data behind what is queued: all of it, or nothing and -ENOMEM. */
static int tsrvi_output_copy(tsrv_stream *stream, const char *data, size_t size)
{
    int rc = tsrvi_queue_copy(&stream->out, &tsrvi_loop_of(stream)->streams.pool, data, size);
    if (rc == TSRV_OK) {
        tsrvi_output_grows(stream, size);
    }
    return rc;
}

/* Nothing may be added to the queue any more without a further look. */
static void tsrvi_output_seal(tsrv_stream *stream)
{
    if (stream->out != NULL) {
        stream->out->last->room = 0;
    }
}

/* The kernel has taken so many bytes. */
static inline TSRVI_INLINE void tsrvi_output_count(tsrv_stream *stream, size_t sent)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    stream->server->stats->bytes_out += sent;
    stream->active_ms = loop->now_ms;
    loop->written += sent;
    if (TSRVI_UNLIKELY(loop->written > TSRVI_SEND_LIMIT)) {
        loop->budget = 0; /* the others run first */
        loop->plain = NULL;
    }
}

/* What the kernel kept of output that is blocked when it was looked at, and 1; 0 = not yet. A
 * session may have all that is unsent. NULL: nothing is queued. */
static uint64_t *tsrvi_output_kept(const tsrv_stream *stream)
{
    return stream->session != NULL ? &stream->session->kept
           : stream->out != NULL   ? &stream->out->delimiter
                                   : NULL;
}

/* Send what is queued, then data from the caller's memory. Afterwards the stream is BLOCKED if the
 * socket must be writable first. Returns TSRV_OK, or why the output has ended. */
static int tsrvi_output_send(tsrv_stream *stream, tsrvi_sending *sending)
{
    int rc = tsrvi_transport_send(stream, sending);
    if (sending->sent != 0) {
        tsrvi_output_count(stream, sending->sent);
    }
    if (rc == TSRV_OK ||
        (rc == TSRV_EAGAIN && stream->unsent == 0 && sending->taken == sending->size)) {
        tsrvi_clear(stream, TSRVI_BLOCKED);
        return TSRV_OK;
    }
    if (rc == TSRV_EAGAIN) {
        if (!tsrvi_is(stream, TSRVI_SHAKING) &&
            (sending->sent != 0 || !tsrvi_is(stream, TSRVI_BLOCKED))) {
            uint64_t *kept = tsrvi_output_kept(stream);
            stream->own_due_ms = tsrvi_stream_write_due(stream);
            if (kept != NULL) {
                *kept = 0;
            }
        }
        tsrvi_set(stream, TSRVI_BLOCKED);
        return TSRV_OK;
    }
    return rc;
}

/* Does a look at the kernel's queue tell whether the peer takes what is sent? */
static bool tsrvi_stream_is_measured(const tsrv_stream *stream)
{
    return tsrvi_output_kept(stream) != NULL && stream->own_due_ms != 0 && stream->write_ms > 0 &&
           stream->phase != TSRVI_LINGER &&
           (stream->flags & (TSRVI_BLOCKED | TSRVI_SHAKING)) == TSRVI_BLOCKED &&
           !tsrvi_stream_output_failed(stream);
}

/* When half of the time of the blocked output is over, and when it all is; 0 = never. */
static uint32_t tsrvi_stream_blocked_due(const tsrv_stream *stream)
{
    uint32_t due_ms = stream->own_due_ms;
    if (tsrvi_stream_is_measured(stream) && *tsrvi_output_kept(stream) == 0) {
        due_ms -= (uint32_t)(stream->write_ms / 2);
        due_ms += due_ms == 0;
    }
    return due_ms;
}

/* The kernel keeps megabytes, and a socket is writable again when a third of them has gone: a peer
 * may be reading all the while. So what it keeps is looked at at half of the time, and again at its
 * end: if that is less the peer has taken something, and its time begins again. */
static void tsrvi_stream_measure(tsrv_stream *stream)
{
    int kept = tsrvi_plain_kept(stream);
    uint64_t now = kept < 0 ? UINT64_MAX : (uint64_t)kept + 1; /* 0 = not looked yet */
    if (now < *tsrvi_output_kept(stream)) {
        stream->own_due_ms = tsrvi_stream_write_due(stream);
    }
    *tsrvi_output_kept(stream) = now;
}

/* ============================================================================
 * >>ends  How a stream comes to its end
 * ==========================================================================*/

/* A connection of this peer is over, or has not come about. */
static void tsrvi_server_uncount(tsrv_server *server, const tsrv_address *peer)
{
    uint64_t key;
    if (server->options.max_per_address != 0 && tsrvi_address_key(peer, &key)) {
        tsrvi_addresses_remove(&server->addresses, key);
    }
}

/* Close the socket, or reset it. */
static void tsrvi_stream_close_socket(tsrv_stream *stream, bool reset)
{
    if (stream->phase == TSRVI_CLOSED) {
        return;
    }
    tsrvi_stream_soon(stream);
    tsrvi_clear(stream, TSRVI_BLOCKED | TSRVI_SHAKING);
    tsrvi_output_drop(stream);
    tsrvi_transport_of(stream)->drop(stream, TSRV_ECLOSED);
    if (stream->server->options.max_per_address != 0 &&
        (tsrvi_proxy_of(stream) == NULL || tsrvi_proxy_of(stream)->admitted)) {
        tsrv_address peer;
        tsrvi_peer_load(&stream->peer, &peer);
        tsrvi_server_uncount(stream->server, &peer);
    }
    stream->server->open--;
    stream->server->stats->open--;
    stream->server->stats->closed++;
    tsrvi_transport_of(stream)->close(stream, reset);
    tsrvi_stream_enter(stream, TSRVI_CLOSED);
}

/* End both directions at once with a reset: the output has a gap, or nobody may use the stream any
 * more. */
static void tsrvi_stream_kill(tsrv_stream *stream, int code)
{
    bool first = stream->end == 0;
    if (first) {
        stream->end = (int16_t)code;
        tsrvi_set(stream, TSRVI_ENDED);
    } else if (code != TSRV_ECLOSED && !tsrvi_stream_output_failed(stream)) {
        stream->out_end = (int16_t)code; /* what was queued when it was closed did not get out */
    }
    tsrvi_stream_close_socket(stream, true);
    if (first) {
        tsrv_wake(stream);
    }
}

/* A transport error: what is queued goes nowhere, but the transport's last words do; nothing waits
 * for them longer than for a close. */
static void tsrvi_stream_break_output(tsrv_stream *stream, int code)
{
    int blocked = stream->flags & TSRVI_BLOCKED;
    if (!tsrvi_stream_output_failed(stream)) {
        stream->out_end = (int16_t)code;
    }
    tsrvi_set(stream, TSRVI_ENDED);
    tsrvi_stream_soon(stream);
    tsrvi_clear(stream, TSRVI_BLOCKED);
    tsrvi_output_drop(stream);
    tsrvi_transport_of(stream)->drop(stream, code);
    if (stream->unsent != 0) {
        tsrvi_set(stream, blocked);
        stream->own_due_ms = tsrvi_stream_write_due(stream);
    }
}

/* A send failed: no more output; what the peer sent before can still be read. */
static void tsrvi_stream_end_output(tsrv_stream *stream, int code)
{
    tsrvi_stream_break_output(stream, code);
    tsrv_wake(stream);
}

/* Is somebody waiting for input, whom a read tells of its end? Not the handler whose read has all
 * that it wants, and only waits for the output to go. */
static bool tsrvi_stream_is_read(const tsrv_stream *stream)
{
    return (stream->kinds & (TSRVI_FOR_READ | TSRVI_FOR_INPUT)) != 0 &&
           ((stream->own.kinds & TSRVI_FOR_READ) == 0 ||
            tsrvi_buffer_size(stream->in) < tsrvi_own_read_need(stream));
}

/* The input has ended, or a transport error has. */
static void tsrvi_stream_end_input(tsrv_stream *stream, int code)
{
    bool cut = code == TSRV_EOF || tsrvi_is(stream, TSRVI_TRUNCATED);
    bool had_failed = tsrvi_stream_output_failed(stream);
    if (stream->phase == TSRVI_LINGER) {
        code = TSRV_EOF; /* all was sent; how the peer takes its leave is its own affair */
        cut = true;
    } else if (cut && had_failed && (!stream->peer.local || stream->out_end != -EPIPE)) {
        code = stream->out_end; /* Linux reports a reset once, and the failed send has seen it; but
                                   EPIPE of a unix socket only says that the peer has closed */
        cut = code == TSRV_EOF;
    }
    stream->in_end = (int16_t)code;
    tsrvi_set(stream, TSRVI_ENDED);
    tsrvi_clear(stream, TSRVI_FEIGNED | TSRVI_SHAKING);
    tsrvi_stream_soon(stream);
    if (!cut) {
        tsrvi_stream_break_output(stream, code);
    }
    if (stream->end != 0 || (!cut && had_failed)) {
        return; /* the end that came first has been told */
    }
    if (!tsrvi_stream_rouse(stream) && (!cut || !tsrvi_stream_is_read(stream))) {
        tsrvi_set(stream, TSRVI_WOKEN); /* but an end that a read tells of is news to nobody */
    }
}

/* Send what is queued, then data; see to what ends the output. Returns how much of data went. */
static size_t tsrvi_stream_send(tsrv_stream *stream, const char *data, size_t size)
{
    tsrvi_sending sending = {data, size, 0, 0, false};
    int rc = tsrvi_output_send(stream, &sending);
    if (TSRVI_UNLIKELY(rc < 0)) {
        if (sending.gap) {
            tsrvi_stream_kill(stream, rc);
        } else {
            tsrvi_stream_end_output(stream, rc);
        }
    }
    return sending.taken;
}

/* The common case: the queue is one buffer, which the kernel takes whole. false: it is not, or has
 * not been; then what is left will be met again. */
static inline TSRVI_INLINE bool tsrvi_output_send_whole(tsrv_stream *stream)
{
    tsrvi_buffer *buffer = stream->out;
    size_t size;
    ssize_t sent;
    if (tsrvi_is(stream, TSRVI_SESSION | TSRVI_BLOCKED) ||
        (size = buffer->end - buffer->begin) != stream->unsent || size > TSRVI_SEND_LIMIT ||
        buffer->kind != TSRVI_OWNED) {
        return false;
    }
    sent = TSRV_SYS(send, (stream->io.fd, buffer->data + buffer->begin, size, TSRVI_SEND_FLAGS));
    if (TSRVI_UNLIKELY(sent < 0)) {
        int code = tsrvi_plain_send_error(); /* which the kernel tells once */
        if (code != TSRV_EAGAIN && code != -EINTR) {
            tsrvi_stream_end_output(stream, code);
            return true;
        }
        return false;
    }
    tsrvi_output_count(stream, (size_t)sent);
    stream->unsent -= (size_t)sent;
    if (TSRVI_UNLIKELY(stream->unsent != 0)) {
        buffer->begin += (size_t)sent;
        return false;
    }
    stream->out = NULL;
    tsrvi_loop_recycle(tsrvi_loop_of(stream), buffer);
    return true;
}

/* Send what is queued, unless it is known that the kernel takes nothing. Returns whether nothing is
 * left. */
static inline TSRVI_INLINE bool tsrvi_stream_flush(tsrv_stream *stream)
{
    if (stream->unsent == 0 || TSRVI_LIKELY(tsrvi_output_send_whole(stream))) {
        return true;
    }
    if (!tsrvi_is(stream, TSRVI_BLOCKED)) {
        tsrvi_stream_send(stream, "", 0);
    }
    return stream->unsent == 0;
}

/* Has the peer finished, or is it gone? */
static bool tsrvi_stream_peer_is_done(const tsrv_stream *stream)
{
    int code = stream->in_end;
    if (code == 0 && tsrvi_stream_output_failed(stream)) {
        code = stream->out_end;
    }
    return code != 0 && tsrvi_transport_of(stream)->is_over(stream, code);
}

/* Has the peer let a read time out, with nothing written to it since, and sent nothing after that?
 * And has its system all that was written before? Then there is no answer that a reset could
 * destroy. */
static bool tsrvi_stream_peer_is_silent(tsrv_stream *stream)
{
    return tsrvi_is(stream, TSRVI_SILENT) && tsrvi_transport_of(stream)->is_delivered(stream) &&
           tsrvi_transport_of(stream)->peek(stream) == TSRV_EAGAIN;
}

/* Go on with what follows the output of a stream that ends, if all of it is sent: the transport's
 * last words, FIN, then lingering, then the descriptor's end. */
static TSRVI_APART void tsrvi_stream_advance(tsrv_stream *stream)
{
    if (stream->phase == TSRVI_LINGER && stream->in_end == TSRV_EOF) {
        tsrvi_stream_close_socket(stream, false);
    }
    if (stream->unsent != 0 ||
        (stream->phase != TSRVI_SHUTTING && stream->phase != TSRVI_CLOSING)) {
        return;
    }
    if (tsrvi_is(stream, TSRVI_SHAKING)) {
        if (stream->end == 0) {
            return; /* the handshake comes before the FIN */
        }
        tsrvi_clear(stream, TSRVI_SHAKING); /* nothing is left that needs it */
    }
    if (!tsrvi_stream_output_failed(stream) && tsrvi_transport_of(stream)->finish(stream)) {
        tsrvi_stream_flush(stream);
        TSRV_ASSERT(stream->phase != TSRVI_CLOSED); /* the last words leave no gap */
        if (stream->unsent != 0 || tsrvi_is(stream, TSRVI_SHAKING)) {
            return;
        }
    }
    if (stream->phase == TSRVI_CLOSING &&
        (tsrvi_stream_peer_is_done(stream) || tsrvi_stream_peer_is_silent(stream))) {
        tsrvi_stream_close_socket(stream, false); /* which sends what FIN there is to send */
        return;
    }
    if (stream->unsent != 0) {
        return; /* to look at the peer has given the transport something to say */
    }
    if (!tsrvi_is(stream, TSRVI_FIN)) {
        tsrvi_set(stream, TSRVI_FIN);
        tsrvi_transport_of(stream)->shut(stream);
    }
    tsrvi_stream_enter(stream, stream->phase == TSRVI_CLOSING ? TSRVI_LINGER : TSRVI_SHUT);
    stream->own_due_ms =
        tsrvi_ms_after(tsrvi_loop_of(stream), stream->server->options.close_timeout_ms);
}

/* Send what is queued, and see to what follows it. */
static void tsrvi_stream_send_on(tsrv_stream *stream)
{
    tsrvi_stream_flush(stream);
    tsrvi_stream_advance(stream);
}

TSRV_API int tsrv_shutdown(tsrv_stream *stream)
{
    if (stream->end != 0 || stream->out_end != 0) {
        return stream->end != 0                  ? stream->end
               : stream->out_end == TSRV_ECLOSED ? (int)TSRV_OK
                                                 : stream->out_end;
    }
    stream->out_end = TSRV_ECLOSED;
    tsrvi_set(stream, TSRVI_ENDED);
    tsrvi_stream_enter(stream, TSRVI_SHUTTING);
    tsrvi_output_seal(stream);
    tsrvi_stream_soon(stream);
    return TSRV_OK;
}

/* Nobody uses the stream any more: what is queued still goes, then the descriptor is closed. */
static void tsrvi_stream_close(tsrv_stream *stream)
{
    if (stream->phase < TSRVI_CLOSING) {
        tsrvi_stream_enter(stream, TSRVI_CLOSING);
        tsrvi_output_seal(stream);
    }
    if (stream->end == 0) {
        stream->end = TSRV_ECLOSED;
        tsrvi_set(stream, TSRVI_ENDED);
        tsrv_wake(stream);
    }
    tsrvi_stream_soon(stream);
}

TSRV_API int tsrv_close(tsrv_stream *stream)
{
    tsrvi_stream_close(stream);
    if (stream->server == tsrvi_loop_of(stream)->servers.clients) {
        stream->state = TSRVI_OVER; /* it was the program's */
        stream->own.u.result = TSRV_OK;
    }
    return TSRV_OK;
}

TSRV_API int tsrv_abort(tsrv_stream *stream)
{
    tsrvi_stream_kill(stream, TSRV_ECLOSED);
    return TSRV_OK;
}

/* ============================================================================
 * >>input  What comes, and where it is kept
 * ==========================================================================*/

/* Take the loop's buffer away from the stream that has used it last. */
static void tsrvi_loop_vacate(tsrv_loop *loop)
{
    tsrv_stream *owner = loop->streams.input_owner;
    tsrvi_buffer *input = loop->streams.input, *copy;
    size_t size = tsrvi_buffer_size(input);
    if (owner == NULL) {
        return;
    }
    loop->streams.input_owner = NULL;
    if (size == 0 && !tsrvi_buffer_is_held(input)) {
        owner->in = NULL;
        return;
    }
    copy = tsrvi_buffer_is_held(input)
               ? NULL
               : tsrvi_buffer_copy(input, &loop->streams.pool,
                                   size < TSRVI_SMALL_INPUT / 2 ? TSRVI_SMALL_INPUT : size * 2,
                                   tsrvi_is(owner, TSRVI_FILLED));
    if (copy != NULL) {
        owner->in = copy;
    } else { /* a slice of it is in use, or there is no memory for a copy: it changes hands */
        loop->streams.input = NULL;
    }
}

/* The loop's buffer, empty, for a stream; NULL: no memory. */
static TSRVI_APART tsrvi_buffer *tsrvi_loop_input_new(tsrv_loop *loop, tsrv_stream *stream)
{
    size_t capacity = stream->server->options.read_chunk_size;
    tsrvi_loop_vacate(loop);
    if (loop->streams.input != NULL && loop->streams.input->capacity < capacity) {
        tsrvi_buffer_free(&loop->streams.pool, loop->streams.input);
        loop->streams.input = NULL;
    }
    if (loop->streams.input == NULL) {
        loop->streams.input = tsrvi_pool_take(&loop->streams.pool, capacity);
    }
    if (loop->streams.input != NULL) {
        tsrvi_buffer_reset(loop->streams.input);
        loop->streams.input_owner = stream;
        stream->in = loop->streams.input;
    }
    return loop->streams.input;
}

static inline TSRVI_INLINE tsrvi_buffer *tsrvi_loop_input(tsrv_loop *loop, tsrv_stream *stream)
{
    tsrvi_buffer *buffer = loop->streams.input;
    if (TSRVI_UNLIKELY(loop->streams.input_owner != NULL || buffer == NULL ||
                       buffer->capacity < stream->server->options.read_chunk_size)) {
        return tsrvi_loop_input_new(loop, stream);
    }
    tsrvi_buffer_reset(buffer);
    loop->streams.input_owner = stream;
    stream->in = buffer;
    return buffer;
}

/* Give back the input buffer and what is in it. */
static inline TSRVI_INLINE void tsrvi_loop_drop(tsrv_loop *loop, tsrv_stream *stream)
{
    tsrvi_buffer_bury(stream->in);
    if (TSRVI_LIKELY(loop->streams.input_owner == stream)) {
        loop->streams.input_owner = NULL;
    } else {
        tsrvi_loop_recycle(loop, stream->in);
    }
    stream->in = NULL;
}

static void tsrvi_input_drop(tsrv_stream *stream)
{
    tsrvi_loop_drop(tsrvi_loop_of(stream), stream);
}

/* The slice that was handed out last dies; a buffer without unread bytes goes too. */
static inline TSRVI_INLINE void tsrvi_input_release(tsrv_stream *stream)
{
    if (stream->in == NULL) {
        return;
    }
    if (stream->in->begin == stream->in->end) {
        tsrvi_loop_drop(tsrvi_loop_of(stream), stream);
    } else {
        tsrvi_buffer_release(stream->in);
    }
}

/* How large a buffer has to be for so many unread bytes and more: for what the read needs, if it
 * has said so; else twice as large, but not larger than for the longest result and one read behind
 * it. */
static size_t tsrvi_input_capacity(const tsrv_stream *stream, size_t size, size_t need)
{
    const tsrv_server_options *options = &stream->server->options;
    size_t most = tsrvi_min(options->max_buffer_size, SIZE_MAX / 4);
    size_t least = tsrvi_is(stream, TSRVI_FILLED) ? options->read_chunk_size : TSRVI_SMALL_INPUT;
    if (size > least && size < most) {
        least = tsrvi_min(size, most - size + least);
    }
    return size + least > need ? size + least : need;
}

/* Room for more input behind the unread bytes, at least 1 byte; NULL: no memory. Unread bytes move
 * to the front when at most half of the buffer is left behind them, and only after something before
 * them was read, so each byte moves O(1) times; a buffer that is full doubles, or, when the peer
 * sends faster than that, grows by a whole read, or at once to what a read needs. */
static TSRVI_APART tsrvi_buffer *tsrvi_input_more_room(tsrv_stream *stream, size_t need)
{
    size_t chunk = stream->server->options.read_chunk_size;
    tsrvi_buffer *buffer = stream->in, *larger;
    size_t size = tsrvi_buffer_size(buffer), room;
    bool filled = tsrvi_is(stream, TSRVI_FILLED);
    if (buffer->begin != 0 && buffer->capacity - buffer->end < buffer->capacity / 2) {
        memmove(buffer->data, buffer->data + buffer->begin, size);
        buffer->begin = 0;
        buffer->end = size;
    }
    room = buffer->capacity - buffer->end;
    need = filled ? need : 0;
    if (room != 0 && need <= size + room &&
        (!filled || room >= tsrvi_min(buffer->capacity / 4, chunk))) {
        return buffer;
    }
    larger = tsrvi_buffer_copy(buffer, &tsrvi_loop_of(stream)->streams.pool,
                               tsrvi_input_capacity(stream, size, need), filled);
    if (larger == NULL) {
        return room != 0 ? buffer : NULL;
    }
    tsrvi_input_drop(stream);
    stream->in = larger;
    return larger;
}

/* What a recv has brought: so many bytes of `size`, or a code. Returns how many bytes. */
static inline TSRVI_INLINE size_t tsrvi_stream_received(tsrv_stream *stream, ssize_t got,
                                                        size_t size)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    if (TSRVI_LIKELY(got > 0)) {
        tsrvi_clear(stream, TSRVI_FILLED | TSRVI_LOOKED | TSRVI_SILENT);
        stream->active_ms = loop->now_ms;
        stream->fresh_ms = loop->now_ms;
        stream->server->stats->bytes_in += (uint64_t)got;
        if (TSRVI_UNLIKELY((size_t)got == size)) {
            tsrvi_set(stream, TSRVI_FILLED);
        }
        return (size_t)got;
    }
    if (got != TSRV_EAGAIN) {
        tsrvi_stream_end_input(stream, (int)got);
    }
    return 0;
}

/* One recv into the caller's memory. Returns how much came; 0: nothing, or the end. */
static size_t tsrvi_stream_receive_into(tsrv_stream *stream, char *into, size_t size)
{
    size = tsrvi_min(size, stream->server->options.read_chunk_size);
    return tsrvi_stream_received(stream, tsrvi_transport_recv(stream, into, size), size);
}

/* One recv into the stream's buffer.
 *   need  unread bytes that are waited for */
static inline TSRVI_INLINE void tsrvi_stream_receive(tsrv_stream *stream, size_t need)
{
    size_t size = stream->server->options.read_chunk_size;
    tsrvi_buffer *buffer;
    if (TSRVI_LIKELY(stream->in == NULL)) {
        buffer = tsrvi_loop_input(tsrvi_loop_of(stream), stream);
    } else {
        buffer = tsrvi_input_more_room(stream, need);
        size = buffer == NULL ? 0 : tsrvi_min(buffer->capacity - buffer->end, size);
    }
    ssize_t got;
    if (TSRVI_UNLIKELY(buffer == NULL)) {
        tsrvi_stream_kill(stream, -ENOMEM);
        return;
    }
    got = tsrvi_transport_recv(stream, buffer->data + buffer->end, size);
    buffer->end += tsrvi_stream_received(stream, got, size);
    if (TSRVI_UNLIKELY(got <= 0) && buffer->begin == buffer->end) {
        tsrvi_input_drop(stream);
    }
}

/* Nobody wants the input that is there: has it ended? The bytes stay where they are. */
static TSRVI_APART void tsrvi_stream_look(tsrv_stream *stream, bool hangup)
{
    int rc = stream->in_end != 0 ? (int)TSRV_EAGAIN : tsrvi_transport_of(stream)->peek(stream);
    if (rc == TSRV_EAGAIN && stream->peer.local && !hangup) {
        char urgent; /* an urgent byte, which no peek sees, is reported for ever: this drops it */
        TSRV_SYS(recv, (stream->io.fd, &urgent, 0, MSG_DONTWAIT));
    }
    if (rc != TSRV_EAGAIN || hangup) {
        tsrvi_set(stream, TSRVI_LOOKED);
    }
    if (rc != TSRV_OK && rc != TSRV_EAGAIN) {
        tsrvi_stream_end_input(stream, rc);
    }
    if (!hangup) {
        return;
    }
    /* A hang-up cannot be masked. */
    tsrvi_transport_of(stream)->watch(stream, 0);
    /* Unread bytes are left, but the connection is gone. After our own FIN a hang-up may just as
     * well be the peer's FIN (tcp_poll: RCV_SHUTDOWN and SEND_SHUTDOWN), and a unix socket says so
     * at every close of the peer's (unix_poll): a reset leaves an error, also behind the end of the
     * input. */
    if (!tsrvi_stream_output_failed(stream)) {
        bool reset = stream->in_end == 0 && !tsrvi_is(stream, TSRVI_FIN) && !stream->peer.local;
        int error = reset ? -ECONNRESET : tsrvi_transport_of(stream)->error(stream);
        if (error != TSRV_OK) {
            tsrvi_stream_end_output(stream, error);
        }
    }
}

/* Drop what arrives after we have closed: not into the stream's buffer, a slice of which the
 * handler that has closed may still hold. */
static TSRVI_APART void tsrvi_stream_linger(tsrv_stream *stream)
{
    char dropped[16384];
    tsrvi_stream_receive_into(stream, dropped, sizeof(dropped));
}

/* Does anybody want input now? */
static inline TSRVI_INLINE bool tsrvi_stream_wants_input(const tsrv_stream *stream)
{
    if (TSRVI_UNLIKELY(stream->phase >= TSRVI_LINGER)) {
        return stream->phase == TSRVI_LINGER;
    }
    if (TSRVI_UNLIKELY(tsrvi_is(stream, TSRVI_SHAKING))) {
        return stream->end == 0 || stream->unsent != 0;
    }
    if (stream->in_end != 0 || stream->end != 0 || tsrvi_is(stream, TSRVI_FEIGNED)) {
        return false;
    }
    if (TSRVI_UNLIKELY(tsrvi_loop_of(stream)->streams.pool.tight) &&
        tsrvi_buffer_size(stream->in) == 0 && !tsrvi_is(stream, TSRVI_PARTIAL) &&
        stream->server != tsrvi_loop_of(stream)->servers.clients) {
        return false; /* those that have begun come first, and answers that they wait for */
    }
    if ((stream->kinds & TSRVI_FOR_READ) != 0) {
        return (stream->own.kinds & TSRVI_FOR_READ) == 0 || !tsrvi_stream_above_mark(stream);
    }
    return (stream->kinds & TSRVI_FOR_INPUT) != 0 &&
           tsrvi_buffer_size(stream->in) < stream->server->options.max_buffer_size;
}

/* Go on with the handshake of the transport. When it is done, what has waited for it goes out. */
static void tsrvi_stream_shake(tsrv_stream *stream)
{
    int rc = tsrvi_transport_of(stream)->shake(stream);
    if (rc == TSRV_OK) {
        tsrvi_clear(stream, TSRVI_SHAKING);
        stream->fresh_ms = tsrvi_loop_of(stream)->now_ms;
        if (tsrvi_is(stream, TSRVI_BLOCKED)) {
            stream->own_due_ms = tsrvi_stream_write_due(stream);
        }
    }
    tsrvi_stream_flush(stream);
    if (rc != TSRV_OK && rc != TSRV_EAGAIN) {
        stream->server->stats->handshakes_failed++;
        tsrvi_stream_end_input(stream, rc);
    }
}

/* It has taken too long. */
static void tsrvi_stream_shake_late(tsrv_stream *stream)
{
    tsrv_stats *stats = stream->server->stats;
    if (tsrvi_stream_is_unknown(stream)) {
        stats->proxies_failed++;
    } else {
        stats->handshakes_failed++;
    }
    tsrvi_stream_kill(stream, TSRV_ETIMEOUT);
}

/* ============================================================================
 * >>attempt  Can this read be answered?
 *
 * An attempt looks at the unread bytes only, and answers: TSRV_OK with the result
 * taken, TSRV_EAGAIN when more is needed, or an error. A read that waits says
 * how many unread bytes it needs at least before another attempt can do more.
 * ==========================================================================*/

/* One read call, on the caller's stack. */
typedef struct tsrvi_read {
    tsrvi_wait wait;
    int (*attempt)(tsrv_stream *stream, struct tsrvi_read *read);
    tsrv_slice *slice; /* NULL = drop */
    size_t max;        /* bytes of the result */
    size_t size;       /* of the delimiter, or how many bytes */
    const char *delimiter;
    tsrv_match match;
    void *context;
    size_t need; /* see above */
    char *into;  /* the caller's memory; NULL with done: bytes are dropped */
    size_t done; /* bytes that are there, or dropped */
} tsrvi_read;

/* ---- attempts --------------------------------------------------------------*/

static TSRVI_APART int tsrvi_read_too_long(tsrv_stream *stream, size_t limit)
{
    bool own = limit < stream->server->options.max_buffer_size;
    return tsrvi_stream_limited(stream, TSRV_ETOOLONG, own ? "max_bytes" : "max_buffer_size",
                                limit);
}

static inline TSRVI_INLINE void tsrvi_read_take(tsrv_stream *stream, tsrvi_read *read, size_t size)
{
    tsrvi_own_begin(stream, TSRVI_CONSUMED);
    if (read->slice != NULL) {
        tsrvi_buffer_take(stream->in, size, read->slice);
    } else {
        tsrvi_buffer_drop(stream->in, size);
    }
}

static TSRVI_APART int tsrvi_attempt_until(tsrv_stream *stream, tsrvi_read *read)
{
    size_t size = tsrvi_buffer_size(stream->in), end;
    if (size == 0) {
        return TSRV_EAGAIN;
    }
    end = tsrvi_buffer_find(stream->in, read->delimiter, read->size);
    if (TSRVI_UNLIKELY(end == 0)) {
        tsrvi_loop_of(stream)->plain = NULL; /* the next search goes on behind what it has seen */
    }
    if (end != 0 && (end <= read->max || read->slice == NULL)) {
        tsrvi_read_take(stream, read, end);
        return TSRV_OK;
    }
    if (read->slice == NULL) {
        /* Drop all that cannot be the beginning of the delimiter. */
        size_t keep = tsrvi_min(size, read->size - 1);
        tsrvi_buffer_drop(stream->in, size - keep);
        read->need = keep + 1;
        tsrvi_set(stream, TSRVI_PARTIAL);
        return TSRV_EAGAIN;
    }
    read->need = size + 1;
    return end != 0 || size > read->max ? tsrvi_read_too_long(stream, read->max) : TSRV_EAGAIN;
}

/* The same for a line, which ends with a delimiter of one byte, into a slice. */
static inline TSRVI_INLINE int tsrvi_line(tsrv_stream *stream, tsrvi_read *read)
{
    tsrvi_buffer *in = stream->in;
    if (TSRVI_LIKELY(in != NULL && in->scanned == 0)) {
        char *data = in->data + in->begin;
        size_t most = tsrvi_min(in->end - in->begin, read->max);
        size_t end = tsrvi_find_byte(data, most, read->delimiter[0]);
        if (TSRVI_LIKELY(end != 0)) {
            tsrvi_own_begin(stream, TSRVI_CONSUMED);
            tsrvi_buffer_hand_out(stream->in, data, end, read->slice);
            return TSRV_OK;
        }
    }
    return tsrvi_attempt_until(stream, read);
}

static int tsrvi_attempt_line(tsrv_stream *stream, tsrvi_read *read)
{
    return tsrvi_line(stream, read);
}

static int tsrvi_attempt_some(tsrv_stream *stream, tsrvi_read *read)
{
    size_t size = tsrvi_buffer_size(stream->in);
    if (size == 0) {
        return TSRV_EAGAIN;
    }
    tsrvi_read_take(stream, read, tsrvi_min(size, read->max));
    return TSRV_OK;
}

static int tsrvi_attempt_close(tsrv_stream *stream, tsrvi_read *read)
{
    size_t size = tsrvi_buffer_size(stream->in);
    bool ended = stream->in_end == TSRV_EOF; /* the peer's, not a drain's */
    if (read->slice != NULL && size > read->max) {
        return tsrvi_read_too_long(stream, read->max);
    }
    if (size != 0 && (read->slice == NULL || ended)) {
        tsrvi_read_take(stream, read, size);
        tsrvi_set(stream, TSRVI_PARTIAL);
        size = 0;
    }
    read->need = size + 1;
    return ended ? TSRV_OK : TSRV_EAGAIN;
}

static int tsrvi_attempt_bytes(tsrv_stream *stream, tsrvi_read *read)
{
    if (tsrvi_buffer_size(stream->in) < read->size) {
        read->need = read->size;
        return TSRV_EAGAIN;
    }
    tsrvi_read_take(stream, read, read->size);
    return TSRV_OK;
}

/* Into the caller's memory, or into nowhere. Bytes that came by recv straight into it are counted
 * in done already. */
static int tsrvi_attempt_into(tsrv_stream *stream, tsrvi_read *read)
{
    size_t size = tsrvi_min(tsrvi_buffer_size(stream->in), read->size - read->done);
    if (size != 0) {
        if (read->into != NULL) {
            memcpy(read->into + read->done, stream->in->data + stream->in->begin, size);
        }
        tsrvi_buffer_drop(stream->in, size);
        read->done += size;
    }
    if (read->done != 0) {
        tsrvi_own_begin(stream, TSRVI_CONSUMED);
        tsrvi_set(stream, TSRVI_PARTIAL);
    }
    read->need = 1;
    return read->done == read->size ? TSRV_OK : TSRV_EAGAIN;
}

/* Nothing can wait in a match, whoever has called for it: the bytes that it looks at would not. */
static size_t tsrvi_match_call(tsrv_stream *stream, tsrvi_read *read, const char *data, size_t size)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    tsrvi_co *running = loop->coroutines.running;
    tsrv_stream *handling = loop->streams.handling;
    size_t found;
    loop->coroutines.running = NULL;
    loop->streams.handling = NULL;
    loop->plain = NULL;
    found = read->match(data, size, read->context);
    loop->coroutines.running = running;
    loop->streams.handling = handling;
    loop->plain = NULL;
    return found;
}

/* What has called for it from the loop goes on waiting: the next piece is somebody else's. */
static void tsrvi_match_waits(tsrv_loop *loop, const tsrvi_read *read)
{
    if (loop->coroutines.running == NULL && loop->streams.handling == NULL) {
        tsrvi_slow_callback(loop, "a match function", (uintptr_t)read->match);
    }
}

static int tsrvi_attempt_match(tsrv_stream *stream, tsrvi_read *read)
{
    size_t size = tsrvi_buffer_size(stream->in), found, limit;
    char *data;
    if (size == 0 || size < read->need) {
        return TSRV_EAGAIN;
    }
    data = stream->in->data + stream->in->begin;
    data[size] = 0; /* there are always bytes more than the capacity */
    found = tsrvi_match_call(stream, read, data, size);
    if (TSRVI_UNLIKELY(stream->end != 0)) {
        return stream->end; /* it has ended the stream, */
    }
    if (TSRVI_UNLIKELY(tsrvi_buffer_size(stream->in) != size)) {
        return TSRV_EBUSY; /* or has read it itself */
    }
    limit = read->slice == NULL ? stream->server->options.max_buffer_size : read->max;
    if (found == SIZE_MAX) {
        tsrvi_loop_of(stream)->streams.limited = NULL; /* it is malformed, of whatever size */
        return TSRV_ETOOLONG;
    }
    if ((found > read->max && read->slice != NULL) || (found == 0 && size > limit)) {
        return tsrvi_read_too_long(stream, limit);
    }
    if (found > size && read->slice == NULL) {
        read->attempt = tsrvi_attempt_into; /* drop that many, however many they are */
        read->size = found;
        return tsrvi_attempt_into(stream, read);
    }
    if (found == 0 || found > size) {
        read->need = found == 0 ? size + 1 : found;
        tsrvi_match_waits(tsrvi_loop_of(stream), read);
        return TSRV_EAGAIN;
    }
    tsrvi_read_take(stream, read, found);
    return TSRV_OK;
}

static inline TSRVI_INLINE int tsrvi_read_attempt(tsrv_stream *stream, tsrvi_read *read)
{
    int rc;
    if (TSRVI_UNLIKELY(stream->end != 0)) {
        return stream->end;
    }
    rc = TSRVI_LIKELY(read->attempt == tsrvi_attempt_line) ? tsrvi_line(stream, read)
                                                           : read->attempt(stream, read);
    return TSRVI_UNLIKELY(rc == TSRV_EAGAIN && tsrvi_stream_in_end(stream) != 0)
               ? tsrvi_stream_in_end(stream)
               : rc;
}

/* ---- limits ----------------------------------------------------------------*/

/* Is the deadline over? It holds for what is there already too: a peer that is always ahead would
 * be read for as long as it likes. */
static inline TSRVI_INLINE bool tsrvi_deadline_is_past(const tsrv_stream *stream)
{
    return TSRVI_UNLIKELY(stream->deadline_ms != 0) &&
           tsrvi_ms_is_past(tsrvi_loop_of(stream), stream->deadline_ms);
}

/* When a read is over that has this limit of its own. */
static inline TSRVI_INLINE uint32_t tsrvi_read_limit(const tsrv_stream *stream, uint32_t due_ms)
{
    return tsrvi_ms_earlier(tsrvi_ms_earlier(due_ms, stream->deadline_ms),
                            tsrvi_stream_idle_due(stream));
}

/* A read into the caller's memory has failed: what had arrived is unread again, in front of what
 * has come while the handler did not go on with it. */
static TSRVI_APART void tsrvi_read_undo(tsrv_stream *stream, tsrvi_read *read)
{
    size_t behind = tsrvi_buffer_size(stream->in);
    tsrvi_buffer *buffer;
    if (read->into == NULL || read->done == 0 || stream->end != 0) {
        return;
    }
    buffer = tsrvi_pool_take(&tsrvi_loop_of(stream)->streams.pool, read->done + behind);
    if (buffer == NULL) {
        tsrvi_stream_kill(stream, -ENOMEM);
        return;
    }
    memcpy(buffer->data, read->into, read->done);
    buffer->end = read->done + behind;
    if (stream->in != NULL) {
        memcpy(buffer->data + read->done, stream->in->data + stream->in->begin, behind);
        tsrvi_input_drop(stream);
    }
    stream->in = buffer;
}

/* ---- what a callback-mode handler's read has done so far --------------------*/

/* Restore what the handler's partial read has done so far. A repeated call must be the same one. */
static int tsrvi_partial_load(tsrv_stream *stream, tsrvi_read *read)
{
    const tsrvi_partial *partial = stream->own.u.partial;
    if (read->attempt == tsrvi_attempt_match && read->slice == NULL && partial->into == NULL) {
        read->attempt = tsrvi_attempt_into;
        read->size = partial->size;
    }
    if (read->attempt != tsrvi_attempt_into || read->into != partial->into ||
        read->size != partial->size) {
        return tsrvi_mistake("tsrv_read_into", "the call was repeated with another buffer or size");
    }
    read->done = partial->done;
    return TSRV_OK;
}

static void tsrvi_partial_free(tsrv_stream *stream)
{
    if (stream->own.facts & TSRVI_PARTLY) {
        TSRV_FREE(stream->own.u.partial);
        stream->own.u.partial = NULL;
        tsrvi_own_clear(stream, TSRVI_PARTLY);
    }
}

/* Keep it for the next call. */
static int tsrvi_partial_save(tsrv_stream *stream, const tsrvi_read *read)
{
    tsrvi_partial *partial = stream->own.u.partial;
    if ((stream->own.facts & TSRVI_PARTLY) == 0) {
        partial = (tsrvi_partial *)tsrvi_zalloc(sizeof(tsrvi_partial));
        if (partial == NULL) {
            tsrvi_stream_kill(stream, -ENOMEM);
            return -ENOMEM;
        }
        stream->own.u.partial = partial;
        tsrvi_own_set(stream, TSRVI_PARTLY);
    }
    partial->into = read->into;
    partial->size = read->size;
    partial->done = read->done;
    return TSRV_EAGAIN;
}

/* ============================================================================
 * >>read  Reads
 * ==========================================================================*/

/* ---- in a callback-mode handler --------------------------------------------*/

/* A read of the handler's begins, which has a limit of its own, or had. */
static inline TSRVI_INLINE void tsrvi_read_begin(tsrv_stream *stream, const tsrv_loop *loop)
{
    stream->own.due_ms = tsrvi_ms_from(loop, stream->read_ms);
    stream->active_ms = loop->now_ms;
    tsrvi_own_begin(stream, TSRVI_IN_READ);
}

/* Is the time over of one that begins, or goes on? */
static TSRVI_APART bool tsrvi_read_is_late(tsrv_stream *stream)
{
    bool begins = (stream->own.progress & TSRVI_IN_READ) == 0;
    uint32_t limit_ms;
    if (begins) {
        tsrvi_loop_catch_up(tsrvi_loop_of(stream));
        tsrvi_read_begin(stream, tsrvi_loop_of(stream));
    }
    limit_ms = tsrvi_read_limit(stream, stream->own.due_ms);
    if (begins && limit_ms == 0) {
        tsrvi_own_finish(stream, TSRVI_IN_READ); /* unless somebody sets one meanwhile */
    }
    return tsrvi_ms_is_past(tsrvi_loop_of(stream), limit_ms);
}

/* The handler waits for this read. */
static inline TSRVI_INLINE int tsrvi_read_note(tsrv_stream *stream, tsrvi_read *read)
{
    if (TSRVI_UNLIKELY(tsrvi_is_timed(stream)) && tsrvi_read_is_late(stream)) {
        return TSRV_ETIMEOUT;
    }
    tsrvi_own_wants(stream, tsrvi_loop_of(stream), TSRVI_FOR_READ);
    if (read->attempt == tsrvi_attempt_into) {
        return tsrvi_partial_save(stream, read);
    }
    stream->own.u.need = read->need;
    return TSRV_EAGAIN;
}

/* ---- where nothing can wait ------------------------------------------------*/

/* What one recv brings, if what is there is not enough. The slice dies when the user code gives
 * control back, since nobody else may read for a long time. */
static TSRVI_APART int tsrvi_read_now(tsrv_stream *stream, tsrvi_read *read)
{
    TSRV_ASSERT(stream->phase != TSRVI_CLOSED && stream->in_end == 0); /* else that is the answer */
    tsrvi_stream_receive(stream, read->need);
    return tsrvi_read_attempt(stream, read);
}

static void tsrvi_read_lend(tsrv_stream *stream)
{
    if (stream->in != NULL && tsrvi_buffer_is_held(stream->in)) {
        tsrvi_set(stream, TSRVI_BORROWED);
        tsrvi_stream_soon(stream);
    }
}

/* ---- every read ------------------------------------------------------------*/

/* Is somebody within a read that lets others run first? */
static TSRVI_APART bool tsrvi_read_pays(const tsrv_stream *stream)
{
    const tsrvi_wait *wait = stream->waits;
    while (wait != NULL &&
           ((wait->kinds & TSRVI_FOR_TURN) == 0 ||
            (wait->facts & (wait == &stream->own ? TSRVI_PAYS : TSRVI_IN_READ)) == 0)) {
        wait = wait->next;
    }
    return wait != NULL;
}

/* Does somebody else read already? */
static bool tsrvi_read_is_busy(const tsrv_stream *stream, bool handling)
{
    return (stream->kinds & TSRVI_FOR_READ) != 0 ||
           ((stream->kinds & TSRVI_FOR_TURN) != 0 && tsrvi_read_pays(stream)) ||
           (!handling && ((stream->own.progress & TSRVI_IN_READ) != 0 ||
                          (stream->own.facts & TSRVI_PARTLY) != 0));
}

/* May a result be as long as tsrvi_find_near looks? max_buffer_size may be less. */
static inline TSRVI_INLINE bool tsrvi_server_allows_near(const tsrv_server *server)
{
    return TSRVI_LIKELY(server->options.max_buffer_size >= TSRVI_NEAR);
}

/* Nobody waits for the stream, nothing has happened to it, no search goes on in what is unread, and
 * its deadline is ahead. */
static inline TSRVI_INLINE bool tsrvi_read_is_free(const tsrv_stream *stream)
{
    return (tsrvi_stream_status(stream) & tsrvi_status(0, UINT8_MAX, TSRVI_HINDERS)) == 0 &&
           (stream->in == NULL || stream->in->scanned == 0) && !tsrvi_deadline_is_past(stream) &&
           tsrvi_server_allows_near(stream->server);
}

/* The handler is not within a read, and its output is below the mark, which memory decides where it
 * is tight. */
static inline TSRVI_INLINE bool tsrvi_own_is_free(const tsrv_stream *stream)
{
    return (stream->own.facts & TSRVI_PARTLY) == 0 &&
           stream->unsent <= stream->server->options.write_high_water &&
           !tsrvi_loop_of(stream)->streams.pool.tight;
}

/* The same, of who reads: a coroutine, or the stream's own handler. And it may make more calls
 * before the others run. */
static bool tsrvi_read_looks_plain(const tsrv_stream *stream, const tsrv_loop *loop)
{
    return tsrvi_read_is_free(stream) && loop->budget > 0 &&
           (loop->coroutines.running != NULL ||
            (loop->streams.handling == stream && stream->own.kinds == 0 &&
             tsrvi_own_is_free(stream)));
}

/* May this read take what is there, without a further look? loop->plain remembers that it looked
 * so, until user code has given control back, or something of that changes: see tsrvi_set,
 * tsrvi_own_set, tsrvi_own_wants, tsrvi_loop_pay, tsrvi_attempt_until, tsrvi_output_grows. */
static inline TSRVI_INLINE bool tsrvi_read_is_plain(const tsrv_stream *stream,
                                                    const tsrv_loop *loop)
{
#ifdef TSRV_DEBUG
    TSRV_ASSERT(loop->plain != stream || tsrvi_read_looks_plain(stream, loop));
#endif
    return loop->plain == stream;
}

/* If not, what comes first. Returns TSRV_OK; TSRV_EAGAIN: the handler's output, or the others, do;
 * or why there is no read. */
static TSRVI_APART int tsrvi_read_enter(tsrv_stream *stream, tsrvi_read *read)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    bool handling = loop->streams.handling == stream;
    int rc = TSRV_OK;
    if (tsrvi_read_is_busy(stream, handling)) {
        return stream->end != 0 ? stream->end
                                : (int)TSRV_EBUSY; /* who waits is about to hear of it */
    }
    if (loop->coroutines.running != NULL && loop->budget <= 0) {
        rc = tsrvi_stream_yield(stream, TSRVI_IN_READ);
    }
    tsrvi_clear(stream, TSRVI_BORROWED);
    if (handling && stream->end == 0 && (stream->own.facts & TSRVI_PARTLY) != 0) {
        rc = tsrvi_partial_load(stream, read);
    }
    if (rc < 0 || !handling) {
        return rc;
    }
    if (tsrvi_stream_above_mark(stream)) {
        tsrvi_stream_flush(stream);
    }
    if (stream->end == 0 && tsrvi_stream_above_mark(stream)) {
        return TSRV_EAGAIN;
    }
    if (stream->end == 0 && loop->budget <= 0) {
        tsrvi_own_wants(stream, loop, TSRVI_FOR_TURN);
        return TSRV_EAGAIN;
    }
    return TSRV_OK;
}

/* Somebody else has read while the handler waits for more input: what is left of it has come. */
static TSRVI_APART void tsrvi_read_beside(tsrv_stream *stream)
{
    *tsrvi_own_need(stream) = 1;
    tsrvi_stream_soon(stream);
}

static inline TSRVI_INLINE void tsrvi_slice_clear(tsrv_slice *slice)
{
    if (slice != NULL) {
        slice->data = "";
        slice->size = 0;
    }
}

/* What comes behind a read that is not plain: one that has failed has consumed nothing. */
static TSRVI_APART int tsrvi_read_leave(tsrv_stream *stream, tsrvi_read *read, int rc)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    if (rc == TSRV_ETIMEOUT && stream->unsent == 0) {
        tsrvi_set(stream, TSRVI_SILENT);
    }
    if (rc != TSRV_OK) {
        tsrvi_read_undo(stream, read);
        tsrvi_slice_clear(read->slice);
    } else if (loop->coroutines.running == NULL && loop->streams.handling != stream) {
        tsrvi_read_lend(stream);
    }
    if (loop->streams.handling == stream) {
        tsrvi_own_finish(stream, TSRVI_IN_READ | TSRVI_IN_WAKE);
        tsrvi_own_has(stream, TSRVI_FOR_READ);
        tsrvi_partial_free(stream);
    }
    if ((stream->kinds & TSRVI_FOR_INPUT) != 0) {
        tsrvi_read_beside(stream);
    }
    tsrvi_clear(stream, TSRVI_PARTIAL);
    return rc;
}

/* A coroutine's read waits, and comes to its end. */
static inline TSRVI_INLINE int tsrvi_read_suspend(tsrv_loop *loop, tsrv_stream *stream,
                                                  tsrvi_read *read)
{
    int rc;
    read->wait.due_ms = 0;
    if (TSRVI_UNLIKELY(tsrvi_is_timed(stream))) {
        tsrvi_loop_catch_up(loop);
        read->wait.due_ms = tsrvi_ms_from(loop, stream->read_ms);
        stream->active_ms = loop->now_ms;
    }
    rc = tsrvi_loop_wait(loop, stream, &read->wait, TSRVI_FOR_READ);
    return TSRVI_LIKELY(loop->plain == stream) ? (int)TSRV_OK /* nothing is left to be seen to */
                                               : tsrvi_read_leave(stream, read, rc);
}

/* The longest result of a read. */
static inline TSRVI_INLINE size_t tsrvi_read_most(const tsrv_stream *stream, size_t max_bytes)
{
    size_t limit = stream->server->options.max_buffer_size;
    return max_bytes - 1 < limit ? max_bytes : limit; /* 0 wraps to more than any limit */
}

/* Every read. */
static TSRVI_APART int tsrvi_read_run(tsrv_stream *stream, tsrvi_read *read, size_t max_bytes)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    bool plain = tsrvi_read_is_plain(stream, loop) || tsrvi_read_looks_plain(stream, loop);
    int rc = plain ? (int)TSRV_OK : tsrvi_read_enter(stream, read);
    loop->plain = plain ? stream : NULL;
    if (rc < 0 && rc != TSRV_EAGAIN) {
        return rc;
    }
    tsrvi_loop_pay(loop);
    read->max = tsrvi_read_most(stream, max_bytes);
    tsrvi_input_release(stream);
    if (rc == TSRV_OK && stream->end == 0 && tsrvi_deadline_is_past(stream)) {
        bool sends = tsrvi_buffer_size(stream->in) != 0 && !tsrvi_is(stream, TSRVI_SILENT);
        rc = tsrvi_read_leave(stream, read, TSRV_ETIMEOUT);
        tsrvi_clear(stream, sends ? TSRVI_SILENT : 0); /* no read has waited in vain for it */
        return rc;
    }
    if (rc == TSRV_OK) {
        rc = tsrvi_read_attempt(stream, read);
    }
    if (rc == TSRV_EAGAIN && loop->coroutines.running != NULL) {
        tsrvi_input_release(stream); /* of which the attempt may have dropped all */
        return tsrvi_read_suspend(loop, stream, read);
    }
    if (rc == TSRV_EAGAIN && loop->streams.handling == stream) {
        rc = tsrvi_read_note(stream, read);
        return rc == TSRV_EAGAIN ? rc : tsrvi_read_leave(stream, read, rc);
    }
    if (rc == TSRV_EAGAIN) {
        rc = tsrvi_read_now(stream, read);
    }
    return tsrvi_read_leave(stream, read, rc);
}

static inline TSRVI_INLINE tsrvi_read tsrvi_read_make(int (*attempt)(tsrv_stream *, tsrvi_read *),
                                                      tsrv_slice *slice, size_t size)
{
    tsrvi_read read;
    tsrvi_slice_clear(slice);
    read.attempt = attempt;
    read.slice = slice;
    read.size = size;
    read.need = 1;
    read.into = NULL;
    read.done = 0;
    return read;
}

static TSRVI_APART int tsrvi_read_until_any(tsrv_stream *stream, const char *delimiter,
                                            size_t delimiter_size, size_t max_bytes,
                                            tsrv_slice *slice)
{
    tsrvi_read read = tsrvi_read_make(tsrvi_attempt_until, slice, delimiter_size);
    read.delimiter = delimiter;
    return delimiter_size == 0 || delimiter_size > stream->server->options.max_buffer_size
               ? tsrvi_mistake("tsrv_read_until", "delimiter is empty, or above max_buffer_size")
               : tsrvi_read_run(stream, &read, max_bytes);
}

/* ---- up to a delimiter of one byte, of which there are most, in few steps --*/

/* Unread bytes are there, as in a pipeline. */
static inline TSRVI_INLINE int tsrvi_read_take_line(tsrv_stream *stream, tsrvi_buffer *in,
                                                    char *data, size_t size, tsrv_slice *slice)
{
    stream->own.progress = TSRVI_CONSUMED;
    tsrvi_buffer_hand_out(in, data, size, slice);
    return TSRV_OK;
}

/* Its end is not near. */
static TSRVI_APART int tsrvi_read_long_line(tsrv_stream *stream, const char *delimiter,
                                            size_t max_bytes, tsrv_slice *slice)
{
    tsrvi_buffer *in = stream->in;
    char *data = in->data + in->begin;
    size_t most = tsrvi_read_most(stream, max_bytes);
    size_t end = tsrvi_find_byte(data, tsrvi_min(in->end - in->begin, most), delimiter[0]);
    return TSRVI_LIKELY(end != 0) ? tsrvi_read_take_line(stream, in, data, end, slice)
                                  : tsrvi_read_until_any(stream, delimiter, 1, most, slice);
}

static TSRVI_APART int tsrvi_read_line(tsrv_stream *stream, const char *delimiter, size_t max_bytes,
                                       tsrv_slice *slice, tsrv_loop *loop, tsrvi_buffer *in)
{
    char *data = in->data + in->begin;
    size_t size = in->end - in->begin, end;
    if (TSRVI_UNLIKELY(--loop->budget == 0)) {
        loop->plain = NULL;
    }
    tsrvi_buffer_restore(in);
    /* max_buffer_size is no less than what is looked at here: see tsrvi_read_is_free. */
    end = tsrvi_find_near(data, max_bytes - 1 < size ? max_bytes : size, delimiter[0]);
    return TSRVI_LIKELY(end != 0) ? tsrvi_read_take_line(stream, in, data, end, slice)
                                  : tsrvi_read_long_line(stream, delimiter, max_bytes, slice);
}

/* None are there, and a coroutine waits. */
static TSRVI_APART int tsrvi_read_await_line(tsrv_stream *stream, const char *delimiter,
                                             size_t max_bytes, tsrv_slice *slice, tsrv_loop *loop)
{
    tsrvi_read read = tsrvi_read_make(tsrvi_attempt_line, NULL, 1);
    read.slice = slice; /* empty only if it fails: see tsrvi_read_leave */
    read.delimiter = delimiter;
    read.max = tsrvi_read_most(stream, max_bytes);
    if (stream->in != NULL) {
        tsrvi_loop_drop(loop, stream);
    }
    return tsrvi_read_suspend(loop, stream, &read);
}

/* Or a handler returns, and is called again. */
static inline TSRVI_INLINE int tsrvi_read_leave_line(tsrv_stream *stream, tsrv_loop *loop,
                                                     tsrv_slice *slice)
{
    tsrvi_slice_clear(slice);
    tsrvi_own_wants(stream, loop, TSRVI_FOR_READ);
    stream->own.u.need = 1;
    return TSRV_EAGAIN;
}

/* The same with a limit of time, or a buffer of its own. */
static TSRVI_APART int tsrvi_read_leave_late(tsrv_stream *stream, const char *delimiter,
                                             size_t max_bytes, tsrv_slice *slice)
{
    if (tsrvi_is_timed(stream) && tsrvi_read_is_late(stream)) {
        return tsrvi_read_until_any(stream, delimiter, 1, max_bytes, slice);
    }
    tsrvi_input_release(stream);
    return tsrvi_read_leave_line(stream, tsrvi_loop_of(stream), slice);
}

/* With a limit that begins now, in few steps. */
static TSRVI_APART int tsrvi_read_leave_timed(tsrv_stream *stream, const char *delimiter,
                                              size_t max_bytes, tsrv_slice *slice, tsrv_loop *loop)
{
    if (TSRVI_UNLIKELY((stream->own.progress & TSRVI_IN_READ) != 0 || stream->read_ms < 0) ||
        tsrvi_loop_lags(loop)) {
        return tsrvi_read_leave_late(stream, delimiter, max_bytes, slice);
    }
    tsrvi_read_begin(stream, loop);
    return tsrvi_read_leave_line(stream, loop, slice);
}

/* Which of them is it? All are called last, so that none pays for another's registers. */
static TSRVI_APART int tsrvi_read_until_byte(tsrv_stream *stream, const char *delimiter,
                                             size_t max_bytes, tsrv_slice *slice)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    tsrvi_buffer *in = stream->in;
    if (TSRVI_UNLIKELY(!tsrvi_read_is_plain(stream, loop) || slice == NULL)) {
        return tsrvi_read_until_any(stream, delimiter, 1, max_bytes, slice);
    }
    if (in != NULL && in->begin != in->end) {
        return tsrvi_read_line(stream, delimiter, max_bytes, slice, loop, in);
    }
    if (loop->coroutines.running != NULL) {
        return tsrvi_read_await_line(stream, delimiter, max_bytes, slice, loop);
    }
    if (TSRVI_UNLIKELY(loop->streams.input_owner != stream)) {
        return tsrvi_read_leave_late(stream, delimiter, max_bytes, slice);
    }
    tsrvi_buffer_bury(in);
    loop->streams.input_owner = NULL;
    stream->in = NULL;
    return TSRVI_UNLIKELY(tsrvi_is_timed(stream))
               ? tsrvi_read_leave_timed(stream, delimiter, max_bytes, slice, loop)
               : tsrvi_read_leave_line(stream, loop, slice);
}

TSRV_API int tsrv_read_until_mem(tsrv_stream *stream, const void *delimiter, size_t delimiter_size,
                                 size_t max_bytes, tsrv_slice *slice)
{
    const char *text = (const char *)delimiter;
    return TSRVI_CHECKED(stream, delimiter_size == 1
                                     ? tsrvi_read_until_byte(stream, text, max_bytes, slice)
                                     : tsrvi_read_until_any(stream, text, delimiter_size, max_bytes,
                                                            slice));
}

static TSRVI_APART int tsrvi_read_until_text(tsrv_stream *stream, const char *delimiter,
                                             size_t max_bytes, tsrv_slice *slice)
{
    return tsrvi_read_until_any(stream, delimiter, strlen(delimiter), max_bytes, slice);
}

TSRV_API int tsrv_read_until(tsrv_stream *stream, const char *delimiter, size_t max_bytes,
                             tsrv_slice *slice)
{
    return TSRVI_CHECKED(stream, TSRVI_LIKELY(delimiter[0] != 0 && delimiter[1] == 0)
                                     ? tsrvi_read_until_byte(stream, delimiter, max_bytes, slice)
                                     : tsrvi_read_until_text(stream, delimiter, max_bytes, slice));
}

TSRV_API int tsrv_read_until_match(tsrv_stream *stream, tsrv_match match, void *context,
                                   size_t max_bytes, tsrv_slice *slice)
{
    tsrvi_read read = tsrvi_read_make(tsrvi_attempt_match, slice, 0);
    read.match = match;
    read.context = context;
    return TSRVI_CHECKED(stream, TSRVI_WRONG(match == NULL)
                                     ? TSRV_EINVAL
                                     : tsrvi_read_run(stream, &read, max_bytes));
}

/* A read of 0 bytes: empty at once, also after the end of the input. Like every read it ends the
 * last slice, and costs one of the calls that may complete at once.
 *   reads  it is one of too many bytes, beside which nobody else may read */
static int tsrvi_read_nothing(tsrv_stream *stream, bool reads)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    int rc;
    if (stream->in != NULL) {
        tsrvi_buffer_release(stream->in);
    }
    if ((rc = tsrvi_stream_pay(stream, reads ? TSRVI_IN_READ : 0)) < 0) {
        return rc;
    }
    if (loop->streams.handling == stream && loop->budget < 0 && stream->end == 0) {
        tsrvi_own_set(stream, reads ? TSRVI_PAYS : 0);
        tsrvi_own_wants(stream, loop, TSRVI_FOR_TURN);
        return TSRV_EAGAIN;
    }
    if (loop->streams.handling == stream) {
        tsrvi_own_finish(stream, TSRVI_IN_READ | TSRVI_IN_WAKE);
    }
    return stream->end;
}

TSRV_API int tsrv_read_bytes(tsrv_stream *stream, size_t count, tsrv_slice *slice)
{
    tsrvi_read read =
        tsrvi_read_make(slice == NULL ? tsrvi_attempt_into : tsrvi_attempt_bytes, slice, count);
    size_t limit = stream->server->options.max_buffer_size;
    if (count == 0 || (slice != NULL && count > limit)) {
        int rc = tsrvi_read_nothing(stream, count != 0);
        return rc == TSRV_OK && count != 0 ? tsrvi_read_too_long(stream, limit) : rc;
    }
#ifdef TSRV_DEBUG
    tsrvi_debug_count(stream, __func__, count);
#endif
    return TSRVI_CHECKED(stream, tsrvi_read_run(stream, &read, 0));
}

TSRV_API int tsrv_read_some(tsrv_stream *stream, size_t max_bytes, tsrv_slice *slice)
{
    tsrvi_read read = tsrvi_read_make(tsrvi_attempt_some, slice, 0);
    return TSRVI_CHECKED(stream, tsrvi_read_run(stream, &read, max_bytes));
}

TSRV_API int tsrv_read_into(tsrv_stream *stream, void *buffer, size_t size)
{
    tsrvi_read read = tsrvi_read_make(tsrvi_attempt_into, NULL, size);
    read.into = (char *)buffer;
    if (size == 0) {
        return tsrvi_read_nothing(stream, false);
    }
    return TSRVI_CHECKED(stream, TSRVI_WRONG(buffer == NULL) ? TSRV_EINVAL
                                                             : tsrvi_read_run(stream, &read, 0));
}

TSRV_API int tsrv_read_until_close(tsrv_stream *stream, size_t max_bytes, tsrv_slice *slice)
{
    tsrvi_read read = tsrvi_read_make(tsrvi_attempt_close, slice, 0);
    return TSRVI_CHECKED(stream, tsrvi_read_run(stream, &read, max_bytes));
}

/* ============================================================================
 * >>write  Writes
 * ==========================================================================*/

/* Why nothing can be written, or TSRV_OK. */
static inline TSRVI_INLINE int tsrvi_write_state(const tsrv_stream *stream)
{
    return stream->end != 0 ? stream->end : stream->out_end;
}

/* The same for what was taken before tsrv_shutdown. */
static int tsrvi_write_broken(const tsrv_stream *stream)
{
    return stream->end != 0                     ? stream->end
           : tsrvi_stream_output_failed(stream) ? stream->out_end
                                                : (int)TSRV_OK;
}

static int tsrvi_write_full(tsrv_stream *stream)
{
    return tsrvi_stream_limited(stream, TSRV_EFULL, "max_write_buffer_size",
                                stream->server->options.max_write_buffer_size);
}

/* A write was refused, which would leave a gap: the stream ends. */
static int tsrvi_write_refuse(tsrv_stream *stream, int code)
{
    tsrvi_stream_kill(stream, code);
    return code == TSRV_EFULL ? tsrvi_write_full(stream) : code;
}

/* Has this coroutine written so much, even if the kernel has taken all of it, that it could have
 * had to wait? Then the others run first. */
static bool tsrvi_write_is_long(const tsrv_stream *stream)
{
    size_t written = tsrvi_loop_of(stream)->written;
    return tsrvi_stream_above_mark(stream) ||
           (written > TSRVI_SEND_LIMIT && written > stream->server->options.write_high_water);
}

/* Behind a coroutine's write: wait until the output has been below the high water. The write itself
 * has been taken, so it does not wait again when another writer was quicker to fill the queue. */
static TSRVI_APART int tsrvi_write_pause(tsrv_stream *stream)
{
    tsrvi_wait wait;
    int rc = TSRV_OK;
    wait.due_ms = 0;
    tsrvi_stream_flush(stream);
    if (tsrvi_stream_above_mark(stream) && stream->end == 0) {
        rc = tsrvi_stream_wait(stream, &wait, TSRVI_FOR_ROOM);
    } else if (tsrvi_write_is_long(stream)) {
        rc = tsrvi_stream_yield(stream, 0);
    }
    return rc < 0 ? rc : stream->end;
}

/* A write that was taken, whatever the caller is. */
static inline TSRVI_INLINE int tsrvi_write_taken(tsrv_stream *stream)
{
    return TSRVI_UNLIKELY(tsrvi_write_is_long(stream)) &&
                   tsrvi_loop_of(stream)->coroutines.running != NULL
               ? tsrvi_write_pause(stream)
               : (int)TSRV_OK;
}

/* Take all of data, for which there is room, or none of it. Large data goes to the kernel from
 * where it is. */
static int tsrvi_write_take(tsrv_stream *stream, const char *data, size_t size)
{
    size_t taken = 0;
    int rc;
    tsrvi_clear(stream, TSRVI_SILENT);
    if (size >= TSRVI_DIRECT && !tsrvi_is(stream, TSRVI_BLOCKED)) {
        tsrvi_stream_soon(stream);
        taken = tsrvi_stream_send(stream, data, size);
        if ((rc = tsrvi_write_broken(stream)) != 0) {
            return rc;
        }
    }
    return taken == size ? TSRV_OK : tsrvi_output_copy(stream, data + taken, size - taken);
}

/* ---- writes that are queued where they lie ---------------------------------*/

#define TSRVI_LENT_FEW 4                /* pieces of one write, which take no memory */
#define TSRVI_LENT_LEAST ((size_t)4096) /* bytes of a piece that is not worth a copy */

/* The pieces of one write that are. */
typedef struct tsrvi_lending {
    tsrvi_wait wait; /* the coroutine's, if it waits */
    tsrvi_buffer *buffers;
    int count; /* 0 = all of it has been copied */
} tsrvi_lending;

/* The piece that goes last. */
static const tsrvi_buffer *tsrvi_lending_last(const tsrvi_lending *lending)
{
    return &lending->buffers[lending->count - 1];
}

/* Put a piece into the queue. */
static void tsrvi_lending_add(tsrv_stream *stream, tsrvi_lending *lending, const tsrv_slice *piece)
{
    tsrvi_buffer *buffer = &lending->buffers[lending->count++];
    union {
        const char *in;
        char *out;
    } unconst; /* nobody writes to a lent buffer */
    unconst.in = piece->data;
    tsrvi_buffer_reset(buffer);
    buffer->data = unconst.out;
    buffer->capacity = piece->size;
    buffer->end = piece->size;
    buffer->kind = TSRVI_LENT;
    tsrvi_output_seal(stream);
    tsrvi_queue_append(&stream->out, buffer);
    tsrvi_output_grows(stream, piece->size);
}

/* What is left of pieces that lie in the queue one behind the other, from *link on, keeps its
 * place, as a copy. Returns where the rest of the queue begins; NULL: no memory. */
static tsrvi_buffer **tsrvi_lending_keep(tsrv_stream *stream, tsrvi_buffer **link, int count)
{
    tsrvi_pool *pool = &tsrvi_loop_of(stream)->streams.pool;
    tsrvi_buffer *copies = NULL, *last = stream->out->last, *lent = *link, *end;
    int rc = TSRV_OK;
    for (; count > 0 && rc == TSRV_OK; count--, lent = lent->next) {
        rc = tsrvi_queue_copy(&copies, pool, lent->data + lent->begin, tsrvi_buffer_size(lent));
    }
    if (rc < 0) {
        while (copies != NULL) {
            tsrvi_loop_recycle(tsrvi_loop_of(stream), tsrvi_queue_pop(&copies));
        }
        return NULL;
    }
    end = copies->last;
    end->next = lent;
    *link = copies;
    stream->out->last = lent == NULL ? end : last; /* *link may be the first */
    return &end->next;
}

/* How many pieces from the i-th on lie one behind the other? */
static int tsrvi_lending_run(const tsrvi_lending *lending, int i)
{
    int count = 1;
    while (i + count < lending->count &&
           lending->buffers[i + count - 1].next == &lending->buffers[i + count]) {
        count++;
    }
    return count;
}

/* The caller's memory is the caller's again: what has not gone is copied. */
static int tsrvi_lending_end(tsrv_stream *stream, tsrvi_lending *lending)
{
    tsrvi_buffer **link = &stream->out;
    int i = 0, count;
    while (i < lending->count && (lending->buffers[i].kind != TSRVI_LENT ||
                                  tsrvi_buffer_size(&lending->buffers[i]) == 0)) {
        i++; /* it has gone, or the stream is over */
    }
    for (; i < lending->count && link != NULL; i += count) {
        while (*link != &lending->buffers[i]) {
            link = &(*link)->next;
        }
        count = tsrvi_lending_run(lending, i);
        link = tsrvi_lending_keep(stream, link, count);
    }
    return link == NULL ? tsrvi_write_refuse(stream, -ENOMEM) : (int)TSRV_OK;
}

/* The pieces are queued: send what goes.
 *   waits  until all of them have gone, for there is no room for a copy */
static int tsrvi_lending_send(tsrv_stream *stream, tsrvi_lending *lending, bool waits)
{
    const tsrvi_buffer *last = lending->count == 0 ? NULL : tsrvi_lending_last(lending);
    int rc = TSRV_OK, kept;
    tsrvi_stream_flush(stream);
    if (tsrvi_write_broken(stream) != TSRV_OK || (last != NULL && last->kind == TSRVI_DROPPED)) {
        rc = tsrvi_write_broken(stream);
    } else if (waits && tsrvi_buffer_size(last) == 0) {
        rc = tsrvi_stream_yield(stream, 0);
    } else if (waits) {
        rc = tsrvi_stream_wait(stream, &lending->wait, TSRVI_FOR_LENT);
    }
    kept = tsrvi_lending_end(stream, lending);
    return rc < 0 ? rc : kept;
}

/* Write pieces, from where they lie.
 *   waits  see tsrvi_lending_send; else small ones are copied at once, so that they go together */
static TSRVI_APART int tsrvi_write_lend(tsrv_stream *stream, const tsrv_slice *pieces, int count,
                                        bool waits)
{
    tsrvi_buffer few[TSRVI_LENT_FEW];
    tsrvi_lending lending;
    int rc = TSRV_OK;
    lending.wait.due_ms = 0;
    lending.count = 0;
    lending.buffers = count <= TSRVI_LENT_FEW ? few
                      : (size_t)count > SIZE_MAX / sizeof(few[0])
                          ? NULL
                          : (tsrvi_buffer *)TSRV_MALLOC((size_t)count * sizeof(few[0]));
    if (lending.buffers == NULL) {
        return tsrvi_write_refuse(stream, -ENOMEM);
    }
    for (int i = 0; i < count && rc == TSRV_OK; i++) {
        if (!waits && pieces[i].size < TSRVI_LENT_LEAST && pieces[i].size != 0) {
            rc = tsrvi_output_copy(stream, pieces[i].data, pieces[i].size);
        } else if (pieces[i].size != 0) {
            tsrvi_lending_add(stream, &lending, &pieces[i]);
        }
    }
    rc = rc < 0 ? tsrvi_write_refuse(stream, rc) : tsrvi_lending_send(stream, &lending, waits);
    if (lending.buffers != few) {
        TSRV_FREE(lending.buffers);
    }
    return rc;
}

/* ---- every write -----------------------------------------------------------*/

/* There is no room: readers that are fast may not have been given their chance in this turn, so
 * what is queued is sent. Returns TSRV_OK, or why nothing can be written any more. */
static int tsrvi_write_make_room(tsrv_stream *stream)
{
    tsrvi_stream_soon(stream);
    tsrvi_stream_send(stream, "", 0);
    return tsrvi_write_state(stream);
}

/* Have room for so much more. Else the stream ends. */
static TSRVI_APART int tsrvi_write_insist(tsrv_stream *stream, size_t size)
{
    bool never = size > stream->server->options.max_write_buffer_size;
    int rc = never ? (int)TSRV_OK : tsrvi_write_make_room(stream);
    return rc != TSRV_OK || tsrvi_output_fits(stream, size)
               ? rc
               : tsrvi_write_refuse(stream, TSRV_EFULL);
}

/* Has a coroutine to wait until so much more has gone, because there is no room for a copy of it?
 * The program outside of coroutines cannot wait, so max_total_buffer holds its reads instead. */
static bool tsrvi_write_must_wait(const tsrv_stream *stream, size_t size)
{
    return tsrvi_loop_of(stream)->coroutines.running != NULL &&
           (!tsrvi_output_fits(stream, size) || !tsrvi_loop_has_room(tsrvi_loop_of(stream), size));
}

static TSRVI_APART int tsrvi_write_any(tsrv_stream *stream, const char *data, size_t size)
{
    int rc = tsrvi_write_state(stream);
    if (TSRVI_UNLIKELY(rc != 0) || size == 0) {
        return rc;
    }
    if (TSRVI_UNLIKELY(tsrvi_write_must_wait(stream, size))) {
        tsrv_slice piece = {data, size};
        return tsrvi_write_lend(stream, &piece, 1, true);
    }
    if (TSRVI_UNLIKELY(!tsrvi_output_fits(stream, size)) &&
        (rc = tsrvi_write_insist(stream, size)) < 0) {
        return rc;
    }
    rc = tsrvi_write_take(stream, data, size);
    if (TSRVI_UNLIKELY(rc < 0)) {
        return rc == -ENOMEM ? tsrvi_write_refuse(stream, rc) : rc;
    }
    return tsrvi_write_taken(stream);
}

/* The first small write since the output was sent. */
static TSRVI_APART int tsrvi_write_first(tsrv_stream *stream, const char *data, size_t size)
{
    tsrvi_pool *pool = &tsrvi_loop_of(stream)->streams.pool;
    tsrvi_buffer *buffer = pool->first;
    if (TSRVI_UNLIKELY(tsrvi_is(stream, TSRVI_ENDED | TSRVI_SESSION | TSRVI_SILENT) ||
                       buffer == NULL || size - 1 >= TSRVI_DIRECT / 2 ||
                       stream->server->options.write_high_water < TSRVI_POOLED_ROOM)) {
        return tsrvi_write_any(stream, data, size);
    }
    buffer = tsrvi_pool_pop(pool);
    stream->unsent = size;
    buffer->end = size;
    buffer->room = TSRVI_POOLED_ROOM - size;
    buffer->next = NULL;
    buffer->last = buffer;
    stream->out = buffer;
    tsrvi_stream_soon(stream);
    memcpy(buffer->data, data, size);
    return TSRV_OK;
}

/* The common case first: one more small write, to a stream that is in order and far from its
 * limits, for else there is no room. */
TSRV_API int tsrv_write(tsrv_stream *stream, const void *data, size_t size)
{
    tsrvi_buffer *last;
    char *end;
    if (TSRVI_UNLIKELY(stream->out == NULL)) {
        return TSRVI_CHECKED(stream, tsrvi_write_first(stream, (const char *)data, size));
    }
    last = stream->out->last;
    if (TSRVI_UNLIKELY(size - 1 >= last->room)) { /* 0 wraps: it takes the long way too */
        return TSRVI_CHECKED(stream, tsrvi_write_any(stream, (const char *)data, size));
    }
    end = last->data + last->end;
    last->end += size;
    last->room -= size;
    stream->unsent += size;
    memcpy(end, data, size);
    return TSRV_OK;
}

/* ---- several pieces --------------------------------------------------------*/

/* Bytes of all slices; SIZE_MAX = no memory has so many. */
static size_t tsrvi_slices_size(const tsrv_slice *slices, int count)
{
    size_t total = 0;
    for (int i = 0; i < count; i++) {
        total = slices[i].size > SIZE_MAX - total ? SIZE_MAX : total + slices[i].size;
    }
    return count < 0 ? SIZE_MAX : total;
}

/* Copy them behind what is queued, or end the stream. */
static int tsrvi_write_copy(tsrv_stream *stream, const tsrv_slice *slices, int count)
{
    int rc = TSRV_OK;
    for (int i = 0; i < count && rc == TSRV_OK; i++) {
        if (slices[i].size != 0) {
            rc = tsrvi_output_copy(stream, slices[i].data, slices[i].size);
        }
    }
    return rc < 0 ? tsrvi_write_refuse(stream, rc) : rc;
}

/* Nothing can come between the pieces: they are queued before anything else runs. */
TSRV_API int tsrv_writev(tsrv_stream *stream, const tsrv_slice *slices, int count)
{
    size_t total = tsrvi_slices_size(slices, count);
    bool waits;
    int rc = tsrvi_write_state(stream);
    if (total == SIZE_MAX) {
        return tsrvi_mistake(__func__, "count is negative, or the slices are too large");
    }
    if (rc < 0 || count == 1 || total == 0) {
        return tsrv_write(stream, total == 0 ? "" : slices[0].data, total);
    }
    waits = tsrvi_write_must_wait(stream, total);
    if (!waits && !tsrvi_output_fits(stream, total) &&
        (rc = tsrvi_write_insist(stream, total)) < 0) {
        return rc;
    }
    rc = waits || total >= TSRVI_DIRECT ? tsrvi_write_lend(stream, slices, count, waits)
                                        : tsrvi_write_copy(stream, slices, count);
    return rc < 0 ? rc : tsrvi_write_taken(stream);
}

/* Is there room, without a wait? */
static bool tsrvi_write_has_room(const tsrv_stream *stream, size_t size)
{
    return tsrvi_output_fits(stream, size) && tsrvi_loop_has_room(tsrvi_loop_of(stream), size);
}

TSRV_API int tsrv_try_writev(tsrv_stream *stream, const tsrv_slice *slices, int count)
{
    size_t total = tsrvi_slices_size(slices, count);
    int rc = tsrvi_write_state(stream);
    if (total == SIZE_MAX) {
        return tsrvi_mistake(__func__, "count is negative, or the slices are too large");
    }
    if (rc != 0 || total == 0) {
        return rc;
    }
    if (!tsrvi_write_has_room(stream, total)) {
        if ((rc = tsrvi_write_make_room(stream)) != TSRV_OK) {
            return rc;
        }
        if (!tsrvi_output_fits(stream, total)) {
            return tsrvi_write_full(stream);
        }
        if (!tsrvi_write_has_room(stream, total)) {
            return tsrvi_stream_limited(stream, TSRV_EFULL, "max_total_buffer",
                                        tsrvi_loop_of(stream)->streams.most);
        }
    }
    return tsrvi_write_copy(stream, slices, count);
}

TSRV_API int tsrv_try_write(tsrv_stream *stream, const void *data, size_t size)
{
    tsrv_slice slice;
    slice.data = (const char *)data;
    slice.size = size;
    return size == SIZE_MAX ? tsrvi_write_full(stream) : tsrv_try_writev(stream, &slice, 1);
}

TSRV_API int tsrv_printf(tsrv_stream *stream, const char *format, ...)
{
    char brief[256], *text = brief;
    va_list arguments;
    int size, rc;
    va_start(arguments, format);
    size = vsnprintf(brief, sizeof(brief), format, arguments);
    va_end(arguments);
    if (size < 0) {
        return tsrvi_mistake(__func__, "vsnprintf refuses the format");
    }
    if ((size_t)size >= sizeof(brief)) {
        text = (char *)TSRV_MALLOC((size_t)size + 1);
        if (text == NULL) {
            rc = tsrvi_write_state(stream);
            return rc != 0 ? rc : tsrvi_write_refuse(stream, -ENOMEM);
        }
        va_start(arguments, format);
        vsnprintf(text, (size_t)size + 1, format, arguments);
        va_end(arguments);
    }
    rc = tsrv_write(stream, text, (size_t)size);
    if (text != brief) {
        TSRV_FREE(text);
    }
    return rc;
}

/* ============================================================================
 * >>files  Writing files, and waiting until all is sent
 * ==========================================================================*/

/* Queue a file range, with a descriptor of its own. */
static int tsrvi_sendfile_queue(tsrv_stream *stream, int fd, int64_t offset, size_t size)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    tsrvi_buffer *buffer = tsrvi_buffer_new(&loop->streams.pool, 0); /* only what it says */
    if (buffer == NULL) {
        return -ENOMEM;
    }
    buffer->file = TSRV_SYS(fcntl, (fd, F_DUPFD_CLOEXEC, 3));
    if (buffer->file < 0) {
        int rc = tsrvi_error();
        tsrvi_pool_give(&loop->streams.pool, buffer);
        return rc;
    }
    tsrvi_loop_opened_fd(loop, buffer->file);
    buffer->kind = TSRVI_FILE;
    buffer->copied = !TSRVI_HAS_SENDFILE;
    buffer->offset = offset;
    buffer->end = size;
    tsrvi_queue_append(&stream->out, buffer);
    return TSRV_OK;
}

/* A small part of a file is read at once, which costs less than a duplicate and sendfile. It goes
 * behind what is queued, so that one send takes both. */
static int tsrvi_sendfile_read(tsrv_stream *stream, int fd, int64_t offset, size_t size)
{
    tsrvi_pool *pool = &tsrvi_loop_of(stream)->streams.pool;
    tsrvi_buffer *last = stream->out == NULL ? NULL : stream->out->last, source;
    bool fits = last != NULL && last->kind == TSRVI_OWNED && last->capacity - last->end >= size;
    tsrvi_buffer *buffer = fits ? last : tsrvi_pool_take(pool, size);
    ssize_t got = 1;
    if (buffer == NULL) {
        return -ENOMEM;
    }
    source.file = fd;
    source.offset = offset;
    source.end = size;
    for (source.begin = 0; source.begin < size && got > 0;
         source.begin += got > 0 ? (size_t)got : 0) {
        got = tsrvi_output_read(&source, buffer->data + buffer->end + source.begin, size);
    }
    if (got < 0) {
        if (!fits) {
            tsrvi_pool_give(pool, buffer);
        }
        return (int)got;
    }
    buffer->end += size;
    buffer->scanned += size;
    buffer->room = 0;
    if (!fits) {
        tsrvi_queue_append(&stream->out, buffer);
    }
    return TSRV_OK;
}

TSRV_API int tsrv_sendfile(tsrv_stream *stream, int fd, int64_t offset, size_t size)
{
    size_t limit = stream->server->options.max_write_buffer_size; /* of what is read at once */
    struct stat info;
    int rc = tsrvi_write_state(stream);
    if (rc != 0 || size == 0) {
        return rc;
    }
    if (TSRV_SYS(fstat, (fd, &info)) < 0) {
        return tsrvi_write_refuse(stream, tsrvi_error());
    }
    if (!S_ISREG(info.st_mode) || offset < 0 || size > (uint64_t)(INT64_MAX - offset) ||
        stream->unsent > (uint64_t)INT64_MAX - size) { /* writes may follow, and it must not wrap */
        return tsrvi_mistake(__func__, "fd is no regular file, or offset or size out of range");
    }
    rc = size < TSRVI_DIRECT && size <= limit && stream->unsent <= limit - size
             ? tsrvi_sendfile_read(stream, fd, offset, size)
             : tsrvi_sendfile_queue(stream, fd, offset, size);
    if (rc < 0) {
        return tsrvi_write_refuse(stream, rc);
    }
    tsrvi_output_grows(stream, size);
    return tsrvi_write_taken(stream);
}

/* Wait in a call that has no limit of its own: in a coroutine here, in callback mode by
 * TSRV_EAGAIN. */
static int tsrvi_stream_wait_for(tsrv_stream *stream, int kind)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    tsrvi_wait wait;
    if (loop->coroutines.running != NULL) {
        wait.due_ms = 0;
        return tsrvi_stream_wait(stream, &wait, kind);
    }
    if (loop->streams.handling == stream) {
        if (tsrvi_ms_is_past(loop, stream->deadline_ms)) {
            return TSRV_ETIMEOUT;
        }
        tsrvi_own_wants(stream, loop, kind);
    }
    return TSRV_EAGAIN;
}

static int tsrvi_flush_run(tsrv_stream *stream)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    int rc = tsrvi_stream_pay(stream, 0);
    if (rc < 0) {
        return rc;
    }
    if (loop->streams.handling == stream) {
        tsrvi_own_has(stream, TSRVI_FOR_SENT);
    }
    tsrvi_stream_soon(stream);
    tsrvi_stream_flush(stream);
    rc = tsrvi_write_broken(stream); /* after tsrv_shutdown all is sent as promised */
    if (rc == TSRV_OK && loop->streams.handling == stream && loop->budget < 0) {
        tsrvi_own_wants(stream, loop, TSRVI_FOR_TURN); /* the others run first */
        return TSRV_EAGAIN;
    }
    return rc != TSRV_OK || stream->unsent == 0 ? rc
                                                : tsrvi_stream_wait_for(stream, TSRVI_FOR_SENT);
}

TSRV_API int tsrv_flush(tsrv_stream *stream)
{
    return TSRVI_CHECKED(stream, tsrvi_flush_run(stream));
}

/* ============================================================================
 * >>state  Waiting for something else, and what a stream tells of itself
 * ==========================================================================*/

/* In a callback-mode handler. */
static int tsrvi_wake_note(tsrv_stream *stream, int timeout_ms, uint32_t due_ms)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    int turn = timeout_ms != 0 && loop->budget < 0 ? TSRVI_FOR_TURN : 0;
    tsrvi_own_has(stream, TSRVI_FOR_WAKE);
    if ((stream->own.progress & TSRVI_IN_WAKE) == 0) {
        stream->wake_due_ms = due_ms;
    }
    tsrvi_own_finish(stream, TSRVI_IN_WAKE);
    if (turn == 0 && tsrvi_is(stream, TSRVI_WOKEN)) {
        tsrvi_clear(stream, TSRVI_WOKEN);
        return TSRV_OK;
    }
    if (timeout_ms == 0 ||
        (turn == 0 &&
         tsrvi_ms_is_past(loop, tsrvi_ms_earlier(stream->wake_due_ms, stream->deadline_ms)))) {
        return TSRV_ETIMEOUT;
    }
    tsrvi_own_wants(stream, loop, TSRVI_FOR_WAKE | turn);
    tsrvi_own_begin(stream, TSRVI_IN_WAKE);
    return TSRV_EAGAIN;
}

static int tsrvi_wake_wait(tsrv_stream *stream, int timeout_ms)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    uint32_t due_ms = tsrvi_ms_at(loop, tsrvi_after(tsrvi_clock(), timeout_ms));
    tsrvi_wait wait;
    int rc = loop->streams.parting == stream ? tsrvi_mistake("tsrv_wait", "called in on_close")
                                             : tsrvi_stream_pay(stream, 0);
    if (rc < 0) {
        return rc == TSRV_EINVAL ? rc
                                 : (int)TSRV_OK; /* as the end of a stream that is waited for */
    }
    if (loop->streams.handling == stream) {
        return tsrvi_wake_note(stream, timeout_ms, due_ms);
    }
    if (tsrvi_is(stream, TSRVI_WOKEN)) {
        tsrvi_clear(stream, TSRVI_WOKEN);
        return TSRV_OK;
    }
    if (timeout_ms == 0) {
        return TSRV_ETIMEOUT;
    }
    if (loop->coroutines.running == NULL) {
        return TSRV_EAGAIN;
    }
    wait.due_ms = due_ms;
    rc = tsrvi_stream_wait(stream, &wait, TSRVI_FOR_WAKE);
    return rc == TSRV_ECLOSED && !tsrvi_stream_finished(stream) ? (int)TSRV_OK : rc;
}

TSRV_API int tsrv_wait(tsrv_stream *stream, int timeout_ms)
{
    return TSRVI_CHECKED(stream, tsrvi_wake_wait(stream, timeout_ms));
}

TSRV_API void *tsrv_data(tsrv_stream *stream)
{
    return stream->server->options.data_size == 0
               ? NULL
               : (char *)stream + tsrvi_stream_data_at(stream->server);
}

TSRV_API void tsrv_set_handler(tsrv_stream *stream, tsrv_handler handler)
{
    stream->handler = handler;
}

TSRV_API int tsrv_set_nodelay(tsrv_stream *stream, bool on)
{
    if (stream->phase == TSRVI_CLOSED) {
        return TSRV_ECLOSED;
    }
    return stream->peer.local ? TSRV_OK : tsrvi_option(stream->io.fd, IPPROTO_TCP, TCP_NODELAY, on);
}

TSRV_API void tsrv_set_timeout(tsrv_stream *stream, int read_ms, int write_ms)
{
    const tsrv_server_options *options = &stream->server->options;
    if ((stream->own.kinds & TSRVI_FOR_READ) != 0) {
        tsrvi_own_begin(stream, TSRVI_IN_READ); /* which has begun, maybe without a limit */
    }
    stream->read_ms = tsrvi_ms_most(read_ms != 0 ? read_ms : options->read_timeout_ms);
    stream->write_ms = write_ms != 0 ? write_ms : options->write_timeout_ms;
    if (stream->read_ms >= 0) {
        tsrvi_stream_times(stream);
    }
    if (tsrvi_is(stream, TSRVI_BLOCKED) && !tsrvi_is(stream, TSRVI_SHAKING)) {
        stream->own_due_ms = tsrvi_ms_earlier(stream->own_due_ms, tsrvi_stream_write_due(stream));
        tsrvi_stream_soon(stream);
    }
}

/* Calls that wait already are limited too. */
TSRV_API void tsrv_set_deadline(tsrv_stream *stream, int delay_ms)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    stream->deadline_ms =
        delay_ms <= 0 ? 0 : tsrvi_ms_at(loop, tsrvi_after(tsrvi_clock(), delay_ms));
    if (stream->deadline_ms != 0) {
        tsrvi_stream_times(stream);
    }
    loop->plain = NULL;
    tsrvi_stream_soon(stream);
}

TSRV_API int tsrv_peer_address(tsrv_stream *stream, tsrv_address *address)
{
    memset(address, 0, sizeof(*address));
    tsrvi_peer_load(&stream->peer, address);
    return TSRV_OK;
}

TSRV_API int tsrv_proxy_address(tsrv_stream *stream, tsrv_address *address)
{
    memset(address, 0, sizeof(*address));
    if (tsrvi_proxy_of(stream) == NULL) {
        return TSRV_EINVAL;
    }
    tsrvi_peer_load(&tsrvi_proxy_of(stream)->sender, address);
    return TSRV_OK;
}

TSRV_API int tsrv_proxy_tlv(tsrv_stream *stream, int type, tsrv_slice *slice)
{
    const tsrvi_proxy *proxy = tsrvi_proxy_of(stream);
    if (proxy == NULL || proxy->header == NULL ||
        !tsrvi_proxy_find(proxy->header, proxy->size, proxy->tlvs, type, slice)) {
        slice->data = "";
        slice->size = 0;
        return TSRV_EINVAL;
    }
    return TSRV_OK;
}

TSRV_API int tsrv_local_address(tsrv_stream *stream, tsrv_address *address)
{
    return stream->phase == TSRVI_CLOSED
               ? TSRV_ECLOSED
               : tsrvi_address_get(stream->io.fd, tsrvi_getsockname, address);
}

TSRV_API int tsrv_fd(tsrv_stream *stream)
{
    return stream->io.fd;
}

TSRV_API int tsrv_error(tsrv_stream *stream)
{
    if (stream->end != 0 && stream->end != TSRV_ECLOSED) {
        return stream->end;
    }
    if (stream->in_end != 0 && stream->in_end != TSRV_EOF) {
        return stream->in_end;
    }
    return stream->out_end == TSRV_ECLOSED ? (int)TSRV_OK : stream->out_end;
}

TSRV_API size_t tsrv_unread_size(tsrv_stream *stream)
{
    return tsrvi_buffer_size(stream->in);
}

TSRV_API size_t tsrv_unsent_size(tsrv_stream *stream)
{
    return tsrvi_size(stream->unsent);
}

TSRV_API tsrv_server *tsrv_stream_server(tsrv_stream *stream)
{
    return stream->server == tsrvi_loop_of(stream)->servers.clients ? NULL : stream->server;
}

TSRV_API bool tsrv_stopping(tsrv_stream *stream)
{
    return tsrvi_is(stream, TSRVI_DRAINING);
}

TSRV_API tsrv_loop *tsrv_stream_loop(tsrv_stream *stream)
{
    return tsrvi_loop_of(stream);
}
/* ============================================================================
 * >>tls_stream  TLS, as a program asks for it
 * ==========================================================================*/

TSRV_API int tsrv_start_tls(tsrv_stream *stream, tsrv_tls *tls, const char *server_name)
{
    int rc = tsrvi_write_state(stream);
    rc = rc < 0 ? rc : tsrvi_stream_in_end(stream);
    if (rc < 0) {
        return rc;
    }
#if !TSRVI_HAS_TLS
    if (tls == NULL) {
        return tsrvi_tls_absent(); /* tsrv_tls_new could give none */
    }
#endif
    if (stream->session != NULL || tls == NULL || (server_name == NULL && !tsrvi_tls_serves(tls))) {
        return tsrvi_mistake(__func__, stream->session != NULL ? "TLS has begun already"
                                       : tls == NULL           ? "tls is NULL"
                                                               : "tls has no cert_file");
    }
    if (((stream->kinds | stream->own.kinds) & (TSRVI_FOR_READ | TSRVI_FOR_LENT)) != 0) {
        return TSRV_EBUSY;
    }
    if (tsrvi_buffer_size(stream->in) != 0 ||
        ((stream->own.facts & TSRVI_PARTLY) != 0 && stream->own.u.partial->done != 0)) {
        tsrvi_tls_log(stream, "plaintext came behind the command that starts TLS, as in a STARTTLS "
                              "injection: refused");
        return tsrvi_stream_limited(stream, TSRV_ETLS, NULL, 0); /* it need not be said again */
    }
    if ((rc = tsrvi_tls_begin(stream, tls, server_name)) < 0) {
        return rc;
    }
    stream->fresh_ms = tsrvi_loop_of(stream)->now_ms; /* a drain gives the peer time to begin */
    tsrvi_clear(stream, TSRVI_LOOKED | TSRVI_SILENT); /* what has come already is the handshake's */
    tsrvi_stream_soon(stream);
    if (server_name != NULL) {
        tsrvi_stream_shake(stream); /* the client speaks first */
    }
    return TSRV_OK;
}

TSRV_API int tsrv_wait_for_handshake(tsrv_stream *stream)
{
    int rc = stream->end;
    if (rc == TSRV_OK && stream->session == NULL) {
        return TSRV_EINVAL;
    }
    if (rc == TSRV_OK && tsrvi_is(stream, TSRVI_SHAKING)) {
        if ((rc = tsrvi_write_broken(stream)) < 0) {
            return rc; /* nothing more can be said to the peer */
        }
        rc = tsrvi_stream_wait_for(stream, TSRVI_FOR_SECURE);
    }
    return rc < 0                       ? rc
           : stream->end != 0           ? stream->end
           : tsrvi_tls_is_ready(stream) ? (int)TSRV_OK
                                        : stream->in_end;
}

#if TSRVI_HAS_TLS
TSRV_API const char *tsrv_tls_alpn(tsrv_stream *stream)
{
    tsrvi_tls *tls = tsrvi_tls_of(stream);
    const unsigned char *name = NULL;
    unsigned size = 0;
    if (tls == NULL) {
        return "";
    }
    SSL_get0_alpn_selected(tls->ssl, &name, &size);
    if (size != 0) { /* at most 255 */
        memcpy(tls->alpn, name, size);
    }
    tls->alpn[size] = 0;
    return tls->alpn;
}

TSRV_API const char *tsrv_tls_server_name(tsrv_stream *stream)
{
    tsrvi_tls *tls = tsrvi_tls_of(stream);
    const char *name;
    if (tls == NULL) {
        return "";
    }
    /* OpenSSL's own goes with the next hello, and is another one's in a session that is resumed;
     * but a client's, and that of a native_context, is known to it alone. */
    if (!tls->asked && (name = SSL_get_servername(tls->ssl, TLSEXT_NAMETYPE_host_name)) != NULL) {
        snprintf(tls->server_name, sizeof(tls->server_name), "%s", name);
    }
    return tls->server_name;
}

TSRV_API const char *tsrv_tls_version(tsrv_stream *stream)
{
    return stream->session == NULL || !tsrvi_tls_of(stream)->established
               ? ""
               : SSL_get_version(tsrvi_tls_of(stream)->ssl);
}

TSRV_API void *tsrv_tls_native(tsrv_stream *stream)
{
    return stream->session == NULL ? NULL : tsrvi_tls_of(stream)->ssl;
}

/* The peer's certificate, a reference to which is the caller's; NULL = none yet. */
static X509 *tsrvi_tls_peer(const tsrvi_tls *tls)
{
    return tls == NULL || !tls->established ? NULL : SSL_get_peer_certificate(tls->ssl);
}

TSRV_API int tsrv_tls_peer_certificate(tsrv_stream *stream, tsrv_slice *slice)
{
    tsrvi_tls *tls = tsrvi_tls_of(stream);
    X509 *certificate = tsrvi_tls_peer(tls);
    unsigned char *der = NULL;
    int size;
    slice->data = "";
    slice->size = 0;
    if (certificate == NULL) {
        return TSRV_EINVAL;
    }
    OPENSSL_free(tls->certificate);
    tls->certificate = NULL;
    size = i2d_X509(certificate, &der);
    X509_free(certificate);
    if (size < 0) {
        ERR_clear_error();
        return -ENOMEM;
    }
    tls->certificate = der;
    slice->data = (const char *)der;
    slice->size = (size_t)size;
    return TSRV_OK;
}

/* Copy what fits. */
static int tsrvi_tls_copy_name(const X509_NAME *name, char *buffer, size_t size)
{
    BIO *bio = BIO_new(BIO_s_mem());
    char *text = NULL;
    size_t length, part;
    if (bio == NULL || X509_NAME_print_ex(bio, name, 0, XN_FLAG_RFC2253) < 0) {
        ERR_clear_error();
        BIO_free(bio);
        return -ENOMEM;
    }
    length = (size_t)BIO_get_mem_data(bio, &text);
    part = size == 0 ? 0 : tsrvi_min(length, size - 1);
    if (part != 0) {
        memcpy(buffer, text, part);
    }
    if (size != 0) {
        buffer[part] = 0;
    }
    BIO_free(bio);
    return length < size ? TSRV_OK : TSRV_ETOOLONG;
}

TSRV_API int tsrv_tls_peer_name(tsrv_stream *stream, char *buffer, size_t size)
{
    X509 *certificate = tsrvi_tls_peer(tsrvi_tls_of(stream));
    int rc;
    if (size != 0) {
        buffer[0] = 0;
    }
    if (certificate == NULL) {
        return TSRV_EINVAL;
    }
    rc = tsrvi_tls_copy_name(X509_get_subject_name(certificate), buffer, size);
    X509_free(certificate);
    return rc;
}
#else
TSRV_API const char *tsrv_tls_alpn(tsrv_stream *stream)
{
    (void)stream;
    return "";
}

TSRV_API const char *tsrv_tls_server_name(tsrv_stream *stream)
{
    (void)stream;
    return "";
}

TSRV_API const char *tsrv_tls_version(tsrv_stream *stream)
{
    (void)stream;
    return "";
}

TSRV_API void *tsrv_tls_native(tsrv_stream *stream)
{
    (void)stream;
    return NULL;
}

TSRV_API int tsrv_tls_peer_certificate(tsrv_stream *stream, tsrv_slice *slice)
{
    (void)stream;
    slice->data = "";
    slice->size = 0;
    return TSRV_ENOTSUP;
}

TSRV_API int tsrv_tls_peer_name(tsrv_stream *stream, char *buffer, size_t size)
{
    (void)stream;
    if (size != 0) {
        buffer[0] = 0;
    }
    return TSRV_ENOTSUP;
}
#endif
/* ============================================================================
 * >>handler  The handler: when it is called, and what its return means
 * ==========================================================================*/

/* Ends that are everyday life of a server and not worth a log line. */
static bool tsrvi_code_is_quiet(const tsrv_stream *stream, int code)
{
    return code >= 0 || code == TSRV_EOF || code == TSRV_ECLOSED || code == TSRV_ETIMEOUT ||
           tsrvi_transport_has_told(stream, code) || code == -ECONNRESET || code == -EPIPE ||
           code == -ETIMEDOUT;
}

/* Say how the handler has failed, and which limit it has met if it was one. */
static void tsrvi_stream_log_end(const tsrv_stream *stream, int rc)
{
    const tsrv_loop *loop = tsrvi_loop_of(stream);
    char text[TSRV_ADDRESS_SIZE], limit[96] = "";
    if (loop->streams.limited == stream && loop->streams.limit != NULL &&
        (rc == TSRV_ETOOLONG || rc == TSRV_EFULL)) {
        snprintf(limit, sizeof(limit), ": more than %lu bytes (%s)",
                 (unsigned long)loop->streams.limit_size, loop->streams.limit);
    }
    tsrvi_log_limited(TSRVI_LOG_HANDLER, TSRV_LOG_ERROR, "handle_stream for %s: %s%s",
                      tsrvi_peer_format(&stream->peer, text, sizeof(text)), tsrv_strerror(rc),
                      limit);
}

/* The handler is done for good. */
static void tsrvi_stream_over(tsrv_stream *stream, int rc)
{
    if (!tsrvi_code_is_quiet(stream, rc)) {
        tsrvi_stream_log_end(stream, rc);
    }
    if (stream->state != TSRVI_RUNNING) {
        tsrvi_wait_remove(stream, &stream->own);
    }
    tsrvi_partial_free(stream);
    stream->own.kinds = 0;
    tsrvi_own_finish(stream, TSRVI_IN_READ | TSRVI_IN_WAKE);
    stream->own.u.result = rc;
    stream->state = TSRVI_OVER;
    tsrvi_stream_close(stream);
}

/* How the stream has ended for a handler that waits for more input; 0 = it has not. After a reset
 * no more is received into a buffer that is full. */
static int tsrvi_stream_ended(const tsrv_stream *stream)
{
    if (stream->end != 0) {
        return stream->end;
    }
    if (tsrvi_stream_in_end(stream) == 0 && stream->out_end != TSRV_ECLOSED &&
        tsrvi_buffer_size(stream->in) >= stream->server->options.max_buffer_size) {
        return stream->out_end;
    }
    return tsrvi_stream_in_end(stream);
}

/* The handler returned TSRV_EAGAIN, and no call of its own has: what will call it again?
 * TSRV_EAGAIN = something will; else what it counts as. */
static TSRVI_APART int tsrvi_stream_choose(tsrv_stream *stream)
{
    int ended = tsrvi_stream_ended(stream);
    if (stream->end == 0 && (stream->own.progress & TSRVI_CONSUMED) != 0 &&
        tsrvi_buffer_size(stream->in) != 0) {
        stream->own.kinds = TSRVI_FOR_TURN;
    } else if (ended == 0) {
        stream->own.kinds = TSRVI_FOR_INPUT;
        *tsrvi_own_need(stream) = tsrvi_buffer_size(stream->in) + 1;
    } else if ((stream->own.facts & TSRVI_TOLD) == 0) {
        stream->own.kinds = TSRVI_FOR_TURN;
    } else {
        return ended;
    }
    return TSRV_EAGAIN;
}

/* It is kept, for what it waits for. */
static inline TSRVI_INLINE void tsrvi_stream_keep(tsrv_stream *stream)
{
    int kinds = stream->own.kinds;
    stream->state = TSRVI_WAITING;
    tsrvi_own_finish(stream, (TSRVI_IN_READ | TSRVI_IN_WAKE) & ~kinds); /* which it has given up */
    tsrvi_wait_add(stream, &stream->own);
    tsrvi_stream_soon(stream); /* it may have been resumed by something else than the stream */
    if (TSRVI_UNLIKELY((kinds & TSRVI_FOR_WAKE) != 0) && tsrvi_is(stream, TSRVI_WOKEN)) {
        tsrvi_clear(stream, TSRVI_WOKEN);
        stream->own.woken = true; /* by itself, behind its tsrv_wait */
    }
    tsrvi_input_release(stream);
}

static inline TSRVI_INLINE void tsrvi_stream_returned(tsrv_stream *stream, int rc)
{
    if (TSRVI_UNLIKELY(stream->own.kinds == 0) && rc == TSRV_EAGAIN) {
        rc = tsrvi_stream_choose(stream);
    }
    if (TSRVI_LIKELY(rc == TSRV_EAGAIN)) {
        tsrvi_stream_keep(stream);
    } else {
        tsrvi_input_release(stream);
        tsrvi_stream_over(stream, rc);
    }
}

/* ---- how long user code took: see >>slow -----------------------------------*/

static TSRVI_APART void tsrvi_stream_took_long(const tsrv_stream *stream, uint64_t ticks,
                                               const char *what)
{
    char text[TSRV_ADDRESS_SIZE];
    tsrvi_slow_note(tsrvi_loop_of(stream), ticks, what,
                    tsrvi_peer_format(&stream->peer, text, sizeof(text)));
}

/* A function of the program's has been called for the stream. */
static inline TSRVI_INLINE void tsrvi_stream_took(const tsrv_stream *stream, tsrv_loop *loop,
                                                  const char *what)
{
    uint64_t ticks = tsrvi_slow_piece(loop);
    if (TSRVI_UNLIKELY(ticks != 0)) {
        tsrvi_stream_took_long(stream, ticks, what);
    }
}

/* ---- calls -----------------------------------------------------------------*/

/* What a handler's coroutine runs. */
static void tsrvi_stream_main(void *context)
{
    tsrv_stream *stream = (tsrv_stream *)context;
    tsrv_address address;
    int rc;
    tsrvi_peer_load(&stream->peer, &address);
    rc = stream->handler(stream, &address, stream->server->options.context);
    tsrvi_stream_returned(stream, rc);
}

/* Is that what a coroutine runs? Then say for whom. */
static bool tsrvi_stream_describe(tsrv_callback function, void *context, char *text, size_t size)
{
    if (function != tsrvi_stream_main) {
        return false;
    }
    tsrvi_peer_format(&((const tsrv_stream *)context)->peer, text, size);
    return true;
}

/* In callback mode it is a call. */
static inline TSRVI_INLINE void tsrvi_stream_call_back(tsrv_stream *stream)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    int rc;
    if (loop->streams.addressed != stream) {
        tsrvi_peer_load(&stream->peer, &loop->streams.address);
        loop->streams.addressed = stream;
    }
    loop->streams.handling = stream;
    loop->budget = TSRVI_BUDGET;
    loop->written = 0;
    loop->plain = tsrvi_read_is_free(stream) && tsrvi_own_is_free(stream) ? stream : NULL;
    rc = stream->handler(stream, &loop->streams.address, stream->server->options.context);
    loop->streams.handling = NULL;
    loop->plain = NULL;
#ifdef TSRV_DEBUG
    tsrvi_debug_returned(stream, rc);
#endif
    tsrvi_stream_took(stream, loop, "handle_stream for ");
    tsrvi_stream_returned(stream, rc);
}

/* Call the handler, which waits no more; from the loop only. Returns TSRV_OK, or why that was not
 * possible: then the stream has ended. */
static inline TSRVI_INLINE int tsrvi_stream_call(tsrv_stream *stream)
{
    const tsrv_server_options *options = &stream->server->options;
    int rc;
#ifdef TSRV_DEBUG
    tsrvi_debug_call(stream);
#endif
    tsrvi_wait_remove(stream, &stream->own);
    stream->state = TSRVI_RUNNING;
    tsrvi_own_clear(stream, TSRVI_PAYS);
    tsrvi_own_finish(stream, TSRVI_CONSUMED);
    if (TSRVI_UNLIKELY(stream->own.woken)) {
        stream->own.woken = false;
        tsrvi_set(stream, TSRVI_WOKEN); /* for the tsrv_wait that is repeated now */
    }
    if (TSRVI_UNLIKELY(tsrvi_is(stream, TSRVI_ENDED | TSRVI_FEIGNED))) {
        if (tsrvi_stream_is_unknown(stream)) {
            tsrvi_stream_over(stream, TSRV_ECLOSED); /* it has ended before its PROXY header came */
            return TSRV_OK;
        }
        if (tsrvi_stream_ended(stream) != 0) {
            tsrvi_own_set(stream, TSRVI_TOLD);
        }
    }
    if (options->mode == TSRV_COROUTINE) {
        rc = tsrvi_co_new(tsrvi_loop_of(stream), options->stack_size, tsrvi_stream_main, stream,
                          &stream->own.u.co);
        if (rc < 0) {
            tsrvi_stream_kill(stream, rc);
            tsrvi_stream_over(stream, TSRV_ECLOSED); /* which is not logged for every one of them */
            return rc;
        }
    }
    tsrvi_own_set(stream, TSRVI_ENTERED);
    if (options->mode == TSRV_COROUTINE) {
        tsrvi_co_resume(stream->own.u.co);
    } else {
        tsrvi_stream_call_back(stream);
    }
    return TSRV_OK;
}

/* Count an end under its reason. */
static void tsrvi_stream_count_end(tsrv_stats *stats, int reason)
{
    if (reason >= 0 || reason == TSRV_EOF) {
        stats->ended_well++;
    } else if (reason == -ECONNRESET || reason == -EPIPE) {
        stats->ended_reset++;
    } else if (reason == TSRV_ETIMEOUT) {
        stats->ended_timeout++;
    } else if (reason == TSRV_ECLOSED) {
        stats->ended_here++;
    } else {
        stats->ended_error++;
    }
}

/* The stream's descriptor is closed, its handler has returned, and nobody waits: tell on_close, and
 * free it. */
static void tsrvi_stream_finish(tsrv_stream *stream)
{
    tsrv_server *server = stream->server;
    tsrv_loop *loop = server->loop;
    int reason = tsrv_error(stream) != TSRV_OK ? tsrv_error(stream) : stream->own.u.result;
    tsrvi_stream_count_end(server->stats, reason);
    tsrvi_heap_remove(&loop->heap, &stream->timer);
    loop->heap.reserved--;
    loop->active--;
    if (stream->in != NULL) {
        tsrvi_input_drop(stream);
    }
    if ((stream->own.facts & TSRVI_ENTERED) != 0 && server->options.on_close != NULL) {
        loop->streams.parting = stream;
        server->options.on_close(stream, reason, server->options.context);
        loop->streams.parting = NULL;
        tsrvi_stream_took(stream, loop, "on_close for ");
    }
    loop->streams.limited = loop->streams.limited == stream ? NULL : loop->streams.limited;
    loop->streams.addressed = loop->streams.addressed == stream ? NULL : loop->streams.addressed;
    server->drained += server->draining && !server->forced;
    tsrvi_peer_free(&stream->peer);
    tsrvi_transport_of(stream)->free(stream);
    tsrvi_proxy_free(stream);
    tsrvi_list_remove(&stream->link);
    TSRV_FREE(stream);
    if (tsrvi_list_empty(&server->streams) && (server->freed || server->draining)) {
        tsrvi_server_later(server);
    }
}

/* ============================================================================
 * >>settle  What follows from facts
 * ==========================================================================*/

/* ---- when is a wait over? --------------------------------------------------*/

/* Can a read get further that needs so many unread bytes? */
static inline TSRVI_INLINE bool tsrvi_read_is_over(const tsrv_stream *stream, size_t need)
{
    return tsrvi_buffer_size(stream->in) >= need || stream->in_end != 0 ||
           tsrvi_is(stream, TSRVI_FEIGNED);
}

static inline TSRVI_INLINE bool tsrvi_own_is_over(const tsrv_stream *stream)
{
    const tsrvi_wait *own = &stream->own;
    if ((own->kinds & TSRVI_FOR_READ) != 0 &&
        tsrvi_read_is_over(stream, tsrvi_own_read_need(stream)) &&
        !tsrvi_stream_above_mark(stream)) {
        return true;
    }
    if ((own->kinds & TSRVI_FOR_INPUT) == 0) {
        return false;
    }
    return tsrvi_buffer_size(stream->in) >=
               ((own->facts & TSRVI_PARTLY) != 0 ? own->u.partial->need : own->u.need) ||
           tsrvi_stream_ended(stream) != 0;
}

static bool tsrvi_lending_is_over(const tsrvi_wait *wait)
{
    const tsrvi_buffer *last = tsrvi_lending_last(TSRVI_CONTAINER(wait, tsrvi_lending, wait));
    return last->kind == TSRVI_DROPPED || last->begin == last->end;
}

/* By its facts; its time may be over, too. */
static inline TSRVI_INLINE bool tsrvi_wait_is_over(const tsrv_stream *stream,
                                                   const tsrvi_wait *wait)
{
    int kinds = wait->kinds;
    if (TSRVI_LIKELY(kinds == TSRVI_FOR_READ)) {
        return stream->end != 0 ||
               (wait == &stream->own
                    ? tsrvi_own_is_over(stream)
                    : tsrvi_read_is_over(stream, TSRVI_CONTAINER(wait, tsrvi_read, wait)->need));
    }
    return (stream->end != 0 && kinds != TSRVI_FOR_WAKE) ||
           ((kinds & TSRVI_FOR_OUTPUT) != 0 && tsrvi_stream_output_failed(stream)) ||
           (kinds & TSRVI_FOR_TURN) != 0 ||
           ((kinds & TSRVI_FOR_WAKE) != 0 && (wait->woken || tsrvi_stream_finished(stream))) ||
           ((kinds & TSRVI_FOR_ROOM) != 0 && !tsrvi_stream_above_mark(stream)) ||
           ((kinds & TSRVI_FOR_SENT) != 0 && stream->unsent == 0) ||
           ((kinds & TSRVI_FOR_LENT) != 0 && tsrvi_lending_is_over(wait)) ||
           ((kinds & TSRVI_FOR_SECURE) != 0 && !tsrvi_is(stream, TSRVI_SHAKING)) ||
           (wait == &stream->own && tsrvi_own_is_over(stream));
}

/* When its time is over; 0 = never. */
static uint32_t tsrvi_wait_due(const tsrv_stream *stream, const tsrvi_wait *wait)
{
    uint32_t due_ms = 0;
    if ((wait->kinds & TSRVI_FOR_READ) != 0) {
        due_ms = tsrvi_read_limit(stream, wait->due_ms);
    }
    if ((wait->kinds & TSRVI_FOR_WAKE) != 0) {
        due_ms =
            tsrvi_ms_earlier(due_ms, wait == &stream->own ? stream->wake_due_ms : wait->due_ms);
    }
    if ((wait->kinds & (TSRVI_FOR_WAKE | TSRVI_FOR_SENT | TSRVI_FOR_SECURE)) != 0) {
        due_ms = tsrvi_ms_earlier(due_ms, stream->deadline_ms);
    }
    return due_ms;
}

static TSRVI_APART bool tsrvi_wait_is_late(const tsrv_stream *stream, const tsrvi_wait *wait)
{
    return tsrvi_ms_is_past(tsrvi_loop_of(stream), tsrvi_wait_due(stream, wait));
}

/* What the call of a coroutine, other than a read, returns when its wait is over; TSRV_EAGAIN = it
 * waits on. */
static int tsrvi_wait_result(tsrv_stream *stream, tsrvi_wait *wait)
{
    switch (wait->kinds) {
    case TSRVI_FOR_WAKE:
        return wait->woken || tsrvi_stream_finished(stream) ? TSRV_OK : TSRV_EAGAIN;
    case TSRVI_FOR_TURN: /* how the output has ended is no news for who only lets others run */
        return stream->end;
    case TSRVI_FOR_SENT: /* TSRV_OK stays so if the stream is closed before this turn comes */
        if (stream->unsent == 0 && !tsrvi_is(stream, TSRVI_LOST)) {
            return TSRV_OK;
        }
        break;
    case TSRVI_FOR_LENT:
        if (tsrvi_lending_last(TSRVI_CONTAINER(wait, tsrvi_lending, wait))->kind == TSRVI_LENT &&
            tsrvi_lending_is_over(wait)) {
            return TSRV_OK;
        }
        break;
    default:
        break;
    }
    return tsrvi_write_broken(stream) != TSRV_OK ? tsrvi_write_broken(stream)
           : tsrvi_wait_is_over(stream, wait)    ? (int)TSRV_OK
                                                 : (int)TSRV_EAGAIN;
}

/* End a coroutine's wait, if it is over, and resume it. Returns whether it was. */
static inline TSRVI_INLINE bool tsrvi_wait_end(tsrv_stream *stream, tsrvi_wait *wait)
{
    tsrvi_co *co = wait->u.co;
    int rc;
    if (TSRVI_UNLIKELY(!co->waiting)) {
        return false; /* its loop is being freed, or a drain is over: it runs soon */
    }
    rc = TSRVI_LIKELY(wait->kinds == TSRVI_FOR_READ)
             ? tsrvi_read_attempt(stream, TSRVI_CONTAINER(wait, tsrvi_read, wait))
             : tsrvi_wait_result(stream, wait);
    if (TSRVI_UNLIKELY(rc == TSRV_EAGAIN)) {
        if (!tsrvi_wait_is_late(stream, wait)) {
            return false;
        }
        rc = TSRV_ETIMEOUT;
    }
    if (rc == TSRV_OK && stream->kinds == TSRVI_FOR_READ && !tsrvi_is(stream, TSRVI_HINDERS) &&
        !tsrvi_deadline_is_past(stream) && tsrvi_server_allows_near(stream->server)) {
        tsrvi_loop_of(stream)->plain = stream; /* there is no other wait */
    }
    tsrvi_wait_remove(stream, wait);
    if (TSRVI_LIKELY(co->waiting)) {
        tsrvi_co_go_on(co, rc);
    } else {
        tsrvi_loop_of(stream)->plain = NULL; /* a match has ended it */
    }
    return true;
}

/* The same of the handler's wait, and call it. */
static inline TSRVI_INLINE bool tsrvi_own_end(tsrv_stream *stream)
{
    if (!tsrvi_wait_is_over(stream, &stream->own) && !tsrvi_wait_is_late(stream, &stream->own)) {
        return false;
    }
    tsrvi_stream_call(stream);
    return true;
}

/* The same for where it need not be quick. */
static TSRVI_APART bool tsrvi_own_try(tsrv_stream *stream)
{
    return tsrvi_own_end(stream);
}

/* The same of any, if it may end now. Those for a turn, and those that a call has woken, end in a
 * new one. */
static inline TSRVI_INLINE bool tsrvi_wait_try(tsrv_stream *stream, tsrvi_wait *wait, bool turn)
{
    if (!turn && ((wait->kinds & TSRVI_FOR_TURN) != 0 || wait->woken)) {
        return false;
    }
    return wait == &stream->own ? tsrvi_own_try(stream) : tsrvi_wait_end(stream, wait);
}

/* End the waits that are over, the oldest first, and the handler's last: it sees what the others
 * have done. Waits that begin meanwhile are left for later. Returns whether there were any. */
static inline TSRVI_INLINE bool tsrvi_stream_resume(tsrv_stream *stream, bool turn)
{
    tsrvi_wait **link = &stream->waits, *last = stream->waits, *wait;
    bool any = false;
    if (TSRVI_LIKELY(last->next == NULL)) {
        return tsrvi_wait_try(stream, last, turn);
    }
    while (last->next != NULL) {
        last = last->next;
    }
    do {
        wait = *link;
        if (wait != &stream->own && tsrvi_wait_try(stream, wait, turn)) {
            any = true;
        } else {
            link = &wait->next;
        }
    } while (wait != last);
    if (stream->state == TSRVI_NEW || stream->state == TSRVI_WAITING) {
        any = tsrvi_wait_try(stream, &stream->own, turn) || any;
    }
    return any;
}

/* ---- drain -----------------------------------------------------------------*/

/* Is somebody waiting in a read of which nothing has arrived, with nothing unread and nothing
 * unsent? Not idle is a peer that sent something, or was accepted, within the last second: more of
 * its message, or the next request of a busy client, may be on its way. */
static bool tsrvi_stream_is_idle(const tsrv_stream *stream)
{
    return (stream->kinds & (TSRVI_FOR_READ | TSRVI_FOR_INPUT)) != 0 &&
           !tsrvi_is(stream, TSRVI_PARTIAL | TSRVI_SHAKING | TSRVI_FEIGNED) &&
           tsrvi_buffer_size(stream->in) == 0 && stream->unsent == 0 &&
           !tsrvi_transport_holds(stream) && stream->phase < TSRVI_CLOSING &&
           (stream->end | stream->in_end) == 0 &&
           tsrvi_loop_of(stream)->now_ms - stream->fresh_ms >= TSRVI_FRESH_MS;
}

/* Does it wait in vain for a header or a handshake to begin, as with a health check? */
static bool tsrvi_stream_is_mute(tsrv_stream *stream)
{
    return tsrvi_is(stream, TSRVI_SHAKING) && stream->end == 0 &&
           tsrvi_loop_of(stream)->now_ms - stream->fresh_ms >= TSRVI_FRESH_MS &&
           tsrvi_transport_of(stream)->is_empty(stream) && tsrvi_plain_peek(stream) == TSRV_EAGAIN;
}

/* The server is being drained: an idle stream reads TSRV_EOF. */
static TSRVI_APART void tsrvi_stream_drain(tsrv_stream *stream)
{
    int rc;
    if (tsrvi_stream_is_mute(stream)) {
        tsrvi_stream_kill(stream, TSRV_ECLOSED);
        return;
    }
    if (!tsrvi_stream_is_idle(stream)) {
        return;
    }
    rc = tsrvi_transport_of(stream)->peek(stream);
    if (rc == TSRV_EAGAIN && tsrvi_transport_of(stream)->is_empty(stream)) {
        tsrvi_set(stream, TSRVI_FEIGNED);
    } else if (rc != TSRV_OK && rc != TSRV_EAGAIN && rc != TSRV_EOF) {
        tsrvi_stream_end_input(stream, rc); /* the kernel tells an error once */
    }                                       /* else an event will tell the handler */
    tsrvi_stream_soon(stream);
}

/* ---- memory ----------------------------------------------------------------
 *
 * When the streams of a loop have more than max_total_buffer, memory is tight, until they have a
 * quarter less. Then nothing is received for a stream that has no input yet, so that what others
 * have begun is used up; a callback-mode handler waits in its next read until all that it has
 * written is sent; and a coroutine's write is not copied: it waits for the kernel to take it. */

/* Is it, after what has changed? When it is no more, all streams look again. */
static TSRVI_APART void tsrvi_loop_weigh(tsrv_loop *loop)
{
    tsrvi_pool *pool = &loop->streams.pool;
    size_t most = loop->streams.most;
    bool was_tight = pool->tight;
    pool->tight = tsrvi_loop_buffered(loop) > (was_tight ? most - most / 4 : most);
    if (!was_tight && pool->tight) {
        tsrvi_log_limited(TSRVI_LOG_TIGHT, TSRV_LOG_WARNING,
                          "the streams hold more than max_total_buffer (%llu bytes): new input "
                          "waits until they hold less",
                          (unsigned long long)most);
    }
    if (!was_tight || pool->tight) {
        return;
    }
    TSRVI_EACH(tsrv_server, server, &loop->servers.all, link) {
        TSRVI_EACH(tsrv_stream, stream, &server->streams, link) {
            tsrvi_stream_later(stream);
        }
    }
}

/* ---- settling --------------------------------------------------------------*/

/* Does anybody want input, or wait for its end, with nothing before that as far as is known? */
static inline TSRVI_INLINE bool tsrvi_stream_listens(const tsrv_stream *stream)
{
    return tsrvi_stream_wants_input(stream) ||
           ((stream->kinds & (TSRVI_FOR_READ | TSRVI_FOR_INPUT | TSRVI_FOR_WAKE)) != 0 &&
            stream->in_end == 0 && !tsrvi_is(stream, TSRVI_LOOKED) &&
            tsrvi_buffer_size(stream->in) == 0);
}

/* Have the backend wait for what the stream waits for. Writability is ended at once, since it would
 * be reported in every turn; readability stays asked for until it is known that there is input
 * which nobody wants. A hang-up alone is asked for to hear of resets. */
static inline TSRVI_INLINE void tsrvi_stream_agree(tsrv_stream *stream)
{
    int wanted = TSRVI_HANGUP, has = stream->io.interest, rc;
    if (TSRVI_UNLIKELY(stream->phase == TSRVI_CLOSED)) {
        return;
    }
    if (tsrvi_stream_listens(stream) ||
        ((has & TSRV_READABLE) != 0 && stream->in_end == 0 && !tsrvi_is(stream, TSRVI_LOOKED))) {
        wanted |= TSRV_READABLE;
    }
    if (TSRVI_UNLIKELY(tsrvi_is(stream, TSRVI_BLOCKED))) {
        wanted |= TSRV_WRITABLE;
    }
    if (TSRVI_LIKELY(wanted == has) || (wanted == TSRVI_HANGUP && has == 0)) {
        return;
    }
    rc = tsrvi_transport_of(stream)->watch(stream, wanted);
    if (rc < 0) {
        tsrvi_stream_kill(stream, rc);
    }
}

/* Is there something for the next turn? */
static inline TSRVI_INLINE bool tsrvi_stream_is_due(const tsrv_stream *stream)
{
    if (TSRVI_UNLIKELY(stream->unsent != 0) && !tsrvi_is(stream, TSRVI_BLOCKED | TSRVI_SHAKING)) {
        return true;
    }
    if (TSRVI_UNLIKELY(tsrvi_stream_finished(stream)) ||
        (tsrvi_transport_holds(stream) && tsrvi_stream_listens(stream))) {
        return true;
    }
    for (const tsrvi_wait *wait = stream->waits; wait != NULL; wait = wait->next) {
        if (tsrvi_wait_is_over(stream, wait)) {
            return true;
        }
    }
    return false;
}

/* Will the timer fire by then? */
static inline TSRVI_INLINE bool tsrvi_stream_is_armed(const tsrv_stream *stream, uint32_t due_ms)
{
    uint32_t armed_ms = (uint32_t)(stream->timer.due / TSRVI_MS);
    return stream->timer.position != 0 && (int32_t)(armed_ms - due_ms) <= 0;
}

/* The same for a read that begins now? Then so it will for those that begin later, whose limits are
 * later. */
static bool tsrvi_stream_is_armed_for_reads(const tsrv_stream *stream)
{
    const tsrv_loop *loop = tsrvi_loop_of(stream);
    int idle_ms = tsrvi_ms_most(stream->server->options.idle_timeout_ms);
    uint32_t due_ms = tsrvi_ms_earlier(stream->deadline_ms, tsrvi_ms_from(loop, idle_ms));
    due_ms = tsrvi_ms_earlier(due_ms, tsrvi_ms_from(loop, stream->read_ms));
    return due_ms == 0 || tsrvi_stream_is_armed(stream, due_ms);
}

/* Have the timer fire at the earliest of the stream's times, lazily: one that fires too early looks
 * again. A wait whose time is past ends in the next turn, so that a loop around it stops nobody. */
static inline TSRVI_INLINE void tsrvi_stream_arm(tsrv_stream *stream)
{
    tsrv_loop *loop = tsrvi_loop_of(stream);
    uint32_t due_ms = 0;
    for (const tsrvi_wait *wait = stream->waits; wait != NULL; wait = wait->next) {
        due_ms = tsrvi_ms_earlier(due_ms, tsrvi_wait_due(stream, wait));
    }
    if (tsrvi_ms_is_past(loop, due_ms)) {
        tsrvi_stream_later(stream);
        due_ms = 0;
    }
    if (stream->phase == TSRVI_LINGER || tsrvi_is(stream, TSRVI_BLOCKED | TSRVI_SHAKING)) {
        due_ms = tsrvi_ms_earlier(due_ms, tsrvi_stream_blocked_due(stream));
    }
    if (due_ms != 0 && !tsrvi_stream_is_armed(stream, due_ms)) {
        tsrvi_heap_set(&loop->heap, &stream->timer, tsrvi_ms_due(loop, due_ms));
    }
    if (tsrvi_is(stream, TSRVI_UNARMED) && tsrvi_stream_is_armed_for_reads(stream)) {
        tsrvi_clear(stream, TSRVI_UNARMED);
    }
}

#ifdef TSRV_DEBUG
/* What must hold of a stream whenever it has been settled. */
static void tsrvi_stream_verify(const tsrv_stream *stream)
{
    uint64_t queued = 0;
    uint32_t read_due_ms = 0;
    uint8_t kinds = 0;
    for (const tsrvi_buffer *buffer = stream->out; buffer != NULL; buffer = buffer->next) {
        TSRV_ASSERT(buffer->begin < buffer->end && buffer->kind != TSRVI_DROPPED);
        TSRV_ASSERT(buffer->next != NULL || stream->out->last == buffer);
        TSRV_ASSERT(buffer->room <= buffer->capacity - buffer->end || buffer->kind != TSRVI_OWNED);
        queued += tsrvi_buffer_size(buffer);
    }
    for (const tsrvi_wait *wait = stream->waits; wait != NULL; wait = wait->next) {
        TSRV_ASSERT(wait->kinds != 0);
        TSRV_ASSERT(wait == &stream->own || (wait->kinds & (wait->kinds - 1)) == 0);
        TSRV_ASSERT((wait->kinds & kinds & TSRVI_FOR_READ) == 0); /* one read at a time */
        if ((wait->kinds & TSRVI_FOR_READ) != 0) {
            read_due_ms = tsrvi_read_limit(stream, wait->due_ms);
        }
        kinds = (uint8_t)(kinds | wait->kinds);
    }
    TSRV_ASSERT(queued <= stream->unsent && (stream->session != NULL || queued == stream->unsent));
    (void)queued, (void)read_due_ms; /* with NDEBUG */
    TSRV_ASSERT(kinds == stream->kinds);
    TSRV_ASSERT(tsrvi_is(stream, TSRVI_ENDED) ==
                ((stream->end | stream->in_end | stream->out_end) != 0));
    TSRV_ASSERT(tsrvi_is(stream, TSRVI_SESSION) == (stream->session != NULL));
    TSRV_ASSERT(stream->phase != TSRVI_CLOSED || stream->io.fd < 0);
    TSRV_ASSERT(stream->phase != TSRVI_CLOSED ||
                (stream->unsent == 0 && stream->end != 0 && stream->io.interest == 0));
    TSRV_ASSERT(stream->phase < TSRVI_CLOSING || stream->end != 0);
    TSRV_ASSERT(stream->phase != TSRVI_SHUTTING || stream->out_end != 0);
    TSRV_ASSERT((stream->phase != TSRVI_SHUT && stream->phase != TSRVI_LINGER) ||
                (tsrvi_is(stream, TSRVI_FIN) && stream->unsent == 0));
    TSRV_ASSERT(!tsrvi_is(stream, TSRVI_BLOCKED) || stream->unsent != 0);
    TSRV_ASSERT(!tsrvi_is(stream, TSRVI_SHAKING) ||
                (stream->session != NULL && stream->in_end == 0 && stream->phase < TSRVI_LINGER));
    TSRV_ASSERT(!tsrvi_is(stream, TSRVI_FEIGNED) ||
                (tsrvi_is(stream, TSRVI_DRAINING) && stream->in_end == 0));
    TSRV_ASSERT((stream->state == TSRVI_NEW || stream->state == TSRVI_WAITING) ==
                (stream->own.kinds != 0 && stream->state != TSRVI_RUNNING));
    TSRV_ASSERT(stream->state != TSRVI_OVER || stream->phase >= TSRVI_CLOSING);
    TSRV_ASSERT(!tsrvi_is_timed(stream) || tsrvi_is(stream, TSRVI_UNARMED) || read_due_ms == 0 ||
                tsrvi_stream_is_armed(stream, read_due_ms) ||
                tsrvi_stream_is_armed(stream, tsrvi_loop_of(stream)->now_ms) ||
                stream->queued == TSRVI_IN_READY);
    TSRV_ASSERT(stream->queued != TSRVI_IN_SETTLE && stream->queued != TSRVI_IN_SOON);
    TSRV_ASSERT(stream->unsent == 0 || stream->queued != TSRVI_NOWHERE ||
                tsrvi_is(stream, TSRVI_BLOCKED | TSRVI_SHAKING));
    TSRV_ASSERT(!tsrvi_stream_finished(stream) || stream->queued == TSRVI_IN_READY);
}
#else
static void tsrvi_stream_verify(const tsrv_stream *stream)
{
    (void)stream;
}
#endif

/* Does it wait in one read, and for nothing else, with no fact that asks for a further look? */
static inline TSRVI_INLINE bool tsrvi_stream_only_reads(const tsrv_stream *stream, int queued)
{
    return (tsrvi_stream_status(stream) & tsrvi_status(UINT8_MAX, UINT8_MAX, TSRVI_ODD)) ==
           tsrvi_status(queued, TSRVI_FOR_READ, 0);
}

/* If all is sent, is there nothing more to see to? It waits for input, as before, mostly. */
static inline TSRVI_INLINE bool tsrvi_stream_rests(const tsrv_stream *stream)
{
    return stream->in == NULL && tsrvi_stream_only_reads(stream, TSRVI_IN_SETTLE) &&
           stream->io.interest == (TSRV_READABLE | TSRVI_HANGUP);
}

/* The interest of the backend, the time, and what is left for the next turn. */
static TSRVI_APART void tsrvi_stream_rest(tsrv_stream *stream)
{
    if (tsrvi_is(stream, TSRVI_DRAINING)) {
        tsrvi_stream_drain(stream);
    }
    if (stream->end != 0 && stream->in != NULL && !tsrvi_buffer_is_held(stream->in)) {
        tsrvi_input_drop(stream);
    }
    if (TSRVI_UNLIKELY(tsrvi_loop_of(stream)->streams.most != SIZE_MAX)) {
        tsrvi_loop_weigh(tsrvi_loop_of(stream));
    }
    tsrvi_stream_agree(stream);
    if (stream->queued == TSRVI_IN_SETTLE) {
        stream->queued = TSRVI_NOWHERE;
    }
    tsrvi_stream_arm(stream);
    if (tsrvi_stream_is_due(stream)) {
        tsrvi_stream_later(stream);
    }
    tsrvi_stream_verify(stream);
}

/* The waits that may be over have been looked at: see to what follows. */
static inline TSRVI_INLINE void tsrvi_stream_settled(tsrv_stream *stream, bool resumed)
{
    bool sent = resumed ? tsrvi_stream_flush(stream) : stream->unsent == 0;
    if (TSRVI_LIKELY(sent && tsrvi_stream_rests(stream))) {
        stream->queued = TSRVI_NOWHERE;
        tsrvi_stream_verify(stream);
    } else {
        tsrvi_stream_advance(stream);
        tsrvi_stream_rest(stream);
    }
}

/* Bring a stream to rest after facts have been set.
 *   resumes  waits that are over end now, else in the next turn
 *   turn     see tsrvi_stream_resume */
static TSRVI_APART void tsrvi_stream_settle(tsrv_stream *stream, bool resumes, bool turn)
{
    bool resumed;
    if (tsrvi_is(stream, TSRVI_BORROWED)) {
        tsrvi_clear(stream, TSRVI_BORROWED);
        tsrvi_input_release(stream);
    }
    tsrvi_stream_send_on(stream);
    resumed = resumes && stream->waits != NULL && tsrvi_stream_resume(stream, turn);
    if (TSRVI_UNLIKELY(tsrvi_loop_of(stream)->streams.pool.tight)) {
        tsrvi_stream_send_on(stream);
        tsrvi_stream_rest(stream); /* the quick way would leave it waiting for input */
    } else {
        tsrvi_stream_settled(stream, resumed);
    }
}

/* ============================================================================
 * >>event  What happens to a stream: events, time, turns; a new one
 * ==========================================================================*/

/* Receive straight into the memory that a read has brought. Returns what it has by then. */
static TSRVI_APART size_t tsrvi_stream_feed_memory(tsrv_stream *stream, char *into, size_t size,
                                                   size_t done)
{
    size_t got = done == size ? 0 : tsrvi_stream_receive_into(stream, into + done, size - done);
    if (got != 0) {
        tsrvi_set(stream, TSRVI_PARTIAL);
    }
    return done + got;
}

/* Receive for who waits for input: into the buffer, or straight into the memory that the read has
 * brought. */
static inline TSRVI_INLINE void tsrvi_stream_feed(tsrv_stream *stream, tsrvi_wait *wait)
{
    tsrvi_partial *partial;
    if (TSRVI_LIKELY(wait != &stream->own)) {
        tsrvi_read *read = TSRVI_CONTAINER(wait, tsrvi_read, wait);
        if (TSRVI_LIKELY(read->into == NULL || stream->in != NULL)) {
            tsrvi_stream_receive(stream, read->need);
        } else {
            read->done = tsrvi_stream_feed_memory(stream, read->into, read->size, read->done);
            read->need = read->done == read->size ? 0 : 1;
        }
        return;
    }
    partial = (wait->facts & TSRVI_PARTLY) != 0 && (wait->kinds & TSRVI_FOR_READ) != 0
                  ? wait->u.partial
                  : NULL;
    if (TSRVI_UNLIKELY(partial != NULL && partial->into != NULL && stream->in == NULL)) {
        partial->done =
            tsrvi_stream_feed_memory(stream, partial->into, partial->size, partial->done);
    } else if (TSRVI_UNLIKELY(stream->in != NULL && tsrvi_buffer_is_held(stream->in))) {
        *tsrvi_own_need(stream) =
            0; /* another coroutine has a slice of it, which ends with the reads of the
                             handler's next call */
    } else {
        tsrvi_stream_receive(stream, *tsrvi_own_need(stream));
    }
}

/* Who waits for input most: a read, or else the handler. */
static tsrvi_wait *tsrvi_stream_reader(const tsrv_stream *stream)
{
    int kind = (stream->kinds & TSRVI_FOR_READ) != 0 ? TSRVI_FOR_READ : TSRVI_FOR_INPUT;
    tsrvi_wait *wait = stream->waits;
    while ((wait->kinds & kind) == 0) {
        wait = wait->next;
    }
    return wait;
}

static inline TSRVI_INLINE void tsrvi_stream_readable(tsrv_stream *stream, bool hangup)
{
    if (TSRVI_UNLIKELY(tsrvi_is(stream, TSRVI_SHAKING))) {
        tsrvi_stream_shake(stream);
        if (tsrvi_is(stream, TSRVI_SHAKING) || stream->in_end != 0 ||
            stream->phase == TSRVI_CLOSED) {
            return;
        }
    }
    if (TSRVI_UNLIKELY(stream->kinds == TSRVI_FOR_TURN)) {
        return; /* what is there is looked at first */
    }
    if (TSRVI_UNLIKELY(!tsrvi_stream_wants_input(stream))) {
        tsrvi_stream_look(stream, hangup);
    } else if (TSRVI_UNLIKELY(stream->phase == TSRVI_LINGER)) {
        tsrvi_stream_linger(stream);
    } else if (!tsrvi_wait_is_over(stream, tsrvi_stream_reader(stream))) {
        tsrvi_stream_feed(stream, tsrvi_stream_reader(stream)); /* else it takes what is there */
    }
}

static TSRVI_APART void tsrvi_stream_happens(tsrv_stream *stream, int events)
{
    if (stream->queued == TSRVI_NOWHERE) {
        stream->queued = TSRVI_IN_SETTLE;
    }
    if ((events & TSRV_WRITABLE) != 0 && tsrvi_is(stream, TSRVI_BLOCKED)) {
        tsrvi_stream_send(stream, "", 0);
    }
    if ((events & TSRV_READABLE) != 0 && stream->phase != TSRVI_CLOSED) { /* by that very send */
        tsrvi_stream_readable(stream, (events & TSRVI_HANGUP) != 0);
    }
    tsrvi_stream_settle(stream, true, false);
}

/* The common case: input comes to a stream which only waits for that, in a read. */
static void tsrvi_stream_event(tsrvi_io *io, int events)
{
    tsrv_stream *stream = TSRVI_CONTAINER(io, tsrv_stream, io);
    tsrvi_wait *wait = stream->waits;
    if (TSRVI_UNLIKELY(events != TSRV_READABLE || stream->in != NULL ||
                       !tsrvi_stream_only_reads(stream, TSRVI_NOWHERE) ||
                       tsrvi_loop_of(stream)->streams.pool.tight)) {
        tsrvi_stream_happens(stream, events);
        return;
    }
    stream->queued = TSRVI_IN_SETTLE;
    tsrvi_stream_feed(stream, wait);
    tsrvi_stream_settled(stream, wait == &stream->own ? tsrvi_own_end(stream)
                                                      : tsrvi_wait_end(stream, wait));
}

static void tsrvi_stream_timer(tsrvi_timer *timer)
{
    tsrv_stream *stream = TSRVI_CONTAINER(timer, tsrv_stream, timer);
    tsrvi_set(stream, tsrvi_is_timed(stream) ? TSRVI_UNARMED : 0);
    if (stream->queued == TSRVI_NOWHERE) {
        stream->queued = TSRVI_IN_SETTLE;
    }
    if (tsrvi_stream_is_measured(stream) &&
        tsrvi_ms_is_past(tsrvi_loop_of(stream), tsrvi_stream_blocked_due(stream))) {
        tsrvi_stream_measure(stream);
    }
    if (tsrvi_ms_is_past(tsrvi_loop_of(stream), stream->own_due_ms)) {
        if (stream->phase == TSRVI_LINGER) {
            tsrvi_stream_close_socket(stream, false);
        } else if (tsrvi_is(stream, TSRVI_SHAKING)) {
            tsrvi_stream_shake_late(stream);
        } else if (tsrvi_is(stream, TSRVI_BLOCKED)) {
            tsrvi_stream_kill(stream, tsrvi_stream_output_failed(stream) ? stream->out_end
                                                                         : (int)TSRV_ETIMEOUT);
        }
    }
    tsrvi_stream_settle(stream, true, false);
}

/* The stream's task. */
static void tsrvi_stream_run(tsrvi_task *task)
{
    tsrv_stream *stream = TSRVI_CONTAINER(task, tsrv_stream, task);
    tsrv_loop *loop = tsrvi_loop_of(stream);
    bool turn = stream->queued == TSRVI_IN_READY;
    stream->queued = TSRVI_IN_SETTLE;
    if (turn && tsrvi_stream_finished(stream) && stream->waits == NULL) {
        tsrvi_stream_finish(stream);
        if (TSRVI_UNLIKELY(loop->streams.pool.tight)) {
            tsrvi_loop_weigh(loop);
        }
        return;
    }
    if (turn && tsrvi_transport_holds(stream) && tsrvi_stream_listens(stream)) {
        tsrvi_stream_readable(stream, false);
    }
    tsrvi_stream_settle(stream, turn, turn);
}

/* Begin TLS, if the server has it. */
static int tsrvi_stream_secure(tsrv_stream *stream)
{
    const tsrv_tls *tls = stream->server->options.tls;
    return tls == NULL ? TSRV_OK : tsrvi_tls_begin(stream, tls, NULL);
}

/* A stream for a connected, non-blocking socket, which it takes over when it succeeds. Its handler
 * waits for its first turn. */
static int tsrvi_stream_new(tsrv_server *server, int fd, const tsrv_address *peer,
                            tsrv_stream **made)
{
    tsrv_loop *loop = server->loop;
    size_t size = sizeof(tsrv_stream);
    tsrv_stream *stream;
    int rc;
    *made = NULL;
    if (server->options.data_size != 0 || server->options.proxy_protocol != TSRV_PROXY_NONE) {
        size = tsrvi_stream_data_at(server) + server->options.data_size;
    }
    if ((rc = tsrvi_heap_reserve(&loop->heap, 1)) < 0) {
        return rc;
    }
    stream = (tsrv_stream *)tsrvi_zalloc(size);
    if (stream == NULL || tsrvi_peer_store(&stream->peer, peer) < 0) {
        TSRV_FREE(stream);
        loop->heap.reserved--;
        return -ENOMEM;
    }
    stream->io.fd = fd;
    stream->io.on_event = tsrvi_stream_event;
    stream->task.run = tsrvi_stream_run;
    stream->timer.fire = tsrvi_stream_timer;
    stream->server = server;
    stream->handler = server->options.handle_stream;
    stream->fresh_ms = loop->now_ms;
    stream->flags = server->draining ? TSRVI_DRAINING : 0;
    stream->read_ms = tsrvi_ms_most(server->options.read_timeout_ms);
    stream->write_ms = server->options.write_timeout_ms;
    if (stream->read_ms >= 0 || server->options.idle_timeout_ms >= 0) {
        tsrvi_stream_times(stream);
    }
    if (tsrvi_no_sigpipe(fd) < 0) {
        tsrvi_set(stream, TSRVI_ENDED);
        stream->out_end = -EPIPE; /* it is over already, which a send would raise the signal for */
    }
    rc = server->options.proxy_protocol == TSRV_PROXY_NONE ? tsrvi_stream_secure(stream)
                                                           : tsrvi_proxy_begin(stream, peer);
    if (rc < 0) {
        tsrvi_proxy_free(stream);
        tsrvi_peer_free(&stream->peer);
        TSRV_FREE(stream);
        loop->heap.reserved--;
        return rc;
    }
    stream->own.kinds = tsrvi_stream_is_unknown(stream) ? TSRVI_FOR_SECURE : TSRVI_FOR_TURN;
    tsrvi_wait_add(stream, &stream->own);
    tsrvi_list_append(&server->streams, &stream->link);
    server->stats->accepted++;
    server->stats->open++;
    server->open++;
    loop->active++;
    *made = stream;
    return TSRV_OK;
}

/* ============================================================================
 * >>server  Servers: their options
 * ==========================================================================*/

#define TSRVI_BURST 64         /* most accepts of one turn, */
#define TSRVI_BURST_SHARED 8   /* and where other workers want some of them */
#define TSRVI_BURST_HOLD 16    /* turns without growth after an accept that found nothing */
#define TSRVI_SHARE_MS 10000   /* that a share is counted for, at least */
#define TSRVI_SHARE 16         /* accepts before another worker's turn, */
#define TSRVI_SHARE_AHEAD 4    /* and where this one has accepted more than the others */
#define TSRVI_AWAY_MS 1        /* for which a worker that is ahead leaves the rest to others, */
#define TSRVI_AWAY_MOST 16     /* and how often if they take nothing */
#define TSRVI_BACKOFF_MS 50    /* first pause */
#define TSRVI_BACKOFF_MAX 1000 /* longest pause */
#define TSRVI_FAILURES 32      /* of accept in a row, after which a listener pauses; then it has */
#define TSRVI_FAILURES_MORE 4  /* so many more before it pauses again */
#define TSRVI_CHUNK_MOST ((size_t)1024 * 1024) /* bytes of one recv, for which there is a buffer */
#define TSRVI_LAST 4096 /* connections taken from a listener that is closed: the longest queue */

typedef struct tsrvi_listener {
    tsrvi_io io;
    struct tsrvi_listener *next;
    tsrv_server *server;
    uint64_t due;   /* when its own pause is over; 0 = it has none */
    int backoff_ms; /* its last pause; 0 = it has accepted since */
    int failures;   /* of accept since it last accepted */
    int burst;
    int hold;
    uint32_t turn; /* the last in which it was ready */
    int taken;     /* connections since it was last put behind the other processes */
    bool tcp;
    /* With other workers: not one of reuse_port's, which is this one's alone. */
    bool shared;
    bool fresh; /* some may wait that were made before it had its options: they have none of them */
    uint32_t fresh_turn; /* if it is not ready in this turn, none does */
} tsrvi_listener;

/* What tsrv_server_bind leaves to tsrv_server_start. */
typedef struct tsrvi_bound {
    int fd;
    int backlog;
    int rank;   /* among those with its address: 0, and with reuse_port 1, 2, ... */
    int worker; /* whose it is; -1 = every worker's */
} tsrvi_bound;

static int tsrvi_default_ms(int value, int fallback)
{
    return value == 0 ? fallback : value < 0 ? TSRV_NEVER : value;
}

static size_t tsrvi_default_size(size_t value, size_t fallback)
{
    return value == 0 ? fallback : value;
}

/* Section 5 of the design, in one place. */
static void tsrvi_server_defaults(tsrv_server_options *options)
{
    options->max_buffer_size = tsrvi_default_size(options->max_buffer_size, (size_t)1024 * 1024);
    options->read_chunk_size = tsrvi_default_size(options->read_chunk_size, (size_t)64 * 1024);
    options->max_write_buffer_size =
        tsrvi_default_size(options->max_write_buffer_size, (size_t)16 * 1024 * 1024);
    options->write_high_water = tsrvi_default_size(options->write_high_water, (size_t)256 * 1024);
    options->write_high_water =
        tsrvi_min(options->write_high_water, options->max_write_buffer_size);
    options->read_chunk_size =
        tsrvi_min(options->read_chunk_size,
                  tsrvi_min(TSRVI_CHUNK_MOST, options->max_buffer_size / 2 + 1));
    options->stack_size = tsrvi_default_size(options->stack_size, TSRVI_STACK_SIZE);
    options->idle_timeout_ms = tsrvi_default_ms(options->idle_timeout_ms, TSRV_NEVER);
    options->read_timeout_ms = tsrvi_default_ms(options->read_timeout_ms, TSRV_NEVER);
    options->write_timeout_ms = tsrvi_default_ms(options->write_timeout_ms, 60000);
    options->close_timeout_ms = tsrvi_default_ms(options->close_timeout_ms, 5000);
    options->handshake_timeout_ms = tsrvi_default_ms(options->handshake_timeout_ms, 10000);
    options->grace_ms = tsrvi_default_ms(options->grace_ms, 30000);
}

static void tsrvi_server_run(tsrvi_task *task);
/* forward: tsrvi_server_run - tsrv_server_new stores it in the task, and it frees what
 * tsrv_server_new made */

/* What is wrong with a server's options; NULL = nothing. */
static const char *tsrvi_server_options_wrong(const tsrv_server_options *options)
{
    if (options == NULL || options->handle_stream == NULL) {
        return "handle_stream is NULL";
    }
    if (options->mode != TSRV_COROUTINE && options->mode != TSRV_CALLBACK) {
        return "mode is neither TSRV_COROUTINE nor TSRV_CALLBACK";
    }
    if (options->max_connections < 0 || options->max_per_address < 0) {
        return "max_connections or max_per_address is negative";
    }
    if (options->data_size > SIZE_MAX / 2 || options->stack_size > SIZE_MAX / 2) {
        return "data_size or stack_size is more than there can be";
    }
    if (options->proxy_protocol != TSRV_PROXY_NONE &&
        options->proxy_protocol != TSRV_PROXY_REQUIRED) {
        return "proxy_protocol is neither TSRV_PROXY_NONE nor TSRV_PROXY_REQUIRED";
    }
    if (options->proxy_from != NULL && options->proxy_protocol == TSRV_PROXY_NONE) {
        return "proxy_from is given without proxy_protocol";
    }
    if (options->tls != NULL && !tsrvi_tls_serves(options->tls)) {
        return "tls has no cert_file";
    }
    return NULL;
}

/* Into a list of servers, out of another one; NULL = into none. */
static void tsrvi_server_move(tsrv_server *server, tsrvi_link *list)
{
    tsrvi_lock(&tsrvi_process.servers.lock);
    if (tsrvi_process.servers.list.next == NULL) {
        tsrvi_list_init(&tsrvi_process.servers.list);
    }
    tsrvi_list_remove(&server->link);
    if (list != NULL) {
        tsrvi_list_append(list, &server->link);
    }
    tsrvi_unlock(&tsrvi_process.servers.lock);
}

TSRV_API int tsrv_server_new(tsrv_server **server, const tsrv_server_options *options)
{
    tsrv_server *made;
    const char *wrong;
    *server = NULL;
    if ((wrong = tsrvi_server_options_wrong(options)) != NULL) {
        tsrvi_log(TSRV_LOG_ERROR, "tsrv_server_new: %s", wrong);
        return TSRV_EINVAL;
    }
    if (options->mode == TSRV_COROUTINE && !TSRVI_HAS_COROUTINES) {
        tsrvi_log(TSRV_LOG_ERROR,
                  "no coroutines: TSRV_NO_COROUTINES is defined, or stacks cannot be switched on "
                  "this processor with this C library: use mode = TSRV_CALLBACK");
        return TSRV_ENOTSUP;
    }
    made = (tsrv_server *)tsrvi_zalloc(sizeof(*made));
    if (made == NULL) {
        return -ENOMEM;
    }
    if (options->proxy_from != NULL &&
        (made->proxy_count = tsrvi_networks_parse(options->proxy_from, &made->proxies)) < 0) {
        int rc = made->proxy_count;
        tsrvi_log(TSRV_LOG_ERROR, "proxy_from \"%s\": %s", options->proxy_from, tsrv_strerror(rc));
        TSRV_FREE(made);
        return rc;
    }
    made->options = *options;
    if (options->loop_options != NULL) {
        made->loop_options = *options->loop_options;
        made->options.loop_options = &made->loop_options;
    }
    tsrvi_server_defaults(&made->options);
    tsrvi_list_init(&made->streams);
    made->task.run = tsrvi_server_run;
    made->starting = true;
    made->stats = &made->own;
    made->number = tsrvi_server_number();
    tsrvi_list_init(&made->link);
    tsrvi_server_move(made, &tsrvi_process.servers.list);
    *server = made;
    return TSRV_OK;
}

/* Have the backend wait for a listener. */
static int tsrvi_listener_watch(tsrvi_listener *listener)
{
    listener->taken = 0;
    listener->fresh_turn = listener->server->loop->turns + 1;
    return tsrvi_poller_set(&listener->server->loop->poller, &listener->io,
                            tsrvi_worker_id() < 0 ? TSRV_READABLE
                                                  : TSRV_READABLE | TSRVI_EXCLUSIVE);
}

/* ============================================================================
 * >>admit  Who may connect
 *
 * A connection is refused before anything is made for it: by proxy_from, by
 * max_per_address, or by the program. Where a PROXY header comes first the last
 * two are asked when that says who the client is.
 * ==========================================================================*/

static bool tsrvi_server_listens(const tsrv_server *server)
{
    const tsrvi_listener *listener = server->listeners;
    while (listener != NULL && listener->io.fd < 0) {
        listener = listener->next;
    }
    return listener != NULL;
}

/* May this peer have one more connection? Then it is counted.
 *   asks  the program, too
 * Returns TSRV_OK, TSRV_ECLOSED (no) or -ENOMEM. */
static int tsrvi_server_admit(tsrv_server *server, const tsrv_address *peer, bool asks)
{
    const tsrv_server_options *options = &server->options;
    uint64_t key;
    int rc = TSRV_OK;
    if (options->max_per_address != 0 && tsrvi_address_key(peer, &key)) {
        rc = tsrvi_addresses_add(&server->addresses, key, (uint64_t)options->max_per_address);
        if (rc == TSRV_EFULL) {
            char text[TSRV_ADDRESS_SIZE];
            tsrvi_log_limited(TSRVI_LOG_REFUSED, TSRV_LOG_WARNING,
                              "refused: %s has max_per_address (%d) connections",
                              tsrv_address_format(peer, text, sizeof(text)),
                              options->max_per_address);
        }
    }
    if (rc == TSRV_OK && asks && options->on_accept != NULL) {
        bool listened = tsrvi_server_listens(server), drained = server->draining;
        rc = options->on_accept(server, peer, options->context);
        tsrvi_slow_callback(server->loop, "on_accept", (uintptr_t)options->on_accept);
        if (rc < 0 || server->freed || (listened && !tsrvi_server_listens(server)) ||
            (server->draining && !drained)) { /* on_accept has stopped it */
            tsrvi_server_uncount(server, peer);
            rc = TSRV_EFULL;
        }
    }
    if (rc == TSRV_EFULL) {
        server->stats->refused++;
    }
    return rc == -ENOMEM ? rc : rc < 0 ? (int)TSRV_ECLOSED : (int)TSRV_OK;
}

/* May it send a PROXY header? TSRV_OK or TSRV_ECLOSED. */
static int tsrvi_server_trusts(tsrv_server *server, const tsrv_address *peer)
{
    char text[TSRV_ADDRESS_SIZE];
    if (server->options.proxy_from == NULL ||
        tsrvi_networks_have(server->proxies, server->proxy_count, peer)) {
        return TSRV_OK;
    }
    server->stats->refused++;
    tsrvi_log_limited(TSRVI_LOG_PROXY, TSRV_LOG_WARNING, "refused: %s is not in proxy_from",
                      tsrv_address_format(peer, text, sizeof(text)));
    return TSRV_ECLOSED;
}

/* A stream for a connection, if its peer may have one. Takes fd over. Returns TSRV_OK, TSRV_ECLOSED
 * (refused), or -ENOMEM and the like: then it is lost. */
static int tsrvi_server_admit_stream(tsrv_server *server, int fd, const tsrv_address *peer,
                                     bool asks, tsrv_stream **stream)
{
    bool proxied = server->options.proxy_protocol != TSRV_PROXY_NONE;
    int rc = proxied ? tsrvi_server_trusts(server, peer) : tsrvi_server_admit(server, peer, asks);
    *stream = NULL;
    if (rc == TSRV_ECLOSED) {
        tsrvi_reset(fd);
    } else if (rc == TSRV_OK && (rc = tsrvi_stream_new(server, fd, peer, stream)) < 0 && !proxied) {
        tsrvi_server_uncount(server, peer);
    }
    if (rc < 0) {
        tsrvi_close_fd(fd); /* not tsrvi_loop_close_fd: it would accept again at once */
    } else if (proxied) {
        tsrvi_proxy_of(*stream)->asks = asks;
    }
    return rc;
}

/* A stream's PROXY header has come, or rc says why not: the stream goes on as the client's, if that
 * may have one, or is over. The handler is called in the next turn. Returns as a transport's shake.
 */
static int tsrvi_stream_introduced(tsrv_stream *stream, const tsrv_address *client, int rc)
{
    tsrv_server *server = stream->server;
    tsrvi_proxy *proxy = tsrvi_proxy_of(stream);
    uint32_t due_ms = stream->own_due_ms;
    tsrv_address peer;
    server->stats->proxies_failed += rc < 0;
    if (rc == TSRV_OK && (rc = tsrvi_proxy_end(stream, client)) == TSRV_OK) {
        tsrv_peer_address(stream, &peer);
        rc = tsrvi_server_admit(server, &peer, proxy->asks);
    }
    if (rc == TSRV_OK && stream->end != 0) {
        tsrvi_server_uncount(server, &peer); /* which its end could not do */
    } else if (rc == TSRV_OK) {
        proxy->admitted = true;
        rc = tsrvi_stream_secure(stream);
        stream->own_due_ms = due_ms; /* one limit for both */
    }
    if (rc < 0 || stream->end != 0) {
        tsrvi_stream_kill(stream, rc < 0 ? rc : (int)TSRV_ECLOSED);
        if (stream->state == TSRVI_NEW) {            /* else on_accept has freed the server */
            tsrvi_stream_over(stream, TSRV_ECLOSED); /* what there is to say has been said */
        }
        return TSRV_EAGAIN;
    }
    tsrvi_wait_remove(stream, &stream->own);
    stream->own.kinds = TSRVI_FOR_TURN;
    tsrvi_wait_add(stream, &stream->own);
    return stream->session == NULL ? TSRV_OK : TSRV_EAGAIN;
}

/* ---- as many as other workers --------------------------------------------------*/

/* Not by tsrvi_stats_gather, whose other counters would cost more than the accept. */
static tsrvi_share tsrvi_server_share(const tsrv_server *server)
{
    tsrvi_share share = {0, 0};
    for (int first = 0; server->number >= 0 && first < tsrvi_process.place_count;
         first += TSRVI_GENERATIONS) {
        const tsrvi_place *places = &tsrvi_process.places[first];
        int used = __atomic_load_n(&places->used, __ATOMIC_ACQUIRE);
        uint64_t accepted = 0;
        for (int i = 0; i < used; i++) {
            accepted += tsrvi_counter_load(&places[i].stats[server->number].accepted);
        }
        share.all += accepted;
        share.own += first / TSRVI_GENERATIONS == tsrvi_worker_id() ? accepted : 0;
    }
    return share;
}

/* From time to time what was long ago is forgotten: a worker that was away need not make up for it.
 */
static void tsrvi_server_forget_shares(tsrv_server *server, uint64_t now)
{
    if (now >= server->share_due) {
        server->share[1] = server->share[0];
        server->share[0] = tsrvi_server_share(server);
        server->share_due = tsrvi_after(now, TSRVI_SHARE_MS);
    }
}

/* Has this worker accepted more than its share? */
static bool tsrvi_server_is_ahead(const tsrv_server *server)
{
    tsrvi_share share;
    uint64_t workers = (uint64_t)tsrvi_process.place_count / TSRVI_GENERATIONS;
    if (tsrvi_worker_id() < 0) {
        return false;
    }
    share = tsrvi_server_share(server);
    return (share.own - server->share[1].own) * workers >
           share.all - server->share[1].all + TSRVI_SHARE * workers;
}

/* Then, is there still hope for the others? Those that are full, or stopped, take nothing, however
 * often it stays away. */
static bool tsrvi_server_hopes(tsrv_server *server)
{
    tsrvi_share share = tsrvi_server_share(server);
    if (server->others != share.all - share.own) {
        server->others = share.all - share.own;
        server->in_vain = 0;
    }
    server->in_vain += server->in_vain < TSRVI_AWAY_MOST;
    return server->in_vain < TSRVI_AWAY_MOST;
}

/* Is this the turn, for all of its listeners, in which it is back from staying away? */
static bool tsrvi_server_is_back(tsrv_server *server)
{
    if (server->was_away) {
        server->was_away = false;
        server->back = server->loop->turns;
    }
    return server->back == server->loop->turns;
}

/* ============================================================================
 * >>accept  Listeners: accepting, and pausing
 *
 * A listener is level-triggered. Each readiness accepts one connection: the
 * accept that fails because the queue is empty costs more than the turn that it
 * saves. Only when the listener is ready again in the very next turn, so that
 * connections come faster than turns, does the burst double; an accept that
 * finds nothing halves it.
 *
 * When the system has run out of descriptors or memory, the server pauses: a
 * level-triggered listener would spin. It goes on when one of our descriptors
 * is closed, and tries again by itself after 50 ms, doubling to a second.
 * Apart from that each listener pauses for itself, for as long, when accept
 * has failed TSRVI_FAILURES times with nothing accepted between (a security
 * module forbids it, somebody has closed the descriptor), or when the backend
 * has refused to wait for it. So a listener waits for connections if it is
 * open and neither it nor the server is paused, which tsrvi_listener_settle
 * sees to; and as what has paused has a time to go on, none stays deaf.
 *
 * In a worker the listener is shared with other processes. EPOLLEXCLUSIVE has
 * the kernel wake one of them, but always the one that came last: so each goes
 * to the end of that queue after TSRVI_SHARE accepts, and sooner when it is ahead
 * of the others, which may have been too busy to be woken. A wake-up that a process
 * has got and does not follow (it stops, or dies) is lost for that connection
 * until somebody looks again, which every beat of a worker does. Other backends
 * wake all processes, and the quickest wins: one that is ahead of the others
 * stays away for a millisecond before it takes more. So it does with EPOLLEXCLUSIVE
 * while connections come in every turn: in a crowd all are awake, and who has a
 * processor takes what is there before the others get one. It takes all that is
 * left when the others, full or stopped, take nothing of what it leaves them.
 * ==========================================================================*/

static bool tsrvi_server_is_full(const tsrv_server *server)
{
    return server->options.max_connections != 0 &&
           server->open >= (uint64_t)server->options.max_connections;
}

static int tsrvi_backoff(int last_ms)
{
    return last_ms == 0 ? TSRVI_BACKOFF_MS : (int)tsrvi_min((size_t)last_ms * 2, TSRVI_BACKOFF_MAX);
}

/* Have the timer fire when the next of what has paused goes on. */
static void tsrvi_server_arm(tsrv_server *server)
{
    uint64_t due = server->paused ? server->resume_due : TSRVI_FOREVER;
    for (tsrvi_listener *one = server->listeners; one != NULL; one = one->next) {
        due = tsrvi_earlier(due, one->due == 0 ? TSRVI_FOREVER : one->due);
    }
    if (due == TSRVI_FOREVER) {
        tsrvi_heap_remove(&server->loop->heap, &server->retry);
    } else {
        tsrvi_heap_set(&server->loop->heap, &server->retry, due);
    }
}

/* Failures to accept are logged once a second. */
static bool tsrvi_server_logs(tsrv_server *server)
{
    uint64_t now = server->loop->now;
    if (server->logged != 0 && now - server->logged < 1000 * TSRVI_MS) {
        return false;
    }
    server->logged = now;
    return true;
}

/* Pause this listener alone: accept, or waiting for it, fails. */
static void tsrvi_listener_pause(tsrvi_listener *listener, int code)
{
    tsrv_server *server = listener->server;
    tsrvi_poller_set(&server->loop->poller, &listener->io, 0);
    server->stats->accept_pauses++;
    listener->failures = TSRVI_FAILURES - TSRVI_FAILURES_MORE;
    listener->backoff_ms = tsrvi_backoff(listener->backoff_ms);
    listener->due = tsrvi_after(server->loop->now, listener->backoff_ms);
    tsrvi_server_arm(server);
    if (tsrvi_server_logs(server)) {
        tsrv_address address;
        char text[TSRV_ADDRESS_SIZE];
        tsrvi_address_get(listener->io.fd, tsrvi_getsockname, &address);
        tsrvi_log(TSRV_LOG_WARNING, "cannot accept on descriptor %d (%s), pausing: %s",
                  listener->io.fd, tsrv_address_format(&address, text, sizeof(text)),
                  tsrv_strerror(code));
    }
}

/* Wait for a listener, or do not, as things stand now. */
static void tsrvi_listener_settle(tsrvi_listener *listener)
{
    int rc;
    if (listener->io.fd < 0 || listener->due != 0 || listener->server->paused) {
        tsrvi_poller_set(&listener->server->loop->poller, &listener->io, 0);
    } else if ((rc = tsrvi_listener_watch(listener)) < 0) {
        tsrvi_listener_pause(listener, rc);
    }
}

/* Go behind the other processes that wait for a listener, and look whether it is ready. */
static void tsrvi_listener_requeue(tsrvi_listener *listener)
{
    if (listener->io.interest != 0 && listener->server->loop->poller.fd >= 0) {
        tsrvi_poller_set(&listener->server->loop->poller, &listener->io, 0);
        tsrvi_listener_settle(listener);
    }
}

static void tsrvi_server_settle(tsrv_server *server)
{
    for (tsrvi_listener *one = server->listeners; one != NULL; one = one->next) {
        tsrvi_listener_settle(one);
    }
    tsrvi_server_arm(server);
}

/* Let no listener accept, for a while.
 *   due  when they go on by themselves; TSRVI_FOREVER = when a descriptor is closed */
static void tsrvi_server_pause(tsrv_server *server, uint64_t due)
{
    server->paused = true;
    server->resume_due = due;
    tsrvi_server_settle(server);
}

static void tsrvi_server_exhausted(tsrv_server *server, int code)
{
    server->backoff_ms = tsrvi_backoff(server->backoff_ms);
    server->stats->accept_pauses++;
    tsrvi_server_pause(server, tsrvi_after(server->loop->now, server->backoff_ms));
    if (tsrvi_server_logs(server)) {
        tsrvi_log(TSRV_LOG_WARNING, "cannot accept, pausing: %s (%llu connections open)",
                  tsrv_strerror(code), (unsigned long long)server->open);
    }
}

static void tsrvi_server_resume(tsrv_server *server)
{
    if (!server->paused || tsrvi_server_is_full(server) ||
        server->loop->poller.pid != TSRV_SYS(getpid, ())) {
        return; /* in a fork's child it would change what the parent waits for */
    }
    server->paused = false;
    tsrvi_server_settle(server);
}

/* The time of a pause is over. A server that is full goes on when a connection is closed. */
static void tsrvi_server_retry(tsrvi_timer *timer)
{
    tsrv_server *server = TSRVI_CONTAINER(timer, tsrv_server, retry);
    uint64_t now = server->loop->now;
    for (tsrvi_listener *one = server->listeners; one != NULL; one = one->next) {
        one->due = one->due <= now ? 0 : one->due;
    }
    if (server->resume_due <= now) {
        server->resume_due = TSRVI_FOREVER;
        tsrvi_server_resume(server);
    }
    tsrvi_server_settle(server);
}

/* A descriptor is free again: whoever ran out of them, or of connections, goes on. */
static void tsrvi_loop_fd_closed(tsrv_loop *loop)
{
    TSRVI_EACH(tsrv_server, server, &loop->servers.all, link) {
        if (!server->was_away || server->resume_due == TSRVI_FOREVER) { /* it lacks nothing */
            tsrvi_server_resume(server);
        }
    }
}

/* ---- accepting -------------------------------------------------------------*/

static int tsrvi_accept_plain(int fd, struct sockaddr *peer, socklen_t *size)
{
    int accepted = TSRV_SYS(accept, (fd, peer, size));
    if (accepted >= 0 && tsrvi_set_flags(accepted) < 0) {
        tsrvi_close_fd(accepted);
        errno = ECONNABORTED;
        accepted = -1;
    }
    return accepted;
}

/* accept4, or where it is refused accept. Returns what they do. */
static int tsrvi_accept_one(int fd, struct sockaddr *peer, socklen_t *size)
{
#if TSRVI_HAS_ACCEPT4
    if (!tsrvi_does_without(TSRVI_WITHOUT_ACCEPT4)) {
        socklen_t room = *size;
        int accepted = TSRV_SYS(accept4, (fd, peer, size, SOCK_NONBLOCK | SOCK_CLOEXEC)), rc;
        if (accepted >= 0 || (errno != ENOSYS && errno != EPERM && errno != EACCES)) {
            return accepted;
        }
        rc = tsrvi_error();
        *size = room;
        accepted = tsrvi_accept_plain(fd, peer, size);
        if (accepted >= 0) {
            tsrvi_do_without(TSRVI_WITHOUT_ACCEPT4, "accept4", rc);
        }
        return accepted;
    }
#endif
    return tsrvi_accept_plain(fd, peer, size);
}

static int tsrvi_accept(int fd, tsrv_address *peer)
{
    tsrvi_sockaddr inside;
    socklen_t size;
    int accepted;
    do {
        size = sizeof(inside);
        accepted = tsrvi_fd_own(tsrvi_accept_one(fd, &inside.any, &size));
    } while (accepted < 0 && errno == EINTR);
    if (accepted >= 0) {
        tsrvi_address_store(peer, &inside, size);
    }
    return accepted < 0 ? tsrvi_error() : accepted;
}

/* A time in seconds, rounded up; 0 = as it is. Linux takes no more than 32767. */
static inline void tsrvi_option_seconds(int fd, int name, int ms)
{
    if (ms > 0) {
        tsrvi_option(fd, IPPROTO_TCP, name, (int)tsrvi_min((size_t)(ms - 1) / 1000 + 1, 32767));
    }
}

/* The options of TCP that are asked for. A kernel that refuses one is no reason to refuse the
 * connection. */
static void tsrvi_server_dress(const tsrv_server_options *options, int fd, bool tcp)
{
    if (!tcp) {
        return;
    }
    if (!options->nagle) {
        tsrvi_option_on(fd, IPPROTO_TCP, TCP_NODELAY);
    }
    if (options->keep_alive || options->keep_alive_idle_ms > 0 ||
        options->keep_alive_interval_ms > 0 || options->keep_alive_count > 0) {
        tsrvi_option_on(fd, SOL_SOCKET, SO_KEEPALIVE);
    }
#ifdef TSRVI_KEEPIDLE
    tsrvi_option_seconds(fd, TSRVI_KEEPIDLE, options->keep_alive_idle_ms);
#endif
#ifdef TCP_KEEPINTVL
    tsrvi_option_seconds(fd, TCP_KEEPINTVL, options->keep_alive_interval_ms);
#endif
#ifdef TCP_KEEPCNT
    if (options->keep_alive_count > 0) {
        tsrvi_option(fd, IPPROTO_TCP, TCP_KEEPCNT,
                     (int)tsrvi_min((size_t)options->keep_alive_count, 127));
    }
#endif
#ifdef TCP_USER_TIMEOUT
    if (options->user_timeout_ms > 0) {
        tsrvi_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, options->user_timeout_ms);
    }
#endif
}

/* Does it accept, or has it what it has accepted? Its on_start may have ended it. */
static bool tsrvi_server_serves(const tsrv_server *server)
{
    return !server->starting && !server->freed && !server->draining &&
           server != server->loop->servers.clients &&
           (tsrvi_server_listens(server) || !tsrvi_list_empty(&server->streams));
}

/* Does the process accept, now that this server has begun, or will not? In tsrv_serve its own
 * server decides. Else all that listen must have begun, and one must have been left so: it need not
 * be this one. */
static bool tsrvi_server_is_ready(const tsrv_server *server)
{
    const tsrv_loop *loop = server->loop;
    bool serves = false;
    if (tsrvi_process.reloaded != NULL) {
        return server == tsrvi_process.reloaded && tsrvi_server_serves(server) && !loop->stopping;
    }
    TSRVI_EACH(const tsrv_server, other, &loop->servers.all, link) {
        if (other->starting && tsrvi_server_listens(other)) {
            return false;
        }
        serves = serves || tsrvi_server_serves(other);
    }
    return serves && !loop->stopping;
}

static void tsrvi_server_tell_ready(const tsrv_server *server)
{
    const tsrvi_hooks *hooks = tsrvi_loop_hooks(server->loop);
    if (hooks != NULL && tsrvi_server_is_ready(server)) {
        hooks->ready();
    }
}

/* on_start comes before the first connection. */
static void tsrvi_server_begin(tsrv_server *server)
{
    if (server->starting) {
        server->starting = false;
        if (server->options.on_start != NULL) {
            server->options.on_start(server, server->options.context);
            tsrvi_slow_callback(server->loop, "on_start", (uintptr_t)server->options.on_start);
        }
        tsrvi_server_tell_ready(server);
    }
}

/* The kernel has just given this number away: a listener that had it was closed by somebody, and
 * must not take, wait for or close what is another's now. */
static void tsrvi_loop_disown(tsrv_loop *loop, int fd)
{
    TSRVI_EACH(tsrv_server, server, &loop->servers.all, link) {
        for (tsrvi_listener *listener = server->listeners; listener != NULL;
             listener = listener->next) {
            if (TSRVI_UNLIKELY(listener->io.fd == fd)) {
                tsrvi_log(TSRV_LOG_ERROR, "somebody has closed the listening socket %d", fd);
                tsrvi_poller_set(&loop->poller, &listener->io, 0);
                listener->io.fd = -1;
                loop->active--;
            }
        }
    }
}

/* Make a stream of the connection that has waited longest. Its handler is to be called. Returns
 * TSRV_OK, -EAGAIN (none waits), TSRV_ECLOSED (it was refused), or what accept says, or -ENOMEM and
 * the like: then that one is lost. */
static int tsrvi_listener_take(tsrvi_listener *listener, tsrv_stream **stream)
{
    tsrv_server *server = listener->server;
    tsrv_address peer;
    int fd = tsrvi_accept(listener->io.fd, &peer), rc;
    if (fd < 0) {
        return fd;
    }
    tsrvi_loop_opened_fd(server->loop, fd);
    rc = tsrvi_server_admit_stream(server, fd, &peer, true, stream);
    if (rc == TSRV_OK) {
        tsrvi_server_dress(&server->options, fd, listener->tcp && listener->fresh);
    } else if (rc != TSRV_ECLOSED) {
        server->stats->accept_errors++;
    }
    return rc;
}

/* Accept has failed. false: no more for now. */
static bool tsrvi_listener_failed(tsrvi_listener *listener, int code)
{
    if (tsrvi_would_block(-code)) {
        listener->burst = (listener->burst + 1) / 2;
        listener->hold = TSRVI_BURST_HOLD;
        listener->fresh = false;
        return false;
    }
    switch (-code) {
    case EMFILE:
    case ENFILE:
    case ENOBUFS:
    case ENOMEM:
        tsrvi_server_exhausted(listener->server, code);
        return false;
    default: /* accept(2): perhaps an error of the network, that belongs to this connection only;
                perhaps one that comes for ever */
        listener->server->stats->accept_errors++;
        if (++listener->failures < TSRVI_FAILURES) {
            return true;
        }
        tsrvi_listener_pause(listener, code);
        return false;
    }
}

/* Accept one connection and call its handler. false: no more for now. */
static bool tsrvi_listener_accept(tsrvi_listener *listener)
{
    tsrv_server *server = listener->server;
    tsrv_stream *stream;
    int rc = tsrvi_listener_take(listener, &stream);
    if (rc < 0 && rc != TSRV_ECLOSED) {
        return tsrvi_listener_failed(listener, rc);
    }
    listener->failures = 0;
    listener->backoff_ms = 0;
    listener->taken++;
    if (tsrvi_worker_id() >= 0 &&
        (listener->taken == TSRVI_SHARE ||
         (listener->taken % TSRVI_SHARE_AHEAD == 0 && tsrvi_server_is_ahead(server)))) {
        tsrvi_listener_requeue(listener);
    }
    if (stream == NULL) {
        return true; /* refused */
    }
    rc = tsrvi_stream_is_unknown(stream) ? TSRV_OK : tsrvi_stream_call(stream);
    tsrvi_stream_soon(stream);
    if (rc < 0) {
        server->stats->accept_errors++;
        tsrvi_server_exhausted(server, rc);
        return false;
    }
    server->backoff_ms = 0;
    return true;
}

static void tsrvi_listener_event(tsrvi_io *io, int events)
{
    tsrvi_listener *listener = TSRVI_CONTAINER(io, tsrvi_listener, io);
    tsrv_server *server = listener->server;
    tsrv_loop *loop = server->loop;
    int burst, most = tsrvi_worker_id() < 0 ? TSRVI_BURST : TSRVI_BURST_SHARED;
    bool crowd = listener->turn + 1 == loop->turns, back = tsrvi_server_is_back(server);
    (void)events;
    tsrvi_server_begin(server);
    if (crowd && listener->hold == 0 && listener->burst < most) {
        listener->burst *= 2;
    }
    listener->hold -= listener->hold > 0;
    listener->turn = loop->turns;
    listener->fresh = listener->fresh && (int32_t)(loop->turns - listener->fresh_turn) <= 0;
    listener->fresh_turn = loop->turns + 1;
    if (listener->shared && (crowd || !loop->poller.exclusive) && !back &&
        tsrvi_server_is_ahead(server) && tsrvi_server_hopes(server)) {
        server->was_away = true; /* the others may have them, for a moment */
        tsrvi_server_pause(server, tsrvi_after(loop->now, TSRVI_AWAY_MS));
        return;
    }
    /* Who stops, drains or frees the server meanwhile closes the listener. */
    for (burst = listener->burst;
         burst > 0 && listener->io.interest != 0 && !tsrvi_server_is_full(server); burst--) {
        if (!tsrvi_listener_accept(listener)) {
            break;
        }
        tsrvi_loop_settle(loop);
    }
    /* Now, and not when the next one comes: that may be for another process, which has room. */
    if (listener->io.interest != 0 && tsrvi_server_is_full(server)) {
        server->stats->accept_pauses++;
        tsrvi_server_pause(server, TSRVI_FOREVER);
    }
}

/* ============================================================================
 * >>listen  Servers: starting and stopping
 * ==========================================================================*/

/* A turn of its loop took so long. */
static void tsrvi_servers_count_turn(tsrv_loop *loop, uint64_t ms, bool slow)
{
    TSRVI_EACH(tsrv_server, server, &loop->servers.all, link) {
        tsrv_stats *stats = server->stats;
        stats->slow_turns += slow;
        stats->turn_max_ms = ms > stats->turn_max_ms ? ms : stats->turn_max_ms;
    }
}

/* The loop that the server has, or is to have: the thread's is made as its options say, if it is
 * not there yet. */
static int tsrvi_server_loop(const tsrv_server *server, tsrv_loop **loop)
{
    int rc = TSRV_OK;
    *loop = server->loop != NULL ? server->loop : server->options.loop;
    if (*loop == NULL && server->options.loop_options != NULL && tsrvi_thread.running == NULL &&
        tsrvi_thread.own == NULL) {
        rc = tsrv_loop_new(&tsrvi_thread.own, server->options.loop_options);
    }
    return rc < 0 ? rc : tsrvi_loop_use(loop);
}

/* Tie the server to its loop, when it first needs one. Either may be about to go: an on_close that
 * listens again, or adds a stream, then would leave behind what nobody ends any more. */
static int tsrvi_server_attach(tsrv_server *server)
{
    tsrv_loop *loop;
    int rc = tsrvi_server_loop(server, &loop);
    if (rc == TSRV_OK && (server->ending || loop->closing)) {
        rc = TSRV_ECLOSED;
    }
    if (rc < 0 || server->loop != NULL) {
        return rc;
    }
    if ((rc = tsrvi_heap_reserve(&loop->heap, 2)) < 0) {
        return rc;
    }
    server->loop = loop;
    if (tsrvi_process.place_own != NULL && server->number >= 0) {
        server->stats = &tsrvi_process.place_own->stats[server->number];
        server->share[0] = server->share[1] = tsrvi_server_share(server); /* of those before it */
    }
    server->retry.fire = tsrvi_server_retry;
    loop->servers.fd_opened = tsrvi_loop_disown;
    loop->servers.fd_closed = tsrvi_loop_fd_closed;
    loop->streams.introduced = tsrvi_stream_introduced;
    loop->slow.describe = tsrvi_stream_describe;
    loop->slow.count = tsrvi_servers_count_turn;
    tsrvi_server_move(server, &loop->servers.all);
    return TSRV_OK;
}

/* It accepts from now on: on_start is due. A process whose workers have ended counts for itself. */
static void tsrvi_server_started(tsrv_server *server)
{
    if (tsrvi_process.places != NULL && tsrvi_worker_id() < 0 &&
        __atomic_load_n(&tsrvi_process.supervising, __ATOMIC_ACQUIRE) == 0) {
        tsrvi_places_drop();
    }
    server->drain_code = TSRV_OK; /* that drain is history */
    if (server->starting) {
        tsrvi_server_later(server);
    }
}

/* A listener for fd at the end of the list, so that tsrv_server_address counts in order. One that
 * was stopped is reused. */
static tsrvi_listener *tsrvi_listener_new(tsrv_server *server)
{
    tsrvi_listener **link = &server->listeners;
    while (*link != NULL && (*link)->io.fd >= 0) {
        link = &(*link)->next;
    }
    if (*link == NULL && (*link = (tsrvi_listener *)tsrvi_zalloc(sizeof(**link))) != NULL) {
        (*link)->io.fd = -1;
    }
    return *link;
}

/* Do all processes that listen take from one queue? With SO_REUSEPORT each has its own. */
static bool tsrvi_listening_is_shared(int fd)
{
#ifdef SO_REUSEPORT
    int on = 0;
    socklen_t size = sizeof(on);
    return TSRV_SYS(getsockopt, (fd, SOL_SOCKET, SO_REUSEPORT, &on, &size)) < 0 || on == 0;
#else
    (void)fd;
    return true;
#endif
}

static int tsrvi_server_add_socket(tsrv_server *server, int fd)
{
    tsrvi_listener *listener;
    tsrv_address address;
    int rc = tsrvi_listening(fd);
    if (rc < 0) {
        return rc == TSRV_EINVAL ? tsrvi_mistake("tsrv_server_add_sockets", "fd does not listen")
                                 : rc;
    }
    listener = tsrvi_listener_new(server);
    if (listener == NULL) {
        return -ENOMEM;
    }
    listener->server = server;
    listener->due = 0;
    listener->backoff_ms = 0;
    listener->failures = 0;
    listener->burst = 1;
    listener->hold = 0;
    listener->turn = server->loop->turns - 1; /* none comes in the turn behind that */
    listener->fresh = true;
    listener->shared = tsrvi_worker_id() >= 0 && tsrvi_listening_is_shared(fd);
    listener->tcp = tsrvi_address_get(fd, tsrvi_getsockname, &address) == TSRV_OK &&
                    tsrv_address_family(&address) != AF_UNIX;
    tsrvi_server_dress(&server->options, fd, listener->tcp); /* connections inherit them */
    listener->io.on_event = tsrvi_listener_event;
    listener->io.fd = fd;
    if (!server->paused && (rc = tsrvi_listener_watch(listener)) < 0) {
        listener->io.fd = -1;
        return rc;
    }
    server->loop->active++;
    return TSRV_OK;
}

/* Take the connections that wait already, before the listener is closed: their clients have been
 * told that they are connected, and would be reset. The handlers are called from the loop. Beyond
 * max_connections there is no room for them, a fork's child leaves them to its parent, and
 * on_accept is not called from inside tsrv_server_stop. */
static void tsrvi_listener_empty(tsrvi_listener *listener)
{
    tsrv_server *server = listener->server;
    bool own =
        server->loop->poller.pid == TSRV_SYS(getpid, ()) && server->options.on_accept == NULL;
    int failures = 0;
    for (int left = TSRVI_LAST; own && left > 0 && !tsrvi_server_is_full(server); left--) {
        tsrv_stream *stream;
        int rc = tsrvi_listener_take(listener, &stream);
        if (rc == TSRV_OK) {
            tsrvi_stream_later(stream);
        } else if (rc == -EAGAIN || (rc != TSRV_ECLOSED && ++failures == TSRVI_FAILURES)) {
            return;
        }
    }
}

/* Close a listener. Its memory stays until the server goes, since its event may be in this turn's
 * batch. */
static void tsrvi_listener_close(tsrvi_listener *listener)
{
    tsrv_loop *loop = listener->server->loop;
    int fd = listener->io.fd;
    if (fd >= 0) {
        tsrvi_poller_set(&loop->poller, &listener->io, 0);
        listener->io.fd = -1;
        listener->due = 0;
        loop->active--;
        tsrvi_bound_forget(fd);
        tsrvi_loop_close_fd(loop, fd);
    }
}

/* Close all of fds, the first `added` of which are listeners by now; none twice. */
static void tsrvi_server_take_back(tsrv_server *server, const int *fds, int added, int count)
{
    for (int i = 0; i < count; i++) {
        tsrvi_listener *listener = i < added ? server->listeners : NULL;
        int first = 0;
        while (fds[first] != fds[i]) {
            first++;
        }
        while (listener != NULL && listener->io.fd != fds[i]) {
            listener = listener->next;
        }
        if (listener != NULL) {
            tsrvi_listener_close(listener);
        } else if (first == i) {
            tsrvi_bound_close(fds[i]);
        }
    }
}

TSRV_API int tsrv_server_add_sockets(tsrv_server *server, const int *fds, int count)
{
    int rc = TSRVI_WRONG(count < 0) ? TSRV_EINVAL : tsrvi_server_attach(server), added = 0;
    while (rc == TSRV_OK && added < count) {
        rc = tsrvi_server_add_socket(server, fds[added]);
        added += rc == TSRV_OK;
    }
    if (rc < 0) {
        tsrvi_server_take_back(server, fds, added, count);
    } else if (count > 0) {
        tsrvi_server_started(server);
    }
    return rc;
}

static void tsrvi_server_log_failure(const char *what, int port, const char *address, int code)
{
    const char *name = address == NULL || address[0] == 0 ? "*" : address;
    char number[24] = "";
    if (strncmp(name, "unix:", 5) != 0) {
        snprintf(number, sizeof(number), " port %d", port);
    }
    tsrvi_log(TSRV_LOG_ERROR, "cannot %s on %s%s: %s", what, name, number, tsrv_strerror(code));
}

static void tsrvi_server_log_bound(const int *fds, int count)
{
    tsrv_address address;
    char text[TSRV_ADDRESS_SIZE];
    for (int i = 0; i < count; i++) {
        if (tsrvi_address_get(fds[i], tsrvi_getsockname, &address) == TSRV_OK) {
            tsrvi_log(TSRV_LOG_INFO, "listening on %s",
                      tsrv_address_format(&address, text, sizeof(text)));
        }
    }
}

TSRV_API int tsrv_server_listen(tsrv_server *server, int port, const char *address,
                                const tsrv_bind_options *options)
{
    int fds[TSRVI_LISTEN_MAX], count = 0;
    int rc = tsrvi_server_attach(server);
    if (rc == TSRV_OK) {
        rc = count = tsrv_bind_sockets(port, address, options, fds, TSRVI_LISTEN_MAX);
    }
    for (int i = 0; i < count; i++) {
        tsrvi_loop_opened_fd(server->loop, fds[i]);
    }
    if (count > 0) {
        rc = tsrv_server_add_sockets(server, fds, count);
    }
    if (rc < 0) {
        tsrvi_server_log_failure("listen", port, address, rc);
        return rc;
    }
    tsrvi_server_log_bound(fds, count);
    return TSRV_OK;
}

TSRV_API int tsrv_server_add_stream(tsrv_server *server, int fd)
{
    int rc = tsrvi_streaming(fd = tsrvi_fd_own(fd)); /* inetd hands over 0 */
    tsrv_address peer;
    tsrv_stream *stream;
    if (rc == TSRV_OK) {
        rc = tsrvi_server_attach(server);
    } else if (rc == TSRV_EINVAL) {
        tsrvi_mistake(__func__, "fd is no stream socket");
    }
    if (rc == TSRV_OK && tsrvi_address_get(fd, tsrvi_getpeername, &peer) < 0) {
        /* A peer that has gone again: the handler will see. Of a unix socket that much is known. */
        peer.size = tsrvi_address_get(fd, tsrvi_getsockname, &peer) == TSRV_OK &&
                            tsrv_address_family(&peer) == AF_UNIX
                        ? (uint32_t)offsetof(struct sockaddr_un, sun_path)
                        : 0;
    }
    if (rc < 0 || (rc = tsrvi_set_flags(fd)) < 0) {
        tsrvi_close_fd(fd);
        return rc;
    }
    tsrvi_loop_opened_fd(server->loop, fd);
    if ((rc = tsrvi_server_admit_stream(server, fd, &peer, false, &stream)) < 0) {
        return rc;
    }
    tsrvi_server_dress(&server->options, fd, tsrv_address_family(&peer) != AF_UNIX);
    tsrvi_server_started(server); /* on_start comes before the handler */
    tsrvi_stream_later(stream);
    return TSRV_OK;
}

static void tsrvi_server_unbind(tsrv_server *server)
{
    for (int i = 0; i < server->bound_count; i++) {
        tsrvi_bound_close(server->bound[i].fd);
    }
    server->bound_count = 0;
}

/* One more socket that is to be accepted on; after an error it has been closed. */
static int tsrvi_bound_add(tsrv_server *server, int fd, int backlog, int rank, int worker)
{
    size_t count = (size_t)server->bound_count + 1;
    tsrvi_bound *bound = (tsrvi_bound *)TSRV_REALLOC(server->bound, count * sizeof(*bound));
    if (bound == NULL) {
        tsrvi_bound_close(fd);
        return -ENOMEM;
    }
    server->bound = bound;
    bound += server->bound_count++;
    bound->fd = fd;
    bound->backlog = backlog;
    bound->rank = rank;
    bound->worker = worker;
    return TSRV_OK;
}

/* In an upgrade all sockets of an address are taken, of which reuse_port has one for each worker.
 */
static int tsrvi_bound_add_handed(tsrv_server *server, int fd, const tsrv_bind_options *options)
{
    tsrv_address address;
    tsrvi_sockaddr inside;
    int backlog = tsrvi_backlog(options), rank = 1, more;
    int rc = tsrvi_bound_add(server, fd, backlog, 0, -1);
    if (rc < 0 || tsrvi_address_get(fd, tsrvi_getsockname, &address) < 0) {
        return rc;
    }
    tsrvi_address_load(&address, &inside);
    while (rc == TSRV_OK && (more = tsrvi_bound_take(&inside, address.size, options)) >= 0) {
        rc = tsrvi_bound_add(server, more, backlog, rank++, -1);
    }
    return rc;
}

TSRV_API int tsrv_server_bind(tsrv_server *server, int port, const char *address,
                              const tsrv_bind_options *options)
{
    int fds[TSRVI_LISTEN_MAX], count, had = server->bound_count, rc;
    if (server->started) {
        return tsrv_server_listen(server, port, address, options);
    }
    rc = count = tsrv_bind_sockets(port, address, options, fds, TSRVI_LISTEN_MAX);
    for (int i = 0; i < count; i++) {
        if (rc < 0) {
            tsrvi_bound_close(fds[i]);
        } else {
            rc = tsrvi_bound_add_handed(server, fds[i], options);
        }
    }
    if (rc < 0) {
        while (server->bound_count > had) {
            tsrvi_bound_close(server->bound[--server->bound_count].fd);
        }
        tsrvi_server_log_failure("bind", port, address, rc);
        return rc;
    }
    tsrvi_server_log_bound(fds, count);
    return TSRV_OK;
}

/* Close all listeners, at once. Returns whether there were any. */
static bool tsrvi_server_unlisten(tsrv_server *server)
{
    bool any = false;
    tsrvi_server_unbind(server);
    for (tsrvi_listener *one = server->listeners; one != NULL; one = one->next) {
        any = any || one->io.fd >= 0;
        tsrvi_listener_close(one);
    }
    return any;
}

/* The same, after what waits in their queues has been taken. */
static bool tsrvi_server_stop(tsrv_server *server)
{
    for (tsrvi_listener *one = server->listeners; one != NULL; one = one->next) {
        if (one->io.fd >= 0) {
            tsrvi_listener_empty(one);
        }
    }
    return tsrvi_server_unlisten(server);
}

TSRV_API void tsrv_server_stop(tsrv_server *server)
{
    tsrvi_server_stop(server);
}

TSRV_API int tsrv_server_address(tsrv_server *server, int index, tsrv_address *address)
{
    memset(address, 0, sizeof(*address));
    if (index >= 0 && index < server->bound_count) {
        return tsrvi_address_get(server->bound[index].fd, tsrvi_getsockname, address);
    }
    for (tsrvi_listener *one = server->listeners; one != NULL; one = one->next) {
        if (one->io.fd >= 0 && index-- == 0) {
            return tsrvi_address_get(one->io.fd, tsrvi_getsockname, address);
        }
    }
    return TSRV_EINVAL;
}

TSRV_API tsrv_stream *tsrv_server_next(tsrv_server *server, tsrv_stream *stream)
{
    tsrvi_link *link = stream == NULL ? server->streams.next : stream->link.next;
    for (; link != &server->streams; link = link->next) {
        tsrv_stream *found = TSRVI_CONTAINER(link, tsrv_stream, link);
        if (found->end == 0 && (tsrvi_proxy_of(found) == NULL || tsrvi_proxy_of(found)->admitted)) {
            return found;
        }
    }
    return NULL;
}

TSRV_API void tsrv_server_stats(tsrv_server *server, tsrv_stats *stats)
{
    *stats = server->own;
    tsrvi_stats_gather(stats, server->number, tsrvi_worker_id());
}

TSRV_API int tsrv_server_worker_stats(tsrv_server *server, int task_id, tsrv_stats *stats)
{
    memset(stats, 0, sizeof(*stats));
    if (task_id < -1 || task_id >= tsrvi_process.place_count / TSRVI_GENERATIONS) {
        return TSRV_EINVAL;
    }
    if (task_id < 0) {
        *stats = server->own; /* all of it where there are no workers */
    }
    tsrvi_stats_gather(stats, server->number, task_id);
    return TSRV_OK;
}

/* ============================================================================
 * >>metrics  Counters as text
 * ==========================================================================*/

typedef struct tsrvi_metric {
    const char *name; /* samples of one name stand together */
    const char *type;
    const char *help;
    const char *reason; /* "" = no such label */
    size_t field;       /* in tsrv_stats */
    bool is_ms;         /* told in seconds */
} tsrvi_metric;

#define TSRVI_METRIC(name, type, field, help)                    \
    {                                                            \
        name, type, help, "", offsetof(tsrv_stats, field), false \
    }
#define TSRVI_METRIC_ENDED(reason, field)                                        \
    {                                                                            \
        "tsrv_connections_ended_total", "counter", "Ended connections.", reason, \
            offsetof(tsrv_stats, field), false                                   \
    }
#define TSRVI_METRIC_TIME(name, field, help)                       \
    {                                                              \
        name, "gauge", help, "", offsetof(tsrv_stats, field), true \
    }

static const tsrvi_metric tsrvi_metrics[] = {
    TSRVI_METRIC("tsrv_connections_accepted_total", "counter", accepted, "Accepted connections."),
    TSRVI_METRIC("tsrv_connections_open", "gauge", open, "Open connections."),
    TSRVI_METRIC("tsrv_connections_closed_total", "counter", closed, "Closed connections."),
    TSRVI_METRIC("tsrv_connections_refused_total", "counter", refused,
                 "Connections reset at once, by a limit or by the program."),
    TSRVI_METRIC_ENDED("well", ended_well),
    TSRVI_METRIC_ENDED("reset", ended_reset),
    TSRVI_METRIC_ENDED("timeout", ended_timeout),
    TSRVI_METRIC_ENDED("here", ended_here),
    TSRVI_METRIC_ENDED("error", ended_error),
    TSRVI_METRIC("tsrv_received_bytes_total", "counter", bytes_in, "Bytes received."),
    TSRVI_METRIC("tsrv_sent_bytes_total", "counter", bytes_out, "Bytes that the kernel has taken."),
    TSRVI_METRIC("tsrv_accept_pauses_total", "counter", accept_pauses, "Pauses of listeners."),
    TSRVI_METRIC("tsrv_accept_errors_total", "counter", accept_errors, "Failures to accept."),
    TSRVI_METRIC("tsrv_tls_handshakes_failed_total", "counter", handshakes_failed,
                 "TLS handshakes that failed."),
    TSRVI_METRIC("tsrv_worker_restarts_total", "counter", restarts,
                 "Restarts of workers after a bad end."),
    TSRVI_METRIC("tsrv_proxy_headers_failed_total", "counter", proxies_failed,
                 "Connections without a good PROXY header."),
    TSRVI_METRIC("tsrv_loop_slow_turns_total", "counter", slow_turns,
                 "Turns of the loop that took longer than slow_ms."),
    TSRVI_METRIC_TIME("tsrv_loop_turn_max_seconds", turn_max_ms, "The longest turn of the loop."),
    TSRVI_METRIC_TIME("tsrv_loop_lag_seconds", lag_ms, "How late the loop was when last measured."),
    TSRVI_METRIC_TIME("tsrv_loop_lag_max_seconds", lag_max_ms, "The most that a loop was late."),
};

typedef struct tsrvi_text {
    char *buffer;
    size_t size;
    size_t length; /* of all, also of what did not fit */
} tsrvi_text;

static TSRVI_PRINTF(2, 3) void tsrvi_text_add(tsrvi_text *text, const char *format, ...)
{
    size_t used = tsrvi_min(text->length, text->size);
    va_list arguments;
    int more;
    va_start(arguments, format);
    more = vsnprintf(text->size == 0 ? NULL : text->buffer + used, text->size - used, format,
                     arguments);
    va_end(arguments);
    text->length += more > 0 ? (size_t)more : 0;
}

static void tsrvi_metric_add(tsrvi_text *text, const tsrvi_metric *metric, const tsrv_stats *stats,
                             int worker)
{
    uint64_t value;
    memcpy(&value, (const char *)stats + metric->field, sizeof(value));
    tsrvi_text_add(text, "%s{worker=\"%d\"", metric->name, worker);
    if (metric->reason[0] != 0) {
        tsrvi_text_add(text, ",reason=\"%s\"", metric->reason);
    }
    if (metric->is_ms) {
        tsrvi_text_add(text, "} %llu.%03u\n", (unsigned long long)(value / 1000),
                       (unsigned)(value % 1000));
    } else {
        tsrvi_text_add(text, "} %llu\n", (unsigned long long)value);
    }
}

TSRV_API int tsrv_metrics_format(tsrv_server *server, char *buffer, size_t size)
{
    tsrvi_text text = {buffer, size, 0};
    tsrv_stats stats;
    for (size_t i = 0; i < sizeof(tsrvi_metrics) / sizeof(tsrvi_metrics[0]); i++) {
        const tsrvi_metric *metric = &tsrvi_metrics[i];
        int worker = 0;
        if (i == 0 || strcmp(metric->name, metric[-1].name) != 0) {
            tsrvi_text_add(&text, "# HELP %s %s\n# TYPE %s %s\n", metric->name, metric->help,
                           metric->name, metric->type);
        }
        while (server->number >= 0 && tsrv_server_worker_stats(server, worker, &stats) == TSRV_OK) {
            tsrvi_metric_add(&text, metric, &stats, worker++);
        }
        if (worker == 0) { /* there are no workers, or too many servers for them to share */
            tsrvi_metric_add(&text, metric, &server->own,
                             tsrvi_worker_id() < 0 ? 0 : tsrvi_worker_id());
        }
    }
    return (int)text.length;
}

/* ============================================================================
 * >>client  Connecting
 *
 * The streams of tsrv_connect are streams like any other. They belong to a
 * server of the loop's that nobody sees, which listens on nothing; in place of a
 * handler the program holds them, until it calls tsrv_close.
 * ==========================================================================*/

#define TSRVI_CONNECT_MS 10000    /* default limit */
#define TSRVI_CONNECT_RETRY_MS 5  /* while a unix socket's queue is full */
#define TSRVI_CONNECT_STEP_MS 250 /* before the next address is tried, too: RFC 8305, section 8 */

static int tsrvi_client_unused(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream;
    (void)address;
    (void)context;
    return TSRV_EINVAL;
}

/* The server that client streams belong to, made on first use. */
static int tsrvi_client_server(tsrv_loop *loop)
{
    tsrv_server_options options;
    int rc;
    if (loop->servers.clients != NULL) {
        return TSRV_OK;
    }
    memset(&options, 0, sizeof(options));
    options.handle_stream = tsrvi_client_unused;
    options.loop = loop;
    rc = tsrv_server_new(&loop->servers.clients, &options);
    if (rc == TSRV_OK) {
        tsrvi_server_number_free(loop->servers.clients->number); /* nobody asks for its counters */
        loop->servers.clients->number = -1;
        loop->servers.clients->starting = false;
    }
    if (rc == TSRV_OK && (rc = tsrvi_server_attach(loop->servers.clients)) < 0) {
        tsrvi_server_move(loop->servers.clients, NULL);
        TSRV_FREE(loop->servers.clients);
        loop->servers.clients = NULL;
    }
    return rc;
}

/* A stream of a socket that is connected. Takes fd over. */
static int tsrvi_client_stream(tsrv_loop *loop, int fd, const struct sockaddr *address,
                               socklen_t size, tsrv_stream **stream)
{
    tsrv_address peer;
    int rc;
    tsrvi_address_store(&peer, address, size);
    if ((rc = tsrvi_stream_new(loop->servers.clients, fd, &peer, stream)) < 0) {
        tsrvi_loop_close_fd(loop, fd);
        return rc;
    }
    tsrvi_server_dress(&loop->servers.clients->options, fd, address->sa_family != AF_UNIX);
    tsrvi_wait_remove(*stream, &(*stream)->own); /* the program is its handler */
    tsrvi_own_set(*stream, TSRVI_ENTERED);
    (*stream)->state = TSRVI_RUNNING;
    return TSRV_OK;
}

/* To a unix socket, for which nothing has to be waited: others run first, all the same. Where a
 * listener's queue is full Linux says EAGAIN, and nothing tells when it is not any more. */
static int tsrvi_client_connect_unix(tsrv_loop *loop, const tsrvi_sockaddr *address, socklen_t size,
                                     uint64_t due, tsrv_stream **stream)
{
    int rc = tsrv_sleep(0), fd = rc < 0 ? rc : tsrvi_socket(AF_UNIX, SOCK_STREAM);
    rc = fd;
    tsrvi_loop_opened_fd(loop, fd);
    while (rc >= 0 && TSRV_SYS(connect, (fd, &address->any, size)) < 0) {
        rc = errno == EINTR         ? TSRV_OK
             : errno != EAGAIN      ? tsrvi_error()
             : tsrvi_clock() >= due ? (int)TSRV_ETIMEOUT
                                    : tsrv_sleep(TSRVI_CONNECT_RETRY_MS);
    }
    if (rc < 0) {
        tsrvi_loop_close_fd(loop, fd);
        return rc;
    }
    return tsrvi_client_stream(loop, fd, &address->any, size, stream);
}

/* What tsrv_connect was asked for: whoever has asked may use the memory again while it waits. */
typedef struct tsrvi_client_wish {
    tsrv_connect_options options;
    tsrv_address client; /* proxy_for */
    char name[256];      /* whose certificate it must be; DNS has no longer ones */
} tsrvi_client_wish;

static int tsrvi_client_wish_make(tsrvi_client_wish *wish, const char *host,
                                  const tsrv_connect_options *options)
{
    const char *name =
        options != NULL && options->server_name != NULL ? options->server_name : host;
    memset(wish, 0, sizeof(*wish));
    if (options != NULL) {
        wish->options = *options;
        if (options->proxy_for != NULL) {
            wish->client = *options->proxy_for;
        }
    }
    snprintf(wish->name, sizeof(wish->name), "%s", name);
    return strlen(name) < sizeof(wish->name) && strlen(host) < sizeof(wish->name)
               ? (int)TSRV_OK
               : tsrvi_mistake("tsrv_connect", "host or server_name is too long");
}

/* Say whose connection it is, before anything else. */
static int tsrvi_client_introduce(tsrv_stream *stream, const tsrvi_client_wish *wish)
{
    char header[TSRVI_PROXY_LARGEST];
    tsrv_address to;
    if (wish->options.proxy_for == NULL) {
        return TSRV_OK;
    }
    tsrv_peer_address(stream, &to);
    return tsrv_write(stream, header, tsrvi_proxy_build(&wish->client, &to, header));
}

/* The handshake of a new client stream, if there is to be one; one that fails is given back. */
static int tsrvi_client_secure(tsrv_stream **stream, const tsrvi_client_wish *wish, uint64_t due)
{
    int rc = tsrvi_client_introduce(*stream, wish);
    if (rc == TSRV_OK && wish->options.tls != NULL) {
        rc = tsrv_start_tls(*stream, wish->options.tls, wish->name);
    }
    if (rc == TSRV_OK && wish->options.tls != NULL) {
        (*stream)->own_due_ms = tsrvi_ms_at(tsrvi_loop_of(*stream), due);
        rc = tsrv_wait_for_handshake(*stream);
    }
    if (rc < 0) {
        tsrv_abort(*stream);
        tsrv_close(*stream);
        *stream = NULL;
    }
    return rc;
}

/* ---- names -----------------------------------------------------------------*/

/* Milliseconds until `due`, at least 1; TSRV_NEVER. */
static int tsrvi_client_left_ms(uint64_t due)
{
    uint64_t now = tsrvi_clock(), left = due > now ? (due - now) / TSRVI_MS + 1 : 1;
    return due == TSRVI_FOREVER ? TSRV_NEVER : left > INT_MAX ? INT_MAX : (int)left;
}

/* A name that a thread looks up. Who has asked may be gone by the time it is found. */
typedef struct tsrvi_lookup {
    tsrv_loop *loop;
    tsrvi_co *co; /* NULL = nobody waits any more */
    struct addrinfo *all;
    int port;
    int rc;
    bool over;
    char host[1]; /* and more */
} tsrvi_lookup;

static void tsrvi_lookup_run(void *context)
{
    tsrvi_lookup *lookup = (tsrvi_lookup *)context;
    lookup->rc = tsrvi_resolve(lookup->host, lookup->port, 0, 0, &lookup->all);
}

static void tsrvi_lookup_end(void *context)
{
    tsrvi_lookup *lookup = (tsrvi_lookup *)context;
    lookup->loop->servers.lookups--;
    tsrv_condition_notify(&lookup->loop->servers.lookup_over, 1);
    lookup->over = true;
    if (lookup->co != NULL) {
        tsrvi_co_wake(lookup->co, TSRV_OK);
    } else {
        if (lookup->all != NULL) {
            TSRV_SYS(freeaddrinfo, (lookup->all));
        }
        TSRV_FREE(lookup);
    }
}

/* Names may use half of the threads: a name server that does not answer leaves the rest to work. */
static int tsrvi_lookup_begin(tsrv_loop *loop, tsrvi_lookup *lookup, uint64_t due)
{
    int rc;
    while (loop->servers.lookups >= (loop->work.most + 1) / 2) {
        rc = tsrv_condition_wait(&loop->servers.lookup_over, tsrvi_client_left_ms(due));
        if (rc < 0) {
            return rc;
        }
    }
    rc = tsrv_work(loop, tsrvi_lookup_run, tsrvi_lookup_end, lookup);
    if (rc < 0) {
        tsrv_condition_notify(&loop->servers.lookup_over, 1); /* its turn is the next one's */
    } else {
        loop->servers.lookups++;
    }
    return rc;
}

/* The addresses of a name; without threads this blocks. */
static int tsrvi_client_lookup(tsrv_loop *loop, const char *host, int port, uint64_t due,
                               struct addrinfo **all)
{
    size_t size = strlen(host);
    tsrvi_lookup *lookup;
    int rc;
    if (!TSRVI_HAS_THREADS) {
        return tsrvi_resolve(host, port, 0, 0, all);
    }
    lookup = (tsrvi_lookup *)tsrvi_zalloc(sizeof(*lookup) + size);
    if (lookup == NULL) {
        return -ENOMEM;
    }
    memcpy(lookup->host, host, size);
    lookup->loop = loop;
    lookup->port = port;
    lookup->co = loop->coroutines.running;
    if ((rc = tsrvi_lookup_begin(loop, lookup, due)) < 0) {
        TSRV_FREE(lookup);
        return rc;
    }
    rc = tsrvi_co_wait(lookup->co, due);
    if (!lookup->over) {
        lookup->co = NULL; /* its end frees it */
        return rc;
    }
    *all = lookup->all;
    rc = rc < 0 ? rc : lookup->rc;
    if (rc < 0 && lookup->all != NULL) {
        TSRV_SYS(freeaddrinfo, (lookup->all));
        *all = NULL;
    }
    TSRV_FREE(lookup);
    return rc;
}

/* The addresses of a host. A number, also in brackets, needs no looking up. */
static int tsrvi_client_resolve(tsrv_loop *loop, const char *host, int port, uint64_t due,
                                struct addrinfo **all)
{
    char number[INET6_ADDRSTRLEN + 16]; /* and a zone */
    size_t size = strlen(host);
    int rc;
    if (size >= 2 && host[0] == '[' && host[size - 1] == ']') {
        if (size - 2 >= sizeof(number)) {
            return TSRV_ERESOLVE;
        }
        memcpy(number, host + 1, size - 2);
        number[size - 2] = 0;
        return tsrvi_resolve(number, port, AF_INET6, AI_NUMERICHOST, all);
    }
    rc = tsrvi_resolve(host, port, 0, AI_NUMERICHOST, all);
    return rc == TSRV_ERESOLVE && size != 0 ? tsrvi_client_lookup(loop, host, port, due, all) : rc;
}

/* ---- addresses -------------------------------------------------------------*/

/* A port of this host that nobody listens on may be given to the connecting socket itself, which
 * then meets itself (RFC 9293, simultaneous open). */
static bool tsrvi_client_met_itself(int fd)
{
    tsrv_address here, there;
    return tsrvi_address_get(fd, tsrvi_getsockname, &here) == TSRV_OK &&
           tsrvi_address_get(fd, tsrvi_getpeername, &there) == TSRV_OK &&
           tsrvi_address_same(&here, &there);
}

/* One address. */
typedef struct tsrvi_dial {
    tsrvi_io io; /* fd -1 = not begun, or over */
    const struct addrinfo *info;
    tsrvi_co *co;
    bool told; /* its connect(2) has come to an end */
} tsrvi_dial;

static void tsrvi_dial_event(tsrvi_io *io, int events)
{
    tsrvi_dial *dial = TSRVI_CONTAINER(io, tsrvi_dial, io);
    (void)events;
    dial->told = true;
    tsrvi_co_wake(dial->co, TSRV_OK);
}

/* Families in turn, that of the first address first. Returns how many there are. */
static int tsrvi_dials_order(tsrvi_dial *dials, const struct addrinfo *all)
{
    const struct addrinfo *same = all, *other = all;
    int count = 0;
    while (same != NULL || other != NULL) {
        for (; same != NULL && same->ai_family != all->ai_family; same = same->ai_next) {
        }
        for (; other != NULL && other->ai_family == all->ai_family; other = other->ai_next) {
        }
        if (same != NULL) {
            dials[count++].info = same;
            same = same->ai_next;
        }
        if (other != NULL) {
            dials[count++].info = other;
            other = other->ai_next;
        }
    }
    return count;
}

/* Returns TSRV_OK: connected; TSRV_EAGAIN: it goes on by itself, also after EINTR (POSIX); or why
 * not. */
static int tsrvi_dial_begin(tsrv_loop *loop, tsrvi_dial *dial)
{
    int fd = tsrvi_socket(dial->info->ai_family, SOCK_STREAM), rc;
    if (fd < 0) {
        return fd;
    }
    tsrvi_loop_opened_fd(loop, fd);
    dial->io.fd = fd;
    dial->io.on_event = tsrvi_dial_event;
    dial->co = loop->coroutines.running;
    if (TSRV_SYS(connect, (fd, dial->info->ai_addr, dial->info->ai_addrlen)) < 0) {
        rc = errno == EINPROGRESS || errno == EINTR ? (int)TSRV_EAGAIN : tsrvi_error();
        if (rc == TSRV_EAGAIN) {
            int code = tsrvi_poller_set(&loop->poller, &dial->io, TSRV_WRITABLE);
            rc = code < 0 ? code : rc;
        }
        return rc;
    }
    return tsrvi_client_met_itself(fd) ? -ECONNREFUSED : TSRV_OK;
}

/* How has it come to its end? */
static int tsrvi_dial_result(const tsrvi_dial *dial)
{
    int error = 0;
    socklen_t size = sizeof(error);
    if (TSRV_SYS(getsockopt, (dial->io.fd, SOL_SOCKET, SO_ERROR, &error, &size)) < 0) {
        return tsrvi_error();
    }
    return error != 0 ? -error : tsrvi_client_met_itself(dial->io.fd) ? -ECONNREFUSED : TSRV_OK;
}

/* Give up its socket. */
static void tsrvi_dial_end(tsrv_loop *loop, tsrvi_dial *dial)
{
    if (dial->io.fd >= 0) {
        tsrvi_poller_set(&loop->poller, &dial->io, 0);
        tsrvi_loop_close_fd(loop, dial->io.fd);
        dial->io.fd = -1;
    }
}

/* The first of those that have come to their end well; else -1, and the others are given up.
 *   rc  receives why the last of them was not
 * Returns its index. */
static int tsrvi_dials_look(tsrv_loop *loop, tsrvi_dial *dials, int begun, int *rc)
{
    for (int i = 0; i < begun; i++) {
        if (dials[i].io.fd >= 0 && dials[i].told) {
            *rc = tsrvi_dial_result(&dials[i]);
            if (*rc == TSRV_OK) {
                return i;
            }
            tsrvi_dial_end(loop, &dials[i]);
        }
    }
    return -1;
}

static bool tsrvi_dials_go_on(const tsrvi_dial *dials, int begun)
{
    while (begun > 0 && dials[begun - 1].io.fd < 0) {
        begun--;
    }
    return begun > 0;
}

/* Try them until one is connected. Returns its index, or why there is none. */
static int tsrvi_dials_run(tsrv_loop *loop, tsrvi_dial *dials, int count, uint64_t due)
{
    int begun = 0, rc = TSRV_ERESOLVE, winner, code;
    uint64_t step = 0;
    for (;;) {
        bool waits = tsrvi_dials_go_on(dials, begun);
        if (begun < count && (!waits || tsrvi_clock() >= step)) {
            code = tsrvi_dial_begin(loop, &dials[begun++]);
            if (code == TSRV_OK) {
                return begun - 1;
            }
            if (code != TSRV_EAGAIN) {
                rc = code;
                tsrvi_dial_end(loop, &dials[begun - 1]);
            }
            step = code == TSRV_EAGAIN ? tsrvi_after(tsrvi_clock(), TSRVI_CONNECT_STEP_MS) : 0;
            continue;
        }
        if (!waits) {
            return rc;
        }
        code =
            tsrvi_co_wait(loop->coroutines.running, begun < count ? tsrvi_earlier(step, due) : due);
        if (code == TSRV_ECLOSED || (code == TSRV_ETIMEOUT && due <= tsrvi_clock())) {
            return code;
        }
        if (code == TSRV_OK) {
            if ((winner = tsrvi_dials_look(loop, dials, begun, &rc)) >= 0) {
                return winner;
            }
            step = 0; /* one has failed: the next, at once */
        }
    }
}

/* A stream connected to the first of these addresses that answers. */
static int tsrvi_client_try_all(tsrv_loop *loop, const struct addrinfo *all, uint64_t due,
                                tsrv_stream **stream)
{
    tsrvi_dial *dials;
    int count = 0, rc;
    for (const struct addrinfo *info = all; info != NULL; info = info->ai_next) {
        count++;
    }
    dials = (tsrvi_dial *)tsrvi_zalloc((size_t)count * sizeof(*dials));
    if (dials == NULL) {
        return -ENOMEM;
    }
    for (int i = 0; i < count; i++) {
        dials[i].io.fd = -1;
    }
    rc = tsrvi_dials_run(loop, dials, tsrvi_dials_order(dials, all), due);
    if (rc >= 0) {
        tsrvi_dial *won = &dials[rc];
        int fd = won->io.fd;
        tsrvi_poller_set(&loop->poller, &won->io, 0);
        won->io.fd = -1;
        rc = tsrvi_client_stream(loop, fd, won->info->ai_addr, won->info->ai_addrlen, stream);
    }
    for (int i = 0; i < count; i++) {
        tsrvi_dial_end(loop, &dials[i]);
    }
    TSRV_FREE(dials);
    return rc;
}

TSRV_API int tsrv_connect(const char *host, int port, const tsrv_connect_options *options,
                          tsrv_stream **stream)
{
    tsrv_loop *loop = tsrvi_thread.running;
    int limit_ms = tsrvi_default_ms(options == NULL ? 0 : options->timeout_ms, TSRVI_CONNECT_MS);
    uint64_t due = tsrvi_after(tsrvi_clock(), limit_ms);
    struct addrinfo *all = NULL;
    tsrvi_client_wish wish;
    tsrvi_sockaddr inside;
    socklen_t size = 0;
    int rc;
    *stream = NULL;
    if (!TSRVI_HAS_COROUTINES) {
        return TSRV_ENOTSUP;
    }
    if (TSRVI_WRONG(host == NULL)) {
        return TSRV_EINVAL;
    }
    if (loop == NULL || loop->coroutines.running == NULL) {
        return tsrvi_mistake_no_coroutine(__func__);
    }
    /* Who waits while the loop is being freed is dropped, and what it has begun would be left. */
    if ((rc = loop->closing ? (int)TSRV_ECLOSED : tsrvi_client_wish_make(&wish, host, options)) <
            0 ||
        (rc = tsrvi_client_server(loop)) < 0) {
        return rc;
    }
    if (strncmp(host, "unix:", 5) == 0) {
        rc = tsrvi_unix_address(host + 5, &inside, &size);
        rc = rc < 0 ? rc : tsrvi_client_connect_unix(loop, &inside, size, due, stream);
    } else if (TSRVI_WRONG(port <= 0 || port > 65535)) {
        return TSRV_EINVAL;
    } else if ((rc = tsrvi_client_resolve(loop, host, port, due, &all)) == TSRV_OK) {
        rc = tsrvi_client_try_all(loop, all, due, stream);
        TSRV_SYS(freeaddrinfo, (all));
    }
    return rc == TSRV_OK ? tsrvi_client_secure(stream, &wish, due) : rc;
}

/* ============================================================================
 * >>drain  Draining servers, freeing servers and loops
 *
 * A drain gives each stream the end of its input at a moment when nothing is
 * under way: handlers that treat TSRV_EOF rightly drain rightly. Streams are
 * asked when they come to rest, and all of them every TSRVI_DRAIN_LOOK, since
 * time too makes them idle.
 * ==========================================================================*/

#define TSRVI_DRAIN_LOOK (60 * TSRVI_MS)
#define TSRVI_DRAIN_LAST_MS 1000 /* for handlers to return after the grace */

/* The coroutine that the stream's handler runs in; NULL = none. */
static tsrvi_co *tsrvi_stream_coroutine(const tsrv_stream *stream)
{
    return stream->server->options.mode == TSRV_COROUTINE && stream->state == TSRVI_RUNNING
               ? stream->own.u.co
               : NULL;
}

/* Abort the server's streams. A handler that waits for something else than its stream is woken too,
 * once. */
static void tsrvi_server_abort(tsrv_server *server)
{
    tsrvi_server_unlisten(server);
    TSRVI_EACH(tsrv_stream, stream, &server->streams, link) {
        bool ended = stream->end != 0;
        tsrv_abort(stream);
        if (ended) {
            tsrvi_stream_rouse(stream); /* which an end does only once by itself */
        }
        if (tsrvi_stream_coroutine(stream) != NULL) {
            tsrvi_co_doom(stream->own.u.co);
        }
        if (stream->state == TSRVI_NEW) {
            tsrvi_stream_over(stream, TSRV_ECLOSED); /* nobody will call its handler any more */
        }
    }
}

/* ---- drain -----------------------------------------------------------------*/

/* Have tsrv_server_drain return code wherever it waits. Returns whether it did. */
static bool tsrvi_server_wake_drains(tsrv_server *server, int code)
{
    bool any = server->drain_over.first != NULL;
    while (server->drain_over.first != NULL) {
        tsrvi_co *co = server->drain_over.first;
        tsrvi_co_leave(co);
        tsrvi_co_wake(co, code);
    }
    return any;
}

/* The loop stops when the last of its servers has been drained. */
static void tsrvi_loop_left(tsrv_loop *loop)
{
    TSRVI_EACH(tsrv_server, server, &loop->servers.all, link) {
        if (server->draining) {
            return;
        }
    }
    if (loop->leaving) {
        loop->leaving = false;
        loop->stopping = true;
    }
}

/* The drain is over. Who waits learns how; else the next tsrv_server_drain does. */
static void tsrvi_server_drained(tsrv_server *server)
{
    int code = server->forced ? (int)TSRV_ETIMEOUT : (int)TSRV_OK;
    tsrvi_heap_remove(&server->loop->heap, &server->drain);
    tsrvi_log(TSRV_LOG_INFO, "drain: over, %llu connections have ended, %llu were aborted",
              (unsigned long long)server->drained, (unsigned long long)server->drain_aborted);
    server->draining = false;
    server->drain_code = tsrvi_server_wake_drains(server, code) ? (int)TSRV_OK : code;
    tsrvi_loop_left(server->loop);
}

/* The grace is over: abort what is left. */
static void tsrvi_server_force(tsrv_server *server)
{
    for (tsrvi_link *link = server->streams.next; link != &server->streams; link = link->next) {
        server->drain_aborted++;
    }
    tsrvi_log(TSRV_LOG_WARNING, "drain: the grace is over, %llu connections are aborted",
              (unsigned long long)server->drain_aborted);
    server->forced = true;
    server->drain_due = tsrvi_after(server->loop->now, TSRVI_DRAIN_LAST_MS);
    tsrvi_server_abort(server);
}

/* Look at every stream: time makes them idle too. */
static void tsrvi_server_look(tsrv_server *server)
{
    TSRVI_EACH(tsrv_stream, stream, &server->streams, link) {
        tsrvi_stream_drain(stream);
    }
    tsrvi_heap_set(&server->loop->heap, &server->drain,
                   tsrvi_earlier(server->loop->now + TSRVI_DRAIN_LOOK, server->drain_due));
}

static void tsrvi_server_drain_timer(tsrvi_timer *timer)
{
    tsrv_server *server = TSRVI_CONTAINER(timer, tsrv_server, drain);
    bool due = server->drain_due <= server->loop->now;
    if (due && server->forced) {
        tsrvi_log(TSRV_LOG_WARNING, "drain: handlers still run, and are not waited for");
        tsrvi_server_drained(server);
        return;
    }
    if (due) {
        tsrvi_server_force(server);
    }
    tsrvi_server_look(server);
}

/* Stop, tell every stream, and see which are idle already. */
static void tsrvi_server_drain_start(tsrv_server *server)
{
    unsigned long open = 0;
    server->draining = true;
    server->forced = false;
    server->drained = 0;
    server->drain_aborted = 0;
    server->drain.fire = tsrvi_server_drain_timer;
    server->drain_due = TSRVI_FOREVER;
    TSRVI_EACH(tsrv_stream, stream, &server->streams, link) {
        tsrvi_set(stream, TSRVI_DRAINING);
        tsrv_wake(stream);
        open++;
    }
    tsrvi_log(TSRV_LOG_INFO, "drain: begins, %lu connections are open", open);
}

/* May the caller wait until the last stream has gone? Not where nothing waits, and not in one of
 * the handlers that are waited for. */
static bool tsrvi_server_drain_waits(const tsrv_server *server)
{
    if (server->loop->coroutines.running == NULL) {
        return false;
    }
    TSRVI_EACH(tsrv_stream, stream, &server->streams, link) {
        if (tsrvi_stream_coroutine(stream) == server->loop->coroutines.running) {
            return false;
        }
    }
    return true;
}

TSRV_API int tsrv_server_drain(tsrv_server *server, int grace_ms)
{
    tsrv_loop *loop = server->loop;
    bool stopped;
    int rc = server->drain_code;
    server->drain_code = TSRV_OK;
    if (loop == NULL) {
        tsrvi_server_unlisten(server); /* what was only bound */
    }
    if (loop == NULL || rc != TSRV_OK) {
        return rc;
    }
    if ((rc = tsrvi_loop_use(&loop)) < 0) {
        return rc;
    }
    stopped = tsrvi_server_stop(server);
    if (tsrvi_list_empty(&server->streams)) {
        if (stopped) {
            tsrvi_log(TSRV_LOG_INFO, "drain: over, no connection was open");
        }
        return TSRV_OK;
    }
    if (!server->draining) {
        tsrvi_server_drain_start(server);
    }
    if (!server->forced) {
        grace_ms = grace_ms == 0 ? server->options.grace_ms : grace_ms;
        server->drain_due = tsrvi_earlier(server->drain_due, tsrvi_after(tsrvi_clock(), grace_ms));
        tsrvi_server_look(server);
    }
    return tsrvi_server_drain_waits(server) ? tsrv_condition_wait(&server->drain_over, TSRV_NEVER)
                                            : (int)TSRV_EAGAIN;
}

/* Drain every server of the loop, which then stops.
 *   grace_ms  0 = each server's own
 *   most      it is the most that a server's own may be */
static void tsrvi_loop_leave(tsrv_loop *loop, int grace_ms, bool most)
{
    loop->leaving = true;
    TSRVI_EACH(tsrv_server, server, &loop->servers.all, link) {
        if (server != loop->servers.clients && !server->freed) {
            server->drain_code = TSRV_OK;
            if (most) {
                tsrv_server_drain(server, 0);
            }
            tsrv_server_drain(server, grace_ms);
        }
    }
    tsrvi_loop_left(loop);
}

/* End the grace of all drains of the loop, when it is asked to end for the second time: what is
 * left is aborted as soon as the loop looks at its timers. */
static void tsrvi_loop_cut(tsrv_loop *loop)
{
    TSRVI_EACH(tsrv_server, server, &loop->servers.all, link) {
        if (server->draining && !server->forced) {
            server->drain_due = loop->now;
            tsrvi_heap_set(&loop->heap, &server->drain, loop->now);
        }
    }
}

/* ---- free ------------------------------------------------------------------*/

/* Untie the server from its loop. */
static void tsrvi_server_detach(tsrv_server *server)
{
    if (server->loop != NULL) {
        tsrvi_heap_remove(&server->loop->heap, &server->retry);
        tsrvi_heap_remove(&server->loop->heap, &server->drain);
        server->loop->heap.reserved -= 2;
        tsrvi_server_move(server, &tsrvi_process.servers.list);
        server->loop = NULL;
        server->queued = server->draining = server->forced = false; /* it may get another one */
        server->paused = server->was_away = false;
        server->drain_code = TSRV_OK;
    }
}

static void tsrvi_server_destroy(tsrv_server *server)
{
    tsrv_loop *loop = server->loop;
    tsrvi_server_wake_drains(server, TSRV_ECLOSED);
    tsrvi_server_detach(server);
    tsrvi_server_move(server, NULL);
    if (loop != NULL) {
        tsrvi_loop_left(loop);
    }
    tsrvi_server_number_free(server->number);
    tsrvi_server_unbind(server);
    TSRV_FREE(server->proxies);
    TSRV_FREE(server->bound);
    TSRV_FREE(server->addresses.entries);
    while (server->listeners != NULL) {
        tsrvi_listener *listener = server->listeners;
        server->listeners = listener->next;
        TSRV_FREE(listener);
    }
    TSRV_FREE(server);
}

/* The server's task: on_start, the end of a drain, or its own. */
static void tsrvi_server_run(tsrvi_task *task)
{
    tsrv_server *server = TSRVI_CONTAINER(task, tsrv_server, task);
    bool empty = tsrvi_list_empty(&server->streams);
    server->queued = false;
    if (server->draining && empty) {
        tsrvi_server_drained(server);
    }
    if (server->freed && empty) {
        if (server->starting) {
            tsrvi_server_tell_ready(server); /* as below */
        }
        tsrvi_server_destroy(server);
    } else if (!server->freed && (tsrvi_server_listens(server) || !empty)) {
        /* not stopped before its turn, or it has accepted then */
        tsrvi_server_begin(server);
    } else if (server->starting) {
        tsrvi_server_tell_ready(server); /* others, which have waited for it */
    }
}

/* Forget who waits for the server's streams, and what they have lent: the stacks go. */
static void tsrvi_server_forget_waits(tsrv_server *server)
{
    TSRVI_EACH(tsrv_stream, stream, &server->streams, link) {
        tsrvi_output_drop(stream);
        stream->waits = NULL;
        stream->kinds = 0;
        if (tsrvi_stream_coroutine(stream) != NULL) {
            stream->own.u.co = NULL; /* an on_close that frees the server would end its wait */
        }
        stream->state = stream->state == TSRVI_OVER ? TSRVI_OVER : TSRVI_RUNNING;
    }
}

/* End streams whose handlers will not run any more. */
static void tsrvi_server_drop_streams(tsrv_server *server)
{
    tsrvi_server_forget_waits(server); /* in a fork's child they wait in the parent */
    while (!tsrvi_list_empty(&server->streams)) {
        tsrv_stream *stream = TSRVI_CONTAINER(server->streams.next, tsrv_stream, link);
        if (stream->state != TSRVI_OVER) {
            tsrvi_stream_over(stream, TSRV_ECLOSED);
        }
        tsrvi_stream_close_socket(stream, false);
        server->loop->soon.first = NULL; /* nobody will run what that has queued */
        server->loop->ready.first = NULL;
        tsrvi_stream_finish(stream);
    }
}

TSRV_API void tsrv_server_free(tsrv_server *server)
{
    tsrv_loop *loop = server == NULL ? NULL : server->loop;
    if (server == NULL) {
        return;
    }
    if (loop == NULL) {
        tsrvi_server_destroy(server);
        return;
    }
    tsrvi_heap_remove(&loop->heap, &server->drain);
    if (loop->poller.pid != TSRV_SYS(getpid, ())) {
        /* A fork's copy: the connections are the parent's, and go on, and count, there. */
        server->stats = &server->own;
        tsrvi_server_drop_streams(server);
        tsrvi_server_unlisten(server);
        tsrvi_server_destroy(server);
        return;
    }
    if (server->ending) {
        return; /* its own on_close frees it once more: who began goes on */
    }
    server->ending = true;
    server->draining = false;
    tsrvi_server_wake_drains(server, TSRV_ECLOSED);
    tsrvi_server_abort(server);
    if (loop->running) {
        server->freed = true;
        tsrvi_server_later(server);
        return;
    }
    server->starting = false;
    while (!tsrvi_list_empty(&server->streams) || server->queued) {
        if (tsrvi_loop_turns(loop, true, TSRV_NEVER) < 0 && loop->ready.first == NULL) {
            server->freed = true; /* a handler waits, and nothing turns: tsrv_loop_free ends it */
            return;
        }
    }
    tsrvi_server_destroy(server);
}

/* Timers, watches and signals are the program's memory: mark them as stopped, so that it may stop
 * them later. */
static void tsrvi_loop_orphan(tsrv_loop *loop)
{
    while (loop->sources.signals != NULL) {
        tsrv_signal_stop(loop->sources.signals);
    }
    for (uint32_t i = 0; i < loop->heap.count; i++) {
        loop->heap.items[i]->position = 0;
    }
    loop->heap.count = 0;
    for (int fd = 0; fd < loop->poller.page_count * TSRVI_PAGE; fd++) {
        tsrvi_io *io = tsrvi_poller_find(&loop->poller, fd);
        if (io != NULL) {
            tsrvi_poller_slot(&loop->poller, fd)->io = NULL;
            io->interest = 0;
        }
    }
}

TSRV_API int tsrv_loop_free(tsrv_loop *loop)
{
    size_t dropped;
    int rc;
    if (loop == NULL && (loop = tsrvi_thread.own) == NULL) {
        return TSRV_OK;
    }
    if ((rc = tsrvi_loop_use(&loop)) < 0) {
        return rc;
    }
    if (loop->running) {
        return TSRV_EBUSY;
    }
    TSRVI_EACH(tsrv_server, server, &loop->servers.all, link) {
        tsrvi_server_abort(server);
    }
    loop->closing = true;
    tsrvi_co_cancel_all(loop);
    while (loop->ready.first != NULL || loop->soon.first != NULL || loop->work.left != 0) {
        if (tsrvi_loop_turns(loop, true, loop->work.left != 0 ? TSRV_NEVER : 0) < 0) {
            TSRV_SYS(poll, (NULL, 0, 1)); /* the backend is broken: look for the work's end */
        }
    }
    tsrvi_work_end(&loop->work);
    tsrvi_loop_orphan(loop); /* before stacks go: some of what it marks is on them */
    TSRVI_EACH(tsrv_server, server, &loop->servers.all, link) {
        tsrvi_server_forget_waits(server);
    }
    dropped = tsrvi_co_drop_all(loop);
    if (dropped != 0) {
        tsrvi_log(TSRV_LOG_WARNING, "tsrv_loop_free: %lu coroutines still waited and were dropped",
                  (unsigned long)dropped);
    }
    loop->running = true; /* for on_close: a server that it frees goes here */
    while (!tsrvi_list_empty(&loop->servers.all)) {
        tsrv_server *server = TSRVI_CONTAINER(loop->servers.all.next, tsrv_server, link);
        tsrvi_server_drop_streams(server);
        if (server->freed || server == loop->servers.clients) {
            tsrvi_server_destroy(server);
        } else {
            tsrvi_server_detach(server);
        }
    }
    tsrvi_co_drop_all(loop); /* what on_close has started comes too late */
    tsrvi_loop_orphan(loop);
    if (tsrvi_thread.own == loop) {
        tsrvi_thread.own = NULL;
    }
    tsrvi_loop_destroy(loop);
    tsrvi_log_settle(true);
    return TSRV_OK;
}

/* ============================================================================
 * >>cpus  Processors that this process may use
 * ==========================================================================*/

/* Read a small text file. Returns its size, or -1. */
static int tsrvi_file_read(const char *path, char *buffer, size_t size)
{
    int fd = tsrvi_fd_own(TSRV_SYS(open, (path, O_RDONLY | O_CLOEXEC))), got;
    if (fd < 0) {
        return -1;
    }
    got = (int)TSRV_SYS(read, (fd, buffer, size - 1));
    tsrvi_close_fd(fd);
    buffer[got < 0 ? 0 : got] = 0;
    return got;
}

/* Processors, rounded up; no or a senseless limit: INT_MAX. */
static int tsrvi_quota_round(long quota, long period)
{
    long cpus = quota <= 0 || period <= 0 ? INT_MAX : (quota - 1) / period + 1;
    return cpus > INT_MAX ? INT_MAX : (int)cpus;
}

/* The number that a file of a control group begins with; 0 = none. Of the group's name `size` bytes
 * are used. */
static long tsrvi_cgroup_number(const char *top, const char *group, int size, const char *name)
{
    char path[1024], text[64];
    snprintf(path, sizeof(path), "%s%.*s/%s", top, size, group, name);
    return tsrvi_file_read(path, text, sizeof(text)) <= 0 ? 0 : strtol(text, NULL, 10);
}

/* Processors, rounded up, that a control group grants; no limit: INT_MAX. Version 2 has cpu.max,
 * which is "quota period" in microseconds, and version 1 a file for each. */
static int tsrvi_cgroup_cpus(const char *top, const char *group, int size)
{
    char path[1024], text[64], *blank;
    snprintf(path, sizeof(path), "%s%.*s/cpu.max", top, size, group);
    blank = tsrvi_file_read(path, text, sizeof(text)) <= 0 ? NULL : strchr(text, ' ');
    if (blank != NULL && blank != text) {
        return tsrvi_quota_round(strtol(text, NULL, 10), strtol(blank, NULL, 10));
    }
    return tsrvi_quota_round(tsrvi_cgroup_number(top, group, size, "cpu.cfs_quota_us"),
                             tsrvi_cgroup_number(top, group, size, "cpu.cfs_period_us"));
}

/* A group's quota holds for all groups below it: the least on the way to the root counts. What a
 * container sees as the root may be its own group. */
static int tsrvi_cgroup_least(const char *top, const char *group)
{
    int size = (int)strlen(group), least = tsrvi_cgroup_cpus(top, group, size), granted;
    while (size > 0) {
        for (size--; size > 0 && group[size] != '/'; size--) {
        }
        granted = tsrvi_cgroup_cpus(top, group, size);
        least = granted < least ? granted : least;
    }
    return least;
}

/* Version 1 mounts the controllers of processors in one of these places. */
static int tsrvi_cgroup_old_least(const char *group)
{
    static const char *const tops[] = {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct",
                                       "/sys/fs/cgroup/cpuacct,cpu"};
    int least = INT_MAX;
    for (size_t i = 0; i < sizeof(tops) / sizeof(tops[0]); i++) {
        int granted = tsrvi_cgroup_least(tops[i], group);
        least = granted < least ? granted : least;
    }
    return least;
}

/* The group of a line of /proc/self/cgroup, "number:controllers:group", if "cpu" is among its
 * controllers; NULL = it is not. */
static const char *tsrvi_cgroup_old_group(const char *line)
{
    const char *name = strchr(line, ':'), *group = name == NULL ? NULL : strchr(name + 1, ':');
    while (group != NULL && name < group) {
        size_t length = strcspn(++name, ",:");
        if (length == 3 && memcmp(name, "cpu", 3) == 0) {
            return group + 1;
        }
        name += length;
    }
    return NULL;
}

/* Processors that the quotas of this process's groups grant; INT_MAX = all. */
static int tsrvi_quota_cpus(void)
{
    char text[8192], *line = text, *end;
    int least = tsrvi_cgroup_old_least(""), granted;
    if (tsrvi_file_read("/proc/self/cgroup", text, sizeof(text)) <= 0) {
        return least;
    }
    for (bool more = true; more; line = end + 1) {
        const char *group;
        end = line + strcspn(line, "\n");
        more = *end != 0;
        *end = 0;
        group = tsrvi_cgroup_old_group(line);
        granted = strncmp(line, "0::", 3) == 0 ? tsrvi_cgroup_least("/sys/fs/cgroup", line + 3)
                  : group != NULL              ? tsrvi_cgroup_old_least(group)
                                               : INT_MAX;
        least = granted < least ? granted : least;
    }
    return least;
}

TSRV_API int tsrv_cpu_count(void)
{
    int count = 0, quota = tsrvi_quota_cpus();
#if TSRVI_HAS_AFFINITY
    cpu_set_t set;
    CPU_ZERO(&set);
    if (TSRV_SYS(sched_getaffinity, (0, sizeof(set), &set)) == 0) {
        for (size_t cpu = 0; cpu < CPU_SETSIZE; cpu++) {
            count += CPU_ISSET(cpu, &set) != 0;
        }
    }
#endif
    if (count == 0) {
        count = (int)TSRV_SYS(sysconf, (_SC_NPROCESSORS_ONLN));
    }
    count = count < quota ? count : quota;
    return count < 1 ? 1 : count;
}

/* ============================================================================
 * >>notify  Telling the service manager, and the program before this one
 * ==========================================================================*/

/* In an upgrade the program that this one replaces waits for this. It may have died, so that the
 * write must not raise SIGPIPE. */
static void tsrvi_tell_predecessor(void)
{
    int fd = tsrvi_handed_take_ready();
    if (fd >= 0) {
        tsrvi_handed_close_rest();
        tsrvi_write_quiet(fd, "", 1);
        tsrvi_close_fd(fd);
    }
}

#define TSRVI_NOTIFY_SIZE 1000 /* bytes of a state */

/* The program may clean its environment later, in on_start for instance. */
static void tsrvi_notify_remember(void)
{
    const char *path = TSRV_SYS(getenv, ("NOTIFY_SOCKET"));
    snprintf(tsrvi_process.notify_path, sizeof(tsrvi_process.notify_path), "%s",
             path == NULL ? "" : path);
}

/* Returns 1, 0 when nobody wants to know, or a code. */
static int tsrvi_notify_send(const char *state)
{
    const char *given = TSRV_SYS(getenv, ("NOTIFY_SOCKET"));
    const char *path = given != NULL ? given : tsrvi_process.notify_path;
    char text[TSRVI_NOTIFY_SIZE + 64], stamp[64] = "";
    tsrvi_sockaddr inside;
    socklen_t size = 0;
    int fd, rc, length;
    if (*path == 0) {
        return 0;
    }
    if ((rc = tsrvi_unix_address(path, &inside, &size)) < 0) {
        return rc;
    }
    if (strstr(state, "RELOADING=1") != NULL) { /* Type=notify-reload asks for the time too */
        snprintf(stamp, sizeof(stamp), "\nMONOTONIC_USEC=%llu",
                 (unsigned long long)(tsrvi_clock() / 1000));
    }
    if (strlen(state) > TSRVI_NOTIFY_SIZE) {
        return TSRV_ETOOLONG;
    }
    length = snprintf(text, sizeof(text), "%s%s", state, stamp);
    fd = tsrvi_socket(AF_UNIX, SOCK_DGRAM);
    if (fd < 0) {
        return fd;
    }
    rc = TSRV_SYS(sendto, (fd, text, (size_t)length, TSRVI_SEND_FLAGS, &inside.any, size)) < 0
             ? tsrvi_error()
             : 1;
    tsrvi_close_fd(fd);
    return rc;
}

static void tsrvi_notify(const char *state)
{
    int rc = tsrvi_notify_send(state);
    if (rc < 0) {
        tsrvi_log_limited(TSRVI_LOG_NOTIFY, TSRV_LOG_WARNING,
                          "NOTIFY_SOCKET: the service manager cannot be told %s: %s", state,
                          tsrv_strerror(rc));
    }
    if (strcmp(state, "READY=1") == 0 || strncmp(state, "MAINPID=", 8) == 0) {
        snprintf(tsrvi_process.notify_owed, sizeof(tsrvi_process.notify_owed), "%s",
                 rc < 0 ? state : "");
    }
}

/* Without READY=1 or MAINPID= the service would be ended: they are sent until the service manager's
 * queue takes them. That it did not is not logged at each try. */
static void tsrvi_notify_again(void)
{
    if (tsrvi_process.notify_owed[0] != 0 && tsrvi_notify_send(tsrvi_process.notify_owed) >= 0) {
        tsrvi_process.notify_owed[0] = 0;
    }
}

/* This program ends; but not the service, as long as the one before it serves. */
static void tsrvi_notify_stopping(void)
{
    tsrvi_process.notify_owed[0] = 0; /* READY=1 would come behind it */
    if (!tsrvi_handed_waits()) {
        tsrvi_notify("STOPPING=1");
    }
}

TSRV_API int tsrv_notify(const char *state)
{
    if (strncmp(state, "READY=1", 7) == 0) {
        tsrvi_tell_predecessor();
    }
    return tsrvi_notify_send(state);
}

/* How often does the service manager want to hear from this process? See sd_watchdog_enabled(3);
 * half of the time is what it advises. Asked once: the program may change its environment. */
static tsrvi_watchdog tsrvi_watchdog_make(void)
{
    tsrvi_watchdog watchdog = {TSRVI_FOREVER, 0};
    const char *pid = TSRV_SYS(getenv, ("WATCHDOG_PID")),
               *usec = TSRV_SYS(getenv, ("WATCHDOG_USEC"));
    int64_t limit = tsrvi_decimal(usec, INT64_MAX / 1000);
    if (limit > 0 &&
        (pid == NULL || tsrvi_decimal(pid, INT_MAX) == (int64_t)TSRV_SYS(getpid, ()))) {
        watchdog.due = 0;
        watchdog.interval = (uint64_t)limit * 500;
    }
    return watchdog;
}

static void tsrvi_watchdog_beat(tsrvi_watchdog *watchdog, uint64_t now)
{
    if (watchdog->due <= now) {
        watchdog->due = now + watchdog->interval;
        tsrvi_notify("WATCHDOG=1");
    }
}

/* ============================================================================
 * >>worker  A process that is told when to end
 *
 * A worker is told to end by its parent, over the life-line, which no mask and no
 * disposition of a signal can stop: a socket whose other end the parent alone
 * has. The parent's death ends it. A worker, and the single process of tsrv_serve,
 * are also told by signals that somebody sends to the process itself. The chief,
 * the first loop that runs or, when that has ended, the next, listens to all this;
 * every loop then hears of it, and drains. How much they were told only rises:
 *
 *     STAY     nothing
 *     LEAVE    drain, within the grace
 *     ORPHAN   the parent is dead: drain, within TSRVI_ORPHAN_MS
 *     CUT      told again, by the same: the grace is over
 *
 * Ctrl-C reaches a worker twice, as a signal and through its parent. The two are
 * counted apart, so that only a second Ctrl-C cuts the grace.
 *
 * Each loop has a beat. It measures how late the loop is, and looks for
 * connections whose wake-up was lost; the chief's also tells the parent, and the
 * service manager, that the process is alive.
 * ==========================================================================*/

#define TSRVI_BEAT_MS 500     /* between two beats, or a quarter of the heartbeat */
#define TSRVI_ORPHAN_MS 400   /* that a worker has left when its parent is dead */
#define TSRVI_SETTLED_MS 1000 /* after which a process that accepts is relied on */

enum { TSRVI_STAY, TSRVI_LEAVE, TSRVI_ORPHAN, TSRVI_CUT };

TSRV_API int tsrv_task_id(void)
{
    return tsrvi_worker_id();
}

/* Have the kernel end this process with its parent: the life-line does not reach one that hangs.
 * Linux forgets it when the process changes its user, prctl(2), so it is asked for more than once.
 */
static void tsrvi_worker_follow_parent(void)
{
#if TSRVI_HAS_PDEATHSIG
    if (tsrvi_process.parent != 0) {
        int fatal = __atomic_load_n(&tsrvi_process.worker.fatal, __ATOMIC_ACQUIRE);
        TSRV_SYS(prctl, (PR_SET_PDEATHSIG, fatal ? SIGKILL : SIGTERM, 0, 0, 0));
    }
#endif
}

/* Choose the signal for that. SIGTERM leaves what turns its loop the time to drain; what hangs is
 * ended by the SIGALRM that its handler asks for. Where one of the two does not come through it has
 * to be SIGKILL.
 *   blocked  in the thread that is to end the process */
static void tsrvi_worker_choose_end(const sigset_t *blocked)
{
    struct sigaction action;
    bool fatal = TSRV_SYS(sigaction, (SIGTERM, NULL, &action)) < 0 ||
                 action.sa_handler == SIG_IGN || TSRV_SYS(sigismember, (blocked, SIGTERM)) == 1 ||
                 TSRV_SYS(sigismember, (blocked, SIGALRM)) == 1;
    __atomic_store_n(&tsrvi_process.worker.fatal, fatal, __ATOMIC_RELEASE);
    tsrvi_worker_follow_parent();
}

/* ---- being told ------------------------------------------------------------*/

static void tsrvi_worker_tell(int how)
{
    if (how <= __atomic_load_n(&tsrvi_process.worker.told, __ATOMIC_ACQUIRE)) {
        return;
    }
    /* What else comes of the signals must not cut what the program does after its loop. */
    for (int i = 0; i < TSRVI_WORKER_SIGNALS && tsrvi_worker_id() >= 0; i++) {
        int signo = tsrvi_process.worker.signals[i].signo;
        if (signo != 0) {
            tsrvi_process.signals[signo].before.sa_handler = tsrvi_signal_nothing;
            tsrvi_process.signals[signo].before.sa_flags = SA_RESTART;
        }
    }
    if (tsrvi_worker_id() < 0 && how == TSRVI_LEAVE) {
        tsrvi_process.worker.ready = 0; /* the program before this one must not rely on it */
        tsrvi_notify_stopping();
    }
    __atomic_store_n(&tsrvi_process.worker.told, how, __ATOMIC_RELEASE);
    tsrvi_loops_wake();
}

/* Does the program watch a signal by itself? Ours is the chief's only watch on it. */
static bool tsrvi_worker_is_watched(int signo)
{
    tsrv_loop *chief = __atomic_load_n(&tsrvi_process.chief, __ATOMIC_ACQUIRE);
    tsrv_loop *loop = __atomic_load_n(&tsrvi_process.signals[signo].loop, __ATOMIC_ACQUIRE);
    if (loop != chief) {
        return loop != NULL;
    }
    for (tsrv_signal *watch = chief->sources.signals; watch != NULL; watch = watch->next) {
        uintptr_t place = (uintptr_t)watch - (uintptr_t)tsrvi_process.worker.signals; /* or huge */
        if (watch->signo == signo && place >= sizeof(tsrvi_process.worker.signals)) {
            return true;
        }
    }
    return false;
}

/* Is there a handler of the program's for a signal? */
static bool tsrvi_worker_is_handled(int signo)
{
    struct sigaction action;
    return TSRV_SYS(sigaction, (signo, NULL, &action)) == 0 &&
           ((action.sa_flags & SA_SIGINFO) != 0 ||
            (action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN &&
             action.sa_handler != tsrvi_signal_nothing &&
             action.sa_handler != tsrvi_signal_handler));
}

/* Have the program's own watch called. */
static void tsrvi_worker_tell_watch(int signo)
{
    __atomic_store_n(&tsrvi_process.signals[signo].pending, 1, __ATOMIC_RELEASE);
    tsrvi_loops_wake();
}

/* What of the files of these servers cannot be read has been logged, and changes nothing. Counts
 * what has and what has not been read. */
static void tsrvi_servers_read_files(const tsrvi_link *list, int counts[2])
{
    TSRVI_EACH(const tsrv_server, server, list, link) {
        tsrv_tls *tls = server->options.tls;
        if (tls != NULL) {
            counts[tsrv_tls_reload(tls) != TSRV_OK]++;
        }
    }
}

/* SIGHUP, for those that run here, and those that run nowhere, but will in workers. */
static void tsrvi_worker_read_files(void)
{
    const tsrv_server *own = tsrvi_process.reloaded;
    int counts[2] = {0, 0};
    if (own == NULL) {
        return;
    }
    tsrvi_lock(&tsrvi_process.servers.lock);
    tsrvi_servers_read_files(&tsrvi_process.servers.list, counts);
    tsrvi_unlock(&tsrvi_process.servers.lock);
    if (own->loop != NULL) {
        tsrvi_servers_read_files(&own->loop->servers.all, counts);
    }
    if (counts[0] != 0) {
        tsrvi_log(TSRV_LOG_INFO, "SIGHUP: certificates and keys have been read anew");
    }
    if (counts[1] != 0) {
        tsrvi_log(TSRV_LOG_WARNING, "SIGHUP: %scertificates and keys stay as they are",
                  counts[0] != 0 ? "some " : "");
    }
}

/* A single process reloads; in a drain that is of no use. There READY=1 would not be true, nor
 * before on_start. */
static void tsrvi_worker_reload(void)
{
    bool accepts = !tsrvi_process.reloaded->starting;
    if (__atomic_load_n(&tsrvi_process.worker.told, __ATOMIC_ACQUIRE) != TSRVI_STAY) {
        return;
    }
    if (accepts) {
        tsrvi_notify("RELOADING=1");
    }
    tsrvi_worker_read_files();
    if (accepts) {
        tsrvi_notify("READY=1");
    }
}

static void tsrvi_worker_signal(void *context)
{
    const tsrv_signal *own = (const tsrv_signal *)context;
    if (tsrvi_worker_is_watched(own->signo)) {
        return; /* the program's watch takes the place of ours */
    }
    if (own->signo == SIGHUP) {
        tsrvi_worker_reload();
        return;
    }
    if (own->signo == SIGUSR2) {
        tsrvi_log(TSRV_LOG_WARNING, "upgrade: refused, a single process has no parent that could "
                                    "hand its sockets over: it needs workers");
        return;
    }
    if (tsrvi_process.place_own != NULL) {
        __atomic_store_n(&tsrvi_process.place_own->asked, 1, __ATOMIC_RELEASE);
    }
    if (__atomic_load_n(&tsrvi_process.worker.told, __ATOMIC_ACQUIRE) != TSRVI_STAY ||
        !tsrvi_handed_waits()) { /* which passes on what it is told: that is not the second time */
        tsrvi_process.worker.by_signal++;
    }
    tsrvi_worker_tell(tsrvi_process.worker.by_signal > 1 ? TSRVI_CUT : TSRVI_LEAVE);
}

/* The parent acts on a signal: so does this worker, in the program's way if it has one. */
static void tsrvi_worker_obey(int signo)
{
    if (tsrvi_worker_is_watched(signo)) {
        tsrvi_worker_tell_watch(signo);
    } else if (tsrvi_worker_is_handled(signo)) {
        TSRV_SYS(kill, (TSRV_SYS(getpid, ()), signo));
    } else {
        tsrvi_process.worker.by_parent++;
        tsrvi_worker_tell(tsrvi_process.worker.by_parent > 1 ? TSRVI_CUT : TSRVI_LEAVE);
    }
}

/* What the parent says, if it does. Returns as recv. */
static ssize_t tsrvi_worker_line_read(unsigned char *signo)
{
    ssize_t got = TSRV_SYS(recv, (tsrvi_process.worker.line.fd, signo, 1, MSG_DONTWAIT));
    if (got == 1) {
        __atomic_fetch_add(&tsrvi_process.place_own->heard, 1, __ATOMIC_RELEASE);
    }
    return got;
}

static void tsrvi_worker_line_event(tsrvi_io *io, int events)
{
    unsigned char signo = 0;
    ssize_t got = tsrvi_worker_line_read(&signo);
    (void)events;
    if (got == 1) {
        tsrvi_worker_obey(signo);
        return;
    }
    tsrvi_poller_set(&tsrvi_process.chief->poller, io, 0);
    if (got == 0 || TSRV_SYS(getppid, ()) != tsrvi_process.parent) {
        tsrvi_log(TSRV_LOG_WARNING, "worker %d: the parent is dead", tsrvi_worker_id());
        tsrvi_close_fd(io->fd);
        io->fd = -1;
        tsrvi_worker_tell(TSRVI_ORPHAN);
    } else { /* a failure: the parent sends signals until the next beat listens again */
        __atomic_store_n(&tsrvi_process.place_own->listens, 0, __ATOMIC_RELEASE);
    }
}

/* ---- the chief -------------------------------------------------------------*/

/* Act on signals that nobody else acts on; SIGHUP and SIGUSR2 only where there is no parent, whose
 * business they are. In a worker one that is ignored stays so: its parent tells it. One that has no
 * effect, since a chief before this one was told, has one again: it cuts the grace. What is acted
 * on is unblocked in this thread, whatever mask the process was given. */
static void tsrvi_worker_watch_signals(tsrv_loop *loop)
{
    static const int signals[TSRVI_WORKER_SIGNALS] = {SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGUSR2};
    int count = tsrvi_worker_id() >= 0 ? 3 : tsrvi_process.worker.upgradable ? 5 : 4;
    sigset_t unblocked;
    TSRV_SYS(sigemptyset, (&unblocked));
    for (int i = 0; i < count; i++) {
        tsrv_signal *own = &tsrvi_process.worker.signals[i];
        struct sigaction action;
        if (TSRV_SYS(sigaction, (signals[i], NULL, &action)) == 0 &&
            (action.sa_flags & SA_SIGINFO) == 0 &&
            (action.sa_handler == SIG_DFL || action.sa_handler == tsrvi_signal_nothing ||
             __atomic_load_n(&tsrvi_process.signals[signals[i]].kept, __ATOMIC_SEQ_CST) != 0 ||
             (action.sa_handler == SIG_IGN && tsrvi_worker_id() < 0)) &&
            tsrv_signal_start(loop, own, signals[i], tsrvi_worker_signal, own) == TSRV_OK) {
            TSRV_SYS(sigaddset, (&unblocked, signals[i]));
        }
    }
    TSRV_SYS(sigprocmask, (SIG_UNBLOCK, &unblocked, &tsrvi_process.worker.mask));
    TSRV_SYS(sigprocmask, (SIG_SETMASK, NULL, &unblocked));
    tsrvi_worker_choose_end(&unblocked);
}

/* Listen to the parent; what fails is tried again at the next beat. */
static void tsrvi_worker_listen(tsrv_loop *loop)
{
    tsrvi_io *line = &tsrvi_process.worker.line;
    if (line->fd >= 0 && line->interest == 0) {
        line->on_event = tsrvi_worker_line_event;
        if (tsrvi_poller_set(&loop->poller, line, TSRV_READABLE) == TSRV_OK) {
            __atomic_store_n(&tsrvi_process.place_own->listens, 1, __ATOMIC_RELEASE);
        }
    }
}

/* The first loop becomes the chief; when that is freed, another one. */
static void tsrvi_worker_claim(tsrv_loop *loop)
{
    tsrv_loop *nobody = NULL;
    if (__atomic_compare_exchange_n(&tsrvi_process.chief, &nobody, loop, false, __ATOMIC_ACQ_REL,
                                    __ATOMIC_ACQUIRE)) {
        tsrvi_worker_watch_signals(loop);
        tsrvi_worker_listen(loop);
    }
}

/* In each loop, in tsrv_serve its own: do what was told; and be the chief if there is none. */
static void tsrvi_worker_hear(tsrv_loop *loop)
{
    int told;
    if (loop->worker.beat.fire == NULL) {
        return; /* it does not run */
    }
    tsrvi_worker_claim(loop);
    told = __atomic_load_n(&tsrvi_process.worker.told, __ATOMIC_ACQUIRE);
    if (told > loop->worker.told) {
        loop->worker.told = told;
        tsrvi_loop_leave(loop,
                         told == TSRVI_ORPHAN ? TSRVI_ORPHAN_MS : tsrvi_process.worker.grace_ms,
                         told == TSRVI_LEAVE && tsrvi_process.worker.grace_is_most);
        if (told == TSRVI_CUT) {
            tsrvi_loop_cut(loop);
        }
    }
}

/* ---- beats -----------------------------------------------------------------*/

/* Measure how late the loop is, and see to connections that a wake-up was lost for. */
static void tsrvi_worker_beat_servers(tsrv_loop *loop, uint64_t lag_ms)
{
    TSRVI_EACH(tsrv_server, server, &loop->servers.all, link) {
        tsrv_stats *stats = server->stats;
        stats->lag_ms = lag_ms;
        stats->lag_max_ms = lag_ms > stats->lag_max_ms ? lag_ms : stats->lag_max_ms;
        for (tsrvi_listener *listener = server->listeners;
             listener != NULL && tsrvi_worker_id() >= 0; listener = listener->next) {
            tsrvi_listener_requeue(listener);
        }
        tsrvi_server_forget_shares(server, loop->now);
    }
}

/* Is on_start still due? It may take start_timeout_ms, and not only heartbeat_ms. */
static bool tsrvi_worker_starts(const tsrv_loop *loop)
{
    TSRVI_EACH(const tsrv_server, server, &loop->servers.all, link) {
        if (server->starting && tsrvi_server_listens(server)) {
            return true;
        }
    }
    return false;
}

/* Tell the parent that the loop turns, which it has to from the first time on. */
static void tsrvi_worker_beat_parent(const tsrv_loop *loop)
{
    unsigned beat = tsrvi_process.place_own->beat;
    if (beat != 0 || !tsrvi_worker_starts(loop)) {
        beat = beat + 1 == 0 ? 1 : beat + 1;
        __atomic_store_n(&tsrvi_process.place_own->beat, beat, __ATOMIC_RELEASE);
    }
}

/* Say that this process is alive. */
static void tsrvi_worker_beat_process(tsrv_loop *loop)
{
    tsrvi_worker_listen(loop);
    if (tsrvi_process.place_own != NULL) {
        tsrvi_worker_beat_parent(loop);
    }
    tsrvi_notify_again();
    tsrvi_watchdog_beat(&tsrvi_process.worker.watchdog, loop->now);
    if (tsrvi_process.worker.ready != 0 &&
        loop->now >= tsrvi_after(tsrvi_process.worker.ready, TSRVI_SETTLED_MS)) {
        tsrvi_process.worker.ready = 0;
        tsrvi_tell_predecessor();
    }
}

static void tsrvi_worker_beat(tsrvi_timer *timer)
{
    tsrv_loop *loop = TSRVI_CONTAINER(timer, tsrv_loop, worker.beat);
    uint64_t next = loop->now + tsrvi_process.worker.interval;
    tsrvi_worker_claim(loop);
    tsrvi_worker_beat_servers(loop, (loop->now - timer->due) / TSRVI_MS);
    if (loop == __atomic_load_n(&tsrvi_process.chief, __ATOMIC_ACQUIRE)) {
        tsrvi_worker_beat_process(loop);
        next = tsrvi_earlier(next, tsrvi_process.worker.watchdog.due);
    }
    tsrvi_heap_set(&loop->heap, timer, next);
}

/* tsrv_loop_run begins, in a worker or in tsrv_serve. */
static void tsrvi_worker_entered(tsrv_loop *loop)
{
    if (loop->worker.beat.fire == NULL) {
        loop->worker.beat.fire = tsrvi_worker_beat;
        tsrvi_heap_set(&loop->heap, &loop->worker.beat, tsrvi_clock());
        __atomic_fetch_add(&tsrvi_process.worker.loops, 1, __ATOMIC_SEQ_CST);
    }
    tsrvi_worker_follow_parent();
    tsrvi_worker_hear(loop);
}

/* The chief watches signals no more. Returns how many had come, and one of them. */
static int tsrvi_worker_unwatch_signals(int *missed)
{
    int count = 0;
    for (int i = 0; i < TSRVI_WORKER_SIGNALS; i++) {
        tsrv_signal *own = &tsrvi_process.worker.signals[i];
        int signo = own->signo;
        tsrv_signal_stop(own);
        tsrvi_signals_quiesce();
        if (signo != 0 && /* and the program does not watch it, which will look */
            __atomic_load_n(&tsrvi_process.signals[signo].loop, __ATOMIC_ACQUIRE) == NULL &&
            __atomic_exchange_n(&tsrvi_process.signals[signo].pending, 0, __ATOMIC_ACQ_REL) != 0) {
            *missed = signo;
            count++;
        }
    }
    return count;
}

/* Other loops turn, and one of them becomes the chief as soon as it is awake. What the parent says
 * meanwhile is left in the life-line, and what signals say in our handler. */
static void tsrvi_worker_hand_over(void)
{
    for (int i = 0; i < TSRVI_WORKER_SIGNALS; i++) {
        tsrv_signal *own = &tsrvi_process.worker.signals[i];
        int signo = own->signo;
        __atomic_store_n(&tsrvi_process.signals[signo].kept, signo != 0, __ATOMIC_SEQ_CST);
        tsrv_signal_stop(own);
        if (__atomic_load_n(&tsrvi_process.signals[signo].loop, __ATOMIC_ACQUIRE) != NULL) {
            __atomic_store_n(&tsrvi_process.signals[signo].kept, 0,
                             __ATOMIC_SEQ_CST); /* another watch */
        }
    }
    __atomic_store_n(&tsrvi_process.chief, (tsrv_loop *)NULL, __ATOMIC_SEQ_CST);
    tsrvi_loops_wake();
}

/* No other loop turns: signals have their own effect. */
static void tsrvi_worker_give_up(tsrv_loop *loop)
{
    unsigned char said = 0;
    int signo = 0, pending;
    bool missed, watched;
    tsrvi_poller_set(&loop->poller, &tsrvi_process.worker.line, 0);
    __atomic_store_n(&tsrvi_process.place_own->listens, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&tsrvi_process.place_own->beat, 0u, __ATOMIC_RELEASE); /* as not begun */
    missed = tsrvi_process.worker.line.fd >= 0 && tsrvi_worker_line_read(&said) == 1 &&
             __atomic_load_n(&tsrvi_process.worker.told, __ATOMIC_ACQUIRE) == TSRVI_STAY;
    watched = missed && tsrvi_worker_is_watched(said);
    pending = tsrvi_worker_unwatch_signals(&signo);
    __atomic_store_n(&tsrvi_process.chief, (tsrv_loop *)NULL, __ATOMIC_RELEASE);
    if (watched) { /* it was told at this very moment */
        tsrvi_worker_tell_watch(said);
    } else if (missed || pending != 0) {
        TSRV_SYS(kill, (TSRV_SYS(getpid, ()), missed ? said : signo));
    }
}

/* tsrv_loop_run has returned. To free the loop turns it, but must not make it the chief again. */
static void tsrvi_worker_exited(tsrv_loop *loop)
{
    bool others = __atomic_sub_fetch(&tsrvi_process.worker.loops, 1, __ATOMIC_SEQ_CST) > 0;
    tsrvi_heap_remove(&loop->heap, &loop->worker.beat);
    loop->worker.beat.fire = NULL;
    if (others && loop == __atomic_load_n(&tsrvi_process.chief, __ATOMIC_SEQ_CST)) {
        tsrvi_poller_set(&loop->poller, &tsrvi_process.worker.line, 0);
        tsrvi_worker_hand_over();
    }
    if (__atomic_load_n(&tsrvi_process.worker.loops, __ATOMIC_SEQ_CST) == 0) {
        tsrvi_worker_claim(loop); /* if the others have ended meanwhile, or at the same moment */
        if (loop == __atomic_load_n(&tsrvi_process.chief, __ATOMIC_SEQ_CST)) {
            tsrvi_worker_give_up(loop);
        }
    }
}

/* Its first server accepts; on_start may have changed the user. */
static void tsrvi_worker_ready(void)
{
    const tsrv_loop *chief = __atomic_load_n(&tsrvi_process.chief, __ATOMIC_ACQUIRE);
    tsrvi_worker_follow_parent();
    if (chief != NULL && chief == tsrvi_thread.running) {
        sigset_t blocked; /* which on_start may have changed, too */
        TSRV_SYS(sigemptyset, (&blocked));
        TSRV_SYS(sigprocmask, (SIG_SETMASK, NULL, &blocked));
        tsrvi_worker_choose_end(&blocked);
        tsrvi_worker_beat_parent(chief);
    }
    __atomic_store_n(&tsrvi_process.place_own->ready, 1, __ATOMIC_RELEASE);
    tsrvi_write_quiet(tsrvi_process.worker.wake, "", 1);
}

static const tsrvi_hooks tsrvi_worker_hooks = {tsrvi_worker_entered, tsrvi_worker_exited,
                                               tsrvi_worker_hear, tsrvi_worker_ready};

/* ============================================================================
 * >>identity  The user that workers run as
 * ==========================================================================*/

#include <grp.h>
#include <pwd.h>

#ifdef __APPLE__
typedef int tsrvi_base_gid; /* what initgroups(3) takes */
#else
typedef gid_t tsrvi_base_gid;
#endif

typedef struct tsrvi_identity {
    char name[256]; /* whose supplementary groups it gets; "" = none */
    uid_t uid;
    gid_t gid;
    bool wanted; /* false = the process stays who it is */
} tsrvi_identity;

#define TSRVI_ID_MOST ((int64_t)UINT32_MAX - 1) /* of users and groups; the last one is nobody's */

/* Say why a user or a group was not found: errno is 0 when the files were read and do not have it,
 * getpwnam(3); some systems use these instead. Returns the code. */
static int tsrvi_identity_missing(const char *kind, const char *name)
{
    if (errno == 0 || errno == ENOENT || errno == ESRCH) {
        tsrvi_log(TSRV_LOG_ERROR, "%s: \"%s\" is not known", kind, name);
        return TSRV_EINVAL;
    }
    tsrvi_log(TSRV_LOG_ERROR, "%s: \"%s\" cannot be looked up: %s", kind, name,
              tsrv_strerror(tsrvi_error()));
    return tsrvi_error();
}

/* Look up a user, by name or number. Who has no name is known by the number if there is a group. */
static int tsrvi_identity_find_user(const char *user, bool has_group, tsrvi_identity *identity)
{
    int64_t number = tsrvi_decimal(user, TSRVI_ID_MOST);
    const struct passwd *entry;
    errno = 0;
    entry = TSRV_SYS(getpwnam, (user));
    if (entry == NULL && number >= 0) {
        errno = 0;
        entry = TSRV_SYS(getpwuid, ((uid_t)number));
    }
    if (entry != NULL) {
        snprintf(identity->name, sizeof(identity->name), "%s", entry->pw_name);
        identity->uid = entry->pw_uid;
        identity->gid = entry->pw_gid;
    } else if (number >= 0 && has_group) {
        identity->uid = (uid_t)number;
    } else {
        return tsrvi_identity_missing("user", user);
    }
    return TSRV_OK;
}

/* Look up a group, by name or number. */
static int tsrvi_identity_find_group(const char *group, tsrvi_identity *identity)
{
    int64_t number = tsrvi_decimal(group, TSRVI_ID_MOST);
    const struct group *entry;
    errno = 0;
    entry = TSRV_SYS(getgrnam, (group));
    if (entry == NULL && number < 0) {
        return tsrvi_identity_missing("group", group);
    }
    identity->gid = entry != NULL ? entry->gr_gid : (gid_t)number;
    return TSRV_OK;
}

/* Look up both; NULL = the present user, the user's group. */
static int tsrvi_identity_find(const char *user, const char *group, tsrvi_identity *identity)
{
    int rc = TSRV_OK;
    memset(identity, 0, sizeof(*identity));
    identity->wanted = user != NULL || group != NULL;
    identity->uid = TSRV_SYS(geteuid, ());
    if (user != NULL) {
        rc = tsrvi_identity_find_user(user, group != NULL, identity);
    }
    if (rc == TSRV_OK && group != NULL) {
        rc = tsrvi_identity_find_group(group, identity);
    }
    return rc;
}

/* Is the user one of root's group? */
static bool tsrvi_identity_is_of_root(const tsrvi_identity *identity)
{
    const struct group *root = identity->gid == 0 ? NULL : TSRV_SYS(getgrgid, (0));
    for (char **name = root == NULL ? NULL : root->gr_mem; name != NULL && *name != NULL; name++) {
        if (strcmp(*name, identity->name) == 0) {
            return true;
        }
    }
    return identity->gid == 0;
}

/* Does the process have root's group, and the user does not? Other groups that only root could have
 * laid aside may have been given on purpose, as by Kubernetes' fsGroup. Returns a code. */
static int tsrvi_identity_check_groups(const tsrvi_identity *identity)
{
    int count = TSRV_SYS(getgroups, (0, NULL)), rc;
    gid_t *groups;
    if (count < 0) {
        return tsrvi_error();
    }
    groups = (gid_t *)TSRV_MALLOC(((size_t)count + 1) * sizeof(*groups));
    if (groups == NULL) {
        return -ENOMEM;
    }
    count = TSRV_SYS(getgroups, (count, groups));
    rc = count < 0 ? tsrvi_error() : (int)TSRV_OK;
    for (int i = 0; i < count && rc == TSRV_OK; i++) {
        rc = groups[i] == 0 && !tsrvi_identity_is_of_root(identity) ? -EPERM : TSRV_OK;
    }
    TSRV_FREE(groups);
    return rc;
}

/* Is the process this user, without a way back to root? */
static bool tsrvi_identity_is_assumed(const tsrvi_identity *identity)
{
    return TSRV_SYS(getuid, ()) == identity->uid && TSRV_SYS(geteuid, ()) == identity->uid &&
           TSRV_SYS(getgid, ()) == identity->gid && TSRV_SYS(getegid, ()) == identity->gid &&
           (identity->uid == 0 || TSRV_SYS(seteuid, (0)) < 0);
}

/* Become that user, for good. Root that is only laid aside is taken up first, or the saved ids
 * would keep it; the supplementary groups go before it, as only root may change them; and what was
 * done is looked at: setuid(2) has been known not to. */
static int tsrvi_identity_assume(const tsrvi_identity *identity)
{
    gid_t gid = identity->gid;
    int rc = TSRV_OK;
    if (!identity->wanted) {
        return TSRV_OK;
    }
    tsrvi_log_keep();
    if (TSRV_SYS(geteuid, ()) == 0 || TSRV_SYS(seteuid, (0)) == 0) {
        if ((identity->name[0] != 0 ? TSRV_SYS(initgroups, (identity->name, (tsrvi_base_gid)gid))
                                    : TSRV_SYS(setgroups, (1, &gid))) < 0 ||
            TSRV_SYS(setgid, (gid)) < 0 || TSRV_SYS(setuid, (identity->uid)) < 0) {
            rc = tsrvi_error();
        }
    } else {
        rc = tsrvi_identity_check_groups(identity);
    }
    if (rc == TSRV_OK && !tsrvi_identity_is_assumed(identity)) {
        rc = -EPERM;
    }
    if (rc < 0) {
        tsrvi_log(TSRV_LOG_ERROR, "cannot become user %ld, group %ld: %s", (long)identity->uid,
                  (long)gid, tsrv_strerror(rc));
    }
    return rc;
}

/* ============================================================================
 * >>process  The supervisor: its state, its signals
 *
 * The parent forks the workers and then only looks after them: it has no loop,
 * and sleeps in poll until a signal, a worker or a time needs it. All processes
 * that it has made are children, of which each worker can have several, and so
 * can the new program of an upgrade. What can happen to a child is this table,
 * which tests compare with the code's. "." cannot be, and is asserted; "-" changes
 * nothing.
 *
 *                time      ready     told      hangs     ends
 *     VACANT     .         .         .         .         .
 *     DUE        fork      .         cancel    .         .
 *     STARTING   late      serve     tell      abort     replace
 *     SERVING    .         -         tell      abort     replace
 *     LEAVING    kill      -         -         -         bury
 *     DYING      kill      -         leave     -         replace
 *
 *     VACANT     there is none
 *     DUE        it is to be forked at `due`: now, or after a back-off
 *     STARTING   it does not accept yet; at `due` it has to
 *     SERVING    it accepts
 *     LEAVING    told to end; it is killed at `due`
 *     DYING      it was too late, or hangs, and was sent SIGABRT; it is killed at `due`
 *
 * And this is what can happen to the supervisor:
 *
 *                stop      reload    upgrade   taken     fails
 *     RUNNING    stop      reload    upgrade   yield     give_up
 *     ENDING     hear      refuse    refuse    .         .
 *     STOPPING   cut       refuse    refuse    .         .
 *     CUT        -         refuse    refuse    .         .
 *
 * A reload is a new generation: each worker that is of an older one is replaced,
 * one after the other, and when the new process serves, the old one is told to
 * end. A SIGHUP during a reload begins the next generation; so none is lost, and
 * those that drain do so side by side. A new process that ends, or is late, ends
 * the reload, and the old ones stay.
 *
 * In an upgrade the new program gets the listening sockets as systemd would hand
 * them over. It is a child too, which serves when it says that all its workers
 * have accepted for a second; then everything here leaves.
 *
 * Times are of the supervisor's own clock, which stands still while the parent
 * does not run: a parent that was stopped, or starved, finds nobody late.
 * ==========================================================================*/

#define TSRVI_WORKERS_MAX 4096
#define TSRVI_RESTARTS 100         /* default of max_restarts */
#define TSRVI_START_MS 60000       /* default of start_timeout_ms */
#define TSRVI_RESTART_MS 100       /* first back-off */
#define TSRVI_RESTART_MAX_MS 30000 /* longest */
#define TSRVI_STABLE_MS 60000      /* a process that lived so long begins anew */
#define TSRVI_KILL_MS 5000         /* after the grace */
#define TSRVI_HUNG_MS 1000         /* before SIGKILL for a worker that has nothing to drain */
#define TSRVI_LOOK_MS 1000         /* at least so often the parent looks at its workers */
#define TSRVI_TELL_MS 5000         /* for a service manager to hear of an upgrade */
#define TSRVI_LATE_MS 100          /* what it may oversleep before its clock stands still */
#define TSRVI_ROUNDS 100  /* of the parent in a second; above that it takes TSRVI_BRAKE_MS */
#define TSRVI_BRAKE_MS 10 /* for each, whatever call fails to put it to sleep */

enum {
    TSRVI_CHILD_VACANT,
    TSRVI_CHILD_DUE,
    TSRVI_CHILD_STARTING,
    TSRVI_CHILD_SERVING,
    TSRVI_CHILD_LEAVING,
    TSRVI_CHILD_DYING,
    TSRVI_CHILD_STATES
};
enum {
    TSRVI_CHILD_TIME,
    TSRVI_CHILD_READY,
    TSRVI_CHILD_TOLD,
    TSRVI_CHILD_HANGS,
    TSRVI_CHILD_ENDS,
    TSRVI_CHILD_EVENTS
};
enum {
    TSRVI_PARENT_RUNNING,
    TSRVI_PARENT_ENDING,
    TSRVI_PARENT_STOPPING,
    TSRVI_PARENT_CUTTING,
    TSRVI_PARENT_STATES
};
enum {
    TSRVI_PARENT_STOP,
    TSRVI_PARENT_RELOAD,
    TSRVI_PARENT_UPGRADE,
    TSRVI_PARENT_TAKEN,
    TSRVI_PARENT_FAILS,
    TSRVI_PARENT_EVENTS
};

typedef struct tsrvi_child {
    int state;
    pid_t pid;           /* 0 = none */
    int line;            /* the parent's end of its life-line; -1 = none */
    int said;            /* how often it was told over that */
    unsigned generation; /* of which it was forked */
    uint64_t started;
    uint64_t served; /* SERVING: since when */
    uint64_t due;    /* TSRVI_FOREVER = never */
    int backoff_ms;  /* before the last start; 0 = it was the first */
    bool at_end;     /* LEAVING: told so because everything ends, */
    bool drains;     /* and has its grace */
    unsigned beat;   /* of its loop, when that was last looked at, */
    uint64_t beaten; /* and when it last changed */
} tsrvi_child;

/* The signals that the parent acts on while it supervises. The last only if it can be upgraded. */
static const int tsrvi_supervised[] = {SIGCHLD, SIGHUP, SIGTERM, SIGINT, SIGQUIT, SIGUSR2};
#define TSRVI_SUPERVISED ((int)(sizeof(tsrvi_supervised) / sizeof(tsrvi_supervised[0])))

typedef struct tsrvi_supervisor {
    void (*happens)(struct tsrvi_supervisor *, int event); /* to the parent; see >>supervise */
    tsrv_fork_options options;                             /* the defaults filled in */
    int worker_grace_ms;                                   /* as it was given; 0 = the server's */
    bool grace_is_most;      /* it is that of the server that was started, and not given */
    tsrvi_identity identity; /* who workers become */
    int *fds;                /* all sockets that are listened on: for an upgrade, and to stop */
    int fd_count;
    int state; /* TSRVI_PARENT_RUNNING and so on */
    int workers;
    tsrvi_child *children; /* TSRVI_GENERATIONS for each worker, and for programs of upgrades */
    int count;             /* of children */
    int born;              /* in a fork's child, which that is; -1 = this is the parent */
    bool server;           /* tsrv_server_start has called: a worker never ends by itself */
    bool serves;           /* workers accept, so that all have to */
    bool limited;          /* start_timeout_ms was given: it holds also before that is known */
    bool forked;           /* there has been a worker */
    bool announced;        /* READY=1 was sent */
    bool settled;          /* all workers have accepted for a second */
    bool rolling;          /* a reload goes on */
    bool stalled;          /* it waits for a place, which was said */
    unsigned generation;   /* of the last reload */
    int fresh;             /* the child that is to take an old one's place; -1 = none */
    int failures;          /* in a row */
    uint64_t failed;       /* when the last was */
    int signo;             /* by which children are told */
    int status;            /* TSRVI_CHILD_ENDS: as from waitpid */
    int code;              /* what the parent returns in the end */
    int upgrade;           /* the program that does not serve yet; -1 = none */
    int upgrade_fd;        /* it writes here when it does */
    uint64_t told;         /* until then the service manager must have heard who serves now */
    int wake[2];
    uint64_t now;            /* the supervisor's clock */
    uint64_t clock;          /* the real one, when it was last read */
    uint64_t slept;          /* how long the parent meant to sleep since */
    tsrvi_watchdog watchdog; /* on the real clock */
    uint64_t second;         /* the same; when it began, */
    int rounds;              /* and the rounds since */
    sigset_t mask;           /* the host's, as its handlers are: */
    struct sigaction before[TSRVI_SUPERVISED];
    int installed;
    char name[64]; /* of a child, for the log */
} tsrvi_supervisor;

/* The tables of the banner; NULL cannot be. */
typedef void (*tsrvi_child_action)(tsrvi_supervisor *, int child);
typedef void (*tsrvi_parent_action)(tsrvi_supervisor *);

static bool tsrvi_child_is_program(const tsrvi_supervisor *s, int child)
{
    return child >= s->workers * TSRVI_GENERATIONS;
}

/* A name for the log, until the next call. */
static const char *tsrvi_child_name(tsrvi_supervisor *s, int child)
{
    long pid = (long)s->children[child].pid;
    if (tsrvi_child_is_program(s, child)) {
        snprintf(s->name, sizeof(s->name), "upgrade: the new program (pid %ld)", pid);
    } else {
        snprintf(s->name, sizeof(s->name), "worker %d (pid %ld)", child / TSRVI_GENERATIONS, pid);
    }
    return s->name;
}

/* Of a worker's children that are not told to end, one that is not `except`; -1 = none. */
static int tsrvi_child_beside(const tsrvi_supervisor *s, int worker, int except)
{
    for (int i = worker * TSRVI_GENERATIONS; i < (worker + 1) * TSRVI_GENERATIONS; i++) {
        int state = s->children[i].state;
        if (i != except && state != TSRVI_CHILD_VACANT && state != TSRVI_CHILD_LEAVING) {
            return i;
        }
    }
    return -1;
}

/* A vacant one; -1 = none. */
static int tsrvi_child_vacant(const tsrvi_supervisor *s, int worker)
{
    for (int i = worker * TSRVI_GENERATIONS; i < (worker + 1) * TSRVI_GENERATIONS; i++) {
        if (s->children[i].state == TSRVI_CHILD_VACANT) {
            return i;
        }
    }
    return -1;
}

/* Has it been what it is to be for so long? A worker without a server only has to live. */
static bool tsrvi_child_is_up(const tsrvi_supervisor *s, int child, int ms)
{
    const tsrvi_child *c = &s->children[child];
    uint64_t least = (uint64_t)ms * TSRVI_MS;
    return (c->state == TSRVI_CHILD_SERVING && s->now - c->served >= least) ||
           (c->state == TSRVI_CHILD_STARTING && !s->serves &&
            s->now - c->started >= TSRVI_SETTLED_MS * TSRVI_MS);
}

/* ---- signals and descriptors of the parent ---------------------------------*/

static void tsrvi_supervised_handler(int signo)
{
    for (int i = 0; i < TSRVI_SUPERVISED; i++) {
        if (tsrvi_supervised[i] == signo) {
            __atomic_store_n(&tsrvi_process.supervised_got[i], 1, __ATOMIC_RELEASE);
        }
    }
    if (tsrvi_process.supervised_wake > 2) { /* no descriptor of ours is less */
        tsrvi_wake_write(tsrvi_process.supervised_wake);
    }
}

/* Put the host's handlers back; the mask, s->mask, comes after them. */
static void tsrvi_supervisor_uninstall(tsrvi_supervisor *s)
{
    while (s->installed > 0) {
        s->installed--;
        TSRV_SYS(sigaction, (tsrvi_supervised[s->installed], &s->before[s->installed], NULL));
    }
}

static int tsrvi_supervisor_install(tsrvi_supervisor *s)
{
    struct sigaction action;
    sigset_t unblocked;
    int count = s->options.upgrade_argv == NULL ? TSRVI_SUPERVISED - 1 : TSRVI_SUPERVISED;
    memset(&action, 0, sizeof(action));
    action.sa_handler = tsrvi_supervised_handler;
    action.sa_flags = SA_RESTART;
    TSRV_SYS(sigfillset, (&action.sa_mask));
    TSRV_SYS(sigemptyset, (&unblocked));
    for (int i = 0; i < count; i++) {
        __atomic_store_n(&tsrvi_process.supervised_got[i], 0, __ATOMIC_RELEASE);
        TSRV_SYS(sigaddset, (&unblocked, tsrvi_supervised[i]));
        if (TSRV_SYS(sigaction, (tsrvi_supervised[i], &action, &s->before[i])) < 0) {
            return tsrvi_error();
        }
        s->installed++;
    }
    TSRV_SYS(sigprocmask, (SIG_UNBLOCK, &unblocked, NULL));
    return TSRV_OK;
}

/* The counters for this many workers, in memory that they will share; those of workers that have
 * been are gone. */
static int tsrvi_places_map(int workers)
{
    size_t count = (size_t)workers * TSRVI_GENERATIONS;
    void *memory = TSRV_SYS(mmap, (NULL, count * sizeof(tsrvi_place), PROT_READ | PROT_WRITE,
                                   MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED) {
        return -ENOMEM;
    }
    tsrvi_places_drop();
    tsrvi_process.places = (tsrvi_place *)memory;
    tsrvi_process.place_count = (int)count;
    return TSRV_OK;
}

/* The end of supervision, in the parent and in each child. */
static void tsrvi_supervisor_close(tsrvi_supervisor *s)
{
    for (int i = 0; i < s->count; i++) {
        tsrvi_close_fd(s->children[i].line);
    }
    tsrvi_close_fd(s->wake[0]);
    tsrvi_close_fd(s->wake[1]);
    tsrvi_close_fd(s->upgrade_fd);
    TSRV_FREE(s->children);
    TSRV_FREE(s->fds);
}

/* Learn which sockets are listened on: those that the caller names, and those that the library has
 * bound, for this server or for another one. */
static int tsrvi_supervisor_find_sockets(tsrvi_supervisor *s)
{
    int given = s->options.fd_count, own = tsrvi_bound_get(NULL, 0), *fds;
    if (given + own == 0) {
        return TSRV_OK;
    }
    fds = s->fds = (int *)TSRV_MALLOC((size_t)(given + own) * sizeof(*fds));
    if (fds == NULL) {
        return -ENOMEM;
    }
    own = (int)tsrvi_min((size_t)tsrvi_bound_get(fds, own), (size_t)own);
    for (int i = 0; i < given; i++) {
        int same = 0;
        while (same < own && fds[same] != s->options.fds[i]) {
            same++;
        }
        if (same == own) {
            fds[own++] = s->options.fds[i];
        }
    }
    s->fd_count = own;
    return TSRV_OK;
}

static int tsrvi_supervisor_open(tsrvi_supervisor *s, int workers, const tsrv_fork_options *options)
{
    int count = (workers + 1) * TSRVI_GENERATIONS, rc;
    memset(s, 0, sizeof(*s));
    TSRV_SYS(sigprocmask, (SIG_SETMASK, NULL, &s->mask));
    if (options != NULL) {
        s->options = *options;
    }
    s->worker_grace_ms = s->options.grace_ms;
    s->options.grace_ms = tsrvi_default_ms(s->options.grace_ms, 30000);
    s->limited = s->options.start_timeout_ms > 0;
    s->options.start_timeout_ms = tsrvi_default_ms(s->options.start_timeout_ms, TSRVI_START_MS);
    s->options.max_restarts =
        s->options.max_restarts == 0 ? TSRVI_RESTARTS : s->options.max_restarts;
    s->workers = workers;
    s->signo = SIGTERM;
    s->code = TSRV_EPARENT;
    s->born = s->fresh = s->upgrade = s->upgrade_fd = s->wake[0] = s->wake[1] = -1;
    s->now = s->clock = tsrvi_clock();
    s->watchdog = tsrvi_watchdog_make();
    tsrvi_notify_remember();
    if ((rc = tsrvi_identity_find(s->options.user, s->options.group, &s->identity)) < 0) {
        return rc;
    }
    s->children = (tsrvi_child *)tsrvi_zalloc((size_t)count * sizeof(*s->children));
    if (s->children == NULL) {
        return -ENOMEM;
    }
    for (s->count = 0; s->count < count; s->count++) {
        s->children[s->count].line = -1;
    }
    if ((rc = tsrvi_supervisor_find_sockets(s)) < 0 || (rc = tsrvi_places_map(workers)) < 0 ||
        (rc = tsrvi_pipe(s->wake)) < 0) {
        return rc;
    }
    tsrvi_process.supervised_wake = s->wake[1];
    return tsrvi_supervisor_install(s);
}

/* ============================================================================
 * >>children  Workers: their birth, and what happens to them
 * ==========================================================================*/

/* Signals that are the parent's business and would end a worker: sent to the whole tree, as by
 * pkill(1), they must not, from the fork on. */
static void tsrvi_worker_leave_to_parent(int signo)
{
    struct sigaction action;
    if (TSRV_SYS(sigaction, (signo, NULL, &action)) == 0 && (action.sa_flags & SA_SIGINFO) == 0 &&
        action.sa_handler == SIG_DFL) {
        action.sa_handler = tsrvi_signal_nothing;
        action.sa_flags = SA_RESTART;
        TSRV_SYS(sigaction, (signo, &action, NULL));
    }
}

/* A fork's child becomes a worker: the descriptors that were the parent's own go. */
static void tsrvi_supervisor_become_worker(tsrvi_supervisor *s, int child, int line, pid_t parent)
{
    int beat_ms = s->options.heartbeat_ms / 4 + 1;
    tsrvi_process.parent = parent;
    tsrvi_process.number = child / TSRVI_GENERATIONS + 1;
    tsrvi_process.place_own = &tsrvi_process.places[child];
    tsrvi_process.place_own->refused = tsrvi_identity_assume(&s->identity);
    tsrvi_worker_follow_parent();
    if (tsrvi_process.place_own->refused < 0 || TSRV_SYS(getppid, ()) != parent) {
        TSRV_SYS(_exit, (tsrvi_process.place_own->refused < 0)); /* 0: the parent has died */
    }
    tsrvi_process.notify_owed[0] = 0;
    tsrvi_process.chief = NULL;
    memset(&tsrvi_process.worker, 0, sizeof(tsrvi_process.worker));
    tsrvi_process.worker.pid = TSRV_SYS(getpid, ());
    beat_ms = s->options.heartbeat_ms <= 0 || beat_ms > TSRVI_BEAT_MS ? TSRVI_BEAT_MS : beat_ms;
    tsrvi_process.worker.interval = (uint64_t)beat_ms * TSRVI_MS;
    tsrvi_process.worker.watchdog.due = TSRVI_FOREVER;
    tsrvi_process.worker.grace_ms = s->worker_grace_ms;
    tsrvi_process.worker.grace_is_most = s->grace_is_most;
    tsrvi_process.worker.line.fd = line;
    tsrvi_process.worker.wake = s->wake[1];
    s->wake[1] = -1;
    tsrvi_process.supervised_wake = -1;
    tsrvi_close_fd(tsrvi_handed_take_ready());
    tsrvi_process.hooks = &tsrvi_worker_hooks;
    tsrvi_worker_leave_to_parent(SIGHUP);
    if (s->options.upgrade_argv != NULL) {
        tsrvi_worker_leave_to_parent(SIGUSR2);
    }
    tsrvi_worker_choose_end(&s->mask);
    TSRV_SYS(sigprocmask, (SIG_SETMASK, &s->mask, NULL));
}

/* fork. Returns the child's pid; a code; 0 in the child, which has all signals blocked and not our
 * handlers: when it knows what it is, s->mask follows. */
static pid_t tsrvi_supervisor_clone(tsrvi_supervisor *s, int child)
{
    pid_t pid;
    sigset_t all, mask;
    TSRV_SYS(sigfillset, (&all));
    TSRV_SYS(sigprocmask, (SIG_SETMASK, &all, &mask));
    pid = TSRV_SYS(fork, ());
    if (pid == 0) {
        s->born = child;
        tsrvi_supervisor_uninstall(s);
        return 0;
    }
    if (pid < 0) {
        pid = tsrvi_error();
    }
    TSRV_SYS(sigprocmask, (SIG_SETMASK, &mask, NULL));
    return pid;
}

/* The next back-off: 100 ms, doubling to 30 s, and from the beginning after a stable minute. */
static void tsrvi_child_back_off(tsrvi_supervisor *s, tsrvi_child *c)
{
    if (c->backoff_ms == 0 || s->now - c->started >= TSRVI_STABLE_MS * TSRVI_MS) {
        c->backoff_ms = TSRVI_RESTART_MS;
    } else {
        c->backoff_ms *= 2;
        c->backoff_ms = c->backoff_ms > TSRVI_RESTART_MAX_MS ? TSRVI_RESTART_MAX_MS : c->backoff_ms;
    }
    c->state = TSRVI_CHILD_DUE;
    c->due = tsrvi_after(s->now, c->backoff_ms);
}

/* A reload begins, or is over. Where servers are to accept, and none ever has, READY=1 would be
 * taken for the start's, and not be true. */
static void tsrvi_supervisor_tell_reload(const tsrvi_supervisor *s, const char *state)
{
    if (s->announced || !s->serves) {
        tsrvi_notify(state);
    }
}

/* The reload cannot go on with the child that it has just made. A newer one does. */
static void tsrvi_supervisor_give_reload_up(tsrvi_supervisor *s, int child)
{
    s->fresh = -1;
    TSRV_ASSERT(s->rolling);
    if (s->children[child].generation == s->generation) {
        tsrvi_log(TSRV_LOG_ERROR,
                  "reload: given up, as the new worker %d does not come up; the old ones stay",
                  child / TSRVI_GENERATIONS);
        s->rolling = false;
        tsrvi_supervisor_tell_reload(s, "READY=1");
    }
}

/* A fork that fails is no worker's bad end: it is tried again, but for a reload's, whose old worker
 * is there, and for the very first, whose caller learns why. */
static void tsrvi_child_unborn(tsrvi_supervisor *s, int child, int code)
{
    tsrvi_child *c = &s->children[child];
    tsrvi_log(TSRV_LOG_ERROR, "worker %d: fork: %s", child / TSRVI_GENERATIONS,
              tsrv_strerror(code));
    if (child == s->fresh) {
        c->state = TSRVI_CHILD_VACANT;
        tsrvi_supervisor_give_reload_up(s, child);
    } else if (!s->forked) {
        c->state = TSRVI_CHILD_VACANT;
        s->code = code;
        s->happens(s, TSRVI_PARENT_STOP);
    } else {
        c->started = s->now;
        tsrvi_child_back_off(s, c);
    }
}

/* Before each fork: else every worker prints what is in the buffers. Later that is what on_exit has
 * printed; another stream than stdout may be in the hands of another thread, and is left alone.
 * Nobody may read any more what the program has printed. */
static void tsrvi_supervisor_flush(const tsrvi_supervisor *s)
{
    struct pollfd entry;
    tsrvi_quiet quiet;
    entry.fd = STDOUT_FILENO;
    entry.events = POLLOUT;
    entry.revents = 0;
    if (s->forked && TSRV_SYS(poll, (&entry, 1, 0)) <= 0) {
        return; /* a line twice is better than a parent that waits for who reads it */
    }
    tsrvi_quiet_begin(&quiet);
    tsrvi_quiet_end(&quiet, TSRV_SYS(fflush, (s->forked ? stdout : NULL)) == 0 ? 1 : 0, 1);
}

/* It was forked, and has `ms` to accept. */
static void tsrvi_child_born(tsrvi_supervisor *s, int child, pid_t pid, int ms)
{
    tsrvi_child *c = &s->children[child];
    c->state = TSRVI_CHILD_STARTING;
    c->pid = pid;
    c->said = 0;
    c->started = c->beaten = s->now;
    c->due = tsrvi_after(s->now, ms);
    c->beat = 0;
    c->at_end = false;
    c->drains = true;
}

static void tsrvi_child_fork(tsrvi_supervisor *s, int child)
{
    tsrvi_child *c = &s->children[child];
    int lines[2], rc;
    pid_t parent = TSRV_SYS(getpid, ()), pid;
    tsrvi_supervisor_flush(s);
    rc = tsrvi_fds_own(lines, TSRV_SYS(socketpair, (AF_UNIX, SOCK_STREAM, 0, lines)));
    tsrvi_place_take(child);
    c->generation = s->generation;
    pid = rc < 0 ? (pid_t)rc : tsrvi_supervisor_clone(s, child);
    if (pid == 0) {
        tsrvi_close_fd(lines[0]);
        tsrvi_supervisor_become_worker(s, child, lines[1], parent);
        return;
    }
    tsrvi_close_fd(lines[1]); /* -1 without a pair */
    if (pid < 0) {
        tsrvi_close_fd(lines[0]);
        tsrvi_child_unborn(s, child, (int)pid);
        return;
    }
    s->forked = true;
    c->line = lines[0];
    tsrvi_child_born(s, child, pid,
                     s->serves || s->limited ? s->options.start_timeout_ms : TSRV_NEVER);
}

/* ---- what happens to a child -----------------------------------------------*/

static void tsrvi_child_ignore(tsrvi_supervisor *s, int child)
{
    (void)s;
    (void)child;
}

static void tsrvi_child_cancel(tsrvi_supervisor *s, int child)
{
    s->children[child].state = TSRVI_CHILD_VACANT;
}

static int tsrvi_child_signal(tsrvi_supervisor *s, int child, int signo)
{
    int rc = TSRV_SYS(kill, (s->children[child].pid, signo)) < 0 ? tsrvi_error() : TSRV_OK;
    if (rc < 0 && rc != -ESRCH) { /* it may have become another user's */
        tsrvi_log(TSRV_LOG_ERROR, "%s cannot be sent signal %d: %s", tsrvi_child_name(s, child),
                  signo, tsrv_strerror(rc));
    }
    return rc;
}

/* Does a worker that was told over the life-line hear it? If it does not listen by now, it may have
 * heard this before its loop has ended: what it does behind that is not to be cut. */
static bool tsrvi_child_hears(tsrvi_supervisor *s, int child)
{
    const tsrvi_place *place = &tsrvi_process.places[child];
    s->children[child].said++;
    return __atomic_load_n(&place->listens, __ATOMIC_ACQUIRE) != 0 ||
           __atomic_load_n(&place->heard, __ATOMIC_ACQUIRE) == s->children[child].said;
}

/* Who has no loop that listens to the life-line gets the signal itself. */
static void tsrvi_child_say(tsrvi_supervisor *s, int child)
{
    char signo = (char)s->signo;
    if (tsrvi_child_is_program(s, child) ||
        TSRV_SYS(send, (s->children[child].line, &signo, 1, TSRVI_SEND_FLAGS)) != 1 ||
        !tsrvi_child_hears(s, child)) {
        tsrvi_child_signal(s, child, s->signo);
    }
}

/* When a child that is told to end now is killed. A program kills its own workers first. */
static uint64_t tsrvi_child_limit(const tsrvi_supervisor *s, int child)
{
    bool cut = s->state == TSRVI_PARENT_CUTTING;
    uint64_t due = cut ? s->now : tsrvi_after(s->now, s->options.grace_ms);
    int more = tsrvi_child_is_program(s, child) ? 2 * TSRVI_KILL_MS : TSRVI_KILL_MS;
    return due == TSRVI_FOREVER ? due : tsrvi_after(due, more);
}

/* A worker that does not accept yet has nothing to drain, but the listening sockets, on which the
 * kernel goes on to take connections as long as it lives. */
static bool tsrvi_child_drains(const tsrvi_supervisor *s, int child)
{
    return tsrvi_child_is_program(s, child) || !s->serves ||
           __atomic_load_n(&tsrvi_process.places[child].ready, __ATOMIC_ACQUIRE) != 0;
}

static void tsrvi_child_tell(tsrvi_supervisor *s, int child)
{
    tsrvi_child *c = &s->children[child];
    c->state = TSRVI_CHILD_LEAVING;
    c->drains = tsrvi_child_drains(s, child);
    c->due = c->drains ? tsrvi_child_limit(s, child) : tsrvi_after(s->now, TSRVI_HUNG_MS);
    c->at_end = s->state != TSRVI_PARENT_RUNNING;
    tsrvi_child_say(s, child);
}

/* It accepts. With the first that does, all others have to, in time. */
static void tsrvi_child_serve(tsrvi_supervisor *s, int child)
{
    tsrvi_child *c = &s->children[child];
    c->state = TSRVI_CHILD_SERVING;
    c->served = s->now;
    c->due = TSRVI_FOREVER;
    if (tsrvi_child_is_program(s, child)) {
        s->upgrade = -1;
        s->happens(s, TSRVI_PARENT_TAKEN);
        return;
    }
    if (!s->announced) {
        s->announced = true;
        tsrvi_notify("READY=1");
        if (s->rolling) {
            tsrvi_notify("RELOADING=1"); /* which was no news before that */
        }
    }
    for (int i = 0; i < s->count && !s->serves; i++) {
        if (s->children[i].state == TSRVI_CHILD_STARTING) {
            s->children[i].due = tsrvi_after(s->children[i].started, s->options.start_timeout_ms);
        }
    }
    s->serves = true;
}

/* It is ended: a worker so that it leaves a core, a program in its own good order. */
static void tsrvi_child_end(tsrvi_supervisor *s, int child)
{
    tsrvi_child *c = &s->children[child];
    bool program = tsrvi_child_is_program(s, child);
    tsrvi_child_signal(s, child, program ? SIGTERM : SIGABRT);
    c->state = TSRVI_CHILD_DYING;
    c->due = program ? tsrvi_child_limit(s, child) : tsrvi_after(s->now, TSRVI_HUNG_MS);
}

static void tsrvi_child_late(tsrvi_supervisor *s, int child)
{
    tsrvi_log(TSRV_LOG_ERROR, "%s does not accept within start_timeout_ms (%d) and is ended",
              tsrvi_child_name(s, child), s->options.start_timeout_ms);
    tsrvi_child_end(s, child);
}

static void tsrvi_child_abort(tsrvi_supervisor *s, int child)
{
    tsrvi_log(TSRV_LOG_ERROR, "%s hangs: its loop has not turned for heartbeat_ms (%d)",
              tsrvi_child_name(s, child), s->options.heartbeat_ms);
    tsrvi_child_end(s, child);
}

/* It is too late; but not for who has begun to accept before it heard. */
static void tsrvi_child_kill(tsrvi_supervisor *s, int child)
{
    tsrvi_child *c = &s->children[child];
    if (!c->drains && tsrvi_child_drains(s, child)) {
        c->drains = true;
        c->due = tsrvi_child_limit(s, child);
        return;
    }
    tsrvi_log(TSRV_LOG_WARNING, "%s does not end and is killed", tsrvi_child_name(s, child));
    c->due = tsrvi_child_signal(s, child, SIGKILL) == TSRV_OK ? TSRVI_FOREVER
                                                              : tsrvi_after(s->now, TSRVI_KILL_MS);
    if (c->at_end && c->drains && s->code == TSRV_EPARENT) {
        s->code = TSRV_ETIMEOUT;
    }
}

/* One that is dying anyway is not replaced any more. */
static void tsrvi_child_leave(tsrvi_supervisor *s, int child)
{
    s->children[child].state = TSRVI_CHILD_LEAVING;
}

/* Connections that a dead process had are closed, whatever it has counted. */
static void tsrvi_child_settle(int child)
{
    for (int number = 0; number < TSRVI_SHARED_SERVERS; number++) {
        tsrv_stats *stats = &tsrvi_process.places[child].stats[number];
        stats->closed += stats->open;
        stats->ended_error += stats->open;
        stats->open = 0;
        stats->lag_ms = 0;
    }
}

/* Has a worker that has ended come to its own end? Only one that tsrv_server_start has not made
 * can, and not because somebody has sent it a signal. */
static bool tsrvi_child_has_finished(const tsrvi_supervisor *s, int child)
{
    return WIFEXITED(s->status) && WEXITSTATUS(s->status) == 0 && !s->server &&
           !tsrvi_child_is_program(s, child) &&
           !__atomic_load_n(&tsrvi_process.places[child].asked, __ATOMIC_ACQUIRE);
}

/* It has ended, and nothing follows from that. */
static void tsrvi_child_bury(tsrvi_supervisor *s, int child)
{
    tsrvi_child *c = &s->children[child];
    bool program = tsrvi_child_is_program(s, child);
    bool expected = c->state == TSRVI_CHILD_LEAVING || tsrvi_child_has_finished(s, child);
    int pid = (int)c->pid, status = s->status;
    tsrvi_log(expected ? TSRV_LOG_INFO : TSRV_LOG_WARNING, "%s %s %d%s", tsrvi_child_name(s, child),
              WIFEXITED(status) ? "exited with status" : "was ended by signal",
              WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status),
              expected || c->state == TSRVI_CHILD_DYING ? "" : ", unasked");
    tsrvi_close_fd(c->line);
    c->line = -1;
    c->pid = 0;
    c->state = TSRVI_CHILD_VACANT;
    if (child == s->upgrade) {
        tsrvi_close_fd(s->upgrade_fd);
        s->upgrade = s->upgrade_fd = -1;
    }
    if (!program) {
        tsrvi_child_settle(child);
        if (s->options.on_exit != NULL) {
            s->options.on_exit(child / TSRVI_GENERATIONS, pid, status, s->options.context);
        }
    }
}

/* It is forked again, later; or too many ends were bad. While the program that this one is to
 * replace still serves, one is too many. */
static void tsrvi_child_retry(tsrvi_supervisor *s, int child)
{
    tsrvi_process.places[child].stats[0].restarts++;
    if (tsrvi_handed_waits()) {
        tsrvi_log(TSRV_LOG_ERROR, "upgrade: worker %d does not stay up; the old program goes on",
                  child / TSRVI_GENERATIONS);
        s->happens(s, TSRVI_PARENT_FAILS);
        return;
    }
    if (s->now - s->failed >= TSRVI_STABLE_MS * TSRVI_MS) {
        s->failures = 0;
    }
    s->failed = s->now;
    s->failures++;
    if (s->options.max_restarts >= 0 && s->failures > s->options.max_restarts) {
        tsrvi_log(TSRV_LOG_ERROR, "giving up after %d restarts in a row (max_restarts)",
                  s->options.max_restarts);
        s->happens(s, TSRVI_PARENT_FAILS);
    } else {
        tsrvi_child_back_off(s, &s->children[child]);
        tsrvi_log(TSRV_LOG_INFO, "worker %d is started again in %d ms, bad end %d in a row",
                  child / TSRVI_GENERATIONS, s->children[child].backoff_ms, s->failures);
    }
}

/* It has ended without having been told to. */
static void tsrvi_child_replace_worker(tsrvi_supervisor *s, int child)
{
    const tsrvi_place *place = &tsrvi_process.places[child];
    tsrvi_child_bury(s, child);
    if (child == s->fresh) {
        tsrvi_supervisor_give_reload_up(s, child);
    }
    if (tsrvi_child_beside(s, child / TSRVI_GENERATIONS, child) >= 0) {
        return; /* another process has its place already */
    }
    if (place->refused < 0 && !s->announced) {
        s->code = place->refused;
        s->happens(s, TSRVI_PARENT_STOP);
    } else if (!tsrvi_child_has_finished(s, child)) {
        tsrvi_child_retry(s, child);
    }
}

static void tsrvi_child_replace(tsrvi_supervisor *s, int child)
{
    if (tsrvi_child_is_program(s, child)) {
        tsrvi_child_bury(s, child);
        tsrvi_log(TSRV_LOG_ERROR, "upgrade: given up, this program goes on");
    } else {
        tsrvi_child_replace_worker(s, child);
    }
}

static const tsrvi_child_action tsrvi_child_table[TSRVI_CHILD_STATES][TSRVI_CHILD_EVENTS] = {
    {NULL, NULL, NULL, NULL, NULL},
    {tsrvi_child_fork, NULL, tsrvi_child_cancel, NULL, NULL},
    {tsrvi_child_late, tsrvi_child_serve, tsrvi_child_tell, tsrvi_child_abort, tsrvi_child_replace},
    {NULL, tsrvi_child_ignore, tsrvi_child_tell, tsrvi_child_abort, tsrvi_child_replace},
    {tsrvi_child_kill, tsrvi_child_ignore, tsrvi_child_ignore, tsrvi_child_ignore,
     tsrvi_child_bury},
    {tsrvi_child_kill, tsrvi_child_ignore, tsrvi_child_leave, tsrvi_child_ignore,
     tsrvi_child_replace},
};

static void tsrvi_child_happens(tsrvi_supervisor *s, int child, int event)
{
    tsrvi_child_action action = tsrvi_child_table[s->children[child].state][event];
    TSRV_ASSERT(action != NULL);
    action(s, child);
}

/* ============================================================================
 * >>supervise  Reloads and upgrades
 * ==========================================================================*/

/* ---- reload ----------------------------------------------------------------*/

/* The new process is up: those that it replaces are told to end. */
static void tsrvi_reload_replace(tsrvi_supervisor *s)
{
    int fresh = s->fresh, worker = fresh / TSRVI_GENERATIONS, old;
    s->fresh = -1;
    while ((old = tsrvi_child_beside(s, worker, fresh)) >= 0) {
        tsrvi_child_happens(s, old, TSRVI_CHILD_TOLD);
    }
}

/* A worker of an older generation, -1 = none. One that is to be forked again anyway is not. */
static int tsrvi_reload_next(const tsrvi_supervisor *s)
{
    for (int worker = 0; worker < s->workers; worker++) {
        int child = tsrvi_child_beside(s, worker, -1);
        if (child >= 0 && s->children[child].generation != s->generation &&
            (s->children[child].state == TSRVI_CHILD_STARTING ||
             s->children[child].state == TSRVI_CHILD_SERVING)) {
            return child;
        }
    }
    return -1;
}

/* Has a newer reload waited long enough for what the one before has begun? */
static bool tsrvi_reload_is_overtaken(const tsrvi_supervisor *s)
{
    const tsrvi_child *fresh = &s->children[s->fresh];
    return fresh->generation != s->generation &&
           s->now - fresh->started >= TSRVI_SETTLED_MS * TSRVI_MS;
}

/* What the reload before has begun is told to end. The worker whose old process has ended meanwhile
 * gets another one, in the place that this has left. */
static void tsrvi_reload_overtake(tsrvi_supervisor *s)
{
    int worker = s->fresh / TSRVI_GENERATIONS, place = tsrvi_child_vacant(s, worker);
    bool alone = tsrvi_child_beside(s, worker, s->fresh) < 0;
    tsrvi_child_happens(s, s->fresh, TSRVI_CHILD_TOLD);
    s->fresh = -1;
    if (alone) {
        TSRV_ASSERT(place >= 0);
        s->children[place].state = TSRVI_CHILD_DUE;
        s->children[place].backoff_ms = 0;
        s->children[place].due = s->now;
    }
}

/* All old ones have been replaced. A worker that had no process when the reload began, or has lost
 * it since, is waited for, until it is up or has failed. */
static void tsrvi_reload_end(tsrvi_supervisor *s)
{
    int missing = 0;
    for (int worker = 0; worker < s->workers; worker++) {
        int child = tsrvi_child_beside(s, worker, -1);
        if (child >= 0 && s->children[child].state == TSRVI_CHILD_DUE) {
            if (s->children[child].generation != s->generation) {
                s->children[child].due = s->now; /* with what is new nobody has tried yet */
                return;
            }
            missing++;
        } else if (child >= 0 && !tsrvi_child_is_up(s, child, 0)) {
            return;
        }
    }
    s->rolling = false;
    if (missing > 0) {
        tsrvi_log(TSRV_LOG_ERROR, "reload: over, but %d of %d workers do not come up", missing,
                  s->workers);
    } else {
        tsrvi_log(TSRV_LOG_INFO, "reload: done, all %d workers are new", s->workers);
    }
    tsrvi_supervisor_tell_reload(s, "READY=1");
}

/* One step. Where a worker has no place left for another process, the next one that ends makes it.
 */
static void tsrvi_reload_step(tsrvi_supervisor *s)
{
    int old, place;
    if (s->fresh >= 0 && tsrvi_child_is_up(s, s->fresh, 0)) {
        tsrvi_reload_replace(s);
    } else if (s->fresh >= 0 && tsrvi_reload_is_overtaken(s)) {
        tsrvi_reload_overtake(s);
    }
    if (!s->rolling || s->fresh >= 0) {
        return;
    }
    if ((old = tsrvi_reload_next(s)) < 0) {
        tsrvi_reload_end(s);
        return;
    }
    if ((place = tsrvi_child_vacant(s, old / TSRVI_GENERATIONS)) >= 0) {
        s->fresh = place;
        s->children[place].state = TSRVI_CHILD_DUE;
        s->children[place].backoff_ms = 0;
        s->children[place].due = s->now;
        s->stalled = false;
        tsrvi_child_happens(s, place, TSRVI_CHILD_TIME);
    } else if (!s->stalled) {
        s->stalled = true;
        tsrvi_log(TSRV_LOG_WARNING, "reload: waits until one of the %d processes of worker %d ends",
                  TSRVI_GENERATIONS, old / TSRVI_GENERATIONS);
    }
}

/* ---- upgrade ---------------------------------------------------------------*/

/* Put the listening sockets, and behind them the pipe, where systemd would put them: first all of
 * them out of the way, and only then each to its place. */
static int tsrvi_upgrade_place(const tsrvi_supervisor *s, int ready, int *moved)
{
    int count = s->fd_count;
    for (int i = 0; i <= count; i++) {
        moved[i] = TSRV_SYS(fcntl, (i < count ? s->fds[i] : ready, F_DUPFD_CLOEXEC,
                                    TSRVI_LISTEN_FIRST + count + 1));
        if (moved[i] < 0) {
            return tsrvi_error();
        }
    }
    for (int i = 0; i <= count; i++) {
        if (TSRV_SYS(dup2, (moved[i], TSRVI_LISTEN_FIRST + i)) < 0) {
            return tsrvi_error();
        }
    }
    return TSRV_OK;
}

/* Set a variable of the environment to a number. */
static int tsrvi_upgrade_set(const char *name, long value)
{
    char number[24];
    snprintf(number, sizeof(number), "%ld", value);
    return TSRV_SYS(setenv, (name, number, 1)) < 0 ? tsrvi_error() : TSRV_OK;
}

/* What the new program is told of the sockets. */
typedef struct tsrvi_upgrade {
    int *moved;  /* room for one descriptor more than there are */
    char *files; /* those whose files go with them: "3,7," */
    char *names; /* LISTEN_FDNAMES: those that the service manager has given them */
} tsrvi_upgrade;

/* Learn it, before the fork, as a child owns none. All is in one piece of memory, at `moved`. */
static int tsrvi_upgrade_describe(const tsrvi_supervisor *s, tsrvi_upgrade *upgrade)
{
    size_t count = (size_t)s->fd_count, files_size = 12 * count + 1,
           names_size = TSRVI_FD_NAME_SIZE * count + 1, used = 0, named = 0;
    upgrade->moved =
        (int *)TSRV_MALLOC((count + 1) * sizeof(*upgrade->moved) + files_size + names_size);
    if (upgrade->moved == NULL) {
        return -ENOMEM;
    }
    upgrade->files = (char *)(upgrade->moved + count + 1);
    upgrade->names = upgrade->files + files_size;
    upgrade->files[0] = upgrade->names[0] = 0;
    for (int i = 0; i < s->fd_count; i++) {
        char name[TSRVI_FD_NAME_SIZE];
        if (tsrvi_bound_has_file(s->fds[i])) {
            used += (size_t)snprintf(upgrade->files + used, files_size - used, "%d,",
                                     TSRVI_LISTEN_FIRST + i);
        }
        named +=
            (size_t)snprintf(upgrade->names + named, names_size - named, "%s%s", i == 0 ? "" : ":",
                             tsrvi_handed_name(s->fds[i], name, sizeof(name)));
    }
    return TSRV_OK;
}

/* Become the new program, in the child; does not return. */
static void tsrvi_upgrade_exec(const tsrvi_supervisor *s, int ready, const tsrvi_upgrade *upgrade)
{
    int count = s->fd_count, rc = tsrvi_upgrade_place(s, ready, upgrade->moved);
    long pid = (long)TSRV_SYS(getpid, ());
    if (rc == TSRV_OK && (TSRV_SYS(setenv, (TSRVI_FILES_VARIABLE, upgrade->files, 1)) < 0 ||
                          (TSRV_SYS(getenv, ("LISTEN_FDNAMES")) != NULL &&
                           TSRV_SYS(setenv, ("LISTEN_FDNAMES", upgrade->names, 1)) < 0))) {
        rc = tsrvi_error();
    }
    if (rc == TSRV_OK && (rc = tsrvi_upgrade_set("LISTEN_FDS", count)) == TSRV_OK &&
        (rc = tsrvi_upgrade_set("LISTEN_PID", pid)) == TSRV_OK &&
        (rc = tsrvi_upgrade_set(TSRVI_READY_VARIABLE, TSRVI_LISTEN_FIRST + count)) == TSRV_OK &&
        (TSRV_SYS(getenv, ("WATCHDOG_PID")) == NULL ||
         (rc = tsrvi_upgrade_set("WATCHDOG_PID", pid)) == TSRV_OK)) {
        TSRV_SYS(execvp, (s->options.upgrade_argv[0], s->options.upgrade_argv));
        rc = tsrvi_error();
    }
    tsrvi_log(TSRV_LOG_ERROR, "upgrade: %s: %s", s->options.upgrade_argv[0], tsrv_strerror(rc));
    TSRV_SYS(_exit, (127));
}

/* Start the new program. */
static int tsrvi_upgrade_fork(tsrvi_supervisor *s, int child)
{
    tsrvi_child *c = &s->children[child];
    tsrvi_upgrade upgrade;
    int fds[2], rc = tsrvi_upgrade_describe(s, &upgrade);
    pid_t pid = -1;
    if (rc == TSRV_OK && (rc = tsrvi_pipe(fds)) == TSRV_OK) {
        if ((pid = tsrvi_supervisor_clone(s, child)) == 0) {
            TSRV_SYS(sigprocmask, (SIG_SETMASK, &s->mask, NULL));
            tsrvi_upgrade_exec(s, fds[1], &upgrade);
        }
        tsrvi_close_fd(fds[1]);
        if (pid < 0) {
            rc = (int)pid;
            tsrvi_close_fd(fds[0]);
        }
    }
    TSRV_FREE(upgrade.moved);
    if (rc < 0) {
        return rc;
    }
    tsrvi_child_born(s, child, pid, s->options.start_timeout_ms);
    if (c->due != TSRVI_FOREVER) {
        c->due += TSRVI_SETTLED_MS * TSRVI_MS; /* in which its workers accept already */
    }
    s->upgrade = child;
    s->upgrade_fd = fds[0];
    return TSRV_OK;
}

/* Has the new program said that it serves? If it cannot any more it has ended, or is late. One that
 * says so when it has been told to end is under way until it has ended. */
static void tsrvi_upgrade_look(tsrvi_supervisor *s)
{
    char byte;
    ssize_t got = s->upgrade_fd < 0 ? -1 : TSRV_SYS(read, (s->upgrade_fd, &byte, 1));
    if (got < 0) {
        return; /* not yet */
    }
    tsrvi_close_fd(s->upgrade_fd);
    s->upgrade_fd = -1;
    if (got == 1) {
        tsrvi_child_happens(s, s->upgrade, TSRVI_CHILD_READY);
    }
}

/* ---- what happens to the parent --------------------------------------------*/

static void tsrvi_parent_ignore(tsrvi_supervisor *s)
{
    (void)s;
}

static void tsrvi_parent_refuse(tsrvi_supervisor *s)
{
    (void)s;
    tsrvi_log(TSRV_LOG_WARNING, "neither a reload nor an upgrade begins, as everything ends");
}

/* Tell everybody to end, and refuse new connections from this moment on.
 *   files  unix sockets' are removed, unless another program serves on them */
static void tsrvi_parent_leave(tsrvi_supervisor *s, int state, bool files)
{
    s->state = state;
    s->rolling = false;
    s->fresh = -1;
    tsrvi_bound_refuse_all(!files, s->wake[0]);
    for (int i = 0; i < s->options.fd_count; i++) {
        if (tsrvi_listening(s->options.fds[i]) == TSRV_OK) {
            tsrvi_bound_refuse(s->options.fds[i], s->wake[0]);
        }
    }
    for (int i = 0; i < s->count; i++) {
        if (s->children[i].state != TSRVI_CHILD_VACANT) {
            tsrvi_child_happens(s, i, TSRVI_CHILD_TOLD);
        }
    }
}

/* A limit, for the log. */
static const char *tsrvi_time_text(int ms, char *buffer, size_t size)
{
    if (ms < 0) {
        return "any time";
    }
    snprintf(buffer, size, "%d ms", ms);
    return buffer;
}

static void tsrvi_parent_stop(tsrvi_supervisor *s)
{
    char time[32];
    tsrvi_log(TSRV_LOG_INFO, "stopping: no new connections, workers have %s to end",
              tsrvi_time_text(s->options.grace_ms, time, sizeof(time)));
    tsrvi_notify_stopping();
    tsrvi_parent_leave(s, tsrvi_handed_waits() ? TSRVI_PARENT_ENDING : TSRVI_PARENT_STOPPING, true);
}

/* Everything ends already, but nobody has asked for it, or the program before this one, in an
 * upgrade, passes on what it was told: it is not the second time. */
static void tsrvi_parent_hear(tsrvi_supervisor *s)
{
    tsrvi_log(TSRV_LOG_INFO, "stopping: everything ends already");
    s->state = TSRVI_PARENT_STOPPING;
}

/* Told again: who still drains is told again too, and has little time left. */
static void tsrvi_parent_cut(tsrvi_supervisor *s)
{
    tsrvi_log(TSRV_LOG_INFO, "stopping: told again, the grace is over");
    s->state = TSRVI_PARENT_CUTTING;
    for (int i = 0; i < s->count; i++) {
        tsrvi_child *c = &s->children[i];
        if (c->state == TSRVI_CHILD_LEAVING) {
            tsrvi_child_say(s, i);
            c->due = tsrvi_earlier(c->due, tsrvi_after(s->now, TSRVI_KILL_MS));
        }
    }
}

static void tsrvi_parent_reload(tsrvi_supervisor *s)
{
    tsrvi_log(TSRV_LOG_INFO, "reload: %d workers are replaced, one after the other", s->workers);
    tsrvi_supervisor_tell_reload(s, "RELOADING=1");
    tsrvi_worker_read_files();
    s->generation++;
    s->rolling = true;
    for (int i = 0; i < s->count; i++) { /* what has made them fail may have been repaired */
        if (s->children[i].state == TSRVI_CHILD_DUE) {
            s->children[i].due = s->now;
        }
    }
}

static void tsrvi_parent_upgrade(tsrvi_supervisor *s)
{
    int child = tsrvi_child_vacant(s, s->workers), rc = TSRV_EBUSY;
    char time[32];
    if (TSRV_SYS(getpid, ()) == 1) {
        tsrvi_log(TSRV_LOG_ERROR, "upgrade: process 1 cannot be replaced by another process");
        return;
    }
    TSRV_ASSERT(child >= 0); /* there is only one at a time */
    if (s->upgrade < 0) {
        rc = tsrvi_upgrade_fork(s, child);
    }
    if (rc < 0) {
        tsrvi_log(TSRV_LOG_ERROR, "upgrade: cannot start %s: %s", s->options.upgrade_argv[0],
                  rc == TSRV_EBUSY ? "one is under way already" : tsrv_strerror(rc));
    } else {
        tsrvi_log(TSRV_LOG_INFO, "upgrade: %s is started (pid %ld), and has %s to accept",
                  s->options.upgrade_argv[0], (long)s->children[child].pid,
                  tsrvi_time_text(s->options.start_timeout_ms, time, sizeof(time)));
    }
}

/* The new program has taken over. */
static void tsrvi_parent_yield(tsrvi_supervisor *s)
{
    char state[64];
    if (s->rolling) {
        tsrvi_notify("READY=1"); /* the reload ends with this program */
    }
    for (int i = s->workers * TSRVI_GENERATIONS; i < s->count; i++) {
        if (s->children[i].state == TSRVI_CHILD_SERVING) {
            snprintf(state, sizeof(state), "MAINPID=%ld", (long)s->children[i].pid);
            tsrvi_notify(state);
            s->told = tsrvi_after(s->now, TSRVI_TELL_MS);
            tsrvi_log(TSRV_LOG_INFO, "upgrade: done, process %ld serves; this program ends",
                      (long)s->children[i].pid);
            s->children[i].state = TSRVI_CHILD_VACANT; /* it is no business of ours any more */
            s->children[i].pid = 0;
        }
    }
    tsrvi_parent_leave(s, TSRVI_PARENT_ENDING, false);
}

static void tsrvi_parent_give_up(tsrvi_supervisor *s)
{
    s->code = TSRV_ERESTARTS;
    tsrvi_notify_stopping();
    tsrvi_parent_leave(s, TSRVI_PARENT_ENDING, true);
}

static const tsrvi_parent_action tsrvi_parent_table[TSRVI_PARENT_STATES][TSRVI_PARENT_EVENTS] = {
    {tsrvi_parent_stop, tsrvi_parent_reload, tsrvi_parent_upgrade, tsrvi_parent_yield,
     tsrvi_parent_give_up},
    {tsrvi_parent_hear, tsrvi_parent_refuse, tsrvi_parent_refuse, NULL, NULL},
    {tsrvi_parent_cut, tsrvi_parent_refuse, tsrvi_parent_refuse, NULL, NULL},
    {tsrvi_parent_ignore, tsrvi_parent_refuse, tsrvi_parent_refuse, NULL, NULL},
};

static void tsrvi_parent_happens(tsrvi_supervisor *s, int event)
{
    tsrvi_parent_action action = tsrvi_parent_table[s->state][event];
    TSRV_ASSERT(action != NULL);
    action(s);
}

/* ============================================================================
 * >>rounds  Rounds of the supervisor
 * ==========================================================================*/

/* The clock goes on, but not by more than the parent has meant to sleep. */
static void tsrvi_supervisor_tick(tsrvi_supervisor *s)
{
    uint64_t clock = tsrvi_clock();
    s->now += tsrvi_earlier(clock - s->clock, s->slept + TSRVI_LATE_MS * TSRVI_MS);
    s->clock = clock;
    s->slept = 0;
}

static void tsrvi_supervisor_signals(tsrvi_supervisor *s)
{
    for (int i = 0; i < s->installed; i++) { /* what else there is came to a supervisor before */
        if (__atomic_exchange_n(&tsrvi_process.supervised_got[i], 0, __ATOMIC_ACQ_REL) == 0) {
            continue;
        }
        switch (tsrvi_supervised[i]) {
        case SIGCHLD:
            break; /* every wake-up looks for them */
        case SIGHUP:
            tsrvi_parent_happens(s, TSRVI_PARENT_RELOAD);
            break;
        case SIGUSR2:
            tsrvi_parent_happens(s, TSRVI_PARENT_UPGRADE);
            break;
        default:
            s->signo = tsrvi_supervised[i];
            tsrvi_parent_happens(s, TSRVI_PARENT_STOP);
        }
    }
}

/* Who is process 1 inherits every orphan, and has to bury them. */
static void tsrvi_supervisor_reap_orphans(tsrvi_supervisor *s)
{
    siginfo_t info;
    int status;
    memset(&info, 0, sizeof(info));
    while (TSRV_SYS(waitid, (P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT)) == 0 &&
           info.si_pid > 0) {
        for (int i = 0; i < s->count; i++) {
            if (s->children[i].pid == info.si_pid) {
                tsrvi_wake_write(s->wake[1]); /* it has ended just now: next time */
                return;
            }
        }
        TSRV_SYS(waitpid, (info.si_pid, &status, WNOHANG));
        memset(&info, 0, sizeof(info));
    }
}

/* Learn which processes have ended. Only our own are asked for. */
static void tsrvi_supervisor_reap(tsrvi_supervisor *s)
{
    for (int i = 0; i < s->count; i++) {
        tsrvi_child *c = &s->children[i];
        pid_t pid = c->pid == 0 ? 0 : TSRV_SYS(waitpid, (c->pid, &s->status, WNOHANG));
        if (pid < 0 && errno == ECHILD) {
            s->status = SIGKILL; /* somebody else has taken its status; that it has ended is sure */
            pid = c->pid;
        } else if (pid < 0) {
            tsrvi_log_limited(TSRVI_LOG_WAIT, TSRV_LOG_ERROR, "waitpid: %s",
                              tsrv_strerror(tsrvi_error()));
        }
        if (pid > 0) {
            tsrvi_child_happens(s, i, TSRVI_CHILD_ENDS);
        }
    }
    if (TSRV_SYS(getpid, ()) == 1) {
        tsrvi_supervisor_reap_orphans(s);
    }
}

/* Look at what a worker says of itself. */
static void tsrvi_supervisor_look(tsrvi_supervisor *s, int child)
{
    tsrvi_child *c = &s->children[child];
    const tsrvi_place *place = &tsrvi_process.places[child];
    unsigned beat = __atomic_load_n(&place->beat, __ATOMIC_ACQUIRE);
    if (c->state == TSRVI_CHILD_STARTING && __atomic_load_n(&place->ready, __ATOMIC_ACQUIRE)) {
        tsrvi_child_happens(s, child, TSRVI_CHILD_READY);
    }
    if (beat != c->beat) {
        c->beat = beat;
        c->beaten = s->now;
    } else if (beat != 0 && s->options.heartbeat_ms > 0 &&
               s->now - c->beaten >= (uint64_t)s->options.heartbeat_ms * TSRVI_MS) {
        tsrvi_child_happens(s, child, TSRVI_CHILD_HANGS);
    }
}

/* When all workers have accepted for a second, this program can be relied on. */
static void tsrvi_supervisor_settle(tsrvi_supervisor *s)
{
    for (int worker = 0; worker < s->workers; worker++) {
        int child = tsrvi_child_beside(s, worker, s->fresh);
        if (child < 0 || !tsrvi_child_is_up(s, child, TSRVI_SETTLED_MS)) {
            return;
        }
    }
    s->settled = true;
    tsrvi_log(TSRV_LOG_INFO, "ready: all %d workers have been up for a second", s->workers);
    tsrvi_tell_predecessor();
}

/* Do what is due. */
static void tsrvi_supervisor_act(tsrvi_supervisor *s)
{
    for (int i = 0; i < s->count && s->born < 0; i++) {
        tsrvi_child *c = &s->children[i];
        if (c->state == TSRVI_CHILD_VACANT) {
            continue;
        }
        if (!tsrvi_child_is_program(s, i) && c->pid != 0) {
            tsrvi_supervisor_look(s, i);
        }
        if (c->due <= s->now) {
            tsrvi_child_happens(s, i, TSRVI_CHILD_TIME);
        }
    }
    if (s->born >= 0) {
        return;
    }
    tsrvi_notify_again();
    tsrvi_watchdog_beat(&s->watchdog, s->clock);
    if (!s->settled && s->state == TSRVI_PARENT_RUNNING) {
        tsrvi_supervisor_settle(s);
    }
    tsrvi_reload_step(s);
}

/* When the supervisor has something to do for a child, at the latest. */
static uint64_t tsrvi_child_next(const tsrvi_supervisor *s, const tsrvi_child *c)
{
    uint64_t next = c->due;
    if (!s->settled || s->rolling) {
        uint64_t since = c->state == TSRVI_CHILD_SERVING ? c->served : c->started;
        uint64_t up = since + TSRVI_SETTLED_MS * TSRVI_MS;
        next = up > s->now ? tsrvi_earlier(next, up) : next;
    }
    if (c->beat != 0 && s->options.heartbeat_ms > 0) {
        next = tsrvi_earlier(next, s->now + (uint64_t)s->options.heartbeat_ms * TSRVI_MS / 4 + 1);
    }
    return next;
}

/* Nanoseconds until something is due, but at most a second: the host's code in this process may
 * take our signal handlers away, and then only looking helps. */
static uint64_t tsrvi_supervisor_rest(const tsrvi_supervisor *s)
{
    uint64_t next = s->now + TSRVI_LOOK_MS * TSRVI_MS, rest;
    for (int i = 0; i < s->count; i++) {
        if (s->children[i].state != TSRVI_CHILD_VACANT) {
            next = tsrvi_earlier(next, tsrvi_child_next(s, &s->children[i]));
        }
    }
    rest = next <= s->now ? 0 : next - s->now;
    return tsrvi_earlier(rest, s->watchdog.due - s->clock); /* which lies ahead */
}

static void tsrvi_supervisor_sleep(tsrvi_supervisor *s)
{
    struct pollfd entries[2];
    char buffer[512];
    int ms;
    s->slept = tsrvi_supervisor_rest(s);
    ms = s->slept == 0 ? 0 : (int)((s->slept - 1) / TSRVI_MS + 1);
    entries[0].fd = s->wake[0];
    entries[1].fd = s->upgrade_fd; /* a negative one is passed over */
    for (int i = 0; i < 2; i++) {
        entries[i].events = POLLIN;
        entries[i].revents = 0;
    }
    TSRV_SYS(poll, (entries, 2, ms));
    while (TSRV_SYS(read, (s->wake[0], buffer, sizeof(buffer))) == (ssize_t)sizeof(buffer)) {
    }
}

/* Whatever wakes the parent, and whatever call fails, it does not spin. */
static void tsrvi_supervisor_brake(tsrvi_supervisor *s)
{
    static const struct timespec pause = {0, TSRVI_BRAKE_MS * 1000000};
    if (s->clock - s->second >= 1000 * TSRVI_MS) {
        s->second = s->clock;
        s->rounds = 0;
    }
    if (++s->rounds > TSRVI_ROUNDS) {
        TSRV_SYS(nanosleep, (&pause, NULL));
    }
}

/* Is there a process, or will there be one? A service manager that has not heard who serves now
 * would take the end of this program for the service's, and end that. */
static bool tsrvi_supervisor_busy(const tsrvi_supervisor *s)
{
    for (int i = 0; i < s->count; i++) {
        if (s->children[i].state != TSRVI_CHILD_VACANT) {
            return true;
        }
    }
    return tsrvi_process.notify_owed[0] != 0 && s->now < s->told;
}

static void tsrvi_supervisor_tell_end(void)
{
    tsrv_stats all;
    memset(&all, 0, sizeof(all));
    for (int number = 0; number < TSRVI_SHARED_SERVERS; number++) {
        tsrvi_stats_gather(&all, number, -1);
    }
    tsrvi_log(TSRV_LOG_INFO,
              "all workers have ended: %llu connections were accepted, %llu of them lost with a "
              "worker or by an error, %llu restarts",
              (unsigned long long)all.accepted, (unsigned long long)all.ended_error,
              (unsigned long long)all.restarts);
}

/* Returns the task id in a worker, and in the parent when all is over, its result. Signals are
 * looked at first: what ends by one that was sent to all of us was told to end. */
static int tsrvi_supervise(tsrvi_supervisor *s)
{
    for (int worker = 0; worker < s->workers; worker++) {
        s->children[worker * TSRVI_GENERATIONS].state = TSRVI_CHILD_DUE;
    }
    tsrvi_log(TSRV_LOG_INFO, "%d workers are started (tcpserver.h %s)", s->workers, TSRV_VERSION);
    while (tsrvi_supervisor_busy(s)) {
        tsrvi_supervisor_tick(s);
        tsrvi_supervisor_signals(s);
        tsrvi_supervisor_reap(s);
        tsrvi_upgrade_look(s);
        tsrvi_supervisor_act(s);
        if (s->born >= 0) {
            return tsrvi_worker_id();
        }
        if (tsrvi_supervisor_busy(s)) {
            tsrvi_supervisor_sleep(s);
            tsrvi_supervisor_brake(s);
        }
    }
    tsrvi_process.notify_owed[0] = 0;
    tsrvi_supervisor_tell_end();
    return s->code;
}

/* Claim what a process can do only once at a time, and what a fork's child does not have. */
static bool tsrvi_claim(int *owner)
{
    int self = (int)TSRV_SYS(getpid, ());
    return __atomic_exchange_n(owner, self, __ATOMIC_ACQ_REL) != self;
}

/* A worker has its parent; its child has none, also before the first loop. */
static bool tsrvi_worker_calls(void)
{
    return tsrvi_worker_id() >= 0 && tsrvi_process.worker.pid == TSRV_SYS(getpid, ());
}

/* As tsrv_fork_processes.
 *   server  that workers run: they have no end of their own, and its grace; NULL = none */
static int tsrvi_fork(int num_processes, const tsrv_fork_options *options,
                      const tsrv_server *server)
{
    tsrvi_supervisor supervisor;
    int rc;
    if (num_processes < 0 || num_processes > TSRVI_WORKERS_MAX || tsrvi_worker_calls()) {
        tsrvi_log(TSRV_LOG_ERROR, "cannot fork %d workers: %s", num_processes,
                  tsrvi_worker_calls() ? "this is a worker" : "0 to 4096 are possible");
        return TSRV_EINVAL;
    }
    if (options != NULL &&
        (options->fd_count < 0 || (options->fd_count > 0 && options->fds == NULL))) {
        tsrvi_log(TSRV_LOG_ERROR, "cannot fork workers: fds and fd_count do not go together");
        return TSRV_EINVAL;
    }
    if (server != NULL && tsrvi_thread.own != NULL &&
        tsrvi_thread.own->poller.pid != TSRV_SYS(getpid, ())) {
        tsrvi_log(TSRV_LOG_ERROR, "cannot fork workers: the process before this one has forked "
                                  "after it had made a loop, which they would have: fork first");
        return TSRV_EINVAL;
    }
    if (tsrvi_loops_exist()) {
        tsrvi_log(TSRV_LOG_ERROR,
                  "cannot fork workers: this process has a loop already, which they "
                  "would share: fork first");
        return TSRV_EINVAL;
    }
    if (!tsrvi_claim(&tsrvi_process.supervising)) {
        tsrvi_log(TSRV_LOG_ERROR, "cannot fork workers: this process supervises others already");
        return TSRV_EBUSY;
    }
    tsrvi_handed_close_rest();
    rc = tsrvi_supervisor_open(&supervisor, num_processes == 0 ? tsrv_cpu_count() : num_processes,
                               options);
    if (server == NULL) {
        tsrvi_bound_claim(-1); /* who knows on which of them? */
    }
    if (rc == TSRV_OK) {
        supervisor.happens = tsrvi_parent_happens;
        supervisor.server = server != NULL;
        supervisor.serves = server != NULL;
        if (server != NULL && supervisor.worker_grace_ms == 0) {
            supervisor.grace_is_most = true;
            supervisor.worker_grace_ms = supervisor.options.grace_ms = server->options.grace_ms;
        }
        rc = tsrvi_supervise(&supervisor);
    }
    if (tsrvi_worker_id() < 0) {
        tsrvi_supervisor_uninstall(&supervisor);
        TSRV_SYS(sigprocmask, (SIG_SETMASK, &supervisor.mask, NULL));
        tsrvi_process.supervised_wake = -1;
    }
    tsrvi_supervisor_close(&supervisor);
    __atomic_store_n(&tsrvi_process.supervising, 0, __ATOMIC_RELEASE);
    return rc;
}

TSRV_API int tsrv_fork_processes(int num_processes, const tsrv_fork_options *options)
{
    return tsrvi_fork(num_processes, options, NULL);
}

/* ============================================================================
 * >>start  Servers in workers: tsrv_server_start
 * ==========================================================================*/

/* Another listening socket on the address of one that has SO_REUSEPORT. The service manager's take
 * IPv4's port too: one that does not would be beside their group, and get nothing. */
static int tsrvi_bound_again(const tsrvi_bound *bound)
{
    tsrv_bind_options options;
    tsrv_address address;
    tsrvi_sockaddr inside;
    int only = 1;
    socklen_t size = sizeof(only);
    int rc = tsrvi_address_get(bound->fd, tsrvi_getsockname, &address);
    if (rc < 0) {
        return rc;
    }
    memset(&options, 0, sizeof(options));
    options.reuse_port = true;
    options.backlog = bound->backlog;
    tsrvi_address_load(&address, &inside);
    if (inside.any.sa_family == AF_INET6) {
        TSRV_SYS(getsockopt, (bound->fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, &size));
    }
    return tsrvi_bind_new(&inside, (socklen_t)address.size, &options, only);
}

/* Say whose each socket is: every worker's, but where reuse_port gives each worker its own; those
 * that are missing are made, and where there are more than workers, as after an upgrade, some have
 * several. The parent has and keeps all of them, so that what is queued in one survives the worker.
 * Beside another user's, as the service manager's are, none can be made: then all share that. */
static int tsrvi_bound_spread(tsrv_server *server, int workers)
{
    int count = server->bound_count, rc = TSRV_OK;
    for (int i = 0; i < count && rc == TSRV_OK; i++) {
        int last = i; /* of those with this address */
        if (server->bound[i].rank > 0 || tsrvi_listening_is_shared(server->bound[i].fd)) {
            continue;
        }
        server->bound[i].worker = 0;
        for (; last + 1 < count && server->bound[last + 1].rank > 0; last++) {
            server->bound[last + 1].worker = server->bound[last + 1].rank % workers;
        }
        for (int rank = last - i + 1; rank < workers && rc == TSRV_OK; rank++) {
            int fd = tsrvi_bound_again(&server->bound[i]);
            if (fd == -EADDRINUSE || fd == -EACCES) {
                tsrvi_log(TSRV_LOG_INFO,
                          "all workers accept on socket %d, as no other can be made: %s",
                          server->bound[i].fd, tsrv_strerror(fd));
                server->bound[i].worker = -1;
                break;
            }
            rc = fd < 0 ? fd : tsrvi_bound_add(server, fd, server->bound[i].backlog, rank, rank);
        }
    }
    return rc;
}

/* Accept on what is bound and this worker's, and close the rest.
 *   worker  -1 = all of it */
static int tsrvi_server_open_bound(tsrv_server *server, int worker)
{
    int count = server->bound_count, rc = TSRV_OK;
    server->bound_count = 0; /* they are listeners from now on, or closed */
    for (int i = 0; i < count; i++) {
        const tsrvi_bound *bound = &server->bound[i];
        if (rc < 0 || (worker >= 0 && bound->worker >= 0 && bound->worker != worker)) {
            tsrvi_bound_close(bound->fd);
        } else {
            rc = tsrv_server_add_sockets(server, &bound->fd, 1);
        }
    }
    if (rc < 0) {
        tsrv_server_stop(server);
    }
    return rc;
}

static int tsrvi_server_fork(tsrv_server *server, int workers, const tsrv_fork_options *options)
{
    const tsrv_server *before = tsrvi_process.reloaded; /* another thread's, which goes on */
    int rc;
    workers = workers == 0 ? tsrv_cpu_count() : workers;
    for (int i = 0; i < server->bound_count; i++) {
        tsrvi_bound_claim(server->bound[i].fd); /* the others may be served by who forked us */
    }
    if ((rc = tsrvi_bound_spread(server, workers)) == TSRV_OK) {
        tsrvi_process.reloaded = server;
        rc = tsrvi_fork(workers, options, server);
        tsrvi_process.reloaded = before;
    }
    if (rc >= 0) {
        return tsrvi_server_open_bound(server, rc);
    }
    tsrvi_server_unbind(server);
    return rc;
}

/* In this process: it becomes the user itself. */
static int tsrvi_server_start_here(tsrv_server *server, const tsrv_fork_options *options)
{
    tsrvi_identity identity;
    int rc = tsrvi_server_open_bound(server, -1);
    if (rc == TSRV_OK && options != NULL &&
        ((rc = tsrvi_identity_find(options->user, options->group, &identity)) < 0 ||
         (rc = tsrvi_identity_assume(&identity)) < 0)) {
        tsrv_server_stop(server);
    }
    return rc;
}

TSRV_API int tsrv_server_start(tsrv_server *server, int num_processes,
                               const tsrv_fork_options *options)
{
    char text[TSRV_ADDRESS_SIZE] = "nothing";
    tsrv_address address;
    int rc = TSRV_EINVAL;
    if (tsrv_server_address(server, 0, &address) == TSRV_OK) {
        tsrv_address_format(&address, text, sizeof(text));
    }
    if (!TSRVI_WRONG(server->started) && !TSRVI_WRONG(server->bound_count == 0) &&
        !TSRVI_WRONG(num_processes < 0 || num_processes > TSRVI_WORKERS_MAX)) {
        server->started = true;
        rc = num_processes == 1 ? tsrvi_server_start_here(server, options)
                                : tsrvi_server_fork(server, num_processes, options);
    }
    if (rc < 0 && rc != TSRV_EPARENT && rc != TSRV_ETIMEOUT && rc != TSRV_ERESTARTS) {
        tsrvi_log(TSRV_LOG_ERROR, "cannot start %d processes on %s: %s", num_processes, text,
                  tsrv_strerror(rc));
    }
    return rc;
}

/* ============================================================================
 * >>serve  A whole server in one call
 * ==========================================================================*/

static void tsrvi_serve_ready(void)
{
    tsrvi_log(TSRV_LOG_INFO, "ready: process %ld accepts (tcpserver.h %s)",
              (long)TSRV_SYS(getpid, ()), TSRV_VERSION);
    tsrvi_process.worker.ready = tsrvi_clock();
    tsrvi_notify("READY=1");
}

/* A single process does for itself what the supervisor does for workers, but for restarts. Its
 * signals are watched before it binds, so that none ends it in between. */
static int tsrvi_serve_alone(tsrv_server *server)
{
    static const tsrvi_hooks hooks = {tsrvi_worker_entered, NULL, tsrvi_worker_hear,
                                      tsrvi_serve_ready};
    tsrv_loop *loop;
    tsrvi_watchdog watchdog = tsrvi_watchdog_make();
    int rc = tsrvi_server_loop(server, &loop);
    if (rc < 0) {
        tsrvi_log(TSRV_LOG_ERROR, "cannot make a loop: %s", tsrv_strerror(rc));
        return rc;
    }
    server->options.loop = loop;
    memset(&tsrvi_process.worker, 0, sizeof(tsrvi_process.worker));
    tsrvi_process.worker.interval = TSRVI_BEAT_MS * TSRVI_MS;
    tsrvi_process.worker.watchdog = watchdog;
    tsrvi_notify_remember();
    tsrvi_process.worker.line.fd = -1;
    tsrvi_process.worker.wake = -1;
    tsrvi_process.worker.upgradable =
        server->options.fork != NULL && server->options.fork->upgrade_argv != NULL;
    tsrvi_process.reloaded = server;
    loop->worker.hooks = &hooks; /* and no other thread's */
    tsrvi_worker_claim(loop);
    return TSRV_OK;
}

static void tsrvi_serve_done(tsrv_loop *loop)
{
    TSRV_SYS(sigprocmask, (SIG_SETMASK, &tsrvi_process.worker.mask, NULL));
    for (int i = 0; i < TSRVI_WORKER_SIGNALS; i++) {
        tsrv_signal_stop(&tsrvi_process.worker.signals[i]);
    }
    tsrvi_heap_remove(&loop->heap, &loop->worker.beat);
    loop->worker.beat.fire = NULL;
    loop->worker.told = TSRVI_STAY;
    __atomic_store_n(&tsrvi_process.chief, (tsrv_loop *)NULL, __ATOMIC_RELEASE);
    loop->worker.hooks = NULL;
    tsrvi_process.reloaded = NULL;
}

static int tsrvi_serve_run(tsrv_server *server, int port, const char *address, int num_processes,
                           const tsrv_server_options *options)
{
    int rc = tsrv_server_bind(server, port, address, options->bind);
    if (rc == TSRV_OK) {
        rc = tsrv_server_start(server, num_processes, options->fork);
    }
    if (rc == TSRV_OK) {
        __atomic_store_n(&tsrvi_process.serving, (int)TSRV_SYS(getpid, ()), __ATOMIC_RELEASE);
        rc = tsrv_loop_run(server->loop);
    }
    return rc;
}

/* A handler that still runs after a forced drain is left to a loop of the program's. */
static void tsrvi_serve_free(tsrv_server *server)
{
    if (server->loop != NULL && server->forced && !tsrvi_list_empty(&server->streams)) {
        server->ending = server->freed = true;
    } else {
        tsrv_server_free(server);
    }
}

TSRV_API int tsrv_serve(int port, const char *address, int num_processes,
                        const tsrv_server_options *options)
{
    tsrv_server *server;
    bool had_loop = tsrvi_thread.own != NULL;
    int rc = tsrv_server_new(&server, options);
    if (rc < 0) {
        return rc;
    }
    if (!tsrvi_claim(&tsrvi_process.serving)) {
        tsrvi_log(TSRV_LOG_ERROR, "tsrv_serve runs in this process already");
        tsrv_server_free(server);
        return TSRV_EBUSY;
    }
    if (num_processes == 1 && !tsrvi_worker_calls()) {
        if ((rc = tsrvi_serve_alone(server)) == TSRV_OK) {
            rc = tsrvi_serve_run(server, port, address, num_processes, options);
            tsrvi_serve_done(server->options.loop);
        }
        if (rc == TSRV_OK) {
            tsrvi_log(TSRV_LOG_INFO, "ended: %llu connections were accepted",
                      (unsigned long long)server->own.accepted);
        }
    } else {
        rc = tsrvi_serve_run(server, port, address, num_processes, options);
    }
    if (!had_loop) {
        tsrv_loop_free(NULL); /* a handler that goes on and on is dropped, and not waited for */
    }
    tsrvi_serve_free(server);
    __atomic_store_n(&tsrvi_process.serving, 0, __ATOMIC_RELEASE);
    return rc == TSRV_EPARENT ? (int)TSRV_OK : rc;
}

#ifdef __cplusplus
#pragma GCC diagnostic pop
#endif
#endif /* POSIX */
#endif /* TCPSERVER_IMPLEMENTATION */

/* ============================================================================
 * >>history  What changed
 *
 *   0.2.0  New: the PROXY protocol; tsrv_work, tsrv_run_in_thread; tsrv_condition; names are
 *          looked up on threads, and addresses tried as RFC 8305 has it; max_per_address,
 *          on_accept, max_total_buffer, slow_ms, keep-alive times, user_timeout_ms; a server's bind
 *          and loop_options, for tsrv_serve; user, group, start_timeout_ms; tsrv_metrics_format;
 *          tsrv_try_writev; of TLS: texts, passwords, revocation, OCSP, on_server_name, ticket keys
 *          that turn over, tsrv_tls_peer_name; TSRV_DEBUG names mistakes; pkg-config, CMake and
 *          Meson find it. Large messages cost less than half of what they did.
 *          What breaks: structs have more fields, so everything is to be compiled anew, and with
 *          a glibc before 2.34 linked with -pthread. num_processes 0 always forks. A worker that
 *          ends without having been told to is replaced, whatever its status; a new one that does
 *          not accept within start_timeout_ms (60 s) is ended. A stack_size below 64 KiB is 64 KiB.
 *          The library removes the file of a unix socket that it has bound. A drain refuses
 *          new connections at once, and ends who has been silent for a second. A refused write
 *          and a failed tsrv_sendfile end the stream. A second tsrv_serve at the same time is
 *          TSRV_EBUSY. tsrv_wait in on_close is TSRV_EINVAL. A deadline that is over ends reads
 *          of what is there, too. A client of TLS does not take "f*.org" for a host. The log
 *          has time, pid and level in front, and says what a server does; tsrv_set_log_level
 *          leaves that out.
 *   0.1.0  First version.
 * ==========================================================================*/

/* ============================================================================
 * >>license  MIT
 *
 * Copyright (c) 2026 the tcpserver.h authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy
 * of this software and associated documentation files (the "Software"), to deal
 * in the Software without restriction, including without limitation the rights
 * to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
 * copies of the Software, and to permit persons to whom the Software is
 * furnished to do so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all
 * copies or substantial portions of the Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
 * IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
 * FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
 * AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
 * LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
 * OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
 * SOFTWARE.
 * ==========================================================================*/
