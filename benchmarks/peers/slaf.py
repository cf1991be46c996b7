"""SLAF: its loader in raw mode, the default mixture of scanners over a Lance dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import Csr, Loader, Peer, Rows, Source, Task, Variant, bytes_below, main


def prepare(source: Path, work: Path, options: Mapping[str, str]) -> int:  # noqa: ARG001
    """`SLAFConverter` at its defaults."""
    from slaf.data import SLAFConverter

    archive = work / "archive.slaf"
    SLAFConverter().convert(str(source), str(archive))
    data = Source(source)
    n_cells, n_genes = data.shape()
    # Its table has a row per nonzero, so it never delivers a cell without any.
    n_delivered = int((np.diff(data.rows(0, n_cells).indptr) > 0).sum())
    (work / "shape.json").write_text(json.dumps([n_delivered, n_genes]))
    return bytes_below(archive)


def open_loader(task: Task) -> Loader:
    """One `SLAFDataLoader` over endless epochs, cut where every cell has come once.

    Asked for a single epoch, its iterator waits for more than a minute after the last batch.
    """
    from slaf import SLAFArray
    from slaf.ml.dataloaders import SLAFDataLoader

    array = SLAFArray(str(task.work / "archive.slaf"))
    n_cells, n_genes = json.loads((task.work / "shape.json").read_text())
    # Its metadata arrive in a thread; a loader made before they have finds none, and delivers nothing.
    _ = array.obs
    loader = SLAFDataLoader(array, batch_size=task.batch, n_epochs=1_000_000, raw_mode=True, verbose=False)
    batches = iter(loader)

    def epoch(number: int) -> Iterator[Rows]:  # noqa: ARG001  (it counts epochs itself; its seed is fixed)
        delivered = 0
        while delivered < n_cells:
            rows = _rows(next(batches), n_genes, task.layout)
            delivered += len(rows)
            yield rows

    return Loader(n_cells, epoch, window=n_cells, lingers=True, close=loader._dataset.prefetcher.stop)


def _rows(batch: Any, n_genes: int, layout: str) -> Rows:
    frame = batch["x"]
    cells = frame["cell_integer_id"].to_numpy()
    genes = frame["gene_integer_id"].to_numpy()
    values = frame["value"].to_numpy()
    # A row of the frame is one nonzero; those of a cell stand together.
    starts = np.concatenate(([0], np.flatnonzero(np.diff(cells)) + 1, [len(cells)])).astype(np.int64)
    if layout == "csr":
        return Csr(starts, genes, values)
    dense = np.zeros((len(starts) - 1, n_genes), np.float32)
    dense[np.repeat(np.arange(len(starts) - 1), np.diff(starts)), genes] = values
    return dense


PEER = Peer(
    name="slaf",
    packages=("slafdb", "pylance", "polars", "torch", "numpy"),
    # Its prefetcher needs psutil and hangs without it, although it does not declare it.
    imports=("slaf", "slaf.ml.dataloaders", "torch", "psutil"),
    prepare=prepare,
    open=open_loader,
    variants={
        "mixture": Variant(
            "SLAF", "stream", "SLAFDataLoader(raw_mode=True), mixture of scanners at its defaults"
        ),
    },
)

if __name__ == "__main__":
    main(PEER)
