/* What must hold of streams at every system call. Included behind the header, of which seam.h has the calls. */
#ifndef VERIFY_H
#define VERIFY_H

#define T_VERIFIED 64 /* streams of each server */

/* At every system call of the library: those of the loop that runs here which nobody is about to settle are at rest. */
static inline void t_verify_streams(void)
{
    const tsrv_loop *loop = tsrvi_thread.running;
    if (loop == NULL || loop->servers.all.next == NULL) {
        return;
    }
    for (const tsrvi_link *link = loop->servers.all.next; link != &loop->servers.all; link = link->next) {
        const tsrv_server *server = TSRVI_CONTAINER(link, const tsrv_server, link);
        const tsrvi_link *next = server->streams.next;
        for (int i = 0; i < T_VERIFIED && next != &server->streams; i++, next = next->next) {
            const tsrv_stream *stream = TSRVI_CONTAINER(next, const tsrv_stream, link);
            if (stream->queued == TSRVI_NOWHERE) {
                tsrvi_stream_verify(stream);
            }
        }
    }
}

#endif
