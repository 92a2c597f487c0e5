/* tsrv_connect and the streams that it makes. Names are looked up in a table of this file, so that
 * nothing is asked of a name server. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "seam.h"

#include <netdb.h>
#include <netinet/in.h>
#ifdef __GLIBC__
#include <arpa/nameser.h>
#include <resolv.h>
#endif
#include <sys/socket.h>

static int fake_getaddrinfo(const char *host, const char *service, const struct addrinfo *hints,
                            struct addrinfo **all);
static void fake_freeaddrinfo(struct addrinfo *all);
static int seen_connect(int fd, const struct sockaddr *address, socklen_t size);

#undef t_sys_getaddrinfo
#undef t_sys_freeaddrinfo
#undef t_sys_connect
#define t_sys_getaddrinfo(...) (t_fault("getaddrinfo") ? EAI_MEMORY : fake_getaddrinfo(__VA_ARGS__))
#define t_sys_freeaddrinfo(...) fake_freeaddrinfo(__VA_ARGS__)
#define t_sys_connect(...) (t_fault("connect") ? -1 : seen_connect(__VA_ARGS__))

#include "script.h"

#include "handlers.h"

#include <arpa/inet.h>
#include <sys/un.h>

/* ---- names --------------------------------------------------------------------------------*/

static const struct {
    const char *name;
    const char *addresses[3];
} names[] = {
    {"localhost", {"127.0.0.1", NULL, NULL}},
    {"both.test", {"::1", "127.0.0.1", NULL}},
    {"two.test", {"127.0.0.2", "127.0.0.1", NULL}},
    {"three.test", {"127.0.0.3", "127.0.0.2", "127.0.0.1"}},
    {"hung.test", {"127.0.0.1", NULL, NULL}}, /* whose server answers late */
};

static int lookups_open; /* results that have not been freed */
static int lookups_hung, most_hung, server_answers; /* atomic */

/* What other threads do while the loop goes on. */
static void wait_for_server(void)
{
    int now = __atomic_add_fetch(&lookups_hung, 1, __ATOMIC_SEQ_CST);
    CHECK(tsrvi_thread.running == NULL);
    if (now > __atomic_load_n(&most_hung, __ATOMIC_SEQ_CST)) {
        __atomic_store_n(&most_hung, now, __ATOMIC_SEQ_CST);
    }
    while (!__atomic_load_n(&server_answers, __ATOMIC_SEQ_CST)) {
        usleep(500);
    }
    __atomic_sub_fetch(&lookups_hung, 1, __ATOMIC_SEQ_CST);
}

#ifdef __GLIBC__
static struct sockaddr_in name_server; /* of libc's own resolver, for silent.test */

static int ask_name_server(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **all)
{
    CHECK_INT(res_init(), 0); /* this thread's */
    _res.nsaddr_list[0] = name_server;
    _res.nscount = 1;
    _res.retrans = 2; /* seconds */
    _res.retry = 1;
    _res.options &= ~(unsigned long)(RES_DNSRCH | RES_DEFNAMES);
    return getaddrinfo(host, service, hints, all);
}
#endif

static void let_server_answer(bool answers)
{
    __atomic_store_n(&server_answers, answers, __ATOMIC_SEQ_CST);
}

static int fake_getaddrinfo(const char *host, const char *service, const struct addrinfo *hints,
                            struct addrinfo **all)
{
    struct addrinfo number = *hints, **end = all;
    const char *const none[3] = {host, NULL, NULL};
    const char *const *addresses = none;
    number.ai_flags |= AI_NUMERICHOST;
    if (strncmp(host, "hung.", 5) == 0 && (hints->ai_flags & AI_NUMERICHOST) == 0) {
        wait_for_server();
    }
#ifdef __GLIBC__
    if (strcmp(host, "silent.test") == 0 && (hints->ai_flags & AI_NUMERICHOST) == 0) {
        return ask_name_server(host, service, hints, all);
    }
#endif
    for (size_t i = 0; i < COUNT(names) && (hints->ai_flags & AI_NUMERICHOST) == 0; i++) {
        addresses = host != NULL && strcmp(names[i].name, host) == 0 ? names[i].addresses : addresses;
    }
    *all = NULL;
    for (int i = 0; i < 3 && addresses[i] != NULL; i++) {
        int rc = getaddrinfo(addresses[i], service, &number, end);
        if (rc != 0) {
            return rc; /* of the first: all others are good numbers */
        }
        __atomic_add_fetch(&lookups_open, 1, __ATOMIC_SEQ_CST);
        end = &(*end)->ai_next;
    }
    return *all == NULL ? EAI_NONAME : 0;
}

static void fake_freeaddrinfo(struct addrinfo *all)
{
    while (all != NULL) {
        struct addrinfo *next = all->ai_next;
        all->ai_next = NULL;
        freeaddrinfo(all);
        __atomic_sub_fetch(&lookups_open, 1, __ATOMIC_SEQ_CST);
        all = next;
    }
}

static void (*before_connect)(int fd, const struct sockaddr *address, socklen_t size);
static int connects;
static bool interrupt_connect; /* the next one is begun, and then says that a signal came */
static bool connect_at_once;   /* they are over when they return, as a system may have it for its own addresses */

static int seen_connect(int fd, const struct sockaddr *address, socklen_t size)
{
    connects++;
    if (before_connect != NULL) {
        before_connect(fd, address, size);
    }
    int flags = fcntl(fd, F_GETFL);
    CHECK(!connect_at_once || fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) == 0);
    int rc = connect(fd, address, size);
    CHECK(!connect_at_once || fcntl(fd, F_SETFL, flags) == 0);
    if (interrupt_connect) {
        interrupt_connect = false;
        errno = EINTR;
        rc = -1;
    }
    return rc;
}

/* ---- a coroutine that is the test ---------------------------------------------------------*/

typedef struct script {
    void (*function)(void);
    int done;
} script;

static void run_script(void *context)
{
    script *s = (script *)context;
    s->function();
    s->done = 1;
}

/* Calls function as a coroutine of s_loop, and waits until it has returned. */
static void in_coroutine(void (*function)(void))
{
    script s = {function, 0};
    CHECK_INT(tsrv_spawn(s_loop, run_script, &s), TSRV_OK);
    s_until(&s.done, 1);
}

/* A loop without a server for one such script; then everything is given back. */
static void alone(void (*function)(void))
{
    s_open_loop();
    in_coroutine(function);
    s_settle();
    CHECK_INT(tsrv_loop_run(s_loop), TSRV_OK); /* nothing is left */
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
    CHECK_INT(lookups_open, 0);
}

static int connect_rc(const char *host, int port, int timeout_ms)
{
    tsrv_connect_options options = {0};
    options.timeout_ms = timeout_ms;
    tsrv_stream *stream = (tsrv_stream *)&options;
    int rc = tsrv_connect(host, port, &options, &stream);
    CHECK((rc == TSRV_OK) == (stream != NULL));
    if (rc == TSRV_OK) {
        CHECK_INT(tsrv_close(stream), TSRV_OK);
    }
    return rc;
}

static tsrv_stream *connected(const char *host, int port)
{
    tsrv_stream *stream;
    CHECK_INT(tsrv_connect(host, port, NULL, &stream), TSRV_OK);
    CHECK(stream != NULL);
    return stream;
}

