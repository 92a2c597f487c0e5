/* The loop: timers, watches, posts, signals, running, embedding, forks. Its core is what Tornado's
 * ioloop_test.py checks. */
#include "test.h"

#include "handlers.h"

#include <sys/resource.h>

static void free_loop(tsrv_loop *loop)
{
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* A watch on a pipe to which nobody writes: it keeps a loop running. */
typedef struct idle_watch {
    tsrv_watch watch;
    int fds[2];
} idle_watch;

static void start_idle(tsrv_loop *loop, idle_watch *idle)
{
    memset(idle, 0, sizeof *idle);
    CHECK(pipe(idle->fds) == 0);
    CHECK_INT(tsrv_watch_start(loop, &idle->watch, idle->fds[0], TSRV_READABLE, never_called, NULL),
              TSRV_OK);
}

static void stop_idle(idle_watch *idle)
{
    tsrv_watch_stop(&idle->watch);
    t_close_all(idle->fds, 2);
}

static void count_ready(int events, void *context)
{
    (void)events;
    ++*(int *)context;
}

static void count_call(void *context)
{
    ++*(int *)context;
}

/* ---- timers -------------------------------------------------------------------------------*/

TEST_LOOP(equal_timers_fire_in_the_order_of_their_start)
{
    enum { COUNT = 200 };
    static const int delays[] = {0, 4};
    static tsrv_timer timers[COUNT];
    static int ids[COUNT];
    tsrv_loop *loop = t_new_loop();
    for (int d = 0; d < 2; d++) {
        int before = t_record_count();
        for (int i = 0; i < COUNT; i++) {
            ids[i] = i;
            CHECK_INT(tsrv_timer_start(loop, &timers[i], delays[d], t_record_call, &ids[i]), TSRV_OK);
        }
        CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
        CHECK_INT(t_record_count(), before + COUNT);
        for (int i = 0; i < COUNT; i++) {
            CHECK_INT(t_recorded(before + i), i);
        }
    }
    free_loop(loop);
}

TEST_LOOP(restarted_timer_goes_behind_its_equals)
{
    tsrv_timer timers[3] = {0};
    int ids[3] = {0, 1, 2};
    tsrv_loop *loop = t_new_loop();
    for (int i = 0; i < 3; i++) {
        CHECK_INT(tsrv_timer_start(loop, &timers[i], 0, t_record_call, &ids[i]), TSRV_OK);
    }
    CHECK_INT(tsrv_timer_start(loop, &timers[0], 0, t_record_call, &ids[0]), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(t_record_count(), 3);
    CHECK_INT(t_recorded(0), 1);
    CHECK_INT(t_recorded(1), 2);
    CHECK_INT(t_recorded(2), 0);
    free_loop(loop);
}

typedef struct timed {
    tsrv_timer timer;
    tsrv_loop *loop;
    int64_t started;
    int64_t elapsed; /* -1 = has not fired */
} timed;

static timed new_timed(void)
{
    timed t = {0};
    t.loop = t_new_loop();
    t.elapsed = -1;
    return t;
}

static void note_elapsed(void *context)
{
    timed *t = (timed *)context;
    t->elapsed = t_now_ms() - t->started;
}

static void start_timed(timed *t, int delay_ms)
{
    t->elapsed = -1;
    t->started = t_now_ms();
    CHECK_INT(tsrv_timer_start(t->loop, &t->timer, delay_ms, note_elapsed, t), TSRV_OK);
}

TEST_LOOP(timer_never_fires_early)
{
    static const int delays[] = {0, 1, 2, 3, 7, 15, 33, 60};
    enum { COUNT = COUNT(delays) };
    static timed timers[COUNT];
    tsrv_loop *loop = t_new_loop();
    for (int i = 0; i < COUNT; i++) {
        timers[i].loop = loop;
        start_timed(&timers[i], delays[i]);
    }
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    for (int i = 0; i < COUNT; i++) {
        CHECK_NEAR_MS(timers[i].elapsed, delays[i], delays[i] + 1000);
    }
    free_loop(loop);
}

static int turns_after;

static void dawdle_then_start(void *context)
{
    timed *t = (timed *)context;
    poll(NULL, 0, 25);
    start_timed(t, 10);
    /* The next turn comes at once, and has read the clock anew. */
    CHECK_INT(tsrv_loop_post(t->loop, count_call, &turns_after), TSRV_OK);
}

/* The clock is read once a turn: a callback that took long must not shorten what it starts. */
TEST_LOOP(timer_started_late_in_a_turn_is_not_early)
{
    tsrv_timer first = {0};
    timed second = new_timed();
    CHECK_INT(tsrv_timer_start(second.loop, &first, 0, dawdle_then_start, &second), TSRV_OK);
    CHECK_INT(tsrv_loop_run(second.loop), TSRV_OK);
    CHECK_INT(turns_after, 1);
    CHECK_NEAR_MS(second.elapsed, 10, 1000);
    free_loop(second.loop);
}

/* A wait that is cut to whole milliseconds would spin through the last one. */
TEST_LOOP(waiting_for_a_timer_takes_few_turns)
{
    timed t = new_timed();
    int turns = 0;
    start_timed(&t, 20);
    while (t.elapsed < 0) {
        CHECK(tsrv_loop_run_once(t.loop, TSRV_NEVER) >= 0);
        turns++;
    }
    CHECK(turns <= 3);
    free_loop(t.loop);
}

TEST_LOOP(test_timeout_with_many_adds_and_removes)
{
    enum { COUNT = 2000 };
    static tsrv_timer timers[COUNT];
    tsrv_timer last = {0};
    int calls = 0, last_calls = 0;
    int64_t start = t_now_ms();
    tsrv_loop *loop = t_new_loop();
    for (int i = 0; i < COUNT; i++) {
        CHECK_INT(tsrv_timer_start(loop, &timers[i], 3600000 + i % 7, count_call, &calls), TSRV_OK);
    }
    /* From both ends and the middle, so that every place of the heap is emptied. */
    for (int i = 0; i < COUNT; i++) {
        tsrv_timer_stop(&timers[(i * 1201) % COUNT]);
    }
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0);
    CHECK_INT(tsrv_timer_start(loop, &last, 5, count_call, &last_calls), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_NEAR_MS(t_now_ms() - start, 5, 5000);
    CHECK_INT(last_calls, 1);
    CHECK_INT(calls, 0);
    free_loop(loop);
}

/* Random starts, restarts and stops, inside callbacks too, against what is allowed by our clock. */
enum { ORACLE_TIMERS = 400, ORACLE_STARTS = 4000 };

typedef struct oracle_timer {
    tsrv_timer timer;
    int64_t earliest; /* when it may fire */
    int64_t latest;   /* what it may be due at, the clock having moved while it was started */
    bool armed;
} oracle_timer;

static oracle_timer oracle_timers[ORACLE_TIMERS];
static tsrv_loop *oracle_loop;
static int oracle_starts, oracle_fired;
static uint32_t oracle_seed = 12345;

static int oracle_random(int limit)
{
    return (int)(next_random(&oracle_seed) % (unsigned)limit);
}

static void oracle_fire(void *context);

static void oracle_start(oracle_timer *t)
{
    int delay = oracle_random(25);
    if (oracle_starts++ >= ORACLE_STARTS) {
        return;
    }
    t->earliest = t_now_ms() + delay;
    CHECK_INT(tsrv_timer_start(oracle_loop, &t->timer, delay, oracle_fire, t), TSRV_OK);
    t->latest = t_now_ms() + delay;
    t->armed = true;
}

static void oracle_fire(void *context)
{
    oracle_timer *t = (oracle_timer *)context;
    int64_t now = t_now_ms();
    CHECK(t->armed);
    t->armed = false;
    oracle_fired++;
    CHECK_NEAR_MS(now - t->earliest, 0, 1000);
    for (int i = 0; i < ORACLE_TIMERS; i++) {
        if (oracle_timers[i].armed && oracle_timers[i].latest + 1 < t->earliest) {
            T_FAIL("a timer due at %lld fired before one due at %lld", (long long)t->earliest,
                   (long long)oracle_timers[i].latest);
        }
    }
    if (oracle_random(3) > 0) {
        oracle_start(t);
    }
    if (oracle_random(2) > 0) {
        oracle_start(&oracle_timers[oracle_random(ORACLE_TIMERS)]);
    }
    if (oracle_random(4) == 0) {
        oracle_timer *other = &oracle_timers[oracle_random(ORACLE_TIMERS)];
        tsrv_timer_stop(&other->timer);
        other->armed = false;
    }
}

TEST_LOOP(random_timers_agree_with_the_oracle)
{
    oracle_loop = t_new_loop();
    for (int i = 0; i < ORACLE_TIMERS; i++) {
        oracle_start(&oracle_timers[i]);
    }
    CHECK_INT(tsrv_loop_run(oracle_loop), TSRV_OK);
    CHECK(oracle_fired > ORACLE_TIMERS / 2);
    for (int i = 0; i < ORACLE_TIMERS; i++) {
        CHECK(!oracle_timers[i].armed);
    }
    free_loop(oracle_loop);
}

typedef struct timer_pair {
    tsrv_timer timers[2];
    int fired;
} timer_pair;

static void stop_both(void *context)
{
    timer_pair *pair = (timer_pair *)context;
    pair->fired++;
    tsrv_timer_stop(&pair->timers[0]);
    tsrv_timer_stop(&pair->timers[1]);
}

TEST_LOOP(test_remove_timeout_from_timeout)
{
    static const int delays[][2] = {{0, 0}, {1, 1}, {1, 2}, {2, 1}};
    tsrv_loop *loop = t_new_loop();
    for (int i = 0; i < 4; i++) {
        timer_pair pair = {0};
        for (int k = 0; k < 2; k++) {
            CHECK_INT(tsrv_timer_start(loop, &pair.timers[k], delays[i][k], stop_both, &pair),
                      TSRV_OK);
        }
        poll(NULL, 0, 5); /* now both are due */
        CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
        CHECK_INT(pair.fired, 1);
        tsrv_timer_stop(&pair.timers[0]); /* over, and still harmless */
    }
    free_loop(loop);
}

typedef struct repeater {
    timed t;
    int left;
    int delay_ms;
} repeater;

static void repeat(void *context)
{
    repeater *r = (repeater *)context;
    int64_t now = t_now_ms();
    CHECK(now - r->t.started >= r->delay_ms);
    if (--r->left > 0) {
        r->t.started = now;
        CHECK_INT(tsrv_timer_start(r->t.loop, &r->t.timer, r->delay_ms, repeat, r), TSRV_OK);
    }
}

TEST_LOOP(timer_repeats_by_starting_itself)
{
    repeater r = {new_timed(), 6, 4};
    r.t.started = t_now_ms();
    CHECK_INT(tsrv_timer_start(r.t.loop, &r.t.timer, r.delay_ms, repeat, &r), TSRV_OK);
    CHECK_INT(tsrv_loop_run(r.t.loop), TSRV_OK);
    CHECK_INT(r.left, 0);
    free_loop(r.t.loop);
}

TEST_LOOP(starting_an_armed_timer_changes_it)
{
    tsrv_timer timer = {0};
    timed t = new_timed();
    int old_calls = 0, new_calls = 0;
    CHECK_INT(tsrv_timer_start(t.loop, &timer, 3600000, count_call, &old_calls), TSRV_OK);
    CHECK_INT(tsrv_timer_start(t.loop, &timer, 1, count_call, &new_calls), TSRV_OK);
    start_timed(&t, 1);
    start_timed(&t, 30);
    CHECK_INT(tsrv_loop_run(t.loop), TSRV_OK);
    CHECK_INT(old_calls, 0);
    CHECK_INT(new_calls, 1);
    CHECK_NEAR_MS(t.elapsed, 30, 1000);
    free_loop(t.loop);
}

static void start_at_once(void *context)
{
    repeater *r = (repeater *)context;
    r->left++;
    CHECK_INT(tsrv_timer_start(r->t.loop, &r->t.timer, 0, start_at_once, r), TSRV_OK);
}

static void count_event(int events, void *context)
{
    (void)events;
    ++*(int *)context;
}

TEST_LOOP(zero_delay_means_the_next_turn_and_starves_nobody)
{
    repeater r = {new_timed(), 0, 0};
    tsrv_watch watch = {0};
    int fds[2], events = 0;
    CHECK(pipe(fds) == 0);
    CHECK(write(fds[1], "x", 1) == 1);
    CHECK_INT(tsrv_watch_start(r.t.loop, &watch, fds[0], TSRV_READABLE, count_event, &events),
              TSRV_OK);
    CHECK_INT(tsrv_timer_start(r.t.loop, &r.t.timer, 0, start_at_once, &r), TSRV_OK);
    for (int turn = 1; turn <= 20; turn++) {
        CHECK(tsrv_loop_run_once(r.t.loop, TSRV_NEVER) > 0);
        CHECK_INT(r.left, turn);
        CHECK_INT(events, turn);
    }
    tsrv_timer_stop(&r.t.timer);
    tsrv_watch_stop(&watch);
    free_loop(r.t.loop);
    t_close_all(fds, 2);
}

static void free_itself(void *context)
{
    t_record(1);
    free(context);
}

/* The library is done with a timer before it calls it. */
TEST_LOOP(timer_may_be_freed_in_its_callback)
{
    tsrv_loop *loop = t_new_loop();
    for (int i = 0; i < 50; i++) {
        tsrv_timer *timer = (tsrv_timer *)calloc(1, sizeof *timer);
        CHECK(timer != NULL);
        CHECK_INT(tsrv_timer_start(loop, timer, i % 3, free_itself, timer), TSRV_OK);
    }
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(t_record_count(), 50);
    free_loop(loop);
}

TEST_LOOP(timer_limits)
{
    tsrv_timer timer = {0}, never_started = {0};
    int calls = 0;
    tsrv_loop *loop = t_new_loop();
    tsrv_timer_stop(&never_started);
    CHECK_INT(tsrv_timer_start(loop, &timer, -1, count_call, &calls), TSRV_EINVAL);
    CHECK_INT(tsrv_timer_start(loop, &timer, INT32_MIN, count_call, &calls), TSRV_EINVAL);
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0);
    CHECK_INT(tsrv_timer_start(loop, &timer, INT32_MAX, count_call, &calls), TSRV_OK);
    CHECK(tsrv_loop_timeout_ms(loop) > 3600000);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(calls, 0);
    tsrv_timer_stop(&timer);
    tsrv_timer_stop(&timer);
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0);
    free_loop(loop);
}

