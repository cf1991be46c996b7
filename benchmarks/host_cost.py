"""CPU time that the host spends on a batch: ``python -m benchmarks.host_cost``.

Microseconds of CPU time by stage, for random rows from page cache on one thread. *host*: batches are made by
the host engine. *stream*: stored bytes are staged for a device at every batch. *device*: chunks are resident
there. The device is one that does nothing (`benchmarks.null_backend`), so that only the work of the host is
left. *hand-over*: the same finished batch again and again through an executor of the loader, CPU time of all
threads.

"Calls" are calls of Python and C functions per batch; a batch of more rows must not need more of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.common import DataSpec, conditions, prepare
from benchmarks.executors import EXECUTORS, by_executor
from benchmarks.null_backend import NullBackend
from hbx_gpu import loader_stats as stats
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.settings import open_dataset
from hbx_gpu._bench.tables import table, write_json
from hbx_gpu._loading.options import LoaderOptions

PATHS = {"host": "", "stream": "none", "device": "device"}
"""Name of a path -> residency on the device; none for the host engine."""
LAYOUTS = {"dense": {"layout": "dense", "dtype": "bfloat16"}, "csr": {"layout": "csr"}}
COLUMNS = (*stats.STAGES, stats.OTHER, "deliver", "total")


def feed_of(dataset: Any, path: str, layout: str) -> Any:
    """The feed that makes a loader's batches."""
    from hbx_gpu._loading.feeds.device import DeviceFeed
    from hbx_gpu._loading.feeds.host import HostFeed
    from hbx_gpu._loading.make import collate_for

    options = LoaderOptions.of(**LAYOUTS[layout], num_workers=0, threads=1)
    if path == "host":
        dataset = dataset.with_wide_columns() if layout == "csr" else dataset
        return HostFeed(dataset.with_row_numbers(), collate_for(dataset, options), options)
    options = LoaderOptions.of(**LAYOUTS[layout], num_workers=0, threads=1, residency=PATHS[path])
    return DeviceFeed(dataset, NullBackend(), options)


@contextmanager
def cpu_clock() -> Iterator[None]:
    """Let stages measure the CPU time of their thread."""
    module = vars(stats)
    before = module["time"]
    module["time"] = SimpleNamespace(perf_counter=time.thread_time)
    try:
        yield
    finally:
        module["time"] = before


def delivered(feed: Any, rows: np.ndarray) -> object:
    """One batch, as a loader hands it over."""
    batch: object = feed.deliver(feed.make([rows])[0])
    return batch


def one_batch(feed: Any, rows: np.ndarray, recorder: stats.Recorder) -> float:
    """Make one batch and hand it over; seconds of CPU time for the latter."""
    with recorder.window(len(rows)):
        (made,) = feed.make([rows])
    begin = time.thread_time()
    feed.deliver(made)
    return time.thread_time() - begin


def measure(feed: Any, batches: Sequence[np.ndarray]) -> dict[str, float]:
    """Median microseconds of CPU time per batch, by stage."""
    found: dict[str, list[float]] = {name: [] for name in COLUMNS}
    with cpu_clock():
        for rows in batches:
            recorder = stats.Recorder()
            begin = time.thread_time()
            delivered = one_batch(feed, rows, recorder)
            total = time.thread_time() - begin
            stages = recorder.stats().stages
            for name in COLUMNS[:-2]:
                found[name].append(stages[name].seconds)
            found["deliver"].append(delivered)
            found["total"].append(total)
    return {name: 1e6 * statistics.median(values) for name, values in found.items()}


def calls(work: Callable[[], object]) -> int:
    """Number of calls of Python and C functions that `work` makes on this thread."""
    n = 0

    def count(frame: FrameType, event: str, argument: object) -> None:  # noqa: ARG001
        nonlocal n
        n += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return n


def hand_over(dataset: Any, rows: int, layout: str, executor: str, batches: int) -> float:
    """Microseconds of CPU time, of all threads, to hand over a finished batch."""
    again = [np.arange(rows)] * (batches + 10)
    batch = next(iter(by_executor(dataset, again, "direct", **LAYOUTS[layout])))
    loader = by_executor(dataset, again, executor, batch, **LAYOUTS[layout])
    made = iter(loader)
    for _ in range(10):
        next(made)
    begin, n = time.process_time(), 0
    for _ in made:
        n += 1
    seconds = time.process_time() - begin
    loader.close()
    return 1e6 * seconds / n


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_cost", description=__doc__)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--paths", nargs="*", choices=list(PATHS), default=list(PATHS))
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--executors", nargs="*", choices=EXECUTORS, default=list(EXECUTORS))
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--data", type=Path, default=Path("demo/benchmark-data"))
    parser.add_argument("--out", type=Path, default=Path("demo/benchmarks"))
    options = parser.parse_args(argv)

    import torch

    torch.set_num_threads(1)
    spec = DataSpec(cells=options.cells, genes=options.genes)
    dataset: Any = open_dataset(prepare(options.data, spec).atlas, "gene_expression")
    rng = np.random.default_rng(0)
    rows, results = [], []
    for path in options.paths:
        for layout in options.layouts:
            feed = feed_of(dataset, path, layout)
            recorder = stats.Recorder()
            for begin in range(0, len(dataset), 4_096):  # every chunk is verified when it is first needed
                one_batch(feed, np.arange(begin, min(begin + 4_096, len(dataset))), recorder)
            for n in options.rows:
                batches = [rng.integers(0, len(dataset), n) for _ in range(options.batches + 5)]
                for warm in batches[:5]:
                    one_batch(feed, warm, recorder)
                found = measure(feed, batches[5:])
                n_calls = calls(partial(delivered, feed, batches[-1]))
                results.append({"path": path, "layout": layout, "rows": n, "calls": n_calls, **found})
                figures = [*(f"{found[name]:,.0f}" for name in COLUMNS), f"{found['total'] / n:.2f}"]
                rows.append((f"{path}, {layout}, {n:,} rows", *figures, str(n_calls)))
    machine = conditions()
    if rows:
        print(table(("CPU microseconds per batch", *COLUMNS, "per row", "calls"), rows))
    handed = []
    for layout in options.layouts:
        for n in options.rows:
            taken = {name: hand_over(dataset, n, layout, name, options.batches) for name in options.executors}
            results.append({"path": "hand-over", "layout": layout, "rows": n, **taken})
            handed.append((f"hand-over, {layout}, {n:,} rows", *(f"{us:,.0f}" for us in taken.values())))
    if options.executors:
        print(table(("CPU microseconds per batch", *options.executors), handed))
    print(f"{spec.describe()}; random rows, page cache warm, one thread, median of {options.batches} batches")
    print(describe(machine))
    write_json(options.out / "host_cost.json", {"conditions": machine, "results": results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
