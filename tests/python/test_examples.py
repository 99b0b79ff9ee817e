"""The programs in examples/python, as a newcomer runs them: what they print is compared
with what llama.cpp does by its own calls."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import kvferry
import numpy as np
import pytest
from kvferry.tools import libllama
from support.devices import DEVICES
from support.event_loops import anyio_backend  # noqa: F401
from support.llama_reference import LIBRARY_FOLDER, Context, ContextOptions, Model, keep_log
from support.programs import run_python
from support.text_model import write_text_model

EXAMPLES = Path(__file__).parents[2] / "examples" / "python"


def run(name: str, first: str = "") -> str:
    """Runs a program in a process of its own, after the statements `first`. Returns its output."""
    program = EXAMPLES / name
    code = f"{first}\nimport runpy; runpy.run_path({str(program)!r}, run_name='__main__')"
    done = run_python(
        *("-W", "error", *(["-c", code] if first else [str(program)])),
        environment={"KVFERRY_LLAMA_LIB": str(LIBRARY_FOLDER)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def module(name: str) -> Any:
    """The program's definitions."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
    assert spec is not None
    assert spec.loader is not None
    loaded: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def default_model(model: Callable[..., Model]) -> Model:
    """The one that the programs write."""
    return model("llama")


# ---- The smallest save and load ------------------------------------------------------------------


def test_save_and_load_goes_on_as_llama_cpp_does_without_it(default_model: Model) -> None:
    example = module("save_and_load.py")
    with default_model.context(n_ctx=1024, n_seq_max=2, n_threads=1) as context:
        empty = context.state_size(0)
        context.decode(0, example.PROMPT)
        saved = context.state_size(0)
        logits = context.decode(0, [example.NEXT])
        longer = context.state_size(0)

    assert run("save_and_load.py").splitlines() == [
        f"saved {len(example.PROMPT)} tokens: {saved} bytes",
        f"removed: {empty} bytes are left",
        f"loaded: {longer} bytes with the next token",
        f"most likely next token: {logits.argmax()}; its logits are the same as without the save",
    ]


def test_save_and_load_notices_a_load_that_loads_nothing() -> None:
    printed = run("save_and_load.py", WITHOUT_A_LOAD)
    assert "NOT those without the save" in printed


WITHOUT_A_LOAD = """
import kvferry
async def load(self, snapshot, seq):
    pass
kvferry.Llama.load = load
"""

# ---- Blocks --------------------------------------------------------------------------------------


def test_blocks_go_on_as_llama_cpp_does_without_them(default_model: Model) -> None:
    example = module("blocks.py")
    with default_model.context(n_ctx=1024, n_seq_max=2, n_threads=1) as context:
        context.decode(0, example.PROMPT)
        context.decode(0, example.TURN)
        logits = context.decode(0, [example.NEXT])

    prompt, turn, last = run("blocks.py").splitlines()
    assert prompt.startswith("prompt: saved 3 blocks, positions 0 to 63, 64 to 127, 128 to 191: ")
    assert turn.startswith("turn: saved 2 blocks, positions 192 to 255, 256 to 291: ")
    assert last == (
        f"most likely next token: {logits.argmax()}; its logits are the same as without the save"
    )


def test_a_store_brings_back_a_prompt() -> None:
    kept, restored, last = run("store.py").splitlines()
    assert kept == "kept 292 tokens"
    assert restored == "the next prompt has 342 tokens, of which 292 were restored"
    assert last.endswith("its logits are the same as without the store")


def test_the_example_of_a_store_notices_a_load_that_loads_nothing() -> None:
    first = """
import kvferry
async def load_blocks(self, blocks, seq, *, checkpoint=None, priority=None):
    pass
kvferry.Llama.load_blocks = load_blocks
"""
    assert "NOT those without the store" in run("store.py", first)


def test_blocks_notice_a_load_that_loads_nothing() -> None:
    first = """
import kvferry
async def load_blocks(self, blocks, seq, *, checkpoint=None):
    pass
kvferry.Llama.load_blocks = load_blocks
"""
    assert "NOT those without the save" in run("blocks.py", first)


# ---- A cache for llama-cpp-python ----------------------------------------------------------------


