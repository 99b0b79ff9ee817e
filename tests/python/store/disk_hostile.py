"""Hostile files and indexes in a folder: `python disk_hostile.py 100000` for a long run."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import random
import resource
import sqlite3
import tempfile
from pathlib import Path

import pytest
import xxhash
from disk_parts import GENEROUS, file_of, make_part
from hostile_files import plant, remove
from kvferry.store.description import Description
from kvferry.store.disk import Disk
from kvferry.store.part_format import HEADER_BYTES, Newer, parse_header

PARTS = 4
_REOPENED = 100
"""Files after which the folder is opened again, with other names too."""
_MEMORY = 2 << 30
"""Bytes of address space that a long run has."""


def loaded(disk: Disk, part: Description) -> bool:
    """Reads a part as a store does. What is read must be what its checksum covers."""
    if part.nbytes > GENEROUS:  # no store has a buffer for it
        return False
    memory = bytearray(part.nbytes)
    if not disk.read_into(part, memory):
        return False
    assert xxhash.xxh64_intdigest(memory) == part.checksum
    return True


class HostileFolder:
    """A folder of some parts, of which somebody replaces the files and the index."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._chance = random.Random(seed)
        self._parts = [make_part(number, 300) for number in range(PARTS)]
        self._outside = folder.parent / "outside"
        self.disk = Disk(folder, GENEROUS)
        for part, data in self._parts:
            self.disk.write(part, data)
        self._right = [file_of(folder, part).read_bytes() for part, _ in self._parts]
        self._outside.write_bytes(self._right[0])
        self.loads = self.files = self.indexes = 0

    def close(self) -> None:
        self.disk.close()

    def replace_a_file(self) -> None:
        number = self._chance.randrange(PARTS)
        part, _ = self._parts[number]
        path, other = file_of(self._folder, part), self._right[(number + 1) % PARTS]
        may_be_read = plant(path, self._right[number], other, self._outside, self._chance)
        found = self.disk.find(part.kind, part.key)
        for each in {part, found or part}:
            if loaded(self.disk, each):
                assert may_be_read
                self.loads += 1
        self.files += 1

    def open_again(self) -> None:
        self.disk.close()
        remove(self._folder / "quarantine")  # else it is counted each time
        for _ in range(8):
            self._plant_a_name()
        self.disk = Disk(self._folder, GENEROUS)
        self.check()
        self._write_again()

    def _write_again(self) -> None:
        for part, data in self._parts:
            if not self.disk.write(part, data):
                with pytest.raises(Newer):  # left alone
                    parse_header(file_of(self._folder, part).read_bytes()[:HEADER_BYTES])
                file_of(self._folder, part).unlink()
                assert self.disk.write(part, data)
            assert loaded(self.disk, part)

    def _plant_a_name(self) -> None:
        chance, names = (
            self._chance,
            [os.path.basename(file_of(self._folder, part)) for part, _ in self._parts],
        )
        name = chance.choice(names)[chance.randrange(3) :]
        name = chance.choice(
            [name, name + "x", name.upper(), "0" * 255, "a\nb", "\udcff", ".", "*"]
        )
        where = chance.choice(["parts", "parts", "aside", "quarantine", "."])
        if name == ".":
            return
        with contextlib.suppress(OSError):  # such as names that are too long
            plant(self._folder / where / name, *self._right[:2], self._outside, chance)

    def check(self) -> None:
        """What the folder says is there is covered by its checksum, or is not loaded."""
        for found in itertools.islice(self.disk.list(), 1000):
            self.loads += loaded(self.disk, found)
        self.disk.verify()
        self.disk.stats()
        for found in itertools.islice(self.disk.list(), 1000):
            assert self.disk.find(found.kind, found.key) == found
            self.disk.children(found.parent)
        assert self._outside.read_bytes() == self._right[0]

    def replace_the_index(self) -> None:
        """Somebody changes the index while nobody has it open, or leaves an old log beside it."""
        index = self._folder / "index.sqlite"
        chance = self._chance
        logs = {}
        for suffix in ("-wal", "-shm"):
            path = Path(f"{index}{suffix}")
            if path.exists() and path.stat().st_size < 16 << 20:
                logs[path] = path.read_bytes()
        self.disk.close()
        if chance.random() < 0.5:
            with (
                contextlib.suppress(sqlite3.Error),
                contextlib.closing(sqlite3.connect(index)) as sql,
            ):
                sql.executescript(_statement(chance))
        else:
            for path, content in logs.items():
                path.write_bytes(content)
            path = chance.choice([index, *logs])
            if chance.random() < 0.15:
                plant(path, self._right[0], self._right[1], self._outside, chance)
            elif path.exists() and path.stat().st_size < 16 << 20:
                path.write_bytes(_damaged(path.read_bytes(), chance))
        self.disk = Disk(self._folder, GENEROUS)
        self.check()
        self._write_again()
        self.indexes += 1


