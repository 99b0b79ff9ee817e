"""What may be done to a context while a transfer of one of its sequences is in flight.

The transfer follows a stream that is held (in_flight.py), so that it surely is in flight. Whatever
is allowed must leave what llama.cpp's own calls leave, bit for bit; what is forbidden may spoil
sequences, and no more than that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import c_interface
import pytest
from cuda_driver import NEEDS_CUDA
from devices import ON_GPU
from in_flight import (
    OPERATIONS,
    OTHER,
    OWN,
    SPARE,
    Kind,
    Operation,
    Side,
    beside_a_transfer,
    decode,
    decode_several,
    divide,
    load,
    shift,
    state_set,
)
from like_contexts import CACHES, MakeContext
from llama_reference import llama
from simulated_cuda import SimulatedCuda

pytestmark = NEEDS_CUDA

CPU_ONLY = pytest.mark.skipif(ON_GPU, reason="only a CPU's graph can be halted at a node")

ATTENTION = ("llama", "deepseek2", "deepseek32", "qwen2vl")
WINDOW = ("gemma3", "hybrid-iswa")
RECURRENT = ("mamba", "hybrid", "hybrid-iswa")

KINDS = [
    *[("llama", cache) for cache in ("flash", "transposed", "streams", "q8_0")],
    *[("gemma3", cache) for cache in ("flash", "transposed", "streams", "q8_0")],
    *[(kind, cache) for kind in ("deepseek2", "qwen2vl") for cache in ("flash", "streams")],
    ("deepseek32", "flash"),
    ("mamba", "flash"),
    *[(kind, cache) for kind in ("hybrid", "hybrid-iswa") for cache in ("flash", "streams")],
]
"""The kinds of model and cache, one for each way in which an operation may go wrong."""


# ---- The table -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Allowed:
    """May be done. It does not wait for the transfer, but for these kinds of model."""

    waits: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Forbidden:
    """May not be done with these kinds of model, or with any."""

    why: str
    kinds: tuple[str, ...] = ()


USED = Forbidden("the sequence must not be used while it is loaded")
CHANGED = Forbidden("the cells that are saved must stay as they are")

TABLE: dict[Kind, dict[str, Allowed | Forbidden]] = {
    "load": {
        "decode": Allowed(waits=RECURRENT),
        "decode_several": Allowed(waits=RECURRENT),
        "decode_own": USED,
        "shift": Allowed(waits=("llama", "deepseek2", "gemma3", "hybrid")),
        "divide": Allowed(waits=("llama", "deepseek2", "gemma3", "hybrid")),
        "copy": Allowed(waits=RECURRENT),
        "copy_own": USED,
        "remove": Allowed(waits=RECURRENT),
        "remove_a_part": Allowed(),
        "remove_own": USED,
        "shift_own": USED,
        "divide_own": USED,
        "copy_onto_own": USED,
        "keep_own": Allowed(waits=RECURRENT),
        "keep_other": USED,
        "clear": USED,
        "state_get": Allowed(),
        "state_get_own": USED,
        "state_get_all": USED,
        "state_set": Allowed(),
        "state_set_own": USED,
        "save": Allowed(),
        "load": Allowed(),
    },
    "save": {
        "decode": Allowed(waits=RECURRENT),
        "decode_several": Allowed(waits=RECURRENT),
        "decode_own": Forbidden(CHANGED.why, (*WINDOW, *RECURRENT)),
        "shift": Allowed(waits=("llama", "deepseek2", "gemma3", "hybrid")),
        "divide": Allowed(waits=("llama", "deepseek2", "gemma3", "hybrid")),
        "copy": Allowed(waits=RECURRENT),
        "copy_own": Allowed(waits=RECURRENT),
        "remove": Allowed(waits=RECURRENT),
        "remove_a_part": Allowed(),
        "remove_own": CHANGED,
        "shift_own": CHANGED,
        "divide_own": CHANGED,
        "copy_onto_own": CHANGED,
        "keep_own": Allowed(waits=RECURRENT),
        "keep_other": CHANGED,
        "clear": CHANGED,
        "state_get": Allowed(),
        "state_get_own": Allowed(),
        "state_get_all": Allowed(),
        "state_set": Allowed(),
        "state_set_own": CHANGED,
        "save": Allowed(),
        "load": Allowed(),
    },
}
"""By transfer and operation (in_flight.py): what the header allows."""

# What llama.cpp b10361 can't do at all: of M-RoPE it says so; the others end the process.
UNSHIFTABLE = ("qwen2vl", "deepseek32", "hybrid-iswa")
CELL_KEPT_WHOLE = RECURRENT


def can(operation: str, kind: str) -> bool:
    """Whether llama.cpp knows this operation for this kind of model."""
    if operation in ("shift", "divide", "shift_own", "divide_own"):
        return kind not in UNSHIFTABLE and kind not in CELL_KEPT_WHOLE
    return operation != "remove_a_part" or kind not in CELL_KEPT_WHOLE


MASKED = "a cell of the window that is moved counts as free for others"
MOVED = "llama.cpp moves the recurrent cell to make room for others, or rewrites it in place"
POSTPONED = "llama.cpp copies streams at the next decode, past the graph"
REQUANTISED = "a graph rewrites all keys of the cache"


def fault(transfer: Kind, operation: str, kind: str, cache: str) -> str:
    """Why a cell of the table does not hold, or "" if it does."""
    if operation == "decode_several" and kind in RECURRENT:
        return MOVED
    if kind in WINDOW and "streams" not in cache:
        if operation in ("decode", "state_set", "load"):
            return MASKED
        if transfer == "load" and operation == "shift":
            return MASKED
        if transfer == "save" and operation == "keep_own":
            return MASKED
    return ""


def cells(kind_of_cell: type[Allowed | Forbidden]) -> list[Any]:
    """The cells of the table, as parameters: transfer, operation, kind, cache."""
    chosen = []
    for transfer, operations in TABLE.items():
        for operation, rule in operations.items():
            for kind, cache in KINDS:
                forbids = isinstance(rule, Forbidden) and (not rule.kinds or kind in rule.kinds)
                if forbids != (kind_of_cell is Forbidden) or not can(operation, kind):
                    continue
                if forbids and cache != "flash":
                    continue
                why = "" if forbids else fault(transfer, operation, kind, cache)
                marks = [pytest.mark.xfail(reason=why)] if why else []
                chosen.append(pytest.param(transfer, operation, kind, cache, marks=marks))
    return chosen


def test_every_operation_is_in_the_table() -> None:
    assert all(operations.keys() == OPERATIONS.keys() for operations in TABLE.values())


@pytest.mark.parametrize(("transfer", "operation", "kind", "cache"), cells(Allowed))
def test_what_is_allowed_beside_a_transfer_is_done_as_by_llama_cpp(
    cuda: SimulatedCuda,
    make_context: MakeContext,
    transfer: Kind,
    operation: str,
    kind: str,
    cache: str,
) -> None:
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    outcome = beside_a_transfer(cuda, ours, like, transfer, OPERATIONS[operation])
    assert outcome.differences == []
    assert outcome.status == "KVF_OK"
    rule = TABLE[transfer][operation]
    if isinstance(rule, Forbidden) or kind not in rule.waits:
        assert outcome.beside


@pytest.mark.parametrize(("transfer", "operation", "kind", "cache"), cells(Forbidden))
def test_what_is_forbidden_beside_a_transfer_spoils_sequences_and_no_more(
    cuda: SimulatedCuda,
    make_context: MakeContext,
    transfer: Kind,
    operation: str,
    kind: str,
    cache: str,
) -> None:
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    outcome = beside_a_transfer(cuda, ours, like, transfer, OPERATIONS[operation])
    assert outcome.status == "KVF_OK"
    for context in (ours, like):
        context.clear()
    # A cleared cache forgets what was spoiled.
    logits = [context.decode(OWN, context.model.prompt(40)) for context in (ours, like)]
    assert logits[0].tobytes() == logits[1].tobytes()
    assert ours.state_get(OWN) == like.state_get(OWN)
