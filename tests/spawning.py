"""Worker processes in tests start as forks of one process that has everything imported.

To spawn one imports torch and the library once more, for two seconds. A fork server starts a process that
is as fresh: it gets its work pickled, and has nothing else of the process that asks for it, threads included.
A test that wants the real thing takes the fixture `spawn`.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing import context

import pytest

# Nothing of it has threads at work once it is imported.
_PRELOADED = [
    "pytest",
    "torch.utils.data",
    "torch.multiprocessing",
    "hbx_gpu.dataloader",
    "hbx_gpu.testing",
    "hbx_gpu.atlas._ingest.many",
    "hbx_gpu.atlas._ingest.multimodal",
    "hbx_gpu.atlas._upkeep.repack",
    "hbx_gpu.statistics",
    "hbx_gpu.tokens",
    # Processes of one run of the tests compile a kernel once.
    "tests.side_by_side",
]
_PLAIN = context._concrete_contexts["spawn"]  # type: ignore[attr-defined]


def pytest_configure() -> None:
    """Let everybody who asks for ``spawn`` have the fork server."""
    if sys.platform == "linux":
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(_PRELOADED)
        context._concrete_contexts["spawn"] = server  # type: ignore[attr-defined]


@pytest.fixture
def spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that the test spawns are spawned."""
    monkeypatch.setitem(context._concrete_contexts, "spawn", _PLAIN)  # type: ignore[attr-defined]
