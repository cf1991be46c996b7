"""The `launcher` fixture: kernel tests run emulated in three thread orders, and on a GPU if there is one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.emulation import CompilerMissing, EmulatedLauncher
from tests.emulation.build import compiler

HERE = Path(__file__).resolve().parent
# A machine with a GPU and little else runs the plain tests.
if importlib.util.find_spec("hypothesis") is None:
    collect_ignore_glob = ["test_*_properties.py"]

# HBX_EMULATED_ORDERS=forward runs one order only: sanitised runs and fuzzing have little to gain from three.
ORDERS = os.environ.get("HBX_EMULATED_ORDERS", "forward,reverse,random:7").split(",")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, its twins of the tests are skipped; HBX_REQUIRE_GPU=1 lets them run and fail."""
    if os.environ.get("HBX_REQUIRE_GPU") == "1":
        return
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("gpu") and gpu_missing():
            item.add_marker(pytest.mark.skip(reason=gpu_missing()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tests skipped for want of a GPU share one line of the summary: it folds skips of one place."""
    report = yield
    if report.skipped and item.get_closest_marker("gpu") and isinstance(report.longrepr, tuple):
        report.longrepr = (str(HERE / "conftest.py"), 1, report.longrepr[2])
    return report


@cache
def gpu_missing() -> str:
    """Why kernels cannot run on a GPU here; empty if they can."""
    # The device files of the driver on Linux and under Windows: a look that does not cost an import of cupy.
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
        return "there is no NVIDIA driver"
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed (the extra hbx_gpu[gpu] has it)"
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except (cupy.cuda.runtime.CUDARuntimeError, ImportError, OSError) as error:
        return f"cupy finds no GPU: {error}"
    return "" if count else "cupy finds no GPU"


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
