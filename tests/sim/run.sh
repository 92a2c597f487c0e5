#!/bin/sh
# Runs the programs of the simulated kernel, and adds up what they say.
#   tests/sim/run.sh <their directory> <seconds>
programs=$1 seconds=$2
half=$((seconds / 2))
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

run kernel_test 1000
run table
run sim --seconds "$half"
run streams --seconds "$half"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
