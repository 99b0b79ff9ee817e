#!/bin/bash
# examples/c/conversation.c does what it says, and tells what is wrong with a file.
#     conversation.sh PROGRAM MODEL LLAMA
set -euo pipefail
program=$1 model=$2 llama=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# FILE TEXT: a load of the file fails, and says so
refused() {
    local status=0
    "$program" load "$model" "$llama" "$1" >/dev/null 2>"$work/error" || status=$?
    test $status = 1 && grep -q "$2" "$work/error" ||
        { echo "$1: status $status, not 1, or no '$2':"; cat "$work/error"; exit 1; }
}

"$program" save "$model" "$llama" "$work/state" >"$work/saved"
"$program" load "$model" "$llama" "$work/state" >"$work/loaded"
grep '^next token' "$work/saved"
diff <(grep '^next token' "$work/saved") <(grep '^next token' "$work/loaded") ||
    { echo "the conversation goes on otherwise than before"; exit 1; }

refused "$work/missing" "No such file"
: >"$work/empty" && refused "$work/empty" "no state"
head -c -100 "$work/state" >"$work/cut" && refused "$work/cut" "truncated or its structure is damaged"
printf 'XXXX' | dd of="$work/state" conv=notrunc status=none && refused "$work/state" "damaged"
