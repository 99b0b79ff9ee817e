"""Hostile objects in a bucket: `python remote_hostile.py 100000` for a long run."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
import resource
from functools import partial

import anyio
import xxhash
from disk_parts import make_part
from hostile_files import mutate
from kvferry.store.part_format import header_of, name_of
from kvferry.store.remote import Remote
from support.faulty_objects import FaultyObjects

_PARTS = 4
_MEMORY = 2 << 30
"""Bytes of address space that a long run has."""


async def run(count: int, seed: int) -> int:
    """Reads ``count`` objects that somebody has changed. Returns how many were loaded."""
    chance = random.Random(seed)
    parts = [make_part(number, 300) for number in range(_PARTS)]
    right = [header_of(part) + data for part, data in parts]
    loads = 0
    for number in range(count):
        if number % 100 == 0:  # another process, which has put no object aside
            objects = FaultyObjects()
            remote = Remote(objects)
        which = chance.randrange(_PARTS)
        part, _ = parts[which]
        kind = chance.choice(["block", "block", "ends"])
        content = mutate(right[which], right[(which + 1) % _PARTS], chance)
        objects.objects[name_of(kind, part.key)] = content
        remote._unusable.clear()
        if kind == "ends":
            note = await remote.note(kind, part.key)
            assert note is None or note == content[-len(note) :]
            continue
        await remote.sizes([(part.kind, part.key)])
        memory = bytearray(part.nbytes)
        asked = dataclasses.replace(part, checksum=0)
        found = await remote.read_into(asked, memoryview(memory))
        if found is not None:
            assert dataclasses.replace(found, checksum=0) == asked
            assert xxhash.xxh64_intdigest(memory) == found.checksum
            loads += 1
    return loads


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    logging.disable()  # a line for each object
    loads = anyio.run(partial(run, given.count, given.seed))
    print(f"{given.count} objects, {loads} loads that a checksum covers")


if __name__ == "__main__":
    main()
