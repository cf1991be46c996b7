"""Loading from object storage beside local loading and zarr-python: ``python -m benchmarks.cloud``.

A range server of the tests runs in a process of its own on the same machine, with a latency that every answer
has and a limit on the bytes of all answers together. The data are a made-up atlas of sparse counts. Every
number is of one run, printed with what else the machine was doing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.common import DataSpec, conditions, prepare
from hbx_gpu._bench.machine import describe
from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._remote.link import IN_FLIGHT
from hbx_gpu._storage.readers import coalesce
from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.dataloader import make_loader
from hbx_gpu.sampler import CellSampler
from tests.remote.objects import store_of

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Run:
    """One measurement.

    Attributes
    ----------
    what
        What was loaded, and by whom.
    cells, seconds
        Cells that came, and the wall time from the first request for a batch.
    cells_per_s
        Their ratio.
    requests, moved, wanted
        Of `LoaderStats`; 0 where nothing is counted.
    link_share
        Share of the capped link that `moved` fills; None without a limit.
    obstore_share
        The same, of what obstore alone moves per second in the same run; None where that is not compared.
    """

    what: str
    cells: int
    seconds: float
    cells_per_s: float
    requests: int = 0
    moved: int = 0
    wanted: int = 0
    link_share: float | None = None
    obstore_share: float | None = None


@contextmanager
def serving(folder: Path, latency: float, bandwidth: float | None) -> Iterator[dict[str, str]]:
    """A range server in another process; yields the storage options that lead to it."""
    command = [
        sys.executable,
        "-m",
        "tests.remote.range_server",
        str(folder),
        "--latency-ms",
        str(1000 * latency),
    ]
    command += [] if bandwidth is None else ["--bandwidth", str(bandwidth)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
        assert found is not None
        yield {"endpoint": found[0], "region": "us-east-1", "allow_http": "true", "skip_signature": "true"}
    finally:
        process.terminate()
        process.wait(10)


def opened(options: dict[str, str] | None, path: str, cache: Path | None = None) -> CellDataset:
    atlas = RaggedAtlas.checkout_latest(path, storage_options=options, cache=cache)
    dataset = atlas.query().to_cell_dataset()
    assert isinstance(dataset, CellDataset)
    return dataset


def load(
    what: str,
    dataset: CellDataset,
    seconds: float,
    bandwidth: float | None = None,
    locality: str = "none",
) -> Run:
    """Rows in random order, as CSR, for about so many seconds or an epoch."""
    sampler = CellSampler(dataset.groups_np, 1024, seed=0, locality=locality)
    loader = make_loader(dataset, sampler, layout="csr")
    begin, cells = time.perf_counter(), 0
    for batch in loader:
        cells += len(batch["index"])
        if time.perf_counter() - begin > seconds:
            break
    spent = time.perf_counter() - begin
    stats = loader.stats()
    share = None if bandwidth is None else stats.bytes_moved / spent / bandwidth
    return Run(
        what, cells, spent, cells / spent, stats.requests, stats.bytes_moved, stats.bytes_wanted, share
    )


def plain(options: dict[str, str], bucket: str, folder: Path, most: int = 400 << 20) -> Run:
    """The files of the arrays in ranges of 1 MiB through obstore alone: what server and link give here."""
    import obstore

    store = store_of(f"s3://{bucket}", options)
    ranges: list[tuple[str, int, int]] = []
    for path in sorted(folder.rglob("zarr_store/**/c/*")):
        for at in range(0, path.stat().st_size, 1 << 20):
            key = f"{folder.name}/{path.relative_to(folder)}"
            ranges.append((key, at, min(at + (1 << 20), path.stat().st_size)))
    ranges = ranges[: most >> 20]

    def one(wanted: tuple[str, int, int]) -> int:
        key, begin, end = wanted
        return len(obstore.get(store, key, options={"range": (begin, end)}).bytes())

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(one, ranges[:IN_FLIGHT]))  # connects
        begin = time.perf_counter()
        moved = sum(pool.map(one, ranges))
        spent = time.perf_counter() - begin
    return Run("obstore alone, ranges of 1 MiB", 0, spent, 0.0, len(ranges), moved, moved, None)


def by_zarr(options: dict[str, str], bucket: str, groups: list[str], rows: int, seconds: float) -> Run:
    """The same rows through zarr-python on obstore: the two arrays of each row, one row after the other."""
    import zarr
    from zarr.storage import ObjectStore

    prefix = f"s3://{bucket}/atlas/zarr_store"
    store = ObjectStore(store_of(prefix, options), read_only=True)
    names = ("indices", "layers/counts")
    arrays = [[zarr.open_array(store, path=f"{g}/csr/{n}", mode="r") for n in names] for g in groups]
    draws = np.random.default_rng(0)
    np.asarray(arrays[0][0][:1000])  # compiles the codec
    begin, cells = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds and cells < rows:
        index, values = arrays[int(draws.integers(len(arrays)))]
        at = int(draws.integers(0, index.shape[0] - 1000))
        np.asarray(index[at : at + 1000])
        np.asarray(values[at : at + 1000])
        cells += 1
    spent = time.perf_counter() - begin
    return Run("zarr-python on obstore, one row at a time", cells, spent, cells / spent)


def print_costs(dataset: CellDataset, gap: int) -> None:
    """What orders cost per cell where bytes are far: arithmetic over an epoch, nothing is timed."""
    print(f"windows of 4,096 cells, gaps of up to {gap >> 10} KiB are read over")
    for locality in ("none", "block", "group"):
        sampler = CellSampler(dataset.groups_np, 4096, seed=0, locality=locality)
        requests = wanted = moved = 0
        for rows in sampler.batches():
            found = dataset.directory.extents(np.unique(dataset.plan(rows).chunks))
            runs = coalesce(found.file, found.offset, found.nbytes, max_gap=gap, max_size=4 << 20)
            requests += len(runs.nbytes)
            wanted += int(np.maximum(found.nbytes, 0).sum())
            moved += int(runs.nbytes.sum())
        n = len(dataset)
        print(
            f"{locality:6s} {requests / n:8.4f} requests, {wanted / n / 1e3:8.2f} kB wanted, "
            f"{moved / n / 1e3:8.2f} kB moved per cell"
        )


def measure(atlas: Path, latency: float, bandwidth: float | None, seconds: float) -> Iterator[Run]:
    """Runs at one latency and one limit."""
    limit = "no limit" if bandwidth is None else f"{bandwidth / 1e6:,.0f} MB/s"
    with serving(atlas.parent.parent, latency, bandwidth) as options:
        # A cache is remembered by address, so every run has one of its own.
        bucket = f"run{os.getpid()}-{0 if bandwidth is None else int(bandwidth / 1e6)}"
        (atlas.parent.parent / bucket).symlink_to(atlas.parent)
        url = f"s3://{bucket}/atlas"
        begin = time.perf_counter()
        dataset = opened(options, url)
        spent = time.perf_counter() - begin
        yield Run(f"open, {len(dataset.sources)} groups ({limit})", len(dataset), spent, len(dataset) / spent)
        alone = plain(options, bucket, atlas)
        yield alone

        def beside(run: Run) -> Run:
            return replace(run, obstore_share=(run.moved / run.seconds) / (alone.moved / alone.seconds))

        for locality in ("none", "block", "group"):
            yield beside(load(f"{locality}, no cache ({limit})", dataset, seconds, bandwidth, locality))
            dataset.close()
            dataset = opened(options, url)  # it holds no chunks in memory
        with tempfile.TemporaryDirectory() as cache:
            dataset = opened(options, url, Path(cache))
            yield beside(load(f"random rows, cold cache ({limit})", dataset, 10 * seconds, bandwidth))
            dataset.close()
            yield load(f"random rows, warm cache ({limit})", dataset, seconds)
        groups = [source.name for source in dataset.sources]
        yield by_zarr(options, bucket, groups, len(dataset), seconds)
        (atlas.parent.parent / bucket).unlink()


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cloud", description=__doc__)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--latency-ms", type=float, default=30)
    parser.add_argument("--bandwidth", type=float, nargs="+", default=[100e6, 1e9], help="bytes per second")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--data", type=Path, required=True, help="folder where data are kept for later runs")
    parser.add_argument("--out", type=Path, help="write the runs as JSON")
    args = parser.parse_args(argv)
    spec = DataSpec(args.cells, args.genes, args.density, args.groups)
    atlas = prepare(args.data, spec).atlas
    print(f"{spec.describe()}; latency {args.latency_ms:g} ms")
    print(describe(conditions()))
    print(f"files in the page cache; load {os.getloadavg()[0]:.1f} at the start")
    local = opened(None, str(atlas))
    print_costs(local, 64 << 10)
    load("warm-up", local, 2)
    runs = [load("random rows, local disk", local, args.seconds)]
    print(_line(runs[-1]), flush=True)
    for bandwidth in args.bandwidth:
        for run in measure(atlas, args.latency_ms / 1000, bandwidth, args.seconds):
            runs.append(run)
            print(_line(run), flush=True)
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    if args.out is not None:
        args.out.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    return 0


def _line(run: Run) -> str:
    per_cell = run.moved / max(1, run.cells) / 1e3
    share = "" if run.link_share is None else f", {run.link_share:.0%} of the link"
    share += "" if run.obstore_share is None else f", {run.obstore_share:.0%} of obstore alone"
    if run.cells == 0:
        return f"{run.what:45s} {run.moved / run.seconds / 1e6:12,.0f} MB/s ({run.requests:,} requests)"
    return (
        f"{run.what:45s} {run.cells_per_s:12,.0f} cells/s  ({run.cells:,} in {run.seconds:.2f} s; "
        f"{run.requests:,} requests, {run.moved / 1e6:,.0f} MB moved for {run.wanted / 1e6:,.0f} wanted"
        f", {per_cell:,.1f} kB and {run.requests / max(1, run.cells):.3f} requests per cell{share})"
    )


if __name__ == "__main__":
    raise SystemExit(main())
