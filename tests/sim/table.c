/* The fault table: every place in the header that makes a call which can fail (its rows) times every way in which that
 * call fails (its columns: each errno of the call's class, short I/O, no memory), once and from then on.
 *
 * Runs of sim.c, the same in every build, are the scenarios. First each is run without a fault, to learn which sites it
 * reaches; then for each cell some of those that reach its site are run again, in which the first call there fails, one
 * in the middle, or the last; and all of sim.c's invariants have to hold. For the sites that only another failure leads
 * to, scenarios run with one call failing all the time (detours).
 *
 *     table [--scenarios N] [--pairs SECONDS] [--verbose] [--site NAME]
 *
 * A cell that no scenario reached is listed, and makes it fail, unless its site is in `elsewhere`, with the reason.
 * With --pairs, for so long, in short scenarios each pair of failing calls, too. */
#define SIM_NO_MAIN
#include "sim.c"

enum { SITES = 400, SCENARIOS = 1500, BYTES = 160, RUNS_OF_CELL = 6, MOST_STICKY = 40, EVERY = 40, MOST_OF_PAIR = 6 };

/* Sites that the model cannot reach, by their functions; `*` ends a prefix. */
static const struct {
    const char *function, *reason;
} elsewhere[] = {
    {"tsrvi_fd_move", "descriptors 0 to 2 are open in every run: tests/util_test.c closes them"},
    {"tsrvi_handed_*", "sockets are not handed over: tests/systemd_test.c"},
    {"tsrvi_listen_fds_*", "sockets are not handed over: tests/systemd_test.c"},
    {"tsrvi_bound_*", "a second process, or a program that keeps what it has bound: tests/util_test.c"},
    {"tsrvi_signal_alarm", "workers: the model has no processes, tests/supervisor_fault_test.c has"},
    {"tsrvi_log_kept", "a user who may not open the log anew: the same"},
    {"tsrvi_log_keep", "the same"},
    {"tsrvi_stream_look", "an urgent byte of a unix socket, of which the model knows nothing"},
    {"tsrvi_worker_*", "workers: the same"},
    {"tsrvi_tell_*", "workers: the same"},
    {"tsrvi_place_*", "workers: the same"},
    {"tsrvi_places_*", "workers: the same"},
    {"tsrvi_listening_is_shared", "workers: the same"},
    {"tsrvi_supervisor_*", "workers: the same"},
    {"tsrvi_upgrade_*", "workers: the same"},
    {"tsrvi_child_*", "workers: the same"},
    {"tsrvi_identity_*", "workers: the same"},
    {"tsrvi_notify*", "no service manager: tests/systemd_test.c"},
    {"tsrvi_file_read*", "limits of control groups: tests/systemd_test.c"},
    {"tsrvi_cpus*", "limits of control groups: tests/systemd_test.c"},
    {"tsrvi_epoll_set", "EPOLLEXCLUSIVE before Linux 4.5, for workers: tests/fault_test.c"},
    {"tsrvi_log_open", "stderr is a pipe or a terminal: tests/util_test.c"},
    {"tsrvi_log_put", "stderr is systemd's journal: tests/util_test.c"},
};

/* What leads to places that are reached in no other way. */
static const struct {
    const char *name;
    int code;
    bool matters; /* it excuses errors */
    const char *other; /* fails, too, with ENOMEM */
} detours[] = {
    {NULL, 0, false, NULL},
    {"accept4", ENOSYS, false, NULL},
    {"eventfd", ENOSYS, false, NULL},
    {"sendfile", EOVERFLOW, false, NULL},
    {"madvise", EINVAL, false, NULL},
    {"madvise", EINVAL, true, "mprotect"},
    {"munmap", ENOMEM, false, NULL},
    {"epoll_create1", ENOSYS, true, NULL},
    {"socket", EINVAL, true, NULL},
    {"open", ENOENT, true, NULL},
    {"chmod", ENOENT, true, NULL},
    {"flock", EAGAIN, false, NULL},
    {"fstat", EIO, true, NULL},
    {"chmod", ENOENT, true, "unlink"}, /* so that a file stays */
};

