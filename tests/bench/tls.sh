#!/bin/sh
# Echo over TLS, 64 bytes at a time on one connection: the echo_tls example beside a server of OpenSSL and
# epoll alone. System calls by strace, user instructions by callgrind; counts, so that noise does not matter.
#   tests/bench/tls.sh [build directory]
cd "$(dirname "$0")/../.." || exit 2
build=${1:-build}
bench=$build/bench
make -s BUILD="$build" cert "$bench/echo_tls" DIR="$bench" 2>/dev/null || exit 1
for name in openssl_echo tls_client; do
    ${CC:-cc} -O2 -o "$bench/$name" tests/bench/$name.c -lssl -lcrypto || exit 1
done
port=$((20000 + $$ % 10000))

# run <count> <command in front of the server...>: serve that many echoes, then end the server
run() {
    count=$1
    shift
    port=$((port + 1))
    "$@" "$bench/$server" $port "$build/cert.pem" "$build/key.pem" >/dev/null 2>&1 &
    front=$!
    "$bench/tls_client" $port "$count" || echo "the client failed"
    pkill -TERM -P $front 2>/dev/null || kill -TERM $front
    wait $front
}

for server in openssl_echo echo_tls; do
    for count in 500 2500; do
        run $count strace -f -c -U calls,name -o "$bench/calls.$count"
        run $count valgrind -q --tool=callgrind --callgrind-out-file="$bench/instructions.$count"
    done
    for count in 500 2500; do
        eval "calls_$count=$(awk '$2 == "total" { print $1 }' "$bench/calls.$count")"
        eval "instructions_$count=$(awk '/^(summary|totals):/ { print $2; exit }' "$bench/instructions.$count")"
    done
    echo "$server" "$calls_500" "$calls_2500" "$instructions_500" "$instructions_2500" |
        awk '{ printf "%-14s %.2f system calls, %d user instructions an echo\n", $1, ($3 - $2) / 2000, ($5 - $4) / 2000 }'
done
