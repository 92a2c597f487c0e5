/* examples/postgres.c with a PostgreSQL server of the test's own, on a unix socket. EXAMPLES names the directory of
 * the built programs. */
#include "test.h"

#include <dirent.h>
#include <grp.h>
#include <libpq-fe.h>
#include <pwd.h>

#define TEST_MODES(name) T_TEST(name, T_COROUTINES | T_CALLBACKS)

#define POOL_SIZE 4
#define CLIENTS 50
#define LONG_MS "60000" /* no time limit that matters here */
#define LOCKED "SELECT pg_advisory_xact_lock_shared(1), $1" /* waits as long as the test has the lock */

/* ---- the server ---------------------------------------------------------------------------*/

static char directory[128]; /* of its socket, its data and its log */
static char data[160];
static uid_t user; /* who it runs as, since it refuses root; 0 = who runs the test */
static gid_t group;
static pid_t server;

/* Runs a program as the server's user, with its output in the log. */
static pid_t run_as_user(const char *const *arguments)
{
    char log[160];
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        if (user != 0 && (setgroups(0, NULL) != 0 || setgid(group) != 0 || setuid(user) != 0)) {
            _exit(2);
        }
        snprintf(log, sizeof log, "%s/log", directory);
        int fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
        dup2(fd, 1);
        dup2(fd, 2);
        for (int i = 3; i < 64; i++) {
            close(i);
        }
        execvp(arguments[0], (char *const *)arguments);
        _exit(126);
    }
    return pid;
}

