"""llama.cpp by its own calls: what kvferry is measured against.

A thin layer over the ctypes bindings of llama-cpp-python, without any kvferry: models, contexts,
decoding into chosen sequences, and llama.cpp's blocking calls for the state of a sequence.  Its log
is kept in `log_lines` rather than printed, unless KVFERRY_TEST_VERBOSE is set.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import enum
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp.llama_cpp as _bindings
import numpy as np
from numpy.typing import NDArray

# The bindings' annotations speak of pointers that ctypes can't express; here they are untyped.
llama: Any = _bindings

Logits = NDArray[np.float32]

log_lines: collections.deque[str] = collections.deque(maxlen=200)
"""What llama.cpp logged last, newest at the end: the reason for a refusal is found here."""

# Where ggml aborts, it would start a debugger for the stack: seconds, and pages of output.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

_verbose = bool(os.environ.get("KVFERRY_TEST_VERBOSE"))


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, _data: object) -> None:
    log_lines.append(text.decode(errors="replace").rstrip())
    if _verbose:
        print(text.decode(errors="replace"), end="", flush=True)


def _load_backends() -> Path:
    """Load ggml's CPU backend, which these builds keep in libraries of their own."""
    folder = Path(llama._lib._name).parent
    ggml = ctypes.CDLL(str(folder / "libggml.so"))
    ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_load_all_from_path.restype = None
    ggml.ggml_backend_load_all_from_path(os.fsencode(folder))
    return folder


llama.llama_log_set(_keep_log, None)
LIBRARY_FOLDER = _load_backends()
"""Where the libllama of this process and its backends are."""


def bindings_fit() -> bool:
    """Whether the bindings' `llama_context_params` are laid out as those of the loaded libllama.

    Two defaults tell.  No release of llama-cpp-python fits b10361, for instance: 0.3.34 lacks
    `n_outputs_max_per_seq`, so that libllama would take the number of threads for that, and
    `flash_attn_type` for `attention_type`.
    """
    defaults = llama.llama_context_default_params()
    return (defaults.ctx_type, defaults.rope_scaling_type) == (0, -1)


def _context_params_type() -> Any:
    """`llama_context_params` as the loaded libllama lays it out."""
    fields = list(llama.llama_context_params._fields_)
    if not bindings_fit():
        after = [name for name, _ in fields].index("n_outputs_max") + 1
        fields.insert(after, ("n_outputs_max_per_seq", ctypes.c_uint32))

    class ContextParams(ctypes.Structure):
        _fields_ = fields

    return ContextParams


# A handle of its own: the bindings' functions keep the types that the bindings gave them.
_library = ctypes.CDLL(llama._lib._name)
_ContextParams: Any = _context_params_type()
_library.llama_context_default_params.restype = _ContextParams
_library.llama_init_from_model.argtypes = [ctypes.c_void_p, _ContextParams]
_library.llama_init_from_model.restype = llama.llama_context_p_ctypes
_defaults = _library.llama_context_default_params()
if (_defaults.ctx_type, _defaults.rope_scaling_type, _defaults.flash_attn_type) != (0, -1, -1):
    raise ImportError(f"unknown layout of llama_context_params in {llama._lib._name}")


