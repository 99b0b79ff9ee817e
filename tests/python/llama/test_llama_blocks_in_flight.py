"""Blocks and checkpoints in flight: beside decoding, cancelled, and while their buffers are in use.

Transfers follow a stream that is held (support/holds.py), so that they are certainly in flight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from support.block_histories import HISTORIES, SEQ, SEQUENCES, TARGET, options
from support.block_reference import (
    PARTS_IN_BLOCKS,
    WITH_CHECKPOINTS,
    beginning_of,
    cut_by_format,
)
from support.blocks import LIBRARY, MakePair, others, ranges_of, save_blocks, save_checkpoint
from support.c_interface import Attachment, Block, Blocks, Engine, Failure, LoadMode, SaveMode
from support.cuda_driver import NEEDS_CUDA
from support.devices import ON_GPU
from support.empty_windows import KEPT, cut_off_the_end, lose_the_window
from support.holds import ByStream, ByUrgentCopies, free_beside, released_after
from support.like_contexts import MakeContext
from support.llama_reference import Logits, Refused
from support.simulated_cuda import SimulatedCuda

pytestmark = NEEDS_CUDA

PATIENCE = 0.05
"""Seconds after which a transfer is released that a decode waits for."""

kinds = pytest.mark.parametrize("kind", PARTS_IN_BLOCKS)
caches = pytest.mark.parametrize("cache", ["flash", "transposed", "streams"])
load_modes = pytest.mark.parametrize("mode", [LoadMode.IN_PLACE, LoadMode.AHEAD])


@pytest.fixture
def engine(cuda: SimulatedCuda) -> Iterator[Engine]:
    with LIBRARY.engine(copy_threads=1) as engine:
        yield engine


def saved(attachment: Attachment, kind: str, state: bytes) -> tuple[list[Block], bytes | None]:
    blocks = save_blocks(attachment, ranges_of(state, kind))
    return blocks, save_checkpoint(attachment) if kind in WITH_CHECKPOINTS else None


def is_refused(call: Callable[[], object], status: str) -> bool:
    with pytest.raises(Failure) as failure:
        call()
    return failure.value.name == status


def are_equal(some: dict[int, Logits], others: dict[int, Logits]) -> bool:
    def as_bytes(logits: dict[int, Logits]) -> dict[int, bytes]:
        return {seq: each.tobytes() for seq, each in logits.items()}

    return as_bytes(some) == as_bytes(others)


@kinds
@caches
def test_blocks_are_saved_as_they_were_while_decoding_goes_on(
    cuda: SimulatedCuda, engine: Engine, pair: MakePair, kind: str, cache: str
) -> None:
    ours, like = pair(kind, cache)
    for context in (ours, like):
        HISTORIES["at_random"](context)
    state = ours.state_get(SEQ)
    with cuda.stream() as stream, engine.attach(ours.address) as attachment:
        blocks = Blocks.with_room(ranges_of(state, kind), attachment.block_size(16))
        hold = ByStream(stream)
        with released_after(60, hold) as waited:
            job = attachment.save_blocks(SEQ, blocks, mode=SaveMode.IN_PLACE, **hold.options)
        assert not waited.is_set()
        for tokens in (1, 40):
            with released_after(PATIENCE, hold):
                logits = ours.decode_in_turn([SEQ, 1, 2], tokens)
            assert are_equal(logits, like.decode_in_turn([SEQ, 1, 2], tokens))
        for context in (ours, like):
            context.seq_rm(3)
        hold.release()
        assert job.wait() == "KVF_OK"
        for block in blocks.read():
            assert block.state == cut_by_format(kind, state, block.begin, block.end)
    assert others(ours) == others(like)


@pytest.mark.parametrize("what", ["state", "blocks"])
def test_a_sequence_without_a_window_is_saved_as_it_was_when_its_cells_go_to_others(
    cuda: SimulatedCuda, engine: Engine, pair: MakePair, what: str
) -> None:
    """No position tells that it has been removed, since libllama says that it is empty."""
    both = pair("gemma3", "flash")
    state = lose_the_window(both, cut_off_the_end)
    with cuda.stream() as stream, engine.attach(both[0].address) as attachment:
        hold = ByStream(stream)
        with released_after(PATIENCE, hold):
            if what == "state":
                buffer = ctypes.create_string_buffer(len(state))
                job = attachment.save(SEQ, buffer, mode=SaveMode.IN_PLACE, **hold.options)
            else:
                blocks = Blocks.with_room([(0, KEPT)], len(state))
                job = attachment.save_blocks(SEQ, blocks, **hold.options)
        for context in both:
            context.seq_rm(SEQ)
        with released_after(PATIENCE, hold):
            logits = both[0].decode_in_turn([3], 64)
        assert are_equal(logits, both[1].decode_in_turn([3], 64))
        hold.release()
        assert job.wait() == "KVF_OK"
    if what == "state":
        assert buffer.raw == state
    else:
        assert blocks.read()[0].state == beginning_of("gemma3", state)


@kinds
@pytest.mark.parametrize("cache", ["flash", "transposed"])  # sequences share no other cells
def test_the_beginning_of_a_sequence_goes_to_others_while_its_blocks_are_saved(
    cuda: SimulatedCuda, engine: Engine, pair: MakePair, kind: str, cache: str
) -> None:
    """libllama does not tell the first position of a sequence with sliding windows."""
    if "hybrid" in kind:
        pytest.skip("libllama removes no beginning of a recurrent sequence")
    ours, like = pair(kind, cache)
    for context in (ours, like):
        HISTORIES["contiguous"](context)
    state = ours.state_get(SEQ)
    ranges = ranges_of(state, kind)
    with cuda.stream() as stream, engine.attach(ours.address) as attachment:
        blocks = Blocks.with_room(ranges, attachment.block_size(64))
        hold = ByStream(stream)
        with released_after(PATIENCE, hold):
            job = attachment.save_blocks(SEQ, blocks, **hold.options)
        removed = 40
        others_take = 512 - (ranges[-1][1] - removed)  # all cells that are free then
        for context in (ours, like):
            context.seq_rm(SEQ, 0, removed)
        prompt = ours.model.prompt(others_take, seed=1)
        with released_after(PATIENCE, hold):
            logits = ours.decode(3, prompt)
        assert logits.tobytes() == like.decode(3, prompt).tobytes()
        hold.release()
        assert job.wait() == "KVF_OK"
        for block in blocks.read():
            assert block.state == cut_by_format(kind, state, block.begin, block.end)
    assert others(ours) == others(like)


@kinds
@caches
@load_modes
def test_other_sequences_are_decoded_while_blocks_are_loaded(
    cuda: SimulatedCuda, engine: Engine, pair: MakePair, kind: str, cache: str, mode: LoadMode
) -> None:
    ours, like = pair(kind, cache)
    for context in (ours, like):
        HISTORIES["in_turn"](context)
    state = ours.state_get(SEQ)
    with cuda.stream() as stream, engine.attach(ours.address) as attachment:
        blocks, checkpoint = saved(attachment, kind, state)
        hold = ByStream(stream)
        with released_after(PATIENCE, hold):
            job = attachment.load_blocks(
                TARGET, Blocks.of(blocks), checkpoint, mode=mode, **hold.options
            )
        assert like.state_set(TARGET, state) == len(state)
        with released_after(PATIENCE, hold):
            logits = ours.decode_in_turn([SEQ, 1, 2], 30)
        assert are_equal(logits, like.decode_in_turn([SEQ, 1, 2], 30))
        hold.release()
        assert job.wait() == "KVF_OK"
        assert ours.state_get(TARGET) == like.state_get(TARGET)
        assert others(ours) == others(like)
    assert ours.decode(TARGET, [7]).tobytes() == like.decode(TARGET, [7]).tobytes()


@kinds
@caches
@load_modes
@pytest.mark.parametrize("taken", [False, True], ids=["empty", "taken"])
def test_a_cancelled_load_leaves_the_sequence_empty_and_the_others_alone(
    cuda: SimulatedCuda,
    engine: Engine,
    pair: MakePair,
    kind: str,
    cache: str,
    mode: LoadMode,
    taken: bool,
) -> None:
    ours, _ = pair(kind, cache)
    HISTORIES["in_turn"](ours)
    empty = ours.state_get(TARGET)
    if taken:
        ours.decode(TARGET, ours.model.prompt(20))
    before = others(ours)
    with cuda.stream() as stream, engine.attach(ours.address) as attachment:
        blocks, checkpoint = saved(attachment, kind, before[SEQ])
        hold = ByStream(stream)
        given = Blocks.of(blocks)
        with released_after(PATIENCE, hold) as waited:
            job = attachment.load_blocks(TARGET, given, checkpoint, mode=mode, **hold.options)
        if not waited.is_set():
            job.cancel()
        hold.release()
        if job.wait() == "KVF_ERR_CANCELLED":
            assert attachment.settle() == 1
        else:
            assert waited.is_set()
            attachment.remove(TARGET)
        assert ours.state_get(TARGET) == empty
        assert others(ours) == before
        assert given.read() == blocks
        # The same blocks are loaded as if nothing had happened.
        assert attachment.load_blocks(TARGET, given, checkpoint).wait() == "KVF_OK"
        assert others(ours) == before


def test_every_cell_can_be_used_after_cancelled_loads(
    cuda: SimulatedCuda, engine: Engine, make_context: MakeContext
) -> None:
    context = make_context("llama", n_ctx=256)
    context.decode(0, context.model.prompt(60))
    with cuda.stream() as stream, engine.attach(context.address) as attachment:
        blocks = Blocks.of(save_blocks(attachment, [(0, 30), (30, 60)]))
        for seq in (1, 2, 3) * 4:
            hold = ByStream(stream)
            job = attachment.load_blocks(seq, blocks, **hold.options)
            job.cancel()
            hold.release()
            assert job.wait() == "KVF_ERR_CANCELLED"
            # A save settles what is left before it borrows a sequence.
            save_blocks(attachment, [(50, 60)])
            assert context.pos_max(seq) == -1
    context.decode(1, context.model.prompt(196))
    with pytest.raises(Refused):
        context.decode(1, [1])


@pytest.mark.parametrize("kind", ["llama", "gemma3", "hybrid"])
def test_a_cancelled_save_leaves_everything_as_it_was(
    cuda: SimulatedCuda, engine: Engine, pair: MakePair, kind: str
) -> None:
    ours, _ = pair(kind, "flash")
    HISTORIES["in_turn"](ours)
    before = [ours.state_get(seq) for seq in range(SEQUENCES)]
    with cuda.stream() as stream, engine.attach(ours.address) as attachment:
        blocks = Blocks.with_room([(0, 16), (16, 45)], attachment.block_size(29))
        hold = ByStream(stream)
        job = attachment.save_blocks(SEQ, blocks, mode=SaveMode.IN_PLACE, **hold.options)
        job.cancel()
        hold.release()
        assert job.wait() == "KVF_ERR_CANCELLED"
        assert attachment.settle() == 0
        assert [ours.state_get(seq) for seq in range(SEQUENCES)] == before


def test_transfers_of_one_sequence_refuse_each_other(
    cuda: SimulatedCuda, engine: Engine, pair: MakePair
) -> None:
    ours, _ = pair("llama", "flash")
    HISTORIES["in_turn"](ours)
    with cuda.stream() as stream, engine.attach(ours.address) as attachment:
        blocks = Blocks.of(save_blocks(attachment, [(0, 16), (16, 45)]))
        room = Blocks.with_room([(0, 16)], attachment.block_size(16))
        buffer = ctypes.create_string_buffer(attachment.size(SEQ))

        hold = ByStream(stream)
        load = attachment.load_blocks(TARGET, blocks, **hold.options)
        assert is_refused(lambda: attachment.load_blocks(TARGET, blocks), "KVF_ERR_BUSY")
        assert is_refused(lambda: attachment.save_blocks(TARGET, room), "KVF_ERR_BUSY")
        assert is_refused(lambda: attachment.save(TARGET, buffer), "KVF_ERR_BUSY")
        assert is_refused(lambda: attachment.remove(TARGET), "KVF_ERR_BUSY")
        hold.release()
        assert load.wait() == "KVF_OK"

        hold = ByStream(stream)
        save = attachment.save_blocks(SEQ, room, **hold.options)
        assert is_refused(lambda: attachment.load_blocks(SEQ, blocks), "KVF_ERR_BUSY")
        assert is_refused(lambda: attachment.remove(SEQ), "KVF_ERR_BUSY")
        further = Blocks.with_room([(16, 32)], attachment.block_size(16))
        second = attachment.save_blocks(SEQ, further, **hold.options)
        hold.release()
        assert save.wait() == second.wait() == "KVF_OK"
        state = ours.state_get(SEQ)
        for block in (*room.read(), *further.read()):
            assert block.state == cut_by_format("llama", state, block.begin, block.end)


@pytest.mark.parametrize("direction", ["save", "load"])
@pytest.mark.skipif(ON_GPU, reason="the queue holds transfers on the host alone")
def test_no_buffer_of_a_block_is_freed_while_it_is_in_use(
    cuda: SimulatedCuda, engine: Engine, pair: MakePair, direction: str
) -> None:
    ours, _ = pair("llama", "flash")
    HISTORIES["in_turn"](ours)
    ranges = [(0, 16), (16, 32), (32, 45)]
    with engine.attach(ours.address) as attachment, ExitStack() as pool:
        size = attachment.block_size(16)
        buffers = [pool.enter_context(engine.allocate(size)) for _ in range(3)]
        blocks = Blocks(ranges, buffers)
        assert attachment.save_blocks(SEQ, blocks).wait() == "KVF_OK"
        # A load from pinned memory would wait for a stream during the call.
        hold = ByUrgentCopies(engine)
        pool.callback(hold.release)
        if direction == "load":
            job = attachment.load_blocks(TARGET, blocks, **hold.options)
        else:
            job = attachment.save_blocks(SEQ, blocks, **hold.options)
        for buffer in buffers:
            address = ctypes.c_void_p(ctypes.addressof(buffer))
            assert is_refused(lambda a=address: LIBRARY.call("kvf_buffer_free", a), "KVF_ERR_BUSY")
        hold.release()
        assert job.wait() == "KVF_OK"


@pytest.mark.parametrize("direction", ["save", "load"])
def test_a_context_that_is_freed_ends_its_transfers(
    cuda: SimulatedCuda, engine: Engine, make_context: MakeContext, direction: str
) -> None:
    context = make_context("llama", **options("flash"))
    HISTORIES["in_turn"](context)
    with cuda.stream() as stream, engine.attach(context.address) as attachment:
        blocks = Blocks.of(save_blocks(attachment, [(0, 16), (16, 45)]))
        hold = ByStream(stream)
        if direction == "load":
            job = attachment.load_blocks(TARGET, blocks, **hold.options)
        else:
            job = attachment.save_blocks(SEQ, blocks, **hold.options)
        was_held = free_beside(context, hold)
        assert job.done
        assert job.wait() == "KVF_ERR_CANCELLED" or not was_held
        hold.release()
