"""The data of the comparison: two published specifications and any .h5ad, as one plain CSR .h5ad each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.peers.protocol import Csr, fingerprints, gene_weights

# Part of the meaning of a seed: block k draws from its own generator, keyed on (seed, k).
_BLOCK_ROWS = 1_024
# Nonzeros that a foreign matrix is copied by.
_COPY_ROWS = 8_192
# The largest count that the inverse of the distribution is followed to.
_LARGEST = 1 << 20


class Model(Protocol):
    """What draws the counts of consecutive cells."""

    @property
    def n_genes(self) -> int:
        """Width of the matrix."""
        ...

    def describe(self) -> str:
        """One clause for tables."""
        ...

    def draw(self, rng: np.random.Generator, n_rows: int) -> Csr:
        """Counts of n_rows cells."""
        ...


@dataclass(frozen=True)
class SpecA:
    """The throughput data of Homeobox's published benchmark: no structure, geometric counts.

    Every entry is nonzero with probability `density`; nonzero values are 1 + Geometric(0.3), the geometric
    variable itself starting at 1, as the script of that benchmark draws them.
    """

    n_genes: int = 20_000
    density: float = 0.07

    def describe(self) -> str:
        """One clause for tables."""
        return f"A: {self.n_genes:,} genes, {self.density:.0%} nonzero at random, values 1 + Geometric(0.3)"

    def draw(self, rng: np.random.Generator, n_rows: int) -> Csr:
        """Counts of n_rows cells."""
        rows, columns = np.nonzero(rng.random((n_rows, self.n_genes), dtype=np.float32) < self.density)
        return Csr(_indptr(rows, n_rows), columns, 1 + rng.geometric(0.3, size=len(columns)))


@dataclass(frozen=True)
class SpecB:
    """Realistic counts: gamma-Poisson around log-normal gene means, cells of log-normal depth.

    Attributes
    ----------
    mean_sd
        Standard deviation of the logarithm of the genes' means.
    median_depth, depth_sd
        Counts per cell: median, and standard deviation of the logarithm.
    dispersion
        Squared coefficient of variation of the gamma variable.
    profile_seed
        Fixes the genes' means.
    """

    n_genes: int = 36_601
    mean_sd: float = 2.6
    median_depth: float = 5_000
    depth_sd: float = 0.5
    dispersion: float = 0.3
    profile_seed: int = 0

    def describe(self) -> str:
        """One clause for tables."""
        return (
            f"B: {self.n_genes:,} genes, gamma-Poisson, log-normal gene means (sd {self.mean_sd}), "
            f"log-normal depth (median {self.median_depth:,.0f}, sd {self.depth_sd})"
        )

    def draw(self, rng: np.random.Generator, n_rows: int) -> Csr:
        """Counts of n_rows cells: the inverse of the negative binomial distribution at uniform numbers."""
        shares = np.random.default_rng(self.profile_seed).lognormal(0.0, self.mean_sd, self.n_genes)
        shares /= shares.sum()
        depth = self.median_depth * rng.lognormal(0.0, self.depth_sd, n_rows)
        size = 1 / self.dispersion
        # Most entries are zero, which a coarse number settles; the rest get the digits that the tail needs.
        drawn = rng.random((n_rows, self.n_genes), dtype=np.float32)
        scaled = np.float32(self.dispersion) * np.multiply.outer(depth, shares).astype(np.float32)
        zero = np.exp(np.float32(-size) * np.log1p(scaled))
        rows, columns = np.nonzero(drawn > zero)
        uniform = drawn[rows, columns] + rng.random(len(rows)) * 2.0**-24
        mean = depth[rows] * shares[columns]
        return Csr(_indptr(rows, n_rows), columns, _negative_binomial(uniform, mean, size))


def _negative_binomial(uniform: np.ndarray, mean: np.ndarray, size: float) -> np.ndarray:
    """Smallest count >= 1 whose cumulative probability reaches `uniform`, int64."""
    success = mean / (mean + size)
    mass = (1 - success) ** size
    reached = mass.copy()
    counts = np.ones(len(mean), np.int64)
    open_ = np.arange(len(mean))
    count = 0
    while len(open_) and count < _LARGEST:
        mass[open_] *= (count + size) / (count + 1) * success[open_]
        reached[open_] += mass[open_]
        count += 1
        counts[open_] = count
        # Mass below resolution ends the search where rounding keeps the sum short of the number drawn.
        open_ = open_[(reached[open_] < uniform[open_]) & ((mass[open_] > 1e-18) | (count < mean[open_]))]
    return counts


def _indptr(rows: np.ndarray, n_rows: int) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=n_rows)))).astype(np.int64)


SPECS: dict[str, type[SpecA] | type[SpecB]] = {"A": SpecA, "B": SpecB}


def blocks(model: Model, n_cells: int, seed: int) -> Iterator[Csr]:
    """Cells block by block; the same arguments give the same cells."""
    for number, first in enumerate(range(0, n_cells, _BLOCK_ROWS)):
        rng = np.random.default_rng([seed, number])
        yield model.draw(rng, min(_BLOCK_ROWS, n_cells - first))


def copied(path: Path, n_cells: int | None) -> tuple[list[str], Iterator[Csr]]:
    """Gene ids, and the first n_cells rows (None: all) of X of an .h5ad, however it is stored."""
    import anndata
    from scipy import sparse

    adata = anndata.read_h5ad(path, backed="r")
    last = adata.n_obs if n_cells is None else min(n_cells, adata.n_obs)

    def rows() -> Iterator[Csr]:
        for first in range(0, last, _COPY_ROWS):
            x = sparse.csr_matrix(adata.X[first : min(first + _COPY_ROWS, last)])
            x.sum_duplicates()
            x.eliminate_zeros()
            yield Csr(x.indptr.astype(np.int64), x.indices, x.data)

    names = adata.var_names.astype(str)
    return list(anndata.utils.make_index_unique(names)), rows()


@dataclass(frozen=True)
class Data:
    """What peers convert, and what their rows are held against.

    Attributes
    ----------
    h5ad
        X as uncompressed CSR, float32 and int32.
    truth
        .npy of the fingerprint of every row, in stored order.
    """

    h5ad: Path
    truth: Path
    n_cells: int
    n_genes: int
    nnz: int


def write(
    folder: Path, genes: list[str], rows: Iterator[Csr], progress: Callable[[int], object] = lambda _: None
) -> Data:
    """Write ``source.h5ad`` and ``truth.npy`` into `folder`, a block of rows at a time."""
    import h5py
    import pandas as pd
    from anndata.io import write_elem

    folder.mkdir(parents=True, exist_ok=True)
    weights = gene_weights(len(genes))
    data = Data(folder / "source.h5ad", folder / "truth.npy", 0, len(genes), 0)
    truth, indptr, nnz = [], [np.zeros(1, np.int64)], 0
    with h5py.File(data.h5ad, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        group = file.create_group("X")
        for name, dtype in (("data", "<f4"), ("indices", "<i4")):
            group.create_dataset(name, shape=(0,), maxshape=(None,), chunks=(1 << 16,), dtype=dtype)
        for block in rows:
            truth.append(fingerprints(block, weights))
            indptr.append(block.indptr[1:] + nnz)
            nnz = int(indptr[-1][-1])
            _append(group["data"], block.values)
            _append(group["indices"], block.indices)
            progress(len(block))
        pointers = np.concatenate(indptr)
        n_cells = len(pointers) - 1
        group.create_dataset("indptr", data=pointers)
        group.attrs.update(
            {
                "encoding-type": "csr_matrix",
                "encoding-version": "0.1.0",
                "shape": np.array([n_cells, len(genes)]),
            }
        )
        write_elem(
            file,
            "obs",
            pd.DataFrame({"cell": np.arange(n_cells)}, index=[f"cell_{k}" for k in range(n_cells)]),
        )
        write_elem(file, "var", pd.DataFrame(index=genes))
        for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
            write_elem(file, name, {})
    np.save(data.truth, np.concatenate(truth))
    return Data(data.h5ad, data.truth, n_cells, len(genes), nnz)


def _append(dataset: Any, values: np.ndarray) -> None:
    first = len(dataset)
    dataset.resize((first + len(values),))
    dataset[first:] = values
