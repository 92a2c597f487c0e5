/* Servers (>>server): options at their ends, and what a server costs: system calls and allocations per message,
 * linear work, memory and stacks per connection. The figures are printed; failing tests show them. */
/* What a connection costs is what it costs in production. */
#undef TSRV_DEBUG

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "seam.h"

#include <netinet/in.h>
#include <sys/socket.h>

static bool crowded; /* there is always one more who waits for a listener */
static int crowd_size;

static int accept_of_crowd(int fd, struct sockaddr *peer, socklen_t *size)
{
    struct sockaddr_in address;
    if (!crowded) {
        return accept(fd, peer, size);
    }
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    memcpy(peer, &address, sizeof address);
    *size = sizeof address;
    crowd_size++;
    return socket(AF_INET, SOCK_STREAM, 0);
}

#undef t_sys_accept
#define t_sys_accept(...) (t_fault("accept") ? -1 : accept_of_crowd(__VA_ARGS__))

#include "script.h"

#include "handlers.h"

#include <sys/resource.h>

/* ---- options at their ends -----------------------------------------------------------------*/

/* The server serves lines, and lets go of its client. */
static void check_options(tsrv_server_options options)
{
    options.handle_stream = echo_lines;
    s_open(options);
    int fd = t_connect(s_port);
    s_echo(fd, "one\ntwo\n");
    s_echo(fd, "three\n");
    s_finish(fd);
    s_settle();
    s_close();
}

TEST_STREAM(every_time_at_0_never_and_max)
{
    static const size_t members[] = {
        offsetof(tsrv_server_options, idle_timeout_ms), offsetof(tsrv_server_options, read_timeout_ms),
        offsetof(tsrv_server_options, write_timeout_ms), offsetof(tsrv_server_options, close_timeout_ms),
        offsetof(tsrv_server_options, grace_ms),
    };
    static const int values[] = {0, TSRV_NEVER, INT_MAX, -2};
    for (size_t i = 0; i < COUNT(members); i++) {
        for (size_t k = 0; k < COUNT(values); k++) {
            tsrv_server_options options = {0};
            memcpy((char *)&options + members[i], &values[k], sizeof(int));
            check_options(options);
        }
    }
}

TEST_STREAM(every_size_at_0_16_and_max)
{
    static const size_t members[] = {
        offsetof(tsrv_server_options, max_buffer_size), offsetof(tsrv_server_options, read_chunk_size),
        offsetof(tsrv_server_options, max_write_buffer_size), offsetof(tsrv_server_options, write_high_water),
        offsetof(tsrv_server_options, stack_size), offsetof(tsrv_server_options, data_size),
    };
    static const size_t values[] = {0, 16, SIZE_MAX};
    for (size_t i = 0; i < COUNT(members); i++) {
        for (size_t k = 0; k < COUNT(values); k++) {
            tsrv_server_options options = {0};
            tsrv_server *server;
            if (values[k] == SIZE_MAX && i >= 4) { /* no switch for these two */
                options.handle_stream = echo_lines;
                memcpy((char *)&options + members[i], &values[k], sizeof(size_t));
                CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
                CHECK(server == NULL);
                continue;
            }
            memcpy((char *)&options + members[i], &values[k], sizeof(size_t));
            check_options(options);
        }
    }
}

/* What is off needs no memory: each pair of them, and all. */
TEST_STREAM(sizes_that_are_off_together)
{
    for (unsigned off = 0; off < 16; off++) {
        tsrv_server_options options = {0};
        options.max_buffer_size = off & 1 ? SIZE_MAX : 0;
        options.read_chunk_size = off & 2 ? SIZE_MAX : 0;
        options.max_write_buffer_size = off & 4 ? SIZE_MAX : 0;
        options.write_high_water = off & 8 ? SIZE_MAX : 0;
        check_options(options);
    }
}

