/* Under a service manager: the sockets that it hands over, what it is told, and the processors that
 * it leaves us. What is handed over is learned once in a process and begins at descriptor 3, so
 * that each scenario runs in a process of its own, with only 0, 1 and 2 open. */
#include "test.h"

#include "handlers.h"

#include <arpa/inet.h>
#include <ftw.h>
#include <limits.h>
#include <sys/stat.h>
#include <sys/un.h>
#ifdef __linux__
#include <sched.h>
#endif

enum {
    FIRST = 3,     /* the first descriptor that is handed over */
    CAPACITY = 8,  /* more than any test hands over */
    AWAY = 200,    /* descriptors from here on are out of the way */
    ATTEMPTS = 10, /* ports to try: another process may take a free one first */
    LONGEST = 1000 /* what tsrv_notify takes */
};

/* ---- processes ----------------------------------------------------------------------------*/

/* Whoever runs the tests may be a service itself. */
__attribute__((constructor)) static void forget_the_manager(void)
{
    static const char *const names[] = {"LISTEN_PID",    "LISTEN_FDS",   "LISTEN_FDNAMES",
                                        "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC",
                                        "TSRV_READY_FD"};
    for (size_t i = 0; i < COUNT(names); i++) {
        unsetenv(names[i]);
    }
}

static void set_text(const char *name, const char *value)
{
    CHECK((value != NULL ? setenv(name, value, 1) : unsetenv(name)) == 0);
}

static void set_number(const char *name, long long value)
{
    char text[32];
    snprintf(text, sizeof text, "%lld", value);
    set_text(name, text);
}

/* Starts a process for a scenario, which has to close and to free all that it makes. */
static pid_t begin(void (*scenario)(void *), void *context)
{
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        for (int fd = FIRST; fd < T_MAX_FD; fd++) {
            close(fd);
        }
        int fds = t_open_fds();
        long long allocations = (long long)t_live_allocations;
        scenario(context);
        CHECK_INT(t_open_fds(), fds);
        CHECK_INT(t_live_allocations, allocations);
        exit(0);
    }
    return pid;
}

/* Waits for its end, which has to be a good one. */
static void finish(pid_t pid)
{
    int status = 0;
    CHECK_INT(waitpid(pid, &status, 0), pid);
    CHECK_INT(WIFSIGNALED(status) ? WTERMSIG(status) : 0, 0);
    CHECK_INT(WEXITSTATUS(status), 0);
}

static void apart(void (*scenario)(void *), void *context)
{
    finish(begin(scenario, context));
}

/* ---- the log ------------------------------------------------------------------------------*/

static char log_text[16384];

static void keep_log(int level, const char *message, void *context)
{
    size_t used = strlen(log_text);
    (void)context;
    if (level <= TSRV_LOG_WARNING) {
        snprintf(log_text + used, sizeof log_text - used, "%s\n", message);
    }
}

/* How often the log says this. */
static int logged(const char *part)
{
    return t_count(log_text, part);
}

/* ---- sockets ------------------------------------------------------------------------------*/

typedef struct endpoint {
    struct sockaddr_storage name;
    socklen_t size;
} endpoint;

/* Of a number, IPv4 or IPv6, and a port; or of "unix:path", "unix:@abstract". */
static endpoint make_endpoint(const char *address, int port)
{
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
    struct sockaddr_un local;
    endpoint made;
    memset(&v4, 0, sizeof v4);
    memset(&v6, 0, sizeof v6);
    memset(&local, 0, sizeof local);
    memset(&made, 0, sizeof made);
    if (strncmp(address, "unix:", 5) == 0) {
        size_t length = strlen(address + 5);
        CHECK(length < sizeof local.sun_path);
        local.sun_family = AF_UNIX;
        memcpy(local.sun_path, address + 5, length);
        length += address[5] != '@';
        local.sun_path[0] = address[5] == '@' ? 0 : local.sun_path[0];
        made.size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length);
        memcpy(&made.name, &local, sizeof local);
    } else if (inet_pton(AF_INET, address, &v4.sin_addr) == 1) {
        v4.sin_family = AF_INET;
        v4.sin_port = htons((uint16_t)port);
        made.size = sizeof v4;
        memcpy(&made.name, &v4, sizeof v4);
    } else {
        CHECK(inet_pton(AF_INET6, address, &v6.sin6_addr) == 1);
        v6.sin6_family = AF_INET6;
        v6.sin6_port = htons((uint16_t)port);
        made.size = sizeof v6;
        memcpy(&made.name, &v6, sizeof v6);
    }
    return made;
}

/* A socket that is bound; v6_only counts for IPv6. */
static int bind_at(endpoint at, int type, int v6_only)
{
    int fd = socket(at.name.ss_family, type, 0);
    CHECK(fd >= 0);
    if (at.name.ss_family == AF_INET6) {
        CHECK(setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &v6_only, sizeof v6_only) == 0);
    }
    if (bind(fd, (struct sockaddr *)&at.name, at.size) != 0) {
        T_FAIL("bind: %s", strerror(errno));
    }
    return fd;
}

static int listen_at(const char *address, int port)
{
    int fd = bind_at(make_endpoint(address, port), SOCK_STREAM, 1);
    CHECK(listen(fd, 16) == 0);
    return fd;
}

/* As systemd makes it for a bare port: IPv6, and IPv4 too. */
static int listen_dual(int port)
{
    int fd = bind_at(make_endpoint("::", port), SOCK_STREAM, 0);
    CHECK(listen(fd, 16) == 0);
    return fd;
}

static int port_of(int fd)
{
    struct sockaddr_storage name;
    struct sockaddr_in v4;
    socklen_t size = sizeof name;
    CHECK(getsockname(fd, (struct sockaddr *)&name, &size) == 0);
    memcpy(&v4, &name, sizeof v4); /* IPv6 has its port in the same place */
    return ntohs(v4.sin_port);
}

/* A port that nobody uses with either family. */
static int port_of_neither(void)
{
    int fd = listen_dual(0), port = port_of(fd);
    t_close(fd);
    return port;
}

static int connect_activated(const char *address, int port)
{
    endpoint to = make_endpoint(address, port);
    int fd = socket(to.name.ss_family, SOCK_STREAM, 0);
    CHECK(fd >= 0);
    t_prepare(fd);
    if (connect(fd, (struct sockaddr *)&to.name, to.size) != 0) {
        T_FAIL("connect to %s, port %d: %s", address, port, strerror(errno));
    }
    return fd;
}

static bool is_nonblocking(int fd)
{
    return (fcntl(fd, F_GETFL) & O_NONBLOCK) != 0;
}

static bool is_close_on_exec(int fd)
{
    int flags = fcntl(fd, F_GETFD);
    CHECK(flags != -1);
    return (flags & FD_CLOEXEC) != 0;
}

/* Moves sockets to where a service manager leaves them; -1 leaves a number closed. */
static void place(int *fds, int count)
{
    for (int i = 0; i < count; i++) {
        int away = fds[i] < 0 ? -1 : fcntl(fds[i], F_DUPFD, AWAY);
        CHECK(fds[i] < 0 || away >= AWAY);
        if (fds[i] >= 0) {
            t_close(fds[i]);
        }
        fds[i] = away;
    }
    for (int i = 0; i < count; i++) {
        if (fds[i] >= 0) {
            CHECK_INT(dup2(fds[i], FIRST + i), FIRST + i);
            t_close(fds[i]);
        }
        fds[i] = FIRST + i;
    }
}

/* The same, and says so. */
static void hand_over(int *fds, int count)
{
    place(fds, count);
    set_number("LISTEN_PID", (long long)getpid());
    set_number("LISTEN_FDS", count);
}

static int remove_entry(const char *path, const struct stat *info, int kind, struct FTW *place_of)
{
    (void)info, (void)kind, (void)place_of;
    return remove(path);
}

static void remove_directory(const char *directory)
{
    CHECK(nftw(directory, remove_entry, 8, FTW_DEPTH | FTW_PHYS) == 0);
}

/* ---- a server for them --------------------------------------------------------------------*/

static tsrv_server *new_server(tsrv_loop *loop)
{
    tsrv_server_options options = {0};
    tsrv_server *server = NULL;
    options.handle_stream = echo_lines;
    options.loop = loop;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    return server;
}

/* A client of a server in this process is answered. */
static void check_served(tsrv_loop *loop, int client)
{
    t_sends(client, "hello\n");
    t_turn_until_text(loop, client, "hello\n");
    t_close(client);
}

static void free_server(tsrv_server *server, tsrv_loop *loop)
{
    tsrv_server_free(server);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* A client of a server in another process is answered. */
static void check_answered(int port)
{
    int fd = t_connect(port);
    t_echo(fd, "hello\n");
    t_close(fd);
}

/* ---- tsrv_listen_fds ----------------------------------------------------------------------*/

static void learn_of_two(void *context)
{
    int fds[CAPACITY] = {listen_at("127.0.0.1", 0), listen_at("127.0.0.1", 0)}, got[CAPACITY];
    int first = port_of(fds[0]), second = port_of(fds[1]);
    (void)context;
    hand_over(fds, 2);
    CHECK(!is_close_on_exec(3) && !is_close_on_exec(4));
    CHECK_INT(tsrv_listen_fds(got, CAPACITY), 2);
    for (int i = 0; i < 2; i++) {
        CHECK_INT(got[i], FIRST + i);
        CHECK(is_close_on_exec(got[i]));
        CHECK(is_nonblocking(got[i]));
    }
    CHECK_INT(port_of(got[0]), first);
    CHECK_INT(port_of(got[1]), second);
    CHECK(getenv("LISTEN_PID") == NULL);
    CHECK(getenv("LISTEN_FDS") == NULL);
    CHECK_INT(tsrv_listen_fds(fds, CAPACITY), 0);
    CHECK_INT(tsrv_listen_fds(fds, 0), 0);
    /* They work, and belong to the server. */
    tsrv_loop *loop = t_new_loop();
    tsrv_server *server = new_server(loop);
    CHECK_INT(tsrv_server_add_sockets(server, got, 2), TSRV_OK);
    check_served(loop, t_connect(first));
    check_served(loop, t_connect(second));
    tsrv_server_stop(server);
    CHECK(!t_is_open(3) && !t_is_open(4));
    free_server(server, loop);
}

TEST_LOOP(sockets_that_were_handed_over_come_in_order_and_serve)
{
    apart(learn_of_two, NULL);
}

/* LISTEN_PID is this format of the process's own id and difference, NULL = not set. */
typedef struct environment {
    const char *pid;
    long long difference;
    const char *fds; /* LISTEN_FDS */
    int rc;
} environment;

static void learn_in(void *context)
{
    const environment *e = (const environment *)context;
    int fds[] = {listen_at("127.0.0.1", 0)}, port = port_of(fds[0]), got[CAPACITY], fresh;
    char pid[64];
    place(fds, 1);
    snprintf(pid, sizeof pid, e->pid != NULL ? e->pid : "%lld",
             (long long)getpid() + e->difference);
    set_text("LISTEN_PID", e->pid != NULL ? pid : NULL);
    set_text("LISTEN_FDS", e->fds);
    tsrv_set_log(keep_log, NULL);
    int before = t_open_fds();
    int rc = tsrv_listen_fds(got, CAPACITY);
    if (rc != e->rc) {
        T_FAIL("LISTEN_PID=%s LISTEN_FDS=%s: %d, expected %d", e->pid != NULL ? pid : "not set",
               e->fds != NULL ? e->fds : "not set", rc, e->rc);
    }
    CHECK_INT(logged("\n"), rc < 0);
    CHECK(tsrv_listen_fds(got, CAPACITY) <= 0);
    CHECK_INT(t_open_fds(), before);
    CHECK_INT(port_of(FIRST), port);
    /* The socket is nobody's business, and neither in the way. */
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, &fresh, 1), 1);
    CHECK_INT(tsrv_bind_sockets(port, "127.0.0.1", NULL, got, 1), -EADDRINUSE);
    t_close(fresh);
    t_close(FIRST);
}

