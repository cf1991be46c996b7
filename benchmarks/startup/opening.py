"""What a large atlas costs before and while it is read: ``python -m benchmarks.startup opening``.

Time to open and to the first batch, resident memory of the row index, and peak memory of random batches
over the whole atlas, each in a process of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import DataSpec, conditions, prepare
from benchmarks.jobs import in_process, peak_rss
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.tables import spread, table, write_json


def measure(atlas: str, batch_size: int, rows: int) -> dict[str, Any]:
    """Open `atlas` and read `rows` random rows; times in seconds, memory in bytes."""
    import psutil

    from hbx_gpu.atlas import RaggedAtlas
    from hbx_gpu.dataloader import make_loader
    from hbx_gpu.sampler import CellSampler

    resident = psutil.Process().memory_info
    before = resident().rss
    clock = time.perf_counter()
    dataset: Any = RaggedAtlas.checkout_latest(atlas).query().to_cell_dataset("gene_expression")
    opened = time.perf_counter() - clock
    with_index = resident().rss
    dataset[list(range(batch_size))]
    first = time.perf_counter() - clock

    sampler = CellSampler(dataset.groups_np, batch_size, seed=0, num_workers=0, locality="none")
    clock, seen = time.perf_counter(), 0
    for batch in make_loader(dataset, sampler):
        seen += len(batch)
        if seen >= rows:
            break
    return {
        "cells": len(dataset),
        "open_s": opened,
        "first_batch_s": first,
        "index_bytes_per_row": sum(a.nbytes for a in (dataset.row_index.source, dataset.row_index.start,
                                                     dataset.row_index.length)) / len(dataset),
        "import_rss": before,
        "opened_rss": with_index,
        "peak_rss": peak_rss(),
        "cells_per_s": seen / (time.perf_counter() - clock),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup opening", description=__doc__)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("demo/benchmark-data"))
    parser.add_argument("--out", type=Path, default=Path("demo/benchmarks"))
    options = parser.parse_args(argv)

    spec = DataSpec(cells=options.cells, genes=options.genes)
    data = prepare(options.data, spec)
    job = {"atlas": str(data.atlas), "batch_size": 512, "rows": options.cells}
    runs = [in_process("benchmarks.startup.opening:measure", job) for _ in range(options.repeat)]
    found = conditions()
    found_in = {key: spread([run[key] for run in runs]) for key in runs[0]}
    median = {key: value["median"] for key, value in found_in.items()}
    print(
        table(
            ("after imports", "median"),
            [
                ("open the atlas and make the dataset, s", f"{median['open_s']:.2f}"),
                ("first batch of 512, s", f"{median['first_batch_s']:.2f}"),
                ("row index, bytes per row", f"{median['index_bytes_per_row']:.1f}"),
                ("resident after import, MB", f"{median['import_rss'] / 1e6:,.0f}"),
                ("resident after opening, MB", f"{median['opened_rss'] / 1e6:,.0f}"),
                ("peak over an epoch of random batches, MB", f"{median['peak_rss'] / 1e6:,.0f}"),
                ("cells per second, random, CSR", f"{median['cells_per_s']:,.0f}"),
            ],
        )
    )
    print(f"{spec.describe()}; page cache warm; {options.repeat} runs\n{describe(found)}")
    write_json(options.out / "opening.json", {"conditions": found, "spec": spec.describe(), "runs": runs})
    return 0
