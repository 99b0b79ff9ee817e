"""kvferry.PromptCache, set on llama-cpp-python's own class: see test_llama_cpp_python.py."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import random
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import kvferry
import numpy as np
import pytest
from support.llama_reference import LIBRARY_FOLDER, bindings_fit
from support.programs import run_python
from support.text_model import write_text_model

if "LLAMA_CPP_LIB_PATH" in os.environ and not bindings_fit():
    pytest.skip(f"llama_cpp.Llama does not fit {LIBRARY_FOLDER}", allow_module_level=True)

import llama_cpp
import llama_cpp.llama_cpp as llama
from kvferry._native import lib
from kvferry.errors import error
from kvferry.store import Store

BLOCK = 64
RULES = "You are a queue, and you answer as a queue would answer. " * 8
CHECKPOINTED = ["gemma3", "mamba", "hybrid", "hybrid-iswa"]

ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}

Llm = Any  # llama_cpp.Llama, with a list `evaluated` of how many tokens each eval had


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`text_model(kind)` returns the path of a model, which is written once."""
    folder = tmp_path_factory.mktemp("text")
    written: dict[str, Path] = {}

    def path(kind: str) -> Path:
        if kind not in written:
            written[kind] = write_text_model(folder / f"{kind}.gguf", kind)
        return written[kind]

    return path


@pytest.fixture
def make_llm(text_model: Callable[[str], Path]) -> Iterator[Callable[..., Llm]]:
    """`make_llm(kind, **arguments of Llama)` returns an object that is closed after the test."""
    made: list[weakref.ref[llama_cpp.Llama]] = []

    def make(kind: str = "llama", **arguments: Any) -> Llm:
        chosen = {"n_ctx": 2048, "seed": 1, **ONE_THREAD, **arguments}
        llm: Llm = llama_cpp.Llama(str(text_model(kind)), **chosen)
        made.append(weakref.ref(llm))
        llm.evaluated = []
        evaluate = llm.eval

        def count_and_evaluate(tokens: list[int]) -> None:
            llm.evaluated.append(len(tokens))
            evaluate(tokens)

        llm.eval = count_and_evaluate
        return llm

    yield make
    for each in made:
        if (llm := each()) is not None:
            if isinstance(llm.cache, kvferry.PromptCache):
                llm.cache.close()
            llm.close()


def cached(llm: Llm, **arguments: Any) -> kvferry.PromptCache:
    """Sets a cache on an object."""
    arguments = {"ram": "256 MiB", "block_tokens": BLOCK, "devices": "host", **arguments}
    cache = kvferry.PromptCache(llm, **arguments)
    llm.set_cache(cache)
    return cache


def complete(llm: Llm, prompt: str | list[int], **arguments: Any) -> str:
    """Returns the text of a completion. `llm.evaluated` is that of this completion, then."""
    llm.evaluated.clear()
    chosen = {"max_tokens": 8, "temperature": 0.0, **arguments}
    text: str = llm.create_completion(prompt, **chosen)["choices"][0]["text"]
    return text


def prefilled(llm: Llm) -> int:
    """How many tokens the latest completion evaluated before its first answer."""
    return int(llm.evaluated[0])


def tokens_of(llm: Llm, text: str) -> list[int]:
    tokens: list[int] = llm.tokenize(text.encode(), special=True)
    return tokens


def logits_of(llm: Llm) -> bytes:
    logits = llama.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(logits, (llm.n_vocab(),)).tobytes()


@contextlib.contextmanager
def llama_cpp_keeps(llm: Llm) -> Iterator[None]:
    """Saves the sequence by llama.cpp's own call, and loads it in the end: into the cells that any
    load takes, so that sums are rounded as after any load."""
    size = llama.llama_state_seq_get_size(llm.ctx, 0)
    state = (ctypes.c_uint8 * size)()
    assert llama.llama_state_seq_get_data(llm.ctx, state, size, 0) == size
    count, tokens = llm.n_tokens, llm.input_ids.copy()
    yield
    assert llama.llama_state_seq_set_data(llm.ctx, state, size, 0) == size
    llm.n_tokens, llm.input_ids, llm._requires_eval = count, tokens, True


def whole_blocks(count: int) -> int:
    return count // BLOCK * BLOCK


# ---- Right, and less to evaluate -----------------------------------------------------------------


