/* The example programs as a user runs them: started with a port, driven over raw sockets, and
 * stopped by a signal. EXAMPLES names the directory of the built programs. */
#include "test.h"

#include <dirent.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/un.h>

/* Examples whose handlers do in both modes: see callback.h. */
#define TEST_MODES(name) T_TEST(name, T_COROUTINES | T_CALLBACKS)

#define ATTEMPTS 10             /* ports to try: another process may take a free one first */
#define CANNOT_RUN 126          /* what a child that cannot become the program ends with */
#define MAX_ECHO (1024 * 1024)  /* the longest line of the echo servers, its newline included */
#define TOO_LONG (2 * MAX_ECHO) /* far behind it */
#define MAX_CHAT 512            /* the longest line of the chat, its newline included */
#define MAX_NICK 31

/* ---- programs -----------------------------------------------------------------------------*/

typedef struct program {
    const char *name;
    int port;
    pid_t pid;
    int output; /* where its stdout comes out */
} program;

/* Waits until the program has ended. Returns its wait status. */
static int end_of(program *p)
{
    int status = 0;
    pid_t pid;
    do {
        pid = waitpid(p->pid, &status, 0);
    } while (pid < 0 && errno == EINTR);
    CHECK_INT(pid, p->pid);
    t_close(p->output);
    p->pid = 0;
    return status;
}

/* Starts the program on p->port. Returns whether it listens; if not, it has ended with status. */
static bool try_start(program *p, int *status)
{
    const char *directory = getenv("EXAMPLES");
    char path[4096], port[16], line[256], expected[256];
    int fds[2];
    snprintf(path, sizeof path, "%s/%s%s", directory != NULL ? directory : "build/cc-c99",
             t_mode == TSRV_CALLBACK ? "callback_" : "", p->name);
    if (access(path, X_OK) != 0) {
        SKIP("the built examples (make examples, and EXAMPLES=directory)");
    }
    snprintf(port, sizeof port, "%d", p->port);
    CHECK(pipe(fds) == 0);
    p->pid = fork();
    CHECK(p->pid >= 0);
    if (p->pid == 0) {
        dup2(fds[1], 1);
        close(fds[0]);
        close(fds[1]);
        execl(path, path, port, (char *)NULL);
        _exit(CANNOT_RUN);
    }
    close(fds[1]);
    p->output = fds[0];
    if (!t_read_line(p->output, line, sizeof line)) {
        *status = end_of(p);
        CHECK_STR(line, "");
        /* A program of another processor, while the tests themselves run in an emulator. */
        if (WIFEXITED(*status) && WEXITSTATUS(*status) == CANNOT_RUN) {
            SKIP("a kernel that runs the built examples (binfmt_misc)");
        }
        return false;
    }
    snprintf(expected, sizeof expected, "%s: listening on port %d", p->name, p->port);
    CHECK_STR(line, expected);
    return true;
}

static program start(const char *name)
{
    program p = {name, 0, 0, -1};
    for (int i = 0; i < ATTEMPTS; i++) {
        int status = 0;
        p.port = t_free_port();
        if (try_start(&p, &status)) {
            return p;
        }
        /* 1 is what the examples return when the port is taken; anything else is a crash. */
        CHECK(WIFEXITED(status));
        CHECK_INT(WEXITSTATUS(status), 1);
    }
    T_FAIL("%s did not listen on any of %d ports", name, ATTEMPTS);
}

/* Ends the program, which must have lived until now and have printed nothing more. */
static void stop(program *p)
{
    char more[256];
    CHECK(kill(p->pid, SIGTERM) == 0);
    CHECK(!t_read_line(p->output, more, sizeof more));
    CHECK_STR(more, "");
    int status = end_of(p);
    CHECK(WIFSIGNALED(status));
    CHECK_INT(WTERMSIG(status), SIGTERM);
}

/* Where the built examples are; tests may make files there. */
static const char *examples(void)
{
    const char *directory = getenv("EXAMPLES");
    return directory != NULL ? directory : "build/cc-c99";
}

/* What the names of the built programs begin with, for one that was built in another way. */
static const char *variant = "";

/* Starts a program with up to three arguments and its stdin, -1 for ours. Returns it, and in line
 * what it says it listens on. */
static program launch(const char *name, const char *const *arguments, int input, char *line,
                      size_t capacity)
{
    program p = {name, 0, 0, -1};
    char path[4096], text[512];
    int fds[2], status;
    size_t prefix = strlen(name) + strlen(": listening on ");
    snprintf(path, sizeof path, "%s/%s%s%s", examples(), variant,
             t_mode == TSRV_CALLBACK ? "callback_" : "", name);
    if (access(path, X_OK) != 0) {
        SKIP("the built examples (make examples, and EXAMPLES=directory)");
    }
    CHECK(pipe(fds) == 0);
    p.pid = fork();
    CHECK(p.pid >= 0);
    if (p.pid == 0) {
        dup2(fds[1], 1);
        close(fds[0]);
        close(fds[1]);
        if (input >= 0) {
            dup2(input, 0);
            close(input);
        }
        execl(path, path, arguments[0], arguments[1], arguments[2], (char *)NULL);
        _exit(CANNOT_RUN);
    }
    close(fds[1]);
    p.output = fds[0];
    if (!t_read_line(p.output, text, sizeof text)) {
        status = end_of(&p);
        if (WIFEXITED(status) && WEXITSTATUS(status) == CANNOT_RUN) {
            SKIP("a kernel that runs the built examples (binfmt_misc)");
        }
        T_FAIL("%s ended with status %#x", name, (unsigned)status);
    }
    CHECK(strlen(text) > prefix);
    snprintf(line, capacity, "%s", text + prefix);
    text[prefix] = 0;
    CHECK(strncmp(text, name, strlen(name)) == 0);
    CHECK_STR(text + strlen(name), ": listening on ");
    return p;
}

/* Starts a program on a port of the kernel's choice. */
static program start_with(const char *name, const char *second, const char *third)
{
    const char *arguments[3] = {"0", second, third};
    char line[512];
    program p = launch(name, arguments, -1, line, sizeof line);
    CHECK_INT(sscanf(line, "port %d", &p.port), 1);
    CHECK(p.port > 0);
    return p;
}

static void send_signal(program *p, int signo)
{
    CHECK(kill(p->pid, signo) == 0);
}

/* The program must end by itself, in good order, and say nothing more. */
static void expect_end(program *p)
{
    char more[256];
    CHECK(!t_read_line(p->output, more, sizeof more));
    CHECK_STR(more, "");
    int status = end_of(p);
    CHECK(WIFEXITED(status));
    CHECK_INT(WEXITSTATUS(status), 0);
}

static void expect_output(program *p, const char *expected)
{
    char line[2048];
    CHECK(t_read_line(p->output, line, sizeof line));
    CHECK_STR(line, expected);
}

/* ---- clients ------------------------------------------------------------------------------*/

static char *allocate(size_t size)
{
    char *memory = (char *)malloc(size);
    CHECK(memory != NULL);
    return memory;
}

/* Sends without waiting for room and receives meanwhile, so that neither side can block the other;
 * ends the output, and returns how much came until the end of the input. */
static size_t exchange(int fd, const char *out, size_t out_size, char *in, size_t capacity)
{
    size_t sent = 0, received = 0;
    for (;;) {
        struct pollfd ready = {fd, POLLIN, 0};
        ssize_t n;
        if (sent < out_size) {
            ready.events = POLLIN | POLLOUT;
        }
        if (poll(&ready, 1, t_patience_ms()) != 1) {
            T_FAIL("stuck after %zu of %zu bytes sent, %zu received", sent, out_size, received);
        }
        if (ready.revents & POLLOUT) {
            n = send(fd, out + sent, out_size - sent, T_NOSIGNAL | MSG_DONTWAIT);
            CHECK(n >= 0 || errno == EAGAIN || errno == EINTR);
            sent += n > 0 ? (size_t)n : 0;
            if (n > 0 && sent == out_size) {
                t_shut(fd);
            }
        }
        if (ready.revents & (POLLIN | POLLHUP | POLLERR)) {
            CHECK(received < capacity);
            n = recv(fd, in + received, capacity - received, MSG_DONTWAIT);
            CHECK(n >= 0 || errno == EAGAIN || errno == EINTR);
            if (n == 0) {
                CHECK_INT(sent, out_size);
                return received;
            }
            received += n > 0 ? (size_t)n : 0;
        }
    }
}

/* ---- echo, echo_callback ------------------------------------------------------------------*/

static void echo_lines(const char *name)
{
    program p = start(name);
    int fd = t_connect(p.port), other = t_connect(p.port);
    char received[64];
    t_echo(fd, "hello\n");
    /* Split: the other connection's round trip makes the pieces arrive one by one. */
    static const char *const pieces[] = {"s", "pl", "it l", "ine"};
    for (size_t i = 0; i < sizeof pieces / sizeof pieces[0]; i++) {
        t_sends(fd, pieces[i]);
        t_echo(other, "meanwhile\n");
        t_expect_silence(fd);
    }
    t_sends(fd, "\n");
    t_expect(fd, "split line\n");
    /* Pipelined, with an empty line, and the last line in two pieces. */
    t_sends(fd, "one\ntwo\n\nthree\r\nfo");
    t_expect(fd, "one\ntwo\n\nthree\r\n");
    t_sends(fd, "ur\n");
    t_expect(fd, "four\n");
    /* Any byte but the newline is data. */
    static const char binary[] = "\0\xff\0\x80 x\n";
    t_send(fd, binary, sizeof binary - 1);
    size_t size = t_recv(fd, received, sizeof binary - 1);
    CHECK_MEM(received, size, binary, sizeof binary - 1);
    t_close(fd);
    t_echo(other, "still here\n");
    t_close(other);
    stop(&p);
}

TEST_ONCE(echo_split_and_pipelined_lines)
{
    echo_lines("echo");
}

TEST_ONCE(echo_callback_split_and_pipelined_lines)
{
    echo_lines("echo_callback");
}

/* Four megabytes of numbered lines, more than all the buffers between both ends; then half a line,
 * which is not an answer's worth. */
static void echo_half_close(const char *name)
{
    const size_t capacity = 4 * 1024 * 1024;
    char *out = allocate(capacity + 64), *in = allocate(capacity + 64);
    size_t size = 0, lines = 0;
    program p = start(name);
    int fd = t_connect(p.port);
    while (size < capacity) {
        size += (size_t)snprintf(out + size, 64, "line %zu %.*s\n", lines, (int)(lines % 40),
                                 "........................................");
        lines++;
    }
    memcpy(out + size, "half", 4);
    size_t received = exchange(fd, out, size + 4, in, capacity + 64);
    CHECK_MEM(in, received, out, size);
    t_close(fd);

    /* Nothing at all is answered by an end, too. */
    fd = t_connect(p.port);
    t_finish(fd);
    stop(&p);
    free(out);
    free(in);
}

TEST_ONCE(echo_half_close_gets_everything)
{
    echo_half_close("echo");
}

TEST_ONCE(echo_callback_half_close_gets_everything)
{
    echo_half_close("echo_callback");
}

static void echo_long_line(const char *name)
{
    char *line = allocate(TOO_LONG), *in = allocate(MAX_ECHO);
    program p = start(name);
    int fd = t_connect(p.port), other = t_connect(p.port);
    memset(line, 'x', TOO_LONG);
    line[MAX_ECHO - 1] = '\n';
    t_send(fd, line, MAX_ECHO);
    size_t received = t_recv(fd, in, MAX_ECHO);
    CHECK_MEM(in, received, line, MAX_ECHO);

    /* What came before the long line is answered, and the rest of it does not cause a reset. */
    line[MAX_ECHO - 1] = 'x';
    t_sends(fd, "before\n");
    t_send(fd, line, TOO_LONG);
    t_expect(fd, "before\n");
    t_leave(fd);

    t_echo(other, "still here\n");
    t_close(other);
    stop(&p);
    free(line);
    free(in);
}

TEST_ONCE(echo_ends_after_a_too_long_line)
{
    echo_long_line("echo");
}

TEST_ONCE(echo_callback_ends_after_a_too_long_line)
{
    echo_long_line("echo_callback");
}

static void echo_many(const char *name)
{
    enum { COUNT = 100 };
    int fds[COUNT];
    char text[64];
    program p = start(name);
    for (int i = 0; i < COUNT; i++) {
        fds[i] = t_connect(p.port);
        snprintf(text, sizeof text, "connection %d", i);
        t_sends(fds[i], text);
    }
    for (int i = COUNT - 1; i >= 0; i--) {
        t_sends(fds[i], " ends\n");
        snprintf(text, sizeof text, "connection %d ends\n", i);
        t_expect(fds[i], text);
    }
    for (int i = 0; i < COUNT; i++) {
        if (i % 2) {
            t_reset(fds[i]);
        } else {
            t_finish(fds[i]);
        }
    }
    stop(&p);
}

TEST_ONCE(echo_many_connections)
{
    echo_many("echo");
}

TEST_ONCE(echo_callback_many_connections)
{
    echo_many("echo_callback");
}

TEST_ONCE(a_taken_port_ends_the_program)
{
    static const char *const names[] = {"echo", "echo_callback", "chat"};
    program first = start("echo");
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        program second = {names[i], first.port, 0, -1};
        int status = 0;
        CHECK(!try_start(&second, &status));
        CHECK(WIFEXITED(status));
        CHECK_INT(WEXITSTATUS(status), 1);
    }
    stop(&first);
}

/* ---- chat ---------------------------------------------------------------------------------*/

/* Joins a room that count others are in. They hear of it, so that it is in when this returns; for
 * the first member its own place in the server's queue sees to that: what it has sent is there
 * before the next one connects. */
static int join(program *p, const char *nick, const int *others, int count)
{
    char text[256];
    int fd = t_connect(p->port);
    t_expect(fd, "your name? ");
    snprintf(text, sizeof text, "%s\n", nick);
    t_sends(fd, text);
    snprintf(text, sizeof text, "%s has joined\n", nick);
    for (int i = 0; i < count; i++) {
        t_expect(others[i], text);
    }
    return fd;
}

TEST_MODES(chat_names_joins_and_leaves)
{
    program p = start("chat");
    int ann = join(&p, "ann", NULL, 0);
    int bob = join(&p, "bob", &ann, 1);
    t_sends(ann, "hello\n");
    t_expect(bob, "ann: hello\n"); /* and not its own joining */
    t_sends(bob, "good morning\r\nannie\n\n");
    t_expect(ann, "bob: good morning\nbob: annie\nbob: \n"); /* and not its own message */

    /* Who has no name yet hears nothing, and is not heard of. */
    int nobody = t_connect(p.port), carl = t_connect(p.port);
    t_expect(nobody, "your name? ");
    t_expect(carl, "your name? ");
    t_sends(ann, "who is there?\n");
    t_expect(bob, "ann: who is there?\n");
    t_finish(nobody);
    t_sends(carl, "\n\r\n\ncarl\r\nme\n");
    t_expect(ann, "carl has joined\ncarl: me\n");
    t_expect(bob, "carl has joined\ncarl: me\n");
    t_sends(bob, "welcome\n");
    t_expect(carl, "bob: welcome\n");
    t_expect(ann, "bob: welcome\n");

    /* A half close, a close and a reset are all heard of. */
    t_finish(carl);
    t_expect(ann, "carl has left\n");
    t_expect(bob, "carl has left\n");
    int both[] = {ann, bob};
    t_close(join(&p, "dora", both, 2));
    t_expect(ann, "dora has left\n");
    t_expect(bob, "dora has left\n");
    t_reset(join(&p, "emil", both, 2));
    t_expect(ann, "emil has left\n");
    t_expect(bob, "emil has left\n");

    /* A name that is too long is cut. */
    char name[65], text[256];
    memset(name, 'n', 64);
    name[64] = 0;
    int fred = t_connect(p.port);
    t_expect(fred, "your name? ");
    t_sends(fred, name);
    t_sends(fred, "\nhi\n");
    snprintf(text, sizeof text, "%.*s has joined\n%.*s: hi\n", MAX_NICK, name, MAX_NICK, name);
    t_expect(ann, text);
    t_expect(bob, text);
    t_finish(fred);
    snprintf(text, sizeof text, "%.*s has left\n", MAX_NICK, name);
    t_expect(ann, text);
    t_expect(bob, text);
    t_finish(ann);
    t_expect(bob, "ann has left\n");
    t_finish(bob);
    stop(&p);
}

/* What a terminal would act on does not come through; letters of any language do. */
TEST_MODES(chat_lets_no_control_characters_through)
{
    program p = start("chat");
    int ann = join(&p, "ann", NULL, 0);
    int eve = t_connect(p.port);
    t_expect(eve, "your name? ");
    t_sends(eve, "e\x1b[2Jve\n\x1b]0;mine\x07 \x7f\tb\xc3\xa9\n");
    t_expect(ann, "e?[2Jve has joined\ne?[2Jve: ?]0;mine? ??b\xc3\xa9\n");
    /* C1 is one in UTF-8, or alone: behind another one, what begins nothing, and a whole letter. */
    t_sends(eve, "\xc2\x9b\x9b\x80\x9b\xff\x9b\xe2\x82\xac\x9b\xe2\x9b\x84\xf0\x9f\x98\x80\n");
    t_expect(ann, "e?[2Jve: \xc2????\xff?\xe2\x82\xac?\xe2\x9b\x84\xf0\x9f\x98\x80\n");
    t_finish(eve);
    t_expect(ann, "e?[2Jve has left\n");
    t_finish(ann);
    stop(&p);
}

/* Each speaks in turn. That the next thing a speaker receives is another's message shows that its
 * own did not come back; the first speaks twice, for the last one's sake. */
TEST_MODES(chat_reaches_all_others)
{
    enum { COUNT = 12 };
    int members[COUNT];
    char text[64];
    program p = start("chat");
    for (int i = 0; i < COUNT; i++) {
        snprintf(text, sizeof text, "m%d", i);
        members[i] = join(&p, text, members, i);
    }
    for (int i = 0; i <= COUNT; i++) {
        snprintf(text, sizeof text, "message %d\n", i);
        t_sends(members[i % COUNT], text);
        snprintf(text, sizeof text, "m%d: message %d\n", i % COUNT, i);
        for (int k = 0; k < COUNT; k++) {
            if (k != i % COUNT) {
                t_expect(members[k], text);
            }
        }
    }
    for (int i = 0; i < COUNT; i++) {
        t_finish(members[i]);
        snprintf(text, sizeof text, "m%d has left\n", i);
        for (int k = i + 1; k < COUNT; k++) {
            t_expect(members[k], text);
        }
    }
    stop(&p);
}

TEST_MODES(chat_too_long_a_line)
{
    char line[4096], text[MAX_CHAT + 64];
    program p = start("chat");
    int ann = join(&p, "ann", NULL, 0);
    memset(line, 'x', sizeof line);

    /* The longest line there can be arrives whole; a byte more is too long, newline or not. */
    static const size_t sizes[] = {MAX_CHAT + 1, MAX_CHAT + 1, sizeof line};
    static const bool ended[] = {true, false, false};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        int bob = join(&p, "bob", &ann, 1);
        line[MAX_CHAT - 1] = '\n';
        t_send(bob, line, MAX_CHAT);
        line[MAX_CHAT - 1] = 'x';
        snprintf(text, sizeof text, "bob: %.*s\n", MAX_CHAT - 1, line);
        t_expect(ann, text);

        line[sizes[i] - 1] = ended[i] ? '\n' : 'x';
        t_send(bob, line, sizes[i]);
        line[sizes[i] - 1] = 'x';
        t_expect(bob, "too long, good bye\n");
        t_leave(bob);
        t_expect(ann, "bob has left\n");
    }

    /* As a name, too: then nobody hears of it. */
    int nobody = t_connect(p.port);
    t_expect(nobody, "your name? ");
    t_send(nobody, line, sizeof line);
    t_expect(nobody, "too long, good bye\n");
    t_leave(nobody);
    int carl = join(&p, "carl", &ann, 1);
    t_finish(carl);
    t_expect(ann, "carl has left\n");
    t_finish(ann);
    stop(&p);
}

/* A client that receives whole lines. */
typedef struct reader {
    int fd;
    size_t at, used;
    char buffer[4096];
    char line[MAX_CHAT + 64];
} reader;

/* Receives a line, and returns it without its newline. */
static const char *read_line(reader *r)
{
    size_t size = 0;
    for (;;) {
        if (r->at == r->used) {
            ssize_t n = recv(r->fd, r->buffer, sizeof r->buffer, 0);
            if (n <= 0) {
                T_FAIL("client: %s instead of a line", n == 0 ? "the end" : strerror(errno));
            }
            r->at = 0;
            r->used = (size_t)n;
        }
        CHECK(size + 1 < sizeof r->line);
        char byte = r->buffer[r->at++];
        r->line[size++] = byte == '\n' ? (char)0 : byte;
        if (byte == '\n') {
            return r->line;
        }
    }
}

