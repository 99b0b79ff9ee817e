"""Measures kvferry.PromptCache beside llama-cpp-python's own caches and no cache at all.

    make bench-prompt-cache
    make bench-prompt-cache ARGS="--rounds 5 --shared 2000 --prompts 20 --threads 2"

Prompts that share a beginning are completed on one `llama_cpp.Llama`: in turn; and each after a
prompt of somebody else (not timed), so that the object has forgotten the beginning. Then prompts
that share nothing, for which a cache is of no use. In each round all caches are measured, one after
the other, in one process; figures are medians over the rounds. "In the cache" is the time of
the completions without what they evaluate and sample, less the same time without a cache. "CPU" is
the time of all threads of the process, writes to the disk included.

The model is a synthetic Llama. Its cache takes 12 KiB a token.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvferry
import llama_cpp

# Loads the backends of libllama.
import support.llama_reference  # noqa: F401
from support.text_model import write_text_model

MODEL = {
    "layers": 12,
    "embedding": 256,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 64,
    "feed_forward": 512,
    "vocabulary": 32000,
    "context": 8192,
}
OWN, ANSWER = 50, 16
GIB = 1 << 30


@dataclass
class Measured:
    """What the completions of one scenario took, in seconds, and what is kept then, in bytes."""

    total: float
    cpu: float
    outside: float
    """Without what was evaluated and sampled."""
    kept: int


@dataclass
class Cache:
    name: str
    make: Callable[[Any, Path], Any]
    kept: Callable[[Any, Path], int]


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def prompt_cache(llm: Any, folder: Path) -> Any:
    return kvferry.PromptCache(llm, ram=2 * GIB)


def prompt_cache_on_disk(llm: Any, folder: Path) -> Any:
    return kvferry.PromptCache(llm, ram=2 * GIB, disk=folder, disk_limit=8 * GIB)


def disk_cache(llm: Any, folder: Path) -> Any:
    return llama_cpp.LlamaDiskCache(str(folder), capacity_bytes=8 * GIB)


def flushed(cache: Any, folder: Path) -> int:
    cache.flush()
    return bytes_below(folder)


CACHES = [
    Cache("none", lambda llm, folder: None, lambda cache, folder: 0),
    Cache("PromptCache", prompt_cache, lambda cache, folder: cache.cache_size),
    Cache("PromptCache, disk", prompt_cache_on_disk, flushed),
    Cache(
        "LlamaRAMCache",
        lambda llm, folder: llama_cpp.LlamaRAMCache(8 * GIB),
        lambda cache, folder: cache.cache_size,
    ),
    Cache("LlamaDiskCache", disk_cache, lambda cache, folder: bytes_below(folder)),
]


def tokens(first: int, count: int) -> list[int]:
    """A text of its own for each `first`: bytes, which are the tokens from 3 on."""
    return [
        3 + (31 * first + index * index * (first + 1) + index // 7) % 256 for index in range(count)
    ]


@dataclass
class Scenario:
    name: str
    prompts: list[list[int]]
    between: list[int] | None = None


def scenarios(prompts: int, shared: int) -> list[Scenario]:
    alike = [tokens(0, shared) + tokens(1 + number, OWN) for number in range(prompts)]
    other = [tokens(100 + number, shared // 4) for number in range(prompts)]
    return [
        Scenario("in turn", alike),
        Scenario("after another prompt", alike, tokens(99, 64)),
        Scenario("nothing shared", other),
    ]


class Evaluation:
    """The time that an object spends in `generate`."""

    def __init__(self, llm: Any) -> None:
        self.seconds = 0.0
        self._generate = llm.generate
        llm.generate = self.generate

    def generate(self, *arguments: Any, **options: Any) -> Iterator[int]:
        generated = self._generate(*arguments, **options)
        while True:
            begin = time.perf_counter()
            token = next(generated, None)
            self.seconds += time.perf_counter() - begin
            if token is None:
                return
            yield token


def complete(llm: Any, prompt: list[int]) -> str:
    done = llm.create_completion(prompt, max_tokens=ANSWER, temperature=0.0)
    return str(done["choices"][0]["text"])


def measure(
    model: Path, threads: int, cache: Cache, scenario: Scenario
) -> tuple[Measured, list[str]]:
    llm = llama_cpp.Llama(
        str(model), n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        complete(llm, tokens(98, 64))
        kept_by = cache.make(llm, Path(folder))
        evaluation = Evaluation(llm)
        total = evaluated = 0.0
        cpu = time.process_time()
        between = 0.0
        texts = []
        for prompt in scenario.prompts:
            llm.set_cache(kept_by)
            begin, before = time.perf_counter(), evaluation.seconds
            texts.append(complete(llm, prompt))
            total += time.perf_counter() - begin
            evaluated += evaluation.seconds - before
            if scenario.between is not None:
                begin = time.process_time()
                llm.set_cache(None)
                complete(llm, scenario.between)
                between += time.process_time() - begin
        kept = cache.kept(kept_by, Path(folder))
        cpu = time.process_time() - cpu - between
        if isinstance(kept_by, kvferry.PromptCache):
            kept_by.close()
        llm.close()
    return Measured(total, cpu, total - evaluated, kept), texts


def median(measured: list[Measured]) -> Measured:
    return Measured(
        statistics.median(each.total for each in measured),
        statistics.median(each.cpu for each in measured),
        statistics.median(each.outside for each in measured),
        measured[-1].kept,
    )


def report(scenario: Scenario, found: dict[str, Measured]) -> None:
    none, ours = found["none"], found["PromptCache"]
    print(
        f"\n{scenario.name}: {len(scenario.prompts)} prompts of {len(scenario.prompts[0])} tokens"
    )
    print(
        f"{'cache':20}{'total s':>9}{'of none':>9}{'CPU s':>9}{'of none':>9}"
        f"{'in the cache s':>16}{'kept MiB':>10}"
    )
    for name, each in found.items():
        inside = each.outside - none.outside
        print(
            f"{name:20}{each.total:9.3f}{each.total / none.total:9.3f}{each.cpu:9.3f}"
            f"{each.cpu / none.cpu:9.3f}{inside:16.3f}{each.kept / 2**20:10.1f}"
        )
    for own, theirs in [("PromptCache", "LlamaRAMCache"), ("PromptCache, disk", "LlamaDiskCache")]:
        ours, other = found[own], found[theirs]
        inside = (other.outside - none.outside) / max(1e-9, ours.outside - none.outside)
        kept = other.kept / max(1, ours.kept)
        print(
            f"{theirs} / {own}: total {other.total / ours.total:.2f}, in the cache {inside:.1f}, "
            f"kept {kept:.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--shared", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", help="a scenario, such as 'in turn'")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_text_model(Path(folder) / "model.gguf", "llama", **MODEL)
        for scenario in scenarios(given.prompts, given.shared):
            if given.only not in (None, scenario.name):
                continue
            rounds: dict[str, list[Measured]] = {cache.name: [] for cache in CACHES}
            for _ in range(given.rounds):
                texts = {}
                for cache in CACHES:
                    measured, texts[cache.name] = measure(model, given.threads, cache, scenario)
                    rounds[cache.name].append(measured)
                same = sum(each == texts["none"] for each in texts.values())
            report(scenario, {name: median(each) for name, each in rounds.items()})
            print(f"{same} of {len(CACHES)} give the texts that are given without a cache")


if __name__ == "__main__":
    main()
