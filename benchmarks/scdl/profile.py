"""Profile loading of any SCDL archive or .h5ad file: ``python -m benchmarks.scdl profile INPUT``.

The counterpart of the script with which BioNeMo-SCDL profiles Tahoe-100M: time to open, cells per second in
shuffled, sequential or random order, peak memory and size on disk; beside it, in the same run, a dataset over
a backed AnnData, and bionemo-scdl itself where an interpreter with it is named. Every loader runs in a
process of its own and gets the same time.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.jobs import in_process, peak_rss

ORDERS = ("shuffle", "sequential", "random")
LOADERS = ("hbx_gpu", "bionemo-scdl", "anndata")
_COLUMNS = ("loader", "order", "batch_size", "cells_per_s", "cells", "seconds", "open_s", "first_batch_s",
            "values_per_s", "peak_rss_mb", "disk_mb")  # fmt: skip

# An opened loader: its number of cells, and an epoch of (cells, values) per batch.
Opened = tuple[int, Callable[[int], Iterator[tuple[int, int]]]]


def open_ours(path: str, order: str, batch_size: int, executor: str) -> Opened:
    """`make_loader` on the archive: CSR tensors, threads of this process."""
    from hbx_gpu.dataloader import make_loader
    from hbx_gpu.sampler import CellSampler
    from hbx_gpu.scdl import SingleCellMemMapDataset

    dataset = SingleCellMemMapDataset(path)
    sampler: Any
    if order == "random":
        sampler = _Random(len(dataset), batch_size)
    else:
        sampler = CellSampler(
            dataset.groups_np,
            batch_size=batch_size,
            shuffle=order == "shuffle",
            locality="none",
            seed=0,
            num_workers=0,
        )
    loader = make_loader(dataset, sampler, layout="csr", num_workers=0, executor=executor)

    def epoch(number: int) -> Iterator[tuple[int, int]]:
        loader.set_epoch(number)
        for batch in loader:
            yield len(batch["index"]), batch["X"].values().numel()

    return len(dataset), epoch


class _Random:
    """Batches of cells drawn with replacement."""

    def __init__(self, n: int, batch_size: int) -> None:
        self.n, self.batch_size = n, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        import numpy as np

        rng = np.random.default_rng(0)
        for first in range(0, self.n, self.batch_size):
            yield rng.integers(0, self.n, min(self.batch_size, self.n - first)).tolist()

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)


def open_scdl(path: str, order: str, batch_size: int) -> Opened:
    """bionemo-scdl as its README loads: a torch DataLoader with its collate function."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch

    dataset = SingleCellMemMapDataset(path)
    loader = _torch_loader(dataset, len(dataset), order, batch_size, collate_sparse_matrix_batch)
    return len(dataset), lambda _: ((len(x), x.values().numel()) for x in loader)


class _Backed:
    """Rows of a backed AnnData, one at a time."""

    def __init__(self, path: str) -> None:
        import anndata

        self.adata = anndata.read_h5ad(path, backed="r")

    def __len__(self) -> int:
        return int(self.adata.n_obs)

    def __getitem__(self, row: int) -> Any:
        return self.adata.X[row]


def _stack(rows: list[Any]) -> Any:
    import torch
    from scipy import sparse

    x = sparse.vstack([sparse.csr_matrix(row) for row in rows], "csr")
    pointers, columns, values = (torch.from_numpy(part) for part in (x.indptr, x.indices, x.data))
    return torch.sparse_csr_tensor(pointers, columns, values, size=x.shape)


def open_anndata(path: str, order: str, batch_size: int) -> Opened:
    """The baseline: a dataset over ``anndata.read_h5ad(path, backed="r")`` in a torch DataLoader."""
    dataset = _Backed(path)
    loader = _torch_loader(dataset, len(dataset), order, batch_size, _stack)
    return len(dataset), lambda _: ((len(x), x.values().numel()) for x in loader)


def _torch_loader(
    dataset: Any, n: int, order: str, batch_size: int, collate: Callable[[list[Any]], Any]
) -> Any:
    import torch

    if order == "random":
        sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=n)
        return torch.utils.data.DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate)
    return torch.utils.data.DataLoader(dataset, batch_size, shuffle=order == "shuffle", collate_fn=collate)


