"""All kinds of synthetic models in the real libllama, and llama.cpp's own saving and loading of
their sequences: the facts on which the tests of kvferry depend."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvferry.tools.synthetic import GEOMETRIES, KINDS, write_model
from support.like_contexts import CACHES, LATENT, RECURRENT, MakeContext
from support.llama_reference import UNFRAMED, CacheType, Model, Refused, log_lines
from support.programs import run_python

MakeModel = Callable[..., Model]

each_kind = pytest.mark.parametrize("kind", KINDS)
each_kind_and_cache = pytest.mark.parametrize(
    ("kind", "cache"),
    [
        (kind, cache)
        for kind in KINDS
        for cache in CACHES
        if not (kind in LATENT and cache == "q8_0-keys-transposed")
    ],
)


def cell_data(state: bytes) -> bytes:
    """Returns a state without the id of its sequence, which is in the header."""
    return state[8:]


@each_kind
def test_decodes_to_finite_logits_that_depend_on_the_prompt(
    make_context: MakeContext, kind: str
) -> None:
    context = make_context(kind)
    first = context.decode(0, context.model.prompt(40, seed=1))
    second = context.decode(1, context.model.prompt(40, seed=2))
    assert np.isfinite(first).all()
    assert np.isfinite(second).all()
    assert np.abs(first - second).max() > 0.1


@each_kind
@pytest.mark.parametrize("difference", [{"seed": 1}, {"geometry": "other"}], ids=["seed", "other"])
def test_seed_and_geometry_make_another_model(
    make_context: MakeContext, model: MakeModel, kind: str, difference: dict[str, Any]
) -> None:
    context, other = make_context(kind), make_context(model(kind, **difference))
    prompt = context.model.prompt(20)
    assert np.abs(context.decode(0, prompt) - other.decode(0, prompt)).max() > 0.1
    # Another seed keeps the layout of the state, another geometry changes it.
    assert (context.state_size(0) == other.state_size(0)) == ("seed" in difference)


@each_kind
def test_same_arguments_write_the_same_file(tmp_path: Path, kind: str) -> None:
    first = write_model(kind, tmp_path / "first.gguf", seed=3)
    second = write_model(kind, tmp_path / "second.gguf", seed=3)
    assert first.read_bytes() == second.read_bytes()
    assert list(tmp_path.glob("*.partial")) == []


@each_kind
def test_kind_is_what_llama_says_of_it(model: MakeModel, kind: str) -> None:
    one = model(kind)
    assert one.is_recurrent == (kind == "mamba")
    if kind != "deepseek4":  # which b10068 does not call hybrid
        assert one.is_hybrid == (kind in RECURRENT - {"mamba"})
    assert one.n_swa == (GEOMETRIES["small"].window if kind in {"gemma3", "hybrid-iswa"} else 0)


def test_demo_geometry_has_the_cache_of_an_8b_llama(
    make_context: MakeContext, model: MakeModel
) -> None:
    assert GEOMETRIES["demo"].bytes_per_token == 128 * 1024
    context = make_context(model("llama", geometry="demo"))
    context.decode(0, [1])
    before = context.state_size(0)
    context.decode(0, [2])
    # A cell's own record is its position, a count and an id.
    assert context.state_size(0) - before == 128 * 1024 + 12


def test_unknown_kind_geometry_and_size_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="unknown kind"):
        write_model("gpt", path)
    with pytest.raises(ValueError, match="unknown geometry"):
        write_model("llama", path, geometry="vast")
    with pytest.raises(ValueError, match="unknown sizes: colour"):
        write_model("llama", path, colour=3)
    assert list(tmp_path.iterdir()) == []


def test_missing_gguf_is_said_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        write_model("llama", tmp_path / "model.gguf")


@each_kind_and_cache
def test_llama_loads_what_it_saved(make_context: MakeContext, kind: str, cache: str) -> None:
    """The target is in another context of the same kind, so that both have the same cells."""
    source, target = make_context(kind, **CACHES[cache]), make_context(kind, **CACHES[cache])
    source.decode(0, source.model.prompt(40))
    state = source.state_get(0)
    assert len(state) == source.state_size(0)

    assert target.state_set(0, state) == len(state)
    assert target.state_get(0) == state
    logits, loaded = source.decode(0, [7]), target.decode(0, [7])
    if kind != "qwen4exp":  # to which 0.6.0-dev gives other ones after its own load
        assert np.array_equal(logits, loaded)


@each_kind_and_cache
def test_llama_loads_a_scattered_sequence_into_another(
    make_context: MakeContext, kind: str, cache: str
) -> None:
    context = make_context(kind, **CACHES[cache])
    context.decode_in_turn([0, 1, 3], 10)
    context.decode_at_random([0, 1, 3], 10)
    state = context.state_get(0)

    assert context.state_set(2, state) == len(state)
    loaded = context.state_get(2)
    assert len(loaded) == len(state)
    if kind == "mamba":
        assert cell_data(loaded) == cell_data(state)
    assert context.pos_max(2) == context.pos_max(0) == 19
    if kind == "deepseek4":
        return  # llama.cpp's own load leaves other logits in another sequence
    # In other cells the sums are taken in another order.
    np.testing.assert_allclose(context.decode(2, [7]), context.decode(0, [7]), atol=0.05)


@each_kind
def test_quantised_values_need_flash_attention(make_context: MakeContext, kind: str) -> None:
    with pytest.raises(Refused, match="requires flash_attn"):
        make_context(kind, flash_attention=False, type_k=CacheType.Q8_0, type_v=CacheType.Q8_0)


@each_kind
def test_only_recurrent_kinds_keep_a_sequence_whole(make_context: MakeContext, kind: str) -> None:
    context = make_context(kind)
    context.decode(0, context.model.prompt(20))
    assert context.seq_rm(0, 10, -1) == (kind not in RECURRENT)
    assert context.pos_max(0) == (19 if kind in RECURRENT else 9)


@pytest.mark.skipif(UNFRAMED, reason="masked cells are saved too")
@pytest.mark.parametrize("kind", ["gemma3", "hybrid-iswa"])
def test_sliding_window_saves_only_what_the_window_sees(
    make_context: MakeContext, kind: str
) -> None:
    """The state of a window stops growing, also with `swa_full`: masked cells are left out."""
    for swa_full in (False, True):
        context = make_context(kind, swa_full=swa_full, n_ctx=1024)
        context.decode(0, context.model.prompt(100))
        before = context.state_size(0)
        context.decode(0, [1])
        global_layers = GEOMETRIES["small"].layers // 2 if kind == "gemma3" else 0
        row = 2 * GEOMETRIES["small"].kv_heads * GEOMETRIES["small"].head_dim * 2
        assert context.state_size(0) - before == global_layers * row + 12


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in RECURRENT])
def test_loading_an_empty_state_leaves_the_target_as_it_was(
    make_context: MakeContext, kind: str
) -> None:
    """llama.cpp reports success. To get an empty target, it must be removed first."""
    context = make_context(kind)
    context.decode(0, context.model.prompt(20))
    empty = context.state_get(1)
    assert context.state_set(0, empty) == len(empty)
    assert context.pos_max(0) == 19


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mamba"])
def test_copy_between_streams_is_pending_until_a_decode(
    make_context: MakeContext, kind: str
) -> None:
    """Until then llama.cpp saves old bytes, and a load into the copy is overwritten."""
    context = make_context(kind, kv_unified=False, n_ctx=2048)
    context.decode(0, context.model.prompt(20))
    context.decode(1, context.model.prompt(20, seed=1))
    context.seq_cp(0, 2)
    stale = context.state_get(2)
    other = context.state_get(1)
    context.state_set(2, other)
    loaded = context.state_get(2)
    context.decode(3, [1])
    copied = context.state_get(2)
    assert stale != copied
    assert loaded != copied


ABORTS = {
    # Valid except for the number of cells: states that llama.cpp writes have one.
    "two-recurrent-cells": (
        "mamba",
        """
