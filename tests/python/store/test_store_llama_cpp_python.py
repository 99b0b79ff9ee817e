"""Store with llama-cpp-python's own Llama class; see llama/test_llama_cpp_python.py."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import kvferry
import numpy as np
import pytest
from support.event_loops import anyio_backend  # noqa: F401
from support.llama_reference import LIBRARY_FOLDER, bindings_fit
from support.text_model import write_text_model

if "LLAMA_CPP_LIB_PATH" in os.environ and not bindings_fit():
    pytest.skip(f"llama_cpp.Llama does not fit {LIBRARY_FOLDER}", allow_module_level=True)

import llama_cpp

pytestmark = pytest.mark.anyio

TEXT = b"Once upon a time, when moving a cache still helped, there lived a queue. " * 3
BLOCK = 32


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("text") / "model.gguf")


@pytest.fixture(scope="module")
def other_path(path: Path) -> Path:
    """A model that differs in one byte of one tensor."""
    other = path.with_name("other.gguf")
    shutil.copy(path, other)
    tensors = gguf.GGUFReader(other, "r+").tensors
    data = next(each.data for each in tensors if each.name == "blk.0.attn_k.weight")
    data.view(np.uint8).reshape(-1)[1000] ^= 1
    del data, tensors  # the file is written
    before, after = path.read_bytes(), other.read_bytes()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    return other


@pytest.fixture
def llms(path: Path, other_path: Path) -> Iterator[list[llama_cpp.Llama]]:
    """Two of the one model, and one of the other."""
    made = [
        llama_cpp.Llama(str(each), n_ctx=1024, n_threads=1, verbose=False)
        for each in (path, path, other_path)
    ]
    yield made
    for llm in made:
        llm.close()


async def test_models_that_differ_in_one_byte_of_a_tensor_find_nothing_of_one_another(
    llms: list[llama_cpp.Llama],
) -> None:
    async with (
        kvferry.Engine("host") as engine,
        kvferry.Store(ram="64 MiB", block_tokens=BLOCK) as store,
    ):
        first, second, other = (engine.attach(llm) for llm in llms)
        assert first.fingerprint == other.fingerprint, "libllama tells no weights"
        prompt = llms[0].tokenize(TEXT)
        for llm, model in ((llms[0], first), (llms[2], other)):
            await model.run(llm.eval, prompt[: len(prompt) // 2])
        await first.run(llms[0].eval, prompt[len(prompt) // 2 :])
        await store.keep(first, 0, prompt)
        assert (await store.find(second, prompt)).tokens > 0
        assert (await store.find(other, prompt)).tokens == 0
        assert await store.restore(other, 0, prompt) == 0
        assert llms[2].n_tokens == 0


@pytest.mark.parametrize("on_disk", [False, True])
async def test_a_restored_llama_goes_on_as_if_it_had_evaluated_the_tokens(
    llms: list[llama_cpp.Llama], tmp_path: Path, on_disk: bool
) -> None:
    llm, fresh, _ = llms
    disk = {"disk": tmp_path, "disk_limit": "1 GiB"} if on_disk else {}
    async with (
        kvferry.Engine("host") as engine,
        kvferry.Store(ram="64 MiB", block_tokens=BLOCK, **disk) as store,
    ):
        model, other = engine.attach(llm), engine.attach(fresh)
        prompt = llm.tokenize(TEXT)
        await model.run(llm.eval, prompt)
        assert await store.keep(model, 0, prompt) == len(prompt)
        if on_disk:
            await store.flush()
            store.clear()
        question = llm.tokenize(b"What then?", add_bos=False)
        count = await store.restore(other, 0, [*prompt, *question])
        assert count == len(prompt) == fresh.n_tokens
        assert list(fresh.input_ids[:count]) == prompt

        def answer(of: llama_cpp.Llama, seen: list[int]) -> list[int]:
            of.n_tokens = len(prompt)
            tokens = of.generate(seen, top_k=1, temp=0.0, reset=True)
            return [next(tokens) for _ in range(20)]

        expected = await model.run(answer, llm, [*prompt, *question])
        assert await other.run(answer, fresh, [*prompt, *question]) == expected


async def test_the_store_learns_how_fast_an_object_evaluates(llms: list[llama_cpp.Llama]) -> None:
    llm, like, _ = llms
    async with (
        kvferry.Engine("host") as engine,
        kvferry.Store(ram="64 MiB", block_tokens=BLOCK) as store,
    ):
        model, other = engine.attach(llm), engine.attach(like)
        prompt = llm.tokenize(TEXT)
        for turn in range(3):
            assert (await store.explain(model, prompt)).prefill_seconds is None
            await store.restore(model, 0, prompt, salt=b"nothing is kept for it")
            await model.run(llm.eval, prompt)
            await store.keep(model, 0, prompt)
            assert len(store._worth.prefill(model).seen) == turn + 1
        (depth, seconds) = store._worth.prefill(model).seen[-1]
        assert depth == len(prompt) / 2
        assert seconds > 0
        told = await store.explain(model, prompt)
        assert told.prefill_seconds is not None
        assert (await store.explain(other, prompt)).prefill_seconds is None


async def test_a_model_file_that_is_gone_hides_what_others_kept(
    llms: list[llama_cpp.Llama],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    llm, like, _ = llms
    async with (
        kvferry.Engine("host") as engine,
        kvferry.Store(ram="64 MiB", block_tokens=BLOCK) as store,
    ):
        model, other = engine.attach(llm), engine.attach(like)
        prompt = llm.tokenize(TEXT)
        await model.run(llm.eval, prompt)
        await store.keep(model, 0, prompt)
        monkeypatch.setattr(like, "model_path", "/nowhere/model.gguf")
        assert (await store.find(other, prompt)).tokens == 0
        assert "this attachment alone" in caplog.text
        await other.run(like.eval, prompt)
        assert await store.keep(other, 0, prompt) == len(prompt)
        assert await store.restore(other, 0, prompt, leave=0) == len(prompt)
