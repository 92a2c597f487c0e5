/* Peers that mean harm, or behave as if they did: each test is a way in which libraries of this kind
 * have failed. The process's CPU time, log lines, latencies and bytes of memory are measured, and
 * printed when a test fails. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "seam.h"

/* ---- bytes of memory ------------------------------------------------------------------------*/

enum { H_HEAD = 32 }; /* bytes before each allocation, for its size */

static long h_live; /* bytes; atomic, as are all counters below */
static long h_most; /* at any moment since h_forget */

static void *h_counted(char *memory, size_t size)
{
    long live;
    if (memory == NULL) {
        return NULL;
    }
    memcpy(memory, &size, sizeof size);
    live = __atomic_add_fetch(&h_live, (long)size, __ATOMIC_RELAXED);
    if (live > __atomic_load_n(&h_most, __ATOMIC_RELAXED)) {
        __atomic_store_n(&h_most, live, __ATOMIC_RELAXED);
    }
    return memory + H_HEAD;
}

/* The allocation itself; it is not counted any more. */
static char *h_uncounted(void *memory)
{
    size_t size;
    char *head = (char *)memory;
    if (head == NULL) {
        return NULL;
    }
    head -= H_HEAD;
    memcpy(&size, head, sizeof size);
    __atomic_sub_fetch(&h_live, (long)size, __ATOMIC_RELAXED);
    return head;
}

static void *h_malloc(size_t size)
{
    return h_counted((char *)t_malloc(size + H_HEAD), size);
}

static void *h_realloc(void *old, size_t size)
{
    char *head = h_uncounted(old);
    char *memory = (char *)t_realloc(head, size + H_HEAD);
    if (memory == NULL && head != NULL) {
        size_t before;
        memcpy(&before, head, sizeof before);
        h_counted(head, before);
    }
    return h_counted(memory, size);
}

static void h_free(void *memory)
{
    t_free(h_uncounted(memory));
}

#undef TSRV_MALLOC
#undef TSRV_REALLOC
#undef TSRV_FREE
#define TSRV_MALLOC(size) h_malloc(size)
#define TSRV_REALLOC(pointer, size) h_realloc(pointer, size)
#define TSRV_FREE(pointer) h_free(pointer)

#include "test.h"

#include <sys/ioctl.h>
#include <sys/resource.h>

/* ---- helpers --------------------------------------------------------------------------------*/

/* All but the hard variants, which would only be slow or measure something else. */
#define SOFT_ONLY()                                                                                \
    do {                                                                                           \
        if (t_hard) {                                                                              \
            return;                                                                                \
        }                                                                                          \
    } while (0)

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

static size_t bulk(size_t soft, size_t hard)
{
    return t_hard ? hard : soft;
}

/* From now on h_most is the most since now. */
static void h_forget(void)
{
    __atomic_store_n(&h_most, __atomic_load_n(&h_live, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
}

static long h_grown_since(long before)
{
    return __atomic_load_n(&h_most, __ATOMIC_RELAXED) - before;
}

static int64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static int64_t cpu_ms(void)
{
    struct timespec used;
    CHECK(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used) == 0);
    return (int64_t)used.tv_sec * 1000 + used.tv_nsec / 1000000;
}

static int log_lines;

static void count_line(int level, const char *message, void *context)
{
    (void)context;
    if (level <= TSRV_LOG_WARNING) {
        __atomic_add_fetch(&log_lines, 1, __ATOMIC_RELAXED);
        printf("log: %s\n", message);
    }
}

static int logged(void)
{
    return __atomic_load_n(&log_lines, __ATOMIC_RELAXED);
}

static int entered; /* connections whose handler has been called */

static void note_entered(void)
{
    __atomic_add_fetch(&entered, 1, __ATOMIC_RELAXED);
}

static void record_reason(tsrv_stream *stream, int reason, void *context)
{
    (void)stream;
    (void)context;
    t_record(reason);
}

static void copy_stats(void *context)
{
    tsrv_server_stats(t_server, (tsrv_stats *)context);
}

static tsrv_stats server_stats(void)
{
    tsrv_stats stats;
    t_on_loop(copy_stats, &stats);
    return stats;
}

static void nothing(void *context)
{
    (void)context;
}

static bool has_received(void *bytes)
{
    return server_stats().bytes_in >= *(uint64_t *)bytes;
}

/* Waits until the server has received so many bytes in all. */
static void wait_received(uint64_t bytes)
{
    if (!t_wait_until(has_received, &bytes)) {
        T_FAIL("the server has received %llu of %llu bytes",
               (unsigned long long)server_stats().bytes_in, (unsigned long long)bytes);
    }
}

/* What a quiet server holds: a leak makes one of these grow. The pool and the shared chunk, which
 * the loop keeps for later, are left out. */
typedef struct balance {
    long allocations;
    int fds;
    uint64_t open;
} balance;

static void take_balance(void *context)
{
    balance *b = (balance *)context;
    b->allocations = t_live_allocations - t_loop->pool.count - (t_loop->chunk != NULL);
    b->fds = t_open_fds();
    b->open = t_server->stats->open;
}

static void check_balance(const balance *before, const char *name)
{
    balance now;
    t_on_loop(take_balance, &now);
    if (now.allocations != before->allocations || now.fds != before->fds ||
        now.open != before->open) {
        T_FAIL("after \"%s\": %ld allocations (%ld before), %d descriptors (%d), %d open (%d)", name,
               now.allocations, before->allocations, now.fds, before->fds, (int)now.open,
               (int)before->open);
    }
}

/* The loop, held so that a client can be faster than it. */
typedef struct hold {
    int told[2];
    int go[2];
} hold;

static void hold_here(void *context)
{
    hold *h = (hold *)context;
    char byte;
    CHECK(write(h->told[1], "", 1) == 1);
    CHECK(read(h->go[0], &byte, 1) == 1);
}

static void hold_loop(hold *h)
{
    char byte;
    CHECK(pipe(h->told) == 0 && pipe(h->go) == 0);
    CHECK_INT(tsrv_loop_post(t_loop, hold_here, h), TSRV_OK);
    CHECK(read(h->told[0], &byte, 1) == 1);
}

static void release_loop(hold *h)
{
    CHECK(write(h->go[1], "", 1) == 1);
    t_on_loop(nothing, NULL);
    for (int i = 0; i < 2; i++) {
        t_close(h->told[i]);
        t_close(h->go[i]);
    }
}

/* Byte i of every large transfer, so that loss, order and repetition show. */
static char pattern_at(size_t i)
{
    return (char)('a' + (i ^ (i >> 8) ^ (i >> 16)) % 26);
}

static void fill_pattern(char *data, size_t offset, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        data[i] = pattern_at(offset + i);
    }
}

static char *new_pattern(size_t size)
{
    char *data = (char *)malloc(size + 1);
    CHECK(data != NULL);
    fill_pattern(data, 0, size);
    return data;
}

static void expect_pattern_from(int fd, size_t offset, size_t end)
{
    static char actual[65536], expected[65536];
    while (offset < end) {
        size_t part = end - offset < sizeof actual ? end - offset : sizeof actual;
        size_t received = t_recv(fd, actual, part);
        fill_pattern(expected, offset, part);
        CHECK_MEM(actual, received, expected, part);
        offset += part;
    }
}

/* FIN and nothing behind it: no reset follows. */
static void expect_clean_end(int fd)
{
    int error = 0;
    socklen_t size = sizeof error;
    t_expect_eof(fd);
    CHECK(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0);
    CHECK_INT(error, 0);
    t_expect_eof(fd);
}

/* Makes the kernel take little, so that output piles up in the library. */
static void limit_output(tsrv_stream *stream)
{
    int size = 16384;
    if (tsrv_fd(stream) >= 0) {
        CHECK(setsockopt(tsrv_fd(stream), SOL_SOCKET, SO_SNDBUF, &size, sizeof size) == 0);
    }
}

static void load_unsent(void *context)
{
    tsrv_stream *stream = tsrv_server_next(t_server, NULL);
    *(size_t *)context = stream != NULL ? tsrv_unsent_size(stream) : 0;
}

static bool has_unsent(void *context)
{
    size_t unsent = 0;
    (void)context;
    t_on_loop(load_unsent, &unsent);
    return unsent > 0;
}

static int echo_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
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

