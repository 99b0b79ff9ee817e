"""Blocks of random sequences: random cuts, saved in any order, after random histories.

`--hypothesis-profile=long` tries many more, and others each time.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.block_comparison import Comparison, Plan
from support.block_histories import SEQ, TARGET
from support.block_reference import PARTS_IN_BLOCKS, positions_in_order
from support.blocks import MakePair, ranges_that_begin_at
from support.c_interface import Engine, LoadMode, SaveMode
from support.like_contexts import CACHES, LATENT
from support.random_histories import History, histories


def make_plan(kind: str, positions: list[int], data: st.DataObject) -> Plan:
    """Draws where a sequence with these positions is cut, and what is done with its blocks."""
    begins = data.draw(st.sets(st.sampled_from(positions), max_size=6), label="cuts")
    ranges = ranges_that_begin_at(begins, positions)
    # Each block in one of up to three calls, which are in any order.
    chance = random.Random(data.draw(st.integers(0, 99), label="calls"))
    in_calls: list[list[int]] = [[] for _ in range(chance.choice((1, 1, 2, 3)))]
    for index in range(len(ranges)):
        chance.choice(in_calls).append(index)
    return Plan(
        ranges,
        [call for call in in_calls if call],
        data.draw(st.sampled_from((TARGET, TARGET, SEQ, 1)), label="target"),
        data.draw(st.sampled_from(SaveMode), label="save"),
        data.draw(st.sampled_from(LoadMode), label="load"),
    )


@pytest.mark.parametrize(
    ("kind", "cache"),
    [
        (kind, cache)
        for kind in PARTS_IN_BLOCKS
        for cache in CACHES
        if not (kind in LATENT and cache == "q8_0-keys-transposed")
    ],
)
def test_blocks_of_random_sequences_are_saved_and_loaded_as_by_llama_cpp(
    c_engine: Engine, pair: MakePair, kind: str, cache: str
) -> None:
    @given(histories(kind, cache), st.data())
    def compare(history: History, data: st.DataObject) -> None:
        both = pair(kind, cache)
        for context in both:
            history(context)
        positions = positions_in_order(kind, both[0].state_get(SEQ))
        assume(len(positions) > 1)
        plan = make_plan(kind, positions, data)
        with c_engine.attach(both[0].address) as attachment:
            Comparison(attachment, both, kind, history, plan).run()

    compare()