TEST_ONCE(other_options_at_their_ends)
{
    tsrv_server_options options = {0};
    tsrv_server *server = NULL;
    CHECK_INT(tsrv_server_new(&server, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL); /* no handler */
    options.handle_stream = echo_lines;
    options.max_connections = -1;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
    options.max_connections = 0;
    options.max_per_address = -1;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
    options.max_per_address = 0;
    options.mode = 2;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
    options.mode = -1;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
    CHECK(server == NULL);
    options.mode = TSRV_CALLBACK;
    options.max_connections = INT_MAX;
    check_options(options);
}

/* ---- stacks of two sizes -------------------------------------------------------------------*/

static int spawned;

static void note_spawned(void *context)
{
    (void)context;
    spawned++;
}

static void count_mappings(size_t stack_size)
{
    tsrv_server_options options = {0};
    spawned = 0;
    options.stack_size = stack_size;
    s_open_with(echo_lines, options);
    count_calls("mmap", "munmap");
    for (int i = 0; i < 100; i++) {
        int fd = s_join();
        CHECK_INT(tsrv_spawn(s_loop, note_spawned, NULL), TSRV_OK);
        s_echo(fd, "x\n");
        t_close(fd);
        s_until(&s_closed, i + 1);
        s_until(&spawned, i + 1);
    }
    t_seen = NULL;
    CHECK_MOST(calls_counted, 8);
    s_close();
}

TEST_SCRIPT(stacks_of_two_sizes_are_both_kept)
{
    count_mappings(64 * KIB);
}

TEST_SCRIPT(stacks_of_the_usual_size_are_kept)
{
    count_mappings(0);
}

/* ---- counters ------------------------------------------------------------------------------*/

static long c_calls, c_control, c_waits, c_memory;
static const char *c_names[64]; /* of the calls, on the loop's thread only */
static long c_counts[64];

static void c_seen(const char *name)
{
    bool memory = strcmp(name, "malloc") == 0 || strcmp(name, "realloc") == 0;
    int i = 0;
    if (strcmp(name, "getpid") == 0) {
        return; /* one a tsrv_loop_run_once, which t_run uses; none a turn of tsrv_loop_run */
    }
    __atomic_add_fetch(memory ? &c_memory : &c_calls, 1, __ATOMIC_RELAXED);
    c_control += strcmp(name, "epoll_ctl") == 0;
    c_waits += strcmp(name, "epoll_wait") == 0;
    while (i < 63 && c_names[i] != NULL && strcmp(c_names[i], name) != 0) {
        i++;
    }
    c_names[i] = name;
    c_counts[i]++;
}

static void c_print(void)
{
    for (int i = 0; i < 64 && c_names[i] != NULL; i++) {
        printf("    %s %ld\n", c_names[i], c_counts[i]);
    }
}

/* For tests that turn the loop themselves. Returns the port.
 *   more  other options than the handler; NULL = none */
static int open_server(tsrv_handler handler, const tsrv_server_options *more)
{
    tsrv_server_options options = {0};
    tsrv_bind_options bind_options = {.backlog = 4096};
    if (more != NULL) {
        options = *more;
    }
    t_loop = t_new_loop();
    options.mode = t_mode;
    options.handle_stream = handler;
    options.loop = t_loop;
    CHECK_INT(tsrv_server_new(&t_server, &options), TSRV_OK);
    CHECK_INT(tsrv_server_listen(t_server, 0, "127.0.0.1", &bind_options), TSRV_OK);
    return t_port(t_server, 0);
}

static void close_server(void)
{
    tsrv_server_free(t_server);
    CHECK_INT(tsrv_loop_free(t_loop), TSRV_OK);
    t_server = NULL;
    t_loop = NULL;
}

/* A line of 64 bytes, echoed. */
static void echo_64(int fd)
{
    static const char line[] = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n";
    t_sends(fd, line);
    t_expect(fd, line);
}

/* ---- system calls --------------------------------------------------------------------------*/

static void client_calls(int port, void *context)
{
    enum { ROUNDS = 2000 };
    int fd = t_connect(port);
    (void)context;
    echo_64(fd);
    long calls = __atomic_load_n(&c_calls, __ATOMIC_RELAXED), control = c_control;
    for (int i = 0; i < ROUNDS; i++) {
        echo_64(fd);
    }
    double each = (double)(__atomic_load_n(&c_calls, __ATOMIC_RELAXED) - calls) / ROUNDS;
    printf("%.3f system calls an echo\n", each);
    c_print();
    CHECK(each <= 3.05);
    CHECK(each > 1.9); /* else it is not counted */
    CHECK_INT(c_control - control, 0);
    t_close(fd);
}

TEST_SOFT(calls_per_echo)
{
    t_case c = {.handler = echo_lines, .client = client_calls};
    t_seen = c_seen;
    t_run(&c);
}

enum { CHURN = 800, AT_ONCE = 8 };

/* Turns until the server has received so many bytes in all, and so many connections are open. */
static void turns_until(uint64_t bytes, uint64_t open)
{
    int64_t end = t_patience();
    tsrv_stats stats;
    do {
        CHECK(tsrv_loop_run_once(t_loop, 1000) > 0);
        tsrv_server_stats(t_server, &stats);
        CHECK(t_now_ms() < end);
    } while (stats.bytes_in < bytes || stats.bytes_out < bytes || stats.open != open);
}

/* Connect, a line, its echo, a reset; eight at once. One thread does both sides, so that the turns
 * do not depend on who is faster. */
TEST_SOFT(calls_per_connection)
{
    int fds[AT_ONCE];
    long calls = 0, waits = 0;
    t_seen = c_seen;
    int port = open_server(echo_lines, NULL);
    for (int i = 0; i <= CHURN / AT_ONCE; i++) {
        calls = i == 1 ? c_calls : calls; /* the first ones fill the pools */
        waits = i == 1 ? c_waits : waits;
        for (int k = 0; k < AT_ONCE; k++) {
            fds[k] = t_connect(port);
            t_sends(fds[k], "hello\n");
        }
        turns_until((uint64_t)(i + 1) * AT_ONCE * 6, AT_ONCE);
        for (int k = 0; k < AT_ONCE; k++) {
            t_expect(fds[k], "hello\n");
            t_reset(fds[k]);
        }
        turns_until((uint64_t)(i + 1) * AT_ONCE * 6, 0);
    }
    double wait = (double)(c_waits - waits) / CHURN, each = (double)(c_calls - calls) / CHURN - wait;
    printf("%.2f system calls a connection, and %.2f waits\n", each, wait);
    c_print();
    CHECK(each > 4);
    if (t_backend == TSRV_BACKEND_EPOLL) {
        CHECK(each <= 6.1); /* accept4, epoll_ctl, recv, send, recv, close */
        CHECK(wait <= 0.6);
    }
    close_server();
}

/* ---- linear work ---------------------------------------------------------------------------*/

static double cpu_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static size_t long_got; /* size of the line, once it is there */

static int handle_long(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc = tsrv_read_until(stream, "\r\n", 0, &line);
    (void)address;
    (void)context;
    if (rc == TSRV_OK) {
        long_got = line.size;
    }
    return rc;
}

/* CPU seconds of the loop for a line of that size, received byte by byte. The bytes are sent at
 * once: what costs is the receive of each, and what is done with the bytes before it. */
static double long_line(size_t size)
{
    tsrv_server_options options = {.read_chunk_size = 1, .close_timeout_ms = 1};
    tsrv_stats stats;
    int pair[2];
    double before;
    char *data = (char *)malloc(size);
    CHECK(data != NULL);
    memset(data, '\r', size);
    data[size - 1] = '\n';
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK(fcntl(pair[0], F_SETFL, O_NONBLOCK) == 0);
    open_server(handle_long, &options);
    CHECK_INT(tsrv_server_add_stream(t_server, pair[1]), TSRV_OK);
    long_got = 0;
    before = cpu_seconds();
    for (size_t sent = 0; long_got == 0;) {
        size_t piece = size - sent < 4096 ? size - sent : 4096;
        ssize_t n = piece == 0 ? 0 : send(pair[0], data + sent, piece, T_NOSIGNAL);
        sent += n > 0 ? (size_t)n : 0;
        for (int i = 0; i < 1024 && long_got == 0; i++) {
            CHECK(tsrv_loop_run_once(t_loop, 0) > 0);
        }
    }
    double used = cpu_seconds() - before;
    CHECK_INT(long_got, size);
    t_close(pair[0]);
    do {
        CHECK(tsrv_loop_run_once(t_loop, 10) >= 0);
        tsrv_server_stats(t_server, &stats);
    } while (stats.open > 0);
    close_server();
    free(data);
    return used;
}

TEST_SOFT(a_line_byte_by_byte_costs_linear_work)
{
    double ratio = 0;
    for (int attempt = 0; attempt < 3; attempt++) {
        double half = long_line(512 * 1024), full = long_line(1024 * 1024);
        ratio = full / half;
        printf("512 KiB %.3f s, 1 MiB %.3f s, ratio %.2f\n", half, full, ratio);
        if (ratio < 2.6) {
            return;
        }
    }
    T_FAIL("the work is not linear: ratio %.2f", ratio);
}
LONG(a_line_byte_by_byte_costs_linear_work);

/* ---- memory of idle connections ------------------------------------------------------------*/

TEST_ONCE(a_stream_is_small)
{
    printf("%zu bytes\n", sizeof(tsrv_stream));
    CHECK(sizeof(void *) > 8 || sizeof(tsrv_stream) <= 216);
}

/* In a process of its own, which has descriptors of its own: opens count connections, then does what
 * the letters say: e = one echo on each, q = end. Answers each with a byte. */
static void idle_clients(int port, int count, int control)
{
    int *fds = (int *)malloc((size_t)count * sizeof *fds);
    char letter;
    CHECK(fds != NULL);
    for (int i = 0; i < count; i++) {
        struct linger reset = {1, 0}; /* else 10,000 ports stay in TIME_WAIT for a minute */
        fds[i] = t_connect(port);
        CHECK(setsockopt(fds[i], SOL_SOCKET, SO_LINGER, &reset, sizeof reset) == 0);
    }
    CHECK(write(control, "c", 1) == 1);
    while (read(control, &letter, 1) == 1 && letter == 'e') {
        for (int i = 0; i < count; i++) {
            echo_64(fds[i]);
        }
        CHECK(write(control, "e", 1) == 1);
    }
    _exit(0);
}

typedef struct idle {
    int control;
    bool told;
} idle;

static void idle_told(int events, void *context)
{
    char letter;
    idle *i = (idle *)context;
    (void)events;
    if (read(i->control, &letter, 1) != 1) {
        T_FAIL("the clients are gone");
    }
    i->told = true;
}

static void idle_turns(idle *i, int open)
{
    int64_t end = t_patience();
    tsrv_stats stats;
    do {
        CHECK(tsrv_loop_run_once(t_loop, 100) > 0);
        tsrv_server_stats(t_server, &stats);
        if (t_now_ms() > end) {
            T_FAIL("only %llu of %d are open", (unsigned long long)stats.open, open);
        }
    } while (!i->told || stats.open != (uint64_t)open);
    i->told = false;
}

TEST_SOFT(memory_of_idle_connections)
{
    struct rlimit limit;
    int count = 10000, pair[2];
    tsrv_watch watch;
    idle state;
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    limit.rlim_cur = limit.rlim_max;
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    if (limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < (rlim_t)count + 100) {
        count = (int)limit.rlim_cur - 100;
        printf("only %d connections: the limit of descriptors is low\n", count);
    }
    /* Where epoll is, kqueue is tests/kqueue, whose own table would be counted. */
    bool emulated = TSRVI_HAS_EPOLL && t_backend == TSRV_BACKEND_KQUEUE;
    bool measured = !TSRVI_HAS_ASAN && !TSRVI_HAS_TSAN && !emulated && t_scale() == 1 && resident() > 0;
    if (!measured || t_backend == TSRV_BACKEND_POLL) {
        count = count < 1000 ? count : 1000; /* poll looks at all of them in each turn */
    }
    memset(&watch, 0, sizeof watch);
    int port = open_server(echo_lines, NULL);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        close(pair[0]);
        idle_clients(port, count, pair[1]);
    }
    close(pair[1]);
    state.control = pair[0];
    state.told = false;
    CHECK_INT(tsrv_watch_start(t_loop, &watch, pair[0], TSRV_READABLE, idle_told, &state), TSRV_OK);

    long most = t_mode == TSRV_CALLBACK ? 256 : 2 * sysconf(_SC_PAGESIZE) + 256;
    long before = resident();
    idle_turns(&state, count);
    long idle_bytes = (resident() - before) / count;
    CHECK(write(pair[0], "e", 1) == 1);
    idle_turns(&state, count);
    long used_bytes = (resident() - before) / count;
    printf("%d connections: %ld bytes each, %ld after an echo; limit %ld\n", count, idle_bytes,
           used_bytes, most);
    if (measured && count > 5000) {
        CHECK(idle_bytes > 100);
        CHECK(idle_bytes <= most);
        CHECK(used_bytes <= most);
    }
    CHECK(write(pair[0], "q", 1) == 1);
    tsrv_watch_stop(&watch);
    state.told = true;
    idle_turns(&state, 0);
    CHECK(waitpid(child, NULL, 0) == child);
    close(pair[0]);
    close_server();
}