/* ---- watches ------------------------------------------------------------------------------*/

typedef struct seen {
    int events;
    int calls;
} seen;

static void see(int events, void *context)
{
    seen *s = (seen *)context;
    s->events |= events;
    s->calls++;
}

/* Also Tornado's test_read_while_writeable: nobody hears of a direction that he did not ask for. */
TEST_LOOP(test_read_while_writeable)
{
    static const struct {
        int interest;
        bool data;
        int expected;
    } rows[] = {
        {TSRV_READABLE, false, 0},
        {TSRV_READABLE, true, TSRV_READABLE},
        {TSRV_WRITABLE, false, TSRV_WRITABLE},
        {TSRV_WRITABLE, true, TSRV_WRITABLE},
        {TSRV_READABLE | TSRV_WRITABLE, false, TSRV_WRITABLE},
        {TSRV_READABLE | TSRV_WRITABLE, true, TSRV_READABLE | TSRV_WRITABLE},
    };
    tsrv_loop *loop = t_new_loop();
    for (size_t i = 0; i < COUNT(rows); i++) {
        tsrv_watch watch = {0};
        seen s = {0, 0};
        int fds[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
        if (rows[i].data) {
            t_sends(fds[1], "x");
        }
        CHECK_INT(tsrv_watch_start(loop, &watch, fds[0], rows[i].interest, see, &s), TSRV_OK);
        CHECK_INT(s.calls, 0);
        for (int turn = 1; turn <= 3; turn++) {
            CHECK(tsrv_loop_run_once(loop, 0) > 0);
            CHECK_INT(s.calls, rows[i].expected != 0 ? turn : 0);
            CHECK_INT(s.events, rows[i].expected);
        }
        tsrv_watch_stop(&watch);
        tsrv_watch_stop(&watch);
        CHECK_INT(tsrv_loop_run_once(loop, 0), 0);
        t_close_all(fds, 2);
    }
    free_loop(loop);
}

TEST_LOOP(starting_an_active_watch_changes_it)
{
    tsrv_watch watch = {0};
    seen first = {0, 0}, second = {0, 0}, third = {0, 0};
    int pair[2], other[2];
    tsrv_loop *loop = t_new_loop();
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, other) == 0);
    t_sends(other[1], "x");
    CHECK_INT(tsrv_watch_start(loop, &watch, pair[0], TSRV_READABLE, see, &first), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(tsrv_watch_start(loop, &watch, pair[0], TSRV_WRITABLE, see, &second), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(second.calls, 1);
    CHECK_INT(second.events, TSRV_WRITABLE);
    CHECK_INT(tsrv_watch_start(loop, &watch, other[0], TSRV_READABLE, see, &third), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(third.calls, 1);
    CHECK_INT(third.events, TSRV_READABLE);
    CHECK_INT(second.calls, 1);
    CHECK_INT(first.calls, 0);
    tsrv_watch_stop(&watch);
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0);
    /* It left its first descriptor behind in good order. */
    CHECK_INT(tsrv_watch_start(loop, &watch, pair[0], TSRV_WRITABLE, see, &first), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(first.calls, 1);
    tsrv_watch_stop(&watch);
    free_loop(loop);
    for (int i = 0; i < 2; i++) {
        t_close(pair[i]);
        t_close(other[i]);
    }
}

TEST_LOOP(test_add_handler_twice_is_refused)
{
    tsrv_watch first = {0}, second = {0};
    seen s = {0, 0}, refused = {0, 0};
    int fds[2];
    tsrv_loop *loop = t_new_loop();
    CHECK(pipe(fds) == 0);
    CHECK_INT(tsrv_watch_start(loop, &first, fds[1], TSRV_WRITABLE, see, &s), TSRV_OK);
    CHECK_INT(tsrv_watch_start(loop, &second, fds[1], TSRV_WRITABLE, see, &refused), TSRV_EBUSY);
    tsrv_watch_stop(&second);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(s.calls, 1);
    CHECK_INT(refused.calls, 0);
    tsrv_watch_stop(&first);
    CHECK_INT(tsrv_watch_start(loop, &second, fds[1], TSRV_WRITABLE, see, &refused), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(refused.calls, 1);
    tsrv_watch_stop(&second);
    free_loop(loop);
    t_close_all(fds, 2);
}

TEST_LOOP(watch_refuses_bad_arguments)
{
    static const int bad_events[] = {0, 4, 7, -1};
    tsrv_watch watch = {0};
    seen s = {0, 0};
    int fds[2];
    FILE *file = tmpfile();
    tsrv_loop *loop = t_new_loop();
    CHECK(file != NULL);
    CHECK(pipe(fds) == 0);
    tsrv_watch_stop(&watch);
    for (size_t i = 0; i < COUNT(bad_events); i++) {
        CHECK_INT(tsrv_watch_start(loop, &watch, fds[0], bad_events[i], see, &s), TSRV_EINVAL);
    }
    CHECK(tsrv_watch_start(loop, &watch, -1, TSRV_READABLE, see, &s) < 0);
    t_close(fds[0]);
    CHECK_INT(tsrv_watch_start(loop, &watch, fds[0], TSRV_READABLE, see, &s), -EBADF);
    CHECK_INT(tsrv_watch_start(loop, &watch, INT_MAX, TSRV_READABLE, see, &s), -EBADF);
    CHECK(loop->poller.page_count <= 1); /* it has cost no memory, nor a search for what it has left */
    if (t_backend == TSRV_BACKEND_EPOLL) {
        CHECK_INT(tsrv_watch_start(loop, &watch, fileno(file), TSRV_READABLE, see, &s), -EPERM);
    }
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0);
    CHECK_INT(s.calls, 0);
    free_loop(loop);
    t_close(fds[1]);
    CHECK(fclose(file) == 0);
}

/* Some hang-ups come without any readiness, and must still end somebody's wait. */
TEST_LOOP(hang_up_is_reported_as_what_was_asked_for)
{
    static const struct {
        bool pair; /* a socket pair, else a pipe */
        int end;   /* which one is watched */
        int interest;
    } rows[] = {{false, 0, TSRV_READABLE}, {false, 1, TSRV_WRITABLE}, {true, 0, TSRV_READABLE},
                {true, 0, TSRV_WRITABLE}, {true, 0, TSRV_READABLE | TSRV_WRITABLE}};
    tsrv_loop *loop = t_new_loop();
    for (size_t i = 0; i < COUNT(rows); i++) {
        tsrv_watch watch = {0};
        seen s = {0, 0};
        int fds[2];
        CHECK((rows[i].pair ? socketpair(AF_UNIX, SOCK_STREAM, 0, fds) : pipe(fds)) == 0);
        CHECK_INT(tsrv_watch_start(loop, &watch, fds[rows[i].end], rows[i].interest, see, &s),
                  TSRV_OK);
        t_close(fds[1 - rows[i].end]);
        CHECK(tsrv_loop_run_once(loop, TSRV_NEVER) > 0);
        CHECK_INT(s.calls, 1);
        CHECK_INT(s.events, rows[i].interest);
        tsrv_watch_stop(&watch);
        t_close(fds[rows[i].end]);
    }
    free_loop(loop);
}

enum { BATCH = 3 };

typedef struct batch_member {
    tsrv_watch watch;
    struct batch_member *all;
    int fds[2];
    int calls;
} batch_member;

static void stop_the_others(int events, void *context)
{
    batch_member *me = (batch_member *)context;
    CHECK_INT(events, TSRV_READABLE);
    me->calls++;
    for (int i = 0; i < BATCH; i++) {
        if (&me->all[i] != me) {
            tsrv_watch_stop(&me->all[i].watch);
        }
    }
}

TEST_LOOP(test_remove_handler_from_handler)
{
    static batch_member all[BATCH];
    int calls = 0;
    tsrv_loop *loop = t_new_loop();
    for (int i = 0; i < BATCH; i++) {
        all[i].all = all;
        CHECK(pipe(all[i].fds) == 0);
        CHECK(write(all[i].fds[1], "x", 1) == 1);
        CHECK_INT(tsrv_watch_start(loop, &all[i].watch, all[i].fds[0], TSRV_READABLE,
                                   stop_the_others, &all[i]), TSRV_OK);
    }
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    for (int i = 0; i < BATCH; i++) {
        calls += all[i].calls;
        tsrv_watch_stop(&all[i].watch);
        t_close_all(all[i].fds, 2);
    }
    CHECK_INT(calls, 1);
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0);
    free_loop(loop);
}

/* Two watches are ready at once. The first that is called ends the other, and puts a new pipe on
 * its descriptor: the event that is still in the batch belongs to the old one. */
typedef struct reuse_case {
    tsrv_loop *loop;
    tsrv_watch watches[2];
    int pipes[2][2];
    tsrv_watch fresh;
    tsrv_watch *fresh_watch; /* which structure watches the new pipe: the old one, or fresh */
    int fresh_fd, fresh_writer;
    seen fresh_seen;
    int calls;
    bool same_structure;
} reuse_case;

static void replace(reuse_case *c, int other)
{
    int fds[2];
    if (c->calls++ > 0) {
        return;
    }
    CHECK(pipe(fds) == 0);
    tsrv_watch_stop(&c->watches[other]);
    c->fresh_fd = c->pipes[other][0];
    CHECK(dup2(fds[0], c->fresh_fd) == c->fresh_fd); /* closes the old one */
    t_close(fds[0]);
    c->fresh_writer = fds[1];
    c->fresh_watch = c->same_structure ? &c->watches[other] : &c->fresh;
    CHECK_INT(tsrv_watch_start(c->loop, c->fresh_watch, c->fresh_fd, TSRV_READABLE, see,
                               &c->fresh_seen), TSRV_OK);
}

static void replace_second(int events, void *context)
{
    (void)events;
    replace((reuse_case *)context, 1);
}

static void replace_first(int events, void *context)
{
    (void)events;
    replace((reuse_case *)context, 0);
}

TEST_LOOP(descriptor_reused_within_a_batch_gets_no_stale_event)
{
    for (int variant = 0; variant < 2; variant++) {
        static reuse_case c;
        memset(&c, 0, sizeof c);
        c.loop = t_new_loop();
        c.same_structure = variant == 1;
        for (int i = 0; i < 2; i++) {
            CHECK(pipe(c.pipes[i]) == 0);
            CHECK(write(c.pipes[i][1], "x", 1) == 1);
            CHECK_INT(tsrv_watch_start(c.loop, &c.watches[i], c.pipes[i][0], TSRV_READABLE,
                                       i == 0 ? replace_second : replace_first, &c), TSRV_OK);
        }
        CHECK(tsrv_loop_run_once(c.loop, 0) > 0);
        CHECK_INT(c.calls, 1);
        CHECK_INT(c.fresh_seen.calls, 0);
        CHECK(tsrv_loop_run_once(c.loop, 0) > 0);
        CHECK_INT(c.fresh_seen.calls, 0);
        CHECK(write(c.fresh_writer, "x", 1) == 1);
        CHECK(tsrv_loop_run_once(c.loop, 0) > 0);
        CHECK_INT(c.fresh_seen.calls, 1);
        tsrv_watch_stop(c.fresh_watch);
        tsrv_watch_stop(&c.watches[0]);
        tsrv_watch_stop(&c.watches[1]);
        free_loop(c.loop);
        for (int i = 0; i < 4; i++) {
            t_close(c.pipes[i / 2][i % 2]);
        }
        t_close(c.fresh_writer);
    }
}

static void close_itself(int events, void *context)
{
    batch_member *me = (batch_member *)context;
    CHECK_INT(events, TSRV_READABLE);
    me->calls++;
    tsrv_watch_stop(&me->watch);
    t_close(me->fds[0]);
}

TEST_LOOP(watch_may_end_itself_and_its_descriptor)
{
    batch_member me = {0};
    tsrv_loop *loop = t_new_loop();
    for (int round = 1; round <= 3; round++) {
        CHECK(pipe(me.fds) == 0);
        CHECK(write(me.fds[1], "x", 1) == 1);
        CHECK_INT(tsrv_watch_start(loop, &me.watch, me.fds[0], TSRV_READABLE, close_itself, &me),
                  TSRV_OK);
        CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
        CHECK_INT(me.calls, round);
        t_close(me.fds[1]);
    }
    free_loop(loop);
}

TEST_LOOP(hundreds_of_watches_are_all_served)
{
    enum { COUNT = 120 };
    static batch_member all[COUNT];
    tsrv_loop *loop = t_new_loop();
    for (int i = 0; i < COUNT; i++) {
        CHECK(pipe(all[i].fds) == 0);
        CHECK(write(all[i].fds[1], "x", 1) == 1);
        CHECK_INT(tsrv_watch_start(loop, &all[i].watch, all[i].fds[0], TSRV_READABLE, close_itself,
                                   &all[i]), TSRV_OK);
    }
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    for (int i = 0; i < COUNT; i++) {
        CHECK_INT(all[i].calls, 1);
        t_close(all[i].fds[1]);
    }
    free_loop(loop);
}

/* ---- posts --------------------------------------------------------------------------------*/

TEST_LOOP(posts_are_called_in_order_and_not_inside_the_call)
{
    enum { COUNT = 1000 };
    static int ids[COUNT];
    tsrv_loop *loop = t_new_loop();
    for (int i = 0; i < COUNT; i++) {
        ids[i] = i;
        CHECK_INT(tsrv_loop_post(loop, t_record_call, &ids[i]), TSRV_OK);
    }
    CHECK_INT(t_record_count(), 0);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(t_record_count(), COUNT);
    for (int i = 0; i < COUNT; i++) {
        CHECK_INT(t_recorded(i), i);
    }
    free_loop(loop);
}

static void post_again(void *context)
{
    repeater *r = (repeater *)context;
    r->left++;
    CHECK_INT(tsrv_loop_post(r->t.loop, post_again, r), TSRV_OK);
}

TEST_LOOP(post_from_a_post_waits_for_the_next_turn)
{
    repeater r = {new_timed(), 0, 0};
    tsrv_timer timer = {0};
    CHECK_INT(tsrv_loop_post(r.t.loop, post_again, &r), TSRV_OK);
    for (int turn = 1; turn <= 20; turn++) {
        CHECK(tsrv_loop_run_once(r.t.loop, TSRV_NEVER) > 0);
        CHECK_INT(r.left, turn);
    }
    /* Nor does it keep timers from firing. */
    CHECK_INT(tsrv_timer_start(r.t.loop, &timer, 5, t_stop_loop, r.t.loop), TSRV_OK);
    CHECK_INT(tsrv_loop_run(r.t.loop), TSRV_OK);
    free_loop(r.t.loop);
}

typedef struct ping_case {
    tsrv_loop *loop;
    int fds[2];
} ping_case;

static void ping_answer(void *context)
{
    CHECK(write(((ping_case *)context)->fds[1], "", 1) == 1);
}

static void *ping_thread(void *context)
{
    ping_case *c = (ping_case *)context;
    char byte;
    for (int i = 0; i < 2000; i++) {
        CHECK_INT(tsrv_loop_post(c->loop, ping_answer, c), TSRV_OK);
        CHECK(read(c->fds[0], &byte, 1) == 1);
    }
    CHECK_INT(tsrv_loop_post(c->loop, t_stop_loop, c->loop), TSRV_OK);
    return NULL;
}

/* Each answer is awaited, so that the loop is about to sleep, or asleep, at every post: one lost
 * wake-up and the test hangs. */
TEST_LOOP(test_add_callback_wakeup_other_thread)
{
    ping_case c = {t_new_loop(), {0, 0}};
    idle_watch idle;
    pthread_t thread;
    start_idle(c.loop, &idle);
    CHECK(pipe(c.fds) == 0);
    CHECK_INT(pthread_create(&thread, NULL, ping_thread, &c), 0);
    CHECK_INT(tsrv_loop_run(c.loop), TSRV_OK);
    CHECK_INT(pthread_join(thread, NULL), 0);
    stop_idle(&idle);
    free_loop(c.loop);
    t_close_all(c.fds, 2);
}

enum { POSTERS = 8, POSTS = 3000 };

typedef struct poster {
    tsrv_loop *loop;
    int *finished;   /* the loop's thread only */
    int next;        /* what has to come next; the loop's thread only */
    struct posted {
        struct poster *poster;
        int number;
    } posts[POSTS];
} poster;

static void receive_post(void *context)
{
    struct posted *posted = (struct posted *)context;
    CHECK_INT(posted->number, posted->poster->next);
    if (++posted->poster->next == POSTS && ++*posted->poster->finished == POSTERS) {
        tsrv_loop_stop(posted->poster->loop);
    }
}

static void *poster_thread(void *context)
{
    poster *p = (poster *)context;
    for (int i = 0; i < POSTS; i++) {
        p->posts[i].poster = p;
        p->posts[i].number = i;
        CHECK_INT(tsrv_loop_post(p->loop, receive_post, &p->posts[i]), TSRV_OK);
    }
    return NULL;
}

TEST_LOOP(posts_of_many_threads_keep_the_order_of_each)
{
    static poster posters[POSTERS];
    pthread_t threads[POSTERS];
    idle_watch idle;
    int finished = 0;
    tsrv_loop *loop = t_new_loop();
    start_idle(loop, &idle);
    for (int i = 0; i < POSTERS; i++) {
        posters[i].loop = loop;
        posters[i].finished = &finished;
        CHECK_INT(pthread_create(&threads[i], NULL, poster_thread, &posters[i]), 0);
    }
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    for (int i = 0; i < POSTERS; i++) {
        CHECK_INT(pthread_join(threads[i], NULL), 0);
        CHECK_INT(posters[i].next, POSTS);
    }
    stop_idle(&idle);
    free_loop(loop);
}

/* The post of a thread ends the loop, and the loop's thread frees it at once, while the call of the
 * thread is still about to wake it. */
typedef struct last_post {
    tsrv_loop *loop;
    bool hold;     /* keep the poster between its post and its wake-up */
    bool called;   /* the loop's thread only */
    int freeing;   /* atomic; tsrv_loop_free waits for the poster, or did not */
    int freed;     /* atomic */
} last_post;

static last_post *last;
static __thread bool is_poster;

static void hold_the_poster(const char *name)
{
    if (strcmp(name, "sched_yield") == 0) {
        __atomic_store_n(&last->freeing, 1, __ATOMIC_RELEASE);
    } else if (is_poster && last->hold && strcmp(name, "write") == 0) {
        while (__atomic_load_n(&last->freeing, __ATOMIC_ACQUIRE) == 0) {
            poll(NULL, 0, 0);
        }
        CHECK_INT(__atomic_load_n(&last->freed, __ATOMIC_ACQUIRE), 0);
    }
}

static void note_call(void *context)
{
    ((last_post *)context)->called = true;
}

static void *post_the_last(void *context)
{
    last_post *p = (last_post *)context;
    is_poster = true;
    CHECK_INT(tsrv_loop_post(p->loop, note_call, p), TSRV_OK);
    return NULL;
}

TEST_LOOP(loop_freed_by_the_last_post_waits_for_its_poster)
{
    enum { REPETITIONS = 1000 };
    t_seen = hold_the_poster;
    for (int i = 0; i < REPETITIONS; i++) {
        last_post p = {0};
        pthread_t thread;
        idle_watch idle;
        last = &p;
        p.hold = i % 2 == 0; /* else the threads race */
        p.loop = t_new_loop();
        start_idle(p.loop, &idle);
        CHECK_INT(pthread_create(&thread, NULL, post_the_last, &p), 0);
        while (!p.called) {
            CHECK(tsrv_loop_run_once(p.loop, 0) > 0); /* it finds the post without its wake-up */
        }
        free_loop(p.loop);
        __atomic_store_n(&p.freed, 1, __ATOMIC_RELEASE);
        __atomic_store_n(&p.freeing, 1, __ATOMIC_RELEASE);
        CHECK_INT(pthread_join(thread, NULL), 0);
        stop_idle(&idle);
    }
    t_seen = NULL;
}
LONG(loop_freed_by_the_last_post_waits_for_its_poster);

TEST_LOOP(test_add_callback_while_closing)
{
    int calls = 0;
    tsrv_loop *loop = t_new_loop();
    for (int i = 0; i < 10; i++) {
        CHECK_INT(tsrv_loop_post(loop, count_call, &calls), TSRV_OK);
    }
    free_loop(loop);
    CHECK_INT(calls, 0);
}

/* ---- running ------------------------------------------------------------------------------*/

TEST_LOOP(run_returns_when_nothing_is_left_but_signal_watches)
{
    tsrv_signal signal_watch = {0};
    tsrv_timer timer = {0};
    int calls = 0, signals = 0;
    tsrv_loop *loop = t_new_loop();
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(tsrv_signal_start(loop, &signal_watch, SIGUSR1, count_call, &signals), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(tsrv_loop_run_once(loop, TSRV_NEVER), 0);
    CHECK_INT(tsrv_timer_start(loop, &timer, 5, count_call, &calls), TSRV_OK);
    CHECK_INT(tsrv_loop_post(loop, count_call, &calls), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(calls, 2);
    CHECK_INT(signals, 0);
    tsrv_signal_stop(&signal_watch);
    free_loop(loop);
}

static void sleep_5(void *context)
{
    ++*(int *)context;
    CHECK_INT(tsrv_sleep(5), TSRV_OK);
    ++*(int *)context;
}

TEST_LOOP(run_once_tells_whether_something_is_left)
{
    tsrv_timer timer = {0};
    idle_watch idle;
    int calls = 0, left = -1;
    int64_t start;
    tsrv_loop *loop = t_new_loop();
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0);
    CHECK_INT(tsrv_loop_run_once(loop, TSRV_NEVER), 0);

    CHECK_INT(tsrv_timer_start(loop, &timer, 3600000, count_call, &calls), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(calls, 0);
    CHECK_INT(tsrv_timer_start(loop, &timer, 10, count_call, &calls), TSRV_OK);
    while (calls == 0) {
        left = tsrv_loop_run_once(loop, 0);
    }
    CHECK_INT(left, 0);

    CHECK_INT(tsrv_loop_post(loop, count_call, &calls), TSRV_OK);
    CHECK_INT(tsrv_loop_run_once(loop, TSRV_NEVER), 0);
    CHECK_INT(calls, 2);

    CHECK_INT(tsrv_spawn(loop, sleep_5, &calls), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, TSRV_NEVER) > 0);
    CHECK_INT(calls, 3);
    t_turn_until(loop, &calls, 4);
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0);

    start_idle(loop, &idle);
    start = t_now_ms();
    CHECK(tsrv_loop_run_once(loop, 20) > 0);
    CHECK_NEAR_MS(t_now_ms() - start, 19, 1000);
    stop_idle(&idle);
    CHECK_INT(tsrv_loop_run_once(loop, TSRV_NEVER), 0);
    free_loop(loop);
}

static void try_nested(void *context)
{
    tsrv_loop *loop = (tsrv_loop *)context;
    CHECK_INT(tsrv_loop_run(loop), TSRV_EBUSY);
    CHECK_INT(tsrv_loop_run_once(loop, 0), TSRV_EBUSY);
    CHECK_INT(tsrv_loop_free(loop), TSRV_EBUSY);
    CHECK(tsrv_loop_current() == loop);
    t_record(1);
}

static void try_nested_watch(int events, void *context)
{
    (void)events;
    try_nested(context);
    tsrv_loop_stop((tsrv_loop *)context);
}

TEST_LOOP(test_nested_start_is_refused)
{
    tsrv_timer timer = {0};
    tsrv_watch watch = {0};
    tsrv_signal signal_watch = {0};
    int fds[2];
    tsrv_loop *loop = t_new_loop();
    CHECK_INT(tsrv_loop_post(loop, try_nested, loop), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(tsrv_timer_start(loop, &timer, 0, try_nested, loop), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(tsrv_spawn(loop, try_nested, loop), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(t_record_count(), 3);

    CHECK(pipe(fds) == 0);
    CHECK_INT(tsrv_signal_start(loop, &signal_watch, SIGUSR1, try_nested, loop), TSRV_OK);
    CHECK(raise(SIGUSR1) == 0);
    while (t_record_count() < 4) {
        CHECK(tsrv_loop_run_once(loop, 10) >= 0);
    }
    tsrv_signal_stop(&signal_watch);
    CHECK_INT(tsrv_watch_start(loop, &watch, fds[1], TSRV_WRITABLE, try_nested_watch, loop),
              TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(t_record_count(), 5);
    tsrv_watch_stop(&watch);
    free_loop(loop);
    t_close_all(fds, 2);
}

TEST_LOOP(stop_before_run_holds_once)
{
    tsrv_timer timer = {0};
    idle_watch idle;
    int64_t start;
    tsrv_loop *loop = t_new_loop();
    start_idle(loop, &idle);
    tsrv_loop_stop(loop);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    start = t_now_ms();
    CHECK_INT(tsrv_timer_start(loop, &timer, 20, t_stop_loop, loop), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_NEAR_MS(t_now_ms() - start, 20, 1000);
    stop_idle(&idle);
    free_loop(loop);
}

TEST_LOOP(stop_lets_the_turn_finish)
{
    idle_watch idle;
    int calls = 0;
    tsrv_loop *loop = t_new_loop();
    start_idle(loop, &idle);
    for (int round = 1; round <= 2; round++) {
        CHECK_INT(tsrv_loop_post(loop, t_stop_loop, loop), TSRV_OK);
        CHECK_INT(tsrv_loop_post(loop, count_call, &calls), TSRV_OK);
        CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
        CHECK_INT(calls, round);
    }
    stop_idle(&idle);
    free_loop(loop);
}

static void note_current(void *context)
{
    *(tsrv_loop **)context = tsrv_loop_current();
}

static void *other_thread(void *context)
{
    tsrv_loop *loop = tsrv_loop_current();
    int calls = 0;
    CHECK(loop != NULL && loop != context);
    CHECK_INT(tsrv_loop_post(NULL, count_call, &calls), TSRV_OK);
    CHECK_INT(tsrv_loop_run(NULL), TSRV_OK);
    CHECK_INT(calls, 1);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
    return NULL;
}

TEST_ONCE(current_loop_is_the_running_one_else_the_threads_own)
{
    tsrv_timer timer = {0};
    tsrv_loop *made, *own, *seen_in_made = NULL, *seen_in_own = NULL;
    pthread_t thread;
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK); /* there is none yet */
    CHECK_INT(tsrv_loop_new(&made, NULL), TSRV_OK);
    own = tsrv_loop_current();
    CHECK(own != NULL && own != made);
    CHECK(tsrv_loop_current() == own);
    CHECK_INT(tsrv_loop_post(made, note_current, &seen_in_made), TSRV_OK);
    CHECK_INT(tsrv_loop_run(made), TSRV_OK);
    CHECK(seen_in_made == made);
    CHECK_INT(tsrv_timer_start(NULL, &timer, 0, note_current, &seen_in_own), TSRV_OK);
    CHECK_INT(tsrv_loop_run(NULL), TSRV_OK);
    CHECK(seen_in_own == own);
    CHECK_INT(pthread_create(&thread, NULL, other_thread, own), 0);
    CHECK_INT(pthread_join(thread, NULL), 0);
    free_loop(made);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
    CHECK(tsrv_loop_current() != NULL); /* made anew */
    free_loop(tsrv_loop_current());
}

TEST_LOOP(now_follows_the_clock)
{
    tsrv_timer timer = {0};
    int calls = 0;
    tsrv_loop *loop = t_new_loop();
    int64_t first, start = t_now_ms();
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0);
    first = tsrv_loop_now_ms(loop);
    CHECK_INT(tsrv_timer_start(loop, &timer, 30, count_call, &calls), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_NEAR_MS(tsrv_loop_now_ms(loop) - first, 29, t_now_ms() - start + 1);
    free_loop(loop);
}

TEST_ONCE(backends_are_chosen_by_number)
{
    static const struct {
        int backend;
        bool here;
    } rows[] = {
        {TSRV_BACKEND_EPOLL, TSRVI_HAS_EPOLL}, {TSRV_BACKEND_KQUEUE, TSRVI_HAS_KQUEUE},
        {TSRV_BACKEND_POLL, true}, {99, false}, {-1, false}};
    tsrv_loop_options best = {0};
    best.backend = TSRV_BACKEND_BEST;
    tsrv_loop *loop, *by_default;
    for (size_t i = 0; i < COUNT(rows); i++) {
        tsrv_loop_options options = {0};
        options.backend = rows[i].backend;
        loop = (tsrv_loop *)&options; /* to see it cleared */
        if (rows[i].here) {
            CHECK_INT(tsrv_loop_new(&loop, &options), TSRV_OK);
            CHECK_INT(tsrv_loop_backend(loop), rows[i].backend);
            free_loop(loop);
        } else {
            CHECK_INT(tsrv_loop_new(&loop, &options), TSRV_ENOTSUP);
            CHECK(loop == NULL);
        }
    }
    CHECK_INT(tsrv_loop_new(&loop, &best), TSRV_OK);
    CHECK_INT(tsrv_loop_new(&by_default, NULL), TSRV_OK);
    CHECK(tsrv_loop_backend(loop) != TSRV_BACKEND_BEST);
    CHECK_INT(tsrv_loop_backend(loop), tsrv_loop_backend(by_default));
    free_loop(loop);
    free_loop(by_default);
}

#if TSRVI_HAS_EPOLL
/* A kernel without epoll, or a policy against it: the best is the next one then, and that is said
 * once. Who has asked for epoll is told. A lack of descriptors is no reason. */
TEST_ONCE(best_backend_is_the_best_that_is_not_refused)
{
    static const struct {
        const char *call;
        int code;
        bool other;
    } rows[] = {{"epoll_create1", ENOSYS, true}, {"epoll_create1", EPERM, true},
                {"epoll_create1", EACCES, true}, {"epoll_create1", EINVAL, true},
                {"epoll_ctl", ENOSYS, true},     {"epoll_ctl", EPERM, true},
                {"epoll_create1", EMFILE, false}, {"epoll_create1", ENOMEM, false},
                {"epoll_ctl", ENOMEM, false},    {"epoll_ctl", ENOSPC, false}};
    tsrv_loop_options best = {0}, asked = {0};
    asked.backend = TSRV_BACKEND_EPOLL;
    for (size_t i = 0; i < COUNT(rows); i++) {
        int before = t_open_fds();
        tsrv_loop *loop = NULL;
        tsrvi_process.without = 0; /* as in a new process */
        t_watch_info();
        t_fail_call(rows[i].call, rows[i].code, 1, true);
        CHECK_INT(tsrv_loop_new(&loop, &asked), -rows[i].code);
        CHECK(loop == NULL);
        CHECK_INT(t_log_lines, 0);
        for (int round = 0; round < 2; round++) {
            tsrv_timer timer = {0};
            int calls = 0;
            CHECK_INT(tsrv_loop_new(&loop, round == 0 ? &best : NULL),
                      rows[i].other ? TSRV_OK : -rows[i].code);
            if (loop != NULL) {
                CHECK(tsrv_loop_backend(loop) != TSRV_BACKEND_EPOLL);
                CHECK_INT(tsrv_timer_start(loop, &timer, 1, count_call, &calls), TSRV_OK);
                CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
                CHECK_INT(calls, 1);
                free_loop(loop);
            }
        }
        CHECK_INT(t_log_lines, rows[i].other);
        t_fault_at = 0;
        CHECK_INT(t_open_fds(), before);
    }
}
#endif

/* Without an eventfd a pipe wakes the loop; without either there is none. */
TEST_LOOP(pipe_wakes_a_loop_without_eventfd)
{
    tsrv_loop_options options = {0};
    options.backend = t_backend;
    tsrv_loop *loop;
    int calls = 0, before = t_open_fds();
    t_fail_call("eventfd", ENOSYS, 1, true);
    CHECK_INT(tsrv_loop_new(&loop, &options), TSRV_OK);
    CHECK_INT(t_fault_hits, TSRVI_HAS_EVENTFD);
    CHECK(loop->sources.wake_write != loop->sources.wake.fd);
    CHECK_INT(tsrv_loop_post(loop, count_call, &calls), TSRV_OK);
    t_turn_until(loop, &calls, 1);
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0); /* what has woken it is read */
    free_loop(loop);
    t_fault_errno = EMFILE;
    t_fault_name = TSRVI_HAS_EVENTFD ? "eventfd" : "pipe";
    CHECK_INT(tsrv_loop_new(&loop, &options), -EMFILE);
    t_fault_at = 0;
    CHECK_INT(t_open_fds(), before);
}

/* However often it was woken, one turn reads it all. */
TEST_LOOP(pipe_is_emptied_in_one_turn)
{
    tsrv_loop_options options = {0};
    options.backend = t_backend;
    tsrv_loop *loop;
    idle_watch idle;
    char byte;
    t_fail_call("eventfd", ENOSYS, 1, true);
    CHECK_INT(tsrv_loop_new(&loop, &options), TSRV_OK);
    t_fault_at = 0;
    start_idle(loop, &idle);
    for (int i = 0; i < 100; i++) {
        tsrvi_wake_write(loop->sources.wake_write);
    }
    CHECK_INT(tsrv_loop_run_once(loop, 0), 1);
    stop_idle(&idle);
    CHECK_INT(read(loop->sources.wake.fd, &byte, 1), -1);
    CHECK_INT(errno, EAGAIN);
    free_loop(loop);
}

/* ---- ends of descriptors' events -----------------------------------------------------------*/

typedef struct rivals {
    tsrv_watch watches[2];
    int pairs[2][2], calls;
} rivals;

/* Whoever is called first has the other one wait for something else. */
static void change_the_other(int events, void *context)
{
    rivals *r = (rivals *)context;
    CHECK_INT(events, TSRV_READABLE);
    r->calls++;
    for (int i = 0; i < 2; i++) {
        CHECK_INT(tsrv_watch_start(r->watches[i].loop, &r->watches[i], r->pairs[i][0], TSRV_WRITABLE, change_the_other,
                                   r),
                  TSRV_OK);
    }
}

/* Its event is in the batch by then, and is none any more. */
TEST_LOOP(event_that_is_not_wanted_any_more_is_not_told)
{
    static char zeros[65536];
    rivals r;
    tsrv_loop *loop = t_new_loop();
    memset(&r, 0, sizeof r);
    for (int i = 0; i < 2; i++) {
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, r.pairs[i]) == 0);
        while (send(r.pairs[i][0], zeros, sizeof zeros, MSG_DONTWAIT) > 0 ||
               send(r.pairs[i][0], zeros, 1, MSG_DONTWAIT) > 0) {
        }
        CHECK(write(r.pairs[i][1], "x", 1) == 1);
        CHECK_INT(tsrv_watch_start(loop, &r.watches[i], r.pairs[i][0], TSRV_READABLE, change_the_other, &r), TSRV_OK);
    }
    CHECK_INT(tsrv_loop_run_once(loop, 0), 1);
    CHECK_INT(r.calls, 1);
    CHECK_INT(tsrv_loop_run_once(loop, 0), 1);
    CHECK_INT(r.calls, 1);
    for (int i = 0; i < 2; i++) {
        tsrv_watch_stop(&r.watches[i]);
        t_close_all(r.pairs[i], 2);
    }
    free_loop(loop);
}

/* ---- more events than a batch --------------------------------------------------------------*/

enum { CROWD = TSRVI_BATCH + 30 };

static tsrv_watch crowd[CROWD];
static int crowd_fds[CROWD], crowd_calls[CROWD], crowd_pipe[2];

/* A loop with so many watches, which are always ready. */
static tsrv_loop *open_crowd(int count)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur < CROWD + 50) {
        SKIP("descriptors for a batch");
    }
    tsrv_loop *loop = t_new_loop();
    CHECK(pipe(crowd_pipe) == 0 && write(crowd_pipe[1], "x", 1) == 1);
    for (int i = 0; i < count; i++) {
        crowd_fds[i] = dup(crowd_pipe[0]);
        CHECK_INT(tsrv_watch_start(loop, &crowd[i], crowd_fds[i], TSRV_READABLE, count_ready, &crowd_calls[i]),
                  TSRV_OK);
    }
    return loop;
}

