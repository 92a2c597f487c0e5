#!/bin/sh
# What README.md, tests/bench/README.md, and the comments of tcpserver.h and of the examples say: links, files, names,
# targets of make, how an example is built, spelling. That README's and the manual's C compiles is checked by
# tests/check_header.sh, and README's other blocks are run by tests/packages.sh.
# Needs codespell, and OpenSSL's and libpq's headers; what is missing is a failure with CI=true. Nothing is looked up
# elsewhere. BUILD, CC.
set -u
cd "$(dirname "$0")/.." || exit 1
build=${BUILD:-build}/docs CC=${CC:-cc}
pages='README.md tests/bench/README.md tests/bench/results/table.md'
passed=0 failed=0 skipped=0
rm -rf "$build"
mkdir -p "$build" || exit 1

# verdict TEXT FILE: it is good if the file is empty; else the file says what is bad.
verdict() {
    if [ -s "$2" ]; then
        failed=$((failed + 1))
        echo "FAIL $1"
        head -n 20 "$2" | sed 's/^/    /'
    else
        passed=$((passed + 1))
        echo "$1"
    fi
}

# skip TEXT: a tool is missing.
skip() {
    echo "SKIP $1"
    if [ "${CI:-}" = true ]; then failed=$((failed + 1)); else skipped=$((skipped + 1)); fi
}

# What a page consists of, with the line where it is; text in code is no link.
#   heading <line> <anchor>          as GitHub makes it
#   link <line> <target>
#   block <line> <language>
#   code <line> <anchor of the section> <text of a code span or of an indented line>
cat >"$build/page.awk" <<'TEXT'
function anchor(text,   name) {
    text = tolower(text)
    gsub(/\]\([^)]*\)/, "", text)
    gsub(/[^a-z0-9_ -]/, "", text)
    gsub(/ /, "-", text)
    name = text in seen ? text "-" seen[text] : text
    seen[text]++
    return name
}
/^```/ { block = !block; if (block) print "block", NR, substr($0, 4); next }
block { next }
/^#+ / { sub(/^#+ +/, ""); here = anchor($0); print "heading", NR, here }
/^    / { print "code", NR, here, substr($0, 5); next }
{
    while (match($0, /`[^`]*`/)) {
        print "code", NR, here, substr($0, RSTART + 1, RLENGTH - 2)
        $0 = substr($0, 1, RSTART - 1) substr($0, RSTART + RLENGTH)
    }
    while (match($0, /\]\([^)]*\)/)) {
        print "link", NR, substr($0, RSTART + 2, RLENGTH - 3)
        $0 = substr($0, RSTART + RLENGTH)
    }
}
END { if (block) print "block", NR, "that is not closed" }
TEXT

for page in $pages; do
    awk -f "$build/page.awk" "$page" | sed "s|^|$page |"
done >"$build/facts"

# facts KIND: <page> <line> <what is there> of all pages.
facts() { awk -v kind="$1" '$2 == kind { $2 = ""; print }' "$build/facts" | tr -s ' '; }

# counted FILE WHAT: how many; none is an error of this script.
counted() {
    count=$(wc -l <"$1" | tr -d ' ')
    [ "$count" -gt 0 ] || echo "no $2 was found" >>"$build/bad"
}

# ---- links

has_anchor() { grep -q "^$1 heading [0-9]* $2\$" "$build/facts"; }

facts link >"$build/links"
while read -r page line target; do
    folder=$(dirname "$page")
    file=${target%%#*} anchor=
    [ "$file" = "$target" ] || anchor=${target#*#}
    case $target in
    http://* | https://*) continue ;;
    '#'*) file=$page ;;
    *) file=$folder/$file ;;
    esac
    [ -e "$file" ] || echo "$page:$line: no file: $target"
    [ -z "$anchor" ] || has_anchor "${file#./}" "$anchor" || echo "$page:$line: no heading: $target"
done <"$build/links" >"$build/bad"
counted "$build/links" links
verdict "links: $count, each to a file or a heading that exists" "$build/bad"

# ---- pictures: a program has made them, and can again

cut -d ' ' -f 2- "$build/links" | grep -E '\.(svg|png)$' >"$build/pictures"
while read -r line target; do
    name=$(basename "$target")
    # report.py has no suffix in it
    grep -qE "(\"${name%.*}\"|/$name)" tests/*.py tests/bench/*.py || echo "README.md:$line: no program makes $target"
done <"$build/pictures" >"$build/bad"
counted "$build/pictures" pictures
verdict "pictures: $count, each made by a program" "$build/bad"

# ---- figures: those of README's table are those that `make bench` has written

grep -n '^| `[a-z0-9]*` | *[0-9]' README.md >"$build/figures"
while IFS=: read -r line row; do
    grep -qxF -e "$row" tests/bench/results/table.md || echo "README.md:$line: not in table.md: $row"
done <"$build/figures" >"$build/bad"
counted "$build/figures" figures
verdict "figures: $count rows, as in tests/bench/results/table.md" "$build/bad"

# ---- blocks

facts block >"$build/blocks"
while read -r page line language; do
    case "$page $language" in
    'README.md c' | 'README.md sh' | 'README.md cmake' | 'README.md meson') ;;
    *) echo "$page:$line: no test looks at a block of this kind: $language" ;;
    esac
done <"$build/blocks" >"$build/bad"
counted "$build/blocks" blocks
verdict "blocks: $count, each in a language that is compiled or run" "$build/bad"

# ---- files that are named

texts="README.md tests/bench/README.md tcpserver.h $(echo examples/*.[ch] examples/*.cfg examples/*.yaml)"
# shellcheck disable=SC2086
grep -noE '(^|[^A-Za-z0-9_./-])(examples|tests|\.ci|\.cmake|\.meson)/[A-Za-z0-9_./*-]*' $texts |
    sed 's/^\([^:]*\):\([0-9]*\):[^.a-z]*/\1 \2 /; s/[.-]*$//' >"$build/files"
