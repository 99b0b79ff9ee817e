"""Architectures in which every layer attends, and keeps keys and values."""

from __future__ import annotations

import dataclasses

from .geometry import Geometry
from .layers import attention, attention_keys, feed_forward, layers
from .model_file import ModelFile


def describe_llama(model: ModelFile, g: Geometry) -> None:
    attention_keys(model, g, g.kv_heads)
    model.norm("output_norm.weight", g.embedding)
    for layer in layers(g):
        model.norm(f"{layer}.attn_norm.weight", g.embedding)
        attention(model, g, layer)
        feed_forward(model, g, layer)


def describe_qwen2vl(model: ModelFile, g: Geometry) -> None:
    # qwen2vl has no key for the width of a head: it is the embedding divided by the heads.
    head_dim = g.embedding // g.heads
    g = dataclasses.replace(g, head_dim=head_dim)
    describe_llama(model, g)
    for layer in layers(g):  # b8179 requires these biases
        model.uniform(f"{layer}.attn_q.bias", -0.1, 0.1, g.heads * head_dim)
        model.uniform(f"{layer}.attn_k.bias", -0.1, 0.1, g.kv_heads * head_dim)
        model.uniform(f"{layer}.attn_v.bias", -0.1, 0.1, g.kv_heads * head_dim)
    # The rotated pairs for time, height and width, together half the head.
    eighth = head_dim // 8
    model.keys.add_rope_dimension_sections([head_dim // 2 - 2 * eighth, eighth, eighth, 0])


def describe_gemma3(model: ModelFile, g: Geometry) -> None:
    attention_keys(model, g, g.kv_heads)
    model.keys.add_sliding_window(g.window)
    # Every second layer is global, so that both caches have layers even in the smallest model.
    model.keys.add_sliding_window_pattern(2)
    model.norm("output_norm.weight", g.embedding)
    for layer in layers(g):
        model.norm(f"{layer}.attn_norm.weight", g.embedding)
        attention(model, g, layer)
        model.norm(f"{layer}.attn_q_norm.weight", g.head_dim)
        model.norm(f"{layer}.attn_k_norm.weight", g.head_dim)
        model.norm(f"{layer}.post_attention_norm.weight", g.embedding)
        feed_forward(model, g, layer)
        model.norm(f"{layer}.post_ffw_norm.weight", g.embedding)