enum { DETOURS = sizeof(detours) / sizeof(detours[0]), SPECIAL = 100 };

/* A scenario that reaches a site. */
typedef struct way {
    unsigned short scenario, detour;
    unsigned calls;
} way;

typedef struct row {
    way ways[RUNS_OF_CELL];
    int way_count;
    unsigned done[2][S_CODES]; /* runs in which the cell's failure happened */
    unsigned bad[2][S_CODES];
} row;

typedef struct shared {
    row rows[SITES];
    long runs, pairs;
    int at_row, at_code, at_mode, at_way;
    unsigned at_call, at_second;
} shared;

static shared *table;
static int site_count;
static bool verbose;

/* ---- which call fails ---------------------------------------------------------------------*/

static const s_site *bad_site, *second_site;
static unsigned bad_call, second_call, calls_there, calls_second, failures;
static int bad_code, second_code;
static bool bad_sticky;
static int detour;
static bool broken; /* the backend */
static bool poor;   /* no new set can be made for it */

static int fail_with(const s_class *class, int code)
{
    if (!(is_gentle(class, code) || is_of_accept(class))) {
        unclean = true;
    }
    failures++;
    TRACE("    %s in %s:%d fails with %d\n", class->name, s_at->function, s_at->line, code);
    return code;
}

static int table_plan(const s_class *class)
{
    if (s_at == bad_site) {
        calls_there++;
        bool goes_on = bad_sticky && calls_there > bad_call && failures < MOST_STICKY && !script_is_over();
        if (calls_there == bad_call || goes_on) {
            return fail_with(class, bad_code);
        }
    }
    if (s_at == second_site && ++calls_second == second_call) {
        return fail_with(class, second_code);
    }
    if (poor && strcmp(s_at->function, "tsrvi_epoll_renew") == 0) {
        return EMFILE;
    }
    if (broken && (strcmp(class->name, "epoll_wait") == 0 || strcmp(class->name, "kevent") == 0)) {
        return EBADF;
    }
    if (detour >= SPECIAL || detours[detour].name == NULL ||
        (script_is_over() && strcmp(class->name, "munmap") != 0)) {
        return 0;
    }
    if (strcmp(class->name, detours[detour].name) == 0) {
        unclean = unclean || detours[detour].matters;
        return detours[detour].code;
    }
    return detours[detour].other != NULL && strcmp(class->name, detours[detour].other) == 0 ? ENOMEM : 0;
}

/* ---- scenarios ----------------------------------------------------------------------------*/

/* Bytes of a scenario: as a seed's, but for the faults, which are the table's. */
static size_t scenario_bytes(unsigned number, uint8_t *bytes)
{
    uint64_t state = (uint64_t)number * 0x9E3779B97F4A7C15u + 99;
    for (size_t i = 0; i < BYTES; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        bytes[i] = (uint8_t)(state >> 40);
    }
    bytes[0] &= 0x0f;
    if (number % 2 == 0) {
        bytes[1] |= 6; /* the default logger */
    }
    return 12 + number % (BYTES - 12);
}

/* ---- scenarios by hand: what sim.c's program does not do ------------------------------------*/

static int special_open; /* streams that have not been closed */

static int special_handler(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    tsrv_slice slice;
    int rc = tsrv_read_some(stream, 0, &slice);
    (void)address, (void)context;
    if (rc == TSRV_OK) {
        tsrv_abort(stream);
    }
    return rc;
}

static void special_close(tsrv_stream *stream, int reason, void *context)
{
    (void)stream, (void)reason, (void)context;
    special_open--;
}

static void special_turns(int count, int timeout_ms)
{
    for (int i = 0; i < count && loop != NULL; i++) {
        happened();
        tsrv_loop_run_once(loop, timeout_ms);
    }
}

