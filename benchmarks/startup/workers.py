"""What a spawned worker costs until its first batch: ``python -m benchmarks.startup workers``.

Time and resident memory of a bare spawned process and of a torch DataLoader worker, and the bytes
that a dataset pickles to.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pickle
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import DataSpec, conditions, prepare
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.tables import table, write_json


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _first_batch(dataset: Any, started: float, results: Any) -> None:
    """Run in the child: it has been spawned, has imported this module and unpickled the dataset."""
    import sys

    ready, before = time.time() - started, _resident()
    batch = dataset.__getitems__(range(512))
    results.put(
        {
            "ready_s": ready,
            "first_batch_s": time.time() - started,
            "ready_rss": before,
            "first_batch_rss": _resident(),
            "rows": len(batch),
            "heavy_imports": sorted({"torch", "pandas", "lancedb", "anndata"} & set(sys.modules)),
        }
    )


def bare_process(dataset: Any) -> dict[str, Any]:
    """A spawned process that imports nothing but what the dataset needs."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=_first_batch, args=(dataset, time.time(), results))
    worker.start()
    found: dict[str, Any] = results.get(timeout=120)
    worker.join()
    return found


def loader_worker(dataset: Any) -> dict[str, Any]:
    """One worker of a torch DataLoader, from the first `next` to the first batch."""
    import psutil

    from hbx_gpu.dataloader import make_loader
    from hbx_gpu.sampler import CellSampler

    sampler = CellSampler(dataset.groups_np, batch_size=512, seed=0)
    with make_loader(dataset, sampler, num_workers=1) as loader:
        clock = time.perf_counter()
        batches = iter(loader)
        next(batches)
        took = time.perf_counter() - clock
        children = psutil.Process().children(recursive=True)
        # Python's resource tracker is a child too, and small.
        resident = max((child.memory_info().rss for child in children), default=0)
        del batches
    return {"first_batch_s": took, "first_batch_rss": resident}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup workers", description=__doc__)
    parser.add_argument("--cells", type=int, default=40_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--data", type=Path, default=Path("demo/benchmark-data"), help="where data are generated"
    )
    parser.add_argument("--out", type=Path, default=Path("demo/benchmarks"), help="where results go")
    options = parser.parse_args(argv)

    spec = DataSpec(cells=options.cells, genes=options.genes)
    data = prepare(options.data, spec)
    from hbx_gpu.atlas import RaggedAtlas

    query = RaggedAtlas.checkout_latest(str(data.atlas)).query()
    dataset = query.to_cell_dataset("gene_expression", layer="counts", metadata_columns=["cell_type"])
    pickled = len(pickle.dumps(dataset))
    bare = [bare_process(dataset) for _ in range(options.repeat)]
    torch_worker = [loader_worker(dataset) for _ in range(options.repeat)]

    rows = [
        _row("bare process, dataset ready", bare, "ready"),
        _row("bare process, first batch of 512", bare, "first_batch"),
        _row("DataLoader worker, first batch of 512", torch_worker, "first_batch"),
    ]
    found = conditions()
    print(table(("until", "s (median)", "resident MB"), rows))
    print(f"the dataset of {len(dataset):,} rows pickles to {pickled:,} bytes")
    print(f"heavy imports in the bare process: {', '.join(bare[-1]['heavy_imports']) or 'none'}")
    print(f"{spec.describe()}; page cache warm; {options.repeat} repeats\n{describe(found)}")
    write_json(
        options.out / "workers.json",
        {
            "conditions": found,
            "pickled_bytes": pickled,
            "rows": len(dataset),
            "bare": bare,
            "loader": torch_worker,
        },
    )
    return 0


def _row(name: str, runs: Sequence[dict[str, Any]], stage: str) -> tuple[str, str, str]:
    seconds = statistics.median(run[f"{stage}_s"] for run in runs)
    resident = statistics.median(run[f"{stage}_rss"] for run in runs)
    return name, f"{seconds:.2f}", f"{resident / 1e6:,.0f}"
