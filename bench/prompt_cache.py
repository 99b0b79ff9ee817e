"""Measures kvferry.PromptCache beside llama-cpp-python's own caches and no cache at all.

    make bench-prompt-cache
    make bench-prompt-cache ARGS="--rounds 5 --shared 2000 --prompts 20 --threads 2"
    make bench-prompt-cache ARGS="--model larger --prompts 6 --only 'nothing shared'"

Short questions about one long text, with answers of a few tokens, are completed on one
`llama_cpp.Llama`: in turn; and each after a prompt of somebody else (not timed), so that the object
has forgotten the text. Then prompts that share nothing, for which a cache is of no use. In each
round all caches are measured, one after the other, in one process; figures are medians over the
rounds.

"limit" is a cache that costs nothing and knows every beginning: the object itself still holds it.
No cache can be faster; where nothing is to be forgotten, it is "none" measured again. "Rest" is the
time without the first prompt, which every cache evaluates whole. "In cache" is the time of the
completions without what they evaluate and sample, less the same time without a cache. "CPU" is the
time of all threads of the process, writes to the disk included; "threads" is that of all but the
one that completes, which is what a cache does on its own threads if the model has one. "Kept" is
what the cache has at the end; "written" is what the process has given to write calls.

The models are synthetic Llamas. Their cache takes 12 KiB a token.
"""

from __future__ import annotations

import argparse
import contextlib
import io
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
MODELS = {
    "tiny": MODEL,
    # Eight times as much to compute for each byte of the cache; still a small model.
    "larger": {**MODEL, "embedding": 768, "heads": 12, "feed_forward": 2048},
}
GIB = 1 << 30


@dataclass
class Measured:
    """What the completions of one scenario took, in seconds, and what is kept then, in bytes."""

    total: float
    rest: float
    """Without the first prompt."""
    cpu: float
    rest_cpu: float
    threads: float
    """CPU time of all threads but the one that completes."""
    outside: float
    """Without what was evaluated and sampled."""
    kept: int
    written: int


@dataclass
class Cache:
    name: str
    make: Callable[[Any, Path], Any]
    kept: Callable[[Any, Path], int]
    object_forgets: bool = True