static int calls_of_crowd(void)
{
    int calls = 0;
    for (int i = 0; i < CROWD; i++) {
        calls += crowd_calls[i];
    }
    return calls;
}

static void close_crowd(tsrv_loop *loop, int count)
{
    for (int i = 0; i < count; i++) {
        tsrv_watch_stop(&crowd[i]);
        close(crowd_fds[i]);
    }
    t_close_all(crowd_pipe, 2);
    free_loop(loop);
}

/* No turn serves more than that, and all have theirs soon. */
TEST_LOOP(events_beyond_a_batch_are_served_in_the_next_turns)
{
    tsrv_loop *loop = open_crowd(CROWD);
    for (int turns = 0, served = 0; served < CROWD; turns++) {
        int before = calls_of_crowd();
        CHECK(turns < 20);
        CHECK_INT(tsrv_loop_run_once(loop, 0), 1);
        int after = calls_of_crowd();
        CHECK(after > before && after - before <= TSRVI_BATCH);
        served = 0;
        for (int i = 0; i < CROWD; i++) {
            served += crowd_calls[i] > 0;
        }
    }
    close_crowd(loop, CROWD);
}

static int beats;

static void count_beat(tsrvi_timer *timer)
{
    (void)timer;
    beats++;
}

/* A loop that is turned by hand, and seldom, is not late: each of its turns has looked at all that came before. */
TEST_LOOP(timers_fire_in_the_first_turn_that_is_asked_for)
{
    tsrv_loop *loop = t_new_loop();
    tsrv_timer timer = {0};
    int fired = 0;
    for (int i = 1; i <= 3; i++) {
        CHECK_INT(tsrv_timer_start(loop, &timer, 1, count_call, &fired), TSRV_OK);
        poll(NULL, 0, TSRVI_BEHIND_MS + 30);
        tsrv_loop_run_once(loop, 0);
        CHECK_INT(fired, i);
    }
    CHECK_INT(tsrv_timer_start(loop, &timer, 1, count_call, &fired), TSRV_OK);
    poll(NULL, 0, TSRVI_BEHIND_MS + 30);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(fired, 4);
    free_loop(loop);
}

