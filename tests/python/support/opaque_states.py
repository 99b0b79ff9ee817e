"""Saves and loads states in a format that kvferry does not know.

test_llama_opaque.py runs it in a process of its own, because a process has only one libllama
(unknown_format.py), and because a damaged state that reaches libllama may end the process:

    python -m support.opaque_states CASE MODEL FOREIGN OPTIONS

OPTIONS are ContextOptions as JSON. FOREIGN is a model with other metadata, whose states MODEL would
accept. Every case runs with the tap and without.
"""

from __future__ import annotations

import concurrent.futures as cf
import contextlib
import ctypes
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import kvferry
import numpy as np
import pytest

from support.c_interface import (
    FORCE_BLOCKING,
    LIBRARY,
    Attachment,
    Devices,
    Engine,
    Failure,
    Library,
)
from support.devices import ON_GPU
from support.llama_reference import Context, ContextOptions, Model
from support.simulated_cuda import SimulatedCuda

ENVELOPE = 64
SOURCE, TARGET = 0, 2
TOKENS = 20


@dataclasses.dataclass
class Scene:
    """Two equal contexts: `ours` for kvferry, `like` for llama.cpp's own calls."""

    model: Model
    foreign: Model
    options: ContextOptions
    engine: Engine
    ours: Context
    like: Context
    flags: int

    @contextlib.contextmanager
    def attached(self, context: Context | None = None) -> Iterator[Attachment]:
        with self.engine.attach((context or self.ours).address, self.flags) as attachment:
            yield attachment

    @contextlib.contextmanager
    def fresh(self) -> Iterator[tuple[Context, Attachment]]:
        """A context that has never held a cell."""
        with self.model.context(self.options) as context, self.attached(context) as attachment:
            yield context, attachment

    @property
    def by_tap(self) -> bool:
        return not self.flags & FORCE_BLOCKING


def buffer_of(state: bytes) -> Any:
    return (ctypes.c_uint8 * len(state)).from_buffer_copy(state)


def save(attachment: Attachment, sequence: int) -> bytes:
    buffer = buffer_of(bytes(attachment.size(sequence)))
    assert attachment.save(sequence, buffer).wait() == "KVF_OK"
    return bytes(buffer)


def load(attachment: Attachment, state: bytes, **options: Any) -> str:
    """Returns KVF_OK, or the name and the text of the error of the call or the job."""
    try:
        job = attachment.load(TARGET, buffer_of(state), **options)
    except Failure as failure:
        return str(failure)
    status = job.wait()
    return status if status == "KVF_OK" else f"{status}: {job.detail}"


# ---- The cases -----------------------------------------------------------------------------------


def describe_says_that_the_format_is_not_known(scene: Scene) -> None:
    with scene.attached() as attachment:
        attachment.size(SOURCE)  # looks at it
        said = json.loads(attachment.describe())
    assert said["format"] == "opaque"
    assert said["guarded_by"] == "envelope"
    assert said["default_mode"] == "snapshot"
    assert said["tap"] == scene.by_tap


def a_sequence_is_moved_as_by_llama_cpp(scene: Scene) -> None:
    ours, like = scene.ours, scene.like
    state = like.state_get(SOURCE)
    for target in (TARGET, 1):  # an empty one, and one that is replaced
        with scene.attached() as attachment:
            sealed = save(attachment, SOURCE)
            assert sealed[:-ENVELOPE] == state
            assert attachment.load(target, buffer_of(sealed)).wait() == "KVF_OK"
            assert like.state_set(target, state) == len(state)
            again = save(attachment, target)
            assert again[:-ENVELOPE] == like.state_get(target)
        assert ours.state_get(target) == like.state_get(target)
        for seq in (target, SOURCE):
            assert np.array_equal(ours.decode(seq, [7]), like.decode(seq, [7]))
        state = like.state_get(SOURCE)