static int listener_at(const char *address, int *port, int backlog)
{
    struct sockaddr_in where;
    socklen_t size = sizeof where;
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    memset(&where, 0, sizeof where);
    where.sin_family = AF_INET;
    where.sin_port = htons((uint16_t)*port);
    CHECK(inet_pton(AF_INET, address, &where.sin_addr) == 1);
    CHECK(fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0);
    CHECK(bind(fd, (struct sockaddr *)&where, sizeof where) == 0);
    CHECK(backlog < 0 || listen(fd, backlog) == 0);
    CHECK(getsockname(fd, (struct sockaddr *)&where, &size) == 0);
    *port = ntohs(where.sin_port);
    return fd;
}

static int accepted(int listener)
{
    int fd = accept(listener, NULL, NULL);
    CHECK(fd >= 0);
    t_prepare(fd);
    return fd;
}

static void open_echo(void)
{
    tsrv_server_options options = {0};
    options.handle_stream = echo_bytes;
    s_open(options);
}

/* Gives the server time to see its clients go. */
static void close_echo(void)
{
    s_settle();
    s_close();
    CHECK_INT(lookups_open, 0);
}

/* ---- where to -----------------------------------------------------------------------------*/

static void talk(const char *host, int port, const char *peer)
{
    tsrv_stream *stream = connected(host, port);
    tsrv_slice line;
    tsrv_address address;
    char text[TSRV_ADDRESS_SIZE];
    CHECK_INT(tsrv_write(stream, "hello\n", 6), TSRV_OK);
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_OK);
    CHECK_MEM(line.data, line.size, "hello\n", 6);
    CHECK_INT(tsrv_peer_address(stream, &address), TSRV_OK);
    CHECK_STR(tsrv_address_format(&address, text, sizeof text), peer);
    CHECK(tsrv_stream_server(stream) == NULL);
    CHECK(tsrv_stream_loop(stream) == s_loop);
    CHECK(tsrv_data(stream) == NULL);
    CHECK_INT(tsrv_stopping(stream), false);
    CHECK_INT(tsrv_error(stream), TSRV_OK);
    CHECK(fcntl(tsrv_fd(stream), F_GETFL) & O_NONBLOCK);
    CHECK_INT(fcntl(tsrv_fd(stream), F_GETFD), FD_CLOEXEC);
    if (tsrv_address_family(&address) != AF_UNIX) {
        CHECK(t_socket_option(tsrv_fd(stream), IPPROTO_TCP, TCP_NODELAY) != 0);
    }
    CHECK_INT(tsrv_shutdown(stream), TSRV_OK);
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_EOF);
    CHECK_INT(tsrv_close(stream), TSRV_OK);
}

static void talk_by_number(void)
{
    char peer[64];
    snprintf(peer, sizeof peer, "127.0.0.1:%d", s_port);
    talk("127.0.0.1", s_port, peer);
    talk("localhost", s_port, peer);
    talk("both.test", s_port, peer); /* nobody listens on ::1 */
}

TEST_COROUTINE(connects_by_number_and_by_name)
{
    open_echo();
    in_coroutine(talk_by_number);
    close_echo();
}

static void talk_over_6(void)
{
    char peer[64];
    snprintf(peer, sizeof peer, "[::1]:%d", s_port);
    talk("::1", s_port, peer);
    talk("[::1]", s_port, peer);
    talk("both.test", s_port, peer); /* nobody listens on 127.0.0.1 */
}

TEST_COROUTINE(connects_over_ipv6)
{
    tsrv_server_options options = {0};
    tsrv_address address;
    options.handle_stream = echo_bytes;
    s_open_loop();
    s_server = s_new_server(options);
    int rc = tsrv_server_listen(s_server, 0, "::1", NULL);
    if (rc == -EADDRNOTAVAIL || rc == -EAFNOSUPPORT) {
        fprintf(stderr, "%s\n", t_log);
        SKIP("IPv6");
    }
    CHECK_INT(rc, TSRV_OK);
    CHECK_INT(tsrv_server_address(s_server, 0, &address), TSRV_OK);
    s_port = tsrv_address_port(&address);
    in_coroutine(talk_over_6);
    close_echo();
}

static char unix_name[96];

static void talk_over_unix(void)
{
    talk(unix_name, 0, unix_name);
    talk(unix_name, -5, unix_name); /* the port does not matter */
}

static void serve_unix(const char *name)
{
    tsrv_server_options options = {0};
    options.handle_stream = echo_bytes;
    s_open_loop();
    s_server = s_new_server(options);
    snprintf(unix_name, sizeof unix_name, "%s", name);
    CHECK_INT(tsrv_server_listen(s_server, 0, unix_name, NULL), TSRV_OK);
    in_coroutine(talk_over_unix);
    close_echo();
}

TEST_COROUTINE(connects_to_unix_sockets)
{
    char folder[] = "/tmp/client_test.XXXXXX", name[96];
    CHECK(mkdtemp(folder) != NULL);
    snprintf(name, sizeof name, "unix:%s/socket", folder);
    serve_unix(name);
    CHECK(rmdir(folder) == 0); /* the socket's file went with the server */
#ifdef __linux__
    snprintf(name, sizeof name, "unix:@client_test.%ld", (long)getpid());
    serve_unix(name);
#endif
}

/* A message for each connection, which nobody waits for. */
static void send_over_many(void)
{
    tsrv_stream *stream;
    for (int i = 0; i < 600; i++) {
        CHECK_INT(tsrv_connect(unix_name, 0, NULL, &stream), TSRV_OK);
        CHECK_MOST(s_loop->servers.clients->open, 100); /* those that linger */
        CHECK_INT(tsrv_write(stream, "message\n", 8), TSRV_OK);
        CHECK_INT(tsrv_close(stream), TSRV_OK);
    }
}

/* Others run meanwhile, and what was closed is: a unix socket's connection could do without a wait. */
TEST_COROUTINE(connections_to_unix_sockets_let_others_run)
{
    tsrv_server_options options = {0};
    char folder[] = "/tmp/client_test.XXXXXX";
    CHECK(mkdtemp(folder) != NULL);
    options.handle_stream = echo_bytes;
    s_open_loop();
    s_server = s_new_server(options);
    snprintf(unix_name, sizeof unix_name, "unix:%s/socket", folder);
    CHECK_INT(tsrv_server_listen(s_server, 0, unix_name, NULL), TSRV_OK);
    in_coroutine(send_over_many);
    s_settle();
    CHECK_INT(s_stats().accepted, 600);
    close_echo();
    CHECK(rmdir(folder) == 0);
}

/* ---- where to not -------------------------------------------------------------------------*/

static void connect_refused(void)
{
    int port = t_free_port();
    CHECK_INT(connect_rc("127.0.0.1", port, 0), -ECONNREFUSED);
    CHECK_INT(connect_rc("two.test", port, 0), -ECONNREFUSED);
    CHECK_INT(connect_rc("unix:/nobody/is/here", 0, 0), -ENOENT);
    CHECK_INT(t_log_lines, 0);
}

/* Tornado's test_connection_refused. */
TEST_LOOP(test_connection_refused)
{
    alone(connect_refused);
}

