/* Listeners (>>accept): accept, and waiting for it, that fails once or for good; more clients than there are
 * descriptors, connections or stacks for. Nothing spins, nothing stays deaf, and each listener pauses for itself. */
#include "script.h"

#include "handlers.h"

#include <sys/resource.h>

static const tsrv_server_options defaults;
static int entered;

static int enter_and_echo(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    if (!*(bool *)tsrv_data(stream)) {
        *(bool *)tsrv_data(stream) = true;
        entered++;
    }
    return echo_lines(stream, address, context);
}

static void open_echo(int max_connections)
{
    tsrv_server_options options = defaults;
    entered = 0;
    options.handle_stream = enter_and_echo;
    options.data_size = sizeof(bool);
    options.max_connections = max_connections;
    s_open(options);
}

static int ask(int port)
{
    int fd = t_connect(port);
    t_sends(fd, "hello\n");
    return fd;
}

static void expect_answer(int fd)
{
    s_expect(fd, "hello\n");
    t_close(fd);
}

/* A policy that forbids accept4 is taken to forbid that call only, so here it is done without. */
static void forbid_accept(int code, bool sticky)
{
    __atomic_fetch_or(&tsrvi_process.without, TSRVI_WITHOUT_ACCEPT4, __ATOMIC_RELAXED);
    t_fail_call("accept", code, 1, sticky);
}

/* ---- accept --------------------------------------------------------------------------------*/

static const int for_good[] = {EPERM, EACCES, ENOSYS, EPROTO, ECONNABORTED, EBADF, EINVAL, ENOTSOCK, EOPNOTSUPP};
enum { FOR_GOOD = COUNT(for_good) };

TEST_LOOP(accept_that_fails_for_good_is_tried_some_times_a_second)
{
    for (int i = 0; i < FOR_GOOD; i++) {
        open_echo(0);
        forbid_accept(for_good[i], true);
        int fd = ask(s_port);
        s_run_ms(3000);
        CHECK(t_fault_hits >= 3);
        CHECK(t_fault_hits <= 100);
        CHECK(t_log_lines >= 1 && t_log_lines <= 4);
        CHECK(strstr(t_log, strerror(for_good[i])) != NULL);
        CHECK(strstr(t_log, "127.0.0.1:") != NULL);
        CHECK(s_stats().accept_pauses >= 3);
        CHECK_INT(s_stats().accept_errors, t_fault_hits);
        CHECK_INT(s_stats().accepted, 0);

        /* What has forbidden it changes its mind. */
        t_fault_at = 0;
        s_run_ms(1100);
        CHECK_INT(entered, 1);
        expect_answer(fd);
        s_close();
    }
}

/* An error or two belong to their connections. */
TEST_LOOP(accept_that_fails_once_costs_no_time)
{
    for (int i = 0; i < FOR_GOOD; i++) {
        open_echo(0);
        int fd = ask(s_port);
        forbid_accept(for_good[i], false);
        s_settle();
        CHECK_INT(t_fault_hits, 1);
        t_fault_at = 0;
        CHECK_INT(entered, 1);
        CHECK_INT(t_log_lines, 0);
        expect_answer(fd);
        s_close();
    }
}

#if TSRVI_HAS_ACCEPT4
/* Where accept does what accept4 may not, accept4 is asked once. */
TEST_LOOP(accept4_that_is_forbidden_is_asked_once)
{
    open_echo(0);
    t_fail_call("accept4", EPERM, 1, true);
    for (int i = 0; i < 2; i++) {
        int fd = ask(s_port);
        s_settle();
        expect_answer(fd);
    }
    CHECK_INT(t_fault_hits, 1);
    t_fault_at = 0;
    CHECK_INT(s_stats().accepted, 2);
    s_close();
}

static int accepts, accepts4;

static void count_accepts(const char *name)
{
    accepts += strcmp(name, "accept") == 0;
    accepts4 += strcmp(name, "accept4") == 0;
}

/* Where accept may not either, it was not for the call: accept4 is asked again. */
TEST_LOOP(accept4_that_is_not_alone_forbidden_is_asked_again)
{
    open_echo(0);
    int fd = ask(s_port);
    accepts = accepts4 = 0;
    t_seen = count_accepts;
    t_fail_call(NULL, EPERM, 1, true);
    CHECK_INT(tsrvi_accept_one(s_server->listeners->io.fd, NULL, &(socklen_t){0}), -1);
    t_fault_at = 0;
    CHECK_INT(accepts, 1);
    s_settle();
    t_seen = NULL;
    CHECK(accepts4 >= 2);
    CHECK_INT(accepts, 1);
    expect_answer(fd);
    s_close();
}
#endif

/* ---- workers that share a listener ---------------------------------------------------------*/

static tsrvi_place places_of_two[2 * TSRVI_GENERATIONS];

/* As the first of two workers, who have accepted so many. */
static void open_shared(unsigned own, unsigned other)
{
    tsrvi_place *second = &places_of_two[TSRVI_GENERATIONS];
    memset(places_of_two, 0, sizeof places_of_two);
    tsrvi_process.places = tsrvi_process.place_own = places_of_two;
    tsrvi_process.place_count = COUNT(places_of_two);
    tsrvi_process.number = 1;
    open_echo(0);
    places_of_two->used = second->used = 1;
    places_of_two->stats[s_server->number].accepted = own;
    second->stats[s_server->number].accepted = other;
}

static void close_shared(void)
{
    s_close();
    tsrvi_process.places = tsrvi_process.place_own = NULL;
    tsrvi_process.place_count = tsrvi_process.number = 0;
}

static const struct {
    unsigned own, other;
    bool ahead;
} leads[] = {{TSRVI_SHARE * 2, 0, false},
              {TSRVI_SHARE * 2 + 1, 0, true},
              {100, 100 - TSRVI_SHARE * 2, false},
              {100, 99 - TSRVI_SHARE * 2, true},
              {0, 100, false}};

/* Where the kernel wakes all of them, who is ahead leaves each connection to the others for a moment, and no longer. */
TEST_LOOP(worker_that_is_ahead_stays_away_for_a_moment)
{
    for (size_t i = 0; i < COUNT(leads); i++) {
        open_shared(leads[i].own, leads[i].other);
        s_loop->poller.exclusive = false;
        int other = -1; /* goes meanwhile, which is no reason to come back */
        for (int clients = 0; clients < 2; clients++) {
            int fd = ask(s_port);
            s_settle();
            if (clients == 1) {
                t_close(other);
                s_settle();
            }
            bool away = leads[i].ahead || (clients == 1 && leads[i].own + 1 > leads[i].other + TSRVI_SHARE * 2);
            CHECK_INT(entered, away ? clients : clients + 1);
            s_run_ms(TSRVI_AWAY_MS + 1);
            CHECK_INT(entered, clients + 1);
            s_expect(fd, "hello\n");
            other = fd;
        }
        t_close(other);
        close_shared();
    }
}

