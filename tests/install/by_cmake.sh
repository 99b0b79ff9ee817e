#!/bin/bash
# Installs into an empty folder, moves it, and builds programs from there.
#     by_cmake.sh CMAKE BUILD CC
set -euo pipefail
cmake=$1 build=$2 cc=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$cmake" --install "$build" --prefix "$work/first" >"$work/log"
mv "$work/first" "$work/moved"
root=$work/moved
lib=$(dirname "$(find "$root" -name libkvferry.so)")

for file in include/kvferry.h "${lib#"$root"/}"/{libkvferry.so,libkvferry.a,pkgconfig/kvferry.pc,pkgconfig/kvferry-static.pc} \
    "${lib#"$root"/}"/cmake/kvferry/kvferry-{config,config-version,targets}.cmake; do
    test -e "$root/$file" || { echo "not installed: $file"; exit 1; }
done
! grep -rl --include='*.pc' --include='*.cmake' "$work/first" "$root" ||
    { echo "names the folder that it was installed into first"; exit 1; }
"$(dirname "$0")/build_from.sh" "$root" "$cmake" "$cc"
