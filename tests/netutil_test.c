/* Making listening sockets, and addresses. Its core is what Tornado's netutil_test.py checks. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "seam.h"

#include <netdb.h>
#include <sys/socket.h>
#include <sys/stat.h>

/* Sockets of each family fail by a name of their own. */
#undef t_sys_socket
#define t_sys_socket(family, type, protocol) \
    (t_fault(socket_name(family)) ? -1 : socket(family, type, protocol))

/* At the elsewhere_at-th look at a file it is on another device: a mount has come over it. */
static int elsewhere_at, looks;

static int look(int rc, struct stat *info)
{
    info->st_dev += ++looks == elsewhere_at;
    return rc;
}

#undef t_sys_lstat
#undef t_sys_fstat
#define t_sys_lstat(path, info) (t_fault("lstat") ? -1 : look(lstat(path, info), info))
#define t_sys_fstat(fd, info) (t_fault("fstat") ? -1 : look(fstat(fd, info), info))

/* What a name's addresses are, or why there are none; else the system says. */
static struct addrinfo *known;
static int resolver_says;

static int resolve_known(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **all)
{
    if (resolver_says != 0) {
        errno = EMFILE;
        return resolver_says;
    }
    *all = known;
    return known != NULL ? 0 : getaddrinfo(t_host(host), service, hints, all);
}

#undef t_sys_getaddrinfo
#undef t_sys_freeaddrinfo
#define t_sys_getaddrinfo(...) (t_fault("getaddrinfo") ? EAI_MEMORY : resolve_known(__VA_ARGS__))
#define t_sys_freeaddrinfo(all) ((all) == known ? (void)0 : freeaddrinfo(all))

static const char *socket_name(int family)
{
    return family == AF_INET ? "socket4" : family == AF_INET6 ? "socket6" : "socket";
}

#include "test.h"

#include <arpa/inet.h>
#include <limits.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/un.h>

enum { CAPACITY = 16 };

/* The address of a socket, as the library keeps it. */
static tsrv_address name_of(int fd)
{
    struct sockaddr_storage storage;
    socklen_t size = sizeof storage;
    tsrv_address address;
    memset(&address, 0, sizeof address);
    CHECK(getsockname(fd, (struct sockaddr *)&storage, &size) == 0);
    CHECK(size <= sizeof address.storage);
    memcpy(address.storage, &storage, size);
    address.size = size;
    return address;
}

static int port_of(int fd)
{
    tsrv_address address = name_of(fd);
    return tsrv_address_port(&address);
}

static int family_of(int fd)
{
    tsrv_address address = name_of(fd);
    return tsrv_address_family(&address);
}

/* ---- TCP ----------------------------------------------------------------------------------*/

/* Tornado's TestPortAllocation.test_same_port_allocation. */
TEST_ONCE(test_same_port_allocation)
{
    static const char *const addresses[] = {"localhost", NULL, ""};
    for (int i = 0; i < 3; i++) {
        int fds[CAPACITY], count = tsrv_bind_sockets(0, addresses[i], NULL, fds, CAPACITY);
        CHECK(count >= 1);
        CHECK(port_of(fds[0]) > 0);
        for (int k = 1; k < count; k++) {
            CHECK_INT(port_of(fds[k]), port_of(fds[0]));
        }
        t_close_all(fds, count);
    }
}

/* Tornado's TestPortAllocation.test_reuse_port. Every binder has to ask for it. */
TEST_ONCE(test_reuse_port)
{
    tsrv_bind_options reuse = {0};
    int first, second, third;
    reuse.reuse_port = true;
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", &reuse, &first, 1), 1);
    CHECK_INT(tsrv_bind_sockets(port_of(first), "127.0.0.1", &reuse, &second, 1), 1);
    CHECK_INT(port_of(second), port_of(first));
    CHECK_INT(tsrv_bind_sockets(port_of(first), "127.0.0.1", NULL, &third, 1), -EADDRINUSE);
    t_close(second);
    t_close(first);
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, &first, 1), 1);
    CHECK_INT(tsrv_bind_sockets(port_of(first), "127.0.0.1", &reuse, &second, 1), -EADDRINUSE);
    CHECK_INT(tsrv_bind_sockets(port_of(first), "127.0.0.1", NULL, &second, 1), -EADDRINUSE);
    t_close(first);
}

/* A connection that the server has closed first is remembered by the kernel for a minute. */
TEST_ONCE(port_can_be_bound_again_at_once)
{
    int listener, again;
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, &listener, 1), 1);
    int port = port_of(listener), client = t_connect(port);
    int accepted = accept(listener, NULL, NULL);
    CHECK(accepted >= 0);
    t_close(accepted);
    t_leave(client);
    t_close(listener);
    CHECK_INT(tsrv_bind_sockets(port, "127.0.0.1", NULL, &again, 1), 1);
    t_close(again);
}

TEST_ONCE(families_come_in_order_and_can_be_chosen)
{
    static const struct {
        const char *address;
        int family;
        bool v4, v6;
    } rows[] = {
        {NULL, 0, true, true},          {"", 0, true, true},
        {NULL, AF_INET, true, false},   {NULL, AF_INET6, false, true},
        {"127.0.0.1", 0, true, false},  {"0.0.0.0", 0, true, false},
        {"::1", 0, false, true},        {"::", 0, false, true},
        {"localhost", AF_INET, true, false},
    };
    bool v6 = t_has_ipv6();
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        tsrv_bind_options options = {0};
        int fds[CAPACITY], at = 0;
        options.family = rows[i].family;
        if (!v6 && !rows[i].v4) {
            continue;
        }
        int count = tsrv_bind_sockets(0, rows[i].address, &options, fds, CAPACITY);
        CHECK_INT(count, (rows[i].v4 ? 1 : 0) + (rows[i].v6 && v6 ? 1 : 0));
        if (rows[i].v4) {
            CHECK_INT(family_of(fds[at++]), AF_INET);
        }
        if (at < count) {
            CHECK_INT(family_of(fds[at]), AF_INET6);
        }
        t_close_all(fds, count);
    }
}

TEST_ONCE(sockets_listen_and_are_set_up)
{
    int fds[CAPACITY], count = tsrv_bind_sockets(0, NULL, NULL, fds, CAPACITY);
    CHECK(count >= 1);
    for (int i = 0; i < count; i++) {
        CHECK((fcntl(fds[i], F_GETFL) & O_NONBLOCK) != 0);
        CHECK((fcntl(fds[i], F_GETFD) & FD_CLOEXEC) != 0);
        CHECK(t_socket_option(fds[i], SOL_SOCKET, SO_REUSEADDR) != 0);
        CHECK_INT(t_socket_option(fds[i], SOL_SOCKET, SO_TYPE), SOCK_STREAM);
#ifdef SO_ACCEPTCONN
        CHECK(t_socket_option(fds[i], SOL_SOCKET, SO_ACCEPTCONN) != 0);
#endif
        if (family_of(fds[i]) == AF_INET6) {
            CHECK(t_socket_option(fds[i], IPPROTO_IPV6, IPV6_V6ONLY) != 0);
        }
    }
    t_close(t_connect(port_of(fds[0])));
    t_close_all(fds, count);
}

/* The kernel's queue, told by how many may connect while nobody accepts. */
static int queue_length(int backlog)
{
    enum { MOST = 200 };
    static int clients[MOST];
    tsrv_bind_options options = {0};
    struct sockaddr_in to;
    socklen_t size = sizeof to;
    int listener, connected = 0, count = 0;
    options.backlog = backlog;
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", &options, &listener, 1), 1);
    CHECK(getsockname(listener, (struct sockaddr *)&to, &size) == 0);
    for (; count < MOST; count++) {
        clients[count] = socket(AF_INET, SOCK_STREAM, 0);
        CHECK(clients[count] >= 0);
        CHECK(fcntl(clients[count], F_SETFL, O_NONBLOCK) == 0);
        if (connect(clients[count], (struct sockaddr *)&to, sizeof to) != 0) {
            struct pollfd p = {clients[count], POLLOUT, 0};
            if (errno != EINPROGRESS || poll(&p, 1, 100) != 1 || (p.revents & POLLERR)) {
                count++;
                break;
            }
        }
        connected++;
    }
    t_close_all(clients, count);
    t_close(listener);
    return connected;
}

