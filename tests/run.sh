#!/bin/sh
# Runs test programs, eight at once, and adds up what they say: most of their time is spent waiting.
#   tests/run.sh 'command in front, or empty' 'backend, or empty' program...
front=$1 backend=$2
shift 2
logs=$(mktemp -d) || exit 1
trap 'rm -rf "$logs"' EXIT
printf '%s\n' "$@" | FRONT=$front BACKEND=$backend LOGS=$logs xargs -P 8 -I PROGRAM sh -c '
    begin=$(date +%s)
    $FRONT PROGRAM ${BACKEND:+--backend "$BACKEND"} >"$LOGS/$(basename PROGRAM)" 2>&1
    echo $? >"$LOGS/$(basename PROGRAM).status"
    echo $(($(date +%s) - begin)) >"$LOGS/$(basename PROGRAM).seconds"'
passed=0 failed=0 skipped=0
for program in "$@"; do
    name=$(basename "$program")
    status=$(cat "$logs/$name.status")
    last=$(tail -n 1 "$logs/$name")
    if echo "$last" | grep -qE '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$'; then
        eval "$(echo "$last" | sed 's/\([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) .*/p=\1 f=\2 s=\3/')"
        passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
        [ "$status" -eq 0 ] || [ "$f" -ne 0 ] || failed=$((failed + 1))
    else
        last="ended with status $status and no summary"
        failed=$((failed + 1))
    fi
    echo "$name: $last, $(cat "$logs/$name.seconds") s"
    [ "$status" -eq 0 ] || sed '$d' "$logs/$name"
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
