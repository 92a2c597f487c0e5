/* websocket_message.h - what comes in frames: messages, whole or in parts, pings, and the end. The
 * handler of a WebSocket; websocket.c says what is done with a message. */

typedef struct session {
    char *message; /* the parts that have come; NULL = none */
    size_t size;
    int opcode;  /* of the message that comes in parts; 0 = none does */
    bool pinged; /* nothing has come since */
} session;

/* Returns 0, or why the WebSocket is closed. The data are the program's until it returns. */
static int take_message(tsrv_stream *stream, int opcode, const char *data, size_t size);

static void drop_message(session *s)
{
    free(s->message);
    s->message = NULL;
    s->size = 0;
    s->opcode = 0;
}

/* The parts of a message are kept until all of them are there: it is either taken or not. */
static int take_part(tsrv_stream *stream, session *s, const frame *f, const char *data)
{
    int code = 0;
    if ((f->opcode == CONTINUATION) != (s->opcode != 0)) {
        return PROTOCOL_ERROR;
    } else if (f->last && s->opcode == 0) {
        return take_message(stream, f->opcode, data, f->size);
    } else if (s->message == NULL && (s->message = (char *)malloc(MAX_MESSAGE)) == NULL) {
        return SERVER_ERROR;
    } else if (f->size > MAX_MESSAGE - s->size) {
        return TOO_BIG;
    }
    memcpy(s->message + s->size, data, f->size);
    s->size += f->size;
    s->opcode = s->opcode != 0 ? s->opcode : f->opcode;
    if (f->last) {
        code = take_message(stream, s->opcode, s->message, s->size);
        drop_message(s);
    }
    return code;
}

static int take_frame(tsrv_stream *stream, session *s, const frame *f, const tsrv_slice *all)
{
    const char *data = unmask(f, all);
    s->pinged = false;
    if (f->opcode == CLOSE) {
        return close_code(data, f->size);
    } else if (f->opcode == PING) {
        send_frame(stream, PONG, data, f->size);
    }
    return f->opcode < CLOSE ? take_part(stream, s, f, data) : 0;
}

/* Who has said nothing for a while is asked, once, whether it is still there: a browser answers by
 * itself. When the connection has not gone, a WebSocket ends with a close frame, which says why. */
static int handle_frames(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    session *s = (session *)tsrv_data(stream);
    tsrv_slice all;
    frame f;
    int rc = TSRV_OK, code = 0;
    (void)address, (void)context;
    while (rc == TSRV_OK && code == 0) {
        rc = tsrv_read_until_match(stream, match_frame, &f, 0, &all);
        if (rc == TSRV_OK) {
            code = take_frame(stream, s, &f, &all);
        } else if (rc == TSRV_ETOOLONG) {
            code = f.error;
        } else if (rc == TSRV_ETIMEOUT && !s->pinged) {
            s->pinged = true;
            send_frame(stream, PING, "", 0);
            rc = TSRV_OK;
        }
        if (code == 0 && (rc == TSRV_OK || rc == TSRV_EOF) && tsrv_stopping(stream) &&
            tsrv_unread_size(stream) == 0) {
            code = GOING_AWAY;
        }
    }
    if (code != 0) {
        send_close(stream, code);
    }
    return code != 0 ? code : rc; /* a positive one is over, in good order */
}
