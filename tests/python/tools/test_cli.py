"""The command line: its output, its files, and its exit status."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import kvferry
import pytest
from kvferry.tools import extra_packages, libllama
from kvferry.tools.table import table
from support.llama_reference import LIBRARY_FOLDER
from support.programs import run_python
from support.unknown_format import NUMBERS, NoMagic, write_libllama

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
}


def run(
    *arguments: str, first: str = "", environment: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs kvferry in a process of its own, after the Python statements `first`."""
    code = f"import sys; {first}\nfrom kvferry.tools.cli import main; sys.exit(main(sys.argv[1:]))"
    return run_python("-c", code, *arguments, environment=environment, timeout=240)


# ---- demo ----------------------------------------------------------------------------------------


def test_demo_is_bit_identical_in_every_layout(tmp_path: Path) -> None:
    figures, picture = tmp_path / "demo.json", tmp_path / "demo.png"

    done = run("demo", "--tokens", "32", "--json", str(figures), "--picture", str(picture))

    assert done.returncode == 0, done.stderr
    layouts = json.loads(figures.read_text())["layouts"]
    names = [layout["layout"] for layout in layouts]
    assert names[:3] == ["contiguous", "V transposed", "fragmented"]
    assert [layout["bit_identical"] for layout in layouts] == [True] * len(layouts)
    for layout in layouts:
        assert layout.keys() >= FIGURES
    for name in names:
        assert name in done.stdout
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") == 1200  # pixels wide


