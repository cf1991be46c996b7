"""What an ingest of very many small files costs per file, and what two workers gain on larger ones."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

import hbx_gpu
from hbx_gpu._bench.machine import conditions, describe

_BATCH = 64  # files that are committed together, and told of then


def make_files(folder: Path, n_files: int, n_cells: int, n_genes: int, *, seed: int = 0) -> list[Path]:
    """Files with the same genes and cells of their own; those that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    x = sp.random(n_cells, n_genes, 0.05, "csr", dtype=np.float32, random_state=rng)
    x.data = np.ceil(x.data * 9)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(list("abcde"), n_cells)),
            "age": rng.integers(0, 90, n_cells),
        },
        index=[f"c{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(
        {"symbol": [f"g{i}" for i in range(n_genes)]}, index=[f"ENSG{i:011d}" for i in range(n_genes)]
    )
    pattern = folder / "pattern.h5ad"
    anndata.AnnData(x, obs=obs, var=var).write_h5ad(pattern)
    paths = []
    for i in range(n_files):
        path = folder / f"{i:05d}.h5ad"
        paths.append(path)
        if path.exists():
            continue
        shutil.copy(pattern, path)
        with h5py.File(path, "r+") as file:
            names = np.array([f"f{i}c{j}" for j in range(n_cells)], object)
            del file["obs/_index"]
            made = file["obs"].create_dataset("_index", data=names, dtype=h5py.string_dtype())
            made.attrs["encoding-type"], made.attrs["encoding-version"] = "string-array", "0.2.0"
            file["X/data"][:] = rng.integers(1, 9, len(x.data)).astype(np.float32)
    return paths


def many(options: argparse.Namespace) -> list[str]:
    """CPU time per file in one process, early and late; bytes of the tables per dataset; opening."""
    paths = make_files(
        options.data / f"{options.cells}x{options.genes}", options.files, options.cells, options.genes
    )
    root = options.data / "atlas"
    shutil.rmtree(root, ignore_errors=True)
    moments: list[float] = []
    begin, wall = time.process_time(), time.perf_counter()
    hbx_gpu.ingest_many(root, paths, added=lambda _: moments.append(time.process_time()))
    cpu, wall = time.process_time() - begin, time.perf_counter() - wall
    spans = np.diff(moments[_BATCH - 1 :: _BATCH]) / _BATCH * 1e3
    lines = [
        f"{len(paths):,} files of {options.cells} cells x {options.genes:,} genes, one process: "
        f"{cpu / len(paths) * 1e3:.1f} ms CPU per file, {len(paths) / wall:.1f} files/s",
        f"written and committed: {spans[0]:.1f} ms CPU per file in files {_BATCH} to {2 * _BATCH}, "
        f"{spans[-1]:.1f} in the last {_BATCH} (ratio {spans[-1] / spans[0]:.2f})",
    ]
    for name in ("_feature_layouts", "atlas_versions", "cells", "datasets", "gene_registry"):
        table = root / "lance_db" / f"{name}.lance"
        size = {folder.name: _size(folder) / len(paths) for folder in sorted(table.iterdir())}
        told = ", ".join(f"{folder.lstrip('_')} {n:,.0f}" for folder, n in size.items())
        lines.append(f"table {name}: {sum(size.values()):,.0f} bytes per dataset ({told})")
    atlas = hbx_gpu.RaggedAtlas.open(root)
    atlas.optimize()
    atlas.snapshot()
    begin = time.process_time()
    dataset = hbx_gpu.RaggedAtlas.checkout_latest(root).query().to_cell_dataset("gene_expression")
    lines.append(f"opened as a dataset of {len(dataset):,} cells: {time.process_time() - begin:.2f} s CPU")
    return lines


def workers(options: argparse.Namespace) -> list[str]:
    """Files per second with processes, by their number."""
    paths = make_files(options.data / "large", options.large_files, options.large_cells, options.genes)
    n_bytes = sum(path.stat().st_size for path in paths)
    lines, first = [], 0.0
    for n in options.workers:
        root = options.data / "atlas"
        shutil.rmtree(root, ignore_errors=True)
        with ProcessPoolExecutor(n, mp_context=get_context("spawn")) as executor:
            list(executor.map(_ready, range(n)))
            begin = time.perf_counter()
            hbx_gpu.ingest_many(root, paths, executor)
            took = time.perf_counter() - begin
        first = first or took
        lines.append(
            f"{len(paths)} files of {options.large_cells:,} cells, {n} worker(s): {took:.1f} s, "
            f"{n_bytes / took / 1e6:.1f} MB/s read, {first / took:.2f}x"
        )
    return lines


def _ready(_: int) -> None:
    import hbx_gpu.atlas._ingest.tasks  # noqa: F401 - the start of a process is not measured

    time.sleep(1)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(argv: Sequence[str] | None = None) -> int:
    """Run both parts and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ingest_many", description=__doc__)
    parser.add_argument("--part", choices=["many", "workers"], nargs="+", default=["many", "workers"])
    parser.add_argument("--files", type=int, default=5_000)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--large-files", type=int, default=8)
    parser.add_argument("--large-cells", type=int, default=50_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--data", type=Path, default=Path("demo/benchmark-data/ingest-many"))
    options = parser.parse_args(argv)
    lines = [describe(conditions())]
    for part in options.part:
        lines += {"many": many, "workers": workers}[part](options)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
