"""What the benchmarks share: generated data, and the conditions of a run."""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from hbx_gpu._bench import machine


@dataclass(frozen=True)
class DataSpec:
    """Generated data: n_groups datasets of equal size, every cell with the same number of nonzeros.

    Counts are 1 + the failures before a success of probability 0.3; columns are uniform. Every dataset after
    the first has its genes in another order, unless `gene_orders` is "one".
    """

    cells: int = 40_000
    genes: int = 20_000
    density: float = 0.07
    groups: int = 4
    codec: str | None = None
    gene_orders: str = "mixed"

    @property
    def rows_per_group(self) -> int:
        """Cells of each dataset."""
        return self.cells // self.groups

    def describe(self) -> str:
        """One line for tables."""
        return (
            f"{self.rows_per_group * self.groups:,} cells x {self.genes:,} genes, {self.density:.0%} nonzero "
            f"in every cell, {self.groups} datasets, {self.gene_orders} gene order"
            + "s"
            * (self.gene_orders == "mixed")
        )


@dataclass(frozen=True)
class Prepared:
    """Where generated data lie: one atlas, and the same cells in the same order as one plain .h5ad."""

    atlas: Path
    h5ad: Path


def prepare(folder: Path, spec: DataSpec) -> Prepared:
    """Generate the data of `spec` below `folder`, unless a run before left it there."""
    name = "-".join(f"{key}{value}" for key, value in asdict(spec).items())
    home = folder / name
    done = Prepared(home / "atlas", home / "whole.h5ad")
    if (home / "complete").exists():
        return done
    from anndata.experimental import concat_on_disk
    from tqdm import tqdm

    from hbx_gpu.atlas import add_from_h5ad, create_or_open_atlas
    from hbx_gpu.synthetic import Uniform, write_h5ad

    home.mkdir(parents=True, exist_ok=True)
    parts = [home / f"dataset_{k}.h5ad" for k in range(spec.groups)]
    model = Uniform(spec.genes, spec.density)
    with tqdm(total=spec.rows_per_group * spec.groups, unit="cell", desc="generating") as bar:
        for k, part in enumerate(parts):
            write_h5ad(part, spec.rows_per_group, spec.genes, seed=k, model=model, compression=None,
                       progress=bar.update)  # fmt: skip
            if k and spec.gene_orders == "mixed":
                _rename_genes(part, seed=k)
    atlas = create_or_open_atlas(done.atlas, codec=spec.codec)
    for part in tqdm(parts, unit="file", desc="ingesting"):
        add_from_h5ad(atlas, part, exist_ok=True)
    atlas.optimize()
    atlas.snapshot()
    concat_on_disk(parts, done.h5ad, index_unique="-")
    for part in parts:
        part.unlink()
    (home / "complete").touch()
    return done


def _rename_genes(path: Path, seed: int) -> None:
    """Give the columns of an .h5ad each other's names; all are drawn alike, so their order is another."""
    import h5py
    import numpy as np
    from anndata.io import read_elem, write_elem

    with h5py.File(path, "r+") as file:
        var = read_elem(file["var"])
        var.index = np.random.default_rng(seed).permutation(var.index.to_numpy())
        write_elem(file, "var", var)


def conditions(gpu: int | None = None) -> machine.Conditions:
    """What a figure needs beside it: machine, versions, commit."""
    return {**machine.conditions(gpu), "commit": _commit()}


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