TEST_ONCE(backlog_is_handed_to_the_kernel)
{
    int small = queue_length(5), usual = queue_length(0);
    CHECK(small >= 5 && small <= 20); /* systems add a few */
    CHECK(usual >= 128);
}

TEST_ONCE(bad_arguments_leave_nothing_open)
{
    static const struct {
        int port, capacity, rc;
        const char *address;
    } rows[] = {
        {-1, CAPACITY, TSRV_EINVAL, NULL},
        {65536, CAPACITY, TSRV_EINVAL, NULL},
        {INT_MAX, CAPACITY, TSRV_EINVAL, "127.0.0.1"},
        {INT_MIN, CAPACITY, TSRV_EINVAL, "127.0.0.1"},
        {0, 0, TSRV_EINVAL, "127.0.0.1"},
        {0, -1, TSRV_EINVAL, "127.0.0.1"},
        {0, 0, TSRV_EINVAL, NULL},
        /* Names that no resolver is asked for. */
        {0, CAPACITY, TSRV_ERESOLVE, "two..dots"},
        {0, CAPACITY, TSRV_ERESOLVE, "a-label-of-more-than-sixty-three-characters-is-longer-than-"
                                     "the-domain-name-system-allows"},
        {0, CAPACITY, -EADDRNOTAVAIL, "192.0.2.1"},
    };
    int before = t_open_fds();
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        int fds[CAPACITY];
        CHECK_INT(tsrv_bind_sockets(rows[i].port, rows[i].address, NULL, fds, rows[i].capacity),
                  rows[i].rc);
        CHECK_INT(t_open_fds(), before);
    }
}

TEST_ONCE(too_small_a_capacity_leaves_nothing_open)
{
    int before = t_open_fds(), fd = -1;
    if (!t_has_ipv6()) {
        SKIP("IPv6 loopback");
    }
    CHECK_INT(tsrv_bind_sockets(0, NULL, NULL, &fd, 1), TSRV_EINVAL);
    CHECK_INT(t_open_fds(), before);
}

/* The second of two sockets fails: the first must not stay behind. */
TEST_ONCE(partial_failure_leaves_nothing_open)
{
    tsrv_bind_options v6_only = {0};
    int taken, fds[CAPACITY];
    v6_only.family = AF_INET6;
    if (!t_has_ipv6()) {
        SKIP("IPv6 loopback");
    }
    CHECK_INT(tsrv_bind_sockets(0, NULL, &v6_only, &taken, 1), 1);
    int before = t_open_fds();
    CHECK_INT(tsrv_bind_sockets(port_of(taken), NULL, NULL, fds, CAPACITY), -EADDRINUSE);
    CHECK_INT(t_open_fds(), before);
    t_close(taken);
}

/* Tornado #1860: the port that the kernel chose for IPv4 may be taken for IPv6. With hundreds of
 * them taken that is bound to happen here; another port has to be tried. */
TEST_ONCE(chosen_port_that_is_taken_in_the_other_family_is_not_the_end)
{
    enum { TAKEN = 800, TRIES = 300 };
    static int taken[TAKEN];
    tsrv_bind_options v6_only = {0};
    struct rlimit limit;
    int count = 0;
    v6_only.family = AF_INET6;
    if (!t_has_ipv6()) {
        SKIP("IPv6 loopback");
    }
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    while (count < TAKEN && (rlim_t)count + 50 < limit.rlim_cur) {
        CHECK_INT(tsrv_bind_sockets(0, NULL, &v6_only, &taken[count], 1), 1);
        count++;
    }
    for (int i = 0; i < TRIES; i++) {
        int fds[CAPACITY];
        CHECK_INT(tsrv_bind_sockets(0, NULL, NULL, fds, CAPACITY), 2);
        CHECK_INT(port_of(fds[1]), port_of(fds[0]));
        t_close_all(fds, 2);
    }
    t_close_all(taken, count);
}

/* ---- what a policy denies, or a kernel does not have --------------------------------------*/

/* From now on calls of this name fail. */
static void deny(const char *name, int code, bool sticky)
{
    t_fail_call(name, code, 1, sticky);
    tsrvi_process.without = 0; /* as in a new process */
    t_watch_info();
}

static void allow(void)
{
    t_fault_at = 0;
}

/* One family is refused: the other one is bound, and that is said once. */
TEST_ONCE(refused_family_does_not_cost_the_other)
{
    static const int codes[] = {EPERM, EACCES, ENOSYS, EAFNOSUPPORT, EPROTONOSUPPORT};
    static const struct {
        const char *name;
        int left; /* the family that is bound */
    } rows[] = {{"socket6", AF_INET}, {"socket4", AF_INET6}};
    if (!t_has_ipv6()) {
        SKIP("IPv6 loopback");
    }
    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        for (int row = 0; row < 2; row++) {
            static const char *const addresses[] = {NULL, ""};
            int before = t_open_fds();
            deny(rows[row].name, codes[i], true);
            for (int round = 0; round < 2; round++) {
                int fds[CAPACITY];
                CHECK_INT(tsrv_bind_sockets(0, addresses[round], NULL, fds, CAPACITY), 1);
                CHECK_INT(family_of(fds[0]), rows[row].left);
                t_close_all(fds, 1);
            }
            CHECK(t_fault_hits >= 2);
            CHECK_INT(t_log_lines, codes[i] == EPERM || codes[i] == EACCES || codes[i] == ENOSYS);
            /* Asked for alone, it is an error. */
            int fd = -1;
            CHECK_INT(tsrv_bind_sockets(0, row == 0 ? "::1" : "127.0.0.1", NULL, &fd, 1), -codes[i]);
            allow();
            CHECK_INT(t_open_fds(), before);
        }
    }
}

/* Both are refused: that is an error, and bind's own. */
TEST_ONCE(refused_bind_is_an_error)
{
    static const int codes[] = {EPERM, EACCES};
    for (int i = 0; i < 2; i++) {
        int fds[CAPACITY], before = t_open_fds();
        deny("bind", codes[i], true);
        CHECK_INT(tsrv_bind_sockets(0, NULL, NULL, fds, CAPACITY), -codes[i]);
        allow();
        CHECK_INT(t_log_lines, 0);
        CHECK_INT(t_open_fds(), before);
    }
}

static int binds;

/* Every second socket finds its port in use. */
static void refuse_second(const char *name)
{
    if (strcmp(name, "bind") == 0) {
        t_fail_call("bind", EADDRINUSE, ++binds % 2 == 0 ? 1 : 0, false);
    }
}

/* A port that the kernel chose is given up as often as it takes, but not for ever. */
TEST_ONCE(port_that_suits_both_families_is_not_looked_for_for_ever)
{
    int fds[CAPACITY], before = t_open_fds();
    if (!t_has_ipv6()) {
        SKIP("IPv6 loopback");
    }
    t_seen = refuse_second;
    CHECK_INT(tsrv_bind_sockets(0, NULL, NULL, fds, CAPACITY), -EADDRINUSE);
    t_seen = NULL;
    allow();
    CHECK_INT(binds, 2 * 16);
    CHECK_INT(t_open_fds(), before);
}

/* IPv6 without addresses, as where it is switched off, costs only who asks for an address of it. */
TEST_ONCE(family_without_addresses_does_not_cost_the_other)
{
    tsrv_bind_options v6_only = {0};
    int fds[CAPACITY], before = t_open_fds();
    v6_only.family = AF_INET6;
    if (!t_has_ipv6()) {
        SKIP("IPv6 loopback");
    }
    t_fail_call("bind", EADDRNOTAVAIL, 2, false);
    CHECK_INT(tsrv_bind_sockets(0, NULL, NULL, fds, CAPACITY), 1);
    CHECK_INT(t_fault_hits, 1);
    CHECK_INT(family_of(fds[0]), AF_INET);
    t_close_all(fds, 1);
    t_fail_call("bind", EADDRNOTAVAIL, 1, false);
    CHECK_INT(tsrv_bind_sockets(0, "::1", NULL, fds, CAPACITY), -EADDRNOTAVAIL);
    t_fail_call("bind", EADDRNOTAVAIL, 1, false);
    CHECK_INT(tsrv_bind_sockets(0, NULL, &v6_only, fds, CAPACITY), -EADDRNOTAVAIL);
    allow();
    CHECK_INT(t_open_fds(), before);
}

