/* libuv: one buffer to read into for all, uv_try_write first, uv_write for what the kernel does not take.
 *   uv_echo <port> */
#include "lines.h"

#include <signal.h>
#include <uv.h>

typedef struct connection {
    uv_tcp_t tcp; /* first: a handle is its connection */
    rest in;
} connection;

typedef struct unsent {
    uv_write_t request;
    char data[];
} unsent;

static char buffer[64 << 10];

static void on_read(uv_stream_t *stream, ssize_t size, const uv_buf_t *data);

static void on_alloc(uv_handle_t *handle, size_t size, uv_buf_t *b)
{
    (void)handle;
    (void)size;
    *b = uv_buf_init(buffer, sizeof buffer);
}

static void on_close(uv_handle_t *handle)
{
    lines_release(&((connection *)handle)->in);
    free(handle);
}

static void end(uv_stream_t *stream)
{
    if (!uv_is_closing((uv_handle_t *)stream)) {
        uv_close((uv_handle_t *)stream, on_close);
    }
}

static void on_written(uv_write_t *request, int status)
{
    uv_stream_t *stream = request->handle;
    free(request);
    if (status == 0 && stream->write_queue_size == 0 && !uv_is_closing((uv_handle_t *)stream)) {
        uv_read_start(stream, on_alloc, on_read);
    }
}

static bool echo(void *context, const char *data, size_t size)
{
    connection *c = context;
    uv_stream_t *stream = (uv_stream_t *)&c->tcp;
    uv_buf_t b = uv_buf_init((char *)data, (unsigned)size);
    int sent = uv_try_write(stream, &b, 1);
    if (sent < 0 && sent != UV_EAGAIN) {
        return false;
    }
    size_t left = size - (size_t)(sent < 0 ? 0 : sent);
    if (left == 0) {
        return true;
    }
    unsent *u = malloc(sizeof *u + left);
    memcpy(u->data, data + size - left, left);
    b = uv_buf_init(u->data, (unsigned)left);
    uv_read_stop(stream);
    return uv_write(&u->request, stream, &b, 1, on_written) == 0;
}

static void on_read(uv_stream_t *stream, ssize_t size, const uv_buf_t *data)
{
    connection *c = (connection *)stream;
    if (size < 0 || !lines_feed(&c->in, data->base, (size_t)size, echo, c)) {
        end(stream);
    }
}

static void on_connection(uv_stream_t *listener, int status)
{
    connection *c = status == 0 ? calloc(1, sizeof *c) : NULL;
    if (c == NULL) {
        return;
    }
    uv_tcp_init(listener->loop, &c->tcp);
    if (uv_accept(listener, (uv_stream_t *)&c->tcp) != 0) {
        end((uv_stream_t *)&c->tcp);
        return;
    }
    uv_tcp_nodelay(&c->tcp, 1);
    uv_read_start((uv_stream_t *)&c->tcp, on_alloc, on_read);
}

int main(int argc, char **argv)
{
    struct sockaddr_in address;
    uv_tcp_t listener;
    signal(SIGPIPE, SIG_IGN);
    uv_ip4_addr("127.0.0.1", argc > 1 ? atoi(argv[1]) : 8888, &address);
    uv_tcp_init(uv_default_loop(), &listener);
    uv_tcp_bind(&listener, (struct sockaddr *)&address, 0);
    if (uv_listen((uv_stream_t *)&listener, 4096, on_connection) != 0) {
        return 1;
    }
    return uv_run(uv_default_loop(), UV_RUN_DEFAULT);
}