static void resolve_in_vain(void)
{
    char name[300];
    int port = t_free_port();
    tsrv_stream *stream;
    CHECK_INT(connect_rc("", port, 0), TSRV_ERESOLVE);
    CHECK_INT(connect_rc("no.such.name", port, 0), TSRV_ERESOLVE);
    CHECK_INT(connect_rc("300.1.1.1", port, 0), TSRV_ERESOLVE);
    CHECK_INT(connect_rc("[]", port, 0), TSRV_ERESOLVE);
    CHECK_INT(connect_rc("[127.0.0.1]", port, 0), TSRV_ERESOLVE);
    CHECK_INT(connect_rc("[localhost]", port, 0), TSRV_ERESOLVE);
    snprintf(name, sizeof name, "[%0150d]", 0);
    CHECK_INT(connect_rc(name, port, 0), TSRV_ERESOLVE);
    snprintf(name, sizeof name, "unix:/%0150d", 0);
    CHECK_INT(connect_rc(name, 0, 0), -ENAMETOOLONG);
    CHECK_INT(t_log_lines, 0);
    CHECK_INT(connect_rc("127.0.0.1", 0, 0), TSRV_EINVAL);
    CHECK_INT(connect_rc("127.0.0.1", -1, 0), TSRV_EINVAL);
    CHECK_INT(connect_rc("127.0.0.1", 65536, 0), TSRV_EINVAL);
    CHECK_INT(connect_rc(NULL, port, 0), TSRV_EINVAL);
    memset(name, 'x', 256);
    name[256] = 0;
    CHECK_INT(connect_rc(name, port, 0), TSRV_EINVAL);
    CHECK_INT(tsrv_connect(name, port, NULL, &stream), TSRV_EINVAL);
    name[255] = 0;
    CHECK_INT(tsrv_connect(name, port, NULL, &stream), TSRV_ERESOLVE);
}

/* Tornado's test_gaierror. */
TEST_LOOP(test_gaierror)
{
    alone(resolve_in_vain);
}

/* ---- names that are found late ------------------------------------------------------------*/

enum { ASKERS = 7 };
static int asked, answers, expected_answer, ticks;

static void ask_hung(void *context)
{
    (void)context;
    asked++;
    CHECK_INT(connect_rc("hung.test", s_port, 300), expected_answer);
    answers++;
}

static void tick(void *context)
{
    ticks++;
    if (answers < asked) {
        CHECK_INT(tsrv_timer_start(s_loop, (tsrv_timer *)context, 10, tick, context), TSRV_OK);
    }
}

static void work_beside(void)
{
    CHECK_INT(tsrv_run_in_thread(nothing, NULL), TSRV_OK);
}

static void open_hung(int askers, int expected)
{
    s_open_loop();
    asked = answers = ticks = most_hung = 0;
    expected_answer = expected;
    s_port = t_free_port();
    let_server_answer(false);
    for (int i = 0; i < askers; i++) {
        CHECK_INT(tsrv_spawn(s_loop, ask_hung, NULL), TSRV_OK);
    }
}

/* The loop turns meanwhile, each asker has its limit, and no more than half of the threads hang. */
TEST_LOOP(name_server_that_does_not_answer_holds_nobody_up)
{
    tsrv_timer timer = {0};
    int64_t start = v_ms();
    open_hung(ASKERS, TSRV_ETIMEOUT);
    v_hung = true;
    CHECK_INT(tsrv_timer_start(s_loop, &timer, 10, tick, &timer), TSRV_OK);
    s_until(&answers, ASKERS);
    CHECK(v_ms() - start >= 300 && v_ms() - start < 600);
    CHECK(ticks >= 20);
    CHECK(most_hung >= 1 && most_hung <= 2);
    in_coroutine(work_beside);
    let_server_answer(true); /* too late */
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
    CHECK_INT(lookups_open, 0);
    CHECK_INT(lookups_hung, 0);
    CHECK_INT(t_live_allocations, 0);
}

#ifdef __GLIBC__
static void ask_silence(void *context)
{
    *(int64_t *)context = t_now_ms();
    CHECK_INT(connect_rc("silent.test", s_port, 1500), TSRV_ETIMEOUT);
    *(int64_t *)context = t_now_ms() - *(int64_t *)context;
    answers++;
}

static int64_t last_tick, longest_gap; /* in ms */

static void note_gap(void *context)
{
    int64_t now = t_now_ms();
    longest_gap = now - last_tick > longest_gap ? now - last_tick : longest_gap;
    last_tick = now;
    CHECK_INT(tsrv_timer_start(s_loop, (tsrv_timer *)context, 1, note_gap, context), TSRV_OK);
}

/* The same with libc's resolver and a name server that takes its questions and says nothing for two seconds, and with
 * a server beside it: in no turn of the loop is that waited for. */
TEST_LOOP(turns_are_short_while_a_name_server_is_silent)
{
    int port, dns = t_raw_socket(SOCK_DGRAM, false, &port);
    char question[512];
    int64_t took;
    tsrv_timer timer = {0};
    t_use_real_time();
    t_prepare(dns);
    name_server = t_address(port);
    open_echo();
    answers = 0;
    longest_gap = 0;
    last_tick = t_now_ms();
    note_gap(&timer);
    CHECK_INT(tsrv_spawn(s_loop, ask_silence, &took), TSRV_OK);
    int client = t_connect(s_port);
    do {
        s_echo(client, "hello\n");
    } while (answers == 0);
    CHECK_NEAR_MS(took, 1500, 1900);
    CHECK(t_recv(dns, question, 12) == 12); /* a header of DNS */
    CHECK_NEAR_MS(longest_gap, 1, 1000 / t_scale()); /* usually 2 */
    tsrv_timer_stop(&timer);
    t_close(client);
    close_echo(); /* waits for the look-up */
    t_close(dns);
}
#endif

static void answer(void *context)
{
    (void)context;
    let_server_answer(true);
}

/* In turn. */
TEST_LOOP(names_that_are_found_late_are_used)
{
    tsrv_timer timer = {0};
    open_hung(ASKERS, -ECONNREFUSED);
    v_hung = true;
    CHECK_INT(tsrv_timer_start(s_loop, &timer, 100, answer, NULL), TSRV_OK);
    while (__atomic_load_n(&server_answers, __ATOMIC_SEQ_CST) == 0) {
        s_turn();
    }
    v_hung = false;
    s_until(&answers, ASKERS);
    CHECK_INT(tsrv_loop_run(s_loop), TSRV_OK);
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
    CHECK_INT(lookups_open, 0);
    CHECK_INT(t_live_allocations, 0);
}

/* Who waits for a turn gets it, also when the one before has found no memory for it. */
static void ask_in_vain(void *context)
{
    (void)context;
    asked++;
    int rc = connect_rc("hung.test", s_port, TSRV_NEVER);
    CHECK(rc == -ECONNREFUSED || rc == -ENOMEM);
    answers++;
}

TEST_LOOP(turn_that_is_lost_goes_to_the_next)
{
    tsrv_loop_options options = {0};
    options.backend = t_backend;
    options.max_threads = 1;
    CHECK_INT(tsrv_loop_new(&s_loop, &options), TSRV_OK);
    asked = answers = 0;
    s_port = t_free_port();
    let_server_answer(false);
    for (int i = 0; i < 3; i++) {
        CHECK_INT(tsrv_spawn(s_loop, ask_in_vain, NULL), TSRV_OK);
    }
    CHECK(tsrv_loop_run_once(s_loop, 0) > 0);
    CHECK_INT(asked, 3);
    t_fail_call("malloc", 0, 1, false); /* the second's */
    let_server_answer(true);
    s_until(&answers, 3);
    CHECK_INT(t_fault_hits, 1);
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
}