/* A result of getaddrinfo; scope counts for IPv6. */
static struct addrinfo *one_known(struct addrinfo *next, const char *number, unsigned scope)
{
    static struct sockaddr_in v4[4];
    static struct sockaddr_in6 v6[4];
    static struct addrinfo entries[6];
    static int used, used_v4, used_v6;
    struct addrinfo *entry = &entries[used++];
    memset(entry, 0, sizeof *entry);
    if (inet_pton(AF_INET, number, &v4[used_v4].sin_addr) == 1) {
        v4[used_v4].sin_family = AF_INET;
        entry->ai_addr = (struct sockaddr *)&v4[used_v4++];
        entry->ai_addrlen = sizeof v4[0];
    } else {
        struct sockaddr_in6 *name = &v6[used_v6++];
        memset(name, 0, sizeof *name);
        CHECK(inet_pton(AF_INET6, number, &name->sin6_addr) == 1);
        name->sin6_family = AF_INET6;
        name->sin6_scope_id = scope;
        entry->ai_addr = (struct sockaddr *)name;
        entry->ai_addrlen = sizeof *name;
    }
    entry->ai_family = entry->ai_addr->sa_family;
    entry->ai_next = next;
    return entry;
}

/* As macOS has it: "localhost" is an address of a link, too. What comes twice is bound once. */
TEST_ONCE(results_that_come_twice_or_belong_to_a_link_are_passed_over)
{
    struct addrinfo *v6 = one_known(one_known(one_known(NULL, "::1", 0), "::1", 1), "::1", 0);
    int fds[CAPACITY];
    if (!t_has_ipv6()) {
        SKIP("IPv6 loopback");
    }
    known = one_known(one_known(v6, "127.0.0.1", 0), "127.0.0.1", 0);
    CHECK_INT(tsrv_bind_sockets(0, "localhost", NULL, fds, CAPACITY), 2);
    CHECK_INT(family_of(fds[0]), AF_INET);
    CHECK_INT(family_of(fds[1]), AF_INET6);
    t_close_all(fds, 2);
    /* Of a name that was asked for no address may be missing. */
    t_fail_call("bind", EADDRNOTAVAIL, 2, false);
    CHECK_INT(tsrv_bind_sockets(0, "both", NULL, fds, CAPACITY), -EADDRNOTAVAIL);
    allow();
    known = NULL;
}

#ifdef __linux__
/* Two of one family, and one of them twice. */
TEST_ONCE(results_of_one_family_are_bound_each)
{
    int fds[CAPACITY];
    known = one_known(one_known(one_known(NULL, "127.0.0.1", 0), "127.0.0.2", 0), "127.0.0.1", 0);
    CHECK_INT(tsrv_bind_sockets(0, "both", NULL, fds, CAPACITY), 2);
    t_close_all(fds, 2);
    known = NULL;
}
#endif

TEST_ONCE(resolvers_failure_of_the_system_is_told_as_it_is)
{
    int fd;
    resolver_says = EAI_SYSTEM;
    CHECK_INT(tsrv_bind_sockets(0, "localhost", NULL, &fd, 1), -EMFILE);
    resolver_says = EAI_MEMORY;
    CHECK_INT(tsrv_bind_sockets(0, "localhost", NULL, &fd, 1), -ENOMEM);
    resolver_says = EAI_FAIL;
    CHECK_INT(tsrv_bind_sockets(0, "localhost", NULL, &fd, 1), TSRV_ERESOLVE);
    resolver_says = 0;
}

#if TSRVI_HAS_ACCEPT4
static void fail_the_flags(const char *name)
{
    if (strcmp(name, "fcntl") == 0) {
        t_fail_call("fcntl", EBADF, 1, false);
    }
}

/* The flags are refused, so that fcntl has to set them, and that fails too. */
TEST_ONCE(socket_that_cannot_be_set_up_is_closed)
{
    int before = t_open_fds(), fd;
    t_seen = fail_the_flags;
    deny("socket4", EINVAL, false);
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, &fd, 1), -EBADF);
    deny("socket", EINVAL, false);
    CHECK_INT(tsrv_bind_unix_socket("@nobody.is.here", NULL, &fd), -EBADF);
    t_seen = NULL;
    CHECK_INT(t_log_lines, 0);
    CHECK_INT(t_open_fds(), before);
}
#endif

/* ---- unix sockets -------------------------------------------------------------------------*/

static const char *path_in(const char *directory, const char *name)
{
    static char paths[4][100];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", directory, name);
    return path;
}

/* 0, or what connect failed with. */
static int try_to_connect(const char *path)
{
    struct sockaddr_un name = t_unix_address(path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(fd >= 0);
    int error = connect(fd, (struct sockaddr *)&name, sizeof name) == 0 ? 0 : errno;
    t_close(fd);
    return error;
}

/* A socket file that nobody listens on any more. */
static void make_stale(const char *path)
{
    struct sockaddr_un name = t_unix_address(path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(fd >= 0);
    CHECK(bind(fd, (struct sockaddr *)&name, sizeof name) == 0);
    CHECK(listen(fd, 1) == 0);
    t_close(fd);
    CHECK_INT(try_to_connect(path), ECONNREFUSED);
}

static void make_file(const char *path, const char *text)
{
    FILE *file = fopen(path, "w");
    CHECK(file != NULL);
    CHECK(fputs(text, file) >= 0);
    CHECK(fclose(file) == 0);
}

static void check_file(const char *path, const char *expected)
{
    char text[100];
    FILE *file = fopen(path, "r");
    CHECK(file != NULL);
    size_t size = fread(text, 1, sizeof text, file);
    CHECK_MEM(text, size, expected, strlen(expected));
    CHECK(fclose(file) == 0);
}

/* Tornado deletes the path of a live server; here it is the second who fails. */
TEST_ONCE(live_servers_path_is_not_stolen)
{
    const char *directory = t_make_directory(), *path = path_in(directory, "live");
    int fd, second = -1;
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), TSRV_OK);
    CHECK((fcntl(fd, F_GETFL) & O_NONBLOCK) != 0);
    CHECK((fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0);
    int before = t_open_fds();
    for (int i = 0; i < 3; i++) {
        CHECK_INT(tsrv_bind_unix_socket(path, NULL, &second), -EADDRINUSE);
        CHECK_INT(t_open_fds(), before);
        CHECK_INT(try_to_connect(path), 0);
    }
    t_close(fd);
    CHECK(access(path, F_OK) == 0); /* it stays when the socket is closed */
    CHECK_INT(try_to_connect(path), ECONNREFUSED);
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), TSRV_OK);
    CHECK_INT(try_to_connect(path), 0);
    t_close(fd);
    CHECK(unlink(path) == 0);
    CHECK(rmdir(directory) == 0);
}

/* A server whose queue is full is alive, although it takes nobody at the moment. */
TEST_ONCE(busy_servers_path_is_not_stolen)
{
    const char *directory = t_make_directory(), *path = path_in(directory, "busy");
    struct sockaddr_un name = t_unix_address(path);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), clients[20], count = 0, fd;
    CHECK(bind(listener, (struct sockaddr *)&name, sizeof name) == 0);
    CHECK(listen(listener, 1) == 0);
    bool full = false;
    while (!full && count < 20) {
        clients[count] = socket(AF_UNIX, SOCK_STREAM, 0);
        CHECK(clients[count] >= 0);
        CHECK(fcntl(clients[count], F_SETFL, O_NONBLOCK) == 0);
        full = connect(clients[count++], (struct sockaddr *)&name, sizeof name) != 0;
    }
    CHECK(full);
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), -EADDRINUSE);
    int accepted = accept(listener, NULL, NULL); /* still in business */
    CHECK(accepted >= 0);
    t_close(accepted);
    t_close_all(clients, count);
    t_close(listener);
    CHECK(unlink(path) == 0);
    CHECK(rmdir(directory) == 0);
}

