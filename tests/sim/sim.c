/* Servers in a simulated kernel: listeners, connections, clients, timers, posts, signals, coroutines, drains, with
 * peers, faults and time that are drawn from one string of bytes (driver.h). What the calls of one stream return in
 * every case is asked by streams.c; here it is what a server does around them.
 *
 * What must hold, in every run:
 *   - no assertion, no sanitizer's report, no descriptor used or closed twice, no call that blocks, no SIGPIPE;
 *   - tsrvi_stream_verify, at every call of the library;
 *   - what is read is what the peer has sent, in order, and what a naive look at it predicts; what the peer receives
 *     is what was written, all of it after an end in good order;
 *   - every call that waits ends once, with a code that has a reason, not before its time and not after it;
 *   - handlers are entered once for each connection, on_close comes once, last, with the descriptor closed;
 *   - timers, posts, signals, notifications: each once, none early, none lost, in order;
 *   - the loop does not turn in vain; it never sleeps for ever while something is due;
 *   - faults over, all waiting connections are accepted, everything ends, and no descriptor, no allocation and no
 *     signal handler is left. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "process.h"
#include "sys.h"

#include "script.h"

#ifndef SIM_HEADER
#define SIM_HEADER "../../tcpserver.h"
#endif
#ifndef SIM_OLD
#define SIM_OLD 0 /* 1 = the header is version 0.1.0 */
#endif

/* 1 = a socket whose number is that of a listener which somebody has closed is the library's own, wherever it comes
 * from. 0 = only accepted ones are: then nothing else is opened behind that. */
#ifndef SIM_DISOWNS
#define SIM_DISOWNS (!SIM_OLD)
#endif

#define TCPSERVER_IMPLEMENTATION
#include SIM_HEADER
#if !SIM_OLD
#include "../verify.h"
#else /* what it has not */
typedef struct tsrv_condition {
    int none;
} tsrv_condition;
#define tsrv_condition_wait(condition, ms) (notified++, tsrv_sleep((ms) < 0 ? 1 : (ms)))
#define tsrv_condition_notify(condition, count) ((void)(count))
#endif

enum {
    CONNECTIONS = 32,
    ACTORS = 24,
    SERVERS = 2,
    MOST_IN_VAIN = 60,  /* waits */
    MOST_CALLS = 30000, /* of one turn */
    PERIOD = 65536,
    LARGEST = 200000, /* bytes of one write, and of what a peer sends in all */
    SIGNAL = SIGUSR1,
    MANY = 20
};

/* ---- the bytes ----------------------------------------------------------------------------*/

static char input_bytes[PERIOD + LARGEST], output_bytes[PERIOD + LARGEST];

static void make_bytes(void)
{
    static const char letters[] = "\n\r\naaaabbbccdefgh";
    for (uint32_t i = 0; i < sizeof input_bytes; i++) {
        uint32_t mixed = (i % PERIOD + 1) * 2654435761u;
        mixed = (mixed ^ mixed >> 15) * 2246822519u;
        input_bytes[i] = letters[(mixed >> 13) % 17];
        output_bytes[i] = (char)('A' + (mixed >> 20) % 50);
    }
}

static const char *input_from(uint64_t at)
{
    return input_bytes + at % PERIOD;
}

static const char *output_from(uint64_t at)
{
    return output_bytes + at % PERIOD;
}

/* ---- what is known ------------------------------------------------------------------------*/

typedef enum op_kind {
    READ_SOME, /* what is done when the script is over */
    READ_LINE,
    READ_BYTES,
    READ_INTO,
    READ_MATCH,
    READ_CLOSE, /* the last of the reads */
    WRITE,
    WRITEV,
    PRINTF,
    TRY_WRITE,
    SENDFILE, /* the last of the writes */
    FLUSH,
    WAIT,
    SLEEP,
    WAIT_FD,
    CONDITION,
    CONNECT,
    DRAIN
} op_kind;

static const char *const op_names[] = {"read_some", "read_line", "read_bytes", "read_into", "read_match", "read_close",
                                       "write",     "writev",    "printf",     "try_write", "sendfile",   "flush",
                                       "wait",      "sleep",     "wait_fd",    "condition", "connect",    "drain"};

/* One call that can wait. */
typedef struct op {
    bool active;
    op_kind kind;
    size_t size;
    int timeout_ms;
    uint64_t begin, due; /* due 0 = never */
    uint64_t from;
    bool must_end; /* something has ended it */
    int late;      /* waits of the loop since it should have been over */
    struct connection *on;
    struct op *next; /* all that are active */
} op;

typedef struct connection {
    bool used;
    uint64_t number; /* of the server's end in the kernel */
    k_file *peer;    /* the schedule's end; NULL = none, or closed */
    tsrv_stream *stream;
    int server;
    bool entered, running, over, closed;
    int returned;
    bool ending;               /* this side has ended it, or may have */
    bool aborted, shut;
    bool peer_fin, peer_gone;  /* by the peer: its FIN; its close or reset */
    bool saw_end;
    bool dialled;              /* the other end is a stream of tsrv_connect */
    uint64_t sent, read, written, delivered;
    bool unsure, refused;
    int read_ms;
    op pending;
    char memory[4096];
} connection;

typedef struct actor {
    bool used, over;
    enum { TIMER, POST, SPAWN, DIALLER, SERVER_FREER } kind;
    uint64_t due;
    int late;
    tsrv_timer timer;
    int order; /* of posts */
} actor;

typedef struct server_slot {
    tsrv_server *server;
    tsrv_server_options options;
    uint64_t forced; /* when a drain's grace is over; 0 = no drain */
    bool drained;    /* at some time */
    int started;     /* times that on_start was called */
    bool early;      /* it was stopped before: then 0.1.0 does not call it for what that has accepted */
} server_slot;

static connection connections[CONNECTIONS];
static actor actors[ACTORS];
static server_slot servers[SERVERS];
static op *ops;
static tsrv_loop *loop;
static bool unclean; /* a fault was injected that excuses every error */
static bool freeing; /* all is being freed */
static bool inside;  /* a call of the library that cannot wait is under way */
static bool robbed;  /* somebody has closed a listener of ours */
static tsrv_condition condition;
static long notified, woken;
static int pipe_fds[2], pipe_bytes;
static tsrv_signal signal_watch;
static bool signal_due;
static int signal_late;
static int post_order, posts_run;
static int output_file;

static int number_of(const connection *c)
{
    return (int)(c - connections);
}

static connection *find_connection(uint64_t number)
{
    connection *found = NULL;
    for (int i = 0; i < CONNECTIONS; i++) {
        if (connections[i].used && connections[i].number == number) {
            return &connections[i];
        }
        if (found == NULL && !connections[i].used) {
            found = &connections[i];
        }
    }
    if (found != NULL) {
        memset(found, 0, offsetof(connection, memory));
        found->used = true;
        found->number = number;
        found->server = -1;
    }
    return found;
}

/* ---- faults, progress ---------------------------------------------------------------------*/

static bool gentle_faults, fatal_faults, memory_faults;
static unsigned fault_after;
static const char *sticky_name; /* from now on these fail */
static int sticky_code;
static int in_vain;
static long turn_calls;

static void happened(void)
{
    in_vain = 0;
}

static bool is_gentle(const s_class *class, int code)
{
    return code == EINTR || code == S_SHORT ||
           (code == EAGAIN && strcmp(class->name, "connect") != 0 && strcmp(class->name, "flock") != 0) ||
           strcmp(class->name, "close") == 0;
}