/* Where there are always more events than a turn serves, timers wait for a while; but not the beat by which a worker
 * says that it does not hang. */
TEST_LOOP(beat_waits_for_no_events)
{
    tsrv_loop *loop = open_crowd(CROWD);
    tsrv_timer timer = {0};
    int fired = 0;
    CHECK_INT(tsrv_timer_start(loop, &timer, 0, count_call, &fired), TSRV_OK);
    beats = 0;
    loop->worker.beat.fire = count_beat;
    for (int turns = 1; turns <= 2; turns++) {
        tsrvi_heap_set(&loop->heap, &loop->worker.beat, tsrvi_clock());
        CHECK_INT(tsrv_loop_run_once(loop, 0), 1);
        CHECK_INT(beats, turns);
        CHECK_INT(fired, 0);
    }
    tsrv_timer_stop(&timer);
    close_crowd(loop, CROWD);
}

/* Where there are always more events than a batch, timers wait, but not for ever. */
TEST_LOOP(full_batches_hold_up_a_timer_for_some_turns_only)
{
    tsrv_loop *loop = open_crowd(TSRVI_BATCH);
    tsrv_timer timer = {0};
    int calls = 0, turns = 0;
    CHECK_INT(tsrv_timer_start(loop, &timer, 0, count_call, &calls), TSRV_OK);
    for (; calls == 0 && turns < 1000; turns++) {
        CHECK_INT(tsrv_loop_run_once(loop, 0), 1);
    }
    CHECK_INT(turns, 2 * loop->poller.page_count + 2); /* for two events of each descriptor */
    CHECK_INT(calls_of_crowd(), turns * TSRVI_BATCH);
    close_crowd(loop, TSRVI_BATCH);
}

