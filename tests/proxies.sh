#!/bin/sh
# The examples behind HAProxy and nginx, which say in the PROXY protocol's header whose a connection is: the servers
# have to see the client's own address and port, health checks must do no harm, and others are turned away. HAProxy
# behind the proxy example, too. And reloads and upgrades, and a rolling restart behind examples/haproxy.cfg, which no
# client may notice.
#   sh tests/proxies.sh [headers] [families] [relays] [tls] [checks] [others] [upgrades] [rolling]    default: all
# Needs haproxy, nginx with its stream module, openssl, nc; what is missing is a failure with CI=true. BUILD, CC; ROUNDS
# (2) of restarts.
set -u
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc} build=${BUILD:-build}/proxies
ROUNDS=${ROUNDS:-2}
PATIENCE=${PATIENCE:-20} # seconds for one step, after which it has failed
passed=0 failed=0 skipped=0 started='' pid='' port=$((20000 + $$ * 101 % 11000))
mkdir -p "$build" || exit 1
build=$(cd "$build" && pwd)
rm -f "$build"/*.out "$build"/*.log "$build"/*.got
trap 'for pid in $started; do kill "$pid" 2>/dev/null; done; wait' EXIT

# result STATUS TEXT [FILE]: tell and count it; a failure shows the end of the file.
result() {
    if [ "$1" -eq 0 ]; then
        passed=$((passed + 1))
        echo "$2"
    else
        failed=$((failed + 1))
        echo "FAIL $2"
        [ $# -lt 3 ] || tail -n 12 "$3" | sed 's/^/    /'
    fi
}

# has TOOL WHAT: true when it is there; else that is skipped, or fails.
has() {
    { command -v "$1" >/dev/null || [ -f "$1" ]; } && return 0
    echo "SKIP $2: no $1"
    if [ "${CI:-}" = true ]; then failed=$((failed + 1)); else skipped=$((skipped + 1)); fi
    return 1
}

# await COMMAND...: until it is true; not within another one. False: it was not in time.
await() {
    awaited=0
    while ! "$@"; do
        [ $awaited -lt $((PATIENCE * 20)) ] || return 1
        sleep 0.05
        awaited=$((awaited + 1))
    done
}

# free_port: sets port to one that nobody listens on.
free_port() {
    port=$((port + 1))
    while nc -z 127.0.0.1 $port 2>/dev/null; do port=$((port + 1)); done
}

answers() { grep -q "$1" "$2" 2>/dev/null; }

# serve NAME PROGRAM ARGUMENT...: start it on a free port, `$port`, which it gets as its first argument.
serve() {
    name=$1 program=$2
    shift 2
    free_port
    : >"$build/$name.out"
    "$build/$program" "$port" "$@" >"$build/$name.out" 2>"$build/$name.log" &
    started="$started $!"
    await answers listening "$build/$name.out" || result 1 "$name: it does not listen" "$build/$name.log"
}

# ask NAME TEXT COMMAND...: send a line by the client, which gets no end of its input before the answer has come. The
# answer is in NAME.got. False: there is none.
ask() {
    got=$build/$1.got text=$2
    shift 2
    : >"$got"
    # shellcheck disable=SC2094 # the one waits for what the other writes
    {
        printf '%s\n' "$text"
        await answers "${expected:-$text}" "$got"
    } | timeout "$PATIENCE" "$@" >"$got" 2>"$got.log"
    answers "${expected:-$text}" "$got"
}

# seen NAME CLIENT: the line in which the server tells of that client.
seen() { grep "^from 127.0.0.1:$2 by" "$build/$1.out"; }

# knows NAME CLIENT PATTERN: does the server tell of that client, of a sender that is another, and all that?
knows() { seen "$1" "$2" | grep -v "by 127.0.0.1:$2 " | grep -q "$3"; }

# plain NAME SERVER FRONT PATTERN WHAT: a client of the port FRONT, from a port of its own, which the server has to see.
plain() {
    free_port
    client=$port
    ask "$1" "hello $1" nc -N -p "$client" 127.0.0.1 "$3" && await knows "$2" "$client" "$4"
    result $? "$1: $5" "$build/$2.out"
}

# secure NAME SERVER FRONT PATTERN WHAT [ARGUMENT...]: the same over TLS.
secure() {
    name=$1 server=$2 front=$3 pattern=$4 what=$5
    shift 5
    free_port
    client=$port
    ask "$name" "hello $name" openssl s_client -quiet -no_ign_eof -verify_return_error -CAfile "$build/cert.pem" \
        -servername localhost -bind "127.0.0.1:$client" -connect "127.0.0.1:$front" "$@" &&
        await knows "$server" "$client" "$pattern"
    result $? "$name: $what" "$build/$server.out"
}

# haproxy_starts PORT: and listens there, the last of its ports.
haproxy_starts() {
    haproxy -db -f "$build/haproxy.cfg" >"$build/haproxy.out" 2>&1 &
    started="$started $!"
    await test -S "$build/haproxy.sock" && await nc -z 127.0.0.1 "$1"
    result $? 'HAProxy runs' "$build/haproxy.out"
}

# state BACKEND: how HAProxy sees its only server, such as "UP L4OK".
state() {
    echo 'show stat' | nc -N -U "$build/haproxy.sock" |
        awk -F, -v name="$1" '$1 == name && $2 == "s" {sub(/[*] /, "", $37); print $18, $37}'
}
state_is() { [ "$(state "$1")" = "$2" ]; }

# listen NAME SERVER-PORT OPTION...: add a port to HAProxy's configuration, which is $port then.
listen() {
    name=$1 to=$2
    shift 2
    free_port
    cat >>"$build/haproxy.cfg" <<CONFIG
listen $name
    bind ${host:-127.0.0.1}:$port ${bind:-}
    server s 127.0.0.1:$to $*
CONFIG
}

# behind NAME TLS: the proxy example between two ports of HAProxy's. The one behind it knows of clients from the header
# that tsrv_connect has sent, and tells them. Sets the variable NAME to the port in front.
behind() {
    free_port
    cat >>"$build/haproxy.cfg" <<CONFIG
frontend $1_end
    mode http
    bind 127.0.0.1:$port accept-proxy $2
    http-request return status 200 content-type text/plain lf-string "you are %[src]:%[src_port]\n"
CONFIG
    if [ -n "$2" ]; then
        PROXY_CA=$build/cert.pem serve "$1" proxy localhost "$port"
    else
        serve "$1" proxy localhost "$port"
    fi
    listen "$1" "$port" send-proxy-v2
    eval "$1=$port"
}

# failures NAME PORT: sets failures, the connections that the server has counted without a good header; one more asks.
failures() {
    free_port
    printf 'PROXY TCP4 127.0.0.1 127.0.0.1 %d 1\r\nasks\n' "$port" | timeout "$PATIENCE" nc -N 127.0.0.1 "$2" \
        >"$build/asks.got"
    await seen "$1" "$port" >/dev/null
    failures=$(seen "$1" "$port" | sed 's/.* failed \([0-9]*\) .*/\1/')
}

