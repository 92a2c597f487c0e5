#!/bin/sh
# Builds the programs of tests/compile with every language standard and optimisation, and runs them.
#   tests/compile.sh [build directory]        environment: BUILD CC CXX LDLIBS JOBS CI
#   OPTIMISATIONS, "-O0 -O2 -Os,-DNDEBUG -O2,-flto" for example
# Output is one line per case. With CI=true a skip is a failure.
set -u

cd "$(dirname "$0")/.." || exit 2
self=tests/$(basename "$0")
build=${1:-${BUILD:-build}}
CC=${CC:-cc}
if [ -z "${CXX:-}" ]; then
    case $CC in
    *gcc*) CXX=$(echo "$CC" | sed 's/\(.*\)gcc/\1g++/') ;;
    *clang*) CXX=$(echo "$CC" | sed 's/\(.*\)clang/\1clang++/') ;;
    *) CXX=c++ ;;
    esac
fi
LDLIBS=${LDLIBS:-}
export CC CXX LDLIBS

warnings="-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wundef -Wvla
    -Wwrite-strings -Werror"
c_warnings="-Wstrict-prototypes -Wmissing-prototypes -Wold-style-definition -Wc++-compat"
cxx_warnings=-Wold-style-cast
sources=tests/compile

# ---- one case: compile.sh --case <language> <standard> <options, with commas> <name>
# $out and $gcc_warnings come from the environment: see below.

compile() { # compile <c or c++> <standard> <source> <object> [option for C++]
    if [ "$1" = c ]; then
        # shellcheck disable=SC2086
        $CC -std="$2" $options $warnings $c_warnings $gcc_warnings -I. -I"$out" -c "$3" -o "$4"
    else
        # shellcheck disable=SC2086
        $CXX -std="$2" $options $warnings $cxx_warnings $gcc_warnings -I. -I"$out" ${5:-} -x c++ -c "$3" -o "$4"
    fi
}

link() { # link <c or c++> <objects...>, then run
    linker=$CC
    [ "$1" = c ] || linker=$CXX
    shift
    # shellcheck disable=SC2086
    $linker $options $warnings "$@" -o "$dir/program" $LDLIBS && "$dir/program"
}

# A single file is compiled alone; what consists of more files is spelt out.
build_case() {
    case $name in
    two_tus | static_twice)
        compile "$language" "$standard" "$sources/${name}_a.c" "$dir/a.o" &&
            compile "$language" "$standard" "$sources/${name}_b.c" "$dir/b.o" &&
            link "$language" "$dir/a.o" "$dir/b.o"
        ;;
    c_and_cxx) # the implementation is C, the program C++
        compile c c99 $sources/two_tus_a.c "$dir/a.o" &&
            compile c++ "$standard" $sources/two_tus_b.c "$dir/b.o" &&
            link c++ "$dir/a.o" "$dir/b.o"
        ;;
    c_and_exceptions)
        compile c c99 $sources/two_tus_a.c "$dir/a.o" &&
            compile c++ "$standard" $sources/exceptions.cpp "$dir/b.o" -DDECLARATIONS_ONLY &&
            link c++ "$dir/a.o" "$dir/b.o"
        ;;
    shadow)
        compile "$language" "$standard" $sources/two_tus_a.c "$dir/a.o" &&
            compile "$language" "$standard" $sources/shadow.c "$dir/b.o" &&
            link "$language" "$dir/a.o" "$dir/b.o"
        ;;
    declarations_only)
        compile "$language" "$standard" $sources/declarations_only.c "$dir/a.o"
        ;;
    strict_iso)
        compile "$language" "$standard" $sources/strict_iso.c "$dir/a.o" 2>"$dir/errors"
        status=$?
        cat "$dir/errors"
        errors=$(grep -c 'error:' "$dir/errors")
        if [ "$status" -eq 0 ] || [ "$errors" -ne 1 ] || ! grep -q '#error' "$dir/errors"; then
            echo "expected to fail with exactly one #error: exit status $status, $errors errors"
            return 1
        fi
        ;;
    tls)
        LDLIBS="$LDLIBS -lssl -lcrypto"
        compile "$language" "$standard" $sources/tls.c "$dir/a.o" && link "$language" "$dir/a.o"
        ;;
    cxx11 | exceptions)
        compile c++ "$standard" "$sources/$name.cpp" "$dir/a.o" && link c++ "$dir/a.o"
        ;;
    *)
        compile "$language" "$standard" "$sources/$name.c" "$dir/a.o" && link "$language" "$dir/a.o"
        ;;
    esac
}

