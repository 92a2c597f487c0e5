/* A fuzzer of what a program is started with: descriptors of every kind from 3 on, and the variables that say what they
 * are, LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES, and an upgrade's TSRV_READY_FD and TSRV_FILE_FDS, with anything in them.
 *
 *     make fuzz && build/fuzz/handed -max_len=100 build/fuzz/handed.corpus
 *
 * What must hold, beside an oracle that reads sd_listen_fds(3) naively:
 *   - the listening stream sockets among the descriptors that are ours are given out, each once, and nothing else;
 *   - every other descriptor stays open, with its flags, its place in a file, and what is in it; but those that are
 *     ours are close-on-exec then, and the pipe that an upgrade's predecessor reads is written to once, and closed;
 *   - the variables are gone when they have been read, and only then;
 *   - in an upgrade, and only then, what nothing listens on is closed when we are ready;
 *   - no file is removed but that of a unix socket which the variables name, and which is ours to close. */
#include "world.h"

#include <netinet/in.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/un.h>

#define FIRST 3
#define SLOTS 6
#define HIGH 40 /* the fuzzer's own descriptors are not below */
#define MOST 4096

enum {
    NOTHING,
    TCP,
    PATH,     /* a unix socket with a file */
    ABSTRACT, /* and one without */
    DEAF,     /* bound, not listening */
    CONNECTED,
    UDP,
    DATAGRAMS,
    PACKETS, /* listening, but for no stream */
    PIPE_IN,
    PIPE_OUT,
    FILE_, /* a file, in the middle of it */
    EVENTS,
    KINDS
};

typedef struct slot {
    int kind;
    int other; /* the fuzzer's end; -1 = there is none */
    int status, flags;
    ino_t inode;
    char path[64];
    char decoy[8]; /* a socket's file that is called as the address would be, read as a path */
    bool taken;    /* given out */
    bool closed;   /* rightly */
} slot;

static slot slots[SLOTS];
static char folder[64];
static int home; /* the one that we came from */
static bool ours, malformed; /* what LISTEN_PID and LISTEN_FDS say */
static int64_t count;
static int64_t ready; /* TSRV_READY_FD; -1 = none that can be */
static bool looked;   /* the variables have been read */
static bool told;     /* the predecessor has been */

/* ---- descriptors --------------------------------------------------------------------------*/

static void remove_files(void)
{
    for (int i = 0; i < SLOTS; i++) {
        if (slots[i].kind == PATH) {
            unlink(slots[i].path);
        }
        if (slots[i].decoy[0] != 0) {
            unlink(slots[i].decoy);
        }
    }
}

static void remove_folder(void)
{
    rmdir(folder);
}

/* libFuzzer keeps what fails in the folder that we came from. */
static void abandon(void)
{
    remove_files();
    if (fchdir(home) == 0) {
        remove_folder();
    }
}

static int move_high(int fd)
{
    int high = fcntl(fd, F_DUPFD_CLOEXEC, HIGH);
    if (fd < 0 || high < 0) {
        fail("no descriptor: %s", strerror(errno));
    }
    close(fd);
    return high;
}

static int bound_unix(int type, const char *path, size_t size)
{
    struct sockaddr_un address = {0};
    int fd = move_high(socket(AF_UNIX, type, 0));
    address.sun_family = AF_UNIX;
    memcpy(address.sun_path, path, size);
    if (bind(fd, (struct sockaddr *)&address, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + size)) < 0) {
        fail("bind: %s", strerror(errno));
    }
    return fd;
}

/* Its address, read as a unix socket's, names a file. */
static void make_decoy(slot *s, const struct sockaddr_in *address)
{
    memcpy(s->decoy, (const char *)address + offsetof(struct sockaddr_un, sun_path), 6);
    s->decoy[6] = 0;
    if (s->decoy[0] != 0 && strchr(s->decoy, '/') == NULL && access(s->decoy, F_OK) != 0) {
        close(bound_unix(SOCK_STREAM, s->decoy, strlen(s->decoy) + 1));
    } else {
        s->decoy[0] = 0;
    }
}

static int open_inet(slot *s, int type, bool listening)
{
    struct sockaddr_in address = {0};
    socklen_t size = sizeof address;
    int fd = move_high(socket(AF_INET, type, 0));
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || (listening && listen(fd, 8) < 0) ||
        getsockname(fd, (struct sockaddr *)&address, &size) < 0) {
        fail("no socket: %s", strerror(errno));
    }
    if (listening) {
        make_decoy(s, &address);
    }
    return fd;
}