has haproxy 'all of it' || { echo "$passed passed, $failed failed, $skipped skipped"; exit $failed; }
has openssl 'all of it' || { echo "$passed passed, $failed failed, $skipped skipped"; exit $failed; }

# begin: the examples, and HAProxy in front of them in many ways; once.
ready=''
begin() {
    [ -z "$ready" ] || return 0
    ready=yes
    for program in echo echo_tls proxy; do
        $CC -std=gnu99 -O1 -Wall -Wextra -DTSRV_TLS_OPENSSL= -include tests/proxied.h -o "$build/$program" \
            examples/$program.c -lssl -lcrypto -lpthread || exit 1
    done
    $CC -std=gnu99 -O1 -Wall -Wextra -o "$build/production" examples/production.c -lpthread || exit 1
    [ -f "$build/both.pem" ] || {
        make -s BUILD="$build" cert 2>/dev/null && cat "$build/cert.pem" "$build/key.pem" >"$build/both.pem"
    } || exit 1

    export PROXY_FROM='127.0.0.1'
    serve echo echo
    echo=$port
    serve echo_tls echo_tls "$build/cert.pem" "$build/key.pem"
    echo_tls=$port
    serve production production 2 127.0.0.1
    production=$port
    PROXY_FROM='10.0.0.0/8, ::1' serve closed echo
    closed=$port
    serve looked_at echo
    looked_at=$port
    serve touched echo
    touched=$port

    rm -f "$build/haproxy.sock"
    cat >"$build/haproxy.cfg" <<CONFIG
global
    stats socket $build/haproxy.sock
defaults
    mode tcp
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    timeout check 5s
    unique-id-format id-%pid-%rt
CONFIG
    listen v1 "$echo" send-proxy
    v1=$port
    listen v2 "$echo" send-proxy-v2
    v2=$port
    listen sums "$echo" send-proxy-v2 proxy-v2-options unique-id,crc32c
    sums=$port
    bind="ssl crt $build/both.pem ca-file $build/cert.pem verify optional"
    listen ssl "$echo" send-proxy-v2-ssl
    ssl=$port
    listen ssl_cn "$echo" send-proxy-v2 proxy-v2-options ssl,cert-cn,authority,crc32c
    ssl_cn=$port
    bind=''
    if grep -q . /proc/net/if_inet6 2>/dev/null; then
        host='[::1]'
        listen six1 "$echo" send-proxy
        six1=$port
        listen six2 "$echo" send-proxy-v2
        six2=$port
        host=''
    fi
    for version in 1 2; do
        rm -f "$build/unix$version"
        cat >>"$build/haproxy.cfg" <<CONFIG
listen unix$version
    bind unix@$build/unix$version
    server s 127.0.0.1:$echo send-proxy$([ $version -eq 1 ] || echo -v2)
CONFIG
    done
    behind relay ''
    behind relay_tls "ssl crt $build/both.pem"
    listen through "$echo_tls" send-proxy-v2
    through=$port
    listen through1 "$echo_tls" send-proxy
    through1=$port
    listen workers "$production" send-proxy-v2
    workers=$port
    listen closed "$closed" send-proxy-v2
    closed=$port
    listen without "$echo"
    without=$port
    # Checks as HAProxy makes them for send-proxy, and such that only connect: one with a port of its own has no header.
    listen local1 "$looked_at" send-proxy check check-send-proxy inter 50
    listen local2 "$looked_at" send-proxy-v2 check check-send-proxy inter 50
    listen bare "$touched" send-proxy-v2 check port "$touched" inter 50 fall 1
    bare=$port
    haproxy_starts "$bare"
}

