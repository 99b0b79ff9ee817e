"""Several contexts and engines in one process, other callers of libllama, and restored slots."""

from __future__ import annotations

import ctypes
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import anyio
import kvferry
import pytest
from support import c_interface
from support.devices import DEVICES
from support.like_contexts import MakeContext
from support.llama_reference import LIBRARY_FOLDER, Context, Model

pytestmark = pytest.mark.anyio

C_DEVICES = c_interface.Devices[DEVICES.upper()]


def make_prompted(make_context: MakeContext, kind: str) -> Context:
    context = make_context(kind)
    context.decode_in_turn([0, 1], 40)
    return context


# ---- The slots -----------------------------------------------------------------------------------


def libllama_segments() -> list[tuple[int, int, str]]:
    """Returns begin, end and protection of libllama's mapped memory."""
    library = str((LIBRARY_FOLDER / "libllama.so").resolve())
    segments = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, protection, _, _, _, *path = line.split(maxsplit=5)
        if path == [library]:
            begin, end = (int(address, 16) for address in addresses.split("-"))
            segments.append((begin, end, protection))
    return segments


def words_of_libllama() -> dict[int, bytes]:
    """Returns libllama's memory without the code, word by word: it has the relocation slots."""
    words: dict[int, bytes] = {}
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for begin, end, protection in libllama_segments():
            if "x" not in protection:
                memory.seek(begin)
                content = memory.read(end - begin)
                words |= {begin + at: content[at : at + 8] for at in range(0, len(content), 8)}
    return words


