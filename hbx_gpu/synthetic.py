"""Count data with the statistics of real cells, written to .h5ad block by block in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import h5py
    from numpy.typing import ArrayLike
    from scipy import sparse

Layout = Literal["csr", "csc", "dense"]
Progress = Callable[[int], object]

# Part of the meaning of a seed: block k of a file draws from its own generator, keyed on (seed, k).
_BLOCK_ROWS = 1024
# Nonzeros held at once while a CSC file is written.
_CSC_BUDGET = 32_000_000
# Keys that keep the generators of one seed apart; block numbers follow after them.
_KEY_PROFILE, _KEY_OBS, _KEY_GENES, _KEY_COUNTS = range(4)

_CELL_TYPES = (
    "B cell",
    "CD4 T cell",
    "CD8 T cell",
    "NK cell",
    "monocyte",
    "dendritic cell",
    "megakaryocyte",
    "plasma cell",
)
_TISSUES = ("blood", "bone marrow", "spleen")


class CountModel(Protocol):
    """What draws the counts of a block of cells."""

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        ...

    def draw(self, rng: np.random.Generator, cell_type: np.ndarray, depth: np.ndarray) -> Block:
        """Counts of one cell per element of cell_type (codes) and depth (expected counts)."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """Rows in CSR form: counts int64 and indices int32 (nnz,), ascending per row; indptr int64."""

    counts: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray


@dataclass(frozen=True, slots=True)
class GammaPoisson:
    """Overdispersed counts of typed cells, as droplet assays give them.

    Attributes
    ----------
    profiles
        float64, (n_types, n_vars). Share of a cell's counts that falls on each gene; a dataset that
        measures a part of the genes keeps the shares of the whole, so rows may sum to less than 1.
    dispersion
        Squared coefficient of variation of a gene's rate between cells of one type.
    """

    profiles: np.ndarray
    dispersion: float = 0.3

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        result: int = self.profiles.shape[1]
        return result

    def draw(self, rng: np.random.Generator, cell_type: np.ndarray, depth: np.ndarray) -> Block:
        """Poisson counts around gamma distributed rates."""
        rates = self.profiles[cell_type] * depth[:, None]
        rates *= rng.standard_gamma(1 / self.dispersion, size=rates.shape) * self.dispersion
        counts = rng.poisson(rates)
        rows, columns = np.nonzero(counts)
        indptr = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=len(counts)))))
        return Block(counts[rows, columns], columns.astype(np.int32), indptr.astype(np.int64))


@dataclass(frozen=True, slots=True)
class Uniform:
    """Benchmark data without structure: every cell has the same number of nonzeros, every gene is alike.

    Attributes
    ----------
    n_vars
        Number of genes.
    density
        Share of genes that are nonzero in every cell.
    success
        Counts are 1 + the failures before a first success of this probability.
    """

    n_vars: int
    density: float = 0.07
    success: float = 0.3

    def draw(self, rng: np.random.Generator, cell_type: np.ndarray, depth: np.ndarray) -> Block:  # noqa: ARG002
        """Distinct ascending genes at random; depth plays no part."""
        n_rows, per_row = len(cell_type), round(self.density * self.n_vars)
        # Sorted draws from a range shortened by per_row - 1, spread by their rank, are distinct.
        indices = rng.integers(0, self.n_vars - per_row + 1, size=(n_rows, per_row), dtype=np.int32)
        indices.sort(axis=1)
        indices += np.arange(per_row, dtype=np.int32)
        counts = rng.geometric(self.success, size=n_rows * per_row)
        return Block(counts, indices.ravel(), np.arange(n_rows + 1, dtype=np.int64) * per_row)


def expression_profiles(
    n_types: int, n_vars: int, *, seed: int = 0, marker_share: float = 0.02
) -> np.ndarray:
    """Expression of cell types: log-normal gene means, and marker genes that only one type raises.

    Parameters
    ----------
    n_types, n_vars
        Number of cell types and of genes.
    seed
        Same seed, same profiles.
    marker_share
        Share of the genes that mark each type (raised about 7-fold).

    Returns
    -------
    float64, (n_types, n_vars), rows sum to 1.
    """
    rng = np.random.default_rng([seed, _KEY_PROFILE])
    means = rng.lognormal(mean=0.0, sigma=1.8, size=n_vars)
    # Types differ a little everywhere and a lot in their markers.
    profiles = means * rng.lognormal(sigma=0.15, size=(n_types, n_vars))
    n_markers = min(max(1, round(marker_share * n_vars)), n_vars // n_types)
    markers = rng.permutation(n_vars)[: n_types * n_markers].reshape(n_types, n_markers)
    for row, genes in zip(profiles, markers, strict=True):
        row[genes] = (means[genes] + np.median(means)) * rng.lognormal(mean=2.0, sigma=0.4, size=n_markers)
    result: np.ndarray = profiles / profiles.sum(axis=1, keepdims=True)
    return result


def gene_ids(n_vars: int) -> np.ndarray:
    """Ids in the manner of Ensembl's, object (n_vars,)."""
    return np.array([f"ENSG{k:011d}" for k in range(1, n_vars + 1)], dtype=object)


