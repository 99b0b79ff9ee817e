"""What must be equal for the state of one context to be of use in another."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import anyio.to_thread

from .._bridge.block_list import BlocksAllowed
from ..llama import Llama
from .away import Away
from .behind import Behind
from .keys import root_key
from .weights import weights_hash

log = logging.getLogger("kvferry.store")


@dataclass(frozen=True)
class Kept:
    """A cache for which something may be kept: its root, and what it allows."""

    root: bytes
    allowed: BlocksAllowed


class Identities:
    """The roots of the keys. For the thread of the event loop.

    libllama does not tell the types and layout of a cache before a state with cells has been seen.
    So the layouts for which something was kept are remembered, for each model and salt. All of them
    are tried for a context that has had no cells.
    """

    def __init__(
        self, files: anyio.CapacityLimiter, behind: Behind | None, away: Away | None
    ) -> None:
        self._files = files
        self._behind = behind
        self._away = away
        self._models: WeakKeyDictionary[Llama, list[bytes]] = WeakKeyDictionary()
        self._layouts: WeakKeyDictionary[Llama, tuple[str, BlocksAllowed, str]] = (
            WeakKeyDictionary()
        )
        self._known: dict[bytes, dict[bytes, BlocksAllowed]] = {}

    async def candidates(self, llama: Llama, salt: bytes) -> list[Kept]:
        """Returns the roots under which something may be kept for this context."""
        model = await self._model(llama, salt)
        layout, allowed, _ = await self._layout(llama)
        if allowed is BlocksAllowed.UNSEEN:
            return [Kept(*each) for each in (await self._known_layouts(model)).items()]
        if allowed is BlocksAllowed.NONE:
            return []
        return [Kept(root_key([model, layout.encode()]), allowed)]

    async def _known_layouts(self, model: bytes) -> dict[bytes, BlocksAllowed]:
        """The roots for which something was kept with a model, in any tier."""
        known = self._known.get(model, {})
        if self._behind is not None:
            known = {**await self._behind.layouts(model), **known}
        if self._away is not None:
            known = {**await self._away.layouts(model), **known}
        return known

    async def why_nothing(self, llama: Llama) -> str:
        """Why a context has no candidates."""
        _, allowed, why = await self._layout(llama)
        if allowed is BlocksAllowed.NONE:
            return f"the cache allows neither blocks nor checkpoints: {why}"
        return "nothing is kept for this model, variant and salt"

    async def others(self, llama: Llama, salt: bytes) -> list[tuple[str, Kept]]:
        """What is kept with the same salt for other caches: of this model, and of the models of
        other contexts that the store has seen. With a word for how they differ."""
        own = await self._model(llama, salt)
        models = {root_key([salt, *parts]) for parts in list(self._models.values())}
        mine = {each.root for each in await self.candidates(llama, salt)}
        found = []
        for model in models:
            kind = (
                "a cache of other types or layout" if model == own else "another model or variant"
            )
            for root, allowed in (await self._known_layouts(model)).items():
                if root not in mine:
                    found.append((kind, Kept(root, allowed)))
        return found

    async def to_keep(self, llama: Llama, salt: bytes) -> tuple[Kept, str]:
        """Returns and remembers the root for this context, and says why the cache allows no
        more."""
        model = await self._model(llama, salt)
        layout, allowed, why = await self._layout(llama)
        root = root_key([model, layout.encode()])
        if allowed.blocks or allowed.checkpoints:
            self._known.setdefault(model, {})[root] = allowed
            if self._behind is not None:
                self._behind.note(model, root, allowed)
            if self._away is not None:
                self._away.note(model, root, allowed)
        return Kept(root, allowed), why

    async def is_unseen(self, llama: Llama) -> bool:
        return (await self._layout(llama))[1] is BlocksAllowed.UNSEEN

    async def _model(self, llama: Llama, salt: bytes) -> bytes:
        """Returns the hash of a salt and a model."""
        if llama not in self._models:
            weights = await self._weights(llama.model_path)
            self._models.setdefault(llama, [llama.fingerprint.encode(), weights])
        return root_key([salt, *self._models[llama]])

    async def _weights(self, path: str | None) -> bytes:
        if path is None:
            return b""
        try:
            return await anyio.to_thread.run_sync(weights_hash, path, limiter=self._files)
        except OSError as problem:
            log.warning("what is kept is found by this attachment alone: %s", problem)
            return os.urandom(32)

    async def _layout(self, llama: Llama) -> tuple[str, BlocksAllowed, str]:
        if (known := self._layouts.get(llama)) is not None:
            return known
        allowed, why = await llama.blocks_allowed_async()
        layout = llama.describe()["layout"]
        if not layout and allowed is not BlocksAllowed.NONE:
            # Sequences that are empty in a part of the cache tell what blocks need, and no layout.
            allowed, why = BlocksAllowed.UNSEEN, "no sequence of the context has been whole yet"
        found = (layout, allowed, why)
        if allowed is not BlocksAllowed.UNSEEN:
            self._layouts[llama] = found
        return found
