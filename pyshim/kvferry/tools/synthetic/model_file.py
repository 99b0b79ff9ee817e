"""A GGUF file with random weights."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


class ModelFile:
    """Collects the keys and the random tensors of a GGUF file, and writes it."""

    def __init__(self, gguf: ModuleType, path: Path, architecture: str, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._gguf: Any = gguf
        # gguf is imported only when a model is written, so that its types are not known here.
        self.keys: Any = gguf.GGUFWriter(path, architecture)
        self.keys.add_name(f"synthetic-{architecture}")
        self.keys.add_tokenizer_model("none")

    def wide_numbers(self, key: str, values: list[int]) -> None:
        """Adds an array of 64-bit numbers; the writer's own arrays have 32 bits."""
        types = self._gguf.GGUFValueType
        self.keys.add_key_value(key, values, types.ARRAY, sub_type=types.UINT64)

    def matrix(self, name: str, *shape: int) -> None:
        """Adds random F16 weights, scaled so that activations keep their magnitude.

        The last dimension is the one that is contracted.
        """
        values = self._random.standard_normal(shape, dtype=np.float32)
        self.keys.add_tensor(name, (values / shape[-1] ** 0.5).astype(np.float16))

    def uniform(self, name: str, low: float, high: float, *shape: int) -> None:
        """Adds random F32 numbers between two bounds, for tensors that must be F32."""
        values = self._random.uniform(low, high, shape)
        self.keys.add_tensor(name, values.astype(np.float32))

    def constant(self, name: str, row: list[float], rows: int) -> None:
        """Adds a tensor of equal F32 rows."""
        self.keys.add_tensor(name, np.tile(np.array(row, np.float32), (rows, 1)))

    def norm(self, name: str, width: int) -> None:
        self.keys.add_tensor(name, np.ones(width, np.float32))

    def write(self) -> None:
        self.keys.write_header_to_file()
        self.keys.write_kv_data_to_file()
        self.keys.write_tensors_to_file(progress=False)
        self.keys.close()
