"""``kvferry doctor``: what this machine offers to kvferry, and what each finding means."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import resource
import statistics
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from .. import Devices, Engine, Llama, Priority, __version__
from ..errors import KvferryError, NoDevice
from .libllama import Context, ContextOptions, Libllama, LlamaError, Model, find
from .limits import cuda_driver, memcpy_seconds
from .synthetic import write_model
from .workload import ended, seconds

_COPIED = 128 << 20
_HOST_ALONE = "not asked for"  # an engine's "no_cuda" if it was made for the host alone
_REPEATS = 5
_TOKENS = 32  # length of the sequence that is saved and loaded


@dataclasses.dataclass
class Finding:
    subject: str
    found: str
    meaning: str
    good: bool = True
    """False if something is missing that kvferry could use."""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


async def doctor(llama_lib: str | None, device: Devices, as_json: bool) -> int:
    """Prints all findings. Returns 0, or 1 if kvferry cannot save and load sequences."""
    opened, unusable = _open(device)
    async with opened as engine:
        findings = [
            Finding("kvferry", __version__, "the library and the Python package agree"),
            _devices(engine),
            _cuda_driver(engine),
            *unusable,
            *_gpus(engine),
            *await _llama(engine, llama_lib),
            _pinned_memory(engine),
            _cores(),
            _memcpy(),
            await _through_kvferry(engine),
        ]
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            _print(finding)
    needed = ("libllama", "tap", "save and load")
    can_move = all(each.good for each in findings if each.subject in needed)
    return 0 if can_move else 1


def _print(finding: Finding) -> None:
    mark = "ok" if finding.good else "--"
    print(f"{mark}  {finding.subject:<14} {finding.found}")
    indent = " " * 19
    print(textwrap.fill(finding.meaning, 98, initial_indent=indent, subsequent_indent=indent))


# ---- Devices -------------------------------------------------------------------------------------


def _open(device: Devices) -> tuple[Engine, list[Finding]]:
    """Opens an engine with at most one GPU; returns findings about GPUs that cannot be used.

    One GPU shows whether kvferry works, and each GPU would cost a context in its memory, which
    other programs may need.
    """
    unusable: list[Finding] = []
    if device in ("auto", "cuda"):
        for ordinal in range(_gpus_present()):
            try:
                return Engine([ordinal]), unusable
            except NoDevice as failure:
                meaning = "caches in its memory cannot be moved beside decoding"
                finding = Finding(f"GPU {ordinal}", f"not usable: {failure}", meaning, good=False)
                unusable.append(finding)
    return Engine(device), []


def _gpus_present() -> int:
    """Returns how many GPUs the driver shows; 0 if it cannot be asked, which is another finding."""
    try:
        driver = ctypes.CDLL(cuda_driver())
    except OSError:
        return 0
    count = ctypes.c_int()
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def _devices(engine: Engine) -> Finding:
    description = engine.describe()
    devices = description["devices"]
    found = ", ".join(f"{each['kind']}: {each['name']}" for each in devices)
    if any(each["kind"] == "cuda" for each in devices):
        meaning = "caches in this device's memory are moved by its copy engines, beside decoding"
        return Finding("devices", found, meaning, details=description)
    meaning = (
        "caches are in host memory: the cores that decode also copy, so that a save frees cells of "
        "the cache, but saves no time"
    )
    return Finding("devices", found, meaning, details=description)


def _cuda_driver(engine: Engine) -> Finding:
    unused: str = engine.describe()["no_cuda"]
    try:
        driver = ctypes.CDLL(cuda_driver())
    except OSError as failure:
        return Finding("CUDA driver", f"none ({failure})", "no NVIDIA GPU can be used", good=False)
    if status := driver.cuInit(0):
        name = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(name))
        said = (name.value or b"unknown").decode()
        return Finding("CUDA driver", f"cuInit fails: {said}", "no GPU can be used", good=False)
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    text = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}, {count.value} device(s)"
    if unused == _HOST_ALONE:
        return Finding("CUDA driver", text, "not used: the engine was made for the host alone")
    if not unused:
        meaning = "opened at run time; kvferry needs no CUDA toolkit"
        opened = [each["ordinal"] for each in engine.describe()["devices"] if "ordinal" in each]
        if len(opened) < count.value:
            names = ", ".join(f"cuda:{ordinal}" for ordinal in opened)
            meaning += f". Only {names} was opened here; for another use --device cuda:N"
        return Finding("CUDA driver", text, meaning)
    meaning = (
        "caches in GPU memory cannot be moved beside decoding; only llama.cpp's own blocking calls "
        "can move them"
    )
    return Finding(
        "CUDA driver", f"{text}; not all of it can be used: {unused}", meaning, good=False
    )


def _gpus(engine: Engine) -> list[Finding]:
    """Returns what is wrong with the GPUs that could be opened."""
    findings = []
    for device in engine.describe()["devices"]:
        if device["kind"] != "cuda":
            continue
        subject = f"GPU {device['ordinal']}"
        if device["broken"]:
            meaning = (
                "its memory can't be moved any more: make a new engine, or start the program again "
                "if that does not help"
            )
            findings.append(Finding(subject, "lost after an error", meaning, good=False))
        if device["no_kernels"]:
            meaning = (
                "fragmented caches are copied row by row, which takes many times as long; "
                "contiguous caches are as fast as with kernels. Install a newer driver"
            )
            found = f"kvferry's kernels cannot be used: {device['no_kernels']}"
            findings.append(Finding(subject, found, meaning, good=False))
    return findings


# ---- llama.cpp -----------------------------------------------------------------------------------


async def _llama(engine: Engine, folder: str | None) -> list[Finding]:
    try:
        library = Libllama(find(folder))
    except LlamaError as failure:
        meaning = "only plain memory regions can be moved, no llama.cpp sequences"
        return [Finding("libllama", str(failure), meaning, good=False)]
    found = f"{library.path} ({library.build})"
    details = {"path": library.path, "build": library.build, "source": library.source}
    where = "the GPU's memory" if library.offloads else "host memory"
    meaning = f"from {library.source}; used unmodified; puts caches into {where}"
    return [
        Finding("libllama", found, meaning, details=details),
        *await _sequences(engine, library),
    ]


async def _sequences(engine: Engine, library: Libllama) -> list[Finding]:
    """Saves and loads a sequence of a small model: nothing else shows that it works."""
    with tempfile.TemporaryDirectory(prefix="kvferry-doctor-") as folder:
        path = Path(folder) / "small.gguf"
        try:
            write_model("llama", path)
        except ImportError as failure:
            return [Finding("tap", "not tried", str(failure))]
        options = ContextOptions(n_ctx=256, n_seq_max=2, threads=1)
        try:
            with (
                Model(library, path, gpu=False) as model,
                Context(model, options) as ours,
                Context(model, options) as reference,
            ):
                return await _trial(engine, ours, reference)
        except LlamaError as failure:
            meaning = "this libllama can't make a context, so its sequences can't be tried"
            return [Finding("tap", f"not tried: {failure}", meaning, good=False)]


async def _trial(engine: Engine, ours: Context, reference: Context) -> list[Finding]:
    """Uses kvferry in one context and llama.cpp's own calls in the other; both decode the same."""
    for context in (ours, reference):
        context.decode([(0, token) for token in range(_TOKENS)])
    loaded_as = ours.model.library.loaded_as
    try:
        llama = engine.attach(ours.address, library=loaded_as)
        tap = _TAP
    except KvferryError as failure:
        tap = dataclasses.replace(_NO_TAP, found=f"not possible: {failure}")
        try:
            llama = engine.attach(ours.address, library=loaded_as, allow_blocking=True)
        except KvferryError:
            return [tap]
    async with llama:
        fault = await _fault(llama, ours, reference)
        description = llama.describe()
    return [
        dataclasses.replace(tap, details=description),
        _format(description),
        _save_and_load(fault),
    ]


