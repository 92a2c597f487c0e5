#!/bin/sh
# Runs test programs and adds up what they say.
#   tests/run.sh 'command in front, or empty' 'backend, or empty' program...
front=$1 backend=$2
shift 2
passed=0 failed=0 skipped=0
for program in "$@"; do
    printf '%s: ' "$(basename "$program")"
    # shellcheck disable=SC2086
    output=$($front "$program" ${backend:+--backend "$backend"} 2>&1)
    status=$?
    last=$(printf '%s\n' "$output" | tail -n 1)
    case $last in
    *' passed, '*' failed, '*' skipped')
        counts=$(echo "$last" | tr -cd "0-9 ")
        passed=$((passed + $(echo "$counts" | awk '{ print $1 }')))
        failed=$((failed + $(echo "$counts" | awk '{ print $2 }')))
        skipped=$((skipped + $(echo "$counts" | awk '{ print $3 }')))
        [ $status -eq 0 ] || [ "$(echo "$counts" | awk '{ print $2 }')" -ne 0 ] || failed=$((failed + 1))
        ;;
    *)
        last="ended with status $status and no summary"
        failed=$((failed + 1))
        ;;
    esac
    echo "$last"
    [ $status -eq 0 ] || printf '%s\n' "$output" | sed '$d'
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