/* A loop and a server; false: something has failed. */
static bool special_begin(int backend, int proxy)
{
    tsrv_loop_options options = {0};
    tsrv_server_options of_server = {0};
    tsrv_server *server;
    options.backend = backend;
    special_open = 0;
    if (tsrv_loop_new(&loop, &options) < 0) {
        return false;
    }
    of_server.mode = TSRV_CALLBACK;
    of_server.handle_stream = special_handler;
    of_server.on_close = special_close;
    of_server.loop = loop;
    of_server.proxy_protocol = proxy;
    if (tsrv_server_new(&server, &of_server) < 0) {
        return false;
    }
    servers[0].server = server;
    return true;
}

static void special_sleeper(void *context)
{
    (void)context;
    tsrv_sleep(10);
    tsrv_sleep(0);
}

/* A descriptor of a stream is open elsewhere, too: epoll goes on telling of it. */
static void special_leak_of(bool made_poor)
{
    static tsrv_timer timer; /* so that the loop has something to wait for */
    int fds[2], copy;
    memset(&timer, 0, sizeof timer);
    if (special_begin(TSRV_BACKEND_EPOLL, 0) &&
        tsrv_timer_start(loop, &timer, 1000000, special_sleeper, NULL) == TSRV_OK) {
        k_socketpair(AF_UNIX, SOCK_STREAM, 0, fds);
        k_fcntl(fds[1], F_SETFL, O_NONBLOCK);
        copy = k_fcntl(fds[0], F_DUPFD_CLOEXEC, 100);
        tsrv_server_add_stream(servers[0].server, fds[0]);
        special_turns(2, 10);
        k_send(fds[1], "a", 1, MSG_NOSIGNAL);
        special_turns(2, 10);
        k_send(fds[1], "b", 1, MSG_NOSIGNAL);
        poor = made_poor;
        special_turns(2, 200);
        poor = false;
        special_turns(2, 200);
        k_close(copy);
        k_close(fds[1]);
        k_socketpair(AF_UNIX, SOCK_STREAM, 0, fds); /* and the set built anew works */
        special_open++;
        if (tsrv_server_add_stream(servers[0].server, fds[0]) < 0) {
            special_open--;
        }
        s_plan = NULL;
        special_turns(3, 200);
        k_send(fds[1], "c", 1, MSG_NOSIGNAL);
        special_turns(4, 200);
        if (special_open > 0 && !unclean) {
            k_violation("a stream is not heard of in a new set");
        }
        k_close(fds[1]);
        tsrv_timer_stop(&timer);
    }
}

static void special_leak(void)
{
    special_leak_of(false);
}

static void special_leak_poor(void)
{
    special_leak_of(true);
}

/* PROXY headers, in parts. */
static void special_proxy(void)
{
    static const char text[] = "PROXY TCP4 192.0.2.7 192.0.2.8 1000 2000\r\nhello";
    static const unsigned char binary[] = {13,  10, 13, 10, 0, 13, 10, 81, 85, 73, 84, 10, 0x21, 0x11, 0, 19, 192, 0, 2,
                                           7,
                                           192, 0,  2,  8,  3, 232, 7, 208, 4, 0, 4, 'a', 'b', 'c', 'd', 'x'};
    for (int i = 0; i < 2; i++) {
        const char *data = i == 0 ? text : (const char *)binary;
        size_t size = i == 0 ? sizeof text - 1 : sizeof binary;
        int fds[2];
        if (i == 0 && !special_begin(TSRV_BACKEND_POLL, TSRV_PROXY_REQUIRED)) {
            return;
        }
        k_socketpair(AF_UNIX, SOCK_STREAM, 0, fds);
        tsrv_server_add_stream(servers[0].server, fds[0]);
        special_turns(1, 10);
        for (size_t at = 0; at < size; at += 7) {
            k_send(fds[1], data + at, size - at < 7 ? size - at : 7, MSG_NOSIGNAL);
            special_turns(1, 10);
        }
        special_turns(3, 100);
        k_close(fds[1]);
        special_turns(3, 100);
    }
}