def _save_and_load(fault: str) -> Finding:
    if fault:
        meaning = "don't use kvferry with the sequences of this libllama, and please report this"
        return Finding("save and load", fault, meaning, good=False)
    found = f"right: a sequence of {_TOKENS} tokens was saved and loaded"
    meaning = "its state and its next logits equal those after llama.cpp's own load, bit for bit"
    return Finding("save and load", found, meaning)


async def _fault(llama: Llama, ours: Context, reference: Context) -> str:
    """Saves sequence 0 and loads it as sequence 1; returns what is wrong, or ""."""
    state = _state(reference, 0)
    if reference.state_set(1, state.ctypes.data, state.size) != state.size:
        return str(ours.model.library.refusal("llama.cpp doesn't load its own state"))
    try:
        snapshot = await llama.save(0)
    except KvferryError as failure:
        return f"the save fails: {failure}"
    if snapshot.to_bytes()[: state.size] != state.tobytes():
        return "the saved state is not the one that llama.cpp saves"
    try:
        await llama.load(snapshot, 1)
    except KvferryError as failure:
        return f"the load fails: {failure}"
    if _state(ours, 1).tobytes() != _state(reference, 1).tobytes():
        return "the loaded sequence is not the one that was saved"
    for context in (ours, reference):
        context.decode([(1, 0)])
    if ours.logits() != reference.logits():
        return "after the load the logits differ"
    return ""


