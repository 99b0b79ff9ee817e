"""Short random walks (support/random_walk) with fixed seeds. `make soak` runs longer ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import soak
from support.abilities import Abilities
from support.block_reference import PARTS_IN_BLOCKS, WITH_CHECKPOINTS
from support.cuda_driver import NEEDS_CUDA
from support.devices import ON_GPU
from support.like_contexts import MakeContext
from support.random_walk import Walk, cache_options
from support.simulated_cuda import SimulatedCuda

pytestmark = NEEDS_CUDA

STEPS = 150

WALKS = [
    # These walks find faults that have been repaired, if the repairs are removed: a pending shift
    # rewrites all keys, recurrent cells are moved, other sequences take cells of a window.
    *[("llama", "q8_0", seed) for seed in (2, 3)],
    ("llama", "q4_0", 4),
    *[("hybrid", "flash", seed) for seed in (2, 5)],
    *[("gemma3", "q8_0", seed) for seed in (4, 7)],
    ("gemma3", "flash", 6),
    ("hybrid-iswa", "flash", 5),
    # These walks are for other faults.
    ("mamba", "flash", 0),
    *[("llama", cache, 0) for cache in ("flash", "transposed", "streams", "f32")],
    *[("gemma3", cache, 1) for cache in ("transposed", "streams")],
    *[(kind, "flash", 0) for kind in ("deepseek2", "deepseek32", "qwen2vl")],
    ("hybrid", "streams", 0),
    ("hybrid-iswa", "transposed-streams", 0),
]


def take_steps(walk: Walk) -> None:
    for _ in range(STEPS):
        try:
            walk.step()
        except BaseException:
            print("step", walk.steps, *walk.history, sep="\n  ")
            raise


@pytest.mark.parametrize(("kind", "cache", "seed"), WALKS)
def test_whatever_is_done_beside_transfers_is_done_as_by_llama_cpp(
    cuda: SimulatedCuda, make_context: MakeContext, kind: str, cache: str, seed: int
) -> None:
    ours, like = (make_context(kind, **cache_options(cache)) for _ in range(2))
    with Walk(cuda, ours, like, Abilities.of(kind, cache), seed) as walk:
        take_steps(walk)
    # With transposed values, comparing states waits for transfers in flight. On a GPU a short walk
    # may meet no transfer that lasts.
    assert walk.done["decode beside"] > 0 or "transposed" in cache or ON_GPU


WALKS_WITH_BLOCKS = [
    *[("llama", cache, 0) for cache in ("flash", "transposed", "streams", "q8_0")],
    *[("gemma3", cache, 1) for cache in ("flash", "transposed", "streams")],
    *[(kind, "flash", 2) for kind in ("deepseek2", "deepseek32", "qwen2vl", "mamba")],
    *[("hybrid", cache, 3) for cache in ("flash", "streams")],
    *[("hybrid-iswa", cache, 4) for cache in ("flash", "transposed-streams")],
]


@pytest.mark.parametrize(("kind", "cache", "seed"), WALKS_WITH_BLOCKS)
def test_blocks_are_moved_beside_other_operations_as_by_llama_cpp(
    cuda: SimulatedCuda, make_context: MakeContext, kind: str, cache: str, seed: int
) -> None:
    ours, like = (make_context(kind, **cache_options(cache)) for _ in range(2))
    with Walk(cuda, ours, like, Abilities.of(kind, cache), seed, blocks=True) as walk:
        take_steps(walk)
    assert walk.done["load_blocks"] > 0
    assert walk.done["save_blocks"] > 0 or kind not in PARTS_IN_BLOCKS
    assert walk.done["save_checkpoint"] > 0 or kind not in {*WITH_CHECKPOINTS, "mamba"}


def test_a_soak_says_what_it_did(
    cuda: SimulatedCuda, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--kinds=llama", "--caches=flash", "--steps=20", "--states=0", "--seeds=7"]
    assert soak.main(arguments) == 0
    [line, total] = capsys.readouterr().out.splitlines()
    assert line.startswith("llama flash seed 7: 20 steps, ")
    assert total.startswith("1 walk, 20 steps, ")


def test_a_soak_says_what_became_of_composed_states(
    cuda: SimulatedCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--kinds=hybrid-iswa", "--caches=flash", "--steps=0", "--states=40", "--seeds=3"]
    assert soak.main(arguments) == 0
    [line, total] = capsys.readouterr().out.splitlines()
    assert line.startswith("hybrid-iswa flash seed 3: 40 composed states, ")
    assert "KVF_ERR_STATE_DAMAGED" in line
    assert total.startswith("40 composed states, ")