/* Errors of accept are about connections, which nobody has seen yet. */
static bool is_of_accept(const s_class *class)
{
    return strncmp(class->name, "accept", 6) == 0;
}

static int plan(const s_class *class)
{
    int code, count;
    bool memory = strcmp(class->name, "malloc") == 0 || strcmp(class->name, "realloc") == 0 ||
                  strcmp(class->name, "mmap") == 0;
    if (sticky_name != NULL && strcmp(class->name, sticky_name) == 0) {
        unclean = unclean || !is_of_accept(class);
        return sticky_code;
    }
    if (!gentle_faults || fault_after-- > 0) {
        return 0;
    }
    if (script_is_over()) {
        gentle_faults = false;
        return 0;
    }
    fault_after = draw(40);
    count = s_code_count(class);
    code = class->codes[draw((unsigned)count)];
    if (memory ? !memory_faults : !is_gentle(class, code) && !fatal_faults) {
        return 0;
    }
    if (strcmp(class->name, "epoll_ctl") == 0 && code != ENOMEM && code != ENOSPC) {
        return 0; /* which say that the descriptor is closed: the loop does not look for it again */
    }
    unclean = unclean || !(is_gentle(class, code) || is_of_accept(class));
    TRACE("    %s in %s:%d fails with %d\n", class->name, s_at->function, s_at->line, code);
    return code;
}

static void every_call(void)
{
#if !SIM_OLD
    t_verify_streams();
#endif
    if (++turn_calls > MOST_CALLS) {
        k_violation("a turn does not end");
    }
}

static void check_late(const char *what, bool over, int *late)
{
    *late = over ? *late + 1 : 0;
    if (*late > MOST_IN_VAIN) {
        k_violation("%s does not end, or come", what);
    }
}

/* Time that is over by more than the loop's milliseconds. */
static bool is_past(uint64_t due)
{
    return due != 0 && due + 2 * K_MS < k_now;
}

static void wait_begins(void)
{
    static uint64_t last_now;
    turn_calls = 0;
    in_vain = last_now == k_now ? in_vain + 1 : 0;
    last_now = k_now;
    if (in_vain > MOST_IN_VAIN) {
        k_violation("the loop spins: %d turns in vain", in_vain);
    }
    for (op *o = ops; o != NULL; o = o->next) {
        check_late(op_names[o->kind], o->must_end || is_past(o->due), &o->late);
    }
    for (int i = 0; i < ACTORS; i++) {
        actor *a = &actors[i];
        if (a->used && !a->over && a->kind != DIALLER && a->kind != SPAWN && !freeing) {
            check_late(a->kind == TIMER ? "a timer" : "a post", a->kind == TIMER ? is_past(a->due) : true, &a->late);
        }
    }
    check_late("a signal", signal_due, &signal_late);
}

static uint64_t after_ms(int ms)
{
    return ms < 0 ? 0 : k_now + (uint64_t)ms * K_MS;
}

/* ---- what a read should return ------------------------------------------------------------*/

static size_t max_buffer_size(const connection *c)
{
    size_t set = c->server < 0 ? 0 : servers[c->server].options.max_buffer_size;
    return set == 0 ? (size_t)1024 * 1024 : set;
}

/* The first line's size in the input between two places; 0 = it is not there. */
static size_t line_size(uint64_t from, uint64_t to)
{
    const char *begin = input_from(from);
    const char *end = (const char *)memchr(begin, '\n', (size_t)(to - from));
    return end == NULL ? 0 : (size_t)(end - begin) + 1;
}

/* A message says its size in its first byte. */
static size_t match(const char *data, size_t size, void *context)
{
    const connection *c = (const connection *)context;
    if (data[size] != 0 || memcmp(data, input_from(c->read), size) != 0) {
        k_violation("%d: what is to be matched differs from what was sent", number_of(c));
    }
    return 1 + (size_t)(unsigned char)data[0] * 7 % 50;
}

/* TSRV_OK and the size; TSRV_EAGAIN = it is not there; TSRV_ETOOLONG. */
static int predict(const op *o, bool ended, size_t *size)
{
    const connection *c = o->on;
    size_t there = (size_t)(c->sent - o->from), most = max_buffer_size(c);
    switch (o->kind) {
    case READ_SOME:
        *size = there < most ? there : most;
        return there != 0 ? TSRV_OK : TSRV_EAGAIN;
    case READ_LINE:
        *size = line_size(o->from, c->sent);
        return *size > most || (*size == 0 && there > most) ? TSRV_ETOOLONG : *size != 0 ? TSRV_OK : TSRV_EAGAIN;
    case READ_BYTES:
        *size = o->size;
        return o->size > most ? TSRV_ETOOLONG : there >= o->size ? TSRV_OK : TSRV_EAGAIN;
    case READ_INTO:
        *size = o->size;
        return there >= o->size ? TSRV_OK : TSRV_EAGAIN;
    case READ_MATCH:
        *size = there == 0 ? 0 : 1 + (size_t)(unsigned char)input_from(o->from)[0] * 7 % 50;
        return there == 0 ? TSRV_EAGAIN : *size > most ? TSRV_ETOOLONG : there >= *size ? TSRV_OK : TSRV_EAGAIN;
    default:
        *size = there;
        return there > most ? TSRV_ETOOLONG : ended ? TSRV_OK : TSRV_EAGAIN;
    }
}

/* ---- what calls return --------------------------------------------------------------------*/

static bool is_read(op_kind kind)
{
    return kind <= READ_CLOSE;
}

static bool is_write(op_kind kind)
{
    return kind >= WRITE && kind <= SENDFILE;
}

static bool is_forced(const connection *c)
{
    const server_slot *slot = c == NULL || c->server < 0 ? &servers[0] : &servers[c->server];
    return freeing || slot->server == NULL || (slot->forced != 0 && k_now >= slot->forced);
}

static void check_error(const op *o, int rc)
{
    const connection *c = o->on;
    bool known = (rc == TSRV_ECLOSED && (c->ending || c->shut || is_forced(c))) ||
                 (rc == TSRV_ETIMEOUT && tsrv_error(c->stream) == TSRV_ETIMEOUT) ||
                 (rc == -EMFILE && (o->kind == SENDFILE || tsrv_error(c->stream) == -EMFILE)) ||
                 (rc == TSRV_EFULL && (c->refused || is_write(o->kind))) ||
                 ((rc == -ECONNRESET || rc == -EPIPE) && (c->peer_gone || c->dialled)) ||
                 (unclean && rc < 0 && rc > -1000 && rc != -EAGAIN && rc != -EINTR);
    if (!known) {
        k_violation("%d: %s returns %d (%s), which nothing explains", number_of(c), op_names[o->kind], rc,
                    tsrv_strerror(rc));
    }
}

static void check_read_failure(op *o, int rc)
{
    const connection *c = o->on;
    size_t size;
    int expected = predict(o, false, &size);
    if (rc == TSRV_ETOOLONG && (expected == TSRV_ETOOLONG || c->dialled)) {
        return;
    }
    if (rc == TSRV_EOF) {
        if (expected == TSRV_OK && !c->peer_gone && !c->dialled && !unclean && !tsrv_stopping(c->stream)) {
            k_violation("%d: %s returns TSRV_EOF before what was sent", number_of(c), op_names[o->kind]);
        }
        if (!c->peer_fin && !c->peer_gone && !c->dialled && !unclean && !tsrv_stopping(c->stream)) {
            k_violation("%d: %s returns TSRV_EOF, which the peer has not sent", number_of(c), op_names[o->kind]);
        }
    } else if (rc == TSRV_ETIMEOUT && tsrv_error(c->stream) != TSRV_ETIMEOUT) {
        int idle_ms = c->server < 0 ? 0 : servers[c->server].options.idle_timeout_ms;
        int least_ms = o->timeout_ms > 0 && (idle_ms <= 0 || o->timeout_ms < idle_ms) ? o->timeout_ms : idle_ms;
        if (least_ms <= 0 || k_now - o->begin < (uint64_t)least_ms * K_MS) {
            k_violation("%d: %s times out after %llu ms of %d", number_of(c), op_names[o->kind],
                        (unsigned long long)((k_now - o->begin) / K_MS), least_ms);
        }
    } else {
        check_error(o, rc);
    }
}

