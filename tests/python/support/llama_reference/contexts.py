"""Models and contexts, decoding, and llama.cpp's blocking calls for states."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import os
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.llama_reference.library import llama, log_lines

Logits = NDArray[np.float32]

_PARTIAL_ONLY = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY


class CacheType(enum.IntEnum):
    """The element types of a cache, by ggml's numbers."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q8_0 = 8


@dataclasses.dataclass(frozen=True)
class ContextOptions:
    """The options of a context's cache.

    `n_ctx` is the number of cells for all sequences together. Without `kv_unified` each sequence
    has a stream of its own with `n_ctx / n_seq_max` cells.
    """

    n_ctx: int = 512
    n_seq_max: int = 4
    kv_unified: bool = True
    flash_attention: bool = True
    type_k: CacheType = CacheType.F16
    type_v: CacheType = CacheType.F16
    swa_full: bool = False
    n_threads: int = 1
    n_batch: int = 512
    n_ubatch: int = 512


class Refused(Exception):
    """llama.cpp has refused to load a model, make a context or decode; the text is from its log."""


class Model:
    """A loaded model. Close it after its contexts, or use `with`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        params = llama.llama_model_default_params()
        log_lines.clear()
        self.pointer: Any = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise Refused(_refusal())
        self.vocabulary = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.pointer)))
        """Number of token ids."""

    @property
    def is_recurrent(self) -> bool:
        return bool(llama.llama_model_is_recurrent(self.pointer))

    @property
    def is_hybrid(self) -> bool:
        return bool(llama.llama_model_is_hybrid(self.pointer))

    @property
    def n_swa(self) -> int:
        """The tokens of the sliding window; 0 if there is none."""
        return int(llama.llama_model_n_swa(self.pointer))

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        """Returns random token ids."""
        return random.Random(seed).choices(range(self.vocabulary), k=length)

    def context(self, options: ContextOptions | None = None, **changes: Any) -> Context:
        return Context(self, dataclasses.replace(options or ContextOptions(), **changes))

    def close(self) -> None:
        if self.pointer:
            llama.llama_model_free(self.pointer)
            self.pointer = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Context:
    """A context and its cache. llama.cpp allows one thread at a time."""

    def __init__(self, model: Model, options: ContextOptions) -> None:
        self.model = model
        self.options = options
        params = llama.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_seq_max = options.n_seq_max
        params.n_batch = options.n_batch
        params.n_ubatch = options.n_ubatch
        params.n_threads = options.n_threads
        params.n_threads_batch = options.n_threads
        params.flash_attn_type = int(options.flash_attention)
        params.type_k = int(options.type_k)
        params.type_v = int(options.type_v)
        params.swa_full = options.swa_full
        params.kv_unified = options.kv_unified
        log_lines.clear()
        self.pointer: Any = llama.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise Refused(_refusal())
        self.memory: Any = llama.llama_get_memory(self.pointer)

    @property
    def address(self) -> int:
        """The `llama_context *` as a number."""
        return int(ctypes.cast(self.pointer, ctypes.c_void_p).value or 0)

    # Decoding

    def decode(self, seq: int, tokens: Sequence[int]) -> Logits:
        """Appends `tokens` to a sequence; returns the logits after the last token."""
        return self.decode_batch([(seq, token) for token in tokens])[seq]

    def decode_batch(self, items: Sequence[tuple[int, int]]) -> dict[int, Logits]:
        """Appends (sequence, token) pairs in this order, in as few batches as `n_batch` allows.

        Each token gets the next position of its sequence. In a unified attention cache, neighbours
        in the list become neighbours in the cache. Returns the last logits of each sequence.
        """
        logits: dict[int, Logits] = {}
        for start in range(0, len(items), self.options.n_batch):
            logits |= self._decode_one_batch(items[start : start + self.options.n_batch])
        return logits

    def _decode_one_batch(self, items: Sequence[tuple[int, int]]) -> dict[int, Logits]:
        last = {seq: index for index, (seq, _) in enumerate(items)}
        position = {seq: self.pos_max(seq) + 1 for seq in last}
        batch = llama.llama_batch_init(len(items), 0, 1)
        try:
            batch.n_tokens = len(items)
            for index, (seq, token) in enumerate(items):
                batch.token[index] = token
                batch.pos[index] = position[seq]
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = seq
                batch.logits[index] = last[seq] == index
                position[seq] += 1
            log_lines.clear()
            status = llama.llama_decode(self.pointer, batch)
        finally:
            llama.llama_batch_free(batch)
        if status != 0:
            raise Refused(f"llama_decode returned {status}: {_refusal()}")
        return {seq: self._logits(index) for seq, index in last.items()}

    def _logits(self, index: int) -> Logits:
        pointer = llama.llama_get_logits_ith(self.pointer, index)
        logits: Logits = np.ctypeslib.as_array(pointer, (self.model.vocabulary,)).copy()
        return logits

    def decode_image(self, seq: int, rows: int, columns: int, seed: int = 0) -> None:
        """Appends the patches of an image of random content to a sequence of a model with M-RoPE:
        all have the same position, and each its own coordinates.
        """
        count = rows * columns
        width = int(llama.llama_model_n_embd(self.model.pointer))
        content = np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)
        position = self.pos_max(seq) + 1
        row, column = np.divmod(np.arange(count, dtype=np.int32), columns)
        same = np.full(count, position, dtype=np.int32)
        # By axes: the position, row and column; the fourth has no meaning.
        places = np.concatenate([same, same + row, same + column, 0 * same]).astype(np.int32)
        batch = llama.llama_batch_init(count, width, 1)
        pointer = type(batch.pos)
        own = ctypes.cast(batch.pos, ctypes.c_void_p).value  # room for one position each
        try:
            batch.n_tokens = count
            ctypes.memmove(batch.embd, content.ctypes.data, content.nbytes)
            batch.pos = ctypes.cast(places.ctypes.data, pointer)
            for index in range(count):
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = seq
                batch.logits[index] = index == count - 1
            log_lines.clear()
            status = llama.llama_decode(self.pointer, batch)
        finally:
            batch.pos = ctypes.cast(own, pointer)
            llama.llama_batch_free(batch)
        if status != 0:
            raise Refused(f"llama_decode returned {status}: {_refusal()}")

    def decode_in_turn(self, seqs: Iterable[int], length: int, seed: int = 0) -> dict[int, Logits]:
        """Appends `length` random tokens to each sequence, one token of each in turn, so that in a
        unified cache no two cells of a sequence are neighbours.
        """
        prompts = {seq: self.model.prompt(length, seed + seq) for seq in seqs}
        return self.decode_batch(
            [(seq, prompt[index]) for index in range(length) for seq, prompt in prompts.items()]
        )

    def decode_at_random(
        self, seqs: Iterable[int], length: int, seed: int = 0
    ) -> dict[int, Logits]:
        """As `decode_in_turn`, but in random order: runs of any length, and no regular pitch."""
        prompts = {seq: iter(self.model.prompt(length, seed + seq)) for seq in seqs}
        turns = [seq for seq in prompts for _ in range(length)]
        random.Random(seed).shuffle(turns)
        return self.decode_batch([(seq, next(prompts[seq])) for seq in turns])

    # Sequences

    def pos_max(self, seq: int) -> int:
        """The last position of a sequence, -1 for an empty sequence."""
        return int(llama.llama_memory_seq_pos_max(self.memory, seq))

    @property
    def can_shift(self) -> bool:
        """Whether `seq_add` may be used. If not, llama.cpp aborts in the decode after it."""
        return bool(llama.llama_memory_can_shift(self.memory))

    def seq_rm(self, seq: int, start: int = -1, stop: int = -1) -> bool:
        """Removes positions [start, stop). Returns False if the cache cannot remove a part."""
        return bool(llama.llama_memory_seq_rm(self.memory, seq, start, stop))

    def seq_cp(self, source: int, target: int, start: int = -1, stop: int = -1) -> None:
        llama.llama_memory_seq_cp(self.memory, source, target, start, stop)

    def seq_add(self, seq: int, start: int, stop: int, shift: int) -> None:
        llama.llama_memory_seq_add(self.memory, seq, start, stop, shift)

    def seq_keep(self, seq: int) -> None:
        llama.llama_memory_seq_keep(self.memory, seq)

    def clear(self) -> None:
        """Empties all sequences, and zeroes the bytes of the cache."""
        llama.llama_memory_clear(self.memory, True)

    # State, by llama.cpp's blocking calls

    def state_size(self, seq: int) -> int:
        return int(llama.llama_state_seq_get_size(self.pointer, seq))

    def state_get(self, seq: int) -> bytes:
        """Returns the state of a sequence; no bytes if llama.cpp refused."""
        size = self.state_size(seq)
        buffer = (ctypes.c_uint8 * size)()
        return bytes(buffer[: self.state_get_into(seq, buffer)])

    def state_get_into(self, seq: int, buffer: Any) -> int:
        """Writes the state into a ctypes array; returns the bytes written, 0 if refused."""
        return int(llama.llama_state_seq_get_data(self.pointer, buffer, len(buffer), seq))

    def partial_state_get(self, seq: int) -> bytes:
        """Returns the state of sliding windows and recurrent layers alone."""
        size = int(llama.llama_state_seq_get_size_ext(self.pointer, seq, _PARTIAL_ONLY))
        buffer = (ctypes.c_uint8 * size)()
        written = llama.llama_state_seq_get_data_ext(self.pointer, buffer, size, seq, _PARTIAL_ONLY)
        return bytes(buffer[:written])

    def state_set(self, seq: int, state: bytes) -> int:
        """Replaces a sequence by a state; returns the bytes read, 0 if refused."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        log_lines.clear()
        return int(llama.llama_state_seq_set_data(self.pointer, buffer, len(state), seq))

    def close(self) -> None:
        if self.pointer:
            llama.llama_free(self.pointer)
            self.pointer = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refusal() -> str:
    return "\n".join(log_lines) or "no reason in llama.cpp's log"
