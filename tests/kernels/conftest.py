"""The `launcher` fixture: kernel tests run emulated in three thread orders, and on a GPU if there is one."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

from tests.emulation import CompilerMissing, EmulatedLauncher, cases
from tests.emulation.build import compiler
from tests.gpu import gpu_missing

# A machine with a GPU and little else runs the plain tests.
if importlib.util.find_spec("hypothesis") is None:
    collect_ignore_glob = ["test_*_properties.py"]

# HBX_EMULATED_ORDERS=forward runs one order only: sanitized runs and fuzzing have little to gain from three.
ORDERS = os.environ.get("HBX_EMULATED_ORDERS", "forward,reverse,random:7").split(",")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A run under a sanitizer has some cases of each test."""
    if together := cases.values_together():
        items[:] = cases.thinned(items, together)


def emulated(order: str) -> EmulatedLauncher:
    """A launcher on the CPU; without g++ the test is skipped, in CI it fails."""
    try:
        compiler()
    except CompilerMissing as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    return EmulatedLauncher(order)


def on_gpu() -> Any:
    """A launcher on the GPU."""
    if gpu_missing():
        pytest.fail(f"HBX_REQUIRE_GPU=1, but {gpu_missing()}")
    from tests.kernels.cuda_launcher import CudaLauncher

    return CudaLauncher()


@pytest.fixture(scope="session", params=[*ORDERS, pytest.param("cuda", marks=pytest.mark.gpu)])
def launcher(request: pytest.FixtureRequest) -> Any:
    """Launches kernels: `run(kernel, grid, block, args, shared=0)` and `address(array)`.

    Arrays among the arguments are NumPy arrays; after `run` they hold what the kernel wrote. A record that
    holds an address of an array gets it from `address(array)`, which `run` then treats like an argument.
    """
    return on_gpu() if request.param == "cuda" else emulated(request.param)
