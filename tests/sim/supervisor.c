/* The supervisor in a simulated kernel. Its workers, and the programs that upgrades start, are a model: they become
 * ready, beat, hang, die, obey or do not, at moments that are drawn from the run's bytes, as the signals are that the
 * parent gets, the calls that fail, and how long nobody lets it run. When the bytes are over everything goes well from
 * then on, and a while later the parent is told to end.
 *
 * What must hold, whenever the parent goes to sleep:
 *   - it knows every process that lives, and each of a worker's has a life-line; no descriptor is left from another;
 *   - it does not sleep past what is due, and not for nothing;
 *   - while it runs every worker has a process, or will have one; once it stops nothing is forked any more;
 *   - a reload never takes a worker's last process that serves;
 *   - who is told to end is not killed before the grace, and who is aborted was late, or hung, for the time that is set;
 *   - the service manager hears of the end of every reload, of the program that takes over, and of nothing behind
 *     STOPPING=1.
 * And in the end: a calm world finds every reload and upgrade over and every worker up; the parent returns, with a code
 * that has a reason, and no process, descriptor, allocation or signal handler is left. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "process.h"
#include "sys.h"

#include "script.h"

/* What the model has instead; a fork's place is where it is called from, so it sees whose child that will be. */
#undef s_sys_fork
#define s_sys_fork() w_fork(s, child)
#undef s_sys_getenv
#define s_sys_getenv(name) (strcmp(name, "NOTIFY_SOCKET") == 0 ? (char *)"/run/notify" : (char *)NULL)
#undef s_sys_kill
#define s_sys_kill(...) w_kill(__VA_ARGS__)
#undef s_sys_nanosleep
#define s_sys_nanosleep(time, left) ((void)(left), k_now += (uint64_t)(time)->tv_nsec, 0)
#undef s_sys_pipe
#define s_sys_pipe(fds) w_pair(fds, S_OR("pipe", -1, k_pipe(fds)))
#undef s_sys_poll
#define s_sys_poll(...) w_poll(__VA_ARGS__)
#undef s_sys_send
#define s_sys_send(...) w_send(__VA_ARGS__)
#undef s_sys_sendto
#define s_sys_sendto(fd, text, size, ...) w_notified(text, size)
#undef s_sys_socketpair
#define s_sys_socketpair(domain, type, protocol, fds)                                                                  \
    w_pair(fds, S_OR("socketpair", -1, k_socketpair(domain, type, protocol, fds)))
#undef s_sys_waitpid
#define s_sys_waitpid(...) w_waitpid(__VA_ARGS__)

struct tsrvi_supervisor;
static pid_t w_fork(struct tsrvi_supervisor *s, int child);
static int w_kill(pid_t pid, int signo);
static int w_pair(const int *fds, int rc);
static ssize_t w_send(int fd, const void *data, size_t size, int flags);
static int w_poll(struct pollfd *entries, nfds_t count, int timeout_ms);
static ssize_t w_notified(const char *text, size_t size);
static pid_t w_waitpid(pid_t pid, int *status, int options);

#define TCPSERVER_IMPLEMENTATION
#include "../../tcpserver.h"

#define NEVER UINT64_MAX

enum {
    PROCESSES = 600,
    FIRST_PID = 5000,
    THEIRS = 128, /* the first descriptor of children; what is below is the parent's */
    MOST_IN_VAIN = 100,
    CALM_MS = 400000, /* in which what the script has begun has ended: the longest time limit and more */
    END_MS = 300000   /* for everybody to end */
};

static uint64_t after_ms(int ms)
{
    return ms < 0 ? NEVER : k_now + (uint64_t)ms * K_MS;
}

/* ---- processes ----------------------------------------------------------------------------*/

typedef enum conduct { OBEYS, IS_DEAF, BREAKS, IS_STOPPED, CONDUCTS } conduct; /* when it is told something */

typedef struct process {
    int child; /* its place in the parent's table */
    bool program, alive, reaped;
    int status;
    int fd; /* its end of the life-line, or of the pipe that a program tells its success by */
    conduct conduct;
    int drain_ms;
    uint64_t born, ready, listening, frozen, dies; /* when it will be so */
    int dies_with;
    bool serves, listens; /* it is so */
    bool over;            /* it listened, and its loop has ended */
    bool heard;           /* what it was told last, while the parent still told it */
    bool silent;          /* a program that ends its pipe without a word */
    bool replaced;
    bool leaves, leaves_at_end; /* the parent has told it to, as everything ends */
    int told;             /* how often */
    uint64_t first_told, last_told, aborted;
} process;