def test_what_was_evaluated_is_not_evaluated_again(make_llm: Callable[..., Llm]) -> None:
    llm, like = make_llm(), make_llm()
    cached(llm)
    prompt = tokens_of(llm, RULES + "Who is first?")
    expected = complete(like, prompt)
    assert complete(llm, prompt) == expected
    assert prefilled(llm) == len(prompt)
    complete(llm, "Something else.")
    assert complete(llm, prompt) == expected
    assert prefilled(llm) == len(prompt) - whole_blocks(len(prompt) - 1)


def test_prompts_that_begin_alike_share_their_beginning(make_llm: Callable[..., Llm]) -> None:
    llm, like = make_llm(), make_llm()
    cache = cached(llm)
    shared = len(tokens_of(llm, RULES + "Is number "))
    assert shared != whole_blocks(shared)
    texts = [f"Is number {number} before number {number + 1}?" for number in range(4)]
    # The second one shows where they differ.
    known = [0, whole_blocks(shared), shared, shared]
    for number, text in enumerate(texts):
        like.reset()
        assert complete(llm, RULES + text) == complete(like, RULES + text)
        count = len(tokens_of(llm, RULES + text))
        assert prefilled(llm) == count - known[number]
        state = llama.llama_state_get_size(llm.ctx)
        complete(llm, f"{number}: something else.")  # the object forgets the rules
    assert cache.stats()["saved_bytes"] < 2 * state


def test_the_logits_are_those_without_a_cache(make_llm: Callable[..., Llm]) -> None:
    llm, like = make_llm(), make_llm()
    cached(llm)
    prompt = tokens_of(llm, RULES + "Who is last?")
    complete(llm, prompt)
    complete(llm, "Something else.")
    complete(llm, prompt, max_tokens=1)
    restored = len(prompt) - prefilled(llm)
    assert restored >= whole_blocks(len(prompt) - 1)
    # The same batches into the same cells: the sums are rounded alike.
    like.eval(prompt)
    like.n_tokens = restored
    like.eval(prompt[restored:])
    assert logits_of(llm) == logits_of(like)


def test_what_the_object_holds_already_is_not_restored(make_llm: Callable[..., Llm]) -> None:
    llm = make_llm()
    cache = cached(llm)
    complete(llm, RULES + "A?")
    complete(llm, RULES + "B?")
    assert prefilled(llm) == len("B?")
    assert cache.stats()["restored_tokens"] == 0


def test_a_conversation_keeps_each_token_once(make_llm: Callable[..., Llm]) -> None:
    """The end of a conversation that goes on is not where prompts differ."""
    llm = make_llm()
    cache = cached(llm)
    conversation = tokens_of(llm, RULES)
    for turn in range(3):
        complete(llm, conversation)
        assert cache.stats()["ram_entries"] == llm.n_tokens // BLOCK
        conversation = llm.input_ids[: llm.n_tokens].tolist() + tokens_of(llm, f"{turn}?")[1:]
        llm.reset()


@pytest.mark.parametrize("kind", CHECKPOINTED)
@pytest.mark.parametrize("swa_full", [False, True])
def test_a_conversation_goes_on_where_its_last_answer_ended(
    kind: str, swa_full: bool, make_llm: Callable[..., Llm]
) -> None:
    llm, like = make_llm(kind, swa_full=swa_full), make_llm(kind, swa_full=swa_full)
    cached(llm)
    conversation = tokens_of(llm, RULES)
    for turn in range(3):
        conversation += tokens_of(llm, f"Turn {turn}: who is next?")[1:]
        assert complete(llm, conversation) == complete(like, conversation)
        assert prefilled(llm) == prefilled(like)
        assert prefilled(llm) < 100 or not turn
        assert logits_of(llm) == logits_of(like)
        conversation = llm.input_ids[: llm.n_tokens].tolist()
        with llama_cpp_keeps(like):
            for each in (llm, like):
                complete(each, f"{turn}: something else.")


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_the_second_prompt_that_begins_alike_takes_a_checkpoint(
    kind: str, make_llm: Callable[..., Llm]
) -> None:
    """The first one does not know where others will differ; the third one begins there."""
    llm, like = make_llm(kind), make_llm(kind)
    cached(llm)
    shared = whole_blocks(len(tokens_of(llm, RULES)))
    prompts = [
        tokens_of(llm, RULES + text) for text in ("Who is first?", "And last?", "Who is that?")
    ]
    expected = []
    for prompt in prompts:
        expected.append(complete(like, prompt))
        complete(like, "Something else.")
    evaluated = []
    for prompt, text in zip(prompts, expected, strict=True):
        assert complete(llm, prompt) == text
        evaluated.append([count for count in llm.evaluated if count > 1])
        llm.reset()  # as if somebody else had used the object meanwhile
    first, second, third = (len(prompt) for prompt in prompts)
    assert evaluated == [[first], [shared, second - shared], [third - shared]]