state = context.state_get(0)
start = 0 if UNFRAMED else 8
header, cell, rest = state[:start], state[start + 4 : start + 12], state[start + 12 :]
context.state_set(1, header + (2).to_bytes(4, "little") + 2 * cell + rest)
""",
    ),
    "sequence-out-of-range": ("llama", "context.state_set(256, context.state_get(0))"),
}


@pytest.mark.parametrize(("kind", "damage"), ABORTS.values(), ids=ABORTS.keys())
def test_llama_aborts_the_process_on(
    model_path: Callable[..., Path], kind: str, damage: str
) -> None:
    """Such input must not reach libllama, because it ends the whole process."""
    script = f"""
from support.llama_reference import UNFRAMED, Model
context = Model({str(model_path(kind))!r}).context()
context.decode(0, [1, 2, 3])
{damage}
"""
    child = run_python("-c", script)
    assert child.returncode == -signal.SIGABRT, child.stderr
    assert "GGML_ASSERT" in child.stderr


def test_refusals_are_found_in_the_log(make_context: MakeContext) -> None:
    context = make_context("llama")
    assert context.state_set(0, b"no state at all") == 0
    reason = "n_stream mismatch" if UNFRAMED else "wrong sequence state magic"
    assert any(reason in line for line in log_lines)


def test_geometry_is_replaced_size_by_size(tmp_path: Path) -> None:
    small = write_model("llama", tmp_path / "small.gguf")
    wide = write_model(
        "llama", tmp_path / "wide.gguf", geometry=dataclasses.replace(GEOMETRIES["small"], layers=8)
    )
    same = write_model("llama", tmp_path / "same.gguf", layers=8)
    assert wide.read_bytes() == same.read_bytes() != small.read_bytes()