typedef struct paused {
    tsrv_loop *loop;
    tsrv_timer timer;
    tsrv_watch watch;
    int fds[2];
    int heard, timeouts;
} paused;

static void hear(int events, void *context)
{
    paused *p = (paused *)context;
    (void)events;
    p->heard++;
    tsrv_watch_stop(&p->watch);
    tsrv_timer_stop(&p->timer); /* as what waits for bytes, and not for ever */
}

/* This handler takes so long that the time is over long ago; the bytes came before that. */
static void stand_still(void *context)
{
    paused *p = (paused *)context;
    if (p->fds[1] > 0) {
        CHECK(write(p->fds[1], "x", 1) == 1);
    }
    p->timer.node.due -= 1000 * TSRVI_MS;
    p->loop->entered -= 1000 * TSRVI_MS;
}

/* Whoever has said something in time is not timed out because the process stood still, as after SIGSTOP. */
TEST_LOOP(after_a_pause_events_come_before_timers)
{
    paused p = {0};
    p.loop = t_new_loop();
    CHECK(pipe(p.fds) == 0);
    CHECK_INT(tsrv_watch_start(p.loop, &p.watch, p.fds[0], TSRV_READABLE, hear, &p), TSRV_OK);
    CHECK_INT(tsrv_timer_start(p.loop, &p.timer, 500, count_call, &p.timeouts), TSRV_OK);
    CHECK_INT(tsrv_loop_post(p.loop, stand_still, &p), TSRV_OK);
    CHECK_INT(tsrv_loop_run_once(p.loop, 0), 1);
    CHECK_INT(p.heard + p.timeouts, 0);
    CHECK_INT(tsrv_loop_timeout_ms(p.loop), 0); /* an outer loop comes back at once */
    CHECK_INT(tsrv_loop_run_once(p.loop, TSRV_NEVER), 0);
    CHECK_INT(p.heard, 1);
    CHECK_INT(p.timeouts, 0);
    t_close_all(p.fds, 2);
    free_loop(p.loop);
}

/* And if nobody has, it is one turn that the timer waits for. */
TEST_LOOP(after_a_pause_a_timer_waits_for_one_turn)
{
    paused p = {0};
    p.loop = t_new_loop();
    CHECK_INT(tsrv_timer_start(p.loop, &p.timer, 500, count_call, &p.timeouts), TSRV_OK);
    CHECK_INT(tsrv_loop_post(p.loop, stand_still, &p), TSRV_OK);
    CHECK_INT(tsrv_loop_run_once(p.loop, TSRV_NEVER), 1);
    CHECK_INT(p.timeouts, 0);
    CHECK_INT(tsrv_loop_run_once(p.loop, TSRV_NEVER), 0);
    CHECK_INT(p.timeouts, 1);
    free_loop(p.loop);
}

/* A time that is further away than an int can say is waited for in several waits. */
TEST_LOOP(time_far_away_is_as_far_as_can_be_said)
{
    tsrv_timer timer = {0};
    tsrv_loop *loop = t_new_loop();
    CHECK_INT(tsrv_timer_start(loop, &timer, INT_MAX, count_call, NULL), TSRV_OK);
    CHECK_INT(tsrvi_loop_sleep_ms(loop, loop->now - TSRVI_MS), INT_MAX);
    CHECK(tsrvi_loop_sleep_ms(loop, tsrvi_clock()) > INT_MAX - 3600 * 1000);
    tsrv_timer_stop(&timer);
    free_loop(loop);
}

/* Behind the last descriptor that was ever waited for there is nobody. */
TEST_LOOP(nobody_waits_for_a_number_out_of_range)
{
    tsrv_loop *loop = t_new_loop();
    CHECK(tsrvi_poller_find(&loop->poller, loop->sources.wake.fd) == &loop->sources.wake);
    CHECK(tsrvi_poller_find(&loop->poller, loop->poller.page_count * TSRVI_PAGE) == NULL);
    CHECK(tsrvi_poller_find(&loop->poller, INT_MAX) == NULL);
    free_loop(loop);
}

static tsrv_loop *left_loop;
static int yields;

static void poster_is_done(const char *name)
{
    if (strcmp(name, "sched_yield") == 0 && ++yields == 3) {
        __atomic_store_n(&left_loop->sources.posting, 0, __ATOMIC_RELEASE);
        __atomic_store_n(&tsrvi_process.signal_handlers, 1, __ATOMIC_SEQ_CST);
    } else if (strcmp(name, "sched_yield") == 0 && yields == 5) {
        __atomic_store_n(&tsrvi_process.signal_handlers, 0, __ATOMIC_SEQ_CST);
    }
}

/* Another thread is inside tsrv_loop_post, then one is in the handler of a signal. */
TEST_LOOP(loop_goes_when_nobody_is_about_to_wake_it)
{
    left_loop = t_new_loop();
    __atomic_store_n(&left_loop->sources.posting, 1, __ATOMIC_RELEASE);
    t_seen = poster_is_done;
    free_loop(left_loop);
    t_seen = NULL;
    CHECK_INT(yields, 5);
}

/* Its last watch has been stopped on another thread meanwhile. */
TEST_LOOP(signal_that_nobody_watches_any_more_is_nobodys)
{
    tsrv_signal watch = {0};
    tsrv_loop *loop = t_new_loop();
    tsrvi_signal_handler(SIGUSR1);
    CHECK_INT(tsrvi_process.signal_handlers, 0);
    CHECK_INT(tsrv_signal_start(loop, &watch, SIGUSR1, count_call, NULL), TSRV_OK);
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0);
    tsrv_signal_stop(&watch);
    free_loop(loop);
}

TEST_LOOP(loop_without_descriptors_is_a_code)
{
    tsrv_loop_options options = {0};
    options.backend = t_backend;
    tsrv_loop *loop = (tsrv_loop *)&options;
    struct rlimit limit, none;
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    none = limit;
    none.rlim_cur = 1;
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
    int rc = tsrv_loop_new(&loop, &options);
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    CHECK_INT(rc, -EMFILE);
    CHECK(loop == NULL);
}

/* ---- signals ------------------------------------------------------------------------------*/

static void raise_five_times(void *context)
{
    (void)context;
    for (int i = 0; i < 5; i++) {
        CHECK(raise(SIGUSR1) == 0);
    }
}

TEST_LOOP(signal_reaches_all_its_watches_once)
{
    tsrv_signal watches[4] = {0};
    int calls[4] = {0};
    idle_watch idle;
    tsrv_loop *loop = t_new_loop();
    start_idle(loop, &idle);
    for (int i = 0; i < 4; i++) {
        CHECK_INT(tsrv_signal_start(loop, &watches[i], i < 3 ? SIGUSR1 : SIGUSR2, count_call,
                                    &calls[i]), TSRV_OK);
    }
    CHECK_INT(tsrv_loop_post(loop, raise_five_times, NULL), TSRV_OK);
    t_turn_until(loop, &calls[2], 1);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    for (int i = 0; i < 3; i++) {
        CHECK_INT(calls[i], 1);
    }
    CHECK_INT(calls[3], 0);
    tsrv_signal_stop(&watches[1]);
    CHECK(raise(SIGUSR1) == 0);
    CHECK(raise(SIGUSR2) == 0);
    t_turn_until(loop, &calls[3], 1);
    t_turn_until(loop, &calls[0], 2);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(calls[0], 2);
    CHECK_INT(calls[1], 1);
    CHECK_INT(calls[2], 2);
    CHECK_INT(calls[3], 1);
    for (int i = 0; i < 4; i++) {
        tsrv_signal_stop(&watches[i]);
        tsrv_signal_stop(&watches[i]);
    }
    stop_idle(&idle);
    free_loop(loop);
}

static tsrv_signal stoppers[3];

static void stop_all_watches(void *context)
{
    count_call(context);
    for (int i = 0; i < 3; i++) {
        tsrv_signal_stop(&stoppers[i]);
    }
}

TEST_LOOP(signal_watches_may_be_stopped_in_a_callback)
{
    struct sigaction after;
    idle_watch idle;
    int calls = 0;
    tsrv_loop *loop = t_new_loop();
    start_idle(loop, &idle);
    for (int i = 0; i < 3; i++) {
        CHECK_INT(tsrv_signal_start(loop, &stoppers[i], SIGUSR1, stop_all_watches, &calls),
                  TSRV_OK);
    }
    CHECK(raise(SIGUSR1) == 0);
    t_turn_until(loop, &calls, 1);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(calls, 1);
    CHECK(sigaction(SIGUSR1, NULL, &after) == 0);
    CHECK(after.sa_handler == SIG_DFL);
    stop_idle(&idle);
    free_loop(loop);
}

typedef struct successor {
    tsrv_loop *loop;
    tsrv_signal signal;
    int signo, calls;
} successor;

static void start_successor(void *context)
{
    successor *s = (successor *)context;
    CHECK_INT(tsrv_signal_start(s->loop, &s->signal, s->signo, count_call, &s->calls), TSRV_OK);
}

/* It was not there when that came which is being told. */
TEST_LOOP(signal_watch_started_in_a_callback_hears_of_later_signals)
{
    successor s = {0};
    tsrv_signal first = {0}, second = {0};
    int calls = 0;
    s.loop = t_new_loop();
    s.signo = SIGUSR1;
    CHECK_INT(tsrv_signal_start(s.loop, &first, SIGUSR1, start_successor, &s), TSRV_OK);
    CHECK_INT(tsrv_signal_start(s.loop, &second, SIGUSR1, count_call, &calls), TSRV_OK);
    for (int i = 0; i < 2; i++) {
        CHECK(raise(SIGUSR1) == 0);
        CHECK_INT(tsrv_loop_run_once(s.loop, 0), 0);
        CHECK_INT(calls, i + 1);
        CHECK_INT(s.calls, i);
    }
    tsrv_signal_stop(&first);
    tsrv_signal_stop(&second);
    tsrv_signal_stop(&s.signal);
    free_loop(s.loop);
}

static void start_successor_and_raise(void *context)
{
    start_successor(context);
    CHECK(raise(((successor *)context)->signo) == 0);
}

TEST_LOOP(signal_that_comes_behind_the_start_of_its_watch_is_not_lost)
{
    static const int signals[] = {SIGUSR1, SIGUSR2};
    for (int i = 0; i < 4; i++) {
        successor s = {0};
        tsrv_signal first = {0};
        s.loop = t_new_loop();
        s.signo = signals[i % 2];
        CHECK_INT(tsrv_signal_start(s.loop, &first, signals[i / 2], start_successor_and_raise, &s), TSRV_OK);
        CHECK(raise(signals[i / 2]) == 0);
        CHECK(tsrv_loop_run_once(s.loop, 0) >= 0);
        tsrv_signal_stop(&first);
        CHECK_INT(tsrv_loop_run_once(s.loop, 0), 0);
        CHECK_INT(s.calls, 1);
        tsrv_signal_stop(&s.signal);
        free_loop(s.loop);
    }
}

static volatile sig_atomic_t own_calls;

static void own_handler(int signo)
{
    (void)signo;
    own_calls = own_calls + 1;
}

static void check_same_action(const struct sigaction *a, const struct sigaction *b)
{
    CHECK(a->sa_handler == b->sa_handler);
    CHECK_INT(a->sa_flags, b->sa_flags);
    for (int signo = 1; signo < 32; signo++) {
        CHECK_INT(sigismember(&a->sa_mask, signo), sigismember(&b->sa_mask, signo));
    }
}

TEST_LOOP(last_signal_watch_puts_the_old_handler_back)
{
    void (*const handlers[])(int) = {own_handler, SIG_IGN, SIG_DFL};
    tsrv_loop *loop = t_new_loop();
    for (int i = 0; i < 3; i++) {
        struct sigaction own, before, during, after;
        tsrv_signal first = {0}, second = {0};
        int calls = 0;
        memset(&own, 0, sizeof own);
        own.sa_handler = handlers[i];
        own.sa_flags = SA_RESTART | SA_NODEFER;
        sigemptyset(&own.sa_mask);
        sigaddset(&own.sa_mask, SIGUSR2);
        CHECK(sigaction(SIGUSR1, &own, NULL) == 0);
        CHECK(sigaction(SIGUSR1, NULL, &before) == 0);
        CHECK_INT(tsrv_signal_start(loop, &first, SIGUSR1, count_call, &calls), TSRV_OK);
        CHECK_INT(tsrv_signal_start(loop, &second, SIGUSR1, count_call, &calls), TSRV_OK);
        tsrv_signal_stop(&first);
        CHECK(sigaction(SIGUSR1, NULL, &during) == 0);
        CHECK(during.sa_handler != handlers[i]);
        tsrv_signal_stop(&second);
        CHECK(sigaction(SIGUSR1, NULL, &after) == 0);
        check_same_action(&after, &before);
    }
    CHECK_INT(own_calls, 0);
    free_loop(loop);
}

