/* Coroutines that wait for each other. */
#include "test.h"

#include "conditions.h"

static tsrv_condition condition;
static tsrv_loop *loop;

static void check_order(const int *expected, int count)
{
    for (int i = 0; i < count && i < t_record_count(); i++) {
        CHECK_INT(t_recorded(i), expected[i]);
    }
    CHECK_INT(t_record_count(), count);
}

/* Records its number, and what the wait has returned. */
static void wait_once(void *context)
{
    int rc = tsrv_condition_wait(&condition, TSRV_NEVER);
    t_record(*(int *)context);
    t_record(rc);
}

static void open_with_waiters(tsrv_callback waiter, int *ids, int count)
{
    memset(&condition, 0, sizeof condition);
    loop = t_new_loop();
    for (int i = 0; i < count; i++) {
        ids[i] = i + 1;
        CHECK_INT(tsrv_spawn(loop, waiter, &ids[i]), TSRV_OK);
    }
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(t_record_count(), 0);
}

static void notify_and_turn(size_t count)
{
    CHECK_INT(tsrv_condition_notify(&condition, count), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) >= 0);
}

TEST_LOOP(who_came_first_is_woken_first)
{
    static const int expected[] = {1, 0, 2, 0, 3, 0, 4, 0, 5, 0};
    int ids[5];
    open_with_waiters(wait_once, ids, 5);
    notify_and_turn(0);
    CHECK_INT(t_record_count(), 0);
    notify_and_turn(1);
    CHECK_INT(t_record_count(), 2);
    notify_and_turn(2);
    CHECK_INT(t_record_count(), 6);
    notify_and_turn(SIZE_MAX);
    notify_and_turn(SIZE_MAX);
    check_order(expected, 10);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* They run in the next turn, not inside the call. */
static void notify_all(void *context)
{
    (void)context;
    CHECK_INT(tsrv_condition_notify(&condition, SIZE_MAX), TSRV_OK);
    t_record(100);
}

TEST_LOOP(nobody_runs_inside_notify)
{
    static const int expected[] = {100, 1, 0, 2, 0};
    int ids[2];
    open_with_waiters(wait_once, ids, 2);
    CHECK_INT(tsrv_loop_post(loop, notify_all, NULL), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    check_order(expected, 5);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

static void wait_a_while(void *context)
{
    int64_t start = t_now_ms();
    int rc = tsrv_condition_wait(&condition, *(int *)context == 1 ? 20 : TSRV_NEVER);
    CHECK(*(int *)context != 1 || t_now_ms() - start >= 20);
    t_record(*(int *)context);
    t_record(rc);
}

/* One that has gone is not counted: the next one is woken. */
TEST_LOOP(wait_times_out_and_takes_no_notification)
{
    static const int expected[] = {1, TSRV_ETIMEOUT, 2, 0, 3, 0};
    int ids[3];
    open_with_waiters(wait_a_while, ids, 3);
    while (t_record_count() == 0) {
        CHECK(tsrv_loop_run_once(loop, TSRV_NEVER) > 0);
    }
    CHECK_INT(t_record_count(), 2);
    notify_and_turn(1);
    CHECK_INT(t_record_count(), 4);
    notify_and_turn(1);
    check_order(expected, 6);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* Without a time the others go first, and those that are notified meanwhile are counted. */
static void notify_one(void *context)
{
    (void)context;
    t_record(50);
    CHECK_INT(tsrv_condition_notify(&condition, 1), TSRV_OK);
}

static void look_at_it(void *context)
{
    int id = *(int *)context;
    if (id <= 2) {
        CHECK_INT(tsrv_spawn(NULL, notify_one, NULL), TSRV_OK);
    }
    t_record(id);
    t_record(tsrv_condition_wait(&condition, id <= 3 ? 0 : TSRV_NEVER));
    t_record(10 * id);
}

TEST_LOOP(wait_without_a_time_lets_the_others_go_first)
{
    static const int expected[] = {1, 2, 3, 4, 50, 0, 10, 50, 0, 20, TSRV_ETIMEOUT, 30, 0, 40};
    int ids[4] = {1, 2, 3, 4};
    memset(&condition, 0, sizeof condition);
    loop = t_new_loop();
    for (int i = 0; i < 4; i++) {
        CHECK_INT(tsrv_spawn(loop, look_at_it, &ids[i]), TSRV_OK);
    }
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(t_record_count(), 4);
    while (t_record_count() < 12) {
        CHECK(tsrv_loop_run_once(loop, 0) > 0);
    }
    notify_and_turn(1);
    check_order(expected, 14);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* In whatever order they go. */
static void wait_and_go(void *context)
{
    int id = *(int *)context;
    t_record(id * 100 - tsrv_condition_wait(&condition, id == 2 ? 1 : id == 4 ? 2 : id == 1 ? 3 : TSRV_NEVER));
}

TEST_LOOP(those_in_the_middle_may_go)
{
    int ids[5];
    open_with_waiters(wait_and_go, ids, 5);
    while (t_record_count() < 3) {
        CHECK(tsrv_loop_run_once(loop, TSRV_NEVER) > 0);
    }
    notify_and_turn(1);
    CHECK_INT(t_recorded(3), 300);
    notify_and_turn(SIZE_MAX);
    CHECK_INT(t_recorded(4), 500);
    CHECK_INT(t_record_count(), 5);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

static void wait_not_at_all(void *context)
{
    CHECK_INT(tsrv_condition_wait(&condition, 0), TSRV_ETIMEOUT);
    t_record(*(int *)context);
}

TEST_LOOP(notification_is_not_remembered)
{
    int ids[1];
    memset(&condition, 0, sizeof condition);
    CHECK_INT(tsrv_condition_notify(&condition, 1), TSRV_OK);
    open_with_waiters(wait_not_at_all, ids, 1);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

static void wait_on_another_loop(void *context)
{
    (void)context;
    CHECK_INT(tsrv_condition_wait(&condition, 0), TSRV_EINVAL);
    t_record(200);
}

TEST_LOOP(wait_needs_a_coroutine_and_one_loop)
{
    int ids[1];
    open_with_waiters(wait_once, ids, 1);
    CHECK_INT(tsrv_condition_wait(&condition, 0), TSRV_EINVAL);
    tsrv_loop *other = t_new_loop();
    CHECK_INT(tsrv_spawn(other, wait_on_another_loop, NULL), TSRV_OK);
    CHECK_INT(tsrv_loop_run(other), TSRV_OK);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(tsrv_loop_free(other), TSRV_OK);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    CHECK_INT(t_recorded(2), TSRV_ECLOSED);
}

static void wait_on(void *context)
{
    int rc = tsrv_condition_wait(&condition, TSRV_NEVER);
    t_record(*(int *)context);
    t_record(rc);
    rc = tsrv_condition_wait(&condition, TSRV_NEVER);
    t_record(*(int *)context);
    t_record(rc);
    if (*(int *)context == 2) {
        return;
    }
    tsrv_condition_wait(&condition, TSRV_NEVER);
    T_FAIL("it has been woken");
}

/* It is the last, so the others have begun their second wait. */
static void end_and_tell(void *context)
{
    (void)context;
    CHECK_INT(tsrv_sleep(1000000), TSRV_ECLOSED);
    CHECK_INT(tsrv_condition_notify(&condition, SIZE_MAX), TSRV_OK);
}

/* Each wait ends once; a second one can still be notified; what waits a third time is dropped, and the condition does
 * not know it any more. */
TEST_LOOP(freeing_the_loop_ends_waits)
{
    static const int expected[] = {1, TSRV_ECLOSED, 2, TSRV_ECLOSED, 1, 0, 2, 0};
    int ids[2];
    open_with_waiters(wait_on, ids, 2);
    CHECK_INT(tsrv_spawn(loop, end_and_tell, NULL), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    t_watch_log();
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    CHECK(strstr(t_log, "1 coroutines still waited and were dropped") != NULL);
    check_order(expected, 8);
    CHECK(condition.first == NULL && condition.last == NULL);
    CHECK_INT(tsrv_condition_notify(&condition, SIZE_MAX), TSRV_OK);
}

/* The condition lies on the stack of one that is dropped before those who wait for it, and whose stack is unmapped then,
 * as the pool is full. */
static tsrv_condition *lying;

static void own_condition(void *context)
{
    tsrv_condition own;
    (void)context;
    memset(&own, 0, sizeof own);
    lying = &own;
    for (;;) {
        tsrv_sleep(1000000);
    }
}

static void wait_without_end(void *context)
{
    (void)context;
    for (;;) {
        tsrv_condition_wait(lying, TSRV_NEVER);
    }
}

static void sleep_briefly(void *context)
{
    (void)context;
    CHECK(tsrv_sleep(1) <= 0);
}

TEST_LOOP(condition_may_be_dropped_with_its_stack)
{
    loop = t_new_loop();
    for (int i = 0; i < TSRVI_STACK_POOL + 10; i++) {
        CHECK_INT(tsrv_spawn(loop, sleep_briefly, NULL), TSRV_OK);
    }
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(tsrv_spawn(loop, own_condition, NULL), TSRV_OK);
    CHECK_INT(tsrv_spawn(loop, wait_without_end, NULL), TSRV_OK);
    for (int i = 0; i < TSRVI_STACK_POOL; i++) { /* so that there is no room for theirs */
        CHECK_INT(tsrv_spawn(loop, sleep_briefly, NULL), TSRV_OK);
    }
    while (loop->coroutines.stacks[0].count < TSRVI_STACK_POOL) {
        CHECK(tsrv_loop_run_once(loop, 10) > 0);
    }
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* Those whose wait the loop has ended take no notification from who waits on. */
static void end_and_tell_one(void *context)
{
    (void)context;
    CHECK_INT(tsrv_sleep(1000000), TSRV_ECLOSED);
    CHECK_INT(tsrv_condition_notify(&condition, 1), TSRV_OK);
}

static void wait_on_or_once(void *context)
{
    (*(int *)context == 1 ? wait_on : wait_once)(context);
}

TEST_LOOP(wait_that_has_ended_takes_no_notification)
{
    static const int expected[] = {1, TSRV_ECLOSED, 2, TSRV_ECLOSED, 1, 0};
    int ids[1], other = 2;
    open_with_waiters(wait_on_or_once, ids, 1);
    CHECK_INT(tsrv_spawn(loop, end_and_tell_one, NULL), TSRV_OK);
    CHECK_INT(tsrv_spawn(loop, wait_on_or_once, &other), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    check_order(expected, 6);
}

/* ---- what is built with it ----------------------------------------------------------------*/

/* A pool of two: five who want one, and never more than two who have it. */
static tsrv_condition freed;
static int left_in_pool, most_in_use, served;

static void use_pool(void *context)
{
    (void)context;
    while (left_in_pool == 0) {
        CHECK_INT(tsrv_condition_wait(&freed, TSRV_NEVER), TSRV_OK);
    }
    left_in_pool--;
    most_in_use = 2 - left_in_pool > most_in_use ? 2 - left_in_pool : most_in_use;
    CHECK_INT(tsrv_sleep(2), TSRV_OK);
    left_in_pool++;
    served++;
    CHECK_INT(tsrv_condition_notify(&freed, 1), TSRV_OK);
}

TEST_LOOP(pool_serves_all_and_never_more_at_once)
{
    memset(&freed, 0, sizeof freed);
    left_in_pool = 2;
    most_in_use = served = 0;
    loop = t_new_loop();
    for (int i = 0; i < 5; i++) {
        CHECK_INT(tsrv_spawn(loop, use_pool, NULL), TSRV_OK);
    }
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(served, 5);
    CHECK_INT(most_in_use, 2);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* ---- what the manual builds with it: see conditions.h --------------------------------------*/

static unsigned seed;

/* The same numbers in every run. */
static int below(int most)
{
    seed = seed * 1103515245u + 12345u;
    return (int)(seed >> 16) % most;
}

static void spawn_many(tsrv_callback callback, int *ids, int count)
{
    for (int i = 0; i < count; i++) {
        ids[i] = i + 1;
        CHECK_INT(tsrv_spawn(loop, callback, &ids[i]), TSRV_OK);
    }
}

static void run_empty(void)
{
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
}

/* ---- a join ----*/

typedef struct helpers {
    join all;
    int sleep_ms; /* of each */
} helpers;

static void help(void *context)
{
    helpers *h = (helpers *)context;
    do {
        tsrv_sleep(h->sleep_ms);
    } while (h->sleep_ms == 1 && !h->all.over);
    t_record(h->all.running);
    join_end(&h->all);
}

/* On the stack of who waits: helpers that are left would write where others are by then. */
static void join_helpers(int sleep_ms, int timeout_ms, int expected)
{
    helpers h;
    memset(&h, 0, sizeof h);
    h.sleep_ms = sleep_ms;
    for (int i = 0; i < 5; i++) {
        h.all.running++;
        CHECK_INT(tsrv_spawn(loop, help, &h), TSRV_OK);
    }
    CHECK_INT(join_wait(&h.all, timeout_ms), expected);
    CHECK_INT(h.all.running, 0);
    CHECK_INT(t_record_count(), 5);
    CHECK(h.all.over == (expected != TSRV_OK));
    CHECK(h.all.ended.first == NULL);
}

static void join_in_time(void *context)
{
    (void)context;
    join_helpers(2, TSRV_NEVER, TSRV_OK);
}

TEST_LOOP(join_waits_for_all)
{
    loop = t_new_loop();
    CHECK_INT(tsrv_spawn(loop, join_in_time, NULL), TSRV_OK);
    run_empty();
}

static void join_too_late(void *context)
{
    (void)context;
    join_helpers(1, 5, TSRV_ETIMEOUT); /* they go on until they are asked to end */
}

TEST_LOOP(join_whose_time_is_over_waits_on)
{
    loop = t_new_loop();
    CHECK_INT(tsrv_spawn(loop, join_too_late, NULL), TSRV_OK);
    run_empty();
}

static void join_in_a_loop_that_is_freed(void *context)
{
    (void)context;
    join_helpers(1000000, TSRV_NEVER, TSRV_ECLOSED);
    t_record(100);
}

TEST_LOOP(join_ends_with_its_loop)
{
    loop = t_new_loop();
    CHECK_INT(tsrv_spawn(loop, join_in_a_loop_that_is_freed, NULL), TSRV_OK);
    for (int i = 0; i < 3; i++) {
        CHECK(tsrv_loop_run_once(loop, 0) > 0);
    }
    CHECK_INT(t_record_count(), 0);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    CHECK_INT(t_recorded(5), 100);
}

static join shared;

static void await_shared(void *context)
{
    (void)context;
    CHECK_INT(join_wait(&shared, TSRV_NEVER), TSRV_OK);
    CHECK_INT(shared.running, 0);
    t_record(1);
}

/* Woken, but there is one more by then. */
TEST_LOOP(join_looks_again)
{
    memset(&shared, 0, sizeof shared);
    shared.running = 1;
    loop = t_new_loop();
    CHECK_INT(tsrv_spawn(loop, await_shared, NULL), TSRV_OK);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    join_end(&shared);
    shared.running++;
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(t_record_count(), 0);
    join_end(&shared);
    run_empty();
    CHECK_INT(t_record_count(), 1);
}

/* ---- a semaphore ----*/

enum { SLOTS = 3 };
static semaphore places;
static int inside, most_inside;

static void open_places(int count)
{
    memset(&places, 0, sizeof places);
    places.free = count;
    inside = most_inside = 0;
    loop = t_new_loop();
}

static void enter(void)
{
    inside++;
    most_inside = inside > most_inside ? inside : most_inside;
}

static void leave(void)
{
    inside--;
    semaphore_give(&places);
}

static void enter_and_leave(void *context)
{
    CHECK_INT(semaphore_take(&places, TSRV_NEVER), TSRV_OK);
    t_record(*(int *)context);
    enter();
    tsrv_sleep(below(3));
    leave();
}

TEST_LOOP(semaphore_lets_so_many_in_and_in_their_order)
{
    int ids[40];
    open_places(SLOTS);
    spawn_many(enter_and_leave, ids, 40);
    run_empty();
    CHECK_INT(most_inside, SLOTS);
    CHECK_INT(places.free, SLOTS);
    CHECK_INT(places.waiting, 0);
    for (int i = 0; i < 40; i++) {
        CHECK_INT(t_recorded(i), i + 1);
    }
}

/* Gives and takes without a wait between: those who wait come first. */
static void come_again(void *context)
{
    for (int i = 0; i < 3; i++) {
        enter_and_leave(context);
    }
}

TEST_LOOP(semaphore_is_not_taken_again_before_others)
{
    static const int expected[] = {1, 2, 3, 1, 2, 3, 1, 2, 3};
    int ids[3];
    open_places(1);
    spawn_many(come_again, ids, 3);
    run_empty();
    check_order(expected, 9);
}

static int served_of_many, given_up;

/* Some wait for ever, and must be served; others give up at any moment. */
static void come_at_random(void *context)
{
    int id = *(int *)context;
    for (int i = 0; i < 20; i++) {
        int rc = semaphore_take(&places, id % 2 == 0 ? TSRV_NEVER : below(3));
        CHECK(places.free >= 0 && places.free + inside + (rc == TSRV_OK) <= SLOTS);
        if (rc == TSRV_OK) {
            enter();
            served_of_many++;
            if (below(2) == 0) {
                CHECK_INT(tsrv_sleep(below(3)), TSRV_OK);
            }
            leave();
        } else {
            CHECK_INT(rc, TSRV_ETIMEOUT);
            CHECK(id % 2 == 1);
            given_up++;
        }
        if (below(4) == 0) {
            CHECK_INT(tsrv_sleep(below(2)), TSRV_OK);
        }
    }
}

TEST_LOOP(semaphore_loses_nothing)
{
    int ids[20];
    for (unsigned run = 1; run <= 5; run++) {
        seed = run;
        served_of_many = given_up = 0;
        open_places(SLOTS);
        spawn_many(come_at_random, ids, 20);
        run_empty(); /* it returns: nobody waits any more */
        CHECK_INT(served_of_many + given_up, 400);
        CHECK(given_up > 0);
        CHECK_INT(most_inside, SLOTS);
        CHECK_INT(places.free, SLOTS);
        CHECK_INT(places.waiting, 0);
    }
}

/* The first has it, and comes again when the loop has ended the waits of the two others, who do not know yet. */
static void have_and_come_again(void *context)
{
    (void)context;
    CHECK_INT(semaphore_take(&places, TSRV_NEVER), TSRV_OK);
    CHECK_INT(tsrv_sleep(1000000), TSRV_ECLOSED);
    semaphore_give(&places);
    t_record(semaphore_take(&places, TSRV_NEVER));
    semaphore_give(&places);
}

static void want(void *context)
{
    (void)context;
    t_record(semaphore_take(&places, TSRV_NEVER));
}

TEST_LOOP(semaphore_passes_on_what_was_given_to_who_gives_up)
{
    static const int expected[] = {TSRV_ECLOSED, TSRV_ECLOSED, TSRV_OK};
    int ids[2];
    open_places(1);
    CHECK_INT(tsrv_spawn(loop, have_and_come_again, NULL), TSRV_OK);
    spawn_many(want, ids, 2);
    CHECK(tsrv_loop_run_once(loop, 0) > 0);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    check_order(expected, 3);
    CHECK_INT(places.free, 1);
    CHECK_INT(places.waiting, 0);
}

/* ---- a pool ----*/

static pool things;
static char made[100];
static int made_count, alive_count; /* things */

static void open_pool(void)
{
    memset(&things, 0, sizeof things);
    things.places.free = 8;
    made_count = alive_count = inside = most_inside = 0;
    loop = t_new_loop();
}

/* Making one takes time, and may fail; one may break. */
static void use_thing(void *context)
{
    (void)context;
    for (int i = 0; i < 5; i++) {
        void *thing;
        CHECK_INT(pool_take(&things, &thing, TSRV_NEVER), TSRV_OK);
        enter();
        if (thing == NULL) {
            CHECK_INT(tsrv_sleep(1), TSRV_OK);
            thing = below(4) == 0 ? NULL : &made[made_count++];
            alive_count += thing != NULL;
            CHECK(alive_count <= 8);
        }
        if (thing != NULL) {
            CHECK_INT(*(char *)thing, 0); /* nobody else has it */
            *(char *)thing = 1;
            CHECK_INT(tsrv_sleep(below(2)), TSRV_OK);
            *(char *)thing = 0;
            if (below(8) == 0) {
                thing = NULL;
                alive_count--;
            }
        }
        inside--;
        pool_give(&things, thing);
        CHECK(things.idle_count <= alive_count);
    }
}

TEST_LOOP(pool_has_no_more_than_its_places)
{
    int ids[16];
    open_pool();
    seed = 1;
    spawn_many(use_thing, ids, 16);
    run_empty();
    CHECK_INT(most_inside, 8);
    CHECK(made_count > 8 && made_count < 80);
    CHECK_INT(things.idle_count, alive_count);
    CHECK_INT(things.places.free, 8);
}

static void take_thing(void *context)
{
    int id = *(int *)context;
    void *thing = &made[0];
    int rc = pool_take(&things, &thing, id == 9 ? 5 : TSRV_NEVER);
    CHECK(thing == NULL);
    t_record(id);
    t_record(rc);
    if (id == 9) {
        tsrv_loop_stop(loop);
    } else if (rc == TSRV_OK) {
        CHECK_INT(tsrv_sleep(1000000), TSRV_ECLOSED);
        pool_give(&things, &made[id]);
    }
}

/* The ninth gives up, the tenth waits until the loop is freed. */
TEST_LOOP(pool_may_have_none)
{
    int ids[10];
    open_pool();
    spawn_many(take_thing, ids, 10);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(t_record_count(), 18);
    CHECK_INT(t_recorded(16), 9);
    CHECK_INT(t_recorded(17), TSRV_ETIMEOUT);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    CHECK_INT(t_recorded(18), 10);
    CHECK_INT(t_recorded(19), TSRV_ECLOSED);
    CHECK_INT(things.idle_count, 8);
    CHECK_INT(things.places.free, 8);
    CHECK_INT(things.places.waiting, 0);
}

/* ---- a queue ----*/

static queue items;
static int numbers[1000], put_order[1000];
static int put_count, got_count, producing;

static void open_queue(void)
{
    memset(&items, 0, sizeof items);
    items.room.free = 16;
    put_count = got_count = 0;
    loop = t_new_loop();
}

/* Tries until it is in. */
static void put(int number, int timeout_ms)
{
    int rc;
    numbers[number] = number;
    while ((rc = queue_put(&items, &numbers[number], timeout_ms)) != TSRV_OK) {
        CHECK_INT(rc, TSRV_ETIMEOUT);
        CHECK(timeout_ms >= 0);
    }
    put_order[put_count++] = number;
    CHECK(items.put - items.got <= 16);
}

static void produce(void *context)
{
    int id = *(int *)context;
    for (int i = 0; i < 100; i++) {
        put((id - 1) * 100 + i, id % 2 == 0 ? TSRV_NEVER : below(2));
        if (below(10) == 0) {
            CHECK_INT(tsrv_sleep(below(3)), TSRV_OK);
        }
    }
    if (--producing == 0) {
        for (int i = 0; i < 3; i++) { /* the consumers end */
            put(900 + i, TSRV_NEVER);
        }
    }
}

static void consume(void *context)
{
    int id = *(int *)context, last[9], number = 0;
    memset(last, -1, sizeof last);
    do {
        void *item = NULL;
        int rc = queue_get(&items, &item, id == 1 ? below(2) : TSRV_NEVER);
        if (rc == TSRV_OK) {
            number = *(int *)item;
            CHECK_INT(number, put_order[got_count++]); /* the very next one that was put */
            CHECK(number >= 900 || number > last[number / 100]);
            last[number < 900 ? number / 100 : 0] = number;
        } else {
            CHECK_INT(rc, TSRV_ETIMEOUT);
            CHECK(id == 1 && item == NULL);
        }
        if (below(10) == 0) {
            CHECK_INT(tsrv_sleep(below(3)), TSRV_OK);
        }
    } while (number < 900);
}

TEST_LOOP(queue_keeps_the_order_and_loses_nothing)
{
    int producers[5], consumers[3];
    open_queue();
    seed = 1;
    producing = 5;
    spawn_many(produce, producers, 5);
    spawn_many(consume, consumers, 3);
    run_empty();
    CHECK_INT(put_count, 503);
    CHECK_INT(got_count, 503);
    CHECK_INT(items.room.free, 16);
    CHECK_INT(items.filled.free, 0);
}

static void fill_channel(void *context)
{
    void *none = NULL;
    (void)context;
    CHECK_INT(queue_get(&items, &none, 3), TSRV_ETIMEOUT);
    CHECK(none == NULL);
    for (int i = 0; i < 16; i++) {
        put(i, 0);
    }
    CHECK_INT(queue_put(&items, &numbers[16], 3), TSRV_ETIMEOUT);
    CHECK_INT(items.put, 16);
    tsrv_loop_stop(loop);
    CHECK_INT(queue_put(&items, &numbers[16], TSRV_NEVER), TSRV_ECLOSED);
    CHECK_INT(items.put, 16);
    for (int i = 0; i < 16; i++) { /* what is in it can still be got */
        void *item;
        CHECK_INT(queue_get(&items, &item, 0), TSRV_OK);
        CHECK_INT(*(int *)item, i);
    }
    t_record(1);
}

TEST_LOOP(queue_may_be_full_and_empty)
{
    open_queue();
    CHECK_INT(tsrv_spawn(loop, fill_channel, NULL), TSRV_OK);
    CHECK_INT(tsrv_loop_run(loop), TSRV_OK);
    CHECK_INT(tsrv_loop_free(loop), TSRV_OK);
    CHECK_INT(t_record_count(), 1);
    CHECK_INT(items.room.free, 16);
}

static void wait_less_than_never(void *context)
{
    *(int *)context = tsrv_condition_wait(&condition, TSRV_NEVER - 1);
}

TEST_LOOP(a_time_below_never_is_refused)
{
    int rc = 0;
    tsrv_loop *here = t_new_loop();
    CHECK_INT(tsrv_spawn(here, wait_less_than_never, &rc), TSRV_OK);
    CHECK_INT(tsrv_loop_run(here), TSRV_OK);
    CHECK_INT(rc, TSRV_EINVAL);
    CHECK_INT(tsrv_condition_notify(&condition, 1), TSRV_OK); /* nobody is there */
    CHECK_INT(tsrv_loop_free(here), TSRV_OK);
}
