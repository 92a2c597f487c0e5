#!/bin/sh
# What clients notice of reloads, upgrades and stops: nothing, or it fails.
#   sh tests/drill.sh [reloads] [upgrades] [single] [drain] [haproxy]     default: all of them
# RELOADS, UPGRADES: how many (20, 5); CLIENTS: of wrk (50); WORKERS (2). Needs wrk, pgrep, haproxy.
set -u
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc} build=${BUILD:-build}/drill
RELOADS=${RELOADS:-20} UPGRADES=${UPGRADES:-5} CLIENTS=${CLIENTS:-50} WORKERS=${WORKERS:-2}
PATIENCE=60 # seconds for one step, after which the drill itself has failed
passed=0 failed=0 skipped=0 started=''
mkdir -p "$build" || exit 1
build=$(cd "$build" && pwd)
server=$build/drill_server
$CC -std=gnu99 -O2 -Wall -Wextra -o "$server" tests/drill_server.c || exit 1
trap 'for pid in $started; do kill -9 "$pid" 2>/dev/null; done' EXIT

# result NAME TEXT STATUS: tell and count it.
result() {
    if [ "$3" -eq 0 ]; then
        passed=$((passed + 1))
        echo "$1: $2"
    else
        failed=$((failed + 1))
        echo "FAIL $1: $2"
    fi
}

# missing TOOL NAME: true when there is no such tool; then the scenario is skipped.
missing() {
    command -v "$1" >/dev/null && return 1
    echo "SKIP $2: no $1"
    skipped=$((skipped + 1))
}

# start_server NAME: serve on a free port. Sets port and parent.
start_server() {
    for try in 1 2 3 4 5 6 7 8 9 10; do
        port=$((20000 + ($$ * 31 + try * 997 + passed * 7) % 12000))
        : >"$build/$1.out"
        "$server" "$port" "$WORKERS" "$build/$1.pid" >"$build/$1.out" 2>"$build/$1.log" &
        parent=$!
        started="$started $parent"
        waits=0
        while kill -0 "$parent" 2>/dev/null && [ $waits -lt $((PATIENCE * 10)) ]; do
            [ "$(grep -c listening "$build/$1.out")" -ge "$WORKERS" ] && return 0
            sleep 0.1
            waits=$((waits + 1))
        done
    done
    echo "FAIL: no server on any port" && exit 1
}

# await COMMAND...: until it is true. False: it was not in time.
await() {
    waits=0
    while ! "$@"; do
        [ $waits -lt $((PATIENCE * 10)) ] || return 1
        sleep 0.1
        waits=$((waits + 1))
    done
}

gone() {
    for pid in "$@"; do
        ! kill -0 "$pid" 2>/dev/null || return 1
    done
}

# reload NAME: SIGHUP, and until no worker is left of those that there were.
reload() {
    workers=$(pgrep -P "$parent")
    kill -HUP "$parent"
    # shellcheck disable=SC2086
    await gone $workers || echo "$1: after a reload there are workers of before"
}

moved() {
    [ "$(cat "$build/$1.pid")" != "$parent" ] && gone "$parent"
}

# upgrade NAME: SIGUSR2, and until the old program is gone. Sets parent.
upgrade() {
    kill -USR2 "$parent"
    await moved "$1" || echo "$1: after an upgrade there is the program of before"
    parent=$(cat "$build/$1.pid")
    started="$started $parent"
}

stop_server() {
    kill -TERM "$parent"
    await gone "$parent" || echo "$1: it does not end"
}

# load NAME PORT [ARGUMENT...]: begin to send requests; end_load NAME WHAT: end it, and count what failed.
load() {
    name=$1 at=$2
    shift 2
    wrk -t 2 -c "$CLIENTS" -d 3600s "$@" "http://127.0.0.1:$at/" >"$build/$name.wrk" 2>&1 &
    wrk=$!
    started="$started $wrk"
    sleep 1
}

end_load() {
    sleep 1
    kill -INT "$wrk"
    wait "$wrk"
    requests=$(sed -n 's/^ *\([0-9]*\) requests in .*/\1/p' "$build/$1.wrk")
    errors=$(sed -n 's/.*Socket errors: connect \([0-9]*\), read \([0-9]*\), write \([0-9]*\), timeout \([0-9]*\)/\1 + \2 + \3 + \4/p' "$build/$1.wrk")
    others=$(sed -n 's/.*Non-2xx or 3xx responses: \([0-9]*\)/\1/p' "$build/$1.wrk")
    cut=$((${errors:-0} + ${others:-0}))
    [ "${requests:-0}" -gt 0 ] && [ $cut -eq 0 ]
    result "$1" "${requests:-0} requests, $cut cut${errors:+ (connect, read, write, timeout: $errors)}; $2" $?
}

# repeat COUNT COMMAND...
repeat() {
    times=$1
    shift
    while [ "$times" -gt 0 ]; do
        "$@"
        times=$((times - 1))
    done
}

reloads() { # busy keep-alive clients
    missing wrk reloads && return
    start_server reloads
    load reloads "$port"
    repeat "$RELOADS" reload reloads
    end_load reloads "$RELOADS reloads, keep-alive"
    stop_server reloads
}

upgrades() {
    missing wrk upgrades && return
    start_server upgrades
    load upgrades "$port"
    repeat "$UPGRADES" upgrade upgrades
    end_load upgrades "$UPGRADES upgrades, keep-alive"
    stop_server upgrades
}

single() { # a connection for each request
    missing wrk single && return
    start_server single
    load single "$port" -H 'Connection: close'
    repeat "$RELOADS" reload single
    repeat "$UPGRADES" upgrade single
    end_load single "$RELOADS reloads and $UPGRADES upgrades, a connection for each request"
    stop_server single
}

drain() {
    start_server drain
    text=$("$server" probe "$port" "$parent" 50)
    result drain "$text" $?
    await gone "$parent" || result drain 'it does not end' 1
}

haproxy_() { # two servers behind HAProxy, which looks at them by connecting; one is reloaded, and stopped
    missing wrk haproxy || missing haproxy haproxy && return
    start_server haproxy_b
    other=$parent other_port=$port
    start_server haproxy
    front=$((port + 12001))
    cat >"$build/haproxy.cfg" <<CONFIG
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    retries 3
    option redispatch
listen front
    bind 127.0.0.1:$front
    server a 127.0.0.1:$port check inter 500 fall 1
    server b 127.0.0.1:$other_port check inter 500 fall 1
CONFIG
    command haproxy -db -f "$build/haproxy.cfg" >"$build/haproxy.out" 2>&1 &
    proxy=$!
    started="$started $proxy"
    sleep 1
    load haproxy "$front"
    reload haproxy
    stop_server haproxy
    end_load haproxy 'behind HAProxy: a reload, and a stop of one of two servers'
    kill "$proxy"
    parent=$other
    stop_server haproxy_b
}

for scenario in ${*:-reloads upgrades single drain haproxy}; do
    case $scenario in
    reloads | upgrades | single | drain) $scenario ;;
    haproxy) haproxy_ ;;
    *) echo "no such scenario: $scenario" && exit 2 ;;
    esac
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