TEST_ONCE(stale_socket_file_is_replaced)
{
    const char *directory = t_make_directory(), *path = path_in(directory, "stale");
    int fd;
    make_stale(path);
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), TSRV_OK);
    CHECK_INT(try_to_connect(path), 0);
    t_close(fd);
    CHECK(unlink(path) == 0);
    CHECK(rmdir(directory) == 0);
}

TEST_ONCE(other_files_are_left_alone)
{
    const char *directory = t_make_directory(), *file = path_in(directory, "file");
    const char *inner = path_in(directory, "directory"), *fifo = path_in(directory, "fifo");
    int before = t_open_fds(), fd;
    make_file(file, "precious");
    CHECK(mkdir(inner, 0700) == 0);
    CHECK(mkfifo(fifo, 0600) == 0);
    CHECK_INT(tsrv_bind_unix_socket(file, NULL, &fd), -EEXIST);
    CHECK_INT(tsrv_bind_unix_socket(inner, NULL, &fd), -EEXIST);
    CHECK_INT(tsrv_bind_unix_socket(fifo, NULL, &fd), -EEXIST);
    CHECK_INT(tsrv_bind_unix_socket(path_in(directory, "none/socket"), NULL, &fd), -ENOENT);
    CHECK_INT(t_open_fds(), before);
    check_file(file, "precious");
    CHECK(unlink(file) == 0);
    CHECK(unlink(fifo) == 0);
    CHECK(rmdir(inner) == 0);
    CHECK(rmdir(directory) == 0);
}

/* A link is no socket file: neither it nor what it points to may go. */
TEST_ONCE(symbolic_links_are_left_alone)
{
    static const char *const targets[] = {"live", "stale", "file", "missing"};
    const char *directory = t_make_directory();
    int live, fd;
    CHECK_INT(tsrv_bind_unix_socket(path_in(directory, "live"), NULL, &live), TSRV_OK);
    make_stale(path_in(directory, "stale"));
    make_file(path_in(directory, "file"), "precious");
    int before = t_open_fds();
    for (int i = 0; i < 4; i++) {
        const char *link = path_in(directory, "link"), *target = path_in(directory, targets[i]);
        struct stat status;
        CHECK(symlink(targets[i], link) == 0);
        int rc = tsrv_bind_unix_socket(link, NULL, &fd);
        CHECK(rc == -EEXIST || (i == 0 && rc == -EADDRINUSE));
        CHECK(lstat(link, &status) == 0 && S_ISLNK(status.st_mode));
        CHECK_INT(lstat(target, &status), i == 3 ? -1 : 0);
        CHECK(unlink(link) == 0);
        CHECK_INT(t_open_fds(), before);
    }
    CHECK_INT(try_to_connect(path_in(directory, "live")), 0);
    check_file(path_in(directory, "file"), "precious");
    t_close(live);
    for (int i = 0; i < 3; i++) {
        CHECK(unlink(path_in(directory, targets[i])) == 0);
    }
    CHECK(rmdir(directory) == 0);
}

TEST_ONCE(too_long_a_path_is_an_error)
{
    struct sockaddr_un name;
    char path[300];
    const char *directory = t_make_directory();
    int before = t_open_fds(), fd;
    size_t used = strlen(directory);
    memset(path, 'x', sizeof path);
    memcpy(path, directory, used);
    path[used] = '/';
    for (size_t size = sizeof name.sun_path + 1; size < sizeof path; size += 50) {
        char cut = path[size];
        path[size] = 0;
        CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), -ENAMETOOLONG);
        CHECK_INT(t_open_fds(), before);
        path[size] = cut;
    }
    path[sizeof name.sun_path - 1] = 0; /* the longest */
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), TSRV_OK);
    CHECK_INT(try_to_connect(path), 0);
    t_close(fd);
    CHECK(tsrv_bind_unix_socket("", NULL, &fd) < 0);
    CHECK_INT(t_open_fds(), before);
    CHECK(unlink(path) == 0);
    CHECK(rmdir(directory) == 0); /* the others left nothing */
}

TEST_ONCE(unix_mode_is_exact)
{
    static const unsigned modes[][2] = {{0, 0600}, {0600, 0600}, {0666, 0666}, {0660, 0660},
                                        {0777, 0777}};
    const char *directory = t_make_directory(), *path = path_in(directory, "socket");
    umask(027); /* must not matter */
    for (int i = 0; i < 5; i++) {
        tsrv_bind_options options = {0};
        struct stat status;
        int fd;
        options.unix_mode = modes[i][0];
        CHECK_INT(tsrv_bind_unix_socket(path, &options, &fd), TSRV_OK);
        CHECK(stat(path, &status) == 0);
        CHECK_INT(status.st_mode & 07777, modes[i][1]);
        t_close(fd);
        CHECK(unlink(path) == 0);
    }
    CHECK(rmdir(directory) == 0);
}

TEST_ONCE(unix_path_goes_where_an_address_goes)
{
    const char *directory = t_make_directory(), *path = path_in(directory, "socket");
    char address[120], text[TSRV_ADDRESS_SIZE];
    int fds[2], count;
    snprintf(address, sizeof address, "unix:%s", path);
    count = tsrv_bind_sockets(0, address, NULL, fds, 1);
    CHECK_INT(count, 1);
    tsrv_address name = name_of(fds[0]);
    CHECK_STR(tsrv_address_format(&name, text, sizeof text), address);
    CHECK_INT(try_to_connect(path), 0);
    int before = t_open_fds();
    CHECK_INT(tsrv_bind_sockets(0, address, NULL, &fds[1], 1), -EADDRINUSE);
    CHECK_INT(tsrv_bind_sockets(0, address, NULL, &fds[1], 0), TSRV_EINVAL);
    CHECK(tsrv_bind_sockets(0, "unix:", NULL, &fds[1], 1) < 0);
    CHECK_INT(t_open_fds(), before);
    CHECK_INT(try_to_connect(path), 0);
    t_close(fds[0]);
    /* It has no port, so that any will do. */
    for (int port = -1; port <= 65536; port += 65537) {
        CHECK_INT(tsrv_bind_sockets(port, address, NULL, fds, 1), 1);
        CHECK_INT(try_to_connect(path), 0);
        t_close(fds[0]);
    }
    CHECK(unlink(path) == 0);
    CHECK(rmdir(directory) == 0);
}

#ifdef __linux__
TEST_ONCE(abstract_names_have_no_file)
{
    char name[64], address[80], text[TSRV_ADDRESS_SIZE];
    int fd, second;
    snprintf(name, sizeof name, "@tsrv-test-%d", (int)getpid());
    snprintf(address, sizeof address, "unix:%s", name);
    CHECK_INT(tsrv_bind_unix_socket(name, NULL, &fd), TSRV_OK);
    tsrv_address bound = name_of(fd);
    CHECK_INT(bound.size, offsetof(struct sockaddr_un, sun_path) + strlen(name));
    CHECK_STR(tsrv_address_format(&bound, text, sizeof text), address);
    CHECK(access(name, F_OK) != 0);
    int client = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(connect(client, (struct sockaddr *)bound.storage, bound.size) == 0);
    CHECK_INT(tsrv_bind_unix_socket(name, NULL, &second), -EADDRINUSE);
    CHECK_INT(tsrv_bind_sockets(0, address, NULL, &second, 1), -EADDRINUSE);
    t_close(client);
    t_close(fd);
    CHECK_INT(tsrv_bind_sockets(0, address, NULL, &fd, 1), 1); /* gone with its socket */
    t_close(fd);
}
#endif

/* ---- unix sockets: one at a time ----------------------------------------------------------*/

typedef struct rival {
    const char *path;
    pthread_t thread;
    int rc, fd;
    int looked; /* atomic: it has asked for the lock, or is over */
    bool joined;
} rival;

static rival other;
static pthread_t first_binder;

static void *bind_too(void *context)
{
    other.rc = tsrv_bind_unix_socket(other.path, NULL, &other.fd);
    __atomic_store_n(&other.looked, 1, __ATOMIC_RELEASE);
    return context;
}

static bool has_looked(void *context)
{
    (void)context;
    return __atomic_load_n(&other.looked, __ATOMIC_ACQUIRE) != 0;
}