static void own_long_handler(int signo, siginfo_t *info, void *machine)
{
    (void)signo, (void)info, (void)machine;
}

/* The program has set a handler of its own meanwhile, of either kind, which is not taken away from it. */
TEST_LOOP(last_signal_watch_leaves_a_later_handler_alone)
{
    struct sigaction own, before, after;
    tsrv_signal watch = {0};
    int calls = 0;
    tsrv_loop *loop = t_new_loop();
    for (int is_long = 0; is_long < 2; is_long++) {
        memset(&own, 0, sizeof own);
        own.sa_handler = own_handler;
        if (is_long) {
            own.sa_sigaction = own_long_handler;
            own.sa_flags = SA_SIGINFO;
        }
        sigemptyset(&own.sa_mask);
        CHECK_INT(tsrv_signal_start(loop, &watch, SIGUSR1, count_call, &calls), TSRV_OK);
        CHECK(sigaction(SIGUSR1, &own, NULL) == 0);
        CHECK(sigaction(SIGUSR1, NULL, &before) == 0);
        tsrv_signal_stop(&watch);
        CHECK(sigaction(SIGUSR1, NULL, &after) == 0);
        check_same_action(&after, &before);
    }
    free_loop(loop);
}

TEST_LOOP(starting_an_active_signal_watch_changes_it)
{
    tsrv_signal watch = {0};
    struct sigaction action;
    int first = 0, second = 0;
    tsrv_loop *loop = t_new_loop();
    CHECK_INT(tsrv_signal_start(loop, &watch, SIGUSR1, count_call, &first), TSRV_OK);
    CHECK_INT(tsrv_signal_start(loop, &watch, SIGUSR2, count_call, &second), TSRV_OK);
    CHECK(sigaction(SIGUSR1, NULL, &action) == 0);
    CHECK(action.sa_handler == SIG_DFL);
    CHECK(raise(SIGUSR2) == 0);
    t_turn_until(loop, &second, 1);
    CHECK_INT(first, 0);
    tsrv_signal_stop(&watch);
    free_loop(loop);
}

TEST_LOOP(signal_belongs_to_one_loop)
{
    tsrv_signal first = {0}, second = {0}, unrelated = {0};
    int calls = 0;
    tsrv_loop *loop = t_new_loop(), *other = t_new_loop();
    CHECK_INT(tsrv_signal_start(loop, &first, SIGUSR1, count_call, &calls), TSRV_OK);
    CHECK_INT(tsrv_signal_start(other, &second, SIGUSR1, count_call, &calls), TSRV_EBUSY);
    CHECK_INT(tsrv_signal_start(other, &unrelated, SIGUSR2, count_call, &calls), TSRV_OK);
    tsrv_signal_stop(&second); /* not active: the first stays */
    CHECK(raise(SIGUSR1) == 0);
    t_turn_until(loop, &calls, 1);
    tsrv_signal_stop(&first);
    CHECK_INT(tsrv_signal_start(other, &second, SIGUSR1, count_call, &calls), TSRV_OK);
    CHECK(raise(SIGUSR1) == 0);
    t_turn_until(other, &calls, 2);
    tsrv_signal_stop(&second);
    tsrv_signal_stop(&unrelated);
    free_loop(loop);
    free_loop(other);
}

TEST_LOOP(signals_that_cannot_be_watched)
{
    static const struct {
        int signo, rc;
    } rows[] = {{0, TSRV_EINVAL}, {-1, TSRV_EINVAL}, {100000, TSRV_EINVAL}, {SIGKILL, -EINVAL},
                {SIGSTOP, -EINVAL}};
    tsrv_signal watch = {0};
    int calls = 0;
    tsrv_loop *loop = t_new_loop();
    for (size_t i = 0; i < COUNT(rows); i++) {
        CHECK_INT(tsrv_signal_start(loop, &watch, rows[i].signo, count_call, &calls), rows[i].rc);
        tsrv_signal_stop(&watch);
    }
    free_loop(loop);
}

enum { STORM = 20000 };

typedef struct storm_case {
    tsrv_loop *loop;
    int sent; /* atomic */
    int seen; /* of sent, by the last call */
    int calls;
} storm_case;

static void storm_call(void *context)
{
    storm_case *c = (storm_case *)context;
    c->calls++;
    c->seen = __atomic_load_n(&c->sent, __ATOMIC_SEQ_CST);
    if (c->seen == STORM) {
        tsrv_loop_stop(c->loop);
    }
}

static void *storm_thread(void *context)
{
    storm_case *c = (storm_case *)context;
    for (int i = 1; i <= STORM; i++) {
        __atomic_store_n(&c->sent, i, __ATOMIC_SEQ_CST);
        CHECK(kill(getpid(), SIGUSR1) == 0);
    }
    return NULL;
}

/* Signals may be merged, but the last one never lost: the loop would sleep for ever. */
TEST_LOOP(signal_storm_loses_no_last_signal)
{
    storm_case c = {t_new_loop(), 0, 0, 0};
    tsrv_signal watch = {0};
    idle_watch idle;
    pthread_t thread;
    start_idle(c.loop, &idle);
    CHECK_INT(tsrv_signal_start(c.loop, &watch, SIGUSR1, storm_call, &c), TSRV_OK);
    CHECK_INT(pthread_create(&thread, NULL, storm_thread, &c), 0);
    CHECK_INT(tsrv_loop_run(c.loop), TSRV_OK);
    CHECK_INT(pthread_join(thread, NULL), 0);
    CHECK_INT(c.seen, STORM);
    CHECK(c.calls >= 1 && c.calls <= STORM);
    tsrv_signal_stop(&watch);
    stop_idle(&idle);
    free_loop(c.loop);
}

/* ---- inside another loop ------------------------------------------------------------------*/

static bool is_readable(int fd)
{
    struct pollfd p = {fd, POLLIN, 0};
    return poll(&p, 1, 0) == 1;
}

TEST_LOOP(timeout_for_an_outer_loop)
{
    timed t = new_timed();
    int turns = 0;
    start_timed(&t, 15);
    CHECK_NEAR_MS(tsrv_loop_timeout_ms(t.loop), 0, 16); /* 0: a slow machine, and it is due */
    while (t.elapsed < 0) {
        poll(NULL, 0, tsrv_loop_timeout_ms(t.loop));
        CHECK(tsrv_loop_run_once(t.loop, 0) >= 0);
        turns++;
    }
    CHECK(turns <= 4); /* rounded down, it would be asked a thousand times */
    CHECK_NEAR_MS(t.elapsed, 15, 1000);
    CHECK_INT(tsrv_loop_timeout_ms(t.loop), TSRV_NEVER);
    start_timed(&t, 0);
    CHECK_INT(tsrv_loop_timeout_ms(t.loop), 0);
    tsrv_timer_stop(&t.timer);
    free_loop(t.loop);
}

TEST_LOOP(descriptor_for_an_outer_loop)
{
    tsrv_watch watch = {0};
    seen s = {0, 0};
    int fds[2], posts = 0, fd;
    tsrv_loop *loop = t_new_loop();
    fd = tsrv_loop_fd(loop);
    if (t_backend == TSRV_BACKEND_POLL) {
        CHECK_INT(fd, TSRV_ENOTSUP);
        free_loop(loop);
        return;
    }
    CHECK(fd >= 0);
    CHECK(pipe(fds) == 0);
    CHECK_INT(tsrv_watch_start(loop, &watch, fds[0], TSRV_READABLE, see, &s), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(tsrv_loop_timeout_ms(loop), TSRV_NEVER);
    CHECK(!is_readable(fd));
    CHECK(write(fds[1], "x", 1) == 1);
    CHECK(is_readable(fd));
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(s.calls, 1);
    tsrv_watch_stop(&watch);
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0);
    CHECK(!is_readable(fd));
    CHECK_INT(tsrv_loop_post(loop, count_call, &posts), TSRV_OK);
    CHECK(is_readable(fd) || tsrv_loop_timeout_ms(loop) == 0);
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0);
    CHECK_INT(posts, 1);
    CHECK(!is_readable(fd));
    free_loop(loop);
    t_close_all(fds, 2);
}

static int echo_slowly(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice line;
    int rc;
    (void)address, (void)context;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        CHECK_INT(tsrv_sleep(1), TSRV_OK);
        CHECK_INT(tsrv_write(stream, line.data, line.size), TSRV_OK);
    }
    return rc;
}

static void *echo_client(void *context)
{
    int fd = t_connect(*(int *)context);
    for (int i = 0; i < 50; i++) {
        t_echo(fd, "hello\nworld\n");
    }
    t_finish(fd);
    return NULL;
}

TEST_LOOP(server_runs_inside_an_outer_loop)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_address address;
    tsrv_stats stats;
    pthread_t thread;
    int port;
    tsrv_loop *loop = t_new_loop();
    if (t_backend == TSRV_BACKEND_POLL) {
        free_loop(loop); /* has no descriptor, see above */
        return;
    }
    options.handle_stream = echo_slowly;
    options.loop = loop;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    CHECK_INT(tsrv_server_listen(server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_address(server, 0, &address), TSRV_OK);
    port = tsrv_address_port(&address);
    CHECK_INT(pthread_create(&thread, NULL, echo_client, &port), 0);
    do {
        struct pollfd p = {tsrv_loop_fd(loop), POLLIN, 0};
        CHECK(poll(&p, 1, tsrv_loop_timeout_ms(loop)) >= 0);
        CHECK(tsrv_loop_run_once(loop, 0) > 0);
        tsrv_server_stats(server, &stats);
    } while (stats.closed < 1);
    CHECK_INT(pthread_join(thread, NULL), 0);
    tsrv_server_free(server);
    free_loop(loop);
}

/* The host closed what was not its own: an error, and no endless loop. */
TEST_LOOP(closed_backend_is_an_error)
{
    idle_watch idle;
    int fd, copy;
    tsrv_loop *loop = t_new_loop();
    start_idle(loop, &idle);
    fd = tsrv_loop_fd(loop);
    if (fd >= 0) {
        copy = dup(fd);
        CHECK(copy >= 0);
        t_close(fd);
        CHECK_INT(tsrv_loop_run(loop), -EBADF);
        CHECK_INT(tsrv_loop_run_once(loop, 0), -EBADF);
        CHECK(dup2(copy, fd) == fd);
        t_close(copy);
    } else {
        CHECK_INT(fd, TSRV_ENOTSUP);
    }
    stop_idle(&idle);
    free_loop(loop);
}

/* ---- descriptors that live on elsewhere ----------------------------------------------------
 *
 * A stream's descriptor that was duplicated, as by a forked child, keeps its registration in an
 * epoll set when the stream closes its own. What then comes for it must neither make the loop spin
 * nor cost it other events. */

enum { LEAKS = 5 };

typedef struct leak_case {
    tsrv_loop *loop;
    tsrv_server *server;
    int port;
    tsrv_stream *streams[LEAKS];
    int copies[LEAKS];  /* of the streams' descriptors */
    int clients[LEAKS];
    int entered, closed, outer_calls;
    bool copying;
} leak_case;

static int echo_and_leak(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    leak_case *c = (leak_case *)context;
    tsrv_slice line;
    int rc;
    (void)address;
    if (c->copying) {
        CHECK(c->entered < LEAKS);
        c->streams[c->entered] = stream;
        c->copies[c->entered] = dup(tsrv_fd(stream));
        CHECK(c->copies[c->entered] >= 0);
    }
    c->entered++;
    while ((rc = tsrv_read_until(stream, "\n", 0, &line)) == TSRV_OK) {
        CHECK_INT(tsrv_write(stream, line.data, line.size), TSRV_OK);
    }
    return rc;
}

static void count_leak(tsrv_stream *stream, int reason, void *context)
{
    (void)stream, (void)reason;
    ((leak_case *)context)->closed++;
}

static void open_leaks(leak_case *c)
{
    tsrv_server_options options = {0};
    tsrv_address address;
    memset(c, 0, sizeof *c);
    c->loop = t_new_loop();
    options.handle_stream = echo_and_leak;
    options.on_close = count_leak;
    options.context = c;
    options.loop = c->loop;
    CHECK_INT(tsrv_server_new(&c->server, &options), TSRV_OK);
    CHECK_INT(tsrv_server_listen(c->server, 0, "127.0.0.1", NULL), TSRV_OK);
    CHECK_INT(tsrv_server_address(c->server, 0, &address), TSRV_OK);
    c->port = tsrv_address_port(&address);
}

/* Connects LEAKS clients; their streams' descriptors are duplicated. */
static void connect_leaks(leak_case *c, tsrv_loop *turning)
{
    c->copying = true;
    for (int i = 0; i < LEAKS; i++) {
        c->clients[i] = t_connect(c->port);
    }
    t_turn_until(turning, &c->entered, LEAKS);
    c->copying = false;
}

