"""What a request to a store costs, as measured by the requests of this process: latency and bandwidth.

From these follow which gaps between two ranges are read over, and how large one request may be.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

IN_FLIGHT = 64
"""Requests that are under way at a time, over all stores of a process."""
_FIRST_GAP, _FIRST_SIZE = 1 << 20, 16 << 20
_GAPS = (16 << 10, 4 << 20)
_SIZES = (1 << 20, 16 << 20)
_ENOUGH = 16  # requests before measurements count
_KEPT = 256
_WORK = 0.3e-3  # seconds of CPU that a request takes, whatever its size
_PIECE = 0.5  # seconds of transfer that make one measurement of the bandwidth


@dataclass(frozen=True, slots=True)
class Cost:
    """What is known about a link.

    Attributes
    ----------
    latency
        Seconds until an answer begins, where nothing else is in the way.
    bandwidth
        Bytes per second of all requests together.
    request
        Seconds that one more request costs while `IN_FLIGHT` of them are under way: its share of the
        latency, and the work of client and server.
    """

    latency: float
    bandwidth: float

    @property
    def request(self) -> float:
        return self.latency / IN_FLIGHT + _WORK


class Link:
    """Measurements of the requests to one bucket or server. It can be used from many threads."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._first: deque[float] = deque(maxlen=_KEPT)
        self._rates: deque[float] = deque(maxlen=8)
        self._open = 0
        self._since = 0.0
        self._busy, self._moved = 0.0, 0

    def began(self) -> float:
        """Note that a request begins; return the time."""
        now = self._clock()
        with self._lock:
            if self._open == 0:
                self._since = now
            self._open += 1
        return now

    def ended(self, begin: float, first: float | None, nbytes: int) -> None:
        """Note that a request ended.

        Parameters
        ----------
        begin
            Time from :meth:`began`.
        first
            Time at which the answer began; None if the request failed.
        nbytes
            Bytes that came.
        """
        now = self._clock()
        with self._lock:
            if first is not None:
                self._first.append(first - begin)
            self._moved += nbytes
            self._busy += now - self._since
            self._since = now
            self._open -= 1
            if self._busy >= _PIECE:
                self._rates.append(self._moved / self._busy)
                self._busy, self._moved = 0.0, 0

    def cost(self) -> Cost | None:
        """The measured cost, None before there are enough requests."""
        with self._lock:
            if len(self._first) < _ENOUGH:
                return None
            # Answers wait behind others on a full link, so the quick ones tell the latency.
            latency = sorted(self._first)[len(self._first) // 10]
            rate = max(self._rates) if self._rates else self._moved / max(self._busy, 1e-6)
        return Cost(latency, rate)

    def latency(self) -> float | None:
        """Seconds until an answer begins, as measured so far; None before the first answer."""
        with self._lock:
            return sorted(self._first)[len(self._first) // 10] if self._first else None

    def gap(self) -> int:
        """Most bytes between two ranges that are read over, because another request would cost more."""
        cost = self.cost()
        if cost is None:
            return _FIRST_GAP
        return int(min(max(cost.request * cost.bandwidth, _GAPS[0]), _GAPS[1]))

    def size(self, wanted: int) -> int:
        """Most bytes of one request, of `wanted` bytes in all: small enough to keep many under way."""
        if self.cost() is None:
            return _FIRST_SIZE
        return int(min(max(wanted // (IN_FLIGHT // 2), _SIZES[0]), _SIZES[1]))


_links: dict[str, Link] = {}
_links_lock = threading.Lock()


def link_of(root: str) -> Link:
    """The measurements of a bucket or server, by :attr:`Place.root`."""
    with _links_lock:
        return _links.setdefault(root, Link())


def longest_latency() -> float | None:
    """Seconds until an answer of the slowest store that this process has asked begins; None without one."""
    with _links_lock:
        known = list(_links.values())
    return max((found for link in known if (found := link.latency()) is not None), default=None)
