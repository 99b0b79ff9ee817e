"""What a ``llama_cpp.Llama`` knows of the conversation in its context.

The object keeps the tokens that its context holds, and trusts them: ``eval`` removes from the cache
what is beyond ``n_tokens`` and continues there, and a completion reuses the prefix that its prompt
shares with ``input_ids``. So when kvferry changes the cache, it changes these tokens too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

if TYPE_CHECKING:
    import llama_cpp

SEQUENCE = 0
"""The only sequence that the object decodes."""

# No token has this number, so that no prompt begins with it.
_UNKNOWN_TOKEN = -1


@dataclass(frozen=True, eq=False)
class LlmState:
    """What a ``llama_cpp.Llama`` knew of its conversation when its sequence was saved."""

    tokens: NDArray[numpy.int32]
    """The tokens that had been evaluated, in order: one for each position of the sequence."""
    scores: NDArray[numpy.float32] | None = None
    """The logits after each token, one row for each token; None without ``logits_all``."""
    seed: int | None = None
    """The sampler's seed. None if it is not known; then a load does not change the seed."""


def joined(parts: Sequence[LlmState]) -> LlmState:
    """Returns what is known of parts that follow one another. The seed is that of the last part."""
    scores = [part.scores for part in parts if part.scores is not None]
    return LlmState(
        tokens=numpy.concatenate([part.tokens for part in parts]),
        scores=numpy.concatenate(scores) if len(scores) == len(parts) else None,
        seed=parts[-1].seed,
    )


class LlamaCppObject:
    """The ``llama_cpp.Llama`` of an attachment. For the context's thread, between decodes."""

    def __init__(self, llm: llama_cpp.Llama) -> None:
        self._llm: Any = llm  # attributes differ between versions of llama-cpp-python

    @classmethod
    def of(cls, owner: object) -> LlamaCppObject | None:
        """Returns None unless ``owner`` is a ``llama_cpp.Llama``. (If it is one, the program has
        imported llama_cpp.)"""
        module = sys.modules.get("llama_cpp")
        if module is None or not isinstance(owner, module.Llama):
            return None
        return cls(owner)

    @property
    def model_path(self) -> str | None:
        path = getattr(self._llm, "model_path", None)
        return path if isinstance(path, str) else None

    def evaluated(self) -> tuple[int, float]:
        """How many tokens the context has evaluated in batches of several, and in how many seconds.

        It may have begun anew since it was last asked. The seconds are 0 if the object was made
        with ``no_perf``.
        """
        from llama_cpp import llama_cpp as functions

        functions.llama_synchronize(self._llm.ctx)  # libllama counts a batch when it has ended
        counted = functions.llama_perf_context(self._llm.ctx)
        return int(counted.n_p_eval), float(counted.t_p_eval_ms) / 1e3

    def state(self, begin: int = 0, end: int | None = None) -> LlmState:
        """Returns a copy of what the object knows now of its tokens at [begin, end), or of all."""
        llm = self._llm
        part = slice(begin, llm.n_tokens if end is None else min(end, llm.n_tokens))
        return LlmState(
            tokens=numpy.array(llm.input_ids[part], numpy.int32),
            scores=numpy.array(llm.scores[part], numpy.float32) if self.keeps_scores() else None,
            seed=getattr(llm, "_seed", None),
        )

    def restore(self, state: LlmState | None) -> None:
        """Gives the object what it knew, after its sequence has been loaded.

        Without ``state`` only the number of tokens is known. Then ``eval`` continues after them,
        and a completion evaluates its whole prompt, because no prompt matches unknown tokens.
        """
        if state is None:
            state = LlmState(numpy.full(self._positions(), _UNKNOWN_TOKEN, numpy.int32))
        llm = self._llm
        count = len(state.tokens)
        if count > len(llm.input_ids):  # a context may have a few more cells than were asked for
            llm.input_ids = numpy.empty(count, llm.input_ids.dtype)
        llm.input_ids[:count] = state.tokens
        if self.keeps_scores():
            llm.scores[:count] = numpy.nan if state.scores is None else state.scores
        if state.seed is not None:
            llm._seed = state.seed
        self._set_count(count)

    def reset(self) -> None:
        """Makes the object forget the conversation, after its sequence has been emptied."""
        self._set_count(0)

    def reset_if_emptied(self) -> None:
        """As ``reset``, if the sequence is empty."""
        if self._positions() == 0:
            self.reset()

    def _set_count(self, count: int) -> None:
        self._llm.n_tokens = count
        # The logits in the context belong to another conversation: sampling needs a decode first.
        # (The class's own load_state sets this flag too. Versions without it always decode.)
        self._llm._requires_eval = True

    def keeps_scores(self) -> bool:
        """Whether there is a row of logits for each token. (With a draft model ``_logits_all`` is
        set too, but there are rows for one batch only.)"""
        llm = self._llm
        return bool(getattr(llm, "_logits_all", False)) and len(llm.scores) >= len(llm.input_ids)

    def lacks_scores(self) -> bool:
        """Whether a load has brought tokens without their logits, of an object that keeps them."""
        return bool(numpy.isnan(self._llm.scores[: self._llm.n_tokens, 0]).any())

    def _positions(self) -> int:
        from llama_cpp import llama_cpp as functions

        memory = functions.llama_get_memory(self._llm.ctx)
        return int(functions.llama_memory_seq_pos_max(memory, SEQUENCE)) + 1
