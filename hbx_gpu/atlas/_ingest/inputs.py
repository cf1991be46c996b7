"""What is to be ingested, whatever it comes from: matrix, cells, features, and what identifies them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import scipy.sparse

from hbx_gpu._h5ad.files import AnnDataGroup
from hbx_gpu._h5ad.matrix import CsrMatrix, DenseMatrix, Matrix
from hbx_gpu.atlas._model import columns
from hbx_gpu.errors import InvalidDataError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

# Columns of var that usually hold the durable ids where the names of the features do not.
_ID_COLUMNS = (
    "gene_ids",
    "gene_id",
    "ensembl_id",
    "ensembl_ids",
    "ensembl",
    "feature_id",
    "feature_ids",
    "id",
)
_HASH_BYTES = 1 << 24
_SHOWN = 5


@dataclass(frozen=True)
class Input:
    """One matrix with its cells and features.

    Attributes
    ----------
    source
        Path of the file, or what else it is; for messages.
    source_name
        As recorded with the dataset.
    sha256
        Of the file, or of the content of an AnnData in memory.
    matrix_name
        ``X``, ``raw`` or a layer.
    matrix, obs, var
        The data; shapes agree.
    available
        Matrices that the source holds.
    keeps_order
        Whether columns and elements are to be stored in the source's order, so that the source can be made
        again; otherwise columns are ordered as the registry numbers them.
    """

    source: str
    source_name: str
    sha256: str
    matrix_name: str
    matrix: Matrix
    obs: pd.DataFrame
    var: pd.DataFrame
    available: Sequence[str]
    keeps_order: bool = False

    def __post_init__(self) -> None:
        n_obs, n_vars = self.matrix.shape
        if (n_obs, n_vars) != (len(self.obs), len(self.var)):
            raise InvalidDataError(
                f"{self.matrix.name} is {n_obs} x {n_vars}, but there are {len(self.obs)} rows in obs and "
                f"{len(self.var)} in var; the file is damaged, write it anew"
            )
        if not n_obs or not n_vars:
            what = "cells" if not n_obs else "features"
            raise InvalidDataError(
                f"{self.matrix.name} has no {what} ({n_obs} x {n_vars}): nothing to ingest"
            )


def from_h5ad(file: AnnDataGroup, matrix: str, *, sha256: str | None = None) -> Input:
    """One matrix of an open .h5ad file, or of a modality of an .h5mu file.

    Parameters
    ----------
    file, matrix
        Where it is.
    sha256
        Of the file, where that is known.
    """
    inside = f"mod/{file.modality}/" if file.modality else ""
    return Input(
        file.source,
        file.path.name,
        sha256 or hash_file(file.path),
        inside + matrix,
        file.matrix(matrix),
        file.obs(),
        file.var(matrix),
        file.matrices(),
    )


def from_anndata(adata: AnnData, matrix: str, *, source: str = "AnnData object") -> Input:
    """One matrix of an AnnData in memory.

    Raises
    ------
    InvalidDataError
        No such matrix, or one of a kind that cannot be read.
    """
    available = [name for name, there in (("X", adata.X), ("raw", adata.raw)) if there is not None]
    # Since anndata 0.13 X is a layer too, named None.
    available += [str(name) for name in adata.layers if name is not None]
    if matrix not in available:
        raise InvalidDataError(f"{source} has no matrix {matrix!r}; it holds {available}")
    values = adata.X if matrix == "X" else adata.raw.X if matrix == "raw" else adata.layers[matrix]
    var = adata.raw.var if matrix == "raw" else adata.var
    opened = _open(values, f"{source}, matrix {matrix!r}")
    digest = _hash(opened, [*adata.obs_names, *var.index])
    return Input(source, source, digest, matrix, opened, adata.obs, var, available)


def _open(values: Any, name: str) -> CsrMatrix | DenseMatrix:
    if scipy.sparse.issparse(values):
        rows = values.tocsr()
        return CsrMatrix(name, rows.shape, rows.indptr, rows.indices, rows.data)
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return DenseMatrix(name, values.shape, np.asarray(values))
    raise InvalidDataError(
        f"{name}: expected a SciPy sparse matrix or a NumPy array, found {type(values).__name__}; convert "
        "it, or write the AnnData to a file and ingest that"
    )


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _hash(matrix: CsrMatrix | DenseMatrix, names: Sequence[str]) -> str:
    digest = hashlib.sha256(f"{matrix.shape} {matrix.dtype}".encode())
    parts = [matrix.values]
    if isinstance(matrix, CsrMatrix):
        parts += [matrix.indptr, matrix.indices]
    for part in parts:
        step = max(1, _HASH_BYTES // max(1, part[:1].nbytes))
        for i in range(0, len(part), step):
            digest.update(np.ascontiguousarray(part[i : i + step]).tobytes())
    for name in names:
        digest.update(str(name).encode() + b"\0")
    return digest.hexdigest()


def pick_feature_ids(var: pd.DataFrame, column: str | None, *, source: str) -> tuple[str, list[str]]:
    """Ids by which features are told apart across datasets: the column they come from, and one per feature.

    Parameters
    ----------
    var
        Table of the features, their names as index.
    column
        Column of `var`, or ``index`` for the names. By default ``global_feature_uid`` or ``uid``, else the
        names if they are unique, else the first column of the usual ones that is.
    source
        For messages.

    Raises
    ------
    InvalidDataError
        Ids that are repeated, missing or no strings; says which columns would do.
    """
    if column is not None:
        if column not in var.columns and column not in ("index", var.index.name):
            raise InvalidDataError(
                f"{source}: var has no column {column!r}; it has {[str(c) for c in var.columns]}, "
                "and its index"
            )
        ids = _strings(var[column] if column in var.columns else var.index)
        return column, _checked(ids, f"column {column!r}", var, source)
    for name in ("global_feature_uid", "uid"):
        if name in var.columns:
            return name, _checked(_strings(var[name]), f"column {name!r}", var, source)
    names = _strings(var.index)
    if names is None or len(set(names)) < len(names):
        for name in _ID_COLUMNS:
            if _is_unique(var, name):
                return name, _checked(_strings(var[name]), f"column {name!r}", var, source)
    return "index", _checked(names, "the index", var, source)


def feature_columns(data: Input, id_column: str, feature_ids: Sequence[str]) -> pa.Table:
    """Rows for the registry: ``uid``, the columns of var, and the names where the ids come from a column."""
    var = data.var.drop(columns=[name for name in (id_column, "global_index") if name in data.var.columns])
    if id_column in data.var.columns and "feature_name" not in var.columns:
        var = var.assign(feature_name=data.var.index.to_numpy())
    others = columns.to_arrow(var, reserved=("uid", "global_index"), source=f"{data.source}, var")
    return with_columns({"uid": pa.array(list(feature_ids), pa.string())}, others)


OWN_COLUMNS = ("uid", "dataset_uid", "obs_name")
"""What an ingest puts into an obs table itself."""


def obs_columns(names: Sequence[str], found: pa.Table, dataset_uid: str, *, source: str) -> pa.Table:
    """Rows for an obs table without pointers: ``uid``, ``dataset_uid``, ``obs_name``, then the columns found.

    Parameters
    ----------
    names
        Of the cells.
    found
        Columns of obs; one called ``uid`` gives the cells' uids, which otherwise follow from `dataset_uid`.
    dataset_uid
        The dataset.
    source
        For messages.

    Raises
    ------
    InvalidDataError
        The column ``uid`` does not hold unique strings.
    """
    uids = cell_uids(dataset_uid, len(names))
    if "uid" in found.schema.names:
        given = _strings(found.column("uid").to_pylist())
        if given is None or len(set(given)) < len(given):
            raise InvalidDataError(f"{source}: column 'uid' must hold unique strings, one per cell")
        uids = pa.array(given, pa.string())
        found = found.drop_columns(["uid"])
    own = {
        "uid": uids,
        "dataset_uid": pa.array(np.full(len(names), dataset_uid, object), pa.string()),
        "obs_name": pa.array(list(names), pa.string()),
    }
    return with_columns(own, found)


def with_columns(first: Mapping[str, pa.Array], others: pa.Table) -> pa.Table:
    """A table of `first`, then the columns of `others`."""
    return pa.table({**first, **dict(zip(others.schema.names, others.columns, strict=True))})


def cell_uids(dataset_uid: str, n: int) -> pa.Array:
    """string, (n,). Uids of a dataset's cells, 16 hexadecimal digits, from its uid and their row numbers.

    A bijection of the row number, so no two cells of a dataset share one.
    """
    seed = np.frombuffer(hashlib.sha256(dataset_uid.encode()).digest()[:8], "<u8")
    # The finaliser of splitmix64; arrays wrap around modulo 2^64.
    x = seed + np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    digits = (x ^ (x >> np.uint64(31))).astype(">u8").tobytes().hex()
    return pa.array([digits[i : i + 16] for i in range(0, len(digits), 16)], pa.string())


def _strings(values: Any) -> list[str] | None:
    """The values if all are non-empty strings, else None."""
    listed = list(values)
    return listed if all(isinstance(value, str) and value for value in listed) else None


def _is_unique(var: pd.DataFrame, column: str) -> bool:
    ids = _strings(var[column]) if column in var.columns else None
    return ids is not None and len(set(ids)) == len(ids)


def _checked(ids: list[str] | None, what: str, var: pd.DataFrame, source: str) -> list[str]:
    good = [str(c) for c in var.columns if _is_unique(var, c)]
    advice = (
        f"name one that is unique with feature_id_column (--feature-id-column): {good}"
        if good
        else "no column of var is unique; add one, or make the names unique (adata.var_names_make_unique())"
    )
    if ids is None:
        raise InvalidDataError(
            f"{source}: {what} of var holds values that are missing or no strings; {advice}"
        )
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = list(dict.fromkeys(uid for uid in ids if uid in seen or seen.add(uid)))  # type: ignore[func-returns-value]
        raise InvalidDataError(
            f"{source}: {what} of var names {len(twice)} feature(s) more than once, for example "
            f"{twice[:_SHOWN]}; {advice}"
        )
    return ids
