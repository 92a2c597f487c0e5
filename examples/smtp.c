/* smtp.c - receives mail and prints it: a line protocol with its limits, timeouts and good-byes.
 *
 *   cc -o smtp examples/smtp.c
 *   ./smtp [port] [seconds for a line]          then: nc -C 127.0.0.1 8888
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define MAX_LINE 1000 /* its CRLF included: RFC 5321, section 4.5.3.1.6 */

enum { STAY, START, MAIL, RCPT, DATA, LOST, QUIT, SKIP = 64 }; /* LOST: a line was too long */
static const struct verb {
    const char *text, *reply;
    int from, to; /* the step that it needs, and the one that it leads to */
} verbs[] = {{"HELO ", "250 hello", START, START},  {"EHLO ", "250 hello", START, START},
             {"MAIL FROM:", "250 ok", START, MAIL}, {"RCPT TO:", "250 ok", MAIL, RCPT},
             {"DATA\r\n", "354 go on", RCPT, DATA}, {"RSET\r\n", "250 ok", START, START},
             {"NOOP", "250 ok", START, STAY},       {"QUIT\r\n", "221 bye", START, QUIT},
             {"", "500 what?", START, STAY}}; /* every line begins with "" */

/* The rest of a line that is too long is dropped, with SKIP set meanwhile; then *line is empty. */
static int read_line(tsrv_stream *stream, int *step, tsrv_slice *line)
{
    int rc = *step & SKIP ? TSRV_ETOOLONG : tsrv_read_until(stream, "\r\n", MAX_LINE, line);
    if (rc == TSRV_ETOOLONG) {
        rc = tsrv_read_until(stream, "\r\n", 0, NULL);
        *step = rc == TSRV_EAGAIN ? *step | SKIP : *step & ~SKIP;
    }
    return rc;
}

/* Answers a command and returns the next step. */
static int command(tsrv_stream *stream, const tsrv_slice *line, int step)
{
    const struct verb *verb = verbs;
    while (strncasecmp(line->data, verb->text, strlen(verb->text)) != 0) {
        verb++;
    }
    if (line->size == 0 || step < verb->from) {
        tsrv_printf(stream, line->size == 0 ? "500 line too long\r\n" : "503 not now\r\n");
        return step;
    }
    tsrv_printf(stream, "%s\r\n", verb->reply);
    return verb->to == STAY ? step : verb->to;
}

/* The line "." ends the mail; of another one's first dot the client has made two. */
static int mail(tsrv_stream *stream, const tsrv_slice *line, int step)
{
    size_t dot = line->data[0] == '.';
    if (strcmp(line->data, ".\r\n") == 0) {
        tsrv_printf(stream, step == DATA ? "250 thank you\r\n" : "500 line too long\r\n");
        return START;
    }
    fwrite(line->data + dot, 1, line->size - dot, stdout);
    return line->size == 0 ? LOST : step;
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc = TSRV_OK, *step = (int *)tsrv_data(stream); /* 0 at first */
    tsrv_slice line = {"", 0};
    (void)address, (void)context;
    if (*step == 0) {
        tsrv_printf(stream, "220 ready\r\n");
        *step = START;
    }
    while (*step != QUIT && (rc = read_line(stream, step, &line)) == TSRV_OK) {
        *step = *step < DATA ? command(stream, &line, *step) : mail(stream, &line, *step);
    }
    if (rc == TSRV_ETIMEOUT || (rc == TSRV_EOF && tsrv_stopping(stream))) {
        tsrv_printf(stream, "421 good bye\r\n");
    }
    return rc;
}

static void on_start(tsrv_server *server, void *context)
{
    tsrv_address bound;
    (void)context;
    tsrv_server_address(server, 0, &bound);
    printf("smtp: listening on port %d\n", tsrv_address_port(&bound));
}

int main(int argc, char **argv)
{
    tsrv_server_options options = {0};
    setvbuf(stdout, NULL, _IOLBF, 0);
    options.handle_stream = handle_stream;
    options.on_start = on_start;
    options.data_size = sizeof(int);
    options.read_timeout_ms = argc > 2 ? 1000 * atoi(argv[2]) : 300000;
    return tsrv_serve(argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1", 1, &options) != TSRV_OK;
}