TEST_ONCE(variables_that_are_wrong_or_not_for_us_give_nothing)
{
    static environment rows[] = {
        {NULL, 0, NULL, 0},
        {NULL, 0, "1", 0},
        {"%lld", 1, "1", 0},
        {"%lld", -1, "1", 0},
        {"", 0, "1", 0},
        {"0", 0, "1", 0},
        {"-%lld", 0, "1", 0},
        {"+%lld", 0, "1", 0},
        {" %lld", 0, "1", 0},
        {"%lld ", 0, "1", 0},
        {"%lldx", 0, "1", 0},
        {"0x%llx", 0, "1", 0},
        {"2147483648", 0, "1", 0},
        {"%lld", 4294967296, "1", 0},           /* 2 to the 32nd more */
        {"1844674407%lld", 3709551616, "1", 0}, /* 2 to the 64th more */
        {"99999999999999999999999999999", 0, "1", 0},
        {"%lld", 1, "junk", 0},
        {"%lld", 0, "0", 0},
        {"%lld", 0, "00", 0},
        {"%lld", 0, NULL, TSRV_EINVAL},
        {"%lld", 0, "", TSRV_EINVAL},
        {"%lld", 0, "-1", TSRV_EINVAL},
        {"%lld", 0, "+1", TSRV_EINVAL},
        {"%lld", 0, " 1", TSRV_EINVAL},
        {"%lld", 0, "1x", TSRV_EINVAL},
        {"%lld", 0, "4097", TSRV_EINVAL},
        {"%lld", 0, "2147483647", TSRV_EINVAL},
        {"%lld", 0, "2147483648", TSRV_EINVAL},
        {"%lld", 0, "4294967297", TSRV_EINVAL},
        {"%lld", 0, "18446744073709551617", TSRV_EINVAL},
        {"%lld", 0, "junk", TSRV_EINVAL},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        apart(learn_in, &rows[i]);
    }
}

/* The most that can be handed over; all but one are closed. */
static void learn_of_64(void *context)
{
    int fds[CAPACITY] = {listen_at("127.0.0.1", 0)};
    (void)context;
    tsrv_set_log(keep_log, NULL);
    hand_over(fds, 1);
    set_number("LISTEN_FDS", 64);
    CHECK_INT(tsrv_listen_fds(fds, CAPACITY), 1);
    CHECK_INT(fds[0], FIRST);
    CHECK_INT(logged("\n"), 63);
    CHECK_INT(logged("descriptor 66 "), 1);
    t_close(FIRST);
}

TEST_ONCE(up_to_64_can_be_handed_over)
{
    apart(learn_of_64, NULL);
}

static void learn_of_strangers(void *context)
{
    enum { MOST = 9, GOOD = 4, CLOSED = 6 };
    int fds[MOST], ends[2], pair[2], got[MOST], count = 8, others = 0;
    char part[64];
    (void)context;
    CHECK(pipe(ends) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    fds[0] = ends[0];
    fds[1] = ends[1];
    fds[2] = bind_at(make_endpoint("127.0.0.1", 0), SOCK_DGRAM, 0);
    fds[3] = pair[0];
    fds[4] = listen_at("127.0.0.1", 0);
    fds[5] = pair[1];
    fds[6] = -1;
    fds[7] = open("/dev/null", O_RDONLY);
#ifdef __linux__ /* not every system tells that a socket does not listen */
    fds[count++] = bind_at(make_endpoint("127.0.0.1", 0), SOCK_STREAM, 0);
#endif
    int port = port_of(fds[4]);
    tsrv_set_log(keep_log, NULL);
    hand_over(fds, count);
    CHECK_INT(tsrv_listen_fds(got, MOST), 1);
    CHECK_INT(got[0], FIRST + GOOD);
    CHECK_INT(port_of(got[0]), port);
    for (int fd = FIRST; fd < FIRST + count; fd++) {
        bool good = fd == FIRST + GOOD;
        CHECK_INT(t_is_open(fd), fd != FIRST + CLOSED);
        CHECK(!t_is_open(fd) || is_close_on_exec(fd));
        CHECK(!t_is_open(fd) || is_nonblocking(fd) == good);
        snprintf(part, sizeof part, "descriptor %d ", fd);
        CHECK_INT(logged(part), !good);
        others += !good;
    }
    CHECK_INT(tsrv_listen_fds(got, MOST), 0);
    CHECK_INT(logged("\n"), others);
    for (int fd = FIRST; fd < FIRST + count; fd++) {
        close(fd);
    }
}

TEST_ONCE(what_does_not_listen_is_passed_over_and_logged)
{
    apart(learn_of_strangers, NULL);
}

static void learn_with_little_room(void *context)
{
    int fds[CAPACITY] = {listen_at("127.0.0.1", 0), listen_at("127.0.0.1", 0),
                         listen_at("127.0.0.1", 0)};
    (void)context;
    hand_over(fds, 3);
    for (int i = 0; i < 2; i++) {
        int got[2] = {-5, -6};
        CHECK_INT(tsrv_listen_fds(got, 0), TSRV_EINVAL);
        CHECK_INT(tsrv_listen_fds(got, 2), TSRV_EINVAL);
        CHECK_INT(got[0], -5);
        CHECK_INT(got[1], -6);
    }
    CHECK_INT(tsrv_listen_fds(fds, 3), 3);
    for (int i = 0; i < 3; i++) {
        CHECK_INT(fds[i], FIRST + i);
    }
    CHECK_INT(tsrv_listen_fds(fds, 3), 0);
    t_close_all(fds, 3);
}

TEST_ONCE(too_little_room_loses_no_socket)
{
    apart(learn_with_little_room, NULL);
}

/* ---- names --------------------------------------------------------------------------------*/

/* Asks with every size of buffer: the name is cut, ended, and nothing behind it is touched. */
static void check_name(int fd, const char *expected)
{
    char buffer[300];
    size_t length = strlen(expected);
    for (size_t size = 0; size < sizeof buffer; size++) {
        memset(buffer, '#', sizeof buffer);
        const char *name = tsrv_listen_fd_name(fd, buffer, size);
        CHECK(buffer[size] == '#');
        if (size > 0) {
            CHECK(name == buffer);
            CHECK_MEM(name, strlen(name), expected, length < size ? length : size - 1);
        }
    }
}

TEST_ONCE(descriptors_have_names)
{
    char longest[256], names[512];
    memset(longest, 'n', sizeof longest - 1);
    longest[sizeof longest - 1] = 0;
    snprintf(names, sizeof names, "a:b c::%s:%s", longest, "last");
    set_text("LISTEN_FDNAMES", names);
    check_name(3, "a");
    check_name(4, "b c");
    check_name(5, "");
    check_name(6, longest);
    check_name(7, "last");
    /* Those that have none. */
    check_name(8, "");
    check_name(9, "");
    check_name(INT_MAX, "");
    set_text("LISTEN_FDNAMES", ":x:");
    check_name(3, "");
    check_name(4, "x");
    check_name(5, "");
    check_name(6, "");
    set_text("LISTEN_FDNAMES", "");
    check_name(3, "");
    set_text("LISTEN_FDNAMES", NULL);
    check_name(3, "");
}

/* 0, 1 and 2 are never handed over. */
TEST_ONCE(low_descriptors_have_no_names)
{
    static const int fds[] = {2, 0, -1, INT_MIN};
    set_text("LISTEN_FDNAMES", "a:b:c:d");
    for (int i = 0; i < 4; i++) {
        check_name(fds[i], "");
    }
}

static void learn_names(void *context)
{
    int fds[CAPACITY] = {listen_at("127.0.0.1", 0), listen_at("127.0.0.1", 0)}, taken;
    (void)context;
    int port = port_of(fds[1]);
    set_text("LISTEN_FDNAMES", "http:admin");
    hand_over(fds, 2);
    CHECK_INT(tsrv_bind_sockets(port, "127.0.0.1", NULL, &taken, 1), 1);
    check_name(taken, "admin");
    CHECK_INT(tsrv_listen_fds(fds, CAPACITY), 1);
    check_name(fds[0], "http");
    t_close(fds[0]);
    t_close(taken);
}

TEST_ONCE(names_are_known_after_the_sockets_were_taken)
{
    apart(learn_names, NULL);
}

/* ---- binding takes what was handed over ---------------------------------------------------*/

typedef struct wish {
    const char *address; /* where the first of the sockets listens */
    const char *other;   /* another, which is asked for or has to stay */
} wish;

/* The address that is asked for is that of the second socket of three. */
static void take_by_address(void *context)
{
    const wish *w = (const wish *)context;
    int fds[CAPACITY] = {listen_at("127.0.0.1", 0), listen_at(w->address, 0),
                         listen_at(w->other, 0)};
    int port = strncmp(w->address, "unix:", 5) == 0 ? 0 : port_of(fds[1]), got[2] = {-1, -1};
    hand_over(fds, 3);
    CHECK_INT(tsrv_bind_sockets(port, w->address, NULL, got, 2), 1);
    CHECK_INT(got[0], FIRST + 1);
    CHECK(is_close_on_exec(got[0]));
    CHECK(is_nonblocking(got[0]));
    int client = connect_activated(w->address, port), accepted = accept(got[0], NULL, NULL);
    CHECK(accepted >= 0);
    t_close(accepted);
    t_close(client);
    /* It is given out once. */
    CHECK_INT(tsrv_bind_sockets(port, w->address, NULL, &got[1], 1), -EADDRINUSE);
    CHECK_INT(tsrv_listen_fds(fds, CAPACITY), 2);
    CHECK_INT(fds[0], FIRST);
    CHECK_INT(fds[1], FIRST + 2);
    CHECK_INT(tsrv_listen_fds(fds, CAPACITY), 0);
    for (int fd = FIRST; fd < FIRST + 3; fd++) {
        t_close(fd);
    }
}

/* Both in a directory, as "unix:..."; NULL = only its name is wanted. */
static char *unix_address(const char *directory, const char *name)
{
    static char addresses[4][120];
    static int next;
    char *address = addresses[next++ % 4];
    snprintf(address, sizeof addresses[0], "unix:%s%s%s", directory, directory[0] == '@' ? "" : "/",
             name);
    return address;
}

#if defined(__linux__)
/* Each worker gets its share of what comes to the port, whichever family it comes by: the sockets that are made beside
 * the service manager's must be of its kind. */
static void spread_dual(void *context)
{
    enum { WORKERS = 4, CLIENTS = 200 };
    static int clients[CLIENTS];
    int fd = bind_at(make_endpoint("::", 0), SOCK_STREAM, 0), port = port_of(fd), one = 1, shares[WORKERS] = {0};
    (void)context;
    t_close(fd); /* SO_REUSEPORT comes before bind */
    fd = socket(AF_INET6, SOCK_STREAM, 0);
    endpoint at = make_endpoint("::", port);
    int both = 0;
    CHECK(setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one) == 0);
    CHECK(setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &both, sizeof both) == 0);
    CHECK(bind(fd, (struct sockaddr *)&at.name, at.size) == 0 && listen(fd, CLIENTS) == 0);
    hand_over(&fd, 1);
    tsrv_loop *loop = t_new_loop();
    tsrv_server *server = new_server(loop);
    CHECK_INT(tsrv_server_bind(server, port, NULL, NULL), TSRV_OK);
    CHECK_INT(tsrvi_bound_spread(server, WORKERS), TSRV_OK);
    CHECK_INT(server->bound_count, WORKERS);
    for (int i = 0; i < CLIENTS; i++) {
        clients[i] = connect_activated(i % 2 == 0 ? "127.0.0.1" : "::1", port);
    }
    for (int i = 0; i < CLIENTS; i++) {
        int accepted = -1;
        for (int k = 0; k < WORKERS && accepted < 0; k++) {
            accepted = accept(server->bound[k].fd, NULL, NULL);
            shares[k] += accepted >= 0;
        }
        CHECK(accepted >= 0);
        t_close(accepted);
        t_close(clients[i]);
    }
    for (int k = 0; k < WORKERS; k++) {
        CHECK(shares[k] > 0);
    }
    free_server(server, loop);
}

