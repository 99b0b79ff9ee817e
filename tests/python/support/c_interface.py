"""The C functions for llama.cpp sequences, called directly.

They allow tests what the package does not: following streams, several attachments to one context,
several copies of the library in one process.

    library = Library(LIBRARY)
    with library.engine() as engine, engine.attach(context.address) as attachment:
        job = attachment.save(0, buffer, stream=stream.handle)
        assert job.wait() == "KVF_OK"
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kvferry

LIBRARY = Path(kvferry.__file__).parent / "lib" / "libkvferry.so.0"
"""The library that the package itself uses."""

u32, u64, text = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char_p


class EngineOptions(ctypes.Structure):
    _fields_ = (
        ("size", u32),
        ("devices", u32),
        ("flags", u32),
        ("copy_threads", u32),
        ("pinned_limit", u64),
        ("staging_bytes", u64),
        ("error", text),
        ("error_size", u64),
    )


class LlamaOptions(ctypes.Structure):
    _fields_ = (
        ("size", u32),
        ("flags", u32),
        ("library", text),
        ("error", text),
        ("error_size", u64),
    )


class SubmitOptions(ctypes.Structure):
    _fields_ = (
        ("size", u32),
        ("priority", u32),
        ("queue", u64),
        ("callback", ctypes.c_void_p),
        ("user_data", u64),
        ("mode", u32),
        ("flags", u32),
        ("error", text),
        ("error_size", u64),
        ("stream", u64),
    )


class Region(ctypes.Structure):
    _fields_ = (
        ("address", u64),
        ("width", u64),
        ("rows", u64),
        ("pitch", u64),
        ("offset", u64),
        ("buffer_pitch", u64),
    )


class BlockStruct(ctypes.Structure):
    _fields_ = (
        ("buffer", ctypes.c_void_p),
        ("bytes", u64),
        ("begin", ctypes.c_int32),
        ("end", ctypes.c_int32),
    )


class StateOptions(ctypes.Structure):
    _fields_ = (
        ("size", u32),
        ("parts_in_blocks", u32),
        ("error", text),
        ("error_size", u64),
    )


class Completion(ctypes.Structure):
    _fields_ = (
        ("job", u64),
        ("user_data", u64),
        ("status", ctypes.c_int32),
        ("mode", u32),
        ("numbers", u64 * 6),
        ("detail", ctypes.c_char * 128),
        ("more_numbers", u64 * 2),
    )


class BlocksAllowed(enum.IntEnum):
    UNSEEN = 0
    NONE = 1
    CHECKPOINTS_ALONE = 2
    WITH_CHECKPOINTS = 3
    ALONE = 4


class Devices(enum.IntEnum):
    HOST = 1
    CUDA = 2


class SaveMode(enum.IntEnum):
    AUTO = 0
    IN_PLACE = 1
    SNAPSHOT = 2


class LoadMode(enum.IntEnum):
    AUTO = 0
    IN_PLACE = 16
    AHEAD = 17


IN_PLACE = {"save": SaveMode.IN_PLACE, "load": LoadMode.IN_PLACE}
"""By the kind of the transfer."""


FOLLOW_STREAM = 1
TRUST_STATE = 2
FORCE_BLOCKING = 2


class Failure(Exception):
    """A call returned an error; `name` is its status."""

    def __init__(self, name: str, why: str = "") -> None:
        super().__init__(f"{name}: {why}")
        self.name = name


@dataclasses.dataclass(frozen=True)
class Block:
    """A block that has been saved: the positions [begin, end), and its bytes."""

    begin: int
    end: int
    state: bytes


class Blocks:
    """An array of `kvf_block` with a buffer for each."""

    def __init__(self, ranges: Sequence[tuple[int, int]], buffers: Sequence[Any]) -> None:
        self.buffers = buffers
        self.array = (BlockStruct * len(ranges))()
        for one, (begin, end), buffer in zip(self.array, ranges, buffers, strict=True):
            one.begin, one.end = begin, end
            one.buffer, one.bytes = ctypes.addressof(buffer), ctypes.sizeof(buffer)

    @classmethod
    def with_room(cls, ranges: Sequence[tuple[int, int]], nbytes: int) -> Blocks:
        """Returns buffers of `nbytes` each."""
        return cls(ranges, [ctypes.create_string_buffer(max(nbytes, 1)) for _ in ranges])

    @classmethod
    def sized_only(cls, ranges: Sequence[tuple[int, int]]) -> Blocks:
        """Returns blocks without buffers, of which `Library.cut` says the sizes."""
        blocks = cls.with_room(ranges, 0)
        for one in blocks.array:
            one.buffer, one.bytes = None, 0
        return blocks

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> Blocks:
        """Returns buffers that hold saved blocks."""
        return cls(
            [(block.begin, block.end) for block in blocks],
            # create_string_buffer(b"", 0) has no address of its own.
            [ctypes.create_string_buffer(block.state, len(block.state)) for block in blocks],
        )

    @property
    def sizes(self) -> list[int]:
        return [int(one.bytes) for one in self.array]

    def read(self) -> list[Block]:
        """Returns what the buffers hold, as long as the array says."""
        return [
            Block(int(one.begin), int(one.end), buffer.raw[: int(one.bytes)])
            for one, buffer in zip(self.array, self.buffers, strict=True)
        ]

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        """The array, the size of a `kvf_block`, and how many there are."""
        return self.array, u64(ctypes.sizeof(BlockStruct)), u32(len(self.array))


class Library:
    """A libkvferry, which may be a copy."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))
        self.functions.kvf_status_name.restype = text

    def status_name(self, status: int) -> str:
        name: bytes = self.functions.kvf_status_name(ctypes.c_int32(status))
        return name.decode()

    def call(self, function: str, *arguments: Any, error: Any = None) -> int:
        status: int = getattr(self.functions, function)(*arguments)
        if status < 0:
            why = error.value.decode() if error is not None else ""
            raise Failure(self.status_name(status), why)
        return status

    def cut(self, state: bytes, blocks: Blocks, checkpoint: Any = None, parts: int = 0) -> int:
        """Cuts a state into blocks and into `checkpoint`, a ctypes array. Returns the size of the
        checkpoint."""
        options, error = _state_options(parts)
        nbytes = u64(0 if checkpoint is None else len(checkpoint))
        arguments = (state, u64(len(state)), *blocks.arguments, checkpoint, ctypes.byref(nbytes))
        self.call("kvf_state_cut", *arguments, ctypes.byref(options), error=error)
        return nbytes.value

    def join(
        self, blocks: Blocks, checkpoint: bytes | None = None, parts: int = 0, room: int = -1
    ) -> bytes:
        """Joins blocks to a state. Asks for the size first, unless `room` tells it."""
        options, error = _state_options(parts)
        given = (*blocks.arguments, checkpoint, u64(len(checkpoint or b"")))
        nbytes = u64(max(room, 0))
        if room < 0:
            sized = (*given, None, ctypes.byref(nbytes), ctypes.byref(options))
            self.call("kvf_state_join", *sized, error=error)
        state = ctypes.create_string_buffer(max(nbytes.value, 1))
        whole = (*given, state, ctypes.byref(nbytes), ctypes.byref(options))
        self.call("kvf_state_join", *whole, error=error)
        return state.raw[: nbytes.value]

    def engine(self, devices: Devices = Devices.CUDA, copy_threads: int = 0) -> Engine:
        return Engine(self, devices, copy_threads)


