"""The loaded libllama: its parameters, its functions and its log."""

from __future__ import annotations

import collections
import ctypes
import os
from collections.abc import Sequence
from typing import Any

from kvferry.tools.libllama.functions import SIGNATURES

from support.llama_reference.builds import LIBRARY_FOLDER

# Without this, ggml starts a debugger when it aborts, which takes seconds and prints pages.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

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
    "llama_model_n_embd": (_INT, [_POINTER]),
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
    "llama_state_seq_get_size_ext": (_SIZE, [_POINTER, _INT, ctypes.c_uint32]),
    "llama_state_seq_get_data_ext": (_SIZE, [_POINTER, _BYTES, _SIZE, _INT, ctypes.c_uint32]),
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
        raise AttributeError(f"declare {name} in _SIGNATURES of llama_reference/library.py")


llama = _Functions()


# ---- Log -----------------------------------------------------------------------------------------

_verbose = bool(os.environ.get("KVFERRY_TEST_VERBOSE"))

log_lines: collections.deque[str] = collections.deque(maxlen=200)
"""The latest lines of llama.cpp's log, the newest at the end. They say why a call has failed."""


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