/* The speaker goes on until the others hear that the one who never reads has left. How much that
 * takes is for the kernel's buffers to say. Each batch is read before the next, so that nobody else
 * lags behind. */
TEST_MODES(chat_throws_out_who_never_reads)
{
    enum { BATCH = 64, LINE = 500, MOST = 64 * 1024 * 1024 / LINE, LISTENERS = 2 };
    static char batch[BATCH * LINE];
    static reader listeners[LISTENERS];
    int others[LISTENERS + 1], small = 4096;
    char expected[MAX_CHAT + 64], text[64];
    bool gone[LISTENERS] = {false, false}; /* whether they have heard that the sloth left */
    program p = start("chat");
    for (int i = 0; i < LISTENERS; i++) {
        snprintf(text, sizeof text, "listener%d", i);
        listeners[i].fd = others[i] = join(&p, text, others, i);
    }
    int speaker = others[LISTENERS] = join(&p, "speaker", others, LISTENERS);
    int sloth = join(&p, "sloth", others, LISTENERS + 1);
    CHECK(setsockopt(sloth, SOL_SOCKET, SO_RCVBUF, &small, sizeof small) == 0);

    int said = 0;
    while (!gone[0]) {
        if (said >= MOST) {
            T_FAIL("still not thrown out after %d lines", said);
        }
        for (int k = 0; k < BATCH; k++) {
            char *line = batch + k * LINE;
            memset(line, 's', LINE);
            int size = snprintf(line, LINE, "%d ", said + k);
            line[size] = 's'; /* instead of the final 0 */
            line[LINE - 1] = '\n';
        }
        t_send(speaker, batch, sizeof batch);
        for (int i = 0; i < LISTENERS; i++) {
            for (int k = 0; k < BATCH; k++) {
                const char *line = read_line(&listeners[i]);
                if (!gone[i] && strcmp(line, "sloth has left") == 0) {
                    gone[i] = true;
                    line = read_line(&listeners[i]);
                }
                snprintf(expected, sizeof expected, "speaker: %.*s", LINE - 1, batch + k * LINE);
                CHECK_STR(line, expected);
            }
        }
        said += BATCH;
    }
    CHECK(gone[1]); /* one walk told both */
    t_expect(speaker, "sloth has left\n");
    t_expect_reset(sloth);
    t_close(sloth);

    /* The room goes on. */
    t_sends(listeners[0].fd, "finally\n");
    CHECK_STR(read_line(&listeners[1]), "listener0: finally");
    t_expect(speaker, "listener0: finally\n");
    t_finish(speaker);
    for (int i = 0; i < LISTENERS; i++) {
        CHECK_STR(read_line(&listeners[i]), "speaker has left");
        t_close(listeners[i].fd);
    }
    stop(&p);
}

/* ---- proxy --------------------------------------------------------------------------------*/

/* A proxy, what it leads to, and a connection through it: the client's end and the target's. */
typedef struct route {
    program proxy;
    int listener, client, target;
} route;

static void through(route *r)
{
    r->client = t_connect(r->proxy.port);
    struct pollfd ready = {r->listener, POLLIN, 0};
    CHECK_INT(poll(&ready, 1, t_patience_ms()), 1);
    r->target = accept(r->listener, NULL, NULL);
    CHECK(r->target >= 0);
    t_prepare(r->target);
}

static route start_proxy(void)
{
    route r;
    char port[16];
    int own_port;
    r.listener = t_raw_socket(SOCK_STREAM, true, &own_port);
    CHECK(fcntl(r.listener, F_SETFD, FD_CLOEXEC) == 0); /* not the proxy's */
    snprintf(port, sizeof port, "%d", own_port);
    r.proxy = start_with("proxy", "127.0.0.1", port);
    through(&r);
    return r;
}

static void stop_proxy(route *r)
{
    t_close(r->listener);
    stop(&r->proxy);
}

/* A stream of bytes that does not repeat in step with any buffer. */
enum { PATTERN = 65521 };
static char pattern[2 * PATTERN];

static void make_pattern(void)
{
    unsigned seed = 1;
    for (int i = 0; i < PATTERN; i++) {
        seed = seed * 1103515245 + 12345;
        pattern[i] = pattern[i + PATTERN] = (char)(seed >> 16);
    }
}

/* Sends what the socket takes of the pattern's first total bytes. Returns how many are sent. */
static size_t push(int fd, size_t sent, size_t total)
{
    size_t size = total - sent < PATTERN ? total - sent : PATTERN;
    ssize_t n = send(fd, pattern + sent % PATTERN, size, T_NOSIGNAL | MSG_DONTWAIT);
    CHECK(n >= 0 || errno == EAGAIN || errno == EINTR);
    return sent + (n > 0 ? (size_t)n : 0);
}

/* Receives what is there, which has to go on with the pattern. */
static size_t pull(int fd, size_t received)
{
    static char buffer[PATTERN];
    ssize_t n = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT);
    CHECK(n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR)));
    if (n > 0) {
        CHECK_MEM(buffer, (size_t)n, pattern + received % PATTERN, (size_t)n);
    }
    return received + (n > 0 ? (size_t)n : 0);
}

/* Sends total bytes each way at once, of which sent have gone from a to b already. */
static void push_and_pull(int a, int b, size_t sent, size_t total)
{
    size_t sent_a = sent, sent_b = 0, received_a = 0, received_b = 0;
    while (received_a < total || received_b < total) {
        struct pollfd fds[2] = {{a, POLLIN, 0}, {b, POLLIN, 0}};
        fds[0].events = sent_a < total ? POLLIN | POLLOUT : POLLIN;
        fds[1].events = sent_b < total ? POLLIN | POLLOUT : POLLIN;
        if (poll(fds, 2, t_patience_ms()) < 1) {
            T_FAIL("stuck: %zu of %zu, and %zu of %zu came", received_b, sent_a, received_a,
                   sent_b);
        }
        sent_a = fds[0].revents & POLLOUT ? push(a, sent_a, total) : sent_a;
        sent_b = fds[1].revents & POLLOUT ? push(b, sent_b, total) : sent_b;
        received_a = fds[0].revents & POLLIN ? pull(a, received_a) : received_a;
        received_b = fds[1].revents & POLLIN ? pull(b, received_b) : received_b;
    }
}

/* The kernel's buffers on the way hold some 20 MiB. When a sender waits although its receiver is
 * only slow to be scheduled, the test is weaker, but does not fail. */
TEST_ONCE(proxy_slows_the_sender_down_and_loses_nothing)
{
    enum { TOTAL = 64 * 1024 * 1024, HELD = 48 * 1024 * 1024, WAIT = 300 };
    route r = start_proxy();
    struct pollfd room = {r.client, POLLOUT, 0};
    size_t sent = 0;
    make_pattern();
    while (sent < TOTAL && poll(&room, 1, WAIT) == 1) {
        sent = push(r.client, sent, TOTAL);
    }
    if (sent > HELD) {
        T_FAIL("the proxy took %zu bytes for a target that reads nothing", sent);
    }
    /* The other direction is not held up by this one. */
    t_sends(r.target, "meanwhile");
    t_expect(r.client, "meanwhile");
    push_and_pull(r.client, r.target, sent, TOTAL);
    t_shut(r.client);
    t_leave(r.target);
    t_leave(r.client);
    stop_proxy(&r);
}

TEST_ONCE(proxy_passes_each_end_on)
{
    route r = start_proxy();
    t_sends(r.client, "question");
    t_shut(r.client);
    t_expect(r.target, "question");
    t_expect_eof(r.target);
    t_sends(r.target, "answer");
    t_expect(r.client, "answer");
    t_sends(r.target, "more");
    t_close(r.target);
    t_expect(r.client, "more");
    t_leave(r.client);

    through(&r);
    t_sends(r.target, "greeting");
    t_shut(r.target);
    t_expect(r.client, "greeting");
    t_expect_eof(r.client);
    t_sends(r.client, "late");
    t_expect(r.target, "late");
    t_sends(r.client, "later");
    t_close(r.client);
    t_expect(r.target, "later");
    t_leave(r.target);
    stop_proxy(&r);
}

TEST_ONCE(proxy_passes_a_reset_on)
{
    route r = start_proxy();
    t_sends(r.client, "x");
    t_expect(r.target, "x");
    t_reset(r.client);
    t_expect_reset(r.target);
    t_close(r.target);

    through(&r);
    t_sends(r.target, "y");
    t_expect(r.client, "y");
    t_reset(r.target);
    t_expect_reset(r.client);
    t_close(r.client);

    /* Also after one direction has ended, whoever resets. */
    through(&r);
    t_shut(r.client);
    t_expect_eof(r.target);
    t_reset(r.target);
    t_expect_reset(r.client);
    t_close(r.client);
    through(&r);
    t_shut(r.target);
    t_expect_eof(r.client);
    t_reset(r.client);
    t_expect_reset(r.target);
    t_close(r.target);
    stop_proxy(&r);
}

/* A reset behind the end of the input: recv goes on to tell of the end, but poll knows it. */
static void expect_broken(int fd)
{
    struct pollfd broken = {fd, 0, 0};
    CHECK_INT(poll(&broken, 1, t_patience_ms()), 1);
    CHECK((broken.revents & (POLLERR | POLLHUP)) != 0);
}

/* The side that has ended its output, and from which nobody reads any more, resets. */
TEST_ONCE(proxy_passes_a_reset_on_behind_an_end)
{
    route r = start_proxy();
    t_shut(r.client);
    t_expect_eof(r.target);
    t_reset(r.client);
    expect_broken(r.target);
    t_close(r.target);

    through(&r);
    t_shut(r.target);
    t_expect_eof(r.client);
    t_reset(r.target);
    expect_broken(r.client);
    t_close(r.client);
    stop_proxy(&r);
}

TEST_ONCE(proxy_without_a_target_resets)
{
    route r = start_proxy();
    t_close(r.listener);
    for (int i = 0; i < 3; i++) {
        int fd = t_connect(r.proxy.port);
        t_expect_reset(fd);
        t_close(fd);
    }
    /* The tunnel that was there goes on. */
    t_sends(r.client, "still here");
    t_expect(r.target, "still here");
    t_close(r.client);
    t_leave(r.target);
    stop(&r.proxy);
}

/* ---- smtp ---------------------------------------------------------------------------------*/

/* What is sent, and what comes back for it. */
typedef struct exchange_step {
    const char *send, *expect;
} exchange_step;

static void play(int fd, const exchange_step *steps, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        t_sends(fd, steps[i].send);
        t_expect(fd, steps[i].expect);
    }
}

#define PLAY(fd, steps) play((fd), (steps), sizeof(steps) / sizeof((steps)[0]))

