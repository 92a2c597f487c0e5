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

static inline void count_call(const char *name)
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
    t_seen = count_call;
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
