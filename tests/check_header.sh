#!/bin/sh
# Checks what the compiler cannot: that tcpserver.h keeps the rules it was written by.
#   tests/check_header.sh [build directory]        environment: BUILD CC NM CI
# Output is one line per check; what is wrong follows, indented. With CI=true a skip is a failure.
set -u
LC_ALL=C
export LC_ALL

cd "$(dirname "$0")/.." || exit 2
build=${1:-${BUILD:-build}}
CC=${CC:-cc}
NM=${NM:-nm}
header=tcpserver.h
openssl=
if echo '#include <openssl/ssl.h>' | $CC -E -x c - >/dev/null 2>&1; then openssl=yes; fi
work=$build/check
doc=$build/doc
max_columns=100
max_lines=60
max_section=500
max_tls=5 # functions that name TLS, outside of its own sections and of the seam

rm -rf "$work" "$doc"
mkdir -p "$work" "$doc" || exit 2
passed=0 failed=0 skipped=0

ok() {
    echo "ok    $1"
    passed=$((passed + 1))
}

fail() { # fail <text> [file with what is wrong]
    echo "FAIL  $1"
    if [ $# -gt 1 ]; then
        head -n 25 "$2" | sed 's/^/      /'
        [ "$(wc -l <"$2")" -le 25 ] || echo "      ... $(wc -l <"$2" | tr -d ' ') lines in all"
    fi
    failed=$((failed + 1))
}

skip() {
    echo "skip  $1"
    skipped=$((skipped + 1))
}

# ok if the file with what is wrong is empty
verdict() { # verdict <text> <file>
    if [ -s "$2" ]; then fail "$1" "$2"; else ok "$1"; fi
}

if [ ! -f "$header" ]; then
    fail "$header does not exist"
    exit 1
fi

# ---- preparation: the code without comments, its functions, its sections ------------------------

# Blanks comments and the insides of literals; lines and columns stay.
cat >"$work/strip.awk" <<'TEXT'
{
    out = ""
    n = length($0)
    i = 1
    while (i <= n) {
        c = substr($0, i, 1)
        two = substr($0, i, 2)
        if (comment) {
            if (two == "*/") { comment = 0; out = out "  "; i += 2 }
            else { out = out " "; i++ }
        } else if (two == "/*") {
            comment = 1; out = out "  "; i += 2
        } else if (two == "//") {
            break
        } else if (c == "\"" || c == "'") {
            out = out c
            i++
            while (i <= n && substr($0, i, 1) != c) {
                if (substr($0, i, 1) == "\\") { out = out " "; i++ }
                out = out " "
                i++
            }
            out = out c
            i++
        } else {
            out = out c
            i++
        }
    }
    print out
}
TEXT

# Reads stripped code and prints, for what stands outside of braces:
#   def  <name> <api|static|other> <first line> <line of its brace> <line of the closing brace>
#   decl <name> <api|static|other> <first line> <last line>
#   bad  <text>
cat >"$work/scan.awk" <<'TEXT'
# The identifier before the last parenthesis that opens at the top level.
function function_name(text,   i, n, c, depth, name, word, before) {
    n = length(text)
    for (i = 1; i <= n; i++) {
        c = substr(text, i, 1)
        if (c == "(" && depth++ == 0) {
            before = substr(text, 1, i - 1)
            if (match(before, /[A-Za-z_][A-Za-z0-9_]*[ ]*$/)) {
                word = substr(before, RSTART)
                sub(/ +$/, "", word)
                if (word ~ /[a-z]/ && word !~ /^__/) name = word
            }
        } else if (c == ")") depth--
    }
    return name
}
# The text with all that is inside parentheses taken out.
function outside(text,   i, n, c, depth, out) {
    n = length(text)
    for (i = 1; i <= n; i++) {
        c = substr(text, i, 1)
        if (c == "(") depth++
        if (depth == 0) out = out c
        if (c == ")") depth--
    }
    return out
}
function linkage(text) {
    text = " " text " "
    if (text ~ /[^A-Za-z0-9_]TSRV_API[^A-Za-z0-9_]/) return "api"
    if (text ~ /[^A-Za-z0-9_]static[^A-Za-z0-9_]/) return "static"
    return "other"
}
function end_statement(   name, top) {
    top = outside(text)
    name = function_name(text)
    if (name != "" && top !~ /=/ && top !~ /typedef/ && top !~ /\{/ && name !~ keyword)
        print "decl", name, linkage(text), first, NR
    text = ""
}
BEGIN { keyword = "^(if|for|while|switch|return|else|do|sizeof)$" }
{
    directive = continued || $0 ~ /^[ \t]*#/
    continued = directive && $0 ~ /\\$/
    if (directive) next
    n = length($0)
    for (i = 1; i <= n; i++) {
        c = substr($0, i, 1)
        if (c == "{") {
            if (depth == 0 && text ~ /extern *" *" *$/) {
                language++
                text = ""
                continue
            }
            if (depth == 0) {
                top = outside(text)
                name = function_name(text)
                is_function = name != "" && top !~ /=/ && name !~ keyword && top !~ /\{/
                open = NR
            }
            depth++
        } else if (c == "}") {
            if (depth == 0) {
                if (language > 0) language--
                else print "bad", "line " NR ": a closing brace without an opening one"
                text = ""
                continue
            }
            depth--
            if (depth == 0 && is_function) {
                print "def", name, linkage(text), first, open, NR
                text = ""
                is_function = 0
            } else if (depth == 0) text = text "{}"
        } else if (depth == 0) {
            if (c == ";") end_statement()
            else if (text != "" || c != " ") {
                if (text == "") first = NR
                text = text c
            }
        }
    }
    if (text != "" && depth == 0) text = text " "
}
END {
    if (depth != 0) print "bad", "line " open ": this brace, or one in it, is not closed"
}
TEXT

awk -f "$work/strip.awk" "$header" >"$work/code"
awk -f "$work/scan.awk" "$work/code" >"$work/functions"

# <tag> <line> of each section; CONTENTS in the manual is not one.
awk '/^[ \t*]*CONTENTS/ { contents = 1 }
    !contents && /^[ \t*\/]*>>[a-z]/ {
        sub(/^[^>]*>>/, "")
        sub(/[^a-z0-9_].*/, "")
        print $0, NR
    }
    /\*\// { contents = 0 }' "$header" >"$work/sections"

# ---- sections ----------------------------------------------------------------------------------

awk '/^[ \t*]*CONTENTS/ { contents = 1 }
    contents && /^[ \t*]*>>[a-z]/ {
        sub(/^[^>]*>>/, "")
        sub(/[^a-z0-9_].*/, "")
        print
    }
    contents && /\*\// { exit }' "$header" >"$work/contents"
cut -d ' ' -f 1 "$work/sections" >"$work/tags"
{
    [ -s "$work/contents" ] || echo "the manual has no CONTENTS with a line for each >>tag"
    diff "$work/contents" "$work/tags" |
        sed -n 's/^< /not a section, or not here: >>/p; s/^> /not in CONTENTS, or not here: >>/p'
    sort "$work/tags" | uniq -d | sed 's/^/twice: >>/'
} >"$work/bad" 2>&1
verdict "sections: the >>tags are those of CONTENTS, in its order" "$work/bad"

end=$(wc -l <"$header" | tr -d ' ')
awk -v end="$end" -v most="$max_section" '
    function close_section(line) {
        if (tag != "" && line - start > most) print ">>" tag ": " line - start " lines"
    }
    { close_section($2); tag = $1; start = $2 }
    END { close_section(end) }' "$work/sections" >"$work/bad"
verdict "sections: none above $max_section lines" "$work/bad"

# ---- version -----------------------------------------------------------------------------------

macro() { sed -n "s/^#define $1 \"\\{0,1\\}\\([0-9.]*\\)\"\\{0,1\\} *\$/\\1/p" "$header"; }
version=$(macro TSRV_VERSION_MAJOR).$(macro TSRV_VERSION_MINOR).$(macro TSRV_VERSION_PATCH)
title=$(sed -n '1,10s/^[ *\/]*tcpserver\.h \([0-9][0-9.]*\) .*/\1/p' "$header")
newest=$(awk -v start="$(awk '$1 == "history" { print $2 }' "$work/sections")" '
    start != "" && NR > start + 0 && match($0, /[0-9]+\.[0-9]+\.[0-9]+/) {
        print substr($0, RSTART, RLENGTH)
        exit
    }' "$header")
{
    echo "$version" | grep -q '^[0-9][0-9]*\.[0-9][0-9]*\.[0-9][0-9]*$' ||
        echo "TSRV_VERSION_MAJOR, _MINOR and _PATCH are \"$version\""
    string=$(macro TSRV_VERSION)
    [ "$string" = "$version" ] || echo "TSRV_VERSION is \"$string\", the numbers are $version"
    [ "$title" = "$version" ] || echo "the title line says \"$title\", the macros $version"
    [ "$newest" = "$version" ] || echo "the newest history is \"$newest\", the macros say $version"
} >"$work/bad"
verdict "version: macros, title line and history say $version" "$work/bad"

# ---- symbols -----------------------------------------------------------------------------------

underscore=
[ "$(uname -s)" = Darwin ] && underscore=_

# <defined|undefined> <name> of each global symbol of an object
symbols() {
    "$NM" -P -g "$1" | awk -v underscore="$underscore" 'NF >= 2 {
        name = $1
        sub(/@.*/, "", name)
        if (underscore != "") sub(/^_/, "", name)
        print ($2 ~ /^[Uvw]$/ ? "undefined" : "defined"), name
    }' | sort -u
}

{
    echo '#define TCPSERVER_IMPLEMENTATION'
    echo '#include "tcpserver.h"'
} >"$work/plain.c"
if ! command -v "$NM" >/dev/null 2>&1; then
    skip "symbols: no nm ($NM)"
    skip "symbols with TSRV_STATIC: no nm ($NM)"
else
    for mode in '' -DTSRV_STATIC; do
        if [ -z "$mode" ]; then
            text="symbols: every exported name begins with tsrv_"
            allowed='^defined tsrv_'
        else
            text="symbols: with TSRV_STATIC nothing is exported"
            allowed='^$'
        fi
        # shellcheck disable=SC2086
        if ! $CC $mode -w -I. -c "$work/plain.c" -o "$work/plain.o" >"$work/bad" 2>&1; then
            fail "$text" "$work/bad"
            continue
        fi
        symbols "$work/plain.o" >"$work/symbols"
        grep '^defined ' "$work/symbols" | grep -v "$allowed" >"$work/bad"
        if [ -z "$mode" ] && ! grep -q '^defined tsrv_' "$work/symbols"; then
            echo "not a single tsrv_ function is exported" >>"$work/bad"
        fi
        verdict "$text" "$work/bad"
    done
fi

# ---- seam --------------------------------------------------------------------------------------
# With TSRV_SYS and the allocator replaced, what an object still asks the linker for are calls that
# bypass the seam. Each call goes through a pointer that has the type of the replaced function.

cat >"$work/seam.c" <<'TEXT'
void *t_seam_lookup(const char *name);
void *t_seam_malloc(__SIZE_TYPE__ size);
void *t_seam_realloc(void *pointer, __SIZE_TYPE__ size);
void t_seam_free(void *pointer);
#define TSRV_SYS(name, arguments) ((__typeof__(&name))t_seam_lookup(#name)) arguments
#define TSRV_MALLOC(size) t_seam_malloc(size)
#define TSRV_REALLOC(pointer, size) t_seam_realloc(pointer, size)
#define TSRV_FREE(pointer) t_seam_free(pointer)
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"
TEXT
{ echo '#include <stddef.h>' && cat "$work/seam.c"; } >"$work/seam_late.c"

# What cannot fail, or only reports; then what compilers and C libraries put in on their own.
cat >"$work/allowed" <<'TEXT'
t_seam_(lookup|malloc|realloc|free)
mem(cpy|move|set|chr|cmp|rchr|mem)|str(len|cmp|ncmp|chr|rchr|spn|cspn|str|tol|error|error_r)|v?snprintf
__xpg_strerror_r|hton[sl]|ntoh[sl]|abort|fputs|fprintf|stderr|stdout
__errno_location|__errno|__error|__isoc99_.*|__isoc23_(.*scanf|strtol)
__assert_fail|__assert|__assert_rtn|__assert2|__assert13|__stderrp|__stdoutp|__sF
bcmp|fwrite|fputc|__(v?snprintf|fprintf|fputs|mem[a-z]+|str[a-z]+)_chk
__stack_chk_fail|__stack_chk_guard|__stack_chk_fail_local
__tls_get_addr|_tlv_bootstrap|_GLOBAL_OFFSET_TABLE_
__[a-z]+[dt]i[234]|__aarch64_.*|__emutls_.*|__(asan|lsan|tsan|ubsan|sanitizer|gcov|llvm)_.*
__cxa_get_globals
TEXT
allowed=$(paste -s -d '|' "$work/allowed")

seam() { # seam <text> <allowed besides> <source> <options...>
    text="seam: $1"
    more=$2
    source=$3
    shift 3
    # shellcheck disable=SC2086
    if ! $CC "$@" -w -I. -c "$work/$source" -o "$work/seam.o" >"$work/bad" 2>&1; then
        fail "$text" "$work/bad"
        return
    fi
    symbols "$work/seam.o" | sed -n 's/^undefined //p' >"$work/symbols"
    grep -E -v -x "$allowed${more:+|$more}" "$work/symbols" |
        sed 's/^/called past TSRV_SYS: /' >"$work/bad"
    for name in lookup malloc realloc free; do
        grep -q "^t_seam_$name\$" "$work/symbols" ||
            echo "t_seam_$name is never called" >>"$work/bad"
    done
    verdict "$text" "$work/bad"
}

if ! command -v "$NM" >/dev/null 2>&1; then
    skip "seam: no nm ($NM)"
else
    contexts='(get|make|swap)context'
    case $(uname -m) in
    x86_64 | amd64 | i?86 | aarch64 | arm64 | arm* | riscv64 | ppc64le | s390x) else= ;;
    *) else=$contexts ;;
    esac
    seam "every system call and allocation can be replaced" "$else" seam.c -O0
    seam "the same, optimised" "$else" seam.c -O2
    seam "the same, _GNU_SOURCE too late" "$else" seam_late.c -std=gnu99 -O0
    seam "the same, TSRV_NO_EPOLL" "$else" seam.c -O0 -DTSRV_NO_EPOLL
    seam "the same, TSRV_NO_COROUTINES" '' seam.c -O0 -DTSRV_NO_COROUTINES
    seam "the same, TSRV_NO_THREADS" "$else" seam.c -O0 -DTSRV_NO_THREADS
    seam "the same, TSRV_USE_UCONTEXT" "$contexts" seam.c -O0 -DTSRV_USE_UCONTEXT
    if [ -n "$openssl" ]; then
        seam "the same, TSRV_TLS_OPENSSL" "${else:+$else|}(SSL|TLS|ERR|BIO|X509|OPENSSL|PEM|OCSP|EVP|ASN1|OSSL|RAND|i2d|d2i)_.*|CRYPTO_(free|malloc|memcmp|get_ex_new_index)|HMAC" \
            seam.c -O0 -DTSRV_TLS_OPENSSL
    else
        skip "seam with TLS: no OpenSSL"
    fi
    text='seam: nothing of pthreads is called with TSRV_NO_THREADS'
    if $CC -std=gnu99 -w -DTSRV_NO_THREADS -DTCPSERVER_IMPLEMENTATION -x c -c tcpserver.h -o "$work/seam.o" \
        >"$work/bad" 2>&1; then
        symbols "$work/seam.o" | grep -E ' (pthread|thrd|sem)_' >"$work/bad"
        verdict "$text" "$work/bad"
    else
        fail "$text" "$work/bad"
    fi
fi

# ---- linking -----------------------------------------------------------------------------------
# A processor that cannot read and write 8 bytes in one piece has no 8-byte atomics but libatomic's.

small='arm-linux-gnueabi-gcc -march=armv5te'
if ! command -v "${small%% *}" >/dev/null 2>&1; then
    skip "linking: no compiler for a small processor (${small%% *})"
elif $small -std=gnu99 -O2 -o "$work/small" examples/echo.c -lpthread >"$work/bad" 2>&1; then
    ok "linking: nothing is to be linked, on a small processor either"
else
    fail "linking: nothing is to be linked, on a small processor either" "$work/bad"
fi

# ---- functions ---------------------------------------------------------------------------------

awk '$1 == "def" {
    lines = $6 - $5 - 1
    print (lines < 1 ? 1 : lines), $2, $4
}' "$work/functions" | sort -n >"$work/lengths"
{
    sed -n 's/^bad //p' "$work/functions"
    [ -s "$work/lengths" ] || echo "no function was found"
    awk -v max="$max_lines" '
        $1 > max { print "line " $3 ": " $2 " has " $1 " lines" }' "$work/lengths"
} >"$work/bad"
verdict "functions: $(awk '{ lines[NR] = $1 } END {
    printf "%d, median %d lines, longest %d", NR, lines[int((NR + 1) / 2)], lines[NR]
}' "$work/lengths"), none above $max_lines" "$work/bad"

