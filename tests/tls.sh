#!/bin/sh
# What openssl s_client and curl see of TLS's options: certificates from files and from memory, keys with a password, host
# names, a stapled answer, revoked clients, the names of clients, a certificate that has expired, keys for Wireshark, and
# sessions that other workers resume, also behind a reload. All certificates, lists and answers are made by openssl's own
# CA.
#   sh tests/tls.sh       environment: BUILD CC PATIENCE (seconds for a step)
# Needs openssl and curl; what is missing is a failure with CI=true.
set -u
cd "$(dirname "$0")/.." || exit 1
build=${BUILD:-build}/tls
PATIENCE=${PATIENCE:-30}
passed=0 failed=0 skipped=0 server=''
trap 'kill $server 2>/dev/null; wait' EXIT
for tool in openssl curl; do
    command -v $tool >/dev/null || { echo "SKIP no $tool"; skipped=1; }
done
if [ $skipped -ne 0 ]; then
    echo "0 passed, 0 failed, $skipped skipped"
    [ "${CI:-}" != true ]
    exit
fi
rm -rf "$build"
mkdir -p "$build" || exit 1
${CC:-cc} -std=gnu99 -O1 -Wall -Wextra -o "$build/tls_server" tests/tls_server.c -lssl -lcrypto -lpthread &&
    ${CC:-cc} -std=gnu99 -O1 -DTSRV_DEBUG -o "$build/tls_debug" tests/tls_server.c -lssl -lcrypto -lpthread || exit 1
cd "$build" || exit 1

