"""Where the libllama is that the command line uses."""

from __future__ import annotations

import ctypes.util
import dataclasses
import importlib.util
import os
from pathlib import Path

from .errors import LlamaError

ENVIRONMENT_VARIABLE = "KVFERRY_LLAMA_LIB"


@dataclasses.dataclass(frozen=True)
class Found:
    """A libllama that has not been loaded yet."""

    path: str
    """Of the library; a bare name if the system's loader is to find it."""
    source: str
    """Who named it, for people."""


def find(folder: str | os.PathLike[str] | None = None) -> Found:
    """The libllama in ``folder``; else in $KVFERRY_LLAMA_LIB; of llama-cpp-python; of xllamacpp;
    the system's.

    Raises LlamaError with all the places that were looked at.
    """
    if folder is not None:
        return Found(_in_folder(Path(folder)), "--llama-lib")
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Found(_in_folder(Path(named)), ENVIRONMENT_VARIABLE)
    if (package := _package_folder("llama_cpp")) is not None:
        try:
            return Found(_in_folder(package / "lib"), "installed llama_cpp")
        except LlamaError:
            pass  # one without libraries of its own; others may have some
    if (package := _package_folder("xllamacpp")) is not None:
        # Its extension module has all of llama.cpp in it, and exports that.
        for path in sorted(package.glob("xllamacpp.*so")):
            return Found(str(path), "installed xllamacpp")
    if name := ctypes.util.find_library("llama"):
        return Found(name, "the system's libraries")
    raise LlamaError(
        "no libllama found: name its folder with --llama-lib DIR or "
        f"{ENVIRONMENT_VARIABLE}, or get a prebuilt one: pip install xllamacpp"
    )


def _package_folder(name: str) -> Path | None:
    # Not imported: importing it would load its libllama, and it may be broken.
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