def _state_options(parts: int) -> tuple[StateOptions, Any]:
    error = ctypes.create_string_buffer(256)
    options = StateOptions(
        size=ctypes.sizeof(StateOptions),
        parts_in_blocks=parts,
        error=ctypes.addressof(error),
        error_size=len(error),
    )
    return options, error


class Engine:
    def __init__(self, library: Library, devices: Devices, copy_threads: int = 0) -> None:
        self.library = library
        error = ctypes.create_string_buffer(256)
        options = EngineOptions(
            size=ctypes.sizeof(EngineOptions),
            devices=devices,
            copy_threads=copy_threads,
            error=ctypes.addressof(error),
            error_size=len(error),
        )
        self.handle = u64()
        library.call(
            "kvf_engine_create", ctypes.byref(options), ctypes.byref(self.handle), error=error
        )

    def attach(self, context: int, flags: int = 0) -> Attachment:
        return Attachment(self, context, flags)

    def cancel(self) -> None:
        self.library.call("kvf_engine_cancel", self.handle)

    @contextmanager
    def allocate(self, nbytes: int) -> Iterator[Any]:
        """Pinned memory of the engine's pool."""
        address = ctypes.c_void_p()
        self.library.call(
            "kvf_buffer_alloc", self.handle, ctypes.c_uint64(nbytes), ctypes.byref(address)
        )
        try:
            yield (ctypes.c_uint8 * nbytes).from_address(address.value or 0)
        finally:
            self.library.call("kvf_buffer_free", address)

    def save_regions(self, regions: ctypes.Array[Region], into: Any, **options: Any) -> Job:
        arguments = (self.handle, regions, u64(len(regions)), into, u64(len(into)))
        return _submit(self.library, "kvf_regions_save", *arguments, keep=into, **options)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.call("kvf_engine_cancel", self.handle)
        self.library.call("kvf_engine_destroy", self.handle)


