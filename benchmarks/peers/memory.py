"""What memory alone allows: a scipy CSR matrix held in RAM, and copying the bytes of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from benchmarks.peers.protocol import (
    Csr,
    Loader,
    Peer,
    Rows,
    Source,
    Task,
    Variant,
    bytes_below,
    main,
    shuffled_batches,
)


def prepare(source: Path, work: Path, options: Mapping[str, str]) -> int:  # noqa: ARG001
    """The file itself."""
    (work / "source").write_text(str(source.resolve()))
    return bytes_below(source)


def _in_memory(task: Task) -> Loader:
    source = Source(Path((task.work / "source").read_text()))
    x = source.rows(0, source.shape()[0])

    def epoch(number: int) -> Iterator[Rows]:
        for rows in shuffled_batches(x.shape[0], task.batch, task.seed, number):
            batch = x[rows]
            if task.layout == "csr":
                yield Csr(batch.indptr, batch.indices, batch.data)
            else:
                yield batch.toarray()

    return Loader(x.shape[0], epoch)


def _copy(task: Task) -> Loader:
    """Memory traffic that no loader avoids.

    CSR: one memcpy of the batch's indices and values (8 bytes per nonzero) into fresh memory, rows in stored
    order. Dense: fresh memory filled with zeros.
    """
    source = Source(Path((task.work / "source").read_text()))
    n_cells, n_genes = source.shape()
    indptr = np.zeros(n_cells + 1, np.int64)
    stored = np.empty(0, np.uint64)
    if task.layout == "csr":
        x = source.rows(0, n_cells)
        indptr = x.indptr.astype(np.int64)
        stored = np.empty(x.nnz, np.uint64)
        stored.view(np.float32)[::2] = x.data
        del x

    def epoch(number: int) -> Iterator[Rows]:  # noqa: ARG001
        for first in range(0, n_cells, task.batch):
            last = min(first + task.batch, n_cells)
            if task.layout == "dense":
                dense = np.empty((last - first, n_genes), np.float32)
                dense.fill(0)
                yield dense
            else:
                copied = stored[indptr[first] : indptr[last]].copy()
                yield Csr(indptr[first : last + 1] - indptr[first], copied, copied)

    return Loader(n_cells, epoch, checks=False)


def open_loader(task: Task) -> Loader:
    """See the variants."""
    return _in_memory(task) if task.variant == "scipy" else _copy(task)


PEER = Peer(
    name="memory",
    packages=("scipy", "numpy"),
    imports=("scipy.sparse", "h5py"),
    prepare=prepare,
    open=open_loader,
    variants={
        "scipy": Variant("scipy CSR in memory", "random", "x[rows] on one core, the whole matrix in RAM"),
        "copy": Variant(
            "floor: memcpy / zero fill", "floor", "CSR: memcpy of the same bytes; dense: zero fill"
        ),
    },
)

if __name__ == "__main__":
    main(PEER)