static int open_unix(slot *s, int index)
{
    static unsigned names;
    int type = s->kind == DATAGRAMS ? SOCK_DGRAM : s->kind == PACKETS ? SOCK_SEQPACKET : SOCK_STREAM, fd;
    snprintf(s->path, sizeof s->path, "%cfuzz.%ld.%u.%d", s->kind == PATH ? '_' : 0, (long)getpid(), names++, index);
    fd = bound_unix(type, s->path, s->kind == PATH ? strlen(s->path) + 1 : 1 + strlen(s->path + 1));
    if (s->kind != DATAGRAMS && s->kind != DEAF && listen(fd, 8) < 0) {
        fail("listen: %s", strerror(errno));
    }
    return fd;
}

static int open_pair(slot *s)
{
    int ends[2];
    if ((s->kind == CONNECTED ? socketpair(AF_UNIX, SOCK_STREAM, 0, ends) : pipe(ends)) < 0) {
        fail("no pair: %s", strerror(errno));
    }
    ends[0] = move_high(ends[0]);
    ends[1] = move_high(ends[1]);
    if (write(ends[1], "abc", 3) != 3) {
        fail("a pair takes nothing");
    }
    s->other = s->kind == PIPE_OUT ? ends[0] : ends[1];
    return s->kind == PIPE_OUT ? ends[1] : ends[0];
}

static int open_file(void)
{
    int fd = move_high(memfd_create("handed", 0));
    if (write(fd, "abcdef", 6) != 6 || lseek(fd, 2, SEEK_SET) != 2) {
        fail("no file: %s", strerror(errno));
    }
    return fd;
}

static int open_kind(slot *s, int index)
{
    switch (s->kind) {
    case TCP:
        return open_inet(s, SOCK_STREAM, true);
    case DEAF:
        return open_inet(s, SOCK_STREAM, false);
    case UDP:
        return open_inet(s, SOCK_DGRAM, false);
    case PATH:
    case ABSTRACT:
    case DATAGRAMS:
    case PACKETS:
        return open_unix(s, index);
    case FILE_:
        return open_file();
    case EVENTS:
        return move_high(eventfd(3, 0));
    default:
        return open_pair(s);
    }
}

static void make_slot(slot *s, int index)
{
    struct stat info;
    int fd;
    memset(s, 0, sizeof *s);
    s->kind = (int)draw(KINDS);
    s->other = -1;
    close(FIRST + index);
    if (s->kind == NOTHING) {
        return;
    }
    fd = open_kind(s, index);
    if (dup2(fd, FIRST + index) < 0) {
        fail("dup2: %s", strerror(errno));
    }
    close(fd);
    fd = FIRST + index;
    if (draw(2) == 1) {
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    }
    fstat(fd, &info);
    s->inode = info.st_ino;
    s->status = fcntl(fd, F_GETFL);
    s->flags = fcntl(fd, F_GETFD);
}

static bool listens(const slot *s)
{
    return s->kind == TCP || s->kind == PATH || s->kind == ABSTRACT;
}

static bool is_pipe(const slot *s)
{
    return s->kind == PIPE_IN || s->kind == PIPE_OUT;
}

/* ---- variables ----------------------------------------------------------------------------*/

static void set_number(char *text, size_t size, long number)
{
    snprintf(text, size, "%ld", number);
}

/* A variable: nothing, a number that is right, one beside it, or bytes of the script. */
static void set_variable(const char *name, long right)
{
    char text[40];
    unsigned what = draw(8), size;
    unsetenv(name);
    if (what == 0) {
        return;
    }
    set_number(text, sizeof text, what < 5 ? right : what == 5 ? (long)draw(16) : right + (long)draw(9) - 4);
    if (what == 7) {
        size = draw(sizeof text);
        for (unsigned i = 0; i <= size; i++) {
            text[i] = (char)(i == size ? 0 : draw(256));
        }
    }
    if (what == 6 && draw(8) == 7) {
        set_number(text, sizeof text, MOST + (long)draw(3) - 1);
    }
    setenv(name, text, 1);
}

/* A number without anything around it, as sd_listen_fds has it; -1 = it is none. */
static int64_t number_of(const char *name)
{
    const char *text = getenv(name);
    int64_t number = 0;
    if (text == NULL || *text == 0 || strlen(text) > 18) {
        return text == NULL || *text == 0 || strspn(text, "0") != strlen(text) ? -1 : 0;
    }
    for (; *text != 0; text++) {
        if (*text < '0' || *text > '9') {
            return -1;
        }
        number = number * 10 + (*text - '0');
    }
    return number > INT32_MAX ? -1 : number;
}

