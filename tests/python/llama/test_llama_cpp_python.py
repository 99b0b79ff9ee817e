"""llama-cpp-python's own Llama class, which most Python programs attach.

Each release of it fits one build of libllama, and none fits the build that the other tests use. So
these tests run in a process of their own, with the library in `llama_cpp/lib`. That library is
built without CUDA, so that its caches are in host memory on any machine.
"""

from __future__ import annotations

import functools
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import kvferry
import numpy as np
import pytest
from support.llama_reference import LIBRARY_FOLDER, bindings_fit
from support.text_model import write_text_model

if "LLAMA_CPP_LIB_PATH" in os.environ and not bindings_fit():
    pytest.skip(f"llama_cpp.Llama does not fit {LIBRARY_FOLDER}", allow_module_level=True)

import llama_cpp
import llama_cpp.llama_cpp as llama

pytestmark = pytest.mark.anyio

MakeLlm = Callable[..., llama_cpp.Llama]

TEXT = b"Once upon a time, when moving a cache still helped, there lived a queue. "
NEXT = [3 + ord("x")]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    backend: str = request.param
    return backend


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("text") / "model.gguf")


@pytest.fixture
def make_llm(path: Path) -> Iterator[Callable[..., llama_cpp.Llama]]:
    """`make_llm(**arguments of Llama)` returns an object that is closed after the test."""
    made: list[weakref.ref[llama_cpp.Llama]] = []

    def make(**arguments: Any) -> llama_cpp.Llama:
        llm = llama_cpp.Llama(str(path), n_ctx=2048, n_threads=1, verbose=False, **arguments)
        made.append(weakref.ref(llm))
        return llm

    yield make
    for each in made:
        if (llm := each()) is not None:
            llm.close()


def make_prompted(make_llm: MakeLlm) -> llama_cpp.Llama:
    llm = make_llm()
    llm.eval(llm.tokenize(TEXT))
    return llm


def state_of(llm: llama_cpp.Llama) -> bytes:
    """Returns the state of sequence 0 by llama.cpp's own call."""
    size = llama.llama_state_seq_get_size(llm.ctx, 0)
    state = np.empty(size, np.uint8)
    pointer = state.ctypes.data_as(llama.ctypes.POINTER(llama.ctypes.c_uint8))
    assert llama.llama_state_seq_get_data(llm.ctx, pointer, size, 0) == size
    return state.tobytes()


def positions_of(llm: llama_cpp.Llama) -> int:
    """Returns how many positions sequence 0 has in libllama."""
    return llama.llama_memory_seq_pos_max(llama.llama_get_memory(llm.ctx), 0) + 1


def logits_of(llm: llama_cpp.Llama) -> bytes:
    """Returns the logits of the last token."""
    logits = llama.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(logits, (llm.n_vocab(),)).tobytes()


def test_the_bindings_fit_the_library() -> None:
    """Otherwise the other tests of this file would mean nothing."""
    assert bindings_fit()
    assert llama_cpp.llama_max_devices() > 0


async def test_a_saved_sequence_goes_on_with_the_same_logits(
    make_llm: MakeLlm,
) -> None:
    llm = make_llm()
    prompt = llm.tokenize(TEXT)
    assert len(prompt) > len(TEXT)  # a token a byte, and one for the beginning
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        await model.run(llm.eval, prompt)
        expected = await model.run(state_of, llm)
        size = model.size(seq=0)
        snapshot = await model.save(seq=0)
        assert snapshot.nbytes == size == len(expected)
        assert snapshot.to_bytes() == expected
        await model.run(llm.eval, NEXT)
        logits = await model.run(logits_of, llm)

        await model.remove(seq=0)
        await model.run(llm.eval, llm.tokenize(b"something else"))
        assert await model.run(logits_of, llm) != logits

        await model.load(snapshot, seq=0)
        assert await model.run(state_of, llm) == expected
        await model.run(llm.eval, NEXT)
        assert await model.run(logits_of, llm) == logits


async def test_saves_beside_decoding_hold_what_was_there_when_they_began(
    make_llm: MakeLlm,
) -> None:
    llm, like = make_llm(), make_llm()
    prompt, rest = llm.tokenize(TEXT * 10), llm.tokenize(TEXT)
    states = {}  # the states of an equal sequence that is decoded alone, with their lengths
    like.eval(prompt)
    states[state_of(like)] = like.n_tokens
    for token in rest:
        like.eval([token])
        states[state_of(like)] = like.n_tokens

    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        await model.run(llm.eval, prompt)
        decoded = anyio.Event()

        async def decode() -> None:
            for token in rest:
                await model.run(llm.eval, [token])
            decoded.set()

        lengths = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(decode)
            while not decoded.is_set():
                transfer = await model.start_save()
                await model.run(lambda: None)  # calls that wait to decode come first
                lengths.append(states[(await transfer.wait()).to_bytes()])
        assert lengths == sorted(lengths)
        assert len(set(lengths)) > 3
        assert await model.run(state_of, llm) == state_of(like)


