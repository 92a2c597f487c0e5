#!/bin/sh
# Runs test programs, each in several parts and many of these at once, since most of their time is spent waiting; says
# of each program what came out as soon as all of its parts have ended, and adds up. A test that fails beside so many
# others runs once more alone in the end, which is said, and counts then.
#   tests/run.sh 'command in front, or empty' 'options of the programs, or empty' program...
# MISSING in the environment names programs that could not be built, each with what is missing: tls:OpenSSL.
front=$1 options=$2
shift 2
parts='0 1 2 3 4 5'
logs=$(mktemp -d) || exit 1
trap 'rm -rf "$logs"' EXIT

# What one part of a program does; the last of its parts to end tells of all of them.
cat >"$logs/job" <<'SH'
name=$(basename "$1") part=$2
log=$LOGS/$name.$part
# The tests count allocations themselves, but for OpenSSL's; to look for leaks once more takes AddressSanitizer as long
# as all the rest.
case $name in
*tls* | coroutine*) ;;
*) export ASAN_OPTIONS="detect_leaks=0:${ASAN_OPTIONS:-}" ;;
esac
begin=$(date +%s)
$FRONT "$1" --part "$part/6" $OPTIONS >"$log.running" 2>&1
echo "$? $(($(date +%s) - begin))" >"$log.status"
mv "$log.running" "$log.log"
[ "$(ls "$LOGS/$name".*.log | wc -l)" -eq 6 ] && mkdir "$LOGS/$name.said" 2>/dev/null || exit 0

p=0 f=0 s=0 seconds=0
: >"$LOGS/$name.all"
for part in $PARTS; do
    log=$LOGS/$name.$part
    read -r status took <"$log.status"
    seconds=$((seconds + took))
    counts=$(sed -n '$s/^\([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) skipped$/\1 \2 \3/p' "$log.log")
    if [ -n "$counts" ]; then
        sed '$d' "$log.log" >>"$LOGS/$name.all"
        set -- $counts
        p=$((p + $1)) f=$((f + $2)) s=$((s + $3))
        [ "$2" -gt 0 ] || [ "$status" -eq 0 ] || f=$((f + 1))
    else
        cat "$log.log" >>"$LOGS/$name.all"
        echo "$name: ended with status $status and no summary" >>"$LOGS/$name.all"
        f=$((f + 1))
    fi
done
echo "$p $f $s" >"$LOGS/$name.counts"
echo "$name: $p passed, $f failed, $s skipped, $seconds s" >>"$LOGS/$name.all"
cat "$LOGS/$name.all"
SH

# shellcheck disable=SC2016
for program in "$@"; do
    for part in $parts; do
        echo "$program $part"
    done
done | FRONT=$front OPTIONS=$options PARTS=$parts LOGS=$logs xargs -P "${TEST_JOBS:-8}" -n 2 \
    sh -c 'sh "$LOGS/job" "$0" "$1"'

passed=0 failed=0 skipped=0 again=0
for program in "$@"; do
    if read -r p f s <"$logs/$(basename "$program").counts"; then
        passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
        again=$((again + f))
    else
        failed=$((failed + 1))
    fi
done

for program in ${MISSING:-}; do
    echo "SKIP ${program%:*}_test: ${program#*:} is not there"
    [ "${CI:-}" = true ] && failed=$((failed + 1)) || skipped=$((skipped + 1))
done

most=10 # that may fail: more of them are no accident
if [ $again -gt $most ]; then
    echo "^ more than $most have failed: none of them is run again"
    set --
fi
for program in "$@"; do
    for label in $(sed -n 's/^FAIL \([^:]*\):.*/\1/p' "$logs/$(basename "$program").all"); do
        # shellcheck disable=SC2086
        if $front "$program" --exact "$label" >"$logs/alone" 2>&1 && grep -q '^1 passed, 0 failed' "$logs/alone"; then
            echo "^ $(basename "$program"): $label has failed beside others, and passed alone: it counts as passed"
            passed=$((passed + 1)) failed=$((failed - 1))
        else
            echo "^ $(basename "$program"): $label has failed alone, too:"
            cat "$logs/alone"
        fi
    done
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
