"""What the tests of writing share: small .h5ad files, and everything an archive holds in comparable form."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from hbx_gpu.dataloader import CellDataset
from hbx_gpu.scdl._format.archive import open_archive
from hbx_gpu.scdl._format.frames import MemoryFrame
from hbx_gpu.scdl._format.names import read_obs_names, read_var_names
from hbx_gpu.scdl._sources.axis import GeneBlock
from hbx_gpu.scdl._writing.convert import ConvertOptions, convert_h5ad
from tests.scdl.conftest import Case


def counts(n_rows: int, n_cols: int, *, seed: int = 0, high: int = 100, dtype: str = "f4") -> sp.csr_matrix:
    """Random counts, a quarter of them not zero, some rows empty."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, high, (n_rows, n_cols)) * (rng.random((n_rows, n_cols)) < 0.25)
    dense[rng.random(n_rows) < 0.1] = 0
    return sp.csr_matrix(dense.astype(dtype))


def adata(x: Any, *, seed: int = 0, genes: str = "g", cells: str = "c") -> ad.AnnData:
    """An AnnData with a column of each kind."""
    rng = np.random.default_rng(seed)
    n, m = x.shape
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(rng.choice(["b", "a"], n), categories=["b", "a", "unused"]),
            "number": rng.integers(0, 9, n),
            "score": np.where(rng.random(n) < 0.2, np.nan, rng.random(n)),
            "text": [f"t{i}" for i in range(n)],
        },
        index=[f"{cells}{i}" for i in range(n)],
    )
    var = pd.DataFrame(
        {"feature_id": [f"{genes}{i}" for i in range(m)]}, index=[f"n{genes}{i}" for i in range(m)]
    )
    return ad.AnnData(x, obs=obs, var=var)


def h5ad(path: Path, x: Any, **options: Any) -> Path:
    """Write an .h5ad file."""
    adata(x, **options).write_h5ad(path)
    return path


def content(path: Path) -> dict[str, Any]:
    """All that an archive holds, in Python objects."""
    archive = open_archive(path)
    table = archive.neighbors
    names = read_obs_names(path, archive.n_rows)
    return {
        "rows": [
            (archive.data[start:stop].tolist(), archive.indices[start:stop].tolist())
            for start, stop in itertools.pairwise(archive.indptr.tolist())
        ],
        "dtypes": [str(a.dtype) for a in (archive.data, archive.indices, archive.indptr)],
        "bounds": archive.bounds.tolist(),
        "var": [_frame(frame) for frame in archive.var.frames],
        "labels": archive.var.labels,
        "obs": [] if archive.obs is None else [_frame(frame) for frame in archive.obs.frames],
        "genes": [None if n is None else n.tolist() for n in read_var_names(path, len(archive.var))],
        "cells": None if names is None else names.to_pylist(),
        "neighbors": None
        if table is None
        else [tuple(a.tolist() for a in table.of(i)) for i in range(len(table))],
    }


def _frame(frame: Any) -> dict[str, list[Any]]:
    return {name: frame.arrow(name).to_pylist() for name in frame.names}


def matrix(path: Path) -> sp.csr_matrix:
    """The matrix of an archive of one gene block."""
    archive = open_archive(path)
    (n_vars,) = archive.n_vars
    shape = (archive.n_rows, n_vars)
    return sp.csr_matrix((archive.data, archive.indices, archive.indptr.astype(np.int64)), shape)


def leftovers(folder: Path) -> list[str]:
    """Names of what killed or failed writers left in a folder."""
    return sorted(p.name for p in folder.iterdir() if ".scdl-" in p.name)


SOUND = [
    *(
        f"all_dtypes_{kind}{width}"
        for kind, widths in (("uint", (8, 16, 32, 64)), ("float", (16, 32, 64)))
        for width in widths
    ),
    *("single_f32", "uint16_counts", "ragged_two", "neighbors", "empty_rows", "raw_default", "ragged_ten"),
    *(
        "stale_cast",
        "stale_cast_same_width",
        "stale_lengths",
        "unsorted_columns",
        "merge_blocks",
        "index_only",
    ),
    *("legacy_v012", "legacy_v007", "legacy_v007_float64", "labels_json"),
]


def make(
    folder: Path, name: str, *, x: Any = None, dtype: str | None = None, near: bool = False, **kw: Any
) -> Path:
    data = adata(counts(5, 4, seed=len(name)) if x is None else x, **kw)
    if near:
        n = data.n_obs
        data.obsp["near"] = sp.random(n, n, 0.4, "csr", random_state=n, dtype=np.float32)
    data.write_h5ad(folder / f"{name}.h5ad")
    options = ConvertOptions(neighbor_key="near" if near else None)
    convert_h5ad(folder / f"{name}.h5ad", folder / name, options=options, data_dtype=dtype)
    return folder / name


def dense_of(case: Case, dataset: CellDataset) -> np.ndarray:
    """What the dataset must give: the case's dense blocks, genes placed by their ids in the source."""
    bounds = case.expected["block_row_bounds"]
    out = np.zeros((len(dataset), dataset.n_features))
    place = {uid: i for i, uid in enumerate(dataset.feature_uids)}
    frames = case.frames("var")
    for b in range(len(bounds) - 1):
        columns = frames[b]["columns"] if frames else {}
        ids = next((columns[name] for name in ("feature_id", "var_feature_id") if name in columns), None)
        block = case.expected[f"dense_{b}"]
        if ids is None or len(ids) != block.shape[1]:
            ids = [str(i) for i in range(block.shape[1])]
        out[bounds[b] : bounds[b + 1], [place[uid] for uid in ids]] = block
    return out


def block(where: str, n: int, names: Any = None, **columns: Any) -> GeneBlock:
    return GeneBlock(where, n, n, MemoryFrame(columns), names)
