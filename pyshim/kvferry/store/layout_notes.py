"""Notes in a folder of the caches for which something is kept there."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import xxhash

from .._bridge.block_list import BlocksAllowed
from .description import Description
from .disk import Disk

log = logging.getLogger("kvferry.store")

_MOST_BYTES = 64

MOST_LAYOUTS = 256
"""Caches of a model that are remembered: a search may have to try all."""


def layout_note(model: bytes, root: bytes, allowed: BlocksAllowed) -> tuple[Description, bytes]:
    """Returns the description and the bytes of a note that something is kept under a root."""
    data = allowed.value.encode()
    checksum = xxhash.xxh64_intdigest(data)
    return Description("layout", root, model, 0, 0, model, len(data), checksum), data


def allowed_of(disk: Disk, parts: Iterable[Description]) -> dict[bytes, BlocksAllowed]:
    """Returns what the notes among these parts say: what each root's cache allows. Blocks on the
    disk."""
    found: dict[bytes, BlocksAllowed] = {}
    for note in parts:
        if note.kind != "layout" or note.nbytes > _MOST_BYTES:
            continue
        if len(found) == MOST_LAYOUTS:
            break
        memory = bytearray(note.nbytes)
        try:
            if disk.read_into(note, memory):
                found[note.key] = BlocksAllowed(memory.decode())
        except (OSError, ValueError) as problem:
            log.warning("a note of a layout cannot be used: %s", problem)
    return found