async def test_a_completion_goes_on_from_a_loaded_sequence(
    make_llm: MakeLlm,
) -> None:
    """Generates text by the class itself, which trusts what it knows of its context."""
    llm, like = make_llm(), make_llm()
    text = TEXT.decode()
    complete = functools.partial(
        llm.create_completion, text, max_tokens=12, temperature=0.0, logprobs=None
    )
    expected = like.create_completion(text, max_tokens=12, temperature=0.0)["choices"][0]["text"]
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        await model.run(llm.eval, llm.tokenize(TEXT))
        snapshot = await model.save()
        for _ in range(2):
            assert (await model.run(complete))["choices"][0]["text"] == expected
            await model.remove(seq=0)
            await model.load(snapshot, seq=0)


async def test_an_attachment_keeps_its_object_alive(
    make_llm: MakeLlm,
) -> None:
    llm = make_prompted(make_llm)
    expected = state_of(llm)
    alive = weakref.ref(llm)
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        del llm
        gc.collect()
        assert (await model.save()).to_bytes() == expected
        await model.detach()
        del model
    del engine
    gc.collect()
    assert alive() is None


async def test_a_closed_object_is_refused(make_llm: MakeLlm) -> None:
    llm = make_llm()
    llm.close()
    async with kvferry.Engine("host") as engine:
        with pytest.raises(kvferry.ContextFreed):
            engine.attach(llm)


async def test_closing_an_attached_object_is_noticed(
    make_llm: MakeLlm,
) -> None:
    llm = make_prompted(make_llm)
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        snapshot = await model.save()
        await model.run(llm.close)
        with pytest.raises(kvferry.ContextFreed):
            model.size()
        with pytest.raises(kvferry.ContextFreed):
            await model.save()
        with pytest.raises(kvferry.ContextFreed):
            await model.load(snapshot, seq=0)
        with pytest.raises(kvferry.ContextFreed):
            await model.run(llm.eval, NEXT)


async def test_closing_an_object_under_a_save_ends_the_save(
    make_llm: MakeLlm,
) -> None:
    llm = make_llm()
    llm.eval(llm.tokenize(TEXT * 20))
    much = np.ones(256 << 20, np.uint8)
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        # Background transfers wait for urgent ones, so that the save is still in flight.
        urgent = await engine.start_copy_out(much, np.empty_like(much), priority="urgent")
        save = await model.start_save()
        await model.run(llm.close)
        with pytest.raises(kvferry.TransferCancelled):
            await save.wait()
        await urgent.wait()


async def test_another_object_takes_a_state_over(make_llm: MakeLlm) -> None:
    one, two = make_llm(), make_llm()
    prompt = one.tokenize(TEXT)
    one.eval(prompt)
    async with kvferry.Engine("host") as engine:
        from_model, to_model = engine.attach(one), engine.attach(two)
        await to_model.load(await from_model.save(), seq=0)
        one.eval(NEXT)
        await to_model.run(two.eval, NEXT)
        assert await to_model.run(logits_of, two) == logits_of(one)


# ---- What the object knows of the conversation ---------------------------------------------------


OTHER = b"Dear Sir or Madam, "


async def test_two_conversations_take_turns(make_llm: MakeLlm) -> None:
    llm, like = make_llm(), {TEXT: make_llm(), OTHER: make_llm()}
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        saved = {}
        for text, alone in like.items():
            await model.remove(seq=0)
            alone.eval(alone.tokenize(text))
            await model.run(llm.eval, llm.tokenize(text))
            saved[text] = await model.save(seq=0)
        for token in b"abcdef":
            for text, alone in like.items():
                await model.load(saved[text], seq=0)
                assert llm.n_tokens == alone.n_tokens
                assert llm.eval_tokens == alone.eval_tokens
                alone.eval([3 + token])
                await model.run(llm.eval, [3 + token])
                assert await model.run(logits_of, llm) == logits_of(alone)
                saved[text] = await model.save(seq=0)


async def test_removing_the_sequence_resets_the_object(
    make_llm: MakeLlm,
) -> None:
    llm, like = make_llm(), make_llm()
    llm.eval(llm.tokenize(TEXT))
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        await model.remove(seq=0)
        assert llm.n_tokens == 0
        like.eval(like.tokenize(OTHER))
        await model.run(llm.eval, llm.tokenize(OTHER))
        assert await model.run(state_of, llm) == state_of(like)