/* What waits in a queue of its own is nobody else's. */
TEST_LOOP(worker_that_is_ahead_accepts_from_a_socket_of_its_own)
{
    enum { CLIENTS = TSRVI_SHARE_AHEAD };
    for (int exclusive = 0; exclusive <= 1; exclusive++) {
        int fds[CLIENTS];
        tsrv_bind_options options = {0};
        tsrv_address address;
        open_shared(1000, 0);
        s_loop->poller.exclusive = s_loop->poller.exclusive && exclusive;
        options.reuse_port = true;
        CHECK_INT(tsrv_server_listen(s_server, 0, "127.0.0.1", &options), TSRV_OK);
        CHECK_INT(tsrv_server_address(s_server, 1, &address), TSRV_OK);
        for (int k = 0; k < CLIENTS; k++) {
            fds[k] = ask(tsrv_address_port(&address));
        }
        s_settle();
        CHECK_INT(entered, CLIENTS);
        t_close_all(fds, CLIENTS);
        close_shared();
    }
}

static void beat_at(uint64_t now)
{
    s_loop->now = now;
    tsrvi_worker_beat_servers(s_loop, 0);
}

/* As behind a reload: what those before it have accepted is no lead of its own, and no lag. */
TEST_LOOP(worker_begins_with_nothing_to_make_up_for)
{
    open_shared(1000, 0);
    CHECK(tsrvi_server_is_ahead(s_server));
    s_close();
    open_echo(0);
    CHECK(!tsrvi_server_is_ahead(s_server));
    places_of_two->stats[s_server->number].accepted += 2 * TSRVI_SHARE + 1;
    CHECK(tsrvi_server_is_ahead(s_server));
    close_shared();
}

/* The other one was away: for some seconds it gets more, and then as many. */
TEST_LOOP(what_was_accepted_long_ago_is_forgotten)
{
    open_shared(1000, 0);
    uint64_t now = tsrvi_clock();
    beat_at(now);
    CHECK(tsrvi_server_is_ahead(s_server));
    beat_at(now + TSRVI_SHARE_MS * TSRVI_MS - 1);
    CHECK(tsrvi_server_is_ahead(s_server));
    beat_at(now + TSRVI_SHARE_MS * TSRVI_MS);
    CHECK(!tsrvi_server_is_ahead(s_server));
    places_of_two->stats[s_server->number].accepted += 2 * TSRVI_SHARE + 1;
    CHECK(tsrvi_server_is_ahead(s_server));
    close_shared();
}

/* Where it wakes one, which epoll does, who is ahead goes behind the others sooner. */
TEST_LOOP(worker_that_is_ahead_goes_behind_the_others_sooner)
{
    enum { CLIENTS = TSRVI_SHARE };
    for (size_t i = 0; i < COUNT(leads); i++) {
        int fds[CLIENTS], times;
        open_shared(leads[i].own, leads[i].other + (leads[i].ahead ? 0 : CLIENTS)); /* so that it stays as it is */
        if (!s_loop->poller.exclusive) {
            close_shared();
            return;
        }
        t_fail_call("epoll_ctl", 0, 0, false); /* counts them */
        for (int k = 0; k < CLIENTS; k++) {
            fds[k] = ask(s_port);
            s_expect(fds[k], "hello\n");
            s_settle(); /* one after the other, and no crowd */
        }
        times = (int)t_fault_calls - CLIENTS; /* without those for the clients */
        CHECK_INT(times, 2 * (leads[i].ahead ? TSRVI_SHARE / TSRVI_SHARE_AHEAD : 1));
        t_close_all(fds, CLIENTS);
        close_shared();
    }
}

/* In a crowd all of them are awake, and who has a processor would take what is there. */
TEST_LOOP(worker_that_is_ahead_leaves_a_crowd_to_the_others)
{
    enum { CLIENTS = TSRVI_SHARE_AHEAD };
    for (size_t i = 0; i < COUNT(leads); i++) {
        int fds[CLIENTS];
        open_shared(leads[i].own, leads[i].other + (leads[i].ahead ? 0 : CLIENTS));
        for (int k = 0; k < CLIENTS; k++) {
            fds[k] = ask(s_port);
        }
        s_settle();
        if (s_loop->poller.exclusive) {
            CHECK_INT(entered, leads[i].ahead ? 1 : CLIENTS);
        }
        s_run_ms(CLIENTS * (TSRVI_AWAY_MS + 1));
        CHECK_INT(entered, CLIENTS);
        t_close_all(fds, CLIENTS);
        close_shared();
    }
}

/* Until they have taken nothing for so long that it does not look as if they would. */
TEST_LOOP(worker_that_is_ahead_of_others_that_are_stuck_takes_all)
{
    int fds[2 * TSRVI_AWAY_MOST];
    open_shared(1000, 0);
    s_loop->poller.exclusive = false;
    for (int k = 0; k < TSRVI_AWAY_MOST + 1; k++) {
        fds[k] = ask(s_port);
        s_run_ms(TSRVI_AWAY_MS + 1);
        s_expect(fds[k], "hello\n");
    }
    for (int moved = 0; moved <= 1; moved++) {
        int before = entered;
        places_of_two[TSRVI_GENERATIONS].stats[s_server->number].accepted += (unsigned)moved;
        fds[TSRVI_AWAY_MOST + 1 + moved] = ask(s_port);
        s_settle();
        CHECK_INT(entered, before + (moved ? 0 : 1));
        s_run_ms(TSRVI_AWAY_MS + 1);
        s_expect(fds[TSRVI_AWAY_MOST + 1 + moved], "hello\n");
    }
    t_close_all(fds, TSRVI_AWAY_MOST + 3);
    close_shared();
}

/* ---- waiting for a listener ----------------------------------------------------------------*/

/* What the backend asks the kernel with. */
static const char *wait_call(void)
{
    return t_backend == TSRV_BACKEND_EPOLL ? "epoll_ctl" : t_backend == TSRV_BACKEND_KQUEUE ? "kevent_set" : "fcntl";
}

/* One client is in, another has to wait, and the first one goes. */
static int make_room(void)
{
    int first = ask(s_port);
    s_expect(first, "hello\n");
    int second = ask(s_port);
    s_settle();
    CHECK_INT(entered, 1);
    return t_close(first), second;
}

TEST_LOOP(resume_that_fails_once_is_tried_again)
{
    open_echo(1);
    int fd = make_room();
    t_fail_call(wait_call(), ENOMEM, 1, false);
    s_settle();
    CHECK_INT(t_fault_hits, 1);
    t_fault_at = 0;
    CHECK_INT(t_log_lines, 1);
    CHECK(strstr(t_log, "cannot accept") != NULL);
    s_run_ms(200);
    CHECK_INT(entered, 2);
    expect_answer(fd);
    s_close();
}

TEST_LOOP(resume_that_fails_for_long_is_tried_again)
{
    open_echo(1);
    int fd = make_room();
    t_fail_call(wait_call(), ENOSPC, 1, true);
    s_run_ms(3000);
    CHECK(t_fault_hits >= 3 && t_fault_hits <= 20);
    CHECK(t_log_lines >= 1 && t_log_lines <= 4);
    t_fault_at = 0;
    s_run_ms(1100);
    CHECK_INT(entered, 2);
    expect_answer(fd);
    s_close();
}