static int echo_bytes(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice some;
    int rc;
    (void)address;
    (void)context;
    while ((rc = tsrv_read_some(stream, 0, &some)) == TSRV_OK &&
           (rc = tsrv_write(stream, some.data, some.size)) == TSRV_OK) {
    }
    return rc;
}

static void round_trip(int fd)
{
    t_sends(fd, "hello\n");
    t_expect(fd, "hello\n");
}

/* ---- (1) more clients than the server can hold ----------------------------------------------*/

enum { CROWD = 80 };

typedef struct crowd_order {
    int port;
    int open;        /* how many of them the server can hold */
    int duration_ms; /* of the wait */
} crowd_order;

typedef struct crowd_report {
    int pings;         /* round trips of open connections during the wait */
    int longest_ms;    /* of them */
    int first_wait_ms; /* from the first end of a connection to the next one's service */
    int longest_wait_ms;
    int served;
} crowd_report;

typedef struct crowd {
    int control; /* a socket to the process of the clients */
    int limit;   /* max_connections; 0 = as many as there are descriptors */
    int duration_ms;
} crowd;

static void crowd_line(int index, char line[16])
{
    snprintf(line, 16, "client %d\n", index);
}

/* The next one that is answered within time. */
static int crowd_answered(const int *fds, bool *served, int timeout_ms)
{
    struct pollfd ready[CROWD];
    char line[16];
    for (int i = 0; i < CROWD; i++) {
        ready[i].fd = served[i] ? -1 : fds[i];
        ready[i].events = POLLIN;
        ready[i].revents = 0;
    }
    if (poll(ready, CROWD, timeout_ms) <= 0) {
        return -1;
    }
    for (int i = 0; i < CROWD; i++) {
        if (ready[i].revents != 0) {
            crowd_line(i, line);
            t_expect(fds[i], line);
            served[i] = true;
            return i;
        }
    }
    return -1;
}

/* Those that are open are served on while the others wait, and no other is. */
static void crowd_wait(const int *fds, bool *served, const crowd_order *order, crowd_report *report)
{
    int64_t end = t_now_ms() + order->duration_ms;
    while (t_now_ms() < end) {
        int64_t start = t_now_ms();
        round_trip(fds[report->pings++ % order->open]);
        int took = (int)(t_now_ms() - start);
        report->longest_ms = took > report->longest_ms ? took : report->longest_ms;
        CHECK_INT(crowd_answered(fds, served, 20), -1);
    }
}

/* One after the other ends, and the one that has waited longest takes its place at once. */
static void crowd_replace(const int *fds, bool *served, const crowd_order *order,
                          crowd_report *report)
{
    for (int gone = 0; report->served < CROWD; gone++) {
        int64_t start = t_now_ms();
        if (gone == 0) {
            t_close(fds[gone]);
        } else {
            t_reset(fds[gone]);
        }
        CHECK_INT(crowd_answered(fds, served, T_PATIENCE * 1000 * t_scale()), report->served);
        int took = (int)(t_now_ms() - start);
        report->first_wait_ms = gone == 0 ? took : report->first_wait_ms;
        report->longest_wait_ms = took > report->longest_wait_ms ? took : report->longest_wait_ms;
        report->served++;
    }
    for (int i = CROWD - order->open; i < CROWD; i++) {
        t_reset(fds[i]);
    }
}

/* The process of the clients, which has descriptors and CPU time of its own. */
__attribute__((noreturn)) static void crowd_process(int control)
{
    static int fds[CROWD];
    static bool served[CROWD];
    crowd_order order;
    crowd_report report = {0, 0, 0, 0, 0};
    char line[16];
    CHECK(read(control, &order, sizeof order) == sizeof order);
    for (int i = 0; i < CROWD; i++) {
        fds[i] = t_connect(order.port);
        crowd_line(i, line);
        t_sends(fds[i], line);
    }
    for (; report.served < order.open; report.served++) { /* the first ones, in any order */
        int first = crowd_answered(fds, served, T_PATIENCE * 1000 * t_scale());
        CHECK(first >= 0 && first < order.open);
    }
    CHECK(write(control, "s", 1) == 1);
    crowd_wait(fds, served, &order, &report);
    CHECK(write(control, "e", 1) == 1);
    crowd_replace(fds, served, &order, &report);
    CHECK(write(control, &report, sizeof report) == sizeof report);
    _exit(0);
}

static void crowd_expect(int control, char letter)
{
    char got = 0;
    if (read(control, &got, 1) != 1) {
        T_FAIL("the clients have failed");
    }
    CHECK_INT(got, letter);
}

/* While others wait the server sleeps: what it uses is for the round trips. */
static void crowd_client(int port, void *context)
{
    crowd *c = (crowd *)context;
    crowd_order order = {port, c->limit, c->duration_ms};
    crowd_report report;
    struct rlimit limit;
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    for (int fd = 0; c->limit == 0 && fd < (int)limit.rlim_cur; fd++) {
        order.open += fcntl(fd, F_GETFD) < 0;
    }
    CHECK(order.open > 10 && order.open < CROWD / 2);
    CHECK(write(c->control, &order, sizeof order) == sizeof order);
    crowd_expect(c->control, 's');
    int64_t cpu = cpu_ms();
    crowd_expect(c->control, 'e');
    cpu = cpu_ms() - cpu;
    if (read(c->control, &report, sizeof report) != sizeof report) {
        T_FAIL("the clients have failed");
    }
    printf("%d of %d open: %d ms of CPU in %d ms, %d log lines, %d pings, the longest %d ms; the first "
           "one freed: served after %d ms, the longest %d ms\n",
           order.open, CROWD, (int)cpu, c->duration_ms, logged(), report.pings, report.longest_ms,
           report.first_wait_ms, report.longest_wait_ms);
    CHECK_NEAR_MS(cpu, 0, c->duration_ms * 2 / 100);
    CHECK(logged() < 10);
    CHECK(logged() >= (c->limit == 0)); /* shortage is worth a line */
    CHECK(report.pings * t_scale() >= c->duration_ms / 100);
    CHECK_NEAR_MS(report.longest_ms, 0, 200);
    CHECK_NEAR_MS(report.first_wait_ms, 0, 100);
    CHECK_NEAR_MS(report.longest_wait_ms, 0, 100);
    CHECK_INT(report.served, CROWD);
    limit.rlim_cur = limit.rlim_max; /* t_on_loop needs descriptors too */
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    tsrv_stats stats = server_stats();
    CHECK_INT(stats.accepted, CROWD);
    CHECK_INT(stats.accept_errors, 0);
    CHECK(stats.accept_pauses >= 1);
}

static void run_crowd(crowd *c, int descriptors)
{
    t_case test = {.handler = echo_lines, .client = crowd_client, .context = c};
    struct rlimit before, low;
    int pair[2], status = 0;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    fflush(NULL);
    pid_t process = fork();
    CHECK(process >= 0);
    if (process == 0) {
        close(pair[0]);
        crowd_process(pair[1]);
    }
    t_close(pair[1]);
    c->control = pair[0];
    CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0);
    low = before;
    low.rlim_cur = (rlim_t)descriptors;
    CHECK(descriptors == 0 || setrlimit(RLIMIT_NOFILE, &low) == 0);
    tsrv_set_log(count_line, NULL);
    test.options.max_connections = c->limit;
    t_run(&test);
    tsrv_set_log(NULL, NULL);
    CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
    t_close(pair[0]);
    CHECK(waitpid(process, &status, 0) == process);
    CHECK_INT(status, 0);
}

#ifndef TSRV_VALGRIND /* which keeps descriptors of its own, and a limit of its own */
/* Of ten peers seven spin at the limit of descriptors, at 50 to 100 % of a core, and three flood
 * their log; one drops the clients that wait. */
TEST_STREAM(a_crowd_beyond_the_limit_of_descriptors_waits)
{
    crowd c = {-1, 0, 2000};
    SOFT_ONLY();
    run_crowd(&c, 40);
}
#endif

TEST_STREAM(a_crowd_beyond_max_connections_waits)
{
    crowd c = {-1, 20, 1000};
    SOFT_ONLY();
    run_crowd(&c, 0);
}

#if TSRVI_HAS_ACCEPT4
#define ACCEPT "accept4"
#else
#define ACCEPT "accept"
#endif

static int accepts;     /* calls of accept; on the loop's thread */
static int accept_stop; /* after so many calls they work again; 0 = never */