/* ---- no allocation in the steady state -----------------------------------------------------*/

static void client_steady(int port, void *context)
{
    static char lines[64 * 20], back[64 * 20];
    int fd = t_connect(port);
    (void)context;
    memset(lines, 'y', sizeof lines);
    for (size_t i = 63; i < sizeof lines; i += 64) {
        lines[i] = '\n';
    }
    for (int phase = 0; phase < 2; phase++) {
        long before = 0;
        for (int i = 0; i < 1100; i++) {
            if (i == 100) {
                before = __atomic_load_n(&c_memory, __ATOMIC_RELAXED);
            }
            if (phase == 0) {
                echo_64(fd);
            } else {
                t_send(fd, lines, sizeof lines);
                CHECK_INT(t_recv(fd, back, sizeof back), sizeof back);
                CHECK(memcmp(lines, back, sizeof back) == 0);
            }
        }
        CHECK_INT(__atomic_load_n(&c_memory, __ATOMIC_RELAXED) - before, 0);
    }
    t_close(fd);
}

TEST_SOFT(no_allocation_in_the_steady_state)
{
    t_case c = {.handler = echo_lines, .client = client_steady};
    t_seen = c_seen;
    t_run(&c);
    CHECK(c_memory > 0);
}

/* ---- servers that cannot be made -------------------------------------------------------------*/

