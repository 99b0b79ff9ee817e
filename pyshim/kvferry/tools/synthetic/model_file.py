"""A GGUF file with random numbers in it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


class ModelFile:
    """A GGUF file that is being put together, and the random numbers for its tensors."""

    def __init__(self, gguf: ModuleType, path: Path, architecture: str, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._gguf: Any = gguf
        # The module is imported late, only where a model is written, and so has no type here.
        self.keys: Any = gguf.GGUFWriter(path, architecture)
        self.keys.add_name(f"synthetic-{architecture}")
        self.keys.add_tokenizer_model("none")

    def wide_numbers(self, key: str, values: list[int]) -> None:
        """An array of 64 bits each; the writer's own arrays have 32."""
        types = self._gguf.GGUFValueType
        self.keys.add_key_value(key, values, types.ARRAY, sub_type=types.UINT64)

    def matrix(self, name: str, *shape: int) -> None:
        """Random F16 weights, the contracted dimension last: activations keep their magnitude."""
        values = self._random.standard_normal(shape, dtype=np.float32)
        self.keys.add_tensor(name, (values / shape[-1] ** 0.5).astype(np.float16))

    def uniform(self, name: str, low: float, high: float, *shape: int) -> None:
        """Random F32 numbers between two bounds, for what llama.cpp wants in F32."""
        values = self._random.uniform(low, high, shape)
        self.keys.add_tensor(name, values.astype(np.float32))

    def constant(self, name: str, row: list[float], rows: int) -> None:
        """The same F32 row again and again."""
        self.keys.add_tensor(name, np.tile(np.array(row, np.float32), (rows, 1)))

    def norm(self, name: str, width: int) -> None:
        self.keys.add_tensor(name, np.ones(width, np.float32))

    def write(self) -> None:
        self.keys.write_header_to_file()
        self.keys.write_kv_data_to_file()
        self.keys.write_tensors_to_file(progress=False)
        self.keys.close()