static void see_accept(const char *name)
{
    if (strcmp(name, ACCEPT) == 0 && accepts++ == accept_stop && accept_stop != 0) {
        t_fault_at = 0;
    }
}

/* From now on accept fails with that error, so many times; 0 = always. */
typedef struct accept_fault {
    int code;
    int times;
} accept_fault;

static void break_accept(void *context)
{
    accept_fault *fault = (accept_fault *)context;
    accepts = 0;
    accept_stop = fault->times;
    t_fault_name = ACCEPT;
    t_fault_errno = fault->code;
    t_fault_sticky = true;
    t_fault_calls = 0;
    t_fault_at = 1;
}

static void mend_accept(void *context)
{
    t_fault_at = 0;
    *(int *)context = accepts;
}

static bool none_open(void *context)
{
    (void)context;
    return server_stats().open == 0;
}

/* The waits double from 50 ms: tries at 0, 50, 150, 350 and 750 ms. */
static void shortage_once(int port, int code)
{
    enum { WAIT_MS = 400 };
    accept_fault fault = {code, 0};
    int open = t_connect(port), other = t_connect(port), calls = 0, lines = logged();
    round_trip(open);
    round_trip(other);
    t_on_loop(break_accept, &fault);
    int waiting = t_connect(port);
    t_sends(waiting, "hello\n");
    int64_t start = t_now_ms(), cpu = cpu_ms();
    while (t_now_ms() - start < WAIT_MS) {
        round_trip(open);
        poll(NULL, 0, 10);
    }
    cpu = cpu_ms() - cpu;
    t_on_loop(mend_accept, &calls);
    start = t_now_ms();
    t_reset(other);
    t_expect(waiting, "hello\n");
    printf("%s: %d calls of accept, %d ms of CPU, then served after %d ms\n", strerror(code), calls,
           (int)cpu, (int)(t_now_ms() - start));
    CHECK(calls >= 2 && calls <= 5 * t_scale());
    CHECK_NEAR_MS(t_now_ms() - start, 0, 100);
    CHECK_NEAR_MS(cpu, 0, WAIT_MS / 8); /* the client's share included */
    CHECK(logged() <= lines + 1 * t_scale());
    t_reset(waiting);
    t_reset(open);
    CHECK(t_wait_until(none_open, NULL)); /* else their ends would end the next pause */
}

/* It goes on by itself too: what was missing may come from elsewhere. */
static void shortage_alone(int port, int code)
{
    accept_fault fault = {code, 3};
    t_on_loop(break_accept, &fault);
    int64_t start = t_now_ms();
    int fd = t_connect(port);
    round_trip(fd);
    CHECK_NEAR_MS(t_now_ms() - start, 340, 800);
    t_reset(fd);
    CHECK(t_wait_until(none_open, NULL));
}

static void shortage_client(int port, void *context)
{
    static const int codes[] = {ENFILE, ENOBUFS, ENOMEM};
    (void)context;
    for (size_t i = 0; i < COUNT(codes); i++) {
        shortage_once(port, codes[i]);
        shortage_alone(port, codes[i]);
    }
    CHECK(logged() >= 1);
    tsrv_stats stats = server_stats();
    CHECK_INT(stats.accept_errors, 0);
    CHECK(stats.accept_pauses >= 2 * COUNT(codes));
}

TEST_STREAM(a_shortage_in_accept_pauses_it)
{
    t_case c = {.handler = echo_lines, .client = shortage_client};
    SOFT_ONLY();
    t_seen = see_accept;
    tsrv_set_log(count_line, NULL);
    t_run(&c);
    tsrv_set_log(NULL, NULL);
}

/* Each of the connections before was lost, and none after it has to wait for that. */
static void lost_client(int port, void *context)
{
    enum { TIMES = 20 };
    /* EPERM, of a firewall, is also what a policy answers: see accept_test. */
    static const int codes[] = {ECONNABORTED, EPROTO,     ENETDOWN,    EHOSTUNREACH,
                                ENETUNREACH,  EOPNOTSUPP, ENOPROTOOPT, ETIMEDOUT};
    (void)context;
    for (size_t i = 0; i < COUNT(codes); i++) {
        accept_fault fault = {codes[i], TIMES};
        t_on_loop(break_accept, &fault);
        int64_t start = t_now_ms();
        int fd = t_connect(port);
        round_trip(fd);
        printf("%s: served after %d ms\n", strerror(codes[i]), (int)(t_now_ms() - start));
        CHECK_NEAR_MS(t_now_ms() - start, 0, 100);
        t_reset(fd);
        tsrv_stats stats = server_stats();
        CHECK_INT(stats.accept_errors, (i + 1) * TIMES);
        CHECK_INT(stats.accept_pauses, 0);
    }
    CHECK_INT(logged(), 0);
}

TEST_STREAM(connections_lost_before_accept_pause_nothing)
{
    t_case c = {.handler = echo_lines, .client = lost_client};
    t_seen = see_accept;
    tsrv_set_log(count_line, NULL);
    t_run(&c);
    tsrv_set_log(NULL, NULL);
}

/* ---- (2) a peer that sends and never reads ---------------------------------------------------*/

enum { MARK = 64 << 10, MOST_INPUT = 128 << 10, CHUNK = 16 << 10, STALL_MS = 300 };

/* Writes what it reads. The limits are small, so that exceeding them shows. */
static int echo_limited(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    limit_output(stream);
    return echo_bytes(stream, address, context);
}

static void never_reads(int port, void *context)
{
    static char data[1 << 16];
    size_t sent = 0, all = (size_t)64 << 20;
    int fd = t_connect_with_room(port, t_hard ? CHUNK : 0); /* byte by byte, the system's takes minutes to fill */
    (void)context;
    t_on_loop(nothing, NULL);
    long before = __atomic_load_n(&h_live, __ATOMIC_RELAXED);
    h_forget();
    int64_t start = t_now_ms(), last = start;
    while (sent < all) {
        ssize_t n = send(fd, data, sizeof data, T_NOSIGNAL);
        if (n <= 0) {
            CHECK(n < 0 && (errno == ECONNRESET || errno == EPIPE));
            break;
        }
        sent += (size_t)n;
        last = n == sizeof data ? t_now_ms() : last; /* less: the end came meanwhile */
    }
    t_wait_records(1);
    int64_t now = t_now_ms();
    printf("%zu KiB were taken, memory grew by %ld KiB; ended %d ms after the last byte\n", sent >> 10,
           h_grown_since(before) >> 10, (int)(now - last));
    CHECK(sent < all);
    CHECK(h_grown_since(before) <= MARK + MOST_INPUT + 3 * CHUNK);
    CHECK_NEAR_MS(now - start, STALL_MS, 10000);
    /* Read in small pieces, what the kernel had taken lasts longer. */
    CHECK_NEAR_MS(now - last, 0, t_hard ? 10000 : STALL_MS + 1000);
    t_close(fd);
}

/* Four peers grow until memory ends. */
TEST_STREAM(a_peer_that_never_reads_is_bounded_and_ended)
{
    t_case c = {.handler = echo_limited, .on_close = record_reason, .client = never_reads};
    c.options.write_high_water = MARK;
    c.options.max_buffer_size = MOST_INPUT;
    c.options.read_chunk_size = bulk(CHUNK, 1);
    c.options.write_timeout_ms = STALL_MS;
    t_run(&c);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), TSRV_ETIMEOUT);
}

/* ---- (3) half-close ---------------------------------------------------------------------------*/

static int echo_until_end(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc = echo_bytes(stream, address, NULL);
    (void)context;
    if (rc == TSRV_EOF) {
        t_record(1);
    }
    return rc;
}

typedef struct sender {
    int fd;
    size_t size;
} sender;

static void *send_and_shut(void *context)
{
    sender *s = (sender *)context;
    char *data = new_pattern(s->size);
    t_send(s->fd, data, s->size);
    t_shut(s->fd);
    free(data);
    return NULL;
}

/* What fits into the kernel is only read after the server has seen the end: its answer comes behind
 * the FIN. */
