"""A KV cache of PyTorch tensors: one conversation leaves the device, and comes back in another row.

In the root of kvferry:

    pip install . torch
    python examples/python/pytorch_cache.py

Without PyTorch the same runs with NumPy arrays, since kvferry takes any array that has the buffer
protocol, `__cuda_array_interface__` or `__dlpack__`.
"""

from __future__ import annotations

import math
from typing import Any

import anyio
import kvferry
import numpy

try:
    import torch
except ImportError:
    torch = None

LAYERS, ROWS, HEADS, LENGTH, WIDTH = 4, 3, 2, 128, 32
TOKENS = 100  # of the conversation; the cache has room for LENGTH

ON_CUDA = torch is not None and torch.cuda.is_available()


def new_tensor() -> Any:
    """Keys or values of a layer: one row for each conversation that is on the device."""
    shape = (ROWS, HEADS, LENGTH, WIDTH)
    if torch is None:
        return numpy.zeros(shape, numpy.float16)
    return torch.zeros(shape, dtype=torch.float16, device="cuda" if ON_CUDA else "cpu")


def fill(tensor: Any, row: int, seed: int) -> None:
    """Stands for a model that has computed the keys or values of TOKENS tokens."""
    values = numpy.random.default_rng(seed).standard_normal((HEADS, TOKENS, WIDTH))
    values = values.astype(numpy.float16)
    tensor[row, :, :TOKENS] = values if torch is None else torch.from_numpy(values)


def attend(keys: Any, values: Any, row: int) -> list[float]:
    """The attention of one query in the first head: it shows whether the cache is as it was."""
    k, v = to_numpy(keys[row, 0, :TOKENS]), to_numpy(values[row, 0, :TOKENS])
    scores = k @ numpy.ones(WIDTH, numpy.float32) / math.sqrt(WIDTH)
    weights = numpy.exp(scores - scores.max())
    return list(weights / weights.sum() @ v)


def to_numpy(tensor: Any) -> numpy.ndarray[Any, Any]:
    array: numpy.ndarray[Any, Any] = tensor if torch is None else tensor.cpu().numpy()
    return array.astype(numpy.float32)


def used_part(cache: list[tuple[Any, Any]], row: int) -> list[Any]:
    """The tensors that hold a conversation: views with strides, no copies.

    kvferry copies each contiguous run of memory, here TOKENS x WIDTH numbers of each head. In the
    buffer the tensors lie one after the other, without gaps.
    """
    parts = [tensor[row, :, :TOKENS] for layer in cache for tensor in layer]
    if torch is None or ON_CUDA:
        return parts
    # On the CPU, NumPy's view of the same memory says that it may be written. Before version 1 of
    # DLPack a tensor cannot say that, and kvferry then refuses to load into it.
    return [part.numpy() for part in parts]


def current_stream() -> int | None:
    """A transfer has to follow the stream that works on the tensors; PyTorch does not name it."""
    return torch.cuda.current_stream().cuda_stream if ON_CUDA else None


async def main() -> None:
    cache = [(new_tensor(), new_tensor()) for _ in range(LAYERS)]
    for index, (keys, values) in enumerate(cache):
        fill(keys, 0, 2 * index)
        fill(values, 0, 2 * index + 1)
    before = [attend(keys, values, 0) for keys, values in cache]

    async with kvferry.Engine() as engine:
        where = "NumPy" if torch is None else f"PyTorch on {cache[0][0].device}"
        # The transfer begins when the stream has done what was queued before; other streams, and
        # other tasks of this event loop, go on meanwhile. The buffer is pinned host memory.
        saved = await engine.copy_out(used_part(cache, 0), after_stream=current_stream())
        print(f"saved {2 * LAYERS} tensors of {where}: {saved.nbytes} bytes")

        for keys, values in cache:  # somebody else has the row now
            keys[0], values[0] = 0, 0

        await engine.copy_in(
            used_part(cache, 2), saved, priority="urgent", after_stream=current_stream()
        )
    after = [attend(keys, values, 2) for keys, values in cache]
    print("loaded into another row:", "the same attention" if after == before else "it DIFFERS")


if __name__ == "__main__":
    anyio.run(main)
