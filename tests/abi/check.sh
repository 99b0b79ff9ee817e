#!/bin/bash
# Checks of the ABI. See docs/abi.md.
#     check.sh CHECK LIBRARY SOURCE CC CXX
# CHECK_planted runs the check on a broken input and fails if the check does not notice.
set -euo pipefail
check=$1 library=$2 source=$3 cc=$4 cxx=$5
here=$source/tests/abi
header=$source/include/kvferry.h
map=$source/cabi/kvferry.map
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

defined() { sed -n "s/^#define $1 \([0-9]*\)$/\1/p" "$2"; }
abi=$(defined KVF_ABI_VERSION "$header")
baseline=$here/kvferry-$abi.abi

# What the library exports is what the map lists, each name with its version. $1: map
symbols() {
    nm -D --defined-only --with-symbol-versions "$library" | awk '{print $3}' | LC_ALL=C sort >"$work/exported"
    awk '/^[A-Z].*{/ { version = $1; print version }
         /^ *kvf_[a-z0-9_]*;/ { sub(";", "", $1); print $1 "@@" version }' "$1" | LC_ALL=C sort >"$work/listed"
    # binutils print a version's own symbol as NAME or as NAME@@NAME.
    sed -i 's/^\(KVFERRY_[0-9.]*\)@@\1$/\1/' "$work/exported"
    test -s "$work/listed" && diff "$work/listed" "$work/exported"
}

symbols_planted() {
    grep -v kvf_regions_size "$map" >"$work/fewer.map"
    ! symbols "$work/fewer.map" >/dev/null || return 1
    sed 's/    kvf_version;/    kvf_version;\n    kvf_missing;/' "$map" >"$work/more.map"
    ! symbols "$work/more.map" >/dev/null || return 1
    sed 's/^KVFERRY_[0-9.]* {/KVFERRY_99 {/' "$map" >"$work/other.map"
    ! symbols "$work/other.map" >/dev/null
}

# The SONAME carries the ABI's number; neither CUDA nor llama.cpp is linked. $1: header
soname() {
    readelf --dynamic --wide "$library" >"$work/dynamic"
    grep -qF "Library soname: [libkvferry.so.$(defined KVF_ABI_VERSION "$1")]" "$work/dynamic" &&
        ! grep -E 'NEEDED.*(cuda|nvidia|llama|ggml)' "$work/dynamic"
}

soname_planted() {
    sed 's/^#define KVF_ABI_VERSION .*/#define KVF_ABI_VERSION 99/' "$header" >"$work/kvferry.h"
    ! soname "$work/kvferry.h"
}

# The program of the header's introduction. $1: header
quick_start() { sed -n '/^ \* Quick start$/,/^ \* Words$/s/^ \*     //p' "$1"; }

# The header alone, in every language that it promises, with all warnings as errors. $1: its folder
header() {
    local use='
#include <kvferry.h>
#include <kvferry.h>
kvf_engine_options engine_options = KVF_ENGINE_OPTIONS_INIT;
kvf_submit_options submit_options = KVF_SUBMIT_OPTIONS_INIT;
kvf_llama_options llama_options = KVF_LLAMA_OPTIONS_INIT;
int64_t forever = KVF_FOREVER;
void quick_start(struct llama_context *context);
void quick_start(struct llama_context *context) {
'"$(quick_start "$1/kvferry.h")"'
}'
    local warnings='-Wall -Wextra -Wpedantic -Werror -Wshadow -Wconversion -Wundef'
    echo "$use" >"$work/use.c" && cp "$work/use.c" "$work/use.cpp"
    local standard
    for standard in c11 c17; do
        $cc -std=$standard $warnings -Wstrict-prototypes -I "$1" -fsyntax-only "$work/use.c" || return 1
    done
    for standard in c++17 c++20; do
        $cxx -std=$standard $warnings -I "$1" -fsyntax-only "$work/use.cpp" || return 1
    done
}

header_planted() {
    local break
    for break in 'typedef struct kvf_empty {} kvf_empty;' 'void kvf_old();' 'typedef int class;' 'struct kvf_x y = {0}'; do
        sed "s/^KVF_API const char \*kvf_version/$break\n&/" "$header" >"$work/kvferry.h"
        ! header "$work" 2>/dev/null || { echo "not noticed: $break"; return 1; }
    done
    sed 's/^ \*     kvf_llama_attach(engine,/ *     kvf_llama_attach(/' "$header" >"$work/kvferry.h"
    ! header "$work" 2>/dev/null || { echo "not noticed: a quick start that does not compile"; return 1; }
}

# Comments of functions, enumerators, fields: each there, in one form. $1: header
form() { python3 "$here/header.py" form "$1"; }

