"""Which parts a restore can find."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .._bridge.block_list import BlocksAllowed
from .description import Description


def loadable(
    parts: Iterable[Description], allowed: Mapping[bytes, BlocksAllowed]
) -> set[Description]:
    """Returns the blocks and checkpoints that are part of a prefix which can be loaded.

    A block is useless without the blocks before it. ``allowed`` says by root what a cache allows.
    For an unknown root, blocks count with and without a checkpoint behind them.
    """
    blocks: dict[bytes, Description] = {}
    checkpoints = []
    for part in parts:
        if part.kind == "block":
            blocks[part.key] = part
        elif part.kind == "checkpoint":
            checkpoints.append(part)
    whole: set[bytes] = set()  # keys of blocks that have all blocks before them
    for each in sorted(blocks.values(), key=lambda each: each.begin):
        if each.parent in whole or each.parent == each.root:
            whole.add(each.key)
    with_blocks = {block.root for block in blocks.values()}

    def stands_alone(checkpoint: Description) -> bool:
        if (kind := allowed.get(checkpoint.root)) is None:
            return checkpoint.root not in with_blocks
        return kind is BlocksAllowed.CHECKPOINTS_ALONE

    found = {each for each in checkpoints if each.key in whole or stands_alone(each)}
    ends = {each.key for each in found}
    ends.update(
        key for key in whole if allowed.get(blocks[key].root) is not BlocksAllowed.WITH_CHECKPOINTS
    )
    for key in ends:
        block = blocks.get(key)
        while block is not None and block not in found:
            found.add(block)
            block = blocks.get(block.parent)
    return found
