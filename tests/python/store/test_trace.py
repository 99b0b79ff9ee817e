"""The trace of a restore: one file with what the store and the engine did, on one clock."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import anyio
import kvferry
import pytest
from disk_stores import BLOCK, TOKENS, prompted
from kvferry import Store, TraceSpan
from support.event_loops import anyio_backend  # noqa: F401
from support.faulty_objects import FaultyObjects
from support.like_contexts import MakeContext

pytestmark = pytest.mark.anyio

Event = dict[str, Any]


def traced_store(folder: Path | None, remote: FaultyObjects | None = None) -> Store:
    return Store(
        ram="64 MiB",
        disk=folder,
        disk_limit="1 GiB" if folder else None,
        remote=remote,
        block_tokens=BLOCK,
        trace=True,
    )


def events_of(path: Path) -> list[Event]:
    """The spans of a trace in Chrome's JSON format, with `end`; the names of their lanes."""
    trace = json.loads(path.read_text())
    names = {
        (each["pid"], each["tid"]): each["args"]["name"]
        for each in trace["traceEvents"]
        if each["ph"] == "M" and each["name"] == "thread_name"
    }
    spans = [each for each in trace["traceEvents"] if each["ph"] == "X"]
    for each in spans:
        each["end"] = each["ts"] + each["dur"]
        each["lane"] = names[each["pid"], each["tid"]]
    return spans


def assert_spans_nest(events: list[Event]) -> None:
    """Two spans of a lane are one in the other, or apart: else Perfetto drops one of them."""
    lanes = defaultdict(list)
    for each in events:
        lanes[each["pid"], each["tid"]].append(each)
    for spans in lanes.values():
        spans.sort(key=lambda each: (each["ts"], -each["end"]))
        around: list[Event] = []
        for each in spans:
            while around and around[-1]["end"] <= each["ts"]:
                around.pop()
            assert not around or each["end"] <= around[-1]["end"], (each, around[-1])
            around.append(each)


def named(events: list[Event], name: str) -> list[Event]:
    return [each for each in events if each["name"] == name]


def within(inner: Event, outer: Event) -> bool:
    # A microsecond has three decimals there: a sum of two may be off by one of the last.
    return bool(outer["ts"] - 2e-3 <= inner["ts"] and inner["end"] <= outer["end"] + 2e-3)


async def test_a_restore_from_the_folder(make_context: MakeContext, tmp_path: Path) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine("host", trace=True) as engine:
        llama = engine.attach(context.address)
        async with traced_store(tmp_path / "store") as store:
            await store.keep(llama, 0, prompt)
        engine.trace()
        async with traced_store(tmp_path / "store") as store:
            begin = time.monotonic_ns()
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
            end = time.monotonic_ns()
            kvferry.write_trace(tmp_path / "trace.json", store.trace(), engine.trace())
            assert store.trace() == [], "taken"
    events = events_of(tmp_path / "trace.json")
    assert_spans_nest(events)
    [restore] = named(events, "restore")
    assert begin / 1e3 <= restore["ts"] < restore["end"] <= end / 1e3
    [find], [bring], [load] = (named(events, name) for name in ("find", "bring", "load"))
    assert find["end"] <= bring["ts"] < bring["end"] <= load["ts"]
    assert all(within(each, restore) for each in events)
    # Each block is read once, in a lane of its own beside the others.
    reads = named(events, "read disk")
    files = [path.stat().st_size for path in (tmp_path / "store/parts").glob("*.block")]
    assert sorted(each["args"]["bytes"] + 4096 for each in reads) == sorted(files)
    assert len({each["lane"] for each in reads}) > 1
    assert all(within(each, bring) for each in [*reads, *named(events, "wait for a buffer")])
    # The load has what the engine has moved.
    pieces = named(events, "load piece")
    assert pieces
    assert all(within(each, load) for each in pieces)
    assert sum(each["args"]["bytes"] for each in pieces) > 0
    assert load["args"]["tokens"] == TOKENS


async def test_a_restore_from_an_object_store(make_context: MakeContext, tmp_path: Path) -> None:
    context, prompt = prompted(make_context, "hybrid")
    objects = FaultyObjects()
    async with kvferry.Engine("host", trace=True) as engine:
        llama = engine.attach(context.address)
        async with traced_store(None, objects) as store:
            await store.keep(llama, 0, prompt)
        async with traced_store(None, objects) as store:
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
            kvferry.write_trace(tmp_path / "trace.json", store.trace(), engine.trace())
    events = events_of(tmp_path / "trace.json")
    assert_spans_nest(events)
    assert len(named(events, "read remote")) == len(named(events, "part")) == 5
    [restore] = named(events, "restore")
    assert all(within(each, restore) for each in events if each["name"].startswith("read "))


async def test_restores_at_a_time_have_lanes_of_their_own(
    make_context: MakeContext, tmp_path: Path
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine("host") as engine, traced_store(tmp_path) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        await store.flush()
        store.clear()
        async with anyio.create_task_group() as tasks:
            for seq in (1, 2, 3):
                tasks.start_soon(store.restore, llama, seq, prompt)
        spans = store.trace()
    assert len({span.lane for span in spans if span.name == "restore"}) == 3
    kvferry.write_trace(tmp_path / "trace.json", spans)
    assert_spans_nest(events_of(tmp_path / "trace.json"))


async def test_a_cancelled_restore_is_in_the_trace(
    make_context: MakeContext, tmp_path: Path
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine("host") as engine, traced_store(tmp_path) as store:
        llama = engine.attach(context.address)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await store.restore(llama, 1, prompt)
        [span] = [span for span in store.trace() if span.name == "restore"]
    assert span.arguments["failed"] in ("CancelledError", "Cancelled")


async def test_without_trace_there_are_no_spans(make_context: MakeContext, tmp_path: Path) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine("host") as engine, Store(ram="64 MiB") as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
        assert store.trace() == []


def test_pieces_of_several_threads_have_lanes_of_their_own(tmp_path: Path) -> None:
    pieces = [
        kvferry.TraceEvent(1, 1000 * begin, 1000 * end, 10, device, "load")
        for begin, end, device in [(1, 5, 0), (2, 6, 0), (5, 7, 0), (1, 9, 1)]
    ]
    spans = [TraceSpan("restore", "store 1", 500, 9500, {})]
    kvferry.write_trace(tmp_path / "trace.json", spans, pieces)
    events = events_of(tmp_path / "trace.json")
    assert_spans_nest(events)
    lanes = sorted((each["lane"], each["ts"]) for each in named(events, "load piece"))
    assert lanes == [
        ("load, device 0", 1.0),
        ("load, device 0", 5.0),
        ("load, device 0 (2)", 2.0),
        ("load, device 1", 1.0),
    ]


def test_the_trace_keeps_the_latest_spans() -> None:
    from kvferry.store.tracing import CAPACITY, Recorder

    recorder = Recorder()
    for number in range(CAPACITY + 5):
        recorder.add(TraceSpan(str(number), "store 1", 0, 1, {}))
    spans = recorder.take()
    assert (len(spans), spans[0].name) == (CAPACITY, "5")
