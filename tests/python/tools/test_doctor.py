"""`kvferry doctor`: what it finds, and its exit status."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from kvferry.tools import libllama
from support.llama_reference import LIBRARY_FOLDER
from support.programs import run_kvferry
from support.unknown_format import NUMBERS, NoMagic, write_libllama


def test_doctor_finds_libllama_and_can_tap_it() -> None:
    done = run_kvferry("doctor", "--json")

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
    done = run_kvferry("doctor", "--json", "--llama-lib", str(unknown_libllama("nothing-parses")))

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

    done = run_kvferry("doctor", "--json", "--llama-lib", str(folder))

    assert done.returncode == 1, done.stderr
    [finding] = [one for one in json.loads(done.stdout) if one["subject"] == "save and load"]
    assert not finding["good"]
    assert finding["found"].startswith("llama.cpp doesn't load its own state")


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (
            "from kvferry import errors, llama\nfrom kvferry._native import lib\n"
            "async def load(*_, **__): raise errors.error(lib.KVF_ERR_STATE_DAMAGED, 'so')\n"
            "llama.Llama.load = load",
            "the load fails: the state is truncated or its structure is damaged: so",
        ),
        (
            "from kvferry import errors, llama\nfrom kvferry._native import lib\n"
            "async def save(*_, **__): raise errors.error(lib.KVF_ERR_LLAMA, 'so')\n"
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
    done = run_kvferry("doctor", "--json", first=f"\n{fault}")

    assert done.returncode == 1, done.stderr
    [finding] = [one for one in json.loads(done.stdout) if one["subject"] == "save and load"]
    assert not finding["good"]
    assert finding["found"].startswith(found)


def test_doctor_tries_blocking_calls_where_there_is_no_tap() -> None:
    done = run_kvferry(
        *("doctor", "--json"),
        first="""
from kvferry import _native, engine, errors, llama
attach = engine.Engine.attach
def without_tap(self, llm, *, allow_blocking=False, **options):
    if not allow_blocking:
        raise errors.error(_native.lib.KVF_ERR_TAP, "on purpose")
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
    done = run_kvferry("doctor", "--json", environment=environment)
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
    done = run_kvferry("doctor", "--json", *arguments, environment=environment)
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    devices = findings["devices"]["details"]["devices"]
    assert [each["ordinal"] for each in devices if each["kind"] == "cuda"] == ordinals
    driver = findings["CUDA driver"]
    assert "4 device(s)" in driver["found"]
    assert ("--device cuda:N" in driver["meaning"]) == bool(ordinals)
    # A GPU that cannot be used is reported, although another one can be used.
    assert ("GPU 0" in findings) == bool(failures)


def test_doctor_refuses_a_device_that_cannot_be_meant() -> None:
    done = run_kvferry("doctor", "--device", "cuda:x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'cuda:x' is none of auto, host, cuda, cuda:N" in done.stderr


def test_doctor_works_without_the_optional_packages() -> None:
    done = run_kvferry(
        "doctor",
        first="sys.modules['llama_cpp'] = sys.modules['gguf'] = sys.modules['matplotlib'] = None",
        environment={libllama.ENVIRONMENT_VARIABLE: None},
    )

    assert "Traceback" not in done.stderr
    assert "memcpy" in done.stdout
    if "no libllama found" in done.stdout:  # otherwise the system has a libllama
        assert done.returncode == 1
