#!/bin/bash
# Builds programs from an installed tree, in every way that it offers, and runs them: by pkg-config and by CMake, with the
# shared and with the static library. The programs are program.c and, where a libllama with its headers is named,
# examples/c/sequences.c.
#     build_from.sh ROOT CMAKE CC
# KVFERRY_LLAMA_DEV: a folder with libllama.so and include/llama.h. KVFERRY_LLAMA_MODEL: a GGUF.
set -euo pipefail
root=$1 cmake=$2 cc=$3
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

lib=$(dirname "$(find "$root" -name 'libkvferry.so.*' | head -1)")
export PKG_CONFIG_PATH=$lib/pkgconfig
llama=${KVFERRY_LLAMA_DEV:-}
export LD_LIBRARY_PATH=$lib${llama:+:$llama}
flags="-std=c11 -D_POSIX_C_SOURCE=200809L -Wall -Wextra -Wpedantic -Werror"

# NAME PROGRAM shared|static [ARGUMENT...]: the program runs, and needs the shared library or not
check() {
    echo "-- $1"
    "$2" "${@:4}"
    local kind=static
    ! readelf --dynamic "$2" | grep -q 'NEEDED.*libkvferry' || kind=shared
    test "$kind" = "$3" || { echo "it is linked with the $kind library"; exit 1; }
}

pkg_config() { # shared|static [OPTION]
    $cc $flags $(pkg-config $2 --cflags kvferry) "$here/program.c" -o "$work/program_$1" $(pkg-config $2 --libs kvferry)
    check "pkg-config $2" "$work/program_$1" "$1"
    test -n "$llama" || return 0
    $cc $flags -I"$llama/include" $(pkg-config $2 --cflags kvferry) "$here/../../examples/c/sequences.c" \
        -o "$work/sequences_$1" -L"$llama" -lllama -lggml -Wl,--allow-shlib-undefined $(pkg-config $2 --libs kvferry)
    check "pkg-config $2, sequences.c" "$work/sequences_$1" "$1" "$KVFERRY_LLAMA_MODEL" "$llama"
}

pkg_config shared ""

configure() { # VERSION FOLDER
    "$cmake" -S "$here/project" -B "$work/$2" -DCMAKE_C_COMPILER="$cc" -Dkvferry_ROOT="$root" -Dwanted_version="$1" \
        -Dllama="$llama" >"$work/log" 2>&1
}
configure "$(pkg-config --modversion kvferry)" cmake || { cat "$work/log"; exit 1; }
"$cmake" --build "$work/cmake" >"$work/log" || { cat "$work/log"; exit 1; }
for kind in shared static; do
    check "find_package, $kind" "$work/cmake/program_$kind" $kind
    test -z "$llama" ||
        check "find_package, $kind, sequences.c" "$work/cmake/sequences_$kind" $kind "$KVFERRY_LLAMA_MODEL" "$llama"
done
! configure 99 newer || { echo "a version that this one does not serve is found"; exit 1; }

# Where there is no shared library, the linker takes the static one.
mkdir "$work/aside" && mv "$lib"/libkvferry.so* "$work/aside"
pkg_config static --static
mv "$work/aside"/* "$lib"
test -n "$llama" || echo "examples/c/sequences.c: skipped, KVFERRY_LLAMA_DEV names no libllama"
