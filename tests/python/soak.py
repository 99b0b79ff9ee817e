"""Runs random walks (support/random_walk) for as long as wanted: `make soak`.

    make soak ARGS="--steps 10000"                     every kind and cache, one seed
    make soak ARGS="--hours 3"                         new seeds until the time is over
    make soak ARGS="--kinds gemma3,mamba --seeds 1,2"  these alone

Prints a line for each walk, with the number of each operation. If a walk finds a difference, its
last steps are printed, and the soak ends with status 1.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio
from kvferry.tools.synthetic import write_model
from support.abilities import Abilities
from support.cuda_driver import driver_under_test, open_driver
from support.like_contexts import CACHES, LATENT
from support.llama_reference import ContextOptions, Model
from support.random_walk import KINDS, Walk, cache_options
from support.simulated_cuda import SimulatedCuda


def names(known: Sequence[str], given: str) -> list[str]:
    chosen = given.split(",") if given else list(known)
    if unknown := set(chosen) - set(known):
        raise SystemExit(
            f"soak: unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}"
        )
    return chosen


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="of each walk")
    parser.add_argument("--seeds", default="0", help="of the walks, such as 0,1,2")
    parser.add_argument("--hours", type=float, help="goes on with further seeds for so long")
    parser.add_argument("--kinds", default="", help="of model; all of random_walk.KINDS")
    parser.add_argument("--caches", default="", help="all of like_contexts.CACHES")
    return parser.parse_args(given)


def every_walk(
    options: argparse.Namespace, kinds: list[str], caches: list[str]
) -> Iterator[tuple[int, tuple[str, str]]]:
    given = [int(seed) for seed in options.seeds.split(",")]
    further = itertools.count(max(given) + 1) if options.hours is not None else ()
    for seed in itertools.chain(given, further):
        for kind, cache in itertools.product(kinds, caches):
            # With keys alone, llama.cpp requires the same type for keys and values.
            if not (kind in LATENT and cache == "q8_0-keys-transposed"):
                yield seed, (kind, cache)


def walk(
    cuda: SimulatedCuda, model: Model, kind: str, cache: str, seed: int, steps: int
) -> tuple[str, bool]:
    """Returns what to print, and whether all was equal."""
    began = time.monotonic()
    options = ContextOptions(**cache_options(cache))
    failure = ""
    with (
        model.context(options) as ours,
        model.context(options) as like,
        Walk(cuda, ours, like, Abilities.of(kind, cache), seed) as one,
    ):
        try:
            while one.steps < steps:
                one.step()
        except Exception as error:
            failure = f": {type(error).__name__}: {error}"
    done = ", ".join(f"{count} {name}" for name, count in sorted(one.done.items()))
    text = f"{kind} {cache} seed {seed}: {one.steps} steps, {done}"
    text += f" ({time.monotonic() - began:.0f} s)"
    if failure:
        text += f"\n  after {one.steps} steps{failure}\n    " + "\n    ".join(one.history)
    return text, not failure


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    kinds, caches = names(KINDS, options.kinds), names(list(CACHES), options.caches)
    cuda = driver_under_test()
    began, walks, steps, equal = time.monotonic(), 0, 0, True
    with tempfile.TemporaryDirectory() as folder, cuda.context():
        models = {kind: Model(write_model(kind, Path(folder) / f"{kind}.gguf")) for kind in kinds}
        for seed, (kind, cache) in every_walk(options, kinds, caches):
            if options.hours is not None and time.monotonic() - began > 3600 * options.hours:
                break
            text, equal = walk(cuda, models[kind], kind, cache, seed, options.steps)
            print(text, flush=True)
            walks, steps = walks + 1, steps + options.steps
            if not equal:
                break
        for model in models.values():
            model.close()
    print(f"{walks} walk{'s' * (walks != 1)}, {steps} steps, {time.monotonic() - began:.0f} s")
    return 0 if equal else 1


if __name__ == "__main__":
    os.environ.setdefault("KVFERRY_CUDA_DRIVER", driver_under_test().path)
    anyio.run(open_driver)
    sys.exit(main())