if [ "${1:-}" = --case ]; then
    language=$2 standard=$3 name=$5
    options=$(echo "$4" | tr , ' ')
    dir=$out/$2_$3_$4_$5
    mkdir -p "$dir"
    if build_case >"$dir/log" 2>&1; then
        echo "ok    $name $standard $options" >"$dir/result"
    else
        {
            echo "FAIL  $name $standard $options"
            head -n 40 "$dir/log" | sed 's/^/      /'
        } >"$dir/result"
    fi
    exit 0
fi

# ---- all cases

case $build in
/*) ;;
*) build=$PWD/$build ;;
esac
out=$build/compile/$(basename "${CC%% *}")
export out
rm -rf "$out"
mkdir -p "$out"
: >"$out/skips"

skip() { echo "skip  $1" >>"$out/skips"; }

# Whether a trivial program can be built with a compiler and these options.
can() { # can <language> <options...>
    compiler=$CC
    [ "$1" = c ] || compiler=$CXX
    language=$1
    shift
    echo 'int main(void) { return 0; }' >"$out/can.c"
    # shellcheck disable=SC2086
    $compiler "$@" -x "$language" "$out/can.c" -o "$out/can" 2>"$out/can.log"
}

gcc_warnings=
if can c -Wlogical-op -Werror; then gcc_warnings=-Wlogical-op; fi # clang does not have it
export gcc_warnings

sed -n 's/^TSRV_API [^(]*[ *]\(tsrv_[a-z0-9_]*\)(.*/FUNCTION(\1)/p' tcpserver.h |
    sort -u >"$out/functions.inc"

optimisations=${OPTIMISATIONS:--O0 -O2 -Os,-DNDEBUG -O2,-flto}
cases() { # cases <language> <standard> <names at every optimisation> <names at -O0>
    if ! can "$1" -std="$2"; then
        skip "$1: the compiler does not know -std=$2"
        return
    fi
    for optimisation in $optimisations; do
        # shellcheck disable=SC2046
        if ! can "$1" -std="$2" $(echo "$optimisation" | tr , ' '); then
            skip "$1 $2: cannot build with $optimisation"
            continue
        fi
        for name in $3; do echo "$1 $2 $optimisation $name"; done
    done
    for name in $4; do echo "$1 $2 -O0 $name"; done
}

# What differs most at every optimisation, as the oldest C and C++; one program of each newer one; the rest at -O0.
tls=
if echo '#include <openssl/ssl.h>' | $CC -E -x c - >/dev/null 2>&1; then tls=tls; else skip 'TLS: no OpenSSL'; fi
most="two_tus static_twice no_coroutines $tls"
small='no_threads ucontext second_include shadow declarations_only'
{
    strict=
    [ "$(uname -s)" = Linux ] && strict=strict_iso
    cases c c99 "c99 $most" "$small $strict"
    cases c c11 '' "c99 $most $small $strict"
    cases c gnu17 c99 "late_gnu_source $most $small"
    cases c gnu99 '' late_gnu_source
    if can c++; then
        cases c++ c++11 "cxx11 exceptions $most" "$small c_and_cxx"
        cases c++ c++20 cxx11 "exceptions $most $small c_and_cxx c_and_exceptions"
    else
        skip "no C++ compiler ($CXX)"
    fi
} >"$out/cases"

jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)}
xargs -P "$jobs" -n 4 sh "$self" --case <"$out/cases"

while read -r language standard optimisation name; do
    result=$out/${language}_${standard}_${optimisation}_$name/result
    [ -s "$result" ] || echo "FAIL  $name $standard $optimisation: no result" >"$result"
    cat "$result"
done <"$out/cases" >"$out/results"
cat "$out/results" "$out/skips"
passed=$(grep -c '^ok ' "$out/results")
failed=$(grep -c '^FAIL ' "$out/results")
skipped=$(grep -c '^skip ' "$out/skips")
echo "$passed passed, $failed failed, $skipped skipped"
[ "${CI:-}" = true ] && failed=$((failed + skipped))
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
