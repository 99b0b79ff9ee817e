"""The store's budgets at random operations: `python store_budgets.py 100000` for a long run.

Several tasks keep, restore, find, prefetch, pin, unpin, evict and clear at random, and many of the
calls are cancelled. Meanwhile a thread looks at what the process and the folder really occupy: the
pinned pool's bytes, the resident memory, and the folder's blocks as du counts them.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import kvferry
from disk_parts import occupied_at_once
from kvferry import Store
from kvferry.tools.synthetic import write_model
from support.llama_reference import Context, ContextOptions, Model

RAM = 3 << 20
DISK = 4 << 20
_BLOCK = 16
_TASKS = 4
_SOURCES = 4
_TOKENS = 120
_OF_ONE_STORE = 500
"""Operations after which another store opens the folder."""
_SALTS = [bytes([number]) for number in range(12)]


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@dataclass
class Most:
    """The most bytes that were seen."""

    taken: int = 0
    """Of the pool, by buffers in use."""
    mapped: int = 0
    """Of the pool, with free buffers."""
    folder: int = 0
    resident: int = 0
    """Of the process, above what it had after the first tenth of the operations."""
    samples: int = 0
    done: Counter[str] = field(default_factory=Counter)
    stats: Counter[str] = field(default_factory=Counter)


class Walk:
    """Random operations on one store after another, in one folder."""

    def __init__(self, context: Context, folder: Path, seed: int) -> None:
        self._context = context
        self._folder = folder
        folder.mkdir()
        self._chance = random.Random(seed)
        self._prompts = [context.model.prompt(_TOKENS, seed=seed + n) for n in range(_SOURCES)]
        for seq, prompt in enumerate(self._prompts):
            context.decode(seq, prompt)
        self.most = Most()
        self._baseline: int | None = None
        self._ended = threading.Event()

    async def run(self, operations: int) -> None:
        async with kvferry.Engine("host") as engine:
            watcher = threading.Thread(target=self._watch)
            watcher.start()
            try:
                self._llama = engine.attach(self._context.address)
                self._engine = engine
                self._left = operations
                while self._left > 0:
                    if self._baseline is None and self._left <= operations * 9 // 10:
                        self._baseline = resident()
                    await self._with_one_store(min(self._left, _OF_ONE_STORE))
            finally:
                self._ended.set()
                watcher.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            if (self._folder / "lock").exists():
                self.most.folder = max(self.most.folder, occupied_at_once(self._folder))
            if self._baseline is not None:
                self.most.resident = max(self.most.resident, resident() - self._baseline)
            self.most.samples += 1

    def _look(self) -> None:
        """On the loop's thread, after each operation."""
        pool = self._engine.describe()["pool"]
        self.most.taken = max(self.most.taken, pool["mapped"] - pool["free"])
        self.most.mapped = max(self.most.mapped, pool["mapped"])
        stats = self._store.stats()
        assert stats["ram_used"] + stats["ram_reserved"] <= RAM

    async def _with_one_store(self, operations: int) -> None:
        store = Store(ram=RAM, disk=self._folder, disk_limit=DISK, block_tokens=_BLOCK)
        async with store:
            self._store = store
            end = self._left - operations
            async with anyio.create_task_group() as tasks:
                for number in range(_TASKS):
                    tasks.start_soon(self._operate, _SOURCES + number, end)
        for name in ("evicted", "saved_bytes", "read_bytes", "restored_tokens"):
            self.most.stats[name] += store.stats()[name]
        await self._check_that_nothing_is_left(store)

    async def _check_that_nothing_is_left(self, store: Store) -> None:
        stats = store.stats()
        assert (stats["ram_used"], stats["ram_reserved"], stats["ram_entries"]) == (0, 0, 0)
        with anyio.fail_after(20):  # a cancelled transfer may still have its buffer
            while True:
                pool = self._engine.describe()["pool"]
                if pool["mapped"] == pool["free"]:
                    return
                await anyio.sleep(0.005)

    async def _operate(self, seq: int, end: int) -> None:
        while self._left > end:
            self._left -= 1
            if self._chance.random() < 0.2:
                with anyio.move_on_after(self._chance.random() * 0.004) as scope:
                    await self._operation(seq)
                self.most.done["cancelled"] += scope.cancelled_caught
            else:
                await self._operation(seq)
            self._look()

    async def _operation(self, seq: int) -> None:
        chance, store, llama = self._chance, self._store, self._llama
        source = chance.randrange(_SOURCES)
        tokens = self._prompts[source][: chance.randrange(1, _TOKENS)]
        salt = chance.choice(_SALTS)
        which = chance.choices(
            ["keep", "restore", "find", "prefetch", "pin", "unpin", "evict", "clear", "flush"],
            [35, 30, 15, 5, 4, 4, 5, 1, 1],
        )[0]
        self.most.done[which] += 1
        name = f"{chance.randrange(30)}"
        match which:
            case "keep":
                await store.keep(
                    llama,
                    source,
                    tokens,
                    salt=salt,
                    name=chance.choice([None, name]),
                    ttl=chance.choice([None, None, None, 0.01]),
                )
            case "restore":
                count = await store.restore(llama, seq, tokens, salt=salt, leave=0)
                assert await llama.run(self._context.pos_max, seq) == count - 1
            case "find":
                await store.find(llama, tokens, salt=salt)
            case "prefetch":
                store.prefetch(llama, tokens, salt=salt)
            case "pin":
                pinned = [each.name for each in store.list() if each.pinned]
                with suppress(KeyError):
                    store.pin(name)
                if len(pinned) > 3:
                    store.unpin(pinned[0])
            case "unpin":
                with suppress(KeyError):
                    store.unpin(name)
            case "evict":
                with suppress(KeyError):
                    store.evict(name)
            case "clear":
                store.clear()
            case "flush":
                await store.flush()


def check(most: Most) -> None:
    assert most.taken <= RAM
    assert most.folder <= DISK
    assert most.samples > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    logging.disable()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = Model(write_model("llama", Path(folder) / "model.gguf"))
        with model, model.context(ContextOptions(n_ctx=2048, n_seq_max=8)) as context:
            walk = Walk(context, Path(folder) / "store", given.seed)
            anyio.run(walk.run, given.count)
    most = walk.most
    print(", ".join(f"{count} {name}" for name, count in sorted(most.done.items())))
    print(", ".join(f"{name} {count}" for name, count in sorted(most.stats.items())))
    print(
        f"RAM: {most.taken} bytes of {RAM} in use, {most.mapped} mapped; folder: {most.folder} of "
        f"{DISK}; resident: {most.resident} more than after a tenth; {most.samples} looks, "
        f"{time.monotonic() - begin:.0f} s"
    )
    check(most)


if __name__ == "__main__":
    main()