def run_prompt_cache(model: Path, folder: Path) -> list[str]:
    """Runs the program on the libllama that llama-cpp-python's class fits: support.llama_reference
    loads its backends."""
    program = EXAMPLES / "prompt_cache.py"
    code = (
        "import support.llama_reference, runpy, sys; "
        f"sys.argv[:] = ['', {str(model)!r}]; runpy.run_path({str(program)!r}, run_name='__main__')"
    )
    done = run_python(
        *("-W", "error", "-c", code),
        environment={"HOME": str(folder), "KVFERRY_LLAMA_LIB": None, "LLAMA_CPP_LIB_PATH": None},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_prompt_cache_brings_back_what_programs_have_evaluated(tmp_path: Path) -> None:
    model = write_text_model(tmp_path / "model.gguf")
    first, again = (run_prompt_cache(model, tmp_path) for _ in range(2))
    assert first[::2] == again[::2]  # the same answers

    def restored(lines: list[str]) -> list[int]:
        return [int(line.split()[2]) for line in lines[1::2]]

    counts = np.diff([0, *restored(first)])
    shared = counts[1]
    assert shared > 1000  # a token a byte
    # Whole blocks of 64 tokens, and from the third prompt on up to where the questions differ.
    assert counts[0] == 0
    assert shared % 64 == 0
    assert shared < counts[2] < shared + 64
    assert all(count >= shared for count in np.diff([0, *restored(again)]))


# ---- A cache of PyTorch --------------------------------------------------------------------------

WITHOUT_PYTORCH = "import sys; sys.modules['torch'] = None"


def expected_lines(example: Any, where: str) -> str:
    nbytes = 2 * example.LAYERS * example.HEADS * example.TOKENS * example.WIDTH * 2
    return (
        f"saved {2 * example.LAYERS} tensors of {where}: {nbytes} bytes\n"
        "loaded into another row: the same attention\n"
    )


def test_pytorch_cache_with_numpy_arrays_comes_back() -> None:
    example = module("pytorch_cache.py")
    assert run("pytorch_cache.py", WITHOUT_PYTORCH) == expected_lines(example, "NumPy")


def test_pytorch_cache_comes_back() -> None:
    torch = pytest.importorskip(
        "torch",
        reason="no PyTorch here: examples/python/pytorch_cache.py is tested with NumPy alone",
    )
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    example = module("pytorch_cache.py")
    assert run("pytorch_cache.py") == expected_lines(example, f"PyTorch on {device}")


def test_pytorch_cache_notices_a_load_that_loads_nothing() -> None:
    first = """
import kvferry
async def copy_in(self, target, data, **options):
    pass
kvferry.Engine.copy_in = copy_in
"""
    assert "loaded into another row: it DIFFERS" in run("pytorch_cache.py", first)


# ---- Many conversations over few sequences -------------------------------------------------------

Transcript = list[tuple[str, list[int]]]


def check_answers(context: Context, transcript: Transcript) -> int:
    """Every token of every answer is what llama.cpp answers to all that was said before, in a
    sequence that was never saved. Returns how many were checked.

    The cells and the batches are others than in the program, so sums are rounded otherwise: the
    token may be one that was as likely as the most likely one.
    """
    checked = 0
    context.seq_rm(0)
    logits = np.zeros(0, np.float32)
    for who, tokens in transcript:
        if who == "user":
            logits = context.decode(0, tokens)
            continue
        for token in tokens:
            rounding = 0.02 * (logits.max() - logits.min())
            assert logits[token] >= logits.max() - rounding, (token, int(logits.argmax()))
            logits = context.decode(0, [token])
            checked += 1
    return checked


@pytest.fixture
def reference(default_model: Model) -> Any:
    options = ContextOptions(n_ctx=4096, n_seq_max=1, n_threads=1)
    with default_model.context(options) as context:
        yield context


def printed_transcripts(text: str) -> list[tuple[int, Transcript]]:
    """Of each conversation how often it was loaded, and what was said."""
    found: list[tuple[int, Transcript]] = []
    for line in text.splitlines():
        if match := re.fullmatch(r"conversation (\d+): loaded (\d+) times", line):
            assert int(match[1]) == len(found)
            found.append((int(match[2]), []))
        else:
            who, tokens = line.strip().split(": ")
            found[-1][1].append((who, [int(token) for token in tokens.split()]))
    return found


def test_conversations_get_the_answers_that_they_get_alone(reference: Context) -> None:
    example = module("conversations.py")

    conversations = printed_transcripts(run("conversations.py"))

    assert len(conversations) == example.CONVERSATIONS
    for name, (loads, transcript) in enumerate(conversations):
        answers = [len(tokens) for who, tokens in transcript if who == "answer"]
        whole = [example.ANSWER] * example.TURNS
        if name == example.LEAVES:
            assert answers[1] < example.ANSWER
            whole[1] = answers[1]
        assert answers == whole
        assert check_answers(reference, transcript) == sum(whole)
        assert loads <= example.TURNS - 1
    # There are more conversations than sequences, so some had to make room in every round.
    assert sum(loads for loads, _ in conversations) >= example.CONVERSATIONS


def test_an_answer_to_another_conversation_is_noticed(reference: Context) -> None:
    conversations = printed_transcripts(run("conversations.py"))
    (_, first), (_, second) = conversations[:2]
    with pytest.raises(AssertionError):
        check_answers(reference, [first[0], second[1]])


@pytest.fixture
def context(model_path: Callable[..., Path]) -> Iterator[libllama.Context]:
    """As the program opens it, with room for longer conversations."""
    library = libllama.Libllama(libllama.find(LIBRARY_FOLDER))
    options = libllama.ContextOptions(n_ctx=4096, n_seq_max=3, threads=1)
    with (
        libllama.Model(library, model_path("llama"), gpu=False) as opened,
        libllama.Context(opened, options) as context,
    ):
        yield context
    keep_log()


@pytest.mark.anyio
async def test_conversations_are_right_wherever_turns_are_cancelled(
    context: libllama.Context, reference: Context
) -> None:
    example = module("conversations.py")
    count, turns = 3, 12
    cancelled = 0

    async def talk(user: Any, chance: random.Random) -> None:
        nonlocal cancelled
        for _ in range(turns):
            with anyio.move_on_after(chance.uniform(0, 0.05)) as scope:
                await user.take_turn()
            cancelled += scope.cancelled_caught
        await user.take_turn()

    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address, library=context.model.library.loaded_as)
        sequences = example.Sequences(llama, count)
        users = [example.User(name, llama, context, sequences) for name in range(2 * count)]
        async with anyio.create_task_group() as tasks:
            for user in users:
                tasks.start_soon(talk, user, random.Random(user.conversation.name))
        residents = [user.conversation.seq for user in users if user.conversation.seq is not None]
        assert sorted(residents) == list(range(count))

    assert cancelled > count
    for user in users:
        assert user.transcript[-1][0] == "answer"
        assert check_answers(reference, user.transcript) >= example.ANSWER
