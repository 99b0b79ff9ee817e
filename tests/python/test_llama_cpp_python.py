"""llama-cpp-python's own Llama class, as it is: what most Python programs attach.

Its structs fit one build of libllama each, and no release of it fits the build that the other tests
use. So these have a process of their own, with the library that `llama_cpp/lib` leads to. That is
built without CUDA: its caches lie in host memory wherever the tests run.
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
from llama_reference import LIBRARY_FOLDER, bindings_fit
from text_model import write_text_model

if "LLAMA_CPP_LIB_PATH" in os.environ and not bindings_fit():
    pytest.skip(f"llama_cpp.Llama does not fit {LIBRARY_FOLDER}", allow_module_level=True)

import llama_cpp
import llama_cpp.llama_cpp as llama

pytestmark = pytest.mark.anyio

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
    """`make_llm(**arguments of Llama)`: closed after the test, should it still be there."""
    made: list[weakref.ref[llama_cpp.Llama]] = []

    def make(**arguments: Any) -> llama_cpp.Llama:
        llm = llama_cpp.Llama(str(path), n_ctx=2048, n_threads=1, verbose=False, **arguments)
        made.append(weakref.ref(llm))
        return llm

    yield make
    for each in made:
        if (llm := each()) is not None:
            llm.close()


def state_of(llm: llama_cpp.Llama) -> bytes:
    """By llama.cpp's own call."""
    size = llama.llama_state_seq_get_size(llm.ctx, 0)
    state = np.empty(size, np.uint8)
    pointer = state.ctypes.data_as(llama.ctypes.POINTER(llama.ctypes.c_uint8))
    assert llama.llama_state_seq_get_data(llm.ctx, pointer, size, 0) == size
    return state.tobytes()


def logits_of(llm: llama_cpp.Llama) -> bytes:
    """Those of the last token."""
    logits = llama.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(logits, (llm.n_vocab(),)).tobytes()


def test_the_bindings_fit_the_library() -> None:
    """Else this file would test by luck."""
    assert bindings_fit()
    assert llama_cpp.llama_max_devices() > 0


async def test_a_saved_sequence_goes_on_with_the_same_logits(
    make_llm: Callable[..., llama_cpp.Llama],
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
        llm.n_tokens = 0
        await model.run(llm.eval, llm.tokenize(b"something else"))
        assert await model.run(logits_of, llm) != logits

        await model.load(snapshot, seq=0)
        llm.n_tokens = len(prompt)
        assert await model.run(state_of, llm) == expected
        await model.run(llm.eval, NEXT)
        assert await model.run(logits_of, llm) == logits


async def test_saves_beside_decoding_hold_what_was_there_when_they_began(
    make_llm: Callable[..., llama_cpp.Llama],
) -> None:
    llm, like = make_llm(), make_llm()
    prompt, rest = llm.tokenize(TEXT * 10), llm.tokenize(TEXT)
    states = {}  # of a like sequence that is decoded alone, by its length
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
                await model.run(lambda: None)  # whatever is waiting to be decoded comes first
                lengths.append(states[(await transfer.wait()).to_bytes()])
        assert lengths == sorted(lengths)
        assert len(set(lengths)) > 3
        assert await model.run(state_of, llm) == state_of(like)


async def test_a_completion_goes_on_from_a_loaded_sequence(
    make_llm: Callable[..., llama_cpp.Llama],
) -> None:
    """The class's own way to generate, which takes what its context holds for granted."""
    llm, like = make_llm(), make_llm()
    text = TEXT.decode()
    complete = functools.partial(
        llm.create_completion, text, max_tokens=12, temperature=0.0, logprobs=None
    )
    expected = like.create_completion(text, max_tokens=12, temperature=0.0)["choices"][0]["text"]
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        await model.run(llm.eval, llm.tokenize(TEXT))
        snapshot, tokens = await model.save(), llm.n_tokens
        for _ in range(2):
            assert (await model.run(complete))["choices"][0]["text"] == expected
            await model.remove(seq=0)
            await model.load(snapshot, seq=0)
            llm.n_tokens = tokens


async def test_an_attachment_keeps_its_object_alive(
    make_llm: Callable[..., llama_cpp.Llama],
) -> None:
    llm = make_llm()
    llm.eval(llm.tokenize(TEXT))
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


async def test_a_closed_object_is_refused(make_llm: Callable[..., llama_cpp.Llama]) -> None:
    llm = make_llm()
    llm.close()
    async with kvferry.Engine("host") as engine:
        with pytest.raises(kvferry.ContextFreed):
            engine.attach(llm)


async def test_closing_an_attached_object_is_noticed(
    make_llm: Callable[..., llama_cpp.Llama],
) -> None:
    llm = make_llm()
    llm.eval(llm.tokenize(TEXT))
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
    make_llm: Callable[..., llama_cpp.Llama],
) -> None:
    llm = make_llm()
    llm.eval(llm.tokenize(TEXT * 20))
    much = np.ones(256 << 20, np.uint8)
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        # What is in the background waits for what is urgent, so the save is still in flight then.
        urgent = await engine.start_copy_out(much, np.empty_like(much), priority="urgent")
        save = await model.start_save()
        await model.run(llm.close)
        with pytest.raises(kvferry.TransferCancelled):
            await save.wait()
        await urgent.wait()


async def test_another_object_takes_a_state_over(make_llm: Callable[..., llama_cpp.Llama]) -> None:
    one, two = make_llm(), make_llm()
    prompt = one.tokenize(TEXT)
    one.eval(prompt)
    async with kvferry.Engine("host") as engine:
        from_model, to_model = engine.attach(one), engine.attach(two)
        await to_model.load(await from_model.save(), seq=0)
        two.n_tokens = len(prompt)
        one.eval(NEXT)
        await to_model.run(two.eval, NEXT)
        assert await to_model.run(logits_of, two) == logits_of(one)