static void *answer_later(void *context)
{
    while (__atomic_load_n(&lookups_hung, __ATOMIC_SEQ_CST) == 0) {
        usleep(500);
    }
    usleep(20000);
    answer(NULL);
    return context;
}

TEST_LOOP(freeing_the_loop_ends_lookups)
{
    pthread_t server;
    open_hung(3, TSRV_ECLOSED);
    CHECK(tsrv_loop_run_once(s_loop, 0) > 0);
    CHECK_INT(pthread_create(&server, NULL, answer_later, NULL), 0);
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
    CHECK_INT(pthread_join(server, NULL), 0);
    CHECK_INT(answers, 3);
    CHECK_INT(lookups_open, 0);
    CHECK_INT(t_live_allocations, 0);
}

static bool is_looked_up(void *context)
{
    (void)context;
    return __atomic_load_n(&s_loop->sources.posts, __ATOMIC_ACQUIRE) != NULL;
}

/* The answer is there, but the loop goes before it has seen it. */
TEST_LOOP(answer_that_comes_with_the_end_of_the_loop_is_given_back)
{
    open_hung(1, TSRV_ECLOSED);
    CHECK(tsrv_loop_run_once(s_loop, 0) > 0);
    let_server_answer(true);
    CHECK(t_wait_until(is_looked_up, NULL));
    CHECK_INT(lookups_open, 1);
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
    CHECK_INT(answers, 1);
    CHECK_INT(lookups_open, 0);
    CHECK_INT(t_live_allocations, 0);
}

static void ask_for_nothing(void *context)
{
    *(int *)context = connect_rc("hung.nothing.test", 1, 100);
    answers++;
}

/* Nor is there anything to give back where nothing was found for somebody who has gone. */
TEST_LOOP(name_that_is_not_found_in_time)
{
    int rc = 1;
    s_open_loop();
    let_server_answer(false);
    CHECK_INT(tsrv_spawn(s_loop, ask_for_nothing, &rc), TSRV_OK);
    v_hung = true;
    s_until(&answers, 1);
    CHECK_INT(rc, TSRV_ETIMEOUT);
    v_hung = false;
    let_server_answer(true);
    CHECK_INT(tsrv_loop_run(s_loop), TSRV_OK);
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
    CHECK_INT(lookups_open, 0);
    CHECK_INT(t_live_allocations, 0);
}

static int late_rc;

static void connect_when_told(void *context)
{
    CHECK_INT(tsrv_sleep(1000000), TSRV_ECLOSED);
    late_rc = connect_rc(context == NULL ? "127.0.0.1" : (const char *)context, s_port, TSRV_NEVER);
}

/* As the handlers that are left when a drain is over: see the field. */
static void connect_when_doomed(void *context)
{
    tsrvi_co_self()->doomed = true;
    late_rc = connect_rc((const char *)context, 1, TSRV_NEVER);
}

/* To a unix socket nothing is waited for but the others' turn, and that is a wait as well. */
TEST_LOOP(who_may_not_wait_does_not_connect_to_a_unix_socket)
{
    static char nowhere[] = "unix:/nowhere";
    s_open_loop();
    CHECK_INT(tsrv_spawn(s_loop, connect_when_doomed, nowhere), TSRV_OK);
    CHECK(tsrv_loop_run_once(s_loop, 0) >= 0);
    CHECK_INT(late_rc, TSRV_ECLOSED);
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
    CHECK_INT(t_live_allocations, 0);
}

/* What begins when the loop is being freed would be dropped with its socket. */
TEST_LOOP(nothing_is_connected_by_a_loop_that_is_freed)
{
    static char nowhere[] = "unix:/nowhere";
    int listener = t_raw_socket(SOCK_STREAM, true, &s_port);
    for (int unix_too = 0; unix_too < 2; unix_too++) {
        s_open_loop();
        late_rc = 1;
        CHECK_INT(tsrv_spawn(s_loop, connect_when_told, unix_too ? nowhere : NULL), TSRV_OK);
        CHECK(tsrv_loop_run_once(s_loop, 0) > 0);
        CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
        CHECK_INT(late_rc, TSRV_ECLOSED);
        CHECK_INT(t_live_allocations, 0);
    }
    t_close(listener);
}

TEST_ONCE(time_that_is_left_is_at_least_one_and_fits)
{
    CHECK_INT(tsrvi_client_left_ms(0), 1);
    CHECK_INT(tsrvi_client_left_ms(TSRVI_FOREVER), TSRV_NEVER);
    CHECK_INT(tsrvi_client_left_ms(tsrvi_clock() + ((uint64_t)INT_MAX + 9) * TSRVI_MS), INT_MAX);
    CHECK_INT(tsrvi_client_left_ms(v_now + 5 * TSRVI_MS), 5);
}

static void look_up_without(void)
{
    t_fail_call("pthread_create", 0, 1, true);
    CHECK_INT(connect_rc("localhost", 1, 0), -EAGAIN);
    CHECK_INT(connect_rc("127.0.0.1", t_free_port(), 0), -ECONNREFUSED);
    CHECK_INT(connect_rc("[]", 1, 0), TSRV_ERESOLVE); /* no name, and so nothing to ask for */
    for (long at = 1; at <= 3; at++) {
        t_fail_call("malloc", 0, at, false);
        CHECK_INT(connect_rc("localhost", 1, 0), -ENOMEM);
        t_fail_call(NULL, 0, 0, false);
    }
}

TEST_LOOP(looking_up_without_a_thread_or_memory_is_a_code)
{
    alone(look_up_without);
}

/* The first call asks whether it is a number, the second is the thread's. */
static void look_up_without_memory(void)
{
    t_fail_call("getaddrinfo", 0, 2, false);
    CHECK_INT(connect_rc("localhost", 1, 0), -ENOMEM);
    CHECK_INT(t_fault_hits, 1);
    CHECK_INT(t_log_lines, 0);
}

/* What a thread could not find out has its own code, and is not called unknown. */
TEST_LOOP(name_that_a_thread_finds_no_memory_for)
{
    alone(look_up_without_memory);
}

/* The first connection needs what all of them belong to. */
static void connect_without_memory(void)
{
    t_fail_call("malloc", 0, 1, false);
    CHECK_INT(connect_rc("unix:/nowhere", 0, 0), -ENOMEM);
    CHECK_INT(t_fault_hits, 1);
    CHECK_INT(connect_rc("unix:/nowhere", 0, 0), -ENOENT);
}

TEST_LOOP(first_connection_without_memory_is_a_code)
{
    alone(connect_without_memory);
}

static int timer_rc;

static void connect_in_a_timer(void *context)
{
    (void)context;
    timer_rc = connect_rc("127.0.0.1", s_port, 0);
}

static int connect_in_a_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    return connect_rc("127.0.0.1", s_port, 0) == TSRV_EINVAL ? 7 : 8;
}

