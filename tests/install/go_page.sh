#!/bin/bash
# The program of docs/how-to/go.md, by the commands there, each group of them in an empty folder. `kvferry` is in PATH.
#     go_page.sh PAGE SOURCE
set -euo pipefail
page=$1 source=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

blocks() { # LANGUAGE: the blocks of the page's first part, each ended by a NUL
    sed -n '/^## Depend on the package today/,/^## Once/p' "$page" |
        awk -v begin="^\`\`\`$1\$" '/^```/ { if (inside) printf "%c", 0; inside = $0 ~ begin; next } inside'
}

groups=0
while IFS= read -r -d '' commands; do
    echo "-- $(basename "$page"): $(grep -o 'go mod edit\|go work' <<<"$commands")"
    mkdir "$work/program"
    blocks go | tr -d '\0' >"$work/program/main.go"
    (cd "$work/program" && bash -euo pipefail -c "${commands//\/path\/to\/kvferry/$source}") >"$work/log" 2>&1 ||
        { cat "$work/log"; exit 1; }
    grep '"devices".* <nil>$' "$work/log"
    rm -r "$work/program"
    groups=$((groups + 1))
done < <(blocks sh)
test $groups = 2
