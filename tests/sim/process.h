/* Children of a test program, by the real system: for driver.h, and before anything that replaces its names. */
#ifndef SIM_PROCESS_H
#define SIM_PROCESS_H

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef struct p_child {
    pid_t pid;
    int output; /* what it says to stderr */
    int status;
} p_child;

static inline double p_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Memory that children have in common with their parent. */
static inline void *p_shared(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    memset(memory, 0, size);
    return memory;
}

/* true in the child. */
static inline bool p_fork(p_child *child)
{
    int fds[2];
    fflush(NULL);
    if (pipe(fds) < 0 || (child->pid = fork()) < 0) {
        perror("fork");
        exit(2);
    }
    if (child->pid != 0) {
        close(fds[1]);
        child->output = fds[0];
        return false;
    }
    dup2(fds[1], 2);
    close(fds[0]);
    close(fds[1]);
    return true;
}

/* The child may take so long from now on. */
static inline void p_limit(unsigned seconds)
{
    alarm(seconds);
}

/* The child's good end; sanitizers have their say. */
static inline void p_leave(void)
{
    alarm(0);
    exit(0);
}

/* Wait for the child's end; the last that it has said is in `output`. Returns whether all was well. */
static inline bool p_await(p_child *child, char *output, size_t capacity)
{
    size_t used = 0;
    for (;;) {
        ssize_t got;
        if (used + 1 >= capacity) { /* the beginning is what counts least */
            memmove(output, output + capacity / 2, used - capacity / 2);
            used -= capacity / 2;
        }
        got = read(child->output, output + used, capacity - 1 - used);
        if (got <= 0 && !(got < 0 && errno == EINTR)) {
            break;
        }
        used += got > 0 ? (size_t)got : 0;
    }
    output[used] = 0;
    close(child->output);
    while (waitpid(child->pid, &child->status, 0) < 0 && errno == EINTR) {
    }
    return WIFEXITED(child->status) && WEXITSTATUS(child->status) == 0;
}

static inline const char *p_how(const p_child *child)
{
    static char text[80];
    if (WIFSIGNALED(child->status)) {
        snprintf(text, sizeof text, "%s",
                 WTERMSIG(child->status) == SIGALRM ? "it hangs" : strsignal(WTERMSIG(child->status)));
    } else {
        snprintf(text, sizeof text, "exit status %d", WEXITSTATUS(child->status));
    }
    return text;
}

#endif
