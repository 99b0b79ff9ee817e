"""Runs the README's examples."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from support.programs import run_python
from support.text_model import write_text_model

ROOT = Path(__file__).parents[2]


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model, in which llama_cpp finds its backends."""
    package = importlib.util.find_spec("llama_cpp")
    assert package is not None
    assert package.origin is not None
    # libggml looks for its backends in the current folder too. (In a llama-cpp-python that was
    # built from its sources, the backends are parts of libggml.)
    for backend in (Path(package.origin).parent / "lib").glob("libggml-*.so"):
        (tmp_path / backend.name).symlink_to(backend.resolve())
    write_text_model(tmp_path / "model.gguf")
    return tmp_path


def run_example(name: str, folder: Path, program: str) -> str:
    """Runs the only Python example that uses a name; returns what it printed."""
    [example] = [each for each in examples("python") if name in each]
    (folder / "example.py").write_text(example)
    (folder / "program.py").write_text(program)
    # With llama_cpp's own libllama, which llama_cpp.Llama fits.
    done = run_python(
        *("-W", "error", "program.py"),
        environment={"LLAMA_CPP_LIB_PATH": None, "HOME": str(folder)},
        folder=folder,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_example_goes_on_where_the_first_conversation_was(folder: Path) -> None:
    printed = run_example("llama.save(", folder, PYTHON_PROGRAM)
    assert re.fullmatch(r"\d{4,} bytes\n\d{4,} bytes wait for their turn\n", printed), printed


def test_python_example_knows_its_tokens_the_second_time(folder: Path) -> None:
    first, second = (run_example("kvferry.Store(", folder, QUIET_PROGRAM) for _ in range(2))
    found = re.fullmatch(r"0 of (\d+) tokens were known\n", first)
    assert found, first
    tokens = int(found[1])
    assert tokens > 256
    assert second == f"{tokens // 256 * 256} of {tokens} tokens were known\n"


def test_python_example_with_a_prompt_cache(folder: Path) -> None:
    first, second = (run_example("PromptCache(", folder, QUIET_PROGRAM) for _ in range(2))
    assert first == second
    assert "'prompt_tokens': " in first
    assert list((folder / ".cache" / "prompts" / "parts").iterdir())


QUIET_PROGRAM = """
import functools
import runpy

import llama_cpp

llama_cpp.Llama.__init__ = functools.partialmethod(llama_cpp.Llama.__init__, verbose=False)
runpy.run_path("example.py", run_name="__main__")
"""


# Runs the example, and compares its object in the end with an object that was never saved.
PYTHON_PROGRAM = """
import runpy

import llama_cpp
import numpy as np

made = []


class Llama(llama_cpp.Llama):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options, verbose=False)
        made.append(self)


def logits(llm):
    pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(pointer, (llm.n_vocab(),))


llama_cpp.Llama = Llama
runpy.run_path("example.py", run_name="__main__")
[llm] = made
like = Llama("model.gguf", n_ctx=8192)
like.eval(like.tokenize(b"Once upon a time"))
like.eval(like.tokenize(b" there was", add_bos=False))
assert llm.eval_tokens == like.eval_tokens, (llm.eval_tokens, like.eval_tokens)
assert np.array_equal(logits(llm), logits(like))
for each in made:
    each.close()
"""


@pytest.mark.parametrize("example", examples("c"))
def test_c_example_compiles(example: str, tmp_path: Path) -> None:
    include, body = example.split("\n", 1)
    source = tmp_path / "example.c"
    source.write_text(f"{include}\nvoid example(struct llama_context *ctx) {{\n{body}}}\n")
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]

    done = subprocess.run(
        ["cc", "-std=c11", *warnings, "-fsyntax-only", f"-I{ROOT / 'include'}", str(source)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr


def test_there_are_examples() -> None:
    """Otherwise the tests above would test nothing."""
    assert len(examples("python")) == 3
    assert len(examples("c")) == 1