def a_state_goes_to_a_context_that_has_held_nothing_yet(scene: Scene) -> None:
    with scene.attached() as attachment:
        sealed = save(attachment, SOURCE)
    with scene.fresh() as (ours, attachment), scene.model.context(scene.options) as like:
        assert load(attachment, sealed) == "KVF_OK"
        like.state_set(TARGET, sealed[:-ENVELOPE])
        assert ours.state_get(TARGET) == like.state_get(TARGET)
        assert np.array_equal(ours.decode(TARGET, [7]), like.decode(TARGET, [7]))


def the_size_has_room_for_the_envelope(scene: Scene) -> None:
    with scene.attached() as attachment:
        bare = scene.ours.state_size(SOURCE)
        size = attachment.size(SOURCE)
        assert size == bare + ENVELOPE
        for less in (1, bare, size - 1):
            with pytest.raises(Failure, match="KVF_ERR_BUFFER_TOO_SMALL"):
                attachment.save(SOURCE, buffer_of(bytes(less)))
        larger = buffer_of(b"\xa5" * (size + 100))
        assert attachment.save(SOURCE, larger).wait() == "KVF_OK"
        assert bytes(larger)[size:] == b"\xa5" * 100
        assert load(attachment, bytes(larger)[:size]) == "KVF_OK"


@contextlib.contextmanager
def targets(scene: Scene) -> Iterator[tuple[bytes, Callable[[bytes, str], None]]]:
    """Returns a state, and a function that asserts that a state is refused without any loss: by a
    sequence that holds cells, and by a context that has held nothing yet.
    """
    with scene.attached() as attachment, scene.fresh() as (fresh, of_fresh):
        sealed = save(attachment, SOURCE)
        assert load(attachment, sealed) == "KVF_OK"
        held, empty = scene.ours.state_get(TARGET), fresh.state_get(TARGET)

        def refuse(state: bytes, reason: str) -> None:
            for context, target, before in (
                (scene.ours, attachment, held),
                (fresh, of_fresh, empty),
            ):
                said = load(target, state)
                assert said.startswith(reason), (said, context is fresh)
                assert context.state_get(TARGET) == before, (said, context is fresh)

        yield sealed, refuse
        assert load(attachment, sealed) == load(of_fresh, sealed) == "KVF_OK"
        assert scene.ours.state_get(TARGET) == held