TEST_MODES(smtp_takes_a_mail)
{
    static const exchange_step steps[] = {
        {"", "220 ready\r\n"},
        {"what is this\r\n", "500 what?\r\n"},
        {"DATA\r\n", "503 not now\r\n"},
        {"RCPT TO:<b@example.org>\r\n", "503 not now\r\n"},
        {"ehlo client\r\n", "250 hello\r\n"},
        {"MAIL FROM:<x@example.org>\r\n", "250 ok\r\n"},
        {"RSET\r\n", "250 ok\r\n"},
        {"RCPT TO:<b@example.org>\r\n", "503 not now\r\n"},
        {"mail from:<a@example.org>\r\n", "250 ok\r\n"},
        {"MAIL FROM:<x@example.org>\r\n", "503 not now\r\n"},
        {"NOOP\r\n", "250 ok\r\n"},
        {"VRFY root\r\n", "252 try it\r\n"},
        {"DATA\r\n", "503 not now\r\n"},
        {"RCPT TO:<b@example.org>\r\n", "250 ok\r\n"},
        {"DATA\r\n", "354 go on\r\n"},
        {"Subject: dots\r\n\r\nQUIT\r\n..one\r\n...two\r\n..\r\nthe. end\r\n.\r\n",
         "250 thank you\r\n"},
        /* Another one in one piece. */
        {"MAIL FROM:<a>\r\nRCPT TO:<b>\r\nRCPT TO:<c>\r\nDATA\r\nagain\r\n.\r\nQUIT\r\n",
         "250 ok\r\n250 ok\r\n250 ok\r\n354 go on\r\n250 thank you\r\n221 bye\r\n"},
    };
    static const char *const printed[] = {"Subject: dots\r", "\r",         "QUIT\r",  ".one\r",
                                          "..two\r",         ".\r",        "the. end\r",
                                          "again\r"};
    program p = start_with("smtp", NULL, NULL);
    int fd = t_connect(p.port);
    PLAY(fd, steps);
    t_leave(fd);
    for (size_t i = 0; i < sizeof printed / sizeof printed[0]; i++) {
        expect_output(&p, printed[i]);
    }
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

static const exchange_step to_data[] = {{"MAIL FROM:<a>\r\n", "250 ok\r\n"},
                                        {"RCPT TO:<b>\r\n", "250 ok\r\n"},
                                        {"DATA\r\n", "354 go on\r\n"}};

/* Two mails come line by line, in turn: each is printed in one piece. */
TEST_MODES(smtp_does_not_mix_mails)
{
    program p = start_with("smtp", NULL, NULL);
    int first = t_connect(p.port), second = t_connect(p.port), other = t_connect(p.port);
    t_expect(first, "220 ready\r\n");
    t_expect(second, "220 ready\r\n");
    t_expect(other, "220 ready\r\n");
    PLAY(first, to_data);
    PLAY(second, to_data);
    for (int i = 0; i < 3; i++) {
        t_sends(i % 2 ? second : first, "a line\r\n");
        t_sends(i % 2 ? first : second, "another\r\n");
        t_sends(other, "NOOP\r\n");
        t_expect(other, "250 ok\r\n");
    }
    t_sends(second, "end of the second\r\n.\r\n");
    t_expect(second, "250 thank you\r\n");
    t_sends(first, "end of the first\r\n.\r\n");
    t_expect(first, "250 thank you\r\n");
    static const char *const printed[] = {"another\r", "a line\r",
                                          "another\r", "end of the second\r",
                                          "a line\r",  "another\r",
                                          "a line\r",  "end of the first\r"};
    for (size_t i = 0; i < sizeof printed / sizeof printed[0]; i++) {
        expect_output(&p, printed[i]);
    }
    t_close(first);
    t_close(second);
    t_close(other);
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

/* A mail of 1 MiB is taken, more is not, and the connection goes on. */
TEST_MODES(smtp_refuses_too_large_a_mail)
{
    enum { MOST = 1024 * 1024, LINE = 512 };
    char *text = allocate(MOST + LINE), line[LINE];
    program p = start_with("smtp", NULL, NULL);
    int fd = t_connect(p.port);
    memset(line, 'x', LINE);
    memcpy(line + LINE - 2, "\r\n", 2);
    for (int i = 0; i <= MOST / LINE; i++) {
        memcpy(text + i * LINE, line, LINE);
    }
    t_expect(fd, "220 ready\r\n");
    PLAY(fd, to_data);
    t_send(fd, text, MOST + LINE);
    t_sends(fd, ".\r\n");
    t_expect(fd, "552 too much mail\r\n");
    PLAY(fd, to_data);
    t_send(fd, text, MOST);
    t_sends(fd, ".\r\n");
    for (size_t at = 0; at < MOST;) {
        ssize_t n = read(p.output, text, LINE - at % LINE);
        CHECK(n > 0);
        CHECK_MEM(text, (size_t)n, line + at % LINE, (size_t)n);
        at += (size_t)n;
    }
    t_expect(fd, "250 thank you\r\n");
    t_close(fd);
    free(text);
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

/* Neither is acknowledged, and the server lives on until it is told to end. */
static void lose_two_mails(program *p, int fd)
{
    for (int i = 0; i < 2; i++) {
        PLAY(fd, to_data);
        t_sends(fd, "lost\r\n.\r\n");
        t_expect(fd, "451 cannot keep it\r\n");
    }
    t_close(fd);
    send_signal(p, SIGTERM);
    int status = end_of(p);
    CHECK(WIFEXITED(status));
    CHECK_INT(WEXITSTATUS(status), 0);
}

/* What cannot be printed is not acknowledged, and the server lives on. */
TEST_MODES(smtp_does_not_acknowledge_what_is_lost)
{
    program p = start_with("smtp", NULL, NULL);
    int fd = t_connect(p.port), null = open("/dev/null", O_RDONLY);
    t_expect(fd, "220 ready\r\n");
    CHECK(null >= 0 && dup2(null, p.output) == p.output); /* nobody reads what it prints */
    t_close(null);
    lose_two_mails(&p, fd);
}

#ifdef __linux__
/* Starts smtp with its stdout in a file, which is gone from the directory when this returns, and in
 * p.output. Waits until it listens. */
static program start_smtp_into_file(void)
{
    program p = {"smtp", 0, 0, -1};
    char path[4096], name[4096], text[64] = "";
    snprintf(path, sizeof path, "%s/%ssmtp", examples(), t_mode == TSRV_CALLBACK ? "callback_" : "");
    snprintf(name, sizeof name, "%s/smtp.XXXXXX", examples());
    if (access(path, X_OK) != 0) {
        SKIP("the built examples (make examples, and EXAMPLES=directory)");
    }
    p.output = mkstemp(name);
    CHECK(p.output >= 0 && unlink(name) == 0);
    p.pid = fork();
    CHECK(p.pid >= 0);
    if (p.pid == 0) {
        dup2(p.output, 1);
        close(p.output);
        execl(path, path, "0", (char *)NULL);
        _exit(CANNOT_RUN);
    }
    for (int64_t end = t_patience(); strchr(text, '\n') == NULL;) {
        CHECK(t_now_ms() < end && waitpid(p.pid, NULL, WNOHANG) == 0);
        CHECK(poll(NULL, 0, 1) == 0);
        CHECK(pread(p.output, text, sizeof text - 1, 0) >= 0);
    }
    CHECK_INT(sscanf(text, "smtp: listening on port %d", &p.port), 1);
    return p;
}

/* A file that may not grow any more costs a mail, and not the server: no signal ends that. */
TEST_MODES(smtp_lives_on_when_its_file_has_reached_its_limit)
{
    static const struct rlimit least = {0, 0};
    program p = start_smtp_into_file();
    int fd = t_connect(p.port);
    t_expect(fd, "220 ready\r\n");
    CHECK(prlimit(p.pid, RLIMIT_FSIZE, &least, NULL) == 0);
    lose_two_mails(&p, fd);
}
#endif

TEST_MODES(smtp_too_long_a_line)
{
    enum { MOST = 1000, FAR = 3 * 1024 * 1024 }; /* with CRLF; far behind every buffer */
    char *line = allocate(FAR + 1);
    char text[MOST];
    program p = start_with("smtp", NULL, NULL);
    int fd = t_connect(p.port);
    memset(line, 'x', FAR);
    t_expect(fd, "220 ready\r\n");
    t_send(fd, line, MOST - 2);
    t_sends(fd, "\r\n");
    t_expect(fd, "500 what?\r\n");
    t_send(fd, line, MOST - 1);
    t_sends(fd, "\r\n");
    t_expect(fd, "500 line too long\r\n");
    t_send(fd, line, FAR);
    t_sends(fd, "\r\nNOOP\r\n");
    t_expect(fd, "500 line too long\r\n250 ok\r\n");

    /* Within a mail it spoils the mail, of which the end is still found, and nothing is printed. */
    PLAY(fd, to_data);
    t_sends(fd, "begin\r\n");
    t_send(fd, line, MOST - 1);
    t_sends(fd, "\r\nrest\r\n.\r\n");
    t_expect(fd, "500 line too long\r\n");
    PLAY(fd, to_data);
    t_send(fd, line, MOST - 2);
    t_sends(fd, "\r\n.\r\nQUIT\r\n");
    t_expect(fd, "250 thank you\r\n221 bye\r\n");
    t_expect_eof(fd);
    snprintf(text, sizeof text, "%.*s\r", MOST - 2, line);
    expect_output(&p, text);
    t_close(fd);
    send_signal(&p, SIGTERM);
    expect_end(&p);
    free(line);
}

/* Half a line is as good as none, and what comes in time is answered. */
TEST_MODES(smtp_times_out)
{
    program p = start_with("smtp", "1", NULL);
    int silent = t_connect(p.port), half = t_connect(p.port);
    t_expect(silent, "220 ready\r\n");
    t_expect(half, "220 ready\r\n");
    t_sends(half, "NOOP\r\nNO");
    int64_t begin = t_now_ms();
    t_expect(half, "250 ok\r\n421 good bye\r\n");
    t_expect_eof(half);
    CHECK_NEAR_MS(t_now_ms() - begin, 900, 5000);
    t_expect(silent, "421 good bye\r\n");
    t_expect_eof(silent);
    t_close(half);
    t_close(silent);
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

TEST_MODES(smtp_says_good_bye_when_it_stops)
{
    program p = start_with("smtp", NULL, NULL);
    int idle = t_connect(p.port), busy = t_connect(p.port);
    t_expect(idle, "220 ready\r\n");
    t_expect(busy, "220 ready\r\n");
    PLAY(busy, to_data);
    t_sends(busy, "first\r\nsec");
    t_sends(idle, "NOOP\r\n");
    t_expect(idle, "250 ok\r\n");
    send_signal(&p, SIGTERM);
    t_expect(idle, "421 good bye\r\n");
    t_leave(idle);
    /* A line that has begun is under way. */
    t_sends(busy, "ond\r\n.\r\n");
    t_expect(busy, "250 thank you\r\n421 good bye\r\n");
    t_leave(busy);
    expect_output(&p, "first\r");
    expect_output(&p, "second\r");
    expect_end(&p);
}

/* ---- http ---------------------------------------------------------------------------------*/

enum { BIG = 1024 * 1024 };

typedef struct site {
    program http;
    char directory[512], big_name[600], small_name[600];
    char *big; /* the contents */
} site;

static void make_file(char *name, size_t capacity, const char *directory, const char *base,
                      const char *data, size_t size)
{
    snprintf(name, capacity, "%s/%s", directory, base);
    int fd = open(name, O_WRONLY | O_CREAT | O_EXCL, 0600);
    CHECK(fd >= 0);
    CHECK_INT(write(fd, data, size), size);
    t_close(fd);
}

static site start_http(void)
{
    site s;
    snprintf(s.directory, sizeof s.directory, "%s/http.XXXXXX", examples());
    CHECK(mkdtemp(s.directory) != NULL);
    make_pattern();
    s.big = allocate(BIG);
    for (size_t i = 0; i < BIG; i++) {
        s.big[i] = pattern[i % PATTERN];
    }
    make_file(s.big_name, sizeof s.big_name, s.directory, "big", s.big, BIG);
    make_file(s.small_name, sizeof s.small_name, s.directory, "small.txt", "small\n", 6);
    s.http = start_with("http", s.directory, NULL);
    return s;
}

static void stop_http(site *s)
{
    CHECK(unlink(s->big_name) == 0);
    CHECK(unlink(s->small_name) == 0);
    CHECK(rmdir(s->directory) == 0);
    free(s->big);
    send_signal(&s->http, SIGTERM);
    expect_end(&s->http);
}

#define REPLY(status, size) "HTTP/1.1 " status "\r\nContent-Length: " size "\r\n\r\n"
#define LAST(status, size) \
    "HTTP/1.1 " status "\r\nContent-Length: " size "\r\nConnection: close\r\n\r\n"
#define TOO_LARGE                                        \
    "HTTP/1.1 431 Request Header Fields Too Large\r\n" \
    "Connection: close\r\nContent-Length: 0\r\n\r\n"
#define NOT_ALLOWED "405 Not Allowed\r\nAllow: GET, HEAD"

TEST_MODES(http_keeps_the_connection)
{
    static const char requests[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
                                   "GET /small.txt?query HTTP/1.1\r\nHost: x\r\n\r\n"
                                   "HEAD /small.txt HTTP/1.1\r\nHost: x\r\n\r\n"
                                   "HEAD / HTTP/1.1\r\nHost: x\r\n\r\n"
                                   "GET /none HTTP/1.1\r\nHost: x\r\n\r\n"
                                   "POST / HTTP/1.1\r\nHost: x\r\n\r\n"
                                   "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    static const char replies[] = REPLY("200 OK", "10") "It works.\n"
                                  REPLY("200 OK", "6") "small\n"
                                  REPLY("200 OK", "6")
                                  REPLY("200 OK", "10")
                                  REPLY("404 Not Found", "0")
                                  REPLY(NOT_ALLOWED, "0")
                                  REPLY("200 OK", "10") "It works.\n";
    site s = start_http();
    int fd = t_connect(s.http.port), other = t_connect(s.http.port);
    t_sends(fd, requests);
    t_expect(fd, replies);
    /* The other connection's round trip makes the halves arrive one by one. */
    for (size_t at = 1; at < sizeof requests - 1; at += 7) {
        t_send(fd, requests, at);
        t_sends(other, "HEAD / HTTP/1.1\r\nHost: x\r\n\r\n");
        t_expect(other, REPLY("200 OK", "10"));
        t_sends(fd, requests + at);
        t_expect(fd, replies);
    }
    t_sends(fd, "GET / HTTP/1.1\r\nHost: x\r\nconnection: close\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n");
    t_expect(fd, LAST("200 OK", "10") "It works.\n");
    t_leave(fd);
    t_finish(other);
    stop_http(&s);
}

TEST_MODES(http_sends_a_file_intact)
{
    site s = start_http();
    char *in = allocate(BIG);
    int fd = t_connect(s.http.port);
    t_sends(fd, "HEAD /big HTTP/1.1\r\nHost: x\r\n\r\n"
                "GET /big HTTP/1.1\r\nHost: x\r\n\r\n"
                "GET /big HTTP/1.1\r\nHost: x\r\n\r\n"
                "GET /small.txt HTTP/1.0\r\n\r\n");
    t_expect(fd, REPLY("200 OK", "1048576"));
    for (int i = 0; i < 2; i++) {
        t_expect(fd, REPLY("200 OK", "1048576"));
        size_t received = t_recv(fd, in, BIG);
        CHECK_MEM(in, received, s.big, BIG);
    }
    t_expect(fd, LAST("200 OK", "6") "small\n");
    t_leave(fd);
    free(in);
    stop_http(&s);
}

/* Sends one request, ends the output, and compares all that comes. */
static void expect_reply(const site *s, const char *request, size_t size, const char *expected)
{
    char reply[1024];
    int fd = t_connect(s->http.port);
    t_send(fd, request, size);
    t_shut(fd);
    size_t received = t_recv_all(fd, reply, sizeof reply);
    CHECK_MEM(reply, received, expected, strlen(expected));
    t_close(fd);
}

#ifdef __linux__
/* What cannot be opened for want of a descriptor is not said to be absent. */
TEST_MODES(http_tells_no_file_from_no_descriptor)
{
    struct rlimit few, before;
    site s = start_http();
    int fd = t_connect(s.http.port);
    t_sends(fd, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); /* its connection has one */
    t_expect(fd, REPLY("200 OK", "10") "It works.\n");
    CHECK(prlimit(s.http.pid, RLIMIT_NOFILE, NULL, &before) == 0);
    few = before;
    few.rlim_cur = 3;
    CHECK(prlimit(s.http.pid, RLIMIT_NOFILE, &few, NULL) == 0);
    t_sends(fd, "GET /small.txt HTTP/1.1\r\nHost: x\r\n\r\nGET /../http HTTP/1.1\r\nHost: x\r\n\r\n");
    t_expect(fd, REPLY("503 Service Unavailable", "0") REPLY("404 Not Found", "0"));
    t_finish(fd);
    CHECK(prlimit(s.http.pid, RLIMIT_NOFILE, &before, NULL) == 0); /* LeakSanitizer opens files */
    stop_http(&s);
}
#endif

/* "../http" and "../echo" exist: they are the built examples. */
TEST_MODES(http_does_not_leave_its_directory)
{
    static const char *const targets[] = {"/../http",       "/../echo",        "/x/../../echo",
                                          "/./small.txt",   "//../echo",       "/..",
                                          "/small.txt/..",  "/%2e%2e/echo",    "/..%2fecho",
                                          "/small.txt/../../echo", "//", "/small.txt/"};
    site s = start_http();
    char request[256];
    for (size_t i = 0; i < sizeof targets / sizeof targets[0]; i++) {
        int size = snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", targets[i]);
        expect_reply(&s, request, (size_t)size, REPLY("404 Not Found", "0"));
    }
    stop_http(&s);
}

TEST_MODES(http_refuses_what_it_does_not_understand)
{
    static const char *const requests[] = {
        "nonsense\r\n\r\n",
        "\r\n\r\n",
        "\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "get / HTTP/1.1\r\nHost: x\r\n\r\n",
        "TOOLONGAMETHOD / HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET / HTTP/2.0\r\nHost: x\r\n\r\n",
        "GET / HTTP/1.12\r\nHost: x\r\n\r\n",
        "GET / HTTP/1.x\r\nHost: x\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nX-Host: x\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nhost: x\r\n\r\n",
        "GET / HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x y\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x, y\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x/y\r\n\r\n",
        "GET /\r\n\r\n",
        "GET http:///x HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET ftp://x/ HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET ../echo HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET * HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET/ HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET  / HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /  HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /\tHTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /a\tb HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET\r\n/ HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /\r\nHTTP/1.1\r\nHost: x\r\n\r\n",
        "GET / HTTP/1.1 \r\nHost: x\r\n\r\n",
        "GET / HTTP/1.1\n\r\nHost: x\r\n\r\n",
        "GET / http/1.1\r\nHost: x\r\n\r\n",
        /* Fields that somebody else may take for another one. */
        "GET / HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\n Content-Length: 5\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nX: a\r\n Content-Length: 5\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nX: a\r\n\tb\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nX: a\nContent-Length: 5\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nX: a\rContent-Length: 5\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nX: a\x01\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nContent-Length\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\n: x\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1 2\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 0x5\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 5\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\ncontent-length: 5\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nTransfer-Encoding:chunked\r\n\r\n",
    };
    static const char zero[] = "GET / HTTP/1.1\r\nHost: x\r\n\0Content-Length: 5\r\n\r\n";
    site s = start_http();
    char *head = allocate(BIG);
    for (size_t i = 0; i < sizeof requests / sizeof requests[0]; i++) {
        expect_reply(&s, requests[i], strlen(requests[i]), LAST("400 Bad Request", "0"));
    }
    expect_reply(&s, zero, sizeof zero - 1, LAST("400 Bad Request", "0"));

    /* A path of 254 bytes is the longest there can be; a query may be longer. */
    memset(head, 'x', BIG);
    memcpy(head, "GET /", 5);
    memcpy(head + 4 + 254, "?xx HTTP/1.1\r\nHost: x\r\n\r\n", 25);
    expect_reply(&s, head, 4 + 254 + 25, REPLY("404 Not Found", "0"));
    memset(head + 4 + 254, 'x', 25);
    memcpy(head + 4 + 255, " HTTP/1.1\r\nHost: x\r\n\r\n", 22);
    expect_reply(&s, head, 4 + 255 + 22, LAST("414 URI Too Long", "0"));

    /* So is a head of 8192; the rest does not turn the answer into a reset. */
    memset(head, 'x', BIG);
    memcpy(head, "GET / HTTP/1.1\r\nHost: x\r\nX: ", 28);
    memcpy(head + 8188, "\r\n\r\n", 4);
    expect_reply(&s, head, 8192, REPLY("200 OK", "10") "It works.\n");
    memcpy(head + 8188, "x\r\n\r\n", 5);
    expect_reply(&s, head, 8193, TOO_LARGE);
    memset(head + 8188, 'x', 5);
    expect_reply(&s, head, BIG, TOO_LARGE);
    free(head);
    stop_http(&s);
}

/* What a URL cannot have in it comes as its number. */
TEST_MODES(http_decodes_names)
{
    static const struct {
        const char *target, *reply;
    } asked[] = {{"/a%20%c3%a9%2Btxt", REPLY("200 OK", "3")},
                 {"/%73mall.txt?%zz", REPLY("200 OK", "6")},
                 {"/%", REPLY("400 Bad Request", "0")},
                 {"/small.txt%2", REPLY("400 Bad Request", "0")},
                 {"/small.txt%zz", REPLY("400 Bad Request", "0")},
                 {"/small.txt%00.png", REPLY("400 Bad Request", "0")},
                 {"/%2E%2e/small.txt", REPLY("404 Not Found", "0")},
                 {"/%2e%2e%2fsmall.txt", REPLY("404 Not Found", "0")}};
    site s = start_http();
    char name[600], request[256];
    make_file(name, sizeof name, s.directory, "a \xc3\xa9+txt", "abc", 3);
    for (size_t i = 0; i < sizeof asked / sizeof asked[0]; i++) {
        int size = snprintf(request, sizeof request, "HEAD %s HTTP/1.1\r\nHost: x\r\n\r\n",
                            asked[i].target);
        expect_reply(&s, request, (size_t)size, asked[i].reply);
    }
    CHECK(unlink(name) == 0);
    stop_http(&s);
}

/* As proxies and old clients write it, and as later versions of HTTP/1 may. */
TEST_MODES(http_takes_what_it_has_to)
{
    static const char *const good[] = {
        "HEAD http://x/small.txt HTTP/1.1\r\nHost: x\r\n\r\n",
        "HEAD HTTP://127.0.0.1:80/small.txt?a=/b HTTP/1.1\r\nHost: [::1]:80 \r\n\r\n",
        "\r\nHEAD /small.txt HTTP/1.1\r\nHost:\r\n\r\n",
        "HEAD /small.txt HTTP/1.2\r\nHost: x\r\n\r\n",
    };
    static const char *const roots[] = {"HEAD http://x HTTP/1.1\r\nHost: x\r\n\r\n",
                                        "HEAD http://x?a HTTP/1.1\r\nHost: x\r\n\r\n"};
    site s = start_http();
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        expect_reply(&s, good[i], strlen(good[i]), REPLY("200 OK", "6"));
    }
    for (size_t i = 0; i < sizeof roots / sizeof roots[0]; i++) {
        expect_reply(&s, roots[i], strlen(roots[i]), REPLY("200 OK", "10"));
    }
    stop_http(&s);
}

/* Nothing of a body is taken for a request, and nobody is told that it was dealt with. */
TEST_MODES(http_takes_no_bodies)
{
    static const struct {
        const char *field, *status;
    } fields[] = {{"Content-Length: 40", "413 Content Too Large"},
                  {"content-length:00040 ", "413 Content Too Large"},
                  {"Content-Length: 99999999999999999999999", "413 Content Too Large"},
                  {"Transfer-Encoding: chunked", "501 Not Implemented"},
                  {"transfer-encoding:\tgzip, chunked", "501 Not Implemented"}};
    site s = start_http();
    char request[256], expected[256];
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        int size = snprintf(request, sizeof request,
                            "GET /small.txt HTTP/1.1\r\nHost: x\r\n%s\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
                            fields[i].field);
        snprintf(expected, sizeof expected, LAST("%s", "0"), fields[i].status);
        expect_reply(&s, request, (size_t)size, expected);
    }
    static const char put[] = "PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n"
                              "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    expect_reply(&s, put, sizeof put - 1, LAST(NOT_ALLOWED, "0"));
    /* A body of no bytes is none. */
    static const char none[] = "PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
                               "GET / HTTP/1.1\r\nHost: x\r\ncontent-length:00\r\n\r\n"
                               "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    expect_reply(&s, none, sizeof none - 1,
                 REPLY(NOT_ALLOWED, "0")
                     REPLY("200 OK", "10") "It works.\n" REPLY("200 OK", "10") "It works.\n");
    stop_http(&s);
}

/* However a client writes that it wants no more, and only then. */
TEST_MODES(http_closes_when_it_is_asked_to)
{
    static const char *const asks[] = {"Connection: close",
                                       "connection:close",
                                       "Connection:\tClose ",
                                       "Connection: keep-alive, close",
                                       "Connection: x,close,y",
                                       "X: y\r\nConnection: close\r\nConnection: keep-alive"};
    static const char *const others[] = {"Connection: keep-alive",
                                         "Connection: closed, enclose",
                                         "X-Connection: close",
                                         "X: Connection: close",
                                         "Connection: keep-alive\r\nReferer: /close",
                                         "Connection:"};
    site s = start_http();
    char request[256];
    for (size_t i = 0; i < 2 * sizeof asks / sizeof asks[0]; i++) {
        const char *field = i % 2 ? others[i / 2] : asks[i / 2];
        int size =
            snprintf(request, sizeof request, "HEAD / HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n", field);
        expect_reply(&s, request, (size_t)size,
                     i % 2 ? REPLY("200 OK", "10") : LAST("200 OK", "10"));
    }
    stop_http(&s);
}

/* A pipe in the directory would hold up whoever opens it, and with it everybody. */
TEST_MODES(http_is_not_held_up_by_a_pipe)
{
    static const char request[] = "GET /pipe HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n";
    site s = start_http();
    char name[600];
    snprintf(name, sizeof name, "%s/pipe", s.directory);
    CHECK(mkfifo(name, 0600) == 0);
    expect_reply(&s, request, sizeof request - 1,
                 REPLY("404 Not Found", "0") REPLY("200 OK", "10") "It works.\n");
    CHECK(unlink(name) == 0);
    stop_http(&s);
}

/* In a drain what is under way is answered, and the last answer says that it is the last. */
TEST_MODES(http_says_which_answer_is_the_last)
{
    site s = start_http();
    int idle = t_connect(s.http.port), busy = t_connect(s.http.port);
    t_sends(idle, "HEAD / HTTP/1.1\r\nHost: x\r\n\r\n");
    t_expect(idle, REPLY("200 OK", "10"));
    t_sends(busy, "HEAD / HTTP/1.1\r\nHost: x\r\n\r\nHEAD / HT");
    t_expect(busy, REPLY("200 OK", "10"));
    send_signal(&s.http, SIGTERM);
    t_expect_eof(idle); /* the drain has begun */
    t_close(idle);
    t_sends(busy, "TP/1.1\r\nHost: x\r\n\r\nGET /small.txt HTTP/1.1\r\nHost: x\r\n\r\n");
    t_expect(busy, REPLY("200 OK", "10") LAST("200 OK", "6") "small\n");
    t_leave(busy);
    expect_end(&s.http);
    CHECK(unlink(s.big_name) == 0 && unlink(s.small_name) == 0 && rmdir(s.directory) == 0);
    free(s.big);
}

/* ---- redis --------------------------------------------------------------------------------*/

#define NOT_INTEGER "-ERR value is not an integer\r\n"
#define UNKNOWN "-ERR unknown command\r\n"
#define MALFORMED "-ERR Protocol error\r\n"

/* Each leaves the keys as it found them: absent. */
static const exchange_step redis_steps[] = {
    {"*1\r\n$4\r\nPING\r\n", "+PONG\r\n"},
    {"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n", "$-1\r\n"},
    {"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\nvalue\r\n", "+OK\r\n"},
    {"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n", "$5\r\nvalue\r\n"},
    {"*3\r\n$3\r\nset\r\n$1\r\nk\r\n$0\r\n\r\n", "+OK\r\n"},
    {"*2\r\n$3\r\nget\r\n$1\r\nk\r\n", "$0\r\n\r\n"},
    {"*2\r\n$4\r\nINCR\r\n$1\r\nk\r\n", NOT_INTEGER},
    {"*2\r\n$3\r\nDEL\r\n$1\r\nk\r\n", ":1\r\n"},
    {"*2\r\n$3\r\nDEL\r\n$1\r\nk\r\n", ":0\r\n"},
    {"*0\r\n*1\r\n$4\r\nPING\r\n", "+PONG\r\n"},
    {"\r\n\nPING\r\n", "+PONG\r\n"},
    {"INCR n\nINCR n\nGET n\n", ":1\r\n:2\r\n$1\r\n2\r\n"},
    {"SET n -1\nINCR n\nSET n 01\nINCR n\n", "+OK\r\n:0\r\n+OK\r\n" NOT_INTEGER},
    {"SET n 9223372036854775806\nINCR n\nINCR n\nGET n\n",
     "+OK\r\n:9223372036854775807\r\n" NOT_INTEGER "$19\r\n9223372036854775807\r\n"},
    {"SET n 9223372036854775808\nINCR n\nSET n 1x\nINCR n\nDEL n\n",
     "+OK\r\n" NOT_INTEGER "+OK\r\n" NOT_INTEGER ":1\r\n"},
    {"*3\r\n$3\r\nSET\r\n$1\r\nn\r\n$2\r\n 1\r\n*2\r\n$4\r\nINCR\r\n$1\r\nn\r\n",
     "+OK\r\n" NOT_INTEGER},
    {"DEL n\n", ":1\r\n"},
    {"PING hi\nECHO hello\nSET a 1\nSET b 2\nDEL a none b\nDEL\n",
     "$2\r\nhi\r\n$5\r\nhello\r\n+OK\r\n+OK\r\n:2\r\n" UNKNOWN},
    {"SET ab one\nSET bA two\nGET ab\nGET bA\n", "+OK\r\n+OK\r\n$3\r\none\r\n$3\r\ntwo\r\n"},
    {"DEL ab\nGET ab\nGET bA\nSET ab 1\nDEL bA\nGET ab\nDEL ab\n",
     ":1\r\n$-1\r\n$3\r\ntwo\r\n+OK\r\n:1\r\n$1\r\n1\r\n:1\r\n"},
    {"nonsense\nGET\nGET a b\nSET a\nSETX a b\nCONFIG GET save\n",
     UNKNOWN UNKNOWN UNKNOWN UNKNOWN UNKNOWN UNKNOWN},
};

enum { REDIS_STEPS = sizeof redis_steps / sizeof redis_steps[0] };

/* Adds a command, its words between blanks, as client libraries send it. */
static void add_command(char *to, const char *command, size_t size)
{
    const char *end = command + size;
    int words = 1;
    for (size_t i = 0; i < size; i++) {
        words += command[i] == ' ';
    }
    to += sprintf(to, "*%d\r\n", words);
    for (; words > 0; words--) {
        const char *space = (const char *)memchr(command, ' ', (size_t)(end - command));
        int word = (int)((space != NULL ? space : end) - command);
        to += sprintf(to, "$%d\r\n%.*s\r\n", word, word, command);
        command += word + 1;
    }
}

/* What a step sends: it is written as it goes, or as commands, one a line. */
static const char *redis_text(const char *send)
{
    static char text[4096];
    text[0] = 0;
    if (*send == '*' || *send == '\r') {
        return send;
    }
    for (size_t size; *send != 0; send += size + 1) {
        size = strcspn(send, "\n");
        add_command(text + strlen(text), send, size);
    }
    return text;
}

#include "../examples/keyvalue.h"

static int longest_chain(void)
{
    int longest = 0;
    for (int i = 0; i < CHAINS; i++) {
        int length = 0;
        for (const struct entry *entry = chains[i]; entry != NULL; entry = entry->next) {
            length++;
        }
        longest = length > longest ? length : longest;
    }
    return longest;
}

/* Whoever knows how hashes are made does not know which keys collide. If they do it is slow, and still right. */
TEST_ONCE(redis_keys_collide_for_nobody)
{
    enum { BITS = 12, KEYS = 1 << BITS };
    char text[2 * BITS + 1] = "";
    tsrv_slice key = {text, 2 * BITS}, value = {text, 2 * BITS};
    for (int known = 0; known < 2; known++) {
        CHECK(choose_secret());
        secret = known ? 33 : secret;
        for (int pass = 0; pass < 3; pass++) {
            for (int i = 0; i < KEYS; i++) {
                for (int bit = 0; bit < BITS; bit++) {
                    memcpy(text + 2 * bit, i >> bit & 1 ? "ab" : "bA", 2);
                }
                const tsrv_slice *there = get(&key);
                CHECK((there != NULL) == (pass == 1));
                CHECK(there == NULL || memcmp(there->data, text, 2 * BITS) == 0);
                CHECK(pass == 0 ? set(&key, &value) : pass == 1 ? unset(&key) : !unset(&key));
            }
            if (pass == 0) {
                CHECK_INT(longest_chain() >= 30, known);
            }
        }
        long long number = 0;
        CHECK(increment(&key, &number) && number == 1 && unset(&key));
        CHECK_INT(stored, 0);
    }
}

TEST_MODES(redis_answers_each_command)
{
    program p = start_with("redis", NULL, NULL);
    int fd = t_connect(p.port);
    for (size_t i = 0; i < REDIS_STEPS; i++) {
        t_sends(fd, redis_text(redis_steps[i].send));
        t_expect(fd, redis_steps[i].expect);
    }
    t_sends(fd, "QUIT now\r\nPING so much\r\n");
    t_expect(fd, UNKNOWN UNKNOWN);
    /* As one types it: words between blanks. */
    t_sends(fd, "SET k  word \r\n\tget k\n  \nDEL k\n");
    t_expect(fd, "+OK\r\n$4\r\nword\r\n:1\r\n");
    t_sends(fd, "QUIT\r\nPING\r\n");
    t_expect(fd, "+OK\r\n");
    t_leave(fd);
    stop(&p);
}

/* The other connection's round trip makes the halves arrive one by one. */
TEST_MODES(redis_pipelines_split_at_every_byte)
{
    char script[4096] = "", replies[4096] = "";
    for (size_t i = 0; i < REDIS_STEPS; i++) {
        strcat(script, redis_text(redis_steps[i].send));
        strcat(replies, redis_steps[i].expect);
    }
    program p = start_with("redis", NULL, NULL);
    int fd = t_connect(p.port), other = t_connect(p.port);
    for (size_t at = 0; script[at] != 0; at++) {
        t_send(fd, script, at);
        t_sends(other, "PING\n");
        t_expect(other, "+PONG\r\n");
        t_sends(fd, script + at);
        t_expect(fd, replies);
    }
    t_finish(fd);
    t_finish(other);
    stop(&p);
}

/* Keys and values of any bytes, many of them, and one that takes nearly all of the buffer. */
TEST_MODES(redis_keeps_what_it_is_given)
{
    enum { KEYS = 2000, LARGE = 1000000 };
    static const char binary[] = "*3\r\n$3\r\nSET\r\n$4\r\n\0\r\n\xff\r\n$3\r\n\0\0\n\r\n"
                                 "*3\r\n$3\r\nSET\r\n$4\r\n\0\r\n\xfe\r\n$1\r\n2\r\n"
                                 "*2\r\n$3\r\nGET\r\n$4\r\n\0\r\n\xff\r\n"
                                 "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$2\r\n1\0\r\n*2\r\n$4\r\nINCR\r\n$1\r\nk\r\n";
    static const char reply[] = "+OK\r\n+OK\r\n$3\r\n\0\0\n\r\n+OK\r\n" NOT_INTEGER;
    program p = start_with("redis", NULL, NULL);
    char *large = allocate(LARGE + 64), text[128];
    int fd = t_connect(p.port), other = t_connect(p.port);
    t_send(fd, binary, sizeof binary - 1);
    size_t received = t_recv(fd, text, sizeof reply - 1);
    CHECK_MEM(text, received, reply, sizeof reply - 1);

    for (int i = 0; i < KEYS; i++) {
        snprintf(text, sizeof text, "SET key%d value%d\n", i, i * 7);
        t_sends(fd, redis_text(text));
        t_expect(fd, "+OK\r\n");
    }
    for (int i = 0; i < KEYS; i++) {
        char value[32];
        int size = snprintf(value, sizeof value, "value%d", i * 7);
        snprintf(text, sizeof text, "GET key%d\n", i);
        t_sends(other, redis_text(text));
        snprintf(text, sizeof text, "$%d\r\n%s\r\n", size, value);
        t_expect(other, text);
    }

    int size = snprintf(large, 64, "*3\r\n$3\r\nSET\r\n$1\r\nx\r\n$%d\r\n", LARGE);
    memset(large + size, 'v', LARGE);
    memcpy(large + size + LARGE, "\r\n", 3);
    t_sends(fd, large);
    t_sends(fd, redis_text("GET x\n"));
    size = snprintf(text, sizeof text, "+OK\r\n$%d\r\n", LARGE);
    t_expect(fd, text);
    memset(large, 'v', LARGE);
    large[LARGE] = 0;
    t_expect(fd, large);
    t_expect(fd, "\r\n");
    t_finish(fd);
    t_finish(other);
    free(large);
    stop(&p);
}

/* Clients cannot fill the memory; what they delete or replace makes room. */
TEST_MODES(redis_keeps_no_more_than_it_can)
{
    enum { LARGE = 1000000, MOST = 64 * 1024 * 1024 / LARGE };
    program p = start_with("redis", NULL, NULL);
    char *value = allocate(LARGE + 3), head[64];
    int fd = t_connect(p.port);
    memset(value, 'v', LARGE);
    memcpy(value + LARGE, "\r\n", 3);
    for (int i = 0; i < MOST + 4; i++) {
        /* The last but two once more, then one too many, one of which was deleted, and again. */
        int key = i < MOST ? i : i == MOST ? 7 : i == MOST + 2 ? 3 : 100;
        if (i == MOST + 2) {
            t_sends(fd, redis_text("DEL k3\n"));
            t_expect(fd, ":1\r\n");
        }
        snprintf(head, sizeof head, "*3\r\n$3\r\nSET\r\n$%d\r\nk%d\r\n$%d\r\n",
                 key < 10    ? 2
                 : key < 100 ? 3
                             : 4,
                 key, LARGE);
        t_sends(fd, head);
        t_sends(fd, value);
        t_expect(fd, i == MOST + 1 || i == MOST + 3 ? "-OOM\r\n" : "+OK\r\n");
    }
    t_finish(fd);
    free(value);
    stop(&p);
}

/* Each write waits: meanwhile another client changes the value. Each answer is one value or the
 * other, and AddressSanitizer finds nothing that was freed too early. */
T_TEST(redis_values_change_while_answers_wait, T_COROUTINES)
{
    enum { ASKERS = 4, ASKED = 20, CHANGES = 40 };
    static const char one[] = "$0\r\n\r\n", other[] = "$9\r\nbbbbbbbbb\r\n";
    char answers[ASKED * sizeof other];
    int askers[ASKERS];
    variant = "slow_";
    program p = start_with("redis", NULL, NULL);
    int fd = t_connect(p.port);
    t_sends(fd, redis_text("SET k bbbbbbbbb\n"));
    t_expect(fd, "+OK\r\n");
    for (int i = 0; i < ASKERS; i++) {
        askers[i] = t_connect(p.port);
        for (int k = 0; k < ASKED; k++) {
            t_sends(askers[i], redis_text("GET k\n"));
        }
        t_shut(askers[i]);
    }
    for (int i = 0; i < CHANGES; i++) {
        t_sends(fd, i % 2 ? redis_text("SET k bbbbbbbbb\n")
                          : "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$0\r\n\r\n");
        t_expect(fd, "+OK\r\n");
    }
    for (int i = 0; i < ASKERS; i++) {
        size_t size = t_recv_all(askers[i], answers, sizeof answers), at = 0;
        for (int k = 0; k < ASKED; k++) {
            const char *expected = answers[at + 1] == '0' ? one : other;
            CHECK(at + strlen(expected) <= size);
            CHECK_MEM(answers + at, strlen(expected), expected, strlen(expected));
            at += strlen(expected);
        }
        CHECK_INT(at, size);
        t_close(askers[i]);
    }
    t_finish(fd);
    stop(&p);
}

TEST_MODES(redis_ends_after_a_protocol_error)
{
    static const char *const errors[] = {
        "*1\r\n$-1\r\n",
        "*-1\r\n",
        "*99999999999999999999\r\n",
        "*16\r\n",
        "*x\r\n",
        "*1x\r\n",
        "*1\n$4\r\nPING\r\n",
        "*1\r\n+PING\r\n",
        "*1\r\n:4\r\nPING\r\n",
        "*1\r\n$2000000\r\n",
        "*1\r\n$4x\r\nPING\r\n",
        "*1x\n",
        "*1\r\n$4x\nPING\r\n",
        "*1\r\n$18446744073709551615\r\nPING\r\n",
        /* What a less strict reader takes for another number, and so for another command. */
        "*\r\n",
        "*1\r\n$\r\n\r\n",
        "*+1\r\n",
        "* 1\r\n",
        "*-18446744073709551615\r\n$4\r\nPING\r\n",
        "*1\r\n$+4\r\nPING\r\n",
        "*1\r\n$ 4\r\nPING\r\n",
        "*1\r\n$4\r\nPINGxx*1\r\n",
        "*1\r\n$4\r\nPING\n\r*1\r\n",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n",
    };
    program p = start_with("redis", NULL, NULL);
    char *line = allocate(2 * 1024 * 1024);
    for (size_t i = 0; i < sizeof errors / sizeof errors[0]; i++) {
        int fd = t_connect(p.port);
        t_sends(fd, "PING\n");
        t_sends(fd, errors[i]);
        t_sends(fd, "PING\n");
        t_expect(fd, "+PONG\r\n" MALFORMED);
        t_leave(fd);
    }
    /* A typed line without an end; the rest of it does not turn the answer into a reset. One that is
     * too long is so whether its end comes with it or not, and one with a 0 in it is not cut. */
    memset(line, 'x', 2 * 1024 * 1024);
    static const size_t sizes[] = {2 * 1024 * 1024, 5000, 4097, 6};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        int fd = t_connect(p.port);
        line[sizes[i] - 1] = i > 0 ? '\n' : 'x';
        if (i == 3) {
            memcpy(line, "PING\0", 5);
        }
        t_send(fd, line, sizes[i]);
        line[sizes[i] - 1] = 'x';
        t_expect(fd, MALFORMED);
        t_leave(fd);
    }
    free(line);
    stop(&p);
}

/* ---- memcached ----------------------------------------------------------------------------*/

#define BAD_LINE "CLIENT_ERROR bad command line format\r\n"
#define BAD_BLOCK "CLIENT_ERROR bad data chunk\r\n"
#define NO_NUMBER "CLIENT_ERROR cannot increment or decrement non-numeric value\r\n"
#define NO_DELTA "CLIENT_ERROR invalid numeric delta argument\r\n"
#define NO_TIME "CLIENT_ERROR invalid exptime argument\r\n"
#define LARGE_ITEM "SERVER_ERROR object too large for cache\r\n"
#define NO_MEMORY "SERVER_ERROR out of memory storing object\r\n"

/* Each leaves the keys as it found them: absent. */
static const exchange_step memcached_steps[] = {
    {"version\r\n", "VERSION " TSRV_VERSION "\r\n"},
    {"get k\r\n", "END\r\n"},
    {"set k 7 0 5\r\nvalue\r\n", "STORED\r\n"},
    {"get k\r\nget none k  none k\n", "VALUE k 7 5\r\nvalue\r\nEND\r\n"
                                      "VALUE k 7 5\r\nvalue\r\nVALUE k 7 5\r\nvalue\r\nEND\r\n"},
    {"set k 4294967295 0 0\n\r\nget k\n", "STORED\r\nVALUE k 4294967295 0\r\n\r\nEND\r\n"},
    {"add k 0 0 1\r\na\r\nreplace k 1 0 4\r\n\r\n\r\n\r\nget k\r\n",
     "NOT_STORED\r\nSTORED\r\nVALUE k 1 4\r\n\r\n\r\n\r\nEND\r\n"},
    {"append k 9 -1 2\r\nde\r\nprepend k 9 9 1\r\nx\r\nget k\r\n",
     "STORED\r\nSTORED\r\nVALUE k 1 7\r\nx\r\n\r\nde\r\nEND\r\n"},
    {"cas k 0 0 1 18446744073709551615\r\na\r\ncas none 0 0 1 1\r\na\r\n", "EXISTS\r\nNOT_FOUND\r\n"},
    {"delete k\r\ndelete k\r\nget k\r\n", "DELETED\r\nNOT_FOUND\r\nEND\r\n"},
    {"set k 0 0 1\r\na\r\ndelete k 1\r\ndelete k x noreply\r\ndelete k 0 noreply\r\ndelete k 0\r\n",
     "STORED\r\n" BAD_LINE "NOT_FOUND\r\n"},
    {"replace k 0 0 1\r\na\r\nappend k 0 0 1\r\na\r\nprepend k 0 0 1\r\na\r\n",
     "NOT_STORED\r\nNOT_STORED\r\nNOT_STORED\r\n"},
    {"add k 0 0 2\r\n10\r\nincr k 5\r\ndecr k 6\r\nget k\r\n",
     "STORED\r\n15\r\n9\r\nVALUE k 0 1\r\n9\r\nEND\r\n"},
    {"decr k 10\r\nincr k 18446744073709551615\r\nincr k 3\r\nget k\r\n",
     "0\r\n18446744073709551615\r\n2\r\nVALUE k 0 1\r\n2\r\nEND\r\n"},
    {"incr k x\r\nincr k -1\r\nincr k 18446744073709551616\r\nincr k\r\nincr none 1\r\n",
     NO_DELTA NO_DELTA NO_DELTA "ERROR\r\nNOT_FOUND\r\n"},
    {"set k 3 0 2\r\n1x\r\nincr k 1\r\nset k 3 0 0\r\n\r\ndecr k 1\r\nset k 3 0 3\r\n 10\r\nincr k 1\r\n",
     "STORED\r\n" NO_NUMBER "STORED\r\n" NO_NUMBER "STORED\r\n" NO_NUMBER},
    {"set k 3 0 20\r\n18446744073709551616\r\nincr k 1\r\nset k 3 0 1\r\n1\r\nincr k 1\r\nget k\r\n",
     "STORED\r\n" NO_NUMBER "STORED\r\n2\r\nVALUE k 3 1\r\n2\r\nEND\r\n"},
    /* What is to be quiet is done all the same. */
    {"set k 0 0 1 noreply\r\n8\r\nincr k 1 noreply\r\ndecr k 2 noreply\r\nappend k 0 0 1 noreply\r\n0\r\n"
     "touch k 0 noreply\r\nget k\r\n", "VALUE k 0 2\r\n70\r\nEND\r\n"},
    {"add k 0 0 1 noreply\r\n8\r\nreplace none 0 0 1 noreply\r\n8\r\ndelete none noreply\r\n"
     "verbosity 1 noreply\r\nverbosity noreply\r\nincr k x noreply\r\nset k x 0 1 noreply\r\nx\r\nget k\r\n",
     "VALUE k 0 2\r\n70\r\nEND\r\n"},
    {"delete k noreply\r\nget k noreply\r\n", "END\r\n"},
    /* A key of that name. */
    {"set noreply 0 0 1\r\na\r\nget noreply\r\ndelete noreply\r\ndelete noreply noreply\r\nget noreply\r\n",
     "STORED\r\nVALUE noreply 0 1\r\na\r\nEND\r\nDELETED\r\nEND\r\n"},
    /* A time that is over, one that comes, one in 1970, one in 2106, and none. */
    {"set k 0 -1 1\r\na\r\nget k\r\nset k 0 1000 1\r\nb\r\nget k\r\nset k 0 2592001 1\r\na\r\nget k\r\n",
     "STORED\r\nEND\r\nSTORED\r\nVALUE k 0 1\r\nb\r\nEND\r\nSTORED\r\nEND\r\n"},
    {"add k 0 4294967295 1\r\nc\r\ntouch k 1000\r\nget k\r\ntouch k -1\r\nget k\r\ntouch k 0\r\n",
     "STORED\r\nTOUCHED\r\nVALUE k 0 1\r\nc\r\nEND\r\nTOUCHED\r\nEND\r\nNOT_FOUND\r\n"},
    {"touch k\r\ntouch k x\r\ntouch k 4294967296\r\n", "ERROR\r\n" NO_TIME NO_TIME},
    {"set k 0 0 1\r\na\r\nset l 0 0 1\r\nb\r\nflush_all\r\nget k l\r\nadd k 0 0 1\r\nc\r\nget k l\r\n",
     "STORED\r\nSTORED\r\nOK\r\nEND\r\nSTORED\r\nVALUE k 0 1\r\nc\r\nEND\r\n"},
    {"flush_all 0\r\nflush_all noreply\r\nflush_all 10\r\nflush_all 0 0\r\nget k\r\n",
     "OK\r\nCLIENT_ERROR it cannot wait\r\nERROR\r\nEND\r\n"},
    /* Two keys of one chain, whatever its number is: 'a' * 33 + 'b' is 'b' * 33 + 'A'. */
    {"set ab 0 0 1\r\n1\r\nset bA 0 0 1\r\n2\r\nget bA ab\r\ndelete ab\r\nget ab bA\r\ndelete bA\r\n",
     "STORED\r\nSTORED\r\nVALUE bA 0 1\r\n2\r\nVALUE ab 0 1\r\n1\r\nEND\r\nDELETED\r\n"
     "VALUE bA 0 1\r\n2\r\nEND\r\nDELETED\r\n"},
    {"nonsense\r\n\r\n\nget\r\ngets\r\nGET k\r\ndelete\r\ndelete a b c\r\nverbosity\r\nverbosity 1\r\n",
     "ERROR\r\nERROR\r\nERROR\r\nERROR\r\nERROR\r\nERROR\r\nERROR\r\nERROR\r\nERROR\r\nOK\r\n"},
    /* A block that is refused is skipped, whatever is in it. */
    {"set k x 0 9\r\nversion\r\n\r\nset k 0 x 1\r\na\r\ncas k 0 0 1 x\r\na\r\nset k 4294967296 0 0\r\n\r\nget k\r\n",
     BAD_LINE BAD_LINE BAD_LINE BAD_LINE "END\r\n"},
};

enum { MEMCACHED_STEPS = sizeof memcached_steps / sizeof memcached_steps[0] };

TEST_MODES(memcached_answers_each_command)
{
    program p = start_with("memcached", NULL, NULL);
    int fd = t_connect(p.port);
    PLAY(fd, memcached_steps);
    t_sends(fd, "quit\r\nversion\r\n");
    t_leave(fd);
    stop(&p);
}

/* The other connection's round trip makes the halves arrive one by one. */
TEST_MODES(memcached_pipelines_split_at_every_byte)
{
    char script[4096] = "", replies[4096] = "";
    for (size_t i = 0; i < MEMCACHED_STEPS; i++) {
        strcat(script, memcached_steps[i].send);
        strcat(replies, memcached_steps[i].expect);
    }
    program p = start_with("memcached", NULL, NULL);
    int fd = t_connect(p.port), other = t_connect(p.port);
    for (size_t at = 0; script[at] != 0; at++) {
        t_send(fd, script, at);
        t_sends(other, "version\r\n");
        t_expect(other, "VERSION " TSRV_VERSION "\r\n");
        t_sends(fd, script + at);
        t_expect(fd, replies);
    }
    t_finish(fd);
    t_finish(other);
    stop(&p);
}

/* The client that the protocol's authors have written to tell who speaks it. */
TEST_MODES(memcached_passes_memccapable)
{
    char line[256];
    if (system("memccapable -h >/dev/null 2>&1; test $? -ne 127") != 0) {
        SKIP("memccapable (libmemcached-tools)");
    }
    program p = start_with("memcached", NULL, NULL);
    snprintf(line, sizeof line, "memccapable -h 127.0.0.1 -p %d -t %d -a 2>&1 | grep '^All tests passed$'",
             p.port, t_patience_ms() / 1000);
    CHECK_INT(system(line), 0);
    stop(&p);
}

/* cas stores when nobody else has, since gets. */
TEST_MODES(memcached_compares_and_sets)
{
    char text[256];
    unsigned long long unique, later;
    program p = start_with("memcached", NULL, NULL);
    int fd = t_connect(p.port), other = t_connect(p.port);
    t_sends(fd, "set k 0 0 1\r\na\r\n");
    t_expect(fd, "STORED\r\n");
    for (int i = 0; i < 3; i++) {
        reader r = {fd, 0, 0, "", ""};
        t_sends(fd, "gets k\r\n");
        CHECK_INT(sscanf(read_line(&r), "VALUE k 0 1 %llu", &unique), 1);
        CHECK_STR(read_line(&r), "a\r");
        CHECK_STR(read_line(&r), "END\r");
        /* Time does not count, another value does. */
        t_sends(other, "touch k 0\r\n");
        t_expect(other, "TOUCHED\r\n");
        if (i == 1) {
            t_sends(other, "set k 0 0 1\r\na\r\n");
            t_expect(other, "STORED\r\n");
        }
        snprintf(text, sizeof text, "cas k 0 0 1 %llu\r\na\r\n", unique);
        t_sends(fd, text);
        t_expect(fd, i == 1 ? "EXISTS\r\n" : "STORED\r\n");
        t_sends(fd, text); /* its own counts, too */
        t_expect(fd, "EXISTS\r\n");
        t_sends(fd, "gets k\r\n");
        CHECK_INT(sscanf(read_line(&r), "VALUE k 0 1 %llu", &later), 1);
        CHECK(later > unique);
        CHECK_STR(read_line(&r), "a\r");
        CHECK_STR(read_line(&r), "END\r");
    }
    t_finish(fd);
    t_finish(other);
    stop(&p);
}

/* "<verb> <key> 0 0 <size>" and so many bytes of one letter. */
static void send_block(int fd, const char *verb, const char *key, size_t size, char letter)
{
    char head[512], *block = allocate(size + 3);
    snprintf(head, sizeof head, "%s %s 0 0 %zu\r\n", verb, key, size);
    memset(block, letter, size);
    memcpy(block + size, "\r\n", 3);
    t_sends(fd, head);
    t_sends(fd, block);
    free(block);
}

/* The first letter of what comes next, which is still to come. */
static char peek(int fd)
{
    char first = 0;
    CHECK_INT(recv(fd, &first, 1, MSG_PEEK), 1);
    return first;
}

/* Asks for a key. Returns whether it is there, with a value of so many bytes of one letter. */
static bool get_block(int fd, const char *key, size_t size, char letter)
{
    char head[512], *block = allocate(size + 8);
    snprintf(head, sizeof head, "get %s\r\n", key);
    t_sends(fd, head);
    bool there = peek(fd) == 'V';
    if (there) {
        snprintf(head, sizeof head, "VALUE %s 0 %zu\r\n", key, size);
        t_expect(fd, head);
        CHECK_INT(t_recv(fd, block, size), size);
        for (size_t i = 0; i < size; i++) {
            CHECK_INT(block[i], letter);
        }
    }
    t_expect(fd, there ? "\r\nEND\r\n" : "END\r\n");
    free(block);
    return there;
}

/* Keys of 250 bytes, values of any bytes and of up to 1 MiB; what is larger is skipped, and what it
 * was to replace is gone. */
TEST_MODES(memcached_keeps_what_it_is_given)
{
    enum { MOST = 1024 * 1024 };
    static const char binary[] = "set b 0 0 9\r\n\0\r\n\n\xff\x80 \r\n\r\nget b\r\n";
    static const char reply[] = "STORED\r\nVALUE b 0 9\r\n\0\r\n\n\xff\x80 \r\n\r\nEND\r\n";
    char key[252], text[600], got[sizeof reply];
    program p = start_with("memcached", NULL, NULL);
    int fd = t_connect(p.port);
    t_send(fd, binary, sizeof binary - 1);
    CHECK_MEM(got, t_recv(fd, got, sizeof reply - 1), reply, sizeof reply - 1);

    memset(key, 'k', 251);
    key[251] = 0;
    static const char *const lines[] = {"get %s\r\n", "get b %s\r\n", "delete %s\r\n",
                                        "incr %s 1\r\n", "touch %s 0\r\n",
                                        "set %s 0 0 9\r\nversion\r\n\r\n"};
    for (size_t i = 0; i < sizeof lines / sizeof lines[0]; i++) {
        snprintf(text, sizeof text, lines[i], key);
        t_sends(fd, text);
        if (i == 1) {
            t_recv(fd, got, sizeof reply - 14); /* what came before it in the line */
        }
        t_expect(fd, BAD_LINE);
    }
    key[250] = 0;
    send_block(fd, "set", key, 1, 'a');
    t_expect(fd, "STORED\r\n");
    CHECK(get_block(fd, key, 1, 'a'));

    send_block(fd, "set", "k", MOST, 'a');
    t_expect(fd, "STORED\r\n");
    CHECK(get_block(fd, "k", MOST, 'a'));
    send_block(fd, "append", "k", 1, 'a');
    t_expect(fd, LARGE_ITEM);
    send_block(fd, "add", "k", MOST + 1, 'b');
    t_expect(fd, LARGE_ITEM);
    CHECK(get_block(fd, "k", MOST, 'a'));
    send_block(fd, "set", "k", MOST + 1, 'b');
    t_expect(fd, LARGE_ITEM);
    CHECK(!get_block(fd, "k", MOST, 'a'));
    send_block(fd, "set", "k", 5 * MOST, 'b');
    t_sends(fd, "version\r\n");
    t_expect(fd, LARGE_ITEM "VERSION " TSRV_VERSION "\r\n");
    send_block(fd, "set", "k", MOST / 2, 'c');
    send_block(fd, "prepend", "k", MOST / 2, 'c');
    t_expect(fd, "STORED\r\nSTORED\r\n");
    CHECK(get_block(fd, "k", MOST, 'c'));
    t_finish(fd);
    stop(&p);
}

/* More than there is room for: who was not used for the longest time goes, and nothing else. */
TEST_MODES(memcached_makes_room)
{
    enum { LARGE = 1000000, KEYS = 100, ROOM = 64 * 1024 * 1024 / LARGE };
    char key[16];
    program p = start_with("memcached", NULL, NULL);
    int fd = t_connect(p.port);
    for (int i = 0; i < KEYS; i++) {
        snprintf(key, sizeof key, "k%d", i);
        send_block(fd, "set", key, LARGE, (char)('a' + i % 26));
        t_expect(fd, "STORED\r\n");
        CHECK(get_block(fd, "k0", LARGE, 'a')); /* it is always in use */
    }
    for (int i = 1; i < KEYS; i++) {
        snprintf(key, sizeof key, "k%d", i);
        CHECK_INT(get_block(fd, key, LARGE, (char)('a' + i % 26)), i > KEYS - ROOM);
    }
    /* What has ended or was deleted makes room, too. */
    t_sends(fd, "flush_all\r\n");
    t_expect(fd, "OK\r\n");
    for (int i = 0; i < ROOM; i++) {
        snprintf(key, sizeof key, "l%d", i);
        send_block(fd, "set", key, LARGE, 'l');
        t_expect(fd, "STORED\r\n");
    }
    for (int i = 0; i < ROOM; i++) {
        snprintf(key, sizeof key, "l%d", i);
        CHECK(get_block(fd, key, LARGE, 'l'));
    }
    t_finish(fd);
    stop(&p);
}

/* Blocks that do not come: their memory is lost to others, who are told so, until it is given up. */
TEST_MODES(memcached_waits_for_blocks_no_longer_than_it_may)
{
    enum { ROOM = 64, SMALL = 4096 };
    int fds[ROOM];
    int seconds = t_scale() > 1 ? 6 : 2;
    program p = start_with("memcached", seconds == 2 ? "2" : "6", NULL);
    int fd = t_connect(p.port), early = t_connect(p.port);
    send_block(early, "set", "e", 1, 'e');
    t_expect(early, "STORED\r\n");
    int64_t begin = t_now_ms();
    for (int i = 0; i < ROOM; i++) {
        fds[i] = t_connect(p.port);
        t_sends(fds[i], i < ROOM - 1 ? "version\r\nset k 0 0 1048576\r\nabc"
                                     : "version\r\nset k 0 0 1030000\r\nabc");
        t_expect(fds[i], "VERSION " TSRV_VERSION "\r\n");
    }
    send_block(fd, "set", "l", SMALL, 'l');
    t_expect(fd, "STORED\r\n");
    send_block(fd, "set", "m", 1024 * 1024, 'm');
    t_expect(fd, NO_MEMORY);
    CHECK(!get_block(fd, "l", SMALL, 'l')); /* it has made what room it could */
    for (int i = 0; i < ROOM; i++) {
        t_leave(fds[i]);
    }
    CHECK_NEAR_MS(t_now_ms() - begin, seconds * 1000 - 100, 6000);
    CHECK(!get_block(early, "e", 1, 'e')); /* between two commands there is no such hurry */
    t_finish(early);
    send_block(fd, "set", "m", 1024 * 1024, 'm');
    t_expect(fd, "STORED\r\n");
    CHECK(get_block(fd, "m", 1024 * 1024, 'm'));
    CHECK(!get_block(fd, "k", 1, 'k'));
    t_finish(fd);
    stop(&p);
}

/* A second is over when the key is not found any more, and not much sooner. */
TEST_MODES(memcached_items_end)
{
    program p = start_with("memcached", NULL, NULL);
    int fd = t_connect(p.port);
    int64_t begin = t_now_ms();
    t_sends(fd, "set k 0 1 1\r\na\r\n");
    t_expect(fd, "STORED\r\n");
    int64_t end = t_patience();
    while (get_block(fd, "k", 1, 'a')) {
        CHECK(t_now_ms() < end);
    }
    CHECK_NEAR_MS(t_now_ms() - begin, 900, 5000);
    t_finish(fd);
    stop(&p);
}

/* Whoever knows the hash function fills one chain, and not more of it than there may be. */
TEST_MODES(memcached_keys_that_collide)
{
    enum { BITS = 8, KEYS = 1 << BITS, MAX_CHAIN = 64 };
    char key[2 * BITS + 1] = "", value = 'a';
    int there = 0;
    program p = start_with("memcached", NULL, NULL);
    int fd = t_connect(p.port);
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < KEYS; i++) {
            for (int bit = 0; bit < BITS; bit++) {
                memcpy(key + 2 * bit, i >> bit & 1 ? "ab" : "bA", 2);
            }
            value = (char)('a' + i % 26);
            if (pass == 0) {
                send_block(fd, "set", key, 3, value);
                t_expect(fd, "STORED\r\n");
            } else {
                there += get_block(fd, key, 3, value);
            }
        }
    }
    CHECK_INT(there, MAX_CHAIN);
    CHECK(get_block(fd, key, 3, value)); /* the last one is there */
    t_sends(fd, "flush_all\r\n");
    t_expect(fd, "OK\r\n");
    CHECK(!get_block(fd, key, 3, value));
    t_finish(fd);
    stop(&p);
}

