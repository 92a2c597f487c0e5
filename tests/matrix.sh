#!/bin/sh
# The tests on other processors, compilers and C libraries: built, and run by the kernel or by qemu-user.
#   tests/matrix.sh [target...]     environment: BUILD TESTS OPT JOBS ZIG CI
# A line for each target, and a table of them in BUILD/platforms.txt. A target whose compiler, emulator or kernel is not
# here is a skip that says so; with CI=true it is a failure. TLS is left out: most have no OpenSSL here.
set -u

cd "$(dirname "$0")/.." || exit 2
BUILD=${BUILD:-build}
ZIG=${ZIG:-zig}
JOBS=${JOBS:-2}
OPT=${OPT:--O1}
export TEST_TIMEOUT_SCALE="${TEST_TIMEOUT_SCALE:-10}" # an emulator is slow
ZIG_GLOBAL_CACHE_DIR=${ZIG_GLOBAL_CACHE_DIR:-$PWD/$BUILD/zig-cache}
export ZIG_GLOBAL_CACHE_DIR
# What knows streams, loops, sockets and stacks; what is about processes and signals would test the emulator.
TESTS=${TESTS:-buffer util coroutine condition ioloop netutil read write wait output stream iostream handler ends turn
    server total}
out=$BUILD/matrix
table=$BUILD/platforms.txt
passed=0 failed=0 skipped=0
mkdir -p "$out" || exit 2

# target, compiler and its flags, what runs the programs
targets() {
    cat <<END
x86-64, gcc|gcc|
x86-64, clang 14|clang-14|
x86-64, clang 19|clang-19|
x86-64, musl|musl-gcc|
x86 (32 bits)|i686-linux-gnu-gcc|/usr/i686-linux-gnu/lib/ld-linux.so.2 --library-path /usr/i686-linux-gnu/lib
x86 (32 bits), musl|$ZIG cc -target x86-linux-musl|
aarch64|aarch64-linux-gnu-gcc|qemu-aarch64 -L /usr/aarch64-linux-gnu
aarch64, musl|$ZIG cc -target aarch64-linux-musl|qemu-aarch64
armhf|arm-linux-gnueabihf-gcc|qemu-arm -L /usr/arm-linux-gnueabihf
armhf, musl|$ZIG cc -target arm-linux-musleabihf|qemu-arm
armel|arm-linux-gnueabi-gcc|qemu-arm -L /usr/arm-linux-gnueabi
riscv64|riscv64-linux-gnu-gcc|qemu-riscv64 -L /usr/riscv64-linux-gnu
s390x|s390x-linux-gnu-gcc|qemu-s390x -L /usr/s390x-linux-gnu
ppc64le|powerpc64le-linux-gnu-gcc|qemu-ppc64le -L /usr/powerpc64le-linux-gnu
mips|mips-linux-gnu-gcc|qemu-mips -L /usr/mips-linux-gnu
mipsel|mipsel-linux-gnu-gcc|qemu-mipsel -L /usr/mipsel-linux-gnu
mips64el|mips64el-linux-gnuabi64-gcc|qemu-mips64el -L /usr/mips64el-linux-gnuabi64
END
}

# Is there what builds and runs this? Else it says what is missing.
missing() { # missing <compiler and flags> <what runs the programs>
    compiler=${1%% *} runner=${2%% *}
    command -v "$compiler" >/dev/null || { echo "no $compiler" && return; }
    [ -z "$runner" ] || command -v "$runner" >/dev/null || { echo "no $runner" && return; }
    echo 'int main(void) { return 0; }' >"$out/one.c"
    # shellcheck disable=SC2086
    $1 -o "$out/one" "$out/one.c" >"$out/log" 2>&1 || { echo "$compiler does not link" && return; }
    # shellcheck disable=SC2086
    $2 "$out/one" >"$out/log" 2>&1 || echo "this kernel runs no such programs"
}

# Each program is built on its own; run.sh runs them, and once more alone what fails beside the others.
run() { # run <target> <compiler and flags> <what runs the programs>
    folder=$out/$(echo "$1" | tr -c 'a-z0-9_\n' '-')
    rm -rf "$folder"
    mkdir -p "$folder"
    for test in $TESTS; do echo "$test"; done | COMPILER=$2 FOLDER=$folder OPT=$OPT xargs -P "$JOBS" -n 1 sh -c '
        $COMPILER -std=gnu99 "$OPT" -g0 -Wall -Wextra -Wpedantic -Wshadow -Werror -DTSRV_DEBUG -UNDEBUG \
            -o "$FOLDER/$0" "tests/$0_test.c" -lpthread >"$FOLDER/$0.log" 2>&1 ||
            { rm -f "$FOLDER/$0" && grep -m 5 error "$FOLDER/$0.log"; }'
    programs=$(for test in $TESTS; do [ -x "$folder/$test" ] && echo "$folder/$test"; done)
    unbuilt=$(($(echo "$TESTS" | wc -w) - $(echo "$programs" | wc -w)))
    # shellcheck disable=SC2086
    sh tests/run.sh "$3" '--backend epoll' $programs >"$folder/all.log" 2>&1
    grep -E '^FAIL|^\^|no summary' "$folder/all.log"
    counts=$(tail -n 1 "$folder/all.log" | awk -v unbuilt="$unbuilt" '{print $1 + 0, $3 + unbuilt}')
    passed=$((passed + ${counts% *})) failed=$((failed + ${counts#* }))
    echo "$1: ${counts% *} passed, ${counts#* } failed"
    echo "| $1 | ${3%% *} | ${counts% *} | ${counts#* } |" >>"$table"
}

{
    echo "Tests of \`$(echo "$TESTS" | tr -s '\n ' '  ')\` on epoll, $(date -u +%Y-%m-%d)."
    echo
    echo '| target | run by | passed | failed |'
    echo '|---|---|---|---|'
} >"$table"
targets >"$out/targets"
while IFS='|' read -r target compiler runner; do
    [ $# -eq 0 ] || case "|$(printf '%s|' "$@")" in *"|$target|"*) ;; *) continue ;; esac
    why=$(missing "$compiler" "$runner")
    if [ -n "$why" ]; then
        echo "skip  $target: $why"
        echo "| $target | not run: $why | | |" >>"$table"
        skipped=$((skipped + 1))
    else
        run "$target" "$compiler" "$runner"
    fi
done <"$out/targets"
echo "$passed passed, $failed failed, $skipped skipped"
[ "${CI:-}" = true ] && failed=$((failed + skipped))
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