def a_truncated_state_is_refused(scene: Scene) -> None:
    with targets(scene) as (sealed, refuse):
        step = max(1, len(sealed) // 97)
        ends = {*range(1, len(sealed), step), *range(len(sealed) - ENVELOPE - 8, len(sealed))}
        for end in sorted(ends):
            refuse(sealed[:end], "KVF_ERR_STATE_DAMAGED")
        for begin in (1, 4, 8, 1000, len(sealed) - ENVELOPE):  # with the envelope, and less
            refuse(sealed[begin:], "KVF_ERR_STATE_DAMAGED")
        refuse(sealed + bytes(1), "KVF_ERR_STATE_DAMAGED")
        refuse(sealed + sealed, "KVF_ERR_STATE_DAMAGED")


def a_state_with_a_flipped_bit_is_refused(scene: Scene) -> None:
    with targets(scene) as (sealed, refuse):
        begin = len(sealed) - ENVELOPE
        anywhere = [(at, at % 8) for at in [*range(64), *range(64, begin, max(1, begin // 199))]]
        envelope = [(at, bit) for at in range(begin, len(sealed)) for bit in range(8)]
        for at, bit in [*anywhere, *envelope]:
            flipped = bytearray(sealed)
            flipped[at] ^= 1 << bit
            refuse(bytes(flipped), "KVF_ERR_STATE_DAMAGED")


def a_state_of_another_model_is_refused(scene: Scene) -> None:
    with scene.foreign.context(scene.options) as context:
        context.decode(SOURCE, context.model.prompt(TOKENS))
        with scene.attached(context) as attachment:
            foreign = save(attachment, SOURCE)
    with targets(scene) as (sealed, refuse):
        assert len(foreign) == len(sealed)
        refuse(foreign, "KVF_ERR_STATE_MISMATCH")
        refuse(foreign[:-ENVELOPE] + sealed[-ENVELOPE:], "KVF_ERR_STATE_DAMAGED")
        refuse(sealed[:-ENVELOPE] + foreign[-ENVELOPE:], "KVF_ERR_STATE_MISMATCH")


def a_state_without_envelope_is_loaded_only_if_it_is_trusted(scene: Scene) -> None:
    with targets(scene) as (sealed, refuse):
        refuse(sealed[:-ENVELOPE], "KVF_ERR_STATE_DAMAGED")
        bare = sealed[:-ENVELOPE]
    with scene.attached() as attachment, scene.fresh() as (fresh, of_fresh):
        for context, target in ((scene.ours, attachment), (fresh, of_fresh)):
            context.seq_rm(TARGET)
            assert load(target, bare, trust=True) == "KVF_OK"
            assert context.pos_max(TARGET) == TOKENS - 1
            assert save(target, TARGET)[-ENVELOPE:] != bytes(ENVELOPE)
            # An envelope is verified nevertheless.
            flipped = bytearray(sealed)
            flipped[100] ^= 1
            assert load(target, bytes(flipped), trust=True).startswith("KVF_ERR_STATE_DAMAGED")
            assert context.pos_max(TARGET) == TOKENS - 1


def a_trusted_load_that_fails_leaves_nothing_or_says_so(scene: Scene) -> None:
    ours = scene.ours
    with scene.attached() as attachment:
        empty = ours.state_size(3)
        bare = save(attachment, SOURCE)[:-ENVELOPE]
        step = max(1, len(bare) // 61)
        for end in [*range(1, 64, 3), *range(64, len(bare), step), len(bare) - 1]:
            assert load(attachment, bare, trust=True) == "KVF_OK"
            said = load(attachment, bare[:end], trust=True)
            assert said.startswith("KVF_ERR_LLAMA"), (end, said)
            attachment.settle()
            left = ours.pos_max(TARGET) != -1 or ours.state_size(TARGET) != empty
            assert left == ("only llama_memory_clear() frees" in said), (end, said)
            if left:
                ours.clear()
        ours.clear()
        ours.decode(TARGET, ours.model.prompt(TOKENS))
        assert load(attachment, save(attachment, TARGET)) == "KVF_OK"


def a_trusted_load_that_leaves_cells_behind_says_so(scene: Scene) -> None:
    """Returns a state of a plain attention cache that ends too early. All its cells but one have
    negative positions, as no sequence of libllama has.
    """
    ours = scene.ours
    empty = ours.state_size(TARGET)
    with scene.attached() as attachment:
        bare = bytearray(save(attachment, SOURCE)[:-ENVELOPE])
        for cell in range(1, TOKENS):
            at = 16 + 12 * cell  # after number, id, streams and cells
            assert int.from_bytes(bare[at : at + 4], "little") == cell
            bare[at : at + 4] = (-5).to_bytes(4, "little", signed=True)
        said = load(attachment, bytes(bare[:-1]), trust=True)
        attachment.settle()
    assert ours.state_size(TARGET) > empty
    assert said.endswith("it left cells behind that only llama_memory_clear() frees"), said


def a_load_that_is_cancelled_ends_once(scene: Scene) -> None:
    """A load is cancelled while the caller waits, or too late: the sequence is empty, or loaded."""

    def check(outcome: str) -> None:
        attachment.settle()
        last = TOKENS - 1 if outcome == "KVF_OK" else -1
        assert scene.ours.pos_max(TARGET) == last, outcome
        outcomes.add(outcome.split(":")[0])

    def seconds_of_a_load() -> float:
        begin = time.perf_counter()
        assert load(attachment, sealed) == "KVF_OK"
        return time.perf_counter() - begin

    outcomes: set[str] = set()
    with scene.attached() as attachment:
        sealed = save(attachment, SOURCE)
        # On a GPU the first load takes many times as long as later ones. Cancels that were spread
        # over its time would all come too late.
        assert load(attachment, sealed) == "KVF_OK"
        seconds = min(seconds_of_a_load() for _ in range(3))
        for part in range(40):
            canceller = threading.Timer(seconds * part / 40, scene.engine.cancel)
            canceller.start()
            outcome = load(attachment, sealed)
            canceller.join()
            check(outcome)
        assert "KVF_OK" in outcomes
        # libllama's own call, without the tap, is not interrupted. A GPU moves so few bytes sooner
        # than a timer can meet.
        assert "KVF_ERR_CANCELLED" in outcomes or not scene.by_tap or ON_GPU
        assert outcomes <= {"KVF_OK", "KVF_ERR_CANCELLED"}
        job = attachment.load(TARGET, buffer_of(sealed))
        job.cancel()
        check(job.wait())
        assert save(attachment, SOURCE) == sealed


def a_load_waits_for_the_stream_before_it_verifies(scene: Scene) -> None:
    """On the simulated device: a state that a stream is still writing is not damaged."""
    driver = SimulatedCuda.open()
    assert driver is not None
    os.environ["KVFERRY_CUDA_DRIVER"] = driver.path
    with scene.attached() as attachment:
        sealed = save(attachment, SOURCE)
    contexts = [scene.ours, scene.model.context(scene.options)]
    with Library(LIBRARY).engine(Devices.CUDA) as engine, cf.ThreadPoolExecutor(1) as pool:
        for context in contexts:
            with (
                engine.attach(context.address, scene.flags) as attachment,
                driver.stream() as stream,
            ):
                buffer = buffer_of(sealed)
                buffer[1000] ^= 1
                stream.hold()
                job = pool.submit(attachment.load, TARGET, buffer, stream=stream.handle)
                time.sleep(0.05)
                assert not job.done()
                buffer[1000] ^= 1
                stream.release()
                assert job.result(20).wait() == "KVF_OK"
                assert context.pos_max(TARGET) == TOKENS - 1
    contexts[1].close()


def python_loads_what_it_is_told_to_trust(scene: Scene) -> None:
    if not scene.by_tap:
        return  # it asks for blocking calls only where there is no tap

    async def go() -> None:
        async with kvferry.Engine("host") as engine:
            llama = engine.attach(scene.ours.address)
            snapshot = await llama.save(SOURCE)
            state = snapshot.to_bytes()
            assert len(state) == llama.size(SOURCE)
            await llama.load(snapshot, TARGET)
            before = scene.ours.state_get(TARGET)
            with pytest.raises(kvferry.StateDamaged):
                await llama.load(state[:-ENVELOPE], TARGET)
            assert scene.ours.state_get(TARGET) == before
            await llama.load(state[:-ENVELOPE], TARGET, trust=True)
            transfer = await llama.start_load(state[:-ENVELOPE], TARGET, trust=True)
            await transfer.wait()
            assert scene.ours.pos_max(TARGET) == TOKENS - 1

    anyio.run(go)


CASES: dict[str, Callable[[Scene], None]] = {
    case.__name__: case
    for case in (
        describe_says_that_the_format_is_not_known,
        a_sequence_is_moved_as_by_llama_cpp,
        a_state_goes_to_a_context_that_has_held_nothing_yet,
        the_size_has_room_for_the_envelope,
        a_truncated_state_is_refused,
        a_state_with_a_flipped_bit_is_refused,
        a_state_of_another_model_is_refused,
        a_state_without_envelope_is_loaded_only_if_it_is_trusted,
        a_trusted_load_that_fails_leaves_nothing_or_says_so,
        a_trusted_load_that_leaves_cells_behind_says_so,
        a_load_that_is_cancelled_ends_once,
        a_load_waits_for_the_stream_before_it_verifies,
        python_loads_what_it_is_told_to_trust,
    )
}


def main() -> None:
    name, path, foreign, options = sys.argv[1:]
    with contextlib.ExitStack() as stack:
        model, other = (stack.enter_context(Model(each)) for each in (path, foreign))
        chosen = ContextOptions(**json.loads(options))
        for flags in (0, FORCE_BLOCKING):
            with (
                model.context(chosen) as ours,
                model.context(chosen) as like,
                Library(LIBRARY).engine(Devices.HOST) as engine,
            ):
                for context in (ours, like):
                    context.decode_in_turn([SOURCE, 1], TOKENS)
                CASES[name](Scene(model, other, chosen, engine, ours, like, flags))


if __name__ == "__main__":
    main()