/* What follows could be a block, and somebody else's words in it: it is not taken for commands. */
TEST_MODES(memcached_ends_where_it_is_lost)
{
    static const exchange_step ends[] = {
        {"set k 0 0\r\nversion\r\n", "ERROR\r\n"},
        {"set k 0 0 9 9\r\nversion\r\n", "ERROR\r\n"},
        {"set my key 0 0 9\r\nversion\r\n", "ERROR\r\n"},
        {"cas k 0 0 9\r\nversion\r\n", "ERROR\r\n"},
        {"set k 0 0 x\r\nversion\r\n", BAD_LINE},
        {"set k 0 0 -1\r\nversion\r\n", BAD_LINE},
        {"set k 0 0 +1\r\nversion\r\n", BAD_LINE},
        {"set k 0 0 2147483648\r\nversion\r\n", BAD_LINE},
        {"set k 0 0 18446744073709551617\r\nversion\r\n", BAD_LINE},
        {"set k 0 0 3\r\nabcd\r\nversion\r\n", BAD_BLOCK},
        {"set k 0 0 3\r\nabc\n\nversion\r\n", BAD_BLOCK},
        {"set k 0 0 3\r\nab\r\n\r\nversion\r\n", BAD_BLOCK},
        {"set k 0 0 3 noreply\r\nabcd\r\nversion\r\n", ""},
        {"get a\tb\r\nversion\r\n", BAD_LINE},
        {"get a\rb\r\nversion\r\n", BAD_LINE},
        {"get a\x7f\r\nversion\r\n", BAD_LINE},
        {"\x01\r\nversion\r\n", BAD_LINE},
        {"get a\r\r\nversion\r\n", BAD_LINE},
    };
    static const char zero[] = "get a\0b\r\nversion\r\n";
    program p = start_with("memcached", NULL, NULL);
    for (size_t i = 0; i <= sizeof ends / sizeof ends[0]; i++) {
        int fd = t_connect(p.port);
        t_sends(fd, "version\r\n");
        if (i < sizeof ends / sizeof ends[0]) {
            t_sends(fd, ends[i].send);
        } else {
            t_send(fd, zero, sizeof zero - 1);
        }
        t_expect(fd, "VERSION " TSRV_VERSION "\r\n");
        t_expect(fd, i < sizeof ends / sizeof ends[0] ? ends[i].expect : BAD_LINE);
        t_leave(fd);
    }
    /* A line without an end; the rest of it does not turn the answer into a reset. */
    char *line = allocate(2 * 1024 * 1024);
    memset(line, 'x', 2 * 1024 * 1024);
    int fd = t_connect(p.port);
    t_sends(fd, "verbosity 1 noreply\r\n");
    t_send(fd, line, 2 * 1024 * 1024);
    t_expect(fd, "CLIENT_ERROR line too long\r\n");
    t_leave(fd);
    fd = t_connect(p.port);
    CHECK(!get_block(fd, "k", 1, 'k'));
    t_finish(fd);
    free(line);
    stop(&p);
}

