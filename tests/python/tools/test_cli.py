"""The command line: its options, and what it says about bad ones; the command `kvferry bench`."""

from __future__ import annotations

import json
from pathlib import Path

import kvferry
import pytest
from kvferry.tools import libllama
from kvferry.tools.table import table
from support.programs import run_kvferry, run_python


def test_bench_writes_the_figures_that_were_asked_for(tmp_path: Path) -> None:
    done = run_kvferry(
        "bench", "--tokens", "32", "--only", "V transposed: save", "--out", str(tmp_path / "out")
    )

    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [line["stage"] for line in report["results"]] == ["V transposed"]
    assert report["results"][0]["value"] > 0
    assert json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["demo", "--tokens", "many"], "'many' is not a number of tokens"),
        (["demo", "--tokens", "0"], "between 16 and 1000000 tokens"),
        (["demo", "--device", "tpu"], "tpu"),
        (["demo", "--llama-lib", "/nowhere"], "/nowhere is not a folder"),
        (["demo", "--llama-lib", "/proc/self/task"], "no libllama.so in /proc/self/task"),
        (["demo", "--model", "/nowhere/model.gguf"], "no model file /nowhere/model.gguf"),
        (["demo", "--model", __file__], "can't load"),
        (["demo", "--json", "/nowhere/demo.json"], "no folder to write to: '/nowhere'"),
        (["demo", "--picture", "/nowhere/demo.png"], "no folder to write to: '/nowhere'"),
        (["demo", "--picture", "demo.nonsense"], "demo.nonsense ends in no kind of picture: .avif"),
        (["bench", "dances"], "dances"),
        (["bench", "--out", "/proc/nothing"], "/proc/nothing"),
        (["bench", "--only", "nonsense"], "no measurement's name contains 'nonsense': contiguous"),
        (["bench", "blocks", "--only", "pageable"], "no measurement's name contains 'pageable'"),
        (["bench", "--only", "save", "--only", "nonsense"], "contains 'nonsense'"),
        (["config"], "say what to print"),
    ],
)
def test_bad_options_are_named(arguments: list[str], complaint: str) -> None:
    done = run_kvferry(*arguments)

    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert "saving" not in done.stderr  # nothing has been done
    assert "preparing" not in done.stderr


def test_the_package_is_a_program() -> None:
    done = run_python("-m", "kvferry", "--version")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"kvferry {kvferry.__version__}\n"


def test_the_program_is_named_alike_however_it_is_called() -> None:
    done = run_python("-m", "kvferry", "dance")

    assert done.returncode == 2
    assert done.stderr.startswith("usage: kvferry ")


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    (tmp_path / "libllama.so").write_text("not a library")

    done = run_kvferry("demo", "--llama-lib", str(tmp_path))

    assert done.returncode == 2
    assert str(tmp_path / "libllama.so") in done.stderr


def test_libllama_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, environment = tmp_path / "named", tmp_path / "environment"
    for folder in (named, environment):
        folder.mkdir()
        (folder / "libllama.so").touch()

    monkeypatch.setenv(libllama.ENVIRONMENT_VARIABLE, str(environment))
    assert libllama.find(named).path == str(named / "libllama.so")
    assert libllama.find().path == str(environment / "libllama.so")
    monkeypatch.delenv(libllama.ENVIRONMENT_VARIABLE)
    assert libllama.find().source == "installed llama_cpp"


def test_table_aligns_words_left_and_numbers_right() -> None:
    text = table(["name", "two\nlines"], [["a", "1"], ["longer", "22"]])
    assert text.split("\n") == [
        "          two",
        "name    lines",
        "------  -----",
        "a           1",
        "longer     22",
    ]