form_planted() {
    local break
    for break in '0,/^ \* May block: no/{//d}' 's/^    KVF_ERR_BUSY = -7,.*/    KVF_ERR_BUSY = -7, KVF_ERR_CLOSED = -8,/' \
        's|^\(    KVF_ERR_BUSY = -7,\).*|\1|' 's|^    KVF_ERR_CLOSED.*|    KVF_ERR_BUSY = -8, /* twice */|' \
        's/^typedef enum kvf_priority {/enum {/' '/^    \/\* A value of kvf_priority\. \*\//d' \
        's/^ \*   4 Memory / *   4 Buffers /'; do
        sed "$break" "$header" >"$work/kvferry.h"
        ! cmp -s "$header" "$work/kvferry.h" || { echo "nothing to break: $break"; return 1; }
        ! form "$work/kvferry.h" >/dev/null || { echo "not noticed: $break"; return 1; }
    done
}

# Every number and offset stands in numbers.c, every function in the map, and none besides. $1: header
complete() { python3 "$here/header.py" complete "$1" "$here/numbers.c" "$map"; }

complete_planted() {
    local break
    for break in 's|^    KVF_ERR_BUSY = -7,.*|&\n    KVF_ERR_NEW = -99, /* new */|' \
        's|^    uint32_t copy_threads;|&\n    uint32_t more;|' 's/^KVF_API int32_t kvf_job_cancel(/KVF_API int32_t kvf_job_end(/'; do
        sed "$break" "$header" >"$work/kvferry.h"
        ! cmp -s "$header" "$work/kvferry.h" || { echo "nothing to break: $break"; return 1; }
        ! complete "$work/kvferry.h" >/dev/null || { echo "not noticed: $break"; return 1; }
    done
}

# Numbers and offsets that programs have compiled in. $1: folder of the header
numbers() { $cc -std=c11 -Wall -Werror -I "$1" -fsyntax-only "$here/numbers.c"; }

numbers_planted() {
    local break
    for break in 's/KVF_ERR_BUSY = -7,/KVF_ERR_BUSY = -70,/' 's/KVF_PRIORITY_URGENT = 1/KVF_PRIORITY_URGENT = 2/' \
        's/^    uint32_t devices;/    uint64_t devices;/' 's/^    char detail\[128\];/    char detail[64];/'; do
        sed "$break" "$header" >"$work/kvferry.h"
        ! cmp -s "$header" "$work/kvferry.h" || { echo "nothing to break: $break"; return 1; }
        ! numbers "$work" 2>/dev/null || { echo "not noticed: $break"; return 1; }
    done
}

need_abidiff() {
    command -v abidiff >/dev/null || { echo "skipped: no abidiff here (Debian: abigail-tools)"; exit 77; }
    readelf --sections --wide "$library" | grep -q ' \.debug_info' ||
        { echo "skipped: the library is built without debug information"; exit 77; }
}

# Types and functions against those of the last release. Functions may be added, and fields at the end of
# structs that say their size. $1: baseline
abidiff_() {
    abidiff --exported-interfaces-only --no-added-syms \
        --suppressions "$here/growing_structs.suppr" "$1" "$library"
}

abidiff_planted_() {
    local break
    for break in "s/kvf_regions_size/kvf_regions_sizes/" \
        "s/\(data-member access='public' layout-offset-in-bits='\)64\('>[^<]*<var-decl name='width'\)/\196\2/" \
        "s/\(<class-decl name='kvf_region' size-in-bits='\)384/\1320/" \
        "s/\(type-decl name='unsigned int' size-in-bits='\)32/\164/"; do
        # One line, so that a break may concern several.
        tr '\n' '\v' <"$baseline" | sed "$break" | tr '\v' '\n' >"$work/broken.abi"
        ! cmp -s "$baseline" "$work/broken.abi" || { echo "nothing to break: $break"; return 1; }
        ! abidiff_ "$work/broken.abi" >/dev/null || { echo "not noticed: $break"; return 1; }
    done
}

case $check in
symbols) symbols "$map" ;;
symbols_planted) symbols_planted ;;
soname) soname "$header" ;;
soname_planted) soname_planted ;;
header) header "$source/include" ;;
header_planted) header_planted ;;
form) form "$header" ;;
form_planted) form_planted ;;
complete) complete "$header" ;;
complete_planted) complete_planted ;;
numbers) numbers "$source/include" ;;
numbers_planted) numbers_planted ;;
abidiff) need_abidiff; abidiff_ "$baseline" ;;
abidiff_planted) need_abidiff; abidiff_planted_ ;;
baseline)
    need_abidiff
    abidw --exported-interfaces-only --headers-dir "$source/include" --drop-private-types \
        --no-comp-dir-path --no-corpus-path --no-elf-needed --no-show-locs --type-id-style hash \
        --out-file "$work/new.abi" "$library"
    sed "s|path='[^']*/cabi/|path='cabi/|" "$work/new.abi" >"$baseline"
    ;;
*) echo "no such check: $check"; exit 2 ;;
esac
