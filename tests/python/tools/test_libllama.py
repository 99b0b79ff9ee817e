"""The command line's bindings of libllama: `kvferry.tools.libllama`."""

from __future__ import annotations

import ctypes.util
import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kvferry.tools import libllama
from kvferry.tools.libllama import parameters
from support.llama_reference import LIBRARY_FOLDER, ContextParams, keep_log, llama

OPTIONS = libllama.ContextOptions(n_ctx=1024, n_seq_max=4, threads=2, n_batch=300)


@pytest.fixture(autouse=True)
def others_get_their_log_back() -> Iterator[None]:
    yield
    keep_log()


@pytest.fixture
def library() -> libllama.Libllama:
    return libllama.Libllama(libllama.find(LIBRARY_FOLDER))


@pytest.fixture
def model(library: libllama.Libllama, model_path: Callable[..., Path]) -> Iterator[libllama.Model]:
    with libllama.Model(library, model_path("llama"), gpu=False) as one:
        yield one


# ---- Parameters of a context ---------------------------------------------------------------------


def test_a_context_has_what_was_asked_for(model: libllama.Model) -> None:
    with libllama.Context(model, OPTIONS) as context:
        assert llama.llama_n_seq_max(context.address) == 4
        assert llama.llama_n_batch(context.address) == 300
        assert llama.llama_n_threads(context.address) == 2
        # There is one cache for all sequences, and not a stream of 256 cells for each.
        assert llama.llama_n_ctx_seq(context.address) == 1024


def test_a_context_may_have_more_cells_than_were_asked_for(model: libllama.Model) -> None:
    """libllama rounds the cells up. A batch is never larger than was asked for."""
    with libllama.Context(model, dataclasses.replace(OPTIONS, n_ctx=280)) as context:
        assert llama.llama_n_ctx(context.address) == 512
        assert llama.llama_n_batch(context.address) == 280


def test_the_layout_is_that_of_the_build(library: libllama.Libllama) -> None:
    for name in ("n_threads", "flash_attn_type", "type_k", "offload_kqv", "swa_full", "kv_unified"):
        ours, theirs = getattr(library.context_params, name), getattr(ContextParams, name)
        assert (name, ours.offset) == (name, theirs.offset)


def test_a_layout_that_makes_another_context_is_refused(
    library: libllama.Libllama, model: libllama.Model
) -> None:
    """The test chooses a wrong layout, in which flags are written into other members."""
    fields = [name for name, _ in library.context_params._fields_]
    earlier = sum(name.startswith("earlier") for name in fields)
    gap = 0 if library.context_params.gap.size else 8
    library._use_layout(parameters.context_params(earlier, "ctx_type" in fields, gap))
    with pytest.raises(libllama.LlamaError, match="makes another context than was asked for"):
        libllama.Context(model, OPTIONS)


def test_defaults_that_fit_no_layout_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parameters.DEFAULT_FLAGS, "kv_unified", True)
    with pytest.raises(libllama.LlamaError, match="unknown layout of llama_context_params"):
        libllama.Libllama(libllama.find(LIBRARY_FOLDER))


def test_libllama_may_log_after_its_library_object_is_gone(model_path: Callable[..., Path]) -> None:
    log = libllama.Libllama(libllama.find(LIBRARY_FOLDER)).log
    gc.collect()
    params = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(bytes(model_path("llama")), params)
    llama.llama_model_free(model)
    assert log


# ---- Finding one ---------------------------------------------------------------------------------


def test_an_installed_xllamacpp_is_a_libllama(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "xllamacpp"
    package.mkdir()
    for name in ("__init__.py", "xllamacpp.abi3.so"):
        (package / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(libllama.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)

    found = libllama.find()
    assert found == libllama.Found(str(package / "xllamacpp.abi3.so"), "installed xllamacpp")


def test_where_there_is_none_the_remedy_is_a_prebuilt_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(libllama.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(ctypes.util, "find_library", lambda _: None)
    for package in ("llama_cpp", "xllamacpp"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(libllama.LlamaError, match="pip install xllamacpp"):
        libllama.find()