/* Aborts them; then their clients, which cannot notice, send. */
static void abort_leaks(leak_case *c, tsrv_loop *turning)
{
    for (int i = 0; i < LEAKS; i++) {
        CHECK_INT(tsrv_abort(c->streams[i]), TSRV_OK);
    }
    t_turn_until(turning, &c->closed, c->closed + LEAKS);
    for (int i = 0; i < LEAKS; i++) {
        struct pollfd arrived = {c->copies[i], POLLIN, 0};
        t_sends(c->clients[i], "nobody reads this\n");
        CHECK_INT(poll(&arrived, 1, t_patience_ms()), 1);
    }
}

static void close_leaks(leak_case *c)
{
    for (int i = 0; i < LEAKS; i++) {
        t_close(c->clients[i]);
        t_close(c->copies[i]);
    }
}

/* A line there and back on a client's connection. */
static void echo_by_turns(tsrv_loop *turning, int fd)
{
    t_sends(fd, "hello\n");
    t_turn_until_text(turning, fd, "hello\n");
}

static void turn_inner(int events, void *context)
{
    leak_case *c = (leak_case *)context;
    CHECK_INT(events, TSRV_READABLE);
    c->outer_calls++;
    do {
        CHECK(tsrv_loop_run_once(c->loop, 0) > 0);
    } while (tsrv_loop_timeout_ms(c->loop) == 0);
}

/* An outer loop waits for the descriptor that it was given once, so that this must stay the same
 * set, and may not be readable for what nobody waits for any more. */
TEST_LOOP(leaked_descriptors_do_not_disturb_an_outer_loop)
{
    leak_case c;
    tsrv_watch watch = {0};
    tsrv_loop *outer = t_new_loop();
    open_leaks(&c);
    int fd = tsrv_loop_fd(c.loop);
    if (t_backend == TSRV_BACKEND_POLL) {
        CHECK_INT(fd, TSRV_ENOTSUP);
    } else {
        CHECK_INT(tsrv_watch_start(outer, &watch, fd, TSRV_READABLE, turn_inner, &c), TSRV_OK);
        for (int round = 0; round < 3; round++) {
            c.entered = 0;
            connect_leaks(&c, outer);
            abort_leaks(&c, c.loop);
            int calls = c.outer_calls;
            for (int i = 0; i < 20; i++) {
                CHECK(tsrv_loop_run_once(outer, 0) > 0);
            }
            CHECK_INT(c.outer_calls - calls, 0);
            CHECK(!is_readable(fd));
            CHECK_INT(tsrv_loop_fd(c.loop), fd);
            int client = t_connect(c.port);
            echo_by_turns(outer, client);
            int closed = c.closed;
            t_close(client);
            t_turn_until(outer, &c.closed, closed + 1);
            close_leaks(&c);
        }
        tsrv_watch_stop(&watch);
    }
    tsrv_server_free(c.server);
    free_loop(c.loop);
    free_loop(outer);
}

/* What has leaked before the outer loop was given the set is not in it, and the set is not replaced later. */
TEST_LOOP(descriptor_for_an_outer_loop_is_clean_from_the_start)
{
    leak_case c;
    open_leaks(&c);
    connect_leaks(&c, c.loop);
    abort_leaks(&c, c.loop);
    int fd = tsrv_loop_fd(c.loop);
    if (t_backend != TSRV_BACKEND_POLL) {
        CHECK(t_backend == TSRV_BACKEND_KQUEUE || !is_readable(fd)); /* tests/kqueue is clean when it has turned */
        for (int i = 0; i < 3; i++) {
            CHECK(tsrv_loop_run_once(c.loop, 0) > 0);
        }
        CHECK_INT(tsrv_loop_fd(c.loop), fd);
        int client = t_connect(c.port);
        CHECK(poll(&(struct pollfd){fd, POLLIN, 0}, 1, t_patience_ms()) == 1);
        echo_by_turns(c.loop, client);
        t_close(client);
        t_turn_until(c.loop, &c.closed, LEAKS + 1);
    }
    close_leaks(&c);
    tsrv_server_free(c.server);
    free_loop(c.loop);
}

#if TSRVI_HAS_EPOLL
/* That there is no descriptor for a set is no matter of the backend, and may be another time. */
TEST_LOOP(descriptor_for_an_outer_loop_can_be_missing)
{
    idle_watch idle;
    tsrv_loop *loop = t_new_loop();
    start_idle(loop, &idle);
    t_fail_call("epoll_create1", EMFILE, 1, true);
    int rc = tsrv_loop_fd(loop);
    CHECK(t_backend == TSRV_BACKEND_EPOLL  ? rc == -EMFILE
          : t_backend == TSRV_BACKEND_POLL ? rc == TSRV_ENOTSUP
                                           : rc >= 0);
    t_fault_at = 0;
    CHECK_INT(tsrv_loop_run_once(loop, 0), 1);
    CHECK_INT(tsrv_loop_fd(loop) >= 0, t_backend != TSRV_BACKEND_POLL);
    stop_idle(&idle);
    free_loop(loop);
}
#endif

static int waits;                 /* of the loop's thread, attempts to make a set included */
static int asleep[2] = {-1, -1};  /* a pipe; written when the loop is about to wait */

static void count_waits(const char *name)
{
    if (strcmp(name, "epoll_wait") == 0 || strcmp(name, "poll") == 0 ||
        strcmp(name, "kevent") == 0) {
        waits++;
        if (asleep[1] >= 0) {
            CHECK(write(asleep[1], "", 1) == 1);
        }
    }
    if (strcmp(name, "epoll_create1") == 0) {
        waits++; /* else it is not touched: other threads come here too */
    }
}

static void *post_when_asleep(void *context)
{
    leak_case *c = (leak_case *)context;
    char byte;
    CHECK(read(asleep[0], &byte, 1) == 1);
    CHECK_INT(tsrv_loop_post(c->loop, t_stop_loop, c->loop), TSRV_OK);
    return NULL;
}

/* Is the loop's own descriptor still waited for? */
static void check_wake_up(leak_case *c)
{
    pthread_t thread;
    CHECK(pipe(asleep) == 0);
    CHECK_INT(pthread_create(&thread, NULL, post_when_asleep, c), 0);
    CHECK_INT(tsrv_loop_run(c->loop), TSRV_OK);
    CHECK_INT(pthread_join(thread, NULL), 0);
    t_close_all(asleep, 2);
    asleep[0] = asleep[1] = -1;
}

/* What fails while the epoll set is built anew. */
static const struct {
    const char *name;
    int code;
    bool lasts; /* until the loop has run for a while */
} renewals[] = {
    {NULL, 0, false},
    {"epoll_create1", EMFILE, false},
    {"epoll_create1", ENOMEM, true},
    {"epoll_ctl", ENOMEM, false},
    {"epoll_ctl", ENOMEM, true},
};

static void fail_renewal(int row)
{
    t_fail_call(renewals[row].name, renewals[row].code, renewals[row].name != NULL, renewals[row].lasts);
}

/* The loop comes to its rest, or goes on trying, and takes its time over both. */
static void run_without_spinning(leak_case *c)
{
    enum { MILLISECONDS = 300, WAITS = 40 };
    tsrv_timer timer = {0};
    waits = 0;
    CHECK_INT(tsrv_timer_start(c->loop, &timer, MILLISECONDS, t_stop_loop, c->loop), TSRV_OK);
    CHECK_INT(tsrv_loop_run(c->loop), TSRV_OK);
    CHECK(waits >= 1 && waits <= WAITS);
}

TEST_LOOP(leaked_descriptors_are_left_without_spinning_or_losing_events)
{
    int rows = t_backend == TSRV_BACKEND_EPOLL ? (int)(COUNT(renewals)) : 1;
    t_seen = count_waits;
    for (int row = 0; row < rows; row++) {
        leak_case c;
        tsrv_watch watch = {0};
        seen s = {0, 0};
        int fds[2];
        open_leaks(&c);
        CHECK(pipe(fds) == 0);
        CHECK_INT(tsrv_watch_start(c.loop, &watch, fds[0], TSRV_READABLE, see, &s), TSRV_OK);
        connect_leaks(&c, c.loop);
        int before = t_connect(c.port);
        echo_by_turns(c.loop, before);
        abort_leaks(&c, c.loop);
        fail_renewal(row);
        run_without_spinning(&c);
        CHECK(row == 0 || t_fault_hits > 0);

        /* This comes while there may be no set. */
        int during = t_connect(c.port);
        t_sends(during, "during\n");
        t_sends(before, "during\n");
        CHECK(write(fds[1], "x", 1) == 1);
        t_fault_at = 0;
        t_turn_until(c.loop, &s.calls, 1);
        tsrv_watch_stop(&watch);
        t_turn_until(c.loop, &c.entered, LEAKS + 2);
        t_turn_until_text(c.loop, during, "during\n");
        t_turn_until_text(c.loop, before, "during\n");
        run_without_spinning(&c);
        check_wake_up(&c);
        close_leaks(&c);
        t_close(before);
        t_close(during);
        t_close_all(fds, 2);
        t_turn_until(c.loop, &c.closed, LEAKS + 2);
        tsrv_server_free(c.server);
        free_loop(c.loop);
    }
    t_seen = NULL;
}

/* ---- forks --------------------------------------------------------------------------------*/

typedef struct fork_case {
    tsrv_loop *loop;
    tsrv_watch watch;
    tsrv_timer timer;
    int fds[2];
    seen watch_seen;
    int timer_calls;
    int posts;
} fork_case;

static int no_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream, (void)address, (void)context;
    T_FAIL("a handler was called");
}

static void use_inherited_loop(fork_case *c)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    tsrv_watch watch = {0};
    tsrv_timer timer = {0};
    tsrv_signal signal_watch = {0};
    int calls = 0;
    tsrv_set_log(t_no_log, NULL);
    CHECK_INT(tsrv_loop_run(c->loop), TSRV_EINVAL);
    CHECK_INT(tsrv_loop_run_once(c->loop, 0), TSRV_EINVAL);
    CHECK_INT(tsrv_loop_post(c->loop, count_call, &calls), TSRV_EINVAL);
    CHECK_INT(tsrv_timer_start(c->loop, &timer, 0, count_call, &calls), TSRV_EINVAL);
    CHECK_INT(tsrv_watch_start(c->loop, &watch, c->fds[1], TSRV_WRITABLE, count_event, &calls),
              TSRV_EINVAL);
    CHECK_INT(tsrv_signal_start(c->loop, &signal_watch, SIGUSR1, count_call, &calls), TSRV_EINVAL);
    CHECK_INT(tsrv_spawn(c->loop, count_call, &calls), TSRV_EINVAL);
    CHECK(tsrv_loop_current() == NULL);
    CHECK_INT(tsrv_timer_start(NULL, &timer, 0, count_call, &calls), TSRV_EINVAL);

    options.handle_stream = no_handler;
    options.loop = c->loop;
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    CHECK_INT(tsrv_server_listen(server, 0, "127.0.0.1", NULL), TSRV_EINVAL);
    tsrv_server_free(server);

    /* The epoll set is shared with the parent: stopping must not reach it. */
    tsrv_watch_stop(&c->watch);
    tsrv_timer_stop(&c->timer);
    CHECK_INT(calls, 0);
}

