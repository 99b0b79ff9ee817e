"""The kinds of synthetic models."""

from __future__ import annotations

from collections.abc import Callable

from .attention import describe_gemma3, describe_llama, describe_qwen2vl
from .deepseek import describe_deepseek2, describe_deepseek32
from .deepseek4 import describe_deepseek4
from .geometry import Geometry
from .model_file import ModelFile
from .qwen4exp import describe_qwen4exp, describe_qwen4exp_ngrams
from .recurrent import describe_jamba, describe_lfm2, describe_mamba

KINDS: dict[str, tuple[str, Callable[[ModelFile, Geometry], None]]] = {
    "llama": ("llama", describe_llama),
    "gemma3": ("gemma3", describe_gemma3),
    "mamba": ("mamba", describe_mamba),
    "hybrid": ("jamba", describe_jamba),
    "hybrid-iswa": ("lfm2", describe_lfm2),
    "deepseek2": ("deepseek2", describe_deepseek2),
    "deepseek32": ("deepseek32", describe_deepseek32),
    "deepseek4": ("deepseek4", describe_deepseek4),
    "qwen2vl": ("qwen2vl", describe_qwen2vl),
    "qwen4exp": ("qwen4exp", describe_qwen4exp),
    "qwen4exp-ngrams": ("qwen4exp", describe_qwen4exp_ngrams),
}
"""For each kind: the architecture's name in llama.cpp, and the function that adds its parts."""