headers() {
    begin
    plain 'v1' echo "$v1" 'tlv$' 'HAProxy, send-proxy: the client'
    plain 'v2' echo "$v2" 'tlv$' 'HAProxy, send-proxy-v2: the client'
    plain 'sums' echo "$sums" ' 03:{.*} 05:{id-' 'HAProxy, unique-id and crc32c: the client, the id, the sum'
    free_port
    client=$port
    expected="you are 127.0.0.1:$client" ask production stats nc -N -p "$client" 127.0.0.1 "$workers"
    result $? 'production: the client, as examples/production.c tells it' "$build/production.got"
    nginx_headers
}

# own_clients: how often the handler of echo has seen what is a connection of its sender's own.
own_clients() { grep -c '^from \(127.0.0.1:[0-9]*\) by \1 ' "$build/echo.out"; }

# six NAME FRONT: a client over IPv6.
six() {
    free_port
    client=$port
    ask "$1" "hello $1" nc -N -s ::1 -p "$client" ::1 "$2" &&
        await grep -q "^from \[::1\]:$client by 127.0.0.1:" "$build/echo.out"
    result $? "$1: HAProxy, a client over IPv6" "$build/echo.out"
}

families() { # clients over IPv6: TCP6; and of a unix socket: version 1 says UNKNOWN then, version 2 LOCAL
    begin
    [ -z "${six1:-}" ] || {
        six six1 "$six1"
        six six2 "$six2"
    }
    for version in 1 2; do
        before=$(own_clients)
        ask unix$version "hello unix$version" nc -N -U "$build/unix$version" && [ "$(own_clients)" -eq $((before + 1)) ]
        result $? "unix$version: HAProxy, a client of a unix socket has the proxy's address" "$build/echo.out"
    done
}

