"""A model with a tokenizer, whose tokens are bytes.

The synthetic models have no tokenizer, and llama_cpp.Llama.tokenize needs one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from kvferry.tools.synthetic import write_model

_SPECIAL = [
    ("<unk>", gguf.TokenType.UNKNOWN),
    ("<s>", gguf.TokenType.CONTROL),
    ("</s>", gguf.TokenType.CONTROL),
]


def write_text_model(path: Path, kind: str = "llama", **arguments: Any) -> Path:
    """Writes a synthetic model with a SentencePiece tokenizer; returns the path. The arguments are
    those of `write_model`."""
    bare = write_model(kind, path.with_suffix(".bare"), **arguments)
    reader = gguf.GGUFReader(bare)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in (
            "general.architecture",
            "tokenizer.ggml.model",
        ):
            continue  # the writer writes these itself, or below
        item = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=item)
    embedding = next(each for each in reader.tensors if each.name == "token_embd.weight")
    tokens = [
        *_SPECIAL,
        *((f"<0x{byte:02X}>", gguf.TokenType.BYTE) for byte in range(256)),
    ]
    # As many as the embedding has rows; the rest is never met.
    tokens += [
        (f"<unused{index}>", gguf.TokenType.UNUSED)
        for index in range(int(embedding.shape[1]) - len(tokens))
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([kind for _, kind in tokens])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    bare.unlink()
    return path