static int end_of(pid_t pid)
{
    int status;
    while (waitpid(pid, &status, 0) < 0) {
        CHECK_INT(errno, EINTR);
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* The path of initdb or postgres: Debian's, or what PATH finds. */
static bool find_program(const char *name, char *path, size_t size)
{
    DIR *versions = opendir("/usr/lib/postgresql");
    bool found = false;
    for (struct dirent *entry; versions != NULL && !found && (entry = readdir(versions)) != NULL;) {
        snprintf(path, size, "/usr/lib/postgresql/%s/bin/%s", entry->d_name, name);
        found = entry->d_name[0] != '.' && access(path, X_OK) == 0;
    }
    if (versions != NULL) {
        closedir(versions);
    }
    for (const char *at = getenv("PATH"); at != NULL && !found; at = strchr(at, ':')) {
        at += *at == ':';
        snprintf(path, size, "%.*s/%s", (int)strcspn(at, ":"), at, name);
        found = access(path, X_OK) == 0;
    }
    return found;
}

static const char *program(const char *name)
{
    static char path[512];
    if (!find_program(name, path, sizeof path)) {
        SKIP(name);
    }
    return path;
}

/* Below build/ if the server's user can reach that, and its name leaves room for a socket's; else in /tmp. */
static void make_directory(void)
{
    static const char *const parents[] = {"build", "/tmp"};
    if (geteuid() == 0) {
        struct passwd *nobody = getpwnam("nobody");
        CHECK(nobody != NULL);
        user = nobody->pw_uid;
        group = nobody->pw_gid;
    }
    for (int i = 0; i < 2; i++) {
        char parent[PATH_MAX];
        if (realpath(parents[i], parent) == NULL || strlen(parent) > 60) {
            continue;
        }
        snprintf(directory, sizeof directory, "%.60s/postgres-XXXXXX", parent);
        if (mkdtemp(directory) == NULL) {
            continue;
        }
        snprintf(data, sizeof data, "%s/data", directory);
        CHECK(user == 0 || chown(directory, user, group) == 0);
        const char *const arguments[] = {"test", "-w", directory, NULL};
        if (end_of(run_as_user(arguments)) == 0) {
            return;
        }
        rmdir(directory);
    }
    T_FAIL("no directory that the server's user can reach");
}

static void remove_directory(void)
{
    const char *const arguments[] = {"rm", "-rf", directory, NULL};
    user = 0;
    end_of(run_as_user(arguments));
    CHECK(access(directory, F_OK) != 0);
}

static const char *conninfo(const char *application)
{
    static char text[256];
    snprintf(text, sizeof text, "host=%s user=tester dbname=postgres application_name=%s", directory, application);
    return text;
}

static bool is_ready(void *context)
{
    int status;
    (void)context;
    if (waitpid(server, &status, WNOHANG) != 0) {
        T_FAIL("postgres has ended: see %s/log", directory);
    }
    return PQping(conninfo("test")) == PQPING_OK;
}

static void start_server(void)
{
    const char *const arguments[] = {program("postgres"), "-D", data, "-k", directory, "-c", "listen_addresses=", "-c",
                                     "fsync=off", "-c", "dynamic_shared_memory_type=mmap", "-c", "shared_buffers=4MB",
                                     "-c", "max_connections=30", NULL};
    server = run_as_user(arguments);
    CHECK(t_wait_until(is_ready, NULL));
}

static void create_server(void)
{
    const char *const arguments[] = {program("initdb"), "-D", data, "-N", "--no-instructions", "--locale=C", "-E",
                                     "UTF8", "-A", "trust", "-U", "tester", NULL};
    CHECK_INT(end_of(run_as_user(arguments)), 0);
    start_server();
}

/* It ends its sessions, and does not wait for their clients. */
static void stop_server(void)
{
    CHECK(kill(server, SIGINT) == 0);
    CHECK_INT(end_of(server), 0);
}

/* A session of the test's own. */
static PGconn *session(void)
{
    PGconn *connection = PQconnectdb(conninfo("test"));
    if (PQstatus(connection) != CONNECTION_OK) {
        T_FAIL("%s", PQerrorMessage(connection));
    }
    return connection;
}

static int ask_number(PGconn *connection, const char *statement)
{
    PGresult *result = PQexec(connection, statement);
    if (PQresultStatus(result) != PGRES_TUPLES_OK && PQresultStatus(result) != PGRES_COMMAND_OK) {
        T_FAIL("%s", PQerrorMessage(connection));
    }
    int number = PQntuples(result) > 0 ? atoi(PQgetvalue(result, 0, 0)) : 0;
    PQclear(result);
    return number;
}

#define EXAMPLES_SESSIONS "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'example'"
#define EXAMPLES_WAITS EXAMPLES_SESSIONS " AND wait_event_type = 'Lock'"

/* Waits until so many of the example's sessions wait for the lock. It never has more than its pool. */
static void await_locked(PGconn *connection, int count)
{
    int64_t end = t_patience();
    while (ask_number(connection, EXAMPLES_WAITS) != count) {
        CHECK(ask_number(connection, EXAMPLES_SESSIONS) <= POOL_SIZE);
        CHECK(t_now_ms() < end);
        poll(NULL, 0, 2);
    }
}

/* ---- the example --------------------------------------------------------------------------*/

typedef struct example {
    int port;
    pid_t pid;
    int output;
} example;

static const char *example_name = "example"; /* and what else is to be in its conninfo */

static example start_example(const char *statement, const char *timeout_ms)
{
    const char *built = getenv("EXAMPLES");
    char path[PATH_MAX], line[256];
    int fds[2];
    example e;
    snprintf(path, sizeof path, "%s/postgres", built != NULL ? built : "build/cc-c99");
    if (access(path, X_OK) != 0) {
        SKIP("the built examples (make examples, and EXAMPLES=directory)");
    }
    CHECK(pipe(fds) == 0);
    e.pid = fork();
    CHECK(e.pid >= 0);
    if (e.pid == 0) {
        dup2(fds[1], 1);
        close(fds[0]);
        close(fds[1]);
        execl(path, path, "0", conninfo(example_name), statement, timeout_ms,
              t_mode == TSRV_CALLBACK ? "callback" : (char *)NULL, (char *)NULL);
        _exit(126);
    }
    close(fds[1]);
    e.output = fds[0];
    CHECK(t_read_line(e.output, line, sizeof line));
    CHECK_INT(sscanf(line, "postgres: listening on port %d", &e.port), 1);
    return e;
}

/* It must have lived until now. */
static void stop_example(example *e)
{
    CHECK(kill(e->pid, SIGTERM) == 0);
    CHECK_INT(end_of(e->pid), 128 + SIGTERM);
    t_close(e->output);
}

static void expect_answer(int fd, const char *question, const char *answer)
{
    t_sends(fd, question);
    t_expect(fd, answer);
}

/* Milliseconds of processor time that it has used. */
static long cpu_ms(const example *e)
{
    char path[64], text[1024];
    long user_ticks = 0, system_ticks = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)e->pid);
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        return 0; /* not Linux */
    }
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    fclose(file);
    CHECK_INT(sscanf(strrchr(text, ')') + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %ld %ld", &user_ticks,
                     &system_ticks), 2);
    return (user_ticks + system_ticks) * 1000 / sysconf(_SC_CLK_TCK);
}

