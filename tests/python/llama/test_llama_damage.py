"""Truncated and damaged states are refused before libllama sees them, without any loss.

libllama does not check what it loads. Some damaged states end the process in an assertion, others
take cells that cannot be freed again, others leave the target partly filled. After a refusal by
kvferry the target and the other sequences are as they were, and every cell can still be used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import kvferry
import pytest
from support.devices import DEVICES
from support.like_contexts import CACHES, MakeContext
from support.llama_reference import Context, Refused
from support.programs import run_python
from support.state_fields import LAST_POSITION, StateField, state_fields

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


class Scene:
    """A context with sequences 0 and 1 in use, and all that must be unchanged in the end."""

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
        """Fills the cache to the last cell, with the target empty."""
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


def cleared_context(make_context: MakeContext, kind: str, cache: str) -> Context:
    """Returns a context that kvferry does not know, and whose sequences are empty."""
    context = make_scene(make_context, kind, cache).context
    context.clear()
    return context


def cuts(fields: list[StateField]) -> set[int]:
    """Returns the offset of every field's first byte, and an offset in the field."""
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
    """libllama ignores further bytes, but no save has written such a buffer."""
    scene = make_scene(make_context, kind, cache)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(scene.context.address)
        for more in (b"\0", bytes(4), bytes(12), bytes(100), scene.state, scene.state[8:]):
            with pytest.raises(DAMAGED):
                await llama.load(scene.state + more, TARGET)
            scene.assert_nothing_lost()
        await assert_good_load(scene, llama)


NUMBERS = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 100, 256, 257, 4096, 2**31 - 1, 2**31, 2**63]


TWO_ATTENTIONS = ("gemma3", "hybrid-iswa", "deepseek32")
"""Kinds that keep each of the few tokens of these states in two sections."""


def is_harmless(kind: str, field: StateField, state: bytes) -> bool:
    """Whether a state that differs only in this field could have been saved: a load ignores ids of
    sequences, and accepts any position after which decoding can continue, unless another section
    holds the same token at another position.
    """
    if field.name.endswith(".position"):
        if kind in TWO_ATTENTIONS and field.name.startswith("attention"):
            return False
        return 0 <= field.read(state) <= LAST_POSITION
    return field.name.endswith((".sequence", ".x", ".y", ".token"))


@each_kind_and_cache
async def test_a_damaged_field_is_refused(make_context: MakeContext, kind: str, cache: str) -> None:
    scene = make_scene(make_context, kind, cache)
    refusals = 0
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(scene.context.address)
        # Of the cells only the first, one in the middle, and the last.
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
                if is_harmless(kind, field, damaged):
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
    """The types and sizes of the cache are not known yet. Some damage only libllama finds, after it
    has taken cells.
    """
    scene = make_scene(make_context, kind, cache)
    context = cleared_context(make_context, kind, cache)
    seen: set[str] = set()
    async with kvferry.Engine(DEVICES) as engine:
        for field in scene.fields:
            if field.is_data or field.name in seen:
                continue
            seen.add(field.name)
            for number in NUMBERS:
                damaged = field.replaced(scene.state, number)
                if damaged == scene.state or is_harmless(kind, field, damaged):
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
    """libllama would load the second stream over the first, with tensor bytes for both."""
    scene = make_scene(make_context, kind, "streams")
    context = scene.context if known else cleared_context(make_context, kind, "streams")
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
    """The structure is valid. libllama accepts it, and then the sequence has cells but no end."""
    scene = make_scene(make_context, kind, "flash")
    context = scene.context if known else cleared_context(make_context, kind, "flash")
    counts = [field for field in scene.fields if field.name.endswith(".cells")]
    ends = [field.begin for field in scene.fields if field.name == "attention.streams"][1:]
    ends += [field.begin for field in scene.fields if field.name == "recurrent.cells"]
    window = counts[1] if kind in ("gemma3", "hybrid-iswa") else None
    async with kvferry.Engine(DEVICES) as engine:
        for count, end in zip(counts, [*ends, len(scene.state)], strict=True):
            without = scene.state[: count.begin] + bytes(4)
            if count.name == "recurrent.cells":  # its layers are described nevertheless
                without += b"".join(
                    scene.state[field.begin : field.end]
                    for field in scene.fields
                    if field.begin > count.begin and ".cell." not in field.name
                    if not field.is_data
                )
            without += scene.state[end:]
            async with engine.attach(context.address) as llama:
                if known and count is window:
                    # A window that has lost its cells has such a state: it is loaded as it is.
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
    """The rest is valid. libllama would end the process: see test_synthetic_models.py."""
    scene = make_scene(make_context, "mamba", "flash")
    two = b""
    for field in scene.fields:
        piece = scene.state[field.begin : field.end]
        if field.name == "recurrent.cells":
            piece = (2).to_bytes(4, "little")
        elif field.name == "recurrent.cell.sequences":  # the last member of a cell
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
    """Runs in a process of its own, because a damaged state that reaches libllama may end it."""
    options = {"n_ctx": CELLS, **CACHES[cache]}
    if options.get("kv_unified") is False:
        options["n_ctx"] = 4 * CELLS
    arguments = [str(model_path(kind)), kind, json.dumps(options), "0", str(DAMAGES)]
    done = run_python("-m", "support.damage_states", *arguments, timeout=120)
    *numbers, last = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"damage {last}: {done.stderr[-2000:]}"
    assert numbers[-1] == str(DAMAGES - 1)
    assert int(last.removeprefix("refused ")) > DAMAGES // 2
