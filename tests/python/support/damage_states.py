"""Loads states that are damaged at random. test_llama_damage.py runs it in a process of its own,
because a damaged state that reaches libllama may end the process:

    python -m support.damage_states MODEL KIND OPTIONS FIRST COUNT

OPTIONS are ContextOptions as JSON. Prints the number of each damage before it is tried. If the
process ends, the last number is the damage to look at: run again with it as FIRST, and 1 as COUNT.
"""

from __future__ import annotations

import collections
import json
import random
import sys
from typing import Any

import kvferry._native as native

from support.devices import DEVICES
from support.llama_reference import Context, ContextOptions, Model
from support.state_fields import LAST_POSITION, StateField, state_fields

# This uses functions that the package does not use, and that its types do not have.
ffi: Any = native.ffi
lib: Any = native.lib

TARGET = 2
NUMBERS = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 20, 21, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63]


def damaged(state: bytes, fields: list[StateField], chance: random.Random) -> bytes:
    """Returns the state with one to three damages, some of which may cancel each other."""
    records = [field for field in fields if not field.is_data]
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        field, other = chance.choice(records), chance.choice(records)
        what = chance.randrange(8)
        if what < 2:  # flip some bits of one byte of metadata
            at = min(chance.randrange(field.begin, field.end), len(state) - 1)
            flipped = state[at] ^ chance.choice([1 << chance.randrange(8), chance.randrange(256)])
            state = state[:at] + bytes([flipped]) + state[at + 1 :]
        elif what == 2:
            state = field.replaced(state, chance.choice(NUMBERS))
        elif what == 3:  # another field's value
            state = field.replaced(state, other.read(state))
        elif what == 4:
            state = state[: chance.randrange(1, max(2, len(state)))]
        elif what == 5:  # a piece is lost
            state = state[: field.begin] + state[chance.choice([field.end, other.end]) :]
        elif what == 6:  # or comes twice, here or elsewhere
            piece = state[field.begin : chance.choice([field.end, max(field.end, other.end)])]
            state = state[: other.begin] + piece + state[other.begin :]
        else:  # any byte at all, mostly of tensors
            at = chance.randrange(len(state))
            state = state[:at] + bytes([chance.randrange(256)]) + state[at + 1 :]
        state = state or b"\0"
    return state


class Judge:
    """Knows which states must be accepted: those that differ from a good state only in bytes of
    tensors, ids of sequences, and positions after which decoding can continue. Attention sections
    after the first have no positions that the first has not.
    """

    def __init__(self, state: bytes, fields: list[StateField]) -> None:
        self._bytes = len(state)
        self._positions = [field for field in fields if field.name.endswith(".position")]
        self._attentions: list[list[StateField]] = []
        for field in fields:
            if field.name == "attention.streams":
                self._attentions.append([])
            elif field.name == "attention.cell.position":
                self._attentions[-1].append(field)
        free = (".data", ".sequence", ".x", ".y", ".token", ".position")
        self._fixed = [
            (field.begin, field.end, state[field.begin : field.end])
            for field in fields
            if not field.name.endswith(free)
        ]

    def accepts(self, state: bytes) -> bool:
        return (
            len(state) == self._bytes
            and all(state[begin:end] == value for begin, end, value in self._fixed)
            and all(0 <= field.read(state) <= LAST_POSITION for field in self._positions)
            and self._sections_agree(state)
        )

    def _sections_agree(self, state: bytes) -> bool:
        first, *others = (
            collections.Counter(field.read(state) for field in section)
            for section in self._attentions or [[]]
        )
        return all(other <= first for other in others)


class Loader:
    """Loads by kvferry's C interface and waits: thousands of loads a second."""

    def __init__(self, context: Context) -> None:
        engine = ffi.new("kvf_engine *")
        options = ffi.new("kvf_engine_options *", {"size": ffi.sizeof("kvf_engine_options")})
        options.devices = getattr(lib, f"KVF_DEVICES_{DEVICES.upper()}")
        assert lib.kvf_engine_create(options, engine) == 0
        self._engine = engine[0]
        self._context = ffi.cast("struct llama_context *", context.address)
        self._llama = ffi.new("kvf_llama *")
        self.attach()

    def attach(self) -> None:
        assert lib.kvf_llama_attach(self._engine, self._context, ffi.NULL, self._llama) == 0

    def attach_anew(self) -> None:
        """Attaches anew, so that nothing is known from earlier loads."""
        assert lib.kvf_llama_detach(self._llama[0]) == 0
        self.attach()

    def load(self, state: bytes) -> int:
        """Returns the status of the call if it has failed, else of the job."""
        job = ffi.new("kvf_job *")
        completion = ffi.new("kvf_completion *")
        memory = ffi.from_buffer(state)
        status = lib.kvf_llama_load(self._llama[0], TARGET, memory, len(state), ffi.NULL, job)
        if status != 0:
            return int(status)
        size = ffi.sizeof("kvf_completion")
        assert lib.kvf_job_wait(job[0], -1, completion, size) == 0
        assert lib.kvf_job_release(job[0]) == 0
        return int(completion.status)

    def remove(self) -> None:
        assert lib.kvf_llama_remove(self._llama[0], TARGET) == 0


def every_cell_can_be_used(context: Context, loader: Loader, state: bytes, *, taken: int) -> None:
    """Fills the cache; in a unified cache, `taken` cells belong to other sequences."""
    unified = context.options.kv_unified
    cells = context.options.n_ctx // (1 if unified else context.options.n_seq_max)
    assert loader.load(state) == 0
    loader.remove()
    context.decode(TARGET, context.model.prompt(cells - taken if unified else cells))


def main() -> None:
    path, kind, options, first, count = sys.argv[1:]
    context = Model(path).context(ContextOptions(**json.loads(options)))
    context.decode_in_turn([0, 1], 20)
    others = [context.state_get(0), context.state_get(1)]
    state, empty = others[0], context.state_size(TARGET)
    fields = state_fields(kind, state)
    judge = Judge(state, fields)
    # The same into a context that has never held a cell, and cannot be compared with yet.
    fresh = context.model.context(context.options)
    refusals = {lib.KVF_ERR_STATE_DAMAGED, lib.KVF_ERR_STATE_MISMATCH, lib.KVF_ERR_CACHE_FULL}

    loaders = [(context, Loader(context)), (fresh, Loader(fresh))]
    refused = 0
    for number in range(int(first), int(first) + int(count)):
        print(number, flush=True)
        bad = damaged(state, fields, random.Random(number))
        accept = judge.accepts(bad)
        refused += not accept
        for target, loader in loaders:
            if target is fresh:
                loader.attach_anew()
            elif number % 2:  # over something
                assert loader.load(state) == 0
            before = target.state_get(TARGET)
            status = loader.load(bad)
            assert status == 0 if accept else status in refusals, (number, accept, status)
            if accept:
                assert target.state_size(TARGET) > empty or bad == state
            else:
                assert target.state_get(TARGET) == before, number
            loader.remove()
            assert target.state_size(TARGET) == empty, number
            assert target.pos_max(TARGET) == -1, number
        if number % 100 == 0:
            assert [context.state_get(0), context.state_get(1)] == others, number
    assert [context.state_get(0), context.state_get(1)] == others

    for target, loader in loaders:
        every_cell_can_be_used(target, loader, state, taken=40 if target is context else 0)
    print(f"refused {refused}", flush=True)


if __name__ == "__main__":
    main()