/* Just before the first binder listens, when its socket looks as if nobody served it, another one
 * comes. With joined it is over before the first goes on. */
static void rival_comes(const char *name)
{
    if (!pthread_equal(pthread_self(), first_binder)) {
        if (strcmp(name, "flock") == 0) {
            __atomic_store_n(&other.looked, 1, __ATOMIC_RELEASE);
        }
    } else if (strcmp(name, "listen") == 0) {
        CHECK(pthread_create(&other.thread, NULL, bind_too, NULL) == 0);
        CHECK(t_wait_until(has_looked, NULL));
        if (other.joined) {
            CHECK(pthread_join(other.thread, NULL) == 0);
        }
    }
}

static int bind_against_rival(const char *path, bool joined, int *fd)
{
    other = (rival){path, 0, 0, -1, 0, joined};
    first_binder = pthread_self();
    t_seen = rival_comes;
    int rc = tsrv_bind_unix_socket(path, NULL, fd);
    t_seen = NULL;
    if (!joined) {
        CHECK(pthread_join(other.thread, NULL) == 0);
    }
    return rc;
}

TEST_ONCE(unix_socket_bound_twice_at_once)
{
    const char *directory = t_make_directory(), *path = path_in(directory, "socket");
    int before = t_open_fds(), fd;
    for (int stale = 0; stale < 2; stale++) { /* the second time over a dead server's file */
        CHECK_INT(bind_against_rival(path, false, &fd), TSRV_OK);
        CHECK_INT(other.rc, -EADDRINUSE);
        CHECK_INT(other.fd, -1);
        CHECK_INT(try_to_connect(path), 0);
        t_close(fd);
        CHECK_INT(t_open_fds(), before);
    }
    CHECK(unlink(path) == 0);
    CHECK(rmdir(directory) == 0);
}

/* Where there is no lock, the one whose file was taken away finds out. */
TEST_ONCE(unix_socket_bound_twice_at_once_without_locks)
{
    static const int codes[] = {ENOLCK, EOPNOTSUPP, ENOSYS, EINVAL, EPERM};
    const char *directory = t_make_directory(), *path = path_in(directory, "socket");
    int before = t_open_fds(), fd = 0;
    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        t_fail_call("flock", codes[i], 1, true);
        CHECK_INT(bind_against_rival(path, true, &fd), -EADDRINUSE);
        t_fault_at = 0;
        CHECK_INT(fd, -1);
        CHECK_INT(other.rc, TSRV_OK);
        CHECK_INT(try_to_connect(path), 0); /* its file is still there */
        t_close(other.fd);
        CHECK_INT(t_open_fds(), before);
    }
    CHECK(unlink(path) == 0);
    CHECK(rmdir(directory) == 0);
}

static int polls;

static void count_polls(const char *name)
{
    polls += strcmp(name, "poll") == 0;
}

/* As `flock DIRECTORY server` does: that is no reason not to start, after a while. */
TEST_ONCE(locked_directory_is_no_obstacle)
{
    const char *directory = t_make_directory(), *path = path_in(directory, "socket");
    int holder = open(directory, O_RDONLY), fd;
    CHECK(holder >= 0 && flock(holder, LOCK_EX) == 0);
    t_seen = count_polls;
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), TSRV_OK);
    t_seen = NULL;
    CHECK_INT(polls, TSRVI_UNIX_LOCK_TRIES);
    CHECK_INT(try_to_connect(path), 0);
    t_close(fd);
    t_close(holder);
    holder = open(directory, O_RDONLY);
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), TSRV_OK);
    CHECK(flock(holder, LOCK_EX | LOCK_NB) == 0); /* nothing is left locked */
    t_close(holder);
    t_close(fd);
    CHECK(unlink(path) == 0);
    CHECK(rmdir(directory) == 0);
}

/* A directory that may be searched but not read cannot be locked. */
TEST_ONCE(directory_that_cannot_be_opened_is_no_obstacle)
{
    const char *directory = t_make_directory(), *path = path_in(directory, "socket");
    int fd;
    deny("open", EACCES, true);
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), TSRV_OK);
    allow();
    CHECK_INT(t_fault_hits, 1);
    CHECK_INT(try_to_connect(path), 0);
    t_close(fd);
    CHECK(unlink(path) == 0);
    CHECK(rmdir(directory) == 0);
}

static const char *swap_path, *swap_target;
static int swap_at, swap_call;

/* At one of the calls that follow bind, a link takes the place of the socket. */
static void swap(const char *name)
{
    swap_call = swap_call > 0 ? swap_call + 1 : strcmp(name, "bind") == 0 ? 1 : 0;
    if (swap_call == swap_at + 1) {
        CHECK(unlink(swap_path) == 0 && symlink(swap_target, swap_path) == 0);
    }
}

TEST_ONCE(mode_of_a_socket_does_not_go_to_what_takes_its_place)
{
    const char *directory = t_make_directory(), *path = path_in(directory, "socket");
    const char *victim = path_in(directory, "victim");
    tsrv_bind_options options = {0};
    int before = t_open_fds(), tries = 0;
    if (TSRVI_HAS_O_PATH) {
        t_need_proc(); /* without it chmod follows the link */
    }
    options.unix_mode = 0666;
    make_file(victim, "secret");
    umask(077); /* so that there is something to add */
    for (swap_at = 1;; swap_at++) {
        struct stat status;
        int fd;
        CHECK(chmod(victim, 0600) == 0);
        swap_path = path;
        swap_target = "victim";
        swap_call = 0;
        t_seen = swap;
        int rc = tsrv_bind_unix_socket(path, &options, &fd);
        t_seen = NULL;
        CHECK(stat(victim, &status) == 0);
        CHECK_INT(status.st_mode & 07777, 0600);
        if (rc == TSRV_OK) {
            t_close(fd);
        }
        CHECK_INT(t_open_fds(), before);
        CHECK(lstat(path, &status) == 0);
        CHECK(unlink(path) == 0);
        if (!S_ISLNK(status.st_mode)) {
            break; /* the calls are over before that one */
        }
        tries++;
    }
    CHECK(tries >= 3);
    CHECK(unlink(victim) == 0);
    CHECK(rmdir(directory) == 0);
}

/* Without fchmod's help, and where there is no /proc. */
TEST_ONCE(unix_mode_is_right_in_every_way)
{
    static const struct {
        const char *denied;
        int code, at;
        bool sticky;
    } rows[] = {{"fchmod", EINVAL, 1, true}, {"fchmod", EPERM, 1, true}, {"fchmod", ENOSYS, 1, true},
                {"chmod", ENOENT, 1, false}};
    const char *directory = t_make_directory(), *path = path_in(directory, "socket");
    umask(027);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        tsrv_bind_options options = {0};
        struct stat status;
        int fd;
        options.unix_mode = 0666;
        deny(rows[i].denied, rows[i].code, rows[i].sticky);
        CHECK_INT(tsrv_bind_unix_socket(path, &options, &fd), TSRV_OK);
        CHECK_INT(t_fault_hits, 1);
        allow();
        CHECK(stat(path, &status) == 0);
        CHECK_INT(status.st_mode & 07777, 0666);
        t_close(fd);
        CHECK(unlink(path) == 0);
    }
    CHECK(rmdir(directory) == 0);
}

/* What fails before the socket listens is an error, and no file is left. */
TEST_ONCE(unix_socket_that_cannot_listen_leaves_no_file)
{
    static const struct {
        const char *denied;
        int code, at;
        bool sticky;
    } rows[] = {{"open", EMFILE, 2, false}, {"fstat", EIO, 2, false}, {"chmod", EPERM, 1, false},
                {"chmod", ENOENT, 1, true},  {"fstat", EIO, 1, false},  {"listen", EADDRINUSE, 1, false},
                {"lstat", EACCES, 1, false}};
    const char *directory = t_make_directory(), *path = path_in(directory, "socket");
    int before = t_open_fds();
    umask(027);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        tsrv_bind_options options = {0};
        int fd;
        options.unix_mode = 0666;
        t_fail_call(rows[i].denied, rows[i].code, rows[i].at, rows[i].sticky);
        CHECK_INT(tsrv_bind_unix_socket(path, &options, &fd), -rows[i].code);
        CHECK_INT(t_fault_hits, rows[i].sticky ? 2 : 1);
        allow();
        CHECK_INT(t_open_fds(), before);
        CHECK(access(path, F_OK) != 0);
    }
    CHECK(rmdir(directory) == 0);
}

