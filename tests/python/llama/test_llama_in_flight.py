"""What may be done to a context while a transfer of one of its sequences is in flight.

The transfer is held (in_flight.py), so that it is certainly in flight. After an allowed operation
everything must equal the results of llama.cpp's own calls, bit for bit. A forbidden operation may
spoil sequences, but nothing else.
"""

from __future__ import annotations

import concurrent.futures as cf
import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from support import c_interface
from support.cuda_driver import NEEDS_CUDA
from support.devices import ON_GPU
from support.holds import ByStream, ByUrgentCopies, free_beside
from support.in_flight import (
    PATIENCE,
    Kind,
    beside_a_transfer,
    moves_at_once,
    shares_a_window,
)
from support.like_contexts import CACHES, MakeContext
from support.llama_reference import BUILD, NAMES_ROWS, Context, Model
from support.operations import (
    OPERATIONS,
    clear,
    copy_onto_own,
    decode,
    decode_another_end_of_own,
    decode_fourth,
    decode_own,
    decode_own_anew,
    decode_several,
    divide,
    divide_own,
    keep_other,
    load,
    load_within_own,
    pending_copy,
    pending_shift,
    remove_a_part,
    remove_own,
    remove_within_own,
    save,
    shift,
    shift_own,
    state_get,
    state_get_all,
    state_get_own,
    state_set,
    state_set_own,
)
from support.sides import (
    OTHER,
    OWN,
    SPARE,
    Ferried,
    Operation,
    Side,
    live_alike,
)
from support.simulated_cuda import SimulatedCuda

pytestmark = NEEDS_CUDA

HOST_ONLY = pytest.mark.skipif(ON_GPU, reason="the queue holds transfers on the host alone")
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
"""Kinds of models and caches, one for each way in which an operation may go wrong."""


Alike = Callable[[str, str], tuple[Context, Context]]


@pytest.fixture
def alike(make_context: MakeContext, model: Callable[..., Model]) -> Alike:
    """Makes two equal contexts of a kind of model and cache."""

    def make(kind: str, cache: str) -> tuple[Context, Context]:
        # With fewer layers, states are so small that the submitting call moves them.
        chosen = model(kind, layers=16) if kind in WINDOW else model(kind)
        return make_context(chosen, **CACHES[cache]), make_context(chosen, **CACHES[cache])

    return make


# ---- The table in kvferry.h ----------------------------------------------------------------------


def table_of_the_header() -> dict[str, dict[Kind, str]]:
    """Returns what the table allows, by operation and transfer."""
    header = Path(__file__).parents[3] / "include" / "kvferry.h"
    _, text = header.read_text().split("What may be done while a transfer is in flight")
    rows = [
        [cell.strip() for cell in line.strip(" *|").split("|")]
        for line in text.split("*/")[0].splitlines()
        if line.startswith(" * | ")
    ]
    assert rows[0] == ["operation", "load in flight", "save in place in flight"]
    return {operation: {"load": load, "save": save} for operation, load, save in rows[1:]}


TABLE = table_of_the_header()
FREES = "llama_free"


def rule(transfer: Kind, row: str, kind: str) -> str:
    """Returns a cell of the table for a kind of model: "yes", "no", "waits" or a status."""
    return TABLE[row][transfer].split(",")[0]


# Kinds that llama.cpp b10361 cannot shift: with M-RoPE it refuses; with the others the process
# ends.
UNSHIFTABLE = ("qwen2vl", "deepseek32", *RECURRENT)


def can(operation: Operation, kind: str) -> bool:
    """Whether llama.cpp has this operation for this kind of model."""
    if operation in (shift, divide, shift_own, divide_own):
        return kind not in UNSHIFTABLE
    # A recurrent cell is kept whole or not at all.
    return operation is not remove_a_part or kind not in RECURRENT


CHANGES_OWN = (
    shift_own,
    divide_own,
    copy_onto_own,
    remove_own,
    keep_other,
    clear,
    state_set_own,
)
"""They change the sequence that is moved: the next decode waits."""


