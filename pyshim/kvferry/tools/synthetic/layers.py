"""Parts of models that several architectures have."""

from __future__ import annotations

from .geometry import Geometry
from .model_file import ModelFile


def describe_ends(model: ModelFile, g: Geometry) -> None:
    """Adds what every model has: sizes, the embedding, and the projection after the layers."""
    model.keys.add_context_length(g.context)
    model.keys.add_embedding_length(g.embedding)
    model.keys.add_block_count(g.layers)
    model.keys.add_feed_forward_length(g.feed_forward)
    model.keys.add_vocab_size(g.vocabulary)
    model.keys.add_layer_norm_rms_eps(1e-5)
    model.matrix("token_embd.weight", g.vocabulary, g.embedding)
    model.matrix("output.weight", g.vocabulary, g.embedding)


def feed_forward(model: ModelFile, g: Geometry, layer: str) -> None:
    model.norm(f"{layer}.ffn_norm.weight", g.embedding)
    model.matrix(f"{layer}.ffn_gate.weight", g.feed_forward, g.embedding)
    model.matrix(f"{layer}.ffn_up.weight", g.feed_forward, g.embedding)
    model.matrix(f"{layer}.ffn_down.weight", g.embedding, g.feed_forward)


def attention(model: ModelFile, g: Geometry, layer: str) -> None:
    model.matrix(f"{layer}.attn_q.weight", g.heads * g.head_dim, g.embedding)
    model.matrix(f"{layer}.attn_k.weight", g.kv_heads * g.head_dim, g.embedding)
    model.matrix(f"{layer}.attn_v.weight", g.kv_heads * g.head_dim, g.embedding)
    model.matrix(f"{layer}.attn_output.weight", g.embedding, g.heads * g.head_dim)


def attention_keys(model: ModelFile, g: Geometry, kv_heads: int | list[int]) -> None:
    model.keys.add_head_count(g.heads)
    model.keys.add_head_count_kv(kv_heads)
    model.keys.add_key_length(g.head_dim)
    model.keys.add_value_length(g.head_dim)
    model.keys.add_rope_dimension_count(g.head_dim)


def layers(g: Geometry) -> list[str]:
    return [f"blk.{index}" for index in range(g.layers)]


CONVOLUTION = 4  # length of the convolution before a recurrent layer, as in Mamba


def time_step_rank(g: Geometry) -> int:
    return max(1, g.embedding // 16)  # Mamba's own default


def recurrent_keys(model: ModelFile, g: Geometry) -> None:
    model.keys.add_ssm_conv_kernel(CONVOLUTION)
    model.keys.add_ssm_inner_size(2 * g.embedding)  # the only expansion that llama.cpp knows
    model.keys.add_ssm_state_size(g.state)
    model.keys.add_ssm_time_step_rank(time_step_rank(g))


def recurrent(model: ModelFile, g: Geometry, layer: str) -> None:
    inner, rank = 2 * g.embedding, time_step_rank(g)
    model.matrix(f"{layer}.ssm_in.weight", 2 * inner, g.embedding)
    model.uniform(f"{layer}.ssm_conv1d.weight", -0.5, 0.5, inner, CONVOLUTION)
    model.uniform(f"{layer}.ssm_conv1d.bias", -0.1, 0.1, inner)
    model.matrix(f"{layer}.ssm_x.weight", rank + 2 * g.state, inner)
    model.matrix(f"{layer}.ssm_dt.weight", inner, rank)
    # Steps of 0.01 to 0.1 after softplus, and Mamba's A = -(1 ... N): decay, never growth.
    model.uniform(f"{layer}.ssm_dt.bias", -4.6, -2.3, inner)
    model.constant(f"{layer}.ssm_a", [-float(n) for n in range(1, g.state + 1)], inner)
    model.norm(f"{layer}.ssm_d", inner)
    model.matrix(f"{layer}.ssm_out.weight", g.embedding, inner)


EXPERTS = 4


def expert_keys(model: ModelFile, g: Geometry) -> None:
    model.keys.add_expert_count(EXPERTS)
    model.keys.add_expert_used_count(2)
    model.keys.add_expert_feed_forward_length(g.feed_forward)


def experts(model: ModelFile, g: Geometry, layer: str) -> None:
    """Adds experts, of which each token uses two, and a shared expert that every token uses."""
    model.matrix(f"{layer}.ffn_gate_inp.weight", EXPERTS, g.embedding)
    model.matrix(f"{layer}.ffn_gate_exps.weight", EXPERTS, g.feed_forward, g.embedding)
    model.matrix(f"{layer}.ffn_up_exps.weight", EXPERTS, g.feed_forward, g.embedding)
    model.matrix(f"{layer}.ffn_down_exps.weight", EXPERTS, g.embedding, g.feed_forward)
    model.matrix(f"{layer}.ffn_gate_shexp.weight", g.feed_forward, g.embedding)
    model.matrix(f"{layer}.ffn_up_shexp.weight", g.feed_forward, g.embedding)
    model.matrix(f"{layer}.ffn_down_shexp.weight", g.embedding, g.feed_forward)