def _damaged(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    if not data or chance.random() < 0.2:
        return bytes(data[: chance.randrange(len(data) + 1)])
    for _ in range(chance.choice([1, 1, 3, 30])):
        # Often in what SQLite keeps at the beginning of a page.
        begin = chance.randrange(len(data))
        if chance.random() < 0.5:
            begin = begin // 4096 * 4096 + chance.randrange(120)
        length = chance.choice([1, 2, 4, 64])
        data[begin : begin + length] = chance.choice(
            [bytes(length), b"\xff" * length, chance.randbytes(length)]
        )
    return bytes(data)


def _statement(chance: random.Random) -> str:
    columns = ["kind", "key", "parent", "begin", "end", "root", "nbytes", "checksum"]
    columns += ["allocated", "used"]
    value = chance.choice(
        [
            "0",
            "-1",
            "1 << 62",
            "-9223372036854775808",
            "9223372036854775807",
            "0.5",
            "1e308",
            "'block'",
            "''",
            "x''",
            "x'00'",
            "zeroblob(32)",
            "zeroblob(1 << 20)",
            "randomblob(32)",
            "CAST(x'ff' AS TEXT)",
        ]
    )
    column = chance.choice(columns)
    return chance.choice(
        [f"UPDATE OR REPLACE part SET {column} = {value} WHERE random() % 2;"] * 6
        + [f"UPDATE total SET allocated = {value};"] * 2
        + [
            "DELETE FROM total;",
            "DELETE FROM part;",
            "INSERT INTO total VALUES (1);",
            "DROP TABLE total;",
            "DROP TABLE part;",
            "DROP TRIGGER part_added;",
            "DROP INDEX part_parent;",
            "PRAGMA user_version = 0;",
            "PRAGMA user_version = 7;",
            "PRAGMA journal_mode = DELETE;",
            "PRAGMA page_size = 512; PRAGMA journal_mode = DELETE; VACUUM;",
            "PRAGMA application_id = 7; PRAGMA journal_mode = OFF;",
            "CREATE TRIGGER more AFTER INSERT ON part BEGIN DELETE FROM part; END;",
            "DROP TABLE total; CREATE VIEW total AS WITH RECURSIVE n(allocated) AS"
            " (SELECT 1 UNION ALL SELECT allocated + 1 FROM n)"
            " SELECT sum(allocated) AS allocated FROM n;",
            "ALTER TABLE part RENAME COLUMN used TO unused;",
            "ALTER TABLE part ADD COLUMN more TEXT;",
            "PRAGMA writable_schema = 1;"
            " UPDATE sqlite_schema SET rootpage = 1 + abs(random() % 9);",
            "PRAGMA writable_schema = 1;"
            " UPDATE sqlite_schema SET sql = 'nonsense' WHERE random() % 2;",
        ]
    )


def run(folder: Path, count: int, seed: int) -> HostileFolder:
    """Puts ``count`` files in place of those of a folder; of 20 one is the index."""
    hostile = HostileFolder(folder, seed)
    for number in range(1, count + 1):
        if number % 20 == 0:
            hostile.replace_the_index()
        else:
            hostile.replace_a_file()
        if number % _REOPENED == 0:
            hostile.open_again()
    hostile.close()
    return hostile


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    logging.disable()  # a line for each file
    with tempfile.TemporaryDirectory() as folder:
        done = run(Path(folder) / "store", given.count, given.seed)
        remove(Path(folder) / "store")
    print(f"{done.files} files, {done.indexes} indexes, {done.loads} loads that a checksum covers")


if __name__ == "__main__":
    main()