def _state(context: Context, seq: int) -> NDArray[numpy.uint8]:
    """Returns the state by llama.cpp's own call. Raises LlamaError."""
    state = numpy.empty(context.state_size(seq), numpy.uint8)
    if context.state_get(seq, state.ctypes.data, state.size) != state.size:
        raise context.model.library.refusal("llama.cpp doesn't save a sequence")
    return state


_TAP = Finding(
    "tap",
    "possible",
    "libllama's tensor copies can be recorded, so that sequences move at the speed of the link, "
    "while the model decodes",
)
_NO_TAP = Finding(
    "tap",
    "not possible",
    "sequences can't be saved beside decoding; Engine.attach(..., allow_blocking=True) uses "
    "llama.cpp's own blocking calls instead",
    good=False,
)


def _format(description: dict[str, Any]) -> Finding:
    """The format in which this libllama writes states, and how damaged states are found."""
    found = f"{description['format']}, guarded by {description['guarded_by']}"
    if description["format"] != "opaque":
        meaning = "kvferry knows it: every byte of a state's structure is checked before a load"
        return Finding("format", found, meaning)
    meaning = (
        "kvferry does not know it: states are moved while the caller waits, and end with 64 bytes "
        "that a load verifies. States that kvferry has not saved are refused without trust=True"
    )
    return Finding("format", found, meaning, good=False)


# ---- Memory and cores ----------------------------------------------------------------------------


def _pinned_memory(engine: Engine) -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = limit == resource.RLIM_INFINITY
    found = "no limit" if unlimited else f"RLIMIT_MEMLOCK {limit / 2**20:.0f} MiB"
    if any(each["kind"] == "cuda" for each in engine.describe()["devices"]):
        # cuMemHostRegister pins through the kernel driver, which does not count RLIMIT_MEMLOCK.
        meaning = (
            "the CUDA driver ignores this limit; Engine(pinned_limit=...) limits kvferry's pool"
        )
    else:
        meaning = "without a CUDA device nothing is pinned, and all memory is equally fast"
    return Finding("pinned memory", found, meaning, details={"bytes": None if unlimited else limit})


def _cores() -> Finding:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count()
    if usable > 2:
        meaning = "enough to copy host memory beside decoding, if decoding leaves one core free"
    else:
        meaning = (
            "transfers of host memory and decoding share the cores: give llama.cpp one thread less "
            "than there are cores, because its threads spin while they wait for each other"
        )
    details = {"usable": usable, "present": present}
    return Finding("cores", f"{usable} of {present} usable", meaning, details=details)


def _memcpy() -> Finding:
    source, target = (numpy.ones(_COPIED, numpy.uint8) for _ in range(2))
    speeds = {}
    for threads in sorted({1, 2, 4, len(os.sched_getaffinity(0))}):
        if threads <= len(os.sched_getaffinity(0)):
            times = [
                memcpy_seconds(target.ctypes.data, source.ctypes.data, _COPIED, threads)
                for _ in range(_REPEATS)
            ]
            speeds[threads] = _COPIED / statistics.median(times) / 1e9
    found = ", ".join(f"{speed:.1f} GB/s with {n}" for n, speed in speeds.items()) + " thread(s)"
    return Finding(
        "memcpy",
        found,
        "the limit for all transfers from host memory to host memory",
        details={"gb_per_s": {str(threads): speed for threads, speed in speeds.items()}},
    )


async def _through_kvferry(engine: Engine) -> Finding:
    source = numpy.ones(_COPIED, numpy.uint8)
    buffer = await engine.allocate(_COPIED)
    priorities: list[Priority] = ["urgent", "background"]
    speeds: dict[str, float] = {}
    for priority in priorities:
        saves, loads = [], []
        for _ in range(_REPEATS + 1):  # the first touches the buffer
            transfer = await engine.start_copy_out(source, buffer, priority=priority)
            await transfer.wait()
            saves.append(seconds(ended(transfer)))
            transfer = await engine.start_copy_in(source, buffer, priority=priority)
            await transfer.wait()
            loads.append(seconds(ended(transfer)))
        for direction, times in (("save", saves), ("load", loads)):
            speeds[f"{priority} {direction}"] = _COPIED / statistics.median(times[1:]) / 1e9
    found = ", ".join(f"{name} {speed:.1f} GB/s" for name, speed in speeds.items())
    meaning = (
        "host memory, copied by kvferry: urgent should be nearly as fast as memcpy with as many "
        "threads as the engine has; background uses one thread of low priority"
    )
    return Finding("transfers", found, meaning, details={"gb_per_s": speeds})
