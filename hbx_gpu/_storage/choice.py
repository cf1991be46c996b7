"""Which reader is fastest on the user's own files: a short measurement, and what it says for the log.

Knows how to compare; what a candidate does is its maker's business.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.readers import MmapReader, PreadReader, Reader

IO = ("auto", "mmap", "pinned", "kvikio")
"""What `io` may be."""
_ROWS = 256
_SECONDS = 0.2  # per candidate
_MARGIN = 1.1  # the first candidate stays unless another one beats it by more than noise
_LOG = logging.getLogger(__name__)


def check_io(io: str) -> str:
    """`io` if there is such a choice; else ValueError."""
    if io not in IO:
        raise ValueError(f"io must be one of {', '.join(map(repr, IO))}, got {io!r}")
    return io


def fastest(
    candidates: Mapping[str, Callable[[np.ndarray], object]],
    n_rows: int,
    *,
    threads: int,
    seconds: float = _SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[str, dict[str, float]]:
    """Measure candidates in turn, on rows that none of them has read before.

    Parameters
    ----------
    candidates
        Name -> what brings the rows with the numbers given, called on several threads. In order of
        preference: a later one must beat the first clearly.
    n_rows
        Rows there are.
    threads
        Calls at a time, as the loader will make them.
    seconds
        That each candidate is measured for, about; at least once.
    clock
        Seconds.

    Returns
    -------
    tuple
        Name of the fastest, and seconds per row of each.
    """
    if len(candidates) < 2 or not n_rows:
        return next(iter(candidates)), {}
    order = np.random.default_rng(0).permutation(n_rows)
    per_call = max(1, min(_ROWS, n_rows // (4 * threads * len(candidates))))
    spent, rows = dict.fromkeys(candidates, 0.0), dict.fromkeys(candidates, 0)
    at = 0
    with ThreadPoolExecutor(threads) as pool:
        # A first round opens files and compiles; it does not count.
        for bring in candidates.values():
            bring(order[at : at + per_call])
            at += per_call
        while not all(rows.values()) or (at < n_rows and min(spent.values()) < seconds):
            for name, bring in candidates.items():
                parts = [np.take(order, range(at + i * per_call, at + (i + 1) * per_call), mode="wrap")
                         for i in range(threads)]  # fmt: skip
                at += threads * per_call
                begin = clock()
                list(pool.map(bring, parts))
                spent[name] += clock() - begin
                rows[name] += threads * per_call
    cost = {name: spent[name] / rows[name] for name in candidates}
    preferred, best = next(iter(cost)), min(cost, key=lambda name: cost[name])
    return (best if cost[best] * _MARGIN < cost[preferred] else preferred), cost


def choose(candidates: Mapping[str, Callable[[np.ndarray], object]], n_rows: int, *, threads: int) -> str:
    """`fastest`, said in the log with its reason."""
    name, cost = fastest(candidates, n_rows, threads=threads)
    if not cost:
        _LOG.info("io='auto': %s, the only reader that can be used here", name)
        return name
    figures = ", ".join(f"{other} {1e6 * value:.1f}" for other, value in cost.items())
    why = "is fastest" if name == min(cost, key=lambda other: cost[other]) else "is as good as any"
    _LOG.info(
        "io='auto': %s %s on these files (microseconds per row, %d threads: %s)", name, why, threads, figures
    )
    return name


def open_reader(kind: str, directory: ChunkDirectory) -> Reader:
    """A reader of the kind asked for.

    ``mmap``: no copy. ``preadv``: one buffer, explicit reads. ``pinned``: as mmap, and staging for a
    device reads explicitly into its page-locked memory.
    """
    from hbx_gpu._storage.pinned import PinnedReader

    readers: dict[str, type[Reader]] = {"mmap": MmapReader, "preadv": PreadReader, "pinned": PinnedReader}
    if kind not in readers:
        raise ValueError(f"unknown reader {kind!r}; there are {', '.join(readers)}")
    return readers[kind](directory)