# result STATUS TEXT [FILE]: a failure shows the end of the file.
result() {
    if [ "$1" -eq 0 ]; then
        passed=$((passed + 1))
        echo "ok   $2"
    else
        failed=$((failed + 1))
        echo "FAIL $2"
        [ $# -lt 3 ] || tail -n 12 "$3" | sed 's/^/     /'
    fi
}

# await COMMAND...: until it is true; not at all: false.
await() {
    end=$(($(date +%s) + PATIENCE))
    until "$@"; do
        [ "$(date +%s)" -lt $end ] || return 1
        sleep 0.1
    done
}

# ---- a CA

cat >ca.cnf <<'CONFIG'
[ca]
default_ca = test
[test]
database = index.txt
new_certs_dir = .
rand_serial = yes
certificate = ca.pem
private_key = ca.key
default_md = sha256
default_days = 30
default_crl_days = 30
policy = any
copy_extensions = copy
unique_subject = no
[any]
organizationName = supplied
commonName = supplied
CONFIG
: >index.txt

# sign NAME HOST [OPTION...]: NAME.pem and NAME.key.
sign() {
    name=$1 host=$2
    shift 2
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -subj "/O=Test/CN=$name" \
        -addext "subjectAltName=DNS:$host" -keyout "$name.key" -out "$name.csr" "$@" &&
        openssl ca -config ca.cnf -batch -notext -in "$name.csr" -out "$name.pem"
}

# staple: an answer of the CA about server.pem, as it is in its database now.
staple() {
    openssl ocsp -issuer ca.pem -cert server.pem -no_nonce -reqout question &&
        openssl ocsp -index index.txt -CA ca.pem -rsigner ca.pem -rkey ca.key -ndays 1 -reqin question -respout \
            server.ocsp
}

revocations() { openssl ca -config ca.cnf -gencrl -out ca.crl; }

{
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj '/O=Test/CN=CA' \
        -keyout ca.key -out ca.pem && sign server localhost -passout pass:secret &&
        sign other other.test -passout pass:secret && sign good localhost -nodes && sign bad localhost -nodes &&
        revocations && staple
} >ca.log 2>&1
result $? "openssl's CA has made certificates, a list and an answer" ca.log
grep -q ENCRYPTED server.key && grep -q ENCRYPTED other.key
result $? 'the keys are encrypted'

# ---- clients

# s_client ARGUMENT...: what it says, and the server's answer to a line, are in client.log. False: there is none.
s_client() {
    : >client.log
    # shellcheck disable=SC2094 # the one waits for what the other writes
    {
        echo who
        await over
    } | stdbuf -oL openssl s_client -connect "127.0.0.1:$port" -CAfile ca.pem -verify_return_error \
        -servername localhost -alpn http/1.1 "$@" >client.log 2>&1
    answered
}
over() { says '^worker|:error:|errno'; }
answered() { says '^worker'; }
says() { grep -qE "$1" client.log; }

ask() {
    curl --noproxy '*' -sS --http1.1 --max-time "$PATIENCE" --cacert ca.pem --resolve "localhost:$port:127.0.0.1" \
        --resolve "other.test:$port:127.0.0.1" --resolve "refused.test:$port:127.0.0.1" "$@" >client.log 2>&1
}

# ---- the server

port=$((20000 + $$ * 101 % 11000))
accepts() { [ "$(grep -c accepts server.out)" -ge "$1" ]; }
./tls_server $port . wrong >/dev/null 2>wrong.log
[ $? -eq 1 ] && grep -q 'key_pem: key_password' wrong.log
result $? "a wrong password: $(sed 's/.*TLS: //' wrong.log)" wrong.log
# The parent of upgrades ends before its last program does; so that one's pid is not ours.
./tls_server $port . secret >server.out 2>server.log &
server=$!
await accepts 2
result $? 'the server runs, with a password for its keys' server.log

for version in tls1_2 tls1_3; do
    s_client -$version -status
    says '^worker . pid [0-9]* TLSv1.[23] asked localhost chose http/1.1 peer $' && says 'Verify return code: 0 \(ok\)'
    result $? "s_client, $version: it is verified" client.log
    says 'OCSP Response Status: successful' && says 'Cert Status: good'
    result $? "s_client, $version, -status: the answer is stapled" client.log
    s_client -$version -servername other.test
    says 'subject=O = Test, CN = other' && says '^worker .* asked other.test'
    result $? "s_client, $version, -servername: on_server_name has chosen what is in memory" client.log
    ! s_client -$version -servername refused.test && says 'unrecognized name'
    result $? "s_client, $version: on_server_name has refused" client.log
    s_client -$version -cert good.pem -key good.key && s_client -$version -cert bad.pem -key bad.key
    says "^worker .* peer $(openssl x509 -in bad.pem -noout -subject -nameopt RFC2253 | sed 's/subject=//')\$"
    result $? "s_client, $version: tsrv_tls_peer_name is openssl's subject" client.log
done

ask --cert-status "https://localhost:$port/" && says '^worker . pid [0-9]* TLSv1.3 asked localhost chose http/1.1 '
result $? 'curl, --cert-status' client.log
ask "https://other.test:$port/" && says ' asked other.test'
result $? 'curl: on_server_name has chosen' client.log
! ask "https://refused.test:$port/" && says 'unrecognized name'
result $? 'curl: on_server_name has refused' client.log
ask --cert bad.pem --key bad.key "https://localhost:$port/" && says ' peer CN=bad,O=Test$'
result $? 'curl, --cert: its name' client.log

# ---- sessions

# resumed ARGUMENT...: by each of both workers, by their pids; and seen has these.
resumed() {
    seen=''
    tries=0
    while [ $tries -lt 40 ] && [ "$(echo "$seen" | wc -w)" -lt 2 ]; do
        tries=$((tries + 1))
        s_client -sess_in session "$@" && says '^Reused, TLS' || return 1
        pid=$(sed -n 's/^worker . pid \([0-9]*\) .*/\1/p' client.log)
        case " $seen " in *" $pid "*) ;; *) seen="$seen $pid" ;; esac
    done
    [ "$(echo "$seen" | wc -w)" -eq 2 ]
}

# is_new PID...: none of them answers any more.
is_new() {
    s_client || return 1
    for pid in "$@"; do
        ! says "pid $pid " || return 1
    done
}

for version in tls1_2 tls1_3; do
    s_client -$version -sess_out session && says '^New, TLS' && [ -s session ]
    result $? "s_client, $version, -sess_out: a session" client.log
    resumed -$version
    result $? "s_client, $version, -sess_in: both workers ($seen ) resume it" client.log
    cp session session_$version
