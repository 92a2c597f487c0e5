#!/bin/sh
# What a line costs the echo examples, in counts that noise does not change: user instructions (callgrind), system
# calls (strace), page faults. Fails when one of them has risen by more than 3 % over tests/bench/gate.txt.
#   tests/bench/gate.sh [build directory]     prints what it has counted; GATE_WRITE=1 writes it to gate.txt
cd "$(dirname "$0")/../.." || exit 2
build=${1:-build}
bench=$build/bench
mkdir -p "$bench"
command -v valgrind >/dev/null || { echo "skip  bench: no valgrind"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
strace -o /dev/null true 2>/dev/null && traces=yes || { traces=; echo "note  system calls are not counted: no strace"; }
# No turn is long enough to be looked at, which on a busy machine, under Valgrind, many are.
case $(uname -m) in
x86_64) slowly='-DTSRVI_TICKS=((uint64_t)__builtin_ia32_rdtsc()>>20)' ;;
*) slowly=-DTSRVI_TICKS=0 ;;
esac
${CC:-cc} -O2 -o "$bench/lines" tests/bench/lines.c || exit 1
for name in echo echo_callback; do
    ${CC:-cc} -std=c99 -O2 -g "$slowly" -o "$bench/$name" examples/$name.c -lpthread || exit 1
    ${CC:-cc} -std=c99 -O2 -g "$slowly" -include tests/bench/timed.h -o "$bench/${name}_timed" examples/$name.c -lpthread || exit 1
done
plain=glibc.cpu.hwcaps=-AVX2,-AVX2_Usable,-AVX512F,-AVX512VL,-AVX512BW,-EVEX # the same memchr on every processor
port=$((20000 + $$ % 10000))
counted=$bench/counted
: >"$counted"

# serve <rounds> <connections> <lines> <command in front of the server...>: one load, then the server ends.
serve() {
    rounds=$1 connections=$2 lines=$3
    shift 3
    port=$((port + 1))
    "$@" "$bench/$server" $port >/dev/null 2>&1 &
    front=$!
    "$bench/lines" $port "$connections" "$lines" 64 "$rounds" || echo "the client failed"
    pkill -TERM -P $front 2>/dev/null || kill -TERM $front
    wait $front 2>/dev/null
}

# per_line <first> <second> <rounds between> <lines of a round>
per_line() {
    awk -v a="$1" -v b="$2" -v n="$(($3 * $4))" 'BEGIN { printf "%.2f", (b - a) / n }'
}

# row <name> <connections> <lines>
row() {
    for rounds in 40 140; do
        serve $rounds "$2" "$3" env GLIBC_TUNABLES=$plain valgrind -q --tool=callgrind --callgrind-out-file="$bench/instructions.$rounds"
        [ -z "$traces" ] || serve $rounds "$2" "$3" strace -f -c -U calls,name -o "$bench/calls.$rounds"
        eval "instructions_$rounds=$(awk '/^(summary|totals):/ { print $2; exit }' "$bench/instructions.$rounds")"
        [ -z "$traces" ] || eval "calls_$rounds=$(awk '$2 == "total" { print $1 }' "$bench/calls.$rounds")"
    done
    # shellcheck disable=SC2154
    echo "$server.$1.instructions $(per_line "$instructions_40" "$instructions_140" 100 $(($2 * $3)))" >>"$counted"
    # shellcheck disable=SC2154
    [ -z "$traces" ] || echo "$server.$1.calls $(per_line "$calls_40" "$calls_140" 100 $(($2 * $3)))" >>"$counted"
}

for server in echo echo_callback echo_timed echo_callback_timed; do
    row pp50 50 1
    row pipe16 50 16
done
for server in echo echo_callback; do
    port=$((port + 1))
    "$bench/$server" $port >/dev/null 2>&1 &
    pid=$!
    # The median round: one in which more buffers than ever are in use at once pays for the new one, and no other does.
    faults=$("$bench/lines" $port 4 1 1048576 40 $pid | sort -n | sed -n 20p)
    kill -TERM $pid
    wait $pid 2>/dev/null
    echo "$server.bulk1m.faults $(awk -v n="$faults" 'BEGIN { printf "%.2f", n / 4 }')" >>"$counted"
done

[ -z "${GATE_WRITE:-}" ] || cp "$counted" tests/bench/gate.txt
awk 'NR == FNR { limit[$1] = $2; next }
    { bad = !($1 in limit) || $2 > limit[$1] * 1.03 + 0.005
      printf "%s  %s %s (%s)\n", bad ? "FAIL" : "ok  ", $1, $2, limit[$1]
      bad ? failed++ : passed++ }
    END { printf "%d passed, %d failed, 0 skipped\n", passed, failed; exit failed > 0 }' tests/bench/gate.txt "$counted"