static process processes[PROCESSES];
static int process_count;
static tsrvi_supervisor *parent; /* once it has forked */
static int pair[2];              /* the last that were made */
static bool faults, starves, calm, stopping, server;
static pid_t main_pid; /* that the service manager was told of; 0 = ours */
static int exits, workers;
static uint64_t next_signal, calm_since, ending_since;
static int in_vain;
static bool unseen; /* one has ended since the parent went to sleep */
static int late_kills;    /* of those that had their grace in the end, and were to drain */
static bool reload_is_on; /* the log says so */
static char told_last[64]; /* the service manager */
static bool told_stopping;
static tsrv_fork_options fork_options;

static pid_t pid_of(const process *p)
{
    return FIRST_PID + (pid_t)(p - processes);
}

static process *find(pid_t pid)
{
    int index = (int)pid - FIRST_PID;
    if (index < 0 || index >= process_count) {
        k_violation("process %d is not ours", (int)pid);
    }
    return &processes[index];
}

static bool fails(void)
{
    return faults && draw(16) == 1;
}

static int w_pair(const int *fds, int rc)
{
    if (rc == 0) {
        pair[0] = fds[0];
        pair[1] = fds[1];
    }
    return rc;
}

/* What it will do. All zeros: it serves at once, obeys, and lives for ever. */
static void draw_conduct(process *p)
{
    static const int ready_ms[] = {0, 0, 5, 900, 1500, 30000, -1}, drain_ms[] = {0, 10, 800, 5000, 60000};
    static const int lives_ms[] = {-1, -1, -1, -1, 0, 3, 500, 2500, 61000};
    static const int frozen_ms[] = {-1, -1, -1, -1, -1, 0, 700, 9000};
    static const int ends[] = {1 << 8, 0, SIGSEGV, SIGKILL, 77 << 8};
    p->ready = after_ms(PICK(ready_ms));
    p->listening = p->ready == NEVER || draw(3) == 1 ? after_ms((int)draw(200)) : p->ready;
    p->listening = draw(12) == 1 ? NEVER : p->listening;
    p->drain_ms = PICK(drain_ms);
    p->dies = after_ms(PICK(lives_ms));
    p->dies_with = PICK(ends);
    p->frozen = after_ms(PICK(frozen_ms));
    p->conduct = draw(3) == 1 ? (conduct)draw(CONDUCTS) : OBEYS;
    p->silent = p->program && draw(4) == 1;
}

static pid_t w_fork(tsrvi_supervisor *s, int child)
{
    process *p = &processes[process_count];
    parent = s;
    if (fails()) {
        errno = EAGAIN;
        return -1;
    }
    if (stopping || s->state != TSRVI_PARENT_RUNNING) {
        k_violation("a fork, though everything ends");
    }
    if (process_count == PROCESSES) {
        k_violation("%d processes", PROCESSES);
    }
    memset(p, 0, sizeof *p);
    p->child = child;
    p->program = tsrvi_child_is_program(s, child);
    p->born = k_now;
    p->alive = true;
    p->fd = k_install(k.slots[pair[1]].file, THEIRS, true);
    draw_conduct(p);
    process_count++;
    TRACE("%9.3f fork: %d is child %d\n", (double)k_now / 1e9, (int)pid_of(p), child);
    return pid_of(p);
}

static void close_end(process *p)
{
    if (p->fd >= 0) {
        k_close(p->fd);
    }
    p->fd = -1;
}

static void dies(process *p, int status)
{
    TRACE("%9.3f %d dies of %#x\n", (double)k_now / 1e9, (int)pid_of(p), (unsigned)status);
    p->alive = false;
    p->status = status;
    close_end(p);
    unseen = true;
    k_raise(SIGCHLD);
}

static pid_t w_waitpid(pid_t pid, int *status, int options)
{
    process *p = find(pid);
    (void)options;
    if (p->reaped) {
        k_violation("process %d is waited for again", (int)pid);
    }
    if (fails()) {
        errno = EINTR;
        return -1;
    }
    if (p->alive) {
        return 0;
    }
    p->reaped = true;
    if (faults && draw(32) == 1) { /* the host has waited for it */
        errno = ECHILD;
        return -1;
    }
    *status = p->status;
    return pid;
}

