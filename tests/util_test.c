/* >>util: the default logger and its limits, descriptors above 2, writes that raise no signal. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "seam.h"

#ifdef __linux__
#include <signal.h>
#include <sys/sendfile.h>

static size_t reset_after; /* bytes that sendfile sends before the peer's reset; 0 = there is none */

/* What the kernel does when the reset comes in the middle, which is hard to meet: the part that went
 * is returned, and SIGPIPE raised as well. */
static inline ssize_t reset_sendfile(int to, int from, off_t *offset, size_t size)
{
    if (reset_after == 0) {
        return sendfile(to, from, offset, t_clipped(size));
    }
    ssize_t sent = sendfile(to, from, offset, size < reset_after ? size : reset_after);
    raise(SIGPIPE);
    errno = EPIPE;
    return sent;
}

#undef t_sys_sendfile
#define t_sys_sendfile(...) (t_fault("sendfile") ? -1 : reset_sendfile(__VA_ARGS__))
#endif

static int cannot_open_again; /* descriptor 2, under /proc */

#undef t_sys_open
#define t_sys_open(path, ...) \
    (t_fault("open") || (cannot_open_again && strcmp(path, "/proc/self/fd/2") == 0) \
         ? -1 \
         : open(t_path(path), __VA_ARGS__))
#include "script.h"

#include <ctype.h>
#include <limits.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <termios.h>

#define SECOND 1000000000u /* of v_now */

/* ---- stderr, and what arrives there ------------------------------------------------------*/

static int kept = -1; /* the harness's */
static int opened[8], opened_count;

static int remember(int fd)
{
    CHECK(fd >= 0 && opened_count < (int)(sizeof opened / sizeof opened[0]));
    opened[opened_count++] = fd;
    return fd;
}

static void stderr_is(int fd)
{
    if (kept < 0) {
        kept = remember(fcntl(2, F_DUPFD_CLOEXEC, 50));
    }
    if (fd < 0) {
        close(2);
    } else {
        CHECK(dup2(fd, 2) == 2);
    }
}

static void stderr_back(void)
{
    CHECK(dup2(kept, 2) == 2);
}

/* Everything that a test has opened. */
static void close_all(void)
{
    if (kept >= 0) {
        stderr_back();
    }
    while (opened_count > 0) {
        close(opened[--opened_count]); /* or it is closed already */
    }
}

/* A pipe whose ends never wait. */
static void make_pipe(int *fds)
{
    CHECK(pipe(fds) == 0);
    remember(fds[0]);
    remember(fds[1]);
    CHECK(fcntl(fds[0], F_SETFL, O_NONBLOCK) == 0);
    CHECK(fcntl(fds[1], F_SETFD, FD_CLOEXEC) == 0);
}

/* Bytes until no slot of the pipe is free; its flags are as before. */
static size_t fill_pipe(int fd)
{
    static char zeros[4096];
    size_t size = 0;
    ssize_t n;
    CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
    while ((n = write(fd, zeros, sizeof zeros)) > 0) {
        size += (size_t)n;
    }
    CHECK(fcntl(fd, F_SETFL, 0) == 0);
    return size;
}

static char taken[65536];

/* All that has arrived. */
static const char *take(int fd)
{
    ssize_t n = read(fd, taken, sizeof taken - 1);
    taken[n < 0 ? 0 : n] = 0;
    return taken;
}

/* The text of the only line, without what stands before it. */
static const char *take_text(int fd, const char *level)
{
    char *text = strstr(take(fd), level), *end;
    CHECK(text != NULL && (end = strchr(text, '\n')) != NULL && end[1] == 0);
    *end = 0;
    return text + strlen(level) + 1;
}

static int count_lines(const char *text)
{
    int count = 0;
    for (; *text != 0; text++) {
        count += *text == '\n';
    }
    return count;
}

/* ---- a line ------------------------------------------------------------------------------*/

TEST_ONCE(line_has_time_process_level_and_text)
{
    static const char *const levels[] = {"ERROR", "WARNING", "INFO"};
    char expected[200];
    int fds[2];
    make_pipe(fds);
    stderr_is(fds[1]);
    v_now = 1709251199u * (uint64_t)SECOND + 987654321u; /* a leap day's last second */
    for (int level = TSRV_LOG_ERROR; level <= TSRV_LOG_INFO; level++) {
        tsrvi_log(level, "%d of %s", level, "three");
        snprintf(expected, sizeof expected, "2024-02-29T23:59:59.987Z %ld %s %d of three\n", (long)getpid(),
                 levels[level - 1], level);
        const char *line = take(fds[0]);
        stderr_back();
        CHECK_STR(line, expected);
        stderr_is(fds[1]);
    }
    tsrv_set_log_level(TSRV_LOG_WARNING);
    tsrvi_log(TSRV_LOG_INFO, "not asked for");
    tsrvi_log(TSRV_LOG_WARNING, "asked for");
    const char *text = take_text(fds[0], "WARNING");
    stderr_back();
    CHECK_STR(text, "asked for");
    stderr_is(fds[1]);
    tsrv_set_log_level(0);
    tsrvi_log(TSRV_LOG_ERROR, "nothing is");
    stderr_back();
    CHECK_STR(take(fds[0]), "");
    close_all();
}

/* Against the C library's calendar: every day until 2200. */
TEST_ONCE(date_of_every_day)
{
    for (uint64_t day = 0; day < 84006; day++) {
        unsigned year, month, of_month;
        time_t seconds = (time_t)day * 86400;
        struct tm tm;
        if ((uint64_t)seconds / 86400 != day || gmtime_r(&seconds, &tm) == NULL) {
            break; /* 32 bits */
        }
        tsrvi_log_date(day, &year, &month, &of_month);
        if ((int)year != tm.tm_year + 1900 || (int)month != tm.tm_mon + 1 || (int)of_month != tm.tm_mday) {
            T_FAIL("day %d is %u-%u-%u", (int)day, year, month, of_month);
        }
    }
}

static char seen_text[1000];
static int seen_level, seen_lines;

static void see_line(int level, const char *message, void *context)
{
    (void)context;
    seen_level = level;
    seen_lines++;
    snprintf(seen_text, sizeof seen_text, "%s", message);
}

