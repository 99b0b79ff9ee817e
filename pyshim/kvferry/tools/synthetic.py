"""Small GGUF models with random weights, for the demonstration, the benchmarks and the tests.

Their text is noise, but their caches are those of the real architectures, and that is all that
saving and loading a sequence depends on.  There is one kind for each way in which llama.cpp keeps
the state of a sequence:

=============  ============  =====================================================================
kind           architecture  state of a sequence
=============  ============  =====================================================================
`llama`        llama         keys and values of every layer (grouped-query attention)
`gemma3`       gemma3        a cache for the global layers, and a smaller one for the layers that
                             see only a sliding window
`mamba`        mamba         one recurrent cell: every token overwrites it, its size is constant
`hybrid`       jamba         attention cache for one layer in two, recurrent cell for the others
`hybrid-iswa`  lfm2          sliding-window cache, and a recurrent cell whose second tensor is
                             empty; the cache of the global layers exists but has no layer
`deepseek2`    deepseek2     one latent row a token and layer, no values (MLA)
`deepseek32`   deepseek32    latent rows, and a second cache with the keys of the sparse indexer
`qwen2vl`      qwen2vl       as `llama`, with two more coordinates for every cell (M-RoPE)
`deepseek4`    deepseek4     latent rows of a sliding window, rows that stand for 4 or 128 tokens
                             each, and what is not yet a whole row; in sections of its own
`qwen4exp`     qwen4exp      attention cache with M-RoPE for one layer in two, recurrent cell for
                             the others, and a cache without M-RoPE for the keys of an indexer
=============  ============  =====================================================================

`qwen4exp-ngrams` is `qwen4exp` with a layer that looks up n-grams of tokens, and so has one more
recurrent row.

The models have no tokenizer (`tokenizer.ggml.model` is `none`): tokens are plain ids from 0 up to
`Geometry.vocabulary`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["GEOMETRIES", "KINDS", "Geometry", "write_model"]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of a model.  Every kind reads those that it has a use for.

    `vocabulary` and `context` count tokens, `window` the tokens that a sliding-window layer looks
    back, `state` the numbers that a recurrent layer keeps per channel, `rank` the numbers of a
    latent row; the others are widths in numbers or plain counts.
    """

    layers: int = 4
    embedding: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    feed_forward: int = 256
    vocabulary: int = 512
    context: int = 4096
    window: int = 32
    state: int = 16
    rank: int = 64

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token takes in an F16 cache where every layer attends, as in `llama`."""
        return self.layers * 2 * self.kv_heads * self.head_dim * 2


GEOMETRIES: dict[str, Geometry] = {
    "small": Geometry(),
    # Differs from "small" in the depth and in the width of every row: states do not fit each other.
    "other": Geometry(layers=6, embedding=192, heads=6, kv_heads=3, state=8, rank=96),
    # The cache of an 8B Llama, 128 KiB a token in rows of 2 KiB, with hardly any arithmetic.
    "demo": Geometry(
        layers=32,
        embedding=64,
        heads=8,
        kv_heads=8,
        head_dim=128,
        feed_forward=64,
        context=131072,
    ),
    # 1 MiB a token: a state of 1 GiB after 1024 tokens, for attention costs what tokens x bytes do.
    "bench": Geometry(
        layers=32,
        embedding=32,
        heads=64,
        kv_heads=64,
        head_dim=128,
        feed_forward=32,
        context=131072,
    ),
}
"""Named geometries; "demo" and "bench" are meant for the `llama` kind.

