"""A cache for llama-cpp-python, which keeps what was evaluated in a store.

llm = llama_cpp.Llama(...)
llm.set_cache(kvferry.PromptCache(llm, ram="2 GiB"))
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from ._bridge.at_exit import close_at_exit
from ._bridge.block_list import BlocksAllowed
from ._bridge.devices import Devices
from ._bridge.llama_cpp_cache import (
    KeptState,
    SaveState,
    completing,
    evaluate,
    has_seen_images,
    held_tokens,
    reusable_prefix,
    settings,
    wants_all_logits,
)
from ._bridge.llama_cpp_object import SEQUENCE, LlamaCppObject
from ._bridge.loop_thread import LoopThread
from ._bridge.recent_tokens import RecentTokens, Tokens
from ._native import lib
from .engine import Engine
from .errors import error
from .llama import Llama
from .store import Store
from .store.readings import Readings
from .store.sizes import size
from .store.weights import weights_hash

if TYPE_CHECKING:
    import llama_cpp
    from llama_cpp.llama_cache import BaseLlamaCache
else:
    BaseLlamaCache = object  # llama_cpp is imported by programs that use it

T = TypeVar("T")

log = logging.getLogger("kvferry.store")


class PromptCache(BaseLlamaCache):
    """Keeps what a ``llama_cpp.Llama`` has evaluated, so that it is not evaluated again.

    Pass it to ``llm.set_cache``. A completion then begins with the longest known prefix of its
    prompt, and its tokens are kept when it has ended. Prompts that begin alike share the blocks of
    their beginning.

    llm
        The ``llama_cpp.Llama``. It is kept alive until ``close``.
    ram, disk, disk_limit, salt
        As for ``Store``.
    block_tokens
        As for ``Store``. A prefix is known up to a multiple of this number, and from the third
        prompt on up to where prompts that begin alike differ. Where the cache needs checkpoints, it
        is known up to the end of a completion, and from the third prompt on up to the last multiple
        before they differ.
    variant
        Names settings that change the states and that the object does not tell, such as adapters
        that were added by llama.cpp's own calls. The object tells ``lora_path``, ``lora_scale``,
        RoPE settings and ``kv_overrides``.
    devices
        As for ``Engine``.

    A completion waits for its prefix, and for the save at its end. Other threads write the folder.
    If anything goes wrong, a line is in the log ``kvferry.store``, and the tokens are evaluated as
    without a cache.
    """

    def __init__(
        self,
        llm: llama_cpp.Llama,
        *,
        ram: int | str,
        disk: str | os.PathLike[str] | None = None,
        disk_limit: int | str | None = None,
        block_tokens: int = 64,
        salt: bytes = b"",
        variant: str = "",
        devices: Devices = "auto",
    ) -> None:
        """Call this while no other thread uses ``llm``. Blocks, as the constructor of Engine.

        Raises TypeError, InvalidArgument, OSError (the folder cannot be used), LibraryNotFound,
        TapUnavailable, NoDevice, ContextFreed.
        """
        known = LlamaCppObject.of(llm)
        if known is None:
            raise TypeError(f"llm is a llama_cpp.Llama, not {type(llm).__name__}")
        self.capacity_bytes = size("ram", ram)
        self._llm: Any = llm
        self._object = known
        self._block_tokens = block_tokens
        self._closed = False
        self._lock = threading.Lock()  # of close
        self._told_why_not = False
        self._recent = RecentTokens()
        self._fork = 0
        """Up to where the prompt begins as an earlier one does, if that is not kept yet."""
        variant = variant_of(llm, variant)

        @contextlib.asynccontextmanager
        async def opened() -> AsyncIterator[tuple[Store, Llama]]:
            store = Store(
                ram=ram, disk=disk, disk_limit=disk_limit, block_tokens=block_tokens, salt=salt
            )
            async with Engine(devices) as engine, store:
                yield store, engine.attach(llm, variant=variant)

        self._loop: LoopThread[tuple[Store, Llama]] = LoopThread("kvferry prompt cache", opened)
        self._store, self._llama = self._loop.context
        self._save_state = SaveState.install(llm, PromptCache)
        close_at_exit(self)

    # ---- The interface of llama-cpp-python's caches ---------------------------------------------

    def __getitem__(self, tokens: Sequence[int]) -> KeptState:  # type: ignore[override]
        """Loads the longest known prefix into the object, if the object holds a shorter one.

        For the object's own completions. Raises KeyError if nothing was loaded.
        """
        frame = sys._getframe(1)
        count = self._or_log("a prefix was not restored", 0, self._restore, tokens, frame)
        if not count:
            raise KeyError("nothing was restored")
        return KeptState(held_tokens(self._llm))

    def __contains__(self, tokens: Sequence[int]) -> bool:
        """Whether a prefix of the tokens is kept."""
        return bool(self._or_log("a prefix was not looked for", 0, self._find, tokens))

    def __setitem__(self, tokens: Sequence[int], state: object) -> None:
        """Keeps what the object holds now. ``tokens`` and ``state`` are of the object's own
        completion."""
        self._or_log("a conversation was not kept", None, self._keep, sys._getframe(1))

    @property
    def cache_size(self) -> int:
        """How many bytes of RAM the cache uses."""
        return self.stats()["ram_used"]

    def stats(self) -> dict[str, int]:
        """As ``Store.stats``. Raises EngineClosed."""
        return self._on_loop(self._stats)

    async def _stats(self) -> dict[str, int]:
        return self._store.stats()

    def readings(self) -> Readings:
        """As ``Store.readings``. Any thread may call this, also after ``close``."""
        return self._store.readings()

    # ---- Closing --------------------------------------------------------------------------------

    def flush(self) -> None:
        """Returns when the disk has all that has been kept, except for what could not be written.
        Raises EngineClosed."""
        self._on_loop(self._store.flush)

    def close(self) -> None:
        """Waits for the writes to the disk, and removes the cache from ``llm``.

        Frees all memory. May be repeated. Call this while no thread uses ``llm``. At the exit of
        the program caches close by themselves.
        """
        with self._lock:
            if self._closed or not self._loop.is_here:
                return
            self._closed = True
        if self._llm.cache is self:
            self._llm.set_cache(None)
        self._save_state.uninstall()
        self._loop.close()
        del self._loop, self._llm, self._object, self._llama

    def __enter__(self) -> PromptCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- On the object's thread -----------------------------------------------------------------

    def _find(self, tokens: Sequence[int]) -> int:
        async def find() -> int:
            return (await self._store.find(self._llama, tokens)).tokens

        return self._on_loop(find)

    def _restore(self, tokens: Sequence[int], frame: FrameType) -> int:
        """Returns how many of the tokens the object holds after a load; 0 if it goes on with the
        tokens that it held before."""
        self._fork = 0
        self._check_caller(frame)
        llm = self._llm
        if has_seen_images(llm):
            return 0
        if self._object.keeps_scores() and wants_all_logits(frame):
            # A restored token has no logits.
            if llm.n_tokens and self._object.lacks_scores():
                llm.reset()
            return 0
        allowed = self._allowed()
        here, is_wrong = reusable_prefix(llm, tokens, allowed.checkpoints)

        known = 0

        async def restore() -> int:
            nonlocal known
            found = await self._store.find(self._llama, tokens)
            known = found.tokens
            count = await self._store.restore(self._llama, SEQUENCE, tokens, held=here, found=found)
            return count if count > here else 0

        count = 0
        try:
            if allowed is not BlocksAllowed.NONE:
                count = self._on_loop(restore)
        finally:
            if is_wrong and not count:
                llm.reset()
        if allowed.checkpoints:
            count = self._evaluate_shared(tokens, max(count, here), known) or count
        else:
            fork = self._fork_of(tokens)
            # Less is not worth a block of its own.
            self._fork = fork if fork >= known + self._block_tokens // 4 else 0
        return count

    def _fork_of(self, tokens: Sequence[int]) -> int:
        """Up to where an earlier prompt begins as this one does; at least one token is left."""
        return min(self._recent.fork(tokens), len(tokens) - 1)

    def _evaluate_shared(self, tokens: Sequence[int], begin: int, known: int) -> int:
        """Evaluates what the prompt shares with an earlier one, from ``begin`` on, and keeps it: a
        checkpoint can be taken only where the evaluation stands, and the earlier prompt went past.

        Returns how many tokens the object holds then; 0 if it shares no more than is known.
        """
        shared = self._whole_blocks(self._fork_of(tokens))
        if shared <= max(begin, known):
            return 0
        evaluate(self._llm, tokens[:shared], begin)
        self._or_log("a checkpoint was not kept", None, self._save, held_tokens(self._llm))
        return shared

    def _keep(self, frame: FrameType) -> None:
        self._check_caller(frame)
        tokens = held_tokens(self._llm)
        allowed = self._allowed()
        if not len(tokens) or allowed is BlocksAllowed.NONE or has_seen_images(self._llm):
            return
        if allowed.checkpoints:
            self._save(tokens)
        else:
            # The rest would be kept once more with the tokens that follow it; other prompts may
            # follow a fork.
            self._save(tokens[: self._whole_blocks(len(tokens))])
            self._save(tokens[: self._fork])
        self._recent.add(tokens)

    def _save(self, tokens: Tokens) -> None:
        """Keeps what the object holds: of caches that need checkpoints, all of it."""
        if not len(tokens):
            return

        async def keep() -> None:
            # Urgent: the object waits.
            await self._store.keep(self._llama, SEQUENCE, tokens, priority="urgent")

        self._on_loop(keep)

    def _whole_blocks(self, count: int) -> int:
        return count // self._block_tokens * self._block_tokens

    def _allowed(self) -> BlocksAllowed:
        self._check_open()
        allowed, why = self._llama.blocks_allowed()
        if allowed is BlocksAllowed.NONE and not self._told_why_not:
            self._told_why_not = True
            log.warning("nothing of this llama_cpp.Llama can be kept: %s", why)
        return allowed

    def _check_caller(self, frame: FrameType) -> None:
        """Checks whose completion has called: the tokens alone do not tell."""
        self._check_open()
        if (other := completing(frame)) is not None and other is not self._llm:
            raise TypeError("this cache was made for another llama_cpp.Llama")

    def _check_open(self) -> None:
        if self._closed or not self._loop.is_here:
            raise error(lib.KVF_ERR_CLOSED, "the prompt cache")

    def _or_log(self, trouble: str, default: T, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function, and returns ``default`` if it raises: a completion must go on."""
        try:
            return function(*arguments)
        except Exception as problem:
            log.warning("%s: %s: %s", trouble, type(problem).__name__, problem)
            return default

    def _on_loop(self, function: Callable[[], Awaitable[T]]) -> T:
        """As ``LoopThread.call``. No thread may use the object until this returns."""
        self._check_open()
        self._llama._attachment.worker.check_elsewhere()
        return self._loop.call(function)


def variant_of(llm: Any, given: str) -> str:
    """Returns the ``variant`` with which a PromptCache attaches a ``llama_cpp.Llama``."""
    told = [given, settings(llm)]
    if llm.lora_path:
        told += [weights_hash(llm.lora_path).hex(), str(llm.lora_scale)]
    return hashlib.blake2b("\0".join(told).encode(), digest_size=16).hexdigest()
