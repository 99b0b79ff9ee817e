"""The struct ``llama_context_params``, whose layout differs from release to release."""

from __future__ import annotations

import ctypes
from typing import Any, Literal

GGML_TYPE_F16 = 1

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
CACHE_TYPES: dict[CacheType, int] = {
    "f32": 0,
    "f16": GGML_TYPE_F16,
    "bf16": 30,
    "q8_0": 8,
    "q5_1": 7,
    "q5_0": 6,
    "q4_1": 3,
    "q4_0": 2,
    "iq4_nl": 20,
}
"""The types that a cache may have, with ggml's numbers."""

# GGML_DEFAULT_N_THREADS: llama_context_default_params() has always returned this number.
_DEFAULT_THREADS = 4

# The flags in their order, with llama.cpp's defaults.
DEFAULT_FLAGS = {
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
}


def context_params(earlier: int, has_type: bool, gap: int) -> type[ctypes.Structure]:
    """Returns ``llama_context_params`` with ``earlier`` fields between n_seq_max and n_threads, and
    with ``gap`` bytes between the abort callback and the flags.

    Releases differ in the fields (n_rs_seq, n_outputs_max, n_outputs_max_per_seq), in the gap (8 in
    0.6.0-dev), and in whether ctx_type follows the threads.
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
        *((name, ctypes.c_bool) for name in DEFAULT_FLAGS),
        # Samplers, another context, and what later releases append: left unchanged.
        ("later", ctypes.c_uint8 * 258),
    ]
    return type("llama_context_params", (ctypes.Structure,), {"_fields_": fields})


def is_plausible(defaults: Any) -> bool:
    """Whether the library's own defaults, read in a layout, have the values that they should."""
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
        and all(getattr(defaults, name) == value for name, value in DEFAULT_FLAGS.items())
    )
