#!/bin/bash
# Prints the Pythons that a wheel is tested with, one a line: its version, and its program or "none" where this machine has none.
# They are looked for in PATH, and where pyenv, uv and the images of manylinux have them.
#     pythons.sh
shopt -s nullglob
for version in 3.10 3.11 3.12 3.13; do
    found=none
    for candidate in "$(command -v "python$version")" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python \
        "${XDG_DATA_HOME:-$HOME/.local/share}/uv/python/cpython-$version".*/bin/python "/opt/python/cp${version/./}-cp${version/./}/bin/python"; do
        # A shim of pyenv's may lead to no Python, and Debian's is without ensurepip unless asked.
        if "$candidate" -c "import ensurepip, sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
            found=$candidate
            break
        fi
    done
    echo "$version $found"
done
