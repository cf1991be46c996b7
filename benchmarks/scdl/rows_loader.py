"""One loader over one SCDL archive, timed and checked: runs under our interpreter or that of bionemo-scdl.

Needs Python 3.10, NumPy and what the loader imports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.jobs import peak_rss
from benchmarks.peers.protocol import Csr, fingerprints, gene_weights

LOADERS = ("ours", "ours-csr", "scdl", "scdl-workers")
Epoch = Callable[[int], Iterator[Csr]]


@dataclass(frozen=True)
class Job:
    """What to measure: some seconds of a loader, after a warm-up.

    Attributes
    ----------
    window
        Cells that are read in one go.
    truth
        Fingerprints of the archive's rows (.npy).
    """

    loader: str
    archive: str
    order: str
    batch: int
    seconds: float
    warmup: float
    truth: str
    window: int = 4096


def measure(**settings: Any) -> dict[str, Any]:
    """Measure one `Job` in this process, so that its peak memory is that of this setting."""
    job = Job(**settings)
    open_loader = _open_scdl if job.loader.startswith("scdl") else _open_ours
    clock = time.perf_counter()
    epoch, n_genes = open_loader(job)
    warm = epoch(0)
    first = next(warm)
    opened = time.perf_counter() - clock
    clock, number = time.perf_counter(), 0
    while time.perf_counter() - clock < job.warmup:
        for _ in warm:
            if time.perf_counter() - clock >= job.warmup:
                break
        _close(warm)
        number += 1
        warm = epoch(number)
    _close(warm)
    cells, elapsed = 0, 0.0
    kept: list[tuple[int, Csr]] = [(0, first)]
    clock, busy = time.perf_counter(), time.process_time()
    while elapsed < job.seconds:
        rows = epoch(number)
        at = 0
        for found in rows:
            at += len(found)
            cells += len(found)
            elapsed = time.perf_counter() - clock
            # At the end of a window: nothing that was read ahead is left out of the clock.
            if elapsed >= job.seconds and at % job.window == 0:
                break
        kept = [*kept[-3:], (at - len(found), found)]
        elapsed = time.perf_counter() - clock
        _close(rows)
        number += 1
    busy = time.process_time() - busy
    return {
        "loader": job.loader,
        "order": job.order,
        "batch": job.batch,
        "cells_per_s": cells / elapsed,
        "cells": cells,
        "elapsed_s": elapsed,
        # Of this process and its threads; unknown where workers do the work.
        "cpu_s": None if job.loader == "scdl-workers" else busy,
        "first_batch_s": opened,
        "peak_rss": peak_rss(),
        **_check(job, kept, n_genes),
    }


def _check(job: Job, kept: list[tuple[int, Csr]], n_genes: int) -> dict[str, int]:
    """Compare delivered rows with the archive's: as rows of it, and in their place where order is stored."""
    truth = np.load(job.truth)
    checked = wrong = 0
    for begin, rows in kept:
        found = fingerprints(rows, gene_weights(n_genes))
        checked += len(found)
        if job.order == "sequential":
            wrong += int((found != truth[begin : begin + len(found)]).sum())
        else:
            wrong += int((~np.isin(found, truth)).sum())
    return {"checked_rows": checked, "wrong_rows": wrong}


def _open_ours(job: Job) -> tuple[Epoch, int]:
    """`make_loader` on the archive: threads of this process; NumPy CSR, or torch CSR tensors."""
    from hbx_gpu.dataloader import make_loader
    from hbx_gpu.sampler import CellSampler
    from hbx_gpu.scdl import SingleCellMemMapDataset

    dataset = SingleCellMemMapDataset(job.archive).to_cell_dataset()
    sampler = CellSampler(
        dataset.groups_np,
        batch_size=job.batch,
        shuffle=job.order == "random",
        locality="none",
        seed=0,
        num_workers=0,
    )
    layout = "csr" if job.loader == "ours-csr" else None
    loader = make_loader(dataset, sampler, layout=layout, executor="direct")

    def epoch(number: int) -> Iterator[Csr]:
        loader.set_epoch(number)
        for found in loader:
            if layout:
                x = found["X"]
                yield Csr(x.crow_indices().numpy(), x.col_indices().numpy(), x.values().numpy())
            else:
                yield Csr(found.offsets, found.indices, found.values)

    return epoch, dataset.n_features


def _open_scdl(job: Job) -> tuple[Epoch, int]:
    """The loop of its README: torch DataLoader with `collate_sparse_matrix_batch`."""
    import torch
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch

    dataset = SingleCellMemMapDataset(job.archive)
    workers = 2 if job.loader == "scdl-workers" else 0
    loader: Any = torch.utils.data.DataLoader(
        dataset,
        batch_size=job.batch,
        shuffle=job.order == "random",
        collate_fn=collate_sparse_matrix_batch,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(0),
    )

    def epoch(number: int) -> Iterator[Csr]:
        del number
        for x in loader:
            yield Csr(x.crow_indices().numpy(), x.col_indices().numpy(), x.values().numpy())

    return epoch, max(dataset.number_of_variables())


def _close(rows: Iterator[Csr]) -> None:
    if hasattr(rows, "close"):
        rows.close()
