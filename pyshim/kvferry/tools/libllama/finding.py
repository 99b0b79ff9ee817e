"""Finds the libllama that the command line uses."""

from __future__ import annotations

import ctypes.util
import dataclasses
import importlib.util
import os
from pathlib import Path

from ..extra_packages import LIBLLAMA, install_command
from .errors import LlamaError

ENVIRONMENT_VARIABLE = "KVFERRY_LLAMA_LIB"


@dataclasses.dataclass(frozen=True)
class Found:
    """A libllama that has not been loaded yet."""

    path: str
    """The path of the library, or a bare name for the system's loader."""
    source: str
    """Where it was found, for people."""


def find(folder: str | os.PathLike[str] | None = None) -> Found:
    """Returns the libllama in ``folder``. Without a folder, returns the first one that is found: in
    $KVFERRY_LLAMA_LIB, in llama-cpp-python, in xllamacpp, in the system.

    Raises LlamaError if there is none.
    """
    if folder is not None:
        return Found(_in_folder(Path(folder)), "--llama-lib")
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Found(_in_folder(Path(named)), ENVIRONMENT_VARIABLE)
    if (package := _package_folder("llama_cpp")) is not None:
        try:
            return Found(_in_folder(package / "lib"), "installed llama_cpp")
        except LlamaError:
            pass  # this llama-cpp-python has no libraries; look further
    if (package := _package_folder(LIBLLAMA)) is not None:
        # Its extension module contains all of llama.cpp, and exports its functions.
        for path in sorted(package.glob(f"{LIBLLAMA}.*so")):
            return Found(str(path), f"installed {LIBLLAMA}")
    if name := ctypes.util.find_library("llama"):
        return Found(name, "the system's libraries")
    raise LlamaError(
        "no libllama found: name its folder with --llama-lib DIR or "
        f"{ENVIRONMENT_VARIABLE}, or get a prebuilt one, and what `kvferry demo` needs besides: "
        f"{install_command(libllama=True)}"
    )


def _package_folder(name: str) -> Path | None:
    # The package is not imported: that would load its libllama, which may be broken.
    package = importlib.util.find_spec(name)
    return Path(package.origin).parent if package is not None and package.origin else None


def _in_folder(folder: Path) -> str:
    if not folder.is_dir():
        raise LlamaError(f"{folder} is not a folder")
    candidates = [folder / "libllama.so", *sorted(folder.glob("libllama.*so*"))]
    for path in candidates:
        if path.exists():
            return str(path.absolute())
    raise LlamaError(f"no libllama.so in {folder}")
