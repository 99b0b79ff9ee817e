"""`kvferry store warm`: prompts that a server finds when it starts."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import anyio.to_thread
import kvferry
import pytest
from kvferry.tools.libllama import Context, ContextOptions, Found, Libllama, Model
from support.llama_reference import LIBRARY_FOLDER
from support.programs import run_kvferry
from support.text_model import write_text_model

pytestmark = pytest.mark.anyio

BEGIN = "Once upon a time, when moving a cache still helped, there lived a queue. " * 3
TEXTS = [BEGIN + "It was long.", BEGIN + "It was short."]
BLOCK = 64
LIMIT = "256 MiB"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("text") / "model.gguf")


def prompts_file(folder: Path, prompts: Sequence[str]) -> Path:
    file = folder / "prompts.txt"
    file.write_text("\n\n".join(prompts) + "\n")
    return file


def arguments(folder: Path, prompts: Path, path: Path, *more: str) -> list[str]:
    named = ["--model", str(path), "--disk-limit", LIMIT, "--ram", "64 MiB"]
    named += ["--device", "host", "--block-tokens", str(BLOCK), "--llama-lib", str(LIBRARY_FOLDER)]
    return ["store", "warm", str(folder), str(prompts), *named, *more]


def warm(folder: Path, prompts: Path, path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run_kvferry(*arguments(folder, prompts, path, *more))


def kept(done: subprocess.CompletedProcess[str]) -> list[tuple[str, int]]:
    """The names and tokens that the command has printed."""
    assert done.returncode == 0, done.stderr
    return [(line.split()[0], int(line.split()[1])) for line in done.stdout.splitlines()]


@contextmanager
def model_of(path: Path) -> Iterator[Model]:
    library = Libllama(Found(str(LIBRARY_FOLDER / "libllama.so"), "the test"))
    with Model(library, path, gpu=False) as model:
        yield model


async def restored(
    folder: Path, model: Model, tokens: Sequence[int], salt: bytes = b"", **layout: object
) -> int:
    """How many tokens a context that is new finds in the folder."""
    options = ContextOptions(n_ctx=1024, n_seq_max=1, threads=1, **layout)  # type: ignore[arg-type]
    with Context(model, options) as context:
        async with (
            kvferry.Engine("host") as engine,
            kvferry.Store(
                ram="64 MiB", disk=folder, disk_limit=LIMIT, block_tokens=BLOCK, salt=salt
            ) as store,
        ):
            llama = engine.attach(context.address, library=model.library.loaded_as)
            return await store.restore(llama, 0, tokens, leave=0)


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
async def test_a_new_program_finds_the_prompts(tmp_path: Path, kind: str) -> None:
    folder, path = tmp_path / "store", write_text_model(tmp_path / "model.gguf", kind)
    done = warm(folder, prompts_file(tmp_path, TEXTS), path)
    with model_of(path) as model:
        tokens = [model.tokenize(text) for text in TEXTS]
        assert [count for _, count in kept(done)] == list(map(len, tokens))
        for each in tokens:
            assert await restored(folder, model, each) == len(each)
        assert await restored(folder, model, tokens[0], salt=b"another") == 0
    assert done.stderr == "", "no terminal, no progress"
    names = {row["name"]: row for row in json.loads(listed(folder))}
    assert [names[name]["tokens"] for name, _ in kept(done)] == list(map(len, tokens))
    assert not any(row["pinned"] for row in names.values())


def listed(folder: Path) -> str:
    return run_kvferry("store", "list", str(folder), "--json").stdout


async def test_tokens_salt_layout_and_pin(tmp_path: Path, path: Path) -> None:
    folder, prompts, salt = tmp_path / "store", tmp_path / "prompts.jsonl", tmp_path / "salt"
    prompts.write_text(json.dumps({"tokens": list(range(3, 203))}) + "\n")
    salt.write_bytes(b"of a tenant")
    layout = ["--no-flash-attention", "--pin", "--salt-file", str(salt)]
    [(name, count)] = kept(warm(folder, prompts, path, *layout))
    with model_of(path) as model:
        tokens = list(range(3, 203))
        assert await restored(folder, model, tokens, salt=b"of a tenant") == 0
        found = await restored(folder, model, tokens, salt=b"of a tenant", flash_attention=False)
    assert found == count == 200
    [row] = json.loads(listed(folder))
    assert (row["name"], row["pinned"]) == (name, True)


def test_what_is_there_is_not_computed_again(tmp_path: Path, path: Path) -> None:
    prompts = prompts_file(tmp_path, TEXTS)
    first = kept(warm(tmp_path / "store", prompts, path))
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "store/parts").iterdir()}
    text = on_a_terminal(arguments(tmp_path / "store", prompts, path))
    assert "2/2 prompts, 0 tokens computed" in text
    assert kept(warm(tmp_path / "store", prompts, path)) == first
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "store/parts").iterdir()}
    assert after == before


def program(*arguments: str) -> list[str]:
    code = "import sys; from kvferry.tools.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, *arguments]


def on_a_terminal(arguments: list[str]) -> str:
    """Runs the command with a terminal as its standard error, and returns what it writes there."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(program(*arguments), stdout=subprocess.DEVNULL, stderr=theirs) as done:
        os.close(theirs)
        written = bytearray()
        try:
            while piece := os.read(ours, 4096):
                written += piece
        except OSError:
            pass  # nobody has the other end any more
        os.close(ours)
    assert done.returncode == 0, written
    return written.decode()


def test_a_terminal_shows_progress(tmp_path: Path, path: Path) -> None:
    text = on_a_terminal(arguments(tmp_path / "store", prompts_file(tmp_path, TEXTS), path))
    last = [line for line in text.split("\r") if "prompts" in line][-1]
    assert last.startswith("2/2 prompts, ")
    assert "tokens/s" in last
    assert text.endswith("\r\x1b[K"), "the line is removed in the end"


def interrupted(command: list[str]) -> list[str]:
    """Interrupts a command when it has printed a line; returns what it has printed in the end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        lines = [running.stdout.readline()]
        running.send_signal(signal.SIGINT)
        lines += running.stdout.readlines()
    assert running.returncode == 130
    return lines


async def test_an_interrupted_command_leaves_what_it_has_printed(
    tmp_path: Path, path: Path
) -> None:
    texts = [f"{number} {BEGIN}" for number in range(300)]
    folder = tmp_path / "store"
    command = program(*arguments(folder, prompts_file(tmp_path, texts), path))
    lines = await anyio.to_thread.run_sync(interrupted, command)
    assert lines[0]
    assert len(lines) < 300
    with model_of(path) as model:
        for text in texts[: len(lines)]:
            tokens = model.tokenize(text)
            assert await restored(folder, model, tokens) == len(tokens)


def test_a_limit_that_is_too_small_is_told(tmp_path: Path, path: Path) -> None:
    prompts = prompts_file(tmp_path, TEXTS)
    done = warm(tmp_path / "store", prompts, path, "--disk-limit", "600 KiB")
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("prompts.jsonl", '{"prompt": "a"}\nplain\n', "prompt 2 is no object"),
        ("prompts.jsonl", '{"text": "a"}\n', "prompt 1 is no object"),
        ("prompts.jsonl", '{"prompt": 3}\n', "prompt 1 is no object"),
        ("prompts.jsonl", '{"tokens": ["a"]}\n', "prompt 1 is no object"),
    ],
)
def test_a_file_without_prompts_is_refused(
    tmp_path: Path, path: Path, name: str, content: str, reason: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    done = warm(tmp_path / "store", file, path)
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert not (tmp_path / "store").exists()