relays() { # what tsrv_connect sends, as HAProxy reads it
    begin
    for name in relay relay_tls; do
        free_port
        client=$port
        eval "front=\$$name"
        printf 'GET / HTTP/1.0\r\n\r\n' | timeout "$PATIENCE" nc -p "$client" 127.0.0.1 "$front" >"$build/$name.got"
        answers "you are 127.0.0.1:$client\$" "$build/$name.got"
        result $? "$name: examples/proxy.c, HAProxy behind it knows the client" "$build/$name.got"
    done
}

# nginx_starts: in front of the examples; once. False: it is not there.
nginx_starts() {
    [ -z "${at_production:-}" ] || return 0
    module=${NGINX_STREAM:-/usr/lib/nginx/modules/ngx_stream_module.so}
    has nginx 'nginx' && has "$module" 'nginx' || return 1
    free_port
    at_echo=$port
    free_port
    at_tls=$port
    free_port
    at_production=$port
    cat >"$build/nginx.conf" <<CONFIG
load_module $module;
daemon off;
pid $build/nginx.pid;
error_log stderr;
events {}
stream {
    proxy_protocol on;
    proxy_half_close on;
    server { listen 127.0.0.1:$at_echo; proxy_pass 127.0.0.1:$echo; }
    server { listen 127.0.0.1:$at_tls; proxy_pass 127.0.0.1:$echo_tls; }
    server { listen 127.0.0.1:$at_production; proxy_pass 127.0.0.1:$production; }
}
CONFIG
    nginx -e stderr -c "$build/nginx.conf" >"$build/nginx.out" 2>&1 &
    started="$started $!"
    await nc -z 127.0.0.1 "$at_production"
    result $? 'nginx runs' "$build/nginx.out"
}

nginx_headers() {
    nginx_starts || return
    plain 'nginx' echo "$at_echo" 'tlv$' 'nginx, proxy_protocol on: the client'
    secure 'nginx_tls' echo_tls "$at_tls" 'tlv$' 'nginx in front of a TLS server: the client'
    free_port
    client=$port
    expected="you are 127.0.0.1:$client" ask production stats nc -N -p "$client" 127.0.0.1 "$at_production"
    result $? 'nginx_production: the client, as examples/production.c tells it' "$build/production.got"
}

tls() {
    begin
    secure 'through' echo_tls "$through" 'tlv$' 'HAProxy, send-proxy-v2: TLS goes through behind the header'
    secure 'through1' echo_tls "$through1" 'tlv$' 'HAProxy, send-proxy: TLS goes through behind the header'
    # 0x20: the client's flags (1: over TLS; 4: it has shown a certificate), how its verification went, and more.
    secure 'ssl' echo "$ssl" ' 20:{.*TLSv1\.[23]' 'HAProxy, send-proxy-v2-ssl: the TLS version'
    secure 'ssl_cn' echo "$ssl_cn" ' 02:{localhost} 03:{.*} 20:{.*TLSv1\.[23].*localhost' \
        'HAProxy, authority, ssl, cert-cn, crc32c: the name asked for, and the name in the certificate' \
        -cert "$build/cert.pem" -key "$build/key.pem"
}

# looked NAME COUNT: has the server's handler seen so many connections of the proxy's own?
looked() { [ "$(grep -c '^from \(127.0.0.1:[0-9]*\) by \1 ' "$build/$1.out")" -ge "$2" ]; }

checks() {
    begin
    await looked looked_at 40
    result $? 'checks with a header: the handler sees the proxy itself' "$build/looked_at.out"
    state_is local1 'UP L4OK' && state_is local2 'UP L4OK'
    result $? "checks with a header: HAProxy says $(state local1), $(state local2)"
    failures looked_at "$looked_at"
    [ "$failures" -eq 0 ]
    result $? 'checks with a header: none is counted as bad' "$build/looked_at.out"
    [ "$(grep -c PROXY "$build/looked_at.log")" -eq 0 ]
    result $? 'checks with a header: none is logged' "$build/looked_at.log"
    # HAProxy's checks that only connect are over before there is anything to accept, and so are not seen at all; those
    # of others, that connect and close, are.
    await state_is bare 'UP L4OK'
    result $? "checks that only connect: HAProxy says $(state bare)"
    failures touched "$touched"
    before=$failures closed_again=0
    while [ $closed_again -lt 20 ] && nc -z 127.0.0.1 "$touched"; do closed_again=$((closed_again + 1)); done
    failures touched "$touched"
    [ $((failures - before)) -eq 20 ]
    result $? "checks that connect and close: $((failures - before)) of 20 are counted" "$build/touched.out"
    [ "$(grep -vc 'listening on' "$build/touched.log")" -eq 0 ]
    result $? 'checks without a header: none is logged' "$build/touched.log"
    plain 'bare' touched "$bare" 'tlv$' 'HAProxy, beside checks without a header: the client'
}