/* ---- tests --------------------------------------------------------------------------------*/

TEST_MODES(postgres_answers_lines)
{
    make_directory();
    create_server();
    PGconn *own = session();
    ask_number(own, "CREATE TABLE fruit(name text, note text)");
    ask_number(own, "INSERT INTO fruit VALUES ('apple', E'a\\tb\\nc\\\\d\\re'), ('pear', NULL), ('x'' OR ''1', '')");
    example e = start_example("SELECT name, note FROM fruit WHERE name LIKE $1 ORDER BY name", LONG_MS);
    int fd = t_connect(e.port);
    expect_answer(fd, "%ple\n", "apple\ta\\tb\\nc\\\\d\\re\nOK SELECT 1\n");
    expect_answer(fd, "%r\r\n", "pear\t\\N\nOK SELECT 1\n");
    expect_answer(fd, "none\n\n", "OK SELECT 0\nOK SELECT 0\n");
    expect_answer(fd, "x' OR '1\n", "x' OR '1\t\nOK SELECT 1\n");
    expect_answer(fd, "' OR '1'='1\n", "OK SELECT 0\n");
    expect_answer(fd, "'; DROP TABLE fruit; --\n", "OK SELECT 0\n");
    CHECK_INT(ask_number(own, "SELECT count(*) FROM fruit"), 3);
    t_finish(fd);
    stop_example(&e);

    /* Errors of SQL, after which the same connection goes on. */
    e = start_example("SELECT 10 / $1::int, count(*) FROM pg_stat_activity WHERE application_name = 'example'",
                      LONG_MS);
    fd = t_connect(e.port);
    expect_answer(fd, "5\n", "2\t1\nOK SELECT 1\n");
    expect_answer(fd, "0\n", "ERROR division by zero\n");
    expect_answer(fd, "a\n", "ERROR invalid input syntax for type integer: \"a\"\n");
    expect_answer(fd, "\xff\n", "ERROR invalid byte sequence for encoding \"UTF8\": 0xff\n");
    int backend = ask_number(own, "SELECT pid FROM pg_stat_activity WHERE application_name = 'example'");
    expect_answer(fd, "2\n", "5\t1\nOK SELECT 1\n");
    CHECK_INT(ask_number(own, "SELECT pid FROM pg_stat_activity WHERE application_name = 'example'"), backend);
    t_finish(fd);
    stop_example(&e);
    PQfinish(own);
    stop_server();
    remove_directory();
}

/* Many clients at once, who all wait: so it is known how many connections there are. */
TEST_MODES(postgres_pool_serves_more_clients_than_it_has_connections)
{
    int fds[CLIENTS];
    char line[64];
    make_directory();
    create_server();
    example e = start_example(LOCKED, LONG_MS);
    PGconn *own = session();
    ask_number(own, "SELECT pg_advisory_lock(1)");
    for (int i = 0; i < CLIENTS; i++) {
        fds[i] = t_connect(e.port);
        snprintf(line, sizeof line, "client %d\n", i);
        t_sends(fds[i], line);
    }
    await_locked(own, POOL_SIZE);
    for (int i = 0; i < CLIENTS; i++) {
        t_expect_silence(fds[i]);
    }
    ask_number(own, "SELECT pg_advisory_unlock(1)");
    for (int i = 0; i < CLIENTS; i++) {
        snprintf(line, sizeof line, "\tclient %d\nOK SELECT 1\n", i);
        t_expect(fds[i], line);
        CHECK_INT(ask_number(own, EXAMPLES_SESSIONS), POOL_SIZE);
        t_finish(fds[i]);
    }
    stop_example(&e);
    PQfinish(own);
    stop_server();
    remove_directory();
}

