"""Store on the real libllama: what is kept is found by its tokens, and continues as llama.cpp's own
load of the same state does."""

from __future__ import annotations

import random

import anyio
import kvferry
import numpy as np
import pytest
from kvferry import Store
from support.block_histories import options
from support.devices import DEVICES
from support.empty_windows import KEPT, copy_the_beginning
from support.event_loops import anyio_backend  # noqa: F401
from support.like_contexts import CACHES, MakeContext
from support.llama_reference import Context

pytestmark = pytest.mark.anyio

KINDS = ["llama", "qwen2vl", "deepseek2", "deepseek32", "gemma3", "hybrid", "hybrid-iswa", "mamba"]
BLOCK = 64
TOKENS = 200
RAM = "64 MiB"


def prompted(make_context: MakeContext, kind: str, **options: object) -> tuple[Context, list[int]]:
    context = make_context(kind, **{"n_ctx": 1024, **options})
    prompt = context.model.prompt(TOKENS)
    context.decode(0, prompt)
    return context, prompt


# ---- Found again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_an_evicted_sequence_comes_back(make_context: MakeContext, kind: str) -> None:
    (context, prompt), (like, _) = prompted(make_context, kind), prompted(make_context, kind)
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM, block_tokens=BLOCK) as store:
        llama = engine.attach(context.address)
        assert (await store.find(llama, [*prompt, 7])).tokens == 0
        assert await store.keep(llama, 0, prompt) == TOKENS
        await llama.remove(0)
        found = await store.find(llama, [*prompt, 7])
        assert (found.tokens, found.tier) == (TOKENS, "ram")
        assert await store.restore(llama, 0, [*prompt, 7]) == TOKENS
    like.seq_rm(0)
    like.state_set(0, state)
    assert context.state_get(0) == like.state_get(0)
    assert np.array_equal(context.decode(0, [7]), like.decode(0, [7]))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_context_that_has_never_had_a_cell_finds_it(
    make_context: MakeContext, kind: str
) -> None:
    context, prompt = prompted(make_context, kind)
    state = context.state_get(0)
    fresh, like = (make_context(kind, n_ctx=1024) for _ in range(2))
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM, block_tokens=BLOCK) as store:
        await store.keep(engine.attach(context.address), 0, prompt)
        llama = engine.attach(fresh.address)
        assert llama.describe()["layout"] == ""
        assert await store.restore(llama, 0, [*prompt, 7]) == TOKENS
        assert llama.describe()["layout"] == engine.attach(context.address).describe()["layout"]
    like.state_set(0, state)
    assert fresh.state_get(0) == like.state_get(0)
    assert np.array_equal(fresh.decode(0, [7]), like.decode(0, [7]))


async def test_a_shared_beginning_is_kept_once_and_found(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    other = [*prompt[: 2 * BLOCK], *context.model.prompt(80, seed=1)]
    context.decode(1, other)
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM, block_tokens=BLOCK) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        before = store.stats()
        assert await store.keep(llama, 1, other) == len(other)
        # 64 + 16 tokens of their own.
        assert store.stats()["ram_entries"] == before["ram_entries"] + 2
        third = [*prompt[: 2 * BLOCK], *context.model.prompt(80, seed=2)]
        assert await store.restore(llama, 2, third) == 2 * BLOCK
        assert context.pos_max(2) == 2 * BLOCK - 1


async def test_only_what_is_new_is_saved(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM, block_tokens=BLOCK) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        saved = store.stats()["saved_bytes"]
        assert await store.keep(llama, 0, prompt) == TOKENS
        assert store.stats()["saved_bytes"] == saved
        turn = context.model.prompt(60, seed=3)
        context.decode(0, turn)
        assert await store.keep(llama, 0, prompt + turn) == TOKENS + 60
        new = store.stats()["saved_bytes"] - saved
        assert new == llama.block_size(64) + llama.block_size(4)


@pytest.mark.parametrize("kind", ["gemma3", "hybrid", "mamba"])
async def test_a_longer_prompt_is_restored_up_to_a_checkpoint(
    make_context: MakeContext, kind: str
) -> None:
    context, prompt = prompted(make_context, kind)
    turn = context.model.prompt(100, seed=3)
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM, block_tokens=BLOCK) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        await llama.run(context.decode, 0, turn)
        await store.keep(llama, 0, prompt + turn)
        # Another turn follows the same prompt: whole blocks behind it are of another conversation.
        other = prompt + context.model.prompt(100, seed=4)
        assert await store.restore(llama, 1, other) == TOKENS
        assert await store.restore(llama, 1, prompt + turn) == TOKENS
        assert await store.restore(llama, 1, prompt + turn, leave=0) == TOKENS + 100


async def test_a_token_is_left_to_be_decoded(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM, block_tokens=BLOCK) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        assert await store.restore(llama, 1, prompt) == 3 * BLOCK
        assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
        assert await store.restore(llama, 1, prompt[:1]) == 0
        assert context.pos_max(1) == -1, "what is not known leaves an empty sequence"