def profile(**job: Any) -> dict[str, Any]:
    """Run one loader for some seconds after a warm-up, within this process."""
    openers: dict[str, Callable[..., Opened]] = {
        "hbx_gpu": partial(open_ours, executor=job["executor"]),
        "bionemo-scdl": open_scdl,
        "anndata": open_anndata,
    }
    import torch  # noqa: F401 - its import is nobody's opening time

    clock = time.perf_counter()
    _, epoch = openers[job["loader"]](job["path"], job["order"], job["batch_size"])
    opened = time.perf_counter() - clock
    batches = epoch(0)
    next(batches)
    first = time.perf_counter() - clock
    _run(batches, job["warmup"])
    cells = values = 0
    elapsed, number = 0.0, 1
    clock = time.perf_counter()
    while elapsed < job["seconds"]:
        batches = epoch(number)
        found = _run(batches, job["seconds"] - elapsed)
        cells, values = cells + found[0], values + found[1]
        elapsed = time.perf_counter() - clock
        number += 1
    return {
        "cells_per_s": cells / elapsed,
        "values_per_s": values / elapsed,
        "cells": cells,
        "seconds": elapsed,
        "open_s": opened,
        "first_batch_s": first,
        "peak_rss_mb": peak_rss() / 1e6,
    }


def _run(batches: Iterator[tuple[int, int]], seconds: float) -> tuple[int, int]:
    """Cells and values of the batches that come within some seconds; leaves the iterator ended."""
    cells = values = 0
    clock = time.perf_counter()
    for n, count in batches:
        cells, values = cells + n, values + count
        if time.perf_counter() - clock >= seconds:
            break
    if hasattr(batches, "close"):
        batches.close()
    return cells, values


def main(argv: Sequence[str] | None = None) -> int:
    """Profile and print; returns the exit status."""
    options = _parse(argv)
    from benchmarks.common import conditions
    from benchmarks.peers.protocol import bytes_below
    from hbx_gpu._bench.machine import describe
    from hbx_gpu._bench.tables import table, write_json

    archive, h5ad = _inputs(options)
    paths = {"hbx_gpu": archive, "bionemo-scdl": archive if options.python else None, "anndata": h5ad}
    rows = []
    for order in options.order:
        for loader in options.loaders:
            path = paths[loader]
            if path is None:
                reason = "no --python with bionemo-scdl" if loader != "anndata" else "no .h5ad (--h5ad) of it"
                print(f"{loader} is left out: {reason}", file=sys.stderr)
                continue
            job = {"loader": loader, "path": str(path), "order": order, "batch_size": options.batch_size,
                   "seconds": options.seconds, "warmup": options.warmup,
                   "executor": options.executor}  # fmt: skip
            found = in_process(
                "benchmarks.scdl.profile:profile",
                job,
                python=options.python if loader == "bionemo-scdl" else sys.executable,
            )
            rows.append({**job, **found, "disk_mb": bytes_below(path) / 1e6})
    here = conditions()
    print(describe(here))
    print(f"{archive}; {options.seconds:g} s each after {options.warmup:g} s of warm-up\n")
    print(table(_COLUMNS, [[_text(row[name]) for name in _COLUMNS] for row in rows]))
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    if options.out:
        write_json(options.out, {"conditions": here, "rows": rows})
    return 0


def _inputs(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """The archive and the .h5ad file to profile; the archive is made of the file where there is none."""
    source = options.input.absolute()
    if source.is_dir():
        return source, options.h5ad and options.h5ad.absolute()
    from hbx_gpu.scdl._writing.convert import convert_h5ad

    archive = options.folder.absolute() / f"{source.stem}-scdl"
    if not archive.exists():
        clock = time.perf_counter()
        convert_h5ad(source, archive)
        print(f"converted in {time.perf_counter() - clock:.1f} s", file=sys.stderr)
    return archive, source


def _text(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, float) and value >= 100 else (
        f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )  # fmt: skip


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scdl profile", description=__doc__)
    parser.add_argument("input", type=Path, nargs="?", help="an SCDL archive or a .h5ad file")
    parser.add_argument("--h5ad", type=Path, help="the file that an archive was made of, for the baseline")
    parser.add_argument("--order", nargs="+", choices=ORDERS, default=["shuffle"])
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, default=list(LOADERS))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--executor", choices=("direct", "dali", "auto"), default="direct",
                        help="who hands our batches over")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=10.0, help="time per loader and order")
    parser.add_argument("--warmup", type=float, default=2.0)
    parser.add_argument("--python", default=os.environ.get("HBX_SCDL_PYTHON"), metavar="PATH",
                        help="interpreter with bionemo-scdl; by default HBX_SCDL_PYTHON")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where a made archive goes")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--out", type=Path, metavar="JSON")
    options = parser.parse_args(argv)
    if options.input is None:
        parser.error("an SCDL archive or a .h5ad file is needed")
    return options