# Those without a folder.
facts code | awk '{ page = $1; line = $2
    for (i = 4; i <= NF; i++) if ($i ~ /^[a-z_]+\.(c|h|sh|py|cfg|yaml|json|md|svg)$/) print page, line, $i
}' >>"$build/files"
while read -r page line file; do
    for place in . examples tests tests/bench tests/bench/results; do
        # shellcheck disable=SC2086 # a pattern
        ls -d $place/$file >/dev/null 2>&1 && continue 2
    done
    echo "$page:$line: no such file: $file"
done <"$build/files" >"$build/bad"
counted "$build/files" files
verdict "files: $count are named, and exist" "$build/bad"

facts code | sed -n 's/^README.md .* //p' >"$build/spans"
for file in examples/*.c examples/*.cfg examples/*.yaml; do
    grep -qx -e "$file" -e "$(basename "$file")" "$build/spans" || echo "README.md does not name $file"
done >"$build/bad"
verdict 'files: README names every example' "$build/bad"

# ---- targets of make

{
    facts code | sed -n 's/^\([^ ]* [0-9]*\) [^ ]* make /\1 /p'
    grep -n '^ \*   make ' examples/*.[ch] tcpserver.h | sed 's/:/ /; s/: \*   make / /; s/  .*//'
} | awk '{
    for (i = 3; i <= NF && $i ~ /^([a-z-]+|[A-Z]+=.*)$/; i++) if ($i !~ /=/) print $1, $2, $i
}' >"$build/targets"
while read -r page line target; do
    grep -q "^$target:" Makefile || echo "$page:$line: no target of make: $target"
done <"$build/targets" >"$build/bad"
counted "$build/targets" 'targets of make'
verdict "make: $count targets are named, and exist" "$build/bad"

# ---- the line at the top of each example by which it is built

has_header() { echo "#include <$1>" | $CC -I/usr/include/postgresql -E - >/dev/null 2>&1; }

# built FILE: by its own line, but into the folder of this test, and without optimisation.
built() {
    line=$(sed -n 's/^ \*   \(cc .*\)/\1/p' "$1" | sed 's/  .*//')
    case $line in
    '') echo "no line begins with cc" && return 1 ;;
    *-lssl*) has_header openssl/ssl.h || { skip "builds: $1: no openssl/ssl.h" && return 2; } ;;
    *-lpq*) has_header libpq-fe.h || { skip "builds: $1: no libpq-fe.h" && return 2; } ;;
    esac
    sh -c "$(echo "$line" | sed "s|^cc |$CC |; s| -O2 | |; s| -o | -o $build/|")" && [ -x "$build/$(basename "$1" .c)" ]
}

for file in examples/*.c; do
    built "$file" >"$build/output" 2>&1
    case $? in
    0) : >"$build/bad" ;;
    2) cat "$build/output" && continue ;;
    *) { echo "$line" && cat "$build/output"; } >"$build/bad" ;;
    esac
    verdict "builds: $file by the line at its top" "$build/bad"
done

# ---- names of the library

awk '{
    while (1) {
        if (comment) {
            if (!(at = index($0, "*/"))) next
            $0 = substr($0, at + 2)
            comment = 0
        }
        if (!(at = index($0, "/*"))) break
        print substr($0, 1, at - 1)
        $0 = substr($0, at + 2)
        comment = 1
    }
    print
}' tcpserver.h | grep -oE '[A-Za-z_][A-Za-z0-9_]*' | sort -u >"$build/identifiers"

# exist: of lines <page> <line> <name>, those whose name is nowhere in the code, to `bad`.
exist() {
    awk 'NR == FNR { known[$1]; next } !($3 in known) { print $1 ":" $2 ": no such name: " $3 }' \
        "$build/identifiers" "$1" >"$build/bad"
    cut -d ' ' -f 3 "$1" | sort -u >"$build/different"
    counted "$build/different" names
}

# A beginning, as in TSRV_E... or tsrv_*, is no name.
# shellcheck disable=SC2086
grep -noE '(^|[^A-Za-z0-9_])(tsrvi?|TSRVI?)_[A-Za-z0-9_]*(\.\.\.|\*)?' $texts |
    sed '/[_.*]$/d; s/^\([^:]*\):\([0-9]*\):[^A-Za-z]*/\1 \2 /' >"$build/names"
exist "$build/names"
verdict "names: $count of tsrv_ and TSRV_ in texts are in the code" "$build/bad"

# Options and the like. In README's table of Tornado they are Tornado's.
facts code | awk '$3 != "from-tornado-to-c" && NF == 4 && $4 ~ /^([a-z]+\.)?[a-z]+(_[a-z]+)+$/ {
    sub(/.*\./, "", $4)
    print $1, $2, $4
}' >"$build/names"
exist "$build/names"
verdict "names: $count of options in texts are in the code" "$build/bad"

# ---- spelling

if ! command -v codespell >/dev/null; then
    skip 'spelling: no codespell'
else
    # "ond" is what follows "sec", in a test.
    codespell --check-hidden --ignore-words-list ond,nd,alue --skip '*.svg,*.png,*.json,./tests/fuzz/found' \
        README.md Makefile tcpserver.h examples tests .ci .cmake .meson .pkgconfig >"$build/bad" 2>&1
    verdict 'spelling' "$build/bad"
fi

echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
