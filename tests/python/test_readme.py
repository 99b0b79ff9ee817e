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


@pytest.mark.parametrize("example", examples("python"))
def test_python_example_goes_on_where_the_first_conversation_was(
    example: str, tmp_path: Path
) -> None:
    package = importlib.util.find_spec("llama_cpp")
    assert package is not None
    assert package.origin is not None
    # libggml looks for its backends in the current folder too. (In a llama-cpp-python that was
    # built from its sources, the backends are parts of libggml.)
    for backend in (Path(package.origin).parent / "lib").glob("libggml-*.so"):
        (tmp_path / backend.name).symlink_to(backend.resolve())
    write_text_model(tmp_path / "model.gguf")
    (tmp_path / "example.py").write_text(example)
    (tmp_path / "program.py").write_text(PYTHON_PROGRAM)

    # With llama_cpp's own libllama, which llama_cpp.Llama fits.
    done = run_python(
        *("-W", "error", "program.py"),
        environment={"LLAMA_CPP_LIB_PATH": None},
        folder=tmp_path,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d{4,} bytes\n\d{4,} bytes wait for their turn\n", done.stdout), (
        done.stdout
    )


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
    assert len(examples("python")) == 1
    assert len(examples("c")) == 1
