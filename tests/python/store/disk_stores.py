"""Stores with a folder, and a disk that fails or hangs under them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import kvferry
import pytest
from kvferry import Store
from kvferry.store import behind
from kvferry.store.system import System
from support.devices import DEVICES
from support.like_contexts import MakeContext
from support.llama_reference import Context

BLOCK = 64
TOKENS = 200


def store_in(
    folder: Path, ram: str | int = "64 MiB", salt: bytes = b"", limit: str | int = "1 GiB"
) -> Store:
    return Store(ram=ram, disk=folder, disk_limit=limit, block_tokens=BLOCK, salt=salt)


def prompted(make_context: MakeContext, kind: str) -> tuple[Context, list[int]]:
    """Returns a context whose sequence 0 holds a prompt."""
    context = make_context(kind, n_ctx=1024)
    prompt = context.model.prompt(TOKENS)
    context.decode(0, prompt)
    return context, prompt


@contextlib.asynccontextmanager
async def kept_in(
    folder: Path, make_context: MakeContext, kind: str
) -> AsyncIterator[tuple[Context, kvferry.Llama, list[int]]]:
    """Gives a context of ``prompted``, its attachment, and the prompt, which a store that is closed
    has kept in the folder."""
    context, prompt = prompted(make_context, kind)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(folder) as store:
            await store.keep(llama, 0, prompt)
        yield context, llama, prompt


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await anyio.to_thread.run_sync(time.sleep, 0.005)


class HangingDisk:
    """From ``begin`` to ``end`` every system call of the disk tier hangs."""

    PATIENCE = 0.4

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._answers = threading.Event()
        self._answers.set()
        self.hanging = 0
        call_once = System.call_once

        def hang(system: System, function: Callable[..., Any], *arguments: Any) -> Any:
            if not self._answers.is_set():
                self.hanging += 1
                self._answers.wait()
            return call_once(system, function, *arguments)

        monkeypatch.setattr(System, "call_once", hang)
        for name in ("PATIENCE", "LOOKUP_PATIENCE"):
            monkeypatch.setattr(behind, name, self.PATIENCE, raising=False)

    def begin(self) -> None:
        self._answers.clear()

    def end(self) -> None:
        self._answers.set()
