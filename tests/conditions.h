/* What the manual builds with tsrv_condition, word for word: tests/check_header.sh compares. */
typedef struct join {
    int running; // helpers; each is counted before it is spawned
    bool over;   // helpers look at it, and end
    tsrv_condition ended;
} join;

static void join_end(join *j) // the last thing that a helper does
{
    tsrv_condition_notify(&j->ended, --j->running == 0 ? SIZE_MAX : 0);
}

static int join_wait(join *j, int timeout_ms)
{
    int rc = TSRV_OK;
    while (j->running > 0) {
        int woken = tsrv_condition_wait(&j->ended, rc == TSRV_OK ? timeout_ms : TSRV_NEVER);
        rc = rc == TSRV_OK ? woken : rc;
        j->over = rc != TSRV_OK;
    }
    return rc;
}

typedef struct semaphore {
    int free, waiting; // at first n, and 0
    tsrv_condition more;
} semaphore;

static int semaphore_take(semaphore *s, int timeout_ms)
{
    int rc = TSRV_OK;
    if (s->free <= s->waiting) {
        s->waiting++;
        while ((rc = tsrv_condition_wait(&s->more, timeout_ms)) == TSRV_OK && s->free == 0) {
        }
        s->waiting--;
    }
    s->free -= rc == TSRV_OK;
    tsrv_condition_notify(&s->more, rc != TSRV_OK && s->free > 0);
    return rc;
}

static void semaphore_give(semaphore *s)
{
    s->free++;
    tsrv_condition_notify(&s->more, 1);
}

enum { PLACES = 8 };

typedef struct pool {
    semaphore places; // {PLACES, 0, {0}} at first
    void *idle[PLACES];
    int idle_count;
} pool;

static int pool_take(pool *p, void **taken, int timeout_ms) // *taken NULL: make one
{
    int rc = semaphore_take(&p->places, timeout_ms);
    *taken = rc == TSRV_OK && p->idle_count > 0 ? p->idle[--p->idle_count] : NULL;
    return rc;
}

static void pool_give(pool *p, void *taken) // NULL: it broke, or could not be made
{
    if (taken != NULL) {
        p->idle[p->idle_count++] = taken;
    }
    semaphore_give(&p->places);
}

typedef struct queue {
    semaphore room, filled; // {16, 0, {0}} and {0} at first
    void *items[16];
    unsigned put, got; // so far
} queue;

static int queue_put(queue *q, void *item, int timeout_ms)
{
    int rc = semaphore_take(&q->room, timeout_ms);
    if (rc == TSRV_OK) {
        q->items[q->put++ % 16] = item;
        semaphore_give(&q->filled);
    }
    return rc;
}

static int queue_get(queue *q, void **item, int timeout_ms)
{
    int rc = semaphore_take(&q->filled, timeout_ms);
    if (rc == TSRV_OK) {
        *item = q->items[q->got++ % 16];
        semaphore_give(&q->room);
    }
    return rc;
}
