"""Fixtures: models and contexts of the real libllama, and the CUDA driver under test."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from support.llama_reference import Context, Model
    from support.simulated_cuda import SimulatedCuda

# By default the CUDA driver loads a kernel when the kernel is first used. Loading a kernel may
# synchronise the context (CUDA C++ programming guide, "Lazy Loading", concurrent execution). A
# decode that uses a kernel for the first time then waits for every stream of the context, also for
# the stream that a test holds until the decode has returned. This is set before anything opens the
# driver, which reads the variable; programs that tests start inherit it.
if os.environ.get("KVFERRY_TEST_GPU"):
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

# A shell starts commands in the background with SIGINT ignored, and their children inherit that:
# the tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Hypothesis: the same few examples each time. `--hypothesis-profile=long` tries many more, and
# others each time.
hypothesis.settings.register_profile("long", max_examples=500, deadline=None, database=None)
hypothesis.settings.register_profile(
    "kvferry", max_examples=8, deadline=None, database=None, derandomize=True
)
hypothesis.settings.load_profile("kvferry")


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_path(kind, **arguments of write_model)` returns the path of a synthetic model, which
    is written once a session."""
    from kvferry.tools.synthetic import write_model
    from support.llama_reference import BUILD, fits, model_sizes

    folder = tmp_path_factory.mktemp("models")
    written: dict[object, Path] = {}

    def path(kind: str, **arguments: Any) -> Path:
        if not fits(kind):
            pytest.skip(f"{BUILD} is not fit for the architecture of {kind}")
        arguments = {**model_sizes(kind), **arguments}
        key = (kind, *sorted(arguments.items()))
        if key not in written:
            written[key] = write_model(kind, folder / f"{kind}-{len(written)}.gguf", **arguments)
        return written[key]

    return path


@pytest.fixture(scope="session")
def model(model_path: Callable[..., Path]) -> Iterator[Callable[..., Model]]:
    """`model(kind, **arguments of write_model)` returns a synthetic model, which is loaded once and
    shared by all tests."""
    from support.llama_reference import Model

    loaded: dict[Path, Model] = {}

    def load(kind: str, **arguments: Any) -> Model:
        path = model_path(kind, **arguments)
        if path not in loaded:
            loaded[path] = Model(path)
        return loaded[path]

    yield load
    for one in loaded.values():
        one.close()


@pytest.fixture(scope="session")
def unknown_libllama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`unknown_libllama(key of unknown_format.NUMBERS)` returns the folder of a libllama that
    writes an unknown format. It is made once a session, and is for a process of its own.
    """
    from support.llama_reference import BUILD, LIBRARY_FOLDER
    from support.unknown_format import NUMBERS, NoMagic, write_libllama

    written: dict[str, Path] = {}

    def folder(which: str) -> Path:
        if which not in written:
            # The folder has the name of the build, because tests look up there what it can do.
            path = tmp_path_factory.mktemp(which) / BUILD
            try:
                write_libllama(path, LIBRARY_FOLDER, NUMBERS[which])
            except NoMagic:
                pytest.skip(f"{BUILD} begins its states with no number")
            written[which] = path
        return written[which]

    return folder


@pytest.fixture
def make_context(model: Callable[..., Model]) -> Iterator[Callable[..., Context]]:
    """`make_context(kind or model, **ContextOptions)` returns a context, which is freed after the
    test. A kind means its small model with the default seed.
    """
    from support.llama_reference import ContextOptions

    with contextlib.ExitStack() as contexts:

        def make(source: str | Model, **options: Any) -> Context:
            chosen = model(source) if isinstance(source, str) else source
            return contexts.enter_context(chosen.context(ContextOptions(**options)))

        yield make


@pytest.fixture(scope="module")
def driver() -> Iterator[SimulatedCuda]:
    """The CUDA driver under test, the only one that kvferry opens in this process."""
    import anyio
    from support.cuda_driver import driver_under_test, open_driver
    from support.devices import ON_GPU

    driver = driver_under_test()
    with pytest.MonkeyPatch.context() as patch, driver.context():
        # Set only while kvferry opens the driver, which it does once. Programs that tests start
        # must find the machine's own driver.
        if not ON_GPU:
            patch.setenv("KVFERRY_CUDA_DRIVER", driver.path)
        anyio.run(open_driver)
        yield driver


@pytest.fixture
def cuda(driver: SimulatedCuda) -> Iterator[SimulatedCuda]:
    """The driver under test; fails a test that leaves something in the simulated one."""
    from support.devices import ON_GPU

    if ON_GPU:
        yield driver
        return
    driver.reset()
    live = driver.count("live")
    yield driver
    driver.reset()
    assert driver.count("live") == live
    assert driver.count("hazards") == 0


@pytest.fixture
def simulated(cuda: SimulatedCuda) -> SimulatedCuda:
    from support.devices import ON_GPU

    if ON_GPU:
        pytest.skip("needs the simulated driver")
    return cuda