#if TSRVI_HAS_O_PATH
/* An inode's number says nothing without its device: at one look at a time there is another file. The first look is
 * whether something is in the way, and the two that are kept for later say nothing now. */
TEST_ONCE(file_on_another_device_is_not_ours)
{
    static const int codes[] = {-EADDRINUSE, TSRV_OK, TSRV_OK, -EADDRINUSE, -EADDRINUSE, TSRV_OK};
    const char *directory = t_make_directory(), *path = path_in(directory, "socket");
    int before = t_open_fds();
    umask(027);
    for (int i = 0; i < (int)(sizeof codes / sizeof codes[0]); i++) {
        tsrv_bind_options options = {0};
        int fd;
        options.unix_mode = 0666;
        looks = 0;
        elsewhere_at = i + 2;
        CHECK_INT(tsrv_bind_unix_socket(path, &options, &fd), codes[i]);
        elsewhere_at = 0;
        CHECK(looks >= 6);
        if (codes[i] == TSRV_OK) {
            tsrvi_bound_close(fd);
            CHECK_INT(access(path, F_OK) == 0, i < 3); /* who does not know it leaves it */
        }
        CHECK_INT(t_open_fds(), before);
        unlink(path);
    }
    CHECK(rmdir(directory) == 0);
}
#endif

static int locks;

static void count_locks(const char *name)
{
    locks += strcmp(name, "flock") == 0;
}

/* The directory to lock is the root. What has the name stays. */
TEST_ONCE(unix_path_in_the_root)
{
    int fd, before = t_open_fds();
    t_seen = count_locks;
    CHECK_INT(tsrv_bind_unix_socket("/tmp", NULL, &fd), -EEXIST);
    t_seen = NULL;
    CHECK_INT(locks, 2); /* and unlocked */
    CHECK_INT(t_open_fds(), before);
}

/* Whatever call fails: it is a code, or the socket is as it should be. */
TEST_ONCE(failing_calls_of_a_unix_bind_are_codes_or_do_no_harm)
{
    const char *directory = t_make_directory(), *path = path_in(directory, "socket");
    int before = t_open_fds(), codes = 0;
    umask(027); /* so that the mode is something to do */
    for (long at = 1;; at++) {
        tsrv_bind_options options = {0};
        struct stat status;
        int fd;
        options.unix_mode = 0666;
        make_stale(path);
        t_fail_call(NULL, EIO, at, false);
        int rc = tsrv_bind_unix_socket(path, &options, &fd);
        bool failed = t_fault_hits != 0;
        allow();
        if (rc == TSRV_OK) {
            CHECK(stat(path, &status) == 0);
            CHECK_INT(status.st_mode & 07777, 0666);
            CHECK_INT(try_to_connect(path), 0);
            CHECK(unlink(path) == 0);
            t_close(fd);
        } else {
            CHECK(failed && (rc == -EIO || rc == -EADDRINUSE)); /* the latter when it cannot be told that it is not */
            CHECK_INT(fd, -1);
            unlink(path);
            codes++;
        }
        CHECK_INT(t_open_fds(), before);
        if (!failed) {
            break;
        }
    }
    CHECK(codes >= 8);
    CHECK(rmdir(directory) == 0);
}

#ifdef __linux__
static const char *watched_path;
static mode_t first_mode;
static bool bind_seen;

/* The mode that the file has at the first call behind bind. */
static void watch_mode(const char *name)
{
    struct stat status;
    if (bind_seen && first_mode == 0) {
        CHECK(lstat(watched_path, &status) == 0);
        first_mode = status.st_mode & 07777;
    }
    bind_seen = bind_seen || strcmp(name, "bind") == 0;
}

/* Not for a moment is it wider than was asked for. */
TEST_ONCE(unix_mode_is_narrow_from_the_beginning)
{
    static const mode_t modes[][3] = {
        {0, 0600, 0600}, {0, 0666, 0666}, {077, 0666, 0600}, {022, 0660, 0640}};
    const char *directory = t_make_directory(), *path = path_in(directory, "socket");
    watched_path = path;
    for (int i = 0; i < 4; i++) {
        tsrv_bind_options options = {0};
        int fd;
        umask(modes[i][0]);
        options.unix_mode = modes[i][1];
        first_mode = 0;
        bind_seen = false;
        t_seen = watch_mode;
        CHECK_INT(tsrv_bind_unix_socket(path, &options, &fd), TSRV_OK);
        t_seen = NULL;
        CHECK_INT(first_mode, modes[i][2]);
        t_close(fd);
        CHECK(unlink(path) == 0);
    }
    CHECK(rmdir(directory) == 0);
}
#endif

/* ---- what this process has bound ----------------------------------------------------------*/

/* The server's work is not what is looked at. */
static int no_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    return TSRV_OK;
}

static tsrv_server *new_server(void)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    options.handle_stream = no_handler;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    return server;
}

enum { STOP, FREE, UNBIND, REFUSE, CLOSE_ONLY, REPLACED, IN_CHILD, WAYS };

/* One way for a server on a unix socket to end. Is the file still there? */
static bool file_stays(const char *path, int way)
{
    tsrv_server *server = new_server();
    char address[120];
    struct stat status;
    int fd = -1;
    snprintf(address, sizeof address, "unix:%s", path);
    if (way == UNBIND) {
        CHECK_INT(tsrv_server_bind(server, 0, address, NULL), TSRV_OK);
    } else {
        CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), TSRV_OK);
        if (way != CLOSE_ONLY) {
            CHECK_INT(tsrv_server_add_sockets(server, &fd, 1), TSRV_OK);
        }
    }
    CHECK_INT(try_to_connect(path), 0);
    if (way == REPLACED) {
        CHECK(unlink(path) == 0);
        make_file(path, "another's");
    }
    if (way == CLOSE_ONLY) {
        t_close(fd);
    } else if (way == IN_CHILD) {
        pid_t child = fork();
        int ended;
        if (child == 0) {
            tsrvi_bound_forget(fd); /* as its tsrv_server_stop would */
            _exit(0);
        }
        CHECK(child > 0 && waitpid(child, &ended, 0) == child && ended == 0);
        CHECK(lstat(path, &status) == 0);
        CHECK_INT(try_to_connect(path), 0);
        tsrvi_bound_refuse_all(true, 0); /* a new program has it */
    } else if (way == REFUSE) {
        tsrvi_bound_refuse_all(false, 0);
    } else if (way == STOP) {
        tsrv_server_stop(server);
        tsrv_server_stop(server);
    }
    if (way == STOP || way == REFUSE) { /* at once */
        CHECK(lstat(path, &status) != 0 && errno == ENOENT);
    }
    tsrv_server_free(server);
    return lstat(path, &status) == 0;
}

TEST_ONCE(socket_file_goes_with_the_server_that_bound_it)
{
    static const bool stays[WAYS] = {false, false, false, false, true, true, true};
    const char *directory = t_make_directory(), *path = path_in(directory, "socket");
    int before = t_open_fds();
    CHECK(tsrv_loop_current() != NULL);
    for (int way = 0; way < WAYS; way++) {
        if (file_stays(path, way) != stays[way]) {
            T_FAIL("way %d: the file %s", way, stays[way] ? "has gone" : "stays");
        }
        if (stays[way]) {
            CHECK(unlink(path) == 0);
        }
        tsrvi_bound_refuse_all(false, 0); /* forgets what the program has closed itself */
    }
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
    CHECK_INT(t_open_fds(), before);
    CHECK_INT(tsrvi_process.bound.count, 0);
    CHECK(rmdir(directory) == 0);
}