TEST_ONCE(workers_share_a_dual_socket_that_was_handed_over)
{
    apart(spread_dual, NULL);
}

/* The service manager is root, and the service is not: beside its socket the kernel allows no other. */
static void share_roots(void *context)
{
    endpoint at = make_endpoint("127.0.0.1", 0);
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1, port;
    (void)context;
    CHECK(setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one) == 0);
    CHECK(bind(fd, (struct sockaddr *)&at.name, at.size) == 0 && listen(fd, 16) == 0);
    port = port_of(fd);
    hand_over(&fd, 1);
    CHECK(setgid(65534) == 0 && setuid(65534) == 0);
    tsrv_server *server = new_server(NULL);
    CHECK_INT(tsrv_server_bind(server, port, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrvi_bound_spread(server, 3), TSRV_OK);
    CHECK_INT(server->bound_count, 1);
    CHECK_INT(server->bound[0].worker, -1);
    tsrv_server_free(server);
}

TEST_ONCE(workers_share_a_socket_that_is_another_users)
{
    if (getuid() != 0) {
        SKIP("root");
    }
    apart(share_roots, NULL);
}
#endif

TEST_ONCE(socket_of_the_same_address_is_taken)
{
    wish v4 = {"127.0.0.1", "127.0.0.1"};
    apart(take_by_address, &v4);
}

TEST_ONCE(socket_of_the_same_ipv6_address_is_taken)
{
    wish v6 = {"::1", "::1"};
    if (!t_has_ipv6()) {
        SKIP("IPv6 loopback");
    }
    apart(take_by_address, &v6);
}

TEST_ONCE(socket_of_the_same_unix_path_is_taken)
{
    const char *directory = t_make_directory();
    wish w = {unix_address(directory, "one"), unix_address(directory, "one-more")};
    apart(take_by_address, &w);
    CHECK_INT(access(w.address + 5, F_OK), 0); /* the file is the service manager's */
    remove_directory(directory);
}

#ifdef __linux__
/* Abstract names that no other run of the tests has. */
static const char *abstract_prefix(void)
{
    static char prefix[64];
    snprintf(prefix, sizeof prefix, "@tsrv-systemd-test-%d-", (int)getpid());
    return prefix;
}

TEST_ONCE(socket_of_the_same_abstract_name_is_taken)
{
    const char *prefix = abstract_prefix();
    wish w = {unix_address(prefix, "one"), unix_address(prefix, "one-more")};
    apart(take_by_address, &w);
}
#endif

/* Another address is asked for: a new socket is made, and the one that is here stays. */
static void leave_by_address(void *context)
{
    const wish *w = (const wish *)context;
    int fds[CAPACITY] = {listen_at(w->address, 0)}, got[2] = {-1, -1};
    bool same_port = strcmp(w->address, w->other) != 0;
    int port = same_port ? port_of(fds[0]) : t_free_port();
    hand_over(fds, 1);
    CHECK_INT(tsrv_bind_sockets(port, w->other, NULL, got, 2), 1);
    CHECK(got[0] != FIRST);
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, &got[1], 1), 1);
    CHECK(got[1] != FIRST);
    CHECK_INT(tsrv_listen_fds(fds, CAPACITY), 1);
    CHECK_INT(fds[0], FIRST);
    t_close_all(got, 2);
    t_close(FIRST);
}

TEST_ONCE(sockets_of_other_addresses_are_left)
{
    const char *directory = t_make_directory();
    wish port = {"127.0.0.1", "127.0.0.1"};
    wish path = {unix_address(directory, "one"), unix_address(directory, "one-more")};
    apart(leave_by_address, &port);
    apart(leave_by_address, &path);
#ifdef __linux__
    wish host = {"127.0.0.1", "127.0.0.2"};
    wish start = {unix_address(abstract_prefix(), "one"), unix_address(abstract_prefix(), "on")};
    apart(leave_by_address, &host);
    apart(leave_by_address, &start);
#endif
    remove_directory(directory);
}

static void listen_takes(void *context)
{
    int fds[CAPACITY] = {listen_at("127.0.0.1", 0), listen_at("127.0.0.1", 0)};
    int first = port_of(fds[0]), second = port_of(fds[1]);
    tsrv_address address;
    (void)context;
    hand_over(fds, 2);
    tsrv_loop *loop = t_new_loop();
    tsrv_server *server = new_server(loop);
    CHECK_INT(tsrv_server_bind(server, first, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_start(server, 1, NULL), TSRV_OK);
    CHECK_INT(tsrv_server_listen(server, second, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_listen_fds(fds, CAPACITY), 0);
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
    CHECK_INT(tsrv_address_port(&address), first);
    CHECK_INT(tsrv_server_address(server, 1, &address), TSRV_OK);
    CHECK_INT(tsrv_address_port(&address), second);
    check_served(loop, t_connect(first));
    check_served(loop, t_connect(second));
    tsrv_server_stop(server);
    CHECK(!t_is_open(FIRST) && !t_is_open(FIRST + 1));
    free_server(server, loop);
}

TEST_LOOP(servers_listen_on_what_was_handed_over)
{
    apart(listen_takes, NULL);
}

static void take_dual(void *context)
{
    int fds[CAPACITY] = {listen_dual(0)}, port = port_of(fds[0]), got[CAPACITY];
    (void)context;
    hand_over(fds, 1);
    CHECK_INT(tsrv_bind_sockets(port, NULL, NULL, got, CAPACITY), 1);
    CHECK_INT(got[0], FIRST);
    CHECK(is_close_on_exec(FIRST));
    CHECK(is_nonblocking(FIRST));
    CHECK_INT(tsrv_listen_fds(fds, CAPACITY), 0);
    tsrv_loop *loop = t_new_loop();
    tsrv_server *server = new_server(loop);
    CHECK_INT(tsrv_server_add_sockets(server, got, 1), TSRV_OK);
    check_served(loop, t_connect(port));
    check_served(loop, connect_activated("::1", port));
    free_server(server, loop);
}

/* The same for a whole server: a bare port is what most units have. */
static void listen_takes_dual(void *context)
{
    int fds[CAPACITY] = {listen_dual(0)}, port = port_of(fds[0]);
    (void)context;
    hand_over(fds, 1);
    tsrv_loop *loop = t_new_loop();
    tsrv_server *server = new_server(loop);
    CHECK_INT(tsrv_server_listen(server, port, NULL, NULL), TSRV_OK);
    check_served(loop, t_connect(port));
    check_served(loop, connect_activated("::1", port));
    free_server(server, loop);
}

TEST_LOOP(socket_for_both_families_serves_both)
{
    if (!t_has_ipv6()) {
        SKIP("IPv6 loopback");
    }
    apart(take_dual, NULL);
    apart(listen_takes_dual, NULL);
}

/* One for each family, in the other order than ours. */
static void take_both(void *context)
{
    int port = port_of_neither();
    int fds[CAPACITY] = {listen_at("::", port), listen_at("0.0.0.0", port)}, got[CAPACITY];
    (void)context;
    hand_over(fds, 2);
    CHECK_INT(tsrv_bind_sockets(port, NULL, NULL, got, CAPACITY), 2);
    CHECK_INT(got[0], FIRST + 1);
    CHECK_INT(got[1], FIRST);
    t_close_all(got, 2);
}

/* A socket for IPv6 only leaves IPv4 to us; one for both on another port says nothing. */
static void take_half(void *context)
{
    int port = port_of_neither();
    int fds[CAPACITY] = {listen_at("::", port), listen_dual(0)}, got[CAPACITY];
    (void)context;
    hand_over(fds, 2);
    CHECK_INT(tsrv_bind_sockets(port, NULL, NULL, got, CAPACITY), 2);
    CHECK(got[0] != FIRST && got[0] != FIRST + 1);
    CHECK_INT(port_of(got[0]), port);
    CHECK_INT(got[1], FIRST);
    t_close(connect_activated("127.0.0.1", port));
    CHECK_INT(tsrv_listen_fds(fds, CAPACITY), 1);
    CHECK_INT(fds[0], FIRST + 1);
    t_close_all(got, 2);
    t_close(FIRST + 1);
}

TEST_ONCE(socket_for_ipv6_only_does_not_stand_for_both)
{
    if (!t_has_ipv6()) {
        SKIP("IPv6 loopback");
    }
    apart(take_both, NULL);
    apart(take_half, NULL);
}

/* Who asks for IPv4 alone gets either that socket, or the truth: the port is in use. */
static void ask_for_half(void *context)
{
    const wish *w = (const wish *)context;
    int fds[CAPACITY] = {listen_dual(0)}, port = port_of(fds[0]), got[CAPACITY];
    tsrv_bind_options options = {0};
    options.family = AF_INET;
    hand_over(fds, 1);
    int count = tsrv_bind_sockets(port, w->address, &options, got, CAPACITY);
    if (count == 1) {
        CHECK_INT(got[0], FIRST);
    } else {
        CHECK_INT(count, -EADDRINUSE);
        CHECK_INT(tsrv_listen_fds(got, CAPACITY), 1);
    }
    t_close(FIRST);
}

TEST_ONCE(ipv4_alone_where_a_socket_for_both_was_handed_over)
{
    wish any = {NULL, NULL}, number = {"0.0.0.0", NULL};
    if (!t_has_ipv6()) {
        SKIP("IPv6 loopback");
    }
    apart(ask_for_half, &any);
    apart(ask_for_half, &number);
}

/* ---- a service manager that listens -------------------------------------------------------*/

typedef struct message {
    char text[4096];
    int sender; /* process id; 0 = the system does not tell */
} message;

/* Where this process is told; name is what NOTIFY_SOCKET says. */
static int open_manager(const char *name)
{
    char address[200];
    snprintf(address, sizeof address, "unix:%s", name);
    int fd = bind_at(make_endpoint(address, 0), SOCK_DGRAM, 0);
    t_prepare(fd);
#ifdef __linux__
    int on = 1;
    CHECK(setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) == 0);
#endif
    set_text("NOTIFY_SOCKET", name);
    return fd;
}

/* Waits for the next thing that the manager is told. */
static message next_message(int manager)
{
    union {
        struct cmsghdr header;
        char room[256];
    } control;
    message m;
    struct iovec part = {m.text, sizeof m.text - 1};
    struct msghdr header;
    memset(&header, 0, sizeof header);
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = &control;
    header.msg_controllen = sizeof control;
    ssize_t size = recvmsg(manager, &header, 0);
    if (size < 0) {
        T_FAIL("the manager is told nothing more: %s", strerror(errno));
    }
    CHECK((header.msg_flags & MSG_TRUNC) == 0);
    m.text[size] = 0;
    CHECK_INT(size, strlen(m.text)); /* text and nothing behind it */
    m.sender = 0;
#ifdef __linux__
    struct ucred who;
    struct cmsghdr *c = CMSG_FIRSTHDR(&header);
    CHECK(c != NULL && c->cmsg_type == SCM_CREDENTIALS);
    memcpy(&who, CMSG_DATA(c), sizeof who);
    m.sender = (int)who.pid;
#endif
    return m;
}

static void expect_message(int manager, const char *expected)
{
    message m = next_message(manager);
    CHECK_STR(m.text, expected);
}

static void expect_no_message(int manager)
{
    char text[100] = "";
    ssize_t size = recv(manager, text, sizeof text - 1, MSG_DONTWAIT);
    CHECK_STR(size < 0 ? strerror(errno) : text, strerror(EAGAIN));
}

/* ---- tsrv_notify --------------------------------------------------------------------------*/

TEST_ONCE(without_a_manager_nobody_is_told)
{
    static char endless[100000];
    memset(endless, 'x', sizeof endless - 1);
    for (int i = 0; i < 2; i++) {
        CHECK_INT(tsrv_notify("READY=1"), 0);
        CHECK_INT(tsrv_notify("RELOADING=1"), 0);
        CHECK_INT(tsrv_notify(""), 0);
        CHECK_INT(tsrv_notify(endless), 0);
        set_text("NOTIFY_SOCKET", "");
    }
}

static void check_told(const char *name)
{
    static const char *const states[] = {
        "READY=1", "STOPPING=1", "WATCHDOG=1", "STATUS=a b = \303\274", "MAINPID=12\nSTATUS=%s %d",
    };
    int manager = open_manager(name);
    for (size_t i = 0; i < COUNT(states); i++) {
        CHECK_INT(tsrv_notify(states[i]), 1);
        expect_message(manager, states[i]);
    }
    expect_no_message(manager);
    t_close(manager);
}

TEST_ONCE(manager_at_a_path_is_told)
{
    const char *directory = t_make_directory();
    check_told(unix_address(directory, "notify") + 5);
    remove_directory(directory);
}

#ifdef __linux__
TEST_ONCE(manager_at_an_abstract_name_is_told)
{
    check_told(unix_address(abstract_prefix(), "notify") + 5);
}
#endif

TEST_ONCE(reloading_comes_with_its_time)
{
    static const char *const states[] = {"RELOADING=1", "STATUS=anew\nRELOADING=1"};
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5);
    for (int i = 0; i < 2; i++) {
        char expected[200];
        unsigned long long before = (unsigned long long)t_now_us(), told = 0;
        CHECK_INT(tsrv_notify(states[i]), 1);
        message m = next_message(manager);
        const char *stamp = strstr(m.text, "\nMONOTONIC_USEC=");
        CHECK(stamp != NULL && sscanf(stamp, "\nMONOTONIC_USEC=%llu", &told) == 1);
        snprintf(expected, sizeof expected, "%s\nMONOTONIC_USEC=%llu", states[i], told);
        CHECK_STR(m.text, expected);
        CHECK(told >= before);
        CHECK(told <= (unsigned long long)t_now_us());
    }
    t_close(manager);
    remove_directory(directory);
}