/* ---- being told ---------------------------------------------------------------------------*/

static void is_told(process *p)
{
    p->replaced = p->replaced || !p->serves; /* it takes nothing away when it ends */
    p->first_told = p->told++ == 0 ? k_now : p->first_told;
    p->last_told = k_now;
}

static void obey(process *p, int signo)
{
    is_told(p);
    if (p->conduct == OBEYS && p->frozen > k_now) {
        uint64_t end = after_ms(p->told > 1 ? p->drain_ms / 8 : p->drain_ms);
        p->dies = end < p->dies ? end : p->dies;
        p->dies_with = 0;
    } else if (p->conduct == BREAKS) {
        p->dies = k_now;
        p->dies_with = signo;
    }
}

/* A worker hears of a signal over its life-line, too: the signal itself is for those that do not listen. */
static int w_kill(pid_t pid, int signo)
{
    process *p = find(pid);
    TRACE("%9.3f kill %d %d\n", (double)k_now / 1e9, (int)pid, signo);
    if (p->reaped) {
        k_violation("signal %d for process %d, which is gone", signo, (int)pid);
    }
    if (signo == SIGABRT || (p->program && p->told == 0 && parent->state == TSRVI_PARENT_RUNNING)) {
        uint64_t lived = k_now - p->born, hung = k_now - p->frozen;
        int limit = fork_options.start_timeout_ms == 0 ? 60000 : fork_options.start_timeout_ms;
        bool late = !p->serves && lived >= (uint64_t)limit * K_MS;
        bool hangs = fork_options.heartbeat_ms > 0 && p->frozen <= k_now &&
                     hung >= (uint64_t)fork_options.heartbeat_ms * K_MS;
        if (p->alive && !late && !hangs) { /* else the parent does not know yet that it has ended */
            k_violation("process %d is ended, and is neither late nor hung", (int)pid);
        }
        p->aborted = k_now;
    }
    late_kills += signo == SIGKILL && p->leaves_at_end && p->aborted == 0 && (p->serves || p->program);
    if (signo == SIGKILL) {
        int grace = fork_options.grace_ms == 0 ? 30000 : fork_options.grace_ms;
        uint64_t told = p->told > 0 ? k_now - p->first_told : 0, again = k_now - p->last_told;
        if (p->aborted == 0 && p->told == 0) {
            k_violation("process %d is killed, and was not told before", (int)pid);
        }
        if (p->aborted == 0 && p->serves && told < (uint64_t)grace * K_MS &&
            !(p->told > 1 && again >= 5000 * K_MS)) {
            k_violation("process %d is killed within its grace", (int)pid);
        }
    }
    if (p->alive && p->heard && signo == parent->signo) {
        k_violation("process %d has heard already, and is sent signal %d, too", (int)pid, signo);
    }
    if (fails()) {
        is_told(p);
        errno = EPERM;
        return -1;
    }
    if (!p->alive) {
        is_told(p); /* what waitpid has not told yet, and may not tell for long */
        return 0;
    }
    if (signo == SIGKILL) {
        p->dies = after_ms(draw(2) == 1 ? 40 : 0);
        p->dies_with = SIGKILL;
        p->frozen = k_now; /* it does nothing more */
    } else if (signo == SIGABRT) {
        if (p->conduct != IS_STOPPED) {
            dies(p, SIGABRT);
        }
    } else if (!p->listens && !p->program && p->conduct != IS_STOPPED) {
        obey(p, signo);
        dies(p, signo); /* it has no handler yet */
    } else {
        obey(p, signo);
    }
    return 0;
}

static void listen_to_line(process *p)
{
    unsigned char signo;
    while (p->alive && !p->program && p->listens && k_recv(p->fd, &signo, 1, MSG_DONTWAIT) == 1) {
        uint64_t sent = p->last_told; /* the same by kill, since when the parent counts */
        bool first = p->told == 0;
        tsrvi_process.places[p->child].heard++;
        obey(p, signo);
        p->last_told = first ? p->last_told : sent;
    }
}