TEST_CALLBACK(connecting_needs_a_coroutine)
{
    tsrv_server_options options = {0};
    tsrv_timer timer = {0};
    options.handle_stream = connect_in_a_handler;
    options.on_close = t_record_reason;
    s_open(options);
    CHECK_INT(connect_rc("127.0.0.1", s_port, 0), TSRV_EINVAL); /* outside the loop */
    CHECK_INT(tsrv_timer_start(s_loop, &timer, 0, connect_in_a_timer, NULL), TSRV_OK);
    int fd = t_connect(s_port);
    s_leave(fd);
    s_settle();
    CHECK_INT(timer_rc, TSRV_EINVAL);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(t_recorded(0), 7);
    s_close();
}

/* ---- time ---------------------------------------------------------------------------------*/

/* A listener on loopback whose queue is full: Linux drops what is sent to it then. */
enum { FILLERS = 3 };

typedef struct deaf {
    int listener, port, fillers[FILLERS];
} deaf;

#ifdef __linux__
static deaf open_deaf(const char *address, int port)
{
    deaf d = {-1, port, {0}};
    struct sockaddr_in where;
    d.listener = listener_at(address, &d.port, 0);
    memset(&where, 0, sizeof where);
    where.sin_family = AF_INET;
    where.sin_port = htons((uint16_t)d.port);
    CHECK(inet_pton(AF_INET, address, &where.sin_addr) == 1);
    for (int i = 0; i < FILLERS; i++) {
        d.fillers[i] = socket(AF_INET, SOCK_STREAM, 0);
        CHECK(d.fillers[i] >= 0 && fcntl(d.fillers[i], F_SETFL, O_NONBLOCK) == 0);
        CHECK(connect(d.fillers[i], (struct sockaddr *)&where, sizeof where) != 0);
        CHECK_INT(errno, EINPROGRESS);
    }
    return d;
}
#endif

static void close_deaf(deaf *d)
{
    t_close_all(d->fillers, FILLERS);
    t_close(d->listener);
}

#ifdef __linux__
static void expect_timeout(const char *host, int port, int timeout_ms, int expected_ms)
{
    int64_t start = v_ms();
    CHECK_INT(connect_rc(host, port, timeout_ms), TSRV_ETIMEOUT);
    if (v_ms() - start < expected_ms || v_ms() - start > expected_ms + 60) {
        T_FAIL("%d ms became %lld", expected_ms, (long long)(v_ms() - start));
    }
}

static void time_out(void)
{
    deaf d = open_deaf("127.0.0.1", 0);
    expect_timeout("127.0.0.1", d.port, 500, 500);
    expect_timeout("localhost", d.port, 1, 1);
    expect_timeout("127.0.0.1", d.port, 0, 10000);
    close_deaf(&d);
}

TEST_LOOP(connecting_has_a_time_limit)
{
    alone(time_out);
}

/* A port that is free at every address, and below those that the kernel gives to other tests. */
static int port_of_all(void)
{
    for (int port = 20000 + (int)getpid() % 10000; port < 32000; port++) {
        struct sockaddr_in any;
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        memset(&any, 0, sizeof any);
        any.sin_family = AF_INET;
        any.sin_port = htons((uint16_t)port);
        CHECK(fd >= 0);
        bool is_free = bind(fd, (struct sockaddr *)&any, sizeof any) == 0;
        t_close(fd);
        if (is_free) {
            return port;
        }
    }
    T_FAIL("no port is free");
}

static int64_t connects_after(const char *host, int port)
{
    int64_t start = v_ms();
    connects = 0;
    CHECK_INT(connect_rc(host, port, 3000), TSRV_OK);
    return v_ms() - start;
}

/* An address that says nothing has 250 ms before the next one is tried, one that refuses has none. */
static void race_addresses(void)
{
    int fds = t_open_fds();
    deaf third = open_deaf("127.0.0.3", port_of_all());
    int listener = listener_at("127.0.0.1", &third.port, 16);
    int64_t ms = connects_after("three.test", third.port); /* .3 deaf, .2 refuses */
    CHECK(ms >= 250 && ms < 320);
    CHECK_INT(connects, 3);

    deaf second = open_deaf("127.0.0.2", third.port);
    ms = connects_after("three.test", third.port);
    CHECK(ms >= 500 && ms < 600);
    t_close(listener);

    deaf first = open_deaf("127.0.0.1", third.port);
    expect_timeout("three.test", third.port, 3000, 3000);
    expect_timeout("three.test", third.port, 300, 300);
    close_deaf(&first);
    close_deaf(&second);
    close_deaf(&third);
    CHECK(t_open_fds() <= fds + 1); /* of the thread's that looks names up there is none */
}

TEST_LOOP(addresses_are_tried_as_rfc_8305_has_it)
{
    alone(race_addresses);
}

/* A late answer of the first still wins. */
static deaf late;
static int late_accepted;

static void let_first_in(void *context)
{
    (void)context;
    for (int i = 0; i < FILLERS; i++) {
        t_close(late.fillers[i]);
    }
    for (int i = 0; i < FILLERS + 2; i++) { /* the queue is empty then, and what is sent again gets in */
        int fd = accept4(late.listener, NULL, NULL, SOCK_NONBLOCK);
        if (fd >= 0) {
            t_close(fd);
            late_accepted++;
        }
    }
}

static void win_late(void)
{
    tsrv_timer timer = {0};
    tsrv_stream *stream;
    tsrv_connect_options options = {0};
    options.timeout_ms = TSRV_NEVER;
    tsrv_address peer;
    late = open_deaf("127.0.0.2", port_of_all());
    CHECK(fcntl(late.listener, F_SETFL, O_NONBLOCK) == 0);
    deaf other = open_deaf("127.0.0.1", late.port);
    CHECK_INT(tsrv_timer_start(s_loop, &timer, 600, let_first_in, NULL), TSRV_OK);
    CHECK_INT(tsrv_connect("two.test", late.port, &options, &stream), TSRV_OK);
    CHECK(late_accepted > 0);
    CHECK_INT(tsrv_peer_address(stream, &peer), TSRV_OK);
    char text[TSRV_ADDRESS_SIZE], expected[64];
    snprintf(expected, sizeof expected, "127.0.0.2:%d", late.port);
    CHECK_STR(tsrv_address_format(&peer, text, sizeof text), expected);
    CHECK_INT(tsrv_close(stream), TSRV_OK);
    close_deaf(&other);
    t_close(late.listener);
}

TEST_LOOP(late_answer_of_the_first_address_wins)
{
    alone(win_late);
}

/* The order of what a name has. */
TEST_LOOP(families_take_turns)
{
    static const int families[] = {AF_INET6, AF_INET6, AF_INET6, AF_INET, AF_INET6, AF_INET};
    static const int expected[] = {0, 3, 1, 5, 2, 4};
    struct addrinfo all[6];
    tsrvi_dial dials[6];
    memset(all, 0, sizeof all);
    for (int i = 0; i < 6; i++) {
        all[i].ai_family = families[i];
        all[i].ai_next = i < 5 ? &all[i + 1] : NULL;
    }
    CHECK_INT(tsrvi_dials_order(dials, all), 6);
    for (int i = 0; i < 6; i++) {
        CHECK_INT(dials[i].info - all, expected[i]);
    }
    CHECK_INT(tsrvi_dials_order(dials, &all[5]), 1);
    CHECK(dials[0].info == &all[5]);
}

/* ---- a unix listener with a full queue ----------------------------------------------------*/

