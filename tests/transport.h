/* For the tests that run once more over a transport of their own, which shows that the seam of >>transport is one: two
 * queues in memory, and no descriptor. At its first call a handler's stream gives up its socket to a bridge, which
 * carries bytes, ends and resets between the queues and the client, as a kernel would: a queue that is full blocks, one
 * that is not empty is told of in every turn.
 * Included by test.h when T_MEMORY is defined. */
#ifndef TRANSPORT_H
#define TRANSPORT_H

#define Q_ROOM ((size_t)65536)
#define Q_SERVERS 64 /* that one test has at a time */

typedef struct q_queue {
    char data[Q_ROOM];
    size_t begin, end;
} q_queue;

typedef struct q_bridge {
    tsrvi_session session;
    tsrv_stream *stream;
    int fd; /* the client's; -1 when the stream has closed */
    tsrv_watch watch;
    tsrv_timer level; /* tells the stream what it waits for, if that is so */
    q_queue in, out;
    size_t most; /* bytes of out */
    bool over; /* the client sends no more */
    bool shut; /* nor does the stream */
    bool told; /* and the client knows */
    int error;
} q_bridge;

static inline q_bridge *q_of(const tsrv_stream *stream)
{
    return (q_bridge *)(void *)stream->session;
}

static inline size_t q_size(const q_queue *queue)
{
    return queue->end - queue->begin;
}

static inline size_t q_room(q_queue *queue, size_t most)
{
    memmove(queue->data, queue->data + queue->begin, q_size(queue));
    queue->end -= queue->begin;
    queue->begin = 0;
    return queue->end < most ? most - queue->end : 0;
}

/* ---- what the stream waits for ------------------------------------------------------------*/

static inline int q_events(q_bridge *q)
{
    int interest = q->stream->io.interest;
    if (interest != 0 && q->error != 0) {
        return TSRV_READABLE | TSRV_WRITABLE | TSRVI_HANGUP;
    }
    return interest & ((q_size(&q->in) != 0 || q->over ? TSRV_READABLE : 0) |
                       (q_room(&q->out, q->most) != 0 ? TSRV_WRITABLE : 0));
}

static inline void q_level(void *context)
{
    q_bridge *q = (q_bridge *)context;
    tsrv_loop *loop = tsrv_stream_loop(q->stream);
    int events = q_events(q);
    if (events != 0) {
        CHECK_INT(tsrv_timer_start(loop, &q->level, 0, q_level, q), TSRV_OK); /* the event may free q */
        tsrvi_stream_event(&q->stream->io, events);
    }
}

static inline void q_arm(q_bridge *q)
{
    if (q->stream->io.interest != 0 && q_events(q) != 0) {
        CHECK_INT(tsrv_timer_start(tsrv_stream_loop(q->stream), &q->level, 0, q_level, q), TSRV_OK);
    }
}

/* ---- the bridge ---------------------------------------------------------------------------*/

static inline void q_to_client(q_bridge *q)
{
    while (q_size(&q->out) != 0 && q->error == 0) {
        ssize_t n = send(q->fd, q->out.data + q->out.begin, q_size(&q->out), T_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0) {
            q->error = errno == EAGAIN || errno == EINTR ? 0 : -errno;
            break;
        }
        q->out.begin += (size_t)n;
    }
    if (q->shut && !q->told && q_size(&q->out) == 0) {
        q->told = true;
        shutdown(q->fd, SHUT_WR);
    }
}

static inline void q_from_client(q_bridge *q)
{
    size_t room = q_room(&q->in, Q_ROOM);
    ssize_t n = room == 0 || q->over || q->error != 0 ? -2 : recv(q->fd, q->in.data + q->in.end, room, MSG_DONTWAIT);
    if (n == 0) {
        q->over = true;
    } else if (n > 0) {
        q->in.end += (size_t)n;
    } else if (n == -1 && errno != EAGAIN && errno != EINTR) {
        q->error = -errno;
    }
}

static inline void q_carry(int events, void *context);

static inline void q_watch(q_bridge *q)
{
    int events = (q_room(&q->in, Q_ROOM) != 0 && !q->over ? TSRV_READABLE : 0) | (q_size(&q->out) != 0 ? TSRV_WRITABLE : 0);
    if (events == 0 || q->error != 0) {
        tsrv_watch_stop(&q->watch);
    } else {
        CHECK_INT(tsrv_watch_start(tsrv_stream_loop(q->stream), &q->watch, q->fd, events, q_carry, q), TSRV_OK);
    }
}

static inline void q_carry(int events, void *context)
{
    q_bridge *q = (q_bridge *)context;
    (void)events;
    q_from_client(q);
    q_to_client(q);
    q_watch(q);
    q_arm(q);
}

/* ---- the transport ------------------------------------------------------------------------*/

static inline int q_send(tsrv_stream *stream, tsrvi_sending *sending)
{
    q_bridge *q = q_of(stream);
    int rc = TSRV_OK;
    while (rc == TSRV_OK && (stream->out != NULL || sending->taken < sending->size)) {
        size_t room = q_room(&q->out, q->most), size = sending->size - sending->taken;
        const char *data = sending->data + sending->taken;
        if (q->error != 0) {
            return q->error;
        }
        if (stream->out != NULL) {
            data = stream->out->data + stream->out->begin;
            size = tsrvi_buffer_size(stream->out);
        }
        size = size < room ? size : room;
        size = stream->out != NULL && stream->out->next != NULL ? size : t_clipped(size); /* as in seam.h */
        if (size != 0 && stream->out != NULL && stream->out->kind == TSRVI_FILE) {
            ssize_t got = tsrvi_output_read(stream->out, q->out.data + q->out.end, size);
            sending->gap = got < 0;
            if (got < 0) {
                return (int)got;
            }
            size = (size_t)got;
        } else {
            memcpy(q->out.data + q->out.end, data, size);
        }
        q->out.end += size;
        sending->sent += size;
        sending->taken += tsrvi_output_sent(stream, size);
        rc = size == 0 || (t_clip && room != 0) ? TSRV_EAGAIN : TSRV_OK;
        q_to_client(q);
    }
    q_watch(q);
    q_arm(q);
    return rc;
}

