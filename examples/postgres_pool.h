/* postgres_pool.h - a bounded pool of PostgreSQL connections, for the coroutines of one loop. */
#include "postgres_connection.h"

enum { POOL_SIZE = 4 };

typedef struct pool {
    const char *conninfo;
    int timeout_ms; /* for a turn in the pool, for a new connection, and for the statement */
    PGconn *idle[POOL_SIZE];
    int idle_count, taken; /* together POOL_SIZE at most */
    int waiting;           /* for one of them */
    tsrv_condition given;  /* back */
    bool away;             /* the database could not be reached the last time */
} pool;

/* Makes a new connection; NULL after an error. */
static int pool_connect(pool *p, PGconn **made)
{
    int rc = postgres_connect(p->conninfo, p->timeout_ms, made);
    if (rc != TSRV_OK && rc != TSRV_ECLOSED && !p->away) { /* said once, not for every query */
        fprintf(stderr, "postgres: %s\n",
                rc == TSRV_ETIMEOUT ? "no connection in time" : PQerrorMessage(*made));
    }
    p->away = rc != TSRV_OK;
    if (rc != TSRV_OK) {
        PQfinish(*made);
        *made = NULL;
    }
    return rc;
}

/* Gives a connection back, or its place: NULL. */
static void pool_give(pool *p, PGconn *connection)
{
    p->taken--;
    if (connection != NULL) {
        p->idle[p->idle_count++] = connection;
    }
    tsrv_condition_notify(&p->given, 1);
}

/* Takes a connection that works, in turn. */
static int pool_take(pool *p, PGconn **connection)
{
    int rc = TSRV_OK;
    if (POOL_SIZE - p->taken <= p->waiting) { /* what is there is for those who came before */
        p->waiting++;
        while ((rc = tsrv_condition_wait(&p->given, p->timeout_ms)) == TSRV_OK &&
               p->taken == POOL_SIZE) {
        }
        p->waiting--;
    }
    if (rc != TSRV_OK) { /* what was given back meanwhile is for the next one */
        tsrv_condition_notify(&p->given, p->taken < POOL_SIZE);
        return rc;
    }
    p->taken++;
    for (*connection = NULL; *connection == NULL && p->idle_count > 0;) {
        PGconn *idle = p->idle[--p->idle_count];
        if (tsrv_wait_fd(PQsocket(idle), TSRV_READABLE, 0) == TSRV_ETIMEOUT) {
            *connection = idle;
        } else { /* what has something to say though nothing was asked says that it ends */
            PQfinish(idle);
        }
    }
    if (*connection == NULL && (rc = pool_connect(p, connection)) != TSRV_OK) {
        pool_give(p, NULL);
    }
    return rc;
}

/* Runs a statement with one parameter, $1; with it none can copy, or leave a transaction open.
 * Returns TSRV_OK and its result, which may be an error of the server's, and which the caller
 * clears; or a code: then nobody knows whether it was done, and the connection is not used again.
 */
static int pool_query(pool *p, const char *statement, const char *parameter, PGresult **result)
{
    PGconn *connection;
    int rc = pool_take(p, &connection);
    *result = NULL;
    if (rc != TSRV_OK) {
        return rc;
    }
    rc = -EIO;
    if (PQsendQueryParams(connection, statement, 1, NULL, &parameter, NULL, NULL, 0)) {
        /* Later than the server itself: for one that says nothing at all. */
        rc = postgres_receive(connection, tsrv_loop_now_ms(NULL) + p->timeout_ms + 500, result);
    }
    if (rc != TSRV_OK || PQtransactionStatus(connection) != PQTRANS_IDLE) {
        PQfinish(connection);
        connection = NULL;
    }
    pool_give(p, connection);
    if (PQresultErrorField(*result, PG_DIAG_SQLSTATE) == NULL &&
        (rc != TSRV_OK || PQresultStatus(*result) == PGRES_FATAL_ERROR)) {
        PQclear(*result);
        *result = NULL;
        return rc != TSRV_OK ? rc : -EIO;
    }
    return TSRV_OK;
}
