/* smtp.c - receives mail and prints it: a line protocol with its limits, timeouts and good-byes.
 *
 *   cc -o smtp examples/smtp.c
 *   ./smtp [port] [seconds for a line]          then: nc -C 127.0.0.1 8888, or
 *   curl smtp://127.0.0.1:8888 --mail-from a@example.org --mail-rcpt b@example.org -T mail.txt
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include "smtp_session.h"

#include <signal.h>

#define MAX_LINE 1000 /* its CRLF included: RFC 5321, section 4.5.3.1.6 */

/* The rest of a line that is too long is dropped; then *line is empty. */
static int read_line(tsrv_stream *stream, session *s, tsrv_slice *line)
{
    int rc = s->skip ? TSRV_ETOOLONG : tsrv_read_until(stream, "\r\n", MAX_LINE, line);
    if (rc == TSRV_ETOOLONG) {
        rc = tsrv_read_until(stream, "\r\n", 0, NULL);
        s->skip = rc == TSRV_EAGAIN;
    }
    return rc;
}

/* Reads lines and answers them until the client quits, or between two mails of a drain. */
static int converse(tsrv_stream *stream, session *s)
{
    tsrv_slice line = {"", 0};
    int rc;
    while ((rc = read_line(stream, s, &line)) == TSRV_OK) {
        const char *answer =
            s->step == DATA ? content(s, line.data, line.size) : command(s, line.data, line.size);
        if (answer != NULL) {
            tsrv_printf(stream, "%s\r\n", answer);
        }
        if (s->step == QUIT || (s->step == START && tsrv_stopping(stream))) {
            return s->step == QUIT ? TSRV_OK : TSRV_EOF;
        }
    }
    return rc;
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    session *s = (session *)tsrv_data(stream);
    int rc;
    (void)address;
    (void)context;
    if (s->step == NEW) {
        tsrv_printf(stream, "220 ready\r\n");
        s->step = START;
    }
    rc = converse(stream, s);
    if (rc == TSRV_ETIMEOUT || (rc == TSRV_EOF && tsrv_stopping(stream))) {
        tsrv_printf(stream, "421 good bye\r\n");
    }
    return rc;
}

/* However the connection has ended: the handler may not have been called again. */
static void on_close(tsrv_stream *stream, int reason, void *context)
{
    (void)reason;
    (void)context;
    drop_mail((session *)tsrv_data(stream));
}

static void on_start(tsrv_server *server, void *context)
{
    tsrv_address bound;
    (void)context;
    if (tsrv_server_address(server, 0, &bound) == TSRV_OK) {
        printf("smtp: listening on port %d\n", tsrv_address_port(&bound));
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    tsrv_server_options options = {0};
    /* For stdout alone: a mail that cannot be printed is answered with 451. */
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* it is a file, of which there is a limit: ulimit -f */
    options.handle_stream = handle_stream;
    options.on_close = on_close;
    options.on_start = on_start;
    options.data_size = sizeof(session);
    options.read_timeout_ms = argc > 2 ? 1000 * atoi(argv[2]) : 300000;
    return tsrv_serve(argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1", 1, &options) != TSRV_OK;
}
