/* A fuzzer of the stream core: libFuzzer's bytes are a script for the program, the peers and the kernel.
 *
 *     make fuzz && build/fuzz/api -max_len=300 -timeout=20 build/fuzz/api.corpus
 *
 * and build/fuzz/api FILE runs one script again; with FUZZ_TRACE=1 in the environment it says what happens.
 *
 * One script is one loop with one server in one mode, and up to STREAMS connections over socketpairs or loopback TCP.
 * The front of the input is drawn from by the program (handlers, coroutines, timers, posts, the main program between
 * turns) and by the peers; the back by the kernel: short, interrupted and failing calls, memory that is out, events
 * that are withheld or come in another order, waits that end early or late. Time is virtual.
 *
 * When the script is over, faults stop and everything has to come to its end: see finish(). What must hold at any time:
 *   - what is read is what the peer has sent, in order, and each result is what a naive look at the bytes predicts;
 *   - what a peer receives is what writes have taken, in order, and all of it after an end in good order;
 *   - a slice ends with a 0 and stays as it is until the next read on its stream, or the handler's return;
 *   - each code has a reason that the manual names; times are not early;
 *   - each wait whose time is over, or which a close, an abort or a wake ends, is over within MOST_TURNS turns;
 *   - on_close comes once, after the descriptor is closed, and nothing of the stream after it;
 *   - nothing is called from inside a library call; no turn is endless, and none is in vain again and again;
 *   - at the end no descriptor and no allocation is left.
 * With FUZZ_TLS=1 the streams speak TLS: see tls_peer.h. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif

#ifndef FUZZ_TLS
#define FUZZ_TLS 0 /* 1 = TLS, from the beginning or by tsrv_start_tls */
#endif
#if FUZZ_TLS
#define TSRV_TLS_OPENSSL
#define OPENSSL_SUPPRESS_DEPRECATED /* RAND_set_rand_method */
#endif

#include "fuzz.h"

#include <netinet/in.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef FUZZ_OLD
#define FUZZ_OLD 0 /* 1 = the header is version 0.1.0, of which less is asked */
#endif

#ifndef FUZZ_LATE
#define FUZZ_LATE false /* true: bytes are so long on their way that the end of a close's time may overtake them */
#endif

#define STREAMS 4
#define CALLS 24      /* that are under way at once */
#define ACTORS 16     /* helper coroutines, posts and timers of one script */
#define MOST_TURNS 40 /* in which a wait that is over must end, and which may be in vain */
#define MOST_SYSTEM_CALLS 20000 /* of one turn */
#define PATTERN 4099  /* after so many bytes what is written begins anew */
#define LARGEST 66000 /* bytes of a write */
#define TCP_MOST 40000 /* bytes on their way: what fills a window of TCP's comes late, and in real time */
#define MS ((uint64_t)1000000)

/* A byte of the kernel's, from the back. */
static unsigned draw_back(void)
{
    return script_is_over() ? 0 : script[--script_back];
}

/* ---- what is known of each stream ---------------------------------------------------------*/

enum {
    READ_UNTIL,
    READ_UNTIL_MEM,
    READ_BYTES,
    READ_SOME,
    READ_INTO,
    READ_MATCH,
    READ_CLOSE, /* the last of the reads */
    WRITE,
    TRY_WRITE,
    WRITEV,
    PRINTF,
    SENDFILE, /* the last of the writes */
    FLUSH,
    WAIT, /* the last that can wait in a callback-mode handler */
    SLEEP,
    DRAIN,
    SHUTDOWN,
    CLOSE,
    ABORT,
    WAKE,
    SET_TIMEOUT,
    SET_DEADLINE,
    SET_HANDLER,
    LOOK, /* at what a stream tells of itself */
    SPAWN,
    POST,
    TIMER,
    STOP,
    FREE,
    PASS_TIME,
    PEER,
    REPEAT, /* a call, many times */
    START_TLS
};

static const char *const names[] = {
    "read_until", "read_until_mem", "read_bytes", "read_some",   "read_into",    "read_match",  "read_close", "write",
    "try_write",  "writev",         "printf",     "sendfile",    "flush",        "wait",        "sleep",      "drain",
    "shutdown",   "close",          "abort",      "wake",        "set_timeout",  "set_deadline", "set_handler", "look",
    "spawn",      "post",           "timer",      "stop",        "free",         "pass_time",   "peer",
    "repeat",      "start_tls",
};

typedef struct connection connection;
typedef struct call call;

/* A time from which the library may count: the loop's, or the clock's, which it reads again where a turn may have taken
 * long. What must be over is counted from the later one, what may not be over yet from the earlier one. */
typedef struct moment {
    int64_t first, last;
} moment;

struct connection {
    struct tsrv_stream *stream;
    int fd, peer; /* -1 = closed */
    bool made;    /* the server has taken it */
    bool entered; /* its handler was called */
    bool running; /* its handler is inside */
    bool over;    /* its handler has returned for good; or on_close was called */
    bool closed;  /* on_close was called */
    bool ending;  /* this side has ended it, or may have: its bytes need not be there any more */
    bool perhaps; /* the same, if its handler's TSRV_EAGAIN counts as TSRV_EOF */
    bool aborted; /* and its output neither */
    bool shut;    /* tsrv_shutdown was called */
    bool lazy;    /* its handler returned TSRV_EAGAIN and waits for nothing of its own */
    bool strayed; /* its handler did not repeat a call that waited */
    bool refused; /* a write was */
    int returned;
    uint64_t sent;      /* by the peer */
    uint64_t received;  /* by the library */
    uint64_t read;      /* by the program */
    uint64_t written;   /* by the program */
    uint64_t taken;     /* of that by the kernel, */
    uint64_t delivered; /* and received by the peer */
    bool peer_fin, peer_gone, peer_saw_end;
    const char *slice; /* the one that was handed out last; NULL = it is dead */
    size_t slice_size;
    uint64_t slice_at;
    bool slice_brief;  /* it dies when the piece of user code gives control back */
    call *pending;     /* what its callback-mode handler repeats */
    int read_ms, write_ms;
    int64_t deadline_ms; /* 0 = none */
    moment active;       /* when a byte last went either way */
    moment reads;        /* when a read last began */
    bool short_file; /* more of the file was promised than there is */
    bool unsure;     /* whether a write that failed has been taken */
    bool good;       /* it has ended in good order */
    bool told;       /* a read has failed for good */
    size_t restored; /* of the largest read into memory that has failed: what it had is unread again */
    /* With FUZZ_TLS, where what is counted above is plaintext: */
    bool secured;       /* TLS has begun, */
    bool established;   /* and its handshake is done */
    bool notified;      /* the peer must hear so before the end */
    struct ssl_st *tls; /* the peer's; NULL = it speaks none */
    uint64_t plain;     /* bytes from before TLS that the peer has not received yet */
    uint64_t sealed_sent, sealed_received; /* by the peer, by the library: bytes of the socket, */
    uint64_t lingered;                     /* and those that were not opened any more */
};

/* One call of the program's that can wait. */
struct call {
    connection *on;
    bool active;
    int kind;
    size_t size, max;
    bool sliced;
    unsigned variant; /* which delimiter, or how to match */
    int timeout_ms;
    uint64_t from;     /* where in the input, or the output, it begins */
    moment begin;
    bool extra;        /* it is one that the handler makes besides, and need not repeat as it was */
    bool must_end;     /* something has ended it */
    bool was_ended;    /* its stream had ended, or may have, when it began, */
    bool was_over;     /* the same without "or may have" */
    long begin_turn;   /* which was in this turn */
    long last_turn;    /* and when it was made last */
    int late;          /* turns in which it should have been over */
    char memory[LARGEST + 1];
};

static connection connections[STREAMS];
static call calls[CALLS];

static bool tcp, small_buffers; /* what the connections are like */
static bool unclean;   /* a fault was injected that excuses every error */
static bool meddles;   /* functions that match, on_close and handlers that wait already make further calls */
static bool freeing;   /* the server, or the loop, is being freed: nobody begins anything any more */
static int64_t forced_ms; /* when a drain's grace is over; -1 = no drain */
static bool inside;    /* a library call that cannot wait is under way */

static connection *connection_of(int fd)
{
    for (int i = 0; i < STREAMS; i++) {
        if (connections[i].made && connections[i].fd == fd) {
            return &connections[i];
        }
    }
    return NULL;
}

static int number_of(const connection *on)
{
    return (int)(on - connections);
}

/* ---- time, and turns that are in vain -----------------------------------------------------*/

static uint64_t now;      /* the clock, in nanoseconds; it moves a little whenever it is read */
static int in_vain;       /* turns since something has happened */
static long turns;
static long system_calls; /* of this turn */
static int64_t loop_ms;   /* the loop's time: that of its last look at the clock when a turn began, or behind a wait */
static bool loop_looks;
static int last_events, last_timeout_ms;

static int64_t now_ms(void)
{
    return (int64_t)(now / MS);
}

static int fuzz_clock(clockid_t id, struct timespec *result)
{
    (void)id;
    now += 1000;
    if (loop_looks) {
        loop_ms = now_ms();
        loop_looks = false;
    }
    result->tv_sec = (time_t)(now / 1000000000);
    result->tv_nsec = (long)(now % 1000000000);
    return 0;
}

static void happened(void)
{
    in_vain = 0;
}

static moment this_moment(void)
{
    moment now_and_then = {loop_ms, now_ms()};
    return now_and_then;
}

static void pass_ms(int ms)
{
    now += (uint64_t)ms * MS;
}

/* ---- the kernel ---------------------------------------------------------------------------*/

static bool faults, fatal_faults, memory_faults; /* what is allowed */
static unsigned fault_after;                     /* calls before the next */
static bool stretching;                          /* waits end late, so that a long time takes few turns */

/* What is to happen to this call; 0 = nothing. */
static unsigned fault(void)
{
    if (t_verify != NULL) {
        t_verify();
    }
    if (++system_calls > MOST_SYSTEM_CALLS) {
        fail("a turn does not end: %ld system calls", system_calls);
    }
    if (!faults || fault_after-- > 0) {
        return 0;
    }
    if (script_is_over()) {
        faults = false;
        return 0;
    }
    fault_after = draw_back() % 24;
    return draw_back();
}

static bool memory_fails(void)
{
    if (!memory_faults || fault() % 4 != 1) {
        return false;
    }
    unclean = true;
    TRACE("    no memory\n");
    return true;
}

static void *fuzz_malloc(size_t size)
{
    return memory_fails() ? NULL : t_malloc(size);
}

static void *fuzz_realloc(void *old, size_t size)
{
    return memory_fails() ? NULL : t_realloc(old, size);
}