TEST_ONCE(too_long_a_state_is_refused_whole)
{
    static const size_t sizes[] = {1024, 1025, 4096, 99999};
    static char state[100000];
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5);
    for (int i = 0; i < 4; i++) {
        memset(state, 'x', sizes[i]);
        memcpy(state, "STATUS=", 7);
        state[sizes[i]] = 0;
        CHECK_INT(tsrv_notify(state), TSRV_ETOOLONG);
        memcpy(state, "RELOADING=1\n", 12);
        CHECK_INT(tsrv_notify(state), TSRV_ETOOLONG);
    }
    expect_no_message(manager);
    t_close(manager);
    remove_directory(directory);
}

/* The limit is 1,000 bytes, also with the time that is added. */
TEST_ONCE(longest_state_is_just_what_is_promised)
{
    char state[LONGEST + 2];
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5);
    memset(state, 'x', sizeof state);
    memcpy(state, "STATUS=", 7);
    state[LONGEST] = 0;
    CHECK_INT(tsrv_notify(state), 1);
    expect_message(manager, state);
    memcpy(state, "RELOADING=1\n", 12);
    CHECK_INT(tsrv_notify(state), 1);
    message m = next_message(manager);
    CHECK_MEM(m.text, strlen(m.text) < LONGEST ? strlen(m.text) : LONGEST, state, LONGEST);
    CHECK(strncmp(m.text + LONGEST, "\nMONOTONIC_USEC=", 16) == 0);
    memcpy(state, "STATUS=", 7);
    state[LONGEST] = 'x';
    state[LONGEST + 1] = 0;
    CHECK_INT(tsrv_notify(state), TSRV_ETOOLONG);
    expect_no_message(manager);
    t_close(manager);
    remove_directory(directory);
}

/* The harness sees to it that nothing stays open; a SIGPIPE would end this process. */
TEST_ONCE(manager_that_does_not_listen_is_an_error)
{
    struct sockaddr_un name;
    char path[sizeof name.sun_path + 10];
    const char *directory = t_make_directory();
    CHECK(signal(SIGPIPE, SIG_DFL) != SIG_ERR);
    const char *dead = unix_address(directory, "dead"), *stream = unix_address(directory, "stream");
    t_close(open_manager(dead + 5));
    CHECK_INT(tsrv_notify("READY=1"), -ECONNREFUSED);
    set_text("NOTIFY_SOCKET", unix_address(directory, "none") + 5);
    CHECK_INT(tsrv_notify("READY=1"), -ENOENT);
    set_text("NOTIFY_SOCKET", directory);
    CHECK(tsrv_notify("READY=1") < 0);
    int listener = listen_at(stream, 0);
    set_text("NOTIFY_SOCKET", stream + 5);
    CHECK(tsrv_notify("READY=1") < 0);
    t_close(listener);
    CHECK(tsrv_notify("READY=1") < 0);
#ifdef __linux__
    set_text("NOTIFY_SOCKET", unix_address(abstract_prefix(), "none") + 5);
    CHECK_INT(tsrv_notify("READY=1"), -ECONNREFUSED);
    set_text("NOTIFY_SOCKET", "@");
    CHECK(tsrv_notify("READY=1") < 0);
#endif
    for (size_t size = sizeof name.sun_path; size < sizeof path; size++) {
        memset(path, '/', size);
        path[size] = 0;
        set_text("NOTIFY_SOCKET", path);
        CHECK_INT(tsrv_notify("READY=1"), -ENAMETOOLONG);
        path[0] = '@';
        set_text("NOTIFY_SOCKET", path);
        CHECK(tsrv_notify("READY=1") < 0);
    }
    remove_directory(directory);
}

/* One that is too long for an address is so, too, when only what is remembered of it is left. */
TEST_ONCE(manager_whose_name_is_too_long_is_an_error_later_too)
{
    char path[300];
    for (size_t size = sizeof path - 1; size >= 110; size--) {
        memset(path, '/', size);
        path[size] = 0;
        set_text("NOTIFY_SOCKET", path);
        tsrvi_notify_remember();
        set_text("NOTIFY_SOCKET", NULL);
        CHECK_INT(tsrv_notify("READY=1"), -ENAMETOOLONG);
    }
}

TEST_ONCE(failures_of_the_system_are_told)
{
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5);
    t_fault_at = 1;
    t_fault_name = "socket";
    CHECK_INT(tsrv_notify("READY=1"), -EMFILE);
    t_fault_calls = 0;
    t_fault_name = "sendto";
    t_fault_errno = EPERM;
    CHECK_INT(tsrv_notify("READY=1"), -EPERM);
    t_fault_at = 0;
    expect_no_message(manager);
    CHECK_INT(tsrv_notify("READY=1"), 1);
    expect_message(manager, "READY=1");
    t_close(manager);
    remove_directory(directory);
}

/* A manager that does not read must not hold up the loop. */
TEST_ONCE(manager_whose_queue_is_full_is_not_waited_for)
{
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5), told = 0, rc;
    while ((rc = tsrv_notify("STATUS=more")) == 1) {
        told++;
        CHECK(told < 1000000);
    }
    CHECK(rc < 0);
    for (int i = 0; i < told; i++) {
        expect_message(manager, "STATUS=more");
    }
    expect_no_message(manager);
    CHECK_INT(tsrv_notify("READY=1"), 1);
    t_close(manager);
    remove_directory(directory);
}

/* An upgrade: the old program holds the other end of a pipe. */
static void tell_the_predecessor(void *context)
{
    int ends[2], fds[CAPACITY];
    char byte;
    (void)context;
    CHECK(pipe(ends) == 0);
    set_number("TSRV_READY_FD", ends[1]);
    CHECK(fcntl(ends[0], F_SETFL, O_NONBLOCK) == 0);
    CHECK_INT(tsrv_listen_fds(fds, CAPACITY), 0);
    CHECK(getenv("TSRV_READY_FD") == NULL);
    CHECK(is_close_on_exec(ends[1]));
    CHECK_INT(tsrv_notify("STATUS=not yet"), 0);
    CHECK_INT(read(ends[0], &byte, 1), -1);
    CHECK_INT(errno, EAGAIN);
    CHECK_INT(tsrv_notify("READY=1\nSTATUS=now"), 0);
    CHECK_INT(read(ends[0], &byte, 1), 1);
    CHECK_INT(read(ends[0], &byte, 1), 0);
    CHECK(!t_is_open(ends[1]));
    CHECK_INT(tsrv_notify("READY=1"), 0);
    t_close(ends[0]);
}

TEST_ONCE(predecessor_is_told_once)
{
    apart(tell_the_predecessor, NULL);
}

/* ---- tsrv_serve ---------------------------------------------------------------------------*/

enum { NO_PID, OWN_PID, OTHER_PID }; /* what WATCHDOG_PID says */

typedef struct service {
    int processes;
    const char *watchdog; /* WATCHDOG_USEC; NULL = not set */
    int watchdog_pid;
    int lifetime_ms; /* after which it sends itself a SIGTERM; 0 = it does not */
    bool handed;     /* on a socket that was handed over */
} service;

static tsrv_timer lifetime;

static void end_itself(void *context)
{
    (void)context;
    CHECK(kill(getpid(), SIGTERM) == 0);
}

/* Before the first connection the manager learns the port, and that comes before READY=1. */
static void tell_port(tsrv_server *server, void *context)
{
    const service *s = (const service *)context;
    tsrv_address address;
    char state[64];
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
    snprintf(state, sizeof state, "STATUS=port %d", tsrv_address_port(&address));
    CHECK_INT(tsrv_notify(state), 1);
    set_text("WATCHDOG_USEC", NULL); /* as sd_watchdog_enabled(1, ...) does: that was asked before */
    set_text("WATCHDOG_PID", NULL);
    set_text("NOTIFY_SOCKET", NULL); /* and so was that */
    if (s->lifetime_ms > 0) {
        CHECK_INT(tsrv_timer_start(tsrv_loop_current(), &lifetime, s->lifetime_ms, end_itself,
                                   NULL),
                  TSRV_OK);
    }
}

static void serve(void *context)
{
    service *s = (service *)context;
    tsrv_server_options options = {0};
    int fds[CAPACITY], port = 0;
    if (s->handed) {
        fds[0] = listen_at("127.0.0.1", 0);
        port = port_of(fds[0]);
        hand_over(fds, 1);
    }
    tsrv_loop *loop = s->processes == 1 ? t_new_loop() : NULL;
    set_text("WATCHDOG_USEC", s->watchdog);
    if (s->watchdog_pid != NO_PID) {
        set_number("WATCHDOG_PID", (long long)(s->watchdog_pid == OWN_PID ? getpid() : getppid()));
    }
    options.handle_stream = echo_lines;
    options.on_start = tell_port;
    options.context = s;
    options.loop = loop;
    options.grace_ms = 5000 * t_scale();
    CHECK_INT(tsrv_serve(port, "127.0.0.1", s->processes, &options), TSRV_OK);
    if (tsrv_task_id() >= 0) {
        exit(0); /* a worker keeps its pipes to the parent */
    }
    if (loop != NULL) {
        CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    }
}

static bool is_ping(const message *m)
{
    return strcmp(m->text, "WATCHDOG=1") == 0;
}

/* The next message but for pings, from pid. */
static message next_state(int manager, pid_t pid)
{
    message m;
    do {
        m = next_message(manager);
        CHECK(!is_ping(&m) || m.sender == 0 || m.sender == pid);
    } while (is_ping(&m));
    return m;
}

static void expect_state(int manager, pid_t pid, const char *expected)
{
    message m = next_state(manager, pid);
    CHECK_STR(m.text, expected);
    CHECK(m.sender == 0 || m.sender == pid); /* whom the service manager believes */
}

