"""Make items one ahead of whoever takes them, on a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from hbx_gpu._loading.closing import THREADS

T = TypeVar("T")
_PATIENCE = 0.05  # seconds between two looks at whether the thread is to end


class Producer(Generic[T]):
    """A thread that calls a function again and again, one call ahead of :meth:`take`.

    The thread refers to the function, not to this object, so that an iterator that owns the latter can be
    dropped.

    Parameters
    ----------
    make
        Makes the next item; raises StopIteration after the last one.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._made: queue.Queue[T | BaseException] = queue.Queue(1)
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=_produce, args=(make, self._made, self._ended), name=f"{THREADS}-operators", daemon=True
        )
        self._thread.start()

    def take(self) -> T:
        """The next item; raises what making it has raised, and StopIteration once this is closed."""
        while True:
            try:
                item = self._made.get(timeout=_PATIENCE)
                break
            except queue.Empty:
                if self._ended.is_set():
                    raise StopIteration from None
        if isinstance(item, BaseException):
            self._made.put(item)  # for whoever asks again
            raise item
        return item

    def close(self) -> None:
        """End the thread; a call that runs is waited for."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _produce(make: Callable[[], T], made: queue.Queue[T | BaseException], ended: threading.Event) -> None:
    while not ended.is_set():
        item: T | BaseException
        try:
            item = make()
        except BaseException as error:  # the consumer is to see it, whatever it is
            item = error
        while not ended.is_set():
            try:
                made.put(item, timeout=_PATIENCE)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
