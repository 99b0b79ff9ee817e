"""Writes synthetic models."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from .geometry import GEOMETRIES, Geometry
from .kinds import KINDS
from .layers import describe_ends
from .model_file import ModelFile


def write_model(
    kind: str,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    geometry: str | Geometry = "small",
    **sizes: int,
) -> Path:
    """Writes a model of `kind` to `path` and returns the path.

    `geometry` is one of `GEOMETRIES` or a `Geometry`; `sizes` replace single fields of it. The same
    arguments give the same file. Another `seed` gives other weights in the same layout: states of
    one model fit the other, but are wrong there.

    Raises ValueError for an unknown kind, geometry or size, and ImportError without the gguf
    package.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of model {kind!r}; there are {', '.join(KINDS)}")
    chosen = _geometry(geometry, sizes)
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "writing a synthetic model needs the gguf package: pip install gguf"
        ) from error

    architecture, describe = KINDS[kind]
    path = Path(path)
    # Written under another name and renamed, so that an interrupted run leaves no partial model.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        model = ModelFile(gguf, partial, architecture, seed)
        describe_ends(model, chosen)
        describe(model, chosen)
        model.write()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _geometry(geometry: str | Geometry, sizes: dict[str, int]) -> Geometry:
    """Returns the geometry with `sizes` in place of its own. Raises ValueError."""
    if isinstance(geometry, str):
        if geometry not in GEOMETRIES:
            raise ValueError(f"unknown geometry {geometry!r}; there are {', '.join(GEOMETRIES)}")
        geometry = GEOMETRIES[geometry]
    unknown = sizes.keys() - {field.name for field in dataclasses.fields(Geometry)}
    if unknown:
        raise ValueError(f"unknown sizes: {', '.join(sorted(unknown))}")
    return dataclasses.replace(geometry, **sizes)
