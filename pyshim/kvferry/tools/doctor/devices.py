"""The devices of an engine, and the CUDA driver."""

from __future__ import annotations

import ctypes

from ... import Devices, Engine
from ...errors import NoDevice
from ..limits import cuda_driver
from .finding import Finding

_HOST_ALONE = "not asked for"  # an engine's "no_cuda" if it was made for the host alone


def open_engine(device: Devices) -> tuple[Engine, list[Finding]]:
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
        library = ctypes.CDLL(cuda_driver())
    except OSError:
        return 0
    count = ctypes.c_int()
    failed = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def opened(engine: Engine) -> Finding:
    description = engine.describe()
    present = description["devices"]
    found = ", ".join(f"{each['kind']}: {each['name']}" for each in present)
    if any(each["kind"] == "cuda" for each in present):
        meaning = "caches in this device's memory are moved by its copy engines, beside decoding"
        return Finding("devices", found, meaning, details=description)
    meaning = (
        "caches are in host memory: the cores that decode also copy, so that a save frees cells of "
        "the cache, but saves no time"
    )
    return Finding("devices", found, meaning, details=description)


def driver(engine: Engine) -> Finding:
    unused: str = engine.describe()["no_cuda"]
    try:
        library = ctypes.CDLL(cuda_driver())
    except OSError as failure:
        return Finding("CUDA driver", f"none ({failure})", "no NVIDIA GPU can be used", good=False)
    if status := library.cuInit(0):
        name = ctypes.c_char_p()
        library.cuGetErrorName(status, ctypes.byref(name))
        said = (name.value or b"unknown").decode()
        return Finding("CUDA driver", f"cuInit fails: {said}", "no GPU can be used", good=False)
    version, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    library.cuDeviceGetCount(ctypes.byref(count))
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


def gpus(engine: Engine) -> list[Finding]:
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
