"""Cells per second of this loader and of AnnData on the same data: ``python -m benchmarks.throughput``.

Every measurement runs in a process of its own; repeats alternate over all of them, so that a slow
minute of the machine falls on everyone. Start-up, opening and the compilation of kernels are not
part of the rate; the time to open is reported beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import DataSpec, Prepared, conditions, prepare
from benchmarks.jobs import in_process, peak_rss
from benchmarks.peers.protocol import bytes_below
from hbx_gpu._bench import cache
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.settings import open_dataset
from hbx_gpu._bench.tables import spread, table, write_json

OUTPUTS = ("csr", "dense")
ORDERS = ("none", "group")


@dataclass(frozen=True)
class Job:
    """One measurement."""

    reader: str
    output: str
    order: str
    batch: int
    atlas: str
    h5ad: str
    groups: int
    seconds: float
    cache: str


# Each reader opens its data and returns a function that iterates an epoch as numbers of cells; a batch
# is complete when its number arrives. Imports stand inside: a process pays for what it measures only.
Epoch = Callable[[int], Iterator[int]]


def _dataset(job: Job) -> Any:
    return open_dataset(Path(job.atlas), "gene_expression", "counts")


def _sampler(job: Job, groups: np.ndarray) -> Any:
    from hbx_gpu.sampler import CellSampler

    return CellSampler(groups, batch_size=job.batch, seed=0, locality=job.order)


def _collate(job: Job) -> Any:
    from hbx_gpu.dataloader import sparse_to_dense_collate

    return sparse_to_dense_collate if job.output == "dense" else None


def _size(batch: Any) -> int:
    return len(batch["X"]) if isinstance(batch, dict) else len(batch)


def _loader(job: Job, num_workers: int = 0) -> Epoch:
    from hbx_gpu.dataloader import make_loader

    dataset = _dataset(job)
    sampler = _sampler(job, dataset.groups_np)
    loader = make_loader(dataset, sampler, collate_fn=_collate(job), num_workers=num_workers)

    def epoch(number: int) -> Iterator[int]:
        loader.set_epoch(number)
        yield from map(_size, loader)

    return epoch


def _workers(job: Job) -> Epoch:
    return _loader(job, num_workers=2)


def _map(job: Job) -> Epoch:
    dataset = _dataset(job)
    sampler = _sampler(job, dataset.groups_np)
    collate = _collate(job) or (lambda batch: batch)

    def epoch(number: int) -> Iterator[int]:
        sampler.set_epoch(number)
        for rows in sampler.batches():
            yield _size(collate(dataset.__getitems__(rows)))

    return epoch


def _anndata(job: Job, backed: str | None) -> Epoch:
    import anndata
    import torch

    adata = anndata.read_h5ad(job.h5ad, backed=backed)
    x = adata.X
    sampler = _sampler(job, np.arange(adata.n_obs) * job.groups // adata.n_obs)

    def epoch(number: int) -> Iterator[int]:
        sampler.set_epoch(number)
        for rows in sampler.batches():
            # Ascending rows are the fast case of a backed matrix; the order within a batch is not restored.
            batch = x[np.sort(rows)]
            if job.output == "dense":
                batch = torch.from_numpy(batch.toarray())
            yield batch.shape[0]

    return epoch


def _memset(job: Job) -> Epoch:
    """The floor of dense output: fresh memory, written once."""
    import torch

    dataset = _dataset(job)

    def epoch(number: int) -> Iterator[int]:  # noqa: ARG001
        for first in range(0, dataset.n_cells, job.batch):
            size = min(job.batch, dataset.n_cells - first)
            # NumPy asks for huge pages where torch's own allocator does not: several times fewer page faults.
            x = np.empty((size, dataset.n_features), np.float32)
            x.fill(0)
            torch.from_numpy(x)
            yield size

    return epoch


READERS: dict[str, Callable[[Job], Epoch]] = {
    "hbx_gpu loader": _loader,
    "hbx_gpu map": _map,
    "hbx_gpu 2 workers": _workers,
    "AnnData backed": lambda job: _anndata(job, "r"),
    "AnnData in memory": lambda job: _anndata(job, None),
    "floor: zero fill": _memset,
}
# What a plain run leaves out, to be done in minutes: other ways to read the same dataset.
DEFAULT_READERS = [name for name in READERS if name not in ("hbx_gpu map", "hbx_gpu 2 workers")]


# Locality changes nothing for these, or is the loader's business.
_RANDOM_ONLY = ("hbx_gpu map", "AnnData in memory", "floor: zero fill")
_DENSE_ONLY = ("floor: zero fill",)


def jobs(options: argparse.Namespace, data: Prepared) -> list[Job]:
    """All measurements of one repeat."""
    where = {"atlas": str(data.atlas), "h5ad": str(data.h5ad), "groups": options.groups}
    how = {"seconds": options.seconds, "cache": options.cache}
    return [
        Job(reader, output, order, batch, **where, **how)
        for batch in options.batch_sizes
        for output in options.outputs
        for order in options.orders
        for reader in options.readers
        if not (order == "group" and reader in _RANDOM_ONLY)
        and not (output == "csr" and reader in _DENSE_ONLY)
    ]


def run(**settings: Any) -> dict[str, Any]:
    """Measure one `Job` in this process."""
    job = Job(**settings)
    files = [Path(job.h5ad), *cache.files_below(Path(job.atlas))]
    if job.cache == "cold" and (reason := cache.forget(files)):
        raise RuntimeError(f"the page cache does not let go of the files: {reason}")
    clock = time.perf_counter()
    epoch = READERS[job.reader](job)
    opened = time.perf_counter() - clock
    # Compiles kernels, starts workers, touches every library once.
    for _, _ in zip(epoch(0), range(3), strict=False):
        pass
    if job.cache == "cold":
        cache.forget(files)  # but for the pages that three batches have mapped
    cells, number = 0, 1
    clock = time.perf_counter()
    while (elapsed := time.perf_counter() - clock) < job.seconds:
        for size in epoch(number):
            cells += size
            elapsed = time.perf_counter() - clock
            if elapsed >= job.seconds:
                break
        if job.cache == "cold":
            break
        number += 1
    return {"cells_per_s": cells / elapsed, "open_s": opened, "peak_rss": peak_rss()}


def collect(all_jobs: Sequence[Job], repeat: int) -> list[dict[str, Any]]:
    """Measure every job `repeat` times, one repeat of all after the other; medians and ranges."""
    from tqdm import tqdm

    runs: dict[Job, list[dict[str, Any]]] = {job: [] for job in all_jobs}
    with tqdm(total=repeat * len(all_jobs), unit="run", desc="measuring") as bar:
        for _ in range(repeat):
            for job in all_jobs:
                bar.set_postfix_str(f"{job.reader}, {job.output}, {job.order}, {job.batch}")
                runs[job].append(in_process("benchmarks.throughput:run", asdict(job)))
                bar.update()
    return [
        {
            **{key: getattr(job, key) for key in ("reader", "output", "order", "batch")},
            **{key: spread([run[key] for run in found]) for key in ("cells_per_s", "open_s", "peak_rss")},
            "runs": [run["cells_per_s"] for run in found],
        }
        for job, found in runs.items()
    ]


def report(results: Sequence[dict[str, Any]]) -> str:
    """Results as a table, best rate of a block first."""
    order = {"none": "random", "group": "group-local"}
    rows = []
    blocks = dict.fromkeys((r["batch"], r["output"], r["order"]) for r in results)
    for block in blocks:
        found = [r for r in results if (r["batch"], r["output"], r["order"]) == block]
        for r in sorted(found, key=lambda r: -r["cells_per_s"]["median"]):
            rate = r["cells_per_s"]
            rows.append(
                (
                    r["reader"],
                    r["output"],
                    order[r["order"]],
                    f"{r['batch']:,}",
                    f"{rate['median']:,.0f}",
                    f"{rate['min']:,.0f} .. {rate['max']:,.0f}",
                    f"{r['peak_rss']['median'] / 1e6:,.0f}",
                    f"{r['open_s']['median']:.2f}",
                )
            )
    header = ("reader", "output", "order", "batch", "cells/s", "range", "peak MB", "open s")
    return table(header, rows)


def markdown(results: Sequence[dict[str, Any]], batch: int) -> str:
    """Medians at one batch size as a table: a row per reader, a column per output and order."""
    columns = [(output, order) for output in OUTPUTS for order in ORDERS]
    names = [f"{output}, {'random' if order == 'none' else 'group-local'}" for output, order in columns]
    lines = [f"| cells/s, batch {batch:,} | {' | '.join(names)} | peak memory |", "|---" * 6 + "|"]
    for reader in READERS:
        mine = [r for r in results if r["reader"] == reader and r["batch"] == batch]
        rates = {(r["output"], r["order"]): f"{r['cells_per_s']['median']:,.0f}" for r in mine}
        peaks = [r["peak_rss"]["median"] / 1e6 for r in mine]
        if mine:
            cells = " | ".join(rates.get(column, "–") for column in columns)
            lines.append(f"| {reader} | {cells} | {min(peaks):,.0f} – {max(peaks):,.0f} MB |")
    return "\n".join(lines) + "\n"


_COLORS = dict(zip(READERS, ("#1f5f8f", "#6aa5cf", "#9fc7e0", "#c2571a", "#e3a37a", "#b5b5b5"), strict=True))


def draw(results: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Rates by batch size, one panel per output and order, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    outputs = list(dict.fromkeys(r["output"] for r in results))
    orders = list(dict.fromkeys(r["order"] for r in results))
    size = 5.2 * len(orders), 3.4 * len(outputs)
    figure, axes = plt.subplots(
        len(outputs), len(orders), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for i, output in enumerate(outputs):
        for j, order in enumerate(orders):
            here = [r for r in results if r["output"] == output and r["order"] == order]
            _panel(axes[i][j], here)
            axes[i][j].set_title(
                f"{output}, {'random' if order == 'none' else 'group-local'} order", fontsize=10
            )
            if i == len(outputs) - 1:
                axes[i][j].set_xlabel("batch size")
            if j == 0:
                axes[i][j].set_ylabel("cells/s")
    bars = {
        name: bar for axis in axes.flat for bar, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in READERS if name in bars]
    figure.legend(
        [bars[name] for name in names], names, loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, results: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter

    batches = sorted({r["batch"] for r in results})
    names = [name for name in READERS if any(r["reader"] == name for r in results)]
    width = 0.8 / max(1, len(names))
    for k, name in enumerate(names):
        mine = sorted((r["batch"], r["cells_per_s"]) for r in results if r["reader"] == name)
        at = [batches.index(batch) + (k - (len(names) - 1) / 2) * width for batch, _ in mine]
        middle, low, high = (np.array([rate[key] for _, rate in mine]) for key in ("median", "min", "max"))
        axis.bar(at, middle, width * 0.92, color=_COLORS[name], label=name)
        axis.errorbar(at, middle, (middle - low, high - middle), fmt="none", ecolor="#333333", elinewidth=1)
    axis.set_xticks(range(len(batches)), [f"{batch:,}" for batch in batches])
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON and picture; returns the exit status."""
    options = _parse(argv)
    spec = DataSpec(options.cells, options.genes, options.density, options.groups, options.codec)
    data = prepare(options.data, spec)
    sizes = {"atlas": bytes_below(data.atlas / "zarr_store"), "h5ad": bytes_below(data.h5ad)}
    if options.cache == "warm":
        cache.load([data.h5ad, *cache.files_below(data.atlas)])
    results = collect(jobs(options, data), options.repeat)
    found = conditions()
    state = {"warm": "page cache warm", "cold": "page cache dropped before the measured epoch"}[options.cache]
    facts = (
        f"{spec.describe()}; atlas {sizes['atlas'] / 1e6:,.0f} MB, .h5ad (uncompressed CSR) "
        f"{sizes['h5ad'] / 1e6:,.0f} MB\n"
        f"{state}; {options.repeat} repeats of {options.seconds:g} s, each in its own process; "
        f"median and range\n"
        f"{describe(found)}"
    )
    print(report(results))
    print(facts)
    content = {"conditions": found, "data": {**asdict(spec), "bytes": sizes}, "cache": options.cache,
               "seconds": options.seconds, "repeat": options.repeat, "results": results}  # fmt: skip
    write_json(options.out / "throughput.json", content)
    pages = [markdown(results, batch) for batch in options.batch_sizes]
    (options.out / "throughput.md").write_text("\n".join([*pages, facts]) + "\n")
    title = f"{spec.describe()}\n{found['cpu']}, {found['cores']} cores; {state}"
    draw(results, title, options.out / "throughput.png")
    print(f"written: {options.out / 'throughput'}.json, .md and .png")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    spec = DataSpec()
    parser.add_argument("--cells", type=int, default=spec.cells)
    parser.add_argument("--genes", type=int, default=spec.genes)
    parser.add_argument("--density", type=float, default=spec.density)
    parser.add_argument("--groups", type=int, default=spec.groups, help="datasets of equal size in the atlas")
    parser.add_argument("--codec", default=spec.codec, help="codec of the atlas (default: the ingest's own)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 512, 4_096])
    parser.add_argument("--outputs", nargs="+", choices=OUTPUTS, default=list(OUTPUTS))
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--readers", nargs="+", choices=READERS, default=DEFAULT_READERS, metavar="NAME",
                        help=f"any of: {', '.join(READERS)}")  # fmt: skip
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement")
    parser.add_argument(
        "--data", type=Path, default=Path("demo/benchmark-data"), help="where data are generated"
    )
    parser.add_argument("--out", type=Path, default=Path("demo/benchmarks"), help="where results go")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