With one thread of a cloud machine (EPYC, AVX-512, llama.cpp b10361) a token of a "small" model
takes 0.2 to 0.5 ms.  A prompt of "demo" takes 0.9 s for 512 tokens (64 MiB) and 9 s for 2048
(256 MiB), one of "bench" 1.8 s for 256 tokens (256 MiB) and 18 s for 1024 (1 GiB).
"""


class _ModelFile:
    """A GGUF file that is being put together, and the random numbers for its tensors."""

    def __init__(self, gguf: ModuleType, path: Path, architecture: str, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._gguf: Any = gguf
        # The module is imported late, only where a model is written, and so has no type here.
        self.keys: Any = gguf.GGUFWriter(path, architecture)
        self.keys.add_name(f"synthetic-{architecture}")
        self.keys.add_tokenizer_model("none")

    def wide_numbers(self, key: str, values: list[int]) -> None:
        """An array of 64 bits each; the writer's own arrays have 32."""
        types = self._gguf.GGUFValueType
        self.keys.add_key_value(key, values, types.ARRAY, sub_type=types.UINT64)

    def matrix(self, name: str, *shape: int) -> None:
        """Random F16 weights, the contracted dimension last: activations keep their magnitude."""
        values = self._random.standard_normal(shape, dtype=np.float32)
        self.keys.add_tensor(name, (values / shape[-1] ** 0.5).astype(np.float16))

    def uniform(self, name: str, low: float, high: float, *shape: int) -> None:
        """Random F32 numbers between two bounds, for what llama.cpp wants in F32."""
        values = self._random.uniform(low, high, shape)
        self.keys.add_tensor(name, values.astype(np.float32))

    def constant(self, name: str, row: list[float], rows: int) -> None:
        """The same F32 row again and again."""
        self.keys.add_tensor(name, np.tile(np.array(row, np.float32), (rows, 1)))

    def norm(self, name: str, width: int) -> None:
        self.keys.add_tensor(name, np.ones(width, np.float32))

    def write(self) -> None:
        self.keys.write_header_to_file()
        self.keys.write_kv_data_to_file()
        self.keys.write_tensors_to_file(progress=False)
        self.keys.close()


