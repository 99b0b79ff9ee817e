"""Truncated and damaged states: refused before libllama sees them, and nothing is lost by it.

libllama trusts what it loads. Some damaged states end the process in an assertion, others take
cells that nothing can free again, others leave the target half filled. After a refusal by kvferry
the target and the other sequences are as they were, and every cell can still be used.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import kvferry
import pytest
from support.devices import DEVICES
from support.like_contexts import CACHES, MakeContext
from support.llama_reference import Context, Refused
from support.state_fields import LAST_POSITION, Field, state_fields

pytestmark = pytest.mark.anyio

PROMPT_TOKENS = 20
CELLS = 256
TARGET = 2
DAMAGED = (kvferry.StateDamaged, kvferry.StateMismatch)

KINDS_AND_CACHES = [
    ("llama", "flash"),
    ("llama", "transposed"),
    ("llama", "streams"),
    ("gemma3", "flash"),
    ("gemma3", "transposed-streams"),
    ("mamba", "flash"),
    ("hybrid", "flash"),
    ("hybrid", "streams"),
    ("hybrid-iswa", "flash"),
    ("deepseek2", "flash"),
    ("deepseek32", "flash"),
    ("qwen2vl", "flash"),
]
each_kind_and_cache = pytest.mark.parametrize(("kind", "cache"), KINDS_AND_CACHES)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Scene:
    """A context with sequences 0 and 1 in use, and all that must still be so at the end."""

    def __init__(self, context: Context, kind: str) -> None:
        self.context = context
        self.empty = context.state_get(TARGET)
        context.decode_in_turn([0, 1], PROMPT_TOKENS)
        self.others = [context.state_get(0), context.state_get(1)]
        self.state = self.others[0]
        self.fields = state_fields(kind, self.state)

    def assert_nothing_lost(self) -> None:
        context = self.context
        assert context.state_get(TARGET) == self.empty
        assert [context.state_get(0), context.state_get(1)] == self.others

    def assert_every_cell_can_be_used(self) -> None:
        """By filling the cache to the last cell, with the target empty."""
        context = self.context
        taken = 2 * PROMPT_TOKENS if context.options.kv_unified else 0
        context.decode(TARGET, context.model.prompt(CELLS - taken))
        if not context.model.is_recurrent:
            with pytest.raises(Refused):
                context.decode(TARGET, [1])
        context.seq_rm(TARGET)
        self.assert_nothing_lost()


def make_scene(make_context: MakeContext, kind: str, cache: str) -> Scene:
    options = {"n_ctx": CELLS, **CACHES[cache]}
    if options.get("kv_unified") is False:
        options["n_ctx"] = 4 * CELLS
    return Scene(make_context(kind, **options), kind)


async def assert_good_load(scene: Scene, llama: kvferry.Llama) -> None:
    """A whole state is still loaded, and is what it was in all that does not name its place."""
    await llama.load(scene.state, TARGET)
    assert scene.context.pos_max(TARGET) == PROMPT_TOKENS - 1
    await llama.load(await llama.save(TARGET), TARGET)
    await llama.remove(TARGET)
    scene.assert_nothing_lost()


def cuts(fields: list[Field]) -> set[int]:
    """Every length at which a field begins, and one within each."""
    return {at for field in fields for at in (field.begin, field.begin + field.size // 2)} - {0}


@each_kind_and_cache
async def test_a_truncated_state_is_refused(
    make_context: MakeContext, kind: str, cache: str
) -> None:
    scene = make_scene(make_context, kind, cache)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(scene.context.address)
        await llama.load(scene.state, TARGET)
        before = scene.context.state_get(TARGET)
        for length in cuts(scene.fields):
            with pytest.raises(DAMAGED):
                await llama.load(scene.state[:length], TARGET)
            assert scene.context.state_get(TARGET) == before, length
        await llama.remove(TARGET)
        scene.assert_nothing_lost()
        await assert_good_load(scene, llama)
        scene.assert_every_cell_can_be_used()


@each_kind_and_cache
async def test_a_state_with_something_behind_it_is_refused(
    make_context: MakeContext, kind: str, cache: str
) -> None:
    """libllama ignores it. But a buffer that is longer than its state was not what was saved."""
    scene = make_scene(make_context, kind, cache)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(scene.context.address)
        for more in (b"\0", bytes(4), bytes(12), bytes(100), scene.state, scene.state[8:]):
            with pytest.raises(DAMAGED):
                await llama.load(scene.state + more, TARGET)
            scene.assert_nothing_lost()
        await assert_good_load(scene, llama)


NUMBERS = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 100, 256, 257, 4096, 2**31 - 1, 2**31, 2**63]


def is_harmless(field: Field, state: bytes) -> bool:
    """Whether a state in which only this field may have changed is one that could have been saved:
    ids of sequences mean nothing to a load, and any position that can be gone on from is one.
    """
    if field.name.endswith(".position"):
        return 0 <= field.read(state) <= LAST_POSITION
    return field.name.endswith((".sequence", ".x", ".y", ".token"))


@each_kind_and_cache
async def test_a_damaged_field_is_refused(make_context: MakeContext, kind: str, cache: str) -> None:
    scene = make_scene(make_context, kind, cache)
    refusals = 0
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(scene.context.address)
        # Of the cells the first, one within, and the last.
        seen: dict[str, int] = {}
        await llama.load(scene.state, TARGET)
        before = scene.context.state_get(TARGET)
        for field in scene.fields:
            place = seen[field.name] = seen.get(field.name, -1) + 1
            if field.is_data or (".cell." in field.name and place not in (0, 7, 19)):
                continue
            now = field.read(scene.state)
            for number in [*NUMBERS, now - 1, now + 1, 2 * now, now // 2]:
                damaged = field.replaced(scene.state, number)
                if damaged == scene.state:
                    continue
                if is_harmless(field, damaged):
                    await llama.load(damaged, TARGET)
                    await llama.load(scene.state, TARGET)
                else:
                    with pytest.raises((*DAMAGED, kvferry.CacheFull)):
                        await llama.load(damaged, TARGET)
                    refusals += 1
                assert scene.context.state_get(TARGET) == before, (field, number)
        await llama.remove(TARGET)
        scene.assert_nothing_lost()
        await assert_good_load(scene, llama)
        scene.assert_every_cell_can_be_used()
    assert refusals > 100


@each_kind_and_cache
async def test_a_context_that_has_held_nothing_yet_refuses_them_too(
    make_context: MakeContext, kind: str, cache: str
) -> None:
    """There is nothing yet to compare a state's types and sizes with: some of it only libllama can
    say, when it has taken cells already.
    """
    scene = make_scene(make_context, kind, cache)
    context = make_scene(make_context, kind, cache).context
    context.clear()
    seen: set[str] = set()
    async with kvferry.Engine(DEVICES) as engine:
        for field in scene.fields:
            if field.is_data or field.name in seen:
                continue
            seen.add(field.name)
            for number in NUMBERS:
                damaged = field.replaced(scene.state, number)
                if damaged == scene.state or is_harmless(field, damaged):
                    continue
                async with engine.attach(context.address) as llama:
                    with pytest.raises(DAMAGED):
                        await llama.load(damaged, TARGET)
                assert context.state_get(TARGET) == scene.empty, (field, number)
        async with engine.attach(context.address) as llama:
            for length in sorted(cuts(scene.fields))[::7]:
                with pytest.raises(DAMAGED):
                    await llama.load(scene.state[:length], TARGET)
            await llama.load(scene.state, TARGET)
            await llama.remove(TARGET)
    context.decode(TARGET, context.model.prompt(CELLS))
    if not context.model.is_recurrent:
        with pytest.raises(Refused):
            context.decode(TARGET, [1])


@pytest.mark.parametrize("known", [True, False], ids=["in-use", "fresh"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "hybrid"])
async def test_a_state_whose_cells_lie_in_two_streams_is_refused(
    make_context: MakeContext, kind: str, known: bool
) -> None:
    """libllama would load the second over the first, with tensor bytes for both."""
    scene = make_scene(make_context, kind, "streams")
    context = scene.context if known else make_scene(make_context, kind, "streams").context
    if not known:
        context.clear()
    begins = [field.begin for field in scene.fields if field.name == "attention.cells"]
    first, second = begins[:2]
    twice = scene.state[:second] + scene.state[first:second] + scene.state[second + 4 :]
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        with pytest.raises(DAMAGED):
            await llama.load(twice, TARGET)
        assert context.state_get(TARGET) == scene.empty
        await llama.load(scene.state, TARGET)
        await llama.remove(TARGET)
    if known:
        scene.assert_nothing_lost()
        scene.assert_every_cell_can_be_used()


@pytest.mark.parametrize("known", [True, False], ids=["in-use", "fresh"])
@pytest.mark.parametrize("kind", ["gemma3", "hybrid", "hybrid-iswa", "deepseek32"])
async def test_a_state_that_lacks_the_cells_of_one_part_is_refused(
    make_context: MakeContext, kind: str, known: bool
) -> None:
    """Whole in its structure. libllama takes it, and the sequence then has cells but no end."""
    scene = make_scene(make_context, kind, "flash")
    context = scene.context if known else make_scene(make_context, kind, "flash").context
    if not known:
        context.clear()
    counts = [field for field in scene.fields if field.name.endswith(".cells")]
    ends = [field.begin for field in scene.fields if field.name == "attention.streams"][1:]
    ends += [field.begin for field in scene.fields if field.name == "recurrent.cells"]
    window = counts[1] if kind in ("gemma3", "hybrid-iswa") else None
    async with kvferry.Engine(DEVICES) as engine:
        for count, end in zip(counts, [*ends, len(scene.state)], strict=True):
            without = scene.state[: count.begin] + bytes(4)
            if count.name == "recurrent.cells":  # which has its layers described all the same
                without += b"".join(
                    scene.state[field.begin : field.end]
                    for field in scene.fields
                    if field.begin > count.begin and ".cell." not in field.name
                    if not field.is_data
                )
            without += scene.state[end:]
            async with engine.attach(context.address) as llama:
                if known and count is window:
                    # As a window is that has lost its cells: taken, and just that is loaded.
                    await llama.load(without, TARGET)
                    assert context.state_size(TARGET) == len(without)
                    await llama.remove(TARGET)
                    continue
                with pytest.raises(kvferry.StateDamaged, match="a part of the memory only"):
                    await llama.load(without, TARGET)
            assert context.state_get(TARGET) == scene.empty
    if known:
        scene.assert_nothing_lost()
        scene.assert_every_cell_can_be_used()


async def test_a_recurrent_state_of_two_cells_is_refused(make_context: MakeContext) -> None:
    """Well-formed otherwise; it ends the process in libllama: see test_synthetic_models.py."""
    scene = make_scene(make_context, "mamba", "flash")
    two = b""
    for field in scene.fields:
        piece = scene.state[field.begin : field.end]
        if field.name == "recurrent.cells":
            piece = (2).to_bytes(4, "little")
        elif field.name == "recurrent.cell.sequences":  # and so the end of the cell
            piece += two[-4:] + piece
        elif field.is_data:
            piece *= 2
        two += piece
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(scene.context.address)
        with pytest.raises(kvferry.StateDamaged):
            await llama.load(two, TARGET)
        scene.assert_nothing_lost()
        await assert_good_load(scene, llama)


# ---- At random -----------------------------------------------------------------------------------

DAMAGES = 500


@each_kind_and_cache
def test_states_damaged_at_random_are_refused(
    model_path: Callable[..., Path], kind: str, cache: str
) -> None:
    """In a process of its own, since one that libllama should not have been shown may end it."""
    options = {"n_ctx": CELLS, **CACHES[cache]}
    if options.get("kv_unified") is False:
        options["n_ctx"] = 4 * CELLS
    arguments = [str(model_path(kind)), kind, json.dumps(options), "0", str(DAMAGES)]
    done = subprocess.run(
        [sys.executable, "-m", "support.damage_states", *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    *numbers, last = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"damage {last}: {done.stderr[-2000:]}"
    assert numbers[-1] == str(DAMAGES - 1)
    assert int(last.removeprefix("refused ")) > DAMAGES // 2
