"""What a ``llama_cpp.Llama`` knows of the conversation in its context.

The object keeps the tokens that its context holds, and takes them for granted: ``eval`` removes
whatever the cache holds beyond ``n_tokens`` and goes on from there, and a completion reuses the
prefix that its prompt shares with ``input_ids``. So tokens and cache belong together, and whoever
changes the one changes the other.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

if TYPE_CHECKING:
    import llama_cpp

SEQUENCE = 0
"""The only one that the object decodes."""

# Fits no token, so that no prompt begins with it.
_UNKNOWN_TOKEN = -1


@dataclass(frozen=True, eq=False)
class LlmState:
    """What a ``llama_cpp.Llama`` knew of its conversation when the sequence was saved."""

    tokens: NDArray[numpy.int32]
    """Those that have been evaluated, in order: as many as the sequence has positions."""
    scores: NDArray[numpy.float32] | None = None
    """The logits after each token, one row a token; None without ``logits_all``."""
    seed: int | None = None
    """Of the sampler; None: not known, and not changed by a load."""


class LlmObject:
    """The object that an attachment was made with. For the context's thread, between decodes."""

    def __init__(self, llm: llama_cpp.Llama) -> None:
        self._llm: Any = llm  # attributes differ between its versions

    @classmethod
    def of(cls, owner: object) -> LlmObject | None:
        """None if it is no ``llama_cpp.Llama``. Nobody can have one without having imported it."""
        module = sys.modules.get("llama_cpp")
        if module is None or not isinstance(owner, module.Llama):
            return None
        return cls(owner)

    def state(self) -> LlmState:
        """A copy of what it knows now."""
        llm = self._llm
        count = llm.n_tokens
        return LlmState(
            tokens=numpy.array(llm.input_ids[:count], numpy.int32),
            scores=numpy.array(llm.scores[:count], numpy.float32) if self._keeps_scores() else None,
            seed=getattr(llm, "_seed", None),
        )

    def restore(self, state: LlmState | None) -> None:
        """Makes it know that again, after its sequence has been loaded.

        Of a state that came without tokens their number alone is known. ``eval`` goes on from
        there; no prompt matches, so that a completion begins anew.
        """
        if state is None:
            state = LlmState(numpy.full(self._positions(), _UNKNOWN_TOKEN, numpy.int32))
        llm = self._llm
        count = len(state.tokens)
        if count > len(llm.input_ids):  # the context may have a few cells more than were asked for
            llm.input_ids = numpy.empty(count, llm.input_ids.dtype)
        llm.input_ids[:count] = state.tokens
        if self._keeps_scores():
            llm.scores[:count] = numpy.nan if state.scores is None else state.scores
        if state.seed is not None:
            llm._seed = state.seed
        self._set_count(count)

    def reset(self) -> None:
        """Makes it forget the conversation, after its sequence has been emptied."""
        self._set_count(0)

    def reset_if_emptied(self) -> None:
        """As ``reset``, if the sequence holds nothing."""
        if self._positions() == 0:
            self.reset()

    def _set_count(self, count: int) -> None:
        self._llm.n_tokens = count
        # The logits in the context are of another conversation: sampling needs a decode first.
        # So does the class's own load_state. Versions without this flag decode in any case.
        self._llm._requires_eval = True

    def _keeps_scores(self) -> bool:
        """With a draft model the object says so too, and yet has rows for one batch only."""
        llm = self._llm
        return bool(getattr(llm, "_logits_all", False)) and len(llm.scores) >= len(llm.input_ids)

    def _positions(self) -> int:
        from llama_cpp import llama_cpp as functions

        memory = functions.llama_get_memory(self._llm.ctx)
        return int(functions.llama_memory_seq_pos_max(memory, SEQUENCE)) + 1