/* As many as there are connections have hundreds of lines on their way: one that comes later has its turn. */
TEST_MODES(postgres_pool_is_fair)
{
    static char many[500 * 2 + 1];
    int fds[POOL_SIZE], turn;
    char line[64];
    make_directory();
    create_server();
    PGconn *own = session();
    ask_number(own, "CREATE SEQUENCE turn");
    example e = start_example("SELECT nextval('turn'), $1", LONG_MS);
    for (int i = 0; i < 500; i++) {
        memcpy(many + 2 * i, "x\n", 3);
    }
    for (int i = 0; i < POOL_SIZE; i++) {
        fds[i] = t_connect(e.port);
        t_sends(fds[i], many);
    }
    int late = t_connect(e.port);
    t_sends(late, "late\n");
    CHECK(t_read_line(late, line, sizeof line));
    CHECK_INT(sscanf(line, "%d\tlate", &turn), 1);
    CHECK(turn < 1500); /* of 2001 */
    t_close(late);
    for (int i = 0; i < POOL_SIZE; i++) {
        for (int k = 0; k < 1000; k++) {
            CHECK(t_read_line(fds[i], line, sizeof line));
        }
        t_close(fds[i]);
    }
    stop_example(&e);
    PQfinish(own);
    stop_server();
    remove_directory();
}

/* The database is not there, comes, is restarted, ends sessions, and goes. */
TEST_MODES(postgres_may_be_restarted)
{
    char line[256];
    make_directory();
    example e = start_example("SELECT $1", LONG_MS);
    int fd = t_connect(e.port), fds[POOL_SIZE];
    for (int i = 0; i < 2 * POOL_SIZE; i++) { /* no place in the pool is lost */
        expect_answer(fd, "away\n", "ERROR ");
        CHECK(t_read_line(fd, line, sizeof line));
    }
    create_server();
    expect_answer(fd, "there\n", "there\nOK SELECT 1\n");
    for (int i = 0; i < POOL_SIZE; i++) {
        fds[i] = t_connect(e.port);
    }
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < POOL_SIZE; i++) {
            t_sends(fds[i], "all\n");
        }
        for (int i = 0; i < POOL_SIZE; i++) {
            t_expect(fds[i], "all\nOK SELECT 1\n");
        }
        stop_server();
        if (round > 0) {
            expect_answer(fd, "away\n", "ERROR ");
            CHECK(t_read_line(fd, line, sizeof line));
        }
        start_server();
    }
    expect_answer(fd, "back\n", "back\nOK SELECT 1\n");
    PGconn *own = session();
    CHECK(ask_number(own, "SELECT count(pg_terminate_backend(pid, 30000)) FROM pg_stat_activity "
                          "WHERE application_name = 'example'") > 0);
    expect_answer(fd, "again\n", "again\nOK SELECT 1\n");
    PQfinish(own);
    stop_server();
    t_close_all(fds, POOL_SIZE);
    t_finish(fd);
    stop_example(&e);
    remove_directory();
}

static bool has_ended(void *connection)
{
    return !PQconsumeInput((PGconn *)connection);
}