typedef struct unix_queue {
    struct sockaddr_un address;
    socklen_t size;
    char host[64];
    int listener, filler;
} unix_queue;

static unix_queue queue;

static void open_queue(void)
{
    snprintf(queue.host, sizeof queue.host, "unix:@client_test.full.%ld", (long)getpid());
    memset(&queue.address, 0, sizeof queue.address);
    queue.address.sun_family = AF_UNIX;
    memcpy(queue.address.sun_path + 1, queue.host + 6, strlen(queue.host + 6));
    queue.size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(queue.host + 6));
    queue.listener = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(bind(queue.listener, (struct sockaddr *)&queue.address, queue.size) == 0);
    CHECK(listen(queue.listener, 0) == 0);
    queue.filler = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(connect(queue.filler, (struct sockaddr *)&queue.address, queue.size) == 0);
}

static void close_queue(void)
{
    t_close(queue.filler);
    t_close(queue.listener);
}

static int queue_rc = 1;

static void connect_to_queue(void *context)
{
    tsrv_connect_options options = {0};
    options.timeout_ms = *(int *)context;
    tsrv_stream *stream;
    queue_rc = tsrv_connect(queue.host, 0, &options, &stream);
    if (queue_rc == TSRV_OK) {
        CHECK_INT(tsrv_write(stream, "made it", 7), TSRV_OK);
        CHECK_INT(tsrv_close(stream), TSRV_OK);
    }
    t_record(queue_rc);
}

TEST_LOOP(full_unix_queue_is_waited_for)
{
    int never = TSRV_NEVER;
    s_open_loop();
    open_queue();
    CHECK_INT(tsrv_spawn(s_loop, connect_to_queue, &never), TSRV_OK);
    s_run_ms(20000);
    CHECK_INT(t_record_count(), 0);
    CHECK(connects > 100 && connects < 20000); /* tries again, and does not spin */
    int first = accepted(queue.listener); /* makes room */
    s_run_ms(100);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(queue_rc, TSRV_OK);
    int second = accepted(queue.listener);
    s_expect(second, "made it");
    s_expect_eof(second);
    t_close(first);
    t_close(second);
    close_queue();
    s_settle();
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
}

static void time_out_in_queue(void)
{
    open_queue();
    expect_timeout(queue.host, 0, 300, 300);
    expect_timeout(queue.host, 0, 0, 10000);
    close_queue();
}

TEST_LOOP(full_unix_queue_has_a_time_limit)
{
    alone(time_out_in_queue);
}
#endif

/* ---- faults -------------------------------------------------------------------------------*/

static int port_of_faults, listener_of_faults;

static void connect_under_faults(void)
{
    static const struct {
        const char *call;
        int code, rc;
    } rows[] = {
        {"socket", EMFILE, -EMFILE},           {"socket", ENFILE, -ENFILE},
        {"connect", ENETUNREACH, -ENETUNREACH}, {"connect", EACCES, -EACCES},
        {"getaddrinfo", 0, -ENOMEM},           {"getsockopt", ENOBUFS, -ENOBUFS},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        t_fail_call(rows[i].call, rows[i].code, 1, false);
        int rc = connect_rc("127.0.0.1", port_of_faults, 500);
        long hits = t_fault_hits;
        t_fail_call(NULL, 0, 0, false);
        CHECK_INT(hits, 1);
        CHECK_INT(rc, rows[i].rc);
    }
    t_fail_call("socket", EMFILE, 1, false);
    CHECK_INT(connect_rc("unix:/nobody/is/here", 0, 500), -EMFILE);
    t_fail_call("connect", EINTR, 1, false);
    CHECK_INT(connect_rc("unix:/nobody/is/here", 0, 500), -ENOENT);
    t_fail_call(NULL, 0, 0, false);
    CHECK_INT(connect_rc("[::1", port_of_faults, 500), TSRV_ERESOLVE);
    CHECK_INT(connect_rc("[", port_of_faults, 500), TSRV_ERESOLVE);
    /* Of two addresses the first one fails, the second one is good. */
    t_fail_call("connect", ENETUNREACH, 1, false);
    CHECK_INT(connect_rc("two.test", port_of_faults, 0), TSRV_OK);
    t_fail_call(NULL, 0, 0, false);
}

TEST_LOOP(failing_calls_are_codes)
{
    listener_of_faults = listener_at("127.0.0.1", &port_of_faults, 16);
    alone(connect_under_faults);
    t_close(listener_of_faults);
}

static void connect_without_a_descriptor(void)
{
    t_fail_call("socket", EPERM, 1, true); /* -1, as a code */
    CHECK_INT(connect_rc("unix:/nobody/is/here", 0, 500), -EPERM);
    CHECK_INT(connect_rc("127.0.0.1", 1, 500), -EPERM);
    t_fail_call(NULL, 0, 0, false);
}

/* The number that is none is nobody's: a listener that was stopped has it, too. */
TEST_LOOP(socket_that_cannot_be_made_is_no_listeners)
{
    open_echo();
    tsrv_server_stop(s_server);
    in_coroutine(connect_without_a_descriptor);
    CHECK_INT(t_log_lines, 0);
    s_settle();
    CHECK_INT(tsrv_loop_run(s_loop), TSRV_OK); /* nothing is left */
    CHECK_INT(s_loop->active, 0);
    s_close();
}

/* A connect that a signal interrupts goes on in the kernel. */
static void connect_interrupted(void)
{
    interrupt_connect = true;
    CHECK_INT(connect_rc("127.0.0.1", port_of_faults, 500), TSRV_OK);
    CHECK_INT(interrupt_connect, false);
    CHECK_INT(connects, 1);
    interrupt_connect = true;
    CHECK_INT(connect_rc("127.0.0.1", t_free_port(), 500), -ECONNREFUSED);
}

TEST_LOOP(interrupted_connect_is_waited_for)
{
    listener_of_faults = listener_at("127.0.0.1", &port_of_faults, 16);
    alone(connect_interrupted);
    t_close(listener_of_faults);
}

/* Every call in turn fails once; whatever it was, nothing is left of the attempt. */
static const char *fault_host;

static int connect_and_echo(void)
{
    tsrv_connect_options options = {0};
    options.timeout_ms = 2000;
    tsrv_stream *stream;
    tsrv_slice line;
    int rc = tsrv_connect(fault_host, s_port, &options, &stream);
    if (rc != TSRV_OK) {
        CHECK(stream == NULL);
        return rc;
    }
    CHECK(stream != NULL);
    if ((rc = tsrv_write(stream, "hello\n", 6)) == TSRV_OK) {
        tsrv_set_timeout(stream, 2000, 2000);
        rc = tsrv_read_until(stream, "\n", 0, &line);
        if (rc == TSRV_OK) {
            CHECK_MEM(line.data, line.size, "hello\n", 6);
        }
    }
    CHECK_INT(tsrv_close(stream), TSRV_OK);
    return rc;
}

static long fault_total, fault_at;
static int fault_rc;

static void fault_script(void)
{
    t_fail_call(NULL, 0, fault_at, false);
    fault_rc = connect_and_echo();
    fault_total = t_fault_calls;
    t_fail_call(NULL, 0, 0, false);
}

