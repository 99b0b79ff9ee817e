"""The layouts of a cache that the demonstration runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..workload import Arrangement


@dataclass(frozen=True)
class Layout:
    name: str
    arrangement: Arrangement = "alone"
    flash_attention: bool = True
    kind: str = "llama"
    sizes: Mapping[str, int] = field(default_factory=dict)
    """The sizes of the synthetic model that differ from the geometry "demo"."""
    most_tokens: int | None = None


LAYOUTS = [
    Layout("contiguous"),
    Layout("V transposed", flash_attention=False),
    Layout("fragmented", arrangement="in turn"),
]

# Caches where decoding overwrites what is being saved. They need models of their own, which are
# small.
OTHER_CACHES = [
    Layout("sliding window", kind="gemma3", sizes={"layers": 16, "window": 128}),
    Layout(
        "recurrent",
        kind="mamba",
        sizes={"layers": 16, "embedding": 256, "state": 256},
        most_tokens=64,  # slow to compute, and the state's size does not depend on it
    ),
]