def write_h5ad(
    path: str | Path,
    n_obs: int,
    n_vars: int,
    *,
    seed: int = 0,
    model: CountModel | None = None,
    genes: np.ndarray | None = None,
    cell_types: tuple[str, ...] = _CELL_TYPES,
    median_depth: float | None = None,
    layout: Layout = "csr",
    compression: str | None = "gzip",
    dtype: str = "float32",
    extra_obs: Mapping[str, ArrayLike] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a count matrix as .h5ad, a block of rows at a time.

    ``obs`` holds ``cell_type`` and ``donor`` (categories) and ``n_counts`` (int64); ``var`` is indexed by
    gene id and holds ``gene_symbol``. The counts are in ``X``.

    Parameters
    ----------
    path
        File to write; an existing one is replaced, and only by a finished one.
    n_obs, n_vars
        Number of cells and genes.
    seed
        Same arguments, same content.
    model
        What draws the counts; :class:`GammaPoisson` over :func:`expression_profiles` when None.
    genes
        Gene ids, (n_vars,); ``gene_ids(n_vars)`` when None.
    cell_types
        Names of the types; their shares in the data fall off with their position.
    median_depth
        Median of the log-normal number of counts per cell, over all genes of the model's profiles;
        0.25 per gene when None, which leaves about 10 % of the matrix nonzero.
    layout
        How X is stored.
    compression
        HDF5 filter of X's arrays (``"gzip"``, ``"lzf"``), None for plain bytes.
    dtype
        Dtype of the values of X.
    extra_obs
        Further obs columns, each of length n_obs.
    progress
        Called with the number of rows finished since the last call. A CSC file is generated as often
        as its budget of memory asks, and reports its last pass.

    Returns
    -------
    The path written.

    Raises
    ------
    ValueError
        When the model or the gene ids are not of length n_vars.
    """
    model = model or GammaPoisson(expression_profiles(len(cell_types), n_vars, seed=seed))
    genes = gene_ids(n_vars) if genes is None else genes
    for what, found in (("model", model.n_vars), ("genes", len(genes))):
        if found != n_vars:
            raise ValueError(f"{what} must have n_vars = {n_vars} genes, found {found}")
    cells = _draw_cells(n_obs, cell_types, 0.25 * n_vars if median_depth is None else median_depth, seed)
    file = _Counts(model, cells, seed)
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    try:
        _write(unfinished, file, genes, layout=layout, compression=compression, dtype=dtype,
               cell_types=cell_types, extra_obs=extra_obs or {}, progress=progress)  # fmt: skip
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def write_demo_pair(
    folder: str | Path,
    *,
    n_obs: tuple[int, int] = (12_000, 8_000),
    n_vars: int = 2_000,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Write two datasets that only an atlas brings together: same cell types, other genes, other order.

    Both measure n_vars genes out of 1.25 n_vars, so they share at least 60 % of their genes. The second
    has a further obs column, ``tissue``.

    Parameters
    ----------
    folder
        Where ``synthetic_a.h5ad`` and ``synthetic_b.h5ad`` go; made if absent.
    n_obs
        Number of cells of each.
    n_vars
        Number of genes of each.
    seed, progress
        As in :func:`write_h5ad`.

    Returns
    -------
    The two paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    n_all = round(1.25 * n_vars)
    profiles = expression_profiles(len(_CELL_TYPES), n_all, seed=seed)
    ids = gene_ids(n_all)
    paths = []
    for k, n in enumerate(n_obs):
        rng = np.random.default_rng([seed, _KEY_GENES, k])
        measured = rng.permutation(n_all)[:n_vars]
        extra = {"tissue": rng.choice(np.array(_TISSUES, dtype=object), size=n)} if k else {}
        path = write_h5ad(
            folder / f"synthetic_{'ab'[k]}.h5ad",
            n,
            n_vars,
            seed=seed * 2 + k,
            model=GammaPoisson(np.ascontiguousarray(profiles[:, measured])),
            genes=ids[measured],
            extra_obs=extra,
            progress=progress,
        )
        paths.append(path)
    return paths[0], paths[1]


@dataclass(frozen=True, slots=True)
class _Cells:
    """Per cell: type and donor codes, expected number of counts."""

    cell_type: np.ndarray
    donor: np.ndarray
    depth: np.ndarray


def _draw_cells(n_obs: int, cell_types: tuple[str, ...], median_depth: float, seed: int) -> _Cells:
    rng = np.random.default_rng([seed, _KEY_OBS])
    shares = 1 / np.arange(2, len(cell_types) + 2)
    return _Cells(
        cell_type=rng.choice(len(cell_types), size=n_obs, p=shares / shares.sum()),
        donor=rng.integers(0, 6, size=n_obs),
        depth=rng.lognormal(np.log(median_depth), 0.45, size=n_obs),
    )


@dataclass(frozen=True, slots=True)
class _Counts:
    """The matrix as it will be written: any block of rows, drawn again on request."""

    model: CountModel
    cells: _Cells
    seed: int

    def __len__(self) -> int:
        return len(self.cells.depth)

    def blocks(self) -> Iterator[Block]:
        for number, first in enumerate(range(0, len(self), _BLOCK_ROWS)):
            rows = slice(first, first + _BLOCK_ROWS)
            rng = np.random.default_rng([self.seed, _KEY_COUNTS, number])
            yield self.model.draw(rng, self.cells.cell_type[rows], self.cells.depth[rows])


def _write(
    path: Path,
    counts: _Counts,
    genes: np.ndarray,
    *,
    layout: Layout,
    compression: str | None,
    dtype: str,
    cell_types: tuple[str, ...],
    extra_obs: Mapping[str, ArrayLike],
    progress: Progress | None,
) -> None:
    import h5py
    import pandas as pd
    from anndata.io import write_elem

    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_x = {"csr": _write_csr, "csc": _write_csc, "dense": _write_dense}[layout]
        totals = write_x(file, counts, np.dtype(dtype), compression, progress or (lambda _: None))
        cells = counts.cells
        obs = pd.DataFrame(
            {
                "cell_type": pd.Categorical.from_codes(cells.cell_type, categories=list(cell_types)),
                "donor": pd.Categorical.from_codes(
                    cells.donor, categories=[f"donor {k}" for k in range(1, 7)]
                ),
                "n_counts": totals,
                **extra_obs,
            },
            index=[f"cell_{k}" for k in range(len(counts))],
        )
        var = pd.DataFrame(
            {"gene_symbol": [f"G{int(uid[4:])}" if uid[4:].isdigit() else uid for uid in genes]}, index=genes
        )
        write_elem(file, "obs", obs)
        write_elem(file, "var", var)
        for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
            write_elem(file, name, {})


def _write_csr(
    file: h5py.File, counts: _Counts, dtype: np.dtype, compression: str | None, progress: Progress
) -> np.ndarray:
    group = _sparse_group(file, "csr_matrix", counts, dtype, compression)
    totals, indptr = [], [np.zeros(1, np.int64)]
    for block in counts.blocks():
        indptr.append(block.indptr[1:] + indptr[-1][-1])
        _append(group["data"], block.counts)
        _append(group["indices"], block.indices)
        totals.append(_row_sums(block))
        progress(len(totals[-1]))
    group.create_dataset("indptr", data=np.concatenate(indptr))
    return np.concatenate(totals) if totals else np.empty(0, np.int64)


def _write_csc(
    file: h5py.File, counts: _Counts, dtype: np.dtype, compression: str | None, progress: Progress
) -> np.ndarray:
    group = _sparse_group(file, "csc_matrix", counts, dtype, compression)
    n_vars = counts.model.n_vars
    totals = []
    per_gene = np.zeros(n_vars, np.int64)
    for block in counts.blocks():
        per_gene += np.bincount(block.indices, minlength=n_vars)
        totals.append(_row_sums(block))
    indptr = np.concatenate(([0], np.cumsum(per_gene)))
    first = 0
    while first < n_vars:
        # As many columns as the budget holds, drawn anew from every block of rows.
        last = max(first + 1, int(np.searchsorted(indptr, indptr[first] + _CSC_BUDGET, side="right")) - 1)
        slab = _columns(counts, first, last, dtype, progress if last == n_vars else None)
        _append(group["data"], slab.data)
        _append(group["indices"], slab.indices)
        del slab  # before the next one is drawn
        first = last
    group.create_dataset("indptr", data=indptr)
    return np.concatenate(totals) if totals else np.empty(0, np.int64)


def _columns(
    counts: _Counts, first: int, last: int, dtype: np.dtype, progress: Progress | None
) -> sparse.csc_matrix:
    """CSC matrix of the columns [first, last)."""
    from scipy import sparse

    slabs = [sparse.csr_matrix((0, last - first), dtype=dtype)]
    for block in counts.blocks():
        shape = len(block.indptr) - 1, counts.model.n_vars
        rows = sparse.csr_matrix((block.counts.astype(dtype), block.indices, block.indptr), shape)
        slabs.append(rows[:, first:last])
        if progress:
            progress(shape[0])
    slab = sparse.vstack(slabs, format="csr")
    del slabs
    return slab.tocsc()


def _write_dense(
    file: h5py.File, counts: _Counts, dtype: np.dtype, compression: str | None, progress: Progress
) -> np.ndarray:
    n_vars = counts.model.n_vars
    chunks = (min(256, len(counts)), n_vars) if len(counts) else None
    x = file.create_dataset(
        "X", shape=(len(counts), n_vars), dtype=dtype, chunks=chunks, compression=compression
    )
    x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    totals: list[np.ndarray] = []
    first = 0
    for block in counts.blocks():
        n_rows = len(block.indptr) - 1
        dense = np.zeros((n_rows, n_vars), dtype)
        dense[np.repeat(np.arange(n_rows), np.diff(block.indptr)), block.indices] = block.counts
        x[first : first + n_rows] = dense
        first += n_rows
        totals.append(_row_sums(block))
        progress(n_rows)
    return np.concatenate(totals) if totals else np.empty(0, np.int64)


def _sparse_group(
    file: h5py.File, encoding: str, counts: _Counts, dtype: np.dtype, compression: str | None
) -> h5py.Group:
    group = file.create_group("X")
    shape = np.array([len(counts), counts.model.n_vars])
    group.attrs.update({"encoding-type": encoding, "encoding-version": "0.1.0", "shape": shape})
    for name, kind in (("data", dtype), ("indices", np.dtype(np.int32))):
        group.create_dataset(
            name, shape=(0,), maxshape=(None,), chunks=(65_536,), dtype=kind, compression=compression
        )
    return group


def _append(dataset: h5py.Dataset, values: np.ndarray) -> None:
    first = len(dataset)
    dataset.resize((first + len(values),))
    dataset[first:] = values


def _row_sums(block: Block) -> np.ndarray:
    sums = np.concatenate(([0], np.cumsum(block.counts, dtype=np.int64)))
    return np.diff(sums[block.indptr])