/* Before the parent looks whether the worker listens, that may have heard it, and its loop may have ended. */
static ssize_t w_send(int fd, const void *data, size_t size, int flags)
{
    ssize_t sent = s_send(fd, data, size, flags);
    for (int i = 0; i < process_count; i++) {
        process *p = &processes[i];
        if (p->alive && !p->program && parent->children[p->child].line == fd) {
            int told = p->told;
            listen_to_line(p);
            p->heard = p->told > told && p->conduct == OBEYS && draw(3) == 1;
            if (p->heard) {
                p->over = true;
                p->listens = false;
                tsrvi_process.places[p->child].listens = 0;
            }
        }
    }
    return sent;
}

/* ---- what a moment brings -----------------------------------------------------------------*/

/* Has it heard that it is to end? A worker that is busy with its start hears of it later. */
static bool hears(const process *p)
{
    return p->told > (p->told == 1 && !p->program && k_now - p->first_told < 900 * K_MS);
}

static void become(process *p)
{
    tsrvi_place *place = p->program ? NULL : &tsrvi_process.places[p->child];
    if (p->listening <= k_now && !p->listens && !p->over && !p->program) {
        p->listens = true;
        place->listens = 1;
    }
    if (p->ready <= k_now && p->silent) { /* the end of the pipe is no success */
        close_end(p);
        p->ready = NEVER;
    } else if (p->ready <= k_now && !p->serves && !hears(p) && (p->program || server)) {
        p->serves = true;
        if (place != NULL) {
            place->ready = 1;
        }
        k_write(place != NULL ? parent->wake[1] : p->fd, "", 1);
    }
    if (place != NULL && p->listens && p->frozen > k_now) {
        place->beat++;
    }
}

static void signal_parent(int signo)
{
    TRACE("%9.3f signal %d\n", (double)k_now / 1e9, signo);
    stopping = stopping || signo == SIGTERM || signo == SIGINT || signo == SIGQUIT;
    k_raise(signo);
}

static void draw_signal(void)
{
    static const int signals[] = {SIGHUP, SIGHUP, SIGHUP, SIGUSR2, SIGCHLD, SIGHUP, SIGUSR2, SIGHUP, SIGTERM};
    static const int pauses[] = {5, 0, 300, 1200, 4000, 20000, 90000};
    if (script_is_over()) {
        next_signal = NEVER;
        return;
    }
    signal_parent(PICK(signals));
    next_signal = after_ms(PICK(pauses));
}

/* Everything that is due happens. */
static void act(void)
{
    for (int i = 0; i < process_count; i++) {
        process *p = &processes[i];
        listen_to_line(p);
        if (p->alive && p->dies <= k_now) {
            dies(p, p->dies_with);
        } else if (p->alive) {
            become(p);
        }
    }
    if (next_signal <= k_now) {
        draw_signal();
    }
}

/* When something will be due; not later than `limit`. */
static uint64_t next_moment(uint64_t limit)
{
    for (int i = 0; i < process_count; i++) {
        const process *p = &processes[i];
        uint64_t moments[3] = {p->dies, p->serves ? NEVER : p->ready, p->listens ? NEVER : p->listening};
        for (int j = 0; j < 3 && p->alive; j++) {
            limit = moments[j] > k_now && moments[j] < limit ? moments[j] : limit;
        }
    }
    return next_signal > k_now && next_signal < limit ? next_signal : limit;
}

/* ---- the service manager ------------------------------------------------------------------*/

static ssize_t w_notified(const char *text, size_t size)
{
    TRACE("%9.3f notified %.*s\n", (double)k_now / 1e9, (int)size, text);
    if (told_stopping && strncmp(text, "STOPPING", 8) != 0) {
        k_violation("the service manager hears %.*s behind STOPPING=1", (int)size, text);
    }
    if (fails()) {
        errno = EAGAIN;
        return -1;
    }
    snprintf(told_last, sizeof told_last, "%.*s", (int)size, text);
    told_stopping = told_stopping || strncmp(text, "STOPPING", 8) == 0;
    if (strncmp(text, "MAINPID=", 8) == 0) {
        main_pid = (pid_t)strtol(told_last + 8, NULL, 10);
    }
    return (ssize_t)size;
}

/* ---- what must hold -----------------------------------------------------------------------*/

static bool is_ours(const process *p)
{
    for (int i = 0; i < parent->count; i++) {
        if (parent->children[i].pid == pid_of(p)) {
            return true;
        }
    }
    return false;
}

