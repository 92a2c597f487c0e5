/* Figures that the library promises, checked: system calls and allocations per message, linear work,
 * memory per connection, bounded memory, fairness. The figures are printed; failing tests show them. */
#include "test.h"

#include <sys/resource.h>

/* ---- counters -----------------------------------------------------------------------------*/

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

static int handle_echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address;
    (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK &&
           (rc = tsrv_write(stream, line.data, line.size)) == TSRV_OK) {
    }
    return rc;
}

/* For tests that turn the loop themselves. Returns the port.
 *   more  other options than the handler; NULL = none */
static int open_server(tsrv_handler handler, const tsrv_server_options *more)
{
    tsrv_server_options options = {0};
    tsrv_bind_options bind_options = {.backlog = 4096};
    tsrv_address address;
    if (more != NULL) {
        options = *more;
    }
    t_loop = t_new_loop();
    options.mode = t_mode;
    options.handle_stream = handler;
    options.loop = t_loop;
    CHECK_INT(tsrv_server_new(&t_server, &options), TSRV_OK);
    CHECK_INT(tsrv_server_listen(t_server, 0, "127.0.0.1", &bind_options), TSRV_OK);
    CHECK_INT(tsrv_server_address(t_server, 0, &address), TSRV_OK);
    return tsrv_address_port(&address);
}

static void close_server(void)
{
    tsrv_server_free(t_server);
    CHECK_INT(tsrv_loop_free(t_loop), TSRV_OK);
    t_server = NULL;
    t_loop = NULL;
}

/* A line of 64 bytes, echoed. */
static void round_trip(int fd)
{
    static const char line[] = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n";
    t_sends(fd, line);
    t_expect(fd, line);
}

/* ---- (a) system calls ---------------------------------------------------------------------*/