static void half_close_once(int port, size_t size)
{
    sender s = {t_connect(port), size};
    pthread_t thread;
    CHECK_INT(pthread_create(&thread, NULL, send_and_shut, &s), 0);
    if (size <= 65536) {
        t_wait_records(1);
    } else if (!t_hard) {
        CHECK(t_wait_until(has_unsent, NULL)); /* all the buffers in between are full */
    }
    expect_pattern_from(s.fd, 0, size);
    expect_clean_end(s.fd);
    CHECK_INT(pthread_join(thread, NULL), 0);
    t_close(s.fd);
    t_wait_records(2);
    CHECK_INT(t_recorded(0), 1);
    CHECK_INT(t_recorded(1), TSRV_EOF);
    t_records_used = 0;
}

static void half_close_client(int port, void *context)
{
    (void)context;
    half_close_once(port, 1);
    half_close_once(port, bulk(65536, 8192));
    half_close_once(port, bulk(32 << 20, 256 << 10));
}

/* Three peers take a FIN for the end of the connection, and drop the answer. */
TEST_STREAM(a_half_close_gets_the_whole_answer)
{
    t_case c = {.handler = echo_until_end, .on_close = record_reason, .client = half_close_client};
    t_run(&c);
}

/* ---- (4) an answer with unread input behind it ----------------------------------------------*/

typedef struct unread_case {
    size_t answer;
    size_t junk;  /* before the handler returns; as much follows later */
    char *answer_data;
    int rounds;
} unread_case;

/* It waits until the unread input is in the kernel, so that a plain close would reset for sure. */
static int answer_and_return(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    unread_case *u = (unread_case *)context;
    int *step = (int *)tsrv_data(stream), rc, there = 0;
    (void)address;
    if (*step == 0) {
        if ((rc = tsrv_read_until(stream, "\n", 0, NULL)) != TSRV_OK) {
            return rc;
        }
        *step = 1;
        CHECK_INT(tsrv_write(stream, "ready\n", 6), TSRV_OK);
    }
    if ((rc = tsrv_wait(stream, TSRV_NEVER)) != TSRV_OK) {
        return rc;
    }
    CHECK(ioctl(tsrv_fd(stream), FIONREAD, &there) == 0);
    CHECK(there > 0);
    CHECK_INT(tsrv_write(stream, u->answer_data, u->answer), TSRV_OK);
    return TSRV_OK;
}

static void wake_first(void *context)
{
    (void)context;
    CHECK(tsrv_server_next(t_server, NULL) != NULL);
    tsrv_wake(tsrv_server_next(t_server, NULL));
}

static void unread_client(int port, void *context)
{
    unread_case *u = (unread_case *)context;
    char *junk = new_pattern(u->junk);
    for (int round = 0; round < u->rounds; round++) {
        int fd = t_connect(port);
        t_sends(fd, "go\n");
        t_expect(fd, "ready\n");
        t_send(fd, junk, u->junk);
        t_on_loop(wake_first, NULL);
        expect_pattern_from(fd, 0, u->answer / 2);
        t_send(fd, junk, u->junk);
        expect_pattern_from(fd, u->answer / 2, u->answer);
        expect_clean_end(fd);
        t_close(fd);
        t_wait_records(round + 1);
        CHECK_INT(t_recorded(round), 0);
    }
    free(junk);
}

/* Unread input turns a plain close into a reset, which destroyed the answer 20 times of 20. */
TEST_STREAM(an_answer_survives_unread_input)
{
    unread_case u = {bulk(2 << 20, 128 << 10), bulk(96 << 10, 8 << 10), NULL, (int)bulk(20, 5)};
    t_case c = {.handler = answer_and_return, .on_close = record_reason, .client = unread_client,
                .context = &u};
    u.answer_data = new_pattern(u.answer);
    c.options.data_size = sizeof(int);
    t_run(&c);
    free(u.answer_data);
    CHECK_INT(t_record_count(), u.rounds);
}

/* ---- (5) one byte at a time -------------------------------------------------------------------*/

/* BUSY_MS is what a busy machine may take on top; without the limit it would be half a minute. */
enum { LIMIT_MS = 300, STEP_MS = 50, BUSY_MS = 1000 };

/* Reads lines until one takes too long. */
static int read_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *begun = (bool *)tsrv_data(stream);
    int rc;
    (void)address;
    if (!*begun && *(const char *)context == 'd') {
        tsrv_set_deadline(stream, LIMIT_MS);
    } else if (!*begun && *(const char *)context == 's') {
        tsrv_set_timeout(stream, LIMIT_MS, 0);
    }
    *begun = true;
    while ((rc = tsrv_read_until(stream, "\n", 0, NULL)) == TSRV_OK) {
    }
    return rc;
}

/* Sends a byte every step_ms until the server ends the connection, or limit bytes. Returns when it
 * did, counted from the connect; *last is when the last byte was sent. */
static int64_t trickle(int port, const char *bytes, int step_ms, int limit, int64_t *last)
{
    int64_t start = t_now_ms();
    int fd = t_connect(port), sent = 0;
    struct pollfd end = {fd, POLLIN, 0};
    do {
        if (sent < limit) {
            t_send(fd, &bytes[sent % (int)strlen(bytes)], 1);
            *last = t_now_ms() - start;
            sent++;
        }
    } while (poll(&end, 1, sent < limit ? step_ms : T_PATIENCE * 1000 * t_scale()) == 0);
    int64_t took = t_now_ms() - start;
    t_expect_eof(fd);
    t_close(fd);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), TSRV_ETIMEOUT);
    return took;
}

static void trickle_client(int port, void *context)
{
    int64_t last = 0;
    bool lines = *(const char *)context == 'd';
    int64_t took = trickle(port, lines ? "x\n" : "x", STEP_MS, 1000, &last);
    printf("ended after %d ms\n", (int)took);
    CHECK_NEAR_MS(took, LIMIT_MS - 1, LIMIT_MS + BUSY_MS);
}

static void run_trickle(const char *kind, int read_timeout_ms)
{
    char context[2] = {kind[0], 0};
    t_case c = {.handler = read_lines, .on_close = record_reason, .client = trickle_client,
                .context = context};
    c.options.data_size = sizeof(bool);
    c.options.read_timeout_ms = read_timeout_ms;
    t_run(&c);
    CHECK_INT(t_record_count(), 1);
}

/* Slow clients hold a connection for ever where each byte starts the time again. */
TEST_STREAM(a_trickle_ends_at_the_read_timeout)
{
    run_trickle("server's", LIMIT_MS);
}

TEST_STREAM(a_trickle_ends_at_the_streams_timeout)
{
    run_trickle("stream's", 0);
}

TEST_STREAM(a_trickle_of_lines_ends_at_the_deadline)
{
    run_trickle("deadline", 0);
}

/* Here the first nine bytes do start it again, and the end comes once there are no more. */
static void idle_trickle_client(int port, void *context)
{
    int64_t last = 0;
    int64_t took = trickle(port, "x", STEP_MS * t_scale(), 9, &last);
    (void)context;
    printf("last byte at %d ms, ended after %d ms\n", (int)last, (int)took);
    CHECK(last >= 8 * STEP_MS * t_scale() && took > last);
    CHECK(took - last >= LIMIT_MS * t_scale() - 2);
    CHECK_NEAR_MS(took - last, 0, LIMIT_MS + BUSY_MS);
}

TEST_STREAM(a_trickle_keeps_the_idle_time_away_but_silence_does_not)
{
    char context[] = "idle";
    t_case c = {.handler = read_lines, .on_close = record_reason, .client = idle_trickle_client,
                .context = context};
    c.options.data_size = sizeof(bool);
    c.options.idle_timeout_ms = LIMIT_MS * t_scale();
    t_run(&c);
}

/* ---- (6) greedy peers beside a polite one ---------------------------------------------------*/

enum { PINGS = 200, HUGE = 12 << 20 };

static int flood_over;        /* tells the threads below to end */
static uint64_t flood_amount; /* how much they have done: bytes, or connections */

static bool flooding(void)
{
    return !__atomic_load_n(&flood_over, __ATOMIC_RELAXED);
}

static void flooded(size_t amount)
{
    __atomic_add_fetch(&flood_amount, amount, __ATOMIC_RELAXED);
}

static void *flood_lines(void *context)
{
    static char lines[65536];
    memset(lines, '\n', sizeof lines);
    while (flooding()) {
        ssize_t n = send(*(int *)context, lines, sizeof lines, T_NOSIGNAL);
        CHECK(n > 0 || !flooding());
        flooded(n > 0 ? (size_t)n : 0);
    }
    return NULL;
}