static bool names_file(int fd)
{
    const char *text = getenv("TSRV_FILE_FDS");
    long number = 0;
    for (; text != NULL && *text != 0; text++) {
        if (*text < '0' || *text > '9') {
            if (number == fd) {
                return true;
            }
            number = 0;
        } else {
            number = number > 100000 ? number : number * 10 + (*text - '0');
        }
        if (number >= MOST) {
            return false; /* nothing of ours comes behind that */
        }
    }
    return false;
}

static void draw_files(void)
{
    char text[64];
    size_t size = 0;
    unsetenv("TSRV_FILE_FDS");
    for (unsigned left = draw(SLOTS + 1); left != 0; left--) {
        size += (size_t)snprintf(text + size, sizeof text - size, "%u%c", draw(12), draw(8) == 7 ? ' ' : ',');
    }
    if (size != 0) {
        setenv("TSRV_FILE_FDS", text, 1);
    }
}

static bool files[SLOTS]; /* whose files are named */
static char fd_names[256]; /* LISTEN_FDNAMES */

static void draw_variables(void)
{
    int used = SLOTS;
    while (used > 0 && slots[used - 1].kind == NOTHING) {
        used--;
    }
    set_variable("LISTEN_PID", (long)getpid());
    set_variable("LISTEN_FDS", used);
    set_variable("TSRV_READY_FD", FIRST + (long)draw(SLOTS));
    set_variable("LISTEN_FDNAMES", 1);
    snprintf(fd_names, sizeof fd_names, "%s", getenv("LISTEN_FDNAMES") == NULL ? "" : getenv("LISTEN_FDNAMES"));
    draw_files();
    ours = number_of("LISTEN_PID") == getpid();
    count = number_of("LISTEN_FDS");
    malformed = ours && (count < 0 || count > MOST);
    count = ours && !malformed ? count : 0;
    ready = number_of("TSRV_READY_FD");
    if (ready >= FIRST + SLOTS && fcntl((int)ready, F_GETFD) >= 0) {
        unsetenv("TSRV_READY_FD"); /* a pipe to libFuzzer's symbolizer */
        ready = -1;
    }
    ready = ready >= FIRST && ready < FIRST + SLOTS && is_pipe(&slots[ready - FIRST]) ? ready : -1;
    for (int i = 0; i < SLOTS; i++) {
        files[i] = ready >= 0 && names_file(FIRST + i);
    }
    TRACE("%s, %lld descriptors%s, ready %lld, names %s\n", ours ? "ours" : "another's", (long long)count,
          malformed ? ", malformed" : "", (long long)ready, fd_names);
}

/* ---- what must hold -----------------------------------------------------------------------*/

static void check_content(const slot *s, int fd)
{
    char text[8];
    uint64_t number;
    if (s->kind == FILE_ && lseek(fd, 0, SEEK_CUR) != 2) {
        fail("the place in the file %d has moved", fd);
    }
    if (s->kind == EVENTS && (read(fd, &number, sizeof number) != sizeof number || number != 3 ||
                              write(fd, &number, sizeof number) != sizeof number)) {
        fail("the counter %d is not what it was", fd);
    }
    if ((s->kind == CONNECTED || s->kind == PIPE_IN) &&
        (read(fd, text, sizeof text) != 3 || write(s->other, "abc", 3) != 3)) {
        fail("what was in %d is not there any more", fd);
    }
    if (s->kind == PIPE_OUT && (read(s->other, text, sizeof text) != 3 || write(fd, "abc", 3) != 3)) {
        fail("something was written to %d", fd);
    }
}

static void check_slot(slot *s, int fd)
{
    struct stat info;
    bool in_range = looked && fd < FIRST + count, is_ready = looked && fd == ready;
    bool adopted = in_range && listens(s);
    int cloexec = in_range || is_ready ? FD_CLOEXEC : 0, status;
    if (s->kind == NOTHING || s->closed) {
        return;
    }
    if (fstat(fd, &info) < 0 || info.st_ino != s->inode) {
        fail("descriptor %d (%d) was closed", fd, s->kind);
    }
    status = fcntl(fd, F_GETFL);
    if ((status | O_NONBLOCK) != (s->status | O_NONBLOCK) ||
        (status != s->status && !adopted && !is_ready) || (fcntl(fd, F_GETFD) != (s->flags | cloexec))) {
        fail("the flags of %d (%d) are %o and %d, not %o and %d", fd, s->kind, status, fcntl(fd, F_GETFD), s->status,
             s->flags | cloexec);
    }
    if (!is_ready) {
        check_content(s, fd);
    }
    if (s->kind == PATH && access(s->path, F_OK) != 0) {
        fail("the file of %d is gone", fd);
    }
}