/* A program that serves is its own master. */
static bool has_taken_over(const process *p)
{
    return p->program && p->serves && p->told == 0 && parent->state != TSRVI_PARENT_RUNNING;
}

static void check_processes(void)
{
    int lines = 0, theirs = 0, open = 0;
    for (int i = 0; i < parent->count; i++) {
        const tsrvi_child *c = &parent->children[i];
        if ((c->pid != 0) != (c->state >= TSRVI_CHILD_STARTING) ||
            (c->line >= 0) != (c->pid != 0 && !tsrvi_child_is_program(parent, i))) {
            k_violation("child %d in state %d has pid %d and line %d", i, c->state, (int)c->pid, c->line);
        }
        lines += c->line >= 0;
    }
    for (int i = 0; i < process_count; i++) {
        const process *p = &processes[i];
        theirs += p->alive;
        if (p->alive && !is_ours(p) && !has_taken_over(p)) {
            k_violation("process %d is forgotten", (int)pid_of(p));
        }
    }
    for (int fd = 0; fd < THEIRS; fd++) {
        open += k_is_open(fd);
    }
    if (open != 3 + 2 + lines + (parent->upgrade_fd >= 0)) {
        k_violation("%d descriptors are open beside %d life-lines", open - 3, lines);
    }
    (void)theirs;
}

static void check_times(int timeout_ms)
{
    if (timeout_ms < 0 || timeout_ms > 1000) {
        k_violation("a sleep of %d ms", timeout_ms);
    }
    for (int i = 0; i < parent->count; i++) {
        const tsrvi_child *c = &parent->children[i];
        uint64_t wakes = parent->now + (uint64_t)timeout_ms * K_MS;
        if (c->state != TSRVI_CHILD_VACANT && c->due != TSRVI_FOREVER && wakes > c->due + 2 * K_MS) {
            k_violation("child %d is due in %d ms, of a sleep of %d", i, (int)((c->due - parent->now) / K_MS),
                        timeout_ms);
        }
    }
    in_vain = timeout_ms == 0 ? in_vain + 1 : 0;
    if (in_vain > MOST_IN_VAIN) {
        k_violation("the parent spins");
    }
}

static void check_states(void)
{
    for (int i = 0; i < parent->count && parent->state != TSRVI_PARENT_RUNNING; i++) {
        int state = parent->children[i].state;
        if (state != TSRVI_CHILD_VACANT && state != TSRVI_CHILD_LEAVING) {
            k_violation("everything ends, and child %d is in state %d", i, state);
        }
    }
    for (int worker = 0; worker < workers && server && parent->state == TSRVI_PARENT_RUNNING; worker++) {
        if (tsrvi_child_beside(parent, worker, -1) < 0) {
            k_violation("worker %d has no process", worker);
        }
    }
    if (parent->state == TSRVI_PARENT_RUNNING && parent->rolling && told_last[0] != 0 && !faults && !calm &&
        strncmp(told_last, "RELOADING", 9) != 0) {
        k_violation("a reload goes on, and the service manager hears of %s", told_last);
    }
    if (parent->state == TSRVI_PARENT_RUNNING && !parent->rolling && strncmp(told_last, "RELOADING", 9) == 0 &&
        tsrvi_process.notify_owed[0] == 0) {
        k_violation("the reload is over, and the service manager has not heard of it");
    }
}

/* A process that serves, and has been told by the parent to end, has left another one that serves. */
static void check_service(void)
{
    for (int i = 0; i < process_count; i++) {
        process *p = &processes[i];
        bool other = false;
        const tsrvi_child *c = &parent->children[p->child];
        if (p->program || !p->alive || !p->serves || c->pid != pid_of(p) || c->state != TSRVI_CHILD_LEAVING ||
            p->frozen <= k_now || parent->state != TSRVI_PARENT_RUNNING || p->replaced ||
            p->aborted != 0) {
            continue;
        }
        p->replaced = true; /* looked at once, when it has just been told */
        for (int j = 0; j < process_count; j++) {
            const process *q = &processes[j];
            other = other || (q->serves && !q->program && (q->told == 0 || q->last_told == k_now) && q != p &&
                              q->child / TSRVI_GENERATIONS == p->child / TSRVI_GENERATIONS);
        }
        if (!other && parent->state == TSRVI_PARENT_RUNNING) {
            k_violation("process %d was worker %d's last that served", (int)pid_of(p), p->child / TSRVI_GENERATIONS);
        }
    }
}

