"""Models and contexts of a loaded libllama."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import LlamaError
from .library import Libllama
from .parameters import CACHE_TYPES, CacheType


class Model:
    """A loaded model. Close it after its contexts, or use ``with``."""

    def __init__(self, library: Libllama, path: str | os.PathLike[str], *, gpu: bool) -> None:
        """With ``gpu``, libllama decides where layers go; without, all stay in host memory."""
        self.library = library
        self.gpu = gpu
        params = library.functions.llama_model_default_params()
        if not gpu:
            if params.n_gpu_layers not in (-1, 0, 999):
                raise LlamaError(f"unknown layout of llama_model_params in {library.path}")
            params.n_gpu_layers = 0
        if not Path(path).is_file():
            raise LlamaError(f"no model file {path}")
        library.log.clear()
        self.pointer: int | None = library.functions.llama_model_load_from_file(
            os.fsencode(path), params
        )
        if not self.pointer:
            raise library.refusal(f"libllama can't load {path}")
        self._vocabulary = library.functions.llama_model_get_vocab(self.pointer)
        self.vocabulary: int = library.functions.llama_vocab_n_tokens(self._vocabulary)
        """Number of token ids."""
        self.recurrent: bool = library.functions.llama_model_is_recurrent(self.pointer)

    @property
    def description(self) -> str:
        text = ctypes.create_string_buffer(256)
        self.library.functions.llama_model_desc(self.pointer, text, len(text))
        return text.value.decode(errors="replace")

    def tokenize(self, text: str) -> list[int]:
        """Returns the tokens of a prompt, with those that the model wants before and after it.

        Special tokens may be written as text. Raises LlamaError, such as for a model without a
        tokenizer.
        """
        data = text.encode()
        self.library.log.clear()

        def fill(room: int) -> tuple[Any, int]:
            tokens = (ctypes.c_int32 * room)()
            count: int = self.library.functions.llama_tokenize(
                self._vocabulary, data, len(data), tokens, room, True, True
            )
            return tokens, count

        tokens, count = fill(len(data) + 16)
        if count < 0:  # there are so many
            tokens, count = fill(-count)
        if count < 0 or (data and not count):
            raise self.library.refusal("libllama can't make tokens of a prompt")
        return list(tokens[:count])

    def close(self) -> None:
        if self.pointer:
            self.library.functions.llama_model_free(self.pointer)
            self.pointer = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class ContextOptions:
    """The options of a context. All sequences share one cache of ``n_ctx`` cells."""

    n_ctx: int
    n_seq_max: int
    threads: int
    flash_attention: bool = True
    n_batch: int = 512
    type_k: CacheType = "f16"
    type_v: CacheType = "f16"


@dataclasses.dataclass(frozen=True)
class Step:
    """The times of a decode, until its results were there: nanoseconds of ``monotonic_ns()``."""

    begin_ns: int
    end_ns: int

    @property
    def ms(self) -> float:
        return (self.end_ns - self.begin_ns) / 1e6


class Context:
    """A context and its cache. llama.cpp allows one thread at a time."""

    def __init__(self, model: Model, options: ContextOptions) -> None:
        self.model = model
        self.options = options
        self._functions = model.library.functions
        params = self._functions.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_seq_max = options.n_seq_max
        params.n_batch = params.n_ubatch = options.n_batch
        params.n_threads = params.n_threads_batch = options.threads
        params.flash_attn_type = int(options.flash_attention)
        params.type_k = CACHE_TYPES[options.type_k]
        params.type_v = CACHE_TYPES[options.type_v]
        params.swa_full = False
        params.kv_unified = True
        if not model.gpu:
            params.offload_kqv = params.op_offload = False
        model.library.log.clear()
        self.pointer: int | None = self._functions.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise model.library.refusal("libllama can't make a context")
        self._check()
        self._memory = self._functions.llama_get_memory(self.pointer)
        self._batch = self._functions.llama_batch_init(options.n_batch, 0, 1)

    @property
    def address(self) -> int:
        if self.pointer is None:
            raise LlamaError("the context is closed")
        return self.pointer

    def _check(self) -> None:
        """Raises LlamaError if the context differs from the options: then the layout was wrong."""
        functions, options = self._functions, self.options
        has = {
            name: getattr(functions, f"llama_{name}")(self.pointer)
            for name in ("n_seq_max", "n_batch", "n_ubatch", "n_threads", "n_threads_batch")
        }
        cells: int = functions.llama_n_ctx(self.pointer)
        has["kv_unified"] = functions.llama_n_ctx_seq(self.pointer) == cells
        batch = min(options.n_batch, options.n_ctx)
        asked = {
            "n_seq_max": options.n_seq_max,
            "n_batch": batch,
            "n_ubatch": batch,
            "n_threads": options.threads,
            "n_threads_batch": options.threads,
            "kv_unified": True,
        }
        if cells < options.n_ctx or has != asked:
            functions.llama_free(self.pointer)
            self.pointer = None
            raise LlamaError(
                f"{self.model.library.path} makes another context than was asked for "
                f"(n_ctx {options.n_ctx}, {asked}: n_ctx {cells}, {has}): "
                "unknown layout of llama_context_params"
            )

    # Decoding

    def decode(self, items: Sequence[tuple[int, int]]) -> Step:
        """Appends (sequence, token) pairs in this order. Only the last one gets logits."""
        return self._decode(items, {})

    def decode_apart(self, seq: int, tokens: Sequence[int], spare: int) -> Step:
        """Appends tokens to a sequence that see only each other, not what is before them.

        They get the same cells and positions as by ``decode``, but other values. It takes time by
        their number, whereas ``decode`` takes time by their number times the sequence's length.
        ``spare`` is an empty sequence, and is empty afterwards.
        """
        functions, memory = self._functions, self._memory
        end = functions.llama_memory_seq_pos_max(memory, seq) + 1
        step = self._decode([(spare, token) for token in tokens], {spare: end})
        functions.llama_memory_seq_cp(memory, spare, seq, -1, -1)
        self.remove(spare)
        return step

    def _decode(self, items: Sequence[tuple[int, int]], position: dict[int, int]) -> Step:
        """``position`` has the next position of sequences; the others go on where they end."""
        begin_ns = time.monotonic_ns()
        for start in range(0, len(items), self.options.n_batch):
            self._fill(items[start : start + self.options.n_batch], position)
            status = self._functions.llama_decode(self.pointer, self._batch)
            if status != 0:
                raise self.model.library.refusal(f"llama_decode returned {status}")
        # llama_decode may return before the GPU has finished.
        self._functions.llama_synchronize(self.pointer)
        return Step(begin_ns, time.monotonic_ns())

    def _fill(self, items: Sequence[tuple[int, int]], position: dict[int, int]) -> None:
        batch = self._batch
        batch.n_tokens = len(items)
        for index, (seq, token) in enumerate(items):
            if seq not in position:
                position[seq] = self._functions.llama_memory_seq_pos_max(self._memory, seq) + 1
            batch.token[index] = token
            batch.pos[index] = position[seq]
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = seq
            batch.logits[index] = index == len(items) - 1
            position[seq] += 1

    def logits(self) -> bytes:
        """Returns the logits of the last decoded token: 32-bit floats, one for each token id."""
        address = self._functions.llama_get_logits_ith(self.pointer, -1)
        return ctypes.string_at(address, 4 * self.model.vocabulary)

    def shorten(self, seq: int, tokens: int) -> None:
        """Removes the last ``tokens`` tokens of a sequence. Raises LlamaError if it cannot."""
        end = self._functions.llama_memory_seq_pos_max(self._memory, seq) + 1
        if not self._functions.llama_memory_seq_rm(self._memory, seq, end - tokens, -1):
            raise LlamaError("this cache can't remove a part of a sequence")

    def remove(self, seq: int) -> None:
        self._functions.llama_memory_seq_rm(self._memory, seq, -1, -1)

    # State, by llama.cpp's blocking calls

    def state_size(self, seq: int) -> int:
        size: int = self._functions.llama_state_seq_get_size(self.pointer, seq)
        return size

    def state_get(self, seq: int, address: int, nbytes: int) -> int:
        """Writes the state to an address; returns the bytes written, 0 if llama.cpp refused."""
        written: int = self._functions.llama_state_seq_get_data(self.pointer, address, nbytes, seq)
        return written

    def state_set(self, seq: int, address: int, nbytes: int) -> int:
        """Replaces a sequence; returns the bytes read, 0 if llama.cpp refused."""
        read: int = self._functions.llama_state_seq_set_data(self.pointer, address, nbytes, seq)
        return read

    def close(self) -> None:
        if self.pointer:
            self._functions.llama_batch_free(self._batch)
            self._functions.llama_free(self.pointer)
            self.pointer = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