static void check_read(op *o, const tsrv_slice *slice)
{
    connection *c = o->on;
    const char *data = o->kind == READ_INTO ? c->memory : slice->data;
    size_t size, got = o->kind == READ_INTO ? o->size : slice->size;
    int expected = predict(o, c->peer_fin || c->peer_gone || c->dialled || unclean, &size);
    if (c->dialled) { /* what it has sent is known when its call has returned */
        size = got;
    } else if (expected != TSRV_OK ||
               (o->kind == READ_SOME    ? got > size || (got == 0 && size != 0)
                : o->kind == READ_CLOSE ? got > size
                                        : got != size)) {
        k_violation("%d: %s returns %zu bytes, not %zu (%d)", number_of(c), op_names[o->kind], got, size, expected);
    }
    if (memcmp(data, input_from(o->from), got) != 0) {
        k_violation("%d: %s returns what was not sent, in %zu bytes from %llu", number_of(c), op_names[o->kind], got,
                    (unsigned long long)o->from);
    }
    if (o->kind != READ_INTO && slice->data[slice->size] != 0) {
        k_violation("%d: a slice does not end with 0", number_of(c));
    }
    c->read = o->from + got;
}

static void after_op(op *o, int rc, const tsrv_slice *slice)
{
    connection *c = o->on;
    if (is_read(o->kind)) {
        if (rc == TSRV_OK) {
            check_read(o, slice);
        } else {
            check_read_failure(o, rc);
        }
    } else if (is_write(o->kind)) {
        bool refused = (rc == TSRV_EFULL && o->kind == TRY_WRITE) ||
                       (o->kind == SENDFILE && rc < 0 && rc > -1000 && tsrv_error(c->stream) == TSRV_OK);
        if (rc != TSRV_OK && !refused) {
            c->refused = c->refused || rc == TSRV_EFULL;
            c->unsure = true;
            check_error(o, rc);
        } else if (rc != TSRV_OK) {
            c->written = o->from;
        }
    } else if (rc == TSRV_ETIMEOUT && o->kind != DRAIN && o->kind != CONNECT) {
        if (o->timeout_ms < 0 || k_now - o->begin < (uint64_t)o->timeout_ms * K_MS) {
            if (c == NULL || tsrv_error(c->stream) != TSRV_ETIMEOUT) {
                k_violation("%s times out early", op_names[o->kind]);
            }
        }
    } else if (o->kind == FLUSH && rc != TSRV_OK) {
        check_error(o, rc);
    }
}

/* ---- calls --------------------------------------------------------------------------------*/

static int invoke_read(op *o, tsrv_slice *slice)
{
    connection *c = o->on;
    switch (o->kind) {
    case READ_SOME:
        return tsrv_read_some(c->stream, 0, slice);
    case READ_LINE:
        return tsrv_read_until(c->stream, "\n", 0, slice);
    case READ_BYTES:
        return tsrv_read_bytes(c->stream, o->size, slice);
    case READ_INTO:
        return tsrv_read_into(c->stream, c->memory, o->size);
    case READ_MATCH:
        return tsrv_read_until_match(c->stream, match, c, 0, slice);
    default:
        return tsrv_read_until_close(c->stream, 0, slice);
    }
}

static int invoke_write(op *o)
{
    connection *c = o->on;
    const char *data = output_from(o->from);
    tsrv_slice pieces[MANY];
    int count = o->size > 10000 ? MANY : 2; /* more than a few take memory */
    switch (o->kind) {
    case WRITE:
        return tsrv_write(c->stream, data, o->size);
    case WRITEV:
        for (int i = 0; i < count; i++) {
            size_t from = o->size * (size_t)i / (size_t)count;
            pieces[i].data = data + from;
            pieces[i].size = o->size * (size_t)(i + 1) / (size_t)count - from;
        }
        return tsrv_writev(c->stream, pieces, count);
    case PRINTF:
        return tsrv_printf(c->stream, "%.*s", (int)o->size, data);
    case TRY_WRITE:
        return tsrv_try_write(c->stream, data, o->size);
    default:
        return tsrv_sendfile(c->stream, output_file, (int64_t)(o->from % PERIOD), o->size);
    }
}

static int invoke(op *o, tsrv_slice *slice)
{
    switch (o->kind) {
    case FLUSH:
        return tsrv_flush(o->on->stream);
    case WAIT:
        return tsrv_wait(o->on->stream, o->timeout_ms);
    case SLEEP:
        return tsrv_sleep(o->timeout_ms);
    case WAIT_FD:
        return tsrv_wait_fd(pipe_fds[0], TSRV_READABLE, o->timeout_ms);
    case CONDITION:
        return tsrv_condition_wait(&condition, o->timeout_ms);
    case DRAIN:
        return tsrv_server_drain(servers[o->size].server, o->timeout_ms);
    default:
        return is_read(o->kind) ? invoke_read(o, slice) : invoke_write(o);
    }
}

static void begin_op(op *o)
{
    o->active = true;
    o->must_end = false;
    o->late = 0;
    o->begin = (uint64_t)tsrv_loop_now_ms(loop) * K_MS; /* of this turn, which may have taken time itself */
    if (is_read(o->kind)) {
        o->from = o->on->read;
        o->timeout_ms = o->on->read_ms != 0                ? o->on->read_ms
                        : o->on->server < 0                ? 0
                                                           : servers[o->on->server].options.read_timeout_ms;
        o->due = o->timeout_ms > 0 ? after_ms(o->timeout_ms) : 0;
    } else if (is_write(o->kind)) {
        o->from = o->on->written;
        o->on->written += o->size;
        o->due = 0;
    } else {
        o->due = o->timeout_ms < 0 ? 0 : after_ms(o->timeout_ms + (o->kind == DRAIN ? 1100 : 0));
    }
    o->next = ops;
    ops = o;
}

static void end_op(op *o)
{
    op **link = &ops;
    while (*link != NULL && *link != o) {
        link = &(*link)->next;
    }
    if (*link != NULL) {
        *link = o->next;
    }
    o->active = false;
}

/* Make a call, or make it again. */
static int make_op(op *o, bool can_wait)
{
    tsrv_slice slice = {"", 0};
    int rc;
    if (!o->active) {
        begin_op(o);
    }
    TRACE("%d: %s(%zu, %d ms)\n", o->on == NULL ? -1 : number_of(o->on), op_names[o->kind], o->size, o->timeout_ms);
    inside = !can_wait;
    rc = invoke(o, &slice);
    inside = false;
    TRACE("%d: %s = %d\n", o->on == NULL ? -1 : number_of(o->on), op_names[o->kind], rc);
    if (rc == TSRV_EAGAIN) {
        if (can_wait && o->kind != DRAIN) {
            k_violation("%s returns TSRV_EAGAIN in a coroutine", op_names[o->kind]);
        }
        return rc;
    }
    happened();
    end_op(o);
    after_op(o, rc, &slice);
    return rc;
}

/* ---- peers --------------------------------------------------------------------------------*/

