/* For tests/coverage.sh: the counters of a process are in a file that it maps, so that those of a worker that is killed, or
 * leaves by _exit, count too. Counts of some branches are the differences of others, so that a child of a fork needs a
 * file of its own that begins with what its parent had counted: in one file, the two ways out of a fork would be more
 * than the one way in. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

extern intptr_t __llvm_profile_counter_bias __attribute__((visibility("hidden")));
char *__llvm_profile_begin_counters(void);
void __llvm_profile_initialize(void);

/* Where a file is mapped that this address is in. */
static int find(uintptr_t address, uintptr_t *start, size_t *size, off_t *offset, char *path)
{
    char line[2000];
    FILE *maps = fopen("/proc/self/maps", "r");
    int found = 0;
    while (maps != NULL && !found && fgets(line, sizeof line, maps) != NULL) {
        unsigned long first, last, at;
        found = strstr(line, ".profraw") != NULL &&
                sscanf(line, "%lx-%lx %*s %lx %*s %*s %999s", &first, &last, &at, path) == 4 &&
                address >= first && address < last;
        *start = first;
        *size = last - first;
        *offset = (off_t)at;
    }
    if (maps != NULL) {
        fclose(maps);
    }
    return found;
}

/* In a fork's child: the counters go on in a copy of the file. */
static void forked(void)
{
    char name[1000], from[1000];
    uintptr_t start;
    size_t size;
    off_t offset;
    struct stat info;
    struct timespec now;
    if (__llvm_profile_counter_bias == 0 ||
        !find((uintptr_t)__llvm_profile_begin_counters() + (uintptr_t)__llvm_profile_counter_bias, &start, &size,
              &offset, from)) {
        return;
    }
    clock_gettime(CLOCK_MONOTONIC, &now); /* numbers of processes come again in name spaces */
    snprintf(name, sizeof name, "%s/%ld.%ld%09ld.profraw", getenv("COVER_PROFILES"), (long)getpid(),
             (long)now.tv_sec, now.tv_nsec);
    int in = open(from, O_RDONLY), out = open(name, O_RDWR | O_CREAT | O_TRUNC, 0666);
    if (in >= 0 && out >= 0 && fstat(in, &info) == 0 && copy_file_range(in, NULL, out, NULL, (size_t)info.st_size, 0) ==
        info.st_size) {
        mmap((void *)start, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, out, offset);
    }
    close(in);
    close(out);
}

/* A program that an upgrade starts never comes to main. */
__attribute__((constructor(101))) static void set_up(void)
{
    __llvm_profile_initialize();
    pthread_atfork(NULL, NULL, forked);
}