def test_demo_takes_a_model_of_the_users(tmp_path: Path, model_path: Callable[..., Path]) -> None:
    figures = tmp_path / "demo.json"

    done = run(
        *("demo", "--tokens", "32", "--model", str(model_path("gemma3"))),
        *("--json", str(figures), "--picture", str(tmp_path / "demo.png")),
    )

    assert done.returncode == 0, done.stderr
    report = json.loads(figures.read_text())
    assert report["model"] == str(model_path("gemma3"))
    assert [layout["bit_identical"] for layout in report["layouts"]] == [True] * 3
    assert {layout["model"] for layout in report["layouts"]} == {report["layouts"][0]["model"]}


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

    done = run(
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
    done = run(
        *("demo", "--tokens", "16", "--picture", str(tmp_path / "demo.png")),
        first="""
from kvferry import errors, llama
async def fails(*_, **__): raise errors.error(llama.lib.KVF_ERR_DEVICE, "on purpose")
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
    done = run(
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


# ---- doctor --------------------------------------------------------------------------------------


def test_doctor_finds_libllama_and_can_tap_it() -> None:
    done = run("doctor", "--json")

    assert done.returncode == 0, done.stderr
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert findings["tap"]["found"] == "possible"
    assert "libllama" in findings["libllama"]["details"]["path"]
    assert findings["format"]["good"]
    assert findings["format"]["found"].endswith("guarded by structure")
    assert findings["save and load"]["found"].startswith("right")
    assert findings["memcpy"]["details"]["gb_per_s"]["1"] > 0
    assert all(finding["meaning"] for finding in findings.values())


def test_doctor_says_that_it_does_not_know_a_format(
    unknown_libllama: Callable[[str], Path],
) -> None:
    done = run("doctor", "--json", "--llama-lib", str(unknown_libllama("nothing-parses")))

    assert done.returncode == 0, done.stderr
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert findings["tap"]["good"]
    assert not findings["format"]["good"]
    assert findings["format"]["found"] == "opaque, guarded by envelope"
    assert findings["save and load"]["found"].startswith("right")


def test_doctor_finds_out_that_libllama_loads_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "libllama"
    try:
        write_libllama(folder, LIBRARY_FOLDER, NUMBERS["nothing-parses"], everywhere=False)
    except NoMagic:
        pytest.skip("this libllama begins its states with no number")

    done = run("doctor", "--json", "--llama-lib", str(folder))

    assert done.returncode == 1, done.stderr
    [finding] = [one for one in json.loads(done.stdout) if one["subject"] == "save and load"]
    assert not finding["good"]
    assert finding["found"].startswith("llama.cpp doesn't load its own state")


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (
            "from kvferry import errors, llama\n"
            "async def load(*_, **__): raise errors.error(llama.lib.KVF_ERR_STATE_DAMAGED, 'so')\n"
            "llama.Llama.load = load",
            "the load fails: the state is truncated or its structure is damaged: so",
        ),
        (
            "from kvferry import errors, llama\n"
            "async def save(*_, **__): raise errors.error(llama.lib.KVF_ERR_LLAMA, 'so')\n"
            "llama.Llama.save = save",
            "the save fails: ",
        ),
        (
            "from kvferry import llama\nasync def load(*_, **__): pass\nllama.Llama.load = load",
            "the loaded sequence is not the one that was saved",
        ),
        (
            "from kvferry import snapshot\n"
            "snapshot.Snapshot.to_bytes = lambda self: bytes(self.nbytes)",
            "the saved state is not the one that llama.cpp saves",
        ),
        (
            "import os\n"
            "from kvferry.tools import libllama\n"
            "libllama.Context.logits = lambda self: os.urandom(8)",
            "after the load the logits differ",
        ),
    ],
    ids=["load refused", "save refused", "load of nothing", "save of nothing", "other logits"],
)
def test_doctor_says_what_is_wrong_with_sequences(fault: str, found: str) -> None:
    done = run("doctor", "--json", first=f"\n{fault}")

    assert done.returncode == 1, done.stderr
    [finding] = [one for one in json.loads(done.stdout) if one["subject"] == "save and load"]
    assert not finding["good"]
    assert finding["found"].startswith(found)


def test_doctor_tries_blocking_calls_where_there_is_no_tap() -> None:
    done = run(
        *("doctor", "--json"),
        first="""
from kvferry import engine, errors, llama
attach = engine.Engine.attach
def without_tap(self, llm, *, allow_blocking=False, **options):
    if not allow_blocking:
        raise errors.error(llama.lib.KVF_ERR_TAP, "on purpose")
    return attach(self, llm, allow_blocking=True, **options)
engine.Engine.attach = without_tap
""",
    )

    assert done.returncode == 1, done.stderr
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert "on purpose" in findings["tap"]["found"]
    assert findings["save and load"]["good"]


needs_simulated_cuda = pytest.mark.skipif(
    "KVFERRY_SIMULATED_CUDA" not in os.environ, reason="KVFERRY_SIMULATED_CUDA is not set"
)


@needs_simulated_cuda
@pytest.mark.parametrize(
    ("variable", "value", "subject", "found", "good"),
    [
        ("KVFSIM_DEVICES", "1", "CUDA driver", "CUDA 12.9, 1 device(s)", True),
        ("KVFERRY_CUDA_DRIVER", "/nowhere/libcuda.so.1", "CUDA driver", "none", False),
        ("KVFSIM_DRIVER_VERSION", "10020", "CUDA driver", "11.0 is needed", False),
        ("KVFSIM_DEVICES", "0", "CUDA driver", "CUDA_ERROR_NO_DEVICE", False),
        ("KVFSIM_INIT_ERROR", "803", "CUDA driver", "SYSTEM_DRIVER_MISMATCH", False),
        ("KVFSIM_FAIL", "cuDeviceGetCount:1:999+", "CUDA driver", "cuDeviceGetCount", False),
        ("KVFSIM_FAIL", "cuDevicePrimaryCtxRetain:1:2+", "CUDA driver", "device 0: out of", False),
        ("KVFSIM_FAIL", "cuModuleLoadData:1:222", "GPU 0", "UNSUPPORTED_PTX_VERSION", False),
    ],
)
def test_doctor_says_what_is_wrong_with_cuda(
    variable: str, value: str, subject: str, found: str, good: bool
) -> None:
    environment = {"KVFERRY_CUDA_DRIVER": os.environ["KVFERRY_SIMULATED_CUDA"], variable: value}
    done = run("doctor", "--json", environment=environment)
    [finding] = [one for one in json.loads(done.stdout) if one["subject"] == subject]
    assert found in finding["found"]
    assert finding["good"] == good


@needs_simulated_cuda
@pytest.mark.parametrize(
    ("arguments", "failures", "ordinals"),
    [
        ([], "", [0]),
        (["--device", "cuda"], "", [0]),
        (["--device", "cuda:2"], "", [2]),
        (["--device", "host"], "", []),
        ([], "cuDevicePrimaryCtxRetain:1:2", [1]),
    ],
)
def test_doctor_opens_one_gpu_of_several(
    arguments: list[str], failures: str, ordinals: list[int]
) -> None:
    environment = {
        "KVFERRY_CUDA_DRIVER": os.environ["KVFERRY_SIMULATED_CUDA"],
        "KVFSIM_DEVICES": "4",
        "KVFSIM_FAIL": failures,
    }
    done = run("doctor", "--json", *arguments, environment=environment)
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    devices = findings["devices"]["details"]["devices"]
    assert [each["ordinal"] for each in devices if each["kind"] == "cuda"] == ordinals
    driver = findings["CUDA driver"]
    assert "4 device(s)" in driver["found"]
    assert ("--device cuda:N" in driver["meaning"]) == bool(ordinals)
    # A GPU that cannot be used is reported, although another one can be used.
    assert ("GPU 0" in findings) == bool(failures)


def test_doctor_refuses_a_device_that_cannot_be_meant() -> None:
    done = run("doctor", "--device", "cuda:x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'cuda:x' is none of auto, host, cuda, cuda:N" in done.stderr


def test_doctor_works_without_the_optional_packages() -> None:
    done = run(
        "doctor",
        first="sys.modules['llama_cpp'] = sys.modules['gguf'] = sys.modules['matplotlib'] = None",
        environment={libllama.ENVIRONMENT_VARIABLE: None},
    )

    assert "Traceback" not in done.stderr
    assert "memcpy" in done.stdout
    if "no libllama found" in done.stdout:  # otherwise the system has a libllama
        assert done.returncode == 1


# ---- bench ---------------------------------------------------------------------------------------


def test_bench_writes_the_figures_that_were_asked_for(tmp_path: Path) -> None:
    done = run(
        "bench", "--tokens", "32", "--only", "V transposed: save", "--out", str(tmp_path / "out")
    )

    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [line["stage"] for line in report["results"]] == ["V transposed"]
    assert report["results"][0]["value"] > 0
    assert json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]


# ---- config --------------------------------------------------------------------------------------


def test_config_is_what_a_c_program_needs(tmp_path: Path) -> None:
    """tests/install/by_pip.sh tests more, in an empty environment."""
    source = Path(__file__).parents[2] / "install" / "program.c"
    for more in ([], ["--static"]):
        flags = run("config", "--cflags", "--libs", *more).stdout.split()
        program = tmp_path / "program"
        subprocess.run(["cc", str(source), "-o", str(program), *flags], check=True)
        assert subprocess.run([program], capture_output=True, check=True).stdout


def test_config_speaks_to_the_shell(tmp_path: Path) -> None:
    printed = run("config", "--cgo").stdout
    script = f'{printed}\nprintf "%s\\n" "$PKG_CONFIG_PATH" "$CGO_CFLAGS" "$CGO_LDFLAGS"'
    mine = {"PKG_CONFIG_PATH": "/mine", "CGO_CFLAGS": "-O1"}

    done = subprocess.run(
        ["sh", "-euc", script], env=mine, capture_output=True, text=True, check=True
    )

    prefix = Path(run("config", "--prefix").stdout.strip())
    assert (prefix / "include" / "kvferry.h").is_file()
    assert done.stdout.splitlines() == [
        f"{prefix}/lib/pkgconfig:/mine",
        f"-O1 -I{prefix}/include",
        f"-O2 -g -L{prefix}/lib -Wl,-rpath,{prefix}/lib -lkvferry",
    ]


# ---- Options -------------------------------------------------------------------------------------


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
        (["bench", "--out", "/proc/nothing"], "/proc/nothing"),
        (["bench", "--only", "nonsense"], "no measurement's name contains 'nonsense': contiguous"),
        (["bench", "--only", "save", "--only", "nonsense"], "contains 'nonsense'"),
        (["config"], "say what to print"),
    ],
)
def test_bad_options_are_named(arguments: list[str], complaint: str) -> None:
    done = run(*arguments)

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

    done = run("demo", "--llama-lib", str(tmp_path))

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