static const size_t chunks[] = {1, 2, 5, 17, 60, 400, 3000, 20000};

static void peer_send(connection *c, size_t size)
{
    struct iovec piece;
    ssize_t sent;
    if (c->peer_fin || c->sent + size > LARGEST) {
        return;
    }
    piece.iov_base = (void *)(uintptr_t)input_from(c->sent);
    piece.iov_len = size;
    sent = k_send_pieces(c->peer, &piece, 1, MSG_NOSIGNAL);
    c->peer_gone = c->peer_gone || (sent < 0 && errno != EAGAIN) || c->peer->peer == NULL;
    c->sent += sent > 0 ? (uint64_t)sent : 0;
    TRACE("%d: the peer sends %zd\n", number_of(c), sent);
}

/* Returns whether anything came. */
static bool peer_receive(connection *c, size_t most)
{
    static char buffer[65536];
    ssize_t got = k_receive(c->peer, buffer, most < sizeof buffer ? most : sizeof buffer, 0);
    if (got <= 0) {
        c->saw_end = c->saw_end || got == 0;
        return false;
    }
    if (memcmp(buffer, output_from(c->delivered), (size_t)got) != 0) {
        k_violation("%d: the peer receives what was not written", number_of(c));
    }
    c->delivered += (uint64_t)got;
    if (c->delivered > c->written) {
        k_violation("%d: the peer receives more than was written", number_of(c));
    }
    happened();
    return true;
}

static void peer_shutdown(connection *c)
{
    k_file *file = c->peer;
    TRACE("%d: the peer shuts down\n", number_of(c));
    if (!c->peer_fin && file->state == K_CONNECTED) {
        file->shut |= K_OUT_OVER;
        if (k_is_tcp(file) && file->peer != NULL) {
            file->peer->in.fin = true;
            k_send_arrives(file->peer);
        } else if (file->peer != NULL) {
            file->peer->shut |= K_IN_OVER;
            k_touch(file->peer);
        }
    }
    c->peer_fin = true;
}

/* All that has come in good order has to be there. */
static void check_delivered(connection *c)
{
    if (c->peer_gone || c->aborted || unclean || c->unsure || freeing || !c->closed || c->dialled || c->server < 0 ||
        servers[c->server].drained || k_late) {
        return;
    }
    if (c->saw_end && c->delivered != c->written) {
        k_violation("%d: of %llu bytes that were written %llu came, and an end", number_of(c),
                    (unsigned long long)c->written, (unsigned long long)c->delivered);
    }
}

static void peer_close(connection *c, bool reset)
{
    TRACE("%d: the peer closes%s\n", number_of(c), reset ? " with a reset" : "");
    while (!reset && peer_receive(c, SIZE_MAX)) {
    }
    if (!reset) {
        check_delivered(c);
    }
    c->peer->abrupt = reset;
    k_release(c->peer);
    c->peer = NULL;
    c->peer_gone = true;
    happened();
}

static void peer_acts(void)
{
    connection *c = &connections[draw(CONNECTIONS)];
    unsigned what = draw(16);
    for (int i = 0; i < CONNECTIONS && c->peer == NULL; i++) {
        c = &connections[(number_of(c) + 1) % CONNECTIONS];
    }
    if (c->peer == NULL) {
        return;
    }
    happened();
    if (what < 8) {
        peer_send(c, PICK(chunks));
    } else if (what < 12) {
        peer_receive(c, PICK(chunks));
    } else if (what < 14) {
        peer_shutdown(c);
    } else {
        peer_close(c, what == 15);
    }
}

/* The n-th listener; NULL = there are none. */
static k_file *pick_listener(unsigned n)
{
    int count = 0;
    for (k_file *file = k.files; file != NULL; file = file->next) {
        count += file->kind == K_SOCKET && file->state == K_LISTENING;
    }
    for (k_file *file = k.files; file != NULL; file = file->next) {
        if (file->kind == K_SOCKET && file->state == K_LISTENING && (int)n % count-- == 0) {
            return file;
        }
    }
    return NULL;
}

static void peer_connects(void)
{
    static const size_t capacities[] = {65536, 65536, 5000, 600, 100};
    k_file *listener = pick_listener(draw(8)), *client;
    k_address from;
    connection *c;
    memset(&from, 0, sizeof from);
    from.four.sin_family = AF_INET;
    from.four.sin_addr.s_addr = htonl(0x0A000001u + draw(3));
    from.four.sin_port = htons(1000);
    if (listener == NULL) {
        return;
    }
    client = k_client(listener, listener->domain == AF_INET ? &from : NULL);
    if (client == NULL) {
        return;
    }
    happened();
    c = find_connection(client->peer->number);
    if (c == NULL) {
        client->abrupt = true;
        k_release(client);
        return;
    }
    client->capacity = PICK(capacities);
    c->peer = client;
    TRACE("%d: a peer connects\n", number_of(c));
}

/* ---- ends ---------------------------------------------------------------------------------*/

static bool is_usable(const connection *c)
{
    return c->used && c->entered && !c->closed;
}

static void end_ops(connection *c)
{
    bool first = !c->ending && tsrv_error(c->stream) == TSRV_OK;
    for (op *o = ops; o != NULL; o = o->next) {
        if (o->on == c && (o->kind <= FLUSH || (o->kind == WAIT && first))) {
            o->must_end = true;
        }
    }
    c->ending = true;
}

static void end_stream(connection *c, bool abort)
{
    TRACE("%d: %s\n", number_of(c), abort ? "abort" : "close");
    end_ops(c);
    c->aborted = c->aborted || abort;
    if ((abort ? tsrv_abort(c->stream) : tsrv_close(c->stream)) != TSRV_OK) {
        k_violation("%d: an end fails", number_of(c));
    }
}

static void wake(connection *c)
{
    for (op *o = ops; o != NULL; o = o->next) {
        if (o->on == c && o->kind == WAIT) {
            o->must_end = true;
        }
    }
    tsrv_wake(c->stream);
}

/* ---- servers ------------------------------------------------------------------------------*/

static int call_handler(tsrv_stream *stream, const tsrv_address *address, void *context);
static void call_on_close(tsrv_stream *stream, int reason, void *context);

static void call_on_start(tsrv_server *server, void *context)
{
    server_slot *slot = (server_slot *)context;
    if (inside || server != slot->server) {
        k_violation("on_start is called, but should not be");
    }
    slot->started++;
}

static int call_on_accept(tsrv_server *server, const tsrv_address *address, void *context)
{
    if (inside || address == NULL || server != ((server_slot *)context)->server) {
        k_violation("on_accept is called, but should not be");
    }
    return draw(8) == 7 ? -EPERM : TSRV_OK;
}

static void listen_somewhere(server_slot *slot)
{
    static const char *const addresses[] = {"127.0.0.1", "127.0.0.1", "localhost", "::1", "unix:/sim", "unix:@sim", ""};
    unsigned which = draw(7);
    int rc;
    if (robbed && !SIM_DISOWNS) {
        return;
    }
    rc = tsrv_server_listen(slot->server, 0, addresses[which], NULL);
    TRACE("listen on %s = %d\n", addresses[which], rc);
    if (rc != TSRV_OK && !unclean && rc != -EADDRINUSE && rc != -EMFILE && !robbed) {
        k_violation("tsrv_server_listen returns %d (%s)", rc, tsrv_strerror(rc));
    }
}

static void begin_drain(server_slot *slot, int grace_ms)
{
    uint64_t forced = grace_ms < 0 ? 0 : after_ms(grace_ms == 0 ? 30000 : grace_ms);
    if (forced != 0 && (slot->forced == 0 || forced < slot->forced)) {
        slot->forced = forced;
    }
    slot->drained = true;
    slot->early = slot->early || slot->started == 0;
}

