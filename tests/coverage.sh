#!/bin/sh
# Which branches of the header no test takes: builds the tests with clang's coverage, runs them on every backend, over
# TLS and over memory, and prints each branch that was never true, or never false, and how many were taken: by section,
# and in all. Fails when fewer are taken than FLOOR percent, or when more than 40 places are marked as never happening,
# which is what TSRV_ASSERT marks. That a test fails is for make test-all to say.
#   tests/coverage.sh [program...]     environment: BUILD SECTIONS OPTIONS JOBS FLOOR LLVM CI
#   OPTIONS='--short' tests/coverage.sh supervisor process      a part, quickly; a program is a file of tests, a group
#                                                               of tests/groups, or a file with _tls, _memory, _kqueue,
#                                                               or _runtimes: C++'s and LeakSanitizer's are there
set -u
export TEST_TIMEOUT_SCALE="${TEST_TIMEOUT_SCALE:-10}" # counting is slow

cd "$(dirname "$0")/.." || exit 2
build=${BUILD:-build}/coverage
programs=${*:-tls supervisor iostream_tls process supervisor_fault servers streams loops reads fault client util netutil
    platform server tls_options tls_fault iostream_memory stream_memory handler_memory reads_kqueue streams_kqueue
    loops_kqueue servers_kqueue fault_kqueue client_kqueue coroutine_runtimes}
llvm=${LLVM:-$(clang --version 2>/dev/null | sed -n '1s/.*version \([0-9]*\).*/-\1/p')}
profdata=llvm-profdata$llvm cov=llvm-cov$llvm
for tool in clang "$profdata" "$cov" python3; do
    if ! command -v "$tool" >/dev/null; then
        echo "skip  $tool is not there (Debian: clang llvm${llvm} python3)"
        [ "${CI:-}" = true ] && exit 1
        exit 0
    fi
done

rm -rf "$build"
mkdir -p "$build" || exit 2
clang -std=gnu99 -O1 -c -o "$build/fork.o" tests/coverage/fork.c || exit 2

# One program: built, run, its counters merged into one file. Several users write them.
cat >"$build/job" <<'SH'
program=$1 name=${1%_kqueue} flags= libs=-lpthread backend=
[ "$name" = "$1" ] || flags=-Itests/kqueue backend='--backend kqueue'
case $name in
*_tls) name=${name%_tls} flags="$flags -DT_TLS -DTSRV_TLS_OPENSSL" libs='-lpthread -lssl -lcrypto' ;;
tls*) libs='-lpthread -lssl -lcrypto' ;;
*_memory) name=${name%_memory} flags="$flags -DT_MEMORY" ;;
*_runtimes) name=${name%_runtimes} flags=-fsanitize=leak libs='-lpthread -Wl,--no-as-needed -lstdc++' ;;
esac
source=tests/${name}_test.c
[ -f "$source" ] || source=tests/groups/$name.c
clang -std=gnu99 -O0 -g -DTSRV_DEBUG -w -fprofile-instr-generate -fprofile-update=atomic -fcoverage-mapping \
    -mllvm -runtime-counter-relocation $flags -o "$WHERE/$program" "$source" "$WHERE/fork.o" $libs || exit 1
umask 0
export COVER_PROFILES="$WHERE/$program.profiles" LSAN_OPTIONS=detect_leaks=0 # which other tests look for
mkdir "$COVER_PROFILES"
for part in 0 1 2 3; do
    LLVM_PROFILE_FILE="$COVER_PROFILES/%p%c.profraw" "$WHERE/$program" --part $part/4 $backend $OPTIONS \
        >"$WHERE/$program.$part.out" 2>&1 &
done
wait
cat "$WHERE/$program".?.out | grep '^FAIL' | sed "s/^/$program: /"
# A process that was killed while it made its file has left one that is cut.
$PROFDATA merge -sparse -failure-mode=all -o "$WHERE/$program.profdata" "$COVER_PROFILES" 2>/dev/null
rm -rf "$COVER_PROFILES"
echo "$program: $(awk '/ passed, .* failed, .* skipped$/ { p += $1; f += $3; s += $5; parts++ }
    END { printf "%d passed, %d failed, %d skipped", p, f + 4 - parts, s }' "$WHERE/$program".?.out)"
SH
# A test that fails beside others is not what is looked for here: make test-all runs them, too.
for program in $programs; do echo "$program"; done |
    WHERE=$PWD/$build PROFDATA=$profdata OPTIONS=${OPTIONS:-} xargs -P "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -n 1 \
        sh "$build/job" | tee "$build/programs"

objects='' merged=''
for program in $programs; do
    [ -f "$build/$program.profdata" ] || continue
    objects="$objects ${objects:+-object }$build/$program" merged="$merged $build/$program.profdata"
done
# shellcheck disable=SC2086
$profdata merge -sparse -o "$build/all.profdata" $merged &&
    $cov export -skip-functions -instr-profile="$build/all.profdata" $objects >"$build/all.json" 2>"$build/export.err" ||
    exit 2
mkdir -p "${BUILD:-build}/trust"
python3 tests/coverage/report.py "$build/all.json" "${FLOOR:-0}" "${SECTIONS:-}" >"$build/report"
status=$?
cat "$build/report"
[ $# -gt 0 ] || sed -n 's/^all: //p' "$build/report" >"${BUILD:-build}/trust/coverage.txt"
exit $status