static int port_in(const message *m)
{
    int port = 0;
    if (sscanf(m->text, "STATUS=port %d", &port) != 1) {
        T_FAIL("\"%s\", expected a port", m->text);
    }
    return port;
}

static void expect_ping(int manager, pid_t pid)
{
    message m = next_message(manager);
    CHECK_STR(m.text, "WATCHDOG=1");
    CHECK(m.sender == 0 || m.sender == pid);
}

/* Starts a service in a single process. Returns its pid, and its port when it is ready. */
static pid_t start_alone(int manager, service *s, int *port)
{
    pid_t pid = begin(serve, s);
    message m = next_state(manager, pid);
    *port = port_in(&m);
    expect_state(manager, pid, "READY=1");
    return pid;
}

static void end_alone(int manager, pid_t pid)
{
    CHECK(kill(pid, SIGTERM) == 0);
    expect_state(manager, pid, "STOPPING=1");
    finish(pid);
    expect_no_message(manager);
}

TEST_LOOP(server_that_is_ready_serves_and_says_when_it_stops)
{
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5), port;
    for (int handed = 0; handed < 2; handed++) {
        service s = {1, NULL, NO_PID, 0, handed};
        pid_t pid = start_alone(manager, &s, &port);
        check_answered(port);
        expect_no_message(manager);
        end_alone(manager, pid);
    }
    t_close(manager);
    remove_directory(directory);
}

enum { STOPS_THE_LOOP, DRAINS_ITSELF, STOPS_LISTENING, FAILURES };

/* Whatever the program has found missing. */
static void fail_to_start(tsrv_server *server, void *context)
{
    switch (*(int *)context) {
    case STOPS_THE_LOOP: tsrv_loop_stop(tsrv_loop_current()); break;
    case DRAINS_ITSELF: CHECK_INT(tsrv_server_drain(server, 0), TSRV_OK); break;
    default: tsrv_server_stop(server); break;
    }
}

static void serve_in_vain(void *context)
{
    tsrv_server_options options = {0};
    options.handle_stream = echo_lines;
    options.on_start = fail_to_start;
    options.context = context;
    options.loop = t_new_loop();
    CHECK_INT(tsrv_serve(0, "127.0.0.1", 1, &options), TSRV_OK);
    CHECK_INT(tsrv_loop_free(options.loop), TSRV_OK);
}

/* Else the manager would start what needs it, or end its predecessor. */
TEST_LOOP(server_whose_on_start_has_ended_it_is_not_ready)
{
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5);
    for (int failure = 0; failure < FAILURES; failure++) {
        char text[100];
        apart(serve_in_vain, &failure);
        for (ssize_t size; (size = recv(manager, text, sizeof text - 1, MSG_DONTWAIT)) > 0;) {
            text[size] = 0;
            CHECK(strstr(text, "READY=1") == NULL);
        }
    }
    t_close(manager);
    remove_directory(directory);
}

static tsrv_server *second_server;

static void tell_second(tsrv_server *server, void *context)
{
    (void)server, (void)context;
    CHECK_INT(tsrv_notify("STATUS=second"), 1);
}

/* It makes another server, as for metrics, on the same loop. */
static void start_a_second(tsrv_server *server, void *context)
{
    tsrv_server_options options = {0};
    (void)server, (void)context;
    options.handle_stream = echo_lines;
    options.on_start = tell_second;
    options.loop = tsrv_loop_current();
    CHECK_INT(tsrv_server_new(&second_server, &options), TSRV_OK);
    t_listen(second_server);
}

static void serve_with_a_second(void *context)
{
    tsrv_server_options options = {0};
    (void)context;
    options.handle_stream = echo_lines;
    options.on_start = start_a_second;
    options.loop = t_new_loop();
    CHECK_INT(tsrv_serve(0, "127.0.0.1", 1, &options), TSRV_OK);
    tsrv_server_free(second_server);
    CHECK_INT(tsrv_loop_free(options.loop), TSRV_OK);
}

/* The server of tsrv_serve is the one that counts. */
TEST_LOOP(server_that_is_ready_waits_for_no_second_one)
{
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5);
    pid_t pid = begin(serve_with_a_second, NULL);
    expect_state(manager, pid, "READY=1");
    expect_state(manager, pid, "STATUS=second");
    end_alone(manager, pid);
    t_close(manager);
    remove_directory(directory);
}

/* The manager may want to start the successor, or count the time, while requests are finished. */
TEST_LOOP(server_says_that_it_stops_before_the_drain_is_over)
{
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5), port;
    service s = {1, NULL, NO_PID, 0, false};
    pid_t pid = start_alone(manager, &s, &port);
    int client = t_connect(port);
    t_echo(client, "whole\n");
    t_sends(client, "half"); /* a request under way */
    CHECK(kill(pid, SIGTERM) == 0);
    expect_state(manager, pid, "STOPPING=1");
    struct pollfd ended = {client, POLLIN, 0};
    CHECK_INT(poll(&ended, 1, 0), 0);
    t_sends(client, "\n");
    t_expect(client, "half\n");
    t_leave(client);
    finish(pid);
    expect_no_message(manager);
    t_close(manager);
    remove_directory(directory);
}

TEST_LOOP(watchdog_is_told_again_and_again)
{
    static const int pids[] = {OWN_PID, NO_PID};
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5), port;
    for (int i = 0; i < 2; i++) {
        service s = {1, "200000", pids[i], 0, false};
        pid_t pid = start_alone(manager, &s, &port);
        int64_t start = t_now_ms();
        for (int k = 0; k < 4; k++) {
            expect_ping(manager, pid);
        }
        /* At least three intervals of 100 ms, but for the ping that came before READY=1. */
        CHECK_NEAR_MS(t_now_ms() - start, 250, 2000);
        check_answered(port);
        end_alone(manager, pid);
    }
    t_close(manager);
    remove_directory(directory);
}

/* The service ends in the same loop that would tell: nothing comes in the time of three pings. */
TEST_LOOP(watchdog_of_another_process_is_not_told)
{
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5);
    service s = {1, "200000", OTHER_PID, 350, false};
    pid_t pid = begin(serve, &s);
    message m = next_message(manager);
    CHECK(port_in(&m) > 0);
    expect_message(manager, "READY=1");
    expect_message(manager, "STOPPING=1");
    finish(pid);
    expect_no_message(manager);
    t_close(manager);
    remove_directory(directory);
}

/* Every half of the time, as sd_watchdog_enabled(3) advises, also where that is longer than the
 * loop's own beat and no multiple of it: at 0, 510, 1020, 1530 and 2040 ms. */
TEST_ONCE(watchdog_is_told_in_time_whatever_its_limit_is)
{
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5), pings = 0;
    service s = {1, "1020000", OWN_PID, 2200, false};
    pid_t pid = begin(serve, &s);
    message m;
    do {
        m = next_message(manager);
        pings += is_ping(&m);
    } while (strcmp(m.text, "STOPPING=1") != 0);
    finish(pid);
    if (pings < 4) {
        T_FAIL("%d pings, expected 5", pings);
    }
    t_close(manager);
    remove_directory(directory);
}

static long long interval(void)
{
    tsrvi_watchdog watchdog = tsrvi_watchdog_make();
    return watchdog.due == TSRVI_FOREVER ? (long long)TSRVI_FOREVER : (long long)watchdog.interval;
}

static void check_interval(const char *usec, int pid, long long expected)
{
    set_text("WATCHDOG_USEC", usec);
    set_text("WATCHDOG_PID", NULL);
    if (pid != NO_PID) {
        set_number("WATCHDOG_PID", (long long)(pid == OWN_PID ? getpid() : getppid()));
    }
    CHECK_INT(interval(), expected);
}

#ifdef TCP_INFO
static int queue_of(int fd)
{
    struct tcp_info info;
    socklen_t size = sizeof info;
    memset(&info, 0, sizeof info);
    CHECK(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0);
    return (int)info.tcpi_sacked; /* of a listening socket: see tcp_get_info */
}

static void ask_for_more(void *context)
{
    tsrv_bind_options options = {0};
    int more = *(int *)context;
    int fds[CAPACITY] = {listen_at("127.0.0.1", 0)}, port = port_of(fds[0]), before = queue_of(fds[0]);
    hand_over(fds, 1);
    options.backlog = more == 0 ? 0 : before + more;
    CHECK_INT(tsrv_bind_sockets(port, "127.0.0.1", &options, fds, CAPACITY), 1);
    CHECK_INT(queue_of(fds[0]), before + more);
    tsrvi_bound_close(fds[0]);
}

TEST_ONCE(backlog_that_is_asked_for_holds_for_what_was_handed_over)
{
    int more = 7;
    apart(ask_for_more, &more);
}

TEST_ONCE(backlog_of_what_was_handed_over_stays_if_none_is_asked_for)
{
    int more = 0;
    apart(ask_for_more, &more);
}
#endif

TEST_ONCE(watchdog_interval_is_half_of_the_limit)
{
    static const char *const none[] = {NULL, "", "0", "-1", "-200000", "junk", "1x", " 1"};
    static const char *const pids[] = {"", "0", "-1", "junk", "99999999999999999999"};
    for (size_t i = 0; i < COUNT(none); i++) {
        check_interval(none[i], NO_PID, (long long)TSRVI_FOREVER);
        check_interval(none[i], OWN_PID, (long long)TSRVI_FOREVER);
    }
    check_interval("1", NO_PID, 500);
    check_interval("200000", NO_PID, 100000000);
    check_interval("200000", OWN_PID, 100000000);
    check_interval("200000", OTHER_PID, (long long)TSRVI_FOREVER);
    check_interval("2147483647", OWN_PID, 1073741823500);
    for (size_t i = 0; i < COUNT(pids); i++) {
        set_text("WATCHDOG_PID", pids[i]);
        CHECK_INT(interval(), (long long)TSRVI_FOREVER);
    }
}

/* WatchdogSec=1h has more microseconds than an int. */
TEST_ONCE(watchdog_of_an_hour_is_told)
{
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5), port;
    service s = {1, "3600000000", OWN_PID, 0, false};
    pid_t pid = begin(serve, &s);
    int pings = 0;
    message m;
    do { /* the first comes at once */
        m = next_message(manager);
        pings += is_ping(&m);
    } while (strncmp(m.text, "STATUS", 6) != 0);
    port = port_in(&m);
    check_answered(port);
    CHECK(kill(pid, SIGTERM) == 0);
    do {
        m = next_message(manager);
        pings += is_ping(&m);
    } while (strcmp(m.text, "STOPPING=1") != 0);
    finish(pid);
    CHECK_INT(pings, 1);
    check_interval("3600000000", OWN_PID, 1800000000000);
    t_close(manager);
    remove_directory(directory);
}

/* Nobody may be told that a service is ready whose port is taken. */
TEST_ONCE(server_that_cannot_start_is_never_ready)
{
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5);
    int taken = listen_at("127.0.0.1", 0);
    tsrv_server_options options = {0};
    char text[100] = "";
    options.handle_stream = echo_lines;
    tsrv_set_log(t_no_log, NULL);
    for (int processes = 1; processes < 3; processes++) {
        CHECK_INT(tsrv_serve(port_of(taken), "127.0.0.1", processes, &options), -EADDRINUSE);
        while (recv(manager, text, sizeof text - 1, MSG_DONTWAIT) >= 0) {
            CHECK(strstr(text, "READY=1") == NULL);
            memset(text, 0, sizeof text);
        }
    }
    t_close(taken);
    t_close(manager);
    remove_directory(directory);
}

/* Reads until two workers have begun and the service is ready, once. Returns the port. */
static int await_workers(int manager, pid_t pid)
{
    int begun = 0, ready = 0, port = 0;
    while (begun < 2 || ready < 1) {
        message m = next_state(manager, pid);
        if (strcmp(m.text, "READY=1") == 0) {
            CHECK(begun > 0);
            CHECK(m.sender == 0 || m.sender == pid);
            ready++;
        } else {
            port = port_in(&m);
            CHECK(m.sender == 0 || m.sender != pid);
            begun++;
        }
    }
    CHECK_INT(begun, 2);
    CHECK_INT(ready, 1);
    return port;
}

