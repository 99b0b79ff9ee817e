"""Architectures whose layers are all recurrent, or some of them."""

from __future__ import annotations

import dataclasses

from .geometry import Geometry
from .layers import (
    attention,
    attention_keys,
    feed_forward,
    layers,
    recurrent,
    recurrent_keys,
    time_step_rank,
)
from .model_file import ModelFile


def describe_mamba(model: ModelFile, g: Geometry) -> None:
    recurrent_keys(model, g)
    model.norm("output_norm.weight", g.embedding)
    for layer in layers(g):
        model.norm(f"{layer}.attn_norm.weight", g.embedding)
        recurrent(model, g, layer)


def _kv_heads_per_layer(g: Geometry) -> list[int]:
    """Every second layer attends. A layer without key-value heads is recurrent."""
    return [g.kv_heads if index % 2 else 0 for index in range(g.layers)]


def describe_jamba(model: ModelFile, g: Geometry) -> None:
    g = dataclasses.replace(g, head_dim=g.embedding // g.heads)  # heads share the embedding
    kv_heads = _kv_heads_per_layer(g)
    attention_keys(model, g, kv_heads)
    recurrent_keys(model, g)
    model.norm("output_norm.weight", g.embedding)
    for layer, attends in zip(layers(g), kv_heads, strict=True):
        model.norm(f"{layer}.attn_norm.weight", g.embedding)
        if attends:
            attention(model, g, layer)
        else:
            recurrent(model, g, layer)
            model.norm(f"{layer}.ssm_dt_norm.weight", time_step_rank(g))
            model.norm(f"{layer}.ssm_b_norm.weight", g.state)
            model.norm(f"{layer}.ssm_c_norm.weight", g.state)
        feed_forward(model, g, layer)


def describe_lfm2(model: ModelFile, g: Geometry) -> None:
    g = dataclasses.replace(g, head_dim=g.embedding // g.heads)  # heads share the embedding
    kv_heads = _kv_heads_per_layer(g)
    attention_keys(model, g, kv_heads)
    model.keys.add_sliding_window(g.window)
    model.keys.add_shortconv_l_cache(3)
    model.norm("token_embd_norm.weight", g.embedding)  # lfm2's name for the last norm
    for layer, attends in zip(layers(g), kv_heads, strict=True):
        model.norm(f"{layer}.attn_norm.weight", g.embedding)
        if attends:
            attention(model, g, layer)
            model.norm(f"{layer}.attn_q_norm.weight", g.head_dim)
            model.norm(f"{layer}.attn_k_norm.weight", g.head_dim)
        else:
            model.uniform(f"{layer}.shortconv.conv.weight", -0.5, 0.5, g.embedding, 3)
            model.matrix(f"{layer}.shortconv.in_proj.weight", 3 * g.embedding, g.embedding)
            model.matrix(f"{layer}.shortconv.out_proj.weight", g.embedding, g.embedding)
        feed_forward(model, g, layer)