/* More in one answer than may be unsent: a coroutine waits for who reads it, callback mode says that
 * it has no room. */
TEST_MODES(memcached_large_answers)
{
    enum { LARGE = 1024 * 1024, TIMES = 40 };
    char text[256] = "get";
    program p = start_with("memcached", NULL, NULL);
    char *block = allocate(LARGE + 32);
    int fd = t_connect(p.port), came = 0, size;
    send_block(fd, "set", "k", LARGE, 'k');
    t_expect(fd, "STORED\r\n");
    for (int i = 0; i < TIMES; i++) {
        strcat(text, " k");
    }
    t_sends(fd, text);
    t_sends(fd, "\r\nversion\r\n");
    size = snprintf(text, sizeof text, "VALUE k 0 %d\r\n", LARGE);
    for (; peek(fd) == 'V'; came++) {
        CHECK_INT(t_recv(fd, block, (size_t)(size + LARGE + 2)), size + LARGE + 2);
        CHECK_MEM(block, (size_t)size, text, (size_t)size);
        CHECK_MEM(block + size + LARGE - 1, 3, "k\r\n", 3);
    }
    if (t_mode == TSRV_COROUTINE) {
        CHECK_INT(came, TIMES);
        t_expect(fd, "END\r\n");
    } else {
        CHECK(came >= 8 && came < TIMES);
        t_expect(fd, "SERVER_ERROR out of memory writing get response\r\n");
    }
    t_expect(fd, "VERSION " TSRV_VERSION "\r\n");
    t_finish(fd);
    free(block);
    stop(&p);
}

/* Each write waits; meanwhile other clients replace, delete and flush what is being sent. */
T_TEST(memcached_values_change_while_answers_wait, T_COROUTINES)
{
    enum { ASKERS = 4, CHANGES = 60 };
    static const char *const changes[] = {"set k 0 0 2\r\nbb\r\n", "delete k\r\n", "flush_all\r\n",
                                          "set k 0 0 2\r\naa\r\n"};
    static const char *const answers[] = {"STORED\r\n", "DELETED\r\n", "OK\r\n", "STORED\r\n"};
    char text[65536], *at, *end;
    int askers[ASKERS];
    variant = "slow_";
    program p = start_with("memcached", NULL, NULL);
    int fd = t_connect(p.port);
    t_sends(fd, "set k 0 0 2\r\naa\r\n");
    t_expect(fd, "STORED\r\n");
    for (int i = 0; i < ASKERS; i++) {
        askers[i] = t_connect(p.port);
        for (int k = 0; k < 10; k++) {
            t_sends(askers[i], "get k k k\r\n");
        }
        t_shut(askers[i]);
    }
    for (int i = 0; i < CHANGES; i++) {
        t_sends(fd, changes[i % 4]);
        t_expect(fd, answers[i % 4]);
    }
    for (int i = 0; i < ASKERS; i++) {
        size_t size = t_recv_all(askers[i], text, sizeof text - 1);
        text[size] = 0;
        for (at = text; (end = strstr(at, "\r\n")) != NULL; at = end + 2) {
            if (strncmp(at, "END\r\n", 5) != 0) {
                CHECK(strncmp(at, "VALUE k 0 2\r\naa\r\n", 17) == 0 ||
                      strncmp(at, "VALUE k 0 2\r\nbb\r\n", 17) == 0);
                end = at + 15;
            }
        }
        CHECK_STR(at, "");
        CHECK_INT(t_count(text, "END\r\n"), 10);
        t_close(askers[i]);
    }
    t_finish(fd);
    stop(&p);
}

/* ---- websocket ----------------------------------------------------------------------------*/

#define WS_HEAD "GET /socket HTTP/1.1\r\nHost: x:1\r\n"
#define WS_KEY "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" /* RFC 6455's own, section 1.3 */
#define WS_FIELDS "Upgrade: websocket\r\nConnection: Upgrade\r\n" WS_KEY
#define WS_VERSION "Sec-WebSocket-Version: 13\r\n"
#define WS_REQUEST WS_HEAD WS_FIELDS WS_VERSION "\r\n"
#define WS_OPEN                                                                                 \
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"       \
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
#define WS_REFUSED(status)                                                                     \
    "HTTP/1.1 " status "\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: 0\r\n" \
    "Connection: close\r\n\r\n"
#define WS_UPGRADE "426 Upgrade Required\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13"

enum { WS_MOST = 256 * 1024 }; /* the longest message */

static int open_websocket(program *p)
{
    int fd = t_connect(p->port);
    t_sends(fd, WS_REQUEST);
    t_expect(fd, WS_OPEN);
    return fd;
}

/* Writes a client's frame. Its first byte has the opcode, and 0x80 in the last one of a message.
 * Returns the frame's size. */
static size_t make_frame(char *to, int first, const char *data, size_t size)
{
    static const char mask[4] = {'\x37', '\xfa', '\x21', '\x3d'};
    size_t at = 0, more = size < 126 ? 0 : size < 65536 ? 2 : 8;
    to[at++] = (char)first;
    to[at++] = (char)(0x80 | (more == 0 ? size : more == 2 ? 126 : 127));
    for (size_t i = 0; i < more; i++) {
        to[at++] = (char)((uint64_t)size >> 8 * (more - 1 - i));
    }
    memcpy(to + at, mask, 4);
    at += 4;
    for (size_t i = 0; i < size; i++) {
        to[at++] = (char)(data[i] ^ mask[i % 4]);
    }
    return at;
}

static void send_frame(int fd, int first, const char *data, size_t size)
{
    char *frame = allocate(size + 14);
    t_send(fd, frame, make_frame(frame, first, data, size));
    free(frame);
}

/* A server's frame: in one piece, without a mask, and with the shortest length there is. */
static void expect_frame(int fd, int opcode, const char *data, size_t size)
{
    char head[10] = {0}, *got = allocate(size + 1);
    size_t more = size < 126 ? 0 : size < 65536 ? 2 : 8, length = 0;
    CHECK_INT(t_recv(fd, head, 2 + more), 2 + more);
    CHECK_INT((unsigned char)head[0], 0x80 | opcode);
    CHECK_INT((unsigned char)head[1], more == 0 ? size : more == 2 ? 126 : 127);
    for (size_t i = 0; i < more; i++) {
        length = length << 8 | (unsigned char)head[2 + i];
    }
    CHECK_INT(more == 0 ? size : length, size);
    CHECK_MEM(got, t_recv(fd, got, size), data, size);
    free(got);
}