static void free_server(server_slot *slot)
{
    TRACE("free a server\n");
    for (int i = 0; i < CONNECTIONS; i++) {
        if (connections[i].used && connections[i].server == (int)(slot - servers)) {
            connections[i].ending = connections[i].aborted = true;
        }
    }
    tsrv_server *server = slot->server;
    slot->server = NULL;
    tsrv_server_free(server);
}

/* One thing that is done to a server, from anywhere. */
static void operate_server(void)
{
    static const int graces_ms[] = {0, 10, 300, 2000};
    server_slot *slot = &servers[draw(SERVERS)];
    unsigned what = draw(16);
    int grace_ms;
    if (slot->server == NULL || freeing) {
        return;
    }
    if (what < 8) {
        listen_somewhere(slot);
    } else if (what < 11) {
        TRACE("stop\n");
        slot->early = slot->early || slot->started == 0;
        tsrv_server_stop(slot->server);
    } else if (what < 14) {
        grace_ms = PICK(graces_ms);
        TRACE("drain(%d)\n", grace_ms);
        begin_drain(slot, grace_ms);
        tsrv_server_drain(slot->server, grace_ms); /* which waits, in a coroutine */
    } else if (what == 14 && draw(4) == 0) {
        free_server(slot);
    }
}

/* Somebody closes a listener's descriptor. */
static void rob(void)
{
    k_file *file = pick_listener(draw(8));
    for (int i = 0; i < ACTORS && !SIM_DISOWNS; i++) {
        file = actors[i].used && actors[i].kind == DIALLER && !actors[i].over ? NULL : file;
    }
    for (int fd = 3; fd < K_FDS && file != NULL; fd++) {
        if (k.slots[fd].file == file) {
            TRACE("somebody closes %d, which listens\n", fd);
            robbed = k_lax = true;
            k_close(fd);
            return;
        }
    }
}

/* ---- what runs beside the handlers --------------------------------------------------------*/

static void operate(bool in_coroutine);

static void run_actor(void *context)
{
    actor *a = (actor *)context;
    if (inside || a->over || !a->used) {
        k_violation("a callback is called, but should not be");
    }
    if (a->kind == TIMER && k_now < a->due) {
        k_violation("a timer fires %llu ns early", (unsigned long long)(a->due - k_now));
    }
    if (a->kind == POST && a->order != posts_run++) {
        k_violation("posts run in another order");
    }
    happened();
    a->over = true;
    for (unsigned i = draw(3); i > 0 && !freeing; i--) {
        operate(false);
    }
}

/* A coroutine that does some of what waits. */
static void run_coroutine(void *context)
{
    static const int times_ms[] = {0, 1, 20, 500, 5000, TSRV_NEVER};
    static const op_kind kinds[] = {SLEEP, WAIT_FD, CONDITION, CONDITION, SLEEP};
    actor *a = (actor *)context;
    happened();
    for (unsigned i = 1 + draw(4); i > 0 && !freeing; i--) {
        op o;
        memset(&o, 0, sizeof o);
        if (draw(4) == 3) {
            operate(true);
            continue;
        }
        o.kind = PICK(kinds);
        o.timeout_ms = PICK(times_ms);
        if (o.kind == SLEEP && o.timeout_ms < 0) {
            o.timeout_ms = 3;
        }
        int rc = make_op(&o, true);
        woken += rc == TSRV_OK && o.kind == CONDITION;
        if (rc != TSRV_OK && rc != TSRV_ETIMEOUT && !(rc == TSRV_ECLOSED && freeing) && !unclean &&
            !(rc == TSRV_EBUSY && o.kind == WAIT_FD)) {
            k_violation("%s returns %d", op_names[o.kind], rc);
        }
        if (woken > notified) {
            k_violation("more coroutines are woken than were notified");
        }
        if (rc == TSRV_OK && o.kind == WAIT_FD) {
            char buffer[64];
            pipe_bytes = 0;
            k_read(pipe_fds[0], buffer, sizeof buffer);
        }
        if (rc == TSRV_ECLOSED) {
            break;
        }
    }
    a->over = true;
}

/* A client of our own: it connects, writes, reads, and gives the stream back. */
static void run_dialler(void *context)
{
    static const char *const hosts[] = {"127.0.0.1", "two",       "lost", "unix:/sim",
                                        "unix:@sim", "::1", "192.0.2.1", "10.0.0.1"};
    static const int times_ms[] = {0, 50, 400, 3000};
    actor *a = (actor *)context;
    tsrv_connect_options options = {0};
    tsrv_stream *stream;
    connection *c = NULL;
    tsrv_slice slice;
    k_file *listener = pick_listener(draw(8));
    unsigned host = draw(8), bytes = draw(200);
    int port = listener == NULL || !k_is_tcp(listener) ? 9 : ntohs(*k_port_of(&listener->local)), rc, fd;
    op o;
    memset(&o, 0, sizeof o);
    o.kind = CONNECT;
    options.timeout_ms = PICK(times_ms);
    o.timeout_ms = options.timeout_ms == 0 ? 10000 : options.timeout_ms;
    begin_op(&o);
    rc = tsrv_connect(hosts[host], port, &options, &stream);
    end_op(&o);
    TRACE("connect to %s %d = %d\n", hosts[host], port, rc);
    happened();
    if (rc != TSRV_OK) {
        bool known = rc == TSRV_ETIMEOUT || (rc == TSRV_ECLOSED && freeing) || rc == -ECONNREFUSED ||
                     rc == -EHOSTUNREACH || rc == -ENOENT || rc == -EMFILE || rc == -ECONNRESET || rc == -EPIPE ||
                     unclean ||
                     (rc == TSRV_EBUSY && robbed && !SIM_DISOWNS);
        if (!known || stream != NULL || (rc == TSRV_ETIMEOUT && k_now < o.due)) {
            k_violation("tsrv_connect returns %d (%s) after %llu ms", rc, tsrv_strerror(rc),
                        (unsigned long long)((k_now - o.begin) / K_MS));
        }
        a->over = true;
        return;
    }
    fd = tsrv_fd(stream);
    if (fd >= 0 && k.slots[fd].file->peer != NULL) {
        c = find_connection(k.slots[fd].file->peer->number);
    }
    if (c != NULL) {
        c->dialled = true;
    }
    rc = tsrv_write(stream, input_from(0), bytes);
    tsrv_shutdown(stream);
    while (rc == TSRV_OK && !freeing) {
        rc = tsrv_read_some(stream, 0, &slice);
        happened();
        if (rc == TSRV_OK && c != NULL) {
            if (memcmp(slice.data, output_from(c->delivered), slice.size) != 0) {
                k_violation("a client receives what was not written");
            }
            c->delivered += slice.size;
        }
    }
    tsrv_close(stream);
    a->over = true;
}

static void new_actor(int kind)
{
    static const int times_ms[] = {0, 1, 5, 60, 1000, 20000};
    for (int i = 0; i < ACTORS; i++) {
        actor *a = &actors[i];
        int rc = TSRV_OK, delay_ms;
        if (a->used && !(a->over && a->kind != POST)) {
            continue;
        }
        memset(a, 0, sizeof *a);
        a->used = true;
        a->kind = kind == TIMER ? TIMER : kind == POST ? POST : kind == SPAWN ? SPAWN : DIALLER;
        if (kind == TIMER) {
            delay_ms = PICK(times_ms);
            a->due = after_ms(delay_ms);
            rc = tsrv_timer_start(loop, &a->timer, delay_ms, run_actor, a);
        } else if (kind == POST) {
            a->order = post_order;
            rc = tsrv_loop_post(loop, run_actor, a);
            post_order += rc == TSRV_OK;
        } else {
            rc = tsrv_spawn(loop, kind == SPAWN ? run_coroutine : run_dialler, a);
        }
        if (rc != TSRV_OK) {
            if (!unclean) {
                k_violation("a timer, a post or a coroutine cannot be made: %d", rc);
            }
            a->used = false;
        }
        return;
    }
}