/* For an upgrade: the file goes with the socket, and not one that another server has put in its place. */
TEST_ONCE(file_of_another_server_does_not_go_with_a_socket)
{
    char directory[] = "/tmp/tsrv-XXXXXX"; /* absolute: what is not there by such a path is not missed */
    CHECK(mkdtemp(directory) != NULL);
    const char *path = path_in(directory, "socket");
    int fd;
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &fd), TSRV_OK);
    CHECK(tsrvi_bound_has_file(fd));
    CHECK(unlink(path) == 0);
    t_watch_log();
    CHECK(!tsrvi_bound_has_file(fd));
    make_stale(path);
    CHECK(!tsrvi_bound_has_file(fd));
    tsrvi_bound_close(fd);
    CHECK_INT(t_log_lines, 0);
    CHECK(unlink(path) == 0 && rmdir(directory) == 0);
}

/* A program that has changed its directory does not find it again, which is said. */
TEST_ONCE(file_with_a_relative_path_that_is_not_found_is_told_of)
{
    const char *directory = t_make_directory();
    int fd, here = open(".", O_RDONLY | O_DIRECTORY);
    CHECK(here >= 0 && chdir(directory) == 0);
    CHECK_INT(tsrv_bind_unix_socket("socket", NULL, &fd), TSRV_OK);
    CHECK(chdir("/") == 0);
    t_watch_log();
    CHECK(!tsrvi_bound_has_file(fd));
    CHECK_INT(t_log_lines, 1);
    tsrvi_bound_close(fd);
    CHECK_INT(t_log_lines, 2);
    CHECK(strstr(t_log, "unix:socket") != NULL);
    CHECK(fchdir(here) == 0 && unlink(path_in(directory, "socket")) == 0 && rmdir(directory) == 0);
    t_close(here);
}

static bool listens(int fd)
{
    int listening = 0;
    socklen_t size = sizeof listening;
    return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) == 0 && listening != 0;
}

/* More than the list has room for at first; some of them closed by the program, and their numbers
 * in use for something else. */
TEST_ONCE(listening_ends_at_once_and_only_for_what_was_bound)
{
    enum { COUNT = 150 };
    int fds[COUNT], before = t_open_fds();
    for (int i = 0; i < COUNT; i++) {
        CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, &fds[i], 1), 1);
    }
    for (int i = 0; i < COUNT; i += 3) {
        int fd = t_raw_socket(SOCK_STREAM, true, NULL);
        CHECK(dup2(fd, fds[i]) == fds[i]); /* the program's own */
        t_close(fd);
    }
    tsrvi_bound_refuse_all(false, 0);
    CHECK_INT(tsrvi_process.bound.count, 0);
    for (int i = 0; i < COUNT; i++) { /* to connect would tell less: the ports are anybody's now */
        CHECK_INT(listens(fds[i]), i % 3 == 0);
        CHECK((fcntl(fds[i], F_GETFD) & FD_CLOEXEC) != 0 || i % 3 == 0);
        t_close(fds[i]); /* still legal */
    }
    CHECK_INT(t_open_fds(), before);
}

/* Those that the program has closed make room. Where there is none, and no memory, nothing is bound. */
TEST_ONCE(room_for_what_was_bound_is_made_or_asked_for)
{
    int fds[TSRVI_BOUND_FEW], before = t_open_fds(), fd;
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < TSRVI_BOUND_FEW; i++) {
            CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, &fds[i], 1), 1);
        }
        t_fail_call("mmap", 0, 1, true);
        CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, &fd, 1), -ENOMEM);
        for (int i = round; i < TSRVI_BOUND_FEW; i++) {
            CHECK(dup2(0, fds[i]) == fds[i]); /* their numbers stay in use */
        }
        CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, &fd, 1), 1);
        CHECK_INT(tsrvi_process.bound.count, 1 + round);
        CHECK_INT(t_fault_hits, 1);
        allow();
        tsrvi_bound_close(fd);
        tsrvi_bound_refuse_all(true, 0);
        CHECK_INT(tsrvi_process.bound.count, 0);
        t_close_all(fds, TSRVI_BOUND_FEW);
        CHECK_INT(t_open_fds(), before);
    }
}

#if defined(__linux__) && defined(O_PATH)
/* A socket's file at the number of a listener is another device's. */
TEST_ONCE(file_of_a_socket_is_not_taken_for_the_socket)
{
    const char *directory = t_make_directory(), *path = path_in(directory, "socket");
    int fd, got;
    make_stale(path);
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, &fd, 1), 1);
    CHECK_INT(tsrvi_bound_get(&got, 1), 1);
    int file = open(path, O_PATH);
    CHECK(file >= 0 && dup2(file, fd) == fd);
    t_close(file);
    CHECK_INT(tsrvi_bound_get(&got, 1), 0);
    t_close(fd);
    CHECK(unlink(path) == 0 && rmdir(directory) == 0);
}
#endif

/* What somebody else has made is nobody's here. */
TEST_ONCE(socket_that_was_not_bound_here_is_not_known)
{
    int fd = t_raw_socket(SOCK_STREAM, true, NULL);
    tsrvi_bound_claim(fd);
    CHECK(!tsrvi_bound_has_file(fd));
    tsrvi_bound_forget(fd);
    CHECK(listens(fd));
    CHECK_INT(tsrvi_process.bound.count, 0);
    t_close(fd);
}

/* It takes no new descriptor; where it fails that is said. */
TEST_ONCE(listening_ends_without_a_free_descriptor)
{
    struct rlimit limit, low;
    int fd, spare;
    CHECK_INT(tsrv_bind_sockets(0, "127.0.0.1", NULL, &fd, 1), 1);
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    spare = dup(0);
    CHECK(spare >= 0);
    low = limit;
    low.rlim_cur = (rlim_t)spare;
    CHECK(close(spare) == 0 && setrlimit(RLIMIT_NOFILE, &low) == 0);
    tsrvi_bound_refuse_all(false, 0);
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    CHECK(fcntl(fd, F_GETFD) >= 0 && tsrvi_listening(fd) < 0);
    t_close(fd);
}

