"""Choosing one of several libllama in a process. Each test runs a process of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.llama_reference import LIBRARY_FOLDER
from support.programs import run_python

PROGRAM = """
import ctypes, sys
import anyio, kvferry
from support import llama_reference

context = llama_reference.Model({model!r}).context()
context.decode(0, [1, 2, 3])
for other in sys.argv[2:]:
    ctypes.CDLL(other)

async def main():
    async with kvferry.Engine("host") as engine:
        try:
            llama = engine.attach(context.address, library=sys.argv[1] or None)
        except kvferry.LibraryNotFound as error:
            print("ambiguous" if "several" in str(error) else error)
        else:
            assert (await llama.save(0)).to_bytes() == context.state_get(0)
            print(llama.describe()["library"])

anyio.run(main)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a copy of this libllama, which the loader loads as another library."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in LIBRARY_FOLDER.resolve().iterdir():
        (folder / file.name).symlink_to(file)
    for name in ("libllama.so", "libllama.so.old"):
        (folder / name).unlink(missing_ok=True)
        shutil.copy(LIBRARY_FOLDER / "libllama.so", folder / name)
    return folder


@pytest.fixture
def attached(folder: Path, model_path: Callable[..., Path]) -> Callable[..., str]:
    """`attached(library, *others)` runs a process that has loaded this libllama and `others`, and
    returns the path of the libllama that is attached to."""

    def attach(library: str | Path, *others: Path) -> str:
        program = PROGRAM.format(model=str(model_path("llama")))
        done = run_python(
            *("-c", program, str(library), *map(str, others)),
            environment={"LLAMA_CPP_LIB_PATH": str(folder)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return attach


def test_several_libraries_are_ambiguous_unless_a_part_of_one_path_tells(
    attached: Callable[..., str], folder: Path
) -> None:
    used, other = folder / "libllama.so", folder / "libllama.so.old"
    assert attached("", other) == "ambiguous"
    assert attached("libllama.so", other) == "ambiguous"
    assert attached("") == str(used)


def test_a_library_named_by_its_exact_path_is_never_ambiguous(
    attached: Callable[..., str], folder: Path
) -> None:
    """The path is also the beginning of another library's path."""
    used, other = folder / "libllama.so", folder / "libllama.so.old"
    assert attached(used, other) == str(used)


def test_a_link_to_a_library_is_an_exact_path_of_it(
    attached: Callable[..., str], folder: Path
) -> None:
    used, other = folder / "libllama.so", folder / "libllama.so.old"
    link = folder / "linked.so"
    link.symlink_to(used)
    assert attached(link, other) == str(used)
