"""Looks for faults for as long as wanted: `make soak`.

    make soak ARGS="--steps 10000"                     every kind and cache, one seed
    make soak ARGS="--hours 3"                         new seeds until the time is over
    make soak ARGS="--kinds gemma3,mamba --seeds 1,2"  these alone
    make soak ARGS="--steps 0 --states 100000"         composed states alone

For each kind of model, cache and seed there is a random walk (support/random_walk), and then a
program that loads states which are composed of blocks, most of them damaged
(support/damage_blocks.py); its memory is limited. Prints a line for each, with the number of each
operation or outcome. If a walk finds a difference, its last steps are printed; if the program ends,
the state is named. Then the soak ends with status 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio
from kvferry.tools.synthetic import write_model
from support.abilities import Abilities
from support.block_reference import PARTS_IN_BLOCKS
from support.cuda_driver import driver_under_test, open_driver
from support.like_contexts import CACHES, LATENT
from support.llama_reference import ContextOptions, Model
from support.programs import run_python
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
    parser.add_argument("--steps", type=int, default=2000, help="of each walk; 0: no walks")
    parser.add_argument(
        "--states", type=int, default=1000, help="composed of each kind and cache; 0: none"
    )
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--hours", type=float, help="goes on with further seeds for so long")
    parser.add_argument("--kinds", default="", help="of model; all of random_walk.KINDS")
    parser.add_argument("--caches", default="", help="all of like_contexts.CACHES")
    return parser.parse_args(given)


def every_case(
    options: argparse.Namespace, kinds: list[str], caches: list[str]
) -> Iterator[tuple[int, str, str]]:
    """Yields seeds, kinds and caches."""
    given = [int(seed) for seed in options.seeds.split(",")]
    further = itertools.count(max(given) + 1) if options.hours is not None else ()
    for seed in itertools.chain(given, further):
        for kind, cache in itertools.product(kinds, caches):
            # With keys alone, llama.cpp requires the same type for keys and values.
            if not (kind in LATENT and cache == "q8_0-keys-transposed"):
                yield seed, kind, cache


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
        Walk(cuda, ours, like, Abilities.of(kind, cache), seed, blocks=True) as one,
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


def load_composed(path: Path, kind: str, cache: str, seed: int, states: int) -> tuple[str, bool]:
    """Loads so many composed states, others for each seed. Returns what to print, and whether
    libllama and the context have survived all."""
    began = time.monotonic()
    given = (str(path), kind, json.dumps(cache_options(cache)), str(seed * states), str(states))
    done = run_python("-m", "support.damage_blocks", *given, timeout=86400)
    *numbers, last = done.stdout.splitlines() or [""]
    text = f"{kind} {cache} seed {seed}: "
    if done.returncode != 0:
        numbers.append(last)
        text += f"{len(numbers)} composed states, ended with {done.returncode} at state {last}"
        return f"{text}\n{done.stderr}", False
    outcomes = ", ".join(f"{count} {name}" for name, count in sorted(json.loads(last).items()))
    text += f"{len(numbers)} composed states, {outcomes} ({time.monotonic() - began:.0f} s)"
    return text, True


class Soak:
    def __init__(self, cuda: SimulatedCuda, folder: Path, kinds: list[str]) -> None:
        self._cuda = cuda
        self._paths = {kind: write_model(kind, folder / f"{kind}.gguf") for kind in kinds}
        self._models = {kind: Model(path) for kind, path in self._paths.items()}
        self.walks = self.steps = self.states = 0

    def __enter__(self) -> Soak:
        return self

    def __exit__(self, *_: object) -> None:
        for model in self._models.values():
            model.close()

    def walk(self, kind: str, cache: str, seed: int, steps: int) -> bool:
        text, equal = walk(self._cuda, self._models[kind], kind, cache, seed, steps)
        print(text, flush=True)
        self.walks += 1
        self.steps += steps
        return equal

    def load_composed(self, kind: str, cache: str, seed: int, states: int) -> bool:
        text, survived = load_composed(self._paths[kind], kind, cache, seed, states)
        print(text, flush=True)
        self.states += states
        return survived


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    kinds, caches = names(KINDS, options.kinds), names(list(CACHES), options.caches)
    cuda = driver_under_test()
    began, well = time.monotonic(), True
    with (
        tempfile.TemporaryDirectory() as folder,
        cuda.context(),
        Soak(cuda, Path(folder), kinds) as soak,
    ):
        for seed, kind, cache in every_case(options, kinds, caches):
            if options.hours is not None and time.monotonic() - began > 3600 * options.hours:
                break
            if options.steps:
                well = soak.walk(kind, cache, seed, options.steps)
            if well and options.states and kind in PARTS_IN_BLOCKS:
                well = soak.load_composed(kind, cache, seed, options.states)
            if not well:
                break
    total = [f"{soak.walks} walk{'s' * (soak.walks != 1)}, {soak.steps} steps"] * (soak.walks > 0)
    total += [f"{soak.states} composed states"] * (soak.states > 0)
    print(f"{', '.join(total)}, {time.monotonic() - began:.0f} s")
    return 0 if well else 1


if __name__ == "__main__":
    os.environ.setdefault("KVFERRY_CUDA_DRIVER", driver_under_test().path)
    anyio.run(open_driver)
    sys.exit(main())
