#!/bin/sh
# What sslscan finds at the echo_tls example: old protocols, weak ciphers, renegotiation or compression
# are a failure.
#   tests/sslscan.sh [build directory]        environment: BUILD CC
set -u
cd "$(dirname "$0")/.." || exit 2
build=${1:-${BUILD:-build}}
command -v sslscan >/dev/null || { echo 'sslscan is not installed'; exit 1; }
make -s BUILD="$build" cert "$build/sslscan/echo_tls" DIR="$build/sslscan" 2>/dev/null || exit 1
port=$((20000 + $$ % 20000))
"$build/sslscan/echo_tls" $port "$build/cert.pem" "$build/key.pem" >/dev/null 2>&1 &
server=$!
trap 'kill $server' EXIT
report=$build/sslscan/report
for try in 1 2 3 4 5 6 7 8 9 10; do
    sslscan --no-colour 127.0.0.1:$port >"$report" 2>&1 && grep -q 'TLSv1.3' "$report" && break
    sleep 0.2 # it does not listen yet
done
failed=0
expect() { # expect <line of the report>
    grep -q "^$1" "$report" || { echo "missing: $1"; failed=1; }
}
for old in SSLv2 SSLv3 TLSv1.0 TLSv1.1; do expect "$old *disabled"; done
expect 'TLSv1.2 *enabled'
expect 'TLSv1.3 *enabled'
expect 'Session renegotiation not supported'
if grep -E '^(Preferred|Accepted)' "$report" | grep -vE ' (TLS_|ECDHE-)[A-Z0-9-]*_?(AES|CHACHA20).*(GCM|POLY1305)'; then
    echo 'these ciphers are weak'
    failed=1
fi
if grep -i 'vulnerable' "$report" | grep -v 'not vulnerable'; then failed=1; fi
[ $failed -eq 0 ] || cat "$report"
exit $failed