def may_wait(transfer: Kind, operation: Operation, kind: str, cache: str) -> bool:
    """Whether the operation, or the decode in it, may wait for the transfer."""
    if operation in (shift, divide, *CHANGES_OWN):
        return True
    if operation is decode_own and (transfer == "load" or kind not in ATTENTION):
        return True
    if operation in (state_get, state_set) and "transposed" in cache:
        return True  # cells of one sequence lie between those of another
    if operation is state_set and kind in WINDOW:
        return True  # it may get a cell of the window
    decodes = operation not in (state_get, state_get_own, state_get_all, state_set, save, load)
    return decodes and kind in RECURRENT


def holding(context: Context) -> Literal["stream", "queue"]:
    """Returns how to hold a transfer without making its submitting call wait.

    The queue can hold transfers only on the host.
    """
    return "queue" if moves_at_once(context) and not ON_GPU else "stream"


def cells(*rules: str) -> list[Any]:
    """Returns the cells of the table with these rules, as parameters of a test: transfer,
    operation, kind, cache."""
    transfers: list[Kind] = ["load", "save"]
    return [
        pytest.param(transfer, operation, kind, cache, id=f"{transfer}-{name}-{kind}-{cache}")
        for transfer in transfers
        for row, operations in OPERATIONS.items()
        for operation in operations
        for kind, cache in KINDS
        if rule(transfer, row, kind) in rules and can(operation, kind)
        # One cache is enough for tests that compare no bytes.
        if "yes" in rules or cache == "flash"
        for name in [operation.__name__]
    ]


def test_every_row_of_the_table_is_tested() -> None:
    assert TABLE.keys() == {*OPERATIONS, FREES}
    for operation in OPERATIONS:
        for transfer in TABLE[operation]:
            rules = {rule(transfer, operation, kind) for kind, _ in KINDS}
            assert rules <= {"yes", "no", "waits", "KVF_ERR_BUSY"}


@pytest.mark.parametrize(("transfer", "operation", "kind", "cache"), cells("yes", "waits"))
def test_what_is_allowed_beside_a_transfer_is_done_as_by_llama_cpp(
    cuda: SimulatedCuda,
    alike: Alike,
    transfer: Kind,
    operation: Operation,
    kind: str,
    cache: str,
) -> None:
    ours, like = alike(kind, cache)
    [row] = [row for row, operations in OPERATIONS.items() if operation in operations]
    waits = rule(transfer, row, kind) == "waits"
    held = holding(ours)
    # While a transfer follows a stream, decoding and loading wait in a window.
    off_a_window = held == "stream" and shares_a_window(ours)
    may = waits or off_a_window or may_wait(transfer, operation, kind, cache)
    outcome = beside_a_transfer(
        cuda,
        ours,
        like,
        transfer,
        operation,
        held=held,
        # Operations that must not wait get more time.
        patience=PATIENCE if may else 20,
    )
    assert outcome.differences == []
    assert outcome.status == "KVF_OK"
    assert may or not outcome.waited
    assert outcome.waited or not waits


@pytest.mark.parametrize(("transfer", "operation", "kind", "cache"), cells("no"))
def test_what_is_forbidden_beside_a_transfer_spoils_sequences_and_no_more(
    cuda: SimulatedCuda,
    alike: Alike,
    transfer: Kind,
    operation: Operation,
    kind: str,
    cache: str,
) -> None:
    ours, like = alike(kind, cache)
    outcome = beside_a_transfer(cuda, ours, like, transfer, operation)
    assert outcome.status == "KVF_OK"
    for context in (ours, like):
        context.clear()
    # Nothing spoiled remains in a cleared cache.
    logits = [context.decode(OWN, context.model.prompt(40)) for context in (ours, like)]
    assert logits[0].tobytes() == logits[1].tobytes()
    assert ours.state_get(OWN) == like.state_get(OWN)


@pytest.mark.parametrize(("transfer", "operation", "kind", "cache"), cells("KVF_ERR_BUSY"))
def test_what_is_refused_beside_a_transfer_changes_nothing(
    cuda: SimulatedCuda,
    alike: Alike,
    transfer: Kind,
    operation: Operation,
    kind: str,
    cache: str,
) -> None:
    def attempt(side: Side) -> None:
        if isinstance(side, Ferried):
            with pytest.raises(c_interface.Failure, match="KVF_ERR_BUSY"):
                operation(side)

    ours, like = alike(kind, cache)
    outcome = beside_a_transfer(cuda, ours, like, transfer, attempt, held=holding(ours))
    assert outcome.differences == []
    assert outcome.status == "KVF_OK"