static void *flood_drain(void *context)
{
    static char dropped[65536];
    ssize_t n;
    while ((n = recv(*(int *)context, dropped, sizeof dropped, 0)) > 0) {
        flooded((size_t)n);
    }
    return NULL;
}

/* Without a wait for the handshake: a full backlog would make it last a second. */
static void *flood_connects(void *context)
{
    struct sockaddr_in address;
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)*(int *)context);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    while (flooding()) {
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        CHECK(fd >= 0 && fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
        if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
            CHECK(errno == EINPROGRESS || errno == EAGAIN);
        }
        t_reset(fd);
        flooded(1);
    }
    return NULL;
}

/* Writes for as long as the peer reads. */
static int write_huge(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    (void)address;
    while ((rc = tsrv_flush(stream)) == TSRV_OK &&
           (rc = tsrv_write(stream, context, HUGE)) == TSRV_OK) {
    }
    return rc;
}

/* Empty lines are read and not answered: such reads complete at once, without a wait. */
static int swallow_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address;
    (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
    }
    return rc;
}

/* The first line says how it goes on. */
static int choose(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    tsrv_handler chosen;
    if (rc != TSRV_OK) {
        return rc;
    }
    chosen = strcmp(line.data, "huge\n") == 0      ? write_huge
             : strcmp(line.data, "swallow\n") == 0 ? swallow_lines
                                                   : echo_lines;
    if (line.data[0] == 'h' && line.data[1] == 'e') {
        tsrv_write(stream, line.data, line.size);
    }
    tsrv_set_handler(stream, chosen);
    return chosen(stream, address, context);
}

static int by_value(const void *a, const void *b)
{
    int64_t first = *(const int64_t *)a, second = *(const int64_t *)b;
    return (first > second) - (first < second);
}

static bool has_flooded(void *least)
{
    return __atomic_load_n(&flood_amount, __ATOMIC_RELAXED) >= *(uint64_t *)least;
}

/* Round trips while the flood is on: it gets on between any ten of them. */
static void check_pings(int fd, uint64_t least)
{
    static int64_t took[PINGS];
    for (int i = 0; i < PINGS; i++) {
        uint64_t more = __atomic_load_n(&flood_amount, __ATOMIC_RELAXED) + 1;
        CHECK(i % 10 != 0 || t_wait_until(has_flooded, &more));
        took[i] = now_us();
        round_trip(fd);
        took[i] = now_us() - took[i];
    }
    uint64_t amount = __atomic_load_n(&flood_amount, __ATOMIC_RELAXED);
    qsort(took, PINGS, sizeof took[0], by_value);
    printf("median %d us, longest %d us of %d pings, beside %llu\n", (int)took[PINGS / 2],
           (int)took[PINGS - 1], PINGS, (unsigned long long)amount);
    CHECK_NEAR_MS(took[PINGS / 2] / 1000, 0, 19);
    CHECK_NEAR_MS(took[PINGS - 1] / 1000, 0, 500);
    CHECK(amount >= least + PINGS / 10);
}

static void start_thread(pthread_t *thread, void *(*function)(void *), void *context)
{
    CHECK_INT(pthread_create(thread, NULL, function, context), 0);
}

static void flood_client(int port, void *context)
{
    const char *kind = (const char *)context;
    bool connects = strcmp(kind, "connects") == 0, sends = kind[0] == 'e' || kind[0] == 's';
    uint64_t least = connects ? 20 : 1 << 20;
    int small = 65536;
    pthread_t sending, receiving, connecting;
    int flood = t_connect(port), fd = t_connect(port);
    round_trip(fd);
    CHECK(setsockopt(flood, SOL_SOCKET, SO_SNDBUF, &small, sizeof small) == 0);
    t_sends(flood, kind);
    t_sends(flood, "\n");
    start_thread(&receiving, flood_drain, &flood);
    if (sends) {
        start_thread(&sending, flood_lines, &flood);
    }
    if (connects) {
        start_thread(&connecting, flood_connects, &port);
    }
    CHECK(t_wait_until(has_flooded, &least));
    check_pings(fd, least);
    __atomic_store_n(&flood_over, 1, __ATOMIC_RELAXED);
    shutdown(flood, SHUT_RDWR);
    CHECK_INT(pthread_join(receiving, NULL), 0);
    if (sends) {
        CHECK_INT(pthread_join(sending, NULL), 0);
    }
    if (connects) {
        CHECK_INT(pthread_join(connecting, NULL), 0);
    }
    t_reset(flood);
    t_reset(fd);
}

static void run_flood(const char *kind)
{
    char name[16];
    snprintf(name, sizeof name, "%s", kind);
    t_case c = {.handler = choose, .client = flood_client, .context = name};
    t_run(&c);
}

TEST_STREAM(pings_beside_a_flood_of_echoed_lines)
{
    SOFT_ONLY();
    run_flood("echo");
}

TEST_STREAM(pings_beside_a_flood_of_swallowed_lines)
{
    SOFT_ONLY();
    run_flood("swallow");
}

TEST_STREAM(pings_beside_a_flood_of_connects)
{
    SOFT_ONLY();
    run_flood("connects");
}

TEST_STREAM(pings_beside_huge_writes)
{
    SOFT_ONLY();
    char *data = new_pattern(HUGE);
    t_case c = {.handler = choose, .client = flood_client, .context = data};
    memcpy(data, "huge", 5);
    t_run(&c);
    free(data);
}

/* ---- (7) a pipeline of a million requests ---------------------------------------------------*/

/* Where the library's innermost call stood: on the handler's stack, or on the loop's. */
typedef struct depth {
    uintptr_t low;
    uintptr_t high;
} depth;

typedef struct pipeline {
    int requests;
    int fd;
    int over;            /* the last answer has come */
    int run, longest;    /* requests between two turns of another descriptor */
    int pipe[2];         /* of which the one to write is always ready */
    tsrv_watch other;    /* of it */
    uintptr_t handler;   /* its frame */
    depth here, outside; /* on its stack, and elsewhere */
} pipeline;

static void note_depth(depth *d, uintptr_t at)
{
    d->low = d->low == 0 || at < d->low ? at : d->low;
    d->high = at > d->high ? at : d->high;
}

static size_t match_request(const char *data, size_t size, void *context)
{
    pipeline *p = (pipeline *)context;
    uintptr_t at = (uintptr_t)__builtin_frame_address(0);
    uintptr_t far = at > p->handler ? at - p->handler : p->handler - at;
    const char *end = (const char *)memchr(data, '\n', size);
    note_depth(far < 1 << 20 ? &p->here : &p->outside, at);
    p->run += end != NULL;
    p->longest = p->run > p->longest ? p->run : p->longest;
    return end != NULL ? (size_t)(end - data) + 1 : 0;
}

static void others_turn(int events, void *context)
{
    (void)events;
    ((pipeline *)context)->run = 0;
}

static int answer_requests(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    pipeline *p = (pipeline *)context;
    tsrv_slice request;
    int rc;
    (void)address;
    p->handler = (uintptr_t)__builtin_frame_address(0);
    while ((rc = tsrv_read_until_match(stream, match_request, p, 0, &request)) == TSRV_OK &&
           (rc = tsrv_write(stream, request.data, request.size)) == TSRV_OK) {
    }
    if (rc != TSRV_EAGAIN) {
        tsrv_watch_stop(&p->other);
    }
    return rc;
}

/* Which of the two it is decides the first line. */
static int pipeline_or_pings(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    tsrv_handler chosen;
    if (rc != TSRV_OK) {
        return rc;
    }
    chosen = line.data[0] == 'p' ? answer_requests : echo_lines;
    if (chosen == answer_requests) {
        pipeline *p = (pipeline *)context;
        CHECK_INT(tsrv_watch_start(tsrv_stream_loop(stream), &p->other, p->pipe[1], TSRV_WRITABLE,
                                   others_turn, p),
                  TSRV_OK);
    }
    tsrv_write(stream, line.data, line.size);
    tsrv_set_handler(stream, chosen);
    return chosen(stream, address, context);
}

static void *send_requests(void *context)
{
    pipeline *p = (pipeline *)context;
    size_t size = (size_t)p->requests * 2;
    char *data = (char *)malloc(size);
    CHECK(data != NULL);
    for (size_t i = 0; i < size; i += 2) {
        data[i] = (char)('a' + i / 2 % 26);
        data[i + 1] = '\n';
    }
    t_send(p->fd, data, size);
    t_shut(p->fd);
    free(data);
    return NULL;
}