/* Workers go to the end of the queue of those who wait for a listener; with poll there is none. */
TEST_LOOP(worker_that_cannot_queue_again_is_not_deaf)
{
    for (int sticky = 0; sticky <= 1 && t_backend != TSRV_BACKEND_POLL; sticky++) {
        open_echo(0);
        tsrvi_process.number = 1;
        t_fail_call(wait_call(), ENOMEM, 2, sticky);
        tsrvi_listener_requeue(s_server->listeners);
        CHECK_INT(t_fault_hits, 1);
        int fd = ask(s_port);
        s_run_ms(sticky ? 2000 : 200);
        CHECK_INT(entered, !sticky);
        CHECK(t_fault_hits < 20);
        CHECK(t_log_lines >= 1 && t_log_lines <= 3);
        t_fault_at = 0;
        s_run_ms(1100);
        CHECK_INT(entered, 1);
        tsrvi_process.number = 0;
        expect_answer(fd);
        s_close();
    }
}

/* One connection wakes one worker, the first like the others. */
TEST_LOOP(workers_ask_to_be_woken_one_at_a_time)
{
    open_echo(0);
    for (int number = 0; number <= 2; number++) { /* 0 is no worker */
        tsrvi_process.number = number;
        CHECK_INT(tsrvi_listener_watch(s_server->listeners), TSRV_OK);
        CHECK_INT((s_server->listeners->io.interest & TSRVI_EXCLUSIVE) != 0, number > 0);
    }
    tsrvi_process.number = 0;
    s_close();
}

/* Where the kernel keeps no queue of those who wait there is nothing to go behind. */
TEST_ONCE(worker_with_poll_stays_where_it_is)
{
    t_backend = TSRV_BACKEND_POLL;
    open_echo(0);
    tsrvi_process.number = 1;
    t_fail_call("fcntl", ENOMEM, 1, true);
    tsrvi_listener_requeue(s_server->listeners);
    CHECK_INT(t_fault_calls, 0);
    t_fault_at = 0;
    CHECK(s_server->listeners->io.interest != 0);
    tsrvi_process.number = 0;
    s_close();
}

/* Whose pause is over goes on, and the other one waits for the end of its own. */
TEST_LOOP(listeners_pause_each_for_itself)
{
    open_echo(0);
    tsrvi_listener *one = s_server->listeners, *other;
    CHECK_INT(tsrv_server_listen(s_server, 0, "127.0.0.1", NULL), TSRV_OK);
    other = one->next;
    forbid_accept(EPERM, true);
    int first = ask(s_port);
    for (int64_t end = t_patience(); one->due == 0;) {
        s_turn_ms(1);
        CHECK(t_now_ms() < end);
    }
    s_run_ms(20);
    int second = ask(t_port(s_server, 1));
    for (int64_t end = t_patience(); other->due == 0;) {
        s_turn_ms(1);
        CHECK(t_now_ms() < end);
    }
    CHECK(one->due != 0 && one->due < other->due);
    t_fault_at = 0;
    for (int64_t end = t_patience(); one->due != 0;) {
        s_turn_ms(1);
        CHECK(t_now_ms() < end);
    }
    CHECK(other->due > s_loop->now);
    s_expect(first, "hello\n");
    expect_answer(second);
    t_close(first);
    s_close();
}

/* A socket that cannot be set up is a lost connection, and costs the next one nothing. */
TEST_LOOP(accepted_socket_that_cannot_be_set_up_is_lost)
{
    open_echo(0);
    forbid_accept(EPERM, false);
    t_fault_at = 0;
    int lost = t_connect(s_port);
    t_fail_call("fcntl", EBADF, 1, false);
    s_expect_eof(lost);
    CHECK_INT(t_fault_hits, 1);
    t_fault_at = 0;
    CHECK_INT(s_stats().accept_errors, 1);
    expect_answer(ask(s_port));
    t_close(lost);
    CHECK_INT(entered, 1);
    s_close();
}

/* ---- a worker that has more than its share -------------------------------------------------*/

static tsrvi_place worker_places[2 * TSRVI_GENERATIONS]; /* of two workers */

static void be_first_of_two_workers(void)
{
    tsrvi_process.places = tsrvi_process.place_own = worker_places;
    tsrvi_process.place_count = 2 * TSRVI_GENERATIONS;
    tsrvi_process.number = 1;
    worker_places[0].used = worker_places[TSRVI_GENERATIONS].used = 1;
}

static void be_alone(void)
{
    tsrvi_process.places = tsrvi_process.place_own = NULL;
    tsrvi_process.place_count = tsrvi_process.number = 0;
}

/* Where every worker is woken it stays away for a moment, once in a row. */
TEST_LOOP(worker_that_is_ahead_leaves_the_next_to_others)
{
    tsrvi_process.without |= TSRVI_WITHOUT_EXCLUSIVE; /* as before Linux 4.5 */
    be_first_of_two_workers();
    open_echo(0);
    CHECK(!s_loop->poller.exclusive);
    CHECK(s_server->stats == &worker_places[0].stats[0]);
    for (int ahead = 1; ahead >= 0; ahead--) {
        worker_places[TSRVI_GENERATIONS].stats[0].accepted = ahead ? 0 : 1000;
        worker_places[0].stats[0].accepted = 1000;
        int fd = ask(s_port);
        s_turn_ms(0);
        CHECK_INT(s_server->paused, ahead);
        CHECK_INT(worker_places[0].stats[0].accepted, ahead ? 1000 : 1001);
        s_expect(fd, "hello\n");
        CHECK_INT(s_server->paused, false);
        t_close(fd);
        s_settle();
    }
    s_close();
    be_alone();
}

/* Servers for whose counters there is no room have their own. */
TEST_LOOP(servers_beyond_those_that_are_counted_are_never_ahead)
{
    tsrv_server *others[TSRVI_SHARED_SERVERS];
    static char text[8192];
    tsrv_stats sum;
    s_open_loop();
    for (int i = 0; i < TSRVI_SHARED_SERVERS; i++) {
        tsrv_server_options options = defaults;
        options.handle_stream = echo_lines;
        others[i] = s_new_server(options);
        CHECK_INT(others[i]->number, i);
    }
    CHECK_INT(tsrv_loop_free(s_loop), TSRV_OK);
    be_first_of_two_workers();
    memset(&worker_places[TSRVI_GENERATIONS - 1], 1, sizeof worker_places[0]); /* what lies in front of another's */
    tsrvi_process.number = 2;
    open_echo(0);
    CHECK_INT(s_server->number, -1);
    CHECK(s_server->stats == &s_server->own);
    s_server->own.accepted = 1000;
    CHECK(!tsrvi_server_is_ahead(s_server));
    expect_answer(ask(s_port));
    memset(&sum, 0, sizeof sum);
    tsrvi_stats_gather(&sum, s_server->number, -1);
    CHECK_INT(sum.accepted, 0);
    CHECK(tsrv_metrics_format(s_server, text, sizeof text) > 0);
    CHECK(strstr(text, "tsrv_connections_accepted_total{worker=\"1\"} 1001\n") != NULL);
    CHECK(strstr(text, "{worker=\"0\"") == NULL);
    s_close();
    be_alone();
    memset(worker_places, 0, sizeof worker_places);
    for (int i = 0; i < TSRVI_SHARED_SERVERS; i++) {
        tsrv_server_free(others[i]);
    }
    CHECK_INT(tsrvi_process.server_numbers, 0);
}

