#!/bin/bash
# `pip install .` alone, in an empty virtual environment: the package works, and is enough for C and Go too. It has the same
# files as the wheel of the release, which was built from the source distribution.
#     by_pip.sh SOURCE PYTHON CMAKE CC WHEEL
set -euo pipefail
source=$1 python=$2 cmake=$3 cc=$4 wheel=$(realpath "$5")
here=$source/tests/install
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
unset PYTHONPATH PKG_CONFIG_PATH LD_LIBRARY_PATH KVFERRY_LLAMA_LIB

"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "$source"
cd "$work" # not where the sources are
PATH=$work/venv/bin:$PATH

echo "-- Python $(python -c 'import platform; print(platform.python_version())')"
python "$here/program.py"
kvferry --version
kvferry doctor >doctor || test $? = 1 # no libllama is here, or one of the system's
grep -q 'transfers.*GB/s' doctor
test -e "$(kvferry config --prefix)/py.typed"
diff <(python -m zipfile --list "$wheel" | sed -n 's|^\(kvferry/[^ ]*[^ /]\) .*|\1|p' | sort) \
    <(python -m pip show --files kvferry | sed -n '/__pycache__/d; s|^  kvferry/|kvferry/|p' | sort)

echo "-- kvferry config"
flags="-std=c11 -Wall -Wextra -Wpedantic -Werror"
$cc $flags $(kvferry config --cflags) "$here/program.c" -o shared $(kvferry config --libs)
./shared # finds the library without any setting
$cc $flags "$here/program.c" -o shared $(kvferry config --cflags --libs) && ./shared
$cc $flags $(kvferry config --cflags) "$here/program.c" -o static $(kvferry config --libs --static) && ./static
if ! readelf --dynamic shared | grep -q 'NEEDED.*libkvferry' || readelf --dynamic static | grep -q 'NEEDED.*libkvferry'; then
    echo "one is linked with the library of the other"
    exit 1
fi
"$here/build_from.sh" "$(kvferry config --prefix)" "$cmake" "$cc"

if ! command -v go >/dev/null; then
    echo "kvferry config --cgo: skipped, no Go installed"
    exit
fi
echo "-- kvferry config --cgo"
# As it comes to somebody else: what `make go-kvcache` leaves in the tree is not part of it.
package=tree/examples/go/kvferry
mkdir -p $package program
cp -r "$source"/examples/go/kvferry/. $package
find $package -name kvferry.pc -delete -o -name tree.hxx -delete
cp "$here/program.go" program/main.go
cd program
cat >go.mod <<MODULE
module program
go 1.22
require example.org/kvferry v0.0.0
replace example.org/kvferry => ../$package
MODULE
eval "$(kvferry config --cgo)"
export GOFLAGS=-mod=mod GOCACHE=$work/cache # Go would not notice that pkg-config answers otherwise than before
go build -o program . && ./program
readelf --dynamic program | grep -q "RUNPATH.*$(kvferry config --prefix)/lib"
GOFLAGS="" "$here/go_page.sh" "$source/docs/how-to/go.md" "$work/tree"
