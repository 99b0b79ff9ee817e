"""Blocks and checkpoints that are damaged at random, or do not belong together: libllama dies of
none, and a context is usable after each (support/damage_blocks.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.block_reference import PARTS_IN_BLOCKS
from support.like_contexts import CACHES
from support.programs import run_python

COUNT = 250


@pytest.mark.parametrize("kind", PARTS_IN_BLOCKS)
@pytest.mark.parametrize("cache", ["flash", "transposed-streams"])
def test_no_composed_state_ends_the_process_or_leaves_cells(
    model_path: Callable[..., Path], kind: str, cache: str
) -> None:
    options = {"n_ctx": 256} | CACHES[cache]
    if "streams" in cache:
        options["n_ctx"] = 1024
    arguments = (str(model_path(kind)), kind, json.dumps(options), "0", str(COUNT))
    done = run_python("-m", "support.damage_blocks", *arguments, timeout=120)
    tried = done.stdout.split()
    assert done.returncode == 0, (tried[-1:], done.stderr)
    outcomes = json.loads(done.stdout.splitlines()[-1])
    # The states are of both sorts.
    assert outcomes["KVF_OK"] > COUNT / 20
    assert outcomes["KVF_ERR_STATE_DAMAGED"] > COUNT / 5
