"""How fast a ``llama_cpp.Llama`` evaluates prompts, as libllama counts it."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from ..llama import Llama
from .worth import Worth


@dataclass(frozen=True)
class _Counted:
    """What had been evaluated when a sequence was last looked at."""

    tokens: int = 0
    seconds: float = 0.0
    position: int = 0
    """How many tokens the sequence held."""


class Evaluations:
    """Notes what was evaluated from a restore to a keep, or from one keep to the next.

    Of a ``llama_cpp.Llama`` alone. libllama counts all batches of several tokens of a context as
    prompts: where a program decodes several sequences together, the counts say little.
    """

    def __init__(self, worth: Worth) -> None:
        self._worth = worth
        self._before: WeakKeyDictionary[Llama, _Counted] = WeakKeyDictionary()

    async def restored(self, llama: Llama, seq: int, position: int) -> None:
        """Notes how many tokens of its prompt the sequence holds now."""
        if (now := await llama._evaluated(seq)) is not None:
            self._before[llama] = _Counted(*now, position)

    async def kept(self, llama: Llama, seq: int, position: int) -> None:
        """Notes how many tokens the sequence holds when it is kept."""
        if (now := await llama._evaluated(seq)) is None:
            return
        before = self._before.get(llama, _Counted())
        self._before[llama] = _Counted(*now, position)
        tokens, seconds = now[0] - before.tokens, now[1] - before.seconds
        # Fewer than before: the counts began anew. More than there are: they are of other prompts.
        if 0 < tokens <= position:
            begin = min(before.position, position - tokens)
            self._worth.prefill(llama).note(tokens, seconds, begin)
