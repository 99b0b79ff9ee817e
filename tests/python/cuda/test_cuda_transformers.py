"""A cache of transformers, in PyTorch's tensors."""

from __future__ import annotations

import importlib.util
from typing import Any

import anyio
import kvferry
import pytest
from support.cuda_driver import NEEDS_CUDA
from support.devices import ON_GPU
from support.event_loops import anyio_backend  # noqa: F401

pytestmark = [pytest.mark.anyio, NEEDS_CUDA]


def missing_for_transformers() -> str:
    """Returns why the test below cannot run here, or ""."""
    for module in ("torch", "transformers"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    import torch

    return "" if ON_GPU and torch.cuda.is_available() else "PyTorch finds no GPU"


def cache_tensors(cache: Any) -> list[Any]:
    """Returns the keys and values of a DynamicCache, whose names depend on the version."""
    if hasattr(cache, "layers"):
        return [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return [*cache.key_cache, *cache.value_cache]


@pytest.mark.skipif(bool(missing_for_transformers()), reason=missing_for_transformers())
async def test_a_transformers_cache_is_saved_beside_decoding_and_loaded_back() -> None:
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).to("cuda", torch.float16).eval()
    stop = False

    @torch.no_grad()
    def step(cache: DynamicCache, tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        torch.cuda.current_stream().synchronize()
        return logits

    def decode_another() -> int:
        """Decodes another request until told to stop; returns the number of tokens."""
        cache, tokens = DynamicCache(), torch.randint(1000, (1, 64), device="cuda")
        count = 0
        while not stop:
            tokens = step(cache, tokens).argmax(-1, keepdim=True)
            count += 1
        return count

    cache, prompt = DynamicCache(), torch.randint(1000, (1, 2000), device="cuda")
    token = step(cache, prompt).argmax(-1, keepdim=True)
    tensors = cache_tensors(cache)
    before = [tensor.clone() for tensor in tensors]
    decoded = 0

    async def decode() -> None:
        nonlocal decoded
        decoded = await anyio.to_thread.run_sync(decode_another)

    async with kvferry.Engine("cuda") as engine, anyio.create_task_group() as tasks:
        tasks.start_soon(decode)
        try:
            saved = await engine.copy_out(tensors)
            for tensor in tensors:
                tensor.zero_()
            torch.cuda.synchronize()
            await engine.copy_in(tensors, saved)
        finally:
            stop = True
    assert decoded > 0
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))

    # The next token is the one that the request would have got.
    untouched = DynamicCache()
    step(untouched, prompt)
    assert torch.equal(step(cache, token), step(untouched, token))