/* The backend breaks, and the loop is freed all the same. */
static void special_broken(void)
{
    if (special_begin(TSRV_BACKEND_EPOLL, 0)) {
        tsrv_spawn(loop, special_sleeper, NULL);
        special_turns(1, 0);
        broken = true;
    }
}

static void (*const specials[])(void) = {special_leak, special_leak_poor, special_proxy, special_broken};

enum { SPECIALS = sizeof(specials) / sizeof(specials[0]) };

static void run_special(void (*function)(void))
{
    script_at = script_size = 0;
    reset();
    k_choose = NULL;
    k_waits = wait_begins;
    s_moves = happened;
    s_calls = every_call;
    tsrv_set_log(forget_log, NULL);
    broken = false;
    loop = NULL;
    function();
    freeing = true;
    if (servers[0].server != NULL) {
        if (!broken) {
            s_plan = s_plan == NULL ? NULL : table_plan;
        }
        tsrv_server_free(servers[0].server);
        servers[0].server = NULL;
    }
    if (loop != NULL) {
        tsrv_loop_free(loop);
        loop = NULL;
    }
    broken = false;
    if (s_live != 0 || k_open_count() != 3) {
        k_violation("%ld allocations and %d descriptors are left", s_live, k_open_count() - 3);
    }
}

static void run_scenario(const way *w)
{
    uint8_t bytes[BYTES];
    size_t size = scenario_bytes(w->scenario, bytes);
    detour = w->detour;
    calls_there = calls_second = failures = 0;
    s_plan = table_plan;
    if (detour >= SPECIAL) {
        run_special(specials[detour - SPECIAL]);
    } else {
        d_run(bytes, size);
    }
}

/* The first scenarios that reach a site, and those that do so most often, within what can be tried call by call. */
static void keep_way(row *r, const way *w)
{
    way *fewest = &r->ways[RUNS_OF_CELL / 2];
    if (r->way_count < RUNS_OF_CELL) {
        r->ways[r->way_count++] = *w;
        return;
    }
    for (int i = RUNS_OF_CELL / 2 + 1; i < RUNS_OF_CELL; i++) {
        fewest = r->ways[i].calls < fewest->calls ? &r->ways[i] : fewest;
    }
    if (w->calls > fewest->calls && w->calls <= EVERY) {
        *fewest = *w;
    }
}

/* Learn which sites a scenario reaches. */
static void look_at(unsigned scenario, unsigned through)
{
    way w = {(unsigned short)scenario, (unsigned short)through, 0};
    for (int n = 0; n < site_count; n++) {
        __start_s_sites[n].calls = 0;
    }
    table->at_row = -1;
    table->at_way = (int)(through * 100000 + scenario);
    run_scenario(&w);
    table->runs++;
    for (int n = 0; n < site_count; n++) {
        row *r = &table->rows[n];
        w.calls = (unsigned)__start_s_sites[n].calls;
        if (w.calls != 0) {
            keep_way(r, &w);
        }
    }
}

static void look(unsigned scenarios)
{
    for (unsigned d = 0; d < DETOURS; d++) {
        for (unsigned i = 0; i < (d == 0 ? scenarios : scenarios / 8); i++) {
            look_at(i, d);
        }
    }
    for (unsigned i = 0; i < SPECIALS; i++) {
        look_at(0, SPECIAL + i);
    }
}

/* ---- cells --------------------------------------------------------------------------------*/

static bool is_row(const s_site *site)
{
    return s_class_of(strcmp(site->name, "kevent") == 0 && strcmp(site->function, "tsrvi_kqueue_set") == 0
                          ? "kevent_set"
                          : site->name) != NULL;
}