/* ---- one of two listeners is lost ----------------------------------------------------------*/

enum { OTHER_FILE, CLOSED, SHUT, OTHER_SOCKET, UNLISTENED, LOSSES };

/* By a mistake of the program's, which must not know the number. */
static void lose(int loss, int fd)
{
    int other = loss == OTHER_FILE ? open("/dev/null", O_RDONLY | O_CLOEXEC)
                : loss == OTHER_SOCKET ? socket(AF_INET, SOCK_DGRAM, 0)
                : loss == UNLISTENED ? socket(AF_INET, SOCK_STREAM, 0) : -1;
    if (other >= 0) {
        CHECK(dup2(other, fd) == fd);
        CHECK(close(other) == 0);
    } else if (loss == SHUT) {
        CHECK(shutdown(fd, SHUT_RDWR) == 0);
    } else {
        CHECK(close(fd) == 0);
    }
}

TEST_LOOP(lost_listener_does_not_silence_the_other)
{
    for (int loss = 0; loss < LOSSES; loss++) {
        tsrv_address address;
        int fds[3];
        open_echo(1);
        CHECK_INT(tsrv_server_listen(s_server, 0, "127.0.0.1", NULL), TSRV_OK);
        CHECK_INT(tsrv_server_address(s_server, 1, &address), TSRV_OK);
        int port = tsrv_address_port(&address);
        lose(loss, s_server->listeners->io.fd);
        for (int i = 0; i < 3; i++) {
            fds[i] = ask(port); /* max_connections is 1: all but the first have to wait */
        }
        long waits = 0;
        for (int i = 0; i < 3; i++) {
            expect_answer(fds[i]);
        }
        int64_t end = v_ms() + 3000;
        for (; v_ms() < end; waits++) {
            s_turn();
        }
        CHECK(waits < 1000);
        CHECK(t_log_lines <= 8);
        fds[0] = ask(port);
        expect_answer(fds[0]);
        if (loss == CLOSED) {
            CHECK_INT(s_server->listeners->io.fd, -1); /* the number is the first connection's */
        }
        s_close();
    }
}

/* ---- stopped before its first turn ---------------------------------------------------------*/

static int begun, begun_first;

static void begin(tsrv_server *server, void *context)
{
    (void)server, (void)context;
    begun++;
}

static int enter_begun(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    begun_first += begun;
    return enter_and_echo(stream, address, context);
}

/* Who waits in the queue is taken by tsrv_server_stop: what on_start prepares must be there for them. */
TEST_LOOP(on_start_comes_before_who_is_taken_by_a_stop)
{
    for (int waits = 0; waits <= 1; waits++) {
        tsrv_server_options options = defaults;
        begun = begun_first = entered = 0;
        options.data_size = sizeof(bool);
        options.on_start = begin;
        s_open_with(enter_begun, options);
        int fd = waits ? t_connect(s_port) : -1;
        tsrv_server_stop(s_server);
        s_settle();
        CHECK_INT(begun, waits);
        CHECK_INT(entered, waits);
        CHECK_INT(begun_first, waits);
        if (waits) {
            s_echo(fd, "hello\n");
            t_close(fd);
            s_until(&s_closed, 1);
        }
        s_close();
    }
}

/* Who is full waits for no more at once. Were it woken for the next one, no other worker would be, and that one would lie
 * there until somebody looks. */
TEST_STREAM(who_is_full_leaves_the_next_one_to_others)
{
    open_echo(1);
    for (int i = 0; i < 3; i++) { /* not in its first turn, in which it looks for more than one */
        CHECK_INT(tsrv_loop_run_once(s_loop, 0), 1);
    }
    int fd = t_connect(s_port);
    s_echo(fd, "hello\n");
    CHECK_INT(s_stats().accept_pauses, 1);
    CHECK_INT(s_server->listeners->io.interest, 0);
    int next = ask(s_port);
    s_finish(fd);
    expect_answer(next);
    s_settle();
    CHECK(s_server->listeners->io.interest != 0);
    s_close();
}

/* Beyond max_connections a stop takes nobody, and it goes on where accept has failed. */
TEST_LOOP(stop_takes_as_many_as_there_is_room_for)
{
    open_echo(1);
    int first = ask(s_port), second = ask(s_port);
    forbid_accept(ECONNABORTED, false);
    tsrv_server_stop(s_server);
    CHECK_INT(t_fault_hits, 1);
    t_fault_at = 0;
    s_expect_reset(second);
    s_expect(first, "hello\n");
    CHECK_INT(s_stats().accepted, 1);
    t_close(first);
    t_close(second);
    s_close();
}

/* Nor does a listener that fails for good hold it. */
TEST_LOOP(stop_gives_up_where_accept_fails_for_good)
{
    open_echo(0);
    int fd = ask(s_port);
    forbid_accept(EPERM, true);
    tsrv_server_stop(s_server);
    CHECK_INT(t_fault_hits, TSRVI_FAILURES);
    t_fault_at = 0;
    s_expect_reset(fd);
    CHECK_INT(s_stats().accepted, 0);
    t_close(fd);
    s_close();
}

