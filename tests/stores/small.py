"""A small AnnData, and its rows as a store gives them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

import hbx_gpu


def small(n_cells: int = 12, n_genes: int = 7) -> anndata.AnnData:
    """Counts with an empty row."""
    rng = np.random.default_rng(0)
    dense = rng.integers(1, 4, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < 0.5)
    dense[n_cells // 4] = 0
    return anndata.AnnData(
        sp.csr_matrix(dense.astype(np.float32)),
        obs=pd.DataFrame({"k": np.arange(n_cells)}, index=[f"c{i}" for i in range(n_cells)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]),
    )


def as_dense(dataset: Any) -> np.ndarray:
    """All rows of a dataset as one matrix."""
    if not len(dataset):
        return np.zeros((0, dataset.n_features))
    batch = dataset.__getitems__(np.arange(len(dataset)))
    if not hasattr(batch, "offsets"):
        return np.asarray(batch.data)
    shape = (len(dataset), dataset.n_features)
    result: np.ndarray = sp.csr_matrix(
        (batch.values.astype(float), batch.indices, batch.offsets), shape=shape
    ).toarray()
    return result


def rows_of(path: Path, layer: str = "X") -> np.ndarray:
    """All rows of a matrix of a store."""
    return as_dense(hbx_gpu.open(path).to_cell_dataset(layer=layer))


def written(path: Path, data: anndata.AnnData, zarr_format: int = 3) -> Any:
    """Write a zarr store; returns its root group, to be changed."""
    with anndata.settings.override(zarr_write_format=zarr_format):
        data.write_zarr(path)
    return zarr.open_group(str(path), mode="a", use_consolidated=False)


def put(group: Any, name: str, values: np.ndarray, **how: Any) -> Any:
    """An array in the place of another one, which may be dense."""
    if name in group:
        del group[name]
    parent, _, last = name.rpartition("/")
    array = (group[parent] if parent else group).create_array(
        last, shape=values.shape, dtype=values.dtype, **how
    )
    array[...] = values
    if values.ndim == 2:
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return array


def chunk_file(array: Path, number: int) -> Path:
    """The object of a chunk of an array of one axis, zarr 2 or 3."""
    return next(path for path in (array / "c" / str(number), array / str(number)) if path.exists())
