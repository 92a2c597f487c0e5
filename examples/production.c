/* production.c - a server as one would run it: workers that are looked after, limits, figures.
 *
 *   cc -O2 -o production examples/production.c
 *   ./production [port [processes [proxies]]]      then: nc 127.0.0.1 8888, and say "stats"
 *   kill -USR2  starts the program anew, which takes the port over: an upgrade without a gap
 *   kill -HUP   replaces the workers one by one; -TERM finishes what is under way (30 s), and ends
 *   ./production 8888 0 127.0.0.1   only through a proxy there (HAProxy with send-proxy-v2, nginx
 *               with proxy_protocol on), which says in a header of each connection whose it is
 *
 * As /etc/systemd/system/production.service; with ListenStream=127.0.0.1:8888 in production.socket
 * beside it systemd holds the port, and this program finds it by itself; from systemd 253 on
 * Type=notify-reload, in place of ExecReload, waits for the end of a reload:
 *
 *   [Service]
 *   Type=notify
 *   NotifyAccess=main
 *   ExecStart=/usr/local/bin/production 8888
 *   ExecReload=/bin/kill -HUP $MAINPID
 *   KillMode=mixed
 *   TimeoutStopSec=40
 *   WatchdogSec=10
 *   Restart=on-failure
 *   DynamicUser=yes
 *   LimitNOFILE=65536
 *   [Install]
 *   WantedBy=multi-user.target
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The figures of all workers; each of them can be asked. Behind a proxy `address` is the client's. */
static void tell_stats(tsrv_stream *stream, const tsrv_address *address)
{
    char you[TSRV_ADDRESS_SIZE];
    tsrv_stats all;
    if (tsrv_server_worker_stats(tsrv_stream_server(stream), -1, &all) == TSRV_OK) {
        tsrv_printf(stream, "accepted %llu, open %llu, timeouts %llu, restarts %llu, you are %s\n",
                    (unsigned long long)all.accepted, (unsigned long long)all.open,
                    (unsigned long long)all.ended_timeout, (unsigned long long)all.restarts,
                    tsrv_address_format(address, you, sizeof(you)));
    }
}

/* In a drain it answers what has come, and says good bye: to a client that is never idle, too. */
static int handle_stream(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 4096, &line)) == TSRV_OK) {
        if (strcmp(line.data, "stats\n") == 0 || strcmp(line.data, "stats\r\n") == 0) {
            tell_stats(stream, address);
        } else {
            tsrv_write(stream, line.data, line.size);
        }
        if (tsrv_stopping(stream) && tsrv_unread_size(stream) == 0) {
            break;
        }
    }
    if (tsrv_stopping(stream)) {
        tsrv_printf(stream, "bye: the server ends\n");
    } else if (rc == TSRV_ETIMEOUT || rc == TSRV_ETOOLONG) {
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

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8888, processes = argc > 2 ? atoi(argv[2]) : 0, rc;
    tsrv_fork_options fork_options = {0};
    tsrv_server_options options = {0};
    signal(SIGPIPE, SIG_IGN); /* for our own output: a worker must not die of a log that is gone */
    fork_options.heartbeat_ms = 5000; /* a worker that hangs for so long is replaced */
    fork_options.upgrade_argv = argv;
    options.handle_stream = handle_stream;
    options.on_start = on_start;
    options.max_connections = 10000; /* of each worker; the next ones wait in the kernel's queue */
    options.idle_timeout_ms = 60000;
    options.keep_alive = true;
    options.fork = &fork_options;
    if (argc > 3) { /* "10.0.0.0/8, ::1": nobody else may connect, or claim to be somebody */
        options.proxy_protocol = TSRV_PROXY_REQUIRED;
        options.proxy_from = argv[3];
    }
    rc = tsrv_serve(port, "127.0.0.1", processes, &options);
    if (tsrv_task_id() < 0) { /* the parent: here, not in atexit, is what is done once at the end */
        fprintf(stderr, "production: over, %s\n", rc == TSRV_OK ? "all well" : tsrv_strerror(rc));
    }
    return rc != TSRV_OK; /* each worker comes here, too, in a reload for instance */
}
