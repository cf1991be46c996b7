"""What DALI costs per batch, beside handing it over directly: ``python -m benchmarks.executors``.

*Hand-over*: the same finished batch again and again, so that nothing but the executor is measured; its
threads and pipeline have begun. *Loading*: whole epochs over an atlas in random order, their begin included.
Executors take turns in one process; the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import DataSpec, conditions, prepare
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.settings import open_dataset
from hbx_gpu._bench.tables import spread, table, write_json

EXECUTORS = ("direct", "dali", "pipeline")
"""Those of ``make_loader``, and ``cell_pipeline``, which runs a DALI pipeline."""
LAYOUTS = {
    "dense float32": {"layout": "dense"},
    "dense bfloat16": {"layout": "dense", "dtype": "bfloat16"},
    "csr": {"layout": "csr"},
}


def ready(feed: Any, batch: dict[str, Any]) -> None:
    """Let a loader's feed answer with a batch that is made already: only handing over is left."""
    feed.make = lambda selections: [batch] * len(selections)
    feed.deliver = lambda made: made
    feed.nbytes = lambda batches: [0] * len(batches)


def nbytes(batch: dict[str, Any]) -> int:
    """Of all tensors."""
    import torch

    total = 0
    for value in batch.values():
        if isinstance(value, torch.Tensor):
            sparse = value.layout is torch.sparse_csr
            parts = (value.values(), value.col_indices(), value.crow_indices()) if sparse else (value,)
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


def per_batch(loader: Any, most: int | None) -> float:
    """Microseconds per batch of an epoch, or of `most` batches after the first."""
    begin, n = time.perf_counter(), 0
    batches = iter(loader)
    if most is not None:
        next(batches)
        begin = time.perf_counter()
    for _ in batches:
        n += 1
        if n == most:
            break
    seconds = time.perf_counter() - begin
    loader.close()
    return 1e6 * seconds / n


def alternate(loaders: dict[str, Any], rounds: int, most: int | None) -> dict[str, list[float]]:
    """Microseconds per batch of every executor, round by round, in turns; one round to warm up."""
    found: dict[str, list[float]] = {name: [] for name in loaders}
    for k in range(rounds + 1):
        for name in list(loaders)[:: 1 if k % 2 else -1]:
            loaders[name].set_epoch(k)
            taken = per_batch(loaders[name], most)
            if k:
                found[name].append(taken)
    return found


def by_executor(dataset: Any, sampler: Any, executor: str, made: Any = None, **options: Any) -> Any:
    """A loader; with `made`, one that hands this batch over again and again."""
    from hbx_gpu.dataloader import make_loader
    from hbx_gpu.pipeline import cell_pipeline

    if executor == "pipeline":
        loader: Any = cell_pipeline(dataset, sampler, **options)
    else:
        loader = make_loader(dataset, sampler, executor=executor, **options)
    if made is not None:
        ready(loader.feed, made)
    return loader


def measure(make: Callable[[str], Any], rounds: int, most: int | None) -> dict[str, Any]:
    """Every executor, and what DALI adds in dynamic mode and as a pipeline."""
    found = alternate({name: make(name) for name in EXECUTORS}, rounds, most)
    direct, dali, pipeline = (statistics.median(found[name]) for name in EXECUTORS)
    spreads: dict[str, Any] = {name: spread(values) for name, values in found.items()}
    return {**spreads, "added": dali - direct, "added_by_pipeline": pipeline - direct}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.executors", description=__doc__)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=200, help="of a hand-over")
    parser.add_argument("--data", type=Path, default=Path("demo/benchmark-data"))
    parser.add_argument("--out", type=Path, default=Path("demo/benchmarks"))
    options = parser.parse_args(argv)

    spec = DataSpec(cells=options.cells, genes=options.genes)
    data = prepare(options.data, spec)
    from tqdm import tqdm

    from hbx_gpu.sampler import CellSampler

    dataset = open_dataset(data.atlas, "gene_expression")
    rows, results = [], []
    cases = [(layout, n) for layout in options.layouts for n in options.rows]
    with tqdm(total=2 * len(cases), unit="case", desc="executors") as bar:
        for layout, n in cases:
            sampler = CellSampler(dataset.groups_np, batch_size=n, locality="none", seed=0, num_workers=0)
            load: Callable[[str], Any] = partial(by_executor, dataset, sampler, **LAYOUTS[layout])
            batch = next(iter(load("direct")))
            size = nbytes(batch)
            few = max(20, min(options.batches, (8 << 30) // size))
            again = [np.arange(n)] * (few + 1)
            handing = partial(by_executor, dataset, again, made=batch, **LAYOUTS[layout])
            for title, make, most in (("hand-over", handing, few), ("loading", load, None)):
                found = measure(make, options.rounds, most)
                results.append({"table": title, "layout": layout, "rows": n, "nbytes": size, **found})
                times = [found[name]["median"] for name in EXECUTORS]
                name = f"{title}, {layout}, {n:,} rows"
                rows.append((name, f"{size / 1e6:,.1f}", *(f"{value:,.0f}" for value in times)))
                bar.update()
    machine = conditions()
    print(table(("microseconds per batch", "MB", "direct", "DALI", "DALI pipeline"), rows))
    print(
        f"{spec.describe()}; random rows, page cache warm, num_workers=0, median of {options.rounds} rounds"
    )
    print(describe(machine))
    write_json(options.out / "executors.json", {"conditions": machine, "results": results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
