/* Handlers and helpers that several test files need. Included behind script.h or test.h. */
#ifndef HANDLERS_H
#define HANDLERS_H

#define KIB ((size_t)1024)
#define COUNT(array) (sizeof(array) / sizeof(array)[0])

#define CHECK_MOST(actual, limit)                                                                  \
    ((int64_t)(actual) <= (int64_t)(limit)                                                         \
         ? (void)0                                                                                 \
         : T_FAIL("CHECK_MOST(%s)\n    actual %lld\n    limit  %lld", #actual,                     \
                  (long long)(actual), (long long)(limit)))
#define CHECK_LEAST(actual, limit)                                                                 \
    ((int64_t)(actual) >= (int64_t)(limit)                                                         \
         ? (void)0                                                                                 \
         : T_FAIL("CHECK_LEAST(%s)\n    actual %lld\n    limit  %lld", #actual,                    \
                  (long long)(actual), (long long)(limit)))

/* All but the hard variants, which would only be slow or measure something else. */
#define SOFT_ONLY()                                                                                \
    do {                                                                                           \
        if (t_hard) {                                                                              \
            return;                                                                                \
        }                                                                                          \
    } while (0)

/* In hard mode every byte costs a system call. */
static inline size_t bulk(size_t soft, size_t hard)
{
    return t_hard ? hard : soft;
}

static inline unsigned next_random(unsigned *state)
{
    *state = *state * 1664525U + 1013904223U;
    return *state >> 8;
}

/* ---- handlers -----------------------------------------------------------------------------*/

static inline int echo_lines(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK &&
           (rc = tsrv_write(stream, line.data, line.size)) == TSRV_OK) {
    }
    return rc;
}

static inline int echo_bytes(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice some;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_some(stream, 0, &some)) == TSRV_OK &&
           (rc = tsrv_write(stream, some.data, some.size)) == TSRV_OK) {
    }
    return rc;
}

/* With a server that echoes. */
static inline void round_trip(int fd)
{
    t_echo(fd, "hello\n");
}

/* Of a tsrv_watch that must not be called. */
static inline void never_called(int events, void *context)
{
    (void)context;
    T_FAIL("a watch was called with %d", events);
}

/* A coroutine, which outlives most tests. */
static inline void sleep_long(void *context)
{
    (void)context;
    tsrv_sleep(3600000);
}

/* A tsrv_match. */
static inline size_t match_line(const char *data, size_t size, void *context)
{
    const char *end = (const char *)memchr(data, '\n', size);
    (void)context;
    return end == NULL ? 0 : (size_t)(end - data) + 1;
}

/* Makes the kernel take little, so that output piles up in the library. The client's buffer stays as it is: a tiny one
 * would stall on retransmissions. */
static inline void limit_output_to(tsrv_stream *stream, int room)
{
    int fd = tsrv_fd(stream);
#ifdef T_MEMORY
    fd = q_limit(stream, (size_t)room);
#endif
    if (fd >= 0) {
        CHECK(setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof room) == 0);
    }
}

static inline void limit_output(tsrv_stream *stream)
{
    limit_output_to(stream, 16384);
}

/* For outputs of megabytes. */
static inline void limit_large_output(tsrv_stream *stream)
{
    limit_output_to(stream, t_hard ? 16384 : 131072);
}

/* ---- bytes --------------------------------------------------------------------------------*/

/* Byte i of every large transfer, a letter, so that loss, order and repetition show. */
static inline char pattern_at(size_t i)
{
    return (char)('a' + (i ^ (i >> 8) ^ (i >> 16)) % 26);
}

static inline void fill_pattern(char *data, size_t offset, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        data[i] = pattern_at(offset + i);
    }
}

/* Ends with a 0. */
static inline char *new_pattern(size_t size)
{
    char *data = (char *)malloc(size + 1);
    CHECK(data != NULL);
    fill_pattern(data, 0, size);
    data[size] = 0;
    return data;
}

static inline void expect_pattern_from(int fd, size_t offset, size_t end)
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

/* Sends the pattern and ends its output, in a thread of its own: a server that echoes it needs somebody who reads
 * meanwhile. */
typedef struct sender {
    int fd;
    size_t size;
    pthread_t thread;
} sender;

static inline void *send_pattern(void *context)
{
    sender *s = (sender *)context;
    char *data = new_pattern(s->size);
    t_send(s->fd, data, s->size);
    t_shut(s->fd);
    free(data);
    return NULL;
}

static inline void start_sending(sender *s, int fd, size_t size)
{
    s->fd = fd;
    s->size = size;
    CHECK_INT(pthread_create(&s->thread, NULL, send_pattern, s), 0);
}

static inline void join_sender(sender *s)
{
    CHECK_INT(pthread_join(s->thread, NULL), 0);
}

/* A client that takes everything: before each of the server's sends it empties its socket, so that the kernel never
 * has a reason to take nothing. take_before_sends is for t_seen. */
static int taker = -1;
static size_t taker_got;

static inline void take_all(void)
{
    static char buffer[256 * 1024];
    ssize_t n;
    while ((n = recv(taker, buffer, sizeof buffer, MSG_DONTWAIT)) > 0) {
        taker_got += (size_t)n;
    }
    CHECK(n == 0 || errno == EAGAIN);
}