@pytest.mark.parametrize("swa_full", [False, True])
@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_a_checkpoint_inside_a_prompt_gives_the_same_logits(
    kind: str, swa_full: bool, make_llm: Callable[..., Llm]
) -> None:
    # All prompts are divided alike, so that blocks of the first one are those of the second one.
    arguments = {"swa_full": swa_full, "n_batch": BLOCK, "n_ubatch": BLOCK}
    llm, like = make_llm(kind, **arguments), make_llm(kind, **arguments)
    cached(llm)
    shared = whole_blocks(len(tokens_of(llm, RULES)))
    for question in ("Who is first?", "And last?"):
        complete(llm, RULES + question)
        complete(llm, "Something else.")
    prompt = tokens_of(llm, RULES + "Who is that?")
    complete(llm, prompt, max_tokens=1)
    assert prefilled(llm) == len(prompt) - shared
    # The same batches into the same cells: the sums are rounded alike.
    like.eval(prompt[:shared])
    with llama_cpp_keeps(like):
        complete(like, "Something else.")
    like.eval(prompt[shared:])
    assert logits_of(llm) == logits_of(like)


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_a_checkpoint_inside_a_prompt_is_found_in_the_folder(
    kind: str, make_llm: Callable[..., Llm], tmp_path: Path
) -> None:
    disk = {"disk": tmp_path, "disk_limit": "1 GiB"}
    llm, again = make_llm(kind), make_llm(kind)
    shared = whole_blocks(len(tokens_of(llm, RULES)))
    with cached(llm, **disk):
        for question in ("Who is first?", "And last?"):
            complete(llm, RULES + question)
            complete(llm, "Something else.")
    prompt = tokens_of(llm, RULES + "Who is that?")
    with cached(again, **disk):
        complete(again, prompt)
        assert prefilled(again) == len(prompt) - shared


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_prompts_that_share_nothing_are_evaluated_at_once(
    kind: str, make_llm: Callable[..., Llm]
) -> None:
    llm = make_llm(kind)
    cached(llm)
    for prompt in (RULES, "Something else. " * 20, "And more of that. " * 20):
        complete(llm, prompt)
        assert len([count for count in llm.evaluated if count > 1]) == 1


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_a_checkpoint_that_cannot_be_kept_costs_time_alone(
    kind: str,
    make_llm: Callable[..., Llm],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    llm, like = make_llm(kind), make_llm(kind)
    cached(llm)
    prompts = [RULES + "Who is first?", RULES + "And last?"]
    complete(llm, prompts[0])
    complete(llm, "Something else.")

    async def fail(*_: object, **__: object) -> None:
        raise OSError("no disk")

    monkeypatch.setattr(Store, "keep", fail)
    assert complete(llm, prompts[1]) == complete(like, prompts[1])
    assert caplog.text.count("no disk") == 2


@pytest.mark.parametrize("kind", ["llama", *CHECKPOINTED])
def test_prompts_that_leave_one_another_anywhere_are_right(
    kind: str, make_llm: Callable[..., Llm]
) -> None:
    llm, like = make_llm(kind, n_ctx=1024), make_llm(kind, n_ctx=1024)
    cache = cached(llm)
    chance = random.Random(3)
    prompts = [chance.choices(range(3, 250), k=600)]
    evaluated = 0
    for _ in range(20):
        other = chance.choice(prompts)
        own = chance.choices(range(3, 250), k=chance.randrange(5, 80))
        prompts.append(other[: chance.randrange(len(other))] + own)
        if chance.random() < 0.5:
            llm.reset()
        like.reset()
        assert complete(llm, prompts[-1]) == complete(like, prompts[-1])
        evaluated += sum(llm.evaluated) - sum(like.evaluated)
    assert evaluated < 0
    assert cache.stats()["refused_loads"] == 0


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_a_window_that_has_moved_on_is_not_used(kind: str, make_llm: Callable[..., Llm]) -> None:
    """The object removes what follows the beginning of a prompt, and would go on without the rows
    that its windows have lost."""
    small = {"swa_full": False, "n_batch": 32, "n_ubatch": 32}
    llm, like = make_llm(kind, **small), make_llm(kind, **small)
    cached(llm)
    complete(llm, RULES + "A long question, of more words than windows have cells. " * 10)
    assert complete(llm, RULES + "B?") == complete(like, RULES + "B?")


def test_a_window_that_is_whole_is_used(make_llm: Callable[..., Llm]) -> None:
    llm, like = make_llm("gemma3", swa_full=True), make_llm("gemma3", swa_full=True)
    cached(llm)
    for question in ("A?", "B?"):
        assert complete(llm, RULES + question) == complete(like, RULES + question)
        assert prefilled(llm) == prefilled(like)
    assert prefilled(llm) == len("B?")


def test_a_chat_goes_on(make_llm: Callable[..., Llm]) -> None:
    llm, like = make_llm(), make_llm()
    cached(llm)
    messages = [{"role": "user", "content": RULES}]
    for turn in range(3):
        answers = []
        for each in (llm, like):
            each.evaluated.clear()
            done = each.create_chat_completion(messages, max_tokens=8, temperature=0.0)
            answers.append(done["choices"][0]["message"])
            complete(each, "Something else.") if each is like else None
        assert answers[0] == answers[1]
        if turn:
            assert prefilled(llm) < 2 * BLOCK
        messages += [answers[0], {"role": "user", "content": f"And {turn}?"}]
        llm.reset()


def test_a_stream_is_the_same_and_is_kept(make_llm: Callable[..., Llm]) -> None:
    llm, like = make_llm(), make_llm()
    cached(llm)

    def streamed(each: Llm) -> str:
        each.evaluated.clear()
        chunks = each.create_completion(RULES, max_tokens=8, temperature=0.0, stream=True)
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    expected = streamed(like)
    assert streamed(llm) == expected
    llm.reset()
    assert streamed(llm) == expected
    assert prefilled(llm) <= BLOCK


def test_a_stream_that_nobody_reads_to_its_end_is_not_kept(make_llm: Callable[..., Llm]) -> None:
    llm = make_llm()
    cache = cached(llm)
    stream = llm.create_completion(RULES, max_tokens=8, stream=True)
    next(stream)
    stream.close()
    assert cache.stats()["kept_tokens"] == 0
    complete(llm, "Something else.")


def test_logits_of_a_prompt_that_are_asked_for_are_true(make_llm: Callable[..., Llm]) -> None:
    llm, like = make_llm(logits_all=True), make_llm(logits_all=True)
    cached(llm)
    told = []
    for each in (llm, like):
        complete(each, RULES)
        complete(each, "Something else.")
        complete(each, RULES)
        assert (prefilled(each) < BLOCK) == (each is llm)
        done = each.create_completion(RULES, max_tokens=2, temperature=0.0, echo=True, logprobs=1)
        told.append(done["choices"][0]["logprobs"]["token_logprobs"])
    assert told[0][1:] == pytest.approx(told[1][1:], abs=1e-3)


def test_images_are_neither_kept_nor_replaced(make_llm: Callable[..., Llm]) -> None:
    """A handler of images evaluates them itself. Then it asks for a completion of the tokens that
    the object holds, of which those of the images are not set."""
    llm = make_llm()
    cache = cached(llm)
    complete(llm, RULES)
    kept = cache.stats()["kept_tokens"]
    llm.chat_handler = SimpleNamespace(mtmd_ctx=object())
    llm.reset()
    llm.eval(tokens_of(llm, "An image. "))
    llm.input_ids[2:5] = 0
    complete(llm, llm.input_ids[: llm.n_tokens].tolist())
    assert llm.evaluated[1:] == [1] * (len(llm.evaluated) - 1)
    complete(llm, RULES)
    assert prefilled(llm) > BLOCK
    assert cache.stats()["kept_tokens"] == kept


def test_a_forked_child_does_without_the_cache(
    make_llm: Callable[..., Llm], caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm()
    cache = cached(llm)
    complete(llm, RULES)
    child = os.fork()
    if child == 0:
        right = False
        try:
            with pytest.raises(KeyError):
                cache[tokens_of(llm, RULES)]
            cache[tokens_of(llm, RULES)] = None
            cache.close()
            right = len(caplog.records) == 2
        finally:
            os._exit(not right)
    assert os.waitpid(child, 0)[1] == 0
    llm.reset()
    complete(llm, RULES)
    assert prefilled(llm) <= BLOCK


def test_a_seed_gives_what_it_gives_without_a_cache(make_llm: Callable[..., Llm]) -> None:
    llm, like = make_llm(), make_llm()
    cached(llm)
    for _ in range(3):
        assert complete(llm, RULES, temperature=1.0) == complete(like, RULES, temperature=1.0)
        complete(llm, "Something else."), complete(like, "Something else.")


# ---- A folder, and processes ---------------------------------------------------------------------

PROGRAM = """
import sys
import support.llama_reference  # loads the backends
import kvferry, llama_cpp

model, folder, prompt = sys.argv[1:]
llm = llama_cpp.Llama(model, n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False)
evaluated, evaluate = [], llm.eval
llm.eval = lambda tokens: (evaluated.append(len(tokens)), evaluate(tokens))
cache = kvferry.PromptCache(llm, ram="256 MiB", disk=folder, disk_limit="1 GiB", devices="host")
llm.set_cache(cache)
done = llm.create_completion(prompt, max_tokens=8, temperature=0.0)
print(evaluated[0], repr(done["choices"][0]["text"]))
"""


def test_a_new_process_finds_what_another_has_kept(
    text_model: Callable[[str], Path], make_llm: Callable[..., Llm], tmp_path: Path
) -> None:
    """Neither closes its cache: the exit of a program does."""
    llm = make_llm()
    count, expected = len(tokens_of(llm, RULES)), repr(complete(llm, RULES))
    for evaluated in (count, count - whole_blocks(count - 1)):
        program = run_python("-c", PROGRAM, str(text_model("llama")), str(tmp_path), RULES)
        assert program.returncode == 0, program.stderr
        assert program.stdout.strip() == f"{evaluated} {expected}", program.stderr


def test_other_settings_find_nothing(make_llm: Callable[..., Llm], tmp_path: Path) -> None:
    disk = {"disk": tmp_path, "disk_limit": "1 GiB"}
    llm = make_llm()
    with cached(llm, **disk):
        complete(llm, RULES)
    for arguments, more in [
        ({"rope_freq_base": 20000.0}, {}),
        ({"kv_overrides": {"llama.rope.freq_base": 20000.0}}, {}),
        ({}, {"variant": "an adapter"}),
        ({}, {"salt": b"somebody else"}),
        ({}, {}),
    ]:
        other = make_llm(**arguments)
        with cached(other, **disk, **more):
            complete(other, RULES)
            same = not arguments and not more
            assert (prefilled(other) <= BLOCK) == same, (arguments, more)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed"])
def test_a_damaged_folder_costs_time_alone(
    damage: str,
    make_llm: Callable[..., Llm],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = {"disk": tmp_path, "disk_limit": "1 GiB"}
    llm, again = make_llm(), make_llm()
    with cached(llm, **disk):
        expected = complete(llm, RULES)
    for path in tmp_path.rglob("*"):
        if not path.is_file():
            continue
        data = bytearray(path.read_bytes())
        if damage == "removed":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(data[: len(data) // 2])
        elif data:
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    with cached(again, **disk):
        assert complete(again, RULES) == expected
        assert prefilled(again) == len(tokens_of(again, RULES))
        assert complete(again, RULES) == expected


def test_a_folder_that_cannot_be_used_is_told_at_once(
    make_llm: Callable[..., Llm], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    llm = make_llm()
    before = dict(vars(llm))
    with pytest.raises(OSError, match="file"):
        cached(llm, disk=file, disk_limit="1 GiB")
    assert vars(llm) == before


# ---- The object ----------------------------------------------------------------------------------


def test_close_makes_the_object_what_it_was(make_llm: Callable[..., Llm]) -> None:
    llm = make_llm()
    before = dict(vars(llm))
    cache = cached(llm)
    complete(llm, RULES)
    cache.close()
    cache.close()
    assert vars(llm).keys() == before.keys()
    assert llm.cache is None
    state = llm.save_state()
    assert isinstance(state, llama_cpp.LlamaState)
    expected = complete(llm, "and then")
    llm.load_state(state)
    assert complete(llm, "and then") == expected


def test_the_object_is_collected_after_close(make_llm: Callable[..., Llm]) -> None:
    import gc

    llm = make_llm()
    cache = cached(llm)
    complete(llm, RULES)
    cache.close()
    alive = weakref.ref(llm)
    del llm
    gc.collect()
    assert alive() is None


def test_save_state_gives_its_caller_a_whole_state(make_llm: Callable[..., Llm]) -> None:
    llm, like = make_llm(), make_llm()
    cached(llm)
    stream = llm.create_completion(RULES, max_tokens=8, stream=True)
    next(stream)
    state = llm.save_state()
    assert isinstance(state, llama_cpp.LlamaState)
    list(stream)
    like.load_state(state)
    assert like.n_tokens == state.n_tokens > 400


def test_no_whole_state_is_copied(
    make_llm: Callable[..., Llm], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a whole state was copied")

    llm = make_llm()
    cached(llm)
    for name in ("llama_state_get_data", "llama_state_set_data"):
        monkeypatch.setattr(llama, name, fail)
    complete(llm, RULES)
    complete(llm, "Something else.")
    complete(llm, RULES)
    assert prefilled(llm) <= BLOCK


@pytest.mark.parametrize("first_closed", [0, 1])
def test_a_second_cache_takes_over(first_closed: int, make_llm: Callable[..., Llm]) -> None:
    llm = make_llm()
    before = dict(vars(llm))
    caches = [cached(llm), cached(llm)]
    complete(llm, RULES)
    assert [cache.stats()["kept_tokens"] > 0 for cache in caches] == [False, True]
    caches[first_closed].close()
    assert llm.cache is (None if first_closed else caches[1])
    assert isinstance(llm.save_state(), llama_cpp.LlamaState)
    caches[1 - first_closed].close()
    assert vars(llm).keys() == before.keys()


def test_a_cache_may_be_taken_away_and_set_again(make_llm: Callable[..., Llm]) -> None:
    llm = make_llm()
    cache = cached(llm)
    complete(llm, RULES)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    complete(llm, RULES + "With another cache.")
    llm.set_cache(None)
    complete(llm, "Something else.")
    llm.set_cache(cache)
    complete(llm, RULES)
    assert prefilled(llm) <= BLOCK


def test_another_object_does_without_the_cache(
    make_llm: Callable[..., Llm], caplog: pytest.LogCaptureFixture
) -> None:
    llm, other = make_llm(), make_llm()
    cache = cached(llm)
    expected = complete(llm, RULES)
    held = llm.n_tokens
    other.set_cache(cache)
    for _ in range(2):
        assert complete(other, RULES) == expected
        other.reset()
    assert llm.n_tokens == held
    assert "another llama_cpp.Llama" in caplog.text
    other.set_cache(None)


def test_a_subclass_and_its_own_save_state_are_respected(
    text_model: Callable[[str], Path],
) -> None:
    class Mine(llama_cpp.Llama):  # type: ignore[misc]
        saved = 0

        def save_state(self) -> Any:
            self.saved += 1
            return super().save_state()

    llm = Mine(str(text_model("llama")), n_ctx=2048, **ONE_THREAD)
    llm.evaluated = []
    with cached(llm):
        complete(llm, RULES)
        assert llm.saved == 0
        assert isinstance(llm.save_state(), llama_cpp.LlamaState)
        assert llm.saved == 1
    llm.close()


def test_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match=r"llama_cpp\.Llama"):
        kvferry.PromptCache(object(), ram="1 GiB")  # type: ignore[arg-type]


# ---- What goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["find", "restore", "keep"])
@pytest.mark.parametrize(
    "problem", [OSError("no disk"), error(lib.KVF_ERR_CLOSED, "no"), ValueError()]
)
def test_a_fault_costs_time_alone(
    call: str,
    problem: Exception,
    make_llm: Callable[..., Llm],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    llm = make_llm()
    cached(llm)
    expected = complete(llm, RULES)
    llm.reset()

    async def fail(*_: object, **__: object) -> None:
        raise problem

    monkeypatch.setattr(Store, call, fail)
    caplog.clear()
    assert complete(llm, RULES) == expected
    lines = [record for record in caplog.records if record.name == "kvferry.store"]
    assert len(lines) == 1
    assert lines[0].levelno == logging.WARNING
    if call != "keep":
        assert prefilled(llm) == len(tokens_of(llm, RULES))


def test_a_load_that_fails_half_way_costs_time_alone(
    make_llm: Callable[..., Llm], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm()
    cached(llm)
    expected = complete(llm, RULES)
    llm.reset()
    load = kvferry.Llama.load_blocks

    async def load_and_fail(self: kvferry.Llama, *given: Any, **options: Any) -> None:
        await load(self, *given, **options)
        await self.remove(0)
        raise error(lib.KVF_ERR_CACHE_FULL)

    monkeypatch.setattr(kvferry.Llama, "load_blocks", load_and_fail)
    assert complete(llm, RULES) == expected
    assert prefilled(llm) == len(tokens_of(llm, RULES))


def test_a_cache_that_is_too_small_keeps_what_it_can(make_llm: Callable[..., Llm]) -> None:
    llm, like = make_llm(), make_llm()
    cache = cached(llm, ram="1 MiB")
    for text in (RULES, "Something else. " * 50, RULES):
        like.reset()
        assert complete(llm, text) == complete(like, text)
        assert cache.cache_size <= 1 << 20


def test_a_cache_of_which_nothing_can_be_kept_is_told_once(
    make_llm: Callable[..., Llm],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    llm, like = make_llm(), make_llm()
    cached(llm)
    none = (kvferry.BlocksAllowed.NONE, "of an unknown format")
    monkeypatch.setattr(kvferry.Llama, "blocks_allowed", lambda _: none)
    for _ in range(2):
        assert complete(llm, RULES) == complete(like, RULES)
    assert caplog.text.count("of an unknown format") == 1


def test_a_closed_object_is_a_miss(
    make_llm: Callable[..., Llm], caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm()
    cache = cached(llm)
    tokens = tokens_of(llm, RULES)
    complete(llm, RULES)
    llm.close()
    with pytest.raises(KeyError):
        cache[tokens]
    assert "freed" in caplog.text
    cache.close()


def test_a_closed_cache_is_a_miss(
    make_llm: Callable[..., Llm], caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm()
    cache = cached(llm)
    expected = complete(llm, RULES)
    cache.close()
    llm.set_cache(cache)
    llm.reset()
    assert complete(llm, RULES) == expected
    assert prefilled(llm) == len(tokens_of(llm, RULES))
    assert "prompt cache" in caplog.text
    with pytest.raises(kvferry.EngineClosed):
        cache.stats()
    llm.set_cache(None)


@pytest.mark.anyio
async def test_a_completion_on_the_context_s_own_thread_does_not_wait_for_itself(
    make_llm: Callable[..., Llm], caplog: pytest.LogCaptureFixture
) -> None:
    """A program attaches the same object to an engine of its own."""
    llm = make_llm()
    cached(llm)
    expected = complete(llm, RULES)
    llm.reset()
    async with kvferry.Engine("host") as engine:
        model = engine.attach(llm)
        assert await model.run(complete, llm, RULES) == expected
        assert prefilled(llm) == len(tokens_of(llm, RULES))
    assert "context's thread" in caplog.text


def test_ctrl_c_in_a_restore_leaves_a_usable_object(
    make_llm: Callable[..., Llm], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm()
    cached(llm)
    expected = complete(llm, RULES)
    complete(llm, "Something else.")
    load = kvferry.Llama.load_blocks

    async def load_slowly(self: kvferry.Llama, *given: Any, **options: Any) -> None:
        threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.2)
            await load(self, *given, **options)

    monkeypatch.setattr(kvferry.Llama, "load_blocks", load_slowly)
    with pytest.raises(KeyboardInterrupt):
        complete(llm, RULES)
    monkeypatch.undo()
    assert complete(llm, RULES) == expected


def test_several_threads_take_turns(make_llm: Callable[..., Llm]) -> None:
    """As the server of llama-cpp-python does: one object, a lock, and any thread of a pool."""
    llm, like = make_llm(), make_llm()
    cached(llm)
    texts = [RULES + f"{number}?" for number in range(4)]
    expected = [complete(like, text) for text in texts]
    lock, wrong = threading.Lock(), []

    def ask(number: int) -> None:
        for _ in range(2):
            with lock:
                if complete(llm, texts[number]) != expected[number]:
                    wrong.append(number)
                complete(llm, "Something else.")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