static void expect_reloading(int manager, pid_t pid)
{
    unsigned long long told = 0;
    char expected[100];
    message m = next_state(manager, pid);
    CHECK(m.sender == 0 || m.sender == pid);
    sscanf(m.text, "RELOADING=1\nMONOTONIC_USEC=%llu", &told);
    snprintf(expected, sizeof expected, "RELOADING=1\nMONOTONIC_USEC=%llu", told);
    CHECK_STR(m.text, expected);
    CHECK(told > 0 && told <= (unsigned long long)t_now_us());
}

static void check_workers(const char *watchdog, bool handed)
{
    const char *directory = t_make_directory();
    int manager = open_manager(unix_address(directory, "notify") + 5);
    service s = {2, watchdog, OWN_PID, 0, handed};
    pid_t pid = begin(serve, &s);
    int port = await_workers(manager, pid);
    check_answered(port);
    for (int i = 0; i < 4 && watchdog != NULL; i++) {
        expect_ping(manager, pid);
    }
    for (int round = 0; round < 2; round++) {
        CHECK(kill(pid, SIGHUP) == 0);
        expect_reloading(manager, pid);
        for (int i = 0; i < 2; i++) { /* the new workers come before it is ready again */
            message m = next_state(manager, pid);
            CHECK_INT(port_in(&m), port);
        }
        expect_state(manager, pid, "READY=1");
        check_answered(port);
    }
    CHECK(kill(pid, SIGTERM) == 0);
    expect_state(manager, pid, "STOPPING=1");
    finish(pid);
    while (watchdog != NULL) { /* pings between the two */
        char text[100] = "";
        if (recv(manager, text, sizeof text - 1, MSG_DONTWAIT) < 0) {
            break;
        }
        CHECK_STR(text, "WATCHDOG=1");
    }
    expect_no_message(manager);
    t_close(manager);
    remove_directory(directory);
}

TEST_ONCE(workers_are_ready_reload_and_stop_as_one)
{
    check_workers(NULL, false);
}

TEST_ONCE(watchdog_of_workers_is_told_by_the_parent)
{
    check_workers("200000", false);
}

TEST_ONCE(workers_share_what_was_handed_over)
{
    check_workers(NULL, true);
}

/* ---- tsrv_cpu_count -----------------------------------------------------------------------*/

#define GROUP_FILE "/proc/self/cgroup"
#define TOP "/sys/fs/cgroup"
#define OLD_QUOTA TOP "/cpu/cpu.cfs_quota_us"
#define OLD_PERIOD TOP "/cpu/cpu.cfs_period_us"
#define NO_LIMIT INT_MAX

/* Makes a file with this text below t_root, and the directories that it needs. */
static void plant(const char *path, const char *text)
{
    char whole[4096];
    size_t size = (size_t)snprintf(whole, sizeof whole, "%s%s", t_root, path);
    CHECK(size < sizeof whole);
    for (char *slash = whole + strlen(t_root) + 1; (slash = strchr(slash, '/')) != NULL; slash++) {
        *slash = 0;
        CHECK(mkdir(whole, 0700) == 0 || errno == EEXIST);
        *slash = '/';
    }
    FILE *file = fopen(whole, "w");
    CHECK(file != NULL);
    CHECK(fputs(text, file) >= 0);
    CHECK(fclose(file) == 0);
}

/* What the system would use without any quota. */
static int all_cpus(void)
{
#ifdef __linux__
    cpu_set_t set;
    CHECK(sched_getaffinity(0, sizeof set, &set) == 0);
    return CPU_COUNT(&set);
#else
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
#endif
}

typedef struct control_group {
    const char *what;
    int cpus;                /* that it grants */
    const char *files[4][2]; /* path and text */
} control_group;

/* Counts with these files instead of the system's. */
static void check_group(const control_group *g)
{
    const char *directory = t_make_directory();
    int all = all_cpus(), expected = g->cpus < all ? g->cpus : all;
    t_root = directory;
    for (int i = 0; i < 4 && g->files[i][0] != NULL; i++) {
        plant(g->files[i][0], g->files[i][1]);
    }
    int before = t_open_fds(), count = tsrv_cpu_count();
    if (count != expected) {
        T_FAIL("%s: %d processors, expected %d", g->what, count, expected);
    }
    CHECK_INT(t_open_fds(), before);
    t_root = "";
    remove_directory(directory);
}

static void check_groups(const control_group *groups, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        check_group(&groups[i]);
    }
}

#define CHECK_GROUPS(groups) check_groups(groups, sizeof(groups) / sizeof(groups)[0])

TEST_ONCE(quota_of_a_group_counts)
{
    static const control_group groups[] = {
        {"no files", NO_LIMIT, {{NULL, NULL}}},
        {"no quota", NO_LIMIT, {{GROUP_FILE, "0::/a/b\n"}}},
        {"one and a half", 2, {{GROUP_FILE, "0::/a/b\n"}, {TOP "/a/cpu.max", "150000 100000\n"}}},
        {"a little above one",
         2,
         {{GROUP_FILE, "0::/a/b\n"}, {TOP "/a/cpu.max", "100001 100000\n"}}},
        {"one", 1, {{GROUP_FILE, "0::/a/b\n"}, {TOP "/a/b/cpu.max", "100000 100000\n"}}},
        {"below one", 1, {{GROUP_FILE, "0::/a/b\n"}, {TOP "/a/b/cpu.max", "1000 100000\n"}}},
        {"another period", 1, {{GROUP_FILE, "0::/a\n"}, {TOP "/a/cpu.max", "20000 20000\n"}}},
        {"max", NO_LIMIT, {{GROUP_FILE, "0::/a/b\n"}, {TOP "/a/b/cpu.max", "max 100000\n"}}},
        {"many", NO_LIMIT, {{GROUP_FILE, "0::/a\n"}, {TOP "/a/cpu.max", "999000000 100000\n"}}},
        {"no newlines", 1, {{GROUP_FILE, "0::/a"}, {TOP "/a/cpu.max", "50000 100000"}}},
        {"the root's", 1, {{GROUP_FILE, "0::/\n"}, {TOP "/cpu.max", "50000 100000\n"}}},
        {"others' lines",
         1,
         {{GROUP_FILE, "9:name=systemd:/\n1:cpu,cpuacct:/x\n0::/a\n"},
          {TOP "/a/cpu.max", "50000 100000\n"},
          {TOP "/x/cpu.max", "max 100000\n"}}},
        {"others' groups",
         NO_LIMIT,
         {{GROUP_FILE, "1:cpu:/x\n0::/a/b\n"},
          {TOP "/x/cpu.max", "50000 100000\n"},
          {TOP "/a/bc/cpu.max", "50000 100000\n"},
          {TOP "/b/cpu.max", "50000 100000\n"}}},
    };
    CHECK_GROUPS(groups);
}

TEST_ONCE(least_quota_of_all_levels_counts)
{
    static const control_group groups[] = {
        {"the parent's",
         1,
         {{GROUP_FILE, "0::/a/b\n"},
          {TOP "/a/cpu.max", "50000 100000\n"},
          {TOP "/a/b/cpu.max", "max 100000\n"}}},
        {"the child's",
         1,
         {{GROUP_FILE, "0::/a/b\n"},
          {TOP "/a/cpu.max", "max 100000\n"},
          {TOP "/a/b/cpu.max", "50000 100000\n"}}},
        {"the grandparent's",
         1,
         {{GROUP_FILE, "0::/a/b/c\n"},
          {TOP "/a/cpu.max", "100000 100000\n"},
          {TOP "/a/b/cpu.max", "200000 100000\n"},
          {TOP "/a/b/c/cpu.max", "300000 100000\n"}}},
        {"the middle's",
         1,
         {{GROUP_FILE, "0::/a/b/c\n"},
          {TOP "/a/cpu.max", "300000 100000\n"},
          {TOP "/a/b/cpu.max", "100000 100000\n"},
          {TOP "/a/b/c/cpu.max", "200000 100000\n"}}},
        {"the top's",
         1,
         {{GROUP_FILE, "0::/a/b\n"},
          {TOP "/cpu.max", "100000 100000\n"},
          {TOP "/a/b/cpu.max", "200000 100000\n"}}},
    };
    CHECK_GROUPS(groups);
}

TEST_ONCE(quota_of_the_old_kind_counts)
{
    static const control_group groups[] = {
        {"half", 1, {{OLD_QUOTA, "50000\n"}, {OLD_PERIOD, "100000\n"}}},
        {"one and a half", 2, {{OLD_QUOTA, "150000\n"}, {OLD_PERIOD, "100000\n"}}},
        {"none", NO_LIMIT, {{OLD_QUOTA, "-1\n"}, {OLD_PERIOD, "100000\n"}}},
        {"without a period", NO_LIMIT, {{OLD_QUOTA, "50000\n"}}},
        {"without a quota", NO_LIMIT, {{OLD_PERIOD, "100000\n"}}},
        {"of no time", NO_LIMIT, {{OLD_QUOTA, "50000\n"}, {OLD_PERIOD, "0\n"}}},
        {"empty", NO_LIMIT, {{OLD_QUOTA, ""}, {OLD_PERIOD, ""}}},
        {"with other groups",
         1,
         {{GROUP_FILE, "1:cpu:/\n"}, {OLD_QUOTA, "50000\n"}, {OLD_PERIOD, "100000\n"}}},
        {"less than the new kind",
         1,
         {{GROUP_FILE, "1:cpu:/\n0::/a\n"},
          {TOP "/a/cpu.max", "200000 100000\n"},
          {OLD_QUOTA, "50000\n"},
          {OLD_PERIOD, "100000\n"}}},
        {"more than the new kind",
         1,
         {{GROUP_FILE, "1:cpu:/\n0::/a\n"},
          {TOP "/a/cpu.max", "50000 100000\n"},
          {OLD_QUOTA, "200000\n"},
          {OLD_PERIOD, "100000\n"}}},
    };
    CHECK_GROUPS(groups);
}

/* Where the old kind's controllers of processors are mounted together, and groups below the root. */
TEST_ONCE(quota_of_the_old_kind_counts_wherever_it_is)
{
#define OLD(place, group, quota, period) \
    {TOP "/" place group "/cpu.cfs_quota_us", quota}, \
    { \
        TOP "/" place group "/cpu.cfs_period_us", period \
    }
    static const control_group groups[] = {
        {"cpu,cpuacct", 1, {OLD("cpu,cpuacct", "", "50000\n", "100000\n")}},
        {"cpuacct,cpu", 1, {OLD("cpuacct,cpu", "", "50000\n", "100000\n")}},
        {"cpuacct alone", NO_LIMIT, {OLD("cpuacct", "", "50000\n", "100000\n")}},
        {"this one's group",
         1,
         {{GROUP_FILE, "12:pids:/x\n5:cpu,cpuacct:/a/b\n1:name=systemd:/a\n"},
          OLD("cpu,cpuacct", "/a/b", "50000\n", "100000\n")}},
        {"the group above",
         1,
         {{GROUP_FILE, "5:cpuacct,cpu:/a/b\n"}, OLD("cpuacct,cpu", "/a", "50000\n", "100000\n")}},
        {"cpu alone", 1, {{GROUP_FILE, "5:cpu:/a\n"}, OLD("cpu", "/a", "50000\n", "100000\n")}},
        {"the last of three",
         1,
         {{GROUP_FILE, "5:memory,cpuacct,cpu:/a\n"}, OLD("cpu", "/a", "50000\n", "100000\n")}},
        {"a container's own as the root",
         1,
         {{GROUP_FILE, "5:cpu,cpuacct:/docker/1234\n"},
          OLD("cpu,cpuacct", "", "50000\n", "100000\n")}},
        {"both kinds",
         1,
         {{GROUP_FILE, "5:cpu,cpuacct:/a\n0::/b\n"},
          OLD("cpu,cpuacct", "/a", "50000\n", "100000\n"),
          {TOP "/b/cpu.max", "200000 100000\n"}}},
        {"both kinds, the other way round",
         1,
         {{GROUP_FILE, "0::/b\n5:cpu,cpuacct:/a"},
          OLD("cpu,cpuacct", "/a", "50000\n", "100000\n"),
          {TOP "/b/cpu.max", "200000 100000\n"}}},
        {"others' groups",
         NO_LIMIT,
         {{GROUP_FILE, "6:cpuset:/x\n5:cpu,cpuacct:/a\n4:cpuacct:/x\n3:name=cpu:/x\n"},
          OLD("cpu,cpuacct", "/x", "50000\n", "100000\n")}},
        {"no group",
         NO_LIMIT,
         {{GROUP_FILE, "5:cpu\n:cpu\ncpu:/a\n5::cpu:/a\n"},
          OLD("cpu", "/a", "50000\n", "100000\n")}},
    };
#undef OLD
    CHECK_GROUPS(groups);
}

