"""A store whose folder somebody changes: `python store_hostile.py 10000` for a long run."""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
from collections import Counter
from pathlib import Path

import anyio
import kvferry
from hostile_files import plant, remove
from kvferry import Store
from kvferry.tools.synthetic import write_model
from support.llama_reference import Context, ContextOptions, Model

_BLOCK = 16
_TOKENS = 70
_OF_ONE_FOLDER = 20


async def run(context: Context, folder: Path, count: int, seed: int) -> Counter[int]:
    """Restores ``count`` times, each time after somebody has changed a file.

    Returns how often how many tokens were restored.
    """
    chance = random.Random(seed)
    prompt = context.model.prompt(_TOKENS)
    context.decode(0, prompt)
    fresh = context.model.context(ContextOptions())  # which does not know its layout
    done: Counter[int] = Counter()
    with fresh:
        async with kvferry.Engine("host") as engine:
            llama, unseen = engine.attach(context.address), engine.attach(fresh.address)
            while sum(done.values()) < count:
                remove(folder)
                async with store_in(folder) as store:
                    assert await store.keep(llama, 0, prompt) == _TOKENS
                right = {path: path.read_bytes() for path in (folder / "parts").iterdir()}
                outside = folder.parent / "outside"
                outside.write_bytes(next(iter(right.values())))
                async with store_in(folder) as store:
                    for _ in range(_OF_ONE_FOLDER):
                        path, other = chance.sample(sorted(right), 2)
                        plant(path, right[path], right[other], outside, chance)
                        restored = await store.restore(llama, 1, prompt, leave=0)
                        assert await llama.run(context.pos_max, 1) == restored - 1
                        store.clear()
                        assert store.stats()["ram_reserved"] == 0
                        done[restored] += 1
                        if chance.random() < 0.3:
                            await store.keep(llama, 0, prompt)
                            await store.flush()
                            store.clear()
                # What the index and the notes tell a new store, and a context that is new.
                async with store_in(folder) as store:
                    await store.restore(unseen, 0, prompt)
                    await unseen.remove(0)
    return done


def store_in(folder: Path) -> Store:
    return Store(ram="4 MiB", disk=folder, disk_limit="16 MiB", block_tokens=_BLOCK)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    logging.disable()  # a line for each file
    with tempfile.TemporaryDirectory() as folder:
        model = Model(write_model("llama", Path(folder) / "model.gguf"))
        with model, model.context(ContextOptions()) as context:
            done = anyio.run(run, context, Path(folder) / "store", given.count, given.seed)
    print(f"{done.total()} restores: tokens and how often: {dict(sorted(done.items()))}")


if __name__ == "__main__":
    main()