TEST_ONCE(what_could_forge_a_line_is_escaped)
{
    static const struct {
        const char *in, *out;
    } rows[] = {
        {"plain ~ text", "plain ~ text"},
        {"a\nb\tc\rd\x1b[2J\x7f", "a\\x0ab\\x09c\\x0dd\\x1b[2J\\x7f"},
        {"\x9b" "2J", "\\x9b2J"},              /* C1 as one byte */
        {"\xc2\x9b" "2J", "\\xc2\\x9b2J"},     /* and as UTF-8 */
        {"\xc2\x80\xc2\xa0", "\\xc2\\x80\xc2\xa0"},
        {"Gr\xc3\xbc\xc3\x9f" "e \xe2\x82\xac \xf0\x9f\x98\x80", "Gr\xc3\xbc\xc3\x9f" "e \xe2\x82\xac \xf0\x9f\x98\x80"},
        {"\xc3", "\\xc3"},                     /* cut off */
        {"\xe2\x82" "a", "\\xe2\\x82a"},
        {"\xc0\x8a\xe0\x80\x8a", "\\xc0\\x8a\\xe0\\x80\\x8a"}, /* overlong */
        {"\xed\xa0\x80", "\\xed\\xa0\\x80"},   /* a surrogate */
        {"\xf4\x90\x80\x80\xff", "\\xf4\\x90\\x80\\x80\\xff"},
        {"\xf0\x8f\xbf\xbf", "\\xf0\\x8f\\xbf\\xbf"},
        {"\xef\xbf\xbf\xf4\x8f\xbf\xbf", "\xef\xbf\xbf\xf4\x8f\xbf\xbf"}, /* the last of their sizes */
        {"\xe0\xa4\x85 \xed\x95\x9c", "\xe0\xa4\x85 \xed\x95\x9c"}, /* letters beside what is none */
        {"\xe0\xa0\x80\xed\x9f\xbf\xf0\x90\x80\x80", "\xe0\xa0\x80\xed\x9f\xbf\xf0\x90\x80\x80"},
    };
    tsrv_set_log(see_line, NULL);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        tsrvi_log(TSRV_LOG_ERROR, "%s", rows[i].in);
        CHECK_STR(seen_text, rows[i].out);
    }
}

/* One write of at most 512 bytes, which a pipe takes as a whole. */
TEST_ONCE(long_line_ends_in_dots_and_between_characters)
{
    static const char *const units[] = {"x", "\xc3\xbc", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\n"};
    static const size_t widths[] = {1, 2, 3, 4, 4};
    char text[3000];
    int fds[2];
    make_pipe(fds);
    tsrv_set_log(see_line, NULL);
    for (size_t unit = 0; unit < 5; unit++) {
        for (size_t before = 0; before < 5; before++) {
            size_t used = before;
            memset(text, '-', before);
            while (used < 2000) {
                memcpy(text + used, units[unit], strlen(units[unit]));
                used += strlen(units[unit]);
            }
            text[used] = 0;
            tsrvi_log(TSRV_LOG_ERROR, "%s", text);
            size_t size = strlen(seen_text);
            CHECK(size > 430 && size < TSRVI_LOG_TEXT);
            CHECK_STR(seen_text + size - 3, "...");
            CHECK_INT((size - 3 - before) % widths[unit], 0);
        }
    }
    tsrv_set_log(NULL, NULL);
    stderr_is(fds[1]);
    tsrvi_log(TSRV_LOG_WARNING, "%s", text);
    stderr_back();
    CHECK(strlen(take(fds[0])) <= 512);
    CHECK_INT(count_lines(taken), 1);
    close_all();
}

/* ---- what stderr can be ------------------------------------------------------------------*/

/* The line is lost, that is said once it can be, and nothing waits. */
static void check_lost(int reader)
{
    for (int i = 0; i < 3; i++) {
        tsrvi_log(TSRV_LOG_WARNING, "lost %d", i);
    }
    if (reader >= 0) {
        while (take(reader)[0] != 0 || read(reader, taken, 1) > 0) {
        }
    }
}

static void check_told(int reader, const char *lost)
{
    char expected[100];
    tsrvi_log(TSRV_LOG_INFO, "and on");
    tsrvi_log(TSRV_LOG_INFO, "and on");
    stderr_back();
    snprintf(expected, sizeof expected, " WARNING %s log lines were lost\n", lost);
    CHECK_INT(count_lines(take(reader)), 3);
    CHECK(strstr(taken, expected) != NULL);
    CHECK(strchr(strstr(taken, expected), '\n') < strstr(taken, "and on"));
}

static void full_pipe(void)
{
    int fds[2];
    make_pipe(fds);
    CHECK(fill_pipe(fds[1]) > 0);
    stderr_is(fds[1]);
    check_lost(fds[0]);
    check_told(fds[0], "3");
}

TEST_ONCE(full_pipe_loses_lines)
{
    full_pipe();
    close_all();
}

/* Where a pipe cannot be opened anew: not Linux, no /proc, another user, no descriptor left. */
TEST_ONCE(full_pipe_loses_lines_without_a_descriptor)
{
    t_fail_call("open", 0, 1, true);
    full_pipe();
    close_all();
}

/* What a pipe's writers share keeps its flags. */
TEST_ONCE(flags_of_stderr_stay_as_they_are)
{
    int fds[2];
    make_pipe(fds);
    stderr_is(fds[1]);
    tsrvi_log(TSRV_LOG_WARNING, "a line");
    CHECK_INT(fcntl(fds[1], F_GETFL) & O_NONBLOCK, 0);
    CHECK(fill_pipe(fds[1]) > 0);
    tsrvi_log(TSRV_LOG_WARNING, "a line");
    CHECK_INT(fcntl(fds[1], F_GETFL) & O_NONBLOCK, 0);
    stderr_back();
    close_all();
}

TEST_ONCE(broken_pipe_loses_lines)
{
    int fds[2], good[2];
    make_pipe(fds);
    make_pipe(good);
    close(fds[0]);
    stderr_is(fds[1]);
    check_lost(-1);
    stderr_is(good[1]);
    check_told(good[0], "3");
    close_all();
}

TEST_ONCE(broken_pipe_loses_lines_without_a_descriptor)
{
    int fds[2], good[2];
    make_pipe(fds);
    make_pipe(good);
    close(fds[0]);
    t_fail_call("open", 0, 1, true);
    stderr_is(fds[1]);
    check_lost(-1);
    stderr_is(good[1]);
    check_told(good[0], "3");
    close_all();
}

TEST_ONCE(closed_stderr_loses_lines)
{
    int good[2];
    make_pipe(good);
    stderr_is(-1);
    check_lost(-1);
    stderr_is(good[1]);
    check_told(good[0], "3");
    close_all();
}

TEST_ONCE(full_device_loses_lines)
{
    int full = open("/dev/full", O_WRONLY | O_CLOEXEC), good[2];
    if (full < 0) {
        SKIP("/dev/full");
    }
    remember(full);
    make_pipe(good);
    stderr_is(full);
    check_lost(-1);
    stderr_is(good[1]);
    check_told(good[0], "3");
    close_all();
}

/* SIGXFSZ would end the process. */
TEST_ONCE(file_at_its_limit_loses_lines)
{
    struct rlimit limit;
    FILE *file = tmpfile();
    int good[2];
    make_pipe(good);
    CHECK(file != NULL && getrlimit(RLIMIT_FSIZE, &limit) == 0);
    limit.rlim_cur = 16;
    CHECK(ftruncate(fileno(file), 16) == 0 && lseek(fileno(file), 0, SEEK_END) == 16);
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    stderr_is(fileno(file));
    check_lost(-1);
    stderr_is(good[1]);
    check_told(good[0], "3");
    fclose(file);
    close_all();
}

/* The beginning of a line that found no room is not taken for one with the next. */
TEST_ONCE(line_that_was_cut_is_ended)
{
    struct rlimit limit;
    FILE *file = tmpfile();
    CHECK(file != NULL && getrlimit(RLIMIT_FSIZE, &limit) == 0);
    rlim_t before = limit.rlim_cur;
    limit.rlim_cur = 20;
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    stderr_is(fileno(file));
    tsrvi_log(TSRV_LOG_WARNING, "cut");
    tsrvi_log(TSRV_LOG_WARNING, "and lost");
    limit.rlim_cur = before;
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    tsrvi_log(TSRV_LOG_INFO, "and on");
    tsrvi_log(TSRV_LOG_INFO, "and on");
    stderr_back();
    CHECK(lseek(fileno(file), 0, SEEK_SET) == 0);
    CHECK_INT(count_lines(take(fileno(file))), 4);
    CHECK_INT(strcspn(taken, "\n"), 20);
    CHECK(strstr(taken, " WARNING 2 log lines were lost\n") != NULL);
    CHECK(strstr(taken, "\n\n") == NULL);
    fclose(file);
    close_all();
}

#ifdef __linux__
/* The controlling terminal of this process becomes descriptor 2. Returns the end that its reader has. */
static int make_terminal(void)
{
    int reader = remember(posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC)), terminal;
    signal(SIGHUP, SIG_IGN); /* in the end it goes */
    CHECK(grantpt(reader) == 0 && unlockpt(reader) == 0 && setsid() > 0);
    terminal = remember(open(ptsname(reader), O_RDWR | O_CLOEXEC));
    CHECK(tcgetpgrp(terminal) >= 0);
    stderr_is(terminal);
    return reader;
}

