"""Which libllama this process has, and what differs between builds of llama.cpp."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def _library_folder() -> Path:
    """Returns LLAMA_CPP_LIB_PATH, else the folder in llama-cpp-python's own package."""
    if named := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(named)
    package = importlib.util.find_spec("llama_cpp")  # not imported: its prototypes may not fit
    if package is None or package.origin is None:
        raise ImportError("no libllama: LLAMA_CPP_LIB_PATH is not set, nor llama_cpp installed")
    return Path(package.origin).parent / "lib"


LIBRARY_FOLDER = _library_folder()
"""The folder of this process's libllama and its backends."""

BUILD = (
    os.environ.get("KVFERRY_LLAMA_BUILD") or (LIBRARY_FOLDER / "libllama.so").resolve().parent.name
)
"""The Makefile's name for the build. A library that the Makefile has not fetched, such as one for
CUDA, needs KVFERRY_LLAMA_BUILD: what a build cannot do is known by this name."""

UNFRAMED = BUILD in {"b8179", "b8390"}
"""Whether states are those of builds before b9842: they do not begin with a magic number and a
sequence, and contain the cells that a sliding window has masked."""

NAMES_ROWS = BUILD not in {"b8179", "b8390", "b9842", "b10068", "b10361", "v0.4.0"}
"""Whether the graphs of this build have a name for the numbers of the rows that they write."""

_UNFIT = {
    "deepseek32": ("b8179", "b8390"),
    # b9842 has the architecture, but its llama_memory_seq_rm() of one sequence, even an empty one,
    # changes the states of the others.
    "deepseek4": ("b8179", "b8390", "b9842"),
    "qwen4exp": ("b8179", "b8390", "b9842", "b10068", "b10361"),
    "qwen4exp-ngrams": ("b8179", "b8390", "b9842", "b10068", "b10361"),
}
"""The builds that do not have the architecture of a kind, or cannot be compared with."""


def fits(kind: str) -> bool:
    """Whether tests can use a kind of synthetic model with this libllama."""
    return BUILD not in _UNFIT.get(kind, ())


def load_keeps_others(kind: str) -> bool:
    """Whether llama.cpp's own load of one sequence leaves the states of the others as they were."""
    return (kind, BUILD) != ("deepseek4", "b10361")


def model_sizes(kind: str) -> dict[str, int]:
    """Returns the sizes that a small synthetic model must have for this libllama."""
    if kind == "gemma3" and BUILD == "b8179":
        # There every sixth layer is global, whatever the model says, and llama_decode aborts if
        # there is no such layer.
        return {"layers": 6}
    return {}
