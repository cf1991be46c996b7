"""What it costs that each dataset has its genes in an order of its own: ``python -m benchmarks.gene_orders``.

Three atlases hold as many cells: with all datasets in one order of genes, with each dataset in the order of
its file as Homeobox stores it, and the second one after ``hbx-gpu repack --order-features``. They are read in
turn, in random rows, and the CPU time of the process is counted, so that other work on the machine matters
little.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.common import conditions
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.tables import table, write_json
from hbx_gpu._h5ad.files import H5adFile
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas, repack
from hbx_gpu.atlas._ingest.inputs import from_h5ad, hash_file
from hbx_gpu.dataloader import CellDataset, DenseCellDataset, make_loader
from hbx_gpu.sampler import CellSampler
from hbx_gpu.synthetic import Uniform, gene_ids, write_h5ad

ATLASES = ("one order", "orders of the files", "repacked in order")


def build(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The atlases, by the words for the table; a folder that is there already is used again."""
    found = {name: folder / name.replace(" ", "-") for name in ATLASES}
    if all((root / "complete").exists() for root in found.values()):
        return found
    shutil.rmtree(folder, ignore_errors=True)
    genes = gene_ids(options.genes)
    for name in ATLASES[:2]:
        atlas = create_or_open_atlas(found[name])
        for k in range(options.groups):
            named = np.random.default_rng(k).permutation(genes) if k and name != ATLASES[0] else genes
            file = write_h5ad(
                folder / f"{k}.h5ad", options.cells // options.groups, options.genes, seed=k, genes=named,
                model=Uniform(options.genes, options.density), compression=None,
            )  # fmt: skip
            with H5adFile(file) as opened:
                data = from_h5ad(opened, "X", sha256=hash_file(file))
                atlas.add_from_anndata(replace(data, keeps_order=True))
            file.unlink()
        atlas.optimize()
        atlas.snapshot()
    shutil.copytree(found[ATLASES[1]], found[ATLASES[2]])
    repack(found[ATLASES[2]], order_features=True)
    for root in found.values():
        (root / "complete").touch()
    return found


def seconds_per_cell(dataset: CellDataset | DenseCellDataset, layout: str, batch: int, cells: int) -> float:
    """CPU seconds of the process per cell, over whole epochs after the first."""
    sampler = CellSampler(dataset.groups_np, batch_size=batch, seed=0)
    loader = make_loader(dataset, sampler, layout=layout, executor="direct")
    n, begin = -len(dataset), 0.0
    epoch = 0
    while n < cells:
        if n == 0:
            begin = time.process_time()
        loader.set_epoch(epoch)
        n += sum(len(made["X"]) for made in loader)
        epoch += 1
    return (time.process_time() - begin) / n


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gene_orders", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("demo/benchmarks/data"))
    parser.add_argument("--cells", type=int, default=8_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--layouts", nargs="+", default=["csr", "dense"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("demo/benchmarks"))
    options = parser.parse_args(argv)
    name = f"gene-orders-{options.cells}-{options.genes}-{options.density}-{options.groups}"
    atlases = build(options.data / name, options)
    datasets = {
        name: RaggedAtlas.checkout_latest(root).query().to_cell_dataset("gene_expression")
        for name, root in atlases.items()
    }
    nonzeros = options.cells * round(options.density * options.genes)
    sizes = {
        name: sum(file.stat().st_size for file in (root / "zarr_store").rglob("c/*"))
        for name, root in atlases.items()
    }
    rows, results = [], {}
    for layout in options.layouts:
        for batch in options.batches:
            cases: dict[str, list[float]] = {name: [] for name in ATLASES}
            for _ in range(options.rounds):
                for name, dataset in datasets.items():
                    cases[name].append(seconds_per_cell(dataset, layout, batch, 2 * options.cells))
            # A ratio per round: atlases of a round were read one after the other.
            ratios = {name: float(np.median(np.divide(cases[name], cases[ATLASES[0]]))) for name in ATLASES}
            results[f"{layout} {batch}"] = {"seconds_per_cell": cases, "ratios": ratios}
            rows.append((layout, f"{batch:,}", f"{1e6 * np.median(cases[ATLASES[0]]):.1f}",
                         *(f"{ratios[name]:.2f}" for name in ATLASES[1:])))  # fmt: skip
    print(table(("batches", "cells", "one order, us CPU/cell", *(f"{n}, x" for n in ATLASES[1:])), rows))
    print(", ".join(f"{name}: {8 * sizes[name] / nonzeros:.1f} bits per nonzero" for name in ATLASES))
    print(
        f"{options.cells:,} cells x {options.genes:,} genes in {options.groups} datasets, "
        f"{options.density:.0%} nonzero, medians of {options.rounds} rounds"
    )
    found = conditions()
    print(describe(found))
    write_json(options.out / "gene_orders.json", {"conditions": found, "results": results, "bytes": sizes})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
