/* What the load programs share: clocks, and what a server has used of its processor. */
#ifndef BENCH_H
#define BENCH_H

#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#define TRANSFER ((size_t)64 << 20) /* bytes of one upload or download */

static inline uint64_t clock_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline uint64_t now_ns(void)
{
    return clock_ns(CLOCK_MONOTONIC);
}

/* The first number of a schedstat file: nanoseconds on a processor, in the program and in the kernel. */
static inline uint64_t schedstat(const char *path)
{
    unsigned long long ns = 0;
    FILE *file = fopen(path, "r");
    if (file != NULL) {
        if (fscanf(file, "%llu", &ns) != 1) {
            ns = 0;
        }
        fclose(file);
    }
    return ns;
}

/* What all threads of a process have used so far; 0 without a pid. */
static inline uint64_t process_cpu(int pid)
{
    char path[512];
    uint64_t sum = 0;
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *tasks = pid > 0 ? opendir(path) : NULL;
    for (struct dirent *task; tasks != NULL && (task = readdir(tasks)) != NULL;) {
        if (task->d_name[0] != '.') {
            snprintf(path, sizeof path, "/proc/%d/task/%s/schedstat", pid, task->d_name);
            sum += schedstat(path);
        }
    }
    if (tasks != NULL) {
        closedir(tasks);
    }
    return sum;
}

/* The time that is measured, from its first moment to its last. */
typedef struct window {
    int pid; /* of the server */
    uint64_t began, server, client;
} window;

static inline void window_begin(window *w, int pid)
{
    w->pid = pid;
    w->server = process_cpu(pid);
    w->client = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    w->began = now_ns();
}

/* Ends the window and prints its part of the result: an object of JSON that the caller closes. */
static inline void window_report(const window *w, uint64_t requests, uint64_t errors)
{
    double ns = (double)(now_ns() - w->began);
    double server = (double)(process_cpu(w->pid) - w->server);
    double client = (double)(clock_ns(CLOCK_PROCESS_CPUTIME_ID) - w->client);
    printf("{\"requests\": %llu, \"errors\": %llu, \"rate\": %.0f, \"cpu_ns\": %.1f, \"server_busy\": %.3f, "
           "\"client_busy\": %.3f",
           (unsigned long long)requests, (unsigned long long)errors, (double)requests / ns * 1e9,
           requests > 0 ? server / (double)requests : 0, server / ns, client / ns);
}

#endif