/* A call that moves `size` bytes: -1 = it fails, and errno is set; else how many it may move. */
static ssize_t fuzz_io(int fd, size_t size, const int *errors, size_t error_count)
{
    unsigned action = fault();
    switch (action & 7) {
    case 1:
    case 2:
        return (ssize_t)(size < 1 + action / 8 ? size : 1 + action / 8);
    case 3:
        return (ssize_t)(size - size / 3);
    case 4:
        errno = EAGAIN;
        return -1;
    case 5:
        errno = EINTR;
        return -1;
    case 6:
        if (fatal_faults) {
            shutdown(fd, SHUT_RDWR); /* as after the error it reports */
            unclean = true;
            errno = errors[action / 8 % error_count];
            TRACE("    %d fails: %s\n", fd, strerror(errno));
            return -1;
        }
        return (ssize_t)size;
    default:
        return (ssize_t)size;
    }
}

static void moved(int fd, ssize_t count, bool in)
{
    connection *on = connection_of(fd);
    if (count > 0 && on != NULL) {
        happened();
        if (in && on->secured) {
            on->sealed_received += (uint64_t)count;
            return; /* plaintext is counted when it was opened */
        }
        on->active = this_moment();
        *(in ? &on->received : &on->taken) += (uint64_t)count;
    }
}

static const int send_errors[] = {EPIPE, ECONNRESET, ETIMEDOUT, ENOBUFS};
static const int recv_errors[] = {ECONNRESET, ETIMEDOUT, ENOMEM};

static ssize_t fuzz_send(int fd, const void *data, size_t size, int flags)
{
    ssize_t most = fuzz_io(fd, size, send_errors, 4), sent;
    if (most < 0) {
        return -1;
    }
    sent = send(fd, data, (size_t)most, flags);
    moved(fd, sent, false);
    return sent;
}

static ssize_t fuzz_sendmsg(int fd, const struct msghdr *message, int flags)
{
    struct iovec pieces[64];
    struct msghdr part = *message;
    size_t total = 0;
    ssize_t most, sent;
    for (size_t i = 0; i < message->msg_iovlen; i++) {
        pieces[i] = message->msg_iov[i];
        total += pieces[i].iov_len;
    }
    most = fuzz_io(fd, total, send_errors, 4);
    if (most < 0) {
        return -1;
    }
    part.msg_iov = pieces;
    for (part.msg_iovlen = 0; part.msg_iovlen < message->msg_iovlen && most > 0; part.msg_iovlen++) {
        struct iovec *piece = &pieces[part.msg_iovlen];
        piece->iov_len = piece->iov_len < (size_t)most ? piece->iov_len : (size_t)most;
        most -= (ssize_t)piece->iov_len;
    }
    sent = sendmsg(fd, &part, flags);
    moved(fd, sent, false);
    return sent;
}

static ssize_t fuzz_sendfile(int fd, int file, off_t *offset, size_t size)
{
    ssize_t most = fuzz_io(fd, size, send_errors, 4), sent;
    if (most < 0) {
        return -1;
    }
    if (!FUZZ_OLD && fault() % 4 == 3) {
        errno = EOVERFLOW; /* this file has to be read */
        return -1;
    }
    sent = sendfile(fd, file, offset, (size_t)most);
    moved(fd, sent, false);
    return sent;
}

static ssize_t fuzz_pread(int file, void *data, size_t size, off_t offset)
{
    unsigned action = fault();
    if ((action & 3) == 3) {
        errno = (action & 4) != 0 && fatal_faults ? EIO : EINTR;
        unclean = unclean || errno == EIO;
        return -1;
    }
    return pread(file, data, (action & 3) == 1 && size > 1 ? size / 2 : size, offset);
}

static ssize_t fuzz_recv(int fd, void *data, size_t size, int flags)
{
    ssize_t most = fuzz_io(fd, size, recv_errors, 3), got;
    if (most < 0) {
        return -1;
    }
    got = recv(fd, data, (size_t)most, flags);
    if ((flags & MSG_PEEK) == 0) {
        moved(fd, got, true);
    }
    return got;
}

static int fuzz_close(int fd)
{
    connection *on = connection_of(fd);
    int rc = close(fd);
    if (rc < 0) {
        fail("close of a descriptor that is not open: %d", fd);
    }
    if (on != NULL) {
        happened();
        on->fd = -1;
    }
    if (fault() % 16 == 1) {
        errno = EINTR; /* it is closed all the same */
        return -1;
    }
    return 0;
}

static int fuzz_fcntl(int fd, int command, long argument)
{
    if (command == F_DUPFD_CLOEXEC && fatal_faults && fault() % 4 == 1) {
        unclean = true;
        errno = EMFILE;
        return -1;
    }
    return fcntl(fd, command, argument);
}

static int fuzz_epoll_ctl(int set, int operation, int fd, struct epoll_event *event)
{
    if (operation == EPOLL_CTL_ADD && fatal_faults && fault() % 4 == 1) {
        unclean = true;
        errno = ENOSPC;
        return -1;
    }
    return epoll_ctl(set, operation, fd, event);
}

static int64_t limit_of(const call *c);
static bool is_late(const call *c);

/* A wait begins a turn. Returns what is to happen to it. */
UNTRACED static unsigned wait_begins(void)
{
    system_calls = 0;
    turns++;
    loop_looks = true;
    if (++in_vain > MOST_TURNS) {
        fail("the loop spins: %d turns in vain", in_vain);
    }
    for (int i = 0; i < CALLS; i++) {
        call *c = &calls[i];
        c->late = c->active && is_late(c) ? c->late + 1 : 0;
        if (c->late > MOST_TURNS) {
            fail("%d: a wait does not end: %s, %s, %lld ms late", number_of(c->on), names[c->kind],
                 c->must_end ? "which is over" : "whose time is over", (long long)(loop_ms - limit_of(c)));
        }
    }
    return fault();
}

/* It has found count events, and withheld some. Time passes if there are none. */
static int wait_ends(int count, bool withheld, int timeout_ms, unsigned action)
{
    last_events = count;
    last_timeout_ms = timeout_ms;
    if (count == 0 && timeout_ms < 0 && !withheld) {
        fail("the loop waits for ever");
    }
    if (count == 0 && timeout_ms > 0) {
        int early = (action & 7) == 3 ? timeout_ms / 2 : timeout_ms;
        int late = (action & 7) == 4 ? (int)(action / 8) * 10 : 0;
        pass_ms(early + late + (stretching ? 1000 : 0));
        happened();
    }
    return count;
}

/* Which events are withheld, all of them being there in the next turn again. */
static bool withholds(unsigned action, int index)
{
    return (action & 7) == 1 && ((action / 8) >> (index % 5) & 1) != 0;
}

static int fuzz_epoll_wait(int set, struct epoll_event *events, int size, int timeout_ms)
{
    unsigned action = wait_begins();
    int found, count = 0;
    if ((action & 7) == 5) {
        errno = EINTR;
        return -1;
    }
    found = epoll_wait(set, events, size, 0);
    for (int i = 0; i < found; i++) {
        if (!withholds(action, i)) {
            events[count++] = events[i];
        }
    }
    for (int i = 0; (action & 7) == 2 && i < count / 2; i++) {
        struct epoll_event other = events[i];
        events[i] = events[count - 1 - i];
        events[count - 1 - i] = other;
    }
    return wait_ends(count, found != count, timeout_ms, action);
}

static int fuzz_poll(struct pollfd *entries, nfds_t size, int timeout_ms)
{
    unsigned action = wait_begins();
    int found, count = 0;
    if ((action & 7) == 5) {
        errno = EINTR;
        return -1;
    }
    found = poll(entries, size, 0);
    for (nfds_t i = 0; i < size; i++) {
        if (entries[i].revents != 0 && withholds(action, (int)i)) {
            entries[i].revents = 0;
        }
        count += entries[i].revents != 0;
    }
    return wait_ends(count, found != count, timeout_ms, action);
}

#undef TSRV_MALLOC
#undef TSRV_REALLOC
#define TSRV_MALLOC(size) fuzz_malloc(size)
#define TSRV_REALLOC(pointer, size) fuzz_realloc(pointer, size)

#undef t_sys_clock_gettime
#undef t_sys_close
#undef t_sys_epoll_ctl
#undef t_sys_epoll_wait
#undef t_sys_fcntl
#undef t_sys_mmap
#undef t_sys_poll
#undef t_sys_pread
#undef t_sys_recv
#undef t_sys_send
#undef t_sys_sendfile
#undef t_sys_sendmsg
#define FCNTL(fd, command, argument, ...) fuzz_fcntl(fd, command, (long)(argument))
#define t_sys_clock_gettime(...) fuzz_clock(__VA_ARGS__)
#define t_sys_close(...) fuzz_close(__VA_ARGS__)
#define t_sys_epoll_ctl(...) fuzz_epoll_ctl(__VA_ARGS__)
#define t_sys_epoll_wait(...) fuzz_epoll_wait(__VA_ARGS__)
#define t_sys_fcntl(...) FCNTL(__VA_ARGS__, 0, 0)
#define t_sys_mmap(...) (memory_fails() ? MAP_FAILED : mmap(__VA_ARGS__))
#define t_sys_poll(...) fuzz_poll(__VA_ARGS__)
#define t_sys_pread(...) fuzz_pread(__VA_ARGS__)
#define t_sys_recv(...) fuzz_recv(__VA_ARGS__)
#define t_sys_send(...) fuzz_send(__VA_ARGS__)
#define t_sys_sendfile(...) fuzz_sendfile(__VA_ARGS__)
#define t_sys_sendmsg(...) fuzz_sendmsg(__VA_ARGS__)

#define TSRVI_TICKS now
#define TCPSERVER_IMPLEMENTATION
#include FUZZ_HEADER
#if !FUZZ_OLD
#include "../verify.h"

static __typeof__(tsrvi_process) first_process; /* so that a run does not know what the ones before have learnt */
#endif

/* ---- the bytes ----------------------------------------------------------------------------*/

#define INPUT_PERIOD 65536 /* after so many bytes what the peers send begins anew */
#define INPUT_MOST 400000  /* bytes that a peer sends in all */

static char input_bytes[INPUT_PERIOD + INPUT_MOST];
static char output_bytes[PATTERN + LARGEST];
static int output_file;

static const char *input_from(uint64_t at)
{
    return input_bytes + at % INPUT_PERIOD;
}

