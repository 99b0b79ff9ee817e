"""Pins in a folder: notes that no process evicts what a conversation needs.

A pin is a part of kind "pin" without bytes. Its key is that of the conversation's last block or
checkpoint. ``Index.pinned`` follows the chain from there.
"""

from __future__ import annotations

import dataclasses

import xxhash

from .disk import Disk

_NOTHING = xxhash.xxh64_intdigest(b"")


def pin(disk: Disk, key: bytes) -> bool:
    """Pins what is kept under a key, and all before it, also where it is lost and kept again.

    Returns False if nothing is kept under the key, or the limit leaves no room for the note. Raises
    OSError.
    """
    end = disk.find("block", key) or disk.find("checkpoint", key)
    if end is None:
        return False
    note = dataclasses.replace(
        end, kind="pin", parent=key, begin=end.end, nbytes=0, checksum=_NOTHING
    )
    return disk.write(note, b"")


def unpin(disk: Disk, key: bytes) -> bool:
    """Returns whether there was a pin. Raises OSError."""
    return disk.remove("pin", key)
