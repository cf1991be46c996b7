"""Many ranges of objects at once: on threads, with bounds, tried again where that helps.

Only obstore's blocking calls release the GIL, so every request has a thread of a common pool.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from hbx_gpu._remote import stores
from hbx_gpu._remote.link import IN_FLIGHT, link_of
from hbx_gpu._remote.places import Place
from hbx_gpu._remote.stores import ObjectInfo
from hbx_gpu.errors import RemoteError, RemotePathError, ReplacedError, UnsupportedError

HELD = 256 << 20
"""Bytes of bodies that a process holds at most before they lie where they belong."""
_ATTEMPTS = 6
_PATIENCE = 120.0  # seconds after which nothing is tried again
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 5.0

ItemT = TypeVar("ItemT")
FoundT = TypeVar("FoundT")


class Body(Protocol):
    """The answer to a request whose bytes may still be on their way."""

    @property
    def info(self) -> ObjectInfo:
        """Size and version of the whole object."""

    def take(self) -> memoryview:
        """Wait for the bytes."""


class Fetch(Protocol):
    """One request for a range of an object, tried once; tests pass their own instead of obstore's."""

    def __call__(self, place: Place, begin: int, end: int, version: str) -> Body:
        """Ask for bytes ``[begin, end)`` of the object, which has to be of this version."""


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes ``[begin, end)`` of an object that was ``size`` bytes large in that version."""

    place: Place
    begin: int
    end: int
    info: ObjectInfo


@dataclass(frozen=True, slots=True)
class Moved:
    """What some ranges took: requests, repeated ones included, and bytes that came."""

    requests: int
    nbytes: int


class _Held:
    """A bound on bytes that several threads hold; one that alone exceeds it waits for all others."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._changed = threading.Condition()

    def take(self, nbytes: int) -> None:
        with self._changed:
            while self._held and self._held + nbytes > self._most:
                self._changed.wait()
            self._held += nbytes

    def give(self, nbytes: int) -> None:
        with self._changed:
            self._held -= nbytes
            self._changed.notify_all()


class Fetcher:
    """Brings ranges of objects into memory of the caller. It can be used from many threads.

    Parameters
    ----------
    fetch
        One request.
    sleep
        How to wait before another attempt.
    held
        Most bytes of bodies under way.
    """

    def __init__(
        self, fetch: Fetch | None = None, *, sleep: Callable[[float], object] = time.sleep, held: int = HELD
    ) -> None:
        self._fetch = fetch or from_store
        self._sleep = sleep
        self._held = _Held(held)

    def into(self, ranges: Sequence[Range], targets: Sequence[np.ndarray]) -> Moved:
        """Fill targets with ranges, many at a time.

        Parameters
        ----------
        ranges
            What to read.
        targets
            uint8, one for each range and as long as it.

        Raises
        ------
        ReplacedError
            An object is not the one that was opened.
        FileNotFoundError
            It is gone.
        RemoteError
            The store does not answer, or refuses, after several attempts.
        """
        pool = _pool()
        given_up = threading.Event()
        futures: list[Future[Moved]] = []
        try:
            for wanted, target in zip(ranges, targets, strict=True):
                nbytes = wanted.end - wanted.begin
                self._held.take(nbytes)
                if given_up.is_set():
                    self._held.give(nbytes)
                    break
                future = pool.submit(self._one, wanted, target, given_up)
                future.add_done_callback(lambda _, nbytes=nbytes: self._held.give(nbytes))  # type: ignore[misc]
                futures.append(future)
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            given_up.set()
            for future in futures:
                future.cancel()
            # Nothing may write to the targets after this call.
            wait(futures)
        moved = [future.result() for future in futures if not future.cancel()]
        return Moved(sum(m.requests for m in moved), sum(m.nbytes for m in moved))

    def _one(self, wanted: Range, target: np.ndarray, given_up: threading.Event) -> Moved:
        begun, moved = time.monotonic(), 0
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    body = self._attempt(wanted)
                    moved += len(body)
                    if len(body) != wanted.end - wanted.begin:
                        raise RemoteError(
                            f"{wanted.place}: received {len(body)} of {wanted.end - wanted.begin} bytes"
                        )
                    target[:] = body
                    return Moved(attempt, moved)
                except (ReplacedError, FileNotFoundError, UnsupportedError, RemotePathError):
                    raise
                except RemoteError as error:
                    late = time.monotonic() - begun > _PATIENCE
                    if attempt == _ATTEMPTS or late or not error.transient:
                        raise RemoteError(f"{error}; tried {attempt} times") from None
                if given_up.is_set():  # another range failed for good
                    return Moved(attempt, moved)
                self._sleep(random.uniform(0.5, 1) * min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT))
        except BaseException:
            given_up.set()
            raise
        raise AssertionError

    def _attempt(self, wanted: Range) -> np.ndarray:
        link = link_of(wanted.place.root)
        # What the answer took was measured by the request itself; its bytes count here.
        begin, nbytes = link.began(), 0
        try:
            body = self._fetch(wanted.place, wanted.begin, wanted.end, wanted.info.version)
            if body.info != wanted.info:
                raise ReplacedError(f"{wanted.place} was replaced after it was opened; open it again")
            found = np.frombuffer(body.take(), np.uint8)
            nbytes = len(found)
            return found
        finally:
            link.ended(begin, None, nbytes)


class _StoreBody:
    """The answer of obstore."""

    def __init__(self, place: Place, result: stores.Result) -> None:
        self._place, self._result = place, result
        self.info = stores.info_of(result.meta)

    def take(self) -> memoryview:
        try:
            return memoryview(self._result.bytes())
        except Exception as error:
            stores.fail(self._place, error)


def from_store(place: Place, begin: int, end: int, version: str) -> Body:
    """One request through obstore; see :class:`Fetch`."""
    return _StoreBody(place, stores.request(place, {"range": (begin, end)}, version))


def map_at_once(function: Callable[[ItemT], FoundT], items: Iterable[ItemT]) -> list[FoundT]:
    """Apply a function that makes requests to many items at once; the first error is raised.

    The function must not call this one, nor :meth:`Fetcher.into`: all of them share one pool.
    """
    given = list(items)
    if len(given) < 2:
        return [function(item) for item in given]
    futures = [_pool().submit(function, item) for item in given]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def _pool() -> ThreadPoolExecutor:
    """The threads of this process, which a fork does not take along."""
    with _pools_lock:
        pid = os.getpid()
        if pid not in _pools:
            _pools.clear()
            _pools[pid] = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="hbx_gpu-fetch")
        return _pools[pid]
