"""What may be done to a context while a transfer of one of its sequences is in flight.

The transfer follows a stream that is held (in_flight.py), so that it surely is in flight. Whatever
is allowed must leave what llama.cpp's own calls leave, bit for bit; what is forbidden may spoil
sequences, and no more than that.
"""

from __future__ import annotations

import ctypes
import dataclasses
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
    beside_a_transfer,
    decode_fourth,
    live_alike,
    pending_copy,
    pending_shift,
)
from like_contexts import CACHES, MakeContext
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


@pytest.mark.parametrize("transfer", ["load", "save"])
@pytest.mark.parametrize(("kind", "cache"), [one for one in KINDS if one[1] == "flash"])
def test_a_context_that_is_freed_ends_its_transfers_first(
    cuda: SimulatedCuda, make_context: MakeContext, kind: str, cache: str, transfer: Kind
) -> None:
    context = make_context(kind, **CACHES[cache])
    live_alike(context)
    state = context.state_get(OWN)
    library = c_interface.Library(c_interface.LIBRARY)
    with (
        library.engine() as engine,
        cuda.stream() as stream,
        engine.attach(context.address) as attachment,
    ):
        stream.hold()
        buffer = ctypes.create_string_buffer(state, len(state))
        submit = attachment.load if transfer == "load" else attachment.save
        job = submit(OWN, buffer, stream=stream.handle, mode=c_interface.Mode.IN_PLACE)
        context.close()
        assert job.done
        assert job.wait() == "KVF_ERR_CANCELLED"


SNAPSHOT_ALLOWS = [name for name, rule in TABLE["save"].items() if isinstance(rule, Forbidden)]


@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        (kind, operation)
        for kind in ("llama", "gemma3", "hybrid")
        for operation in SNAPSHOT_ALLOWS
        if can(operation, kind)
    ],
)
def test_a_snapshot_forbids_nothing(
    cuda: SimulatedCuda, make_context: MakeContext, kind: str, operation: str
) -> None:
    """It has been taken when the call returns, which waits for the stream."""
    ours, like = (make_context(kind) for _ in range(2))
    outcome = beside_a_transfer(
        cuda, ours, like, "save", OPERATIONS[operation], mode=c_interface.Mode.SNAPSHOT
    )
    assert outcome.differences == []
    assert outcome.status == "KVF_OK"


# ---- The faults one by one -----------------------------------------------------------------------

UNIFIED = [cache for cache, options in CACHES.items() if options.get("kv_unified", True)]
SEPARATE = [cache for cache in CACHES if cache not in UNIFIED]

SHIFTED = [
    *[(kind, cache) for kind in ("llama", "gemma3") for cache in CACHES],
    *[("deepseek2", cache) for cache in ("flash", "transposed", "streams")],
]
"""What llama.cpp can shift at all."""


@CPU_ONLY
@pytest.mark.xfail(reason=REQUANTISED)
@pytest.mark.parametrize("shifted", [OTHER, OWN], ids=["of another sequence", "of its own"])
@pytest.mark.parametrize("transfer", ["load", "save"])
@pytest.mark.parametrize(("kind", "cache"), SHIFTED)
def test_no_byte_moves_while_a_shift_rewrites_the_keys(
    cuda: SimulatedCuda,
    make_context: MakeContext,
    kind: str,
    cache: str,
    transfer: Kind,
    shifted: int,
) -> None:
    """llama.cpp applies a pending shift at its next decode, to all keys of the cache: those that
    need not be shifted are turned by zero. Here it is halted behind its first operation. Quantised
    keys lie outside of the cache at that moment: what is loaded now is lost.
    """
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    outcome = beside_a_transfer(
        cuda,
        ours,
        like,
        transfer,
        decode_fourth,
        live_alike,
        before=pending_shift(shifted),
        release_at_node=1,
    )
    assert outcome.differences == []
    assert not outcome.beside


@pytest.mark.xfail(reason=MASKED)
@pytest.mark.parametrize("operation", ["decode", "state_set", "load"])
@pytest.mark.parametrize("transfer", ["load", "save"])
@pytest.mark.parametrize("kind", WINDOW)
@pytest.mark.parametrize("cache", UNIFIED)
def test_no_cell_of_a_window_that_is_being_moved_goes_to_another_sequence(
    cuda: SimulatedCuda,
    make_context: MakeContext,
    kind: str,
    cache: str,
    transfer: Kind,
    operation: str,
) -> None:
    """A state has the cells that the window shows to the last token. llama.cpp takes for others
    what the window hides from the next one.
    """
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    outcome = beside_a_transfer(cuda, ours, like, transfer, OPERATIONS[operation])
    assert outcome.differences == []


@pytest.mark.xfail(reason=MOVED)
@pytest.mark.parametrize("transfer", ["load", "save"])
@pytest.mark.parametrize("cache", ["flash", "streams"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_cell_that_llama_cpp_moves_keeps_its_bytes(
    cuda: SimulatedCuda, make_context: MakeContext, kind: str, cache: str, transfer: Kind
) -> None:
    """Sequences that are decoded in one batch get neighbouring cells. Whoever is in the way goes to
    another cell, and the graph copies its state there: a load still goes to the old one, where
    another sequence is by then.
    """
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    outcome = beside_a_transfer(cuda, ours, like, transfer, OPERATIONS["decode_several"])
    assert outcome.differences == []


@pytest.mark.xfail(reason="the keys are turned under the save")
@pytest.mark.parametrize(("kind", "cache"), SHIFTED)
def test_a_sequence_is_saved_as_it_was_before_its_pending_shift(
    cuda: SimulatedCuda, make_context: MakeContext, kind: str, cache: str
) -> None:
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    outcome = beside_a_transfer(cuda, ours, like, "save", decode_fourth, before=pending_shift(OWN))
    assert outcome.differences == []


@pytest.mark.xfail(reason=POSTPONED)
@pytest.mark.parametrize("transfer", ["load", "save"])
@pytest.mark.parametrize("cache", SEPARATE)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "hybrid", "deepseek2"])
def test_a_sequence_onto_which_another_is_to_be_copied_is_moved_before(
    cuda: SimulatedCuda, make_context: MakeContext, kind: str, cache: str, transfer: Kind
) -> None:
    """llama.cpp copies between streams at its next decode, over whatever has been loaded since."""
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    outcome = beside_a_transfer(
        cuda, ours, like, transfer, decode_fourth, before=pending_copy(OTHER, OWN)
    )
    assert outcome.differences == []


@pytest.mark.xfail(reason=POSTPONED)
@pytest.mark.parametrize("cache", SEPARATE)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "hybrid", "deepseek2"])
def test_a_sequence_that_is_to_be_copied_is_loaded_before(
    cuda: SimulatedCuda, make_context: MakeContext, kind: str, cache: str
) -> None:
    """llama.cpp's copy is then one of what has been loaded; so is ours."""
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    outcome = beside_a_transfer(
        cuda, ours, like, "load", decode_fourth, before=pending_copy(OWN, SPARE)
    )
    assert outcome.differences == []
