/* libevent: a bufferevent for each connection. Whole lines move from its input to its output without being copied, and
 * no byte is searched twice.
 *   libevent_echo <port> */
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/listener.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#define MAX_LINE ((size_t)1 << 20)

typedef struct connection {
    size_t searched; /* bytes of the input without an end of a line */
} connection;

static void on_event(struct bufferevent *b, short what, void *context)
{
    (void)what;
    free(context);
    bufferevent_free(b);
}

static size_t whole_lines(struct evbuffer *in, size_t searched)
{
    struct evbuffer_ptr at, found;
    size_t whole = 0;
    evbuffer_ptr_set(in, &at, searched, EVBUFFER_PTR_SET);
    while ((found = evbuffer_search(in, "\n", 1, &at)).pos >= 0) {
        whole = (size_t)found.pos + 1;
        at = found;
        if (evbuffer_ptr_set(in, &at, 1, EVBUFFER_PTR_ADD) != 0) {
            break;
        }
    }
    return whole;
}

static void on_read(struct bufferevent *b, void *context)
{
    connection *c = context;
    struct evbuffer *in = bufferevent_get_input(b), *out = bufferevent_get_output(b);
    size_t whole = whole_lines(in, c->searched);
    if (whole > 0) {
        evbuffer_remove_buffer(in, out, whole);
    }
    c->searched = evbuffer_get_length(in);
    if (c->searched > MAX_LINE) {
        on_event(b, BEV_EVENT_ERROR, c);
    } else if (evbuffer_get_length(out) > MAX_LINE) {
        bufferevent_disable(b, EV_READ); /* until it is sent */
    }
}

static void on_write(struct bufferevent *b, void *context)
{
    (void)context;
    bufferevent_enable(b, EV_READ);
}

static void on_connection(struct evconnlistener *l, evutil_socket_t fd, struct sockaddr *address, int size,
                          void *context)
{
    struct bufferevent *b = bufferevent_socket_new(evconnlistener_get_base(l), fd, BEV_OPT_CLOSE_ON_FREE);
    int on = 1;
    (void)address;
    (void)size;
    (void)context;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    bufferevent_setcb(b, on_read, on_write, on_event, calloc(1, sizeof(connection)));
    bufferevent_enable(b, EV_READ | EV_WRITE);
}

int main(int argc, char **argv)
{
    struct sockaddr_in address;
    struct event_base *base = event_base_new();
    signal(SIGPIPE, SIG_IGN);
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((unsigned short)(argc > 1 ? atoi(argv[1]) : 8888));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (evconnlistener_new_bind(base, on_connection, NULL, LEV_OPT_REUSEABLE | LEV_OPT_CLOSE_ON_FREE, 4096,
                                (struct sockaddr *)&address, sizeof address) == NULL) {
        return 1;
    }
    return event_base_dispatch(base);
}
