"""What the save after a turn of a conversation moves, in blocks."""

from __future__ import annotations

import statistics
from typing import Any

from ... import Engine, Llama
from ..workload import SAVED, ended, seconds
from .script import REPEATS

_SHARE = 16
"""A turn is this part of the prompt: its last tokens."""


async def save_turn(engine: Engine, llama: Llama, tokens: int) -> dict[str, Any]:
    """Saves the last tokens of sequence 0, whose length is ``tokens``, in one block.

    Where the cache needs a checkpoint, that is saved too; where checkpoints stand alone, only that.
    Returns figures, which are None where the cache allows neither.
    """
    allowed, _ = await llama.blocks_allowed_async()
    turn = max(1, tokens // _SHARE)
    begin = tokens - turn
    if not allowed.blocks and not allowed.checkpoints:
        return {
            "turn_tokens": turn,
            "turn_bytes": None,
            "turn_ms": None,
            "turn_checkpoint": False,
        }
    block = checkpoint = None
    if allowed.blocks:
        block = await engine.allocate(await llama.block_size_async(turn))
    if allowed.checkpoints:
        checkpoint = await engine.allocate(await llama.checkpoint_size_async(SAVED))
    times: list[float] = []
    for _ in range(REPEATS + 1):
        completions = []
        if block is not None:
            blocks = await llama.start_save_blocks(
                SAVED, begin, tokens, tokens=turn, into=[block], priority="urgent"
            )
            for saved in await blocks.wait():
                saved.close()  # the next save goes to the same memory
            completions.append(ended(blocks))
        if checkpoint is not None:
            rest = await llama.start_save_checkpoint(SAVED, into=checkpoint, priority="urgent")
            (await rest.wait()).close()  # likewise
            completions.append(ended(rest))
        times.append(sum(seconds(each) for each in completions) * 1e3)
    return {
        "turn_tokens": turn,
        "turn_bytes": sum(each.bytes for each in completions),
        "turn_ms": statistics.median(times[1:]),  # the first touches the memory
        "turn_checkpoint": checkpoint is not None,
    }
