/* rolling_load.c - clients of examples/status.c, or production.c, that never stop asking: for proxies.sh.
 *
 *   rolling_load PORT KEPT SINGLE      so many that keep their connection, and that make one for each request
 *
 * Until it is told to end. A request has failed when it gets no answer, another one, or no connection. It has not when
 * the server says "bye" in place of the answer: then it was not taken, and is asked again on another connection. */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAUSE_MS 4 /* between two requests of a client */

static int port, running;
static bool over;
static unsigned long long requests, failed, moved, connections;

static void fail(const char *what, int rc)
{
    failed++;
    printf("failed: %s: %s\n", what, tsrv_strerror(rc));
    fflush(stdout);
}

/* One request. Returns whether the connection can be used for another. */
static bool ask(tsrv_stream *stream, bool *again)
{
    char line[32];
    tsrv_slice answer;
    int size = snprintf(line, sizeof line, "%llu\n", requests);
    *again = false;
    tsrv_set_deadline(stream, 10000);
    tsrv_write(stream, line, (size_t)size);
    int rc = tsrv_read_until(stream, "\n", sizeof line, &answer);
    requests++;
    if (rc != TSRV_OK) {
        fail("no answer", rc);
    } else if (strncmp(answer.data, "bye", 3) == 0) {
        *again = true;
        requests--;
        moved++;
    } else if (strcmp(answer.data, line) != 0) {
        fail("another answer", rc);
    } else {
        return true;
    }
    return false;
}

static void client(void *argument)
{
    bool kept = argument != NULL, again = false;
    tsrv_stream *stream;
    while (!over || again) {
        int rc = tsrv_connect("127.0.0.1", port, NULL, &stream);
        if (rc != TSRV_OK) {
            fail("no connection", rc);
            again = false;
            tsrv_sleep(100);
            continue;
        }
        connections++;
        while (ask(stream, &again) && kept && !over) {
            tsrv_sleep(PAUSE_MS);
        }
        tsrv_close(stream);
        if (!again) {
            tsrv_sleep(PAUSE_MS);
        }
    }
    if (--running == 0) {
        tsrv_loop_stop(tsrv_loop_current());
    }
}

static void end(void *context)
{
    (void)context;
    over = true;
}

int main(int argc, char **argv)
{
    static tsrv_signal told[2];
    if (argc != 4 || (port = atoi(argv[1])) == 0) {
        return 2;
    }
    int kept = atoi(argv[2]), single = atoi(argv[3]);
    for (; running < kept + single; running++) {
        if (tsrv_spawn(NULL, client, running < kept ? &over : NULL) != TSRV_OK) {
            return 2;
        }
    }
    if (tsrv_signal_start(NULL, &told[0], SIGTERM, end, NULL) != TSRV_OK ||
        tsrv_signal_start(NULL, &told[1], SIGINT, end, NULL) != TSRV_OK || tsrv_loop_run(NULL) != TSRV_OK) {
        return 2;
    }
    printf("%llu requests, %llu connections, %llu asked again, %llu failed\n", requests, connections, moved, failed);
    return failed != 0;
}
