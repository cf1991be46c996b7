"""What lets the tests run in several processes: tests that measure run alone, kernels are compiled once.

Imported by ``conftest.py``. It does nothing where the suite runs in one process, as without ``-n``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

try:
    import fcntl
except ImportError:  # Windows: no locks between processes, so tests that measure may be disturbed
    fcntl = None  # type: ignore[assignment]

SIDE_BY_SIDE = "PYTEST_XDIST_WORKER" in os.environ and fcntl is not None
# The locks: files that are there in any case.
DOOR = Path(__file__).resolve().with_name("conftest.py")
ROOM = Path(__file__).resolve()


@contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    """Hold an advisory lock on an existing file; it ends with the process at the latest."""
    with path.open("rb") as file:
        fcntl.flock(file, how)
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests marked ``timing`` wait until no other test runs, and no other test begins before they end.

    Every test holds the room: most of them share it, those that measure have it alone. Whoever wants it
    first takes the door, so that a test that waits for the room is not overtaken forever.
    """
    if not SIDE_BY_SIDE:
        return (yield)
    with ExitStack() as room:
        with locked(DOOR, fcntl.LOCK_EX):  # the door
            alone = item.get_closest_marker("timing") is not None
            room.enter_context(locked(ROOM, fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        return (yield)


def compile_once() -> None:
    """Let one process compile a numba kernel while the others wait, and load it from the cache then.

    numba takes no lock between processes: on an empty cache every process would compile the same kernels at
    the same time. A module's own file is the lock. Modules import one another without circles, so waiting
    has an end.
    """
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.dispatcher import Dispatcher

    plain: Callable[..., Any] = Dispatcher.compile
    held: set[str] = set()

    def compile(self: Any, signature: Any) -> Any:  # noqa: A001 - numba's name
        module = self.py_func.__code__.co_filename
        # Threads of this process first: kernels of one module call one another, under the lock it has.
        with global_compiler_lock:
            if module in held or not os.path.isfile(module):
                return plain(self, signature)
            held.add(module)
            try:
                with locked(Path(module), fcntl.LOCK_EX):
                    return plain(self, signature)
            finally:
                held.discard(module)

    Dispatcher.compile = compile  # type: ignore[method-assign, assignment]


if SIDE_BY_SIDE:
    compile_once()