/* Lines to a terminal whose reader has stopped, until some are lost; then to one who reads again. */
static void stop_reading(void)
{
    int reader = make_terminal(), told = 0;
    for (int i = 0; i < 20 || tsrvi_process.log.lost < 20; i++) {
        tsrvi_log(TSRV_LOG_WARNING, "line %d", i);
        CHECK(i < 100000);
    }
    while (told == 0) {
        while (take(reader)[0] != 0) {
            told += strstr(taken, "log lines were lost") != NULL;
        }
        tsrvi_log(TSRV_LOG_WARNING, "and on");
    }
    close_all();
}

/* In a child: not everybody who runs a test may have another terminal. */
static void with_a_terminal(void (*use)(void))
{
    int status, reader = posix_openpt(O_RDWR | O_NOCTTY);
    if (reader < 0) {
        SKIP("terminals (devpts)");
    }
    close(reader);
    pid_t pid = fork();
    if (pid == 0) {
        use();
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid && status == 0);
}

TEST_ONCE(stopped_terminal_loses_lines)
{
    with_a_terminal(stop_reading);
}

/* As with "program &" behind "stty tostop": who is in the background is stopped by what it writes. */
static void write_in_the_background(void)
{
    int reader = make_terminal(), status;
    struct termios settings;
    CHECK(tcgetattr(2, &settings) == 0);
    settings.c_lflag |= TOSTOP;
    CHECK(tcsetattr(2, TCSANOW, &settings) == 0);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        CHECK(setpgid(0, 0) == 0);
        tsrvi_log(TSRV_LOG_WARNING, "from the background");
        _exit(0);
    }
    CHECK(waitpid(pid, &status, WUNTRACED) == pid);
    if (WIFSTOPPED(status)) {
        kill(pid, SIGKILL);
    }
    stderr_back();
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(strstr(take(reader), "from the background") != NULL);
    close_all();
}

TEST_ONCE(terminal_is_written_to_from_the_background)
{
    with_a_terminal(write_in_the_background);
}

/* Another user's terminal, as with su(1), or no /proc: poll says that a byte fits, and a line waits. */
TEST_ONCE(stopped_terminal_that_cannot_be_opened_again_loses_lines)
{
    cannot_open_again = 1;
    with_a_terminal(stop_reading);
}
#endif

/* It may be a client's. */
TEST_ONCE(socket_is_not_written_to)
{
    int pair[2], good[2];
    char byte;
    make_pipe(good);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    remember(pair[0]);
    remember(pair[1]);
    unsetenv("JOURNAL_STREAM");
    stderr_is(pair[1]);
    check_lost(-1);
    CHECK_INT(recv(pair[0], &byte, 1, MSG_DONTWAIT), -1);
    setenv("JOURNAL_STREAM", "8:4711", 1); /* another's, that was inherited */
    check_lost(-1);
    CHECK_INT(recv(pair[0], &byte, 1, MSG_DONTWAIT), -1);
    stderr_is(good[1]);
    check_told(good[0], "6");
    close_all();
}

static void set_journal(int fd)
{
    struct stat info;
    char text[100];
    CHECK(fstat(fd, &info) == 0);
    snprintf(text, sizeof text, "%llu:%llu", (unsigned long long)info.st_dev, (unsigned long long)info.st_ino);
    setenv("JOURNAL_STREAM", text, 1);
}

TEST_ONCE(journal_is_written_to)
{
    static char zeros[65536];
    int pair[2], good[2];
    make_pipe(good);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    remember(pair[0]);
    remember(pair[1]);
    CHECK(fcntl(pair[0], F_SETFL, O_NONBLOCK) == 0);
    set_journal(pair[1]);
    stderr_is(pair[1]);
    tsrvi_log(TSRV_LOG_WARNING, "to the journal");
    const char *text = take_text(pair[0], "WARNING");
    stderr_back();
    CHECK_STR(text, "to the journal");
    unsetenv("JOURNAL_STREAM"); /* as a program does that cleans its environment */
    stderr_is(pair[1]);
    tsrvi_log(TSRV_LOG_WARNING, "once more");
    text = take_text(pair[0], "WARNING");
    stderr_back();
    CHECK_STR(text, "once more");
    stderr_is(pair[1]); /* full */
    while (send(pair[1], zeros, sizeof zeros, MSG_DONTWAIT) > 0 || send(pair[1], zeros, 1, MSG_DONTWAIT) > 0) {
    }
    check_lost(-1);
    close(pair[0]); /* and gone */
    check_lost(-1);
    stderr_is(good[1]);
    check_told(good[0], "6");
    close_all();
}