async def test_a_save_knows_the_tokens_of_the_time_when_it_began(
    make_llm: MakeLlm,
) -> None:
    llm = make_llm()
    prompt = llm.tokenize(TEXT)
    llm.eval(prompt)
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        transfer = await model.start_save()
        await model.run(llm.eval, NEXT * 20)
        snapshot = await transfer.wait()
    assert snapshot.llm is not None
    assert snapshot.llm.tokens.tolist() == prompt
    assert snapshot.llm.scores is None


async def test_the_scores_of_all_tokens_come_back(make_llm: MakeLlm, tmp_path: Path) -> None:
    llm = make_llm(logits_all=True)
    llm.eval(llm.tokenize(OTHER))
    scores = llm._scores.copy()
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        snapshot = await model.save()
        await snapshot.to_file(tmp_path / "state")
        for again in (snapshot, await kvferry.Snapshot.from_file(tmp_path / "state")):
            await model.remove(seq=0)
            llm.scores[:] = 0
            await model.load(again, seq=0)
            assert np.array_equal(llm._scores, scores)


async def test_scores_that_were_not_saved_are_not_made_up(
    make_llm: MakeLlm,
) -> None:
    without, llm = make_llm(), make_llm(logits_all=True)
    without.eval(without.tokenize(OTHER))
    llm.eval(llm.tokenize(TEXT))
    async with kvferry.Engine("host") as engine:
        snapshot = await engine.attach(without).save()
        await engine.attach(llm).load(snapshot, seq=0)
    assert np.isnan(llm._scores).all()


async def test_a_seed_belongs_to_the_conversation(make_llm: MakeLlm) -> None:
    """As with the class's own save_state and load_state."""
    llm = make_llm(seed=1)
    complete = functools.partial(llm.create_completion, TEXT.decode(), max_tokens=8)
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        await model.run(llm.eval, llm.tokenize(TEXT))
        snapshot = await model.save()
        texts = set()
        for _ in range(2):
            texts.add((await model.run(complete))["choices"][0]["text"])
            await model.load(snapshot, seq=0)
        assert len(texts) == 1


async def test_a_file_goes_on_in_another_object(make_llm: MakeLlm, tmp_path: Path) -> None:
    one, two = make_llm(), make_llm()
    one.eval(one.tokenize(TEXT))
    two.eval(two.tokenize(OTHER))
    async with kvferry.Engine("host") as engine:
        snapshot = await engine.attach(one).save()
        await snapshot.to_file(tmp_path / "state")
        model = engine.attach(two)
        await model.load(await kvferry.Snapshot.from_file(tmp_path / "state"), seq=0)
        assert two.eval_tokens == one.eval_tokens
        one.eval(NEXT)
        await model.run(two.eval, NEXT)
        assert await model.run(logits_of, two) == logits_of(one)


async def test_blocks_bring_the_tokens_of_their_positions_back(
    make_llm: MakeLlm, tmp_path: Path
) -> None:
    llm = make_llm(logits_all=True)
    prompt = llm.tokenize(TEXT)
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        await model.run(llm.eval, prompt)
        scores = llm.scores[: len(prompt)].copy()
        blocks = await model.save_blocks(0, tokens=16)
        for block in blocks:
            assert block.llm is not None
            assert block.llm.tokens.tolist() == prompt[block.begin : block.end]
        await blocks[1].write(tmp_path / "block")
        blocks[1] = await kvferry.Block.read(tmp_path / "block")
        for count in (len(blocks), 2):
            await model.run(llm.reset)
            await model.run(llm.eval, llm.tokenize(b"something else"))
            await model.load_blocks(blocks[:count], 0)
            kept = blocks[count - 1].end
            assert llm.n_tokens == kept
            assert llm.input_ids[:kept].tolist() == prompt[:kept]
            assert np.array_equal(llm.scores[:kept], scores[:kept])
        await model.run(llm.eval, prompt[32:])
        assert llm.n_tokens == len(prompt)

        model.sync.load_blocks(model.sync.save_blocks(0, tokens=16), 0)
        assert llm.input_ids[: len(prompt)].tolist() == prompt
        blocks[0].llm = None  # as blocks that another program has saved
        await model.load_blocks(blocks, 0)
        assert llm.n_tokens == len(prompt)
        assert (llm.input_ids[: len(prompt)] == -1).all()