@pytest.mark.parametrize("transfer", ["load", "save"])
@pytest.mark.parametrize(("kind", "cache"), [one for one in KINDS if one[1] == "flash"])
def test_a_context_that_is_freed_ends_its_transfers_first(
    cuda: SimulatedCuda, alike: Alike, kind: str, cache: str, transfer: Kind
) -> None:
    context, _ = alike(kind, cache)
    live_alike(context)
    state = context.state_get(OWN)
    library = c_interface.Library(c_interface.LIBRARY)
    with (
        library.engine(copy_threads=1) as engine,
        cuda.stream() as stream,
        engine.attach(context.address) as attachment,
    ):
        buffer = ctypes.create_string_buffer(state, len(state))
        submit = attachment.load if transfer == "load" else attachment.save
        hold = ByUrgentCopies(engine) if holding(context) == "queue" else ByStream(stream)
        job = submit(OWN, buffer, mode=c_interface.IN_PLACE[transfer], **hold.options)
        was_held = free_beside(context, hold)
        assert job.done
        assert job.wait() == "KVF_ERR_CANCELLED" or not was_held
        hold.release()


SNAPSHOT_ALLOWS = [
    operation
    for row, operations in OPERATIONS.items()
    for operation in operations
    if operation in CHANGES_OWN or operation is decode_own
]


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
    cuda: SimulatedCuda, alike: Alike, kind: str, operation: Operation
) -> None:
    """The call waits for the stream, and has taken the snapshot when it returns."""
    ours, like = alike(kind, "flash")
    outcome = beside_a_transfer(
        cuda, ours, like, "save", operation, mode=c_interface.SaveMode.SNAPSHOT
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
"""The kinds that llama.cpp can shift."""


@CPU_ONLY
@pytest.mark.parametrize("shifted", [OTHER, OWN], ids=["of another sequence", "of its own"])
@pytest.mark.parametrize("transfer", ["load", "save"])
@pytest.mark.parametrize(("kind", "cache"), SHIFTED)
def test_no_byte_moves_while_a_shift_rewrites_the_keys(
    cuda: SimulatedCuda,
    alike: Alike,
    kind: str,
    cache: str,
    transfer: Kind,
    shifted: int,
) -> None:
    """llama.cpp applies a pending shift at its next decode, to all keys of the cache; keys that
    need no shift are rotated by zero. Here the graph is halted after its first operation. At that
    moment quantised keys are outside of the cache, so that loaded bytes would be lost.
    """
    ours, like = alike(kind, cache)
    outcome = beside_a_transfer(
        cuda,
        ours,
        like,
        transfer,
        decode_fourth,
        before=pending_shift(shifted),
        release_at_node=1,
    )
    assert outcome.differences == []
    assert outcome.waited


@pytest.mark.parametrize(
    ("operation", "held"),
    [
        (decode, "stream"),
        (state_set, "stream"),
        (load, "stream"),
        pytest.param(decode, "queue", marks=HOST_ONLY),
        pytest.param(state_set, "queue", marks=HOST_ONLY),
        pytest.param(load, "queue", marks=HOST_ONLY),
    ],
)
@pytest.mark.parametrize("transfer", ["load", "save"])
@pytest.mark.parametrize("kind", WINDOW)
@pytest.mark.parametrize("cache", UNIFIED)
def test_no_cell_of_a_window_that_is_being_moved_goes_to_another_sequence(
    cuda: SimulatedCuda,
    alike: Alike,
    kind: str,
    cache: str,
    transfer: Kind,
    operation: Operation,
    held: Literal["stream", "queue"],
) -> None:
    """A state has the cells that the last token sees through the window. llama.cpp gives cells that
    the next token will not see to other sequences.
    """
    ours, like = alike(kind, cache)
    outcome = beside_a_transfer(cuda, ours, like, transfer, operation, held=held)
    assert outcome.differences == []


@pytest.mark.parametrize("transfer", ["load", "save"])
@pytest.mark.parametrize("cache", ["flash", "streams"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_cell_that_llama_cpp_moves_keeps_its_bytes(
    cuda: SimulatedCuda, alike: Alike, kind: str, cache: str, transfer: Kind
) -> None:
    """Sequences that are decoded in one batch get neighbouring cells. A sequence that has one of
    these cells gets another cell, and the graph copies its state there. A load would still write to
    the old cell, which another sequence has then.
    """
    ours, like = alike(kind, cache)
    outcome = beside_a_transfer(cuda, ours, like, transfer, decode_several)
    assert outcome.differences == []


@pytest.mark.parametrize("transfer", ["load", "save"])
@pytest.mark.parametrize(
    "operation", [decode_own_anew, decode_another_end_of_own, remove_within_own, load_within_own]
)
@pytest.mark.parametrize(
    ("kind", "cache"), [one for one in KINDS if one[0] in ("llama", "deepseek2")]
)
def test_rows_of_the_sequence_that_are_given_away_are_noticed(
    cuda: SimulatedCuda,
    alike: Alike,
    kind: str,
    cache: str,
    operation: Operation,
    transfer: Kind,
) -> None:
    """Where its first and last position do not tell that something has been done to it."""
    if not NAMES_ROWS and operation is not load_within_own:
        pytest.skip(f"graphs of {BUILD} do not tell which rows they write")
    ours, like = alike(kind, cache)
    outcome = beside_a_transfer(cuda, ours, like, transfer, operation)
    assert outcome.differences == []
    assert outcome.status == "KVF_OK"


@pytest.mark.parametrize(("kind", "cache"), SHIFTED)
def test_a_sequence_is_saved_as_it_was_before_its_pending_shift(
    cuda: SimulatedCuda, alike: Alike, kind: str, cache: str
) -> None:
    ours, like = alike(kind, cache)
    outcome = beside_a_transfer(cuda, ours, like, "save", decode_fourth, before=pending_shift(OWN))
    assert outcome.differences == []


@pytest.mark.parametrize("transfer", ["load", "save"])
@pytest.mark.parametrize("cache", SEPARATE)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "hybrid", "deepseek2"])
def test_a_sequence_onto_which_another_is_to_be_copied_is_moved_before(
    cuda: SimulatedCuda, alike: Alike, kind: str, cache: str, transfer: Kind
) -> None:
    """llama.cpp copies between streams at its next decode, and overwrites a load before that."""
    ours, like = alike(kind, cache)
    outcome = beside_a_transfer(
        cuda, ours, like, transfer, decode_fourth, before=pending_copy(OTHER, OWN)
    )
    assert outcome.differences == []


@pytest.mark.parametrize("cache", SEPARATE)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "hybrid", "deepseek2"])
def test_a_sequence_that_is_to_be_copied_is_loaded_before(
    cuda: SimulatedCuda, alike: Alike, kind: str, cache: str
) -> None:
    """llama.cpp copies what has been loaded. So must kvferry's context."""
    ours, like = alike(kind, cache)
    outcome = beside_a_transfer(
        cuda, ours, like, "load", decode_fourth, before=pending_copy(OWN, SPARE)
    )
    assert outcome.differences == []


@pytest.mark.parametrize("flags", [0, c_interface.FORCE_BLOCKING], ids=["tap", "blocking"])
def test_a_load_reads_a_state_when_its_stream_has_written_it(
    cuda: SimulatedCuda, make_context: MakeContext, flags: int
) -> None:
    """A copy to pinned memory that the stream still has to do, and that nothing has sealed."""
    context = make_context("llama")
    live_alike(context)
    state = context.state_get(OWN)
    library = c_interface.Library(c_interface.LIBRARY)
    with (
        library.engine() as engine,
        cuda.stream() as stream,
        engine.attach(context.address, flags) as attachment,
        engine.allocate(len(state)) as buffer,
        cf.ThreadPoolExecutor(1) as pool,
    ):
        ctypes.memset(buffer, 0xFF, len(state))
        stream.hold()
        job = pool.submit(attachment.load, SPARE, buffer, stream=stream.handle)
        time.sleep(0.05)
        waited = not job.done()
        ctypes.memmove(buffer, state, len(state))
        stream.release()
        assert job.result(20).wait() == "KVF_OK"
        assert waited
        assert context.pos_max(SPARE) == 39