# turned_away PORT: does a line get no answer, but the end of the connection?
turned_away() {
    echo hello | timeout "$PATIENCE" nc -N 127.0.0.1 "$1" >"$build/away.got" 2>&1
    [ $? -ne 124 ] && ! answers hello "$build/away.got"
}

others() {
    begin
    failures echo "$echo"
    before=$failures
    turned_away "$without"
    result $? 'without send-proxy: no answer'
    tried=0
    while [ $tried -lt 50 ]; do
        printf 'GET / HTTP/1.1\r\n\r\n' | timeout 5 nc -N 127.0.0.1 "$echo" >"$build/others.got" 2>/dev/null
        tried=$((tried + 1))
    done
    failures echo "$echo"
    counted=$((failures - before))
    [ $counted -eq 51 ]
    result $? "no header: 51 were counted ($counted)" "$build/echo.log"
    lines=$(grep -c 'PROXY header from 127.0.0.1' "$build/echo.log")
    [ "$lines" -ge 1 ] && [ "$lines" -le 20 ]
    result $? "no header: logged, but not each ($lines lines)" "$build/echo.log"
    turned_away "$closed" && ! answers '^from' "$build/closed.out" &&
        answers 'refused: 127.0.0.1.* is not in proxy_from' "$build/closed.log"
    result $? 'a proxy that is not in proxy_from: refused, and logged' "$build/closed.log"
}

# last PATTERN: the pid in the last such line of production's log. lines PATTERN: how many there are.
last() { awk -v pattern="$1" '$0 ~ pattern {pid = $2} END {print pid}' "$build/production.log"; }
lines() { grep -c "$1" "$build/production.log"; }
more_than() { [ "$(lines "$2")" -gt "$1" ]; }

# changes SIGNAL PATTERN WHAT: tell the parent, or the last program's, and wait for what the log says then.
changes() {
    before=$(lines "$2")
    kill "-$1" "$(last 'workers are started')" && await more_than "$before" "$2"
    result $? "upgrades: $3" "$build/production.log"
}

load() {
    "$build/rolling_load" "$2" 4 4 >"$build/load_$1.out" 2>&1 &
    started="$started $!"
    eval "load_$1=$!"
}

# loaded NAME WHAT: the load is over, and none has failed.
loaded() {
    eval "pid=\$load_$1"
    kill -TERM "$pid"
    wait "$pid"
    result $? "upgrades: $2: $(tail -n 1 "$build/load_$1.out")" "$build/load_$1.out"
}

upgrades() { # of examples/production.c: headers are under way in each of them
    begin
    $CC -std=gnu99 -O1 -Wall -Wextra -o "$build/rolling_load" tests/rolling_load.c -lpthread || exit 1
    load haproxy "$workers"
    nginx_starts && load nginx "$at_production"
    round=0
    while [ $round -lt "$ROUNDS" ]; do
        changes HUP 'reload: done' 'a reload'
        changes USR2 'all 2 workers have been up' 'an upgrade'
        started="$started $(last 'workers are started')"
        round=$((round + 1))
    done
    loaded haproxy 'behind HAProxy'
    [ -z "${at_production:-}" ] || loaded nginx 'behind nginx'
    [ "$(lines 'PROXY header from')" -eq 0 ]
    result $? 'upgrades: all headers were good' "$build/production.log"
}

# instance NAME PORT ADMIN-PORT: start it, and until it listens. Sets the variable NAME to its pid.
instance() {
    : >"$build/status_$1.out"
    "$build/status" "$2" "$3" 2 127.0.0.1 >"$build/status_$1.out" 2>>"$build/status_$1.log" &
    eval "$1=$!"
    started="$started $!"
    await answers 'look at' "$build/status_$1.out"
}

