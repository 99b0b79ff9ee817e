"""What llama.cpp can do with each kind of model and cache."""

from __future__ import annotations

import dataclasses

from support.like_contexts import RECURRENT


@dataclasses.dataclass(frozen=True)
class Abilities:
    """What llama.cpp can do with a kind of model and cache."""

    kind: str
    recurs: bool
    """It has recurrent cells, so that only whole sequences can be removed."""
    shifts: bool
    appends: bool
    """A sequence may be decoded while it is saved in place."""
    streams: bool
    """Each sequence has a stream of its own, and shares no cells."""
    windows: bool
    """Other sequences may take cells that have left a sliding window."""
    interleaves: bool
    """Bytes of different sequences alternate in memory."""

    @classmethod
    def of(cls, kind: str, cache: str) -> Abilities:
        """Returns them by names in `kvferry.tools.synthetic.KINDS` and `like_contexts.CACHES`."""
        recurs = kind in RECURRENT
        # Quantised latent rows end the process.
        shiftable = kind in ("llama", "gemma3") or (kind == "deepseek2" and "_0" not in cache)
        return cls(
            kind=kind,
            recurs=recurs,
            shifts=shiftable,
            appends=not recurs and kind != "gemma3",
            streams="streams" in cache,
            windows=kind in ("gemma3", "hybrid-iswa"),
            interleaves="transposed" in cache,
        )
