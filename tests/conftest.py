"""Fixtures every test file may use: where the shared real data lies, and skips that say so."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from tests import optional, side_by_side, spawning, threads
from tests.gpu import allocate_plainly, gpu_missing

SHARED = Path(os.environ.get("HBX_SHARED", Path(__file__).resolve().parents[1] / ".." / "shared")).resolve()


def pytest_configure(config: pytest.Config) -> None:
    """What concerns all tests and has a file of its own."""
    config.pluginmanager.register(optional)
    config.pluginmanager.register(side_by_side)
    config.pluginmanager.register(spawning)
    config.pluginmanager.register(threads)
    _no_deadlines()
    if os.environ.get("HBX_PLAIN_MEMORY") == "1":  # under compute-sanitizer
        allocate_plainly()


def _no_deadlines() -> None:
    """Let examples of hypothesis take as long as a busy machine needs."""
    try:
        from hypothesis import settings
    except ImportError:  # a machine with a GPU and little else
        return
    settings.register_profile("hbx_gpu", deadline=None)
    settings.load_profile("hbx_gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, its twins of the tests are skipped; HBX_REQUIRE_GPU=1 lets them run and fail."""
    if os.environ.get("HBX_REQUIRE_GPU") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu") and gpu_missing():
            item.add_marker(pytest.mark.skip(reason=gpu_missing()))


def pytest_collection_finish() -> None:
    """Spare the collections of garbage to come the modules and tests that are there for the whole run.

    A million objects take a third of a second to go through, which many tests of loaders ask for.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tests skipped for want of a GPU share one line of the summary: it folds skips of one place."""
    report = yield
    if report.skipped and item.get_closest_marker("gpu") and isinstance(report.longrepr, tuple):
        report.longrepr = (__file__, 1, report.longrepr[2])
    return report


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real fixtures and data; skips where it is absent (CI always has it)."""
    if not SHARED.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI must have the shared fixtures; none at {SHARED} (set HBX_SHARED)")
        pytest.skip(f"shared fixtures not found at {SHARED}; set HBX_SHARED to run this test")
    return SHARED


@pytest.fixture(scope="session")
def homeobox_fixtures(shared: Path) -> Path:
    """Atlases written by real Homeobox releases."""
    return shared / "fixtures" / "homeobox"


@pytest.fixture(scope="session")
def real_h5ad(shared: Path) -> tuple[Path, Path]:
    """Two small real count matrices: (mouse, human)."""
    data = shared / "data"
    return data / "mouse_10k_cells_x_1k_genes.h5ad", data / "human_1k_cells_x_507_genes.h5ad"