/* A fork's child leaves who waits to its parent. */
TEST_LOOP(stop_in_a_child_takes_nobody)
{
    int status;
    open_echo(0);
    int fd = ask(s_port);
    pid_t child = fork();
    if (child == 0) {
        tsrv_server_stop(s_server);
        CHECK_INT(s_stats().accepted, 0);
        CHECK_INT(tsrv_server_drain(s_server, 1), TSRV_EINVAL); /* nor is the loop its own */
        CHECK_INT(tsrv_loop_free(s_loop), TSRV_EINVAL);
        _exit(0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK_INT(status, 0);
    expect_answer(fd);
    CHECK_INT(s_stats().accepted, 1);
    s_close();
}

static int end_begun(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    begun_first += begun;
    return TSRV_OK;
}

/* Nor is one that is added, whose handler ends at once, before it. */
TEST_LOOP(on_start_comes_before_who_is_added)
{
    tsrv_server_options options = {0};
    int pair[2];
    begun = begun_first = 0;
    s_open_loop();
    options.handle_stream = end_begun;
    options.on_start = begin;
    s_server = s_new_server(options);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK_INT(tsrv_server_add_stream(s_server, pair[0]), TSRV_OK);
    s_settle();
    CHECK_INT(begun, 1);
    CHECK_INT(begun_first, 1);
    close(pair[1]);
    s_settle();
    s_close();
}

/* ---- whoever gets the number of a listener that somebody has closed --------------------------*/

enum { DIALS, DIALS_UNIX, IS_ADDED, LISTENS, GETTERS };

static int to_port;
static char to_path[64];
static int got_rc;

static void dial_one(void *context)
{
    tsrv_stream *stream;
    got_rc = *(int *)context == DIALS ? tsrv_connect("127.0.0.1", to_port, NULL, &stream)
                                      : tsrv_connect(to_path, 0, NULL, &stream);
    if (got_rc == TSRV_OK) {
        tsrv_close(stream);
    }
}

/* Whose number is to be had stays the lowest that is free. */
static void get_number(int how)
{
    int pair[2];
    got_rc = 1;
    if (how == IS_ADDED) {
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
        got_rc = tsrv_server_add_stream(s_server, pair[0]);
        close(pair[1]);
    } else if (how == LISTENS) {
        got_rc = tsrv_server_listen(s_server, 0, "127.0.0.1", NULL);
    } else {
        CHECK_INT(tsrv_spawn(s_loop, dial_one, &how), TSRV_OK);
        for (int i = 0; i < 100 && got_rc == 1; i++) {
            s_turn();
        }
    }
    CHECK_INT(got_rc, TSRV_OK);
}

TEST_LOOP(number_of_a_lost_listener_is_anybodys)
{
    for (int how = 0; how < GETTERS; how++) {
        int path_fd;
        int listener = t_raw_socket(SOCK_STREAM, true, &to_port);
        snprintf(to_path, sizeof to_path, "unix:@lost-%d", (int)getpid());
        CHECK_INT(tsrv_bind_unix_socket(to_path + 5, NULL, &path_fd), TSRV_OK);
        open_echo(10);
        int lost = s_server->listeners->io.fd;
        CHECK(close(lost) == 0);
        get_number(how);
        CHECK(how == LISTENS || s_server->listeners->io.fd == -1);
        CHECK(fcntl(lost, F_GETFD) >= 0 || errno == EBADF); /* it is whoever's, or free again */
        if (how == LISTENS) {
            tsrv_address address;
            CHECK_INT(s_server->listeners->io.fd, lost);
            CHECK_INT(tsrv_server_address(s_server, 0, &address), TSRV_OK);
            int fd = ask(tsrv_address_port(&address));
            expect_answer(fd);
        }
        s_settle();
        s_close();
        close(listener);
        close(path_fd);
    }
}

/* ---- no memory for stacks ------------------------------------------------------------------*/

enum { MANY = 80 };
static int many[MANY], before_many;

/* One client has its stack; then there is no memory for any, and many clients come. */
static void open_without_stacks(void)
{
    s_serve(echo_lines);
    before_many = s_join();
    t_fail_call("mmap", 0, 1, true);
    for (int i = 0; i < MANY; i++) {
        many[i] = t_connect(s_port);
        t_sends(many[i], "x\n");
    }
}

/* There is memory again: who was not lost is served. */
static void close_with_stacks(void)
{
    int served = 0, lost = 0;
    t_fault_at = 0;
    for (int i = 0; i < MANY; i++) {
        char answer[2];
        int code;
        size_t got = s_recv(many[i], answer, 2, &code);
        served += got == 2;
        lost += code == ECONNRESET;
        t_close(many[i]);
    }
    CHECK_INT(lost, t_fault_hits);
    CHECK_INT(served, MANY - lost);
    t_close(before_many);
    s_until(&s_closed, served + 1);
    s_settle();
    CHECK_INT(s_closed, served + 1); /* none for those whose handler was never entered */
    s_close();
}

TEST_SCRIPT(without_memory_for_stacks_the_listener_pauses)
{
    open_without_stacks();
    s_settle();
    CHECK_MOST(t_fault_hits, 2);
    CHECK_INT(t_log_lines, 1);
    CHECK_LEAST(s_stats().accept_pauses, 1);
    s_run_ms(2000);
    CHECK_LEAST(t_fault_hits, 2); /* it tries again */
    CHECK_MOST(t_fault_hits, 45);
    CHECK_LEAST(t_log_lines, 1);
    CHECK_MOST(t_log_lines, 3); /* one a second */
    CHECK_INT(s_stats().accept_errors, t_fault_hits);
    CHECK_INT(s_stats().open, 1);
    s_echo(before_many, "still here\n");
    close_with_stacks();
}

/* 50, 100, 200, 400, 800 and 1000 ms: each of these tries costs a client its connection. */
TEST_SCRIPT(without_memory_for_stacks_the_pauses_grow)
{
    open_without_stacks();
    s_run_ms(3500);
    CHECK_LEAST(t_fault_hits, 4);
    CHECK_MOST(t_fault_hits, 10);
    close_with_stacks();
}

/* ---- more clients than the server can hold -------------------------------------------------*/

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
        CHECK_INT(crowd_answered(fds, served, t_patience_ms()), report->served);
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
        int first = crowd_answered(fds, served, t_patience_ms());
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
        order.open += !t_is_open(fd);
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
           order.open, CROWD, (int)cpu, c->duration_ms, t_logged(), report.pings, report.longest_ms,
           report.first_wait_ms, report.longest_wait_ms);
    CHECK_NEAR_MS(cpu, 0, c->duration_ms * 2 / 100);
    CHECK(t_logged() < 10);
    CHECK(t_logged() >= (c->limit == 0)); /* shortage is worth a line */
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
    t_watch_log();
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

/* ---- a shortage, and connections that are lost ---------------------------------------------*/

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
    t_fail_call(ACCEPT, fault->code, 1, true);
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
    int open = t_connect(port), other = t_connect(port), calls = 0, lines = t_logged();
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
    CHECK(t_logged() <= lines + 1 * t_scale());
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
    CHECK(t_logged() >= 1);
    tsrv_stats stats = server_stats();
    CHECK_INT(stats.accept_errors, 0);
    CHECK(stats.accept_pauses >= 2 * COUNT(codes));
}

TEST_STREAM(a_shortage_in_accept_pauses_it)
{
    t_case c = {.handler = echo_lines, .client = shortage_client};
    SOFT_ONLY();
    t_seen = see_accept;
    t_watch_log();
    t_run(&c);
    tsrv_set_log(NULL, NULL);
}

/* Each of the connections before was lost, and none after it has to wait for that. */
static void lost_client(int port, void *context)
{
    enum { TIMES = 20 };
    /* EPERM, of a firewall, is also what a policy answers: see above. */
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
    CHECK_INT(t_logged(), 0);
}

TEST_STREAM(connections_lost_before_accept_pause_nothing)
{
    t_case c = {.handler = echo_lines, .client = lost_client};
    t_seen = see_accept;
    t_watch_log();
    t_run(&c);
    tsrv_set_log(NULL, NULL);
}

/* ---- who is refused ------------------------------------------------------------------------*/

/* From another address of loopback. */
static int connect_from(const char *own)
{
    struct sockaddr_in from = t_address(0), to = t_address(s_port);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(fd >= 0 && inet_pton(AF_INET, own, &from.sin_addr) == 1);
    t_prepare(fd);
    CHECK(bind(fd, (struct sockaddr *)&from, sizeof from) == 0);
    CHECK(connect(fd, (struct sockaddr *)&to, sizeof to) == 0);
    return fd;
}

static void open_limited(int max_per_address)
{
    tsrv_server_options options = defaults;
    entered = 0;
    options.data_size = sizeof(bool);
    options.max_per_address = max_per_address;
    s_open_with(enter_and_echo, options);
}