# ---- layers ------------------------------------------------------------------------------------

awk 'match($0, /\/\* forward: *tsrvi?_[a-z0-9_]+ +- +[^ ]/) {
    text = substr($0, RSTART, RLENGTH)
    sub(/^\/\* forward: */, "", text)
    sub(/ .*/, "", text)
    print text, NR
}' "$header" >"$work/forward"

awk '
    FILENAME ~ /sections$/ { tag[++sections] = $1; start[sections] = $2; next }
    FILENAME ~ /forward$/ { forward[$1] = $2; next }
    FILENAME ~ /functions$/ {
        if ($1 == "def" && $2 ~ /^tsrvi?_/ && !($2 in home)) home[$2] = section($4)
        if ($1 == "decl" && $3 == "static" && $2 ~ /^tsrvi?_/) declared[$2] = $4
        next
    }
    FNR == 1 {
        for (name in declared)
            if (!(name in forward))
                print "line " declared[name] ": " name " lacks a /* forward: */"
        for (name in forward)
            if (!(name in home)) print "line " forward[name] ": forward: names no function: " name
    }
    {
        here = section(FNR)
        rest = $0
        while (match(rest, /[A-Za-z_][A-Za-z0-9_]*/)) {
            name = substr(rest, RSTART, RLENGTH)
            rest = substr(rest, RSTART + RLENGTH)
            if (!(name in home) || here >= home[name]) continue
            if (name in forward && here == section(forward[name])) continue
            if (name ~ /^tsrv_/ && tag[here] ~ /^api/) continue
            print "line " FNR ": >>" tag[here] " names " name ", which is in >>" tag[home[name]]
        }
    }
    function section(line,   i) {
        for (i = sections; i > 0; i--) if (start[i] <= line) return i
        return 0
    }' "$work/sections" "$work/forward" "$work/functions" "$work/code" >"$work/bad"
