"""Two contexts with the same history: one for kvferry, the other for llama.cpp's own calls.

States can be compared only if they are made alike. A state contains the id of its sequence, in the
header and in every cell of an attention cache, and without `kv_unified` its stream. And the same
state in other cells gives other logits, because sums are taken in another order. Sequences that are
decoded, edited and loaded in the same order in two equal contexts are in the same cells, so that no
byte may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kvferry
import numpy as np

from support.devices import DEVICES
from support.llama_reference import CacheType, Context, Model

MakeContext = Callable[..., Context]

CACHES: dict[str, dict[str, Any]] = {
    "flash": {},
    "transposed": {"flash_attention": False},
    "streams": {"kv_unified": False, "n_ctx": 2048},
    "transposed-streams": {"flash_attention": False, "kv_unified": False, "n_ctx": 2048},
    "f32": {"type_k": CacheType.F32, "type_v": CacheType.F32},
    "q8_0": {"type_k": CacheType.Q8_0, "type_v": CacheType.Q8_0},
    "q4_0": {"type_k": CacheType.Q4_0, "type_v": CacheType.Q4_0},
    "q8_0-keys-transposed": {"flash_attention": False, "type_k": CacheType.Q8_0},
}
"""The ways in which llama.cpp lays out a cache, as changes of `ContextOptions`."""

LATENT = {"deepseek2", "deepseek32", "deepseek4"}
"""Kinds whose cache has only keys. b10361 requires one type for keys and values there."""

OPAQUE = {"deepseek4", "qwen4exp", "qwen4exp-ngrams"}
"""Kinds whose states are in formats that kvferry does not know."""

RECURRENT = {"mamba", "hybrid", "hybrid-iswa", *OPAQUE}
"""Kinds with a recurrent cell, or something like it: no part of their sequences can be removed."""

ENVELOPE = 64
"""Bytes that kvferry appends to an opaque state."""


def make_prompted(make_context: MakeContext, source: str | Model, **options: Any) -> Context:
    """Returns a context whose sequences 0 and 1 have 20 tokens each."""
    context = make_context(source, **options)
    context.decode_in_turn([0, 1], 20)
    return context


def by_llama_cpp(llama: kvferry.Llama, snapshot: kvferry.Snapshot) -> bytes:
    """Returns what llama.cpp's own call saves: the state without the envelope of opaque states."""
    saved = snapshot.to_bytes()
    return saved[:-ENVELOPE] if llama.describe()["guarded_by"] == "envelope" else saved


async def assert_moved_as_by_llama_cpp(
    ours: Context, like: Context, source: int, target: int
) -> None:
    """Saves `source` and loads it into `target`, in `ours` by kvferry, in `like` by llama.cpp."""
    state = like.state_get(source)
    assert ours.state_get(source) == state
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(ours.address)
        snapshot = await llama.save(source)
        assert llama.size(source) == snapshot.nbytes
        assert by_llama_cpp(llama, snapshot) == state

        assert like.state_set(target, state) == len(state)
        loaded = like.state_get(target)
        await llama.load(snapshot, target)
        assert by_llama_cpp(llama, await llama.save(target)) == loaded
    assert ours.state_get(target) == loaded
    for seq in (target, source):
        assert np.array_equal(ours.decode(seq, [7]), like.decode(seq, [7]))
