"""The sizes of synthetic models."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of a model. A kind ignores the sizes that it does not have.

    `vocabulary` and `context` count tokens, `window` the tokens that a sliding-window layer sees,
    `state` the numbers that a recurrent layer keeps for each channel, `rank` the numbers of a
    latent row. The others are widths in numbers, or counts.
    """

    layers: int = 4
    embedding: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    feed_forward: int = 256
    vocabulary: int = 512
    context: int = 4096
    window: int = 32
    state: int = 16
    rank: int = 64

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token in an F16 cache if every layer attends, as in `llama`."""
        return self.layers * 2 * self.kv_heads * self.head_dim * 2


GEOMETRIES: dict[str, Geometry] = {
    "small": Geometry(),
    # Another number of layers and another width of every row: states of "small" do not fit.
    "other": Geometry(layers=6, embedding=192, heads=6, kv_heads=3, state=8, rank=96),
    # The cache of an 8B Llama, 128 KiB a token in rows of 2 KiB, with very little arithmetic.
    "demo": Geometry(
        layers=32,
        embedding=64,
        heads=8,
        kv_heads=8,
        head_dim=128,
        feed_forward=64,
        context=131072,
    ),
    # 1 MiB a token: a state of 1 GiB after 1024 tokens. Few, because attention takes time by tokens
    # times bytes.
    "bench": Geometry(
        layers=32,
        embedding=32,
        heads=64,
        kv_heads=64,
        head_dim=128,
        feed_forward=32,
        context=131072,
    ),
}
"""Named geometries. "demo" and "bench" are for the kind `llama`.

On one thread of a cloud machine (EPYC, AVX-512, llama.cpp b10361) a token of a "small" model takes
0.2 to 0.5 ms. A prompt of "demo" takes 0.9 s for 512 tokens (64 MiB) and 9 s for 2048 (256 MiB), a
prompt of "bench" 1.8 s for 256 tokens (256 MiB) and 18 s for 1024 (1 GiB).
"""