# sees NAME FIELD: what HAProxy says of an instance: 8 is how many connections it has had, 17 how many were sent to
# another in its place, 18 its state.
sees() {
    echo 'show stat' | nc -N -U "$build/rolling.sock" |
        awk -F, -v name="$1" -v field="$2" '$1 == "instances" && $2 == name {print $field}'
}
is_up() { [ "$(sees "$1" 18)" = UP ]; }
is_down() { [ "$(sees "$1" 18)" = DOWN ]; }
has_had() { [ "$(sees "$1" 8)" -ge "$2" ]; }

# works NAME: does it come to be UP, and get 100 more connections?
works() {
    await is_up "$1" && await has_had "$1" $(($(sees "$1" 8) + 100))
}

# set_state NAME drain|ready: whether HAProxy sends new connections there. It answers nothing but a fault.
set_state() {
    [ -z "$(echo "set server instances/$1 state $2" | nc -N -U "$build/rolling.sock")" ]
    result $? "rolling: $1 is set to $2"
}

# restart NAME PORT ADMIN-PORT: as one would roll a new version out; by turns HAProxy is told before, or finds out.
restart() {
    eval "pid=\$$1"
    [ $((round % 2)) -eq 0 ] || set_state "$1" drain
    kill -TERM "$pid"
    wait "$pid"
    result $? "rolling: $1 has ended in good order" "$build/status_$1.log"
    await is_down "$1"
    result $? "rolling: $1 is DOWN" "$build/rolling.out"
    instance "$@" && { [ $((round % 2)) -eq 0 ] || set_state "$1" ready; } && works "$1"
    result $? "rolling: $1 is UP again, and at work" "$build/rolling.out"
}

rolling() { # examples/haproxy.cfg and examples/status.c: both instances are restarted under load
    $CC -std=gnu99 -O1 -Wall -Wextra -o "$build/status" examples/status.c -lpthread || exit 1
    $CC -std=gnu99 -O1 -Wall -Wextra -o "$build/rolling_load" tests/rolling_load.c -lpthread || exit 1
    edits="s|/tmp/haproxy.sock|$build/rolling.sock|"
    for fixed in 8888 8001 8002 8003 8004; do
        free_port
        edits="$edits; s|:$fixed|:$port|; s|port $fixed|port $port|"
        eval "at_$fixed=$port"
    done
    sed "$edits" examples/haproxy.cfg >"$build/rolling.cfg"
    # shellcheck disable=SC2154 # set by eval
    instance a "$at_8001" "$at_8002" && instance b "$at_8003" "$at_8004"
    result $? 'rolling: two instances of examples/status.c'
    rm -f "$build/rolling.sock"
    haproxy -db -f "$build/rolling.cfg" >"$build/rolling.out" 2>&1 &
    started="$started $!"
    await test -S "$build/rolling.sock"
    result $? 'rolling: HAProxy runs' "$build/rolling.out"
    # shellcheck disable=SC2154
    "$build/rolling_load" "$at_8888" 8 4 >"$build/rolling_load.out" 2>&1 &
    load=$!
    started="$started $load"
    works a && works b
    result $? 'rolling: both are UP, and at work' "$build/rolling.out"
    round=0
    while [ $round -lt "$ROUNDS" ]; do
        restart a "$at_8001" "$at_8002"
        restart b "$at_8003" "$at_8004"
        round=$((round + 1))
    done
    redispatched=$(($(sees a 17) + $(sees b 17)))
    [ $redispatched -gt 0 ]
    result $? "rolling: $redispatched connections that one has refused went to the other"
    kill -TERM $load
    wait $load
    result $? "rolling: $(tail -n 1 "$build/rolling_load.out")" "$build/rolling_load.out"
    answers ' [1-9][0-9]* asked again, 0 failed' "$build/rolling_load.out"
    result $? 'rolling: clients that keep their connection heard the good-byes' "$build/rolling_load.out"
}

# shellcheck disable=SC2048
for scenario in ${*:-headers families relays tls checks others upgrades rolling}; do
    case $scenario in
    headers | families | relays | tls | checks | others | upgrades | rolling) $scenario ;;
    *) echo "no such scenario: $scenario" && exit 2 ;;
    esac
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
