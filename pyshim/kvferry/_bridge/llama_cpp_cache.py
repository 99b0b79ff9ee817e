"""What a cache of llama-cpp-python must know of the ``llama_cpp.Llama`` that it is set on.

``Llama._create_completion`` uses a cache like this::

    item = self.cache[prompt_tokens]             # KeyError: a miss
    if prefix(item.input_ids, prompt_tokens) > prefix(self.input_ids, prompt_tokens):
        self.load_state(item)
    ...                                          # ``generate`` reuses the prefix in ``input_ids``
    self.cache[prompt_tokens + completion_tokens] = self.save_state()

``save_state`` copies the whole state. ``SaveState`` replaces it in the object, for calls by this
method alone. ``load_state`` needs no replacement: the object already holds the tokens of ``item``,
so that the method does not call it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy

from .llama_cpp_object import SEQUENCE
from .recent_tokens import Tokens, shared_length


@dataclass(frozen=True, eq=False)
class KeptState:
    """What the cache and ``_create_completion`` exchange, in place of a LlamaState."""

    input_ids: Tokens
    """The tokens that the object holds."""


class SaveState:
    """``save_state`` as an attribute of one ``llama_cpp.Llama``, for the caches that use it.

    Returns a KeptState to a completion whose cache is of a given type, and a LlamaState to
    everybody else.
    """

    def __init__(self, llm: Any, cache_type: type) -> None:
        self._llm = weakref.ref(llm)  # the object refers to this
        self._cache_type = cache_type
        self._had_own = "save_state" in vars(llm)
        self._before: Callable[[], Any] | None = vars(llm).get("save_state")
        self._users = 0

    @classmethod
    def install(cls, llm: Any, cache_type: type) -> SaveState:
        """Installs it, or uses the one that is there. Call ``uninstall`` as often."""
        there = vars(llm).get("save_state")
        if not isinstance(there, cls):
            there = cls(llm, cache_type)
            llm.save_state = there
        there._users += 1
        return there

    def uninstall(self) -> None:
        self._users -= 1
        llm = self._llm()
        # Somebody may have replaced this in the meantime, and may still call it.
        if self._users or llm is None or vars(llm).get("save_state") is not self:
            return
        if self._had_own:
            llm.save_state = self._before
        else:
            del llm.save_state

    def __call__(self) -> Any:
        llm = self._llm()
        if llm is None:
            raise ReferenceError("the llama_cpp.Llama is gone")
        if isinstance(llm.cache, self._cache_type) and completing(sys._getframe(1)) is llm:
            return KeptState(held_tokens(llm))
        if self._before is not None:
            return self._before()
        return type(llm).save_state(llm)


def completing(frame: FrameType) -> Any:
    """The object whose ``_create_completion`` runs in this frame; None if it is another function.

    A subclass may have a method of this name. It gets a true LlamaState, since nothing is known of
    how it uses a cache.
    """
    from llama_cpp import Llama

    own = getattr(Llama._create_completion, "__code__", None)
    return frame.f_locals.get("self") if frame.f_code is own else None


def wants_all_logits(frame: FrameType) -> bool:
    """Whether the completion in this frame returns the logits of its prompt."""
    arguments = frame.f_locals
    return bool(arguments.get("echo")) and arguments.get("logprobs") is not None


def held_tokens(llm: Any) -> Tokens:
    """Returns a copy of the tokens that the object holds."""
    return numpy.array(llm.input_ids[: llm.n_tokens], numpy.int32)


def has_seen_images(llm: Any) -> bool:
    """Whether the object may hold images, whose cells have no tokens."""
    return getattr(llm.chat_handler, "mtmd_ctx", None) is not None


def reusable_prefix(llm: Any, tokens: Sequence[int], needs_checkpoints: bool) -> tuple[int, bool]:
    """Returns how many of the first tokens the object holds such that a completion can go on from
    them; and whether the object would wrongly go on from more tokens.

    The object removes the tokens that follow the prefix that it shares with the prompt. Recurrent
    layers refuse that, and then the object evaluates the whole prompt. Sliding windows do not
    refuse, but may have lost rows that the tokens behind the prefix need.
    """
    shared = shared_length(llm.input_ids[: llm.n_tokens], numpy.asarray(tokens, numpy.int32))
    # The object may go on from all that it holds. If that is the whole prompt, it first removes the
    # last token, unless it has that token's logits.
    goes_on = shared == llm.n_tokens and (shared < len(tokens) or not llm._requires_eval)
    if goes_on or not needs_checkpoints or _window_is_whole(llm, shared):
        return shared, False
    return 0, shared > 0


def evaluate(llm: Any, tokens: Sequence[int], begin: int) -> None:
    """Evaluates the tokens from ``begin`` on, up to which the object can go on from what it
    holds: then it holds these tokens alone."""
    if begin:
        llm.n_tokens = begin
    else:
        llm.reset()
    llm.eval(tokens[begin:])


def _window_is_whole(llm: Any, shared: int) -> bool:
    """Whether the windows have all rows that the next token sees. The next token follows the
    prefix, or is its last one: the object evaluates the last token of a whole prompt again.
    Recurrent layers have the last position alone."""
    from llama_cpp import llama_cpp as functions

    memory = functions.llama_get_memory(llm.ctx)
    first = functions.llama_memory_seq_pos_min(memory, SEQUENCE)
    window = functions.llama_model_n_swa(llm._model.model)
    return bool(0 <= first <= max(0, shared - 2 - window))


_SETTINGS = (
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
    "attention_type",
)


def settings(llm: Any) -> str:
    """Returns the settings that change the states of the object and that libllama does not tell."""
    told = [f"{name}={getattr(llm.context_params, name)}" for name in _SETTINGS]
    told.append(f"kv_overrides={llm.kv_overrides}")
    return ",".join(told)
