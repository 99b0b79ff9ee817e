"""As ``matrix``, for ``kvferry bench blocks``: blocks beside whole states.

The goals are for 8,192 tokens in 32 blocks. On CUDA they are for an H100 or H200 and 1 GiB.
"""

from __future__ import annotations

from ..workload import SEQUENCES
from .conversation import LATER_TURNS
from .figures import beside_decoding, blocks, transfers
from .matrix import Bench, Shape, open_stage
from .measurement import Goal, Measurement, Stage, at_least, at_most
from .moved import BLOCK_TOKENS

_TOKENS = 8192
_TURNS = LATER_TURNS * BLOCK_TOKENS
_SEQUENCES = SEQUENCES + 1
"""One sequence without tokens, whose id a save of blocks can borrow."""

_BYTES_OF_TURNS = at_most(1 / 8)


def host(bench: Bench) -> list[Stage]:
    # 32 KiB a token: 256 MiB after 8192 tokens. The prompt is decoded apart, because attention
    # takes time by tokens x bytes.
    sizes = {"layers": 8, "embedding": 32, "feed_forward": 32}
    return [
        open_stage(
            bench,
            Shape("contiguous", _TOKENS, sizes=sizes, steps=_TURNS, apart=True),
            [
                blocks.same_bytes(),
                transfers.of_raw("save", None, moved="blocks"),
                transfers.of_raw("load", None, moved="blocks"),
                transfers.beyond_raw("load", None, moved="blocks"),
                *_new_tokens(None, None),
                blocks.times_as_fast(at_least(20)),
                *_beside_decoding(None, None),
                blocks.bytes_of_turns(_BYTES_OF_TURNS),
            ],
        ),
        open_stage(
            bench,
            Shape("V transposed", 1024, flash_attention=False, sizes=sizes, repeats=5),
            [
                blocks.same_bytes(),
                transfers.of_raw("save", None, moved="blocks"),
                transfers.of_raw("load", None, moved="blocks"),
                *_new_tokens(None, None),
            ],
        ),
        open_stage(
            bench,
            Shape("four in turn", 512, "in turn", sequences=_SEQUENCES, sizes=sizes, repeats=5),
            [
                blocks.same_bytes(),
                transfers.of_raw("save", None, moved="blocks"),
                transfers.of_raw("load", None, moved="blocks"),
                *_new_tokens(None, None),
            ],
        ),
    ]


def cuda(bench: Bench) -> list[Stage]:
    steps = 100
    return [
        open_stage(
            bench,
            Shape("contiguous", _TOKENS, steps=steps + _TURNS),
            [
                *_all_blocks(0.97),
                *_new_tokens(at_most(1.2), at_most(0.3)),
                *_beside_decoding(at_most(3), at_most(8)),
                blocks.bytes_of_turns(_BYTES_OF_TURNS),
            ],
        ),
        open_stage(
            bench,
            Shape("V transposed", _TOKENS, flash_attention=False),
            [*_all_blocks(0.95), *_new_tokens(None, None)],
        ),
        open_stage(
            bench,
            Shape("four in turn", _TOKENS, "in turn", sequences=_SEQUENCES, steps=steps),
            [
                *_all_blocks(0.95),
                *_new_tokens(at_most(2), at_most(1)),
                *_beside_decoding(at_most(4), at_most(9)),
            ],
        ),
        open_stage(
            bench,
            Shape("at random", _TOKENS, "at random", sequences=_SEQUENCES),
            [*_all_blocks(0.95), *_new_tokens(None, None)],
        ),
    ]


def _all_blocks(speed: float) -> list[Measurement]:
    return [
        blocks.same_bytes(),
        transfers.of_raw("save", at_least(speed), moved="blocks"),
        transfers.of_raw("load", at_least(speed), moved="blocks"),
        transfers.beyond_raw("save", None, moved="blocks"),
        transfers.beyond_raw("load", None, moved="blocks"),
        # This takes as much extra device memory as the blocks have bytes.
        transfers.beyond_raw("load", at_most(1), "ahead", moved="blocks"),
    ]


def _new_tokens(completion: Goal | None, held: Goal | None) -> list[Measurement]:
    return [blocks.new_tokens(completion), blocks.thread_held(held)]


def _beside_decoding(p50: Goal | None, p99: Goal | None) -> list[Measurement]:
    return [
        measurement
        for direction in ("save", "load")
        for measurement in (
            beside_decoding.decode_percentile(direction, 50, p50, "blocks"),
            beside_decoding.decode_percentile(direction, 99, p99, "blocks"),
            beside_decoding.background_speed(direction, None, "blocks"),
        )
    ]
