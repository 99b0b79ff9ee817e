"""The metrics of a store, as Prometheus scrapes them, against what was done."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
import kvferry
import pytest
from disk_stores import BLOCK, TOKENS, HangingDisk, kept_in, prompted, store_in, until
from given_speeds import evaluates, reads
from kvferry import Store
from kvferry._native import lib
from kvferry.errors import error
from kvferry.metrics import StoreCollector
from kvferry.store import part_format
from kvferry.store.counts import BOUNDS
from kvferry.store.objects import Unavailable
from prometheus_client import CollectorRegistry, exposition, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_open_metrics
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_open_metrics,
)
from prometheus_client.parser import text_string_to_metric_families
from support.devices import DEVICES
from support.faulty_objects import FaultyObjects
from support.like_contexts import MakeContext
from support.s3_server import BUCKET, S3Server

pytestmark = pytest.mark.anyio

Numbers = dict[tuple[str, str], float]
PAGE = Path(__file__).parents[3] / "docs/store-operating.md"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def numbers(text: str) -> Numbers:
    """Returns the samples of a scrape, by name without the prefix, and values of the labels except
    ``store``, in alphabetical order of the labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sorted(sample.labels.items()) if k not in ("store", "le")}
            if "le" not in sample.labels or sample.labels["le"] == "+Inf":
                name = sample.name.removeprefix("kvferry_store_")
                found[name, " ".join(labels.values())] = sample.value
    return found


def scraped(store: Store) -> Numbers:
    registry = CollectorRegistry()
    registry.register(StoreCollector(store))
    return numbers(generate_latest(registry).decode())


def hits(values: Numbers) -> list[float]:
    """Tokens asked for, then those from RAM, disk and object store, then those that missed."""
    tiers = [values.get(("hit_tokens_total", tier), 0) for tier in ("ram", "disk", "remote")]
    return [values["requested_tokens_total", ""], *tiers, values["missed_tokens_total", ""]]


def refusals(values: Numbers) -> dict[str, float]:
    """Those that there were, by reason and tier."""
    return {
        labels: value
        for (name, labels), value in values.items()
        if name == "refusals_total" and value
    }


def file_bytes(folder: Path, names: str) -> int:
    return sum(path.stat().st_size for path in (folder / "parts").glob(names))


# ---- What was done, by tier ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "hybrid", "mamba"])
async def test_a_restore_from_ram(make_context: MakeContext, kind: str) -> None:
    context, prompt = prompted(make_context, kind)
    async with kvferry.Engine(DEVICES) as engine, Store(ram="64 MiB", block_tokens=BLOCK) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        found = await store.find(llama, [*prompt, 7])
        assert await store.restore(llama, 1, [*prompt, 7]) == TOKENS
        assert await store.restore(llama, 1, [5, *prompt]) == 0
        values = scraped(store)
        assert hits(values) == [2 * TOKENS, TOKENS, 0, 0, TOKENS]
        assert values["kept_tokens_total", ""] == TOKENS
        assert values["write_bytes_total", "ram"] == store.stats()["saved_bytes"] > 0
        assert values["read_bytes_total", "ram"] == found.nbytes > 0
        assert values["usage_bytes", "ram"] == store.stats()["ram_used"] > 0
        assert values["limit_bytes", "ram"] == 64 << 20
        assert values["evictions_total", "ram"] == 0
        assert [values[f"{call}_seconds_count", ""] for call in ("find", "keep")] == [1, 1]
        counts = [
            values["restore_seconds_count", tier] for tier in ("ram", "disk", "remote", "none")
        ]
        assert counts == [1, 0, 0, 1]
        assert 0 < values["restore_seconds_sum", "ram"] < 60
        assert not refusals(values)


@pytest.mark.parametrize("kind", ["llama", "hybrid", "mamba"])
async def test_a_restore_from_the_folder(
    make_context: MakeContext, tmp_path: Path, kind: str
) -> None:
    context, prompt = prompted(make_context, kind)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) as store:
            await store.keep(llama, 0, prompt)
            await store.flush()
            values = scraped(store)
        assert values["write_bytes_total", "disk"] == file_bytes(tmp_path, "*")
        assert values["pending_writes", "disk"] == 0
        async with store_in(tmp_path) as store:
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
            values = scraped(store)
            assert hits(values) == [TOKENS, 0, TOKENS, 0, 0]
            parts = sum(file_bytes(tmp_path, f"*.{kind}") for kind in ("block", "checkpoint"))
            assert values["read_bytes_total", "disk"] == parts
            assert values["write_bytes_total", "disk"] == 0
            assert parts < values["usage_bytes", "disk"] < values["limit_bytes", "disk"] == 1 << 30
            assert values["restore_seconds_count", "disk"] == 1
            assert await store.restore(llama, 2, prompt, leave=0) == TOKENS
            assert hits(scraped(store)) == [2 * TOKENS, TOKENS, TOKENS, 0, 0]