static inline void take_before_sends(const char *name)
{
    if (taker >= 0 && (strcmp(name, "send") == 0 || strcmp(name, "sendmsg") == 0)) {
        take_all();
    }
}

/* More than the kernel takes; to be freed. */
static char *large;
static size_t large_size;

static inline void make_large(size_t size)
{
    large_size = size;
    large = new_pattern(size);
}

/* ---- what is measured ---------------------------------------------------------------------*/

/* How often the library has made a system call or an allocation. */
static const char *counted_names[2];
static int calls_counted;

static inline void count_named_call(const char *name)
{
    for (int i = 0; i < 2; i++) {
        calls_counted += counted_names[i] != NULL && strcmp(name, counted_names[i]) == 0;
    }
}

static inline void count_calls(const char *name, const char *other_name)
{
    counted_names[0] = name;
    counted_names[1] = other_name;
    calls_counted = 0;
    t_seen = count_named_call;
}

static inline int64_t cpu_ms(void)
{
    struct timespec used;
    CHECK(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used) == 0);
    return (int64_t)used.tv_sec * 1000 + used.tv_nsec / 1000000;
}

/* Resident bytes of this process, without those of files: pages of the program that are run for the
 * first time are not what a connection costs. -1 where they cannot be read. */
static inline long resident(void)
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

/* ---- from the client's thread -------------------------------------------------------------*/

/* For t_on_loop, to be sure that the loop has come round. */
static inline void nothing(void *context)
{
    (void)context;
}

static inline void copy_stats(void *context)
{
    tsrv_server_stats(t_server, (tsrv_stats *)context);
}

static inline tsrv_stats server_stats(void)
{
    tsrv_stats stats;
    t_on_loop(copy_stats, &stats);
    return stats;
}

static inline bool has_received(void *bytes)
{
    return server_stats().bytes_in >= *(uint64_t *)bytes;
}

/* Waits until the server has received so many bytes in all. Something there has to be reading. */
static inline void wait_received(uint64_t bytes)
{
    if (!t_wait_until(has_received, &bytes)) {
        T_FAIL("the server has received %llu of %llu bytes", (unsigned long long)server_stats().bytes_in,
               (unsigned long long)bytes);
    }
}

static inline void load_unsent(void *context)
{
    tsrv_stream *stream = tsrv_server_next(t_server, NULL);
    *(size_t *)context = stream != NULL ? tsrv_unsent_size(stream) : 0;
}

/* More than so many? */
static inline bool has_unsent(void *bytes)
{
    size_t unsent = 0;
    t_on_loop(load_unsent, &unsent);
    return unsent > (bytes == NULL ? 0 : *(const size_t *)bytes);
}

static inline void wait_unsent(size_t size)
{
    if (!t_wait_until(has_unsent, &size)) {
        T_FAIL("there were never more than %zu bytes unsent", size);
    }
}

/* For t_on_loop: something is done to the stream that has come first. */
static inline tsrv_stream *first_of_server(void)
{
    tsrv_stream *stream = tsrv_server_next(t_server, NULL);
    CHECK(stream != NULL);
    return stream;
}

static inline void close_first(void *context)
{
    (void)context;
    CHECK_INT(tsrv_close(first_of_server()), TSRV_OK);
}

static inline void abort_first(void *context)
{
    (void)context;
    CHECK_INT(tsrv_abort(first_of_server()), TSRV_OK);
}

static inline void wake_first(void *context)
{
    (void)context;
    tsrv_wake(first_of_server());
}

static inline void add_pair(void *context)
{
    *(int *)context = t_add_pair(t_server);
}

/* Connects by a pair of unix sockets. */
static inline int connect_pair(void)
{
    int fd = -1;
    t_on_loop(add_pair, &fd);
    return fd;
}

/* A client that is only ended. */
static inline void expect_end(int port, void *context)
{
    (void)context;
    t_leave(t_connect(port));
}

/* The loop, held so that a client can be faster than it. */
typedef struct hold {
    int told[2];
    int go[2];
} hold;

static inline void open_hold(hold *h)
{
    CHECK(pipe(h->told) == 0 && pipe(h->go) == 0);
}

static inline void hold_here(void *context)
{
    hold *h = (hold *)context;
    char byte;
    CHECK(write(h->told[1], "", 1) == 1);
    CHECK(read(h->go[0], &byte, 1) == 1);
}

static inline void hold_loop(hold *h)
{
    char byte;
    CHECK_INT(tsrv_loop_post(t_loop, hold_here, h), TSRV_OK);
    CHECK(read(h->told[0], &byte, 1) == 1);
}

static inline void release_loop(hold *h)
{
    CHECK(write(h->go[1], "", 1) == 1);
}

/* Waits until the loop has come round. */
static inline void close_hold(hold *h)
{
    t_on_loop(nothing, NULL);
    t_close_all(h->told, 2);
    t_close_all(h->go, 2);
}

/* FIN and nothing behind it: no reset follows. */
static inline void expect_clean_end(int fd)
{
    int error = 0;
    socklen_t size = sizeof error;
    t_expect_eof(fd);
    CHECK(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0);
    CHECK_INT(error, 0);
    t_expect_eof(fd);
}

#endif
