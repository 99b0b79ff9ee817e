"""libllama, and whether kvferry can save and load its sequences."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from ... import Engine, Llama
from ...errors import KvferryError
from ..libllama import Context, ContextOptions, Libllama, LlamaError, Model, find
from ..synthetic import write_model
from .finding import Finding

_TOKENS = 32  # length of the sequence that is saved and loaded


async def libllama(engine: Engine, folder: str | None) -> list[Finding]:
    """Finds libllama, and saves and loads a sequence with it."""
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