static const s_class *class_of(const s_site *site)
{
    return s_class_of(strcmp(site->name, "kevent") == 0 && strcmp(site->function, "tsrvi_kqueue_set") == 0
                          ? "kevent_set"
                          : site->name);
}

/* Can this place have this code? */
static bool is_cell(const s_site *site, int code)
{
    bool moves = strcmp(site->function, "tsrvi_fd_move") == 0 || strcmp(site->function, "tsrvi_sendfile_queue") == 0;
    if (strcmp(site->name, "fcntl") == 0 && code == EMFILE) {
        return moves; /* F_DUPFD only */
    }
    return !(strcmp(site->name, "shutdown") == 0 && code == EINVAL);
}

/* One run of a cell: the call-th call of its site fails in the scenario. */
static void run_cell(int n, int code_index, int mode, int way_index, unsigned call)
{
    row *r = &table->rows[n];
    table->at_row = n, table->at_code = code_index, table->at_mode = mode, table->at_way = way_index;
    table->at_call = call;
    bad_site = &__start_s_sites[n];
    bad_code = class_of(bad_site)->codes[code_index];
    bad_sticky = mode == 1;
    bad_call = call;
    run_scenario(&r->ways[way_index]);
    r->done[mode][code_index] += failures != 0;
    table->runs++;
    bad_site = NULL;
}

/* The next of the calls that are tried: every one in some scenarios, else the first, a middle one and the last. */
static unsigned next_call(const way *w, int way_index, int mode, unsigned call)
{
    unsigned most = w->calls < EVERY ? w->calls : EVERY;
    if (mode == 1) { /* from then on */
        return call == 0 ? 1 : call == 1 && w->calls > 3 ? w->calls / 2 : 0;
    }
    if (way_index % 2 == 1 || way_index >= RUNS_OF_CELL / 2) {
        return call < most ? call + 1 : call < w->calls ? w->calls : 0;
    }
    return call == 0 ? 1 : call == 1 && w->calls > 2 ? w->calls / 2 + 1 : call < w->calls ? w->calls : 0;
}

/* All runs of one cell that are left. */
static void run_ways(int n, int i, int m, int w, unsigned call)
{
    const row *r = &table->rows[n];
    if (!is_cell(&__start_s_sites[n], class_of(&__start_s_sites[n])->codes[i])) {
        return;
    }
    for (; w < r->way_count; w++, call = 0) {
        while ((call = next_call(&r->ways[w], w, m, call)) != 0) {
            run_cell(n, i, m, w, call);
        }
    }
}

/* All cells from the run where an earlier child has stopped. */
static void run_cells(const char *only)
{
    int first = table->at_row, code = table->at_code, mode = table->at_mode, way_at = table->at_way;
    unsigned call = table->at_call;
    for (int n = first < 0 ? 0 : first; n < site_count; n++) {
        const s_site *site = &__start_s_sites[n];
        if (!is_row(site) || (only != NULL && strcmp(only, site->function) != 0)) {
            continue;
        }
        for (int i = n == first ? code : 0; i < s_code_count(class_of(site)); i++) {
            for (int m = n == first && i == code ? mode : 0; m < 2; m++) {
                bool goes_on = n == first && i == code && m == mode;
                run_ways(n, i, m, goes_on ? way_at : 0, goes_on ? call : 0);
            }
        }
    }
    table->at_row = site_count;
}

/* ---- pairs --------------------------------------------------------------------------------*/

/* Learn how often a run calls at each place. */
static void count_calls(const way *w, unsigned *calls)
{
    for (int n = 0; n < site_count; n++) {
        __start_s_sites[n].calls = 0;
    }
    run_scenario(w);
    for (int n = 0; n < site_count; n++) {
        bool counts = is_row(&__start_s_sites[n]) && table->rows[n].way_count != 0;
        calls[n] = !counts ? 0 : __start_s_sites[n].calls < MOST_OF_PAIR ? (unsigned)__start_s_sites[n].calls : MOST_OF_PAIR;
    }
}