static void one_fault(long at)
{
    long live = t_live_allocations;
    int fds = t_open_fds(), rc;
    const char *last;
    fault_at = at;
    open_echo();
    tsrv_set_log(t_no_log, NULL);
    in_coroutine(fault_script);
    last = t_fault_last != NULL ? t_fault_last : "nothing";
    rc = fault_rc;
    if (rc != TSRV_OK && !(rc <= TSRV_EAGAIN && rc >= TSRV_EPARENT) && !(rc < 0 && rc > -134)) {
        T_FAIL("call %ld (%s) became %d", at, last, rc);
    }
    fault_at = 0;
    in_coroutine(fault_script); /* the next one is served */
    if (fault_rc != TSRV_OK) {
        T_FAIL("after call %ld (%s): %s", at, last, tsrv_strerror(fault_rc));
    }
    close_echo();
    if (t_open_fds() != fds || t_live_allocations != live) {
        T_FAIL("call %ld (%s) leaves %d descriptors and %ld allocations", at, last,
               t_open_fds() - fds, t_live_allocations - live);
    }
}

static void all_faults(const char *host)
{
    long total;
    fault_host = host;
    t_fault_last = NULL;
    one_fault(0);
    CHECK_INT(fault_rc, TSRV_OK);
    total = fault_total;
    CHECK(total >= 10);
    for (long at = 1; at <= total + 5; at++) {
        one_fault(at);
    }
}

TEST_STREAM(every_call_may_fail)
{
    all_faults("127.0.0.1");
    all_faults("two.test");
}

/* ---- meeting itself -----------------------------------------------------------------------*/

/* What the kernel may choose by itself: the port that is asked for. */
static void bind_to_target(int fd, const struct sockaddr *address, socklen_t size)
{
    CHECK(bind(fd, address, size) == 0);
}

static void connect_to_itself(void)
{
    before_connect = bind_to_target;
    CHECK_INT(connect_rc("127.0.0.1", t_free_port(), 500), -ECONNREFUSED);
    before_connect = NULL;
}

TEST_LOOP(socket_that_meets_itself_is_refused)
{
    alone(connect_to_itself);
}

/* ---- connected at once ---------------------------------------------------------------------*/

static void connect_without_waiting(void)
{
    connect_at_once = true;
    CHECK_INT(connect_rc("127.0.0.1", port_of_faults, 500), TSRV_OK);
    CHECK_INT(connect_rc("two.test", port_of_faults, 500), TSRV_OK);
    before_connect = bind_to_target;
    CHECK_INT(connect_rc("127.0.0.1", t_free_port(), 500), -ECONNREFUSED);
    before_connect = NULL;
    connect_at_once = false;
}

TEST_LOOP(connection_that_is_there_at_once_is_used)
{
    listener_of_faults = listener_at("127.0.0.1", &port_of_faults, 16);
    alone(connect_without_waiting);
    t_close(listener_of_faults);
}

/* Families take turns, that of the first address first, whatever the order. */
TEST_ONCE(addresses_of_any_order_are_tried_once)
{
    static const char *const orders[][2] = {{"4", "4"}, {"46", "46"}, {"464", "464"}, {"4664", "4646"},
                                            {"6644", "6464"}, {"6446", "6464"}, {"44466", "46464"}, {"4666", "4666"}};
    for (size_t i = 0; i < COUNT(orders); i++) {
        struct addrinfo all[5];
        tsrvi_dial dials[5];
        int count = (int)strlen(orders[i][0]);
        memset(all, 0, sizeof all);
        for (int k = 0; k < count; k++) {
            all[k].ai_family = orders[i][0][k] == '4' ? AF_INET : AF_INET6;
            all[k].ai_next = k + 1 < count ? &all[k + 1] : NULL;
        }
        CHECK_INT(tsrvi_dials_order(dials, all), count);
        for (int k = 0; k < count; k++) {
            CHECK_INT(dials[k].info->ai_family, orders[i][1][k] == '4' ? AF_INET : AF_INET6);
            for (int earlier = 0; earlier < k; earlier++) {
                CHECK(dials[earlier].info != dials[k].info);
            }
        }
    }
}

/* ---- ends ---------------------------------------------------------------------------------*/

enum { LARGE = 3 << 20 };
static char payload[LARGE];

static void fill_payload(void)
{
    for (int i = 0; i < LARGE; i++) {
        payload[i] = (char)('A' + i % 41);
    }
}

static size_t payload_size(void)
{
    return t_hard ? 150000 : LARGE;
}

static int end_listener, end_port;

/* tsrv_close is the last thing done with the stream; what is queued goes on its way. */
static void write_and_close(void)
{
    tsrv_stream *stream = connected("127.0.0.1", end_port);
    tsrv_set_timeout(stream, 0, TSRV_NEVER);
    CHECK_INT(tsrv_try_write(stream, payload, payload_size()), TSRV_OK);
    CHECK_INT(tsrv_close(stream), TSRV_OK);
}

TEST_COROUTINE(closing_sends_what_is_queued)
{
    char *got = (char *)malloc(LARGE);
    int code;
    fill_payload();
    s_open_loop();
    end_listener = listener_at("127.0.0.1", &end_port, 16);
    in_coroutine(write_and_close);
    int fd = accepted(end_listener);
    CHECK_MEM(got, s_recv(fd, got, payload_size(), &code), payload, payload_size());
    s_leave(fd);
    t_close(end_listener);
    s_settle();
    CHECK_INT(tsrv_loop_run(s_loop), TSRV_OK);
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
    free(got);
}

static void abort_it(void *context)
{
    CHECK_INT(tsrv_abort((tsrv_stream *)context), TSRV_OK);
    CHECK_INT(tsrv_abort((tsrv_stream *)context), TSRV_OK);
    t_record(1);
}

static void be_aborted(void)
{
    tsrv_stream *stream = connected("127.0.0.1", end_port);
    tsrv_slice line;
    CHECK_INT(tsrv_spawn(s_loop, abort_it, stream), TSRV_OK);
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_ECLOSED);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(tsrv_sleep(50), TSRV_OK); /* it is still the caller's */
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_ECLOSED);
    CHECK_INT(tsrv_write(stream, "x", 1), TSRV_ECLOSED);
    CHECK_INT(tsrv_fd(stream), -1);
    CHECK_INT(tsrv_close(stream), TSRV_OK);
}

TEST_LOOP(abort_by_somebody_else_ends_waits_and_frees_nothing)
{
    end_listener = listener_at("127.0.0.1", &end_port, 16);
    alone(be_aborted);
    int fd = accepted(end_listener);
    t_expect_reset(fd);
    t_close(fd);
    t_close(end_listener);
}

static void be_reset(void)
{
    tsrv_stream *stream = connected("127.0.0.1", end_port);
    tsrv_slice line;
    int fd = accepted(end_listener);
    t_sends(fd, "last words\n");
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_OK);
    CHECK_STR(line.data, "last words\n");
    t_sends(fd, "half");
    CHECK_INT(tsrv_sleep(50), TSRV_OK);
    t_reset(fd);
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), -ECONNRESET);
    CHECK_INT(tsrv_error(stream), -ECONNRESET);
    int rc = tsrv_write(stream, "x", 1);
    CHECK(rc == -ECONNRESET || rc == -EPIPE);
    CHECK_INT(tsrv_close(stream), TSRV_OK);
}