/* It is known once there was anything to log, also if that was below the level. */
TEST_ONCE(journal_is_known_before_its_first_line)
{
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    remember(pair[0]);
    remember(pair[1]);
    CHECK(fcntl(pair[0], F_SETFL, O_NONBLOCK) == 0);
    set_journal(pair[1]);
    stderr_is(pair[1]);
    tsrv_set_log_level(TSRV_LOG_ERROR);
    tsrvi_log(TSRV_LOG_INFO, "not printed");
    unsetenv("JOURNAL_STREAM");
    tsrvi_log(TSRV_LOG_ERROR, "to the journal");
    stderr_back();
    CHECK_STR(take_text(pair[0], "ERROR"), "to the journal");
    close_all();
}

#ifdef __linux__
static int filled_first; /* the pipe that another process fills just before each write of ours */

static void fill_before_write(const char *name)
{
    if (strcmp(name, "write") == 0) {
        fill_pipe(filled_first);
    }
}

/* A pipe of another user's, who this process has changed from: it may not open that anew, and does not wait for it. */
TEST_ONCE(pipe_that_was_opened_before_a_change_of_the_user_loses_lines)
{
    int fds[2], other[2];
    t_need_proc();
    make_pipe(fds);
    make_pipe(other);
    stderr_is(fds[1]);
    tsrvi_log_keep();
    remember(tsrvi_process.log.kept);
    cannot_open_again = 1;
    filled_first = fds[1];
    t_seen = fill_before_write;
    check_lost(fds[0]);
    t_seen = NULL;
    check_told(fds[0], "3");
    stderr_is(other[1]); /* another one by now: what was kept is not it */
    tsrvi_log(TSRV_LOG_WARNING, "elsewhere");
    stderr_back();
    CHECK_STR(take_text(other[0], "WARNING"), "elsewhere");
    CHECK_STR(take(fds[0]), "");
    cannot_open_again = 0;
    close_all();
}

/* It is kept once; and what has taken its place, a file for one, is not it, nor is what cannot be looked at. */
TEST_ONCE(pipe_that_was_kept_is_known_again)
{
    struct stat pipe, file;
    int fds[2], null = remember(open("/dev/null", O_WRONLY | O_CLOEXEC));
    make_pipe(fds);
    stderr_is(fds[1]);
    tsrvi_log_keep();
    int own = remember(tsrvi_process.log.kept);
    tsrvi_log_keep();
    CHECK_INT(tsrvi_process.log.kept, own);
    stderr_back();
    CHECK(fstat(fds[1], &pipe) == 0 && fstat(null, &file) == 0);
    CHECK_INT(tsrvi_log_kept(&pipe), own);
    CHECK_INT(tsrvi_log_kept(&file), -1);
    t_fail_call("fstat", EIO, 1, false);
    CHECK_INT(tsrvi_log_kept(&pipe), -1);
    t_fail_call(NULL, 0, 0, false);
    close_all();
    tsrvi_process.log.kept = 0;
}

/* No terminal, and the system does not let it be opened anew: so it is written to as it is. */
TEST_ONCE(device_that_is_no_terminal_is_not_opened_as_one)
{
    stderr_is(remember(open("/dev/null", O_WRONLY | O_CLOEXEC)));
    t_fail_call("open", EACCES, 1, false);
    CHECK_INT(tsrvi_log_open(S_IFCHR), -1);
    CHECK_INT(t_fault_calls, 1); /* nor was another one tried */
    t_fail_call(NULL, 0, 0, false);
    stderr_back();
    close_all();
}
#endif

/* A stream whose number is 0 is not taken for a journal that there has never been. */
TEST_ONCE(stream_without_a_number_is_no_journal)
{
    struct stat info;
    memset(&info, 0, sizeof info);
    unsetenv("JOURNAL_STREAM");
    CHECK(!tsrvi_log_is_journal(&info));
}

static int held_lock;

static void release_lock(const char *name)
{
    if (strcmp(name, "sched_yield") == 0) {
        t_record(held_lock);
        tsrvi_unlock(&held_lock);
    }
}

/* Another thread of this process holds it, and lets it go when it comes to run; what a parent's thread holds is nobody's. */
TEST_ONCE(lock_that_another_thread_holds_is_waited_for)
{
    held_lock = (int)getpid();
    t_seen = release_lock;
    tsrvi_lock(&held_lock);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), getpid());
    CHECK_INT(held_lock, getpid());
    held_lock = (int)getppid();
    tsrvi_lock(&held_lock);
    t_seen = NULL;
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(held_lock, getpid());
}

static void *log_a_lot(void *context)
{
    for (int i = 0; i < 2000; i++) {
        tsrvi_log(TSRV_LOG_WARNING, "thread %d, line %d", *(int *)context, i);
    }
    return NULL;
}