async def test_a_prefix_of_which_a_part_is_in_ram(
    make_context: MakeContext, tmp_path: Path
) -> None:
    async with (
        kept_in(tmp_path, make_context, "llama") as (_, llama, prompt),
        store_in(tmp_path) as store,
    ):
        assert await store.restore(llama, 1, prompt[: BLOCK + 1]) == BLOCK
        assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
        assert hits(scraped(store)) == [BLOCK + TOKENS, BLOCK, TOKENS, 0, 0]


async def test_a_prefetch_makes_a_hit_in_ram(make_context: MakeContext, tmp_path: Path) -> None:
    async with (
        kept_in(tmp_path, make_context, "llama") as (_, llama, prompt),
        store_in(tmp_path) as store,
    ):
        store.prefetch(llama, prompt)
        await until(lambda: scraped(store)["read_bytes_total", "disk"])
        await until(lambda: store.stats()["ram_reserved"] == 0)
        assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
        assert hits(scraped(store)) == [TOKENS, TOKENS, 0, 0, 0]


async def test_a_restore_from_a_bucket(make_context: MakeContext, s3: S3Server) -> None:
    context, prompt = prompted(make_context, "llama")
    url = f"s3://{BUCKET}/kept"

    def remote_store() -> Store:
        return Store(ram="64 MiB", remote=url, block_tokens=BLOCK)

    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with remote_store() as store:
            await store.keep(llama, 0, prompt)
            await store.flush()
            values = scraped(store)
        blocks = sum(path.stat().st_size for path in s3.objects() if path.suffix == ".block")
        assert values["write_bytes_total", "remote"] == blocks > 0
        assert values["pending_writes", "remote"] == 0
        async with remote_store() as store:
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
            values = scraped(store)
            assert hits(values) == [TOKENS, 0, 0, TOKENS, 0]
            assert values["read_bytes_total", "remote"] == blocks
            assert values["restore_seconds_count", "remote"] == 1
            assert not refusals(values)
            assert ("usage_bytes", "remote") not in values


# ---- What was refused, and why -------------------------------------------------------------------


async def test_a_damaged_file(make_context: MakeContext, tmp_path: Path) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) as store:
            await store.keep(llama, 0, prompt)
            (second,) = (part for part in store._ram if part.description.begin == BLOCK)
        path = tmp_path / "parts" / f"{second.description.key.hex()}.block"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        async with store_in(tmp_path) as store:
            assert await store.restore(llama, 1, prompt, leave=0) == BLOCK
            values = scraped(store)
    assert refusals(values) == {"damaged disk": 1}
    assert values["requested_tokens_total", ""] == TOKENS
    assert values["missed_tokens_total", ""] == TOKENS - BLOCK


