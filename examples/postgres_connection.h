/* postgres_connection.h - a connection to PostgreSQL, for one coroutine at a time. libpq never
 * blocks here: its asynchronous calls say what they wait for, and tsrv_wait_fd waits. (It does
 * block to look up a name: have "host" be a unix socket's directory, or give "hostaddr".) */
#include <errno.h>
#include <libpq-fe.h>
#include <stdio.h>

static int postgres_wait(PGconn *connection, int events, int64_t due_ms)
{
    int64_t left = due_ms - tsrv_loop_now_ms(NULL);
    return left <= 0 ? (int)TSRV_ETIMEOUT : tsrv_wait_fd(PQsocket(connection), events, (int)left);
}

/* Makes a new connection; after an error it is good for PQerrorMessage and PQfinish. The server ends
 * a statement that takes too long, and the connection can be used again: ending only our side would
 * leave the server at work on it. */
static int postgres_connect(const char *conninfo, int timeout_ms, PGconn **made)
{
    char limit[64];
    const char *names[] = {"options", "dbname", NULL}, *values[] = {limit, conninfo, NULL};
    int64_t due_ms = tsrv_loop_now_ms(NULL) + timeout_ms;
    PostgresPollingStatusType next = PGRES_POLLING_WRITING; /* so it begins */
    int rc = TSRV_OK;
    snprintf(limit, sizeof(limit), "-c statement_timeout=%d", timeout_ms);
    *made = PQconnectStartParams(names, values, 1);
    while (PQstatus(*made) != CONNECTION_BAD && next != PGRES_POLLING_OK && rc == TSRV_OK) {
        rc = postgres_wait(*made, next == PGRES_POLLING_READING ? TSRV_READABLE : TSRV_WRITABLE,
                           due_ms);
        next = rc == TSRV_OK ? PQconnectPoll(*made) : next;
    }
    if (rc == TSRV_OK && (next != PGRES_POLLING_OK || PQsetnonblocking(*made, 1) != 0)) {
        rc = -ENOTCONN;
    }
    return rc;
}

/* Waits for all that the statement answers; the last result is kept. */
static int postgres_receive(PGconn *connection, int64_t due_ms, PGresult **result)
{
    int rc = TSRV_OK, unsent = 1;
    while (rc == TSRV_OK) {
        PGresult *next;
        if (unsent != 0 && (unsent = PQflush(connection)) < 0) {
            return -EIO;
        }
        if (unsent != 0 || PQisBusy(connection)) {
            rc = postgres_wait(connection,
                               unsent != 0 ? TSRV_READABLE | TSRV_WRITABLE : TSRV_READABLE, due_ms);
            rc = rc == TSRV_OK && !PQconsumeInput(connection) ? -EIO : rc;
        } else if ((next = PQgetResult(connection)) == NULL) {
            return TSRV_OK;
        } else {
            PQclear(*result);
            *result = next;
        }
    }
    return rc;
}