static void make_bytes(void)
{
    static const char letters[] = "\n\r\naaaabbbccdefg";
    for (uint32_t i = 0; i < sizeof input_bytes; i++) {
        uint32_t mixed = (i % INPUT_PERIOD + 1) * 2654435761u;
        mixed = (mixed ^ mixed >> 15) * 2246822519u;
        input_bytes[i] = letters[(mixed >> 13) % 16];
    }
    for (uint32_t i = 0; i < sizeof output_bytes; i++) {
        output_bytes[i] = (char)('A' + (i % PATTERN * 2654435761u >> 20) % 50);
    }
}

static const struct {
    const char *text;
    size_t size;
} delimiters[] = {
    {"\n", 1}, {"\n", 1}, {"\r\n", 2}, {"a", 1}, {"ab", 2}, {"aab", 3}, {"\n\n", 2},
    {"this is longer than some of the buffers are, and the peers never send it: 0123456789", 83},
};
#define DELIMITERS (sizeof(delimiters) / sizeof(delimiters[0]))

/* How much the first message has, as tsrv_match says it. */
static size_t match_size(unsigned variant, uint64_t at, size_t size)
{
    unsigned first = (unsigned char)input_from(at)[0];
    const char *end;
    if (variant % 4 == 1 || variant % 4 == 3) {
        return 1 + first * 37 % (variant % 4 == 1 ? 64 : 1024);
    }
    if (variant % 4 == 2 && first == 'b') {
        return SIZE_MAX;
    }
    end = (const char *)memchr(input_from(at), '\n', size);
    return end == NULL ? 0 : (size_t)(end - input_from(at)) + 1;
}

static void meddle_in_match(connection *on);

static size_t match(const char *data, size_t size, void *context)
{
    const call *c = (const call *)context;
    if (data[size] != 0) {
        fail("%d: what is to be matched does not end with 0", number_of(c->on));
    }
    if (memcmp(data, input_from(c->on->read), size) != 0) {
        fail("%d: what is to be matched differs from what was sent", number_of(c->on));
    }
    meddle_in_match(c->on);
    return match_size(c->variant, c->on->read, size);
}

/* ---- what a read should return ------------------------------------------------------------*/

static tsrv_loop *loop;
static tsrv_server *server;
static tsrv_server_options options;
static bool tight; /* the loop has a limit for all streams, which they reach */

static size_t max_buffer_size(void)
{
    return options.max_buffer_size == 0 ? (size_t)1024 * 1024 : options.max_buffer_size;
}

static size_t longest(const call *c)
{
    return c->max == 0 || c->max > max_buffer_size() ? max_buffer_size() : c->max;
}

/* The size of the input up to the delimiter's end; 0 = it is not there. */
static size_t delimited(const call *c, uint64_t from, uint64_t to)
{
    size_t size = delimiters[c->variant % DELIMITERS].size;
    const char *begin = input_from(from);
    const char *end = (const char *)memmem(begin, (size_t)(to - from), delimiters[c->variant % DELIMITERS].text, size);
    return end == NULL ? 0 : (size_t)(end - begin) + size;
}

static int predict_match(const call *c, uint64_t from, size_t there, size_t *size)
{
    size_t found = there == 0 ? 0 : match_size(c->variant, from, there);
    if (there == 0) {
        return TSRV_EAGAIN;
    }
    if (found == SIZE_MAX || (c->sliced && found > longest(c)) ||
        (found == 0 && there > (c->sliced ? longest(c) : max_buffer_size()))) {
        return TSRV_ETOOLONG;
    }
    *size = found;
    return found == 0 || found > there ? TSRV_EAGAIN : TSRV_OK;
}

/* What a read that finds the input from `from` to `to` should return, by a naive look; with TSRV_OK, how much. */
static int predict(const call *c, uint64_t from, uint64_t to, bool ended, size_t *size)
{
    size_t there = (size_t)(to - from);
    *size = 0;
    switch (c->kind) {
    case READ_UNTIL:
    case READ_UNTIL_MEM:
        *size = delimited(c, from, to);
        if (c->sliced && (*size > longest(c) || (*size == 0 && there > longest(c)))) {
            return TSRV_ETOOLONG;
        }
        return *size != 0 ? TSRV_OK : TSRV_EAGAIN;
    case READ_BYTES:
        *size = c->size;
        return c->sliced && c->size > max_buffer_size() ? TSRV_ETOOLONG : there >= c->size ? TSRV_OK : TSRV_EAGAIN;
    case READ_INTO:
        *size = c->size;
        return there >= c->size ? TSRV_OK : TSRV_EAGAIN;
    case READ_SOME:
        *size = there < longest(c) ? there : longest(c);
        return there != 0 ? TSRV_OK : TSRV_EAGAIN;
    case READ_MATCH:
        return predict_match(c, from, there, size);
    default:
        *size = there;
        return c->sliced && there > longest(c) ? TSRV_ETOOLONG : ended ? TSRV_OK : TSRV_EAGAIN;
    }
}

/* ---- slices -------------------------------------------------------------------------------*/

static void check_input(const connection *on, const char *data, size_t size, uint64_t at, const char *what)
{
    if (memcmp(data, input_from(at), size) != 0) {
        fail("%d: %s differs from what was sent, in %zu bytes from %llu", number_of(on), what, size,
             (unsigned long long)at);
    }
}

/* Those that are alive are what they were. */
static void check_slices(void)
{
    for (int i = 0; i < STREAMS; i++) {
        connection *on = &connections[i];
        if (on->slice != NULL) {
            check_input(on, on->slice, on->slice_size, on->slice_at, "a slice that was read before");
            if (on->slice[on->slice_size] != 0) {
                fail("%d: a slice does not end with 0 any more", i);
            }
        }
    }
}

/* The piece of user code gives control back. */
static void end_brief_slices(void)
{
    check_slices();
    for (int i = 0; i < STREAMS; i++) {
        if (connections[i].slice_brief) {
            connections[i].slice = NULL;
            connections[i].slice_brief = false;
        }
    }
}

/* ---- what calls return --------------------------------------------------------------------*/

/* Has the stream ended, in a way that excuses errors? */
static bool has_ended(const connection *on)
{
    return on->ending || on->fd < 0 || tsrv_error(on->stream) != TSRV_OK;
}

static bool is_forced(void)
{
    return freeing || (forced_ms >= 0 && now_ms() >= forced_ms);
}

static bool is_read(int kind)
{
    return kind <= READ_CLOSE;
}

static bool is_write(int kind)
{
    return kind >= WRITE && kind <= SENDFILE;
}

static const size_t chunks[] = {1, 3, 30, 200, 1000, 5000};

#if FUZZ_TLS
#include "tls_peer.h"
#else /* nobody speaks it */
#define by_command false
#define tls_begin_once() (void)0
#define tls_begin_script(starttls) (void)(starttls)
#define tls_end_script(on) (void)(on)
#define tls_begin_stream(on) (void)(on)
#define start_tls(on) (void)(on)
#define tls_is_shaking(on) ((void)(on), false)
#define tls_explains(on, rc) false
#define tls_ends(on) (void)(on)
#define check_last_word(on) (void)(on)
#define tls_flush(on, most) false
#define tls_peer_receive(on, most) false
#define tls_peer_send(on, size) (ssize_t)(size)
#define tls_peer_shutdown(on) true
#define tls_shake_all() (void)0
#endif

/* An error of the connection: does anything explain it? */
static void check_error(const call *c, int rc)
{
    const connection *on = c->on;
    bool known = (rc == TSRV_ECLOSED && (on->ending || on->perhaps || is_forced())) ||
                 (rc == TSRV_ETIMEOUT && tsrv_error(on->stream) == TSRV_ETIMEOUT) ||
                 (rc == TSRV_EFULL && on->refused) || (rc == -EIO && on->short_file) ||
                 ((rc == -ECONNRESET || rc == -EPIPE) && on->peer_gone) || tls_explains(on, rc) ||
                 (unclean && rc < 0 && rc > -1000 && rc != -EAGAIN && rc != -EINTR && rc != -EBADF);
    if (!known) {
        fail("%d: %s returns %d (%s), which nothing explains", number_of(on), names[c->kind], rc, tsrv_strerror(rc));
    }
}

/* When a call is over at the latest; INT64_MAX = it need not be. */
UNTRACED static int64_t limit_of(const call *c)
{
    const connection *on = c->on;
    int64_t limit = c->timeout_ms < 0 || (is_read(c->kind) && c->timeout_ms == 0) ? INT64_MAX
                                                                                  : c->begin.last + c->timeout_ms;
    if (c->kind == DRAIN && limit != INT64_MAX) {
        limit += 2500; /* a second, from when the loop, whose waits may end late, has seen the end of the grace */
    }
    if ((is_read(c->kind) || c->kind == FLUSH || c->kind == WAIT) && on->deadline_ms != 0 && on->deadline_ms < limit) {
        limit = on->deadline_ms;
    }
    if (is_read(c->kind) && options.idle_timeout_ms > 0) {
        int64_t active = on->active.last > on->reads.last ? on->active.last : on->reads.last;
        limit = active + options.idle_timeout_ms < limit ? active + options.idle_timeout_ms : limit;
    }
    return limit;
}

UNTRACED static bool is_late(const call *c)
{
    bool strayed = (is_read(c->kind) || c->kind == WAIT) && c->on->strayed; /* the time may be another call's */
    int64_t limit = strayed ? INT64_MAX : limit_of(c);
    return c->must_end || (limit != INT64_MAX && limit + 2 < loop_ms);
}

/* May this call have timed out? */
static void check_timeout(const call *c)
{
    const connection *on = c->on;
    int64_t idle_since = on->active.first > c->begin.first ? on->active.first : c->begin.first;
    bool over = (on->deadline_ms != 0 && now_ms() >= on->deadline_ms) || tsrv_error(on->stream) == TSRV_ETIMEOUT ||
                (is_read(c->kind) && options.idle_timeout_ms > 0 && now_ms() - idle_since >= options.idle_timeout_ms) ||
                ((is_read(c->kind) ? c->timeout_ms > 0 : c->timeout_ms >= 0) && now_ms() - c->begin.first >= c->timeout_ms);
    if (!over && !on->strayed && !c->extra && !(FUZZ_OLD && on->read_ms > 0)) {
        fail("%d: %s times out after %lld ms of %d", number_of(on), names[c->kind], (long long)(now_ms() - c->begin.first),
             c->timeout_ms);
    }
}

/* A read of nothing, which may be made beside others. */
static bool is_empty(const call *c)
{
    return (c->kind == READ_BYTES || c->kind == READ_INTO) && c->size == 0;
}

static bool somebody_is_at(const call *but, bool with_empty)
{
    for (int i = 0; i < CALLS; i++) {
        const call *c = &calls[i];
        if (c->active && c != but && c->on == but->on && is_read(c->kind) && (with_empty || !is_empty(c))) {
            return true;
        }
    }
    return false;
}

