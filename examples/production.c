/* production.c - a server as one would run it: workers that are looked after, limits, figures.
 *
 *   cc -O2 -o production examples/production.c
 *   ./production [port [processes]]   then: nc 127.0.0.1 8888, and say "stats"
 *
 *   kill -HUP   replaces the workers one by one     kill -TERM  finishes what is under way, and ends
 *   kill -USR2  starts the program anew, which takes the port over: an upgrade without a gap
 *
 * As /etc/systemd/system/production.service, with or without a production.socket beside it (with
 * ListenStream=8888 systemd holds the port, and this program finds it by itself):
 *
 *   [Service]
 *   Type=notify-reload
 *   NotifyAccess=main
 *   ExecStart=/usr/local/bin/production 8888
 *   WatchdogSec=10
 *   TimeoutStopSec=40
 *   Restart=on-failure
 *   DynamicUser=yes
 *   LimitNOFILE=65536
 *   [Install]
 *   WantedBy=multi-user.target
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The figures of all workers; each of them can be asked. */
static void tell_stats(tsrv_stream *stream)
{
    tsrv_stats all;
    tsrv_server_worker_stats(tsrv_stream_server(stream), -1, &all);
    tsrv_printf(stream, "accepted %llu, open %llu, timeouts %llu, restarts %llu\n",
                (unsigned long long)all.accepted, (unsigned long long)all.open,
                (unsigned long long)all.ended_timeout, (unsigned long long)all.restarts);
}

static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address;
    (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 4096, &line)) == TSRV_OK) {
        if (strncmp(line.data, "stats", 5) == 0) {
            tell_stats(stream);
        } else {
            tsrv_write(stream, line.data, line.size);
        }
    }
    if (rc == TSRV_ETIMEOUT || rc == TSRV_ETOOLONG || tsrv_stopping(stream)) {
        tsrv_printf(stream, "bye: %s\n", tsrv_strerror(rc));
    }
    return rc;
}

/* In each worker, when it accepts; one of them tells. */
static void on_start(tsrv_server *server, void *context)
{
    tsrv_address bound;
    (void)context;
    if (tsrv_task_id() <= 0 && tsrv_server_address(server, 0, &bound) == TSRV_OK) {
        printf("production: listening on port %d\n", tsrv_address_port(&bound));
        fflush(stdout);
    }
}

/* In the parent, which must not serve. */
static void on_exit_of(int task_id, int pid, int status, void *context)
{
    (void)context;
    fprintf(stderr, "production: worker %d (pid %d): status %d\n", task_id, pid, status);
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8888, processes = argc > 2 ? atoi(argv[2]) : 0;
    tsrv_fork_options fork_options = {0};
    tsrv_server_options options = {0};
    fork_options.heartbeat_ms = 5000; /* a worker that hangs for so long is replaced */
    fork_options.on_exit = on_exit_of;
    fork_options.upgrade_argv = argv;
    options.handle_stream = handle_stream;
    options.on_start = on_start;
    options.max_connections = 10000; /* of each worker; the next ones wait in the kernel's queue */
    options.idle_timeout_ms = 60000;
    options.grace_ms = 30000;
    options.keep_alive = true;
    options.fork = &fork_options;
    return tsrv_serve(port, "127.0.0.1", processes, &options) == TSRV_OK ? 0 : 1;
}