static void check_all(void)
{
    for (int i = 0; i < SLOTS; i++) {
        check_slot(&slots[i], FIRST + i);
        if (slots[i].decoy[0] != 0 && access(slots[i].decoy, F_OK) != 0) {
            fail("a file that is called as the address of %d is gone", FIRST + i);
        }
    }
    if (looked && ((ours && (getenv("LISTEN_PID") != NULL || getenv("LISTEN_FDS") != NULL)) ||
                   getenv("TSRV_READY_FD") != NULL || getenv("TSRV_FILE_FDS") != NULL)) {
        fail("variables are left");
    }
}

/* ---- what the program does ----------------------------------------------------------------*/

static bool is_free(int fd)
{
    return fd >= FIRST && fd < FIRST + SLOTS && fd < FIRST + count && listens(&slots[fd - FIRST]) &&
           !slots[fd - FIRST].taken && !slots[fd - FIRST].closed;
}

static void use(int fd)
{
    if (!is_free(fd)) {
        fail("descriptor %d is given out", fd);
    }
    slots[fd - FIRST].taken = true;
}

static int handle(tsrv_stream *stream, const tsrv_address *address, void *context)
{
    (void)stream;
    (void)address;
    (void)context;
    return TSRV_OK;
}

/* The program closes a socket of its own: by the server, which removes its file if that is ours. */
static void serve_on(int fd)
{
    if (server == NULL || tsrv_server_add_sockets(server, &fd, 1) != TSRV_OK) {
        fail("descriptor %d cannot be served on", fd);
    }
}

static void take_all(void)
{
    int fds[SLOTS + 1], expected = 0, capacity = (int)draw(SLOTS + 2), got;
    for (int fd = FIRST; fd < FIRST + SLOTS; fd++) {
        expected += is_free(fd);
    }
    looked = true;
    got = tsrv_listen_fds(fds, capacity);
    TRACE("tsrv_listen_fds(%d) = %d\n", capacity, got);
    if (got != (malformed || expected > capacity ? (int)TSRV_EINVAL : expected)) {
        fail("tsrv_listen_fds returns %d, not %d", got, expected);
    }
    for (int i = 0; i < got; i++) {
        use(fds[i]);
        serve_on(fds[i]);
    }
}

static void bind_one(void)
{
    int fd = FIRST + (int)draw(SLOTS), got, bound;
    slot *s = &slots[fd - FIRST];
    tsrv_address address;
    char text[TSRV_ADDRESS_SIZE];
    if (!listens(s) || s->taken || s->closed || tsrvi_address_get(fd, tsrvi_getsockname, &address) != TSRV_OK) {
        return;
    }
    looked = true;
    tsrv_address_format(&address, text, sizeof text);
    got = s->kind == TCP ? tsrv_bind_sockets(tsrv_address_port(&address), "127.0.0.1", NULL, &bound, 1)
                         : tsrv_bind_sockets(0, text, NULL, &bound, 1);
    TRACE("bind %s = %d, %d\n", text, got, bound);
    if (is_free(fd) ? got != 1 || bound != fd : got != -EADDRINUSE) {
        fail("bind to what %d is bound to returns %d", fd, got);
    }
    if (got == 1) {
        use(bound);
        serve_on(bound);
    }
}

static void name_one(void)
{
    char buffer[64], naive[256] = "", *rest = fd_names;
    int fd = (int)draw(SLOTS + 6) - 1;
    size_t size = draw(sizeof buffer);
    const char *name = tsrv_listen_fd_name(fd, buffer, size);
    for (int i = FIRST; i <= fd && rest != NULL; i++) {
        char *colon = strchr(rest, ':');
        snprintf(naive, sizeof naive, "%.*s", colon == NULL ? (int)strlen(rest) : (int)(colon - rest), rest);
        rest = colon == NULL ? NULL : colon + 1;
        naive[i == fd ? sizeof naive - 1 : 0] = 0;
    }
    naive[size == 0 ? 0 : size - 1] = 0;
    if (strcmp(name, naive) != 0) {
        fail("descriptor %d is called \"%s\", not \"%s\"", fd, name, naive);
    }
}

