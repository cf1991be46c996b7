"""Compute limits from bandwidths measured on this machine and the bytes that a cell needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu._bench.settings import Setting

if TYPE_CHECKING:
    from hbx_gpu._datasets.cells import CellDataset

_REPEATS = 5
_PROBE = 64 << 20


@dataclass(frozen=True)
class Bandwidth:
    """Bandwidths in bytes per second, each the best of several measurements.

    Attributes
    ----------
    fill, copy
        Setting and copying memory where batches are made (a copy counts the bytes copied, once): on the CPU
        with as many threads as the loader has, on a GPU in its memory.
    link
        From page-locked memory to the GPU; None on the CPU.
    """

    fill: float
    copy: float
    link: float | None = None


def bandwidth(gpu: int | None, threads: int) -> Bandwidth:
    """Measure; takes well under a second."""
    return _on_cpu(threads) if gpu is None else _on_gpu(gpu)


def _on_cpu(threads: int) -> Bandwidth:
    part = _PROBE // 4
    sources = [np.ones(part, np.uint8) for _ in range(threads)]
    targets = [np.ones(part, np.uint8) for _ in range(threads)]
    zeros = [np.zeros(1, np.uint8)] * threads
    with ThreadPoolExecutor(threads) as pool:
        fill = _best(lambda: list(pool.map(np.copyto, targets, zeros)))
        copy = _best(lambda: list(pool.map(np.copyto, targets, sources)))
    return Bandwidth(part * threads / fill, part * threads / copy)


def _on_gpu(gpu: int) -> Bandwidth:
    import torch

    device = torch.device("cuda", gpu)
    host = torch.empty(_PROBE, dtype=torch.uint8, pin_memory=True)
    source = torch.empty(8 * _PROBE, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def finish() -> None:
        torch.cuda.synchronize(device)

    fill = _best(lambda: target.zero_(), finish)
    copy = _best(lambda: target.copy_(source), finish)
    link = _best(lambda: source[:_PROBE].copy_(host, non_blocking=True), finish)
    return Bandwidth(8 * _PROBE / fill, 8 * _PROBE / copy, _PROBE / link)


def _best(work: Callable[[], object], finish: Callable[[], None] = lambda: None) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        finish()
        clock = time.perf_counter()
        work()
        finish()
        best = min(best, time.perf_counter() - clock)
    return best


@dataclass(frozen=True)
class Bytes:
    """Bytes and values per cell.

    Attributes
    ----------
    stored
        Compressed bytes per cell if neighboring cells are all needed: the least that must be read.
    values
        Stored values per cell, on average.
    """

    stored: float
    values: float
    n_features: int

    def made(self, setting: Setting) -> float:
        """Bytes of a finished cell: its dense row, or an int64 column and a float32 per stored value."""
        if setting.layout == "csr":
            return self.values * 12
        return self.n_features * {"float32": 4, "float64": 8}.get(setting.dtype, 2)


def bytes_per_cell(dataset: CellDataset) -> Bytes:
    """Return the sizes per cell, from evenly spaced stretches of a dataset."""
    n = len(dataset)
    size = min(n, 4096)
    stored = cells = 0
    for first in np.unique(np.linspace(0, n - size, 4).astype(np.int64)):
        _, slab = dataset.read(np.arange(first, first + size))
        stored += int(slab.nbytes[slab.nbytes > 0].sum())
        cells += size
    return Bytes(stored / cells, float(dataset.row_index.length.mean()), dataset.n_features)


def limit(setting: Setting, found: Bandwidth, sizes: Bytes) -> float:
    """Cells/s that memory and link allow: every stored byte crosses once, every byte made is written once.

    Link and device memory work side by side; on the CPU both are the same memory, one after the other.
    """
    write = sizes.made(setting) / found.fill
    if found.link is None:
        return 1 / (write + sizes.stored / found.copy)
    if setting.residency == "device":
        return 1 / (write + sizes.stored / found.copy)
    return 1 / max(write, sizes.stored / found.link)
