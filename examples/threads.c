/* threads.c - four threads, each with a loop, a server and a listener of its own on the same port.
 *   cc -o threads examples/threads.c -lpthread
 *   ./threads [port]                  then: nc 127.0.0.1 8888; Ctrl-C ends it
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

enum { THREADS = 4 };
static struct worker {
    int fd; /* its listening socket */
    pthread_t thread;
    tsrv_loop *loop;
    tsrv_server *server;
} workers[THREADS];

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc = tsrv_printf(stream, "thread %d\n", (int)((struct worker *)context - workers));
    (void)address;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK &&
           (rc = tsrv_write(stream, line.data, line.size)) == TSRV_OK) {
    }
    return rc;
}

/* What is done with a loop and its server is done in their thread; only posting is not. */
static void *run(void *context)
{
    struct worker *w = (struct worker *)context;
    tsrv_server_options options = {0};
    options.handle_stream = handle_stream;
    options.context = w;
    options.loop = w->loop;
    options.idle_timeout_ms = 300000;
    if (tsrv_server_new(&w->server, &options) != TSRV_OK ||
        tsrv_server_add_sockets(w->server, &w->fd, 1) != TSRV_OK ||
        tsrv_loop_run(w->loop) != TSRV_OK) {
        fprintf(stderr, "threads: thread %d cannot serve\n", (int)(w - workers));
        exit(1);
    }
    tsrv_server_free(w->server);
    return NULL;
}

/* Posted to each thread. When its last client is served its loop has nothing left, and ends. */
static void drain(void *context)
{
    tsrv_server_drain(((struct worker *)context)->server, 5000);
}

/* The kernel spreads the connections over the listeners. Returns the port: for 0 any free one. */
static int start(struct worker *w, int port)
{
    tsrv_bind_options options = {0};
    struct sockaddr_in bound;
    socklen_t size = sizeof(bound);
    options.reuse_port = true;
    if (tsrv_bind_sockets(port, "127.0.0.1", &options, &w->fd, 1) < 0 ||
        getsockname(w->fd, (struct sockaddr *)&bound, &size) != 0 ||
        tsrv_loop_new(&w->loop, NULL) != TSRV_OK || pthread_create(&w->thread, NULL, run, w) != 0) {
        fprintf(stderr, "threads: cannot open port %d, or start a thread\n", port);
        exit(1);
    }
    return ntohs(bound.sin_port);
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8888, i, signo;
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGINT);
    sigaddset(&ends, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &ends, NULL); /* in every thread: only sigwait takes them */
    for (i = 0; i < THREADS; i++) {
        port = start(&workers[i], port);
    }
    printf("threads: listening on port %d\n", port);
    fflush(stdout);
    sigwait(&ends, &signo);
    for (i = 0; i < THREADS; i++) {
        if (tsrv_loop_post(workers[i].loop, drain, &workers[i]) != TSRV_OK) {
            return 1; /* no memory: nothing is waited for */
        }
    }
    for (i = 0; i < THREADS; i++) {
        pthread_join(workers[i].thread, NULL);
        tsrv_loop_free(workers[i].loop); /* not in the thread: a post may not have returned yet */
    }
    return 0;
}
