"""An engine's attachment to a llama context, from attaching to detaching.

``kvferry.Llama`` and ``kvferry.sync.Llama`` are two views of one attachment. Everything that does
not depend on how a caller waits is here.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from .._native import ffi, lib
from ..errors import ErrorText, check, error
from .arguments import sequence_id
from .block_list import ALLOWED, BlocksAllowed, Span, spans
from .completions import Completions, PendingTransfer
from .description import describe
from .libllama_positions import LibllamaPositions
from .llama_cpp_object import SEQUENCE, LlamaCppObject
from .worker import Call, Worker, context_worker

T = TypeVar("T")


class Attachment:
    """An engine's attachment to a llama context."""

    def __init__(
        self, handle: int, address: int, worker: Worker, owner: object, variant: str
    ) -> None:
        self.handle = handle
        self.address = address
        self.worker = worker
        self.owner = owner
        """A ``llama_cpp.Llama``, which frees the context when it is collected; or None."""
        self.llm = LlamaCppObject.of(owner)
        self.in_flight: dict[PendingTransfer, int] = {}
        """The sequence of each transfer in flight."""
        self.sizes: dict[int, int] = {}
        """The size of each sequence's state in bytes, as it was last measured."""
        self.checkpoint_sizes: dict[int, int] = {}
        """The size of each sequence's checkpoint in bytes, as it was last measured."""
        self._block_sizes: dict[int, int] = {}
        """The size in bytes of a block, by its number of tokens."""
        self._positions: LibllamaPositions | None = None
        self.detaching = False
        self._variant = variant
        self._detach: Call | None = None
        description = self.describe()
        self.model: str = description["model"]
        self.fingerprint: str = description["fingerprint"]
        self._library: str = description["library"]
        self._sequences: int = description["sequences"]

    def check_usable(self) -> None:
        """Raises Forked, EngineClosed or ContextFreed if the attachment cannot be used."""
        self.worker.completions.check_usable()
        if self.detaching:
            raise error(lib.KVF_ERR_CLOSED, "detached")
        if self.owner is not None and _context_address(self.owner) is None:
            raise error(lib.KVF_ERR_CONTEXT_FREED)

    def check_fingerprint(self, fingerprint: str | None) -> None:
        """Raises StateMismatch for a state of another model. None fits every model."""
        if fingerprint not in (None, self.fingerprint):
            raise error(lib.KVF_ERR_STATE_MISMATCH, f"{fingerprint}, here {self.fingerprint}")

    def describe(self) -> dict[str, Any]:
        """Returns what ``kvf_llama_describe`` says, and the variant."""
        description = describe(lib.kvf_llama_describe, self.handle)
        if self._variant:
            description["fingerprint"] += f"/{self._variant}"
            description["fingerprint_covers"].append("variant")
        return description

    def llm_of(self, seq: int) -> LlamaCppObject | None:
        """Returns the ``llama_cpp.Llama`` that decodes this sequence and keeps its tokens; or
        None."""
        return self.llm if seq == SEQUENCE else None

    def size(self, seq: int) -> int:
        """Returns the bytes of a sequence's state. Blocks while the context's thread is at work."""
        self.check_usable()
        return self.exclusively(self.measure, sequence_id(seq))

    def exclusively(self, function: Callable[..., T], *arguments: object) -> T:
        """Makes a call on this thread. Blocks while the context's thread is at work."""
        with self.worker.exclusive():
            return function(*arguments)

    # ---- On the context's thread, or while that is held off -------------------------------------

    def measure(self, seq: int) -> int:
        """Returns the size of a sequence's state in bytes."""
        nbytes = ffi.new("uint64_t *")
        check(lib.kvf_llama_size(self.handle, seq, nbytes))
        size: int = nbytes[0]
        self.sizes[seq] = size
        return size

    def measure_checkpoint(self, seq: int) -> int:
        """Returns the size of a sequence's checkpoint in bytes."""
        nbytes = ffi.new("uint64_t *")
        check(lib.kvf_llama_checkpoint_size(self.handle, seq, nbytes))
        size: int = nbytes[0]
        self.checkpoint_sizes[seq] = size
        return size

    def measure_block(self, tokens: int) -> int:
        """Returns the bytes of a block of this many tokens, each at a position of its own."""
        nbytes = ffi.new("uint64_t *")
        check(lib.kvf_llama_block_size(self.handle, tokens, nbytes))
        size: int = nbytes[0]
        self._block_sizes[tokens] = size
        return size

    def measure_blocks(self, spans: Sequence[Span]) -> list[int]:
        """Returns the bytes of each block, if each token has a position of its own."""
        return [self.measure_block(end - begin) for begin, end in spans]

    def known_block_sizes(self, spans: Sequence[Span]) -> list[int] | None:
        """As ``measure_blocks``, on any thread. None if a block of this size was never measured."""
        sizes = [self._block_sizes.get(end - begin, 0) for begin, end in spans]
        return sizes if all(sizes) else None

    def blocks_allowed(self) -> tuple[BlocksAllowed, str]:
        """Returns what the cache allows, and why it does not allow more."""
        reason = ffi.new("char[]", 256)
        number = check(lib.kvf_llama_blocks_allowed(self.handle, reason, ffi.sizeof(reason)))
        return ALLOWED[number], ffi.string(reason).decode(errors="replace")

    def last_position(self, seq: int) -> int:
        """Returns the last position of a sequence; -1 if the sequence is empty."""
        check(lib.kvf_llama_blocks_allowed(self.handle, ffi.NULL, 0))  # the context is alive
        if not 0 <= seq < self._sequences:
            raise error(lib.KVF_ERR_SEQUENCE_RANGE, f"sequence {seq}")
        if self._positions is None:
            self._positions = LibllamaPositions(self._library, self.address)
        return self._positions.last(seq)

    def spans(self, seq: int, begin: int, end: int | None, tokens: int) -> list[Span]:
        """Returns the positions of the blocks from ``begin`` to ``end``, or to the sequence's
        end."""
        if end is None:
            end = self.last_position(seq) + 1
            if end <= begin:
                raise error(lib.KVF_ERR_SEQUENCE_EMPTY, f"no token from position {begin} on")
        return spans(begin, end, tokens)

    def remove(self, seq: int) -> None:
        """Empties a sequence."""
        check(lib.kvf_llama_remove(self.handle, seq))
        if (llm := self.llm_of(seq)) is not None:
            llm.reset()

    # ---- Detaching ------------------------------------------------------------------------------

    def ask_for_detach(self) -> Call:
        """Asks for the detach, as its last call on the context's thread. May be repeated."""
        self.detaching = True
        if self._detach is None:
            self._detach = self.worker.make(lib.kvf_llama_detach, self.handle)
        self.worker.ask_for_last(self._detach)
        return self._detach