TEST_LOOP(one_address_has_so_many_connections)
{
    int fds[5], other;
    open_limited(3);
    t_watch_log();
    for (int i = 0; i < 5; i++) {
        fds[i] = connect_from("127.0.0.1");
        if (i < 3) {
            s_echo(fds[i], "hello\n");
        } else {
            s_expect_reset(fds[i]);
        }
    }
    CHECK_INT(t_log_lines, 2);
    CHECK(strstr(t_log, "max_per_address (3)") != NULL && strstr(t_log, "refused: 127.0.0.1:") != NULL);
    other = connect_from("127.0.0.2");
    s_echo(other, "hello\n");
    CHECK_INT(s_stats().refused, 2);
    CHECK_INT(s_stats().accepted, 4);
    CHECK_INT(entered, 4);
    t_close(fds[3]);
    t_close(fds[4]);
    t_close(fds[0]);
    s_until(&s_closed, 1);
    fds[0] = connect_from("127.0.0.1"); /* there is room again */
    s_echo(fds[0], "hello\n");
    for (int i = 0; i < 3; i++) {
        t_close(fds[i]);
    }
    t_close(other);
    s_until(&s_closed, 5);
    CHECK_INT(s_server->addresses.used, 0);
    s_close();
}

TEST_LOOP(crowd_of_one_address_leaves_the_others_alone)
{
    enum { THRONG = 1000 };
    static int fds[THRONG];
    long allocations = 0;
    open_limited(10);
    tsrv_set_log(t_no_log, NULL);
    for (int i = 0; i < THRONG; i++) {
        fds[i] = connect_from("127.0.0.1");
        s_turn();
        if (i == 10) { /* one of them is refused by now */
            allocations = t_live_allocations;
        }
    }
    CHECK_INT(t_live_allocations, allocations);
    int other = connect_from("127.0.0.3");
    s_echo(other, "hello\n");
    CHECK_INT(s_stats().refused, THRONG - 10);
    CHECK_INT(s_stats().open, 11);
    CHECK_INT(s_server->addresses.capacity, TSRVI_ADDRESSES_LEAST);
    for (int i = 0; i < THRONG; i++) {
        t_close(fds[i]);
    }
    t_close(other);
    s_until(&s_closed, 11);
    CHECK_INT(s_server->addresses.used, 0);
    s_close();
}

/* One address may have as many as it likes here, and is one entry; so is each of a thousand. The table grows with the
 * addresses of open connections, and shrinks when they go. */
TEST_LOOP(table_is_as_large_as_open_connections_need)
{
    enum { THRONG = 1000 };
    static int fds[THRONG];
    open_limited(THRONG);
    for (int i = 0; i < THRONG; i++) {
        fds[i] = connect_from("127.0.0.1");
        s_turn();
    }
    int other = connect_from("127.0.0.2"), one_more = connect_from("127.0.0.1");
    s_echo(other, "hello\n");
    s_echo(fds[THRONG - 1], "hello\n");
    s_expect_reset(one_more);
    CHECK_INT(s_stats().open, THRONG + 1);
    CHECK_INT(s_stats().refused, 1);
    CHECK_INT(s_server->addresses.used, 2);
    CHECK_INT(s_server->addresses.capacity, TSRVI_ADDRESSES_LEAST);
    t_close(one_more);
    t_close_all(fds, THRONG);
    t_close(other);
    s_until(&s_closed, THRONG + 1);
    CHECK_INT(s_server->addresses.used, 0);
    for (int i = 0; i < THRONG; i++) {
        char address[32];
        snprintf(address, sizeof address, "127.0.%d.%d", 1 + i / 250, 1 + i % 250);
        fds[i] = connect_from(address);
        s_turn();
    }
    s_echo(fds[THRONG - 1], "hello\n");
    CHECK_INT(s_server->addresses.used, THRONG);
    CHECK(s_server->addresses.capacity <= 4 * THRONG);
    t_close_all(fds, THRONG);
    s_until(&s_closed, 2 * THRONG + 1);
    CHECK_INT(s_server->addresses.used, 0);
    CHECK(s_server->addresses.capacity <= 2 * TSRVI_ADDRESSES_LEAST);
    s_close();
}

/* A refusal needs no memory but for the table's; without it the connection is lost, and nothing is counted. */
TEST_LOOP(without_memory_for_the_table_a_connection_is_lost)
{
    open_limited(1);
    t_fail_call("malloc", 0, 1, false);
    int lost = connect_from("127.0.0.1"), next;
    s_expect_eof(lost);
    t_fail_call("", 0, 0, false);
    CHECK_INT(s_stats().accept_errors, 1);
    next = connect_from("127.0.0.1");
    s_echo(next, "hello\n");
    t_close(lost);
    t_close(next);
    s_until(&s_closed, 1);
    s_close();
}

/* Clients of a unix socket have no address to be counted by. */
TEST_LOOP(unix_clients_are_not_limited_by_address)
{
    char address[100];
    int fds[2];
    snprintf(address, sizeof address, "unix:%s/socket", t_make_directory());
    open_limited(1);
    CHECK_INT(tsrv_server_listen(s_server, 0, address, NULL), TSRV_OK);
    for (int i = 0; i < 2; i++) {
        struct sockaddr_un name = t_unix_address(address + 5);
        fds[i] = socket(AF_UNIX, SOCK_STREAM, 0);
        t_prepare(fds[i]);
        CHECK(connect(fds[i], (struct sockaddr *)&name, sizeof name) == 0);
        s_echo(fds[i], "hello\n");
    }
    CHECK_INT(s_server->addresses.used, 0);
    CHECK_INT(s_stats().refused, 0);
    t_close_all(fds, 2);
    s_until(&s_closed, 2);
    s_close();
    *strrchr(address, '/') = 0;
    CHECK(rmdir(address + 5) == 0);
}

TEST_LOOP(streams_that_are_added_count_too)
{
    int port, listener, client, served, second;
    open_limited(1);
    listener = t_raw_socket(SOCK_STREAM, true, &port);
    client = t_connect(port);
    served = accept(listener, NULL, NULL);
    CHECK_INT(tsrv_server_add_stream(s_server, served), TSRV_OK);
    s_echo(client, "hello\n");
    second = t_connect(port);
    served = accept(listener, NULL, NULL);
    CHECK_INT(tsrv_server_add_stream(s_server, served), TSRV_ECLOSED);
    s_expect_reset(second);
    CHECK_INT(s_stats().refused, 1);
    t_close(client);
    t_close(second);
    close(listener);
    s_until(&s_closed, 1);
    s_close();
}