/* As many and as long lines as a pod has. */
TEST_ONCE(quota_is_found_behind_long_names)
{
    static const char *const controllers[] = {"hugetlb", "pids", "blkio", "memory", "devices", "freezer",
                                              "perf_event", "cpuset", "net_cls,net_prio", "cpu,cpuacct"};
    static char text[8000], name[300], quota[400], period[400];
    control_group g = {"a pod", 1, {{GROUP_FILE, text}, {quota, "50000\n"}, {period, "100000\n"}}};
    size_t used = 0;
    snprintf(name, sizeof name, "/kubepods.slice/kubepods-burstable.slice/%0150d.slice/%064d.scope", 1, 2);
    for (int i = 0; i < 10; i++) {
        used += (size_t)snprintf(text + used, sizeof text - used, "%d:%s:%s\n", 12 - i, controllers[i], name);
    }
    CHECK(used > 2000 && used < sizeof text);
    snprintf(quota, sizeof quota, TOP "/cpu,cpuacct%s/cpu.cfs_quota_us", name);
    snprintf(period, sizeof period, TOP "/cpu,cpuacct%s/cpu.cfs_period_us", name);
    check_group(&g);
}

TEST_ONCE(malformed_quotas_are_no_limits)
{
    static const char *const quotas[] = {"",           "\n",          "junk\n",     "1",
                                         "1\n",        "1 ",          "1 \n",       " 1\n",
                                         " 1 100000",  "-1 100000\n", "1 0\n",      "1 max\n",
                                         "0 100000\n", "1 -1\n",      "x1 100000\n"};
    static const char *const lines[] = {"",         "\n",       "junk\n",    "0:\n",
                                        "0:x:/a\n", "10::/a\n", "1:cpu:/a\n"};
    for (size_t i = 0; i < COUNT(quotas); i++) {
        control_group g = {quotas[i], NO_LIMIT, {{GROUP_FILE, "0::/a\n"}, {TOP "/a/cpu.max", quotas[i]}}};
        check_group(&g);
    }
    for (size_t i = 0; i < COUNT(lines); i++) {
        control_group g = {lines[i], NO_LIMIT, {{GROUP_FILE, lines[i]}, {TOP "/a/cpu.max", "1 100000\n"}}};
        check_group(&g);
    }
}

/* 2 to the 32nd processors, which the kernel takes. */
TEST_ONCE(huge_quotas_are_no_limits)
{
    static const control_group groups[] = {
        {"2 to the 32nd",
         NO_LIMIT,
         {{GROUP_FILE, "0::/a\n"}, {TOP "/a/cpu.max", "4294967296000 1000\n"}}},
        {"2 to the 32nd, old", NO_LIMIT, {{OLD_QUOTA, "4294967296000\n"}, {OLD_PERIOD, "1000\n"}}},
        {"more digits than a number has",
         NO_LIMIT,
         {{GROUP_FILE, "0::/a\n"},
          {TOP "/a/cpu.max", "99999999999999999999999999999999999999999 1000\n"}}},
    };
    CHECK_GROUPS(groups);
}

/* Longer than the buffers: the levels that fit count, and nothing is written behind them. */
TEST_ONCE(long_names_of_groups_do_no_harm)
{
    static char line[3000];
    control_group g = {"a long name", 1, {{GROUP_FILE, line}, {TOP "/a/cpu.max", "50000 100000\n"}}};
    memset(line, 'x', sizeof line - 1);
    memcpy(line, "0::/a/", 6);
    check_group(&g);
    for (size_t i = 7; i < sizeof line - 1; i += 2) {
        line[i] = '/';
    }
    check_group(&g);
}

#ifdef __linux__
TEST_ONCE(affinity_counts)
{
    control_group none = {"one processor", NO_LIMIT, {{NULL, NULL}}},
          two = {"two of one", 2, {{GROUP_FILE, "0::/a\n"}, {TOP "/a/cpu.max", "200000 100000\n"}}};
    cpu_set_t set;
    CHECK(sched_getaffinity(0, sizeof set, &set) == 0);
    check_group(&none);
    CHECK(tsrv_cpu_count() <= CPU_COUNT(&set)); /* the system's own files */
    t_use_one_processor();
    CHECK_INT(tsrv_cpu_count(), 1);
    check_group(&none);
    check_group(&two);
}

/* Without an answer about the affinity, those that are there. */
TEST_ONCE(processors_that_are_online_count)
{
    const char *directory = t_make_directory();
    t_root = directory;
    t_fail_call("sched_getaffinity", 0, 1, true);
    CHECK_INT(tsrv_cpu_count(), sysconf(_SC_NPROCESSORS_ONLN));
    CHECK_INT(t_fault_hits, 1);
    remove_directory(directory);
}

static void fail_to_count(const char *name)
{
    if (strcmp(name, "sched_getaffinity") == 0 || strcmp(name, "sysconf") == 0) {
        t_fail_call(name, 0, 1, true);
    }
}

/* Nobody says how many there are: one. */
TEST_ONCE(processors_that_nobody_can_count_are_one)
{
    const char *directory = t_make_directory();
    t_root = directory;
    t_seen = fail_to_count;
    CHECK_INT(tsrv_cpu_count(), 1);
    CHECK_INT(t_fault_hits, 1);
    t_seen = NULL;
    remove_directory(directory);
}
#endif

/* ---- systemd itself -----------------------------------------------------------------------*/

#define ACTIVATE "/usr/bin/systemd-socket-activate"

typedef struct activation {
    pid_t pid;
    int port;
    int output, errors; /* where its stdout and stderr come out */
} activation;

static int end_of(activation *a)
{
    int status = 0;
    CHECK_INT(waitpid(a->pid, &status, 0), a->pid);
    t_close(a->output);
    t_close(a->errors);
    return status;
}

/* Returns whether the port could be had. */
static bool try_to_activate(activation *a, const char *program)
{
    char port[16], line[4096];
    int output[2], errors[2];
    a->port = t_free_port();
    snprintf(port, sizeof port, "%d", a->port);
    CHECK(pipe(output) == 0 && pipe(errors) == 0);
    a->pid = fork();
    CHECK(a->pid >= 0);
    if (a->pid == 0) {
        dup2(output[1], 1);
        dup2(errors[1], 2);
        for (int fd = 3; fd < T_MAX_FD; fd++) {
            close(fd);
        }
        execl(ACTIVATE, ACTIVATE, "-l", port, program, port, (char *)NULL);
        _exit(126);
    }
    t_close(output[1]);
    t_close(errors[1]);
    a->output = output[0];
    a->errors = errors[0];
    while (t_read_line(a->errors, line, sizeof line)) {
        if (strncmp(line, "Listening on ", 13) == 0) {
            return true;
        }
    }
    end_of(a);
    return false;
}

/* Why the program says nothing. */
static void explain(activation *a)
{
    char line[4096], last[4096] = "";
    while (t_read_line(a->errors, line, sizeof line)) {
        memcpy(last, line, sizeof last);
    }
    int status = end_of(a);
    if (strstr(last, "Failed to exec") != NULL) {
        SKIP("a kernel that runs the built examples (binfmt_misc)");
    }
    T_FAIL("the program ended with status %#x after \"%s\"", (unsigned)status, last);
}

TEST_ONCE(systemd_starts_an_example_for_its_first_client)
{
    const char *directory = getenv("EXAMPLES");
    char program[4096], line[4096], expected[64];
    activation a = {0, 0, -1, -1};
    int attempts = 0;
    snprintf(program, sizeof program, "%s/echo", directory != NULL ? directory : "build/cc-c99");
    if (access(ACTIVATE, X_OK) != 0) {
        SKIP("systemd-socket-activate");
    }
    if (access(program, X_OK) != 0) {
        SKIP("the built examples (make examples, and EXAMPLES=directory)");
    }
    while (!try_to_activate(&a, program)) {
        CHECK(++attempts < ATTEMPTS);
    }
    int client = t_connect(a.port);
    t_sends(client, "first\n");
    if (!t_read_line(a.output, line, sizeof line)) {
        explain(&a);
    }
    snprintf(expected, sizeof expected, "echo: listening on port %d", a.port);
    CHECK_STR(line, expected);
    t_expect(client, "first\n");
    check_answered(a.port);
    CHECK(kill(a.pid, SIGTERM) == 0);
    t_leave(client);
    CHECK(!t_read_line(a.output, line, sizeof line));
    int status = end_of(&a);
    CHECK(WIFSIGNALED(status));
    CHECK_INT(WTERMSIG(status), SIGTERM);
}

/* ---- whose files come with sockets that are handed over --------------------------------------*/

TEST_ONCE(list_of_files_that_is_malformed_is_read_as_far_as_it_makes_sense)
{
    bool *file = tsrvi_process.handed.file;
    tsrvi_handed_read_files(NULL);
    tsrvi_handed_read_files("");
    tsrvi_handed_read_files("3,12,");
    CHECK(file[0] && file[9]);
    tsrvi_handed_read_files("2,:14x1,-5,");
    CHECK(file[11] && file[2]);
    for (int i = 0; i < TSRVI_HANDED_MAX; i++) {
        CHECK_INT(file[i], i == 0 || i == 2 || i == 9 || i == 11);
    }
    tsrvi_handed_read_files("99999999999999999999,4,");
    CHECK(!file[1]);
}

/* The last one that there is room for, and the next, in whose place something else lies. */
TEST_ONCE(list_of_files_ends_with_what_can_be_handed_over)
{
    char text[32];
    snprintf(text, sizeof text, "%d,", TSRVI_LISTEN_FIRST + TSRVI_HANDED_MAX);
    tsrvi_handed_read_files(text);
    CHECK(!tsrvi_process.handed.upgrade);
    snprintf(text, sizeof text, "%d,", TSRVI_LISTEN_FIRST + TSRVI_HANDED_MAX - 1);
    tsrvi_handed_read_files(text);
    CHECK(tsrvi_process.handed.file[TSRVI_HANDED_MAX - 1]);
    CHECK(!tsrvi_process.handed.upgrade);
}

/* ---- the program before this one, and what does not answer ----------------------------------*/

/* As an upgrade starts a program: the other end of a pipe, whose reader waits. */
static int open_predecessor(void)
{
    int ends[2], away;
    CHECK(pipe(ends) == 0);
    away = fcntl(ends[0], F_DUPFD, AWAY);
    CHECK(away >= AWAY && fcntl(ends[1], F_DUPFD, AWAY) == away + 1);
    t_close(ends[0]);
    t_close(ends[1]);
    CHECK(fcntl(away, F_SETFL, O_NONBLOCK) == 0);
    set_number("TSRV_READY_FD", away + 1);
    return away;
}

