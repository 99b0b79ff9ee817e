"""Measures reads of the store's disk tier beside dd and plain reads of the same files.

    make bench-store-disk
    make bench-store-disk ARGS="--parts 8 --mib 32 --rounds 7 --folder /path"

The disk tier reads a part on one thread, in pieces of 1 MiB straight into the caller's memory, and
hashes each piece; Store reads up to four parts at a time. Each way reads all parts once a round,
with the files in the page cache, or without (posix_fadvise, POSIX_FADV_DONTNEED). Figures are
medians over the rounds; the ways take turns.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash
from kvferry.store.description import Description
from kvferry.store.disk import Disk
from kvferry.store.part_format import HEADER_BYTES, PIECE_BYTES, name_of

READERS = 4


class Files:
    """Parts in a folder, and memory for all of them."""

    def __init__(self, folder: Path, count: int, nbytes: int) -> None:
        self.disk = Disk(folder, 2 * count * nbytes + (64 << 20))
        self.parts, self.memories, self.paths = [], [], []
        data = os.urandom(nbytes)
        for number in range(count):
            key = number.to_bytes(32, "little")
            checksum = xxhash.xxh64_intdigest(data)
            part = Description("block", key, key, 0, 256, bytes(32), nbytes, checksum)
            if not self.disk.write(part, data):
                raise RuntimeError("a part was not written")
            self.parts.append(part)
            self.paths.append(folder / "parts" / name_of(part.kind, key))
            memory = mmap.mmap(-1, nbytes)  # at a page, as O_DIRECT wants
            memory[:] = bytes(nbytes)
            self.memories.append(memoryview(memory))
        self.nbytes = nbytes

    def forget(self) -> None:
        """Removes the files from the page cache."""
        for path in self.paths:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    # ---- Ways to read all parts

    def tier(self, threads: ThreadPoolExecutor) -> None:
        if not all(threads.map(self.disk.read_into, self.parts, self.memories)):
            raise RuntimeError("a part was not read")

    def plain(self, threads: ThreadPoolExecutor) -> None:
        list(threads.map(self._read, range(len(self.parts))))

    def direct(self, threads: ThreadPoolExecutor) -> None:
        list(threads.map(lambda number: self._read(number, os.O_DIRECT), range(len(self.parts))))

    def split(self, threads: ThreadPoolExecutor) -> None:
        """One file after the other, by several threads each."""
        for number in range(len(self.parts)):
            share = self.nbytes // READERS
            begins = range(0, self.nbytes, share)
            list(threads.map(lambda begin: self._read(number, 0, begin, share), begins))  # noqa: B023

    def dd(self, threads: ThreadPoolExecutor) -> None:
        list(threads.map(self._dd, self.paths))

    def _dd(self, path: Path) -> None:
        command = ["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"]
        subprocess.run(command, check=True)

    def _read(self, number: int, flags: int = 0, begin: int = 0, count: int | None = None) -> None:
        descriptor = os.open(self.paths[number], os.O_RDONLY | flags)
        end = self.nbytes if count is None else min(self.nbytes, begin + count)
        while begin < end:
            piece = self.memories[number][begin : min(end, begin + PIECE_BYTES)]
            read = os.preadv(descriptor, [piece], HEADER_BYTES + begin)
            if read <= 0:
                raise RuntimeError("a file ended too early")
            begin += read
        os.close(descriptor)


def measure(files: Files, rounds: int, cold: bool) -> None:
    ways: dict[str, tuple[Callable[[ThreadPoolExecutor], None], int]] = {
        "dd, one at a time": (files.dd, 1),
        "plain preadv, 1 thread": (files.plain, 1),
        f"plain preadv, {READERS} threads": (files.plain, READERS),
        f"plain preadv, {READERS} threads a file": (files.split, READERS),
        "O_DIRECT, 1 thread": (files.direct, 1),
        f"O_DIRECT, {READERS} threads": (files.direct, READERS),
        "tier, 1 thread": (files.tier, 1),
        f"tier, {READERS} threads": (files.tier, READERS),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, (function, count) in ways.items():
            if not cold and function == files.direct:
                continue
            if cold:
                files.forget()
            with ThreadPoolExecutor(count) as threads:
                begin = time.perf_counter()
                function(threads)
                if number:  # the first round fills caches
                    seconds[way].append(time.perf_counter() - begin)
    nbytes = files.nbytes * len(files.parts)
    print("cold" if cold else "from the page cache")
    for way, each in seconds.items():
        if each:
            rates = sorted(nbytes / one / 1e9 for one in each)
            print(
                f"  {way:32} {statistics.median(rates):6.2f} GB/s "
                f"({rates[0]:.2f} to {rates[-1]:.2f})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--mib", type=int, default=32, help="of each part")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where the folder of the parts is made")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        files = Files(Path(folder) / "store", given.parts, given.mib << 20)
        memory = files.memories[0]
        hashing = []
        for _ in range(given.rounds):
            begin = time.perf_counter()
            xxhash.xxh64_intdigest(memory)
            hashing.append(len(memory) / (time.perf_counter() - begin) / 1e9)
        print(f"XXH64 of memory, 1 thread: {statistics.median(hashing):.2f} GB/s")
        for cold in (False, True):
            measure(files, given.rounds, cold)
        files.disk.close()


if __name__ == "__main__":
    main()