static void *receive_answers(void *context)
{
    static char data[65536];
    pipeline *p = (pipeline *)context;
    size_t size = (size_t)p->requests * 2, at = 0;
    while (at < size) {
        size_t part = size - at < sizeof data ? size - at : sizeof data;
        CHECK_INT(t_recv(p->fd, data, part), part);
        for (size_t i = 0; i < part; i++, at++) {
            CHECK_INT(data[i], at % 2 == 1 ? '\n' : 'a' + (int)(at / 2 % 26));
        }
    }
    t_expect_eof(p->fd);
    __atomic_store_n(&p->over, 1, __ATOMIC_RELAXED);
    return NULL;
}

static void pipeline_client(int port, void *context)
{
    pipeline *p = (pipeline *)context;
    pthread_t sending, receiving;
    int fd = t_connect(port), pings = 0;
    int64_t longest = 0;
    p->fd = t_connect(port);
    round_trip(fd);
    t_sends(p->fd, "p\n");
    t_expect(p->fd, "p\n");
    start_thread(&sending, send_requests, p);
    start_thread(&receiving, receive_answers, p);
    do {
        int64_t start = t_now_ms(), took;
        round_trip(fd);
        took = t_now_ms() - start;
        longest = took > longest ? took : longest;
        pings++;
    } while (!__atomic_load_n(&p->over, __ATOMIC_RELAXED));
    CHECK_INT(pthread_join(sending, NULL), 0);
    CHECK_INT(pthread_join(receiving, NULL), 0);
    printf("%d requests, at most %d in one go, beside %d pings, the longest %d ms; "
           "stack here %d, outside %d bytes\n",
           p->requests, p->longest, pings, (int)longest, (int)(p->here.high - p->here.low),
           (int)(p->outside.high - p->outside.low));
    CHECK(pings >= 10);
    t_close(p->fd);
    t_reset(fd);
}

/* A handler that is called for each of them from inside the one before needs a stack as deep as the
 * pipeline is long. The coroutine's is small, and below it is a page that must not be touched. */
TEST_STREAM(a_pipeline_of_a_million_needs_no_stack)
{
    static pipeline p;
    bool frames = TSRVI_HAS_ASAN || TSRVI_HAS_TSAN; /* they are larger there */
    t_case c = {.handler = pipeline_or_pings, .client = pipeline_client, .context = &p};
    p.requests = t_hard ? 20000 : 1000000;
    c.options.stack_size = frames ? 64 << 10 : 16 << 10;
    CHECK(pipe(p.pipe) == 0);
    t_run(&c);
    CHECK(close(p.pipe[0]) == 0 && close(p.pipe[1]) == 0);
    /* Last in one turn and first in the next. Counted, since a busy machine delays all. */
    CHECK(p.longest > 0 && p.longest <= 600);
    CHECK((p.here.high | p.outside.high) != 0);
    CHECK(p.here.high - p.here.low < (frames ? 32768 : 2048));
    CHECK(p.outside.high - p.outside.low < (frames ? 32768 : 2048));
}

/* ---- (8) a line without an end --------------------------------------------------------------*/

enum { LONGEST = 1000, SHORT_BUFFER = 16 << 10 };

static int complain_and_drop(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    bool *dropping = (bool *)tsrv_data(stream);
    tsrv_slice line;
    int rc;
    (void)address;
    (void)context;
    for (;;) {
        rc = tsrv_read_until(stream, "\n", LONGEST, *dropping ? NULL : &line);
        if (rc == TSRV_ETOOLONG) {
            CHECK(!*dropping);
            *dropping = true;
            tsrv_write(stream, "500\n", 4);
        } else if (rc != TSRV_OK) {
            return rc;
        } else {
            if (!*dropping) {
                tsrv_write(stream, line.data, line.size);
            }
            *dropping = false;
        }
    }
}

/* The complaint comes while the line still goes on. */
static void endless_client(int port, void *context)
{
    static char part[65536];
    size_t size = bulk(8 << 20, 64 << 10);
    int fd = t_connect(port);
    (void)context;
    memset(part, 'x', sizeof part);
    round_trip(fd);
    t_on_loop(nothing, NULL);
    long before = __atomic_load_n(&h_live, __ATOMIC_RELAXED);
    h_forget();
    for (int round = 0; round < 3; round++) {
        t_send(fd, part, LONGEST + 1);
        t_expect(fd, "500\n");
        for (size_t sent = 0; sent < size; sent += sizeof part) {
            t_send(fd, part, sizeof part);
        }
        t_sends(fd, "\nhello\n");
        t_expect(fd, "hello\n");
        round_trip(fd);
    }
    printf("memory grew by %ld bytes\n", h_grown_since(before));
    CHECK(h_grown_since(before) <= 2 * SHORT_BUFFER);
    t_shut(fd);
    expect_clean_end(fd);
    t_close(fd);
    t_wait_records(1);
    CHECK_INT(t_recorded(0), TSRV_EOF);
}

TEST_STREAM(an_endless_line_is_answered_and_dropped)
{
    t_case c = {.handler = complain_and_drop, .on_close = record_reason, .client = endless_client};
    c.options.data_size = sizeof(bool);
    c.options.max_buffer_size = SHORT_BUFFER;
    c.options.read_chunk_size = bulk(4096, 1);
    t_run(&c);
}

/* ---- (9) resets at every point --------------------------------------------------------------*/

enum { REPLY = 4 << 20 };

/* What the server does for the next connection. */
enum { ECHO, WAIT_FIRST, ANSWER, ANSWER_FLUSH, ANSWER_FILE, ANSWER_CLOSE, SHORT_CLOSE, READ_INTO };

static struct {
    int serves;
    char *reply;
    FILE *file;
    char into[100];
} point;

static void answer_at_point(tsrv_stream *stream)
{
    switch (point.serves) {
    case ANSWER_FILE: tsrv_sendfile(stream, fileno(point.file), 0, REPLY); break;
    case SHORT_CLOSE: tsrv_write(stream, "bye\n", 4); break;
    default: tsrv_write(stream, point.reply, REPLY);
    }
}

/* Its step is kept in tsrv_data: 0 = not entered yet, 1 = it waits for the line, 2 = answered. */
static int serve_point(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int *step = (int *)tsrv_data(stream), rc = TSRV_OK;
    if (*step == 0) {
        limit_output(stream);
        *step = 1;
        note_entered();
    }
    switch (point.serves) {
    case ECHO: return echo_lines(stream, address, context);
    case WAIT_FIRST:
        if (*step == 1 && (rc = tsrv_wait(stream, TSRV_NEVER)) == TSRV_OK) {
            *step = 2;
        }
        break;
    case READ_INTO: rc = tsrv_read_into(stream, point.into, sizeof point.into); break;
    default:
        if (*step == 1 && (rc = tsrv_read_until(stream, "\n", 0, NULL)) == TSRV_OK) {
            *step = 2;
            answer_at_point(stream);
            rc = point.serves == ANSWER_CLOSE || point.serves == SHORT_CLOSE ? 1 : TSRV_OK;
        }
        if (*step == 2 && rc == TSRV_OK && point.serves == ANSWER_FLUSH) {
            rc = tsrv_flush(stream);
        }
    }
    return rc == TSRV_OK ? echo_lines(stream, address, context) : rc;
}

static bool is_entered(void *before)
{
    return __atomic_load_n(&entered, __ATOMIC_RELAXED) > *(int *)before;
}

/* One client: each letter of the script is one thing it does.
 *   h u  hold the loop, and let it go on      c e  connect; wait until the handler is entered
 *   l p  send a line, a part of one           w    wait until the server has received all
 *   j    send 64 KiB that nobody wants        b    wait until output is stuck in the server
 *   r f  receive a part; up to the FIN        s !  shut down; reset */
