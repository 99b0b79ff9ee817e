#!/bin/bash
# Installs into an empty folder, moves it, and builds a little C program from there: by pkg-config, by
# pkg-config statically, by CMake with the shared and with the static library.
#     check.sh CMAKE BUILD CC
set -euo pipefail
cmake=$1 build=$2 cc=$3
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$cmake" --install "$build" --prefix "$work/first" >"$work/log"
mv "$work/first" "$work/moved"
root=$work/moved
lib=$(dirname "$(find "$root" -name libkvferry.so)")
export PKG_CONFIG_PATH=$lib/pkgconfig

for file in include/kvferry.h "${lib#"$root"/}"/{libkvferry.so,libkvferry.a,pkgconfig/kvferry.pc} \
    "${lib#"$root"/}"/cmake/kvferry/kvferry-{config,config-version,targets}.cmake; do
    test -e "$root/$file" || { echo "not installed: $file"; exit 1; }
done
# No description names the folder that it was installed into first.
! grep -rl --include='*.pc' --include='*.cmake' "$work/first" "$root"

flags="-std=c11 -Wall -Wextra -Wpedantic -Werror"
run() { # NAME PROGRAM: and whether it needs the shared library
    echo "-- $1"
    LD_LIBRARY_PATH=$lib "$2"
    if readelf --dynamic "$2" | grep -q 'NEEDED.*libkvferry'; then echo shared; else echo static; fi
}
expect() { test "$(run "$1" "$2" | tail -1)" = "$3" || { run "$1" "$2"; echo "wanted: $3"; exit 1; }; }

$cc $flags $(pkg-config --cflags kvferry) "$here/program.c" -o "$work/shared" $(pkg-config --libs kvferry)
expect "pkg-config" "$work/shared" shared

"$cmake" -S "$here/project" -B "$work/cmake" -DCMAKE_C_COMPILER="$cc" -Dkvferry_ROOT="$root" \
    -Dwanted_version="$(pkg-config --modversion kvferry)" >"$work/log" ||
    { cat "$work/log"; exit 1; }
"$cmake" --build "$work/cmake" >"$work/log" || { cat "$work/log"; exit 1; }
expect "find_package, kvferry::kvferry" "$work/cmake/program_shared" shared
expect "find_package, kvferry::static" "$work/cmake/program_static" static
# A version that this one does not serve is not found.
! "$cmake" -S "$here/project" -B "$work/newer" -DCMAKE_C_COMPILER="$cc" -Dkvferry_ROOT="$root" \
    -Dwanted_version=99 >"$work/log" 2>&1

# Where there is no shared library, the linker takes the static one.
rm "$lib"/libkvferry.so*
$cc $flags $(pkg-config --static --cflags kvferry) "$here/program.c" -o "$work/static" \
    $(pkg-config --static --libs kvferry)
expect "pkg-config --static" "$work/static" static