static bool somebody_reads(const call *but)
{
    return somebody_is_at(but, false);
}

/* The same, but for a handler that lets others go first, and has not looked at the input yet. */
static bool somebody_holds_read(const call *but)
{
    for (int i = 0; i < CALLS; i++) {
        const call *c = &calls[i];
        if (c->active && c != but && c->on == but->on && is_read(c->kind) && !is_empty(c) && c->last_turn != turns) {
            return true;
        }
    }
    return false;
}

/* The same for reads. */
static void check_read_failure(const call *c, int rc, bool waits)
{
    const connection *on = c->on;
    size_t size;
    int expected = rc == TSRV_EAGAIN && waits ? rc : predict(c, c->from, on->received, false, &size);
    switch (rc) {
    case TSRV_EAGAIN:
        if (expected != TSRV_EAGAIN && !has_ended(on)) {
            fail("%d: %s returns TSRV_EAGAIN, though %zu bytes would do", number_of(on), names[c->kind], size);
        }
        break;
    case TSRV_EOF:
        if (expected != TSRV_EAGAIN) {
            fail("%d: %s returns TSRV_EOF before the input that is there", number_of(on), names[c->kind]);
        }
        if (!unclean && !on->peer_gone && !(on->peer_fin && on->received == on->sent) && !tsrv_stopping(on->stream)) {
            fail("%d: %s returns TSRV_EOF, which the peer has not sent", number_of(on), names[c->kind]);
        }
        break;
    case TSRV_ETOOLONG:
        if (expected != TSRV_ETOOLONG) {
            fail("%d: %s returns TSRV_ETOOLONG, wrongly", number_of(on), names[c->kind]);
        }
        break;
    case TSRV_EBUSY:
        if (!somebody_is_at(c, true) && !on->strayed && !FUZZ_OLD) { /* one of nothing may let others go first */
            fail("%d: %s returns TSRV_EBUSY, but nobody reads", number_of(on), names[c->kind]);
        }
        break;
    case TSRV_EINVAL:
        if (!(c->kind <= READ_UNTIL_MEM && delimiters[c->variant % DELIMITERS].size > max_buffer_size()) &&
            !on->strayed) {
            fail("%d: %s returns TSRV_EINVAL", number_of(on), names[c->kind]);
        }
        break;
    case TSRV_ETIMEOUT:
        check_timeout(c);
        break;
    default:
        check_error(c, rc);
    }
}

/* A read has its result. */
static void check_read(call *c, const tsrv_slice *slice)
{
    connection *on = c->on;
    size_t size;
    int expected = predict(c, c->from, on->received, on->peer_fin || on->peer_gone || unclean, &size);
    if (expected != TSRV_OK) {
        fail("%d: %s returns TSRV_OK, not %d", number_of(on), names[c->kind], expected);
    }
    if (c->kind == READ_CLOSE && on->received != on->sent && !on->peer_gone && !unclean) {
        fail("%d: read_close ends before the input does", number_of(on));
    }
    if (c->sliced) {
        if (slice->size != size && c->kind != READ_SOME) {
            fail("%d: %s returns %zu bytes, not %zu", number_of(on), names[c->kind], slice->size, size);
        }
        if (c->kind == READ_SOME && (slice->size == 0 || slice->size > size)) {
            fail("%d: read_some returns %zu bytes of %zu", number_of(on), slice->size, size);
        }
        size = slice->size;
        on->slice = size != 0 || c->kind == READ_CLOSE ? slice->data : NULL;
        on->slice_size = size;
        on->slice_at = c->from;
        check_slices();
    } else if (c->kind == READ_INTO) {
        check_input(on, c->memory, size, c->from, "what was read into memory");
    } else if (c->kind == READ_SOME && !has_ended(on)) {
        size = (size_t)(on->received - tsrv_unread_size(on->stream) - c->from);
    }
    on->read = c->from + size;
}

static void after_read(call *c, int rc, const tsrv_slice *slice, bool waits)
{
    connection *on = c->on;
    if (rc == TSRV_OK && is_empty(c)) {
        return; /* which others may have overtaken */
    }
    if (rc == TSRV_OK && somebody_holds_read(c) && !on->strayed && !FUZZ_OLD) {
        fail("%d: %s returns TSRV_OK, though somebody else reads", number_of(on), names[c->kind]);
    }
    if (rc == TSRV_OK) {
        check_read(c, slice);
    } else {
        check_read_failure(c, rc, waits);
        on->told = on->told || rc != TSRV_EAGAIN;
        if (c->kind == READ_INTO && c->size > on->restored) {
            on->restored = c->size;
        }
        if (c->sliced && (slice->size != 0 || slice->data[0] != 0)) {
            fail("%d: %s fails, but its slice is not empty", number_of(on), names[c->kind]);
        }
    }
    if (on->ending || on->fd < 0 || somebody_reads(c)) {
        return;
    }
    if (rc != TSRV_OK && !c->sliced && c->kind != READ_INTO) {
        on->read = on->received - tsrv_unread_size(on->stream); /* what it has dropped is gone */
    } else if (!(rc == TSRV_EAGAIN && c->kind == READ_INTO) && !on->strayed && !on->perhaps &&
               on->read + tsrv_unread_size(on->stream) != on->received) {
        fail("%d: after %s (%d) %zu bytes are unread, not %llu", number_of(on), names[c->kind], rc,
             tsrv_unread_size(on->stream), (unsigned long long)(on->received - on->read));
    }
}

static void after_write(call *c, int rc, size_t unsent)
{
    connection *on = c->on;
    size_t most = options.max_write_buffer_size == 0 ? SIZE_MAX : options.max_write_buffer_size;
    if (rc == TSRV_EFULL && !on->refused && !FUZZ_OLD && unsent + c->size <= most &&
        !(tight && c->kind == TRY_WRITE)) {
        fail("%d: %s returns TSRV_EFULL for %zu bytes behind %zu", number_of(on), names[c->kind], c->size, unsent);
    }
    if (rc == TSRV_OK && on->refused && c->was_over) { /* one that waited may have been done by then */
        fail("%d: %s returns TSRV_OK behind a write that was refused", number_of(on), names[c->kind]);
    } else if (rc == TSRV_OK) {
        return;
    }
    on->refused = on->refused || (rc == TSRV_EFULL && c->kind != TRY_WRITE);
    if (!(rc == TSRV_ECLOSED && on->shut) && !(rc == TSRV_EFULL && c->kind == TRY_WRITE)) {
        check_error(c, rc);
    }
    if ((c->was_over && c->begin_turn == turns) || (rc == TSRV_EFULL && c->kind == TRY_WRITE)) {
        on->written = c->from; /* nothing of it was taken */
    } else {
        on->unsure = true;
    }
}

static void after_wait(const call *c, int rc)
{
    if (rc == TSRV_ETIMEOUT) {
        if (c->timeout_ms != 0) {
            check_timeout(c);
        }
    } else if (rc == TSRV_ECLOSED) {
        if (!is_forced() && !c->on->ending && !c->on->perhaps && !has_ended(c->on)) {
            fail("%d: tsrv_wait returns TSRV_ECLOSED", number_of(c->on));
        }
    } else if (rc != TSRV_OK && rc != TSRV_EAGAIN) {
        fail("%d: tsrv_wait returns %d", number_of(c->on), rc);
    }
}

/* ---- calls --------------------------------------------------------------------------------*/

/* How much a write is of: of a file also more than there is. */
static size_t write_size(const call *c)
{
    return c->size * (c->kind == SENDFILE && c->variant % 16 == 15 ? 9 : 1);
}

static int invoke_read(call *c, tsrv_slice *slice)
{
    tsrv_stream *stream = c->on->stream;
    tsrv_slice *into = c->sliced ? slice : NULL;
    const char *text = delimiters[c->variant % DELIMITERS].text;
    switch (c->kind) {
    case READ_UNTIL:
        return tsrv_read_until(stream, text, c->max, into);
    case READ_UNTIL_MEM:
        return tsrv_read_until_mem(stream, text, delimiters[c->variant % DELIMITERS].size, c->max, into);
    case READ_BYTES:
        return tsrv_read_bytes(stream, c->size, into);
    case READ_SOME:
        return tsrv_read_some(stream, c->max, into);
    case READ_INTO:
        return tsrv_read_into(stream, c->memory, c->size);
    case READ_MATCH:
        return tsrv_read_until_match(stream, match, c, c->max, into);
    default:
        return tsrv_read_until_close(stream, c->max, into);
    }
}

static int invoke_writev(call *c)
{
    tsrv_slice pieces[3];
    size_t first = c->size / 3, second = c->size / 2 - first;
    pieces[0].data = c->memory;
    pieces[0].size = first;
    pieces[1].data = c->memory + first;
    pieces[1].size = second;
    pieces[2].data = c->memory + first + second;
    pieces[2].size = c->size - first - second;
#if !FUZZ_OLD
    if (c->kind == TRY_WRITE) {
        return tsrv_try_writev(c->on->stream, pieces, 3);
    }
#endif
    return tsrv_writev(c->on->stream, pieces, 3);
}

static int invoke_write(call *c)
{
    tsrv_stream *stream = c->on->stream;
    switch (c->kind) {
    case WRITE:
        return tsrv_write(stream, c->memory, c->size);
    case TRY_WRITE:
        return c->variant % 2 == 0 ? tsrv_try_write(stream, c->memory, c->size) : invoke_writev(c);
    case WRITEV:
        return invoke_writev(c);
    case PRINTF:
        return tsrv_printf(stream, "%.*s", (int)c->size, c->memory);
    default: /* beyond the end of the file if so much is asked for */
        return tsrv_sendfile(stream, output_file, (int64_t)(c->from % PATTERN), write_size(c));
    }
}

static int invoke(call *c, tsrv_slice *slice)
{
    switch (c->kind) {
    case FLUSH:
        return tsrv_flush(c->on->stream);
    case WAIT:
        return tsrv_wait(c->on->stream, c->timeout_ms);
    case SLEEP:
        return tsrv_sleep(c->timeout_ms);
    case DRAIN:
        return tsrv_server_drain(server, c->timeout_ms);
    default:
        return is_read(c->kind) ? invoke_read(c, slice) : invoke_write(c);
    }
}

