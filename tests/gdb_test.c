/* tests/gdb.py lists coroutines that wait, of a process and of a core file. */
#include "test.h"

#ifdef __linux__
#include <sys/prctl.h>
#endif

#if TSRVI_HAS_ASAN || TSRVI_HAS_TSAN
#define HAS_CORES false /* their shadow is in it */
#else
#define HAS_CORES true
#endif

static tsrv_condition notice;
static tsrv_loop *loop;

static int await_request(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    (void)address, (void)context;
    int rc = tsrv_read_until(stream, "\n", 0, &line);
    t_record(rc); /* so that this function has a frame */
    return rc;
}

static void sleep_here(void *context)
{
    (void)context;
    t_record(tsrv_sleep(1000000));
}

static void await_notice(void *context)
{
    (void)context;
    t_record(tsrv_condition_wait(&notice, TSRV_NEVER));
}

static int count_waiting(void)
{
    int count = 0;
    for (tsrvi_link *link = loop->coroutines.all.next; link != &loop->coroutines.all; link = link->next) {
        count += TSRVI_CONTAINER(link, tsrvi_co, link)->waiting;
    }
    return count;
}

static void tell_when_three_wait(void *context)
{
    while (count_waiting() < 3) {
        tsrv_sleep(0);
    }
    CHECK(write(*(int *)context, "", 1) == 1);
}

/* The program that is looked at: three coroutines, each of which waits for something else. */
__attribute__((noreturn)) static void run_program(int told)
{
    tsrv_server_options options = {0};
    tsrv_server *waiting;
#ifdef __linux__
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
#endif
    /* gdb 13 writes no core of a mapping with a guard of the new kind in it; the kernel does. */
    t_fail_call("madvise", EINVAL, 1, true);
    options.loop = loop = t_new_loop();
    options.handle_stream = await_request;
    CHECK_INT(tsrv_server_new(&waiting, &options), TSRV_OK);
    t_add_pair(waiting);
    CHECK_INT(tsrv_spawn(loop, sleep_here, NULL), TSRV_OK);
    CHECK_INT(tsrv_spawn(loop, await_notice, NULL), TSRV_OK);
    CHECK_INT(tsrv_spawn(loop, tell_when_three_wait, &told), TSRV_OK);
    tsrv_loop_run(loop);
    _exit(1);
}

/* Runs gdb on it. Returns what it says. */
static const char *run_gdb(const char *program, const char *process, const char *more)
{
    static char output[65536];
    int fds[2], status;
    CHECK(pipe(fds) == 0);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        dup2(fds[1], 1);
        dup2(fds[1], 2);
        close(fds[0]);
        close(fds[1]);
        unsetenv("DEBUGINFOD_URLS");
        execlp("gdb", "gdb", "-nx", "-batch", program, process, "-x", "tests/gdb.py", "-ex", "tsrv-coroutines",
               more != NULL ? "-ex" : (char *)NULL, more, (char *)NULL);
        _exit(127);
    }
    close(fds[1]);
    output[0] = 0;
    size_t size = 0;
    for (ssize_t n; size + 1 < sizeof output && (n = read(fds[0], output + size, sizeof output - 1 - size)) > 0;) {
        size += (size_t)n;
    }
    output[size] = 0;
    t_close(fds[0]);
    CHECK_INT(waitpid(pid, &status, 0), pid);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 127) {
        SKIP("gdb");
    }
    if (strstr(output, "ptrace: Operation not permitted") != NULL) {
        SKIP("the permission to trace processes");
    }
    return output;
}

static void check_list(const char *text)
{
    static const char *const parts[] = {"await_request (", "sleep_here (", "await_notice ("};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (t_count(text, parts[i]) != 1) {
            T_FAIL("\"%s\" is not once in:\n%s", parts[i], text);
        }
    }
    CHECK_INT(t_count(text, " waits: "), 3);
    CHECK_INT(t_count(text, " of loop "), 3);
    CHECK_INT(t_count(text, "corrupt"), 0);
}

TEST_ONCE(gdb_lists_coroutines_that_wait)
{
    char program[PATH_MAX], process[32], core[128], command[160];
    int fds[2], status;
    t_need_proc();
    ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    program[length] = 0;
    const char *directory = t_make_directory();
    snprintf(core, sizeof core, "%s/core", directory);
    snprintf(command, sizeof command, "generate-core-file %s", core);
    CHECK(pipe(fds) == 0);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        run_program(fds[1]);
    }
    CHECK(read(fds[0], process, 1) == 1);
    t_close_all(fds, 2);
    snprintf(process, sizeof process, "%d", (int)pid);
    check_list(run_gdb(program, process, HAS_CORES ? command : NULL));
    CHECK_INT(waitpid(pid, &status, WNOHANG), 0); /* it goes on */
    CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, &status, 0) == pid);
    if (HAS_CORES) {
        check_list(run_gdb(program, core, NULL));
        CHECK(unlink(core) == 0);
    }
    CHECK(rmdir(directory) == 0);
}