/* A session that is ended in the middle of a statement: an answer, and no more. */
TEST_MODES(postgres_may_end_in_the_middle)
{
    char line[256];
    make_directory();
    create_server();
    PGconn *own = session();
    ask_number(own, "SELECT pg_advisory_lock(1)");
    example e = start_example(LOCKED, LONG_MS);
    int fd = t_connect(e.port);
    t_sends(fd, "a\n");
    await_locked(own, 1);
    ask_number(own, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'example'");
    t_expect(fd, "ERROR terminating connection due to administrator command\n");
    t_sends(fd, "b\n");
    await_locked(own, 1);
    int backend = ask_number(own, "SELECT pid FROM pg_stat_activity WHERE application_name = 'example'");
    CHECK(kill(backend, SIGKILL) == 0); /* after which the server ends all others, and begins anew */
    t_expect(fd, "ERROR ");
    CHECK(t_read_line(fd, line, sizeof line));
    CHECK(t_wait_until(has_ended, own));
    PQfinish(own);
    CHECK(t_wait_until(is_ready, NULL));
    expect_answer(fd, "c\n", "\tc\nOK SELECT 1\n");
    t_finish(fd);
    stop_example(&e);
    stop_server();
    remove_directory();
}

/* More of them than there are connections, in the middle of their statements and in the queue, with a reset and with
 * an end. */
TEST_MODES(postgres_clients_may_leave)
{
    int fds[3 * POOL_SIZE];
    make_directory();
    create_server();
    PGconn *own = session();
    example e = start_example(LOCKED, LONG_MS);
    for (int round = 0; round < 2; round++) {
        ask_number(own, "SELECT pg_advisory_lock(1)");
        for (int i = 0; i < 3 * POOL_SIZE; i++) {
            fds[i] = t_connect(e.port);
            t_sends(fds[i], "gone\n");
        }
        await_locked(own, POOL_SIZE);
        for (int i = 0; i < 3 * POOL_SIZE; i++) {
            (i % 2 == 0 ? t_reset : t_close)(fds[i]);
        }
        int patient = t_connect(e.port);
        t_sends(patient, "here\n");
        long before = cpu_ms(&e);
        poll(NULL, 0, 300);
        CHECK(cpu_ms(&e) - before < 100); /* those who have gone cost nothing */
        await_locked(own, POOL_SIZE);
        ask_number(own, "SELECT pg_advisory_unlock(1)");
        t_expect(patient, "\there\nOK SELECT 1\n");
        t_finish(patient);
    }
    stop_example(&e);
    PQfinish(own);
    stop_server();
    remove_directory();
}

/* The server ends it, and the connection goes on. */
TEST_MODES(postgres_statements_are_limited)
{
    make_directory();
    create_server();
    PGconn *own = session();
    example e = start_example("SELECT $1 FROM pg_sleep($1::float)", "2000");
    int fd = t_connect(e.port);
    expect_answer(fd, "0\n", "0\nOK SELECT 1\n");
    int backend = ask_number(own, "SELECT pid FROM pg_stat_activity WHERE application_name = 'example'");
    int64_t start = t_now_ms();
    expect_answer(fd, "100\n", "ERROR canceling statement due to statement timeout\n");
    CHECK(t_now_ms() - start >= 2000);
    expect_answer(fd, "0\n", "0\nOK SELECT 1\n");
    CHECK_INT(ask_number(own, "SELECT pid FROM pg_stat_activity WHERE application_name = 'example'"), backend);
    t_finish(fd);
    stop_example(&e);
    PQfinish(own);
    stop_server();
    remove_directory();
}

/* All connections are in use for longer than somebody wants to wait for one; and a server that does not end what takes
 * too long is given up. */
TEST_MODES(postgres_wait_for_a_connection_is_limited)
{
    int fds[POOL_SIZE];
    make_directory();
    create_server();
    PGconn *own = session();
    ask_number(own, "SELECT pg_advisory_lock(1)");
    example_name = "example options='-c statement_timeout=0'"; /* they are given up after 2,500 ms */
    example e = start_example(LOCKED, "2000");
    for (int i = 0; i < POOL_SIZE; i++) {
        fds[i] = t_connect(e.port);
        t_sends(fds[i], "a\n");
    }
    await_locked(own, POOL_SIZE);
    int fd = t_connect(e.port);
    int64_t start = t_now_ms();
    expect_answer(fd, "b\n", "ERROR timed out\n");
    CHECK_NEAR_MS(t_now_ms() - start, 2000, 4000);
    for (int i = 0; i < POOL_SIZE; i++) {
        t_expect(fds[i], "ERROR timed out\n");
        t_close(fds[i]);
    }
    ask_number(own, "SELECT pg_advisory_unlock(1)");
    expect_answer(fd, "c\n", "\tc\nOK SELECT 1\n");
    t_finish(fd);
    stop_example(&e);
    PQfinish(own);
    stop_server();
    remove_directory();
}

/* Something listens, and says nothing: each has its answer in time, those who wait in the queue too. */
TEST_MODES(postgres_that_says_nothing)
{
    int fds[2 * POOL_SIZE], silent = socket(AF_UNIX, SOCK_STREAM, 0);
    char path[160];
    make_directory();
    snprintf(path, sizeof path, "%s/.s.PGSQL.5432", directory);
    struct sockaddr_un address = t_unix_address(path);
    CHECK(bind(silent, (struct sockaddr *)&address, sizeof address) == 0 && listen(silent, 64) == 0);
    example e = start_example("SELECT $1", "1500");
    for (int i = 0; i < 2 * POOL_SIZE; i++) {
        fds[i] = t_connect(e.port);
        t_sends(fds[i], "hello\n");
    }
    long before = cpu_ms(&e);
    for (int i = 0; i < 2 * POOL_SIZE; i++) {
        t_expect(fds[i], "ERROR timed out\n");
    }
    CHECK(cpu_ms(&e) - before < 200);
    t_close(silent);
    CHECK(unlink(path) == 0);
    create_server();
    for (int i = 0; i < 2 * POOL_SIZE; i++) {
        expect_answer(fds[i], "now\n", "now\nOK SELECT 1\n");
        t_finish(fds[i]);
    }
    stop_example(&e);
    stop_server();
    remove_directory();
}