/* What IPv6 has in its second half belongs to one customer; an IPv4 address is the same in both families. */
TEST_LOOP(addresses_that_count_as_one)
{
    static const struct {
        const char *one, *other;
        bool same;
    } pairs[] = {
        {"2001:db8:1:2::1", "2001:db8:1:2:ffff::9", true}, {"2001:db8:1:2::1", "2001:db8:1:3::1", false},
        {"::ffff:10.1.2.3", "::ffff:10.1.2.4", false},     {"::ffff:10.1.2.3", "10.1.2.3", true},
        {"10.1.2.3", "10.1.2.4", false},                   {"::1", "127.0.0.1", false},
        {"64:ff9b::a01:203", "10.1.2.3", true},            {"64:ff9b::a01:203", "64:ff9b::a01:204", false},
        {"64:ff9b:1::a01:203", "10.1.2.3", false},         {"64:ff9b::1:a01:203", "10.1.2.3", false},
        {"32.1.13.184", "2001:db8::1", false},             {"10.1.2.3", "::ffff:ffff:0:0", false},
    };
    for (size_t i = 0; i < COUNT(pairs); i++) {
        uint64_t keys[2];
        const char *texts[2] = {pairs[i].one, pairs[i].other};
        for (int j = 0; j < 2; j++) {
            tsrvi_sockaddr inside;
            tsrv_address address;
            bool six = strchr(texts[j], ':') != NULL;
            memset(&inside, 0, sizeof inside);
            inside.any.sa_family = six ? AF_INET6 : AF_INET;
            CHECK(inet_pton(inside.any.sa_family, texts[j],
                            six ? (void *)&inside.six.sin6_addr : (void *)&inside.four.sin_addr) == 1);
            tsrvi_address_store(&address, &inside, six ? sizeof inside.six : sizeof inside.four);
            CHECK(tsrvi_address_key(&address, &keys[j]));
        }
        CHECK_INT(keys[0] == keys[1], pairs[i].same);
    }
}

/* Against an array, with few keys and with many, growing and shrinking; also without a source of secrets. */
static void check_table(unsigned keys, unsigned steps)
{
    static uint64_t counts[4096];
    tsrvi_addresses table;
    uint64_t used = 0, most = 0;
    unsigned seed = keys;
    memset(&table, 0, sizeof table);
    memset(counts, 0, sizeof counts);
    for (unsigned i = 0; i < steps; i++) {
        unsigned key = (seed = seed * 1103515245 + 12345) / 65536 % keys;
        bool grows = i < steps / 2 ? seed / 7 % 3 != 0 : seed / 7 % 3 == 0;
        if (grows) {
            int rc = tsrvi_addresses_add(&table, key * 0x100000001u, 5);
            CHECK_INT(rc, counts[key] < 5 ? TSRV_OK : TSRV_EFULL);
            used += counts[key] == 0;
            counts[key] += rc == TSRV_OK;
        } else if (counts[key] != 0) {
            tsrvi_addresses_remove(&table, key * 0x100000001u);
            used -= --counts[key] == 0;
        }
        most = used > most ? used : most;
        CHECK_INT(table.used, used);
        CHECK(table.used * 2 <= table.capacity);
        CHECK(table.capacity <= TSRVI_ADDRESSES_LEAST || table.capacity < 4 * (most + 1)); /* it grew when half full */
        CHECK(table.capacity <= TSRVI_ADDRESSES_LEAST || table.capacity <= used * 8 + 8);
    }
    for (unsigned key = 0; key < keys; key++) {
        for (; counts[key] != 0; counts[key]--) {
            tsrvi_addresses_remove(&table, key * 0x100000001u);
        }
    }
    CHECK_INT(table.used, 0);
    CHECK(table.capacity <= 2 * TSRVI_ADDRESSES_LEAST);
    TSRV_FREE(table.entries);
}

TEST_LOOP(table_of_addresses_counts_as_an_array_does)
{
    check_table(3, 2000);
    check_table(100, 10000);
    check_table(4096, 60000);
    t_fail_call("open", 0, 1, true);
    check_table(100, 2000);
}

/* Who could know where an address lies could have all of his addresses lie in one place. */
static void check_secrets(void)
{
    enum { TABLES = 8 };
    tsrvi_addresses tables[TABLES];
    memset(tables, 0, sizeof tables);
    for (int i = 0; i < TABLES; i++) {
        CHECK_INT(tsrvi_addresses_add(&tables[i], 1, 5), TSRV_OK);
        for (int j = 0; j < i; j++) {
            CHECK(memcmp(tables[i].secret, tables[j].secret, sizeof tables[i].secret) != 0);
            CHECK(tables[i].secret[0] != tables[j].secret[0] || t_fault_hits > 0);
        }
    }
    for (int i = 0; i < TABLES; i++) {
        TSRV_FREE(tables[i].entries);
    }
}

TEST_LOOP(each_table_of_addresses_has_a_secret_of_its_own)
{
    check_secrets();
    t_fail_call("open", 0, 1, true); /* there is no source of secrets: what there is is better than nothing */
    check_secrets();
}

/* ---- on_accept -----------------------------------------------------------------------------*/

static int asked, ended;

static int refuse_every_second(tsrv_server *server, const tsrv_address *address, void *context)
{
    char text[TSRV_ADDRESS_SIZE];
    CHECK(server == s_server);
    CHECK(context == &asked);
    CHECK(strncmp(tsrv_address_format(address, text, sizeof text), "127.0.0.1:", 10) == 0);
    CHECK_INT(entered, asked / 2 + asked % 2);
    return asked++ % 2 == 0 ? TSRV_OK : -EACCES;
}

static void count_end(tsrv_stream *stream, int reason, void *context)
{
    (void)stream, (void)reason, (void)context;
    ended++;
}

static void open_asking(int (*on_accept)(tsrv_server *, const tsrv_address *, void *))
{
    tsrv_server_options options = defaults;
    asked = entered = ended = 0;
    options.handle_stream = enter_and_echo;
    options.on_close = count_end;
    options.on_accept = on_accept;
    options.context = &asked;
    options.max_per_address = 100;
    options.data_size = sizeof(bool);
    s_open(options);
}

TEST_LOOP(on_accept_refuses_before_there_is_a_stream)
{
    int fds[6];
    open_asking(refuse_every_second);
    t_watch_log();
    for (int i = 0; i < 6; i++) {
        fds[i] = connect_from("127.0.0.1");
        if (i % 2 == 0) {
            s_echo(fds[i], "hello\n");
        } else {
            s_expect_reset(fds[i]);
        }
    }
    CHECK_INT(asked, 6);
    CHECK_INT(s_stats().accepted, 3);
    CHECK_INT(s_stats().refused, 3);
    CHECK_INT(s_stats().accept_errors, 0);
    CHECK_INT(t_log_lines, 0);
    CHECK_INT(s_server->addresses.used, 1);
    for (int i = 0; i < 6; i++) {
        t_close(fds[i]);
    }
    s_until(&ended, 3);
    s_close();
    CHECK_INT(ended, 3);
}

static int refuse_all(tsrv_server *server, const tsrv_address *address, void *context)
{
    (void)server, (void)address, (void)context;
    asked++;
    return -EACCES;
}

/* Who adds a stream has accepted it. */
TEST_LOOP(on_accept_is_not_asked_for_a_stream_that_is_added)
{
    int pair[2];
    open_asking(refuse_all);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK_INT(tsrv_server_add_stream(s_server, pair[0]), TSRV_OK);
    s_echo(pair[1], "hello\n");
    CHECK_INT(asked, 0);
    CHECK_INT(s_stats().refused, 0);
    s_finish(pair[1]);
    s_close();
}

static int refuse_and_stop(tsrv_server *server, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    asked++;
    tsrv_server_stop(server);
    return -EACCES;
}