static void watch_signal(void *context)
{
    (void)context;
    if (inside) {
        k_violation("a signal's callback is called from inside a call");
    }
    happened();
    signal_due = false;
}

static void toggle_signal(void)
{
    if (signal_watch.signo == 0) {
        int rc = tsrv_signal_start(loop, &signal_watch, SIGNAL, watch_signal, NULL);
        if (rc != TSRV_OK && !unclean) {
            k_violation("tsrv_signal_start returns %d", rc);
        }
    } else {
        tsrv_signal_stop(&signal_watch);
        signal_due = false;
    }
}

static void notify(void)
{
    unsigned count = draw(3);
    for (op *o = ops; o != NULL; o = o->next) {
        notified += o->kind == CONDITION && o->active;
    }
    tsrv_condition_notify(&condition, count == 2 ? SIZE_MAX : count + 1);
}

/* One thing that a program does, from anywhere. */
static void operate(bool in_coroutine)
{
    unsigned what = draw(16);
    connection *c = &connections[draw(CONNECTIONS)];
    (void)in_coroutine;
    switch (what) {
    case 0:
    case 1:
        new_actor(TIMER);
        break;
    case 2:
        new_actor(POST);
        break;
    case 3:
    case 4:
        new_actor(SPAWN);
        break;
    case 5:
        if (!robbed || SIM_DISOWNS) {
            new_actor(DIALLER);
        }
        break;
    case 6:
        notify();
        break;
    case 7:
        if (pipe_bytes < 1000) {
            pipe_bytes += (int)k_write(pipe_fds[1], "x", 1);
        }
        break;
    case 8:
        toggle_signal();
        break;
    case 9:
        operate_server();
        break;
    case 10:
    case 11:
        if (is_usable(c)) {
            wake(c);
        }
        break;
    case 12:
        if (is_usable(c)) {
            end_stream(c, draw(2) == 1);
        }
        break;
    case 13: {
        actor *a = &actors[draw(ACTORS)];
        if (a->used && a->kind == TIMER && !a->over) {
            tsrv_timer_stop(&a->timer);
            a->over = true;
        }
        break;
    }
    default:
        peer_acts();
    }
}

/* ---- handlers -----------------------------------------------------------------------------*/

/* The next call of a handler. */
static void choose_op(connection *c)
{
    static const op_kind kinds[] = {READ_SOME,  READ_LINE, READ_LINE, READ_BYTES, READ_INTO, READ_MATCH,
                                    READ_CLOSE, WRITE,     WRITE,     WRITE,      WRITEV,    PRINTF,
                                    TRY_WRITE,  SENDFILE,  FLUSH,     WAIT};
    static const size_t read_sizes[] = {1, 4, 30, 300, 2000, 4096};
    static const size_t write_sizes[] = {1, 10, 300, 3000, 9000, 50000};
    static const int waits_ms[] = {0, 1, 20, 500, 4000, TSRV_NEVER};
    op *o = &c->pending;
    memset(o, 0, sizeof *o);
    o->on = c;
    o->kind = script_is_over() ? READ_SOME : PICK(kinds);
    if (is_read(o->kind)) {
        o->size = script_is_over() ? 1 : PICK(read_sizes);
    } else if (is_write(o->kind)) {
        o->size = PICK(write_sizes);
        o->size = o->kind == PRINTF && o->size > 3000 ? 3000 : o->size;
        if (o->kind == SENDFILE && o->size > PERIOD) {
            o->size = PERIOD;
        }
    }
    o->timeout_ms = o->kind == WAIT ? PICK(waits_ms) : TSRV_NEVER;
}

/* Between two calls. false = the handler returns. */
static bool do_between(connection *c)
{
    static const int reads_ms[] = {0, 5, 100, 3000};
    switch (draw(24)) {
    case 1:
        c->read_ms = PICK(reads_ms);
        tsrv_set_timeout(c->stream, c->read_ms, 0);
        return true;
    case 2:
        if (!c->shut) {
            c->shut = true;
            tsrv_shutdown(c->stream);
        }
        return true;
    case 3:
        end_stream(c, draw(4) == 3);
        return true;
    case 4:
        return draw(2) == 0;
    case 5:
    case 6:
        operate(false);
        return !freeing;
    default:
        return true;
    }
}

static int run_handler(connection *c, bool can_wait)
{
    for (int i = 0; i < 12; i++) {
        int rc;
        if (!c->pending.active) {
            if (!script_is_over() && !do_between(c)) {
                return draw(3) == 1 ? 5 : TSRV_OK;
            }
            choose_op(c);
        }
        rc = make_op(&c->pending, can_wait);
        if (rc == TSRV_EAGAIN) {
            return rc;
        }
        if (rc == TSRV_EOF || (rc < 0 && (script_is_over() || draw(4) != 1)) || is_forced(c)) {
            return rc; /* nobody would wake it any more */
        }
        if (can_wait) {
            i = 0;
        }
    }
    wake(c); /* so that it is called again, whatever comes */
    memset(&c->pending, 0, sizeof c->pending);
    c->pending.on = c;
    c->pending.kind = WAIT;
    c->pending.timeout_ms = 1;
    return make_op(&c->pending, can_wait) == TSRV_EAGAIN ? TSRV_EAGAIN : run_handler(c, can_wait);
}

static int call_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    connection **known = (connection **)tsrv_data(stream), *c = *known;
    server_slot *slot = (server_slot *)context;
    int fd = tsrv_fd(stream), rc;
    if (c == NULL) {
        c = find_connection(fd < 0 ? ++k.numbers : k.slots[fd].file->number);
        if (c == NULL) {
            return TSRV_OK; /* more of them than are looked at */
        }
        if (c->entered) {
            k_violation("%d: two streams have one connection", number_of(c));
        }
        *known = c;
        c->stream = stream;
        c->server = (int)(slot - servers);
        c->dialled = c->dialled || c->peer == NULL;
        TRACE("%d: the handler is entered\n", number_of(c));
    }
    if (inside || c->running || c->over || c->stream != stream || address == NULL ||
        (slot->started == 0 && !(SIM_OLD && slot->early))) {
        k_violation("%d: a handler is called, but should not be", number_of(c));
    }
    if (!c->entered) {
        happened();
    }
    c->entered = c->running = true;
    rc = run_handler(c, slot->options.mode == TSRV_COROUTINE);
    c->running = false;
    TRACE("%d: the handler returns %d\n", number_of(c), rc);
    c->returned = rc;
    if (rc != TSRV_EAGAIN) {
        c->over = true;
        end_ops(c);
    }
    return rc;
}