def merged(segments: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Joins neighbours of equal protection, because the kernel may divide them in any way."""
    result: list[tuple[int, int, str]] = []
    for begin, end, protection in segments:
        if result and result[-1][1:] == (begin, protection):
            begin = result.pop()[0]
        result.append((begin, end, protection))
    return result


async def test_the_last_detach_leaves_libllama_as_it_was(make_context: MakeContext) -> None:
    context, other = make_prompted(make_context, "llama"), make_prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        async with engine.attach(context.address) as llama:
            await llama.load(await llama.save(0), 2)  # binds what is bound at the first call
        segments, words = merged(libllama_segments()), words_of_libllama()

        llama = engine.attach(context.address)
        attached = words_of_libllama()
        changed = {at for at, word in words.items() if attached[at] != word}
        assert len(changed) >= 4  # tensor_get, tensor_set, buffer_free, abort

        second = engine.attach(other.address)
        await llama.detach()
        assert words_of_libllama() == attached
        assert (await second.save(0)).to_bytes() == other.state_get(0)
        await second.detach()
        assert words_of_libllama() == words
        assert merged(libllama_segments()) == segments


def write_words(words: dict[int, bytes]) -> None:
    """Writes words into slots, whatever the protection of their pages."""
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        for at, word in words.items():
            memory.seek(at)
            memory.write(word)


async def test_slots_that_the_loader_binds_while_the_tap_is_installed_are_hooked_again(
    make_context: MakeContext,
) -> None:
    """With lazy binding the loader looks a function up, and writes the slot after kvferry has."""
    context = make_prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        async with engine.attach(context.address) as llama:
            await llama.load(await llama.save(0), 2)  # binds functions that are bound late
        bound = words_of_libllama()
        async with engine.attach(context.address) as llama:
            attached = words_of_libllama()
            functions = {at: word for at, word in bound.items() if attached[at] != word}
            expected = context.state_get(0)
            for _ in range(2):
                write_words(functions)
                before = llama.describe()["recorded_calls"]
                assert (await llama.save(0)).to_bytes() == expected
                assert llama.describe()["recorded_calls"] > before
                assert words_of_libllama() == attached
            write_words(functions)
            before = llama.describe()["recorded_calls"]
            await llama.load(expected, 2)
            assert llama.describe()["recorded_calls"] > before
            write_words(functions)
            async with engine.attach(context.address):
                assert words_of_libllama() == attached
            write_words(dict(list(functions.items())[:1]))  # detaches with one of them bound
        assert words_of_libllama() == bound


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
async def test_a_tap_that_somebody_went_past_is_an_error(
    make_context: MakeContext, kind: str
) -> None:
    """Puts functions into the slots that call ggml's functions, and not kvferry's before them."""
    context, like = make_prompted(make_context, kind), make_prompted(make_context, kind)
    state = like.state_get(0)
    like.state_set(2, state)  # binds functions that are bound late
    before = words_of_libllama()
    ggml = ctypes.CDLL(str(LIBRARY_FOLDER / "libggml-base.so"))
    number, address = ctypes.c_size_t, ctypes.c_void_p
    function = ctypes.CFUNCTYPE(None, address, address, number, number)
    passers = {}
    for name in ("ggml_backend_tensor_get", "ggml_backend_tensor_set"):
        own = function((name, ggml))
        passers[ctypes.cast(own, address).value] = function(own)
    async with kvferry.Engine(DEVICES) as engine, engine.attach(context.address) as llama:
        attached = words_of_libllama()
        passed, ours = {}, {}
        for at, word in before.items():
            passer = passers.get(int.from_bytes(word, "little"))
            if passer is not None and attached[at] != word:
                passed[at] = (ctypes.cast(passer, address).value or 0).to_bytes(8, "little")
                ours[at] = attached[at]
        assert len(passed) >= 2
        write_words(passed)
        try:
            with pytest.raises(kvferry.TapUnavailable, match="recorded nothing"):
                await llama.save(0)
            with pytest.raises(kvferry.TapUnavailable, match="recorded"):
                await llama.load(state, 2)
            assert context.pos_max(2) < 0
        finally:
            write_words(ours)
        assert (await llama.save(0)).to_bytes() == state
        await llama.load(state, 2)
        assert context.state_get(2) == like.state_get(2)


async def test_llama_cpps_own_calls_pass_through_while_attached_and_unseen_afterwards(
    make_context: MakeContext,
) -> None:
    context, like = make_prompted(make_context, "llama"), make_prompted(make_context, "llama")
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        before = llama.describe()
        assert context.state_get(0) == state
        assert context.state_set(2, state) == len(state)
        like.state_set(2, state)
        assert context.state_get(2) == like.state_get(2)
        after = llama.describe()
        assert after["passed_calls"] > before["passed_calls"]
        assert after["recorded_calls"] == before["recorded_calls"]

        await llama.save(0)
        recorded = llama.describe()
        assert recorded["recorded_calls"] > after["recorded_calls"]
        assert recorded["passed_calls"] == after["passed_calls"]

        await llama.detach()
        context.state_get(0)
        again = engine.attach(context.address)
        assert again.describe()["passed_calls"] == recorded["passed_calls"]


async def test_threads_that_do_not_record_are_untouched(make_context: MakeContext) -> None:
    """Another thread saves and loads in its own context by llama.cpp's calls all the time."""
    context, other = make_prompted(make_context, "llama"), make_prompted(make_context, "gemma3")
    expected = context.state_get(0)
    states = [other.state_get(0)]
    assert other.state_set(0, states[0]) == len(states[0])  # from now on in the same cells again
    states[0] = other.state_get(0)
    stop = threading.Event()
    rounds = 0

    def save_and_load() -> None:
        nonlocal rounds
        while not stop.is_set():
            assert other.state_set(0, states[0]) == len(states[0])
            states.append(other.state_get(0))
            rounds += 1

    thread = threading.Thread(target=save_and_load)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        thread.start()
        try:
            saves = 0
            while (saves < 100 or rounds <= 10) and thread.is_alive():
                snapshot = await llama.save(0)
                assert snapshot.to_bytes() == expected
                await llama.load(snapshot, 2)
                saves += 1
        finally:
            stop.set()
            thread.join()
    assert rounds > 10
    assert set(states) == {states[0]}


def a_copy_of_the_library(folder: Path) -> c_interface.Library:
    copy = folder / "another_kvferry.so"
    shutil.copy(c_interface.LIBRARY, copy)
    return c_interface.Library(copy)


@pytest.mark.parametrize("first_to_go", ["the first", "the second"])
async def test_two_copies_of_the_library_both_listen(
    make_context: MakeContext, tmp_path: Path, first_to_go: str
) -> None:
    """The later copy replaces the functions of the earlier one in the slots, and calls them."""
    context = make_prompted(make_context, "llama")
    data = context.state_get(0)
    state = ctypes.create_string_buffer(data, len(data))
    libraries = [c_interface.Library(c_interface.LIBRARY), a_copy_of_the_library(tmp_path)]

    def check(attachment: c_interface.Attachment) -> None:
        buffer = ctypes.create_string_buffer(len(data))
        assert attachment.save(0, buffer).wait() == "KVF_OK"
        assert buffer.raw == data
        assert attachment.load(2, state).wait() == "KVF_OK"

    with libraries[0].engine(C_DEVICES) as one, libraries[1].engine(C_DEVICES) as two:
        words = words_of_libllama()
        attachments = [engine.attach(context.address) for engine in (one, two)]
        for _ in range(3):
            for attachment in attachments:
                check(attachment)
            assert context.state_get(0) == data
            gone = 0 if first_to_go == "the first" else 1
            attachments[gone].detach()
            check(attachments[1 - gone])
            attachments[gone] = (one, two)[gone].attach(context.address)
        for attachment in reversed(attachments):
            attachment.detach()
        assert words_of_libllama() == words


# ---- Several -------------------------------------------------------------------------------------


async def test_several_engines_serve_several_contexts_at_once(make_context: MakeContext) -> None:
    kinds = ["llama", "gemma3", "mamba", "hybrid", "llama", "deepseek2"]
    contexts = [make_prompted(make_context, kind) for kind in kinds]
    likes = [make_prompted(make_context, kind) for kind in kinds]
    expected = [like.state_get(0) for like in likes]
    for like, state in zip(likes, expected, strict=True):
        like.state_set(2, state)

    async def save_and_load(llama: kvferry.Llama, state: bytes) -> None:
        for _ in range(20):
            snapshot = await llama.save(0)
            assert snapshot.to_bytes() == state
            await llama.load(snapshot, 2)

    async with (
        kvferry.Engine(DEVICES) as one,
        kvferry.Engine(DEVICES) as two,
        anyio.create_task_group() as tasks,
    ):
        for index, context in enumerate(contexts):
            llama = (one, two)[index % 2].attach(context.address)
            tasks.start_soon(save_and_load, llama, expected[index])
    for context, like in zip(contexts, likes, strict=True):
        assert context.decode(2, [7]).tobytes() == like.decode(2, [7]).tobytes()


async def test_freeing_one_context_does_not_concern_the_others(
    make_context: MakeContext, model: Callable[..., Model]
) -> None:
    context = make_prompted(make_context, "llama")
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as one, kvferry.Engine(DEVICES) as two:
        llamas = [engine.attach(context.address) for engine in (one, two)]
        for _ in range(5):
            with model("llama").context() as brief:
                brief.decode(0, brief.model.prompt(20))
                freed = one.attach(brief.address)
                await freed.save(0)
                transfers = [await llama.start_save(0) for llama in llamas]
            with pytest.raises(kvferry.ContextFreed):
                await freed.save(0)
            for transfer in transfers:
                assert (await transfer.wait()).to_bytes() == state


async def test_describing_an_attachment_that_ends(model_path: Callable[..., Path]) -> None:
    """Another thread describes the attachment, or finds that there is none any more."""
    attachments: list[c_interface.Attachment] = []
    failures: set[str] = set()
    stop = threading.Event()
    described = 0

    def describe() -> None:
        nonlocal described
        while not stop.is_set():
            if attachments:
                try:
                    assert '"tap": true' in attachments[-1].describe()
                    described += 1
                except c_interface.Failure as failure:
                    failures.add(failure.name)

    threads = [threading.Thread(target=describe) for _ in range(2)]
    path = model_path("llama")
    with c_interface.Library(c_interface.LIBRARY).engine(C_DEVICES) as engine:
        for thread in threads:
            thread.start()
        try:
            for _ in range(60):
                with Model(path) as model, model.context() as context:
                    for number in range(10):
                        attachments[:] = [engine.attach(context.address)]
                        await anyio.sleep(0.0001 * (number % 3))  # described, or not
                        attachments[0].detach()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert described > 0
    assert failures <= {"KVF_ERR_INVALID_HANDLE"}


async def test_a_model_is_told_from_another_by_its_fingerprint(
    make_context: MakeContext, model: Callable[..., Model]
) -> None:
    """It covers all that libllama tells of a model. libllama tells nothing of the weights."""
    async with kvferry.Engine(DEVICES) as engine:

        def fingerprint(source: str | Model, **options: object) -> str:
            return engine.attach(make_context(source, **options).address).fingerprint

        plain = fingerprint("llama")
        assert fingerprint("llama", n_ctx=1024, n_seq_max=2) == plain
        assert fingerprint(model("llama", geometry="other")) != plain
        assert fingerprint(model("llama", layers=5)) != plain
        assert fingerprint("qwen2vl") != plain
        # What it does not cover: weights, and what a state of the cache says itself.
        assert fingerprint(model("llama", seed=1)) == plain
        assert fingerprint("llama", flash_attention=False, kv_unified=False) == plain


async def test_an_attachment_describes_what_its_fingerprint_covers(
    make_context: MakeContext,
) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        description = engine.attach(make_context("llama").address).describe()
    assert description["fingerprint_covers"] == [
        "model description",
        "model size",
        "number of parameters",
        "model metadata",
    ]


async def test_a_variant_tells_what_libllama_does_not(make_context: MakeContext) -> None:
    context = make_prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        plain = engine.attach(context.address)
        adapted = engine.attach(context.address, variant="adapter v1")
        again = engine.attach(context.address, variant="adapter v1")
        other = engine.attach(context.address, variant="adapter v2")
        assert len({plain.fingerprint, adapted.fingerprint, other.fingerprint}) == 3
        assert adapted.describe()["fingerprint"] == adapted.fingerprint
        snapshot = await adapted.save(0)
        await again.load(snapshot, 2)
        for stranger in (plain, other):
            with pytest.raises(kvferry.StateMismatch, match="adapter v1"):
                await stranger.load(snapshot, 2)
        with pytest.raises(kvferry.StateMismatch):
            await adapted.load(await plain.save(0), 2)


async def test_an_attachment_says_what_it_is(make_context: Callable[..., Context]) -> None:
    context = make_context("llama")
    context.decode(0, context.model.prompt(20))
    async with kvferry.Engine("host") as engine:
        llama = engine.attach(context.address)
        model, address = llama.describe()["model"], f"{context.address:#x}"
        assert repr(llama) == f"<Llama at {address}: {model}, no transfer in flight>"
        save = await llama.start_save(0)
        assert repr(save).startswith("<Transfer that saves sequence 0, ")
        snapshot = await save.wait()
        load = await llama.start_load(snapshot, 1)
        await load.wait()
        assert repr(load) == "<Transfer that loads sequence 1, done>"
        await llama.detach()
        assert repr(llama) == f"<Llama at {address}: {model}, detached>"
