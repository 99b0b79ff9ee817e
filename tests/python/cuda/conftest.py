"""Fixtures of the tests on CUDA."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.cuda_driver import release_second_device
from support.simulated_cuda import SimulatedCuda


@pytest.fixture
def two_devices(simulated: SimulatedCuda) -> Iterator[SimulatedCuda]:
    simulated.set(devices=2)
    yield simulated
    release_second_device(simulated)