# ---- Not found -----------------------------------------------------------------------------------


async def test_owners_do_not_find_what_others_kept(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM, salt=b"a") as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        assert (await store.find(llama, prompt, leave=0)).tokens == TOKENS
        assert (await store.find(llama, prompt, leave=0, salt=b"b")).tokens == 0
        assert (await store.find(llama, prompt, leave=0, salt=b"")).tokens == 0
        assert await store.restore(llama, 1, prompt, leave=0, salt=b"b") == 0
        fresh = engine.attach(make_context("llama").address)
        assert (await store.find(fresh, prompt, leave=0, salt=b"b")).tokens == 0
        assert (await store.find(fresh, prompt, leave=0)).tokens == TOKENS


DIFFERENT = [options for name, options in CACHES.items() if name != "flash"]


@pytest.mark.parametrize("options", DIFFERENT, ids=[name for name in CACHES if name != "flash"])
@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
async def test_another_cache_finds_nothing(
    make_context: MakeContext, options: dict[str, object], seen: bool
) -> None:
    context, prompt = prompted(make_context, "llama")
    other = make_context("llama", **{"n_ctx": 1024, **options})
    if seen:
        other.decode(1, [1, 2, 3])
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM) as store:
        await store.keep(engine.attach(context.address), 0, prompt)
        llama = engine.attach(other.address)
        assert await store.restore(llama, 0, prompt, leave=0) == 0
        assert other.pos_max(0) == -1
        # Each of the two caches finds its own.
        other.decode(0, prompt)
        assert await store.keep(llama, 0, prompt) == TOKENS
        again = engine.attach(make_context("llama", **{"n_ctx": 1024, **options}).address)
        assert await store.restore(again, 0, prompt, leave=0) == TOKENS


async def test_nothing_is_kept_before_the_whole_layout_of_a_cache_is_known(
    make_context: MakeContext,
) -> None:
    """A sequence without a window tells what blocks need, but not what all parts look like."""
    context = make_context("gemma3", **options("flash"))
    copy_the_beginning(context)
    context.seq_rm(2)
    assert [context.pos_max(seq) for seq in (0, 1, 2)] == [-1, -1, -1]
    prompt = context.model.prompt(TOKENS)
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM, block_tokens=BLOCK) as store:
        llama = engine.attach(context.address)
        with pytest.raises(kvferry.SequenceEmpty, match="been whole"):
            await store.keep(llama, 0, context.model.prompt(150)[:KEPT])
        assert (await store.find(llama, prompt)).tokens == 0
        context.decode(1, prompt)
        assert await store.keep(llama, 1, prompt) == TOKENS
        fresh = engine.attach(make_context("gemma3", **options("flash")).address)
        assert await store.restore(fresh, 0, prompt, leave=0) == TOKENS


async def test_another_model_and_another_variant_find_nothing(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    other, _ = prompted(make_context, "gemma3")
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM) as store:
        await store.keep(engine.attach(context.address), 0, prompt)
        assert (await store.find(engine.attach(other.address), prompt, leave=0)).tokens == 0
        adapted = engine.attach(context.address, variant="an adapter")
        assert (await store.find(adapted, prompt, leave=0)).tokens == 0


async def test_other_tokens_find_nothing(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM, block_tokens=BLOCK) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        for index in (0, 63, 64, 127, 128, 191, 192, 199):
            changed = list(prompt)
            changed[index] = (changed[index] + 1) % context.model.vocabulary
            found = (await store.find(llama, changed, leave=0)).tokens
            assert found == index // BLOCK * BLOCK


# ---- Refused -------------------------------------------------------------------------------------


async def test_what_a_sequence_does_not_hold_is_not_kept(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    hybrid, _ = prompted(make_context, "hybrid")
    empty = make_context("llama")
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM, block_tokens=BLOCK) as store:
        llama = engine.attach(context.address)
        with pytest.raises(kvferry.InvalidArgument, match="192 to 201"):
            await store.keep(llama, 0, [*prompt, 1, 2])
        with pytest.raises(kvferry.InvalidArgument, match="ends with position 199, not 149"):
            await store.keep(engine.attach(hybrid.address), 0, prompt[:150])
        with pytest.raises(kvferry.SequenceEmpty):
            await store.keep(engine.attach(empty.address), 0, prompt)
        with pytest.raises(kvferry.SequenceEmpty):
            await store.keep(llama, 2, prompt)
        assert store.stats()["ram_entries"] == 0
        assert store.stats()["ram_reserved"] == 0


async def test_an_opaque_cache_says_why_it_is_refused(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "deepseek4")
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM) as store:
        llama = engine.attach(context.address)
        with pytest.raises(kvferry.KvferryError, match="not known to kvferry"):
            await store.keep(llama, 0, prompt)
        assert (await store.find(llama, prompt)).tokens == 0


@pytest.mark.parametrize("ram", ["8 GB2", "", "GiB", "-1 GiB", "0", 0, -5, "1 gib"])
def test_sizes_that_make_no_sense_are_refused(ram: object) -> None:
    with pytest.raises(kvferry.InvalidArgument, match="ram is"):
        Store(ram=ram)  # type: ignore[arg-type]