static void play_script(int port, const char *script)
{
    static char junk[65536];
    hold h;
    int fd = -1, before = entered;
    uint64_t sent = 0, received = server_stats().bytes_in;
    for (; *script != 0; script++) {
        switch (*script) {
        case 'h': hold_loop(&h); break;
        case 'u': release_loop(&h); break;
        case 'c': fd = t_connect(port); break;
        case 'e': CHECK(t_wait_until(is_entered, &before)); break;
        case 'l': t_sends(fd, "go\n"), sent += 3; break;
        case 'p': t_sends(fd, "par"), sent += 3; break;
        case 'w': wait_received(received + sent); break;
        case 'j': t_send(fd, junk, sizeof junk); break;
        case 'b': CHECK(t_wait_until(has_unsent, NULL)); break;
        case 'r': CHECK_INT(t_recv(fd, junk, bulk(50000, 500)), bulk(50000, 500)); break;
        case 'f': t_expect(fd, "bye\n"), t_expect_eof(fd); break;
        case 's': t_shut(fd); break;
        case '!': t_reset(fd); break;
        default: T_FAIL("no such letter: %c", *script);
        }
    }
}

static const struct {
    const char *name;
    int serves;
    const char *script;
    int reasons[3]; /* what on_close may get besides a reset */
} points[] = {
    {"before accept", ECHO, "hc!u", {0}},
    {"a line, before accept", ECHO, "hcl!u", {0}},
    {"a half-close, before accept", ECHO, "hcs!u", {TSRV_EOF}},
    {"between accept and first read", WAIT_FIRST, "ce!", {0}},
    {"unread input, before the first read", WAIT_FIRST, "celj!", {0}},
    {"before sending", ECHO, "ce!", {0}},
    {"mid-line", ECHO, "cpw!", {0}},
    {"behind a line", ECHO, "clw!", {0}},
    {"mid-line, behind a line", ECHO, "clwpw!", {0}},
    {"after half-close", ECHO, "cls!", {TSRV_EOF}},
    {"mid-read into the program's memory", READ_INTO, "cpw!", {0}},
    {"before the reply was read", ANSWER, "clb!", {0}},
    {"mid-reply", ANSWER, "clbr!", {0}},
    {"mid-reply, with unread input", ANSWER, "clbjr!", {0}},
    {"mid-reply, after half-close", ANSWER, "clsbr!", {TSRV_EOF}},
    {"mid-flush", ANSWER_FLUSH, "clbr!", {0}},
    {"mid-file", ANSWER_FILE, "clbr!", {0}},
    {"closing, with unsent output", ANSWER_CLOSE, "clr!", {0}},
    {"lingering", SHORT_CLOSE, "clf!", {1}},
    {"lingering, with unread input", SHORT_CLOSE, "cljf!", {1}},
    {"lingering, after half-close", SHORT_CLOSE, "clsf!", {1}},
};

static bool reason_is_fine(size_t i, int reason)
{
    for (size_t k = 0; k < COUNT(points[i].reasons); k++) {
        if (points[i].reasons[k] != 0 && points[i].reasons[k] == reason) {
            return true;
        }
    }
    /* Once the FIN has come all is said, and how the peer takes its leave does not count. */
    return strchr(points[i].script, 'f') == NULL && (reason == -ECONNRESET || reason == -EPIPE);
}

/* Resets there; then the next client is served. Both leave nothing. */
static void reset_at_point(int port, size_t i)
{
    point.serves = points[i].serves;
    play_script(port, points[i].script);
    if (!t_wait_until(t_has_records, &(int){1})) {
        T_FAIL("reset %s: no on_close", points[i].name);
    }
    point.serves = ECHO;
    int fd = t_connect(port);
    round_trip(fd);
    t_reset(fd);
    t_wait_records(2);
    if (!reason_is_fine(i, t_recorded(0))) {
        T_FAIL("reset %s: on_close got %d (%s)", points[i].name, t_recorded(0),
               tsrv_strerror(t_recorded(0)));
    }
    CHECK_INT(t_recorded(1), -ECONNRESET);
    CHECK_INT(t_record_count(), 2);
    t_records_used = 0;
}

static void resets_client(int port, void *context)
{
    balance before;
    int connections = 0;
    (void)context;
    reset_at_point(port, COUNT(points) - 1); /* fills the pools */
    t_on_loop(take_balance, &before);
    CHECK_INT(before.open, 0);
    for (int round = 0; round < 2; round++) {
        for (size_t i = 0; i < COUNT(points); i++) {
            reset_at_point(port, i);
            check_balance(&before, points[i].name);
            connections += 2;
        }
    }
    CHECK_INT(__atomic_load_n(&entered, __ATOMIC_RELAXED), connections + 2);
    CHECK_INT(logged(), 0); /* a reset is everyday life */
}

TEST_STREAM(resets_at_every_point)
{
    t_case c = {.handler = serve_point, .on_close = record_reason, .client = resets_client};
    c.options.data_size = sizeof(int);
    c.options.close_timeout_ms = 60000; /* what ends has to end by the reset */
    point.reply = new_pattern(REPLY);
    point.file = tmpfile();
    CHECK(point.file != NULL && fwrite(point.reply, 1, REPLY, point.file) == REPLY);
    CHECK(fflush(point.file) == 0);
    tsrv_set_log(count_line, NULL);
    t_run(&c);
    tsrv_set_log(NULL, NULL);
    CHECK(fclose(point.file) == 0);
    free(point.reply);
}

/* ---- (10) a peer that never answers the FIN -------------------------------------------------*/

enum { CLOSE_MS = 200 };

static int say_bye(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc = tsrv_read_until(stream, "\n", 0, NULL);
    (void)address;
    (void)context;
    if (rc == TSRV_OK) {
        tsrv_write(stream, "bye\n", 4);
        rc = 7;
    }
    return rc;
}

static void add_stream(void *context)
{
    CHECK_INT(tsrv_server_add_stream(t_server, *(int *)context), TSRV_OK);
}

/* A connection to the server: over TCP, or one end of a pair. */
static int half_open_connect(int port, bool tcp)
{
    int pair[2];
    if (tcp) {
        return t_connect(port);
    }
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    t_prepare(pair[0]);
    t_on_loop(add_stream, &pair[1]);
    return pair[0];
}

/* It gets the FIN and stays, silent or sending; neither makes the wait longer. */
static void half_open_once(int port, bool tcp, bool sends)
{
    char data[1024] = {0};
    int fd = half_open_connect(port, tcp), before = t_record_count();
    int64_t start = t_now_ms();
    t_sends(fd, "go\n");
    do {
        if (sends && send(fd, data, sizeof data, T_NOSIGNAL) < 0) {
            CHECK(errno == EPIPE || errno == ECONNRESET);
        }
        poll(NULL, 0, 5);
        CHECK_NEAR_MS(t_now_ms() - start, 0, 5000);
    } while (t_record_count() == before);
    CHECK_NEAR_MS(t_now_ms() - start, CLOSE_MS - 1, CLOSE_MS + BUSY_MS);
    CHECK_INT(t_recorded(before), 7);
    CHECK_INT(server_stats().open, 0);
    if (!sends) {
        t_expect(fd, "bye\n"); /* still there, and no reset yet */
        t_expect_eof(fd);
    }
    t_close(fd);
}

/* What comes after the close is taken and dropped, and the answer can still be read after it. */
static void half_open_then_read(int port, bool tcp)
{
    static char junk[32768];
    int fd = half_open_connect(port, tcp), before = t_record_count();
    uint64_t received = server_stats().bytes_in;
    t_sends(fd, "go\n");
    wait_received(received += 3);
    for (int i = 0; i < 4; i++) {
        t_send(fd, junk, bulk(sizeof junk, 512));
        wait_received(received += bulk(sizeof junk, 512));
    }
    t_expect(fd, "bye\n");
    expect_clean_end(fd);
    t_close(fd);
    t_wait_records(before + 1);
    CHECK_INT(t_recorded(before), 7);
}

static void half_open_client(int port, void *context)
{
    (void)context;
    for (int tcp = 0; tcp < 2; tcp++) {
        half_open_once(port, tcp, false);
        half_open_once(port, tcp, true);
    }
}

TEST_STREAM(a_peer_that_stays_after_the_fin_is_left)
{
    t_case c = {.handler = say_bye, .on_close = record_reason, .client = half_open_client};
    c.options.close_timeout_ms = CLOSE_MS;
    t_run(&c);
}

static void dropped_client(int port, void *context)
{
    (void)context;
    for (int round = 0; round < 10; round++) {
        half_open_then_read(port, round % 2 != 0);
    }
}

