"""A libllama of the user's choice, as far as the command line drives one.

Programs have bindings of their own and need none of this. The command line doesn't use theirs
because it must find and drive whatever libllama there is, with or without llama-cpp-python, and
because bindings and library often differ by a release in the layout of ``llama_context_params``.
"""

from __future__ import annotations

import collections
import ctypes
import ctypes.util
import dataclasses
import importlib.util
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ENVIRONMENT_VARIABLE = "KVFERRY_LLAMA_LIB"

GGML_TYPE_F16 = 1

# GGML_DEFAULT_N_THREADS, which stands in llama_context_default_params() since there is one.
_DEFAULT_THREADS = 4


class LlamaError(Exception):
    """No libllama, one that can't be used, or a call that it refused; the text says which."""


# ---- Finding it ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Found:
    """A libllama that has not been loaded yet."""

    path: str
    """Of the library; a bare name if the system's loader is to find it."""
    source: str
    """Who named it, for people."""


def find(folder: str | os.PathLike[str] | None = None) -> Found:
    """The libllama in ``folder``; else in $KVFERRY_LLAMA_LIB; of llama-cpp-python; of xllamacpp;
    the system's.

    Raises LlamaError with all the places that were looked at.
    """
    if folder is not None:
        return Found(_in_folder(Path(folder)), "--llama-lib")
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Found(_in_folder(Path(named)), ENVIRONMENT_VARIABLE)
    if (package := _package_folder("llama_cpp")) is not None:
        try:
            return Found(_in_folder(package / "lib"), "installed llama_cpp")
        except LlamaError:
            pass  # one without libraries of its own; others may have some
    if (package := _package_folder("xllamacpp")) is not None:
        # Its extension module has all of llama.cpp in it, and exports that.
        for path in sorted(package.glob("xllamacpp.*so")):
            return Found(str(path), "installed xllamacpp")
    if name := ctypes.util.find_library("llama"):
        return Found(name, "the system's libraries")
    raise LlamaError(
        "no libllama found: name its folder with --llama-lib DIR or "
        f"{ENVIRONMENT_VARIABLE}, or get a prebuilt one: pip install xllamacpp"
    )


def _package_folder(name: str) -> Path | None:
    # Not imported: importing it would load its libllama, and it may be broken.
    package = importlib.util.find_spec(name)
    return Path(package.origin).parent if package is not None and package.origin else None


def _in_folder(folder: Path) -> str:
    if not folder.is_dir():
        raise LlamaError(f"{folder} is not a folder")
    candidates = [folder / "libllama.so", *sorted(folder.glob("libllama.*so*"))]
    for path in candidates:
        if path.exists():
            return str(path.absolute())
    raise LlamaError(f"no libllama.so in {folder}")


# ---- Parameters ----------------------------------------------------------------------------------


# What llama.cpp sets the flags to, in their order.
_DEFAULT_FLAGS = {
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
}