def write_model(
    kind: str,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    geometry: str | Geometry = "small",
    **sizes: int,
) -> Path:
    """Write a model of `kind` to `path` and return the path.

    `geometry` is one of `GEOMETRIES` or a `Geometry`; `sizes` replace single fields of it.  The
    same arguments give the same file; another `seed` gives other weights in the same layout: a
    model whose states fit but mean something else.

    Raises ValueError for an unknown kind, geometry or size, and ImportError without the gguf
    package.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of model {kind!r}; there are {', '.join(KINDS)}")
    if isinstance(geometry, str):
        if geometry not in GEOMETRIES:
            raise ValueError(f"unknown geometry {geometry!r}; there are {', '.join(GEOMETRIES)}")
        geometry = GEOMETRIES[geometry]
    unknown = sizes.keys() - {field.name for field in dataclasses.fields(Geometry)}
    if unknown:
        raise ValueError(f"unknown sizes: {', '.join(sorted(unknown))}")
    geometry = dataclasses.replace(geometry, **sizes)

    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "writing a synthetic model needs the gguf package: pip install gguf"
        ) from error

    architecture, describe = KINDS[kind]
    path = Path(path)
    # A reader must never see half a model, so that an interrupted run leaves nothing to be reused.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        model = _ModelFile(gguf, partial, architecture, seed)
        _describe_ends(model, geometry)
        describe(model, geometry)
        model.write()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _describe_ends(model: _ModelFile, g: Geometry) -> None:
    """What every model has: its sizes, the embedding before and the projection after the layers."""
    model.keys.add_context_length(g.context)
    model.keys.add_embedding_length(g.embedding)
    model.keys.add_block_count(g.layers)
    model.keys.add_feed_forward_length(g.feed_forward)
    model.keys.add_vocab_size(g.vocabulary)
    model.keys.add_layer_norm_rms_eps(1e-5)
    model.matrix("token_embd.weight", g.vocabulary, g.embedding)
    model.matrix("output.weight", g.vocabulary, g.embedding)


def _feed_forward(model: _ModelFile, g: Geometry, layer: str) -> None:
    model.norm(f"{layer}.ffn_norm.weight", g.embedding)
    model.matrix(f"{layer}.ffn_gate.weight", g.feed_forward, g.embedding)
    model.matrix(f"{layer}.ffn_up.weight", g.feed_forward, g.embedding)
    model.matrix(f"{layer}.ffn_down.weight", g.embedding, g.feed_forward)


def _attention(model: _ModelFile, g: Geometry, layer: str) -> None:
    model.matrix(f"{layer}.attn_q.weight", g.heads * g.head_dim, g.embedding)
    model.matrix(f"{layer}.attn_k.weight", g.kv_heads * g.head_dim, g.embedding)
    model.matrix(f"{layer}.attn_v.weight", g.kv_heads * g.head_dim, g.embedding)
    model.matrix(f"{layer}.attn_output.weight", g.embedding, g.heads * g.head_dim)


def _attention_keys(model: _ModelFile, g: Geometry, kv_heads: int | list[int]) -> None:
    model.keys.add_head_count(g.heads)
    model.keys.add_head_count_kv(kv_heads)
    model.keys.add_key_length(g.head_dim)
    model.keys.add_value_length(g.head_dim)
    model.keys.add_rope_dimension_count(g.head_dim)


def _layers(g: Geometry) -> list[str]:
    return [f"blk.{index}" for index in range(g.layers)]


def _describe_llama(model: _ModelFile, g: Geometry) -> None:
    _attention_keys(model, g, g.kv_heads)
    model.norm("output_norm.weight", g.embedding)
    for layer in _layers(g):
        model.norm(f"{layer}.attn_norm.weight", g.embedding)
        _attention(model, g, layer)
        _feed_forward(model, g, layer)


def _describe_qwen2vl(model: _ModelFile, g: Geometry) -> None:
    # qwen2vl has no key for the head's width: its heads share the embedding among them.
    head_dim = g.embedding // g.heads
    g = dataclasses.replace(g, head_dim=head_dim)
    _describe_llama(model, g)
    for layer in _layers(g):  # as its models have; b8179 reads them without asking
        model.uniform(f"{layer}.attn_q.bias", -0.1, 0.1, g.heads * head_dim)
        model.uniform(f"{layer}.attn_k.bias", -0.1, 0.1, g.kv_heads * head_dim)
        model.uniform(f"{layer}.attn_v.bias", -0.1, 0.1, g.kv_heads * head_dim)
    # Rotated pairs for time, height and width; together half the head.
    eighth = head_dim // 8
    model.keys.add_rope_dimension_sections([head_dim // 2 - 2 * eighth, eighth, eighth, 0])


def _describe_gemma3(model: _ModelFile, g: Geometry) -> None:
    _attention_keys(model, g, g.kv_heads)
    model.keys.add_sliding_window(g.window)
    # Every second layer is global, so that both caches have layers even in the smallest model.
    model.keys.add_sliding_window_pattern(2)
    model.norm("output_norm.weight", g.embedding)
    for layer in _layers(g):
        model.norm(f"{layer}.attn_norm.weight", g.embedding)
        _attention(model, g, layer)
        model.norm(f"{layer}.attn_q_norm.weight", g.head_dim)
        model.norm(f"{layer}.attn_k_norm.weight", g.head_dim)
        model.norm(f"{layer}.post_attention_norm.weight", g.embedding)
        _feed_forward(model, g, layer)
        model.norm(f"{layer}.post_ffw_norm.weight", g.embedding)


_CONVOLUTION = 4  # taps of the convolution in front of a recurrent layer, as in Mamba


def _time_step_rank(g: Geometry) -> int:
    return max(1, g.embedding // 16)  # Mamba's own default


def _recurrent_keys(model: _ModelFile, g: Geometry) -> None:
    model.keys.add_ssm_conv_kernel(_CONVOLUTION)
    model.keys.add_ssm_inner_size(2 * g.embedding)  # the only expansion that llama.cpp knows
    model.keys.add_ssm_state_size(g.state)
    model.keys.add_ssm_time_step_rank(_time_step_rank(g))


def _recurrent(model: _ModelFile, g: Geometry, layer: str) -> None:
    inner, rank = 2 * g.embedding, _time_step_rank(g)
    model.matrix(f"{layer}.ssm_in.weight", 2 * inner, g.embedding)
    model.uniform(f"{layer}.ssm_conv1d.weight", -0.5, 0.5, inner, _CONVOLUTION)
    model.uniform(f"{layer}.ssm_conv1d.bias", -0.1, 0.1, inner)
    model.matrix(f"{layer}.ssm_x.weight", rank + 2 * g.state, inner)
    model.matrix(f"{layer}.ssm_dt.weight", inner, rank)
    # Steps of 0.01 to 0.1 after softplus, and Mamba's A = -(1 ... N): decay, never growth.
    model.uniform(f"{layer}.ssm_dt.bias", -4.6, -2.3, inner)
    model.constant(f"{layer}.ssm_a", [-float(n) for n in range(1, g.state + 1)], inner)
    model.norm(f"{layer}.ssm_d", inner)
    model.matrix(f"{layer}.ssm_out.weight", g.embedding, inner)


def _describe_mamba(model: _ModelFile, g: Geometry) -> None:
    _recurrent_keys(model, g)
    model.norm("output_norm.weight", g.embedding)
    for layer in _layers(g):
        model.norm(f"{layer}.attn_norm.weight", g.embedding)
        _recurrent(model, g, layer)


def _kv_heads_per_layer(g: Geometry) -> list[int]:
    """No key-value heads marks a recurrent layer; every second layer attends."""
    return [g.kv_heads if index % 2 else 0 for index in range(g.layers)]


def _describe_jamba(model: _ModelFile, g: Geometry) -> None:
    g = dataclasses.replace(g, head_dim=g.embedding // g.heads)  # heads share the embedding
    kv_heads = _kv_heads_per_layer(g)
    _attention_keys(model, g, kv_heads)
    _recurrent_keys(model, g)
    model.norm("output_norm.weight", g.embedding)
    for layer, attends in zip(_layers(g), kv_heads, strict=True):
        model.norm(f"{layer}.attn_norm.weight", g.embedding)
        if attends:
            _attention(model, g, layer)
        else:
            _recurrent(model, g, layer)
            model.norm(f"{layer}.ssm_dt_norm.weight", _time_step_rank(g))
            model.norm(f"{layer}.ssm_b_norm.weight", g.state)
            model.norm(f"{layer}.ssm_c_norm.weight", g.state)
        _feed_forward(model, g, layer)


def _describe_lfm2(model: _ModelFile, g: Geometry) -> None:
    g = dataclasses.replace(g, head_dim=g.embedding // g.heads)  # heads share the embedding
    kv_heads = _kv_heads_per_layer(g)
    _attention_keys(model, g, kv_heads)
    model.keys.add_sliding_window(g.window)
    model.keys.add_shortconv_l_cache(3)
    model.norm("token_embd_norm.weight", g.embedding)  # lfm2's name for the last norm
    for layer, attends in zip(_layers(g), kv_heads, strict=True):
        model.norm(f"{layer}.attn_norm.weight", g.embedding)
        if attends:
            _attention(model, g, layer)
            model.norm(f"{layer}.attn_q_norm.weight", g.head_dim)
            model.norm(f"{layer}.attn_k_norm.weight", g.head_dim)
        else:
            model.uniform(f"{layer}.shortconv.conv.weight", -0.5, 0.5, g.embedding, 3)
            model.matrix(f"{layer}.shortconv.in_proj.weight", 3 * g.embedding, g.embedding)
            model.matrix(f"{layer}.shortconv.out_proj.weight", g.embedding, g.embedding)
        _feed_forward(model, g, layer)


def _latent_attention(model: _ModelFile, g: Geometry) -> None:
    """Keys and tensors of multi-head latent attention, all layers dense."""
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
    for layer in _layers(g):
        model.norm(f"{layer}.attn_norm.weight", g.embedding)
        model.matrix(f"{layer}.attn_q_a.weight", g.rank, g.embedding)
        model.norm(f"{layer}.attn_q_a_norm.weight", g.rank)
        model.matrix(f"{layer}.attn_q_b.weight", g.heads * g.head_dim, g.rank)
        model.matrix(f"{layer}.attn_kv_a_mqa.weight", g.rank + rotated, g.embedding)
        model.norm(f"{layer}.attn_kv_a_norm.weight", g.rank)
        model.matrix(f"{layer}.attn_k_b.weight", g.heads, g.rank, g.head_dim - rotated)
        model.matrix(f"{layer}.attn_v_b.weight", g.heads, g.head_dim, g.rank)
        model.matrix(f"{layer}.attn_output.weight", g.embedding, g.heads * g.head_dim)
        _feed_forward(model, g, layer)


def _describe_deepseek2(model: _ModelFile, g: Geometry) -> None:
    _latent_attention(model, g)


def _describe_deepseek32(model: _ModelFile, g: Geometry) -> None:
    _latent_attention(model, g)
    # llama.cpp takes half of the indexer's key for rotated (models/deepseek32.cpp: indexer_k_nope
    # starts after n_embd_indexer_head_nope numbers), and rotates as many as in the latent row.
    heads, key_length = g.heads, g.head_dim
    model.keys.add_indexer_head_count(heads)
    model.keys.add_indexer_key_length(key_length)
    model.keys.add_indexer_top_k(g.window)
    model.keys.add_uint32("deepseek32.expert_gating_func", 2)  # sigmoid; required, unused
    for layer in _layers(g):
        model.norm(f"{layer}.indexer.k_norm.weight", key_length)
        model.uniform(f"{layer}.indexer.k_norm.bias", -0.1, 0.1, key_length)
        model.matrix(f"{layer}.indexer.proj.weight", heads, g.embedding)
        model.matrix(f"{layer}.indexer.attn_k.weight", key_length, g.embedding)
        model.matrix(f"{layer}.indexer.attn_q_b.weight", heads * key_length, g.rank)


_EXPERTS = 4


def _expert_keys(model: _ModelFile, g: Geometry) -> None:
    model.keys.add_expert_count(_EXPERTS)
    model.keys.add_expert_used_count(2)
    model.keys.add_expert_feed_forward_length(g.feed_forward)


def _experts(model: _ModelFile, g: Geometry, layer: str) -> None:
    """Experts of whom a token asks two, and one whom every token asks."""
    model.matrix(f"{layer}.ffn_gate_inp.weight", _EXPERTS, g.embedding)
    model.matrix(f"{layer}.ffn_gate_exps.weight", _EXPERTS, g.feed_forward, g.embedding)
    model.matrix(f"{layer}.ffn_up_exps.weight", _EXPERTS, g.feed_forward, g.embedding)
    model.matrix(f"{layer}.ffn_down_exps.weight", _EXPERTS, g.embedding, g.feed_forward)
    model.matrix(f"{layer}.ffn_gate_shexp.weight", g.feed_forward, g.embedding)
    model.matrix(f"{layer}.ffn_up_shexp.weight", g.feed_forward, g.embedding)
    model.matrix(f"{layer}.ffn_down_shexp.weight", g.embedding, g.feed_forward)


def _describe_deepseek4(model: _ModelFile, g: Geometry) -> None:
    # Layers of the three sorts that llama.cpp knows (models/deepseek4.cpp): none compressed, one
    # row for every four tokens with an indexer, one row for every 128.
    ratios = [(0, 4, 128)[index % 3] for index in range(g.layers)]
    streams = 4  # of hyper-connections: no other number is supported
    mixes = (2 + streams) * streams
    groups = 2
    # As wide as the keys of the attention, llama.cpp 0.6.0 would divide by zero: it looks for the
    # width of a cache that no layer of this model has.
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
    _expert_keys(model, g)
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
    for layer, ratio in zip(_layers(g), ratios, strict=True):
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
        _experts(model, g, layer)
        model.uniform(f"{layer}.exp_probs_b.bias", -0.1, 0.1, _EXPERTS)


def _describe_qwen4exp(model: _ModelFile, g: Geometry) -> None:
    # Every second layer attends, with an indexer over blocks of four cells; the others are
    # recurrent.
    recurrent = [index % 2 == 0 for index in range(g.layers)]
    streams, low_rank, key_heads, value_heads = 4, 8, 2, 4
    wide = streams * g.embedding
    key_width, value_width = key_heads * g.state, value_heads * g.state

    def connection(name: str, *, injects: bool = True) -> None:
        model.norm(f"{name}_norm.weight", wide)
        model.matrix(f"{name}_down.weight", low_rank, wide)
        model.matrix(f"{name}_up.weight", wide, low_rank)
        if injects:
            model.matrix(f"{name}_inject.weight", streams, wide)

    keys, name = model.keys, "qwen4exp"
    _attention_keys(model, g, g.kv_heads)
    eighth = g.head_dim // 8  # rotated pairs, as for qwen2vl
    keys.add_rope_dimension_sections([g.head_dim // 2 - 2 * eighth, eighth, eighth, 0])
    _expert_keys(model, g)
    keys.add_expert_shared_feed_forward_length(g.feed_forward)
    keys.add_ssm_conv_kernel(_CONVOLUTION)
    keys.add_ssm_inner_size(value_width)
    keys.add_ssm_state_size(g.state)
    keys.add_ssm_time_step_rank(value_heads)
    keys.add_ssm_group_count(key_heads)
    keys.add_full_attention_interval(2)
    keys.add_uint32(f"{name}.hyper_connection.count", streams)
    keys.add_uint32(f"{name}.hyper_connection.low_rank", low_rank)
    keys.add_indexer_head_count(g.heads)
    keys.add_indexer_key_length(g.head_dim)
    keys.add_indexer_top_k(g.window)
    keys.add_array(f"{name}.attention.compress_ratios", [0 if each else 4 for each in recurrent])
    connection("output_hc", injects=False)
    for layer, is_recurrent in zip(_layers(g), recurrent, strict=True):
        connection(f"{layer}.hc_attn")
        connection(f"{layer}.hc_ffn")
        if is_recurrent:
            both = 2 * key_width + value_width
            model.matrix(f"{layer}.attn_qkv.weight", both, g.embedding)
            model.matrix(f"{layer}.attn_gate.weight", value_width, g.embedding)
            model.uniform(f"{layer}.ssm_conv1d.weight", -0.5, 0.5, both, _CONVOLUTION)
            model.uniform(f"{layer}.ssm_dt.bias", -4.6, -2.3, value_heads)
            model.uniform(f"{layer}.ssm_a", -4.0, -1.0, value_heads)
            model.matrix(f"{layer}.ssm_beta.weight", value_heads, g.embedding)
            model.matrix(f"{layer}.ssm_alpha.weight", value_heads, g.embedding)
            model.norm(f"{layer}.ssm_norm.weight", g.state)
            model.matrix(f"{layer}.ssm_out.weight", g.embedding, value_width)
        else:
            # A gate lies beside each head of the queries.
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
        _experts(model, g, layer)
        model.uniform(f"{layer}.ffn_gate_inp_shexp.weight", -0.1, 0.1, g.embedding)


def _describe_qwen4exp_ngrams(model: _ModelFile, g: Geometry) -> None:
    _describe_qwen4exp(model, g)
    # The first layer, a recurrent one, looks up n-grams of tokens.
    layer, name, keys = "blk.0", "qwen4exp", model.keys
    grams, heads_per_gram, rows = 3, 2, 64  # rows of a head
    heads = (grams - 1) * heads_per_gram
    head_dim, wide = g.embedding // heads, 4 * g.embedding
    keys.add_array(f"{name}.ple.layers", [0])
    keys.add_uint32(f"{name}.ple.ngram_size", grams)
    keys.add_uint32(f"{name}.ple.heads_per_ngram", heads_per_gram)
    keys.add_uint32(f"{name}.ple.conv_kernel", _CONVOLUTION)
    keys.add_uint32(f"{name}.ple.eos_token_id", 0)
    keys.add_uint32(f"{name}.embedding_length_per_layer_input", head_dim)
    model.wide_numbers(f"{name}.ple.layer_multipliers", [3, 5, 7])
    model.wide_numbers(f"{name}.ple.head_offsets", [rows * head for head in range(heads)])
    model.wide_numbers(f"{name}.ple.head_vocab_sizes", [rows - 1] * heads)
    model.matrix("per_layer_token_embd.weight", rows * heads, head_dim)
    model.matrix(f"{layer}.ple_key.weight", wide, g.embedding)
    model.matrix(f"{layer}.ple_value.weight", g.embedding, g.embedding)
    model.uniform(f"{layer}.ple_conv1d.weight", -0.5, 0.5, wide, _CONVOLUTION)
    for norm in ("key", "query", "conv"):
        model.norm(f"{layer}.ple_norm_{norm}.weight", wide)


KINDS: dict[str, tuple[str, Callable[[_ModelFile, Geometry], None]]] = {
    "llama": ("llama", _describe_llama),
    "gemma3": ("gemma3", _describe_gemma3),
    "mamba": ("mamba", _describe_mamba),
    "hybrid": ("jamba", _describe_jamba),
    "hybrid-iswa": ("lfm2", _describe_lfm2),
    "deepseek2": ("deepseek2", _describe_deepseek2),
    "deepseek32": ("deepseek32", _describe_deepseek32),
    "deepseek4": ("deepseek4", _describe_deepseek4),
    "qwen2vl": ("qwen2vl", _describe_qwen2vl),
    "qwen4exp": ("qwen4exp", _describe_qwen4exp),
    "qwen4exp-ngrams": ("qwen4exp", _describe_qwen4exp_ngrams),
}
"""For each kind the architecture's name in llama.cpp, and what describes it."""
