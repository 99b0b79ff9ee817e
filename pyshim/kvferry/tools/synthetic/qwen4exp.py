"""The architecture qwen4exp."""

from __future__ import annotations

from .geometry import Geometry
from .layers import CONVOLUTION, attention_keys, expert_keys, experts, layers
from .model_file import ModelFile

_STREAMS, _LOW_RANK = 4, 8  # of hyper-connections
_KEY_HEADS, _VALUE_HEADS = 2, 4  # of recurrent layers


def describe_qwen4exp(model: ModelFile, g: Geometry) -> None:
    # Every second layer attends, with an indexer for blocks of four cells; others are recurrent.
    recurrent = [index % 2 == 0 for index in range(g.layers)]
    _add_keys(model, g, recurrent)
    _connection(model, g, "output_hc", injects=False)
    for layer, is_recurrent in zip(layers(g), recurrent, strict=True):
        _connection(model, g, f"{layer}.hc_attn")
        _connection(model, g, f"{layer}.hc_ffn")
        if is_recurrent:
            _add_recurrence(model, g, layer)
        else:
            _add_attention(model, g, layer)
        experts(model, g, layer)
        model.uniform(f"{layer}.ffn_gate_inp_shexp.weight", -0.1, 0.1, g.embedding)


def _add_keys(model: ModelFile, g: Geometry, recurrent: list[bool]) -> None:
    keys, name = model.keys, "qwen4exp"
    attention_keys(model, g, g.kv_heads)
    eighth = g.head_dim // 8  # rotated pairs, as for qwen2vl
    keys.add_rope_dimension_sections([g.head_dim // 2 - 2 * eighth, eighth, eighth, 0])
    expert_keys(model, g)
    keys.add_expert_shared_feed_forward_length(g.feed_forward)
    keys.add_ssm_conv_kernel(CONVOLUTION)
    keys.add_ssm_inner_size(_VALUE_HEADS * g.state)
    keys.add_ssm_state_size(g.state)
    keys.add_ssm_time_step_rank(_VALUE_HEADS)
    keys.add_ssm_group_count(_KEY_HEADS)
    keys.add_full_attention_interval(2)
    keys.add_uint32(f"{name}.hyper_connection.count", _STREAMS)
    keys.add_uint32(f"{name}.hyper_connection.low_rank", _LOW_RANK)
    keys.add_indexer_head_count(g.heads)
    keys.add_indexer_key_length(g.head_dim)
    keys.add_indexer_top_k(g.window)
    keys.add_array(f"{name}.attention.compress_ratios", [0 if each else 4 for each in recurrent])


def _connection(model: ModelFile, g: Geometry, name: str, *, injects: bool = True) -> None:
    wide = _STREAMS * g.embedding
    model.norm(f"{name}_norm.weight", wide)
    model.matrix(f"{name}_down.weight", _LOW_RANK, wide)
    model.matrix(f"{name}_up.weight", wide, _LOW_RANK)
    if injects:
        model.matrix(f"{name}_inject.weight", _STREAMS, wide)


def _add_recurrence(model: ModelFile, g: Geometry, layer: str) -> None:
    key_width, value_width = _KEY_HEADS * g.state, _VALUE_HEADS * g.state
    both = 2 * key_width + value_width
    model.matrix(f"{layer}.attn_qkv.weight", both, g.embedding)
    model.matrix(f"{layer}.attn_gate.weight", value_width, g.embedding)
    model.uniform(f"{layer}.ssm_conv1d.weight", -0.5, 0.5, both, CONVOLUTION)
    model.uniform(f"{layer}.ssm_dt.bias", -4.6, -2.3, _VALUE_HEADS)
    model.uniform(f"{layer}.ssm_a", -4.0, -1.0, _VALUE_HEADS)
    model.matrix(f"{layer}.ssm_beta.weight", _VALUE_HEADS, g.embedding)
    model.matrix(f"{layer}.ssm_alpha.weight", _VALUE_HEADS, g.embedding)
    model.norm(f"{layer}.ssm_norm.weight", g.state)
    model.matrix(f"{layer}.ssm_out.weight", g.embedding, value_width)


def _add_attention(model: ModelFile, g: Geometry, layer: str) -> None:
    # Each head of the queries has a gate beside it.
    model.matrix(f"{layer}.attn_q.weight", 2 * g.heads * g.head_dim, g.embedding)
    model.matrix(f"{layer}.attn_k.weight", g.kv_heads * g.head_dim, g.embedding)
    model.matrix(f"{layer}.attn_v.weight", g.kv_heads * g.head_dim, g.embedding)
    model.matrix(f"{layer}.attn_output.weight", g.embedding, g.heads * g.head_dim)
    model.norm(f"{layer}.attn_q_norm.weight", g.head_dim)
    model.norm(f"{layer}.attn_k_norm.weight", g.head_dim)
    model.matrix(f"{layer}.indexer.q_proj.weight", g.heads * g.head_dim, g.embedding)
    model.matrix(f"{layer}.indexer.k_proj.weight", g.head_dim, g.embedding)
    model.norm(f"{layer}.indexer.q_norm.weight", g.head_dim)
    model.norm(f"{layer}.indexer.k_norm.weight", g.head_dim)


def describe_qwen4exp_ngrams(model: ModelFile, g: Geometry) -> None:
    describe_qwen4exp(model, g)
    # The first layer, a recurrent one, looks up n-grams of tokens.
    layer, name, keys = "blk.0", "qwen4exp", model.keys
    grams, heads_per_gram, rows = 3, 2, 64  # rows of a head
    heads = (grams - 1) * heads_per_gram
    head_dim, wide = g.embedding // heads, 4 * g.embedding
    keys.add_array(f"{name}.ple.layers", [0])
    keys.add_uint32(f"{name}.ple.ngram_size", grams)
    keys.add_uint32(f"{name}.ple.heads_per_ngram", heads_per_gram)
    keys.add_uint32(f"{name}.ple.conv_kernel", CONVOLUTION)
    keys.add_uint32(f"{name}.ple.eos_token_id", 0)
    keys.add_uint32(f"{name}.embedding_length_per_layer_input", head_dim)
    model.wide_numbers(f"{name}.ple.layer_multipliers", [3, 5, 7])
    model.wide_numbers(f"{name}.ple.head_offsets", [rows * head for head in range(heads)])
    model.wide_numbers(f"{name}.ple.head_vocab_sizes", [rows - 1] * heads)
    model.matrix("per_layer_token_embd.weight", rows * heads, head_dim)
    model.matrix(f"{layer}.ple_key.weight", wide, g.embedding)
    model.matrix(f"{layer}.ple_value.weight", g.embedding, g.embedding)
    model.uniform(f"{layer}.ple_conv1d.weight", -0.5, 0.5, wide, CONVOLUTION)
    for norm in ("key", "query", "conv"):
        model.norm(f"{layer}.ple_norm_{norm}.weight", wide)