def test_sizes_are_numbers_or_words() -> None:
    for ram, nbytes in (("8 GiB", 8 << 30), ("1.5MiB", 3 << 19), ("2 GB", 2 * 10**9), (5, 5)):
        assert Store(ram=ram).stats()["ram_limit"] == nbytes  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Store(ram=1.5)  # type: ignore[arg-type]


# ---- The budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "hybrid", "mamba"])
async def test_the_budget_holds_over_random_operations(
    make_context: MakeContext, kind: str
) -> None:
    chooser = random.Random(5)
    context = make_context(kind, n_ctx=1024)
    conversations = [context.model.prompt(20 + 30 * index, seed=index) for index in range(6)]
    async with kvferry.Engine(DEVICES) as engine, Store(ram="1 MiB", block_tokens=32) as store:
        llama = engine.attach(context.address)
        pinned = False
        for _ in range(80):
            tokens = chooser.choice(conversations)
            match chooser.randrange(5):
                case 0 | 1:
                    await llama.remove(0)
                    await llama.run(context.decode, 0, tokens)
                    await store.keep(llama, 0, tokens, name=f"{len(tokens)}")
                case 2:
                    count = await store.restore(llama, 1, tokens, leave=0)
                    assert context.pos_max(1) == count - 1
                case 3 if store.list():
                    name = chooser.choice(store.list()).name
                    (store.unpin if pinned else store.pin)(name)
                    pinned = not pinned
                case 4 if store.list():
                    store.evict(chooser.choice(store.list()).name)
            stats = store.stats()
            assert stats["ram_used"] + stats["ram_reserved"] <= 1 << 20
            assert stats["ram_reserved"] == 0
        store.clear()
        assert store.stats()["ram_used"] == store.stats()["ram_entries"] == 0


async def test_a_pinned_conversation_stays_and_others_go(make_context: MakeContext) -> None:
    context = make_context("llama", n_ctx=1024)
    async with kvferry.Engine(DEVICES) as engine, Store(ram="1 MiB", block_tokens=BLOCK) as store:
        llama = engine.attach(context.address)
        first = context.model.prompt(100, seed=0)
        await llama.run(context.decode, 0, first)
        assert await store.keep(llama, 0, first, name="first") == 100
        store.pin("first")
        for seed in range(1, 30):
            tokens = context.model.prompt(100, seed=seed)
            await llama.remove(0)
            await llama.run(context.decode, 0, tokens)
            await store.keep(llama, 0, tokens)
        assert store.stats()["evicted"] > 0
        assert (await store.find(llama, first, leave=0)).tokens == 100
        assert [each.name for each in store.list() if each.pinned] == ["first"]
        assert store.evict("first") == 2
        assert (await store.find(llama, first, leave=0)).tokens == 0


async def test_what_has_expired_is_not_found_and_can_be_kept_again(
    make_context: MakeContext,
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM, block_tokens=BLOCK) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt, ttl=0.0)
        assert (await store.find(llama, prompt, leave=0)).tokens == 0
        assert await store.keep(llama, 0, prompt) == TOKENS
        assert (await store.find(llama, prompt, leave=0)).tokens == TOKENS


# ---- Many tasks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
async def test_many_tasks_keep_find_and_restore(make_context: MakeContext, kind: str) -> None:
    context = make_context(kind, n_ctx=1024, n_seq_max=8)
    prompts = [context.model.prompt(100, seed=index) for index in range(4)]
    for seq, prompt in enumerate(prompts):
        context.decode(seq, prompt)

    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM, block_tokens=32) as store:
        llama = engine.attach(context.address)

        async def work(seq: int) -> None:
            for _ in range(5):
                assert await store.keep(llama, seq, prompts[seq]) == 100
                assert await store.restore(llama, seq + 4, prompts[seq], leave=0) == 100

        async with anyio.create_task_group() as tasks:
            for seq in range(4):
                tasks.start_soon(work, seq)
                tasks.start_soon(store.keep, llama, seq, prompts[seq])
        per_conversation = 4 + (kind == "hybrid")
        assert store.stats()["ram_entries"] == 4 * per_conversation
        assert store.stats()["ram_reserved"] == 0


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
async def test_a_cancelled_keep_leaves_nothing_behind(make_context: MakeContext, kind: str) -> None:
    context, prompt = prompted(make_context, kind)
    chooser = random.Random(3)
    async with kvferry.Engine(DEVICES) as engine, Store(ram=RAM, block_tokens=32) as store:
        llama = engine.attach(context.address)
        for _ in range(30):
            with anyio.move_on_after(chooser.random() * 0.003):
                await store.keep(llama, 0, prompt)
            assert store.stats()["ram_reserved"] == 0
            with anyio.move_on_after(chooser.random() * 0.003):
                await store.restore(llama, 1, prompt)
            store.clear()
            assert store.stats()["ram_entries"] == 0
        assert await store.keep(llama, 0, prompt) == TOKENS
        assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
