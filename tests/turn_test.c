/* Turns of a loop (>>turn): who floods a server with input, output, connections or requests holds up nobody, by
 * the clock and by counts. How much a turn does for one stream is fairness_test.c. */
#include "test.h"

#include "handlers.h"

/* ---- floods beside round trips -------------------------------------------------------------*/

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
    struct sockaddr_in address = t_address(*(int *)context);
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
static int write_huge_answer(tsrv_stream *stream, const tsrv_address *address, void *context)
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
    chosen = strcmp(line.data, "huge\n") == 0      ? write_huge_answer
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
        took[i] = t_now_us();
        round_trip(fd);
        took[i] = t_now_us() - took[i];
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

/* ---- a pipeline of a million requests ------------------------------------------------------*/

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

static size_t match_counted(const char *data, size_t size, void *context)
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
    while ((rc = tsrv_read_until_match(stream, match_counted, p, 0, &request)) == TSRV_OK &&
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
    t_echo(p->fd, "p\n");
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
    bool frames = TSRVI_HAS_ASAN || TSRVI_HAS_TSAN; /* they are larger there, */
#ifdef __OPTIMIZE__
    size_t most = frames ? 32768 : 4096;
#else
    size_t most = frames ? 32768 : 8192; /* and here */
#endif
    t_case c = {.handler = pipeline_or_pings, .client = pipeline_client, .context = &p};
    p.requests = t_hard ? 20000 : 1000000;
    c.options.stack_size = frames ? 64 << 10 : 16 << 10;
    CHECK(pipe(p.pipe) == 0);
    t_run(&c);
    t_close_all(p.pipe, 2);
    /* Last in one turn and first in the next. Counted, since a busy machine delays all. */
    CHECK(p.longest > 0 && p.longest <= 600);
    CHECK((p.here.high | p.outside.high) != 0);
    CHECK(p.here.high - p.here.low < most);
    CHECK(p.outside.high - p.outside.low < most);
}

/* ---- floods beside a timer -----------------------------------------------------------------*/

static volatile bool greedy_over;

static void *send_greedily(void *context)
{
    static char lines[65536];
    int fd = *(int *)context;
    memset(lines, '\n', sizeof lines);
    while (!greedy_over) {
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
    pthread_t thread;
    int fd = t_connect(port);
    (void)context;
    start_thread(&thread, send_greedily, &fd);
    t_expect_eof(fd);
    greedy_over = true;
    CHECK_INT(pthread_join(thread, NULL), 0);
    t_close(fd);
}

TEST_SOFT(a_flooded_handler_does_not_starve_a_timer)
{
    t_case c = {.handler = handle_greedy, .client = client_greedy};
    firings = reads = most_reads = 0;
    turn_timer_runs = false;
    greedy_over = false;
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
    t_finish(fd);
}

TEST_SOFT(empty_reads_do_not_starve_a_timer)
{
    t_case c = {.handler = handle_empty, .client = client_empty};
    timer_fired = false;
    c.options.on_start = start_timer;
    t_run(&c);
    CHECK(timer_fired);
}