count=$(wc -l <"$work/forward" | tr -d ' ')
verdict "layers: no name of a later section; $count listed forward declarations" "$work/bad"

# ---- state of the process -------------------------------------------------------------------------

# Besides the two structs: OpenSSL's method, made once, and what TSRV_DEBUG has told.
{
    $CC -std=c99 -fno-pie -O0 -DTCPSERVER_IMPLEMENTATION ${openssl:+-DTSRV_TLS_OPENSSL} -DTSRV_DEBUG \
        -x c -c "$header" -o "$work/state.o" 2>&1 &&
        $NM "$work/state.o" | awk '$2 ~ /^[bBdDC]$/ && $3 !~ /^(tsrvi_process|tsrvi_thread)$/ &&
            $3 !~ /^(method|told)\.[0-9]+$/ { print "a global variable of its own: " $3 }'
} >"$work/bad"
verdict "state: one struct for the process, and one for each thread" "$work/bad"

# ---- TLS is named where it is chosen -------------------------------------------------------------

awk -v most="$max_tls" '
    FILENAME ~ /sections$/ { tag[++sections] = $1; start[sections] = $2; next }
    FILENAME ~ /functions$/ {
        if ($1 == "def" && $2 ~ /^tsrvi?_/) { name[++count] = $2; first[count] = $4; last[count] = $6 }
        next
    }
    tolower($0) ~ /tls/ {
        for (i = 1; i <= count; i++) {
            here = section(FNR)
            if (first[i] <= FNR && FNR <= last[i] && !(name[i] in seen) && here !~ /^(tls|transport)/) {
                seen[name[i]]
                list[++found] = "line " FNR ": " name[i] ", in >>" here
            }
        }
    }
    END { if (found > most) for (i = 1; i <= found; i++) print list[i] }
    function section(line,   i) {
        for (i = sections; i > 0; i--) if (start[i] <= line) return tag[i]
        return "manual"
    }' "$work/sections" "$work/functions" "$work/code" >"$work/bad"
