"""``kvferry store warm``: computes prompts and keeps them in the folder of a store.

A server that starts with the folder then finds them. Each prompt is on the disk before the next one
is computed, so that an interrupted command leaves all that it has printed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import anyio
import anyio.to_thread

from .. import Devices, Engine, Llama, Store
from .decoders import BATCH, Decoder, Layout, Prompt, by_libllama, by_llama_cpp_python
from .libllama import Libllama, LlamaError, find
from .models import on_gpu
from .store import conversation_name, pin_keys

_NAME = "warm"


@dataclass(frozen=True)
class Options:
    folder: str
    prompts: str
    """A file; see ``read_prompts``."""
    model: str
    disk_limit: str
    ram: str = "4 GiB"
    block_tokens: int = 256
    salt: bytes = b""
    variant: str = ""
    pin: bool = False
    device: Devices = "auto"
    llama_lib: str | None = None
    layout: Layout = field(default_factory=Layout)
    llama_cpp_python: dict[str, Any] | None = None
    """Arguments of ``llama_cpp.Llama``: keep what its PromptCache would find."""


@dataclass
class Meter:
    """Shows on a terminal how far the command is; elsewhere nothing."""

    prompts: int
    done: int = 0
    computed: int = 0
    """Tokens that were decoded."""
    found: int = 0
    """Tokens that were kept before."""
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    begin: float = field(default_factory=time.monotonic)

    def show(self) -> None:
        if self.stream.isatty():
            rate = self.computed / max(1e-9, time.monotonic() - self.begin)
            tokens = f"{self.computed:,} tokens computed, {self.found:,} known before"
            self._write(f"{self.done}/{self.prompts} prompts, {tokens}, {rate:,.0f} tokens/s")

    def clear(self) -> None:
        if self.stream.isatty():
            self._write("")

    def _write(self, text: str) -> None:
        self.stream.write(f"\r{text}\x1b[K")
        self.stream.flush()


def read_prompts(path: Path) -> list[Prompt]:
    """Returns the prompts of a file, one a line.

    In a file whose name ends in ``.jsonl`` a line is an object with "prompt", a text, or with
    "tokens", a list of numbers. Empty lines do not count. Raises OSError; LlamaError for another
    content.
    """
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return list(lines)
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            prompt = found["prompt"] if "prompt" in found else list(map(int, found["tokens"]))
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, (str, list)):
            raise LlamaError(f'{path}: prompt {number} is no object with "prompt" or "tokens"')
        prompts.append(prompt)
    return prompts


async def warm(options: Options) -> bool:
    """Prints a line for each prompt that is kept: its name for ``pin`` and ``evict``, its tokens.

    Returns True if all of all prompts is kept. Raises LlamaError, KvferryError, OSError.
    """
    prompts = read_prompts(Path(options.prompts))
    meter = Meter(len(prompts))
    complete = True
    try:
        async with Engine(options.device) as engine:
            with _decoder(options, engine, prompts) as decoder:
                async with (
                    engine.attach(
                        decoder.context, library=decoder.library, variant=decoder.variant
                    ) as llama,
                    _store(options) as store,
                ):
                    for tokens in filter(None, decoder.prompts):
                        complete &= await _keep(options, store, llama, decoder, tokens, meter)
    finally:
        meter.clear()
    return complete


def _decoder(
    options: Options, engine: Engine, prompts: Sequence[Prompt]
) -> AbstractContextManager[Decoder]:
    if options.llama_cpp_python is not None:
        return by_llama_cpp_python(
            options.model, prompts, arguments=options.llama_cpp_python, variant=options.variant
        )
    library = Libllama(find(options.llama_lib))
    return by_libllama(
        library,
        options.model,
        prompts,
        gpu=on_gpu(engine.describe(), options.device, library),
        layout=options.layout,
        variant=options.variant,
    )


def _store(options: Options) -> Store:
    return Store(
        ram=options.ram,
        disk=options.folder,
        disk_limit=options.disk_limit,
        block_tokens=options.block_tokens,
        salt=options.salt,
    )


async def _keep(
    options: Options,
    store: Store,
    llama: Llama,
    decoder: Decoder,
    tokens: list[int],
    meter: Meter,
) -> bool:
    """Computes a prompt and keeps it. Returns whether all of it is on the disk."""
    count = await store.restore(llama, 0, tokens, leave=0)
    meter.found += count
    for begin in range(count, len(tokens), BATCH):
        piece = tokens[begin : begin + BATCH]
        await llama.run(decoder.append, piece)
        meter.computed += len(piece)
        meter.show()
    failed = store.stats()["disk_writes_failed"]
    kept = await store.keep(llama, 0, tokens, name=_NAME)
    await store.flush()
    meter.done += 1
    if store.stats()["disk_writes_failed"] != failed or not kept:
        kept = 0
    else:
        [listed] = store.list()
        if options.pin:
            await anyio.to_thread.run_sync(pin_keys, options.folder, [listed.key])
        meter.clear()
        print(conversation_name(listed.key), kept, flush=True)
    meter.show()
    return kept == len(tokens)
