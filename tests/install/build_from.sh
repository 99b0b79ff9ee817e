#!/bin/bash
# Builds programs from an installed tree, in every way that it offers, and runs them: by pkg-config and by CMake, with the
# shared and with the static library; by pkg-config with clang too, where it is installed. The programs are program.c and,
# where a libllama with its headers is named, those of examples/c.
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

# PROGRAM shared|static: the program needs the shared library or not
check_linked() {
    local kind=static
    ! readelf --dynamic "$1" | grep -q 'NEEDED.*libkvferry' || kind=shared
    test "$kind" = "$2" || { echo "$1 is linked with the $kind library"; exit 1; }
}

# NAME PREFIX shared|static: the programs PREFIXprogram_KIND, and so on, run
check() {
    echo "-- $1"
    "$2program_$3"
    check_linked "$2program_$3" "$3"
    test -n "$llama" || return 0
    "$2sequences_$3" "$KVFERRY_LLAMA_MODEL" "$llama"
    check_linked "$2sequences_$3" "$3"
    "$2blocks_$3" "$KVFERRY_LLAMA_MODEL" "$llama"
    check_linked "$2blocks_$3" "$3"
    "$here/conversation.sh" "$2conversation_$3" "$KVFERRY_LLAMA_MODEL" "$llama"
    check_linked "$2conversation_$3" "$3"
}

compilers=("$cc")
! command -v clang >/dev/null || compilers+=(clang)

pkg_config() { # shared|static [OPTION] PACKAGE: what pkg-config says is all that the linker is told
    local kind=$1 compiler example
    shift
    for compiler in "${compilers[@]}"; do
        $compiler $flags $(pkg-config --cflags "$@") "$here/program.c" -o "$work/program_$kind" $(pkg-config --libs "$@")
        for example in ${llama:+sequences conversation blocks}; do
            $compiler $flags -I"$llama/include" $(pkg-config --cflags "$@") "$here/../../examples/c/$example.c" \
                -o "$work/${example}_$kind" -L"$llama" -lllama -lggml -Wl,--allow-shlib-undefined $(pkg-config --libs "$@")
        done
        check "$compiler, pkg-config $*" "$work/" "$kind"
    done
}

pkg_config shared kvferry
pkg_config static kvferry-static

configure() { # VERSION FOLDER
    "$cmake" -S "$here/project" -B "$work/$2" -DCMAKE_C_COMPILER="$cc" -Dkvferry_ROOT="$root" -Dwanted_version="$1" \
        -Dllama="$llama" >"$work/log" 2>&1
}
configure "$(pkg-config --modversion kvferry)" cmake || { cat "$work/log"; exit 1; }
"$cmake" --build "$work/cmake" >"$work/log" || { cat "$work/log"; exit 1; }
for kind in shared static; do
    check "find_package, $kind" "$work/cmake/" $kind
done
! configure 99 newer || { echo "a version that this one does not serve is found"; exit 1; }

# Where there is no shared library, the linker takes the static one.
mkdir "$work/aside" && mv "$lib"/libkvferry.so* "$work/aside"
pkg_config static --static kvferry
mv "$work/aside"/* "$lib"
test -n "$llama" || echo "examples/c: skipped, KVFERRY_LLAMA_DEV names no libllama"