/* Each allocation fails once: nothing is left, which the harness counts. */
TEST_ONCE(a_server_that_cannot_be_made_leaves_nothing)
{
    tsrv_server_options options = {0};
    tsrv_server *server = (tsrv_server *)&options;
    int rc = -ENOMEM;
    options.handle_stream = echo_lines;
    options.proxy_protocol = TSRV_PROXY_REQUIRED;
    options.proxy_from = "10.0.0.0/8, ::1 unix:";
    for (long at = 1; rc != TSRV_OK; at++) {
        CHECK(at < 20);
        t_fail_call("malloc", 0, at, false);
        rc = tsrv_server_new(&server, &options);
        t_fault_at = 0;
        CHECK_INT(rc, t_fault_hits > 0 ? -ENOMEM : TSRV_OK);
        CHECK((server != NULL) == (rc == TSRV_OK));
    }
    tsrv_server_free(server);
}

/* A stop takes those who wait, however many are refused; but it is not held for ever. */
TEST_ONCE(stop_is_not_held_by_a_crowd_without_end)
{
    tsrv_server_options options = {0};
    options.proxy_protocol = TSRV_PROXY_REQUIRED;
    options.proxy_from = "10.0.0.0/8"; /* which refuses them all */
    s_open_with(echo_lines, options);
    __atomic_fetch_or(&tsrvi_process.without, TSRVI_WITHOUT_ACCEPT4, __ATOMIC_RELAXED);
    crowded = true;
    tsrv_server_stop(s_server);
    crowded = false;
    CHECK_INT(crowd_size, TSRVI_LAST);
    CHECK_INT(s_stats().refused, TSRVI_LAST);
    s_close();
}

