"""Measure which reader is fastest on the user's own files, and log the result.

This module compares candidates, which are functions that read rows; how they read is decided by the caller.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hbx_gpu._advice import option
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.readers import MmapReader, PreadReader, Reader
from hbx_gpu._storage.remote import RemoteReader

IO = ("auto", "mmap", "pinned", "kvikio")
"""Accepted values of the option `io`."""
_ROWS = 256
_SECONDS = 0.2  # per candidate
_MARGIN = 1.1  # another candidate must be this much faster than the first; less could be noise
_LOG = logging.getLogger(__name__)


def check_io(io: str) -> str:
    """Return `io` if it is an accepted value; raise ValueError otherwise."""
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
        Name -> function that reads the rows with the given numbers; it is called on several threads. The
        candidates are in order of preference: a later one must be clearly faster than the first.
    n_rows
        Number of rows of the dataset.
    threads
        Number of calls at a time, the same as the loader will make.
    seconds
        About how long each candidate is measured; each is called at least once.
    clock
        Function that returns a time in seconds.

    Returns
    -------
    tuple
        Name of the fastest candidate, and the seconds per row of each candidate.
    """
    if len(candidates) < 2 or not n_rows:
        return next(iter(candidates)), {}
    order = np.random.default_rng(0).permutation(n_rows)
    per_call = max(1, min(_ROWS, n_rows // (4 * threads * len(candidates))))
    spent, rows = dict.fromkeys(candidates, 0.0), dict.fromkeys(candidates, 0)
    at = 0
    with ThreadPoolExecutor(threads) as pool:
        # The first round opens files and compiles, so it does not count.
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
    """Return the name from `fastest`, and log it with the measured times."""
    name, cost = fastest(candidates, n_rows, threads=threads)
    if not cost:
        _LOG.info("%s: %s, the only reader that can be used here", option("io", "auto"), name)
        return name
    figures = ", ".join(f"{other} {1e6 * value:.1f}" for other, value in cost.items())
    why = "is fastest" if name == min(cost, key=lambda other: cost[other]) else "is as good as any"
    _LOG.info(
        "%s: %s %s on these files (microseconds per row, %d threads: %s)",
        option("io", "auto"),
        name,
        why,
        threads,
        figures,
    )
    return name


def open_reader(kind: str, directory: ChunkDirectory) -> Reader:
    """Open a reader of the kind asked for.

    ``mmap`` maps files and copies nothing. ``preadv`` reads into one buffer with system calls. ``pinned``
    maps files to look at chunks, and reads what a device needs straight into page-locked memory. Chunks in
    object storage have a reader of their own, whatever the kind.
    """
    if directory.is_remote:
        return RemoteReader(directory)
    from hbx_gpu._storage.pinned import PinnedReader

    readers: dict[str, type[Reader]] = {"mmap": MmapReader, "preadv": PreadReader, "pinned": PinnedReader}
    if kind not in readers:
        raise ValueError(f"unknown reader {kind!r}; there are {', '.join(readers)}")
    return readers[kind](directory)