static void use_a_new_loop(void)
{
    tsrv_timer timer = {0};
    int calls = 0;
    tsrv_loop *loop = t_new_loop();
    CHECK_INT(tsrv_timer_start(loop, &timer, 1, count_call, &calls), TSRV_OK);
    CHECK_INT(tsrv_loop_post(loop, count_call, &calls), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(calls, 2);
    free_loop(loop);
}

static void fork_and_use(void *context)
{
    int status;
    pid_t pid;
    fflush(NULL);
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        use_inherited_loop((fork_case *)context);
        use_a_new_loop();
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* A child that makes a loop of its own has nothing of its parent's signals, nor waits for a handler that ran in another
 * thread just then, nor is its loop any less the first one. */
TEST_LOOP(forked_childs_own_loop_watches_signals)
{
    tsrv_loop *loop = t_new_loop();
    tsrv_signal inherited = {0}, own = {0};
    int calls = 0, status = 0;
    CHECK_INT(tsrv_signal_start(loop, &inherited, SIGUSR1, count_call, &calls), TSRV_OK);
    tsrvi_process.chief = loop;
    __atomic_fetch_add(&tsrvi_process.signal_handlers, 1, __ATOMIC_SEQ_CST);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        struct sigaction action;
        tsrv_loop *made = t_new_loop();
        CHECK(tsrvi_process.chief == NULL);
        CHECK(sigaction(SIGUSR1, NULL, &action) == 0 && action.sa_handler == SIG_DFL);
        CHECK_INT(tsrv_signal_start(made, &own, SIGUSR1, count_call, &calls), TSRV_OK);
        tsrv_signal_stop(&inherited);
        CHECK(raise(SIGUSR1) == 0);
        CHECK_INT(tsrv_loop_run_once(made, 0), 0);
        CHECK_INT(calls, 1);
        tsrv_signal_stop(&own);
        CHECK(sigaction(SIGUSR1, NULL, &action) == 0 && action.sa_handler == SIG_DFL);
        free_loop(made);
        _exit(0);
    }
    __atomic_fetch_sub(&tsrvi_process.signal_handlers, 1, __ATOMIC_SEQ_CST);
    tsrvi_process.chief = NULL;
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(raise(SIGUSR1) == 0);
    CHECK(tsrv_loop_run_once(loop, 0) >= 0);
    CHECK_INT(calls, 1);
    tsrv_signal_stop(&inherited);
    free_loop(loop);
}

/* First with the loop at rest, then from a callback. */
TEST_LOOP(forked_child_cannot_use_the_loop_and_does_no_harm)
{
    for (int inside = 0; inside < 2; inside++) {
        fork_case c;
        memset(&c, 0, sizeof c);
        CHECK(tsrv_loop_current() != NULL);
        c.loop = t_new_loop();
        CHECK(pipe(c.fds) == 0);
        CHECK_INT(tsrv_watch_start(c.loop, &c.watch, c.fds[0], TSRV_READABLE, see, &c.watch_seen),
                  TSRV_OK);
        CHECK_INT(tsrv_timer_start(c.loop, &c.timer, 1, count_call, &c.timer_calls), TSRV_OK);
        if (inside) {
            CHECK_INT(tsrv_loop_post(c.loop, fork_and_use, &c), TSRV_OK);
            CHECK(tsrv_loop_run_once(c.loop, TSRV_NEVER) > 0);
        } else {
            fork_and_use(&c);
        }
        t_turn_until(c.loop, &c.timer_calls, 1);
        CHECK_INT(c.watch_seen.calls, 0);
        CHECK(write(c.fds[1], "x", 1) == 1);
        t_turn_until(c.loop, &c.watch_seen.calls, 1);
        CHECK_INT(tsrv_loop_post(c.loop, count_call, &c.posts), TSRV_OK);
        t_turn_until(c.loop, &c.posts, 1);
        CHECK_INT(c.timer_calls, 1);
        tsrv_watch_stop(&c.watch);
        free_loop(c.loop);
        CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
        t_close_all(c.fds, 2);
    }
}

static void restart_signal(void *context)
{
    tsrv_signal *watch = (tsrv_signal *)context;
    t_record(1);
    CHECK(t_record_count() < 10);
    CHECK_INT(tsrv_signal_start(watch->loop, watch, SIGUSR2, restart_signal, watch), TSRV_OK);
}

/* Starting an active watch again changes it: it neither loses a signal nor repeats one. */
TEST_LOOP(signal_watch_started_again)
{
    tsrv_signal watch = {0};
    tsrv_loop *loop = t_new_loop();
    int lost = 0;
    CHECK_INT(tsrv_signal_start(loop, &watch, SIGUSR2, count_call, &lost), TSRV_OK);
    CHECK(raise(SIGUSR2) == 0);
    CHECK_INT(tsrv_signal_start(loop, &watch, SIGUSR2, restart_signal, &watch), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 1000) >= 0);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(lost, 0);
    tsrv_signal_stop(&watch);
    free_loop(loop);
}

/* ---- what is not given, and what cannot be made ----------------------------------------------*/

TEST_LOOP(what_nobody_would_be_told_of_is_refused)
{
    tsrv_timer timer = {0};
    tsrv_watch watch = {0};
    tsrv_signal signal_watch = {0};
    tsrv_loop *loop = t_new_loop();
    int fds[2];
    CHECK(pipe(fds) == 0);
    CHECK_INT(tsrv_timer_start(loop, &timer, 0, NULL, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_watch_start(loop, &watch, fds[0], TSRV_READABLE, NULL, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_signal_start(loop, &signal_watch, SIGUSR1, NULL, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_loop_post(loop, NULL, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_spawn(loop, NULL, NULL), TSRV_EINVAL);
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0);
    t_close_all(fds, 2);
    free_loop(loop);
}

/* The loop that a thread would have been given. */
TEST_ONCE(without_memory_for_a_loop_calls_say_so)
{
    tsrv_timer timer = {0};
    tsrv_signal signal_watch = {0};
    int calls = 0;
    t_fail_call("malloc", 0, 1, true);
    CHECK(tsrv_loop_current() == NULL);
    CHECK_INT(tsrv_loop_fd(NULL), -ENOMEM);
    CHECK_INT(tsrv_loop_backend(NULL), -ENOMEM);
    CHECK_INT(tsrv_loop_timeout_ms(NULL), 0);
    CHECK_INT(tsrv_loop_now_ms(NULL), 0);
    CHECK_INT(tsrv_loop_run(NULL), -ENOMEM);
    CHECK_INT(tsrv_loop_post(NULL, count_call, &calls), -ENOMEM);
    CHECK_INT(tsrv_spawn(NULL, count_call, &calls), -ENOMEM);
    CHECK_INT(tsrv_work(NULL, count_call, NULL, &calls), -ENOMEM);
    CHECK_INT(tsrv_timer_start(NULL, &timer, 0, count_call, &calls), -ENOMEM);
    CHECK_INT(tsrv_signal_start(NULL, &signal_watch, SIGUSR1, count_call, &calls), -ENOMEM);
    tsrv_loop_stop(NULL);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
    CHECK_INT(calls, 0);
    t_fault_at = 0;
    CHECK_INT(tsrv_loop_run_once(NULL, 0), 0);
    CHECK_INT(tsrv_loop_free(NULL), TSRV_OK);
}

/* Each allocation, and each system call, of a loop's birth. */
TEST_LOOP(a_loop_that_cannot_be_made_leaves_nothing)
{
    tsrv_loop_options options = {0};
    options.backend = t_backend;
    for (long at = 1;; at++) {
        tsrv_loop *loop = (tsrv_loop *)&options;
        t_fail_call(at % 2 == 0 ? "malloc" : "realloc", 0, (at + 1) / 2, false);
        int rc = tsrv_loop_new(&loop, &options);
        bool failed = t_fault_hits > 0;
        t_fault_at = 0;
        CHECK_INT(rc, failed ? -ENOMEM : TSRV_OK);
        CHECK(failed == (loop == NULL));
        if (loop != NULL) {
            free_loop(loop);
        }
        if (!failed && at > 10) {
            break;
        }
    }
}

/* A watch and a signal watch that are active elsewhere move. */
TEST_LOOP(watches_move_from_one_loop_to_another)
{
    tsrv_watch watch = {0};
    tsrv_signal signal_watch = {0};
    tsrv_loop *one = t_new_loop(), *two = t_new_loop();
    int fds[2], calls = 0, signals = 0;
    CHECK(pipe(fds) == 0 && write(fds[1], "x", 1) == 1);
    CHECK_INT(tsrv_watch_start(one, &watch, fds[0], TSRV_READABLE, count_event, &calls), TSRV_OK);
    CHECK_INT(tsrv_signal_start(one, &signal_watch, SIGUSR2, count_call, &calls), TSRV_OK);
    CHECK_INT(tsrv_watch_start(two, &watch, fds[0], TSRV_READABLE, count_event, &signals), TSRV_OK);
    CHECK_INT(tsrv_signal_start(two, &signal_watch, SIGUSR2, count_call, &signals), TSRV_OK);
    CHECK_INT(tsrv_loop_run_once(one, 0), 0);
    CHECK(tsrv_loop_run_once(two, 0) > 0);
    CHECK_INT(calls, 0);
    CHECK_INT(signals, 1);
    tsrv_watch_stop(&watch);
    CHECK(raise(SIGUSR2) == 0);
    t_turn_until(two, &signals, 2);
    CHECK_INT(tsrv_loop_run_once(one, 0), 0);
    CHECK_INT(calls, 0);
    tsrv_signal_stop(&signal_watch);
    t_close_all(fds, 2);
    free_loop(one);
    free_loop(two);
}

#if TSRVI_HAS_EPOLL
/* ---- sets that cannot be told ----------------------------------------------------------------*/

/* What waits while there is no set is told to the next one, when that can be made. */
TEST_ONCE(watch_that_comes_while_there_is_no_set)
{
    static const struct {
        const char *call;
        int code;
    } rows[] = {{"epoll_create1", EMFILE}, {"epoll_ctl", ENOSPC}, {"epoll_ctl", ENOMEM}};
    t_backend = TSRV_BACKEND_EPOLL;
    for (size_t i = 0; i < COUNT(rows); i++) {
        tsrv_watch watch = {0};
        seen s = {0, 0};
        int fds[2];
        tsrv_loop *loop = t_new_loop();
        CHECK(pipe(fds) == 0 && write(fds[1], "x", 1) == 1);
        t_fail_call(rows[i].call, rows[i].code, 1, true);
        tsrvi_epoll_renew(&loop->poller);
        CHECK_INT(loop->poller.fd, -1);
        CHECK_INT(tsrv_watch_start(loop, &watch, fds[0], TSRV_READABLE, see, &s), TSRV_OK);
        CHECK_INT(tsrv_loop_run_once(loop, 0), 1);
        CHECK_INT(s.calls, 0);
        t_fault_at = 0;
        CHECK_INT(tsrv_loop_run_once(loop, 0), 1);
        CHECK_INT(s.calls, 1);
        tsrv_watch_stop(&watch);
        t_close_all(fds, 2);
        free_loop(loop);
    }
}

/* EINVAL is the kernel's no to EPOLLEXCLUSIVE, and nothing else's. */
TEST_ONCE(watch_that_the_kernel_refuses_is_an_error)
{
    tsrv_watch watch = {0};
    tsrvi_io io;
    seen s = {0, 0};
    int fds[2];
    t_backend = TSRV_BACKEND_EPOLL;
    tsrv_loop *loop = t_new_loop();
    CHECK(pipe(fds) == 0);
    t_fail_call("epoll_ctl", EINVAL, 1, true);
    CHECK_INT(tsrv_watch_start(loop, &watch, fds[0], TSRV_READABLE, see, &s), -EINVAL);
    CHECK_INT(t_fault_hits, 1);
    memset(&io, 0, sizeof io);
    io.fd = fds[0];
    CHECK(loop->poller.exclusive);
    CHECK_INT(tsrvi_poller_set(&loop->poller, &io, TSRV_READABLE | TSRVI_EXCLUSIVE), -EINVAL);
    CHECK_INT(t_fault_hits, 3); /* without it, too */
    CHECK(loop->poller.exclusive);
    t_fault_at = 0;
    CHECK_INT(io.interest, 0);
    CHECK_INT(tsrvi_poller_set(&loop->poller, &io, TSRV_READABLE | TSRVI_EXCLUSIVE), TSRV_OK);
    CHECK_INT(tsrvi_poller_set(&loop->poller, &io, 0), TSRV_OK);
    t_close_all(fds, 2);
    free_loop(loop);
}
#endif

static void stop_and_raise(int events, void *context)
{
    (void)events;
    tsrv_watch_stop((tsrv_watch *)context);
    CHECK(raise(SIGUSR1) == 0); /* which is told in this turn, and leaves a byte for the next */
}

TEST_LOOP(outer_loop_is_not_woken_for_ever_when_nothing_is_left)
{
    tsrv_watch watch = {0};
    tsrv_signal told = {0};
    int fds[2], calls = 0;
    tsrv_loop *loop = t_new_loop();
    CHECK(pipe(fds) == 0);
    CHECK_INT(tsrv_signal_start(loop, &told, SIGUSR1, count_call, &calls), TSRV_OK);
    CHECK_INT(tsrv_watch_start(loop, &watch, fds[1], TSRV_WRITABLE, stop_and_raise, &watch), TSRV_OK);
    CHECK_INT(tsrv_loop_run_once(loop, 0), 0);
    CHECK_INT(calls, 1);
    CHECK(is_readable(loop->sources.wake.fd));
    CHECK_INT(tsrv_loop_run_once(loop, TSRV_NEVER), 0);
    CHECK(!is_readable(loop->sources.wake.fd));
    tsrv_signal_stop(&told);
    t_close_all(fds, 2);
    free_loop(loop);
}

/* An outer loop waits for the set: a fork's child that closes its copies takes nothing out of it. */
TEST_LOOP(child_that_closes_leaves_an_embedded_set_alone)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    int status, fd;
    options.handle_stream = echo_lines;
    options.loop = t_new_loop();
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    fd = t_connect(t_listen(server));
    CHECK_INT(tsrv_loop_fd(options.loop) < 0, t_backend == TSRV_BACKEND_POLL);
    t_sends(fd, "first\n");
    t_turn_until_text(options.loop, fd, "first\n");
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        tsrv_server_free(server);
        _exit(0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    t_sends(fd, "second\n");
    t_turn_until_text(options.loop, fd, "second\n");
    t_close(fd);
    tsrv_server_free(server);
    free_loop(options.loop);
}

static int ignore_all(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice some;
    (void)address, (void)context;
    return tsrv_read_some(stream, 0, &some);
}

/* What was done to a stream from outside is due at once. */
TEST_LOOP(outer_loop_does_not_sleep_over_what_was_written)
{
    tsrv_server_options options = {0};
    tsrv_server *server;
    int fd;
    options.handle_stream = ignore_all;
    options.mode = TSRV_CALLBACK;
    options.loop = t_new_loop();
    CHECK_INT(tsrv_server_new(&server, &options), TSRV_OK);
    fd = t_connect(t_listen(server));
    while (tsrv_server_next(server, NULL) == NULL) {
        CHECK(tsrv_loop_run_once(options.loop, 10) > 0);
    }
    CHECK_INT(tsrv_loop_run_once(options.loop, 0), 1);
    CHECK(tsrv_loop_timeout_ms(options.loop) != 0);
    tsrv_abort(tsrv_server_next(server, NULL));
    CHECK_INT(tsrv_loop_timeout_ms(options.loop), 0);
    CHECK_INT(tsrv_loop_run_once(options.loop, 0), 1);
    t_expect_reset(fd);
    t_close(fd);
    tsrv_server_free(server);
    free_loop(options.loop);
}
