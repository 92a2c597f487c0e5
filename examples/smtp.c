/* smtp.c - receives mail and prints it: a line protocol with its limits, timeouts and good-byes.
 *
 *   cc -o smtp examples/smtp.c
 *   ./smtp [port] [seconds for a line]          then: nc -C 127.0.0.1 8888
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define MAX_LINE 1000 /* its CRLF included: RFC 5321, section 4.5.3.1.6 */

enum { STAY = -1, START, MAIL, RCPT, DATA, LOST, QUIT }; /* LOST: a mail with too long a line */
static const struct verb {
    const char *text, *reply;
    int from, to; /* the step that it needs, and the one that it leads to */
} verbs[] = {{"HELO ", "250 hello", START, START},  {"EHLO ", "250 hello", START, START},
             {"MAIL FROM:", "250 ok", START, MAIL}, {"RCPT TO:", "250 ok", MAIL, RCPT},
             {"DATA\r\n", "354 go on", RCPT, DATA}, {"RSET\r\n", "250 ok", START, START},
             {"NOOP", "250 ok", START, STAY},       {"QUIT\r\n", "221 bye", START, QUIT},
             {"", "500 what?", START, STAY}}; /* every line begins with "" */

/* Of a line that is too long the rest is dropped, however long it is, and *line is empty. */
static int read_line(tsrv_stream *stream, tsrv_slice *line)
{
    int rc = tsrv_read_until(stream, "\r\n", MAX_LINE, line);
    return rc == TSRV_ETOOLONG ? tsrv_read_until(stream, "\r\n", 0, NULL) : rc;
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
    int rc = TSRV_OK, step = START;
    tsrv_slice line;
    (void)address;
    (void)context;
    tsrv_printf(stream, "220 ready\r\n");
    while (step != QUIT && (rc = read_line(stream, &line)) == TSRV_OK) {
        step = step < DATA ? command(stream, &line, step) : mail(stream, &line, step);
    }
    if (rc == TSRV_ETIMEOUT || (rc == TSRV_EOF && tsrv_stopping(stream))) {
        tsrv_printf(stream, "421 good bye\r\n");
    }
    return rc;
}

static void on_signal(void *context)
{
    tsrv_server_drain((tsrv_server *)context, 0);
}

int main(int argc, char **argv)
{
    tsrv_server_options options = {0};
    tsrv_signal terminated = {0};
    tsrv_server *server;
    tsrv_address bound;
    setvbuf(stdout, NULL, _IOLBF, 0);
    options.handle_stream = handle_stream;
    options.read_timeout_ms = argc > 2 ? 1000 * atoi(argv[2]) : 300000;
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_signal_start(NULL, &terminated, SIGTERM, on_signal, server) != TSRV_OK ||
        tsrv_server_listen(server, argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1", NULL) != TSRV_OK ||
        tsrv_server_address(server, 0, &bound) != TSRV_OK) {
        return 1;
    }
    printf("smtp: listening on port %d\n", tsrv_address_port(&bound));
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