TEST_LOOP(reset_by_the_server_is_a_code)
{
    end_listener = listener_at("127.0.0.1", &end_port, 16);
    alone(be_reset);
    t_close(end_listener);
}

/* Both ends have said that they are done: poll calls that a hang-up, and what arrived before it is
 * read by whoever comes late. */
static void be_late(void)
{
    tsrv_stream *stream = connected("127.0.0.1", end_port);
    tsrv_slice rest;
    int fd = accepted(end_listener);
    t_sends(fd, "first\n");
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &rest), TSRV_OK);
    CHECK_INT(tsrv_shutdown(stream), TSRV_OK);
    CHECK_INT(tsrv_sleep(50), TSRV_OK);
    t_sends(fd, "rest");
    CHECK_INT(tsrv_sleep(50), TSRV_OK);
    CHECK_INT(shutdown(fd, SHUT_WR), 0);
    CHECK_INT(tsrv_sleep(50), TSRV_OK);
    CHECK_INT(tsrv_error(stream), TSRV_OK);
    CHECK_INT(tsrv_read_until_close(stream, 0, &rest), TSRV_OK);
    CHECK_STR(rest.data, "rest");
    CHECK_INT(tsrv_close(stream), TSRV_OK);
    t_close(fd);
}

TEST_LOOP(end_of_both_directions_is_no_reset)
{
    end_listener = listener_at("127.0.0.1", &end_port, 16);
    alone(be_late);
    t_close(end_listener);
}

static void time_out_reads(void)
{
    tsrv_stream *stream = connected("127.0.0.1", end_port);
    tsrv_slice line;
    int fd = accepted(end_listener);
    int64_t start = v_ms();
    tsrv_set_timeout(stream, 300, 400);
    t_sends(fd, "half");
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_ETIMEOUT);
    CHECK(v_ms() - start >= 300 && v_ms() - start < 400);
    t_sends(fd, " and whole\n"); /* the stream goes on */
    CHECK_INT(tsrv_read_until(stream, "\n", 0, &line), TSRV_OK);
    CHECK_STR(line.data, "half and whole\n");
    tsrv_set_deadline(stream, 200);
    CHECK_INT(tsrv_read_bytes(stream, 1, &line), TSRV_ETIMEOUT);
    tsrv_set_deadline(stream, TSRV_NEVER);

    /* Nobody takes what is written: that ends it. */
    start = v_ms();
    int rc = TSRV_OK;
    for (int i = 0; i < 20 && rc == TSRV_OK; i++) {
        rc = tsrv_write(stream, payload, LARGE);
    }
    CHECK_INT(rc, TSRV_ETIMEOUT);
    CHECK(v_ms() - start >= 400);
    CHECK_INT(tsrv_read_bytes(stream, 1, &line), TSRV_ETIMEOUT);
    CHECK_INT(tsrv_close(stream), TSRV_OK);
    t_expect_reset(fd);
    t_close(fd);
}

TEST_LOOP(clients_have_time_limits)
{
    end_listener = listener_at("127.0.0.1", &end_port, 16);
    alone(time_out_reads);
    t_close(end_listener);
}

/* ---- freeing the loop ---------------------------------------------------------------------*/

static int ended[3];

static void read_for_ever(void *context)
{
    tsrv_slice line;
    tsrv_stream *stream = connected("127.0.0.1", end_port);
    (void)context;
    t_record(0);
    ended[0] = tsrv_read_until(stream, "\n", 0, &line);
    CHECK_INT(tsrv_close(stream), TSRV_OK);
}

static void write_for_ever(void *context)
{
    tsrv_stream *stream = connected("127.0.0.1", end_port);
    (void)context;
    t_record(1);
    while ((ended[1] = tsrv_write(stream, payload, LARGE)) == TSRV_OK) {
    }
    CHECK_INT(tsrv_close(stream), TSRV_OK);
}

static void connect_for_ever(void *context)
{
    deaf *d = (deaf *)context;
    t_record(2);
    ended[2] = connect_rc("127.0.0.1", d->port, TSRV_NEVER);
}

/* Leaves its stream open and forgets it. */
static void forget(void *context)
{
    (void)context;
    connected("127.0.0.1", end_port);
    t_record(3);
}

TEST_LOOP(freeing_the_loop_ends_clients)
{
    deaf d = {-1, 0, {0}};
    int fds[3];
    end_listener = listener_at("127.0.0.1", &end_port, 16);
#ifdef __linux__
    d = open_deaf("127.0.0.1", 0);
#endif
    s_open_loop();
    CHECK_INT(tsrv_spawn(s_loop, read_for_ever, NULL), TSRV_OK);
    CHECK_INT(tsrv_spawn(s_loop, write_for_ever, NULL), TSRV_OK);
    CHECK_INT(tsrv_spawn(s_loop, forget, NULL), TSRV_OK);
    if (d.listener >= 0) {
        CHECK_INT(tsrv_spawn(s_loop, connect_for_ever, &d), TSRV_OK);
    }
    s_run_ms(100);
    CHECK_INT(t_record_count(), d.listener >= 0 ? 4 : 3);
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
    CHECK_INT(ended[0], TSRV_ECLOSED);
    CHECK_INT(ended[1], TSRV_ECLOSED);
    CHECK_INT(ended[2], d.listener >= 0 ? TSRV_ECLOSED : 0);
    CHECK_INT(t_log_lines, 0); /* none was dropped */
    for (int i = 0; i < 3; i++) {
        fds[i] = accepted(end_listener);
        t_expect_reset(fds[i]);
        t_close(fds[i]);
    }
    if (d.listener >= 0) {
        close_deaf(&d);
    }
    t_close(end_listener);
}

/* ---- much in both directions --------------------------------------------------------------*/

typedef struct mover {
    tsrv_stream *stream;
    bool done;
} mover;

static void write_large(void *context)
{
    mover *m = (mover *)context;
    size_t size = payload_size(), sent = 0;
    while (sent < size) {
        size_t piece = size - sent < 70001 ? size - sent : 70001;
        CHECK_INT(tsrv_write(m->stream, payload + sent, piece), TSRV_OK);
        sent += piece;
    }
    CHECK_INT(tsrv_shutdown(m->stream), TSRV_OK);
    m->done = true;
    tsrv_wake(m->stream);
}

static void move_large(void)
{
    mover m = {connected("127.0.0.1", s_port), false};
    char *got = (char *)malloc(LARGE);
    tsrv_slice rest;
    CHECK_INT(tsrv_sleep(20), TSRV_OK);
    CHECK_INT(tsrv_spawn(s_loop, write_large, &m), TSRV_OK);
    CHECK_INT(tsrv_sleep(500), TSRV_OK); /* both directions fill up */
    CHECK_INT(tsrv_read_into(m.stream, got, payload_size()), TSRV_OK);
    CHECK_MEM(got, payload_size(), payload, payload_size());
    CHECK_INT(tsrv_read_some(m.stream, 0, &rest), TSRV_EOF);
    while (!m.done) {
        CHECK_INT(tsrv_wait(m.stream, TSRV_NEVER), TSRV_OK);
    }
    CHECK_INT(tsrv_close(m.stream), TSRV_OK);
    free(got);
}

TEST_STREAM(much_goes_both_ways)
{
    fill_payload();
    open_echo();
    in_coroutine(move_large);
    close_echo();
}
