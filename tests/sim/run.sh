#!/bin/sh
# Runs the programs of the simulated kernel, and adds up what they say; two lines of it are for the scoreboard.
#   tests/sim/run.sh <their directory> <seconds> <directory of the scoreboard>
programs=$1 seconds=$2 trust=$3
third=$((seconds / 3))
passed=0 failed=0 skipped=0
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT

# run <program> <options...>: its last line is `N passed, N failed, N skipped`.
run() {
    printf '== %s\n' "$*"
    "$programs/$1" $(shift && echo "$@") >"$log" 2>&1
    status=$?
    cat "$log"
    counts=$(tail -n 1 "$log" | grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' | tr -cd '0-9 ')
    # shellcheck disable=SC2086
    set -- ${counts:-0 1 0}
    [ "$status" -eq 0 ] || [ "$2" -ne 0 ] || set -- "$1" 1 "$3"
    passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + $3))
}

mkdir -p "$trust" || exit 2
run kernel_test 1000
run table --pairs "$third"
pairs=$(sed -n 's/^\([0-9]*\) pairs of failing calls$/\1/p' "$log")
if [ "$failed" -eq 0 ]; then
    sed -n "s/^\\([0-9]* places\\), \\([0-9]* cells\\), .*/\\2 at \\1, and ${pairs:-0} pairs of calls that fail in one run, 0 failed, 0 empty/p" \
        "$log" >"$trust/faults.txt"
fi
[ "${pairs:-0}" -gt 0 ] || [ "$third" -eq 0 ] || failed=$((failed + 1)) # they ended before they began
run sim --seconds "$third"
runs=$(sed -n 's/^\([0-9]*\) runs from seed.*/\1/p' "$log")
run streams --seconds "$third"
runs=$((${runs:-0} + $(sed -n 's/^\([0-9]*\) runs from seed.*/\1/p' "$log")))
if [ -x "$programs/streams_tls" ]; then
    run streams_tls --seconds "$third"
    runs=$((runs + $(sed -n 's/^\([0-9]*\) runs from seed.*/\1/p' "$log")))
else
    echo '== streams_tls: no OpenSSL here'
    [ "${CI:-}" = true ] && failed=$((failed + 1)) || skipped=$((skipped + 1))
fi
run sim --all 9 --seconds "$third"
run supervisor --all 7 --seconds "$third"
run supervisor --seconds "$third"
runs=$((${runs:-0} + $(sed -n 's/^\([0-9]*\) runs from seed.*/\1/p' "$log")))
[ "$failed" -ne 0 ] || echo "$runs runs in $seconds s, from seed 1" >"$trust/simulation.txt"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
