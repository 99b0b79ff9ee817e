"""Caches whose states have a format that kvferry does not know. Their states are moved whole, with
an envelope that finds damage before libllama sees the state.

Some cases run on a copy of libllama that begins its states with another number, others on models
whose states no known format describes. Each case runs in a process of its own (opaque_states.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.like_contexts import OPAQUE
from support.llama_reference import LIBRARY_FOLDER
from support.opaque_states import CASES
from support.programs import run_python
from support.unknown_format import NUMBERS

CANCEL_CASE = "a_load_that_is_cancelled_ends_once"
LEFTOVER_CASE = "a_trusted_load_that_leaves_cells_behind_says_so"
STREAM_CASE = "a_load_waits_for_the_stream_before_it_verifies"


def run_case(case: str, model: Path, foreign: Path, folder: Path, **options: Any) -> None:
    if case == STREAM_CASE and "KVFERRY_SIMULATED_CUDA" not in os.environ:
        pytest.skip("KVFERRY_SIMULATED_CUDA is not set")
    arguments = [case, str(model), str(foreign), json.dumps({"n_ctx": 256, **options})]
    done = run_python(
        *("-m", "support.opaque_states", *arguments),
        environment={"LLAMA_CPP_LIB_PATH": str(folder)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", NUMBERS)
def test_a_format_that_nobody_has_seen(
    unknown_libllama: Callable[[str], Path],
    model_path: Callable[..., Path],
    which: str,
    case: str,
) -> None:
    # Moving a state of 20 MiB takes some milliseconds. Other cases load many damaged states.
    geometry = "bench" if case == CANCEL_CASE else "small"
    model = model_path("llama", geometry=geometry)
    # A model with other weights and metadata, whose states would be accepted.
    foreign = model_path("llama", geometry=geometry, seed=1, context=8192)
    run_case(case, model, foreign, unknown_libllama(which))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in (CANCEL_CASE, LEFTOVER_CASE)]
)
@pytest.mark.parametrize("kind", sorted(OPAQUE))
def test_a_kind_of_cache_that_is_not_known(
    model_path: Callable[..., Path], kind: str, case: str
) -> None:
    run_case(case, model_path(kind), model_path(kind, seed=1, context=8192), LIBRARY_FOLDER)