static void call_on_close(tsrv_stream *stream, int reason, void *context)
{
    connection *c = *(connection **)tsrv_data(stream);
    int error = tsrv_error(stream);
    (void)context;
    if (c == NULL) {
        return;
    }
    TRACE("%d: on_close(%d)\n", number_of(c), reason);
    if (inside || !c->entered || c->closed || tsrv_fd(stream) != -1 || (c->running && !freeing && !is_forced(c))) {
        k_violation("%d: on_close is called, but should not be", number_of(c));
    }
    if (reason != (error != TSRV_OK ? error : c->over ? c->returned : reason)) {
        k_violation("%d: on_close is told %d, not %d", number_of(c), reason, error != TSRV_OK ? error : c->returned);
    }
    for (op *o = ops, *next; o != NULL; o = next) {
        next = o->next;
        if (o->on == c) {
            if (o != &c->pending && !freeing) {
                k_violation("%d: on_close comes while %s waits", number_of(c), op_names[o->kind]);
            }
            end_op(o);
        }
    }
    happened();
    c->closed = c->over = c->ending = true;
    c->unsure = c->unsure || error != TSRV_OK;
}

/* ---- the main program ---------------------------------------------------------------------*/

/* Returns whether anything can still happen. */
static bool turn(int timeout_ms)
{
    int rc;
    inside = false;
    turn_calls = 0;
    rc = tsrv_loop_run_once(loop, timeout_ms);
    if (rc < 0 && !unclean) {
        k_violation("a turn fails: %d", rc);
    }
    in_vain = rc < 0 ? 0 : in_vain; /* whoever runs the loop learns it */
    if (k_for_ever && timeout_ms >= 0) {
        k_violation("the loop waits for ever");
    }
    return rc != 0;
}

static void toggle_sticky(void)
{
    static const struct {
        const char *name;
        int code;
    } choices[] = {{"accept4", EPERM},  {"accept4", EMFILE}, {"accept4", ENOMEM}, {"accept4", ECONNABORTED},
                   {"accept4", ENOSYS}, {"accept", EPERM},   {"epoll_ctl", ENOSPC}, {"kevent_set", ENOMEM},
                   {"malloc", ENOMEM},  {"socket", EMFILE},  {"send", ENOBUFS},   {"setsockopt", ENOBUFS}};
    unsigned which = draw(24);
    sticky_name = NULL;
    if (which < 12 && fatal_faults) {
        sticky_name = choices[which].name;
        sticky_code = choices[which].code;
        TRACE("from now on %s fails with %d\n", sticky_name, sticky_code);
    }
}

static void step(void)
{
    static const int waits_ms[] = {0, 0, 1, 10, 100, 3000};
    unsigned what = draw(32);
    if (what < 10) {
        happened();
        turn(PICK(waits_ms));
    } else if (what == 10) { /* until it waits, which it has to do */
        happened();
        for (k_wait_ms = 0; k_wait_ms == 0 && turn(3000);) {
        }
    } else if (what < 19) {
        peer_acts();
    } else if (what < 23) {
        peer_connects();
    } else if (what < 28) {
        operate(false);
    } else if (what == 28) {
        operate_server();
    } else if (what == 29) {
        toggle_sticky();
    } else if (what == 30) {
        if (k_raise(SIGNAL)) {
            signal_due = signal_watch.signo != 0;
        }
    } else if (draw(4) == 3 && fatal_faults) {
        rob();
    } else {
        k.limit = draw(3) == 0 ? k_open_count() + 3 + (int)draw(4) : K_FDS;
        TRACE("descriptors: %d\n", k.limit);
    }
}

/* ---- the end ------------------------------------------------------------------------------*/

/* Turn until nothing happens any more. */
static void come_to_rest(void)
{
    int quiet = 0;
    uint64_t end = k_now + 400000 * K_MS; /* who listens on what somebody has closed looks again for ever */
    for (int count = 0; quiet < 2 && !(robbed && k_now > end); count++) {
        bool took = false;
        if (count > 20000) {
            k_violation("the loop does not come to rest");
        }
        k_deliver();
        for (int i = 0; i < CONNECTIONS; i++) {
            while (connections[i].peer != NULL && peer_receive(&connections[i], SIZE_MAX)) {
                took = true;
            }
        }
        k_wait_ms = 0;
        if (!turn(took ? 0 : 100000)) {
            quiet++;
        } else {
            quiet = k_wait_ms == 100000 && !took ? quiet + 1 : 0;
        }
        if (k_wait_ms > 0) {
            happened();
        }
    }
}

/* Faults have stopped: what waits in a listener is accepted. */
static void check_accepted(void)
{
    for (k_file *file = k.files; file != NULL; file = file->next) {
        if (file->kind == K_SOCKET && file->state == K_LISTENING && file->waiting_count != 0) {
            bool full = false;
            for (int i = 0; i < SERVERS; i++) {
                full = full || (servers[i].server != NULL && servers[i].options.max_connections > 0);
            }
            if (!full) {
                k_violation("a listener is deaf: %d connections wait", file->waiting_count);
            }
        }
    }
}

static void check_waits(void)
{
    for (int i = 0; i < CONNECTIONS; i++) { /* its time to write and to linger is over */
        const connection *c = &connections[i];
        if (c->used && c->entered && c->over && !c->closed && !robbed) {
            k_violation("%d: the handler has returned, and on_close does not come", i);
        }
    }
    for (op *o = ops; o != NULL; o = o->next) {
        size_t size;
        bool ended;
        if (o->on == NULL || o->on->dialled || unclean) {
            continue;
        }
        ended = o->on->peer_fin || o->on->peer_gone;
        if (is_read(o->kind) && (ended || predict(o, ended, &size) != TSRV_EAGAIN)) {
            k_violation("%d: %s still waits", number_of(o->on), op_names[o->kind]);
        }
        if (is_write(o->kind) || o->kind == FLUSH) {
            k_violation("%d: %s still waits", number_of(o->on), op_names[o->kind]);
        }
    }
}

static void wake_everybody(void)
{
    for (int i = 0; i < CONNECTIONS; i++) {
        if (is_usable(&connections[i])) {
            wake(&connections[i]);
        }
    }
    for (op *o = ops; o != NULL; o = o->next) {
        notified += o->kind == CONDITION;
    }
    tsrv_condition_notify(&condition, SIZE_MAX);
    if (pipe_bytes == 0) {
        pipe_bytes = (int)k_write(pipe_fds[1], "x", 1);
    }
}

static void check_ends(void)
{
    for (int i = 0; i < CONNECTIONS; i++) {
        const connection *c = &connections[i];
        if (c->used && c->entered && !c->closed) {
            TRACE("%d: descriptor %d, %zu unsent, %zu unread, %llu of %llu delivered\n", i, tsrv_fd(c->stream),
                  tsrv_unsent_size(c->stream), tsrv_unread_size(c->stream), (unsigned long long)c->delivered,
                  (unsigned long long)c->written);
            k_violation("%d: on_close does not come", i);
        }
    }
    for (int i = 0; i < ACTORS; i++) {
        if (actors[i].used && !actors[i].over) {
            k_violation("an actor of kind %d has not come to its end", actors[i].kind);
        }
    }
}

static void check_stats(void)
{
    for (int i = 0; i < SERVERS; i++) {
        tsrv_stats stats;
        if (servers[i].server != NULL) {
            tsrv_server_stats(servers[i].server, &stats);
            if (stats.open != 0 || stats.accepted != stats.closed) {
                k_violation("the counters are wrong: %llu accepted, %llu open, %llu closed",
                            (unsigned long long)stats.accepted, (unsigned long long)stats.open,
                            (unsigned long long)stats.closed);
            }
        }
    }
}

static void stop_faults(void)
{
    gentle_faults = fatal_faults = memory_faults = false;
    sticky_name = NULL;
    script_at = script_size;
    k.limit = K_FDS;
}

