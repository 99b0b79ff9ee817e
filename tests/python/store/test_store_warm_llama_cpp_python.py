"""`kvferry store warm` for servers of llama-cpp-python that have a PromptCache."""

from __future__ import annotations

import json
import os
from pathlib import Path

import kvferry
import pytest
from kvferry.metrics import StoreCollector
from prometheus_client import CollectorRegistry
from support.llama_reference import LIBRARY_FOLDER, bindings_fit
from support.programs import run_kvferry
from support.text_model import write_text_model

if "LLAMA_CPP_LIB_PATH" in os.environ and not bindings_fit():
    pytest.skip(f"llama_cpp.Llama does not fit {LIBRARY_FOLDER}", allow_module_level=True)

import llama_cpp

BEGIN = "Once upon a time, when moving a cache still helped, there lived a queue. " * 3
TEXTS = [BEGIN + "It was long.", BEGIN + "It was short."]
LIMIT = "256 MiB"
BLOCK = 64
"""The default of PromptCache."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("text") / "model.gguf")


def warm(folder: Path, path: Path, arguments: str) -> tuple[int, list[str], str]:
    prompts = folder.with_name("prompts.txt")
    prompts.write_text("\n".join(TEXTS))
    # The import loads the backends of this libllama.
    done = run_kvferry(
        *("store", "warm", str(folder), str(prompts), "--model", str(path)),
        *("--disk-limit", LIMIT, "--ram", "64 MiB", "--llama-cpp-python", arguments),
        first="import support.llama_reference",
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_a_prompt_cache_finds_the_prompts(tmp_path: Path, path: Path) -> None:
    given = {"n_ctx": 1024, "n_threads": 1, "flash_attn": True}
    status, lines, text = warm(tmp_path / "store", path, json.dumps(given))
    assert status == 0, text
    counts = [int(line.split()[1]) for line in lines]
    llm = llama_cpp.Llama(str(path), verbose=False, **given)  # type: ignore[arg-type]
    with kvferry.PromptCache(
        llm, ram="64 MiB", disk=tmp_path / "store", disk_limit=LIMIT, devices="host"
    ) as cache:
        llm.set_cache(cache)
        llm.create_completion(TEXTS[1], max_tokens=1)
        restored = cache.stats()["restored_tokens"]
        assert llm.n_tokens == counts[1]
        collector = StoreCollector(cache, "chat")
    llm.close()
    registry = CollectorRegistry()
    registry.register(collector)  # also of a cache that was closed
    labels = {"store": "chat", "tier": "disk"}
    assert registry.get_sample_value("kvferry_store_hit_tokens_total", labels) == restored
    # The last token is evaluated, for its logits.
    assert restored >= (counts[1] - 1) // BLOCK * BLOCK > 0


def test_a_prompt_that_is_too_long_is_refused(tmp_path: Path, path: Path) -> None:
    status, lines, text = warm(tmp_path / "store", path, '{"n_ctx": 64}')
    assert (status, lines) == (2, [])
    assert "and n_ctx is" in text


def test_unknown_arguments_are_refused(tmp_path: Path, path: Path) -> None:
    status, lines, text = warm(tmp_path / "store", path, '{"n_ctx": "many"}')
    assert (status, lines) == (2, [])
    assert "llama_cpp.Llama: " in text