static void expect_close(int fd, int code)
{
    char data[2] = {(char)(code >> 8), (char)code};
    expect_frame(fd, 8, data, 2);
    t_leave(fd);
}

/* Is the page at / in a browser, once its scripts have run, such that the filter ends well? Virtual time runs while
 * nothing is loaded, so a slow machine gives it no less; if it came too late all the same it is loaded again. */
static bool browser_shows(int port, const char *filter)
{
    char line[2048], directory[512];
    bool came = false;
    if (system("command -v chromium >/dev/null") != 0) {
        SKIP("chromium");
    }
    snprintf(directory, sizeof directory, "%s/chromium.XXXXXX", examples());
    CHECK(mkdtemp(directory) != NULL);
    snprintf(line, sizeof line,
             "cd %s && HOME=$PWD TMPDIR=$PWD XDG_CONFIG_HOME=$PWD XDG_CACHE_HOME=$PWD chromium --headless "
             "--no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage "
             "--user-data-dir=$PWD/profile --virtual-time-budget=20000 --dump-dom "
             "http://127.0.0.1:%d/ 2>/dev/null | %s",
             directory, port, filter);
    for (int64_t end = t_patience(); !came && t_now_ms() < end;) {
        came = system(line) == 0;
    }
    snprintf(line, sizeof line, "rm -rf %s", directory);
    CHECK_INT(system(line), 0);
    return came;
}

