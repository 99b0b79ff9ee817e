"""The kinds of models and caches of walks."""

from __future__ import annotations

from typing import Any

from support.like_contexts import CACHES

KINDS = (
    "llama",
    "gemma3",
    "mamba",
    "hybrid",
    "hybrid-iswa",
    "deepseek2",
    "deepseek32",
    "qwen2vl",
)
"""The kinds of models. States of other kinds are opaque, and differ from those of llama.cpp."""

SEQUENCES = range(4)


def cache_options(cache: str) -> dict[str, Any]:
    """Returns options for a cache so small that the sequences of a walk compete for its cells."""
    options = {"n_ctx": 256, "n_ubatch": 32} | CACHES[cache]
    if "streams" in cache:
        options["n_ctx"] = 256 * len(SEQUENCES)
    return options
