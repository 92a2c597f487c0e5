#!/bin/sh
# Which branches of the supervisor no test takes: builds the tests of workers with clang's coverage, runs them,
# and prints the branches of the sections >>process, >>supervise and >>serve of tcpserver.h that were never true, or
# never false, and how many were taken.
#   tests/supervisor_cover.sh [build directory]        environment: BUILD TESTS LLVM CI
# The counters are in files that the processes map (continuous mode), so that those of a worker that is killed, or
# leaves by _exit, count too. What a fork's child counts is in its parent's file, an upgrade's program has its own.
set -u

cd "$(dirname "$0")/.." || exit 2
build=${1:-${BUILD:-build}}/cover
tests=${TESTS:-supervisor process systemd}
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
objects=
for test in $tests; do
    clang -std=gnu99 -O0 -g -fprofile-instr-generate -fcoverage-mapping -mllvm -runtime-counter-relocation \
        -o "$build/${test}_test" "tests/${test}_test.c" -lpthread || exit 2
    objects="$objects ${objects:+-object }$build/${test}_test"
done
for test in $tests; do # several programs at once, and others' users write here too
    chmod 0777 "$build/profiles"
    (
        umask 0
        LLVM_PROFILE_FILE="$PWD/$build/profiles/$test.%p%c.profraw" "$build/${test}_test" >"$build/$test.out" 2>&1
        echo "$test: $(tail -n 1 "$build/$test.out")"
        grep '^FAIL' "$build/$test.out"
    ) &
done
wait

# A process that was killed while it made its file has left one that is cut.
find "$build/profiles" -name '*.profraw' -size +0 >"$build/list"
while read -r file; do
    "$profdata" show "$file" >/dev/null 2>&1 && echo "$file"
done <"$build/list" >"$build/good"
"$profdata" merge -sparse -f "$build/good" -o "$build/all.profdata" || exit 2
# shellcheck disable=SC2086
"$cov" export -format=text -instr-profile="$build/all.profdata" $objects tcpserver.h >"$build/all.json" || exit 2
python3 - "$build/all.json" <<'PYTHON'
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

wanted, all_count, all_taken = ('process', 'supervise', 'serve'), 0, 0
for section in wanted:
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
