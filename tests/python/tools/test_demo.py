"""`kvferry demo`: its output, its files, and its exit status."""

from __future__ import annotations

import importlib.metadata
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from kvferry.tools import extra_packages, libllama
from support.llama_reference import LIBRARY_FOLDER
from support.programs import run_kvferry

FIGURES = {
    "state_bytes",
    "fragments",
    "size_query_us",
    "submit_ms",
    "save_ms",
    "load_ms",
    "native_save_ms",
    "native_load_ms",
    "prefill_ms",
    "decode_p50_ms",
    "decode_p99_ms",
    "bit_identical",
    "turn_tokens",
    "turn_bytes",
    "turn_ms",
}


def test_demo_is_bit_identical_in_every_layout(tmp_path: Path) -> None:
    figures, picture = tmp_path / "demo.json", tmp_path / "demo.png"

    done = run_kvferry("demo", "--tokens", "32", "--json", str(figures), "--picture", str(picture))

    assert done.returncode == 0, done.stderr
    layouts = json.loads(figures.read_text())["layouts"]
    names = [layout["layout"] for layout in layouts]
    assert names[:3] == ["contiguous", "V transposed", "fragmented"]
    assert [layout["bit_identical"] for layout in layouts] == [True] * len(layouts)
    for layout in layouts:
        assert layout.keys() >= FIGURES
    for name in names:
        assert name in done.stdout
    for layout in layouts[:3]:
        assert not layout["turn_checkpoint"]
        share = layout["turn_bytes"] / layout["state_bytes"]
        assert share == pytest.approx(layout["turn_tokens"] / layout["tokens"], rel=0.05)
    restart = json.loads(figures.read_text())["restart"]
    assert restart["bit_identical"] is True
    assert restart["tokens"] == restart["kept_tokens"] == restart["restored_tokens"] == 4 * 32
    assert restart["answer_ms"] >= restart["restore_ms"] > 0
    assert "Of 128 tokens it had to prefill 0." in done.stdout
    for path in (picture, tmp_path / "demo-restart.png"):
        header = path.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(header[16:20], "big") == 1200  # pixels wide


def test_demo_takes_a_model_of_the_users(tmp_path: Path, model_path: Callable[..., Path]) -> None:
    figures = tmp_path / "demo.json"

    done = run_kvferry(
        *("demo", "--tokens", "32", "--model", str(model_path("gemma3"))),
        *("--json", str(figures), "--picture", str(tmp_path / "demo.png")),
    )

    assert done.returncode == 0, done.stderr
    report = json.loads(figures.read_text())
    assert report["model"] == str(model_path("gemma3"))
    assert [layout["bit_identical"] for layout in report["layouts"]] == [True] * 3
    assert {layout["model"] for layout in report["layouts"]} == {report["layouts"][0]["model"]}


def test_demo_says_so_where_a_restarted_process_has_other_logits(tmp_path: Path) -> None:
    done = run_kvferry(
        *("demo", "--tokens", "16", "--picture", str(tmp_path / "demo.png")),
        first="""
from kvferry.tools.demo import restart
process = restart._process
async def another_answer(part, conversation):
    return {**await process(part, conversation), "logits": part}
restart._process = another_answer
""",
    )

    assert done.returncode == 1, done.stderr
    assert "restart: the logits DIFFER" in done.stderr


def test_demo_names_a_process_that_fails(tmp_path: Path) -> None:
    done = run_kvferry(
        *("demo", "--tokens", "16", "--picture", str(tmp_path / "demo.png")),
        first="from kvferry.tools.demo import restart; restart.__name__ = 'no_such_module'",
    )

    assert (done.returncode, done.stdout) == (2, "")
    [*_, last] = done.stderr.splitlines()
    assert last.startswith("kvferry demo: error: the process that should keep has failed: ")
    assert "no_such_module" in last


def test_demo_stops_when_interrupted(tmp_path: Path) -> None:
    # A script's background processes ignore SIGINT, and their children inherit that.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from kvferry.tools.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, "demo", "--json", "demo.json", "--picture", "demo.png"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as demo:
        assert demo.stderr is not None
        for line in demo.stderr:
            if "saving" in line:
                break
        demo.send_signal(signal.SIGINT)
        rest = demo.stderr.read()
        assert demo.wait(timeout=60) == 130
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_demo_says_so_where_the_logits_differ(tmp_path: Path) -> None:
    figures = tmp_path / "demo.json"

    done = run_kvferry(
        "demo",
        "--tokens",
        "16",
        "--json",
        str(figures),
        "--picture",
        str(tmp_path / "demo.png"),
        first="import os; from kvferry.tools import libllama; "
        "libllama.Context.logits = lambda self: os.urandom(8)",
    )

    assert done.returncode == 1, done.stderr
    layouts = json.loads(figures.read_text())["layouts"]
    assert not any(layout["bit_identical"] for layout in layouts)
    assert "false" in done.stdout


def test_demo_names_what_fails_in_a_task(tmp_path: Path) -> None:
    done = run_kvferry(
        *("demo", "--tokens", "16", "--picture", str(tmp_path / "demo.png")),
        first="""
from kvferry import _native, errors, llama
async def fails(*_, **__): raise errors.error(_native.lib.KVF_ERR_DEVICE, "on purpose")
llama.Llama.start_load = fails
""",
    )

    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last == "kvferry demo: error: the device reported an error: on purpose"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (("xllamacpp", "gguf", "matplotlib"), "no libllama found"),
        (("gguf", "matplotlib"), "or name a model with --model FILE"),
    ],
)
def test_demo_names_the_one_command_that_installs_what_it_needs(
    missing: Sequence[str], said: str, tmp_path: Path
) -> None:
    here = None if "xllamacpp" in missing else str(LIBRARY_FOLDER)
    done = run_kvferry(
        *("demo", "--tokens", "16", "--picture", str(tmp_path / "demo.png")),
        first=f"sys.modules.update(dict.fromkeys({('llama_cpp', *missing)}))\n"
        "import ctypes.util; ctypes.util.find_library = lambda name: None",
        environment={libllama.ENVIRONMENT_VARIABLE: here},
    )

    [*_, last] = done.stderr.splitlines()
    assert (done.returncode, last.startswith("kvferry demo: error: ")) == (2, True)
    assert f"pip install {' '.join(missing)}" in last
    assert said in last


def test_the_command_names_the_packages_of_the_extra_demo() -> None:
    requirements = importlib.metadata.requires("kvferry") or []
    extra = [each for each in requirements if re.search("extra == .demo.", each)]
    assert {re.split(r"[^\w-]", each)[0] for each in extra} == set(extra_packages.PACKAGES)