static int nth_code(const s_site *site, unsigned number)
{
    int code = class_of(site)->codes[number % (unsigned)s_code_count(class_of(site))];
    return is_cell(site, code) ? code : class_of(site)->codes[0];
}

/* One call fails; then, in turn, each of those that are still made fails as well. */
static void run_pairs_of(const way *w, int a, unsigned call, double end)
{
    unsigned after[SITES];
    bad_site = &__start_s_sites[a];
    bad_code = nth_code(bad_site, w->scenario + call);
    bad_call = call;
    bad_sticky = false;
    count_calls(w, after);
    for (int b = 0; b < site_count; b++) {
        for (second_call = 1; second_call <= after[b] && p_seconds() < end; second_call++) {
            table->at_row = a, table->at_code = b, table->at_way = (int)w->scenario, table->at_call = call;
            table->at_second = second_call;
            second_site = &__start_s_sites[b];
            second_code = nth_code(second_site, w->scenario + (unsigned)a + second_call);
            run_scenario(w);
            table->pairs += failures > 1;
        }
        second_site = NULL;
    }
    bad_site = NULL;
}

/* In short scenarios every pair of calls that can fail, each with one of its codes. */
static void run_pairs(double end)
{
    unsigned calls[SITES];
    for (unsigned scenario = 0; scenario < 400 && p_seconds() < end; scenario++) {
        way w = {(unsigned short)(scenario * (BYTES - 12) + scenario % 32), 0, 0}; /* 12 to 43 bytes */
        count_calls(&w, calls);
        for (int a = 0; a < site_count; a++) {
            for (unsigned call = 1; call <= calls[a] && p_seconds() < end; call++) {
                run_pairs_of(&w, a, call, end);
            }
        }
    }
}

/* ---- the report ---------------------------------------------------------------------------*/

static const char *code_name(int code)
{
    return code == S_SHORT ? "short" : strerrorname_np(code) != NULL ? strerrorname_np(code) : "EAI";
}

static const char *reason_of(const s_site *site)
{
    for (size_t i = 0; i < sizeof elsewhere / sizeof elsewhere[0]; i++) {
        const char *name = elsewhere[i].function;
        size_t size = strlen(name);
        if (name[size - 1] == '*' ? strncmp(site->function, name, size - 1) == 0 : strcmp(site->function, name) == 0) {
            return elsewhere[i].reason;
        }
    }
    return NULL;
}

static void print_row(int n, const s_site *site, const s_class *class)
{
    printf("%s in %s:%d:", site->name, site->function, site->line);
    for (int i = 0; class->codes[i] != 0 && i < S_CODES; i++) {
        if (is_cell(site, class->codes[i])) {
            printf(" %s %u+%u", code_name(class->codes[i]), table->rows[n].done[0][i], table->rows[n].done[1][i]);
        }
    }
    printf("\n");
}

static int report(void)
{
    int rows = 0, cells = 0, empty = 0, bad = 0, left = 0;
    for (int n = 0; n < site_count; n++) {
        const s_site *site = &__start_s_sites[n];
        const s_class *class = class_of(site);
        bool is_empty = false;
        if (class == NULL) {
            continue;
        }
        if (table->rows[n].way_count == 0 && reason_of(site) != NULL) {
            left++;
            if (verbose) {
                printf("elsewhere: %s in %s:%d: %s\n", site->name, site->function, site->line, reason_of(site));
            }
            continue;
        }
        rows++;
        for (int i = 0; i < s_code_count(class); i++) {
            for (int m = 0; m < 2 && is_cell(site, class->codes[i]); m++) {
                cells++;
                bad += table->rows[n].bad[m][i] != 0;
                is_empty = is_empty || table->rows[n].done[m][i] == 0;
                empty += table->rows[n].done[m][i] == 0;
            }
        }
        if (is_empty || verbose) {
            printf(is_empty ? "EMPTY " : "");
            print_row(n, site, class);
        }
    }
    printf("%d places, %d cells, of which %d failed and %d are empty; %d places are tested elsewhere; %ld runs\n", rows,
           cells, bad, empty, left, table->runs);
    printf("%d passed, %d failed, 0 skipped\n", cells - bad - empty, bad + empty);
    return bad + empty != 0;
}

