/* Coroutines that wait for each other. */
#include "test.h"

static tsrv_condition condition;
static tsrv_loop *loop;

static void check_records(const int *expected, int count)
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
    check_records(expected, 10);
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
    check_records(expected, 5);
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
    check_records(expected, 6);
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
    check_records(expected, 8);
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

static void wait_for_ever(void *context)
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
    CHECK_INT(tsrv_spawn(loop, wait_for_ever, NULL), TSRV_OK);
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
    check_records(expected, 6);
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
