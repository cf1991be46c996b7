"""Where the time of a batch goes, on one thread: ``python -m benchmarks.stages cells``.

Microseconds per cell of planning, finding and addressing chunks, decoding and gathering, and making rows
dense; random and stored order, one plan of `--rows` cells at a time, best of several passes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.common import DataSpec, conditions, prepare
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.settings import open_dataset
from hbx_gpu._bench.tables import table, write_json
from hbx_gpu._buffers import BufferPool
from hbx_gpu._engine.host.dense import densify
from hbx_gpu._plan.rows import plan_rows
from hbx_gpu.dataloader import CellDataset

STAGES = ("plan", "extents", "read", "decode and gather", "dense float32")


def measure(dataset: CellDataset, order: np.ndarray, rows: int, repeat: int) -> dict[str, float]:
    """Microseconds per cell of each stage."""
    best = dict.fromkeys(STAGES, float("inf"))
    pool = BufferPool()
    for _ in range(repeat + 1):  # the first pass verifies checksums and compiles
        spent = dict.fromkeys(STAGES, 0.0)
        for begin in range(0, len(order) - rows + 1, rows):
            clock = [time.perf_counter()]
            plan = plan_rows(dataset._table, dataset.row_index, order[begin : begin + rows])
            clock.append(time.perf_counter())
            extents = dataset._directory.extents(plan.chunks)
            clock.append(time.perf_counter())
            slab = dataset._reader.read(extents)
            clock.append(time.perf_counter())
            dataset._engine.csr(plan, slab)
            clock.append(time.perf_counter())
            for stage, seconds in zip(STAGES, np.diff(clock), strict=False):
                spent[stage] += seconds
        batch = dataset[order[: min(rows, 512)]]
        begin_dense = time.perf_counter()
        densify(batch, pool=pool)
        seen = len(order) // rows * rows
        per_cell = {stage: 1e6 * seconds / seen for stage, seconds in spent.items()}
        per_cell[STAGES[-1]] = 1e6 * (time.perf_counter() - begin_dense) / len(batch)
        best = {stage: min(best[stage], per_cell[stage]) for stage in STAGES}
    return best


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages cells", description=__doc__)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--codec", default=None, help="codec of the atlas (default: that of new ones)")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path("demo/benchmark-data"))
    parser.add_argument("--out", type=Path, default=Path("demo/benchmarks"))
    options = parser.parse_args(argv)

    spec = DataSpec(cells=options.cells, genes=options.genes, codec=options.codec)
    data = prepare(options.data, spec)

    dataset = open_dataset(data.atlas, "gene_expression")
    stored = np.arange(len(dataset))
    orders = {"random": np.random.default_rng(0).permutation(len(dataset)), "stored": stored}
    rows, results = [], []
    for name, order in orders.items():
        for n in options.rows:
            found = measure(dataset, order, n, options.repeat)
            results.append({"order": name, "rows": n, **found})
            rows.append((f"{name}, {n:,} rows per plan", *(f"{found[stage]:.2f}" for stage in STAGES)))
    machine = conditions()
    print(table(("microseconds per cell", *STAGES), rows))
    print(f"{spec.describe()}; one thread, page cache warm, best of {options.repeat}")
    print(describe(machine))
    write_json(options.out / "stages.json", {"conditions": machine, "spec": spec.describe(), "runs": results})
    return 0
