"""llama.cpp's own calls, with which kvferry is compared.

A thin layer over the loaded libllama: models, contexts, decoding into chosen sequences, and
llama.cpp's blocking calls for the state of a sequence. It has its own prototypes, because the
bindings of llama-cpp-python can be imported only with a libllama of the same release, and these
tests run with many. Its log is kept in `log_lines`, and printed only if KVFERRY_TEST_VERBOSE is
set.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import enum
import importlib.util
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kvferry.tools.libllama.functions import SIGNATURES
from numpy.typing import NDArray

Logits = NDArray[np.float32]

log_lines: collections.deque[str] = collections.deque(maxlen=200)
"""The latest lines of llama.cpp's log, the newest at the end. They say why a call has failed."""

# Without this, ggml starts a debugger when it aborts, which takes seconds and prints pages.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

_verbose = bool(os.environ.get("KVFERRY_TEST_VERBOSE"))


# ---- The library ---------------------------------------------------------------------------------


def _library_folder() -> Path:
    """Returns LLAMA_CPP_LIB_PATH, else the folder in llama-cpp-python's own package."""
    if named := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(named)
    package = importlib.util.find_spec("llama_cpp")  # not imported: its prototypes may not fit
    if package is None or package.origin is None:
        raise ImportError("no libllama: LLAMA_CPP_LIB_PATH is not set, nor llama_cpp installed")
    return Path(package.origin).parent / "lib"


LIBRARY_FOLDER = _library_folder()
"""The folder of this process's libllama and its backends."""

BUILD = (
    os.environ.get("KVFERRY_LLAMA_BUILD") or (LIBRARY_FOLDER / "libllama.so").resolve().parent.name
)
"""The Makefile's name for the build. A library that the Makefile has not fetched, such as one for
CUDA, needs KVFERRY_LLAMA_BUILD: what a build cannot do is known by this name."""

UNFRAMED = BUILD in {"b8179", "b8390"}
"""Whether states are those of builds before b9842: they do not begin with a magic number and a
sequence, and contain the cells that a sliding window has masked."""

NAMES_ROWS = BUILD not in {"b8179", "b8390", "b9842", "b10068", "b10361", "v0.4.0"}
"""The graph that this one computes has a name for the numbers of the rows that it writes."""


_UNFIT = {
    "deepseek32": ("b8179", "b8390"),
    # b9842 has the architecture, but its llama_memory_seq_rm() of one sequence, even an empty one,
    # changes the states of the others.
    "deepseek4": ("b8179", "b8390", "b9842"),
    "qwen4exp": ("b8179", "b8390", "b9842", "b10068", "b10361"),
    "qwen4exp-ngrams": ("b8179", "b8390", "b9842", "b10068", "b10361"),
}
"""The builds that do not have the architecture of a kind, or cannot be compared with."""


def fits(kind: str) -> bool:
    """Whether tests can use a kind of synthetic model with this libllama."""
    return BUILD not in _UNFIT.get(kind, ())


def load_keeps_others(kind: str) -> bool:
    """Whether llama.cpp's own load of one sequence leaves the states of the others as they were."""
    return (kind, BUILD) != ("deepseek4", "b10361")


def model_sizes(kind: str) -> dict[str, int]:
    """Returns the sizes that a small synthetic model must have for this libllama."""
    if kind == "gemma3" and BUILD == "b8179":
        # There every sixth layer is global, whatever the model says, and llama_decode aborts if
        # there is no such layer.
        return {"layers": 6}
    return {}


_library = ctypes.CDLL(str(LIBRARY_FOLDER / "libllama.so"))


# ---- Parameters ----------------------------------------------------------------------------------


