"""The structs and functions of llama.h that are declared alike in every release."""

from __future__ import annotations

import ctypes
from typing import Any


class ModelParams(ctypes.Structure):
    """The first members of ``llama_model_params``; the others are left unchanged."""

    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("later", ctypes.c_uint8 * 236),
    )


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_POINTER, _INT, _SIZE, _BOOL = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t, ctypes.c_bool
_COUNT = ctypes.c_uint32

# The types of result and arguments, by name.
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_supports_gpu_offload": (_BOOL, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, ModelParams]),
    "llama_model_free": (None, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_model_is_recurrent": (_BOOL, [_POINTER]),
    "llama_model_desc": (_INT, [_POINTER, ctypes.c_char_p, _SIZE]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_tokenize": (
        _INT,
        [_POINTER, ctypes.c_char_p, _INT, ctypes.POINTER(_INT), _INT, _BOOL, _BOOL],
    ),
    "llama_free": (None, [_POINTER]),
    "llama_n_ctx": (_COUNT, [_POINTER]),
    "llama_n_ctx_seq": (_COUNT, [_POINTER]),
    "llama_n_seq_max": (_COUNT, [_POINTER]),
    "llama_n_batch": (_COUNT, [_POINTER]),
    "llama_n_ubatch": (_COUNT, [_POINTER]),
    "llama_n_threads": (_INT, [_POINTER]),
    "llama_n_threads_batch": (_INT, [_POINTER]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_batch_init": (Batch, [_INT, _INT, _INT]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (_INT, [_POINTER, Batch]),
    "llama_synchronize": (None, [_POINTER]),
    "llama_get_logits_ith": (_POINTER, [_POINTER, _INT]),
    "llama_memory_seq_rm": (_BOOL, [_POINTER, _INT, _INT, _INT]),
    "llama_memory_seq_cp": (None, [_POINTER, _INT, _INT, _INT, _INT]),
    "llama_memory_seq_pos_max": (_INT, [_POINTER, _INT]),
    "llama_state_seq_get_size": (_SIZE, [_POINTER, _INT]),
    "llama_state_seq_get_data": (_SIZE, [_POINTER, _POINTER, _SIZE, _INT]),
    "llama_state_seq_set_data": (_SIZE, [_POINTER, _POINTER, _SIZE, _INT]),
}
