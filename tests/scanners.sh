#!/bin/sh
# What sslscan and testssl find at the echo_tls example: old protocols, weak ciphers, renegotiation, compression, and
# whatever testssl gives a severity to, are a failure.
#   tests/scanners.sh [build directory]       environment: BUILD CC
set -u
cd "$(dirname "$0")/.." || exit 2
build=${1:-${BUILD:-build}}
for tool in sslscan testssl; do
    command -v $tool >/dev/null || { echo "$tool is not installed"; exit 1; }
done
make -s BUILD="$build" cert "$build/scanners/echo_tls" DIR="$build/scanners" 2>/dev/null || exit 1
port=$((20000 + $$ % 20000))
"$build/scanners/echo_tls" $port "$build/cert.pem" "$build/key.pem" >/dev/null 2>&1 &
server=$!
trap 'kill $server' EXIT
report=$build/scanners/report
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

# Protocols, ciphers, forward secrecy, the server's order, and every vulnerability that it knows. The certificate is one
# that trusts itself, and is not looked at.
found=$build/scanners/found.csv
rm -f "$found"
TERM=${TERM:-dumb} testssl --quiet --color 0 --warnings batch --nodns none --ip 127.0.0.1 -p -s -f -P -U \
    --csvfile "$found" 127.0.0.1:$port >"$build/scanners/testssl" 2>&1
grep -E '^"[^"]*","[^"]*","[^"]*","(LOW|MEDIUM|HIGH|CRITICAL|FATAL)"' "$found" && failed=1
for test in SSLv2 SSLv3 TLS1_2 TLS1_3 cipherlist_NULL cipherlist_STRONG cipher_order heartbleed CCS secure_renego \
    secure_client_renego CRIME_TLS POODLE_SSL SWEET32 LOGJAM LUCKY13 RC4; do
    grep -qE "^\"$test\",\"[^\"]*\",\"[^\"]*\",\"OK\"" "$found" || { echo "testssl: $test is not OK"; failed=1; }
done
[ $failed -eq 0 ] || cat "$build/scanners/testssl"
exit $failed