TEST_STREAM(input_after_the_close_does_not_destroy_the_answer)
{
    t_case c = {.handler = say_bye, .on_close = record_reason, .client = dropped_client};
    c.options.close_timeout_ms = 60000;
    t_run(&c);
}

/* ---- (11) slow readers ----------------------------------------------------------------------*/

enum { PART = 8 << 10, QUEUE = 256 << 10 };

typedef struct writer {
    int parts;
    char *data; /* of all parts */
    long before; /* bytes of memory */
} writer;

/* Writes part after part, and never reads what it was asked. */
static int write_parts(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    writer *w = (writer *)context;
    int *written = (int *)tsrv_data(stream), rc = TSRV_OK;
    (void)address;
    limit_output(stream);
    while (rc == TSRV_OK && *written < w->parts) {
        rc = tsrv_write(stream, w->data + *written * PART, PART);
        CHECK(rc != TSRV_EAGAIN);
        *written += rc == TSRV_OK;
        CHECK(tsrv_unsent_size(stream) <= (t_mode == TSRV_CALLBACK ? QUEUE : QUEUE / 2));
    }
    if (t_mode == TSRV_CALLBACK) {
        tsrv_slice none;
        CHECK_INT(rc, TSRV_EFULL);
        CHECK(*written >= QUEUE / PART && *written < w->parts);
        CHECK_INT(tsrv_read_some(stream, 0, &none), TSRV_EFULL);
        CHECK_INT(tsrv_unsent_size(stream), 0);
        return TSRV_OK; /* on_close gets the error even so */
    }
    CHECK_INT(*written, w->parts);
    return rc;
}

static void wait_for_parts(int port, void *context)
{
    writer *w = (writer *)context;
    int fd = t_connect(port);
    if (t_mode == TSRV_CALLBACK) {
        t_wait_records(1);
        t_expect_reset(fd);
    } else {
        CHECK(t_wait_until(has_unsent, NULL));
        size_t size = (size_t)w->parts * PART, first = 3 * PART;
        expect_pattern_from(fd, 0, first);
        CHECK(has_unsent(NULL));
        expect_pattern_from(fd, first, size);
        expect_clean_end(fd);
    }
    t_close(fd);
    t_wait_records(1);
}

/* A program that ignores the results of writes is protected; one that may wait, waits. */
TEST_STREAM(queued_writes_wait_or_kill)
{
    writer w = {(int)bulk(256, 128), NULL, 0};
    t_case c = {.handler = write_parts, .on_close = record_reason, .client = wait_for_parts,
                .context = &w};
    c.options.data_size = sizeof(int);
    c.options.max_write_buffer_size = QUEUE;
    c.options.write_high_water = QUEUE / 2;
    w.data = new_pattern((size_t)w.parts * PART);
    w.before = __atomic_load_n(&h_live, __ATOMIC_RELAXED);
    h_forget();
    t_run(&c);
    free(w.data);
    printf("memory grew by %ld KiB\n", h_grown_since(w.before) >> 10);
    CHECK(h_grown_since(w.before) <= 2 * QUEUE + (160 << 10));
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), t_mode == TSRV_CALLBACK ? TSRV_EFULL : TSRV_OK);
}

enum { FAST = 5, MESSAGE = 4 << 10 };

typedef struct broadcast {
    int number;  /* of messages so far */
    int refused; /* by the one that is stuck */
    int taken;
    char taken_first[256]; /* the first byte of each that it took */
} broadcast;

/* The stream that is stuck said so; the others get every message. */
static void broadcast_one(void *context)
{
    static char message[MESSAGE];
    broadcast *b = (broadcast *)context;
    memset(message, 'a' + b->number++ % 26, sizeof message);
    for (tsrv_stream *s = tsrv_server_next(t_server, NULL); s != NULL;
         s = tsrv_server_next(t_server, s)) {
        bool stuck = *(bool *)tsrv_data(s);
        size_t before = tsrv_unsent_size(s);
        int rc = tsrv_try_write(s, message, sizeof message);
        if (!stuck) {
            CHECK_INT(rc, TSRV_OK);
        } else if (rc == TSRV_OK) {
            CHECK(b->taken < (int)sizeof b->taken_first);
            b->taken_first[b->taken++] = message[0];
        } else {
            CHECK_INT(rc, TSRV_EFULL);
            CHECK_INT(tsrv_error(s), TSRV_OK);
            CHECK(tsrv_unsent_size(s) <= before);
            b->refused++;
        }
    }
}

static int listen_to_all(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address;
    (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        if (strcmp(line.data, "stuck\n") == 0) {
            *(bool *)tsrv_data(stream) = true;
            limit_output(stream);
        }
        tsrv_write(stream, line.data, line.size);
    }
    return rc;
}

static void expect_message(int fd, char letter)
{
    char actual[MESSAGE], expected[MESSAGE];
    memset(expected, letter, sizeof expected);
    CHECK_MEM(actual, t_recv(fd, actual, sizeof actual), expected, sizeof expected);
}

static void broadcast_client(int port, void *context)
{
    broadcast *b = (broadcast *)context;
    int fast[FAST], stuck = t_connect(port), least = (int)bulk(100, 40);
    t_sends(stuck, "stuck\n");
    t_expect(stuck, "stuck\n");
    for (int i = 0; i < FAST; i++) {
        fast[i] = t_connect(port);
        round_trip(fast[i]);
    }
    while (b->number < least || b->refused < 10) {
        CHECK(b->number < 5000);
        t_on_loop(broadcast_one, b);
        for (int i = 0; i < FAST; i++) {
            expect_message(fast[i], (char)('a' + (b->number - 1) % 26));
        }
    }
    printf("%d messages, of which the stuck one got %d\n", b->number, b->taken);
    CHECK(b->taken >= 1);
    for (int i = 0; i < b->taken; i++) {
        expect_message(stuck, b->taken_first[i]); /* whole ones, and in order */
    }
    round_trip(stuck); /* it is in use again */
    t_reset(stuck);
    for (int i = 0; i < FAST; i++) {
        t_reset(fast[i]);
    }
    t_wait_records(FAST + 1);
}

TEST_STREAM(a_broadcast_reaches_all_but_the_one_that_is_stuck)
{
    static broadcast b;
    t_case c = {.handler = listen_to_all, .on_close = record_reason, .client = broadcast_client,
                .context = &b};
    c.options.data_size = sizeof(bool);
    c.options.max_write_buffer_size = 4 * MESSAGE;
    t_run(&c);
}

/* ---- (12) churn -----------------------------------------------------------------------------*/

enum { CHURN = 2000, BATCH = 50 };

/* Each of a batch goes in another way, and all by a reset, so that no TIME_WAIT stays. The last one
 * is served: so all before it have been accepted. */
static void churn_batch(int port)
{
    for (int i = 0; i < BATCH - 1; i++) {
        int fd = t_connect(port);
        switch (i % 4) {
        case 1: t_sends(fd, "half a li"); break;
        case 2: t_sends(fd, "hello\nhello\nhello\nhe"); break;
        case 3: t_shut(fd); break;
        default: break;
        }
        t_reset(fd);
    }
    int fd = t_connect(port);
    round_trip(fd);
    t_reset(fd);
}

static bool all_closed(void *context)
{
    tsrv_stats stats = server_stats();
    (void)context;
    return stats.open == 0 && stats.accepted + stats.accept_errors >= CHURN;
}

static void churn_client(int port, void *context)
{
    balance before;
    (void)context;
    churn_batch(port); /* fills the pools */
    t_wait_records(BATCH);
    t_on_loop(take_balance, &before);
    for (int i = BATCH; i < CHURN; i += BATCH) {
        churn_batch(port);
    }
    CHECK(t_wait_until(all_closed, NULL));
    tsrv_stats stats = server_stats();
    CHECK_INT(stats.accepted, CHURN);
    CHECK_INT(stats.closed, stats.accepted);
    CHECK_INT(t_record_count(), stats.accepted);
    CHECK_INT(stats.accept_pauses, 0);
    for (int i = 0; i < t_record_count(); i++) {
        int reason = t_recorded(i);
        CHECK(reason == -ECONNRESET || reason == -EPIPE || reason == TSRV_EOF);
    }
    check_balance(&before, "churn");
}

TEST_STREAM(churn_leaves_nothing)
{
    t_case c = {.handler = echo_lines, .on_close = record_reason, .client = churn_client};
    t_run(&c);
}
