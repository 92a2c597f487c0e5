#!/bin/sh
# Each fuzzer for a while, in CI and for the scoreboard: what is kept in the repository, then others, which begin the
# same way in every run; an hour of them is for whoever changes what is tested.
#   tests/fuzz/short.sh [build directory [seconds for each]]
cd "$(dirname "$0")/../.." || exit 2
build=${1:-build} seconds=${2:-60} passed=0 failed=0 runs=0
mkdir -p "$build/trust"

# fuzz <name> <longest input>
fuzz() {
    log=$build/fuzz/$1.log
    if "$build/fuzz/$1" "tests/fuzz/found/$1"/* >"$log" 2>&1 &&
        "$build/fuzz/$1" -max_len="$2" -timeout=200 -seed=1 -max_total_time="$seconds" \
            -artifact_prefix="$build/fuzz/$1-" "$build/fuzz/$1.corpus" "tests/fuzz/found/$1" >>"$log" 2>&1 &&
        count=$(sed -n 's/^Done \([0-9]*\) runs.*/\1/p' "$log" | tail -n 1) && [ -n "$count" ]; then
        echo "ok    fuzz: $1, $count inputs"
        passed=$((passed + 1)) runs=$((runs + count))
    else
        echo "FAIL  fuzz: $1"
        grep -E 'VIOLATION|Assert|ERROR|artifact' "$log" || tail -n 20 "$log"
        failed=$((failed + 1))
    fi
}
fuzz api 300
fuzz until 600
fuzz proxy 400
fuzz handed 100
fuzz tls 200

[ $failed -ne 0 ] || echo "$runs inputs of 5 fuzzers, $seconds s each, seed 1" >"$build/trust/fuzz.txt"
echo "$passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ]
