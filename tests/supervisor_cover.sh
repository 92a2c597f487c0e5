#!/bin/sh
# Which branches of the supervisor no test takes: builds the tests of workers with clang's coverage, runs them,
# and prints the branches of the header's sections about processes that were never true, or never false, and how
# many were taken.
#   tests/supervisor_cover.sh [build directory]        environment: BUILD TESTS BACKEND SECTIONS LLVM CI
# The counters are in files that the processes map (continuous mode), so that those of a worker that is killed, or
# leaves by _exit, count too. Counts of some branches are the differences of others, so that a fork's child needs a
# file of its own that begins with what its parent had counted: in one file, the two ways out of a fork would be
# more than the one way in.
set -u

cd "$(dirname "$0")/.." || exit 2
build=${1:-${BUILD:-build}}/cover
tests=${TESTS:-supervisor supervisor_fault process systemd tls:hangup} # behind a colon: a part of the tests' names
sections=${SECTIONS:-notify worker identity process children supervise rounds start serve}
backend=${BACKEND:-epoll}
llvm=${LLVM:-$(clang --version 2>/dev/null | sed -n '1s/.*version \([0-9]*\).*/-\1/p')}
profdata=llvm-profdata$llvm cov=llvm-cov$llvm
for tool in clang "$profdata" "$cov"; do
    if ! command -v "$tool" >/dev/null; then
        echo "skip  $tool is not there (Debian: clang llvm${llvm})"
        [ "${CI:-}" = true ] && exit 1
        exit 0
    fi
done

rm -rf "$build"
mkdir -p "$build/profiles" || exit 2
cat >"$build/fork.c" <<'C'
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
C
clang -std=gnu99 -O1 -c -o "$build/fork.o" "$build/fork.c" || exit 2
objects=
export COVER_PROFILES="$PWD/$build/profiles"
for test in $tests; do
    test=${test%:*}
    clang -std=gnu99 -O0 -g -fprofile-instr-generate -fprofile-update=atomic \
        -fcoverage-mapping -mllvm -runtime-counter-relocation \
        -o "$build/${test}_test" "tests/${test}_test.c" "$build/fork.o" -lpthread \
        $(case $test in tls) echo -lssl -lcrypto ;; esac) || exit 2
    objects="$objects ${objects:+-object }$build/${test}_test"
done
for choice in $tests; do # several programs at once, and others' users write here too
    chmod 0777 "$build/profiles"
    (
        umask 0
        test=${choice%:*} part=${choice#"$test"}
        LLVM_PROFILE_FILE="$PWD/$build/profiles/$test.%p%c.profraw" "$build/${test}_test" --backend "$backend" \
            ${part:+"${part#:}"} >"$build/$test.out" 2>&1
        echo "$test: $(tail -n 1 "$build/$test.out")"
        grep '^FAIL' "$build/$test.out"
    ) &
done
wait

# A process that was killed while it made its file has left one that is cut.
find "$build/profiles" -name '*.profraw' -size +0 >"$build/list"
"$profdata" merge -sparse -failure-mode=all -f "$build/list" -o "$build/all.profdata" 2>/dev/null || exit 2
# shellcheck disable=SC2086
"$cov" export -format=text -instr-profile="$build/all.profdata" $objects tcpserver.h >"$build/all.json" || exit 2
python3 - "$build/all.json" "$sections" <<'PYTHON'
import json, re, sys

lines = open('tcpserver.h').read().split('\n')
tag, tags, function, functions = '', [], '', []
for line in lines:
    found = re.match(r' \* >>(\w+)  ', line)
    tag = found.group(1) if found else tag
    found = re.match(r'(?:static |TSRV_API )[^=;]*?(\w+)\([^;]*$', line)
    function = found.group(1) if found else function
    tags.append(tag)
    functions.append(function)

# One count for each branch, over all programs and all instances of a function.
taken = {}
for file in json.load(open(sys.argv[1]))['data'][0]['files']:
    if not file['filename'].endswith('tcpserver.h'):
        continue
    for branch in file['branches']:
        place, counts = tuple(branch[:4]), branch[4:6]
        old = taken.get(place, [0, 0])
        taken[place] = [old[0] + counts[0], old[1] + counts[1]]

all_count = all_taken = 0
for section in sys.argv[2].split():
    count = good = 0
    for (line, column, _, end), (true, false) in sorted(taken.items()):
        if tags[line - 1] != section:
            continue
        count, good = count + 2, good + (true > 0) + (false > 0)
        if true == 0 or false == 0:
            never = 'never reached' if true == false == 0 else 'never true' if true == 0 else 'never false'
            print('%d: %s: %s: %s' % (line, functions[line - 1], never, lines[line - 1].strip()))
    if count > 0:
        print('>>%s: %d of %d branches, %.1f %%' % (section, good, count, 100.0 * good / count))
    all_count, all_taken = all_count + count, all_taken + good
print('all: %d of %d branches, %.1f %%' % (all_taken, all_count, 100.0 * all_taken / max(all_count, 1)))
PYTHON
