"""Small GGUF models with random weights, for the demonstration, the benchmarks and the tests.

Their text is noise, but their caches are those of the real architectures, and saving and loading a
sequence depends on nothing else. There is one kind for each way in which llama.cpp keeps the state
of a sequence:

=============  ============  =====================================================================
kind           architecture  state of a sequence
=============  ============  =====================================================================
`llama`        llama         keys and values of every layer (grouped-query attention).
`gemma3`       gemma3        a cache for the global layers, and a smaller one for the layers that
                             see only a sliding window.
`mamba`        mamba         one recurrent cell: every token overwrites it, its size is constant.
`hybrid`       jamba         attention cache for one layer in two, recurrent cell for the others.
`hybrid-iswa`  lfm2          sliding-window cache, and a recurrent cell whose second tensor is
                             empty; the cache of the global layers exists but has no layer.
`deepseek2`    deepseek2     one latent row for each token and layer, no values (MLA).
`deepseek32`   deepseek32    latent rows, and a second cache with the keys of the sparse indexer.
`qwen2vl`      qwen2vl       as `llama`, with two more coordinates for every cell (M-RoPE).
`deepseek4`    deepseek4     latent rows of a sliding window, rows for 4 or 128 tokens each, and
                             rows that are not complete; the state has sections of its own.
`qwen4exp`     qwen4exp      attention cache with M-RoPE for one layer in two, recurrent cell for
                             the others, and a cache without M-RoPE for the keys of an indexer.
=============  ============  =====================================================================

`qwen4exp-ngrams` is `qwen4exp` with a layer that looks up n-grams of tokens, and therefore has one
more recurrent row.

The models have no tokenizer (`tokenizer.ggml.model` is `none`): tokens are plain ids from 0 up to
`Geometry.vocabulary`.
"""

from .geometry import GEOMETRIES, Geometry
from .kinds import KINDS
from .writing import write_model

__all__ = ["GEOMETRIES", "KINDS", "Geometry", "write_model"]
