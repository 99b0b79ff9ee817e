"""Caches whose states are in a format that kvferry does not know: moved whole, guarded by an
envelope of its own, and refused by that before libllama sees what is damaged.

On a copy of libllama that begins its states with another number, and on models whose states no
known format describes. Each case, opaque_states.py has them, is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.like_contexts import OPAQUE
from support.llama_reference import LIBRARY_FOLDER
from support.opaque_states import CASES
from support.unknown_format import NUMBERS

CANCEL_CASE = "a_load_that_is_cancelled_ends_once"
LEFTOVER_CASE = "a_trusted_load_that_leaves_cells_behind_says_so"
STREAM_CASE = "a_load_waits_for_the_stream_before_it_verifies"


def run_case(case: str, model: Path, foreign: Path, folder: Path, **options: Any) -> None:
    if case == STREAM_CASE and "KVFERRY_SIMULATED_CUDA" not in os.environ:
        pytest.skip("KVFERRY_SIMULATED_CUDA is not set")
    arguments = [case, str(model), str(foreign), json.dumps({"n_ctx": 256, **options})]
    done = subprocess.run(
        [sys.executable, "-m", "support.opaque_states", *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
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
    # States of 20 MiB take some milliseconds to move; others are damaged again and again.
    geometry = "bench" if case == CANCEL_CASE else "small"
    model = model_path("llama", geometry=geometry)
    # It has other weights and says so, and its states fit.
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