/* A call is made for the first time. */
static void begin_call(call *c)
{
    connection *on = c->on;
    c->from = is_read(c->kind) ? on->read : on->written;
    c->begin = this_moment();
    if (!is_read(c->kind)) {
        c->begin.first = c->begin.last;
    }
    c->begin_turn = turns;
    c->was_over = on->ending || on->shut || on->fd < 0;
    c->was_ended = c->was_over || on->perhaps;
    if (is_read(c->kind)) {
        c->timeout_ms = on->read_ms != 0 ? on->read_ms : options.read_timeout_ms;
        on->reads = c->begin;
    } else if (is_write(c->kind)) {
        memcpy(c->memory, output_bytes + on->written % PATTERN, c->size);
        c->memory[c->size] = 0;
        on->written += write_size(c);
        on->short_file = on->short_file || write_size(c) != c->size;
    }
    c->must_end = false;
    c->late = 0;
    c->active = true;
}

/* Where a call is made: in a coroutine, in a callback-mode handler on its own stream, or where nothing can wait. */
enum { IN_COROUTINE, IN_HANDLER, OUTSIDE };

/* Make a call, for the first time or again. */
static int make_call(call *c, int where)
{
    connection *on = c->on;
    tsrv_slice slice = {"", 0};
    size_t unsent = c->kind <= WAIT ? tsrv_unsent_size(on->stream) : 0;
    int kind = c->kind, rc;
    check_slices();
    if (is_read(kind)) {
        on->slice = NULL;
        on->slice_brief = false;
    }
    if (!c->active) {
        begin_call(c);
    }
    TRACE("%d: %s(size %zu, max %zu, %s, variant %u, %d ms)%s\n", number_of(on), names[kind], c->size, c->max,
          c->sliced ? "slice" : "NULL", c->variant, c->timeout_ms, where == OUTSIDE ? " outside" : "");
    inside = where != IN_COROUTINE;
    c->last_turn = turns;
    rc = invoke(c, &slice);
    inside = false;
    TRACE("%d: %s = %d\n", number_of(on), names[kind], rc);
    if (rc == TSRV_EAGAIN && where == IN_COROUTINE && kind != DRAIN) {
        fail("%d: %s returns TSRV_EAGAIN in a coroutine", number_of(on), names[kind]);
    }
    if (is_read(kind)) {
        after_read(c, rc, &slice, where != OUTSIDE);
        on->slice = FUZZ_OLD && where == IN_COROUTINE && !on->running ? NULL : on->slice;
        on->slice_brief = where == OUTSIDE && on->slice != NULL;
    } else if (is_write(kind)) {
        memset(c->memory, '#', c->size); /* it is the caller's again */
        after_write(c, rc, unsent);
    } else if (kind == WAIT) {
        after_wait(c, rc);
    } else if (kind == FLUSH && rc == TSRV_ETIMEOUT) {
        check_timeout(c);
    } else if (kind == FLUSH && rc != TSRV_OK && rc != TSRV_EAGAIN) {
        check_error(c, rc);
    }
    if (rc != TSRV_EAGAIN) {
        happened();
    }
    c->active = rc == TSRV_EAGAIN && where == IN_HANDLER;
    return rc;
}

/* ---- the program --------------------------------------------------------------------------*/

typedef struct actor {
    bool used, waits;
    connection *on;
    int64_t due_ms;
    tsrv_timer timer;
} actor;

static actor actors[ACTORS];

static const uint8_t menu[] = {
    READ_UNTIL,  READ_UNTIL, READ_UNTIL_MEM, READ_BYTES,  READ_BYTES, READ_SOME, READ_INTO,    READ_INTO,
    READ_MATCH,  READ_MATCH, READ_CLOSE,     READ_SOME,   WRITE,      WRITE,     WRITE,        TRY_WRITE,
    WRITEV,      PRINTF,     SENDFILE,       FLUSH,       WAIT,       WAIT,      WAIT,         SLEEP,
    DRAIN,       SHUTDOWN,   CLOSE,          CLOSE,       ABORT,      WAKE,      WAKE,         SET_TIMEOUT,
    SET_DEADLINE, SET_HANDLER, LOOK,         SPAWN,       POST,       TIMER,     STOP,         FREE,
    PASS_TIME,   PEER,       PEER,           READ_UNTIL,  WRITE,      READ_SOME, SPAWN,        REPEAT,
};
static const size_t read_sizes[] = {1, 2, 3, 7, 16, 60, 200, 1000, 4000, 0};
static const size_t write_sizes[] = {1, 5, 40, 300, 2000, 9000, 20000, LARGEST, 0};
static const size_t maxima[] = {0, 0, 0, 1, 5, 20, 100, 1000};
static const int times_ms[] = {TSRV_NEVER, 0, 1, 5, 20, 100, 1000, 7000};
static const int graces_ms[] = {1, 20, 300, 1500, TSRV_NEVER, 0};

static int operate(connection *own, int where);

/* May the program still use the stream? */
static bool is_usable(const connection *on)
{
    return on->entered && !on->closed;
}

static call *new_call(connection *on, int kind)
{
    for (int i = 0; i < CALLS; i++) {
        call *c = &calls[i];
        if (!c->active) {
            c->on = on;
            c->kind = kind;
            c->extra = false;
            c->sliced = true;
            c->variant = 0;
            c->size = c->max = 0;
            c->timeout_ms = TSRV_NEVER;
            if (kind == WAIT || kind == SLEEP) {
                c->timeout_ms = PICK(times_ms);
            } else if (kind == DRAIN) {
                c->timeout_ms = PICK(graces_ms);
            } else if (is_read(kind)) {
                unsigned how = draw(64);
                c->sliced = how % 4 != 3 && kind != READ_INTO;
                c->variant = how / 4;
                c->size = PICK(read_sizes);
                c->max = PICK(maxima);
            } else if (is_write(kind)) {
                c->size = PICK(write_sizes);
                c->variant = kind == SENDFILE && !tcp ? draw(16) : 0;
                if (tcp && on->written - on->delivered + c->size > TCP_MOST) {
                    c->size = 1;
                }
            }
            return c;
        }
    }
    return NULL;
}

/* Every call on the stream is over from now on. */
static void end_calls(connection *on, bool aborted)
{
    bool first = !on->ending && on->fd >= 0 && tsrv_error(on->stream) == TSRV_OK;
    for (int i = 0; i < CALLS; i++) {
        call *c = &calls[i];
        if (c->active && c->on == on && (c->kind <= FLUSH || (c->kind == WAIT && first))) {
            c->must_end = true;
        }
    }
    on->ending = true;
    on->aborted = on->aborted || aborted;
}

static void wake(connection *on)
{
    for (int i = 0; i < CALLS; i++) {
        if (calls[i].active && calls[i].on == on && calls[i].kind == WAIT) {
            calls[i].must_end = true;
        }
    }
    tsrv_wake(on->stream);
}

/* All streams are aborted. */
static void begin_freeing(void)
{
    freeing = true;
    for (int i = 0; i < STREAMS; i++) {
        connections[i].ending = connections[i].aborted = true;
    }
}

static void look(const connection *on)
{
    tsrv_address address;
    tsrv_stats stats;
    size_t chunk = options.read_chunk_size == 0 ? 65536 : options.read_chunk_size, most = max_buffer_size();
    chunk = chunk < max_buffer_size() / 2 + 1 ? chunk : max_buffer_size() / 2 + 1;
    most = most > on->restored ? most : on->restored;
    if (tsrv_unread_size(on->stream) > most + chunk) {
        fail("%d: %zu bytes are unread, more than the limit", number_of(on), tsrv_unread_size(on->stream));
    }
    if (tsrv_stream_loop(on->stream) != loop || tsrv_fd(on->stream) != on->fd) {
        fail("%d: a getter is wrong", number_of(on));
    }
    tsrv_peer_address(on->stream, &address);
    tsrv_local_address(on->stream, &address);
    tsrv_set_nodelay(on->stream, draw(2));
    if (server != NULL) {
        unsigned count = 0;
        tsrv_server_stats(server, &stats);
        for (tsrv_stream *next = tsrv_server_next(server, NULL); next != NULL; next = tsrv_server_next(server, next)) {
            count++;
        }
        if (count > stats.open) {
            fail("%u streams are walked, but %llu open", count, (unsigned long long)stats.open);
        }
    }
}

/* A helper coroutine, a post or a timer. */
static void act(void *context)
{
    actor *self = (actor *)context;
    int where = self->waits ? IN_COROUTINE : OUTSIDE;
    if (inside) {
        fail("a callback is called from inside a library call");
    }
    if (now_ms() < self->due_ms) {
        fail("a timer fires %lld ms early", (long long)(self->due_ms - now_ms()));
    }
    happened();
    TRACE("actor %d begins\n", (int)(self - actors));
    for (unsigned count = 1 + draw(4); count > 0 && !script_is_over() && !freeing; count--) {
        operate(self->on, where);
    }
    if (where == OUTSIDE) {
        end_brief_slices();
    }
    TRACE("actor %d ends\n", (int)(self - actors));
}

static void new_actor(int kind, connection *on)
{
    for (int i = 0; i < ACTORS; i++) {
        actor *made = &actors[i];
        if (!made->used) {
            int delay_ms = kind == TIMER ? PICK(times_ms) : 0;
            made->used = true;
            made->waits = kind == SPAWN;
            made->on = on;
            made->due_ms = delay_ms > 0 ? now_ms() + delay_ms : 0;
            if (kind == SPAWN) {
                tsrv_spawn(loop, act, made);
            } else if (kind == POST) {
                tsrv_loop_post(loop, act, made);
            } else if (delay_ms >= 0) {
                tsrv_timer_start(loop, &made->timer, delay_ms, act, made);
            }
            return;
        }
    }
}

/* ---- the peers ----------------------------------------------------------------------------*/

/* What comes must be what was written. */
static void peer_gets(connection *on, const char *data, size_t size)
{
    if (memcmp(data, output_bytes + on->delivered % PATTERN, size) != 0) {
        fail("%d: the peer receives what was not written, in %zu bytes from %llu", number_of(on), size,
             (unsigned long long)on->delivered);
    }
    on->delivered += (uint64_t)size;
    if (on->delivered > on->written) {
        fail("%d: the peer receives more than was written", number_of(on));
    }
}

/* Receive. Returns whether anything came. */
static bool peer_receive(connection *on, size_t most)
{
    static char buffer[65536];
    ssize_t got;
    if (on->tls != NULL) {
        return tls_peer_receive(on, most);
    }
    got = recv(on->peer, buffer, most < sizeof buffer ? most : sizeof buffer, MSG_DONTWAIT);
    if (got <= 0) {
        on->peer_saw_end = on->peer_saw_end || got == 0;
        return false;
    }
    if (!on->secured) { /* else it does not understand it */
        peer_gets(on, buffer, (size_t)got);
    }
    happened();
    return true;
}