def _context_params(*, between: Sequence[str], has_type: bool, gap: int) -> Any:
    """Returns `llama_context_params` with the members `between` n_seq_max and n_threads, with or
    without ctx_type, and with a `gap` of so many bytes before the flags.
    """
    u32, i32, f32, pointer = ctypes.c_uint32, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
    fields: list[tuple[str, Any]] = [
        *((name, u32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", *between)),
        *((name, i32) for name in ("n_threads", "n_threads_batch")),
        *([("ctx_type", i32)] if has_type else []),
        *((f"{name}_type", i32) for name in ("rope_scaling", "pooling", "attention", "flash_attn")),
        *((name, f32) for name in ("rope_freq_base", "rope_freq_scale")),
        *(
            (f"yarn_{name}", f32)
            for name in ("ext_factor", "attn_factor", "beta_fast", "beta_slow")
        ),
        ("yarn_orig_ctx", u32),
        ("defrag_thold", f32),
        *((name, pointer) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, i32) for name in ("type_k", "type_v")),
        *((name, pointer) for name in ("abort_callback", "abort_callback_data")),
        ("gap", ctypes.c_uint8 * gap),
        *((name, ctypes.c_bool) for name in ("embeddings", "offload_kqv", "no_perf")),
        *((name, ctypes.c_bool) for name in ("op_offload", "swa_full", "kv_unified")),
        ("later", ctypes.c_uint8 * 250),  # left unchanged
    ]
    return type("llama_context_params", (ctypes.Structure,), {"_fields_": fields})


# Defaults of all these builds. They distinguish the layouts.
_DEFAULTS = {
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "type_k": 1,
    "type_v": 1,
    "cb_eval": None,
    "abort_callback": None,
    "abort_callback_data": None,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
}

_OUTPUTS = ("n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")

LAYOUTS = {
    "b8179 to b8390": _context_params(between=(), has_type=False, gap=0),
    "b9842 to b10068": _context_params(between=_OUTPUTS[:2], has_type=True, gap=0),
    "b10361 to v0.5.0, 0.6.0": _context_params(between=_OUTPUTS, has_type=True, gap=0),
    # A development version after the release has eight more bytes, which are zero by default.
    "0.6.0-dev": _context_params(between=_OUTPUTS, has_type=True, gap=8),
}
"""The layouts of `llama_context_params`, by builds."""


def _has_the_defaults(layout: Any) -> bool:
    _library.llama_context_default_params.restype = layout
    defaults = _library.llama_context_default_params()
    return all(getattr(defaults, name) == value for name, value in _DEFAULTS.items())


def _layout() -> Any:
    fitting = [layout for layout in LAYOUTS.values() if _has_the_defaults(layout)]
    if len(fitting) != 1:
        raise ImportError(f"unknown layout of llama_context_params in {LIBRARY_FOLDER}")
    return fitting[0]


ContextParams: Any = _layout()
"""`llama_context_params` in the layout of the loaded libllama."""


# ---- Functions -----------------------------------------------------------------------------------

_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
AbortCallback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
"""A CPU calls it after each operation of a graph; True aborts the decode."""
_POINTER, _BYTES, _TEXT = ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint8), ctypes.c_char_p
_INT, _SIZE, _BOOL = ctypes.c_int32, ctypes.c_size_t, ctypes.c_bool

# What the command line uses too is declared there; every release has the same prototypes.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    **SIGNATURES,
    "ggml_backend_load_all_from_path": (None, [_TEXT]),
    "llama_log_set": (None, [_LogCallback, _POINTER]),
    "llama_model_is_hybrid": (_BOOL, [_POINTER]),
    "llama_model_n_swa": (_INT, [_POINTER]),
    "llama_context_default_params": (ContextParams, []),
    "llama_init_from_model": (_POINTER, [_POINTER, ContextParams]),
    "llama_set_abort_callback": (None, [_POINTER, AbortCallback, _POINTER]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [_POINTER, _INT]),
    "llama_memory_can_shift": (_BOOL, [_POINTER]),
    "llama_memory_seq_cp": (None, [_POINTER, _INT, _INT, _INT, _INT]),
    "llama_memory_seq_add": (None, [_POINTER, _INT, _INT, _INT, _INT]),
    "llama_memory_seq_div": (None, [_POINTER, _INT, _INT, _INT, ctypes.c_int]),
    "llama_memory_seq_keep": (None, [_POINTER, _INT]),
    "llama_memory_clear": (None, [_POINTER, _BOOL]),
    "llama_state_get_size": (_SIZE, [_POINTER]),
    "llama_state_get_data": (_SIZE, [_POINTER, _BYTES, _SIZE]),
    "llama_state_seq_get_data": (_SIZE, [_POINTER, _BYTES, _SIZE, _INT]),
    "llama_state_seq_set_data": (_SIZE, [_POINTER, _BYTES, _SIZE, _INT]),
}