/* A page of the program's own, and the message that its script sends. */
TEST_MODES(websocket_answers_a_browser)
{
    program p = start_with("websocket", NULL, NULL);
    CHECK(browser_shows(p.port, "grep -q '<pre>hello, h\xc3\xa9llo$'"));
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

/* Another implementation: messages in parts, pings, both directions of a close, and 1009. */
TEST_MODES(websocket_answers_python)
{
    static const char script[] =
        "import asyncio, sys, websockets\n"
        "async def run(url):\n"
        "    async with websockets.connect(url) as w:\n"
        "        for m in ['', 'h\\u00e9', 'x' * 65536, b'\\xff\\x00' * 60000]:\n"
        "            await w.send(m)\n"
        "            assert await w.recv() == m\n"
        "        await w.send(['a', 'b\\u20ac', '', 'c'])\n"
        "        assert await w.recv() == 'ab\\u20acc'\n"
        "        await (await w.ping(b'hello'))\n"
        "    assert w.close_code == 1000, w.close_code\n"
        "    async with websockets.connect(url) as w:\n"
        "        await w.send('x' * 300000)\n"
        "        try:\n"
        "            await w.recv()\n"
        "        except websockets.exceptions.ConnectionClosedError as e:\n"
        "            assert e.code == 1009, e.code\n"
        "            print('good')\n"
        "asyncio.run(run(sys.argv[1]))\n";
    char line[sizeof script + 256];
    if (system("/usr/bin/python3 -c 'import websockets' 2>/dev/null") != 0) {
        SKIP("python3-websockets");
    }
    program p = start_with("websocket", NULL, NULL);
    snprintf(line, sizeof line, "/usr/bin/python3 -c \"%s\" ws://127.0.0.1:%d/socket | grep -q good",
             script, p.port);
    CHECK_INT(system(line), 0);
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

/* Who may open a WebSocket, and how it is asked for. */
TEST_MODES(websocket_shakes_hands)
{
    static const char *const good[] = {
        WS_REQUEST,
        WS_HEAD "upgrade:\tWebSocket \r\nCONNECTION: keep-alive, upgrade\r\n" WS_KEY WS_VERSION "\r\n",
        WS_HEAD "Connection: keep-alive\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n"
                "Connection: Upgrade\r\n" WS_KEY WS_VERSION "\r\n",
        WS_HEAD WS_FIELDS "Sec-WebSocket-Version:13 \r\n\r\n",
        WS_HEAD WS_FIELDS WS_VERSION "Origin: http://x:1\r\n\r\n",
        WS_HEAD WS_FIELDS WS_VERSION "origin: HTTPS://X:1 \r\n\r\n",
        "GET /socket?query HTTP/1.1\r\nHost: x\r\n" WS_FIELDS WS_VERSION "Cookie: a\r\n\r\n",
    };
    static const exchange_step bad[] = {
        {WS_HEAD "\r\n", WS_REFUSED("400 Bad Request")},
        {"GET /socket HTTP/1.1\r\n" WS_FIELDS WS_VERSION "\r\n", WS_REFUSED("400 Bad Request")},
        {"GET /socket HTTP/1.0\r\nHost: x\r\n" WS_FIELDS WS_VERSION "\r\n",
         WS_REFUSED("400 Bad Request")},
        {WS_HEAD "Connection: Upgrade\r\n" WS_KEY WS_VERSION "\r\n", WS_REFUSED("400 Bad Request")},
        {WS_HEAD "Upgrade: websocket\r\n" WS_KEY WS_VERSION "\r\n", WS_REFUSED("400 Bad Request")},
        {WS_HEAD "Upgrade: h2c\r\nConnection: Upgrade\r\n" WS_KEY WS_VERSION "\r\n",
         WS_REFUSED("400 Bad Request")},
        {WS_HEAD "Upgrade: websocket\r\nConnection: Upgrade\r\n" WS_VERSION "\r\n",
         WS_REFUSED("400 Bad Request")},
        {WS_HEAD WS_FIELDS WS_KEY WS_VERSION "\r\n", WS_REFUSED("400 Bad Request")},
        {WS_HEAD "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=\r\n" WS_VERSION "\r\n",
         WS_REFUSED("400 Bad Request")},
        {WS_HEAD "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==x\r\n" WS_VERSION "\r\n",
         WS_REFUSED("400 Bad Request")},
        {WS_HEAD "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j==  \r\n" WS_VERSION "\r\n",
         WS_REFUSED("400 Bad Request")},
        {WS_HEAD "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                 "Sec-WebSocket-Key: \r\n" WS_VERSION "\r\n",
         WS_REFUSED("400 Bad Request")},
        {WS_HEAD WS_FIELDS WS_VERSION "Content-Length: 1\r\n\r\nx", WS_REFUSED("400 Bad Request")},
        {WS_HEAD WS_FIELDS "\r\n", WS_REFUSED(WS_UPGRADE)},
        {WS_HEAD WS_FIELDS "Sec-WebSocket-Version: 8\r\n\r\n", WS_REFUSED(WS_UPGRADE)},
        {WS_HEAD WS_FIELDS "Sec-WebSocket-Version: 130\r\n\r\n", WS_REFUSED(WS_UPGRADE)},
        /* The page of somebody else. */
        {WS_HEAD WS_FIELDS WS_VERSION "Origin: http://y:1\r\n\r\n", WS_REFUSED("403 Forbidden")},
        {WS_HEAD WS_FIELDS WS_VERSION "Origin: http://x:12\r\n\r\n", WS_REFUSED("403 Forbidden")},
        {WS_HEAD WS_FIELDS WS_VERSION "Origin: http://x\r\n\r\n", WS_REFUSED("403 Forbidden")},
        {WS_HEAD WS_FIELDS WS_VERSION "Origin: http://y/http://x:1\r\n\r\n",
         WS_REFUSED("403 Forbidden")},
        {WS_HEAD WS_FIELDS WS_VERSION "Origin: null\r\n\r\n", WS_REFUSED("403 Forbidden")},
        {"GET /other HTTP/1.1\r\nHost: x:1\r\n" WS_FIELDS WS_VERSION "\r\n",
         WS_REFUSED("404 Not Found")},
        {"POST /socket HTTP/1.1\r\nHost: x:1\r\n" WS_FIELDS WS_VERSION "\r\n",
         WS_REFUSED("405 Not Allowed\r\nAllow: GET")},
        {"nonsense\r\n\r\n", WS_REFUSED("400 Bad Request")},
        {"GET /socket HTTP/1.1\r\nHost: x:1\r\nUpgrade : websocket\r\n\r\n",
         WS_REFUSED("400 Bad Request")},
    };
    program p = start_with("websocket", NULL, NULL);
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        int fd = t_connect(p.port);
        t_sends(fd, good[i]);
        t_expect(fd, WS_OPEN);
        send_frame(fd, 0x81, "hello", 5);
        expect_frame(fd, 1, "hello", 5);
        t_finish(fd);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        int fd = t_connect(p.port);
        t_sends(fd, bad[i].send);
        t_expect(fd, bad[i].expect);
        t_leave(fd);
    }
    char *head = allocate(BIG);
    memset(head, 'x', BIG);
    int fd = t_connect(p.port);
    t_send(fd, head, BIG);
    t_expect(fd, WS_REFUSED("431 Request Header Fields Too Large"));
    t_leave(fd);
    free(head);
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

/* Every form of a length, texts and bytes; the head and its first frame may come together. */
TEST_MODES(websocket_sends_messages_back)
{
    static const size_t sizes[] = {0, 1, 2, 125, 126, 127, 1000, 65535, 65536, WS_MOST};
    program p = start_with("websocket", NULL, NULL);
    char *data = allocate(WS_MOST), *text = allocate(WS_MOST), *out = allocate(WS_MOST + 1024);
    make_pattern();
    for (size_t i = 0; i < WS_MOST; i++) {
        data[i] = pattern[i % PATTERN];
        text[i] = (char)('a' + i % 26);
    }
    int fd = open_websocket(&p);
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        send_frame(fd, 0x82, data, sizes[i]);
        expect_frame(fd, 2, data, sizes[i]);
        send_frame(fd, 0x81, text, sizes[i]);
        expect_frame(fd, 1, text, sizes[i]);
    }
    t_finish(fd);
    fd = t_connect(p.port);
    size_t size = (size_t)sprintf(out, "%s", WS_REQUEST);
    for (size_t i = 0; i < 5; i++) {
        size += make_frame(out + size, 0x81, text, i);
    }
    t_send(fd, out, size);
    t_expect(fd, WS_OPEN);
    for (size_t i = 0; i < 5; i++) {
        expect_frame(fd, 1, text, i);
    }
    t_finish(fd);
    free(data);
    free(text);
    free(out);
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

/* Messages in parts, with pings and pongs between them, in pieces of every size: the other
 * connection's round trip makes these arrive one by one. */
TEST_MODES(websocket_joins_parts_split_at_every_byte)
{
    char script[512], long_ping[125];
    size_t size = 0;
    memset(long_ping, 'p', sizeof long_ping);
    size += make_frame(script + size, 0x01, "h\xc3", 2); /* cut within a letter */
    size += make_frame(script + size, 0x89, "one", 3);
    size += make_frame(script + size, 0x00, "", 0);
    size += make_frame(script + size, 0x8a, "nobody has asked", 16);
    size += make_frame(script + size, 0x80, "\xa9llo", 4);
    size += make_frame(script + size, 0x02, "", 0);
    size += make_frame(script + size, 0x89, long_ping, sizeof long_ping);
    size += make_frame(script + size, 0x00, "\xff", 1);
    size += make_frame(script + size, 0x89, "", 0);
    size += make_frame(script + size, 0x80, "\x00\x80", 2);
    size += make_frame(script + size, 0x81, "whole", 5);
    program p = start_with("websocket", NULL, NULL);
    int fd = open_websocket(&p), other = open_websocket(&p);
    for (size_t at = 0; at <= size; at++) {
        t_send(fd, script, at);
        send_frame(other, 0x81, "meanwhile", 9);
        expect_frame(other, 1, "meanwhile", 9);
        t_send(fd, script + at, size - at);
        expect_frame(fd, 10, "one", 3);
        expect_frame(fd, 1, "h\xc3\xa9llo", 6);
        expect_frame(fd, 10, long_ping, sizeof long_ping);
        expect_frame(fd, 10, "", 0);
        expect_frame(fd, 2, "\xff\x00\x80", 3);
        expect_frame(fd, 1, "whole", 5);
    }
    t_finish(fd);
    t_finish(other);
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

/* What comes behind a good message, and the code that it is answered with. */
typedef struct bad_frames {
    const char *bytes;
    size_t size;
    int code;
} bad_frames;

#define FRAMES(bytes, code) {bytes, sizeof bytes - 1, code}
#define NO_MASK "\0\0\0\0"

TEST_MODES(websocket_closes_what_it_does_not_understand)
{
    static const bad_frames bad[] = {
        FRAMES("\x81\x05hello", 1002),                    /* no mask */
        FRAMES("\xc1\x80" NO_MASK, 1002),                 /* reserved bits: nothing was agreed on */
        FRAMES("\xa1\x80" NO_MASK, 1002),
        FRAMES("\x91\x80" NO_MASK, 1002),
        FRAMES("\x83\x80" NO_MASK, 1002),                 /* opcodes that there are not */
        FRAMES("\x87\x80" NO_MASK, 1002),
        FRAMES("\x8b\x80" NO_MASK, 1002),
        FRAMES("\x8f\x80" NO_MASK, 1002),
        FRAMES("\x09\x80" NO_MASK, 1002),                 /* a ping in parts */
        FRAMES("\x08\x80" NO_MASK, 1002),
        FRAMES("\x89\xfe\0\x7e" NO_MASK, 1002),           /* one of 126 bytes */
        FRAMES("\x88\xfe\0\x7e" NO_MASK, 1002),
        FRAMES("\x80\x80" NO_MASK, 1002),                 /* a part of nothing */
        FRAMES("\x00\x80" NO_MASK, 1002),
        FRAMES("\x01\x80" NO_MASK "\x81\x80" NO_MASK, 1002), /* a message within another one */
        FRAMES("\x02\x80" NO_MASK "\x01\x80" NO_MASK, 1002),
        FRAMES("\x81\xfe\0\x7d" NO_MASK, 1002),           /* a length that could be shorter */
        FRAMES("\x81\xff\0\0\0\0\0\0\xff\xff" NO_MASK, 1002),
        FRAMES("\x81\xff\0\0\0\0\0\x04\0\x01" NO_MASK, 1009),
        FRAMES("\x82\xff\x80\0\0\0\0\0\0\0" NO_MASK, 1009),
        FRAMES("\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff" NO_MASK, 1009),
        FRAMES("\x01\xff\0\0\0\0\0\x04\0\x01" NO_MASK, 1009),
        /* Texts that are none: cut, too long a form, surrogates, above 10FFFF, a byte of its own. */
        FRAMES("\x81\x81" NO_MASK "\xc3", 1007),
        FRAMES("\x81\x82" NO_MASK "\xe2\x82", 1007),
        FRAMES("\x81\x83" NO_MASK "\xf0\x9f\x98", 1007),
        FRAMES("\x81\x82" NO_MASK "\xc0\x80", 1007),
        FRAMES("\x81\x82" NO_MASK "\xc1\xbf", 1007),
        FRAMES("\x81\x83" NO_MASK "\xe0\x9f\xbf", 1007),
        FRAMES("\x81\x84" NO_MASK "\xf0\x8f\xbf\xbf", 1007),
        FRAMES("\x81\x83" NO_MASK "\xed\xa0\x80", 1007),
        FRAMES("\x81\x83" NO_MASK "\xed\xbf\xbf", 1007),
        FRAMES("\x81\x84" NO_MASK "\xf4\x90\x80\x80", 1007),
        FRAMES("\x81\x84" NO_MASK "\xf5\x80\x80\x80", 1007),
        FRAMES("\x81\x81" NO_MASK "\x80", 1007),
        FRAMES("\x81\x82" NO_MASK "\xff\x80", 1007),
        FRAMES("\x81\x83" NO_MASK "\xe2\x28\xa1", 1007),
        FRAMES("\x81\x84" NO_MASK "\xf0\x9f\x98\x28", 1007),
        FRAMES("\x01\x82" NO_MASK "a\xc3\x80\x81" NO_MASK "b", 1007),
    };
    program p = start_with("websocket", NULL, NULL);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        int fd = open_websocket(&p);
        send_frame(fd, 0x81, "good", 4);
        t_send(fd, bad[i].bytes, bad[i].size);
        send_frame(fd, 0x81, "not any more", 12);
        expect_frame(fd, 1, "good", 4);
        expect_close(fd, bad[i].code);
    }
    /* What is at the bounds of UTF-8 is text. */
    static const char text[] = "\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xef\xbf\xbf"
                               "\xf0\x90\x80\x80\xf4\x8f\xbf\xbf";
    int fd = open_websocket(&p);
    send_frame(fd, 0x81, text, sizeof text - 1);
    expect_frame(fd, 1, text, sizeof text - 1);
    t_finish(fd);
    /* A message may be as long as a frame, and no longer. */
    char *half = allocate(WS_MOST);
    memset(half, 'h', WS_MOST);
    for (size_t more = 0; more < 2; more++) {
        fd = open_websocket(&p);
        send_frame(fd, 0x01, half, WS_MOST / 2);
        send_frame(fd, 0x00, half, WS_MOST / 2);
        send_frame(fd, 0x80, "x", more);
        if (more == 0) {
            expect_frame(fd, 1, half, WS_MOST);
            t_finish(fd);
        } else {
            expect_close(fd, 1009);
        }
    }
    free(half);
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

TEST_MODES(websocket_closes_when_it_is_asked_to)
{
    static const struct {
        const char *data;
        size_t size;
        int code;
    } closes[] = {
        {"", 0, 1000},           {"\x03\xe8", 2, 1000},      {"\x03\xe9h\xc3\xa9", 5, 1001},
        {"\x03\xeb", 2, 1003},   {"\x03\xef", 2, 1007},      {"\x03\xf3", 2, 1011},
        {"\x03\xf6", 2, 1014},   {"\x0b\xb8", 2, 3000},      {"\x13\x87", 2, 4999},
        {"\x03", 1, 1002},       {"\x00\x00", 2, 1002},      {"\x03\xe7", 2, 1002},
        {"\x03\xec", 2, 1002},   {"\x03\xed", 2, 1002},      {"\x03\xee", 2, 1002},
        {"\x03\xf7", 2, 1002},   {"\x07\xd0", 2, 1002},      {"\x0b\xb7", 2, 1002},
        {"\x13\x88", 2, 1002},   {"\xff\xff", 2, 1002},      {"\x03\xe8\xff", 3, 1007},
        {"\x03\xe8\xc3", 3, 1007},
    };
    program p = start_with("websocket", NULL, NULL);
    for (size_t i = 0; i < sizeof closes / sizeof closes[0]; i++) {
        int fd = open_websocket(&p);
        send_frame(fd, 0x01, "begun", 5);
        send_frame(fd, 0x88, closes[i].data, closes[i].size);
        send_frame(fd, 0x80, "not any more", 12);
        expect_close(fd, closes[i].code);
    }
    /* Without a close frame: an end, a reset, in the middle of a message, a frame, a head. */
    static const size_t cuts[] = {1, 30, sizeof WS_REQUEST - 1, sizeof WS_REQUEST + 1,
                                  sizeof WS_REQUEST + 5};
    for (size_t i = 0; i < 2 * sizeof cuts / sizeof cuts[0]; i++) {
        int fd = t_connect(p.port);
        t_send(fd, WS_REQUEST "\x01\xff\0\0\0\0\0", cuts[i / 2]);
        if (i % 2) {
            t_reset(fd);
        } else {
            t_shut(fd);
            t_drain_and_close(fd);
        }
    }
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

/* Who is silent is asked once, and has to say something: anything. */
TEST_MODES(websocket_pings_who_is_silent)
{
    program p = start_with("websocket", "1", NULL);
    int64_t begin = t_now_ms();
    int silent = open_websocket(&p), there = open_websocket(&p);
    for (int i = 0; i < 3; i++) {
        expect_frame(there, 9, "", 0);
        send_frame(there, 0x8a, "", 0);
    }
    expect_frame(silent, 9, "", 0);
    t_expect_eof(silent);
    CHECK_NEAR_MS(t_now_ms() - begin, 2800, 8000);
    send_frame(there, 0x81, "still here", 10);
    expect_frame(there, 1, "still here", 10);
    t_close(silent);
    t_finish(there);
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

/* In a drain what is under way is answered, and then everybody hears that the server goes away. */
TEST_MODES(websocket_goes_away)
{
    program p = start_with("websocket", NULL, NULL);
    int idle = open_websocket(&p), busy = open_websocket(&p), later = t_connect(p.port);
    char frame[64];
    size_t size = make_frame(frame, 0x81, "under way", 9);
    t_send(busy, frame, 5);
    t_sends(later, "GET /sock");
    send_frame(idle, 0x81, "hello", 5);
    expect_frame(idle, 1, "hello", 5);
    send_signal(&p, SIGTERM);
    expect_close(idle, 1001);
    t_send(busy, frame + 5, size - 5);
    expect_frame(busy, 1, "under way", 9);
    expect_close(busy, 1001);
    t_sends(later, &WS_REQUEST[9]);
    t_expect(later, WS_OPEN);
    expect_close(later, 1001);
    expect_end(&p);
}

/* ---- upload -------------------------------------------------------------------------------*/

#define PUT_REPLY(status) \
    "HTTP/1.1 " status "\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

/* A program that keeps uploads in a directory of its own, and the writing end of its stdin. */
typedef struct store {
    program upload;
    char directory[512];
    int gate;
} store;

static store start_upload(void)
{
    store s;
    char line[512];
    int fds[2];
    snprintf(s.directory, sizeof s.directory, "%s/upload.XXXXXX", examples());
    CHECK(mkdtemp(s.directory) != NULL);
    const char *arguments[3] = {"0", s.directory, NULL};
    CHECK(pipe(fds) == 0);
    CHECK(fcntl(fds[1], F_SETFD, FD_CLOEXEC) == 0);
    s.upload = launch("upload", arguments, fds[0], line, sizeof line);
    CHECK_INT(sscanf(line, "port %d", &s.upload.port), 1);
    t_close(fds[0]);
    s.gate = fds[1];
    make_pattern();
    return s;
}

/* How many files there are, half ones included. */
static int count_files(const char *directory)
{
    int count = 0;
    DIR *d = opendir(directory);
    CHECK(d != NULL);
    for (struct dirent *e = readdir(d); e != NULL; e = readdir(d)) {
        count += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
    }
    closedir(d);
    return count;
}

static bool is_empty(void *directory)
{
    return count_files((const char *)directory) == 0;
}

static bool has_one_file(void *directory)
{
    return count_files((const char *)directory) == 1;
}

/* The file must hold the pattern's first bytes, so many of them. It is removed. */
static void take_file(const store *s, const char *name, size_t size)
{
    char path[600], *got = allocate(PATTERN);
    struct stat file;
    snprintf(path, sizeof path, "%s/%s", s->directory, name);
    int fd = open(path, O_RDONLY);
    CHECK(fd >= 0);
    CHECK(fstat(fd, &file) == 0);
    CHECK_INT(file.st_size, size);
    for (size_t at = 0, n; at < size; at += n) {
        n = size - at < PATTERN ? size - at : PATTERN;
        CHECK_INT(read(fd, got, n), n);
        CHECK_MEM(got, n, pattern, n);
    }
    t_close(fd);
    CHECK(unlink(path) == 0);
    free(got);
}

static void stop_upload(store *s)
{
    CHECK_INT(count_files(s->directory), 0);
    CHECK(rmdir(s->directory) == 0);
    t_close(s->gate);
    send_signal(&s->upload, SIGTERM);
    expect_end(&s->upload);
}

static int begin_put(const store *s, const char *name, size_t size)
{
    char head[256];
    int fd = t_connect(s->upload.port);
    snprintf(head, sizeof head, "PUT /%s HTTP/1.1\r\nHost: x\r\nContent-Length: %zu\r\n\r\n", name, size);
    t_sends(fd, head);
    return fd;
}

/* Bytes [from, to) of the pattern, which goes on and on. */
static void send_pattern(int fd, size_t from, size_t to)
{
    for (size_t n; from < to; from += n) {
        n = to - from < PATTERN ? to - from : PATTERN;
        t_send(fd, pattern + from % PATTERN, n);
    }
}

TEST_ONCE(upload_keeps_files)
{
    enum { LARGE = 8 * 1024 * 1024 + 7 };
    store s = start_upload();
    int fd = begin_put(&s, "none", 0);
    t_expect(fd, PUT_REPLY("201 Created"));
    t_leave(fd);
    take_file(&s, "none", 0);
    fd = begin_put(&s, "a-Large_file.bin", LARGE);
    send_pattern(fd, 0, LARGE);
    t_expect(fd, PUT_REPLY("201 Created"));
    t_leave(fd);
    take_file(&s, "a-Large_file.bin", LARGE);

    /* In the place of an older one, at once: of two that come side by side each is whole, and the
     * second is told that there was one. */
    int other = begin_put(&s, "x", 70000);
    fd = begin_put(&s, "x", 90000);
    send_pattern(fd, 0, 50000);
    send_pattern(other, 0, 70000);
    t_expect(other, PUT_REPLY("201 Created"));
    send_pattern(fd, 50000, 90000);
    t_expect(fd, PUT_REPLY("200 OK"));
    t_leave(fd);
    t_leave(other);
    take_file(&s, "x", 90000);

    /* Who waits until it is asked for the body is asked. What is behind the body is not read. */
    fd = t_connect(s.upload.port);
    t_sends(fd, "PUT /x?query HTTP/1.1\r\nHost: x\r\nExpect: 100-Continue\r\nContent-Length: 9\r\n\r\n");
    t_expect(fd, "HTTP/1.1 100 Continue\r\n\r\n");
    send_pattern(fd, 0, 9);
    t_sends(fd, "PUT /y HTTP/1.1\r\nHost: x\r\n\r\n");
    t_expect(fd, PUT_REPLY("201 Created"));
    t_leave(fd);
    take_file(&s, "x", 9);
    stop_upload(&s);
}

/* As somebody would do it: 32 MiB, or UPLOAD_MIB of them. */
TEST_ONCE(upload_takes_what_curl_sends)
{
    const char *given = getenv("UPLOAD_MIB");
    size_t size = (size_t)(given != NULL ? atoi(given) : 32) * 1024 * 1024;
    char path[600], line[4096];
    if (system("command -v curl >/dev/null") != 0) {
        SKIP("curl");
    }
    store s = start_upload();
    snprintf(path, sizeof path, "%s.sent", s.directory);
    FILE *file = fopen(path, "w");
    CHECK(file != NULL);
    for (size_t at = 0, n; at < size; at += n) {
        n = size - at < PATTERN ? size - at : PATTERN;
        CHECK_INT(fwrite(pattern, 1, n, file), n);
    }
    CHECK(fclose(file) == 0);
    snprintf(line, sizeof line,
             "test \"$(curl --noproxy '*' -sS -o /dev/null -w '%%{http_code}' -T %s "
             "http://127.0.0.1:%d/sent)\" = 201 && cmp %s %s/sent",
             path, s.upload.port, path, s.directory);
    CHECK_INT(system(line), 0);
    take_file(&s, "sent", size);
    CHECK(unlink(path) == 0);
    stop_upload(&s);
}

/* Names that lead elsewhere, or to what is hidden; sizes that are too large; other methods. */
TEST_ONCE(upload_refuses_what_it_cannot_keep)
{
    static const exchange_step bad[] = {
        {"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", PUT_REPLY("404 Not Found")},
        {"PUT /.x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", PUT_REPLY("404 Not Found")},
        {"PUT /.. HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", PUT_REPLY("404 Not Found")},
        {"PUT /../x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", PUT_REPLY("404 Not Found")},
        {"PUT /a/b HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", PUT_REPLY("404 Not Found")},
        {"PUT //x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", PUT_REPLY("404 Not Found")},
        {"PUT /a%2fb HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", PUT_REPLY("404 Not Found")},
        {"GET /x HTTP/1.1\r\nHost: x\r\n\r\n", PUT_REPLY("405 Not Allowed\r\nAllow: PUT")},
        {"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx",
         PUT_REPLY("405 Not Allowed\r\nAllow: PUT")},
        {"PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 2147483648\r\nExpect: 100-continue\r\n\r\n",
         PUT_REPLY("413 Content Too Large")},
        {"PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 18446744073709551617\r\n\r\n",
         PUT_REPLY("413 Content Too Large")},
        {"PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
         PUT_REPLY("400 Bad Request")},
        {"PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Range: bytes 0-0/2\r\n\r\nx",
         PUT_REPLY("400 Bad Request")},
        {"PUT /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
         PUT_REPLY("501 Not Implemented")},
        {"nonsense\r\n\r\n", PUT_REPLY("400 Bad Request")},
    };
    store s = start_upload();
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        int fd = t_connect(s.upload.port);
        t_sends(fd, bad[i].send);
        t_expect(fd, bad[i].expect);
        t_leave(fd);
    }
    /* A directory has the name already. */
    char path[600];
    snprintf(path, sizeof path, "%s/x", s.directory);
    CHECK(mkdir(path, 0700) == 0);
    int fd = begin_put(&s, "x", 1);
    send_pattern(fd, 0, 1);
    t_expect(fd, PUT_REPLY("500 Internal Server Error"));
    t_leave(fd);
    CHECK(rmdir(path) == 0);
    stop_upload(&s);
}

/* However a connection is cut, and even when the program ends: nobody ever finds half a file. */
TEST_ONCE(upload_leaves_no_half_file)
{
    enum { SIZE = 1024 * 1024 };
    store s = start_upload();
    for (int way = 0; way < 2; way++) {
        int fd = begin_put(&s, "x", SIZE);
        send_pattern(fd, 0, SIZE / 2);
        CHECK(t_wait_until(has_one_file, s.directory)); /* under a name of its own */
        if (way == 0) {
            t_shut(fd);
            t_expect(fd, PUT_REPLY("400 Bad Request"));
            t_leave(fd);
        } else {
            t_reset(fd);
        }
        CHECK(t_wait_until(is_empty, s.directory));
    }
    /* A drain waits for who is under way; a second signal ends its patience. */
    int whole = begin_put(&s, "whole", SIZE), idle;
    send_pattern(whole, 0, SIZE - 1);
    CHECK(t_wait_until(has_one_file, s.directory));
    idle = t_connect(s.upload.port);
    send_signal(&s.upload, SIGTERM);
    t_expect_eof(idle); /* so would the other one, which is silent for longer, if it were idle */
    t_close(idle);
    send_pattern(whole, SIZE - 1, SIZE);
    t_expect(whole, PUT_REPLY("201 Created"));
    t_leave(whole);
    expect_end(&s.upload);
    take_file(&s, "whole", SIZE);
    CHECK(rmdir(s.directory) == 0);
    t_close(s.gate);

    s = start_upload();
    int half = begin_put(&s, "half", SIZE);
    send_pattern(half, 0, SIZE - 1);
    CHECK(t_wait_until(has_one_file, s.directory));
    send_signal(&s.upload, SIGTERM);
    for (int64_t end = t_patience(); !t_is_refused(s.upload.port);) {
        CHECK(t_now_ms() < end);
    }
    send_signal(&s.upload, SIGTERM);
    expect_end(&s.upload);
    t_close(half);
    CHECK_INT(count_files(s.directory), 0);
    CHECK(rmdir(s.directory) == 0);
    t_close(s.gate);
}

/* A disk that writes nothing: who sends has to wait, with what the kernel and one block hold, and
 * everybody else is served. Then it writes again, and nothing is lost. */
TEST_ONCE(upload_slows_the_sender_down_and_nobody_else)
{
    enum { TOTAL = 64 * 1024 * 1024, HELD = 24 * 1024 * 1024, WAIT = 300 };
    variant = "gated_";
    store s = start_upload();
    int fd = begin_put(&s, "x", TOTAL);
    struct pollfd room = {fd, POLLOUT, 0};
    size_t sent = 0;
    while (sent < TOTAL && poll(&room, 1, WAIT) == 1) {
        sent = push(fd, sent, TOTAL);
    }
    if (sent > HELD) {
        T_FAIL("the program took %zu bytes for a disk that writes nothing", sent);
    }
    for (int i = 0; i < 20; i++) { /* more than there are threads */
        int other = begin_put(&s, "", 0);
        t_expect(other, PUT_REPLY("404 Not Found"));
        t_leave(other);
    }
    CHECK_INT(write(s.gate, "wwww", 4), 4); /* four blocks */
    t_close(s.gate);
    while (sent < TOTAL) {
        CHECK_INT(poll(&room, 1, t_patience_ms()), 1);
        sent = push(fd, sent, TOTAL);
    }
    t_expect(fd, PUT_REPLY("201 Created"));
    t_leave(fd);
    take_file(&s, "x", TOTAL);
    s.gate = open("/dev/null", O_WRONLY);
    stop_upload(&s);
}

TEST_ONCE(upload_says_that_the_disk_is_full)
{
    enum { SIZE = 4 * 1024 * 1024 };
    variant = "gated_";
    store s = start_upload();
    char *sent = allocate(SIZE);
    memset(sent, 'x', SIZE);
    for (int good = 0; good < 3; good++) {
        CHECK_INT(write(s.gate, &"wwe"[2 - good], (size_t)good + 1), good + 1);
        int fd = begin_put(&s, "x", SIZE);
        t_send(fd, sent, SIZE); /* the rest does not turn the answer into a reset */
        t_expect(fd, PUT_REPLY("507 Insufficient Storage"));
        t_leave(fd);
        CHECK(t_wait_until(is_empty, s.directory));
    }
    free(sent);
    stop_upload(&s);
}

/* ---- unix_socket --------------------------------------------------------------------------*/

static int connect_unix(const char *path)
{
    struct sockaddr_un address = t_unix_address(path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(fd >= 0);
    t_prepare(fd);
    CHECK(connect(fd, (struct sockaddr *)&address, sizeof address) == 0);
    return fd;
}

static program start_unix_socket(char *path, size_t capacity)
{
    const char *arguments[3] = {path, NULL, NULL};
    char line[512];
    snprintf(path, capacity, "%s/unix_socket.%ld", examples(), (long)getpid());
    program p = launch("unix_socket", arguments, -1, line, sizeof line);
    CHECK_STR(line, path);
    return p;
}

TEST_ONCE(unix_socket_greets_and_cleans_up)
{
    char path[256], greeting[128];
    struct stat file;
    program p = start_unix_socket(path, sizeof path);
    CHECK(lstat(path, &file) == 0);
    CHECK(S_ISSOCK(file.st_mode));
    CHECK_INT(file.st_mode & 07777, 0660);
#ifdef __linux__
    snprintf(greeting, sizeof greeting, "hello, user %ld in process %ld\n", (long)getuid(),
             (long)getpid());
#else
    snprintf(greeting, sizeof greeting, "hello, whoever you are\n");
#endif
    for (int i = 0; i < 2; i++) {
        int fd = connect_unix(path);
        t_expect(fd, greeting);
        t_echo(fd, "a line\nanother\n");
        t_finish(fd);
    }
    send_signal(&p, SIGTERM);
    expect_end(&p);
    CHECK(lstat(path, &file) != 0);
    CHECK_INT(errno, ENOENT);
}

/* The file of a server that was killed is replaced. */
TEST_ONCE(unix_socket_starts_again_after_a_kill)
{
    char path[256], byte[1];
    program p = start_unix_socket(path, sizeof path);
    send_signal(&p, SIGKILL);
    int status = end_of(&p);
    CHECK(WIFSIGNALED(status));
    CHECK(access(path, F_OK) == 0);
    p = start_unix_socket(path, sizeof path);
    int fd = connect_unix(path);
    CHECK_INT(t_recv(fd, byte, 1), 1);
    CHECK_MEM(byte, 1, "h", 1);
    send_signal(&p, SIGINT);
    expect_end(&p);
    CHECK(access(path, F_OK) != 0);
    t_close(fd);
}

/* ---- embed_loop ---------------------------------------------------------------------------*/

TEST_ONCE(embed_loop_joins_stdin_and_clients)
{
    const char *arguments[3] = {"0", NULL, NULL};
    char line[512];
    int input[2];
    CHECK(pipe(input) == 0);
    CHECK(fcntl(input[1], F_SETFD, FD_CLOEXEC) == 0);
    program p = launch("embed_loop", arguments, input[0], line, sizeof line);
    CHECK_INT(sscanf(line, "port %d", &p.port), 1);
    t_close(input[0]);
    int ann = t_connect(p.port), bob = t_connect(p.port);
    t_sends(ann, "from ann\n");
    expect_output(&p, "from ann");
    t_sends(bob, "from bob\nand again\n");
    expect_output(&p, "from bob");
    expect_output(&p, "and again");
    for (int i = 0; i < 3; i++) {
        snprintf(line, sizeof line, "to all, %d\n", i);
        CHECK_INT(write(input[1], line, strlen(line)), strlen(line));
        t_expect(ann, line);
        t_expect(bob, line);
    }
    t_sends(ann, "still ann\n");
    expect_output(&p, "still ann");
    t_finish(ann);
    CHECK_INT(write(input[1], "bob?\n", 5), 5);
    t_expect(bob, "bob?\n");
    t_close(input[1]);
    t_leave(bob);
    expect_end(&p);
}

/* ---- threads ------------------------------------------------------------------------------*/

TEST_ONCE(threads_share_the_connections)
{
    enum { COUNT = 48 };
    int fds[COUNT], seen[4] = {0, 0, 0, 0}, different = 0;
    char greeting[16];
    program p = start_with("threads", NULL, NULL);
    for (int i = 0; i < COUNT; i++) {
        fds[i] = t_connect(p.port);
        size_t size = t_recv(fds[i], greeting, 9);
        CHECK_MEM(greeting, size - 2, "thread ", 7);
        CHECK(greeting[7] >= '0' && greeting[7] <= '3' && greeting[8] == '\n');
        different += seen[greeting[7] - '0']++ == 0;
    }
#ifdef __linux__
    CHECK(different > 1); /* by chance all of them on one: 4 to the power of -47 */
#else
    CHECK(different > 0);
#endif
    for (int i = 0; i < COUNT; i++) {
        t_sends(fds[i], "hello\n");
    }
    for (int i = 0; i < COUNT; i++) {
        t_expect(fds[i], "hello\n");
    }
    send_signal(&p, SIGTERM);
    for (int i = 0; i < COUNT; i++) {
        t_leave(fds[i]);
    }
    expect_end(&p);
}

/* ---- graceful_stop ------------------------------------------------------------------------*/

/* One client that is idle, and one whose line has begun. */
static program begin_graceful(int *idle, int *busy)
{
    program p = start_with("graceful_stop", NULL, NULL);
    *idle = t_connect(p.port);
    *busy = t_connect(p.port);
    t_sends(*busy, "hello\nha");
    t_expect(*busy, "hello\n");
    t_sends(*idle, "idle\n");
    t_expect(*idle, "idle\n");
    return p;
}

TEST_ONCE(graceful_stop_finishes_what_is_under_way)
{
    static const int signals[] = {SIGTERM, SIGINT};
    for (int i = 0; i < 2; i++) {
        int idle, busy;
        program p = begin_graceful(&idle, &busy);
        send_signal(&p, signals[i]);
        t_expect(idle, "good bye\n");
        t_leave(idle);
        poll(NULL, 0, 100); /* much less than the grace: the client may take its time */
        t_sends(busy, "lf\n");
        t_expect(busy, "half\ngood bye\n");
        t_leave(busy);
        expect_output(&p, "graceful_stop: all clients are served");
        expect_end(&p);
    }
}

TEST_ONCE(graceful_stop_second_signal_cuts_off)
{
    int idle, busy;
    program p = begin_graceful(&idle, &busy);
    int64_t begin = t_now_ms();
    send_signal(&p, SIGINT);
    t_expect(idle, "good bye\n"); /* the first one has been seen */
    t_leave(idle);
    send_signal(&p, SIGTERM);
    t_expect_reset(busy);
    t_close(busy);
    expect_output(&p, "graceful_stop: some were cut off");
    expect_end(&p);
    CHECK_NEAR_MS(t_now_ms() - begin, 0, 5000); /* of a grace of 10 s */
}

/* ---- the three ways to start, production --------------------------------------------------*/

/* Starts a program with workers on a free port. */
static program start_workers(const char *name, const char *processes)
{
    char port[16], line[512];
    program p;
    int free_port = t_free_port();
    snprintf(port, sizeof port, "%d", free_port);
    const char *arguments[3] = {port, processes, NULL};
    p = launch(name, arguments, -1, line, sizeof line);
    CHECK_INT(sscanf(line, "port %d", &p.port), 1);
    CHECK_INT(p.port, free_port);
    return p;
}

/* The worker that answers. */
static int ask_worker(int port)
{
    char text[64] = "";
    int worker = -2, fd = t_connect(port);
    size_t size = t_recv_all(fd, text, sizeof text - 1);
    text[size] = 0;
    CHECK_INT(sscanf(text, "hello from worker %d", &worker), 1);
    t_close(fd);
    return worker;
}

TEST_ONCE(listen_serves_from_one_process)
{
    program p = start("listen");
    CHECK_INT(ask_worker(p.port), -1);
    stop(&p);
}

/* All three workers answer, and SIGTERM ends all. */
static void serve_from_workers(const char *name)
{
    int seen = 0;
    program p = start_workers(name, "3");
    int64_t end = t_patience();
    while (seen != 7) {
        int worker = ask_worker(p.port);
        CHECK(worker >= 0 && worker < 3);
        seen |= 1 << worker;
        CHECK(t_now_ms() < end);
    }
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

TEST_ONCE(bind_start_serves_from_workers)
{
    serve_from_workers("bind_start");
}

TEST_ONCE(add_sockets_serves_from_workers)
{
    serve_from_workers("add_sockets");
}

/* Echoes, tells its figures, says good bye to an idle client when it is told to end, which a client
 * whose request is under way does not notice. */
TEST_ONCE(production_serves_counts_and_ends)
{
    unsigned long long accepted = 0, open = 0;
    char line[256];
    program p = start_workers("production", "2");
    int fd = t_connect(p.port), other = t_connect(p.port);
    t_echo(fd, "hello\n");
    t_echo(other, "hi\n");
    t_sends(fd, "stats\n");
    for (size_t used = 0; used + 1 < sizeof line; used++) {
        CHECK_INT(t_recv(fd, line + used, 1), 1);
        line[used + 1] = 0;
        if (line[used] == '\n') {
            break;
        }
    }
    CHECK_INT(sscanf(line, "accepted %llu, open %llu,", &accepted, &open), 2);
    CHECK_INT(accepted, 2);
    CHECK_INT(open, 2);
    CHECK(strstr(line, ", you are 127.0.0.1:") != NULL);
    t_echo(fd, "statsx\n");
    t_sends(other, "unfinis");
    send_signal(&p, SIGTERM);
    t_expect(fd, "bye: the server ends\n");
    t_expect_eof(fd);
    t_sends(other, "hed\nand more\n");
    t_expect(other, "unfinished\nand more\nbye: the server ends\n");
    t_expect_eof(other);
    t_close(fd);
    t_close(other);
    expect_end(&p);
}

/* ---- status -------------------------------------------------------------------------------*/

#define TEXT "text/plain; charset=utf-8"
#define KEPT(status, type, size)                                                    \
    "HTTP/1.1 " status "\r\nContent-Type: " type "\r\nContent-Length: " size "\r\n" \
    "Cache-Control: no-store\r\n\r\n"
#define ENDED(status, type, size)                                                   \
    "HTTP/1.1 " status "\r\nContent-Type: " type "\r\nContent-Length: " size "\r\n" \
    "Cache-Control: no-store\r\nConnection: close\r\n\r\n"

/* Starts the example with so many workers. Returns it, and in admin the port to see it by. */
static program start_status(const char *processes, int *admin)
{
    char line[256];
    program p = start_with("status", "0", processes);
    CHECK(t_read_line(p.output, line, sizeof line));
    CHECK_INT(sscanf(line, "status: look at http://127.0.0.1:%d/", admin), 1);
    return p;
}

/* Receives an answer of that type. Returns its body, which lives until the next, and its status. */
static const char *receive_body(int fd, const char *type, int *status)
{
    static char text[65536];
    char head[1024], expected[256];
    size_t used = 0, size = 0;
    while (used < 4 || memcmp(head + used - 4, "\r\n\r\n", 4) != 0) {
        CHECK(used + 1 < sizeof head);
        CHECK_INT(t_recv(fd, head + used, 1), 1);
        head[++used] = 0;
    }
    CHECK_INT(sscanf(head, "HTTP/1.1 %d ", status), 1);
    snprintf(expected, sizeof expected, "\r\nContent-Type: %s\r\n", type);
    CHECK_INT(t_count(head, expected), 1);
    CHECK_INT(sscanf(strstr(head, "\r\nContent-Length:"), "\r\nContent-Length: %zu", &size), 1);
    CHECK(size < sizeof text);
    CHECK_INT(t_recv(fd, text, size), size);
    text[size] = 0;
    CHECK_INT(strlen(text), size);
    return text;
}

static const char *ask_body(int fd, const char *path, const char *type)
{
    char request[128];
    int status;
    snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path);
    t_sends(fd, request);
    const char *text = receive_body(fd, type, &status);
    CHECK_INT(status, 200);
    return text;
}

static const char *receive_readiness(int fd, bool *ready)
{
    int status;
    const char *text = receive_body(fd, TEXT, &status);
    CHECK(status == 200 || status == 503);
    *ready = status == 200;
    return text;
}

TEST_ONCE(status_answers_probes_on_a_kept_connection)
{
    int admin;
    program p = start_status("2", &admin);
    int fd = t_connect(admin);
    static const exchange_step steps[] = {
        {"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", KEPT("200 OK", TEXT, "3") "ok\n"},
        {"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n", KEPT("200 OK", TEXT, "3") "ok\n"},
        {"GET /readyz?verbose HTTP/1.1\r\nHost: x\r\n\r\n", KEPT("200 OK", TEXT, "3") "ok\n"},
        {"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n", KEPT("200 OK", TEXT, "3")},
        {"GET /none HTTP/1.1\r\nHost: x\r\n\r\n", KEPT("404 Not Found", TEXT, "0")},
        {"GET /metrics/ HTTP/1.1\r\nHost: x\r\n\r\n", KEPT("404 Not Found", TEXT, "0")},
        {"POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
         KEPT("405 Not Allowed\r\nAllow: GET, HEAD", TEXT, "0")},
        {"DELETE / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
         KEPT("405 Not Allowed\r\nAllow: GET, HEAD", TEXT, "0")},
        {"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
         "GET /none HTTP/1.1\r\nHost: x\r\n\r\n"
         "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n",
         KEPT("200 OK", TEXT, "3") "ok\n" KEPT("404 Not Found", TEXT, "0")
             KEPT("200 OK", TEXT, "3") "ok\n"},
        {"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
         ENDED("200 OK", TEXT, "3") "ok\n"},
    };
    PLAY(fd, steps);
    t_leave(fd);
    /* What could be taken in two ways, and what has a body that nobody reads, is the last. */
    static const exchange_step lasts[] = {
        {"nonsense\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", ENDED("400 Bad Request", TEXT, "0")},
        {"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nGET / HTT",
         ENDED("200 OK", TEXT, "3") "ok\n"},
    };
    for (size_t i = 0; i < sizeof lasts / sizeof lasts[0]; i++) {
        fd = t_connect(admin);
        play(fd, &lasts[i], 1);
        t_leave(fd);
    }
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

/* Prometheus' text: how often each name comes, once a worker. */
static void check_metrics(const char *text, int workers)
{
    static const char *const names[] = {
        "connections_accepted_total", "connections_open",   "connections_closed_total",
        "received_bytes_total",       "sent_bytes_total",   "worker_restarts_total",
        "loop_lag_seconds",           "loop_lag_max_seconds"};
    static const char *const reasons[] = {"well", "here", "timeout", "reset", "error"};
    char part[128];
    for (int worker = 0; worker <= workers; worker++) {
        for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
            snprintf(part, sizeof part, "\ntsrv_%s{worker=\"%d\"} ", names[i], worker);
            CHECK_INT(t_count(text, part), worker < workers);
        }
        for (size_t i = 0; i < sizeof reasons / sizeof reasons[0]; i++) {
            snprintf(part, sizeof part,
                     "\ntsrv_connections_ended_total{worker=\"%d\",reason=\"%s\"} ", worker,
                     reasons[i]);
            CHECK_INT(t_count(text, part), worker < workers);
        }
    }
    CHECK(strncmp(text, "# HELP ", 7) == 0);
    CHECK(text[strlen(text) - 1] == '\n');
}

/* The sum of a counter of all workers. */
static int sum_metric(const char *text, const char *name)
{
    char part[64];
    int sum = 0;
    snprintf(part, sizeof part, "\ntsrv_%s{worker=\"", name);
    for (const char *at = strstr(text, part); at != NULL; at = strstr(at + 1, part)) {
        sum += atoi(strchr(at, ' '));
    }
    return sum;
}

#define METRICS "text/plain; version=0.0.4; charset=utf-8"

/* Asks, over a new connection each time, until the sum is as expected. */
static void await_metric(int admin, const char *name, int expected)
{
    int sum = -1;
    for (int64_t end = t_patience(); sum != expected;) {
        int fd = t_connect(admin);
        sum = sum_metric(ask_body(fd, "/metrics", METRICS), name);
        t_finish(fd);
        if (t_now_ms() > end) {
            T_FAIL("%s is %d, not %d", name, sum, expected);
        }
    }
}

/* Whichever worker answers: what the service has done, and not what is done on the admin port. What
 * was sent is counted after it was. */
TEST_ONCE(status_tells_the_figures_of_all_workers)
{
    enum { CLIENTS = 12 };
    int admin, fds[CLIENTS];
    program p = start_status("3", &admin);
    for (int i = 0; i < CLIENTS; i++) {
        fds[i] = t_connect(p.port);
        t_echo(fds[i], "four\n");
    }
    await_metric(admin, "sent_bytes_total", CLIENTS * 5);
    for (int i = 0; i < CLIENTS; i++) {
        int fd = t_connect(admin);
        const char *text = ask_body(fd, "/metrics", METRICS);
        check_metrics(text, 3);
        CHECK_INT(sum_metric(text, "connections_accepted_total"), CLIENTS);
        CHECK_INT(sum_metric(text, "connections_open"), CLIENTS);
        CHECK_INT(sum_metric(text, "received_bytes_total"), CLIENTS * 5);
        CHECK_INT(sum_metric(text, "sent_bytes_total"), CLIENTS * 5);
        t_finish(fd);
    }
    for (int i = 0; i < CLIENTS; i++) {
        t_finish(fds[i]);
    }
    await_metric(admin, "connections_open", 0);
    await_metric(admin, "connections_closed_total", CLIENTS);
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

/* The page is all there is: nothing of it comes from elsewhere, and a browser is told so. What the
 * server says is only ever set as text. */
TEST_ONCE(status_page_needs_nothing_else)
{
    static const char *const foreign[] = {"http://", "https://", "'//",  "\"//",  "=//",
                                          "src=",    "@import",  "url(", "import ", "integrity="};
    static const char *const unsafe[] = {"innerHTML", "outerHTML", "insertAdjacentHTML",
                                         "document.write", "eval("};
    int admin;
    program p = start_status("2", &admin);
    int fd = t_connect(admin);
    const char *page = ask_body(fd, "/", "text/html; charset=utf-8");
    CHECK(strncmp(page, "<!doctype html>\n", 16) == 0);
    CHECK_STR(page + strlen(page) - 10, "</script>\n");
    CHECK_INT(t_count(page, "default-src 'none'"), 1);
    CHECK_INT(t_count(page, "fetch('metrics')"), 1);
    for (size_t i = 0; i < sizeof foreign / sizeof foreign[0]; i++) {
        if (strstr(page, foreign[i]) != NULL) {
            T_FAIL("\"%s\" in the page", foreign[i]);
        }
    }
    for (size_t i = 0; i < sizeof unsafe / sizeof unsafe[0]; i++) {
        if (strstr(page, unsafe[i]) != NULL) {
            T_FAIL("\"%s\" in the page", unsafe[i]);
        }
    }
    CHECK_INT(t_count(page, "href="), 1);
    CHECK_INT(t_count(page, "href='data:,'"), 1);
    /* The connection goes on, and HEAD tells the size. */
    char head[256];
    snprintf(head, sizeof head, KEPT("200 OK", "text/html; charset=utf-8", "%zu"), strlen(page));
    t_sends(fd, "HEAD / HTTP/1.1\r\nHost: x\r\n\r\n");
    t_expect(fd, head);
    t_finish(fd);
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

/* Three are open, and four have ended well: the page says so, in a row for all and one for each worker, and draws
 * five lines in each, of several points. */
TEST_ONCE(status_page_draws_itself_in_a_browser)
{
    int admin, fds[7];
    program p = start_status("2", &admin);
    for (int i = 0; i < 7; i++) {
        fds[i] = t_connect(p.port);
        t_echo(fds[i], "hello\n");
    }
    for (int i = 0; i < 4; i++) {
        t_finish(fds[i]);
    }
    await_metric(admin, "connections_closed_total", 4);
    CHECK(browser_shows(admin, "tr -d '\\n' | grep '<span id=\"state\" class=\"ready\">ready</span>"
                               "<span id=\"sum\">2 workers, 0 restarts</span>' | "
                               "grep '<h2>All</h2>.*<h2>Worker 0</h2>.*<h2>Worker 1</h2>' | "
                               "grep '<h2>All</h2><div><div class=\"head\"><span class=\"name\">Connections</span>"
                               "<span class=\"value\"><i>3</i></span></div>' | "
                               "grep '>well 4</b>' | grep -o 'class=\"line\" d=\"M[0-9]* [0-9.]*L[0-9]* ' | wc -l | "
                               "grep -qx ' *15'"));
    for (int i = 4; i < 7; i++) {
        t_finish(fds[i]);
    }
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

/* While a line is under way its worker drains. New connections are refused on both ports; a probe
 * that has kept its own hears it once. Each has a request under way when the drain comes: how long
 * an idle one is left alone is for time to say. */
TEST_ONCE(status_is_not_ready_in_a_drain)
{
    enum { PROBES = 6 };
    static const char first[] = "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\nGET /readyz HT";
    int admin, probes[PROBES];
    program p = start_status("2", &admin);
    int busy = t_connect(p.port);
    t_echo(busy, "hello\n");
    t_sends(busy, "unfin");
    for (int i = 0; i < PROBES; i++) {
        probes[i] = t_connect(admin);
        t_sends(probes[i], first);
        t_expect(probes[i], KEPT("200 OK", TEXT, "3") "ok\n");
    }
    send_signal(&p, SIGTERM);
    int64_t end = t_patience();
    while (!t_is_refused(p.port) || !t_is_refused(admin)) {
        CHECK(t_now_ms() < end);
    }
    /* What is pipelined is answered; the last answer says so. */
    t_sends(probes[0], "TP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
    t_expect(probes[0], KEPT("503 Service Unavailable", TEXT, "9") "draining\n"
                            ENDED("200 OK", TEXT, "3") "ok\n");
    t_leave(probes[0]);
    for (int i = 1; i < PROBES; i++) {
        t_sends(probes[i], "TP/1.1\r\nHost: x\r\n\r\n");
        t_expect(probes[i], ENDED("503 Service Unavailable", TEXT, "9") "draining\n");
        t_leave(probes[i]);
    }
    t_sends(busy, "ished\n");
    t_expect(busy, "unfinished\nbye\n");
    t_leave(busy);
    expect_end(&p);
}

/* Who asks half a question does not hold the end up for the whole grace of the service. */
TEST_ONCE(status_does_not_wait_long_for_who_looks_on)
{
    int admin;
    program p = start_status("2", &admin);
    int fd = t_connect(admin);
    t_sends(fd, "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\nGET /readyz HT");
    t_expect(fd, KEPT("200 OK", TEXT, "3") "ok\n");
    int64_t began = t_now_ms();
    send_signal(&p, SIGTERM);
    expect_end(&p);
    CHECK(t_now_ms() - began < 20000); /* 5 s, and not 30 */
    t_close(fd);
}

/* In a reload who has kept a connection hears of it once, and then finds a worker that is ready, if
 * it is not another one that is about to be replaced. */
TEST_ONCE(status_is_ready_again_in_a_reload)
{
    int admin;
    program p = start_status("2", &admin);
    int fd = t_connect(admin);
    bool ready = true;
    t_sends(fd, "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\nGET /readyz HT");
    CHECK_STR(receive_readiness(fd, &ready), "ok\n"); /* one of the first workers has it */
    send_signal(&p, SIGHUP);
    for (int64_t end = t_patience(); ready;) {
        t_sends(fd, "TP/1.1\r\nHost: x\r\n\r\n");
        const char *text = receive_readiness(fd, &ready);
        CHECK_STR(text, ready ? "ok\n" : "draining\n");
        if (ready) {
            t_sends(fd, "GET /readyz HT"); /* so that one is under way when the drain comes */
        }
        CHECK(t_now_ms() < end);
    }
    t_leave(fd);
    for (int64_t end = t_patience(); !ready;) {
        fd = t_connect(admin);
        t_sends(fd, "GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        receive_readiness(fd, &ready);
        t_leave(fd);
        CHECK(t_now_ms() < end);
    }
    send_signal(&p, SIGTERM);
    expect_end(&p);
}

/* ---- echo_tls, mutual_tls -----------------------------------------------------------------*/

/* An `openssl s_client`, with its stdin and stdout. */
typedef struct tls_client {
    pid_t pid;
    int in, out;
} tls_client;

static char tls_folder[] = "/tmp/tcpserver-tls-XXXXXX";
static char tls_cert[64], tls_key[64];

/* A certificate for localhost that trusts itself, as make cert makes one. */
static void make_certificate(void)
{
    char line[512];
    if (system("openssl version >/dev/null 2>&1") != 0) {
        SKIP("openssl");
    }
    CHECK(mkdtemp(tls_folder) != NULL);
    snprintf(tls_cert, sizeof tls_cert, "%s/cert.pem", tls_folder);
    snprintf(tls_key, sizeof tls_key, "%s/key.pem", tls_folder);
    snprintf(line, sizeof line,
             "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj "
             "/CN=localhost -addext subjectAltName=DNS:localhost -keyout %s -out %s 2>/dev/null",
             tls_key, tls_cert);
    CHECK_INT(system(line), 0);
}

static void remove_certificate(void)
{
    CHECK(unlink(tls_cert) == 0 && unlink(tls_key) == 0 && rmdir(tls_folder) == 0);
}

/* The example, on any free port. */
static program start_tls(const char *name)
{
    char free_port[16], line[512];
    snprintf(free_port, sizeof free_port, "%d", t_free_port());
    const char *arguments[3] = {free_port, tls_cert, tls_key};
    program p = launch(name, arguments, -1, line, sizeof line);
    CHECK_INT(sscanf(line, "port %d", &p.port), 1);
    return p;
}

static tls_client start_client(int port, const char *alpn, bool certificate)
{
    tls_client c;
    int to[2], from[2];
    char address[32];
    snprintf(address, sizeof address, "127.0.0.1:%d", port);
    CHECK(pipe(to) == 0 && pipe(from) == 0);
    c.pid = fork();
    CHECK(c.pid >= 0);
    if (c.pid == 0) {
        int null = open("/dev/null", O_WRONLY);
        dup2(to[0], 0);
        dup2(from[1], 1);
        dup2(null, 2);
        close(to[1]);
        close(from[0]);
        if (certificate) {
            execlp("openssl", "openssl", "s_client", "-quiet", "-connect", address, "-CAfile",
                   tls_cert, "-verify_return_error", "-verify_hostname", "localhost", "-alpn", alpn,
                   "-cert", tls_cert, "-key", tls_key, (char *)NULL);
        } else {
            execlp("openssl", "openssl", "s_client", "-quiet", "-connect", address, "-CAfile",
                   tls_cert, "-verify_return_error", "-verify_hostname", "localhost", "-alpn", alpn,
                   (char *)NULL);
        }
        _exit(CANNOT_RUN);
    }
    close(to[0]);
    close(from[1]);
    c.in = to[1];
    c.out = from[0];
    return c;
}

/* Reads until the text has come. False: the end came first. */
static bool client_reads(tls_client *c, const char *text)
{
    char got[512] = "";
    size_t used = 0;
    while (strstr(got, text) == NULL) {
        struct pollfd ready = {c->out, POLLIN, 0};
        CHECK(used + 1 < sizeof got);
        if (poll(&ready, 1, t_patience_ms()) != 1) {
            T_FAIL("instead of \"%s\" came \"%s\"", text, got);
        }
        ssize_t n = read(c->out, got + used, sizeof got - 1 - used);
        if (n <= 0) {
            return false;
        }
        used += (size_t)n;
        got[used] = 0;
    }
    return true;
}

static void end_client(tls_client *c)
{
    t_close(c->in);
    t_close(c->out);
    kill(c->pid, SIGTERM);
    CHECK_INT(waitpid(c->pid, NULL, 0), c->pid);
}

TEST_ONCE(echo_tls_answers_openssl)
{
    make_certificate();
    program p = start_tls("echo_tls");
    tls_client c = start_client(p.port, "any", false);
    CHECK(write(c.in, "hello\n", 6) == 6);
    CHECK(client_reads(&c, "hello\n"));
    end_client(&c);
    stop(&p);
    remove_certificate();
}

/* The client's certificate is seen, the protocol is chosen; without a certificate there is nothing. */
TEST_ONCE(mutual_tls_knows_its_clients)
{
    make_certificate();
    program p = start_tls("mutual_tls");
    tls_client c = start_client(p.port, "upper", true);
    CHECK(client_reads(&c, "TLSv1.3, upper, your certificate has "));
    CHECK(write(c.in, "hello\n", 6) == 6);
    CHECK(client_reads(&c, "HELLO\n"));
    end_client(&c);
    tls_client other = start_client(p.port, "echo", true);
    CHECK(client_reads(&other, "TLSv1.3, echo, "));
    end_client(&other);
    tls_client stranger = start_client(p.port, "echo", false);
    CHECK(!client_reads(&stranger, "TLSv1.3"));
    end_client(&stranger);
    stop(&p);
    remove_certificate();
}
