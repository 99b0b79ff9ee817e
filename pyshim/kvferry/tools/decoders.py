"""Contexts that ``kvferry store warm`` computes prompts with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..prompt_cache import variant_of
from .libllama import CacheType, Context, ContextOptions, Libllama, LlamaError, Model
from .workload import decoding_threads

BATCH = 512

Prompt = str | list[int]  # a text, or tokens


@dataclass(frozen=True)
class Decoder:
    """A context whose sequence 0 is decoded."""

    context: object
    """What ``Engine.attach`` takes."""
    library: str | None
    variant: str
    prompts: list[list[int]]
    """The prompts as tokens."""
    append: Callable[[list[int]], object]
    """Decodes at most BATCH tokens. For the context's thread."""


@dataclass(frozen=True)
class Layout:
    """What a cache must have in common with those that find what is kept."""

    flash_attention: bool = True
    type_k: CacheType = "f16"
    type_v: CacheType = "f16"


@contextmanager
def by_libllama(
    library: Libllama,
    path: str,
    prompts: Sequence[Prompt],
    *,
    gpu: bool,
    layout: Layout,
    variant: str,
) -> Iterator[Decoder]:
    """A context as programs have it that attach contexts by their address."""
    with Model(library, path, gpu=gpu) as model:
        tokens = [model.tokenize(each) if isinstance(each, str) else each for each in prompts]
        options = ContextOptions(
            n_ctx=max(map(len, tokens), default=0) + BATCH,
            n_seq_max=1,
            threads=decoding_threads(),
            flash_attention=layout.flash_attention,
            n_batch=BATCH,
            type_k=layout.type_k,
            type_v=layout.type_v,
        )
        with Context(model, options) as context:
            yield Decoder(
                context.address,
                library.loaded_as,
                variant,
                tokens,
                lambda piece: context.decode([(0, token) for token in piece]),
            )


@contextmanager
def by_llama_cpp_python(
    path: str, prompts: Sequence[Prompt], *, arguments: dict[str, Any], variant: str
) -> Iterator[Decoder]:
    """A ``llama_cpp.Llama``, whose kept prompts a PromptCache finds."""
    try:
        import llama_cpp
    except ImportError:
        raise LlamaError("llama-cpp-python is not installed") from None
    try:
        llm = llama_cpp.Llama(path, **{"verbose": False, **arguments})
    except (TypeError, ValueError) as problem:
        raise LlamaError(f"llama_cpp.Llama: {problem}") from None
    try:
        # As llama_cpp.Llama.create_completion makes tokens of a prompt.
        first = [llm.token_bos()] if llm._model.add_bos_token() else []
        tokens = [
            first + llm.tokenize(each.encode(), add_bos=False, special=True)
            if isinstance(each, str)
            else each
            for each in prompts
        ]
        if (longest := max(map(len, tokens), default=0)) > llm.n_ctx():
            raise LlamaError(f"a prompt has {longest} tokens, and n_ctx is {llm.n_ctx()}")
        yield Decoder(llm, None, variant_of(llm, variant), tokens, llm.eval)
    finally:
        llm.close()