def bytes_written() -> int:
    """What this process has given to write calls so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


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
    Cache("limit", lambda llm, folder: None, lambda cache, folder: 0, object_forgets=False),
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


def scenarios(prompts: int, shared: int, own: int) -> list[Scenario]:
    alike = [tokens(0, shared) + tokens(1 + number, own) for number in range(prompts)]
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


def complete(llm: Any, prompt: list[int], answer: int = 16) -> str:
    done = llm.create_completion(prompt, max_tokens=answer, temperature=0.0)
    return str(done["choices"][0]["text"])


def measure(
    model: Path, threads: int, cache: Cache, scenario: Scenario, answer: int
) -> tuple[Measured, list[str]]:
    llm = llama_cpp.Llama(
        str(model), n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        complete(llm, tokens(98, 64))
        kept_by = cache.make(llm, Path(folder))
        evaluation = Evaluation(llm)
        evaluated = 0.0
        written = bytes_written()
        cpu, own_cpu = time.process_time(), time.thread_time()
        between = own_between = 0.0
        texts, times, first_cpu = [], [], 0.0
        for prompt in scenario.prompts:
            llm.set_cache(kept_by)
            begin, before = time.perf_counter(), evaluation.seconds
            texts.append(complete(llm, prompt, answer))
            times.append(time.perf_counter() - begin)
            first_cpu = first_cpu or time.process_time() - cpu
            evaluated += evaluation.seconds - before
            if scenario.between is not None and cache.object_forgets:
                begin, own_begin = time.process_time(), time.thread_time()
                llm.set_cache(None)
                complete(llm, scenario.between)
                between += time.process_time() - begin
                own_between += time.thread_time() - own_begin
        kept = cache.kept(kept_by, Path(folder))
        cpu = time.process_time() - cpu - between
        own_cpu = time.thread_time() - own_cpu - own_between
        written = bytes_written() - written
        if isinstance(kept_by, kvferry.PromptCache):
            kept_by.close()
        llm.close()
    total = sum(times)
    measured = Measured(
        total,
        total - times[0],
        cpu,
        cpu - first_cpu,
        cpu - own_cpu,
        total - evaluated,
        kept,
        written,
    )
    return measured, texts


def median(measured: list[Measured]) -> Measured:
    return Measured(
        statistics.median(each.total for each in measured),
        statistics.median(each.rest for each in measured),
        statistics.median(each.cpu for each in measured),
        statistics.median(each.rest_cpu for each in measured),
        statistics.median(each.threads for each in measured),
        statistics.median(each.outside for each in measured),
        measured[-1].kept,
        measured[-1].written,
    )


def report(scenario: Scenario, found: dict[str, Measured]) -> None:
    none, limit = found["none"], found["limit"]
    print(
        f"\n{scenario.name}: {len(scenario.prompts)} prompts of {len(scenario.prompts[0])} tokens"
    )
    print(
        f"{'cache':18}{'total s':>9}{'of none':>9}{'rest s':>9}{'CPU s':>9}"
        f"{'of none':>9}{'rest CPU':>10}{'threads':>9}{'in cache s':>11}{'kept MiB':>10}"
        f"{'written MiB':>12}"
    )
    for name, each in found.items():
        print(
            f"{name:18}{each.total:9.3f}{each.total / none.total:9.3f}"
            f"{each.rest:9.3f}{each.cpu:9.3f}{each.cpu / none.cpu:9.3f}{each.rest_cpu:10.3f}"
            f"{each.threads:9.3f}"
            f"{each.outside - none.outside:11.3f}"
            f"{each.kept / 2**20:10.1f}{each.written / 2**20:12.1f}"
        )
    for own, theirs in [("PromptCache", "LlamaRAMCache"), ("PromptCache, disk", "LlamaDiskCache")]:
        if own in found and theirs in found:
            compare(f"{theirs} / {own}", found[theirs], found[own], limit, none)


def compare(names: str, other: Measured, ours: Measured, limit: Measured, none: Measured) -> None:
    """Prints how many times more the other one takes; beside times, the same of the limit."""

    def times(name: str) -> str:
        most = getattr(other, name) / getattr(limit, name)
        return f"{getattr(other, name) / getattr(ours, name):.2f} (limit {most:.2f})"

    inside = (other.outside - none.outside) / max(1e-9, ours.outside - none.outside)
    told = [f"total {times('total')}", f"rest {times('rest')}", f"CPU {times('cpu')}"]
    told.append(f"rest of CPU {times('rest_cpu')}")
    told += [f"in the cache {inside:.1f}", f"kept {other.kept / max(1, ours.kept):.1f}"]
    if "Disk" in names:
        told.append(f"written {other.written / max(1, ours.written):.1f}")
    print(f"{names}: {', '.join(told)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--shared", type=int, default=2000)
    parser.add_argument("--own", type=int, default=16, help="tokens of a question")
    parser.add_argument("--answer", type=int, default=4, help="tokens of an answer")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--threads", type=int, default=1, help="of the model")
    parser.add_argument("--only", help="a scenario, such as 'in turn'")
    parser.add_argument("--without", action="append", default=[], help="a cache")
    given = parser.parse_args()
    needed = ("none", "limit")
    caches = [cache for cache in CACHES if cache.name in needed or cache.name not in given.without]
    with tempfile.TemporaryDirectory() as folder:
        model = write_text_model(Path(folder) / "model.gguf", "llama", **MODELS[given.model])
        for scenario in scenarios(given.prompts, given.shared, given.own):
            if given.only not in (None, scenario.name):
                continue
            rounds: dict[str, list[Measured]] = {cache.name: [] for cache in caches}
            for _ in range(given.rounds):
                texts = {}
                for cache in caches:
                    measured, texts[cache.name] = measure(
                        model, given.threads, cache, scenario, given.answer
                    )
                    rounds[cache.name].append(measured)
                same = sum(each == texts["none"] for each in texts.values())
            report(scenario, {name: median(each) for name, each in rounds.items()})
            print(f"{same} of {len(caches)} give the texts that are given without a cache")


if __name__ == "__main__":
    main()
