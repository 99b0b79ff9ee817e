"""``kvferry config``: what builds in C and Go need to use the library that this package carries.

The package holds what `cmake --install` installs too: the header, both libraries, a pkg-config
file and a CMake package.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from .. import _native

# Of the package as installed, and so of the extension module: for an editable install the Python
# files are elsewhere.
PREFIX = Path(_native.__file__).parent


def cflags() -> list[str]:
    """For the compiler."""
    return [f"-I{PREFIX / 'include'}"]


def libs(*, static: bool = False) -> list[str]:
    """For the linker. No loader looks into a Python package, so the program is told where to."""
    folder = PREFIX / "lib"
    if static:
        return [str(folder / "libkvferry.a"), *_private_libs()]
    return [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lkvferry"]


def _private_libs() -> list[str]:
    """What the static library needs beside it: the pkg-config file says."""
    for line in (PREFIX / "lib/pkgconfig/kvferry.pc").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Libs.private":
            return shlex.split(value)
    return []


def cgo() -> list[str]:
    """For the shell, ahead of `go build`: what adds this library to cgo's environment.

    Go's kvferry package asks pkg-config; a package that includes kvferry.h itself reads the flags.
    """
    return [
        f"export PKG_CONFIG_PATH={shlex.quote(str(PREFIX / 'lib/pkgconfig'))}"
        '"${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"',
        # What Go itself would take where nothing is set.
        f'export CGO_CFLAGS="${{CGO_CFLAGS--O2 -g}} "{shlex.quote(shlex.join(cflags()))}',
        f'export CGO_LDFLAGS="${{CGO_LDFLAGS--O2 -g}} "{shlex.quote(shlex.join(libs()))}',
    ]