/* A fork in one thread while another holds the lock: the child is not stuck. */
TEST_ONCE(lock_of_a_thread_that_a_fork_left_behind_is_free)
{
    int status, lock = 0;
    tsrvi_lock(&lock);
    pid_t child = fork();
    if (child == 0) {
        alarm((unsigned)(T_PATIENCE * t_scale()));
        tsrvi_lock(&lock);
        tsrvi_unlock(&lock);
        tsrvi_lock(&lock);
        _exit(0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK_INT(status, 0);
    tsrvi_unlock(&lock);
    tsrvi_lock(&lock); /* the child's is another one */
    tsrvi_unlock(&lock);
}

/* ---- addresses ----------------------------------------------------------------------------*/

static tsrv_address make_address(const void *data, size_t size)
{
    tsrv_address address;
    memset(&address, 0, sizeof address);
    memcpy(address.storage, data, size);
    address.size = (uint32_t)size;
    return address;
}

static tsrv_address make_ip(const char *number, int port)
{
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
    memset(&v4, 0, sizeof v4);
    memset(&v6, 0, sizeof v6);
    if (inet_pton(AF_INET, number, &v4.sin_addr) == 1) {
        v4.sin_family = AF_INET;
        v4.sin_port = htons((uint16_t)port);
        return make_address(&v4, sizeof v4);
    }
    CHECK(inet_pton(AF_INET6, number, &v6.sin6_addr) == 1);
    v6.sin6_family = AF_INET6;
    v6.sin6_port = htons((uint16_t)port);
    return make_address(&v6, sizeof v6);
}

/* Formats with every size of buffer: the text is cut, ended, and nothing behind it is touched. */
static void check_format(const tsrv_address *address, const char *expected)
{
    char buffer[TSRV_ADDRESS_SIZE + 1];
    size_t length = strlen(expected);
    CHECK(length < TSRV_ADDRESS_SIZE);
    for (size_t size = 0; size <= TSRV_ADDRESS_SIZE; size++) {
        memset(buffer, '#', sizeof buffer);
        CHECK(tsrv_address_format(address, buffer, size) == buffer);
        CHECK(buffer[size] == '#');
        if (size > 0) {
            size_t shown = length < size ? length : size - 1;
            CHECK_MEM(buffer, strlen(buffer), expected, shown);
        }
    }
}

TEST_ONCE(internet_addresses_as_text)
{
    static const struct {
        const char *number;
        int port;
        const char *text;
        int family;
    } rows[] = {
        {"127.0.0.1", 80, "127.0.0.1:80", AF_INET},
        {"0.0.0.0", 0, "0.0.0.0:0", AF_INET},
        {"255.255.255.255", 65535, "255.255.255.255:65535", AF_INET},
        {"::1", 80, "[::1]:80", AF_INET6},
        {"::", 0, "[::]:0", AF_INET6},
        {"2001:db8::ff00:42:8329", 443, "[2001:db8::ff00:42:8329]:443", AF_INET6},
        {"1111:2222:3333:4444:5555:6666:7777:8888", 65535,
         "[1111:2222:3333:4444:5555:6666:7777:8888]:65535", AF_INET6},
        {"::ffff:192.0.2.1", 8888, "[::ffff:192.0.2.1]:8888", AF_INET6},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        tsrv_address address = make_ip(rows[i].number, rows[i].port);
        check_format(&address, rows[i].text);
        CHECK_INT(tsrv_address_port(&address), rows[i].port);
        CHECK_INT(tsrv_address_family(&address), rows[i].family);
    }
}

/* An address of a link is one only with the link's number. */
TEST_ONCE(addresses_of_links_have_their_number)
{
    struct sockaddr_in6 v6;
    memset(&v6, 0, sizeof v6);
    v6.sin6_family = AF_INET6;
    v6.sin6_port = htons(80);
    CHECK(inet_pton(AF_INET6, "fe80::1", &v6.sin6_addr) == 1);
    tsrv_address none = make_address(&v6, sizeof v6);
    v6.sin6_scope_id = 3;
    tsrv_address third = make_address(&v6, sizeof v6);
    check_format(&none, "[fe80::1]:80");
    check_format(&third, "[fe80::1%3]:80");
    CHECK(!tsrvi_address_same(&none, &third));
    CHECK(tsrvi_address_same(&third, &third));
}

TEST_ONCE(same_addresses)
{
    static const struct {
        const char *one, *two;
    } rows[] = {{"::1", "::2"}, {"::1", "127.0.0.1"}, {"127.0.0.1", "127.0.0.2"}};
    struct sockaddr_un name = t_unix_address("/run/x");
    tsrv_address path = make_address(&name, sizeof name), nothing, unknown;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        tsrv_address one = make_ip(rows[i].one, 80), two = make_ip(rows[i].two, 80), port = make_ip(rows[i].one, 81);
        CHECK(tsrvi_address_same(&one, &one));
        CHECK(!tsrvi_address_same(&one, &two));
        CHECK(!tsrvi_address_same(&one, &port));
        CHECK(!tsrvi_address_same(&one, &path));
    }
    memcpy(name.sun_path, "\0ab", 3);
    tsrv_address ab = make_address(&name, offsetof(struct sockaddr_un, sun_path) + 3);
    name.sun_path[2] = 'c';
    tsrv_address ac = make_address(&name, offsetof(struct sockaddr_un, sun_path) + 3);
    CHECK(tsrvi_address_same(&ab, &ab));
    CHECK(!tsrvi_address_same(&ab, &ac));
    memset(&nothing, 0, sizeof nothing);
    name.sun_family = 200;
    unknown = make_address(&name, sizeof name);
    CHECK(tsrvi_address_same(&nothing, &nothing));
    CHECK(tsrvi_address_same(&unknown, &unknown));
    CHECK(!tsrvi_address_same(&nothing, &unknown));
}

/* A peer is kept as its address; of a family that is not known nothing is. */
TEST_ONCE(peers_of_unknown_families_are_unknown)
{
    struct sockaddr_un name = t_unix_address("/run/x");
    char text[TSRV_ADDRESS_SIZE];
    tsrvi_peer peer;
    memset(&peer, 0, sizeof peer);
    name.sun_family = 200;
    tsrv_address unknown = make_address(&name, sizeof name), loaded;
    CHECK_INT(tsrvi_peer_store(&peer, &unknown), TSRV_OK);
    CHECK_INT(t_live_allocations, 0);
    tsrvi_peer_load(&peer, &loaded);
    CHECK_INT(loaded.size, 0);
    CHECK_STR(tsrv_address_format(&loaded, text, sizeof text), "unknown");
    tsrvi_peer_free(&peer);
}

TEST_ONCE(unix_addresses_as_text)
{
    enum { START = offsetof(struct sockaddr_un, sun_path) };
    struct sockaddr_un name = t_unix_address("/run/x");
    char longest[TSRV_ADDRESS_SIZE];
    /* With its final 0, without it, and with the whole structure. */
    static const size_t sizes[] = {START + 7, START + 6, sizeof name};
    for (int i = 0; i < 3; i++) {
        tsrv_address address = make_address(&name, sizes[i]);
        check_format(&address, "unix:/run/x");
        CHECK_INT(tsrv_address_port(&address), 0);
        CHECK_INT(tsrv_address_family(&address), AF_UNIX);
    }
    /* A peer's path may fill all of its room and have no final 0. */
    memset(name.sun_path, 'p', sizeof name.sun_path);
    tsrv_address full = make_address(&name, sizeof name);
    size_t used = (size_t)snprintf(longest, sizeof longest, "unix:");
    memset(longest + used, 'p', sizeof name.sun_path);
    longest[used + sizeof name.sun_path] = 0;
    check_format(&full, longest);
    /* A socket that was never bound has the family alone, or all zeros behind it. */
    memset(name.sun_path, 0, sizeof name.sun_path);
    tsrv_address unnamed = make_address(&name, START);
    check_format(&unnamed, "unix:");
    CHECK_INT(tsrv_address_family(&unnamed), AF_UNIX);
#ifdef __linux__
    memcpy(name.sun_path, "\0abstract", 9);
    tsrv_address abstract_name = make_address(&name, START + 9);
    check_format(&abstract_name, "unix:@abstract");
    CHECK_INT(tsrv_address_port(&abstract_name), 0);
#endif
}

TEST_ONCE(unknown_address_is_harmless)
{
    char buffer[TSRV_ADDRESS_SIZE];
    tsrv_address address;
    memset(&address, 0, sizeof address);
    CHECK_INT(tsrv_address_port(&address), 0);
    CHECK_INT(tsrv_address_family(&address), 0);
    memset(buffer, '#', sizeof buffer);
    CHECK(tsrv_address_format(&address, buffer, sizeof buffer) == buffer);
    CHECK(strlen(buffer) < sizeof buffer - 1);
}

/* Whether a path is served cannot be told without a descriptor: then its file has to stay. */
TEST_ONCE(test_unix_path_stays_when_descriptors_are_out)
{
    char directory[] = "/tmp/tsrv-test-XXXXXX", path[64];
    int served, second = -1, spare;
    struct rlimit limit, low;
    CHECK(mkdtemp(directory) != NULL);
    snprintf(path, sizeof path, "%s/s", directory);
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &served), TSRV_OK);
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    spare = dup(0);
    CHECK(spare >= 0);
    low = limit;
    low.rlim_cur = (rlim_t)spare;
    CHECK(close(spare) == 0 && setrlimit(RLIMIT_NOFILE, &low) == 0);
    CHECK_INT(tsrv_bind_unix_socket(path, NULL, &second), -EMFILE);
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    CHECK_INT(second, -1);
    CHECK(access(path, F_OK) == 0);
    t_close(served);
    CHECK(unlink(path) == 0 && rmdir(directory) == 0);
}

/* Without a directory in front of it the file is made where the process is, and its lock is the directory's. */
TEST_ONCE(unix_path_without_a_directory)
{
    char directory[] = "/tmp/tsrv-test-XXXXXX", here[1024];
    int fd = -1, second = -1;
    CHECK(getcwd(here, sizeof here) != NULL && mkdtemp(directory) != NULL && chdir(directory) == 0);
    CHECK_INT(tsrv_bind_unix_socket("s", NULL, &fd), TSRV_OK);
    CHECK_INT(tsrv_bind_unix_socket("s", NULL, &second), -EADDRINUSE);
    CHECK_INT(second, -1);
    t_close(fd);
    CHECK_INT(tsrv_bind_unix_socket("./s", NULL, &fd), TSRV_OK); /* nobody serves it any more */
    t_close(fd);
    CHECK(unlink("s") == 0 && chdir(here) == 0 && rmdir(directory) == 0);
}
