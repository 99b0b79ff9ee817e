"""DeepSeek's architectures: latent rows instead of keys and values."""

from __future__ import annotations

from .geometry import Geometry
from .layers import EXPERTS, expert_keys, experts, feed_forward, layers
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


def describe_deepseek4(model: ModelFile, g: Geometry) -> None:
    # The three sorts of layers in llama.cpp (models/deepseek4.cpp): not compressed; a row for four
    # tokens, with an indexer; a row for 128 tokens.
    ratios = [(0, 4, 128)[index % 3] for index in range(g.layers)]
    streams = 4  # of hyper-connections; llama.cpp supports no other number
    mixes = (2 + streams) * streams
    groups = 2
    # If this equalled the width of the attention's keys, llama.cpp 0.6.0 would divide by zero: it
    # would look up the width of a cache that no layer of this model has.
    indexed = 2 * g.head_dim

    def compressor(name: str, width: int, ratio: int) -> None:
        wide = 2 * width if ratio == 4 else width  # blocks of four overlap
        model.matrix(f"{name}_kv.weight", wide, g.embedding)
        model.matrix(f"{name}_gate.weight", wide, g.embedding)
        model.uniform(f"{name}_ape.weight", -0.1, 0.1, ratio, wide)
        model.norm(f"{name}_norm.weight", width)

    def connection(name: str, outputs: int, scales: int) -> None:
        model.matrix(f"{name}_fn.weight", outputs, streams * g.embedding)
        model.uniform(f"{name}_base.weight", -0.1, 0.1, outputs)
        model.norm(f"{name}_scale.weight", scales)

    keys, name = model.keys, "deepseek4"
    keys.add_head_count(g.heads)
    keys.add_head_count_kv(1)
    keys.add_key_length(g.head_dim)
    keys.add_value_length(g.head_dim)
    keys.add_rope_dimension_count(g.head_dim // 2)
    keys.add_q_lora_rank(g.rank)
    keys.add_sliding_window(g.window)
    expert_keys(model, g)
    keys.add_expert_shared_count(1)
    keys.add_expert_weights_scale(1.0)
    keys.add_expert_weights_norm(True)
    keys.add_uint32(f"{name}.expert_gating_func", 4)  # the square root of softplus
    keys.add_swiglu_clamp_exp([0.0] * g.layers)
    keys.add_indexer_head_count(g.heads)
    keys.add_indexer_key_length(indexed)
    keys.add_indexer_top_k(g.window)
    keys.add_uint32(f"{name}.attention.output_group_count", groups)
    keys.add_uint32(f"{name}.attention.output_lora_rank", g.rank)
    keys.add_float32(f"{name}.attention.compress_rope_freq_base", 10000.0)
    keys.add_array(f"{name}.attention.compress_ratios", ratios)
    keys.add_uint32(f"{name}.hyper_connection.count", streams)
    keys.add_uint32(f"{name}.hyper_connection.sinkhorn_iterations", 2)
    keys.add_float32(f"{name}.hyper_connection.epsilon", 1e-6)
    keys.add_uint32(f"{name}.hash_layer_count", 0)
    model.norm("output_norm.weight", g.embedding)
    connection("output_hc", streams, 1)
    for layer, ratio in zip(layers(g), ratios, strict=True):
        model.norm(f"{layer}.attn_norm.weight", g.embedding)
        model.uniform(f"{layer}.attn_sinks.weight", -1.0, 1.0, g.heads)
        model.matrix(f"{layer}.attn_q_a.weight", g.rank, g.embedding)
        model.norm(f"{layer}.attn_q_a_norm.weight", g.rank)
        model.matrix(f"{layer}.attn_q_b.weight", g.heads * g.head_dim, g.rank)
        model.matrix(f"{layer}.attn_kv.weight", g.head_dim, g.embedding)
        model.norm(f"{layer}.attn_kv_a_norm.weight", g.head_dim)
        model.matrix(
            f"{layer}.attn_output_a.weight", groups * g.rank, g.heads * g.head_dim // groups
        )
        model.matrix(f"{layer}.attn_output_b.weight", g.embedding, groups * g.rank)
        connection(f"{layer}.hc_attn", mixes, 3)
        connection(f"{layer}.hc_ffn", mixes, 3)
        if ratio:
            compressor(f"{layer}.attn_compressor", g.head_dim, ratio)
        if ratio == 4:
            model.matrix(f"{layer}.indexer.proj.weight", g.heads, g.embedding)
            model.matrix(f"{layer}.indexer.attn_q_b.weight", g.heads * indexed, g.rank)
            compressor(f"{layer}.indexer_compressor", indexed, ratio)
        model.norm(f"{layer}.ffn_norm.weight", g.embedding)
        experts(model, g, layer)
        model.uniform(f"{layer}.exp_probs_b.bias", -0.1, 0.1, EXPERTS)
