"""`kvferry bench blocks`: blocks beside whole states."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kvferry.tools import libllama
from kvferry.tools.bench.pictures import Growth, draw_growth
from support.llama_reference import LIBRARY_FOLDER, keep_log
from support.programs import run_kvferry

TOKENS = 512
TURNS = (TOKENS + 8 * 256) // 256


@pytest.fixture(autouse=True)
def others_get_their_log_back() -> Iterator[None]:
    yield
    keep_log()


def bench(
    folder: Path, *only: str, tokens: int = TOKENS, environment: dict[str, str] | None = None
) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the results by stage and name, of the measurements whose names contain a text."""
    chosen = [argument for text in only for argument in ("--only", text)]
    done = run_kvferry(
        *("bench", "blocks", "--tokens", str(tokens), "--out", str(folder), *chosen),
        *(["--device", "cuda"] if environment else ["--device", "host"]),
        environment=environment,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "bench.json").read_text())["results"]
    return {(each["stage"], each["name"]): each for each in results}


def test_blocks_are_measured_beside_whole_states(tmp_path: Path) -> None:
    results = bench(tmp_path, "contiguous: save of 256", "contiguous: thread", "bit-identical")

    identical = [each for (_, name), each in results.items() if name == "bit-identical"]
    assert [each["stage"] for each in identical] == ["contiguous", "V transposed", "four in turn"]
    assert [each["met"] for each in identical] == [True] * 3
    saved = results["contiguous", "save of 256 new tokens, submit to completion"]
    assert saved["value"] == saved["details"]["new_ms"] > 0
    held = results["contiguous", "thread held by a save of 256 new tokens"]
    assert held["value"] == held["details"]["new_held_ms"] > 0
    ratio = results["contiguous", "save of 256 new tokens against the whole state"]
    details = ratio["details"]
    assert ratio["value"] == pytest.approx(details["state_ms"] / details["new_ms"])
    assert ratio["goal"] == "≥ 20"


def test_the_bytes_of_a_turn_are_those_of_its_tokens(tmp_path: Path) -> None:
    results = bench(tmp_path, "bytes moved")

    (line,) = results.values()
    turns = line["details"]["turns"]
    assert [turn["tokens"] for turn in turns] == [256 * (turn + 1) for turn in range(TURNS)]
    # Every block has as many tokens, and the first block is the whole state.
    assert {turn["block_bytes"] for turn in turns} == {turns[0]["state_bytes"]}
    growth = {b["state_bytes"] - a["state_bytes"] for a, b in itertools.pairwise(turns)}
    assert len(growth) == 1
    assert growth.pop() == pytest.approx(turns[0]["block_bytes"], rel=0.01)
    last = turns[-8:]
    blocks, states = (sum(turn[f"{kind}_bytes"] for turn in last) for kind in ("block", "state"))
    assert line["value"] == blocks / states
    picture = (tmp_path / "turns.png").read_bytes()
    assert int.from_bytes(picture[16:20], "big") == 1200  # pixels wide


def test_a_history_need_not_fill_its_last_block(tmp_path: Path) -> None:
    results = bench(tmp_path, "contiguous: bit", "contiguous: save of 256", tokens=300)

    assert results["contiguous", "bit-identical"]["met"] is True
    assert results["contiguous", "bit-identical"]["limit"].startswith("2 blocks")


def test_everything_is_measured_on_cuda(tmp_path: Path) -> None:
    """On the simulated driver, which shows that it runs, but not how fast."""
    only = (
        "bit-identical",
        "urgent",
        "a save of blocks",
        "a load of blocks",
        "new tokens",
        "bytes moved",
    )

    results = bench(
        tmp_path,
        *only,
        tokens=64,
        environment={"KVFERRY_CUDA_DRIVER": os.environ["KVFERRY_SIMULATED_CUDA"]},
    )

    stages = ["contiguous", "V transposed", "four in turn", "at random"]
    assert list(dict.fromkeys(stage for stage, _ in results)) == stages
    for stage in stages:
        assert results[stage, "bit-identical"]["met"] is True
        for name in ("urgent save of blocks", "urgent load of blocks"):
            assert results[stage, name]["value"] > 0
    assert results["contiguous", "urgent save of blocks"]["goal"] == "≥ 0.97"


def test_decode_apart_gives_the_cells_and_positions_of_decode(
    model_path: Callable[..., Path],
) -> None:
    library = libllama.Libllama(libllama.find(LIBRARY_FOLDER))
    options = libllama.ContextOptions(n_ctx=256, n_seq_max=3, threads=1)
    tokens = [3, 1, 4, 1, 5]
    with libllama.Model(library, model_path("llama"), gpu=False) as model:
        sizes = []
        for apart in (False, True):
            with libllama.Context(model, options) as context:
                for _ in range(2):
                    if apart:
                        context.decode_apart(0, tokens, 1)
                    else:
                        context.decode([(0, token) for token in tokens])
                sizes.append(context.state_size(0))
                context.decode([(2, 1)])
                assert context.state_size(1) < context.state_size(2)  # the spare one is empty
        assert sizes[0] == sizes[1]


def test_draw_growth(tmp_path: Path) -> None:
    path = tmp_path / "turns.png"

    draw_growth(Growth("turns", [256], [8.0], [8.0]), path, heading="one turn")

    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
