"""Moves the KV cache of a running language model between a device and host memory.

async with kvferry.Engine() as engine:
    llama = engine.attach(llm)              # a llama_cpp.Llama, or the address of a context
    snapshot = await llama.save(seq=0)      # beside decoding
    await llama.load(snapshot, seq=1)
"""

from . import sync
from ._bridge.block_list import BlocksAllowed
from ._bridge.completion_record import Completion
from ._bridge.devices import Devices
from ._bridge.llama_cpp_object import LlmState
from ._bridge.submission import LoadMode, Priority, SaveMode
from ._bridge.trace import TraceEvent
from ._native import ffi as _ffi
from ._native import lib as _lib
from .block_transfer import SaveBlocksTransfer
from .blocks import Block, Checkpoint
from .buffer import Buffer
from .engine import Engine
from .errors import (
    BufferTooSmall,
    Busy,
    CacheFull,
    ContextFreed,
    DeviceLost,
    EngineClosed,
    Forked,
    InvalidArgument,
    KvferryError,
    LibraryNotFound,
    NoDevice,
    OutOfMemory,
    PinnedLimit,
    SequenceEmpty,
    SequenceRange,
    StateDamaged,
    StateMismatch,
    TapUnavailable,
    TimedOut,
    TransferCancelled,
    Unreachable,
)
from .llama import Llama
from .prompt_cache import PromptCache
from .regions import Region
from .sequence_transfer import LoadOutcome
from .snapshot import Snapshot
from .state_blocks import cut_state, join_blocks
from .store import Found, Store, TraceSpan
from .trace_file import write_trace
from .transfer import Transfer

__all__ = [
    "Block",
    "BlocksAllowed",
    "Buffer",
    "BufferTooSmall",
    "Busy",
    "CacheFull",
    "Checkpoint",
    "Completion",
    "ContextFreed",
    "DeviceLost",
    "Devices",
    "Engine",
    "EngineClosed",
    "Forked",
    "Found",
    "InvalidArgument",
    "KvferryError",
    "LibraryNotFound",
    "Llama",
    "LlmState",
    "LoadMode",
    "LoadOutcome",
    "NoDevice",
    "OutOfMemory",
    "PinnedLimit",
    "Priority",
    "PromptCache",
    "Region",
    "SaveBlocksTransfer",
    "SaveMode",
    "SequenceEmpty",
    "SequenceRange",
    "Snapshot",
    "StateDamaged",
    "StateMismatch",
    "Store",
    "TapUnavailable",
    "TimedOut",
    "TraceEvent",
    "TraceSpan",
    "Transfer",
    "TransferCancelled",
    "Unreachable",
    "__version__",
    "cut_state",
    "join_blocks",
    "sync",
    "write_trace",
]

if _lib.kvf_abi_version() != _lib.KVF_ABI_VERSION:
    raise ImportError(
        f"libkvferry has ABI {_lib.kvf_abi_version()}, this package needs {_lib.KVF_ABI_VERSION}"
    )

__version__: str = _ffi.string(_lib.kvf_version()).decode()