static void free_all(void)
{
    freeing = true;
    for (int i = 0; i < CONNECTIONS; i++) {
        connections[i].ending = connections[i].aborted = true;
    }
    if (signal_watch.signo != 0) {
        tsrv_signal_stop(&signal_watch);
    }
    for (int i = 0; i < ACTORS; i++) {
        if (actors[i].used && actors[i].kind == TIMER) {
            tsrv_timer_stop(&actors[i].timer);
        }
    }
    signal_due = false;
    for (int i = 0; i < SERVERS; i++) {
        if (servers[i].server != NULL) {
            tsrv_server *server = servers[i].server;
            servers[i].server = NULL;
            tsrv_server_free(server);
        }
    }
    if (tsrv_loop_free(loop) != TSRV_OK) {
        k_violation("tsrv_loop_free fails");
    }
    loop = NULL;
}

static void check_nothing_is_left(void)
{
    for (int i = 0; i < CONNECTIONS; i++) {
        connection *c = &connections[i];
        if (c->used && c->entered && !c->closed) {
            k_violation("%d: on_close has not been called", i);
        }
        if (c->peer != NULL) {
            peer_close(c, true);
        }
    }
    k_close(pipe_fds[0]);
    k_close(pipe_fds[1]);
    k_close(output_file);
    k_deliver();
    if (s_live != 0) {
        k_violation("%ld allocations are left", s_live);
    }
    if (k_open_count() != 3) {
        k_violation("%d descriptors are left", k_open_count() - 3);
    }
    for (int signo = 1; signo <= 64; signo++) {
        if (k.actions[signo].sa_handler != SIG_DFL && !unclean) {
            k_violation("a handler of signal %d is left", signo);
        }
    }
    if (k.sigpipe_blocked || k.sigpipe_pending) {
        k_violation("SIGPIPE is left blocked, or pending");
    }
}

static void finish(unsigned how)
{
    TRACE("the script is over\n");
    stop_faults();
    if (how % 8 != 7) {
        happened();
        come_to_rest();
        check_accepted();
        check_waits();
        for (int i = 0; i < CONNECTIONS; i++) {
            if (connections[i].peer != NULL && how % 4 != 0) {
                peer_close(&connections[i], how % 4 == 1);
            } else if (connections[i].peer != NULL) {
                peer_shutdown(&connections[i]);
            }
        }
        for (int i = 0; i < 5; i++) {
            come_to_rest();
            wake_everybody();
        }
        come_to_rest();
        check_ends();
        check_stats();
    }
    free_all();
    check_nothing_is_left();
}

/* ---- one run ------------------------------------------------------------------------------*/

static void draw_options(server_slot *slot)
{
    static const size_t buffers[] = {0, 0, 64, 500, 5000}, receives[] = {0, 0, 16, 1000};
    static const size_t marks[] = {0, 0, 1, 1000}, queues[] = {0, 0, 0, 100000, 3000};
    static const int reads_ms[] = {0, 0, 0, 30, 3000}, idles_ms[] = {0, 0, 0, 50, 4000};
    static const int writes_ms[] = {0, 0, 500}, closes_ms[] = {0, 0, 300};
    static const int limits[] = {0, 0, 0, 1, 3};
    tsrv_server_options *options = &slot->options;
    memset(options, 0, sizeof *options);
    options->mode = draw(2) == 0 ? TSRV_CALLBACK : TSRV_COROUTINE;
    options->handle_stream = call_handler;
    options->on_close = call_on_close;
    options->on_start = call_on_start;
#if !SIM_OLD
    options->on_accept = draw(4) == 3 ? call_on_accept : NULL;
#endif
    options->context = slot;
    options->loop = loop;
    options->data_size = sizeof(connection *);
    options->max_buffer_size = PICK(buffers);
    options->read_chunk_size = PICK(receives);
    options->write_high_water = PICK(marks);
    options->max_write_buffer_size = PICK(queues);
    options->read_timeout_ms = PICK(reads_ms);
    options->idle_timeout_ms = PICK(idles_ms);
    options->write_timeout_ms = PICK(writes_ms);
    options->close_timeout_ms = PICK(closes_ms);
    options->max_connections = PICK(limits);
#if !SIM_OLD
    options->max_per_address = PICK(limits);
#endif
}

static void forget_log(int level, const char *message, void *context)
{
    (void)level;
    (void)context;
    TRACE("log: %s\n", message);
}

#if !SIM_OLD
static __typeof__(tsrvi_process) first_process; /* so that a run does not know what the ones before have learnt */
#endif

static void reset(void)
{
    k_boot();
#if !SIM_OLD
    tsrvi_process = first_process;
#endif
    memset(connections, 0, sizeof connections);
    memset(actors, 0, sizeof actors);
    memset(servers, 0, sizeof servers);
    memset(&condition, 0, sizeof condition);
    memset(&signal_watch, 0, sizeof signal_watch);
    ops = NULL;
    unclean = freeing = inside = robbed = signal_due = false;
    gentle_faults = fatal_faults = memory_faults = false;
    sticky_name = NULL;
    notified = woken = 0;
    pipe_bytes = in_vain = signal_late = post_order = posts_run = 0;
    fault_after = 0;
    turn_calls = 0;
    s_live = s_live_bytes = 0;
    k_now = 1000000 * K_MS;
}

static void begin(unsigned how, unsigned more)
{
    static const int backends[] = {TSRV_BACKEND_EPOLL, TSRV_BACKEND_POLL, TSRV_BACKEND_KQUEUE, TSRV_BACKEND_BEST};
    tsrv_loop_options options = {0};
    options.backend = backends[how % 4];
    tsrv_set_log((more & 6) == 6 ? NULL : forget_log, NULL);
    if ((more & 1) != 0) {
        k_now = ((uint64_t)1 << 32) * K_MS - 40 * K_MS; /* milliseconds in 32 bits wrap soon */
    }
    k_late = (how & 0x0c) == 0x0c;
    k_choose = draw;
    k_waits = wait_begins;
    s_plan = s_plan == NULL ? plan : s_plan;
    s_moves = happened;
    s_calls = every_call;
    k_pipe(pipe_fds);
    k_fcntl(pipe_fds[0], F_SETFL, O_NONBLOCK);
    output_file = k_memfd_create("output", 0);
    k_write(output_file, output_bytes, sizeof output_bytes);
    if (tsrv_loop_new(&loop, &options) != TSRV_OK && !unclean) {
        k_violation("no loop");
    }
    for (int i = 0; i < SERVERS && loop != NULL; i++) {
        draw_options(&servers[i]);
        if (tsrv_server_new(&servers[i].server, &servers[i].options) != TSRV_OK) {
            if (!unclean || servers[i].server != NULL) {
                k_violation("no server");
            }
            continue;
        }
        listen_somewhere(&servers[i]);
    }
    gentle_faults = (how & 0x10) != 0;
    fatal_faults = (how & 0x30) == 0x30;
    memory_faults = (how & 0xf0) == 0xf0;
}

static void d_run(const uint8_t *data, size_t size)
{
    static bool ready;
    unsigned how, more, end;
    if (!ready) {
        ready = true;
        tracing = getenv("SIM_TRACE") != NULL;
        make_bytes();
        tsrv_set_log(forget_log, NULL);
#if !SIM_OLD
        first_process = tsrvi_process;
#endif
    }
    script_begin(data, size);
    reset();
    how = draw(256);
    more = draw(256);
    end = draw(256);
    begin(how, more);
    if (loop == NULL) { /* there was no memory, or so */
        check_nothing_is_left();
        return;
    }
    while (!script_is_over()) {
        step();
    }
    finish(end);
}

#ifndef SIM_NO_MAIN
#include "driver.h"
#endif