done
old=$seen started=$(grep -c accepts server.out)
kill -HUP $server
# shellcheck disable=SC2086 # they are two
await accepts $((started + 2)) && await is_new $old
result $? 'a reload: other workers' server.log
for version in tls1_2 tls1_3; do
    cp session_$version session
    resumed -$version
    result $? "s_client, $version: the new workers ($seen ) resume it" client.log
done

# ---- a client is revoked

{ openssl ca -config ca.cnf -revoke bad.pem && revocations; } >>ca.log 2>&1
result $? 'the CA has revoked a client' ca.log
old=$seen started=$(grep -c accepts server.out)
kill -HUP $server
# shellcheck disable=SC2086
await accepts $((started + 2)) && await is_new $old
result $? 'a reload: the new list' server.log
for version in tls1_2 tls1_3; do
    s_client -$version -cert good.pem -key good.key && says ' peer CN=good,O=Test$'
    result $? "s_client, $version: who is not revoked is served" client.log
    ! s_client -$version -cert bad.pem -key bad.key && says 'alert certificate revoked'
    result $? "s_client, $version: who is revoked is refused" client.log
done
! ask --cert bad.pem --key bad.key "https://localhost:$port/" && says 'certificate revoked'
result $? 'curl: who is revoked is refused' client.log
grep -q 'certificate revoked' server.log
result $? 'the log says so' server.log

# ---- an upgrade: the new program has keys of its own, as the header says

s_client -tls1_3 -sess_out session && old=$(sed -n 's/^worker . pid \([0-9]*\) .*/\1/p' client.log)
started=$(grep -c accepts server.out)
kill -USR2 $server
# shellcheck disable=SC2086
await accepts $((started + 2)) && await is_new $old
result $? 'an upgrade: other workers' server.log
wait $server
result $? 'the old program has ended' server.log
s_client -tls1_3 -sess_in session && says '^New, TLS' && s_client -sess_out session && resumed
result $? "s_client: a session of before is begun anew, and the next one resumed ($seen )" client.log
server=$(ps -o ppid= -p "${seen##* }")
kill -TERM "$server"
ended() { ! kill -0 "$server" 2>/dev/null; }
await ended
result $? 'SIGTERM ends it' server.log
server=''

# ---- a certificate that has expired, and keys for Wireshark

{
    openssl ca -config ca.cnf -batch -notext -startdate 20200101000000Z -enddate 20200201000000Z -in server.csr \
        -out server.pem && staple
} >>ca.log 2>&1
result $? 'the CA has made a certificate of 2020' ca.log

# serves PROGRAM: as the server above, with SSLKEYLOGFILE.
serves() {
    SSLKEYLOGFILE=$PWD/server.keys "$1" $port . secret >server.out 2>server.log &
    server=$!
    await accepts 2
}
ends() {
    kill -TERM $server && wait $server
    code=$?
    server=''
    return $code
}

rm -f server.keys client.keys
serves ./tls_server && grep -q 'server.pem: the certificate has expired on 2020-02-01' server.log
result $? 'a certificate that has expired: the log says so, and the server runs' server.log
! s_client && says 'certificate has expired'
result $? 's_client: it has expired' client.log
SSLKEYLOGFILE=client.keys ask --insecure "https://localhost:$port/" && [ -s client.keys ]
result $? 'curl, --insecure' client.log
ends && [ ! -e server.keys ]
result $? 'SSLKEYLOGFILE: no key is written' server.log

rm -f client.keys
serves ./tls_debug && SSLKEYLOGFILE=client.keys ask --insecure "https://localhost:$port/" &&
    SSLKEYLOGFILE=client.keys ask --insecure --tls-max 1.2 "https://localhost:$port/"
result $? 'curl, --insecure, and a server with TSRV_DEBUG' client.log
grep -q '^CLIENT_RANDOM ' client.keys && grep -q '^SERVER_TRAFFIC_SECRET_0 ' client.keys &&
    [ "$(grep -v '^#' client.keys | sort)" = "$(sort server.keys)" ]
result $? "SSLKEYLOGFILE, with TSRV_DEBUG: the keys are curl's" server.keys
grep -q 'the keys of all TLS sessions go to SSLKEYLOGFILE' server.log
result $? 'the log says so' server.log
ends
result $? 'it ends' server.log

echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