async def test_a_refused_load_of_blocks_leaves_the_object_and_a_failed_one_resets_it(
    make_llm: MakeLlm,
) -> None:
    llm = make_prompted(make_llm)
    count = llm.n_tokens
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        blocks = await model.save_blocks(0, tokens=16)
        with pytest.raises(kvferry.InvalidArgument):
            await model.load_blocks(blocks[::-1], 0)
        assert llm.n_tokens == count
        load = await model.start_load_blocks(blocks, 0)
        load.cancel()
        try:
            await load.wait()
        except kvferry.TransferCancelled:
            assert llm.n_tokens == 0
        else:
            assert llm.n_tokens == count


async def test_logits_from_before_a_load_are_not_sampled(
    make_llm: MakeLlm,
) -> None:
    """The object samples without a decode if it has exactly the prompt, unless told otherwise."""
    llm, like = make_llm(), make_llm()

    def next_token(of: llama_cpp.Llama, prompt: list[int]) -> int:
        return int(next(of.generate(prompt, temp=0.0)))

    prompt = llm.tokenize(TEXT)
    expected = next_token(like, prompt)
    other = next(each for each in range(3, 200) if next_token(like, [1, each]) != expected)
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        await model.run(llm.eval, prompt)
        snapshot = await model.save()
        await model.remove(seq=0)
        await model.run(llm.eval, [1, other])
        await model.load(snapshot, seq=0)
        assert await model.run(next_token, llm, prompt) == expected


async def test_a_state_without_tokens_is_gone_on_from_but_matches_no_prompt(
    make_llm: MakeLlm,
) -> None:
    one, two = make_llm(), make_llm()
    one.eval(one.tokenize(TEXT))
    state = state_of(one)
    two.eval(two.tokenize(OTHER))
    async with kvferry.Engine("host") as engine:
        model = engine.attach(two)
        await model.load(state, seq=0)
        assert two.n_tokens == one.n_tokens
        assert set(two.eval_tokens) == {-1}
        one.eval(NEXT)
        await model.run(two.eval, NEXT)
        assert await model.run(logits_of, two) == logits_of(one)


async def test_a_load_that_is_refused_leaves_the_object_as_its_sequence_is(
    make_llm: MakeLlm,
) -> None:
    llm = make_prompted(make_llm)
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        snapshot = await model.save()
        for state in (snapshot.view[:-1], kvferry.Snapshot.from_bytes(snapshot, fingerprint="x")):
            with pytest.raises((kvferry.StateDamaged, kvferry.StateMismatch)):
                await model.load(state, seq=0)
            assert llm.n_tokens == positions_of(llm)
            await model.load(snapshot, seq=0)
        with pytest.raises(kvferry.SequenceRange):
            await model.load(snapshot, seq=1)
        assert llm.n_tokens == len(llm.tokenize(TEXT))


async def test_a_cancelled_load_resets_the_object(make_llm: MakeLlm) -> None:
    llm = make_prompted(make_llm)
    much = np.ones(256 << 20, np.uint8)
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        snapshot = await model.save()
        urgent = await engine.start_copy_out(much, np.empty_like(much), priority="urgent")
        load = await model.start_load(snapshot, seq=0)
        load.cancel()
        with pytest.raises(kvferry.TransferCancelled):
            await load.wait()
        assert llm.n_tokens == 0
        await urgent.wait()


async def test_the_address_of_a_context_has_no_object(
    make_llm: MakeLlm,
) -> None:
    llm = make_prompted(make_llm)
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm.ctx)
        snapshot = await model.save()
        assert snapshot.llm is None
        await model.remove(seq=0)
        assert llm.n_tokens == len(llm.tokenize(TEXT))


def test_a_script_keeps_two_conversations(make_llm: MakeLlm) -> None:
    llm, like = make_llm(), {TEXT: make_llm(), OTHER: make_llm()}
    with kvferry.sync.Engine("host") as engine, engine.attach(llm) as model:
        saved = {}
        for text, alone in like.items():
            model.remove(seq=0)
            llm.eval(llm.tokenize(text))
            alone.eval(alone.tokenize(text))
            saved[text] = model.save(seq=0)
        for text, alone in like.items():
            model.load(saved[text], seq=0)
            assert llm.eval_tokens == alone.eval_tokens
            alone.eval(NEXT)
            llm.eval(NEXT)
            assert logits_of(llm) == logits_of(alone)
        with pytest.raises(kvferry.StateDamaged):
            model.load(saved[TEXT].view[:-1], seq=0)
        assert llm.n_tokens == positions_of(llm)
        model.remove(seq=0)
        assert llm.n_tokens == positions_of(llm) == 0
