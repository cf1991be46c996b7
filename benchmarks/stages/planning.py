"""Time to plan a batch: ``python -m benchmarks.stages planning``.

No I/O and no data: row pointers over made-up groups, as a large atlas has them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import conditions
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.tables import spread, table, write_json
from hbx_gpu._plan.rows import SourceTable, plan_rows, source_table
from hbx_gpu._source import ArrayLayout, RowIndex, Source

_ELEMENTS_PER_CHUNK = 40_960
_GENES = 20_000


def _layout(name: str, n_elements: int) -> ArrayLayout:
    return ArrayLayout(
        path=name,
        name=name,
        shape=(n_elements,),
        dtype=np.dtype(np.uint32),
        chunk_shape=(_ELEMENTS_PER_CHUNK,),
        shard_shape=(1_024 * _ELEMENTS_PER_CHUNK,),
        codecs=(),
    )


def made_up_atlas(n_groups: int, n_rows: int, per_row: int = 1_400) -> tuple[SourceTable, RowIndex]:
    """Tables of n_rows rows spread evenly over n_groups groups; row lengths vary around per_row."""
    rng = np.random.default_rng(0)
    source = np.sort(rng.integers(0, n_groups, n_rows)).astype(np.int32)
    length = rng.poisson(per_row, n_rows).astype(np.int32)
    ends = np.cumsum(length, dtype=np.int64)
    first_row = np.searchsorted(source, np.arange(n_groups))
    start = ends - length
    group_start = np.append(start, ends[-1])[first_row]
    group_elements = np.diff(np.append(group_start, ends[-1]))
    remap = np.arange(_GENES, dtype=np.int32)
    sources = [
        Source(f"group_{k}", _layout("indices", int(n)), {"counts": _layout("counts", int(n))}, remap)
        for k, n in enumerate(group_elements)
    ]
    rows = RowIndex(source, start - group_start[source], length)
    return source_table(sources, ["counts"], _GENES), rows


def measure(n_groups: int, batch: int, *, n_rows: int, repeat: int) -> dict[str, Any]:
    """Milliseconds per 1,000 rows of random batches: median and range over `repeat` batches."""
    tables, rows = made_up_atlas(n_groups, n_rows)
    rng = np.random.default_rng(1)
    took = []
    for _ in range(repeat + 2):
        selection = rng.integers(0, n_rows, batch)
        clock = time.perf_counter()
        plan_rows(tables, rows, selection)
        took.append((time.perf_counter() - clock) * 1e6 / batch)
    # The first two touch memory for the first time.
    return {"groups": n_groups, "batch": batch, "ms_per_1000_rows": spread(took[2:])}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages planning", description=__doc__)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 16, 256, 1_024])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 512, 4_096])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("demo/benchmarks"))
    options = parser.parse_args(argv)
    found = conditions()
    results = [
        measure(groups, batch, n_rows=options.rows, repeat=options.repeat)
        for groups in options.groups
        for batch in options.batch_sizes
    ]
    rows = [
        (
            f"{r['groups']:,}",
            f"{r['batch']:,}",
            *(f"{r['ms_per_1000_rows'][key]:.3f}" for key in ("median", "min", "max")),
        )
        for r in results
    ]
    print(f"planning random batches of {options.rows:,} rows, about 1,400 values each")
    print(table(("groups", "batch", "ms per 1,000 rows", "fastest", "slowest"), rows))
    print(describe(found))
    write_json(options.out / "planning.json", {"conditions": found, "results": results})
    return 0
