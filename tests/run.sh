#!/bin/sh
# Runs test programs, each in three parts and eight of these at once, and adds up what they say: most of their time
# is spent waiting. A test that fails beside so many others runs once more alone, which is said, and counts then.
#   tests/run.sh 'command in front, or empty' 'backend, or empty' program...
front=$1 backend=$2
shift 2
logs=$(mktemp -d) || exit 1
trap 'rm -rf "$logs"' EXIT
for program in "$@"; do
    for part in 0 1 2; do echo "$program $part"; done
done | FRONT=$front BACKEND=$backend LOGS=$logs xargs -P 8 -n 2 sh -c '
    log=$LOGS/$(basename "$0").$1
    begin=$(date +%s)
    $FRONT "$0" --part "$1/3" ${BACKEND:+--backend "$BACKEND"} >"$log" 2>&1
    echo $? >"$log.status"
    echo $(($(date +%s) - begin)) >"$log.seconds"'

most=10 # that may fail: more of them are no accident
again=$(cat "$logs"/* | grep -c '^FAIL ')

# run_again <program> <log>: alone, each test that has failed there; in `good`, how many of them pass.
run_again() {
    good=0
    for label in $(sed -n 's/^FAIL \([^:]*\):.*/\1/p' "$2"); do
        # shellcheck disable=SC2086
        if $front "$1" --exact "$label" >"$logs/alone" 2>&1 && grep -q '^1 passed, 0 failed' "$logs/alone"; then
            echo "^ $label has passed alone"
            good=$((good + 1))
        else
            echo "^ $label has failed alone, too:"
            cat "$logs/alone"
        fi
    done
}

passed=0 failed=0 skipped=0
for program in "$@"; do
    name=$(basename "$program")
    all_p=0 all_f=0 all_s=0 seconds=0
    for part in 0 1 2; do
        log=$logs/$name.$part
        status=$(cat "$log.status")
        last=$(tail -n 1 "$log")
        seconds=$((seconds + $(cat "$log.seconds")))
        sed '$d' "$log"
        if echo "$last" | grep -qE '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$'; then
            eval "$(echo "$last" | sed 's/\([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) .*/p=\1 f=\2 s=\3/')"
            if [ "$f" -gt 0 ] && [ "$again" -le $most ]; then
                run_again "$program" "$log"
                p=$((p + good)) f=$((f - good))
            elif [ "$f" -eq 0 ] && [ "$status" -ne 0 ]; then
                f=1
            fi
        else
            p=0 f=1 s=0
            echo "$name: ended with status $status and no summary"
        fi
        all_p=$((all_p + p)) all_f=$((all_f + f)) all_s=$((all_s + s))
    done
    echo "$name: $all_p passed, $all_f failed, $all_s skipped, $seconds s"
    passed=$((passed + all_p)) failed=$((failed + all_f)) skipped=$((skipped + all_s))
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
