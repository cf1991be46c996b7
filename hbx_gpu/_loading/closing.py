"""Ending an iteration from wherever it is dropped."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

THREADS = "hbx_gpu-loader"
"""What the names of all threads that make batches begin with."""


def close_dropped(close: Callable[[], None]) -> None:
    """End what nobody refers to any more: here, or on a thread of its own if this one makes batches.

    The garbage collector runs on the thread that happens to allocate. If it finds an abandoned iterator on a
    thread of a loader, to wait there for the threads of the iterator may mean to wait for oneself, or for a
    thread that needs a lock which is held further up this stack.
    """
    if not threading.current_thread().name.startswith(THREADS):
        close()
        return
    with contextlib.suppress(RuntimeError):  # the interpreter is ending, and takes all threads with it
        threading.Thread(target=close, name=f"{THREADS}-closing", daemon=True).start()