/* Lines of several threads are whole; written ones and lost ones are all of them. */
TEST_ONCE(threads_share_a_full_pipe)
{
    pthread_t threads[4];
    int fds[2], ids[4], whole = 0, lost = 0;
    make_pipe(fds);
    stderr_is(fds[1]);
    for (int i = 0; i < 4; i++) {
        ids[i] = i;
        CHECK(pthread_create(&threads[i], NULL, log_a_lot, &ids[i]) == 0);
    }
    for (int i = 0; i < 4; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    stderr_back();
    static char all[2000000];
    size_t used = 0;
    ssize_t n;
    while ((n = read(fds[0], all + used, sizeof all - 1 - used)) > 0) {
        used += (size_t)n;
    }
    stderr_is(fds[1]);
    tsrvi_log(TSRV_LOG_WARNING, "thread 0, line 0");
    stderr_back();
    n = read(fds[0], all + used, sizeof all - 1 - used);
    CHECK(n > 0);
    used += (size_t)n;
    all[used] = 0;
    for (char *line = all, *end; *line != 0; line = end + 1) {
        int id, number;
        end = strchr(line, '\n');
        CHECK(end != NULL);
        *end = 0;
        CHECK(isdigit((unsigned char)line[0]));
        if (sscanf(line, "%*s %*d WARNING thread %d, line %d", &id, &number) == 2) {
            whole++;
        } else {
            CHECK_INT(sscanf(line, "%*s %*d WARNING %d log lines were lost", &number), 1);
            lost += number;
        }
    }
    CHECK(lost > 0);
    CHECK_INT(whole + lost, 8001);
    close_all();
}

/* ---- limits ------------------------------------------------------------------------------*/

static int limit_lines, limit_more; /* atomic; lines, and what "and N more" add up to */

static void add_line(int level, const char *message, void *context)
{
    const char *more = strstr(message, ": and ");
    (void)level, (void)context;
    if (more != NULL) {
        __atomic_add_fetch(&limit_more, atoi(more + 6), __ATOMIC_RELAXED);
    } else {
        __atomic_add_fetch(&limit_lines, 1, __ATOMIC_RELAXED);
    }
}

TEST_ONCE(lines_of_a_kind_are_limited)
{
    tsrv_set_log(add_line, NULL);
    for (int i = 0; i < 1000; i++) {
        tsrvi_log_limited(TSRVI_LOG_HANDLER, TSRV_LOG_ERROR, "handler %d", i);
    }
    CHECK_INT(limit_lines, 10);
    CHECK_INT(limit_more, 0);
    for (int i = 0; i < 5; i++) { /* another kind has its own */
        tsrvi_log_limited(TSRVI_LOG_TLS, TSRV_LOG_WARNING, "TLS %d", i);
    }
    tsrvi_log(TSRV_LOG_INFO, "and what peers cannot cause has none");
    CHECK_INT(limit_lines, 16);
    CHECK_INT(limit_more, 0);
    tsrv_set_log(see_line, NULL);
    v_now += SECOND;
    tsrvi_log(TSRV_LOG_INFO, "a second later the next line of any kind says how many");
    CHECK_INT(seen_lines, 2);
    seen_lines = 0;
    v_now += SECOND;
    tsrvi_log(TSRV_LOG_INFO, "once");
    CHECK_INT(seen_lines, 1);
    tsrv_set_log(add_line, NULL);
    for (int i = 0; i < 30; i++) {
        tsrvi_log_limited(TSRVI_LOG_HANDLER, TSRV_LOG_ERROR, "handler %d", i);
        v_now += SECOND / 20;
    }
    CHECK_INT(limit_lines, 16 + 20);
    CHECK_INT(limit_more, 10);
}

/* However long it takes: windows grow while they are exceeded, and when it is over they are as short as before. */
TEST_ONCE(flood_that_goes_on_costs_few_lines)
{
    enum { COUNT = 10000 };
    tsrv_set_log(add_line, NULL);
    for (int i = 0; i < COUNT; i++) {
        tsrvi_log_limited(TSRVI_LOG_HANDLER, TSRV_LOG_ERROR, "handler %d", i);
        v_now += 60 * (uint64_t)SECOND / COUNT;
    }
    CHECK(limit_lines <= 10 * 6);
    v_now += 200 * (uint64_t)SECOND;
    tsrvi_log(TSRV_LOG_INFO, "it is over");
    CHECK_INT(limit_lines - 1 + limit_more, COUNT);
    v_now += 200 * (uint64_t)SECOND;
    for (int i = 0; i < 12; i++) {
        tsrvi_log_limited(TSRVI_LOG_HANDLER, TSRV_LOG_ERROR, "handler %d", i);
    }
    limit_more = 0;
    v_now += SECOND;
    tsrvi_log(TSRV_LOG_INFO, "the next");
    CHECK_INT(limit_more, 2);
}

TEST_ONCE(suppressed_lines_are_told_of_with_level_and_kind)
{
    tsrv_set_log(see_line, NULL);
    for (int i = 0; i < 12; i++) {
        tsrvi_log_limited(TSRVI_LOG_TLS, TSRV_LOG_WARNING, "TLS %d", i);
    }
    v_now += SECOND;
    tsrvi_log_limited(TSRVI_LOG_HANDLER, TSRV_LOG_ERROR, "x");
    CHECK_INT(seen_lines, 12);
    CHECK_STR(seen_text, "x");
    for (int i = 0; i < 12; i++) {
        tsrvi_log_limited(TSRVI_LOG_TLS, TSRV_LOG_WARNING, "TLS %d", i);
    }
    tsrvi_log_settle(true);
    CHECK_INT(seen_level, TSRV_LOG_WARNING);
    CHECK_STR(seen_text, "TLS: and 2 more");
}

/* Of several threads that find a window over one begins the next; one that never began is no flood's. */
TEST_ONCE(window_begins_once)
{
    uint32_t since = tsrvi_process.log.kinds[TSRVI_LOG_TLS].since;
    tsrv_set_log(see_line, NULL);
    tsrvi_process.log.kinds[TSRVI_LOG_TLS].count = 100;
    tsrvi_process.log.kinds[TSRVI_LOG_TLS].level = TSRV_LOG_ERROR;
    tsrvi_log_turn(TSRVI_LOG_TLS, since + 1, since + 5);
    CHECK_INT(seen_lines, 0);
    CHECK_INT(tsrvi_process.log.kinds[TSRVI_LOG_TLS].since, since);
    tsrvi_log_turn(TSRVI_LOG_TLS, since, since + 5);
    CHECK_INT(seen_lines, 1);
    CHECK_STR(seen_text, "TLS: and 90 more");
    CHECK_INT(tsrvi_process.log.kinds[TSRVI_LOG_TLS].since, since + 5);
    tsrvi_process.log.kinds[TSRVI_LOG_TLS].count = 100;
    tsrvi_process.log.kinds[TSRVI_LOG_TLS].length = 0;
    tsrvi_log_turn(TSRVI_LOG_TLS, since + 5, since + 5);
    CHECK_INT(seen_lines, 2);
    CHECK_INT(tsrvi_process.log.kinds[TSRVI_LOG_TLS].length, TSRVI_LOG_WINDOW);
}

static void *log_limited_lines(void *context)
{
    (void)context;
    for (int i = 0; i < 20000; i++) {
        tsrvi_log_limited(i & 1 ? TSRVI_LOG_TLS : TSRVI_LOG_HANDLER, TSRV_LOG_ERROR, "line %d", i);
    }
    return NULL;
}

/* The clock moves on with every look at it, so that seconds begin meanwhile. */
TEST_ONCE(no_thread_makes_a_line_uncounted)
{
    pthread_t threads[4];
    tsrv_set_log(add_line, NULL);
    for (int i = 0; i < 4; i++) {
        CHECK(pthread_create(&threads[i], NULL, log_limited_lines, NULL) == 0);
    }
    for (int i = 0; i < 4; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    tsrvi_log_settle(true);
    CHECK_INT(limit_lines + limit_more, 80000);
    CHECK(limit_more > 0);
}

static void never_called(void *context)
{
    (void)context;
    T_FAIL("a timer that is an hour away has fired");
}

/* Nothing more is logged, and yet it is said: a loop that would sleep wakes up for it. */
TEST_LOOP(idle_loop_tells_of_suppressed_lines)
{
    tsrv_timer timer = {0};
    s_open_loop();
    tsrv_set_log(see_line, NULL);
    CHECK_INT(tsrv_timer_start(s_loop, &timer, 3600 * 1000, never_called, NULL), TSRV_OK);
    for (int i = 0; i < 25; i++) {
        tsrvi_log_limited(TSRVI_LOG_HANDLER, TSRV_LOG_ERROR, "handler %d", i);
    }
    CHECK_INT(seen_lines, 10);
    int64_t begin = v_ms();
    int wakes = 0;
    while (seen_lines == 10) {
        CHECK_INT(tsrv_loop_run_once(s_loop, -1), 1);
        wakes++;
        CHECK(wakes < 100);
    }
    CHECK_STR(seen_text, "handle_stream: and 15 more");
    CHECK(v_ms() - begin >= 999 && v_ms() - begin <= 2100);
    CHECK(tsrv_loop_timeout_ms(s_loop) > 3000 * 1000); /* and sleeps on */
    tsrv_timer_stop(&timer);
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
}

TEST_LOOP(end_of_a_loop_tells_of_suppressed_lines)
{
    s_open_loop();
    tsrv_set_log(see_line, NULL);
    for (int i = 0; i < 25; i++) {
        tsrvi_log_limited(TSRVI_LOG_HANDLER, TSRV_LOG_ERROR, "handler %d", i);
    }
    CHECK_INT(tsrv_loop_run(s_loop), TSRV_OK);
    CHECK_STR(seen_text, "handle_stream: and 15 more");
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
}

/* What its parent has lost or suppressed is not a child's to tell. */
TEST_ONCE(child_of_a_fork_counts_for_itself)
{
    int fds[2], status;
    make_pipe(fds);
    stderr_is(-1);
    for (int i = 0; i < 25; i++) {
        tsrvi_log_limited(TSRVI_LOG_HANDLER, TSRV_LOG_ERROR, "handler %d", i);
    }
    v_now += 2 * (uint64_t)SECOND;
    pid_t pid = fork();
    if (pid == 0) {
        CHECK(dup2(fds[1], 2) == 2);
        tsrvi_log(TSRV_LOG_WARNING, "the child's");
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid && status == 0);
    int of, lines = count_lines(take(fds[0]));
    stderr_back();
    CHECK_INT(lines, 1);
    CHECK_INT(sscanf(taken, "%*s %d WARNING the child's", &of), 1);
    CHECK_INT(of, pid);
    stderr_is(fds[1]);
    tsrvi_log(TSRV_LOG_WARNING, "the parent's");
    stderr_back();
    CHECK_INT(count_lines(take(fds[0])), 3);
    CHECK(strstr(taken, "10 log lines were lost") != NULL);
    CHECK(strstr(taken, "handle_stream: and 15 more") != NULL);
    close_all();
}

static int fail(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address;
    ++*(int *)context;
    return -EIO;
}

/* The counters are exact, whatever the log leaves out. */
TEST_SOFT(failing_handlers_do_not_flood_the_log)
{
    enum { COUNT = 500 };
    tsrv_server_options options = {0};
    tsrv_stats stats;
    int calls = 0;
    options.handle_stream = fail;
    options.context = &calls;
    s_open(options);
    tsrv_set_log(add_line, NULL);
    int64_t begin = v_ms();
    for (int i = 0; i < COUNT; i++) {
        int fd = t_connect(s_port);
        s_until(&calls, i + 1);
        t_reset(fd);
    }
    s_run_ms(2000);
    CHECK_INT(limit_lines + limit_more, COUNT);
    CHECK(limit_lines <= 10 * (2 + (v_ms() - begin) / 1000));
    tsrv_server_stats(s_server, &stats);
    CHECK_INT(stats.accepted, COUNT);
    s_close();
}

/* ---- what a line says --------------------------------------------------------------------*/

static int read_too_much(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    (void)address;
    return tsrv_read_until(stream, "\n", *(size_t *)context, &slice);
}

static int read_too_many(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    (void)address;
    return tsrv_read_bytes(stream, *(size_t *)context, &slice);
}

static int write_too_much(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    int rc;
    (void)address, (void)context;
    do {
        rc = tsrv_try_write(stream, "0123456789", 10);
    } while (rc == TSRV_OK);
    return rc;
}

TEST_SOFT(line_names_the_limit_that_was_met)
{
    static const struct {
        tsrv_handler handler;
        size_t bytes;
        const char *text;
    } rows[] = {{read_too_much, 100, "longer than allowed: more than 100 bytes (max_bytes)"},
                {read_too_much, 0, "longer than allowed: more than 1000 bytes (max_buffer_size)"},
                {read_too_much, 5000, "longer than allowed: more than 1000 bytes (max_buffer_size)"},
                {read_too_many, 5000, "longer than allowed: more than 1000 bytes (max_buffer_size)"},
                {write_too_much, 0, "the output queue is full: more than 4096 bytes (max_write_buffer_size)"}};
    char data[2000];
    memset(data, 'x', sizeof data);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        tsrv_server_options options = {0};
        size_t bytes = rows[i].bytes;
        options.handle_stream = rows[i].handler;
        options.context = &bytes;
        options.max_buffer_size = 1000;
        options.max_write_buffer_size = 4096;
        s_open(options);
        int fd = t_connect(s_port), lines = t_log_lines;
        t_send(fd, data, sizeof data);
        s_until(&t_log_lines, lines + 1);
        CHECK(strstr(t_log, "handle_stream for 127.0.0.1:") == t_log);
        CHECK_STR(strstr(t_log, ": ") + 2, rows[i].text);
        t_close(fd);
        s_close();
    }
}

TEST_ONCE(what_a_server_listens_on_is_logged)
{
    tsrv_server_options options = {0};
    char expected[100];
    int calls = 0;
    options.handle_stream = fail;
    options.context = &calls;
    s_open_loop();
    tsrv_set_log(see_line, NULL);
    s_server = s_new_server(options);
    s_port = t_listen(s_server);
    snprintf(expected, sizeof expected, "listening on 127.0.0.1:%d", s_port);
    CHECK_STR(seen_text, expected);
    CHECK_INT(seen_level, TSRV_LOG_INFO);
    s_close();
}

/* ---- descriptors 0 to 2 ------------------------------------------------------------------*/

static int low[3] = {-1, -1, -1}; /* the harness's */

static void close_low(void)
{
    fflush(NULL);
    for (int fd = 0; fd < 3; fd++) {
        low[fd] = fcntl(fd, F_DUPFD_CLOEXEC, 60);
        CHECK(low[fd] >= 0);
    }
    for (int fd = 0; fd < 3; fd++) {
        close(fd);
    }
}

static bool is_null_or_closed(int fd)
{
    struct stat info, null;
    return fstat(fd, &info) < 0 ||
           (stat("/dev/null", &null) == 0 && S_ISCHR(info.st_mode) && info.st_rdev == null.st_rdev);
}

static void restore_low(bool null)
{
    bool good[3];
    for (int fd = 0; fd < 3; fd++) {
        good[fd] = is_null_or_closed(fd) && (!null || fcntl(fd, F_GETFD) == 0);
    }
    for (int fd = 0; fd < 3; fd++) {
        CHECK(dup2(low[fd], fd) == fd);
        close(low[fd]);
        low[fd] = -1;
    }
    for (int fd = 0; fd < 3; fd++) {
        if (!good[fd]) {
            T_FAIL("descriptor %d has become something else than /dev/null", fd);
        }
    }
}

static int low_fd = -1, low_seen; /* the stream's */

static int note_fd(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    low_fd = tsrv_fd(stream);
    low_seen++;
    tsrv_write(stream, "hello", 5);
    return -EIO;
}

/* Everything that makes descriptors, begun without 0, 1 and 2; what fails is logged too. */
TEST_LOOP(library_is_never_at_a_low_number)
{
    tsrv_server_options options = {0};
    options.handle_stream = note_fd;
    close_low();
    s_open_loop();
    tsrv_set_log(NULL, NULL);
    s_server = s_new_server(options);
    s_port = t_listen(s_server);
    CHECK(tsrv_cpu_count() > 0); /* reads files */
    restore_low(true);
    for (int i = 0; i < 3; i++) {
        int fd = t_connect(s_port);
        close_low(); /* later on, as careless daemonizers do */
        s_until(&low_seen, i + 1);
        s_settle();
        restore_low(true);
        CHECK(low_fd > 2);
        s_expect(fd, "hello");
        s_expect_eof(fd); /* and no line of the log */
        t_close(fd);
    }
    s_close();
}

TEST_ONCE(pipe_is_never_at_a_low_number)
{
    int fds[2];
    close_low();
    int rc = tsrvi_pipe(fds);
    restore_low(true);
    CHECK_INT(rc, TSRV_OK);
    CHECK(fds[0] > 2 && fds[1] > 2);
    CHECK(write(fds[1], "x", 1) == 1);
    CHECK_INT(fcntl(fds[0], F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    CHECK_INT(fcntl(fds[1], F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    close(fds[0]);
    close(fds[1]);
}

static int open_count(void)
{
    int count = 0;
    for (int fd = 0; fd < 200; fd++) {
        count += fcntl(fd, F_GETFD) >= 0;
    }
    return count;
}

/* The move fails, or there is no /dev/null: nothing is left open, nothing at a low number. */
TEST_ONCE(move_to_a_higher_number_can_fail)
{
    static const char *const names[] = {"fcntl", "open", "dup2"};
    for (int i = 0; i < 3; i++) {
        close_low();
        int before = open_count();
        t_fail_call(names[i], EMFILE, 1, true);
        int fd = tsrvi_socket(AF_INET, SOCK_STREAM), fds[2], rc = tsrvi_pipe(fds);
        t_fault_at = 0;
        int nulls = (fcntl(0, F_GETFD) >= 0) + (fcntl(1, F_GETFD) >= 0) + (fcntl(2, F_GETFD) >= 0);
        int after = open_count() - nulls;
        restore_low(false);
        CHECK_INT(fd > 2 ? 0 : fd, i == 0 ? -EMFILE : 0);
        CHECK_INT(rc, i == 0 ? -EMFILE : TSRV_OK);
        CHECK_INT(after - before, i == 0 ? 0 : 3);
        if (i != 0) {
            close(fd), close(fds[0]), close(fds[1]);
        }
    }
}

TEST_ONCE(pipe_that_cannot_be_moved_is_closed)
{
    int fds[2] = {0, 0}, before;
    close_low();
    before = open_count();
    t_fail_call("fcntl", EMFILE, 1, true);
    int rc = tsrvi_pipe(fds);
    t_fault_at = 0;
    int nulls = (fcntl(0, F_GETFD) >= 0) + (fcntl(1, F_GETFD) >= 0) + (fcntl(2, F_GETFD) >= 0);
    int after = open_count() - nulls;
    restore_low(false);
    CHECK_INT(rc, -EMFILE);
    CHECK(fds[0] == -1 && fds[1] == -1);
    CHECK_INT(after, before);
}

/* In the common case it costs no call. */
static int owned_calls;

static void count_owned(const char *name)
{
    owned_calls += strcmp(name, "fcntl") == 0 || strcmp(name, "open") == 0 || strcmp(name, "dup2") == 0;
}

TEST_ONCE(owning_a_high_number_costs_nothing)
{
    t_seen = count_owned;
    CHECK_INT(tsrvi_fd_own(3), 3);
    CHECK_INT(tsrvi_fd_own(-1), -1);
    CHECK_INT(owned_calls, 0);
}

/* ---- SIGPIPE -----------------------------------------------------------------------------*/

TEST_ONCE(quiet_write_goes_on_after_a_signal)
{
    int fds[2];
    make_pipe(fds);
    t_fail_call("write", EINTR, 1, false);
    CHECK_INT(tsrvi_write_quiet(fds[1], "x", 1), 1);
    CHECK_INT(t_fault_hits, 1);
    t_fault_at = 0;
    CHECK_STR(take(fds[0]), "x");
    close_all();
}

TEST_ONCE(quiet_write_raises_nothing)
{
    sigset_t pipe_signal, pending;
    int fds[2];
    make_pipe(fds);
    CHECK_INT(tsrvi_write_quiet(fds[1], "x", 1), 1);
    close(fds[0]);
    CHECK_INT(tsrvi_write_quiet(fds[1], "x", 1), -1);
    CHECK_INT(errno, EPIPE);
    sigemptyset(&pipe_signal);
    sigaddset(&pipe_signal, SIGPIPE);
    CHECK(pthread_sigmask(SIG_BLOCK, &pipe_signal, NULL) == 0);
    CHECK_INT(tsrvi_write_quiet(fds[1], "x", 1), -1);
    CHECK(sigpending(&pending) == 0 && !sigismember(&pending, SIGPIPE));
    raise(SIGPIPE); /* the program's own, which it keeps for later */
    CHECK_INT(tsrvi_write_quiet(fds[1], "x", 1), -1);
    CHECK(sigpending(&pending) == 0 && sigismember(&pending, SIGPIPE));
    close_all();
}

#ifdef __linux__
static int file_fd, file_rc, file_over;

static int send_the_file(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    file_rc = tsrv_sendfile(stream, file_fd, 0, 65536);
    return file_rc < 0 ? file_rc : tsrv_flush(stream);
}

static void file_closed(tsrv_stream *stream, int reason, void *context)
{
    (void)stream, (void)reason, (void)context;
    file_over++;
}

TEST_SOFT(reset_in_the_middle_of_sendfile)
{
    tsrv_server_options options = {0};
    FILE *file = tmpfile();
    CHECK(file != NULL && ftruncate(fileno(file), 65536) == 0);
    file_fd = fileno(file);
    options.handle_stream = send_the_file;
    options.on_close = file_closed;
    s_open(options);
    for (size_t after = 1; after <= 4096; after += 4095) {
        reset_after = after;
        file_over = 0;
        int fd = t_connect(s_port);
        s_turn();
        t_reset(fd);
        s_until(&file_over, 1);
    }
    s_close();
    fclose(file);
}
#endif

/* ---- codes, numbers and times --------------------------------------------------------------*/

TEST_ONCE(failure_without_a_number_is_one_all_the_same)
{
    errno = 0;
    CHECK_INT(tsrvi_error(), -EIO);
    errno = EPERM;
    CHECK_INT(tsrvi_error(), -EPERM);
}

TEST_ONCE(time_that_would_wrap_is_never)
{
    CHECK(tsrvi_after(TSRVI_FOREVER - 2 * TSRVI_MS, 1) == TSRVI_FOREVER - TSRVI_MS);
    CHECK(tsrvi_after(TSRVI_FOREVER - TSRVI_MS, 1) == TSRVI_FOREVER);
    CHECK(tsrvi_after(TSRVI_FOREVER - TSRVI_MS + 1, 1) == TSRVI_FOREVER);
    CHECK(tsrvi_after(TSRVI_FOREVER - 1, INT_MAX) == TSRVI_FOREVER);
    CHECK(tsrvi_after(1, TSRV_NEVER) == TSRVI_FOREVER);
}

/* Times of streams wrap after 49 days, and 0 is never: what would be 0 is a millisecond late. */
TEST_ONCE(times_of_streams_wrap)
{
    static tsrv_loop loop;
    static tsrv_server server;
    static tsrv_stream stream;
    const uint64_t wrap = (uint64_t)1 << 32;
    loop.now = (wrap - 5) * TSRVI_MS;
    loop.now_ms = UINT32_MAX - 4;
    loop.running = true; /* and for a moment only */
    loop.slow.ticked = tsrvi_ticks();
    CHECK_INT(tsrvi_ms_at(&loop, (wrap - 1) * TSRVI_MS), UINT32_MAX);
    CHECK_INT(tsrvi_ms_at(&loop, wrap * TSRVI_MS), 1);
    CHECK_INT(tsrvi_ms_at(&loop, (wrap + 1) * TSRVI_MS), 1);
    CHECK_INT(tsrvi_ms_at(&loop, TSRVI_FOREVER), 0);
    CHECK_INT(tsrvi_ms_after(&loop, 3), UINT32_MAX);
    CHECK_INT(tsrvi_ms_after(&loop, 4), 1);
    CHECK_INT(tsrvi_ms_after(&loop, 5), 1);
    CHECK_INT(tsrvi_ms_after(&loop, TSRV_NEVER), 0);
    CHECK(tsrvi_ms_due(&loop, 0) == TSRVI_FOREVER);
    CHECK(tsrvi_ms_due(&loop, 2) == (wrap + 2) * TSRVI_MS);
    CHECK(tsrvi_ms_due(&loop, UINT32_MAX - 5) == loop.now);
    stream.server = &server;
    stream.active_ms = UINT32_MAX - 4;
    server.options.idle_timeout_ms = 3;
    CHECK_INT(tsrvi_stream_idle_due(&stream), UINT32_MAX);
    server.options.idle_timeout_ms = 4;
    CHECK_INT(tsrvi_stream_idle_due(&stream), 1);
    server.options.idle_timeout_ms = TSRV_NEVER;
    CHECK_INT(tsrvi_stream_idle_due(&stream), 0);
}

/* And of two the earlier is told, also when one is past and the other as far ahead as can be. */
TEST_ONCE(times_of_streams_that_are_far_apart_can_be_compared)
{
    enum { DAY_MS = 24 * 3600 * 1000 };
    static tsrv_loop loop;
    loop.running = true;
    loop.slow.ticked = tsrvi_ticks();
    loop.now = (uint64_t)20 * DAY_MS * TSRVI_MS;
    loop.now_ms = 20u * DAY_MS;
    uint32_t past = loop.now_ms - 10u * DAY_MS, farthest = tsrvi_ms_after(&loop, INT_MAX);
    CHECK(tsrvi_ms_earlier(past, farthest) == past);
    CHECK(tsrvi_ms_earlier(farthest, past) == past);
    CHECK(tsrvi_ms_earlier(tsrvi_ms_at(&loop, TSRVI_FOREVER - 1), past) == past);
    CHECK(tsrvi_ms_due(&loop, farthest) > loop.now + (uint64_t)10 * DAY_MS * TSRVI_MS);
}

/* A wide character that the locale does not have. */
TEST_ONCE(text_that_cannot_be_formatted_is_empty)
{
    static const wchar_t none[] = {0x20ac, 0};
    char buffer[8] = "abcd";
    tsrvi_text text = {buffer, sizeof buffer, 2};
    tsrv_set_log(see_line, NULL);
    snprintf(seen_text, sizeof seen_text, "before");
    tsrvi_log(TSRV_LOG_ERROR, "%ls", none);
    CHECK_INT(seen_lines, 1);
    CHECK_STR(seen_text, "");
    tsrvi_text_add(&text, "%ls", none);
    CHECK_INT(text.length, 2);
    tsrvi_text_add(&text, "%d", 7);
    CHECK_INT(text.length, 3);
    buffer[3] = 0;
    CHECK_STR(buffer, "ab7");
}

TEST_ONCE(every_code_has_a_text_of_its_own)
{
    static const int codes[] = {TSRV_OK, TSRV_EAGAIN, TSRV_EOF, TSRV_ECLOSED, TSRV_ETIMEOUT, TSRV_ETOOLONG, TSRV_EFULL,
                                TSRV_EBUSY, TSRV_EINVAL, TSRV_ENOTSUP, TSRV_ERESOLVE, TSRV_ETLS, TSRV_EPROXY,
                                TSRV_ERESTARTS, TSRV_EPARENT, 1, -ENOENT, -EPERM, -20000};
    char text[200];
    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        CHECK(strlen(tsrv_strerror(codes[i])) > 5);
        for (size_t j = 0; j < i; j++) {
            CHECK(strcmp(tsrv_strerror(codes[i]), tsrv_strerror(codes[j])) != 0);
        }
    }
    CHECK_STR(tsrv_strerror(7), tsrv_strerror(1)); /* the program's own */
    CHECK_STR(tsrv_strerror(-ENOENT), strerror(ENOENT));
    snprintf(text, sizeof text, "%s", strerror(9999)); /* which the next call overwrites */
    CHECK_STR(tsrv_strerror(-9999), text);
    CHECK_STR(tsrv_strerror(-10000), tsrv_strerror(-20000));
}

#ifdef TSRV_DEBUG
/* Each is told once, by its function and by what it is; what there is no room for is not told at all. */
TEST_ONCE(mistakes_are_told_once)
{
    static const char one[] = "one", other[] = "other";
    static char names[TSRVI_MISTAKES][2];
    CHECK(tsrvi_mistake_is_new(names[0], one));
    CHECK(!tsrvi_mistake_is_new(names[0], one));
    CHECK(tsrvi_mistake_is_new(names[0], other));
    CHECK(tsrvi_mistake_is_new(names[1], one));
    CHECK(!tsrvi_mistake_is_new(names[0], other));
    for (int i = 2; i < TSRVI_MISTAKES - 1; i++) {
        CHECK(tsrvi_mistake_is_new(names[i], one));
    }
    CHECK(!tsrvi_mistake_is_new(names[TSRVI_MISTAKES - 1], one));
    CHECK(!tsrvi_mistake_is_new(names[0], one));
}
#endif