static inline int q_state(const q_bridge *q)
{
    return q_size(&q->in) != 0 ? TSRV_OK : q->error != 0 ? q->error : q->over ? TSRV_EOF : TSRV_EAGAIN;
}

static inline ssize_t q_recv(tsrv_stream *stream, char *into, size_t size)
{
    q_bridge *q = q_of(stream);
    size_t part = q_size(&q->in) < size ? q_size(&q->in) : size;
    if (part == 0) {
        return q_state(q);
    }
    memcpy(into, q->in.data + q->in.begin, part);
    q->in.begin += part;
    q_watch(q);
    return (ssize_t)part;
}

static inline int q_peek(tsrv_stream *stream)
{
    q_from_client(q_of(stream)); /* what has come is there, before the bridge has had its turn */
    q_watch(q_of(stream));
    return q_state(q_of(stream));
}

static inline bool q_is_delivered(const tsrv_stream *stream)
{
    int kept = -1;
    return q_size(&q_of(stream)->out) == 0 && ioctl(q_of(stream)->fd, TIOCOUTQ, &kept) == 0 && kept == 0;
}

static inline bool q_is_empty(tsrv_stream *stream)
{
    return q_size(&q_of(stream)->in) == 0;
}

static inline int q_interest(tsrv_stream *stream, int interest)
{
    stream->io.interest = (uint8_t)interest;
    q_arm(q_of(stream));
    return TSRV_OK;
}

static inline void q_shut(tsrv_stream *stream)
{
    q_of(stream)->shut = true;
    q_to_client(q_of(stream));
    q_watch(q_of(stream));
}

static inline int q_error(tsrv_stream *stream)
{
    return q_of(stream)->error;
}

/* What is queued has been taken, as if a kernel had: so it goes now. */
static inline void q_close(tsrv_stream *stream, bool reset)
{
    q_bridge *q = q_of(stream);
    struct linger now = {1, 0};
    struct pollfd client = {q->fd, POLLOUT, 0};
    tsrv_timer_stop(&q->level);
    tsrv_watch_stop(&q->watch);
    if (reset) {
        setsockopt(q->fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }
    while (!reset && q_size(&q->out) != 0 && q->error == 0 && poll(&client, 1, T_PATIENCE * 1000) > 0) {
        q_to_client(q);
    }
    stream->io.interest = 0;
    tsrvi_loop_close_fd(tsrv_stream_loop(stream), q->fd);
    q->fd = -1;
}

static inline void q_free(tsrv_stream *stream)
{
    CHECK(q_of(stream)->fd < 0);
    free(q_of(stream));
}

static const tsrvi_transport q_transport = {
    q_send,     q_recv,   q_peek, q_is_delivered, tsrvi_plain_holds, q_is_empty, NULL, tsrvi_plain_finish, tsrvi_plain_is_over,
    tsrvi_plain_drop, q_free, q_interest, q_shut, q_error, q_close,
};

/* See limit_output. Returns the socket behind the bridge. */
static inline int q_limit(tsrv_stream *stream, size_t most)
{
    q_of(stream)->most = most;
    return q_of(stream)->fd;
}

/* ---- servers ------------------------------------------------------------------------------*/

static struct {
    tsrv_server *server;
    tsrv_handler handler;
} q_servers[Q_SERVERS];
static int q_next; /* the oldest: its server is gone by the time its place is needed */

static inline int q_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    q_bridge *q = (q_bridge *)calloc(1, sizeof *q);
    int i = q_next;
    do { /* the newest of that address */
        i = (i + Q_SERVERS - 1) % Q_SERVERS;
        CHECK(q_servers[i].server != NULL);
    } while (q_servers[i].server != tsrv_stream_server(stream));
    CHECK(q != NULL && stream->in == NULL && stream->out == NULL && stream->io.interest == 0);
    tsrv_set_handler(stream, q_servers[i].handler);
    if (stream->phase == TSRVI_OPEN) {
        q->session.transport = &q_transport;
        q->stream = stream;
        q->most = Q_ROOM;
        q->fd = stream->io.fd;
        stream->io.fd = -1;
        stream->session = &q->session;
        tsrvi_set(stream, TSRVI_SESSION);
        q_watch(q);
    } else {
        free(q);
    }
    return q_servers[i].handler(stream, address, context);
}

static inline int q_server_new(tsrv_server **server, const tsrv_server_options *options)
{
    tsrv_server_options bridged;
    int rc;
    if (options == NULL || options->handle_stream == NULL) {
        return tsrv_server_new(server, options);
    }
    bridged = *options;
    bridged.handle_stream = q_handler;
    rc = tsrv_server_new(server, &bridged);
    q_servers[q_next].server = *server;
    q_servers[q_next].handler = options->handle_stream;
    q_next = (q_next + 1) % Q_SERVERS;
    return rc;
}
#define tsrv_server_new(server, options) q_server_new(server, options)

#endif