class Attachment:
    def __init__(self, engine: Engine, context: int, flags: int) -> None:
        self.engine = engine
        self.library = engine.library
        error = ctypes.create_string_buffer(256)
        options = LlamaOptions(
            size=ctypes.sizeof(LlamaOptions),
            flags=flags,
            error=ctypes.addressof(error),
            error_size=len(error),
        )
        self.handle = u64()
        self.library.call(
            "kvf_llama_attach",
            engine.handle,
            ctypes.c_void_p(context),
            ctypes.byref(options),
            ctypes.byref(self.handle),
            error=error,
        )

    def size(self, sequence: int) -> int:
        nbytes = u64()
        self.library.call("kvf_llama_size", self.handle, sequence, ctypes.byref(nbytes))
        return nbytes.value

    def save(self, sequence: int, into: Any, **options: Any) -> Job:
        return self._submit("kvf_llama_save", sequence, into, **options)

    def load(self, sequence: int, state: Any, **options: Any) -> Job:
        return self._submit("kvf_llama_load", sequence, state, **options)

    def _submit(self, function: str, sequence: int, buffer: Any, **options: Any) -> Job:
        arguments = (self.handle, sequence, buffer, u64(len(buffer)))
        return _submit(self.library, function, *arguments, keep=buffer, **options)

    def blocks_allowed(self) -> tuple[BlocksAllowed, str]:
        """Returns what the cache allows, and the reason."""
        reason = ctypes.create_string_buffer(256)
        arguments = (self.handle, reason, u64(len(reason)))
        allowed = self.library.call("kvf_llama_blocks_allowed", *arguments)
        return BlocksAllowed(allowed), reason.value.decode()

    def block_size(self, tokens: int) -> int:
        nbytes = u64()
        arguments = (self.handle, u32(tokens), ctypes.byref(nbytes))
        self.library.call("kvf_llama_block_size", *arguments)
        return nbytes.value

    def save_blocks(self, sequence: int, blocks: Blocks, **options: Any) -> Job:
        arguments = (self.handle, sequence, *blocks.arguments)
        return _submit(self.library, "kvf_llama_save_blocks", *arguments, keep=blocks, **options)

    def load_blocks(
        self, sequence: int, blocks: Blocks, checkpoint: bytes | None = None, **options: Any
    ) -> Job:
        size = u64(len(checkpoint or b""))
        arguments = (self.handle, sequence, *blocks.arguments, checkpoint, size)
        return _submit(
            self.library,
            "kvf_llama_load_blocks",
            *arguments,
            keep=(blocks, checkpoint),
            **options,
        )

    def checkpoint_size(self, sequence: int) -> int:
        nbytes = u64()
        self.library.call("kvf_llama_checkpoint_size", self.handle, sequence, ctypes.byref(nbytes))
        return nbytes.value

    def save_checkpoint(self, sequence: int, into: Any, **options: Any) -> Job:
        return self._submit("kvf_llama_save_checkpoint", sequence, into, **options)

    def remove(self, sequence: int) -> None:
        self.library.call("kvf_llama_remove", self.handle, sequence)

    def settle(self) -> int:
        return self.library.call("kvf_llama_settle", self.handle)

    def describe(self) -> str:
        json = ctypes.create_string_buffer(8192)
        self.library.call("kvf_llama_describe", self.handle, json, u64(len(json)), None)
        return json.value.decode()

    def detach(self) -> None:
        self.library.call("kvf_llama_detach", self.handle)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def _submit(
    library: Library,
    function: str,
    *arguments: Any,
    keep: Any,
    stream: int | None = None,
    mode: int = 0,
    priority: int = 0,
    trust: bool = False,
) -> Job:
    error = ctypes.create_string_buffer(256)
    options = SubmitOptions(
        size=ctypes.sizeof(SubmitOptions),
        priority=priority,
        mode=mode,
        flags=(0 if stream is None else FOLLOW_STREAM) | (TRUST_STATE if trust else 0),
        stream=stream or 0,
        error=ctypes.addressof(error),
        error_size=len(error),
    )
    job = u64()
    library.call(
        function,
        *arguments,
        ctypes.byref(options),
        ctypes.byref(job),
        error=error,
    )
    return Job(library, job, keep)


class Job:
    """A transfer. It keeps its buffers alive."""

    def __init__(self, library: Library, handle: ctypes.c_uint64, buffers: Any) -> None:
        self.library = library
        self.handle = handle
        self._buffers = buffers
        self.detail = ""

    @property
    def done(self) -> bool:
        return self.library.call("kvf_job_poll", self.handle, None, u64(0)) == 1

    def cancel(self) -> None:
        self.library.call("kvf_job_cancel", self.handle)

    def wait(self, timeout: float = 20) -> str:
        """Waits, and returns the name of the status. Releases the handle, so call it once."""
        completion = Completion()
        self.library.call(
            "kvf_job_wait",
            self.handle,
            ctypes.c_int64(int(timeout * 1e9)),
            ctypes.byref(completion),
            u64(ctypes.sizeof(completion)),
        )
        self.library.call("kvf_job_release", self.handle)
        self.detail = completion.detail.decode()
        return self.library.status_name(completion.status)
