"""``kvferry config``: what builds in C and Go need to use the library of this package.

The package has the same files as `cmake --install` installs: the header, both libraries, a
pkg-config file and a CMake package.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from .. import _native

# The folder of the extension module: in an editable install the Python files are elsewhere.
PREFIX = Path(_native.__file__).parent


def cflags() -> list[str]:
    """Returns the options for the C compiler."""
    return [f"-I{PREFIX / 'include'}"]


def libs(*, static: bool = False) -> list[str]:
    """Returns the options for the linker.

    They include the folder as a run path, because no loader looks into a Python package.
    """
    folder = PREFIX / "lib"
    if static:
        return [str(folder / "libkvferry.a"), *_private_libs()]
    return [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lkvferry"]


def _private_libs() -> list[str]:
    """Returns the libraries that the static library needs, from the pkg-config file."""
    for line in (PREFIX / "lib/pkgconfig/kvferry.pc").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Libs.private":
            return shlex.split(value)
    return []


def cgo() -> list[str]:
    """Returns shell commands that add this library to cgo's environment, before `go build`.

    Go's kvferry package asks pkg-config; a package that includes kvferry.h itself needs the flags.
    """
    return [
        f"export PKG_CONFIG_PATH={shlex.quote(str(PREFIX / 'lib/pkgconfig'))}"
        '"${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"',
        # "-O2 -g" is what Go uses where the variable is not set.
        f'export CGO_CFLAGS="${{CGO_CFLAGS--O2 -g}} "{shlex.quote(shlex.join(cflags()))}',
        f'export CGO_LDFLAGS="${{CGO_LDFLAGS--O2 -g}} "{shlex.quote(shlex.join(libs()))}',
    ]
