/* postgres.c - answers every line with what a PostgreSQL database says to it: the line is $1 of a
 * statement. Four connections serve all clients, in both modes.
 *
 *   cc -I/usr/include/postgresql -o postgres examples/postgres.c -lpq
 *   ./postgres [port] [conninfo] [statement] [timeout_ms] [callback]
 *   ./postgres 8888 "dbname=shop" 'SELECT name, price FROM fruit WHERE name LIKE $1' 5000
 *                                     then: nc 127.0.0.1 8888, and say: a%
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include "postgres_pool.h"
#include "postgres_text.h"

#include <stdlib.h>

enum { MAX_LINE = 1024 };

static pool database = {.conninfo = "", .timeout_ms = 5000};
static const char *statement = "SELECT $1, now()";

/* What a connection asks; in callback mode its tsrv_data, in which the helper finds it. */
typedef struct question {
    char parameter[MAX_LINE];
    PGresult *result;
    int rc;
    bool asked, answered;
} question;

static int read_question(tsrv_stream *stream, question *q)
{
    tsrv_slice line;
    int rc = tsrv_read_until(stream, "\n", MAX_LINE, &line);
    if (rc == TSRV_OK) { /* a copy, since in callback mode the line is gone when this returns */
        snprintf(q->parameter, MAX_LINE, "%.*s", (int)strcspn(line.data, "\r\n"), line.data);
    }
    return rc;
}

/* The connection is back in the pool by now: a client that reads slowly holds none. */
static void answer(tsrv_stream *stream, question *q)
{
    const char *error = q->rc != TSRV_OK ? tsrv_strerror(q->rc)
                                         : PQresultErrorField(q->result, PG_DIAG_MESSAGE_PRIMARY);
    write_rows(stream, q->result);
    tsrv_printf(stream, error == NULL ? "OK " : "ERROR ");
    write_value(stream, error == NULL ? PQcmdStatus(q->result) : error);
    tsrv_printf(stream, "\n");
    PQclear(q->result);
}

/* A coroutine waits for the database itself. */
static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    question q;
    int rc;
    (void)address, (void)context;
    while ((rc = read_question(stream, &q)) == TSRV_OK) {
        q.rc = pool_query(&database, statement, q.parameter, &q.result);
        answer(stream, &q);
    }
    return rc;
}

/* In callback mode a helper does. The question stays where it is as long as the handler returns
 * TSRV_EAGAIN, which it does until the helper has ended, also when the client has gone. */
static void ask(void *context)
{
    tsrv_stream *stream = (tsrv_stream *)context;
    question *q = (question *)tsrv_data(stream);
    q->rc = pool_query(&database, statement, q->parameter, &q->result);
    q->answered = true;
    tsrv_wake(stream);
}

static int handle_callback(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    question *q = (question *)tsrv_data(stream);
    int rc;
    (void)address, (void)context;
    for (;; q->asked = q->answered = false) {
        if (!q->asked && ((rc = read_question(stream, q)) != TSRV_OK ||
                          (rc = tsrv_spawn(NULL, ask, stream)) != TSRV_OK)) {
            return rc;
        }
        for (q->asked = true; !q->answered;) { /* the client's end wakes, too */
            if ((rc = tsrv_wait(stream, TSRV_NEVER)) == TSRV_EAGAIN) {
                return rc;
            }
        }
        answer(stream, q);
    }
}

int main(int argc, char **argv)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_address bound;
    database.conninfo = argc > 2 ? argv[2] : database.conninfo;
    statement = argc > 3 ? argv[3] : statement;
    database.timeout_ms = argc > 4 ? atoi(argv[4]) : database.timeout_ms;
    options.mode = argc > 5 ? TSRV_CALLBACK : TSRV_COROUTINE;
    options.handle_stream = argc > 5 ? handle_callback : handle_stream;
    options.data_size = argc > 5 ? sizeof(question) : 0;
    options.idle_timeout_ms = 300000;
    if (tsrv_server_new(&server, &options) != TSRV_OK ||
        tsrv_server_listen(server, argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1", NULL) != TSRV_OK ||
        tsrv_server_address(server, 0, &bound) != TSRV_OK) {
        return 1;
    }
    printf("postgres: listening on port %d\n", tsrv_address_port(&bound));
    fflush(stdout);
    return tsrv_loop_run(NULL) == TSRV_OK ? 0 : 1;
}