static void client_calls(int port, void *context)
{
    enum { ROUNDS = 2000 };
    int fd = t_connect(port);
    (void)context;
    round_trip(fd);
    long calls = __atomic_load_n(&c_calls, __ATOMIC_RELAXED), control = c_control;
    for (int i = 0; i < ROUNDS; i++) {
        round_trip(fd);
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
    t_case c = {.handler = handle_echo, .client = client_calls};
    t_seen = c_seen;
    t_run(&c);
}

enum { CHURN = 800, AT_ONCE = 8 };

/* Turns until the server has received so many bytes in all, and so many connections are open. */
static void turns_until(uint64_t bytes, uint64_t open)
{
    int64_t end = t_now_ms() + T_PATIENCE * 1000 * t_scale();
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
    int port = open_server(handle_echo, NULL);
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

/* ---- (b) linear work ----------------------------------------------------------------------*/

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

/* ---- (c) memory of idle connections ---------------------------------------------------------*/

TEST_ONCE(a_stream_is_small)
{
    printf("%zu bytes\n", sizeof(tsrv_stream));
    CHECK(sizeof(void *) > 8 || sizeof(tsrv_stream) <= 216);
}

/* Resident bytes of this process, without those of files: pages of the program that are run for the
 * first time are not what a connection costs. -1 where they cannot be read. */
static long resident(void)
{
    long pages = -1, files;
    FILE *file = fopen("/proc/self/statm", "r");
    if (file != NULL) {
        if (fscanf(file, "%*d %ld %ld", &pages, &files) != 2) {
            pages = -1;
        } else {
            pages -= files;
        }
        fclose(file);
    }
    return pages < 0 ? -1 : pages * sysconf(_SC_PAGESIZE);
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
            round_trip(fds[i]);
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
    int64_t end = t_now_ms() + T_PATIENCE * 1000 * t_scale();
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
    int port = open_server(handle_echo, NULL);
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

/* ---- (d) fairness -------------------------------------------------------------------------*/

static volatile bool flood_over;

static void *flood_send(void *context)
{
    static char lines[65536];
    int fd = *(int *)context;
    memset(lines, '\n', sizeof lines);
    while (!flood_over) {
        if (send(fd, lines, sizeof lines, T_NOSIGNAL) < 0) {
            break;
        }
    }
    shutdown(fd, SHUT_RDWR);
    return NULL;
}

static volatile bool timer_fired;

static void on_timer(void *context)
{
    (void)context;
    timer_fired = true;
}

static void start_timer(tsrv_server *server, void *context)
{
    static tsrv_timer timer;
    (void)server;
    (void)context;
    CHECK_INT(tsrv_timer_start(t_loop, &timer, 50, on_timer, NULL), TSRV_OK);
}

enum { FIRINGS = 200 };

static volatile int firings;
static int reads, most_reads; /* between two firings */
static tsrv_timer turn_timer;
static bool turn_timer_runs;

/* Once in every turn; those without a read do not count. */
static void on_turn(void *context)
{
    firings += reads > 0;
    reads = 0;
    if (firings < FIRINGS) {
        CHECK_INT(tsrv_timer_start(t_loop, &turn_timer, 0, on_turn, context), TSRV_OK);
    }
}

/* The peer floods, so that the reads find something: only the loop's budget ends its turn. */
static int handle_greedy(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc = TSRV_OK;
    (void)address;
    if (!turn_timer_runs) {
        turn_timer_runs = true;
        on_turn(context);
    }
    while (firings < FIRINGS && (rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        reads++;
        most_reads = reads > most_reads ? reads : most_reads;
    }
    return rc;
}

static void client_greedy(int port, void *context)
{
    pthread_t sender;
    int fd = t_connect(port);
    (void)context;
    CHECK(pthread_create(&sender, NULL, flood_send, &fd) == 0);
    t_expect_eof(fd);
    flood_over = true;
    CHECK(pthread_join(sender, NULL) == 0);
    t_close(fd);
}

TEST_SOFT(a_flooded_handler_does_not_starve_a_timer)
{
    t_case c = {.handler = handle_greedy, .client = client_greedy};
    firings = reads = most_reads = 0;
    turn_timer_runs = false;
    flood_over = false;
    t_run(&c);
    CHECK_INT(firings, FIRINGS);
    printf("at most %d reads between two firings\n", most_reads);
    CHECK(most_reads > 0 && most_reads <= 600); /* twice the budget: last in a turn, first in the next */
}

/* Its calls complete at once, for ever, without any input. */
static int handle_empty(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address;
    (void)context;
    for (long calls = 0; calls < 50000000; calls++) {
        if (timer_fired) {
            return TSRV_OK;
        }
        rc = tsrv_read_bytes(stream, 0, &line);
        if (rc != TSRV_OK) {
            return rc;
        }
    }
    T_FAIL("the timer was starved");
}

static void client_empty(int port, void *context)
{
    int fd = t_connect(port);
    (void)context;
    t_sends(fd, "go\n");
    t_shut(fd);
    t_expect_eof(fd);
    t_close(fd);
}

TEST_SOFT(empty_reads_do_not_starve_a_timer)
{
    t_case c = {.handler = handle_empty, .client = client_empty};
    timer_fired = false;
    c.options.on_start = start_timer;
    t_run(&c);
    CHECK(timer_fired);
}

/* ---- (e) bounded memory ---------------------------------------------------------------------*/

static long most_resident, first_resident;

static void look_resident(void *context)
{
    long now = resident();
    (void)context;
    most_resident = now > most_resident ? now : most_resident;
}

/* It sends as long as the server takes it: blocked for 200 ms is the end, as is all of 64 MiB. */
static void client_never_reads(int port, void *context)
{
    static char lines[1 << 20];
    struct timeval patience = {0, 200000};
    size_t sent = 0;
    int fd = t_connect(port);
    (void)context;
    memset(lines, 'x', sizeof lines);
    for (size_t i = 63; i < sizeof lines; i += 64) {
        lines[i] = '\n';
    }
    t_on_loop(look_resident, NULL);
    first_resident = resident();
    CHECK(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) == 0);
    while (sent < 64u << 20) {
        ssize_t n = send(fd, lines, sizeof lines, T_NOSIGNAL);
        if (n <= 0) {
            break;
        }
        sent += (size_t)n;
        t_on_loop(look_resident, NULL);
    }
    printf("sent %zu KiB, grown by %ld KiB\n", sent >> 10, (most_resident - first_resident) >> 10);
    CHECK(sent < 64u << 20);
    t_reset(fd);
}

TEST_SOFT(a_peer_that_never_reads_costs_bounded_memory)
{
    t_case c = {.handler = handle_echo, .on_close = t_record_reason, .client = client_never_reads};
    most_resident = 0;
    t_run(&c);
    if (!TSRVI_HAS_ASAN && !TSRVI_HAS_TSAN && first_resident > 0) {
        CHECK(most_resident - first_resident < 4l << 20);
    }
}

/* ---- (f) no allocation in the steady state ----------------------------------------------------*/

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
                round_trip(fd);
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
    t_case c = {.handler = handle_echo, .client = client_steady};
    t_seen = c_seen;
    t_run(&c);
    CHECK(c_memory > 0);
}