/* What is said to be its pipe is closed, or of no use. */
static void no_predecessor(void *context)
{
    const char *fails = (const char *)context;
    int end = open_predecessor(), fds[CAPACITY];
    char byte;
    if (fails != NULL) {
        t_fail_call(fails, EBADF, 1, true);
    } else {
        t_close(end + 1);
    }
    CHECK_INT(tsrv_listen_fds(fds, CAPACITY), 0);
    t_fault_at = 0;
    CHECK_INT(tsrv_notify("READY=1"), 0);
    CHECK_INT(read(end, &byte, 1), fails == NULL ? 0 : -1);
    CHECK(getenv("TSRV_READY_FD") == NULL);
    if (fails != NULL) {
        t_close(end + 1);
    }
    t_close(end);
}

TEST_ONCE(predecessor_that_cannot_be_told_is_none)
{
    static char calls[][8] = {"fstat", "fcntl"};
    apart(no_predecessor, NULL);
    apart(no_predecessor, calls[0]);
    apart(no_predecessor, calls[1]);
}

/* A socket that has the number of its pipe by now is the program's. */
static void socket_in_its_place(void *context)
{
    int end = open_predecessor(), other = listen_at("127.0.0.1", 0), fds[CAPACITY];
    (void)context;
    CHECK(dup2(other, end + 1) == end + 1);
    CHECK_INT(tsrv_listen_fds(fds, CAPACITY), 0);
    CHECK(!tsrvi_handed_waits());
    CHECK_INT(tsrvi_handed_take_ready(), -1);
    t_close(other);
    t_close(end);
    t_close(end + 1);
}

TEST_ONCE(predecessor_whose_pipe_is_no_pipe_is_none)
{
    apart(socket_in_its_place, NULL);
}

/* Full or empty, its pipe tells that it waits; so does one that cannot be asked. */
static void predecessor_waits(void *context)
{
    static char zeros[4096];
    const char *path = (const char *)context;
    int end = open_predecessor(), fds[CAPACITY], fd;
    CHECK(!tsrvi_handed_waits()); /* nobody has looked */
    CHECK_INT(tsrv_listen_fds(fds, CAPACITY), 0);
    CHECK(tsrvi_handed_waits());
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), TSRV_OK);
    tsrvi_bound_close(fd);
    CHECK(access(path, F_OK) == 0); /* it may be the one before it that serves there */
    t_fail_call("poll", EINTR, 1, false);
    CHECK(tsrvi_handed_waits());
    t_fault_at = 0;
    while (write(end + 1, zeros, sizeof zeros) > 0) {
    }
    CHECK(tsrvi_handed_waits());
    t_close(end);
    CHECK(!tsrvi_handed_waits());
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), TSRV_OK);
    tsrvi_bound_close(fd);
    CHECK(access(path, F_OK) != 0);
    CHECK_INT(tsrvi_handed_take_ready(), end + 1);
    t_close(end + 1);
}

TEST_ONCE(predecessor_that_waits_keeps_the_files)
{
    const char *directory = t_make_directory();
    apart(predecessor_waits, unix_address(directory, "socket") + 5);
    remove_directory(directory);
}

static int early_pipe, early_client;
static ssize_t early_told;

/* Behind the first turn of the loop: is the program before this one told already? */
static void look_early(void *context)
{
    char byte;
    (void)context;
    early_told = read(early_pipe, &byte, 1);
    t_close(early_client);
    CHECK(kill(getpid(), SIGTERM) == 0);
}

static void start_slowly(tsrv_server *server, void *context)
{
    static tsrv_timer timer;
    (void)server, (void)context;
    poll(NULL, 0, 2);
    CHECK_INT(tsrv_timer_start(NULL, &timer, 0, look_early, NULL), TSRV_OK);
}

/* A connection waits for the program, so that on_start comes before the timers of the first turn. */
static void serve_in_time(void *context)
{
    int fds[CAPACITY] = {listen_at("127.0.0.1", 0)}, port = port_of(fds[0]);
    tsrv_server_options options = {0};
    (void)context;
    early_pipe = open_predecessor();
    hand_over(fds, 1);
    early_client = t_connect(port);
    options.handle_stream = echo_lines;
    options.on_start = start_slowly;
    tsrv_set_log(t_no_log, NULL);
    CHECK_INT(tsrv_serve(port, "127.0.0.1", 1, &options), TSRV_OK);
    CHECK_INT(early_told, -1);
    CHECK_INT(tsrvi_handed_take_ready(), early_pipe + 1);
    t_close(early_pipe + 1);
    t_close(early_pipe);
}

TEST_ONCE(predecessor_is_told_when_a_single_process_has_served_for_a_second)
{
    apart(serve_in_time, NULL);
}

/* A socket that does not tell its address is not the one that is asked for, and yet it is there. */
static void take_nameless(void *context)
{
    int fds[CAPACITY] = {listen_at("127.0.0.1", 0)}, port = port_of(fds[0]), got;
    (void)context;
    hand_over(fds, 1);
    t_fail_call("getsockname", EBADF, 1, false);
    CHECK_INT(tsrv_bind_sockets(port, "127.0.0.1", NULL, &got, 1), -EADDRINUSE);
    CHECK_INT(t_fault_hits, 1);
    t_fault_at = 0;
    CHECK_INT(tsrv_bind_sockets(port, "127.0.0.1", NULL, &got, 1), 1);
    CHECK_INT(got, FIRST);
    t_close(got);
}

static void leave_nameless(void *context)
{
    int end = open_predecessor(), fds[CAPACITY] = {listen_at("127.0.0.1", 0)};
    (void)context;
    tsrv_set_log(keep_log, NULL);
    hand_over(fds, 1);
    t_fail_call("getsockname", EBADF, 1, true);
    tsrvi_handed_close_rest();
    t_fault_at = 0;
    CHECK_INT(logged("upgrade: nothing listens on  any more"), 1);
    CHECK(!t_is_open(FIRST));
    CHECK_INT(tsrv_listen_fds(fds, CAPACITY), 0);
    t_close(end);
    t_close(end + 1);
}

TEST_ONCE(socket_that_does_not_tell_its_address)
{
    apart(take_nameless, NULL);
    apart(leave_nameless, NULL);
}

/* Which socket takes IPv4's connections too: of three the first is for one address, the second is it. */
static void cover(void *context)
{
    int port = port_of_neither(), got[CAPACITY];
    int fds[CAPACITY] = {bind_at(make_endpoint("::1", port), SOCK_STREAM, 0), listen_dual(0),
                         listen_at("127.0.0.1", 0)};
    CHECK(listen(fds[0], 16) == 0);
    in_port_t one = htons((uint16_t)port), dual = htons((uint16_t)port_of(fds[1]));
    (void)context;
    hand_over(fds, 3);
    CHECK(!tsrvi_handed_covers(one));
    CHECK(tsrvi_handed_covers(dual));
    t_fail_call("getsockname", EBADF, 1, true);
    CHECK(!tsrvi_handed_covers(dual));
    t_fail_call("getsockopt", EBADF, 1, true);
    CHECK(!tsrvi_handed_covers(dual));
    t_fault_at = 0;
    CHECK_INT(tsrv_listen_fds(got, CAPACITY), 3);
    CHECK(!tsrvi_handed_covers(dual)); /* it is taken */
    t_close_all(got, 3);
}

TEST_ONCE(socket_for_both_families_is_told_from_others)
{
    if (!t_has_ipv6()) {
        SKIP("IPv6 loopback");
    }
    apart(cover, NULL);
}

/* A TCP socket whose address would be the path of a file, if it were a unix socket's: and there is that file. */
static int listen_like_a_path(int *file)
{
    struct sockaddr_storage name;
    socklen_t size = sizeof name;
    char path[16] = "";
    int fd = listen_at("127.0.0.1", 0);
    CHECK(getsockname(fd, (struct sockaddr *)&name, &size) == 0);
    memcpy(path, (char *)&name + offsetof(struct sockaddr_un, sun_path), 4); /* its port, then 127.0 */
    if (strchr(path, '/') != NULL || path[0] == 0) {
        int other = listen_like_a_path(file); /* on another port */
        t_close(fd);
        return other;
    }
    struct sockaddr_un local = t_unix_address(path);
    *file = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(bind(*file, (struct sockaddr *)&local, sizeof local) == 0);
    return fd;
}

/* A file goes with a unix socket alone, and with one that tells its path. */
static void files_of_some(void *context)
{
    const char *directory = (const char *)context;
    CHECK(chdir(directory) == 0);
    int end = open_predecessor(), got[CAPACITY], file;
    int fds[CAPACITY] = {listen_like_a_path(&file), listen_at(unix_address(directory, "one"), 0),
                         listen_at(unix_address(directory, "other"), 0)};
    char name[TSRVI_FD_NAME_SIZE];
    t_close(file);
    set_text("TSRV_FILE_FDS", "3,4,5,");
    set_text("LISTEN_FDNAMES", "http:one:other:more");
    hand_over(fds, 3);
    t_fail_call("getsockname", EBADF, 2, false);
    CHECK_INT(tsrv_listen_fds(got, CAPACITY), 3);
    CHECK_INT(t_fault_hits, 1);
    t_fault_at = 0;
    CHECK(!tsrvi_bound_has_file(FIRST));
    CHECK(!tsrvi_bound_has_file(FIRST + 1));
    CHECK(tsrvi_bound_has_file(FIRST + 2));
    CHECK_STR(tsrvi_handed_name(FIRST + 2, name, sizeof name), "other");
    CHECK_STR(tsrvi_handed_name(FIRST + 3, name, sizeof name), "");
    CHECK_STR(tsrvi_handed_name(FIRST - 1, name, sizeof name), "");
    t_close_all(got, 3);
    t_close(end);
    t_close(end + 1);
}

TEST_ONCE(files_go_with_unix_sockets_that_tell_their_path)
{
    char *directory = realpath(t_make_directory(), NULL); /* the test goes there */
    CHECK(directory != NULL);
    apart(files_of_some, directory);
    remove_directory(directory);
    free(directory);
}

/* ---- what else does not answer ---------------------------------------------------------------*/

TEST_ONCE(file_that_cannot_be_read_says_nothing)
{
    char text[8] = "abc";
    t_fail_call("read", EIO, 1, false);
    CHECK_INT(tsrvi_file_read("/dev/null", text, sizeof text), -1);
    CHECK_INT(t_fault_hits, 1);
    t_fault_at = 0;
    CHECK_STR(text, "");
    CHECK_INT(tsrvi_file_read("/none/there", text, sizeof text), -1);
    CHECK_INT(tsrvi_file_read("/dev/null", text, sizeof text), 0);
}

TEST_ONCE(controllers_are_known_by_their_whole_name)
{
    CHECK(tsrvi_cgroup_old_group("3:abc:/x") == NULL);
    CHECK(tsrvi_cgroup_old_group("3:cpuset,cpuacct:/x") == NULL);
    CHECK_STR(tsrvi_cgroup_old_group("3:abc,cpu:/x"), "/x");
    CHECK_STR(tsrvi_cgroup_old_group("3:cpu,abc:/cpu"), "/cpu");
}

static int low_writes;

static void count_writes(const char *name)
{
    low_writes += strcmp(name, "write") == 0;
}

/* While nobody supervises, its signals are noted and go nowhere: descriptors 0 to 2 are not ours. */
TEST_ONCE(signal_without_a_supervisor_is_written_nowhere)
{
    int got = 0;
    t_seen = count_writes;
    for (int fd = -1; fd <= 2; fd++) {
        tsrvi_process.supervised_wake = fd;
        tsrvi_supervised_handler(SIGTERM);
    }
    t_seen = NULL;
    tsrvi_process.supervised_wake = 0;
    CHECK_INT(low_writes, 0);
    for (int i = 0; i < TSRVI_SUPERVISED; i++) {
        got += tsrvi_process.supervised_got[i];
        tsrvi_process.supervised_got[i] = 0;
    }
    CHECK_INT(got, 1);
}
