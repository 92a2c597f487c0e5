/* The example programs as a user runs them: started with a port, driven over raw sockets, and
 * stopped by a signal. EXAMPLES names the directory of the built programs. */
#include "test.h"

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

/* A port that nobody listens on right now. */
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

/* Reads a line of the program's stdout into line, without its newline. False: it ended first. */
static bool read_output(program *p, char *line, size_t capacity)
{
    size_t used = 0;
    for (;;) {
        struct pollfd ready = {p->output, POLLIN, 0};
        if (poll(&ready, 1, T_PATIENCE * 1000 * t_scale()) != 1) {
            T_FAIL("%s prints nothing", p->name);
        }
        CHECK(used + 1 < capacity);
        ssize_t n = read(p->output, line + used, 1);
        CHECK(n >= 0);
        if (n == 0 || line[used] == '\n') {
            line[used] = 0;
            return n > 0;
        }
        used++;
    }
}

/* Starts the program on p->port. Returns whether it listens; if not, it has ended with status. */
static bool try_start(program *p, int *status)
{
    const char *directory = getenv("EXAMPLES");
    char path[4096], port[16], line[256], expected[256];
    int fds[2];
    snprintf(path, sizeof path, "%s/%s", directory != NULL ? directory : "build/cc-c99", p->name);
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
    if (!read_output(p, line, sizeof line)) {
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
    CHECK(!read_output(p, more, sizeof more));
    CHECK_STR(more, "");
    int status = end_of(p);
    CHECK(WIFSIGNALED(status));
    CHECK_INT(WTERMSIG(status), SIGTERM);
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
        if (poll(&ready, 1, T_PATIENCE * 1000 * t_scale()) != 1) {
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

/* Nothing has come so far. Only means something after a round trip on another connection. */
static void expect_nothing(int fd)
{
    char byte;
    ssize_t n = recv(fd, &byte, 1, MSG_DONTWAIT);
    CHECK_INT(n, -1);
    CHECK(errno == EAGAIN || errno == EWOULDBLOCK);
}

/* ---- echo, echo_callback ------------------------------------------------------------------*/

static void echo_lines(const char *name)
{
    program p = start(name);
    int fd = t_connect(p.port), other = t_connect(p.port);
    char received[64];
    t_sends(fd, "hello\n");
    t_expect(fd, "hello\n");
    /* Split: the other connection's round trip makes the pieces arrive one by one. */
    static const char *const pieces[] = {"s", "pl", "it l", "ine"};
    for (size_t i = 0; i < sizeof pieces / sizeof pieces[0]; i++) {
        t_sends(fd, pieces[i]);
        t_sends(other, "meanwhile\n");
        t_expect(other, "meanwhile\n");
        expect_nothing(fd);
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
    t_sends(other, "still here\n");
    t_expect(other, "still here\n");
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
    t_shut(fd);
    t_expect_eof(fd);
    t_close(fd);
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
    t_expect_eof(fd);
    t_close(fd);

    t_sends(other, "still here\n");
    t_expect(other, "still here\n");
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
            t_shut(fds[i]);
            t_expect_eof(fds[i]);
            t_close(fds[i]);
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

/* Leaves in good order. */
static void leave(int fd)
{
    t_shut(fd);
    t_expect_eof(fd);
    t_close(fd);
}

TEST_ONCE(chat_names_joins_and_leaves)
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
    leave(nobody);
    t_sends(carl, "\n\r\n\ncarl\r\nme\n");
    t_expect(ann, "carl has joined\ncarl: me\n");
    t_expect(bob, "carl has joined\ncarl: me\n");
    t_sends(bob, "welcome\n");
    t_expect(carl, "bob: welcome\n");
    t_expect(ann, "bob: welcome\n");

    /* A half close, a close and a reset are all heard of. */
    leave(carl);
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
    leave(fred);
    snprintf(text, sizeof text, "%.*s has left\n", MAX_NICK, name);
    t_expect(ann, text);
    t_expect(bob, text);
    leave(ann);
    t_expect(bob, "ann has left\n");
    leave(bob);
    stop(&p);
}

/* Each speaks in turn. That the next thing a speaker receives is another's message shows that its
 * own did not come back; the first speaks twice, for the last one's sake. */
TEST_ONCE(chat_reaches_all_others)
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
        leave(members[i]);
        snprintf(text, sizeof text, "m%d has left\n", i);
        for (int k = i + 1; k < COUNT; k++) {
            t_expect(members[k], text);
        }
    }
    stop(&p);
}

TEST_ONCE(chat_too_long_a_line)
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
        t_expect_eof(bob);
        t_close(bob);
        t_expect(ann, "bob has left\n");
    }

    /* As a name, too: then nobody hears of it. */
    int nobody = t_connect(p.port);
    t_expect(nobody, "your name? ");
    t_send(nobody, line, sizeof line);
    t_expect(nobody, "too long, good bye\n");
    t_expect_eof(nobody);
    t_close(nobody);
    int carl = join(&p, "carl", &ann, 1);
    leave(carl);
    t_expect(ann, "carl has left\n");
    leave(ann);
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
TEST_ONCE(chat_throws_out_who_never_reads)
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
    leave(speaker);
    for (int i = 0; i < LISTENERS; i++) {
        CHECK_STR(read_line(&listeners[i]), "speaker has left");
        t_close(listeners[i].fd);
    }
    stop(&p);
}