class _Functions:
    """The declared functions of the loaded libllama. Others raise, because ctypes would guess their
    types.
    """

    def __init__(self) -> None:
        for name, (result, arguments) in _SIGNATURES.items():
            # Functions of ggml are found too, because the library depends on it.
            function = getattr(_library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"declare {name} in _SIGNATURES of llama_reference.py")


llama = _Functions()


@_LogCallback
def _keep_log(_level: int, text: bytes, _data: object) -> None:
    log_lines.append(text.decode(errors="replace").rstrip())
    if _verbose:
        print(text.decode(errors="replace"), end="", flush=True)


def keep_log() -> None:
    """Directs llama.cpp's log to `log_lines`, at first and after others have redirected it."""
    llama.llama_log_set(_keep_log, None)


keep_log()
# Most of these builds have ggml's CPU backends in separate libraries.
llama.ggml_backend_load_all_from_path(os.fsencode(LIBRARY_FOLDER))


def bindings_fit() -> bool:
    """Whether llama-cpp-python's `llama_context_params` has the layout of this libllama.

    No release of it fits b10361, for instance: 0.3.34 has no `n_outputs_max_per_seq`, so that
    libllama would read the number of threads there, and `flash_attn_type` as `attention_type`.
    """
    try:
        import llama_cpp.llama_cpp as bindings
    except AttributeError:  # a function that this libllama does not have
        return False
    finally:
        keep_log()  # the import has redirected the log
    names = [name for name, _ in ContextParams._fields_ if name not in ("gap", "later")]
    known = [name for name, _ in bindings.llama_context_params._fields_]
    return ContextParams.gap.size == 0 and known[: len(names)] == names


# ---- Models and contexts -------------------------------------------------------------------------


class CacheType(enum.IntEnum):
    """The element types of a cache, by ggml's numbers."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q8_0 = 8


@dataclasses.dataclass(frozen=True)
class ContextOptions:
    """The options of a context's cache.

    `n_ctx` is the number of cells for all sequences together. Without `kv_unified` each sequence
    has a stream of its own with `n_ctx / n_seq_max` cells.
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
    """llama.cpp has refused to load a model, make a context or decode; the text is from its log."""