/* Neither from inside tsrv_server_stop, nor for who waits then. */
TEST_LOOP(on_accept_may_stop_the_server)
{
    open_asking(refuse_and_stop);
    int one = connect_from("127.0.0.1"), other = connect_from("127.0.0.1");
    s_expect_reset(one);
    s_expect_reset(other);
    CHECK_INT(asked, 1);
    CHECK_INT(entered, 0);
    t_close(one);
    t_close(other);
    s_close();
}

/* It allows what it has made impossible: nothing would look after that stream. */
static int allow_and_drain(tsrv_server *server, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    asked++;
    CHECK_INT(tsrv_server_drain(server, 1000), TSRV_OK);
    return TSRV_OK;
}

TEST_LOOP(on_accept_may_drain_the_server)
{
    open_asking(allow_and_drain);
    int client = connect_from("127.0.0.1");
    s_expect_reset(client);
    CHECK_INT(asked, 1);
    CHECK_INT(entered, 0);
    CHECK_INT(s_stats().refused, 1);
    t_close(client);
    s_close();
}

/* Those that wait when the server stops are taken, whoever floods it. */
TEST_LOOP(refused_crowd_keeps_nobody_from_the_last_accepts)
{
    int fds[50];
    open_limited(1);
    for (int i = 0; i < 50; i++) {
        fds[i] = connect_from("127.0.0.1");
    }
    int other = connect_from("127.0.0.2");
    tsrv_server_stop(s_server);
    s_echo(other, "hello\n");
    CHECK_INT(s_stats().refused, 49);
    t_close_all(fds, 50);
    t_close(other);
    s_until(&s_closed, 2);
    s_close();
}

static int allow_and_free(tsrv_server *server, const tsrv_address *address, void *context)
{
    (void)address, (void)context;
    asked++;
    tsrv_server_free(server);
    return TSRV_OK;
}

TEST_LOOP(on_accept_may_free_the_server)
{
    tsrv_server_options options = defaults;
    tsrv_server *server;
    tsrv_loop *loop = t_new_loop();
    tsrv_address address;
    asked = entered = 0;
    options.handle_stream = enter_and_echo;
    options.on_accept = allow_and_free;
    options.loop = loop;
    options.data_size = sizeof(bool);
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    CHECK_INT(tsrv_server_listen(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
    int client = t_connect_tcp(tsrv_address_port(&address), 0);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(asked, 1);
    CHECK_INT(entered, 0);
    t_close(client);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    CHECK_INT(t_live_allocations, 0);
}

/* ---- options of TCP ------------------------------------------------------------------------*/

#ifndef TCP_KEEPIDLE
#define TCP_KEEPIDLE TCP_KEEPALIVE /* macOS */
#endif

static void check_options(int fd, int keep_alive, int idle, int interval, int count, int user)
{
    CHECK_INT(t_socket_option(fd, SOL_SOCKET, SO_KEEPALIVE), keep_alive);
    CHECK_INT(t_socket_option(fd, IPPROTO_TCP, TCP_KEEPIDLE), idle);
    CHECK_INT(t_socket_option(fd, IPPROTO_TCP, TCP_KEEPINTVL), interval);
    CHECK_INT(t_socket_option(fd, IPPROTO_TCP, TCP_KEEPCNT), count);
#ifdef TCP_USER_TIMEOUT
    CHECK_INT(t_socket_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT), user);
#else
    (void)user;
#endif
}

/* Two have connected before the listener was the server's, as with socket activation, and one comes later. */
static void check_queued(const tsrv_server_options *options, int keep_alive, int idle, int interval, int count, int user)
{
    int port, listener = t_raw_socket(SOCK_STREAM, true, &port), clients[3], closed = s_closed, seen = 0;
    clients[0] = t_connect(port);
    clients[1] = t_connect(port);
    CHECK_INT(tsrv_server_add_sockets(s_server, &listener, 1), TSRV_OK);
    s_echo(clients[1], "hello\n");
    clients[2] = t_connect(port);
    s_echo(clients[2], "hello\n");
    for (tsrv_stream *s = tsrv_server_next(s_server, NULL); s != NULL; s = tsrv_server_next(s_server, s)) {
        check_options(tsrv_fd(s), keep_alive, idle, interval, count, user);
        CHECK_INT(t_socket_option(tsrv_fd(s), IPPROTO_TCP, TCP_NODELAY) != 0, !options->nagle);
        seen++;
    }
    CHECK_INT(seen, 3);
    for (int i = 0; i < 3; i++) {
        t_close(clients[i]);
    }
    s_until(&s_closed, closed + 3);
}

static void check_served(tsrv_server_options options, int keep_alive, int idle, int interval, int count, int user)
{
    int port, listener, client, added;
    entered = 0;
    options.data_size = sizeof(bool);
    s_open_with(enter_and_echo, options);
    client = t_connect(s_port);
    s_echo(client, "hello\n");
    check_options(tsrv_fd(tsrv_server_next(s_server, NULL)), keep_alive, idle, interval, count, user);
    t_close(client);
    s_until(&s_closed, 1);
    listener = t_raw_socket(SOCK_STREAM, true, &port);
    client = t_connect(port);
    added = accept(listener, NULL, NULL);
    CHECK_INT(tsrv_server_add_stream(s_server, added), TSRV_OK);
    check_options(added, keep_alive, idle, interval, count, user);
    t_close(client);
    close(listener);
    s_until(&s_closed, 2);
    check_queued(&options, keep_alive, idle, interval, count, user);
    s_close();
}

TEST_LOOP(keep_alive_has_its_times)
{
    tsrv_server_options options = defaults;
    int plain = socket(AF_INET, SOCK_STREAM, 0);
    int idle = t_socket_option(plain, IPPROTO_TCP, TCP_KEEPIDLE), interval = t_socket_option(plain, IPPROTO_TCP, TCP_KEEPINTVL);
    int count = t_socket_option(plain, IPPROTO_TCP, TCP_KEEPCNT);
    close(plain);
    check_served(options, 0, idle, interval, count, 0);
    options.keep_alive = true;
    check_served(options, 1, idle, interval, count, 0);
    options.keep_alive = false;
    options.keep_alive_idle_ms = 30001;
    check_served(options, 1, 31, interval, count, 0);
    options.keep_alive_interval_ms = 1;
    options.keep_alive_count = 4;
    options.user_timeout_ms = 12345;
    check_served(options, 1, 31, 1, 4, 12345);
    options.keep_alive_idle_ms = options.keep_alive_interval_ms = INT_MAX;
    options.keep_alive_count = INT_MAX;
    check_served(options, 1, 32767, 32767, 127, 12345);
    options = defaults;
    options.keep_alive_idle_ms = 1; /* any of its times switches it on, the least too */
    check_served(options, 1, 1, interval, count, 0);
    options = defaults;
    options.keep_alive_interval_ms = 1;
    check_served(options, 1, idle, 1, count, 0);
    options.keep_alive_interval_ms = 2000;
    check_served(options, 1, idle, 2, count, 0);
    options = defaults;
    options.keep_alive_count = 1;
    check_served(options, 1, idle, interval, 1, 0);
    options = defaults;
    options.user_timeout_ms = 1;
    check_served(options, 0, idle, interval, count, 1);
}