verdict "layers: at most $max_tls functions outside of >>transport and >>tls... name TLS" "$work/bad"

# ---- text --------------------------------------------------------------------------------------

awk -v max="$max_columns" '
    length($0) > max { print "line " NR ": " length($0) " columns" }
    /\t/ { print "line " NR ": a tab" }
    /[ \t\r]$/ { print "line " NR ": a blank at the end" }' "$header" >"$work/bad"
verdict "text: at most $max_columns columns, no tabs, no blanks at line ends" "$work/bad"

# A member of that name (backend->signal) is not meant; a name that is handed to TSRV_SYS is.
awk '
    BEGIN {
        list = "sprintf vsprintf strcpy strcat alloca gets exit abort printf signal gettimeofday"
        count = split(list " time rand", word, " ")
    }
    {
        for (i = 1; i <= count; i++) {
            rest = " " $0
            while (match(rest, "[^A-Za-z0-9_]" word[i] " *\\(")) {
                before = substr(rest, 1, RSTART)
                rest = substr(rest, RSTART + 1)
                if (before !~ /(->|\.) *$/) print "line " FNR ": " word[i]
            }
            if ($0 ~ ("TSRV_SYS\\( *" word[i] " *,")) print "line " FNR ": TSRV_SYS(" word[i]
        }
    }' "$work/code" >"$work/bad"