/* The server accepts, and says so: now an upgrade's predecessor may go. */
static void be_ready(void)
{
    int rc = tsrv_notify("READY=1");
    TRACE("ready\n");
    if (rc != 0) {
        fail("tsrv_notify returns %d", rc);
    }
    if (!looked || ready < 0 || told) {
        return;
    }
    told = true;
    for (int fd = FIRST; fd < FIRST + SLOTS; fd++) {
        slots[fd - FIRST].closed = slots[fd - FIRST].closed || is_free(fd);
    }
    slots[ready - FIRST].closed = true;
}

/* As tsrv_serve does when all of its sockets are bound. */
static void close_rest(void)
{
    looked = true;
    tsrvi_handed_close_rest();
    for (int fd = FIRST; fd < FIRST + SLOTS && ready >= 0; fd++) {
        slots[fd - FIRST].closed = slots[fd - FIRST].closed || is_free(fd);
    }
}

/* Everything is closed that was taken; a unix socket's file goes with it, if it is named, and nobody else serves it. */
static void end_server(void)
{
    tsrv_server_free(server);
    server = NULL;
    for (int i = 0; i < SLOTS; i++) {
        slot *s = &slots[i];
        if (s->taken && s->kind == PATH && (access(s->path, F_OK) == 0) != (!files[i] || !told)) {
            fail("the file of %d is %s", FIRST + i, files[i] ? "left" : "removed");
        }
        s->closed = s->closed || s->taken;
    }
}

static void clean_up(void)
{
    for (int i = 0; i < SLOTS; i++) {
        slot *s = &slots[i];
        if (s->closed && s->kind != NOTHING && fcntl(FIRST + i, F_GETFD) >= 0) {
            fail("descriptor %d (%d) is left", FIRST + i, s->kind);
        }
        if (s->kind != NOTHING && !s->closed) {
            close(FIRST + i);
        }
        if (s->other >= 0) {
            close(s->other);
        }
    }
    remove_files();
}

/* ---- one script ---------------------------------------------------------------------------*/

/* Between scripts nobody else may have them: libFuzzer's symbolizer, for example. */
static void hold_slots(void)
{
    int fd = move_high(open("/dev/null", O_RDWR));
    for (int i = 0; i < SLOTS; i++) {
        dup2(fd, FIRST + i);
    }
    close(fd);
}

/* The folder's files have short names, which addresses can be. */
static void enter(void)
{
    if (chdir(folder) < 0) {
        fail("no folder: %s", strerror(errno));
    }
}

static void leave(void)
{
    if (fchdir(home) < 0) {
        abort();
    }
}

static void begin_once(void)
{
    static bool begun;
    if (begun) {
        return;
    }
    begun = true;
    hold_slots(); /* whatever was inherited there is nobody's here */
    home = move_high(open(".", O_RDONLY | O_DIRECTORY));
    before_failing = abandon;
    snprintf(folder, sizeof folder, "/tmp/handed_fuzz.XXXXXX");
    if (mkdtemp(folder) == NULL || atexit(remove_folder) != 0) {
        fail("no folder: %s", strerror(errno));
    }
}

static void begin(void)
{
    tsrv_server_options options = {0};
    unsetenv("NOTIFY_SOCKET");
    memset(&tsrvi_process.handed, 0, sizeof tsrvi_process.handed);
    looked = told = false;
    for (int i = 0; i < SLOTS; i++) {
        make_slot(&slots[i], i);
    }
    draw_variables();
    world_open(TSRV_BACKEND_EPOLL);
    options.loop = loop;
    options.handle_stream = handle;
    if (tsrv_server_new(&server, &options) != TSRV_OK) {
        fail("no server");
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const acts[])(void) = {take_all, bind_one, bind_one, name_one, be_ready, close_rest, settle};
    int descriptors;
    world_begin();
    begin_once();
    descriptors = open_descriptors();
    enter();
    script_is(data, size);
    begin();
    check_all();
    for (int i = 0; i < 12 && !script_is_over(); i++) {
        PICK(acts)();
        check_all();
    }
    end_server();
    check_all();
    clean_up();
    world_close_all();
    leave();
    hold_slots();
    if (open_descriptors() != descriptors) {
        fail("%d descriptors are left, not %d", open_descriptors(), descriptors);
    }
    if (tsrvi_process.bound.count != 0) {
        fail("%d sockets are remembered", tsrvi_process.bound.count);
    }
    return 0;
}
