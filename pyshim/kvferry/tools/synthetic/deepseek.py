"""The architectures of DeepSeek-V2 and V3.2: latent rows instead of keys and values."""

from __future__ import annotations

from .geometry import Geometry
from .layers import feed_forward, layers
from .model_file import ModelFile


def _latent_attention(model: ModelFile, g: Geometry) -> None:
    """Adds keys and tensors of multi-head latent attention; all layers are dense."""
    rotated = g.head_dim // 2
    model.keys.add_head_count(g.heads)
    model.keys.add_head_count_kv(1)  # one latent row serves every head
    model.keys.add_key_length(g.rank + rotated)
    model.keys.add_value_length(g.rank)
    model.keys.add_key_length_mla(g.head_dim)
    model.keys.add_value_length_mla(g.head_dim)
    model.keys.add_rope_dimension_count(rotated)
    model.keys.add_q_lora_rank(g.rank)
    model.keys.add_kv_lora_rank(g.rank)
    model.keys.add_leading_dense_block_count(g.layers)
    # Required even where no layer has experts.
    model.keys.add_expert_count(0)
    model.keys.add_expert_used_count(0)
    model.keys.add_expert_shared_count(0)
    model.keys.add_expert_feed_forward_length(g.feed_forward)
    model.norm("output_norm.weight", g.embedding)
    for layer in layers(g):
        model.norm(f"{layer}.attn_norm.weight", g.embedding)
        model.matrix(f"{layer}.attn_q_a.weight", g.rank, g.embedding)
        model.norm(f"{layer}.attn_q_a_norm.weight", g.rank)
        model.matrix(f"{layer}.attn_q_b.weight", g.heads * g.head_dim, g.rank)
        model.matrix(f"{layer}.attn_kv_a_mqa.weight", g.rank + rotated, g.embedding)
        model.norm(f"{layer}.attn_kv_a_norm.weight", g.rank)
        model.matrix(f"{layer}.attn_k_b.weight", g.heads, g.rank, g.head_dim - rotated)
        model.matrix(f"{layer}.attn_v_b.weight", g.heads, g.head_dim, g.rank)
        model.matrix(f"{layer}.attn_output.weight", g.embedding, g.heads * g.head_dim)
        feed_forward(model, g, layer)


def describe_deepseek2(model: ModelFile, g: Geometry) -> None:
    _latent_attention(model, g)


def describe_deepseek32(model: ModelFile, g: Geometry) -> None:
    _latent_attention(model, g)
    # llama.cpp rotates half of the indexer's key (in models/deepseek32.cpp indexer_k_nope starts
    # after n_embd_indexer_head_nope numbers), as many numbers as in the latent row.
    heads, key_length = g.heads, g.head_dim
    model.keys.add_indexer_head_count(heads)
    model.keys.add_indexer_key_length(key_length)
    model.keys.add_indexer_top_k(g.window)
    model.keys.add_uint32("deepseek32.expert_gating_func", 2)  # sigmoid; required, unused
    for layer in layers(g):
        model.norm(f"{layer}.indexer.k_norm.weight", key_length)
        model.uniform(f"{layer}.indexer.k_norm.bias", -0.1, 0.1, key_length)
        model.matrix(f"{layer}.indexer.proj.weight", heads, g.embedding)
        model.matrix(f"{layer}.indexer.attn_k.weight", key_length, g.embedding)
        model.matrix(f"{layer}.indexer.attn_q_b.weight", heads * key_length, g.rank)