static void peer_send(connection *on, size_t size)
{
    ssize_t sent;
    if (on->peer_fin || (tcp && on->sent - on->received > TCP_MOST) || on->sent + size > INPUT_MOST) {
        return;
    }
    if (options.read_chunk_size != 0 && size > options.read_chunk_size * 100) {
        size = options.read_chunk_size * 100; /* else it takes too many turns */
    }
    sent = on->tls != NULL ? tls_peer_send(on, size)
                           : send(on->peer, input_from(on->sent), size, MSG_DONTWAIT | MSG_NOSIGNAL);
    on->sent += sent > 0 ? (uint64_t)sent : 0;
    on->peer_gone = on->peer_gone || (sent < 0 && errno != EAGAIN);
    on->good = on->good && !(tcp && on->closed); /* the answer is a reset, which destroys what is still on its way */
    TRACE("%d: the peer sends %zd\n", number_of(on), sent);
}

static void peer_close(connection *on, bool reset)
{
    struct linger linger = {1, 0};
    TRACE("%d: the peer closes%s\n", number_of(on), reset ? " with a reset" : "");
    if (reset) {
        setsockopt(on->peer, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    }
    close(on->peer);
    on->peer = -1;
    on->peer_gone = true;
}

static void peer_shutdown(connection *on)
{
    TRACE("%d: the peer shuts down\n", number_of(on));
    if (on->tls == NULL) {
        shutdown(on->peer, SHUT_WR);
    }
    on->peer_fin = on->peer_fin || on->tls == NULL || tls_peer_shutdown(on);
}

static void peer_acts(connection *on)
{
    unsigned what = draw(16);
    happened();
    if (on->peer < 0) {
        return;
    }
    if (tls_is_shaking(on) && what < 14) {
        peer_receive(on, draw(4) != 0 ? SIZE_MAX : PICK(chunks));
    } else if (what < 9) {
        peer_send(on, PICK(chunks));
    } else if (what < 12) {
        peer_receive(on, PICK(chunks));
    } else if (what < 14) {
        peer_shutdown(on);
    } else {
        peer_close(on, what == 15);
    }
}

/* ---- what the program does ----------------------------------------------------------------*/

static int call_handler(tsrv_stream *stream, const tsrv_address *address, void *context);

static int other_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    return call_handler(stream, address, context);
}

/* A call that can wait. In a callback-mode handler it is kept, to be repeated. */
static int operate_call(connection *on, connection *own, int kind, int where)
{
    bool extra = where == IN_HANDLER && own->pending != NULL;
    call *c;
    int rc;
    where = where == IN_HANDLER && on != own ? OUTSIDE : where;
    if ((kind == DRAIN && server == NULL) || (kind == SLEEP && where != IN_COROUTINE) ||
        (c = new_call(on, kind)) == NULL) {
        return TSRV_OK;
    }
    c->extra = extra;
    if (kind == SLEEP && c->timeout_ms < 0) {
        c->timeout_ms = 0;
    }
    if (kind == DRAIN) {
        int grace_ms = c->timeout_ms == 0 ? 30000 : c->timeout_ms;
        int64_t due_ms = grace_ms < 0 ? INT64_MAX : now_ms() + grace_ms;
        forced_ms = forced_ms < 0 || due_ms < forced_ms ? due_ms : forced_ms;
        c->timeout_ms = forced_ms == INT64_MAX ? TSRV_NEVER : (int)(forced_ms - now_ms());
        c->timeout_ms = c->timeout_ms == 0 ? 1 : c->timeout_ms;
    }
    rc = make_call(c, where);
    if (c->active) {
        own->pending = c;
    }
    return rc;
}

/* More calls than may complete at once before others have their turn, unless one waits or fails. */
static int operate_repeatedly(connection *on, connection *own, int where)
{
    static const uint8_t kinds[] = {READ_SOME, READ_UNTIL, READ_BYTES, READ_INTO, READ_MATCH, WRITE, WAIT, FLUSH};
    int kind = PICK(kinds), rc = TSRV_OK;
    call *c = new_call(on, kind);
    where = where == IN_HANDLER && on != own ? OUTSIDE : where;
    for (int i = 0; c != NULL && i < (c->size > 2000 && kind == WRITE ? 20 : 300) && rc == TSRV_OK; i++) {
        if (!is_usable(on) || (i != 0 && (script_is_over() || freeing)) ||
            (tcp && on->written - on->delivered > TCP_MOST)) {
            break;
        }
        rc = make_call(c, where);
    }
    if (c != NULL && c->active) {
        own->pending = c;
    }
    return rc;
}

static void operate_end(connection *on, int kind)
{
    TRACE("%d: %s\n", number_of(on), names[kind]);
    if (kind == SHUTDOWN) {
        int rc = tsrv_shutdown(on->stream);
        on->shut = true;
        if (rc != TSRV_OK && !has_ended(on) && !on->perhaps && !on->peer_gone && !unclean) {
            fail("%d: tsrv_shutdown returns %d", number_of(on), rc);
        }
        return;
    }
    end_calls(on, kind == ABORT);
    if ((kind == CLOSE ? tsrv_close(on->stream) : tsrv_abort(on->stream)) != TSRV_OK) {
        fail("%d: an end fails", number_of(on));
    }
}

static void operate_server(int kind)
{
    if (server == NULL) {
        return;
    }
    TRACE("%s the server\n", names[kind]);
    if (kind == STOP) {
        tsrv_server_stop(server);
        return;
    }
    begin_freeing();
    tsrv_server_free(server);
    server = NULL;
}

/* What concerns one stream. */
static void operate_stream(connection *on, int kind)
{
    switch (kind) {
    case WAKE:
        TRACE("%d: wake\n", number_of(on));
        wake(on);
        break;
    case SET_TIMEOUT:
        on->read_ms = PICK(times_ms);
        on->write_ms = PICK(times_ms);
        tsrv_set_timeout(on->stream, on->read_ms, on->write_ms);
        TRACE("%d: set_timeout(%d, %d)\n", number_of(on), on->read_ms, on->write_ms);
        break;
    case SET_DEADLINE: {
        int delay_ms = PICK(times_ms);
        on->deadline_ms = delay_ms > 0 ? now_ms() + delay_ms : 0;
        tsrv_set_deadline(on->stream, delay_ms);
        TRACE("%d: set_deadline(%d)\n", number_of(on), delay_ms);
        break;
    }
    case SET_HANDLER:
        tsrv_set_handler(on->stream, draw(2) ? other_handler : call_handler);
        break;
    case START_TLS:
        start_tls(on);
        break;
    default:
        look(on);
    }
}

/* One thing that the program does, on its own stream or another. Returns a call's result, else TSRV_OK. */
static int operate(connection *own, int where)
{
    /* Who has ended a stream often waits for something else then: a helper, or time. */
    int kind = own != NULL && own->ending && draw(2) == 1 ? (int)WAIT
               : by_command && draw(8) == 7               ? (int)START_TLS
                                                          : (int)PICK(menu);
    connection *on = own == NULL || draw(8) == 7 ? &connections[draw(STREAMS)] : own;
    inside = false;
    if (kind == STOP || kind == FREE) {
        if (kind == STOP || draw(8) == 7) {
            operate_server(kind);
        }
    } else if (kind == PASS_TIME) {
        pass_ms((int)draw(32));
    } else if (kind == PEER) {
        peer_acts(on);
    } else if (kind == SPAWN || kind == POST || kind == TIMER) {
        TRACE("%s for %d\n", names[kind], number_of(on));
        new_actor(kind, on);
    } else if (kind == SLEEP || kind == DRAIN) {
        return operate_call(on, own, kind, where == IN_HANDLER ? OUTSIDE : where);
    } else if (!is_usable(on)) {
        return TSRV_OK;
    } else if (kind <= WAIT) {
        return operate_call(on, own, kind, where);
    } else if (kind == REPEAT) {
        return operate_repeatedly(on, own, where);
    } else if (kind == SHUTDOWN || kind == CLOSE || kind == ABORT) {
        operate_end(on, kind);
    } else {
        operate_stream(on, kind);
    }
    return TSRV_OK;
}

/* ---- where a program should not, but may ----------------------------------------------------*/

/* What a function that matches does besides: anything but to read its own stream. */
static void meddle_in_match(connection *on)
{
    static const uint8_t kinds[] = {WAKE,  SET_HANDLER, SET_DEADLINE, WRITE, TRY_WRITE,
                                    FLUSH, SHUTDOWN,    CLOSE,        ABORT, LOOK};
    bool was_inside = inside;
    connection *other;
    int kind;
    if (!meddles || freeing || script_is_over() || draw(4) != 3) {
        return;
    }
    TRACE("%d: while it is matched\n", number_of(on));
    inside = false;
    kind = PICK(kinds);
    other = &connections[draw(STREAMS)];
    if (draw(4) == 3 && other != on && is_usable(other)) {
        operate_call(other, other, draw(2) ? READ_SOME : READ_UNTIL, OUTSIDE);
    } else if (is_usable(on) && kind <= WAIT) {
        operate_call(on, on, kind, OUTSIDE);
    } else if (is_usable(on) && (kind == SHUTDOWN || kind == CLOSE || kind == ABORT)) {
        operate_end(on, kind);
    } else if (is_usable(on)) {
        operate_stream(on, kind);
    }
    end_brief_slices();
    inside = was_inside;
}

/* An on_close uses other streams. */
static void meddle_in_close(void)
{
    if (meddles && !freeing && draw(4) == 3) {
        operate(&connections[draw(STREAMS)], OUTSIDE);
        end_brief_slices();
    }
}

/* A callback-mode handler whose read waits makes another one, which is the one that it repeats. */
static void meddle_in_read(connection *on)
{
    static const uint8_t kinds[] = {READ_SOME, READ_UNTIL, READ_BYTES, READ_MATCH, SET_TIMEOUT};
    int kind = PICK(kinds);
    if (kind == SET_TIMEOUT) {
        operate_stream(on, kind);
    } else if (is_read(on->pending->kind) && on->pending->sliced) {
        on->pending->active = false;
        on->pending = NULL;
        operate_call(on, on, kind, IN_HANDLER);
        on->strayed = true;
    }
}

/* ---- handlers -----------------------------------------------------------------------------*/

static bool strays; /* handlers do not always repeat a call */