def _context_params(earlier: int, has_type: bool, gap: int) -> type[ctypes.Structure]:
    """``llama_context_params`` with so many fields between n_seq_max and n_threads, and so many
    bytes between the abort callback and the flags.

    Releases differ there (n_rs_seq, n_outputs_max, n_outputs_max_per_seq; eight bytes before the
    flags in 0.6.0-dev), and in whether a ctx_type follows the threads.
    """
    u32, i32, f32, pointer = ctypes.c_uint32, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
    fields: list[tuple[str, Any]] = [
        *((name, u32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")),
        *((f"earlier_{index}", u32) for index in range(earlier)),
        ("n_threads", i32),
        ("n_threads_batch", i32),
        *([("ctx_type", i32)] if has_type else []),
        *((f"{name}_type", i32) for name in ("rope_scaling", "pooling", "attention", "flash_attn")),
        ("rope_freq_base", f32),
        ("rope_freq_scale", f32),
        *((f"yarn_{index}", f32) for index in range(4)),
        ("yarn_orig_ctx", u32),
        ("defrag_thold", f32),
        ("cb_eval", pointer),
        ("cb_eval_user_data", pointer),
        ("type_k", i32),
        ("type_v", i32),
        ("abort_callback", pointer),
        ("abort_callback_data", pointer),
        ("gap", ctypes.c_uint8 * gap),
        *((name, ctypes.c_bool) for name in _DEFAULT_FLAGS),
        # Samplers, another context, and what later releases append: passed on as it came.
        ("later", ctypes.c_uint8 * 258),
    ]
    return type("llama_context_params", (ctypes.Structure,), {"_fields_": fields})


def _is_plausible(defaults: Any) -> bool:
    """Whether a layout makes sense of the library's own defaults."""
    undecided = ("rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type")
    return (
        (defaults.n_threads, defaults.n_threads_batch) == (_DEFAULT_THREADS, _DEFAULT_THREADS)
        and getattr(defaults, "ctx_type", 0) == 0
        and all(getattr(defaults, name) == -1 for name in undecided)
        and (defaults.rope_freq_base, defaults.rope_freq_scale) == (0, 0)
        and (defaults.type_k, defaults.type_v) == (GGML_TYPE_F16, GGML_TYPE_F16)
        and not (defaults.cb_eval or defaults.cb_eval_user_data)
        and not (defaults.abort_callback or defaults.abort_callback_data)
        and not any(defaults.gap)
        and all(getattr(defaults, name) == value for name, value in _DEFAULT_FLAGS.items())
    )


class _ModelParams(ctypes.Structure):
    """The beginning of ``llama_model_params``; the rest is passed on as it came."""

    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("later", ctypes.c_uint8 * 236),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


# ---- The library ---------------------------------------------------------------------------------

_POINTER, _INT, _SIZE, _BOOL = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t, ctypes.c_bool
_COUNT = ctypes.c_uint32

# name: (result, arguments)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_supports_gpu_offload": (_BOOL, []),
    "llama_model_default_params": (_ModelParams, []),
    "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, _ModelParams]),
    "llama_model_free": (None, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_model_is_recurrent": (_BOOL, [_POINTER]),
    "llama_model_desc": (_INT, [_POINTER, ctypes.c_char_p, _SIZE]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_free": (None, [_POINTER]),
    "llama_n_ctx": (_COUNT, [_POINTER]),
    "llama_n_ctx_seq": (_COUNT, [_POINTER]),
    "llama_n_seq_max": (_COUNT, [_POINTER]),
    "llama_n_batch": (_COUNT, [_POINTER]),
    "llama_n_ubatch": (_COUNT, [_POINTER]),
    "llama_n_threads": (_INT, [_POINTER]),
    "llama_n_threads_batch": (_INT, [_POINTER]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_batch_init": (_Batch, [_INT, _INT, _INT]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (_INT, [_POINTER, _Batch]),
    "llama_synchronize": (None, [_POINTER]),
    "llama_get_logits_ith": (_POINTER, [_POINTER, _INT]),
    "llama_memory_seq_rm": (_BOOL, [_POINTER, _INT, _INT, _INT]),
    "llama_memory_seq_pos_max": (_INT, [_POINTER, _INT]),
    "llama_state_seq_get_size": (_SIZE, [_POINTER, _INT]),
    "llama_state_seq_get_data": (_SIZE, [_POINTER, _POINTER, _SIZE, _INT]),
    "llama_state_seq_set_data": (_SIZE, [_POINTER, _POINTER, _SIZE, _INT]),
}


# libllama logs until the process ends, and keeps no reference to what it calls.
_callbacks: list[Any] = []


class Libllama:
    """A loaded libllama with its backends."""

    def __init__(self, found: Found) -> None:
        self.source = found.source
        try:
            self.functions: Any = ctypes.CDLL(found.path)
        except OSError as failure:
            raise LlamaError(f"{found.path} ({found.source}) can't be loaded: {failure}") from None
        self.log: collections.deque[str] = collections.deque(maxlen=100)
        """What it logged last, newest at the end: the reason for a refusal is found here."""
        try:
            self._declare()
        except AttributeError as failure:
            raise LlamaError(f"{found.path} is of another time than kvferry: {failure}") from None
        self.loaded_as = _path_of(self.functions.llama_decode)
        """As the loader knows it: links are not resolved."""
        self.path = os.path.realpath(self.loaded_as)
        self._load_backends()
        self.context_params = self._context_params_type()

    def _declare(self) -> None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.functions, name)
            function.restype, function.argtypes = result, arguments
        callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

        def keep(_level: int, text: bytes, _data: object) -> None:
            self.log.append(text.decode(errors="replace").rstrip())

        kept = callback(keep)
        _callbacks.append(kept)
        self.functions.llama_log_set(kept, None)

    def _load_backends(self) -> None:
        """Some builds keep their CPU and CUDA backends in libraries beside libllama."""
        # Symbols of libggml.so are found through libllama, which depends on it.
        load = getattr(self.functions, "ggml_backend_load_all_from_path", None)
        if load is not None:
            load.argtypes, load.restype = [ctypes.c_char_p], None
            load(os.fsencode(Path(self.path).parent))

    def _context_params_type(self) -> type[ctypes.Structure]:
        for earlier, has_type, gap in itertools.product(range(6), (True, False), (0, 8, 16)):
            layout = _context_params(earlier, has_type, gap)
            if _is_plausible(self._use_layout(layout)):
                return layout
        raise LlamaError(f"unknown layout of llama_context_params in {self.path}")

    def _use_layout(self, layout: type[ctypes.Structure]) -> Any:
        """Declares the functions that take or give the parameters; returns the default ones."""
        self.functions.llama_context_default_params.restype = layout
        self.functions.llama_init_from_model.argtypes = [_POINTER, layout]
        self.functions.llama_init_from_model.restype = _POINTER
        return self.functions.llama_context_default_params()

    @property
    def build(self) -> str:
        """What the library and the files beside it say about the build."""
        said = []
        for name in ("ggml_version", "ggml_commit"):
            function = getattr(self.functions, name, None)
            if function is not None:
                function.restype = ctypes.c_char_p
                said.append((function() or b"").decode())
        return f"{Path(self.path).name}, ggml {' '.join(said) or 'of unknown version'}"

    @property
    def offloads(self) -> bool:
        """Whether it has a backend for a GPU of this machine."""
        return bool(self.functions.llama_supports_gpu_offload())

    def refusal(self, what: str) -> LlamaError:
        lines = [line for line in self.log if line.strip(" .")][-3:]
        return LlamaError(f"{what}: {' | '.join(lines) or 'no reason in its log'}")


def _path_of(function: Any) -> str:
    """The file that a loaded function comes from, by the name under which it was loaded."""

    class Info(ctypes.Structure):
        _fields_ = (
            ("path", ctypes.c_char_p),
            ("base", ctypes.c_void_p),
            ("symbol", ctypes.c_char_p),
            ("address", ctypes.c_void_p),
        )

    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = [ctypes.c_void_p, ctypes.POINTER(Info)]
    info = Info()
    if not dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info)) or not info.path:
        raise LlamaError("the loader doesn't say where libllama came from")
    return os.fsdecode(info.path)


# ---- Models and contexts -------------------------------------------------------------------------


class Model:
    """A loaded model. Free it after its contexts, or leave that to ``with``."""

    def __init__(self, library: Libllama, path: str | os.PathLike[str], *, gpu: bool) -> None:
        """``gpu``: layers go where libllama puts them by default; else they stay on the host."""
        self.library = library
        self.gpu = gpu
        params = library.functions.llama_model_default_params()
        if not gpu:
            if params.n_gpu_layers not in (-1, 0, 999):
                raise LlamaError(f"unknown layout of llama_model_params in {library.path}")
            params.n_gpu_layers = 0
        if not Path(path).is_file():
            raise LlamaError(f"no model file {path}")
        library.log.clear()
        self.pointer: int | None = library.functions.llama_model_load_from_file(
            os.fsencode(path), params
        )
        if not self.pointer:
            raise library.refusal(f"libllama can't load {path}")
        vocabulary = library.functions.llama_model_get_vocab(self.pointer)
        self.vocabulary: int = library.functions.llama_vocab_n_tokens(vocabulary)
        """Number of token ids."""
        self.recurrent: bool = library.functions.llama_model_is_recurrent(self.pointer)

    @property
    def description(self) -> str:
        text = ctypes.create_string_buffer(256)
        self.library.functions.llama_model_desc(self.pointer, text, len(text))
        return text.value.decode(errors="replace")

    def close(self) -> None:
        if self.pointer:
            self.library.functions.llama_model_free(self.pointer)
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


@dataclasses.dataclass(frozen=True)
class ContextOptions:
    """What shapes a context's cache: one for all sequences, of ``n_ctx`` cells."""

    n_ctx: int
    n_seq_max: int
    threads: int
    flash_attention: bool = True
    n_batch: int = 512


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of llama_decode, results included. Times as of ``time.monotonic_ns()``."""

    begin_ns: int
    end_ns: int

    @property
    def ms(self) -> float:
        return (self.end_ns - self.begin_ns) / 1e6


class Context:
    """A context and its cache. One thread at a time, as llama.cpp demands."""

    def __init__(self, model: Model, options: ContextOptions) -> None:
        self.model = model
        self.options = options
        self._functions = model.library.functions
        params = self._functions.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_seq_max = options.n_seq_max
        params.n_batch = params.n_ubatch = options.n_batch
        params.n_threads = params.n_threads_batch = options.threads
        params.flash_attn_type = int(options.flash_attention)
        params.swa_full = False
        params.kv_unified = True
        if not model.gpu:
            params.offload_kqv = params.op_offload = False
        model.library.log.clear()
        self.pointer: int | None = self._functions.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise model.library.refusal("libllama can't make a context")
        self._check()
        self._memory = self._functions.llama_get_memory(self.pointer)
        self._batch = self._functions.llama_batch_init(options.n_batch, 0, 1)

    @property
    def address(self) -> int:
        if self.pointer is None:
            raise LlamaError("the context is closed")
        return self.pointer

    def _check(self) -> None:
        """Reads back what the context has: parameters in another layout would be other ones."""
        functions, options = self._functions, self.options
        has = {
            name: getattr(functions, f"llama_{name}")(self.pointer)
            for name in ("n_seq_max", "n_batch", "n_ubatch", "n_threads", "n_threads_batch")
        }
        cells: int = functions.llama_n_ctx(self.pointer)
        has["kv_unified"] = functions.llama_n_ctx_seq(self.pointer) == cells
        batch = min(options.n_batch, options.n_ctx)
        asked = {
            "n_seq_max": options.n_seq_max,
            "n_batch": batch,
            "n_ubatch": batch,
            "n_threads": options.threads,
            "n_threads_batch": options.threads,
            "kv_unified": True,
        }
        if cells < options.n_ctx or has != asked:
            functions.llama_free(self.pointer)
            self.pointer = None
            raise LlamaError(
                f"{self.model.library.path} makes another context than was asked for "
                f"(n_ctx {options.n_ctx}, {asked}: n_ctx {cells}, {has}): "
                "unknown layout of llama_context_params"
            )

    # Decoding

    def decode(self, items: Sequence[tuple[int, int]]) -> Step:
        """Appends (sequence, token) pairs in this order; logits are made for the last one."""
        begin_ns = time.monotonic_ns()
        position: dict[int, int] = {}
        for start in range(0, len(items), self.options.n_batch):
            self._fill(items[start : start + self.options.n_batch], position)
            status = self._functions.llama_decode(self.pointer, self._batch)
            if status != 0:
                raise self.model.library.refusal(f"llama_decode returned {status}")
        # llama_decode may return before a GPU has finished.
        self._functions.llama_synchronize(self.pointer)
        return Step(begin_ns, time.monotonic_ns())

    def _fill(self, items: Sequence[tuple[int, int]], position: dict[int, int]) -> None:
        batch = self._batch
        batch.n_tokens = len(items)
        for index, (seq, token) in enumerate(items):
            if seq not in position:
                position[seq] = self._functions.llama_memory_seq_pos_max(self._memory, seq) + 1
            batch.token[index] = token
            batch.pos[index] = position[seq]
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = seq
            batch.logits[index] = index == len(items) - 1
            position[seq] += 1

    def logits(self) -> bytes:
        """The logits of the last decoded token: 32-bit floats, one a token id."""
        address = self._functions.llama_get_logits_ith(self.pointer, -1)
        return ctypes.string_at(address, 4 * self.model.vocabulary)

    def shorten(self, seq: int, tokens: int) -> None:
        """Removes the last ``tokens`` of a sequence."""
        end = self._functions.llama_memory_seq_pos_max(self._memory, seq) + 1
        if not self._functions.llama_memory_seq_rm(self._memory, seq, end - tokens, -1):
            raise LlamaError("this cache can't remove a part of a sequence")

    def remove(self, seq: int) -> None:
        self._functions.llama_memory_seq_rm(self._memory, seq, -1, -1)

    # State, by llama.cpp's blocking calls

    def state_size(self, seq: int) -> int:
        size: int = self._functions.llama_state_seq_get_size(self.pointer, seq)
        return size

    def state_get(self, seq: int, address: int, nbytes: int) -> int:
        """Writes the state to an address; the bytes written, 0 if llama.cpp refused."""
        written: int = self._functions.llama_state_seq_get_data(self.pointer, address, nbytes, seq)
        return written

    def state_set(self, seq: int, address: int, nbytes: int) -> int:
        """Replaces a sequence; the bytes read, 0 if llama.cpp refused."""
        read: int = self._functions.llama_state_seq_set_data(self.pointer, address, nbytes, seq)
        return read

    def close(self) -> None:
        if self.pointer:
            self._functions.llama_batch_free(self._batch)
            self._functions.llama_free(self.pointer)
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
