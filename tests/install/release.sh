#!/bin/bash
# The files of a release. The source distribution has the files of the repository that building needs, and no other; pip builds
# it in an empty environment, with tools that pip itself fetches. The wheel works in an empty environment of every Python that
# it is for. So does the demo, after the one command that it takes.
#     release.sh DIST SOURCE PYTHON
set -euo pipefail
dist=$(cd "$1" && pwd)
source=$(cd "$2" && pwd) python=$(command -v "$3")
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV PKG_CONFIG_PATH LD_LIBRARY_PATH KVFERRY_LLAMA_LIB
sdist=$(echo "$dist"/kvferry-*.tar.gz) wheel=$(echo "$dist"/kvferry-*.whl)

echo "-- $(basename "$sdist")"
diff <(tar -tzf "$sdist" | cut -d/ -f2 | sort -u) - <<'NAMES'
CMakeLists.txt
LICENSE
PKG-INFO
README.md
cabi
include
pyproject.toml
pyshim
NAMES
! tar -tzf "$sdist" | grep -E '\.(pyc|so|o)$'
# Of these, every file that git knows or would take, and nothing that lies beside them in a working tree.
in_repository() {
    git -C "$source" ls-files --cached --others --exclude-standard -- \
        CMakeLists.txt LICENSE README.md cabi include pyproject.toml pyshim |
        while read -r name; do ! test -e "$source/$name" || echo "$name"; done
}
diff <(tar -tzf "$sdist" | grep -v '/$' | cut -d/ -f2- | sort) <({ in_repository && echo PKG-INFO; } | sort)

make_empty() { # PYTHON: a virtual environment with nothing in it, and a HOME
    rm -rf "$work/venv" "$work/home"
    mkdir "$work/home"
    "$1" -m venv "$work/venv"
}
install() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
in_empty() { # COMMAND...: with no environment but the virtual one
    (cd "$work/home" && env -i HOME="$work/home" PATH="$work/venv/bin:/usr/bin:/bin" "$@")
}
check_installed() { # the package works in the empty environment
    in_empty python -m pip --disable-pip-version-check check
    in_empty python "$here/program.py"
    in_empty kvferry --version
    in_empty kvferry doctor >"$work/log" || test $? = 1 # no libllama is here, or one of the system's
    grep -q 'transfers.*GB/s' "$work/log"
}
run_demo() {
    in_empty kvferry demo --tokens 16 >"$work/log" 2>&1 || { cat "$work/log"; return 1; }
    grep '^\[.*libllama:' "$work/log"
    test -s "$work/home/kvferry-demo.png"
}

# A build finds no CMake and no Ninja of the virtual environment that runs this, so that pip has to fetch them.
outside_of_environments() { # COMMAND...
    local path= folder
    local IFS=:
    for folder in $PATH; do
        test -e "$folder/activate" || path+=${path:+:}$folder
    done
    unset IFS
    PATH=$path "$@"
}

echo "-- pip builds $(basename "$sdist")"
make_empty "$python"
outside_of_environments install "$sdist"
check_installed

pythons=() skipped=()
while read -r version python; do
    if [ "$python" = none ]; then
        skipped+=("$version")
        continue
    fi
    pythons+=("$python")
    echo "-- $(basename "$wheel"), Python $version ($python)"
    make_empty "$python"
    install --only-binary :all: "$wheel"
    check_installed
done < <("$here/pythons.sh")
test ${#pythons[@]} -gt 0 || { echo "no Python that kvferry is for is on this machine"; exit 1; }

# The last Python's environment has kvferry alone.
echo "-- kvferry demo names a command, and works after it"
! in_empty kvferry demo --tokens 16 2>"$work/log" || { echo "the demo works without its packages"; exit 1; }
cat "$work/log"
command=$(grep -o 'pip install [a-z ]*[a-z]' "$work/log")
install ${command#pip install}
run_demo

echo "-- kvferry[demo]"
make_empty "${pythons[0]}"
install --only-binary :all: "$wheel[demo]"
run_demo

for version in "${skipped[@]}"; do
    echo "**** NOT TESTED: the wheel on Python $version, which is not on this machine ****" >&2
done
