"""Type checkers accept right programs that use kvferry, and refuse wrong ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

PROGRAM = """
import array
import ctypes
import mmap

import kvferry
import numpy as np


class OnDevice:
    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {}


class Lent:
    def __dlpack__(self, *, stream: int | None = None) -> object:
        return stream


def work(number: int, *, times: int = 1) -> str:
    return "x" * number * times


async def program(engine: kvferry.Engine, llama: kvferry.Llama, buffer: kvferry.Buffer) -> None:
    region = kvferry.Region(4096, 8)
    text = bytearray(8)
    {statement}
"""

RIGHT = [
    "await engine.copy_out(b'')",
    "await engine.copy_out(memoryview(b''), into=bytearray(3))",
    "await engine.copy_out(np.zeros(3), into=np.zeros(3, np.uint8))",
    "await engine.copy_out([np.zeros(3), b'', array.array('d')], into=mmap.mmap(-1, 10))",
    "await engine.copy_out([OnDevice(), Lent()], into=buffer)",
    "await engine.copy_out(region)",
    "await engine.copy_in([region, region], (ctypes.c_uint8 * 8)())",
    "await engine.copy_in(text, buffer, priority='urgent', after_stream=1)",
    "snapshot: kvferry.Snapshot = await llama.save(0, into=text, mode='snapshot')",
    "await llama.load(await llama.save(), 0, mode='ahead')",
    "await llama.load(b'', seq=0)",
    "blocks: list[kvferry.Block] = await llama.save_blocks(0, 0, 5, into=[text], keys=[b'k'])",
    "checkpoint: kvferry.Checkpoint = await llama.save_checkpoint(key=b'k')",
    "await llama.load_blocks(await llama.save_blocks(), 1, checkpoint=None)",
    "await (await kvferry.Block.read('block')).write('block')",
    "reason: str = llama.blocks_allowed()[1] if llama.blocks_allowed()[0].blocks else ''",
    "answer: str = await llama.run(work, 1, times=2)",
    "registered: kvferry.Buffer = await engine.register(np.zeros(3))",
]

WRONG = {
    "await engine.allocate('10')": "arg-type",
    "await engine.copy_out(5)": "arg-type",
    "await engine.copy_out(b'', into=5)": "arg-type",
    "await engine.copy_out('text')": "arg-type",
    "await engine.copy_out(None)": "arg-type",
    "await engine.copy_out([region, 5])": "list-item",
    "await engine.copy_in(text, None)": "arg-type",
    "await engine.copy_in(text, b'', priority='high')": "arg-type",
    "await engine.copy_in(text, b'', after_stream='0')": "arg-type",
    "await llama.save(None)": "arg-type",
    "await llama.save(0, into=5)": "arg-type",
    "await llama.save(0, mode='ahead')": "arg-type",
    "await llama.load(5, 0)": "arg-type",
    "await llama.load(b'', None)": "arg-type",
    "await llama.load(b'')": "call-arg",
    "await llama.save_blocks(0, '0')": "arg-type",
    "await llama.save_blocks(0, into=text)": "arg-type",
    "await llama.save_checkpoint(0, key='k')": "arg-type",
    "await llama.load_blocks([b''], 0)": "list-item",
    "await llama.load_blocks([], 0, checkpoint=b'')": "arg-type",
    "await llama.remove('0')": "arg-type",
    "llama.size(None)": "arg-type",
    "await llama.run(work, '1')": "arg-type",
    "await llama.run(work, 1, often=2)": "call-arg",
    "number: int = await llama.run(work, 1)": "arg-type",
    "await llama.run(5)": "arg-type",
    "await engine.register(5)": "arg-type",
    "kvferry.Engine(0)": "arg-type",
    "kvferry.Engine(copy_threads=None)": "arg-type",
    "kvferry.Region(None, 8)": "arg-type",
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The codes of mypy's errors, by statement. mypy runs once for all statements."""
    folder = tmp_path_factory.mktemp("programs")
    statements = {f"program_{index}.py": each for index, each in enumerate([*RIGHT, *WRONG])}
    for name, statement in statements.items():
        (folder / name).write_text(PROGRAM.replace("{statement}", statement))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", os.devnull, "--strict", *statements],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, set[str]] = {statement: set() for statement in statements.values()}
    for name, code in re.findall(r"^(\w+\.py):\d+: error: .*\[([\w-]+)\]$", done.stdout, re.M):
        found[statements[name]].add(code)
    return found


@pytest.mark.parametrize("statement", RIGHT)
def test_a_right_program_passes(complaints: dict[str, set[str]], statement: str) -> None:
    assert complaints[statement] == set()


@pytest.mark.parametrize("statement", WRONG)
def test_a_wrong_argument_is_refused(complaints: dict[str, set[str]], statement: str) -> None:
    assert complaints[statement] == {WRONG[statement]}