verdict "text: no forbidden function" "$work/bad"

# ---- public functions --------------------------------------------------------------------------

awk '$3 == "api" && $1 == "decl" { print $2 }' "$work/functions" | sort >"$work/declared"
awk '$3 == "api" && $1 == "def" { print $2 }' "$work/functions" | sort -u >"$work/defined"
{
    [ -s "$work/declared" ] || echo "no TSRV_API declaration was found"
    uniq -d "$work/declared" | sed 's/^/declared twice: /'
    sort -u "$work/declared" | comm -23 - "$work/defined" | sed 's/^/declared, but not defined: /'
    sort -u "$work/declared" | comm -13 - "$work/defined" | sed 's/^/defined, but not declared: /'
    awk '$1 == "def" && $2 ~ /^tsrv_/ && $3 != "api" {
        print "line " $4 ": defined without TSRV_API: " $2
    }' "$work/functions"
} >"$work/bad"
count=$(wc -l <"$work/declared" | tr -d ' ')
verdict "public: $count functions, each declared and defined" "$work/bad"

# Declarations that follow each other without a blank line share a comment; a heading is none.
awk '
    FILENAME ~ /functions$/ {
        if ($1 == "decl" && $3 == "api") {
            name[++count] = $2
            first[count] = $4
            for (i = $4; i <= $5; i++) declaration[i] = 1
        }
        next
    }
    { line[FNR] = $0 }
    END {
        for (i = 1; i <= count; i++) {
            above = first[i] - 1
            while (above in declaration || line[above] ~ /^#/) above--
            if (line[above] !~ /\*\/ *$/ || line[above] ~ /^\/\* (-----*|=====*)/)
                print "line " first[i] ": " name[i] " has no comment above it"
        }
    }' "$work/functions" "$header" >"$work/bad"
verdict "public: a comment above every declaration" "$work/bad"

# ---- documentation -----------------------------------------------------------------------------

# README.md: blocks between ```c and ```.
if [ -f README.md ]; then
    awk -v out="$doc/readme" '
        inside && /^ *```/ { inside = 0; close(file); next }
        inside { print >file; next }
        /^ *```c *$/ {
            inside = 1
            file = out "_" ++count ".block"
            printf "" >file
            print NR + 1, "README.md" >(file ".line")
            close(file ".line")
        }' README.md
fi

# The manual: after a line with [compiles], the lines that are indented like the first one, or more. After one with
# [compiles behind it] they follow the block before.
awk -v out="$doc/manual" -v header="$header" '
    function begin(   line, before) {
        before = file
        file = out "_" ++count ".block"
        printf "" >file
        inside = 1
        indent = -1
        blank = 0
        behind = /behind it/
        if (!behind) return
        while ((getline line <before) > 0) print line >file
        close(before)
        getline line <(before ".line")
        print line >(file ".line")
        close(file ".line")
    }
    /^ \* >>api  / { exit }
    { sub(/^ \* ?/, "") }
    inside {
        match($0, /^ */)
        if ($0 ~ /^ *$/) {
            if (indent >= 0) blank++
            next
        }
        if (indent < 0) {
            indent = RLENGTH
            if (behind) print "#line", NR, "\"" header "\"" >file
            else {
                print NR, header >(file ".line")
                close(file ".line")
            }
        }
        if (RLENGTH < indent || $0 ~ /\[compiles/ || $0 ~ /^ *\*\//) { inside = 0; close(file) }
        else {
            for (; blank > 0; blank--) print "" >file
            print substr($0, indent + 1) >file
        }
    }
    /\[compiles( behind it)?\]/ { begin() }' "$header"

# How a block is compiled depends on what is in it: a program, functions, or statements.
doc_block() { # doc_block <block>
    block=$1
    base=${block%.block}
    read -r line file <"$block.line" || return
    awk -f "$work/strip.awk" "$block" >"$base.code"
    marker="#line $line \"$file\""
    flags='-Wall -Wextra -Werror'
    if grep -q '^[^#]*int main' "$base.code"; then
        kind=program
        { echo "$marker" && cat "$block"; } >"$base.c"
        if ! grep -q '^# *define TCPSERVER_IMPLEMENTATION' "$base.code"; then
            echo "a program without #define TCPSERVER_IMPLEMENTATION" >"$work/bad"
            return 1
        fi
        libraries=
        if grep -q '^# *define TSRV_TLS_OPENSSL' "$base.code"; then
            [ -n "$openssl" ] || return 0
            libraries='-lssl -lcrypto'
        fi
        # shellcheck disable=SC2086
        $CC $flags -I. "$base.c" -o "$base" $libraries >"$work/bad" 2>&1
        return
    fi
    # Names that a fragment defines for the reader only are not used.
    flags="$flags -Wno-unused-function -Wno-unused-variable -Wno-unused-parameter"
    flags="$flags -Wno-unused-but-set-variable"
    if awk -f "$work/scan.awk" "$base.code" | grep -q '^def ' ||
        ! grep -v '^ *#' "$base.code" | grep -q '[^ ]'; then
        kind=functions
        {
            grep -q '^# *include "tcpserver.h"' "$block" || echo '#include "tcpserver.h"'
            echo "$marker"
            cat "$block"
        } >"$base.c"
    else
        kind=statements
        {
            grep '^ *#' "$block"
            echo '#include "tcpserver.h"'
            echo '#include <stdio.h>'
            echo '#include <stdlib.h>'
            echo '#include <string.h>'
            echo 'extern tsrv_server *server;'
            echo 'extern tsrv_stream *stream;'
            echo 'extern tsrv_slice line;'
            echo 'extern int rc, fds[8], count;'
            echo 'int block(void);'
            echo 'int block(void)'
            echo '{'
            echo "$marker"
            sed 's/^ *#.*//' "$block"
            echo 'return 0;'
            echo '}'
        } >"$base.c"
    fi
    # shellcheck disable=SC2086
    $CC $flags -I. -c "$base.c" -o "$base.o" >"$work/bad" 2>&1
}

blocks=0
for block in "$doc"/readme_*.block "$doc"/manual_*.block; do
    [ -f "$block" ] || continue
    blocks=$((blocks + 1))
    kind=block
    if [ ! -s "$block" ]; then
        fail "doc: $(basename "$block" .block) is empty"
    elif doc_block "$block"; then
        ok "doc: $file line $line compiles ($kind)"
    else
        fail "doc: $file line $line does not compile ($kind)" "$work/bad"
    fi
done
if [ ! -f README.md ]; then
    skip "doc: no README.md"
elif [ ! -f "$doc/readme_1.block" ]; then
    fail "doc: README.md has no \`\`\`c block"
fi
[ -f "$doc/manual_1.block" ] || fail "doc: the manual has no program marked [compiles]"

# ---- what the manual builds of conditions is what tests/condition_test.c runs, whole

sed -n '/^ \* CONDITIONS/,/^ \* RULES/s/^ \*     //p' "$header" >"$work/conditions"
sed -n '/^typedef struct join/,$p' tests/conditions.h | grep . >"$work/conditions_tested"
if [ -s "$work/conditions" ] && diff "$work/conditions" "$work/conditions_tested" >"$work/conditions_diff"; then
    ok "doc: the manual's CONDITIONS are tests/conditions.h"
else
    fail "doc: the manual's CONDITIONS are tests/conditions.h" "$work/conditions_diff"
fi

# ---- README's first code block is the example that `make run` runs, whole

sed -n '/^```c$/,/^```$/p' README.md | sed '1d; /^```$/,$d' >"$work/readme_block"
sed -n '/^#define TCPSERVER_IMPLEMENTATION/,$p' examples/echo.c |
    sed 's|"../tcpserver.h"|"tcpserver.h"|' >"$work/echo_block"
if diff "$work/readme_block" "$work/echo_block" >"$work/readme_diff"; then
    ok "doc: README's first block is examples/echo.c"
else
    fail "doc: README's first block is examples/echo.c" "$work/readme_diff"
fi

# ---- examples: each opens with what it shows, and the programs with how to build and try them; README names them all

for file in examples/*.[ch]; do
    name=$(basename "$file")
    sed '/\*\//q' "$file" >"$work/opening"
    head -n 1 "$work/opening" | grep -q "^/\* $name - " || echo "$file: does not open with its name and what it shows"
    [ "$(wc -l <"$file")" -le 120 ] || echo "$file: more than 120 lines"
    case $name in
    *.c)
        grep -q "^ \*   cc .*-o ${name%.c} examples/$name" "$work/opening" || echo "$file: does not say how to build it"
        grep -q "^ \*   \./${name%.c} " "$work/opening" || echo "$file: does not say how to start it"
        grep -q 'then[:, ]' "$work/opening" || echo "$file: does not say how to try it"
        sed -n '/^## Examples/,/^## Seeing/p' README.md | grep -q "\`$name\`" || echo "$file: is not in README's index"
        ;;
    esac
done >"$work/examples"
verdict 'examples: opened, built, tried, in the index, no longer than 120 lines' "$work/examples"

echo "$passed passed, $failed failed, $skipped skipped"
[ "${CI:-}" = true ] && failed=$((failed + skipped))
[ "$failed" -eq 0 ]