class Model:
    """A loaded model. Close it after its contexts, or use `with`."""

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
        """The tokens of the sliding window; 0 if there is none."""
        return int(llama.llama_model_n_swa(self.pointer))

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        """Returns random token ids."""
        return random.Random(seed).choices(range(self.vocabulary), k=length)

    def context(self, options: ContextOptions | None = None, **changes: Any) -> Context:
        return Context(self, dataclasses.replace(options or ContextOptions(), **changes))

    def close(self) -> None:
        if self.pointer:
            llama.llama_model_free(self.pointer)
            self.pointer = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Context:
    """A context and its cache. llama.cpp allows one thread at a time."""

    def __init__(self, model: Model, options: ContextOptions) -> None:
        self.model = model
        self.options = options
        params = llama.llama_context_default_params()
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
        self.pointer: Any = llama.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise Refused(_refusal())
        self.memory: Any = llama.llama_get_memory(self.pointer)

    @property
    def address(self) -> int:
        """The `llama_context *` as a number."""
        return int(ctypes.cast(self.pointer, ctypes.c_void_p).value or 0)

    # Decoding

    def decode(self, seq: int, tokens: Sequence[int]) -> Logits:
        """Appends `tokens` to a sequence; returns the logits after the last token."""
        return self.decode_batch([(seq, token) for token in tokens])[seq]

    def decode_batch(self, items: Sequence[tuple[int, int]]) -> dict[int, Logits]:
        """Appends (sequence, token) pairs in this order, in as few batches as `n_batch` allows.

        Each token gets the next position of its sequence. In a unified attention cache, neighbours
        in the list become neighbours in the cache. Returns the last logits of each sequence.
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
        """Appends `length` random tokens to each sequence, one token of each in turn, so that in a
        unified cache no two cells of a sequence are neighbours.
        """
        prompts = {seq: self.model.prompt(length, seed + seq) for seq in seqs}
        return self.decode_batch(
            [(seq, prompt[index]) for index in range(length) for seq, prompt in prompts.items()]
        )

    def decode_at_random(
        self, seqs: Iterable[int], length: int, seed: int = 0
    ) -> dict[int, Logits]:
        """As `decode_in_turn`, but in random order: runs of any length, and no regular pitch."""
        prompts = {seq: iter(self.model.prompt(length, seed + seq)) for seq in seqs}
        turns = [seq for seq in prompts for _ in range(length)]
        random.Random(seed).shuffle(turns)
        return self.decode_batch([(seq, next(prompts[seq])) for seq in turns])

    # Sequences

    def pos_max(self, seq: int) -> int:
        """The last position of a sequence, -1 for an empty sequence."""
        return int(llama.llama_memory_seq_pos_max(self.memory, seq))

    @property
    def can_shift(self) -> bool:
        """Whether `seq_add` may be used. If not, llama.cpp aborts in the decode after it."""
        return bool(llama.llama_memory_can_shift(self.memory))

    def seq_rm(self, seq: int, start: int = -1, stop: int = -1) -> bool:
        """Removes positions [start, stop). Returns False if the cache cannot remove a part."""
        return bool(llama.llama_memory_seq_rm(self.memory, seq, start, stop))

    def seq_cp(self, source: int, target: int, start: int = -1, stop: int = -1) -> None:
        llama.llama_memory_seq_cp(self.memory, source, target, start, stop)

    def seq_add(self, seq: int, start: int, stop: int, shift: int) -> None:
        llama.llama_memory_seq_add(self.memory, seq, start, stop, shift)

    def seq_keep(self, seq: int) -> None:
        llama.llama_memory_seq_keep(self.memory, seq)

    def clear(self) -> None:
        """Empties all sequences, and zeroes the bytes of the cache."""
        llama.llama_memory_clear(self.memory, True)

    # State, by llama.cpp's blocking calls

    def state_size(self, seq: int) -> int:
        return int(llama.llama_state_seq_get_size(self.pointer, seq))

    def state_get(self, seq: int) -> bytes:
        """Returns the state of a sequence; no bytes if llama.cpp refused."""
        size = self.state_size(seq)
        buffer = (ctypes.c_uint8 * size)()
        return bytes(buffer[: self.state_get_into(seq, buffer)])

    def state_get_into(self, seq: int, buffer: Any) -> int:
        """Writes the state into a ctypes array; returns the bytes written, 0 if refused."""
        return int(llama.llama_state_seq_get_data(self.pointer, buffer, len(buffer), seq))

    def state_set(self, seq: int, state: bytes) -> int:
        """Replaces a sequence by a state; returns the bytes read, 0 if refused."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        log_lines.clear()
        return int(llama.llama_state_seq_set_data(self.pointer, buffer, len(state), seq))

    def close(self) -> None:
        if self.pointer:
            llama.llama_free(self.pointer)
            self.pointer = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refusal() -> str:
    return "\n".join(log_lines) or "no reason in llama.cpp's log"