async def test_files_of_a_newer_version(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with kept_in(tmp_path, make_context, "llama") as (_, llama, prompt):
        path = next(
            path
            for path in (tmp_path / "parts").glob("*.block")
            if part_format.parse_header(path.read_bytes()[:4096]).begin == 0
        )
        header = part_format.parse_header(path.read_bytes()[:4096])
        with monkeypatch.context() as patched:
            patched.setattr(part_format, "VERSION", part_format.VERSION + 1)
            newer = part_format.header_of(header)
        path.write_bytes(newer + path.read_bytes()[4096:])
        async with store_in(tmp_path) as store:
            assert await store.restore(llama, 1, prompt, leave=0) == 0
            values = scraped(store)
    assert set(refusals(values)) == {"newer disk"}
    assert values["missed_tokens_total", ""] == TOKENS


async def test_a_load_of_another_context(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, Store(ram="64 MiB", block_tokens=BLOCK) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)

        async def refuse(*_: object, **__: object) -> None:
            raise error(lib.KVF_ERR_STATE_MISMATCH, "another layout")

        monkeypatch.setattr(llama, "load_blocks", refuse)
        assert await store.restore(llama, 1, prompt) == 0
        assert refusals(scraped(store)) == {"foreign ram": 1}


async def test_a_disk_that_is_slower_than_the_model(
    make_context: MakeContext, tmp_path: Path
) -> None:
    async with (
        kept_in(tmp_path, make_context, "llama") as (_, llama, prompt),
        store_in(tmp_path) as store,
    ):
        assert await store.restore(llama, 1, prompt[: BLOCK + 1]) == BLOCK
        reads(store, "disk", 1000.0)
        evaluates(store, llama)
        assert await store.restore(llama, 1, prompt, leave=0) == BLOCK
        values = scraped(store)
        assert refusals(values) == {"slow disk": 1}
        assert hits(values) == [BLOCK + TOKENS, BLOCK, BLOCK, 0, TOKENS - BLOCK]


async def test_what_the_sequence_holds_is_neither_hit_nor_miss(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, Store(ram="64 MiB", block_tokens=BLOCK) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        assert await store.restore(llama, 1, prompt, leave=0, held=BLOCK + 6) == TOKENS
        assert hits(scraped(store)) == [TOKENS - BLOCK - 6, TOKENS - BLOCK - 6, 0, 0, 0]
        assert await store.restore(llama, 1, [*prompt, 5, 6], leave=0, held=TOKENS) == TOKENS
        asked = TOKENS - BLOCK - 6
        assert hits(scraped(store)) == [asked + 2, asked, 0, 0, 2]
        assert store.stats()["restored_tokens"] == TOKENS


async def test_no_room_in_ram(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        room = 2 * llama.block_size(BLOCK)
        async with Store(ram=room, block_tokens=BLOCK) as store:
            kept = await store.keep(llama, 0, prompt)
            assert kept < TOKENS
            values = scraped(store)
    assert refusals(values) == {"budget ram": 1}
    assert values["kept_tokens_total", ""] == kept


async def test_no_room_in_the_folder(make_context: MakeContext, tmp_path: Path) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, store_in(tmp_path, limit=1 << 20) as store:
        # One block alone is larger than the limit leaves room for.
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        await store.flush()
        values = scraped(store)
        evicted = values["evictions_total", "disk"]
        written = values["write_bytes_total", "disk"]
        failed = values["write_failures_total", "disk"]
        assert failed == refusals(values).get("budget disk", 0)
        assert evicted + failed > 0
        assert written >= file_bytes(tmp_path, "*")


async def test_a_disk_that_hangs(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, prompt = prompted(make_context, "llama")
    disk = HangingDisk(monkeypatch)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) as store:
            await store.keep(llama, 0, prompt)
        async with store_in(tmp_path) as store:
            disk.begin()
            try:
                assert await store.restore(llama, 1, prompt) == 0
                values = scraped(store)  # asks the disk nothing
            finally:
                disk.end()
    assert set(refusals(values)) == {"hangs disk"}


async def test_a_bucket_that_is_left_alone(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    objects = FaultyObjects()

    def fail(call: int) -> None:
        raise Unavailable("no answer")

    async with (
        kvferry.Engine(DEVICES) as engine,
        Store(ram="64 MiB", remote=objects, block_tokens=BLOCK) as store,
    ):
        llama = engine.attach(context.address)
        assert scraped(store)["breaker_open", "remote"] == 0
        objects.fault = fail
        for _ in range(3):
            await store.find(llama, prompt)
        before = refusals(scraped(store))
        await store.find(llama, prompt)
        await store.keep(llama, 0, prompt)
        values = scraped(store)
        assert (values["breaker_open", "remote"], values["breaker_openings_total", "remote"]) == (
            1,
            1,
        )
        after = refusals(values)
        assert after["failed remote"] == before["failed remote"] == 3
        assert after["breaker_open remote"] > before.get("breaker_open remote", 0)
        assert values["write_failures_total", "remote"] > 0


# ---- The form ------------------------------------------------------------------------------------


async def test_several_stores_have_a_label(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    registry = CollectorRegistry(auto_describe=True)
    async with (
        kvferry.Engine(DEVICES) as engine,
        Store(ram="64 MiB", block_tokens=BLOCK) as first,
        Store(ram="32 MiB", block_tokens=BLOCK) as second,
    ):
        collector = StoreCollector()
        registry.register(collector)
        collector.add(first, "chat")
        collector.add(second, "batch")
        with pytest.raises(ValueError, match="'chat'"):
            collector.add(second, "chat")
        await first.keep(engine.attach(context.address), 0, prompt)
        kept = {
            name: registry.get_sample_value("kvferry_store_kept_tokens_total", {"store": name})
            for name in ("chat", "batch")
        }
        assert kept == {"chat": TOKENS, "batch": 0}
        text = generate_latest(registry).decode()
        assert text.count("# TYPE kvferry_store_kept_tokens_total ") == 1
        collector.remove("batch")
        assert 'store="batch"' not in generate_latest(registry).decode()
        with pytest.raises(ValueError, match="Duplicated"):
            registry.register(StoreCollector(second))


async def test_a_server_of_the_client_shows_them(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    registry = CollectorRegistry()
    async with kvferry.Engine(DEVICES) as engine, Store(ram="64 MiB", block_tokens=BLOCK) as store:
        registry.register(StoreCollector(store))
        await store.keep(engine.attach(context.address), 0, prompt)
        server, thread = exposition.start_http_server(0, "127.0.0.1", registry)
        try:
            address = f"http://127.0.0.1:{server.server_port}/metrics"

            def get() -> str:
                with urllib.request.urlopen(address, timeout=10) as answer:
                    return str(answer.read().decode())

            values = numbers(await anyio.to_thread.run_sync(get))
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
    assert values["kept_tokens_total", ""] == TOKENS


@pytest.fixture
async def everything(tmp_path: Path) -> StoreCollector:
    """The collector of a closed store that has all tiers."""
    store = Store(ram="1 MiB", disk=tmp_path, disk_limit="8 MiB", remote=FaultyObjects())
    async with store:
        pass
    return StoreCollector(store)


# promtool's rules ("promtool check metrics") that can be broken here, and its base units.
_UNITS = ("seconds", "bytes", "tokens", "ratio")
_NOT_BASE_UNITS = "milliseconds|microseconds|minutes|hours|kilobytes|megabytes|bits|ms|kb|mb"
_RULES: dict[str, Callable[[str, str], bool]] = {
    "a name is of small letters and underscores": lambda name, kind: bool(
        re.fullmatch(r"[a-z]+(_[a-z]+)*", name)
    ),
    "a counter ends in _total, and nothing else does": lambda name, kind: (
        name.endswith("_total") == (kind == "counter")
    ),
    "no name ends as the series of a histogram": lambda name, kind: (
        not name.endswith(("_count", "_sum", "_bucket"))
    ),
    "no name has the kind of metric in it": lambda name, kind: (
        not set(name.split("_")) & {"counter", "gauge", "histogram", "summary"}
    ),
    "units are base units": lambda name, kind: (
        not set(name.split("_")) & set(_NOT_BASE_UNITS.split("|"))
    ),
    "a histogram has a unit": lambda name, kind: (
        kind != "histogram" or name.endswith(tuple(f"_{unit}" for unit in _UNITS))
    ),
}


@pytest.mark.parametrize("rule", _RULES)
async def test_names_follow_the_conventions(everything: StoreCollector, rule: str) -> None:
    names = [
        (f"{family.name}_total" if family.type == "counter" else family.name, family.type)
        for family in everything.collect()
    ]
    assert names
    assert [name for name, kind in names if not _RULES[rule](name, kind)] == []
    assert [name for name, _ in names if not name.startswith("kvferry_store_")] == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Kept", "gauge"),
        ("kept_tokens", "counter"),
        ("kept_total", "gauge"),
        ("kept_count", "gauge"),
        ("kept_gauge", "gauge"),
        ("restore_ms", "histogram"),
        ("restore", "histogram"),
    ],
)
def test_the_rules_find_what_breaks_them(name: str, kind: str) -> None:
    assert not all(rule(name, kind) for rule in _RULES.values())


async def test_all_series_are_there_from_the_start(everything: StoreCollector) -> None:
    for family in everything.collect():
        assert family.documentation.endswith(".")
        assert family.samples, family.name
        assert {sample.labels["store"] for sample in family.samples} == {"default"}
    reasons = [
        sample.labels
        for family in everything.collect()
        if family.name == "kvferry_store_refusals"
        for sample in family.samples
    ]
    assert {each["reason"] for each in reasons} == {
        "budget",
        "breaker_open",
        "damaged",
        "newer",
        "foreign",
        "slow",
        "failed",
        "hangs",
    }


async def test_openmetrics_takes_them_too(everything: StoreCollector) -> None:
    registry = CollectorRegistry()
    registry.register(everything)
    families = {
        family.name: family
        for family in parse_open_metrics(generate_open_metrics(registry).decode())
    }
    histogram = families["kvferry_store_find_seconds"]
    bounds = [s.labels["le"] for s in histogram.samples if s.name.endswith("_bucket")]
    assert bounds == [*(str(float(bound)) for bound in BOUNDS), "+Inf"]


async def test_the_page_explains_each_metric(everything: StoreCollector) -> None:
    page = PAGE.read_text()
    for family in everything.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert f"`{name.removeprefix('kvferry_store_')}" in page, name


async def test_a_store_that_was_not_entered_has_metrics(tmp_path: Path) -> None:
    store = Store(ram="1 MiB", disk=tmp_path, disk_limit="8 MiB")
    values = scraped(store)
    assert values["limit_bytes", "disk"] == 8 << 20
    assert ("usage_bytes", "disk") not in values
