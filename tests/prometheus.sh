#!/bin/sh
# The metrics of the status example as Prometheus sees them: promtool finds nothing to say about them, and a server
# of Prometheus' own scrapes them.
#   tests/prometheus.sh       environment: BUILD CC PATIENCE (seconds for a step)
# Needs prometheus (with promtool) and curl; what is missing is a failure with CI=true.
set -u
cd "$(dirname "$0")/.." || exit 1
build=${BUILD:-build}/prometheus
PATIENCE=${PATIENCE:-30}
passed=0 failed=0 skipped=0 server='' prometheus=''
trap 'kill $server $prometheus 2>/dev/null; wait' EXIT
for tool in promtool prometheus curl; do
    command -v $tool >/dev/null || { echo "SKIP no $tool"; skipped=1; }
done
if [ $skipped -ne 0 ]; then
    echo "0 passed, 0 failed, $skipped skipped"
    [ "${CI:-}" != true ]
    exit
fi
rm -rf "$build"
mkdir -p "$build" && ${CC:-cc} -O2 -o "$build/status" examples/status.c -lpthread || exit 1

# result <status> <text>
result() {
    if [ "$1" -eq 0 ]; then echo "ok   $2"; passed=$((passed + 1)); else echo "FAIL $2"; failed=$((failed + 1)); fi
}

# await <command...>: until it is true; not at all: false.
await() {
    end=$(($(date +%s) + PATIENCE))
    until "$@"; do
        [ "$(date +%s)" -lt $end ] || return 1
        sleep 0.1
    done
}

ask() { curl -s --max-time 5 "$@"; }

base=$((20000 + $$ * 101 % 11000))
metrics=http://127.0.0.1:$((base + 1))/metrics api=http://127.0.0.1:$((base + 2))/api/v1/query
"$build/status" $base $((base + 1)) 2 >"$build/status.log" 2>&1 &
server=$!
await ask -o /dev/null "$metrics"
result $? 'the status example answers'

ask "$metrics" | promtool check metrics >"$build/promtool.log" 2>&1 && [ ! -s "$build/promtool.log" ]
result $? 'promtool accepts the metrics, and has nothing to remark'
[ ! -s "$build/promtool.log" ] || cat "$build/promtool.log"

cat >"$build/prometheus.yml" <<YML
global: {scrape_interval: 1s}
scrape_configs:
  - job_name: status
    static_configs: [{targets: ['127.0.0.1:$((base + 1))']}]
YML
prometheus --config.file="$build/prometheus.yml" --storage.tsdb.path="$build/data" \
    --web.listen-address=127.0.0.1:$((base + 2)) >"$build/prometheus.log" 2>&1 &
prometheus=$!
knows() { ask "$api" --data-urlencode "query=$1" | grep -q "\"value\":\[[0-9.]*,\"$2\"\]"; }
await knows 'up{job="status"}' 1
result $? 'Prometheus scrapes it'
await knows 'count(count by (worker) (tsrv_connections_accepted_total))' 2
result $? 'each worker has its label'

[ $failed -eq 0 ] || tail -n 5 "$build"/*.log
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