/* Nor does a bind, at whatever call it fails: the socket of the other family goes too. */
TEST_ONCE(a_bind_that_fails_leaves_no_socket)
{
    tsrv_server_options options = {0};
    int before = t_open_fds(), errors = 0;
    bool failed = true;
    options.handle_stream = echo_lines;
    tsrv_set_log(t_no_log, NULL);
    for (long at = 1; failed; at++) {
        tsrv_server *server;
        CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
        t_fail_call(NULL, ENOBUFS, at, false);
        int rc = tsrv_server_bind(server, 0, NULL, NULL);
        failed = t_fault_hits > 0;
        t_fault_at = 0;
        CHECK(rc == TSRV_OK || failed);
        if (rc < 0) {
            CHECK_INT(t_open_fds(), before);
            errors++;
        }
        tsrv_server_free(server);
        CHECK_INT(t_open_fds(), before);
    }
    CHECK(errors >= 8);
}

TEST_ONCE(what_is_no_network_is_refused)
{
    static const char *const bad[] = {"10.0.0.0/33", "::1/129", "10.0.0.0/-1", "10.0.0.0/", "x", "1.2.3.4, 5",
                                      "1111:2222:3333:4444:5555:6666:7777:8888:9999:aaaa:bbbb:cccc:dddd:eeee"};
    tsrv_server_options options = {0};
    tsrv_server *server;
    options.handle_stream = echo_lines;
    options.proxy_protocol = TSRV_PROXY_REQUIRED;
    for (size_t i = 0; i < COUNT(bad); i++) {
        options.proxy_from = bad[i];
        CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
        CHECK(server == NULL);
    }
    options.proxy_from = "0.0.0.0/0,::/128\t1.2.3.4/32";
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    tsrv_server_free(server);
    options.proxy_protocol = TSRV_PROXY_NONE; /* from whom, if nobody? */
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_EINVAL);
}
