"""CPU time of statistics beside reading the same rows as CSR, and the memory that a result takes.

The matrix is made here: counts of a Poisson distribution with means that differ between genes and cells, in
rowpack chunks of 40,960 values.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from hbx_gpu.dataloader import CellDataset
from hbx_gpu.statistics import compute
from hbx_gpu.statistics._tasks import Tasks, prepared
from hbx_gpu.testing._stored import StoredGroup, write_sources

_REPEATS = 3


def dataset(root: Path, n_cells: int, n_genes: int) -> tuple[CellDataset, int]:
    """The cells, and their number of stored values."""
    rng = np.random.default_rng(0)
    scale = rng.gamma(0.3, 1, n_genes)
    means = scale / scale.sum() * 5500
    indptr, columns, counts = [0], [], []
    for depth in rng.lognormal(0, 0.4, n_cells):
        row = rng.poisson(means * depth)
        columns.append(np.flatnonzero(row))
        counts.append(row[columns[-1]])
        indptr.append(indptr[-1] + len(columns[-1]))
    parts = (np.concatenate(counts).astype(np.uint32), np.concatenate(columns).astype(np.int32), indptr)
    matrix = sp.csr_matrix(parts, shape=(n_cells, n_genes))
    group = StoredGroup(
        matrix, np.arange(n_genes, dtype=np.int32), codec="hbx_gpu.rowpack", chunk=40_960, chunks_per_shard=64
    )
    sources, rows = write_sources(root, [group])
    uids = np.array([f"g{i}" for i in range(n_genes)], dtype=object)
    made = CellDataset(sources, rows, layer="counts", n_features=n_genes, feature_uids=uids)
    return made, int(matrix.nnz)


def read(cells: CellDataset) -> None:
    """Read all rows as CSR in the windows that statistics read."""
    tasks, plain = Tasks(cells), prepared(cells)
    for rows in tasks.windows(0, len(tasks)):
        plain.read_batches([rows])


def cpu_seconds(work: Callable[[], object]) -> float:
    """Best of three."""
    times = []
    for _ in range(_REPEATS):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def grown(work: Callable[[], object]) -> float:
    """MB by which the memory of this process grows at most meanwhile."""

    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    before, most, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return most[0] - before


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.statistics", description=__doc__)
    parser.add_argument("--cells", type=int, default=8_000)
    parser.add_argument("--genes", type=int, default=20_000)
    options = parser.parse_args(argv)
    n_cells, n_genes = options.cells, options.genes
    with tempfile.TemporaryDirectory() as folder:
        cells, n_values = dataset(Path(folder), n_cells, n_genes)
        few = cells.subset(np.arange(min(100, n_cells)))
        compute(few)
        compute(few, exact_medians=0)
        print(f"{n_cells:,} cells x {n_genes:,} genes, {n_values:,} values; load {os.getloadavg()[0]:.1f}")
        alone = cpu_seconds(lambda: read(cells))
        print(f"reading CSR alone: {alone:.2f} CPU s, {alone / n_values * 1e9:.1f} ns a value")
        works: dict[str, Callable[[], object]] = {
            "without medians": lambda: compute(cells, medians=False),
            "medians from bins": lambda: compute(cells, exact_medians=0),
            "exact medians": lambda: compute(cells, exact_medians=1 << 40),
        }
        for name, work in works.items():
            took, memory = cpu_seconds(work), grown(work)
            print(f"{name}: {took:.2f} CPU s, {took / n_values * 1e9:.1f} ns a value, {memory:,.0f} MB more")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