def attach(
    engine: int,
    completions: Completions,
    llm: object,
    *,
    library: str | None,
    allow_blocking: bool,
    variant: str,
) -> Attachment:
    """Attaches the engine with this handle; the arguments are those of ``Engine.attach``."""
    address = _context_address(llm)
    if not address:
        raise error(lib.KVF_ERR_CONTEXT_FREED)
    text = ErrorText()
    name = ffi.NULL if library is None else ffi.new("char[]", library.encode())
    options = ffi.new(
        "kvf_llama_options *",
        {
            "size": ffi.sizeof("kvf_llama_options"),
            "flags": lib.KVF_LLAMA_ALLOW_BLOCKING if allow_blocking else 0,
            "library": name,
            "error": text.buffer,
            "error_size": ffi.sizeof(text.buffer),
        },
    )
    handle = ffi.new("kvf_llama *")
    context = ffi.cast("struct llama_context *", address)
    owner = None if isinstance(llm, int) else llm
    worker = context_worker(address, completions)
    try:
        # Other attachments may be using the context.
        with worker.exclusive():
            check(lib.kvf_llama_attach(engine, context, options, handle), text)
        return Attachment(handle[0], address, worker, owner, variant)
    except BaseException:
        if handle[0]:
            worker.when_idle(functools.partial(lib.kvf_llama_detach, handle[0]), math.inf)
        worker.stop()
        raise


def _context_address(llm: object) -> int | None:
    """Returns the address of the context; None if Python can tell that it has been freed."""
    context = getattr(llm, "ctx", llm)  # llama_cpp.Llama.ctx, None after Llama.close()
    if context is None or isinstance(context, int):
        return context
    if isinstance(context, (ctypes.c_void_p, ctypes._Pointer)):
        return ctypes.cast(context, ctypes.c_void_p).value
    raise TypeError(f"a llama_cpp.Llama, a ctypes pointer or an address, not {type(llm).__name__}")
