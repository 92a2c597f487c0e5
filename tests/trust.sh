#!/bin/sh
# The scoreboard: what speaks for tcpserver.h, in figures, as a table for README. Fails when a figure is missing, or
# has fallen below the least that tests/trust.txt gives for it.
#   tests/trust.sh       environment: BUILD; READ=yes only reads what is there
# A figure is a file build/trust/NAME.txt of one line, which begins with the figure: "98.25 % of ..." or "150000 ...".
# The tools write it. One that is not there, or is older than the header, is made by its command in tests/trust.txt; a
# command that writes none, but ends well with "N passed, 0 failed, ...", stands there with that line.
set -u

cd "$(dirname "$0")/.." || exit 2
export BUILD="${BUILD:-build}"
trust=$BUILD/trust
mkdir -p "$trust" || exit 2
tab=$(printf '\t') bad=0

echo "| | $(date -u +%Y-%m-%d) | at least | made by |"
echo '|---|---|---|---|'
while IFS=$tab read -r name least title command; do
    case $name in '' | \#*) continue ;; esac
    file=$trust/$name.txt
    if [ "${READ:-}" != yes ] && { [ ! -s "$file" ] || [ -n "$(find tcpserver.h -newer "$file")" ]; }; then
        rm -f "$file"
        if sh -c "$command" >"$trust/$name.log" 2>&1 </dev/null && [ ! -s "$file" ]; then
            tail -n 1 "$trust/$name.log" | grep -E '^[0-9]+ passed, 0 failed, ' >"$file"
        fi
    fi
    text='not measured' figure=0
    [ ! -s "$file" ] || read -r text <"$file"
    figure=$(echo "$text" | sed 's/[^0-9.].*//')
    if ! awk "BEGIN { exit !(\"$figure\" != \"\" && ${figure:-0} >= $least) }"; then
        text="**$text**"
        bad=$((bad + 1))
    fi
    # shellcheck disable=SC2016
    printf '| %s | %s | %s | `%s` |\n' "$title" "$text" "$least" "$command"
done <tests/trust.txt
[ $bad -eq 0 ] || echo "$bad of the figures are below the least, or missing: see $trust/"
[ $bad -eq 0 ]
