"""Close an iteration that is dropped, on whichever thread that happens."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

THREADS = "hbx_gpu-loader"
"""Prefix of the names of all threads that make batches."""


def close_dropped(close: Callable[[], None]) -> None:
    """Close an object without references: on this thread, or on another one if this thread makes batches.

    The garbage collector runs on the thread that happens to allocate. If it finds an abandoned iterator on a
    thread of a loader, waiting there for the iterator's threads can deadlock: the thread would wait for
    itself, or for a thread that needs a lock which is held further up this stack.
    """
    if not threading.current_thread().name.startswith(THREADS):
        close()
        return
    with contextlib.suppress(RuntimeError):  # the interpreter is ending, and takes all threads with it
        threading.Thread(target=close, name=f"{THREADS}-closing", daemon=True).start()