/* A cell's run has ended badly. */
static void note_failure(const char *output)
{
    const s_site *site = &__start_s_sites[table->at_row < 0 ? 0 : table->at_row];
    const char *line = strstr(output, "VIOLATION: ");
    const way *w = table->at_row < 0 ? NULL : &table->rows[table->at_row].ways[table->at_way];
    line = line != NULL ? line : strstr(output, "Assertion");
    line = line != NULL ? line : strstr(output, "ERROR: ");
    if (w == NULL) {
        printf("FAIL scenario %d, without a fault: %.*s\n", table->at_way, line == NULL ? 10 : (int)strcspn(line, "\n"),
               line == NULL ? "no message" : line);
        exit(1);
    }
    table->rows[table->at_row].bad[table->at_mode][table->at_code]++;
    printf("FAIL %s in %s:%d, %s%s (scenario %u, detour %u, call %u): %.*s\n", site->name, site->function, site->line,
           code_name(class_of(site)->codes[table->at_code]), table->at_mode != 0 ? " from then on" : "", w->scenario,
           w->detour, table->at_call, line == NULL ? 20 : (int)strcspn(line, "\n"), line == NULL ? output : line);
}

int main(int argc, char **argv)
{
    static char output[20000];
    unsigned scenarios = SCENARIOS;
    const char *only = NULL;
    double pairs = 0; /* seconds */
    int bad = 0, rc;
    p_child child;
    table = (shared *)p_shared(sizeof *table);
    site_count = (int)(__stop_s_sites - __start_s_sites);
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--scenarios") == 0 && i + 1 < argc) {
            scenarios = (unsigned)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--site") == 0 && i + 1 < argc) {
            only = argv[++i];
        } else if (strcmp(argv[i], "--pairs") == 0 && i + 1 < argc) {
            pairs = strtod(argv[++i], NULL);
        } else if (strcmp(argv[i], "--verbose") == 0) {
            verbose = true;
        } else {
            printf("%s [--scenarios N] [--pairs SECONDS] [--site FUNCTION] [--verbose]\n", argv[0]);
            return 2;
        }
    }
    if (p_fork(&child)) {
        p_limit(300);
        look(scenarios);
        p_leave();
    }
    if (!p_await(&child, output, sizeof output)) {
        table->at_row = -1;
        note_failure(output);
    }
    table->at_row = -1;
    while (table->at_row < site_count && bad < 200) {
        if (p_fork(&child)) {
            p_limit(600);
            run_cells(only);
            p_leave();
        }
        if (!p_await(&child, output, sizeof output)) {
            note_failure(output);
            bad++;
        }
    }
    if (pairs > 0 && p_fork(&child)) {
        p_limit(600 + (unsigned)pairs);
        run_pairs(p_seconds() + pairs);
        p_leave();
    }
    if (pairs > 0 && !p_await(&child, output, sizeof output)) {
        const char *line = strstr(output, "VIOLATION: ");
        printf("FAIL pair: call %u of %s:%d, call %u of %s:%d, scenario %d: %s\n", table->at_call,
               __start_s_sites[table->at_row].function, __start_s_sites[table->at_row].line, table->at_second,
               __start_s_sites[table->at_code].function, __start_s_sites[table->at_code].line, table->at_way,
               line == NULL ? output : line);
        bad++;
    } else if (pairs > 0) {
        printf("%ld pairs of failing calls\n", table->pairs);
    }
    rc = report();
    return rc != 0 || bad != 0;
}
