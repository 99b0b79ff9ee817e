"""The models that the demonstration and the benchmarks run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import Devices
from .extra_packages import install_command
from .libllama import Libllama, LlamaError
from .synthetic import write_model
from .table import Progress


def synthetic_model(folder: Path, kind: str, sizes: Mapping[str, int], progress: Progress) -> Path:
    """Writes a synthetic model into a folder, unless the same model is there already.

    ``sizes`` are those that differ from the geometry "demo". Raises LlamaError where the gguf
    package is missing.
    """
    name = "-".join([kind, *(f"{key}{value}" for key, value in sizes.items())])
    path = folder / f"{name}.gguf"
    if not path.exists():
        progress.say(f"writing a synthetic model ({name})")
        try:
            write_model(kind, path, geometry="demo", **sizes)
        except ImportError:
            raise LlamaError(
                "writing a synthetic model needs the gguf package: "
                f"{install_command(libllama=False)}; or name a model with --model FILE"
            ) from None
    return path


def on_gpu(description: dict[str, Any], device: Devices, library: Libllama) -> bool:
    """Whether models go to a GPU: the engine has one, and so has libllama, or the user says so.

    ``description`` is the engine's, ``device`` the user's choice.
    """
    cuda = any(each["kind"] == "cuda" for each in description["devices"])
    return cuda and (device == "cuda" or library.offloads)