/* What a callback-mode handler does besides, when a call of its own waits already. */
static void add_to_wait(connection *on)
{
    static const uint8_t extras[] = {WRITE, TRY_WRITE, FLUSH, WAIT, SHUTDOWN, CLOSE, WAKE, SET_DEADLINE, PEER};
    call *pending = on->pending;
    int kind;
    if (draw(8) != 7) {
        return;
    }
    if (meddles && draw(2) == 1) {
        meddle_in_read(on);
        return;
    }
    kind = PICK(extras);
    if (kind == pending->kind) {
        return; /* that would be the same wait */
    } else if (kind <= WAIT) {
        operate_call(on, on, kind, IN_HANDLER);
        if (on->pending != pending) {
            on->strayed = on->strayed || (kind == WAIT && !is_read(pending->kind)); /* its time goes on */
            on->pending->active = false; /* this one is not repeated */
            on->pending = pending;
        }
    } else if (kind == PEER) {
        peer_acts(on);
    } else if (kind == SHUTDOWN || kind == CLOSE) {
        operate_end(on, kind);
    } else {
        operate_stream(on, kind);
    }
}

static int run_handler(connection *on)
{
    static const int results[] = {TSRV_OK, 7, TSRV_EAGAIN, TSRV_EAGAIN, -EPROTO, TSRV_EOF};
    int where = options.mode == TSRV_CALLBACK ? IN_HANDLER : IN_COROUTINE;
    /* Not from a read that has taken a part already: that has to be repeated. */
    if (on->pending != NULL && on->pending->sliced && strays && draw(8) == 7) {
        on->strayed = true;
        on->pending->active = false;
        on->pending = NULL;
    }
    for (int i = 0; i < 8; i++) {
        call *pending = on->pending;
        int rc;
        if (pending == NULL && (script_is_over() || freeing)) {
            return TSRV_OK;
        }
        rc = pending != NULL ? make_call(pending, where) : operate(on, where);
        if (on->pending != NULL && on->pending->active) {
            add_to_wait(on);
            return TSRV_EAGAIN;
        }
        on->pending = NULL;
        if (rc < 0 && rc != TSRV_EAGAIN && draw(4) != 1) {
            return rc;
        }
    }
    return PICK(results);
}

static int call_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    connection *on = *(connection **)tsrv_data(stream);
    int rc;
    if (inside || context != &options || on->running || on->over || stream != on->stream || address == NULL) {
        fail("%d: a handler is called, but should not be", number_of(on));
    }
    TRACE("%d: the handler is called\n", number_of(on));
    if (!on->entered) {
        happened();
    }
    on->entered = on->running = true;
    on->lazy = on->perhaps = false;
    rc = run_handler(on);
    check_slices();
    on->slice = NULL;
    on->running = false;
    on->returned = rc;
    TRACE("%d: the handler returns %d\n", number_of(on), rc);
    if (rc == TSRV_EAGAIN) {
        on->lazy = on->pending == NULL;
        on->perhaps = on->perhaps || (on->lazy && (on->peer_fin || on->peer_gone || unclean || tsrv_stopping(stream)));
    } else {
        on->over = true;
        end_calls(on, false);
    }
    if (options.mode == TSRV_CALLBACK) {
        end_brief_slices();
    }
    return rc;
}

static void call_on_close(tsrv_stream *stream, int reason, void *context)
{
    connection *on = *(connection **)tsrv_data(stream);
    int error = tsrv_error(stream);
    TRACE("%d: on_close(%d)\n", number_of(on), reason);
    if (inside || context != &options || !on->entered || on->closed || tsrv_fd(stream) != -1 || on->fd >= 0 ||
        (on->running && !freeing)) {
        fail("%d: on_close is called, but should not be", number_of(on));
    }
    if (reason != (error != TSRV_OK ? error : on->over ? on->returned : reason)) {
        fail("%d: on_close is told %d, not %d", number_of(on), reason, error != TSRV_OK ? error : on->returned);
    }
    if (on->pending != NULL) {
        on->pending->active = false;
        on->pending = NULL;
    }
    for (int i = 0; i < CALLS; i++) {
        if (calls[i].active && calls[i].on == on && calls[i].kind <= WAIT - FUZZ_OLD && !freeing) {
            fail("%d: on_close comes while %s waits", number_of(on), names[calls[i].kind]);
        }
    }
    if (draw(8) == 7) {
        tsrv_slice slice;
        int written = tsrv_write(stream, "x", 1), got = tsrv_read_some(stream, 0, &slice);
        int flushed = tsrv_flush(stream), waited = tsrv_wait(stream, 1);
        tsrv_wake(stream);
        tsrv_close(stream);
        tsrv_set_deadline(stream, 1);
        if (written == TSRV_OK || got == TSRV_OK || flushed == TSRV_OK || (waited != TSRV_EINVAL && !FUZZ_OLD)) {
            fail("%d: calls in on_close return %d, %d, %d, %d", number_of(on), written, got, flushed, waited);
        }
    }
    happened();
    on->slice = NULL;
    on->closed = on->over = on->ending = true;
    on->good = error == TSRV_OK && !on->aborted && !is_forced() && !unclean && !on->unsure;
    tls_ends(on);
    meddle_in_close();
}

/* ---- the main program ---------------------------------------------------------------------*/

static int listener = -1;
static struct sockaddr_in listener_address;

static void open_listener(void)
{
    socklen_t size = sizeof listener_address;
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    listener_address.sin_family = AF_INET;
    listener_address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (listener < 0 || bind(listener, (struct sockaddr *)&listener_address, sizeof listener_address) < 0 ||
        listen(listener, 16) < 0 || getsockname(listener, (struct sockaddr *)&listener_address, &size) < 0) {
        fail("no listener: %s", strerror(errno));
    }
}

/* Two ends of a connection; over a unix socket when TCP has no port left. */
/* Our own connection, and not one of another program's that was meant for who had this port before. */
static int accept_from(int client)
{
    struct sockaddr_in own = {0}, peer = {0};
    socklen_t size = sizeof own, peer_size = sizeof peer;
    int fd;
    getsockname(client, (struct sockaddr *)&own, &size);
    while ((fd = accept(listener, (struct sockaddr *)&peer, &peer_size)) >= 0 && peer.sin_port != own.sin_port) {
        close(fd);
    }
    return fd;
}

static void connect_pair(int *ends)
{
    ends[1] = tcp ? socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0) : -1;
    if (ends[1] >= 0 && connect(ends[1], (struct sockaddr *)&listener_address, sizeof listener_address) == 0 &&
        (ends[0] = accept_from(ends[1])) >= 0) {
        return;
    }
    if (ends[1] >= 0) {
        close(ends[1]);
    }
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0) {
        fail("no socket pair: %s", strerror(errno));
    }
}

/* One more stream, if there is room. */
static void add_stream(void)
{
    int ends[2], least = 1, rc;
    connection *on = NULL;
    tsrv_stream *last = NULL;
    for (int i = 0; i < STREAMS && on == NULL; i++) {
        on = connections[i].made ? NULL : &connections[i];
    }
    if (on == NULL || server == NULL || loop == NULL) {
        return;
    }
    connect_pair(ends);
    if (small_buffers && !tcp) {
        setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &least, sizeof least);
        setsockopt(ends[1], SOL_SOCKET, SO_RCVBUF, &least, sizeof least);
    }
    setsockopt(ends[1], IPPROTO_TCP, TCP_NODELAY, &least, sizeof least);
    on->fd = ends[0];
    on->peer = ends[1];
    on->made = true;
    on->active = on->reads = this_moment();
    happened();
    rc = tsrv_server_add_stream(server, ends[0]);
    TRACE("%d: add_stream = %d, descriptor %d\n", number_of(on), rc, ends[0]);
    if (rc != TSRV_OK) {
        if (!unclean || on->fd >= 0) {
            fail("add_stream returns %d", rc);
        }
        close(on->peer);
        on->peer = -1;
        return;
    }
    for (tsrv_stream *next = tsrv_server_next(server, NULL); next != NULL; next = tsrv_server_next(server, next)) {
        last = next;
    }
    on->stream = last;
    *(connection **)tsrv_data(last) = on;
    tls_begin_stream(on);
}

static void free_loop(void)
{
    TRACE("free the loop\n");
    begin_freeing();
    if (tsrv_loop_free(loop) != TSRV_OK) {
        fail("tsrv_loop_free fails");
    }
    loop = NULL;
    for (int i = 0; i < CALLS; i++) {
        calls[i].active = false; /* dropped where they stood */
    }
}

static int turn(int timeout_ms)
{
    int rc;
    end_brief_slices();
    inside = false;
    loop_looks = true;
    rc = tsrv_loop_run_once(loop, timeout_ms);
    if (rc < 0) {
        fail("a turn fails: %d", rc);
    }
    return rc;
}

/* One thing that the main program does between turns. */
static void step(void)
{
    static const int waits_ms[] = {0, 0, 0, 0, 1, 10, 100, 3000};
    unsigned what = draw(32);
    if (loop == NULL || what == 31) {
        if (loop != NULL && draw(16) == 15) {
            free_loop();
        }
        script_front += loop == NULL;
    } else if (what < 12) {
        happened();
        turn(PICK(waits_ms));
    } else if (what < 20) {
        peer_acts(&connections[draw(STREAMS)]);
    } else if (what < 22) {
        add_stream();
    } else if (what < 27) {
        operate(NULL, OUTSIDE);
    } else if (what < 30) {
        new_actor(what == 27 ? SPAWN : what == 28 ? POST : TIMER, &connections[draw(STREAMS)]);
    } else {
        pass_ms((int)draw(64) * 4);
    }
}

/* ---- the end ------------------------------------------------------------------------------*/

/* Turn until nothing happens any more, or so much time has passed that everything with a limit is over.
 *   reading  the peers take what comes */
static void come_to_rest(bool reading)
{
    uint64_t end = now + 200000 * MS;
    int quiet = 0; /* turns; in the first of them the loop may have sent something */
    for (int count = 0, sleeps = 0; now < end && quiet < 2; count++) {
        bool took = false;
        sleeps += last_events == 0;
        stretching = sleeps > 200;
        if (count > 200000) {
            fail("the loop does not come to rest");
        }
        for (int s = 0; s < STREAMS && reading; s++) {
            while (connections[s].peer >= 0 && peer_receive(&connections[s], SIZE_MAX)) {
                took = true;
            }
        }
        for (int s = 0; s < STREAMS; s++) {
            took = tls_flush(&connections[s], SIZE_MAX) || took;
        }
        if (turn(100000) == 0) {
            break;
        }
        quiet = last_events == 0 && last_timeout_ms == 100000 && !took ? quiet + 1 : 0;
    }
    stretching = false;
}

/* Somebody holds a part of a message, for which the others wait. */
static bool is_tight(void)
{
#if FUZZ_OLD
    return false;
#else
    return tight && loop->streams.pool.tight;
#endif
}

