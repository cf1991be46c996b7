"""Threads of loaders: every test ends those that it began."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

_before: set[threading.Thread] = set()


def loader_threads(prefix: str = "hbx_gpu-loader") -> list[threading.Thread]:
    """Threads of loaders that this test began and that still run."""
    running = threading.enumerate()
    return [thread for thread in running if thread.name.startswith(prefix) and thread not in _before]


@pytest.fixture(autouse=True)
def threads_end_with_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail where an iteration goes on after its test, once cycles of references are collected."""
    _before.clear()
    _before.update(threading.enumerate())
    failures = request.session.testsfailed
    yield
    if loader_threads():
        gc.collect()
        for thread in loader_threads():
            thread.join(5)
        left = loader_threads()
        # The traceback of a failed test keeps what the test held.
        failed = request.session.testsfailed > failures
        assert failed or not left, f"threads of an iteration that nobody ended: {left}"
