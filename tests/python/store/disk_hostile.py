"""Mutated files in a folder: `python disk_hostile.py 100000` for a long run."""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
from pathlib import Path

from disk_parts import GENEROUS, file_of, make_part
from kvferry.store.disk import Disk


def mutate(right: bytes, chance: random.Random) -> bytes:
    data = bytearray(right)
    how = chance.randrange(5)
    if how == 0:
        del data[chance.randrange(len(data)) :]
    elif how == 1:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == 2:  # a field of the header, enormous
        place = 8 * chance.randrange(30)
        data[place : place + 8] = b"\xff" * 8
    elif how == 3:
        begin, length = chance.randrange(len(data)), chance.randrange(1, 64)
        data[begin : begin + length] = chance.randbytes(length)
    else:
        data += chance.randbytes(chance.randrange(1, 64))
    return bytes(data)


def run(folder: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    disk = Disk(folder, GENEROUS)
    part, data = make_part(1, 300)
    memory = bytearray(part.nbytes)
    disk.write(part, data)
    right = file_of(folder, part).read_bytes()
    for number in range(count):
        mutated = mutate(right, chance)
        file_of(folder, part).write_bytes(mutated)
        if disk.read_into(part, memory):
            assert mutated == right
            assert memory == data
        if number % 500 == 499:  # names too, and many files at once
            for _ in range(50):
                name = os.path.basename(file_of(folder, make_part(chance.randrange(9))[0]))
                (folder / "parts" / name[chance.randrange(3) :]).write_bytes(mutate(right, chance))
            disk.close()
            disk = Disk(folder, GENEROUS)
            disk.verify()
            for found in disk.list():
                assert found == part
    disk.close()


if __name__ == "__main__":
    logging.disable()  # a line for each file
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder) / "store", int(sys.argv[1]), seed=1)