/* What still waits may do so. */
static void check_waits(bool reading)
{
    for (int i = 0; i < CALLS; i++) {
        const call *c = &calls[i];
        size_t size;
        if (!c->active) {
            continue;
        }
        if (is_read(c->kind) && (reading || tsrv_unsent_size(c->on->stream) == 0) && !c->on->strayed && !unclean &&
            !is_tight() &&
            predict(c, c->from, c->on->sent, c->on->peer_fin, &size) != TSRV_EAGAIN) {
            fail("%d: %s still waits for what is there", number_of(c->on), names[c->kind]);
        }
        if (is_read(c->kind) && c->on->peer_fin && (reading || tsrv_unsent_size(c->on->stream) == 0) &&
            !(is_tight() && c->from < c->on->sent)) { /* which lies behind what is not received */
            fail("%d: %s still waits after the end of the input", number_of(c->on), names[c->kind]);
        }
        if ((is_write(c->kind) || c->kind == FLUSH) && (reading || c->on->write_ms >= 0)) {
            fail("%d: %s still waits", number_of(c->on), names[c->kind]);
        }
    }
    for (int i = 0; i < STREAMS; i++) {
        const connection *on = &connections[i];
        if (on->made && on->stream != NULL && !on->entered && !unclean && !freeing && forced_ms < 0) {
            fail("%d: its handler was not called", i);
        }
        if (is_usable(on) && on->lazy && !unclean && !is_tight() && (on->sent != on->received || on->peer_fin) &&
            !on->ending && tsrv_unread_size(on->stream) < max_buffer_size() &&
            (!on->told || tsrv_unsent_size(on->stream) == 0)) { /* TSRV_EAGAIN behind an end is that end */
            fail("%d: its handler is not called for more input", i);
        }
        if (is_usable(on) && reading && tsrv_unsent_size(on->stream) != 0) {
            fail("%d: %zu bytes are unsent", i, tsrv_unsent_size(on->stream));
        }
    }
}

static void end_peers(unsigned how)
{
    for (int i = 0; i < STREAMS; i++) {
        connection *on = &connections[i];
        if (on->peer >= 0 && how == 0) {
            peer_shutdown(on);
        }
        if (on->peer >= 0 && (how != 0 || !on->peer_fin)) { /* or it could not be said */
            peer_close(on, how == 1);
        }
        happened();
    }
}

static void check_ends(void)
{
    bool excused = false;
    for (int i = 0; i < STREAMS; i++) {
        const connection *on = &connections[i];
        bool lazy = is_usable(on) && on->lazy && tsrv_unread_size(on->stream) >= max_buffer_size();
        excused = excused || lazy;
        if (on->entered && !on->closed && !lazy) {
            fail("%d: on_close does not come", i);
        }
    }
    for (int i = 0; i < CALLS && !excused; i++) {
        if (calls[i].active) {
            fail("%d: %s does not end", number_of(calls[i].on), names[calls[i].kind]);
        }
    }
}

/* The server's counters are right. */
static void check_stats(void)
{
    uint64_t in = 0, out = 0, open = 0, made = 0;
    tsrv_stats stats;
    for (int i = 0; i < STREAMS; i++) {
        in += connections[i].received + connections[i].lingered;
        out += connections[i].taken;
        open += connections[i].fd >= 0;
        made += connections[i].stream != NULL;
    }
    tsrv_server_stats(server, &stats);
    if (stats.bytes_in != in || stats.bytes_out != out || stats.open != open || stats.accepted != made ||
        stats.closed != made - open) {
        fail("the counters are wrong: received %llu, not %llu, sent %llu, not %llu, open %llu, not %llu",
             (unsigned long long)stats.bytes_in, (unsigned long long)in, (unsigned long long)stats.bytes_out,
             (unsigned long long)out, (unsigned long long)stats.open, (unsigned long long)open);
    }
}

static void wake_all(void)
{
    for (int i = 0; i < STREAMS; i++) {
        if (is_usable(&connections[i])) {
            wake(&connections[i]);
        }
    }
}

/* Faults have stopped: everything comes to its end. */
static void finish(unsigned how)
{
    bool reading = how % 4 != 3;
    TRACE("the script is over\n");
    faults = false;
    script_back = script_front;
    if (loop != NULL) {
        happened();
        come_to_rest(reading);
        check_waits(reading);
        end_peers(how / 4 % 4);
        come_to_rest(true);
        for (int i = 0; i < 3; i++) {
            wake_all();
            come_to_rest(true);
        }
        check_ends();
        if (server != NULL) {
            check_stats();
        }
    }
    for (int i = 0; i < 2; i++) {
        if (loop != NULL && (i == 1 || how / 16 % 2 == 1)) {
            free_loop();
        } else if (server != NULL) {
            operate_server(FREE);
        }
    }
    if (server != NULL) {
        operate_server(FREE);
    }
}

static void check_nothing_is_left(int descriptors)
{
    int left;
    for (int i = 0; i < STREAMS; i++) {
        connection *on = &connections[i];
        while (on->peer >= 0 && peer_receive(on, SIZE_MAX)) {
        }
        if (on->entered && !on->closed) {
            fail("%d: on_close has not been called", i);
        }
        /* With TCP it may still be on its way, even though both ends are in this process. */
        if (on->good && !on->peer_gone && (!tcp || (on->peer_saw_end && !FUZZ_LATE)) &&
            (on->delivered != on->written ||
             (!on->peer_saw_end && on->received == on->sent && on->sealed_received == on->sealed_sent))) {
            fail("%d: of %llu bytes that were written %llu came, %s an end", i, (unsigned long long)on->written,
                 (unsigned long long)on->delivered, on->peer_saw_end ? "and" : "without");
        }
        if (on->good && !on->peer_gone && (!tcp || (on->peer_saw_end && !FUZZ_LATE))) {
            check_last_word(on);
        }
        if (on->peer >= 0) {
            close(on->peer);
        }
    }
    if (t_live_allocations != 0) {
        fail("%ld allocations are left", t_live_allocations);
    }
    left = open_descriptors();
    if (left != descriptors) {
        fail("%d descriptors are left, not %d", left, descriptors);
    }
}

/* ---- one script ---------------------------------------------------------------------------*/

static void draw_options(void)
{
    static const size_t least[] = {1, 9, 63, 65}; /* about what a search looks at first */
    static const size_t buffers[] = {0, 64, 200, 1000, 5000}, receives[] = {0, 1, 16, 100, 4096};
    static const size_t marks[] = {0, 1, 50, 1000}, queues[] = {0, 0, 100, 2000, 30000};
    static const int reads_ms[] = {0, 0, 10, 100, 3000}, idles_ms[] = {0, 0, 15, 200, 4000};
    static const int writes_ms[] = {0, 30, 500}, closes_ms[] = {0, 20, 300, 3000};
    memset(&options, 0, sizeof options);
    options.handle_stream = call_handler;
    options.on_close = call_on_close;
    options.context = &options;
    options.loop = loop;
    options.data_size = sizeof(connection *);
    options.max_buffer_size = PICK(buffers);
    options.max_buffer_size = meddles && draw(2) ? PICK(least) : options.max_buffer_size;
    options.read_chunk_size = PICK(receives);
    options.write_high_water = PICK(marks);
    options.max_write_buffer_size = PICK(queues);
    options.read_timeout_ms = PICK(reads_ms);
    options.idle_timeout_ms = PICK(idles_ms);
    options.write_timeout_ms = PICK(writes_ms);
    options.close_timeout_ms = PICK(closes_ms);
}

static void reset(void)
{
    for (int i = 0; i < STREAMS; i++) {
        tls_end_script(&connections[i]);
        memset(&connections[i], 0, sizeof connections[i]);
        connections[i].fd = connections[i].peer = -1;
    }
    for (int i = 0; i < CALLS; i++) {
        calls[i].active = false;
    }
    memset(actors, 0, sizeof actors);
    unclean = freeing = inside = faults = memory_faults = false;
    forced_ms = -1;
    in_vain = 0;
    system_calls = 0;
    fault_after = 0;
}

/* The loop and the server, with the first stream. */
static void begin(unsigned how, unsigned more, bool starttls)
{
    tsrv_loop_options loop_options = {0};
    int mode = (how & 1) != 0 ? TSRV_CALLBACK : TSRV_COROUTINE;
    loop_options.backend = (how & 2) != 0 ? TSRV_BACKEND_POLL : TSRV_BACKEND_EPOLL;
    /* Either the clock begins somewhere, or milliseconds in 32 bits wrap soon. */
    now = (more & 1) != 0 ? ((uint64_t)1 << 32) * MS - 40 * MS : 1000000 * MS;
    loop_looks = true;
    tcp = (how & 0x1c) == 0x1c;
    small_buffers = (how & 0x20) != 0;
    strays = (more & 0x0e) == 0x0e;
#if !FUZZ_OLD
    tight = (more & 0xc0) == 0xc0;
    loop_options.max_total_buffer = !tight ? 0 : (how & 1) != 0 ? 30000 : 70000;
#endif
    if (tsrv_loop_new(&loop, &loop_options) != TSRV_OK) {
        fail("no loop");
    }
    draw_options();
    options.mode = mode;
    tls_begin_script(starttls);
    if (tsrv_server_new(&server, &options) != TSRV_OK) {
        fail("no server");
    }
    faults = (how & 0x40) != 0;
    fatal_faults = (how & 0xc0) == 0xc0;
    memory_faults = (more & 0x30) == 0x30;
    add_stream();
}

static void forget_log(int level, const char *message, void *context)
{
    (void)level;
    (void)context;
    TRACE("log: %s\n", message);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    unsigned how, more, end;
    int descriptors;
    if (listener < 0) {
        tracing = getenv("FUZZ_TRACE") != NULL;
        make_bytes();
        open_listener();
        output_file = memfd_create("output", MFD_CLOEXEC);
        if (output_file < 0 || write(output_file, output_bytes, sizeof output_bytes) != (ssize_t)sizeof output_bytes) {
            fail("no file");
        }
        tsrv_set_log(forget_log, NULL);
        tls_begin_once();
#if !FUZZ_OLD
        t_verify = t_verify_streams;
        first_process = tsrvi_process;
#endif
    }
#if !FUZZ_OLD
    tsrvi_process = first_process;
#endif
    descriptors = open_descriptors();
    script_is(data, size);
    reset();
    how = draw(256);
    more = draw(256);
    end = draw(256);
    meddles = !FUZZ_OLD && (end & 0xc0) == 0xc0;
    begin(how, more, (end & 0x20) != 0);
    while (!script_is_over()) {
        tls_shake_all();
        step();
        end_brief_slices();
    }
    finish(end);
    check_nothing_is_left(descriptors);
    return 0;
}