static void note_leaving(void)
{
    for (int i = 0; i < parent->count; i++) {
        const tsrvi_child *c = &parent->children[i];
        process *p = c->pid == 0 ? NULL : find(c->pid);
        if (p != NULL && c->state == TSRVI_CHILD_LEAVING && !p->leaves) {
            p->leaves = true;
            p->leaves_at_end = parent->state != TSRVI_PARENT_RUNNING;
        }
    }
}

/* All has gone well for long. */
static void check_calm(void)
{
    if (parent->rolling || parent->fresh >= 0 || parent->upgrade >= 0) {
        k_violation("a reload or an upgrade is still under way");
    }
    for (int worker = 0; worker < workers; worker++) {
        int child = tsrvi_child_beside(parent, worker, -1);
        if (child >= 0 && parent->children[child].generation != parent->generation && !faults) {
            TRACE("worker %d is of an older generation\n", worker); /* a reload may have been given up */
        }
        if (server && child >= 0 && parent->children[child].state != TSRVI_CHILD_SERVING &&
            parent->children[child].state != TSRVI_CHILD_DUE) {
            k_violation("worker %d is in state %d", worker, parent->children[child].state);
        }
    }
}

/* The script is over: what comes into being now is well, what hangs is let go of, and a while later all is to end. */
static void see_to_the_end(void)
{
    if (!calm && script_is_over()) {
        calm = true;
        faults = starves = false;
        calm_since = k_now;
    }
    if (calm && !stopping && k_now - calm_since > (uint64_t)CALM_MS * K_MS) {
        if (parent->state == TSRVI_PARENT_RUNNING) {
            check_calm();
        }
        signal_parent(SIGTERM);
    }
    ending_since = stopping && calm && ending_since == 0 ? k_now : ending_since;
    if (ending_since != 0 && k_now - ending_since > (uint64_t)END_MS * K_MS) {
        k_violation("the parent does not end");
    }
}

/* The parent sleeps, until something wakes it. */
static int w_poll(struct pollfd *entries, nfds_t count, int timeout_ms)
{
    if (count == 1 && entries->fd == STDOUT_FILENO) { /* it takes what is printed; that is no sleep */
        entries->revents = POLLOUT;
        return 1;
    }
    static const int starved_ms[] = {0, 0, 0, 0, 0, 0, 0, 50, 2000, 100000};
    uint64_t limit = k_now + (uint64_t)timeout_ms * K_MS;
    unseen = false;
    check_processes();
    check_times(timeout_ms);
    check_states();
    check_service();
    note_leaving();
    see_to_the_end();
    for (;;) {
        int ready;
        act();
        ready = k_poll(entries, count, 0);
        if (ready == 0 && unseen && !faults) {
            k_violation("the parent sleeps on, though a process has ended");
        }
        if (ready != 0 || k_now >= limit) {
            k_now += starves ? (uint64_t)PICK(starved_ms) * K_MS : 0;
            return ready;
        }
        if (fails()) {
            errno = EINTR;
            return -1;
        }
        k_now = next_moment(limit);
    }
}

/* ---- one run ------------------------------------------------------------------------------*/

static int plan(const s_class *class)
{
    bool ours = strcmp(class->name, "pipe") == 0 || strcmp(class->name, "socketpair") == 0 ||
                strcmp(class->name, "socket") == 0 || strcmp(class->name, "malloc") == 0 ||
                strcmp(class->name, "send") == 0 || strcmp(class->name, "read") == 0 ||
                strcmp(class->name, "write") == 0;
    if (!ours || parent == NULL || !fails()) {
        return 0;
    }
    return class->codes[draw((unsigned)s_code_count(class))] == S_SHORT ? 0 : class->codes[0];
}

static void log_line(int level, const char *message, void *context)
{
    (void)context;
    TRACE("%9.3f log %d: %s\n", (double)k_now / 1e9, level, message);
    if (strncmp(message, "reload: ", 8) == 0 && strstr(message, "one after the other") != NULL) {
        reload_is_on = true;
    } else if (strncmp(message, "reload: done", 12) == 0 || strncmp(message, "reload: given up", 16) == 0) {
        if (!reload_is_on) {
            k_violation("a reload ends that was over");
        }
        reload_is_on = false;
    }
}

