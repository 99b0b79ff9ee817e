"""The architecture of DeepSeek-V4: compressed rows, indexers and hyper-connections."""

from __future__ import annotations

from .geometry import Geometry
from .layers import EXPERTS, expert_keys, experts, layers
from .model_file import ModelFile

_STREAMS = 4  # of hyper-connections; llama.cpp supports no other number
_MIXES = (2 + _STREAMS) * _STREAMS
_GROUPS = 2


def describe_deepseek4(model: ModelFile, g: Geometry) -> None:
    # The three sorts of layers in llama.cpp (models/deepseek4.cpp): not compressed; a row for four
    # tokens, with an indexer; a row for 128 tokens.
    ratios = [(0, 4, 128)[index % 3] for index in range(g.layers)]
    _add_keys(model, g, ratios)
    model.norm("output_norm.weight", g.embedding)
    _connection(model, g, "output_hc", _STREAMS, 1)
    for layer, ratio in zip(layers(g), ratios, strict=True):
        _add_layer(model, g, layer, ratio)


def _indexer_key_length(g: Geometry) -> int:
    # If this equalled the width of the attention's keys, llama.cpp 0.6.0 would divide by zero: it
    # would look up the width of a cache that no layer of this model has.
    return 2 * g.head_dim


def _add_keys(model: ModelFile, g: Geometry, ratios: list[int]) -> None:
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
    keys.add_indexer_key_length(_indexer_key_length(g))
    keys.add_indexer_top_k(g.window)
    keys.add_uint32(f"{name}.attention.output_group_count", _GROUPS)
    keys.add_uint32(f"{name}.attention.output_lora_rank", g.rank)
    keys.add_float32(f"{name}.attention.compress_rope_freq_base", 10000.0)
    keys.add_array(f"{name}.attention.compress_ratios", ratios)
    keys.add_uint32(f"{name}.hyper_connection.count", _STREAMS)
    keys.add_uint32(f"{name}.hyper_connection.sinkhorn_iterations", 2)
    keys.add_float32(f"{name}.hyper_connection.epsilon", 1e-6)
    keys.add_uint32(f"{name}.hash_layer_count", 0)


def _add_layer(model: ModelFile, g: Geometry, layer: str, ratio: int) -> None:
    model.norm(f"{layer}.attn_norm.weight", g.embedding)
    model.uniform(f"{layer}.attn_sinks.weight", -1.0, 1.0, g.heads)
    model.matrix(f"{layer}.attn_q_a.weight", g.rank, g.embedding)
    model.norm(f"{layer}.attn_q_a_norm.weight", g.rank)
    model.matrix(f"{layer}.attn_q_b.weight", g.heads * g.head_dim, g.rank)
    model.matrix(f"{layer}.attn_kv.weight", g.head_dim, g.embedding)
    model.norm(f"{layer}.attn_kv_a_norm.weight", g.head_dim)
    model.matrix(f"{layer}.attn_output_a.weight", _GROUPS * g.rank, g.heads * g.head_dim // _GROUPS)
    model.matrix(f"{layer}.attn_output_b.weight", g.embedding, _GROUPS * g.rank)
    _connection(model, g, f"{layer}.hc_attn", _MIXES, 3)
    _connection(model, g, f"{layer}.hc_ffn", _MIXES, 3)
    if ratio:
        _compressor(model, g, f"{layer}.attn_compressor", g.head_dim, ratio)
    if ratio == 4:
        indexed = _indexer_key_length(g)
        model.matrix(f"{layer}.indexer.proj.weight", g.heads, g.embedding)
        model.matrix(f"{layer}.indexer.attn_q_b.weight", g.heads * indexed, g.rank)
        _compressor(model, g, f"{layer}.indexer_compressor", indexed, ratio)
    model.norm(f"{layer}.ffn_norm.weight", g.embedding)
    experts(model, g, layer)
    model.uniform(f"{layer}.exp_probs_b.bias", -0.1, 0.1, EXPERTS)


def _compressor(model: ModelFile, g: Geometry, name: str, width: int, ratio: int) -> None:
    wide = 2 * width if ratio == 4 else width  # blocks of four overlap
    model.matrix(f"{name}_kv.weight", wide, g.embedding)
    model.matrix(f"{name}_gate.weight", wide, g.embedding)
    model.uniform(f"{name}_ape.weight", -0.1, 0.1, ratio, wide)
    model.norm(f"{name}_norm.weight", width)


def _connection(model: ModelFile, g: Geometry, name: str, outputs: int, scales: int) -> None:
    model.matrix(f"{name}_fn.weight", outputs, _STREAMS * g.embedding)
    model.uniform(f"{name}_base.weight", -0.1, 0.1, outputs)
    model.norm(f"{name}_scale.weight", scales)