class CacheType(enum.IntEnum):
    """The element types of a cache, by ggml's numbers."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q8_0 = 8


@dataclasses.dataclass(frozen=True)
class ContextOptions:
    """What shapes the cache of a context.  `n_ctx` counts cells for all sequences together: without
    `kv_unified` each sequence has a stream of its own with `n_ctx / n_seq_max` of them.
    """

    n_ctx: int = 512
    n_seq_max: int = 4
    kv_unified: bool = True
    flash_attention: bool = True
    type_k: CacheType = CacheType.F16
    type_v: CacheType = CacheType.F16
    swa_full: bool = False
    n_threads: int = 1
    n_batch: int = 512
    n_ubatch: int = 512


class Refused(Exception):
    """llama.cpp declined to load a model, make a context or decode; the text is from its log."""


class Model:
    """A loaded model.  Free it after its contexts, or leave that to `with`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        params = llama.llama_model_default_params()
        log_lines.clear()
        self.pointer: Any = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise Refused(_refusal())
        self.vocabulary = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.pointer)))
        """Number of token ids."""

    @property
    def is_recurrent(self) -> bool:
        return bool(llama.llama_model_is_recurrent(self.pointer))

    @property
    def is_hybrid(self) -> bool:
        return bool(llama.llama_model_is_hybrid(self.pointer))

    @property
    def n_swa(self) -> int:
        """Tokens of the sliding window, 0 without one."""
        return int(llama.llama_model_n_swa(self.pointer))

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        """Random token ids."""
        return random.Random(seed).choices(range(self.vocabulary), k=length)

    def context(self, options: ContextOptions | None = None, **changes: Any) -> Context:
        return Context(self, dataclasses.replace(options or ContextOptions(), **changes))

    def close(self) -> None:
        if self.pointer:
            llama.llama_model_free(self.pointer)
            self.pointer = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Context:
    """A context and its cache.  One thread at a time, as llama.cpp demands."""

    def __init__(self, model: Model, options: ContextOptions) -> None:
        self.model = model
        self.options = options
        params = _library.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_seq_max = options.n_seq_max
        params.n_batch = options.n_batch
        params.n_ubatch = options.n_ubatch
        params.n_threads = options.n_threads
        params.n_threads_batch = options.n_threads
        params.flash_attn_type = int(options.flash_attention)
        params.type_k = int(options.type_k)
        params.type_v = int(options.type_v)
        params.swa_full = options.swa_full
        params.kv_unified = options.kv_unified
        log_lines.clear()
        self.pointer: Any = _library.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise Refused(_refusal())
        self.memory: Any = llama.llama_get_memory(self.pointer)

    @property
    def address(self) -> int:
        """The `llama_context *` as a number."""
        return int(ctypes.cast(self.pointer, ctypes.c_void_p).value or 0)

    # Decoding

    def decode(self, seq: int, tokens: Sequence[int]) -> Logits:
        """Append `tokens` to sequence `seq` and return the logits after the last one."""
        return self.decode_batch([(seq, token) for token in tokens])[seq]

    def decode_batch(self, items: Sequence[tuple[int, int]]) -> dict[int, Logits]:
        """Append (sequence, token) pairs, in this order, in as few batches as `n_batch` allows.

        Each token goes to the next position of its sequence.  In a unified attention cache,
        neighbours in the list become neighbours in the cache.  Returns the last logits of each
        sequence.
        """
        logits: dict[int, Logits] = {}
        for start in range(0, len(items), self.options.n_batch):
            logits |= self._decode_one_batch(items[start : start + self.options.n_batch])
        return logits

    def _decode_one_batch(self, items: Sequence[tuple[int, int]]) -> dict[int, Logits]:
        last = {seq: index for index, (seq, _) in enumerate(items)}
        position = {seq: self.pos_max(seq) + 1 for seq in last}
        batch = llama.llama_batch_init(len(items), 0, 1)
        try:
            batch.n_tokens = len(items)
            for index, (seq, token) in enumerate(items):
                batch.token[index] = token
                batch.pos[index] = position[seq]
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = seq
                batch.logits[index] = last[seq] == index
                position[seq] += 1
            log_lines.clear()
            status = llama.llama_decode(self.pointer, batch)
        finally:
            llama.llama_batch_free(batch)
        if status != 0:
            raise Refused(f"llama_decode returned {status}: {_refusal()}")
        return {seq: self._logits(index) for seq, index in last.items()}

    def _logits(self, index: int) -> Logits:
        pointer = llama.llama_get_logits_ith(self.pointer, index)
        logits: Logits = np.ctypeslib.as_array(pointer, (self.model.vocabulary,)).copy()
        return logits

    def decode_in_turn(self, seqs: Iterable[int], length: int, seed: int = 0) -> dict[int, Logits]:
        """Append `length` random tokens to each sequence, one token of each in turn, so that in a
        unified cache every cell of a sequence stands alone.
        """
        prompts = {seq: self.model.prompt(length, seed + seq) for seq in seqs}
        return self.decode_batch(
            [(seq, prompt[index]) for index in range(length) for seq, prompt in prompts.items()]
        )

    def decode_at_random(
        self, seqs: Iterable[int], length: int, seed: int = 0
    ) -> dict[int, Logits]:
        """As `decode_in_turn` with the turns shuffled: runs of all lengths and no regular pitch."""
        prompts = {seq: iter(self.model.prompt(length, seed + seq)) for seq in seqs}
        turns = [seq for seq in prompts for _ in range(length)]
        random.Random(seed).shuffle(turns)
        return self.decode_batch([(seq, next(prompts[seq])) for seq in turns])

    # Sequences

    def pos_min(self, seq: int) -> int:
        """The first position of a sequence that the cache holds, -1 for an empty sequence."""
        return int(llama.llama_memory_seq_pos_min(self.memory, seq))

    def pos_max(self, seq: int) -> int:
        """The last position of a sequence, -1 for an empty sequence."""
        return int(llama.llama_memory_seq_pos_max(self.memory, seq))

    @property
    def can_shift(self) -> bool:
        """Whether `seq_add` may be used; where not, llama.cpp aborts in the next decode."""
        return bool(llama.llama_memory_can_shift(self.memory))

    def seq_rm(self, seq: int, start: int = -1, stop: int = -1) -> bool:
        """Remove positions [start, stop); False where the cache can't remove a part."""
        return bool(llama.llama_memory_seq_rm(self.memory, seq, start, stop))

    def seq_cp(self, source: int, target: int, start: int = -1, stop: int = -1) -> None:
        llama.llama_memory_seq_cp(self.memory, source, target, start, stop)

    def seq_add(self, seq: int, start: int, stop: int, shift: int) -> None:
        llama.llama_memory_seq_add(self.memory, seq, start, stop, shift)

    def seq_keep(self, seq: int) -> None:
        llama.llama_memory_seq_keep(self.memory, seq)

    def clear(self) -> None:
        """Empty every sequence and zero the cache's bytes."""
        llama.llama_memory_clear(self.memory, True)

    # State, by llama.cpp's blocking calls

    def state_size(self, seq: int) -> int:
        return int(llama.llama_state_seq_get_size(self.pointer, seq))

    def state_get(self, seq: int) -> bytes:
        """The state of a sequence; empty if llama.cpp refused."""
        size = self.state_size(seq)
        buffer = (ctypes.c_uint8 * size)()
        return bytes(buffer[: self.state_get_into(seq, buffer)])

    def state_get_into(self, seq: int, buffer: Any) -> int:
        """Write the state into a ctypes array; the bytes written, 0 if llama.cpp refused."""
        return int(llama.llama_state_seq_get_data(self.pointer, buffer, len(buffer), seq))

    def state_set(self, seq: int, state: bytes) -> int:
        """Replace a sequence by a state; the bytes read, 0 if llama.cpp refused."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        log_lines.clear()
        return int(llama.llama_state_seq_set_data(self.pointer, buffer, len(state), seq))

    def close(self) -> None:
        if self.pointer:
            llama.llama_free(self.pointer)
            self.pointer = None

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _refusal() -> str:
    return "\n".join(log_lines) or "no reason in llama.cpp's log"