static void count_exit(int task_id, int pid, int status, void *context)
{
    (void)task_id, (void)status, (void)context;
    if (!find(pid)->reaped) {
        k_violation("on_exit of %d, which has not ended", pid);
    }
    exits++;
}

static void check_end(int rc)
{
    int worker_ends = 0, lost = 0;
    for (int i = 0; i < process_count; i++) {
        const process *p = &processes[i];
        worker_ends += !p->program;
        lost += p->alive && !p->program;
        if (p->alive && p->program && !(has_taken_over(p) && main_pid == pid_of(p))) {
            k_violation("the program %d is left behind, or the service manager knows nothing of it", (int)pid_of(p));
        }
        if (p->alive) {
            close_end(&processes[i]);
        }
    }
    if (lost != 0) {
        k_violation("%d workers are left behind", lost);
    }
    if (exits != worker_ends) {
        k_violation("on_exit came %d times, for %d workers", exits, worker_ends);
    }
    if (rc != TSRV_EPARENT && rc != TSRV_ETIMEOUT && rc != TSRV_ERESTARTS && !(rc < 0 && rc > -1000)) {
        k_violation("the parent returns %d", rc);
    }
    if (rc < 0 && rc > -1000 && process_count != 0) {
        k_violation("the parent returns what a fork has failed with, %d, though there were workers", rc);
    }
    if ((rc == TSRV_EPARENT && late_kills != 0) || (rc == TSRV_ETIMEOUT && late_kills == 0 && server)) {
        k_violation("the parent returns %d, with %d workers killed in the end", rc, late_kills);
    }
    if (!faults && !calm && stopping && main_pid == 0 && !told_stopping) {
        k_violation("the service manager has not heard of the end");
    }
    if (rc == TSRV_ERESTARTS && fork_options.max_restarts < 0) {
        k_violation("the parent gives up, and is never to");
    }
    if (s_live != 0) {
        k_violation("%ld allocations are left", s_live);
    }
    if (k_open_count() != 3) {
        k_violation("%d descriptors are left", k_open_count() - 3);
    }
    for (int signo = 1; signo <= 64; signo++) {
        if (k.actions[signo].sa_handler != SIG_DFL) {
            k_violation("a handler of signal %d is left", signo);
        }
    }
}

static __typeof__(tsrvi_process) first_process; /* so that a run does not know what the ones before have learnt */

static void reset(void)
{
    static bool ready;
    if (!ready) {
        ready = true;
        tracing = getenv("SIM_TRACE") != NULL;
        tsrv_set_log(log_line, NULL);
        first_process = tsrvi_process;
    }
    tsrvi_places_drop();
    k_boot();
    tsrvi_process = first_process;
    process_count = exits = in_vain = late_kills = 0;
    reload_is_on = false;
    parent = NULL;
    calm = stopping = told_stopping = false;
    main_pid = 0;
    told_last[0] = 0;
    ending_since = calm_since = 0;
    s_live = s_live_bytes = 0;
    s_plan = plan;
    k_now = 1000000 * K_MS;
}

static void d_run(const uint8_t *data, size_t size)
{
    static char *arguments[] = {(char *)"server", NULL};
    static tsrv_server served; /* of which only its grace counts */
    static const int graces_ms[] = {0, 500, 3000, 20000}, starts_ms[] = {0, 400, 2000, 70000};
    static const int heartbeats_ms[] = {0, 400, 3000, 20000}, restarts[] = {0, -1, 1, 3, 100};
    unsigned how;
    int rc;
    reset();
    script_begin(data, size);
    how = draw(256);
    faults = (how & 3) == 3;
    starves = (how & 12) == 12;
    server = (how & 48) != 48;
    workers = 1 + (int)draw(3);
    memset(&fork_options, 0, sizeof fork_options);
    fork_options.grace_ms = PICK(graces_ms);
    fork_options.start_timeout_ms = PICK(starts_ms);
    fork_options.heartbeat_ms = PICK(heartbeats_ms);
    fork_options.max_restarts = PICK(restarts);
    fork_options.upgrade_argv = arguments;
    fork_options.on_exit = count_exit;
    next_signal = after_ms((int)draw(200) * 10);
    served.options.grace_ms = 30000;
    rc = tsrvi_fork(workers, &fork_options, server ? &served : NULL);
    check_end(rc);
}

#include "driver.h"
