"""Measures Store.find of a long prompt, in a store of a million blocks.

    make bench-store-find
    make bench-store-find ARGS="--blocks 100000 --tokens 32768 --finds 300"

RAM and the folder's index get their entries through the store's own code. There are no blocks
behind the entries: a find looks neither at the buffers of RAM nor at the files of the folder. Each
find is of another prompt, and the interpreter's garbage collector runs as ever. The parts of a find
are measured by themselves, for the same prompts; what is left is for the tasks and the thread.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import kvferry
import numpy
from kvferry.store.description import Description
from kvferry.store.keys import chain, checked_tokens
from kvferry.store.prefix import InTurn, Search
from kvferry.store.ram import Entry, Room
from kvferry.store.restoring import _search_in
from kvferry.tools.synthetic import write_model
from support.llama_reference import ContextOptions, Model

BLOCK = 256
NBYTES = 32 << 20
GOAL = 1.0  # milliseconds
_AT_A_TIME = 20_000


class Nothing:
    """In place of a block that is in RAM."""

    def close(self) -> None:
        pass


def resident() -> int:
    """Bytes of this process that are in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no VmRSS")


def described(links: Any, root: bytes) -> Iterator[Description]:
    for link in links:
        yield Description("block", link.key, link.parent, link.begin, link.end, root, NBYTES, 1)


def strangers(count: int, blocks: int, root: bytes) -> Iterator[Description]:
    """Blocks of conversations that nobody asks for."""
    parent = root
    for number in range(count):
        begin = BLOCK * (number % blocks)
        if begin == 0:
            parent = root
        key = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()
        yield Description("block", key, parent, begin, begin + BLOCK, root, NBYTES, 1)
        parent = key


def fill_ram(store: kvferry.Store, parts: Iterator[Description]) -> None:
    for part in parts:
        store._ram.add(Entry(part, Nothing(), NBYTES), Room(store._ram, NBYTES))  # type: ignore[arg-type]


def fill_disk(store: kvferry.Store, parts: Iterator[Description]) -> None:
    assert store._behind is not None
    batch: list[tuple[Description, int, int]] = []
    disk = store._behind.disk
    disk._with_index(lambda index: index._sql.execute("PRAGMA cache_size = -400000"))
    for part in parts:
        batch.append((part, NBYTES + 4096, time.time_ns()))
        if len(batch) == _AT_A_TIME:
            disk._with_index(lambda index: index.put(batch))
            batch.clear()
    disk._with_index(lambda index: index.put(batch))
    disk._with_index(lambda index: index._sql.execute("PRAGMA cache_size = -2000"))


def milliseconds(seconds: list[float]) -> str:
    ordered = sorted(1000 * each for each in seconds)
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return f"median {statistics.median(ordered):6.3f} ms   p99 {p99:6.3f} ms"


def timed(function: Callable[[Any], object], prompts: list[Any]) -> list[float]:
    times = []
    for prompt in prompts:
        begin = time.perf_counter()
        function(prompt)
        times.append(time.perf_counter() - begin)
    return times


async def timed_async(
    function: Callable[[Any], Awaitable[object]], prompts: list[Any]
) -> list[float]:
    times = []
    for prompt in prompts:
        begin = time.perf_counter()
        await function(prompt)
        times.append(time.perf_counter() - begin)
    return times


class Measured:
    def __init__(
        self, given: argparse.Namespace, store: kvferry.Store, llama: kvferry.Llama
    ) -> None:
        self.store, self.llama, self.finds = store, llama, given.finds
        self.count = given.tokens
        self.chance = numpy.random.default_rng(5)

    def prompts(self) -> list[list[int]]:
        return [self.chance.integers(0, 150_000, self.count).tolist() for _ in range(self.finds)]

    async def report(self, what: str, prompts: list[list[int]], tokens: int, tier: str) -> None:
        store, llama = self.store, self.llama
        (kept,) = await store._identities.candidates(llama, b"")
        for prompt in prompts[:3]:
            found = await store.find(llama, prompt, leave=0)
            assert (found.tokens, found.tier) == (tokens, tier), found
        arrays = [numpy.array(prompt, numpy.int32) for prompt in prompts]

        async def find(prompt: Any) -> None:
            await store.find(llama, prompt, leave=0)

        of_lists = await timed_async(find, prompts)
        of_arrays = await timed_async(find, arrays)
        met = "met" if 1000 * statistics.median(of_lists) <= GOAL else "missed"
        print(f"\n{what}: {tokens} of {self.count} tokens are found ({tier or 'nowhere'})")
        print(f"  find, of a list            {milliseconds(of_lists)}   (goal {GOAL} ms: {met})")
        print(f"  find, of an array          {milliseconds(of_arrays)}")
        print(f"    a list to an array       {milliseconds(timed(checked_tokens, prompts))}")
        times = timed(lambda array: chain(kept.root, array, BLOCK), arrays)
        print(f"    keys                     {milliseconds(times)}")
        searches = []
        for array in arrays:
            search = Search(InTurn({"ram": store._ram}), kept.root, kept.allowed, array, BLOCK)
            assert search.links
            searches.append(search)
        times = timed(lambda search: search.run(), searches)
        print(f"    search in RAM            {milliseconds(times)}")
        if tier != "ram" and store._behind is not None:
            disk = store._behind.disk
            times = timed(lambda search: _search_in(search, store._ram, disk), searches)
            print(f"    search in RAM and folder {milliseconds(times)}")


async def measure(given: argparse.Namespace, folder: Path) -> None:
    model = Model(write_model("llama", folder / "model.gguf"))
    with model.context(ContextOptions()) as context:
        context.decode(0, [1, 2, 3])
        async with (
            kvferry.Engine("host") as engine,
            kvferry.Store(
                ram=1 << 60, disk=folder / "store", disk_limit=1 << 60, block_tokens=BLOCK
            ) as store,
        ):
            llama = engine.attach(context.address)
            kept, _ = await store._identities.to_keep(llama, b"")
            measured = Measured(given, store, llama)
            in_ram, on_disk, half, unknown = (measured.prompts() for _ in range(4))
            blocks = given.tokens // BLOCK

            def links(prompts: list[list[int]], count: int) -> Iterator[Description]:
                for prompt in prompts:
                    yield from described(
                        chain(kept.root, checked_tokens(prompt), BLOCK)[:count], kept.root
                    )

            print(f"{given.blocks} blocks in the folder's index and as many in RAM")
            before, begin = resident(), time.perf_counter()
            fill_ram(store, strangers(given.blocks, blocks, kept.root))
            fill_ram(store, links(in_ram, blocks))
            count = len(store._ram)
            nbytes = resident() - before
            print(f"RAM: {nbytes / count:.0f} bytes an entry, {nbytes / 2**20:.0f} MiB")
            fill_disk(store, strangers(given.blocks, blocks, kept.root))
            fill_disk(store, links(on_disk, blocks))
            fill_disk(store, links(half, blocks // 2))
            size = (folder / "store/index.sqlite").stat().st_size
            print(
                f"folder: {size / given.blocks:.0f} bytes an entry in the index's file, "
                f"{size / 2**20:.0f} MiB"
            )
            print(f"filled in {time.perf_counter() - begin:.0f} s")
            await measured.report("all in RAM", in_ram, given.tokens, "ram")
            await measured.report("all in the folder", on_disk, given.tokens, "disk")
            await measured.report(
                "half in the folder", half, given.tokens // BLOCK // 2 * BLOCK, "disk"
            )
            await measured.report("unknown", unknown, 0, "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--finds", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        anyio.run(measure, given, Path(folder))


if __name__ == "__main__":
    main()
