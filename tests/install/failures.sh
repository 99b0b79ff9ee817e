#!/bin/bash
# examples/c/conversation.c under AddressSanitizer with each of its calls failing in turn: it says what failed, ends with
# status 1, and has freed everything.
#     failures.sh CC SOURCE LIBRARY
# KVFERRY_LLAMA_DEV, KVFERRY_LLAMA_MODEL: as for build_from.sh
set -euo pipefail
cc=$1 source=$2 lib=$(dirname "$3")
llama=${KVFERRY_LLAMA_DEV:-}
test -n "$llama" || { echo "skipped: KVFERRY_LLAMA_DEV names no libllama"; exit 77; }
here=$source/tests/install
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export LD_LIBRARY_PATH=$lib:$llama
export ASAN_OPTIONS=exitcode=23:detect_leaks=1

build() { # PROGRAM SOURCE
    $cc -std=c11 -D_POSIX_C_SOURCE=200809L -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all \
        -I"$source/include" -I"$llama/include" -include "$here/planted_failures.h" \
        "$2" -o "$work/$1" \
        -L"$lib" -lkvferry -L"$llama" -lllama -lggml -Wl,--allow-shlib-undefined
}

# save|load PROGRAM: runs it; the output is in $work/output
run() { "$work/$2" "$1" "$KVFERRY_LLAMA_MODEL" "$llama" "$work/state" >"$work/output" 2>&1; }

# save|load PROGRAM: fails with status 1 at every call that can fail, then succeeds
fail_at_each_call() {
    local n status
    for ((n = 1; ; ++n)); do
        status=0
        test "$1" = load || rm -f "$work/state"
        FAIL_AT=$n run "$1" "$2" || status=$?
        test $status != 0 || break
        if test $status != 1 || ! grep -q '^conversation: ' "$work/output" ||
            { test "$1" = save && test -e "$work/state" && ! grep -q '^saved' "$work/output"; }; then
            echo "$1, call $n: status $status"
            cat "$work/output"
            return 1
        fi
    done
    echo "$1: $((n - 1)) calls that can fail"
    test "$n" -gt 9
}

build conversation "$source/examples/c/conversation.c"
fail_at_each_call save conversation
fail_at_each_call load conversation
rm "$work/state"
status=0
SMALL_BUFFER=1 run save conversation || status=$?
test $status = 1 && grep -q 'kvf_llama_save: the buffer is too small: .* bytes are needed' "$work/output" ||
    { echo "with too small a buffer: status $status"; cat "$work/output"; exit 1; }

# A program that frees less than it has taken is noticed.
forgets() { # STATUS CALL: without the call, the program ends with the status
    grep -v "^ *$2" "$source/examples/c/conversation.c" >"$work/forgetful.c"
    build forgetful "$work/forgetful.c"
    status=0
    run save forgetful || status=$?
    test $status = "$1" || { echo "without $2: status $status, not $1"; cat "$work/output"; exit 1; }
}
forgets 3 kvf_buffer_free
forgets 23 llama_batch_free
