"""A conversation that is saved after each turn, as a whole state and in blocks."""

from __future__ import annotations

from dataclasses import dataclass

from ..workload import LOADED, ended, seconds
from .context import PreparedContext
from .moved import BLOCK_TOKENS

LATER_TURNS = 8
"""So many turns follow the history, each of the tokens of a block."""


@dataclass(frozen=True)
class Turn:
    """The saves after one turn."""

    tokens: int
    """The length of the conversation, with this turn."""
    state_bytes: int
    block_bytes: int
    """The bytes of the blocks that are new since the turn before."""
    state_ms: float
    """From the submitting call to the completion; likewise the next."""
    block_ms: float


async def hold_conversation(prepared: PreparedContext) -> list[Turn]:
    """Decodes turns of 256 tokens until the conversation has 2,048 more than the saved sequence.

    After each turn the whole state is saved, and the blocks that are new. The bytes are those of
    the completions. Uses sequence 2, which is empty afterwards.
    """
    llama, context = prepared.llama, prepared.context
    await llama.run(context.remove, LOADED)
    length = prepared.tokens + LATER_TURNS * BLOCK_TOKENS
    whole = await prepared.engine.allocate(await llama.block_size_async(length))
    block = await prepared.engine.allocate(await llama.block_size_async(BLOCK_TOKENS))
    turns: list[Turn] = []
    tokens = 0
    try:
        while tokens < length:
            new = min(BLOCK_TOKENS, length - tokens)
            await prepared.append(LOADED, [1 % context.model.vocabulary] * new)
            state = await llama.start_save(LOADED, into=whole, priority="urgent")
            (await state.wait()).close()  # the next save goes to the same memory
            blocks = await llama.start_save_blocks(
                LOADED, tokens, tokens + new, tokens=BLOCK_TOKENS, into=[block], priority="urgent"
            )
            for saved in await blocks.wait():
                saved.close()  # likewise
            tokens += new
            by_state, by_blocks = ended(state), ended(blocks)
            turns.append(
                Turn(
                    tokens,
                    by_state.bytes,
                    by_blocks.bytes,
                    seconds(by_state) * 1e3,
                    seconds(by_blocks) * 1e3,
                )
            )
    finally:
        await llama.run(context.remove, LOADED)
    return turns
